// adain: y = scale * (x - mean) * rstd + shift for each sample's channel, and its gradient.
// With rstd = rsqrt(var + eps), h = (x - mean) rstd and P pixels,
//   dshift = Σ dy,   dscale = Σ dy h,   dx = scale rstd (dy - Σ dy / P - h Σ dy h / P).
// Both maps are linear in the elements. Those of 16 bits are mapped as such, `kFolded`: what the
// mean costs of float32's accuracy is below their own. The sums over a plane are the only coupling
// between elements: csrc/kernels/norm.cuh, and for planes that no multiprocessor can hold
// csrc/kernels/norm_group.cuh. mean and rstd go from the forward to the backward, so that it takes
// its sums in one pass.
#include "norm_launch.cuh"

namespace gankern {
namespace {

__device__ __forceinline__ float rsqrt_(float v) { return rsqrtf(v); }
__device__ __forceinline__ double rsqrt_(double v) { return rsqrt(v); }

template <typename T>
struct Forward {
  using Elem = T;
  using A = Acc<T>;
  static constexpr bool kFolded = sizeof(T) == 2;
  static constexpr int kIn = 1, kOut = 1, kSums = 2, kFactors = kFolded ? 2 : 3,
                       kHold = sizeof(T) == 2 ? 4 : 8;
  static constexpr int kColumnHold = sizeof(T) == 2 ? 4 : 8, kColumnBytes = 8;
  static constexpr bool kPivot = true;
  static constexpr int kGroupBytes = sizeof(T) == 8 ? 0 : 16;
  struct Params {
    A pivot;
  };
  struct Style {
    A scale, shift;
  };
  Format<T> format;
  const T* in[1];
  T* out[1];
  const void *scale, *shift;
  A *mean, *rstd;
  A eps;
  bool style_f32;

  __device__ Params params(int64_t) const { return {A(0)}; }
  __device__ Style style(int64_t i) const {
    return {load_param<T>(scale, style_f32, i, format), load_param<T>(shift, style_f32, i, format)};
  }
  __device__ static void add(const A* v, const Params& p, A* s) {
    const A d = v[0] - p.pivot;
    s[0] += d;
    s[1] += d * d;
  }
  __device__ void finish(int64_t i, const A* s, const Params& p, A inv_length, A* f,
                         bool first) const {
    finish(i, s, p, style(i), inv_length, f, first);
  }
  __device__ void finish(int64_t i, const A* s, const Params& p, const Style& style, A inv_length,
                         A* f, bool first) const {
    const A d = s[0] * inv_length, var = s[1] * inv_length - d * d;
    const A r = rsqrt_(var + eps), m = p.pivot + d;
    f[0] = style.scale * r;
    f[1] = kFolded ? style.shift - m * f[0] : style.shift;
    if constexpr (!kFolded) f[2] = m;
    if (!first) return;
    mean[i] = m;
    rstd[i] = r;
  }
  __device__ static void map(const A* v, const A* f, A* y) {
    if constexpr (kFolded)
      y[0] = v[0] * f[0] + f[1];
    else
      y[0] = (v[0] - f[2]) * f[0] + f[1];
  }
};

template <typename T>  // dy, x -> dx
struct Backward {
  using Elem = T;
  using A = Acc<T>;
  static constexpr bool kFolded = sizeof(T) == 2;
  static constexpr int kIn = 2, kOut = 1, kSums = 2, kFactors = kFolded ? 3 : 4, kHold = 4;
  static constexpr int kColumnHold = 4, kColumnBytes = 8;
  static constexpr bool kPivot = false;
  static constexpr int kGroupBytes = sizeof(T) == 8 ? 0 : 16;
  struct Params {
    A mean;
  };
  struct Style {
    A rstd, scale;
  };
  Format<T> format;
  const T* in[2];
  T* out[1];
  const void* scale;
  const A *mean, *rstd;
  void *dscale, *dshift;
  bool style_f32;

