// batch_norm_act for the dispatcher: checks, allocation, launch. The contract is
// gankern/ops/batch_norm_act.py. The CPU alone has kernels.
#include "common.h"

GANKERN_KERNEL(int, batch_norm_act, int dtype, const void* x, const void* w, const void* b,
               void* running_mean, void* running_var, void* y, void* mean, void* rstd,
               int64_t outer, int64_t C, int64_t inner, double eps, double momentum, int act,
               double alpha, double gain)
GANKERN_KERNEL(int, batch_norm_act_bwd, int dtype, const void* dy, const void* x, const void* w,
               const void* b, const void* mean, const void* rstd, void* dx, void* dw, void* db,
               int64_t outer, int64_t C, int64_t inner, int act, double alpha, double gain)

namespace gankern {
namespace {

constexpr const char* kOp = "batch_norm_act";

ScalarType parameter_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A tensor of one value a channel, as x's statistics are computed.
const Tensor& checked(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == x.size(1) && t.is_contiguous() &&
                      t.scalar_type() == parameter_type(x),
                  kOp, ": ", name, " must be contiguous ", dtype_name(parameter_type(x)),
                  " of shape (", x.size(1), "), got ", dtype_name(t.scalar_type()), " of ", t.dim(),
                  " dimensions and ", t.numel(), " elements");
  return t;
}

int check_x(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.numel() > x.size(1), kOp,
                  ": x must be (N, C, *) with more than one value a channel, got ", x.dim(),
                  " dimensions and ", x.numel(), " elements");
  return dtype_code(kOp, "x", x);
}

int check_act(int64_t act) {
  STD_TORCH_CHECK(0 <= act && act <= 2, kOp, ": act must be linear, relu or lrelu, got ", act);
  return static_cast<int>(act);
}

// Where rstd is in the statistics (2, C), behind the means at `first`.
template <typename P>
P* second_row(const Tensor& statistics, P* first) {
  using Bytes = std::conditional_t<std::is_const_v<P>, const char, char>;
  return static_cast<Bytes*>(first) + statistics.numel() / 2 * statistics.element_size();
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Tensor& w, const Tensor& b,
                                   const Tensor& running_mean, const Tensor& running_var,
                                   double eps, double momentum, int64_t act, double alpha,
                                   double gain) {
  const int code = check_x(x_in);
  const Tensor x = dense(x_in);
  Tensor y = fresh_like(x);
  Tensor statistics = empty_beside(x, {2, x.size(1)}, parameter_type(x));
  void* mean = statistics.mutable_data_ptr();
  const Around a = around(x, 1);
  kernels::batch_norm_act(code, x.const_data_ptr(), checked("weight", w, x).const_data_ptr(),
                          checked("bias", b, x).const_data_ptr(),
                          checked("running_mean", running_mean, x).mutable_data_ptr(),
                          checked("running_var", running_var, x).mutable_data_ptr(),
                          y.mutable_data_ptr(), mean, second_row(statistics, mean), a.outer, a.C,
                          a.inner, eps, momentum, check_act(act), alpha, gain);
  return {std::move(y), std::move(statistics)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy_in, const Tensor& x_in,
                                            const Tensor& w, const Tensor& b,
                                            const Tensor& statistics, int64_t act, double alpha,
                                            double gain) {
  const int code = check_x(x_in);
  STD_TORCH_CHECK(same_sizes(dy_in, x_in) && dy_in.scalar_type() == x_in.scalar_type(), kOp,
                  ": dy must have x's shape and dtype");
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == 2 &&
                      statistics.size(1) == x_in.size(1) && statistics.is_contiguous() &&
                      statistics.scalar_type() == parameter_type(x_in),
                  kOp, ": statistics must be contiguous ", dtype_name(parameter_type(x_in)),
                  " of shape (2, C)");
  const Tensor x = dense(x_in), dy = laid_out_like(dy_in, x);
  Tensor dx = fresh_like(x), dw = fresh_like(checked("weight", w, x)),
         db = fresh_like(checked("bias", b, x));
  const void* mean = statistics.const_data_ptr();
  const Around a = around(x, 1);
  kernels::batch_norm_act_bwd(code, dy.const_data_ptr(), x.const_data_ptr(), w.const_data_ptr(),
                              b.const_data_ptr(), mean, second_row(statistics, mean),
                              dx.mutable_data_ptr(), dw.mutable_data_ptr(), db.mutable_data_ptr(),
                              a.outer, a.C, a.inner, check_act(act), alpha, gain);
  return {std::move(dx), std::move(dw), std::move(db)};
}

}  // namespace

GANKERN_SCHEMAS(m) {
  m.def(
      "batch_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) "
      "running_var, float eps, float momentum, int act, float alpha, float gain) -> (Tensor, "
      "Tensor)");
  m.def(
      "batch_norm_act_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor statistics, int "
      "act, float alpha, float gain) -> (Tensor, Tensor, Tensor)");
}

GANKERN_IMPLS(m) {
  implement<&forward>(m, "batch_norm_act");
  implement<&backward>(m, "batch_norm_act_bwd");
}

}  // namespace gankern
