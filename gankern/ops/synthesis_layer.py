"""The StyleGAN2 layer: modulated convolution, and one kernel for everything that follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import remember_function
from gankern.ops.bias_act import ACTS, needs_input
from gankern.ops.bias_act import _bwd as bias_act_bwd
from gankern.ops.conv2d_resample import (
    check_conv,
    filter_padding,
    resampled_conv,
    resampled_shape,
    to_conv_dtype,
    transposed_conv,
)
from gankern.ops.convolution import Form, _ours, convolution, gradients
from gankern.ops.convolution import _fake as fake_convolution
from gankern.ops.modulated_conv2d import (
    check_flags,
    check_modulated,
    modulation,
    scaled_convolution,
)
from gankern.ops.synthesis_epilogue import check_tail, epilogue, flat_noise

__all__ = ["conv2d_layer", "synthesis_layer"]

OP = "convolution_epilogue"


def synthesis_layer(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    b: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    up: int = 1,
    padding: int | Sequence[int] = 1,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    act: str = "lrelu",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """One layer of StyleGAN2's synthesis network.

    `y = clamp(act(modulated_conv2d(x, weight, styles) + noise * noise_strength + b) * gain)`.
    After torch's convolution a single kernel resamples, demodulates, adds noise and bias and
    activates: the full-resolution image is read once and written once. On the CPU our own 3x3
    convolutions do that as they write their output, where no gradient is recorded and up is 1.

    Args:
        x: images, (N, I, H, W); float32, float16, bfloat16 or float64.
        weight: (O, I, kh, kw), in any dtype; the convolution runs in the dtype of `x`.
        styles: (N, I), in any dtype.
        b: bias, (O,), or None.
        noise: (N, 1, out_h, out_w), (1, 1, out_h, out_w) or (out_h, out_w), or None.
        noise_strength: factor on the noise, one value or (O,); None is 1.
        up: factor of the upsampling.
        padding: zeros around the upsampled image; int, [x, y] or [x0, x1, y0, y1].
        resample_filter: float32, (taps_y, taps_x) or (taps,); None is the identity.
        demodulate: normalise the weights of each sample and output channel to length 1.
        flip_weight: True is a correlation, like torch's conv2d; False a convolution.
        act, alpha, gain, clamp: as `bias_act`.
        impl: "cuda", "triton", "cpu", "reference", or None for the best usable one.

    Returns:
        (N, O, H * up, W * up) for `padding` of half the kernel, in the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument is none of the above, or no output is left.
        RuntimeError: impl cannot run here.

    Differentiable to any order in x, weight, styles, b, noise and noise_strength. Source: StyleGAN2
    (Karras et al., 2020), figure 2 and appendix B.
    """
    f, numbers = resample_filter, (act, alpha, gain, clamp)
    return layer("synthesis_layer", x, weight, styles, b, noise, noise_strength, up, padding, f,
                 demodulate, flip_weight, *numbers, impl)  # fmt: skip


def layer(op, x, weight, styles, b, noise, noise_strength, up, padding, f, demodulate, flip_weight,
          act, alpha, gain, clamp, impl) -> Tensor:  # fmt: skip
    """`synthesis_layer`, under the name that was called, which errors tell."""
    pads = check_modulated(op, x, weight, styles, f, up, 1, padding, impl, wide=False)
    demodulate, flip_weight = check_flags(op, demodulate, flip_weight)
    x, weight, styles, d = modulation(x, weight, styles, demodulate, impl)
    conv = (f, up, 1, pads, 1, flip_weight, False)
    tail = (d, noise, noise_strength, b, act, alpha, gain, clamp)
    return _conv_epilogue(op, x, weight, conv, tail, impl, styles)


def conv2d_layer(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """`bias_act(conv2d_resample(x, w, f, ...) + noise * noise_strength, b, ...)`, in few passes.

    The layer of a discriminator, and of StyleGAN's generator. The filter that follows an upsampling
    convolution runs in the kernel of noise, bias and activation.

    Args: as `conv2d_resample`, `bias_act` and `synthesis_layer`; f is float32 even beside a
        float64 x.

    Returns: as `conv2d_resample`. Where a gradient is recorded it must not be modified in place: on
    the CPU our own 3x3 convolutions save it, not the convolution's output.

    Raises:
        TypeError, ValueError: an argument is none of the above, or no output is left.
        RuntimeError: impl cannot run here.

    Differentiable to any order in x, w, b, noise and noise_strength.
    """
    op = "conv2d_layer"
    pads = check_conv(op, x, w, f, up, down, padding, groups, impl, wide=False)
    if flip_weight is not True and flip_weight is not False:
        flip_weight = _impl.flag(op, "flip_weight", flip_weight)
    x, w = to_conv_dtype(x, w)
    conv = (f, up, down, pads, groups, flip_weight, False)
    tail = (None, noise, noise_strength, b, act, alpha, gain, clamp)
    return _conv_epilogue(op, x, w, conv, tail, impl)


def _conv_epilogue(
    op: str,
    x: Tensor,
    w: Tensor,
    conv: tuple[Any, ...],
    tail: tuple[Any, ...],
    impl: str | None,
    styles: Tensor | None = None,
) -> Tensor:
    f, up, down, pads, groups, flip_weight, flip_filter = conv
    shape = resampled_shape(x.shape, w.shape, up, down, pads)
    d, noise, strength, b, act, alpha, gain, clamp = tail
    numbers = check_tail(op, x, shape, noise, strength, b, act, alpha, gain, clamp)
    tail = (d, noise, strength, b, act, *numbers)
    convolve = convolution if styles is None else scaled_convolution(styles, impl)
    pads = filter_padding(f, up, down, pads)
    plain = (0, 0, 0, 0, flip_filter, 1.0)
    nothing = _is_identity(*tail)

    def behind(y: Tensor, f: Tensor | None, *how: Any) -> Tensor:
        if nothing and f is None and how == plain:
            return y
        return epilogue(y, f, d, noise, strength, b, (*how, act, *numbers), impl)

    def both(x: Tensor, w: Tensor, form: Form) -> Tensor:
        if not nothing and _one_kernel(x, w, form, styles, tail, impl):
            return _convolution_epilogue(x, w, form, styles, *tail)
        return behind(convolve(x, w, form), None, *plain)

    if up > 1 and down == 1 and w.shape[2:].numel() > 1:
        x, pads = transposed_conv(x, w, up, pads, groups, flip_weight, impl, convolve=convolve)
        return behind(x, f, *pads, flip_filter, float(up**2))
    how = (up, down, pads, groups, flip_weight, flip_filter, impl)
    if up == 1:  # the convolution comes last
        return resampled_conv(x, w, f, *how, convolve=both)
    return behind(resampled_conv(x, w, f, *how, convolve=convolve), None, *plain)


def _is_identity(d, noise, strength, b, act, alpha, gain, clamp) -> bool:
    """Whether nothing follows the convolution."""
    operands = d is None and noise is None and strength is None and b is None
    return operands and act == "linear" and gain == 1 and clamp < 0


def _one_kernel(x, w, form, styles, tail, impl) -> bool:
    """Whether a kernel of ours is convolution and epilogue: where no gradient will ask for the
    convolution's output."""
    if _impl.transformed() or form.transposed or w.dtype != x.dtype or w.shape[2:] != (3, 3):
        return False
    if not _ours(w, x, None, form):
        return False
    if styles is not None and styles.dtype != torch.float32:
        return False
    if _impl.records(x, w, styles, *tail[:4]):
        d, noise, act, alpha = tail[0], tail[1], tail[4], tail[5]
        if styles is not None or d is not None or noise is not None or needs_input(act, alpha):
            return False
    return _impl.choose("synthesis_epilogue", impl, x) == "cpu"


