// y = map(x, factors(sums of x along one dimension)): the kernels behind every normalisation.
//
// The data are dense (outer, length, inner) and the sums run along `length`.
//   short rows  inner == 1 and at most 32 packs of 16 bytes: neighbouring lanes hold a pack of each
//               of several rows.
//   rows        inner == 1: a power-of-two group of threads holds a row.
//   columns     inner > 1: a thread holds packs of neighbouring columns, `tx` threads stand side by
//               side along inner (at least one 32-byte sector), the others share the length.
// What was read stays in registers between the sums and the map, so that each byte is read once;
// what they do not hold is read again, or kept in shared memory by norm_group.cuh. Sums are taken
// in a fixed order.
//
// An Op says what is computed:
//   Elem, kIn, kOut, kSums, kFactors; in[kIn], out[kOut], format
//   kPivot           add() takes x relative to some value of the vector, params.pivot, for a
//                    variance without cancellation
//   kHold            packs of 16 bytes that a thread of a row keeps of each input
//   kColumnHold, kColumnBytes  the same for columns, and the bytes of their packs
//   kGroupBytes      0, or vectors may be so long that shared memory helps, or several blocks: the
//                    bytes of their columns' packs
//   Params params(i) what add() needs to know of the i-th (outer, inner) vector
//   add(v, p, s)     adds the kIn values v of one element to the kSums sums
//   finish(i, s, p, inv_length, f, first)  turns sums into factors; `first` is true in one thread
//   Style style(i)   of norm_group.cuh, where finish() also takes it, after p: what it must load
//   map(v, f, y)     the kOut outputs of one element
#pragma once

#include "common.cuh"

namespace gankern {
namespace {

constexpr int kMaxThreads = 1024;  // at most 64 registers each: never under half occupancy
constexpr int kShortThreads = 256;

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
// The pivots of V vectors: the mean of two packs of the first input, at `first` and at `middle`.
template <typename Op, int N, int V>
__device__ __forceinline__ void load_pivot(const Op& op, int64_t first, int64_t middle,
                                           typename Op::Params (&params)[V]) {
  using T = typename Op::Elem;
  Acc<T> a[N], b[N];
  widen(load_pack<T, N>(op.in[0] + first), op.format, a);
  widen(load_pack<T, N>(op.in[0] + middle), op.format, b);
#pragma unroll
  for (int j = 0; j < V; j++) {
    Acc<T> sum(0);
#pragma unroll
    for (int i = j; i < N; i += V) sum += a[i] + b[i];
    params[j].pivot = sum * Acc<T>(0.5 * V / N);
  }
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

// f(where, its packs) for what registers do not hold, `first`, first + step, ... below `stop`; of
// single elements of up to two inputs four are under way at a time.
template <typename Op, int N, typename Place, typename F>
__device__ __forceinline__ void each_far(const Op& op, int64_t first, int64_t stop, int step,
                                         Place place, F f) {
  constexpr int kBatch = N == 1 && Op::kIn < 3 ? 4 : 1;
#pragma unroll 1
  for (int64_t i = first; i < stop; i += kBatch * step) {
    Pack<typename Op::Elem, N> far[kBatch][Op::kIn];
#pragma unroll
    for (int b = 0; b < kBatch; b++)
      if (i + b * step < stop) load_inputs<Op, N>(op, place(i + b * step), far[b]);
#pragma unroll
    for (int b = 0; b < kBatch; b++)
      if (i + b * step < stop) f(place(i + b * step), far[b]);
  }
}

// Sums over aligned groups of `width` neighbouring lanes, all R * M side by side.
template <int R, int M, typename A>
__device__ __forceinline__ void lanes_sum(A (&s)[R][M], int width) {
#pragma unroll 1
  for (int offset = width / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int i = 0; i < M; i++) s[r][i] += __shfl_xor_sync(0xffffffffu, s[r][i], offset);
}

// R rows a thread, a row `side` rows after the other.
template <typename Op, int N, int R>
__global__ void __launch_bounds__(kShortThreads, kMaxThreads / kShortThreads)
    short_rows_kernel(Op op, int64_t rows, int packs, int log_group,
                      Acc<typename Op::Elem> inv_length) {
  using T = typename Op::Elem;
  using A = Acc<T>;
  const int group = 1 << log_group, lane = threadIdx.x & (group - 1);
  const int side = blockDim.x >> log_group;  // rows of the block, R times
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (R * side) + (threadIdx.x >> log_group);
  // Threads beyond the last row stay, without data, for the shuffles.
  const int mine = lane < packs ? static_cast<int>(min(rows - row, int64_t(R) * side)) : 0;
  const int step = side * packs * N;
  int64_t base = (row * packs + lane) * N;

  Pack<T, N> x[R][Op::kIn];
#pragma unroll
  for (int r = 0; r < R; r++)
    if (r * side < mine) load_inputs<Op, N>(op, base + r * step, x[r]);
  typename Op::Params params[R];
#pragma unroll
  for (int r = 0; r < R; r++) params[r] = op.params(min(row + r * side, rows - 1));
  if constexpr (Op::kPivot) {
    A mean[R][1] = {};
#pragma unroll
    for (int r = 0; r < R; r++) {
      A wide[N];
      widen(x[r][0], op.format, wide);
      if (r * side < mine)
#pragma unroll
        for (int j = 0; j < N; j++) mean[r][0] += wide[j];
    }
    lanes_sum(mean, group);
#pragma unroll
    for (int r = 0; r < R; r++) params[r].pivot = mean[r][0] * inv_length;
  }
  A sums[R][Op::kSums] = {};
#pragma unroll
  for (int r = 0; r < R; r++)
    if (r * side < mine)
      each_value<Op, N>(op, x[r], [&](int, const A* v) { Op::add(v, params[r], sums[r]); });
  lanes_sum(sums, group);

  forget(base);
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int a = 0; a < Op::kIn; a++) forget_values(x[r][a]);
    A factors[1][Op::kFactors];
    if (r * side >= mine) continue;
    // What can be loaded again is not kept over the sums.
    const auto known = Op::kPivot ? params[r] : op.params(row + r * side);
    op.finish(row + r * side, sums[r], known, inv_length, factors[0], lane == 0);
    map_pack<Op, N, 1>(op, x[r], factors);
    store_outputs<Op, N>(op, base + r * step, x[r]);
  }
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
    rows_kernel(Op op, int64_t rows, int64_t length, int log_group) {
  using T = typename Op::Elem;
  using A = Acc<T>;
  const int group = 1 << log_group, lane = threadIdx.x & (group - 1);
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x >> log_group) + (threadIdx.x >> log_group);
  // Threads beyond the last row stay, without data, for the barriers.
  const int64_t packs = row < rows ? length / N : 0;
  const int near = static_cast<int>(min(packs, static_cast<int64_t>(K) << log_group));
  int64_t base = row * length;

