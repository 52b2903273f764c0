"""modulated_gemm: its Triton kernel, dtypes, shapes and layouts, gradients of three orders."""

from __future__ import annotations

import importlib

import harness
import pytest
import torch
from harness import DTYPES, compare, lay_out, outputs_and_grads, randn, second_grads
from hypothesis import given
from hypothesis import strategies as st
from test_modulated_conv2d import materialised
from test_triton_aot import KERNELS

from gankern.ops import _impl, modulated_gemm, synthesis_layer
from gankern.ops.modulated_conv2d import no_weight_gradients

pytestmark = pytest.mark.skipif(_impl.triton is None, reason="triton is not installed")

# samples, input and output channels, height, width, taps
SHAPES = {
    "odd": (2, 5, 7, 5, 5, 3),
    "many_inputs": (1, 70, 4, 4, 4, 3),
    "1x1": (2, 20, 6, 4, 4, 1),
    "one_pixel": (2, 4, 5, 1, 1, 3),
    "row": (1, 3, 5, 1, 19, 3),
    "5x5": (1, 2, 3, 3, 2, 5),
    "wide": (1, 3, 5, 10, 13, 3),
    "groups_of_blocks": (9, 3, 65, 2, 2, 1),
    "empty": (0, 4, 3, 5, 5, 3),
}
LARGE = {"large": (3, 70, 130, 33, 31, 3), "large_1x1": (2, 130, 3, 64, 64, 1)}  # for a GPU
SMALL = (1, 3, 4, 3, 4, 3)


def make_inputs(shape, device, dtype=torch.float32, layout="channels_last", per_channel=False):
    """x, weight, styles, b, strength, and noise."""
    n, i, o, h, w, k = shape
    small = dtype if dtype == torch.float64 else torch.float32
    x = lay_out(randn(n, i, h, w).to(device, dtype), layout)
    rest = [randn(o, i, k, k, seed=1), randn(n, i, seed=2), randn(o, seed=3),
            randn(o if per_channel else 1, seed=4), randn(n, 1, h, w, seed=5)]  # fmt: skip
    *rest, noise = [t.to(device, small) for t in rest]
    return [x, *rest], noise


def at(impl, noise=None, **options):
    """A function of x, weight, styles and, if there are any, b and strength."""

    def run(x, weight, styles, b=None, strength=None):
        z = noise
        if z is not None:
            z = z.to(x.device, torch.float64 if x.dtype == torch.float64 else z.dtype)
        return modulated_gemm(x, weight, styles, b, z, strength, impl=impl, **options)

    return run


def pair(*args, **options):
    return at("triton", *args, **options), at("reference", *args, **options)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", [*SHAPES, *LARGE])
def test_forward_and_gradients(device, name, dtype):
    fewer = name in LARGE or (dtype != "f32" and name not in ("many_inputs", "1x1"))
    if device == "cpu" and fewer:
        pytest.skip("the interpreter is slow; dtypes are tested on many_inputs and 1x1")
    inputs, noise = make_inputs((SHAPES | LARGE)[name], device, DTYPES[dtype])
    # Of demod_coefs, the interpreter runs a program for each output channel.
    options = {"clamp": 2.5, "demodulate": name != "groups_of_blocks"}
    y, *_ = compare(*pair(noise, **options), inputs, what=name, nudged=True)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("first", [0, 1, 2], ids=["x", "weight", "styles"])
def test_second_gradients(device, first):
    inputs, noise = make_inputs(SMALL, device)
    (f, order), (reference, _) = (harness.led_by(first, g, inputs) for g in pair(noise))
    compare(f, reference, order, second_grads, nudged=True)


def test_third_order(device):
    def third(impl, dtype):
        inputs, noise = make_inputs((1, 2, 2, 2, 3, 3), device, dtype)
        leaves = [t.requires_grad_() for t in inputs]
        y = at(impl, noise, act="swish")(*leaves)
        for _ in range(2):
            (y,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum(), leaves[:3])])

    exact = third("reference", torch.float64)
    assert harness.relative_error(third("triton", torch.float32), exact) < 1e-4


