// The activations of bias_act and synthesis_epilogue: value, slope, curvature, clamp.
#pragma once

#include <cstring>

#include "common.cuh"

namespace gankern {
namespace {

enum Act : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };

constexpr double kSeluScale = 1.0507009873554804934193349852946;
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;

// What the bits of |y| are below just where |y| < clamp; without a clamp all are.
inline unsigned clamp_bound(float clamp) {
  unsigned bits;
  std::memcpy(&bits, &clamp, sizeof bits);
  return clamp < 0 ? 0xffffffffu : bits;
}

template <typename A>
struct ActArgs {
  int act;
  A alpha, gain, inv_gain, clamp;  // clamp < 0: none
  bool from_x;                     // the gradient's reference is x (and b), not y
  A negative = gain * alpha;
  unsigned bound = clamp_bound(static_cast<float>(clamp));
};

__device__ __forceinline__ float exp_(float v) { return expf(v); }
__device__ __forceinline__ double exp_(double v) { return exp(v); }
__device__ __forceinline__ float expm1_(float v) { return expm1f(v); }
__device__ __forceinline__ double expm1_(double v) { return expm1(v); }
__device__ __forceinline__ float log1p_(float v) { return log1pf(v); }
__device__ __forceinline__ double log1p_(double v) { return log1p(v); }
__device__ __forceinline__ float abs_(float v) { return fabsf(v); }
__device__ __forceinline__ double abs_(double v) { return fabs(v); }
__device__ __forceinline__ float tanh_(float v) { return tanhf(v); }
__device__ __forceinline__ double tanh_(double v) { return tanh(v); }

// act(u). kPwl: linear, relu and lrelu are one function, with alpha 1, 0 and alpha.
template <bool kPwl, typename A>
__device__ __forceinline__ A act_value(A u, const ActArgs<A>& p) {
  if (kPwl || p.act <= kLrelu) {
    const A negative = p.act == kRelu ? (u != u ? u : A(0)) : u * p.alpha;
    return u > A(0) ? u : negative;
  }
  switch (p.act) {
    case kTanh:
      return tanh_(u);
    case kSigmoid:
      return A(1) / (A(1) + exp_(-u));
    case kElu:
      return u > A(0) ? u : expm1_(u);
    case kSelu:
      return A(kSeluScale) * (u > A(0) ? u : A(kSeluAlpha) * expm1_(u));
    case kSoftplus:
      return u > A(40) ? u : log1p_(exp_(u));
    default:
      return u / (A(1) + exp_(-u));
  }
}

// The first kBy elements go to the end.
template <int kBy, typename A, int N>
__device__ __forceinline__ void turn(A (&a)[N]) {
  A turned[N];
#pragma unroll
  for (int i = 0; i < N; i++) turned[i] = a[(i + kBy) % N];
#pragma unroll
  for (int i = 0; i < N; i++) a[i] = turned[i];
}

// f(j, a[j], rest[j]...) for each j: at once where the activation is piecewise linear. The code of
// the others is long: f is compiled kFew times, for a loop in which the arrays turn, since
// registers have no index. Of an array of one element, f gets that one.
template <bool kPwl, int kFew, typename F, typename A, int N, int... M>
__device__ __forceinline__ void each(F f, A (&a)[N], A (&... rest)[M]) {
  constexpr int kStep = kPwl || N < kFew ? N : kFew;
#pragma unroll 1
  for (int j = 0; j < N; j += kStep) {
#pragma unroll
    for (int k = 0; k < kStep; k++) f(j + k, a[k], rest[k % M]...);
    turn<kStep>(a);
    (turn<kStep>(rest), ...);
  }
}

// act'(u), from a = act(u) where that suffices, else from u.
template <bool kPwl, typename A>
__device__ __forceinline__ A act_slope(A a, A u, const ActArgs<A>& p) {
  if (kPwl || p.act <= kLrelu) return (p.from_x ? u : a) > A(0) ? A(1) : p.alpha;
  switch (p.act) {
    case kTanh:
      return A(1) - a * a;
    case kSigmoid:
      return a * (A(1) - a);
    case kElu:
      return a > A(0) ? A(1) : a + A(1);
    case kSelu:
      return a > A(0) ? A(kSeluScale) : a + A(kSeluScale * kSeluAlpha);
    case kSoftplus:
      return -expm1_(-a);
    default: {
      const A s = A(1) / (A(1) + exp_(-u));
      return s * (A(1) + u * (A(1) - s));
    }
  }
}

// d(gain * act'(u)) / d(reference): by y, or for swish by x.
template <typename A>
__device__ __forceinline__ A act_curve(A a, A u, const ActArgs<A>& p) {
  switch (p.act) {
    case kTanh:
      return A(-2) * a;
    case kSigmoid:
      return A(1) - A(2) * a;
    case kElu:
    case kSelu:
      return a > A(0) ? A(0) : A(1);
    case kSoftplus:
      return exp_(-a);
    case kSwish: {
      const A s = A(1) / (A(1) + exp_(-u));
      return p.gain * s * (A(1) - s) * (A(2) + u * (A(1) - A(2) * s));
    }
    default:
      return A(0);
  }
}

template <typename A>
__device__ __forceinline__ A clamped(A v, A clamp) {
  if (clamp < A(0)) return v;
  v = v > clamp ? clamp : v;  // comparisons, so that NaN stays NaN
  return v < -clamp ? -clamp : v;
}

// The smaller and the larger of two; NaN where either is.
__device__ __forceinline__ float min_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float v;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
#else
  return a != a || a < b ? a : b;
#endif
}
__device__ __forceinline__ float max_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
#else
  return a != a || a > b ? a : b;
#endif
}

// The piecewise linear activations in few instructions. relu(-inf) is 0.
struct Pwl {
  float gain, negative, clamp, floor;  // negative: the slope below 0; floor: the least that counts
  bool free;                           // of a clamp
  template <typename A>
  __device__ __forceinline__ explicit Pwl(const ActArgs<A>& p)
      : gain(p.gain),
        negative(p.negative),
        clamp(p.clamp < A(0) ? A(INFINITY) : p.clamp),
        floor(p.act == kRelu ? 0.f : -INFINITY),
        free(p.clamp < A(0)) {}
  __device__ __forceinline__ float slope(float v) const { return v > 0.f ? gain : negative; }
  __device__ __forceinline__ float value(float v) const {
    v = max_nan(v, floor);
    return max_nan(min_nan(v * slope(v), clamp), -clamp);
  }
  // The gradient in v, from v or from what has its sign, and y.
  __device__ __forceinline__ float grad(float dy, float v, float y) const {
    return free | (fabsf(y) < clamp) ? dy * slope(v) : 0.f;
  }
  __device__ __forceinline__ float grad(float dy, float v) const {
    return grad(dy, v, v * slope(v));
  }
  // The same without a branch; bound: see ActArgs.
  __device__ __forceinline__ float grad_within(unsigned bound, float dy, float v) const {
    const float s = slope(v);
    return (__float_as_uint(v * s) & 0x7fffffffu) < bound ? dy * s : 0.f;
  }
};

}  // namespace
}  // namespace gankern
