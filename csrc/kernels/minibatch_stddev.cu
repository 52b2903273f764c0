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
// over however many rows, and so one of y with a gap for the statistic after each row. y's side of
// it passes through shared memory: accesses to y are of whole sectors but for both ends of the
// span.
//
// The gradient needs the sum of dy over the group's statistic, G * P numbers, which each block adds
// up itself: dx = dy + (x - mean) / (G std) * Σ dy_statistic / (L rows).
#include "common.cuh"

namespace gankern {
namespace {

constexpr int kHold = 4;  // samples whose packs a thread has in registers at a time
constexpr int kMaxWarps = 4, kMaxFlatWarps = 16;
// Warps of a block. Flat spans are 4 KiB of a sample at most.
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
  int N, M, F;               // samples, groups of samples, statistics
  int segments;              // of a row
  int chunks;                // blocks of a group
  // A warp advances by step_rows * segments + step_rest segments, a flat block by step_rows * L +
  // step_rest elements.
  int step_rows, step_rest;
  // Flat spans: y's elements from one gap to the next, of which the last is the gap; what divides
  // by it (0: it is more than a span); the gaps that a span may have.
  int period, gaps;
  unsigned reciprocal;
};

// A block's place: group m, statistic f, chunk, and the samples m, m + M, ... that it holds.
struct Place {
  int group, chunk, m, f, size;
  __device__ explicit Place(const Layout& a) {
    group = blockIdx.x / a.chunks;
    chunk = blockIdx.x - group * a.chunks;
    m = group / a.F;
    f = group - m * a.F;
    size = (a.N - m + a.M - 1) / a.M;
  }
};

// The sum over a block, in every thread.
template <typename A>
__device__ __forceinline__ A block_sum(A v) {
  __shared__ A sums[kMaxFlatWarps];
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = A(0);
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; w++) v += sums[w];
  return v;
}

// A block's span of `count` elements from element u of x's [rows][L] on.
struct Span {
  int64_t u, row;
  int rest, count;  // rest: elements before u in its row
  __device__ Span(const Layout& a, int chunk) {
    u = static_cast<int64_t>(chunk) * blockDim.x * 4;
    row = a.rows > 1 ? u / a.L : 0;
    rest = static_cast<int>(a.rows > 1 ? u - row * a.L : 0);
    limit(a);
  }
  __device__ void limit(const Layout& a) {
    count = static_cast<int>(min(a.rows * a.L - u, static_cast<int64_t>(blockDim.x) * 4));
  }
  __device__ void advance(const Layout& a) {
    u += static_cast<int64_t>(a.chunks) * blockDim.x * 4;
    row += a.step_rows;
    rest += a.step_rest;
    if (rest >= a.L) rest -= static_cast<int>(a.L), row++;
    limit(a);
  }
  // The element of the span that lies v after the first in y; -1 if it is a gap or beyond the end.
  __device__ __forceinline__ int at(const Layout& a, int v) const {
    const int place = rest + v;
    const int gaps = a.reciprocal ? static_cast<int>(__umulhi(place, a.reciprocal))
                                  : static_cast<int>(place >= a.period);
    const bool inside = v >= 0 && place - gaps * a.period != a.period - 1 && v - gaps < count;
    return inside ? v - gaps : -1;
  }
};

// This thread's first element of y from p on, counted from p, so that the block's accesses are of
// whole sectors.
template <typename T>
__device__ __forceinline__ int first_of(const T* p) {
  constexpr int kSector = 32 / sizeof(T);
  return static_cast<int>(threadIdx.x) -
         static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kSector);
}

template <typename A>
struct Deviation {
  A origin, mean;  // the mean is that of x - origin, which loses nothing to rounding
  A var;           // with epsilon
};

template <typename A>
__device__ __forceinline__ A with_eps(A var) {
  return (var < A(0) ? A(0) : var) + A(kEps);
}

