// upfirdn2d in NCHW, with factors and taps compiled in: see upfirdn2d.cu.
#pragma once

#include "upfirdn2d.cuh"

namespace gankern {
namespace {

constexpr int kPlaneThreads = 512, kWidestRow = 72;  // threads

template <int kUp, int kDown, int kTaps, bool kSeparable>
struct Planes {
  static constexpr int kMeet = kTaps / kUp;  // taps that meet an output
  // Output rows of a thread: one where the tile is large, for more threads to share it.
  static constexpr int kRows = kUp == 4 ? 4 : kDown == 4 || (kDown == 2 && kSeparable) ? 1 : 2;
  static constexpr int kFilter = (kSeparable ? 2 * kTaps : kTaps * kTaps + 3) / 4 * 4;
  // Samples of one phase in the window of 4 outputs, and the floats of a shared-memory read.
  static constexpr int kWindow = kUp == 1 ? 3 + (kTaps + kDown - 1) / kDown : 4 / kUp + kMeet;
  static constexpr int kRead = 4 / kUp;
  static constexpr int kPadded = (kWindow + kRead - 1) / kRead * kRead;
  static constexpr int in_rows(int rows) {
    return kUp == 1 ? (rows - 1) * kDown + kTaps : rows / kUp + kMeet;
  }
  // Floats of one phase in a row of the tile for `columns` outputs (a multiple of 4).
  static constexpr int phase_size(int columns) {
    return ((columns - 4) / kUp + kPadded + 3) / 4 * 4;
  }
};

// Copies the rows and columns that the tile needs; what lies outside of the image becomes zero.
// Global vectors are aligned whatever the row's own alignment, and so overlap the tile's edges, by
// whole sectors. Rows are kept split into `down` phases, each phase of all rows together, so that a
// warp that wraps to the next row continues there in the next banks. The elements of a vector are
// stored in an order that differs between lanes: no bank conflicts.
template <int kDown, typename T>
__device__ __forceinline__ void load_tile(const Args& p, float* tile, int64_t image, int ix0,
                                          int iy0) {
  constexpr int N = 16 / sizeof(T), kBatch = N == 8 ? 2 : kDown == 2 ? 3 : 4, kSector = 2 * N;
  // Offsets in a plane fit into 32 bits; `before` and `behind` are the tensor's ends seen from it.
  const int64_t plane = image * p.h.in * p.w.in, left = (p.images - image) * p.h.in * p.w.in;
  const T* x = static_cast<const T*>(p.x) + plane;
  const int before = plane < kSector ? -static_cast<int>(plane) : -kSector;
  const int behind = static_cast<int>(min(left, int64_t(INT32_MAX) - kSector));
  const int misaligned =
      static_cast<int>(reinterpret_cast<uintptr_t>(x) / sizeof(T)) & (kSector - 1);
  const int pitch = p.pitch / kDown, phase = p.in_rows * pitch, lane = threadIdx.x % 32;
  const int lo = max(0, -ix0), hi = max(lo, min(p.columns, p.w.in - ix0));

  const int per_row = p.pitch / N;  // an even number
  const int step_r = quotient(blockDim.x, p.magic_row), step_v = blockDim.x - step_r * per_row;
  int r = quotient(threadIdx.x, p.magic_row), v = threadIdx.x - r * per_row;
  const int turn = kDown * (lane / max(1, 32 * kDown / N)) % N;
  const auto advance = [&](int& row, int& vec) {
    row += step_r;
    vec += step_v;
    if (vec >= per_row) {
      vec -= per_row;
      row++;
    }
  };
  const auto start_of = [&](int iy) {  // of the tile's row; unsigned, for rows far outside
    return static_cast<int>(static_cast<unsigned>(iy) * static_cast<unsigned>(p.w.in) +
                            static_cast<unsigned>(ix0));
  };
  const auto column = [&](int start, int vec) {
    return vec * N - ((start + misaligned) & (kSector - 1));
  };
  while (r < p.in_rows) {
    Pack<T, N> packs[kBatch];
    int r2 = r, v2 = v;
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int iy = iy0 + r;
      const int start = start_of(iy), c = column(start, v), sector = c - (v & 1) * N;
      packs[b] = Pack<T, N>{};
      if (r < p.in_rows && iy >= 0 && iy < p.h.in && sector + kSector > lo && sector < hi) {
        if (start + c >= before && start + c + N <= behind) {
          packs[b] = load_pack<T, N>(x + (start + c));
        } else {
#pragma unroll
          for (int e = 0; e < N; e++)
            if (start + c + e >= before && start + c + e < behind) packs[b].v[e] = x[start + c + e];
        }
      }
      advance(r, v);
    }
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int iy = iy0 + r2;
      const int c = column(start_of(iy), v2);
      float values[N];
      widen(packs[b], Format<T>(p.dtype), values);
#pragma unroll
      for (int bit = kDown; bit < N; bit *= 2) {
        float turned[N];
#pragma unroll
        for (int e = 0; e < N; e++) turned[e] = turn & bit ? values[(e + bit) % N] : values[e];
#pragma unroll
        for (int e = 0; e < N; e++) values[e] = turned[e];
      }
      // Rows outside of the image were not loaded, and are zero.
      unrolled<N>([&](auto which) {
        constexpr int e = decltype(which)::value;
        const int at = c + ((e + turn) & (N - 1));
        if (r2 < p.in_rows && at >= 0)
          tile[r2 * pitch + at % kDown * phase + at / kDown] =
              at >= lo && at < hi ? values[e] : 0.f;
      });
      advance(r2, v2);
    }
  }
}

