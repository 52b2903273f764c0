"""upfirdn2d and its helpers."""

from __future__ import annotations

import collections
import functools
import itertools

import harness
import numpy as np
import pytest
import torch
from harness import DTYPES, compare, outputs_and_grads, second_grads
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from gankern.ops import _impl, downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

SMOOTH = setup_filter([1, 3, 3, 1])
# x, f, arguments: the models' uses first, then one case for each path of the kernels
CASES = {
    "blur": ((1, 8, 17, 17), SMOOTH, {"padding": [1, 1, 1, 1], "gain": 4}),
    "up2": ((1, 8, 16, 16), SMOOTH, {"up": 2, "padding": [2, 1, 2, 1], "gain": 4}),
    "down2": ((2, 8, 12, 16), SMOOTH, {"down": 2, "padding": 1}),
    "wide": ((1, 4, 9, 140), SMOOTH, {"padding": [2, 1, 2, 1]}),
    "up2_12": ((1, 8, 10, 12), torch.linspace(-1, 2, 12), {"up": 2, "padding": [6, 5, 5, 6]}),
    "down2_8": ((1, 8, 20, 24), torch.linspace(-1, 2, 8), {"down": 2, "padding": 3}),
    "blur_12": ((1, 8, 16, 13), torch.linspace(-1, 2, 12), {"padding": [6, 5, 6, 5]}),
    "up4": ((1, 8, 5, 6), torch.linspace(-1, 2, 16).view(4, 4), {"up": 4, "padding": 3}),
    "down4": ((1, 8, 21, 24), torch.linspace(-1, 2, 8), {"down": 4, "padding": 2}),
    "anisotropic": (
        (2, 3, 9, 7),
        torch.linspace(-1, 2, 15).view(3, 5),
        {"up": [2, 1], "down": [1, 3], "padding": [4, 2, 3, 0], "flip_filter": True},
    ),
    "crop": ((1, 5, 12, 12), torch.linspace(-1, 2, 3), {"up": [3, 2], "padding": [-5, 2, 1, -4]}),
    "one": ((1, 1, 1, 1), SMOOTH, {"up": 2, "padding": [2, 1, 2, 1]}),
}


def case(name, device, dtype=torch.float32, layout="contiguous", impl=""):
    shape, f, kwargs = CASES[name]
    if harness.interpreted(impl, device):
        shape = (1, min(shape[1], 2 if layout == "channels_last" else 1), *shape[2:])
    x = harness.lay_out(harness.randn(*shape).to(device, dtype), layout)
    return [x, f.to(device, torch.float64 if dtype == torch.float64 else torch.float32)], kwargs


def ops(impl, **kwargs):
    f = functools.partial(upfirdn2d, impl=impl, **kwargs)
    return f, functools.partial(upfirdn2d, impl="reference", **kwargs)


def skip_float64(impl, dtype="f64"):
    if impl == "triton" and dtype == "f64":
        pytest.skip("Triton's kernels compute in float32")


