from __future__ import annotations

import functools

import harness
import pytest
import torch
from harness import DTYPES, compare, outputs_and_grads, second_grads
from hypothesis import given
from hypothesis import strategies as st

from gankern.ops import _impl, minibatch_stddev
from gankern.ops.minibatch_stddev import _bwd_reference

# name: (shape, group_size, num_channels)
CASES = {
    "empty": ((0, 4, 3, 3), 4, 1),
    "no_pixels": ((4, 4, 0, 3), 4, 1),
    "one": ((1, 1, 1, 1), 4, 1),
    "pixel": ((8, 6, 1, 1), 4, 2),
    "odd": ((6, 7, 5, 3), 3, 1),
    "uneven": ((7, 6, 3, 5), 4, 2),
    "stylegan": ((8, 64, 4, 4), 4, 1),
    "whole_batch": ((9, 16, 4, 4), None, 1),
    "large_group": ((3, 8, 4, 4), 64, 4),
    "ones": ((3, 8, 4, 4), 1, 1),
    "large": ((5, 12, 31, 33), 2, 3),
    "large_packed": ((5, 4, 32, 36), 2, 2),
    "latent": ((6, 40), 3, 2),
    "volume": ((4, 4, 2, 3, 4), 2, 2),
}


def inputs(shape, device, dtype=torch.float32, layout="contiguous"):
    return [harness.lay_out((harness.randn(*shape) + 1).to(device, dtype), layout)]


