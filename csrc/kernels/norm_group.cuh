// The kernel for vectors that no multiprocessor can hold: a group of blocks holds one, or a few
// side by side, and each byte is still read once. (norm.cuh has the other kernels and says what an
// Op is.)
//
// Each block keeps its part in registers and shared memory and publishes the part's sums. When
// those of all parts are there it adds them up, in the order of the parts, and maps what it keeps.
//
// No block relies on others running at the same time. A part's sums are taken by the block that
// claims it first: its own block, if that begins in time. A block that has waited for long claims
// what nobody has, and takes those sums too, by the same instructions and so to the same bits. What
// has been claimed is being computed, by a block that runs and waits for nobody.
#pragma once

#include "norm.cuh"

namespace gankern {
namespace {

constexpr int kGroupThreads = 512;  // two blocks a multiprocessor: one moves data, the other waits
// Of a thread that waits: between two looks, and looks before it claims what others might do.
constexpr int kNanoseconds = 200, kLooks = 128;

// What the blocks of a group share; groups are gridDim.y * gridDim.z, their blocks gridDim.x.
template <typename A>
struct Exchange {
  // [groups, kSums and the pivot, V, parts, threads side by side]: what a warp reads is in a row.
  A* sums;
  int* claims;     // [groups, parts], zero before the launch
  int* published;  // [groups], zero before the launch
};

// The part that this block is to sum up next, or -1 when the sums of all are there.
__device__ __forceinline__ int next_part(int* claims, int* published, int parts) {
  for (int looks = kLooks; atomicAdd(published, 0) < parts; __nanosleep(kNanoseconds)) {
    if (looks-- > 0) continue;
    looks = 0;
    for (int part = 0; part < parts; part++)
      if (atomicExch(claims + part, 1) == 0) return part;
  }
  return -1;
}

// N: elements of a pack, K: packs of each input that a thread keeps in registers. V: vectors of a
// pack. N: neighbouring columns, `1 << log_tx` threads side by side; 1: all elements are of one
// row, and inner is N. A part is `steps` packs of each thread.
template <typename Op, int N, int K, int V>
__global__ void __launch_bounds__(kGroupThreads, 2)
    group_kernel(Op op, int64_t length, int64_t inner, int log_tx, int steps,
                 Exchange<Acc<typename Op::Elem>> exchange) {
  using T = typename Op::Elem;
  using A = Acc<T>;
  using Params = typename Op::Params;
  constexpr int kStats = Op::kSums + Op::kPivot, kEach = N / V;
  if constexpr (V == 1) inner = N, log_tx = 0;  // as constants
  __builtin_assume(blockDim.x == kGroupThreads);
  __builtin_assume(log_tx >= 0 && log_tx <= 5);
  GK_DYNAMIC_SHARED(A, all_shared);
  const int kept = steps - K;
  A* shared = all_shared +
              kept * Op::kIn *
                  (kGroupThreads * N * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(A)));
  const int vectors = V << log_tx, tx = threadIdx.x & ((1 << log_tx) - 1);
  const int ty = threadIdx.x >> log_tx, ty_count = kGroupThreads >> log_tx;
  // In shared memory: the next part, what add() must know of each vector, column_sum()'s own.
  int* next = reinterpret_cast<int*>(shared);
  Params* known = reinterpret_cast<Params*>(next + 4);
  A* scratch = reinterpret_cast<A*>(known + vectors);

  const int parts = gridDim.x, own = blockIdx.x;
  const int group = blockIdx.z * gridDim.y + blockIdx.y;
  int* claims = exchange.claims + group * parts;
  const int row = parts << log_tx;
  A* stats = exchange.sums + static_cast<int64_t>(group) * kStats * V * row;
  const int64_t slice = blockIdx.z, first_column = static_cast<int64_t>(blockIdx.y) * (N << log_tx);
  const int64_t column = first_column + tx * N, step = ty_count * inner;
  const bool inside = column < inner;
  const auto vector = [&](int c) {
    return V == 1 ? slice : slice * inner + min(first_column + c, inner - 1);
  };
  const auto rows_of = [&](int part) {
    const int64_t most = steps * ty_count;
    return static_cast<int>(min(most, length - part * most));
  };
  if (threadIdx.x == 0) *next = atomicExch(claims + own, 1) == 0 ? own : -1;
  if (threadIdx.x < vectors) known[threadIdx.x] = op.params(vector(threadIdx.x));

