// synthesis_epilogue: y = clamp(act(filter(x) * d + noise * strength + b) * gain) and its gradient.
//
// A block computes a tile of pixels, for several channels one after another, so that the noise is
// read once for all of them. NCHW: a thread owns 16 bytes of neighbouring pixels; channels-last: 16
// bytes of channels of one pixel, and two threads a 32-byte sector. The filter has 4x4 taps (fewer
// are padded with zeros) and reads its input from shared memory in float32, where pixel j of a row
// lies in plane j % V (NCHW) so that neighbouring threads read neighbouring words whatever the
// alignment of the row; global memory is read in aligned 16-byte pieces.
#include "act.cuh"

namespace gankern {
namespace {

constexpr int kTaps = 4, kHalo = kTaps - 1;
constexpr int kMaxThreads = 512;

// float64 is for checks: fewer threads, with registers enough.
template <typename T>
constexpr int kThreads = sizeof(T) == 8 ? 256 : kMaxThreads;

template <typename T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

// Channels that a block has in work at once.
template <typename T, bool kLast>
constexpr int kChannels = kLast ? 2 * kVec<T> : 1;

template <typename T>
struct Args {
  const T *x, *dy;
  const float* f;
  const void *d, *noise, *strength, *b;
  T* out;  // y or dx
  Acc<T>*dd, *db, *ds, *partials;
  int* tickets;
  const T *x_end, *dy_end;
  int N, C, H, W, out_h, out_w;
  int taps_y, taps_x, x0, y0;
  int tiles, tiles_x, tile_h, tile_w, groups, lanes_log2;
  int pitch, magic, pitch2, magic2;       // of the tiles of x and of dy
  int across, across_magic, noise_magic;  // a thread's pieces in a row of the tile of dy
  int f32;
  Acc<T> filter_gain;
  bool separable, flip, one_noise, one_strength, vec_x, vec_out, vec_noise;
};

// Where a thread stands: column and row of its pixels in the tile, half of a channels-last sector.
struct Place {
  int lx, gy, half;
};
template <bool kLast>
__device__ __forceinline__ Place place(int lanes_log2) {
  const int t = static_cast<int>(threadIdx.x) >> (kLast ? 1 : 0);
  return {t & ((1 << lanes_log2) - 1), t >> lanes_log2, static_cast<int>(threadIdx.x) & 1};
}

// The taps in the order of a correlation, times the gain, padded with zeros to 4x4; then reversed,
// for the adjoint.
template <typename T>
__device__ __forceinline__ void load_taps(Acc<T>* taps, const Args<T>& a) {
  const int t = threadIdx.x, ky = t / kTaps, kx = t % kTaps;
  if (t >= kTaps * kTaps) return;
  Acc<T> tap = 0;
  if (ky < a.taps_y && kx < a.taps_x) {
    const int fy = a.flip ? ky : a.taps_y - 1 - ky, fx = a.flip ? kx : a.taps_x - 1 - kx;
    tap = a.separable ? Acc<T>(a.f[fy]) * a.f[fx] : Acc<T>(a.f[fy * a.taps_x + fx]);
  }
  taps[t] = taps[2 * kTaps * kTaps - 1 - t] = tap * a.filter_gain;
}

// Rows [row0, row0 + rows) and columns [col0, col0 + cols) of a plane into shared memory, zeros
// outside of it. magic = 2^20 / pieces of a row, rounded up: i * magic >> 20 = i / pieces.
template <typename A, typename Src, int V>
__device__ __forceinline__ void load_tile_planes(A* s, const Src* plane, const Src* end, int H,
                                                 int W, int row0, int col0, int rows, int cols,
                                                 int pieces, int magic, int pitch) {
  constexpr int L = 16 / static_cast<int>(sizeof(Src));
#pragma unroll 2
  for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
    const int row = static_cast<int>(static_cast<unsigned>(i) * static_cast<unsigned>(magic) >> 20);
    const int r = row0 + row;
    const Src* start = plane + (static_cast<int64_t>(r) * W + col0);
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(start) / sizeof(Src)) & (L - 1);
    const int j =
        (i - row * pieces) * L - shift;  // column in the tile of the piece's first element
    const bool inside = r >= 0 && r < H && col0 + j < W && col0 + j + L > 0;
    const bool whole = start + j + L <= end;
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (inside && whole) raw = *reinterpret_cast<const uint4*>(start + j);
    Pack<Src, L> v;
    *reinterpret_cast<uint4*>(&v) = raw;
#pragma unroll
    for (int e = 0; e < L; e++) {
      const int k = j + e;
      if (k < 0 || k >= cols) continue;
      A value = A(0);
      if (inside && col0 + k >= 0 && col0 + k < W)
        value = static_cast<A>(to_acc(whole ? v.v[e] : start[k]));
      s[row * pitch * V + (k & (V - 1)) * pitch + k / V] = value;
    }
  }
}

