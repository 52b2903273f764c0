// upfirdn2d on the CPU: polyphase, so that no inserted zero is multiplied.
//
// A task is a run of output rows of one image plane (NCHW) or of some channels of one image
// (channels-last). A filter of rank 1, 1-D or found to be an outer product, sums input rows into a
// line, zero-padded, and sums along the line into the output row; any other sums along all the
// lines that it meets at once. Everything is a weighted sum of contiguous runs.
#include "filter.h"
#include "lines.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kTaskOutputs = 16384;  // output elements of a task, about
constexpr int64_t kLine = 12288;         // elements of a line in channels-last

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

// For each phase of the output columns, where in a line its samples lie and their weights.
template <typename S>
struct Table {
  int64_t most;
  Buffer<int64_t> off;
  Buffer<S> w;
  Buffer<int64_t> count;
  Table(int64_t phases, int64_t most_)
      : most(most_), off(phases * most), w(phases * most), count(phases) {}
};

// The scratch of a task and the passes over it. A line is the samples that outputs meet, `channels`
// elements each; in NCHW channels is 1 and a line is split into its `down` phases, so that runs are
// contiguous.
template <typename T>
struct Worker {
  using S = Scalar<T>;
  const Axis& ax;
  const Axis& ay;
  const Filter<S>& f;
  const bool planar;
  const Span span;
  const int64_t channels, phases, parts, part_stride, line_stride, rows, batch, begin, end;
  Buffer<S> lines, linear, pieces, merged, wide, flat;
  const int64_t piece_stride, wide_stride;
  Table<S> table;
  Buffer<int64_t> y_off;
  Buffer<S> y_w;
  Buffer<Phase> y_phases;

  Worker(const Axis& x, const Axis& y, const Filter<S>& filter, int64_t channels_, bool last)
      : ax(x),
        ay(y),
        f(filter),
        planar(!last),
        span(span_of(x)),
        channels(channels_),
        phases(min_(x.up, x.out)),
        parts(last ? 1 : x.down),
        part_stride(padded((span.hi - span.lo + parts - 1) / parts * channels)),
        line_stride(parts * part_stride),
        rows(most_taps(y)),
        batch(last ? 1 : min_(8, y.out)),  // lines made before they are read: by then their stores
                                           // have settled
        begin(max_(span.lo, 0)),
        end(max_(begin, min_(span.hi, x.in))),
        lines(max_(batch, rows) * line_stride),
        linear(line_stride + parts * kLanes * 2),
        pieces(x.up * padded((x.out + x.up - 1) / x.up)),
        merged(2 * padded(x.out * channels + x.up)),
        wide(planar && x.in < kLanes ? y.in * padded(x.in) : 1),
        flat(planar && x.in < kLanes ? padded(y.in * x.in) : 1),
        piece_stride(padded((x.out + x.up - 1) / x.up)),
        wide_stride(padded(x.in)),
        table(phases, most_taps(x) * (filter.separable ? 1 : rows)),
        y_off(rows),
        y_w(rows),
        y_phases(y.up) {
    zero(lines, max_(batch, rows) * line_stride);
    zero(linear, line_stride + parts * kLanes * 2);
    for (int64_t r = 0; r < y.up; r++) y_phases[r] = phase_of(y, r);
    for (int64_t r = 0; r < phases; r++) table.count[r] = 0;
    if (f.separable) add_line(0, &f.x[0]);
  }
  static void zero(const Buffer<S>& b, int64_t n) {
    memset(&b[0], 0, static_cast<size_t>(n) * sizeof(S));
  }

  // Adds a line's samples to the table: w holds the taps along x.
  void add_line(int64_t line, const S* w) {
    for (int64_t r = 0; r < phases; r++) {
      const Phase p = phase_of(ax, r);
      for (int64_t m = 0; m < p.count; m++) {
        const int64_t k = p.first + m - span.lo, t = r * table.most + table.count[r]++;
        table.off[t] =
            line * line_stride + (planar ? k % parts * part_stride + k / parts : k * channels);
        table.w[t] = w[p.tap + m * ax.up];
      }
    }
  }

  // A line from `count` input rows at x + y_off, weighted by y_w; pitch: elements between samples.
  template <bool kPadded, typename I>
  GK_INLINE void make_line(S* line, const I* x, int64_t count, int64_t pitch) {
    S* to = (parts > 1 ? &linear[0] : line) + (begin - span.lo) * channels;
    const I* from = x + begin * pitch;
    if (pitch == channels)
      weighted_sum<kPadded>(to, (end - begin) * channels, from, &y_off[0], &y_w[0], count);
    else
      for (int64_t i = 0; i < end - begin; i++)
        weighted_sum<false>(to + i * channels, channels, from + i * pitch, &y_off[0], &y_w[0],
                            count);
    if (parts > 1)
      split(line, part_stride, &linear[0], (span.hi - span.lo + parts - 1) / parts, parts);
  }

