// y = map(x, factors(sums of x along one dimension)) on the CPU; csrc/kernels/norm.cuh is its twin.
//
// The data are dense (outer, length, inner) and the sums run along `length`. Rows (inner == 1) are
// read twice, the second time from cache. Columns (inner > 1) are taken in tiles some vectors wide;
// a tile's values are kept in scratch, because its lines lie a power of two apart and would evict
// each other from the cache.
//
// An Op says what is computed, on vectors of compute type V = Vec<Elem>:
//   Elem, kIn, kOut, kSums, kFactors; in[kIn], out[kOut]; kPivot: add() takes x relative to its
//   mean params(i, n)     what add() needs of vectors i .. i + n - 1, by lane; n == 0: of vector i
//   add(v, p, s)     adds the kIn values v to the kSums sums
//   finish(i, n, s, p, inv_length, f)  turns sums into factors; stores results of n vectors
//   map(v, f, y)     the kOut outputs
#pragma once

#include "vec.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kGrain = 8192;            // elements that a thread takes at least
constexpr int64_t kScratchBytes = 1 << 19;  // of the values of a tile: they stay in the L2 cache

// Of `count` values to add up, how many are summed apart, for less rounding: about its root.
inline int64_t block_of(int64_t count) {
  int64_t block = 32;
  while (block * block < count) block *= 2;
  return block;
}

template <typename Op, bool kPart>
GK_INLINE void load_inputs(const Op& op, int64_t i, int64_t n, Vec<typename Op::Elem>* v) {
  for (int a = 0; a < Op::kIn; a++) v[a] = kPart ? load_part(op.in[a] + i, n) : load(op.in[a] + i);
}

template <typename Op, bool kPart>
GK_INLINE void map_store(const Op& op, int64_t i, int64_t n, const Vec<typename Op::Elem>* v,
                         const Vec<typename Op::Elem>* f) {
  Vec<typename Op::Elem> y[Op::kOut];
  Op::map(v, f, y);
  for (int a = 0; a < Op::kOut; a++) {
    if constexpr (kPart)
      store_part(op.out[a] + i, y[a], n);
    else
      store(op.out[a] + i, y[a]);
  }
}

// Adds element i .. of a row to the sums of one accumulator; lanes from n on add nothing.
template <typename Op, bool kPart>
GK_INLINE void add_row(const Op& op, int64_t i, int64_t n, const typename Op::Params& p,
                       Vec<typename Op::Elem>* s) {
  using V = Vec<typename Op::Elem>;
  V v[Op::kIn];
  load_inputs<Op, kPart>(op, i, n, v);
  if constexpr (kPart) {
    V part[Op::kSums] = {};
    Op::add(v, p, part);
    for (int j = 0; j < Op::kSums; j++)
      for (int64_t k = 0; k < n; k++) s[j][k] += part[j][k];
  } else {
    Op::add(v, p, s);
  }
}

template <typename T>
GK_INLINE Vec<T> mean_of_row(const T* x, int64_t length) {
  using V = Vec<T>;
  V s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= length; i += 2 * kLanes) {
    s0 += load(x + i);
    s1 += load(x + i + kLanes);
  }
  for (; i + kLanes <= length; i += kLanes) s0 += load(x + i);
  if (i < length) s1 += load_part(x + i, length - i);
  return splat<V>(sum_lanes(s0 + s1) / static_cast<Scalar<T>>(length));
}

template <typename Op>
void run_row(const Op& op, int64_t row, int64_t length) {
  using T = typename Op::Elem;
  using V = Vec<T>;
  const int64_t base = row * length;
  typename Op::Params p = op.params(row, 0);
  if constexpr (Op::kPivot) p.pivot = mean_of_row(op.in[0] + base, length);
  V s[4][Op::kSums] = {};  // four accumulators hide the latency of an addition
  int64_t i = 0;
  const int64_t wide = 4 * kLanes, block = wide * block_of(length / wide);
  while (i + wide <= length) {
    V part[4][Op::kSums] = {};
    const int64_t stop = i + block < length ? i + block : length;
    for (; i + wide <= stop; i += wide)
      for (int u = 0; u < 4; u++) add_row<Op, false>(op, base + i + u * kLanes, 0, p, part[u]);
    for (int u = 0; u < 4; u++)
      for (int j = 0; j < Op::kSums; j++) s[u][j] += part[u][j];
  }
  for (; i + kLanes <= length; i += kLanes) add_row<Op, false>(op, base + i, 0, p, s[0]);
  if (i < length) add_row<Op, true>(op, base + i, length - i, p, s[1]);
  V total[Op::kSums], f[Op::kFactors], v[Op::kIn];
  for (int j = 0; j < Op::kSums; j++)
    total[j] = splat<V>(sum_lanes((s[0][j] + s[1][j]) + (s[2][j] + s[3][j])));
  op.finish(row, 1, total, p, Scalar<T>(1) / static_cast<Scalar<T>>(length), f);
  for (i = 0; i + kLanes <= length; i += kLanes) {
    load_inputs<Op, false>(op, base + i, 0, v);
    map_store<Op, false>(op, base + i, 0, v, f);
  }
  if (i < length) {
    load_inputs<Op, true>(op, base + i, length - i, v);
    map_store<Op, true>(op, base + i, length - i, v, f);
  }
}

