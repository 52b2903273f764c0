"""Adversarial losses: against their formulas, finite, twice differentiable."""

import math

import pytest
import torch
import torch.nn.functional as F

from gankern.training.config import TrainError, make_config
from gankern.training.losses import LOSSES

REAL, FAKE = torch.tensor([[2.0], [-0.5]]).double(), torch.tensor([[-3.0], [0.5]]).double()


def g_loss(name, fake, real):
    loss = LOSSES[name]
    return loss.g(fake, real) if loss.pairs else loss.g(fake)


def test_cross_entropies():
    real, fake = torch.randn(2, 9, 1, dtype=torch.float64)
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    for name in ("nonsaturating", "minimax"):
        d = LOSSES[name].d
        torch.testing.assert_close(d(real, fake, 0.0), bce(real, ones) + bce(fake, zeros))
        torch.testing.assert_close(d(real, fake, 0.1), bce(real, ones * 0.9) + bce(fake, zeros))
    torch.testing.assert_close(LOSSES["nonsaturating"].g(fake), bce(fake, ones))
    torch.testing.assert_close(LOSSES["minimax"].g(fake), -bce(fake, zeros))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("name", "d", "g"),
    [
        ("hinge", ((0 + 0) + (1.5 + 1.5)) / 2, (3 - 0.5) / 2),
        ("least-squares", ((1 + 9) + (2.25 + 0.25)) / 4, (16 + 0.25) / 4),
        ("wasserstein", (-5 + 1) / 2, (3 - 0.5) / 2),
        (
            "relativistic",
            -(log_sigmoid(5) + log_sigmoid(-1)) / 2,
            -(log_sigmoid(-5) + log_sigmoid(1)) / 2,
        ),
    ],
)
def test_values_by_hand(name, d, g):
    assert LOSSES[name].d(REAL, FAKE, 0.0).item() == pytest.approx(d)
    assert g_loss(name, FAKE, REAL).item() == pytest.approx(g)


def test_label_smoothing_moves_the_target_of_real_images():
    smoothed = LOSSES["least-squares"].d(torch.tensor([[0.9]]), torch.tensor([[0.0]]), 0.1)
    assert smoothed.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.smooths])
def test_label_smoothing_is_refused_where_it_means_nothing(name):
    with pytest.raises(TrainError, match=f"--label-smoothing must be 0 with --loss {name}"):
        make_config(loss=name, label_smoothing=0.1)


@pytest.mark.parametrize("name", LOSSES)
def test_finite_and_twice_differentiable(name):
    big = torch.tensor([[300.0], [-300.0]])
    assert LOSSES[name].d(big, big, 0.1).isfinite()
    assert g_loss(name, big, -big).isfinite()
    logits = torch.randn(2, 3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: LOSSES[name].d(x[0], x[1], 0.1), logits)
    assert torch.autograd.gradgradcheck(lambda x: g_loss(name, x[0], x[1]), logits)