// The same of 2 * V channels of channels-last memory; pieces = cols.
template <typename T>
__device__ __forceinline__ void load_tile_last(Acc<T>* s, const T* sample, int C, int c, bool vec,
                                               int H, int W, int row0, int col0, int rows, int cols,
                                               int magic, int pitch) {
  constexpr int V = kVec<T>;
  const int half = threadIdx.x & 1;
  c += half * V;
#pragma unroll 2
  for (int i = threadIdx.x / 2; i < rows * cols; i += blockDim.x / 2) {
    const int row = static_cast<int>(static_cast<unsigned>(i) * static_cast<unsigned>(magic) >> 20);
    const int j = i - row * cols, r = row0 + row, col = col0 + j;
    Pack<T, V> v{};
    if (r >= 0 && r < H && col >= 0 && col < W && c < C) {
      const T* p = sample + (static_cast<int64_t>(r) * W + col) * C + c;
      if (vec)
        v = load_pack<T, V>(p);
      else
        for (int e = 0; e < V && c + e < C; e++) v.v[e] = p[e];
    }
#pragma unroll
    for (int e = 0; e < V; e++)
      s[row * pitch * 2 * V + (half * V + e) * pitch + j] = to_acc(v.v[e]);
  }
}

// out[row][e] = the filter in kRows rows from row 0 of s on, at V pixels of a thread's from its
// `first` on; channels-last: at V of a sector's channels, of one pixel.
template <typename T, bool kLast, int kRows, int V>
__device__ __forceinline__ void filter(Acc<T> (&out)[kRows][V], const Acc<T>* s, int pitch, int lx,
                                       int first, const Acc<T>* taps) {
  using A = Acc<T>;
  constexpr int kWide = kLast ? V : V + kHalo, kPlanes = kVec<T> * (kLast ? 2 : 1);
#pragma unroll
  for (int row = 0; row < kRows; row++)
#pragma unroll
    for (int e = 0; e < V; e++) out[row][e] = A(0);
#pragma unroll
  for (int q = 0; q < kRows + kHalo; q++) {
    const A* line = s + q * pitch * kPlanes;
    A v[kWide];
    if (!kLast) {
#pragma unroll
      for (int i = 0; i < kWide; i++)
        v[i] = line[(first + i) % kVec<T> * pitch + lx + (first + i) / kVec<T>];
    }
    Pack<A, kTaps> tap[kRows];
#pragma unroll
    for (int row = 0; row < kRows; row++)
      if (q >= row && q - row < kTaps)
        tap[row] = *reinterpret_cast<const Pack<A, kTaps>*>(taps + (q - row) * kTaps);
#pragma unroll
    for (int kx = 0; kx < kTaps; kx++) {
      if (kLast) {
#pragma unroll
        for (int e = 0; e < V; e++) v[e] = line[(first + e) * pitch + lx + kx];
      }
#pragma unroll
      for (int row = 0; row < kRows; row++) {
        if (q < row || q - row >= kTaps) continue;
#pragma unroll
        for (int e = 0; e < V; e++) out[row][e] += tap[row].v[kx] * v[kLast ? e : e + kx];
      }
    }
  }
}

// d, b and strength of a thread's channels. Those of a block's channels-last sectors lie in shared
// memory; channels beyond C get those of the last.
template <typename T>
__device__ __forceinline__ Acc<T> param(const Args<T>& a, int which, int n, int c) {
  c = min(c, a.C - 1);
  if (which == 0)
    return a.d ? load_param<T>(a.d, a.f32 & 1, static_cast<int64_t>(n) * a.C + c) : Acc<T>(1);
  if (which == 1) return a.b ? load_param<T>(a.b, a.f32 & 8, c) : Acc<T>(0);
  return !a.strength ? Acc<T>(1) : load_param<T>(a.strength, a.f32 & 4, a.one_strength ? 0 : c);
}

template <typename T>
__device__ __forceinline__ void share_params(Acc<T>* params, const Args<T>& a, int64_t n,
                                             int64_t c0) {
  constexpr int kStep = kChannels<T, true>;
  const int t = threadIdx.x, which = t / kStep;
  if (which < 3) params[t] = param(a, which, n, c0 + t % kStep);
}

template <typename T, bool kLast>
struct Params {
  const Acc<T>* shared;  // of this thread's half of a sector
  Acc<T> d0 = 0, b0 = 0, s0 = 0;
  __device__ __forceinline__ Params(const Acc<T>* params, const Args<T>& a, int n, int c, int half)
      : shared(params + half * kVec<T>) {
    if (!kLast) d0 = param(a, 0, n, c), b0 = param(a, 1, n, c), s0 = param(a, 2, n, c);
  }
  __device__ __forceinline__ Acc<T> d(int e) const { return kLast ? get(0, e) : d0; }
  __device__ __forceinline__ Acc<T> b(int e) const { return kLast ? get(1, e) : b0; }
  __device__ __forceinline__ Acc<T> s(int e) const { return kLast ? get(2, e) : s0; }
  // volatile: fetched when needed, since the registers do not hold all.
  __device__ __forceinline__ Acc<T> get(int k, int e) const {
    return const_cast<const volatile Acc<T>*>(shared)[k * kChannels<T, true> + e];
  }
};

