// upfirdn2d in NCHW with 4 taps, where rows are whole vectors: no shared memory and no barrier.
//
// A thread walks down a strip of the image. Of each input row it reads one vector, gets from its
// neighbours in the warp the columns beside it, and adds what the row gives to the outputs that it
// meets, which wait in registers. kAhead rows are under way at any time. A filter that is an outer
// product, as the usual ones are, is applied along x and then along y.
#pragma once

#include "upfirdn2d.cuh"

namespace gankern {
namespace {

constexpr int kAhead = 4, kMostMarchThreads = 128;

// kBefore: columns that a thread's outputs meet before its own vector.
template <typename T, int kUp, int kDown, int kBefore>
struct March {
  static constexpr int kIn = sizeof(T) == 2 && kDown == 2 ? 8 : 4 / kUp;  // a thread's samples
  static constexpr int kOut = kIn * kUp / kDown;                          // of a row, and outputs
  static constexpr int kHalo = kUp == 2 ? 2 : 4 - kDown;                  // samples beside its own
  // The same in words, which are what threads exchange.
  static constexpr int kPer = 4 / sizeof(T), kOwn = kIn / kPer;
  static constexpr int kPrev = (kBefore + kPer - 1) / kPer;
  static constexpr int kNext = (kHalo - kBefore + kPer - 1) / kPer;
  static constexpr int kEdge = kPrev > kNext ? kPrev : kNext;
  static_assert(kEdge <= 2 && kPrev > 0 && kNext > 0, "read by one instruction");
  struct Row {
    Pack<unsigned, kOwn> own;
    Pack<unsigned, kEdge> edge;  // of the first lane before its own, of the last one behind it
  };
};

template <int kWords, typename T>
__device__ __forceinline__ Pack<unsigned, kWords> load_words(const T* p) {
  return load_pack<unsigned, kWords>(reinterpret_cast<const unsigned*>(p));
}

template <typename T, int kUp, int kDown, int kBefore>
__global__ void __launch_bounds__(kMostMarchThreads, 8) upfirdn2d_march_kernel(Args p) {
  using M = March<T, kUp, kDown, kBefore>;
  constexpr int kIn = M::kIn, kOwn = M::kOwn, kOut = M::kOut, kPer = M::kPer,
                kWords = M::kPrev + M::kOwn + M::kNext;
  constexpr int kEdge = M::kEdge, kPadded = kWords <= 4 ? 4 : 8;
  constexpr unsigned kAll = 0xffffffffu;
  // Lanes of a row in this warp; of a block's threads, 1 << log2_x are in a row.
  const int lane = threadIdx.x & 31, width = min(32, 1 << p.log2_x), at = lane & (width - 1);
  const bool first = at == 0, last = at == width - 1;
  const int t = (static_cast<int>(blockIdx.z) << p.log2_x) + (threadIdx.x & ((1 << p.log2_x) - 1));
  const int column = t * kIn + first_sample<kUp, kDown>(p.w, 0) + kBefore;
  // Rows of which a lane reads its vector, and that which is before or behind the warp's: all of
  // the image, or none.
  const bool needed = t * kOut <= p.w.out;
  const auto rows_if = [&](bool inside) {
    unsigned rows = needed && inside ? p.h.in : 0;
    forget(rows);
    return rows;
  };
  const unsigned rows = rows_if(column >= 0 && column < p.w.in);
  const unsigned rows_before = rows_if(first && column > 0 && column <= p.w.in);
  const unsigned rows_behind = rows_if(last && column >= -kIn && column + kIn < p.w.in);
  // Output rows [y0, y0 + height); with up 2 they begin with an odd one.
  const int strip = static_cast<int>(blockIdx.x) * (blockDim.x >> p.log2_x) +
                    static_cast<int>(threadIdx.x >> p.log2_x);
  const int y0 = strip * p.tile_h - (kUp - 1), iy0 = first_sample<kUp, kDown>(p.h, y0);
  const int skipped = y0 < 0 ? 1 : 0,
            height = t * kOut < p.w.out ? max(p.h.out - y0 - skipped, 0) : 0;
  const float tap = filter_tap<float>(p, lane >> 2 & 3, lane & 3);
  const float gain = static_cast<float>(p.gain);

  const int64_t image = blockIdx.y;
  const T* x = static_cast<const T*>(p.x) + image * p.h.in * p.w.in +
               (static_cast<int64_t>(iy0) * p.w.in + column);
  int iy = iy0;
  const auto next_row = [&] {
    typename M::Row row{};
    const unsigned at = iy;
    if (at < rows) row.own = load_words<kOwn>(x);
    if (at < rows_before) row.edge = load_words<kEdge>(x - kEdge * kPer);
    if (at < rows_behind) row.edge = load_words<kEdge>(x + kIn);
    x += p.w.in;
    iy++;
    return row;
  };
  typename M::Row ahead[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; k++)
    if (kUp == 1 || k < p.in_rows) ahead[k] = next_row();

  // filter(ky, window, along_x's result, sums) adds what row ky of the filter makes of a row.
  const auto march = [&](Format<T> format, auto along_x, auto filter) {
    T* y = static_cast<T*>(p.y) + image * p.h.out * p.w.out + static_cast<int64_t>(y0) * p.w.out +
           t * kOut;
    const auto store = [&](int row, const float (&out)[kOut]) {
      if (kUp == 2 ? static_cast<unsigned>(row - skipped) < static_cast<unsigned>(height)
                   : row < height)
        store_whole<T, kOut>(y, narrow<T, kOut>(out, format));
      y += p.w.out;
    };
    Waiting<kUp, kDown, kOut> waiting;
    for (int row = 0; row < p.in_rows; row += kAhead) {
#pragma unroll
      for (int k = 0; k < kAhead; k++) {
        if (kUp == 2 && k == 2 && p.in_rows == 2) break;
        Pack<unsigned, kPadded> words{};
        const unsigned* own = ahead[k].own.v;
        const unsigned* edge = ahead[k].edge.v;
#pragma unroll
        for (int i = 0; i < kWords; i++) {
          const int j = i - M::kPrev, n = j - M::kOwn;
          if (j < 0) {
            words.v[i] = __shfl_up_sync(kAll, own[M::kOwn + j], 1);
            if (first) words.v[i] = edge[kEdge + j];
          } else if (n < 0) {
            words.v[i] = own[j];
          } else {
            words.v[i] = __shfl_down_sync(kAll, own[n], 1);
            if (last) words.v[i] = edge[n];
          }
        }
        if (row + kAhead < p.in_rows) ahead[k] = next_row();
        float samples[kPadded * kPer];
        widen(*reinterpret_cast<Pack<T, kPadded * kPer>*>(&words), format, samples);
        const float* window = samples + M::kPrev * kPer - kBefore;

        float passed[kOut];
        along_x(window, passed);
        waiting.take(
            k, row + k, [&](float (&sums)[kOut], int ky) { filter(ky, window, passed, sums); },
            store);
      }
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
      march(
          format,
          [&](const float* window, float* passed) {
#pragma unroll
            for (int j = 0; j < kOut; j++) {
              float sum = 0.f;
#pragma unroll
              for (int kx = j % kUp; kx < 4; kx += kUp)
                sum += fx[kx] * window[(j * kDown + kx) / kUp];
              passed[j] = sum;
            }
          },
          [&](int ky, const float*, const float* passed, float (&sums)[kOut]) {
#pragma unroll
            for (int j = 0; j < kOut; j++) sums[j] += fy[ky] * passed[j];
          });
    });
  } else {
    // Taps stay in their lanes, for want of registers.
    const float scaled = tap * gain;
    march(
        Format<T>(p.dtype), [](const float*, float*) {},
        [scaled](int ky, const float* window, const float*, float (&sums)[kOut]) {
          float f[4];
#pragma unroll
          for (int kx = 0; kx < 4; kx++) f[kx] = __shfl_sync(kAll, scaled, 4 * ky + kx);
#pragma unroll
          for (int j = 0; j < kOut; j++)
#pragma unroll
            for (int kx = j % kUp; kx < 4; kx += kUp)
              sums[j] += f[kx] * window[(j * kDown + kx) / kUp];
        });
  }
}

template <typename T, int kUp, int kDown, int kBefore>
int launch_march(Args p, void* stream) {
  using M = March<T, kUp, kDown, kBefore>;
  if (p.w.in % M::kIn || p.w.out % M::kOut) return -1;
  const int64_t lanes = p.w.out / M::kOut, wanted = sm_count();
  const int x = pow2_between(lanes, 2, kMostMarchThreads);
  int threads = kMostMarchThreads;
  const auto blocks = [&] {
    return ceil_div(p.h.out + kUp - 1, static_cast<int64_t>(p.tile_h) * (threads / x)) *
           ceil_div(lanes, x) * p.images;
  };
  p.log2_x = log2_of(x);
  // Strips as long as there are enough of them, 32 warps for each multiprocessor. The shortest make
  // an output row, and with up 2 two, of which the next strip reads a row again: where few warps
  // are.
  for (p.in_rows = 8 * kAhead;; p.in_rows /= 2) {
    p.tile_h = Waiting<kUp, kDown, M::kOut>::outputs(p.in_rows);
    const int64_t warps = blocks() * (threads / 32);
    const bool short_enough = kUp == 1 || warps >= 8 * wanted || p.in_rows == 2;
    if (warps >= 32 * wanted || (p.in_rows <= kAhead && short_enough)) break;
  }
  while (threads > max(x, 32) && blocks() < wanted) threads /= 2;
  const int64_t z = ceil_div(lanes, x);
  if (z > 65535) return -1;
  const auto strips = static_cast<unsigned>(
      ceil_div(p.h.out + kUp - 1, static_cast<int64_t>(p.tile_h) * (threads / x)));
  return by_images(p, [&](const Args& q) {
    GK_LAUNCH((upfirdn2d_march_kernel<T, kUp, kDown, kBefore>),
              dim3(strips, static_cast<unsigned>(q.images), static_cast<unsigned>(z)),
              dim3(threads), 0, stream, q);
  });
}

// 4 taps along both axes: the launch's error, or -1 where rows are not whole vectors.
template <typename T, int kUp, int kDown>
int try_march(const Args& p, void* stream) {
  if (kUp == 2 && (p.w.pad % 2 || p.h.pad % 2)) return -1;
  constexpr int kIn = March<T, kUp, kDown, 1>::kIn;
  const int before = ((p.w.pad / kUp) % kIn + kIn) % kIn;
  if (before == 1) return launch_march<T, kUp, kDown, 1>(p, stream);
  if constexpr (kUp == 1 && kDown == 1)
    if (before == 2) return launch_march<T, kUp, kDown, 2>(p, stream);
  return -1;
}

}  // namespace
}  // namespace gankern
