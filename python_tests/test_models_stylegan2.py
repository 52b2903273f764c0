"""StyleGAN2: published sizes and parameters, golden networks, shapes, 16 bits, compile, export."""

import numpy as np
import pytest
import torch
from harness import DATA
from torch import nn

from gankern import models
from gankern.models import stylegan2
from gankern.nn import MappingNetwork
from gankern.ops import _impl
from gankern.training.config import TrainConfig, make_config

TINY = {"channel_base": 32, "channel_max": 8, "mapping_layers": 2}


def run_in(impl, monkeypatch):
    """Every op runs in this implementation where it has a kernel."""
    monkeypatch.setattr(_impl, "_OVERRIDE", impl)
    monkeypatch.setattr(_impl, "_default", {})


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def tiny_pair(resolution=(16, 16), channels=3, c_dim=0, **options):
    torch.manual_seed(0)
    options = TINY | options
    G = stylegan2.Generator(6, c_dim, 8, resolution, channels, **options)
    return G, stylegan2.Discriminator(c_dim, resolution, channels, **options)


def labels(n, c_dim):
    return torch.eye(c_dim)[torch.arange(n) % c_dim] if c_dim else None


# Parameters.


@pytest.mark.parametrize(
    ("size", "config", "g", "d"),
    [
        (64, "E", 23_819_544, 23_407_361),
        (256, "E", 24_767_458, 24_001_089),
        (256, "F", 30_034_338, 28_864_129),
        (1024, "F", 30_370_060, 29_012_513),
    ],
)
def test_has_the_published_number_of_parameters(size, config, g, d):
    base = stylegan2.CONFIGS[config]
    with torch.device("meta"):
        G = stylegan2.Generator(resolution=(size, size), channel_base=base)
        D = stylegan2.Discriminator(resolution=(size, size), channel_base=base)
    assert (count(G), count(D)) == (g, d)


def test_is_a_model_of_the_configuration():
    config = TrainConfig(
        model="stylegan2", z_dim=6, w_dim=8, channel_base=32, channel_max=4, mapping_layers=2,
        resolution=(28, 28), channels=1,
    )  # fmt: skip
    G, D = models.build(config)
    img = G(torch.randn(2, 6))
    assert img.shape == (2, 1, 28, 28)
    assert D(img).shape == (2, 1)
    assert G.mapping.num_layers == 2
    assert G.synthesis.b16.conv1.weight.shape == (2, 2, 3, 3)


def test_starts_as_the_paper_says():
    G, D = tiny_pair()
    assert torch.equal(G.synthesis.b8.conv0.affine.bias, torch.ones(8))
    assert G.synthesis.b8.conv0.noise_strength == 0
    assert G.synthesis.b4.torgb.bias.eq(0).all()
    assert D.b4.fc.weight.std().item() == pytest.approx(1, rel=0.1)
    assert G.mapping.fc1.weight.std().item() == pytest.approx(100, rel=0.3)  # over lr_multiplier


# Golden networks.


def golden_pair(c_dim, device):
    with np.load(DATA / f"stylegan2_c{c_dim}.npz") as arrays:
        state = {k: torch.from_numpy(arrays[k]).to(device) for k in arrays.files}
    size = {"channel_base": 512, "channel_max": 32}
    G = stylegan2.Generator(32, c_dim, 32, (32, 32), mapping_layers=3, **size).to(device).eval()
    D = stylegan2.Discriminator(c_dim, (32, 32), **size).to(device).eval()
    stylegan2.load_published(G, D, state)
    return G, D, state


def small_levels_logits(D, img, monkeypatch):
    """Logits of 4 images of which Triton's interpreter computes what is small: D's level b4, and of
    the first image b8; the reference the rest."""
    run_in("reference", monkeypatch)
    x = D.b16(D.b32(img))
    others = D.b8(x[1:])
    run_in("triton", monkeypatch)
    return D.b4(torch.cat([D.b8(x[:1]), others]))


