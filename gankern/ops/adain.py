"""Adaptive instance normalisation, the style input of StyleGAN 1."""

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


def adain(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5, *, impl: str | None = None
) -> Tensor:
    """Normalise each sample's channel over its pixels, then scale and shift it by the style.

    y[n, c] = scale[n, c] * (x[n, c] - mean(x[n, c])) * rsqrt(var(x[n, c]) + eps) + shift[n, c]

    The variance is the biased one. `scale` multiplies as it is: where a network learns an offset
    from one, as StyleGAN's code does, pass `1 + style`.

    Args:
        x: [N, C, *], at least 3 dimensions; float32, float16, bfloat16 or float64; any strides
            (contiguous and channels-last ones are kept).
        scale: [N, C] of x's dtype or float32.
        shift: [N, C] of scale's dtype.
        eps: added to the variance; above 0 it keeps a constant channel finite.
        impl: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns:
        y of x's shape, dtype and memory format; 16-bit types are accumulated in float32.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: impl cannot run here.

    Gradients: in x, scale and shift, of any order. The first is a kernel; those above are composed
    of PyTorch's. Saves x, scale and [N, C] statistics.
    Source: Karras et al. 2019, "A Style-Based Generator Architecture", equation 1.
    """
    return (_call if is_compiling() else _quick)(x, scale, shift, eps, impl)


def _plan(x: Tensor, scale: Tensor, shift: Tensor, eps: float, impl: str | None) -> Plan:
    eps = _check(x, scale, shift, eps)
    chosen = _impl.choose("adain", impl, x)
    if chosen == "reference":
        return adain_reference, (x, scale, shift, eps)
    return _fwd, (x, scale, shift, eps, chosen)


