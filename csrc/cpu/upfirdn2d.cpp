// upfirdn2d on the CPU: polyphase, so that no inserted zero is multiplied.
//
// A task is a run of output rows of one image plane (NCHW) or of some channels of one image
// (channels-last). Input rows are widened once into a ring of rows; a filter of rank 1, 1-D or
// found to be an outer product, is applied along x on the way in and along y on the way out; any
// other takes all its taps on the way out. Everything is a weighted sum of contiguous runs.
#include "vec.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kTaskOutputs = 16384;  // output elements of a task, about

struct Axis {
  int64_t in, out, up, down, pad, taps;
};

// Output o = b * up + r reads samples b * down + first + m with taps tap + m * up, m < count.
struct Phase {
  int64_t first, tap, count;
};

GK_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
GK_INLINE int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
GK_INLINE int64_t max_(int64_t a, int64_t b) { return a > b ? a : b; }

GK_INLINE Phase phase_of(const Axis& a, int64_t r) {
  const int64_t start = r * a.down - a.pad, first = floor_div(start + a.up - 1, a.up);
  const int64_t tap = first * a.up - start;
  return {first, tap, tap < a.taps ? (a.taps - tap + a.up - 1) / a.up : 0};
}

// The samples that outputs [0, a.out) read: [lo, hi).
struct Span {
  int64_t lo, hi;
};
Span span_of(const Axis& a) {
  const Phase p = phase_of(a, 0);
  Span s{p.first, p.first + 1};
  for (int64_t r = 0; r < min_(a.up, a.out); r++) {
    const Phase q = phase_of(a, r);
    const int64_t last = (a.out - 1 - r) / a.up * a.down + q.first + q.count;
    s = {min_(s.lo, q.first), max_(s.hi, last)};
  }
  return s;
}

int64_t most_taps(const Axis& a) { return (a.taps + a.up - 1) / a.up; }
int64_t padded(int64_t n) { return (n + 2 * kLanes - 1) / kLanes * kLanes; }

template <typename T, typename S>
GK_INLINE void widen_row(S* out, const T* src, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(src + i));
  if (i < n) store_part(out + i, load_part(src + i, n - i), n - i);
}

// out[p][i] = in[i * factor + p], the parts `stride` apart.
template <typename S>
GK_INLINE void split(S* out, int64_t stride, const S* in, int64_t n, int64_t factor) {
  if (factor == 2) {
    for (int64_t i = 0; i < n; i++) {
      out[i] = in[2 * i];
      out[stride + i] = in[2 * i + 1];
    }
    return;
  }
  for (int64_t p = 0; p < factor; p++)
    for (int64_t i = 0; i < n; i++) out[p * stride + i] = in[i * factor + p];
}

// out[i * factor + p] = in[p][i].
template <typename S>
GK_INLINE void merge(S* out, const S* in, int64_t stride, int64_t n, int64_t factor) {
  if (factor == 2) {
    for (int64_t i = 0; i < n; i++) {
      out[2 * i] = in[i];
      out[2 * i + 1] = in[stride + i];
    }
    return;
  }
  for (int64_t p = 0; p < factor; p++)
    for (int64_t i = 0; i < n; i++) out[i * factor + p] = in[p * stride + i];
}

// The filter as correlation taps, gain included, and its factors if it is an outer product.
template <typename S>
struct Filter {
  Buffer<S> full, x, y;
  bool separable;

  Filter(const S* f, bool one_d, int64_t ny, int64_t nx, bool flip, double gain)
      : full(ny * nx), x(nx), y(ny), separable(one_d) {
    for (int64_t i = 0; i < ny; i++) {
      y[i] = f[flip ? i : ny - 1 - i];
      for (int64_t j = 0; j < nx && one_d; j++) x[j] = S(f[flip ? j : nx - 1 - j] * gain);
      for (int64_t j = 0; j < nx && !one_d; j++)
        full[i * nx + j] = S(f[flip ? i * nx + j : ny * nx - 1 - i * nx - j] * gain);
    }
    if (!one_d) factorise(ny, nx);
  }

  void factorise(int64_t ny, int64_t nx) {
    int64_t at = 0;
    for (int64_t k = 1; k < ny * nx; k++)
      if (std::fabs(full[k]) > std::fabs(full[at])) at = k;
    const S peak = full[at];
    const int64_t row = at / nx, column = at % nx;
    const S tolerance = std::fabs(peak) * (sizeof(S) == 4 ? S(6e-8) : S(2e-16));
    separable = std::isfinite(peak);
    for (int64_t j = 0; j < nx; j++) x[j] = full[row * nx + j];
    for (int64_t i = 0; i < ny; i++) y[i] = peak == 0 ? S(0) : full[i * nx + column] / peak;
    for (int64_t i = 0; i < ny; i++)
      for (int64_t j = 0; j < nx; j++)
        if (!(std::fabs(full[i * nx + j] - x[j] * y[i]) <= tolerance)) separable = false;
  }
};

