// demod_coefs: d[n,o] = rsqrt(Σ_i s[n,i]² q[o,i] + eps) with q[o,i] = Σ_k W[o,i,k]², and its
// gradient. With g[n,o] = -d³ dd,
//   dW[o,i,k] = W[o,i,k] Σ_n g[n,o] s[n,i]²        ds[n,i] = s[n,i] Σ_o g[n,o] q[o,i].
//
// Forward: a block per output channel reads its weights once, 16 bytes a thread and step, keeps q
// for the backward, and sums over the input channels in a fixed order. Weights [O, I, k] go through
// shared memory, from which a thread sums the k of a channel; weights [O, k, I] (channels-last, or
// k = 1) are summed in registers.
// Backward: one launch, in which some blocks each take a tile of dW and the others a tile of ds.
#include "common.cuh"

namespace gankern {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Blocks of a multiprocessor; float64 is for checks: fewer, with registers enough.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 4;
constexpr int kSamples = 8;        // of which a thread sums at a time
constexpr int kStage = 4608;       // squares in shared memory: 512 channels of 3x3
constexpr int kColumnTile = 1024;  // channels of dW [O, K, I] that a block takes
constexpr int kColumns = 8;        // input channels of a block of ds: one 32-byte sector of q
constexpr int kChunk = 256;        // output channels whose g is in shared memory at a time

__device__ __forceinline__ float rsqrt_(float v) { return rsqrtf(v); }
__device__ __forceinline__ double rsqrt_(double v) { return rsqrt(v); }

struct Styles {
  const void* p;
  int dtype;
};

// Element i in the type of the sums; float64 is not mixed with other types.
template <typename A>
__device__ __forceinline__ A load_style(const Styles& s, int64_t i) {
  if constexpr (sizeof(A) == 8) {
    return static_cast<const double*>(s.p)[i];
  } else {
    if (s.dtype == kF32) return static_cast<const float*>(s.p)[i];
    if (s.dtype == kF16) return to_acc(static_cast<const __half*>(s.p)[i]);
    return to_acc(static_cast<const __nv_bfloat16*>(s.p)[i]);
  }
}
template <typename A>
__device__ __forceinline__ void store_style(void* p, int dtype, int64_t i, A v) {
  if constexpr (sizeof(A) == 8) {
    static_cast<double*>(p)[i] = v;
  } else {
    if (dtype == kF32)
      static_cast<float*>(p)[i] = v;
    else if (dtype == kF16)
      static_cast<__half*>(p)[i] = from_acc<__half>(v);
    else
      static_cast<__nv_bfloat16*>(p)[i] = from_acc<__nv_bfloat16>(v);
  }
}

// float64, which is for gradient checks, goes element by element.
template <typename T>
constexpr int kPack = sizeof(T) == 8 ? 1 : 16 / sizeof(T);

// Elements of dW [O, I, K] that a block takes, in packs of N.
template <int N>
constexpr int kTile = N == 1 ? 1024 : 4096;
constexpr int kFactors = kTile<4> / 2 + 2;  // channels of a tile, K being 2 or more

// The sizes, and how the weights lie. `rows`: as [O, I, K], else as [O, K, I].
struct Shape {
  int64_t O;
  int N, I, K;
  bool rows, packed;
};

template <typename T>
struct Forward {
  using A = Acc<T>;
  const T* w;
  Styles styles;
  A *d, *q;
  Shape shape;
  int staged;  // channels in shared memory at a time, 0 where K is too long for that
  A eps;
};

// Squares to shared memory, 16 bytes a store. Eight values are two stores, whose order alternates
// every four lanes, so that eight lanes in turn meet all banks.
template <typename T, int N>
__device__ __forceinline__ void store_squares(Acc<T>* at, const Pack<T, N>& x) {
  using A = Acc<T>;
  constexpr int kPart = N > 4 ? 4 : N, kFlip = N / kPart - 1;
  const bool swap = kFlip && (threadIdx.x >> 2 & 1);
#pragma unroll
  for (int part = 0; part < N / kPart; part++) {
    Pack<A, kPart> squares;
#pragma unroll
    for (int j = 0; j < kPart; j++) {
      const A v = to_acc(swap ? x.v[(part ^ kFlip) * kPart + j] : x.v[part * kPart + j]);
      squares.v[j] = v * v;
    }
    store_pack<A, kPart>(at + (swap ? part ^ kFlip : part) * kPart, squares);
  }
}

template <typename T, int N>
__device__ __forceinline__ void stage(const T* __restrict__ w, Acc<T>* shared, int elements) {
#pragma unroll 4
  for (int e = threadIdx.x * N; e < elements; e += blockDim.x * N)
    store_squares<T, N>(shared + e, load_pack<T, N>(w + e));
}

// q of a row of weights [I, K].
template <typename T>
__device__ __forceinline__ void square_rows(const Forward<T>& a, const T* w, Acc<T>* q,
                                            Acc<T>* shared) {
  using A = Acc<T>;
  const int I = a.shape.I, K = a.shape.K, step = a.staged > 0 ? a.staged : I;
  for (int first = 0; first < I; first += step) {
    const int channels = min(step, I - first);
    const T* tile = w + static_cast<int64_t>(first) * K;
    if (a.staged > 0) {
      __syncthreads();  // the squares before these have been read
      if (a.shape.packed)
        stage<T, kPack<T>>(tile, shared, channels * K);
      else
        stage<T, 1>(tile, shared, channels * K);
      __syncthreads();
    }
    for (int i = threadIdx.x; i < channels; i += blockDim.x) {
      A sum = A(0);
      if (a.staged > 0) {
        for (int k = 0; k < K; k++) sum += shared[i * K + k];
      } else {
        for (int k = 0; k < K; k++) {
          const A v = to_acc(tile[static_cast<int64_t>(i) * K + k]);
          sum += v * v;
        }
      }
      q[first + i] = sum;
    }
  }
}

// q of a row of weights [K, I].
template <typename T, int N>
__device__ __forceinline__ void square_columns(const Forward<T>& a, const T* w, Acc<T>* q) {
  using A = Acc<T>;
  constexpr int kPart = N > 4 ? 4 : N;
  for (int i = threadIdx.x * N; i < a.shape.I; i += blockDim.x * N) {
    Pack<A, kPart> sums[N / kPart] = {};
#pragma unroll 3
    for (int k = 0; k < a.shape.K; k++) {
      const Pack<T, N> x = load_pack<T, N>(w + static_cast<int64_t>(k) * a.shape.I + i);
#pragma unroll
      for (int j = 0; j < N; j++) sums[j / kPart].v[j % kPart] += to_acc(x.v[j]) * to_acc(x.v[j]);
    }
#pragma unroll
    for (int part = 0; part < N / kPart; part++)
      store_pack<A, kPart>(q + i + part * kPart, sums[part]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) demod_coefs_fwd_kernel(Forward<T> a) {
  using A = Acc<T>;
  __shared__ __align__(16) A shared[kStage];
  __shared__ A of_warps[kSamples][kWarps];
  const int64_t o = blockIdx.x, row = o * a.shape.I;
  const int I = a.shape.I, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  A* q = a.q + row;
  if (a.shape.rows)
    square_rows(a, a.w + row * a.shape.K, q, shared);
  else if (a.shape.packed)
    square_columns<T, kPack<T>>(a, a.w + row * a.shape.K, q);
  else
    square_columns<T, 1>(a, a.w + row * a.shape.K, q);

  for (int n0 = 0; n0 < a.shape.N; n0 += kSamples) {
    __syncthreads();  // q is complete; the sums before these have been read
    A sums[kSamples] = {};
    for (int i = threadIdx.x; i < I; i += blockDim.x) {
      const A square_sum = q[i];
#pragma unroll
      for (int j = 0; j < kSamples; j++)
        if (n0 + j < a.shape.N) {
          const A s = load_style<A>(a.styles, static_cast<int64_t>(n0 + j) * I + i);
          sums[j] += s * s * square_sum;
        }
    }
#pragma unroll
    for (int j = 0; j < kSamples; j++) {
      sums[j] = warp_sum(sums[j]);
      if (lane == 0) of_warps[j][warp] = sums[j];
    }
    __syncthreads();
    const int n = n0 + threadIdx.x;
    if (threadIdx.x < kSamples && n < a.shape.N) {
      A total = A(0);
      for (int i = 0; i < static_cast<int>(blockDim.x) / 32; i++) total += of_warps[threadIdx.x][i];
      a.d[n * a.shape.O + o] = rsqrt_(total + a.eps);
    }
  }
}

template <typename T>
struct Backward {
  using A = Acc<T>;
  const A *dd, *d, *q;
  const T* w;
  Styles styles;
  T* dw;
  void* ds;
  Shape shape;
  unsigned style_blocks, column_tiles;
};

template <typename T>
__device__ __forceinline__ Acc<T> grad(const Backward<T>& a, int n, int64_t o) {
  const Acc<T> d = a.d[n * a.shape.O + o];
  return -a.dd[n * a.shape.O + o] * (d * d * d);
}

// What multiplies the weights of `count` channels, counted through all (o, i) from `first` on.
template <typename T>
__device__ __forceinline__ void make_factors(const Backward<T>& a, int64_t first, int count,
                                             Acc<T>* factors) {
  const int I = a.shape.I, skip_o = kThreads / I, skip_i = kThreads % I;
  int64_t o = (first + threadIdx.x) / I;
  int i = static_cast<int>(first + threadIdx.x - o * I);
  for (int c = threadIdx.x; c < count; c += kThreads) {
    Acc<T> sum = Acc<T>(0);
#pragma unroll 2
    for (int n = 0; n < a.shape.N; n++) {
      const Acc<T> s = load_style<Acc<T>>(a.styles, static_cast<int64_t>(n) * I + i);
      sum += grad(a, n, o) * (s * s);
    }
    factors[c] = sum;
    o += skip_o;
    i += skip_i;
    if (i >= I) i -= I, o++;
  }
  __syncthreads();
}

// A tile of kTile<N> elements of dW [O, I, K]. The weights are under way while the factors are
// made.
template <typename T, int N>
__device__ __forceinline__ void weight_rows(const Backward<T>& a, int64_t tile, Acc<T>* factors) {
  constexpr int kPacks = kTile<N> / (kThreads * N);
  const int K = a.shape.K;
  const int64_t start = tile * kTile<N>, total = a.shape.O * a.shape.I * K, first = start / K;
  const int elements = static_cast<int>(min(static_cast<int64_t>(kTile<N>), total - start));
  Pack<T, N> x[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; p++) {
    const int e = (p * kThreads + threadIdx.x) * N;
    if (e < elements) x[p] = load_pack<T, N>(a.w + start + e);
  }
  const int first_k = static_cast<int>(start - first * K);
  make_factors(a, first, (first_k + elements - 1) / K + 1, factors);

  const int at = first_k + threadIdx.x * N, skip_channel = kThreads * N / K;
  const int skip_k = kThreads * N % K;
  int channel = at / K, k = at % K;
#pragma unroll
  for (int p = 0; p < kPacks; p++) {
    const int e = (p * kThreads + threadIdx.x) * N;
    if (e < elements) {
      int c = channel, next = k;
#pragma unroll
      for (int j = 0; j < N; j++) {
        x[p].v[j] = from_acc<T>(to_acc(x[p].v[j]) * factors[c]);
        if (++next == K) next = 0, c++;
      }
      store_pack<T, N>(a.dw + start + e, x[p]);
    }
    channel += skip_channel;
    k += skip_k;
    if (k >= K) k -= K, channel++;
  }
}

// N factors from shared memory, 16 bytes a load, in the order of store_squares: no bank conflicts.
template <int N, typename A>
__device__ __forceinline__ void load_factors(const A* at, A (&out)[N]) {
  constexpr int kPart = N > 4 ? 4 : N, kFlip = N / kPart - 1;
  const bool swap = kFlip && (threadIdx.x >> 2 & 1);
  Pack<A, kPart> parts[N / kPart];
#pragma unroll
  for (int part = 0; part < N / kPart; part++)
    parts[part] = load_pack<A, kPart>(at + (swap ? part ^ kFlip : part) * kPart);
#pragma unroll
  for (int j = 0; j < N; j++) {
    const A here = parts[j / kPart].v[j % kPart], there = parts[j / kPart ^ kFlip].v[j % kPart];
    out[j] = swap ? there : here;
  }
}

// kColumnTile channels of dW [O, K, I].
template <typename T, int N>
__device__ __forceinline__ void weight_columns(const Backward<T>& a, int64_t tile,
                                               Acc<T>* factors) {
  const int64_t first = tile * kColumnTile, total = a.shape.O * a.shape.I;
  const int channels = static_cast<int>(min(static_cast<int64_t>(kColumnTile), total - first));
  make_factors(a, first, channels, factors);
  for (int c = threadIdx.x * N; c < channels; c += kThreads * N) {
    const int64_t o = (first + c) / a.shape.I, i = first + c - o * a.shape.I;
    Acc<T> factor[N];
    load_factors<N>(factors + c, factor);
#pragma unroll 3
    for (int k = 0; k < a.shape.K; k++) {
      const int64_t at = (o * a.shape.K + k) * a.shape.I + i;
      Pack<T, N> x = load_pack<T, N>(a.w + at);
#pragma unroll
      for (int j = 0; j < N; j++) x.v[j] = from_acc<T>(to_acc(x.v[j]) * factor[j]);
      store_pack<T, N>(a.dw + at, x);
    }
  }
}

// ds of kColumns input channels and kSamples samples; the threads share the output channels.
template <typename T>
__device__ __forceinline__ void style_tile(const Backward<T>& a, Acc<T>* shared) {
  using A = Acc<T>;
  const int n0 = blockIdx.x / a.column_tiles * kSamples;
  const int tx = threadIdx.x % kColumns, ty = threadIdx.x / kColumns;
  const int i = blockIdx.x % a.column_tiles * kColumns + tx, I = a.shape.I;
  A sums[kSamples] = {};
  for (int64_t o0 = 0; o0 < a.shape.O; o0 += kChunk) {
    const int chunk = static_cast<int>(min(static_cast<int64_t>(kChunk), a.shape.O - o0));
    __syncthreads();
    for (int e = threadIdx.x; e < chunk * kSamples; e += kThreads) {
      const int n = n0 + e % kSamples;
      shared[e] = n < a.shape.N ? grad(a, n, o0 + e / kSamples) : A(0);
    }
    __syncthreads();
    if (i < I)
#pragma unroll 4
      for (int o = ty; o < chunk; o += kThreads / kColumns) {
        const A q = a.q[(o0 + o) * I + i];
#pragma unroll
        for (int j = 0; j < kSamples; j++) sums[j] += shared[o * kSamples + j] * q;
      }
  }
#pragma unroll
  for (int j = 0; j < kSamples; j++)
    for (int offset = kColumns; offset < 32; offset *= 2)
      sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], offset);
  __syncthreads();
  if (threadIdx.x % 32 < kColumns)
#pragma unroll
    for (int j = 0; j < kSamples; j++)
      shared[(threadIdx.x / 32 * kSamples + j) * kColumns + tx] = sums[j];
  __syncthreads();
  const int n = n0 + ty;
  if (ty < kSamples && n < a.shape.N && i < I) {
    A total = A(0);
    for (int warp = 0; warp < kWarps; warp++) total += shared[warp * (kThreads / 4) + threadIdx.x];
    const int64_t at = static_cast<int64_t>(n) * I + i;
    store_style<A>(a.ds, a.styles.dtype, at, load_style<A>(a.styles, at) * total);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) demod_coefs_bwd_kernel(Backward<T> a) {
  __shared__ __align__(16) Acc<T> shared[kFactors];
  static_assert(kChunk * kSamples <= kFactors && kColumnTile <= kFactors, "they fit, too");
  static_assert(kSamples * kColumns == kThreads / 4, "one thread a result");
  const int64_t tile = static_cast<int64_t>(blockIdx.x) - a.style_blocks;
  if (tile < 0)
    style_tile(a, shared);
  else if (a.shape.rows && a.shape.packed)
    weight_rows<T, kPack<T>>(a, tile, shared);
  else if (a.shape.rows)
    weight_rows<T, 1>(a, tile, shared);
  else if (a.shape.packed)
    weight_columns<T, kPack<T>>(a, tile, shared);
  else
    weight_columns<T, 1>(a, tile, shared);
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

}  // namespace

namespace GANKERN_BACKEND {

// q: [O, I]. dtype is that of the weights; sums, d and q are float32, or float64 for float64.
int demod_coefs(int dtype, int styles_dtype, const void* w, const void* styles, void* d, void* q,
                int64_t N, int64_t O, int64_t I, int64_t K, bool channels_last, double eps,
                void* stream) {
  if (O == 0) return 0;
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Forward<T> a{};
    a.w = static_cast<const T*>(w);
    a.styles = {styles, styles_dtype};
    a.d = static_cast<Acc<T>*>(d);
    a.q = static_cast<Acc<T>*>(q);
    a.shape = shape_of<T>(w, q, N, O, I, K, channels_last);
    a.eps = static_cast<Acc<T>>(eps);
    // A multiple of 8 channels, so that each stage begins with a whole pack.
    a.staged = static_cast<int>(kStage / max(K, int64_t(1)) / 8 * 8);
    const int threads = pow2_between(ceil_div(I * K * int64_t(sizeof(T)), 64), 32, kThreads);
    GK_LAUNCH((demod_coefs_fwd_kernel<T>), dim3(static_cast<unsigned>(O)), dim3(threads), 0, stream,
              a);
    return static_cast<int>(cudaGetLastError());
  });
}

// dw or ds may be null, where they are not wanted.
int demod_coefs_bwd(int dtype, int styles_dtype, const void* dd, const void* d, const void* q,
                    const void* w, const void* styles, void* dw, void* ds, int64_t N, int64_t O,
                    int64_t I, int64_t K, bool channels_last, void* stream) {
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Backward<T> a{};
    a.dd = static_cast<const Acc<T>*>(dd);
    a.d = static_cast<const Acc<T>*>(d);
    a.q = static_cast<const Acc<T>*>(q);
    a.w = static_cast<const T*>(w);
    a.styles = {styles, styles_dtype};
    a.dw = static_cast<T*>(dw);
    a.ds = ds;
    a.shape = shape_of<T>(w, dw, N, O, I, K, channels_last);
    a.column_tiles = static_cast<unsigned>(ceil_div(I, kColumns));
    a.style_blocks = ds ? a.column_tiles * static_cast<unsigned>(ceil_div(N, kSamples)) : 0;
    int64_t blocks = a.style_blocks;
    const int tile = a.shape.packed ? kTile<kPack<T>> : kTile<1>;
    if (dw) blocks += a.shape.rows ? ceil_div(O * I * K, tile) : ceil_div(O * I, kColumnTile);
    if (blocks == 0) return 0;
    GK_LAUNCH((demod_coefs_bwd_kernel<T>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
              stream, a);
    return static_cast<int>(cudaGetLastError());
  });
}

GK_EXPORT(demod_coefs);
GK_EXPORT(demod_coefs_bwd);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
