// synthesis_epilogue on the CPU: y = clamp(act(filter(x) * d + noise * strength + b) * gain) and
// its gradient, which computes filter(x) again, and the gradient of that.
//
// A unit of work is a plane (NCHW) or a plane of kBlock channels (channels-last); its rows are
// `step` = 1 or kBlock wide columns, so that both layouts share the filters. Only the last taps_y
// rows are kept, in compute precision, zero-padded: they stay in the first cache level.
#include "epilogue.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

// The filter, or one of no taps where there is none.
template <typename S>
Filter<S> filter_of(const Operands& o, const Geometry& g, bool separable, bool flip, double gain) {
  return Filter<S>(o.f, separable, o.f ? g.taps_y : 0, o.f ? g.taps_x : 0, flip, gain);
}

template <bool kPwl, typename T>
void forward_unit(const T* x, T* y, const Geometry& g, const Operands& o,
                  const ActArgs<Scalar<T>>& p, const Filter<Scalar<T>>& f, int64_t n, int64_t c,
                  int64_t step) {
  using S = Scalar<T>;
  using V = Vec<T>;
  const Unit<T> unit(g, o, n, c, step);
  Filtered<T> filtered(x, g, f, n, c, step);
  const Plane<T> out(y, g, g.out_h, g.out_w, n, c);
  Buffer<S> u(padded(g.out_w * step)), noise(o.noise ? padded(g.out_w) : 0);
  for (int64_t i = 0; i < g.out_h; i++) {
    filtered.row(&u[0], i);
    if (o.noise) unit.read_noise(&noise[0], i);
    unit.each(o.noise ? &noise[0] : nullptr, [&](int64_t k, V d, V b, V sn, V, int64_t m, int64_t) {
      const V v = clamped(value<kPwl>(load(&u[k]) * d + sn + b, p) * p.gain, p);
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

// A unit's sums of dv * u, dv and dv * noise, each [step]: of rows, which are summed apart, since
// one sum of all pixels would round more.
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
           const Filter<S>& f, int64_t n, int64_t c, int64_t step)
      : g_(g),
        o_(o),
        p_(p),
        unit_(g, o, n, c, step),
        filtered_(x, g, f, n, c, step),
        dy_(dy, g, g.out_h, g.out_w, n, c),
        step_(step),
        u_(padded(g.out_w * step)),
        dv_(padded(g.out_w * step)),
        noise_(o.noise ? padded(g.out_w) : 0) {
    for (int64_t j = 0; j < channels_of(g, step); j++) sums.u[j] = sums.one[j] = sums.noise[j] = 0;
  }

  // dL/d(filter(x)) of row i; rows come in order.
  void row(S* du, int64_t i) {
    filtered_.row(&u_[0], i);
    read_row(&dv_[0], dy_, i, g_.out_h, g_.out_w, 0, g_.out_w, step_);
    if (o_.noise) unit_.read_noise(&noise_[0], i);
    const bool row_sums = channels_of(g_, step_) == 1;
    V su{}, sv{}, sn{};
    Sums<S> of_row;
    if (!row_sums)
      for (int64_t j = 0; j < step_; j += kLanes)
        store(of_row.u + j, V{}), store(of_row.one + j, V{}), store(of_row.noise + j, V{});
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
                   store(of_row.u + j, load(of_row.u + j) + dv * u);
                   store(of_row.one + j, load(of_row.one + j) + dv);
                   store(of_row.noise + j, load(of_row.noise + j) + dv * noise);
                 }
               });
    if (row_sums) {
      sums.u[0] += sum_lanes(su);
      sums.one[0] += sum_lanes(sv);
      sums.noise[0] += sum_lanes(sn);
    } else {
      for (int64_t j = 0; j < step_; j += kLanes) {
        store(sums.u + j, load(sums.u + j) + load(of_row.u + j));
        store(sums.one + j, load(sums.one + j) + load(of_row.one + j));
        store(sums.noise + j, load(sums.noise + j) + load(of_row.noise + j));
      }
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

// The adjoint of the filter: rows of dx from rows of dL/d(filter(x)), which du_row(to, i) gives in
// order.
template <typename T, typename F>
void adjoint_unit(T* dx, const Geometry& g, const Filter<Scalar<T>>& f_adjoint, int64_t n,
                  int64_t c, int64_t step, const F& du_row) {
  using S = Scalar<T>;
  const Plane<T> out(dx, g, g.H, g.W, n, c);
  Buffer<S> row(padded(((g.W > g.out_w ? g.W : g.out_w) + g.taps_x) * step));
  if (!g.filtered) {
    for (int64_t i = 0; i < g.H; i++) {
      du_row(&row[0], i);
      write_row(out, i, &row[0], g.W, step);
    }
    return;
  }
  // Columns [low, high) around du's own [0, out_w) that some column of dx looks at.
  const int64_t low = g.x0 - (g.taps_x - 1) < 0 ? g.x0 - (g.taps_x - 1) : 0;
  const int64_t high = g.W + g.x0 > g.out_w ? g.W + g.x0 : g.out_w;
  const int64_t width = padded((high - low) * step);
  Ring<S> ring(g.taps_y, width);
  const RowFilter<S> filter(f_adjoint, g.taps_y, g.taps_x, (g.W + g.taps_x - 1) * step);
  for (int64_t k = 0; k < g.taps_y; k++)
    for (int64_t i = 0; i < width; i++) ring.row(k)[i] = 0;
  int64_t next = 0;
  const auto advance = [&](int64_t stop) {
    for (; next < stop && next < g.out_h; next++) du_row(ring.row(next) - low * step, next);
  };
  const int64_t first = (g.x0 - (g.taps_x - 1) - low) * step;
  S* rows[64];
  for (int64_t i = 0; i < g.H; i++) {
    advance(i + g.y0 + 1);
    for (int64_t k = 0; k < g.taps_y; k++) {
      const int64_t r = i + g.y0 - (g.taps_y - 1) + k;
      rows[k] = (r < 0 || r >= g.out_h ? ring.zeros() : ring.row(r)) + first;
    }
    filter(&row[0], rows, g.W * step, step);
    write_row(out, i, &row[0], g.W, step);
  }
  advance(g.out_h);
}

// Cotangents of dx, dd [N, C], ds [C] and db [C], each or null.
template <typename T>
struct Cotangents {
  const T* x;
  const Scalar<T>*d, *s, *b;
};

// The gradient of the gradient, of piecewise linear activations, whose slope is m: with t = m dy,
// d_dy = m (F(vx) d + F(x) vd + noise vs + vb), d_x = F'(t vd), d_d = Σ t F(vx).
template <typename T>
class Second {
 public:
  using S = Scalar<T>;
  using V = Vec<T>;
  Second(const T* dy, const T* x, const Cotangents<T>& v, T* d_dy, const Geometry& g,
         const Operands& o, const ActArgs<S>& p, const Filter<S>& f, int64_t n, int64_t c,
         int64_t step)
      : g_(g),
        o_(o),
        p_(p),
        unit_(g, o, n, c, step),
        filtered_(x, g, f, n, c, step),
        filtered_v_(v.x ? v.x : x, g, f, n, c, step),
        has_vx_(v.x),
        has_vd_(v.d),
        dy_(dy, g, g.out_h, g.out_w, n, c),
        d_dy_(d_dy, g, g.out_h, g.out_w, n, c),
        step_(step),
        u_(padded(g.out_w * step)),
        uv_(padded(g.out_w * step)),
        t_(padded(g.out_w * step)),
        noise_(o.noise ? padded(g.out_w) : 0) {
    for (int64_t j = 0; j < channels_of(g, step); j++) {
      const int64_t k = c + (j < step ? j : 0);
      vd_[j] = v.d ? v.d[n * g.C + k] : S(0);
      vs_[j] = v.s ? v.s[k] : S(0);
      vb_[j] = v.b ? v.b[k] : S(0);
      sums[j] = 0;
    }
  }

  // t vd of row i, and that row of d_dy.
  void row(S* du, int64_t i) {
    filtered_.row(&u_[0], i);
    if (has_vx_) filtered_v_.row(&uv_[0], i);
    read_row(&t_[0], dy_, i, g_.out_h, g_.out_w, 0, g_.out_w, step_);
    if (o_.noise) unit_.read_noise(&noise_[0], i);
    const bool plane = channels_of(g_, step_) == 1;
    const auto of = [plane](const S* rows, int64_t j) {
      return plane ? splat<V>(rows[0]) : load(rows + j);
    };
    V sum{};
    S of_row[kBlock];  // summed apart, as in Backward
    if (!plane)
      for (int64_t j = 0; j < step_; j += kLanes) store(of_row + j, V{});
    unit_.each(o_.noise ? &noise_[0] : nullptr,
               [&](int64_t k, V d, V b, V scaled, V noise, int64_t n, int64_t j) {
                 const V u = load(&u_[k]), v = u * d + scaled + b, a = value<true>(v, p_);
                 V uv = has_vx_ ? load(&uv_[k]) : V{}, m = p_.gain * slope<true>(a, v, p_);
                 if (p_.clamp >= 0) {
                   const V y = a * p_.gain, limit = splat<V>(p_.clamp);
                   m = (y > -limit) & (y < limit) ? m : V{};
                 }
                 V t = m * load(&t_[k]);
                 V q = uv * d + noise * of(vs_, j) + of(vb_, j);
                 if (has_vd_) q += u * of(vd_, j);
                 q = m != V{} ? m * q : V{};  // where the clamp is, u may be infinite
                 if (n < kLanes) {            // lanes beyond hold rubbish
                   t = first_lanes(t, n), uv = first_lanes(uv, n);
                   store_part(du + k, t * of(vd_, j), n);
                   store_part(&u_[k], q, n);
                 } else {
                   store(du + k, t * of(vd_, j));
                   store(&u_[k], q);
                 }
                 if (plane)
                   sum += t * uv;
                 else
                   store(of_row + j, load(of_row + j) + t * uv);
               });
    if (plane) sums[0] += sum_lanes(sum);
    if (!plane)
      for (int64_t j = 0; j < step_; j += kLanes)
        store(sums + j, load(sums + j) + load(of_row + j));
    write_row(d_dy_, i, &u_[0], g_.out_w, step_);
  }

  S sums[kBlock];

 private:
  const Geometry& g_;
  const Operands& o_;
  const ActArgs<S>& p_;
  Unit<T> unit_;
  Filtered<T> filtered_, filtered_v_;
  bool has_vx_, has_vd_;
  Plane<const T> dy_;
  Plane<T> d_dy_;
  int64_t step_;
  Buffer<S> u_, uv_, t_, noise_;
  S vd_[kBlock], vs_[kBlock], vb_[kBlock];
};

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
    const auto taps = filter_of<S>(o, g, separable, flip, filter_gain);
    const ActArgs<S> p = act_args<S>(act, alpha, gain, clamp);
    by_act(act, [&](auto tag) {
      each_unit(g, [&](int64_t n, int64_t c, int64_t step) {
        forward_unit<decltype(tag)::value>(static_cast<const T*>(x), static_cast<T*>(y), g, o, p,
                                           taps, n, c, step);
      });
    });
    return 0;
  });
}

