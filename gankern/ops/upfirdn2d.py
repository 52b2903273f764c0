"""upfirdn2d: pad, upsample, filter and downsample a batch of images."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import Plan, remember

if _impl.triton is not None:
    import triton
    import triton.language as tl

__all__ = ["downsample2d", "filter2d", "setup_filter", "upfirdn2d", "upsample2d"]

Pair = int | Sequence[int]
Pads = tuple[int, int, int, int]
MAX_TAPS = 32  # of the GPU kernels, a side


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
            axes, or None for the identity. See `setup_filter`. CUDA and Triton take 32 taps a side
            at most: of more, a named one of them raises, and None is the reference.
        up: zeros are inserted to make the image this much larger; int or [x, y].
        down: every `down`-th sample is kept; int or [x, y].
        padding: zeros around the upsampled image; int, [x, y] or [x0, x1, y0, y1]. Negative crops.
        flip_filter: False is a convolution, True a correlation.
        gain: factor on the result.
        impl: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns:
        Images of (N, C, out_h, out_w) in the dtype and memory format of `x`.

    Raises:
        TypeError, ValueError: an argument is not as above, or nothing is left to filter.
        RuntimeError: impl cannot run here.

    Gradients: in x and f, of any order. That in x is an upfirdn2d with `up` and `down` swapped and
    the filter flipped, so all its orders are the same kernel; that in f is composed of PyTorch's.
    Source: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", appendix B.
    """
    call = _call if is_compiling() else _quick
    return call("upfirdn2d", x, f, up, down, padding, flip_filter, gain, impl)


def _called(op: str, x, f, up, down, padding, flip_filter, gain, impl) -> Tensor:
    """`upfirdn2d`, under the name that was called, which errors tell."""
    call = _call if is_compiling() else _quick
    return call(op, x, f, up, down, padding, flip_filter, gain, impl)


def _plan(op: str, x, f, up, down, padding, flip_filter, gain, impl) -> Plan:
    f, args = _check(op, x, f, up, down, padding, flip_filter, gain)
    chosen = _impl.choose("upfirdn2d", impl, x, op)
    if chosen not in ("cpu", "reference") and max(f.shape) > MAX_TAPS:
        check_length(op, "f", f, impl)
        chosen = "reference"
    if chosen == "reference" or x.numel() == 0:
        return upfirdn2d_reference, (x, f, *args)
    return _run, (x, f, (*args, chosen))


