// minibatch_stddev: y is x with the groups' standard deviations appended as channels; its gradient.
//
// Sample n belongs to group n mod M. In memory a sample of x is [rows][F][L] and one of y the same
// with the statistics in between: rows is 1 and L = C / F * P pixels in NCHW, rows is P and L = C /
// F in channels-last. A warp takes a segment of 32 packs, the same one of every sample of a group:
// it copies it and adds up the deviations. The block that ends last in its group adds the partial
// sums in order and writes the group's statistic, so that x is read once and one launch does it
// all.
//
// Where y's rows begin anywhere, as those of C + 1 channels do, a block takes a flat span of x,
// over however many rows, and the one of y that it becomes, in which a statistic follows each row.
// y's passes through shared memory, between where x's elements lie and packs that begin at a
// sector. What the forward writes in the statistics' places is written over by the last block.
//
// The gradient needs the sum of dy over the group's statistic, G * P numbers, which each block adds
// up itself: dx = dy + (x - mean) / (G std) * Σ dy_statistic / (L rows).
#include "common.cuh"

namespace gankern {
namespace {

constexpr int kHold = 4;  // samples whose packs a thread has in registers at a time
// Warps of a block: of one that shares a group with others, of one that has it alone, of flat
// spans.
constexpr int kRowWarps = 4, kMaxWarps = 32, kMaxFlatWarps = 16;
// Warps of a block. Flat spans are 4 KiB of a sample at most, 4 elements a thread.
template <typename T, bool kFlat>
constexpr int kMostWarps = kFlat ? 32 / static_cast<int>(sizeof(T)) : kMaxWarps;
constexpr double kEps = 1e-8;

__device__ __forceinline__ float sqrt_(float v) { return sqrtf(v); }
__device__ __forceinline__ double sqrt_(double v) { return sqrt(v); }
__device__ __forceinline__ float rsqrt_(float v) { return rsqrtf(v); }
__device__ __forceinline__ double rsqrt_(double v) { return rsqrt(v); }

struct Layout {
  int64_t x_sample, y_sample;  // elements from one sample to the next
  int64_t x_step, y_step;      // from one sample to the next of its group
  int64_t x_row, y_row;        // from one row to the next
  int64_t L, rows, pixels;
  int64_t plane_f, plane_p;  // from one statistic or pixel of it to the next in y
  int M, F;                  // groups of samples, statistics
  int most, larger;          // samples of a group: so many, one less from group `larger` on
  int segments;              // of a row
  int chunks;                // blocks of a group
  // A warp advances by step_rows * segments + step_rest segments, a flat block by step_rows * L +
  // step_rest elements.
  int step_rows, step_rest;
  unsigned reciprocal;  // of L, in 2**-32; 0: rows are longer than a flat span
};

// A block's place: group m, statistic f, chunk, and the samples m, m + M, ... that it holds.
struct Place {
  int group, chunk, m, f, size;
  __device__ explicit Place(const Layout& a) {
    group = blockIdx.x;
    chunk = blockIdx.y;
    m = a.F == 1 ? group : group / a.F;
    f = group - m * a.F;
    size = a.most - (m >= a.larger);
  }
};

// The sum over a block, in every thread. Between two of them there must be a barrier.
template <typename A>
__device__ __forceinline__ A block_sum(A v) {
  __shared__ A sums[kMaxWarps];
  const int lane = threadIdx.x % 32;
  v = warp_sum(v);
  if (lane == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_sum(lane < static_cast<int>(blockDim.x) / 32 ? sums[lane] : A(0));
}

// A warp's segments.
struct Segment {
  int64_t row;
  int segment;
  __device__ Segment(const Layout& a, int chunk) {
    const int first = chunk * (blockDim.x / 32) + threadIdx.x / 32;
    row = a.rows == 1 ? first >= a.segments : first / a.segments;
    segment = first - static_cast<int>(row) * a.segments;
  }
  __device__ void advance(const Layout& a) {
    row += a.step_rows;
    segment += a.step_rest;
    if (segment >= a.segments) segment -= a.segments, row++;
  }
};

// A block's span of `count` elements from element u of x's [rows][L] on.
struct Span {
  int64_t u, row, rest;  // rest: elements before u in its row
  int count;
  __device__ Span(const Layout& a, int chunk) {
    u = static_cast<int64_t>(chunk) * blockDim.x * 4;
    row = u / a.L;
    rest = u - row * a.L;
    limit(a);
  }
  __device__ void limit(const Layout& a) {
    count = static_cast<int>(min(a.rows * a.L - u, static_cast<int64_t>(blockDim.x) * 4));
  }
  __device__ void advance(const Layout& a) {
    u += static_cast<int64_t>(a.chunks) * blockDim.x * 4;
    row += a.step_rows;
    rest += a.step_rest;
    if (rest >= a.L) rest -= a.L, row++;
    limit(a);
  }
  // Rows that end between u and element u + i.
  __device__ __forceinline__ int ends(const Layout& a, int i) const {
    if (a.reciprocal) return __umulhi(static_cast<unsigned>(rest) + i, a.reciprocal);
    return rest + i >= a.L;
  }
};

// Where y's elements p .. p + size of one sample lie in shared memory: from the beginning of p's
// sector on, the words of a pack exchanged in such a way that a warp's packs conflict in no bank,
// word by word at aligned places nor element by element at any. Positions count elements from that
// sector on.
template <typename T>
struct Flat {
  static constexpr int kSector = 32 / sizeof(T), kWord = 4 / sizeof(T);
  // Elements of a sample: rows of 4 have the most statistics between them.
  static constexpr int kSize = kSector + 5 * 32 * kMostWarps<T, true>;

  int before, begin, end, last;  // positions: p, the whole packs, their end, the end
  __device__ __forceinline__ Flat(const T* p, int size) {
    before = static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kSector);
    begin = before ? kSector : 0;
    last = before + size;
    end = max(begin, min(last / kSector * kSector, begin + static_cast<int>(blockDim.x) * 4));
  }
  // Of this thread's pack; negative if it has none.
  __device__ __forceinline__ int pack() const {
    const int i = begin + static_cast<int>(threadIdx.x) * 4;
    return i < end ? i : -1;
  }
  // Where position i of sample k is kept.
  static __device__ __forceinline__ int in(int k, int i) {
    return k * kSize + (i ^ (i / (32 * kWord) % (4 / kWord) * kWord));
  }
  static __device__ __forceinline__ Pack<T, 4> get(const T* stage, int k, int i) {
    Pack<T, 4> v;
#pragma unroll
    for (int j = 0; j < 4; j += kWord) {
      const Pack<T, kWord> word = load_pack<T, kWord>(stage + (in(k, i) ^ j));
#pragma unroll
      for (int l = 0; l < kWord; l++) v.v[j + l] = word.v[l];
    }
    return v;
  }
  static __device__ __forceinline__ void put(T* stage, int k, int i, const Pack<T, 4>& v) {
#pragma unroll
    for (int j = 0; j < 4; j += kWord) {
      Pack<T, kWord> word;
#pragma unroll
      for (int l = 0; l < kWord; l++) word.v[l] = v.v[j + l];
      store_pack<T, kWord>(stage + (in(k, i) ^ j), word);
    }
  }
  // f(element of y, where it is kept) of those beside the packs; a warp has those of one sample.
  template <int kBatch, typename P, typename F>
  static __device__ __forceinline__ void edges(P* p, int64_t step, int size, int samples, F f) {
    const int warp = threadIdx.x / 32, k = warp % kBatch, all = blockDim.x / kBatch;
    if (k >= samples) return;
    p += k * step;
    const Flat flat(p, size);
    for (int i = warp / kBatch * 32 + threadIdx.x % 32;; i += all) {
      const int at = flat.before + i < flat.begin ? flat.before + i
                                                  : flat.end + i - (flat.begin - flat.before);
      if (at >= flat.last) return;
      f(p + (at - flat.before), in(k, at));
    }
  }
};

template <typename A>
struct Deviation {
  A origin, mean;  // the mean is that of x - origin, which loses nothing to rounding
  A var;           // with epsilon
};

template <typename A>
__device__ __forceinline__ A with_eps(A var) {
  return (var < A(0) ? A(0) : var) + A(kEps);
}

template <typename T, int N, int K>
__device__ __forceinline__ void widen_all(const Pack<T, N> (&packs)[K], Format<T> format,
                                          Acc<T> (&out)[K][N]) {
#pragma unroll
  for (int k = 0; k < K; k++) widen(packs[k], format, out[k]);
}

// Over element j of the first `size` held packs.
template <typename A, int N>
__device__ __forceinline__ Deviation<A> deviation(const A (&held)[kHold][N], int j, int size,
                                                  A inv_size) {
  const A origin = held[0][j];
  A mean = A(0), var = A(0);
#pragma unroll
  for (int k = 1; k < kHold; k++) mean += k < size ? held[k][j] - origin : A(0);
  mean *= inv_size;
#pragma unroll
  for (int k = 0; k < kHold; k++) {
    const A d = k < size ? (held[k][j] - origin) - mean : A(0);
    var += d * d;
  }
  return {origin, mean, with_eps(var * inv_size)};
}

// Sums of d and d² of one pack, d = x - the first sample: no cancellation, whatever the mean.
template <typename T, int N>
struct Moments {
  using A = Acc<T>;
  Format<T> format;
  A origin[N], sum[N] = {}, square[N] = {};
  __device__ Moments(const Pack<T, N>& first, Format<T> format) : format(format) {
    widen(first, format, origin);
  }
  __device__ void add(const Pack<T, N>& pack) {
    A x[N];
    widen(pack, format, x);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const A d = x[j] - origin[j];
      sum[j] += d;
      square[j] += d * d;
    }
  }
  __device__ Deviation<A> deviation(int j, A inv_size) const {
    const A d = sum[j] * inv_size;
    return {origin[j], d, with_eps(square[j] * inv_size - d * d)};
  }
};

// dx of a pack of one sample. factors: of each element, in the place of the variance.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> differentiate(const Pack<T, N>& dy, const Pack<T, N>& x,
                                                    const Deviation<Acc<T>> (&factors)[N],
                                                    Format<T> format) {
  Acc<T> grad[N], v[N];
  widen(dy, format, grad);
  widen(x, format, v);
#pragma unroll
  for (int j = 0; j < N; j++)
    grad[j] += factors[j].var * ((v[j] - factors[j].origin) - factors[j].mean);
  return narrow<T, N>(grad, format);
}

