// batch_norm_act on the CPU: y = gain * act((x - mean) * rstd * w + b) with the mean and variance
// of each channel, and its gradient. act is linear, relu or lrelu.
//
// x is dense, seen as (outer, C, inner) in memory order. In planes (inner > 1) a channel is one
// thread's, from its sums to its results. Rows (inner == 1) run along C: they are summed in shares,
// which depend on the shape alone, so that the bits do not on the number of threads.
#include "act.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kShare = 16384;  // elements of a share: they stay in the L2 cache
constexpr int64_t kFewestRows = 32, kMostRows = 256;  // of a share: longer sums round more
constexpr int64_t kBlock = 128 * kLanes;              // as long are those of a plane
constexpr int64_t kGrain = 8192;                      // elements that a thread takes at least

template <typename T>
struct Sizes {
  int64_t outer, C, inner;
  int64_t share() const {
    const int64_t rows = kShare / C;
    return rows < kFewestRows ? kFewestRows : rows < kMostRows ? rows : kMostRows;
  }
  int64_t shares() const { return (outer + share() - 1) / share(); }
  double count() const { return static_cast<double>(outer * inner); }
  // f(share, its first row, the row behind its last) on torch's threads.
  template <typename F>
  void by_share(const F& f) const {
    parallel(shares(), (kGrain + share() * C - 1) / (share() * C), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++) {
        const int64_t stop = (k + 1) * share();
        f(k, k * share(), stop < outer ? stop : outer);
      }
    });
  }
  // f(first channel, number of channels) for vectors of channels; f(..., true type) for a whole
  // one.
  template <typename F>
  GK_INLINE void by_vector(const F& f) const {
    int64_t c = 0;
    for (; c + kLanes <= C; c += kLanes) f(c, int64_t(kLanes), std::true_type{});
    if (c < C) f(c, C - c, std::false_type{});
  }
  // f(first channel, number of channels, kWide vectors of them) for all channels.
  template <int kWide, typename F>
  GK_INLINE void by_tile(const F& f) const {
    int64_t c = 0;
    for (; c + kWide * kLanes <= C; c += kWide * kLanes)
      f(c, int64_t(kLanes), std::integral_constant<int, kWide>{}, std::true_type{});
    for (; c + kLanes <= C; c += kLanes)
      f(c, int64_t(kLanes), std::integral_constant<int, 1>{}, std::true_type{});
    if (c < C) f(c, C - c, std::integral_constant<int, 1>{}, std::false_type{});
  }
  // f(first element, number of elements) for the vectors of channel c's planes; flush() after each
  // block.
  template <typename F, typename G>
  GK_INLINE void by_plane(int64_t c, const F& f, const G& flush) const {
    for (int64_t o = 0, since = 0; o < outer; o++)
      for (int64_t first = 0; first < inner; first += kBlock) {
        const int64_t base = (o * C + c) * inner + first;
        const int64_t n = inner - first < kBlock ? inner - first : kBlock;
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) f(base + i, int64_t(kLanes), std::true_type{});
        if (i < n) f(base + i, n - i, std::false_type{});
        since += n;
        if (since >= kBlock) flush(), since = 0;
      }
    flush();
  }
};

template <bool kWhole, typename T>
GK_INLINE Vec<T> load_n(const T* p, int64_t n) {
  if constexpr (kWhole)
    return load(p);
  else
    return load_part(p, n);
}
template <bool kWhole, typename T>
GK_INLINE void store_n(T* p, Vec<T> v, int64_t n) {
  if constexpr (kWhole)
    store(p, v);
  else
    store_part(p, v, n);
}
// A sum of a channel's: block by block.
template <typename V>
struct Sum {
  V part{}, whole{};
  GK_INLINE void flush() { whole += part, part = V{}; }
  double value() const {
    double sum = 0;
    for (int j = 0; j < kLanes; j++) sum += static_cast<double>(whole[j]);
    return sum;
  }
};
// v, zero in the lanes from n on.
template <bool kWhole, typename V>
GK_INLINE V first_n(V v, int64_t n) {
  if constexpr (!kWhole)
    for (int64_t j = n; j < kLanes; j++) v[j] = 0;
  return v;
}

