// Vectors for the CPU kernels: kLanes floats (or doubles), loads and stores of every element type,
// exp and its relatives, and torch's threads.
//
// A file of csrc/cpu is compiled once per instruction set, so that everything here has internal
// linkage: no function built for AVX may be shared with the base build. No torch header, no
// standard containers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../dtype.h"

// Vectors wider than the machine's are passed only within a file.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace gankern::cpu {

using Body = void (*)(void*, int64_t, int64_t);
void parallel_for(int64_t n, int64_t grain, Body body, void* context);
void* take_scratch(size_t& bytes);
void put_scratch(void* data, size_t bytes);
extern bool poisons_scratch;  // for tests: it is full of NaN

namespace GANKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef double vd __attribute__((vector_size(kLanes * 8)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vu16 __attribute__((vector_size(kLanes * 2)));

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

#define GK_INLINE inline __attribute__((always_inline))

// The vector and scalar that elements of type T are computed in.
template <typename T>
struct ComputeOf {
  using vec = vf;
  using scalar = float;
};
template <>
struct ComputeOf<double> {
  using vec = vd;
  using scalar = double;
};
template <typename T>
using Vec = typename ComputeOf<T>::vec;
template <typename T>
using Scalar = typename ComputeOf<T>::scalar;

template <typename V, typename S>
GK_INLINE V splat(S s) {
  return V{} + static_cast<std::remove_reference_t<decltype(V{}[0])>>(s);
}

// --- Conversions of the 16-bit types, round to nearest even.

GK_INLINE vf widen(vu16 h, f16) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  const vu bits = __builtin_convertvector(h, vu);
  const vu magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const vf scaled = (vf)magnitude * 0x1p112f;         // exponent bias 15 -> 127
  const vi special = (vi)(bits & 0x7c00u) == 0x7c00;  // infinity or NaN
  return (vf)((special ? (vu)(magnitude | 0x7f800000u) : (vu)scaled) | sign);
#endif
}

GK_INLINE vu16 narrow(vf v, f16) {
#if defined(__AVX512F__)
  return (vu16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (vu16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const vu bits = (vu)v, sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // Normal numbers: rebias, round to even. Subnormal: the float adder rounds.
  const vu odd = (magnitude >> 13) & 1u;
  const vu normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
  vu h = (vi)magnitude < (113 << 23) ? subnormal : normal;
  h = (vi)magnitude >= 0x477ff000 ? splat<vu>(0x7c00u) : h;  // rounds to infinity
  h = (vi)magnitude > 0x7f800000 ? splat<vu>(0x7e00u) : h;   // NaN
  return __builtin_convertvector(h | (sign >> 16), vu16);
#endif
}

GK_INLINE vf widen(vu16 h, bf16) { return (vf)(__builtin_convertvector(h, vu) << 16); }

GK_INLINE vu16 narrow(vf v, bf16) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((v != v) ? quiet : rounded, vu16);
}

// --- Loads and stores of kLanes elements, unaligned.

template <typename T>
GK_INLINE vf load(const T* p) {
  vu16 h;
  memcpy(&h, p, sizeof h);
  return widen(h, T{});
}
template <>
GK_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
GK_INLINE vd load(const double* p) {
  vd v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
GK_INLINE void store(T* p, vf v) {
  const vu16 h = narrow(v, T{});
  memcpy(p, &h, sizeof h);
}
GK_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
GK_INLINE void store(double* p, vd v) { memcpy(p, &v, sizeof v); }

// The first n <= kLanes elements; lanes beyond are zero.
template <typename T>
GK_INLINE Vec<T> load_part(const T* p, int64_t n) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return (vf)_mm512_maskz_loadu_ps(mask, p);
  if constexpr (sizeof(T) == 2) return widen((vu16)_mm256_maskz_loadu_epi16(mask, p), T{});
#endif
  T buffer[kLanes] = {};
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <typename T>
GK_INLINE void store_part(T* p, Vec<T> v, int64_t n) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, mask, (__m512)v);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(v, T{}));
#endif
  T buffer[kLanes];
  store(buffer, v);
  memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

template <typename T>
GK_INLINE Scalar<T> load1(const T* p) {
  return load_part(p, 1)[0];
}
GK_INLINE float load1(const float* p) { return *p; }
GK_INLINE double load1(const double* p) { return *p; }
template <typename T>
GK_INLINE void store1(T* p, Scalar<T> v) {
  store_part(p, splat<Vec<T>>(v), 1);
}
GK_INLINE void store1(float* p, float v) { *p = v; }
GK_INLINE void store1(double* p, double v) { *p = v; }

// A small operand beside x that is float32 or has x's dtype, as compute scalars.
template <typename T>
GK_INLINE Scalar<T> load_param(const void* p, bool is_f32, int64_t i) {
  return is_f32 ? static_cast<Scalar<T>>(static_cast<const float*>(p)[i])
                : static_cast<Scalar<T>>(load1(static_cast<const T*>(p) + i));
}
template <typename T>
GK_INLINE void store_param(void* p, bool is_f32, int64_t i, Scalar<T> v) {
  if (is_f32)
    static_cast<float*>(p)[i] = static_cast<float>(v);
  else
    store1(static_cast<T*>(p) + i, v);
}

template <typename V>
GK_INLINE auto sum_lanes(V v) {
  auto s = v[0];
  for (int i = 1; i < kLanes; i++) s += v[i];
  return s;
}

typedef int64_t Indices64 __attribute__((vector_size(kLanes * 8)));

// Even and odd elements of the 2 * kLanes in a and b, and back.
template <typename V>
GK_INLINE void unzip(V a, V b, V& even, V& odd) {
  using I = std::conditional_t<sizeof(V) == sizeof(vf), vi, Indices64>;
  I e, o;
  for (int i = 0; i < kLanes; i++) e[i] = 2 * i, o[i] = 2 * i + 1;
  even = __builtin_shuffle(a, b, e);
  odd = __builtin_shuffle(a, b, o);
}
template <typename V>
GK_INLINE void zip(V even, V odd, V& a, V& b) {
  using I = std::conditional_t<sizeof(V) == sizeof(vf), vi, Indices64>;
  I lo, hi;
  for (int i = 0; i < kLanes; i++) {
    lo[i] = i / 2 + i % 2 * kLanes;
    hi[i] = lo[i] + kLanes / 2;
  }
  a = __builtin_shuffle(even, odd, lo);
  b = __builtin_shuffle(even, odd, hi);
}

// Row i of kLanes vectors becomes lane i of each.
GK_INLINE void transpose(vf* rows) {
  for (int n = 1; n < kLanes; n *= 2) {
    vf turned[kLanes];
    for (int i = 0; i < kLanes / 2; i++)
      zip(rows[i], rows[i + kLanes / 2], turned[2 * i], turned[2 * i + 1]);
    for (int i = 0; i < kLanes; i++) rows[i] = turned[i];
  }
}

// --- exp and its relatives, within 2 units in the last place of float32.

GK_INLINE vf exp_(vf x) {
  const vf clipped = x > 88.8f ? splat<vf>(88.8f) : x < -104.f ? splat<vf>(-104.f) : x;
  const vf magic = splat<vf>(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = clipped * 1.44269504088896341f + magic;
  const vf k = shifted - magic;
  const vf r = (clipped - k * 0.693145751953125f) - k * 1.42860682030941723212e-6f;
  vf p = splat<vf>(1.9875691500e-4f);  // Cephes' minimax polynomial on [-ln2/2, ln2/2]
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // Scale by 2^k in two steps, so that subnormal results and 2^128 come out right.
  const vi n = __builtin_convertvector(k, vi), half = n >> 1;
  const vf scaled = p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
  return x == x ? scaled : x;
}

// ln(w) for normal w > 0.
GK_INLINE vf log_(vf w) {
  const vi bits = (vi)w;
  vi e = ((bits - 0x3f3504f3) >> 23);  // w = m * 2^e, m in [sqrt(1/2), sqrt(2))
  const vf m = (vf)(bits - (e << 23)) - 1.f, k = __builtin_convertvector(e, vf), z = m * m;
  vf p = splat<vf>(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  return (p * m * z + k * -2.12194440e-4f - 0.5f * z) + m + k * 0.693359375f;
}

GK_INLINE vf expm1_(vf x) {
  vf p = splat<vf>(1.f / 40320);
  p = p * x + 1.f / 5040;
  p = p * x + 1.f / 720;
  p = p * x + 1.f / 120;
  p = p * x + 1.f / 24;
  p = p * x + 1.f / 6;
  p = p * x + 0.5f;
  const vf small = p * x * x + x;
  return (x < 0.4f) & (x > -0.4f) ? small : exp_(x) - 1.f;
}

// ln(1 + z) for z in [0, 1]: the rounding error of 1 + z is put back.
GK_INLINE vf log1p_(vf z) {
  const vf w = 1.f + z;
  return log_(w) + (z - (w - 1.f)) / w;
}

GK_INLINE vf tanh_(vf x) {
  const vf e = expm1_((x < 0.f ? x : -x) * 2.f);  // in (-1, 0]
  const vf t = -e / (e + 2.f);
  return x < 0.f ? -t : t;
}

#define GK_BY_LANE(name, f)                          \
  __attribute__((noinline, unused)) vd name(vd x) {  \
    for (int i = 0; i < kLanes; i++) x[i] = f(x[i]); \
    return x;                                        \
  }
GK_BY_LANE(exp_, std::exp)
GK_BY_LANE(expm1_, std::expm1)
GK_BY_LANE(log1p_, std::log1p)
GK_BY_LANE(tanh_, std::tanh)
#undef GK_BY_LANE

// --- Scratch, dispatch and threads.

// Uninitialised scratch of n elements, on a cache line's boundary: a vector that lies across two
// takes two loads. A few elements lie in the Buffer: a tiny image's filter has fifteen of them.
template <typename S>
class Buffer {
 public:
  explicit Buffer(int64_t n) : bytes_(static_cast<size_t>(n) * sizeof(S)) {
    if (bytes_ <= sizeof few_) {
      data_ = few_;
      if (poisons_scratch) memset(few_, 0xff, sizeof few_);
    } else {
      data_ = static_cast<S*>(take_scratch(bytes_));
    }
  }
  ~Buffer() {
    if (data_ != few_) put_scratch(data_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  S& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_;
  S* data_;
  alignas(64) S few_[320 / sizeof(S)];
};

// Calls f with a value of the element type; the only place where dtypes become types. float64 is
// for gradient checks: only the base build has it, and csrc/torch/common.h sends it there.
template <typename F>
GK_INLINE int by_dtype(int dtype, const F& f) {
  switch (dtype) {
    case kF32:
      return f(float{});
    case kF16:
      return f(f16{});
    case kBF16:
      return f(bf16{});
    default:
#if defined(__AVX2__)
      return -1;
#else
      return f(double{});
#endif
  }
}

// f(begin, end) over [0, n) on torch's threads, at least `grain` items each.
template <typename F>
GK_INLINE void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= grain || n == 1) {  // no other thread would take part
    if (n > 0) f(int64_t(0), n);
    return;
  }
  auto body = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const F*>(context))(begin, end);
  };
  parallel_for(n, grain < 1 ? 1 : grain, body, const_cast<F*>(&f));
}

}  // namespace
}  // namespace GANKERN_ISA
}  // namespace gankern::cpu
