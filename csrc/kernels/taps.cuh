// Filters of 4x4 taps at one rate: the taps in shared memory, and how rows take part in results.
#pragma once

#include "common.cuh"

namespace gankern {
namespace {

constexpr int kTaps = 4, kHalo = kTaps - 1;

// 4x4 taps in the order of a correlation, times the gain, padded with zeros; and, where they are
// of rank one, their factors.
template <typename A>
struct alignas(16) Taps {
  A all[kTaps][kTaps], y[kTaps], x[kTaps];
  int separable;
};

// The taps by lanes 0 to 15 of a warp, and in `adjoint` reversed. Factors come through the smallest
// tap, so that those of whole numbers are exact; rank one means up to a few roundings of each tap,
// and that no factor is so large that sums of the other would underflow.
template <typename A, typename Filter>
__device__ __forceinline__ void share_taps(Taps<A>* taps, Taps<A>* adjoint, const Filter& a) {
  const int lane = threadIdx.x % 32, t = lane % (kTaps * kTaps), ky = t / kTaps, kx = t % kTaps;
  A tap = 0;
  if (ky < a.taps_y && kx < a.taps_x) {
    const int fy = a.flip ? ky : a.taps_y - 1 - ky, fx = a.flip ? kx : a.taps_x - 1 - kx;
    tap = a.separable ? A(a.f[fy]) * a.f[fx] : A(a.f[fy * a.taps_x + fx]);
  }
  tap *= a.filter_gain;
  const auto size = [](A v) { return v < A(0) ? -v : v; };
  A least = tap;
  int where = t;
#pragma unroll
  for (int step = kTaps * kTaps / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, least, step);
    const int place = __shfl_xor_sync(0xffffffffu, where, step);
    const bool smaller = size(other) < size(least) || (size(other) == size(least) && place < where);
    if (least == A(0) || (other != A(0) && smaller)) least = other, where = place;
  }
  const A in_row = __shfl_sync(0xffffffffu, tap, where / kTaps * kTaps + kx);
  const A in_col = __shfl_sync(0xffffffffu, tap, ky * kTaps + where % kTaps) / least;
  const A few = sizeof(A) == 8 ? A(1e-15) : A(5e-7);
  const bool separable = __all_sync(
      0xffffffffu, size(in_row * in_col - tap) <= few * size(tap) && size(in_col) <= A(65536));
  if (lane >= kTaps * kTaps) return;
  for (Taps<A>* to : {taps, adjoint}) {
    if (!to) continue;
    const bool reversed = to == adjoint;
    to->all[reversed ? kHalo - ky : ky][reversed ? kHalo - kx : kx] = tap;
    if (ky == 0) to->x[reversed ? kHalo - kx : kx] = in_row;
    if (kx == 0) to->y[reversed ? kHalo - ky : ky] = in_col;
    if (t == 0) to->separable = separable;
  }
}

// Calls f(filter) with filter(sums, v, out), which takes a row. `sums` are results of a column that
// wait for the rows below: sums[0] lacks one of them, sums[2] three; `out` is the result that the
// row makes whole. v(e, k): what column k of the filter meets for result e. kKeep: taps of rank one
// stay in registers.
template <bool kKeep, typename A, typename F>
__device__ __forceinline__ void with_taps(const Taps<A>& taps, F f) {
  const auto pack = [](const A* p) { return *reinterpret_cast<const Pack<A, kTaps>*>(p); };
  if (taps.separable) {
    Pack<A, kTaps> kept_x, kept_y;
    if (kKeep) kept_x = pack(taps.x), kept_y = pack(taps.y);
    f([&](auto& sums, const auto& v, auto& out) {
      constexpr int K = sizeof out / sizeof(A);
      const auto x = kKeep ? kept_x : pack(taps.x), y = kKeep ? kept_y : pack(taps.y);
#pragma unroll
      for (int e = 0; e < K; e++) {
        A passed = x.v[0] * v(e, 0);
#pragma unroll
        for (int k = 1; k < kTaps; k++) passed += x.v[k] * v(e, k);
        out[e] = sums[0][e] + y.v[3] * passed;
        sums[0][e] = sums[1][e] + y.v[2] * passed;
        sums[1][e] = sums[2][e] + y.v[1] * passed;
        sums[2][e] = y.v[0] * passed;
      }
    });
  } else {
    f([&](auto& sums, const auto& v, auto& out) {
      constexpr int K = sizeof out / sizeof(A);
#pragma unroll
      for (int e = 0; e < K; e++)
        out[e] = sums[0][e], sums[0][e] = sums[1][e], sums[1][e] = sums[2][e], sums[2][e] = A(0);
      const auto add = [&](A(&to)[K], const A* row) {
        const auto f = pack(row);
#pragma unroll
        for (int e = 0; e < K; e++)
#pragma unroll
          for (int k = 0; k < kTaps; k++) to[e] += f.v[k] * v(e, k);
      };
      add(out, taps.all[3]);
#pragma unroll
      for (int j = 0; j < kHalo; j++) add(sums[j], taps.all[kHalo - 1 - j]);
    });
  }
}

// Calls f(take), for a thread that has K channels of each of kColumns neighbouring columns:
// take(sums, read, out) takes a row as with_taps() has it. read(m, v): the K samples of the m-th
// column that the filters meet, each of which is read once. kKeep: taps along x of rank one stay in
// registers.
template <int kColumns, bool kKeep, typename A, typename F>
__device__ __forceinline__ void with_columns(const Taps<A>& taps, F f) {
  constexpr int kSamples = kTaps + kColumns - 1;
  const auto pack = [](const A* p) { return *reinterpret_cast<const Pack<A, kTaps>*>(p); };
  if (taps.separable) {
    Pack<A, kTaps> kept;
    if (kKeep) kept = pack(taps.x);
    f([&](auto& sums, auto read, auto& out) {
      constexpr int N = sizeof out / sizeof(A), K = N / kColumns;
      const auto x = kKeep ? kept : pack(taps.x);
      A passed[N];
#pragma unroll
      for (int m = 0; m < kSamples; m++) {
        A v[K];
        read(m, v);
#pragma unroll
        for (int e = 0; e < N; e++) {
          const int k = m - e / K;
          if (k == 0) passed[e] = x.v[0] * v[e % K];
          if (k > 0 && k < kTaps) passed[e] += x.v[k] * v[e % K];
        }
      }
      const auto y = pack(taps.y);
#pragma unroll
      for (int e = 0; e < N; e++) {
        out[e] = sums[0][e] + y.v[3] * passed[e];
        sums[0][e] = sums[1][e] + y.v[2] * passed[e];
        sums[1][e] = sums[2][e] + y.v[1] * passed[e];
        sums[2][e] = y.v[0] * passed[e];
      }
    });
  } else {
    f([&](auto& sums, auto read, auto& out) {
      constexpr int N = sizeof out / sizeof(A), K = N / kColumns;
#pragma unroll
      for (int e = 0; e < N; e++)
        out[e] = sums[0][e], sums[0][e] = sums[1][e], sums[1][e] = sums[2][e], sums[2][e] = A(0);
      // A loop, for want of registers.
#pragma unroll 1
      for (int m = 0; m < kSamples; m++) {
        A v[K];
        read(m, v);
#pragma unroll
        for (int i = 0; i < kColumns; i++) {
          const int k = m - i;
          if (k < 0 || k >= kTaps) continue;
#pragma unroll
          for (int e = 0; e < K; e++) {
            out[i * K + e] += taps.all[3][k] * v[e];
            sums[0][i * K + e] += taps.all[2][k] * v[e];
            sums[1][i * K + e] += taps.all[1][k] * v[e];
            sums[2][i * K + e] += taps.all[0][k] * v[e];
          }
        }
      }
    });
  }
}

// threadIdx.x, read again where it is asked for.
__device__ __forceinline__ unsigned thread_again() {
#ifdef GANKERN_SIMT
  return threadIdx.x;
#else
  unsigned t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return t;
#endif
}

}  // namespace
}  // namespace gankern
