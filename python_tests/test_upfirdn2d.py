"""upfirdn2d and its helpers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gankern.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

DATA = Path(__file__).parent / "data"

# file, up, down, padding, flip_filter, gain, tolerance (1e-5 where f was scaled in float32)
GOLDEN = [
    ("upfirdn2d_00", 1, 1, [2, 1, 2, 1], False, 1.0, 1e-10),
    ("upfirdn2d_01", 2, 1, [2, 1, 2, 1], False, 4.0, 1e-10),
    ("upfirdn2d_02", 1, 2, [1, 1, 1, 1], False, 1.0, 1e-10),
    ("upfirdn2d_03", 2, 3, [3, 4, 2, 1], True, 0.7, 1e-5),
    ("upfirdn2d_04", [2, 1], [1, 2], [1, 2, 3, 0], False, 1.3, 1e-5),
    ("upfirdn2d_05", 1, 1, [-1, -2, 1, -1], False, 1.0, 1e-10),
    ("upfirdn2d_06", 4, 2, [7, 6, 7, 6], False, 16.0, 1e-10),
    ("upfirdn2d_07", 3, 1, [5, 5, 6, 4], True, 9.0, 1e-5),
    ("upfirdn2d_08", 1, 4, [0, 0, 0, 0], False, 1.0, 1e-10),
    ("upfirdn2d_09", 2, 1, [2, 1, 2, 1], False, 4.0, 1e-10),
]


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name, up, down, padding, flip, gain, tol", GOLDEN, ids=lambda v: str(v))
def test_golden(name, up, down, padding, flip, gain, tol):
    with np.load(DATA / f"{name}.npz") as z:
        x, f, y, dy, dx = (torch.from_numpy(z[k]) for k in ("x", "f", "y", "dy", "dx"))
    x.requires_grad_()
    got = upfirdn2d(x, f, up, down, padding, flip, gain, impl="reference")
    assert got.shape == y.shape and relative(got, y) < tol
    assert relative(torch.autograd.grad(got, x, dy)[0], dx) < tol


@pytest.mark.parametrize("taps", [(3,), (2, 4)], ids=str)
def test_gradients_of_x_and_f(taps):
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    f = torch.randn(taps, dtype=torch.float64, requires_grad=True)

    def fn(x, f):
        return upfirdn2d(x, f, [2, 1], [1, 2], [2, 1, 0, 3], gain=1.5, impl="reference")

    assert gradcheck(fn, (x, f)) and gradgradcheck(fn, (x, f))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("f", [None, torch.ones(1), torch.ones(1, 1)], ids=["none", "1d", "2d"])
def test_identity_is_exact(f, last):
    fmt = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 3, 5, 4).contiguous(memory_format=fmt)
    y = upfirdn2d(x, f)
    assert torch.equal(y, x) and y.stride() == x.stride()
    assert torch.equal(upfirdn2d(x, f, 1, 1, [1, -2, -1, 3])[:, :, :4, 1:], x[:, :, 1:, :2])


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
    assert torch.equal(f, torch.outer(f.sum(0), f.sum(0))) and f[0, 0] == 1 / 64
    assert (
        setup_filter([1.0] * 8).shape == (8,) and setup_filter([1.0] * 8, separable=False).ndim == 2
    )
    assert torch.equal(
        setup_filter([1, 2], normalize=False, gain=4, separable=True), torch.tensor([2.0, 4.0])
    )
    assert torch.equal(
        setup_filter([1, 3], separable=True, flip_filter=True), torch.tensor([0.75, 0.25])
    )
    assert torch.equal(setup_filter(None), torch.ones(1, 1)) and setup_filter(5).item() == 1
    assert setup_filter(torch.rand(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="setup_filter: f must be a number or 1 or 2 dimensions"):
        setup_filter(torch.ones(1, 1, 1))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    y = upfirdn2d(x, setup_filter([1, 3, 3, 1]), 2, 1, [2, 1, 2, 1])
    assert y.shape == (*shape[:2], 8, 8)
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


X, F4 = torch.zeros(1, 1, 4, 4), torch.ones(4, 4)
MISUSE = [
    ((X[0], F4), ValueError, "x must be a tensor of shape (N, C, H, W), got shape (1, 4, 4)"),
    ((X.int(), F4), TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
    (
        (X, F4[None]),
        ValueError,
        "f must be None or a tensor of shape (taps,) or (taps_y, taps_x), ",
    ),
    (
        (X, [1.0, 1.0]),
        ValueError,
        "f must be None or a tensor of shape (taps,) or (taps_y, taps_x), got list",
    ),
    ((X, F4.half()), TypeError, "f must be float32, got torch.float16"),
    ((X, F4, 0), ValueError, "up must be a positive int or 2 of them [x, y], got 0"),
    ((X, F4, 1, [1, 2, 3]), ValueError, "down must be a positive int or 2 of them [x, y], got"),
    (
        (X, F4, 1, 1, (1, 2, 3)),
        ValueError,
        "padding must be an int, 2 or 4 ints, got 3 values (1, 2, 3)",
    ),
    ((X, F4, 1, 1, 0.5), TypeError, "padding must be an int, 2 or 4 ints, got 0.5"),
    ((X, F4, 1, 1, -1), ValueError, "padding must leave at least the 4x4 samples of f, got 2x2"),
]


@pytest.mark.parametrize("args, error, text", MISUSE, ids=range(len(MISUSE)))
def test_errors(args, error, text):
    with pytest.raises(error) as e:
        upfirdn2d(*args)
    assert f"upfirdn2d: {text}" in str(e.value)
