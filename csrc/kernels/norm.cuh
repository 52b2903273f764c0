// y = map(x, factors(sums of x along one dimension)): the two kernels behind every normalisation.
//
// The data are dense (outer, length, inner) and the sums run along `length`.
//   rows     inner == 1: a power-of-two group of threads holds a row, 16 bytes a thread and step.
//   columns  inner > 1: a thread holds packs of neighbouring columns, `tx` threads stand side by
//   side
//            along inner (at least one 32-byte sector), the others share the length.
// What was read stays in registers between the sums and the map, or if that is not enough in shared
// memory (kShared), so that each byte is read once. Where one block cannot keep a vector, several
// share it (norm_group.cuh); what does not fit even so is read again.
// Sums are taken in a fixed order.
//
// An Op says what is computed:
//   Elem, kIn, kOut, kSums, kFactors; in[kIn], out[kOut], format
//   kPivot           add() takes x relative to the mean of what is held, for a variance without
//                    cancellation
//   kHold            packs of 16 bytes that a thread of a row keeps of each input
//   kColumnHold, kColumnBytes  the same for columns, and the bytes of their packs
//   kShared          vectors may be so long that shared memory helps, or several blocks
//   Params params(i) what add() needs to know of the i-th (outer, inner) vector
//   add(v, p, s)     adds the kIn values v of one element to the kSums sums
//   finish(i, s, p, inv_length, f, first)  turns sums into factors; `first` is true in one thread
//   map(v, f, y)     the kOut outputs of one element
//   move_pivot(s, n, d)  with kPivot and kShared: makes sums of n elements those about a pivot that
//   is
//                    d less
#pragma once

#include "common.cuh"

