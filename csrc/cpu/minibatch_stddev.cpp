// minibatch_stddev on the CPU and its gradient. The layout of x and y and the formulas are in
// csrc/kernels/minibatch_stddev.cu.
#include "vec.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kGrain = 16384;   // elements that a thread takes at least
constexpr int64_t kSegment = 2048;  // elements of a row whose deviations are summed apart
constexpr double kEps = 1e-8;

struct Layout {
  int64_t N, M, F, L, rows, pixels, x_row, y_row, x_sample, y_sample, plane_f, plane_p, segments;
  Layout(int64_t N, int64_t C, int64_t pixels, int64_t M, int64_t F, bool last)
      : N(N), M(M), F(F), L(C / F * (last ? 1 : pixels)), rows(last ? pixels : 1), pixels(pixels) {
    x_row = F * L;
    y_row = last ? x_row + F : 0;
    x_sample = C * pixels;
    y_sample = (C + F) * pixels;
    plane_f = last ? 1 : pixels;
    plane_p = last ? y_row : 1;
    segments = (L + kSegment - 1) / kSegment;
  }
  int64_t size(int64_t m) const { return (N - m + M - 1) / M; }
  int64_t plane(int64_t n, int64_t f) const { return n * y_sample + F * L + f * plane_f; }
};

template <bool kPart, typename T>
GK_INLINE Vec<T> get(const T* p, int64_t n) {
  if constexpr (kPart)
    return load_part(p, n);
  else
    return load(p);
}
template <bool kPart, typename T>
GK_INLINE void put(T* p, Vec<T> v, int64_t n) {
  if constexpr (kPart)
    store_part(p, v, n);
  else
    store(p, v);
}

// Mean of x - x of the first sample, and standard deviation, over `size` samples, `step` apart;
// copies them to y if that is given.
template <bool kPart, typename T>
GK_INLINE Vec<T> deviation(const T* x, int64_t step, T* y, int64_t y_step, int64_t size, int64_t n,
                           Vec<T>* mean) {
  using V = Vec<T>;
  const V origin = get<kPart>(x, n);  // deviations from a sample do not cancel
  V sum{}, square{};
  for (int64_t k = 0; k < size; k++) {
    const V v = get<kPart>(x + k * step, n), d = v - origin;
    sum += d;
    square += d * d;
    if (y) put<kPart>(y + k * y_step, v, n);
  }
  const Scalar<T> inv = Scalar<T>(1) / static_cast<Scalar<T>>(size);
  const V d = sum * inv;
  V var = square * inv - d * d;
  var = (var < V{} ? V{} : var) + static_cast<Scalar<T>>(kEps);
  for (int i = 0; i < kLanes; i++) var[i] = std::sqrt(var[i]);
  *mean = d;
  return var;
}

template <typename T>
void forward(const T* x, T* y, const Layout& a) {
  using S = Scalar<T>;
  using V = Vec<T>;
  const int64_t items = a.rows * a.segments, groups = a.M * a.F;
  Buffer<S> sums(groups * items);
  parallel(groups * items, kGrain / (a.N / a.M * (a.L < kSegment ? a.L : kSegment) + 1) + 1,
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; i++) {
               const int64_t group = i / items, m = group / a.F, f = group % a.F;
               const int64_t row = i % items / a.segments, first = i % a.segments * kSegment;
               const int64_t stop = first + kSegment < a.L ? first + kSegment : a.L;
               const T* from = x + m * a.x_sample + row * a.x_row + f * a.L;
               T* to = y + m * a.y_sample + row * a.y_row + f * a.L;
               const int64_t step = a.M * a.x_sample, y_step = a.M * a.y_sample, size = a.size(m);
               V sum{}, mean;
               int64_t l = first;
               for (; l + kLanes <= stop; l += kLanes)
                 sum += deviation<false>(from + l, step, to + l, y_step, size, kLanes, &mean);
               if (l < stop) {
                 const V std =
                     deviation<true>(from + l, step, to + l, y_step, size, stop - l, &mean);
                 for (int64_t j = 0; j < stop - l; j++) sum[j] += std[j];
               }
               sums[i] = sum_lanes(sum);
             }
           });
  for (int64_t group = 0; group < groups; group++) {
    const int64_t m = group / a.F, f = group % a.F;
    S sum = 0;
    for (int64_t i = 0; i < items; i++) sum += sums[group * items + i];
    sum /= static_cast<S>(a.L) * static_cast<S>(a.rows);
    for (int64_t n = m; n < a.N; n += a.M)
      for (int64_t p = 0; p < a.pixels; p++) store1(y + a.plane(n, f) + p * a.plane_p, sum);
  }
}

