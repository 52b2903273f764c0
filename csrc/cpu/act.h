// The activations of bias_act and synthesis_epilogue: value, slope and curvature, in vectors.
#pragma once

#include "vec.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

enum Act : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };

constexpr double kSeluScale = 1.0507009873554804934193349852946;
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;

// linear, relu and lrelu are one function here, kLrelu, with alpha 1, 0 and alpha.
template <typename S>
struct ActArgs {
  bool relu;                       // so that relu(-inf) is 0 although -inf * 0 is not
  S alpha, gain, inv_gain, clamp;  // clamp < 0: none
  bool from_x;
};

template <int kAct, typename V, typename S>
GK_INLINE V act_value(V u, const ActArgs<S>& p) {
  const V one = splat<V>(1), zero = V{};
  if constexpr (kAct == kLrelu) {
    const V scaled = u * p.alpha;
    return u > zero ? u : p.relu ? (u == u ? zero : u) : scaled;
  }
  if constexpr (kAct == kTanh) return tanh_(u);
  if constexpr (kAct == kSigmoid) return one / (one + exp_(-u));
  if constexpr (kAct == kElu) return u > zero ? u : expm1_(u);
  if constexpr (kAct == kSelu) return S(kSeluScale) * (u > zero ? u : S(kSeluAlpha) * expm1_(u));
  if constexpr (kAct == kSoftplus)
    return (u > zero ? u : u != u ? u : zero) + log1p_(exp_(u > zero ? -u : u));
  if constexpr (kAct == kSwish) return u / (one + exp_(-u));
}

template <int kAct, typename V, typename S>
GK_INLINE V act_slope(V a, V u, const ActArgs<S>& p) {
  const V one = splat<V>(1), zero = V{};
  if constexpr (kAct == kLrelu) return (p.from_x ? u : a) > zero ? one : splat<V>(p.alpha);
  if constexpr (kAct == kTanh) return one - a * a;
  if constexpr (kAct == kSigmoid) return a * (one - a);
  if constexpr (kAct == kElu) return a > zero ? one : a + one;
  if constexpr (kAct == kSelu)
    return a > zero ? splat<V>(kSeluScale) : a + S(kSeluScale * kSeluAlpha);
  if constexpr (kAct == kSoftplus) return -expm1_(-a);
  if constexpr (kAct == kSwish) {
    const V s = one / (one + exp_(-u));
    return s * (one + u * (one - s));
  }
}

template <int kAct, typename V, typename S>
GK_INLINE V act_curve(V a, V u, const ActArgs<S>& p) {
  const V one = splat<V>(1), zero = V{};
  if constexpr (kAct == kTanh) return S(-2) * a;
  if constexpr (kAct == kSigmoid) return one - S(2) * a;
  if constexpr (kAct == kElu || kAct == kSelu) return a > zero ? zero : one;
  if constexpr (kAct == kSoftplus) return exp_(-a);
  if constexpr (kAct == kSwish) {
    const V s = one / (one + exp_(-u));
    return p.gain * s * (one - s) * (S(2) + u * (one - S(2) * s));
  }
  return zero;
}

}  // namespace
}  // namespace gankern::cpu::GANKERN_ISA