  typename Op::Params params[1] = {op.params(row < rows ? row : 0)};
  if constexpr (Op::kPivot)
    if (packs > 0) load_pivot<Op, N>(op, base, base + packs / 2 * N, params);
  Pack<T, N> x[K][Op::kIn];
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int i = lane + (k << log_group);
    if (i < near) load_inputs<Op, N>(op, base + i * N, x[k]);
  }

  A sums[1][Op::kSums] = {};
#pragma unroll
  for (int k = 0; k < K; k++)
    if (lane + (k << log_group) < near) add_pack(op, x[k], params, sums);
  const int64_t first = lane + (static_cast<int64_t>(K) << log_group);
  each_far<Op, N>(
      op, first, packs, group, [&](int64_t i) { return base + i * N; },
      [&](int64_t, auto& far) { add_pack(op, far, params, sums); });
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
  each_far<Op, N>(
      op, first, packs, group, [&](int64_t i) { return base + i * N; },
      [&](int64_t at, auto& far) {
        map_pack(op, far, factors);
        store_outputs<Op, N>(op, at, far);
      });
}

// Values of columns in shared memory: of `1 << log_tx` threads with N columns each, a word of kWord
// after the other, so that neighbouring threads have neighbouring words: no bank conflict.
template <int N>
constexpr int kWord = N < 4 ? N : 4;
template <int N>
__device__ __forceinline__ int column_of(int e, int log_tx) {
  const int word = e / kWord<N>, tx = word & ((1 << log_tx) - 1);
  return tx * N + (word >> log_tx) * kWord<N> + e % kWord<N>;
}
template <int N, typename A>
__device__ __forceinline__ A* column_word(A* values, int j, int log_tx) {
  const int tx = threadIdx.x & ((1 << log_tx) - 1);
  return values + (((j / kWord<N>) << log_tx) + tx) * kWord<N>;
}

__device__ __forceinline__ int column_lines(int log_tx) { return blockDim.x >> max(log_tx, 5); }

// The sums over the threads of a warp, or of a line, that share a column, to
// lines: [column_lines(log_tx)][kSums][columns].
template <int kSums, int N, typename A>
__device__ __forceinline__ void store_lines(A (&s)[N][kSums], int log_tx, A* lines) {
  const int width = 1 << log_tx, columns = width * N;
  for (int offset = width; offset < 32; offset *= 2)
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int i = 0; i < kSums; i++) s[j][i] += __shfl_xor_sync(0xffffffffu, s[j][i], offset);
  const int log_line = max(log_tx, 5);
  if ((threadIdx.x & ((1 << log_line) - 1)) >= width) return;
  A* line = lines + (threadIdx.x >> log_line) * kSums * columns;