// Over element j of the first `size` held packs.
template <typename T, int N>
__device__ __forceinline__ Deviation<Acc<T>> deviation(const Pack<T, N> (&held)[kHold], int j,
                                                       int size, Acc<T> inv_size) {
  using A = Acc<T>;
  const A origin = to_acc(held[0].v[j]);
  A mean = A(0), var = A(0);
#pragma unroll
  for (int k = 1; k < kHold; k++) mean += k < size ? to_acc(held[k].v[j]) - origin : A(0);
  mean *= inv_size;
#pragma unroll
  for (int k = 0; k < kHold; k++) {
    const A d = k < size ? (to_acc(held[k].v[j]) - origin) - mean : A(0);
    var += d * d;
  }
  return {origin, mean, with_eps(var * inv_size)};
}

// Sums of d and d² of one pack, d = x - the first sample: no cancellation, whatever the mean.
template <typename T, int N>
struct Moments {
  using A = Acc<T>;
  A origin[N], sum[N], square[N];
  __device__ explicit Moments(const Pack<T, N>& first) {
#pragma unroll
    for (int j = 0; j < N; j++) {
      origin[j] = to_acc(first.v[j]);
      sum[j] = square[j] = A(0);
    }
  }
  __device__ void add(const Pack<T, N>& x) {
#pragma unroll
    for (int j = 0; j < N; j++) {
      const A d = to_acc(x.v[j]) - origin[j];
      sum[j] += d;
      square[j] += d * d;
    }
  }
  __device__ Deviation<A> deviation(int j, A inv_size) const {
    const A d = sum[j] * inv_size;
    return {origin[j], d, with_eps(square[j] * inv_size - d * d)};
  }
};

// Copies a block's share of its group to y; returns this thread's sum of deviations.
template <typename T, int N, bool kSmall>
__device__ __forceinline__ Acc<T> copy_rows(const T* x, T* y, const Layout& a, const Place& at) {
  using A = Acc<T>;
  constexpr int kSegment = 32 * N;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const A inv_size = A(1) / A(at.size);
  const T* x_group = x + at.m * a.x_sample + at.f * a.L + lane * N;
  T* y_group = y + at.m * a.y_sample + at.f * a.L + lane * N;
  A total = A(0);
  const int first = at.chunk * warps + warp;
  int64_t row = first / a.segments;
  int segment = first - static_cast<int>(row) * a.segments;
  while (row < a.rows) {
    const int64_t begin = static_cast<int64_t>(segment) * kSegment;
    const bool inside = begin + lane * N < a.L;
    const T* from = x_group + row * a.x_row + begin;
    int64_t to = row * a.y_row + begin;
    if constexpr (kSmall) {
      Pack<T, N> held[kHold] = {};
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (inside && k < at.size) held[k] = load_pack<T, N>(from + k * a.x_step);
      forget(to);
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (inside && k < at.size) store_pack<T, N>(y_group + to + k * a.y_step, held[k]);
      if (inside)
#pragma unroll
        for (int j = 0; j < N; j++) total += sqrt_(deviation<T, N>(held, j, at.size, inv_size).var);
    } else if (inside) {
      Moments<T, N> moments(load_pack<T, N>(from));
#pragma unroll 2
      for (int k = 0; k < at.size; k++) {
        const Pack<T, N> v = load_pack<T, N>(from + k * a.x_step);
        moments.add(v);
        store_pack<T, N>(y_group + to + k * a.y_step, v);
      }
#pragma unroll
      for (int j = 0; j < N; j++) total += sqrt_(moments.deviation(j, inv_size).var);
    }
    row += a.step_rows;
    segment += a.step_rest;
    if (segment >= a.segments) {
      segment -= a.segments;
      row++;
    }
  }
  return total;
}

