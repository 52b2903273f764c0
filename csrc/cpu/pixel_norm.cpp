// pixel_norm on the CPU, its gradient and the gradient's gradient; the formulas are in
// csrc/kernels/pixel_norm.cu.
#include "norm.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

template <typename T, int kInputs, int kOutputs, int kCount>
struct PixelNorm {
  using Elem = T;
  using V = Vec<T>;
  using S = Scalar<T>;
  static constexpr int kIn = kInputs, kOut = kOutputs, kSums = kCount, kFactors = kCount;
  static constexpr bool kPivot = false;
  struct Params {};
  GK_INLINE Params params(int64_t, int64_t) const { return {}; }
  GK_INLINE static V rsqrt_(V v) {
    for (int i = 0; i < kLanes; i++) v[i] = std::sqrt(v[i]);
    return S(1) / v;
  }
  const T* in[kIn];
  T* out[kOut];
  S eps;
};

template <typename T>
struct Forward : PixelNorm<T, 1, 1, 1> {
  using V = Vec<T>;
  using typename PixelNorm<T, 1, 1, 1>::Params;
  GK_INLINE static void add(const V* v, const Params&, V* s) { s[0] += v[0] * v[0]; }
  GK_INLINE void finish(int64_t, int64_t, const V* s, const Params&, Scalar<T> inv_length,
                        V* f) const {
    f[0] = this->rsqrt_(s[0] * inv_length + this->eps);
  }
  GK_INLINE static void map(const V* v, const V* f, V* y) { y[0] = v[0] * f[0]; }
};

template <typename T>  // dy, x -> dx
struct Backward : PixelNorm<T, 2, 1, 2> {
  using V = Vec<T>;
  using typename PixelNorm<T, 2, 1, 2>::Params;
  GK_INLINE static void add(const V* v, const Params&, V* s) {
    s[0] += v[1] * v[1];
    s[1] += v[0] * v[1];
  }
  GK_INLINE void finish(int64_t, int64_t, const V* s, const Params&, Scalar<T> inv_length,
                        V* f) const {
    const V m = s[0] * inv_length + this->eps, r = this->rsqrt_(m);
    f[0] = r;
    f[1] = r * (inv_length / m * s[1]);
  }
  GK_INLINE static void map(const V* v, const V* f, V* y) { y[0] = f[0] * v[0] - f[1] * v[1]; }
};

template <typename T>  // g, dy, x -> d(dy), d(x)
struct Backward2 : PixelNorm<T, 3, 2, 4> {
  using V = Vec<T>;
  using typename PixelNorm<T, 3, 2, 4>::Params;
  GK_INLINE static void add(const V* v, const Params&, V* s) {
    s[0] += v[2] * v[2];
    s[1] += v[0] * v[1];
    s[2] += v[0] * v[2];
    s[3] += v[1] * v[2];
  }
  GK_INLINE void finish(int64_t, int64_t, const V* s, const Params&, Scalar<T> inv_length,
                        V* f) const {
    const V m = s[0] * inv_length + this->eps, r = this->rsqrt_(m), u = inv_length / m, k = r * u;
    f[0] = r;
    f[1] = k * s[2];
    f[2] = k * s[3];
    f[3] = k * (Scalar<T>(3) * u * s[2] * s[3] - s[1]);
  }
  GK_INLINE static void map(const V* v, const V* f, V* y) {
    y[0] = f[0] * v[0] - f[1] * v[2];
    y[1] = f[3] * v[2] - f[2] * v[0] - f[1] * v[1];
  }
};

template <template <typename> typename Op>
int run(int dtype, const void* const* in, void* const* out, int64_t outer, int64_t length,
        int64_t inner, double eps) {
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Op<T> op;
    for (int a = 0; a < Op<T>::kIn; a++) op.in[a] = static_cast<const T*>(in[a]);
    for (int a = 0; a < Op<T>::kOut; a++) op.out[a] = static_cast<T*>(out[a]);
    op.eps = static_cast<Scalar<T>>(eps);
    return run_norm(op, outer, length, inner);
  });
}

}  // namespace

int pixel_norm(int dtype, const void* x, void* y, int64_t outer, int64_t length, int64_t inner,
               double eps, void*) {
  const void* in[] = {x};
  void* out[] = {y};
  return run<Forward>(dtype, in, out, outer, length, inner, eps);
}

int pixel_norm_bwd(int dtype, const void* dy, const void* x, void* dx, int64_t outer,
                   int64_t length, int64_t inner, double eps, void*) {
  const void* in[] = {dy, x};
  void* out[] = {dx};
  return run<Backward>(dtype, in, out, outer, length, inner, eps);
}

int pixel_norm_bwd2(int dtype, const void* g, const void* dy, const void* x, void* d_dy, void* d_x,
                    int64_t outer, int64_t length, int64_t inner, double eps, void*) {
  const void* in[] = {g, dy, x};
  void* out[] = {d_dy, d_x};
  return run<Backward2>(dtype, in, out, outer, length, inner, eps);
}

}  // namespace gankern::cpu::GANKERN_ISA
