// The backward kernel of synthesis_epilogue with a filter, channels-last.
#pragma once

#include "synthesis_epilogue_bwd.cuh"

namespace gankern {
namespace {

// A block walks down a strip of dx, with a sector of channels, `step` rows at a time. Row j of the
// strip's dv needs rows j to j + 3 of x, and row j - 3 of dx rows j - 3 to j of du = dv * d. Both
// lie in rings of step + 3 rows, so that the halo along y is that of the whole strip. A thread has
// 16 bytes of float32 of channels, at two columns, of kRows rows; one kernel for all activations,
// but more rows than one for the piecewise linear alone.
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_bwd_pixels_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int K = kPiece<T>, kStep = kChannels<T, true>, kLanes = kStep / K, N = 2 * K;
  GK_DYNAMIC_SHARED(A, shared);
  __shared__ Taps<A> taps, adjoint;
  __shared__ __align__(16) A params[3 * kStep];
  __shared__ A scratch[kThreads<T> / 32 * 3 * kStep];
  __shared__ Tile tile;
  A* const xs = shared;
  A* const dus = xs + a.ring * a.pitch;
  A* const stored = dus + a.ring * a.pitch;
  A* const noises = stored + 3 * K * blockDim.x;
  if (threadIdx.x == 0) tile.set(a);
  const int c0 = static_cast<int>(blockIdx.y) * kStep;
  Sums<T, true, K>().store(stored);
  for (int i = threadIdx.x; i < a.ring * a.pitch; i += blockDim.x) dus[i] = A(0);
  __syncthreads();
  share_params<T, kStep>(params, a, tile.n, c0, threadIdx.x);
  int start = 0;  // where row j0 lies in the rings
  const auto slot = [&](int i) {
    i += start;
    return (i < 0 ? i + a.ring : i < a.ring ? i : i - a.ring) * a.pitch;
  };
  // Of rows from `row` of the step on.
  const auto filtered = [&](auto& out, const Taps<A>& by, const A* ring, int row) {
    const Pair<T> at(a, kRows);
    int line = slot(row + at.row);
    filter_rows<K>(out, by, [&](int, A(&v)[N + kHalo* K]) {
      at.read(v, ring + line, a.pitch);
      line += a.pitch;
      if (line == a.ring * a.pitch) line = 0;
    });
  };
  // Rows `row` and on of x, to where row j0 is and on, and of the noise.
  const auto stage_x = [&](int row, int rows) {
    const TileAt t(tile);
    return stage_pixels(xs, a, t.n, c0, t.row0 - kHalo + row, t.col0 - kHalo, rows,
                        min(a.H, t.row0 + a.tile_h + kHalo), min(a.W, t.col0 + a.tile_w + kHalo),
                        slot);
  };
  const auto stage_z = [&](int j) {
    const TileAt t(tile);
    if (a.noise)
      stage_noise(noises, a, t.n, t.row0 + a.y0 - kHalo + j, t.col0 + a.x0 - kHalo, a.step,
                  2 * a.across);
  };
  stage_x(0, a.ring).load(a);
  if (threadIdx.x < 32) share_taps(&taps, &adjoint, a);
  stage_z(0);
  for (int j0 = 0;;) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < a.step / kRows * a.lap) {
      {
        A u[kRows][N];
        filtered(u, taps, xs, 0);
        // To where du will be, since registers are short.
        const Pair<T> at(a, kRows);
#pragma unroll
        for (int r = 0; r < kRows; r++)
#pragma unroll
          for (int k = 0; k < 2; k++) {
            Pack<A, K> piece;
#pragma unroll
            for (int e = 0; e < K; e++) piece.v[e] = u[r][k * K + e];
            store_pack<A, K>(dus + slot(at.row + r) + at.word(k, a.pitch), piece);
          }
      }
      {
        const TileAt t(tile);
        const Pair<T> at(a, kRows);
        const int height = min(a.tile_h, a.H - t.row0), j = j0 + at.row;
        const int own_rows = t.row0 + a.tile_h < a.H ? a.tile_h : height + kHalo;
        const int own_cols = t.col0 + a.tile_w < a.W ? a.tile_w : a.tile_w + kHalo;
        const int row0 = t.row0 + a.y0 - kHalo + j, col0 = t.col0 + a.x0 - kHalo + at.lx;
        const int count = a.C - c0 - at.ch;
        const T* dy = a.dy + offset<true>(a.C, t.n, c0 + at.ch, a.out_h, a.out_w, row0, col0);
        const int dy_lo = -row0, dy_hi = min(height + kHalo - j, a.out_h - row0);
        const bool y_inside[2] = {col0 >= 0 && col0 < min(a.out_w, t.col0 + a.x0 + a.tile_w),
                                  col0 >= -1 && col0 + 1 < min(a.out_w, t.col0 + a.x0 + a.tile_w)};
        int line = slot(at.row) + at.word(0, a.pitch), z_at = at.row * 2 * a.across + at.lx;
        Sums<T, true, K> sums;
        sums.load(stored);
#pragma unroll 1
        for (int r = 0; r < kRows; r++) {
          Pack<T, K> raw[2];
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const bool inside = r >= dy_lo && r < dy_hi && y_inside[k];
            raw[k] = load_packed<T, K>(dy + k * a.C, a.vec_x, inside ? count : 0);
          }
          dy += static_cast<int64_t>(a.out_w) * a.C;
#pragma unroll
          for (int k = 0; k < 2; k++) {
            A* to = dus + line + (k ? a.pitch >> 1 : 0);
            A v[K], dv[K];
            const A z = a.noise ? noises[z_at + k] : A(0);
            widen(raw[k], a.format, dv);
            const auto u = load_pack<A, K>(to);
            int ch = at.ch;
            forget(ch);  // else registers hold the parameters
            {
              const auto b = load_pack<A, K>(params + kStep + ch);
              const auto s = load_pack<A, K>(params + 2 * kStep + ch);
#pragma unroll
              for (int e = 0; e < K; e++) v[e] = z * s.v[e] + b.v[e];
            }
            const auto d = load_pack<A, K>(params + ch);
#pragma unroll
            for (int e = 0; e < K; e++) v[e] = u.v[e] * d.v[e] + v[e];
            if (kRows > 1 || (kFast<T> && p.act <= kLrelu))
              grad<true>(dv, v, p);
            else
              grad<false>(dv, v, p);
            if (j + r < own_rows && at.lx + k < own_cols)
#pragma unroll
              for (int e = 0; e < K; e++) sums.add(e, dv[e], u.v[e], z);
            Pack<A, K> du;
#pragma unroll
            for (int e = 0; e < K; e++) du.v[e] = dv[e] * d.v[e];
            store_pack<A, K>(to, du);
          }
          line += a.pitch, z_at += 2 * a.across;
          if (line >= a.ring * a.pitch) line -= a.ring * a.pitch;
        }
        sums.store(stored);
      }
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < a.step / kRows * a.lap) {
      A dx[kRows][N];
      filtered(dx, adjoint, dus, -kHalo);
      const TileAt t(tile);
      const Pair<T> at(a, kRows);
      const int h = j0 - kHalo + at.row, count = a.C - c0 - at.ch;
      const int bottom = min(a.tile_h, a.H - t.row0), right = min(a.tile_w, a.W - t.col0);
      T* out = a.out + offset<true>(a.C, t.n, c0 + at.ch, a.H, a.W, t.row0 + h, t.col0 + at.lx);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          A values[K];
#pragma unroll
          for (int e = 0; e < K; e++) values[e] = dx[r][k * K + e];
          if (h + r >= 0 && h + r < bottom && at.lx + k < right && count > 0)
            store_packed<T, K>(out + k * a.C, narrow<T, K>(values, a.format), a.vec_out, count);
        }
        out += static_cast<int64_t>(a.W) * a.C;
      }
    }
    if (j0 + a.step >= min(a.tile_h, a.H - TileAt(tile).row0) + kHalo) break;
    stage_x(j0 + a.ring, a.step).load(a);
    stage_z(j0 + a.step);
    j0 += a.step, start += a.step - (start + a.step < a.ring ? 0 : a.ring);
  }
  Sums<T, true, K> sums;
  sums.load(stored);
  sums.template reduce<kLanes>(scratch, 0, K);
  write_partials<T, true>(scratch, a, tile.n, c0, tile.index);
  finish<T>(a, kStep);
}

}  // namespace
}  // namespace gankern
