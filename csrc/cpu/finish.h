// What a convolution may do with its output before it is written.
#pragma once

#include <cstdint>

namespace gankern::cpu {

// The unfiltered synthesis_epilogue:
// y = clamp(act(y * d[n, c] + noise * strength + b[c]) * gain); null: left out.
// Or, where there is an x of y's shape, the gradients of x * d: y * d, and dots[n, c] = Σ y * x.
struct Finish {
  const float *d, *noise, *strength, *b;
  int64_t noise_n, strength_n;  // 1, or one for each sample, each channel
  int act;
  float alpha, gain, clamp;  // clamp < 0: none
  const float* x;
  float* dots;
};

}  // namespace gankern::cpu