// Offset of pixel (row, col) of a plane (NCHW), or of channel c of that pixel.
template <bool kLast>
__device__ __forceinline__ int64_t offset(int C, int n, int c, int h, int w, int row, int col) {
  const int64_t pixel = static_cast<int64_t>(row) * w + col;
  const int64_t area = static_cast<int64_t>(h) * w;
  return kLast ? (n * area + pixel) * C + c : (static_cast<int64_t>(n) * C + c) * area + pixel;
}

// A thread's V elements, of which `count` exist.
template <typename T>
__device__ __forceinline__ Pack<T, kVec<T>> load_packed(const T* p, bool vec, int count) {
  constexpr int V = kVec<T>;
  if (vec && count >= V) return load_pack<T, V>(p);
  Pack<T, V> v{};
#pragma unroll
  for (int e = 0; e < V; e++)
    if (e < count) v.v[e] = p[e];
  return v;
}

template <typename T>
__device__ __forceinline__ void store_packed(T* p, const Pack<T, kVec<T>>& v, bool vec, int count) {
  constexpr int V = kVec<T>;
  if (vec && count >= V) return store_pack<T, V>(p, v);
#pragma unroll
  for (int e = 0; e < V; e++)
    if (e < count) p[e] = v.v[e];
}

template <typename T>
__device__ __forceinline__ void load_some(Acc<T>* out, const T* p, bool vec, int count) {
  const Pack<T, kVec<T>> v = load_packed<T>(p, vec, count);
#pragma unroll
  for (int e = 0; e < kVec<T>; e++) out[e] = to_acc(v.v[e]);
}

template <typename T>
__device__ __forceinline__ void store_some(T* p, const Acc<T>* in, bool vec, int count) {
  Pack<T, kVec<T>> v;
#pragma unroll
  for (int e = 0; e < kVec<T>; e++) v.v[e] = from_acc<T>(in[e]);
  store_packed<T>(p, v, vec, count);
}

// The noise of a thread's pixels: V of a row (NCHW), or one.
template <typename T, bool kLast>
__device__ __forceinline__ void load_noise(Acc<T>* out, const Args<T>& a, int n, int row, int col,
                                           int count) {
  constexpr int V = kVec<T>;
  const int64_t i = offset<false>(1, a.one_noise ? 0 : n, 0, a.out_h, a.out_w, row, col);
  const bool is_f32 = a.f32 & 2;
  if (kLast) {
    out[0] = count > 0 ? load_param<T>(a.noise, is_f32, i) : Acc<T>(0);
  } else if (!is_f32) {
    load_some<T>(out, static_cast<const T*>(a.noise) + i, a.vec_noise, count);
  } else if (a.vec_noise && count >= V && V >= 4) {
#pragma unroll
    for (int e = 0; e < V; e += 4) {
      const Pack<float, 4> v = load_pack<float, 4>(static_cast<const float*>(a.noise) + i + e);
#pragma unroll
      for (int k = 0; k < 4; k++) out[min(e + k, V - 1)] = v.v[k];
    }
  } else {
#pragma unroll
    for (int e = 0; e < V; e++)
      out[e] = e < count ? Acc<T>(static_cast<const float*>(a.noise)[i + e]) : Acc<T>(0);
  }
}

template <bool kPwl, typename A>
__device__ __forceinline__ A value(A u, A d, A noise, A s, A b, const ActArgs<A>& p) {
  return clamped(act_value<kPwl>(u * d + (noise * s + b), p) * p.gain, p.clamp);
}