int64_t synthesis_epilogue_bwd_workspace(int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                         bool, bool, bool) {
  return 0;
}

// dd [N, C], db [C] and ds [C] are float32, or float64 for float64; ds may be null.
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
    const auto taps = filter_of<S>(o, g, separable, flip, filter_gain);
    const auto adjoint = filter_of<S>(o, g, separable, !flip, filter_gain);
    Buffer<S> sum_b(N * C), sum_s(N * C);
    const ActArgs<S> p = act_args<S>(act, alpha, gain, clamp);
    by_act(act, [&](auto tag) {
      each_unit(g, [&](int64_t n, int64_t c, int64_t step) {
        Backward<decltype(tag)::value, T> back(static_cast<const T*>(dy), static_cast<const T*>(x),
                                               g, o, p, taps, n, c, step);
        adjoint_unit(static_cast<T*>(dx), g, adjoint, n, c, step,
                     [&](S* du, int64_t i) { back.row(du, i); });
        for (int64_t j = 0; j < step; j++) {
          static_cast<S*>(dd)[n * C + c + j] = back.sums.u[j];
          sum_b[n * C + c + j] = back.sums.one[j];
          sum_s[n * C + c + j] = back.sums.noise[j];
        }
      });
    });
    for (int64_t c = 0; c < C; c++) {
      S b_sum = 0, s_sum = 0;
      for (int64_t n = 0; n < N; n++) b_sum += sum_b[n * C + c], s_sum += sum_s[n * C + c];
      static_cast<S*>(db)[c] = b_sum;
      if (ds) static_cast<S*>(ds)[c] = s_sum;
    }
    return 0;
  });
}