// out[i] = sum of weight * source[i] over the terms. Sources are readable up to a whole vector, and
// `out` is writable up to one where it is a buffer (kExact false).
template <typename S>
struct Terms {
  Buffer<const S*> src;
  Buffer<S> w;
  int64_t count = 0;

  explicit Terms(int64_t n) : src(n), w(n) {}
  GK_INLINE void add(const S* s, S weight) {
    src[count] = s;
    w[count++] = weight;
  }

  template <bool kExact, typename T>
  GK_INLINE void sum(T* out, int64_t n, int64_t offset = 0) {
    using V = Vec<S>;
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      V a0{}, a1{}, a2{}, a3{};
      for (int64_t t = 0; t < count; t++) {
        const S* s = src[t] + offset + i;
        a0 += load(s) * w[t];
        a1 += load(s + kLanes) * w[t];
        a2 += load(s + 2 * kLanes) * w[t];
        a3 += load(s + 3 * kLanes) * w[t];
      }
      store(out + i, a0);
      store(out + i + kLanes, a1);
      store(out + i + 2 * kLanes, a2);
      store(out + i + 3 * kLanes, a3);
    }
    for (; i < n; i += kLanes) {
      V a{};
      for (int64_t t = 0; t < count; t++) a += load(src[t] + offset + i) * w[t];
      if (kExact && i + kLanes > n)
        store_part(out + i, a, n - i);
      else
        store(out + i, a);
    }
  }
};

// The scratch of a task and the passes over it. A row is `width` samples of `channels` elements; in
// NCHW channels is 1 and, to keep runs contiguous, an input row is split into its `down` phases.
template <typename T>
struct Worker {
  using S = Scalar<T>;
  const Axis& ax;
  const Axis& ay;
  const Filter<S>& f;
  const bool planar;
  const Span span;
  const int64_t channels, parts, part_stride, slot_size, rows, pieces;
  Buffer<S> line, apart, ring, piece, staged;
  Terms<S> terms;

  Worker(const Axis& x, const Axis& y, const Filter<S>& filter, int64_t channels_, bool last)
      : ax(x),
        ay(y),
        f(filter),
        planar(!last),
        span(span_of(x)),
        channels(channels_),
        parts(last ? 1 : x.down),
        part_stride(padded((span.hi - span.lo + parts - 1) / parts * channels)),
        slot_size(filter.separable ? padded(x.out * channels) + x.up : parts * part_stride),
        rows(most_taps(y)),
        pieces(padded((x.out + x.up - 1) / x.up)),
        line(parts * part_stride),
        apart(parts * part_stride),
        ring(rows * slot_size),
        piece(x.up * pieces),
        staged(padded(x.out * channels) + x.up),
        terms(most_taps(x) * most_taps(y)) {
    zero(line, parts * part_stride);
    zero(apart, parts * part_stride);
    zero(ring, rows * slot_size);
  }
  static void zero(Buffer<S>& b, int64_t n) {
    memset(&b[0], 0, static_cast<size_t>(n) * sizeof(S));
  }

  // Sample i of an input row, for sums that run over the following ones.
  GK_INLINE const S* sample(const S* row, int64_t i) const {
    const int64_t k = i - span.lo;
    return parts == 1 ? row + k * channels : row + k % parts * part_stride + k / parts;
  }

  // Adds the taps of outputs b * up + r, r having phase p: the samples of `row` times w[tap].
  GK_INLINE void add_taps(const S* row, const Phase& p, int64_t b, const S* w) {
    for (int64_t m = 0; m < p.count; m++)
      terms.add(sample(row, b * ax.down + p.first + m), w[p.tap + m * ax.up]);
  }

  // An output row into the buffer `out`; gather(p, b) adds the terms of outputs b * up + r.
  template <typename G>
  GK_INLINE void along_x(S* out, const G& gather) {
    if (ax.up == 1 && (planar || ax.down == 1)) {
      terms.count = 0;
      gather(phase_of(ax, 0), 0);
      terms.template sum<false>(out, ax.out * channels);
    } else if (planar) {
      for (int64_t r = 0; r < ax.up; r++) {
        terms.count = 0;
        gather(phase_of(ax, r), 0);
        terms.template sum<false>(&piece[r * pieces], (ax.out + ax.up - 1) / ax.up);
      }
      merge(out, &piece[0], pieces, (ax.out + ax.up - 1) / ax.up, ax.up);
    } else {
      for (int64_t b = 0, o = 0; o < ax.out; b++)
        for (int64_t r = 0; r < ax.up && o < ax.out; r++, o++) {
          terms.count = 0;
          gather(phase_of(ax, r), b);
          terms.template sum<false>(out + o * channels, channels);
        }
    }
  }