@pytest.mark.parametrize("c_dim", [0, 3])
@torch.no_grad()
def test_golden_networks(impl, device, c_dim, monkeypatch, pytestconfig):
    G, D, golden = golden_pair(c_dim, device)
    # The interpreter takes 15 s for an image and 100 for four logits: in part, unless --whole.
    cut = impl == "triton" and device == "cpu" and not pytestconfig.getoption("--whole")
    n = 1 if cut else 4
    z, c = golden["z"][:n], golden["c"][:n] if c_dim else None
    run_in(impl, monkeypatch)
    if cut and not c_dim:
        outputs = {"logits": small_levels_logits(D, golden["img"], monkeypatch)}
    else:
        outputs = {
            "ws": G.mapping(z, c),
            "ws_trunc": G.mapping(z, c, truncation_psi=0.7, truncation_cutoff=5),
            "img": G(z, c, noise_mode="const"),
        }
    if not cut:
        outputs |= {
            "img_trunc": G(z, c, 0.7, 5, noise_mode="const"),
            "img_none": G(z, c, noise_mode="none"),
            "logits": D(golden["img"], c),
        }
    for name, actual in outputs.items():
        error = (actual - golden[name][: len(actual)]).abs().max().item()
        print(f"{impl} c{c_dim} {name}: {error:.1e}")
        assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("c_dim", [0, 3])
