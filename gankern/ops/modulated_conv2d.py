"""StyleGAN2's convolution: weights scaled by a style per sample, and renormalised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import remember_function
from gankern.ops.conv2d_resample import (
    Convolve,
    check_conv,
    conv_dtype,
    filter_padding,
    resampled_conv,
    resampled_shape,
    to_conv_dtype,
)
from gankern.ops.convolution import (
    Form,
    _forward,
    _gradients,
    _ours,
    convolution,
    gate,
    no_weight_gradients,
    weight_gradient,
    weight_gradients,
)
from gankern.ops.demod_coefs import demod_coefs
from gankern.ops.synthesis_epilogue import _bwd as epilogue_bwd
from gankern.ops.synthesis_epilogue import synthesis_epilogue

__all__ = ["modulated_conv2d", "no_weight_gradients"]

MOST_OUTPUTS = 16  # of 1x1 convolutions whose weights are multiplied by the styles
SCALED_BACKWARD = "convolution_scaled_backward"
POINTWISE = (1, (0, 0), False, (0, 0), 1)  # their Form


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    fused_modconv: bool = False,
    *,
    impl: str | None = None,
) -> Tensor:
    """Convolve each sample with its own weights, `weight * styles`, normalised per output channel.

    `w[n,o,i,k] = weight[o,i,k] * styles[n,i]`, with demodulation divided by
    `sqrt(sum_ik w[n,o,i,k]² + 1e-8)`, then `y = conv2d_resample(x, w) + noise`.
    The styles scale the input and the coefficients scale the output instead, so that the weights of
    a sample are never built. A float16 convolution gets weights and styles scaled to where no sum
    can overflow, and its output scaled back by the coefficients.

    Args:
        x: images, (N, I, H, W); float32, float16, bfloat16 or float64.
        weight: (O, I, kh, kw), in any dtype; the convolution runs in the dtype of `x`.
        styles: (N, I), in any dtype.
        noise: added to the output, of a shape that broadcasts to it, such as (N, 1, out_h, out_w).
        up, down, padding, flip_weight: as `conv2d_resample`.
        resample_filter: filter of the resampling, as `f` of `conv2d_resample`.
        demodulate: normalise the weights of each sample and output channel to length 1.
        fused_modconv: build the weights of every sample and run one grouped convolution. It saves
            passes over small images at batch 1, and costs memory in training.
        impl: "cuda", "triton", "cpu", "reference", or None for the best usable one.

    Returns:
        (N, O, out_h, out_w) in the dtype of `x`, in size as `conv2d_resample`.

    Raises:
        TypeError, ValueError: an argument is none of the above, or no output is left.
        RuntimeError: impl cannot run here.

    Differentiable to any order in x, weight, styles and noise. Source: StyleGAN2 (Karras et al.,
    2020), equations 1 to 3; range of float16: StyleGAN2-ADA (Karras et al., 2020), appendix C.
    """
    op, f = "modulated_conv2d", resample_filter
    pads = check_modulated(op, x, weight, styles, f, up, down, padding, impl)
    if noise is not None:
        _check_noise(op, noise, x, resampled_shape(x.shape, weight.shape, up, down, pads))
    demodulate, flip_weight = check_flags(op, demodulate, flip_weight)
    if fused_modconv is not False and fused_modconv is not True:
        fused_modconv = _impl.flag(op, "fused_modconv", fused_modconv)
    args = (up, down, pads, 1, flip_weight, False)
    if fused_modconv:
        y = _grouped(x, weight, styles, f, demodulate, args, impl)
        return y if noise is None else y + noise.to(y.dtype)
    x, weight, styles, d = modulation(x, weight, styles, demodulate, impl)
    pads = filter_padding(f, up, down, pads)
    how = (up, down, pads, 1, flip_weight, False, impl)
    convolve = scaled_convolution(styles, impl)
    y = resampled_conv(x, weight, f, *how, convolve=convolve)
    return _scale_add(y, d, noise)


def _grouped(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    f: Tensor | None,
    demodulate: bool,
    args: tuple,
    impl: str | None,
) -> Tensor:
    """All samples as groups of one convolution, with weights of their own."""
    n, i = x.shape[:2]
    o = weight.shape[0]
    weight = gate(weight)
    w = weight * styles.to(weight.dtype)[:, None, :, None, None]  # [N, O, I, kh, kw]
    if demodulate:
        w = w * demod_coefs(weight, styles, impl=impl).to(w.dtype)[:, :, None, None, None]
    up, down, pads, _, flip_weight, flip_filter = args
    x, w = to_conv_dtype(x.reshape(1, n * i, *x.shape[2:]), w.flatten(0, 1))
    pads = filter_padding(f, up, down, pads)
    y = resampled_conv(x, w, f, up, down, pads, n, flip_weight, flip_filter, impl, derived=True)
    return y.reshape(n, o, *y.shape[2:])


def scaled_convolution(styles: Tensor, impl: str | None) -> Convolve:
    """The convolution of images times their styles, [N, I].

    Our kernels multiply as they read the images, and on a CPU 1x1 weights with few outputs, as a
    ToRGB's, are multiplied themselves; on a GPU this would take more launches, for penalties most.
    Elsewhere the product is an image.
    """

    def convolve(x: Tensor, w: Tensor, form: Form) -> Tensor:
        few = x.is_cpu and w.shape[2:] == (1, 1) and len(w) <= MOST_OUTPUTS
        few = few and form == Form(*POINTWISE, form.own)
        if few and _impl.choose("synthesis_epilogue", impl, x) != "reference":
            return _per_sample(x, w, styles)
        own = styles.dtype == torch.float32 and not _impl.transformed()
        if not own or not _ours(w, x, None, form):
            return convolution(scale(x, styles, impl), w, form)
        if _impl.records(x, styles, w):
            apply = _checked if is_compiling() else _quick
            return apply(x, styles, w, form)
        return _forward(x, w, form, styles)

    return convolve


def _per_sample(x: Tensor, w: Tensor, styles: Tensor) -> Tensor:
    """The 1x1 convolution of each sample by its own weights, in the memory format of x."""
    (n, i, height, width), o = x.shape, len(w)
    weights = (w.view(1, o, i).to(styles.dtype) * styles[:, None]).to(x.dtype)  # [N, O, I]
    if _impl.memory_format(x) == torch.channels_last:
        rows = x.permute(0, 2, 3, 1).reshape(n, height * width, i)
        y = torch.bmm(rows, weights.transpose(1, 2))
        return y.view(n, height, width, o).permute(0, 3, 1, 2)
    return torch.bmm(weights, x.reshape(n, i, height * width)).view(n, o, height, width)


def scale(x: Tensor, styles: Tensor, impl: str | None) -> Tensor:
    """x * styles[:, :, None, None]."""
    if _impl.choose("synthesis_epilogue", impl, x) == "reference":
        return x * styles.to(x.dtype)[:, :, None, None]
    # An epilogue of nothing but a factor a channel: its gradients take one launch each.
    return synthesis_epilogue(x, d=styles, act="linear", impl=impl)


class _ScaledConvolution(torch.autograd.Function):
    """The convolution of x * styles, which is not stored, by the CPU's kernels."""

    @staticmethod
    def forward(ctx: Any, x, styles, w, form):
        ctx.save_for_backward(x, styles, w)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return _forward(x, w, form, styles)

    @staticmethod
    def backward(ctx: Any, dy):
        if dy is None:
            return (None,) * 4
        x, styles, w = ctx.saved_tensors
        form, needs = ctx.form, ctx.needs_input_grad
        scaled = needs[0] or needs[1]
        wanted = [scaled, needs[2] and (weight_gradients() or form.derived)]
        adjoint = form.adjoint(x, dy, w)
        dx = d_styles = None
        if scaled and _in_one_pass(dy, x, w, adjoint):
            dx, d_styles = _impl.op("cpu", SCALED_BACKWARD)(dy, w, x, styles, *adjoint.place())
            scaled = wanted[0] = False
        if torch.is_grad_enabled():
            dz = convolution(dy, w, adjoint) if scaled else None
            dw = weight_gradient(dy, scale(x, styles, "cpu"), w, form) if wanted[1] else None
        else:
            dz, dw = _gradients(dy, x, w, form, wanted, styles) if any(wanted) else (None, None)
        if scaled:
            linear = (0, 0, 0, 0, False, 1.0, "linear", 0.0, 1.0, -1.0, "cpu")
            dx, d_styles, _, _ = epilogue_bwd(dz, x, None, styles, None, None, None, linear)
        return dx if needs[0] else None, d_styles if needs[1] else None, dw, None