// The same by flat spans. stage: [kHold][4 blockDim].
template <typename T, bool kSmall>
__device__ __forceinline__ Acc<T> copy_flat(const T* x, T* y, const Layout& a, const Place& at,
                                            T* stage) {
  using A = Acc<T>;
  const A inv_size = A(1) / A(at.size);
  const int mine = threadIdx.x * 4, size = blockDim.x * 4, step = blockDim.x;
  const T* x_group = x + at.m * a.x_sample + at.f * a.L + mine;
  T* y_group = y + at.m * a.y_sample + at.f * a.L;
  A total = A(0);
  for (Span span(a, at.chunk); span.count > 0; span.advance(a)) {
    const bool inside = mine < span.count;
    Moments<T, 4> moments(inside && !kSmall ? load_pack<T, 4>(x_group + span.u) : Pack<T, 4>{});
    for (int k0 = 0; k0 < (kSmall ? 1 : at.size); k0 += kHold) {
      const T* from = x_group + span.u + k0 * a.x_step;
      T* to = y_group + span.u + span.row + k0 * a.y_step;
      Pack<T, 4> held[kHold] = {};
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (inside && k0 + k < at.size) held[k] = load_pack<T, 4>(from + k * a.x_step);
      __syncthreads();  // the elements before these have been copied
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (k0 + k < at.size) {
          store_pack<T, 4>(stage + k * size + mine, held[k]);
          if (!kSmall) moments.add(held[k]);
        }
      __syncthreads();
      int v = first_of(to);
      const auto copy = [&](int v) {
        const int e = span.at(a, v);
        if (e < 0) return;
#pragma unroll
        for (int k = 0; k < kHold; k++)
          if (k0 + k < at.size) to[v + k * a.y_step] = stage[k * size + e];
      };
      unrolled<5>([&](auto i) { copy(v + decltype(i)::value * step); });
      for (v += 5 * step; v < span.count + a.gaps; v += step) copy(v);
      if (kSmall && inside)
#pragma unroll
        for (int j = 0; j < 4; j++) total += sqrt_(deviation<T, 4>(held, j, at.size, inv_size).var);
    }
    if (!kSmall && inside)
#pragma unroll
      for (int j = 0; j < 4; j++) total += sqrt_(moments.deviation(j, inv_size).var);
  }
  return total;
}

template <typename T, int N, bool kFlat, bool kSmall>
__global__ void __launch_bounds__(32 * kMostWarps<T, kFlat>, 32 / kMostWarps<T, kFlat>)
    minibatch_stddev_fwd_kernel(const T* x, T* y, Layout a, Acc<T>* partials, int* tickets) {
  using A = Acc<T>;
  const Place at(a);
  A total;
  if constexpr (kFlat) {
    __shared__ __align__(16) unsigned char stage[kHold * kMostWarps<T, true> * 128 * sizeof(T)];
    total = copy_flat<T, kSmall>(x, y, a, at, reinterpret_cast<T*>(stage));
  } else {
    total = copy_rows<T, N, kSmall>(x, y, a, at);
  }
  total = block_sum(total);
  if (a.chunks > 1) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
      partials[blockIdx.x] = total;
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
  const T value = from_acc<T>(total / (A(a.L) * A(a.rows)));
  T* plane = y + at.m * a.y_sample + a.F * a.L + at.f * a.plane_f;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int k = warp; k < at.size; k += warps)
    for (int64_t p = lane; p < a.pixels; p += 32) plane[k * a.y_step + p * a.plane_p] = value;
}

// dx of one pack of M samples, dy + slope / std * (x - mean), in place of dy.
template <typename T, int N, int M, typename F>
__device__ __forceinline__ void differentiate(const Pack<T, N> (&x)[M], Pack<T, N> (&grad)[M],
                                              Acc<T> slope, F deviation_of) {
#pragma unroll
  for (int j = 0; j < N; j++) {
    const Deviation<Acc<T>> d = deviation_of(j);
    const Acc<T> factor = slope * rsqrt_(d.var);
#pragma unroll
    for (int k = 0; k < M; k++)
      grad[k].v[j] =
          from_acc<T>(to_acc(grad[k].v[j]) + factor * ((to_acc(x[k].v[j]) - d.origin) - d.mean));
  }
}

