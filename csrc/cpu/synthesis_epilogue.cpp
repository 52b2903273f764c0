// synthesis_epilogue on the CPU: y = clamp(act(filter(x) * d + noise * strength + b) * gain) and
// its gradient, which computes filter(x) again.
//
// A unit of work is a plane (NCHW) or a plane of kBlock channels (channels-last); its rows are
// `step` = 1 or kBlock wide columns, so that both layouts share the filters. Only the last taps_y
// rows are kept, in compute precision, zero-padded: they stay in the first cache level.
#include "act.h"

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

// The rare activations are not worth an instance of the whole kernel each.
template <typename V, typename S>
__attribute__((noinline)) V value_of(V u, const ActArgs<S>& p) {
  return act_value<false>(u, p);
}

template <typename V, typename S>
__attribute__((noinline)) V slope_of(V a, V u, const ActArgs<S>& p) {
  return act_slope<false>(a, u, p);
}

template <bool kPwl, typename V, typename S>
GK_INLINE V value(V u, const ActArgs<S>& p) {
  if constexpr (kPwl) return act_value<true>(u, p);
  return value_of(u, p);
}

template <bool kPwl, typename V, typename S>
GK_INLINE V slope(V a, V u, const ActArgs<S>& p) {
  if constexpr (kPwl) return act_slope<true>(a, u, p);
  return slope_of(a, u, p);
}

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

template <typename T, typename S>
GK_INLINE void read(S* out, const T* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) store_part(out + i, load_part(in + i, n - i), n - i);
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
template <int kTaps, typename S>
GK_INLINE void filter_span(S* out, S* const* rows, const S* f, int taps_y, int taps_x, int64_t n,
                           int64_t step) {
  using V = std::conditional_t<std::is_same_v<S, float>, vf, vd>;
  const int ny = kTaps ? kTaps : taps_y, nx = kTaps ? kTaps : taps_x;
  for (int64_t i = 0; i < n; i += kLanes) {  // buffers are padded to whole vectors
    V even{}, odd{};
    for (int ky = 0; ky < ny; ky++)
      for (int kx = 0; kx < nx; kx++) {
        const V term = load(rows[ky] + i + kx * step);
        if (kx % 2)
          odd += term * f[ky * nx + kx];
        else
          even += term * f[ky * nx + kx];
      }
    store(out + i, even + odd);
  }
}

