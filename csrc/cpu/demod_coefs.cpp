// demod_coefs on the CPU, and its gradient; the formulas are in csrc/kernels/demod_coefs.cu.
//
// Weights and dW are streamed once. What stands beside them, s² and g and q, is small: the products
// with it are vectors along the input channels, in rows that are padded with zeros.
#include <utility>

#include "vec.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kGrain = 16384;       // weights that a thread takes at least
constexpr int kSamples = 4, kWide = 2;  // taken at once: samples, and vectors of channels of ds

template <typename V>
using Lanes = decltype(V{} < V{});
template <typename V>
using Lane = std::remove_reference_t<decltype(Lanes<V>{}[0])>;

template <typename V>
GK_INLINE Lanes<V> lane_numbers() {
  Lanes<V> n{};
  for (int i = 0; i < kLanes; i++) n[i] = i;
  return n;
}

// Adds every second of the runs of `kRun` lanes to the one before it, within blocks of `kBlock`
// lanes: of a in a block's first half, of b in its second.
template <int kRun, int kBlock, typename V, size_t... kLane>
GK_INLINE V add_pairs(V a, V b, std::index_sequence<kLane...>) {
  constexpr auto from = [](size_t lane) {
    const size_t at = lane % (kBlock / 2), block = lane / kBlock * kBlock;
    const size_t source = lane % kBlock < kBlock / 2 ? 0 : kLanes;
    return source + block + at / kRun * 2 * kRun + at % kRun;
  };
  const Lanes<V> low{from(kLane)...};
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + kRun);
}

// The lanes' sum of v[0] in lane 0, of v[1] in lane 1 and so on; v is used up. Lanes are first
// added within blocks of 4, for which AVX has shuffles of one instruction, then the blocks.
template <int kStep = 1, typename V>
GK_INLINE V sum_each(V* v) {
  constexpr int kRun = kStep < 4 ? 1 : 4, kBlock = kStep < 4 ? 4 : kLanes;
  for (int i = 0; i < kLanes / kStep / 2; i++)
    v[i] = add_pairs<kRun, kBlock>(v[2 * i], v[2 * i + 1], std::make_index_sequence<kLanes>{});
  if constexpr (kStep * 2 < kLanes) return sum_each<kStep * 2>(v);
  return v[0];
}

struct Shape {
  int64_t N, O, I, K;
  bool rows;  // weights as [O, I, K], else as [O, K, I]
  int64_t padded() const { return (I + kLanes - 1) / kLanes * kLanes; }
  int64_t grain() const { return kGrain / (I * K + 1); }
};

template <typename S>
S load_style(const void* p, int dtype, int64_t i) {
  switch (dtype) {
    case kF32:
      return load1(static_cast<const float*>(p) + i);
    case kF16:
      return load1(static_cast<const f16*>(p) + i);
    case kBF16:
      return load1(static_cast<const bf16*>(p) + i);
    default:
      return static_cast<S>(static_cast<const double*>(p)[i]);
  }
}
template <typename S>
void store_style(void* p, int dtype, int64_t i, S v) {
  switch (dtype) {
    case kF32:
      return store1(static_cast<float*>(p) + i, static_cast<float>(v));
    case kF16:
      return store1(static_cast<f16*>(p) + i, static_cast<float>(v));
    case kBF16:
      return store1(static_cast<bf16*>(p) + i, static_cast<float>(v));
    default:
      static_cast<double*>(p)[i] = v;
  }
}

template <typename S>
void square_styles(const Shape& shape, const void* styles, int dtype, S* squares) {
  const int64_t width = shape.padded();
  for (int64_t n = 0; n < shape.N; n++)
    for (int64_t i = 0; i < width; i++) {
      const S s = i < shape.I ? load_style<S>(styles, dtype, n * shape.I + i) : S(0);
      squares[n * width + i] = s * s;
    }
}

// Σ_k w² of kLanes channels of kTaps, all of which lie in memory, and kLanes elements behind them.
template <int kTaps, typename T>
GK_INLINE Vec<T> square_taps(const T* w) {
  using V = Vec<T>;
  V sums[kLanes] = {};
  for (int c = 0; c < kLanes; c++)
    for (int k = 0; k < kTaps; k += kLanes) {
      V v = load(w + c * kTaps + k);
      if (kTaps - k < kLanes) v = lane_numbers<V>() < splat<Lanes<V>>(kTaps - k) ? v : V{};
      sums[c] += v * v;
    }
  return sum_each(sums);
}

