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
  const auto finish_stage = [&](int row, int rows, int j) {
    stage_x(row, rows).finish(a);
    const TileAt t(tile);
    if (a.noise)
      stage_noise(noises, a, t.n, t.row0 + a.y0 - kHalo + j, t.col0 + a.x0 - kHalo, a.step,
                  2 * a.across);
  };
  stage_x(0, a.ring).load(a);
  if (threadIdx.x < 32) share_taps(&taps, &adjoint, a);
  finish_stage(0, a.ring, 0);
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
        const int rows = min(kRows, height + kHalo - j);
        const int row0 = t.row0 + a.y0 - kHalo + j, col0 = t.col0 + a.x0 - kHalo + at.lx;
        const int count = a.C - c0 - at.ch;
        const T* dy = a.dy + offset<true>(a.C, t.n, c0 + at.ch, a.out_h, a.out_w, row0, col0);
        Sums<T, true, K> sums;
        sums.load(stored);
        // Element i: row i / 2, column i % 2. The next one is under way.
        const auto fetch = [&](int i) {
          const int row = row0 + (i >> 1), col = col0 + (i & 1);
          const bool inside = i < 2 * rows && row >= 0 && row < a.out_h && col >= 0 &&
                              col < a.out_w && at.lx + (i & 1) < a.tile_w + kHalo;
          return load_packed<T, K>(dy, a.vec_x, inside ? count : 0);
        };
        auto next = fetch(0);
#pragma unroll 1
        for (int i = 0; i < 2 * rows; i++) {
          const int r = i >> 1, k = i & 1;
          A* to = dus + slot(at.row + r) + at.word(k, a.pitch);
          const auto raw = next;
          A v[K], dv[K];
          const A z = a.noise ? noises[(at.row + r) * 2 * a.across + at.lx + k] : A(0);
          dy += k ? static_cast<int64_t>(a.out_w - 1) * a.C : a.C;
          next = fetch(i + 1);
          widen(raw, a.format, dv);
          const auto u = load_pack<A, K>(to);
          {
            const auto d = load_pack<A, K>(params + at.ch);
            const auto b = load_pack<A, K>(params + kStep + at.ch);
            const auto s = load_pack<A, K>(params + 2 * kStep + at.ch);
#pragma unroll
            for (int e = 0; e < K; e++) v[e] = u.v[e] * d.v[e] + (z * s.v[e] + b.v[e]);
          }
          if (kRows > 1 || (kFast<T> && p.act <= kLrelu))
            grad<true>(dv, v, p);
          else
            grad<false>(dv, v, p);
          if (j + r < own_rows && at.lx + k < own_cols)
#pragma unroll
            for (int e = 0; e < K; e++) sums.add(e, dv[e], u.v[e], z);
          const auto d = load_pack<A, K>(params + at.ch);
          Pack<A, K> du;
#pragma unroll
          for (int e = 0; e < K; e++) du.v[e] = dv[e] * d.v[e];
          store_pack<A, K>(to, du);
        }
        sums.store(stored);
      }
    }
    __syncthreads();
    // The next rows of x come while those of dx are made.
    const bool more = j0 + a.step < min(a.tile_h, a.H - TileAt(tile).row0) + kHalo;
    if (more) stage_x(j0 + a.ring, a.step).load(a);
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
    if (!more) break;
    finish_stage(j0 + a.ring, a.step, j0 + a.step);
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
