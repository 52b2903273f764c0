// demod_coefs: d[n,o] = rsqrt(Σ_i s[n,i]² q[o,i] + eps) with q[o,i] = Σ_k W[o,i,k]², and its
// gradient. With g[n,o] = -d³ dd,
//   dW[o,i,k] = W[o,i,k] Σ_n g[n,o] s[n,i]²        ds[n,i] = s[n,i] Σ_o g[n,o] q[o,i].
//
// Forward: a block takes up to eight output channels, for which it reads the styles once: a
// twentieth of StyleGAN2's weights then. All of its weights are under way at once; their squares go
// through shared memory, from which a thread sums the k of a channel and keeps q for the backward.
// Of q, in shared memory too, each warp takes the products with one sample's styles. Where k is the
// outer dimension (channels-last), or too long for that, a thread reads the k itself.
// Backward: one launch, in which some blocks each take a tile of ds and the others a tile of dW. q
// makes them independent: without it ds would need sums over blocks, or few and large blocks, and a
// gradient in the styles alone would read the weights.
#include "common.cuh"

namespace gankern {
namespace {

constexpr int kSamples = 8;  // of which a thread sums at a time

__device__ __forceinline__ float rsqrt_(float v) { return rsqrtf(v); }
__device__ __forceinline__ double rsqrt_(double v) { return rsqrt(v); }

// Styles are float32 or 16-bit whatever the weights are; float64 is not mixed with other types.
template <typename A>
struct Styles {
  using T = std::conditional_t<sizeof(A) == 8, double, Half16>;
  const void* p;
  bool is_f32;
  Format<T> format;
  Styles(const void* p, int dtype) : p(p), is_f32(dtype == kF32), format(dtype) {}
  __device__ __forceinline__ A at(int64_t i) const { return load_param<T>(p, is_f32, i, format); }
};

// float64, which is for gradient checks, goes element by element.
template <typename T>
constexpr int kPack = sizeof(T) == 8 ? 1 : 16 / sizeof(T);

// N numbers to and from shared memory, 16 bytes at a time. Two such parts are taken in an order
// that alternates every four lanes, so that eight lanes in turn meet all banks.
template <int N, typename A>
constexpr int kPart = N * sizeof(A) > 16 ? 16 / sizeof(A) : N;

template <int N, typename A>
__device__ __forceinline__ void store_parts(A* at, const A (&values)[N]) {
  constexpr int kSize = kPart<N, A>, kParts = N / kSize, kFlip = kParts > 1;
  const bool swap = kFlip && (threadIdx.x >> 2 & 1);
#pragma unroll
  for (int part = 0; part < kParts; part++) {
    Pack<A, kSize> out;
#pragma unroll
    for (int j = 0; j < kSize; j++)
      out.v[j] = swap ? values[(part ^ kFlip) * kSize + j] : values[part * kSize + j];
    store_pack<A, kSize>(at + (swap ? part ^ kFlip : part) * kSize, out);
  }
}

template <int N, typename A>
__device__ __forceinline__ void load_parts(const A* at, A (&values)[N]) {
  constexpr int kSize = kPart<N, A>, kParts = N / kSize, kFlip = kParts > 1;
  const bool swap = kFlip && (threadIdx.x >> 2 & 1);
  Pack<A, kSize> parts[kParts];
#pragma unroll
  for (int part = 0; part < kParts; part++)
    parts[part] = load_pack<A, kSize>(at + (swap ? part ^ kFlip : part) * kSize);
#pragma unroll
  for (int j = 0; j < N; j++)
    values[j] = swap ? parts[(j / kSize) ^ kFlip].v[j % kSize] : parts[j / kSize].v[j % kSize];
}

// Adds up two lanes' numbers, of which each keeps the sums of one half.
template <int N, typename A>
__device__ __forceinline__ void halve(const A (&values)[N], A (&sums)[N / 2], bool upper,
                                      int other) {
#pragma unroll
  for (int j = 0; j < N / 2; j++) {
    const A keep = upper ? values[j + N / 2] : values[j];
    const A give = upper ? values[j] : values[j + N / 2];
    sums[j] = keep + __shfl_xor_sync(0xffffffffu, give, other);
  }
}

// Input channels that a warp takes at a time, in packs of N. Of weights [O, K, I] each of kColumns
// lanes takes a pack, and each of kGroups groups of such lanes every kGroups-th k, kTaps of them at
// once: those of 3x3.
template <int N>
struct Step {
  static constexpr int kChannels = N == 1 ? 32 : 64;
  static constexpr int kColumns = kChannels / N, kGroups = 32 / kColumns;
  static constexpr int kTaps = (9 + kGroups - 1) / kGroups;
};

// The sizes, and how the weights lie. `rows`: as [O, I, K], else as [O, K, I].
struct Shape {
  int64_t O;
  int N, I, K;
  bool rows, packed;
};

// --- Forward.

constexpr int kFwdThreads = 512, kFwdWarps = kFwdThreads / 32;
constexpr int kOuts = 8;   // most output channels of a block: a sector of d
constexpr int kSteps = 2;  // channels of a chunk whose k a thread sums
template <typename A>
constexpr int kStage = 36864 / sizeof(A);  // squares: 1024 channels of 3x3 in float32
constexpr int kStylesAhead = 4;            // of a thread

template <typename T>
struct Forward {
  using A = Acc<T>;
  Format<T> format;
  Styles<A> styles;
  const T* w;
  A *d, *q;
  Shape shape;
  // Of a block: threads side by side along the channels, output channels, samples at a time.
  int log_columns, log_outs, log_samples;
  int chunk;               // channels at a time, kSteps for each of these threads or fewer
  int64_t i_step, k_step;  // of the weights, where they are not staged
  A eps;
};

// Some channels' styles, as they are in memory: numbers only when they are used, so that nothing
// waits for them before.
template <typename A>
struct RawStyles {
  using Raw = std::conditional_t<sizeof(A) == 8, double, unsigned>;
  Raw raw[kStylesAhead];

