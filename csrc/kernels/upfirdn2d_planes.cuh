// upfirdn2d in NCHW, with factors and taps compiled in: see upfirdn2d.cu.
#pragma once

#include "upfirdn2d.cuh"

namespace gankern {
namespace {

constexpr int kPlaneThreads = 512, kWidestRow = 72;  // threads

// A thread makes 4 columns of the output. Columns of the tile are kept split into kVec phases, the
// columns that a thread's window advances by over kDown: column c at [c % kVec][row][c / kVec], so
// that a warp's accesses fall into different banks wherever its vectors begin.
// kFew: fewer rows of output, for tensors too small to fill the device otherwise.
template <int kUp, int kDown, int kTaps, bool kSeparable, bool kFew>
struct Planes {
  static constexpr int kMeet = kTaps / kUp;  // taps that meet an output
  static constexpr int kVec = 4 / kUp;
  // Whether filters that are outer products are applied along x and then along y.
  static constexpr bool kProduct = kTaps == 4 && kUp == 1 && kDown < 4;
  // Output rows of a thread: one where the tile is large, for more threads to share it.
  static constexpr int kRows = kUp == 4                                   ? 4
                               : kDown == 4 || (kDown == 2 && kSeparable) ? 1
                               : kProduct                                 ? (kFew ? 2 : 8) / kDown
                                                                          : 2;
  static constexpr int kProductAt = kTaps * kTaps;  // among the taps: x, y, whether it exists
  static constexpr int kFilter =
      (kSeparable ? 2 * kTaps : kTaps * kTaps + (kProduct ? 9 : 0) + 3) / 4 * 4;
  // The window of 4 outputs, and positions of a phase that its reads take.
  static constexpr int kWindow = kUp == 1 ? 3 * kDown + kTaps : kVec + kMeet;
  static constexpr int kReads = (kWindow + kVec * kDown - 1) / (kVec * kDown) * kDown;
  static constexpr int in_rows(int rows) {
    return kUp == 1 ? (rows - 1) * kDown + kTaps : rows / kUp + kMeet;
  }
};

// Stores floats to shared memory, at addresses in bytes that are kept as numbers: given a pointer,
// the compiler finds the base again for each store that depends on a condition.
#ifdef __CUDA_ARCH__
using SharedAddress = unsigned;
__device__ __forceinline__ SharedAddress shared_address(float* p) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(p));
  forget(address);
  return address;
}
__device__ __forceinline__ void store_shared(SharedAddress to, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}
#else
using SharedAddress = char*;
__device__ __forceinline__ SharedAddress shared_address(float* p) {
  return reinterpret_cast<char*>(p);
}
__device__ __forceinline__ void store_shared(SharedAddress to, float v) {
  *reinterpret_cast<float*>(to) = v;
}
#endif

// Where the tile reaches beyond the image, it is made zero: load_tile() writes what lies inside.
__device__ __forceinline__ void clear_tile(const Args& p, float* tile, int floats, int ix0,
                                           int iy0) {
  if (ix0 >= 0 && ix0 <= p.w.in - p.columns && iy0 >= 0 && iy0 <= p.h.in - p.in_rows) return;
  for (int i = threadIdx.x; i < floats / 4; i += blockDim.x)
    reinterpret_cast<float4*>(tile)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  __syncthreads();
}

