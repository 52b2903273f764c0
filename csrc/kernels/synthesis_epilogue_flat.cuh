// The kernels of synthesis_epilogue without a filter: a plane is one row.
//
// The forward in channels-last and the backward: a block has some channels, and several threads for
// each that go through its pixels with long strides, `workers`. A worker has N pixels of a plane
// (NCHW) or N channels of a pixel (channels-last) at once, a unit, and P units under way.
#pragma once

#include "synthesis_epilogue_bwd.cuh"

namespace gankern {
namespace {

constexpr int kFlatThreads = 256;
// The forward in NCHW.
template <typename T>
constexpr int kThreads = sizeof(T) == 8 ? 256 : 512;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif
template <typename T>
constexpr int kFlatBlocks = sizeof(T) == 8 ? 2 : 4;

// Elements of a unit. Channels-last, the backward has sums and parameters of its channels in
// registers: 4 channels, since those of 8 do not fit.
template <typename T, bool kLast, bool kBackward>
constexpr int kUnit = sizeof(T) == 8       ? 1
                      : kLast && kBackward ? kPiece<T>
                                           : kVec<T>;

// Pixels whose noise, and channels that a block has, at most.
template <typename T>
constexpr int kFlatNoise = sizeof(T) == 8 ? 2048 : 4096;
template <bool kLast, int N>
constexpr int kSpan = kLast ? 32 * N : kFlatChannels;

struct Worker {
  int slot;       // its first channel, of the block's
  int index, of;  // its number, of the workers of a channel
  int span;       // channels of the block
};
template <bool kLast, int N, typename T>
__device__ __forceinline__ Worker worker(const Args<T>& a) {
  const int t = thread_again(), lanes = 1 << a.lanes_log2, across = t & (lanes - 1);
  const int down = t >> a.lanes_log2, rows = static_cast<int>(blockDim.x) >> a.lanes_log2;
  if (kLast) return {across * N, down, rows, lanes * N};
  return {down, across, lanes, rows};
}

// Three parameters f(which, channel) of the block's channels, in rows of kStride; and of K channels
// of a thread.
template <int kStride, typename A, typename F>
__device__ __forceinline__ void share_span(A* params, int span, F f) {
  const int t = threadIdx.x, units = 3 * ((span + 31) / 32);
  // A warp has one of the three.
  for (int unit = t / 32; unit < units; unit += blockDim.x / 32) {
    const int which = unit % 3, c = unit / 3 * 32 + t % 32;
    if (c < span) params[which * kStride + c] = f(which, c);
  }
}
template <int kStride, typename T>
__device__ __forceinline__ void share_span(Acc<T>* params, const Args<T>& a, int n, int c0,
                                           int span) {
  share_span<kStride>(params, span, [&](int which, int c) { return param(a, which, n, c0 + c); });
}
template <int K, int kStride, typename A>
struct Kept {
  A d[K], b[K], s[K];
  __device__ __forceinline__ explicit Kept(const A* params) {
    constexpr int kRead = K < 4 ? K : 4;
    const auto read = [&](A(&to)[K], const A* from) {
#pragma unroll
      for (int k = 0; k < K; k += kRead) {
        const auto pack = load_pack<A, kRead>(from + k);
#pragma unroll
        for (int e = 0; e < kRead; e++) to[k + e] = pack.v[e];
      }
    };
    read(d, params), read(b, params + kStride), read(s, params + 2 * kStride);
  }
};

// The noise of P pixels from px on, `step` apart, of those from i on of which `last` is the last.
template <int P, typename T>
__device__ __forceinline__ void load_noises(Acc<T> (&out)[P], const Args<T>& a, int64_t i, int px,
                                            int step, int last) {
  if (a.f32 & 2) {
    const float* const noise = static_cast<const float*>(a.noise) + i;
#pragma unroll
    for (int j = 0; j < P; j++) out[j] = noise[min(px + j * step, last)];
  } else {
    const T* const noise = static_cast<const T*>(a.noise) + i;
#pragma unroll
    for (int j = 0; j < P; j++) out[j] = to_acc(noise[min(px + j * step, last)], a.format);
  }
}

// share_noise() in two halves, of which the first, at the construction, only asks for 4 pixels at
// once twice: they are under way together with other loads.
template <typename T>
struct NoiseQuads {
  static constexpr int kQuad = kVec<T> < 4 ? 1 : 4;
  using Quad = Pack<Acc<T>, kQuad>;
  const Args<T>& a;
  int n, first, pixels;
  Quad quads[2];

