"""modulated_conv2d: golden vectors, the materialised definition, gradients, range of float16."""

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
from test_conv2d_resample import PADDINGS, definition
from torch.utils._python_dispatch import TorchDispatchMode

from gankern.ops import modulated_conv2d, setup_filter
from gankern.ops.modulated_conv2d import no_weight_gradients

F4 = setup_filter([1, 3, 3, 1])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("params", "t"), golden("modulated_conv2d"))
def test_golden(params, t, fused):
    leaves = [t[k].clone().requires_grad_() for k in ("x", "weight", "styles")]
    y = modulated_conv2d(
        *leaves, t.get("noise"), resample_filter=t["resample_filter"], fused_modconv=fused,
        impl="reference", **params,
    )  # fmt: skip
    grads = torch.autograd.grad(y, leaves, t["dy"])
    for a, name in zip((y, *grads), ("y", "dx", "dweight", "dstyles"), strict=True):
        assert max_error(a, t[name]) <= 1e-10 * t[name].abs().max(), name


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_against_reference(impl, device, up, last):
    x, w, s = randn(2, 8, 6, 9), randn(4, 8, 3, 3, seed=1), randn(2, 8, seed=2)
    noise = randn(2, 1, 6 * up, 9 * up, seed=3)
    inputs = [t.float().to(device) for t in (x, w, s, noise)]
    if last:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)

    def at(which):
        return lambda x, w, s, n: modulated_conv2d(
            x, w, s, n, up, 1, 1, F4.to(x.device), flip_weight=up == 1, impl=which
        )

    compare(at(impl), at("reference"), inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("order", [outputs_and_grads, second_grads])
def test_colours(impl, device, layout, order):
    """1x1 weights with few outputs: on a CPU each sample's own, and no image times its styles."""
    x, w, s = randn(3, 24, 5, 7), randn(3, 24, 1, 1, seed=1), randn(3, 24, seed=2)
    inputs = [t.float().to(device) for t in (lay_out(x, layout), w, s)]

    def at(which):
        return lambda x, w, s: modulated_conv2d(x, w, s, demodulate=False, impl=which)

    compare(at(impl), at("reference"), inputs, order)
    assert at(impl)(inputs[0][:0], inputs[1], inputs[2][:0]).shape == (0, 3, 5, 7)
    shapes = shapes_made(lambda: at(impl)(*inputs))
    assert (x.shape in shapes) == (impl == "reference" or device != "cpu")


def shapes_made(run):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            views = func in (torch.ops.aten.permute.default, torch.ops.aten.view.default)
            if isinstance(out, torch.Tensor) and not views:
                made.append(out.shape)
            return out

    made: list[torch.Size] = []
    with Record():
        run()
    return made


def materialised(x, weight, styles, f, up, down, padding, demodulate, flip_weight):
    """The definition: each sample convolved with weights of its own."""
    w = weight * styles[:, None, :, None, None]  # [N, O, I, k, k]
    if demodulate:
        w = w / (w.square().sum([2, 3, 4], keepdim=True) + 1e-8).sqrt()
    args = (f, up, down, padding, 1, flip_weight)
    return torch.cat([definition(x[n : n + 1], w[n], *args) for n in range(len(x))])


@st.composite
def cases(draw):
    return {
        "args": {
            "up": draw(st.sampled_from([1, 1, 2, 3])),
            "down": draw(st.sampled_from([1, 1, 2])),
            "padding": draw(PADDINGS),
            "demodulate": draw(st.booleans()),
            "flip_weight": draw(st.booleans()),
        },
        # Demodulation cancels the style of a single input channel, and leaves it a rounded zero.
        "channels": draw(st.tuples(st.integers(1, 9), st.integers(2, 9))),
        "samples": draw(st.integers(1, 2)),
        "kernel": draw(st.sampled_from([1, 2, 3, 5])),
        "taps": draw(st.integers(0, 6)),
        "size": draw(st.tuples(st.integers(4, 9), st.integers(4, 9))),
        "layouts": draw(st.tuples(*[st.sampled_from(["contiguous", "channels_last"])] * 2)),
        "noise": draw(st.sampled_from(["none", "sample", "shared"])),
        "fused": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["f32", "f16", "f32", "bf16"])),
    }


