"""The convolution inside the layers: what runs it, and its gradients of every order.

A convolution and its two gradients are each other's gradients, so that every order is one of three
calls; PyTorch's own second order takes slower ones, and loses channels-last. On the CPU 3x3
convolutions in float32, and 4x4 ones of stride 2, run in kernels of our own, most of which need
half of the products; all others, and all on a GPU, are PyTorch's. Ours of 4x4 taps return
channels-last memory, but images of less than `MIN_CHANNELS` channels contiguous.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import Plan, remember, set_state

OP = "convolution"

MIN_CHANNELS = 16

# Fewest 2x2 tiles that our kernels are faster for: of a convolution of stride 1, of stride 2, and
# of a weight gradient.
FEWEST_TILES = {
    torch.contiguous_format: (128, 512, 128),
    torch.channels_last: (128, 128, 32),
}
# Most weights for each 2x2 tile of the lower resolution that minimal filtering of 4x4 taps (stride
# 2, padding 1) is faster for, and the gradient of its weights: it transforms them for all tiles.
# With more, a kernel of plain sums is. Both take channels-last memory.
MOST_WEIGHTS_4X4 = (1 << 12, 1 << 13)


class Form(NamedTuple):
    """Arguments of a convolution; own: by our kernels where there are some; derived: its weights
    are computed from others, and `no_weight_gradients` is about those."""

    stride: int
    padding: tuple[int, int]
    transposed: bool
    output_padding: tuple[int, int]
    groups: int
    own: bool = False
    derived: bool = False

    def arguments(self) -> tuple[Any, ...]:
        """As aten's convolution and its backward take them."""
        size = [self.stride] * 2, list(self.padding), [1, 1]
        return (*size, self.transposed, list(self.output_padding), self.groups)

    def place(self) -> tuple[Any, ...]:
        """As our kernels take them."""
        return (self.stride, *self.padding, self.transposed, *self.output_padding)

    def adjoint(self, x: Tensor, dy: Tensor, w: Tensor) -> Form:
        """Of the convolution that takes dy to dx."""
        rest = (0, 0)
        if not self.transposed:
            rest = self._rest(x, dy, w, 2), self._rest(x, dy, w, 3)
        return self._replace(transposed=not self.transposed, output_padding=rest)

    def _rest(self, x: Tensor, dy: Tensor, w: Tensor, dim: int) -> int:
        """Pixels of x at its end that the strides of the convolution did not reach."""
        reached = (dy.shape[dim] - 1) * self.stride + w.shape[dim] - 2 * self.padding[dim - 2]
        return x.shape[dim] - reached


def has_own_kernels(x: Tensor, impl: str | None) -> bool:
    """Whether `impl` means kernels of our own for the convolutions of x."""
    if x.device.type != "cpu" or impl not in (None, "cpu"):
        return False
    if impl is None:
        return _impl.default_impl(OP, "cpu") == "cpu"
    return not _impl.why_not("cpu", "cpu", OP)


def convolution(x: Tensor, w: Tensor, form: Form) -> Tensor:
    """The convolution of x with w as `form` says, differentiable to any order in both."""
    call = _checked if is_compiling() else _quick
    return call(x, w, form)


def _plan(x: Tensor, w: Tensor, form: Form) -> Plan:
    if w.shape[0] == 1:  # its strides may tell torch two memory formats, which its backward refuses
        w = w.contiguous()
    if _impl.transformed():
        return torch.convolution, (x, w, None, *form.arguments())
    return _run, (x, w, form)


def _run(x: Tensor, w: Tensor, form: Form) -> Tensor:
    if _records(x, w):
        return _Convolution.apply(x, w, form)
    return _forward(x, w, form)


def _records(x: Tensor, w: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)


# --- The three calls, by our kernels where they fit, else by PyTorch's.


def _ours(w: Tensor, small: Tensor, large: Tensor | None, form: Form) -> bool:
    return _kernels(w, small, large, form) == "tiles"


