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


SIZES = [(16, 16), (28, 28), (32, 32), (64, 64), (128, 128), (30, 30), (8, 8), (64, 32), (28, 56),
         (16, 250), (66, 40)]  # fmt: skip


@pytest.mark.parametrize("resolution", SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_dcgan_makes_and_judges_images_of_its_size(resolution, channels):
    G = dcgan.Generator(7, resolution, channels, width=4)
    D = dcgan.Discriminator(resolution, channels, width=4)
    img = G(torch.randn(2, 7))
    assert img.shape == (2, channels, *resolution)
    assert img.abs().max() <= 1
    logits = D(img)
    assert logits.shape == (2, 1)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in (*G.parameters(), *D.parameters()))


@pytest.mark.parametrize(
    ("resolution", "grid", "doublings", "judged"),
    [
        ((16, 16), (4, 4), 2, 4 * 4), ((28, 28), (7, 7), 2, 3 * 3), ((32, 32), (4, 4), 3, 4 * 4),
        ((64, 64), (4, 4), 4, 4 * 4), ((128, 128), (4, 4), 5, 4 * 4), ((8, 8), (4, 4), 1, 4 * 4),
        ((96, 64), (6, 4), 4, 6 * 4), ((64, 96), (4, 6), 4, 4 * 6), ((28, 56), (7, 14), 2, 3 * 7),
        ((24, 1000), (6, 250), 2, 6 * 250), ((66, 66), (33, 33), 1, 4 * 4),
        ((1080, 1920), (135, 240), 3, 4 * 7),
    ],
    ids=str,
)  # fmt: skip
def test_dcgan_starts_from_the_smallest_grid(resolution, grid, doublings, judged):
    assert dcgan.grid_and_doublings(resolution) == (grid, doublings)
    with torch.device("meta"):
        G = dcgan.Generator(7, resolution, 3, width=4)
        D = dcgan.Discriminator(resolution, 3, width=4)
    widths = [4 << k for k in reversed(range(doublings))]
    assert [conv.in_channels for conv in G.convs] == widths
    assert G.project.weight.shape == (widths[0] * grid[0] * grid[1], 7)
    assert D.logit.in_features == D.layers[-1].conv.out_channels * judged


def test_dcgan_checkpoints_keep_their_names_and_shapes():
    G = dcgan.Generator(100, (28, 28), 1, width=64)
    D = dcgan.Discriminator((28, 28), 1, width=32)
    shapes = [{n: tuple(p.shape) for n, p in net.named_parameters()} for net in (G, D)]
    assert shapes[0] == {
        "bias": (1,), "project.weight": (6272, 100),
        "norms.0.weight": (128,), "norms.0.bias": (128,), "convs.0.weight": (128, 64, 4, 4),
        "norms.1.weight": (64,), "norms.1.bias": (64,), "convs.1.weight": (64, 1, 4, 4),
    }  # fmt: skip
    assert shapes[1] == {
        "layers.0.bias": (32,), "layers.0.conv.weight": (32, 1, 4, 4),
        "layers.1.conv.weight": (64, 32, 4, 4),
        "layers.1.norm.weight": (64,), "layers.1.norm.bias": (64,),
        "layers.2.conv.weight": (128, 64, 4, 4),
        "layers.2.norm.weight": (128,), "layers.2.norm.bias": (128,),
        "logit.weight": (1, 1152), "logit.bias": (1,),
    }  # fmt: skip


def test_dcgan_widens_up_to_16_times():
    with torch.device("meta"):
        G = dcgan.Generator(7, (512, 256), 3, width=4)
        D = dcgan.Discriminator((512, 256), 3, width=4)
    assert [conv.in_channels for conv in G.convs] == [64, 64, 32, 16, 8, 4]
    assert [layer.conv.out_channels for layer in D.layers] == [4, 8, 16, 32, 64, 64]


def test_attention_goes_by_the_shorter_side():
    options = {"width": 4, "attention": 8}
    G = dcgan.Generator(7, (24, 16), 3, **options)
    D = dcgan.Discriminator((24, 16), 3, **options)
    seen = []
    for net, layer in ((G, G.attention["8"]), (D, D.layers[1])):
        layer.register_forward_hook(lambda _, x, y: seen.append(tuple(y.shape[1:])))
        layer.gamma.data.fill_(1)
        net.eval()
    assert D(G(torch.randn(2, 7))).isfinite().all()
    assert seen == [(4, 12, 8), (4, 12, 8)]
    with pytest.raises(ValueError, match="attention must be at one of D's grids 4, 8, got 12"):
        dcgan.Discriminator((24, 16), attention=12)


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


@pytest.mark.parametrize("resolution", [(15, 15), (64, 33), (6, 64), (4, 4)])
def test_dcgan_refuses_other_sizes(resolution):
    text = r"resolution must be \(h \* 2\^k\) x \(w \* 2\^k\) with h, w >= 4 and k >= 1, got "
    for net in (dcgan.Generator, dcgan.Discriminator):
        with pytest.raises(ValueError, match=text + "{}x{}".format(*resolution)):
            net(resolution=resolution)


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
