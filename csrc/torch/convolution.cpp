// convolution for the dispatcher: checks, allocation, launch. The contract is
// gankern/ops/convolution.py. The CPU alone has kernels.
#include "common.h"

GANKERN_KERNEL(int, convolution, int dtype, const void* x, const void* factors, const void* w,
               void* y, int64_t N, int64_t I, int64_t H, int64_t W, int64_t O, int64_t out_h,
               int64_t out_w, int64_t w_out, int64_t w_in, int taps, int stride, bool transposed,
               int64_t pad_y, int64_t pad_x)
GANKERN_KERNEL(int, convolution_weight_gradient, int dtype, const void* dy, const void* dy_factors,
               const void* x, const void* x_factors, void* dw, int64_t N, int64_t O, int64_t out_h,
               int64_t out_w, int64_t I, int64_t H, int64_t W, int taps, int stride, int64_t pad_y,
               int64_t pad_x)
GANKERN_KERNEL(int, convolution_last, int dtype, const void* x, const void* factors, const void* w,
               void* y, int64_t N, int64_t I, int64_t H, int64_t W, int64_t O, int64_t out_h,
               int64_t out_w, int64_t w_out, int64_t w_in, int taps, int stride, bool transposed,
               int64_t pad_y, int64_t pad_x)
GANKERN_KERNEL(int, convolution_last_weight_gradient, int dtype, const void* dy,
               const void* dy_factors, const void* x, const void* x_factors, void* dw, int64_t N,
               int64_t O, int64_t out_h, int64_t out_w, int64_t I, int64_t H, int64_t W, int taps,
               int stride, int64_t pad_y, int64_t pad_x)