@pytest.mark.parametrize("noise_of", ["sample", "shared"])
def test_gradient_in_the_noise(device, noise_of):
    shape = (2, 3, 4, 2, 3, 1)
    (x, weight, styles, b, strength), noise = make_inputs(shape, device, per_channel=True)
    noise = noise if noise_of == "sample" else noise[0, 0]

    def of_noise(impl):
        return lambda x, z, b, s: modulated_gemm(
            x, weight.to(x.dtype), styles.to(x.dtype), b, z, s, impl=impl
        )

    compare(of_noise("triton"), of_noise("reference"), [x, noise, b, strength])


@pytest.mark.parametrize("present", ["", "b", "noise", "noise strength", "shared noise strengths"])
@pytest.mark.parametrize("demodulate", [True, False])
def test_optional_operands(device, present, demodulate):
    inputs, noise = make_inputs((2, 3, 4, 2, 3, 1), device, per_channel="strengths" in present)
    x, weight, styles, b, strength = inputs
    noise = noise[0, 0] if "shared" in present else noise if "noise" in present else None
    inputs = [x, weight, styles, b if present == "b" else None,
              strength if "strength" in present else None]  # fmt: skip
    compare(*pair(noise, demodulate=demodulate), inputs, nudged=True)


@pytest.mark.parametrize("act", ["linear", "relu", "lrelu", "tanh", "swish"])
def test_activations(device, act):
    inputs, noise = make_inputs((2, 3, 4, 2, 3, 1), device)
    compare(*pair(noise, act=act, alpha=0.3, gain=1.2), inputs, nudged=True)


@pytest.mark.parametrize("layout", harness.LAYOUTS)
def test_layouts(device, layout):
    inputs, noise = make_inputs(SMALL, device, layout=layout)
    inputs[1:3] = [lay_out(t, layout) for t in inputs[1:3]]
    y = at("triton", noise)(*inputs)
    inputs, noise = make_inputs(SMALL, device)
    assert torch.equal(y, at("triton", noise)(*inputs))


def test_range_of_float16(device):
    """Sums of products of 1e3 and 1e3 would overflow; demodulation makes them of size one."""
    (x, weight, styles, b, _), _ = make_inputs(SHAPES["1x1"], device, torch.float16)
    compare(*pair(), [x, 1e3 * weight, 1e3 * styles, b], harness.output)


def test_opcheck(device):
    (x, weight, styles, b, strength), noise = make_inputs((1, 3, 4, 2, 3, 1), device)
    d = torch.rand(1, 4, device=device)
    numbers = (2, 0.2, 1.4, -1.0)
    args = (x, weight, styles, d, noise[:, 0], strength, b, *numbers)
    for arguments in (args, (x, weight, styles, None, None, None, None, *numbers)):
        harness.opcheck(_impl.op("triton", "modulated_gemm"), arguments)


def test_samples_do_not_mix(device):
    (x, weight, styles, b, _), _ = make_inputs((2, 3, 4, 3, 5, 3), device)
    f = at("triton")
    alone = f(x[1:], weight, styles[1:], b)
    x[0], styles[0] = float("nan"), float("nan")
    y = f(x, weight, styles, b)
    assert y[0].isnan().all()
    assert torch.equal(y[1:], alone)


def test_weight_gradients_off(device):
    (x, weight, styles, *_), _ = make_inputs(SMALL, device)
    leaves = [t.requires_grad_() for t in (x, weight, styles)]
    y = at("triton")(*leaves)
    expected = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with no_weight_gradients():
        dx, dw, ds = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
    assert dw is None
    assert torch.equal(dx, expected[0])
    assert torch.equal(ds, expected[2])
    y = at("triton")(x.detach(), weight.detach(), styles)
    assert torch.equal(torch.autograd.grad(y.sum(), styles)[0], ds)


