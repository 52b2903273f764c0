// upfirdn2d: one kernel reads a tile of the input into shared memory as float32 and filters it
// there.
//
// Polyphase: output o starts at sample first + (o / up) * down and meets every up-th tap, so no
// inserted zero is loaded or multiplied. The kernels, from the most special:
//   planes: NCHW, factors 1, 2, 4 and 2 to 12 taps compiled in. A thread makes 4 columns; input
//   rows
//     are kept split into their `down` phases, so that its window is a few aligned 16-byte reads.
//     Separable filters of 8 and 12 taps take two passes through shared memory.
//   pixels: channels-last, 16 bytes of channels a thread, the usual 2-D filters compiled in.
//   any: every other filter, factor, layout and dtype.
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
  int dtype;
  bool separable, flip;
  double gain;
};

// The first sample that output o meets, and its tap.
__host__ __device__ __forceinline__ int first_sample(const Axis& a, int64_t o) {
  const int64_t start = o * a.down - a.pad + a.up - 1;
  return static_cast<int>(start / a.up - (start % a.up < 0 ? 1 : 0));
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

// ---- any: a thread makes one output element at a time. Shared memory: filter, first samples and
// taps of the tile's columns and rows, the input tile [rows][columns][channels], and, if separable,
// the tile filtered along x [rows][tile_w][channels].
template <typename T>
__global__ void __launch_bounds__(256) upfirdn2d_any_kernel(Args p) {
  using S = Acc<T>;
  GK_DYNAMIC_SHARED(S, f);
  const int ch = 1 << p.log2_c, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int f_size = p.separable ? p.w.taps : p.h.taps * p.w.taps;
  S* tile = f + f_size;
  S* mid = tile + p.in_rows * p.pitch;
  int* first_x = reinterpret_cast<int*>(mid + (p.separable ? p.in_rows * p.tile_w * ch : 0));
  int* tap_x = first_x + p.tile_w;
  int* first_y = tap_x + p.tile_w;
  int* tap_y = first_y + p.tile_h;

  const int ox0 = static_cast<int>(blockIdx.x) % p.tiles_w * p.tile_w;
  const int oy0 = static_cast<int>(blockIdx.x) / p.tiles_w * p.tile_h;
  const int ix0 = first_sample(p.w, ox0), iy0 = first_sample(p.h, oy0);
  for (int i = threadIdx.x; i < f_size; i += blockDim.x)
    f[i] = p.separable ? filter_tap<S>(p, i) : filter_tap<S>(p, i / p.w.taps, i % p.w.taps);
  for (int i = threadIdx.x; i < p.tile_w; i += blockDim.x) {
    const int s = first_sample(p.w, ox0 + i);
    first_x[i] = (s - ix0) << p.log2_c;
    tap_x[i] = first_tap(p.w, ox0 + i, s);
  }
  for (int i = threadIdx.x; i < p.tile_h; i += blockDim.x) {
    const int s = first_sample(p.h, oy0 + i);
    first_y[i] = s - iy0;
    tap_y[i] = first_tap(p.h, oy0 + i, s);
  }
  const int width = p.tile_w << p.log2_c;
  const int rows = min(p.tile_h, p.h.out - oy0);

  for (int64_t part = blockIdx.y; part < p.images * p.chunks; part += gridDim.y) {
    const int64_t image = part / p.chunks;
    const int c0 = static_cast<int>(part % p.chunks) << p.log2_c;
    const T* x = static_cast<const T*>(p.x) + image * p.h.in * p.w.in * p.channels;
    T* y = static_cast<T*>(p.y) + image * p.h.out * p.w.out * p.channels;
    __syncthreads();
    for (int r = warp; r < p.in_rows; r += blockDim.x / 32) {
      const int iy = iy0 + r;
      const T* row = x + static_cast<int64_t>(iy) * p.w.in * p.channels;
      for (int e = lane; e < p.pitch; e += 32) {
        const int ix = ix0 + (e >> p.log2_c), c = c0 + (e & (ch - 1));
        const bool inside = iy >= 0 && iy < p.h.in && ix >= 0 && ix < p.w.in && c < p.channels;
        tile[r * p.pitch + e] =
            inside ? to_acc(row[static_cast<int64_t>(ix) * p.channels + c]) : S(0);
      }
    }
    __syncthreads();
    if (p.separable) {
      for (int r = warp; r < p.in_rows; r += blockDim.x / 32)
        for (int e = lane; e < width; e += 32) {
          const S* in = tile + r * p.pitch + first_x[e >> p.log2_c] + (e & (ch - 1));
          S sum = S(0);
          for (int k = tap_x[e >> p.log2_c]; k < p.w.taps; k += p.w.up, in += ch) sum += f[k] * *in;
          mid[r * width + e] = sum;
        }
      __syncthreads();
    }
    for (int r = warp; r < rows; r += blockDim.x / 32)
      for (int e = lane; e < width; e += 32) {
        const int ox = ox0 + (e >> p.log2_c), c = c0 + (e & (ch - 1));
        if (ox >= p.w.out || c >= p.channels) continue;
        S sum = S(0);
        if (p.separable) {
          const S* in = mid + first_y[r] * width + e;
          for (int k = tap_y[r]; k < p.h.taps; k += p.h.up, in += width) sum += f[k] * *in;
        } else {
          const S* in = tile + first_y[r] * p.pitch + first_x[e >> p.log2_c] + (e & (ch - 1));
          for (int ky = tap_y[r]; ky < p.h.taps; ky += p.h.up, in += p.pitch) {
            const S* v = in;
            const S* w = f + ky * p.w.taps;
            for (int kx = tap_x[e >> p.log2_c]; kx < p.w.taps; kx += p.w.up, v += ch)
              sum += w[kx] * *v;
          }
        }
        y[(static_cast<int64_t>(oy0 + r) * p.w.out + ox) * p.channels + c] =
            from_acc<T>(sum * static_cast<S>(p.gain));
      }
  }
}

// ---- planes.
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

// The 16-bit types share their code up to the conversion: it would double the kernels otherwise.
__device__ __forceinline__ void widen(float* out, const Pack<float, 4>& in, bool) {
#pragma unroll
  for (int e = 0; e < 4; e++) out[e] = in.v[e];
}
__device__ __forceinline__ void widen(float* out, const Pack<unsigned short, 8>& in, bool bf16) {
  if (bf16) {
#pragma unroll
    for (int e = 0; e < 8; e++) out[e] = __uint_as_float(static_cast<unsigned>(in.v[e]) << 16);
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) out[e] = __half2float(__ushort_as_half(in.v[e]));
  }
}
__device__ __forceinline__ float narrow(float v, float, bool) { return v; }
__device__ __forceinline__ unsigned short narrow(float v, unsigned short, bool bf16) {
  return bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v)) : __half_as_ushort(__float2half_rn(v));
}