namespace gankern {
namespace {

constexpr int kMaxThreads = 1024;  // at most 64 registers each: never under half occupancy

template <typename T, int N>
__device__ __forceinline__ void forget_values(Pack<T, N>& x) {
  if constexpr (sizeof(T) == 2 && N > 1) {
    unsigned int* words = reinterpret_cast<unsigned int*>(&x);
#pragma unroll
    for (int w = 0; w < N / 2; w++) forget(words[w]);
  }
}

template <typename Op, int N>
__device__ __forceinline__ void load_inputs(const Op& op, int64_t i,
                                            Pack<typename Op::Elem, N> (&x)[Op::kIn]) {
#pragma unroll
  for (int a = 0; a < Op::kIn; a++) x[a] = load_pack<typename Op::Elem, N>(op.in[a] + i);
}

// f(j, v) for every j, where v are the values of element j of each input. Four elements at a time:
// more of several inputs would not fit into registers.
template <typename Op, int N, typename F>
__device__ __forceinline__ void each_value(const Op& op,
                                           const Pack<typename Op::Elem, N> (&x)[Op::kIn], F f) {
  constexpr int kPart = Op::kIn > 1 && N > 4 ? 4 : N;
#pragma unroll
  for (int first = 0; first < N; first += kPart) {
    Acc<typename Op::Elem> wide[Op::kIn][kPart];
#pragma unroll
    for (int a = 0; a < Op::kIn; a++) {
      Pack<typename Op::Elem, kPart> part;
#pragma unroll
      for (int j = 0; j < kPart; j++) part.v[j] = x[a].v[first + j];
      widen(part, op.format, wide[a]);
    }
#pragma unroll
    for (int j = 0; j < kPart; j++) {
      Acc<typename Op::Elem> v[Op::kIn];
#pragma unroll
      for (int a = 0; a < Op::kIn; a++) v[a] = wide[a][j];
      f(first + j, v);
    }
  }
}

// V: vectors of a pack, 1 or N; element j is of vector j % V.
// Adds the first input to the sums of which the pivots are made.
template <typename Op, int N, int V>
__device__ __forceinline__ void add_first(const Op& op, const Pack<typename Op::Elem, N>& x,
                                          Acc<typename Op::Elem> (&sums)[V][1]) {
  Acc<typename Op::Elem> wide[N];
  widen(x, op.format, wide);
#pragma unroll
  for (int j = 0; j < N; j++) sums[j % V][0] += wide[j];
}

template <typename Op, int N, int V>
__device__ __forceinline__ void add_pack(const Op& op,
                                         const Pack<typename Op::Elem, N> (&x)[Op::kIn],
                                         const typename Op::Params (&params)[V],
                                         Acc<typename Op::Elem> (&sums)[V][Op::kSums]) {
  each_value<Op, N>(op, x, [&](int j, const Acc<typename Op::Elem>* v) {
    Op::add(v, params[j % V], sums[j % V]);
  });
}

// Maps a pack of each input in place: the outputs take the first inputs' registers.
template <typename Op, int N, int V>
__device__ __forceinline__ void map_pack(const Op& op, Pack<typename Op::Elem, N> (&x)[Op::kIn],
                                         const Acc<typename Op::Elem> (&factors)[V][Op::kFactors]) {
  Acc<typename Op::Elem> out[Op::kOut][N];
  each_value<Op, N>(op, x, [&](int j, const Acc<typename Op::Elem>* v) {
    Acc<typename Op::Elem> y[Op::kOut];
    Op::map(v, factors[j % V], y);
#pragma unroll
    for (int a = 0; a < Op::kOut; a++) out[a][j] = y[a];
  });
#pragma unroll
  for (int a = 0; a < Op::kOut; a++) x[a] = narrow<typename Op::Elem, N>(out[a], op.format);
}

template <typename Op, int N>
__device__ __forceinline__ void store_outputs(const Op& op, int64_t i,
                                              const Pack<typename Op::Elem, N> (&x)[Op::kIn]) {
#pragma unroll
  for (int a = 0; a < Op::kOut; a++) store_pack<typename Op::Elem, N>(op.out[a] + i, x[a]);
}

// The k-th pack of input a that this thread keeps in shared memory.
template <typename T, int N, int kIn>
__device__ __forceinline__ T* kept_at(T* shared, int k, int a) {
  return shared +
         ((k * kIn + a) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N;
}

// Loads what registers do not hold, the k-th pack so; the first `kept` are kept in shared memory.
template <typename Op, int N>
__device__ __forceinline__ void load_far(const Op& op, int64_t i, int k, int kept,
                                         Pack<typename Op::Elem, N> (&x)[Op::kIn]) {
  load_inputs<Op, N>(op, i, x);
  if constexpr (Op::kShared) {
    if (k >= kept) return;
    GK_DYNAMIC_SHARED(typename Op::Elem, shared);
#pragma unroll
    for (int a = 0; a < Op::kIn; a++)
      store_pack<typename Op::Elem, N>(kept_at<typename Op::Elem, N, Op::kIn>(shared, k, a), x[a]);
  }
}
template <typename Op, int N>
__device__ __forceinline__ void load_far_again(const Op& op, int64_t i, int k, int kept,
                                               Pack<typename Op::Elem, N> (&x)[Op::kIn]) {
  if constexpr (Op::kShared) {
    if (k < kept) {
      GK_DYNAMIC_SHARED(typename Op::Elem, shared);
#pragma unroll
      for (int a = 0; a < Op::kIn; a++)
        x[a] =
            load_pack<typename Op::Elem, N>(kept_at<typename Op::Elem, N, Op::kIn>(shared, k, a));
      return;
    }
  }
  load_inputs<Op, N>(op, i, x);
}

// Sums over aligned groups of `group` threads, a power of two; every thread gets them.
template <int kSums, typename A>
__device__ __forceinline__ void group_sum(A (&s)[kSums], int group) {
#pragma unroll
  for (int i = 0; i < kSums; i++) s[i] = warp_sum(s[i], min(group, 32));
  if (group <= 32) return;
  __shared__ A warp_sums[kSums][kMaxThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = group / 32;
  __syncthreads();  // the sums before these have been read
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < kSums; i++) warp_sums[i][warp] = s[i];
  __syncthreads();
  const int mine = (warp & ~(warps - 1)) + (lane & (warps - 1));
#pragma unroll
  for (int i = 0; i < kSums; i++) s[i] = warp_sum(warp_sums[i][mine], warps);
}

template <typename Op, int N, int K>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rows_kernel(Op op, int64_t rows, int64_t length, int log_group, int kept) {
  using T = typename Op::Elem;
  using A = Acc<T>;
  const int group = 1 << log_group, lane = threadIdx.x & (group - 1);
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x >> log_group) + (threadIdx.x >> log_group);
  // Threads beyond the last row stay, without data, for the barriers.
  const int64_t packs = row < rows ? length / N : 0;
  const int near = static_cast<int>(min(packs, static_cast<int64_t>(K) << log_group));
  int64_t base = row * length;

  Pack<T, N> x[K][Op::kIn];
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int i = lane + (k << log_group);
    if (i < near) load_inputs<Op, N>(op, base + i * N, x[k]);
  }
  typename Op::Params params[1] = {op.params(row < rows ? row : 0)};
  if constexpr (Op::kPivot) {
    A mean[1][1] = {};
#pragma unroll
    for (int k = 0; k < K; k++)
      if (lane + (k << log_group) < near) add_first(op, x[k][0], mean);
    group_sum(mean[0], group);
    params[0].pivot = mean[0][0] / A(max(near, 1) * N);
  }

