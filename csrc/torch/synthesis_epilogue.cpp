// synthesis_epilogue for the dispatcher: checks, allocation, launch. The contract is
// gankern/ops/synthesis_epilogue.py.
#include "common.h"

GANKERN_KERNEL(int, synthesis_epilogue, int dtype, int f32, const void* x, const void* f,
               const void* d, const void* noise, const void* strength, const void* b, void* y,
               int64_t N, int64_t C, int64_t H, int64_t W, int64_t out_h, int64_t out_w,
               int64_t taps_y, int64_t taps_x, bool separable, int64_t noise_n, int64_t strength_n,
               int64_t x0, int64_t y0, bool flip, double filter_gain, bool channels_last, int act,
               double alpha, double gain, double clamp, void* stream)
GANKERN_KERNEL(int64_t, synthesis_epilogue_bwd_workspace, int dtype, int64_t N, int64_t C,
               int64_t H, int64_t W, bool filtered, bool noise, bool channels_last)
GANKERN_KERNEL(int, synthesis_epilogue_bwd, int dtype, int f32, const void* dy, const void* x,
               const void* f, const void* d, const void* noise, const void* strength, const void* b,
               void* dx, void* dd, void* db, void* ds, void* workspace, int64_t N, int64_t C,
               int64_t H, int64_t W, int64_t out_h, int64_t out_w, int64_t taps_y, int64_t taps_x,
               bool separable, int64_t noise_n, int64_t strength_n, int64_t x0, int64_t y0,
               bool flip, double filter_gain, bool channels_last, int act, double alpha,
               double gain, double clamp, void* stream)

