"""synthesis_epilogue and synthesis_layer: every implementation, dtype and layout, all orders."""

from __future__ import annotations

import collections

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import (
    DTYPES,
    LAYOUTS,
    assert_kernels_ran,
    compare,
    examples,
    gpu_of,
    interpreted,
    launches,
    lay_out,
    led_by,
    output,
    outputs_and_grads,
    randn,
    second_grads,
    skip_float64_triton,
)
from hypothesis import given, reject
from hypothesis import strategies as st

from gankern.ops import (
    _impl,
    conv2d_layer,
    conv2d_resample,
    setup_filter,
    synthesis_epilogue,
    synthesis_layer,
)

F4 = setup_filter([1, 3, 3, 1])
LOPSIDED = torch.outer(torch.tensor([1.0, 3, 2, 1.5]), torch.tensor([0.5, 3, 3, 1])) / 40
WIDTHS = (*range(18, 32), *range(45, 63), 100, 120, 128, 256)
# x, filter, padding
SHAPES = {
    "up_layer": ((2, 3, 9, 17), F4, 1),
    "no_filter": ((2, 5, 8, 8), None, 0),
    "odd": ((1, 20, 5, 7), LOPSIDED, (0, 3, 2, 1)),
    "separable": ((2, 8, 6, 11), torch.tensor([1.0, 2, 1]) / 4, (2, 0)),
    "crop": ((1, 2, 7, 8), LOPSIDED, (3, -1, 1, 2)),
    "long_filter": ((1, 2, 9, 9), setup_filter([1, 2, 3, 4, 3, 2, 1]), 3),
    "1x1": ((3, 4, 1, 1), None, 0),
    "empty": ((0, 4, 5, 5), F4, 1),
}


def setting(name, impl, device):
    """A row of SHAPES; for Triton's interpreter one sample and few channels of it."""
    (n, c, *pixels), f, padding = SHAPES[name]
    shape = (min(n, 1), min(c, 3), *pixels) if interpreted(impl, device) else (n, c, *pixels)
    return shape, f, padding


def make_inputs(shape, f, padding, dtype, layout="contiguous", noise="sample", strengths=1):
    x = lay_out(randn(*shape).to(dtype), layout)
    small = dtype if dtype == torch.float64 else torch.float32
    n, c = shape[:2]
    y = synthesis_epilogue(torch.zeros(shape), f, padding=padding, impl="reference")
    noise_shape = {"sample": (n, 1, *y.shape[2:]), "shared": y.shape[2:], "none": None}[noise]
    d = randn(n, c, seed=2).abs().add(0.5).to(small)
    b, s = randn(c, seed=3).to(small), randn(strengths, seed=4).to(small)
    z = None if noise_shape is None else randn(*noise_shape, seed=5).to(small)
    return x, d, z, s, b


def runner(impl, f, padding, **options):
    def run(x, d, z, s, b):
        on = None if f is None else f.to(x.device)
        return synthesis_epilogue(x, on, d, z, s, b, padding, impl=impl, **options)

    return run


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_reference(impl, device, name, dtype, layout):
    skip_float64_triton(impl, dtype)
    if interpreted(impl, device) and dtype != torch.float32 and layout != "contiguous":
        pytest.skip("the interpreter is slow; the layouts are tested in float32")
    shape, f, padding = setting(name, impl, device)
    x, d, z, s, b = (t.to(device) for t in make_inputs(shape, f, padding, dtype, layout))

    def without_noise_gradient(which):
        run = runner(which, f, padding, clamp=1.5, filter_gain=1.25)
        return lambda x, d, s, b: run(x, d, z.to(x.dtype) if x.dtype == torch.float64 else z, s, b)

    y, *_ = compare(without_noise_gradient(impl), without_noise_gradient("reference"), [x, d, s, b])
    if layout != "strided" and x.numel() and not x.is_contiguous():
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "act", ["linear", "relu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"]
)
@pytest.mark.parametrize("name", ["up_layer", "no_filter"])
def test_activations(impl, device, act, name):
    shape, f, padding = setting(name, impl, device)
    inputs = [t.to(device) for t in make_inputs(shape, f, padding, torch.float32, noise="shared")]
    inputs[3] = inputs[3].expand(shape[1]).contiguous()  # a strength a channel
    compare(runner(impl, f, padding, act=act), runner("reference", f, padding, act=act), inputs)


@pytest.mark.parametrize("present", ["d", "zs", "b", "dzs", ""])
def test_optional_operands(impl, device, present):
    shape, f, padding = setting("up_layer", impl, device)
    operands = make_inputs(shape, f, padding, torch.float32)
    inputs = [operands[0].to(device)]
    inputs += [
        t.to(device) if k in present else None for k, t in zip("dzsb", operands[1:], strict=True)
    ]
    compare(runner(impl, f, padding), runner("reference", f, padding), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 40, 23, 41), (2, 18, 40, 37), (1, 2, 9, 601)], ids=str)