def test_published_names_go_both_ways(c_dim):
    G, D, golden = golden_pair(c_dim, "cpu")
    ours = stylegan2.published(G, D)
    theirs = {k: v for k, v in golden.items() if k[:2] in ("G.", "D.")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    del theirs["D.b8.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"b8\.conv1\.weight"):
        stylegan2.load_published(G, D, theirs)


# Shapes.


@pytest.mark.parametrize(
    ("resolution", "channels", "c_dim"),
    [((16, 16), 1, 0), ((16, 16), 3, 3), ((16, 16), 4, 0), ((16, 40), 3, 0), ((28, 28), 1, 10)],
    ids=str,
)
def test_makes_and_judges_images_of_its_size(resolution, channels, c_dim):
    G, D = tiny_pair(resolution, channels, c_dim)
    c = labels(4, c_dim)
    img = G(torch.randn(4, 6), c)
    assert img.shape == (4, channels, *resolution)
    logits = D(img, c)
    assert logits.shape == (4, 1)
    logits.sum().backward()
    without = [
        name
        for net in (G, D)
        for name, p in net.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not without


def test_levels_of_images_that_are_not_square():
    levels = stylegan2.make_levels((96, 64), 512, 32)
    assert [level.size for level in levels] == [(6, 4), (12, 8), (24, 16), (48, 32), (96, 64)]
    assert [level.name for level in levels] == ["b4", "b8", "b16", "b32", "b64"]
    assert [level.channels for level in levels] == [32, 32, 32, 16, 8]


@pytest.mark.parametrize(
    ("resolution", "grid"), [((66, 66), (33, 33)), ((24, 1000), (6, 250))], ids=str
)
def test_first_grids_of_many_cells(resolution, grid):
    options = {"channel_base": 16, "channel_max": 2}
    G, D = tiny_pair(resolution, 1, **options)
    assert G.synthesis.b4.const.shape[1:] == grid
    img = G(torch.randn(2, 6))
    assert img.shape == (2, 1, *resolution)
    assert D(img).isfinite().all()


def test_full_hd_is_a_row_of_levels():
    levels = stylegan2.make_levels((1080, 1920), 512, 32)
    assert [level.size for level in levels] == [(135, 240), (270, 480), (540, 960), (1080, 1920)]


@pytest.mark.parametrize("resolution", [(4, 4), (15, 16), (64, 2), (1001, 1000)])
def test_refuses_other_sizes(resolution):
    with pytest.raises(ValueError, match=f"resolution must be .*, got {resolution[0]}x"):
        stylegan2.make_levels(resolution, 512, 32)


def test_labels_and_latents_of_another_length_are_told():
    G, D = tiny_pair(c_dim=3)
    with pytest.raises(ValueError, match=r"z must be \[N, 6\], got \(2, 5\)"):
        G(torch.randn(2, 5), labels(2, 3))
    with pytest.raises(ValueError, match=r"c must be \[N, 3\], got None"):
        D(torch.randn(2, 3, 16, 16))


# What it computes.


def test_latents_are_normalised():
    mapping = MappingNetwork(6, 3, 8, num_ws=4, num_layers=2).eval()
    z, c = torch.randn(3, 6), labels(3, 3)
    assert torch.allclose(mapping(z, c), mapping(7 * z, 0.5 * c), atol=1e-5)


def test_truncation_moves_w_towards_its_average():
    mapping = MappingNetwork(6, 0, 8, num_ws=4, num_layers=2).eval()
    mapping.w_avg.normal_()
    z = torch.randn(3, 6)
    ws, half = mapping(z), mapping(z, truncation_psi=0.5, truncation_cutoff=3)
    assert torch.equal(mapping(z, truncation_psi=0), mapping.w_avg.expand(3, 4, 8))
    assert torch.allclose(half[:, :3], (ws[:, :3] + mapping.w_avg) / 2, atol=1e-6)
    assert torch.equal(half[:, 3:], ws[:, 3:])


def test_w_avg_is_the_moving_average_of_w_in_training_only():
    mapping = MappingNetwork(6, 0, 8, num_ws=4, num_layers=2, w_avg_beta=0.9)
    w = mapping(torch.randn(5, 6))[:, 0]
    assert torch.allclose(mapping.w_avg, 0.1 * w.mean(0), atol=1e-6)
    before = mapping.w_avg.clone()
    mapping.eval()(torch.randn(5, 6))
    assert torch.equal(mapping.w_avg, before)


def test_noise_is_random_constant_or_absent():
    G, _ = tiny_pair()
    G.eval()
    z = torch.randn(1, 6)
    assert torch.equal(G(z), G(z, noise_mode="none"))  # its strength starts at 0
    with torch.no_grad():
        G.synthesis.b8.conv0.noise_strength.fill_(1)
    random, const, none = (G(z, noise_mode=mode) for mode in ("random", "const", "none"))
    assert not torch.equal(random, G(z, noise_mode="random"))
    assert torch.equal(const, G(z))
    assert not torch.equal(G.train()(z), G(z))
    assert not torch.equal(const, none)


def test_discriminator_sees_the_label():
    _, D = tiny_pair(c_dim=3)
    img = torch.randn(2, 3, 16, 16)
    first, second = D(img, torch.eye(3)[[0, 0]]), D(img, torch.eye(3)[[1, 1]])
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("c_dim", [0, 3])
def test_discriminator_without_skips(c_dim):
    _, residual = tiny_pair(c_dim=c_dim)
    torch.manual_seed(0)
    D = stylegan2.Discriminator(c_dim, (16, 16), 3, d_residual=False, **TINY)
    state = residual.state_dict()
    skips = [name for name in state if ".skip." in name]
    assert D.state_dict().keys() == state.keys() - set(skips)
    assert len({name.split(".")[0] for name in skips}) == 2
    D.load_state_dict({name: t for name, t in state.items() if name not in skips})
    img, c = torch.randn(4, 3, 16, 16), labels(4, c_dim)
    x = D.b16.fromrgb(img)
    for block in (D.b16, D.b8):
        x = block.conv1(block.conv0(x))
    x = D.b4(x)
    expected = (x * D.mapping(None, c)).sum(1, keepdim=True) / 8**0.5 if c_dim else x
    torch.testing.assert_close(D(img, c), expected)
    D(img, c).sum().backward()
    assert all(p.grad.isfinite().all() for p in D.parameters())


def test_published_names_without_skips():
    G, _ = tiny_pair()
    D, other = (stylegan2.Discriminator(0, (16, 16), d_residual=False, **TINY) for _ in range(2))
    state = stylegan2.published(G, D)
    assert {name for name in state if name.startswith("D.b8.")} == {
        "D.b8.resample_filter",
        "D.b8.conv0.weight", "D.b8.conv0.bias", "D.b8.conv0.resample_filter",
        "D.b8.conv1.weight", "D.b8.conv1.bias", "D.b8.conv1.resample_filter",
    }  # fmt: skip
    stylegan2.load_published(G, other, state)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in D.state_dict().items())


@pytest.mark.parametrize(
    ("preset", "size", "values"),
    [
        ("cifar", 32, {"d_residual": False, "mbstd_group": 32, "r1_gamma": 0.01, "pl_weight": 0}),
        ("512", 512, {"d_residual": True, "mbstd_group": 8, "r1_gamma": 0.5, "batch": 64,
                      "ema_kimg": 20, "num_fp16_res": 4, "g_lr": 2.5e-3, "d_lr": 2.5e-3}),
    ],
    ids=str,
)  # fmt: skip
def test_presets_of_the_paper(preset, size, values):
    config = make_config(f"stylegan2-{preset}", num_classes=0)
    assert {name: getattr(config, name) for name in values} == values
    assert (config.augment, config.channel_base, config.mirror) == ("ada", 32768, True)
    config.resolution, config.channels = (size, size), 3
    with torch.device("meta"):
        _, D = models.build(config)
    blocks = [getattr(D, name) for name in D.block_names]
    assert all((block.skip is not None) == config.d_residual for block in blocks)
    low = [block.dtype for block in blocks if block.dtype is not None]
    assert low == [torch.float16] * config.num_fp16_res
    assert D.b4.mbstd.group_size == config.mbstd_group


# 16 bits.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_highest_levels_run_in_16_bits(dtype):
    G, D = tiny_pair(num_fp16_res=1, low_dtype=dtype)
    exact_G, exact_D = tiny_pair()
    seen = {}
    for name, block in (("G8", G.synthesis.b8.conv1), ("G16", G.synthesis.b16.conv1),
                        ("D16", D.b16.conv0), ("D8", D.b8.conv0)):  # fmt: skip
        block.register_forward_hook(lambda *args, name=name: seen.update({name: args[2].dtype}))
    z = torch.randn(4, 6)
    img = G(z, noise_mode="const")
    logits = D(img)
    assert seen == {"G8": torch.float32, "G16": dtype, "D16": dtype, "D8": torch.float32}
    assert img.dtype == logits.dtype == torch.float32
    exact = exact_G(z, noise_mode="const")
    tolerance = 20 * torch.finfo(dtype).eps
    assert (img - exact).abs().max() < tolerance * exact.abs().max()
    exact_logits = exact_D(img)
    assert (logits - exact_logits).abs().max() < tolerance * (1 + exact_logits.abs().max())
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in (*G.parameters(), *D.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["f64", "bf16"])
def test_whole_networks_in_another_dtype(dtype):
    G, D = tiny_pair()
    exact = D(G(torch.ones(4, 6), noise_mode="const"))
    img = G.to(dtype)(torch.ones(4, 6, dtype=dtype), noise_mode="const")
    logits = D.to(dtype)(img)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), exact, atol=0.1, rtol=0.1)


