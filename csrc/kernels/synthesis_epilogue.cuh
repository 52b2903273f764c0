// What forward and backward of synthesis_epilogue share: arguments, tiles, the filter, operands.
#pragma once

#include "act.cuh"

namespace gankern {
namespace {

constexpr int kTaps = 4, kHalo = kTaps - 1;
constexpr int kMaxThreads = 512;
// Channels whose parameters a block of the flat kernels shares, at most.
constexpr int kFlatChannels = 64;

// float64 is for checks: fewer threads, with registers enough.
template <typename T>
constexpr int kThreads = sizeof(T) == 8 ? 256 : kMaxThreads;

// Blocks of as many threads on a multiprocessor: Turing's holds 1024 threads, others twice that.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif

template <typename T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

// Values of 16 bytes of shared memory.
template <typename T>
constexpr int kPiece = kVec<T> < 4 ? kVec<T> : 4;
template <typename T>
using Piece = Pack<Acc<T>, kPiece<T>>;

// Piecewise linear activations have code of their own; float64 is for checks.
template <typename T>
constexpr bool kFast = sizeof(T) < 8;

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
  int pitch, magic, pitch2;    // a row of x, and of dy, in shared memory: words, or granules (last)
  int plane, plane2;           // words from one plane of these rows to the next
  int across, lap, lap_magic;  // backward: pieces, or pixels, of a row of dv, and threads for them
  int step, ring;              // rows that a block makes at once, and rows of shared memory
  int rows;                    // of dx that a thread makes
  int noise_pieces, noise_plane;
  int row_bits, warp_bits;  // see place()
  int f32;
  Acc<T> filter_gain;
  bool separable, flip, one_noise, one_strength, vec_x, vec_out, vec_noise;
  Format<T> format{kF32};
};

// Where a thread stands: column and row of its pixels in the tile, half of a channels-last sector.
// NCHW: of 2^row_bits rows, a warp has 2^warp_bits that lie far apart, so that they meet different
// banks.
struct Place {
  int lx, gy, half;
};
template <bool kLast, typename T>
__device__ __forceinline__ Place place(const Args<T>& a) {
  const int t = static_cast<int>(threadIdx.x) >> (kLast ? 1 : 0);
  const int lx = t & ((1 << a.lanes_log2) - 1), gy = t >> a.lanes_log2;
  if (kLast) return {lx, gy, static_cast<int>(threadIdx.x) & 1};
  if (a.row_bits == 0) return {lx, gy, 0};
  const int all = (1 << a.row_bits) - 1, some = (1 << a.warp_bits) - 1;
  const int apart = (gy & some) << (a.row_bits - a.warp_bits);
  return {lx, (gy & ~all) | apart | (gy & all) >> a.warp_bits, 0};
}

// threadIdx.x, read again where it is asked for.
__device__ __forceinline__ unsigned thread_again() {
#ifdef GANKERN_SIMT
  return threadIdx.x;
#else
  unsigned t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return t;
#endif
}

// The taps in the order of a correlation, times the gain, padded with zeros to 4x4; then reversed,
// for the adjoint.
template <typename T>
__device__ __forceinline__ void load_taps(Acc<T>* taps, const Args<T>& a, int t) {
  const int ky = t / kTaps, kx = t % kTaps;
  if (t < 0 || t >= kTaps * kTaps) return;
  Acc<T> tap = 0;
  if (ky < a.taps_y && kx < a.taps_x) {
    const int fy = a.flip ? ky : a.taps_y - 1 - ky, fx = a.flip ? kx : a.taps_x - 1 - kx;
    tap = a.separable ? Acc<T>(a.f[fy]) * a.f[fx] : Acc<T>(a.f[fy * a.taps_x + fx]);
  }
  taps[t] = taps[2 * kTaps * kTaps - 1 - t] = tap * a.filter_gain;
}

// 16 bytes of a row of a plane; j: the column, of those that a block wants, of their first element.
template <typename Src>
struct RowPiece {
  Pack<Src, 16 / sizeof(Src)> v;
  int j;
};

// Piece `piece` of row r from column col0 on, of which columns [lo, hi) are wanted: zeros outside
// of the image. Pieces cover a row whatever its alignment: they begin at sectors, and a sector is
// read as a whole or not at all. [begin, end): the tensor.
template <typename Src>
__device__ __forceinline__ RowPiece<Src> fetch_piece(const Src* plane, const Src* begin,
                                                     const Src* end, int H, int W, int r, int col0,
                                                     int lo, int hi, int piece) {
  constexpr int L = 16 / static_cast<int>(sizeof(Src));
  const Src* start = plane + (static_cast<int64_t>(r) * W + col0);
  const int shift =
      static_cast<int>(reinterpret_cast<uintptr_t>(start) / sizeof(Src)) & (2 * L - 1);
  const int j = piece * L - shift, sector = j - (piece & 1) * L;
  RowPiece<Src> out;
  uint4 raw = make_uint4(0, 0, 0, 0);
  const bool inside = r >= 0 && r < H && sector < hi && sector + 2 * L > lo;
  const bool whole = start + j >= begin && start + j + L <= end;
  if (inside && whole) raw = *reinterpret_cast<const uint4*>(start + j);
  *reinterpret_cast<uint4*>(&out.v) = raw;
  if (inside && !whole)
    unrolled<L>([&](auto which) {
      constexpr int e = decltype(which)::value;
      if (j + e >= lo && j + e < hi) out.v.v[e] = start[j + e];
    });
  out.j = j;
  return out;
}

// The piece, in float32, in a row of shared memory: element k of the row lies in plane k % V.
template <typename A, int V, typename Src>
__device__ __forceinline__ void put_piece(A* row, const RowPiece<Src>& piece, int lo, int hi,
                                          int pitch, int plane_words, Format<Src> format) {
  constexpr int L = 16 / static_cast<int>(sizeof(Src));
  Acc<Src> values[L];
  widen(piece.v, format, values);
  unrolled<L>([&](auto which) {
    constexpr int e = decltype(which)::value;
    const int k = piece.j + e;
    if (k < 0 || (L > V && k >= pitch * V)) return;
    const A value = k >= lo && k < hi ? static_cast<A>(values[e]) : A(0);
    row[(k & (V - 1)) * plane_words + k / V] = value;
  });
}

// Rows [row0, row0 + rows) of a plane, and columns from col0 on, into shared memory: `cols` of them
// and zeros, also outside of the plane. `pieces`, an even number, cover a row; magic = 2^20 /
// pieces, rounded up: i * magic >> 20 = i / pieces.
template <typename A, typename Src, int V>
__device__ __forceinline__ void load_tile_planes(A* s, const Src* plane, const Src* begin,
                                                 const Src* end, int H, int W, int row0, int col0,
                                                 int rows, int cols, int pieces, int magic,
                                                 int pitch, int plane_words, Format<Src> format) {
  const int lo = max(0, -col0), hi = min(cols, W - col0);
#pragma unroll 2
  for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
    const int row = static_cast<int>(static_cast<unsigned>(i) * static_cast<unsigned>(magic) >> 20);
    const auto piece =
        fetch_piece<Src>(plane, begin, end, H, W, row0 + row, col0, lo, hi, i - row * pieces);
    put_piece<A, V>(s + row * pitch, piece, lo, hi, pitch, plane_words, format);
  }
}

