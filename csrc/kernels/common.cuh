// What every kernel shares: launching, element types, packed 16-byte access.
//
// Under nvcc this is plain CUDA. With -DGANKERN_SIMT, g++ builds the same kernels for the CPU
// (csrc/simt), which supplies the three macros below in its own way.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../dtype.h"

#ifdef GANKERN_SIMT
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// The kernel goes in parentheses, for the commas of its template arguments.
#define GK_LAUNCH(kernel, grid, block, smem, stream, ...) \
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define GK_DYNAMIC_SHARED(T, name)                         \
  extern __shared__ __align__(16) unsigned char gk_smem[]; \
  T* name = reinterpret_cast<T*>(gk_smem)
#define GK_EXPORT(launcher)
#endif

#ifndef GANKERN_BACKEND
#define GANKERN_BACKEND cuda
#endif

namespace gankern {
namespace {

// 16-bit types accumulate in float32.
template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

// A number of 16 bits, float16 or bfloat16: a kernel is compiled once for both, and which of them
// it is comes with its arguments, in a Format.
struct Half16 {
  unsigned short bits;
};

template <typename T>
struct Format {  // of float and double: nothing is left to know
  __host__ __device__ explicit Format(int) {}
};
template <>
struct Format<Half16> {
  __host__ __device__ explicit Format(int dtype) : bf16(dtype == kBF16) {}
  bool bf16;
};

__device__ __forceinline__ float to_acc(float v, Format<float>) { return v; }
__device__ __forceinline__ double to_acc(double v, Format<double>) { return v; }
__device__ __forceinline__ float to_acc(Half16 v, Format<Half16> format) {
  return format.bf16 ? __bfloat162float(__ushort_as_bfloat16(v.bits))
                     : __half2float(__ushort_as_half(v.bits));
}

template <typename T>
__device__ __forceinline__ T from_acc(Acc<T> v, Format<T> format) {
  if constexpr (std::is_same<T, Half16>::value)
    return {format.bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v))
                        : __half_as_ushort(__float2half_rn(v))};
  else
    return v;
}

template <int kBytes>
struct RawOf;
template <>
struct RawOf<16> {
  using type = uint4;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<4> {
  using type = unsigned int;
};
template <>
struct RawOf<2> {
  using type = unsigned short;
};

// N elements moved by one load or store instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  using Raw = typename RawOf<sizeof(T) * N>::type;
  Pack<T, N> out;
  *reinterpret_cast<Raw*>(&out) = *reinterpret_cast<const Raw*>(p);
  return out;
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& value) {
  using Raw = typename RawOf<sizeof(T) * N>::type;
  *reinterpret_cast<Raw*>(p) = *reinterpret_cast<const Raw*>(&value);
}

// A pack as the words that were loaded: the compiler would keep each element of 16 bits in a
// register of its own.
template <typename T, int N>
using Raw = typename RawOf<sizeof(T) * N>::type;
template <typename T, int N>
__device__ __forceinline__ Raw<T, N> load_raw(const T* p) {
  return *reinterpret_cast<const Raw<T, N>*>(p);
}

// store_pack() to global memory, in one instruction where the compiler would take the pack apart,
// as it does where elements are also used one by one.
template <typename T, int N>
__device__ __forceinline__ void store_whole(T* p, const Pack<T, N>& value) {
#ifdef __CUDA_ARCH__
  constexpr int kWords = sizeof(T) * N / 4;
  if constexpr (kWords == 4 || kWords == 2) {
    const unsigned* w = reinterpret_cast<const unsigned*>(&value);
    if constexpr (kWords == 4)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]),
                   "r"(w[2]), "r"(w[3])
                   : "memory");
    else
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
    return;
  }
#endif
  store_pack<T, N>(p, value);
}

// Begins to copy a pack to shared memory, from sm_80 on without registers in between; zeros where
// `from` is not inside. Copies are in batches: copy_wait<n>() waits for all but the last n.
template <typename T, int N>
__device__ __forceinline__ void copy_pack(T* to, const T* from, bool inside = true) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr int kBytes = sizeof(T) * N;
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
#else
  store_pack<T, N>(to, inside ? load_pack<T, N>(from) : Pack<T, N>{});