@pytest.mark.parametrize("other", [None, "reference"])
def test_nothing_takes_the_kernel_unnamed(device, other, monkeypatch):
    monkeypatch.delattr(importlib.import_module("gankern.ops.modulated_gemm"), "_fwd")
    (x, weight, styles, b, strength), noise = make_inputs(SMALL, device)
    args = (x, weight, styles, b, noise, strength)
    layer = synthesis_layer(*args, clamp=2, impl=other)
    assert torch.equal(modulated_gemm(*args, clamp=2, impl=other), layer)


ACTS = {
    "linear": lambda v: v,
    "relu": lambda v: 2**0.5 * v.clamp(min=0),
    "lrelu": lambda v: 2**0.5 * torch.where(v < 0, 0.2 * v, v),
    "swish": lambda v: 2**0.5 * v * v.sigmoid(),
}


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(["f32", "f16", "f32", "bf16"]))
    sides = st.integers(1, 6)
    # Demodulation cancels the style of a single input channel, and leaves it a rounded zero.
    channels = draw(st.integers(2, 9)), draw(st.integers(1, 9))
    shape = (draw(st.integers(1, 2)), *channels, draw(sides), draw(sides))
    return {
        "shape": (*shape, draw(st.sampled_from([1, 3, 3, 5]))),
        "dtype": dtype,
        "layouts": draw(st.tuples(*[st.sampled_from(["contiguous", "channels_last"])] * 2)),
        "noise": draw(st.sampled_from(["none", "sample", "shared"])),
        "per_channel": draw(st.booleans()),
        "b": draw(st.booleans()),
        "options": {
            "demodulate": draw(st.booleans()),
            "act": draw(st.sampled_from(list(ACTS))),
            # A 16-bit rounding at a clamp that bites decides whether a gradient is zero.
            "clamp": draw(st.sampled_from([None, 1.0 if dtype == "f32" else 1e4])),
        },
        "gradients": draw(st.integers(0, 2)) == 0,
    }


def test_random_arguments(impl, device):
    """The reference against the definition, in float64; the kernel, in a third with gradients."""
    if impl not in ("reference", "triton"):
        pytest.skip("there is one kernel, Triton's; the others are synthesis_layer")

    @harness.examples(impl)
    @given(cases())
    def run(c):
        dtype = torch.float64 if impl == "reference" else DTYPES[c["dtype"]]
        inputs, noise = make_inputs(c["shape"], device, dtype, per_channel=c["per_channel"])
        inputs[:2] = [lay_out(t, layout) for t, layout in zip(inputs, c["layouts"], strict=False)]
        inputs[3] = inputs[3] if c["b"] else None
        noise = {"none": None, "sample": noise, "shared": noise[0, 0]}[c["noise"]]
        inputs[4] = inputs[4] if noise is not None else None
        if impl == "reference":
            exact = defined(*inputs, noise, c["options"])
            y = at(impl, noise, **c["options"])(*inputs)
            assert harness.max_error(y, exact) <= 1e-9 * max(1.0, exact.abs().max().item())
            return
        order = outputs_and_grads if c["gradients"] else harness.output
        compare(*pair(noise, **c["options"]), inputs, order, what=str(c), nudged=True)

    run()


def defined(x, weight, styles, b, strength, noise, options):
    k = weight.shape[2] // 2
    y = materialised(x, weight, styles, None, 1, 1, k, options["demodulate"], True)
    y = y if noise is None else y + noise * strength.reshape(-1, 1, 1)
    y = ACTS[options["act"]](y if b is None else y + b[:, None, None])
    return y if options["clamp"] is None else y.clamp(-options["clamp"], options["clamp"])


def test_blocks_are_those_compiled_ahead_of_time():
    from gankern.ops.modulated_gemm import _blocks

    def tile(row):
        return tuple(row[k] for k in ("BLOCK_M", "BLOCK_N", "GROUP", "num_warps", "num_stages"))

    for dtype, width in (("fp32", 4), ("fp16", 2)):
        rows = [r for r in KERNELS["modulated_gemm_kernel"] if dtype in r["DTYPES"]]
        compiled = {tile(row) for row in rows}
        largest = max(row["BLOCK_K"] for row in rows)
        for batch in (1, 4, 8, 32):
            for side in (1, 4, 8, 16, 64, 256, 1024):
                for outs in (1, 3, 32, 64, 512):
                    found = _blocks(batch, side * side, outs, outs, width)
                    assert tile(found) in compiled
                    assert found["BLOCK_K"] <= largest


