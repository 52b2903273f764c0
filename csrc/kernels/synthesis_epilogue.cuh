// What forward and backward of synthesis_epilogue share: arguments, tiles, the filter, operands.
#pragma once

#include "act.cuh"
#include "lines.cuh"

namespace gankern {
namespace {

// Channels whose parameters a block of the flat kernels shares, at most.
constexpr int kFlatChannels = 64;

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

template <typename T>
struct Args {
  const T *x, *dy;
  const float* f;
  const void *d, *noise, *strength, *b;
  T* out;  // y or dx
  Acc<T>*dd, *db, *ds, *partials;
  int* tickets;
  const T* x_end;
  int N, C, H, W, out_h, out_w;
  int taps_y, taps_x, x0, y0;
  int tiles, tiles_x, tile_h, tile_w, groups, lanes_log2;
  // With a filter, channels-last: columns of a row, threads, rows of a step, channels of a block,
  // 16 bytes of a pixel; bytes from the begin of shared memory, and of a stage; elements from even
  // columns to odd ones, there; see PixelRows for the rest.
  int across, magic, threads, step, channels, packs_log2;
  int xs, dys, sources, noises, x_stage, noise_stage;
  int evens, odd, dy_odd;
  int packs, x_apart, dy_packs, dy_apart, dy_magic, noise_magic;
  int x_step, dy_step;  // packs of the images between steps
  int64_t out_line, x_jump, dy_jump, x_sample, dy_sample, pixel;  // bytes
  int f32;
  Acc<T> filter_gain;
  bool separable, flip, one_noise, one_strength, vec_x, vec_out, vec_noise;
  Format<T> format{kF32};
  LinePlan lines;  // with a filter, NCHW
};

// Without a filter, NCHW: column and row of a thread's pixels in the tile.
struct Place {
  int lx, gy;
};
template <typename T>
__device__ __forceinline__ Place place(const Args<T>& a) {
  const int t = static_cast<int>(threadIdx.x);
  return {t & ((1 << a.lanes_log2) - 1), t >> a.lanes_log2};
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

template <bool kPwl, typename A>
__device__ __forceinline__ A value(A u, A d, A noise, A s, A b, const ActArgs<A>& p) {
  return clamped(act_value<kPwl>(u * d + (noise * s + b), p) * p.gain, p.clamp);
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