@pytest.mark.parametrize("f", [F4, None], ids=["filter", "flat"])
def test_large_tiles(impl, device, f, shape, layout, dtype):
    """On a GPU of few multiprocessors: several channels a block share the noise."""
    if impl != "simt":
        pytest.skip("only csrc/simt can be a smaller GPU")
    padding = 0 if f is None else 1
    x, d, z, s, b = make_inputs(shape, f, padding, dtype, layout)
    with gpu_of(1, impl):
        compare(
            lambda x, d, s, b: runner("simt", f, padding)(x, d, z, s, b),
            lambda x, d, s, b: runner("reference", f, padding)(x, d, z, s, b),
            [x, d, s, b],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("act", ["lrelu", "tanh"])
@pytest.mark.parametrize("f", [F4, None], ids=["filter", "flat"])
def test_tiles_of_few_channels(impl, device, f, act, processors, dtype):
    """Planes so large that they are cut: scratch for every tile's sums, noise of every pixel."""
    if impl != "simt":
        pytest.skip("only csrc/simt can be any GPU")
    padding = 0 if f is None else 1
    x, d, z, s, b = make_inputs((2, 2, 65, 128), f, padding, dtype)
    with gpu_of(processors, impl):
        compare(
            lambda x, d, s, b: runner("simt", f, padding, act=act)(x, d, z, s, b),
            lambda x, d, s, b: runner("reference", f, padding, act=act)(x, d, z, s, b),
            [x, d, s, b],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("channels", [3, 8, 24, 40])
@pytest.mark.parametrize("f", [F4, randn(3, 4).float()], ids=["outer product", "any"])
def test_strips(impl, device, f, channels, dtype):
    """Channels-last images of several strips; parts of the channels, and odd ones."""
    if impl not in ("simt", "cuda"):
        pytest.skip("for the strips of the CUDA kernels")
    x, d, z, s, b = make_inputs((1, channels, 133, 35), f, 2, dtype, "channels_last")
    x, d, z, s, b = (t.to(device) for t in (x, d, z, s, b))
    with gpu_of(1, impl):
        compare(
            lambda x, d, s, b: runner(impl, f, 2)(x, d, z, s, b),
            lambda x, d, s, b: runner("reference", f, 2)(x, d, z, s, b),
            [x, d, s, b],
        )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 9), (1, 3, 70, 33), (1, 2, 9, 1100), (2, 3, 5, 261)], ids=str
)
def test_lines(impl, device, shape, dtype):
    """Planes that are cut across or down, or share a block; rows, and those of noise in x's dtype
    and in float32, that begin anywhere in memory."""
    if impl not in ("simt", "cuda"):
        pytest.skip("for the strips of the CUDA kernels")
    n, c, h, w = shape
    for offset, f in ((0, F4), (1, LOPSIDED), (3, F4)):
        memory = randn(n * c * h * w + offset, seed=offset).to(dtype)
        _, d, z, s, b = make_inputs(shape, f, (1, 2), dtype)
        z = (
            randn(offset + z.numel())
            .to(dtype if offset < 3 else torch.float32)[offset:]
            .view(z.shape)
        )
        x, d, z, s, b = (t.to(device) for t in (memory[offset:].view(shape), d, z, s, b))
        with gpu_of(1, impl):
            compare(
                lambda x, d, s, b, f=f, z=z: runner(impl, f, (1, 2))(x, d, z, s, b),
                lambda x, d, s, b, f=f, z=z: runner("reference", f, (1, 2))(
                    x, d, z.to(d.dtype), s, b
                ),
                [x, d, s, b],
            )


