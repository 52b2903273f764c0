"""What a measurement says, and that it moves the right way on real images."""

import numpy as np
import pytest
import torch
from torch import nn

from gankern.data import open_dataset
from gankern.metrics import Extractor, Features, load_extractor, measure
from gankern.metrics.digits_classifier import as_digits, train_classifier

# One process computes the features of the images that several tests share.
pytestmark = pytest.mark.xdist_group("sensitivity")


def clouds(n, m, dim):
    """Features of two overlapping distributions, [n, dim] and [m, dim], float32."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, dim, generator=rng), torch.randn(m, dim, generator=rng) + 0.1


@pytest.fixture(scope="module")
def embedded():
    return load_extractor("efficientnet-lite0")


# What the figures say.


def test_measurement_of_small_sets(embedded):
    x, y = clouds(100, 90, 12)
    x, y = (Features(f, f @ torch.ones(12, 5), torch.arange(len(f)) % 2) for f in (x, y))
    result = measure(x, y, embedded, ["even", "odd"])
    assert result.small
    keys = [figure.key for figure in result.figures]
    assert keys[:3] == ["kd", "recall", "coverage"]
    assert {"fd", "fd_inf", "is", "precision", "density", "copying"} < set(keys)
    assert all("FID" not in figure.label for figure in result.figures)
    assert "n = 90" in next(f.note for f in result.figures if f.key == "fd")
    assert set(result.classes) == {"even", "odd"}
    assert result.classes["odd"][0].note == "n = 50 real, 45 generated"
    import json

    assert json.loads(json.dumps(result.to_json()))["n_fake"] == 90


def blurred(images):
    kernel = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    weight = (kernel[:, None] * kernel)[None, None]
    x = images.float().flatten(0, 1)[:, None]
    return nn.functional.conv2d(x, weight, padding=2).view(images.shape).round()


@pytest.fixture(scope="module")
def judge():
    """What knows the classes of these images, as the inception score asks; and is quick."""
    net = train_classifier(epochs=2).net

    def network(images):
        features = net[:-1](as_digits(images.float() / 127.5 - 1))  # [N, 64]
        return features, net[-1](features)

    return Extractor("digits", network)


@pytest.fixture(scope="module")
def changed(judge):
    """Features of 400 real digits, and of 400 others: as they are, noisy, blurred, repeated."""
    digits = open_dataset("digits:32").images
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits))
    real, other = (torch.from_numpy(digits[order[i : i + 400]]) for i in (0, 400))
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    sets = {
        "real": real,
        "other": other,
        "noise": (other + 40 * noise).clamp(0, 255).round(),
        "blur": blurred(other),
    }
    found = {name: Features(*judge(images)) for name, images in sets.items()}
    found["repeated"] = found["other"][torch.arange(40).repeat(10)]
    return found


@pytest.mark.parametrize("change", ["noise", "blur", "repeated"])
def test_every_metric_moves_the_right_way(change, changed, judge):
    good = measure(changed["real"], changed["other"], judge).values()
    bad = measure(changed["real"], changed[change], judge).values()
    assert bad["fd"] > 1.2 * good["fd"]
    assert bad["fd_inf"] > good["fd_inf"]
    assert bad["kd"] > good["kd"] + 1e-4
    assert bad["recall"] < good["recall"]
    assert bad["coverage"] < good["coverage"]
    assert bad["is"] < good["is"]
    if change == "repeated":
        assert bad["recall"] < 0.05
    else:
        assert bad["precision"] < good["precision"]
        assert bad["density"] < good["density"]


def test_real_images_beside_others_of_their_kind(changed, judge):
    result = measure(changed["real"], changed["other"], judge)
    figures = {figure.key: figure for figure in result.figures}
    assert abs(figures["kd"].value) < 4 * figures["kd"].error
    assert figures["recall"].value > 0.5
    assert figures["precision"].value > 0.5
    assert figures["coverage"].value > 0.85
    assert figures["copying"].value == pytest.approx(1, abs=0.1)
