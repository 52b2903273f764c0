// The backward kernels of synthesis_epilogue, without and with a filter, and their sums.
#pragma once

#include "synthesis_epilogue.cuh"

namespace gankern {
namespace {

// Sums of dv * u, dv and dv * noise for K of a thread's channels.
template <typename T, bool kLast, int K>
struct Sums {
  Acc<T> of[3][K] = {};

  __device__ __forceinline__ void add(int q, Acc<T> dv, Acc<T> u, Acc<T> noise) {
    of[0][q] += dv * u;
    of[1][q] += dv;
    of[2][q] += dv * noise;
  }

  // Adds up the threads of a warp, into scratch; `part`: the first of the channels.
  __device__ __forceinline__ void reduce(Acc<T>* scratch, int part) const {
    constexpr int kStep = kChannels<T, kLast>, kLanes = kLast ? 2 : 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 3; k++)
#pragma unroll
      for (int e = 0; e < K; e++) {
        Acc<T> v = of[k][e];
#pragma unroll
        for (int step = 16; step >= kLanes; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
        if (lane < kLanes) scratch[(warp * 3 + k) * kStep + lane * kVec<T> + part + e] = v;
      }
  }
};

// The partial sums of a channel of which a warp has all the block's pixels.
template <typename T, typename S>
__device__ __forceinline__ void write_warp_partials(const S& sums, const Args<T>& a, int n, int c) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 3; k++) {
    const Acc<T> sum = warp_sum(sums.of[k][0]);
    if (lane == k)
      a.partials[((static_cast<int64_t>(k) * a.N + n) * a.C + c) * a.tiles + blockIdx.x] = sum;
  }
}

// Adds up the warps: the block's partial sums of channels c0 and on.
template <typename T, bool kLast>
__device__ __forceinline__ void write_partials(const Acc<T>* scratch, const Args<T>& a, int n,
                                               int c0) {
  constexpr int kStep = kChannels<T, kLast>;
  __syncthreads();
  const int t = threadIdx.x, warps = (blockDim.x + 31) / 32;
  if (t < 3 * kStep && c0 + t % kStep < a.C) {
    Acc<T> sum = 0;
    for (int w = 0; w < warps; w++) sum += scratch[w * 3 * kStep + t];
    const int64_t channel = (static_cast<int64_t>(t / kStep) * a.N + n) * a.C + c0 + t % kStep;
    a.partials[channel * a.tiles + blockIdx.x] = sum;
  }
  __syncthreads();
}

// The last block of a group of `span` channels adds the partial sums of all, in order.
template <typename T>
__device__ __forceinline__ void finish(const Args<T>& a, int span) {
  using A = Acc<T>;
  __shared__ int last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    last = atomicAdd(a.tickets + blockIdx.y, 1) == static_cast<int>(gridDim.x * gridDim.z) - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  // A warp adds the tiles of one sum of one plane; then a thread the samples of a channel.
  const int first = static_cast<int>(blockIdx.y) * span;
  const unsigned channels = min(span, a.C - first), items = channels * a.N;
  const int64_t planes = static_cast<int64_t>(a.N) * a.C;
  for (unsigned i = threadIdx.x / 32; i < 3 * items; i += blockDim.x / 32) {
    const unsigned k = i / items, n = (i - k * items) / channels;
    const int64_t plane = static_cast<int64_t>(n) * a.C + first + (i - k * items - n * channels);
    A* part = a.partials + (k * planes + plane) * a.tiles;
    A sum = 0;
#pragma unroll 2
    for (int t = threadIdx.x % 32; t < a.tiles; t += 32) sum += part[t];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) *(k ? part : a.dd + plane) = sum;
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < 2 * channels; i += blockDim.x) {
    const int k = i < channels ? 1 : 2,
              c = first + static_cast<int>(i < channels ? i : i - channels);
    A sum = 0;
#pragma unroll 4
    for (int n = 0; n < a.N; n++)
      sum += a.partials[(k * planes + static_cast<int64_t>(n) * a.C + c) * a.tiles];
    (k == 1 ? a.db : a.ds)[c] = sum;
  }
}

