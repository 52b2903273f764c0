// bias_act: y = clamp(act(x + b) * gain), its gradient and the gradient's gradient.
//
// x is any dense tensor seen as [outer, C, inner] in memory order. Each thread keeps one channel
// (inner > 1, "planes") or one 16-byte group of channels (inner == 1, "rows"), so that the bias is
// loaded once, the bias gradient is summed in registers, and no element needs a division.
#include "act.cuh"

namespace gankern {
namespace {

enum Op : int { kFwd, kBwd, kBwd2 };

constexpr int kThreads = 256;

// One element: in0 is x (kFwd) or dy; in1 is the reference; in2 is v, the gradient of dx.
template <int kOp, bool kPwl, typename A>
__device__ __forceinline__ A element(A in0, A in1, A in2, A bias, const ActArgs<A>& p) {
  if (kOp == kFwd) return clamped(act_value<kPwl>(in0 + bias, p) * p.gain, p.clamp);
  A u = in1, a = in1 * p.inv_gain, y = in1;
  if (p.from_x) {
    u = in1 + bias;
    a = act_value<kPwl>(u, p);
    y = a * p.gain;
  }
  if (p.clamp >= A(0) && !(y > -p.clamp && y < p.clamp)) return A(0);
  if (kOp == kBwd) return in0 * p.gain * act_slope<kPwl>(a, u, p);
  return in0 * in2 * act_curve(a, u, p);
}

// Backward compares y, as it was stored, with the clamp as it was stored.
template <int kOp, typename T>
__device__ __forceinline__ void round_clamp(ActArgs<Acc<T>>& p, Format<T> format) {
  if (kOp != kFwd && !p.from_x) p.clamp = to_acc(from_acc<T>(p.clamp, format), format);
}

template <typename T>
struct Tensors {
  const T* in0;
  const T* in1;
  const T* in2;
  T* out;
  Format<T> format;
};

// See each(): what is left of the registers.
template <int kOp>
constexpr int kFew = kOp == kFwd ? 2 : 1;

// N elements of each input, from i on.
template <typename T, int N>
struct Loaded {
  Raw<T, N> in0, in1, in2;
};
template <int kOp, typename T, int N>
__device__ __forceinline__ Loaded<T, N> load(const Tensors<T>& t, int64_t i) {
  Loaded<T, N> v;
  v.in0 = v.in1 = v.in2 = load_raw<T, N>(t.in0 + i);
  if (kOp != kFwd) v.in1 = load_raw<T, N>(t.in1 + i);
  if (kOp == kBwd2) v.in2 = load_raw<T, N>(t.in2 + i);
  return v;
}

// Their outputs; bias(j) is the bias. Returns the sum, and adds each to its own of `sums`, unless
// null.
template <int kOp, bool kPwl, typename T, int N, typename Bias>
__device__ __forceinline__ Acc<T> process(const Loaded<T, N>& v, const Tensors<T>& t, int64_t i,
                                          Bias bias, const ActArgs<Acc<T>>& p, Acc<T>* sums) {
  using A = Acc<T>;
  const auto a = reinterpret_cast<const Pack<T, N>&>(v.in0);
  const auto b = reinterpret_cast<const Pack<T, N>&>(v.in1);
  const auto c = reinterpret_cast<const Pack<T, N>&>(v.in2);
  A in0[N], in1[N], in2[N];
  widen(a, t.format, in0);
  widen(b, t.format, in1);
  widen(c, t.format, in2);
  if constexpr (kOp == kBwd && kPwl) {
    const Pwl pwl(p);
    if (p.from_x) {
#pragma unroll
      for (int j = 0; j < N; j++) in0[j] = pwl.grad(in0[j], in1[j] + bias(j));
    } else {
#pragma unroll
      for (int j = 0; j < N; j++) in0[j] = pwl.grad(in0[j], in1[j] * p.inv_gain, in1[j]);
    }
  } else {
    each<kPwl, kFew<kOp>>(
        [&](int j, A& v, A ref, A w) { v = element<kOp, kPwl>(v, ref, w, bias(j), p); }, in0, in1,
        in2);
  }
  A sum = A(0);
#pragma unroll
  for (int j = 0; j < N; j++) {
    if (kOp == kBwd) sum += in0[j];
    if (kOp == kBwd && sums) sums[j] += in0[j];
  }
  forget(i);  // else the compiler splits the store
  store_pack<T, N>(t.out + i, narrow<T, N>(in0, t.format));
  return sum;
}

template <int kOp, bool kPwl, typename T, int N, typename Bias>
__device__ __forceinline__ Acc<T> process(const Tensors<T>& t, int64_t i, Bias bias,
                                          const ActArgs<Acc<T>>& p, Acc<T>* sums) {
  return process<kOp, kPwl>(load<kOp, T, N>(t, i), t, i, bias, p, sums);
}

// How the bias gradient is finished: a block writes its partial sums, the last block to arrive adds
// those of all in order. Rows have many blocks: the last of each kTogether adds those of these, the
// last of all their sums. splits == 1: no partials, no ticket.
template <typename A>
struct Reduce {
  void* db;      // [C], or null
  A* partials;   // [splits, C]
  int* tickets;  // [gridDim.x, 1 + chunks], zero before the launch
  bool db_f32;
};

constexpr int kTogether = 64;

// The parts that a group of channels is cut into, along y and z of the grid, and this block's.
__device__ __forceinline__ int splits() { return static_cast<int>(gridDim.y * gridDim.z); }
__device__ __forceinline__ int64_t split() { return blockIdx.z * gridDim.y + blockIdx.y; }

// Planes: thread row threadIdx.y owns channel c; blockIdx.y is a part of the plane, z of outer. A
// part is `span` packs and, in the first, the elements before and behind them; or all elements one
// by one, unless packed.
template <int kOp, bool kPwl, typename T, int N>
__global__ void __launch_bounds__(kThreads, 4)
    bias_act_planes_kernel(Tensors<T> t, const void* b, bool b_f32, int64_t outer, int64_t C,
                           int64_t inner, int span, bool packed, ActArgs<Acc<T>> p,
                           Reduce<Acc<T>> r) {
  using A = Acc<T>;
  round_clamp<kOp, T>(p, t.format);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Of `all` packs or elements, those of this part.
  const auto first = [&] { return static_cast<int64_t>(blockIdx.y) * span + threadIdx.x; };
  const auto behind = [&](int64_t all) {
    return min(all, (static_cast<int64_t>(blockIdx.y) + 1) * span);
  };
  A sum = A(0);
  if (c < C) {
    const A bias_c = b ? load_param<T>(b, b_f32, c, t.format) : A(0);
    const auto bias = [&](int) { return bias_c; };
    for (int64_t n = blockIdx.z; n < outer; n += gridDim.z) {
      int64_t start, head, packs;  // head: elements up to 16-byte alignment
      const auto locate = [&] {
        start = (n * C + c) * inner;
        head = packed || N == 1 ? min(inner, -start & (N - 1)) : inner;
        packs = (inner - head) / N;
      };
      locate();
      const int64_t stop = behind(packs);
      for (int64_t i = first(); i < stop; i += blockDim.x)
        sum += process<kOp, kPwl, T, N>(t, start + head + i * N, bias, p, nullptr);
      if (N == 1) continue;
      forget(n);
      locate();
      const int64_t edges = inner - packs * N;
      const int64_t edge_stop = blockIdx.y + 1 < gridDim.y ? behind(edges) : edges;
      for (int64_t i = first(); i < edge_stop; i += blockDim.x)
        sum +=
            process<kOp, kPwl, T, 1>(t, start + (i < head ? i : i + packs * N), bias, p, nullptr);
    }
  }
  if (kOp != kBwd || !r.db) return;

  // Thread 0 of a row gets the sum over the row: within warps, then across them.
  __shared__ A warp_sums[kThreads / 32];
  const auto row_sum = [&](A v) {
    v = warp_sum(v, min(static_cast<int>(blockDim.x), 32));
    const int warps = blockDim.x / 32;  // of a row
    if (warps <= 1) return v;
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.y * warps + threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int w = 1; w < warps; w++) v += warp_sums[threadIdx.y * warps + w];
    return v;
  };
  sum = row_sum(sum);
  if (splits() > 1) {
    if (threadIdx.x == 0 && c < C) r.partials[split() * C + c] = sum;
    if (!arrives_last(r.tickets + blockIdx.x, splits())) return;
    sum = A(0);
#pragma unroll 4
    for (int s = threadIdx.x; s < splits(); s += blockDim.x)
      if (c < C) sum += r.partials[s * C + c];
    sum = row_sum(sum);
  }
  if (threadIdx.x == 0 && c < C) store_param<T>(r.db, r.db_f32, c, sum, t.format);
}

// Where in shared memory the bias of element j of thread x lies: in pieces of kRead, which are read
// at once, so that neither writes nor reads meet in a bank.
template <int N, int kRead>
__device__ __forceinline__ int bias_at(int x, int j) {
  const int pitch = blockDim.x * kRead | 32 / (N / kRead);
  return j / kRead * pitch + x * kRead + j % kRead;
}

// The bias of a block's columns, whose channels are column % C, to shared memory: global memory
// gives each once to the block, not to every row of threads.
template <typename T, int N, int kRead>
__device__ __forceinline__ void share_row_bias(Acc<T>* shared, const void* b, bool b_f32,
                                               int64_t columns, int64_t C, Format<T> format) {
  const int x = blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * x * N;
  const int width = static_cast<int>(min(columns - first, static_cast<int64_t>(x) * N));
  for (int e = threadIdx.y * x + threadIdx.x; e < width; e += x * blockDim.y) {
    // A folded row lies in one block: 32 bits are enough for its columns.
    const int64_t c =
        columns == C ? first + e : static_cast<unsigned>(e) % static_cast<unsigned>(C);
    shared[bias_at<N, kRead>(e / N, e % N)] = load_param<T>(b, b_f32, c, format);
  }
  __syncthreads();
}

// The sums of each thread's columns to shared memory, those of a warp added up where its threads
// have columns in common.
template <typename A, int N>
__device__ __forceinline__ void share_sums(A* shared, A (&sums)[N]) {
  constexpr int kRead = N < 4 ? N : 4;
  const int x = blockDim.x, lane = (threadIdx.y * x + threadIdx.x) % 32;
#pragma unroll 1
  for (int step = 16; step >= x; step /= 2)
#pragma unroll
    for (int j = 0; j < N; j++) sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], step);
  if (x >= 32 || lane < x) {
    A* const part =
        shared + (x >= 32 ? threadIdx.y : threadIdx.y * x / 32) * bias_at<N, kRead>(0, N);
#pragma unroll
    for (int j = 0; j < N; j += kRead) {
      Pack<A, kRead> piece;
#pragma unroll
      for (int k = 0; k < kRead; k++) piece.v[k] = sums[j + k];
      store_pack<A, kRead>(part + bias_at<N, kRead>(threadIdx.x, j), piece);
    }
  }
  __syncthreads();
}