// The lines of a tile lie in different pages, where the processor fetches nothing ahead by itself.
constexpr int64_t kAhead = 8;  // of 6, 8, 12, 20 and 32 lines ahead, 8 and 12 were the fastest
template <bool kWrite, int64_t kElements, typename T, int kCount>
GK_INLINE void fetch(T* const (&data)[kCount], int64_t i) {
  for (T* p : data)
    for (int64_t k = 0; k < kElements; k += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(p + i + k, kWrite);
}

// kWide neighbouring vectors of columns of one slice; kPart: one vector, of n columns.
template <typename Op, int kWide, bool kPart>
void run_tile(const Op& op, int64_t base, int64_t vector, int64_t length, int64_t inner, int64_t n,
              Scalar<typename Op::Elem>* kept) {
  using T = typename Op::Elem;
  using V = Vec<T>;
  constexpr int64_t kStep = kWide * Op::kIn * kLanes;  // scratch has no vector's alignment: memcpy
  typename Op::Params p[kWide];
  for (int u = 0; u < kWide; u++) p[u] = op.params(vector + u * kLanes, n);
  V s[kWide][Op::kSums] = {};
  const auto read = [&](int64_t c, V(*v)[Op::kIn]) {
    for (int u = 0; u < kWide; u++)
      load_inputs<Op, kPart>(op, base + c * inner + u * kLanes, n, v[u]);
  };
  if constexpr (Op::kPivot) {
    V mean[kWide] = {};
    for (int64_t c = 0; c < length; c++)
      for (int u = 0; u < kWide; u++) {
        const T* x = op.in[0] + base + c * inner + u * kLanes;
        const V v = kPart ? load_part(x, n) : load(x);
        mean[u] += v;
        if (kept) store(kept + c * kStep + u * kLanes, v);
      }
    for (int u = 0; u < kWide; u++) p[u].pivot = mean[u] / static_cast<Scalar<T>>(length);
  }
  for (int64_t c = 0, block = block_of(length); c < length;) {
    V part[kWide][Op::kSums] = {};
    const int64_t stop = c + block < length ? c + block : length;
    for (; c < stop; c++) {
      V v[kWide][Op::kIn];
      if (Op::kPivot && kept)
        memcpy(v, kept + c * kStep, sizeof v);
      else
        read(c, v);
      if (c + kAhead < length) fetch<false, kWide * kLanes>(op.in, base + (c + kAhead) * inner);
      for (int u = 0; u < kWide; u++) Op::add(v[u], p[u], part[u]);
      if (!Op::kPivot && kept) memcpy(kept + c * kStep, v, sizeof v);
    }
    for (int u = 0; u < kWide; u++)
      for (int j = 0; j < Op::kSums; j++) s[u][j] += part[u][j];
  }
  V f[kWide][Op::kFactors];
  for (int u = 0; u < kWide; u++)
    op.finish(vector + u * kLanes, n, s[u], p[u], Scalar<T>(1) / static_cast<Scalar<T>>(length),
              f[u]);
  for (int64_t c = 0; c < length; c++) {
    V v[kWide][Op::kIn];
    if (kept)
      memcpy(v, kept + c * kStep, sizeof v);
    else
      read(c, v);
    if (c + kAhead < length) fetch<true, kWide * kLanes>(op.out, base + (c + kAhead) * inner);
    for (int u = 0; u < kWide; u++)
      map_store<Op, kPart>(op, base + c * inner + u * kLanes, n, v[u], f[u]);
  }
}

template <typename Op>
void run_columns(const Op& op, int64_t outer, int64_t length, int64_t inner) {
  using V = Vec<typename Op::Elem>;
  constexpr int kWide = Op::kSums > 2 ? 2 : Op::kSums > 1 ? 4 : 8;
  constexpr int64_t kColumns = kWide * kLanes;
  const int64_t tiles = (inner + kColumns - 1) / kColumns;
  const bool keep = length * kWide * Op::kIn * static_cast<int64_t>(sizeof(V)) <= kScratchBytes;
  parallel(outer * tiles, kGrain / (length * kColumns), [&](int64_t begin, int64_t end) {
    Buffer<Scalar<typename Op::Elem>> scratch(keep ? length * kWide * Op::kIn * kLanes : 0);
    auto* kept = keep ? &scratch[0] : nullptr;
    for (int64_t t = begin; t < end; t++) {
      const int64_t slice = t / tiles, first = t % tiles * kColumns;
      const int64_t base = slice * length * inner, vector = slice * inner;
      if (first + kColumns <= inner) {
        run_tile<Op, kWide, false>(op, base + first, vector + first, length, inner, kLanes, kept);
        continue;
      }
      int64_t i = first;
      for (; i + kLanes <= inner; i += kLanes)
        run_tile<Op, 1, false>(op, base + i, vector + i, length, inner, kLanes, kept);
      if (i < inner)
        run_tile<Op, 1, true>(op, base + i, vector + i, length, inner, inner - i, kept);
    }
  });
}

template <typename Op>
int run_norm(const Op& op, int64_t outer, int64_t length, int64_t inner) {
  if (outer * length * inner == 0) return 0;
  if (inner == 1)
    parallel(outer, kGrain / length, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) run_row(op, row, length);
    });
  else
    run_columns(op, outer, length, inner);
  return 0;
}

}  // namespace
}  // namespace gankern::cpu::GANKERN_ISA
