"""Progressive GAN, StyleGAN, WGAN and the options of the conv nets: sizes, growth, what they do."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gankern import models
from gankern.models import dcgan, levels, pggan, stylegan, wgan
from gankern.nn.attention import MinibatchDiscrimination, SelfAttention
from gankern.nn.mapping import mix_styles
from gankern.training.config import TrainConfig

TINY = {"channel_base": 32, "channel_max": 8}


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def labels(n, c_dim):
    return torch.eye(c_dim)[torch.arange(n) % c_dim] if c_dim else None


def pair(name, resolution=(16, 16), channels=3, c_dim=0):
    torch.manual_seed(0)
    if name == "pggan":
        G = pggan.Generator(6, c_dim, resolution, channels, **TINY)
        return G, pggan.Discriminator(c_dim, resolution, channels, **TINY)
    G = stylegan.Generator(6, c_dim, 8, resolution, channels, mapping_layers=2, **TINY)
    size = {"c_dim": c_dim, "resolution": resolution, "channels": channels}
    return G, stylegan.make_discriminator(**size, **TINY)


def test_have_the_published_number_of_parameters():
    with torch.device("meta"):
        assert count(pggan.Generator()) == 23_079_115
        assert count(pggan.Discriminator()) == 23_087_249
        assert count(stylegan.Generator()) == 26_219_627


SHAPES = [((16, 16), 1, 0), ((16, 40), 3, 3), ((28, 28), 4, 10)]


@pytest.mark.parametrize("name", models.GROWING)
@pytest.mark.parametrize(("resolution", "channels", "c_dim"), SHAPES, ids=str)
def test_makes_and_judges_images_of_every_level(name, resolution, channels, c_dim):
    G, D = pair(name, resolution, channels, c_dim)
    z, c = torch.randn(4, 6), labels(4, c_dim)
    top = len(D.sizes) - 1
    for growth in [*(step / 2 for step in range(2 * top)), top]:
        G.set_growth(growth), D.set_growth(growth)
        img = G(z, c)
        assert img.shape == (4, channels, *D.sizes[math.ceil(growth)])
        logits = D(img, c)
        assert logits.shape == (4, 1)
    logits.sum().backward()
    used = [p for n, p in D.named_parameters() if f"fromrgbs.{top}" in n or "blocks" in n]
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in used)


@pytest.mark.parametrize("name", models.GROWING)
def test_growth_is_continuous(name):
    G, D = (net.double().eval() for net in pair(name))
    z = torch.randn(4, 6, dtype=torch.float64)
    G.set_growth(1), D.set_growth(1)
    small = G(z)
    logits = D(small)
    G.set_growth(1 + 1e-9), D.set_growth(1 + 1e-9)
    img = G(z)
    torch.testing.assert_close(img, levels.double(small), atol=1e-6, rtol=0)
    torch.testing.assert_close(D(img), logits, atol=1e-6, rtol=0)
    G.set_growth(2 - 1e-9)
    almost = G(z)
    G.set_growth(2)
    torch.testing.assert_close(almost, G(z), atol=1e-6, rtol=0)


def test_growth_is_saved_with_the_weights():
    G, _ = pair("pggan")
    G.set_growth(0.5)
    other, _ = pair("pggan")
    other.load_state_dict(G.state_dict())
    assert (other.level, other.alpha) == (1, 0.5)
    with pytest.raises(ValueError, match="growth must be from 0 to 2, got 3"):
        G.set_growth(3)


def test_real_images_shrink_and_blur_as_D_sees_them():
    _, D = pair("pggan")
    img = torch.rand(2, 3, 16, 16)
    D.set_growth(1)
    torch.testing.assert_close(levels.shrink(img, D), F.avg_pool2d(img, 2))
    D.set_growth(0.25)
    half, quarter = F.avg_pool2d(img, 2), F.avg_pool2d(img, 4)
    blurred = F.interpolate(quarter, scale_factor=2)
    torch.testing.assert_close(levels.shrink(img, D), 0.75 * blurred + 0.25 * half)


def test_pggan_normalises_every_pixel():
    G, _ = pair("pggan")
    x = G.blocks[0](torch.randn(2, 6))
    torch.testing.assert_close(x.square().mean(1), torch.ones(2, 4, 4), atol=1e-4, rtol=0)


def test_stylegan_up_convolution_is_double_convolve_blur():
    torch.manual_seed(0)
    G, _ = pair("stylegan")
    conv = G.synthesis.blocks[1].conv0
    x = torch.randn(2, 8, 4, 4)
    plain = F.conv2d(levels.double(x), conv.weight.flip([2, 3]) * conv.weight_gain, padding=1)
    blur = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 2, 1])) / 16
    blurred = F.conv2d(
        plain, blur.expand(len(conv.weight), 1, 3, 3), padding=1, groups=len(conv.weight)
    )
    # Doubling has four taps once joined with the blur; the image's rim sees other zeros.
    torch.testing.assert_close(conv(x)[:, :, 2:-2, 2:-2], blurred[:, :, 2:-2, 2:-2])


def test_stylegan_styles_decide_scale_and_shift():
    G, _ = pair("stylegan")
    x = G.synthesis.blocks[0](None, torch.zeros(3, 2, 8), "none")
    torch.testing.assert_close(x.mean([2, 3]), torch.zeros(3, 8), atol=1e-4, rtol=0)
    img = G(torch.randn(1, 6), noise_mode="const")
    assert torch.equal(img, G(torch.zeros(1, 6) + 0, noise_mode="const")) is False
    with pytest.raises(ValueError, match="noise_mode must be random, const or none, got 'no'"):
        G(torch.randn(1, 6), noise_mode="no")


def test_style_mixing_takes_the_layers_from_the_crossover_on():
    ws, other = torch.zeros(3, 4, 2), torch.ones(3, 4, 2)
    mixed = mix_styles(ws, other, torch.tensor([0, 1, 4]))
    assert mixed[:, :, 0].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]
    G, _ = pair("stylegan")
    G.eval()
    a, b = torch.randn(2, 6), torch.randn(2, 6)
    cut = torch.tensor([G.num_ws, 0])
    img = G(a, z_mix=b, crossover=cut)
    torch.testing.assert_close(img[0], G(a)[0])
    torch.testing.assert_close(img[1], G(b)[1])


# WGAN.


def test_dense_critic_is_784_512_256_1():
    D = wgan.make_critic((28, 28), 1, form="fc")
    assert count(D) == 784 * 512 + 512 + 512 * 256 + 256 + 256 + 1
    G = wgan.make_generator(7, (28, 28), 1, form="fc")
    assert D(G(torch.randn(2, 7))).shape == (2, 1)


def test_layer_norm_looks_at_one_image():
    torch.manual_seed(0)
    D = dcgan.Discriminator((16, 16), 1, width=4, norm="layer")
    x = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(D(x)[:1], D(x[:1]))


# Options of the conv nets.


@pytest.mark.parametrize("model", ["vanilla", "dcgan", "wgan", "wgan fc"])
@pytest.mark.parametrize("condition", ["projection", "concat"])
def test_condition_changes_the_logit(model, condition):
    model, _, form = model.partition(" ")
    config = TrainConfig(
        model=model, form=form or "conv", d_condition=condition, d_dropout=0, width=2, d_width=2,
        d_norm="none", resolution=(16, 16), channels=1, num_classes=3,
    )  # fmt: skip
    torch.manual_seed(0)
    G, D = models.build(config)
    img = torch.randn(2, 1, 16, 16)
    assert (getattr(D, "embed", None) is not None) == (condition == "projection")
    assert not torch.allclose(D(img, labels(2, 3)), D(img, labels(2, 3).flip(0)))
    vectors = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.1, 0.2]])  # not only classes
    z = torch.zeros(2, config.z_dim)
    G.train(False)
    assert not torch.allclose(*G(z, vectors))


def test_spectral_norm_makes_every_layer_of_norm_one():
    torch.manual_seed(0)
    D = dcgan.Discriminator((16, 16), 1, width=4, norm="none", spectral="d")
    for _ in range(100):
        D(torch.zeros(1, 1, 16, 16))
    for layer in D.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            sigma = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
            assert sigma == pytest.approx(1, abs=0.02)


def test_bilinear_upsampling_has_no_checkerboard():
    torch.manual_seed(0)
    G = dcgan.Generator(4, (32, 32), 1, width=4, upsample="bilinear")
    y = G.convs[0](torch.ones(1, 16, 4, 4))
    inner = y[:, :, 2:-2, 2:-2]
    assert (inner - inner[:, :, :1, :1]).abs().max() < 1e-6


def test_attention_starts_as_the_identity_and_mixes_places():
    torch.manual_seed(0)
    layer = SelfAttention(8).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    assert torch.equal(layer(x), x)
    nn.init.constant_(layer.gamma, 1.0)
    y = layer(x)
    changed = x.clone()
    changed[:, :, 0, 0] += 1
    assert ((layer(changed) - y).abs().amax(1) > 1e-9).all()
    assert torch.autograd.gradgradcheck(
        lambda t: layer(t).tanh(), x[:1].clone().requires_grad_(), atol=1e-4
    )
    with pytest.raises(ValueError, match="attention must be at one of G's grids 4, 8, got 5"):
        dcgan.Generator(4, (16, 16), attention=5)


def test_minibatch_discrimination_counts_close_neighbours():
    layer = MinibatchDiscrimination(3, 5)
    same = layer(torch.ones(4, 3))
    assert same.shape == (4, 8)
    torch.testing.assert_close(same[:, 3:], torch.full((4, 5), 3.0))  # three others at distance 0
    far = layer(torch.eye(3) * 1e3)
    assert far[:, 3:].max() < 1e-3