  // At `at`, at + step, ...: `count` of them.
  __device__ __forceinline__ void load(const Styles<A>& from, int64_t at, int step, int count) {
#pragma unroll
    for (int j = 0; j < kStylesAhead; j++, at += step) {
      forget(at);
      raw[j] = Raw(0);
      if (j >= count) continue;
      if constexpr (sizeof(A) == 8)
        raw[j] = static_cast<const double*>(from.p)[at];
      else if (from.is_f32)
        raw[j] = static_cast<const unsigned*>(from.p)[at];
      else
        raw[j] = static_cast<const unsigned short*>(from.p)[at];
    }
  }
  __device__ __forceinline__ A at(const Styles<A>& from, int j) const {
    if constexpr (sizeof(A) == 8)
      return raw[j];
    else
      return from.is_f32 ? __uint_as_float(raw[j])
                         : to_acc(Half16{static_cast<unsigned short>(raw[j])}, from.format);
  }
};

// The squares of a chunk of weights [I, K] to shared memory, by the threads side by side.
template <typename T, int N>
__device__ __forceinline__ void stage_rows(const Forward<T>& a, const T* from, int column,
                                           int packs, Acc<T>* stage) {
  constexpr int kLoads = N == 1 ? 4 : (kSteps * 9 + N - 1) / N;
  const int columns = 1 << a.log_columns;
  for (int first = column; first < packs; first += kLoads * columns) {
    Raw<T, N> x[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; j++) {
      const int p = first + j * columns;
      if (p < packs) x[j] = load_raw<T, N>(from + p * N);
    }
#pragma unroll
    for (int j = 0; j < kLoads; j++) {
      const int p = first + j * columns;
      if (p >= packs) continue;
      Acc<T> squares[N];
      widen(reinterpret_cast<const Pack<T, N>&>(x[j]), a.format, squares);
#pragma unroll
      for (int e = 0; e < N; e++) squares[e] *= squares[e];
      store_parts<N>(stage + p * N, squares);
    }
  }
}

// Of other weights: the sums over k of the thread's channels, N neighbours and `other` further on.
template <typename T, int N>
__device__ __forceinline__ void sum_columns(const Forward<T>& a, const T* from, int channel,
                                            int channels, int other, Acc<T> (&q)[kSteps]) {
  constexpr int kTaps = N == 1 ? 5 : 9;
  int64_t at = channel * a.i_step;
  for (int k0 = 0; k0 < a.shape.K; k0 += kTaps) {
    Pack<T, N> x[kTaps][kSteps / N] = {};
    forget(at);
#pragma unroll
    for (int t = 0; t < kTaps; t++, at += a.k_step)
#pragma unroll
      for (int j = 0; j < kSteps / N; j++)
        if (channel + j * other < channels && k0 + t < a.shape.K)
          x[t][j] = load_pack<T, N>(from + at + j * other * a.i_step);
#pragma unroll
    for (int t = 0; t < kTaps; t++)
#pragma unroll
      for (int j = 0; j < kSteps / N; j++) {
        Acc<T> w[N];
        widen(x[t][j], a.format, w);
#pragma unroll
        for (int e = 0; e < N; e++) q[j * N + e] += w[e] * w[e];
      }
  }
}

// N: elements of a pack of weights; 1 or kSteps where they are not staged.
template <typename T, int N, bool kStaged>
__global__ void __launch_bounds__(kFwdThreads, sizeof(T) == 8 ? 1 : 2)
    demod_coefs_fwd_kernel(Forward<T> a) {
  using A = Acc<T>;
  __shared__ __align__(16) A stage[kStaged ? kStage<A> : 1];
  __shared__ __align__(16) A squares[kSteps * kFwdThreads];  // q, [outs][kSteps * columns]
  __shared__ A of_warps[kFwdWarps * kOuts];                  // [warps of a sample][samples][kOuts]
  const int I = a.shape.I, K = a.shape.K, lane = threadIdx.x % 32;
  const int columns = 1 << a.log_columns, outs = 1 << a.log_outs, samples = 1 << a.log_samples;
  const int line = kSteps * columns;
  const unsigned o0 = blockIdx.x << a.log_outs;  // under 2**31
  // Until q is there a thread is of an output channel, then of a sample.
  const int out = threadIdx.x >> a.log_columns, column = threadIdx.x & (columns - 1);
  const int64_t row = static_cast<int64_t>(o0 + out) * I;
  constexpr int kSide = kStaged ? 1 : N;  // neighbouring channels of a thread
  const int first = kSide * column;
  const int lanes = blockDim.x >> a.log_samples;  // of a sample
  const int sample = threadIdx.x / 32 >> (a.log_columns + a.log_outs - a.log_samples - 5);
  const int mine = threadIdx.x & (lanes - 1);
  for (int n0 = 0; n0 == 0 || n0 < a.shape.N; n0 += samples) {
    A sums[kOuts] = {};
    for (int i0 = 0; i0 < I; i0 += a.chunk) {
      const int channels = min(a.chunk, I - i0);
      RawStyles<A> styles;
      const auto load = [&](int c) {
        const int64_t at = static_cast<int64_t>(n0 + sample) * I + i0 + c;
        const int left = (channels - c + lanes - 1) >> (a.log_columns + a.log_outs - a.log_samples);
        styles.load(a.styles, at, lanes, n0 + sample < a.shape.N ? left : 0);
      };
      // As early as there are registers for them.
      constexpr bool kLate = !kStaged && N == 1;
      const bool staging = kStaged && n0 == 0;
      if (!kLate && !staging) load(mine);
      if (n0 == 0 || I > a.chunk) {
        A q[kSteps] = {};
        if (n0 + i0 > 0) __syncthreads();  // what is in shared memory has been read
        const bool active = o0 + out < a.shape.O;
        if (staging) {
          A* const own = stage + out * a.chunk * K;
          if (active) stage_rows<T, N>(a, a.w + (row + i0) * K, column, channels * K / N, own);
          load(mine);
          __syncthreads();
#pragma unroll
          for (int j = 0; j < kSteps; j++)
            if (active && column + j * columns < channels)
#pragma unroll 3
              for (int e = 0; e < K; e++) q[j] += own[(column + j * columns) * K + e];
        } else if (!kStaged && n0 == 0) {
          if (active)
            sum_columns<T, kStaged ? 1 : N>(a, a.w + row * K + i0 * a.i_step, first, channels,
                                            columns, q);
        }
#pragma unroll
        for (int j = 0; j < kSteps; j += kSide) {
          const int c = first + j * columns;
          Pack<A, kSide> side;
#pragma unroll
          for (int e = 0; e < kSide; e++) side.v[e] = q[j + e];
          if (active && c < channels) {
            if (n0 > 0)
              side = load_pack<A, kSide>(a.q + row + i0 + c);
            else
              store_pack<A, kSide>(a.q + row + i0 + c, side);
          }
          store_pack<A, kSide>(squares + out * line + c, side);
        }
        __syncthreads();
      }
      if (kLate) load(mine);
#pragma unroll 1
      for (int c = mine; c < channels; c += kStylesAhead * lanes) {
#pragma unroll
        for (int j = 0; j < kStylesAhead; j++) {
          if (c + j * lanes >= channels) break;
          const A style = styles.at(a.styles, j);
          const A* from = squares + c + j * lanes;
#pragma unroll
          for (int o = 0; o < kOuts; o++)
            if (o < outs) sums[o] += style * style * from[o * line];
        }
        load(c + kStylesAhead * lanes);
      }
    }
    A four[4], two[2], one[1];
    halve(sums, four, lane >> 4 & 1, 16);
    halve(four, two, lane >> 3 & 1, 8);
    halve(two, one, lane >> 2 & 1, 4);
    one[0] = warp_sum(one[0], 4);
    if (n0 > 0) __syncthreads();  // the sums of the samples before have been read
    const int part = mine / 32;
    if (lane % 4 == 0) of_warps[((part << a.log_samples) + sample) * kOuts + lane / 4] = one[0];
    __syncthreads();
    const int m = threadIdx.x / kOuts, o = threadIdx.x % kOuts;
    if (m < samples && n0 + m < a.shape.N && o < outs && o0 + o < a.shape.O) {
      A total = A(0);
      for (int p = 0; p < lanes / 32; p++) total += of_warps[(p * samples + m) * kOuts + o];
      a.d[static_cast<int64_t>(n0 + m) * a.shape.O + o0 + o] = rsqrt_(total + a.eps);
    }
  }
}

// --- Backward.

// Of 16-bit types twice as many: a tile of dW has as many bytes, and d and the styles are read for
// as many.
template <typename T>
constexpr int kThreads = sizeof(T) == 2 ? 512 : 256;
template <typename T>
constexpr int kWarps = kThreads<T> / 32;
// Blocks of a multiprocessor; float64 is for checks: fewer, with registers enough.
template <typename T>
constexpr int kBlocks = (sizeof(T) == 8 ? 512 : 1024) / kThreads<T>;
template <typename T>
constexpr int kMostOuts = 2 * kWarps<T>;  // output channels of a tile of dW
template <typename T>
constexpr int kChunk = kThreads<T>;  // output channels whose g a tile of ds has at a time
constexpr int kHeld = 32;            // samples that a tile of dW has in shared memory at a time
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kSamplesAhead = 1;  // more spill on sm_75
#else
constexpr int kSamplesAhead = 2;
#endif
constexpr int kAhead = 4;  // packs of q that a thread has under way
constexpr int kTile = 16;  // packs of q side by side in a tile of ds

template <typename T>
struct Backward {
  using A = Acc<T>;
  Format<T> format;
  Styles<A> styles;
  const A *dd, *d, *q;
  const T* w;
  T* dw;
  void* ds;
  Shape shape;
  unsigned style_blocks, style_tiles;  // tiles of ds: in all, and along the input channels
  unsigned weight_tiles;               // of dW, along the input channels
  int log_outs;                        // output channels of a tile of dW
};

// Element `at` of g [N, O].
template <typename T>
__device__ __forceinline__ Acc<T> grad(const Backward<T>& a, int64_t at) {
  const Acc<T> d = a.d[at];
  return -a.dd[at] * (d * d * d);
}

// A tile of dW, of packs of N: each warp takes every kWarps<T>-th of its output channels.
template <typename T, int N>
struct Tile {
  using A = Acc<T>;
  static constexpr int kChannels = Step<N>::kChannels;
  A *g, *styles, *factors;
  int64_t o0;
  int i0, channels;