template <typename T>
struct Forward {
  using V = Vec<T>;
  using S = Scalar<T>;
  Sizes<T> size;
  const T* x;
  const S *w, *b;
  S *running_mean, *running_var, *mean, *rstd;
  T* y;
  S eps, momentum;
  ActArgs<S> act;

  // Of channel c, from the mean and the sum of squares around it.
  void finish(int64_t c, double center, double squares) const {
    const double n = size.count(), var = squares / n;
    mean[c] = static_cast<S>(center);
    rstd[c] = static_cast<S>(1 / std::sqrt(var + static_cast<double>(eps)));
    running_mean[c] += momentum * (mean[c] - running_mean[c]);
    running_var[c] += momentum * (static_cast<S>(squares / (n - 1)) - running_var[c]);
  }
  template <bool kWhole>
  GK_INLINE void map(int64_t i, int64_t n, V center, V scale, V shift) const {
    const V u = (load_n<kWhole>(x + i, n) - center) * scale + shift;
    store_n<kWhole>(y + i, act_value<true>(u, act) * act.gain, n);
  }

  void run_planes() const {
    parallel(size.C, kGrain / (size.outer * size.inner), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) run_channel(c);
    });
  }
  void run_channel(int64_t c) const {
    const double n_of_all = size.count();
    Sum<V> values, around, squares;
    size.by_plane(
        c,
        [&](int64_t i, int64_t n, auto whole) {
          values.part += load_n<decltype(whole)::value>(x + i, n);
        },
        [&] { values.flush(); });
    const V m = splat<V>(values.value() / n_of_all);
    size.by_plane(
        c,
        [&](int64_t i, int64_t n, auto whole) {
          constexpr bool kWhole = decltype(whole)::value;
          const V d = first_n<kWhole>(load_n<kWhole>(x + i, n) - m, n);
          around.part += d, squares.part += d * d;
        },
        [&] { around.flush(), squares.flush(); });
    const double off = around.value() / n_of_all;  // m is rounded
    finish(c, static_cast<double>(m[0]) + off, squares.value() - around.value() * off);
    const V scale = splat<V>(w[c] * rstd[c]), shift = splat<V>(b[c]), mid = splat<V>(mean[c]);
    size.by_plane(
        c,
        [&](int64_t i, int64_t n, auto whole) {
          map<decltype(whole)::value>(i, n, mid, scale, shift);
        },
        [] {});
  }

  void run_rows() const {
    const int64_t C = size.C, shares = size.shares();
    Buffer<S> sums(shares * 2 * C);
    size.by_share([&](int64_t k, int64_t first, int64_t stop) {
      S *means = &sums[2 * k * C], *squares = means + C;
      size.template by_tile<4>([&](int64_t c, int64_t n, auto wide, auto whole) {
        constexpr int kWide = decltype(wide)::value;
        constexpr bool kWhole = decltype(whole)::value;
        V m[kWide] = {}, s[kWide] = {}, s2[kWide] = {};
        for (int64_t r = first; r < stop; r++)
          for (int u = 0; u < kWide; u++) m[u] += load_n<kWhole>(x + r * C + c + u * kLanes, n);
        for (int u = 0; u < kWide; u++) m[u] = m[u] / static_cast<S>(stop - first);
        for (int64_t r = first; r < stop; r++)
          for (int u = 0; u < kWide; u++) {
            const V d = load_n<kWhole>(x + r * C + c + u * kLanes, n) - m[u];
            s[u] += d, s2[u] += d * d;
          }
        for (int u = 0; u < kWide; u++) {
          const V off = s[u] / static_cast<S>(stop - first);
          store_n<kWhole>(means + c + u * kLanes, m[u] + off, n);
          store_n<kWhole>(squares + c + u * kLanes, s2[u] - s[u] * off, n);
        }
      });
    });
    Buffer<double> joined(2 * C);
    double *centers = &joined[0], *squares = centers + C;
    for (int64_t c = 0; c < 2 * C; c++) centers[c] = 0;
    const auto rows = [&](int64_t k) {
      return static_cast<double>(k + 1 < shares ? size.share()
                                                : size.outer - (shares - 1) * size.share());
    };
    for (int64_t k = 0; k < shares; k++)
      for (int64_t c = 0; c < C; c++)
        centers[c] += rows(k) * static_cast<double>(sums[2 * k * C + c]);
    for (int64_t c = 0; c < C; c++) centers[c] /= static_cast<double>(size.outer);
    for (int64_t k = 0; k < shares; k++)
      for (int64_t c = 0; c < C; c++) {
        const double d = static_cast<double>(sums[2 * k * C + c]) - centers[c];
        squares[c] += static_cast<double>(sums[(2 * k + 1) * C + c]) + rows(k) * d * d;
      }
    Buffer<S> scale(C);
    for (int64_t c = 0; c < C; c++) {
      finish(c, centers[c], squares[c]);
      scale[c] = w[c] * rstd[c];
    }
    size.by_share([&](int64_t, int64_t first, int64_t stop) {
      for (int64_t r = first; r < stop; r++)
        size.by_vector([&](int64_t c, int64_t n, auto whole) {
          constexpr bool kWhole = decltype(whole)::value;
          map<kWhole>(r * C + c, n, load_n<kWhole>(mean + c, n), load_n<kWhole>(&scale[c], n),
                      load_n<kWhole>(b + c, n));
        });
    });
  }
};