@pytest.mark.parametrize("kilobytes", [64, 99, 163, 227])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("noise", ["shared", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_shared_memory_of_any_width(impl, device, layout, noise, dtype, kilobytes):
    """With what the kernels' own arrays take, a block asks for no more than a GPU has."""
    if impl != "simt":
        pytest.skip("only csrc/simt can be any GPU")
    last = [(2, (117, 125, 202, 243, 252)), (8, (54, 60, 77, 111)), (32, WIDTHS)]
    planes = [(2, (515, 1030)), (9, (3, 30, 65, 129, 257))]
    for channels, widths in last if layout == "channels_last" else planes:
        for width in widths:
            shape = (1, channels, 2, width)
            x, d, z, s, b = make_inputs(shape, F4, 2, dtype, layout, noise)
            s = None if z is None else s
            with gpu_of(1, impl, kilobytes * 1024):
                outputs_and_grads(
                    lambda x, d, s, b, z=z: runner(impl, F4, 2)(x, d, z, s, b), [x, d, s, b]
                )


@pytest.mark.parametrize("act", ["lrelu", "swish"])
@pytest.mark.parametrize("name", ["up_layer", "no_filter"])
def test_gradgradcheck(impl, device, name, act):
    skip_float64_triton(impl, torch.float64)
    (n, _c, _, _), f, padding = SHAPES[name]
    inputs = make_inputs((n, 2, 3, 4), f, padding, torch.float64)
    leaves = [t.to(device).requires_grad_() for t in inputs]
    run = runner(impl, f, padding, act=act)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    x, d, z, s, b = leaves
    z = z.detach()
    assert torch.autograd.gradgradcheck(lambda x, d, s, b: run(x, d, z, s, b), (x, d, s, b))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["lrelu", "swish"])
@pytest.mark.parametrize("name", ["up_layer", "separable", "no_filter"])
def test_second_gradients(impl, device, name, act, layout):
    """Of the gradients in x, d, the strength and b."""
    shape, f, padding = setting(name, impl, device)
    x, d, z, s, b = (t.to(device) for t in make_inputs(shape, f, padding, torch.float32, layout))

    def at(which):
        run = runner(which, f, padding, act=act)
        return lambda x, d, s, b: run(x, d, z.to(x.dtype), s, b)

    for first in range(1 if interpreted(impl, device) else 4):
        (run, inputs), (reference, _) = (
            led_by(first, at(i), [x, d, s, b]) for i in (impl, "reference")
        )
        compare(run, reference, inputs, second_grads, f"of input {first}", nudged=True)


@pytest.mark.parametrize("name", ["up_layer", "no_filter"])
def test_opcheck(impl, device, name):
    if impl == "reference":
        pytest.skip("the reference is not a registered op")
    shape, f, padding = setting(name, impl, device)
    x, d, z, s, b = (t.to(device) for t in make_inputs(shape, f, padding, torch.float32))
    f = None if f is None else f.to(device)
    args = (f, d, z[:, 0], s, b, *[padding] * 4, False, 4.0 if padding else 1.0, 2, 0.2, 1.4, -1.0)
    for layout in ("contiguous", "channels_last"):
        x = lay_out(x, layout)
        op = _impl.op(impl, "synthesis_epilogue")
        harness.opcheck(op, (x, *args))
        y = op(x, *args)
        for backward in ("synthesis_epilogue_bwd", "synthesis_epilogue_bwd_plain"):
            harness.opcheck(_impl.op(impl, backward), (y, x, *args))
    # On a GPU the second kernel takes no filter.
    if not _impl.has(impl, "synthesis_epilogue_bwd2") or (f is not None and impl != "cpu"):
        return
    second = _impl.op(impl, "synthesis_epilogue_bwd2")
    for vd in (None, torch.ones_like(d)):
        cotangents = (torch.ones_like(x), vd, None, torch.ones_like(b))
        inputs = (y, x, *args[:5], *cotangents, *args[5:])
        harness.opcheck(second, inputs)


def test_gradient_of_one_pixel(impl, device):
    """Which is in every order of dimensions, while x is in one."""
    if impl == "reference":
        pytest.skip("the reference is not a registered op")
    x, d, z, s, b = (t.to(device) for t in make_inputs((2, 3, 4, 4), F4, 0, torch.float32))
    x = lay_out(x, "channels_last")
    args = (F4.to(device), d, z[:, 0], s, b, 0, 0, 0, 0, False, 1.0, 2, 0.2, 1.4, -1.0)
    y = _impl.op(impl, "synthesis_epilogue")(x, *args)
    assert y.shape == (2, 3, 1, 1)
    harness.opcheck(_impl.op(impl, "synthesis_epilogue_bwd"), (y, x, *args))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(2, 5, 8, 8), (2, 20, 5, 7), (3, 64, 36, 40), (2, 3, 80, 72)], ids=str
)
def test_second_kernel(impl, device, shape, layout, dtype):
    """The op alone, of each set of cotangents, against its formula in float64."""
    if not _impl.has(impl, "synthesis_epilogue_bwd2"):
        pytest.skip("composed of the first two kernels")
    for cotangents in ("xd", "x", "d", "sb", "xdsb"):
        check_second_kernel(impl, device, shape, layout, dtype, cotangents)


def check_second_kernel(impl, device, shape, layout, dtype, present):
    alpha, gain, clamp = 0.2, 1.4, 1.5
    n, c = shape[:2]
    x, d, z, s, b = (t.to(device) for t in make_inputs(shape, None, 0, dtype, layout))
    dy, vx = (lay_out(randn(*shape, seed=i).to(dtype), layout).to(device) for i in (6, 7))
    acc = torch.promote_types(dtype, torch.float32)
    small = [randn(*at, seed=8 + i).to(acc).to(device) for i, at in enumerate([(n, c), (c,), (c,)])]
    vx, vd, vs, vb = (
        t if k in present else None for k, t in zip("xdsb", [vx, *small], strict=True)
    )
    found = _impl.op(impl, "synthesis_epilogue_bwd2")(
        dy, x, None, d, z[:, 0], s, b, vx, vd, vs, vb, 0, 0, 0, 0, False, 1.0, 2, alpha, gain, clamp
    )

    def double(t, *shape):
        zeros = torch.zeros(shape, dtype=torch.float64)
        return zeros if t is None else t.cpu().double().reshape(shape)

    x, dy, vx = (double(t, *shape) for t in (x, dy, vx))
    d, vd = (double(t, n, c, 1, 1) for t in (d, vd))
    b, vs, vb = (double(t, 1, c, 1, 1) for t in (b, vs, vb))
    z = z.cpu().double()
    v = x * d + z * s.cpu().double() + b
    m = gain * torch.where(v > 0, torch.ones_like(v), alpha)
    m = m * ((v * m).abs() < clamp)
    expected = [m * (vx * d + x * vd + z * vs + vb), m * dy * vd, (m * dy * vx).sum((2, 3))]
    if "d" not in present:
        assert found[1].numel() == 0
        found, expected = found[::2], expected[::2]
    for got, want in zip(found, expected, strict=True):
        slack = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
        slack *= want.abs().max().clamp(min=1).item()
        torch.testing.assert_close(got.cpu().double(), want, rtol=slack, atol=slack)


