// upfirdn2d in channels-last memory. A block reads a tile of 32 bytes of
// channels (a sector) into shared memory. With 4 taps a thread then walks down
// a column of it for 4 channels, as upfirdn2d_march.cuh does; with other taps
// (kTaps 0, factors as given too) it makes 2 rows of a column for 16 bytes of
// channels.
#pragma once

#include "upfirdn2d.cuh"

namespace gankern {
namespace {

constexpr int pixel_threads(int taps) { return taps ? 256 : 512; }

// A tile's samples of 16 bytes. Rows are split into as many phases as columns
// lie between those of neighbouring threads.
template <typename T, int kPhases>
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
    const bool inside = column < p.columns && ix >= 0 && ix < p.w.in && c < channels;
    const T* from = x + (static_cast<int64_t>(iy0 + row0) * p.w.in + ix) * p.channels + c;
    T* to = tile + c +
            (row0 * p.pitch + column % kPhases * (p.pitch / kPhases) + column / kPhases * 2) * N;
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

// Columns of a thread: two where samples of 16 bits are shared by them, each
// widened once.
template <typename T, int kUp, int kDown, int kTaps>
__host__ __device__ constexpr int pixel_columns() {
  return kTaps && sizeof(T) == 2 && kUp == 1 && kDown == 1 ? 2 : 1;
}

template <typename T, int kUp, int kDown, int kTaps>
__global__ void __launch_bounds__(pixel_threads(kTaps), kTaps ? 4 : 2)
    upfirdn2d_pixels_kernel(Args p) {
  constexpr int N = 16 / sizeof(T),
                kStep = 2 * N;  // elements of a granule, and of a sample
  constexpr int kOwn = kTaps ? 4 : N,
                kLog2 = kTaps && N == 8 ? 2 : 1;  // a thread's; threads
  constexpr int kColumns = pixel_columns<T, kUp, kDown, kTaps>(), kPhases = kDown * kColumns;
  constexpr unsigned kAll = 0xffffffffu;
  const Format<T> format(p.dtype);
  GK_DYNAMIC_SHARED(float, f);
  const int f_size = kTaps ? 0 : p.h.taps * p.w.taps;
  T* tile = reinterpret_cast<T*>(f + (f_size + 3) / 4 * 4);
  const int c = (threadIdx.x & ((1 << kLog2) - 1)) * kOwn;
  const int tx = threadIdx.x >> kLog2 & ((1 << p.log2_x) - 1),
            ty = threadIdx.x >> (kLog2 + p.log2_x);
  const int ox0 = static_cast<int>(blockIdx.x) * p.tile_w, ox = ox0 + tx * kColumns;
  const int oy0 = static_cast<int>(blockIdx.z) * p.tile_h - (kTaps ? kUp - 1 : 0);
  const auto first = [](const Axis& a, int o) {
    if constexpr (kTaps)
      return first_sample<kUp, kDown>(a, o);
    else
      return first_sample(a, o);
  };
  const int ix0 = first(p.w, ox0), iy0 = first(p.h, oy0);
  const int first_x = first(p.w, ox);
  const int tap_x = kTaps && kUp == 1 ? 0 : first_tap(p.w, ox, first_x);
  const float gain = static_cast<float>(p.gain);
  for (int i = threadIdx.x; i < f_size; i += blockDim.x)
    f[i] = filter_tap<float>(p, i / p.w.taps, i % p.w.taps) * gain;
  float tap = 0.f;  // of this lane
  if constexpr (kTaps) tap = filter_tap<float>(p, threadIdx.x >> 2 & 3, threadIdx.x & 3);

  const unsigned part = blockIdx.y, chunks = p.chunks;
  const int64_t image = part / chunks;
  const int c0 = static_cast<int>(part % chunks) * kStep, channels = p.channels - c0;
  const T* x = static_cast<const T*>(p.x) + image * p.h.in * p.w.in * p.channels + c0;
  const int height = ox < p.w.out && c < channels ? p.h.out : 0;
  T* y = static_cast<T*>(p.y) + image * p.h.out * p.w.out * p.channels + c0 + c +
         static_cast<int64_t>(ox) * p.channels;
  const int64_t row_of_y = static_cast<int64_t>(p.w.out) * p.channels;
  load_pixels<T, kPhases>(p, tile, x, ix0, iy0, channels);
  __syncthreads();

  const int row_step = p.pitch * N;
  const T* column = tile + (first_x - ix0) / kPhases * kStep + c;
  if constexpr (kTaps == 0) {
#pragma unroll
    for (int jr = 0; jr < 2; jr++) {
      const int oy = oy0 + ty * 2 + jr, first_y = first(p.h, oy);
      if (oy >= height) continue;
      float sums[N] = {};
      const T* row = column + (first_y - iy0) * row_step;
      for (int ky = first_tap(p.h, oy, first_y); ky < p.h.taps; ky += p.h.up, row += row_step) {
        const T* sample = row;
        for (int kx = tap_x; kx < p.w.taps; kx += p.w.up, sample += kStep) {
          float values[N];
          widen(load_pack<T, N>(sample), format, values);
          const float w = f[ky * p.w.taps + kx];
#pragma unroll
          for (int j = 0; j < N; j++) sums[j] += w * values[j];
        }
      }
      store_pack<T, N>(y + oy * row_of_y, narrow<T, N>(sums, format));
    }
  } else {
    // Samples that an output meets of a row, every other tap of which it
    // meets with up 2, and those that a thread's outputs meet.
    constexpr int kMeet = 4 / kUp, kSamples = (kColumns - 1) * kDown + kMeet;
    using Samples = Pack<T, 4>[kSamples];
    using Sums = float[4 * kColumns];
    const int y0 = oy0 + ty * p.rows, skipped = kUp == 2 && y0 < 0 ? 1 : 0;
    const int most = max(min(height - y0, p.rows), skipped);
    const int rows = Waiting<kUp, kDown, 4>::rows(min(p.h.out - oy0, p.rows));
    column += ty * (p.rows * kDown / kUp) * row_step;
    y += y0 * row_of_y;
    // Adds the samples times a row of the filter.
    const auto filter_x = [&](Format<T> format, const Samples& samples, const float (&w)[kMeet],
                              Sums& sums) {
#pragma unroll
      for (int m = 0; m < kSamples; m++) {
        float values[4];
        widen(samples[m], format, values);
#pragma unroll
        for (int i = 0; i < kColumns; i++)
          if (m - i * kDown >= 0 && m - i * kDown < kMeet)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[4 * i + j] += w[m - i * kDown] * values[j];
      }
    };
    const auto march = [&](Format<T> format, auto along_x, auto filter) {
      const T* row = column;
      T* out = y;
      Waiting<kUp, kDown, 4 * kColumns> waiting;
      const auto take = [&](int k, int r) {
        Samples samples;
        Sums passed = {};
#pragma unroll
        for (int m = 0; m < kSamples; m++)
          samples[m] =
              load_pack<T, 4>(row + m % kPhases * (p.pitch / kPhases) * N + m / kPhases * kStep);
        row += row_step;
        along_x(samples, passed);
        waiting.take(
            k, r, [&](Sums& sums, int ky) { filter(ky, samples, passed, sums); },
            [&](int j, const Sums& sums) {
              if (static_cast<unsigned>(j - skipped) < static_cast<unsigned>(most - skipped))
#pragma unroll
                for (int i = 0; i < kColumns; i++) {
                  const float part[4] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2],
                                         sums[4 * i + 3]};
                  if (i == 0 || ox + i < p.w.out)
                    store_whole<T, 4>(out + i * p.channels, narrow<T, 4>(part, format));
                }
              out += row_of_y;
            });
      };
      for (int r = 0; r < rows; r += kDown) {
        take(0, r);
        if constexpr (kDown == 2) take(1, r + 1);
      }
    };
    const OuterProduct product(tap);
    if (product.exists) {
      float fx[kMeet], fy[4];
#pragma unroll
      for (int m = 0; m < kMeet; m++) fx[m] = __shfl_sync(kAll, product.x, tap_x + m * kUp) * gain;
#pragma unroll
      for (int k = 0; k < 4; k++) fy[k] = __shfl_sync(kAll, product.y, 4 * k);
      with_format<T>(p.dtype, [&](Format<T> format) {
        march(
            format,
            [&](const Samples& samples, Sums& passed) { filter_x(format, samples, fx, passed); },
            [&](int ky, const Samples&, const Sums& passed, Sums& sums) {
#pragma unroll
              for (int j = 0; j < 4 * kColumns; j++) sums[j] += fy[ky] * passed[j];
            });
      });
    } else {
      const float scaled = tap * gain;
      march(
          format, [](const Samples&, Sums&) {},
          [&](int ky, const Samples& samples, const Sums&, Sums& sums) {
            float w[kMeet];
#pragma unroll
            for (int m = 0; m < kMeet; m++)
              w[m] = __shfl_sync(kAll, scaled, 4 * ky + tap_x + m * kUp);
            filter_x(format, samples, w, sums);
          });
    }
  }
}

