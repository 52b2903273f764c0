"""The CPU's 3x3 convolutions by minimal filtering: against PyTorch's, every form and order."""

from __future__ import annotations

import contextlib
import re

import harness
import pytest
import torch
from harness import (
    LAYOUTS,
    assert_as_good_as,
    compare,
    lay_out,
    output,
    outputs_and_grads,
    randn,
    second_grads,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gankern.models import dcgan
from gankern.ops import _impl, conv2d_resample, setup_filter
from gankern.ops.bias_act import ACTS
from gankern.ops.convolution import (
    FEWEST_TILES,
    Form,
    _kernels,
    _ours,
    convolution,
    has_own_kernels,
    output_shape,
)
from gankern.ops.modulated_conv2d import scaled_convolution
from gankern.ops.synthesis_epilogue import synthesis_epilogue_reference
from gankern.ops.synthesis_layer import conv2d_layer, synthesis_layer

pytestmark = pytest.mark.skipif(
    bool(_impl.LIBRARIES["cpu"]), reason=f"no CPU library: {_impl.LIBRARIES['cpu']}"
)


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Our kernels at every size, not only where they are faster."""
    for key in FEWEST_TILES:
        monkeypatch.setitem(FEWEST_TILES, key, (32, 32, 32))
    monkeypatch.setattr("gankern.ops.convolution.MOST_WEIGHTS_4X4", (1 << 30, 1 << 30))


# stride, padding, transposed, output padding, groups
FORMS = {
    "pad 1": Form(1, (1, 1), False, (0, 0), 1, True),
    "pad 0": Form(1, (0, 0), False, (0, 0), 1, True),
    "pad 2, 1": Form(1, (2, 1), False, (0, 0), 1, True),
    "transposed": Form(1, (1, 0), True, (0, 0), 1, True),
    "down": Form(2, (0, 0), False, (0, 0), 1, True),
    "up": Form(2, (0, 0), True, (0, 0), 1, True),
    "up, one more": Form(2, (0, 0), True, (1, 0), 1, True),
}
SHAPES = {  # N, I, O, H, W
    "8x8": (2, 16, 16, 8, 8),
    "odd": (3, 17, 24, 9, 13),
    "wide": (1, 16, 40, 6, 150),
    "deep": (2, 300, 16, 11, 10),
}


# With 4x4 taps, in channels-last memory.
FORMS_4X4 = {
    "down": Form(2, (1, 1), False, (0, 0), 1, True),
    "up": Form(2, (1, 1), True, (0, 0), 1, True),
    "up, one more": Form(2, (1, 1), True, (1, 0), 1, True),
}


def inputs_of(shape: str, form: Form, taps: int = 3) -> list[Tensor | None]:
    n, i, o, h, w = SHAPES[shape]
    weight = randn(*((i, o) if form.transposed else (o, i)), taps, taps, seed=1) / (taps * i**0.5)
    return [randn(n, i, h, w).float(), weight.float()]


@contextlib.contextmanager
def instruction_set(isa: int):
    try:
        if _impl.set_cpu_isa(isa) != isa:
            pytest.skip("this machine lacks the instruction set")
        yield
    finally:
        _impl.set_cpu_isa(-1)


def of_torch(form: Form):
    return lambda x, w: torch.convolution(x, w, None, *form.arguments())


@pytest.mark.parametrize("isa", [0, 1, 2], ids=["base", "avx2", "avx512"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forward_and_gradients(form, shape, layout, isa):
    x, w = inputs_of(shape, form)
    inputs = [lay_out(x, layout), w]
    assert _ours(inputs[1], inputs[0], None, form)
    with instruction_set(isa):
        y, *_ = compare(lambda x, w: convolution(x, w, form), of_torch(form), inputs)
        assert y.is_contiguous(memory_format=list(FEWEST_TILES)[layout == "channels_last"])


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", ["odd", "wide"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_scaled(form, shape, layout):
    """Images times factors, as they are read."""
    x, w = inputs_of(shape, form)
    x, factors = lay_out(x, layout), randn(*x.shape[:2], seed=3).float()

    def scaled(x, factors, w):
        return scaled_convolution(factors, "cpu")(x, w, form)

    # Winograd's sums of many channels round more than direct ones: up to 5.3 were seen.
    roundings = 8 if shape == "wide" else 4
    y, *_ = compare(scaled, of_product(form), [x, factors, w], roundings=roundings)
    with torch.no_grad():
        assert torch.equal(scaled(x, factors, w), y)
    compare(scaled, of_product(form), [x, factors, w], second_grads, roundings=roundings)


@pytest.mark.parametrize("isa", [0, 1, 2], ids=["base", "avx2", "avx512"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", ["8x8", "odd"])
@pytest.mark.parametrize("form", ["pad 1", "transposed", "down", "up"])
def test_scaled_backward(form, shape, layout, isa):
    """Gradients of an image and its factors by the convolution they come from."""
    form = FORMS[form]
    x, w = inputs_of(shape, form)
    x, factors = lay_out(x, layout), randn(*x.shape[:2], seed=3).float()
    dy = torch.empty_like(torch.convolution(x, w, None, *form.arguments())).normal_()
    adjoint = form.adjoint(x, dy, w)

    def gradients(dy, x, factors, w):
        dz = torch.convolution(dy, w, None, *adjoint.arguments())
        return [dz * factors[:, :, None, None], (dz * x).sum([2, 3])]

    exact = gradients(*(t.double() for t in (dy, x, factors, w)))
    with instruction_set(isa):
        found = _impl.op("cpu", "convolution_scaled_backward")(dy, w, x, factors, *adjoint.place())
    eager = gradients(dy, x, factors, w)
    for a, b, e, terms in zip(found, eager, exact, [1, x[0, 0].numel()], strict=True):
        assert_as_good_as(a, b, e, terms=terms)


# Operands of the epilogue: d, noise (of how many samples), strength (of how many channels), b.
OPERANDS = {"all": (1, -1, 1, 1), "none": (0, 0, 0, 0), "one noise": (0, 1, -1, 1)}


@pytest.mark.parametrize("isa", [0, 1, 2], ids=["base", "avx2", "avx512"])
@pytest.mark.parametrize("shape", ["odd", "wide"])
@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize("act", ["lrelu", "swish"])
@pytest.mark.parametrize("form", ["pad 1", "pad 2, 1", "down"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_with_epilogue(layout, form, act, operands, shape, isa):
    """A convolution that is demodulated, gets noise and bias and is activated as it is written."""
    form = FORMS[form]
    x, w = inputs_of(shape, form)
    (n, _, height, width), o = output_shape(x, w, *form.place()), len(w)
    has_d, of_noise, of_strength, has_b = operands
    d = randn(n, o, seed=2).float() if has_d else None
    noise = randn(n if of_noise < 0 else 1, height, width, seed=3).float() if of_noise else None
    strength = randn(o if of_strength < 0 else 1, seed=4).float() if of_strength else None
    b = randn(o, seed=5).float() if has_b else None
    factors = randn(*x.shape[:2], seed=6).float()
    numbers = (ACTS[act].alpha, 0.8, 1.1 if act == "lrelu" else -1.0)

    def ours(x, w, factors, d, noise, strength, b):
        at = (form.stride, *form.padding)
        op = _impl.op("cpu", "convolution_epilogue")
        return op(x, w, factors, *at, d, noise, strength, b, ACTS[act].code, *numbers)

    def of_both(x, w, factors, *operands):
        z = torch.convolution(x * factors[:, :, None, None], w, None, *form.arguments())
        rest = (0, 0, 0, 0, False, 1.0, act, *numbers)
        return synthesis_epilogue_reference(z, None, *operands, *rest)

    inputs = [lay_out(x, layout), w, factors, d, noise, strength, b]
    with instruction_set(isa):
        compare(ours, of_both, inputs, output)


@pytest.mark.parametrize("act", ["linear", "relu", "lrelu", "tanh", "selu", "swish"])
@pytest.mark.parametrize("shape", ["8x8", "odd"])
@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_discriminator_layer(layout, down, shape, act):
    """Convolution, bias and activation in one kernel, also where gradients are recorded."""
    x, w = inputs_of(shape, FORMS["pad 1"])
    inputs = [lay_out(x, layout), w, randn(len(w), seed=2).float()]
    f = setup_filter([1, 3, 3, 1]) if down == 2 else None

    def at(which):
        return lambda x, w, b: conv2d_layer(
            x, w, b, f, down=down, padding=1, act=act, gain=0.9, clamp=1.5, impl=which
        )

    for derivative in (outputs_and_grads, second_grads):
        compare(at("cpu"), at("reference"), inputs, derivative)
    y = at("cpu")(*(t.requires_grad_() for t in inputs))
    one = act != "swish"  # whose gradient is not in its output
    node = y.grad_fn.name().lstrip("_")  # of Python or of C++
    assert node == ("ConvolutionBiasActBackward" if one else "EpilogueBackward")


@pytest.mark.parametrize("noise", [None, (3, 1, 9, 13), (9, 13)])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_layer_without_gradients(layout, noise):
    """Generating takes one kernel a layer, and gives what training gives."""
    x, w = inputs_of("odd", FORMS["pad 1"])
    x, styles, b = lay_out(x, layout), randn(*x.shape[:2], seed=2).float(), randn(len(w))
    z = None if noise is None else randn(*noise, seed=3).float()

    def layer():
        return synthesis_layer(x, w, styles, b.float(), z, clamp=2)

    with torch.no_grad(), Calls() as calls:
        y = layer()
    assert calls.names == ["demod_coefs", "convolution_epilogue"]
    w.requires_grad_()
    trained = layer().detach()
    assert y.stride() == trained.stride()
    torch.testing.assert_close(y, trained, rtol=1e-6, atol=1e-6)
    with torch.no_grad(), pytest.raises(ValueError, match="b must have shape"):
        synthesis_layer(x, w, styles, b[:3].float())


def test_layers_under_vmap():
    x, w = inputs_of("8x8", FORMS["pad 1"])
    b, styles = randn(len(w), seed=2).float(), randn(*x.shape[:2], seed=3).float()
    batch = torch.stack([x, x + 1])
    for layer in (
        lambda x: conv2d_layer(x, w, b, padding=1, act="lrelu"),
        lambda x: synthesis_layer(x, w, styles, b),
    ):
        y = torch.func.vmap(layer)(batch)
        torch.testing.assert_close(y, torch.stack([layer(x) for x in batch]), rtol=1e-4, atol=1e-4)


class Calls(TorchDispatchMode):
    """The names of our ops that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gankern":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("isa", [0, 1, 2], ids=["base", "avx2", "avx512"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS_4X4.values(), ids=FORMS_4X4)
def test_four_taps(form, shape, isa):
    x, w = inputs_of(shape, form, 4)
    inputs = [lay_out(x, "channels_last"), w]
    assert _ours(w, inputs[0], None, form)
    assert not _ours(w, x, None, form)
    with instruction_set(isa):
        y, *_ = compare(lambda x, w: convolution(x, w, form), of_torch(form), inputs)
        assert y.is_contiguous(memory_format=torch.channels_last)
        if shape == "odd":
            compare(lambda x, w: convolution(x, w, form), of_torch(form), inputs, second_grads)


@pytest.mark.parametrize("most", [0, 1 << 30])
@pytest.mark.parametrize("size", [(0, 4, 4), (8, 1, 1), (8, 2, 2), (1, 3, 2), (40, 4, 4)])
@pytest.mark.parametrize("form", FORMS_4X4.values(), ids=FORMS_4X4)
def test_four_taps_at_the_edges(form, size, most, monkeypatch):
    """No images, and a side of one or two pixels, whose memory format is both."""
    monkeypatch.setattr("gankern.ops.convolution.MOST_WEIGHTS_4X4", (most, most))
    n, h, w = size
    x, weight = randn(n, 16, h, w).float(), randn(16, 16, 4, 4, seed=1).float() / 16
    if not form.transposed and (h, w) == (1, 1):
        with pytest.raises(RuntimeError):
            convolution(x, weight, form)
        return
    for layout in LAYOUTS[:2]:
        inputs = [lay_out(x, layout), weight]
        compare(lambda x, w: convolution(x, w, form), of_torch(form), inputs)


@pytest.mark.parametrize("name", ["DownConvolution", "UpConvolution"])
def test_layers_reach_the_kernels(name, monkeypatch):
    called, real = [], _impl.op
    monkeypatch.setattr(_impl, "op", lambda *names: called.append(names) or real(*names))
    y = getattr(dcgan, name)(32, 64)(randn(8, 32, 16, 16).float())
    assert called == [("cpu", "convolution")]
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("isa", [0, 1, 2], ids=["base", "avx2", "avx512"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [*SHAPES, "many pixels", "odd channels"])
@pytest.mark.parametrize("form", FORMS_4X4.values(), ids=FORMS_4X4)
def test_four_taps_of_few_images(form, shape, layout, isa, monkeypatch):
    """By plain sums, in channels-last memory whatever x is in."""
    monkeypatch.setattr("gankern.ops.convolution.MOST_WEIGHTS_4X4", (0, 0))
    monkeypatch.setitem(SHAPES, "many pixels", (3, 16, 70, 25, 40))  # of a weight gradient
    monkeypatch.setitem(SHAPES, "odd channels", (2, 19, 23, 5, 6))
    x, w = inputs_of(shape, form, 4)
    inputs = [lay_out(x, layout), w]
    assert _kernels(w, inputs[0], None, form) == "few"
    with instruction_set(isa):
        y, *_ = compare(lambda x, w: convolution(x, w, form), of_torch(form), inputs)
        assert y.is_contiguous(memory_format=torch.channels_last)
        if shape == "odd":
            compare(lambda x, w: convolution(x, w, form), of_torch(form), inputs, second_grads)


IMAGES = {  # N, channels of the smaller grid and of the images, H, W of the smaller grid
    "rgb": (2, 16, 3, 8, 8),
    "grey": (3, 24, 1, 9, 13),
    "many bands": (2, 70, 3, 33, 5),
    "as many as there are": (1, 40, 15, 20, 37),
    "one row": (2, 16, 4, 1, 6),
    "none": (0, 16, 3, 4, 4),
}


@pytest.mark.parametrize("isa", [0, 1, 2], ids=["base", "avx2", "avx512"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("form", FORMS_4X4.values(), ids=FORMS_4X4)
def test_four_taps_of_images(form, shape, layout, isa):
    """Images of few channels, of which odd sides may be more than the weights reach."""
    n, many, few, h, w = IMAGES[shape]
    size = (many, h, w) if form.transposed else (few, 2 * h + 1, 2 * w)
    weight = randn(many, few, 4, 4, seed=1).float() / many**0.5
    inputs = [lay_out(randn(n, *size).float(), layout), weight]
    assert _kernels(weight, inputs[0], None, form) == ("image" if n else "")
    with instruction_set(isa):
        y, *_ = compare(lambda x, w: convolution(x, w, form), of_torch(form), inputs)
        last = torch.contiguous_format if form.transposed else torch.channels_last
        assert not n or y.is_contiguous(memory_format=last)
        if shape == "grey":
            compare(lambda x, w: convolution(x, w, form), of_torch(form), inputs, second_grads)


def test_few_channels_of_the_smaller_grid_are_pytorchs():
    x, w = randn(2, 16, 8, 8).float(), randn(3, 16, 4, 4, seed=1).float()
    form = FORMS_4X4["down"]
    assert _kernels(w, x, None, form) == ""
    assert torch.equal(convolution(x, w, form), of_torch(form)(x, w))


def of_product(form: Form):
    return lambda x, f, w: torch.convolution(x * f[:, :, None, None], w, None, *form.arguments())


def test_scaled_saves_no_product():
    """x alone is kept for the backward: no image beside it, and none made in the forward."""
    form = FORMS["pad 1"]
    x, w = inputs_of("8x8", form)
    x, factors = x.requires_grad_(), randn(*x.shape[:2], seed=3).float()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scaled_convolution(factors, "cpu")(x, w, form)
    assert [t for t in kept if t.shape == x.shape] == [x]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_second_order(form):
    own, plain = (
        second_grads(lambda x, w, f=f: convolution(x, w, f), inputs_of("odd", form))
        for f in (form, form._replace(own=False))
    )
    exact = second_grads(of_torch(form), [t.double() for t in inputs_of("odd", form)])
    for i, (a, e, x) in enumerate(zip(own, plain, exact, strict=True)):
        assert_as_good_as(a, e, x, f"second {i}")


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_deterministic(form, layout):
    """The same bits in two runs, and with one thread and two."""
    threads = torch.get_num_threads()
    x, w = inputs_of("odd", form)
    inputs = [lay_out(x, layout), w]
    runs = []
    try:
        for n in (1, 1, 2):
            torch.set_num_threads(n)
            runs.append(outputs_and_grads(lambda x, w: convolution(x, w, form), inputs))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_constant_image():
    """Weights that sum to one keep a constant image, away from its edges, to a rounding."""
    x, w = torch.full((1, 16, 12, 12), 3.0), torch.full((16, 16, 3, 3), 1 / 144)
    y = convolution(x, w, FORMS["pad 1"])[:, :, 1:-1, 1:-1]
    assert torch.allclose(y, torch.full_like(y, 3.0), rtol=1e-6, atol=0)


def test_of_layers():
    """conv2d_resample takes our kernels for "cpu" and PyTorch's for "reference"."""
    x, w, f = randn(2, 16, 12, 12).float(), randn(16, 16, 3, 3, seed=1).float(), None
    for up, down in ((1, 1), (2, 1), (1, 2)):
        f = setup_filter([1, 3, 3, 1])
        compare(
            lambda x, w, f=f, u=up, d=down: conv2d_resample(x, w, f, u, d, 1, impl="cpu"),
            lambda x, w, f=f, u=up, d=down: conv2d_resample(x, w, f, u, d, 1, impl="reference"),
            [x, w],
            what=f"up {up} down {down}",
        )
    plain = torch.nn.functional.conv2d(x, w, padding=1)
    assert torch.equal(conv2d_resample(x, w, padding=1, impl="reference"), plain)
    assert not torch.equal(conv2d_resample(x, w, padding=1, impl="cpu"), plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x.bfloat16(), w.bfloat16()),
        lambda x, w: (lay_out(x, "strided"), w),
        lambda x, w: (x[:, :8].contiguous(), w[:, :8]),
        lambda x, w: (x[:, :, :4, :4].contiguous(), w),
        lambda x, w: (x, w[:, :, :1, :1].repeat(1, 1, 5, 5)),
    ],
    ids=["float64", "bfloat16", "strided", "few channels", "small", "5x5"],
)
def test_pytorch_takes_the_rest(change):
    form = FORMS["pad 1"]
    x, w = change(randn(2, 16, 12, 12).float(), randn(16, 16, 3, 3, seed=1).float())
    assert torch.equal(convolution(x, w, form), of_torch(form)(x, w))


def test_choice(monkeypatch):
    x = torch.zeros(1)
    assert [has_own_kernels(x, i) for i in (None, "cpu", "reference", "triton")] == [1, 1, 0, 0]
    monkeypatch.setattr(_impl, "_OVERRIDE", "reference")
    monkeypatch.setattr(_impl, "_default", {})
    assert not has_own_kernels(x, None)


def test_opcheck():
    ops = torch.ops.gankern
    x, w, up = *inputs_of("odd", FORMS["down"]), randn(17, 24, 3, 3).float()
    args = [(1, 1, 1, False, 0, 0), (2, 0, 0, False, 0, 0)]
    for rest in args:
        for layout in LAYOUTS:
            laid = lay_out(x, layout)
            harness.opcheck(ops.convolution.default, (laid, w, None, *rest))
    factors = randn(*x.shape[:2]).float()
    rest = (2, 0, 0, True, 1, 0)
    harness.opcheck(ops.convolution.default, (x, up, factors, *rest))
    dy = randn(3, 24, 9, 13).float()
    gradient = ops.convolution_weight_gradient.default
    harness.opcheck(gradient, (dy, x, None, factors, 3, 1, 1, 1))
    last = [lay_out(t, "channels_last") for t in (randn(3, 24, 4, 6).float(), x)]
    harness.opcheck(gradient, (*last, None, factors, 4, 2, 1, 1))
    at, b = (2, 0, 0), randn(24).float()
    args = (last[1], w, factors, *at, None, None, None, b, 2, 0.2, 1.0, -1.0)
    harness.opcheck(ops.convolution_epilogue.default, args)
    args = (last[0], w, randn(3, 17, 9, 13).float(), factors.t().contiguous().t(), *at, True, 0, 0)
    args = (*args[:2], lay_out(args[2], "channels_last"), *args[3:])
    harness.opcheck(ops.convolution_scaled_backward.default, args)
    four = randn(24, 17, 4, 4).float()
    few = (last[1], four, False, 0, 0), (last[0], four, True, 1, 0)
    for args in few:
        harness.opcheck(ops.convolution_few.default, args)
    harness.opcheck(ops.convolution_few_weight_gradient.default, tuple(last))
    image = (x[:, :3], four[:, :3], False, 0, 0), (last[0], four[:, :3], True, 1, 0)
    for args in image:
        harness.opcheck(ops.convolution_image.default, args)
    harness.opcheck(ops.convolution_image_weight_gradient.default, (last[0], x[:, :3]))
    harness.opcheck(ops.convolution.default, (last[1], four, None, 2, 1, 1, False, 0, 0))


def test_compile():
    form = FORMS["up"]
    x, w = inputs_of("8x8", form)

    def f(x, w):
        return convolution(x, w, form).square()

    fast = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_grads(f, [x, w]), outputs_and_grads(fast, [x, w]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((torch.zeros(1, 2, 4), torch.zeros(2, 2, 3, 3), None, 1, 1, 1),
         "convolution: x must have 4 dimensions, got 3"),
        ((torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 3, 3).double(), None, 1, 1, 1),
         "convolution: w must be float32, got float64"),
        ((torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 3, 3), None, 3, 0, 0),
         "convolution: stride must be 1 or 2, got 3"),
        ((torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 3, 3), None, 2, 1, 0),
         "convolution: padding must be from 0 to 0, got 1 and 0"),
        ((torch.zeros(1, 2, 4, 4), torch.zeros(2, 4, 3, 3), None, 1, 1, 1),
         "convolution: w must have 2 channels in and square taps, got 4 and 3x3"),
        ((torch.zeros(1, 2, 2, 4), torch.zeros(2, 2, 3, 3), None, 1, 0, 1),
         "convolution: padding must leave an output, got 0x4"),
        ((torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 4, 4), None, 2, 1, 1),
         "convolution: 4x4 taps take images in channels-last memory"),
        ((torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 5, 5), None, 2, 1, 1),
         "convolution: w must have 3x3 or 4x4 taps, got 5x5"),
    ],
)  # fmt: skip
def test_errors(args, text):
    with pytest.raises(RuntimeError, match=re.escape(text)):
        torch.ops.gankern.convolution(*args, False, 0, 0)