// Without a filter: a plane is one row; NCHW: rows of threads have channels of their own.
template <typename T, bool kLast, bool kPwl>
__global__ void __launch_bounds__(kThreads<T>, 2)
    synthesis_epilogue_fwd_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>, kStep = kChannels<T, kLast>, kNoise = kLast ? 1 : V;
  __shared__ A params[3 * kChannels<T, true>];
  const Place at = place<kLast>(a.lanes_log2);
  const int col = blockIdx.x * a.tile_w + (kLast ? at.lx : at.lx * V);
  for (int n = blockIdx.z; n < a.N; n += gridDim.z) {
    A noise[kNoise] = {};
    if (a.noise) load_noise<T, kLast>(noise, a, n, 0, col, a.out_w - col);
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
__global__ void __launch_bounds__(kThreads<T>, 2)
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

// The last block of a channel group adds the partial sums of all, in order.
template <typename T, bool kLast>
__device__ __forceinline__ void finish(const Args<T>& a) {
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
  const int span = a.groups * kChannels<T, kLast>, first = static_cast<int>(blockIdx.y) * span;
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

// Without a filter: dx = dv * d.
template <typename T, bool kLast, bool kPwl>
__global__ void __launch_bounds__(kThreads<T>, 2)
    synthesis_epilogue_bwd_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>, kStep = kChannels<T, kLast>, kNoise = kLast ? 1 : V;
  __shared__ A scratch[kThreads<T> / 32 * 3 * kStep], params[3 * kChannels<T, true>];
  const Place at = place<kLast>(a.lanes_log2);
  const int first = blockIdx.x * a.tile_w + (kLast ? at.lx : at.lx * V);
  const int step = (kLast ? 1 : V) << a.lanes_log2,
            stop = min(a.out_w, (static_cast<int>(blockIdx.x) + 1) * a.tile_w);
  for (int n = blockIdx.z; n < a.N; n += gridDim.z)
    for (int g = 0; g < a.groups; g++) {
      const int c0 = (static_cast<int>(blockIdx.y) * a.groups + g) * kStep;
      if (c0 >= a.C) break;
      const int c = c0 + (kLast ? at.half * V : 0);
      if (kLast) share_params(params, a, n, c0);
      if (kLast) __syncthreads();
      const Params<T, kLast> k(params, a, n, c, at.half);
      Sums<T, kLast, kLast ? V : 1> sums;
      int64_t i = offset<kLast>(a.C, n, c, 1, a.out_w, 0, first);
      const int64_t i_step = static_cast<int64_t>(step) * (kLast ? a.C : 1);
      for (int col = first; col < stop && c < a.C; col += step, i += i_step) {
        const int count = kLast ? a.C - c : a.out_w - col;
        A noise[kNoise] = {};
        if (a.noise) load_noise<T, kLast>(noise, a, n, 0, col, a.out_w - col);
        const Pack<T, V> x = load_packed<T>(a.x + i, a.vec_x, count);
        Pack<T, V> dy = load_packed<T>(a.dy + i, a.vec_x, count);
#pragma unroll
        for (int e = 0; e < V; e++) {
          const A u = to_acc(x.v[e]), z = noise[kLast ? 0 : e];
          const A dv = grad<kPwl>(to_acc(dy.v[e]), u * k.d(e) + (z * k.s(e) + k.b(e)), p);
          sums.add(kLast ? e : 0, e < count ? dv : A(0), u, z);
          dy.v[e] = from_acc<T>(dv * k.d(e));
        }
        store_packed<T>(a.out + i, dy, a.vec_out, count);
      }
      sums.reduce(scratch, 0);
      write_partials<T, kLast>(scratch, a, n, c0);
    }
  finish<T, kLast>(a);
}

// With a filter: the tile of dx needs dv in a halo of 3 and x in a halo of 6.
template <typename T, bool kLast, bool kPwl, int kRows>
__global__ void __launch_bounds__(kThreads<T>, 2)
    synthesis_epilogue_bwd_filter_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>, kStep = kChannels<T, kLast>, kPlanes = kLast ? 2 * V : V;
  constexpr int kPart = V > 4 ? 4 : V;  // at once: more would not fit into registers
  GK_DYNAMIC_SHARED(A, shared);
  __shared__ __align__(16) A taps[2 * kTaps * kTaps];
  __shared__ A scratch[kThreads<T> / 32 * 3 * kStep], params[3 * kChannels<T, true>];
  const int tile_y = blockIdx.x / a.tiles_x, tile_x = blockIdx.x - tile_y * a.tiles_x;
  const int tiles_y = a.tiles / a.tiles_x;
  const int row0 = tile_y * a.tile_h, col0 = tile_x * a.tile_w;
  const int orow0 = row0 + a.y0 - kHalo, ocol0 = col0 + a.x0 - kHalo;  // of the tile of dv
  const int x_rows = a.tile_h + 2 * kHalo, x_cols = a.across * (kLast ? 1 : V) + kHalo;
  const int o_rows = a.tile_h + kHalo, o_cols = a.tile_w + kHalo;
  A* xs = shared;
  A* dys = xs + x_rows * kPlanes * a.pitch;
  A* noises = dys + o_rows * kPlanes * a.pitch2;  // NCHW
  const Place at = place<kLast>(a.lanes_log2);
  const int pieces = (x_cols + 2 * V - 2) / V, pieces2 = (o_cols + 2 * V - 2) / V;
  // Rows and columns of dv whose sums are this block's.
  const int own_r0 = tile_y ? row0 : 0, own_c0 = tile_x ? col0 : 0;
  const int own_r1 = tile_y + 1 < tiles_y ? row0 + a.tile_h : a.out_h;
  const int own_c1 = tile_x + 1 < a.tiles_x ? col0 + a.tile_w : a.out_w;
  load_taps(taps, a);
  for (int n = blockIdx.z; n < a.N; n += gridDim.z) {
    if (!kLast && a.noise) {
      const int64_t plane = a.one_noise ? 0 : static_cast<int64_t>(n) * a.out_h * a.out_w;
      const int64_t all = (a.one_noise ? int64_t(1) : a.N) * a.out_h * a.out_w;
      if (a.f32 & 2) {
        const float* z = static_cast<const float*>(a.noise);
        load_tile_planes<A, float, V>(noises, z + plane, z + all, a.out_h, a.out_w, orow0, ocol0,
                                      o_rows, o_cols, (o_cols + 6) / 4, a.noise_magic, a.pitch2);
      } else {
        const T* z = static_cast<const T*>(a.noise);
        load_tile_planes<A, T, V>(noises, z + plane, z + all, a.out_h, a.out_w, orow0, ocol0,
                                  o_rows, o_cols, pieces2, a.magic2, a.pitch2);
      }
    }
    for (int g = 0; g < a.groups; g++) {
      const int c0 = (static_cast<int>(blockIdx.y) * a.groups + g) * kStep;
      if (c0 >= a.C) break;
      const int c = c0 + (kLast ? at.half * V : 0);
      if (kLast) {
        share_params(params, a, n, c0);
        load_tile_last<T>(xs, a.x + offset<true>(a.C, n, 0, a.H, a.W, 0, 0), a.C, c0, a.vec_x, a.H,
                          a.W, row0 - kHalo, col0 - kHalo, x_rows, x_cols, a.magic, a.pitch);
        load_tile_last<T>(dys, a.dy + offset<true>(a.C, n, 0, a.out_h, a.out_w, 0, 0), a.C, c0,
                          a.vec_x, a.out_h, a.out_w, orow0, ocol0, o_rows, o_cols, a.magic2,
                          a.pitch2);
      } else {
        load_tile_planes<A, T, V>(xs, a.x + offset<false>(a.C, n, c0, a.H, a.W, 0, 0), a.x_end, a.H,
                                  a.W, row0 - kHalo, col0 - kHalo, x_rows, x_cols, pieces, a.magic,
                                  a.pitch);
        load_tile_planes<A, T, V>(dys, a.dy + offset<false>(a.C, n, c0, a.out_h, a.out_w, 0, 0),
                                  a.dy_end, a.out_h, a.out_w, orow0, ocol0, o_rows, o_cols, pieces2,
                                  a.magic2, a.pitch2);
      }
      __syncthreads();
      const Params<T, kLast> k(params, a, n, c, at.half);
      // dv and then du, in place of dy; each part of a thread's elements in a pass of its own.
      Sums<T, kLast, kLast ? kPart : 1> sums;
#pragma unroll
      for (int part = 0; part < V; part += kPart) {
        for (int i = threadIdx.x >> (kLast ? 1 : 0); i < o_rows * a.across;
             i += blockDim.x >> (kLast ? 1 : 0)) {
          const int row = static_cast<int>(
              static_cast<unsigned>(i) * static_cast<unsigned>(a.across_magic) >> 20);
          const int lx = i - row * a.across, r = orow0 + row;
          const bool row_own = r >= own_r0 && r < own_r1;
          A pixel_noise = 0;
          if (kLast && a.noise && r >= 0 && r < a.out_h && ocol0 + lx >= 0 && ocol0 + lx < a.out_w)
            load_noise<T, true>(&pixel_noise, a, n, r, ocol0 + lx, 1);
          A u[1][kPart];
          const int plane = kLast ? at.half * V + part : part;
          filter<T, kLast>(u, xs + row * kPlanes * a.pitch, a.pitch, lx, plane, taps);
#pragma unroll
          for (int e = 0; e < kPart; e++) {
            const int j = kLast ? lx : lx * V + part + e, col = ocol0 + j;
            if (!kLast && j >= o_cols) continue;
            const int cell = (row * kPlanes + plane + e) * a.pitch2 + lx, q = part + e;
            const A z = kLast ? pixel_noise : a.noise ? noises[cell] : A(0);
            // Outside of the image dy is zero, and so is dv.
            const A dv = grad<kPwl>(dys[cell], u[0][e] * k.d(q) + (z * k.s(q) + k.b(q)), p);
            if (row_own && col >= own_c0 && col < own_c1) sums.add(kLast ? e : 0, dv, u[0][e], z);
            dys[cell] = dv * k.d(q);
          }
        }
        if (kLast || part + kPart == V) sums.reduce(scratch, kLast ? part : 0);
        if (kLast) sums = {};
      }
      write_partials<T, kLast>(scratch, a, n, c0);  // its barriers also make du visible
      const int row = at.gy * kRows, col = col0 + (kLast ? at.lx : at.lx * V);
      const int count = col >= a.W ? 0 : kLast ? min(a.C - c, V) : a.W - col;
      if (row < a.tile_h && count > 0) {
        A dx[kRows][V];
        filter<T, kLast>(dx, dys + row * kPlanes * a.pitch2, a.pitch2, at.lx,
                         kLast ? at.half * V : 0, taps + kTaps * kTaps);
#pragma unroll
        for (int r = 0; r < kRows; r++)
          if (row0 + row + r < a.H)
            store_some<T>(a.out + offset<kLast>(a.C, n, c, a.H, a.W, row0 + row + r, col), dx[r],
                          a.vec_out, count);
      }
      __syncthreads();
    }
  }
  finish<T, kLast>(a);
}

