// The parts of synthesis_epilogue: operands, rows of planes, the filter.
#pragma once

#include "act.h"
#include "filter.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kBlock = 4 * kLanes;
constexpr int64_t kGrain = 16384;  // elements a thread takes at least

struct Geometry {
  int64_t N, C, H, W, out_h, out_w, taps_y, taps_x, x0, y0;
  bool filtered, last;  // last: channels-last
};

// Operands beside x; bits of f32 say which are float32 although x is not.
struct Operands {
  const float* f;
  const void *d, *noise, *strength, *b;
  int64_t noise_n, strength_n;
  int f32;
  bool d_f32() const { return f32 & 1; }
  bool noise_f32() const { return f32 & 2; }
  bool strength_f32() const { return f32 & 4; }
  bool b_f32() const { return f32 & 8; }
};

// A plane of x, y, dx or dy: `step` channels from c on, of sample n.
template <typename T>
struct Plane {
  T* data;
  int64_t row, column;  // strides

  Plane(T* base, const Geometry& g, int64_t h, int64_t w, int64_t n, int64_t c)
      : data(base + (g.last ? n * h * w * g.C + c : (n * g.C + c) * h * w)),
        row(g.last ? w * g.C : w),
        column(g.last ? g.C : 1) {}
};

// Rows are padded: whole vectors are written, since one that is loaded whole soon after would wait
// for the store of a part.
template <typename T, typename S>
GK_INLINE void read(S* out, const T* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) store(out + i, load_part(in + i, n - i));
}

template <typename T, typename S>
GK_INLINE void write(T* out, const S* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) store_part(out + i, load_part(in + i, n - i), n - i);
}

// `width` columns of `step` elements from column `first` of row i on; zeros outside of the plane.
template <typename T, typename S>
void read_row(S* out, Plane<const T> p, int64_t i, int64_t h, int64_t w, int64_t first,
              int64_t width, int64_t step) {
  const int64_t begin = first < 0 ? (-first < width ? -first : width) : 0;
  int64_t end = w - first < width ? w - first : width;
  if (i < 0 || i >= h || end < begin) {
    for (int64_t k = 0; k < width * step; k++) out[k] = 0;
    return;
  }
  for (int64_t k = 0; k < begin * step; k++) out[k] = 0;
  for (int64_t k = end * step; k < width * step; k++) out[k] = 0;
  const T* in = p.data + i * p.row + (first + begin) * p.column;
  if (p.column == 1) return read(out + begin, in, end - begin);
  for (int64_t k = begin; k < end; k++, in += p.column) read(out + k * step, in, step);
}

template <typename T, typename S>
void write_row(Plane<T> p, int64_t i, const S* in, int64_t width, int64_t step) {
  T* out = p.data + i * p.row;
  if (p.column == 1) return write(out, in, width);
  for (int64_t k = 0; k < width; k++) write(out + k * p.column, in + k * step, step);
}

// out[i] = sum over taps of f[ky][kx] * rows[ky][i + kx * step]
template <int kTapsY, int kTapsX, typename S>
GK_INLINE void filter_span(S* out, S* const* rows, const S* f, int taps_y, int taps_x, int64_t n,
                           int64_t step) {
  using V = std::conditional_t<std::is_same_v<S, float>, vf, vd>;
  const int ny = kTapsY ? kTapsY : taps_y, nx = kTapsX ? kTapsX : taps_x;
  for (int64_t i = 0; i < n; i += kLanes) {  // buffers are padded to whole vectors
    V even{}, odd{};
    for (int ky = 0; ky < ny; ky++)
      for (int kx = 0; kx < nx; kx++) {
        const V term = load(rows[ky] + i + kx * step);
        if ((kx + ky) % 2)
          odd += term * f[ky * nx + kx];
        else
          even += term * f[ky * nx + kx];
      }
    store(out + i, even + odd);
  }
}

int64_t padded(int64_t n) { return n + 2 * kLanes; }

// Rows of filter(x) from rows of x. An outer product is applied along y, then along x.
template <typename S>
class RowFilter {
 public:
  // width: elements that the outputs of a row meet.
  RowFilter(const Filter<S>& f, int64_t taps_y, int64_t taps_x, int64_t width)
      : f_(f),
        ny_(int(taps_y)),
        nx_(int(taps_x)),
        product_(f.separable && (f.one_d || taps_y * taps_x > taps_y + taps_x + 1)),
        passed_(product_ ? padded(width) : 0) {}

  void operator()(S* out, S* const* rows, int64_t n, int64_t step) const {
    if (!product_) return span(out, rows, &f_.full[0], n, step);
    S* passed[1] = {&passed_[0]};
    if (ny_ == 4 && nx_ == 4) {
      filter_span<4, 1>(passed[0], rows, &f_.y[0], 4, 1, n + 3 * step, step);
      filter_span<1, 4>(out, passed, &f_.x[0], 1, 4, n, step);
    } else {
      filter_span<0, 1>(passed[0], rows, &f_.y[0], ny_, 1, n + (nx_ - 1) * step, step);
      filter_span<1, 0>(out, passed, &f_.x[0], 1, nx_, n, step);
    }
  }

