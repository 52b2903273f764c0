// What the kernels of upfirdn2d share: arguments, polyphase arithmetic, taps.
#pragma once

#include "common.cuh"

namespace gankern {
namespace {

constexpr int kMaxTaps = 32;
constexpr int kSharedBytes = 48 * 1024;

struct Axis {
  int in, out, up, down, pad, taps;
};

struct Args {
  const void* x;
  const void* f;
  void* y;
  Axis h, w;
  int64_t images;                      // N * C in NCHW, N in channels-last
  int channels;                        // 1 in NCHW
  int tiles_w;                         // tiles in a row of tiles
  int tile_w, tile_h, log2_x, log2_c;  // outputs of a tile; its threads along x or channels
  int chunks;                          // parts of the channels
  int columns;                         // samples of a row of the tile that are needed
  int pitch;                           // elements of such a row in shared memory
  int in_rows;                         // rows of it
  int threads_y, magic_x, magic_row;   // planes: rows of threads; see quotient()
  int dtype;
  bool separable, flip;
  double gain;
};

// n / d for n < 4096, d <= 4096 with n d < 2^20; magic = magic_of(d).
__device__ __forceinline__ int quotient(int n, int magic) {
  return static_cast<int>(static_cast<unsigned>(n) * static_cast<unsigned>(magic) >> 20);
}
inline int magic_of(int d) { return ((1 << 20) + d - 1) / d; }

// The first sample that output o meets, and its tap.
__host__ __device__ __forceinline__ int first_sample(const Axis& a, int64_t o) {
  const int64_t start = o * a.down - a.pad + a.up - 1;
  return static_cast<int>(start / a.up - (start % a.up < 0 ? 1 : 0));
}
// The same for factors that are known: up is a power of two.
template <int kUp, int kDown>
__device__ __forceinline__ int first_sample(const Axis& a, int64_t o) {
  constexpr int kShift = kUp == 4 ? 2 : kUp - 1;
  static_assert(kUp == 1 << kShift, "1, 2 or 4");
  return static_cast<int>((o * kDown - a.pad + kUp - 1) >> kShift);
}
__host__ __device__ __forceinline__ int first_tap(const Axis& a, int64_t o, int sample) {
  return static_cast<int>(static_cast<int64_t>(sample) * a.up - (o * a.down - a.pad));
}

// Samples that `n` outputs meet, at most.
inline int samples_for(const Axis& a, int n) { return ((n - 1) * a.down + a.taps - 1) / a.up + 1; }

// Tap k of the correlation that is computed, k counted along the input.
template <typename S>
__device__ __forceinline__ S filter_tap(const Args& p, int ky, int kx) {
  const S* f = static_cast<const S*>(p.f);
  const int y = p.flip ? ky : p.h.taps - 1 - ky, x = p.flip ? kx : p.w.taps - 1 - kx;
  return p.separable ? f[y] * f[x] : f[y * p.w.taps + x];
}
template <typename S>
__device__ __forceinline__ S filter_tap(const Args& p, int k) {
  return static_cast<const S*>(p.f)[p.flip ? k : p.w.taps - 1 - k];
}

// Blocks along y are images and chunks of channels; along x, tiles of an image, or if they are not
// too many, tiles of a row, and along z the rows of tiles.
inline dim3 grid_of(const Args& p) {
  return dim3(static_cast<unsigned>(ceil_div(p.h.out, p.tile_h) * p.tiles_w),
              static_cast<unsigned>(min(p.images * p.chunks, int64_t(65535))));
}
inline bool has_grid3(const Args& p) {
  return ceil_div(p.h.out, p.tile_h) <= 65535 && p.images * p.chunks <= int64_t(1) << 30;
}
inline dim3 grid3_of(const Args& p) {
  return dim3(static_cast<unsigned>(p.tiles_w),
              static_cast<unsigned>(min(p.images * p.chunks, int64_t(65535))),
              static_cast<unsigned>(ceil_div(p.h.out, p.tile_h)));
}

}  // namespace
}  // namespace gankern
