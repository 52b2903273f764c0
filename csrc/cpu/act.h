// The activations of bias_act and synthesis_epilogue: value, slope and curvature, in vectors.
#pragma once

#include "vec.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

enum Act : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };

constexpr double kSeluScale = 1.0507009873554804934193349852946;
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;

// kPwl: linear, relu and lrelu are one function, with alpha 1, 0 and alpha.
template <typename S>
struct ActArgs {
  int act;
  S alpha, gain, inv_gain, clamp;  // clamp < 0: none
  bool from_x;                     // the gradient's reference is x (and b), not y
};

// act(u).
template <bool kPwl, typename V, typename S>
GK_INLINE V act_value(V u, const ActArgs<S>& p) {
  const V one = splat<V>(1), zero = V{};
  if constexpr (kPwl) {
    const V scaled = u * p.alpha;  // relu(-inf) is 0 although -inf * 0 is not
    return u > zero ? u : p.act == kRelu ? (u == u ? zero : u) : scaled;
  }
  switch (p.act) {
    case kTanh:
      return tanh_(u);
    case kSigmoid:
      return one / (one + exp_(-u));
    case kElu:
      return u > zero ? u : expm1_(u);
    case kSelu:
      return S(kSeluScale) * (u > zero ? u : S(kSeluAlpha) * expm1_(u));
    case kSoftplus:
      return (u > zero ? u : u != u ? u : zero) + log1p_(exp_(u > zero ? -u : u));
    default:
      return u / (one + exp_(-u));
  }
}

// act'(u), from a = act(u) where that suffices, else from u.
template <bool kPwl, typename V, typename S>
GK_INLINE V act_slope(V a, V u, const ActArgs<S>& p) {
  const V one = splat<V>(1), zero = V{};
  if constexpr (kPwl) return (p.from_x ? u : a) > zero ? one : splat<V>(p.alpha);
  switch (p.act) {
    case kTanh:
      return one - a * a;
    case kSigmoid:
      return a * (one - a);
    case kElu:
      return a > zero ? one : a + one;
    case kSelu:
      return a > zero ? splat<V>(kSeluScale) : a + S(kSeluScale * kSeluAlpha);
    case kSoftplus:
      return -expm1_(-a);
    default: {
      const V s = one / (one + exp_(-u));
      return s * (one + u * (one - s));
    }
  }
}

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

// v within [-clamp, clamp]; NaN stays.
template <typename V, typename S>
GK_INLINE V clamped(V v, const ActArgs<S>& p) {
  if (p.clamp < 0) return v;
  const V limit = splat<V>(p.clamp);
  v = v > limit ? limit : v;
  return v < -limit ? -limit : v;
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

// d(gain * act'(u)) / d(reference): by y, or for swish by x.
template <typename V, typename S>
GK_INLINE V act_curve(V a, V u, const ActArgs<S>& p) {
  const V one = splat<V>(1), zero = V{};
  switch (p.act) {
    case kTanh:
      return S(-2) * a;
    case kSigmoid:
      return one - S(2) * a;
    case kElu:
    case kSelu:
      return a > zero ? zero : one;
    case kSoftplus:
      return exp_(-a);
    case kSwish: {
      const V s = one / (one + exp_(-u));
      return p.gain * s * (one - s) * (S(2) + u * (one - S(2) * s));
    }
    default:
      return zero;
  }
}

}  // namespace
}  // namespace gankern::cpu::GANKERN_ISA
