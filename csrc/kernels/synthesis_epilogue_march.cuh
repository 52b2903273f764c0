// How the kernels with a filter read it, march down rows with it, and bring rows to shared memory.
#pragma once

#include "synthesis_epilogue.cuh"

namespace gankern {
namespace {

// Neighbouring pixels of a row that a thread has: an odd number, so that threads meet different
// banks at any alignment of the row, and 2^k + 4 of them fit well into whole warps.
constexpr int kRun = 9;
constexpr int kPart = 3;  // of them at once: more would not fit into registers

// Rows that a thread makes at once of a large tile, with a piecewise linear activation, as far as
// there are registers.
template <typename T>
constexpr int kManyRows = sizeof(T) == 8 ? 1 : 3;

// What a thread has of a tile: kRun columns from `at` on, and rows from `first` on.
struct Run {
  int lx, chunk, first, first_of_warp, at;
  template <typename T>
  __device__ __forceinline__ Run(const Args<T>& a, int rows) {
    const int t = static_cast<int>(thread_again());
    lx = t & ((1 << a.lanes_log2) - 1), chunk = t >> a.lanes_log2;
    first = chunk * rows, first_of_warp = ((t & ~31) >> a.lanes_log2) * rows;
    at = min(lx, a.across - 1) * kRun;
  }
};

// 4x4 taps in the order of a correlation, times the gain, padded with zeros; and, where they are
// of rank one, their factors.
template <typename A>
struct alignas(16) Taps {
  A all[kTaps][kTaps], y[kTaps], x[kTaps];
  int separable;
};

// The taps by lanes 0 to 15 of a warp, and in `adjoint` reversed. Factors come through the smallest
// tap, so that those of whole numbers are exact; rank one means up to a few roundings of each tap.
template <typename T>
__device__ __forceinline__ void share_taps(Taps<Acc<T>>* taps, Taps<Acc<T>>* adjoint,
                                           const Args<T>& a) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32, t = lane % (kTaps * kTaps), ky = t / kTaps, kx = t % kTaps;
  A tap = 0;
  if (ky < a.taps_y && kx < a.taps_x) {
    const int fy = a.flip ? ky : a.taps_y - 1 - ky, fx = a.flip ? kx : a.taps_x - 1 - kx;
    tap = a.separable ? A(a.f[fy]) * a.f[fx] : A(a.f[fy * a.taps_x + fx]);
  }
  tap *= a.filter_gain;
  const auto size = [](A v) { return v < A(0) ? -v : v; };
  A least = tap;
  int where = t;
#pragma unroll
  for (int step = kTaps * kTaps / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, least, step);
    const int place = __shfl_xor_sync(0xffffffffu, where, step);
    const bool smaller = size(other) < size(least) || (size(other) == size(least) && place < where);
    if (least == A(0) || (other != A(0) && smaller)) least = other, where = place;
  }
  const A in_row = __shfl_sync(0xffffffffu, tap, where / kTaps * kTaps + kx);
  const A in_col = __shfl_sync(0xffffffffu, tap, ky * kTaps + where % kTaps) / least;
  const A few = sizeof(A) == 8 ? A(1e-15) : A(5e-7);
  const bool separable = __all_sync(0xffffffffu, size(in_row * in_col - tap) <= few * size(tap));
  if (lane >= kTaps * kTaps) return;
  for (Taps<A>* to : {taps, adjoint}) {
    if (!to) continue;
    const bool reversed = to == adjoint;
    to->all[reversed ? kHalo - ky : ky][reversed ? kHalo - kx : kx] = tap;
    if (ky == 0) to->x[reversed ? kHalo - kx : kx] = in_row;
    if (kx == 0) to->y[reversed ? kHalo - ky : ky] = in_col;
    if (t == 0) to->separable = separable;
  }
}

// out = kRows rows of the filter's result, each of N values; read(q, v): the N + 3 values of row q
// of the input.
template <int kRows, int N, typename A, typename Read>
__device__ __forceinline__ void filter_rows(A (&out)[kRows][N], const Taps<A>& taps, Read read) {
  const auto pack = [](const A* p) { return *reinterpret_cast<const Pack<A, kTaps>*>(p); };
  if (taps.separable) {
    const auto x = pack(taps.x), y = pack(taps.y);
#pragma unroll
    for (int q = 0; q < kRows + kHalo; q++) {
      A v[N + kHalo];
      read(q, v);
#pragma unroll
      for (int e = 0; e < N; e++) {
        A h = x.v[0] * v[e];
#pragma unroll
        for (int k = 1; k < kTaps; k++) h += x.v[k] * v[e + k];
#pragma unroll
        for (int r = 0; r < kRows; r++)
          if (q == r)
            out[r][e] = y.v[0] * h;
          else if (q > r && q - r < kTaps)
            out[r][e] += y.v[q - r] * h;
      }
    }
  } else {
#pragma unroll
    for (int q = 0; q < kRows + kHalo; q++) {
      A v[N + kHalo];
      read(q, v);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (q < r || q - r >= kTaps) continue;
        const auto x = pack(taps.all[q - r]);
#pragma unroll
        for (int e = 0; e < N; e++) {
          out[r][e] = q == r ? x.v[0] * v[e] : out[r][e] + x.v[0] * v[e];
#pragma unroll
          for (int k = 1; k < kTaps; k++) out[r][e] += x.v[k] * v[e + k];
        }
      }
    }
  }
}