// Σ dy over the group's statistic, over what it is divided by.
template <typename T>
__device__ __forceinline__ Acc<T> slope_of(const T* dy, const Layout& a, const Place& at) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  A sum = A(0);
  const T* plane = dy + at.m * a.y_sample + a.F * a.L + at.f * a.plane_f;
  for (int k = warp; k < at.size; k += warps)
    for (int64_t p = lane; p < a.pixels; p += 32)
      sum += to_acc(plane[k * a.y_step + p * a.plane_p]);
  return block_sum(sum) / (A(at.size) * A(a.L) * A(a.rows));
}

template <typename T, int N, bool kSmall>
__device__ __forceinline__ void differentiate_rows(const T* dy, const T* x, T* dx, const Layout& a,
                                                   const Place& at) {
  using A = Acc<T>;
  constexpr int kSegment = 32 * N, kBatch = kSmall ? kHold : 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const A inv_size = A(1) / A(at.size), slope = slope_of(dy, a, at);
  const int64_t x_first = at.m * a.x_sample + at.f * a.L + lane * N;
  const T* dy_group = dy + at.m * a.y_sample + at.f * a.L + lane * N;
  const int first = at.chunk * warps + warp;
  int64_t row = first / a.segments;
  int segment = first - static_cast<int>(row) * a.segments;
  for (; row < a.rows; row += a.step_rows) {
    const int64_t begin = static_cast<int64_t>(segment) * kSegment;
    int64_t from = x_first + row * a.x_row + begin;
    const T* dy_from = dy_group + row * a.y_row + begin;
    if (begin + lane * N < a.L) {
      Moments<T, N> moments(kSmall ? Pack<T, N>{} : load_pack<T, N>(x + from));
      if constexpr (!kSmall)
#pragma unroll 2
        for (int k = 0; k < at.size; k++) moments.add(load_pack<T, N>(x + from + k * a.x_step));
      for (int k0 = 0; k0 < (kSmall ? 1 : at.size); k0 += kBatch) {
        Pack<T, N> held[kBatch] = {}, grad[kBatch] = {};
#pragma unroll
        for (int k = 0; k < kBatch; k++)
          if (k0 + k < at.size) held[k] = load_pack<T, N>(x + from + (k0 + k) * a.x_step);
#pragma unroll
        for (int k = 0; k < kBatch; k++)
          if (k0 + k < at.size) grad[k] = load_pack<T, N>(dy_from + (k0 + k) * a.y_step);
        differentiate(held, grad, slope, [&](int j) {
          if constexpr (kSmall) return deviation<T, N>(held, j, at.size, inv_size);
          return moments.deviation(j, inv_size);
        });
        forget(from);
#pragma unroll
        for (int k = 0; k < kBatch; k++)
          if (k0 + k < at.size) store_pack<T, N>(dx + from + (k0 + k) * a.x_step, grad[k]);
      }
    }
    segment += a.step_rest;
    if (segment >= a.segments) {
      segment -= a.segments;
      row++;
    }
  }
}