  A sums[1][Op::kSums] = {};
#pragma unroll
  for (int k = 0; k < K; k++)
    if (lane + (k << log_group) < near) add_pack(op, x[k], params, sums);
#pragma unroll 1
  for (int k = 0; lane + ((static_cast<int64_t>(K) + k) << log_group) < packs; k++) {
    const int64_t i = lane + ((static_cast<int64_t>(K) + k) << log_group);
    Pack<T, N> far[Op::kIn];
    load_far<Op, N>(op, base + i * N, k, kept, far);
    add_pack(op, far, params, sums);
  }
  group_sum(sums[0], group);

  if (row >= rows) return;
  forget(base);
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int a = 0; a < Op::kIn; a++) forget_values(x[k][a]);
  A factors[1][Op::kFactors];
  op.finish(row, sums[0], params[0], A(1) / A(length), factors[0], lane == 0);
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int i = lane + (k << log_group);
    map_pack(op, x[k], factors);
    if (i < near) store_outputs<Op, N>(op, base + i * N, x[k]);
  }
#pragma unroll 1
  for (int k = 0; lane + ((static_cast<int64_t>(K) + k) << log_group) < packs; k++) {
    const int64_t i = lane + ((static_cast<int64_t>(K) + k) << log_group);
    Pack<T, N> far[Op::kIn];
    load_far_again<Op, N>(op, base + i * N, k, kept, far);
    map_pack(op, far, factors);
    store_outputs<Op, N>(op, base + i * N, far);
  }
}

// Sums over the threads that share a column and, through finish(column of the block, sums, factors,
// first), what follows from them; every thread gets the factors of its own N columns.
// shared: [(thread rows) * kSums + kFactors][columns].
template <int kSums, int kFactors, int N, typename A, typename F>
__device__ __forceinline__ void column_sum(A (&s)[N][kSums], A (&f)[N][kFactors], int log_tx,
                                           A* shared, F finish) {
  const int width = 1 << log_tx, tx = threadIdx.x & (width - 1);
  for (int offset = width; offset < 32; offset *= 2)
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int i = 0; i < kSums; i++) s[j][i] += __shfl_xor_sync(0xffffffffu, s[j][i], offset);
  const int log_line = max(log_tx, 5), lines = blockDim.x >> log_line;
  if (lines == 1) {
#pragma unroll
    for (int j = 0; j < N; j++) finish(tx * N + j, s[j], f[j], threadIdx.x < width);
    return;
  }
  const int columns = width * N;  // column tx * N + j is kept at j * width + tx: no bank conflict
  __syncthreads();                // what was in shared memory before has been read
  if ((threadIdx.x & ((1 << log_line) - 1)) < width) {
    A* line = shared + (threadIdx.x >> log_line) * kSums * columns + tx;
#pragma unroll
    for (int i = 0; i < kSums; i++)
#pragma unroll
      for (int j = 0; j < N; j++) line[i * columns + j * width] = s[j][i];
  }
  __syncthreads();
  A* factors = shared + lines * kSums * columns;
  for (int e = threadIdx.x; e < columns; e += blockDim.x) {
    A total[kSums] = {}, out[kFactors];
#pragma unroll 4
    for (int line = 0; line < lines; line++)
#pragma unroll
      for (int i = 0; i < kSums; i++) total[i] += shared[(line * kSums + i) * columns + e];
    finish((e & (width - 1)) * N + (e >> log_tx), total, out, true);
#pragma unroll
    for (int i = 0; i < kFactors; i++) factors[i * columns + e] = out[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kFactors; i++)
#pragma unroll
    for (int j = 0; j < N; j++) f[j][i] = factors[i * columns + j * width + tx];
}

