// The forward kernels of synthesis_epilogue, without and with a filter.
#pragma once

#include "synthesis_epilogue.cuh"

namespace gankern {
namespace {

template <bool kPwl, typename A>
__device__ __forceinline__ A value(A u, A d, A noise, A s, A b, const ActArgs<A>& p) {
  return clamped(act_value<kPwl>(u * d + (noise * s + b), p) * p.gain, p.clamp);
}

// Without a filter: a plane is one row; NCHW: rows of threads have channels of their own.
template <typename T, bool kLast, bool kPwl>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_fwd_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>, kStep = kChannels<T, kLast>, kNoise = kLast ? 1 : V;
  __shared__ A params[3 * kChannels<T, true>];
  __shared__ __align__(16) A noises[kLast ? 1 : 32 * V + 32];
  const Place at = place<kLast>(a.lanes_log2);
  const int first = blockIdx.x * a.tile_w, col = first + (kLast ? at.lx : at.lx * V);
  for (int n = blockIdx.z; n < a.N; n += gridDim.z) {
    A noise[kNoise] = {};
    if (kLast && a.noise) load_noise<T, kLast>(noise, a, n, 0, col, a.out_w - col);
    if (!kLast && a.noise) {
      __syncthreads();
      share_noise(noises, a, n, first);
      __syncthreads();
      if constexpr (!kLast) read_pieces<T>(noise, noises, piece_pitch<T>(a.tile_w), col - first);
    }
    for (int g = 0; g < a.groups; g++) {
      const int c0 = ((static_cast<int>(blockIdx.y) * a.groups + g) * a.tile_h + at.gy) * kStep;
      if (kLast) {
        __syncthreads();
        share_params(params, a, n, c0);
        __syncthreads();
      }
      const int c = c0 + (kLast ? at.half * V : 0);
      if (c >= a.C || col >= a.out_w) continue;
      const int count = kLast ? a.C - c : a.out_w - col;
      const int64_t i = offset<kLast>(a.C, n, c, 1, a.out_w, 0, col);
      A u[V];
      load_some<T>(u, a.x + i, a.vec_x, count);
      const Params<T, kLast> k(params, a, n, c, at.half);
#pragma unroll
      for (int e = 0; e < V; e++)
        u[e] = value<kPwl>(u[e], k.d(e), noise[kLast ? 0 : e], k.s(e), k.b(e), p);
      store_some<T>(a.out + i, u, a.vec_out, count);
    }
  }
}

template <typename T, bool kLast, bool kPwl, int kRows>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_fwd_filter_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>, kStep = kChannels<T, kLast>, kPlanes = kLast ? 2 * V : V;
  constexpr int kNoise = kLast ? 1 : V;
  GK_DYNAMIC_SHARED(A, tile);
  __shared__ __align__(16) A taps[2 * kTaps * kTaps];
  __shared__ A params[3 * kChannels<T, true>];
  const int tile_y = blockIdx.x / a.tiles_x, tile_x = blockIdx.x - tile_y * a.tiles_x;
  const int row0 = tile_y * a.tile_h, col0 = tile_x * a.tile_w;
  const Place at = place<kLast>(a.lanes_log2);
  const int col = col0 + (kLast ? at.lx : at.lx * V), row = row0 + at.gy * kRows;
  // A thread's noise waits in shared memory, where no other thread looks at it.
  A* noises = tile + (a.tile_h + kHalo) * kPlanes * a.pitch + threadIdx.x;
  load_taps(taps, a);
  for (int n = blockIdx.z; n < a.N; n += gridDim.z) {
    if (a.noise)
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        A noise[kNoise] = {};
        if (row + r < a.out_h) load_noise<T, kLast>(noise, a, n, row + r, col, a.out_w - col);
#pragma unroll
        for (int e = 0; e < kNoise; e++) noises[(r * kNoise + e) * blockDim.x] = noise[e];
      }
    for (int g = 0; g < a.groups; g++) {
      const int c0 = (static_cast<int>(blockIdx.y) * a.groups + g) * kStep;
      if (c0 >= a.C) break;
      const int c = c0 + (kLast ? at.half * V : 0);
      __syncthreads();
      if (kLast) {
        share_params(params, a, n, c0);
        load_tile_last<T>(tile, a.x + offset<true>(a.C, n, 0, a.H, a.W, 0, 0), a.C, c0, a.vec_x,
                          a.H, a.W, row0 - a.y0, col0 - a.x0, a.tile_h + kHalo, a.tile_w + kHalo,
                          a.magic, a.pitch);
      } else {
        load_tile_planes<A, T, V>(tile, a.x + offset<false>(a.C, n, c0, a.H, a.W, 0, 0), a.x_end,
                                  a.H, a.W, row0 - a.y0, col0 - a.x0, a.tile_h + kHalo,
                                  a.tile_w + kHalo, (a.tile_w + kHalo + 2 * V - 2) / V, a.magic,
                                  a.pitch);
      }
      __syncthreads();
      const int count = col >= a.out_w ? 0 : kLast ? min(a.C - c, V) : a.out_w - col;
      if (count <= 0) continue;
      A u[kRows][V];
      filter<T, kLast>(u, tile + at.gy * kRows * a.pitch * kPlanes, a.pitch, at.lx,
                       kLast ? at.half * V : 0, taps);
      const Params<T, kLast> k(params, a, n, c, at.half);
      T* out = a.out + offset<kLast>(a.C, n, c, a.out_h, a.out_w, row, col);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (row + r >= a.out_h) break;
#pragma unroll
        for (int e = 0; e < V; e++) {
          const A z = a.noise ? noises[(r * kNoise + (kLast ? 0 : e)) * blockDim.x] : A(0);
          u[r][e] = value<kPwl>(u[r][e], k.d(e), z, k.s(e), k.b(e), p);
        }
        store_some<T>(out, u[r], a.vec_out, count);
        out += static_cast<int64_t>(a.out_w) * (kLast ? a.C : 1);
      }
    }
  }
}

}  // namespace
}  // namespace gankern