// Copies a block's share of its group to y; returns this thread's sum of deviations.
template <typename T, int N, bool kSmall>
__device__ __forceinline__ Acc<T> copy_rows(const T* x, T* y, const Layout& a, const Place& at,
                                            Format<T> format) {
  using A = Acc<T>;
  constexpr int kSegment = 32 * N;
  const int lane = threadIdx.x % 32;
  const A inv_size = A(1) / A(at.size);
  const T* x_group = x + at.m * a.x_sample + at.f * a.L + lane * N;
  T* y_group = y + at.m * a.y_sample + at.f * a.L + lane * N;
  A total = A(0);
  for (Segment place(a, at.chunk); place.row < a.rows; place.advance(a)) {
    const int64_t row = place.row, begin = static_cast<int64_t>(place.segment) * kSegment;
    const int count = static_cast<int>(min(a.L - begin, static_cast<int64_t>(kSegment)));
    const bool inside = lane * N < count;
    const T* from = x_group + row * a.x_row + begin;
    int64_t to = row * a.y_row + begin;
    const auto copy = [&](int k, const Pack<T, N>& v) {
      if (inside) store_whole<T, N>(y_group + to + k * a.y_step, v);
    };
    if constexpr (kSmall) {
      Pack<T, N> held[kHold] = {};
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (inside && k < at.size) held[k] = load_pack<T, N>(from + k * a.x_step);
      forget(to);
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (k < at.size) copy(k, held[k]);
      A v[kHold][N];
      widen_all(held, format, v);
      if (inside)
#pragma unroll
        for (int j = 0; j < N; j++) total += sqrt_(deviation(v, j, at.size, inv_size).var);
    } else {
      Moments<T, N> moments(inside ? load_pack<T, N>(from) : Pack<T, N>{}, format);
#pragma unroll 2
      for (int k = 0; k < at.size; k++) {
        const Pack<T, N> v = inside ? load_pack<T, N>(from + k * a.x_step) : Pack<T, N>{};
        moments.add(v);
        copy(k, v);
      }
      if (inside)
#pragma unroll
        for (int j = 0; j < N; j++) total += sqrt_(moments.deviation(j, inv_size).var);
    }
  }
  return total;
}