// d_x may be null, and d_dd [N, C] is float32, or float64 for float64. The activation is piecewise
// linear.
int synthesis_epilogue_bwd2(int dtype, int f32, const void* dy, const void* x, const void* f,
                            const void* d, const void* noise, const void* strength, const void* b,
                            const void* vx, const void* vd, const void* vs, const void* vb,
                            void* d_dy, void* d_x, void* d_d, void*, int64_t N, int64_t C,
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
    const auto taps = filter_of<S>(o, g, separable, flip, filter_gain);
    const auto adjoint = filter_of<S>(o, g, separable, !flip, filter_gain);
    const ActArgs<S> p = act_args<S>(act, alpha, gain, clamp);
    const Cotangents<T> v{static_cast<const T*>(vx), static_cast<const S*>(vd),
                          static_cast<const S*>(vs), static_cast<const S*>(vb)};
    each_unit(g, [&](int64_t n, int64_t c, int64_t step) {
      Second<T> second(static_cast<const T*>(dy), static_cast<const T*>(x), v,
                       static_cast<T*>(d_dy), g, o, p, taps, n, c, step);
      const auto row = [&](S* du, int64_t i) { second.row(du, i); };
      if (d_x) {
        adjoint_unit(static_cast<T*>(d_x), g, adjoint, n, c, step, row);
      } else {
        Buffer<S> unused(padded(g.out_w * step));
        for (int64_t i = 0; i < g.out_h; i++) row(&unused[0], i);
      }
      for (int64_t j = 0; j < step; j++) static_cast<S*>(d_d)[n * C + c + j] = second.sums[j];
    });
    return 0;
  });
}

}  // namespace gankern::cpu::GANKERN_ISA
