// The kernels of synthesis_epilogue with a filter, channels-last.
//
// A block walks down a strip of the result, `step` rows at a time, with 64 bytes of channels of
// each pixel: two sectors, since a line of the second cache level is looked up as often for one.
// Rows of the input are copied to shared memory a step or two ahead, even columns before odd
// ones, so that neighbouring threads meet neighbouring words. A thread has some channels of two
// columns, whose filters share samples. Of each row it takes the sums along x once, and adds them
// to the three results below that wait for them in registers: no row is filtered twice, none is
// read twice but at a strip's ends.
#pragma once

#include "synthesis_epilogue_bwd.cuh"

namespace gankern {
namespace {

constexpr int kPixelThreads = 256;
template <typename T>
constexpr int kPixelBlocks = sizeof(T) == 8 ? 1 : 4;  // on a multiprocessor

// Channels of a pixel at most.
template <typename T>
constexpr int kMostChannels = 64 / static_cast<int>(sizeof(T));

// Columns of a thread, and its channels: what waits has to stay in registers.
constexpr int kColumns = 2;
__host__ __device__ constexpr int thread_channels(int bytes, bool backward) {
  return bytes == 8 ? 1 : bytes == 2 && !backward ? 4 : 2;
}

// p and so many bytes.
template <typename T>
__device__ __forceinline__ T* beyond(T* p, int64_t bytes) {
  return reinterpret_cast<T*>(const_cast<char*>(reinterpret_cast<const char*>(p)) + bytes);
}

// The tile of y or dx that a block makes. It lies in shared memory, since registers are short, and
// is read anew for each phase. Blocks follow each other that have the channels of the same pixels.
struct Tile {
  int n, row0, col0, index, group, c0;
  template <typename T>
  __device__ __forceinline__ void set(const Args<T>& a) {
    const int of_all = static_cast<int>(blockIdx.x) / a.groups;
    group = static_cast<int>(blockIdx.x) - of_all * a.groups, c0 = group * a.channels;
    n = of_all / a.tiles;
    index = of_all - n * a.tiles;
    const int y = index / a.tiles_x;
    row0 = y * a.tile_h, col0 = (index - y * a.tiles_x) * a.tile_w;
  }
};

struct TileAt {
  int n, row0, col0;
  __device__ __forceinline__ TileAt(const volatile Tile& t) : n(t.n), row0(t.row0), col0(t.col0) {}
};

// Rows of an image on their way to shared memory, pixel after pixel of a block's channels, zeros
// outside of it: `packs` of 16 bytes a row, of which a thread copies one of every `apart`-th row.
// Of a row, `evens` even columns come first.
template <typename T>
struct PixelRows {
  static constexpr int V = kVec<T>;
  const T* image;
  int h, w, evens, packs, magic, apart;  // see magic_of()
  int64_t jump, sample;  // bytes from a row to the next that a thread copies; of a sample

  __device__ __forceinline__ int column(int place) const {
    return 2 * place - (place < evens ? 0 : 2 * evens - 1);
  }

  // The pack that a thread copies first, of the rows from (top, left) on, counted in its
  // sample; or none.
  static constexpr int kNone = -2147483647 - 1;
  __device__ __forceinline__ int first(const Args<T>& a, int c0, int top, int left) const {
    const int t = static_cast<int>(thread_again()), r = row(t);
    const int q = t - r * packs, col = left + column(q >> a.packs_log2);
    const int c = c0 + (q & ((1 << a.packs_log2) - 1)) * V;
    const bool there = a.vec_x && r < apart && col >= 0 && col < w && c < a.C;
    return there ? static_cast<int>(offset<true>(a.C, 0, c, h, w, top + r, col) / V) : kNone;
  }
  __device__ __forceinline__ int row(int t) const { return quotient(t, magic); }