template <typename S>
void filter_row(S* out, S* const* rows, const S* f, int taps_y, int taps_x, int64_t n,
                int64_t step) {
  if (taps_y == 4 && taps_x == 4)
    filter_span<4>(out, rows, f, 4, 4, n, step);
  else
    filter_span<0>(out, rows, f, taps_y, taps_x, n, step);
}

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
    for (int64_t j = 0; j < kBlock; j++) {
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
    if (step == 1 && !g.last) {
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

int64_t padded(int64_t n) { return n + 2 * kLanes; }

// The taps in the order of a correlation, times the gain.
template <typename S>
void read_filter(S* out, const float* f, bool separable, int64_t taps_y, int64_t taps_x, bool flip,
                 double gain) {
  for (int64_t y = 0; y < taps_y; y++)
    for (int64_t x = 0; x < taps_x; x++) {
      const int64_t fy = flip ? y : taps_y - 1 - y, fx = flip ? x : taps_x - 1 - x;
      const double tap = separable ? double(f[fy]) * f[fx] : f[fy * taps_x + fx];
      out[y * taps_x + x] = S(tap * gain);
    }
}

// A unit's filter(x), row after row.
template <typename T>
class Filtered {
 public:
  using S = Scalar<T>;
  Filtered(const T* x, const Geometry& g, const S* f, int64_t n, int64_t c, int64_t step)
      : x_(x, g, g.H, g.W, n, c),
        g_(g),
        f_(f),
        step_(step),
        ring_(g.taps_y, padded((g.out_w + g.taps_x) * step)),
        next_(0) {}

  // Rows come in order.
  void row(S* out, int64_t i) {
    const int64_t width = g_.out_w + g_.taps_x - 1;
    if (!g_.filtered) return read_row(out, x_, i, g_.H, g_.W, 0, g_.out_w, step_);
    for (; next_ < i + g_.taps_y; next_++)
      read_row(ring_.row(next_), x_, next_ - g_.y0, g_.H, g_.W, -g_.x0, width, step_);
    S* rows[64];
    for (int64_t k = 0; k < g_.taps_y; k++) rows[k] = ring_.row(i + k);
    filter_row(out, rows, f_, int(g_.taps_y), int(g_.taps_x), g_.out_w * step_, step_);
  }

 private:
  Plane<const T> x_;
  const Geometry& g_;
  const S* f_;
  int64_t step_;
  Ring<S> ring_;
  int64_t next_;
};

template <bool kPwl, typename T>
void forward_unit(const T* x, T* y, const Geometry& g, const Operands& o,
                  const ActArgs<Scalar<T>>& p, const Scalar<T>* f, int64_t n, int64_t c,
                  int64_t step) {
  using S = Scalar<T>;
  using V = Vec<T>;
  const Unit<T> unit(g, o, n, c, step);
  Filtered<T> filtered(x, g, f, n, c, step);
  const Plane<T> out(y, g, g.out_h, g.out_w, n, c);
  Buffer<S> u(padded(g.out_w * step)), noise(padded(g.out_w));
  for (int64_t i = 0; i < g.out_h; i++) {
    filtered.row(&u[0], i);
    if (o.noise) unit.read_noise(&noise[0], i);
    unit.each(o.noise ? &noise[0] : nullptr, [&](int64_t k, V d, V b, V sn, V, int64_t m, int64_t) {
      V v = value<kPwl>(load(&u[k]) * d + sn + b, p) * p.gain;
      if (p.clamp >= 0) {
        const V limit = splat<V>(p.clamp);
        v = v > limit ? limit : v;
        v = v < -limit ? -limit : v;
      }
      if (m == kLanes)
        store(&u[k], v);
      else
        store_part(&u[k], v, m);
    });
    write_row(out, i, &u[0], g.out_w, step);
  }
}

// v with zeros in the lanes from m on.
template <typename V>
GK_INLINE V first_lanes(V v, int64_t m) {
  for (int64_t i = m; i < kLanes; i++) v[i] = 0;
  return v;
}

// A unit's sums of dv * u, dv and dv * noise, each [step].
template <typename S>
struct Sums {
  S u[kBlock], one[kBlock], noise[kBlock];
};

template <bool kPwl, typename T>
class Backward {
 public:
  using S = Scalar<T>;
  using V = Vec<T>;
  Backward(const T* dy, const T* x, const Geometry& g, const Operands& o, const ActArgs<S>& p,
           const S* f, int64_t n, int64_t c, int64_t step)
      : g_(g),
        o_(o),
        p_(p),
        unit_(g, o, n, c, step),
        filtered_(x, g, f, n, c, step),
        dy_(dy, g, g.out_h, g.out_w, n, c),
        step_(step),
        u_(padded(g.out_w * step)),
        dv_(padded(g.out_w * step)),
        noise_(padded(g.out_w)) {
    for (int64_t j = 0; j < kBlock; j++) sums.u[j] = sums.one[j] = sums.noise[j] = 0;
  }

  // dL/d(filter(x)) of row i; rows come in order.
  void row(S* du, int64_t i) {
    filtered_.row(&u_[0], i);
    read_row(&dv_[0], dy_, i, g_.out_h, g_.out_w, 0, g_.out_w, step_);
    if (o_.noise) unit_.read_noise(&noise_[0], i);
    const bool row_sums = step_ == 1 && !g_.last;
    V su{}, sv{}, sn{};
    unit_.each(o_.noise ? &noise_[0] : nullptr,
               [&](int64_t k, V d, V b, V scaled, V noise, int64_t m, int64_t j) {
                 V u = load(&u_[k]);
                 const V v = u * d + scaled + b;
                 const V a = value<kPwl>(v, p_), y = a * p_.gain;
                 V dv = load(&dv_[k]) * p_.gain * slope<kPwl>(a, v, p_);
                 if (p_.clamp >= 0) {
                   const V limit = splat<V>(p_.clamp);
                   dv = (y > -limit) & (y < limit) ? dv : V{};
                 }
                 if (m < kLanes) {  // lanes beyond hold rubbish
                   dv = first_lanes(dv, m), u = first_lanes(u, m), noise = first_lanes(noise, m);
                   store_part(du + k, dv * d, m);
                 } else {
                   store(du + k, dv * d);
                 }
                 if (row_sums) {
                   su += dv * u, sv += dv, sn += dv * noise;
                 } else {
                   store(sums.u + j, load(sums.u + j) + dv * u);
                   store(sums.one + j, load(sums.one + j) + dv);
                   store(sums.noise + j, load(sums.noise + j) + dv * noise);
                 }
               });
    if (row_sums) {
      sums.u[0] += sum_lanes(su);
      sums.one[0] += sum_lanes(sv);
      sums.noise[0] += sum_lanes(sn);
    }
  }

  Sums<S> sums;

 private:
  const Geometry& g_;
  const Operands& o_;
  const ActArgs<S>& p_;
  Unit<T> unit_;
  Filtered<T> filtered_;
  Plane<const T> dy_;
  int64_t step_;
  Buffer<S> u_, dv_, noise_;
};

template <bool kPwl, typename T>
Sums<Scalar<T>> backward_unit(const T* dy, const T* x, T* dx, const Geometry& g, const Operands& o,
                              const ActArgs<Scalar<T>>& p, const Scalar<T>* f,
                              const Scalar<T>* f_adjoint, int64_t n, int64_t c, int64_t step) {
  using S = Scalar<T>;
  Backward<kPwl, T> back(dy, x, g, o, p, f, n, c, step);
  const Plane<T> out(dx, g, g.H, g.W, n, c);
  Buffer<S> row(padded(((g.W > g.out_w ? g.W : g.out_w) + g.taps_x) * step));
  if (!g.filtered) {
    for (int64_t i = 0; i < g.H; i++) {
      back.row(&row[0], i);
      write_row(out, i, &row[0], g.W, step);
    }
    return back.sums;
  }
  // Columns [low, high) around du's own [0, out_w) that some column of dx looks at.
  const int64_t low = g.x0 - (g.taps_x - 1) < 0 ? g.x0 - (g.taps_x - 1) : 0;
  const int64_t high = g.W + g.x0 > g.out_w ? g.W + g.x0 : g.out_w;
  const int64_t width = padded((high - low) * step);
  Ring<S> ring(g.taps_y, width);
  for (int64_t k = 0; k < g.taps_y; k++)
    for (int64_t i = 0; i < width; i++) ring.row(k)[i] = 0;
  int64_t next = 0;
  const auto advance = [&](int64_t stop) {
    for (; next < stop && next < g.out_h; next++) back.row(ring.row(next) - low * step, next);
  };
  const int64_t first = (g.x0 - (g.taps_x - 1) - low) * step;
  S* rows[64];
  for (int64_t i = 0; i < g.H; i++) {
    advance(i + g.y0 + 1);
    for (int64_t k = 0; k < g.taps_y; k++) {
      const int64_t r = i + g.y0 - (g.taps_y - 1) + k;
      rows[k] = (r < 0 || r >= g.out_h ? ring.zeros() : ring.row(r)) + first;
    }
    filter_row(&row[0], rows, f_adjoint, int(g.taps_y), int(g.taps_x), g.W * step, step);
    write_row(out, i, &row[0], g.W, step);
  }
  advance(g.out_h);
  return back.sums;
}

// body(n, c, step) for every unit, on torch's threads.
template <typename F>
void each_unit(const Geometry& g, const F& body) {
  const int64_t block = g.last ? kBlock : 1, blocks = (g.C + block - 1) / block;
  const int64_t work = g.out_h * g.out_w * block;
  parallel(g.N * blocks, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t c = i % blocks * block;
      body(i / blocks, c, g.C - c < block ? g.C - c : block);
    }
  });
}

