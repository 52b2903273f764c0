// pixel_norm: y = x * rsqrt(mean(x²) + eps) along one dimension, its gradient and the gradient's
// gradient. With r = rsqrt(mean(x²) + eps), s = Σ x dy and L the length,
//   dx = r dy - r³/L s x,
// and for a gradient g of dx, with a = Σ g dy and p = Σ g x,
//   d(dy) = r g - r³/L p x
//   d(x)  = (3 r⁵/L² p s - r³/L a) x - r³/L (s g + p dy).
// The sums over L are the only coupling between elements: csrc/kernels/norm.cuh.
#include "norm_launch.cuh"

namespace gankern {
namespace {

__device__ __forceinline__ float rsqrt_(float v) { return rsqrtf(v); }
__device__ __forceinline__ double rsqrt_(double v) { return rsqrt(v); }

template <typename T, int kInputs, int kOutputs>
struct PixelNorm {
  using Elem = T;
  static constexpr int kIn = kInputs, kOut = kOutputs;
  static constexpr bool kPivot = false;
  static constexpr int kGroupBytes = 0;
  struct Params {};
  __device__ Params params(int64_t) const { return {}; }
  Format<T> format;
  const T* in[kIn];
  T* out[kOut];
  Acc<T> eps;
};

template <typename T>
struct Forward : PixelNorm<T, 1, 1> {
  using A = Acc<T>;
  using Params = typename PixelNorm<T, 1, 1>::Params;
  static constexpr int kSums = 1, kFactors = 1, kHold = 4;
  static constexpr int kColumnHold = 4, kColumnBytes = 16;
  __device__ static void add(const A* v, const Params&, A* s) { s[0] += v[0] * v[0]; }
  __device__ void finish(int64_t, const A* s, const Params&, A inv_length, A* f, bool) const {
    f[0] = rsqrt_(s[0] * inv_length + this->eps);
  }
  __device__ static void map(const A* v, const A* f, A* y) { y[0] = v[0] * f[0]; }
};

template <typename T>  // dy, x -> dx
struct Backward : PixelNorm<T, 2, 1> {
  using A = Acc<T>;
  using Params = typename PixelNorm<T, 2, 1>::Params;
  static constexpr int kSums = 2, kFactors = 2, kHold = 4;
  // 16-bit types take 8 bytes, for the registers of the float32 sums of their columns.
  static constexpr int kColumnHold = sizeof(T) == 2 ? 4 : 2, kColumnBytes = sizeof(T) == 2 ? 8 : 16;
  __device__ static void add(const A* v, const Params&, A* s) {
    s[0] += v[1] * v[1];
    s[1] += v[0] * v[1];
  }
  __device__ void finish(int64_t, const A* s, const Params&, A inv_length, A* f, bool) const {
    const A m = s[0] * inv_length + this->eps, r = rsqrt_(m);
    f[0] = r;
    f[1] = r * (inv_length / m * s[1]);
  }
  __device__ static void map(const A* v, const A* f, A* y) { y[0] = f[0] * v[0] - f[1] * v[1]; }
};

template <typename T>  // g, dy, x -> d(dy), d(x)
struct Backward2 : PixelNorm<T, 3, 2> {
  using A = Acc<T>;
  using Params = typename PixelNorm<T, 3, 2>::Params;
  static constexpr int kSums = 4, kFactors = 4, kHold = 2;
  static constexpr int kColumnHold = 2, kColumnBytes = 8;
  __device__ static void add(const A* v, const Params&, A* s) {
    s[0] += v[2] * v[2];
    s[1] += v[0] * v[1];
    s[2] += v[0] * v[2];
    s[3] += v[1] * v[2];
  }
  __device__ void finish(int64_t, const A* s, const Params&, A inv_length, A* f, bool) const {
    const A m = s[0] * inv_length + this->eps, r = rsqrt_(m), u = inv_length / m, k = r * u;
    f[0] = r;
    f[1] = k * s[2];
    f[2] = k * s[3];
    f[3] = k * (A(3) * u * s[2] * s[3] - s[1]);
  }
  __device__ static void map(const A* v, const A* f, A* y) {
    y[0] = f[0] * v[0] - f[1] * v[2];
    y[1] = f[3] * v[2] - f[2] * v[0] - f[1] * v[1];
  }
};

}  // namespace

namespace GANKERN_BACKEND {

int pixel_norm(int dtype, const void* x, void* y, int64_t outer, int64_t length, int64_t inner,
               double eps, void* stream) {
  return by_width(dtype, [&](auto zero, auto format) {
    using T = decltype(zero);
    Forward<T> op{{format}};
    op.in[0] = static_cast<const T*>(x);
    op.out[0] = static_cast<T*>(y);
    op.eps = static_cast<Acc<T>>(eps);
    return launch_norm(op, outer, length, inner, nullptr, stream);
  });
}

int pixel_norm_bwd(int dtype, const void* dy, const void* x, void* dx, int64_t outer,
                   int64_t length, int64_t inner, double eps, void* stream) {
  return by_width(dtype, [&](auto zero, auto format) {
    using T = decltype(zero);
    Backward<T> op{{format}};
    op.in[0] = static_cast<const T*>(dy);
    op.in[1] = static_cast<const T*>(x);
    op.out[0] = static_cast<T*>(dx);
    op.eps = static_cast<Acc<T>>(eps);
    return launch_norm(op, outer, length, inner, nullptr, stream);
  });
}

int pixel_norm_bwd2(int dtype, const void* g, const void* dy, const void* x, void* d_dy, void* d_x,
                    int64_t outer, int64_t length, int64_t inner, double eps, void* stream) {
  return by_width(dtype, [&](auto zero, auto format) {
    using T = decltype(zero);
    Backward2<T> op{{format}};
    op.in[0] = static_cast<const T*>(g);
    op.in[1] = static_cast<const T*>(dy);
    op.in[2] = static_cast<const T*>(x);
    op.out[0] = static_cast<T*>(d_dy);
    op.out[1] = static_cast<T*>(d_x);
    op.eps = static_cast<Acc<T>>(eps);
    return launch_norm(op, outer, length, inner, nullptr, stream);
  });
}

GK_EXPORT(pixel_norm);
GK_EXPORT(pixel_norm_bwd);
GK_EXPORT(pixel_norm_bwd2);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