// The same by flat spans. stage: [kHold][Flat::kSize].
template <typename T, bool kSmall>
__device__ __forceinline__ Acc<T> copy_flat(const T* x, T* y, const Layout& a, const Place& at,
                                            Format<T> format, T* stage) {
  using A = Acc<T>;
  constexpr int kBatch = kSmall ? kHold : 2;
  const A inv_size = A(1) / A(at.size);
  const int mine = threadIdx.x * 4;
  const T* x_group = x + at.m * a.x_sample + at.f * a.L + mine;
  T* y_group = y + at.m * a.y_sample + at.f * a.L;
  A total = A(0);
  for (Span span(a, at.chunk); span.count > 0; span.advance(a)) {
    const bool inside = mine < span.count;
    const int ended = span.ends(a, mine), size = span.count + span.ends(a, span.count - 1);
    Moments<T, 4> moments(inside && !kSmall ? load_pack<T, 4>(x_group + span.u) : Pack<T, 4>{},
                          format);
    for (int k0 = 0; k0 < (kSmall ? 1 : at.size); k0 += kBatch) {
      const T* from = x_group + span.u + k0 * a.x_step;
      T* to = y_group + span.u + span.row + k0 * a.y_step;
      Pack<T, 4> held[kBatch] = {};
#pragma unroll
      for (int k = 0; k < kBatch; k++)
        if (inside && k0 + k < at.size) held[k] = load_pack<T, 4>(from + k * a.x_step);
      __syncthreads();  // the samples before these have been written
      if (inside) {
#pragma unroll
        for (int k = 0; k < kBatch; k++) {
          if (k0 + k >= at.size) continue;
          const int at_y = Flat<T>(to + k * a.y_step, size).before + mine + ended;
#pragma unroll
          for (int j = 0; j < 4; j++) stage[Flat<T>::in(k, at_y + j)] = held[k].v[j];
          if (span.ends(a, mine + 4) > ended) stage[Flat<T>::in(k, at_y + 4)] = T{};
          if (!kSmall) moments.add(held[k]);
        }
        if constexpr (kSmall) {
          A v[kHold][4];
          widen_all(held, format, v);
#pragma unroll
          for (int j = 0; j < 4; j++) total += sqrt_(deviation(v, j, at.size, inv_size).var);
        }
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        if (k0 + k >= at.size) continue;
        T* p = to + k * a.y_step;
        const Flat<T> flat(p, size);
        const int i = flat.pack();
        if (i >= 0) store_whole<T, 4>(p + (i - flat.before), Flat<T>::get(stage, k, i));
      }
      Flat<T>::template edges<kBatch>(to, a.y_step, size, at.size - k0,
                                      [&](T* p, int i) { *p = stage[i]; });
    }
    if (!kSmall && inside)
#pragma unroll
      for (int j = 0; j < 4; j++) total += sqrt_(moments.deviation(j, inv_size).var);
  }
  return total;
}

