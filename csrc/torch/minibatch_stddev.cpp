// minibatch_stddev for the dispatcher: checks, allocation, launch. The contract is
// gankern/ops/minibatch_stddev.py.
#include "common.h"

GANKERN_KERNEL(int64_t, minibatch_stddev_workspace, int dtype, int64_t N, int64_t C, int64_t pixels,
               int64_t M, int64_t F, bool channels_last)
GANKERN_KERNEL(int, minibatch_stddev, int dtype, const void* x, void* y, void* workspace, int64_t N,
               int64_t C, int64_t pixels, int64_t M, int64_t F, bool channels_last, void* stream)
GANKERN_KERNEL(int, minibatch_stddev_bwd, int dtype, const void* dy, const void* x, void* dx,
               int64_t N, int64_t C, int64_t pixels, int64_t M, int64_t F, bool channels_last,
               void* stream)

namespace gankern {
namespace {

constexpr const char* kOp = "minibatch_stddev";

int check(const Tensor& x, int64_t groups, int64_t num_channels) {
  STD_TORCH_CHECK(x.dim() >= 2, kOp, ": x must be (N, C, *), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(num_channels >= 1 && x.size(1) >= 1 && x.size(1) % num_channels == 0, kOp,
                  ": num_channels must divide the ", x.size(1), " channels of x, got ",
                  num_channels);
  STD_TORCH_CHECK(groups >= 1 && (x.size(0) == 0 || groups <= x.size(0)), kOp,
                  ": groups must be in [1, ", x.size(0), "], got ", groups);
  STD_TORCH_CHECK(x.size(0) < (int64_t(1) << 31), kOp, ": x must have under 2**31 samples");
  return dtype_code(kOp, "x", x);
}

// Uninitialised and of `channels` channels, otherwise like x, which is contiguous or channels-last.
Tensor empty_with_channels(const Tensor& x, int64_t channels, bool last) {
  if (last) return fresh_images(x, x.size(0), channels, x.size(2), x.size(3), last);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = channels;
  return fresh(empty_beside(x, sizes));
}

Tensor forward(const Tensor& x_in, int64_t groups, int64_t num_channels) {
  const int code = check(x_in, groups, num_channels);
  const bool last = is_channels_last(x_in);
  const Tensor x = last ? x_in.lent() : row_major(x_in);
  const int64_t n = x.size(0), c = x.size(1);
  const int64_t pixels = x.numel() ? x.numel() / (n * c) : 0;
  Tensor y = empty_with_channels(x, c + num_channels, last);
  const Launch launch(x);
  const int64_t bytes =
      kernels::minibatch_stddev_workspace(code, n, c, pixels, groups, num_channels, last);
  MaybeTensor workspace;
  if (bytes) workspace = empty_beside(x, {(bytes + 3) / 4}, ScalarType::Float);
  launch.check(kOp,
               kernels::minibatch_stddev(code, x.const_data_ptr(), y.mutable_data_ptr(),
                                         workspace ? workspace->mutable_data_ptr() : nullptr, n, c,
                                         pixels, groups, num_channels, last, launch.stream));
  return y;
}

Tensor backward(const Tensor& dy_in, const Tensor& x_in, int64_t groups, int64_t num_channels) {
  const int code = check(x_in, groups, num_channels);
  const bool last = is_channels_last(x_in);
  const Tensor x = last ? x_in.lent() : row_major(x_in);
  const int64_t n = x.size(0), c = x.size(1);
  STD_TORCH_CHECK(dy_in.dim() == x.dim() && dy_in.size(0) == n &&
                      dy_in.size(1) == c + num_channels &&
                      dy_in.numel() * c == x.numel() * (c + num_channels) &&
                      dy_in.scalar_type() == x.scalar_type(),
                  kOp, ": dy must have y's shape and dtype");
  const Tensor dy = !last ? row_major(dy_in)
                    : is_channels_last(dy_in)
                        ? dy_in.lent()
                        : laid_out_like(dy_in, empty_with_channels(x, c + num_channels, last));
  Tensor dx = fresh_like(x);
  const int64_t pixels = x.numel() ? x.numel() / (n * c) : 0;
  const Launch launch(x);
  launch.check(kOp, kernels::minibatch_stddev_bwd(code, dy.const_data_ptr(), x.const_data_ptr(),
                                                  dx.mutable_data_ptr(), n, c, pixels, groups,
                                                  num_channels, last, launch.stream));
  return dx;
}

}  // namespace

GANKERN_SCHEMAS(m) {
  m.def("minibatch_stddev(Tensor x, SymInt groups, int num_channels) -> Tensor");
  m.def("minibatch_stddev_bwd(Tensor dy, Tensor x, SymInt groups, int num_channels) -> Tensor");
}

GANKERN_IMPLS(m) {
  implement<&forward>(m, "minibatch_stddev");
  implement<&backward>(m, "minibatch_stddev_bwd");
}

}  // namespace gankern
