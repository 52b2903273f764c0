// demod_coefs: d[n,o] = rsqrt(Σ_i s[n,i]² q[o,i] + eps) with q[o,i] = Σ_k W[o,i,k]², and its
// gradient. With g[n,o] = -d³ dd,
//   dW[o,i,k] = W[o,i,k] Σ_n g[n,o] s[n,i]²        ds[n,i] = s[n,i] Σ_o g[n,o] q[o,i].
//
// Forward: a block takes some output channels, so that it reads the styles once for all of them. A
// warp takes one, or a part of one, and works alone on 64 input channels at a time: it reads the
// weights, 16 bytes a lane and step, keeps q for the backward, and adds up over the input channels
// in a fixed order. Weights [O, I, k] go through the warp's own piece of shared memory, from which
// a lane sums the k of a channel. Of weights [O, k, I] (channels-last, or k = 1) the lanes share
// the k, and each ends with the sums of two channels. Backward: one launch, in which some blocks
// each take a tile of ds and the others a tile of dW. q makes them independent: without it ds would
// need sums over blocks, or few and large blocks, and a gradient in the styles alone would read the
// weights.
#include "common.cuh"

namespace gankern {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Blocks of a multiprocessor; float64 is for checks: fewer, with registers enough.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 4;
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

template <typename A>
constexpr int kStage = 2304 / sizeof(A);  // squares of a warp: 64 channels of 3x3 in float32
template <typename A>
constexpr int kStyles = 2048 / sizeof(A);  // input channels whose squared styles are at hand

template <typename T>
struct Forward {
  using A = Acc<T>;
  Format<T> format;
  Styles<A> styles;
  const T* w;
  A *d, *q;
  Shape shape;
  int log_outs, log_parts;  // output channels of a block, warps of an output channel
  int staged;               // channels in a warp's stage, 0 where K is too long for that
  bool style_packs;         // four styles at a time
  A eps;
};

// What a warp of the forward works on: one output channel, and chunk after chunk of input channels.
template <typename T>
struct Work {
  using A = Acc<T>;
  int64_t row;  // the output channel's first square sum
  A* styles;
  int part;     // it takes every step of the channels that is `part` modulo 1 << log_parts
  bool active;  // there is such an output channel
  int n0, samples;
  int i0, channels;
};

template <typename S, typename T>
__device__ __forceinline__ void square_packs(const Forward<T>& a, const Work<T>& k,
                                             Format<S> format) {
  using A = Acc<T>;
  for (int i = threadIdx.x * 4; i < k.channels; i += blockDim.x * 4) {
#pragma unroll 1
    for (int n0 = 0; n0 < kSamples; n0 += 4) {  // more at a time would not fit into registers
      Pack<S, 4> x[4] = {};
      int64_t at = static_cast<int64_t>(k.n0 + n0) * a.shape.I + k.i0 + i;
      forget(at);
#pragma unroll
      for (int n = 0; n < 4; n++, at += a.shape.I)
        if (n0 + n < k.samples) x[n] = load_pack<S, 4>(static_cast<const S*>(a.styles.p) + at);
#pragma unroll
      for (int n = 0; n < 4; n++) {
        Pack<A, 4> squares;
        widen(x[n], format, squares.v);
#pragma unroll
        for (int j = 0; j < 4; j++) squares.v[j] *= squares.v[j];
        if (n0 + n < k.samples) store_pack<A, 4>(k.styles + (n0 + n) * kStyles<A> + i, squares);
      }
    }
  }
}

// The squared styles of a chunk to shared memory, by the whole block.
template <typename T>
__device__ __forceinline__ void square_styles(const Forward<T>& a, const Work<T>& k) {
  using A = Acc<T>;
  __syncthreads();  // those before these have been read
  if (sizeof(A) == 4 && a.style_packs) {
    if constexpr (sizeof(A) == 4) {
      // A loop for each format: to choose inside of one would take more registers than there are.
      if (a.styles.is_f32)
        square_packs(a, k, Format<float>(kF32));
      else if (a.styles.format.bf16)
        square_packs(a, k, Format<Half16>(kBF16));
      else
        square_packs(a, k, Format<Half16>(kF16));
    }
  } else {
    for (int n = 0; n < k.samples; n++)
      for (int i = threadIdx.x; i < k.channels; i += blockDim.x) {
        const int64_t at = static_cast<int64_t>(k.n0 + n) * a.shape.I + k.i0 + i;
        const A s = a.styles.at(at);
        k.styles[n * kStyles<A> + i] = s * s;
      }
  }
  __syncthreads();
}

// Adds N channels, from i of the chunk on.
template <int N, typename T>
__device__ __forceinline__ void add(const Work<T>& k, int i, const Pack<Acc<T>, N>& q,
                                    Acc<T> (&sums)[kSamples]) {
  using A = Acc<T>;
#pragma unroll
  for (int n = 0; n < kSamples; n++)
    if (n < k.samples) {
      const Pack<A, N> s = load_pack<A, N>(k.styles + n * kStyles<A> + i);
#pragma unroll
      for (int j = 0; j < N; j++) sums[n] += s.v[j] * q.v[j];
    }
}

// A chunk of weights [I, K]. The next step's are under way while this one's are added up.
template <typename T, int N>
__device__ __forceinline__ void sum_rows(const Forward<T>& a, const Work<T>& k, Acc<T>* stage,
                                         Acc<T> (&sums)[kSamples]) {
  using A = Acc<T>;
  constexpr int kLoads = N == 1 ? 4 : (kStage<A> / N + 31) / 32;
  const int lane = threadIdx.x % 32, K = a.shape.K, stride = a.staged << a.log_parts;
  Pack<T, N> x[kLoads];
  const auto load = [&](int first, int p, int packs) {
    int64_t at = (k.row + k.i0 + first) * K + p * N;
    forget(at);
#pragma unroll
    for (int j = 0; j < kLoads; j++)
      if (p + 32 * j < packs) x[j] = load_pack<T, N>(a.w + at + 32 * N * j);
  };
  const auto packs_of = [&](int first) { return min(a.staged, k.channels - first) * K / N; };
  int first = k.part * a.staged;
  if (k.active) load(first, lane, packs_of(first));
  square_styles(a, k);
  if (!k.active) return;
  for (; first < k.channels; first += stride) {
    const int packs = packs_of(first);
    for (int p = lane;;) {
#pragma unroll
      for (int j = 0; j < kLoads; j++)
        if (p + 32 * j < packs) {
          A squares[N];
          widen(x[j], a.format, squares);
#pragma unroll
          for (int e = 0; e < N; e++) squares[e] *= squares[e];
          store_parts<N>(stage + (p + 32 * j) * N, squares);
        }
      p += 32 * kLoads;
      if (N > 1 || p >= packs) break;  // packs are all there
      load(first, p, packs);
    }
    __syncwarp();
    load(first + stride, lane, packs_of(first + stride));
#pragma unroll 1
    for (int c = lane; c < min(a.staged, k.channels - first); c += 32) {
      Pack<A, 1> q = {};
#pragma unroll 3
      for (int e = 0; e < K; e++) q.v[0] += stage[c * K + e];
      a.q[k.row + k.i0 + first + c] = q.v[0];
      add(k, first + c, q, sums);
    }
    __syncwarp();
  }
}

// The same where the K of eight channels are too many for the stage.
template <typename T>
__device__ __forceinline__ void sum_long_rows(const Forward<T>& a, const Work<T>& k,
                                              Acc<T> (&sums)[kSamples]) {
  using A = Acc<T>;
#pragma unroll 1
  for (int c = k.part * 32 + threadIdx.x % 32; c < k.channels; c += 32 << a.log_parts) {
    const T* from = a.w + (k.row + k.i0 + c) * a.shape.K;
    Pack<A, 1> q = {};
#pragma unroll 4
    for (int e = 0; e < a.shape.K; e++) {
      const A w = to_acc(from[e], a.format);
      q.v[0] += w * w;
    }
    a.q[k.row + k.i0 + c] = q.v[0];
    add(k, c, q, sums);
  }
}

// What a lane keeps of the packs of its column, whose k its group shares with others: two channels,
// so that neighbouring lanes of half a warp meet all banks. Returns the first.
template <int N, typename A, int M>
__device__ __forceinline__ int share(const A (&q)[N], Pack<A, M>& own) {
  const int lane = threadIdx.x % 32, column = lane % Step<N>::kColumns;
  if constexpr (N == 4) {
    const bool upper = (lane >> 4 ^ lane >> 3) & 1;
    halve(q, own.v, upper, 16);
    return column * 4 + upper * 2;
  } else if constexpr (N == 8) {
    const bool upper = (lane >> 4 ^ lane >> 2) & 1, odd = lane >> 3 & 1;
    A half[4];
    halve(q, half, upper, 16);
    halve(half, own.v, odd, 8);
    return column * 8 + upper * 4 + odd * 2;
  } else {
    own.v[0] = q[0];
    return column;
  }
}

// A chunk of weights [K, I].
template <typename T, int N>
__device__ __forceinline__ void sum_columns(const Forward<T>& a, const Work<T>& k,
                                            Acc<T> (&sums)[kSamples]) {
  using A = Acc<T>;
  using S = Step<N>;
  const int lane = threadIdx.x % 32, column = lane % S::kColumns, group = lane / S::kColumns;
  const int K = a.shape.K, stride = S::kChannels << a.log_parts;
  Pack<T, N> x[S::kTaps];
  const auto load = [&](int first, int tap) {
    const bool inside = first + column * N < k.channels;
    const int64_t step = static_cast<int64_t>(S::kGroups) * a.shape.I;
    int64_t at = k.row * K + static_cast<int64_t>(tap + group) * a.shape.I;
    at += k.i0 + first + column * N;
    forget(at);
#pragma unroll
    for (int t = 0; t < S::kTaps; t++, at += step) {
      x[t] = Pack<T, N>{};
      if (inside && tap + t * S::kGroups + group < K) x[t] = load_pack<T, N>(a.w + at);
    }
  };
  int first = k.part * S::kChannels;
  if (k.active) load(first, 0);
  square_styles(a, k);
  if (!k.active) return;
  for (; first < k.channels; first += stride) {
    A q[N] = {};
    for (int tap = 0;;) {
#pragma unroll
      for (int t = 0; t < S::kTaps; t++) {
        A w[N];
        widen(x[t], a.format, w);
#pragma unroll
        for (int j = 0; j < N; j++) q[j] += w[j] * w[j];
      }
      tap += S::kTaps * S::kGroups;
      if (tap >= K) break;
      load(first, tap);
    }
    load(first + stride, 0);
    constexpr int kOwn = N == 1 ? 1 : 2;
    Pack<A, kOwn> own;
    const int i = first + share(q, own);
    if (i < k.channels) {
      store_pack<A, kOwn>(a.q + k.row + k.i0 + i, own);
      add(k, i, own, sums);
    }
  }
}

// A chunk for samples beyond the first kSamples: q is known.
template <typename T>
__device__ __forceinline__ void sum_again(const Forward<T>& a, const Work<T>& k,
                                          Acc<T> (&sums)[kSamples]) {
#pragma unroll 1
  for (int c = k.part * 32 + threadIdx.x % 32; c < k.channels; c += 32 << a.log_parts)
    add(k, c, Pack<Acc<T>, 1>{a.q[k.row + k.i0 + c]}, sums);
}

template <typename T, int N, bool kRows>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) demod_coefs_fwd_kernel(Forward<T> a) {
  using A = Acc<T>;
  __shared__ __align__(16) A stages[kWarps * kStage<A>];
  __shared__ __align__(16) A styles[kSamples * kStyles<A>];
  __shared__ A of_warps[kWarps][kSamples];
  const int I = a.shape.I, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t o0 = static_cast<int64_t>(blockIdx.x) << a.log_outs;
  Work<T> k;
  k.row = (o0 + (warp >> a.log_parts)) * I;
  k.styles = styles;
  k.part = warp & ((1 << a.log_parts) - 1);
  k.active = o0 + (warp >> a.log_parts) < a.shape.O;
  for (k.n0 = 0; k.n0 == 0 || k.n0 < a.shape.N; k.n0 += kSamples) {
    k.samples = min(kSamples, a.shape.N - k.n0);
    A sums[kSamples] = {};
    for (k.i0 = 0; k.i0 < I; k.i0 += kStyles<A>) {
      k.channels = min(kStyles<A>, I - k.i0);
      if (k.n0 == 0 && !kRows) {
        sum_columns<T, N>(a, k, sums);
      } else if (k.n0 == 0 && (N > 1 || a.staged > 0)) {
        sum_rows<T, N>(a, k, stages + warp * kStage<A>, sums);
      } else {
        square_styles(a, k);
        if (k.active && k.n0 > 0)
          sum_again(a, k, sums);
        else if (k.active && kRows && N == 1)
          sum_long_rows(a, k, sums);
      }
    }
    A four[4], two[2], one[1];
    halve(sums, four, lane >> 4 & 1, 16);
    halve(four, two, lane >> 3 & 1, 8);
    halve(two, one, lane >> 2 & 1, 4);
    one[0] = warp_sum(one[0], 4);
    if (lane % 4 == 0) of_warps[warp][lane / 4] = one[0];
    __syncthreads();
    // The threads in the order of d, for whole sectors.
    const int n = threadIdx.x >> a.log_outs, out = threadIdx.x & ((1 << a.log_outs) - 1);
    if (n < k.samples && o0 + out < a.shape.O) {
      A total = A(0);
      for (int p = 0; p < 1 << a.log_parts; p++) total += of_warps[(out << a.log_parts) + p][n];
      a.d[(k.n0 + n) * a.shape.O + o0 + out] = rsqrt_(total + a.eps);
    }
  }
}