def test_random_arguments(impl, device):
    """The reference against the definition, in float64; implementations with their gradients."""

    @harness.examples(impl)
    @given(cases())
    def run(c):
        (o, i), n, f = c["channels"], c["samples"], None
        if harness.interpreted(impl, device):
            o, i, n, c = min(o, 2), 2, 1, c | {"taps": min(c["taps"], 3)}
        x, weight = randn(n, i, *c["size"]), randn(o, i, c["kernel"], c["kernel"], seed=1)
        tensors = [lay_out(t, on) for t, on in zip((x, weight), c["layouts"], strict=True)]
        tensors.append(randn(n, i, seed=2))
        if c["taps"]:
            f = setup_filter(randn(c["taps"], seed=3).float() + 2, separable=c["taps"] % 2 == 0)
        try:
            exact = harness.once(
                f"exact {o} {i} {n} {c}", lambda: materialised(*tensors, f, **c["args"])
            )
        except (RuntimeError, ValueError):  # nothing is left to convolve or to filter
            with pytest.raises((RuntimeError, ValueError)):
                modulated_conv2d(*tensors, resample_filter=f, impl="reference", **c["args"])
            reject()
        if c["noise"] != "none":
            shape = exact.shape[2:] if c["noise"] == "shared" else (n, 1, *exact.shape[2:])
            tensors.append(randn(*shape, seed=4))
            exact = exact + tensors[-1]

        def at(which):
            def run(x, weight, styles, noise=None):
                return modulated_conv2d(
                    x, weight, styles, noise, fused_modconv=c["fused"], impl=which,
                    resample_filter=None if f is None else f.to(x.device), **c["args"],
                )  # fmt: skip

            return run

        size = max(1.0, exact.abs().max().item())
        if impl == "reference":
            assert max_error(at(impl)(*tensors), exact) <= 1e-9 * size
        else:
            tensors = [t.float().to(device) for t in tensors]
            tensors[0] = tensors[0].to(DTYPES[c["dtype"]])
            # Demodulation cancels the styles' length: their gradient is what large sums leave, and
            # in float32 with roundings of these.
            pair, case = (at(impl), at("reference")), f"{o} {i} {n} {c}"
            orders = harness.output if harness.interpreted(impl, device) else outputs_and_grads
            roundings = 16 if c["dtype"] == "f32" else 4
            y, *_ = compare(*pair, tensors, orders, case=case, nudged=True, roundings=roundings)
            assert y.dtype != torch.float32 or max_error(y, exact) <= 1e-5 * size

    run()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("up", [1, 2])
