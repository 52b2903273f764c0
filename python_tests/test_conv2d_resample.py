"""conv2d_resample: golden vectors, the definition over random arguments, gradients, errors."""

from __future__ import annotations

import harness
import pytest
import torch
from harness import (
    DTYPES,
    compare,
    golden,
    lay_out,
    led_by,
    max_error,
    outputs_and_grads,
    randn,
    second_grads,
)
from hypothesis import given, reject
from hypothesis import strategies as st

from gankern.ops import conv2d_resample, setup_filter, upfirdn2d

F4 = setup_filter([1, 3, 3, 1])


def definition(x, w, f, up, down, padding, groups, flip_weight, flip_filter=False):
    """Upsample, convolve, downsample, one after another, every zero multiplied."""
    taps = (1, 1) if f is None else (f.shape[-1], f.shape[0])
    given = [padding] if isinstance(padding, int) else list(padding)
    pads = given if len(given) == 4 else [given[0], given[0], given[-1], given[-1]]
    pads = list(pads)
    for axis, t in enumerate(taps):
        for side in range(2):
            if up > 1:
                pads[2 * axis + side] += (t + up - 1) // 2 if side == 0 else (t - up) // 2
            if down > 1:
                pads[2 * axis + side] += (t - down + 1) // 2 if side == 0 else (t - down) // 2
    f = f.flip(list(range(f.ndim))) if flip_filter and f is not None else f
    x = upfirdn2d(x, f if up > 1 else None, up, 1, pads, gain=up**2, impl="reference")
    w = w if flip_weight else w.flip([2, 3])
    x = torch.nn.functional.conv2d(x, w, groups=groups)
    return upfirdn2d(x, f if down > 1 else None, 1, down, impl="reference")


@pytest.mark.parametrize(("params", "t"), golden("conv2d_resample"))
def test_golden(params, t):
    y = conv2d_resample(t["x"], t["w"], t["f"], **params, impl="reference")
    assert max_error(y, t["y"]) <= 1e-10 * t["y"].abs().max()


SIDE = st.integers(-1, 3)
PADDINGS = st.one_of(SIDE, st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE, SIDE, SIDE))


@st.composite
def cases(draw):
    return {
        "args": (
            draw(st.integers(1, 3)),  # up
            draw(st.integers(1, 3)),  # down
            draw(PADDINGS),
            draw(st.sampled_from([1, 2])),  # groups
            draw(st.booleans()),  # flip_weight
            draw(st.booleans()),  # flip_filter
        ),
        "kernel": draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (5, 5), (3, 1), (2, 3)])),
        "taps": draw(st.integers(0, 6)),
        "size": draw(st.tuples(st.integers(5, 9), st.integers(5, 9))),
        "layouts": draw(st.tuples(*[st.sampled_from(["contiguous", "channels_last"])] * 2)),
        "dtype": draw(st.sampled_from(["f32", "f16", "f32", "bf16"])),
    }