// Copies the rows and columns that the tile needs; what lies outside of the image becomes zero.
// Global vectors are aligned whatever the row's own alignment, and so overlap the tile's edges. The
// elements of a vector are stored in an order that differs between lanes: no bank conflicts.
template <int kDown, typename T>
__device__ __forceinline__ void load_tile(const Args& p, float* tile, int64_t image, int ix0,
                                          int iy0) {
  constexpr int N = 16 / sizeof(T), kBatch = N == 8 ? 2 : kDown == 2 ? 3 : 4;
  const T* x = static_cast<const T*>(p.x);
  const int phase = p.pitch / kDown, lane = threadIdx.x % 32;
  const int lo = max(0, -ix0), hi = max(lo, min(p.columns, p.w.in - ix0));
  const int64_t plane = image * p.h.in * p.w.in + ix0, numel = p.images * p.h.in * p.w.in;

  for (int r = threadIdx.x / 32; r < p.in_rows; r += blockDim.x / 32) {
    const bool inside = iy0 + r >= 0 && iy0 + r < p.h.in;
    for (int c = lane; c < p.pitch; c += 32) {
      if (inside && c >= lo && c < hi) c += (hi - c) / 32 * 32;
      if (!inside || c < lo || c >= hi) tile[r * p.pitch + c % kDown * phase + c / kDown] = 0.f;
    }
  }

  const int per_row = p.pitch / N;  // as many as a row's elements, whatever its alignment
  const int step_r = blockDim.x / per_row, step_v = blockDim.x % per_row;
  int r = threadIdx.x / per_row, v = threadIdx.x % per_row;
  const int turn = kDown * (lane / max(1, 32 * kDown / N)) % N;
  const auto advance = [&](int& row, int& vec) {
    row += step_r;
    vec += step_v;
    if (vec >= per_row) {
      vec -= per_row;
      row++;
    }
  };
  const auto column = [&](int64_t row_start, int vec) {
    return vec * N - static_cast<int>(row_start & (N - 1));
  };
  while (r < p.in_rows) {
    Pack<T, N> packs[kBatch];
    int r2 = r, v2 = v;
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int iy = iy0 + r;
      const int64_t start = plane + static_cast<int64_t>(iy) * p.w.in;
      const int c = column(start, v);
      packs[b] = Pack<T, N>{};
      if (r < p.in_rows && iy >= 0 && iy < p.h.in && c + N > lo && c < hi) {
        if (start + c >= 0 && start + c + N <= numel) {
          packs[b] = load_pack<T, N>(x + start + c);
        } else {
#pragma unroll
          for (int e = 0; e < N; e++)
            if (start + c + e >= 0 && start + c + e < numel) packs[b].v[e] = x[start + c + e];
        }
      }
      advance(r, v);
    }
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int iy = iy0 + r2;
      const int c = column(plane + static_cast<int64_t>(iy) * p.w.in, v2);
      const bool live = r2 < p.in_rows && iy >= 0 && iy < p.h.in;
      float values[N];
      widen(values, packs[b], p.dtype == kBF16);
#pragma unroll
      for (int bit = kDown; bit < N; bit *= 2) {
        float turned[N];
#pragma unroll
        for (int e = 0; e < N; e++) turned[e] = turn & bit ? values[(e + bit) % N] : values[e];
#pragma unroll
        for (int e = 0; e < N; e++) values[e] = turned[e];
      }
#pragma unroll
      for (int e = 0; e < N; e++) {
        const int at = c + ((e + turn) & (N - 1));
        if (live && at >= lo && at < hi)
          tile[r2 * p.pitch + at % kDown * phase + at / kDown] = values[e];
      }
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
  T* y = static_cast<T*>(p.y) + image * p.h.out * p.w.out;
  if (p.w.out % 4 == 0) {
    const int ox = ox0 + 4 * tx;
    for (int r = 0; r < rows; r++) {
      const int oy = oy0 + ty * rows + r;
      if (oy >= p.h.out || ox >= p.w.out) break;
      Pack<T, 4> out;
#pragma unroll
      for (int j = 0; j < 4; j++) out.v[j] = narrow(acc[r][j], T{}, p.dtype == kBF16);
      store_pack<T, 4>(y + static_cast<int64_t>(oy) * p.w.out + ox, out);
    }
    return;
  }
  // Rows of unaligned length: through shared memory, so that a warp writes consecutive elements.
  __syncthreads();
  for (int r = 0; r < rows; r++)
    *reinterpret_cast<float4*>(stage + (ty * rows + r) * p.tile_w + 4 * tx) =
        make_float4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
  __syncthreads();
  const int columns = min(p.tile_w, p.w.out - ox0);
  for (int r = threadIdx.x / 32; r < p.tile_h && oy0 + r < p.h.out; r += blockDim.x / 32)
    for (int c = threadIdx.x % 32; c < columns; c += 32)
      y[static_cast<int64_t>(oy0 + r) * p.w.out + ox0 + c] =
          narrow(stage[r * p.tile_w + c], T{}, p.dtype == kBF16);
}