// f(true type) for the piecewise linear activations, f(false type) for the others.
template <typename F>
void by_act(int act, const F& f) {
  if (act <= kLrelu)
    f(std::true_type{});
  else
    f(std::false_type{});
}

template <typename S>
ActArgs<S> act_args(int act, double alpha, double gain, double clamp) {
  const double alpha_of = act == kLinear ? 1 : act == kRelu ? 0 : alpha;
  return {act, S(alpha_of), S(gain), S(0), S(clamp), true};
}

}  // namespace

int synthesis_epilogue(int dtype, int f32, const void* x, const void* f, const void* d,
                       const void* noise, const void* strength, const void* b, void* y, int64_t N,
                       int64_t C, int64_t H, int64_t W, int64_t out_h, int64_t out_w,
                       int64_t taps_y, int64_t taps_x, bool separable, int64_t noise_n,
                       int64_t strength_n, int64_t x0, int64_t y0, bool flip, double filter_gain,
                       bool channels_last, int act, double alpha, double gain, double clamp,
                       void*) {
  if (N * C * out_h * out_w == 0) return 0;
  const Geometry g{N, C, H, W, out_h, out_w, taps_y, taps_x, x0, y0, f != nullptr, channels_last};
  const Operands o{static_cast<const float*>(f), d, noise, strength, b, noise_n, strength_n, f32};
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    Buffer<S> taps(taps_y * taps_x);
    if (f) read_filter(&taps[0], o.f, separable, taps_y, taps_x, flip, filter_gain);
    const ActArgs<S> p = act_args<S>(act, alpha, gain, clamp);
    by_act(act, [&](auto tag) {
      each_unit(g, [&](int64_t n, int64_t c, int64_t step) {
        forward_unit<decltype(tag)::value>(static_cast<const T*>(x), static_cast<T*>(y), g, o, p,
                                           &taps[0], n, c, step);
      });
    });
    return 0;
  });
}

