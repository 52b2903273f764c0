// upfirdn2d in channels-last memory with 4 taps. A block walks down a strip of the output for up to
// 128 bytes of channels, a line of the cache, which neighbouring threads read and write together.
// Stages of two rows of the input are copied into a ring in shared memory, the next ones while one
// is filtered: a block's halo is that of a long strip, at the shared memory of a short one. A
// thread has 4 channels of a column, or of two columns whose samples are widened once.
#pragma once

#include "upfirdn2d.cuh"

namespace gankern {
namespace {

// Stages of the ring: fewer of the wide ones, so that half of an A100's threads have room.
template <int kDown>
constexpr int kStages = kDown == 2 ? 2 : 3;
constexpr int kWalkThreads = 256, kWalkHeight = 68, kWalkBytes = 128;

template <typename T, int kUp, int kDown>
struct Walk {
  static constexpr int N = 16 / sizeof(T);  // elements of a granule, which one copy moves
  static constexpr int kColumns = kUp == 2 || sizeof(T) == 2 ? 2 : 1;
  // Columns between the first samples of neighbouring threads. A row of the ring is split into as
  // many phases, so that these threads read neighbouring pixels.
  static constexpr int kPhases = kDown * kColumns / kUp;
  static constexpr int kSamples = kUp == 2 ? 3 : (kColumns - 1) * kDown + 4;  // a thread's, a row
};

// What is the same in all threads and not to be kept in registers; in bytes, but for `across`.
struct Strides {
  int pixel, phase, row, last;  // of the ring; its last stage
  int across, copy_ring;        // pixels between those that a thread copies, and the same there
  int64_t copy_x, stage_x;      // the same in the input, and two of its rows
  int64_t pixel_y, row_y;
};

template <typename T, int kUp, int kDown>
__global__ void __launch_bounds__(kWalkThreads, 4) upfirdn2d_walk_kernel(Args p, Strides s) {
  using W = Walk<T, kUp, kDown>;
  constexpr int N = W::N, kColumns = W::kColumns, kPhases = W::kPhases, kSamples = W::kSamples;
  constexpr unsigned kAll = 0xffffffffu;
  const Format<T> format(p.dtype);
  GK_DYNAMIC_SHARED(float, taps);  // of a filter that is no outer product, and the ring
  char* ring = reinterpret_cast<char*>(taps + 16);
  const int c = (threadIdx.x & ((1 << p.log2_c) - 1)) * 4, tx = threadIdx.x >> p.log2_c;
  const int ox0 = static_cast<int>(blockIdx.x) * p.tile_w, ox = ox0 + tx * kColumns;
  const int oy0 = static_cast<int>(blockIdx.z) * p.tile_h - (kUp - 1);
  const int ix0 = first_sample<kUp, kDown>(p.w, ox0), iy0 = first_sample<kUp, kDown>(p.h, oy0);
  const int rows = Waiting<kUp, kDown, 4>::rows(min(p.h.out - oy0, p.tile_h));
  const float gain = static_cast<float>(p.gain);
  const float tap = filter_tap<float>(p, threadIdx.x >> 2 & 3, threadIdx.x & 3);  // of this lane

  const unsigned part = blockIdx.y, chunks = p.chunks;
  const int64_t image = part / chunks;
  const int c0 = static_cast<int>(part % chunks) * (4 << p.log2_c), channels = p.channels - c0;

  // Half of the threads copy a row of a stage: each the same granule of every across-th pixel.
  const int second = threadIdx.x >= blockDim.x / 2 ? 1 : 0;
  const int piece = threadIdx.x * N & ((4 << p.log2_c) - 1);
  const int column = (threadIdx.x - second * (blockDim.x / 2)) * N >> (p.log2_c + 2);
  const int end = piece < channels ? min(p.h.in, iy0 + rows) : 0;
  int iy = iy0 + second;
  const char* x =
      reinterpret_cast<const char*>(static_cast<const T*>(p.x) + c0 + piece +
                                    ((image * p.h.in + iy) * p.w.in + ix0 + column) * p.channels);
  char* to = ring + second * s.row + column % kPhases * s.phase + column / kPhases * s.pixel +
             piece * static_cast<int>(sizeof(T));
  const auto copy_stage = [&](int stage) {
    const bool inside = iy >= 0 && iy < end;
    const char* from = x;
    char* at = to + stage;
#pragma unroll 1
    for (int i = column; i < p.columns; i += s.across) {
      if (inside && static_cast<unsigned>(ix0 + i) < static_cast<unsigned>(p.w.in))
        copy_pack<T, N>(reinterpret_cast<T*>(at), reinterpret_cast<const T*>(from));
      else
        store_pack<T, N>(reinterpret_cast<T*>(at), Pack<T, N>{});
      from += s.copy_x;
      at += s.copy_ring;
    }
    iy += 2;
    x += s.stage_x;
  };
  for (int k = 0; k < kStages<kDown> - 1; k++) {
    if (2 * k < rows) copy_stage(2 * k * s.row);
    copy_batch();
  }

  // A warp beyond the image only copies.
  const bool busy = ox0 + (static_cast<int>(threadIdx.x & ~31u) >> p.log2_c) * kColumns < p.w.out;
  // Outputs [skipped, skipped + stored) of the strip are stored.
  const int skipped = oy0 < 0 ? 1 : 0;
  const int most = ox < p.w.out && c < channels ? min(p.h.out - oy0, p.tile_h) : 0;
  const unsigned stored = max(most - skipped, 0);
  const bool both = ox + 1 < p.w.out;
  char* y = reinterpret_cast<char*>(static_cast<T*>(p.y) + c0 + c +
                                    ((image * p.h.out + oy0) * p.w.out + ox) *
                                        static_cast<int64_t>(p.channels));

  using Sums = float[4 * kColumns];
  // Adds tap(kx) times each sample of the row at `at`, for both columns.
  const auto add_sample = [&](Format<T> format, const char* at, int m, Sums& sums, auto tap) {
    float values[4];
    at += m % kPhases * s.phase + m / kPhases * s.pixel;
    widen(load_pack<T, 4>(reinterpret_cast<const T*>(at)), format, values);
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      const int kx = kUp == 2 ? 2 * m - i : m - i * kDown;
      if (kx >= 0 && kx < 4) {
        const float f = tap(kx);
#pragma unroll
        for (int j = 0; j < 4; j++) sums[4 * i + j] += f * values[j];
      }
    }
  };
  // along_x(row, sums) filters a row; filter(ky, row, its result, sums) adds row ky of the filter.
  const auto walk = [&](Format<T> format, auto along_x, auto filter) {
    const char* own = ring + tx * s.pixel + c * static_cast<int>(sizeof(T));
    char* out = y;
    Waiting<kUp, kDown, 4 * kColumns> waiting;
    const auto take = [&](int k, int r, const char* row) {
      Sums passed = {};
      along_x(row, passed);
      waiting.take(
          k, r, [&](Sums& sums, int ky) { filter(ky, row, passed, sums); },
          [&](int j, const Sums& sums) {
            if (static_cast<unsigned>(j - skipped) < stored)
#pragma unroll
              for (int i = 0; i < kColumns; i++) {
                const float part[4] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2],
                                       sums[4 * i + 3]};
                if (i == 0 || both)
                  store_whole<T, 4>(reinterpret_cast<T*>(out + i * s.pixel_y),
                                    narrow<T, 4>(part, format));
              }
            out += s.row_y;
          });
    };
    int stage = 0;
    for (int r = 0; r < rows; r += 2) {
      copy_wait<kStages<kDown> - 2>();
      __syncthreads();  // this stage is there, and the one before has been read
      if (r + 2 * (kStages<kDown> - 1) < rows) copy_stage(stage > 0 ? stage - 2 * s.row : s.last);
      copy_batch();
      if (busy) {
        take(0, r, own + stage);
        take(1, r + 1, own + stage + s.row);
      }
      stage = stage < s.last ? stage + 2 * s.row : 0;
    }
  };

  const OuterProduct product(tap);
  if (product.exists) {
    float fx[4], fy[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      fx[k] = __shfl_sync(kAll, product.x, k) * gain;
      fy[k] = __shfl_sync(kAll, product.y, 4 * k);
    }
    with_format(Format<T>(p.dtype), [&](Format<T> format) {
      walk(
          format,
          [&](const char* row, Sums& passed) {
#pragma unroll
            for (int m = 0; m < kSamples; m++)
              add_sample(format, row, m, passed, [&](int kx) { return fx[kx]; });
          },
          [&](int ky, const char*, const Sums& passed, Sums& sums) {
#pragma unroll
            for (int j = 0; j < 4 * kColumns; j++) sums[j] += fy[ky] * passed[j];
          });
    });
  } else {
    // A loop, for want of registers.
    if (threadIdx.x < 16) taps[threadIdx.x] = tap * gain;
    walk(
        format, [](const char*, Sums&) {},
        [&](int ky, const char* row, const Sums&, Sums& sums) {
#pragma unroll 1
          for (int m = 0; m < kSamples; m++)
            add_sample(format, row, m, sums, [&](int kx) { return taps[4 * ky + kx]; });
        });
  }
}