template <int kUp, int kDown, int kTaps, bool kSeparable>
__global__ void __launch_bounds__(256, 4) upfirdn2d_planes_kernel(Args p) {
  using P = Planes<kUp, kDown, kTaps, kSeparable>;
  constexpr int kRows = P::kRows, kMeet = P::kMeet;
  GK_DYNAMIC_SHARED(float, f);
  float* tile = f + P::kFilter;
  const int phase = p.pitch / kDown;
  const int tx = threadIdx.x & ((1 << p.log2_x) - 1), ty = threadIdx.x >> p.log2_x;
  const int ox0 = static_cast<int>(blockIdx.x) % p.tiles_w * p.tile_w;
  const int oy0 = static_cast<int>(blockIdx.x) / p.tiles_w * p.tile_h;
  const int ix0 = first_sample(p.w, ox0), iy0 = first_sample(p.h, oy0);
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
      load_tile<kDown, unsigned short>(p, tile, image, ix0, iy0);
    __syncthreads();

    float acc[kRows][4] = {};
    if constexpr (kSeparable) {
      float* mid = tile + p.in_rows * p.pitch;
      for (int i = threadIdx.x; i < p.in_rows << p.log2_x; i += blockDim.x) {
        const int r = i >> p.log2_x;
        const RowWindow<P, kUp, kDown, kTaps> window(tile + r * p.pitch + P::kRead * tx, phase);
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
      const float* row = tile + ty * kRows * kDown * p.pitch + 4 * tx;
#pragma unroll
      for (int r = 0; r < (kRows - 1) * kDown + kTaps; r++, row += p.pitch) {
        const RowWindow<P, kUp, kDown, kTaps> window(row, phase);
#pragma unroll
        for (int jr = 0; jr < kRows; jr++)
          if (r - jr * kDown >= 0 && r - jr * kDown < kTaps)
            window.add(acc[jr], f + (r - jr * kDown) * kTaps, qx);
      }
    } else {
      const float* row = tile + ty * (kRows / kUp) * p.pitch + P::kRead * tx;
#pragma unroll
      for (int jr = 0; jr < kRows; jr++)
#pragma unroll
        for (int m = 0; m < kMeet; m++) {
          const int at = jr / kUp + (jr % kUp > qy ? 1 : 0) + m;
          const RowWindow<P, kUp, kDown, kTaps> window(row + at * p.pitch, phase);
          window.add(acc[jr], f + (jr % kUp * kMeet + m) * kTaps, qx);
        }
    }

    if (p.dtype == kF32)
      store_rows<float>(p, acc, kRows, tile, image, ox0, oy0, tx, ty);
    else
      store_rows<unsigned short>(p, acc, kRows, tile, image, ox0, oy0, tx, ty);
  }
}