_checked, _quick = remember_function(_ScaledConvolution)


def _in_one_pass(dy: Tensor, x: Tensor, w: Tensor, adjoint: Form) -> bool:
    """Whether the gradients of x and of its styles are written by the convolution they come from:
    by our kernels."""
    if torch.is_grad_enabled() or not _ours(w, dy, None, adjoint):
        return False
    return _impl.memory_format(x) == _impl.memory_format(dy)


def _fake_scaled_backward(dy, w, x, styles, *place):
    layout = _impl.memory_format(x)
    return torch.empty_like(x, memory_format=layout), styles.new_empty(styles.shape)


_impl.register_fake(SCALED_BACKWARD, _fake_scaled_backward)


def modulation(
    x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, impl: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Image and weights in the convolution's dtype, styles, and what scales its output, both in
    float32 or more."""
    dtype = conv_dtype(x)
    weight = gate(weight)
    d: Tensor | None = None
    if demodulate and dtype == torch.float16:
        weight, styles, d = _in_range(weight, styles, impl)
    elif demodulate:
        d = demod_coefs(weight, styles, impl=impl)
    full = torch.promote_types(dtype, torch.float32)
    return x.to(dtype), weight.to(dtype), styles.to(full), None if d is None else d.to(full)


def _in_range(weight: Tensor, styles: Tensor, impl: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """For float16: weights of length 1, styles of at most 1, and the coefficients to match.

    No sum is then over sqrt(fan_in) times the largest |x|. The scales are constants to autograd:
    they cancel in the output.
    """
    weight, styles = weight.float(), styles.float()
    largest = torch.linalg.vector_norm(styles.detach(), math.inf, 1, keepdim=True)  # [N, 1]
    styles = styles / largest.clamp_min(1e-30)
    d = demod_coefs(weight, styles, impl=impl)
    length = torch.linalg.vector_norm(weight.detach(), dim=[1, 2, 3]).clamp_min(1e-30)  # [O]
    length = length[:, None, None, None]
    unit = (weight / length).half() if _impl.transformed() else _Quotient.apply(weight, length)
    return unit, styles, d * length.flatten()


class _Quotient(torch.autograd.Function):
    """x / length in float16, of a constant length: one launch each way, where a cast takes another.

    Both are in float32, so that the gradient is too.
    """

    @staticmethod
    def forward(ctx: Any, x, length):
        ctx.save_for_backward(length)
        return torch.div(x, length, out=torch.empty_like(x, dtype=torch.float16))

    @staticmethod
    def backward(ctx: Any, dy):
        (length,) = ctx.saved_tensors
        return dy / length, None


def _scale_add(y: Tensor, d: Tensor | None, noise: Tensor | None) -> Tensor:
    """y * d + noise, in float32 for 16-bit images."""
    if d is None and noise is None:
        return y
    out = y.to(torch.promote_types(y.dtype, torch.float32))
    if d is not None:
        out = out * d.to(out.dtype)[:, :, None, None]
    if noise is not None:
        out = out + noise.to(out.dtype)
    return out.to(y.dtype)


def check_modulated(
    op: str,
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    f: Tensor | None,
    up: int,
    down: int,
    padding: int | Sequence[int],
    impl: str | None,
    wide: bool = True,
) -> list[int]:
    """The padding of a valid modulated convolution; f: its resample_filter."""
    names = ("weight", "resample_filter", wide)
    pads = check_conv(op, x, weight, f, up, down, padding, 1, impl, *names)
    if not isinstance(styles, Tensor) or not styles.is_floating_point():
        got = styles.dtype if isinstance(styles, Tensor) else type(styles).__name__
        raise TypeError(f"{op}: styles must be a floating-point tensor, got {got}")
    if styles.shape != x.shape[:2]:
        raise ValueError(
            f"{op}: styles must be (N, I) = {tuple(x.shape[:2])}, got shape {tuple(styles.shape)}"
        )
    if styles.device != x.device:
        raise ValueError(f"{op}: styles must be on {x.device} like x, got {styles.device}")
    return pads


def check_flags(op: str, demodulate: bool, flip_weight: bool) -> tuple[bool, bool]:
    if demodulate is not True and demodulate is not False:
        demodulate = _impl.flag(op, "demodulate", demodulate)
    if flip_weight is not True and flip_weight is not False:
        flip_weight = _impl.flag(op, "flip_weight", flip_weight)
    return demodulate, flip_weight


def _check_noise(op: str, noise: Any, x: Tensor, out: tuple[int, ...]) -> None:
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"{op}: noise must be a floating-point tensor or None, got {got}")
    fits = zip(reversed(noise.shape), reversed(out), strict=False)
    if noise.ndim > 4 or not all(size in (1, wanted) for size, wanted in fits):
        raise ValueError(f"{op}: noise must broadcast to {out}, got shape {tuple(noise.shape)}")
    if noise.device != x.device:
        raise ValueError(f"{op}: noise must be on {x.device} like x, got {noise.device}")