// Whether the statistic of a sample is whole packs of N, aligned as y is.
template <int N>
__device__ __forceinline__ bool in_packs(const Layout& a) {
  return N > 1 && a.plane_p == 1 && a.pixels % N == 0;
}

template <typename T, int N, bool kFlat, bool kSmall>
__global__ void __launch_bounds__(32 * kMostWarps<T, kFlat>, 32 / kMostWarps<T, kFlat>)
    minibatch_stddev_fwd_kernel(const T* x, T* y, Layout a, Format<T> format, Acc<T>* partials,
                                int* tickets) {
  using A = Acc<T>;
  const Place at(a);
  A total;
  if constexpr (kFlat) {
    __shared__ __align__(16) unsigned char stage[(kSmall ? kHold : 2) * Flat<T>::kSize * sizeof(T)];
    total = copy_flat<T, kSmall>(x, y, a, at, format, reinterpret_cast<T*>(stage));
  } else {
    total = copy_rows<T, N, kSmall>(x, y, a, at, format);
  }
  total = block_sum(total);
  if (a.chunks > 1) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
      partials[at.group * a.chunks + at.chunk] = total;
      __threadfence();
      last = atomicAdd(tickets + at.group, 1) == a.chunks - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    total = A(0);
    for (int i = threadIdx.x; i < a.chunks; i += blockDim.x)
      total += partials[at.group * a.chunks + i];
    total = block_sum(total);
  }
  const T value = from_acc<T>(total / (A(a.L) * A(a.rows)), format);
  T* plane = y + at.m * a.y_sample + a.F * a.L + at.f * a.plane_f;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; j++) pack.v[j] = value;
  const bool whole = in_packs<N>(a);