namespace gankern {
namespace {

constexpr const char* kOp = "convolution";

void check(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, kOp, ": ", name, " must have 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, kOp, ": ", name, " must be float32, got ",
                  dtype_name(t.scalar_type()));
}

void check_form(int64_t taps, int64_t stride, int64_t pad_y, int64_t pad_x, bool last) {
  STD_TORCH_CHECK(taps == 3 || taps == 4, kOp, ": w must have 3x3 or 4x4 taps, got ", taps, "x",
                  taps);
  STD_TORCH_CHECK(stride == 2 || (stride == 1 && taps == 3), kOp, ": stride must be ",
                  taps == 3 ? "1 or 2" : "2", ", got ", stride);
  STD_TORCH_CHECK(taps == 3 || last, kOp, ": 4x4 taps take images in channels-last memory");
  const int64_t least = taps == 4 ? 1 : 0, most = stride == 1 ? 2 : least;
  STD_TORCH_CHECK(least <= std::min(pad_y, pad_x) && std::max(pad_y, pad_x) <= most, kOp,
                  ": padding must be from ", least, " to ", most, ", got ", pad_y, " and ", pad_x);
}

int64_t out_size(int64_t in, int64_t taps, int64_t stride, int64_t pad, bool transposed,
                 int64_t rest) {
  return transposed ? (in - 1) * stride + taps - 2 * pad + rest
                    : (in + 2 * pad - taps) / stride + 1;
}

// Factors [N, C] of images t, row by row; null without.
struct Factors {
  MaybeTensor rows;
  Factors(const char* name, const MaybeTensor& factors, const Tensor& t) {
    if (!factors) return;
    STD_TORCH_CHECK(
        factors->dim() == 2 && factors->size(0) == t.size(0) && factors->size(1) == t.size(1) &&
            factors->scalar_type() == ScalarType::Float,
        kOp, ": ", name, " must be float32 of shape (", t.size(0), ", ", t.size(1), "), got ",
        dtype_name(factors->scalar_type()), " of ", factors->numel(), " elements");
    rows = row_major(*factors);
  }
  const void* data() const { return rows ? rows->const_data_ptr() : nullptr; }
};

Tensor forward(const Tensor& x_in, const Tensor& w_in, const MaybeTensor& factors_in,
               int64_t stride, int64_t pad_y, int64_t pad_x, bool transposed, int64_t rest_y,
               int64_t rest_x) {
  check("x", x_in);
  check("w", w_in);
  const int64_t taps = w_in.size(3);
  const bool last = is_channels_last(x_in);
  check_form(taps, stride, pad_y, pad_x, last);
  const Tensor x = last ? x_in : row_major(x_in);
  const Factors factors("factors", factors_in, x);
  const Tensor w = w_in.stride(3) == 1 && w_in.stride(2) == taps ? w_in : row_major(w_in);
  const int in_dim = transposed ? 0 : 1;
  const int64_t N = x.size(0), I = x.size(1), O = w.size(1 - in_dim);
  STD_TORCH_CHECK(w.size(in_dim) == I && w.size(2) == taps, kOp, ": w must have ", I,
                  " channels in and square taps, got ", w.size(in_dim), " and ", w.size(2), "x",
                  taps);
  const int64_t out_h = out_size(x.size(2), taps, stride, pad_y, transposed, rest_y);
  const int64_t out_w = out_size(x.size(3), taps, stride, pad_x, transposed, rest_x);
  STD_TORCH_CHECK(out_h > 0 && out_w > 0, kOp, ": padding must leave an output, got ", out_h, "x",
                  out_w);
  const bool flipped = transposed && stride == 1;  // a correlation again, of flipped weights
  const auto run = [last](auto... args) {
    return last ? kernels::convolution_last(kF32, args...) : kernels::convolution(kF32, args...);
  };
  Tensor y = fresh_images(x, N, O, out_h, out_w, last);
  if (y.numel())
    run(x.const_data_ptr(), factors.data(), w.const_data_ptr(), y.mutable_data_ptr(), N, I,
        x.size(2), x.size(3), O, out_h, out_w, w.stride(1 - in_dim), w.stride(in_dim),
        static_cast<int>(taps), static_cast<int>(stride), transposed, flipped ? 2 - pad_y : pad_y,
        flipped ? 2 - pad_x : pad_x);
  return y;
}

Tensor weight_gradient(const Tensor& dy_in, const Tensor& x_in, const MaybeTensor& dy_factors_in,
                       const MaybeTensor& x_factors_in, int64_t taps, int64_t stride, int64_t pad_y,
                       int64_t pad_x) {
  check("dy", dy_in);
  check("x", x_in);
  const bool last = is_channels_last(dy_in) && is_channels_last(x_in);
  check_form(taps, stride, pad_y, pad_x, last);
  const Tensor dy = last ? dy_in : row_major(dy_in);
  const Tensor x = last ? x_in : row_major(x_in);
  const Factors dy_factors("dy_factors", dy_factors_in, dy),
      x_factors("x_factors", x_factors_in, x);
  const int64_t N = x.size(0), O = dy.size(1), I = x.size(1);
  STD_TORCH_CHECK(dy.size(0) == N &&
                      dy.size(2) <= out_size(x.size(2), taps, stride, pad_y, false, 0) &&
                      dy.size(3) <= out_size(x.size(3), taps, stride, pad_x, false, 0),
                  kOp, ": dy must have the shape of the convolution's output");
  Tensor dw = empty_beside(x, {O, I, taps, taps});
  const auto run = [last](auto... args) {
    return last ? kernels::convolution_last_weight_gradient(kF32, args...)
                : kernels::convolution_weight_gradient(kF32, args...);
  };
  if (dw.numel())
    run(dy.const_data_ptr(), dy_factors.data(), x.const_data_ptr(), x_factors.data(),
        dw.mutable_data_ptr(), N, O, dy.size(2), dy.size(3), I, x.size(2), x.size(3),
        static_cast<int>(taps), static_cast<int>(stride), pad_y, pad_x);
  return dw;
}

}  // namespace

GANKERN_SCHEMAS(m) {
  m.def(
      "convolution(Tensor x, Tensor w, Tensor? factors, int stride, int pad_y, int pad_x, bool "
      "transposed, int rest_y, "
      "int rest_x) -> Tensor");
  m.def(
      "convolution_weight_gradient(Tensor dy, Tensor x, Tensor? dy_factors, Tensor? x_factors, int "
      "taps, int stride, int pad_y, int pad_x) -> Tensor");
}

GANKERN_IMPLS(m) {
  m.impl("convolution", TORCH_BOX(&forward));
  m.impl("convolution_weight_gradient", TORCH_BOX(&weight_gradient));
}

}  // namespace gankern