namespace gankern {
namespace {

constexpr const char* kOp = "synthesis_epilogue";

const void* data(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

MaybeTensor contiguous(const MaybeTensor& t) {
  return t ? MaybeTensor(row_major(*t)) : std::nullopt;
}

// Checked operands as the kernels want them, and the sizes that follow from them.
struct Operands {
  Tensor x;
  MaybeTensor f, d, noise, strength, b;
  int code, f32 = 0;
  int64_t N, C, H, W, out_h, out_w, taps_y = 1, taps_x = 1, noise_n = 1, strength_n = 1;
  bool separable = false, last;

  Operands(const Tensor& x_in, const MaybeTensor& f_in, const MaybeTensor& d_in,
           const MaybeTensor& noise_in, const MaybeTensor& strength_in, const MaybeTensor& b_in,
           int64_t x0, int64_t x1, int64_t y0, int64_t y1)
      : x(is_channels_last(x_in) ? x_in : row_major(x_in)),
        f(contiguous(f_in)),
        d(contiguous(d_in)),
        noise(contiguous(noise_in)),
        strength(contiguous(strength_in)),
        b(contiguous(b_in)),
        code(dtype_code(kOp, "x", x_in)) {
    STD_TORCH_CHECK(x.dim() == 4, kOp, ": x must be [N, C, H, W], got ", x.dim(), " dimensions");
    last = is_channels_last(x);
    N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
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
    out_h = H + y0 + y1 - taps_y + 1, out_w = W + x0 + x1 - taps_x + 1;
    STD_TORCH_CHECK(out_h >= 0 && out_w >= 0, kOp, ": padding must leave an output, got ", out_h,
                    "x", out_w);
    check_operand("d", d, 1, N * C);
    if (noise && noise->dim() == 3) noise_n = noise->size(0);
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

// An NCHW tensor of x's dtype and memory format.
Tensor empty_images(const Operands& o, int64_t h, int64_t w) {
  return fresh_images(o.x, o.N, o.C, h, w, o.last);
}

Tensor forward(const Tensor& x, const MaybeTensor& f, const MaybeTensor& d,
               const MaybeTensor& noise, const MaybeTensor& strength, const MaybeTensor& b,
               int64_t x0, int64_t x1, int64_t y0, int64_t y1, bool flip, double filter_gain,
               int64_t act, double alpha, double gain, double clamp) {
  const Operands o(x, f, d, noise, strength, b, x0, x1, y0, y1);
  Tensor y = empty_images(o, o.out_h, o.out_w);
  const Launch launch(o.x);
  launch.check(kOp,
               kernels::synthesis_epilogue(
                   o.code, o.f32, o.x.const_data_ptr(), data(o.f), data(o.d), data(o.noise),
                   data(o.strength), data(o.b), y.mutable_data_ptr(), o.N, o.C, o.H, o.W, o.out_h,
                   o.out_w, o.taps_y, o.taps_x, o.separable, o.noise_n, o.strength_n, x0, y0, flip,
                   filter_gain, o.last, static_cast<int>(act), alpha, gain, clamp, launch.stream));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy_in, const Tensor& x, const MaybeTensor& f, const MaybeTensor& d,
    const MaybeTensor& noise, const MaybeTensor& strength, const MaybeTensor& b, int64_t x0,
    int64_t x1, int64_t y0, int64_t y1, bool flip, double filter_gain, int64_t act, double alpha,
    double gain, double clamp) {
  const Operands o(x, f, d, noise, strength, b, x0, x1, y0, y1);
  Tensor dy = dy_in;
  const bool fits = o.last ? is_channels_last(dy) || dy.numel() == 0 : dy.is_contiguous();
  STD_TORCH_CHECK(dy.dim() == 4 && dy.size(2) == o.out_h && dy.size(3) == o.out_w &&
                      dtype_code(kOp, "dy", dy) == o.code,
                  kOp, ": dy must have y's shape and dtype");
  if (!fits) {
    dy = empty_images(o, o.out_h, o.out_w);
    torch::stable::copy_(dy, dy_in);
  }
  Tensor dx = empty_images(o, o.H, o.W);
  const auto acc = o.code == kF64 ? ScalarType::Double : ScalarType::Float;
  const int64_t bytes = kernels::synthesis_epilogue_bwd_workspace(
      o.code, o.N, o.C, o.H, o.W, o.f.has_value(), o.noise.has_value(), o.last);
  WithWorkspace dd = empty_with_workspace(o.x, {o.N, o.C}, acc, bytes);
  Tensor db = empty_beside(o.x, {o.C}, acc), ds = fresh_like(db);
  if (o.N * o.C * o.out_h * o.out_w * o.H * o.W == 0)
    for (Tensor* t : {&dx, &dd.out, &db, &ds}) torch::stable::zero_(*t);
  else {
    const Launch launch(o.x);
    launch.check(kOp,
                 kernels::synthesis_epilogue_bwd(
                     o.code, o.f32, dy.const_data_ptr(), o.x.const_data_ptr(), data(o.f), data(o.d),
                     data(o.noise), data(o.strength), data(o.b), dx.mutable_data_ptr(),
                     dd.out.mutable_data_ptr(), db.mutable_data_ptr(), ds.mutable_data_ptr(),
                     dd.workspace, o.N, o.C, o.H, o.W, o.out_h, o.out_w, o.taps_y, o.taps_x,
                     o.separable, o.noise_n, o.strength_n, x0, y0, flip, filter_gain, o.last,
                     static_cast<int>(act), alpha, gain, clamp, launch.stream));
  }
  return {dx, dd.out, db, ds};
}

}  // namespace

GANKERN_SCHEMAS(m) {
  m.def(
      "synthesis_epilogue(Tensor x, Tensor? f, Tensor? d, Tensor? noise, Tensor? strength, "
      "Tensor? b, int x0, int x1, int y0, int y1, bool flip_filter, float filter_gain, int act, "
      "float alpha, float gain, float clamp) -> Tensor");
  m.def(
      "synthesis_epilogue_bwd(Tensor dy, Tensor x, Tensor? f, Tensor? d, Tensor? noise, "
      "Tensor? strength, Tensor? b, int x0, int x1, int y0, int y1, bool flip_filter, "
      "float filter_gain, int act, float alpha, float gain, float clamp) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

GANKERN_IMPLS(m) {
  m.impl("synthesis_epilogue", TORCH_BOX(&forward));
  m.impl("synthesis_epilogue_bwd", TORCH_BOX(&backward));
}

}  // namespace gankern
