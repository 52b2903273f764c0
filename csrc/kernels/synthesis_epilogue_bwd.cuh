// The backward kernel of synthesis_epilogue with a filter, NCHW, and the sums of both of them.
#pragma once

#include "synthesis_epilogue_march.cuh"

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

// The last block of a group of `span` channels adds the partial sums of all, in order.
template <typename T>
__device__ __forceinline__ void finish(const Args<T>& a, int span) {
  using A = Acc<T>;
  __shared__ int last;
  const unsigned thread = thread_again();
  __threadfence();
  __syncthreads();
  if (thread == 0)
    last = atomicAdd(a.tickets + blockIdx.y, 1) == static_cast<int>(gridDim.x * gridDim.z) - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  // A warp adds the tiles of one sum of one plane; then a thread the samples of a channel.
  const int first = static_cast<int>(blockIdx.y) * span;
  const unsigned channels = min(span, a.C - first), items = channels * a.N;
  const int64_t planes = static_cast<int64_t>(a.N) * a.C;
  for (unsigned i = thread / 32; i < 3 * items; i += blockDim.x / 32) {
    const unsigned k = i / items, n = (i - k * items) / channels;
    const int64_t plane = static_cast<int64_t>(n) * a.C + first + (i - k * items - n * channels);
    A* part = a.partials + (k * planes + plane) * a.tiles;
    A sum = 0;
#pragma unroll 2
    for (int t = thread % 32; t < a.tiles; t += 32) sum += part[t];
    sum = warp_sum(sum);
    if (thread % 32 == 0) *(k ? part : a.dd + plane) = sum;
  }
  __syncthreads();
  for (unsigned i = thread; i < 2 * channels; i += blockDim.x) {
    const int k = i < channels ? 1 : 2,
              c = first + static_cast<int>(i < channels ? i : i - channels);
    A sum = 0;
#pragma unroll 4
    for (int n = 0; n < a.N; n++)
      sum += a.partials[(k * planes + static_cast<int64_t>(n) * a.C + c) * a.tiles];
    (k == 1 ? a.db : a.ds)[c] = sum;
  }
}

// dL/dv from dy, in its place, with v = u * d + noise * s + b.
template <bool kPwl, typename A, int N>
__device__ __forceinline__ void grad(A (&dy)[N], A (&v)[N], const ActArgs<A>& p) {
  each<kPwl, 1>(
      [&](int, A& to, A from) {
        A y, dv;
        if (kPwl) {
          const A slope = from > A(0) ? p.gain : p.gain * p.alpha;
          y = from * slope, dv = to * slope;
        } else {
          const A act = act_value<kPwl>(from, p);
          y = act * p.gain, dv = to * p.gain * act_slope<kPwl>(act, from, p);
        }
        to = p.clamp >= A(0) && !(abs_(y) < p.clamp) ? A(0) : dv;
      },
      dy, v);
}