  // `count` rows, the first of which is `top` of the image.
  __device__ __forceinline__ void copy(T* to, int n, int pack, int top, int count) const {
    if (pack == kNone) return;
    const int t = static_cast<int>(thread_again());
    const T* from = beyond(image, n * sample) + static_cast<int64_t>(pack) * V;
    T* at = to + t * V;
    int ahead = apart;
    forget(ahead);  // else registers hold the product between calls
    ahead *= packs * V;
#pragma unroll 1
    for (int r = row(t); r < count; r += apart) {
      copy_pack<T, V>(at, from, static_cast<unsigned>(top + r) < static_cast<unsigned>(h));
      from = beyond(from, jump), at += ahead;
    }
  }

  // The same where packs are not aligned, or not whole.
  __device__ __forceinline__ void copy_slowly(T* to, const Args<T>& a, int n, int c0, int top,
                                              int left, int count) const {
    const int channels_log2 = a.packs_log2 + (V == 8 ? 3 : V == 4 ? 2 : 1);
    int h = this->h, w = this->w;
    forget(h), forget(w);
#pragma unroll 1
    for (int r = 0; r < count; r++, to += packs * V)
#pragma unroll 1
      for (int e = static_cast<int>(thread_again()); e < packs * V; e += a.threads) {
        const int row = top + r, col = left + column(e >> channels_log2);
        const int c = c0 + (e & ((1 << channels_log2) - 1));
        const bool inside = row >= 0 && row < h && col >= 0 && col < w && c < a.C;
        to[e] = inside ? image[offset<true>(a.C, n, c, h, w, row, col)] : T{};
      }
  }
};

// The noise of a step's rows and a block's columns.
template <typename T>
__device__ __forceinline__ void copy_noise(Acc<T>* to, const Args<T>& a, int n, int row0, int col0,
                                           int rows) {
  int h = a.out_h, w = a.out_w;
  forget(h), forget(w);  // else registers hold them, of 64 bits, between calls
#pragma unroll 1
  for (int i = static_cast<int>(thread_again()); i < rows * a.across; i += a.threads) {
    const int r = quotient(i, a.noise_magic);
    const int row = row0 + r, col = col0 + i - r * a.across;
    const bool inside = row >= 0 && row < h && col >= 0 && col < w;
    const int64_t at = offset<false>(1, a.one_noise ? 0 : n, 0, h, w, row, col);
    if (std::is_same<Acc<T>, float>::value && (a.f32 & 2))
      copy_pack<float, 1>(reinterpret_cast<float*>(to + i), static_cast<const float*>(a.noise) + at,
                          inside);
    else
      to[i] = inside ? load_param<T>(a.noise, a.f32 & 2, at, a.format) : Acc<T>(0);
  }
}

// Zeros in shared memory, 16 bytes at a time.
__device__ __forceinline__ void clear(char* s, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
    store_pack<int, 4>(reinterpret_cast<int*>(s + i), Pack<int, 4>{});
}

// A thread's channels of d, b and strength, which it takes from shared memory.
template <typename T, int K>
struct Params {
  Pack<Acc<T>, K> d, b, s;
  __device__ __forceinline__ explicit Params(const Acc<T>* params)
      : d(load_pack<Acc<T>, K>(params)),
        b(load_pack<Acc<T>, K>(params + kMostChannels<T>)),
        s(load_pack<Acc<T>, K>(params + 2 * kMostChannels<T>)) {}
};

// The noise of a thread's columns.
template <typename A>
__device__ __forceinline__ Pack<A, kColumns> noise_pair(const A* at, bool noise) {
  return noise ? load_pack<A, kColumns>(at) : Pack<A, kColumns>{};
}

// v = u * d + noise * s + b.
template <typename T, int K>
__device__ __forceinline__ void affine(Acc<T> (&v)[kColumns * K], const Acc<T> (&u)[kColumns * K],
                                       const Params<T, K>& by, const Pack<Acc<T>, kColumns>& z) {
#pragma unroll
  for (int e = 0; e < kColumns * K; e++)
    v[e] = u[e] * by.d.v[e % K] + (z.v[e / K] * by.s.v[e % K] + by.b.v[e % K]);
}

// Stores the columns, of which `columns` exist, and `count` channels.
template <typename T, int K>
__device__ __forceinline__ void store_columns(T* out, const Args<T>& a,
                                              const Acc<T> (&v)[kColumns * K], int columns,
                                              int count, Format<T> format) {
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    Acc<T> part[K];
#pragma unroll
    for (int e = 0; e < K; e++) part[e] = v[i * K + e];
    int64_t apart = i * a.pixel;
    if (i > 0) forget(apart);
    if (i < columns)
      store_packed<T, K>(beyond(out, apart), narrow<T, K>(part, format), a.vec_out, count);
  }
}

template <typename T, bool kPwl>
__global__ void __launch_bounds__(kPixelThreads, kPixelBlocks<T>)
    synthesis_epilogue_fwd_pixels_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int K = thread_channels(sizeof(T), false), kStages = 3;
  GK_DYNAMIC_SHARED(char, shared);
  __shared__ Taps<A> taps;
  __shared__ __align__(16) A params[3 * kMostChannels<T>];
  __shared__ Tile tile;
  const auto c0 = [&] { return static_cast<const volatile Tile&>(tile).c0; };
  const PixelRows<T> x_rows{a.x,     a.H,       a.W,      a.evens,   a.packs,
                            a.magic, a.x_apart, a.x_jump, a.x_sample};
  const auto xs = [&](int stage) { return reinterpret_cast<T*>(shared + stage * a.x_stage); };
  const auto noises = [&](int stage) {
    return reinterpret_cast<A*>(shared + (a.noises + stage * a.noise_stage));
  };
  clear(shared, a.sources);
  if (threadIdx.x == 0) tile.set(a);
  __syncthreads();
  if (threadIdx.x < 32) share_taps<A>(&taps, nullptr, a);
  share_params<T, kMostChannels<T>>(params, a, tile.n, c0(), threadIdx.x, a.channels);
  const auto all = [&] { return min(a.tile_h, a.out_h - tile.row0) + kHalo; };
  // What a thread copies next, and its step: in shared memory, since registers are short.
  const auto mine = [&] { return reinterpret_cast<int*>(shared + a.sources) + thread_again() * 2; };
  store_pack<int, 2>(mine(),
                     Pack<int, 2>{{x_rows.first(a, c0(), tile.row0 - a.y0, tile.col0 - a.x0), 0}});
  const auto begin = [&](int step) {
    const int stage = step % kStages, row = step * a.step;
    const int count = min(a.step, all() - row);
    if (count > 0) {
      const TileAt t(tile);
      if (a.vec_x) {
        const int next = mine()[0];
        x_rows.copy(xs(stage), t.n, next, t.row0 - a.y0 + row, count);
        if (next != x_rows.kNone) mine()[0] = next + a.x_step;
      } else {
        x_rows.copy_slowly(xs(stage), a, t.n, c0(), t.row0 - a.y0 + row, t.col0 - a.x0, count);
      }
      if (a.noise) copy_noise(noises(stage), a, t.n, t.row0 + row - kHalo, t.col0, count);
    }
    copy_batch();
  };
  begin(0);
  begin(1);
  A waiting[kHalo][kColumns * K] = {};
  with_format(a.format, [&](Format<T> format) {
    for (;;) {
      copy_wait<1>();
      __syncthreads();
      begin(mine()[1] + 2);
      const int step = mine()[1], stage = step % kStages, row = step * a.step;
      mine()[1] = step + 1;
      const int t = static_cast<int>(thread_again()), ch = (t & ((1 << a.lanes_log2) - 1)) * K;
      const int col = (t >> a.lanes_log2) * kColumns, count = a.C - c0() - ch;
      const TileAt at(tile);
      const int columns = min(a.tile_w, a.out_w - at.col0) - col;
      if (columns > 0 && count > 0)
        with_columns<kColumns, false>(taps, [&](auto take) {
          // In one register: columns, channels, rows that make no result, and all rows that are
          // left.
          int counts = min(columns, kColumns) << 24 | min(count, K) << 16 |
                       max(kHalo - row, 0) << 8 | min(a.step, all() - row);
          const T* line = xs(stage) + t * K;
          T* out = a.out + offset<true>(a.C, at.n, c0() + ch, a.out_h, a.out_w,
                                        at.row0 - kHalo + row, at.col0 + col);
          const A* z_at = noises(stage) + col;
#pragma unroll 1
          for (; counts & 255; counts--) {
            A u[kColumns * K];
            take(
                waiting,
                [&](int m, A(&v)[K]) {
                  const T* at = line + m / 2 * a.channels + m % 2 * a.odd;
                  widen(load_pack<T, K>(at), format, v);
                },
                u);
            if (counts >> 8 & 255) {
              counts -= 1 << 8;
            } else {
              A v[kColumns * K];
              affine<T, K>(v, u, Params<T, K>(params + ch), noise_pair(z_at, a.noise));
              if constexpr (kPwl) {
                const Pwl pwl(p);
#pragma unroll
                for (int e = 0; e < kColumns * K; e++) v[e] = pwl.value(v[e]);
              } else {
                each<false, 1>(
                    [&](int, A& to) { to = clamped(act_value<false>(to, p) * p.gain, p.clamp); },
                    v);
              }
              forget(counts);
              store_columns<T, K>(out, a, v, counts >> 24, counts >> 16 & 255, format);
            }
            line += a.packs * kVec<T>, z_at += a.across, out = beyond(out, a.out_line);
          }
        });
      if (mine()[1] * a.step >= all()) break;
    }
  });
}

