// The kernels of synthesis_epilogue with a filter, channels-last.
//
// A block walks down a strip of the result, `step` rows at a time, with 64 bytes of channels of
// each pixel: two sectors, since a line of the second cache level is looked up as often for one.
// Rows of the input are copied to shared memory as they are, one or two steps ahead. A thread has
// one column and 16 bytes of float32 of channels. Of each row it takes the sum along x once, and
// adds it to the three results below that wait for it in registers: no row is filtered twice, none
// is read twice but at a strip's ends.
#pragma once

#include "synthesis_epilogue_bwd.cuh"

namespace gankern {
namespace {

constexpr int kPixelThreads = 256;
// Blocks on a multiprocessor: four leave 64 registers, with which Blackwell's compiler spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename T>
constexpr int kPixelBlocks = sizeof(T) == 8 ? 1 : 3;
#else
template <typename T>
constexpr int kPixelBlocks = sizeof(T) == 8 ? 1 : 4;
#endif

// Threads, and channels, of a pixel at most.
template <typename T>
constexpr int kMostLanes = 64 / (kPiece<T> * static_cast<int>(sizeof(T)));
template <typename T>
constexpr int kMostChannels = kMostLanes<T> * kPiece<T>;

// Rows of an image on their way to shared memory, pixel after pixel of a block's channels, zeros
// outside of it: `packs` of 16 bytes a row, of which a thread copies one of every few rows.
template <typename T>
struct PixelRows {
  static constexpr int V = kVec<T>;
  const T* image;
  int h, w, packs, magic;  // see magic_of()

  // What a thread copies first, of the rows from (top, left) on; null: nothing.
  __device__ __forceinline__ const T* first(const Args<T>& a, int n, int c0, int top,
                                            int left) const {
    const int t = static_cast<int>(thread_again()), r = row(t);
    const int q = t - r * packs, col = left + (q >> a.packs_log2);
    const int c = c0 + (q & ((1 << a.packs_log2) - 1)) * V;
    const bool there = a.vec_x && r < apart(a) && col >= 0 && col < w && c < a.C;
    return there ? image + offset<true>(a.C, n, c, h, w, top + r, col) : nullptr;
  }
  __device__ __forceinline__ int row(int t) const {
    return static_cast<int>(static_cast<unsigned>(t) * static_cast<unsigned>(magic) >> 20);
  }
  __device__ __forceinline__ int apart(const Args<T>& a) const { return row(a.threads); }

  // `count` rows, the first of which is `top` of the image.
  __device__ __forceinline__ void copy(T* to, const T* from, const Args<T>& a, int top,
                                       int count) const {
    if (!from) return;
    const int t = static_cast<int>(thread_again()), by = apart(a);
    T* at = to + t * V;
#pragma unroll 1
    for (int r = row(t); r < count; r += by) {
      copy_pack<T, V>(at, from, static_cast<unsigned>(top + r) < static_cast<unsigned>(h));
      from += static_cast<int64_t>(by) * w * a.C, at += by * packs * V;
    }
  }

