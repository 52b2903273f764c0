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
  int phase;                           // planes: floats of a phase of the tile
  int vectors;                         // read for a row of the tile
  int threads_y, magic_x, magic_row;   // rows of threads; see quotient()
  int dtype;
  bool separable, flip;
  double gain;
};

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

// f(tap, how many before it) for the taps that meet an output, the first of which is `first`.
// kTaps: kUp and kTaps are known; else 0.
template <int kUp, int kTaps, typename F>
__device__ __forceinline__ void each_tap(int first, const Axis& a, F f) {
  if constexpr (kTaps > 0) {
#pragma unroll
    for (int m = 0; m < (kTaps + kUp - 1) / kUp; m++)
      if (kTaps % kUp == 0 || first + m * kUp < kTaps) f(first + m * kUp, m);
  } else {
#pragma unroll 2
    for (int k = first, m = 0; k < a.taps; k += a.up, m++) f(k, m);
  }
}

// The filter as an outer product x y, if it is one up to rounding. Lane i of 16 has tap i. Row and
// column go through the smallest tap, of which the others are multiples in the usual filters:
// exact.
struct OuterProduct {
  float x, y;  // of this lane's tap
  bool exists;
  __device__ __forceinline__ explicit OuterProduct(float tap) {
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x & 31;
    const float size = tap == 0.f ? INFINITY : fabsf(tap);
    float least = size;
#pragma unroll
    for (int i = 8; i > 0; i /= 2) least = fminf(least, __shfl_xor_sync(all, least, i));
    const int pivot = (__ffs(static_cast<int>(__ballot_sync(all, size == least))) - 1) & 15;
    x = __shfl_sync(all, tap, (pivot & 12) + (lane & 3));
    y = __shfl_sync(all, tap, (lane & 12) + (pivot & 3)) / __shfl_sync(all, tap, pivot);
    exists = __all_sync(all, fabsf(tap - x * y) <= 1e-6f * fabsf(tap) && fabsf(y) <= 65536.f);
  }
};

// The outputs of 4 taps along y that wait for more rows of the input. Row by row, each makes some
// outputs whole; the first rows only begin some. With up 2 the first output is an odd one.
template <int kUp, int kDown, int kOutputs>
struct Waiting {
  float sums[kUp == 1 && kDown == 1 ? 3 : 2][kOutputs] = {};

  __host__ __device__ static constexpr int outputs(int rows) {
    return kUp == 2 ? 2 * (rows - 1) : kDown == 2 ? rows / 2 - 1 : rows - 3;
  }
  __host__ __device__ static constexpr int rows(int outputs) {
    return kUp == 2 ? (outputs + 1) / 2 + 1 : kDown == 2 ? 2 * outputs + 2 : outputs + 3;
  }
  // Takes row `row`; k is its parity, known to the compiler. add(sums, ky) adds to an output what
  // row ky of the filter makes of the row; store(j, sums) takes output j.
  template <typename Add, typename Store>
  __device__ __forceinline__ void take(int k, int row, Add add, Store store) {
    using Sums = float[kOutputs];
    const auto plus = [&](Sums& to, const Sums& from, int ky) {
#pragma unroll
      for (int j = 0; j < kOutputs; j++) to[j] = from[j];
      add(to, ky);
    };
    constexpr Sums kNone = {};
    Sums out;
    if constexpr (kUp == 2) {
      Sums even;
      plus(out, sums[1], 3);
      plus(even, sums[0], 2);
      plus(sums[0], kNone, 0);
      plus(sums[1], kNone, 1);
      if (row >= 1) {
        store(2 * row - 2, out);
        store(2 * row - 1, even);
      }
    } else if constexpr (kDown == 1) {
      plus(out, sums[0], 3);
      plus(sums[0], sums[1], 2);
      plus(sums[1], sums[2], 1);
      plus(sums[2], kNone, 0);
      if (row >= 3) store(row - 3, out);
    } else if (k % 2 == 0) {
      plus(sums[1], sums[0], 2);
      plus(sums[0], kNone, 0);
    } else {
      plus(out, sums[1], 3);
      add(sums[0], 1);
      if (row >= 3) store(row / 2 - 1, out);
    }
  }
};

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

// Launches of as many images at a time as a grid can have along y, with the chunks of their
// channels.
template <typename F>
int by_images(Args p, F launch) {
  const int64_t size = (p.dtype == kF32 ? 4 : 2) * static_cast<int64_t>(p.channels);
  for (int64_t left = p.images; left > 0; left -= p.images) {
    p.images = min(left, int64_t(65535 / p.chunks));
    launch(p);
    p.x = static_cast<const char*>(p.x) + p.images * p.h.in * p.w.in * size;
    p.y = static_cast<char*>(p.y) + p.images * p.h.out * p.w.out * size;
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace gankern
