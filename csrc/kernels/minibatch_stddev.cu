// minibatch_stddev: y is x with the groups' standard deviations appended as channels; its gradient.
//
// Sample n belongs to group n mod M. In memory a sample of x is [rows][F][L] and one of y the same
// with the statistics in between: rows is 1 and L = C / F * P pixels in NCHW, rows is P and L = C /
// F in channels-last. A warp takes a segment of 32 packs, the same one of every sample of a group:
// it copies it and adds up the deviations. The block that ends last in its group adds the partial
// sums in order and writes the group's statistic, so that x is read once and one launch does it
// all.
//
// The gradient needs the sum of dy over the group's statistic, G * P numbers, which each block adds
// up itself: dx = dy + (x - mean) / (G std) * Σ dy_statistic / (L rows).
#include "common.cuh"

namespace gankern {
namespace {

constexpr int kHold = 4;  // samples whose packs a thread has in registers at a time
constexpr int kMaxWarps = 4;
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
  int segments, step_rows,
      step_segments;  // a warp advances by step_rows * segments + step_segments
  int chunks;         // blocks of a group
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
  __shared__ A sums[kMaxWarps];
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = A(0);
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; w++) v += sums[w];
  return v;
}

// A warp's count elements at p, which no 16-byte boundary limits: lane i has elements i N .. i N +
// N. They pass through shared memory, so that each access to p is of whole sectors.
template <typename T, int N>
__device__ __forceinline__ void store_segment(T* p, Pack<T, N> v, int count, T* stage) {
  const int lane = threadIdx.x % 32;
  const int before = (reinterpret_cast<uintptr_t>(p) / sizeof(T)) % (32 / sizeof(T));
  __syncwarp();
  store_pack<T, N>(stage + lane * N, v);
  __syncwarp();
  if (lane >= before && lane - before < count) p[lane - before] = stage[lane - before];
  for (int e = lane - before + 32; e < count; e += 32) p[e] = stage[e];
}
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_segment(const T* p, int count, T* stage) {
  const int lane = threadIdx.x % 32;
  const int before = (reinterpret_cast<uintptr_t>(p) / sizeof(T)) % (32 / sizeof(T));
  __syncwarp();
  if (lane >= before && lane - before < count) stage[lane - before] = p[lane - before];
  for (int e = lane - before + 32; e < count; e += 32) stage[e] = p[e];
  __syncwarp();
  return lane * N < count ? load_pack<T, N>(stage + lane * N) : Pack<T, N>{};
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

template <typename T, int N, bool kStaged, bool kSmall>
__global__ void __launch_bounds__(32 * kMaxWarps, 8)
    minibatch_stddev_fwd_kernel(const T* x, T* y, Layout a, Acc<T>* partials, int* tickets) {
  using A = Acc<T>;
  constexpr int kSegment = 32 * N;
  __shared__ __align__(16) unsigned char stages[kStaged ? kMaxWarps * kSegment * sizeof(T) : 1];
  const Place at(a);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  T* stage = reinterpret_cast<T*>(stages) + (kStaged ? warp * kSegment : 0);
  const A inv_size = A(1) / A(at.size);
  const T* x_group = x + at.m * a.x_sample + at.f * a.L + lane * N;
  T* y_group = y + at.m * a.y_sample + at.f * a.L + (kStaged ? 0 : lane * N);

  A total = A(0);
  const int first = at.chunk * warps + warp;
  int64_t row = first / a.segments;
  int segment = first - static_cast<int>(row) * a.segments;
  while (row < a.rows) {
    const int64_t begin = static_cast<int64_t>(segment) * kSegment;
    const int count = static_cast<int>(min(a.L - begin, static_cast<int64_t>(kSegment)));
    const bool inside = lane * N < count;
    const T* from = x_group + row * a.x_row + begin;
    int64_t to = row * a.y_row + begin;
    const auto copy = [&](int k, const Pack<T, N>& v) {
      if constexpr (kStaged)
        store_segment<T, N>(y_group + to + k * a.y_step, v, count, stage);
      else if (inside)
        store_pack<T, N>(y_group + to + k * a.y_step, v);
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
      if (inside)
#pragma unroll
        for (int j = 0; j < N; j++) total += sqrt_(deviation<T, N>(held, j, at.size, inv_size).var);
    } else {
      Moments<T, N> moments(inside ? load_pack<T, N>(from) : Pack<T, N>{});
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
    row += a.step_rows;
    segment += a.step_segments;
    if (segment >= a.segments) {
      segment -= a.segments;
      row++;
    }
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
  for (int k = warp; k < at.size; k += warps)
    for (int64_t p = lane; p < a.pixels; p += 32) plane[k * a.y_step + p * a.plane_p] = value;
}

template <typename T, int N, bool kStaged, bool kSmall>
__global__ void __launch_bounds__(32 * kMaxWarps, 8)
    minibatch_stddev_bwd_kernel(const T* dy, const T* x, T* dx, Layout a) {
  using A = Acc<T>;
  constexpr int kSegment = 32 * N;
  __shared__ __align__(16) unsigned char stages[kStaged ? kMaxWarps * kSegment * sizeof(T) : 1];
  const Place at(a);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  T* stage = reinterpret_cast<T*>(stages) + (kStaged ? warp * kSegment : 0);
  const A inv_size = A(1) / A(at.size);
  const int64_t x_first = at.m * a.x_sample + at.f * a.L + lane * N;
  const T* dy_group = dy + at.m * a.y_sample + at.f * a.L + (kStaged ? 0 : lane * N);

  A slope = A(0);  // Σ dy over the group's statistic
  const T* plane = dy + at.m * a.y_sample + a.F * a.L + at.f * a.plane_f;
  for (int k = warp; k < at.size; k += warps)
    for (int64_t p = lane; p < a.pixels; p += 32)
      slope += to_acc(plane[k * a.y_step + p * a.plane_p]);
  slope = block_sum(slope) * inv_size / (A(a.L) * A(a.rows));

  const int first = at.chunk * warps + warp;
  int64_t row = first / a.segments;
  int segment = first - static_cast<int>(row) * a.segments;
  while (row < a.rows) {
    const int64_t begin = static_cast<int64_t>(segment) * kSegment;
    const int count = static_cast<int>(min(a.L - begin, static_cast<int64_t>(kSegment)));
    const bool inside = lane * N < count;
    int64_t from = x_first + row * a.x_row + begin;
    const T* dy_from = dy_group + row * a.y_row + begin;
    const auto gradient = [&](int k) {
      if constexpr (kStaged) return load_segment<T, N>(dy_from + k * a.y_step, count, stage);
      return inside ? load_pack<T, N>(dy_from + k * a.y_step) : Pack<T, N>{};
    };
    if constexpr (kSmall) {
      Pack<T, N> held[kHold] = {}, grad[kHold] = {};
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (inside && k < at.size) held[k] = load_pack<T, N>(x + from + k * a.x_step);
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (k < at.size) grad[k] = gradient(k);
#pragma unroll
      for (int j = 0; j < N; j++) {
        const Deviation<A> d = deviation<T, N>(held, j, at.size, inv_size);
        const A factor = slope * rsqrt_(d.var);
#pragma unroll
        for (int k = 0; k < kHold; k++)
          grad[k].v[j] = from_acc<T>(to_acc(grad[k].v[j]) +
                                     factor * ((to_acc(held[k].v[j]) - d.origin) - d.mean));
      }
      forget(from);
#pragma unroll
      for (int k = 0; k < kHold; k++)
        if (inside && k < at.size) store_pack<T, N>(dx + from + k * a.x_step, grad[k]);
    } else {
      // More samples than registers hold: x is read again, from cache.
      Moments<T, N> moments(inside ? load_pack<T, N>(x + from) : Pack<T, N>{});
#pragma unroll 2
      for (int k = 0; k < at.size; k++)
        if (inside) moments.add(load_pack<T, N>(x + from + k * a.x_step));
      Deviation<A> d[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        d[j] = moments.deviation(j, inv_size);
        d[j].var = slope * rsqrt_(d[j].var);
      }
#pragma unroll 2
      for (int k = 0; k < at.size; k++) {
        Pack<T, N> grad = gradient(k);
        if (!inside) continue;
        const Pack<T, N> v = load_pack<T, N>(x + from + k * a.x_step);
#pragma unroll
        for (int j = 0; j < N; j++)
          grad.v[j] = from_acc<T>(to_acc(grad.v[j]) +
                                  d[j].var * ((to_acc(v.v[j]) - d[j].origin) - d[j].mean));
        store_pack<T, N>(dx + from + k * a.x_step, grad);
      }
    }
    row += a.step_rows;
    segment += a.step_segments;
    if (segment >= a.segments) {
      segment -= a.segments;
      row++;
    }
  }
}

struct Plan {
  Layout layout;
  int warps, packs;  // packs: elements of one access
  bool staged;       // rows of y do not begin at 16 bytes
  int blocks() const { return layout.M * layout.F * layout.chunks; }
};

// rows == 1: NCHW, else channels-last with as many pixels.
Plan make_plan(int packed, int64_t N, int64_t C, int64_t pixels, int64_t M, int64_t F, bool last,
               bool backward) {
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
  plan.packs = a.L % packed == 0 ? packed : 1;
  plan.staged = plan.packs > 1 && (a.y_row % packed || a.y_sample % packed);
  a.segments = static_cast<int>(ceil_div(a.L, 32 * plan.packs));
  const int64_t items = a.rows * a.segments, groups = M * F, sms = sm_count();
  plan.warps = kMaxWarps;
  // Each block of the backward reads the statistic's dy, in channels-last memory a sector a number:
  // large blocks do so less often.
  const int least = backward && last ? kMaxWarps : 1;
  while (plan.warps > least && groups * ceil_div(items, plan.warps) < sms) plan.warps /= 2;
  const int64_t most = max(int64_t(1), 16 * sms / groups);
  a.chunks = static_cast<int>(min(ceil_div(items, plan.warps), most));
  const int64_t step = static_cast<int64_t>(a.chunks) * plan.warps;
  a.step_rows = static_cast<int>(step / a.segments);
  a.step_segments = static_cast<int>(step % a.segments);
  return plan;
}

// Elements of an access: 16-bit types take 8 bytes, for the registers of their float32 sums.
int pack_of(int dtype) { return dtype == kF64 ? 1 : 4; }

// launch(elements of a pack, staged, small), as types.
template <typename T, typename F>
void by_plan(const Plan& plan, F launch) {
  constexpr int N = sizeof(T) == 8 ? 1 : 4;
  const bool small = ceil_div(plan.layout.N, plan.layout.M) <= kHold;
  const auto by_size = [&](auto n, auto staged) {
    if (small)
      launch(n, staged, std::true_type{});
    else
      launch(n, staged, std::false_type{});
  };
  using Packed = std::integral_constant<int, N>;
  if (N > 1 && plan.packs == N && plan.staged)
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
  for (const int packed : {1, pack_of(dtype)}) {
    const Plan plan = make_plan(packed, N, C, pixels, M, F, channels_last, false);
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
    const int packed = aligned16(x) && aligned16(y) ? pack_of(dtype) : 1;
    const Plan plan = make_plan(packed, N, C, pixels, M, F, channels_last, false);
    A* partials = static_cast<A*>(workspace);
    int* tickets = reinterpret_cast<int*>(partials + plan.blocks());
    if (plan.layout.chunks > 1) {
      const cudaError_t e =
          cudaMemsetAsync(tickets, 0, M * F * sizeof(int), static_cast<cudaStream_t>(stream));
      if (e != cudaSuccess) return static_cast<int>(e);
    }
    by_plan<T>(plan, [&](auto n, auto staged, auto small) {
      GK_LAUNCH((minibatch_stddev_fwd_kernel<T, decltype(n)::value, decltype(staged)::value,
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
    const int packed = aligned16(x) && aligned16(dy) && aligned16(dx) ? pack_of(dtype) : 1;
    const Plan plan = make_plan(packed, N, C, pixels, M, F, channels_last, true);
    by_plan<T>(plan, [&](auto n, auto staged, auto small) {
      GK_LAUNCH((minibatch_stddev_bwd_kernel<T, decltype(n)::value, decltype(staged)::value,
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