template <int kFloats>
__device__ __forceinline__ void read(float* out, const float* in) {
  if constexpr (kFloats == 4) {
    const float4 v = *reinterpret_cast<const float4*>(in);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  } else if constexpr (kFloats == 2) {
    const float2 v = *reinterpret_cast<const float2*>(in);
    out[0] = v.x, out[1] = v.y;
  } else {
    out[0] = *in;
  }
}

// Adds to the 4 outputs that start at column 4 * tx what they take from a row of the tile;
// w: [up][meet] taps of each phase. late(j): output j of a phase group starts one sample later.
template <typename P, int kUp, int kDown, int kTaps>
struct RowWindow {
  float v[kDown][P::kPadded];
  __device__ __forceinline__ RowWindow(const float* row, int phase) {
#pragma unroll
    for (int d = 0; d < kDown; d++)
#pragma unroll
      for (int i = 0; i < P::kPadded; i += P::kRead) read<P::kRead>(v[d] + i, row + d * phase + i);
  }
  __device__ __forceinline__ void add(float* acc, const float* w, int qx) const {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int m = 0; m < P::kMeet; m++) {
        if constexpr (kUp == 1) {
          acc[j] += w[m] * v[m % kDown][j + m / kDown];
        } else {
          const int at = j / kUp + m;
          const float sample = j % kUp > qx ? v[0][at + 1] : v[0][at];
          acc[j] += w[j % kUp * P::kMeet + m] * sample;
        }
      }
  }
};

template <typename T>
__device__ __forceinline__ void store_rows(const Args& p, const float (*acc)[4], int rows,
                                           float* stage, int64_t image, int ox0, int oy0, int tx,
                                           int ty) {
  const Format<T> format(p.dtype);
  T* y = static_cast<T*>(p.y) + image * p.h.out * p.w.out;
  if (p.w.out % 4 == 0) {
    const int ox = ox0 + 4 * tx;
    for (int r = 0; r < rows; r++) {
      const int oy = oy0 + ty * rows + r;
      if (oy >= p.h.out || ox >= p.w.out) break;
      store_pack<T, 4>(y + static_cast<int64_t>(oy) * p.w.out + ox, narrow<T, 4>(acc[r], format));
    }
    return;
  }
  // Rows of unaligned length: through shared memory, so that a warp writes consecutive elements,
  // from the start of a sector on.
  constexpr int kSector = 32 / sizeof(T);
  __syncthreads();
  for (int r = 0; r < rows; r++)
    *reinterpret_cast<float4*>(stage + (ty * rows + r) * p.tile_w + 4 * tx) =
        make_float4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
  __syncthreads();
  const int height = min(p.tile_h, p.h.out - oy0);
  y += static_cast<int64_t>(oy0) * p.w.out + ox0;
  const auto before = [&] {
    return static_cast<int>(reinterpret_cast<uintptr_t>(y) / sizeof(T) % kSector);
  };
  // Whole warps alone, for whole sectors.
  const int t = threadIdx.x, all = blockDim.x, threads = all < 32 ? all : all / 32 * 32;
  if (t >= threads) return;
  if (p.tiles_w == 1) {  // the tile's rows follow each other in memory
    int c = t - before(), r = 0;
    for (int e = c; e < height * p.w.out; e += threads, c += threads) {
      for (; c >= p.w.out; c -= p.w.out) r++;
      if (e >= 0) y[e] = from_acc<T>(stage[r * p.tile_w + c], format);
    }
    return;
  }
  const int columns = min(p.tile_w, p.w.out - ox0), warps = max(1, threads / 32);
  y += static_cast<int64_t>(t / 32) * p.w.out;
  for (int r = t / 32; r < height; r += warps) {
    for (int c = t % 32 - before(); c < columns; c += min(32, threads))
      if (c >= 0) y[c] = from_acc<T>(stage[r * p.tile_w + c], format);
    y += static_cast<int64_t>(warps) * p.w.out;
  }
}