// V channels from c on of a pixel of channels-last memory; zeros outside of the image.
template <typename T>
__device__ __forceinline__ Pack<T, kVec<T>> fetch_pixel(const T* sample, int C, int c, bool vec,
                                                        int H, int W, int r, int col) {
  constexpr int V = kVec<T>;
  if (r < 0 || r >= H || col < 0 || col >= W || c >= C) return {};
  const T* p = sample + (static_cast<int64_t>(r) * W + col) * C + c;
  if (vec) return load_pack<T, V>(p);
  Pack<T, V> v{};
  for (int e = 0; e < V && c + e < C; e++) v.v[e] = p[e];
  return v;
}

// Them in shared memory, in float32: 16 bytes in each of V / kPiece planes.
template <typename T>
__device__ __forceinline__ void put_pixel(Acc<T>* s, const Pack<T, kVec<T>>& v, int plane_words,
                                          Format<T> format) {
  Acc<T> values[kVec<T>];
  widen(v, format, values);
#pragma unroll
  for (int k = 0; k < kVec<T> / kPiece<T>; k++) {
    Piece<T> piece;
#pragma unroll
    for (int e = 0; e < kPiece<T>; e++) piece.v[e] = values[k * kPiece<T> + e];
    *reinterpret_cast<Piece<T>*>(s + k * plane_words) = piece;
  }
}

