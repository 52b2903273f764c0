// Filters of upfirdn2d and synthesis_epilogue.
#pragma once

#include "vec.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

// The filter as correlation taps, gain included, and its factors if it is an outer product.
template <typename S>
struct Filter {
  Buffer<S> full, x, y;
  bool one_d, separable;

  template <typename F>
  Filter(const F* f, bool one_d, int64_t ny, int64_t nx, bool flip, double gain)
      : full(ny * nx), x(nx), y(ny), one_d(one_d), separable(one_d) {
    for (int64_t i = 0; i < ny; i++) {
      y[i] = f[flip ? i : ny - 1 - i];
      for (int64_t j = 0; j < nx && one_d; j++) x[j] = S(f[flip ? j : nx - 1 - j] * gain);
      for (int64_t j = 0; j < nx && !one_d; j++)
        full[i * nx + j] = S(f[flip ? i * nx + j : ny * nx - 1 - i * nx - j] * gain);
    }
    if (!one_d && ny * nx > 0) factorise(ny, nx);
  }

  void factorise(int64_t ny, int64_t nx) {
    int64_t at = 0;
    for (int64_t k = 1; k < ny * nx; k++)
      if (std::fabs(full[k]) > std::fabs(full[at])) at = k;
    const S peak = full[at];
    const int64_t row = at / nx, column = at % nx;
    const S tolerance = std::fabs(peak) * (sizeof(S) == 4 ? S(6e-8) : S(2e-16));
    separable = std::isfinite(peak);
    for (int64_t j = 0; j < nx; j++) x[j] = full[row * nx + j];
    for (int64_t i = 0; i < ny; i++) y[i] = peak == 0 ? S(0) : full[i * nx + column] / peak;
    for (int64_t i = 0; i < ny; i++)
      for (int64_t j = 0; j < nx; j++)
        if (!(std::fabs(full[i * nx + j] - x[j] * y[i]) <= tolerance)) separable = false;
  }
};

}  // namespace
}  // namespace gankern::cpu::GANKERN_ISA