// The strip of dx that a block makes, as each phase of a step reads it again.
struct alignas(16) Strip {
  Tile tile;
  int all, c0, top, left;            // rows of x; channels, rows and columns of x from these on
  int dy_top, dy_left, first, last;  // the same of dy; rows of dv that are inside of no other strip
  int own_left, own_cols, dx_cols;   // the same columns; columns of dx
  int row[2];                        // a step's first row: for the time up to du, and from then on
  template <typename T>
  __device__ __forceinline__ void set(const Args<T>& a) {
    tile.set(a);
    all = min(a.tile_h, a.H - tile.row0) + 2 * kHalo, c0 = tile.c0;
    top = tile.row0 - kHalo, left = tile.col0 - kHalo;
    dy_top = top + a.y0 - kHalo, dy_left = left + a.x0;
    first = max(kHalo, -dy_top), last = min(all, a.out_h - dy_top);
    if (tile.row0 + a.tile_h < a.H) last = min(last, a.tile_h + kHalo);
    const int cols = tile.col0 + a.tile_w < a.W ? a.tile_w : a.across;
    own_left = max(0, -dy_left), own_cols = max(0, min(cols, a.out_w - dy_left) - own_left);
    dx_cols = min(a.tile_w, a.W - tile.col0);
    row[0] = 0;
  }
};