  Pack<T, N> x[K][Op::kIn];
  int64_t base;
  int stop;
#pragma unroll 1
  for (int part = own;;) {
    stop = inside ? rows_of(part) : 0;
    base = (slice * length + static_cast<int64_t>(part) * steps * ty_count + ty) * inner + column;
#pragma unroll
    for (int k = 0; k < K; k++)
      if (ty + k * ty_count < stop) load_inputs<Op, N>(op, base + k * step, x[k]);
    Params params[V];
    if constexpr (Op::kPivot) {
      A mean[V][1] = {}, pivot[V][1];
#pragma unroll
      for (int k = 0; k < K; k++)
        if (ty + k * ty_count < stop) add_first(op, x[k][0], mean);
      const A scale = A(1) / A(min(rows_of(part), K * ty_count) * kEach);
      column_sum<1, 1, V>(mean, pivot, log_tx, scratch,
                          [&](int, const A* s, A* f, bool) { f[0] = s[0] * scale; });
#pragma unroll
      for (int j = 0; j < V; j++) {
        params[j].pivot = pivot[j][0];
        if (ty == 0) known[tx * V + j].pivot = pivot[j][0];
      }
    } else {
      __syncthreads();  // they are there
#pragma unroll
      for (int j = 0; j < V; j++) params[j] = known[tx * V + j];
    }

    A sums[V][Op::kSums] = {};
#pragma unroll
    for (int k = 0; k < K; k++)
      if (ty + k * ty_count < stop) add_pack(op, x[k], params, sums);
#pragma unroll 1
    for (int k = K; ty + k * ty_count < stop; k++) {
      Pack<T, N> far[Op::kIn];
      load_far<Op, N>(op, base + k * step, k - K, kept, far);
      add_pack(op, far, params, sums);
    }
    A none[V][1];
    column_sum<Op::kSums, 1, V>(sums, none, log_tx, scratch, [&](int c, const A* s, A* f, bool) {
      f[0] = A(0);
      if (*next != part) return;  // another block's claim
      A* to = stats + (c % V) * row + (part << log_tx) + c / V;
#pragma unroll
      for (int i = 0; i < Op::kSums; i++) to[i * V * row] = s[i];
      if constexpr (Op::kPivot) to[Op::kSums * V * row] = known[c].pivot;
    });
    if (threadIdx.x == 0) {
      if (*next == part) {
        __threadfence();  // the block's sums, which a barrier has made known here
        atomicAdd(exchange.published + group, 1);
      }
      *next = next_part(claims, exchange.published + group, parts);
      __threadfence();
    }
    __syncthreads();
    const int claimed = *next;
    if (claimed < 0 && part == own) break;
    part = claimed < 0 ? own : claimed;  // at the end its own again, to be mapped
  }

  // A thread, or those of several columns, for each part.
  A sums[V][Op::kSums] = {}, factors[V][Op::kFactors];
  const A* from = stats + threadIdx.x;
  if constexpr (Op::kPivot) {
    A pivot[V][1] = {}, own_pivot[V];
#pragma unroll
    for (int j = 0; j < V; j++)
      if (ty < parts) pivot[j][0] = __ldcg(from + (Op::kSums * V + j) * row);
#pragma unroll
    for (int j = 0; j < V; j++) own_pivot[j] = pivot[j][0];
    A mean[V][1];
    column_sum<1, 1, V>(pivot, mean, log_tx, scratch,
                        [&](int, const A* s, A* f, bool) { f[0] = s[0] / A(parts); });
#pragma unroll
    for (int j = 0; j < V; j++) {
      if (ty == 0) known[tx * V + j].pivot = mean[j][0];
      own_pivot[j] -= mean[j][0];
    }
#pragma unroll
    for (int j = 0; j < V; j++) {
      if (ty >= parts) continue;
#pragma unroll
      for (int i = 0; i < Op::kSums; i++) sums[j][i] = __ldcg(from + (i * V + j) * row);
      Op::move_pivot(sums[j], A(rows_of(ty) * kEach), own_pivot[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; j++)
#pragma unroll
      for (int i = 0; i < Op::kSums; i++)
        if (ty < parts) sums[j][i] = __ldcg(from + (i * V + j) * row);
  }
  const A inv_length = A(1) / A(length * kEach);
  column_sum<Op::kSums, Op::kFactors, V>(
      sums, factors, log_tx, scratch, [&](int c, const A* s, A* f, bool first) {
        op.finish(vector(c), s, known[c], inv_length, f,
                  first && own == 0 && (V == 1 || first_column + c < inner));
      });

  forget(base);
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int a = 0; a < Op::kIn; a++) forget_values(x[k][a]);
#pragma unroll
  for (int k = 0; k < K; k++) {
    map_pack(op, x[k], factors);
    if (ty + k * ty_count < stop) store_outputs<Op, N>(op, base + k * step, x[k]);
  }
#pragma unroll 1
  for (int k = K; ty + k * ty_count < stop; k++) {
    Pack<T, N> far[Op::kIn];
    load_far_again<Op, N>(op, base + k * step, k - K, kept, far);
    map_pack(op, far, factors);
    store_outputs<Op, N>(op, base + k * step, far);
  }
}

}  // namespace
}  // namespace gankern