def test_random_arguments(impl, device):
    """The reference against the definition, in float64; implementations with their gradients."""

    @harness.examples(impl)
    @given(cases())
    def run(c):
        groups, dtype = c["args"][3], DTYPES[c["dtype"]]
        n, o, i = (1, 2, 2) if harness.interpreted(impl, device) else (2, 6, 4)
        tensors = randn(n, i, *c["size"]), randn(o, i // groups, *c["kernel"], seed=1)
        x, w = (lay_out(t, layout) for t, layout in zip(tensors, c["layouts"], strict=True))
        taps, f = c["taps"], None
        taps = min(taps, 3) if harness.interpreted(impl, device) else taps
        if taps:
            f = setup_filter(randn(taps, seed=2).float() + 2, separable=taps % 2 == 0)
        try:
            exact = harness.once(f"exact {n} {taps} {c}", lambda: definition(x, w, f, *c["args"]))
        except (RuntimeError, ValueError):  # nothing is left to convolve or to filter
            with pytest.raises((RuntimeError, ValueError)):
                conv2d_resample(x.to(device).float(), w.to(device).float(), f, *c["args"])
            reject()
        if impl == "reference":
            y = conv2d_resample(x, w, f, *c["args"], impl=impl)
            assert max_error(y, exact) <= 1e-10 * max(1.0, exact.abs().max().item())
            return

        def at(which):
            return lambda x, w: conv2d_resample(
                x, w, None if f is None else f.to(x.device), *c["args"], impl=which
            )

        inputs = [x.to(device, dtype), w.to(device, dtype)]
        orders = harness.output if harness.interpreted(impl, device) else outputs_and_grads
        y, *_ = compare(at(impl), at("reference"), inputs, orders, case=f"{n} {taps} {c}")
        if dtype == torch.float32:
            assert max_error(y, exact) <= 1e-5 * max(1.0, exact.abs().max().item())

    run()


@pytest.mark.parametrize(("up", "down", "kernel"), [(1, 1, 3), (2, 1, 3), (1, 2, 3), (2, 1, 1)])
def test_gradcheck(up, down, kernel):
    x, w = randn(1, 2, 5, 4).requires_grad_(), randn(2, 2, kernel, kernel, seed=1).requires_grad_()

    def f(x, w):
        return conv2d_resample(x, w, F4, up, down, kernel // 2, impl="reference")

    assert torch.autograd.gradcheck(f, (x, w))
    assert torch.autograd.gradgradcheck(f, (x, w))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("up", "down", "kernel"), [(1, 1, 3), (2, 1, 3), (1, 2, 3), (2, 1, 1)])
def test_second_gradients(impl, device, up, down, kernel, layout):
    """Of the gradients in x and in w."""
    n, i, o, side = (1, 2, 2, 4) if harness.interpreted(impl, device) else (2, 18, 16, 8)
    x, w = randn(n, i, side, side + 1), randn(o, i, kernel, kernel, seed=1)
    inputs = [lay_out(x.float().to(device), layout), w.float().to(device)]

    def at(which):
        f = F4.to(device)
        return lambda x, w: conv2d_resample(x, w, f, up, down, kernel // 2, impl=which)

    for first in (0, 1):
        (run, order), (reference, _) = (led_by(first, at(i), inputs) for i in (impl, "reference"))
        compare(run, reference, order, second_grads, f"of input {first}")


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
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(1, 2, 4, 4).int()}, TypeError,
         "x must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"x": torch.zeros(1, 2, 4)}, ValueError, "x must be (N, I, H, W), got shape (1, 2, 4)"),
        ({"x": torch.zeros(1, 2, 0, 4)}, ValueError,
         "x must have channels and pixels, got shape (1, 2, 0, 4)"),
        ({"w": None}, TypeError, "w must be a floating-point tensor, got NoneType"),
        ({"w": torch.zeros(3, 2, 3)}, ValueError,
         "w must be (O, I / groups, kh, kw), got shape (3, 2, 3)"),
        ({"w": torch.zeros(3, 2, 3, 0)}, ValueError,
         "w must have channels and pixels, got shape (3, 2, 3, 0)"),
        ({"w": torch.zeros(3, 5, 3, 3)}, ValueError,
         "w must be (O, I / groups, kh, kw) for I = 2 and groups = 1, got shape (3, 5, 3, 3)"),
        ({"groups": 2, "w": torch.zeros(3, 1, 3, 3)}, ValueError,
         "w must be (O, I / groups, kh, kw) for I = 2 and groups = 2, got shape (3, 1, 3, 3)"),
        ({"w": torch.zeros(3, 2, 3, 3, device="meta")}, ValueError,
         "w must be on {device} like x, got meta"),
        ({"f": [1.0, 3.0]}, TypeError,
         "f must be None or a tensor of shape (taps,) or (taps_y, taps_x), got list"),
        ({"f": torch.zeros(1, 4, 4)}, ValueError,
         "f must be None or a tensor of shape (taps,) or (taps_y, taps_x), got shape (1, 4, 4)"),
        ({"f": F4.half()}, TypeError, "f must be float32, got torch.float16"),
        ({"f": F4.to("meta")}, ValueError, "f must be on the device of x, {device}, got meta"),
        ({"up": 0}, ValueError, "up must be an int of at least 1, got 0"),
        ({"up": "2"}, TypeError, "up must be an int of at least 1, got '2'"),
        ({"down": 1.5}, TypeError, "down must be an int of at least 1, got 1.5"),
        ({"down": [2, 2]}, TypeError, "down must be an int of at least 1, got [2, 2]"),
        ({"groups": 0}, ValueError, "groups must be an int of at least 1, got 0"),
        ({"groups": True}, TypeError, "groups must be an int of at least 1, got True"),
        ({"padding": (1, 2, 3)}, ValueError,
         "padding must be an int, 2 or 4 ints, got 3 values (1, 2, 3)"),
        ({"padding": "same"}, TypeError, "padding must be an int, 2 or 4 ints, got 'same'"),
        ({"padding": 0, "w": torch.zeros(3, 2, 5, 3)}, ValueError,
         "padding must leave an output of at least 1x1 for x (1, 2, 4, 4), 5x3 taps, up = 1 and "
         "down = 1, got (0, 0, 0, 0)"),
        ({"padding": -4, "up": 2}, ValueError,
         "padding must leave an output of at least 1x1 for x (1, 2, 4, 4), 3x3 taps, up = 2 and "
         "down = 1, got (-4, -4, -4, -4)"),
        ({"padding": (-1, 0), "down": 3}, ValueError,
         "padding must leave an output of at least 1x1 for x (1, 2, 4, 4), 3x3 taps, up = 1 and "
         "down = 3, got (-1, -1, 0, 0)"),
        ({"flip_weight": "no"}, TypeError, "flip_weight must be True or False, got 'no'"),
        ({"flip_filter": None}, TypeError, "flip_filter must be True or False, got None"),
    ],
)  # fmt: skip
def test_errors(impl, device, change, error, text):
    args = {"x": torch.zeros(1, 2, 4, 4), "w": torch.zeros(3, 2, 3, 3), "padding": 1, "impl": impl}
    args |= change
    args = {k: v.to(device) if torch.is_tensor(v) and not v.is_meta else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        conv2d_resample(**args)
    text = text.format(device=torch.empty(0, device=device).device)
    assert str(caught.value) == f"conv2d_resample: {text}"


def test_implementation_is_checked_where_nothing_is_resampled(device):
    x, w = torch.zeros(1, 2, 4, 4, device=device), torch.zeros(3, 2, 3, 3, device=device)
    with pytest.raises(ValueError, match=r"^conv2d_resample: impl must be None or one of cuda, tr"):
        conv2d_resample(x, w, impl="nonsense")
    with pytest.raises(TypeError, match=r"^conv2d_resample: impl must be None or one of cuda, tri"):
        conv2d_resample(x, w, impl=1)
    other = "cuda" if device == "cpu" else "cpu"
    with pytest.raises(RuntimeError, match=f"^conv2d_resample: impl='{other}' cannot run: its ker"):
        conv2d_resample(x, w, impl=other)


def test_crop_of_more_than_the_image(device):
    """The zeros behind it are cropped too, whether there is resampling or not."""
    x, w = torch.ones(1, 2, 4, 4, device=device), torch.ones(3, 2, 3, 3, device=device)
    assert torch.equal(conv2d_resample(x, w, padding=[-5, 7, 1, 1]), x.new_zeros(1, 3, 4, 4))
    assert torch.equal(
        conv2d_resample(x, w, None, 2, padding=[-9, 4, 1, 1]), x.new_zeros(1, 3, 8, 1)
    )