// ---- pixels: channels-last. A thread makes 2 rows of one column for 16 bytes of channels; a
// tile has 32 bytes of channels (a sector) where the image does. kTaps 0: factors and taps as
// given.
constexpr int kLog2Granules = 1;

constexpr int kPixelRows = 2, kPixelThreads = 512;

template <typename T, int kUp, int kDown, int kTaps>
__global__ void __launch_bounds__(kPixelThreads, 2) upfirdn2d_pixels_kernel(Args p) {
  constexpr int N = 16 / sizeof(T), kBatch = N == 4 ? 3 : 2, kRows = kPixelRows;
  constexpr int kStep = N << kLog2Granules;  // elements from one sample to the next
  using Granule = Pack<T, N>;
  GK_DYNAMIC_SHARED(float, f);
  const int f_size = kTaps ? kTaps * kTaps : p.h.taps * p.w.taps;
  T* tile = reinterpret_cast<T*>(f + (f_size + 3) / 4 * 4);
  const int g = threadIdx.x & ((1 << kLog2Granules) - 1);
  const int tx = threadIdx.x >> kLog2Granules & (p.tile_w - 1);
  const int ty = threadIdx.x >> (kLog2Granules + p.log2_x);
  const int ox0 = static_cast<int>(blockIdx.x) % p.tiles_w * p.tile_w;
  const int oy0 = static_cast<int>(blockIdx.x) / p.tiles_w * p.tile_h;
  const int ix0 = first_sample(p.w, ox0), iy0 = first_sample(p.h, oy0);
  for (int i = threadIdx.x; i < f_size; i += blockDim.x) {
    const int taps = kTaps ? kTaps : p.w.taps;
    f[i] = filter_tap<float>(p, i / taps, i % taps) * static_cast<float>(p.gain);
  }
  // A row of the tile is split into its `down` phases; column c of it starts at element at(c).
  const int phase = p.pitch / kDown;
  const auto at = [&](int c) { return c % kDown * phase * N + c / kDown * kStep; };
  const int first_x = first_sample(p.w, ox0 + tx), tap_x = first_tap(p.w, ox0 + tx, first_x);

  for (int64_t part = blockIdx.y; part < p.images * p.chunks; part += gridDim.y) {
    const int64_t image = part / p.chunks;
    const int c0 = static_cast<int>(part % p.chunks) * kStep;
    const T* x = static_cast<const T*>(p.x) + image * p.h.in * p.w.in * p.channels + c0;
    T* y = static_cast<T*>(p.y) + image * p.h.out * p.w.out * p.channels + c0 + g * N;
    __syncthreads();
    const int step_r = blockDim.x / p.pitch, step_v = blockDim.x % p.pitch;
    int r = threadIdx.x / p.pitch, v = threadIdx.x % p.pitch;
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
    const auto add = [&](float* sums, const Granule& granule, float w) {
#pragma unroll
      for (int j = 0; j < N; j++) sums[j] += w * to_acc(granule.v[j]);
    };
    const int row_step = p.pitch * N;
    const T* column = tile + (first_x - ix0) * kStep + g * N;
    if constexpr (kTaps == 0) {
#pragma unroll
      for (int jr = 0; jr < kRows; jr++) {
        const int oy = oy0 + ty * kRows + jr;
        const int first_y = first_sample(p.h, oy);
        const T* row = column + (first_y - iy0) * row_step;
        for (int ky = first_tap(p.h, oy, first_y); ky < p.h.taps; ky += p.h.up, row += row_step) {
          const T* sample = row;
          for (int kx = tap_x; kx < p.w.taps; kx += p.w.up, sample += kStep)
            add(acc[jr], load_pack<T, N>(sample), f[ky * p.w.taps + kx]);
        }
      }
    } else if constexpr (kUp == 1) {
      const T* row = tile + tx * kStep + g * N + ty * kRows * kDown * row_step;
#pragma unroll
      for (int i = 0; i < (kRows - 1) * kDown + kTaps; i++, row += row_step)
#pragma unroll
        for (int kx = 0; kx < kTaps; kx++) {
          const Granule granule = load_pack<T, N>(row + at(kx));
#pragma unroll
          for (int jr = 0; jr < kRows; jr++)
            if (i - jr * kDown >= 0 && i - jr * kDown < kTaps)
              add(acc[jr], granule, f[(i - jr * kDown) * kTaps + kx]);
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
          for (int mx = 0; mx < kMeet; mx++)
            add(acc[jr], load_pack<T, N>(row + mx * kStep), w[my * kUp * kTaps + mx * kUp]);
      }
    }

    const int ox = ox0 + tx;
#pragma unroll
    for (int jr = 0; jr < kRows; jr++) {
      const int oy = oy0 + ty * kRows + jr;
      if (oy >= p.h.out || ox >= p.w.out || c0 + g * N >= p.channels) continue;
      Granule out;
#pragma unroll
      for (int j = 0; j < N; j++) out.v[j] = from_acc<T>(acc[jr][j]);
      store_pack<T, N>(y + (static_cast<int64_t>(oy) * p.w.out + ox) * p.channels, out);
    }
  }
}