// Σ_k w² of channels i .. i + kLanes - 1 of a row [I, K]; `left` elements may be read from w on.
template <typename T>
GK_INLINE Vec<T> square_rows(const T* w, const Shape& shape, int64_t i, int64_t left) {
  if (shape.K == 9 && i + kLanes <= shape.I && (i + kLanes) * 9 + kLanes <= left)
    return square_taps<9>(w + i * 9);
  using V = Vec<T>;
  V sums[kLanes] = {};
  for (int c = 0; c < kLanes && i + c < shape.I; c++)
    for (int64_t k = 0; k < shape.K; k += kLanes) {
      const int64_t at = (i + c) * shape.K + k, count = shape.K - k;
      V v;
      if (count >= kLanes) {
        v = load(w + at);
      } else if (at + kLanes <= left) {
        v = load(w + at);
        v = lane_numbers<V>() < splat<Lanes<V>>(count) ? v : V{};
      } else {
        v = load_part(w + at, count);
      }
      sums[c] += v * v;
    }
  return sum_each(sums);
}

template <typename T>
GK_INLINE Vec<T> square_columns(const T* w, const Shape& shape, int64_t i) {
  Vec<T> sum{};
  const bool part = i + kLanes > shape.I;
  for (int64_t k = 0; k < shape.K; k++) {
    const T* p = w + k * shape.I + i;
    const Vec<T> v = part ? load_part(p, shape.I - i) : load(p);
    sum += v * v;
  }
  return sum;
}

template <typename T>
int forward(const Shape& shape, const T* w, const void* styles, int styles_dtype, Scalar<T>* d,
            Scalar<T>* q, Scalar<T> eps) {
  using V = Vec<T>;
  using S = Scalar<T>;
  const int64_t width = shape.padded();
  Buffer<S> squares(shape.N * width + 1);
  square_styles(shape, styles, styles_dtype, &squares[0]);
  parallel(shape.O, shape.grain(), [&](int64_t begin, int64_t end) {
    Buffer<S> row(width + 1);
    for (int64_t o = begin; o < end; o++) {
      const T* at = w + o * shape.I * shape.K;
      const int64_t left = (shape.O - o) * shape.I * shape.K;
      for (int64_t i = 0; i < shape.I; i += kLanes)
        store(&row[i], shape.rows ? square_rows(at, shape, i, left) : square_columns(at, shape, i));
      memcpy(q + o * shape.I, &row[0], static_cast<size_t>(shape.I) * sizeof(S));
      for (int64_t n0 = 0; n0 < shape.N; n0 += kSamples) {
        const int64_t samples = shape.N - n0 < kSamples ? shape.N - n0 : kSamples;
        V sums[kSamples] = {};
        for (int64_t i = 0; i < width; i += kLanes) {
          const V v = load(&row[i]);
          for (int j = 0; j < kSamples; j++)
            if (j < samples) sums[j] += load(&squares[(n0 + j) * width + i]) * v;
        }
        for (int64_t j = 0; j < samples; j++)
          d[(n0 + j) * shape.O + o] = S(1) / std::sqrt(sum_lanes(sums[j]) + eps);
      }
    }
  });
  return 0;
}

// dW of one output channel, whose input channels' factors are in `factors`. `channels` has, for
// each of the K vectors that kLanes channels make, the channel of every lane.
template <typename T>
GK_INLINE void scale_rows(const T* w, T* dw, const Shape& shape, const Scalar<T>* factors,
                          const Lane<Vec<T>>* channels) {
  int64_t i = 0;
  for (; i + kLanes <= shape.I; i += kLanes) {
    const Vec<T> f = load(factors + i);
    for (int64_t k = 0; k < shape.K; k++) {
      const int64_t e = i * shape.K + k * kLanes;
      Lanes<Vec<T>> from;
      memcpy(&from, channels + k * kLanes, sizeof from);
      store(dw + e, load(w + e) * __builtin_shuffle(f, from));
    }
  }
  for (; i < shape.I; i++)
    for (int64_t e = i * shape.K; e < (i + 1) * shape.K; e++)
      store1(dw + e, load1(w + e) * factors[i]);
}

template <typename T>
GK_INLINE void scale_columns(const T* w, T* dw, const Shape& shape, const Scalar<T>* factors) {
  for (int64_t k = 0; k < shape.K; k++, w += shape.I, dw += shape.I) {
    int64_t i = 0;
    for (; i + kLanes <= shape.I; i += kLanes) store(dw + i, load(w + i) * load(factors + i));
    if (i < shape.I)
      store_part(dw + i, load_part(w + i, shape.I - i) * load(factors + i), shape.I - i);
  }
}

