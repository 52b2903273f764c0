"""DiffAugment and ADA: each transform by hand, identities, gradients, and the course of p."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from gankern.training import TrainError, ada, augment, make_config

CPU = torch.device("cpu")
SIZES = [(3, 16, 16), (1, 28, 28), (4, 8, 20), (3, 4, 4)]


def images(n, c, h, w, seed=0):
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def blob(x, y, size=32):
    """A smooth spot at a place of one image."""
    at = torch.arange(size) + 0.5
    return torch.exp(-((at[None] - x) ** 2 + (at[:, None] - y) ** 2) / 20)[None, None]


ALL = ",".join(ada.GROUPS)


def make(p=1.0, transforms=ALL, **values):
    torch.manual_seed(0)
    return ada.Ada(make_config(ada_p=p, ada_transforms=transforms, **values), CPU)


# DiffAugment.


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("names", ["color", "translation", "cutout", "color,translation,cutout"])
def test_diffaugment_keeps_shape_and_is_differentiable(shape, names):
    torch.manual_seed(0)
    x = images(5, *shape).requires_grad_()
    y = augment.diffaugment(x, names.split(","))
    assert y.shape == x.shape
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_translation_moves_by_whole_pixels_and_brings_zeros():
    torch.manual_seed(0)
    x = images(64, 1, 16, 16) + 2  # never zero
    y = augment.translation(x)
    shifts = set()
    for before, after in zip(x[:, 0], y[:, 0], strict=True):
        rows, cols = (after != 0).any(1).nonzero()[:, 0], (after != 0).any(0).nonzero()[:, 0]
        dy = int(rows[0]) if rows[0] else int(rows[-1]) - 15
        dx = int(cols[0]) if cols[0] else int(cols[-1]) - 15
        padded = torch.zeros(48, 48)
        padded[16:32, 16:32] = before
        assert torch.equal(after, padded[16 - dy : 32 - dy, 16 - dx : 32 - dx])
        shifts.add((dy, dx))
    assert {abs(v) for shift in shifts for v in shift} == {0, 1, 2}  # an eighth of 16


def test_cutout_blackens_half_the_sides_at_most():
    torch.manual_seed(0)
    y = augment.cutout(torch.ones(400, 1, 16, 16))
    gone = (y == 0).sum([1, 2, 3])
    assert gone.max() == 64
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_color_of_gray_changes_brightness_and_contrast_only():
    torch.manual_seed(0)
    x = images(8, 1, 6, 6).expand(-1, 3, -1, -1)
    y = augment.color(x)
    torch.testing.assert_close(y[:, 0], y[:, 2])
    ratio = y.std([1, 2, 3]) / x.std([1, 2, 3])
    assert ((ratio > 0.5) & (ratio < 1.5)).all()


def test_mirror_flips_half_of_the_images():
    torch.manual_seed(0)
    x = images(400, 1, 4, 4)
    y = augment.mirror(x)
    flipped = (y == x.flip(3)).all([1, 2, 3])
    assert (flipped | (y == x).all([1, 2, 3])).all()
    assert binomtest(int(flipped.sum()), 400, 0.5).pvalue > 1e-4


def test_unknown_transforms_are_told():
    with pytest.raises(TrainError, match=r"--diffaugment must be of color, .*, got 'colour'"):
        make_config(diffaugment="colour")
    with pytest.raises(TrainError, match=r"--ada-transforms must be of blit, .*, got 'blit,x'"):
        make_config(ada_transforms="blit,x")


# ADA's resampling, colours, filters.


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_identity_gives_the_image_back(shape):
    x = images(2, *shape)
    torch.testing.assert_close(ada.resample(x, torch.eye(3).repeat(2, 1, 1)), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("matrix", "moved"),
    [
        (ada._translate(torch.tensor([[-3.0, 2.0]])), (17, 17)),  # by (+3, -2)
        (ada._translate(torch.tensor([[0.5, 0.0]])), (13.5, 19)),
        (ada._scale(torch.tensor([-1.0]), torch.tensor([1.0])), (18, 19)),
        (ada._rotate(torch.tensor([math.pi / 2])), (13, 14)),
    ],
    ids=["shift", "half a pixel", "flip", "quarter turn"],
)
def test_geometry_moves_a_spot(matrix, moved):
    error = (ada.resample(blob(14, 19), matrix) - blob(*moved)).abs().max().item()
    assert error < 0.01


def test_what_comes_in_is_mirrored():
    ramp = torch.arange(16.0).expand(1, 1, 16, 16).contiguous()
    y = ada.resample(ramp, ada._translate(torch.tensor([[8.0, 0.0]])))  # the ramp moves left
    expected = torch.cat([torch.arange(8.0, 16.0), torch.arange(15.0, 7.0, -1)])
    torch.testing.assert_close(y[0, 0, 8], expected, atol=0.3, rtol=0)


def test_blitting_copies_pixels():
    torch.manual_seed(0)
    pipe = make(1.0, "blit")
    x = torch.arange(256.0).reshape(1, 1, 16, 16).expand(64, -1, -1, -1)
    y = pipe(x)
    assert (y == y.round()).all()
    assert (y.flatten(1).unique(dim=0)).shape[0] > 30
    wide = pipe(images(16, 2, 8, 12)[:, :1])
    assert wide.shape == (16, 1, 8, 12)


def test_octaves_add_up_to_the_image():
    bands = ada.octave_filters()
    impulse = torch.zeros(43, dtype=torch.float64)
    impulse[21] = 1
    torch.testing.assert_close(bands.sum(0), impulse)
    spectrum = torch.fft.rfft(bands, 512).abs()
    assert spectrum.argmax(1)[0] == 0
    assert (spectrum.argmax(1).diff() > 0).all()
    x = images(3, 3, 16, 12)
    torch.testing.assert_close(ada.filter_bands(x, torch.ones(3, 4)), x, atol=1e-6, rtol=0)


def test_wavelets_are_orthonormal():
    for taps in (ada.SYM6, ada.SYM2):
        h = np.array(taps)
        products = [h[2 * k :] @ h[: len(h) - 2 * k] for k in range(len(h) // 2)]
        assert products == pytest.approx([1] + [0] * (len(h) // 2 - 1), abs=1e-11)


def test_band_gains_keep_the_expected_power():
    gains = make()._bands(torch.zeros(1000, 3, 4, 4))
    power = (torch.tensor(ada.BAND_POWER) * gains.square()).sum(1)
    # Each change is balanced by itself, so that they are only on the whole.
    assert power.log().abs().mean() < 0.5


def test_colour_matrices():
    pipe = make(1.0)
    x = torch.zeros(500, 3, 2, 2)
    matrix = pipe._colors(x)
    gray = torch.ones(3)
    moved = matrix[:, :3, :3] @ gray  # gray stays gray, also flipped
    torch.testing.assert_close(moved, moved[:, :1].expand(-1, 3), atol=1e-5, rtol=1e-4)
    assert (moved[:, 0] < 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(make(0.0)._colors(x), torch.eye(4).expand(500, 4, 4))
    img = images(500, 4, 2, 2)
    assert torch.equal(ada.transform_colors(img, matrix)[:, 3], img[:, 3])
    one = ada.transform_colors(img[:, :1], matrix)
    three = ada.transform_colors(img[:, :1].expand(-1, 3, -1, -1), matrix)
    torch.testing.assert_close(one[:, 0], three.mean(1), atol=1e-5, rtol=1e-4)


# The pipeline and p.


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_pipeline(shape):
    x = images(6, *shape).requires_grad_()
    y = make()(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(make(0.0)(x), x, atol=1e-5, rtol=0)


def test_each_transform_acts_with_probability_p():
    pipe = make(0.3, "cutout")
    y = pipe(torch.ones(2000, 1, 8, 8))
    acted = int((y == 0).any(3).any(2).any(1).sum())
    assert binomtest(acted, 2000, 0.3).pvalue > 1e-4
    pipe = make(0.3, "blit")
    place = torch.zeros(4000, 1, 64, 64)
    place[:, 0, 31:33, 31:33] = 1  # stays where it is under flips and quarter turns
    moved = (pipe._blit(place) != place).flatten(1).any(1)
    both_zero = (1 / 16) ** 2  # shifts that round to none: half a pixel of 8 either way, twice
    assert binomtest(int(moved.sum()), 4000, 0.3 * (1 - both_zero)).pvalue > 1e-4
    pipe = make(0.3, "geometry")
    turned = pipe._geometry(torch.zeros(4000, 1, 8, 8))
    turned = (turned[:, 0, 1] != 0) | (turned[:, 1, 0] != 0)  # by one rotation or both
    assert binomtest(int(turned.sum()), 4000, 0.3).pvalue > 1e-4
    x, still = torch.zeros(4000, 3, 4, 4), 0.7**4
    for acted, expected in (
        (make(0.3)._geometry(x) != torch.eye(3), 1 - still),  # two scales, rotation, shift
        (make(0.3)._colors(x) != torch.eye(4), 1 - still * 0.85),  # of five, one is a coin's flip
        ((make(0.3)._bands(x) - 1).abs() > 1e-5, 1 - still),
        (make(0.3, "noise")(x) != 0, 0.3),
    ):
        count = int(acted.flatten(1).any(1).sum())
        assert binomtest(count, 4000, expected).pvalue > 1e-4, expected


def test_p_follows_the_sign_of_real_logits():
    pipe = make(0.5, ada_kimg=1.0, ada_interval=2, ada_target=0.6)
    for _ in range(2):
        pipe.update(torch.ones(8, 1), batch=25)
    assert pipe.p.item() == pytest.approx(0.55)  # 50 of 1,000 images
    state = pipe.state_dict()
    other = make(0.0, ada_kimg=1.0, ada_interval=2)
    other.load_state_dict(state)
    for p in (pipe, other):
        for _ in range(4):
            p.update(torch.tensor([[1.0], [-2.0]]), batch=25)
        p.update(torch.ones(8, 1), batch=25)
    assert pipe.p.item() == other.p.item() == pytest.approx(0.45)
    assert pipe.state_dict() == other.state_dict()
    pipe.update(torch.tensor([[math.nan], [1.0], [1.0], [1.0]]), batch=25)
    pipe.update(torch.ones(8, 1), batch=25)  # r_t is 7/8
    assert pipe.p.item() == pytest.approx(0.5)
    for _ in range(200):
        pipe.update(-torch.ones(8, 1), batch=25)
    assert pipe.p.item() == 0