 private:
  void span(S* out, S* const* rows, const S* f, int64_t n, int64_t step) const {
    if (ny_ == 4 && nx_ == 4)
      filter_span<4, 4>(out, rows, f, 4, 4, n, step);
    else
      filter_span<0, 0>(out, rows, f, ny_, nx_, n, step);
  }
  const Filter<S>& f_;
  int ny_, nx_;
  bool product_;
  Buffer<S> passed_;
};

// The rows that a filter needs, the newest taps_y of them.
template <typename S>
class Ring {
 public:
  Ring(int64_t taps, int64_t width) : taps_(taps), width_(width), data_((taps + 1) * width) {
    for (int64_t i = 0; i < width; i++) data_[taps * width + i] = 0;
  }
  S* row(int64_t i) { return &data_[i % taps_ * width_]; }
  S* zeros() { return &data_[taps_ * width_]; }

 private:
  int64_t taps_, width_;
  Buffer<S> data_;
};

// The channels whose operands and sums a unit of `step` has: those of whole vectors, or a plane's
// one.
int64_t channels_of(const Geometry& g, int64_t step) { return step == 1 && !g.last ? 1 : kBlock; }

// One unit's operands in compute precision, for a row at a time.
template <typename T>
struct Unit {
  using S = Scalar<T>;
  using V = Vec<T>;
  const Geometry& g;
  const Operands& o;
  int64_t n, c, step;
  S d[kBlock], b[kBlock], strength[kBlock];

  Unit(const Geometry& g, const Operands& o, int64_t n, int64_t c, int64_t step)
      : g(g), o(o), n(n), c(c), step(step) {
    for (int64_t j = 0; j < channels_of(g, step); j++) {
      const int64_t k = c + (j < step ? j : 0);
      d[j] = o.d ? load_param<T>(o.d, o.d_f32(), n * g.C + k) : S(1);
      b[j] = o.b ? load_param<T>(o.b, o.b_f32(), k) : S(0);
      strength[j] = !o.strength
                        ? S(1)
                        : load_param<T>(o.strength, o.strength_f32(), o.strength_n == 1 ? 0 : k);
    }
  }

  void read_noise(S* out, int64_t row) const {
    const int64_t at = ((o.noise_n == 1 ? 0 : n) * g.out_h + row) * g.out_w;
    if (o.noise_f32()) {
      const float* p = static_cast<const float*>(o.noise) + at;
      if constexpr (std::is_same_v<S, float>)
        read(out, p, g.out_w);
      else
        for (int64_t i = 0; i < g.out_w; i++) out[i] = p[i];
    } else {
      read(out, static_cast<const T*>(o.noise) + at, g.out_w);
    }
  }

  // Calls f(index, d, b, strength * noise, noise, lane count, channel) for each vector of a row.
  template <typename F>
  GK_INLINE void each(const S* noise, const F& f) const {
    if (channels_of(g, step) == 1) {
      const V dv = splat<V>(d[0]), bv = splat<V>(b[0]), sv = splat<V>(strength[0]);
      for (int64_t i = 0; i < g.out_w; i += kLanes) {
        const int64_t m = g.out_w - i < kLanes ? g.out_w - i : kLanes;
        const V nv = noise ? load(noise + i) : V{};
        f(i, dv, bv, nv * sv, nv, m, int64_t(0));
      }
      return;
    }
    for (int64_t i = 0; i < g.out_w; i++) {
      const V nv = splat<V>(noise ? noise[i] : S(0));
      for (int64_t j = 0; j < step; j += kLanes) {
        const int64_t m = step - j < kLanes ? step - j : kLanes;
        f(i * step + j, load(d + j), load(b + j), nv * load(strength + j), nv, m, j);
      }
    }
  }
};

// A unit's filter(x), row after row.
template <typename T>
class Filtered {
 public:
  using S = Scalar<T>;
  Filtered(const T* x, const Geometry& g, const Filter<S>& f, int64_t n, int64_t c, int64_t step)
      : x_(x, g, g.H, g.W, n, c),
        g_(g),
        f_(f, g.taps_y, g.taps_x, (g.out_w + g.taps_x - 1) * step),
        step_(step),
        ring_(g.taps_y, g.filtered ? padded((g.out_w + g.taps_x) * step) : 0),
        next_(0) {}

  // Rows come in order.
  void row(S* out, int64_t i) {
    const int64_t width = g_.out_w + g_.taps_x - 1;
    if (!g_.filtered) return read_row(out, x_, i, g_.H, g_.W, 0, g_.out_w, step_);
    for (; next_ < i + g_.taps_y; next_++)
      read_row(ring_.row(next_), x_, next_ - g_.y0, g_.H, g_.W, -g_.x0, width, step_);
    S* rows[64];
    for (int64_t k = 0; k < g_.taps_y; k++) rows[k] = ring_.row(i + k);
    f_(out, rows, g_.out_w * step_, step_);
  }

 private:
  Plane<const T> x_;
  const Geometry& g_;
  RowFilter<S> f_;
  int64_t step_;
  Ring<S> ring_;
  int64_t next_;
};

}  // namespace
}  // namespace gankern::cpu::GANKERN_ISA