def _convolution_epilogue(x, w, form, styles, d, noise, strength, b, act, alpha, gain, clamp):
    args = (act, alpha, gain, clamp)
    if _impl.records(x, w, b):
        apply = _checked if is_compiling() else _quick
        return apply(x, w, b, form, args)
    return _call(x, w, styles, form, d, *flat_noise(noise, strength), b, *args)


def _call(x, w, factors, form, d, noise, strength, b, act, *numbers):
    at = (form.stride, *form.padding)
    return _impl.op("cpu", OP)(x, w, factors, *at, d, noise, strength, b, ACTS[act].code, *numbers)


class _ConvolutionBiasAct(torch.autograd.Function):
    """y from x, w and b, by one kernel: the gradient of bias_act needs no more than y."""

    @staticmethod
    def forward(ctx: Any, x, w, b, form, args):
        y = _call(x, w, None, form, None, None, None, b, *args)
        ctx.save_for_backward(x, w, b, y)
        ctx.form, ctx.args = form, args
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        if dy is None:
            return (None,) * 5
        x, w, b, y = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dz, db = bias_act_bwd(dy, y, b, needs[2], 1, *ctx.args, False, "cpu")
        return *gradients(dz, x, w, ctx.form, needs[:2]), db if needs[2] else None, None, None


_checked, _quick = remember_function(_ConvolutionBiasAct)


def _fake(x, w, factors, stride, pad_y, pad_x, *args):
    return fake_convolution(x, w, factors, stride, pad_y, pad_x, False, 0, 0)


_impl.register_fake(OP, _fake)