template <typename T>
void weight_grad(const Shape& shape, const Scalar<T>* g, const Scalar<T>* squares, const T* w,
                 T* dw) {
  using V = Vec<T>;
  const int64_t width = shape.padded(), K = shape.rows ? shape.K : 0;
  Buffer<Lane<V>> channels(K * kLanes + 1);
  for (int64_t i = 0; i < K * kLanes; i++) channels[i] = static_cast<Lane<V>>(i / K);
  parallel(shape.O, shape.grain(), [&](int64_t begin, int64_t end) {
    Buffer<Scalar<T>> factors(width + 1);
    for (int64_t o = begin; o < end; o++) {
      for (int64_t i = 0; i < width; i += kLanes) {
        V sum{};
        for (int64_t n = 0; n < shape.N; n++)
          sum += g[n * shape.O + o] * load(squares + n * width + i);
        store(&factors[i], sum);
      }
      const int64_t at = o * shape.I * shape.K;
      if (shape.rows)
        scale_rows(w + at, dw + at, shape, &factors[0], &channels[0]);
      else
        scale_columns(w + at, dw + at, shape, &factors[0]);
    }
  });
}

// Σ_o g q of kSamples samples and up to kWide vectors of channels.
template <typename V, typename S, bool kPart>
GK_INLINE void style_tile(const Shape& shape, const S* g, const S* q, int64_t samples, int64_t i,
                          V (&sums)[kSamples][kWide]) {
  for (int64_t o = 0; o < shape.O; o++) {
    const S* row = q + o * shape.I;
    for (int u = 0; u < kWide; u++) {
      const int64_t at = i + u * kLanes, left = shape.I - at;
      V v{};
      if (!kPart || left >= kLanes)
        v = load(row + at);
      else if (left > 0)
        v = load_part(row + at, left);
      for (int j = 0; j < kSamples; j++)
        if (j < samples) sums[j][u] += g[j * shape.O + o] * v;
    }
  }
}

template <typename T>
void style_grad(const Shape& shape, const Scalar<T>* g, const Scalar<T>* q, const void* styles,
                int dtype, void* ds) {
  using V = Vec<T>;
  using S = Scalar<T>;
  constexpr int64_t kColumns = kWide * kLanes;
  const int64_t columns = (shape.I + kColumns - 1) / kColumns;
  const int64_t groups = (shape.N + kSamples - 1) / kSamples;
  parallel(columns * groups, kGrain / (shape.O * kColumns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t n0 = t / columns * kSamples, i = t % columns * kColumns;
      const int64_t samples = shape.N - n0 < kSamples ? shape.N - n0 : kSamples;
      V sums[kSamples][kWide] = {};
      if (samples == kSamples && i + kColumns <= shape.I)
        style_tile<V, S, false>(shape, g + n0 * shape.O, q, kSamples, i, sums);
      else
        style_tile<V, S, true>(shape, g + n0 * shape.O, q, samples, i, sums);
      for (int64_t j = 0; j < samples; j++)
        for (int64_t c = 0; c < kColumns && i + c < shape.I; c++) {
          const int64_t at = (n0 + j) * shape.I + i + c;
          const S s = load_style<S>(styles, dtype, at);
          store_style<S>(ds, dtype, at, s * sums[j][c / kLanes][c % kLanes]);
        }
    }
  });
}

}  // namespace

int demod_coefs(int dtype, int styles_dtype, const void* w, const void* styles, void* d, void* q,
                int64_t N, int64_t O, int64_t I, int64_t K, bool channels_last, double eps, void*) {
  const Shape shape{N, O, I, K, !channels_last && K > 1};
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    return forward(shape, static_cast<const T*>(w), styles, styles_dtype, static_cast<S*>(d),
                   static_cast<S*>(q), static_cast<S>(eps));
  });
}

int demod_coefs_bwd(int dtype, int styles_dtype, const void* dd, const void* d, const void* q,
                    const void* w, const void* styles, void* dw, void* ds, int64_t N, int64_t O,
                    int64_t I, int64_t K, bool channels_last, double factor, void*) {
  const Shape shape{N, O, I, K, !channels_last && K > 1};
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    const S scale = static_cast<S>(-factor);
    Buffer<S> g(N * O + 1);
    for (int64_t e = 0; e < N * O; e++) {
      const S v = static_cast<const S*>(d)[e];
      g[e] = scale * static_cast<const S*>(dd)[e] * (v * v * v);
    }
    if (dw) {
      Buffer<S> squares(N * shape.padded() + 1);
      square_styles(shape, styles, styles_dtype, &squares[0]);
      weight_grad(shape, &g[0], &squares[0], static_cast<const T*>(w), static_cast<T*>(dw));
    }
    if (ds) style_grad<T>(shape, &g[0], static_cast<const S*>(q), styles, styles_dtype, ds);
    return 0;
  });
}

}  // namespace gankern::cpu::GANKERN_ISA
