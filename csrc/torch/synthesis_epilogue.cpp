// synthesis_epilogue for the dispatcher: checks, allocation, launch. The contract is
// gankern/ops/synthesis_epilogue.py.
#include "synthesis_epilogue.h"

GANKERN_KERNEL(int, synthesis_epilogue, int dtype, int f32, const void* x, const void* f,
               const void* d, const void* noise, const void* strength, const void* b, void* y,
               int64_t N, int64_t C, int64_t H, int64_t W, int64_t out_h, int64_t out_w,
               int64_t taps_y, int64_t taps_x, bool separable, int64_t noise_n, int64_t strength_n,
               int64_t x0, int64_t y0, bool flip, double filter_gain, bool channels_last, int act,
               double alpha, double gain, double clamp, void* stream)
GANKERN_KERNEL(int64_t, synthesis_epilogue_bwd_workspace, int dtype, int64_t N, int64_t C,
               int64_t H, int64_t W, int64_t out_w, int64_t x0, bool filtered, bool noise,
               bool channels_last)
GANKERN_KERNEL(int, synthesis_epilogue_bwd, int dtype, int f32, const void* dy, const void* x,
               const void* f, const void* d, const void* noise, const void* strength, const void* b,
               void* dx, void* dd, void* db, void* ds, void* workspace, int64_t N, int64_t C,
               int64_t H, int64_t W, int64_t out_h, int64_t out_w, int64_t taps_y, int64_t taps_x,
               bool separable, int64_t noise_n, int64_t strength_n, int64_t x0, int64_t y0,
               bool flip, double filter_gain, bool channels_last, int act, double alpha,
               double gain, double clamp, void* stream)
GANKERN_KERNEL(int, synthesis_epilogue_bwd2, int dtype, int f32, const void* dy, const void* x,
               const void* f, const void* d, const void* noise, const void* strength, const void* b,
               const void* vx, const void* vd, const void* vs, const void* vb, void* d_dy,
               void* d_x, void* d_d, void* workspace, int64_t N, int64_t C, int64_t H, int64_t W,
               int64_t out_h, int64_t out_w, int64_t taps_y, int64_t taps_x, bool separable,
               int64_t noise_n, int64_t strength_n, int64_t x0, int64_t y0, bool flip,
               double filter_gain, bool channels_last, int act, double alpha, double gain,
               double clamp, void* stream)

namespace gankern {
namespace {

using namespace epilogue;

// x as the kernels want it.
Tensor images(const Tensor& x) { return is_channels_last(x) ? x.lent() : row_major(x); }

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": x must be [N, C, H, W], got ", x.dim(), " dimensions");
  const int code = dtype_code(kOp, "x", x);
  return {code, x.size(0), x.size(1), x.size(2), x.size(3), is_channels_last(x)};
}

Tensor forward(const Tensor& x_in, const MaybeTensor& f, const MaybeTensor& d,
               const MaybeTensor& noise, const MaybeTensor& strength, const MaybeTensor& b,
               int64_t x0, int64_t x1, int64_t y0, int64_t y1, bool flip, double filter_gain,
               int64_t act, double alpha, double gain, double clamp) {
  const Tensor x = images(x_in);
  const Operands o(shape_of(x), f, d, noise, strength, b, x0, x1, y0, y1);
  Tensor y = fresh_images(x, o.N, o.C, o.out_h, o.out_w, o.last);
  const Launch launch(x);
  launch.check(kOp,
               kernels::synthesis_epilogue(
                   o.code, o.f32, x.const_data_ptr(), data(o.f), data(o.d), data(o.noise),
                   data(o.strength), data(o.b), y.mutable_data_ptr(), o.N, o.C, o.H, o.W, o.out_h,
                   o.out_w, o.taps_y, o.taps_x, o.separable, o.noise_n, o.strength_n, x0, y0, flip,
                   filter_gain, o.last, static_cast<int>(act), alpha, gain, clamp, launch.stream));
  return y;
}

// Images of h x w in x's dtype and memory format.
Tensor laid_out(const char* name, const Tensor& t, const Operands& o, int64_t h, int64_t w,
                const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == o.N && t.size(1) == o.C && t.size(2) == h &&
                      t.size(3) == w && dtype_code(kOp, name, t) == o.code,
                  kOp, ": ", name, " must have the shape and dtype of what it is the gradient of");
  if (o.last ? is_channels_last(t) || t.numel() == 0 : t.is_contiguous()) return t.lent();
  return copied(fresh_images(x, o.N, o.C, h, w, o.last), t);
}

