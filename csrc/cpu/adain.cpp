// adain on the CPU and its gradient; the formulas are in csrc/kernels/adain.cu.
#include "norm.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

// Lanes i .. i + n - 1 of a style (of float32 or T) or of a statistic; n == 0: i in every lane.
template <typename T>
GK_INLINE Vec<T> style(const void* p, bool is_f32, int64_t i, int64_t n) {
  if (n == 0) return splat<Vec<T>>(load_param<T>(p, is_f32, i));
  if (!is_f32) return load_part(static_cast<const T*>(p) + i, n);
  if constexpr (!std::is_same_v<T, double>) {
    return load_part(static_cast<const float*>(p) + i, n);
  } else {
    Vec<T> v{};
    for (int64_t j = 0; j < n; j++) v[j] = load_param<T>(p, true, i + j);
    return v;
  }
}
template <typename T>
GK_INLINE void store_style(void* p, bool is_f32, int64_t i, int64_t n, Vec<T> v) {
  if (!is_f32) return store_part(static_cast<T*>(p) + i, v, n);
  if constexpr (!std::is_same_v<T, double>)
    store_part(static_cast<float*>(p) + i, v, n);
  else
    for (int64_t j = 0; j < n; j++) store_param<T>(p, true, i + j, v[j]);
}
template <typename S>
GK_INLINE auto statistic(const S* p, int64_t i, int64_t n) {
  return n == 0 ? splat<Vec<S>>(p[i]) : load_part(p + i, n);
}

template <typename T>
struct Forward {
  using Elem = T;
  using V = Vec<T>;
  using S = Scalar<T>;
  static constexpr int kIn = 1, kOut = 1, kSums = 2, kFactors = 3;
  static constexpr bool kPivot = true;
  struct Params {
    V pivot;
  };
  const T* in[1];
  T* out[1];
  const void *scale, *shift;
  S *mean, *rstd;
  S eps;
  bool style_f32;

  GK_INLINE Params params(int64_t, int64_t) const { return Params{V{}}; }
  GK_INLINE static void add(const V* v, const Params& p, V* s) {
    const V d = v[0] - p.pivot;
    s[0] += d;
    s[1] += d * d;
  }
  GK_INLINE void finish(int64_t i, int64_t n, const V* s, const Params& p, S inv_length,
                        V* f) const {
    const V d = s[0] * inv_length;
    V v = s[1] * inv_length - d * d + eps;
    for (int j = 0; j < kLanes; j++) v[j] = std::sqrt(v[j]);
    const V r = S(1) / v;
    const int64_t lanes = n == 1 ? 0 : n;  // a row's results are the same in every lane
    f[0] = p.pivot + d;
    f[1] = style<T>(scale, style_f32, i, lanes) * r;
    f[2] = style<T>(shift, style_f32, i, lanes);
    store_part(mean + i, f[0], n);
    store_part(rstd + i, r, n);
  }
  GK_INLINE static void map(const V* v, const V* f, V* y) { y[0] = (v[0] - f[0]) * f[1] + f[2]; }
};

template <typename T>  // dy, x -> dx
struct Backward {
  using Elem = T;
  using V = Vec<T>;
  using S = Scalar<T>;
  static constexpr int kIn = 2, kOut = 1, kSums = 2, kFactors = 4;
  static constexpr bool kPivot = false;
  struct Params {
    V mean, rstd;
  };
  const T* in[2];
  T* out[1];
  const void* scale;
  const S *mean, *rstd;
  void *dscale, *dshift;
  bool style_f32;

  GK_INLINE Params params(int64_t i, int64_t n) const {
    return {statistic(mean, i, n), statistic(rstd, i, n)};
  }
  GK_INLINE static void add(const V* v, const Params& p, V* s) {
    s[0] += v[0];
    s[1] += v[0] * ((v[1] - p.mean) * p.rstd);
  }
  GK_INLINE void finish(int64_t i, int64_t n, const V* s, const Params& p, S inv_length,
                        V* f) const {
    f[0] = style<T>(scale, style_f32, i, n == 1 ? 0 : n) * p.rstd;
    f[1] = s[0] * inv_length;
    f[2] = p.rstd * (s[1] * inv_length);
    f[3] = p.mean;
    store_style<T>(dscale, style_f32, i, n, s[1]);
    store_style<T>(dshift, style_f32, i, n, s[0]);
  }
  GK_INLINE static void map(const V* v, const V* f, V* y) {
    y[0] = f[0] * ((v[0] - f[1]) - f[2] * (v[1] - f[3]));
  }
};

}  // namespace

int64_t adain_workspace(int, int64_t, int64_t, int64_t) { return 0; }
int64_t adain_bwd_workspace(int, int64_t, int64_t, int64_t) { return 0; }

int adain(int dtype, int style_dtype, const void* x, const void* scale, const void* shift, void* y,
          void* mean, void* rstd, void* /*workspace*/, int64_t outer, int64_t length, int64_t inner,
          double eps, void*) {
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    const Forward<T> op{{static_cast<const T*>(x)},
                        {static_cast<T*>(y)},
                        scale,
                        shift,
                        static_cast<S*>(mean),
                        static_cast<S*>(rstd),
                        static_cast<S>(eps),
                        style_dtype == kF32};
    return run_norm(op, outer, length, inner);
  });
}

int adain_bwd(int dtype, int style_dtype, const void* dy, const void* x, const void* scale,
              const void* mean, const void* rstd, void* dx, void* dscale, void* dshift,
              void* /*workspace*/, int64_t outer, int64_t length, int64_t inner, void*) {
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    const Backward<T> op{{static_cast<const T*>(dy), static_cast<const T*>(x)},
                         {static_cast<T*>(dx)},
                         scale,
                         static_cast<const S*>(mean),
                         static_cast<const S*>(rstd),
                         dscale,
                         dshift,
                         style_dtype == kF32};
    return run_norm(op, outer, length, inner);
  });
}

}  // namespace gankern::cpu::GANKERN_ISA
