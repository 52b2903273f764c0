// convolution for the dispatcher, alone or with an epilogue: checks, allocation, launch. The
// contract is gankern/ops/convolution.py. The CPU alone has kernels.
#include "../cpu/finish.h"
#include "synthesis_epilogue.h"

GANKERN_KERNEL(int, convolution, int dtype, const void* x, const void* factors, const void* w,
               void* y, int64_t N, int64_t I, int64_t H, int64_t W, int64_t O, int64_t out_h,
               int64_t out_w, int64_t w_out, int64_t w_in, int taps, int stride, bool transposed,
               int64_t pad_y, int64_t pad_x, const gankern::cpu::Finish* finish)
GANKERN_KERNEL(int, convolution_weight_gradient, int dtype, const void* dy, const void* dy_factors,
               const void* x, const void* x_factors, void* dw, int64_t N, int64_t O, int64_t out_h,
               int64_t out_w, int64_t I, int64_t H, int64_t W, int taps, int stride, int64_t pad_y,
               int64_t pad_x)
GANKERN_KERNEL(int, convolution_last, int dtype, const void* x, const void* factors, const void* w,
               void* y, int64_t N, int64_t I, int64_t H, int64_t W, int64_t O, int64_t out_h,
               int64_t out_w, int64_t w_out, int64_t w_in, int taps, int stride, bool transposed,
               int64_t pad_y, int64_t pad_x, const gankern::cpu::Finish* finish)
GANKERN_KERNEL(int, convolution_last_weight_gradient, int dtype, const void* dy,
               const void* dy_factors, const void* x, const void* x_factors, void* dw, int64_t N,
               int64_t O, int64_t out_h, int64_t out_w, int64_t I, int64_t H, int64_t W, int taps,
               int stride, int64_t pad_y, int64_t pad_x)
GANKERN_KERNEL(int, convolution_few, int dtype, const void* x, const void* w, void* y, int64_t N,
               int64_t I, int64_t H, int64_t W, int64_t O, int64_t out_h, int64_t out_w,
               int64_t w_out, int64_t w_in, bool transposed)
GANKERN_KERNEL(int, convolution_few_weight_gradient, int dtype, const void* dy, const void* x,
               void* dw, int64_t N, int64_t O, int64_t out_h, int64_t out_w, int64_t I, int64_t H,
               int64_t W)
GANKERN_KERNEL(int, convolution_image, int dtype, const void* x, const void* w, void* y, int64_t N,
               int64_t I, int64_t H, int64_t W, int64_t O, int64_t out_h, int64_t out_w,
               int64_t w_out, int64_t w_in, bool planes)
GANKERN_KERNEL(int, convolution_image_transposed, int dtype, const void* x, const void* w, void* y,
               int64_t N, int64_t I, int64_t H, int64_t W, int64_t O, int64_t out_h, int64_t out_w,
               int64_t w_out, int64_t w_in)
GANKERN_KERNEL(int, convolution_image_weight_gradient, int dtype, const void* dy, const void* x,
               void* dw, int64_t N, int64_t O, int64_t out_h, int64_t out_w, int64_t I, int64_t H,
               int64_t W, bool planes)

