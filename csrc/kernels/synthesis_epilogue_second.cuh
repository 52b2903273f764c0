// The second derivative of synthesis_epilogue without a filter, of piecewise linear activations.
// With the slope m, u = x and t = m dy, of <vx, dx> + <vd, dd> + <vs, ds> + <vb, db>:
// d_dy = m (vx d + u vd + noise vs + vb), d_x = t vd, d_d = sum(t vx).
#pragma once

#include "synthesis_epilogue_flat.cuh"

namespace gankern {
namespace {

// Cotangents of dx [N, C, H, W], dd [N, C], ds [C] and db [C], any of them null.
template <typename T>
struct Cotangents {
  const T* vx;
  const Acc<T>*vd, *vs, *vb;
  T* d_x;  // null without vd

  // In the order of param(), of which they are the cotangents.
  __device__ __forceinline__ Acc<T> param(int which, int64_t n, int C, int c) const {
    if (which == 0) return vd ? vd[n * C + c] : Acc<T>(0);
    const Acc<T>* const v = which == 1 ? vb : vs;
    return v ? v[c] : Acc<T>(0);
  }
};

// Slopes m of the activation and the clamp at v.
template <typename A, int M>
__device__ __forceinline__ void slopes(A (&m)[M], A (&v)[M], const ActArgs<A>& p, const Pwl& pwl) {
#pragma unroll
  for (int e = 0; e < M; e++) {
    if constexpr (sizeof(A) == 4)
      m[e] = pwl.grad(1.f, v[e]);
    else
      m[e] = A(1);
  }
  if constexpr (sizeof(A) == 8) grad(m, v, p);
}

template <typename T, bool kLast, int N>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks<T>)
    synthesis_epilogue_bwd2_kernel(Args<T> a, ActArgs<Acc<T>> p, Cotangents<T> w) {
  using A = Acc<T>;
  constexpr int P = kLast || N == 1 ? 1 : 2, K = kLast ? N : 1, M = N < 4 ? N : 4;
  constexpr int kStride = kSpan<kLast, N>, kEach = kLast ? 1 : N;  // pixels of a unit
  __shared__ __align__(16) A params[6 * kStride], scratch[(kLast ? 8 : 1) * kStride];
  __shared__ __align__(16) A noises[kLast ? 1 : kFlatNoise<T> + 32];
  const int first = blockIdx.x * a.tile_w, pixels = min(a.out_w - first, a.tile_w);
  for (int n = blockIdx.z; n < a.N; n += gridDim.z)
    for (int group = blockIdx.y; group < a.groups; group += gridDim.y) {
      const Worker at = worker<kLast, N>(a);
      const int c0 = group * at.span, step = at.of * kEach, hop = kLast ? step * a.C : step;
      const int64_t tile = offset<kLast>(a.C, n, kLast ? c0 : c0 + at.slot, 1, a.out_w, 0, first);
      int px = at.index * kEach, i = kLast ? px * a.C + at.slot : px;
      if (kLast && c0 + at.slot >= a.C) px = pixels;
      Raw<T, N> x[P], dy[P], vx[P];
      A noise[P] = {};  // channels-last
      const auto load = [&] {
#pragma unroll
        for (int j = 0; j < P; j++) {
          x[j] = dy[j] = vx[j] = {};
          if (px + j * step >= pixels) continue;
          const int64_t from = tile + (i + j * hop);
          x[j] = load_raw<T, N>(a.x + from);
          dy[j] = load_raw<T, N>(a.dy + from);
          if (w.vx) vx[j] = load_raw<T, N>(w.vx + from);
        }
        const int64_t row = a.one_noise ? 0 : static_cast<int64_t>(n) * a.out_w;
        if (kLast && a.noise) load_noises(noise, a, row + first, px, step, pixels - 1);
      };
      const auto share = [&] {
        share_span<kStride>(params, at.span, [&](int k, int c) { return param(a, k, n, c0 + c); });
        share_span<kStride>(params + 3 * kStride, at.span,
                            [&](int k, int c) { return w.param(k, n, a.C, min(c0 + c, a.C - 1)); });
      };
      load();
      if constexpr (kLast) {
        share();
      } else {
        NoiseQuads<T> quads(a, n, first);
        share();
        quads.store(noises);
      }
      __syncthreads();
      const Pwl pwl(p);
      const Kept<K, kStride, A> q(params + at.slot), v_of(params + 3 * kStride + at.slot);
      A sums[1][K] = {};
      by_format<true>(a.format, [&](auto format) {
        while (px < pixels) {
#pragma unroll
          for (int j = 0; j < P; j++) {
            Pack<T, N> d_dy, d_x;
#pragma unroll
            for (int h = 0; h < N; h += M) {  // what fits into registers
              A u[M], v[M], m[M], t[M], uv[M], z[kLast ? 1 : M] = {};
              widen(piece_of<M, T, N>(x[j], h), format, u);
              widen(piece_of<M, T, N>(dy[j], h), format, t);
              widen(piece_of<M, T, N>(vx[j], h), format, uv);
              if constexpr (kLast)
                z[0] = noise[j];
              else if (a.noise && px + j * step < pixels)
                read_piece<T>(z, noises, piece_pitch<T>(a.tile_w), px + j * step + h);
#pragma unroll
              for (int e = 0; e < M; e++) {
                const int k = kLast ? e : 0;
                v[e] = u[e] * q.d[k] + (z[kLast ? 0 : e] * q.s[k] + q.b[k]);
              }
              slopes(m, v, p, pwl);
#pragma unroll
              for (int e = 0; e < M; e++) {
                const int k = kLast ? e : 0;
                t[e] *= m[e];
                sums[0][k] += t[e] * uv[e];
                A sum = uv[e] * q.d[k] + (z[kLast ? 0 : e] * v_of.s[k] + v_of.b[k]);
                if (w.vd) sum += u[e] * v_of.d[k];
                v[e] = m[e] == A(0) ? A(0) : m[e] * sum;  // where the clamp is, u may be infinite
                t[e] *= v_of.d[k];
              }
              const auto first_piece = narrow<T, M>(v, format), second = narrow<T, M>(t, format);
#pragma unroll
              for (int e = 0; e < M; e++)
                d_dy.v[h + e] = first_piece.v[e], d_x.v[h + e] = second.v[e];
            }
            if (px + j * step < pixels) {
              const int64_t to = tile + (i + j * hop);
              store_whole<T, N>(a.out + to, d_dy);
              if (w.d_x) store_whole<T, N>(w.d_x + to, d_x);
            }
          }
          px += P * step, i += P * hop;
          load();
        }
      });
      finish_flat<kLast, N>(a, sums, scratch, n, group);
    }
}

}  // namespace
}  // namespace gankern