def test_direct_calls_are_checked():
    """Whose tensors no Python has looked at."""
    if _impl.LIBRARIES["cpu"]:
        pytest.skip(_impl.LIBRARIES["cpu"])
    x, rest = torch.zeros(2, 4, 8, 8), (False, 1.0, 2, 0.2, 1.4, -1.0)
    one, none = torch.zeros(1, 1, 8, 8), (None,) * 5
    bwd, bwd2 = (_impl.op("cpu", f"synthesis_epilogue_{name}") for name in ("bwd", "bwd2"))
    for call in (
        lambda: bwd(one, x, *none, 0, 0, 0, 0, *rest),
        lambda: bwd2(one, x, *none, *none[:4], 0, 0, 0, 0, *rest),
        lambda: bwd2(x, x, *none, one, *none[:3], 0, 0, 0, 0, *rest),
    ):
        with pytest.raises(RuntimeError, match="must have the shape and dtype"):
            call()
    with pytest.raises(RuntimeError, match="padding wants a filter"):
        bwd2(x, x, *none, *none[:4], 0, 0, -4, 0, *rest)


ACTIVATIONS = st.sampled_from(["linear", "lrelu", "lrelu", "tanh", "swish"])


def drawn_filter(taps, kind="any"):
    """Of no taps none; an outer product runs by rows and columns."""
    if taps[0] == 0:
        return None
    f = randn(*taps, seed=7).float()
    return {"any": f, "outer": torch.outer(f[:, 0], f[0]), "line": f[0]}[kind]


@st.composite
def fused_filters(draw):
    """Taps and padding that the GPU kernels filter with."""
    height, width = draw(st.tuples(*[st.integers(2, 4)] * 2))
    sides = [draw(st.integers(0, t - 1)) for t in (width, width, height, height)]
    return (height, width), sides


@st.composite
def other_filters(draw):
    """Too many taps for those, or a padding that crops, or is larger than the filter."""
    taps = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    return taps, [draw(st.integers(-1, 4)) for _ in range(4)]


@st.composite
def epilogue_cases(draw):
    """Three of five with a filter in the kernel, one without a filter."""
    filtered = draw(st.integers(0, 4))
    taps, padding = (0, 1), [0] * 4
    if filtered:
        taps, padding = draw(other_filters() if filtered == 1 else fused_filters())
    kind = draw(
        st.sampled_from(["any", "outer", "line"] if taps[0] == taps[1] else ["any", "outer"])
    )
    heights, widths = st.integers(1, 12), st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 40])
    size = [  # at least what leaves a pixel
        max(draw(sizes), t - sum(pads), 1)
        for sizes, t, pads in ((heights, taps[0], padding[2:]), (widths, taps[1], padding[:2]))
    ]
    dtype = draw(st.sampled_from(["f32", "f16", "f32", "bf16"]))
    # A 16-bit rounding at a clamp that bites decides whether a gradient is zero: float32 only.
    clamps = [None, 0.7] if dtype == "f32" else [None, 1e4]
    return {
        "size": (draw(st.integers(1, 3)), draw(st.sampled_from([*range(1, 10), 8, 16])), *size),
        "taps": taps,
        "kind": kind,
        "padding": padding,
        "layout": draw(st.sampled_from([*LAYOUTS, "channels_last"])),
        "dtype": dtype,
        "small": draw(st.booleans()),  # operands of x's dtype, or of float32
        "operands": draw(st.sampled_from(["", "d", "zs", "dzsb", "db"])),
        "options": {
            "act": draw(ACTIVATIONS),
            "clamp": draw(st.sampled_from(clamps)),
            "flip_filter": draw(st.booleans()),
            "filter_gain": 1.5 if filtered else 1.0,
        },
        "second": dtype == "f32" and draw(st.integers(0, 3)) == 0,
    }


# Fewest cases, of 500, that each kernel has in float32 and in 16 bits, forward and backward.
LEAST = {
    "synthesis_epilogue_fwd_lines": 30,
    "synthesis_epilogue_fwd_pixels": 20,
    "synthesis_epilogue_bwd_lines": 30,
    "synthesis_epilogue_bwd_pixels": 20,
    "synthesis_epilogue_flat_planes": 10,
    "synthesis_epilogue_flat_pixels": 3,
    "synthesis_epilogue_bwd": 15,
}


def test_random_arguments(impl, device):
    ran = collections.Counter()

    @examples(impl)
    @given(epilogue_cases())
    def run(c):
        taps, padding, dtype = c["taps"], c["padding"], DTYPES[c["dtype"]]
        n, channels, *pixels = c["size"]
        if interpreted(impl, device):
            n, channels = 1, min(channels, 2)
        f = drawn_filter(taps, c["kind"])
        size = (n, channels, *pixels)
        x, *rest = make_inputs(size, f, padding, dtype, c["layout"])
        rest = [t.to(device, dtype if c["small"] else torch.float32) for t in rest]
        operands = {k: t for k, t in zip("dzsb", rest, strict=True) if k in c["operands"]}
        noise = operands.pop("z", None)

        def at(which):
            g = runner(which, f, padding, **c["options"])

            def run(x, *small):
                given = dict(zip(operands, small, strict=True))
                z = None if noise is None else noise.to(x.device, small[0].dtype)
                return g(x, given.get("d"), z, given.get("s"), given.get("b"))

            return run

        tensors = [x.to(device), *operands.values()]
        # A clamp leaves 0.7 of sums ten times as large, with their roundings; where tanh saturates,
        # one rounding of y is all of its gradient.
        magnified = c["options"]["clamp"] == 0.7 or c["options"]["act"] == "tanh"
        pair, roundings = (at(impl), at("reference")), 40 if magnified else 4
        with launches(impl) as kernels:  # the gradients of operands are sums over the image
            compare(
                *pair, tensors, case=f"{size} {c}", roundings=roundings, nudged=("d1", "d2", "d3")
            )
        if c["second"] and not interpreted(impl, device):
            compare(*pair, tensors, second_grads, case=f"second {c}", roundings=roundings)
        ran.update((name.split("_kernel")[0], dtype.itemsize) for name in kernels)

    run()
    assert_kernels_ran(impl, ran, LEAST)


