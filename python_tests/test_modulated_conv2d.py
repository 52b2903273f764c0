"""modulated_conv2d: golden vectors, the materialised definition, gradients, range of float16."""

from __future__ import annotations

import harness
import pytest
import torch
from harness import (
    compare,
    golden,
    lay_out,
    max_error,
    outputs_and_grads,
    randn,
    second_grads,
)
from hypothesis import given
from hypothesis import strategies as st
from test_conv2d_resample import definition
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
            "padding": draw(st.integers(-1, 3)),
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
            return
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
            # Demodulation cancels the styles' length: their gradient is what large sums leave.
            case = f"{o} {i} {n} {c}"
            orders = harness.output if harness.interpreted(impl, device) else outputs_and_grads
            y, *_ = compare(at(impl), at("reference"), tensors, orders, case=case, nudged=True)
            assert max_error(y, exact) <= 1e-5 * size

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


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"styles": torch.zeros(2, 3)}, ValueError,
         "modulated_conv2d: styles must be (N, I) = (1, 2), got shape (2, 3)"),
        ({"styles": 1}, TypeError,
         "modulated_conv2d: styles must be a floating-point tensor, got int"),
        ({"weight": torch.zeros(3, 2, 3)}, ValueError,
         "modulated_conv2d: weight must be (O, I / groups, kh, kw), got shape (3, 2, 3)"),
        ({"padding": "same"}, ValueError,
         "modulated_conv2d: padding must be an int, 2 or 4 ints, got same"),
    ],
)  # fmt: skip
def test_errors(impl, device, change, error, text):
    args = {"x": torch.zeros(1, 2, 4, 4), "weight": torch.zeros(3, 2, 3, 3),
            "styles": torch.ones(1, 2)} | change  # fmt: skip
    args = {k: v.to(device) if torch.is_tensor(v) else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        modulated_conv2d(**args, impl=impl)
    assert str(caught.value) == text