#endif
}
__device__ __forceinline__ void copy_batch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int n>
__device__ __forceinline__ void copy_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// The elements of a pack as numbers to reckon with, and back; one branch serves the whole pack.
template <typename T, int N>
__device__ __forceinline__ void widen(const Pack<T, N>& pack, Format<T> format, Acc<T> (&out)[N]) {
  if constexpr (std::is_same<T, Half16>::value) {
    if (format.bf16) {
#pragma unroll
      for (int j = 0; j < N; j++) out[j] = __bfloat162float(__ushort_as_bfloat16(pack.v[j].bits));
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++) {
    if constexpr (std::is_same<T, Half16>::value)
      out[j] = __half2float(__ushort_as_half(pack.v[j].bits));
    else
      out[j] = pack.v[j];
  }
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> narrow(const Acc<T> (&values)[N], Format<T> format) {
  Pack<T, N> pack;
  if constexpr (std::is_same<T, Half16>::value) {
    if (format.bf16) {
#pragma unroll
      for (int j = 0; j < N; j++)
        pack.v[j].bits = __bfloat16_as_ushort(__float2bfloat16_rn(values[j]));
      return pack;
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++) {
    if constexpr (std::is_same<T, Half16>::value)
      pack.v[j].bits = __half_as_ushort(__float2half_rn(values[j]));
    else
      pack.v[j] = values[j];
  }
  return pack;
}

// Calls f(format) with a format that the compiler knows, for loops to be compiled once for each.
template <typename T, typename F>
__device__ __forceinline__ void with_format(Format<T> format, F f) {
  if constexpr (std::is_same<T, Half16>::value) {
    if (format.bf16)
      f(Format<T>(kBF16));
    else
      f(Format<T>(kF16));
  } else {
    f(format);
  }
}

// Makes the compiler forget what it derived from v, so that widened values and addresses are
// computed again after the sums instead of being kept in registers, which would spill.
template <typename W>
__device__ __forceinline__ void forget(W& v) {
#ifndef GANKERN_SIMT
  if constexpr (sizeof(W) == 8)
    asm volatile("" : "+l"(v));
  else
    asm volatile("" : "+r"(v));
#endif
}

// Element i of a small operand (bias, styles, noise) that is float32 or has x's own type.
template <typename T>
__device__ __forceinline__ Acc<T> load_param(const void* p, bool is_f32, int64_t i,
                                             Format<T> format) {
  return is_f32 ? static_cast<Acc<T>>(static_cast<const float*>(p)[i])
                : to_acc(static_cast<const T*>(p)[i], format);
}

template <typename T>
__device__ __forceinline__ void store_param(void* p, bool is_f32, int64_t i, Acc<T> v,
                                            Format<T> format) {
  if (is_f32)
    static_cast<float*>(p)[i] = static_cast<float>(v);
  else
    static_cast<T*>(p)[i] = from_acc<T>(v, format);
}

// n / d for n < 4096, d <= 4096 with n d < 2^20; magic = magic_of(d).
__device__ __forceinline__ int quotient(int n, int magic) {
  return static_cast<int>(static_cast<unsigned>(n) * static_cast<unsigned>(magic) >> 20);
}
inline int magic_of(int d) { return ((1 << 20) + d - 1) / d; }

// f(0), ..., f(N - 1), each with an instruction of its own wherever this is compiled.
template <int N, typename F>
__device__ __forceinline__ void unrolled(F f) {
  if constexpr (N > 1) unrolled<N - 1>(f);
  f(std::integral_constant<int, N - 1>{});
}

// Sum over groups of `width` neighbouring lanes (a power of two up to 32); all lanes get it.
template <typename A>
__device__ __forceinline__ A warp_sum(A v, int width = 32) {
  for (int offset = width / 2; offset > 0; offset /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// True in every thread of the block that arrives last of `of` at a ticket, which was 0: it may read
// what all of them wrote before.
__device__ __forceinline__ bool arrives_last(int* ticket, int of) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    __threadfence();  // for the whole block, whose writes the barrier has shown to this thread
    const bool mine = atomicAdd(ticket, 1) == of - 1;
    if (mine) __threadfence();
    last = mine;
  }
  __syncthreads();
  return last;
}

// Calls f(T{}, Format<T>(dtype)) with the element type; the only place where dtypes become types.
template <typename F>
inline int by_width(int dtype, F f) {
  switch (dtype) {
    case kF32:
      return f(float{}, Format<float>(dtype));
    case kF64:
      return f(double{}, Format<double>(dtype));
    default:
      return f(Half16{}, Format<Half16>(dtype));
  }
}

inline int sm_count() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 108;
  return count;
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two that is at least n, between lo and hi.
inline int pow2_between(int64_t n, int lo, int hi) {
  int p = lo;
  while (p < n && p < hi) p *= 2;
  return p;
}

inline int log2_of(int power) {
  int log = 0;
  while (1 << log < power) log++;
  return log;
}

}  // namespace
}  // namespace gankern
