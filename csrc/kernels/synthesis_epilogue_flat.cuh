// The kernels of synthesis_epilogue without a filter: a plane is one row.
#pragma once

#include "synthesis_epilogue_bwd.cuh"
#include "synthesis_epilogue_fwd.cuh"

namespace gankern {
namespace {

// Without a filter: a plane is one row; NCHW: rows of threads have channels of their own. x is
// under way while noise and parameters are shared.
template <typename T, bool kLast, bool kPwl>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_fwd_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>, kStep = kChannels<T, kLast>, kNoise = kLast ? 1 : V;
  constexpr int kStride = kLast ? kStep : kFlatChannels;
  __shared__ A params[3 * kStride];
  __shared__ __align__(16) A noises[kLast ? 1 : 32 * V + 32];
  const Place at = place<kLast>(a);
  const int first = blockIdx.x * a.tile_w, col = first + (kLast ? at.lx : at.lx * V);
  const int span = a.groups * a.tile_h, c_block = static_cast<int>(blockIdx.y) * span * kStep;
  const int c_first = c_block + (kLast ? at.half * V : at.gy), c_step = a.tile_h * kStep;
  for (int n = blockIdx.z; n < a.N; n += gridDim.z) {
    int64_t i = offset<kLast>(a.C, n, c_first, 1, a.out_w, 0, col);
    const int64_t i_step = kLast ? c_step : static_cast<int64_t>(c_step) * a.out_w;
    const auto count = [&](int c) {
      return col >= a.out_w ? 0 : kLast ? a.C - c : c < a.C ? a.out_w - col : 0;
    };
    Pack<T, V> next = load_packed<T>(a.x + i, a.vec_x, count(c_first));
    A noise[kNoise] = {};
    if (kLast && a.noise) load_noise<T, kLast>(noise, a, n, 0, col, a.out_w - col);
    if (!kLast) {
      __syncthreads();
      if (a.noise) share_noise(noises, a, n, first);
      share_params<T, kStride>(params, a, n, c_block, threadIdx.x, span);
      __syncthreads();
      if constexpr (!kLast)
        if (a.noise) read_pieces<T>(noise, noises, piece_pitch<T>(a.tile_w), col - first);
    }
    for (int g = 0, c = c_first; g < a.groups; g++, c += c_step, i += i_step) {
      if (kLast) {
        __syncthreads();
        share_params<T, kStride>(params, a, n, c_block + g * c_step, threadIdx.x);
        __syncthreads();
      }
      const Pack<T, V> x = next;
      if (g + 1 < a.groups) next = load_packed<T>(a.x + i + i_step, a.vec_x, count(c + c_step));
      if (count(c) <= 0) continue;
      const Params<T, kLast, kStride> k(params + (kLast ? at.half * V : c - c_block));
      A u[V];
      widen(x, a.format, u);
      each<kPwl, 2>([&](int e, A& v, A z) { v = value<kPwl>(v, k.d(e), z, k.s(e), k.b(e), p); }, u,
                    noise);
      store_some<T>(a.out + i, u, a.vec_out, count(c), a.format);
    }
  }
}

// Without a filter: dx = dv * d. NCHW: each warp has channels of its own.
template <typename T, bool kLast, bool kPwl>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_bwd_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>, kStep = kChannels<T, kLast>, kNoise = kLast ? 1 : V;
  // The rare activations leave registers for the sums of 4 channels; they read x and dy twice.
  constexpr int kPart = kLast && !kPwl && V > 4 ? 4 : V;
  constexpr int kStride = kLast ? kStep : kFlatChannels;
  __shared__ A scratch[kLast ? kThreads<T> / 32 * 3 * kStep : 1], params[3 * kStride];
  __shared__ __align__(16) A noises[kLast ? 1 : kSharedNoise + 32];
  const Place at = place<kLast>(a);
  const int tile = blockIdx.x * a.tile_w, first = tile + (kLast ? at.lx : at.lx * V);
  const int step = (kLast ? 1 : V) << a.lanes_log2;
  const int stop = min(a.out_w, tile + a.tile_w);
  for (int n = blockIdx.z; n < a.N; n += gridDim.z) {
    if (!kLast) {
      __syncthreads();
      if (a.noise) share_noise(noises, a, n, tile);
      const int span = a.groups * a.tile_h;
      share_params<T, kStride>(params, a, n, static_cast<int64_t>(blockIdx.y) * span, threadIdx.x,
                               span);
      __syncthreads();
    }
    for (int g = 0; g < a.groups; g++) {
      const int group = static_cast<int>(blockIdx.y) * a.groups + g;
      const int c0 = kLast ? group * kStep : group * a.tile_h + at.gy;
      if (c0 >= a.C) break;
      const int c = c0 + (kLast ? at.half * V : 0);
      if (kLast) share_params<T, kStride>(params, a, n, c0, threadIdx.x);
      if (kLast) __syncthreads();
      const Params<T, kLast, kStride> q(params + (kLast ? at.half * V : g * a.tile_h + at.gy));
#pragma unroll 1
      for (int part = 0; part < V; part += kPart) {
        const auto widen_piece = [&](const Pack<T, V>& pack, int at, auto& out) {
          Pack<T, kPiece<T>> piece;
#pragma unroll
          for (int k = 0; k < kPiece<T>; k++)
            piece.v[k] = part == 0 ? pack.v[at + k] : pack.v[(kPart + at + k) % V];
          widen(piece, a.format, out);
        };
        Sums<T, kLast, kLast ? kPart : 1> sums;
        int64_t i = offset<kLast>(a.C, n, c, 1, a.out_w, 0, first);
        const int64_t i_step = static_cast<int64_t>(step) * (kLast ? a.C : 1);
        for (int col = first; col < stop && c < a.C; col += step, i += i_step) {
          const int count = kLast ? a.C - c : a.out_w - col;
          A noise[kNoise] = {};
          if (kLast && a.noise) load_noise<T, kLast>(noise, a, n, 0, col, a.out_w - col);
          if constexpr (!kLast)
            if (a.noise) read_pieces<T>(noise, noises, piece_pitch<T>(a.tile_w), col - tile);
          const Pack<T, V> x = load_packed<T>(a.x + i, a.vec_x, count);
          const Pack<T, V> dy = load_packed<T>(a.dy + i, a.vec_x, count);
          Pack<T, kPart> dx;
          // Piece by piece: more would not fit into registers.
#pragma unroll
          for (int at = 0; at < kPart; at += kPiece<T>) {
            A u[kPiece<T>], v[kPiece<T>], dv[kPiece<T>];
            widen_piece(x, at, u);
            widen_piece(dy, at, dv);
#pragma unroll
            for (int k = 0; k < kPiece<T>; k++) {
              const int e = part + at + k;
              v[k] = u[k] * q.d(e) + (noise[kLast ? 0 : at + k] * q.s(e) + q.b(e));
            }
            grad<kPwl>(dv, v, p);
#pragma unroll
            for (int k = 0; k < kPiece<T>; k++) {
              const int e = at + k;
              sums.add(kLast ? e : 0, part + e < count ? dv[k] : A(0), u[k], noise[kLast ? 0 : e]);
              dv[k] *= q.d(part + e);
            }
            const auto piece = narrow<T, kPiece<T>>(dv, a.format);
#pragma unroll
            for (int k = 0; k < kPiece<T>; k++) dx.v[at + k] = piece.v[k];
          }
          store_packed<T, kPart>(a.out + i + part, dx, a.vec_out, count - part);
        }
        if constexpr (kLast)
          sums.reduce(scratch, part);
        else
          write_warp_partials<T>(sums, a, n, c);
      }
      if (kLast) write_partials<T, kLast>(scratch, a, n, c0, blockIdx.x);
    }
  }
  finish<T>(a, a.groups * (kLast ? kStep : a.tile_h));
}

}  // namespace
}  // namespace gankern