  __device__ __forceinline__ NoiseQuads(const Args<T>& a, int n, int first)
      : a(a), n(n), first(first), pixels(a.vec_noise ? a.tile_w : 0) {
    if (kQuad > 1) load(0);
  }
  __device__ __forceinline__ int pixel(int from, int k) const {
    return (from + k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kQuad;
  }
  __device__ __forceinline__ void load(int from) {
    const int64_t i = (a.one_noise ? 0 : static_cast<int64_t>(n) * a.out_w) + first;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int px = pixel(from, k);
      quads[k] = {};  // beyond the last pixel
      if (px >= min(pixels, a.out_w - first)) continue;
      if (a.f32 & 2) {
        const auto pack = load_pack<float, kQuad>(static_cast<const float*>(a.noise) + i + px);
#pragma unroll
        for (int e = 0; e < kQuad; e++) quads[k].v[e] = pack.v[e];
      } else {
        widen(load_pack<T, kQuad>(static_cast<const T*>(a.noise) + i + px), a.format, quads[k].v);
      }
    }
  }
  __device__ __forceinline__ void store(Acc<T>* shared) {
    if (!a.noise) return;
    if (kQuad == 1 || !a.vec_noise) return share_noise(shared, a, n, first);
    const int pitch = piece_pitch<T>(a.tile_w);
    for (int from = 0;;) {
#pragma unroll
      for (int k = 0; k < 2; k++)
        if (pixel(from, k) < pixels)
          store_pack<Acc<T>, kQuad>(shared + piece_at<T>(pixel(from, k), pitch), quads[k]);
      from += 2 * blockDim.x;
      if (from * kQuad >= pixels) return;
      load(from);
    }
  }
};

// M values of a row that lies like that of read_pieces(), from pixel `at` on.
template <typename T, typename A, int M>
__device__ __forceinline__ void read_piece(A (&out)[M], const A* row, int pitch, int at) {
  const auto v = load_pack<A, M>(row + piece_at<T>(at, pitch));
#pragma unroll
  for (int e = 0; e < M; e++) out[e] = v.v[e];
}

// M elements of a pack.
template <int M, typename T, int N>
__device__ __forceinline__ Pack<T, M> piece_of(const Raw<T, N>& raw, int at) {
  const auto& pack = reinterpret_cast<const Pack<T, N>&>(raw);
  Pack<T, M> out;
#pragma unroll
  for (int e = 0; e < M; e++) out.v[e] = pack.v[at + e];
  return out;
}

// f(format), with code of its own for float16 and for bfloat16 where it is short.
template <bool kShort, typename T, typename F>
__device__ __forceinline__ void by_format(Format<T> format, F f) {
  if constexpr (kShort)
    with_format(format, f);
  else
    f(format);
}

// Without a filter, NCHW: rows of threads have channels of their own. x is under way while noise
// and parameters are shared.
template <typename T, bool kPwl>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_flat_planes_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>;
  __shared__ A params[3 * kFlatChannels];
  __shared__ __align__(16) A noises[32 * V + 32];
  const Place at = place(a);
  const int first = blockIdx.x * a.tile_w, col = first + at.lx * V;
  const int span = a.groups * a.tile_h, c_block = static_cast<int>(blockIdx.y) * span;
  for (int n = blockIdx.z; n < a.N; n += gridDim.z) {
    int64_t i = offset<false>(a.C, n, c_block + at.gy, 1, a.out_w, 0, col);
    const int64_t i_step = static_cast<int64_t>(a.tile_h) * a.out_w;
    const auto count = [&](int c) { return col < a.out_w && c < a.C ? a.out_w - col : 0; };
    Pack<T, V> next = load_packed<T>(a.x + i, a.vec_x, count(c_block + at.gy));
    A noise[V] = {};
    __syncthreads();
    if (a.noise) share_noise(noises, a, n, first);
    share_params<T, kFlatChannels>(params, a, n, c_block, threadIdx.x, span);
    __syncthreads();
    if (a.noise) read_pieces<T>(noise, noises, piece_pitch<T>(a.tile_w), col - first);
    for (int g = 0, c = c_block + at.gy; g < a.groups; g++, c += a.tile_h, i += i_step) {
      const Pack<T, V> x = next;
      if (g + 1 < a.groups) next = load_packed<T>(a.x + i + i_step, a.vec_x, count(c + a.tile_h));
      if (count(c) <= 0) continue;
      const A* of = params + (c - c_block);
      const A d = of[0], b = of[kFlatChannels], s = of[2 * kFlatChannels];
      A u[V];
      widen(x, a.format, u);
      each<kPwl, 2>([&](int, A& v, A z) { v = value<kPwl>(v, d, z, s, b, p); }, u, noise);
      store_some<T>(a.out + i, u, a.vec_out, count(c), a.format);
    }
  }
}

// Without a filter, channels-last.
template <typename T, bool kPwl, int N>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks<T>)
    synthesis_epilogue_flat_pixels_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int P = kPwl ? 2 : 1, kStride = kSpan<true, N>;
  __shared__ __align__(16) A params[3 * kStride];
  const Worker at = worker<true, N>(a);
  const int first = blockIdx.x * a.tile_w, pixels = min(a.out_w - first, a.tile_w);
  const int hop = at.of * a.C;
  for (int n = blockIdx.z; n < a.N; n += gridDim.z)
    for (int c0 = blockIdx.y * at.span; c0 < a.C; c0 += gridDim.y * at.span) {
      const int stop = c0 + at.slot < a.C ? pixels : 0;
      const int64_t tile = offset<true>(a.C, n, c0, 1, a.out_w, 0, first);
      int px = at.index, i = px * a.C + at.slot;
      Raw<T, N> x[P];
      A noise[P] = {};
      const auto load = [&] {
#pragma unroll
        for (int j = 0; j < P; j++)
          if (px + j * at.of < stop) x[j] = load_raw<T, N>(a.x + tile + (i + j * hop));
        const int64_t row = a.one_noise ? 0 : static_cast<int64_t>(n) * a.out_w;
        if (a.noise) load_noises(noise, a, row + first, px, at.of, pixels - 1);
      };
      load();
      __syncthreads();
      share_span<kStride>(params, a, n, c0, at.span);
      __syncthreads();
      Kept<N, kStride, A> k(params + at.slot);
      const Pwl pwl(p);
      by_format<kPwl>(a.format, [&](auto format) {
        while (px < stop) {
#pragma unroll
          for (int j = 0; j < P; j++) {
            A u[N];
            widen(piece_of<N, T, N>(x[j], 0), format, u);
            if constexpr (kPwl) {
#pragma unroll
              for (int e = 0; e < N; e++)
                u[e] = pwl.value(u[e] * k.d[e] + (noise[j] * k.s[e] + k.b[e]));
            } else {
              each<false, 1>(
                  [&](int, A& v, A d, A s, A b) { v = value<false>(v, d, noise[j], s, b, p); }, u,
                  k.d, k.s, k.b);
            }
            if (px + j * at.of < stop)
              store_pack<T, N>(a.out + tile + (i + j * hop), narrow<T, N>(u, format));
          }
          px += P * at.of, i += P * hop;
          load();
        }
      });
    }
}

