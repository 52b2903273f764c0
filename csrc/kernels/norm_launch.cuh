// Launches the kernels of norm.cuh: which of them, how many threads a vector, what is kept where.
#pragma once

#include "norm_group.cuh"

namespace gankern {
namespace {

// Packs a thread: little work goes to as many threads as there are packs, much to fewer.
inline int packs_each(int64_t packs, int most) {
  const int64_t busy = static_cast<int64_t>(sm_count()) * kMaxThreads;
  return static_cast<int>(max(int64_t(1), min(static_cast<int64_t>(most), packs / busy)));
}

// Halves the threads of a block, from `threads` to `least`, while there are few blocks.
inline int fewer_threads(int64_t all, int threads, int least) {
  while (threads > least && ceil_div(all, threads) < sm_count()) threads /= 2;
  return threads;
}

template <typename Op, int N, int R>
int launch_short_rows(const Op& op, int64_t rows, int packs, void* stream) {
  const int group = pow2_between(packs, 1, 32);
  const int threads = fewer_threads(ceil_div(rows, R) * group, kShortThreads, 32);
  GK_LAUNCH((short_rows_kernel<Op, N, R>), dim3(ceil_div(rows, R * (threads / group))),
            dim3(threads), 0, stream, op, rows, packs, log2_of(group),
            Acc<typename Op::Elem>(1) / Acc<typename Op::Elem>(packs * N));
  return static_cast<int>(cudaGetLastError());
}

// Chooses kernel, packs and threads, and launches. Pointers that are not 16-byte aligned, and rows
// or columns that are not whole packs, go element by element.
template <typename Op, int N, int K>
int launch_rows(const Op& op, int64_t rows, int64_t length, void* stream) {
  const int64_t packs = ceil_div(length, N);
  if constexpr (N > 1)
    if (packs <= 32) {
      constexpr int R = K < 4 ? K : 4;
      return rows * packs < int64_t(R) * sm_count() * 512
                 ? launch_short_rows<Op, N, 1>(op, rows, static_cast<int>(packs), stream)
                 : launch_short_rows<Op, N, R>(op, rows, static_cast<int>(packs), stream);
    }
  // At least 8 neighbouring threads a row, for whole cache lines.
  int group = pow2_between(ceil_div(packs, packs_each(rows * packs, K)), 1, kMaxThreads);
  group = max(group, pow2_between(packs, 1, 8));
  const int threads = fewer_threads(rows * group, max(group, 256), max(group, 32));
  GK_LAUNCH((rows_kernel<Op, N, K>), dim3(ceil_div(rows * group, threads)), dim3(threads), 0,
            stream, op, rows, length, log2_of(group));
  return static_cast<int>(cudaGetLastError());
}

template <typename Op, int N, int K>
int launch_columns(const Op& op, int64_t outer, int64_t length, int64_t inner, void* stream) {
  using A = Acc<typename Op::Elem>;
  const int64_t packs = ceil_div(inner, N);
  const int sector = max(1, 32 / static_cast<int>(N * sizeof(typename Op::Elem)));
  int tx = pow2_between(packs, 1, sector);
  const int each = packs_each(outer * length * packs, K);
  int ty = pow2_between(ceil_div(length, each), 1, kMaxThreads / tx);
  while (tx * ty < 32 && tx < packs) tx *= 2;
  while (tx * ty < 32) ty *= 2;
  // Wider blocks, for whole cache lines and fewer sums, while they still fill the machine.
  while (tx < packs && tx * ty < (tx < 4 * sector ? 512 : 256) &&
         outer * ceil_div(packs, 2 * tx) >= 2 * sm_count())
    tx *= 2;
  const int64_t slices = min(outer, int64_t(32768));
  const int columns = tx * N, lines = tx * ty / max(tx, 32);
  const int sums = ((Op::kPivot ? columns : 0) + (lines * Op::kSums + Op::kFactors) * columns) *
                   static_cast<int>(sizeof(A));
  GK_LAUNCH((columns_kernel<Op, N, K>), dim3(ceil_div(packs, tx), slices, ceil_div(outer, slices)),
            dim3(tx * ty), sums, stream, op, outer, length, inner, log2_of(tx));
  return static_cast<int>(cudaGetLastError());
}

// Elements of a pack of a row, and of columns; float64, which is for gradient checks, has no packs.
template <typename Op>
constexpr int kRowPack = sizeof(typename Op::Elem) == 8 ? 1 : 16 / sizeof(typename Op::Elem);
template <typename Op>
constexpr int kColumnPack = kRowPack<Op> == 1 ? 1 : Op::kColumnBytes / sizeof(typename Op::Elem);

// How groups of blocks share vectors; parts == 0 where registers keep them, or no group can.
// V, length and inner as group_kernel takes them.
template <typename Op, int N, int V>
class Group {
  using A = Acc<typename Op::Elem>;
  static constexpr int kThreads = kGroupThreads;
  static constexpr int kStep = Op::kIn * kThreads * N * sizeof(typename Op::Elem);