// Rows and columns like those of load_tile_planes, of 2 * V channels from c on.
template <typename T>
__device__ __forceinline__ void load_tile_last(Acc<T>* s, const T* sample, int C, int c, bool vec,
                                               int H, int W, int row0, int col0, int rows, int cols,
                                               int magic, int pitch, int plane_words,
                                               Format<T> format) {
  const int half = threadIdx.x & 1;
#pragma unroll 2
  for (int i = threadIdx.x / 2; i < rows * cols; i += blockDim.x / 2) {
    const int row = static_cast<int>(static_cast<unsigned>(i) * static_cast<unsigned>(magic) >> 20);
    const int j = i - row * cols;
    const auto v = fetch_pixel<T>(sample, C, c + half * kVec<T>, vec, H, W, row0 + row, col0 + j);
    put_pixel<T>(s + (row * pitch + 2 * j + half) * kPiece<T>, v, plane_words, format);
  }
}

// Elements [first, first + N) of a thread's, whose first lies at s in plane 0 of its row.
template <typename T, int N, typename A>
__device__ __forceinline__ void read_planes(A* v, const A* s, int first, int plane_words) {
  constexpr int V = kVec<T>;
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = s[(first + i) % V * plane_words + (first + i) / V];
}

// N channels of a pixel.
template <typename T, int N, typename A>
__device__ __forceinline__ void read_pixel(A* v, const A* s, int plane_words) {
#pragma unroll
  for (int k = 0; k < N / kPiece<T>; k++) {
    const auto piece = *reinterpret_cast<const Piece<T>*>(s + k * plane_words);
#pragma unroll
    for (int e = 0; e < kPiece<T>; e++) v[k * kPiece<T> + e] = piece.v[e];
  }
}

// out[row][e] = the filter in kRows rows, at N pixels of a row or N channels of a pixel (kLast).
// read(v, q, kx) fetches row q of the input: N + 3 pixels of it, or the channels of pixel kx.
template <bool kLast, int kRows, int N, typename A, typename Read>
__device__ __forceinline__ void filter(A (&out)[kRows][N], const A* taps, Read read) {
  constexpr int kWide = kLast ? N : N + kHalo;
#pragma unroll
  for (int row = 0; row < kRows; row++)
#pragma unroll
    for (int e = 0; e < N; e++) out[row][e] = A(0);
#pragma unroll
  for (int q = 0; q < kRows + kHalo; q++) {
    A v[kWide];
    if (!kLast) read(v, q, 0);
    Pack<A, kTaps> tap[kRows];
#pragma unroll
    for (int row = 0; row < kRows; row++)
      if (q >= row && q - row < kTaps)
        tap[row] = *reinterpret_cast<const Pack<A, kTaps>*>(taps + (q - row) * kTaps);
#pragma unroll
    for (int kx = 0; kx < kTaps; kx++) {
      if (kLast) read(v, q, kx);
#pragma unroll
      for (int row = 0; row < kRows; row++) {
        if (q < row || q - row >= kTaps) continue;
#pragma unroll
        for (int e = 0; e < N; e++) out[row][e] += tap[row].v[kx] * v[kLast ? e : e + kx];
      }
    }
  }
}

// d, b and strength of a block's channels lie in shared memory, so that global memory gives them
// once to it, not to every warp; channels beyond C get those of the last.
template <typename T>
__device__ __forceinline__ Acc<T> param(const Args<T>& a, int which, int n, int c) {
  c = min(c, a.C - 1);
  if (which == 0)
    return a.d ? load_param<T>(a.d, a.f32 & 1, static_cast<int64_t>(n) * a.C + c, a.format)
               : Acc<T>(1);
  if (which == 1) return a.b ? load_param<T>(a.b, a.f32 & 8, c, a.format) : Acc<T>(0);
  return !a.strength ? Acc<T>(1)
                     : load_param<T>(a.strength, a.f32 & 4, a.one_strength ? 0 : c, a.format);
}

// Those of `count` channels from c0 on, in rows of kStride; t: the thread, counted from any.
template <typename T, int kStride>
__device__ __forceinline__ void share_params(Acc<T>* params, const Args<T>& a, int64_t n,
                                             int64_t c0, int t, int count = kStride) {
  for (; t < 3 * kStride; t += blockDim.x)
    if (t % kStride < count) params[t] = param(a, t / kStride, n, c0 + t % kStride);
}

