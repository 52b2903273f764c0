from __future__ import annotations

import functools

import harness
import pytest
import torch
from harness import DTYPES, compare, outputs_and_grads, second_grads
from hypothesis import given
from hypothesis import strategies as st

from gankern.ops import _impl, adain

SHAPES = {
    "empty": (0, 3, 4, 4),
    "no_pixels": (2, 3, 0, 4),
    "sequence": (3, 5, 33),
    "odd": (2, 7, 5, 3),
    "planes": (2, 16, 16, 16),
    "large": (1, 4, 63, 65),
    "tall": (1, 3, 64, 80),
    "small_planes": (2, 48, 4, 4),
    "volume": (1, 4, 3, 5, 6),
}
# Planes, or channels-last columns side by side, that one block of a GPU cannot keep.
SHARED = {
    "rows": ((1, 2, 320, 304), "contiguous", "f32"),
    "columns": ((1, 20, 112, 120), "channels_last", "f32"),
    "half_rows": ((1, 1, 512, 400), "contiguous", "f16"),
    "half_columns": ((2, 24, 96, 100), "channels_last", "f16"),
    "half_lines": ((1, 64, 96, 100), "channels_last", "f16"),
}


def inputs(shape, device, dtype=torch.float32, layout="contiguous", style=None):
    x = harness.lay_out((harness.randn(*shape) * 2 + 3).to(device, dtype), layout)
    styles = [harness.randn(*shape[:2], seed=s).to(device, style or dtype) for s in (1, 2)]
    return [x, *styles]


def ops(impl, **kwargs):
    f = functools.partial(adain, impl=impl, **kwargs)
    return f, functools.partial(adain, impl="reference", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "no_pixels"])
def test_forward_and_gradients(impl, device, dtype, shape):
    harness.skip_float64_triton(impl, DTYPES[dtype])
    # A GPU's float64 is judged by float64 sums in another order: 4.02 was seen on an H200.
    roundings = 8 if dtype == "f64" and device == "cuda" else 4
    compare(
        *ops(impl), inputs(SHAPES[shape], device, DTYPES[dtype]), what=shape, roundings=roundings
    )


def test_no_pixels(impl, device):
    tensors = [t.requires_grad_() for t in inputs(SHAPES["no_pixels"], device)]
    y = adain(*tensors, impl=impl)
    assert y.shape == SHAPES["no_pixels"]
    for g, t in zip(torch.autograd.grad(y.sum(), tensors), tensors, strict=True):
        assert torch.equal(g, torch.zeros_like(t))


