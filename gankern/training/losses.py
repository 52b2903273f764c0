"""Adversarial losses: functions of logits, one pair an entry of the table.

`d` takes D's logits of real and of generated images, `g` D's logits of generated images; each
[N, 1] in, a scalar out. D(x) stands for sigmoid(logit).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    """What D minimises, given (real, fake, label_smoothing), and what G does, given (fake)."""

    d: Callable[[Tensor, Tensor, float], Tensor]
    g: Callable[[Tensor], Tensor]


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


LOSSES = {
    "nonsaturating": Loss(cross_entropy_d, nonsaturating_g),
    "minimax": Loss(cross_entropy_d, minimax_g),
}