LAST = torch.zeros(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["few", "image"])
@pytest.mark.parametrize(
    ("x", "w", "place", "text"),
    [
        (LAST, torch.zeros(16, 3, 4, 4), (True, 0, 2),
         "convolution: output padding must be from 0 to 1, got 0 and 2"),
        (LAST, torch.zeros(16, 16, 3, 3), (False, 0, 0),
         "convolution: these kernels want 4x4 taps, got 3x3"),
        (LAST.contiguous(), torch.zeros(16, 3, 4, 4), (True, 0, 0),
         "convolution: 4x4 taps take images in channels-last memory"),
        (LAST[:, :, :1, :1], torch.zeros(16, 16, 4, 4), (False, 0, 0),
         "convolution: padding must leave an output, got 0x0"),
    ],
)  # fmt: skip
def test_errors_of_four_taps(name, x, w, place, text):
    with pytest.raises(RuntimeError, match=re.escape(text)):
        getattr(torch.ops.gankern, f"convolution_{name}")(x, w, *place)


@pytest.mark.parametrize("name", ["few", "image"])
def test_errors_of_weight_gradients(name):
    gradient = getattr(torch.ops.gankern, f"convolution_{name}_weight_gradient")
    with pytest.raises(RuntimeError, match="dy must have the shape of the convolution's output"):
        gradient(LAST, LAST)
    with pytest.raises(RuntimeError, match="4x4 taps take images in channels-last memory"):
        gradient(torch.zeros(1, 16, 2, 2), LAST)