  __device__ Params params(int64_t i) const { return {mean[i]}; }
  __device__ Style style(int64_t i) const {
    return {rstd[i], load_param<T>(scale, style_f32, i, format)};
  }
  __device__ static void add(const A* v, const Params& p, A* s) {
    s[0] += v[0];
    s[1] += v[0] * (v[1] - p.mean);
  }
  __device__ void finish(int64_t i, const A* s, const Params& p, A inv_length, A* f,
                         bool first) const {
    finish(i, s, p, style(i), inv_length, f, first);
  }
  __device__ void finish(int64_t i, const A* s, const Params& p, const Style& style, A inv_length,
                         A* f, bool first) const {
    const A r = style.rstd, along = s[1] * r;
    f[0] = style.scale * r;
    f[1] = s[0] * inv_length;
    f[2] = r * (along * inv_length);
    if constexpr (kFolded) {
      f[1] = f[0] * (f[2] * p.mean - f[1]);
      f[2] = f[0] * -f[2];
    } else {
      f[3] = p.mean;
    }
    if (!first) return;
    store_param<T>(dscale, style_f32, i, along, format);
    store_param<T>(dshift, style_f32, i, s[0], format);
  }
  __device__ static void map(const A* v, const A* f, A* y) {
    if constexpr (kFolded)
      y[0] = v[0] * f[0] + (v[1] * f[2] + f[1]);
    else
      y[0] = f[0] * ((v[0] - f[1]) - f[2] * (v[1] - f[3]));
  }
};

}  // namespace

namespace GANKERN_BACKEND {

// Bytes of the workspace that adain() takes.
int64_t adain_workspace(int dtype, int64_t outer, int64_t length, int64_t inner) {
  int64_t bytes = 0;
  by_width(dtype, [&](auto zero, auto) {
    bytes = norm_workspace<Forward<decltype(zero)>>(outer, length, inner);
    return 0;
  });
  return bytes;
}

int64_t adain_bwd_workspace(int dtype, int64_t outer, int64_t length, int64_t inner) {
  int64_t bytes = 0;
  by_width(dtype, [&](auto zero, auto) {
    bytes = norm_workspace<Backward<decltype(zero)>>(outer, length, inner);
    return 0;
  });
  return bytes;
}

// mean and rstd: [outer * inner] of the accumulation type, outputs.
int adain(int dtype, int style_dtype, const void* x, const void* scale, const void* shift, void* y,
          void* mean, void* rstd, void* workspace, int64_t outer, int64_t length, int64_t inner,
          double eps, void* stream) {
  return by_width(dtype, [&](auto zero, auto format) {
    using T = decltype(zero);
    using A = Acc<T>;
    Forward<T> op{format};
    op.in[0] = static_cast<const T*>(x);
    op.out[0] = static_cast<T*>(y);
    op.scale = scale;
    op.shift = shift;
    op.mean = static_cast<A*>(mean);
    op.rstd = static_cast<A*>(rstd);
    op.eps = static_cast<A>(eps);
    op.style_f32 = style_dtype == kF32;
    return launch_norm(op, outer, length, inner, workspace, stream);
  });
}

int adain_bwd(int dtype, int style_dtype, const void* dy, const void* x, const void* scale,
              const void* mean, const void* rstd, void* dx, void* dscale, void* dshift,
              void* workspace, int64_t outer, int64_t length, int64_t inner, void* stream) {
  return by_width(dtype, [&](auto zero, auto format) {
    using T = decltype(zero);
    using A = Acc<T>;
    Backward<T> op{format};
    op.in[0] = static_cast<const T*>(dy);
    op.in[1] = static_cast<const T*>(x);
    op.out[0] = static_cast<T*>(dx);
    op.scale = scale;
    op.mean = static_cast<const A*>(mean);
    op.rstd = static_cast<const A*>(rstd);
    op.dscale = dscale;
    op.dshift = dshift;
    op.style_f32 = style_dtype == kF32;
    return launch_norm(op, outer, length, inner, workspace, stream);
  });
}

GK_EXPORT(adain_workspace);
GK_EXPORT(adain_bwd_workspace);
GK_EXPORT(adain);
GK_EXPORT(adain_bwd);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