// ---- Launching.

Args make_args(int dtype, const void* x, const void* f, void* y, bool last, int64_t N, int64_t C,
               const Axis& h, const Axis& w, bool separable, bool flip, double gain) {
  Args p{};
  p.x = x, p.f = f, p.y = y;
  p.h = h, p.w = w;
  p.images = last ? N : N * C;
  p.channels = last ? static_cast<int>(C) : 1;
  p.chunks = 1;
  p.dtype = dtype;
  p.separable = separable, p.flip = flip;
  p.gain = gain;
  return p;
}

int log2_of(int power) {
  int n = 0;
  while (1 << n < power) n++;
  return n;
}

// Blocks along x of the grid are tiles of an image; along y, images and chunks of channels.
dim3 grid_of(const Args& p) {
  return dim3(static_cast<unsigned>(ceil_div(p.h.out, p.tile_h) * p.tiles_w),
              static_cast<unsigned>(min(p.images * p.chunks, int64_t(65535))));
}

template <int kUp, int kDown, int kTaps, bool kSeparable>
int launch_planes(Args p, void* stream) {
  using P = Planes<kUp, kDown, kTaps, kSeparable>;
  int x = pow2_between(ceil_div(p.w.out, 4), 1, kDown == 1 ? 32 : 16);
  int y = pow2_between(ceil_div(p.h.out, P::kRows), 32 / x, (kDown == 4 ? 128 : 256) / x);
  const int64_t wanted = sm_count();
  int shared = 0;
  for (;;) {
    p.tile_w = 4 * x;
    p.tile_h = y * P::kRows;
    p.tiles_w = static_cast<int>(ceil_div(p.w.out, p.tile_w));
    p.columns = kUp == 1 ? (p.tile_w - 1) * kDown + kTaps : p.tile_w / kUp + P::kMeet;
    // Whole vectors, one more than the columns fill: a warp that wraps to the next row continues
    // there in the next banks.
    const int vector = p.dtype == kF32 ? 4 : 8;
    const int least = max(kDown * P::phase_size(p.tile_w), p.columns + vector - 1);
    p.pitch = static_cast<int>(ceil_div(least, 4 * kDown > vector ? 4 * kDown : vector)) *
              (4 * kDown > vector ? 4 * kDown : vector);
    p.in_rows = P::in_rows(p.tile_h);
    int floats = p.in_rows * (p.pitch + (kSeparable ? p.tile_w : 0));
    if (p.w.out % 4) floats = max(floats, p.tile_h * p.tile_w);
    shared = 4 * (P::kFilter + floats);
    const int64_t blocks = ceil_div(p.h.out, p.tile_h) * p.tiles_w * p.images;
    if (y * x <= 32 || (shared <= kSharedBytes && blocks >= wanted)) break;
    // Fewer outputs a block: the squarer the tile, the smaller its halo.
    (p.tile_w > 4 * p.tile_h && x > 8 ? x : y) /= 2;
  }
  p.log2_x = log2_of(x);
  GK_LAUNCH((upfirdn2d_planes_kernel<kUp, kDown, kTaps, kSeparable>), grid_of(p), dim3(x * y),
            shared, stream, p);
  return static_cast<int>(cudaGetLastError());
}