#pragma unroll 1
  for (int k = warp; k < at.size; k += warps) {
    T* to = plane + k * a.y_step;
    if (whole) {
#pragma unroll 1
      for (int64_t p = lane * N; p < a.pixels; p += 32 * N) store_whole<T, N>(to + p, pack);
      continue;
    }
#pragma unroll 1
    for (int64_t p = lane; p < a.pixels; p += 32) to[p * a.plane_p] = value;
  }
}

// This thread's part of Σ dy over the group's statistic, at `plane` of its first sample: a thread
// takes a sample of four, neighbours take others; packs are under way four at a time, numbers two.
template <typename T, int N>
__device__ __forceinline__ Acc<T> sum_planes(const T* plane, const Layout& a, const Place& at,
                                             Format<T> format) {
  constexpr int kAhead = N > 1 ? 4 : 2, kUnroll = N > 1 ? 1 : 4;  // neither spills registers
  Acc<T> sum = Acc<T>(0);
  const int step = blockDim.x / kHold * N;
  for (int k = threadIdx.x % kHold; k < at.size; k += kHold) {
    const T* of_sample = plane + k * a.y_step;
#pragma unroll kUnroll
    for (int64_t p = threadIdx.x / kHold * N; p < a.pixels; p += kAhead * step) {
      Pack<T, N> packs[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; i++)
        packs[i] = p + i * step < a.pixels ? load_pack<T, N>(of_sample + (p + i * step) * a.plane_p)
                                           : Pack<T, N>{};
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        Acc<T> v[N];
        widen(packs[i], format, v);
#pragma unroll
        for (int j = 0; j < N; j++) sum += v[j];
      }
    }
  }
  return sum;
}

// Σ dy over the group's statistic, over what it is divided by.
template <typename T, int N>
__device__ __forceinline__ Acc<T> slope_of(const T* dy, const Layout& a, const Place& at,
                                           Format<T> format, Acc<T> inv_size) {
  using A = Acc<T>;
  const T* plane = dy + at.m * a.y_sample + a.F * a.L + at.f * a.plane_f;
  const A sum = in_packs<N>(a) ? sum_planes<T, N>(plane, a, at, format)
                               : sum_planes<T, 1>(plane, a, at, format);
  return block_sum(sum) * inv_size / (A(a.L) * A(a.rows));
}

template <typename T, int N, bool kSmall>
__device__ __forceinline__ void differentiate_rows(const T* dy, const T* x, T* dx, const Layout& a,
                                                   const Place& at, Format<T> format) {
  using A = Acc<T>;
  constexpr int kSegment = 32 * N;
  const int lane = threadIdx.x % 32;
  const A inv_size = A(1) / A(at.size);
  const A slope = slope_of<T, N>(dy, a, at, format, inv_size);
  for (Segment place(a, at.chunk); place.row < a.rows; place.advance(a)) {
    const int64_t begin = static_cast<int64_t>(place.segment) * kSegment + lane * N;
    const bool inside = begin < a.L;
    int64_t from = at.m * a.x_sample + at.f * a.L + place.row * a.x_row + begin;
    const T* dy_from = dy + at.m * a.y_sample + at.f * a.L + place.row * a.y_row + begin;
    const auto gradient = [&](int k) {
      return inside ? load_pack<T, N>(dy_from + k * a.y_step) : Pack<T, N>{};
    };
    Deviation<A> factors[N];
    if constexpr (kSmall) {
      Pack<T, N> held[kHold] = {}, grad[kHold] = {};
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (inside && k < at.size) held[k] = load_pack<T, N>(x + from + k * a.x_step);
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (k < at.size) grad[k] = gradient(k);
      A v[kHold][N];
      widen_all(held, format, v);
#pragma unroll
      for (int j = 0; j < N; j++) {
        factors[j] = deviation(v, j, at.size, inv_size);
        factors[j].var = slope * rsqrt_(factors[j].var);
      }
#pragma unroll
      for (int k = 0; k < kHold; k++) grad[k] = differentiate(grad[k], held[k], factors, format);
      forget(from);
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (inside && k < at.size) store_whole<T, N>(dx + from + k * a.x_step, grad[k]);
    } else {
      // More samples than registers hold: x is read again, from cache.
      Moments<T, N> moments(inside ? load_pack<T, N>(x + from) : Pack<T, N>{}, format);
#pragma unroll 2
      for (int k = 0; k < at.size; k++)
        if (inside) moments.add(load_pack<T, N>(x + from + k * a.x_step));
#pragma unroll
      for (int j = 0; j < N; j++) {
        factors[j] = moments.deviation(j, inv_size);
        factors[j].var = slope * rsqrt_(factors[j].var);
      }
#pragma unroll 2
      for (int k = 0; k < at.size; k++) {
        const Pack<T, N> grad = gradient(k);
        if (!inside) continue;
        const Pack<T, N> v = load_pack<T, N>(x + from + k * a.x_step);
        store_whole<T, N>(dx + from + k * a.x_step, differentiate(grad, v, factors, format));
      }
    }
  }
}