// --- Backward.

constexpr int kHeld = 32;         // samples that a tile of dW has in shared memory at a time
constexpr int kMostOuts = 16;     // output channels of a tile of dW
constexpr int kChunk = kThreads;  // output channels whose g a tile of ds has at a time
constexpr int kAhead = 4;         // packs of q that a thread has under way

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

// A tile of dW, of packs of N: each warp takes every kWarps-th of its output channels.
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
    styles = g + kHeld * kMostOuts;        // [kHeld][kChannels], squared
    factors = styles + kHeld * kChannels;  // [kWarps][kChannels]
    factors += threadIdx.x / 32 * kChannels;
  }

  // g and styles of up to kHeld samples from n0 on, by the whole block.
  __device__ __forceinline__ void hold(const Backward<T>& a, int n0) const {
    const int samples = min(kHeld, a.shape.N - n0);
    __syncthreads();
    for (int e = threadIdx.x; e < samples * kChannels; e += kThreads) {
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
      if (row < kWarps || a.shape.N > kHeld) hold(a, n0);
      const int count = min(kHeld, a.shape.N - n0);
#pragma unroll 2
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
  for (int row = threadIdx.x / 32; row < 1 << a.log_outs; row += kWarps) {
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
  for (int row = threadIdx.x / 32; row < 1 << a.log_outs; row += kWarps) {
    const bool active = tile.o0 + row < a.shape.O && column * N < tile.channels;
    const int64_t at = (tile.o0 + row) * K * I + tile.i0 + column * N;
    Pack<T, N> x[S::kTaps];
    const auto load = [&](int k) {
      int64_t from = at + static_cast<int64_t>(k) * I;
      forget(from);
#pragma unroll
      for (int t = 0; t < S::kTaps; t++, from += static_cast<int64_t>(S::kGroups) * I)
        if (active && k + t * S::kGroups < K) x[t] = load_pack<T, N>(a.w + from);
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
          widen(x[t], a.format, w);
#pragma unroll
          for (int j = 0; j < N; j++) w[j] *= factor[j];
          store_whole<T, N>(a.dw + to, narrow<T, N>(w, a.format));
        }
      load(k);
    }
  }
}

// A tile of ds: 32 packs of input channels, kSamples samples; the warps share the output channels.
template <typename T, int N>
__device__ __forceinline__ void style_tile(const Backward<T>& a, Acc<T>* shared) {
  using A = Acc<T>;
  const unsigned batch = blockIdx.x / a.style_tiles;
  const int n0 = static_cast<int>(batch) * kSamples, I = a.shape.I;
  constexpr int kColumns = N * 32;
  const int i0 = static_cast<int>(blockIdx.x - batch * a.style_tiles) * kColumns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool inside = i0 + lane * N < I;
  A sums[kSamples][N] = {};
  const unsigned outs = static_cast<unsigned>(a.shape.O);  // under 2**31
  for (unsigned o0 = 0; o0 < outs; o0 += kChunk) {
    const int chunk = min(kChunk, static_cast<int>(outs - o0));
    Pack<A, N> x[kAhead] = {};
    const auto load = [&](int o) {
      int64_t at = static_cast<int64_t>(o0 + o) * I + i0 + lane * N;
      forget(at);
#pragma unroll
      for (int t = 0; t < kAhead; t++, at += static_cast<int64_t>(kWarps) * I)
        if (inside && o + t * kWarps < chunk) x[t] = load_pack<A, N>(a.q + at);
    };
    load(warp);
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
    for (int o = warp; o < chunk; o += kAhead * kWarps) {
#pragma unroll
      for (int t = 0; t < kAhead; t++)
        if (o + t * kWarps < chunk) {
          constexpr int kSize = kPart<kSamples, A>;
#pragma unroll
          for (int part = 0; part < kSamples; part += kSize) {
            const A* from = shared + (o + t * kWarps) * kSamples + part;
            const Pack<A, kSize> g = load_pack<A, kSize>(from);
#pragma unroll
            for (int j = 0; j < kSize; j++)
#pragma unroll
              for (int e = 0; e < N; e++) sums[part + j][e] += g.v[j] * x[t].v[e];
          }
        }
      load(o + kAhead * kWarps);
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kSamples; j++) {
    Pack<A, N> out;
#pragma unroll
    for (int e = 0; e < N; e++) out.v[e] = sums[j][e];
    store_pack<A, N>(shared + (warp * kSamples + j) * kColumns + lane * N, out);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kSamples * kColumns; e += kThreads) {
    const int n = n0 + e / kColumns, i = i0 + e % kColumns;
    if (n >= a.shape.N || i >= I) continue;
    A total = A(0);
    for (int w = 0; w < kWarps; w++) total += shared[w * kSamples * kColumns + e];
    const int64_t at = static_cast<int64_t>(n) * I + i;
    store_param<typename Styles<A>::T>(a.ds, a.styles.is_f32, at, a.styles.at(at) * total,
                                       a.styles.format);
  }
}

template <int N>
constexpr int kStylePack = N == 1 ? 1 : 2;  // of q, where the weights have packs of N

template <typename T, int N, bool kRows>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) demod_coefs_bwd_kernel(Backward<T> a) {
  constexpr int kChannels = Step<N>::kChannels;
  constexpr int kOfStyles = kThreads * kSamples * kStylePack<N>;
  constexpr int kOfWeights = kHeld * (kMostOuts + kChannels) + kWarps * kChannels;
  constexpr int kOfSums = kOfStyles > kOfWeights ? kOfStyles : kOfWeights;
  constexpr int kMost = kOfSums > kChunk * kSamples ? kOfSums : kChunk * kSamples;
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

// Output channels of a block of the forward, as a power of two: at most one a warp. Each block
// reads the styles, N of them for K weights, so that twice N channels make them a twentieth of what
// is read. A block with more than 36 KiB of weights must leave half the multiprocessors busy.
int log_outs_of(const Shape& s, int64_t channel_bytes) {
  int log = 0;
  while (1 << log < min(kWarps, 2 * s.N) && 1 << log < s.O) {
    const int64_t next = int64_t(2) << log;
    if (next * channel_bytes > 36 * 1024 && 2 * ceil_div(s.O, next) < sm_count()) break;
    log++;
  }
  return log;
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
    a.style_packs = sizeof(A) == 4 && I % 4 == 0 && aligned16(styles);
    // A multiple of 8 channels, so that each stage begins with a whole pack.
    const int64_t fitting = kStage<A> / max(K, int64_t(1)) / 8 * 8;
    a.staged = static_cast<int>(min(fitting, int64_t(64)));
    if (a.staged == 0) a.shape.packed &= !a.shape.rows;
    a.log_outs = log_outs_of(a.shape, I * K * int64_t(sizeof(T)));
    const int step = a.shape.rows && a.staged ? a.staged : a.shape.packed ? 64 : 32;
    a.log_parts =
        log2_of(pow2_between(ceil_div(min(I, int64_t(kStyles<A>)), step), 1, kWarps >> a.log_outs));
    const auto blocks = static_cast<unsigned>(ceil_div(O, int64_t(1) << a.log_outs));
    by_shape<T>(a.shape, [&](auto n, auto rows) {
      GK_LAUNCH((demod_coefs_fwd_kernel<T, decltype(n)::value, decltype(rows)::value>),
                dim3(blocks), dim3(32 << (a.log_outs + a.log_parts)), 0, stream, a);
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
        ceil_div(I, 32 * (a.shape.packed ? kStylePack<kPack<T>> : kStylePack<1>)));
    a.style_blocks = ds ? a.style_tiles * static_cast<unsigned>(ceil_div(N, kSamples)) : 0;
    a.weight_tiles = static_cast<unsigned>(ceil_div(I, a.shape.packed ? 64 : 32));
    a.log_outs = log2_of(kWarps);
    if (ceil_div(O, kMostOuts) * a.weight_tiles >= sm_count()) a.log_outs = log2_of(kMostOuts);
    int64_t blocks = a.style_blocks;
    if (dw) blocks += a.weight_tiles * ceil_div(O, int64_t(1) << a.log_outs);
    if (blocks == 0) return 0;
    by_shape<T>(a.shape, [&](auto n, auto rows) {
      GK_LAUNCH((demod_coefs_bwd_kernel<T, decltype(n)::value, decltype(rows)::value>),
                dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, a);
    });
    return static_cast<int>(cudaGetLastError());
  });
}

GK_EXPORT(demod_coefs);
GK_EXPORT(demod_coefs_bwd);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