// The same by flat spans. stage: [kHold][4 blockDim].
template <typename T, bool kSmall>
__device__ __forceinline__ void differentiate_flat(const T* dy, const T* x, T* dx, const Layout& a,
                                                   const Place& at, T* stage) {
  using A = Acc<T>;
  const A inv_size = A(1) / A(at.size);
  // Samples at a time, of them dy's at a time, and elements of each: what registers have room for.
  constexpr int kBatch = kSmall ? kHold : 2, kTaken = 2, kEach = 4;
  const int mine = threadIdx.x * 4, size = blockDim.x * 4, step = blockDim.x;
  // Elements before the group's statistic's; computed again where needed, for the registers.
  const auto first = [&](int64_t sample) {
    int m = at.m;
    forget(m);
    return m * sample + at.f * a.L;
  };
  const A slope = slope_of(dy, a, at);
  for (Span span(a, at.chunk); span.count > 0; span.advance(a)) {
    const bool inside = mine < span.count;
    const T* begin = x + first(a.x_sample) + mine + span.u;
    Moments<T, 4> moments(inside && !kSmall ? load_pack<T, 4>(begin) : Pack<T, 4>{});
    if constexpr (!kSmall)
#pragma unroll 2
      for (int k = 0; k < at.size; k++)
        if (inside) moments.add(load_pack<T, 4>(begin + k * a.x_step));
    for (int k0 = 0; k0 < (kSmall ? 1 : at.size); k0 += kBatch) {
      int64_t origin = first(a.y_sample) + span.u + span.row + k0 * a.y_step;
      forget(origin);
      const T* from = dy + origin;
      const int start = first_of(from);
      __syncthreads();  // the packs before these were read
#pragma unroll 1
      for (int k1 = 0; k1 < kBatch; k1 += kTaken) {
        T taken[kTaken][kEach];
#pragma unroll
        for (int k = 0; k < kTaken; k++, origin += a.y_step) {
          forget(origin);
          unrolled<kEach>([&](auto index) {
            constexpr int i = decltype(index)::value;
            const int v = start + i * step;
            if (k0 + k1 + k < at.size && span.at(a, v) >= 0) taken[k][i] = dy[origin + v];
          });
        }
        int v = start;
        forget(v);
#pragma unroll
        for (int i = 0; i < kEach; i++, v += step) {
          const int e = span.at(a, v);
#pragma unroll
          for (int k = 0; k < kTaken; k++)
            if (e >= 0 && k0 + k1 + k < at.size) stage[(k1 + k) * size + e] = taken[k][i];
        }
      }
      // Only now: registers have no room for these and dy's.
      int64_t here = first(a.x_sample) + mine + span.u + k0 * a.x_step;
      Pack<T, 4> held[kBatch] = {}, grad[kBatch] = {};
#pragma unroll
      for (int k = 0; k < kBatch; k++)
        if (inside && k0 + k < at.size) held[k] = load_pack<T, 4>(x + here + k * a.x_step);
      // The ends and gaps of the span.
#pragma unroll 1
      for (int v = start + kEach * step; v < span.count + a.gaps; v += step) {
        const int e = span.at(a, v);
        if (e < 0) continue;
        for (int k = 0; k < kBatch && k0 + k < at.size; k++)
          stage[k * size + e] = from[v + k * a.y_step];
      }
      __syncthreads();
      if (!inside) continue;
#pragma unroll
      for (int k = 0; k < kBatch; k++)
        if (k0 + k < at.size) grad[k] = load_pack<T, 4>(stage + k * size + mine);
      differentiate(held, grad, slope, [&](int j) {
        if constexpr (kSmall) return deviation<T, 4>(held, j, at.size, A(1) / A(at.size));
        return moments.deviation(j, inv_size);
      });
      forget(here);
#pragma unroll
      for (int k = 0; k < kBatch; k++)
        if (k0 + k < at.size) store_pack<T, 4>(dx + here + k * a.x_step, grad[k]);
    }
  }
}

