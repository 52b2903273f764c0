"""modulated_conv2d: golden vectors, the materialised definition, gradients, range of float16."""

from __future__ import annotations

import pytest
import torch
from harness import compare, golden, max_error, randn

from gankern.ops import modulated_conv2d, setup_filter
from gankern.ops.modulated_conv2d import demod_coefs, no_weight_gradients

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


def test_demodulated_weights_have_norm_1():
    weight, styles = randn(5, 7, 3, 3), randn(4, 7, seed=1)
    w = weight * styles[:, None, :, None, None]  # [N, O, I, k, k]
    norms = (w * demod_coefs(weight, styles)[:, :, None, None, None]).flatten(2).norm(dim=2)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-7, atol=0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_demod_coefs(impl, device, dtype):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels compute in float32")
    weight, styles = randn(37, 19, 3, 3), randn(5, 19, seed=1)
    inputs = [t.to(dtype).to(device) for t in (weight, styles)]
    compare(lambda w, s: demod_coefs(w, s, impl=impl),
            lambda w, s: demod_coefs(w, s, impl="reference"), inputs)  # fmt: skip


def test_float16_stays_in_range(device):
    """Weights and styles that overflow a float16 sum give the float32 result all the same."""
    x, w, s = randn(2, 64, 8, 8), 300 * randn(8, 64, 3, 3, seed=1), 200 * randn(2, 64, seed=2)
    exact = modulated_conv2d(x, w, s, padding=1, impl="reference")
    y = modulated_conv2d(x.half().to(device), w.float().to(device), s.float().to(device), padding=1)
    assert y.dtype == torch.float16
    assert y.isfinite().all()
    assert max_error(y, exact) <= 4e-3 * exact.abs().max()


def test_weight_gradients_off():
    x, w, s = randn(1, 2, 4, 4), randn(2, 2, 3, 3, seed=1), randn(1, 2, seed=2)
    leaves = [t.requires_grad_() for t in (x, w, s)]
    y = modulated_conv2d(*leaves, padding=1)
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
def test_errors(change, error, text):
    args = {"x": torch.zeros(1, 2, 4, 4), "weight": torch.zeros(3, 2, 3, 3),
            "styles": torch.ones(1, 2)} | change  # fmt: skip
    with pytest.raises(error) as caught:
        modulated_conv2d(**args)
    assert str(caught.value) == text
