"""gankern.nn: against their formulas, in Sequential, autocast, compile, export, state dict."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gankern.nn as gn
from gankern.ops import bias_act, modulated_conv2d
from gankern.ops.conv2d_resample import no_weight_gradients


def discriminator() -> nn.Module:
    return nn.Sequential(
        gn.EqualizedConv2d(3, 8, 1, act="lrelu"),
        gn.EqualizedConv2d(8, 8, act="lrelu", clamp=256),
        gn.EqualizedConv2d(8, 16, act="lrelu", down=2),
        gn.MinibatchStdDev(group_size=2),
        nn.Flatten(),
        gn.EqualizedLinear(17 * 64, 16, act="lrelu"),
        gn.EqualizedLinear(16, 1),
    )


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(
            gn.PixelNorm(), gn.EqualizedLinear(8, 8, act="lrelu", lr_multiplier=0.01)
        )
        self.conv0 = gn.SynthesisLayer(6, 8, 8, 16, up=2)
        self.conv1 = gn.SynthesisLayer(8, 8, 8, 16)
        self.torgb = gn.ToRGB(8, 3, 8)
        self.upsample = gn.Upsample()

    def forward(self, x, z):
        w = self.mapping(z)
        img = self.torgb(self.conv1(self.conv0(x, w, "const"), w, "const"), w)
        return img + self.upsample(self.torgb(x.repeat(1, 2, 1, 1)[:, :8], w))


def test_equalized_linear():
    layer, x = (
        gn.EqualizedLinear(5, 7, act="lrelu", lr_multiplier=0.1, bias_init=2),
        torch.randn(3, 5),
    )
    w, b = layer.weight * 0.1 / math.sqrt(5), layer.bias * 0.1
    exact = nn.functional.leaky_relu(x @ w.t() + b, 0.2) * math.sqrt(2)
    torch.testing.assert_close(layer(x), exact)
    torch.testing.assert_close(layer.bias * 0.1, torch.full((7,), 2.0))
    assert layer(torch.randn(2, 0, 5)).shape == (2, 0, 7)


@pytest.mark.parametrize("act", ["linear", "lrelu"])
def test_equalized_linear_without_bias(act):
    """Nothing is added, neither in eager mode nor compiled nor in a transform."""
    layer, x = gn.EqualizedLinear(5, 7, bias=False, act=act), torch.randn(3, 5)
    exact = x @ layer.weight.t() / math.sqrt(5)
    if act == "lrelu":
        exact = nn.functional.leaky_relu(exact, 0.2) * math.sqrt(2)
    for _ in range(4):
        torch.testing.assert_close(layer(x), exact)
    torch.testing.assert_close(torch.func.vmap(layer)(x), exact)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), exact)


def test_equalized_linear_is_differentiable_twice():
    layer = gn.EqualizedLinear(3, 4, lr_multiplier=0.5, bias_init=1).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)

    def f(x, weight, bias):
        state = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, state, (x, 2.0))

    exact = 2 * (x @ layer.weight.t() * layer.weight_gain + layer.bias / 2)
    torch.testing.assert_close(f(*inputs), exact)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
    with no_weight_gradients():
        dx, dw, db = torch.autograd.grad(f(*inputs).sum(), inputs, allow_unused=True)
    torch.testing.assert_close(dx, torch.autograd.grad(exact.sum(), x)[0])
    assert dw is None
    assert db is None


def test_equalized_conv2d():
    layer, x = gn.EqualizedConv2d(4, 6, act="lrelu"), torch.randn(2, 4, 8, 8)
    nn.init.normal_(layer.bias)
    y = nn.functional.conv2d(x, layer.weight / 6, layer.bias, padding=1)
    torch.testing.assert_close(layer(x, gain=0.5), bias_act(y, act="lrelu") * 0.5)


@pytest.mark.parametrize("options", [{}, {"down": 2}, {"up": 2}, {"clamp": 0.3}, {"bias": True}])
def test_gain_of_a_linear_equalized_conv2d(options):
    layer = gn.EqualizedConv2d(3, 4, **({"bias": False} | options))
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(layer(x, gain=0.5), layer(x) * 0.5)
    if not options:  # the gain is in the weights, and nothing follows the convolution
        y = layer(x, gain=0.5)
        assert "Convolution" in y.grad_fn.name()


def test_synthesis_layer_is_modulated_conv_noise_and_activation():
    layer = gn.SynthesisLayer(4, 6, 8, 16, up=2)
    nn.init.constant_(layer.noise_strength, 0.3)
    nn.init.normal_(layer.bias)
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 8)
    y = modulated_conv2d(x, layer.weight, layer.affine(w), layer.noise_const * 0.3, 2, 1, 1,
                         layer.resample_filter, flip_weight=False)  # fmt: skip
    torch.testing.assert_close(layer(x, w, "const"), bias_act(y, layer.bias, act="lrelu"),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert not torch.equal(layer(x, w), layer(x, w))
    assert torch.equal(layer(x, w, "none"), layer(x, w, "none"))


def test_published_names():
    names = set(gn.SynthesisLayer(4, 6, 8, 16).state_dict())
    assert names == {"weight", "bias", "noise_strength", "noise_const", "resample_filter",
                     "affine.weight", "affine.bias"}  # fmt: skip
    assert set(gn.ToRGB(4, 3, 8).state_dict()) == {"weight", "bias", "affine.weight", "affine.bias"}
    assert set(gn.EqualizedConv2d(3, 4).state_dict()) == {"weight", "bias", "resample_filter"}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (gn.Upsample(), (2, 3, 16, 16)), (gn.Downsample(), (2, 3, 4, 4)),
        (gn.Blur(), (2, 3, 8, 8)), (gn.FusedLeakyReLU(3), (2, 3, 8, 8)),
        (gn.NoiseInjection(), (2, 3, 8, 8)), (gn.NoiseInjection(3), (2, 3, 8, 8)),
        (gn.PixelNorm(), (2, 3, 8, 8)), (gn.MinibatchStdDev(), (2, 4, 8, 8)),
        (gn.ModulatedConv2d(3, 5, up=2), None),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)  # fmt: skip
def test_shapes_and_gradients(layer, shape):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = layer(x) if shape else layer(x, torch.randn(2, 3))
    assert y.shape == (shape or (2, 5, 16, 16))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert repr(layer).startswith(type(layer).__name__)


def test_adain():
    layer, x, w = gn.AdaIN(3, 8), torch.randn(2, 3, 9, 9) * 3 + 1, torch.randn(2, 8)
    y, (scale, shift) = layer(x, w), layer.affine(w).chunk(2, 1)
    torch.testing.assert_close(y.mean((2, 3)), shift, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        y.std((2, 3), unbiased=False), (1 + scale).abs(), rtol=1e-3, atol=1e-3
    )


def test_training_step_reaches_every_parameter():
    g, d = Generator(), discriminator()
    nn.init.constant_(g.conv0.noise_strength, 0.1)
    img = g(torch.randn(4, 6, 8, 8), torch.randn(4, 8))
    d(img).sum().backward()
    for name, p in [*g.named_parameters(), *d.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_second_order_through_both():
    g, d = Generator(), discriminator()
    img = g(torch.randn(2, 6, 8, 8), torch.randn(2, 8)).detach().requires_grad_()
    (r1,) = torch.autograd.grad(d(img).sum(), img, create_graph=True)
    r1.square().sum().backward()
    z = torch.randn(2, 8, requires_grad=True)
    (pl,) = torch.autograd.grad(g(torch.randn(2, 6, 8, 8), z).sum(), z, create_graph=True)
    pl.square().sum().backward()
    assert g.conv0.weight.grad.isfinite().all()
    assert d[1].weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    g, d = Generator(), discriminator()
    x, z = torch.randn(2, 6, 8, 8), torch.randn(2, 8)
    exact = d(g(x, z))
    with torch.autocast("cpu", dtype):
        logits = d(g(x, z))
    logits.float().sum().backward()
    assert max(p.grad.isfinite().all() for p in g.parameters() if p.grad is not None)
    torch.testing.assert_close(logits.float(), exact, rtol=0.2, atol=0.2)


def test_channels_last():
    g = Generator().to(memory_format=torch.channels_last)
    x, z = torch.randn(2, 6, 8, 8), torch.randn(2, 8)
    torch.testing.assert_close(g(x.contiguous(memory_format=torch.channels_last), z), g(x, z),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_compile_and_export():
    g, d = Generator().eval(), discriminator().eval()
    x, z = torch.randn(2, 6, 8, 8), torch.randn(2, 8)
    eager = g(x, z)
    torch.testing.assert_close(torch.compile(g, fullgraph=True)(x, z), eager, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        exported = torch.export.export(g, (x, z)).module()
        torch.testing.assert_close(exported(x, z), eager, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.export.export(d, (eager,)).module()(eager), d(eager))


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"act must be one of linear, relu.*got 'mish'"):
        gn.EqualizedLinear(2, 3, act="mish")
