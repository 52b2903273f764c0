"""Pixelwise feature vector normalisation of progressive GAN and of StyleGAN's mapping network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import Plan, remember

if _impl.triton is not None:
    import triton
    import triton.language as tl


def pixel_norm(x: Tensor, dim: int = 1, eps: float = 1e-8, *, impl: str | None = None) -> Tensor:
    """Scale every vector along `dim` to a mean square of one: y = x * rsqrt(mean(x², dim) + eps).

    Args:
        x: any shape; float32, float16, bfloat16 or float64; any strides. Dense ones are kept.
        dim: the dimension that holds a vector; negative ones count from the end.
        eps: added to the mean square; above 0 it keeps a zero vector finite.
        impl: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns:
        y of x's shape and dtype; 16-bit types are accumulated in float32.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: impl cannot run here.

    Gradients: in x, of any order. Orders 1 and 2 are kernels; orders above are composed of
    PyTorch's. Saves x.
    Source: Karras et al. 2018, "Progressive Growing of GANs", section 4.2.
    """
    return (_call if is_compiling() else _quick)(x, dim, eps, impl)


def _plan(x: Tensor, dim: int, eps: float, impl: str | None) -> Plan:
    dim, eps = _check(x, dim, eps)
    chosen = _impl.choose("pixel_norm", impl, x)
    if chosen == "reference":
        return pixel_norm_reference, (x, dim, eps)
    return _fwd, (x, dim, eps, chosen)


def _check(x: Tensor, dim: int, eps: float) -> tuple[int, float]:
    """Validated dim >= 0 and eps."""
    _impl.check_float("pixel_norm", "x", x)
    if type(dim) is not int:
        dim = _impl.integer("pixel_norm", "dim", dim)
    ndim = x.dim()
    if not -ndim <= dim < ndim:
        raise ValueError(f"pixel_norm: dim must be a dimension of x {tuple(x.shape)}, got {dim}")
    if type(eps) is not float or not eps >= 0:
        eps = _impl.number("pixel_norm", "eps", eps, least="at least 0")
    return dim % ndim, eps


# --- Reference: plain PyTorch, differentiable to any order.


def pixel_norm_reference(x: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The formula in PyTorch operations, in float32 for 16-bit types."""
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    return (x * (x.square().mean(dim, keepdim=True) + eps).rsqrt()).to(dtype)


# --- Triton. A program holds BLOCK_V vectors, BLOCK_C elements of each at a time.