// The same by flat spans. stage: [kHold][Flat::kSize].
template <typename T, bool kSmall>
__device__ __forceinline__ void differentiate_flat(const T* dy, const T* x, T* dx, const Layout& a,
                                                   const Place& at, Format<T> format, T* stage) {
  using A = Acc<T>;
  constexpr int kBatch = kSmall ? kHold : 2;
  const A inv_size = A(1) / A(at.size);
  const A slope = slope_of<T, 1>(dy, a, at, format, inv_size);
  int mine = threadIdx.x * 4;
  forget(mine);
  const int64_t x_first = at.m * a.x_sample + at.f * a.L + mine;
  for (Span span(a, at.chunk); span.count > 0; span.advance(a)) {
    const bool inside = mine < span.count;
    const int ended = span.ends(a, mine), size = span.count + span.ends(a, span.count - 1);
    const T* first = x + x_first + span.u;
    Moments<T, 4> moments(inside && !kSmall ? load_pack<T, 4>(first) : Pack<T, 4>{}, format);
    if constexpr (!kSmall)
#pragma unroll 2
      for (int k = 0; k < at.size; k++)
        if (inside) moments.add(load_pack<T, 4>(first + k * a.x_step));
    for (int k0 = 0; k0 < (kSmall ? 1 : at.size); k0 += kBatch) {
      const T* from = dy + at.m * a.y_sample + at.f * a.L + span.u + span.row + k0 * a.y_step;
      Pack<T, 4> taken[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const T* p = from + k * a.y_step;
        const Flat<T> flat(p, size);
        const int i = flat.pack();
        if (k0 + k < at.size && i >= 0) taken[k] = load_pack<T, 4>(p + (i - flat.before));
      }
      __syncthreads();  // the samples before these have been read
      Flat<T>::template edges<kBatch>(from, a.y_step, size, at.size - k0,
                                      [&](const T* p, int i) { stage[i] = *p; });
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const int i = Flat<T>(from + k * a.y_step, size).pack();
        if (k0 + k < at.size && i >= 0) Flat<T>::put(stage, k, i, taken[k]);
      }
      int64_t here = x_first + span.u + k0 * a.x_step;
      Pack<T, 4> held[kBatch] = {};
#pragma unroll
      for (int k = 0; k < kBatch; k++)
        if (inside && k0 + k < at.size) held[k] = load_pack<T, 4>(x + here + k * a.x_step);
      __syncthreads();
      if (!inside) continue;
      int own[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; k++)
        own[k] = Flat<T>(from + k * a.y_step, size).before + mine + ended;
      A v[kBatch][4];
      widen_all(held, format, v);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        Deviation<A> d;
        if constexpr (kSmall)
          d = deviation(v, j, at.size, inv_size);
        else
          d = moments.deviation(j, inv_size);
        const A factor = slope * rsqrt_(d.var);
#pragma unroll
        for (int k = 0; k < kBatch; k++)
          if (k0 + k < at.size)
            v[k][j] = to_acc(stage[Flat<T>::in(k, own[k] + j)], format) +
                      factor * ((v[k][j] - d.origin) - d.mean);
      }
      forget(here);
#pragma unroll
      for (int k = 0; k < kBatch; k++)
        if (k0 + k < at.size)
          store_whole<T, 4>(dx + here + k * a.x_step, narrow<T, 4>(v[k], format));
    }
  }
}

