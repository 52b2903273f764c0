"""The 1,000 modes of stacked digits: three digits as the colours of one image.

Metz et al. 2016, arXiv:1611.02163; Lin et al. 2018 (PacGAN), arXiv:1712.04086. A classifier of
digits names the three channels of each image; the figures are the modes found, of 1,000, and the
KL divergence of their frequencies from the data's, which are equal. The data set to train on is
"stacked-digits"; the field judges 26,000 generated images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gankern.metrics.digits_classifier import DigitsClassifier

MODES = 1000


class ModeCoverage(NamedTuple):
    """Modes of stacked digits.

    Attributes:
        modes: found, of 1,000.
        kl: KL(found || uniform), nats.
        n: stacks.
        expected_modes, expected_kl: what as many stacks of the data itself have on average.
    """

    modes: int
    kl: float
    n: int
    expected_modes: float
    expected_kl: float


def read_digits(classifier: DigitsClassifier, images: Tensor) -> Tensor:
    """The digit in each channel, int64 [N, C].

    Args:
        classifier: of `train_classifier`.
        images: float [N, C, H, W] in [-1, 1], light digits on black; of `as_stacks`.
    """
    found = classifier.probabilities(images.flatten(0, 1)[:, None]).argmax(1)
    return found.view(images.shape[:2])


def as_stacks(images: Tensor, gray: bool) -> Tensor:
    """uint8 [N, 1 | 3 | 4, H, W] as `read_digits` takes it: float [N, 1 | 3, H, W] in [-1, 1].

    Args:
        images: what is transparent becomes black, as the digits' background is.
        gray: whether the colours are those of one digit, not of three; see `is_gray`.
    """
    x = images.float()
    if x.shape[1] == 4:
        x = x[:, :3] * (x[:, 3:] / 255)
    if gray:
        x = x.mean(1, keepdim=True)
    return x / 127.5 - 1


def is_gray(images: Tensor) -> bool:
    """Whether the colours of uint8 [N, 1 | 3 | 4, H, W] differ by less than 4 of 255 on average."""
    colours = images[:, :3].float()
    return float((colours - colours.mean(1, keepdim=True)).abs().mean()) < 4


def mode_coverage(digits: Tensor) -> ModeCoverage:
    """Counts the modes of digits int64 [N, C], as `read_digits` gives them.

    With C = 3 each image is a stack; with C = 1 three of them are, in a random order (files may
    lie sorted by class).
    """
    if digits.shape[1] == 1:
        digits = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))]
    stacks = digits.flatten()[: digits.numel() // 3 * 3].view(-1, 3)
    return count_modes(stacks @ torch.tensor([100, 10, 1]))


def count_modes(modes: Tensor) -> ModeCoverage:
    """The coverage of modes int64 [n], each 0 to 999."""
    n = len(modes)
    p = torch.bincount(modes, minlength=MODES).double() / max(n, 1)
    p = p[p > 0]
    kl = float((p * (p * MODES).log()).sum())
    return ModeCoverage(len(p), kl, n, *expected(n))


def expected(n: int) -> tuple[float, float]:
    """Modes, and KL from uniform, of n stacks drawn uniformly: each count is binomial(n, 1 / K)."""
    if not n:
        return 0.0, 0.0
    count = torch.arange(1, n + 1, dtype=torch.float64)
    log_p = torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(count + 1)
    log_p = log_p - torch.lgamma(n - count + 1) - count * math.log(MODES)
    p = (log_p + (n - count) * math.log1p(-1 / MODES)).exp()
    kl = MODES * (p * count / n * (count * MODES / n).log()).sum()
    return MODES * float(p.sum()), float(kl)