// 4 taps along both axes; with up 2, an even padding.
template <typename T, int kUp, int kDown>
int launch_walk(Args p, void* stream) {
  using W = Walk<T, kUp, kDown>;
  const int64_t bytes = static_cast<int64_t>(p.channels) * sizeof(T), sms = sm_count();
  // Lines, unless much of the last would be empty.
  int chunk = kWalkBytes;
  while (chunk > 32 && 8 * ceil_div(bytes, chunk) * chunk > 9 * ceil_div(bytes, 32) * 32)
    chunk /= 2;
  const int64_t height = p.h.out + kUp - 1;
  int threads = kWalkThreads;
  int64_t shared = 0, strips = ceil_div(height, kWalkHeight);
  Strides s{};
  for (;;) {
    const int lanes = chunk / static_cast<int>(4 * sizeof(T)), granules = chunk / 16;
    // At least a warp, and a pixel of each phase for half of the threads.
    const int fewest = max(32, 2 * W::kPhases * granules);
    const int x = pow2_between(ceil_div(p.w.out, W::kColumns), max(fewest / lanes, 1),
                               max(threads, fewest) / lanes);
    threads = x * lanes;
    p.log2_c = log2_of(lanes);
    p.chunks = static_cast<int>(ceil_div(bytes, chunk));
    p.tile_w = x * W::kColumns;
    p.tiles_w = static_cast<int>(ceil_div(p.w.out, p.tile_w));
    p.columns = samples_for(p.w, p.tile_w);
    p.tile_h = static_cast<int>(ceil_div(height, strips * kUp)) * kUp;
    strips = ceil_div(height, p.tile_h);
    // Phases lie so that copies of neighbouring pixels meet all banks.
    int pixels = static_cast<int>(ceil_div(p.columns, W::kPhases));
    const int apart = max(8 / W::kPhases, granules);
    while (W::kPhases > 1 && granules < 8 && pixels * granules % (2 * apart) != apart) pixels++;
    s.pixel = chunk, s.phase = pixels * chunk, s.row = W::kPhases * s.phase;
    shared = 64 + int64_t(2) * kStages<kDown> * s.row;
    // Long strips only where their blocks fill the multiprocessors.
    const int64_t blocks = strips * p.tiles_w * p.images * p.chunks;
    const int filled = p.tile_h > 34 ? 1024 : p.tile_h > 17 ? 512 : p.tile_h > 9 ? 256 : 0;
    const bool least = threads == fewest && p.tile_h == kUp && chunk == 32;
    const bool enough = blocks >= sms && blocks * threads >= filled * sms;
    if (shared <= kSharedBytes && (least || enough)) break;
    if (least) return -1;
    if (shared <= kSharedBytes && p.tile_h > 9)
      strips *= 2;
    else if (shared <= kSharedBytes && chunk > 32)
      chunk /= 2, threads = kWalkThreads;
    else if (shared <= kSharedBytes && p.tile_h > kUp)
      strips *= 2;
    else
      threads /= 2;
  }
  if (strips > 65535 || p.chunks > 65535) return -1;
  s.last = 2 * (kStages<kDown> - 1) * s.row;
  s.across = threads / 2 * 16 / chunk;
  s.copy_ring = s.across / W::kPhases * chunk, s.copy_x = s.across * bytes;
  s.stage_x = 2 * p.w.in * bytes;
  s.pixel_y = bytes, s.row_y = p.w.out * bytes;
  return by_images(p, [&](const Args& q) {
    const dim3 grid(static_cast<unsigned>(q.tiles_w), static_cast<unsigned>(q.images * q.chunks),
                    static_cast<unsigned>(strips));
    GK_LAUNCH((upfirdn2d_walk_kernel<T, kUp, kDown>), grid, dim3(threads), static_cast<int>(shared),
              stream, q, s);
  });
}

}  // namespace
}  // namespace gankern