def _kernels(w: Tensor, small: Tensor, large: Tensor | None, form: Form) -> str:
    """Which kernels of ours are to run: "tiles", by minimal filtering; of 4x4 taps also "few", for
    small images, and "image", for those of few channels; "" for PyTorch's.

    small: the images of a convolution, or of a weight gradient those of the lower resolution;
    large: the others of a weight gradient, else None.
    """
    images = (small,) if large is None else (small, large)
    dtypes = {small.dtype, images[-1].dtype}
    if not form.own or form.groups != 1 or dtypes != {torch.float32}:
        return ""
    outer, inner, *taps = w.shape
    if outer < MIN_CHANNELS:
        return ""
    four = taps == [4, 4]
    if four and (form.stride != 2 or tuple(form.padding) != (1, 1)):
        return ""
    if four and inner < MIN_CHANNELS:
        reached = form.transposed or min(images[-1].shape[2:]) > 1
        return "image" if reached and small.numel() else ""
    if inner < MIN_CHANNELS:
        return ""
    if not four and (taps != [3, 3] or form.stride > 2):
        return ""
    if not four and max(form.padding) > (2 if form.stride == 1 else 0):
        return ""
    layout = _layout(images)
    if layout is None:
        return ""
    tiles = small.shape[0] * ((small.shape[2] + 1) // 2) * ((small.shape[3] + 1) // 2)
    if not four:
        fewest = FEWEST_TILES[layout][form.stride - 1 if large is None else 2]
        return "tiles" if tiles >= fewest else ""
    if large is None and not form.transposed:  # small is the larger side
        tiles = 0 if min(small.shape[2:]) < 2 else tiles // 4
    if tiles == 0:
        return ""
    if w.numel() > tiles * MOST_WEIGHTS_4X4[large is not None]:
        return "few"
    contiguous = small.is_contiguous() or (large is not None and large.is_contiguous())
    return "" if contiguous else "tiles"


def _layout(images: tuple[Tensor, ...]) -> torch.memory_format | None:
    """The memory format that all images are in."""
    for layout in FEWEST_TILES:
        # A list: torch.compile reads no generator here.
        fits = [t.is_contiguous(memory_format=layout) for t in images]
        if all(fits):
            return layout
    return None


def _last(x: Tensor) -> Tensor:
    """x as the kernels of many channels take it."""
    return x.contiguous(memory_format=torch.channels_last)


def _forward(x: Tensor, w: Tensor, form: Form, factors: Tensor | None = None) -> Tensor:
    kind = _kernels(w, x, None, form) if w.dtype == x.dtype else ""
    if kind == "tiles":
        return _impl.op("cpu", OP)(x, w, factors, *form.place())
    if kind and factors is None:
        x = x if kind == "image" and not form.transposed else _last(x)
        return _impl.op("cpu", f"{OP}_{kind}")(x, w, form.transposed, *form.output_padding)
    return torch.convolution(x, w, None, *form.arguments())


def _gradients(
    dy: Tensor, x: Tensor, w: Tensor, form: Form, wanted: list[bool], factors: Tensor | None = None
) -> list[Any]:
    """[gradient of x times its factors, dw], None where not wanted."""
    found: list[Any] = [None, None]
    left = list(wanted)
    if wanted[0]:
        adjoint = form.adjoint(x, dy, w)
        if _kernels(w, dy, None, adjoint):
            found[0], left[0] = _forward(dy, w, adjoint), False
    small, large = (x, dy) if form.transposed else (dy, x)
    kind = _kernels(w, small, large, form) if wanted[1] else ""
    if kind == "tiles":
        by = (factors, None) if form.transposed else (None, factors)
        gradient = _impl.op("cpu", OP + "_weight_gradient")
        place = (w.shape[2], form.stride, *form.padding)
        found[1], left[1] = gradient(small, large, *by, *place), False
    if left[1] and factors is not None:
        x = x * factors[:, :, None, None]
        small, large = (x, dy) if form.transposed else (dy, x)
    if left[1] and kind:
        large = large if kind == "image" else _last(large)
        found[1] = _impl.op("cpu", f"{OP}_{kind}_weight_gradient")(_last(small), large)
        left[1] = False
    if any(left):
        backward = torch.ops.aten.convolution_backward
        others = backward(dy, x, w, None, *form.arguments(), [*left, False])
        found = [
            other if missing else t for t, other, missing in zip(found, others, left, strict=False)
        ]
    return found


# --- Autograd.


class _Convolution(torch.autograd.Function):
    """y from x and w; `no_weight_gradients` switches dw off."""

    @staticmethod
    def forward(ctx: Any, x, w, form):
        ctx.save_for_backward(x, w)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return _forward(x, w, form)

    @staticmethod
    def backward(ctx: Any, dy):
        if dy is None:
            return None, None, None
        x, w = ctx.saved_tensors
        return *gradients(dy, x, w, ctx.form, ctx.needs_input_grad[:2]), None


_checked, _quick = remember(_plan, _run, _Convolution)


def gradients(
    dy: Tensor, x: Tensor, w: Tensor, form: Form, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    """dx and dw where needed, differentiable to any order where a gradient is recorded."""
    wanted = [needs[0], needs[1] and (_weight_gradients or form.derived)]
    if not any(wanted):
        return None, None
    if not torch.is_grad_enabled():
        return _gradients(dy, x, w, form, wanted)
    dx = convolution(dy, w, form.adjoint(x, dy, w)) if wanted[0] else None
    return dx, weight_gradient(dy, x, w, form) if wanted[1] else None


def weight_gradient(dy: Tensor, x: Tensor, w: Tensor, form: Form) -> Tensor:
    """The gradient of the convolution's weights, differentiable to any order in dy and x."""
    if _records(dy, x):
        return _WeightGradient.apply(dy, x, w.detach(), form)
    return _gradients(dy, x, w, form, [False, True])[1]


class _WeightGradient(torch.autograd.Function):
    """dw from dy and x; w lends its shape alone."""

    @staticmethod
    def forward(ctx: Any, dy, x, w, form):
        ctx.save_for_backward(dy, x)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return _gradients(dy, x, w, form, [False, True])[1]

    @staticmethod
    def backward(ctx: Any, v):
        if v is None:
            return None, None, None, None
        dy, x = ctx.saved_tensors
        d_dy = convolution(x, v, ctx.form) if ctx.needs_input_grad[0] else None
        adjoint = ctx.form.adjoint(x, dy, v)
        d_x = convolution(dy, v, adjoint) if ctx.needs_input_grad[1] else None
        return d_dy, d_x, None, None


# --- Backward passes without weight gradients.


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
    gated = w.requires_grad and torch.is_grad_enabled() and not _impl.transformed()
    return _WeightGate.apply(w) if gated else w


_weight_gradients = True


def weight_gradients() -> bool:
    """False within `no_weight_gradients`."""
    return _weight_gradients


@contextlib.contextmanager
def no_weight_gradients() -> Iterator[None]:
    """Within it, a backward through gankern's layers computes no gradient of their weights: of
    convolutions, demodulation, equalised linear layers, and of the strength of noise.

    For penalties whose first gradient is in images or styles alone, such as path length's: what it
    costs is halved. The backward of the penalty itself runs outside, and does reach the weights.
    """
    before = _weight_gradients
    _switch(False)
    try:
        yield
    finally:
        _switch(before)


def _switch(on: bool) -> None:
    global _weight_gradients
    _weight_gradients = on
    set_state(int(not on))


# --- Shape functions of the registered ops.


def output_shape(x, w, stride, pad_y, pad_x, transposed, rest_y, rest_x) -> tuple[int, ...]:
    """Of a convolution in one of our forms."""
    sizes = []
    for dim, pad, rest in ((2, pad_y, rest_y), (3, pad_x, rest_x)):
        if transposed:
            sizes.append((x.shape[dim] - 1) * stride + w.shape[3] - 2 * pad + rest)
        else:
            sizes.append((x.shape[dim] + 2 * pad - w.shape[3]) // stride + 1)
    return (x.shape[0], w.shape[1 if transposed else 0], *sizes)


def _fake(x, w, factors, *place):
    layout = _impl.memory_format(x)
    shape = output_shape(x, w, *place)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _fake_weight_gradient(dy, x, dy_factors, x_factors, taps, stride, pad_y, pad_x):
    return x.new_empty((dy.shape[1], x.shape[1], taps, taps))


def _fake_few(x, w, transposed, rest_y, rest_x, memory_format=torch.channels_last):
    shape = output_shape(x, w, 2, 1, 1, transposed, rest_y, rest_x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _fake_image(x, w, transposed, rest_y, rest_x):
    layout = torch.contiguous_format if transposed else torch.channels_last
    return _fake_few(x, w, transposed, rest_y, rest_x, layout)


def _fake_few_weight_gradient(dy, x):
    return x.new_empty((dy.shape[1], x.shape[1], 4, 4))


_impl.register_fake(OP, _fake)
_impl.register_fake(OP + "_weight_gradient", _fake_weight_gradient)
_impl.register_fake(OP + "_few", _fake_few)
_impl.register_fake(OP + "_few_weight_gradient", _fake_few_weight_gradient)
_impl.register_fake(OP + "_image", _fake_image)
_impl.register_fake(OP + "_image_weight_gradient", _fake_few_weight_gradient)