  // The same where packs are not aligned, or not whole.
  __device__ __forceinline__ void copy_slowly(T* to, const Args<T>& a, int n, int c0, int top,
                                              int left, int count) const {
    const int channels = V << a.packs_log2;
#pragma unroll 1
    for (int i = static_cast<int>(thread_again()); i < count * packs * V; i += a.threads) {
      const int r = i / (packs * V), e = i - r * packs * V, row = top + r;
      const int col = left + e / channels, c = c0 + e % channels;
      const bool inside = row >= 0 && row < h && col >= 0 && col < w && c < a.C;
      to[i] = inside ? image[offset<true>(a.C, n, c, h, w, row, col)] : T{};
    }
  }
};

// The noise of a step's rows and a block's columns.
template <typename T>
__device__ __forceinline__ void copy_noise(Acc<T>* to, const Args<T>& a, int n, int row0, int col0,
                                           int rows) {
#pragma unroll 1
  for (int i = static_cast<int>(thread_again()); i < rows * a.across; i += a.threads) {
    const int r =
        static_cast<int>(static_cast<unsigned>(i) * static_cast<unsigned>(a.noise_magic) >> 20);
    const int row = row0 + r, col = col0 + i - r * a.across;
    const bool inside = row >= 0 && row < a.out_h && col >= 0 && col < a.out_w;
    const int64_t at = offset<false>(1, a.one_noise ? 0 : n, 0, a.out_h, a.out_w, row, col);
    if (std::is_same<Acc<T>, float>::value && (a.f32 & 2))
      copy_pack<float, 1>(reinterpret_cast<float*>(to + i), static_cast<const float*>(a.noise) + at,
                          inside);
    else
      to[i] = inside ? load_param<T>(a.noise, a.f32 & 2, at, a.format) : Acc<T>(0);
  }
}

// `sums` are results of a column that wait for the rows below: sums[0] lacks one of them, sums[2]
// three. This takes a row, of which read(k) gives the samples that the filter's column k meets; the
// result that it makes whole is `out`.
template <typename A, int K, typename Read>
__device__ __forceinline__ void take_row(A (&sums)[kHalo][K], const Taps<A>& taps, bool separable,
                                         Read read, A (&out)[K]) {
  const auto pack = [](const A* p) { return *reinterpret_cast<const Pack<A, kTaps>*>(p); };
  if (separable) {
    A passed[K];
    {
      const auto x = pack(taps.x);
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        A v[K];
        read(k, v);
#pragma unroll
        for (int e = 0; e < K; e++) passed[e] = k ? passed[e] + x.v[k] * v[e] : x.v[k] * v[e];
      }
    }
    const auto y = pack(taps.y);
#pragma unroll
    for (int e = 0; e < K; e++) {
      out[e] = sums[0][e] + y.v[3] * passed[e];
      sums[0][e] = sums[1][e] + y.v[2] * passed[e];
      sums[1][e] = sums[2][e] + y.v[1] * passed[e];
      sums[2][e] = y.v[0] * passed[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < K; e++) {
      out[e] = sums[0][e], sums[0][e] = sums[1][e], sums[1][e] = sums[2][e], sums[2][e] = A(0);
    }
#pragma unroll
    for (int k = 0; k < kTaps; k++) {
      A v[K];
      read(k, v);
#pragma unroll
      for (int e = 0; e < K; e++) {
        out[e] += taps.all[3][k] * v[e];
        sums[0][e] += taps.all[2][k] * v[e];
        sums[1][e] += taps.all[1][k] * v[e];
        sums[2][e] += taps.all[0][k] * v[e];
      }
    }
  }
}

// `values` to shared memory, where a thread has a place of its own, and what was there to them.
template <typename A, int K>
__device__ __forceinline__ void swap(A* parked, int threads, A (&values)[3][K]) {
#pragma unroll
  for (int k = 0; k < 3; k++) {
    A* at = parked + (k * threads + thread_again()) * K;
    const auto in = load_pack<A, K>(at);
    Pack<A, K> out;
#pragma unroll
    for (int e = 0; e < K; e++) out.v[e] = values[k][e], values[k][e] = in.v[e];
    store_pack<A, K>(at, out);
  }
}

// Zeros in shared memory.
template <typename T>
__device__ __forceinline__ void clear(T* s, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) s[i] = T{};
}

// v = u * d + noise * s + b, of a thread's channels.
template <typename T, int K>
__device__ __forceinline__ void affine(Acc<T> (&v)[K], const Acc<T> (&u)[K], const Acc<T>* params,
                                       Acc<T> z) {
  constexpr int kStep = kMostChannels<T>;
  const auto d = load_pack<Acc<T>, K>(params), b = load_pack<Acc<T>, K>(params + kStep),
             s = load_pack<Acc<T>, K>(params + 2 * kStep);
#pragma unroll
  for (int e = 0; e < K; e++) v[e] = u[e] * d.v[e] + (z * s.v[e] + b.v[e]);
}

template <typename T, bool kPwl>
__global__ void __launch_bounds__(kPixelThreads, kPixelBlocks<T>)
    synthesis_epilogue_fwd_pixels_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int K = kPiece<T>, kStages = 3;
  GK_DYNAMIC_SHARED(T, shared);
  __shared__ Taps<A> taps;
  __shared__ __align__(16) A params[3 * kMostChannels<T>];
  __shared__ Tile tile;
  const int channels = K << a.lanes_log2, c0 = static_cast<int>(blockIdx.y) * channels;
  const int row_size = (a.across + kHalo) * channels;
  const PixelRows<T> x_rows{a.x, a.H, a.W, row_size / kVec<T>, a.magic};
  A* const noises = reinterpret_cast<A*>(shared + kStages * a.step * row_size);
  clear(shared, kStages * a.step * row_size);
  if (threadIdx.x == 0) tile.set(a);
  __syncthreads();
  if (threadIdx.x < 32) share_taps<T>(&taps, nullptr, a);
  share_params<T, kMostChannels<T>>(params, a, tile.n, c0, threadIdx.x, channels);
  const int all = min(a.tile_h, a.out_h - tile.row0) + kHalo;
  const T* from = x_rows.first(a, tile.n, c0, tile.row0 - a.y0, tile.col0 - a.x0);
  // Rows of the strip from `row` on, to a stage.
  const auto begin = [&](int stage, int row) {
    const int count = min(a.step, all - row);
    if (count > 0) {
      const TileAt t(tile);
      T* const to = shared + stage * a.step * row_size;
      if (a.vec_x)
        x_rows.copy(to, from, a, t.row0 - a.y0 + row, count);
      else
        x_rows.copy_slowly(to, a, t.n, c0, t.row0 - a.y0 + row, t.col0 - a.x0, count);
      if (a.noise)
        copy_noise(noises + stage * a.step * a.across, a, t.n, t.row0 + row - kHalo, t.col0, count);
    }
    if (from) from += static_cast<int64_t>(a.step) * a.W * a.C;
    copy_batch();
  };
  begin(0, 0);
  begin(1, a.step);
  const int lane = static_cast<int>(threadIdx.x) & ((1 << a.lanes_log2) - 1);
  const int col = static_cast<int>(threadIdx.x) >> a.lanes_log2, count = a.C - c0 - lane * K;
  const bool there = col < min(a.tile_w, a.out_w - tile.col0) && count > 0;
  T* out = a.out + offset<true>(a.C, tile.n, c0 + lane * K, a.out_h, a.out_w, tile.row0 - kHalo,
                                tile.col0 + col);
  A waiting[kHalo][K] = {};
  with_format(a.format, [&](Format<T> format) {
    int stage = 0;
    for (int row = 0; row < all; row += a.step) {
      copy_wait<1>();
      __syncthreads();
      begin(stage == 0 ? kStages - 1 : stage - 1, row + 2 * a.step);
      if (there) {
        const T* line = shared + stage * a.step * row_size + (col * channels + lane * K);
        const A* z_at = noises + stage * a.step * a.across + col;
        const bool separable = taps.separable;
        const int behind = min(row + a.step, all);
#pragma unroll 1
        for (int r = row; r < behind; r++) {
          A u[K];
          take_row(
              waiting, taps, separable,
              [&](int k, A(&v)[K]) { widen(load_pack<T, K>(line + k * channels), format, v); }, u);
          if (r >= kHalo) {
            A v[K];
            affine<T>(v, u, params + lane * K, a.noise ? *z_at : A(0));
            if constexpr (kPwl) {
              const Pwl pwl(p);
#pragma unroll
              for (int e = 0; e < K; e++) v[e] = pwl.value(v[e]);
            } else {
              each<false, 1>(
                  [&](int, A& to) { to = clamped(act_value<false>(to, p) * p.gain, p.clamp); }, v);
            }
            store_packed<T, K>(out, narrow<T, K>(v, format), a.vec_out, count);
          }
          line += row_size, z_at += a.across, out += static_cast<int64_t>(a.out_w) * a.C;
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  });
}

// What a thread copies next.
template <typename T>
struct alignas(16) Sources {
  const T *x, *dy;
};

// Where a thread stands, computed again where it is asked for: registers are short.
template <typename T>
struct Column {
  int channels, col, ch, du_size, row_size;  // du_size, row_size: elements of a row
  __device__ __forceinline__ explicit Column(const Args<T>& a) {
    const int log2 = a.lanes_log2;
    const int t = static_cast<int>(thread_again());
    channels = kPiece<T> << log2, col = t >> log2, ch = (t & ((1 << log2) - 1)) * kPiece<T>;
    du_size = a.across * channels, row_size = du_size + kHalo * channels;
  }
  __device__ __forceinline__ int at() const { return col * channels + ch; }
};

// Rows of du = dL/d(filter(x)) go through shared memory, from which their own filter takes them:
// row r of x makes row r - 3 of dv and du, and that row r - 6 of dx. Between these two a thread's
// sums and what waits for rows of du take turns in registers.
template <typename T, bool kPwl>
__global__ void __launch_bounds__(kPixelThreads, kPixelBlocks<T>)
    synthesis_epilogue_bwd_pixels_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int K = kPiece<T>, kStep = kMostChannels<T>;
  GK_DYNAMIC_SHARED(A, dus);
  __shared__ Taps<A> taps, adjoint;
  __shared__ __align__(16) A params[3 * kStep];
  __shared__ A scratch[kPixelThreads / 32 * 3 * kStep];
  __shared__ Tile tile;
  // The step's row, and its stage, of which there are two: for the time up to du, and from then on.
  __shared__ int row_of[2], stage_of[2];
  // Of x and dy there are two stages; beside them, what threads park, and the noise.
  const auto xs = [&](int stage) {
    const Column<T> c(a);
    return reinterpret_cast<T*>(dus + a.step * c.du_size) + stage * a.step * c.row_size;
  };
  const auto dys = [&](int stage) { return xs(2) + stage * a.step * Column<T>(a).du_size; };
  const auto parked = [&] { return reinterpret_cast<A*>(dys(2)); };
  const auto sources = [&] {
    return reinterpret_cast<Sources<T>*>(parked() + 3 * K * a.threads) + thread_again();
  };
  const auto noises = [&](int stage) {
    return reinterpret_cast<A*>(reinterpret_cast<Sources<T>*>(parked() + 3 * K * a.threads) +
                                a.threads) +
           stage * a.step * a.across;
  };
  const auto rows = [&](const TileAt& t) { return min(a.tile_h, a.H - t.row0) + 2 * kHalo; };
  const PixelRows<T> x_rows{a.x, a.H, a.W, Column<T>(a).row_size / kVec<T>, a.magic};
  const PixelRows<T> dy_rows{a.dy, a.out_h, a.out_w, Column<T>(a).du_size / kVec<T>, a.dy_magic};
  const auto begin = [&](int stage, int row) {
    const TileAt t(tile);
    const int count = min(a.step, rows(t) - row);
    if (count > 0) {
      const int c0 = static_cast<int>(blockIdx.y) * Column<T>(a).channels;
      const int top = t.row0 - kHalo, dy_top = top + a.y0 - kHalo;
      const int left = t.col0 - kHalo, dy_left = left + a.x0;
      if (a.vec_x) {
        Sources<T> from = *sources();
        x_rows.copy(xs(stage), from.x, a, top + row, count);
        dy_rows.copy(dys(stage), from.dy, a, dy_top + row, count);
        if (from.x) from.x += static_cast<int64_t>(a.step) * a.W * a.C;
        if (from.dy) from.dy += static_cast<int64_t>(a.step) * a.out_w * a.C;
        *sources() = from;
      } else {
        x_rows.copy_slowly(xs(stage), a, t.n, c0, top + row, left, count);
        dy_rows.copy_slowly(dys(stage), a, t.n, c0, dy_top + row, dy_left, count);
      }
      if (a.noise) copy_noise(noises(stage), a, t.n, dy_top + row, dy_left, count);
    }
    copy_batch();
  };
  clear(xs(0), static_cast<int>(reinterpret_cast<T*>(parked()) - xs(0)));
  if (threadIdx.x == 0) {
    tile.set(a);
    row_of[0] = stage_of[0] = 0;
  }
  __syncthreads();
  {
    const Column<T> c(a);
    const int c0 = static_cast<int>(blockIdx.y) * c.channels;
    if (threadIdx.x < 32) share_taps(&taps, &adjoint, a);
    share_params<T, kStep>(params, a, tile.n, c0, threadIdx.x, c.channels);
    *sources() = {
        x_rows.first(a, tile.n, c0, tile.row0 - kHalo, tile.col0 - kHalo),
        dy_rows.first(a, tile.n, c0, tile.row0 + a.y0 - 2 * kHalo, tile.col0 + a.x0 - kHalo)};
  }
  begin(0, 0);
  begin(1, a.step);
  A waiting[kHalo][K] = {};
  A turned[3][K] = {};  // the sums, or what waits for rows of du
#pragma unroll
  for (int k = 0; k < 3; k++)
    store_pack<A, K>(parked() + (k * a.threads + static_cast<int>(threadIdx.x)) * K, Pack<A, K>{});
  with_format(a.format, [&](Format<T> format) {
    for (;;) {
      copy_wait<1>();
      __syncthreads();
      {
        const TileAt t(tile);
        const Column<T> c(a);
        const volatile int *row_at = row_of, *stage_at = stage_of;
        const int row = row_at[0], stage = stage_at[0];
        if (threadIdx.x == 0) row_of[1] = row, stage_of[1] = stage;
        int left = min(a.step, rows(t) - row);
        const bool separable = taps.separable;
        const T* line = xs(stage) + c.at();
        const T* dy = dys(stage) + c.at();
        const A* z_at = noises(stage) + c.col;
        A* du = dus + c.at();
        // Sums are over dv that are inside and of no other tile.
        const int out_row0 = t.row0 + a.y0 - 2 * kHalo, out_col = t.col0 + a.x0 - kHalo + c.col;
        const int own_cols = t.col0 + a.tile_w < a.W ? a.tile_w : a.across;
        const int own_rows = t.row0 + a.tile_h < a.H ? a.tile_h + kHalo : 1 << 30;
        const int first = max(kHalo, -out_row0);
        const bool own = c.col < own_cols && out_col >= 0 && out_col < a.out_w;
        const int owned = own ? max(min(own_rows, a.out_h - out_row0) - first, 0) : 0;
        const int before = left + row - first - owned;  // rows left behind the last of those
        if (c.col < a.across && static_cast<int>(blockIdx.y) * c.channels + c.ch < a.C) {
#pragma unroll 1
          for (; left > 0; left--) {
            A u[K];
            take_row(
                waiting, taps, separable,
                [&](int k, A(&v)[K]) { widen(load_pack<T, K>(line + k * c.channels), format, v); },
                u);
            const A z = a.noise ? *z_at : A(0);
            A v[K], dv[K];
            int ch = c.ch;
            forget(ch);  // else registers hold the parameters
            affine<T>(v, u, params + ch, z);
            widen(load_pack<T, K>(dy), format, dv);
            if constexpr (kPwl) {
              const Pwl pwl(p);
#pragma unroll
              for (int e = 0; e < K; e++) dv[e] = pwl.grad(dv[e], v[e]);
            } else {
              grad<false>(dv, v, p);
            }
            if (static_cast<unsigned>(left - before - 1) < static_cast<unsigned>(owned))
#pragma unroll
              for (int e = 0; e < K; e++) {
                turned[0][e] += dv[e] * u[e];
                turned[1][e] += dv[e];
                turned[2][e] += dv[e] * z;
              }
            const auto d = load_pack<A, K>(params + ch);
            Pack<A, K> piece;
#pragma unroll
            for (int e = 0; e < K; e++) piece.v[e] = dv[e] * d.v[e];
            store_pack<A, K>(du, piece);
            line += c.row_size, dy += c.du_size, z_at += a.across, du += c.du_size;
          }
        }
      }
      swap<A, K>(parked(), a.threads, turned);
      __syncthreads();
      {
        const volatile int *row_at = row_of, *stage_at = stage_of;
        if (threadIdx.x == 0) row_of[0] = row_at[1] + a.step, stage_of[0] = 1 - stage_at[1];
        begin(stage_at[1], row_at[1] + 2 * a.step);
        const TileAt t(tile);
        const Column<T> c(a);
        const int row = row_at[1], behind = min(row + a.step, rows(t));
        const int c0 = static_cast<int>(blockIdx.y) * c.channels, count = a.C - c0 - c.ch;
        const bool separable = taps.separable;
        const A* du = dus + c.at();
        T* out = a.out + offset<true>(a.C, t.n, c0 + c.ch, a.H, a.W, t.row0 - 2 * kHalo + row,
                                      t.col0 + c.col);
        if (c.col < min(a.tile_w, a.W - t.col0) && count > 0) {
#pragma unroll 1
          for (int r = row; r < behind; r++) {
            A dx[K];
            take_row(
                turned, adjoint, separable,
                [&](int k, A(&v)[K]) {
                  const auto piece = load_pack<A, K>(du + k * c.channels);
#pragma unroll
                  for (int e = 0; e < K; e++) v[e] = piece.v[e];
                },
                dx);
            if (r >= 2 * kHalo) store_packed<T, K>(out, narrow<T, K>(dx, format), a.vec_out, count);
            du += c.du_size, out += static_cast<int64_t>(a.W) * a.C;
          }
        }
        swap<A, K>(parked(), a.threads, turned);
        if (row_at[1] + a.step >= rows(TileAt(tile))) break;
      }
    }
  });
  // A warp has lanes of all of a pixel's channels.
  const Column<T> c(a);
  const int warp = static_cast<int>(threadIdx.x) / 32, lanes = c.channels / K;
#pragma unroll
  for (int k = 0; k < 3; k++)
#pragma unroll
    for (int e = 0; e < K; e++) {
      A v = turned[k][e];
#pragma unroll
      for (int apart = 16; apart > 0; apart /= 2)
        if (apart >= lanes) v += __shfl_xor_sync(0xffffffffu, v, apart);
      if (static_cast<int>(threadIdx.x) % 32 < lanes)
        scratch[(warp * 3 + k) * c.channels + c.ch + e] = v;
    }
  write_partials(scratch, a, tile.n, static_cast<int>(blockIdx.y) * c.channels, c.channels,
                 tile.index);
  finish<T>(a, c.channels);
}

}  // namespace
}  // namespace gankern