  __device__ Tile(const Backward<T>& a, unsigned index, A* shared) {
    const unsigned line = index / a.weight_tiles;
    o0 = static_cast<int64_t>(line) << a.log_outs;
    i0 = static_cast<int>(index - line * a.weight_tiles) * kChannels;
    channels = min(kChannels, a.shape.I - i0);
    g = shared;                            // [kHeld][outs]
    styles = g + kHeld * kMostOuts<T>;     // [kHeld][kChannels], squared
    factors = styles + kHeld * kChannels;  // [kWarps<T>][kChannels]
    factors += threadIdx.x / 32 * kChannels;
  }

  // g and styles of up to kHeld samples from n0 on, by the whole block.
  __device__ __forceinline__ void hold(const Backward<T>& a, int n0) const {
    const int samples = min(kHeld, a.shape.N - n0);
    __syncthreads();
    for (int e = threadIdx.x; e < samples * kChannels; e += kThreads<T>) {
      const int n = n0 + e / kChannels, c = e % kChannels;
      const int m = n0 + (e >> a.log_outs), out = e & ((1 << a.log_outs) - 1);
      const bool more = e < samples << a.log_outs;
      A s = A(0), of_out = A(0);
      if (c < channels) s = a.styles.at(static_cast<int64_t>(n) * a.shape.I + i0 + c);
      if (more && o0 + out < a.shape.O) of_out = grad(a, m * a.shape.O + o0 + out);
      styles[e] = s * s;
      if (more) g[e] = of_out;
    }
    __syncthreads();
  }

