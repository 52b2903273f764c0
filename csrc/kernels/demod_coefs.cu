// demod_coefs: d[n,o] = rsqrt(Σ_i s[n,i]² q[o,i] + eps) with q[o,i] = Σ_k W[o,i,k]², and its
// gradient. With g[n,o] = -d³ dd,
//   dW[o,i,k] = W[o,i,k] Σ_n g[n,o] s[n,i]²        ds[n,i] = s[n,i] Σ_o g[n,o] q[o,i].
//
// Forward: a block takes from one to eight output channels: as few as keep each multiprocessor
// busy, more where with them the styles, which each block reads, add at most a twentieth to what is
// moved. A warp copies the weights of some neighbouring channels to shared memory, all at once, and
// reads them there, so that only the warp waits; from q, in shared memory too, each warp then takes
// the products with some samples' styles, which have been under way since before. Where k is the
// outer dimension (channels-last), or too long for that, a thread reads the k itself.
//
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
// Most output channels of a block, by elements of a pack; 8: a sector of d. More spill where styles
// are read one by one.
template <int N>
constexpr int kOuts = N == 1 ? 2 : 8;
constexpr int kSegment = 128;  // channels of a sample that a warp takes at a time, four a lane
template <typename T>
constexpr int kStage = 2304 / sizeof(T);  // weights of a warp: of 64 channels of 3x3 in float32
template <typename A>
constexpr int kSquares = 8192 / sizeof(A);  // numbers of q that a block has at a time
template <int O>
constexpr int kSamplesOf = O == 8 ? 2 : 4;  // of a warp, of which it has O products each
template <int N>
constexpr int kSums = N == 1 ? 8 : 16;  // of a warp, at most

template <typename T>
struct Forward {
  using A = Acc<T>;
  Format<T> format;
  Styles<A> styles;
  const T* w;
  A *d, *q;
  Shape shape;
  int outs, samples;  // of a block
  int64_t weights;    // of a block: outs * I * K
  int log_outs;
  int log_parts;  // warps that share a sample's channels
  int chunk;      // channels at a time; all of them where a block has several output channels
  int unit;       // channels whose weights a warp copies at a time
  int segments, reciprocal;  // of a chunk; 2**16 over their number
  int64_t i_step, k_step;    // of the weights, where they are not copied
  A eps;
};

// Four channels of some samples' styles, as they are in memory: numbers only when they are used, so
// that nothing waits for them before.
template <typename A, bool kPacked>
struct RawStyles {
  using Word = std::conditional_t<sizeof(A) == 8, double, unsigned>;
  static constexpr int kLines = kSamplesOf<1>;
  Word raw[kLines][4];

  // From `at` on those of `samples` samples; `left` channels are left there, of which the lane
  // takes the next four or every 32nd.
  __device__ __forceinline__ void load(const Styles<A>& from, int64_t at, int I, int samples,
                                       int left) {
    if constexpr (kPacked) {
      const int lines = left > 0 ? samples : 0;
      if (from.is_f32) {
        const float* p = static_cast<const float*>(from.p) + at;
#pragma unroll
        for (int n = 0; n < kLines; n++, p += I) {
          uint4 v = {};
          if (n < lines) v = *reinterpret_cast<const uint4*>(p);
          raw[n][0] = v.x, raw[n][1] = v.y, raw[n][2] = v.z, raw[n][3] = v.w;
        }
      } else {
        const Half16* p = static_cast<const Half16*>(from.p) + at;
#pragma unroll
        for (int n = 0; n < kLines; n++, p += I) {
          uint2 v = {};
          if (n < lines) v = *reinterpret_cast<const uint2*>(p);
          raw[n][0] = v.x, raw[n][1] = v.y, raw[n][2] = raw[n][3] = 0;
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kLines; n++, at += I) {
        forget(at);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          raw[n][j] = Word(0);
          if (n >= samples || j * 32 >= left) continue;
          if constexpr (sizeof(A) == 8)
            raw[n][j] = static_cast<const double*>(from.p)[at + j * 32];
          else if (from.is_f32)
            raw[n][j] = static_cast<const unsigned*>(from.p)[at + j * 32];
          else
            raw[n][j] = static_cast<const unsigned short*>(from.p)[at + j * 32];
        }
      }
    }
  }
  __device__ __forceinline__ void squares(const Styles<A>& from, A (&out)[kLines][4]) const {
    constexpr int kAll = 4 * kLines;
    A v[kAll];
    if constexpr (sizeof(A) == 8) {
#pragma unroll
      for (int e = 0; e < kAll; e++) v[e] = raw[e / 4][e % 4];
    } else if (from.is_f32) {
#pragma unroll
      for (int e = 0; e < kAll; e++) v[e] = __uint_as_float(raw[e / 4][e % 4]);
    } else {
      Pack<Half16, kAll> halves;
#pragma unroll
      for (int e = 0; e < kAll; e++)
        halves.v[e].bits = static_cast<unsigned short>(kPacked ? raw[e / 4][e % 4 / 2] >> e % 2 * 16
                                                               : raw[e / 4][e % 4]);
      widen(halves, from.format, v);
    }
#pragma unroll
    for (int e = 0; e < kAll; e++) out[e / 4][e % 4] = v[e] * v[e];
  }
};