 public:
  // `held`: packs of each input that a thread of the other kernels keeps.
  Group(int64_t outer, int64_t length, int64_t inner, int held)
      : length_(length), inner_(inner), outer_(outer) {
    // 128 bytes side by side, 64, or 32 where parts would be too many.
    for (int bytes = 128; bytes >= 32 && !parts_; bytes /= 2) plan(bytes, held);
  }
  int parts() const { return parts_; }
  int64_t bytes() const {
    if (parts_ < 2) return 0;
    return sums() * static_cast<int64_t>(sizeof(A)) + tickets() * static_cast<int64_t>(sizeof(int));
  }
  int launch(const Op& op, void* workspace, void* stream) const {
    A* const partial = static_cast<A*>(workspace);
    int* const claims = reinterpret_cast<int*>(partial + sums());
    int* const published = claims + outer_ * columns_ * parts_;
    const Exchange<A> exchange{partial, claims, published, published + outer_ * columns_};
    const int shared = scratch_ + steps_ * kStep;
    if (const cudaError_t error = cudaFuncSetAttribute(
            (group_kernel<Op, N, V>), cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
      return static_cast<int>(error);
    // Room for several blocks, where the driver would leave more of it to the cache.
    if (const cudaError_t error = cudaFuncSetAttribute(
            (group_kernel<Op, N, V>), cudaFuncAttributePreferredSharedMemoryCarveout,
            cudaSharedmemCarveoutMaxShared))
      return static_cast<int>(error);
    if (parts_ > 1)
      if (const cudaError_t error = cudaMemsetAsync(claims, 0, tickets() * sizeof(int),
                                                    static_cast<cudaStream_t>(stream)))
        return static_cast<int>(error);
    GK_LAUNCH((group_kernel<Op, N, V>), dim3(parts_, columns_, outer_), dim3(kThreads), shared,
              stream, op, length_, inner_, log_tx_, steps_, exchange);
    return static_cast<int>(cudaGetLastError());
  }

 private:
  // With `bytes` of columns side by side.
  void plan(int bytes, int held) {
    constexpr int kPack = N * sizeof(typename Op::Elem);
    const int tx = V == 1 ? 1 : pow2_between(ceil_div(inner_, N), 1, max(1, bytes / kPack));
    const bool line = V > 1 && tx * kPack > 64, wide = V > 1 && tx * kPack > 32;
    if (line && inner_ % (tx * N) != 0) return;
    vectors_ = V * tx;
    log_tx_ = log2_of(tx);
    columns_ = ceil_div(inner_, tx * N);
    const int64_t sms = sm_count(), groups = outer_ * columns_;
    // Registers do while two blocks of a multiprocessor have enough of them, or one is all there
    // is.
    const int side = line ? tx / 2 : tx;
    if (length_ <= int64_t(held) * (groups < sms ? kMaxThreads : kMaxThreads / 2) / side) return;
    scratch_ = 16 + kGroupLines * static_cast<int>(sizeof(A)) +
               vectors_ * static_cast<int>(sizeof(typename Op::Params) +
                                           sizeof(typename Op::Style) + Op::kFactors * sizeof(A));
    const int64_t all = ceil_div(length_, kThreads / tx);
    int64_t parts = ceil_div(all, int64_t((shared_of_block(kGroupBlocks) - scratch_) / kStep));
    // What fewer blocks of a multiprocessor can keep needs no other.
    if (V > 1 && all * kStep <= shared_of_block(kGroupBlocks - 1) - scratch_) parts = 1;
    // Parts wait for one another: if they must, then on all multiprocessors.
    if (parts > 1) parts = max(parts, min(sms / groups, all / 4));
    steps_ = static_cast<int>(ceil_div(all, parts));
    parts = ceil_div(all, steps_);
    // A thread sums a part of a row; and what waits longer than one round of blocks would better
    // read twice.
    const int64_t round = kGroupBlocks * sms;
    bool fits = parts <= (V == 1 ? min(int64_t(kThreads), round) : round);
    // Whole cache lines where several groups find room, some to move data while others wait, and
    // where half a line would have parts as well.
    if (line && parts > 1) fits = parts > 3 && 3 * parts <= round;
    // Each block reads the sums of all teams: a twentieth of its bytes at most, or of fewer
    // columns.
    const int64_t moved = int64_t(steps_) * kStep / Op::kIn * (Op::kIn + Op::kOut);
    const int64_t read = teams(parts) * vectors_ * Op::kSums * static_cast<int64_t>(sizeof(A));
    if (wide && parts > 1 && read * 20 > moved) return;
    if (fits && outer_ <= 65535 && columns_ <= 65535) parts_ = static_cast<int>(parts);
  }
  static int64_t teams(int64_t parts) { return ceil_div(parts, kTeam<V>); }
  int64_t sums() const {
    const int64_t rows = V == 1 ? parts_ : parts_ + teams(parts_);
    return outer_ * columns_ * rows * Op::kSums * vectors_;
  }
  int64_t tickets() const {
    return outer_ * columns_ * (parts_ + 1 + (V == 1 ? 0 : teams(parts_)));
  }
  // Of each of several blocks of a multiprocessor, less what the system takes.
  static int shared_of_block(int blocks) {
    int device = 0, all = 64 * 1024;
    if (cudaGetDevice(&device) == cudaSuccess)
      cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    return all / blocks - 1024;
  }

  int64_t length_, inner_, outer_, columns_;
  int parts_ = 0, steps_ = 0, log_tx_, vectors_, scratch_ = 0;
};

// f(group) where the data have whole packs, else 0.
template <typename Op, typename F>
int64_t with_group(int64_t outer, int64_t length, int64_t inner, F f) {
  constexpr int kRow = kRowPack<Op>;
  if constexpr (Op::kGroupBytes > 0) {
    constexpr int kColumn = Op::kGroupBytes / sizeof(typename Op::Elem);
    if (inner == 1 && length % kRow == 0)
      return f(Group<Op, kRow, 1>(outer, length / kRow, kRow, Op::kHold));
    if (inner > 1 && inner % kColumn == 0)
      return f(Group<Op, kColumn, kColumn>(outer, length, inner, Op::kColumnHold));
  }
  return 0;
}

// Bytes of the workspace that launch_norm() takes.
template <typename Op>
int64_t norm_workspace(int64_t outer, int64_t length, int64_t inner) {
  if (outer * length * inner == 0) return 0;
  return with_group<Op>(outer, length, inner, [](auto group) { return group.bytes(); });
}

// workspace: null, or norm_workspace() bytes.
template <typename Op>
int launch_norm(const Op& op, int64_t outer, int64_t length, int64_t inner, void* workspace,
                void* stream) {
  if (outer * length * inner == 0) return 0;
  bool packed = true;
  for (int a = 0; a < Op::kIn; a++) packed = packed && aligned16(op.in[a]);
  for (int a = 0; a < Op::kOut; a++) packed = packed && aligned16(op.out[a]);
  if constexpr (Op::kGroupBytes > 0) {
    int error = -1;
    if (packed)
      with_group<Op>(outer, length, inner, [&](auto group) {
        if (group.parts() == 1 || (group.parts() && workspace))
          error = group.launch(op, workspace, stream);
        return 0;
      });
    if (error >= 0) return error;
  }
  constexpr int kRow = kRowPack<Op>, kColumn = kColumnPack<Op>;
  if constexpr (kRow > 1) {
    if (packed && inner == 1 && length % kRow == 0)
      return launch_rows<Op, kRow, Op::kHold>(op, outer, length, stream);
    if (packed && inner > 1 && inner % kColumn == 0)
      return launch_columns<Op, kColumn, Op::kColumnHold>(op, outer, length, inner, stream);
  }
  constexpr int kOddRow = Op::kHold < 2 ? Op::kHold : 2;
  constexpr int kOddColumn = Op::kColumnHold < 2 ? Op::kColumnHold : 2;
  return inner == 1 ? launch_rows<Op, 1, kOddRow>(op, outer, length, stream)
                    : launch_columns<Op, 1, kOddColumn>(op, outer, length, inner, stream);
}

}  // namespace
}  // namespace gankern
