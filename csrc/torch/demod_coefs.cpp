// demod_coefs for the dispatcher: checks, allocation, launch. Contract: gankern/ops/demod_coefs.py.
#include "common.h"

GANKERN_KERNEL(int, demod_coefs, int dtype, int styles_dtype, const void* w, const void* styles,
               void* d, void* q, int64_t N, int64_t O, int64_t I, int64_t K, bool channels_last,
               double eps, void* stream)
GANKERN_KERNEL(int, demod_coefs_bwd, int dtype, int styles_dtype, const void* dd, const void* d,
               const void* q, const void* w, const void* styles, void* dw, void* ds, int64_t N,
               int64_t O, int64_t I, int64_t K, bool channels_last, double factor, void* stream)

namespace gankern {
namespace {

constexpr const char* kOp = "demod_coefs";

// The operands as the kernels take them.
struct Operands {
  Operands(const Tensor& weight_in, const Tensor& styles_in)
      : channels_last(is_channels_last(weight_in)),
        weight(channels_last ? weight_in.lent() : row_major(weight_in)),
        styles(row_major(styles_in)),
        code(dtype_code(kOp, "weight", weight)),
        styles_code(dtype_code(kOp, "styles", styles)) {
    STD_TORCH_CHECK(weight.dim() == 4, kOp, ": weight must be (O, I, kh, kw), got ", weight.dim(),
                    " dimensions");
    O = weight.size(0), I = weight.size(1), K = weight.size(2) * weight.size(3);
    STD_TORCH_CHECK(styles.dim() == 2 && styles.size(1) == I, kOp, ": styles must be (N, ", I, ")");
    STD_TORCH_CHECK((code == kF64) == (styles_code == kF64), kOp,
                    ": weight and styles must both be float64, or neither");
    N = styles.size(0);
    const int64_t limit = int64_t(1) << 31;
    STD_TORCH_CHECK(N < limit && O < limit && I < limit && K < limit, kOp,
                    ": each size must be under 2**31");
  }
  ScalarType sum_type() const { return code == kF64 ? ScalarType::Double : ScalarType::Float; }

  bool channels_last;
  Tensor weight, styles;
  int code, styles_code;
  int64_t N, O, I, K;
};

std::tuple<Tensor, Tensor> forward(const Tensor& weight, const Tensor& styles, double eps) {
  const Operands a(weight, styles);
  Tensor d = empty_beside(a.weight, {a.N, a.O}, a.sum_type());
  Tensor q = empty_beside(a.weight, {a.O, a.I}, a.sum_type());
  const Launch launch(a.weight);
  launch.check(kOp, kernels::demod_coefs(a.code, a.styles_code, a.weight.const_data_ptr(),
                                         a.styles.const_data_ptr(), d.mutable_data_ptr(),
                                         q.mutable_data_ptr(), a.N, a.O, a.I, a.K, a.channels_last,
                                         eps, launch.stream));
  return {std::move(d), std::move(q)};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dd_in, const Tensor& d_in, const Tensor& q_in,
                                    const Tensor& weight, const Tensor& styles, bool needs_dweight,
                                    bool needs_dstyles, double factor) {
  const Operands a(weight, styles);
  const auto check = [&](const char* name, const Tensor& t, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns &&
                        t.scalar_type() == a.sum_type(),
                    kOp, ": ", name, " must be (", rows, ", ", columns, ") ",
                    dtype_name(a.sum_type()));
    return row_major(t);
  };
  const Tensor dd = check("dd", dd_in, a.N, a.O), d = check("d", d_in, a.N, a.O),
               q = check("q", q_in, a.O, a.I);
  Tensor dweight = needs_dweight ? fresh_like(a.weight) : empty_beside(a.weight, {0});
  Tensor dstyles = needs_dstyles ? fresh_like(a.styles) : empty_beside(a.styles, {0});
  const Launch launch(a.weight);
  launch.check(kOp, kernels::demod_coefs_bwd(
                        a.code, a.styles_code, dd.const_data_ptr(), d.const_data_ptr(),
                        q.const_data_ptr(), a.weight.const_data_ptr(), a.styles.const_data_ptr(),
                        dweight.numel() ? dweight.mutable_data_ptr() : nullptr,
                        dstyles.numel() ? dstyles.mutable_data_ptr() : nullptr, a.N, a.O, a.I, a.K,
                        a.channels_last, factor, launch.stream));
  return {std::move(dweight), std::move(dstyles)};
}

}  // namespace

GANKERN_SCHEMAS(m) {
  m.def("demod_coefs(Tensor weight, Tensor styles, float eps) -> (Tensor, Tensor)");
  m.def(
      "demod_coefs_bwd(Tensor dd, Tensor d, Tensor q, Tensor weight, Tensor styles, "
      "bool needs_dweight, bool needs_dstyles, float factor=1.0) -> (Tensor, Tensor)");
}

GANKERN_IMPLS(m) {
  implement<&forward>(m, "demod_coefs");
  implement<&backward>(m, "demod_coefs_bwd");
}

}  // namespace gankern