// Adds up the workers of each channel: f(which sum, channel of the block, sum).
template <bool kLast, int kSums, int K, typename A, typename F>
__device__ __forceinline__ void add_workers(A (&sums)[kSums][K], A* scratch, const Worker& at,
                                            int lanes, F f) {
  const int t = thread_again(), lane = t % 32, row = min(lanes, 32);
#pragma unroll 1
  for (int step = kLast ? 16 : row / 2; step >= (kLast ? lanes : 1); step /= 2)
#pragma unroll
    for (int k = 0; k < kSums; k++)
#pragma unroll
      for (int q = 0; q < K; q++) sums[k][q] += __shfl_xor_sync(0xffffffffu, sums[k][q], step);
  const int span = at.span, part = kLast ? t / 32 : at.index / 32;
  const int parts = kLast ? static_cast<int>(blockDim.x) / 32 : max(lanes / 32, 1);
  if (kLast ? lane < lanes : (lane & (row - 1)) == 0)
#pragma unroll
    for (int k = 0; k < kSums; k++) {
      Pack<A, K> pack;
#pragma unroll
      for (int q = 0; q < K; q++) pack.v[q] = sums[k][q];
      store_pack<A, K>(scratch + (part * kSums + k) * span + at.slot, pack);
    }
  __syncthreads();
  for (int e = t; e < kSums * span; e += blockDim.x) {
    A sum = A(0);
#pragma unroll 4
    for (int w = 0; w < parts; w++) sum += scratch[w * kSums * span + e];
    const int k = (e >= span) + (e >= 2 * span);
    f(k, e - k * span, sum);
  }
}