def test_deterministic(impl, device, up, fused):
    n, i, o = (1, 2, 2) if harness.interpreted(impl, device) else (2, 8, 4)
    tensors = [randn(n, i, 17, 9), randn(o, i, 3, 3, seed=1), randn(n, i, seed=2)]
    tensors = [t.float().to(device) for t in tensors]

    def f(x, w, s):
        return modulated_conv2d(x, w, s, None, up, 1, 1, F4.to(x.device), fused_modconv=fused,
                                impl=impl)  # fmt: skip

    for a, b in zip(outputs_and_grads(f, tensors), outputs_and_grads(f, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_gradcheck(demodulate, fused):
    leaves = [
        randn(2, 3, 4, 5),
        randn(2, 3, 3, 3, seed=1),
        randn(2, 3, seed=2),
        randn(4, 5, seed=3),
    ]
    leaves = [t.requires_grad_() for t in leaves]

    def f(x, w, s, n):
        return modulated_conv2d(x, w, s, n, padding=1, demodulate=demodulate, fused_modconv=fused,
                                impl="reference")  # fmt: skip

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("up", [1, 2])
def test_second_gradients(impl, device, up, fused):
    """Of the gradients in x, as R1 takes, and in the styles, as path length does."""
    n, i, o, side = (1, 3, 2, 4) if harness.interpreted(impl, device) else (2, 18, 16, 17)
    inputs = [randn(n, i, side, side), randn(o, i, 3, 3, seed=1), randn(n, i, seed=2)]
    inputs = [t.float().to(device) for t in inputs]

    def at(which):
        f = F4.to(device)
        return lambda x, w, s: modulated_conv2d(x, w, s, None, up, 1, 1, f, fused_modconv=fused,
                                                impl=which)  # fmt: skip

    for first in (0, 2):
        (run, order), (reference, _) = (led_by(first, at(i), inputs) for i in (impl, "reference"))
        compare(run, reference, order, second_grads, f"of input {first}", nudged=True)


def test_float16_stays_in_range(device):
    """Weights and styles that overflow a float16 sum give the float32 result all the same."""
    x, w, s = randn(2, 64, 8, 8), 300 * randn(8, 64, 3, 3, seed=1), 200 * randn(2, 64, seed=2)
    exact = modulated_conv2d(x, w, s, padding=1, impl="reference")
    y = modulated_conv2d(x.half().to(device), w.float().to(device), s.float().to(device), padding=1)
    assert y.dtype == torch.float16
    assert y.isfinite().all()
    assert max_error(y, exact) <= 4e-3 * exact.abs().max()


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_weight_gradients_off(fused, up):
    x, w, s = randn(2, 2, 4, 4), randn(2, 2, 3, 3, seed=1), randn(2, 2, seed=2)
    leaves = [t.requires_grad_() for t in (x, w, s)]
    y = modulated_conv2d(*leaves, up=up, padding=1, fused_modconv=fused)
    with no_weight_gradients():
        dx, dw, ds = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True,
                                         allow_unused=True)  # fmt: skip
    fx, fw, fs = torch.autograd.grad(y.square().sum(), leaves)
    assert dw is None
    assert fw is not None
    torch.testing.assert_close((dx, ds), (fx, fs), rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(1, 2, 4, 4).int()}, TypeError,
         "x must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"styles": torch.zeros(2, 3)}, ValueError,
         "styles must be (N, I) = (1, 2), got shape (2, 3)"),
        ({"styles": 1}, TypeError, "styles must be a floating-point tensor, got int"),
        ({"styles": torch.ones(1, 2, device="meta")}, ValueError,
         "styles must be on {device} like x, got meta"),
        ({"styles": torch.ones(1, 2, device="meta"), "demodulate": False}, ValueError,
         "styles must be on {device} like x, got meta"),
        ({"weight": torch.zeros(3, 2, 3)}, ValueError,
         "weight must be (O, I / groups, kh, kw), got shape (3, 2, 3)"),
        ({"weight": torch.zeros(3, 2, 3, 3, device="meta")}, ValueError,
         "weight must be on {device} like x, got meta"),
        ({"padding": "same"}, TypeError, "padding must be an int, 2 or 4 ints, got 'same'"),
        ({"padding": 0, "weight": torch.zeros(3, 2, 7, 7)}, ValueError,
         "padding must leave an output of at least 1x1 for x (1, 2, 4, 4), 7x7 taps, up = 1 and "
         "down = 1, got (0, 0, 0, 0)"),
        ({"up": 2, "padding": [-5, -5, 1, 1]}, ValueError,
         "padding must leave an output of at least 1x1 for x (1, 2, 4, 4), 3x3 taps, up = 2 and "
         "down = 1, got (-5, -5, 1, 1)"),
        ({"noise": 1.0}, TypeError, "noise must be a floating-point tensor or None, got float"),
        ({"noise": torch.zeros(4, 4).int()}, TypeError,
         "noise must be a floating-point tensor or None, got torch.int32"),
        ({"noise": torch.zeros(1, 1, 5, 4)}, ValueError,
         "noise must broadcast to (1, 3, 4, 4), got shape (1, 1, 5, 4)"),
        ({"noise": torch.zeros(1, 1, 1, 4, 4)}, ValueError,
         "noise must broadcast to (1, 3, 4, 4), got shape (1, 1, 1, 4, 4)"),
        ({"noise": torch.zeros(4, 4, device="meta")}, ValueError,
         "noise must be on {device} like x, got meta"),
        ({"resample_filter": [1.0, 3.0]}, TypeError,
         "resample_filter must be None or a tensor of shape (taps,) or (taps_y, taps_x), got list"),
        ({"resample_filter": F4.half()}, TypeError,
         "resample_filter must be float32, got torch.float16"),
        ({"resample_filter": F4.to("meta")}, ValueError,
         "resample_filter must be on the device of x, {device}, got meta"),
        ({"down": 0}, ValueError, "down must be an int of at least 1, got 0"),
        ({"demodulate": "no"}, TypeError, "demodulate must be True or False, got 'no'"),
        ({"flip_weight": None}, TypeError, "flip_weight must be True or False, got None"),
        ({"fused_modconv": 2}, TypeError, "fused_modconv must be True or False, got 2"),
    ],
)  # fmt: skip
def test_errors(impl, device, change, error, text, fused):
    args = {"x": torch.zeros(1, 2, 4, 4), "weight": torch.zeros(3, 2, 3, 3), "padding": 1,
            "styles": torch.ones(1, 2), "fused_modconv": fused, "impl": impl} | change  # fmt: skip
    args = {k: v.to(device) if torch.is_tensor(v) and not v.is_meta else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        modulated_conv2d(**args)
    text = text.format(device=torch.empty(0, device=device).device)
    assert str(caught.value) == f"modulated_conv2d: {text}"