// Of them, the sum of a column of the block.
template <typename A, int N>
__device__ __forceinline__ A shared_sum(const A* shared, int column) {
  constexpr int kRead = N < 4 ? N : 4;
  const int x = blockDim.x, parts = x >= 32 ? blockDim.y : blockDim.y * x / 32;
  A sum = A(0);
#pragma unroll 4
  for (int i = 0; i < parts; i++)
    sum += shared[i * bias_at<N, kRead>(0, N) + bias_at<N, kRead>(column / N, column % N)];
  return sum;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostBlocks = 4;  // of kThreads, on one of Turing's multiprocessors
#else
constexpr int kMostBlocks = 6;  // on any newer one
#endif

// Rows: memory is rows of `columns` elements (columns = fold * C, a multiple of N); a thread owns N
// columns, whose channels are (column + j) % C; the last row may be partial.
template <int kOp, bool kPwl, typename T, int N>
__global__ void __launch_bounds__(kThreads, N == 8 ? 4 : kMostBlocks)
    bias_act_rows_kernel(Tensors<T> t, const void* b, bool b_f32, int64_t numel, int64_t C,
                         int64_t columns, ActArgs<Acc<T>> p, Reduce<Acc<T>> r) {
  using A = Acc<T>;
  constexpr bool kKept = kOp == kFwd && kPwl || N == 1;  // the bias is in registers
  constexpr int kRead = !kKept ? 1 : N < 4 ? N : 4;
  round_clamp<kOp, T>(p, t.format);
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y * columns;
  const bool biased = b && (kOp == kFwd || p.from_x);
  A sums[N] = {};
  __shared__ __align__(16) A shared[kThreads * N + kThreads];
  if (biased) share_row_bias<T, N, kRead>(shared, b, b_f32, columns, C, t.format);
  if (column < columns) {
    const auto shared_bias = [&](int j) {
      return biased ? shared[bias_at<N, kRead>(threadIdx.x, j)] : A(0);
    };
    Pack<A, kRead> kept[N / kRead] = {};
    if (kKept && biased)
#pragma unroll
      for (int k = 0; k < N / kRead; k++)
        kept[k] = load_pack<A, kRead>(shared + bias_at<N, kRead>(threadIdx.x, k * kRead));
    const auto bias = [&](int j) {
      if constexpr (kKept)
        return kept[j / kRead].v[j % kRead];
      else
        return shared_bias(j);
    };
    int64_t i = (static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y) * columns + column;
    if constexpr (kOp == kBwd && kPwl)
      for (; i + step + N <= numel; i += 2 * step) {  // two under way at once
        const auto one = load<kOp, T, N>(t, i), two = load<kOp, T, N>(t, i + step);
        process<kOp, kPwl>(one, t, i, bias, p, sums);
        process<kOp, kPwl>(two, t, i + step, bias, p, sums);
      }
    for (; i + N <= numel; i += step) process<kOp, kPwl, T, N>(t, i, bias, p, sums);
    if (N > 1)
#pragma unroll 1
      for (int j = 0; j < N && i + j < numel; j++) {
        const A v =
            process<kOp, kPwl, T, 1>(t, i + j, [&](int) { return shared_bias(j); }, p, nullptr);
#pragma unroll
        for (int k = 0; k < N; k++)  // with k == j as a condition sums would be in local memory
          if (kOp == kBwd) sums[k] += k == j ? v : A(0);
      }
  }
  if (kOp != kBwd || !r.db) return;

  // Level 0 adds up the threads, 1 the blocks of a chunk, 2 the chunks; each folds the columns.
  const int slot = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int chunks = (splits() + kTogether - 1) / kTogether, chunk = blockIdx.y / kTogether;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x * N;
  const int width = static_cast<int>(min(columns - first, static_cast<int64_t>(blockDim.x) * N));
  const int channels = static_cast<int>(min(C - first, static_cast<int64_t>(width)));
  __syncthreads();  // the bias has been read
#pragma unroll 1
  for (int level = 0;; level++) {
    share_sums<A, N>(shared, sums);
    const bool whole = level == 2 || splits() == 1 || (level == 1 && chunks == 1);
    const int row = level == 0 ? blockIdx.y : chunk * kTogether;
    for (int c = slot; c < channels; c += threads) {
      A sum = A(0);
      for (int k = c; k < width; k += channels) sum += shared_sum<A, N>(shared, k);
      if (whole)
        store_param<T>(r.db, r.db_f32, first + c, sum, t.format);
      else
        r.partials[row * C + first + c] = sum;
    }
    if (whole) return;
    const int of = level ? chunks : min(kTogether, splits() - chunk * kTogether);
    if (!arrives_last(r.tickets + blockIdx.x * (chunks + 1) + (level ? chunks : chunk), of)) return;
    const A* from = r.partials + (level ? 0 : chunk * kTogether * C) + column;
#pragma unroll
    for (int j = 0; j < N; j++) sums[j] = A(0);
#pragma unroll 2
    for (int s = threadIdx.y; s < of; s += blockDim.y) {
      const A* part = from + (level ? kTogether * s : s) * C;
#pragma unroll
      for (int j = 0; j < N; j++)
        if (column + j < C) sums[j] += part[j];
    }
  }
}

struct Plan {
  bool rows;
  int fold, span;
  int64_t columns;
  dim3 grid, block;
  int64_t splits() const { return static_cast<int64_t>(grid.y) * grid.z; }
  int64_t tickets() const {
    return splits() == 1 ? 0 : grid.x * (rows ? 1 + ceil_div(splits(), kTogether) : 1);
  }
};

// Chooses grid and block: enough blocks for every multiprocessor, long runs for each thread.
// reduces: few blocks a channel, each long, so that partial sums stay small.
Plan make_plan(int64_t outer, int64_t C, int64_t inner, int packed, bool reduces) {
  Plan plan{};
  const int64_t numel = outer * C * inner, sms = sm_count();
  // Blocks; rows are as many as run at once, so that the bias is loaded for several. Their sums are
  // cheap: more blocks, so that none is waited for at the end.
  const int64_t want = sms * (inner == 1 ? (reduces ? 24 : 8) : reduces ? 8 : 16);
  int threads = kThreads;
  while (threads > 64 && numel / packed < sms * threads) threads /= 2;
  plan.rows = inner == 1;
  if (plan.rows) {
    plan.fold = 1;
    while (C * plan.fold % packed) plan.fold *= 2;
    plan.columns = C * plan.fold;
    const int64_t packs = plan.columns / packed, rows = ceil_div(outer, plan.fold);
    // A folded row is reduced by one block, so it has to fit into one.
    if (plan.fold > 1) threads = max(threads, pow2_between(packs, 1, kThreads));
    if (reduces) threads = kThreads;
    int x = pow2_between(packs, 1, plan.fold > 1 ? threads : 32);
    const auto runs = [&] { return ceil_div(rows * x, threads); };  // a thread's rows in one block
    // Few rows: blocks so narrow, but of whole sectors, that none needs another one's sums.
    const int narrowest = packed > 1 ? 2 : 16;
    if (reduces && plan.fold == 1 && rows * narrowest <= 4 * threads)
      while (x > narrowest && (runs() > 4 || ceil_div(packs, x) < sms)) x /= 2;
    const int64_t groups = ceil_div(packs, x);
    int64_t splits = runs();
    if (reduces) {
      int run = runs() <= 4 ? 4 : 8;
      while (runs() > 4 && run > 1 && groups * ceil_div(runs(), run) < sms) run /= 2;
      splits = ceil_div(runs(), run);
    }
    plan.block = dim3(x, threads / x);
    plan.grid =
        dim3(groups, max(int64_t(1), min(min(splits, int64_t(65535)), ceil_div(want, groups))));
    return plan;
  }
  const int64_t packs = max(int64_t(1), inner / packed);
  const int x = pow2_between(packs, 1, threads);
  const int y = threads / x;
  plan.block = dim3(x, y);
  plan.columns = C;
  const int64_t groups = ceil_div(C, y);
  // Two packs a thread where there is work enough; a plane is cut only to fill the machine.
  int64_t per_chunk = x;
  if (groups * outer * ceil_div(packs, 2 * x) >= want) per_chunk = 2 * x;
  const int64_t most_chunks = reduces ? ceil_div(want, groups) : 16384;
  per_chunk = max(per_chunk, ceil_div(ceil_div(packs, most_chunks), x) * x);
  plan.span = static_cast<int>(min(per_chunk, int64_t(1) << 30));
  const int64_t chunks = ceil_div(packs, plan.span);
  int64_t n_splits = min(outer, int64_t(65535));
  if (reduces) n_splits = max(int64_t(1), min(n_splits, ceil_div(want, groups * chunks)));
  plan.grid = dim3(groups, chunks, n_splits);
  return plan;
}

// Rows that need folding but are too long for one block: C is large and odd.
bool wide_fold(int64_t C, int64_t inner, int packed) {
  return inner == 1 && C % packed && C > kThreads / 2;
}

// A dense tensor without a bias is one plane.
void merge(bool has_channels, int64_t& outer, int64_t& C, int64_t& inner) {
  if (has_channels && C > 1) return;
  inner *= outer * C;
  outer = C = 1;
}

int pack_of(int dtype) { return dtype == kF64 ? 1 : dtype == kF32 ? 4 : 8; }

template <int kOp>
int run(int dtype, int bdtype, const void* in0, const void* in1, const void* in2, const void* b,
        void* out, void* db, void* workspace, int64_t outer, int64_t C, int64_t inner, int act,
        double alpha, double gain, double clamp, bool from_x, void* stream) {
  if (outer * C * inner == 0) return 0;
  merge(b || db, outer, C, inner);
  const bool packed =
      aligned16(in0) && aligned16(out) && (!in1 || aligned16(in1)) && (!in2 || aligned16(in2));
  return by_width(dtype, [&](auto zero, auto format) {
    using T = decltype(zero);
    using A = Acc<T>;
    constexpr int kPack = sizeof(T) == 8 ? 1 : 16 / sizeof(T);
    const int n = packed && !wide_fold(C, inner, kPack) ? kPack : 1;
    const Plan plan = make_plan(outer, C, inner, n, db != nullptr);
    const double slope = act == kLinear ? 1.0 : act == kRelu ? 0.0 : alpha;
    const ActArgs<A> p{act, A(slope), A(gain), gain == 0 ? A(0) : A(1 / gain), A(clamp), from_x};
    A* partials = static_cast<A*>(workspace);
    int* tickets = reinterpret_cast<int*>(partials + plan.splits() * C);
    const Reduce<A> r{db, partials, tickets, bdtype == kF32};
    if (db && plan.splits() > 1) {
      const cudaError_t e = cudaMemsetAsync(tickets, 0, plan.tickets() * sizeof(int),
                                            static_cast<cudaStream_t>(stream));
      if (e != cudaSuccess) return static_cast<int>(e);
    }
    const Tensors<T> t{static_cast<const T*>(in0), static_cast<const T*>(in1),
                       static_cast<const T*>(in2), static_cast<T*>(out), format};
    const bool b_f32 = bdtype == kF32;
    // float64 and single elements are rare: one instance serves all activations.
    constexpr bool kPwl = kOp != kBwd2 && kPack > 1;
    const bool pwl = kPwl && act <= kLrelu;
    if (plan.rows) {
      const auto kernel = n == 1 ? bias_act_rows_kernel<kOp, false, T, 1>
                          : pwl  ? bias_act_rows_kernel<kOp, kPwl, T, kPack>
                                 : bias_act_rows_kernel<kOp, false, T, kPack>;
      GK_LAUNCH((kernel), plan.grid, plan.block, 0, stream, t, b, b_f32, outer * C, C, plan.columns,
                p, r);
    } else {
      const auto kernel = pwl ? bias_act_planes_kernel<kOp, kPwl, T, kPack>
                              : bias_act_planes_kernel<kOp, false, T, kPack>;
      GK_LAUNCH((kernel), plan.grid, plan.block, 0, stream, t, b, b_f32, outer, C, inner, plan.span,
                n > 1, p, r);
    }
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace

namespace GANKERN_BACKEND {

int bias_act(int dtype, int bdtype, const void* x, const void* b, void* y, int64_t outer, int64_t C,
             int64_t inner, int act, double alpha, double gain, double clamp, void* stream) {
  return run<kFwd>(dtype, bdtype, x, nullptr, nullptr, b, y, nullptr, nullptr, outer, C, inner, act,
                   alpha, gain, clamp, false, stream);
}

// Bytes of scratch that bias_act_bwd needs to return db.
int64_t bias_act_bwd_workspace(int dtype, int64_t outer, int64_t C, int64_t inner) {
  if (outer * C * inner == 0) return 0;
  merge(true, outer, C, inner);
  int64_t bytes = 0;
  for (const int packed : {1, pack_of(dtype)}) {
    const Plan plan = make_plan(outer, C, inner, packed, true);
    const int64_t sums = plan.splits() == 1 ? 0 : plan.splits() * C;
    bytes = max(bytes, sums * (dtype == kF64 ? 8 : 4) + plan.tickets() * 4);
  }
  return bytes;
}

int bias_act_bwd(int dtype, int bdtype, const void* dy, const void* ref, const void* b, void* dx,
                 void* db, void* workspace, int64_t outer, int64_t C, int64_t inner, int act,
                 double alpha, double gain, double clamp, bool from_x, void* stream) {
  return run<kBwd>(dtype, bdtype, dy, ref, nullptr, b, dx, db, workspace, outer, C, inner, act,
                   alpha, gain, clamp, from_x, stream);
}

int bias_act_bwd2(int dtype, int bdtype, const void* dy, const void* v, const void* ref,
                  const void* b, void* dref, int64_t outer, int64_t C, int64_t inner, int act,
                  double alpha, double gain, double clamp, bool from_x, void* stream) {
  return run<kBwd2>(dtype, bdtype, dy, ref, v, b, dref, nullptr, nullptr, outer, C, inner, act,
                    alpha, gain, clamp, from_x, stream);
}

GK_EXPORT(bias_act);
GK_EXPORT(bias_act_bwd_workspace);
GK_EXPORT(bias_act_bwd);
GK_EXPORT(bias_act_bwd2);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