// Copies the rows and columns that the tile needs. Global vectors are aligned whatever the row's
// own alignment, and a row's first one begins a sector. A thread reads one vector of every
// `step`-th row.
template <int kVec, typename T>
__device__ __forceinline__ void load_tile(const Args& p, float* tile, int64_t image, int ix0,
                                          int iy0) {
  constexpr int kBatch = 4, kSector = 32 / sizeof(T), kShift = kVec / 2;  // log2 of kVec
  const Format<T> format(p.dtype);
  const SharedAddress base = shared_address(tile);
  const int phase = 4 * p.phase, wrap = 4 - (kVec - 1) * phase;  // bytes
  const int lo = max(0, -ix0), hi = min(p.columns, p.w.in - ix0);
  const unsigned inside = max(hi - lo, 0);
  const int last = min(p.in_rows, p.h.in - iy0);
  const int step = max(quotient(blockDim.x, p.magic_row), 1);
  const int row0 = quotient(threadIdx.x, p.magic_row), first = row0 + max(0, -iy0);
  if (row0 >= step) return;
  // Whole sectors are read, unless the tensor may end within.
  const int64_t plane = static_cast<int64_t>(p.h.in) * p.w.in;
  const T* x = static_cast<const T*>(p.x) + image * plane;
  const int64_t ahead = image * plane + static_cast<int64_t>(max(iy0, 0)) * p.w.in;
  const bool whole =
      ahead >= kSector &&
      (p.images * plane - ahead) - static_cast<int64_t>(last - max(-iy0, 0)) * p.w.in >= kSector;
  const int64_t stride = static_cast<int64_t>(step) * p.w.in;
  for (int v = threadIdx.x - row0 * p.vectors; v < p.vectors; v += blockDim.x) {
    const int in_sector = v * kVec % kSector;
    const int least = lo - kSector + in_sector, most = hi + in_sector;
    const T* row = x + (static_cast<int64_t>(iy0 + first) * p.w.in + ix0);
    for (int r = first; r < last; r += step * kBatch) {
      Pack<T, kVec> packs[kBatch] = {};
      int columns[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int c =
            v * kVec - static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kSector);
        const bool needed = r + b * step < last && c > least && c < most;
        columns[b] = needed ? c : -kVec;
        if (needed) {
          if (whole) {
            packs[b] = load_pack<T, kVec>(row + c);
          } else {
            const T* begin = static_cast<const T*>(p.x);
            const T* end = begin + p.images * plane;
            if (row + c >= begin && row + c + kVec <= end) {
              packs[b] = load_pack<T, kVec>(row + c);
            } else {
#pragma unroll
              for (int e = 0; e < kVec; e++)
                if (row + c + e >= begin && row + c + e < end) packs[b].v[e] = row[c + e];
            }
          }
        }
        row += stride;
      }
      unrolled<kBatch>([&](auto batch) {
        constexpr int kAt = decltype(batch)::value;
        float values[kVec];
        widen(packs[kAt], format, values);
        const int c = columns[kAt], turn = c & (kVec - 1);
        SharedAddress to = base + ((r + kAt * step) * p.pitch + (c >> kShift)) * 4 + turn * phase;
        unrolled<kVec>([&](auto which) {
          constexpr int e = decltype(which)::value;
          if (static_cast<unsigned>(c + e - lo) < inside) store_shared(to, values[e]);
          to += turn == kVec - 1 - e ? wrap : phase;
        });
      });
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

// The samples that a thread's 4 outputs meet in a row of the tile. add(): what these outputs take
// from them; w: [up][meet] taps of each phase. Output j starts one sample later if j % up > qx.
template <typename P, int kUp, int kDown>
struct RowWindow {
  float v[P::kReads * P::kVec];
  __device__ __forceinline__ RowWindow(const float* row, int phase) {
#pragma unroll
    for (int i = 0; i < P::kReads; i += kDown)
#pragma unroll
      for (int f = 0; f < P::kVec; f++) {
        if (i * P::kVec + f >= P::kWindow) continue;
        float some[kDown];
        read<kDown>(some, row + f * phase + i);
#pragma unroll
        for (int d = 0; d < kDown; d++) v[(i + d) * P::kVec + f] = some[d];
      }
  }
  __device__ __forceinline__ void add(float* acc, const float* w, int qx) const {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int m = 0; m < P::kMeet; m++) {
        if constexpr (kUp == 1) {
          acc[j] += w[m] * v[j * kDown + m];
        } else {
          const int at = j / kUp + m;
          acc[j] += w[j % kUp * P::kMeet + m] * (j % kUp > qx ? v[at + 1] : v[at]);
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

template <int kUp, int kDown, int kTaps, bool kSeparable, bool kFew>
__global__ void __launch_bounds__(kPlaneThreads, 2) upfirdn2d_planes_kernel(Args p) {
  using P = Planes<kUp, kDown, kTaps, kSeparable, kFew>;
  constexpr int kRows = P::kRows, kMeet = P::kMeet;
  GK_DYNAMIC_SHARED(float, f);
  float* tile = f + P::kFilter;
  const int pitch = p.pitch, phase = p.phase;
  const int ox0 = static_cast<int>(blockIdx.x) * p.tile_w;
  const int oy0 = static_cast<int>(blockIdx.z) * p.tile_h;
  const int ix0 = first_sample<kUp, kDown>(p.w, ox0), iy0 = first_sample<kUp, kDown>(p.h, oy0);
  // Phases: output j has its first tap at (q - j) mod up, and starts late where j mod up > q.
  const int qx = (p.w.pad % kUp + kUp) % kUp, qy = (p.h.pad % kUp + kUp) % kUp;
  const auto tap = [&](int q, int i) { return (q - i / kMeet + kUp) % kUp + i % kMeet * kUp; };
  // With up 4, filters of 2 and 6 taps are longer by zeros.
  const auto tap_at = [&](int ky, int kx) {
    const bool exists = kUp < 4 || kSeparable || (ky < p.h.taps && kx < p.w.taps);
    return exists ? filter_tap<float>(p, ky, kx) : 0.f;
  };
  const float gain = static_cast<float>(p.gain);
  for (int i = threadIdx.x; i < (kSeparable ? kTaps : kTaps * kTaps); i += blockDim.x) {
    if constexpr (kSeparable) {
      f[i] = filter_tap<float>(p, tap(qx, i)) * gain;
      f[kTaps + i] = filter_tap<float>(p, tap(qy, i));
    } else {
      f[i] = tap_at(tap(qy, i / kTaps), tap(qx, i % kTaps)) * gain;
    }
  }
  if constexpr (P::kProduct) {
    float* product = f + P::kProductAt;
    if (blockDim.x < 32) {
      if (threadIdx.x == 0) product[8] = 0.f;
    } else if (threadIdx.x < 32) {
      const int i = threadIdx.x & 15;
      const OuterProduct found(filter_tap<float>(p, i >> 2, i & 3));
      if (threadIdx.x < 4) product[i] = found.x * gain;
      if (threadIdx.x < 16 && i % 4 == 0) product[4 + i / 4] = found.y;
      if (threadIdx.x == 0) product[8] = found.exists ? 1.f : 0.f;
    }
  }

  const int image = blockIdx.y;
  clear_tile(p, tile, P::kVec * phase, ix0, iy0);
  if (p.dtype == kF32)
    load_tile<P::kVec, float>(p, tile, image, ix0, iy0);
  else
    load_tile<P::kVec, Half16>(p, tile, image, ix0, iy0);
  __syncthreads();

  const int ty = quotient(threadIdx.x, p.magic_x), tx = threadIdx.x - ty * (p.tile_w / 4);
  float acc[kRows][4] = {};
  if constexpr (kSeparable) {
    float* mid = tile + P::kVec * phase;
    for (int r = ty; r < p.in_rows; r += p.threads_y) {
      const RowWindow<P, kUp, kDown> window(tile + r * pitch + kDown * tx, phase);
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
    const float* row = tile + ty * kRows * kDown * pitch + kDown * tx;
    bool product = false;
    if constexpr (P::kProduct) {
      product = f[P::kProductAt + 8] != 0.f;
      if (product) {
        float fx[4], fy[4];
        read<4>(fx, f + P::kProductAt);
        read<4>(fy, f + P::kProductAt + 4);
#pragma unroll
        for (int r = 0; r < (kRows - 1) * kDown + kTaps; r++, row += pitch) {
          const RowWindow<P, kUp, kDown> window(row, phase);
          float passed[4] = {};
          window.add(passed, fx, qx);
#pragma unroll
          for (int jr = 0; jr < kRows; jr++) {
            const int ky = r - jr * kDown;
            if (ky < 0 || ky >= kTaps) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) acc[jr][j] += fy[ky] * passed[j];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < (kRows - 1) * kDown + kTaps; r++, row += pitch) {
      if (product) break;
      const RowWindow<P, kUp, kDown> window(row, phase);
#pragma unroll
      for (int jr = 0; jr < kRows; jr++)
        if (r - jr * kDown >= 0 && r - jr * kDown < kTaps)
          window.add(acc[jr], f + (r - jr * kDown) * kTaps, qx);
    }
  } else {
    const float* row = tile + ty * (kRows / kUp) * pitch + tx;
#pragma unroll
    for (int jr = 0; jr < kRows; jr++)
#pragma unroll
      for (int m = 0; m < kMeet; m++) {
        const int at = jr / kUp + (jr % kUp > qy ? 1 : 0) + m;
        const RowWindow<P, kUp, kDown> window(row + at * pitch, phase);
        window.add(acc[jr], f + (jr % kUp * kMeet + m) * kTaps, qx);
      }
  }

  if (p.dtype == kF32)
    store_rows<float>(p, acc, kRows, tile, image, ox0, oy0, tx, ty);
  else
    store_rows<Half16>(p, acc, kRows, tile, image, ox0, oy0, tx, ty);
}

template <int kUp, int kDown, int kTaps, bool kSeparable, bool kFew = false>
int launch_planes(Args p, void* stream) {
  using P = Planes<kUp, kDown, kTaps, kSeparable, kFew>;
  const int64_t wanted = sm_count();
  if constexpr (P::kProduct && !kFew) {  // less than 4 warps for each multiprocessor
    const int64_t threads = p.images * ceil_div(p.h.out, P::kRows) * ceil_div(p.w.out, 4);
    if (threads < 4 * 32 * wanted)
      return launch_planes<kUp, kDown, kTaps, kSeparable, true>(p, stream);
  }
  // Threads along x: a multiple of 8, whose 16-byte accesses go together. Rows of unaligned length
  // are made whole where they are short, since their ends share sectors.
  const int groups = static_cast<int>(ceil_div(p.w.out, 4)), sector = p.dtype == kF32 ? 8 : 16;
  const int widest = kDown == 4 || (kDown == 2 && kSeparable) ? 16 : 32;
  int x = groups < 8 ? pow2_between(groups, 1, 8) : min((groups + 7) / 8 * 8, widest);
  if (kDown == 1 && !kSeparable && p.w.out % 4 && groups > widest && groups <= kWidestRow)
    x = (groups + 7) / 8 * 8;
  const int threads = kDown == 1 && !kSeparable && !P::kProduct ? kPlaneThreads
                      : kDown == 4                              ? 128
                                                                : 256;
  int y = max(1, min(threads / x, static_cast<int>(ceil_div(p.h.out, P::kRows))));
  const int fewest = kFew ? 64 : 32;  // threads; more read a tile in fewer turns
  int shared = 0;
  for (;;) {
    p.tile_w = 4 * x;
    p.tile_h = y * P::kRows;
    p.tiles_w = static_cast<int>(ceil_div(p.w.out, p.tile_w));
    p.pitch = kDown * (x - 1) + P::kReads;
    p.columns = P::kVec * p.pitch;
    p.vectors = static_cast<int>(ceil_div(p.columns + sector - 1, sector)) * (sector / P::kVec);
    // A warp that goes on to the next rows of threads continues in the next banks.
    const int rows = kSeparable ? 1 : P::kRows * kDown / kUp;
    for (int i = 0; i < 32 && x % 8 == 0 && x % (32 / kDown) && (rows * p.pitch - kDown * x) % 32;
         i++)
      p.pitch += kDown;
    p.in_rows = P::in_rows(p.tile_h);
    p.phase = (p.in_rows * p.pitch + 31) / 32 * 32;
    int floats = P::kVec * p.phase + (kSeparable ? p.in_rows * p.tile_w : 0);
    if (p.w.out % 4) floats = max(floats, p.tile_h * p.tile_w);
    shared = 4 * (P::kFilter + floats);
    const int64_t blocks = ceil_div(p.h.out, p.tile_h) * p.tiles_w * p.images;
    if (y * x <= fewest || (shared <= kSharedBytes && blocks >= wanted)) break;
    // Fewer outputs a block: the squarer the tile, the smaller its halo.
    if (y == 1 || (p.tile_w > 4 * p.tile_h && x > 8))
      x = (x / 2 + 7) / 8 * 8;
    else
      y /= 2;
  }
  const int64_t tiles_h = ceil_div(p.h.out, p.tile_h);
  if (tiles_h > 65535) return -1;
  p.threads_y = y;
  p.magic_x = magic_of(x), p.magic_row = magic_of(p.vectors);
  return by_images(p, [&](const Args& q) {
    GK_LAUNCH((upfirdn2d_planes_kernel<kUp, kDown, kTaps, kSeparable, kFew>),
              dim3(static_cast<unsigned>(q.tiles_w), static_cast<unsigned>(q.images),
                   static_cast<unsigned>(tiles_h)),
              dim3(x * y), shared, stream, q);
  });
}

}  // namespace
}  // namespace gankern