  template <typename O>
  GK_INLINE void sum_phase(O* out, int64_t n, const S* line, int64_t r) {
    weighted_sum<true>(out, n, line, &table.off[r * table.most], &table.w[r * table.most],
                       table.count[r]);
  }

  // An output row from a line, or from all of them; pitch: elements between output samples.
  GK_INLINE void emit(T* out, const S* line, int64_t pitch) {
    if (ax.up == 1 && (planar || (ax.down == 1 && pitch == channels))) {
      sum_phase(out, ax.out * channels, line, 0);
    } else if (planar) {
      const int64_t n = (ax.out + ax.up - 1) / ax.up, zero_off = 0;
      const S one = 1;
      for (int64_t r = 0; r < phases; r++) sum_phase(&pieces[r * piece_stride], n, line, r);
      merge(&merged[0], &pieces[0], piece_stride, n, ax.up);
      weighted_sum<true>(out, ax.out, &merged[0], &zero_off, &one, 1);
    } else {
      for (int64_t b = 0, o = 0; o < ax.out; b++)
        for (int64_t r = 0; r < phases && o < ax.out; r++, o++)
          sum_phase(out + o * pitch, channels, line + b * ax.down * channels, r);
    }
  }

  // The input rows [from, to) that output row o meets, and the tap of the first.
  struct Rows {
    int64_t from, to, tap;
  };
  GK_INLINE Rows rows_of(int64_t o) const {
    const Phase& p = y_phases[o % ay.up];
    const int64_t first = o / ay.up * ay.down + p.first;
    const int64_t from = max_(first, 0), to = max_(from, min_(first + p.count, ay.in));
    return {from, to, p.tap + (from - first) * ay.up};
  }

  // Output rows [first, stop) of the image at x into the one at y.
  void run(const T* x, T* y, int64_t pitch, int64_t first, int64_t stop) {
    const bool narrow = planar && ax.in < kLanes;  // rows shorter than a vector: padded once
    const int64_t wide_from = rows_of(first).from, wide_to = min_(rows_of(stop - 1).to, ay.in);
    if (narrow && wide_to > wide_from) {
      const int64_t none = 0;
      const S one = 1;
      weighted_sum<false>(&flat[0], (wide_to - wide_from) * ax.in, x + wide_from * ax.in, &none,
                          &one, 1);
      for (int64_t i = wide_from; i < wide_to; i++)
        for (int64_t j = 0; j < ax.in; j++)
          wide[i * wide_stride + j] = flat[(i - wide_from) * ax.in + j];
    }
    const int64_t row_size = narrow ? wide_stride : ax.in * pitch;
    const auto line_of = [&](S* line, int64_t count) {
      if (narrow)
        make_line<true>(line, &wide[0], count, 1);
      else
        make_line<false>(line, x, count, pitch);
    };
    for (int64_t o = first; o < stop;) {
      const int64_t until = f.separable ? min_(o + batch, stop) : o + 1;
      for (int64_t k = o; k < until && f.separable; k++) {
        const Rows r = rows_of(k);
        for (int64_t i = r.from; i < r.to; i++) {
          y_off[i - r.from] = i * row_size;
          y_w[i - r.from] = f.y[r.tap + (i - r.from) * ay.up];
        }
        line_of(&lines[(k - o) * line_stride], r.to - r.from);
      }
      if (!f.separable) {
        const Rows r = rows_of(o);
        for (int64_t p = 0; p < phases; p++) table.count[p] = 0;
        y_w[0] = 1;
        for (int64_t i = r.from; i < r.to; i++) {
          y_off[0] = i * row_size;
          line_of(&lines[(i - r.from) * line_stride], 1);
          add_line(i - r.from, &f.full[(r.tap + (i - r.from) * ay.up) * ax.taps]);
        }
      }
      for (int64_t k = o; k < until; k++)
        emit(y + k * ax.out * pitch, &lines[f.separable ? (k - o) * line_stride : 0], pitch);
      o = until;
    }
  }
};

template <typename T>
int run(const T* x, const Scalar<T>* f, T* y, bool last, int64_t N, int64_t C, const Axis& ax,
        const Axis& ay, bool separable, bool flip, double gain) {
  const Filter<Scalar<T>> filter(f, separable, ay.taps, ax.taps, flip, gain);
  const int64_t row = max_(ax.in, ax.out);
  int64_t chunk = last ? max_(kLanes, kLine / row / kLanes * kLanes) : 1;
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
