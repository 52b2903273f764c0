// CUDA's language and device functions for g++: a kernel's source, unchanged, runs on the CPU.
//
// csrc/kernels/common.cuh includes this instead of the CUDA runtime when GANKERN_SIMT is defined.
// runtime.cpp has the fibers, barriers and warps behind it; README.md says what it proves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <math.h>
#include <stdint.h>
#include <vector_functions.h>

#include <tuple>
#include <type_traits>
#include <utility>

// Kernels are static, so that AddressSanitizer guards the shared arrays of templates too.
#undef __global__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#define __global__ static
#define __shared__ static
#define __constant__ const
#define __launch_bounds__(...)
#define __builtin_assume(condition) ((condition) ? void() : __builtin_unreachable())

#define SIMT_INLINE inline __attribute__((always_inline))
#define SIMT_UNCHECKED __attribute__((noinline, no_sanitize("thread", "address")))

// The runtime sets these before it resumes a thread; to a kernel they are constants. (All uint3:
// reads of a dim3, which has a constructor, would count as accesses.)
extern const uint3 threadIdx __asm__("simt_threadIdx");
extern const uint3 blockIdx __asm__("simt_blockIdx");
extern const uint3 blockDim __asm__("simt_blockDim");
extern const uint3 gridDim __asm__("simt_gridDim");
#define warpSize 32

namespace simt {

enum class WarpOp : int { kSync, kIdx, kUp, kDown, kXor, kBallot, kAll, kAny };
enum class BlockOp : int { kSync, kCount, kAnd, kOr };

int block_barrier(BlockOp op, int predicate);
uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int arg, int width);
void* dynamic_shared();
void device_fence();
void sleep();
void on_atomic(const void* address, int size, const void* pc, bool writes = true);
[[noreturn]] void trap();

// launch() runs a grid to its end; it throws simt::Error, which names kernel, thread and line.
struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t smem;
  void (*call)(void*);
  void* args;
};
void launch(const Launch& what);

template <typename... P, typename... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem,
            A&&... args) {
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  Call call(kernel, std::tuple<P...>(std::forward<A>(args)...));
  launch({name, reinterpret_cast<const void*>(kernel), grid, block, smem,
          [](void* p) { std::apply(static_cast<Call*>(p)->first, static_cast<Call*>(p)->second); },
          &call});
}

// A launcher as Python calls it: what each parameter is, and a call through untyped values.
union Value {
  void* pointer;
  int64_t integer;
  double real;
};
struct Parameter {
  char kind;  // 'r' const pointer, 'w' pointer, 'i' integer, 'f' float
  int size;   // of the pointed-to type, 0 for void
};
struct Export {
  const char* name;
  const void* function;
  int64_t (*call)(const void*, const Value*);
  const Parameter* parameters;
  int count;
  bool returns_error;
};
bool add_export(const Export& launcher);

template <typename P>
constexpr Parameter parameter() {
  if constexpr (std::is_pointer_v<P>) {
    using T = std::remove_pointer_t<P>;
    constexpr char kind = std::is_const_v<T> ? 'r' : 'w';
    if constexpr (std::is_void_v<T>)
      return {kind, 0};
    else
      return {kind, sizeof(T)};
  } else {
    return {std::is_floating_point_v<P> ? 'f' : 'i', sizeof(P)};
  }
}

template <typename P>
P unpack(const Value& v) {
  if constexpr (std::is_pointer_v<P>)
    return static_cast<P>(v.pointer);
  else if constexpr (std::is_floating_point_v<P>)
    return static_cast<P>(v.real);
  else
    return static_cast<P>(v.integer);
}

template <typename R, typename... P, size_t... I>
int64_t call_with(R (*f)(P...), const Value* v, std::index_sequence<I...>) {
  return static_cast<int64_t>(f(unpack<P>(v[I])...));
}

template <typename R, typename... P>
bool export_launcher(const char* name, R (*f)(P...)) {
  static constexpr Parameter parameters[] = {parameter<P>()...};
  constexpr int n = sizeof...(P);
  // The last void* is the stream.
  constexpr bool stream = n > 0 && parameters[n - 1].kind == 'w' && parameters[n - 1].size == 0;
  return add_export({name, reinterpret_cast<const void*>(f),
                     [](const void* g, const Value* v) {
                       return call_with(reinterpret_cast<R (*)(P...)>(const_cast<void*>(g)), v,
                                        std::index_sequence_for<P...>());
                     },
                     parameters, stream ? n - 1 : n, std::is_same_v<R, int>});
}

cudaError_t get_device(int* device);
cudaError_t get_attribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t memset_async(void* p, int value, size_t bytes, void* stream = nullptr);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <typename T, typename F>
SIMT_UNCHECKED T atomic(T* p, F f) {
  on_atomic(p, sizeof(T), __builtin_return_address(0));
  const T old = *p;
  *p = f(old);
  return old;
}

// A relaxed load of what others change by atomics: it acquires, and releases nothing.
template <typename T>
SIMT_UNCHECKED T look(const T* p) {
  on_atomic(p, sizeof(T), __builtin_return_address(0), false);
  return *p;
}

template <typename T>
SIMT_INLINE T shuffle(WarpOp op, unsigned mask, T value, int arg, int width) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(op, mask, bits, arg, width);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

// The kernel goes in parentheses, for the commas of its template arguments.
#define GK_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ::simt::launch(#kernel, kernel, grid, block, smem, ##__VA_ARGS__)
#define GK_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::simt::dynamic_shared())
#define GK_EXPORT(launcher)                                   \
  [[maybe_unused]] static const bool simt_export_##launcher = \
      ::simt::export_launcher(#launcher, &launcher)

#define cudaGetLastError() cudaSuccess
#define cudaPeekAtLastError() cudaSuccess
#define cudaGetDevice(device) ::simt::get_device(device)
#define cudaDeviceGetAttribute(...) ::simt::get_attribute(__VA_ARGS__)
#define cudaMemsetAsync(...) ::simt::memset_async(__VA_ARGS__)
#define cudaFuncSetAttribute(kernel, ...) \
  ::simt::set_attribute(reinterpret_cast<const void*>(kernel), __VA_ARGS__)

#include "simt_device.h"