@st.composite
def layer_cases(draw):
    return {
        "up": draw(st.sampled_from([1, 2, 2, 3])),
        "down": draw(st.sampled_from([1, 2])),
        "padding": draw(st.integers(0, 2)),
        # Demodulation cancels the style of a single input channel, and leaves it a rounded zero.
        "channels": draw(st.tuples(st.integers(1, 9), st.integers(2, 9))),
        "samples": draw(st.integers(1, 2)),
        "kernel": draw(st.sampled_from([1, 3, 4])),
        "taps": draw(st.sampled_from([(0, 1), (4, 4), (3, 2), (6, 6)])),
        "size": draw(st.tuples(st.integers(4, 8), st.integers(4, 8))),
        "layout": draw(st.sampled_from(["contiguous", "channels_last"])),
        "noise": draw(st.booleans()),
        "demodulate": draw(st.booleans()),
        "flip_weight": draw(st.booleans()),
        # Where tanh saturates, one rounding of y is all of its gradient.
        "act": draw(st.sampled_from(["linear", "lrelu", "swish"])),
    }


def test_random_layers(impl, device):
    @examples(impl)
    @given(layer_cases())
    def run(c):
        (o, i), n, k, taps = c["channels"], c["samples"], c["kernel"], c["taps"]
        if interpreted(impl, device):
            o, i, n, taps = min(o, 2), 2, 1, (min(taps[0], 3), min(taps[1], 3))
        f = drawn_filter(taps)
        tensors = [lay_out(randn(n, i, *c["size"]), c["layout"]), randn(o, i, k, k, seed=1),
                   randn(o, seed=2), randn(n, i, seed=3)]  # fmt: skip
        tensors = [t.float().to(device) for t in tensors]
        options = {"flip_weight": c["flip_weight"], "act": c["act"]}

        def discriminator(which):
            def run(x, w, b):
                on = None if f is None else f.to(x.device)
                return conv2d_layer(x, w, b, on, c["up"], c["down"], c["padding"], impl=which,
                                    **options)  # fmt: skip

            return run

        def generator(which, noise=None):
            def run(x, w, b, s):
                z = None if noise is None else noise.to(x)
                on = None if f is None else f.to(x.device)
                return synthesis_layer(
                    x, w, s, b, z, None, c["up"], c["padding"], on, c["demodulate"], impl=which,
                    **options,
                )  # fmt: skip

            return run

        try:
            y = generator("reference")(*tensors)
            discriminator("reference")(*tensors[:3])
        except (RuntimeError, ValueError):  # nothing is left to convolve or to filter
            reject()
        noise = randn(*y.shape[2:], seed=4).float().to(device) if c["noise"] else None
        layers = {
            "generator": (generator(impl, noise), generator("reference", noise), tensors),
            "discriminator": (discriminator(impl), discriminator("reference"), tensors[:3]),
        }
        orders = outputs_and_grads
        if interpreted(impl, device):  # one of the two, forward only
            layers.pop("discriminator" if c["noise"] else "generator")
            orders = output
        for name, (layer, reference, on) in layers.items():
            compare(
                layer, reference, on, orders,
                case=f"{name} {o} {i} {n} {taps} {c}",
                roundings=64,  # of the convolution's sums, little of which a gradient may leave
            )  # fmt: skip

    run()


def test_deterministic(impl, device):
    shape, f, padding = (1, 2, 33, 65) if interpreted(impl, device) else (2, 12, 33, 65), F4, 1
    inputs = [t.to(device) for t in make_inputs(shape, f, padding, torch.float32)]
    x, d, z, s, b = inputs

    def once():
        leaves = [t.detach().requires_grad_() for t in (x, d, s, b)]
        y = runner(impl, f, padding)(leaves[0], leaves[1], z, *leaves[2:])
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("up", [1, 2])
def test_layer(impl, device, up):
    x, w, styles = randn(2, 8, 6, 5), randn(4, 8, 3, 3, seed=1), randn(2, 8, seed=2)
    noise, s, b = randn(2, 1, 6 * up, 5 * up, seed=3), randn(1, seed=4), randn(4, seed=5)
    inputs = [t.float().to(device) for t in (x, w, styles, b, s)]
    noise = noise.float().to(device)

    def at(which):
        return lambda x, w, styles, b, s: synthesis_layer(
            x, w, styles, b, noise.to(x), s, up, 1, F4.to(x.device), flip_weight=up == 1,
            clamp=2, impl=which,
        )  # fmt: skip

    compare(at(impl), at("reference"), inputs)