// NCHW. A row in shared memory has the alignment of the row in global memory: column k lies at word
// k + shift(row), so that 16 bytes of shared memory are one load.
template <typename Src>
struct Rows {
  static constexpr int kSector = 32 / static_cast<int>(sizeof(Src));
  Src* start;  // column 0 of row 0, which may lie outside of the tensor
  int width, low;
  __device__ __forceinline__ Rows(Src* start, int width)
      : start(start),
        width(width),
        low(static_cast<int>(reinterpret_cast<uintptr_t>(start) / sizeof(Src)) & (kSector - 1)) {}
  __device__ __forceinline__ int shift(int row) const {
    return static_cast<int>(low + static_cast<unsigned>(row) * static_cast<unsigned>(width)) &
           (kSector - 1);
  }
};

// Rows [0, rows) of an image in shared memory, of which there are rows [row_lo, row_hi) and columns
// [lo, hi), and zeros else.
template <typename A, typename Src, int kBatch>
struct Stage {
  static constexpr int L = 16 / static_cast<int>(sizeof(A)), S = Rows<const Src>::kSector;
  static constexpr int K = S / L;  // pieces, of 16 bytes of shared memory, of a sector
  A* s;
  int pitch;
  Rows<const Src> from;
  int rows, row_lo, row_hi, lo, hi, half_magic;
  Format<Src> format;

  // Pieces of whole sectors; each thread has the same two of every few rows, kBatch rows under way.
  __device__ __forceinline__ void load_whole() const {
    const int half = pitch / (2 * L), span = hi - lo - S;
    if (span < 0) return;
    const unsigned magic = static_cast<unsigned>(half_magic), t = thread_again();
    int apart = static_cast<int>(blockDim.x * magic >> 20);
    const int first = static_cast<int>(t * magic >> 20), p = static_cast<int>(t) - first * half;
    const int inner[2] = {p / K * S - lo, (p + half) / K * S - lo};
    int64_t step = static_cast<int64_t>(apart) * from.width;
    const Src* row = from.start + (static_cast<int64_t>(first) * from.width + p * L);
    A* to = s + first * pitch + p * L;
    int to_step = apart * pitch;
    forget(apart), forget(step), forget(to_step);  // else they are computed again for each row
    const auto whole = [&](int r, int k) {
      return r < rows &&
             static_cast<unsigned>(inner[k] - from.shift(r)) <= static_cast<unsigned>(span);
    };
#pragma unroll 1
    for (int r = first < apart ? first : rows; r < rows; r += kBatch * apart) {
      Pack<Src, L> raw[kBatch][2];
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int here = r + b * apart;
        const Src* at = row - from.shift(here);
#pragma unroll
        for (int k = 0; k < 2; k++) {
          raw[b][k] = Pack<Src, L>{};
          if (whole(here, k) && here >= row_lo && here < row_hi)
            raw[b][k] = load_pack<Src, L>(at + k * half * L);
        }
        row += step;
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
#pragma unroll
        for (int k = 0; k < 2; k++)
          if (whole(r + b * apart, k)) put(to + k * half * L, raw[b][k], 0, L);
        to += to_step;
      }
    }
  }

  // Sectors are read as a whole or not at all: inner ones as they are, those at the ends of a row
  // by other threads, element by element where the tensor [begin, end) ends.
  __device__ __forceinline__ void load(const Src* begin, const Src* end) const {
    load_whole();
    const int sectors = pitch / S, ends = sectors - max(0, (hi - lo + 1) / S - 1);
    for (int i = thread_again(); i < rows * K * 4; i += blockDim.x) {
      const int r = i / (4 * K), shift = from.shift(r);
      const int first = (lo + shift + S - 1) / S, behind = max(first, (hi + shift) / S);
      for (int e = i / K % 4; e < ends; e += 4) {
        const int sector = e < first ? e : behind + (e - first);
        if (sector >= sectors) break;
        const int j = sector * S + i % K * L - shift, js = sector * S - shift;
        const Src* at = from.start + (static_cast<int64_t>(r) * from.width + j);
        Pack<Src, L> raw = {};
        if (r >= row_lo && r < row_hi && js < hi && js + S > lo) {
          if (at >= begin && at + L <= end)
            raw = load_pack<Src, L>(at);
          else
#pragma unroll
            for (int k = 0; k < L; k++)
              if (j + k >= lo && j + k < hi) raw.v[k] = at[k];
        }
        put(s + r * pitch + (j + shift), raw, lo - j, hi - j);
      }
    }
  }

  __device__ __forceinline__ void put(A* to, const Pack<Src, L>& raw, int first, int behind) const {
    Acc<Src> values[L];
    widen(raw, format, values);
    Pack<A, L> out;
#pragma unroll
    for (int e = 0; e < L; e++)
      out.v[e] = e >= first && e < behind ? static_cast<A>(values[e]) : A(0);
    store_pack<A, L>(to, out);
  }
};

