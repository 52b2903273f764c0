// Toy kernels that are correct: what they compute, and what their accesses cost, is known.
#include "simt.h"

namespace {

__global__ void iota_kernel(float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = static_cast<float>(i);
}

// Sums 256 values a block: through shared memory, then through shuffles.
__global__ void block_sum_kernel(const float* x, float* out) {
  __shared__ float warps[8];
  float v = x[blockIdx.x * 256 + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int w = 0; w < 8; w++) sum += warps[w];
    out[blockIdx.x] = sum;
  }
}

}  // namespace

namespace toys {

int iota(float* out, int n, void* stream) {
  GK_LAUNCH((iota_kernel), (n + 127) / 128, 128, 0, stream, out, n);
  return cudaGetLastError();
}

int block_sum(const float* x, float* out, int blocks, void* stream) {
  GK_LAUNCH((block_sum_kernel), blocks, 256, 0, stream, x, out);
  return cudaGetLastError();
}

GK_EXPORT(iota);
GK_EXPORT(block_sum);

}  // namespace toys
