// upfirdn2d in NCHW with 4 taps at one rate, where rows of the result are not whole vectors: see
// lines.cuh.
#pragma once

#include "lines.cuh"
#include "upfirdn2d.cuh"

namespace gankern {
namespace {

// As filter_lines() takes it: x0 and y0 are the padding, planes the channels of one sample.
template <typename T>
struct LineFilter {
  const T *x, *x_end;
  T* out;
  const float* f;
  int N, C, H, W, out_h, out_w, taps_y, taps_x, x0, y0;
  bool separable, flip;
  float filter_gain;
  Format<T> format{kF32};
  LinePlan lines;
};

struct LineResult {  // the filter's, as it is
  __device__ __forceinline__ float param(int, int, int) const { return 0.f; }
  __device__ __forceinline__ void copy_noise(float*, const volatile LineStrip&, const LanePlace&,
                                             int) const {}
  __device__ __forceinline__ void have_noise(float*, const LanePlace&) const {}
  template <typename U, typename Read, typename Noise>
  __device__ __forceinline__ void finish(U&, const float (&)[3], Read, const Noise&) const {}
};

// More threads than there are ever: 56 registers, so that seven blocks of a 257-pixel row's 160
// threads have room.
template <typename T>
__global__ void __launch_bounds__(kLineThreads<T> + 64, kLineBlocks<T>)
    upfirdn2d_lines_kernel(LineFilter<T> a) {
  filter_lines<T, 2>(a, LineResult{});
}

template <typename T>
int launch_lines(const Args& p, void* stream) {
  if (p.images > INT32_MAX) return -1;
  const LinePlan t = plan_lines<T>(false, false, 1, p.images, p.w.out, p.h.out, p.w.in, p.w.out,
                                   p.w.pad, aligned16(p.y), shared_limit());
  const int64_t blocks = t.blocks(1, p.images);
  if (blocks > INT32_MAX) return -1;
  const T* x = static_cast<const T*>(p.x);
  const LineFilter<T> a{x,
                        x + p.images * p.h.in * p.w.in,
                        static_cast<T*>(p.y),
                        static_cast<const float*>(p.f),
                        1,
                        static_cast<int>(p.images),
                        p.h.in,
                        p.w.in,
                        p.h.out,
                        p.w.out,
                        p.h.taps,
                        p.w.taps,
                        p.w.pad,
                        p.h.pad,
                        p.separable,
                        p.flip,
                        static_cast<float>(p.gain),
                        Format<T>(p.dtype),
                        t};
  if (t.shared > 44 * 1024) {
    const cudaError_t e = cudaFuncSetAttribute(
        upfirdn2d_lines_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, t.shared);
    if (e != cudaSuccess) return static_cast<int>(e);
  }
  GK_LAUNCH((upfirdn2d_lines_kernel<T>), dim3(static_cast<unsigned>(blocks)), dim3(t.threads()),
            t.shared, stream, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace gankern
