// Lines of samples: weighted sums of runs, and runs taken apart into phases and put together again.
#pragma once

#include "vec.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

// out[i] = sum over t of w[t] * in[off[t] + i]. kPadded: sources can be read up to a whole vector.
// kCount: the number of terms, 0: `terms` of them.
template <bool kPadded, int kCount, typename O, typename I, typename S>
GK_INLINE void sum_of(O* out, int64_t n, const I* in, const int64_t* off, const S* w,
                      int64_t terms) {
  using V = Vec<S>;
  const int64_t count = kCount ? kCount : terms;
  const I* from[kCount + 1];
  V weight[kCount + 1];
  for (int t = 0; t < kCount; t++) from[t] = in + off[t], weight[t] = V{} + w[t];
  const auto term = [&](int64_t t, int64_t i) {
    if constexpr (kCount > 0) return load(from[t] + i) * weight[t];
    return load(in + off[t] + i) * w[t];
  };
  const auto one = [&](int64_t i) {
    V a{};
    for (int64_t t = 0; t < count; t++) a += term(t, i);
    return a;
  };
  if (n < kLanes) {
    V a{};
    if (kPadded)
      a = one(0);
    else
      for (int64_t t = 0; t < count; t++) a += load_part(in + off[t], n) * w[t];
    store_part(out, a, n);
    return;
  }
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    V a0{}, a1{}, a2{}, a3{};
    for (int64_t t = 0; t < count; t++) {
      a0 += term(t, i);
      a1 += term(t, i + kLanes);
      a2 += term(t, i + 2 * kLanes);
      a3 += term(t, i + 3 * kLanes);
    }
    store(out + i, a0);
    store(out + i + kLanes, a1);
    store(out + i + 2 * kLanes, a2);
    store(out + i + 3 * kLanes, a3);
  }
  for (; i + kLanes <= n; i += kLanes) store(out + i, one(i));
  if (i < n) store(out + n - kLanes, one(n - kLanes));  // over a part of what is there already
}

template <bool kPadded, typename O, typename I, typename S>
GK_INLINE void weighted_sum(O* out, int64_t n, const I* in, const int64_t* off, const S* w,
                            int64_t count) {
  if (n <= 0) return;
  if (count == 4)
    sum_of<kPadded, 4>(out, n, in, off, w, count);
  else if (count == 2)
    sum_of<kPadded, 2>(out, n, in, off, w, count);
  else
    sum_of<kPadded, 0>(out, n, in, off, w, count);
}

// out[p][i] = in[i * factor + p], the parts `stride` apart; whole vectors may be read and written.
template <typename S>
GK_INLINE void split(S* out, int64_t stride, const S* in, int64_t n, int64_t factor) {
  if (factor == 2) {
    for (int64_t i = 0; i < n; i += kLanes) {
      Vec<S> even, odd;
      unzip(load(in + 2 * i), load(in + 2 * i + kLanes), even, odd);
      store(out + i, even);
      store(out + stride + i, odd);
    }
    return;
  }
  for (int64_t p = 0; p < factor; p++)
    for (int64_t i = 0; i < n; i++) out[p * stride + i] = in[i * factor + p];
}

// out[i * factor + p] = in[p][i], likewise.
template <typename S>
GK_INLINE void merge(S* out, const S* in, int64_t stride, int64_t n, int64_t factor) {
  if (factor == 2) {
    for (int64_t i = 0; i < n; i += kLanes) {
      Vec<S> a, b;
      zip(load(in + i), load(in + stride + i), a, b);
      store(out + 2 * i, a);
      store(out + 2 * i + kLanes, b);
    }
    return;
  }
  for (int64_t p = 0; p < factor; p++)
    for (int64_t i = 0; i < n; i++) out[i * factor + p] = in[p * stride + i];
}

}  // namespace
}  // namespace gankern::cpu::GANKERN_ISA
