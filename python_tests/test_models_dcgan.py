"""DCGAN and the fully connected GAN: shapes, size, start, and what they compute."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from gankern import models
from gankern.models import dcgan, vanilla
from gankern.nn.batch_norm import BatchNorm
from gankern.training.config import TrainConfig


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("size", [16, 28, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_dcgan_makes_and_judges_images_of_its_size(size, channels):
    G = dcgan.Generator(7, (size, size), channels, width=4)
    D = dcgan.Discriminator((size, size), channels, width=4)
    img = G(torch.randn(2, 7))
    assert img.shape == (2, channels, size, size)
    assert img.abs().max() <= 1
    assert D(img).shape == (2, 1)


def test_dcgan_28_is_7x7x128_14x14x64_28x28x1():
    G = dcgan.Generator(100, (28, 28), 1, width=64)
    shapes = []
    for conv in G.convs:
        conv.register_forward_pre_hook(lambda _, x: shapes.append(tuple(x[0].shape[1:])))
    assert G(torch.zeros(1, 100)).shape[1:] == (1, 28, 28)
    assert shapes == [(128, 7, 7), (64, 14, 14)]
    dense, up, norms = 100 * 128 * 49, (128 * 64 + 64 * 1) * 16, 2 * (128 + 64)
    assert count(G) == dense + up + norms + 1


def test_dcgan_64_has_the_papers_channels():
    G = dcgan.Generator(100, (64, 64), 3, width=128)
    assert [conv.in_channels for conv in G.convs] == [1024, 512, 256, 128]
    D = dcgan.Discriminator((64, 64), 3, width=128)
    assert [layer.conv.out_channels for layer in D.layers] == [128, 256, 512, 1024]
    assert [layer.norm is None for layer in D.layers] == [True, False, False, False]


@pytest.mark.parametrize("resolution", [(30, 30), (8, 8), (64, 32), (256, 256)])
def test_dcgan_refuses_other_sizes(resolution):
    with pytest.raises(ValueError, match=f"resolution must be .*, got {resolution[0]}x"):
        dcgan.Generator(100, resolution)


def test_dcgan_starts_as_the_paper_says():
    torch.manual_seed(0)
    G = dcgan.Generator(100, (32, 32), 3, width=64)
    for weight in (G.project.weight, G.convs[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert G.norms[0].weight.mean().item() == pytest.approx(1, abs=0.01)
    assert G.norms[0].weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_dcgan_equals_the_same_net_of_torch_modules():
    torch.manual_seed(0)
    G = dcgan.Generator(10, (16, 16), 3, width=4).double()
    norms = [nn.BatchNorm2d(n.weight.numel()).double() for n in G.norms]
    for norm, own in zip(norms, G.norms, strict=True):
        norm.load_state_dict(own.state_dict(), strict=False)
    z = torch.randn(5, 10, dtype=torch.float64)
    x = (z @ G.project.weight.t()).reshape(5, 8, 4, 4)
    for norm, conv in zip(norms, G.convs, strict=True):
        x = conv(torch.relu(norm(x)))
    torch.testing.assert_close(G(z), torch.tanh(x + G.bias.reshape(1, 3, 1, 1)))

    D = dcgan.Discriminator((16, 16), 3, width=4, norm="none").double()
    x = img = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    for layer in D.layers:
        layer.bias.data.normal_()
        x = nn.functional.leaky_relu(layer.conv(x) + layer.bias.reshape(1, -1, 1, 1), 0.2)
    torch.testing.assert_close(D(img), D.logit(x.flatten(1)))


def test_dropout_acts_in_training_only():
    D = dcgan.Discriminator((28, 28), 1, width=4, norm="none", dropout=0.5)
    img = torch.randn(4, 1, 28, 28)
    assert not torch.equal(D(img), D(img))
    D.eval()
    assert torch.equal(D(img), D(img))


def test_vanilla_layers():
    G, D = vanilla.Generator(), vanilla.Discriminator()
    sizes = [100, 256, 512, 1024, 784]
    assert count(G) == sum(i * o + o for i, o in pairwise(sizes))
    img = G(torch.randn(3, 100))
    assert img.shape == (3, 1, 28, 28)
    assert img.abs().max() <= 1
    assert D(img).shape == (3, 1)


@pytest.mark.parametrize("model", models.MODELS)
def test_build_reads_the_configuration(model):
    config = TrainConfig(model=model, z_dim=11, width=4, d_width=2)
    config = replace(config, resolution=(28, 28), channels=1)
    G, D = models.build(config)
    assert (G.z_dim, G.c_dim) == (11, 0)
    assert D(G(torch.randn(2, 11))).shape == (2, 1)


def test_presets_are_options_of_the_configuration():
    for values in models.PRESETS.values():
        TrainConfig(**values).check()


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 2)])
def test_batch_norm_equals_torchs(shape):
    torch.manual_seed(0)
    ours, theirs = BatchNorm(3).double(), nn.BatchNorm1d(3).double()
    if len(shape) == 4:
        theirs = nn.BatchNorm2d(3).double()
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