  // f(n, g) for the samples of row `row`; all warps come here equally often.
  template <typename F>
  __device__ __forceinline__ void samples(const Backward<T>& a, int row, F f) const {
    for (int n0 = 0; n0 < a.shape.N; n0 += kHeld) {
      if (row < kWarps<T> || a.shape.N > kHeld) hold(a, n0);
      const int count = min(kHeld, a.shape.N - n0);
#pragma unroll kSamplesAhead
      for (int n = 0; n < count; n++) f(n, g[(n << a.log_outs) + row]);
    }
  }
};

// A tile of dW [O, I, K]. The weights are under way while the factors are made.
template <typename T, int N>
__device__ __forceinline__ void weight_rows(const Backward<T>& a, const Tile<T, N>& tile) {
  using A = Acc<T>;
  constexpr int kChannels = Tile<T, N>::kChannels, kLoads = (kChannels * 9 / N + 31) / 32;
  const int lane = threadIdx.x % 32, K = a.shape.K, packs = tile.channels * K / N;
  const int first_c = lane * N / K, skip_c = 32 * N / K;
  const int first_k = lane * N - first_c * K, skip_k = 32 * N - skip_c * K;
  for (int row = threadIdx.x / 32; row < 1 << a.log_outs; row += kWarps<T>) {
    const bool active = tile.o0 + row < a.shape.O;
    int64_t at = ((tile.o0 + row) * a.shape.I + tile.i0) * K;
    Pack<T, N> x[kLoads];
    const auto load = [&](int p) {
      forget(at);
#pragma unroll
      for (int j = 0; j < kLoads; j++)
        if (active && p + 32 * j < packs) x[j] = load_pack<T, N>(a.w + at + (p + 32 * j) * N);
    };
    load(lane);
    A factor[kChannels / 32] = {};
    tile.samples(a, row, [&](int n, A g) {
#pragma unroll
      for (int j = 0; j < kChannels / 32; j++)
        factor[j] += g * tile.styles[n * kChannels + lane + 32 * j];
    });
#pragma unroll
    for (int j = 0; j < kChannels / 32; j++) tile.factors[lane + 32 * j] = factor[j];
    __syncwarp();
    int c = first_c, k = first_k;
    for (int p = lane; active && p < packs;) {
#pragma unroll
      for (int j = 0; j < kLoads; j++) {
        if (p < packs) {
          int channel = c, next = k;
          A f = tile.factors[c], w[N];
          widen(x[j], a.format, w);
#pragma unroll
          for (int e = 0; e < N; e++) {
            w[e] *= f;
            if (++next == K && e + 1 < N) next = 0, f = tile.factors[++channel];
          }
          store_whole<T, N>(a.dw + at + p * N, narrow<T, N>(w, a.format));
        }
        p += 32;
        c += skip_c;
        k += skip_k;
        if (k >= K) k -= K, c++;
      }
      load(p);
    }
    __syncwarp();
  }
}

// A tile of dW [O, K, I].
template <typename T, int N>
__device__ __forceinline__ void weight_columns(const Backward<T>& a, const Tile<T, N>& tile) {
  using A = Acc<T>;
  using S = Step<N>;
  const int lane = threadIdx.x % 32, column = lane % S::kColumns, group = lane / S::kColumns;
  const int K = a.shape.K, I = a.shape.I;
  for (int row = threadIdx.x / 32; row < 1 << a.log_outs; row += kWarps<T>) {
    const bool active = tile.o0 + row < a.shape.O && column * N < tile.channels;
    const int64_t at = (tile.o0 + row) * K * I + tile.i0 + column * N;
    Raw<T, N> x[S::kTaps];
    const auto load = [&](int k) {
      int64_t from = at + static_cast<int64_t>(k) * I;
      forget(from);
#pragma unroll
      for (int t = 0; t < S::kTaps; t++, from += static_cast<int64_t>(S::kGroups) * I)
        if (active && k + t * S::kGroups < K) x[t] = load_raw<T, N>(a.w + from);
    };
    load(group);
    A factor[N] = {};
    tile.samples(a, row, [&](int n, A g) {
      A s[N];
      load_parts<N>(tile.styles + n * S::kChannels + column * N, s);
#pragma unroll
      for (int j = 0; j < N; j++) factor[j] += g * s[j];
    });
    for (int k = group; active && k < K;) {
      int64_t to = at + static_cast<int64_t>(k) * I;
      forget(to);
#pragma unroll
      for (int t = 0; t < S::kTaps;
           t++, k += S::kGroups, to += static_cast<int64_t>(S::kGroups) * I)
        if (k < K) {
          A w[N];
          widen(reinterpret_cast<const Pack<T, N>&>(x[t]), a.format, w);
#pragma unroll
          for (int j = 0; j < N; j++) w[j] *= factor[j];
          store_whole<T, N>(a.dw + to, narrow<T, N>(w, a.format));
        }
      load(k);
    }
  }
}

// A tile of ds: kTile packs of input channels side by side, kSamples samples; the others of a warp
// and the warps share the output channels.
template <typename T, int N>
__device__ __forceinline__ void style_tile(const Backward<T>& a, Acc<T>* shared) {
  using A = Acc<T>;
  const unsigned batch = blockIdx.x / a.style_tiles;
  const int n0 = static_cast<int>(batch) * kSamples, I = a.shape.I;
  constexpr int kColumns = N * kTile, kLines = kThreads<T> / kTile;
  const int i0 = static_cast<int>(blockIdx.x - batch * a.style_tiles) * kColumns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = lane % kTile, line = threadIdx.x / kTile;
  const bool inside = i0 + column * N < I;
  A sums[kSamples * N] = {};
  const unsigned outs = static_cast<unsigned>(a.shape.O);  // under 2**31
  for (unsigned o0 = 0; o0 < outs; o0 += kChunk<T>) {
    const int chunk = min(kChunk<T>, static_cast<int>(outs - o0));
    Pack<A, N> x[kAhead] = {};
    const auto load = [&](int o) {
      int64_t at = static_cast<int64_t>(o0 + o) * I + i0 + column * N;
      forget(at);
#pragma unroll
      for (int t = 0; t < kAhead; t++, at += static_cast<int64_t>(kLines) * I)
        if (inside && o + t * kLines < chunk) x[t] = load_pack<A, N>(a.q + at);
    };
    load(line);
    __syncthreads();
    const int mine = threadIdx.x;
    if (mine < chunk) {
      constexpr int kSize = kPart<kSamples, A>;
#pragma unroll 1
      for (int first = 0; first < kSamples; first += kSize) {  // all at once would spill
        int64_t at = static_cast<int64_t>(n0 + first) * a.shape.O + o0 + mine;
        forget(at);
        Pack<A, kSize> g = {};
#pragma unroll
        for (int j = 0; j < kSize; j++, at += a.shape.O)
          if (n0 + first + j < a.shape.N) g.v[j] = grad(a, at);
        store_pack<A, kSize>(shared + mine * kSamples + first, g);
      }
    }
    __syncthreads();
    for (int o = line; o < chunk; o += kAhead * kLines) {
#pragma unroll
      for (int t = 0; t < kAhead; t++)
        if (o + t * kLines < chunk) {
          constexpr int kSize = kPart<kSamples, A>;
#pragma unroll
          for (int part = 0; part < kSamples; part += kSize) {
            const A* from = shared + (o + t * kLines) * kSamples + part;
            const Pack<A, kSize> g = load_pack<A, kSize>(from);
#pragma unroll
            for (int j = 0; j < kSize; j++)
#pragma unroll
              for (int e = 0; e < N; e++) sums[(part + j) * N + e] += g.v[j] * x[t].v[e];
          }
        }
      load(o + kAhead * kLines);
    }
  }
  // Of the two lines of a warp, each keeps the sums of half of the samples.
  constexpr int kHalf = kSamples / 2;
  A own[kHalf * N];
  halve(sums, own, lane >= kTile, kTile);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kHalf; j++) {
    Pack<A, N> out;
#pragma unroll
    for (int e = 0; e < N; e++) out.v[e] = own[j * N + e];
    store_pack<A, N>(shared + (warp * kSamples + lane / kTile * kHalf + j) * kColumns + column * N,
                     out);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kSamples * kColumns; e += kThreads<T>) {
    const int n = n0 + e / kColumns, i = i0 + e % kColumns;
    if (n >= a.shape.N || i >= I) continue;
    A total = A(0);
#pragma unroll
    for (int w = 0; w < kWarps<T>; w++) total += shared[w * kSamples * kColumns + e];
    const int64_t at = static_cast<int64_t>(n) * I + i;
    store_param<typename Styles<A>::T>(a.ds, a.styles.is_f32, at, a.styles.at(at) * total,
                                       a.styles.format);
  }
}

template <int N>
constexpr int kStylePack = N == 1 ? 1 : 2;  // of q, where the weights have packs of N

template <typename T, int N, bool kRows>
__global__ void __launch_bounds__(kThreads<T>, kBlocks<T>) demod_coefs_bwd_kernel(Backward<T> a) {
  constexpr int kChannels = Step<N>::kChannels;
  constexpr int kOfStyles = kWarps<T> * kSamples * kTile * kStylePack<N>;
  constexpr int kOfWeights = kHeld * (kMostOuts<T> + kChannels) + kWarps<T> * kChannels;
  constexpr int kOfSums = kOfStyles > kOfWeights ? kOfStyles : kOfWeights;
  constexpr int kMost = kOfSums > kChunk<T> * kSamples ? kOfSums : kChunk<T> * kSamples;
  __shared__ __align__(16) Acc<T> shared[kMost];
  if (blockIdx.x < a.style_blocks) {
    style_tile<T, kStylePack<N>>(a, shared);
    return;
  }
  const Tile<T, N> tile(a, blockIdx.x - a.style_blocks, shared);
  if (kRows)
    weight_rows(a, tile);
  else
    weight_columns(a, tile);
}

template <typename T>
Shape shape_of(const void* w, const void* dw, int64_t N, int64_t O, int64_t I, int64_t K,
               bool channels_last) {
  Shape shape{O, static_cast<int>(N), static_cast<int>(I), static_cast<int>(K), false, false};
  shape.rows = !channels_last && K > 1;
  const bool whole = (I * (shape.rows ? K : 1)) % kPack<T> == 0;  // no pack is in two rows
  shape.packed = kPack<T> > 1 && whole && aligned16(w) && aligned16(dw);
  return shape;
}

// launch(elements of a pack, whether weights are [O, I, K]), as types.
template <typename T, typename F>
void by_shape(const Shape& shape, F launch) {
  const auto by_layout = [&](auto n) {
    if (shape.rows)
      launch(n, std::true_type{});
    else
      launch(n, std::false_type{});
  };
  if (shape.packed)
    by_layout(std::integral_constant<int, kPack<T>>{});
  else
    by_layout(std::integral_constant<int, 1>{});
}

}  // namespace