template <typename T, bool kLast, int kStride>
struct Params {
  const Acc<T>* shared;  // of this thread's channels
  Acc<T> d0 = 0, b0 = 0, s0 = 0;
  __device__ __forceinline__ Params(const Acc<T>* params) : shared(params) {
    if (!kLast) d0 = shared[0], b0 = shared[kStride], s0 = shared[2 * kStride];
  }
  __device__ __forceinline__ Acc<T> d(int e) const { return kLast ? get(0, e) : d0; }
  __device__ __forceinline__ Acc<T> b(int e) const { return kLast ? get(1, e) : b0; }
  __device__ __forceinline__ Acc<T> s(int e) const { return kLast ? get(2, e) : s0; }
  // volatile: fetched when needed, since the registers do not hold all.
  __device__ __forceinline__ Acc<T> get(int k, int e) const {
    return const_cast<const volatile Acc<T>*>(shared)[k * kStride + e];
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
template <typename T, int V = kVec<T>>
__device__ __forceinline__ Pack<T, V> load_packed(const T* p, bool vec, int count) {
  if (vec && count >= V) return load_pack<T, V>(p);
  Pack<T, V> v{};
#pragma unroll
  for (int e = 0; e < V; e++)
    if (e < count) v.v[e] = p[e];
  return v;
}

template <typename T, int V>
__device__ __forceinline__ void store_packed(T* p, const Pack<T, V>& v, bool vec, int count) {
  if (vec && count >= V) return store_pack<T, V>(p, v);
#pragma unroll
  for (int e = 0; e < V; e++)
    if (e < count) p[e] = v.v[e];
}

template <typename T>
__device__ __forceinline__ void store_some(T* p, const Acc<T> (&in)[kVec<T>], bool vec, int count,
                                           Format<T> format) {
  store_packed<T, kVec<T>>(p, narrow<T, kVec<T>>(in, format), vec, count);
}

// The noise of a thread's pixels: V of a row (NCHW), or one.
template <typename T, bool kLast>
__device__ __forceinline__ void load_noise(Acc<T> (&out)[kLast ? 1 : kVec<T>], const Args<T>& a,
                                           int n, int row, int col, int count) {
  constexpr int V = kVec<T>;
  const int64_t i = offset<false>(1, a.one_noise ? 0 : n, 0, a.out_h, a.out_w, row, col);
  const bool is_f32 = a.f32 & 2;
  if constexpr (kLast) {
    out[0] = count > 0 ? load_param<T>(a.noise, is_f32, i, a.format) : Acc<T>(0);
  } else if (!is_f32) {
    widen(load_packed<T>(static_cast<const T*>(a.noise) + i, a.vec_noise, count), a.format, out);
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

// Rows of tile_w pixels in shared memory of which a thread has V: they lie in pieces of kPiece,
// piece_pitch words apart, so that neighbours meet neighbouring words, piece by piece and one by
// one.
template <typename T>
__device__ __forceinline__ int piece_pitch(int tile_w) {
  return tile_w / kVec<T> * kPiece<T> | 16;
}

template <typename T>
__device__ __forceinline__ int piece_at(int pixel, int pitch) {
  constexpr int V = kVec<T>;
  return pixel % V / kPiece<T> * pitch + pixel / V * kPiece<T> + pixel % kPiece<T>;
}

// The noise of a block's pixels, read once for all its channels.
template <typename T>
__device__ __forceinline__ void share_noise(Acc<T>* shared, const Args<T>& a, int n, int first) {
  const int64_t i = offset<false>(1, a.one_noise ? 0 : n, 0, 1, a.out_w, 0, first);
  const int pitch = piece_pitch<T>(a.tile_w);
  for (int e = threadIdx.x; e < a.tile_w; e += blockDim.x)
    shared[piece_at<T>(e, pitch)] =
        first + e < a.out_w ? load_param<T>(a.noise, a.f32 & 2, i + e, a.format) : Acc<T>(0);
}

// V values of a row from pixel `at` on.
template <typename T>
__device__ __forceinline__ void read_pieces(Acc<T>* out, const Acc<T>* row, int pitch, int at) {
#pragma unroll
  for (int k = 0; k < kVec<T>; k += kPiece<T>) {
    const auto v = *reinterpret_cast<const Piece<T>*>(row + piece_at<T>(at + k, pitch));
#pragma unroll
    for (int e = 0; e < kPiece<T>; e++) out[k + e] = v.v[e];
  }
}

}  // namespace
}  // namespace gankern