template <typename T>
struct Backward {
  using V = Vec<T>;
  using S = Scalar<T>;
  Sizes<T> size;
  const T *dy, *x;
  const S *w, *b, *mean, *rstd;
  T* dx;
  S *dw, *db;
  ActArgs<S> act;

  // The gradient of gain * act's argument, without the gain, and x around its mean.
  template <bool kWhole>
  GK_INLINE V slope(int64_t i, int64_t n, V center, V scale, V shift, V& d) const {
    d = load_n<kWhole>(x + i, n) - center;
    const V g = load_n<kWhole>(dy + i, n), u = d * scale + shift;
    return u > V{} ? g : g * act.alpha;
  }
  // Of channel c, from the sums of the gradient and of its products with x around its mean: by what
  // the gradient is lowered, by what share of x.
  void finish(int64_t c, double sum, double products, S& less, S& share) const {
    const double n = size.count(), r = static_cast<double>(rstd[c]);
    db[c] = static_cast<S>(static_cast<double>(act.gain) * sum);
    dw[c] = static_cast<S>(static_cast<double>(act.gain) * r * products);
    less = static_cast<S>(sum / n);
    share = static_cast<S>(r * r * products / n);
  }
  template <bool kWhole>
  GK_INLINE void map(int64_t i, int64_t n, V center, V scale, V shift, V less, V share) const {
    V d;
    const V g = slope<kWhole>(i, n, center, scale, shift, d);
    store_n<kWhole>(dx + i, scale * act.gain * (g - less - d * share), n);
  }

