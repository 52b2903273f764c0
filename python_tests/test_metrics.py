"""Figures of quality: agreement with independent implementations, known values, bias."""

import time

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from gankern.data import open_dataset
from gankern.metrics import (
    Extractor,
    MetricsError,
)
from gankern.metrics.frechet import (
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
    frechet_from_features,
    frechet_infinity,
)
from gankern.metrics.kernel import draw_subsets, kernel_distance, mmd2, subset_distances
from gankern.metrics.manifold import compare, copying, nearest, radii
from gankern.metrics.modes import as_stacks, count_modes, is_gray, mode_coverage, read_digits
from gankern.metrics.path_length import perceptual_path_length, smoothness
from gankern.metrics.score import inception_score
from gankern.models import dcgan


def clouds(n, m, dim, seed=0):
    """Correlated features of two overlapping distributions, [n, dim] and [m, dim], float32."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=rng) / dim**0.5
    x = torch.randn(n, dim, generator=rng) @ mix
    y = 0.9 * torch.randn(m, dim, generator=rng) @ mix + 0.1
    return x, y


def fidelity(module):
    """A module of torch-fidelity, which cannot be imported without a torchvision that fits."""
    try:
        return __import__(f"torch_fidelity.{module}", fromlist=["x"])
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity (extra 'oracles') cannot be imported: {error}")


class Identity(nn.Module):
    num_features = 48

    def forward(self, x):
        return x


# Agreement on the same features, relative 1e-4.


@pytest.mark.parametrize("n", [500, 40], ids=["more than dimensions", "fewer"])
def test_frechet_agrees_with_torchmetrics_and_scipy(n):
    x, y = clouds(n, n + 7, 48)
    oracle = FrechetInceptionDistance(feature=Identity())
    oracle.update(x.double(), real=True)
    oracle.update(y.double(), real=False)
    wanted = oracle.compute().item()
    assert frechet_from_features(x, y) == pytest.approx(wanted, rel=1e-4)
    a, b = feature_statistics(x), feature_statistics(y)
    ours = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert ours == pytest.approx(wanted, rel=1e-4)
    root = sqrtm((a.covariance @ b.covariance).numpy()).real
    trace = a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    assert ours == pytest.approx(float((a.mean - b.mean).square().sum() + trace), rel=1e-4)


def test_frechet_agrees_with_torch_fidelity():
    module = fidelity("metric_fid")
    x, y = clouds(300, 320, 48)
    stats = [
        {"mu": np.mean(f.double().numpy(), 0), "sigma": np.cov(f.double().numpy(), rowvar=False)}
        for f in (x, y)
    ]
    wanted = module.fid_statistics_to_metric(*stats, verbose=False)
    assert frechet_from_features(x, y) == pytest.approx(wanted[module.KEY_METRIC_FID], rel=1e-4)


def test_frechet_of_known_gaussians():
    eye = torch.eye(5, dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    assert frechet_distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(zero, eye, zero + 2, 9 * eye) == pytest.approx(5 * (4 + (3 - 1) ** 2))


def test_statistics_come_in_pieces():
    x, _ = clouds(1000, 10, 8)
    whole = feature_statistics(x)
    pieces = FeatureStatistics(8)
    for part in x.split(37):
        pieces.append(part)
    torch.testing.assert_close(pieces.covariance, torch.cov(x.double().T))
    torch.testing.assert_close(pieces.mean, whole.mean)


def test_frechet_of_2048_features_takes_seconds():
    x, y = clouds(2200, 2200, 2048)
    a, b = feature_statistics(x), feature_statistics(y)
    start = time.perf_counter()
    value = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    seconds = time.perf_counter() - start
    assert value > 0
    assert seconds < 30, seconds


def test_frechet_infinity_removes_the_bias():
    x, y = torch.randn(2, 1000, 64, generator=torch.Generator().manual_seed(0)).unbind()
    biased, extrapolated = frechet_from_features(x, y), frechet_infinity(x, y)
    assert biased > 1
    assert abs(extrapolated.value) < biased / 10
    assert abs(extrapolated.value) < 4 * extrapolated.error


def test_kernel_distance_agrees_by_the_same_subsets():
    x, y = clouds(300, 320, 48)
    subsets = draw_subsets(300, 320, count=7, size=100, seed=2020)
    wanted = [
        poly_mmd(x[torch.from_numpy(i)].double(), y[torch.from_numpy(j)].double()).item()
        for i, j in subsets
    ]
    np.testing.assert_allclose(subset_distances(x, y, subsets), wanted, rtol=1e-4)
    module = fidelity("metric_kid")
    oracle = module.kid_features_to_metric(
        x.double(), y.double(), kid_subsets=7, kid_subset_size=100, rng_seed=2020, verbose=False
    )
    ours = subset_distances(x, y, subsets)
    assert ours.mean() == pytest.approx(oracle[module.KEY_METRIC_KID_MEAN], rel=1e-4)
    assert ours.std() == pytest.approx(oracle[module.KEY_METRIC_KID_STD], rel=1e-4)


def test_kernel_distance_is_the_estimate_over_all_pairs():
    x, y = clouds(301, 220, 16)
    assert kernel_distance(x, y).value == pytest.approx(mmd2(x, y), rel=1e-9)


def test_kernel_distance_of_blocks(monkeypatch):
    from gankern.metrics import kernel

    x, y = clouds(900, 1000, 16)
    whole = kernel_distance(x, y)
    monkeypatch.setattr(kernel, "BLOCK", 300)
    blocks = kernel_distance(x, y)
    assert abs(blocks.value - whole.value) < 4 * blocks.error


def test_kernel_distance_is_unbiased_and_its_error_is_right():
    values, errors = [], []
    for seed in range(60):
        x, y = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(seed)).unbind()
        value, error = kernel_distance(x, y)
        values.append(value)
        errors.append(error)
    spread = np.std(values)
    assert abs(np.mean(values)) < 3 * spread / 60**0.5
    assert 0.5 * spread < np.mean(errors) < 2 * spread


def test_inception_score_agrees():
    logits = 3 * torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    oracle = InceptionScore(feature=Identity(), splits=1)
    oracle.update(logits.double())
    wanted = oracle.compute()[0].item()
    assert inception_score(logits, splits=1).value == pytest.approx(wanted, rel=1e-4)
    assert inception_score(torch.zeros(50, 20)).value == pytest.approx(1)
    assert inception_score(1e3 * torch.eye(20), splits=1).value == pytest.approx(20)
    module = fidelity("metric_isc")
    oracle = module.isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    ours = inception_score(logits, splits=10, seed=2020)
    assert ours.value == pytest.approx(oracle[module.KEY_METRIC_ISC_MEAN], rel=1e-4)
    assert ours.deviation == pytest.approx(oracle[module.KEY_METRIC_ISC_STD], rel=1e-4)


@pytest.mark.parametrize("k", [3, 5])
def test_manifold_agrees_with_prdc(k, capsys):
    x, y = clouds(300, 280, 12)
    wanted = compute_prdc(x.double().numpy(), y.double().numpy(), k)
    found = compare(x, y, k, k)
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name


def test_precision_and_recall_agree_with_torch_fidelity():
    module = fidelity("metric_prc")
    x, y = clouds(300, 280, 12)
    wanted = module.prc_features_to_metric(
        y.double(),
        x.double(),
        prc_neighborhood=3,
        prc_batch_size=100,
        save_cpu_ram=True,
        verbose=False,
    )
    found = compare(x, y)
    assert found.precision == pytest.approx(wanted[module.KEY_METRIC_PRECISION], rel=1e-4)
    assert found.recall == pytest.approx(wanted[module.KEY_METRIC_RECALL], rel=1e-4)


def test_manifold_in_pieces(monkeypatch):
    from gankern.metrics import manifold

    x, y = clouds(150, 130, 6)
    whole, near = compare(x, y), nearest(x, y, 3)
    monkeypatch.setattr(manifold, "_PIECE", 1000)
    assert compare(x, y) == whole
    assert torch.equal(nearest(x, y, 3)[1], near[1])


def test_copies_cover_nothing():
    x, _ = clouds(400, 10, 12)
    again = x[:40].repeat(10, 1)
    assert (radii(again, (3,)) == -1).all()
    found = compare(x, again)
    assert found.recall == 0
    assert found.precision == 1
    assert copying(x, again) == 0
    half = torch.randn(400, 12, generator=torch.Generator().manual_seed(7)) @ torch.eye(12)
    assert 0.5 < copying(torch.randn(400, 12), half) < 2


# Paths in latent space.


class Linear(nn.Module):
    """G(z) = a pixel for each of z's components; mapping and synthesis as in StyleGAN."""

    c_dim = 0

    def __init__(self, z_dim=4):
        super().__init__()
        self.z_dim = z_dim
        self.scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def mapping(self, z, c=None):
        return 2 * z[:, None].repeat(1, 3, 1)

    def synthesis(self, ws):
        return self.scale * ws[:, 0, None, None].expand(-1, 3, -1, -1)

    def forward(self, z, c=None):
        return self.synthesis(self.mapping(z, c))


