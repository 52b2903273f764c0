"""The StyleGAN2 layer: modulated convolution, and one kernel for everything that follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gankern.ops.conv2d_resample import (
    Convolve,
    check_conv,
    filter_padding,
    resampled_conv,
    to_conv_dtype,
    transposed_conv,
)
from gankern.ops.convolution import convolution
from gankern.ops.modulated_conv2d import check_modulated, modulation, scaled_convolution
from gankern.ops.synthesis_epilogue import synthesis_epilogue

__all__ = ["conv2d_layer", "synthesis_layer"]


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
    activates: the full-resolution image is read once and written once.

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
        TypeError, ValueError: an argument is none of the above.

    Differentiable to any order in x, weight, styles, b, noise and noise_strength. Source: StyleGAN2
    (Karras et al., 2020), figure 2 and appendix B.
    """
    pads = check_modulated("synthesis_layer", x, weight, styles, noise, up, 1, padding)
    x, weight, styles, d = modulation(x, weight, styles, demodulate, impl)
    conv = (resample_filter, up, 1, pads, 1, flip_weight, False)
    tail = (d, noise, noise_strength, b, act, alpha, gain, clamp)
    return _conv_epilogue(x, weight, conv, tail, impl, scaled_convolution(styles, impl))


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

    Args: as `conv2d_resample`, `bias_act` and `synthesis_layer`.

    Returns: as `conv2d_resample`.

    Differentiable to any order in x, w, b, noise and noise_strength.
    """
    pads = check_conv("conv2d_layer", x, w, up, down, padding, groups)
    x, w = to_conv_dtype(x, w)
    conv = (f, up, down, pads, groups, flip_weight, False)
    tail = (None, noise, noise_strength, b, act, alpha, gain, clamp)
    return _conv_epilogue(x, w, conv, tail, impl)


def _conv_epilogue(
    x: Tensor,
    w: Tensor,
    conv: tuple[Any, ...],
    tail: tuple[Any, ...],
    impl: str | None,
    convolve: Convolve = convolution,
) -> Tensor:
    f, up, down, pads, groups, flip_weight, flip_filter = conv
    d, noise, noise_strength, b, act, alpha, gain, clamp = tail
    pads = filter_padding(f, up, down, pads)
    if up > 1 and down == 1 and w.shape[2:].numel() > 1:
        x, pads = transposed_conv(x, w, up, pads, groups, flip_weight, impl, convolve=convolve)
        filter_gain = float(up**2)
    else:
        how = (groups, flip_weight, flip_filter, impl)
        x = resampled_conv(x, w, f, up, down, pads, *how, convolve=convolve)
        f, pads, filter_gain = None, [0, 0, 0, 0], 1.0
    return synthesis_epilogue(x, f, d, noise, noise_strength, b, pads, flip_filter, filter_gain,
                              act, alpha, gain, clamp, impl=impl)  # fmt: skip