// dL/dv from dy, with v = u * d + noise * s + b.
template <bool kPwl, typename A>
__device__ __forceinline__ A grad(A dy, A v, const ActArgs<A>& p) {
  const A act = act_value<kPwl>(v, p), y = act * p.gain;
  const A dv = dy * p.gain * act_slope<kPwl>(act, v, p);
  return p.clamp >= A(0) && !(y > -p.clamp && y < p.clamp) ? A(0) : dv;
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
      share_params<T, kStride>(params, a, n, static_cast<int64_t>(blockIdx.y) * span, span);
      __syncthreads();
    }
    for (int g = 0; g < a.groups; g++) {
      const int group = static_cast<int>(blockIdx.y) * a.groups + g;
      const int c0 = kLast ? group * kStep : group * a.tile_h + at.gy;
      if (c0 >= a.C) break;
      const int c = c0 + (kLast ? at.half * V : 0);
      if (kLast) share_params<T, kStride>(params, a, n, c0);
      if (kLast) __syncthreads();
      const Params<T, kLast, kStride> q(params + (kLast ? at.half * V : g * a.tile_h + at.gy));
#pragma unroll
      for (int part = 0; part < V; part += kPart) {
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
#pragma unroll
          for (int k = 0; k < kPart; k++) {
            const int e = part + k;
            const A u = to_acc(x.v[e]), z = noise[kLast ? 0 : e];
            const A dv = grad<kPwl>(to_acc(dy.v[e]), u * q.d(e) + (z * q.s(e) + q.b(e)), p);
            sums.add(kLast ? k : 0, e < count ? dv : A(0), u, z);
            dx.v[k] = from_acc<T>(dv * q.d(e));
          }
          store_packed<T, kPart>(a.out + i + part, dx, a.vec_out, count - part);
        }
        if constexpr (kLast)
          sums.reduce(scratch, part);
        else
          write_warp_partials<T>(sums, a, n, c);
      }
      if (kLast) write_partials<T, kLast>(scratch, a, n, c0);
    }
  }
  finish<T>(a, a.groups * (kLast ? kStep : a.tile_h));
}