#pragma unroll
  for (int i = 0; i < kSums; i++)
#pragma unroll
    for (int j = 0; j < N; j += kWord<N>) {
      Pack<A, kWord<N>> word;
#pragma unroll
      for (int w = 0; w < kWord<N>; w++) word.v[w] = s[j + w][i];
      store_pack<A, kWord<N>>(column_word<N>(line + i * columns, j, log_tx), word);
    }
}

// f(e, column of the block, sums) for the e-th value of each sum's columns, between barriers.
// kOnce: there are no more columns than threads.
template <int kSums, int N, bool kOnce, typename A, typename F>
__device__ __forceinline__ void sum_lines(const A* lines, int count, int log_tx, F f) {
  const int columns = N << log_tx;
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < columns; e += kOnce ? columns : blockDim.x) {
    A total[kSums] = {};
#pragma unroll 4
    for (int line = 0; line < count; line++)
#pragma unroll
      for (int i = 0; i < kSums; i++) total[i] += lines[(line * kSums + i) * columns + e];
    f(e, column_of<N>(e, log_tx), total);
  }
  __syncthreads();
}

// What sum_lines() has left of a thread's own columns in values: [kFactors][columns].
template <int kFactors, int N, typename A>
__device__ __forceinline__ void load_columns(A (&f)[N][kFactors], int log_tx, const A* values) {
#pragma unroll
  for (int i = 0; i < kFactors; i++)
#pragma unroll
    for (int j = 0; j < N; j += kWord<N>) {
      const auto word =
          load_pack<A, kWord<N>>(column_word<N>(values + i * (N << log_tx), j, log_tx));
#pragma unroll
      for (int w = 0; w < kWord<N>; w++) f[j + w][i] = word.v[w];
    }
}

template <typename Op, int N, int K>
__global__ void __launch_bounds__(kMaxThreads, 1)
    columns_kernel(Op op, int64_t outer, int64_t length, int64_t inner, int log_tx) {
  using T = typename Op::Elem;
  using A = Acc<T>;
  GK_DYNAMIC_SHARED(A, shared);
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
  A* scratch = shared + (Op::kPivot ? columns : 0);
  typename Op::Params params[N];
#pragma unroll
  for (int j = 0; j < N; j++) params[j] = op.params(vector(column + j));
  if constexpr (Op::kPivot) {
    const int64_t first = slice * length * inner + column;
    if (inside) load_pivot<Op, N>(op, first, first + length / 2 * inner, params);
    if (ty == 0)
#pragma unroll
      for (int j = 0; j < N; j++) shared[(j << log_tx) + tx] = params[j].pivot;
  }

  A sums[N][Op::kSums] = {};
#pragma unroll
  for (int k = 0; k < K; k++)
    if (ty + k * ty_count < near) add_pack(op, x[k], params, sums);
  each_far<Op, N>(
      op, ty + int64_t(K) * ty_count, stop, ty_count,
      [&](int64_t i) { return base + (i - ty) * inner; },
      [&](int64_t, auto& far) { add_pack(op, far, params, sums); });

  const A inv_length = A(1) / A(length);
  store_lines<Op::kSums>(sums, log_tx, scratch);
  A* found = scratch + column_lines(log_tx) * Op::kSums * columns;
  sum_lines<Op::kSums, N, false>(scratch, column_lines(log_tx), log_tx,
                                 [&](int e, int c, const A* s) {
                                   const int64_t i = vector(first_column + c);
                                   typename Op::Params p = op.params(i);
                                   if constexpr (Op::kPivot)
                                     p.pivot = shared[(c % N << log_tx) + c / N];
                                   A f[Op::kFactors];
                                   op.finish(i, s, p, inv_length, f, first_column + c < inner);
#pragma unroll
                                   for (int k = 0; k < Op::kFactors; k++)
                                     found[k * columns + e] = f[k];
                                 });
  A factors[N][Op::kFactors];
  load_columns(factors, log_tx, found);
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
  each_far<Op, N>(
      op, ty + int64_t(K) * ty_count, stop, ty_count,
      [&](int64_t i) { return base + (i - ty) * inner; },
      [&](int64_t at, auto& far) {
        map_pack(op, far, factors);
        store_outputs<Op, N>(op, at, far);
      });
}

}  // namespace
}  // namespace gankern
