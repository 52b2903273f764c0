// upfirdn2d for the dispatcher: checks, allocation, launch. The contract is
// gankern/ops/upfirdn2d.py.
#include "common.h"

GANKERN_KERNEL(int, upfirdn2d, int dtype, const void* x, const void* f, void* y, bool last,
               int64_t N, int64_t C, int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w,
               int64_t taps_y, int64_t taps_x, bool separable, int64_t up_x, int64_t up_y,
               int64_t down_x, int64_t down_y, int64_t pad_x, int64_t pad_y, bool flip, double gain,
               void* stream)

namespace gankern {
namespace {

constexpr const char* kOp = "upfirdn2d";

Tensor forward(const Tensor& x_in, const Tensor& f_in, int64_t up_x, int64_t up_y, int64_t down_x,
               int64_t down_y, int64_t x0, int64_t x1, int64_t y0, int64_t y1, bool flip_filter,
               double gain) {
  const int code = dtype_code(kOp, "x", x_in);
  STD_TORCH_CHECK(x_in.dim() == 4, kOp, ": x must be a tensor of shape (N, C, H, W), got ",
                  x_in.dim(), " dimensions");
  STD_TORCH_CHECK((f_in.dim() == 1 || f_in.dim() == 2) && f_in.numel() > 0, kOp,
                  ": f must be a tensor of shape (taps,) or (taps_y, taps_x), got ", f_in.dim(),
                  " dimensions of ", f_in.numel(), " elements");
  const ScalarType f_type = code == kF64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(f_in.scalar_type() == f_type, kOp, ": f must be ", dtype_name(f_type), ", got ",
                  dtype_name(f_in.scalar_type()));
  STD_TORCH_CHECK(up_x > 0 && up_y > 0, kOp, ": up must be 2 positive ints");
  STD_TORCH_CHECK(down_x > 0 && down_y > 0, kOp, ": down must be 2 positive ints");

  const bool separable = f_in.dim() == 1;
  const int64_t taps_y = f_in.size(0), taps_x = f_in.size(separable ? 0 : 1);
  const int64_t N = x_in.size(0), C = x_in.size(1), H = x_in.size(2), W = x_in.size(3);
  const int64_t width = W * up_x + x0 + x1 - taps_x;
  const int64_t height = H * up_y + y0 + y1 - taps_y;
  STD_TORCH_CHECK(width >= 0 && height >= 0, kOp, ": padding must leave at least the ", taps_y, "x",
                  taps_x, " samples of f, got ", height + taps_y, "x", width + taps_x);
  const int64_t out_w = width / down_x + 1, out_h = height / down_y + 1;

  const bool last = is_channels_last(x_in);
  const Tensor x = last ? x_in.lent() : row_major(x_in), f = row_major(f_in);
  Tensor y = fresh_images(x, N, C, out_h, out_w, last);
  const Launch launch(x);
  launch.check(
      kOp, kernels::upfirdn2d(code, x.const_data_ptr(), f.const_data_ptr(), y.mutable_data_ptr(),
                              last, N, C, H, W, out_h, out_w, taps_y, taps_x, separable, up_x, up_y,
                              down_x, down_y, x0, y0, flip_filter, gain, launch.stream));
  return y;
}

}  // namespace

GANKERN_SCHEMAS(m) {
  m.def(
      "upfirdn2d(Tensor x, Tensor f, int up_x, int up_y, int down_x, int down_y, int x0, int x1, "
      "int y0, int y1, bool flip_filter, float gain) -> Tensor");
}

GANKERN_IMPLS(m) { implement<&forward>(m, "upfirdn2d"); }

}  // namespace gankern