def pixel_distance(x, y):
    return (x.double() - y.double()).square().sum((1, 2, 3))


def test_path_length_in_w_is_the_squared_distance_of_the_ends():
    from gankern.data.latents import seed_latents

    z = seed_latents(range(200), 4).double()
    squared = (2 * (z[1::2] - z[0::2]) * 127.5).square().sum(1) * 3
    wanted = squared.sort().values[1:99].mean().item()
    for sampling in ("end", "full"):
        value = perceptual_path_length(
            Linear(), pixel_distance, 100, "w", sampling, epsilon=1e-2, batch=9
        )
        assert value == pytest.approx(wanted, rel=1e-3)
    z_value = perceptual_path_length(Linear(), pixel_distance, 100, "z", "end", epsilon=1e-2)
    assert z_value > 0
    G = dcgan.Generator(5, (16, 16), 1, width=2)
    with pytest.raises(MetricsError, match=r"space must be one of z and .* got 'w'"):
        perceptual_path_length(G, pixel_distance, 10, "w")


class Jump(Linear):
    def synthesis(self, ws):
        return super().synthesis((ws > 0).float())


def test_smoothness_sees_jumps():
    net = Extractor("pixels", lambda x: x[:, :1].flatten(1))
    assert smoothness(Linear(), net, space="w").mean == pytest.approx(1, abs=1e-3)
    assert smoothness(Linear(), net, space="z").mean < 1.5
    assert smoothness(Jump(), net, space="w").mean > 4