@pytest.mark.parametrize("layout", harness.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(impl, device, name, dtype, layout):
    skip_float64(impl, dtype)
    if harness.interpreted(impl, device) and dtype != "f32" and layout != "contiguous":
        pytest.skip("the interpreter is slow; the layouts are tested in float32")
    tensors, kwargs = case(name, device, DTYPES[dtype], layout, impl)
    f, reference = ops(impl, **kwargs)
    y, *grads = outputs_and_grads(f, tensors) if dtype == "f64" else compare(f, reference, tensors)
    if dtype == "f64":  # the order of summation differs, and nothing judges it
        for actual, exact in zip((y, *grads), outputs_and_grads(reference, tensors), strict=True):
            assert harness.relative_error(actual, exact) < 1e-13
    last = tensors[0].is_contiguous(memory_format=torch.channels_last)
    assert not last or y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", CASES)
def test_second_gradients(impl, device, name):
    tensors, kwargs = case(name, device, impl=impl)
    compare(*ops(impl, **kwargs), tensors, second_grads, name)


@pytest.mark.parametrize("taps", [(3,), (2, 4)], ids=str)
def test_gradcheck(impl, device, taps):
    skip_float64(impl)
    x = harness.randn(1, 2, 4, 3).to(device).requires_grad_()
    f = harness.randn(*taps, seed=1).to(device).requires_grad_()
    fn, _ = ops(impl, up=[2, 1], down=[1, 2], padding=[2, 1, 0, 3], gain=1.5)
    assert gradcheck(fn, (x, f))
    assert gradgradcheck(fn, (x, f))


def test_opcheck(impl, device):
    if impl == "reference":
        pytest.skip("the reference is not a registered op")
    for layout in ("contiguous", "channels_last"):
        (x, f), _ = case("up2", device, layout=layout)
        args = (2, 1, 1, 3, 1, 2, 3, 0, True, 1.5)
        harness.opcheck(_impl.op(impl, "upfirdn2d"), (x, f, *args))


@pytest.mark.parametrize("layout", harness.LAYOUTS)
@pytest.mark.parametrize("f", [None, torch.ones(1), torch.ones(1, 1)], ids=["none", "1d", "2d"])
def test_identity_is_exact(impl, device, f, layout):
    x = harness.lay_out(harness.randn(2, 3, 5, 4).to(device, torch.float32), layout)
    f = None if f is None else f.to(device)
    assert torch.equal(upfirdn2d(x, f, impl=impl), x)
    cropped = upfirdn2d(x, f, 1, 1, [1, -2, -1, 3], impl=impl)
    assert torch.equal(cropped[:, :, :4, 1:], x[:, :, 1:, :2])
    assert not cropped[:, :, 4:].any()
    assert not cropped[..., :1].any()


def test_inserted_zeros_are_not_multiplied(impl, device):
    """An infinite sample reaches exactly the outputs whose taps meet it."""
    if impl == "reference":
        pytest.skip("the reference multiplies the inserted zeros")
    for shape, layout in (((1, 1, 6, 6), "contiguous"), ((1, 8, 6, 6), "channels_last")):
        x = harness.lay_out(torch.zeros(shape, device=device), layout)
        x[:, :, 3, 3] = float("inf")
        y = upfirdn2d(x, SMOOTH.to(device), 2, 1, [2, 1, 2, 1], impl=impl)
        met = torch.zeros(12, 12, dtype=torch.bool)
        met[5:9, 5:9] = True
        assert torch.equal(y.isinf().cpu(), met.expand(y.shape))
        assert not y.isnan().any()


@pytest.mark.parametrize("number", range(10))
def test_golden(impl, device, number):
    params, t = harness.golden("upfirdn2d")[number]
    dtype = torch.float32 if impl == "triton" else torch.float64
    t = {k: v.to(device, torch.float32 if k == "f" else dtype) for k, v in t.items()}
    scaled = number in (3, 4, 7) or impl == "triton"  # its filter was scaled in float32
    p = [params[k] for k in ("up", "down", "padding", "flip", "gain")]
    x = t["x"].requires_grad_()
    y = upfirdn2d(x, t["f"], *p, impl=impl)
    (dx,) = torch.autograd.grad(y, x, t["dy"])
    for name, actual in (("y", y), ("dx", dx)):
        assert actual.shape == t[name].shape, name
        assert harness.relative_error(actual, t[name]) < (1e-5 if scaled else 1e-10), name


def naive(x, f, up, down, padding, flip, gain):
    """The definition, tap by tap, in float64."""
    n, c, h, w = x.shape
    x0, x1, y0, y1 = padding
    height, width = h * up[1] + max(y0, 0) + max(y1, 0), w * up[0] + max(x0, 0) + max(x1, 0)
    z = torch.zeros(n, c, height, width, dtype=torch.float64)
    bottom, right = max(y0, 0) + h * up[1], max(x0, 0) + w * up[0]
    z[:, :, max(y0, 0) : bottom : up[1], max(x0, 0) : right : up[0]] = x.double()
    z = z[:, :, max(-y0, 0) : height - max(-y1, 0), max(-x0, 0) : width - max(-x1, 0)]
    k = f.double()
    k = torch.outer(k, k) if k.ndim == 1 else k
    k = (gain * (k if flip else k.flip([0, 1]))).tolist()
    oh, ow = z.shape[2] - len(k) + 1, z.shape[3] - len(k[0]) + 1
    y = sum(
        v * z[:, :, i : i + oh, j : j + ow] for i, row in enumerate(k) for j, v in enumerate(row)
    )
    return y[:, :, :: down[1], :: down[0]]


def images_of(draw, taps, up, pads, sizes):
    """(H, W) as drawn from `sizes`, or just enough for one output."""
    least = [-(-(t - sum(p)) // u) for t, u, p in zip((taps[0], taps[-1]), up, pads, strict=True)]
    return [max(draw(s), small, 1) for s, small in zip(sizes, least, strict=True)]


FOURS, TWICE = [(4, 4), (4,)], [(1, 1), (2, 1), (1, 2)]
# What the GPU kernels are specialised for: channels, taps, factors, widths.
HOT = {
    "march": ([1, 2, 3], FOURS, TWICE, [16, 32]),
    "lines": ([1, 2, 3], FOURS, [(1, 1)], range(1, 20, 2)),
    "planes": ([1, 2], [*FOURS, (2, 2), (6,), (8,), (12,)], [*TWICE, (4, 1), (1, 4)], range(1, 20)),
    "walk": ([8, 16], FOURS, TWICE, range(1, 20)),
    "strips": ([8, 16], [(8,), (12,)], [*TWICE, (4, 1), (1, 4)], range(1, 20)),
    "pixels": ([8, 16], [(2,), (6, 6), (6,)], [*TWICE, (4, 1), (1, 4)], range(1, 20)),
}


@st.composite
def hot_cases(draw):
    """A row of HOT, or near to it."""
    channels, filters, factors, widths = HOT[draw(st.sampled_from(list(HOT)))]
    taps, (up, down) = draw(st.sampled_from(filters)), draw(st.sampled_from(factors))
    # As filter2d, upsample2d and downsample2d pad, or the other way round, or somehow.
    kept = [(taps[0] + up - down) // 2, (taps[0] - up * down) // 2]
    by_axis = st.sampled_from([kept, kept, kept, kept[::-1], None])
    x_pads, y_pads = (draw(by_axis) or draw(st.tuples(PADS, PADS)) for _ in "xy")
    sizes = st.integers(1, 12), st.sampled_from(list(widths))
    size = images_of(draw, taps, (up, up), (y_pads, x_pads), sizes)
    layouts = ["channels_last"] if channels[0] > 4 else ["contiguous", "contiguous", "strided"]
    return {
        "shape": (draw(st.integers(1, 2)), draw(st.sampled_from(channels)), *size),
        "taps": taps,
        "args": ([up, up], [down, down], [*x_pads, *y_pads], draw(st.booleans()), 1.5),
        "dtype": draw(st.sampled_from(["f32", "f16", "f32", "bf16"])),
        "layout": draw(st.sampled_from(layouts)),
    }


@st.composite
def any_cases(draw):
    """Any filter of up to 32 taps a side, any factors, dtype and strides."""
    factors, few = st.sampled_from([1, 1, 2, 2, 3, 4, 5]), st.integers(1, 6)
    side = st.one_of(few, few, st.integers(7, 32))
    taps = draw(st.one_of(st.tuples(side), st.tuples(few, few), st.tuples(side, few)))
    up, down = [draw(factors), draw(factors)], [draw(factors), draw(factors)]
    pads = [draw(PADS) for _ in range(4)]
    sizes = st.integers(1, 12), st.integers(1, 20)
    size = images_of(draw, taps, up[::-1], (pads[2:], pads[:2]), sizes)
    return {
        "shape": (draw(st.integers(1, 2)), draw(st.integers(1, 9)), *size),
        "taps": taps,
        "args": (up, down, pads, draw(st.booleans()), 1.5),
        "dtype": draw(st.sampled_from(list(DTYPES))),
        "layout": draw(st.sampled_from(["contiguous", "channels_last", "strided", "sliced"])),
    }


@st.composite
def random_cases(draw):
    """Three of four are hot; the gradient in x is asked for in half of them."""
    case = draw(hot_cases() if draw(st.integers(0, 3)) else any_cases())
    return case | {"gradient": draw(st.booleans())}


PADS = st.integers(-3, 12)
# Fewest cases, of 500, that each kernel has in float32 and in 16 bits.
LEAST = {"march": 8, "lines": 8, "planes": 50, "walk": 8, "strips": 8, "pixels": 20, "any": 20}


def test_random_arguments(impl, device):
    """y, and in half of the cases dx, against the definition."""
    ran = collections.Counter()

    @harness.examples(impl)
    @given(random_cases())
    def run(c):
        dtype = DTYPES["f32" if impl == "triton" and c["dtype"] == "f64" else c["dtype"]]
        shape, args, gradient = c["shape"], c["args"], c["gradient"]
        if harness.interpreted(impl, device):
            assume(c["taps"][0] * c["taps"][-1] <= 64)
            shape = (1, min(shape[1], 2 if c["layout"] == "channels_last" else 1), *shape[2:])
        f = harness.randn(*c["taps"], seed=1).float()
        x = harness.lay_out(harness.randn(*shape).to(device, dtype), c["layout"])
        x.requires_grad_(gradient)

        def judges():
            return [exactly(x, f, args), exactly(x.abs(), f.abs(), args, absolute=True)]

        def exactly(x, f, args, absolute=False):
            x = x.detach().cpu().double().requires_grad_(gradient)
            y = naive(x, f, *args)
            dy = harness.randn(*y.shape, seed=2).to(dtype).double()
            dy = dy.abs() if absolute else dy
            return [y.detach(), *(torch.autograd.grad(y, x, dy) if gradient else ())]

        exact, sizes = harness.once(f"{shape} {dtype} {c}", judges)
        with harness.launches(impl) as kernels:
            y = upfirdn2d(x, f.to(device), *args, impl=impl)
            dy = harness.randn(*y.shape, seed=2).to(y)
            found = [y, *(torch.autograd.grad(y, x, dy) if gradient else ())]
        eps = torch.finfo(dtype).eps if dtype.itemsize != 4 else 4 * torch.finfo(dtype).eps
        for got, wanted, size in zip(found, exact, sizes, strict=True):
            assert harness.max_error(got, wanted) <= 2 * eps * size.max().item(), c
        ran.update((name.split("_")[1], dtype.itemsize) for name in kernels)

    run()
    harness.assert_kernels_ran(impl, ran, LEAST)


def test_deterministic(impl, device):
    for name in ("blur", "up2_12"):
        for layout in ("contiguous", "channels_last"):
            tensors, kwargs = case(name, device, layout=layout, impl=impl)
            f, _ = ops(impl, **kwargs)
            pairs = zip(outputs_and_grads(f, tensors), outputs_and_grads(f, tensors), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("factors", [(1, 1), (2, 1), (1, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("taps", [4, 12])
@pytest.mark.parametrize("layout", harness.LAYOUTS)
def test_large_tiles(impl, device, layout, taps, factors, dtype):
    """Of which a GPU of few multiprocessors has enough: long strips, several steps each."""
    if impl != "simt":
        pytest.skip("only csrc/simt can be a smaller GPU")
    up, down = factors
    x = harness.lay_out(harness.randn(1, 8, 75, 40).to(DTYPES[dtype]), layout)
    filters = [torch.linspace(-1, 2, taps)]
    if taps == 4:
        filters.append(harness.randn(4, 4, seed=1).float())  # no outer product
    eps = torch.finfo(x.dtype).eps
    for f, processors in itertools.product(filters, [1, 10]):
        with harness.gpu_of(processors, impl):
            y = upfirdn2d(x, f, up, down, taps // 2, impl=impl)
        exact = upfirdn2d(x.double(), f, up, down, taps // 2, impl="reference")
        all_of_a_sign = (x.double().abs(), f.abs(), up, down, taps // 2)
        size = upfirdn2d(*all_of_a_sign, impl="reference").max().item()
        assert harness.max_error(y, exact) <= (8 if dtype == "f32" else 2) * eps * size


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("factors", [(1, 1), (2, 1), (1, 2)], ids=str)
def test_lines_of_channels(impl, device, factors, dtype):
    """Parts of 128 and of 64 bytes of channels, whole and not, where a GPU has enough of them."""
    up, down = factors
    for channels, separable in itertools.product((24, 32, 56, 64), (True, False)):
        channels = channels // 2 if dtype == "f32" else channels
        x = harness.lay_out(harness.randn(1, channels, 23, 41).to(DTYPES[dtype]), "channels_last")
        f = torch.linspace(-1, 2, 4) if separable else harness.randn(4, 4, seed=1).float()
        with harness.gpu_of(1, impl):
            y = upfirdn2d(x.to(device), f.to(device), up, down, 2, impl=impl)
        exact = upfirdn2d(x.double(), f.double(), up, down, 2, impl="reference")
        all_of_a_sign = (x.double().abs(), f.double().abs(), up, down, 2)
        size = upfirdn2d(*all_of_a_sign, impl="reference").max().item()
        eps = torch.finfo(x.dtype).eps
        assert harness.max_error(y.cpu(), exact) <= (8 if dtype == "f32" else 2) * eps * size


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize(
    "pads", [[1, 1, 1, 2], [3, 0, 2, 2], [-1, 3, 8, -1], [2, 1, 23, 0], [1, 2, -5, 9]], ids=str
)
def test_lines_of_any_length(impl, device, pads, dtype):
    """4 taps at one rate, NCHW: planes that share a block, rows of any alignment, and long ones."""
    widths = (5, 14) if harness.interpreted(impl, device) else (2, 5, 14, 37, 66, 257, 1030)
    for width, separable in itertools.product(widths, (True, False)):
        x = harness.randn(2, 3, 11, width, seed=width).to(DTYPES[dtype])
        f = torch.linspace(-1, 2, 4) if separable else harness.randn(4, 4, seed=1).float()
        exact = upfirdn2d(x.double(), f.double(), padding=pads, impl="reference")
        sizes = upfirdn2d(x.double().abs(), f.double().abs(), padding=3, impl="reference")
        eps = torch.finfo(x.dtype).eps
        for processors in (1, 132):
            with harness.gpu_of(processors, impl):
                y = upfirdn2d(x.to(device), f.to(device), padding=pads, impl=impl)
            bound = (8 if dtype == "f32" else 2) * eps * sizes.max().item()
            assert harness.max_error(y.cpu(), exact) <= bound


def test_offsets_beyond_32_bits(impl, device):
    """The last corner of an image of over 2**31 elements; the rest is never touched."""
    if impl == "reference" or device != "cpu":
        pytest.skip("would touch all of the memory")
    big = torch.from_numpy(np.zeros((1, 1, 65600, 32800), dtype=np.float16))
    big[0, 0, -6:, -6:] = harness.randn(6, 6).half()
    y = upfirdn2d(big, SMOOTH, padding=[6 - 32800, 0, 6 - 65600, 0], impl=impl)
    exact = upfirdn2d(big[:, :, -6:, -6:], SMOOTH, impl="reference")
    torch.testing.assert_close(y, exact)


@pytest.mark.parametrize("isa", [0, 1, 2])
def test_instruction_sets(device, isa):
    if device != "cpu":
        pytest.skip("CPU kernels")
    try:
        _impl.set_cpu_isa(isa)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                for name in CASES:
                    tensors, kwargs = case(name, device, dtype, layout)
                    compare(*ops("cpu", **kwargs), tensors, what=f"{name} {isa}")
    finally:
        _impl.set_cpu_isa(-1)


@pytest.mark.parametrize("taps", range(1, 7))
@pytest.mark.parametrize("factor", [1, 2, 3, 4, [2, 1]], ids=str)
def test_sizes_and_brightness_are_kept(factor, taps):
    f = setup_filter([1.0] * taps, separable=False)
    fx, fy = (factor, factor) if isinstance(factor, int) else factor
    x = torch.ones(1, 1, 12, 24)
    if taps >= max(fx, fy):
        up = upsample2d(x, f, factor)
        assert up.shape == (1, 1, 12 * fy, 24 * fx)
    down = downsample2d(x, f, factor)
    assert down.shape == (1, 1, 12 // fy, 24 // fx)
    assert filter2d(x, f).shape == x.shape
    assert torch.allclose(down[:, :, 3 // fy + taps : -taps, taps:-taps], torch.ones(()), atol=1e-6)


def test_setup_filter():
    f = setup_filter([1, 3, 3, 1])
    assert torch.equal(f, torch.outer(f.sum(0), f.sum(0)))
    assert f[0, 0] == 1 / 64
    assert setup_filter([1.0] * 8).shape == (8,)
    assert setup_filter([1.0] * 8, separable=False).ndim == 2
    assert torch.equal(
        setup_filter([1, 2], normalize=False, gain=4, separable=True), torch.tensor([2.0, 4.0])
    )
    assert torch.equal(
        setup_filter([1, 3], separable=True, flip_filter=True), torch.tensor([0.75, 0.25])
    )
    assert torch.equal(setup_filter(None), torch.ones(1, 1))
    assert setup_filter(5).item() == 1
    assert setup_filter(torch.rand(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    y = upfirdn2d(x, setup_filter([1, 3, 3, 1]), 2, 1, [2, 1, 2, 1])
    assert y.shape == (*shape[:2], 8, 8)
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


X, F4 = torch.zeros(1, 1, 4, 4), torch.ones(4, 4)
FILTER = "f must be None or a tensor of shape (taps,) or (taps_y, taps_x), got"
# What all of these functions refuse, by the names of their arguments, and what some have.
MISUSE = [
    ({"x": 1}, TypeError, "x must be a tensor, got int"),
    ({"x": X[0]}, ValueError, "x must be a tensor of shape (N, C, H, W), got shape (1, 4, 4)"),
    ({"x": X.int()}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
    ({"f": F4[None]}, ValueError, f"{FILTER} shape (1, 4, 4)"),
    ({"f": torch.ones(0)}, ValueError, f"{FILTER} shape (0,)"),
    ({"f": [1.0, 1.0]}, TypeError, f"{FILTER} list"),
    ({"f": F4.half()}, TypeError, "f must be float32, got torch.float16"),
    ({"f": F4.double()}, TypeError, "f must be float32, got torch.float64"),
    ({"f": F4.to("meta")}, ValueError, "f must be on the device of x, {device}, got meta"),
    ({"padding": (1, 2, 3)}, ValueError,
     "padding must be an int, 2 or 4 ints, got 3 values (1, 2, 3)"),
    ({"padding": 0.5}, TypeError, "padding must be an int, 2 or 4 ints, got 0.5"),
    ({"padding": "a"}, TypeError, "padding must be an int, 2 or 4 ints, got 'a'"),
    ({"padding": [1, True]}, TypeError, "padding must be an int, 2 or 4 ints, got [1, True]"),
    ({"flip_filter": "no"}, TypeError, "flip_filter must be True or False, got 'no'"),
    ({"gain": "a"}, TypeError, "gain must be a number, got str"),
    ({"gain": None}, TypeError, "gain must be a number, got NoneType"),
    ({"gain": float("nan")}, ValueError, "gain must be a number, got nan"),
]  # fmt: skip
PAIR = "must be a positive int or 2 of them [x, y], got"
FACTORS = [
    (0, ValueError, "0"),
    (True, TypeError, "True"),
    ("2", TypeError, "'2'"),
    (1.5, TypeError, "1.5"),
    (None, TypeError, "None"),
    ([1, 2, 3], ValueError, "[1, 2, 3]"),
    ([2, -1], ValueError, "[2, -1]"),
    (torch.ones(2), TypeError, "Tensor"),
]


def raises(function, change, impl, device, error, text):
    args = {"x": X, "f": F4, "impl": impl} | change
    args = {k: v.to(device) if torch.is_tensor(v) and not v.is_meta else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        function(**args)
    text = text.format(device=torch.empty(0, device=device).device)
    assert str(caught.value) == f"{function.__name__}: {text}"


@pytest.mark.parametrize("function", [upfirdn2d, filter2d, upsample2d, downsample2d])
@pytest.mark.parametrize(("change", "error", "text"), MISUSE, ids=range(len(MISUSE)))
def test_errors(impl, device, function, change, error, text):
    raises(function, change, impl, device, error, text)


@pytest.mark.parametrize(
    ("function", "name"),
    [(upfirdn2d, "up"), (upfirdn2d, "down"), (upsample2d, "up"), (downsample2d, "down")],
)
@pytest.mark.parametrize(("value", "error", "got"), FACTORS, ids=range(len(FACTORS)))
def test_errors_of_factors(impl, device, function, name, value, error, got):
    raises(function, {name: value}, impl, device, error, f"{name} {PAIR} {got}")


@pytest.mark.parametrize(
    ("function", "padding", "got"),
    [
        (upfirdn2d, -1, "2x2 from padding (-1, -1, -1, -1)"),
        (filter2d, -2, "3x3 from padding (0, -1, 0, -1)"),
        (upsample2d, [-4, 0], "11x3 from padding (-2, -3, 2, 1)"),
        (downsample2d, [0, -2], "2x6 from padding (1, 1, -1, -1)"),
    ],
)
def test_errors_of_sizes(impl, device, function, padding, got):
    text = f"padding must leave at least the 4x4 samples of f, got {got}"
    raises(function, {"padding": padding}, impl, device, ValueError, text)


NO_SUM = torch.tensor([0.1, 0.2, -0.3])  # but a rounding, which is no scale


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"f": torch.ones(1, 1, 1)}, ValueError,
         "f must be a number or have 1 or 2 dimensions, got shape (1, 1, 1)"),
        ({"f": []}, ValueError, "f must be a number or have 1 or 2 dimensions, got shape (0,)"),
        ({"f": "a"}, TypeError, "f must be real numbers, got 'a'"),
        ({"f": ["a"]}, TypeError, "f must be real numbers, got ['a']"),
        ({"f": [[1, 2], [3]]}, TypeError, "f must be real numbers, got list"),
        ({"f": torch.ones(2) * 1j}, TypeError, "f must be real numbers, got torch.complex64"),
        ({"f": [1, -1]}, ValueError,
         "f must have a sum other than 0 where normalize=True, got [1.0, -1.0]"),
        ({"f": NO_SUM, "separable": True}, ValueError,
         f"f must have a sum other than 0 where normalize=True, got {NO_SUM.tolist()}"),
        ({"f": [1, float("nan")]}, ValueError, "f must be finite, got [1.0, nan]"),
        ({"f": [1, float("inf")], "normalize": False}, ValueError,
         "f must be finite, got [1.0, inf]"),
        ({"device": "gpu"}, ValueError, "device must be None or a device, got 'gpu'"),
        ({"normalize": "no"}, TypeError, "normalize must be True or False, got 'no'"),
        ({"flip_filter": None}, TypeError, "flip_filter must be True or False, got None"),
        ({"gain": "a"}, TypeError, "gain must be a number, got str"),
        ({"gain": -4, "separable": True}, ValueError,
         "gain must be at least 0 for a separable filter, got -4.0"),
        ({"separable": "no"}, TypeError, "separable must be None, True or False, got 'no'"),
        ({"f": F4, "separable": True}, ValueError,
         "f must have 1 dimension to be separable, got 2"),
    ],
)  # fmt: skip
def test_errors_of_setup_filter(change, error, text):
    with pytest.raises(error) as caught:
        setup_filter(**{"f": [1, 3, 3, 1]} | change)
    assert str(caught.value) == f"setup_filter: {text}"


def test_setup_filter_of_no_sum():
    assert torch.equal(setup_filter([1, -1], normalize=False), torch.tensor([[1.0, -1], [-1, 1]]))
    assert torch.equal(setup_filter([3, -2], gain=-2), torch.tensor([[-18.0, 12], [12, -8]]))


def test_numbers_of_other_types(device):
    x, f = torch.rand(1, 1, 5, 5, device=device), F4.to(device)
    one, two = np.int64(1), np.int32(2)
    y = upfirdn2d(x, f, two, [one, 2], np.array([3, 2])[0], gain=np.float32(4))
    assert torch.equal(y, upfirdn2d(x, f, 2, [1, 2], 3, gain=4))


def test_too_many_taps(impl, device):
    x, f = torch.zeros(1, 1, 40, 40, device=device), torch.ones(33, device=device)
    assert upfirdn2d(x, f).shape == (1, 1, 8, 8)
    if impl in ("reference", "cpu"):
        assert upfirdn2d(x, f, impl=impl).shape == (1, 1, 8, 8)
        return
    text = f"f must have at most 32 taps a side for impl='{impl}', got shape (33,)"
    for function in (upfirdn2d, filter2d, upsample2d, downsample2d):
        raises(function, {"x": x, "f": f}, impl, device, ValueError, text)


def test_compile(impl, device):
    if impl in ("reference", "simt", "triton") and device == "cpu":
        pytest.skip("on the CPU, only the C++ kernels are worth compiling around")
    tensors, kwargs = case("up2", device)
    f, _ = ops(impl, **kwargs)
    compiled = torch.compile(f, fullgraph=True)
    pairs = zip(outputs_and_grads(compiled, tensors), outputs_and_grads(f, tensors), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected)


def test_export(device):
    class Layer(torch.nn.Module):
        def forward(self, x, f):
            return upsample2d(x, f)

    (x, f), _ = case("up2", device)
    program = torch.export.export(Layer(), (x, f))
    torch.testing.assert_close(program.module()(x, f), upsample2d(x, f))