// --- Launching.

// A tile of lanes x rows of threads; each thread has kRows rows.
struct Plan {
  int lanes, rows, per_thread, tile_w, tile_h, tiles_x, tiles_y, threads, groups;
  int64_t tiles() const { return static_cast<int64_t>(tiles_x) * tiles_y; }
};

constexpr int vec_of(int dtype) { return dtype == kF64 ? 2 : dtype == kF32 ? 4 : 8; }

Plan tiled(int V, bool last, int width, int height, int max_lanes, int per_thread, int threads) {
  Plan t{};
  const int across = last ? 1 : V;
  t.per_thread = per_thread;
  t.lanes = pow2_between(ceil_div(width, across), 1, max_lanes);
  const int row_threads = t.lanes * (last ? 2 : 1);
  const int least = max(1, 32 / row_threads);  // whole warps
  t.rows = pow2_between(ceil_div(height, per_thread), least, max(least, threads / row_threads));
  t.tile_w = t.lanes * across;
  t.tile_h = t.rows * per_thread;
  t.threads = row_threads * t.rows;
  t.tiles_x = static_cast<int>(ceil_div(width, t.tile_w));
  t.tiles_y = static_cast<int>(ceil_div(height, t.tile_h));
  return t;
}

// The largest tile (least halo) of which there are enough to fill the machine; then several
// channels a block, which read the noise once.
Plan plan_filter(int V, bool last, bool backward, bool noise, int64_t planes, int channels,
                 int width, int height) {
  const int sms = sm_count(), lanes = last ? 32 : backward ? 128 / V : 256 / V;
  const int most = backward ? (V == 4 ? 2 : 1) : 16 / V > 4 ? 1 : 16 / V;
  Plan t{};
  const auto enough = [&](const Plan& plan) { return plan.tiles() * planes >= 3 * sms / 4; };
  for (const int per_thread : {most, 1})
    for (int threads = V == 2 ? 256 : kMaxThreads; threads >= 64; threads /= 2) {
      if (t.threads && enough(t)) break;
      t = tiled(V, last, width, height, lanes, per_thread, threads);
    }
  t.groups = 1;
  while (noise && t.groups < 8 && t.groups < channels && t.tiles() * planes / (2 * t.groups) >= sms)
    t.groups *= 2;
  return t;
}

