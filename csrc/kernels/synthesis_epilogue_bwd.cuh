// What the backward kernels of synthesis_epilogue share: their sums, and the activation's gradient.
#pragma once

#include "synthesis_epilogue.cuh"

namespace gankern {
namespace {

// Adds up the warps: the block's partial sums of `step` channels, from c0 on.
template <typename T>
__device__ __forceinline__ void write_partials(const Acc<T>* scratch, const Args<T>& a, int n,
                                               int c0, int step, int tile) {
  __syncthreads();
  const int t = thread_again(), warps = (blockDim.x + 31) / 32;
#pragma unroll
  for (int k = 0; k < 3; k++)
    if (t < step && c0 + t < a.C) {
      Acc<T> sum = 0;
      for (int w = 0; w < warps; w++) sum += scratch[(w * 3 + k) * step + t];
      const int64_t channel = (static_cast<int64_t>(k) * a.N + n) * a.C + c0 + t;
      a.partials[channel * a.tiles + tile] = sum;
    }
  __syncthreads();
}

// The last block of a sample's `span` channels adds the partial sums of its tiles, and the last of
// these blocks those of the samples, in order.
template <typename T>
__device__ __forceinline__ void finish(const Args<T>& a, int n, int span, int group) {
  using A = Acc<T>;
  const unsigned thread = thread_again();
  const int first = group * span, channels = min(span, a.C - first);
  const auto partial = [&](int k, int n, int c) {
    return a.partials + ((static_cast<int64_t>(k) * a.N + n) * a.C + first + c) * a.tiles;
  };
  if (!arrives_last(a.tickets + static_cast<int64_t>(n) * a.groups + group, a.tiles)) return;
  // A warp adds the tiles of one sum of one channel.
  for (int i = thread / 32; i < 3 * channels; i += blockDim.x / 32) {
    const int k = (i >= channels) + (i >= 2 * channels), c = i - k * channels;
    A* const part = partial(k, n, c);
    A sum = 0;
#pragma unroll 2
    for (int t = thread % 32; t < a.tiles; t += 32) sum += part[t];
    sum = warp_sum(sum);
    if (thread % 32 == 0) *(k ? part : a.dd + static_cast<int64_t>(n) * a.C + first + c) = sum;
  }
  if (!arrives_last(a.tickets + static_cast<int64_t>(a.N) * a.groups + group, a.N)) return;
  for (int i = thread; i < (a.ds ? 2 : 1) * channels; i += blockDim.x) {
    const int k = i < channels ? 1 : 2, c = i < channels ? i : i - channels;
    A sum = 0;
#pragma unroll 4
    for (int n = 0; n < a.N; n++) sum += *partial(k, n, c);
    (k == 1 ? a.db : a.ds)[first + c] = sum;
  }
}

// dL/dv from dy, in its place, with v = u * d + noise * s + b, of any activation.
template <typename A, int N>
__device__ __forceinline__ void grad(A (&dy)[N], A (&v)[N], const ActArgs<A>& p) {
  each<false, 1>(
      [&](int, A& to, A from) {
        const A act = act_value<false>(from, p);
        const A dv = to * p.gain * act_slope<false>(act, from, p);
        to = p.clamp >= A(0) && !(abs_(act * p.gain) < p.clamp) ? A(0) : dv;
      },
      dy, v);
}

}  // namespace
}  // namespace gankern
