// The forward kernel of synthesis_epilogue with a filter.
#pragma once

#include "synthesis_epilogue.cuh"

namespace gankern {
namespace {

template <bool kPwl, typename A>
__device__ __forceinline__ A value(A u, A d, A noise, A s, A b, const ActArgs<A>& p) {
  return clamped(act_value<kPwl>(u * d + (noise * s + b), p) * p.gain, p.clamp);
}

// One kernel for all activations, but more rows than one for the piecewise linear alone.
template <typename T, bool kLast, int kRows>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_fwd_filter_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>, kStep = kChannels<T, kLast>, kNoise = kLast ? 1 : V;
  GK_DYNAMIC_SHARED(A, tile);
  __shared__ __align__(16) A taps[2 * kTaps * kTaps];
  __shared__ A params[3 * kStep];
  const int tile_y = blockIdx.x / a.tiles_x, tile_x = blockIdx.x - tile_y * a.tiles_x;
  const int row0 = tile_y * a.tile_h, col0 = tile_x * a.tile_w;
  const Place at = place<kLast>(a);
  const int col = col0 + (kLast ? at.lx : at.lx * V), row = row0 + at.gy * kRows;
  // A thread's noise waits in shared memory, where no other thread looks at it.
  A* noises = tile + (kLast ? V / kPiece<T> : V) * a.plane + threadIdx.x;
  const int first = kLast ? (at.gy * kRows * a.pitch + 2 * at.lx + at.half) * kPiece<T>
                          : at.gy * kRows * a.pitch + at.lx;
  load_taps(taps, a, threadIdx.x);
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
      share_params<T, kStep>(params, a, n, c0, threadIdx.x);
      if (kLast) {
        load_tile_last<T>(tile, a.x + offset<true>(a.C, n, 0, a.H, a.W, 0, 0), a.C, c0, a.vec_x,
                          a.H, a.W, row0 - a.y0, col0 - a.x0, a.tile_h + kHalo, a.tile_w + kHalo,
                          a.magic, a.pitch, a.plane, a.format);
      } else {
        load_tile_planes<A, T, V>(tile, a.x + offset<false>(a.C, n, c0, a.H, a.W, 0, 0), a.x,
                                  a.x_end, a.H, a.W, row0 - a.y0, col0 - a.x0, a.tile_h + kHalo,
                                  a.tile_w + kHalo, a.pitch, a.magic, a.pitch, a.plane, a.format);
      }
      __syncthreads();
      const int count = col >= a.out_w ? 0 : kLast ? min(a.C - c, V) : a.out_w - col;
      if (count <= 0) continue;
      A u[kRows][V];
      filter<kLast>(u, taps, [&](A* v, int q, int kx) {
        if constexpr (kLast)
          read_pixel<T, V>(v, tile + first + (q * a.pitch + 2 * kx) * kPiece<T>, a.plane);
        else
          read_planes<T, V + kHalo>(v, tile + first + q * a.pitch, 0, a.plane);
      });
      const Params<T, kLast, kStep> k(params + at.half * V);
      T* out = a.out + offset<kLast>(a.C, n, c, a.out_h, a.out_w, row, col);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (row + r >= a.out_h) break;
        const auto finish = [&](auto pwl) {
          constexpr bool kPwl = decltype(pwl)::value;
          each<kPwl, 1>(
              [&](int e, A& v) {
                const A z = a.noise ? noises[(r * kNoise + (kLast ? 0 : e)) * blockDim.x] : A(0);
                v = value<kPwl>(v, k.d(e), z, k.s(e), k.b(e), p);
              },
              u[r]);
        };
        if (kRows > 1 || (kFast<T> && p.act <= kLrelu))
          finish(std::true_type{});
        else
          finish(std::false_type{});
        store_some<T>(out, u[r], a.vec_out, count, a.format);
        out += static_cast<int64_t>(a.out_w) * (kLast ? a.C : 1);
      }
    }
  }
}

}  // namespace
}  // namespace gankern
