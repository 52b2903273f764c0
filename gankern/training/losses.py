"""Adversarial losses: functions of logits, one pair an entry of the table.

`d` takes D's logits of real and of generated images, `g` D's logits of generated images; each
[N, 1] in, a scalar out. D(x) stands for sigmoid(logit), r and f for the logits themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    """What D and G minimise.

    d: given (real, fake, label_smoothing); the latter is 0 unless the loss `smooths`.
    g: given (fake), or (fake, real) if the loss `pairs` generated images with real ones.
    """

    d: Callable[[Tensor, Tensor, float], Tensor]
    g: Callable[..., Tensor]
    smooths: bool = False
    pairs: bool = False


def cross_entropy_d(real: Tensor, fake: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log D(real) - log(1 - D(fake)); Goodfellow et al. 2014, eq. 1, arXiv:1406.2661.

    One-sided label smoothing s makes the target of real images 1 - s (Salimans et al. 2016,
    section 3.4, arXiv:1606.03498): softplus(-r) becomes (1 - s) softplus(-r) + s softplus(r).
    """
    return (F.softplus(-real) + label_smoothing * real + F.softplus(fake)).mean()


def nonsaturating_g(fake: Tensor) -> Tensor:
    """-log D(fake); Goodfellow et al. 2014, section 3."""
    return F.softplus(-fake).mean()


def minimax_g(fake: Tensor) -> Tensor:
    """log(1 - D(fake)): what D gains, G loses; Goodfellow et al. 2014, eq. 1."""
    return -F.softplus(fake).mean()


def hinge_d(real: Tensor, fake: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """max(0, 1 - r) + max(0, 1 + f); Lim and Ye 2017, arXiv:1705.02894."""
    return (F.relu(1 - real) + F.relu(1 + fake)).mean()


def least_squares_d(real: Tensor, fake: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """((r - (1 - s))² + f²) / 2, s label smoothing; Mao et al. 2017, arXiv:1611.04076."""
    return ((real - (1 - label_smoothing)).square() + fake.square()).mean() / 2


def least_squares_g(fake: Tensor) -> Tensor:
    """(f - 1)² / 2; Mao et al. 2017."""
    return (fake - 1).square().mean() / 2


def wasserstein_d(real: Tensor, fake: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """f - r: the negative of the distance's estimate; Arjovsky et al. 2017, arXiv:1701.07875.

    An estimate only if D is Lipschitz: by clipped weights or `penalties.gradient_penalty`.
    """
    return (fake - real).mean()


def critic_g(fake: Tensor) -> Tensor:
    """-f: G of the hinge and of the Wasserstein loss."""
    return -fake.mean()


def relativistic_d(real: Tensor, fake: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(r - f), each real image paired with one generated.

    Jolicoeur-Martineau 2018, arXiv:1807.00734; Huang et al. 2024, arXiv:2501.05441.
    """
    return F.softplus(fake - real).mean()


def relativistic_g(fake: Tensor, real: Tensor) -> Tensor:
    """-log sigmoid(f - r): the same pairs, the other way round."""
    return F.softplus(real - fake).mean()


LOSSES = {
    "nonsaturating": Loss(cross_entropy_d, nonsaturating_g, smooths=True),
    "minimax": Loss(cross_entropy_d, minimax_g, smooths=True),
    "hinge": Loss(hinge_d, critic_g),
    "least-squares": Loss(least_squares_d, least_squares_g, smooths=True),
    "wasserstein": Loss(wasserstein_d, critic_g),
    "relativistic": Loss(relativistic_d, relativistic_g, pairs=True),
}
