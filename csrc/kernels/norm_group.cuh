// The kernel for vectors that registers cannot hold: a block keeps one, or a few side by side, in
// shared memory, or a part of them, and other blocks of a group the rest; each byte is still read
// once. (norm.cuh has the other kernels and says what an Op is.)
//
// All of a part is under way at once, on its way to shared memory. Each block of a group publishes
// its part's sums. When those of all parts are there it adds them up, in the order of the parts,
// and maps what it keeps.
//
// No block relies on others running at the same time. A part's sums are taken by the block that
// claims it first: its own block, if that begins in time. A block that has waited for long claims
// what nobody has, and takes those sums too, by the same instructions and so to the same bits. What
// has been claimed is being computed, by a block that runs and waits for nobody.
#pragma once

#include "norm.cuh"

namespace gankern {
namespace {

// Several blocks a multiprocessor: one moves data while another waits. Of columns, fewer parts.
template <int V>
constexpr int kGroupThreads = V == 1 ? 256 : 512;
// Of a thread that waits: between two looks, and looks before it claims what others might do.
constexpr int kNanoseconds = 100, kLooks = 1000;

// What the blocks of a group share; groups are gridDim.y * gridDim.z, their blocks gridDim.x.
template <typename A>
struct Exchange {
  // [groups, kSums, V, parts, threads side by side]: what a warp reads is in a row.
  A* sums;
  int* claims;     // [groups, parts], zero before the launch
  int* published;  // [groups], zero before the launch
};

// A counter that others add to; a load is no burden to them, as an atomic would be.
__device__ __forceinline__ int look(int* counter) {
#ifdef GANKERN_SIMT
  return simt::look(counter);
#else
  return *static_cast<const volatile int*>(counter);
#endif
}

// The part that this block is to sum up next, or -1 when the sums of all are there. looks: those
// left to it before it claims.
__device__ __forceinline__ int next_part(int* claims, int* published, int parts, int& looks) {
  for (; look(published) < parts; __nanosleep(kNanoseconds)) {
    if (looks > 0) {
      looks--;
      continue;
    }
    for (int part = 0; part < parts; part++)
      if (atomicExch(claims + part, 1) == 0) return part;
  }
  return -1;
}

// N: elements of a pack. V: vectors of a pack. N: neighbouring columns, `1 << log_tx` threads side
// by side; 1: all elements are of one row, and inner is N. A part is `steps` packs of each thread,
// copied in four batches.
template <typename Op, int N, int V>
__global__ void __launch_bounds__(kGroupThreads<V>, kMaxThreads / kGroupThreads<V>)
    group_kernel(Op op, int64_t length, int64_t inner, int log_tx, int steps,
                 Exchange<Acc<typename Op::Elem>> exchange) {
  using T = typename Op::Elem;
  using A = Acc<T>;
  using Params = typename Op::Params;
  constexpr int kThreads = kGroupThreads<V>, kLogThreads = V == 1 ? 8 : 9;
  constexpr int kEach = N / V, kBatches = 4;
  constexpr int kLine = kThreads * N;           // elements of one input and step
  if constexpr (V == 1) inner = N, log_tx = 0;  // as constants
  __builtin_assume(blockDim.x == kThreads);
  __builtin_assume(log_tx >= 0 && log_tx <= 5);
  GK_DYNAMIC_SHARED(T, stage);
  const int vectors = V << log_tx, tx = threadIdx.x & ((1 << log_tx) - 1);
  const int ty = threadIdx.x >> log_tx, ty_count = kThreads >> log_tx;
  // In shared memory: what is kept, the next part, what add() must know of each vector,
  // column_sum()'s own.
  T* own_stage = stage + threadIdx.x * N;
  int* next = reinterpret_cast<int*>(stage + steps * Op::kIn * kLine);
  Params* known = reinterpret_cast<Params*>(next + 4);
  A* scratch = reinterpret_cast<A*>(known + vectors);

  const int parts = gridDim.x, own = blockIdx.x;
  const int group = blockIdx.z * gridDim.y + blockIdx.y;
  int* claims = exchange.claims + group * parts;
  const int row = parts << log_tx;
  A* stats = exchange.sums + static_cast<int64_t>(group) * Op::kSums * V * row;
  const int64_t slice = blockIdx.z, first_column = static_cast<int64_t>(blockIdx.y) * (N << log_tx);
  const int64_t column = first_column + tx * N, step = ty_count * inner;
  const bool inside = column < inner;
  const auto vector = [&](int c) {
    return V == 1 ? slice : slice * inner + min(first_column + c, inner - 1);
  };
  const int batch = (steps + kBatches - 1) / kBatches;
  int64_t base;
  int mine;  // steps of this thread

  A sums[V][Op::kSums];
  int looks = kLooks;
#pragma unroll 1
  for (int part = own, known_there = 0;;) {
    const int64_t begin = static_cast<int64_t>(part) * steps * ty_count;
    const int64_t left = inside ? length - begin - ty + ty_count - 1 : 0;
    mine = static_cast<int>(min(static_cast<int64_t>(steps), left >> (kLogThreads - log_tx)));
    base = (slice * length + begin + ty) * inner + column;
    int64_t at = base;
    int k = 0;
#pragma unroll 1
    for (int end = batch, i = 0; i < kBatches; i++, end += batch) {
#pragma unroll 2
      for (; k < min(end, mine); k++, at += step)
#pragma unroll
        for (int a = 0; a < Op::kIn; a++)
          copy_pack<T, N>(own_stage + (k * Op::kIn + a) * kLine, op.in[a] + at);
      copy_batch();
    }
    if (!known_there) {
      known_there = 1;
      if (threadIdx.x == 0 && parts > 1) *next = atomicExch(claims + own, 1) == 0 ? own : -1;
      if constexpr (Op::kPivot) {
        Params pivots[V];
        const int64_t first = slice * length * inner + column;
        if (ty == 0 && inside) load_pivot<Op, N>(op, first, first + length / 2 * inner, pivots);
#pragma unroll
        for (int j = 0; j < V; j++)
          if (ty == 0) known[tx * V + j] = pivots[j];
      } else {
        if (threadIdx.x < vectors) known[threadIdx.x] = op.params(vector(threadIdx.x));
      }
      __syncthreads();
    }
    Params params[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      params[j] = known[tx * V + j];
#pragma unroll
      for (int i = 0; i < Op::kSums; i++) sums[j][i] = A(0);
    }
    const auto add_batch = [&](int i) {
#pragma unroll 2
      for (int k = i * batch; k < min((i + 1) * batch, mine); k++) {
        Pack<T, N> x[Op::kIn];
#pragma unroll
        for (int a = 0; a < Op::kIn; a++)
          x[a] = load_pack<T, N>(own_stage + (k * Op::kIn + a) * kLine);
        add_pack(op, x, params, sums);
      }
    };
#pragma unroll 1
    for (int i = 0; i < kBatches; i++) {
      if (i == 0)
        copy_wait<3>();
      else if (i == 1)
        copy_wait<2>();
      else if (i == 2)
        copy_wait<1>();
      else
        copy_wait<0>();
      add_batch(i);
    }
    if (parts == 1) break;
    column_sum<Op::kSums, Op::kSums, V>(sums, log_tx, scratch, [&](int c, const A* s, A* f) {
#pragma unroll
      for (int i = 0; i < Op::kSums; i++) f[i] = s[i];
      if (*next != part) return;  // another block's claim
      A* to = stats + (c % V) * row + (part << log_tx) + c / V;
#pragma unroll
      for (int i = 0; i < Op::kSums; i++) to[i * V * row] = s[i];
    });
    if (threadIdx.x == 0) {
      if (*next == part) {
        __threadfence();  // the block's sums, which a barrier has made known here
        atomicAdd(exchange.published + group, 1);
      }
      *next = next_part(claims, exchange.published + group, parts, looks);
      __threadfence();
    }
    __syncthreads();
    const int claimed = *next;
    if (claimed < 0 && part == own) break;
    part = claimed < 0 ? own : claimed;  // at the end its own again, to be mapped
  }

  if (parts > 1) {  // a thread, or those of several columns, for each part; its own is at hand
    const A* from = stats + threadIdx.x;
    if (ty == own) column_factors<Op::kSums>(sums, log_tx, scratch);
#pragma unroll
    for (int j = 0; j < V; j++)
#pragma unroll
      for (int i = 0; i < Op::kSums; i++)
        if (ty != own) sums[j][i] = ty < parts ? __ldcg(from + (i * V + j) * row) : A(0);
  }
  A factors[V][Op::kFactors];
  const A inv_length = A(1) / A(length * kEach);
  column_sum<Op::kSums, Op::kFactors, V>(sums, log_tx, scratch, [&](int c, const A* s, A* f) {
    op.finish(vector(c), s, known[c], inv_length, f,
              own == 0 && (V == 1 || first_column + c < inner));
  });
  column_factors<Op::kSums>(factors, log_tx, scratch);

  forget(base);
#pragma unroll 2
  for (int k = 0; k < mine; k++, base += step) {
    Pack<T, N> x[Op::kIn];
#pragma unroll
    for (int a = 0; a < Op::kIn; a++) x[a] = load_pack<T, N>(own_stage + (k * Op::kIn + a) * kLine);
    map_pack(op, x, factors);
    store_outputs<Op, N>(op, base, x);
  }
}

}  // namespace
}  // namespace gankern
