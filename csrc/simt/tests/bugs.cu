// Toy kernels with one planted bug each, and their correct twins. A comment "// @name" marks a line
// that the report must name (python_tests/test_simt.py).
#include "simt.h"

namespace {

__global__ void divergent_exit_kernel(float* x) {
  if (threadIdx.x >= 40) return;
  __syncthreads();  // @divergent_exit
  x[threadIdx.x] = 1;
}

__global__ void divergent_branch_kernel(float* x) {
  if (threadIdx.x < 32) {
    x[threadIdx.x] = 1;
    __syncthreads();  // @divergent_branch_a
    x[threadIdx.x] += 2;
  } else {
    x[threadIdx.x] = 3;
    __syncthreads();  // @divergent_branch_b
    x[threadIdx.x] *= 4;
  }
}

__global__ void mask_without_caller_kernel(float* x) {
  x[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 0);  // @mask_without_caller
}

__global__ void lanes_elsewhere_kernel(float* x) {
  float v = x[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);  // @lanes_elsewhere
  __syncthreads();                                               // @lanes_elsewhere_wait
  x[threadIdx.x] = v;
}

__global__ void mixed_collectives_kernel(float* x) {
  float v = x[threadIdx.x];
  if (threadIdx.x < 16)
    v = __shfl_xor_sync(0xffffffffu, v, 1);  // @mixed_a
  else
    v += __ballot_sync(0xffffffffu, 1);  // @mixed_b
  x[threadIdx.x] = v;
}

__global__ void exited_lane_kernel(float* x) {
  x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 16);  // @exited_lane
}

// kBarrier false: reads a neighbour's element before it is surely there.
template <bool kBarrier>
__global__ void reverse_kernel(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];  // @shared_race_write
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];  // @shared_race_read
}

// kBarrier false: the next turn's writes overtake this turn's reads.
template <bool kBarrier>
__global__ void loop_kernel(const float* x, float* y) {
  GK_DYNAMIC_SHARED(float, tile);
  for (int turn = 0; turn < 3; turn++) {
    tile[threadIdx.x] = x[threadIdx.x] + turn;  // @loop_race_write
    __syncthreads();
    y[threadIdx.x] = tile[63 - threadIdx.x];  // @loop_race_read
    if (kBarrier) __syncthreads();
  }
}

template <bool kSync>
__global__ void warp_kernel(const float* x, float* y) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];  // @warp_race_write
  if (kSync) __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];  // @warp_race_read
}

__global__ void block_race_kernel(float* y) {
  if (threadIdx.x == 0) y[0] = blockIdx.x;  // @block_race
}

__global__ void global_race_kernel(float* y) {
  y[threadIdx.x] = 1;                 // @global_race_write
  y[(threadIdx.x + 1) % 64] += 1.0f;  // @global_race_read
}

// The ticket of the last block. Each thread writes a partial; the last block adds all of them.
template <bool kFence, bool kBarrier, bool kOwnFence = false>
__global__ void ticket_kernel(const float* x, float* partials, int* ticket, float* out) {
  __shared__ bool last;
  partials[blockIdx.x * 64 + threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];  // @ticket_write
  if (kFence && !kOwnFence) __threadfence();
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (kFence && kOwnFence) __threadfence();
    last = atomicAdd(ticket, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x * 64; i++) sum += partials[i];  // @ticket_read
    *out = sum;
    *ticket = 0;
  }
}

// Each block publishes a number and waits for `wanted` of them; then it adds up all.
template <bool kFence, bool kStatic>
__global__ void others_kernel(float* numbers, int* published, float* sums, int wanted) {
  GK_DYNAMIC_SHARED(float, dynamic);
  float* kept = dynamic;
  if constexpr (kStatic) {
    __shared__ float fixed[1];
    kept = fixed;
  }
  if (threadIdx.x == 0) {
    kept[0] = blockIdx.x + 1;
    numbers[blockIdx.x] = kept[0];  // @others_write
    if (kFence) __threadfence();
    atomicAdd(published, 1);
    while (atomicAdd(published, 0) < wanted) __nanosleep(100);  // @others_wait
    if (kFence) __threadfence();
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  float sum = kept[0] / 64;
  for (unsigned i = 0; i < gridDim.x; i++) sum += numbers[i];  // @others_read
  sums[blockIdx.x] = sum;
}

__global__ void atomic_race_kernel(int* count, int* out) {
  atomicAdd(count, 1);          // @atomic_race_add
  out[threadIdx.x] = count[0];  // @atomic_race_read
}

__global__ void unwritten_shared_kernel(float* y) {
  __shared__ float tile[64];
  if (threadIdx.x < 63) tile[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];  // @unwritten_shared
}

__global__ void accumulate_kernel(float* y) { y[threadIdx.x] += 1; }  // @unwritten_global

__global__ void shift_kernel(const float* x, float* y, int n, int by) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i + by];  // @global_bounds
}

__global__ void write_const_kernel(const float* x) {
  const_cast<float*>(x)[threadIdx.x] = 0;  // @write_const
}

__global__ void misaligned_kernel(const float* x, float4* y) {
  y[threadIdx.x] = *reinterpret_cast<const float4*>(x + 1);  // @misaligned
}

__global__ void static_bounds_kernel(float* y, int i) {
  __shared__ float tile[40];
  tile[threadIdx.x % 40 + i] = 1;  // @static_bounds
  __syncthreads();
  y[threadIdx.x] = tile[0];
}

template <typename T, int N>
__global__ void template_bounds_kernel(T* y, int i) {
  __shared__ T tile[N];
  tile[threadIdx.x % N + i] = 1;  // @template_bounds
  __syncthreads();
  y[threadIdx.x] = tile[0];
}

