// adain for the dispatcher: checks, allocation, launch. The contract is gankern/ops/adain.py.
#include "common.h"

GANKERN_KERNEL(int64_t, adain_workspace, int dtype, int64_t outer, int64_t length, int64_t inner)
GANKERN_KERNEL(int, adain, int dtype, int style_dtype, const void* x, const void* scale,
               const void* shift, void* y, void* mean, void* rstd, void* workspace, int64_t outer,
               int64_t length, int64_t inner, double eps, void* stream)
GANKERN_KERNEL(int64_t, adain_bwd_workspace, int dtype, int64_t outer, int64_t length,
               int64_t inner)
GANKERN_KERNEL(int, adain_bwd, int dtype, int style_dtype, const void* dy, const void* x,
               const void* scale, const void* mean, const void* rstd, void* dx, void* dscale,
               void* dshift, void* workspace, int64_t outer, int64_t length, int64_t inner,
               void* stream)

namespace gankern {
namespace {

constexpr const char* kOp = "adain";

void check_style(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(1), kOp, ": ", name,
                  " must be (N, C) = (", x.size(0), ", ", x.size(1), "), got ", t.dim(),
                  " dimensions of ", t.numel(), " elements");
}

// x as (N, C, P) or, in channels-last memory, (N, P, C); other layouts are copied.
Tensor planes(const Tensor& x) { return is_channels_last(x) ? x.lent() : row_major(x); }

struct Shape {
  int64_t outer, length, inner;
};
Shape shape_of(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1);
  const int64_t pixels = x.numel() ? x.numel() / (n * c) : 0;
  if (x.is_contiguous()) return {n * c, pixels, 1};
  return {n, pixels, c};
}

ScalarType statistic_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Where rstd is in the statistics (2, N, C), behind the means at `first`.
template <typename P>
P* second_plane(const Tensor& statistics, P* first) {
  using Bytes = std::conditional_t<std::is_const_v<P>, const char, char>;
  return static_cast<Bytes*>(first) + statistics.numel() / 2 * statistics.element_size();
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Tensor& scale_in,
                                   const Tensor& shift_in, double eps) {
  STD_TORCH_CHECK(x_in.dim() >= 3, kOp, ": x must be (N, C, *), got ", x_in.dim(), " dimensions");
  const int code = dtype_code(kOp, "x", x_in);
  check_style("scale", scale_in, x_in);
  check_style("shift", shift_in, x_in);
  const int style = param_code(kOp, "scale", scale_in, code);
  STD_TORCH_CHECK(shift_in.scalar_type() == scale_in.scalar_type(), kOp, ": shift must be ",
                  dtype_name(scale_in.scalar_type()), " like scale, got ",
                  dtype_name(shift_in.scalar_type()));
  const Tensor x = planes(x_in);
  const Tensor scale = row_major(scale_in);
  const Tensor shift = row_major(shift_in);
  Tensor y = fresh_like(x);
  const Shape s = shape_of(x);
  const Launch launch(x);
  const int64_t bytes = kernels::adain_workspace(code, s.outer, s.length, s.inner);
  auto [statistics, workspace] =
      empty_with_workspace(x, {2, x.size(0), x.size(1)}, statistic_type(x), bytes);
  if (x.numel() == 0) zero(statistics);
  void* mean = statistics.mutable_data_ptr();
  launch.check(kOp, kernels::adain(code, style, x.const_data_ptr(), scale.const_data_ptr(),
                                   shift.const_data_ptr(), y.mutable_data_ptr(), mean,
                                   second_plane(statistics, mean), workspace, s.outer, s.length,
                                   s.inner, eps, launch.stream));
  return {std::move(y), std::move(statistics)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy_in, const Tensor& x_in,
                                            const Tensor& scale_in, const Tensor& statistics_in) {
  const int code = dtype_code(kOp, "x", x_in);
  STD_TORCH_CHECK(same_sizes(dy_in, x_in) && dy_in.scalar_type() == x_in.scalar_type(), kOp,
                  ": dy must have x's shape and dtype");
  check_style("scale", scale_in, x_in);
  STD_TORCH_CHECK(statistics_in.dim() == 3 && statistics_in.size(0) == 2 &&
                      statistics_in.size(1) == x_in.size(0) &&
                      statistics_in.size(2) == x_in.size(1) &&
                      statistics_in.scalar_type() == statistic_type(x_in),
                  kOp, ": statistics must be (2, N, C) of ", dtype_name(statistic_type(x_in)));
  const int style = param_code(kOp, "scale", scale_in, code);
  const Tensor x = planes(x_in), dy = laid_out_like(dy_in, x);
  const Tensor scale = row_major(scale_in);
  const Tensor statistics = row_major(statistics_in);
  const void* mean = statistics.const_data_ptr();
  Tensor dx = fresh_like(x);
  const Shape s = shape_of(x);
  const Launch launch(x);
  const int64_t bytes = kernels::adain_bwd_workspace(code, s.outer, s.length, s.inner);
  auto [dscale, workspace] =
      empty_with_workspace(scale, {scale.size(0), scale.size(1)}, scale.scalar_type(), bytes);
  Tensor dshift = fresh_like(scale);
  if (x.numel() == 0) {
    zero(dscale);
    zero(dshift);
  }
  launch.check(kOp, kernels::adain_bwd(code, style, dy.const_data_ptr(), x.const_data_ptr(),
                                       scale.const_data_ptr(), mean, second_plane(statistics, mean),
                                       dx.mutable_data_ptr(), dscale.mutable_data_ptr(),
                                       dshift.mutable_data_ptr(), workspace, s.outer, s.length,
                                       s.inner, launch.stream));
  return {std::move(dx), std::move(dscale), std::move(dshift)};
}

}  // namespace

GANKERN_SCHEMAS(m) {
  m.def("adain(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor, Tensor)");
  m.def(
      "adain_bwd(Tensor dy, Tensor x, Tensor scale, Tensor statistics) -> (Tensor, Tensor, "
      "Tensor)");
}

GANKERN_IMPLS(m) {
  implement<&forward>(m, "adain");
  implement<&backward>(m, "adain_bwd");
}

}  // namespace gankern