namespace gankern {
namespace {

constexpr const char* kOp = "convolution";

const Tensor& checked(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, kOp, ": ", name, " must have 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, kOp, ": ", name, " must be float32, got ",
                  dtype_name(t.scalar_type()));
  return t;
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

// 0 where the padded side is shorter than the weights.
int64_t out_size(int64_t in, int64_t taps, int64_t stride, int64_t pad, bool transposed,
                 int64_t rest) {
  if (transposed) return (in - 1) * stride + taps - 2 * pad + rest;
  return in + 2 * pad < taps ? 0 : (in + 2 * pad - taps) / stride + 1;
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

// A convolution's checked operands.
struct Convolution {
  Tensor x, w;
  Factors factors;
  int64_t N, O, out_h, out_w, stride, pad_y, pad_x;
  bool transposed, last;

  Convolution(const Tensor& x_in, const Tensor& w_in, const MaybeTensor& factors_in, int64_t stride,
              int64_t pad_y, int64_t pad_x, bool transposed, int64_t rest_y, int64_t rest_x,
              bool last)
      : x(checked("x", x_in).lent()),
        w(checked("w", w_in).lent()),
        factors("factors", factors_in, x_in),
        stride(stride),
        pad_y(pad_y),
        pad_x(pad_x),
        transposed(transposed),
        last(last) {
    const int64_t taps = w.size(3), I = x.size(1);
    check_form(taps, stride, pad_y, pad_x, last);
    STD_TORCH_CHECK(w.size(in_dim()) == I && w.size(2) == taps, kOp, ": w must have ", I,
                    " channels in and square taps, got ", w.size(in_dim()), " and ", w.size(2), "x",
                    taps);
    STD_TORCH_CHECK(0 <= std::min(rest_y, rest_x) && std::max(rest_y, rest_x) < stride, kOp,
                    ": output padding must be from 0 to ", stride - 1, ", got ", rest_y, " and ",
                    rest_x);
    N = x.size(0), O = w.size(1 - in_dim());
    out_h = out_size(x.size(2), taps, stride, pad_y, transposed, rest_y);
    out_w = out_size(x.size(3), taps, stride, pad_x, transposed, rest_x);
    STD_TORCH_CHECK(out_h > 0 && out_w > 0, kOp, ": padding must leave an output, got ", out_h, "x",
                    out_w);
    if (!last) x = row_major(x);
    if (w.stride(3) != 1 || w.stride(2) != taps) w = row_major(w);
  }

  // finish: of 3x3 taps.
  Tensor run(const cpu::Finish* finish) const {
    const bool flipped = transposed && stride == 1;  // a correlation again, of flipped weights
    Tensor y = fresh_images(x, N, O, out_h, out_w, last);
    if (y.numel() == 0) return y;
    const auto kernel = [&](auto... args) {
      last ? kernels::convolution_last(kF32, args...) : kernels::convolution(kF32, args...);
    };
    kernel(x.const_data_ptr(), factors.data(), w.const_data_ptr(), y.mutable_data_ptr(), N,
           x.size(1), x.size(2), x.size(3), O, out_h, out_w, w.stride(1 - in_dim()),
           w.stride(in_dim()), static_cast<int>(w.size(3)), static_cast<int>(stride), transposed,
           flipped ? 2 - pad_y : pad_y, flipped ? 2 - pad_x : pad_x, finish);
    return y;
  }

 private:
  int in_dim() const { return transposed ? 0 : 1; }
};

Tensor forward(const Tensor& x, const Tensor& w, const MaybeTensor& factors, int64_t stride,
               int64_t pad_y, int64_t pad_x, bool transposed, int64_t rest_y, int64_t rest_x) {
  const bool last = is_channels_last(x);
  return Convolution(x, w, factors, stride, pad_y, pad_x, transposed, rest_y, rest_x, last)
      .run(nullptr);
}

// Channels-last, or of one pixel or channel or empty, which is that too.
bool by_channels(const Tensor& t) {
  const bool either = t.size(2) * t.size(3) == 1 || t.size(1) == 1 || t.numel() == 0;
  return is_channels_last(t) || (t.is_contiguous() && either);
}

// The checked operands of 4x4 taps, stride 2 and padding 1.
Convolution four_taps(const Tensor& x, const Tensor& w, bool transposed, int64_t rest_y,
                      int64_t rest_x, bool last) {
  STD_TORCH_CHECK(checked("w", w).size(3) == 4, kOp, ": these kernels want 4x4 taps, got ",
                  w.size(2), "x", w.size(3));
  return {x, w, std::nullopt, 2, 1, 1, transposed, rest_y, rest_x, last};
}

// By plain sums.
Tensor few(const Tensor& x, const Tensor& w, bool transposed, int64_t rest_y, int64_t rest_x) {
  const Convolution c = four_taps(x, w, transposed, rest_y, rest_x, by_channels(checked("x", x)));
  Tensor y = fresh_images(x, c.N, c.O, c.out_h, c.out_w, true);
  if (y.numel())
    kernels::convolution_few(kF32, c.x.const_data_ptr(), c.w.const_data_ptr(), y.mutable_data_ptr(),
                             c.N, x.size(1), x.size(2), x.size(3), c.O, c.out_h, c.out_w,
                             c.w.stride(transposed ? 1 : 0), c.w.stride(transposed ? 0 : 1),
                             transposed);
  return y;
}

// Between images of few channels, in either memory format but written contiguous, and
// channels-last memory of many.
Tensor image(const Tensor& x_in, const Tensor& w, bool transposed, int64_t rest_y, int64_t rest_x) {
  const bool last = by_channels(checked("x", x_in));
  const Tensor x = last ? x_in.lent() : row_major(x_in);
  STD_TORCH_CHECK(last || !transposed, kOp, ": 4x4 taps take images in channels-last memory");
  const Convolution c = four_taps(x, w, transposed, rest_y, rest_x, true);
  Tensor y = fresh_images(x, c.N, c.O, c.out_h, c.out_w, !transposed);
  if (y.numel() == 0) return y;
  const auto run = [&](const auto& kernel, auto... rest) {
    kernel(kF32, x.const_data_ptr(), c.w.const_data_ptr(), y.mutable_data_ptr(), c.N, x.size(1),
           x.size(2), x.size(3), c.O, c.out_h, c.out_w, c.w.stride(transposed ? 1 : 0),
           c.w.stride(transposed ? 0 : 1), rest...);
  };
  if (transposed)
    run([](auto... args) { kernels::convolution_image_transposed(args...); });
  else
    run([](auto... args) { kernels::convolution_image(args...); }, !last);
  return y;
}

// The unfiltered synthesis_epilogue of a convolution, which is written once.
Tensor with_epilogue(const Tensor& x, const Tensor& w, const MaybeTensor& factors, int64_t stride,
                     int64_t pad_y, int64_t pad_x, const MaybeTensor& d, const MaybeTensor& noise,
                     const MaybeTensor& strength, const MaybeTensor& b, int64_t act, double alpha,
                     double gain, double clamp) {
  const Convolution c(x, w, factors, stride, pad_y, pad_x, false, 0, 0, is_channels_last(x));
  STD_TORCH_CHECK(w.size(3) == 3, kOp, ": an epilogue wants 3x3 taps, got ", w.size(3), "x",
                  w.size(3));
  const epilogue::Operands o({kF32, c.N, c.O, c.out_h, c.out_w, c.last}, std::nullopt, d, noise,
                             strength, b, 0, 0, 0, 0);
  const auto data = [](const MaybeTensor& t) {
    return static_cast<const float*>(epilogue::data(t));
  };
  const cpu::Finish finish{data(o.d),
                           data(o.noise),
                           data(o.strength),
                           data(o.b),
                           o.noise_n,
                           o.strength_n,
                           static_cast<int>(act),
                           static_cast<float>(alpha),
                           static_cast<float>(gain),
                           static_cast<float>(clamp),
                           nullptr,
                           nullptr};
  return c.run(&finish);
}

// The gradients of x * d of its convolution, whose adjoint the form is: of x, and of d [N, C].
std::tuple<Tensor, Tensor> scaled_backward(const Tensor& dy, const Tensor& w, const Tensor& x_in,
                                           const Tensor& d, int64_t stride, int64_t pad_y,
                                           int64_t pad_x, bool transposed, int64_t rest_y,
                                           int64_t rest_x) {
  const Convolution c(dy, w, std::nullopt, stride, pad_y, pad_x, transposed, rest_y, rest_x,
                      is_channels_last(dy));
  STD_TORCH_CHECK(w.size(3) == 3, kOp, ": the gradients of factors want 3x3 taps, got ", w.size(3),
                  "x", w.size(3));
  STD_TORCH_CHECK(!c.last || is_channels_last(x_in), kOp,
                  ": x and dy must be in the same memory format");
  const Tensor x = c.last ? checked("x", x_in).lent() : row_major(checked("x", x_in));
  STD_TORCH_CHECK(
      x.size(0) == c.N && x.size(1) == c.O && x.size(2) == c.out_h && x.size(3) == c.out_w, kOp,
      ": x must have the shape of its gradient");
  const Factors factors("d", MaybeTensor(d.lent()), x);
  Tensor dd = empty_beside(x, {c.N, c.O});
  cpu::Finish finish{};
  finish.d = static_cast<const float*>(factors.data());
  finish.x = static_cast<const float*>(x.const_data_ptr());
  finish.dots = static_cast<float*>(dd.mutable_data_ptr());
  Tensor dx = c.run(&finish);
  if (dx.numel() == 0) zero(dd);
  return {std::move(dx), std::move(dd)};
}

Tensor weight_gradient(const Tensor& dy_in, const Tensor& x_in, const MaybeTensor& dy_factors_in,
                       const MaybeTensor& x_factors_in, int64_t taps, int64_t stride, int64_t pad_y,
                       int64_t pad_x) {
  checked("dy", dy_in);
  checked("x", x_in);
  const bool last = is_channels_last(dy_in) && is_channels_last(x_in);
  check_form(taps, stride, pad_y, pad_x, last);
  const Tensor dy = last ? dy_in.lent() : row_major(dy_in);
  const Tensor x = last ? x_in.lent() : row_major(x_in);
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

// Of 4x4 taps; run(dw, N, O, out_h, out_w, I, H, W).
template <typename F>
Tensor four_taps_weight_gradient(const Tensor& dy, const Tensor& x, const F& run) {
  const int64_t N = x.size(0), O = dy.size(1), I = x.size(1);
  STD_TORCH_CHECK(dy.size(0) == N && dy.size(2) == out_size(x.size(2), 4, 2, 1, false, 0) &&
                      dy.size(3) == out_size(x.size(3), 4, 2, 1, false, 0),
                  kOp, ": dy must have the shape of the convolution's output");
  Tensor dw = empty_beside(x, {O, I, 4, 4});
  if (dy.numel() == 0)
    zero(dw);
  else
    run(dw.mutable_data_ptr(), N, O, dy.size(2), dy.size(3), I, x.size(2), x.size(3));
  return dw;
}

Tensor few_weight_gradient(const Tensor& dy, const Tensor& x) {
  checked("dy", dy);
  checked("x", x);
  STD_TORCH_CHECK(by_channels(dy) && by_channels(x), kOp,
                  ": 4x4 taps take images in channels-last memory");
  return four_taps_weight_gradient(dy, x, [&](auto... args) {
    kernels::convolution_few_weight_gradient(kF32, dy.const_data_ptr(), x.const_data_ptr(),
                                             args...);
  });
}

Tensor image_weight_gradient(const Tensor& dy, const Tensor& x_in) {
  checked("dy", dy);
  const bool last = by_channels(checked("x", x_in));
  const Tensor x = last ? x_in.lent() : row_major(x_in);
  STD_TORCH_CHECK(by_channels(dy), kOp, ": 4x4 taps take images in channels-last memory");
  return four_taps_weight_gradient(dy, x, [&](auto... args) {
    kernels::convolution_image_weight_gradient(kF32, dy.const_data_ptr(), x.const_data_ptr(),
                                               args..., !last);
  });
}

}  // namespace

GANKERN_SCHEMAS(m) {
  m.def(
      "convolution(Tensor x, Tensor w, Tensor? factors, int stride, int pad_y, int pad_x, bool "
      "transposed, int rest_y, "
      "int rest_x) -> Tensor");
  m.def(
      "convolution_epilogue(Tensor x, Tensor w, Tensor? factors, int stride, int pad_y, int pad_x, "
      "Tensor? d, "
      "Tensor? noise, Tensor? strength, Tensor? b, int act, float alpha, float gain, float clamp) "
      "-> Tensor");
  m.def("convolution_few(Tensor x, Tensor w, bool transposed, int rest_y, int rest_x) -> Tensor");
  m.def("convolution_few_weight_gradient(Tensor dy, Tensor x) -> Tensor");
  m.def("convolution_image(Tensor x, Tensor w, bool transposed, int rest_y, int rest_x) -> Tensor");
  m.def("convolution_image_weight_gradient(Tensor dy, Tensor x) -> Tensor");
  m.def(
      "convolution_scaled_backward(Tensor dy, Tensor w, Tensor x, Tensor d, int stride, int pad_y, "
      "int pad_x, bool transposed, int rest_y, int rest_x) -> (Tensor, Tensor)");
  m.def(
      "convolution_weight_gradient(Tensor dy, Tensor x, Tensor? dy_factors, Tensor? x_factors, int "
      "taps, int stride, int pad_y, int pad_x) -> Tensor");
}

GANKERN_IMPLS(m) {
  implement<&forward>(m, "convolution");
  implement<&with_epilogue>(m, "convolution_epilogue");
  implement<&few>(m, "convolution_few");
  implement<&few_weight_gradient>(m, "convolution_few_weight_gradient");
  implement<&image>(m, "convolution_image");
  implement<&image_weight_gradient>(m, "convolution_image_weight_gradient");
  implement<&scaled_backward>(m, "convolution_scaled_backward");
  implement<&weight_gradient>(m, "convolution_weight_gradient");
}

}  // namespace gankern
