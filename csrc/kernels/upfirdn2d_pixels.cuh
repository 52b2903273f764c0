// upfirdn2d in channels-last memory. A block reads a tile of 32 bytes of channels (a sector) into
// shared memory; a thread makes 2 rows of a column for 16 bytes of channels.
#pragma once

#include "upfirdn2d.cuh"

namespace gankern {
namespace {

constexpr int kPixelThreads = 512;

// A tile's samples of 16 bytes.
template <typename T>
__device__ __forceinline__ void load_pixels(const Args& p, T* tile, const T* x, int ix0, int iy0,
                                            int channels) {
  constexpr int N = 16 / sizeof(T), kBatch = 4;
  // A thread reads one granule of every `step`-th row.
  const int step = max(quotient(blockDim.x, p.magic_row), 1);
  const int row0 = quotient(threadIdx.x, p.magic_row);
  if (row0 >= step) return;
  const int64_t stride = static_cast<int64_t>(step) * p.w.in * p.channels;
  for (int v = threadIdx.x - row0 * p.vectors; v < p.vectors; v += blockDim.x) {
    const int column = v >> 1, ix = ix0 + column, c = (v & 1) * N;
    const bool inside = ix >= 0 && ix < p.w.in && c < channels;
    const T* from = x + (static_cast<int64_t>(iy0 + row0) * p.w.in + ix) * p.channels + c;
    T* to = tile + (row0 * p.pitch + v) * N;
    for (int r = row0; r < p.in_rows; r += step * kBatch) {
      Pack<T, N> batch[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int row = r + b * step;
        if (inside && row < p.in_rows &&
            static_cast<unsigned>(iy0 + row) < static_cast<unsigned>(p.h.in))
          batch[b] = load_pack<T, N>(from);
        from += stride;
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        if (r + b * step < p.in_rows) store_pack<T, N>(to, batch[b]);
        to += step * p.pitch * N;
      }
    }
  }
}

// kUp, kTaps: of both axes, or 0.
template <typename T, int kUp, int kTaps>
__global__ void __launch_bounds__(kPixelThreads, 2) upfirdn2d_pixels_kernel(Args p) {
  constexpr int N = 16 / sizeof(T), kStep = 2 * N;  // elements of a granule, and of a sample
  const Format<T> format(p.dtype);
  GK_DYNAMIC_SHARED(float, f);
  if constexpr (kTaps > 0) p.h.taps = p.w.taps = kTaps, p.h.up = p.w.up = kUp;  // as constants
  const int f_size = p.h.taps * p.w.taps;
  T* tile = reinterpret_cast<T*>(f + (f_size + 3) / 4 * 4);
  const int c = (threadIdx.x & 1) * N;
  const int tx = threadIdx.x >> 1 & ((1 << p.log2_x) - 1), ty = threadIdx.x >> (1 + p.log2_x);
  const int ox0 = static_cast<int>(blockIdx.x) * p.tile_w, ox = ox0 + tx;
  const int oy0 = static_cast<int>(blockIdx.z) * p.tile_h;
  const int ix0 = first_sample(p.w, ox0), iy0 = first_sample(p.h, oy0);
  const int first_x = first_sample(p.w, ox), tap_x = first_tap(p.w, ox, first_x);
  for (int i = threadIdx.x; i < f_size; i += blockDim.x)
    f[i] = filter_tap<float>(p, i / p.w.taps, i % p.w.taps) * static_cast<float>(p.gain);

  const unsigned part = blockIdx.y, chunks = p.chunks;
  const int64_t image = part / chunks;
  const int c0 = static_cast<int>(part % chunks) * kStep, channels = p.channels - c0;
  const T* x = static_cast<const T*>(p.x) + image * p.h.in * p.w.in * p.channels + c0;
  const int height = ox < p.w.out && c < channels ? p.h.out : 0;
  T* y = static_cast<T*>(p.y) + image * p.h.out * p.w.out * p.channels + c0 + c +
         static_cast<int64_t>(ox) * p.channels;
  load_pixels<T>(p, tile, x, ix0, iy0, channels);
  __syncthreads();

  const int row_step = p.pitch * N;
#pragma unroll
  for (int jr = 0; jr < 2; jr++) {
    const int oy = oy0 + ty * 2 + jr, first_y = first_sample(p.h, oy);
    if (oy >= height) continue;
    float sums[N] = {};
    const T* row = tile + (first_x - ix0) * kStep + c + (first_y - iy0) * row_step;
    for (int ky = first_tap(p.h, oy, first_y); ky < p.h.taps; ky += p.h.up, row += row_step) {
      each_tap<kUp, kTaps>(tap_x, p.w, [&](int kx, int m) {
        float values[N];
        widen(load_pack<T, N>(row + m * kStep), format, values);
        const float w = f[ky * p.w.taps + kx];
#pragma unroll
        for (int j = 0; j < N; j++) sums[j] += w * values[j];
      });
    }
    store_pack<T, N>(y + static_cast<int64_t>(oy) * p.w.out * p.channels,
                     narrow<T, N>(sums, format));
  }
}

template <typename T, int kUp, int kTaps>
int launch_pixels(Args p, void* stream) {
  constexpr int N = 16 / sizeof(T), kLanes = 2;
  int x = pow2_between(p.w.out, 8, 32);
  int y = kPixelThreads / (kLanes * x);
  // The largest tile that fits: the squarer, the smaller its halo.
  y = pow2_between(ceil_div(p.h.out, 2), 1, y);
  const int64_t wanted = sm_count();
  p.chunks = static_cast<int>(ceil_div(p.channels, 2 * N));
  int64_t shared = 0, tiles_h = 0;
  for (;;) {
    while (x * y * kLanes < 32) y *= 2;
    p.tile_w = x;
    p.tile_h = y * 2;
    p.tiles_w = static_cast<int>(ceil_div(p.w.out, p.tile_w));
    p.columns = samples_for(p.w, p.tile_w) + (p.w.up > 1);
    p.vectors = p.pitch = 2 * p.columns;
    p.in_rows = samples_for(p.h, p.tile_h) + (p.h.up > 1);
    const int64_t f = (static_cast<int64_t>(p.h.taps) * p.w.taps + 3) / 4 * 4;
    shared = 4 * f + static_cast<int64_t>(p.in_rows) * p.pitch * 16;
    tiles_h = ceil_div(p.h.out, p.tile_h);
    const int64_t blocks = tiles_h * p.tiles_w * p.images * p.chunks;
    const bool fits = shared <= kSharedBytes && p.vectors < 2048;
    const bool least = x * y * kLanes <= 32;
    if (fits && (least || blocks >= wanted)) break;
    if (least) return -1;
    if (y > 1 && (x <= 4 || p.tile_h >= p.tile_w))
      y /= 2;
    else
      x /= 2;
  }
  if (tiles_h > 65535 || p.chunks > 65535) return -1;
  p.log2_x = log2_of(x);
  p.magic_row = magic_of(p.vectors);
  return by_images(p, [&](const Args& q) {
    const dim3 grid(static_cast<unsigned>(q.tiles_w), static_cast<unsigned>(q.images * q.chunks),
                    static_cast<unsigned>(tiles_h));
    GK_LAUNCH((upfirdn2d_pixels_kernel<T, kUp, kTaps>), grid, dim3(kLanes * x * y),
              static_cast<int>(shared), stream, q);
  });
}

}  // namespace
}  // namespace gankern