// Without a filter a plane is one row.
Plan plan_flat(int V, bool last, bool backward, bool noise, int64_t planes, int channels,
               int area) {
  const int sms = sm_count(), across = last ? 1 : V;
  Plan t{};
  t.per_thread = 1;
  t.lanes = pow2_between(ceil_div(area, across), last ? 16 : backward ? 32 : 1, last ? 64 : 128);
  t.rows = backward || last ? 1 : 128 / t.lanes;
  t.threads = t.lanes * t.rows * (last ? 2 : 1);
  t.tile_h = t.rows;
  t.tile_w = t.lanes * across;
  // The backward adds up a block's sums at the end: long runs, while there are blocks enough.
  while (backward && t.tile_w < area && t.tile_w < 16 * t.lanes * across &&
         ceil_div(area, 2 * t.tile_w) * planes >= 4 * sms)
    t.tile_w *= 2;
  t.tiles_x = static_cast<int>(ceil_div(area, t.tile_w));
  t.tiles_y = 1;
  t.groups = 1;
  while (noise && t.groups < 8 && t.groups * t.rows < channels &&
         t.tiles() * planes / (t.rows * 2 * t.groups) >= 2 * sms)
    t.groups *= 2;
  return t;
}

Plan make_plan(int dtype, bool last, bool backward, bool filtered, bool noise, int64_t N, int64_t C,
               int64_t H, int64_t W) {
  const int V = vec_of(dtype), channels = static_cast<int>(ceil_div(C, last ? 2 * V : 1));
  if (!filtered)
    return plan_flat(V, last, backward, noise, N * channels, channels, static_cast<int>(H * W));
  return plan_filter(V, last, backward, noise, N * channels, channels, static_cast<int>(W),
                     static_cast<int>(H));
}

// Words of a row's plane in shared memory: at least n, so that the rows of a warp, or the halves of
// its sectors, fall into different banks.
int pitch_of(int n, int V, bool last, int lanes, int per_thread) {
  if (!last && lanes >= 32) return n;
  for (int p = n; p < n + 32; p++)
    if ((last ? V * p : per_thread * V * p) % 32 == 16) return p;
  return n;
}

int magic_of(int n) { return ((1 << 20) + n - 1) / n; }

template <typename T>
struct Launcher {
  Args<T> a;
  ActArgs<Acc<T>> p;
  Plan plan;
  bool last, filtered;
  void* stream;

  dim3 grid() const {
    const int step = (last ? 2 * kVec<T> : 1) * (filtered ? 1 : plan.rows) * plan.groups;
    return dim3(static_cast<unsigned>(plan.tiles()), static_cast<unsigned>(ceil_div(a.C, step)),
                static_cast<unsigned>(min(a.N, 65535)));
  }

  template <typename Kernel>
  int launch(Kernel kernel, int shared) {
    if (shared > 48 * 1024) {
      const cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
      if (e != cudaSuccess) return static_cast<int>(e);
    }
    GK_LAUNCH((kernel), grid(), dim3(plan.threads), shared, stream, a, p);
    return static_cast<int>(cudaGetLastError());
  }