if _impl.triton is not None:

    @triton.jit
    def _load(ptr, at, mask):
        return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def pixel_norm_kernel(
        g_ptr, dy_ptr, x_ptr, out_ptr, dx_ptr, outer, C, inner, eps,
        ORDER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        # ORDER 0: out = y. 1: out = dx of dy. 2: out = d(dy), dx = d(x) of g, the gradient of dx.
        # BLOCK_V vectors: WIDTH of inner, of BLOCK_V / WIDTH of outer.
        tiles = tl.cdiv(inner, WIDTH)
        v = tl.arange(0, BLOCK_V)[None, :]
        o = (tl.program_id(0) // tiles).to(tl.int64) * (BLOCK_V // WIDTH) + v // WIDTH
        i = (tl.program_id(0) % tiles).to(tl.int64) * WIDTH + v % WIDTH
        c = tl.arange(0, BLOCK_C)[:, None]
        base = o * C * inner + i
        channels = tl.cast(C, tl.int64)
        vectors = (o < outer) & (i < inner)
        xx = tl.zeros([BLOCK_V], tl.float32)
        gd = tl.zeros([BLOCK_V], tl.float32)
        gx = tl.zeros([BLOCK_V], tl.float32)
        xd = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, channels, BLOCK_C):
            at = base + (start + c.to(tl.int64)) * inner
            mask = vectors & (start + c < C)
            x = _load(x_ptr, at, mask)
            xx += tl.sum(x * x, 0)
            if ORDER > 0:
                dy = _load(dy_ptr, at, mask)
                xd += tl.sum(x * dy, 0)
            if ORDER > 1:
                g = _load(g_ptr, at, mask)
                gd += tl.sum(g * dy, 0)
                gx += tl.sum(g * x, 0)
        r = (1 / tl.sqrt(xx / C + eps))[None, :]
        k = r * r * r / C
        kgx = k * gx[None, :]
        kxd = k * xd[None, :]
        curve = 3 * kgx * kxd / r - k * gd[None, :]
        for start in range(0, channels, BLOCK_C):
            at = base + (start + c.to(tl.int64)) * inner
            mask = vectors & (start + c < C)
            x = _load(x_ptr, at, mask)
            if ORDER == 0:
                out = r * x
            else:
                dy = _load(dy_ptr, at, mask)
                out = r * dy - kxd * x
            if ORDER > 1:
                g = _load(g_ptr, at, mask)
                out = r * g - kgx * x
                dx = curve * x - kxd * g - kgx * dy
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)

    def _launch(order: int, tensors: list[Tensor], dim: int, eps: float) -> list[Tensor]:
        """tensors: x, or dy and x, or g, dy and x."""
        x = _impl.dense(tensors[-1])
        tensors = [*(_impl.laid_out_like(t, x) for t in tensors[:-1]), x]
        outputs = [torch.empty_like(x) for _ in range(2 if order == 2 else 1)]
        if x.numel() == 0:
            return outputs
        outer, C, inner = _impl.around(x, dim)
        block_c = _impl.power_of_2(C, 1024)
        block_v = max(8, 4096 // block_c)
        width = _impl.power_of_2(inner, block_v)
        grid = (triton.cdiv(outer, block_v // width) * triton.cdiv(inner, width),)
        g, dy = (tensors[-3] if order == 2 else x), (tensors[-2] if order else x)
        torch.library.wrap_triton(pixel_norm_kernel)[grid](
            g, dy, x, outputs[0], outputs[-1], outer, C, inner, eps,
            ORDER=order, BLOCK_C=block_c, BLOCK_V=block_v, WIDTH=width,
        )  # fmt: skip
        return outputs

    @_impl.triton_op("pixel_norm")
    def _triton_fwd(x: Tensor, dim: int, eps: float) -> Tensor:
        return _launch(0, [x], dim, eps)[0]

    @_impl.triton_op("pixel_norm_bwd")
    def _triton_bwd(dy: Tensor, x: Tensor, dim: int, eps: float) -> Tensor:
        return _launch(1, [dy, x], dim, eps)[0]

    @_impl.triton_op("pixel_norm_bwd2")
    def _triton_bwd2(
        g: Tensor, dy: Tensor, x: Tensor, dim: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        d_dy, d_x = _launch(2, [g, dy, x], dim, eps)
        return d_dy, d_x


# --- Shape functions of the registered ops.

_impl.register_fake("pixel_norm", lambda x, dim, eps: torch.empty_like(x))
_impl.register_fake("pixel_norm_bwd", lambda dy, x, dim, eps: torch.empty_like(x))
_impl.register_fake(
    "pixel_norm_bwd2", lambda g, dy, x, dim, eps: (torch.empty_like(x), torch.empty_like(x))
)


# --- Autograd, once for all implementations.


def _fwd(x: Tensor, *args) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _PixelNorm.apply(x, *args)
    return _impl.op(args[-1], "pixel_norm")(x, *args[:-1])


def _bwd(dy: Tensor, x: Tensor, *args) -> Tensor:
    if torch.is_grad_enabled():
        return _PixelNormBwd.apply(dy, x, *args)
    return _impl.op(args[-1], "pixel_norm_bwd")(dy, x, *args[:-1])


class _PixelNorm(torch.autograd.Function):
    """y from x."""

    @staticmethod
    def forward(ctx: Any, x, dim, eps, impl):
        ctx.save_for_backward(x)
        ctx.args = (dim, eps, impl)
        return _impl.op(impl, "pixel_norm")(x, dim, eps)

    @staticmethod
    def backward(ctx: Any, dy):
        (x,) = ctx.saved_tensors
        return _bwd(dy, x, *ctx.args), None, None, None


_call, _quick = remember(_plan, _fwd, _PixelNorm)


class _PixelNormBwd(torch.autograd.Function):
    """dx from dy and x: linear and symmetric in dy."""

    @staticmethod
    def forward(ctx: Any, dy, x, dim, eps, impl):
        ctx.save_for_backward(dy, x)
        ctx.args = (dim, eps, impl)
        return _impl.op(impl, "pixel_norm_bwd")(dy, x, dim, eps)

    @staticmethod
    def backward(ctx: Any, g):
        dy, x = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            d_dy, d_x = _PixelNormBwd2.apply(g, dy, x, *ctx.args)
        else:
            d_dy, d_x = _bwd(g, x, *ctx.args), None
        return d_dy, d_x, None, None, None


class _PixelNormBwd2(torch.autograd.Function):
    """The gradients of dx in dy and x; its own are composed of PyTorch's operations."""

    @staticmethod
    def forward(ctx: Any, g, dy, x, dim, eps, impl):
        ctx.save_for_backward(g, dy, x)
        ctx.args = (dim, eps)
        return _impl.op(impl, "pixel_norm_bwd2")(g, dy, x, dim, eps)

    @staticmethod
    def backward(ctx: Any, *grads):
        with torch.enable_grad():
            inputs = [t.view_as(t) for t in ctx.saved_tensors]
            outputs = _bwd2_reference(*inputs, *ctx.args)
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
        return (*(next(found) if t.requires_grad else None for t in inputs), None, None, None)


def _bwd2_reference(g, dy, x, dim, eps) -> tuple[Tensor, Tensor]:
    """What pixel_norm_bwd2 computes, differentiably: csrc/kernels/pixel_norm.cu."""
    dtype = x.dtype
    g, dy, x = (t.to(torch.promote_types(dtype, torch.float32)) for t in (g, dy, x))
    r = (x.square().mean(dim, keepdim=True) + eps).rsqrt()
    k = r.pow(3) / x.shape[dim]
    gd, gx, xd = ((a * b).sum(dim, keepdim=True) for a, b in ((g, dy), (g, x), (x, dy)))
    d_dy = r * g - k * gx * x
    d_x = (3 * k * k / r * gx * xd - k * gd) * x - k * (xd * g + gx * dy)
    return d_dy.to(dtype), d_x.to(dtype)