// Rows of du = dL/d(filter(x)) go through shared memory, from which their own filter takes them:
// row r of x makes row r - 3 of dv and du, and that row r - 6 of dx. Rows of x and dy are copied
// while those of dx are made.
template <typename T, bool kPwl>
__global__ void __launch_bounds__(kPixelThreads, kPixelBlocks<T>)
    synthesis_epilogue_bwd_pixels_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int K = thread_channels(sizeof(T), true), kStep = kMostChannels<T>;
  GK_DYNAMIC_SHARED(char, shared);  // du, x, dy, sources, the noise
  __shared__ Taps<A> taps, adjoint;
  __shared__ __align__(16) A params[3 * kStep];
  __shared__ Strip strip;
  A* const dus = reinterpret_cast<A*>(shared);
  T* const xs = reinterpret_cast<T*>(shared + a.xs);
  T* const dys = reinterpret_cast<T*>(shared + a.dys);
  A* const noises = reinterpret_cast<A*>(shared + a.noises);
  const PixelRows<T> x_rows{a.x,     a.H,       a.W,      a.evens,   a.packs,
                            a.magic, a.x_apart, a.x_jump, a.x_sample};
  const PixelRows<T> dy_rows{a.dy,       a.out_h,    a.out_w,   a.across / 2, a.dy_packs,
                             a.dy_magic, a.dy_apart, a.dy_jump, a.dy_sample};
  using Sources = Pack<int, 2>;  // what a thread copies next of x and of dy
  const auto sources = [&] {
    return reinterpret_cast<int*>(shared + a.sources) + thread_again() * 2;
  };
  const auto begin = [&](int row) {
    const int count = min(a.step, strip.all - row);
    if (count > 0) {
      if (a.vec_x) {
        Sources next = load_pack<int, 2>(sources());
        x_rows.copy(xs, strip.tile.n, next.v[0], strip.top + row, count);
        dy_rows.copy(dys, strip.tile.n, next.v[1], strip.dy_top + row, count);
        if (next.v[0] != x_rows.kNone) next.v[0] += a.x_step;
        if (next.v[1] != dy_rows.kNone) next.v[1] += a.dy_step;
        store_pack<int, 2>(sources(), next);
      } else {
        x_rows.copy_slowly(xs, a, strip.tile.n, strip.c0, strip.top + row, strip.left, count);
        dy_rows.copy_slowly(dys, a, strip.tile.n, strip.c0, strip.dy_top + row, strip.dy_left,
                            count);
      }
      if (a.noise) copy_noise(noises, a, strip.tile.n, strip.dy_top + row, strip.dy_left, count);
    }
    copy_batch();
  };
  clear(shared + a.xs, a.sources - a.xs);
  if (threadIdx.x == 0) strip.set(a);
  __syncthreads();
  if (threadIdx.x < 32) share_taps<A>(&taps, &adjoint, a);
  share_params<T, kStep>(params, a, strip.tile.n, strip.c0, threadIdx.x, a.channels);
  store_pack<int, 2>(sources(), Sources{{x_rows.first(a, strip.c0, strip.top, strip.left),
                                         dy_rows.first(a, strip.c0, strip.dy_top, strip.dy_left)}});
  begin(0);
  A waiting[kHalo][kColumns * K] = {}, waiting_dx[kHalo][kColumns * K] = {}, sums[3][K] = {};
  with_format(a.format, [&](Format<T> format) {
    for (;;) {
      copy_wait<0>();
      __syncthreads();
      {
        const int row = strip.row[0];
        const int t = static_cast<int>(thread_again()), col = (t >> a.lanes_log2) * kColumns;
        if (t == 0) strip.row[1] = row;
        int ch = (t & ((1 << a.lanes_log2) - 1)) * K;
        const int own_left = strip.own_left, own_cols = strip.own_cols;
        if (col < a.across && strip.c0 + ch < a.C)
          with_columns<kColumns, false>(taps, [&](auto take) {
            const T* line = xs + t * K;
            const T* dy = dys + t * K;
            const A* z_at = noises + col;
            A* du = dus + t * K;
            // Bit r: whether sums take row r of the step, of the first column and, 16 bits on, of
            // the second.
            int left = min(a.step, strip.all - row);
            const auto upto = [&](int end) { return (1 << max(min(end - row, left), 0)) - 1; };
            int sum_rows = 0x10001 * (upto(strip.last) & ~upto(strip.first));
            if (static_cast<unsigned>(col - own_left) >= static_cast<unsigned>(own_cols))
              sum_rows &= ~0xffff;
            if (static_cast<unsigned>(col + 1 - own_left) >= static_cast<unsigned>(own_cols))
              sum_rows &= 0xffff;
#pragma unroll 1
            for (; left > 0; left--) {
              A u[kColumns * K], v[kColumns * K], dv[kColumns * K];
              take(
                  waiting,
                  [&](int m, A(&v)[K]) {
                    const T* at = line + m / 2 * a.channels + m % 2 * a.odd;
                    widen(load_pack<T, K>(at), format, v);
                  },
                  u);
              auto z = noise_pair(z_at, a.noise);
              forget(ch);  // else registers hold the parameters
              Params<T, K> by(params + ch);
              affine<T, K>(v, u, by, z);
#pragma unroll
              for (int i = 0; i < kColumns; i++) {
                A part[K];
                widen(load_pack<T, K>(dy + i * a.dy_odd), format, part);
#pragma unroll
                for (int e = 0; e < K; e++) dv[i * K + e] = part[e];
              }
              if constexpr (kPwl) {
                const Pwl pwl(p);
#pragma unroll
                for (int e = 0; e < kColumns * K; e++) dv[e] = pwl.grad(dv[e], v[e]);
              } else {
                // u waits where du goes, and the rest is read again, for want of registers.
                const auto place = [&](int i) { return du + i * a.dy_odd; };
#pragma unroll
                for (int i = 0; i < kColumns; i++) {
                  Pack<A, K> piece;
#pragma unroll
                  for (int e = 0; e < K; e++) piece.v[e] = u[i * K + e];
                  store_pack<A, K>(place(i), piece);
                }
                grad(dv, v, p);
                int zero = 0;
                forget(zero);
                z = noise_pair(z_at + zero, a.noise), by = Params<T, K>(params + ch + zero);
#pragma unroll
                for (int i = 0; i < kColumns; i++) {
                  const auto piece = load_pack<A, K>(place(i) + zero);
#pragma unroll
                  for (int e = 0; e < K; e++) u[i * K + e] = piece.v[e];
                }
              }
#pragma unroll
              for (int i = 0; i < kColumns; i++) {
                Pack<A, K> piece;
#pragma unroll
                for (int e = 0; e < K; e++) {
                  const A g = dv[i * K + e];
                  if (sum_rows >> 16 * i & 1) {
                    sums[0][e] += g * u[i * K + e];
                    sums[1][e] += g;
                    sums[2][e] += g * z.v[i];
                  }
                  piece.v[e] = g * by.d.v[e];
                }
                store_pack<A, K>(du + i * a.dy_odd, piece);
              }
              line += a.packs * kVec<T>, z_at += a.across, sum_rows >>= 1;
              dy += a.dy_packs * kVec<T>, du += a.dy_packs * kVec<T>;
            }
          });
      }
      __syncthreads();
      begin(strip.row[1] + a.step);
      {
        const int row = strip.row[1];
        const int t = static_cast<int>(thread_again()), col = (t >> a.lanes_log2) * kColumns;
        if (t == 0) strip.row[0] = row + a.step;
        const int c = strip.c0 + (t & ((1 << a.lanes_log2) - 1)) * K, count = a.C - c;
        const int columns = strip.dx_cols - col;
        if (columns > 0 && count > 0)
          with_columns<kColumns, true>(adjoint, [&](auto take) {
            const int behind = min(row + a.step, strip.all);
            const A* du = dus + t * K;
            T* out = a.out + offset<true>(a.C, strip.tile.n, c, a.H, a.W, strip.top - kHalo + row,
                                          strip.tile.col0 + col);
#pragma unroll 1
            for (int r = row; r < behind; r++) {
              A dx[kColumns * K];
              take(
                  waiting_dx,
                  [&](int m, A(&v)[K]) {
                    const auto piece = load_pack<A, K>(du + m / 2 * a.channels + m % 2 * a.dy_odd);
#pragma unroll
                    for (int e = 0; e < K; e++) v[e] = piece.v[e];
                  },
                  dx);
              if (r >= 2 * kHalo) store_columns<T, K>(out, a, dx, columns, count, format);
              du += a.dy_packs * kVec<T>, out = beyond(out, a.out_line);
            }
          });
      }
      if (strip.row[1] + a.step >= strip.all) break;
    }
  });
  __syncthreads();
  A* const scratch = dus;
  const int t = static_cast<int>(thread_again()), warp = t / 32, lanes = a.channels / K;
  // A warp has lanes of all of a pixel's channels.
#pragma unroll
  for (int k = 0; k < 3; k++)
#pragma unroll
    for (int e = 0; e < K; e++) {
      A v = sums[k][e];
#pragma unroll
      for (int apart = 16; apart > 0; apart /= 2)
        if (apart >= lanes) v += __shfl_xor_sync(0xffffffffu, v, apart);
      if (t % 32 < lanes) scratch[(warp * 3 + k) * a.channels + t % lanes * K + e] = v;
    }
  write_partials(scratch, a, strip.tile.n, strip.c0, a.channels, strip.tile.index);
  finish<T>(a, strip.tile.n, a.channels, strip.tile.group);
}

}  // namespace
}  // namespace gankern
