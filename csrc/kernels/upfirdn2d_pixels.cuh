// upfirdn2d in channels-last memory. A thread makes 2 rows of one column for 16 bytes of
// channels; a tile has 32 bytes of channels (a sector) where the image does. kTaps 0: factors
// and taps as given.
#pragma once

#include "upfirdn2d.cuh"

namespace gankern {
namespace {

constexpr int kLog2Granules = 1;

constexpr int kPixelRows = 2, kPixelThreads = 512;

template <typename T, int kUp, int kDown, int kTaps>
__global__ void __launch_bounds__(kPixelThreads, 2) upfirdn2d_pixels_kernel(Args p) {
  constexpr int N = 16 / sizeof(T), kBatch = N == 4 ? 3 : 2, kRows = kPixelRows;
  constexpr int kStep = N << kLog2Granules;  // elements from one sample to the next
  using Granule = Pack<T, N>;
  const Format<T> format(p.dtype);
  GK_DYNAMIC_SHARED(float, f);
  const int f_size = kTaps ? kTaps * kTaps : p.h.taps * p.w.taps;
  T* tile = reinterpret_cast<T*>(f + (f_size + 3) / 4 * 4);
  const int g = threadIdx.x & ((1 << kLog2Granules) - 1);
  const int tx = threadIdx.x >> kLog2Granules & (p.tile_w - 1);
  const int ty = threadIdx.x >> (kLog2Granules + p.log2_x);
  const int ox0 = static_cast<int>(blockIdx.x) * p.tile_w;
  const int oy0 = static_cast<int>(blockIdx.z) * p.tile_h;
  const auto first = [](const Axis& a, int o) {
    if constexpr (kTaps)
      return first_sample<kUp, kDown>(a, o);
    else
      return first_sample(a, o);
  };
  const int ix0 = first(p.w, ox0), iy0 = first(p.h, oy0);
  for (int i = threadIdx.x; i < f_size; i += blockDim.x) {
    const int taps = kTaps ? kTaps : p.w.taps;
    f[i] = filter_tap<float>(p, i / taps, i % taps) * static_cast<float>(p.gain);
  }
  // A row of the tile is split into its `down` phases; column c of it starts at element at(c).
  const int phase = p.pitch / kDown;
  const auto at = [&](int c) { return c % kDown * phase * N + c / kDown * kStep; };
  const int first_x = first(p.w, ox0 + tx), tap_x = first_tap(p.w, ox0 + tx, first_x);

  const unsigned parts = static_cast<unsigned>(p.images * p.chunks), chunks = p.chunks;
  for (unsigned part = blockIdx.y; part < parts; part += gridDim.y) {
    const int64_t image = part / chunks;
    const int c0 = static_cast<int>(part % chunks) * kStep;
    const T* x = static_cast<const T*>(p.x) + image * p.h.in * p.w.in * p.channels + c0;
    T* y = static_cast<T*>(p.y) + image * p.h.out * p.w.out * p.channels + c0 + g * N;
    __syncthreads();
    const int step_r = quotient(blockDim.x, p.magic_row), step_v = blockDim.x - step_r * p.pitch;
    int r = quotient(threadIdx.x, p.magic_row), v = threadIdx.x - r * p.pitch;
    const auto advance = [&](int& row, int& vec) {
      row += step_r;
      vec += step_v;
      if (vec >= p.pitch) {
        vec -= p.pitch;
        row++;
      }
    };
    while (r < p.in_rows) {
      Granule batch[kBatch];
      int r2 = r, v2 = v;
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int iy = iy0 + r, ix = ix0 + (v >> kLog2Granules);
        const int c = (v & ((1 << kLog2Granules) - 1)) * N;
        batch[b] = Granule{};
        if (r < p.in_rows && iy >= 0 && iy < p.h.in && ix >= 0 && ix < p.w.in &&
            c0 + c < p.channels)
          batch[b] = load_pack<T, N>(x + (static_cast<int64_t>(iy) * p.w.in + ix) * p.channels + c);
        advance(r, v);
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        if (r2 < p.in_rows)
          store_pack<T, N>(tile + r2 * p.pitch * N + at(v2 >> kLog2Granules) +
                               (v2 & ((1 << kLog2Granules) - 1)) * N,
                           batch[b]);
        advance(r2, v2);
      }
    }
    __syncthreads();

    float acc[kRows][N] = {};
    float values[N];
    const auto add = [&](float* sums, float w) {
#pragma unroll
      for (int j = 0; j < N; j++) sums[j] += w * values[j];
    };
    const int row_step = p.pitch * N;
    const T* column = tile + (first_x - ix0) * kStep + g * N;
    if constexpr (kTaps == 0) {
#pragma unroll
      for (int jr = 0; jr < kRows; jr++) {
        const int oy = oy0 + ty * kRows + jr;
        const int first_y = first(p.h, oy);
        const T* row = column + (first_y - iy0) * row_step;
        for (int ky = first_tap(p.h, oy, first_y); ky < p.h.taps; ky += p.h.up, row += row_step) {
          const T* sample = row;
          for (int kx = tap_x; kx < p.w.taps; kx += p.w.up, sample += kStep) {
            widen(load_pack<T, N>(sample), format, values);
            add(acc[jr], f[ky * p.w.taps + kx]);
          }
        }
      }
    } else if constexpr (kUp == 1) {
      const T* row = tile + tx * kStep + g * N + ty * kRows * kDown * row_step;
#pragma unroll
      for (int i = 0; i < (kRows - 1) * kDown + kTaps; i++, row += row_step)
#pragma unroll
        for (int kx = 0; kx < kTaps; kx++) {
          widen(load_pack<T, N>(row + at(kx)), format, values);
#pragma unroll
          for (int jr = 0; jr < kRows; jr++)
            if (i - jr * kDown >= 0 && i - jr * kDown < kTaps)
              add(acc[jr], f[(i - jr * kDown) * kTaps + kx]);
        }
    } else {
      constexpr int kMeet = kTaps / kUp;
      const int qy = (p.h.pad % kUp + kUp) % kUp;
#pragma unroll
      for (int jr = 0; jr < kRows; jr++) {
        const int late = jr % kUp > qy ? 1 : 0, tap_y = late * kUp + qy - jr % kUp;
        const T* row = column + (ty * (kRows / kUp) + jr / kUp + late) * row_step;
        const float* w = f + tap_y * kTaps + tap_x;
#pragma unroll
        for (int my = 0; my < kMeet; my++, row += row_step)
#pragma unroll
          for (int mx = 0; mx < kMeet; mx++) {
            widen(load_pack<T, N>(row + mx * kStep), format, values);
            add(acc[jr], w[my * kUp * kTaps + mx * kUp]);
          }
      }
    }

    const int ox = ox0 + tx;
#pragma unroll
    for (int jr = 0; jr < kRows; jr++) {
      const int oy = oy0 + ty * kRows + jr;
      if (oy >= p.h.out || ox >= p.w.out || c0 + g * N >= p.channels) continue;
      store_pack<T, N>(y + (static_cast<int64_t>(oy) * p.w.out + ox) * p.channels,
                       narrow<T, N>(acc[jr], format));
    }
  }
}

template <typename T, int kUp, int kDown, int kTaps>
int launch_pixels(Args p, void* stream) {
  constexpr int N = 16 / sizeof(T), kRows = kPixelRows;
  constexpr int g = 1 << kLog2Granules;
  int x = pow2_between(p.w.out, 32 / g / 4, kDown == 1 ? 32 : 16);
  int y = pow2_between(ceil_div(p.h.out, kRows), 1, kPixelThreads / (g * x));
  const int64_t wanted = sm_count();
  p.chunks = static_cast<int>(ceil_div(p.channels, N * g));
  int64_t shared = 0;
  for (;;) {
    while (x * y * g < 32) y *= 2;
    p.tile_w = x;
    p.tile_h = y * kRows;
    p.tiles_w = static_cast<int>(ceil_div(p.w.out, x));
    const int columns = samples_for(p.w, x) + (p.w.up > 1);
    // Phases of rows lie so that neighbouring columns fall into different banks.
    const int phase = static_cast<int>(ceil_div(columns, kDown)) | (kDown == 4 ? 1 : 0);
    p.pitch = kDown * (kDown == 2 ? phase / 4 * 4 + 2 + (phase % 4 > 2 ? 4 : 0) : phase) * g;
    p.in_rows = samples_for(p.h, p.tile_h) + (p.h.up > 1);
    const int64_t f = (static_cast<int64_t>(p.h.taps) * p.w.taps + 3) / 4 * 4;
    shared = 4 * f + static_cast<int64_t>(p.in_rows) * p.pitch * 16;
    const int64_t blocks = ceil_div(p.h.out, p.tile_h) * p.tiles_w * p.images * p.chunks;
    if (shared <= kSharedBytes && p.pitch < 2048 && (x * y * g <= 32 || blocks >= wanted)) break;
    if (x * y * g <= 32) return -1;
    if (y > 1)
      y /= 2;
    else
      x /= 2;
  }
  if (!has_grid3(p)) return -1;
  p.log2_x = log2_of(x);
  p.magic_row = magic_of(p.pitch);
  GK_LAUNCH((upfirdn2d_pixels_kernel<T, kUp, kDown, kTaps>), grid3_of(p), dim3(g * x * y),
            static_cast<int>(shared), stream, p);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace gankern