template <typename T, int N, bool kFlat, bool kSmall>
__global__ void __launch_bounds__(32 * kMostWarps<T, kFlat>, 32 / kMostWarps<T, kFlat>)
    minibatch_stddev_bwd_kernel(const T* dy, const T* x, T* dx, Layout a, Format<T> format) {
  const Place at(a);
  if constexpr (kFlat) {
    __shared__ __align__(16) unsigned char stage[(kSmall ? kHold : 2) * Flat<T>::kSize * sizeof(T)];
    differentiate_flat<T, kSmall>(dy, x, dx, a, at, format, reinterpret_cast<T*>(stage));
  } else {
    differentiate_rows<T, N, kSmall>(dy, x, dx, a, at, format);
  }
}

struct Plan {
  Layout layout;
  int warps, packs;  // packs: elements of one access
  bool flat;
  int blocks() const { return layout.M * layout.F * layout.chunks; }
};

// Elements of an access: 16-bit types take 8 bytes, for the registers of their float32 sums.
int pack_of(int dtype) { return dtype == kF64 ? 1 : 4; }

// rows == 1: NCHW, else channels-last with as many pixels.
Plan make_plan(int dtype, bool aligned, int64_t N, int64_t C, int64_t pixels, int64_t M, int64_t F,
               bool last, bool backward) {
  Plan plan{};
  Layout& a = plan.layout;
  a.M = static_cast<int>(M);
  a.most = static_cast<int>(ceil_div(N, M));
  a.larger = static_cast<int>(N % M ? N % M : M);
  a.F = static_cast<int>(F);
  a.pixels = pixels;
  a.rows = last ? pixels : 1;
  a.L = C / F * (last ? 1 : pixels);
  a.x_row = a.F * a.L;
  a.y_row = last ? a.x_row + F : 0;
  a.x_sample = C * pixels;
  a.y_sample = (C + F) * pixels;
  a.x_step = M * a.x_sample;
  a.y_step = M * a.y_sample;
  a.plane_f = last ? 1 : pixels;
  a.plane_p = last ? a.y_row : 1;
  const int packed = pack_of(dtype);
  plan.packs = aligned && a.L % packed == 0 ? packed : 1;
  const bool whole = a.y_row % plan.packs == 0 && a.y_sample % plan.packs == 0;
  // Of several statistics in channels-last memory, a row's parts are not side by side.
  plan.flat = !whole && (a.rows == 1 || F == 1);
  if (!whole && !plan.flat) plan.packs = 1;

  const int most = !plan.flat ? kRowWarps : dtype == kF32 ? kMostWarps<float, true> : kMaxFlatWarps;
  // Flat spans have a warp for each held sample's edges. Each block of the backward reads the
  // statistic's dy, in channels-last memory a sector a number: large blocks do so less often.
  int least = plan.flat ? kHold : 1;
  if (backward && last) least = most;
  const int64_t groups = M * F, sms = sm_count();
  a.segments = plan.flat ? 1 : static_cast<int>(ceil_div(a.L, 32 * plan.packs));
  const int64_t items = plan.flat ? ceil_div(a.rows * a.L, 128) : a.rows * a.segments;
  plan.warps = most;
  while (plan.warps > least && groups * ceil_div(items, plan.warps) < sms) plan.warps /= 2;
  a.chunks = static_cast<int>(
      min(ceil_div(items, plan.warps), max(int64_t(1), 64 * sms / (groups * plan.warps))));
  // Of few samples one block has a group, where that is as soon done as blocks tell one another.
  if (!backward && !plan.flat && a.most <= kHold && items <= 2 * kMaxWarps) {
    a.chunks = 1;
    plan.warps = pow2_between(items, 1, kMaxWarps);
  }
  const int64_t step = static_cast<int64_t>(a.chunks) * plan.warps * (plan.flat ? 128 : 1);
  const int64_t row = plan.flat ? a.L : a.segments;
  a.step_rows = static_cast<int>(step / row);
  a.step_rest = static_cast<int>(step % row);
  // i * ceil(2**32 / L) / 2**32 is exact while i * L < 2**32; longer rows end once in a span.
  a.reciprocal = 0;
  if (plan.flat && a.L <= 60000)
    a.reciprocal = static_cast<unsigned>(ceil_div(int64_t(1) << 32, a.L));
  return plan;
}