template <typename T>
int launch_any(Args p, void* stream) {
  using S = Acc<T>;
  const int wanted_c = pow2_between(p.channels, 1, 32 / sizeof(T));  // a sector
  const int64_t blocks = sm_count();
  p.log2_c = log2_of(wanted_c);
  p.tile_w = pow2_between(p.w.out, 1, p.channels > 1 ? 16 : 64);
  p.tile_h = pow2_between(p.h.out, 1, 16);
  int64_t shared = 0;
  for (;;) {
    const int64_t ch = 1 << p.log2_c;
    p.chunks = static_cast<int>(ceil_div(p.channels, ch));
    p.tiles_w = static_cast<int>(ceil_div(p.w.out, p.tile_w));
    p.pitch = static_cast<int>(samples_for(p.w, p.tile_w) * ch);
    p.in_rows = samples_for(p.h, p.tile_h);
    const int64_t f = p.separable ? p.w.taps : p.w.taps * p.h.taps;
    const int64_t mid = p.separable ? p.tile_w * ch : 0;
    shared = (f + p.in_rows * (p.pitch + mid)) * static_cast<int64_t>(sizeof(S)) +
             8 * (p.tile_w + p.tile_h);
    const int64_t tiles = ceil_div(p.h.out, p.tile_h) * p.tiles_w * p.images * p.chunks;
    const bool small = p.tile_w * p.tile_h * ch <= 256;
    if (shared <= kSharedBytes && (small || tiles >= blocks)) break;
    if (p.tile_w == 1 && p.tile_h == 1 && p.log2_c == 0) break;
    if (p.tile_w > p.tile_h || (p.tile_h == 1 && p.tile_w > 1))
      p.tile_w /= 2;
    else if (p.tile_h > 1)
      p.tile_h /= 2;
    else
      p.log2_c--;
  }
  GK_LAUNCH((upfirdn2d_any_kernel<T>), grid_of(p), dim3(256), static_cast<int>(shared), stream, p);
  return static_cast<int>(cudaGetLastError());
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
    if (shared <= kSharedBytes && (x * y * g <= 32 || blocks >= wanted)) break;
    if (x * y * g <= 32) return -1;
    if (y > 1)
      y /= 2;
    else
      x /= 2;
  }
  p.log2_x = log2_of(x);
  GK_LAUNCH((upfirdn2d_pixels_kernel<T, kUp, kDown, kTaps>), grid_of(p), dim3(g * x * y),
            static_cast<int>(shared), stream, p);
  return static_cast<int>(cudaGetLastError());
}