template <bool kPart, typename T>
GK_INLINE void gradient(const T* dy, const T* x, T* dx, int64_t step, int64_t y_step, int64_t size,
                        Scalar<T> slope, int64_t n) {
  using V = Vec<T>;
  V mean;
  const V std = deviation<kPart>(x, step, static_cast<T*>(nullptr), 0, size, n, &mean);
  const V factor = slope / std, origin = get<kPart>(x, n);
  for (int64_t k = 0; k < size; k++) {
    const V g = get<kPart>(dy + k * y_step, n), v = get<kPart>(x + k * step, n);
    put<kPart>(dx + k * step, g + factor * ((v - origin) - mean), n);
  }
}

template <typename T>
void backward(const T* dy, const T* x, T* dx, const Layout& a) {
  using S = Scalar<T>;
  const int64_t items = a.rows * a.segments, groups = a.M * a.F;
  Buffer<S> slopes(groups);
  for (int64_t group = 0; group < groups; group++) {
    const int64_t m = group / a.F, f = group % a.F;
    S sum = 0;
    for (int64_t n = m; n < a.N; n += a.M)
      for (int64_t p = 0; p < a.pixels; p++) sum += load1(dy + a.plane(n, f) + p * a.plane_p);
    const S terms = static_cast<S>(a.L) * static_cast<S>(a.rows);
    slopes[group] = sum / (terms * static_cast<S>(a.size(m)));
  }
  parallel(
      groups * items, kGrain / (a.N / a.M * (a.L < kSegment ? a.L : kSegment) + 1) + 1,
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t group = i / items, m = group / a.F, f = group % a.F;
          const int64_t row = i % items / a.segments, first = i % a.segments * kSegment;
          const int64_t stop = first + kSegment < a.L ? first + kSegment : a.L;
          const int64_t at = m * a.x_sample + row * a.x_row + f * a.L;
          const T* grad = dy + m * a.y_sample + row * a.y_row + f * a.L;
          const int64_t step = a.M * a.x_sample, y_step = a.M * a.y_sample, size = a.size(m);
          const S slope = slopes[group];
          int64_t l = first;
          for (; l + kLanes <= stop; l += kLanes)
            gradient<false>(grad + l, x + at + l, dx + at + l, step, y_step, size, slope, kLanes);
          if (l < stop)
            gradient<true>(grad + l, x + at + l, dx + at + l, step, y_step, size, slope, stop - l);
        }
      });
}

}  // namespace

int64_t minibatch_stddev_workspace(int, int64_t, int64_t, int64_t, int64_t, int64_t, bool) {
  return 0;
}

int minibatch_stddev(int dtype, const void* x, void* y, void*, int64_t N, int64_t C, int64_t pixels,
                     int64_t M, int64_t F, bool channels_last, void*) {
  if (N * C * pixels == 0) return 0;
  const Layout layout(N, C, pixels, M, F, channels_last);
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(static_cast<const T*>(x), static_cast<T*>(y), layout);
    return 0;
  });
}

int minibatch_stddev_bwd(int dtype, const void* dy, const void* x, void* dx, int64_t N, int64_t C,
                         int64_t pixels, int64_t M, int64_t F, bool channels_last, void*) {
  if (N * C * pixels == 0) return 0;
  const Layout layout(N, C, pixels, M, F, channels_last);
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), layout);
    return 0;
  });
}

}  // namespace gankern::cpu::GANKERN_ISA
