"""Convolution fused with up- or downsampling, in the cheapest order of the two."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.ops.upfirdn2d import upfirdn2d

__all__ = ["conv2d_resample", "no_weight_gradients"]


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
    convolution runs at the lower of the two resolutions. The convolution is torch's own.

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
        impl: "cuda", "triton", "cpu", "reference" of the resampling; None is the best usable one.

    Returns:
        (N, O, (H * up + y0 + y1 - kh) // down + 1, ...) in the dtype of `x`, up to the remainder
        that an odd size leaves.

    Raises:
        TypeError, ValueError: an argument is none of the above.

    Differentiable to any order in x and w. Source: StyleGAN2 (Karras et al., 2020), appendix B.
    """
    pads = check_conv("conv2d_resample", x, w, up, down, padding, groups)
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
) -> Tensor:
    """`conv2d_resample` of checked arguments, the filter's own padding included in `pads`."""
    kh, kw = w.shape[2:]
    resample: dict[str, Any] = {"flip_filter": flip_filter, "impl": impl}
    if kh == kw == 1 and down > 1 and up == 1:
        x = upfirdn2d(x, f, down=down, padding=pads, **resample)
        return _conv2d(x, w, groups=groups, flip_weight=flip_weight)
    if kh == kw == 1 and up > 1 and down == 1:
        x = _conv2d(x, w, groups=groups, flip_weight=flip_weight)
        return upfirdn2d(x, f, up=up, padding=pads, gain=up**2, **resample)
    if up > 1:
        x, pads = transposed_conv(x, w, up, pads, groups, flip_weight)
        x = upfirdn2d(x, f, padding=pads, gain=up**2, **resample)
        return upfirdn2d(x, f, down=down, **resample) if down > 1 else x
    if down > 1:
        x = upfirdn2d(x, f, padding=pads, **resample)
        return _conv2d(x, w, stride=down, groups=groups, flip_weight=flip_weight)
    if pads[0] == pads[1] >= 0 and pads[2] == pads[3] >= 0:
        return _conv2d(x, w, padding=(pads[2], pads[0]), groups=groups, flip_weight=flip_weight)
    return _conv2d(F.pad(x, pads), w, groups=groups, flip_weight=flip_weight)