  template <bool kLast, bool kPwl>
  int forward() {
    constexpr int V = kVec<T>, kMost = 16 / V > 4 ? 1 : 16 / V;
    if (!filtered) return launch(synthesis_epilogue_fwd_kernel<T, kLast, kPwl>, 0);
    const int words = (plan.tile_h + kHalo) * a.pitch * V * (kLast ? 2 : 1) +
                      (a.noise ? plan.per_thread * (kLast ? 1 : V) * plan.threads : 0);
    const int bytes = words * static_cast<int>(sizeof(Acc<T>));
    if (plan.per_thread == 1)
      return launch(synthesis_epilogue_fwd_filter_kernel<T, kLast, kPwl, 1>, bytes);
    return launch(synthesis_epilogue_fwd_filter_kernel<T, kLast, kPwl, kMost>, bytes);
  }

  template <bool kLast, bool kPwl>
  int backward() {
    constexpr int V = kVec<T>, kMost = V == 4 ? 2 : 1;
    if (!filtered) return launch(synthesis_epilogue_bwd_kernel<T, kLast, kPwl>, 0);
    const int planes = V * (kLast ? 2 : 1);
    const int words = (plan.tile_h + 2 * kHalo) * planes * a.pitch +
                      (plan.tile_h + kHalo) * planes * a.pitch2 * (!kLast && a.noise ? 2 : 1);
    const int bytes = words * static_cast<int>(sizeof(Acc<T>));
    if (plan.per_thread == 1)
      return launch(synthesis_epilogue_bwd_filter_kernel<T, kLast, kPwl, 1>, bytes);
    return launch(synthesis_epilogue_bwd_filter_kernel<T, kLast, kPwl, kMost>, bytes);
  }

  template <bool kBackward, bool kLast>
  int by_act() {
    // float64 is for checks: one instance.
    constexpr bool kFast = sizeof(T) < 8;
    if (kFast && p.act <= kLrelu) {
      if constexpr (kBackward)
        return backward<kLast, kFast>();
      else
        return forward<kLast, kFast>();
    }
    if constexpr (kBackward)
      return backward<kLast, false>();
    else
      return forward<kLast, false>();
  }

  template <bool kBackward>
  int run() {
    return last ? by_act<kBackward, true>() : by_act<kBackward, false>();
  }
};

template <typename T>
Launcher<T> launcher(int dtype, int f32, const void* x, const void* f, const void* d,
                     const void* noise, const void* strength, const void* b, void* out, int64_t N,
                     int64_t C, int64_t H, int64_t W, int64_t out_h, int64_t out_w, int64_t taps_y,
                     int64_t taps_x, bool separable, int64_t noise_n, int64_t strength_n,
                     int64_t x0, int64_t y0, bool flip, double filter_gain, bool last, int act,
                     double alpha, double gain, double clamp, bool backward, void* stream) {
  using A = Acc<T>;
  constexpr int V = kVec<T>;
  Launcher<T> l{};
  l.last = last, l.filtered = f != nullptr, l.stream = stream;
  const double slope = act == kLinear ? 1.0 : act == kRelu ? 0.0 : alpha;
  l.p = ActArgs<A>{act, A(slope), A(gain), A(0), A(clamp), true};
  const Plan t = l.plan = make_plan(dtype, last, backward, l.filtered, noise != nullptr, N, C,
                                    backward ? H : out_h, backward ? W : out_w);
  Args<T>& a = l.a;
  a.x = static_cast<const T*>(x), a.x_end = a.x + N * C * H * W, a.out = static_cast<T*>(out);
  a.f = static_cast<const float*>(f);
  a.d = d, a.noise = noise, a.strength = strength, a.b = b;
  a.N = static_cast<int>(N), a.C = static_cast<int>(C);
  a.H = static_cast<int>(H), a.W = static_cast<int>(W);
  a.out_h = static_cast<int>(out_h), a.out_w = static_cast<int>(out_w);
  if (!l.filtered) a.W *= a.H, a.out_w *= a.out_h, a.H = a.out_h = 1;
  a.taps_y = static_cast<int>(taps_y), a.taps_x = static_cast<int>(taps_x);
  a.x0 = static_cast<int>(x0), a.y0 = static_cast<int>(y0);
  a.tiles = static_cast<int>(t.tiles()), a.tiles_x = t.tiles_x;
  a.tile_h = t.tile_h, a.tile_w = t.tile_w, a.groups = t.groups;
  while ((1 << a.lanes_log2) < t.lanes) a.lanes_log2++;
  const int cols2 = t.tile_w + kHalo;
  a.across = last ? cols2 : static_cast<int>(ceil_div(cols2, V));
  a.across_magic = magic_of(a.across);
  const int cols = backward ? a.across * (last ? 1 : V) + kHalo : cols2;
  const auto pieces = [&](int n, int vec) { return last ? n : (n + 2 * vec - 2) / vec; };
  a.magic = magic_of(pieces(cols, V)), a.magic2 = magic_of(pieces(cols2, V));
  a.noise_magic = magic_of(pieces(cols2, 4));
  // A column group more than the columns fill: the last thread of a row reads a whole one.
  const auto words = [&](int n) { return last ? n : static_cast<int>(ceil_div(n, V)) + 1; };
  a.pitch = pitch_of(words(cols), V, last, t.lanes, t.per_thread);
  a.pitch2 = pitch_of(words(cols2), V, last, t.lanes, t.per_thread);
  a.f32 = f32;
  a.filter_gain = static_cast<A>(filter_gain);
  a.separable = separable, a.flip = flip;
  a.one_noise = noise_n == 1, a.one_strength = strength_n == 1;
  const int64_t in_row = last         ? C
                         : l.filtered ? 0
                                      : a.W,
                out_row = last       ? C
                          : backward ? a.W
                                     : a.out_w;
  a.vec_x = aligned16(x) && in_row % V == 0;
  a.vec_out = aligned16(out) && out_row % V == 0;
  a.vec_noise = noise && aligned16(noise) && a.out_w % V == 0;
  return l;
}

}  // namespace

