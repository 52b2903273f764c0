"""What a measurement says, and that it moves the right way on real glyphs."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from gankern.data import open_dataset
from gankern.data.glyphs import pack_glyphs
from gankern.metrics import Features, load_extractor, measure

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
    assert json.loads(json.dumps(result.to_json()))["n_fake"] == 90


def blurred(images):
    kernel = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    weight = (kernel[:, None] * kernel)[None, None]
    x = images.float().flatten(0, 1)[:, None]
    return nn.functional.conv2d(x, weight, padding=2).view(images.shape).round()


FONTS = [
    *(f"DejaVu{kind}{s}" for kind in ("Sans", "SansMono") for s in ("", "-Bold", "-Oblique")),
    *(f"DejaVu{kind}-BoldOblique" for kind in ("Sans", "SansMono")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
]


@pytest.fixture(scope="module")
def changed(embedded, tmp_path_factory):
    """Features of 400 real glyphs, and of 400 others: as they are, noisy, blurred, repeated.

    They are letters and digits of the 21 fonts that come with matplotlib. The embedded network
    takes them at 64 x 64, a twentieth of the work. Its ImageNet classes are none that glyphs have:
    the inception score takes the characters, by a ridge regression on further glyphs.
    """
    path = tmp_path_factory.mktemp("glyphs") / "glyphs.safetensors"
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    fonts = [str(folder / f"{name}.ttf") for name in FONTS]
    pack_glyphs(path, 64, fonts, "latin,digits", labels="char")
    glyphs = open_dataset(path)
    assert len(glyphs) == 21 * 62
    order = np.random.default_rng(0).permutation(len(glyphs))
    real, other, further = (
        torch.from_numpy(glyphs.images[order[i : i + 400]]) for i in (0, 400, 800)
    )
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    sets = {
        "further": further,
        "real": real,
        "other": other,
        "noise": (other + 40 * noise).clamp(0, 255).round(),
        "blur": blurred(other),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(embedded.network), "SIDE", 64)
        found = {
            name: Features(torch.cat([embedded(part)[0] for part in images.split(50)]))
            for name, images in sets.items()
        }
    x = found.pop("further").features.double()
    classes = nn.functional.one_hot(torch.from_numpy(glyphs.labels[order[800:1200]])).double()
    mean, x = x.mean(0), x - x.mean(0)
    weights = x.T @ torch.linalg.solve(x @ x.T + 100 * torch.eye(len(x)), classes)
    for features in found.values():
        features.logits = (10 * (features.features - mean) @ weights).float()
    labels = torch.from_numpy(glyphs.labels[order[400:800]])
    assert (found["other"].logits.argmax(1) == labels).float().mean() > 0.6  # of 62
    found["repeated"] = found["other"][torch.arange(40).repeat(10)]
    return found


@pytest.fixture(scope="module")
def good(changed, embedded):
    """Figures of real glyphs beside others of their kind."""
    return measure(changed["real"], changed["other"], embedded)


@pytest.mark.parametrize("change", ["noise", "blur", "repeated"])
def test_every_metric_moves_the_right_way(change, changed, good, embedded):
    good, bad = good.values(), measure(changed["real"], changed[change], embedded).values()
    assert bad.keys() == good.keys()
    assert bad["fd"] > 1.5 * good["fd"]
    assert bad["fd_inf"] > 1.5 * good["fd_inf"]
    assert bad["kd"] > good["kd"] + 0.1
    assert bad["recall"] < good["recall"] - 0.2
    assert bad["coverage"] < good["coverage"] - 0.2
    assert bad["is"] < 0.95 * good["is"]
    if change == "repeated":
        assert bad["recall"] < 0.05
        # Each image is still as good: what asks for that alone must not move far.
        assert bad["precision"] == pytest.approx(good["precision"], abs=0.1)
        assert bad["density"] == pytest.approx(good["density"], abs=0.3)
        assert bad["copying"] == pytest.approx(1, abs=0.3)
    else:
        assert bad["precision"] < good["precision"] - 0.2
        assert bad["density"] < good["density"] - 0.2
        assert bad["copying"] > good["copying"] + 0.3


def test_real_images_beside_others_of_their_kind(good):
    figures = {figure.key: figure for figure in good.figures}
    assert abs(figures["kd"].value) < 4 * figures["kd"].error
    assert figures["recall"].value > 0.8
    assert figures["precision"].value > 0.8
    assert figures["coverage"].value > 0.9
    assert figures["density"].value == pytest.approx(1, abs=0.2)
    assert figures["copying"].value == pytest.approx(1, abs=0.2)
