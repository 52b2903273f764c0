// The operands of synthesis_epilogue, checked: for it, and for a convolution that ends in it.
#pragma once

#include "common.h"

namespace gankern {
namespace epilogue {

inline constexpr const char* kOp = "synthesis_epilogue";

inline const void* data(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline MaybeTensor contiguous(const MaybeTensor& t) {
  return t ? MaybeTensor(row_major(*t)) : std::nullopt;
}

// What x is, which need not exist.
struct Shape {
  int code;
  int64_t N, C, H, W;
  bool last;  // channels-last
};

// Checked operands as the kernels want them, and the sizes that follow from them.
struct Operands : Shape {
  MaybeTensor f, d, noise, strength, b;
  int f32 = 0;
  int64_t out_h, out_w, taps_y = 1, taps_x = 1, noise_n = 1, strength_n = 1;
  bool separable = false;

  Operands(const Shape& x, const MaybeTensor& f_in, const MaybeTensor& d_in,
           const MaybeTensor& noise_in, const MaybeTensor& strength_in, const MaybeTensor& b_in,
           int64_t x0, int64_t x1, int64_t y0, int64_t y1)
      : Shape(x),
        f(contiguous(f_in)),
        d(contiguous(d_in)),
        noise(contiguous(noise_in)),
        strength(contiguous(strength_in)),
        b(contiguous(b_in)) {
    if (f) {
      STD_TORCH_CHECK(f->scalar_type() == ScalarType::Float, kOp,
                      ": f must be a float32 tensor or None, got ", dtype_name(f->scalar_type()));
      STD_TORCH_CHECK((f->dim() == 1 || f->dim() == 2) && f->numel() > 0, kOp,
                      ": f must be [taps_y, taps_x] or [taps], got ", f->dim(), " dimensions");
      separable = f->dim() == 1;
      taps_y = f->size(0), taps_x = f->size(f->dim() - 1);
      STD_TORCH_CHECK(taps_y <= 64 && taps_x <= 64, kOp,
                      ": f must have at most 64 taps a side, got ", taps_y, "x", taps_x);
    }
    STD_TORCH_CHECK(f || !(x0 | x1 | y0 | y1), kOp, ": padding wants a filter");
    out_h = H + y0 + y1 - taps_y + 1, out_w = W + x0 + x1 - taps_x + 1;
    STD_TORCH_CHECK(out_h >= 0 && out_w >= 0, kOp, ": padding must leave an output, got ", out_h,
                    "x", out_w);
    check_operand("d", d, 1, N * C);
    if (noise && noise->dim() > 2) noise_n = noise->size(0);
    STD_TORCH_CHECK(noise_n == 1 || noise_n == N, kOp, ": noise must be of 1 or ", N,
                    " samples, got ", noise_n);
    check_operand("noise", noise, 2, noise_n * out_h * out_w);
    if (strength) strength_n = strength->numel();
    check_operand("noise_strength", strength, 4, strength_n == 1 ? 1 : C);
    check_operand("b", b, 8, C);
  }

  void check_operand(const char* name, const MaybeTensor& t, int bit, int64_t elements) {
    if (!t) return;
    STD_TORCH_CHECK(t->numel() == elements, kOp, ": ", name, " must have ", elements,
                    " elements, got ", t->numel());
    if (param_code(kOp, name, *t, code) == kF32) f32 |= bit;
  }
};

}  // namespace epilogue
}  // namespace gankern