template <typename T, int N, bool kFlat, bool kSmall>
__global__ void __launch_bounds__(32 * kMostWarps<T, kFlat>, 32 / kMostWarps<T, kFlat>)
    minibatch_stddev_bwd_kernel(const T* dy, const T* x, T* dx, Layout a) {
  const Place at(a);
  if constexpr (kFlat) {
    __shared__ __align__(16) unsigned char stage[kHold * kMostWarps<T, true> * 128 * sizeof(T)];
    differentiate_flat<T, kSmall>(dy, x, dx, a, at, reinterpret_cast<T*>(stage));
  } else {
    differentiate_rows<T, N, kSmall>(dy, x, dx, a, at);
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

// Flat spans cross `period` - 1 elements of a row of x, and then a gap in y.
void plan_spans(Layout& a, int warps) {
  const int span = 32 * warps * 4;
  a.period = a.rows > 1 ? static_cast<int>(a.L) + 1 : INT32_MAX;
  a.gaps = a.rows > 1 ? span / static_cast<int>(a.L) + 1 : 0;
  // place * ceil(2**32 / period) / 2**32 is exact while place * period < 2**32; longer rows have
  // one gap in a span.
  a.reciprocal = 0;
  if (a.period <= 60000)
    a.reciprocal = static_cast<unsigned>(ceil_div(int64_t(1) << 32, int64_t(a.period)));
  const int64_t step = static_cast<int64_t>(a.chunks) * span;
  a.step_rows = static_cast<int>(a.rows > 1 ? step / a.L : 0);
  a.step_rest = static_cast<int>(a.rows > 1 ? step % a.L : 0);
}

// rows == 1: NCHW, else channels-last with as many pixels.
Plan make_plan(int dtype, bool aligned, int64_t N, int64_t C, int64_t pixels, int64_t M, int64_t F,
               bool last, bool backward) {
  Plan plan{};
  Layout& a = plan.layout;
  a.N = static_cast<int>(N);
  a.M = static_cast<int>(M);
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
  plan.flat = !whole && (a.rows == 1 || (F == 1 && a.L < 1 << 30));
  if (!whole && !plan.flat) plan.packs = 1;

  const int most = !plan.flat ? kMaxWarps : dtype == kF32 ? kMostWarps<float, true> : kMaxFlatWarps;
  // Short spans have many ends, within a sector; and each block of the backward reads the
  // statistic's dy, in channels-last memory a sector a number: large blocks do so less often.
  int least = plan.flat ? most / 4 : 1;
  if (backward && last) least = most;
  const int64_t groups = M * F, sms = sm_count();
  a.segments = plan.flat ? 1 : static_cast<int>(ceil_div(a.L, 32 * plan.packs));
  const int64_t items = plan.flat ? ceil_div(a.rows * a.L, 128) : a.rows * a.segments;
  plan.warps = most;
  while (plan.warps > least && groups * ceil_div(items, plan.warps) < sms) plan.warps /= 2;
  a.chunks = static_cast<int>(
      min(ceil_div(items, plan.warps), max(int64_t(1), 64 * sms / (groups * plan.warps))));
  if (plan.flat) {
    plan_spans(a, plan.warps);
  } else {
    const int64_t step = static_cast<int64_t>(a.chunks) * plan.warps;
    a.step_rows = static_cast<int>(step / a.segments);
    a.step_rest = static_cast<int>(step % a.segments);
  }
  return plan;
}

// launch(elements of a pack, flat, small), as types.
template <typename T, typename F>
void by_plan(const Plan& plan, F launch) {
  constexpr int N = sizeof(T) == 8 ? 1 : 4;
  const bool small = ceil_div(plan.layout.N, plan.layout.M) <= kHold;
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
  return by_dtype(dtype, [&](auto zero) {
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
                dim3(plan.blocks()), dim3(32 * plan.warps), 0, stream, static_cast<const T*>(x),
                static_cast<T*>(y), plan.layout, partials, tickets);
    });
    return static_cast<int>(cudaGetLastError());
  });
}

int minibatch_stddev_bwd(int dtype, const void* dy, const void* x, void* dx, int64_t N, int64_t C,
                         int64_t pixels, int64_t M, int64_t F, bool channels_last, void* stream) {
  if (N * C * pixels == 0) return 0;
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = aligned16(x) && aligned16(dy) && aligned16(dx);
    const Plan plan = make_plan(dtype, aligned, N, C, pixels, M, F, channels_last, true);
    by_plan<T>(plan, [&](auto n, auto flat, auto small) {
      GK_LAUNCH((minibatch_stddev_bwd_kernel<T, decltype(n)::value, decltype(flat)::value,
                                             decltype(small)::value>),
                dim3(plan.blocks()), dim3(32 * plan.warps), 0, stream, static_cast<const T*>(dy),
                static_cast<const T*>(x), static_cast<T*>(dx), plan.layout);
    });
    return static_cast<int>(cudaGetLastError());
  });
}

GK_EXPORT(minibatch_stddev_workspace);
GK_EXPORT(minibatch_stddev);
GK_EXPORT(minibatch_stddev_bwd);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