@pytest.mark.parametrize("layout", harness.LAYOUTS)
@pytest.mark.parametrize("shape", ["odd", "planes", "large", "small_planes"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_layouts(impl, device, dtype, shape, layout):
    tensors = inputs(SHAPES[shape], device, DTYPES[dtype], layout)
    y, dx, *_ = compare(*ops(impl), tensors, what=layout)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert dx.is_contiguous(memory_format=torch.channels_last)


def shared_inputs(shape, device):
    size, layout, dtype = SHARED[shape]
    tensors = inputs(size, device, DTYPES[dtype], layout)
    tensors[0][:, :, : size[2] // 16] += 20  # so that the blocks' means differ
    return tensors


@pytest.mark.parametrize("shape", SHARED)
def test_planes_of_several_blocks(impl, device, shape):
    if impl == "reference" or harness.interpreted(impl, device):
        pytest.skip("for sums of many pixels, in compiled kernels")
    compare(*ops(impl), shared_inputs(shape, device), what=shape)
    if impl == "simt":  # too few multiprocessors for a group: x is read twice
        with harness.gpu_of(1, impl):
            compare(*ops(impl), shared_inputs(shape, device), what=shape)


@pytest.mark.parametrize("shape", SHARED)
def test_blocks_that_come_late(impl, device, shape):
    """The last block alone takes the sums of all parts: its own pixels have the same bits."""
    if impl != "simt":
        pytest.skip("only simt can keep blocks from running")
    import simt_build

    simt = simt_build.module()
    x, scale, shift = shared_inputs(shape, device)
    forward = functools.partial(_impl.op(impl, "adain"), x, scale, shift, 1e-5)
    backward = functools.partial(_impl.op(impl, "adain_bwd"), x.flip(2), x, scale)
    statistics = forward()[1:]
    last = (-1, -1, -1, slice(-3, None))
    for run in (forward, functools.partial(backward, *statistics)):
        whole = run()[0]
        simt.reset()
        simt.only_last(1)
        try:
            alone = run()[0]
        finally:
            simt.only_last(0)
        assert simt.counters()["launch_list"][0]["grid"][0] > 1
        assert torch.equal(alone[last], whole[last])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f64"])
def test_float32_styles(impl, device, dtype, layout):
    harness.skip_float64_triton(impl, DTYPES[dtype])
    tensors = inputs(SHAPES["planes"], device, DTYPES[dtype], layout, style=torch.float32)
    _, _, dscale, dshift = compare(*ops(impl), tensors)
    assert dscale.dtype == dshift.dtype == torch.float32


@pytest.mark.parametrize("shape", ["sequence", "odd", "planes"])
def test_second_gradients(impl, device, shape):
    compare(*ops(impl), inputs(SHAPES[shape], device), second_grads, shape)


def test_gradients_of_a_constant_dy(impl, device):
    """A penalty on all first gradients: dshift, which is dy's sum, is no function of the inputs."""
    dy = harness.randn(2, 3, 4, 4, seed=3)

    def lengths(which):
        def f(x, scale):
            leaves = (x, scale, torch.zeros_like(scale, requires_grad=True))
            y = adain(*leaves, impl=which)
            grads = torch.autograd.grad(y, leaves, dy.to(y), create_graph=True)
            return torch.stack([g.square().sum() for g in grads])

        return f

    compare(lengths(impl), lengths("reference"), inputs((2, 3, 4, 4), device)[:2])


def test_gradcheck(impl, device):
    harness.skip_float64_triton(impl, torch.float64)
    tensors = [t.requires_grad_() for t in inputs((2, 2, 2, 3), device, torch.float64)]
    f, _ = ops(impl)
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_third_order(impl, device):
    def third(implementation, dtype):
        x, scale, shift = (t.requires_grad_() for t in inputs((2, 2, 3, 3), device, dtype))
        y = adain(x, scale, shift, impl=implementation).tanh()
        for _ in range(2):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(y.square().sum(), (x, scale))

    exact = third("reference", torch.float64)
    for a, e in zip(third(impl, torch.float32), exact, strict=True):
        assert harness.relative_error(a, e) < 1e-4


def test_opcheck(impl, device):
    if impl == "reference":
        pytest.skip("the reference is not a registered op")
    for layout in ("contiguous", "channels_last", "sliced"):
        x, scale, shift = inputs((2, 3, 4, 4), device, layout=layout)
        _, statistics = _impl.op(impl, "adain")(x, scale, shift, 1e-5)
        harness.opcheck(_impl.op(impl, "adain"), (x, scale, shift, 1e-5))
        args = (x, x, scale, statistics)
        harness.opcheck(_impl.op(impl, "adain_bwd"), args)


def test_style_sets_the_statistics(impl, device):
    x, scale, shift = inputs((3, 4, 15, 17), device)
    var, mean = torch.var_mean(adain(x, scale, shift, eps=0, impl=impl), (2, 3), unbiased=False)
    torch.testing.assert_close(mean, shift, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, scale.square(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_mean(impl, device, layout):
    x, scale, shift = inputs((2, 8, 32, 32), device, layout=layout)
    compare(*ops(impl), [x + 1000, scale, shift])


def test_is_instance_norm(impl, device):
    x, _, _ = inputs(SHAPES["planes"], device)
    ones, zeros = torch.ones(2, 16, device=device), torch.zeros(2, 16, device=device)
    wanted = torch.nn.functional.instance_norm(x)
    torch.testing.assert_close(adain(x, ones, zeros, impl=impl), wanted)


@st.composite
def cases(draw):
    # Of few pixels dx is mostly rounding: the normalised values can hardly change.
    pixels = draw(st.sampled_from([[16], [33], [64], [3, 7], [5, 4], [8, 8], [9, 17], [16, 12]]))
    return {
        "shape": (draw(st.integers(1, 5)), draw(st.integers(1, 20)), *pixels),
        "layout": draw(st.sampled_from(harness.LAYOUTS)),
        "eps": draw(st.sampled_from([1e-5, 1e-2, 0.5])),
        "dtype": draw(st.sampled_from(["f32", "f16", "bf16"])),
        "style_f32": draw(st.booleans()),
    }


def test_random_arguments(impl, device):
    @harness.examples(impl)
    @given(cases())
    def run(c):
        dtype = DTYPES[c["dtype"]]
        style = torch.float32 if c["style_f32"] else dtype
        n, channels, *pixels = c["shape"]
        if harness.interpreted(impl, device):
            n, channels = min(n, 2), min(channels, 3)
        tensors = inputs((n, channels, *pixels), device, dtype, c["layout"], style)
        compare(*ops(impl, eps=c["eps"]), tensors, case=f"{n} {channels} {c}")

    run()


def test_deterministic(impl, device):
    for layout in ("contiguous", "channels_last"):
        tensors = inputs((2, 24, 33, 31), device, layout=layout)
        f, _ = ops(impl)
        first, second = outputs_and_grads(f, tensors), outputs_and_grads(f, tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("isa", [0, 1, 2])
def test_instruction_sets(device, isa):
    if device != "cpu":
        pytest.skip("CPU kernels")
    try:
        _impl.set_cpu_isa(isa)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                compare(*ops("cpu"), inputs((2, 37, 9, 11), device, dtype, layout), what=str(isa))
    finally:
        _impl.set_cpu_isa(-1)


X, S = torch.ones(2, 3, 4, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((1.0, S, S), TypeError, "x must be a tensor, got float"),
        ((X, None, S), TypeError, "scale must be a tensor, got NoneType"),
        ((X, S, [1.0]), TypeError, "shift must be a tensor, got list"),
        ((X.long(), S, S), TypeError,
         "x must be float32, float16, bfloat16 or float64, got torch.int64"),
        ((S, S, S), ValueError, "x must be (N, C, *), got 2 dimensions (2, 3)"),
        ((X, S[0], S), ValueError, "scale must be (N, C) = (2, 3), got (3,)"),
        ((X, S, S.T), ValueError, "shift must be (N, C) = (2, 3), got (3, 2)"),
        ((X, S.half(), S), TypeError, "scale must be torch.float32, got torch.float16"),
        ((X.half(), S.double(), S), TypeError,
         "scale must be torch.float16 or torch.float32, got torch.float64"),
        ((X.half(), S, S.half()), TypeError,
         "shift must be torch.float32 like scale, got torch.float16"),
        ((X, S.to("meta"), S), ValueError, "scale must be on x's device {device}, got meta"),
        ((X, S, S.to("meta")), ValueError, "shift must be on x's device {device}, got meta"),
        ((X, S, S, None), TypeError, "eps must be a number, got NoneType"),
        ((X, S, S, "a"), TypeError, "eps must be a number, got str"),
        ((X, S, S, -1), ValueError, "eps must be at least 0, got -1"),
        ((X, S, S, float("nan")), ValueError, "eps must be at least 0, got nan"),
    ],
)  # fmt: skip
def test_errors(impl, device, args, error, text):
    args = [a.to(device) if torch.is_tensor(a) and not a.is_meta else a for a in args]
    with pytest.raises(error) as caught:
        adain(*args, impl=impl)
    text = text.format(device=torch.empty(0, device=device).device)
    assert str(caught.value) == f"adain: {text}"


def test_compile(impl, device):
    if impl in ("reference", "simt", "triton") and device == "cpu":
        pytest.skip("on the CPU, only the C++ kernels are worth compiling around")
    f, _ = ops(impl)
    compiled = torch.compile(f, fullgraph=True)
    tensors = inputs(SHAPES["planes"], device)
    actual, expected = outputs_and_grads(compiled, tensors), outputs_and_grads(f, tensors)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