namespace GANKERN_BACKEND {

// q: [O, I]. dtype is that of the weights; sums, d and q are float32, or float64 for float64.
int demod_coefs(int dtype, int styles_dtype, const void* w, const void* styles, void* d, void* q,
                int64_t N, int64_t O, int64_t I, int64_t K, bool channels_last, double eps,
                void* stream) {
  if (O == 0) return 0;
  return by_width(dtype, [&](auto zero, auto format) {
    using T = decltype(zero);
    using A = Acc<T>;
    Forward<T> a{format, {styles, styles_dtype}};
    a.w = static_cast<const T*>(w);
    a.d = static_cast<A*>(d);
    a.q = static_cast<A*>(q);
    a.shape = shape_of<T>(w, q, N, O, I, K, channels_last);
    a.eps = static_cast<A>(eps);
    const int columns = pow2_between(ceil_div(I, kSteps), 32, kFwdThreads / 2);
    int outs = min(kOuts, kFwdThreads / columns);
    a.i_step = a.shape.rows ? K : 1;
    a.k_step = a.shape.rows ? 1 : I;
    a.chunk = static_cast<int>(max(int64_t(1), min(int64_t(kSteps * columns), I)));
    if (a.shape.rows) {
      // A multiple of 8 channels, so that each chunk begins with a whole pack.
      const int64_t fitting = kStage<A> / K / 8 * 8;
      while (outs > 1 && outs * int64_t(a.chunk) > kStage<A> / K) outs /= 2;
      a.shape.rows = fitting > 0;
      a.shape.packed = a.shape.packed && a.shape.rows;
      if (a.shape.rows) a.chunk = static_cast<int>(min(int64_t(a.chunk), fitting));
    }
    a.log_columns = log2_of(columns);
    a.log_outs = log2_of(outs);
    a.log_samples = log2_of(pow2_between(N, 1, min(kSamples, columns * outs / 32)));
    by_shape<T>(a.shape, [&](auto n, auto rows) {
      constexpr bool kStaged = decltype(rows)::value;
      constexpr int kWide = decltype(n)::value;
      GK_LAUNCH((demod_coefs_fwd_kernel < T, kStaged || kWide == 1 ? kWide : kSteps, kStaged >),
                dim3(static_cast<unsigned>(ceil_div(O, outs))), dim3(columns * outs), 0, stream, a);
    });
    return static_cast<int>(cudaGetLastError());
  });
}

// dw or ds may be null, where they are not wanted.
int demod_coefs_bwd(int dtype, int styles_dtype, const void* dd, const void* d, const void* q,
                    const void* w, const void* styles, void* dw, void* ds, int64_t N, int64_t O,
                    int64_t I, int64_t K, bool channels_last, void* stream) {
  if (I == 0) return 0;
  return by_width(dtype, [&](auto zero, auto format) {
    using T = decltype(zero);
    Backward<T> a{format, {styles, styles_dtype}};
    a.dd = static_cast<const Acc<T>*>(dd);
    a.d = static_cast<const Acc<T>*>(d);
    a.q = static_cast<const Acc<T>*>(q);
    a.w = static_cast<const T*>(w);
    a.dw = static_cast<T*>(dw);
    a.ds = ds;
    a.shape = shape_of<T>(w, dw, N, O, I, K, channels_last);
    // Of ds too: a tile of it goes with the weights' packs.
    a.shape.packed &= I % kStylePack<kPack<T>> == 0 && aligned16(q);
    a.style_tiles = static_cast<unsigned>(
        ceil_div(I, kTile * (a.shape.packed ? kStylePack<kPack<T>> : kStylePack<1>)));
    a.style_blocks = ds ? a.style_tiles * static_cast<unsigned>(ceil_div(N, kSamples)) : 0;
    a.weight_tiles = static_cast<unsigned>(ceil_div(I, a.shape.packed ? 64 : 32));
    a.log_outs = log2_of(kWarps<T>);
    if (ceil_div(O, kMostOuts<T>) * a.weight_tiles >= sm_count())
      a.log_outs = log2_of(kMostOuts<T>);
    int64_t blocks = a.style_blocks;
    if (dw) blocks += a.weight_tiles * ceil_div(O, int64_t(1) << a.log_outs);
    if (blocks == 0) return 0;
    by_shape<T>(a.shape, [&](auto n, auto rows) {
      GK_LAUNCH((demod_coefs_bwd_kernel<T, decltype(n)::value, decltype(rows)::value>),
                dim3(static_cast<unsigned>(blocks)), dim3(kThreads<T>), 0, stream, a);
    });
    return static_cast<int>(cudaGetLastError());
  });
}

GK_EXPORT(demod_coefs);
GK_EXPORT(demod_coefs_bwd);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