template <typename Op, int N, int K>
__global__ void __launch_bounds__(kMaxThreads, 1)
    columns_kernel(Op op, int64_t outer, int64_t length, int64_t inner, int log_tx, int kept) {
  using T = typename Op::Elem;
  using A = Acc<T>;
  GK_DYNAMIC_SHARED(A, all_shared);
  A* shared =
      all_shared + kept * Op::kIn * static_cast<int>(blockDim.x * N * sizeof(T) / sizeof(A));
  const int64_t slice = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  if (slice >= outer) return;
  const int tx = threadIdx.x & ((1 << log_tx) - 1), columns = N << log_tx;
  const int ty = threadIdx.x >> log_tx, ty_count = blockDim.x >> log_tx;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * columns;
  const int64_t column = first_column + tx * N;
  const bool inside = column < inner;
  const int64_t stop = inside ? length : 0;
  const int near = static_cast<int>(min(stop, static_cast<int64_t>(K) * ty_count));
  const int64_t step = ty_count * inner;
  int64_t base = slice * length * inner + column + ty * inner;

  Pack<T, N> x[K][Op::kIn];
#pragma unroll
  for (int k = 0; k < K; k++)
    if (ty + k * ty_count < near) load_inputs<Op, N>(op, base + k * step, x[k]);

  const auto vector = [&](int64_t c) { return slice * inner + min(c, inner - 1); };
  typename Op::Params params[N];
#pragma unroll
  for (int j = 0; j < N; j++) params[j] = op.params(vector(column + j));
  if constexpr (Op::kPivot) {
    A mean[N][1] = {}, pivot[N][1];
#pragma unroll
    for (int k = 0; k < K; k++)
      if (ty + k * ty_count < near) add_first(op, x[k][0], mean);
    const A scale = A(1) / A(min(length, static_cast<int64_t>(K) * ty_count));
    column_sum<1, 1, N>(mean, pivot, log_tx, shared + columns,
                        [&](int, const A* s, A* f, bool) { f[0] = s[0] * scale; });
#pragma unroll
    for (int j = 0; j < N; j++) {
      params[j].pivot = pivot[j][0];
      if (ty == 0) shared[(j << log_tx) + tx] = pivot[j][0];
    }
    __syncthreads();
  }

  A sums[N][Op::kSums] = {};
#pragma unroll
  for (int k = 0; k < K; k++)
    if (ty + k * ty_count < near) add_pack(op, x[k], params, sums);
#pragma unroll 1
  for (int k = K; ty + static_cast<int64_t>(k) * ty_count < stop; k++) {
    Pack<T, N> far[Op::kIn];
    load_far<Op, N>(op, base + k * step, k - K, kept, far);
    add_pack(op, far, params, sums);
  }

  A factors[N][Op::kFactors];
  const A inv_length = A(1) / A(length);
  column_sum<Op::kSums, Op::kFactors, N>(sums, factors, log_tx, shared + (Op::kPivot ? columns : 0),
                                         [&](int c, const A* s, A* f, bool first) {
                                           const int64_t i = vector(first_column + c);
                                           typename Op::Params p = op.params(i);
                                           if constexpr (Op::kPivot)
                                             p.pivot = shared[(c % N << log_tx) + c / N];
                                           op.finish(i, s, p, inv_length, f,
                                                     first && first_column + c < inner);
                                         });
  forget(base);
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int a = 0; a < Op::kIn; a++) forget_values(x[k][a]);
#pragma unroll
  for (int k = 0; k < K; k++) {
    map_pack(op, x[k], factors);
    if (ty + k * ty_count < near) store_outputs<Op, N>(op, base + k * step, x[k]);
  }
#pragma unroll 1
  for (int k = K; ty + static_cast<int64_t>(k) * ty_count < stop; k++) {
    Pack<T, N> far[Op::kIn];
    load_far_again<Op, N>(op, base + k * step, k - K, kept, far);
    map_pack(op, far, factors);
    store_outputs<Op, N>(op, base + k * step, far);
  }
}

}  // namespace
}  // namespace gankern