def ops(impl, group_size, num_channels):
    args = {"group_size": group_size, "num_channels": num_channels}
    f = functools.partial(minibatch_stddev, impl=impl, **args)
    return f, functools.partial(minibatch_stddev, impl="reference", **args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(impl, device, dtype, case):
    harness.skip_float64_triton(impl, DTYPES[dtype])
    shape, *args = CASES[case]
    x = inputs(shape, device, DTYPES[dtype])
    y = compare(*ops(impl, *args), x, what=case)[0]
    assert torch.equal(y[:, : shape[1]], x[0])


@pytest.mark.parametrize("layout", harness.LAYOUTS)
@pytest.mark.parametrize(
    "case", ["pixel", "odd", "uneven", "stylegan", "large_group", "large", "large_packed"]
)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_layouts(impl, device, dtype, case, layout):
    shape, *args = CASES[case]
    y, dx = compare(*ops(impl, *args), inputs(shape, device, DTYPES[dtype], layout), what=layout)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize(
    "case",
    [((5, 20, 13, 31), 4, 1), ((9, 12, 5, 9), None, 1), ((2, 60004, 1, 2), None, 1)],
    ids=["spans", "large_group", "long_rows"],
)
def test_channels_last_spans(impl, device, dtype, case):
    """Rows of C + 1 channels that begin anywhere, in several blocks and several a block."""
    shape, *args = case
    if harness.interpreted(impl, device) and shape[1] > 60000:
        pytest.skip("a minute in the interpreter")
    compare(*ops(impl, *args), inputs(shape, device, DTYPES[dtype], "channels_last"))


@pytest.mark.parametrize("case", ["odd", "uneven", "stylegan", "whole_batch", "latent", "empty"])
def test_second_gradients(impl, device, case):
    shape, *args = CASES[case]
    compare(*ops(impl, *args), inputs(shape, device), second_grads, case)


@pytest.mark.parametrize("group_size", [None, 1, 2, 4, 9])
def test_gradcheck(impl, device, group_size):
    harness.skip_float64_triton(impl, torch.float64)
    x = inputs((5, 4, 2, 3), device, torch.float64)[0].requires_grad_()
    f, _ = ops(impl, group_size, 2)
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_third_order(impl, device):
    def third(implementation, dtype):
        x = inputs((4, 2, 2, 2), device, dtype)[0].requires_grad_()
        y = minibatch_stddev(x, 2, impl=implementation).tanh()
        for _ in range(2):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(y.square().sum(), x)[0]

    exact = third("reference", torch.float64)
    assert harness.relative_error(third(impl, torch.float32), exact) < 1e-4


def test_opcheck(impl, device):
    if impl == "reference":
        pytest.skip("the reference is not a registered op")
    for layout in ("contiguous", "channels_last", "sliced"):
        (x,) = inputs((6, 8, 4, 4), device, layout=layout)
        y = minibatch_stddev(x, 4, 2, impl=impl)
        op, bwd = (_impl.op(impl, name) for name in ("minibatch_stddev", "minibatch_stddev_bwd"))
        harness.opcheck(op, (x, 2, 2))
        harness.opcheck(bwd, (y, x, 2, 2))


def test_known_deviation(impl, device):
    """Samples ±a around any mean have standard deviation a."""
    x = torch.tensor([3.0, -3.0, 3.0, -3.0], device=device).reshape(4, 1, 1, 1) + 1000
    y = minibatch_stddev(x.expand(4, 8, 4, 4).contiguous(), None, impl=impl)
    torch.testing.assert_close(y[:, 8], torch.full((4, 4, 4), 3.0, device=device))


def test_equal_samples_have_a_finite_gradient(impl, device):
    x = torch.full((4, 8, 4, 4), 0.1, device=device, requires_grad=True)
    y = minibatch_stddev(x, 4, impl=impl)
    torch.testing.assert_close(y[:, 8], torch.full((4, 4, 4), 1e-4, device=device))
    assert torch.autograd.grad(y[:, 8].sum(), x)[0].abs().max() < 1e-3


def test_uneven_groups(impl, device):
    """Sample n of 7 in groups of at most 3: groups {0, 3, 6}, {1, 4} and {2, 5}."""
    (x,) = inputs((7, 4, 3, 3), device)
    y = minibatch_stddev(x, 3, impl=impl)
    for members in ([0, 3, 6], [1, 4], [2, 5]):
        alone = minibatch_stddev(x[members], None, impl="reference")
        torch.testing.assert_close(y[members], alone)


@pytest.mark.parametrize(("n", "groups"), [(7, 3), (5, 2), (11, 4), (9, 5)])
def test_gradient_of_uneven_groups(device, n, groups):
    """In PyTorch's operations, which higher orders differentiate: as of each group alone."""
    x = inputs((n, 4, 2, 3), device, torch.float64)[0].requires_grad_()
    dy = harness.randn(n, 6, 2, 3, seed=1).to(device).requires_grad_()
    g = harness.randn(n, 4, 2, 3, seed=2).to(device)
    dx = _bwd_reference(dy, x, groups, 2)
    wanted = torch.zeros_like(x)
    for m in range(groups):
        y = minibatch_stddev(x[m::groups], None, 2, impl="reference")
        wanted = wanted + torch.autograd.grad(y, x, dy[m::groups], create_graph=True)[0]
    torch.testing.assert_close(dx, wanted)
    seconds = (torch.autograd.grad(t, (dy, x), g) for t in (dx, wanted))
    for a, e in zip(*seconds, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("case", range(4))
def test_golden(impl, device, case):
    harness.skip_float64_triton(impl, torch.float64)
    params, t = harness.golden("minibatch_stddev")[case]
    x, dy = t["x"].to(device).requires_grad_(), t["dy"].to(device)
    y = minibatch_stddev(x, impl=impl, **params)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert harness.relative_error(y.cpu(), t["y"]) < 1e-10
    assert harness.relative_error(dx.cpu(), t["dx"]) < 1e-10


@st.composite
def cases(draw):
    num_channels = draw(st.integers(1, 4))
    channels = num_channels * draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    pixels = draw(st.lists(st.integers(1, 6), max_size=3))
    return {
        "shape": (draw(st.integers(1, 11)), channels, *pixels),
        "args": (draw(st.sampled_from([None, 1, 2, 3, 4, 8])), num_channels),
        "layout": draw(st.sampled_from(harness.LAYOUTS)),
        "dtype": draw(st.sampled_from(["f32", "f16", "bf16"])),
    }


def test_random_arguments(impl, device):
    @harness.examples(impl)
    @given(cases())
    def run(c):
        n, channels, *pixels = c["shape"]
        if harness.interpreted(impl, device):
            n, pixels = min(n, 5), [min(size, 3) for size in pixels]
        x = inputs((n, channels, *pixels), device, DTYPES[c["dtype"]], c["layout"])
        compare(*ops(impl, *c["args"]), x, case=f"{n} {pixels} {c}")

    run()


def test_deterministic(impl, device):
    for layout in ("contiguous", "channels_last"):
        x = inputs((9, 24, 13, 11), device, layout=layout)
        f, _ = ops(impl, 4, 2)
        for a, b in zip(outputs_and_grads(f, x), outputs_and_grads(f, x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", [0, 1, 2])
def test_instruction_sets(device, isa):
    if device != "cpu":
        pytest.skip("CPU kernels")
    try:
        _impl.set_cpu_isa(isa)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                x = inputs((6, 38, 5, 7), device, dtype, layout)
                compare(*ops("cpu", 4, 2), x, what=str(isa))
    finally:
        _impl.set_cpu_isa(-1)


X = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((1.0,), TypeError, "x must be a tensor, got float"),
        ((X.long(),), TypeError,
         "x must be float32, float16, bfloat16 or float64, got torch.int64"),
        ((X[0, 0, 0],), ValueError, "x must be (N, C, *) with at least one channel, got (4,)"),
        ((X[:, :0],), ValueError,
         "x must be (N, C, *) with at least one channel, got (2, 0, 4, 4)"),
        ((X, 0), ValueError, "group_size must be at least 1, got 0"),
        ((X, 2.0), TypeError, "group_size must be an int or None, got float"),
        ((X, "4"), TypeError, "group_size must be an int or None, got str"),
        ((X, True), TypeError, "group_size must be an int or None, got bool"),
        ((X, 2, None), TypeError, "num_channels must be an int, got NoneType"),
        ((X, 2, [1]), TypeError, "num_channels must be an int, got list"),
        ((X, 2, 0), ValueError, "num_channels must be at least 1, got 0"),
        ((X, 2, 2), ValueError, "num_channels must divide the 3 channels of x, got 2"),
    ],
)  # fmt: skip
def test_errors(impl, device, args, error, text):
    args = [a.to(device) if torch.is_tensor(a) else a for a in args]
    with pytest.raises(error) as caught:
        minibatch_stddev(*args, impl=impl)
    assert str(caught.value) == f"minibatch_stddev: {text}"


def test_compile(impl, device):
    if impl in ("reference", "simt", "triton") and device == "cpu":
        pytest.skip("on the CPU, only the C++ kernels are worth compiling around")
    f, _ = ops(impl, 4, 1)
    compiled = torch.compile(f, fullgraph=True)
    x = inputs((8, 16, 4, 4), device)
    for a, e in zip(outputs_and_grads(compiled, x), outputs_and_grads(f, x), strict=True):
        torch.testing.assert_close(a, e)