def setup_filter(
    f: Any,
    device: torch.device | str | None = None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> Tensor:
    """Make a filter for the functions of this module from a list, an array or a tensor.

    Args:
        f: taps, (taps,) or (taps_y, taps_x), or a single number, finite; None is the identity.
        device: where the filter shall live; None: where its taps do.
        normalize: divide by the sum, which must not be 0, so that a constant image keeps its value.
        flip_filter: reverse the taps.
        gain: factor on the images that the filter will make.
        separable: keep a 1-D filter 1-D. None does so from 8 taps on; below, the outer product is
            no slower.

    Returns:
        float32 filter, (taps_y, taps_x), or (taps,) if separable.

    Raises:
        TypeError, ValueError: an argument is not as above; taps that are to be normalised sum to 0,
            or to no more than a rounding; a separable filter has a gain below 0.
    """
    f, gain, separable = _check_setup(f, device, normalize, flip_filter, gain, separable)
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return (f * gain ** (f.ndim / 2)).to(f.device if device is None else device)


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

    Raises: as `upfirdn2d`.
    """
    taps_x, taps_y = _taps(f, "filter2d")
    x0, x1, y0, y1 = check_padding("filter2d", padding)
    pads = [x0 + taps_x // 2, x1 + (taps_x - 1) // 2, y0 + taps_y // 2, y1 + (taps_y - 1) // 2]
    return _called("filter2d", x, f, 1, 1, pads, flip_filter, gain, impl)


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

    Raises: as `upfirdn2d`.
    """
    up_x, up_y = _pair(up, "up", "upsample2d")
    taps_x, taps_y = _taps(f, "upsample2d")
    x0, x1, y0, y1 = check_padding("upsample2d", padding)
    pads = [
        x0 + (taps_x + up_x - 1) // 2,
        x1 + (taps_x - up_x) // 2,
        y0 + (taps_y + up_y - 1) // 2,
        y1 + (taps_y - up_y) // 2,
    ]
    gain = _impl.number("upsample2d", "gain", gain) * up_x * up_y
    return _called("upsample2d", x, f, [up_x, up_y], 1, pads, flip_filter, gain, impl)


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

    Raises: as `upfirdn2d`.
    """
    down_x, down_y = _pair(down, "down", "downsample2d")
    taps_x, taps_y = _taps(f, "downsample2d")
    x0, x1, y0, y1 = check_padding("downsample2d", padding)
    pads = [
        x0 + (taps_x - down_x + 1) // 2,
        x1 + (taps_x - down_x) // 2,
        y0 + (taps_y - down_y + 1) // 2,
        y1 + (taps_y - down_y) // 2,
    ]
    return _called("downsample2d", x, f, 1, [down_x, down_y], pads, flip_filter, gain, impl)


def _check(
    op: str,
    x: Tensor,
    f: Tensor | None,
    up: Pair,
    down: Pair,
    padding: Pair,
    flip: bool,
    gain: float,
) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the filter as a tensor, float64 beside a float64 x, and the arguments in full."""
    _impl.check_float(op, "x", x)
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be a tensor of shape (N, C, H, W), got {_what(x)}")
    taps = check_filter(op, "f", f, x)
    up, down = _pair(up, "up", op), _pair(down, "down", op)
    pads = check_padding(op, padding)
    if flip is not True and flip is not False:
        flip = _impl.flag(op, "flip_filter", flip)
    if type(gain) not in (float, int) or gain != gain:
        gain = _impl.number(op, "gain", gain)
    _, _, h, w = x.shape
    width, height = w * up[0] + pads[0] + pads[1], h * up[1] + pads[2] + pads[3]
    if width < taps[0] or height < taps[1]:
        raise ValueError(
            f"{op}: padding must leave at least the {taps[1]}x{taps[0]} samples of f, "
            f"got {height}x{width} from padding {pads}"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if f is None:
        f = torch.ones([1, 1], dtype=dtype, device=x.device)
    elif f.dtype != dtype:
        f = f.to(dtype)
    return f, (up, down, pads, flip, float(gain))


def check_filter(op: str, name: str, f: Any, x: Tensor, wide: bool = True) -> tuple[int, int]:
    """The taps of a valid filter along x and y; wide: it may be float64 beside a float64 x."""
    taps = _taps(f, op, name)
    if f is None:
        return taps
    if f.dtype != torch.float32 and not (wide and f.dtype == x.dtype == torch.float64):
        raise TypeError(f"{op}: {name} must be float32, got {f.dtype}")
    if f.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {f.device}")
    return taps


def check_length(op: str, name: str, f: Tensor, impl: str | None) -> None:
    """Raise where the implementation that was named takes no filter as long as f."""
    if impl not in (None, "cpu", "reference") and max(f.shape) > MAX_TAPS:
        raise ValueError(
            f"{op}: {name} must have at most {MAX_TAPS} taps a side for impl={impl!r}, "
            f"got shape {tuple(f.shape)}"
        )


def _taps(f: Any, op: str, name: str = "f") -> tuple[int, int]:
    if f is None:
        return 1, 1
    if not isinstance(f, Tensor) or f.ndim not in (1, 2) or f.numel() == 0:
        error = ValueError if isinstance(f, Tensor) else TypeError
        raise error(
            f"{op}: {name} must be None or a tensor of shape (taps,) or (taps_y, taps_x), "
            f"got {_what(f)}"
        )
    return f.shape[-1], f.shape[0]


def _check_setup(
    f: Any, device: Any, normalize: bool, flip_filter: bool, gain: float, separable: bool | None
) -> tuple[Tensor, float, bool]:
    """The taps in 1 or 2 dimensions, the gain, and whether the filter shall be separable."""
    op = "setup_filter"
    f = _as_taps(f)
    try:
        place = f.device if device is None else torch.device(device)
    except (TypeError, RuntimeError):
        got = _impl.shown(device)
        raise ValueError(f"{op}: device must be None or a device, got {got}") from None
    if f.is_meta and place.type != "meta":
        raise ValueError(f"{op}: device must be None or meta for an f on meta, got {device}")
    normalize = _impl.flag(op, "normalize", normalize)
    _impl.flag(op, "flip_filter", flip_filter)
    gain = _impl.number(op, "gain", gain)
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    separable = _impl.flag(op, "separable", separable, "None, True or False")
    if separable and f.ndim == 2:
        raise ValueError(f"{op}: f must have 1 dimension to be separable, got 2")
    if separable and gain < 0:
        raise ValueError(f"{op}: gain must be at least 0 for a separable filter, got {gain}")
    values = f.detach()
    if type(values) is not Tensor or values.is_meta or torch.compiler.is_compiling():
        return f, gain, separable  # there are no values to look at
    if not values.isfinite().all():
        raise ValueError(f"{op}: f must be finite, got {values.tolist()}")
    if normalize and values.sum().abs() <= 1e-6 * values.abs().sum():
        raise ValueError(
            f"{op}: f must have a sum other than 0 where normalize=True, got {values.tolist()}"
        )
    return f, gain, separable


def _as_taps(f: Any) -> Tensor:
    dtype = None if hasattr(f, "dtype") else torch.float32
    try:
        taps = torch.as_tensor(1 if f is None else f, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        taps = None
    if taps is None or taps.is_complex():
        got = _impl.shown(f) if taps is None else taps.dtype
        raise TypeError(f"setup_filter: f must be real numbers, got {got}")
    if taps.ndim > 2 or taps.numel() == 0:
        raise ValueError(
            f"setup_filter: f must be a number or have 1 or 2 dimensions, got {_what(taps)}"
        )
    return (taps.reshape(1) if taps.ndim == 0 else taps).to(torch.float32)


def _pair(value: Pair, name: str, op: str) -> tuple[int, int]:
    if type(value) is int and value > 0:
        return value, value
    pair = _ints(value)
    if pair is None or len(pair) != 2 or min(pair) < 1:
        error, got = TypeError if pair is None else ValueError, _impl.shown(value)
        raise error(f"{op}: {name} must be a positive int or 2 of them [x, y], got {got}")
    return pair[0], pair[1]


def check_padding(op: str, value: Pair) -> Pads:
    """(x0, x1, y0, y1) of an int, 2 or 4 ints."""
    if type(value) is int:
        return value, value, value, value
    pads = _ints(value)
    if pads is None:
        got = _impl.shown(value)
        raise TypeError(f"{op}: padding must be an int, 2 or 4 ints, got {got}")
    if len(pads) not in (2, 4):
        raise ValueError(
            f"{op}: padding must be an int, 2 or 4 ints, got {len(pads)} values {pads}"
        )
    x0, x1, y0, y1 = pads if len(pads) == 4 else (pads[0], pads[0], pads[1], pads[1])
    return x0, x1, y0, y1


def _ints(value: Pair) -> tuple[int, ...] | None:
    """An int as a pair, a sequence as a tuple, None for anything that is not made of ints."""
    if _impl.is_integer(value):
        return (operator.index(value),) * 2  # type: ignore[arg-type]
    if not isinstance(value, (list, tuple, Sequence)):  # in the order of their cost
        return None
    for v in value:
        if type(v) is not int:
            return tuple(map(operator.index, value)) if all(map(_impl.is_integer, value)) else None
    return tuple(value)


def _what(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# --- Reference: plain PyTorch, differentiable to any order.


def upfirdn2d_reference(
    x: Tensor,
    f: Tensor,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: Pads,
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
    return y.contiguous(memory_format=_impl.memory_format(x))


def _upsample_pad(x: Tensor, up: tuple[int, int], padding: Pads) -> Tensor:
    """Insert zeros and pad or crop: (N, C, H * up_y + y0 + y1, W * up_x + x0 + x1)."""
    n, c, h, w = x.shape
    up_x, up_y = up
    if up != (1, 1):
        x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up_x - 1, 0, 0, 0, up_y - 1])
        x = x.reshape(n, c, h * up_y, w * up_x)
    x = F.pad(x, [max(v, 0) for v in padding])
    x0, x1, y0, y1 = (max(-v, 0) for v in padding)
    return x[:, :, y0 : x.shape[2] - y1, x0 : x.shape[3] - x1]


# --- Triton.

if _impl.triton is not None:

    @triton.jit
    def upfirdn2d_kernel(
        x_ptr, f_ptr, y_ptr, in_h, in_w, out_h, out_w, pad_x, pad_y, flip, gain,
        C: tl.constexpr, TAPS_X: tl.constexpr, TAPS_Y: tl.constexpr, SEPARABLE: tl.constexpr,
        UP_X: tl.constexpr, UP_Y: tl.constexpr, DOWN_X: tl.constexpr, DOWN_Y: tl.constexpr,
        WIDE: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    ):  # fmt: skip
        # A tile of one image: rows oy, and along memory columns and C channels, e = ox * C + c.
        if WIDE:  # indices in an image
            in_w, out_w = tl.cast(in_w, tl.int64), tl.cast(out_w, tl.int64)
            in_h, out_h = tl.cast(in_h, tl.int64), tl.cast(out_h, tl.int64)
        tiles_x = tl.cdiv(out_w * C, BLOCK_X)
        tiles = tiles_x * tl.cdiv(out_h, BLOCK_Y)
        image = (tl.program_id(0) // tiles).to(tl.int64)
        tile = tl.program_id(0) % tiles
        e = tile % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
        oy = tile // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)[:, None]
        ox = e // C
        # Output o starts at start of the upsampled image: first sample x0 and its tap kx0. The
        # shift by a multiple of `up` keeps the dividend positive.
        start_x, start_y = ox * DOWN_X - pad_x, oy * DOWN_Y - pad_y
        shift_x, shift_y = tl.cdiv(tl.maximum(pad_x, 0), UP_X), tl.cdiv(tl.maximum(pad_y, 0), UP_Y)
        x0 = (start_x + shift_x * UP_X + UP_X - 1) // UP_X - shift_x
        y0 = (start_y + shift_y * UP_Y + UP_Y - 1) // UP_Y - shift_y
        kx0, ky0 = x0 * UP_X - start_x, y0 * UP_Y - start_y
        base = x_ptr + image * in_h * in_w * C + e % C
        acc = tl.zeros([BLOCK_Y, BLOCK_X], f_ptr.dtype.element_ty)
        for my in range((TAPS_Y + UP_Y - 1) // UP_Y):
            iy, ky = y0 + my, ky0 + my * UP_Y
            row_ok = (iy >= 0) & (iy < in_h) & (ky < TAPS_Y)
            fy = tl.where(flip, ky, TAPS_Y - 1 - ky)
            for mx in range((TAPS_X + UP_X - 1) // UP_X):
                ix, kx = x0 + mx, kx0 + mx * UP_X
                ok = row_ok & (ix >= 0) & (ix < in_w) & (kx < TAPS_X)
                fx = tl.where(flip, kx, TAPS_X - 1 - kx)
                if SEPARABLE:
                    w = tl.load(f_ptr + fy, row_ok, 0.0) * tl.load(f_ptr + fx, kx < TAPS_X, 0.0)
                else:
                    w = tl.load(f_ptr + fy * TAPS_X + fx, ok, 0.0)
                v = tl.load(base + (iy * in_w + ix) * C, ok, 0.0)
                acc += w * v.to(acc.dtype)
        y = y_ptr + image * out_h * out_w * C + (oy * out_w * C + e)
        tl.store(y, (acc * gain).to(y_ptr.dtype.element_ty), (oy < out_h) & (e < out_w * C))

    @_impl.triton_op("upfirdn2d")
    def _triton(
        x: Tensor, f: Tensor, up_x: int, up_y: int, down_x: int, down_y: int, x0: int, x1: int,
        y0: int, y1: int, flip_filter: bool, gain: float,
    ) -> Tensor:  # fmt: skip
        last = _impl.memory_format(x) == torch.channels_last
        x, f = x if last else x.contiguous(), f.contiguous()
        y = _fake(x, f, up_x, up_y, down_x, down_y, x0, x1, y0, y1, flip_filter, gain)
        (n, c, h, w), (oh, ow) = x.shape, y.shape[2:]
        images, c = (n, c) if last else (n * c, 1)
        block_x = _impl.power_of_2(ow * c, 128)
        block_y = _impl.power_of_2(oh, 1024 // block_x)
        grid = (triton.cdiv(ow * c, block_x) * triton.cdiv(oh, block_y) * images,)
        # The largest index that a program computes, though it may not load there: twice the
        # upsampled image with its padding, and the rows of both images with a tile's behind them.
        reach_x = 2 * ((ow + block_x) * down_x + abs(x0) + f.shape[-1] + up_x)
        reach_y = 2 * ((oh + block_y) * down_y + abs(y0) + f.shape[0] + up_y)
        inputs = (reach_y // up_y * w + reach_x // up_x) * c
        wide = max(reach_x, reach_y, inputs, (oh + block_y) * ow * c + block_x) >= 2**31
        torch.library.wrap_triton(upfirdn2d_kernel)[grid](
            x, f, y, h, w, oh, ow, x0, y0, flip_filter, gain,
            C=c, TAPS_X=f.shape[-1], TAPS_Y=f.shape[0], SEPARABLE=f.ndim == 1,
            UP_X=up_x, UP_Y=up_y, DOWN_X=down_x, DOWN_Y=down_y,
            WIDE=wide, BLOCK_X=block_x, BLOCK_Y=block_y,
        )  # fmt: skip
        return y


# --- Shape function of the registered op.


def _fake(x, f, up_x, up_y, down_x, down_y, x0, x1, y0, y1, flip_filter, gain):
    n, c, h, w = x.shape
    out_w = (w * up_x + x0 + x1 - f.shape[-1]) // down_x + 1
    out_h = (h * up_y + y0 + y1 - f.shape[0]) // down_y + 1
    return torch.empty(
        (n, c, out_h, out_w), dtype=x.dtype, device=x.device, memory_format=_impl.memory_format(x)
    )


_impl.register_fake("upfirdn2d", _fake)


# --- Autograd, once for all implementations.


def _run(x: Tensor, f: Tensor, args: tuple[Any, ...]) -> Tensor:
    """args: up, down, padding, flip_filter, gain, impl."""
    if (x.requires_grad or f.requires_grad) and torch.is_grad_enabled():
        return _Upfirdn2d.apply(x, f, args)
    return _op(x, f, *args)


def _op(x, f, up, down, padding, flip_filter, gain, impl) -> Tensor:
    return _impl.op(impl, "upfirdn2d")(x, f, *up, *down, *padding, flip_filter, gain)


class _Upfirdn2d(torch.autograd.Function):
    """y from x and f; the gradient in x is the same function with up and down swapped."""

    @staticmethod
    def forward(ctx: Any, x, f, args):
        ctx.save_for_backward(x if f.requires_grad else None, f)
        ctx.shape = x.shape
        ctx.args = args
        return _op(x, f, *args)

    @staticmethod
    def backward(ctx: Any, dy):
        x, f = ctx.saved_tensors
        up, down, pads, flip_filter, gain, impl = ctx.args
        dx = df = None
        if ctx.needs_input_grad[0]:
            adjoint = []
            for i, taps in enumerate((f.shape[-1], f.shape[0])):  # x, then y
                size, out = ctx.shape[3 - i], dy.shape[3 - i]
                adjoint += [taps - pads[2 * i] - 1]
                adjoint += [size * up[i] - out * down[i] + pads[2 * i] - up[i] + 1]
            dx = _run(dy, f, (down, up, adjoint, not flip_filter, gain, impl))
        if ctx.needs_input_grad[1]:
            df = _filter_gradient(x, f, dy, *ctx.args[:-1])
        return dx, df, None


_call, _quick = remember(_plan, _run, _Upfirdn2d)


def _filter_gradient(x, f, dy, up, down, padding, flip_filter, gain) -> Tensor:
    """df[k] = gain * sum of dy[o] * z[o * down + k] over all o, z being x upsampled and padded."""
    z = _upsample_pad(x.to(f.dtype), up, padding)
    images = z.shape[0] * z.shape[1]
    z = z.reshape(1, images, *z.shape[2:])
    dy = (dy.to(f.dtype) * gain).reshape(images, 1, *dy.shape[2:])
    g = F.conv2d(z, dy, dilation=(down[1], down[0]), groups=images).sum(1)[0]
    g = g[: f.shape[0], : f.shape[-1]]
    g = g if flip_filter else g.flip([0, 1])
    return g if f.ndim == 2 else (g + g.t()) @ f
