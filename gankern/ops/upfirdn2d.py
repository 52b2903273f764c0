"""upfirdn2d: pad, upsample, filter and downsample a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["downsample2d", "filter2d", "setup_filter", "upfirdn2d", "upsample2d"]

Pair = int | Sequence[int]


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """Upsample by zero insertion, pad or crop, filter, and keep every `down`-th sample.

    `y[o] = gain * sum_k f[k] * z[o * down + taps - 1 - k]` along each axis, where `z` is `x` with
    `up - 1` zeros after each sample, `pad0` zeros before and `pad1` behind. The output size is
    `(size * up + pad0 + pad1 - taps) // down + 1`.

    Args:
        x: images, (N, C, H, W); float32, float16, bfloat16 or float64, any strides. Contiguous and
            channels-last memory is kept.
        f: filter, float32: (taps_y, taps_x), or (taps,) for a separable one that runs along both
            axes, or None for the identity. See `setup_filter`.
        up: zeros are inserted to make the image this much larger; int or [x, y].
        down: every `down`-th sample is kept; int or [x, y].
        padding: zeros around the upsampled image; int, [x, y] or [x0, x1, y0, y1]. Negative crops.
        flip_filter: False is a convolution, True a correlation.
        gain: factor on the result.
        impl: "cuda", "triton", "cpu", "reference", or None for the best usable one.

    Returns:
        Images of (N, C, out_h, out_w) in the dtype and memory format of `x`.

    Raises:
        TypeError, ValueError: an argument is none of the above, or nothing is left to filter.

    Differentiable to any order in x and f: the gradient in x is an upfirdn2d with `up` and `down`
    swapped and the filter flipped. Source: StyleGAN2 (Karras et al., 2020).
    """
    f, args = _check(x, f, up, down, padding, flip_filter, gain)
    if impl not in (None, "reference"):
        raise ValueError(f"upfirdn2d: impl must be None or 'reference', got {impl!r}")
    return upfirdn2d_reference(x, f, *args)


def setup_filter(
    f: Any,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> Tensor:
    """Make a filter for the functions of this module from a list, an array or a tensor.

    Args:
        f: taps, (taps,) or (taps_y, taps_x), or a single number; None is the identity.
        device: where the filter shall live.
        normalize: divide by the sum, so that a constant image keeps its value.
        flip_filter: reverse the taps.
        gain: factor on the images that the filter will make.
        separable: keep a 1-D filter 1-D. None does so from 8 taps on; below, the outer product is
            no slower.

    Returns:
        float32 filter, (taps_y, taps_x), or (taps,) if separable.
    """
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(
            f"setup_filter: f must be a number or 1 or 2 dimensions of taps, got shape {tuple(f.shape)}"
        )
    f = f.reshape(1) if f.ndim == 0 else f
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if separable and f.ndim == 2:
        raise ValueError("setup_filter: f must have 1 dimension to be separable, got 2")
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return (f * gain ** (f.ndim / 2)).to(device)


def filter2d(
    x: Tensor,
    f: Tensor | None,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """Filter images and keep their size; `padding` is added to what that takes.

    Args: as `upfirdn2d`.

    Returns:
        (N, C, H, W) for the default padding.
    """
    taps_x, taps_y = _taps(f, "filter2d")
    x0, x1, y0, y1 = _padding(padding, "filter2d")
    pads = [x0 + taps_x // 2, x1 + (taps_x - 1) // 2, y0 + taps_y // 2, y1 + (taps_y - 1) // 2]
    return upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: Pair = 2,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """Upsample images by `up`, keeping their brightness; `padding` is added in output samples.

    Args: as `upfirdn2d`.

    Returns:
        (N, C, H * up, W * up) for the default padding.
    """
    up_x, up_y = _pair(up, "up", "upsample2d")
    taps_x, taps_y = _taps(f, "upsample2d")
    x0, x1, y0, y1 = _padding(padding, "upsample2d")
    pads = [
        x0 + (taps_x + up_x - 1) // 2,
        x1 + (taps_x - up_x) // 2,
        y0 + (taps_y + up_y - 1) // 2,
        y1 + (taps_y - up_y) // 2,
    ]
    gain = gain * up_x * up_y
    return upfirdn2d(x, f, [up_x, up_y], 1, pads, flip_filter, gain, impl=impl)


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: Pair = 2,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """Downsample images by `down`; `padding` is added in input samples.

    Args: as `upfirdn2d`.

    Returns:
        (N, C, H // down, W // down) for the default padding.
    """
    down_x, down_y = _pair(down, "down", "downsample2d")
    taps_x, taps_y = _taps(f, "downsample2d")
    x0, x1, y0, y1 = _padding(padding, "downsample2d")
    pads = [
        x0 + (taps_x - down_x + 1) // 2,
        x1 + (taps_x - down_x) // 2,
        y0 + (taps_y - down_y + 1) // 2,
        y1 + (taps_y - down_y) // 2,
    ]
    return upfirdn2d(x, f, 1, [down_x, down_y], pads, flip_filter, gain, impl=impl)


def upfirdn2d_reference(
    x: Tensor,
    f: Tensor,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """The formula in PyTorch: checked arguments, 16-bit images filtered in the filter's dtype."""
    n, c, _, _ = x.shape
    groups = c or 1  # conv2d takes no images of 0 channels, but 0 images
    z = _upsample_pad(x.to(f.dtype), up, padding)
    w = f if f.ndim == 2 else torch.outer(f, f)
    w = (w if flip_filter else w.flip([0, 1])) * gain
    w = w.expand(groups, 1, *w.shape).contiguous()
    z = z.reshape(n * c // groups, groups, *z.shape[2:])
    y = F.conv2d(z, w, stride=(down[1], down[0]), groups=groups)
    y = y.reshape(n, c, *y.shape[2:]).to(x.dtype)
    return y.contiguous(memory_format=_memory_format(x))


def _upsample_pad(x: Tensor, up: tuple[int, int], padding: tuple[int, int, int, int]) -> Tensor:
    """Insert zeros and pad or crop: (N, C, H * up_y + y0 + y1, W * up_x + x0 + x1)."""
    n, c, h, w = x.shape
    up_x, up_y = up
    if up != (1, 1):
        x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up_x - 1, 0, 0, 0, up_y - 1])
        x = x.reshape(n, c, h * up_y, w * up_x)
    return F.pad(x, padding)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _check(
    x: Tensor, f: Tensor | None, up: Pair, down: Pair, padding: Pair, flip: bool, gain: float
) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the filter as a tensor, float64 beside a float64 x, and the arguments in full."""
    op = "upfirdn2d"
    if not isinstance(x, Tensor) or x.ndim != 4:
        raise ValueError(f"{op}: x must be a tensor of shape (N, C, H, W), got {_what(x)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    taps = _taps(f, op)
    if f is not None and f.dtype != torch.float32 and not f.dtype == x.dtype == torch.float64:
        raise TypeError(f"{op}: f must be float32, got {f.dtype}")
    if f is not None and f.device != x.device:
        raise ValueError(f"{op}: f must be on the device of x, {x.device}, got {f.device}")
    up, down = _pair(up, "up", op), _pair(down, "down", op)
    pads = _padding(padding, op)
    size = [x.shape[3 - i] * up[i] + pads[2 * i] + pads[2 * i + 1] for i in (0, 1)]
    if size[0] < taps[0] or size[1] < taps[1]:
        raise ValueError(
            f"{op}: padding must leave at least the {taps[1]}x{taps[0]} samples of f, "
            f"got {size[1]}x{size[0]} from padding {pads}"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    f = torch.ones([1, 1], dtype=dtype, device=x.device) if f is None else f.to(dtype)
    return f, (up, down, pads, bool(flip), float(gain))


def _taps(f: Tensor | None, op: str) -> tuple[int, int]:
    if f is None:
        return 1, 1
    if not isinstance(f, Tensor) or f.ndim not in (1, 2) or f.numel() == 0:
        raise ValueError(
            f"{op}: f must be None or a tensor of shape (taps,) or (taps_y, taps_x), got {_what(f)}"
        )
    return f.shape[-1], f.shape[0]


def _pair(value: Pair, name: str, op: str) -> tuple[int, int]:
    pair = _ints(value)
    if pair is None or len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{op}: {name} must be a positive int or 2 of them [x, y], got {value}")
    return pair[0], pair[1]


def _padding(value: Pair, op: str) -> tuple[int, int, int, int]:
    pads = _ints(value)
    if pads is None:
        raise TypeError(f"{op}: padding must be an int, 2 or 4 ints, got {value}")
    if len(pads) not in (2, 4):
        raise ValueError(
            f"{op}: padding must be an int, 2 or 4 ints, got {len(pads)} values {pads}"
        )
    x0, x1, y0, y1 = pads if len(pads) == 4 else (pads[0], pads[0], pads[1], pads[1])
    return x0, x1, y0, y1


def _ints(value: Pair) -> tuple[int, ...] | None:
    """An int as a pair, a sequence as a tuple, None for anything that is not made of ints."""
    values = (value, value) if isinstance(value, int) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, int) for v in values):
        return None
    return tuple(values)


def _what(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