// N neighbours of a row, element by element.
template <int N, typename A>
__device__ __forceinline__ void read_run(A (&v)[N], const A* s) {
#pragma unroll
  for (int e = 0; e < N; e++) v[e] = s[e];
}

// The noise of rows and columns of y, zero outside of it; each warp has rows of its own.
template <typename T>
__device__ __forceinline__ void stage_noise(Acc<T>* s, const Args<T>& a, int n, int row0, int col0,
                                            int rows, int cols) {
  for (int r = static_cast<int>(threadIdx.x) / 32; r < rows;
       r += static_cast<int>(blockDim.x) / 32) {
    const int row = row0 + r;
    const int64_t i = offset<false>(1, a.one_noise ? 0 : n, 0, a.out_h, a.out_w, row, col0);
    // From the begin of a sector of float32 on.
    for (int k = static_cast<int>(threadIdx.x) % 32 - static_cast<int>(i & 7); k < cols; k += 32) {
      if (k < 0) continue;
      const bool inside = row >= 0 && row < a.out_h && col0 + k >= 0 && col0 + k < a.out_w;
      s[r * cols + k] = inside ? load_param<T>(a.noise, a.f32 & 2, i + k, a.format) : Acc<T>(0);
    }
  }
}

// A row of `width` columns that lies in shared memory with the alignment of `to`, by lanes lx of a
// warp's `lanes`: whole pieces, then what lies beside them.
template <typename T, typename A>
__device__ __forceinline__ void store_row(T* to, const A* s, int shift, int width, int lx,
                                          int lanes, Format<T> format) {
  constexpr int L = 16 / static_cast<int>(sizeof(A));
  const int left = min(width, -shift & (L - 1)), right = width - ((width + shift) & (L - 1));
  for (int j = left + lx * L; j < right; j += lanes * L)
    store_whole<T, L>(to + j, narrow<T, L>(load_pack<A, L>(s + shift + j).v, format));
  for (int e = lx; e < 2 * L; e += lanes) {
    const int j = e < L ? e : max(right, left) + e - L;
    if (j < (e < L ? left : width)) to[j] = from_acc<T>(s[shift + j], format);
  }
}

// The tile of y or dx that a block makes. It lies in shared memory, since registers are short, and
// is read anew for each phase.
struct Tile {
  int n, row0, col0, index;
  template <typename T>
  __device__ __forceinline__ void set(const Args<T>& a) {
    n = static_cast<int>(blockIdx.x) / a.tiles;
    index = static_cast<int>(blockIdx.x) - n * a.tiles;
    const int y = index / a.tiles_x;
    row0 = y * a.tile_h, col0 = (index - y * a.tiles_x) * a.tile_w;
  }
};

struct TileAt {
  int n, row0, col0;
  __device__ __forceinline__ TileAt(const volatile Tile& t) : n(t.n), row0(t.row0), col0(t.col0) {}
  template <typename T>
  __device__ __forceinline__ Rows<const T> x_rows(const Args<T>& a, int c) const {
    return {a.x + offset<false>(a.C, n, c, a.H, a.W, row0 - kHalo, col0 - kHalo), a.W};
  }
  template <typename T>
  __device__ __forceinline__ Rows<const T> dy_rows(const Args<T>& a, int c) const {
    const int row = row0 + a.y0 - kHalo, col = col0 + a.x0 - kHalo;
    return {a.dy + offset<false>(a.C, n, c, a.out_h, a.out_w, row, col), a.out_w};
  }
  template <typename T>
  __device__ __forceinline__ Rows<T> dx_rows(const Args<T>& a, int c) const {
    return {a.out + offset<false>(a.C, n, c, a.H, a.W, row0, col0), a.W};
  }
};

}  // namespace
}  // namespace gankern