def transposed_conv(
    x: Tensor, w: Tensor, up: int, pads: list[int], groups: int, flip_weight: bool
) -> tuple[Tensor, list[int]]:
    """The convolution of the zero-upsampled x, and the padding that is left for the filter."""
    kh, kw = w.shape[2:]
    # A transposed convolution pads by itself: kw - 1 before, and behind up - 1 zeros less.
    x0, x1, y0, y1 = pads
    x0, x1, y0, y1 = x0 - (kw - 1), x1 - (kw - up), y0 - (kh - 1), y1 - (kh - up)
    crop_x, crop_y = max(min(-x0, -x1), 0), max(min(-y0, -y1), 0)
    o = w.shape[0]
    w = w.unflatten(0, (groups, o // groups)).transpose(1, 2).flatten(0, 1)  # [I, O/groups, kh, kw]
    x = _conv_transpose2d(x, w, up, (crop_y, crop_x), groups, flip_weight)
    return x, [x0 + crop_x, x1 + crop_x, y0 + crop_y, y1 + crop_y]


def _conv2d(
    x: Tensor,
    w: Tensor,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    flip_weight: bool = True,
) -> Tensor:
    w = w if flip_weight or w.shape[2:].numel() == 1 else w.flip([2, 3])
    return _convolution(x, w, _Form(stride, padding, False, (0, 0), groups))


def _conv_transpose2d(
    x: Tensor, w: Tensor, stride: int, padding: tuple[int, int], groups: int, flip_weight: bool
) -> Tensor:
    w = w.flip([2, 3]) if flip_weight and w.shape[2:].numel() > 1 else w
    return _convolution(x, w, _Form(stride, padding, True, (0, 0), groups))


# --- torch's convolution. It and its two gradients are each other's gradients, so that every order
# is one of three calls; torch's own second order takes slower ones, and loses channels-last.


class _Form(NamedTuple):
    stride: int
    padding: tuple[int, int]
    transposed: bool
    output_padding: tuple[int, int]
    groups: int

    def arguments(self) -> tuple[Any, ...]:
        """As aten's convolution and its backward take them."""
        size = [self.stride] * 2, list(self.padding), [1, 1]
        return (*size, self.transposed, list(self.output_padding), self.groups)

    def adjoint(self, x: Tensor, dy: Tensor, w: Tensor) -> _Form:
        """Of the convolution that takes dy to dx."""
        rest = (0, 0)
        if not self.transposed:
            rest = self._rest(x, dy, w, 2), self._rest(x, dy, w, 3)
        return self._replace(transposed=not self.transposed, output_padding=rest)

    def _rest(self, x: Tensor, dy: Tensor, w: Tensor, dim: int) -> int:
        """Pixels of x at its end that the strides of the convolution did not reach."""
        reached = (dy.shape[dim] - 1) * self.stride + w.shape[dim] - 2 * self.padding[dim - 2]
        return x.shape[dim] - reached


def _records(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _convolution(x: Tensor, w: Tensor, form: _Form) -> Tensor:
    if w.shape[0] == 1:  # its strides may tell torch two memory formats, which its backward refuses
        w = w.contiguous()
    if _records(x, w):
        return _Convolution.apply(x, w, form)
    return torch.convolution(x, w, None, *form.arguments())


def _weight_gradient(dy: Tensor, x: Tensor, w: Tensor, form: _Form) -> Tensor:
    if _records(dy, x):
        return _WeightGradient.apply(dy, x, w.detach(), form)
    return _gradients(dy, x, w, form, [False, True])[1]


def _gradients(dy: Tensor, x: Tensor, w: Tensor, form: _Form, wanted: list[bool]) -> list[Any]:
    """[dx, dw], None where not wanted."""
    backward = torch.ops.aten.convolution_backward
    return backward(dy, x, w, None, *form.arguments(), [*wanted, False])[:2]


class _Convolution(torch.autograd.Function):
    """y from x and w; `no_weight_gradients` switches dw off."""

    @staticmethod
    def forward(ctx: Any, x, w, form):
        ctx.save_for_backward(x, w)
        ctx.form = form
        return torch.convolution(x, w, None, *form.arguments())

    @staticmethod
    def backward(ctx: Any, dy):
        x, w = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and _weight_gradients]
        if not torch.is_grad_enabled():
            dx, dw = _gradients(dy, x, w, ctx.form, wanted) if any(wanted) else (None, None)
            return dx, dw, None
        dx = _convolution(dy, w, ctx.form.adjoint(x, dy, w)) if wanted[0] else None
        dw = _weight_gradient(dy, x, w, ctx.form) if wanted[1] else None
        return dx, dw, None


class _WeightGradient(torch.autograd.Function):
    """dw from dy and x; w lends its shape alone."""

    @staticmethod
    def forward(ctx: Any, dy, x, w, form):
        ctx.save_for_backward(dy, x)
        ctx.form = form
        return _gradients(dy, x, w, form, [False, True])[1]

    @staticmethod
    def backward(ctx: Any, v):
        dy, x = ctx.saved_tensors
        d_dy = _convolution(x, v, ctx.form) if ctx.needs_input_grad[0] else None
        adjoint = ctx.form.adjoint(x, dy, v)
        d_x = _convolution(dy, v, adjoint) if ctx.needs_input_grad[1] else None
        return d_dy, d_x, None, None


class _WeightGate(torch.autograd.Function):
    """The identity, through which no gradient passes within `no_weight_gradients`."""

    @staticmethod
    def forward(ctx: Any, w):
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, dw):
        return dw if _weight_gradients else None


def gate(w: Tensor) -> Tensor:
    """w, as the operations take it whose gradient `no_weight_gradients` switches off."""
    return _WeightGate.apply(w) if w.requires_grad and torch.is_grad_enabled() else w


_weight_gradients = True


def weight_gradients() -> bool:
    """False within `no_weight_gradients`."""
    return _weight_gradients


@contextlib.contextmanager
def no_weight_gradients() -> Iterator[None]:
    """Within it, a backward through gankern's convolutions computes no gradient of their weights.

    For penalties whose first gradient is in images or styles alone, such as path length's: what it
    costs is halved. The backward of the penalty itself runs outside, and does reach the weights.
    """
    global _weight_gradients
    before, _weight_gradients = _weight_gradients, False
    try:
        yield
    finally:
        _weight_gradients = before


def to_conv_dtype(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    dtype = conv_dtype(x)
    return x.to(dtype), w.to(dtype)


def conv_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x runs in: autocast's, or that of x."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


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
    up: int,
    down: int,
    padding: int | Sequence[int],
    groups: int = 1,
    weight: str = "w",
) -> list[int]:
    """Raise on what neither torch's convolution nor upfirdn2d would name; returns the padding."""
    for name, t, form in (("x", x, "(N, I, H, W)"), (weight, w, "(O, I / groups, kh, kw)")):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {t.dtype}")
        if t.ndim != 4:
            raise ValueError(f"{op}: {name} must be {form}, got shape {tuple(t.shape)}")
    for name, value in (("up", up), ("down", down), ("groups", groups)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{op}: {name} must be an int of at least 1, got {value!r}")
    if x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise ValueError(
            f"{op}: {weight} must be (O, I / groups, kh, kw) for I = {x.shape[1]} and "
            f"groups = {groups}, got shape {tuple(w.shape)}"
        )
    if w.device != x.device:
        raise ValueError(f"{op}: {weight} must be on {x.device} like x, got {w.device}")
    return parse_padding(op, padding)


def parse_padding(op: str, padding: int | Sequence[int]) -> list[int]:
    """[x0, x1, y0, y1] of an int, 2 or 4 ints."""
    values = [padding] if isinstance(padding, int) else padding
    if isinstance(values, (list, tuple)) and len(values) in (1, 2, 4):
        whole = all(isinstance(p, int) and not isinstance(p, bool) for p in values)
        if whole and len(values) == 4:
            return list(values)
        if whole:
            return [values[0], values[0], values[-1], values[-1]]
    came = f"{len(values)} values {tuple(values)}" if isinstance(values, (list, tuple)) else padding
    raise ValueError(f"{op}: padding must be an int, 2 or 4 ints, got {came}")