  void run_planes() const {
    parallel(size.C, kGrain / (size.outer * size.inner), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) run_channel(c);
    });
  }
  void run_channel(int64_t c) const {
    const V center = splat<V>(mean[c]), scale = splat<V>(w[c] * rstd[c]), shift = splat<V>(b[c]);
    Sum<V> gradients, products;
    size.by_plane(
        c,
        [&](int64_t i, int64_t n, auto whole) {
          V d;
          const V g = slope<decltype(whole)::value>(i, n, center, scale, shift, d);
          gradients.part += g, products.part += g * d;  // lanes from n on have a gradient of 0
        },
        [&] { gradients.flush(), products.flush(); });
    S less, share;
    finish(c, gradients.value(), products.value(), less, share);
    const V l = splat<V>(less), s = splat<V>(share);
    size.by_plane(
        c,
        [&](int64_t i, int64_t n, auto whole) {
          map<decltype(whole)::value>(i, n, center, scale, shift, l, s);
        },
        [] {});
  }

  void run_rows() const {
    const int64_t C = size.C, shares = size.shares();
    Buffer<S> sums(shares * 2 * C), factors(3 * C);
    S *scale = &factors[0], *less = scale + C, *share = less + C;
    for (int64_t c = 0; c < C; c++) scale[c] = w[c] * rstd[c];
    size.by_share([&](int64_t k, int64_t first, int64_t stop) {
      S* to = &sums[2 * k * C];
      size.template by_tile<2>([&](int64_t c, int64_t n, auto wide, auto whole) {
        constexpr int kWide = decltype(wide)::value;
        constexpr bool kWhole = decltype(whole)::value;
        V center[kWide], by[kWide], shift[kWide], s[kWide] = {}, s2[kWide] = {};
        for (int u = 0; u < kWide; u++) {
          center[u] = load_n<kWhole>(mean + c + u * kLanes, n);
          by[u] = load_n<kWhole>(scale + c + u * kLanes, n);
          shift[u] = load_n<kWhole>(b + c + u * kLanes, n);
        }
        for (int64_t r = first; r < stop; r++)
          for (int u = 0; u < kWide; u++) {
            V d;
            const int64_t i = r * C + c + u * kLanes;
            const V g = slope<kWhole>(i, n, center[u], by[u], shift[u], d);
            s[u] += g, s2[u] += g * d;
          }
        for (int u = 0; u < kWide; u++) {
          store_n<kWhole>(to + c + u * kLanes, s[u], n);
          store_n<kWhole>(to + C + c + u * kLanes, s2[u], n);
        }
      });
    });
    Buffer<double> joined(2 * C);
    for (int64_t c = 0; c < 2 * C; c++) joined[c] = 0;
    for (int64_t k = 0; k < shares; k++)
      for (int64_t c = 0; c < 2 * C; c++) joined[c] += static_cast<double>(sums[2 * k * C + c]);
    for (int64_t c = 0; c < C; c++) finish(c, joined[c], joined[C + c], less[c], share[c]);
    size.by_share([&](int64_t, int64_t first, int64_t stop) {
      for (int64_t r = first; r < stop; r++)
        size.by_vector([&](int64_t c, int64_t n, auto whole) {
          constexpr bool kWhole = decltype(whole)::value;
          map<kWhole>(r * C + c, n, load_n<kWhole>(mean + c, n), load_n<kWhole>(scale + c, n),
                      load_n<kWhole>(b + c, n), load_n<kWhole>(less + c, n),
                      load_n<kWhole>(share + c, n));
        });
    });
  }
};

template <typename Op>
int run(const Op& op) {
  if (op.size.inner == 1)
    op.run_rows();
  else
    op.run_planes();
  return 0;
}

}  // namespace

int batch_norm_act(int dtype, const void* x, const void* w, const void* b, void* running_mean,
                   void* running_var, void* y, void* mean, void* rstd, int64_t outer, int64_t C,
                   int64_t inner, double eps, double momentum, int act, double alpha, double gain) {
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    return run(Forward<T>{{outer, C, inner},
                          static_cast<const T*>(x),
                          static_cast<const S*>(w),
                          static_cast<const S*>(b),
                          static_cast<S*>(running_mean),
                          static_cast<S*>(running_var),
                          static_cast<S*>(mean),
                          static_cast<S*>(rstd),
                          static_cast<T*>(y),
                          S(eps),
                          S(momentum),
                          act_args<S>(act, alpha, gain, -1)});
  });
}

int batch_norm_act_bwd(int dtype, const void* dy, const void* x, const void* w, const void* b,
                       const void* mean, const void* rstd, void* dx, void* dw, void* db,
                       int64_t outer, int64_t C, int64_t inner, int act, double alpha,
                       double gain) {
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    return run(Backward<T>{{outer, C, inner},
                           static_cast<const T*>(dy),
                           static_cast<const T*>(x),
                           static_cast<const S*>(w),
                           static_cast<const S*>(b),
                           static_cast<const S*>(mean),
                           static_cast<const S*>(rstd),
                           static_cast<T*>(dx),
                           static_cast<S*>(dw),
                           static_cast<S*>(db),
                           act_args<S>(act, alpha, gain, -1)});
  });
}

}  // namespace gankern::cpu::GANKERN_ISA