namespace GANKERN_BACKEND {

// With f: at most 4 taps a side, and a padding between 0 and taps - 1.
int synthesis_epilogue(int dtype, int f32, const void* x, const void* f, const void* d,
                       const void* noise, const void* strength, const void* b, void* y, int64_t N,
                       int64_t C, int64_t H, int64_t W, int64_t out_h, int64_t out_w,
                       int64_t taps_y, int64_t taps_x, bool separable, int64_t noise_n,
                       int64_t strength_n, int64_t x0, int64_t y0, bool flip, double filter_gain,
                       bool channels_last, int act, double alpha, double gain, double clamp,
                       void* stream) {
  if (N * C * out_h * out_w == 0) return 0;
  if (max(max(H * W, out_h * out_w), max(N, C)) > (int64_t(1) << 30)) return cudaErrorInvalidValue;
  return by_dtype(dtype, [&](auto zero) {
    return launcher<decltype(zero)>(dtype, f32, x, f, d, noise, strength, b, y, N, C, H, W, out_h,
                                    out_w, taps_y, taps_x, separable, noise_n, strength_n, x0, y0,
                                    flip, filter_gain, channels_last, act, alpha, gain, clamp,
                                    false, stream)
        .template run<false>();
  });
}

// Bytes of scratch for synthesis_epilogue_bwd.
int64_t synthesis_epilogue_bwd_workspace(int dtype, int64_t N, int64_t C, int64_t H, int64_t W,
                                         bool filtered, bool noise, bool channels_last) {
  if (N * C * H * W == 0) return 0;
  const Plan t = make_plan(dtype, channels_last, true, filtered, noise, N, C, H, W);
  return 3 * N * C * t.tiles() * (dtype == kF64 ? 8 : 4) + C * 4;
}

// dd [N, C], db [C] and ds [C] are float32, or float64 for float64.
int synthesis_epilogue_bwd(int dtype, int f32, const void* dy, const void* x, const void* f,
                           const void* d, const void* noise, const void* strength, const void* b,
                           void* dx, void* dd, void* db, void* ds, void* workspace, int64_t N,
                           int64_t C, int64_t H, int64_t W, int64_t out_h, int64_t out_w,
                           int64_t taps_y, int64_t taps_x, bool separable, int64_t noise_n,
                           int64_t strength_n, int64_t x0, int64_t y0, bool flip,
                           double filter_gain, bool channels_last, int act, double alpha,
                           double gain, double clamp, void* stream) {
  if (N * C * out_h * out_w == 0) return 0;
  if (max(max(H * W, out_h * out_w), max(N, C)) > (int64_t(1) << 30)) return cudaErrorInvalidValue;
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto l = launcher<T>(dtype, f32, x, f, d, noise, strength, b, dx, N, C, H, W, out_h, out_w,
                         taps_y, taps_x, separable, noise_n, strength_n, x0, y0, flip, filter_gain,
                         channels_last, act, alpha, gain, clamp, true, stream);
    Args<T>& a = l.a;
    a.dy = static_cast<const T*>(dy), a.dy_end = a.dy + N * C * out_h * out_w;
    a.vec_x = a.vec_x && aligned16(dy);
    a.dd = static_cast<Acc<T>*>(dd), a.db = static_cast<Acc<T>*>(db);
    a.ds = static_cast<Acc<T>*>(ds);
    a.partials = static_cast<Acc<T>*>(workspace);
    a.tickets = reinterpret_cast<int*>(a.partials + 3 * N * C * l.plan.tiles());
    const cudaError_t e =
        cudaMemsetAsync(a.tickets, 0, l.grid().y * sizeof(int), static_cast<cudaStream_t>(stream));
    if (e != cudaSuccess) return static_cast<int>(e);
    return l.template run<true>();
  });
}

GK_EXPORT(synthesis_epilogue);
GK_EXPORT(synthesis_epilogue_bwd_workspace);
GK_EXPORT(synthesis_epilogue_bwd);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
