// bias_act for the dispatcher: checks, allocation, launch. The contract is gankern/ops/bias_act.py.
#include "common.h"

GANKERN_KERNEL(int, bias_act, int dtype, int bdtype, const void* x, const void* b, void* y,
               int64_t outer, int64_t C, int64_t inner, int act, double alpha, double gain,
               double clamp, void* stream)
GANKERN_KERNEL(int64_t, bias_act_bwd_workspace, int dtype, int64_t outer, int64_t C, int64_t inner)
GANKERN_KERNEL(int, bias_act_bwd, int dtype, int bdtype, const void* dy, const void* ref,
               const void* b, void* dx, void* db, void* workspace, int64_t outer, int64_t C,
               int64_t inner, int act, double alpha, double gain, double clamp, bool from_x,
               void* stream)
GANKERN_KERNEL(int, bias_act_bwd2, int dtype, int bdtype, const void* dy, const void* v,
               const void* ref, const void* b, void* dref, int64_t outer, int64_t C, int64_t inner,
               int act, double alpha, double gain, double clamp, bool from_x, void* stream)

namespace gankern {
namespace {

constexpr const char* kOp = "bias_act";

int check_bias(const Tensor& x, const MaybeTensor& b, int64_t dim, int x_code) {
  STD_TORCH_CHECK(dim >= 0 && dim < x.dim(), kOp, ": dim must be in [0, ", x.dim(), "), got ", dim);
  if (!b) return x_code;
  STD_TORCH_CHECK(b->dim() == 1 && b->size(0) == x.size(dim), kOp, ": b must have shape (",
                  x.size(dim), "), got ", b->dim(), " dimensions of ", b->numel(), " elements");
  return param_code(kOp, "b", *b, x_code);
}

Tensor forward(const Tensor& x_in, const MaybeTensor& b_in, int64_t dim, int64_t act, double alpha,
               double gain, double clamp) {
  const int code = dtype_code(kOp, "x", x_in);
  const int b_code = check_bias(x_in, b_in, dim, code);
  const Tensor x = dense(x_in);
  const MaybeTensor b = b_in ? MaybeTensor(row_major(*b_in)) : std::nullopt;
  Tensor y = fresh_like(x);
  const Around a = around(x, dim);
  const Launch launch(x);
  launch.check(
      kOp, kernels::bias_act(code, b_code, x.const_data_ptr(), b ? b->const_data_ptr() : nullptr,
                             y.mutable_data_ptr(), a.outer, a.C, a.inner, static_cast<int>(act),
                             alpha, gain, clamp, launch.stream));
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy_in, const Tensor& ref_in,
                                    const MaybeTensor& b_in, int64_t dim, int64_t act, double alpha,
                                    double gain, double clamp, bool from_x, bool needs_db) {
  const int code = dtype_code(kOp, "dy", dy_in);
  const int b_code = check_bias(ref_in, b_in, dim, code);
  STD_TORCH_CHECK(same_sizes(dy_in, ref_in), kOp, ": dy must have y's shape");
  const Tensor ref = dense(ref_in), dy = laid_out_like(dy_in, ref);
  const MaybeTensor b = b_in ? MaybeTensor(row_major(*b_in)) : std::nullopt;
  Tensor dx = fresh_like(ref);
  const Around a = around(ref, dim);
  const auto b_type = b ? b->scalar_type() : ref.scalar_type();
  const Launch launch(ref);
  const int64_t bytes = needs_db ? kernels::bias_act_bwd_workspace(code, a.outer, a.C, a.inner) : 0;
  WithWorkspace db = empty_with_workspace(ref, {needs_db ? a.C : 0}, b_type, bytes);
  if (ref.numel() == 0 && needs_db) zero(db.out);
  launch.check(kOp, kernels::bias_act_bwd(
                        code, b_code, dy.const_data_ptr(), ref.const_data_ptr(),
                        b ? b->const_data_ptr() : nullptr, dx.mutable_data_ptr(),
                        needs_db ? db.out.mutable_data_ptr() : nullptr, db.workspace, a.outer, a.C,
                        a.inner, static_cast<int>(act), alpha, gain, clamp, from_x, launch.stream));
  return {std::move(dx), std::move(db.out)};
}

Tensor backward2(const Tensor& dy_in, const Tensor& v_in, const Tensor& ref_in,
                 const MaybeTensor& b_in, int64_t dim, int64_t act, double alpha, double gain,
                 double clamp, bool from_x) {
  const int code = dtype_code(kOp, "dy", dy_in);
  const int b_code = check_bias(ref_in, b_in, dim, code);
  STD_TORCH_CHECK(same_sizes(dy_in, ref_in) && same_sizes(v_in, ref_in), kOp,
                  ": dy and v must have y's shape");
  const Tensor ref = dense(ref_in), dy = laid_out_like(dy_in, ref), v = laid_out_like(v_in, ref);
  const MaybeTensor b = b_in ? MaybeTensor(row_major(*b_in)) : std::nullopt;
  Tensor dref = fresh_like(ref);
  const Around a = around(ref, dim);
  const Launch launch(ref);
  launch.check(kOp, kernels::bias_act_bwd2(
                        code, b_code, dy.const_data_ptr(), v.const_data_ptr(), ref.const_data_ptr(),
                        b ? b->const_data_ptr() : nullptr, dref.mutable_data_ptr(), a.outer, a.C,
                        a.inner, static_cast<int>(act), alpha, gain, clamp, from_x, launch.stream));
  return dref;
}

}  // namespace

GANKERN_SCHEMAS(m) {
  m.def(
      "bias_act(Tensor x, Tensor? b, int dim, int act, float alpha, float gain, float clamp) -> "
      "Tensor");
  m.def(
      "bias_act_bwd(Tensor dy, Tensor ref, Tensor? b, int dim, int act, float alpha, float gain, "
      "float clamp, bool from_x, bool needs_db) -> (Tensor, Tensor)");
  m.def(
      "bias_act_bwd2(Tensor dy, Tensor v, Tensor ref, Tensor? b, int dim, int act, float alpha, "
      "float gain, float clamp, bool from_x) -> Tensor");
}

GANKERN_IMPLS(m) {
  implement<&forward>(m, "bias_act");
  implement<&backward>(m, "bias_act_bwd");
  implement<&backward2>(m, "bias_act_bwd2");
}

}  // namespace gankern