def layer(name, impl, f, noise):
    """A layer of the models as a function of x, w, b and, of a generator, styles."""
    up, down = {"same": (1, 1), "up": (2, 1), "down": (1, 2), "colours": (1, 1)}[name.split()[-1]]

    def generator(x, w, b, styles):
        z = None if noise is None else noise.to(x)
        padding = w.shape[2] // 2
        return synthesis_layer(x, w, styles, b, z, None, up, padding, f, padding > 0,
                               flip_weight=up == 1, act="lrelu", impl=impl)  # fmt: skip

    def discriminator(x, w, b):
        return conv2d_layer(x, w, b, f, up, down, 1, act="lrelu", impl=impl)

    return generator if name.startswith("generator") else discriminator


LAYERS = ["generator same", "generator up", "generator colours",
          "discriminator same", "discriminator up", "discriminator down"]  # fmt: skip


def layer_inputs(name, n, i, o, side):
    """x, w, b, styles, and noise."""
    taps, up = 1 if "colours" in name else 3, 2 if "up" in name else 1
    x, w = randn(n, i, side, side + 1), randn(o, i, taps, taps, seed=1)
    noise = randn(side * up, (side + 1) * up, seed=4) if "generator" in name else None
    tensors = [x, w, randn(o, seed=2), randn(n, i, seed=3)]
    return tensors[: 4 if "generator" in name else 3], noise


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradcheck(name):
    leaves, noise = layer_inputs(name, 1, 2, 2, 3)
    leaves = [t.requires_grad_() for t in leaves]
    run = layer(name, "reference", F4, noise)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_second_gradients(impl, device, name):
    """Of the gradients in the images, as R1 takes, and in the styles, as path length does."""
    small = interpreted(impl, device)
    tensors, noise = layer_inputs(name, *((1, 3, 2, 3) if small else (2, 18, 16, 17)))
    tensors = [t.float().to(device) for t in tensors]
    f = F4.to(device)
    for first in (0, 3)[: 1 if "discriminator" in name else 2]:
        (run, inputs), (reference, _) = (
            led_by(first, layer(name, which, f, noise), tensors) for which in (impl, "reference")
        )
        compare(run, reference, inputs, second_grads, f"of input {first}", nudged=True)


def test_gain_without_filter(impl, device):
    """Zero insertion by 3 leaves a 3x3 kernel no padding, and no filter to hold the gain of 9."""
    inputs = [randn(1, 2, 3, 4), randn(2, 2, 3, 3, seed=1), randn(2, seed=2)]
    inputs = [t.float().to(device) for t in inputs]
    compare(
        lambda x, w, b: conv2d_layer(x, w, b, up=3, padding=1, impl=impl),
        lambda x, w, b: 9 * F.conv2d(spread(x), w) + b[:, None, None],
        inputs,
    )