int64_t synthesis_epilogue_bwd_workspace(int, int64_t, int64_t, int64_t, int64_t, bool, bool,
                                         bool) {
  return 0;
}

// dd [N, C], db [C] and ds [C] are float32, or float64 for float64.
int synthesis_epilogue_bwd(int dtype, int f32, const void* dy, const void* x, const void* f,
                           const void* d, const void* noise, const void* strength, const void* b,
                           void* dx, void* dd, void* db, void* ds, void*, int64_t N, int64_t C,
                           int64_t H, int64_t W, int64_t out_h, int64_t out_w, int64_t taps_y,
                           int64_t taps_x, bool separable, int64_t noise_n, int64_t strength_n,
                           int64_t x0, int64_t y0, bool flip, double filter_gain,
                           bool channels_last, int act, double alpha, double gain, double clamp,
                           void*) {
  const Geometry g{N, C, H, W, out_h, out_w, taps_y, taps_x, x0, y0, f != nullptr, channels_last};
  const Operands o{static_cast<const float*>(f), d, noise, strength, b, noise_n, strength_n, f32};
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    const int64_t taps_n = taps_y * taps_x;
    Buffer<S> taps(taps_n), adjoint(taps_n), sum_b(N * C), sum_s(N * C);
    if (f) read_filter(&taps[0], o.f, separable, taps_y, taps_x, flip, filter_gain);
    for (int64_t i = 0; f && i < taps_n; i++) adjoint[i] = taps[taps_n - 1 - i];
    const ActArgs<S> p = act_args<S>(act, alpha, gain, clamp);
    by_act(act, [&](auto tag) {
      each_unit(g, [&](int64_t n, int64_t c, int64_t step) {
        const auto sums = backward_unit<decltype(tag)::value>(
            static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), g, o, p,
            &taps[0], &adjoint[0], n, c, step);
        for (int64_t j = 0; j < step; j++) {
          static_cast<S*>(dd)[n * C + c + j] = sums.u[j];
          sum_b[n * C + c + j] = sums.one[j];
          sum_s[n * C + c + j] = sums.noise[j];
        }
      });
    });
    for (int64_t c = 0; c < C; c++) {
      S b_sum = 0, s_sum = 0;
      for (int64_t n = 0; n < N; n++) b_sum += sum_b[n * C + c], s_sum += sum_s[n * C + c];
      static_cast<S*>(db)[c] = b_sum;
      static_cast<S*>(ds)[c] = s_sum;
    }
    return 0;
  });
}

}  // namespace gankern::cpu::GANKERN_ISA