def test_activations_are_clamped():
    G, _ = tiny_pair(num_fp16_res=2)
    peaks = []
    for block in (G.synthesis.b8, G.synthesis.b16):
        block.conv1.register_forward_hook(lambda *args: peaks.append(args[2].abs().max().item()))
        with torch.no_grad():
            block.conv1.bias.fill_(1e6)
    assert G(torch.randn(2, 6)).isfinite().all()
    assert peaks == [256, 256]


# Compile and export.


def test_compiles_and_exports():
    G, D = tiny_pair((8, 8), channel_max=4)
    G.eval(), D.eval()
    z = torch.randn(2, 6)
    with torch.no_grad():
        img = G(z, noise_mode="const")
        logits = D(img)
        compiled_G = torch.compile(G, fullgraph=True, backend="aot_eager")
        compiled_D = torch.compile(D, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled_G(z, noise_mode="const"), img, atol=1e-5)
        assert torch.allclose(compiled_D(img), logits, atol=1e-5)
        exported_G = torch.export.export(G, (z,), {"noise_mode": "const"}).module()
        exported_D = torch.export.export(D, (img,)).module()
        assert torch.allclose(exported_G(z, noise_mode="const"), img, atol=1e-5)
        assert torch.allclose(exported_D(img), logits, atol=1e-5)
