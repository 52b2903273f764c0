// What a convolution may do with its output before it is written: synthesis_epilogue, unfiltered.
#pragma once

#include <cstdint>

namespace gankern::cpu {

// y = clamp(act(y * d[n, c] + noise * strength + b[c]) * gain); null: left out.
struct Finish {
  const float *d, *noise, *strength, *b;
  int64_t noise_n, strength_n;  // 1, or one for each sample, each channel
  int act;
  float alpha, gain, clamp;  // clamp < 0: none
};

}  // namespace gankern::cpu
