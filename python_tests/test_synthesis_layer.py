"""synthesis_epilogue and synthesis_layer: every implementation, dtype and layout, all orders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DTYPES,
    compare,
    examples,
    gpu_of,
    interpreted,
    lay_out,
    output,
    outputs_and_grads,
    randn,
    skip_float64_triton,
)
from hypothesis import given
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
    """Planes that are cut across or down, or share a block; rows that begin anywhere in memory."""
    if impl not in ("simt", "cuda"):
        pytest.skip("for the strips of the CUDA kernels")
    n, c, h, w = shape
    for offset, f in ((0, F4), (1, LOPSIDED), (3, F4)):
        memory = randn(n * c * h * w + offset, seed=offset).to(dtype)
        _, d, z, s, b = make_inputs(shape, f, (1, 2), dtype)
        x, d, z, s, b = (t.to(device) for t in (memory[offset:].view(shape), d, z, s, b))
        with gpu_of(1, impl):
            compare(
                lambda x, d, s, b, f=f, z=z: runner(impl, f, (1, 2))(x, d, z, s, b),
                lambda x, d, s, b, f=f, z=z: runner("reference", f, (1, 2))(x, d, z, s, b),
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


@pytest.mark.parametrize("name", ["up_layer", "no_filter"])
def test_opcheck(name):
    if _impl.LIBRARIES["cpu"]:
        pytest.skip(_impl.LIBRARIES["cpu"])
    shape, f, _ = SHAPES[name]
    x, d, z, s, b = make_inputs(shape, f, 1 if f is not None else 0, torch.float32)
    pads = (1, 1, 1, 1) if f is not None else (0, 0, 0, 0)
    args = (f, d, z[:, 0], s, b, *pads, False, 4.0, 2, 0.2, 1.4, -1.0)
    torch.library.opcheck(_impl.op("cpu", "synthesis_epilogue"), (x, *args))
    y = _impl.op("cpu", "synthesis_epilogue")(x, *args)
    torch.library.opcheck(_impl.op("cpu", "synthesis_epilogue_bwd"), (y, x, *args))
    second = _impl.op("cpu", "synthesis_epilogue_bwd2")
    for vd in (None, torch.ones_like(d)):
        cotangents = (torch.ones_like(x), vd, None, torch.ones_like(b))
        torch.library.opcheck(second, (y, x, *args[:5], *cotangents, *args[5:]))


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


FILTERS = st.tuples(st.integers(0, 5), st.integers(1, 5))  # taps; none for 0 and 1
ACTIVATIONS = st.sampled_from(["linear", "lrelu", "lrelu", "tanh", "swish"])


def drawn_filter(taps):
    return None if taps[0] == 0 else randn(*taps, seed=7).float()


@st.composite
def epilogue_cases(draw):
    dtype = draw(st.sampled_from(["f32", "f32", "f16", "bf16"]))
    # A 16-bit rounding at a clamp that bites decides whether a gradient is zero: float32 only.
    clamps = [None, 0.7] if dtype == "f32" else [None, 1e4]
    return {
        "size": (
            *draw(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12))),
            draw(st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 40])),
        ),
        "taps": draw(FILTERS),
        "padding": draw(st.tuples(*[st.integers(-1, 4)] * 4)),
        "layout": draw(st.sampled_from(["contiguous", "channels_last"])),
        "dtype": dtype,
        "operands": draw(st.sampled_from(["", "d", "zs", "dzsb", "db"])),
        "options": {
            "act": draw(ACTIVATIONS),
            "clamp": draw(st.sampled_from(clamps)),
            "flip_filter": draw(st.booleans()),
            "filter_gain": 1.5,
        },
    }


def test_random_arguments(impl, device):
    @examples(impl)
    @given(epilogue_cases())
    def run(c):
        taps, padding, dtype = c["taps"], c["padding"], DTYPES[c["dtype"]]
        n, channels, *pixels = c["size"]
        if interpreted(impl, device):
            n, channels, taps = 1, min(channels, 2), (min(taps[0], 4), min(taps[1], 3))
        f = drawn_filter(taps)
        size = (n, channels, *pixels)
        try:
            x, *rest = make_inputs(size, f, padding, dtype, c["layout"])
        except ValueError:  # nothing is left to filter
            return
        operands = {k: t.to(device) for k, t in zip("dzsb", rest, strict=True)}
        operands = {k: t for k, t in operands.items() if k in c["operands"]}
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
        roundings = 40 if magnified else 4
        compare(at(impl), at("reference"), tensors, case=f"{size} {taps} {c}", roundings=roundings)

    run()


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
            return
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


@pytest.mark.parametrize(
    ("layer", "change", "error", "text"),
    [
        (synthesis_layer, {"styles": torch.ones(2, 3)}, ValueError,
         "synthesis_layer: styles must be (N, I) = (1, 2), got shape (2, 3)"),
        (synthesis_layer, {"up": 0}, ValueError,
         "synthesis_layer: up must be an int of at least 1, got 0"),
        (synthesis_layer, {"act": "gelu"}, ValueError,
         "synthesis_epilogue: act must be one of linear, relu, lrelu, tanh, sigmoid, elu, selu, "
         "softplus, swish, got 'gelu'"),
        (conv2d_layer, {"w": torch.zeros(3, 5, 3, 3)}, ValueError,
         "conv2d_layer: w must be (O, I / groups, kh, kw) for I = 2 and groups = 1, "
         "got shape (3, 5, 3, 3)"),
        (conv2d_layer, {"padding": "same"}, ValueError,
         "conv2d_layer: padding must be an int, 2 or 4 ints, got same"),
    ],
)  # fmt: skip
def test_layer_errors(impl, device, layer, change, error, text):
    weight = torch.zeros(3, 2, 3, 3)
    args = {"x": torch.zeros(1, 2, 4, 4), "padding": 1}
    args |= {"weight": weight, "styles": torch.ones(1, 2)} if layer is synthesis_layer else {}
    args = ({"w": weight} if layer is conv2d_layer else {}) | args | change
    args = {k: v.to(device) if torch.is_tensor(v) else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        layer(**args, impl=impl)
    assert str(caught.value) == text


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
        ({"x": torch.zeros(2, 3)}, ValueError,
         "synthesis_epilogue: x must be [N, C, H, W], got shape (2, 3)"),
        ({"x": torch.zeros(2, 3, 4, 4).int()}, TypeError,
         "synthesis_epilogue: x must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"f": torch.zeros(4, 4).double()}, TypeError,
         "synthesis_epilogue: f must be a float32 tensor or None, got torch.float64"),
        ({"d": torch.zeros(3)}, ValueError,
         "synthesis_epilogue: d must have shape (2, 3), got (3,)"),
        ({"noise": torch.zeros(2, 2, 4, 4)}, ValueError,
         "synthesis_epilogue: noise must have shape (2, 1, 4, 4) or (1, 1, 4, 4) or (4, 4), "
         "got (2, 2, 4, 4)"),
        ({"b": torch.zeros(3).half()}, TypeError,
         "synthesis_epilogue: b must be torch.float32, got torch.float16"),
        ({"padding": -3}, ValueError,
         "synthesis_epilogue: padding must leave an output of at least 1x1 for x (2, 3, 4, 4) and "
         "1x1 taps, got (-3, -3, -3, -3)"),
        ({"act": "gelu"}, ValueError,
         "synthesis_epilogue: act must be one of linear, relu, lrelu, tanh, sigmoid, elu, selu, "
         "softplus, swish, got 'gelu'"),
        ({"clamp": -1}, ValueError, "synthesis_epilogue: clamp must be None or at least 0, got -1"),
    ],
)  # fmt: skip
def test_errors(impl, device, change, error, text):
    args = {"x": torch.zeros(2, 3, 4, 4), "impl": impl} | change
    args = {k: v.to(device) if torch.is_tensor(v) else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        synthesis_epilogue(**args)
    assert str(caught.value) == text