def test_deterministic(device):
    inputs, noise = make_inputs(SMALL, device)
    f = at("triton", noise)
    for a, b in zip(outputs_and_grads(f, inputs), outputs_and_grads(f, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError,
         "modulated_gemm: x must be (N, I, H, W), got shape (2, 3, 4)"),
        ({"weight": torch.zeros(5, 3, 2, 2)}, ValueError,
         "modulated_gemm: weight must be (O, I, k, k) with k odd, got (5, 3, 2, 2)"),
        ({"weight": torch.zeros(5, 3, 1, 3)}, ValueError,
         "modulated_gemm: weight must be (O, I, k, k) with k odd, got (5, 3, 1, 3)"),
        ({"styles": torch.ones(2, 4)}, ValueError,
         "modulated_gemm: styles must be (N, I) = (2, 3), got shape (2, 4)"),
        ({"styles": torch.ones(2, 3, device="meta"), "demodulate": False}, ValueError,
         "modulated_gemm: styles must be on {device} like x, got meta"),
        ({"weight": [1.0]}, TypeError,
         "modulated_gemm: weight must be a floating-point tensor, got list"),
        ({"b": torch.zeros(3)}, ValueError, "modulated_gemm: b must have shape (5,), got (3,)"),
        ({"noise": torch.zeros(3, 3)}, ValueError,
         "modulated_gemm: noise must have shape (2, 1, 4, 4) or (1, 1, 4, 4) or (4, 4), "
         "got (3, 3)"),
        ({"noise": 1.0}, TypeError, "modulated_gemm: noise must be a tensor, got float"),
        ({"noise_strength": torch.zeros(2)}, ValueError,
         "modulated_gemm: noise_strength must have shape () or (1,) or (5,), got (2,)"),
        ({"act": "gelu"}, ValueError,
         "modulated_gemm: act must be one of linear, relu, lrelu, tanh, sigmoid, elu, selu, "
         "softplus, swish, got 'gelu'"),
        ({"gain": "a"}, TypeError, "modulated_gemm: gain must be a number or None, got str"),
        ({"clamp": -1}, ValueError, "modulated_gemm: clamp must be None or at least 0, got -1"),
        ({"demodulate": None}, TypeError,
         "modulated_gemm: demodulate must be True or False, got None"),
    ],
)  # fmt: skip
def test_errors(impl, device, change, error, text):
    args = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(5, 3, 3, 3)}
    args |= {"styles": torch.ones(2, 3), "impl": impl} | change
    args = {k: v.to(device) if torch.is_tensor(v) and not v.is_meta else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        modulated_gemm(**args)
    assert str(caught.value) == text.format(device=torch.empty(0, device=device).device)


def test_float64_is_refused(device):
    shapes = ((2, 3, 4, 4), (5, 3, 3, 3), (2, 3))
    x, weight, styles = (torch.ones(s, device=device).double() for s in shapes)
    with pytest.raises(RuntimeError) as caught:
        modulated_gemm(x, weight, styles, impl="triton")
    assert str(caught.value) == (
        "modulated_gemm: impl='triton' cannot run: Triton kernels compute in float32, got float64: "
        "use impl=None"
    )


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(_impl, "triton_interpreted", lambda: False)
    (x, weight, styles, *_), _ = make_inputs(SMALL, "cpu")
    with pytest.raises(RuntimeError) as caught:
        modulated_gemm(x, weight, styles, impl="triton")
    assert str(caught.value) == (
        "modulated_gemm: impl='triton' cannot run: Triton kernels need CUDA tensors, got cpu: "
        "use impl=None or 'cpu'"
    )