def _check(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> float:
    """Validated eps."""
    for name, t in (("x", x), ("scale", scale), ("shift", shift)):
        _impl.check_float("adain", name, t)
    if x.dim() < 3:
        raise ValueError(f"adain: x must be (N, C, *), got {x.dim()} dimensions {tuple(x.shape)}")
    channels, device = x.shape[:2], x.device
    for name, t in (("scale", scale), ("shift", shift)):
        if t.shape != channels:
            raise ValueError(
                f"adain: {name} must be (N, C) = {tuple(channels)}, got {tuple(t.shape)}"
            )
        if t.device != device:
            raise ValueError(f"adain: {name} must be on x's device {device}, got {t.device}")
    if scale.dtype not in (x.dtype, torch.float32):
        raise _impl.wrong_dtype("adain", "scale", scale, x)
    if shift.dtype != scale.dtype:
        raise TypeError(f"adain: shift must be {scale.dtype} like scale, got {shift.dtype}")
    if type(eps) is not float or not eps >= 0:
        eps = _impl.number("adain", "eps", eps, least="at least 0")
    return eps


# --- Reference: plain PyTorch, differentiable to any order.


def adain_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula in PyTorch operations, in float32 for 16-bit types."""
    h, _, _ = _normalised(x, eps)
    scale, shift = (_per_plane(t, h) for t in (scale, shift))
    return (h * scale + shift).to(x.dtype)


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor, list[int]]:
    """(x - mean) * rstd, rstd, and the dimensions of a plane."""
    pixels = list(range(2, x.dim()))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - x.mean(pixels, keepdim=True)
    rstd = (x.square().mean(pixels, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd, pixels


def _per_plane(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.dtype).reshape(*t.shape, *[1] * (like.dim() - 2))


def _bwd_reference(dy, x, scale, eps) -> tuple[Tensor, Tensor, Tensor]:
    """What adain_bwd computes, differentiably: csrc/kernels/adain.cu."""
    h, rstd, pixels = _normalised(x, eps)
    dy = dy.to(h.dtype)
    dyh = dy * h
    dx = dy - dy.mean(pixels, keepdim=True) - h * dyh.mean(pixels, keepdim=True)
    dx = _per_plane(scale, h) * rstd * dx
    dscale, dshift = dyh.sum(pixels), dy.sum(pixels)
    return dx.to(x.dtype), dscale.to(scale.dtype), dshift.to(scale.dtype)


# --- Triton. A program holds BLOCK_V planes, BLOCK_P pixels of each at a time.

if _impl.triton is not None:

    @triton.jit
    def _planes(planes, P, inner, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr):
        """BLOCK_V planes, their first elements [1, BLOCK_V], and which there are. inner is 1, or C
        in channels-last memory; the planes are WIDTH of inner, of BLOCK_V / WIDTH samples."""
        tiles = tl.cdiv(inner, WIDTH)
        j = tl.arange(0, BLOCK_V)
        o = (tl.program_id(0) // tiles).to(tl.int64) * (BLOCK_V // WIDTH) + j // WIDTH
        i = (tl.program_id(0) % tiles).to(tl.int64) * WIDTH + j % WIDTH
        v = o * inner + i
        return v, (o * P * inner + i)[None, :], (v < planes) & (i < inner)

    @triton.jit
    def adain_fwd_kernel(
        x_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr, planes, P, inner, eps,
        BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        v, base, inside = _planes(planes, P, inner, BLOCK_V, WIDTH)
        p = tl.arange(0, BLOCK_P)[:, None]
        at = base + p.to(tl.int64) * inner
        step, pixels = tl.cast(inner, tl.int64), tl.cast(P, tl.int64)
        # Everything is taken relative to a plane's first pixel: nothing cancels, whatever the mean.
        origin = tl.load(x_ptr + base, mask=inside[None, :], other=0.0).to(tl.float32)
        mean = tl.zeros([BLOCK_V], tl.float32)
        m2 = tl.zeros([BLOCK_V], tl.float32)
        before = 0.0
        for start in range(0, pixels, BLOCK_P):
            count = tl.minimum(pixels - start, BLOCK_P).to(tl.int32)
            share = count / (before + count)
            mask = inside[None, :] & (p < count)
            x = tl.load(x_ptr + start * step + at, mask=mask, other=0.0)
            x = tl.where(mask, x.to(tl.float32) - origin, 0.0)
            block_mean = tl.sum(x, 0) / count
            d = tl.where(mask, x - block_mean[None, :], 0.0)
            # Chan's formula joins the mean and the squares of two parts without cancellation.
            delta = block_mean - mean
            mean += delta * share
            m2 += tl.sum(d * d, 0) + delta * delta * (before * share)
            before += count
        rstd = 1 / tl.sqrt(m2 / P + eps)
        tl.store(mean_ptr + v, mean + tl.sum(origin, 0), mask=inside)
        tl.store(rstd_ptr + v, rstd, mask=inside)
        scale = tl.load(scale_ptr + v, mask=inside, other=0.0).to(tl.float32) * rstd
        shift = tl.load(shift_ptr + v, mask=inside, other=0.0).to(tl.float32)
        for start in range(0, pixels, BLOCK_P):
            mask = inside[None, :] & (p < tl.minimum(pixels - start, BLOCK_P).to(tl.int32))
            x = tl.load(x_ptr + start * step + at, mask=mask, other=0.0).to(tl.float32) - origin
            y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
            tl.store(y_ptr + start * step + at, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def adain_bwd_kernel(
        dy_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dscale_ptr, dshift_ptr,
        planes, P, inner, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        v, base, inside = _planes(planes, P, inner, BLOCK_V, WIDTH)
        p = tl.arange(0, BLOCK_P)[:, None]
        at = base + p.to(tl.int64) * inner
        step, pixels = tl.cast(inner, tl.int64), tl.cast(P, tl.int64)
        mean = tl.load(mean_ptr + v, mask=inside, other=0.0)[None, :]
        rstd = tl.load(rstd_ptr + v, mask=inside, other=0.0)[None, :]
        d_sum = tl.zeros([BLOCK_V], tl.float32)
        dh_sum = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, pixels, BLOCK_P):
            first = start * step
            mask = inside[None, :] & (p < tl.minimum(pixels - start, BLOCK_P).to(tl.int32))
            dy = tl.load(dy_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
            h = (tl.load(x_ptr + first + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
            d_sum += tl.sum(dy, 0)
            dh_sum += tl.sum(dy * h, 0)
        tl.store(dscale_ptr + v, dh_sum.to(dscale_ptr.dtype.element_ty), mask=inside)
        tl.store(dshift_ptr + v, d_sum.to(dshift_ptr.dtype.element_ty), mask=inside)
        scale = tl.load(scale_ptr + v, mask=inside, other=0.0).to(tl.float32)[None, :] * rstd
        d_mean = (d_sum / P)[None, :]
        dh_mean = (dh_sum / P)[None, :]
        for start in range(0, pixels, BLOCK_P):
            first = start * step
            mask = inside[None, :] & (p < tl.minimum(pixels - start, BLOCK_P).to(tl.int32))
            dy = tl.load(dy_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
            h = (tl.load(x_ptr + first + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
            dx = scale * (dy - d_mean - h * dh_mean)
            tl.store(dx_ptr + first + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    def _blocks(x: Tensor) -> tuple[tuple[int, ...], tuple[int, int], dict[str, int]]:
        """The grid; pixels of a plane and the distance between them; the kernels' blocks."""
        pixels = x[0, 0].numel()
        inner = 1 if x.is_contiguous() else x.shape[1]
        block_v = 1 if inner == 1 else _impl.power_of_2(inner, 32)
        block_p = _impl.power_of_2(pixels, 4096 // block_v)
        block_v = max(block_v, 256 // block_p)
        width = _impl.power_of_2(inner, block_v)
        outer = x.shape[0] if inner > 1 else x.shape[0] * x.shape[1]
        grid = (triton.cdiv(outer, block_v // width) * triton.cdiv(inner, width),)
        return grid, (pixels, inner), {"BLOCK_P": block_p, "BLOCK_V": block_v, "WIDTH": width}

    @_impl.triton_op("adain")
    def _triton_fwd(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=_impl.memory_format(x))
        y = torch.empty_like(x)
        statistics = torch.zeros((2, *x.shape[:2]), dtype=torch.float32, device=x.device)
        if x.numel():
            grid, sizes, blocks = _blocks(x)
            torch.library.wrap_triton(adain_fwd_kernel)[grid](
                x, scale.contiguous(), shift.contiguous(), y, *statistics, scale.numel(), *sizes,
                eps, **blocks,
            )  # fmt: skip
        return y, statistics

    @_impl.triton_op("adain_bwd")
    def _triton_bwd(
        dy: Tensor, x: Tensor, scale: Tensor, statistics: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = _impl.memory_format(x)
        x, dy = x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)
        scale = scale.contiguous()
        dx, dscale, dshift = torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(scale)
        if x.numel():
            grid, sizes, blocks = _blocks(x)
            torch.library.wrap_triton(adain_bwd_kernel)[grid](
                dy, x, scale, *statistics, dx, dscale, dshift, scale.numel(), *sizes, **blocks
            )
        return dx, dscale, dshift


# --- Shape functions of the registered ops.


def _fake_fwd(x, scale, shift, eps):
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty_like(x, memory_format=_impl.memory_format(x))
    return y, x.new_empty((2, *x.shape[:2]), dtype=dtype)


def _fake_bwd(dy, x, scale, statistics):
    dscale = scale.new_empty(scale.shape)
    return (
        torch.empty_like(x, memory_format=_impl.memory_format(x)),
        dscale,
        torch.empty_like(dscale),
    )


_impl.register_fake("adain", _fake_fwd)
_impl.register_fake("adain_bwd", _fake_bwd)


# --- Autograd, once for all implementations.


def _fwd(x: Tensor, scale: Tensor, shift: Tensor, eps: float, impl: str) -> Tensor:
    if _impl.records(x, scale, shift):
        return _Adain.apply(x, scale, shift, eps, impl)
    return _impl.op(impl, "adain")(x, scale, shift, eps)[0]


class _Adain(torch.autograd.Function):
    """y from x, scale and shift; keeps each plane's mean and rstd for the gradient."""

    @staticmethod
    def forward(ctx: Any, x, scale, shift, eps, impl):
        y, statistics = _impl.op(impl, "adain")(x, scale, shift, eps)
        ctx.save_for_backward(x, scale, statistics)
        ctx.args = (eps, impl)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        if torch.is_grad_enabled():
            grads = _AdainBwd.apply(dy, *ctx.saved_tensors, *ctx.args)
        else:
            grads = _impl.op(ctx.args[-1], "adain_bwd")(dy, *ctx.saved_tensors)
        return (*grads, None, None)


_call, _quick = remember(_plan, _fwd, _Adain)


class _AdainBwd(torch.autograd.Function):
    """dx, dscale and dshift from dy; its own gradient is composed of PyTorch's operations."""

    @staticmethod
    def forward(ctx: Any, dy, x, scale, statistics, eps, impl):
        ctx.save_for_backward(dy, x, scale)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return _impl.op(impl, "adain_bwd")(dy, x, scale, statistics)

    @staticmethod
    def backward(ctx: Any, *grads):
        nothing = (None,) * 3
        if all(g is None for g in grads):
            return None, None, None, *nothing
        with torch.enable_grad():
            inputs = [t.view_as(t) for t in ctx.saved_tensors]
            dy, x, scale = inputs
            outputs = _bwd_reference(dy, x, scale, ctx.eps)
            pairs = [
                (o, g)
                for o, g in zip(outputs, grads, strict=True)
                if g is not None and o.requires_grad
            ]
            if not pairs:
                return None, None, None, *nothing
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    wanted,
                    [g for _, g in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
            )
        return (*(next(found) if t.requires_grad else None for t in inputs), *nothing)