template <int kUp, int kDown, int kTaps, bool kSeparable>
__global__ void __launch_bounds__(kPlaneThreads, 2) upfirdn2d_planes_kernel(Args p) {
  using P = Planes<kUp, kDown, kTaps, kSeparable>;
  constexpr int kRows = P::kRows, kMeet = P::kMeet;
  GK_DYNAMIC_SHARED(float, f);
  float* tile = f + P::kFilter;
  const int pitch = p.pitch / kDown, phase = p.in_rows * pitch;
  const int ty = quotient(threadIdx.x, p.magic_x), tx = threadIdx.x - ty * (p.tile_w / 4);
  const int ox0 = static_cast<int>(blockIdx.x) * p.tile_w;
  const int oy0 = static_cast<int>(blockIdx.z) * p.tile_h;
  const int ix0 = first_sample<kUp, kDown>(p.w, ox0), iy0 = first_sample<kUp, kDown>(p.h, oy0);
  // Phases: output j has its first tap at (q - j) mod up, and starts late where j mod up > q.
  const int qx = (p.w.pad % kUp + kUp) % kUp, qy = (p.h.pad % kUp + kUp) % kUp;
  const auto tap = [&](int q, int i) { return (q - i / kMeet + kUp) % kUp + i % kMeet * kUp; };
  const float gain = static_cast<float>(p.gain);
  for (int i = threadIdx.x; i < (kSeparable ? kTaps : kTaps * kTaps); i += blockDim.x) {
    if constexpr (kSeparable) {
      f[i] = filter_tap<float>(p, tap(qx, i)) * gain;
      f[kTaps + i] = filter_tap<float>(p, tap(qy, i));
    } else {
      f[i] = filter_tap<float>(p, tap(qy, i / kTaps), tap(qx, i % kTaps)) * gain;
    }
  }

  for (int64_t image = blockIdx.y; image < p.images; image += gridDim.y) {
    __syncthreads();
    if (p.dtype == kF32)
      load_tile<kDown, float>(p, tile, image, ix0, iy0);
    else
      load_tile<kDown, Half16>(p, tile, image, ix0, iy0);
    __syncthreads();

    float acc[kRows][4] = {};
    if constexpr (kSeparable) {
      float* mid = tile + p.in_rows * p.pitch;
      for (int r = ty; r < p.in_rows; r += p.threads_y) {
        const RowWindow<P, kUp, kDown, kTaps> window(tile + r * pitch + P::kRead * tx, phase);
        float sum[4] = {};
        window.add(sum, f, qx);
        *reinterpret_cast<float4*>(mid + r * p.tile_w + 4 * tx) =
            make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
      __syncthreads();
      const float* column = mid + 4 * tx;
      const auto add = [&](int jr, int row, float w) {
        float v[4];
        read<4>(v, column + row * p.tile_w);
#pragma unroll
        for (int j = 0; j < 4; j++) acc[jr][j] += w * v[j];
      };
      if constexpr (kUp == 1) {
#pragma unroll
        for (int r = 0; r < (kRows - 1) * kDown + kTaps; r++) {
          float v[4];
          read<4>(v, column + (ty * kRows * kDown + r) * p.tile_w);
#pragma unroll
          for (int jr = 0; jr < kRows; jr++) {
            const int ky = r - jr * kDown;
            if (ky < 0 || ky >= kTaps) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) acc[jr][j] += f[kTaps + ky] * v[j];
          }
        }
      } else {
#pragma unroll
        for (int jr = 0; jr < kRows; jr++)
#pragma unroll
          for (int m = 0; m < kMeet; m++)
            add(jr, ty * (kRows / kUp) + jr / kUp + (jr % kUp > qy ? 1 : 0) + m,
                f[kTaps + jr % kUp * kMeet + m]);
      }
    } else if constexpr (kUp == 1) {
      const float* row = tile + ty * kRows * kDown * pitch + 4 * tx;
#pragma unroll
      for (int r = 0; r < (kRows - 1) * kDown + kTaps; r++, row += pitch) {
        const RowWindow<P, kUp, kDown, kTaps> window(row, phase);
#pragma unroll
        for (int jr = 0; jr < kRows; jr++)
          if (r - jr * kDown >= 0 && r - jr * kDown < kTaps)
            window.add(acc[jr], f + (r - jr * kDown) * kTaps, qx);
      }
    } else {
      const float* row = tile + ty * (kRows / kUp) * pitch + P::kRead * tx;
#pragma unroll
      for (int jr = 0; jr < kRows; jr++)
#pragma unroll
        for (int m = 0; m < kMeet; m++) {
          const int at = jr / kUp + (jr % kUp > qy ? 1 : 0) + m;
          const RowWindow<P, kUp, kDown, kTaps> window(row + at * pitch, phase);
          window.add(acc[jr], f + (jr % kUp * kMeet + m) * kTaps, qx);
        }
    }

    if (p.dtype == kF32)
      store_rows<float>(p, acc, kRows, tile, image, ox0, oy0, tx, ty);
    else
      store_rows<Half16>(p, acc, kRows, tile, image, ox0, oy0, tx, ty);
  }
}