# Modes of stacked digits.


def test_modes_of_the_data_and_of_a_collapsed_set():
    found = count_modes(torch.arange(1000))
    assert (found.modes, found.kl) == (1000, pytest.approx(0, abs=1e-12))
    found = count_modes(torch.full((500,), 7))
    assert (found.modes, found.kl) == (1, pytest.approx(np.log(1000)))
    rng = torch.Generator().manual_seed(0)
    found = count_modes(torch.randint(1000, (26000,), generator=rng))
    assert found.modes == 1000
    assert found.kl == pytest.approx(found.expected_kl, rel=0.1)
    found = count_modes(torch.randint(1000, (500,), generator=rng))
    assert found.modes == pytest.approx(found.expected_modes, rel=0.05)
    assert found.kl == pytest.approx(found.expected_kl, rel=0.05)


class Reader:
    """Takes a digit's brightness for its class."""

    def probabilities(self, images):
        digit = (images.mean((1, 2, 3)) * 10).round().long()
        return nn.functional.one_hot(digit, 10).float()


def test_modes_of_colour_and_of_gray_stacks():
    levels = torch.tensor([[1, 2, 3], [1, 2, 3], [9, 0, 4]])
    stacks = (levels / 10)[:, :, None, None].expand(-1, -1, 8, 8)
    found = mode_coverage(read_digits(Reader(), stacks))
    assert (found.modes, found.n) == (2, 3)
    gray = stacks.reshape(9, 1, 8, 8)[:, :, :4]
    found = mode_coverage(read_digits(Reader(), torch.cat([gray] * 300 + [gray[:2]])))
    assert found.n == 900
    assert 100 < found.modes <= 6**3  # six different digits


def test_modes_of_colours_that_are_one_digit_and_of_transparency():
    gray = torch.from_numpy(open_dataset("digits").images[::50])  # [100, 1, 28, 28]
    rgb = (gray.expand(-1, 3, -1, -1).float() + torch.tensor([-2.0, 1, 3]).view(3, 1, 1)).clamp(0)
    stacked = torch.from_numpy(open_dataset("stacked-digits").images[:100])
    assert is_gray(gray)
    assert is_gray(rgb)
    assert not is_gray(stacked)
    for images in (gray, rgb):
        assert as_stacks(images, True).shape == (100, 1, 28, 28)
        torch.testing.assert_close(as_stacks(images, True), gray / 127.5 - 1, rtol=0, atol=0.03)
    rgba = torch.cat([torch.full_like(stacked, 255), gray], 1)  # white, seen through its alpha
    assert is_gray(rgba)
    torch.testing.assert_close(as_stacks(rgba, True), gray / 127.5 - 1)
    assert torch.equal(as_stacks(stacked, False), stacked / 127.5 - 1)


def test_stacked_digits():
    stacked = open_dataset("stacked-digits")
    assert stacked.images.shape == (25600, 3, 28, 28)
    digits = {image.tobytes() for image in open_dataset("digits").images[:, 0]}
    assert all(image.tobytes() in digits for image in stacked.images[:50].reshape(-1, 28, 28))
    assert not np.array_equal(stacked.images[0, 0], stacked.images[0, 1])
