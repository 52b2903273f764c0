// Toy kernels whose results and costs are known by hand: every collective, atomics, access
// patterns.
#include "simt.h"

namespace {

// y[i] = x[i * stride] by one warp.
template <typename T>
__global__ void strided_kernel(const T* x, T* y, int stride) {
  y[threadIdx.x] = x[threadIdx.x * stride];
}

// Reads tile[lane * stride] of shared memory, elements of T.
template <typename T>
__global__ void banks_kernel(float* y, int stride) {
  GK_DYNAMIC_SHARED(T, tile);
  for (int i = threadIdx.x; i < 32 * stride; i += 32) tile[i] = T();
  __syncthreads();
  const T v = tile[threadIdx.x * stride];
  y[threadIdx.x] = *reinterpret_cast<const float*>(&v);
}

// Lanes below `split` take another way through the code, with the same accesses.
__global__ void diverged_kernel(const float* x, float* y, int split) {
  const int i = threadIdx.x;
  float v = 0;
  if (i < split)
    for (int k = 0; k < 2; k++) v += x[k * 32 + i];
  else
    v = x[i];
  y[i] = v;
}

__global__ void collectives_kernel(const int* x, int* y) {
  const int i = threadIdx.x, v = x[i];
  y[i] = __shfl_sync(0xffffffffu, v, 3, 8);
  y[32 + i] = __shfl_up_sync(0xffffffffu, v, 2, 16);
  y[64 + i] = __shfl_down_sync(0xffffffffu, v, 5);
  y[96 + i] = __shfl_xor_sync(0xffffffffu, v, 7);
  y[128 + i] = __ballot_sync(0xffffffffu, v & 1);
  y[160 + i] = __all_sync(0xffffffffu, v >= 0) + 2 * __any_sync(0xffffffffu, v == 31);
  y[192 + i] = __syncthreads_count(v & 1);
  y[224 + i] = __syncthreads_and(v < 31) + 2 * __syncthreads_or(v == 31);
  // Two halves of a warp, each with its own mask, at different places.
  int half = 0;
  if (i < 16)
    half = __shfl_sync(0x0000ffffu, v, 5);
  else
    half = __shfl_sync(0xffff0000u, v, 20);
  y[256 + i] = half;
}

__global__ void atomics_kernel(int* n, float* sum, unsigned* wrap) {
  atomicAdd(n, 1);
  atomicMax(n + 1, static_cast<int>(threadIdx.x));
  atomicMin(n + 2, -static_cast<int>(threadIdx.x));
  atomicOr(n + 3, 1 << threadIdx.x % 8);
  atomicCAS(n + 4, 0, 7);
  atomicAdd(sum, 0.5f);
  atomicInc(wrap, 9);
}

__global__ void types_kernel(const __half* h, const __nv_bfloat16* b, float4* y) {
  const int i = blockIdx.y * gridDim.x * blockDim.x * blockDim.y +
                (blockIdx.x * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  y[i] = make_float4(__half2float(h[i]), __bfloat162float(b[i]), rsqrtf(4.0f),
                     __int_as_float(__float_as_int(1.5f) + __popc(0)));
}

}  // namespace

namespace toys {

int strided_f32(const float* x, float* y, int stride, void*) {
  GK_LAUNCH((strided_kernel<float>), 1, 32, 0, nullptr, x, y, stride);
  return cudaGetLastError();
}
int strided_f16(const void* x, void* y, int stride, void*) {
  GK_LAUNCH((strided_kernel<__half>), 1, 32, 0, nullptr, static_cast<const __half*>(x),
            static_cast<__half*>(y), stride);
  return cudaGetLastError();
}
int strided_f32x4(const void* x, void* y, int stride, void*) {
  GK_LAUNCH((strided_kernel<float4>), 1, 32, 0, nullptr, static_cast<const float4*>(x),
            static_cast<float4*>(y), stride);
  return cudaGetLastError();
}
int banks_f32(float* y, int stride, void*) {
  GK_LAUNCH((banks_kernel<float>), 1, 32, 32 * stride * 4, nullptr, y, stride);
  return cudaGetLastError();
}
int banks_f64(float* y, int stride, void*) {
  GK_LAUNCH((banks_kernel<double>), 1, 32, 32 * stride * 8, nullptr, y, stride);
  return cudaGetLastError();
}
int banks_f32x4(float* y, int stride, void*) {
  GK_LAUNCH((banks_kernel<float4>), 1, 32, 32 * stride * 16, nullptr, y, stride);
  return cudaGetLastError();
}
int diverged(const float* x, float* y, int split, void*) {
  GK_LAUNCH((diverged_kernel), 1, 32, 0, nullptr, x, y, split);
  return cudaGetLastError();
}
int collectives(const int* x, int* y, void*) {
  GK_LAUNCH((collectives_kernel), 1, 32, 0, nullptr, x, y);
  return cudaGetLastError();
}
int atomics(int* n, float* sum, unsigned* wrap, void*) {
  GK_LAUNCH((atomics_kernel), 2, 48, 0, nullptr, n, sum, wrap);
  return cudaGetLastError();
}
int types(const void* h, const void* b, void* y, void*) {
  GK_LAUNCH((types_kernel), dim3(2, 3), dim3(4, 8), 0, nullptr, static_cast<const __half*>(h),
            static_cast<const __nv_bfloat16*>(b), static_cast<float4*>(y));
  return cudaGetLastError();
}

GK_EXPORT(strided_f32);
GK_EXPORT(strided_f16);
GK_EXPORT(strided_f32x4);
GK_EXPORT(banks_f32);
GK_EXPORT(banks_f64);
GK_EXPORT(banks_f32x4);
GK_EXPORT(diverged);
GK_EXPORT(collectives);
GK_EXPORT(atomics);
GK_EXPORT(types);

}  // namespace toys