// With a filter: the tile of dx needs dv in a halo of 3 and x in a halo of 6.
template <typename T, bool kLast, bool kPwl, int kRows>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_bwd_filter_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>, kStep = kChannels<T, kLast>, kLine = kLast ? 2 * V : 1;
  constexpr int kPart = V > 4 ? 4 : V;  // at once: more would not fit into registers
  GK_DYNAMIC_SHARED(A, shared);
  __shared__ __align__(16) A taps[2 * kTaps * kTaps];
  __shared__ A scratch[kThreads<T> / 32 * 3 * kStep], params[3 * kStep];
  const int tile_y = blockIdx.x / a.tiles_x, tile_x = blockIdx.x - tile_y * a.tiles_x;
  const int tiles_y = a.tiles / a.tiles_x;
  const int row0 = tile_y * a.tile_h, col0 = tile_x * a.tile_w;
  const int orow0 = row0 + a.y0 - kHalo, ocol0 = col0 + a.x0 - kHalo;  // of the tile of dv
  const int x_rows = a.tile_h + 2 * kHalo, x_cols = a.across * (kLast ? 1 : V) + kHalo;
  const int o_rows = a.tile_h + kHalo, o_cols = a.tile_w + kHalo;
  A* xs = shared;
  A* dys = xs + (kLast ? x_rows * kLine * a.pitch : V * a.plane);
  A* noises = dys + V * a.plane2;  // NCHW
  const Place at = place<kLast>(a);
  // Rows and columns of dv whose sums are this block's. Where registers are short (sm_86, sm_89 and
  // sm_120 would spill one) they come from shared memory each time.
  constexpr bool kKept = !kLast && kPwl && sizeof(T) == 4;
  __shared__ volatile int kept[4];
  const auto bound = [&](int i) {
    return i == 0   ? (tile_y ? row0 : 0)
           : i == 1 ? (tile_y + 1 < tiles_y ? row0 + a.tile_h : a.out_h)
           : i == 2 ? (tile_x ? col0 : 0)
                    : (tile_x + 1 < a.tiles_x ? col0 + a.tile_w : a.out_w);
  };
  if (kKept && threadIdx.x == 0)
    for (int i = 0; i < 4; i++) kept[i] = bound(i);
  const int own_r0 = kKept ? 0 : bound(0), own_c0 = kKept ? 0 : bound(2);
  const int own_r1 = kKept ? 0 : bound(1), own_c1 = kKept ? 0 : bound(3);
  load_taps(taps, a);
  for (int n = blockIdx.z; n < a.N; n += gridDim.z) {
    if (!kLast && a.noise) {
      const int64_t plane = a.one_noise ? 0 : static_cast<int64_t>(n) * a.out_h * a.out_w;
      const int64_t all = (a.one_noise ? int64_t(1) : a.N) * a.out_h * a.out_w;
      if (a.f32 & 2) {
        const float* z = static_cast<const float*>(a.noise);
        load_tile_planes<A, float, V>(noises, z + plane, z, z + all, a.out_h, a.out_w, orow0, ocol0,
                                      o_rows, o_cols, a.noise_pieces, a.noise_magic, a.pitch2,
                                      a.plane2);
      } else {
        const T* z = static_cast<const T*>(a.noise);
        load_tile_planes<A, T, V>(noises, z + plane, z, z + all, a.out_h, a.out_w, orow0, ocol0,
                                  o_rows, o_cols, a.pitch2, a.magic2, a.pitch2, a.plane2);
      }
    }
    for (int g = 0; g < a.groups; g++) {
      const int c0 = (static_cast<int>(blockIdx.y) * a.groups + g) * kStep;
      if (c0 >= a.C) break;
      const int c = c0 + (kLast ? at.half * V : 0);
      share_params<T, kStep>(params, a, n, c0);
      if (kLast) {
        load_tile_last<T>(xs, a.x + offset<true>(a.C, n, 0, a.H, a.W, 0, 0), a.C, c0, a.vec_x, a.H,
                          a.W, row0 - kHalo, col0 - kHalo, x_rows, x_cols, a.magic, a.pitch);
        load_tile_last<T>(dys, a.dy + offset<true>(a.C, n, 0, a.out_h, a.out_w, 0, 0), a.C, c0,
                          a.vec_x, a.out_h, a.out_w, orow0, ocol0, o_rows, o_cols, a.magic2,
                          a.pitch2);
      } else {
        load_tile_planes<A, T, V>(xs, a.x + offset<false>(a.C, n, c0, a.H, a.W, 0, 0), a.x, a.x_end,
                                  a.H, a.W, row0 - kHalo, col0 - kHalo, x_rows,
                                  a.tile_w + 2 * kHalo, a.pitch, a.magic, a.pitch, a.plane);
        load_tile_planes<A, T, V>(dys, a.dy + offset<false>(a.C, n, c0, a.out_h, a.out_w, 0, 0),
                                  a.dy, a.dy_end, a.out_h, a.out_w, orow0, ocol0, o_rows, o_cols,
                                  a.pitch2, a.magic2, a.pitch2, a.plane2);
      }
      __syncthreads();
      const Params<T, kLast, kStep> k(params + at.half * V);
      // dv and then du, in place of dy; each part of a thread's elements in a pass of its own.
      Sums<T, kLast, kLast ? kPart : 1> sums;
#pragma unroll
      for (int part = 0; part < V; part += kPart) {
        for (int i = threadIdx.x >> (kLast ? 1 : 0); i < o_rows * a.lap;
             i += blockDim.x >> (kLast ? 1 : 0)) {
          const int row =
              static_cast<int>(static_cast<unsigned>(i) * static_cast<unsigned>(a.lap_magic) >> 20);
          const int lx = i - row * a.lap, r = orow0 + row;
          if (!kLast && lx >= a.across) continue;
          const bool row_own = r >= (kKept ? kept[0] : own_r0) && r < (kKept ? kept[1] : own_r1);
          A pixel_noise = 0;
          if (kLast && a.noise && r >= 0 && r < a.out_h && ocol0 + lx >= 0 && ocol0 + lx < a.out_w)
            load_noise<T, true>(&pixel_noise, a, n, r, ocol0 + lx, 1);
          A u[1][kPart];
          const int plane = kLast ? at.half * V + part : part;
          filter<T, kLast>(u, xs + row * kLine * a.pitch, a.pitch, a.plane, lx, plane, taps);
#pragma unroll
          for (int e = 0; e < kPart; e++) {
            const int j = kLast ? lx : lx * V + part + e, col = ocol0 + j;
            if (!kLast && j >= o_cols) continue;
            const int q = part + e;
            const int cell = kLast ? (row * kLine + plane + e) * a.pitch2 + lx
                                   : (plane + e) * a.plane2 + row * a.pitch2 + lx;
            const A z = kLast ? pixel_noise : a.noise ? noises[cell] : A(0);
            // Outside of the image dy is zero, and so is dv.
            const A dv = grad<kPwl>(dys[cell], u[0][e] * k.d(q) + (z * k.s(q) + k.b(q)), p);
            if (row_own && col >= (kKept ? kept[2] : own_c0) && col < (kKept ? kept[3] : own_c1))
              sums.add(kLast ? e : 0, dv, u[0][e], z);
            dys[cell] = dv * k.d(q);
          }
        }
        if (kLast || part + kPart == V) sums.reduce(scratch, kLast ? part : 0);
        if (kLast) sums = {};
      }
      write_partials<T, kLast>(scratch, a, n, c0);  // its barriers also make du visible
      const int row = at.gy * kRows, col = col0 + (kLast ? at.lx : at.lx * V);
      const int count = col >= a.W ? 0 : kLast ? min(a.C - c, V) : a.W - col;
      // Where rows of dx do not begin at 16 bytes they take the way through x's place.
      const bool through_shared = !kLast && !a.vec_out;
      const int pitch = piece_pitch<T>(a.tile_w);
      const int line = (V / kPiece<T> - 1) * pitch + a.tile_w / V * kPiece<T>;
      if (row < a.tile_h && count > 0) {
        A dx[kRows][V];
        filter<T, kLast>(dx, dys + row * kLine * a.pitch2, a.pitch2, a.plane2, at.lx,
                         kLast ? at.half * V : 0, taps + kTaps * kTaps);
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          if (row0 + row + r >= a.H) break;
          if (through_shared)
            write_pieces<T>(xs + (row + r) * line, dx[r], pitch, at.lx * V);
          else
            store_some<T>(a.out + offset<kLast>(a.C, n, c, a.H, a.W, row0 + row + r, col), dx[r],
                          a.vec_out, count);
        }
      }
      if (through_shared) {
        __syncthreads();
        store_lines<T>(a.out + offset<kLast>(a.C, n, c, a.H, a.W, row0, col0), a.W, xs, line, pitch,
                       min(a.tile_h, a.H - row0), min(a.tile_w, a.W - col0));
      }
      __syncthreads();
    }
  }
  finish<T>(a, a.groups * kStep);
}

}  // namespace
}  // namespace gankern
