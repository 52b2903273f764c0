// pixel_norm for the dispatcher: checks, allocation, launch. Contract: gankern/ops/pixel_norm.py.
#include "common.h"

GANKERN_KERNEL(int, pixel_norm, int dtype, const void* x, void* y, int64_t outer, int64_t length,
               int64_t inner, double eps, void* stream)
GANKERN_KERNEL(int, pixel_norm_bwd, int dtype, const void* dy, const void* x, void* dx,
               int64_t outer, int64_t length, int64_t inner, double eps, void* stream)
GANKERN_KERNEL(int, pixel_norm_bwd2, int dtype, const void* g, const void* dy, const void* x,
               void* d_dy, void* d_x, int64_t outer, int64_t length, int64_t inner, double eps,
               void* stream)

namespace gankern {
namespace {

constexpr const char* kOp = "pixel_norm";

int check(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(dim >= 0 && dim < x.dim(), kOp, ": dim must be in [0, ", x.dim(), "), got ", dim);
  return dtype_code(kOp, "x", x);
}

void check_like(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(same_sizes(t, x) && t.scalar_type() == x.scalar_type(), kOp, ": ", name,
                  " must have x's shape and dtype");
}

Tensor forward(const Tensor& x_in, int64_t dim, double eps) {
  const int code = check(x_in, dim);
  const Tensor x = dense(x_in);
  Tensor y = fresh_like(x);
  const Around a = around(x, dim);
  const Launch launch(x);
  launch.check(kOp, kernels::pixel_norm(code, x.const_data_ptr(), y.mutable_data_ptr(), a.outer,
                                        a.C, a.inner, eps, launch.stream));
  return y;
}

Tensor backward(const Tensor& dy_in, const Tensor& x_in, int64_t dim, double eps) {
  const int code = check(x_in, dim);
  check_like("dy", dy_in, x_in);
  const Tensor x = dense(x_in), dy = laid_out_like(dy_in, x);
  Tensor dx = fresh_like(x);
  const Around a = around(x, dim);
  const Launch launch(x);
  launch.check(kOp, kernels::pixel_norm_bwd(code, dy.const_data_ptr(), x.const_data_ptr(),
                                            dx.mutable_data_ptr(), a.outer, a.C, a.inner, eps,
                                            launch.stream));
  return dx;
}

std::tuple<Tensor, Tensor> backward2(const Tensor& g_in, const Tensor& dy_in, const Tensor& x_in,
                                     int64_t dim, double eps) {
  const int code = check(x_in, dim);
  check_like("g", g_in, x_in);
  check_like("dy", dy_in, x_in);
  const Tensor x = dense(x_in), dy = laid_out_like(dy_in, x), g = laid_out_like(g_in, x);
  Tensor d_dy = fresh_like(x), d_x = fresh_like(x);
  const Around a = around(x, dim);
  const Launch launch(x);
  launch.check(kOp, kernels::pixel_norm_bwd2(code, g.const_data_ptr(), dy.const_data_ptr(),
                                             x.const_data_ptr(), d_dy.mutable_data_ptr(),
                                             d_x.mutable_data_ptr(), a.outer, a.C, a.inner, eps,
                                             launch.stream));
  return {std::move(d_dy), std::move(d_x)};
}

}  // namespace

GANKERN_SCHEMAS(m) {
  m.def("pixel_norm(Tensor x, int dim, float eps) -> Tensor");
  m.def("pixel_norm_bwd(Tensor dy, Tensor x, int dim, float eps) -> Tensor");
  m.def("pixel_norm_bwd2(Tensor g, Tensor dy, Tensor x, int dim, float eps) -> (Tensor, Tensor)");
}

GANKERN_IMPLS(m) {
  implement<&forward>(m, "pixel_norm");
  implement<&backward>(m, "pixel_norm_bwd");
  implement<&backward2>(m, "pixel_norm_bwd2");
}

}  // namespace gankern