struct Gradients {
  Tensor dx, dd, db;
  MaybeTensor ds;
};
Gradients gradients(bool with_ds, const Tensor& dy_in, const Tensor& x_in, const MaybeTensor& f,
                    const MaybeTensor& d, const MaybeTensor& noise, const MaybeTensor& strength,
                    const MaybeTensor& b, int64_t x0, int64_t x1, int64_t y0, int64_t y1, bool flip,
                    double filter_gain, int64_t act, double alpha, double gain, double clamp) {
  const Tensor x = images(x_in);
  const Operands o(shape_of(x), f, d, noise, strength, b, x0, x1, y0, y1);
  const Tensor dy = laid_out("dy", dy_in, o, o.out_h, o.out_w, x);
  Tensor dx = fresh_images(x, o.N, o.C, o.H, o.W, o.last);
  const auto acc = o.code == kF64 ? ScalarType::Double : ScalarType::Float;
  const Launch launch(x);
  const int64_t bytes = kernels::synthesis_epilogue_bwd_workspace(
      o.code, o.N, o.C, o.H, o.W, o.out_w, x0, o.f.has_value(), o.noise.has_value(), o.last);
  WithWorkspace dd = empty_with_workspace(x, {o.N, o.C}, acc, bytes);
  Tensor db = empty_beside(x, {o.C}, acc);
  MaybeTensor ds;
  if (with_ds) ds = fresh_like(db);
  if (o.N * o.C * o.out_h * o.out_w * o.H * o.W == 0) {
    for (Tensor* t : {&dx, &dd.out, &db}) zero(*t);
    if (ds) zero(*ds);
  } else {
    launch.check(
        kOp, kernels::synthesis_epilogue_bwd(
                 o.code, o.f32, dy.const_data_ptr(), x.const_data_ptr(), data(o.f), data(o.d),
                 data(o.noise), data(o.strength), data(o.b), dx.mutable_data_ptr(),
                 dd.out.mutable_data_ptr(), db.mutable_data_ptr(),
                 ds ? ds->mutable_data_ptr() : nullptr, dd.workspace, o.N, o.C, o.H, o.W, o.out_h,
                 o.out_w, o.taps_y, o.taps_x, o.separable, o.noise_n, o.strength_n, x0, y0, flip,
                 filter_gain, o.last, static_cast<int>(act), alpha, gain, clamp, launch.stream));
  }
  return {std::move(dx), std::move(dd.out), std::move(db), std::move(ds)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const MaybeTensor& f, const MaybeTensor& d,
    const MaybeTensor& noise, const MaybeTensor& strength, const MaybeTensor& b, int64_t x0,
    int64_t x1, int64_t y0, int64_t y1, bool flip, double filter_gain, int64_t act, double alpha,
    double gain, double clamp) {
  auto found = gradients(true, dy, x, f, d, noise, strength, b, x0, x1, y0, y1, flip, filter_gain,
                         act, alpha, gain, clamp);
  return {std::move(found.dx), std::move(found.dd), std::move(found.db), std::move(*found.ds)};
}

// Without ds, which most calls do not want: they have no noise.
std::tuple<Tensor, Tensor, Tensor> backward_plain(const Tensor& dy, const Tensor& x,
                                                  const MaybeTensor& f, const MaybeTensor& d,
                                                  const MaybeTensor& noise,
                                                  const MaybeTensor& strength, const MaybeTensor& b,
                                                  int64_t x0, int64_t x1, int64_t y0, int64_t y1,
                                                  bool flip, double filter_gain, int64_t act,
                                                  double alpha, double gain, double clamp) {
  auto found = gradients(false, dy, x, f, d, noise, strength, b, x0, x1, y0, y1, flip, filter_gain,
                         act, alpha, gain, clamp);
  return {std::move(found.dx), std::move(found.dd), std::move(found.db)};
}

// Gradients of dy, x and d from cotangents of dx, dd, dstrength [C] and db, for piecewise linear
// activations; that of x is empty without vd. With a filter on the CPU only.
std::tuple<Tensor, Tensor, Tensor> second(const Tensor& dy_in, const Tensor& x_in,
                                          const MaybeTensor& f, const MaybeTensor& d,
                                          const MaybeTensor& noise, const MaybeTensor& strength,
                                          const MaybeTensor& b, const MaybeTensor& vx_in,
                                          const MaybeTensor& vd_in, const MaybeTensor& vs_in,
                                          const MaybeTensor& vb_in, int64_t x0, int64_t x1,
                                          int64_t y0, int64_t y1, bool flip, double filter_gain,
                                          int64_t act, double alpha, double gain, double clamp) {
  STD_TORCH_CHECK(act <= 2, kOp, ": the activation must be linear, relu or lrelu");
  STD_TORCH_CHECK(GK_BACKEND_ID == 1 || !f, kOp, ": the second derivative takes no filter");
  const Tensor x = images(x_in);
  const Operands o(shape_of(x), f, d, noise, strength, b, x0, x1, y0, y1);
  const Tensor dy = laid_out("dy", dy_in, o, o.out_h, o.out_w, x);
  MaybeTensor vx;
  if (vx_in) vx = laid_out("vx", *vx_in, o, o.H, o.W, x);
  const auto acc = o.code == kF64 ? ScalarType::Double : ScalarType::Float;
  const auto small = [&](const MaybeTensor& t, int64_t elements) {
    STD_TORCH_CHECK(!t || (t->numel() == elements && t->scalar_type() == acc), kOp,
                    ": a cotangent must be ", elements, " elements of ", dtype_name(acc));
    return contiguous(t);
  };
  const MaybeTensor vd = small(vd_in, o.N * o.C), vs = small(vs_in, o.C), vb = small(vb_in, o.C);
  Tensor d_dy = fresh_images(x, o.N, o.C, o.out_h, o.out_w, o.last);
  Tensor d_x = vd ? fresh_images(x, o.N, o.C, o.H, o.W, o.last) : empty_beside(x, {0});
  const Launch launch(x);
  const int64_t bytes = kernels::synthesis_epilogue_bwd_workspace(
      o.code, o.N, o.C, o.H, o.W, o.out_w, x0, o.f.has_value(), o.noise.has_value(), o.last);
  WithWorkspace d_d = empty_with_workspace(x, {o.N, o.C}, acc, bytes);
  if (o.N * o.C * o.out_h * o.out_w * o.H * o.W == 0) {
    for (Tensor* t : {&d_dy, &d_x, &d_d.out}) zero(*t);
  } else {
    launch.check(
        kOp, kernels::synthesis_epilogue_bwd2(
                 o.code, o.f32, dy.const_data_ptr(), x.const_data_ptr(), data(o.f), data(o.d),
                 data(o.noise), data(o.strength), data(o.b), data(vx), data(vd), data(vs), data(vb),
                 d_dy.mutable_data_ptr(), vd ? d_x.mutable_data_ptr() : nullptr,
                 d_d.out.mutable_data_ptr(), d_d.workspace, o.N, o.C, o.H, o.W, o.out_h, o.out_w,
                 o.taps_y, o.taps_x, o.separable, o.noise_n, o.strength_n, x0, y0, flip,
                 filter_gain, o.last, static_cast<int>(act), alpha, gain, clamp, launch.stream));
  }
  return {std::move(d_dy), std::move(d_x), std::move(d_d.out)};
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
  m.def(
      "synthesis_epilogue_bwd_plain(Tensor dy, Tensor x, Tensor? f, Tensor? d, Tensor? noise, "
      "Tensor? strength, Tensor? b, int x0, int x1, int y0, int y1, bool flip_filter, "
      "float filter_gain, int act, float alpha, float gain, float clamp) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "synthesis_epilogue_bwd2(Tensor dy, Tensor x, Tensor? f, Tensor? d, Tensor? noise, "
      "Tensor? strength, Tensor? b, Tensor? vx, Tensor? vd, Tensor? vs, Tensor? vb, int x0, "
      "int x1, int y0, int y1, bool flip_filter, float filter_gain, int act, float alpha, "
      "float gain, float clamp) -> (Tensor, Tensor, Tensor)");
}

GANKERN_IMPLS(m) {
  implement<&forward>(m, "synthesis_epilogue");
  implement<&backward>(m, "synthesis_epilogue_bwd");
  implement<&backward_plain>(m, "synthesis_epilogue_bwd_plain");
  implement<&second>(m, "synthesis_epilogue_bwd2");
}

}  // namespace gankern