// Partial sums are rows of kSums * C. Level 0 adds up the workers, 1 the tiles of a sample, into
// the row of the first, 2 the samples, of all sums but the first.
template <bool kLast, int N, typename T, int kSums, int K>
__device__ __forceinline__ void finish_flat(const Args<T>& a, Acc<T> (&sums)[kSums][K],
                                            Acc<T>* scratch, int n, int group) {
  using A = Acc<T>;
  const Worker at = worker<kLast, N>(a);
  const int c0 = group * at.span;
  const int64_t row = kSums * static_cast<int64_t>(a.C), sample = n * a.tiles * row;
#pragma unroll 1
  for (int level = a.tiles > 1 ? 0 : 1;; level++) {
    const bool whole = level == 2 || (level == 1 && (kSums == 1 || a.N == 1));
    add_workers<kLast>(sums, scratch, at, 1 << a.lanes_log2, [&](int k, int channel, A sum) {
      const int c = c0 + channel;
      if (c >= a.C || (level == 2 && k == 0)) return;
      A* to = a.partials + sample + (level ? 0 : blockIdx.x * row) + k * static_cast<int64_t>(a.C);
      if (level && k == 0) to = a.dd + static_cast<int64_t>(n) * a.C;
      if (whole && k) to = k == 1 ? a.db : a.ds;
      if (kSums == 1 || to) to[c] = sum;
    });
    if (whole) return;
    const int of = level ? a.N : a.tiles;
    int* const ticket = a.tickets + static_cast<int64_t>(level ? a.N : n) * a.groups + group;
    if (!arrives_last(ticket, of)) return;
    const A* part = a.partials + (level ? 0 : sample) + min(c0 + at.slot, a.C - K);
    const int64_t next = level ? a.tiles * row : row;
#pragma unroll
    for (int k = 0; k < kSums; k++)
#pragma unroll
      for (int e = 0; e < K; e++) sums[k][e] = A(0);
#pragma unroll 2
    for (int r = at.index; r < of; r += at.of)
#pragma unroll
      for (int k = 0; k < kSums; k++) {
        if (k == 0 && level) continue;  // dd is finished
        const auto pack = load_pack<A, K>(part + r * next + k * static_cast<int64_t>(a.C));
#pragma unroll
        for (int e = 0; e < K; e++) sums[k][e] += pack.v[e];
      }
  }
}