// Begins to copy packs, `step` elements apart, of which those from `count` on are left out; the
// thread has what it began after copied().
template <int kPacks, typename T, int N>
__device__ __forceinline__ void copy(T* to, const T* from, int step, int count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) * N == 16) {
#pragma unroll
    for (int j = 0; j < kPacks; j++)
      if (j * step < count) copy_pack<T, N>(to + j * step, from + j * step);
    return;
  }
#endif
  constexpr int kUnderWay = N == 1 ? kPacks : 2;  // more spill on sm_75
#pragma unroll
  for (int first = 0; first < kPacks; first += kUnderWay) {
    Raw<T, N> x[kUnderWay];
#pragma unroll
    for (int j = 0; j < kUnderWay; j++)
      if (first + j < kPacks && (first + j) * step < count)
        x[j] = load_raw<T, N>(from + (first + j) * step);
#pragma unroll
    for (int j = 0; j < kUnderWay; j++)
      if (first + j < kPacks && (first + j) * step < count)
        *reinterpret_cast<Raw<T, N>*>(to + (first + j) * step) = x[j];
  }
}

__device__ __forceinline__ void copied() {
  copy_batch();
  copy_wait<0>();
}

// q of `channels` neighbours, of weights [channels, K].
template <typename T, int N>
struct Rows {
  using A = Acc<T>;
  const Forward<T>& a;
  const T* w;
  T* stage;  // of the warp
  A* q;
  int channels, first;

  __device__ __forceinline__ Rows(const Forward<T>& a, const T* w, A* q, int channels, T* stages)
      : a(a),
        w(w),
        stage(stages + threadIdx.x / 32 * kStage<T>),
        q(q),
        channels(channels),
        first(threadIdx.x / 32 * a.unit) {}

  // Begins to copy the weights of the warp's next channels, if it has any.
  __device__ __forceinline__ void start() const {
    constexpr int kStep = 32 * N, kLoads = N == 1 ? 4 : (kStage<T> / N + 31) / 32;
    const int mine = threadIdx.x % 32 * N, K = a.shape.K;
    const T* from = w + first * K + mine;
    int left = min(a.unit, channels - first) * K - mine;
    for (T* to = stage + mine; left > 0; left -= kLoads * kStep)
      copy<kLoads, T, N>(to, from, kStep, left), to += kLoads * kStep, from += kLoads * kStep;
  }
  __device__ __forceinline__ void sum(bool keep, A* squares) {
    while (first < channels) {
      copied();
      __syncwarp();
      if (N > 1 && a.shape.K == 9)
        sum_3x3(keep, squares);
      else
        sum_any(keep, squares);
      first += blockDim.x / 32 * a.unit;
      if (first >= channels) break;
      __syncwarp();
      start();
    }
  }

 private:
  __device__ __forceinline__ void sum_3x3(bool keep, A* squares) const {
    constexpr int kSide = N == 1 ? 1 : 8 / sizeof(T);  // neighbouring channels of a lane
    const int mine = threadIdx.x % 32 * kSide, c = first + mine;
    if (mine >= a.unit || c >= channels) return;
    Pack<A, kSide> sums = {};
#pragma unroll
    for (int k = 0; k < 9; k++) {
      A w[kSide];
      widen(load_pack<T, kSide>(stage + mine * 9 + k * kSide), a.format, w);
#pragma unroll
      for (int e = 0; e < kSide; e++) sums.v[(k * kSide + e) / 9] += w[e] * w[e];
    }
    if (keep) store_pack<A, kSide>(q + c, sums);
    store_pack<A, kSide>(squares + c, sums);
  }
  __device__ __forceinline__ void sum_any(bool keep, A* squares) const {
    const int K = a.shape.K, end = min(a.unit, channels - first);
#pragma unroll 1
    for (int c = threadIdx.x % 32; c < end; c += 32) {
      A sum = A(0);
#pragma unroll 4
      for (int k = 0; k < K; k++) {
        const A v = to_acc(stage[c * K + k], a.format);
        sum += v * v;
      }
      if (keep) q[first + c] = sum;
      squares[first + c] = sum;
    }
  }
};