// With a filter, NCHW: a block makes a tile of dx from tiles of x and dy in shared memory. Row j of
// its dv needs rows j to j + 3 of x, and row j of dx rows j to j + 3 of du = dv * d, which takes
// the place of dy. A thread has kRun neighbouring columns of kRows rows. One kernel for all
// activations, but more rows than one for the piecewise linear alone.
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_bwd_planes_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int kBatch = sizeof(T) == 2 ? 1 : 2;  // registers are short
  GK_DYNAMIC_SHARED(A, shared);
  __shared__ Taps<A> taps, adjoint;
  __shared__ A scratch[kThreads<T> / 32 * 3], params[3];
  __shared__ Tile tile;
  if (threadIdx.x == 0) tile.set(a);
  A* const xs = shared;
  A* const dus = xs + (a.tile_h + 2 * kHalo) * a.pitch;
  A* const noises = dus + (a.tile_h + kHalo) * a.pitch;
  __syncthreads();
  const int c_first = static_cast<int>(blockIdx.y) * a.groups;
  for (int c = c_first; c < min(a.C, c_first + a.groups); c++) {
    if (c != c_first) __syncthreads();
    {
      const TileAt t(tile);
      share_params<T, 1>(params, a, t.n, c, threadIdx.x);
      const int height = min(a.tile_h, a.H - t.row0);
      const Stage<A, T, kBatch> x{xs,
                                  a.pitch,
                                  t.x_rows(a, c),
                                  height + 2 * kHalo,
                                  kHalo - t.row0,
                                  kHalo - t.row0 + a.H,
                                  max(0, kHalo - t.col0),
                                  min(a.tile_w + 2 * kHalo, kHalo - t.col0 + a.W),
                                  a.magic,
                                  a.format};
      const int orow0 = t.row0 + a.y0 - kHalo, ocol0 = t.col0 + a.x0 - kHalo;
      const Stage<A, T, kBatch> dy{
          dus,     a.pitch,         t.dy_rows(a, c), height + kHalo,
          -orow0,  a.out_h - orow0, max(0, -ocol0),  min(a.tile_w + kHalo, a.out_w - ocol0),
          a.magic, a.format};
      x.load(a.x, a.x_end);
      dy.load(a.dy, a.dy_end);
      if (c == c_first) {
        if (a.noise) stage_noise(noises, a, t.n, orow0, ocol0, a.tile_h + kHalo, a.across * kRun);
        if (threadIdx.x < 32) share_taps(&taps, &adjoint, a);
      }
    }
    __syncthreads();
    A sums[3] = {};
    {
      const TileAt t(tile);
      const Run run(a, kRows);
      const int height = min(a.tile_h, a.H - t.row0);
      if (run.lx < a.across && run.first < height + kHalo) {
        A u[kRows][kRun];
        {
          const auto x_rows = t.x_rows(a, c);
          filter_rows(u, taps, [&](int q, A(&v)[kRun + kHalo]) {
            const int row = min(run.first + q, height + 2 * kHalo - 1);
            read_run(v, xs + row * a.pitch + x_rows.shift(row) + run.at);
          });
        }
        const auto dy_rows = t.dy_rows(a, c);
        // Of a tile's dv, the halo at its end belongs to the next one.
        const bool last = t.col0 + a.tile_w >= a.W;
        const int own_rows = run.lx * kRun >= a.tile_w && !last ? 0
                             : t.row0 + a.tile_h < a.H          ? a.tile_h
                                                                : height + kHalo;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          const int row = run.first + r;
          if (row >= height + kHalo) break;
          A* du = dus + row * a.pitch + dy_rows.shift(row) + run.at;
          int z_at = row * a.across * kRun + run.at;
          forget(z_at);  // else it is computed again for each part
#pragma unroll
          for (int part = 0; part < kRun; part += kPart) {
            A v[kPart], dv[kPart], z[kPart] = {};
            if (a.noise) read_run(z, noises + z_at + part);
            read_run(dv, du + part);
#pragma unroll
            for (int e = 0; e < kPart; e++)
              v[e] = u[r][part + e] * params[0] + (z[e] * params[2] + params[1]);
            if (kRows > 1 || (kFast<T> && p.act <= kLrelu))
              grad<true>(dv, v, p);
            else
              grad<false>(dv, v, p);
#pragma unroll
            for (int e = 0; e < kPart; e++) {
              if (row < own_rows) {
                sums[0] += dv[e] * u[r][part + e];
                sums[1] += dv[e];
                sums[2] += dv[e] * z[e];
              }
              du[part + e] = dv[e] * params[0];
            }
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 3; k++) {
      const A sum = warp_sum(sums[k]);
      if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32 * 3 + k] = sum;
    }
    write_partials(scratch, a, tile.n, c, 1, tile.index);
    const TileAt t(tile);
    const Run run(a, kRows);
    const int height = min(a.tile_h, a.H - t.row0);
    if (run.first_of_warp >= height) continue;
    A dx[kRows][kRun];
    {
      const auto dy_rows = t.dy_rows(a, c);
      filter_rows(dx, adjoint, [&](int q, A(&v)[kRun + kHalo]) {
        const int row = min(run.first + q, height + kHalo - 1);
        read_run(v, dus + row * a.pitch + dy_rows.shift(row) + run.at);
      });
    }
    // Warps store rows together, through memory where x no longer is needed.
    const auto dx_rows = t.dx_rows(a, c);
    A* out = xs + run.chunk * a.pitch;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int row = run.first + r, shift = dx_rows.shift(row);
      if (row < height && run.lx < a.across)
#pragma unroll
        for (int e = 0; e < kRun; e++) out[shift + run.at + e] = dx[r][e];
      __syncwarp();
      if (row < height)
        store_row(dx_rows.start + static_cast<int64_t>(row) * a.W, out, shift,
                  min(a.tile_w, a.W - t.col0), run.lx, 1 << a.lanes_log2, a.format);
      __syncwarp();
    }
  }
  finish<T>(a, a.groups);
}

}  // namespace
}  // namespace gankern