@pytest.mark.parametrize("f", [None, F4], ids=["none", "f4"])
@pytest.mark.parametrize(("up", "padding"), [(1, 1), (2, 1), (2, [1, 2, 0, 1]), (3, 0), (3, 1)])
def test_nothing_behind_the_convolution(impl, device, up, padding, f):
    x, w, s = (randn(*shape).float().to(device) for shape in ((2, 3, 6, 6), (4, 3, 3, 3), (2, 3)))
    f = None if f is None else f.to(device)
    expected = conv2d_resample(x, w, f, up, 1, padding, impl="reference")
    y = conv2d_layer(x, w, None, f, up, padding=padding, impl=impl)
    torch.testing.assert_close(y, expected)
    y = synthesis_layer(
        x, w, torch.ones_like(s), None, up=up, padding=padding, resample_filter=f,
        demodulate=False, act="linear", impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(y, expected)


def test_implementation_is_checked_where_nothing_follows():
    x, w = torch.zeros(1, 3, 6, 6), torch.zeros(4, 3, 3, 3)
    with pytest.raises(ValueError, match="impl must be None or one of"):
        conv2d_layer(x, w, impl="nonsense")
    with pytest.raises(RuntimeError, match="cannot run"):
        conv2d_layer(x, w, impl="cuda")


def spread(x):
    """Each pixel in the middle of 3x3, and a margin of 1."""
    n, c, h, w = x.shape
    z = x.new_zeros(n, c, h * 3 + 2, w * 3 + 2)
    z[:, :, 2::3, 2::3] = x
    return z


@pytest.mark.parametrize("up", [1, 2])
def test_layers_are_deterministic(impl, device, up):
    n, i, o = (1, 2, 2) if interpreted(impl, device) else (2, 8, 4)
    tensors = [randn(n, i, 17, 9), randn(o, i, 3, 3, seed=1), randn(o, seed=2), randn(n, i, seed=3)]
    x, w, b, styles = (t.float().to(device) for t in tensors)
    f = F4.to(device)

    def generator(x, w, b, styles):
        return synthesis_layer(x, w, styles, b, up=up, resample_filter=f, impl=impl)

    def discriminator(x, w, b):
        return conv2d_layer(x, w, b, f, down=up, padding=1, impl=impl)

    for layer, inputs in ((generator, [x, w, b, styles]), (discriminator, [x, w, b])):
        pairs = zip(outputs_and_grads(layer, inputs), outputs_and_grads(layer, inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# What an epilogue of x [2, 3, 4, 4] to the same size refuses, under the name that was called.
FILTER = "must be None or a tensor of shape (taps,) or (taps_y, taps_x), got"
ACT = "act must be one of linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish, got"
META = torch.zeros(3, device="meta")
TAIL = [
    ({"b": torch.zeros(3).half()}, TypeError, "b must be torch.float32, got torch.float16"),
    ({"b": torch.zeros(3).int()}, TypeError,
     "b must be float32, float16, bfloat16 or float64, got torch.int32"),
    ({"b": torch.zeros(4)}, ValueError, "b must have shape (3,), got (4,)"),
    ({"b": META}, ValueError, "b must be on x's device {device}, got meta"),
    ({"b": [0.0] * 3}, TypeError, "b must be a tensor, got list"),
    ({"noise": 1.0}, TypeError, "noise must be a tensor, got float"),
    ({"noise": torch.zeros(4, 4).half()}, TypeError,
     "noise must be torch.float32, got torch.float16"),
    ({"noise": torch.zeros(2, 2, 4, 4)}, ValueError,
     "noise must have shape (2, 1, 4, 4) or (1, 1, 4, 4) or (4, 4), got (2, 2, 4, 4)"),
    ({"noise": torch.zeros(4, 3)}, ValueError,
     "noise must have shape (2, 1, 4, 4) or (1, 1, 4, 4) or (4, 4), got (4, 3)"),
    ({"noise": META.expand(4, 4, 3)[..., 0]}, ValueError,
     "noise must be on x's device {device}, got meta"),
    ({"noise_strength": 0.5}, TypeError, "noise_strength must be a tensor, got float"),
    ({"noise_strength": torch.zeros(3).double()}, TypeError,
     "noise_strength must be torch.float32, got torch.float64"),
    ({"noise_strength": torch.zeros(2)}, ValueError,
     "noise_strength must have shape () or (1,) or (3,), got (2,)"),
    ({"noise_strength": META}, ValueError,
     "noise_strength must be on x's device {device}, got meta"),
    ({"act": "gelu"}, ValueError, f"{ACT} 'gelu'"),
    ({"act": ["relu"]}, TypeError, f"{ACT} ['relu']"),
    ({"alpha": "a"}, TypeError, "alpha must be a number or None, got str"),
    ({"gain": torch.ones(1)}, TypeError, "gain must be a number or None, got Tensor"),
    ({"gain": float("nan")}, ValueError, "gain must be a number or None, got nan"),
    ({"clamp": "a"}, TypeError, "clamp must be a number or None, got str"),
    ({"clamp": -1}, ValueError, "clamp must be None or at least 0, got -1"),
    ({"clamp": float("nan")}, ValueError, "clamp must be None or at least 0, got nan"),
]  # fmt: skip
OUTPUT = "padding must leave an output of at least 1x1 for x (2, 3, 4, 4), 3x3 taps, "
CONVOLUTION = [
    ({"x": torch.zeros(2, 3, 4)}, ValueError, "x must be (N, I, H, W), got shape (2, 3, 4)"),
    ({"up": 0}, ValueError, "up must be an int of at least 1, got 0"),
    ({"up": 2.0}, TypeError, "up must be an int of at least 1, got 2.0"),
    ({"padding": "same"}, TypeError, "padding must be an int, 2 or 4 ints, got 'same'"),
    ({"padding": -1}, ValueError, f"{OUTPUT}up = 1 and down = 1, got (-1, -1, -1, -1)"),
    ({"padding": -4, "up": 2}, ValueError, f"{OUTPUT}up = 2 and down = 1, got (-4, -4, -4, -4)"),
    ({"flip_weight": "no"}, TypeError, "flip_weight must be True or False, got 'no'"),
]  # fmt: skip


def raises(layer, args, impl, device, error, text):
    args = {k: v.to(device) if torch.is_tensor(v) and not v.is_meta else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        layer(**args, impl=impl)
    text = text.format(device=torch.empty(0, device=device).device)
    assert str(caught.value) == f"{layer.__name__}: {text}"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *TAIL,
        *CONVOLUTION,
        ({"styles": torch.ones(2, 4)}, ValueError,
         "styles must be (N, I) = (2, 3), got shape (2, 4)"),
        ({"styles": torch.ones(2, 3, device="meta"), "demodulate": False}, ValueError,
         "styles must be on {device} like x, got meta"),
        ({"weight": torch.zeros(3, 5, 3, 3)}, ValueError,
         "weight must be (O, I / groups, kh, kw) for I = 3 and groups = 1, got shape (3, 5, 3, 3)"),
        ({"weight": torch.zeros(3, 3, 3, 3, device="meta")}, ValueError,
         "weight must be on {device} like x, got meta"),
        ({"resample_filter": [1.0, 3.0]}, TypeError, f"resample_filter {FILTER} list"),
        ({"resample_filter": F4[None]}, ValueError, f"resample_filter {FILTER} shape (1, 4, 4)"),
        ({"resample_filter": F4.double(), "up": 2}, TypeError,
         "resample_filter must be float32, got torch.float64"),
        ({"resample_filter": META}, ValueError,
         "resample_filter must be on the device of x, {device}, got meta"),
        ({"demodulate": 2}, TypeError, "demodulate must be True or False, got 2"),
    ],
)  # fmt: skip
def test_synthesis_layer_errors(impl, device, change, error, text):
    args = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(3, 3, 3, 3), "padding": 1}
    args |= {"styles": torch.ones(2, 3)} | change
    raises(synthesis_layer, args, impl, device, error, text)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *TAIL,
        *CONVOLUTION,
        ({"w": torch.zeros(3, 5, 3, 3)}, ValueError,
         "w must be (O, I / groups, kh, kw) for I = 3 and groups = 1, got shape (3, 5, 3, 3)"),
        ({"w": torch.zeros(3, 3, 3, 3, device="meta")}, ValueError,
         "w must be on {device} like x, got meta"),
        ({"groups": 2}, ValueError,
         "w must be (O, I / groups, kh, kw) for I = 3 and groups = 2, got shape (3, 3, 3, 3)"),
        ({"down": 0}, ValueError, "down must be an int of at least 1, got 0"),
        ({"f": [1.0, 3.0]}, TypeError, f"f {FILTER} list"),
        ({"f": F4.double(), "down": 2}, TypeError, "f must be float32, got torch.float64"),
        ({"f": META}, ValueError, "f must be on the device of x, {device}, got meta"),
    ],
)  # fmt: skip
def test_conv2d_layer_errors(impl, device, change, error, text):
    args = {"x": torch.zeros(2, 3, 4, 4), "w": torch.zeros(3, 3, 3, 3), "padding": 1} | change
    raises(conv2d_layer, args, impl, device, error, text)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_conv2d_layer(impl, device, up, down):
    inputs = [randn(2, 8, 6, 8), randn(4, 8, 3, 3, seed=1), randn(4, seed=2)]
    inputs = [t.float().to(device) for t in inputs]

    def at(which):
        return lambda x, w, b: conv2d_layer(x, w, b, F4.to(x.device), up, down, 1, act="lrelu",
                                            flip_weight=up == 1, impl=which)  # fmt: skip

    compare(at(impl), at("reference"), inputs)