template <int kUp, int kDown, int kTaps, bool kSeparable>
int launch_planes(Args p, void* stream) {
  using P = Planes<kUp, kDown, kTaps, kSeparable>;
  // Threads along x: a multiple of 8, whose 16-byte accesses go together. Rows of unaligned length
  // are made whole where they are short, since their ends share sectors.
  const int vector = p.dtype == kF32 ? 4 : 8, groups = static_cast<int>(ceil_div(p.w.out, 4));
  const int widest = kDown == 4 || (kDown == 2 && kSeparable) ? 16 : 32;
  int x = groups < 8 ? pow2_between(groups, 1, 8) : min((groups + 7) / 8 * 8, widest);
  if (kDown == 1 && !kSeparable && p.w.out % 4 && groups > widest && groups <= kWidestRow)
    x = (groups + 7) / 8 * 8;
  const int threads = kDown == 1 && !kSeparable ? kPlaneThreads : kDown == 4 ? 128 : 256;
  int y = max(1, min(threads / x, static_cast<int>(ceil_div(p.h.out, P::kRows))));
  const int64_t wanted = sm_count();
  int shared = 0;
  for (;;) {
    p.tile_w = 4 * x;
    p.tile_h = y * P::kRows;
    p.tiles_w = static_cast<int>(ceil_div(p.w.out, p.tile_w));
    p.columns = kUp == 1 ? (p.tile_w - 1) * kDown + kTaps : p.tile_w / kUp + P::kMeet;
    // Whole sectors, one more than the columns fill.
    const int unit = max(2 * vector, 4 * kDown);
    const int least = max(kDown * P::phase_size(p.tile_w), p.columns) + 2 * vector - 1;
    p.pitch = static_cast<int>(ceil_div(least, unit)) * unit;
    p.in_rows = P::in_rows(p.tile_h);
    int floats = p.in_rows * (p.pitch + (kSeparable ? p.tile_w : 0));
    if (p.w.out % 4) floats = max(floats, p.tile_h * p.tile_w);
    shared = 4 * (P::kFilter + floats);
    const int64_t blocks = ceil_div(p.h.out, p.tile_h) * p.tiles_w * p.images;
    if (y * x <= 32 || (shared <= kSharedBytes && blocks >= wanted)) break;
    // Fewer outputs a block: the squarer the tile, the smaller its halo.
    if (y == 1 || (p.tile_w > 4 * p.tile_h && x > 8))
      x = (x / 2 + 7) / 8 * 8;
    else
      y /= 2;
  }
  if (!has_grid3(p)) return -1;
  p.threads_y = y;
  p.magic_x = magic_of(x), p.magic_row = magic_of(p.pitch / vector);
  GK_LAUNCH((upfirdn2d_planes_kernel<kUp, kDown, kTaps, kSeparable>), grid3_of(p), dim3(x * y),
            shared, stream, p);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace gankern
