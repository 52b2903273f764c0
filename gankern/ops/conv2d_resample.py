"""Convolution fused with up- or downsampling, in the cheapest order of the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.ops import _impl
from gankern.ops.convolution import Form, convolution, has_own_kernels, no_weight_gradients
from gankern.ops.upfirdn2d import check_filter, check_length, check_padding, upfirdn2d

__all__ = ["conv2d_resample", "no_weight_gradients"]

Convolve = Callable[[Tensor, Tensor, Form], Tensor]  # of x and w, as `convolution`


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
    *,
    impl: str | None = None,
) -> Tensor:
    """Upsample by `up`, convolve, downsample by `down`, as one operation.

    `y = downsample(conv2d(pad(upsample(x))))`, where both resampling steps filter with `f` and the
    upsampling keeps the brightness (gain `up²`). The filter and the convolution commute, so that no
    zero of the upsampled image is multiplied: upsampling is a transposed convolution of stride
    `up` and then a filter; downsampling is a filter and then a convolution of stride `down`; a 1x1
    convolution runs at the lower of the two resolutions.

    Args:
        x: images, (N, I, H, W); float32, float16, bfloat16 or float64.
        w: weights, (O, I / groups, kh, kw), cast to the dtype of `x`.
        f: resampling filter, float32, (taps_y, taps_x) or (taps,); None is the identity.
        up: factor of the upsampling before the convolution.
        down: factor of the downsampling after it.
        padding: zeros around the upsampled image; int, [x, y] or [x0, x1, y0, y1]. The filter's own
            padding is added.
        groups: of input channels.
        flip_weight: True is a correlation, like torch's conv2d; False a convolution.
        flip_filter: False is a convolution with `f`, True a correlation.
        impl: "cuda", "triton", "cpu", "reference"; None is the best usable one. The convolution is
            PyTorch's, but for "cpu", and None on a CPU, kernels of our own run float32 ones of 3x3
            taps, and of 4x4 at stride 2 and padding 1, where they are faster.

    Returns:
        (N, O, (H * up + y0 + y1 - kh) // down + 1, ...) in the dtype of `x`, up to the remainder
        that an odd size leaves.

    Raises:
        TypeError, ValueError: an argument is none of the above, or no output is left.
        RuntimeError: impl cannot run here.

    Differentiable to any order in x and w. Source: StyleGAN2 (Karras et al., 2020), appendix B.
    """
    op = "conv2d_resample"
    pads = check_conv(op, x, w, f, up, down, padding, groups, impl)
    if flip_weight is not True and flip_weight is not False:
        flip_weight = _impl.flag(op, "flip_weight", flip_weight)
    if flip_filter is not True and flip_filter is not False:
        flip_filter = _impl.flag(op, "flip_filter", flip_filter)
    x, w = to_conv_dtype(x, w)
    pads = filter_padding(f, up, down, pads)
    return resampled_conv(x, w, f, up, down, pads, groups, flip_weight, flip_filter, impl)


def resampled_conv(
    x: Tensor,
    w: Tensor,
    f: Tensor | None,
    up: int,
    down: int,
    pads: list[int],
    groups: int,
    flip_weight: bool,
    flip_filter: bool,
    impl: str | None,
    derived: bool = False,
    convolve: Convolve = convolution,
) -> Tensor:
    """`conv2d_resample` of checked arguments, the filter's own padding included in `pads`."""
    kh, kw = w.shape[2:]
    resample: dict[str, Any] = {"flip_filter": flip_filter, "impl": impl}
    conv: dict[str, Any] = {"groups": groups, "flip_weight": flip_weight, "impl": impl}
    conv |= {"derived": derived, "convolve": convolve}
    if kh == kw == 1 and down > 1 and up == 1:
        x = upfirdn2d(x, f, down=down, padding=pads, **resample)
        return _conv2d(x, w, **conv)
    if kh == kw == 1 and up > 1 and down == 1:
        x = _conv2d(x, w, **conv)
        return upfirdn2d(x, f, up=up, padding=pads, gain=up**2, **resample)
    if up > 1:
        x, pads = transposed_conv(x, w, up, pads, **conv)
        x = upfirdn2d(x, f, padding=pads, gain=up**2, **resample)
        return upfirdn2d(x, f, down=down, **resample) if down > 1 else x
    if down > 1:
        x = upfirdn2d(x, f, padding=pads, **resample)
        return _conv2d(x, w, stride=down, **conv)
    if pads[0] == pads[1] >= 0 and pads[2] == pads[3] >= 0:
        return _conv2d(x, w, padding=(pads[2], pads[0]), **conv)
    if min(pads) < 0 < max(pads):  # a crop may be of more than the image: of its zeros too
        x, pads = F.pad(x, [max(p, 0) for p in pads]), [min(p, 0) for p in pads]
    return _conv2d(F.pad(x, pads), w, **conv)


def transposed_conv(
    x: Tensor,
    w: Tensor,
    up: int,
    pads: list[int],
    groups: int,
    flip_weight: bool,
    impl: str | None,
    derived: bool = False,
    convolve: Convolve = convolution,
) -> tuple[Tensor, list[int]]:
    """The convolution of the zero-upsampled x, and the padding that is left for the filter."""
    kh, kw = w.shape[2:]
    # A transposed convolution pads by itself: kw - 1 before, and behind up - 1 zeros less.
    x0, x1, y0, y1 = pads
    x0, x1, y0, y1 = x0 - (kw - 1), x1 - (kw - up), y0 - (kh - 1), y1 - (kh - up)
    crop_x, crop_y = max(min(-x0, -x1), 0), max(min(-y0, -y1), 0)
    o = w.shape[0]
    w = w.unflatten(0, (groups, o // groups)).transpose(1, 2).flatten(0, 1)  # [I, O/groups, kh, kw]
    w = w.flip([2, 3]) if flip_weight and kh * kw > 1 else w
    form = Form(up, (crop_y, crop_x), True, (0, 0), groups, has_own_kernels(x, impl), derived)
    return convolve(x, w, form), [x0 + crop_x, x1 + crop_x, y0 + crop_y, y1 + crop_y]


def _conv2d(
    x: Tensor,
    w: Tensor,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    flip_weight: bool = True,
    impl: str | None = None,
    derived: bool = False,
    convolve: Convolve = convolution,
) -> Tensor:
    w = w if flip_weight or w.shape[2:].numel() == 1 else w.flip([2, 3])
    own = has_own_kernels(x, impl)
    return convolve(x, w, Form(stride, padding, False, (0, 0), groups, own, derived))


def to_conv_dtype(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    dtype = conv_dtype(x)
    return x.to(dtype), w.to(dtype)


def conv_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x runs in: autocast's, or that of x."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta":  # which has no autocast
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def filter_padding(f: Tensor | None, up: int, down: int, pads: list[int]) -> list[int]:
    """The padding with what the resampling filter takes added, so that the image stays in place."""
    taps_x, taps_y = (1, 1) if f is None else (f.shape[-1], f.shape[0])
    x0, x1, y0, y1 = pads
    if up > 1:
        x0, x1 = x0 + (taps_x + up - 1) // 2, x1 + (taps_x - up) // 2
        y0, y1 = y0 + (taps_y + up - 1) // 2, y1 + (taps_y - up) // 2
    if down > 1:
        x0, x1 = x0 + (taps_x - down + 1) // 2, x1 + (taps_x - down) // 2
        y0, y1 = y0 + (taps_y - down + 1) // 2, y1 + (taps_y - down) // 2
    return [x0, x1, y0, y1]


def check_conv(
    op: str,
    x: Tensor,
    w: Tensor,
    f: Tensor | None,
    up: int,
    down: int,
    padding: int | Sequence[int],
    groups: int,
    impl: str | None,
    weight: str = "w",
    filter: str = "f",
    wide: bool = True,
) -> list[int]:
    """The padding of a valid convolution with resampling; weight, filter: the names of w and f."""
    _impl.check_float(op, "x", x)
    if not isinstance(w, Tensor) or not w.is_floating_point():
        got = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"{op}: {weight} must be a floating-point tensor, got {got}")
    images, weights = x.shape, w.shape
    if len(images) != 4:
        raise ValueError(f"{op}: x must be (N, I, H, W), got shape {tuple(images)}")
    if len(weights) != 4:
        raise ValueError(
            f"{op}: {weight} must be (O, I / groups, kh, kw), got shape {tuple(weights)}"
        )
    if not (type(up) is type(down) is type(groups) is int and min(up, down, groups) > 0):
        _check_counts(op, up=up, down=down, groups=groups)
    if 0 in weights or 0 in images[2:]:
        name, shape = (weight, weights) if 0 in weights else ("x", images)
        raise ValueError(f"{op}: {name} must have channels and pixels, got shape {tuple(shape)}")
    if images[1] != weights[1] * groups or weights[0] % groups:
        raise ValueError(
            f"{op}: {weight} must be (O, I / groups, kh, kw) for I = {images[1]} and "
            f"groups = {groups}, got shape {tuple(weights)}"
        )
    if w.device != x.device:
        raise ValueError(f"{op}: {weight} must be on {x.device} like x, got {w.device}")
    pads = list(check_padding(op, padding))
    if f is not None:
        check_filter(op, filter, f, x, wide)
    if impl is not None:
        _impl.choose("upfirdn2d", impl, x, op)
        if f is not None and up * down > 1:
            check_length(op, filter, f, impl)
    _, _, out_h, out_w = resampled_shape(images, weights, up, down, pads)
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"{op}: padding must leave an output of at least 1x1 for x {tuple(images)}, "
            f"{weights[2]}x{weights[3]} taps, up = {up} and down = {down}, got {tuple(pads)}"
        )
    return pads


def _check_counts(op: str, **counts: Any) -> None:
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            error = ValueError if type(value) is int else TypeError
            raise error(f"{op}: {name} must be an int of at least 1, got {_impl.shown(value)}")


def resampled_shape(
    x: Sequence[int], w: Sequence[int], up: int, down: int, pads: list[int]
) -> tuple[int, int, int, int]:
    """Of the output, for shapes of x and w; pads: without what the filter adds."""
    height = (x[2] * up + pads[2] + pads[3] - w[2] + 1) // down
    width = (x[3] * up + pads[0] + pads[1] - w[3] + 1) // down
    return x[0], w[0], height, width
