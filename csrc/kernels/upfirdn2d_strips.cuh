// upfirdn2d in channels-last memory with a separable filter, both passes in one kernel. A block
// walks down a strip of the output, as many rows a step as its threads make at once, for 32 bytes
// of channels (a sector). The input rows that a step adds are read into `stage`, and filtered along
// x into a ring of float32 rows, from which the step is filtered along y: a block's halo is that of
// a long strip, at the shared memory of a short one.
#pragma once

#include "upfirdn2d.cuh"

namespace gankern {
namespace {

constexpr int kStripThreads = 256, kStripHeight = 64;
constexpr int kStripBytes = 40 * 1024;  // at most: four blocks of an A100's multiprocessor
constexpr int kMostStripFactor = 16;    // of up and down: see quotient()

struct Strip {
  int ring_rows, stage_rows, log2_phases, magic_up;
};

// Rows [row0, row0 + rows) of the strip's columns and channels; zeros outside of the image. Each
// row is split into its `down` phases, so that neighbouring outputs read neighbouring granules.
template <typename T>
__device__ __forceinline__ void load_stage(const Args& p, const Strip& s,
                                           Pack<T, 16 / sizeof(T)>* stage, const T* x, int row0,
                                           int rows, int ix0, int channels) {
  constexpr int N = 16 / sizeof(T), kBatch = 3;
  const int phase = p.pitch >> s.log2_phases, mask = (1 << s.log2_phases) - 1;
  const int lane = threadIdx.x % 32, granules = 2 * p.columns;
  for (int r = threadIdx.x / 32; r < rows; r += blockDim.x / 32) {
    const int iy = row0 + r;
    const bool row_inside = iy >= 0 && iy < p.h.in;
    const T* row = x + (static_cast<int64_t>(iy) * p.w.in + ix0) * p.channels;
    for (int v0 = lane; v0 < granules; v0 += 32 * kBatch) {
      Pack<T, N> batch[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int v = v0 + 32 * b, column = v >> 1, ix = ix0 + column, c = (v & 1) * N;
        if (row_inside && v < granules && ix >= 0 && ix < p.w.in && c < channels)
          batch[b] = load_pack<T, N>(row + static_cast<int64_t>(column) * p.channels + c);
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int v = v0 + 32 * b, column = v >> 1;
        if (v < granules)
          stage[r * p.pitch + (column & mask) * phase + (column >> s.log2_phases) * 2 + (v & 1)] =
              batch[b];
      }
    }
  }
}

// kUp, kDown, kTaps: of both axes, or 0.
template <typename T, int kUp, int kDown, int kTaps>
__global__ void __launch_bounds__(kStripThreads, 4) upfirdn2d_strips_kernel(Args p, Strip s) {
  if constexpr (kTaps > 0) {  // as constants
    p.h.taps = p.w.taps = kTaps, p.h.up = p.w.up = kUp, p.h.down = p.w.down = kDown;
    s.log2_phases = kDown / 2;
  }
  constexpr int N = 16 / sizeof(T), kPieces = N / 4;
  using Granule = Pack<T, N>;
  const Format<T> format(p.dtype);
  GK_DYNAMIC_SHARED(float, fx);
  float* fy = fx + kMaxTaps;
  const int width = p.tile_w * 2;                           // threads of a row: two a sector
  float4* ring = reinterpret_cast<float4*>(fy + kMaxTaps);  // [ring_rows][kPieces][width]
  Granule* stage = reinterpret_cast<Granule*>(ring + s.ring_rows * kPieces * width);
  const int g = threadIdx.x & 1, tx = threadIdx.x >> 1 & (p.tile_w - 1);
  const int ty = threadIdx.x >> (1 + p.log2_x), step = blockDim.x >> (1 + p.log2_x);
  const int at = threadIdx.x & (width - 1);
  const int ox0 = static_cast<int>(blockIdx.x) * p.tile_w;
  const int oy0 = static_cast<int>(blockIdx.z) * p.tile_h, height = min(p.tile_h, p.h.out - oy0);
  const int ix0 = first_sample(p.w, ox0), iy0 = first_sample(p.h, oy0);
  const int first_x = first_sample(p.w, ox0 + tx), tap_x = first_tap(p.w, ox0 + tx, first_x);
  const int tap_y0 = first_tap(p.h, oy0, iy0);  // of the strip's first output in its first row
  for (int i = threadIdx.x; i < p.w.taps; i += blockDim.x)
    fx[i] = filter_tap<float>(p, i) * static_cast<float>(p.gain);
  for (int i = threadIdx.x; i < p.h.taps; i += blockDim.x)
    fy[i] = static_cast<const float*>(p.f)[p.flip ? i : p.h.taps - 1 - i];

  const int phase = p.pitch >> s.log2_phases, mask = (1 << s.log2_phases) - 1;
  const auto next = [&](int slot) { return slot + 1 < s.ring_rows ? slot + 1 : 0; };
  const unsigned parts = static_cast<unsigned>(p.images * p.chunks), chunks = p.chunks;
  for (unsigned part = blockIdx.y; part < parts; part += gridDim.y) {
    const int64_t image = part / chunks;
    const int c0 = static_cast<int>(part % chunks) * 2 * N, channels = p.channels - c0;
    const T* x = static_cast<const T*>(p.x) + image * p.h.in * p.w.in * p.channels + c0;
    T* y = static_cast<T*>(p.y) + image * p.h.out * p.w.out * p.channels + c0 + g * N;
    int filtered = 0, slot = 0;  // rows that went into the ring; where the next goes
    for (int j0 = 0; j0 < height; j0 += step) {
      // Output j meets samples from ceil((j down - tap_y0) / up) on.
      const int last = min(j0 + step, height) - 1;
      const int rows = quotient(last * p.h.down - tap_y0 + p.h.taps - 1 + p.h.up, s.magic_up);
      while (filtered < rows) {
        const int more = min(rows - filtered, s.stage_rows);
        __syncthreads();  // the stage and the ring's oldest rows have been read
        load_stage<T>(p, s, stage, x, iy0 + filtered, more, ix0, channels);
        __syncthreads();
        for (int r = ty; r < more; r += step) {
          float sums[N] = {};
          // With a known kDown a thread's first column is of phase 0.
          const int first = kTaps > 0 ? 0 : first_x - ix0;
          const Granule* row = stage + (r * p.pitch + g);
          if constexpr (kTaps > 0) row += (first_x - ix0) / kDown * 2;
          each_tap<kUp, kTaps>(tap_x, p.w, [&](int k, int m) {
            const int column = first + m;
            float v[N];
            widen(load_pack<T, N>(row[(column & mask) * phase + (column >> s.log2_phases) * 2].v),
                  format, v);
            const float w = fx[k];
#pragma unroll
            for (int e = 0; e < N; e++) sums[e] += w * v[e];
          });
          int to = slot + r;
          if (to >= s.ring_rows) to -= s.ring_rows;
#pragma unroll
          for (int i = 0; i < kPieces; i++)
            ring[(to * kPieces + i) * width + at] =
                make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
        }
        filtered += more;
        slot += more;
        if (slot >= s.ring_rows) slot -= s.ring_rows;
      }
      __syncthreads();

      const int j = j0 + ty, ox = ox0 + tx;
      if (j >= height || ox >= p.w.out || g * N >= channels) continue;
      const int first_y = quotient(j * p.h.down - tap_y0 + p.h.up - 1, s.magic_up);
      int from = slot - (filtered - first_y);
      if (from < 0) from += s.ring_rows;
      float sums[N] = {};
#pragma unroll 2
      for (int k = first_y * p.h.up + tap_y0 - j * p.h.down; k < p.h.taps; k += p.h.up) {
        const float w = fy[k];
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
          const float4 v = ring[(from * kPieces + i) * width + at];
          sums[4 * i] += w * v.x, sums[4 * i + 1] += w * v.y;
          sums[4 * i + 2] += w * v.z, sums[4 * i + 3] += w * v.w;
        }
        from = next(from);
      }
      store_pack<T, N>(y + (static_cast<int64_t>(oy0 + j) * p.w.out + ox) * p.channels,
                       narrow<T, N>(sums, format));
    }
  }
}

// The widest strip that fits into shared memory, and the longest of which there are enough.
template <typename T, int kUp, int kDown, int kTaps>
int launch_strips(Args p, void* stream) {
  constexpr int N = 16 / sizeof(T);
  if (max(max(p.w.up, p.w.down), max(p.h.up, p.h.down)) > kMostStripFactor) return -1;
  Strip s{};
  s.magic_up = magic_of(p.h.up);
  s.log2_phases = p.w.down == 4 ? 2 : p.w.down == 2 ? 1 : 0;
  p.chunks = static_cast<int>(ceil_div(p.channels, 2 * N));
  int x = pow2_between(p.w.out, 8, N == 4 ? 32 : 16), threads = kStripThreads, shared = 0;
  p.tile_h = pow2_between(p.h.out, 1, kStripHeight);
  for (;;) {
    const int step = threads / (2 * x);
    p.tile_w = x;
    p.tiles_w = static_cast<int>(ceil_div(p.w.out, x));
    p.columns = samples_for(p.w, x) + (p.w.up > 1);
    // Granules of a phase, so that the phases of a warp's columns lie in different banks.
    const int phases = 1 << s.log2_phases,
              granules = 2 * static_cast<int>(ceil_div(p.columns, phases));
    const int apart = phases == 2 ? 4 : phases == 4 ? 2 : 0;
    p.pitch = phases * (phases == 1 ? granules : granules + (apart - granules % 8 + 8) % 8);
    s.ring_rows = samples_for(p.h, step) + (p.h.up > 1);
    const int fixed = 8 * kMaxTaps + s.ring_rows * 8 * N * x;
    s.stage_rows = min(min(s.ring_rows, max(step * p.h.down / p.h.up, 1)),
                       (kStripBytes - fixed) / (16 * p.pitch));
    shared = fixed + s.stage_rows * 16 * p.pitch;
    const int64_t blocks = ceil_div(p.h.out, p.tile_h) * p.tiles_w * p.images * p.chunks;
    if (s.stage_rows > 0 && (blocks >= sm_count() || (x == 8 && p.tile_h <= step))) break;
    if (s.stage_rows > 0 && p.tile_h > max(x, step))
      p.tile_h /= 2;
    else if (x > 8)
      x /= 2;
    else if (s.stage_rows > 0)
      p.tile_h /= 2;
    else if (threads > 64)
      threads /= 2;
    else
      return -1;
  }
  if (!has_grid3(p)) return -1;
  p.log2_x = log2_of(x);
  GK_LAUNCH((upfirdn2d_strips_kernel<T, kUp, kDown, kTaps>), grid3_of(p), dim3(threads), shared,
            stream, p, s);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace gankern
