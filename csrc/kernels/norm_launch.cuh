// Launches the kernels of norm.cuh: which of them, how many threads a vector, what is kept where.
#pragma once

#include "norm_group.cuh"

namespace gankern {
namespace {

template <typename Kernel>
int allow_shared(Kernel kernel, int bytes) {
  if (bytes <= 48 * 1024) return 0;
  return static_cast<int>(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Packs of each input that a thread keeps in shared memory, when `left` of them, `step` apart, do
// not fit into registers. `used` bytes are taken.
template <typename Op, int N>
int keep(int64_t left, int step, int threads, int used) {
  if (!Op::kShared || left <= 0) return 0;
  int device = 0, most = 48 * 1024;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int bytes = Op::kIn * threads * N * static_cast<int>(sizeof(typename Op::Elem));
  return static_cast<int>(
      min(ceil_div(left, step), static_cast<int64_t>((most - used - 1024) / bytes)));
}

// Packs a thread: little work goes to as many threads as there are packs, much to fewer.
inline int packs_each(int64_t packs, int most) {
  const int64_t busy = static_cast<int64_t>(sm_count()) * kMaxThreads;
  return static_cast<int>(max(int64_t(1), min(static_cast<int64_t>(most), packs / busy)));
}

// Chooses kernel, packs and threads, and launches. Pointers that are not 16-byte aligned, and rows
// or columns that are not whole packs, go element by element.
template <typename Op, int N, int K>
int launch_rows(const Op& op, int64_t rows, int64_t length, void* stream) {
  const int64_t packs = ceil_div(length, N);
  // At least 8 neighbouring threads a row, for whole cache lines.
  int group = pow2_between(ceil_div(packs, packs_each(rows * packs, K)), 1, kMaxThreads);
  group = max(group, pow2_between(packs, 1, 8));
  int threads = max(group, 256);
  while (threads > max(group, 32) && ceil_div(rows * group, threads) < sm_count()) threads /= 2;
  const int kept = keep<Op, N>(packs - static_cast<int64_t>(K) * group, group, threads, 0);
  const int shared = kept * Op::kIn * threads * N * static_cast<int>(sizeof(typename Op::Elem));
  if (const int error = allow_shared((rows_kernel<Op, N, K>), shared)) return error;
  GK_LAUNCH((rows_kernel<Op, N, K>), dim3(ceil_div(rows * group, threads)), dim3(threads), shared,
            stream, op, rows, length, log2_of(group), kept);
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
  const int kept = keep<Op, N>(length - static_cast<int64_t>(K) * ty, ty, tx * ty, sums);
  const int shared =
      sums + kept * Op::kIn * tx * ty * N * static_cast<int>(sizeof(typename Op::Elem));
  if (const int error = allow_shared((columns_kernel<Op, N, K>), shared)) return error;
  GK_LAUNCH((columns_kernel<Op, N, K>), dim3(ceil_div(packs, tx), slices, ceil_div(outer, slices)),
            dim3(tx * ty), shared, stream, op, outer, length, inner, log2_of(tx), kept);
  return static_cast<int>(cudaGetLastError());
}

// Elements of a pack of a row, and of columns; float64, which is for gradient checks, has no packs.
template <typename Op>
constexpr int kRowPack = sizeof(typename Op::Elem) == 8 ? 1 : 16 / sizeof(typename Op::Elem);
template <typename Op>
constexpr int kColumnPack = kRowPack<Op> == 1 ? 1 : Op::kColumnBytes / sizeof(typename Op::Elem);

// Packs of each input that a thread of a group keeps; two inputs of 16 bits are many values at
// once.
template <typename Op>
constexpr int kGroupHold = sizeof(typename Op::Elem) == 2 && Op::kIn > 1 ? 3 : Op::kColumnHold;

// How groups of blocks share vectors; parts == 0 where one block keeps them, or no group can.
// V, length and inner as group_kernel takes them.
template <typename Op, int N, int K, int V>
class Group {
  using A = Acc<typename Op::Elem>;
  static constexpr int kStep = Op::kIn * kGroupThreads * N * sizeof(typename Op::Elem);
  static constexpr int kStats = Op::kSums + Op::kPivot;

 public:
  Group(int64_t outer, int64_t length, int64_t inner)
      : length_(length), inner_(inner), outer_(outer) {
    const int sector = max(1, 32 / static_cast<int>(N * sizeof(typename Op::Elem)));
    const int tx = pow2_between(ceil_div(inner, N), 1, sector);
    vectors_ = V * tx;
    log_tx_ = log2_of(tx);
    columns_ = ceil_div(inner, tx * N);
    const int lines = kGroupThreads / 32;
    scratch_ = 16 + vectors_ * static_cast<int>(sizeof(typename Op::Params) +
                                                (lines * Op::kSums + Op::kFactors) * sizeof(A));
    const int64_t alone = ceil_div(length, kMaxThreads / tx);  // steps of a block that is alone
    if (K + keep<Op, N>(alone - K, 1, kMaxThreads, 2 * scratch_) >= alone) return;
    const int64_t all = ceil_div(length, kGroupThreads / tx);
    steps_ = K + static_cast<int>(max(0, (half_shared() - scratch_) / kStep));
    steps_ = max(K, static_cast<int>(ceil_div(all, ceil_div(all, steps_))));  // parts of one size
    const int64_t parts = ceil_div(all, steps_);
    // A thread sums a part; and what waits longer than one round of blocks would better read twice.
    const bool fits = parts <= min(kGroupThreads / tx, 2 * sm_count());
    if (fits && outer <= 65535 && columns_ <= 65535) parts_ = static_cast<int>(parts);
  }
  int parts() const { return parts_; }
  int64_t bytes() const {
    return sums() * static_cast<int64_t>(sizeof(A)) + tickets() * static_cast<int64_t>(sizeof(int));
  }
  int launch(const Op& op, void* workspace, void* stream) const {
    A* const partial = static_cast<A*>(workspace);
    int* const claims = reinterpret_cast<int*>(partial + sums());
    const Exchange<A> exchange{partial, claims, claims + outer_ * columns_ * parts_};
    const int shared = scratch_ + (steps_ - K) * kStep;
    if (const int error = allow_shared((group_kernel<Op, N, K, V>), shared)) return error;
    // Room for two blocks, where the driver would leave more of it to the cache.
    if (const cudaError_t error = cudaFuncSetAttribute(
            (group_kernel<Op, N, K, V>), cudaFuncAttributePreferredSharedMemoryCarveout,
            cudaSharedmemCarveoutMaxShared))
      return static_cast<int>(error);
    if (const cudaError_t error =
            cudaMemsetAsync(claims, 0, tickets() * sizeof(int), static_cast<cudaStream_t>(stream)))
      return static_cast<int>(error);
    GK_LAUNCH((group_kernel<Op, N, K, V>), dim3(parts_, columns_, outer_), dim3(kGroupThreads),
              shared, stream, op, length_, inner_, log_tx_, steps_, exchange);
    return static_cast<int>(cudaGetLastError());
  }

 private:
  int64_t sums() const { return outer_ * columns_ * parts_ * kStats * vectors_; }
  int64_t tickets() const { return outer_ * columns_ * (parts_ + 1); }
  // Of two blocks of a multiprocessor, less what the system takes.
  static int half_shared() {
    int device = 0, all = 64 * 1024;
    if (cudaGetDevice(&device) == cudaSuccess)
      cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    return all / 2 - 1024;
  }

  int64_t length_, inner_, outer_, columns_;
  int parts_ = 0, steps_ = 0, log_tx_, vectors_, scratch_;
};

// f(group) where the data have whole packs, else 0.
template <typename Op, typename F>
int64_t with_group(int64_t outer, int64_t length, int64_t inner, F f) {
  constexpr int kRow = kRowPack<Op>, kColumn = kColumnPack<Op>;
  if constexpr (Op::kShared && kRow > 1) {
    if (inner == 1 && length % kRow == 0)
      return f(Group<Op, kRow, kGroupHold<Op>, 1>(outer, length / kRow, kRow));
    if (inner > 1 && inner % kColumn == 0)
      return f(Group<Op, kColumn, kGroupHold<Op>, kColumn>(outer, length, inner));
  }
  return 0;
}

// Bytes of the workspace that launch_norm() takes.
template <typename Op>
int64_t norm_workspace(int64_t outer, int64_t length, int64_t inner) {
  if (outer * length * inner == 0) return 0;
  return with_group<Op>(outer, length, inner,
                        [](auto group) { return group.parts() ? group.bytes() : int64_t(0); });
}

// workspace: null, or norm_workspace() bytes.
template <typename Op>
int launch_norm(const Op& op, int64_t outer, int64_t length, int64_t inner, void* workspace,
                void* stream) {
  if (outer * length * inner == 0) return 0;
  bool packed = true;
  for (int a = 0; a < Op::kIn; a++) packed = packed && aligned16(op.in[a]);
  for (int a = 0; a < Op::kOut; a++) packed = packed && aligned16(op.out[a]);
  constexpr int kRow = kRowPack<Op>, kColumn = kColumnPack<Op>;
  if constexpr (kRow > 1) {
    if (packed && workspace)
      return static_cast<int>(with_group<Op>(
          outer, length, inner, [&](auto group) { return group.launch(op, workspace, stream); }));
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