def test_compile():
    shape, f, padding = SHAPES["up_layer"]
    x, d, z, s, b = make_inputs(shape, f, padding, torch.float32)
    run = runner(None, f, padding)
    leaves = [t.requires_grad_() for t in (x, d, s, b)]

    def loss(x, d, s, b):
        return run(x, d, z, s, b).square().sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *TAIL,
        ({"x": 1}, TypeError, "x must be a tensor, got int"),
        ({"x": torch.zeros(2, 3)}, ValueError, "x must be [N, C, H, W], got shape (2, 3)"),
        ({"x": torch.zeros(2, 3, 4, 4).int()}, TypeError,
         "x must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"f": [1.0, 3.0]}, TypeError, f"f {FILTER} list"),
        ({"f": F4[None]}, ValueError, f"f {FILTER} shape (1, 4, 4)"),
        ({"f": F4.double()}, TypeError, "f must be float32, got torch.float64"),
        ({"f": META}, ValueError, "f must be on the device of x, {device}, got meta"),
        ({"d": torch.zeros(3)}, ValueError, "d must have shape (2, 3), got (3,)"),
        ({"d": torch.zeros(2, 3).half()}, TypeError,
         "d must be torch.float32, got torch.float16"),
        ({"d": torch.zeros(2, 3, device="meta")}, ValueError,
         "d must be on x's device {device}, got meta"),
        ({"x": torch.zeros(2, 3, 4, 4).half(), "d": torch.zeros(2, 3).double()}, TypeError,
         "d must be torch.float16 or torch.float32, got torch.float64"),
        ({"padding": -3}, ValueError,
         "padding must leave an output of at least 1x1 for x (2, 3, 4, 4) and 1x1 taps, "
         "got (-3, -3, -3, -3)"),
        ({"padding": 0, "f": torch.ones(5)}, ValueError,
         "padding must leave an output of at least 1x1 for x (2, 3, 4, 4) and 5x5 taps, "
         "got (0, 0, 0, 0)"),
        ({"padding": [1]}, ValueError, "padding must be an int, 2 or 4 ints, got 1 values (1,)"),
        ({"padding": 0.5}, TypeError, "padding must be an int, 2 or 4 ints, got 0.5"),
        ({"flip_filter": "no"}, TypeError, "flip_filter must be True or False, got 'no'"),
        ({"filter_gain": None}, TypeError, "filter_gain must be a number, got NoneType"),
        ({"filter_gain": float("nan")}, ValueError, "filter_gain must be a number, got nan"),
    ],
)  # fmt: skip
def test_errors(impl, device, change, error, text):
    raises(synthesis_epilogue, {"x": torch.zeros(2, 3, 4, 4)} | change, impl, device, error, text)


@pytest.mark.parametrize("layer", [synthesis_epilogue, synthesis_layer, conv2d_layer])
def test_too_many_taps(impl, device, layer):
    x, w, f = torch.ones(1, 1, 40, 40), torch.ones(1, 1, 3, 3), torch.ones(33)
    args = {
        synthesis_epilogue: {"f": f},
        synthesis_layer: {"weight": w, "styles": torch.ones(1, 1), "up": 2, "resample_filter": f},
        conv2d_layer: {"w": w, "down": 2, "f": f},
    }[layer]
    args = {k: v.to(device) if torch.is_tensor(v) else v for k, v in (args | {"x": x}).items()}
    expected = layer(**args, impl="reference")
    torch.testing.assert_close(layer(**args), expected, rtol=1e-4, atol=1e-4)
    if impl in ("reference", "cpu"):
        torch.testing.assert_close(layer(**args, impl=impl), expected, rtol=1e-4, atol=1e-4)
        return
    name = "resample_filter" if layer is synthesis_layer else "f"
    text = f"{name} must have at most 32 taps a side for impl='{impl}', got shape (33,)"
    raises(layer, args, impl, device, ValueError, text)