// Without a filter: dx = dv * d, and the sums of dv * u, dv and dv * noise.
template <typename T, bool kLast, bool kPwl, int N>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks<T>)
    synthesis_epilogue_bwd_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int P = !kPwl ? 1 : N * sizeof(T) == 16 ? 2 : 4, K = kLast ? N : 1;
  constexpr int M = N < 4 ? N : 4, kStride = kSpan<kLast, N>,
                kEach = kLast ? 1 : N;  // pixels of a unit
  __shared__ __align__(16) A params[3 * kStride], scratch[(kLast ? 24 : 3) * kStride];
  __shared__ __align__(16) A noises[kLast ? 1 : kFlatNoise<T> + 32];
  const int first = blockIdx.x * a.tile_w, pixels = min(a.out_w - first, a.tile_w);
  for (int n = blockIdx.z; n < a.N; n += gridDim.z)
    for (int group = blockIdx.y; group < a.groups; group += gridDim.y) {
      const Worker at = worker<kLast, N>(a);
      const int c0 = group * at.span, step = at.of * kEach, hop = kLast ? step * a.C : step;
      const int64_t tile = offset<kLast>(a.C, n, kLast ? c0 : c0 + at.slot, 1, a.out_w, 0, first);
      int px = at.index * kEach, i = kLast ? px * a.C + at.slot : px;
      if (kLast && c0 + at.slot >= a.C) px = pixels;
      Raw<T, N> x[P], dy[P];
      A noise[P] = {};  // channels-last
      const auto fetch = [&](int j) {
        x[j] = load_raw<T, N>(a.x + tile + (i + j * hop));
        dy[j] = load_raw<T, N>(a.dy + tile + (i + j * hop));
      };
      const auto load = [&] {
        if (px + (P - 1) * step < pixels) {
#pragma unroll
          for (int j = 0; j < P; j++) fetch(j);
        } else {
#pragma unroll
          for (int j = 0; j < P; j++) {
            x[j] = dy[j] = {};
            if (px + j * step < pixels) fetch(j);
          }
        }
        const int64_t row = a.one_noise ? 0 : static_cast<int64_t>(n) * a.out_w;
        if (kLast && a.noise) load_noises(noise, a, row + first, px, step, pixels - 1);
      };
      load();
      if constexpr (kLast) {
        share_span<kStride>(params, a, n, c0, at.span);
      } else {
        NoiseQuads<T> quads(a, n, first);
        share_span<kStride>(params, a, n, c0, at.span);
        quads.store(noises);
      }
      __syncthreads();
      const Kept<K, kStride, A> q(params + at.slot);
      const Pwl pwl(p);
      A sums[3][K] = {};
      by_format<kPwl>(a.format, [&](auto format) {
        while (px < pixels) {
#pragma unroll
          for (int j = 0; j < P; j++) {
            Pack<T, N> dx;
#pragma unroll
            for (int h = 0; h < N; h += M) {  // what fits into registers
              A u[M], v[M], dv[M], z[kLast ? 1 : M] = {};
              widen(piece_of<M, T, N>(x[j], h), format, u);
              widen(piece_of<M, T, N>(dy[j], h), format, dv);
              if constexpr (kLast)
                z[0] = noise[j];
              else if (a.noise && px + j * step < pixels)
                read_piece<T>(z, noises, piece_pitch<T>(a.tile_w), px + j * step + h);
#pragma unroll
              for (int e = 0; e < M; e++) {
                const int k = kLast ? e : 0;
                v[e] = u[e] * q.d[k] + (z[kLast ? 0 : e] * q.s[k] + q.b[k]);
              }
              if constexpr (kPwl)
#pragma unroll
                for (int e = 0; e < M; e++) dv[e] = pwl.grad(dv[e], v[e]);
              else
                grad(dv, v, p);
#pragma unroll
              for (int e = 0; e < M; e++) {
                const int k = kLast ? e : 0;
                sums[0][k] += dv[e] * u[e];
                sums[1][k] += dv[e];
                sums[2][k] += dv[e] * z[kLast ? 0 : e];
                dv[e] *= q.d[k];
              }
              const auto piece = narrow<T, M>(dv, format);
#pragma unroll
              for (int e = 0; e < M; e++) dx.v[h + e] = piece.v[e];
            }
            if (px + j * step < pixels) store_whole<T, N>(a.out + tile + (i + j * hop), dx);
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
