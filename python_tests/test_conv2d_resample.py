"""conv2d_resample: golden vectors, the definition over random arguments, gradients, errors."""

from __future__ import annotations

import harness
import pytest
import torch
from harness import compare, golden, lay_out, max_error, outputs_and_grads, randn
from hypothesis import given
from hypothesis import strategies as st

from gankern.ops import conv2d_resample, setup_filter, upfirdn2d

F4 = setup_filter([1, 3, 3, 1])


def definition(x, w, f, up, down, padding, groups, flip_weight):
    """Upsample, convolve, downsample, one after another, every zero multiplied."""
    taps = (1, 1) if f is None else (f.shape[-1], f.shape[0])
    pads = [padding] * 4
    for axis, t in enumerate(taps):
        for side in range(2):
            if up > 1:
                pads[2 * axis + side] += (t + up - 1) // 2 if side == 0 else (t - up) // 2
            if down > 1:
                pads[2 * axis + side] += (t - down + 1) // 2 if side == 0 else (t - down) // 2
    x = upfirdn2d(x, f if up > 1 else None, up, 1, pads, gain=up**2, impl="reference")
    w = w if flip_weight else w.flip([2, 3])
    x = torch.nn.functional.conv2d(x, w, groups=groups)
    return upfirdn2d(x, f if down > 1 else None, 1, down, impl="reference")


@pytest.mark.parametrize(("params", "t"), golden("conv2d_resample"))
def test_golden(params, t):
    y = conv2d_resample(t["x"], t["w"], t["f"], **params, impl="reference")
    assert max_error(y, t["y"]) <= 1e-10 * t["y"].abs().max()


@st.composite
def cases(draw):
    return {
        "args": (
            draw(st.integers(1, 3)),  # up
            draw(st.integers(1, 3)),  # down
            draw(st.integers(-1, 3)),  # padding
            draw(st.sampled_from([1, 2])),  # groups
            draw(st.booleans()),  # flip_weight
        ),
        "kernel": draw(st.sampled_from([1, 2, 3, 5])),
        "taps": draw(st.integers(0, 6)),
        "size": draw(st.tuples(st.integers(5, 9), st.integers(5, 9))),
        "layout": draw(st.sampled_from(["contiguous", "channels_last"])),
    }


def test_random_arguments(impl, device):
    """The reference against the definition, in float64; implementations with their gradients."""

    @harness.examples(impl)
    @given(cases())
    def run(c):
        groups = c["args"][3]
        n, o, i = (1, 2, 2) if harness.interpreted(impl, device) else (2, 6, 4)
        x = randn(n, i, *c["size"])
        w = randn(o, i // groups, c["kernel"], c["kernel"], seed=1)
        x, taps, f = lay_out(x, c["layout"]), c["taps"], None
        taps = min(taps, 3) if harness.interpreted(impl, device) else taps
        if taps:
            f = setup_filter(randn(taps, seed=2).float() + 2, separable=taps % 2 == 0)
        try:
            exact = harness.once(f"exact {n} {taps} {c}", lambda: definition(x, w, f, *c["args"]))
        except (RuntimeError, ValueError):  # nothing is left to convolve or to filter
            with pytest.raises((RuntimeError, ValueError)):
                conv2d_resample(x.to(device).float(), w.to(device).float(), f, *c["args"])
            return
        if impl == "reference":
            y = conv2d_resample(x, w, f, *c["args"], impl=impl)
            assert max_error(y, exact) <= 1e-10 * max(1.0, exact.abs().max().item())
            return

        def at(which):
            return lambda x, w: conv2d_resample(
                x, w, None if f is None else f.to(x.device), *c["args"], impl=which
            )

        inputs = [x.float().to(device), w.float().to(device)]
        orders = harness.output if harness.interpreted(impl, device) else outputs_and_grads
        y, *_ = compare(at(impl), at("reference"), inputs, orders, case=f"{n} {taps} {c}")
        assert max_error(y, exact) <= 1e-5 * max(1.0, exact.abs().max().item())

    run()


@pytest.mark.parametrize(("up", "down", "kernel"), [(1, 1, 3), (2, 1, 3), (1, 2, 3), (2, 1, 1)])
def test_gradcheck(up, down, kernel):
    x, w = randn(1, 2, 5, 4).requires_grad_(), randn(2, 2, kernel, kernel, seed=1).requires_grad_()

    def f(x, w):
        return conv2d_resample(x, w, F4, up, down, kernel // 2, impl="reference")

    assert torch.autograd.gradcheck(f, (x, w))
    assert torch.autograd.gradgradcheck(f, (x, w))


def test_impl_matches_reference(impl, device):
    x, w = randn(2, 8, 9, 12).float().to(device), randn(4, 8, 3, 3, seed=1).float().to(device)
    for up, down in ((1, 1), (2, 1), (1, 2)):
        y = conv2d_resample(x, w, F4.to(device), up, down, 1, impl=impl)
        exact = conv2d_resample(
            x.double(), w.double(), F4.to(device), up, down, 1, impl="reference"
        )
        assert max_error(y, exact.cpu()) <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_deterministic(impl, device, up, down):
    n, i, o = (1, 2, 2) if harness.interpreted(impl, device) else (2, 8, 4)
    inputs = [t.float().to(device) for t in (randn(n, i, 17, 19), randn(o, i, 3, 3, seed=1))]

    def f(x, w):
        return conv2d_resample(x, w, F4.to(device), up, down, 1, impl=impl)

    for a, b in zip(outputs_and_grads(f, inputs), outputs_and_grads(f, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "conv2d_resample: x must be a tensor, got list"),
        ({"x": torch.zeros(1, 2, 4)}, ValueError,
         "conv2d_resample: x must be (N, I, H, W), got shape (1, 2, 4)"),
        ({"w": torch.zeros(3, 5, 3, 3)}, ValueError,
         "conv2d_resample: w must be (O, I / groups, kh, kw) for I = 2 and groups = 1, "
         "got shape (3, 5, 3, 3)"),
        ({"up": 0}, ValueError, "conv2d_resample: up must be an int of at least 1, got 0"),
        ({"down": 1.5}, ValueError, "conv2d_resample: down must be an int of at least 1, got 1.5"),
        ({"padding": (1, 2, 3)}, ValueError,
         "conv2d_resample: padding must be an int, 2 or 4 ints, got 3 values (1, 2, 3)"),
    ],
)  # fmt: skip
def test_errors(impl, device, change, error, text):
    args = {"x": torch.zeros(1, 2, 4, 4), "w": torch.zeros(3, 2, 3, 3), "padding": 1} | change
    args = {k: v.to(device) if torch.is_tensor(v) else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        conv2d_resample(**args, impl=impl)
    assert str(caught.value) == text