// The same of weights [outs, K, I], of `channels` in each.
template <typename T, int N>
__device__ __forceinline__ void sum_columns(const Forward<T>& a, const T* from, Acc<T>* q, int outs,
                                            int channels, bool keep, Acc<T>* squares) {
  using A = Acc<T>;
  constexpr int kTaps = N == 1           ? 3
                        : sizeof(T) == 2 ? 5
                                         : 9,
                kAcross = 4 / N, kApart = N == 1 ? 32 : 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, I = a.shape.I, K = a.shape.K;
  for (int item = warp; item < outs * a.segments; item += blockDim.x / 32) {
    const int o = item * a.reciprocal >> 16;
    const int c = (item - o * a.segments) * kSegment + lane * N;
    int64_t to = static_cast<int64_t>(o) * I * K + c * a.i_step;
    A sums[kAcross][N] = {};
    for (int k0 = 0; k0 < K; k0 += kTaps) {
      Pack<T, N> x[kTaps][kAcross] = {};
      forget(to);
#pragma unroll
      for (int t = 0; t < kTaps; t++, to += a.k_step)
#pragma unroll
        for (int j = 0; j < kAcross; j++)
          if (k0 + t < K && c + j * kApart < channels)
            x[t][j] = load_pack<T, N>(from + to + j * kApart * a.i_step);
#pragma unroll
      for (int t = 0; t < kTaps; t++)
#pragma unroll
        for (int j = 0; j < kAcross; j++) {
          A w[N];
          widen(x[t][j], a.format, w);
#pragma unroll
          for (int e = 0; e < N; e++) sums[j][e] += w[e] * w[e];
        }
    }
#pragma unroll
    for (int j = 0; j < kAcross; j++) {
      if (c + j * kApart >= channels) continue;
      Pack<A, N> out;
#pragma unroll
      for (int e = 0; e < N; e++) out.v[e] = sums[j][e];
      if (keep) store_pack<A, N>(q + static_cast<int64_t>(o) * I + c + j * kApart, out);
      store_pack<A, N>(squares + o * a.chunk + c + j * kApart, out);
    }
  }
}

// The sum over the warp of one of the first N values: that of number lane / (32 / N).
template <int N, int M, typename A>
__device__ __forceinline__ A fold(const A (&values)[M], int offset = 16) {
  if constexpr (N == 1) {
    return warp_sum(values[0], 2 * offset);
  } else {
    A first[N], sums[N / 2];
#pragma unroll
    for (int j = 0; j < N; j++) first[j] = values[j];
    halve(first, sums, threadIdx.x & offset, offset);
    return fold<N / 2>(sums, offset / 2);
  }
}