  // Puts an input row, `pitch` elements between samples, into the ring.
  GK_INLINE void take_row(S* slot, const T* x, int64_t pitch) {
    const int64_t begin = max_(span.lo, 0), end = min_(span.hi, ax.in);
    S* row = f.separable || parts > 1 ? &line[0] : slot;
    S* to = row + (begin - span.lo) * channels;
    if (pitch == channels && end > begin)
      widen_row(to, x + begin * pitch, (end - begin) * channels);
    for (int64_t i = begin; i < end && pitch != channels; i++)
      widen_row(to + (i - begin) * channels, x + i * pitch, channels);
    if (parts > 1) {
      S* phases = f.separable ? &apart[0] : slot;
      split(phases, part_stride, row, (span.hi - span.lo + parts - 1) / parts, parts);
      row = phases;
    }
    if (f.separable)
      along_x(slot, [&](const Phase& p, int64_t b) { add_taps(row, p, b, &f.x[0]); });
  }

  // Output rows [begin, end) of the image at x into the one at y.
  void run(const T* x, T* y, int64_t pitch, int64_t begin, int64_t end) {
    int64_t next = 0;
    for (int64_t o = begin; o < end; o++) {
      Phase p = phase_of(ay, o % ay.up);
      p.first += o / ay.up * ay.down;
      const int64_t from = max_(p.first, 0), to = min_(p.first + p.count, ay.in);
      for (next = max_(next, from); next < to; next++)
        take_row(&ring[next % rows * slot_size], x + next * ax.in * pitch, pitch);
      const auto slot = [&](int64_t i) { return &ring[i % rows * slot_size]; };
      const auto tap = [&](int64_t i) { return p.tap + (i - p.first) * ay.up; };
      if (!f.separable)
        along_x(&staged[0], [&](const Phase& q, int64_t b) {
          for (int64_t i = from; i < to; i++) add_taps(slot(i), q, b, &f.full[tap(i) * ax.taps]);
        });
      terms.count = 0;
      if (!f.separable) terms.add(&staged[0], S(1));
      for (int64_t i = from; i < to && f.separable; i++) terms.add(slot(i), f.y[tap(i)]);
      T* out = y + o * ax.out * pitch;
      if (pitch == channels)
        terms.template sum<true>(out, ax.out * channels);
      else
        for (int64_t i = 0; i < ax.out; i++)
          terms.template sum<true>(out + i * pitch, channels, i * channels);
    }
  }
};

template <typename T>
int run(const T* x, const Scalar<T>* f, T* y, bool last, int64_t N, int64_t C, const Axis& ax,
        const Axis& ay, bool separable, bool flip, double gain) {
  const Filter<Scalar<T>> filter(f, separable, ay.taps, ax.taps, flip, gain);
  // Channels-last: as many channels as keep a few rows in the first-level cache.
  const int64_t row = max_(ax.in, ax.out);
  int64_t chunk = last ? max_(kLanes, 4096 / row / kLanes * kLanes) : 1;
  if (chunk > C) chunk = C;
  const int64_t chunks = last ? (C + chunk - 1) / chunk : C, images = N * chunks;
  const int64_t strip = min_(ay.out, max_(4 * ay.taps, kTaskOutputs / (ax.out * chunk)));
  const int64_t strips = (ay.out + strip - 1) / strip;
  const int64_t grain = max_(1, kTaskOutputs / (strip * ax.out * chunk));
  parallel(images * strips, grain, [&](int64_t begin, int64_t end) {
    Worker<T> worker(ax, ay, filter, chunk, last);
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / strips, first = task % strips * strip;
      const int64_t stop = min_(first + strip, ay.out);
      const int64_t n = image / chunks, c = last ? image % chunks * chunk : 0;
      const int64_t pitch = last ? C : 1;
      const int64_t x_at = last ? n * ay.in * ax.in * C + c : image * ay.in * ax.in;
      const int64_t y_at = last ? n * ay.out * ax.out * C + c : image * ay.out * ax.out;
      if (!last || c + chunk <= C) {
        worker.run(x + x_at, y + y_at, pitch, first, stop);
      } else {
        Worker<T> tail(ax, ay, filter, C - c, last);
        tail.run(x + x_at, y + y_at, pitch, first, stop);
      }
    }
  });
  return 0;
}

}  // namespace

int upfirdn2d(int dtype, const void* x, const void* f, void* y, bool last, int64_t N, int64_t C,
              int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, int64_t taps_y,
              int64_t taps_x, bool separable, int64_t up_x, int64_t up_y, int64_t down_x,
              int64_t down_y, int64_t pad_x, int64_t pad_y, bool flip, double gain, void*) {
  if (N * C * out_h * out_w == 0) return 0;
  const Axis ax{in_w, out_w, up_x, down_x, pad_x, taps_x};
  const Axis ay{in_h, out_h, up_y, down_y, pad_y, taps_y};
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return run(static_cast<const T*>(x), static_cast<const Scalar<T>*>(f), static_cast<T*>(y), last,
               N, C, ax, ay, separable, flip, gain);
  });
}

}  // namespace gankern::cpu::GANKERN_ISA