template <typename T>
int try_pixels(const Args& p, void* stream) {
  if (p.channels % (16 / sizeof(T)) || (p.separable && p.w.taps > 6)) return -1;
  if (p.w.taps == 4 && p.h.taps == 4 && p.w.up == p.h.up && p.w.down == p.h.down) {
    if (p.w.up == 1 && p.w.down == 1) return launch_pixels<T, 1, 1, 4>(p, stream);
    if (p.w.up == 2 && p.w.down == 1) return launch_pixels<T, 2, 1, 4>(p, stream);
    if (p.w.up == 1 && p.w.down == 2) return launch_pixels<T, 1, 2, 4>(p, stream);
  }
  return launch_pixels<T, 1, 1, 0>(p, stream);
}

template <int kUp, int kDown>
int try_planes(const Args& p, void* stream) {
  switch (p.w.taps) {
    case 2:
      if constexpr (kUp < 4) return launch_planes<kUp, kDown, 2, false>(p, stream);
      return -1;
    case 4:
      return launch_planes<kUp, kDown, 4, false>(p, stream);
    case 6:
      if constexpr (kUp < 4) return launch_planes<kUp, kDown, 6, false>(p, stream);
      return -1;
    case 8:
      return p.separable ? launch_planes<kUp, kDown, 8, true>(p, stream) : -1;
    case 12:
      return p.separable ? launch_planes<kUp, kDown, 12, true>(p, stream) : -1;
    default:
      return -1;
  }
}

// The specialised kernel for these arguments: its launch's error, or -1 where there is none.
int try_special(const Args& p, bool last, void* stream) {
  if (p.dtype == kF64 || !aligned16(p.x) || !aligned16(p.y)) return -1;
  if (last)
    return p.dtype == kF32   ? try_pixels<float>(p, stream)
           : p.dtype == kF16 ? try_pixels<__half>(p, stream)
                             : try_pixels<__nv_bfloat16>(p, stream);
  if (p.h.taps != p.w.taps || p.h.up != p.w.up || p.h.down != p.w.down) return -1;
  const int factor = p.w.up * 10 + p.w.down;
  switch (factor) {
    case 11:
      return try_planes<1, 1>(p, stream);
    case 21:
      return try_planes<2, 1>(p, stream);
    case 41:
      return try_planes<4, 1>(p, stream);
    case 12:
      return try_planes<1, 2>(p, stream);
    case 14:
      return try_planes<1, 4>(p, stream);
    default:
      return -1;
  }
}

}  // namespace

namespace GANKERN_BACKEND {

int upfirdn2d(int dtype, const void* x, const void* f, void* y, bool last, int64_t N, int64_t C,
              int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, int64_t taps_y,
              int64_t taps_x, bool separable, int64_t up_x, int64_t up_y, int64_t down_x,
              int64_t down_y, int64_t pad_x, int64_t pad_y, bool flip, double gain, void* stream) {
  if (N * C * out_h * out_w == 0) return 0;
  int64_t largest = 0;
  for (const int64_t v : {in_h, in_w, out_h, out_w, up_x, up_y, down_x, down_y, C})
    largest = max(largest, v);
  if (taps_x > kMaxTaps || taps_y > kMaxTaps || largest > int64_t(1) << 29)
    return static_cast<int>(cudaErrorInvalidValue);
  const auto axis = [](int64_t in, int64_t out, int64_t up, int64_t down, int64_t pad,
                       int64_t taps) {
    return Axis{static_cast<int>(in),   static_cast<int>(out), static_cast<int>(up),
                static_cast<int>(down), static_cast<int>(pad), static_cast<int>(taps)};
  };
  const Args p =
      make_args(dtype, x, f, y, last, N, C, axis(in_h, out_h, up_y, down_y, pad_y, taps_y),
                axis(in_w, out_w, up_x, down_x, pad_x, taps_x), separable, flip, gain);
  const int error = try_special(p, last, stream);
  if (error >= 0) return error;
  return by_dtype(dtype, [&](auto zero) { return launch_any<decltype(zero)>(p, stream); });
}

GK_EXPORT(upfirdn2d);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