// launch(elements of a pack, flat, small), as types.
template <typename T, typename F>
void by_plan(const Plan& plan, F launch) {
  constexpr int N = sizeof(T) == 8 ? 1 : 4;
  const bool small = plan.layout.most <= kHold;
  const auto by_size = [&](auto n, auto flat) {
    if (small)
      launch(n, flat, std::true_type{});
    else
      launch(n, flat, std::false_type{});
  };
  using Packed = std::integral_constant<int, N>;
  if (N > 1 && plan.flat)
    by_size(Packed{}, std::bool_constant<(N > 1)>{});
  else if (plan.packs == N)
    by_size(Packed{}, std::false_type{});
  else
    by_size(std::integral_constant<int, 1>{}, std::false_type{});
}

}  // namespace

namespace GANKERN_BACKEND {

// Bytes of scratch that minibatch_stddev needs.
int64_t minibatch_stddev_workspace(int dtype, int64_t N, int64_t C, int64_t pixels, int64_t M,
                                   int64_t F, bool channels_last) {
  int64_t bytes = 0;
  if (N * C * pixels == 0) return bytes;
  for (const bool aligned : {false, true}) {
    const Plan plan = make_plan(dtype, aligned, N, C, pixels, M, F, channels_last, false);
    bytes = max(bytes, static_cast<int64_t>(plan.blocks()) * (dtype == kF64 ? 8 : 4) + M * F * 4);
  }
  return bytes;
}

int minibatch_stddev(int dtype, const void* x, void* y, void* workspace, int64_t N, int64_t C,
                     int64_t pixels, int64_t M, int64_t F, bool channels_last, void* stream) {
  if (N * C * pixels == 0) return 0;
  return by_width(dtype, [&](auto zero, auto format) {
    using T = decltype(zero);
    using A = Acc<T>;
    const bool aligned = aligned16(x) && aligned16(y);
    const Plan plan = make_plan(dtype, aligned, N, C, pixels, M, F, channels_last, false);
    A* partials = static_cast<A*>(workspace);
    int* tickets = reinterpret_cast<int*>(partials + plan.blocks());
    if (plan.layout.chunks > 1) {
      const cudaError_t e =
          cudaMemsetAsync(tickets, 0, M * F * sizeof(int), static_cast<cudaStream_t>(stream));
      if (e != cudaSuccess) return static_cast<int>(e);
    }
    by_plan<T>(plan, [&](auto n, auto flat, auto small) {
      GK_LAUNCH((minibatch_stddev_fwd_kernel<T, decltype(n)::value, decltype(flat)::value,
                                             decltype(small)::value>),
                dim3(plan.layout.M * plan.layout.F, plan.layout.chunks), dim3(32 * plan.warps), 0,
                stream, static_cast<const T*>(x), static_cast<T*>(y), plan.layout, format, partials,
                tickets);
    });
    return static_cast<int>(cudaGetLastError());
  });
}

int minibatch_stddev_bwd(int dtype, const void* dy, const void* x, void* dx, int64_t N, int64_t C,
                         int64_t pixels, int64_t M, int64_t F, bool channels_last, void* stream) {
  if (N * C * pixels == 0) return 0;
  return by_width(dtype, [&](auto zero, auto format) {
    using T = decltype(zero);
    const bool aligned = aligned16(x) && aligned16(dy) && aligned16(dx);
    const Plan plan = make_plan(dtype, aligned, N, C, pixels, M, F, channels_last, true);
    by_plan<T>(plan, [&](auto n, auto flat, auto small) {
      GK_LAUNCH((minibatch_stddev_bwd_kernel<T, decltype(n)::value, decltype(flat)::value,
                                             decltype(small)::value>),
                dim3(plan.layout.M * plan.layout.F, plan.layout.chunks), dim3(32 * plan.warps), 0,
                stream, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx),
                plan.layout, format);
    });
    return static_cast<int>(cudaGetLastError());
  });
}

GK_EXPORT(minibatch_stddev_workspace);
GK_EXPORT(minibatch_stddev);
GK_EXPORT(minibatch_stddev_bwd);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