template <typename T, int kUp, int kDown, int kTaps>
int launch_pixels(Args p, void* stream) {
  constexpr int N = 16 / sizeof(T), kLanes = kTaps && N == 8 ? 4 : 2, kLeast = kUp == 2 ? 2 : 1;
  constexpr int kColumns = pixel_columns<T, kUp, kDown, kTaps>(), kPhases = kDown * kColumns;
  int x = pow2_between(ceil_div(p.w.out, kColumns), 32 / kLanes / 2, kPhases == 1 ? 32 : 16);
  int y = pixel_threads(kTaps) / (kLanes * x);
  // The largest tile that fits: the squarer, the smaller its halo.
  p.rows = kTaps == 0 ? 2 : max((kUp == 2 ? 64 : kDown == 2 ? 16 : 32) / y, kLeast);
  y = pow2_between(ceil_div(p.h.out, p.rows), 1, y);
  const int64_t wanted = sm_count();
  p.chunks = static_cast<int>(ceil_div(p.channels, 2 * N));
  int64_t shared = 0, tiles_h = 0;
  for (;;) {
    while (x * y * kLanes < 32) y *= 2;
    p.tile_w = x * kColumns;
    p.tile_h = y * p.rows;
    p.tiles_w = static_cast<int>(ceil_div(p.w.out, p.tile_w));
    p.columns = samples_for(p.w, p.tile_w) + (p.w.up > 1);
    const int phase = static_cast<int>(ceil_div(p.columns, kPhases));
    p.vectors = 2 * kPhases * phase;
    p.pitch = kPhases * (kPhases == 2 ? phase / 4 * 4 + 2 + (phase % 4 > 2 ? 4 : 0) : phase) * 2;
    p.in_rows =
        kTaps ? Waiting<kUp, kDown, 4>::rows(p.tile_h) : samples_for(p.h, p.tile_h) + (p.h.up > 1);
    const int64_t f = kTaps ? 0 : (static_cast<int64_t>(p.h.taps) * p.w.taps + 3) / 4 * 4;
    shared = 4 * f + static_cast<int64_t>(p.in_rows) * p.pitch * 16;
    tiles_h = ceil_div(p.h.out + (kTaps ? kUp - 1 : 0), p.tile_h);
    const int64_t blocks = tiles_h * p.tiles_w * p.images * p.chunks;
    const bool fits = shared <= kSharedBytes && p.vectors < 2048;
    const bool least = x * y * kLanes <= 32 && (!kTaps || p.rows == kLeast);
    if (fits && (least || blocks >= wanted)) break;
    if (least) return -1;
    if (kTaps && p.rows > (x * y * kLanes > 64 ? 2 : kLeast))
      p.rows /= 2;
    else if (y > 1 && (x <= 4 || p.tile_h >= p.tile_w))
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
    GK_LAUNCH((upfirdn2d_pixels_kernel<T, kUp, kDown, kTaps>), grid, dim3(kLanes * x * y),
              static_cast<int>(shared), stream, q);
  });
}

}  // namespace
}  // namespace gankern