__global__ void dynamic_bounds_kernel(float* y, int i) {
  GK_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + i] = 1;  // @dynamic_bounds
  y[threadIdx.x] = 1;
}

__global__ void local_bounds_kernel(float* y, int i) {
  float sums[8];
  for (int j = 0; j <= i; j++) sums[j] = y[threadIdx.x] * j;  // @local_bounds
  y[threadIdx.x] = sums[i / 2];
}

__global__ void atomic_bounds_kernel(int* count, int i) {
  atomicAdd(count + i, 1);  // @atomic_bounds
}

__global__ void both_kinds_kernel(float* y) {
  GK_DYNAMIC_SHARED(float, shared);
  __shared__ float fixed[32];
  fixed[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  shared[threadIdx.x] = fixed[31 - threadIdx.x];
  y[threadIdx.x] = shared[threadIdx.x] + 1;
}

__global__ void nothing_kernel() {}

}  // namespace

namespace toys {

#define TOY(name, grid, block, smem, kernel, parameters, ...)     \
  int name parameters {                                           \
    GK_LAUNCH(kernel, grid, block, smem, nullptr, ##__VA_ARGS__); \
    return cudaGetLastError();                                    \
  }                                                               \
  GK_EXPORT(name)

TOY(divergent_exit, 1, 64, 0, (divergent_exit_kernel), (float* x), x);
TOY(divergent_branch, 1, 64, 0, (divergent_branch_kernel), (float* x), x);
TOY(mask_without_caller, 1, 32, 0, (mask_without_caller_kernel), (float* x), x);
TOY(lanes_elsewhere, 1, 32, 0, (lanes_elsewhere_kernel), (float* x), x);
TOY(mixed_collectives, 1, 32, 0, (mixed_collectives_kernel), (float* x), x);
TOY(exited_lane, 1, 16, 0, (exited_lane_kernel), (float* x), x);
TOY(shared_race, 1, 64, 0, (reverse_kernel<false>), (const float* x, float* y), x, y);
TOY(shared_right, 1, 64, 0, (reverse_kernel<true>), (const float* x, float* y), x, y);
TOY(loop_race, 1, 64, 256, (loop_kernel<false>), (const float* x, float* y), x, y);
TOY(loop_right, 1, 64, 256, (loop_kernel<true>), (const float* x, float* y), x, y);
TOY(warp_race, 1, 32, 0, (warp_kernel<false>), (const float* x, float* y), x, y);
TOY(warp_right, 1, 32, 0, (warp_kernel<true>), (const float* x, float* y), x, y);
TOY(block_race, 2, 32, 0, (block_race_kernel), (float* y), y);
TOY(global_race, 1, 64, 0, (global_race_kernel), (float* y), y);
#define TICKET(name, ...)                           \
  TOY(name, 3, 64, 0, (ticket_kernel<__VA_ARGS__>), \
      (const float* x, float* partials, int* ticket, float* out), x, partials, ticket, out)
TICKET(ticket_right, true, true);
TICKET(ticket_own_fence, true, true, true);
TICKET(ticket_without_fence, false, true);
TICKET(ticket_without_barrier, true, false);
#define OTHERS(name, ...)                                                                       \
  TOY(name, blocks, 32, smem, (others_kernel<__VA_ARGS__>),                                     \
      (float* numbers, int* published, float* sums, int wanted, int blocks, int smem), numbers, \
      published, sums, wanted)
OTHERS(others_right, true, false);
OTHERS(others_without_fence, false, false);
OTHERS(others_static, true, true);
TOY(atomic_race, 1, 64, 0, (atomic_race_kernel), (int* count, int* out), count, out);
TOY(unwritten_shared, 1, 64, 0, (unwritten_shared_kernel), (float* y), y);
TOY(accumulate, 1, 64, 0, (accumulate_kernel), (float* y), y);
TOY(shift, 1, 64, 0, (shift_kernel), (const float* x, float* y, int n, int by), x, y, n, by);
TOY(write_const, 1, 32, 0, (write_const_kernel), (const float* x), x);
TOY(misaligned, 1, 1, 0, (misaligned_kernel), (const float* x, void* y, int /*unused*/), x,
    static_cast<float4*>(y));
TOY(static_bounds, 1, 64, 0, (static_bounds_kernel), (float* y, int i), y, i);
TOY(template_bounds, 1, 64, 0, (template_bounds_kernel<float, 40>), (float* y, int i), y, i);
TOY(dynamic_bounds, 1, 64, 256, (dynamic_bounds_kernel), (float* y, int i), y, i);
TOY(local_bounds, 1, 32, 0, (local_bounds_kernel), (float* y, int i), y, i);
TOY(atomic_bounds, 1, 1, 0, (atomic_bounds_kernel), (int* count, int i), count, i);
TOY(any_launch, dim3(gx, gy, gz), dim3(bx, by, bz), smem, (nothing_kernel),
    (int gx, int gy, int gz, int bx, int by, int bz, int smem));
TOY(shared_of_both_kinds, 1, 32, smem, (both_kinds_kernel), (float* y, int smem), y);
TOY(no_dynamic, 1, 64, 0, (dynamic_bounds_kernel), (float* y, int i), y, i);

int opt_in(int smem, void*) {
  const cudaError_t error =
      cudaFuncSetAttribute((nothing_kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (error != cudaSuccess) return error;
  GK_LAUNCH((nothing_kernel), 1, 32, smem, nullptr);
  return cudaGetLastError();
}
GK_EXPORT(opt_in);

}  // namespace toys
