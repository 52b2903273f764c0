// The forward kernel of synthesis_epilogue with a filter, NCHW.
#pragma once

#include "synthesis_epilogue_march.cuh"

namespace gankern {
namespace {

template <bool kPwl, typename A>
__device__ __forceinline__ A value(A u, A d, A noise, A s, A b, const ActArgs<A>& p) {
  return clamped(act_value<kPwl>(u * d + (noise * s + b), p) * p.gain, p.clamp);
}

// NCHW: a block makes a tile of y from a tile of x in shared memory; a thread has kRun neighbouring
// columns of kRows rows. One kernel for all activations, but more rows than one for the piecewise
// linear alone.
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_fwd_planes_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  GK_DYNAMIC_SHARED(A, shared);
  __shared__ Taps<A> taps;
  __shared__ A params[3];
  __shared__ Tile tile;
  if (threadIdx.x == 0) tile.set(a);
  A* const xs = shared;
  A* const outs = xs + (a.tile_h + kHalo) * a.pitch;
  A* const noises = outs + (blockDim.x >> a.lanes_log2) * a.pitch;
  __syncthreads();
  const int c_first = static_cast<int>(blockIdx.y) * a.groups;
  for (int c = c_first; c < min(a.C, c_first + a.groups); c++) {
    if (c != c_first) __syncthreads();
    const TileAt t(tile);
    const int height = min(a.tile_h, a.out_h - t.row0);
    const Rows<const T> x_rows(
        a.x + offset<false>(a.C, t.n, c, a.H, a.W, t.row0 - a.y0, t.col0 - a.x0), a.W);
    share_params<T, 1>(params, a, t.n, c, threadIdx.x);
    const Stage<A, T, 2> x{xs,
                           a.pitch,
                           x_rows,
                           height + kHalo,
                           a.y0 - t.row0,
                           a.y0 - t.row0 + a.H,
                           max(0, a.x0 - t.col0),
                           min(a.tile_w + kHalo, a.x0 - t.col0 + a.W),
                           a.magic,
                           a.format};
    x.load(a.x, a.x_end);
    if (c == c_first) {
      if (a.noise) stage_noise(noises, a, t.n, t.row0, t.col0, a.tile_h, a.across * kRun);
      if (threadIdx.x < 32) share_taps<T>(&taps, nullptr, a);
    }
    __syncthreads();
    const Run run(a, kRows);
    if (run.first_of_warp >= height) continue;
    A u[kRows][kRun];
    filter_rows(u, taps, [&](int q, A(&v)[kRun + kHalo]) {
      const int row = min(run.first + q, height + kHalo - 1);
      read_run(v, xs + row * a.pitch + x_rows.shift(row) + run.at);
    });
    // Warps store rows together.
    const Rows<T> y_rows(a.out + offset<false>(a.C, t.n, c, a.out_h, a.out_w, t.row0, t.col0),
                         a.out_w);
    A* out = outs + run.chunk * a.pitch;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int row = run.first + r, shift = y_rows.shift(row);
      const bool there = row < height;
      if (there && run.lx < a.across) {
        A z[kRun] = {};
        if (a.noise) read_run(z, noises + row * a.across * kRun + run.at);
        const auto finish = [&](auto pwl) {
          each<decltype(pwl)::value, 1>(
              [&](int, A& v, A noise) {
                v = value<decltype(pwl)::value>(v, params[0], noise, params[2], params[1], p);
              },
              u[r], z);
        };
        if (kRows > 1 || (kFast<T> && p.act <= kLrelu))
          finish(std::true_type{});
        else
          finish(std::false_type{});
#pragma unroll
        for (int e = 0; e < kRun; e++) out[shift + run.at + e] = u[r][e];
      }
      __syncwarp();
      if (there)
        store_row(y_rows.start + static_cast<int64_t>(row) * a.out_w, out, shift,
                  min(a.tile_w, a.out_w - t.col0), run.lx, 1 << a.lanes_log2, a.format);
      __syncwarp();
    }
  }
}

}  // namespace
}  // namespace gankern