// Adds the products of samples' squared styles with O output channels' q, from `from` on: sum n * O
// + o is that of sample n with channel o. `left`: as in RawStyles.
template <int O, int N, typename T>
__device__ __forceinline__ void multiply(const Forward<T>& a, const Acc<T> (&s)[kSamplesOf<1>][4],
                                         const Acc<T>* from, int outs, int left,
                                         Acc<T> (&sums)[kSums<N>]) {
  using A = Acc<T>;
#pragma unroll
  for (int o = 0; o < O; o++) {
    if (o >= outs) break;
    A q[4] = {};
    if constexpr (N > 1) {
      if (left > 0) {
        const Pack<A, 4> pack = load_pack<A, 4>(from + o * a.chunk);
#pragma unroll
        for (int j = 0; j < 4; j++) q[j] = pack.v[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (j * 32 < left) q[j] = from[o * a.chunk + j * 32];
    }
#pragma unroll
    for (int n = 0; n < kSamplesOf<O>; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[n * O + o] += s[n][j] * q[j];
  }
}

// f(output channels of a block), as a type.
template <int kMost, int kFirst = 1, typename F>
__device__ __forceinline__ void by_outs(int outs, F f) {
  if constexpr (kFirst < kMost) {
    if (outs > kFirst) return by_outs<kMost, 2 * kFirst>(outs, f);
  }
  f(std::integral_constant<int, kFirst>{});
}

// N: elements of a pack of weights.
template <typename T, int N, bool kRows>
__global__ void __launch_bounds__(kFwdThreads, sizeof(T) == 8 ? 1 : 2)
    demod_coefs_fwd_kernel(Forward<T> a) {
  using A = Acc<T>;
  constexpr bool kPacked = N > 1;
  __shared__ __align__(16) T stage[kRows ? kFwdWarps * kStage<T> : 1];
  __shared__ __align__(16) A squares[kSquares<A>];  // q, [outs][chunk]
  __shared__ A of_warps[kFwdWarps * kSums<N>];      // [parts][groups of samples][samples][outs]
  const int I = a.shape.I, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned o0 = blockIdx.x * a.outs;  // under 2**31
  const int outs = min(a.outs, static_cast<int>(a.shape.O - o0));
  const int group = warp >> a.log_parts, part = warp & ((1 << a.log_parts) - 1);
  const int log_sums = min(a.log_outs + 2, 4), log_samples = log_sums - a.log_outs;
  const unsigned batch = blockIdx.z * gridDim.y + blockIdx.y;
  const unsigned n0 = batch * a.samples, n = n0 + (group << log_samples);
  const int samples = min(1 << log_samples, static_cast<int>(a.shape.N - n));
  const T* from = a.w + blockIdx.x * a.weights;
  A* q = a.q + static_cast<int64_t>(o0) * I;
  // Of the samples' sums with the output channels the thread has this one in the end.
  const int parts = 1 << a.log_parts;
  const bool whole = parts == 1;
  const int own = whole ? (group << log_sums) + (lane >> (5 - log_sums)) : threadIdx.x;
  const unsigned sample = n0 + (own >> a.log_outs);
  const int out = own & (a.outs - 1);
  const bool leads = (lane & ((32 >> log_sums) - 1)) == 0;
  const bool writes = (whole ? leads : own < a.samples << a.log_outs) &&
                      sample < static_cast<unsigned>(a.shape.N) && out < outs;
  A* const d = a.d + (sample * a.shape.O + o0 + out);
  A sum = A(0);
  for (int i0 = 0; i0 < I; i0 += a.chunk) {
    const int channels = min(a.chunk, I - i0);
    if (i0 > 0) {
      __syncthreads();  // what is in shared memory has been read
      from += a.chunk * a.i_step, q += a.chunk;
    }
    Rows<T, N> rows(a, from, q, outs > 1 ? outs * I : channels, stage);
    if constexpr (kRows) rows.start();
    RawStyles<A, kPacked> raw;
    int segment = part, c = part * kSegment + lane * (kPacked ? 4 : 1);
    const auto load = [&] {
      raw.load(a.styles, static_cast<int64_t>(n) * I + i0 + c, I, samples, channels - c);
    };
    if (kPacked) load();  // else there are no registers for them yet
    if constexpr (kRows)
      rows.sum(batch == 0, squares);
    else
      sum_columns<T, N>(a, from, q, outs, channels, batch == 0, squares);
    __syncthreads();
    if (samples <= 0) continue;
    if (!kPacked) load();
    A sums[kSums<N>] = {};
    while (true) {
      A s[kSamplesOf<1>][4];
      raw.squares(a.styles, s);
      by_outs<kOuts<N>>(a.outs, [&](auto o) {
        multiply<decltype(o)::value, N>(a, s, squares + c, outs, channels - c, sums);
      });
      segment += parts, c += parts * kSegment;
      if (segment >= a.segments) break;
      load();
    }
    by_outs<kOuts<N>>(a.outs, [&](auto o) {
      constexpr int kO = decltype(o)::value;
      sum += fold<kO * kSamplesOf<kO>>(sums);
    });
  }
  if (!whole) {
    const int all = a.samples << a.log_outs;
    if (leads) of_warps[part * all + (group << log_sums) + (lane >> (5 - log_sums))] = sum;
    __syncthreads();
    sum = A(0);
    if (own < all)
#pragma unroll 4
      for (int p = 0; p < parts; p++) sum += of_warps[p * all + own];
  }
  if (writes) *d = rsqrt_(sum + a.eps);
}

// Output channels of a block: as few as give each multiprocessor a block, but more if with them the
// styles, which each block reads, add at most a twentieth to what is moved.
template <typename T>
int outs_of(const Shape& shape, int style_bytes) {
  const auto blocks = [&](int outs) { return ceil_div(shape.O, outs); };
  // For each input channel.
  const int64_t styles = static_cast<int64_t>(shape.N) * style_bytes;
  const int64_t all = shape.O * (shape.K * int64_t(sizeof(T)) + sizeof(Acc<T>)) + styles;
  int most = shape.packed ? kOuts<8> : kOuts<1>;
  while (most > 1 && int64_t(most) * shape.I > kSquares<Acc<T>>) most /= 2;
  int outs = pow2_between(ceil_div(shape.O, sm_count()), 1, most);
  if (20 * (blocks(most) - 1) * styles > all) return outs;
  while (20 * (blocks(outs) - 1) * styles > all) outs *= 2;
  return outs;
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
  A scale;                             // -factor
};

// Element `at` of g [N, O].
template <typename T>
__device__ __forceinline__ Acc<T> grad(const Backward<T>& a, int64_t at) {
  const Acc<T> d = a.d[at];
  return a.scale * a.dd[at] * (d * d * d);
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
    a.chunk = static_cast<int>(max(int64_t(1), min(int64_t(kSquares<A>), I)));
    a.segments = static_cast<int>(ceil_div(a.chunk, kSegment));
    a.reciprocal = static_cast<int>(ceil_div(1 << 16, a.segments));
    a.i_step = a.shape.rows ? K : 1;
    a.k_step = a.shape.rows ? 1 : I;
    // A multiple of 8 channels, so that each copy begins with a whole pack.
    a.unit = kSegment;
    if (a.shape.rows) a.unit = static_cast<int>(min(int64_t(kSegment), kStage<T> / K / 8 * 8));
    a.shape.packed = a.shape.packed && I % 4 == 0 && aligned16(styles);
    if (a.unit == 0) a.shape.packed = a.shape.packed && !a.shape.rows, a.shape.rows = false;
    const int style_bytes = styles_dtype == kF64 ? 8 : styles_dtype == kF32 ? 4 : 2;
    const int outs = outs_of<T>(a.shape, style_bytes);
    const int samples = outs == 8 ? kSamplesOf<8> : kSamplesOf<1>;
    // Samples go to several blocks while multiprocessors are free and the weights, which each of
    // these reads, are fewer bytes than their styles; or where they are too many for a block.
    const int64_t across = ceil_div(O, outs);
    int64_t batches = 1;
    while (2 * batches * across <= sm_count() &&
           N * style_bytes > batches * outs * K * int64_t(sizeof(T)))
      batches *= 2;
    batches = max(batches, ceil_div(N, kFwdWarps * samples));
    const int64_t groups = ceil_div(ceil_div(N, batches), samples);
    const int64_t copies =
        a.shape.rows ? ceil_div(int64_t(outs) * a.chunk, a.unit) : int64_t(outs) * a.segments;
    int warps = pow2_between(max(copies, groups * a.segments), 1, kFwdWarps);
    const int at_once = pow2_between(groups, 1, warps);
    const int parts = min(pow2_between(a.segments, 1, kFwdWarps), warps / at_once);
    if (batches > 1) warps = at_once * parts;  // others would take more samples
    batches = max(int64_t(1), ceil_div(N, warps / parts * samples));
    const int64_t most = 65535;  // blocks along y
    a.outs = outs;
    a.weights = outs * I * K;
    a.samples = warps / parts * samples;
    a.log_outs = log2_of(outs);
    a.log_parts = log2_of(parts);
    by_shape<T>(a.shape, [&](auto n, auto rows) {
      constexpr bool kRows = decltype(rows)::value;
      constexpr int kWide = decltype(n)::value;
      GK_LAUNCH((demod_coefs_fwd_kernel < T, kRows || kWide == 1 ? kWide : 4, kRows >),
                dim3(static_cast<unsigned>(across), static_cast<unsigned>(min(batches, most)),
                     static_cast<unsigned>(ceil_div(batches, most))),
                dim3(32 * warps), 0, stream, a);
    });
    return static_cast<int>(cudaGetLastError());
  });
}

// dw or ds may be null, where they are not wanted. Both are multiplied by `factor`.
int demod_coefs_bwd(int dtype, int styles_dtype, const void* dd, const void* d, const void* q,
                    const void* w, const void* styles, void* dw, void* ds, int64_t N, int64_t O,
                    int64_t I, int64_t K, bool channels_last, double factor, void* stream) {
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
    a.scale = static_cast<Acc<T>>(-factor);
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
