// The kernel for vectors that registers cannot hold: a block keeps one, or a few side by side, in
// shared memory, or a part of them, and other blocks of a group the rest; each byte is still read
// once. (norm.cuh has the other kernels and says what an Op is.)
//
// All of a part is under way at once, on its way to shared memory. Each block of a group publishes
// its part's sums. When those of all parts are there it adds them up, in the order of the parts,
// and maps what it keeps. Columns have many parts, so that a block would read many sums: the last
// block of a team of parts publishes the team's, and all read those.
//
// No block relies on others running at the same time. A part's sums are taken by the block that
// claims it first: its own block, if that begins in time. A block that has waited for long claims
// what nobody has, and takes those sums too, by the same instructions and so to the same bits. What
// has been claimed is being computed, by a block that runs and waits for nobody.
#pragma once

#include "norm.cuh"

namespace gankern {
namespace {

// Several blocks a multiprocessor: some move data while others wait. A thread of columns has sums
// of its own to hand over, so that few threads with many pixels each take fewer instructions.
constexpr int kGroupBlocks = 4;
constexpr int kGroupThreads = 256;
template <int V>
constexpr int kTeam = V == 1 ? 1 : 16;
constexpr int kGroupLines = 4 * kGroupThreads;  // sums in shared memory, see gather_lines()
// Of a thread that waits: between two looks, and looks before it claims what others might do.
constexpr int kNanoseconds = 40, kLooks = 1000;

// What the blocks of a group share; groups are gridDim.y * gridDim.z, their blocks gridDim.x.
template <typename A>
struct Exchange {
  // Rows: [groups, kSums, parts]. Columns: [groups, parts, then teams][kSums, columns of a block].
  A* sums;
  // Zero before the launch:
  int* claims;     // [groups, parts]
  int* published;  // [groups]: teams
  int* arrived;    // [groups, teams]: parts; of rows, whose teams are parts, nothing
};

// A counter that others add to; a load is no burden to them, as an atomic would be.
__device__ __forceinline__ int look(int* counter) {
#ifdef GANKERN_SIMT
  return simt::look(counter);
#else
  return *static_cast<const volatile int*>(counter);
#endif
}

// Before a counter tells others of this block's writes, and after one has told of theirs. As
// __threadfence(), which also puts all fences of all blocks in one order, but takes less time.
__device__ __forceinline__ void fence() {
#ifdef GANKERN_SIMT
  __threadfence();
#else
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// The part that this block is to sum up next, or -1 when the sums of all teams are there. looks:
// those left to it before it claims.
__device__ __forceinline__ int next_part(int* claims, int* published, int parts, int teams,
                                         int& looks) {
  for (; look(published) < teams; __nanosleep(kNanoseconds)) {
    if (looks > 0) {
      looks--;
      continue;
    }
    for (int part = 0; part < parts; part++)
      if (atomicExch(claims + part, 1) == 0) return part;
  }
  return -1;
}

// Adds up `rows` rows of `1 << log_row` words of sums, to as many lines of shared memory as a block
// has threads for; returns their number. Four loads of a thread are under way at a time.
template <int kThreads, typename A>
__device__ __forceinline__ int gather_lines(const A* from, int rows, int log_row, A* lines) {
  constexpr int kLoads = 4, kSide = 4;
  using Word = Pack<A, kSide>;
  const int word = threadIdx.x & ((1 << log_row) - 1), line = threadIdx.x >> log_row;
  const int count = kThreads >> log_row;
  from += word * kSide;
  Word sum = {};
#pragma unroll 1
  for (int row = line; row < rows; row += kLoads * count) {
    Word words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      words[i] = {};
      const A* at = from + ((row + i * count) << log_row) * kSide;
      if (row + i * count < rows)
        *reinterpret_cast<uint4*>(&words[i]) = __ldcg(reinterpret_cast<const uint4*>(at));
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++)
#pragma unroll
      for (int w = 0; w < kSide; w++) sum.v[w] += words[i].v[w];
  }
  store_pack<A, kSide>(lines + ((line << log_row) + word) * kSide, sum);
  return min(count, rows);
}

// f(op) with an op whose format is a constant: no instruction of the other one is left.
template <typename Op, typename F>
__device__ __forceinline__ void with_format(Op& op, F f) {
  if constexpr (std::is_same<typename Op::Elem, Half16>::value) {
    Op known = op;
    if (op.format.bf16) {
      known.format.bf16 = true;
      f(known);
    } else {
      known.format.bf16 = false;
      f(known);
    }
  } else {
    f(op);
  }
}

// N: elements of a pack. V: vectors of a pack. N: neighbouring columns, `1 << log_tx` threads side
// by side; 1: all elements are of one row, and inner is N. A part is `steps` packs of each thread,
// copied in four batches.
template <typename Op, int N, int V>
__global__ void __launch_bounds__(kGroupThreads, kMaxThreads / kGroupThreads)
    group_kernel(Op op, int64_t length, int64_t inner, int log_tx, int steps,
                 Exchange<Acc<typename Op::Elem>> exchange) {
  using T = typename Op::Elem;
  using A = Acc<T>;
  using Params = typename Op::Params;
  using Style = typename Op::Style;
  constexpr int kThreads = kGroupThreads, kLogThreads = 8;
  constexpr int kEach = N / V, kBatches = 4;
  constexpr int kLogRow = V * Op::kSums == 16 ? 2 : 1;  // words of 4 sums of a pack's columns
  static_assert(V == 1 || V * Op::kSums == 4 << kLogRow, "gather_lines() reads words");
  constexpr int kLine = kThreads * N;           // elements of one input and step
  if constexpr (V == 1) inner = N, log_tx = 0;  // as constants
  __builtin_assume(blockDim.x == kThreads);
  __builtin_assume(log_tx >= 0 && log_tx <= 5);
  GK_DYNAMIC_SHARED(T, stage);
  const int vectors = V << log_tx, tx = threadIdx.x & ((1 << log_tx) - 1);
  const int ty = threadIdx.x >> log_tx, ty_count = kThreads >> log_tx;
  // In shared memory: what is kept, the next part and whether it ends its team, what finish()
  // and add() must know of each vector, sums, factors.
  T* own_stage = stage + threadIdx.x * N;
  int* next = reinterpret_cast<int*>(stage + steps * Op::kIn * kLine);
  Style* styles = reinterpret_cast<Style*>(next + 4);
  Params* known = reinterpret_cast<Params*>(styles + vectors);
  A* lines = reinterpret_cast<A*>(known + vectors);
  A* found = lines + kGroupLines;

  const int parts = gridDim.x, own = blockIdx.x;
  const int teams = (parts + kTeam<V> - 1) / kTeam<V>;
  const int group = blockIdx.z * gridDim.y + blockIdx.y;
  int* claims = exchange.claims + group * parts;
  int* published = exchange.published + group;
  const int row = Op::kSums * vectors;  // of columns' sums
  A* stats = exchange.sums + static_cast<int64_t>(group) * row * (V == 1 ? parts : parts + teams);
  const int64_t slice = blockIdx.z, first_column = static_cast<int64_t>(blockIdx.y) * (N << log_tx);
  const int64_t column = first_column + tx * N, step = ty_count * inner;
  const bool inside = column < inner;
  const auto vector = [&](int c) {
    return V == 1 ? slice : slice * inner + min(first_column + c, inner - 1);
  };
  const int batch = (steps + 4 * kBatches - 1) / (4 * kBatches) * 4;
  int64_t base;  // this thread's first element of a part, and its steps
  int mine;
  const int whole =
      inside ? static_cast<int>((length - ty + ty_count - 1) >> (kLogThreads - log_tx)) : 0;
  const auto find = [&](int part) {
    mine = min(steps, whole - part * steps);
    base = (slice * length + ty) * inner + column + part * steps * step;
  };
  const auto fetch = [&](int part) {
    find(part);
    const T* from[Op::kIn];
#pragma unroll
    for (int a = 0; a < Op::kIn; a++) from[a] = op.in[a] + base;
    T* to = own_stage;
    int k = 0;
#pragma unroll 1
    for (int end = batch, i = 0; i < kBatches; i++, end += batch) {
#pragma unroll 4
      for (; k < min(end, mine); k++, to += Op::kIn * kLine)
#pragma unroll
        for (int a = 0; a < Op::kIn; a++, from[a - 1] += step)
          copy_pack<T, N>(to + a * kLine, from[a]);
      copy_batch();
    }
  };

  fetch(own);
  if (threadIdx.x == 0 && parts > 1) *next = atomicExch(claims + own, 1) == 0 ? own : -1;
  if (threadIdx.x < vectors) styles[threadIdx.x] = op.style(vector(threadIdx.x));
  if constexpr (Op::kPivot) {
    Params pivots[V] = {};
    const int64_t first = slice * length * inner + column;
    if (ty == 0 && inside) load_pivot<Op, N>(op, first, first + length / 2 * inner, pivots);
#pragma unroll
    for (int j = 0; j < V; j++)
      if (ty == 0) known[tx * V + j] = pivots[j];
  } else {
    if (threadIdx.x < vectors) known[threadIdx.x] = op.params(vector(threadIdx.x));
  }
  __syncthreads();

  A sums[V][Op::kSums];
  int looks = kLooks;
#pragma unroll 1
  for (int part = own;;) {
    Params params[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      params[j] = known[tx * V + j];
#pragma unroll
      for (int i = 0; i < Op::kSums; i++) sums[j][i] = A(0);
    }
    const auto add_batch = [&](int i) {
      with_format(op, [&](const Op& known) {
        const T* at = own_stage + i * batch * Op::kIn * kLine;
#pragma unroll 2
        for (int k = min((i + 1) * batch, mine) - i * batch; k > 0; k--, at += Op::kIn * kLine) {
          Pack<T, N> x[Op::kIn];
#pragma unroll
          for (int a = 0; a < Op::kIn; a++) x[a] = load_pack<T, N>(at + a * kLine);
          add_pack(known, x, params, sums);
        }
      });
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
    store_lines<Op::kSums>(sums, log_tx, lines);
    sum_lines<Op::kSums, V, true>(lines, kThreads / 32, log_tx, [&](int e, int, const A* s) {
      A* to = V == 1 ? stats + part : stats + part * row + e;
#pragma unroll
      for (int i = 0; i < Op::kSums; i++) {
        if constexpr (V == 1) found[i] = s[i];
        if (*next == part) to[i * (V == 1 ? parts : vectors)] = s[i];  // else another's claim
      }
    });
    const int team = part / kTeam<V>, first = team * kTeam<V>;
    if constexpr (V > 1) {
      const int size = min(kTeam<V>, parts - first);
      if (threadIdx.x == 0) {
        bool last = false;
        if (*next == part) {
          fence();  // the block's sums, which a barrier has made known here
          last = atomicAdd(exchange.arrived + group * teams + team, 1) == size - 1;
          if (last) fence();
        }
        next[1] = last;
      }
      __syncthreads();
      if (next[1]) {
        const int count =
            gather_lines<kThreads>(stats + first * row, size, log_tx + kLogRow, lines);
        A* to = stats + (parts + team) * row;
        sum_lines<Op::kSums, V, true>(lines, count, log_tx, [&](int e, int, const A* s) {
#pragma unroll
          for (int i = 0; i < Op::kSums; i++) to[i * vectors + e] = s[i];
        });
      }
    }
    if (threadIdx.x == 0) {
      if (V == 1 ? *next == part : next[1]) {
        fence();
        atomicAdd(published, 1);
      }
      *next = next_part(claims, published, parts, teams, looks);
      fence();
    }
    __syncthreads();
    const int claimed = *next;
    if (claimed < 0 && part == own) break;
    part = claimed < 0 ? own : claimed;  // at the end its own again, to be mapped
    fetch(part);
  }

  int count = kThreads / 32;
  if (V > 1 && parts > 1) {
    count = gather_lines<kThreads>(stats + parts * row, teams, log_tx + kLogRow, lines);
  } else {
    if (parts > 1) {  // a thread for each part; its own is at hand
      if (ty == own) load_columns(sums, log_tx, found);
#pragma unroll
      for (int i = 0; i < Op::kSums; i++)
        if (ty != own) sums[0][i] = ty < parts ? __ldcg(stats + i * parts + ty) : A(0);
    }
    store_lines<Op::kSums>(sums, log_tx, lines);
  }
  const A inv_length = A(1) / A(length * kEach);
  sum_lines<Op::kSums, V, true>(lines, count, log_tx, [&](int e, int c, const A* s) {
    A f[Op::kFactors];
    op.finish(vector(c), s, known[c], styles[c], inv_length, f,
              own == 0 && (V == 1 || first_column + c < inner));
#pragma unroll
    for (int i = 0; i < Op::kFactors; i++) found[i * vectors + e] = f[i];
  });
  A factors[V][Op::kFactors];
  load_columns(factors, log_tx, found);

  int again = own;  // to be found again, not kept all the time
  forget(again);
  find(again);
  with_format(op, [&](const Op& known) {
    const T* at = own_stage;
    T* to[Op::kOut];
#pragma unroll
    for (int a = 0; a < Op::kOut; a++) to[a] = op.out[a] + base;
#pragma unroll 2
    for (int k = mine; k > 0; k--, at += Op::kIn * kLine) {
      Pack<T, N> x[Op::kIn];
#pragma unroll
      for (int a = 0; a < Op::kIn; a++) x[a] = load_pack<T, N>(at + a * kLine);
      map_pack(known, x, factors);
#pragma unroll
      for (int a = 0; a < Op::kOut; a++, to[a - 1] += step) store_pack<T, N>(to[a], x[a]);
    }
  });
}

}  // namespace
}  // namespace gankern
