// CUDA's device functions: barriers, warp collectives, atomics, intrinsics. Included by simt.h.
#pragma once

SIMT_INLINE void __syncthreads() { simt::block_barrier(simt::BlockOp::kSync, 0); }
SIMT_INLINE int __syncthreads_count(int p) { return simt::block_barrier(simt::BlockOp::kCount, p); }
SIMT_INLINE int __syncthreads_and(int p) { return simt::block_barrier(simt::BlockOp::kAnd, p); }
SIMT_INLINE int __syncthreads_or(int p) { return simt::block_barrier(simt::BlockOp::kOr, p); }
SIMT_INLINE void __threadfence() { simt::device_fence(); }
SIMT_INLINE void __nanosleep(unsigned) { simt::sleep(); }

SIMT_INLINE void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::warp_collective(simt::WarpOp::kSync, mask, 0, 0, 32);
}
template <typename T>
SIMT_INLINE T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return simt::shuffle(simt::WarpOp::kIdx, mask, value, lane, width);
}
template <typename T>
SIMT_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle(simt::WarpOp::kUp, mask, value, delta, width);
}
template <typename T>
SIMT_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle(simt::WarpOp::kDown, mask, value, delta, width);
}
template <typename T>
SIMT_INLINE T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return simt::shuffle(simt::WarpOp::kXor, mask, value, lane_mask, width);
}
SIMT_INLINE unsigned __ballot_sync(unsigned mask, int p) {
  return simt::warp_collective(simt::WarpOp::kBallot, mask, p != 0, 0, 32);
}
SIMT_INLINE int __all_sync(unsigned mask, int p) {
  return simt::warp_collective(simt::WarpOp::kAll, mask, p != 0, 0, 32);
}
SIMT_INLINE int __any_sync(unsigned mask, int p) {
  return simt::warp_collective(simt::WarpOp::kAny, mask, p != 0, 0, 32);
}

// The second argument is deduced apart, so that atomicAdd(unsigned*, 1) compiles as in CUDA.
#define SIMT_ATOMIC(name, result)                                          \
  template <typename T>                                                    \
  SIMT_INLINE T name(T* p, std::common_type_t<T> v) {                      \
    return simt::atomic(p, [v](T old) { return static_cast<T>(result); }); \
  }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicSub, old - v)
SIMT_ATOMIC(atomicExch, (void(old), v))
SIMT_ATOMIC(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicMax, v > old ? v : old)
SIMT_ATOMIC(atomicAnd, old& v)
SIMT_ATOMIC(atomicOr, old | v)
SIMT_ATOMIC(atomicXor, old ^ v)
SIMT_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef SIMT_ATOMIC
template <typename T>
SIMT_INLINE T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v) {
  return simt::atomic(p, [=](T old) { return old == expected ? v : old; });
}

template <typename T>
SIMT_INLINE T __ldg(const T* p) {
  return *p;
}
template <typename T>
SIMT_INLINE T __ldcg(const T* p) {
  return *p;
}
template <typename T>
SIMT_INLINE T __ldca(const T* p) {
  return *p;
}
template <typename T>
SIMT_INLINE T __ldcs(const T* p) {
  return *p;
}
template <typename T>
SIMT_INLINE void __stcg(T* p, T v) {
  *p = v;
}
template <typename T>
SIMT_INLINE void __stcs(T* p, T v) {
  *p = v;
}
template <typename T>
SIMT_INLINE void __stwt(T* p, T v) {
  *p = v;
}

// min and max as CUDA overloads them: of floats, a number wins over NaN.
#define SIMT_MIN_MAX(T)                                 \
  SIMT_INLINE T min(T a, T b) { return b < a ? b : a; } \
  SIMT_INLINE T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
SIMT_INLINE float min(float a, float b) { return fminf(a, b); }
SIMT_INLINE float max(float a, float b) { return fmaxf(a, b); }
SIMT_INLINE double min(double a, double b) { return fmin(a, b); }
SIMT_INLINE double max(double a, double b) { return fmax(a, b); }

SIMT_INLINE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
SIMT_INLINE double rsqrt(double x) { return 1.0 / sqrt(x); }
SIMT_INLINE float rcbrtf(float x) { return 1.0f / cbrtf(x); }
SIMT_INLINE float __expf(float x) { return expf(x); }
SIMT_INLINE float __exp10f(float x) { return powf(10.0f, x); }
SIMT_INLINE float __logf(float x) { return logf(x); }
SIMT_INLINE float __log2f(float x) { return log2f(x); }
SIMT_INLINE float __log10f(float x) { return log10f(x); }
SIMT_INLINE float __powf(float x, float y) { return powf(x, y); }
SIMT_INLINE float __sinf(float x) { return sinf(x); }
SIMT_INLINE float __cosf(float x) { return cosf(x); }
SIMT_INLINE float __tanhf(float x) { return tanhf(x); }
SIMT_INLINE float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
SIMT_INLINE float __fdividef(float a, float b) { return a / b; }
SIMT_INLINE float __fdiv_rn(float a, float b) { return a / b; }
SIMT_INLINE float __frcp_rn(float x) { return 1.0f / x; }
SIMT_INLINE float __fsqrt_rn(float x) { return sqrtf(x); }
SIMT_INLINE float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
SIMT_INLINE float __fsub_rn(float a, float b) { return a - b; }
SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
SIMT_INLINE double __dadd_rn(double a, double b) { return a + b; }
SIMT_INLINE double __dmul_rn(double a, double b) { return a * b; }
SIMT_INLINE double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

template <typename To, typename From>
SIMT_INLINE To simt_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
SIMT_INLINE int __float_as_int(float x) { return simt_bit_cast<int>(x); }
SIMT_INLINE unsigned __float_as_uint(float x) { return simt_bit_cast<unsigned>(x); }
SIMT_INLINE float __int_as_float(int x) { return simt_bit_cast<float>(x); }
SIMT_INLINE float __uint_as_float(unsigned x) { return simt_bit_cast<float>(x); }
SIMT_INLINE long long __double_as_longlong(double x) { return simt_bit_cast<long long>(x); }
SIMT_INLINE double __longlong_as_double(long long x) { return simt_bit_cast<double>(x); }
SIMT_INLINE int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
SIMT_INLINE int __float2int_rz(float x) { return static_cast<int>(x); }
SIMT_INLINE int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
SIMT_INLINE float __int2float_rn(int x) { return static_cast<float>(x); }

SIMT_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
SIMT_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
SIMT_INLINE int __clz(int x) { return x ? __builtin_clz(x) : 32; }
SIMT_INLINE int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
SIMT_INLINE int __ffs(int x) { return __builtin_ffs(x); }
SIMT_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
SIMT_INLINE unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
SIMT_INLINE int __mulhi(int a, int b) {
  return static_cast<int>((static_cast<int64_t>(a) * b) >> 32);
}
SIMT_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
SIMT_INLINE unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= ((x >> i) & 1u) << (31 - i);
  return reversed;
}
SIMT_INLINE void __trap() { simt::trap(); }
