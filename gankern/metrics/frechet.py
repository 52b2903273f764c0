"""The Fréchet distance of two sets of features, taken for two Gaussians.

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)        Heusel et al. 2017, eq. 6, arXiv:1706.08500

The trace of the square root is the sum of the square roots of the eigenvalues of S C2 S with
S = C1^½, a symmetric matrix, so that no general matrix square root is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_PIECE = 4096  # rows that are converted to float64 at a time


class FeatureStatistics:
    """Mean and covariance of features that come in pieces, in float64.

    Args:
        dim: length D of a feature vector.
        device: where the sums lie.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def append(self, features: Tensor) -> None:
        """Adds features [N, D] of any float type."""
        for piece in features.split(_PIECE):
            x = piece.to(self.sum)
            self.n += len(x)
            self.sum += x.sum(0)
            self.outer.addmm_(x.T, x)

    def reduce(self) -> None:
        """Adds up the sums of all processes, so that each has the whole."""
        if dist.is_initialized():
            n = torch.tensor(self.n, device=self.sum.device)
            for value in (n, self.sum, self.outer):
                dist.all_reduce(value)
            self.n = int(n)

    @property
    def mean(self) -> Tensor:
        """[D]."""
        return self.sum / self.n

    @property
    def covariance(self) -> Tensor:
        """[D, D], unbiased."""
        if self.n < 2:
            raise ValueError(f"covariance: features must be at least 2, got {self.n}")
        return (self.outer - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """The statistics of features [N, D]."""
    statistics = FeatureStatistics(features.shape[1], features.device)
    statistics.append(features)
    return statistics


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The distance of two Gaussians; means [D] and covariances [D, D], float64."""
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # C1^½
    product = root @ cov2 @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace)


def frechet_from_features(real: Tensor, fake: Tensor) -> float:
    """The distance of features [N, D] and [M, D].

    With fewer vectors than dimensions the square root is taken in the smaller space: for
    C1 = A A' and C2 = B B', tr (C1 C2)^½ is the sum of the singular values of A' B.
    """
    if min(len(real), len(fake)) < 2 or real.shape[1] != fake.shape[1]:
        got = f"{list(real.shape)} and {list(fake.shape)}"
        raise ValueError(f"frechet_from_features: features must be [N > 1, D] each, got {got}")
    if max(len(real), len(fake)) >= real.shape[1]:
        a, b = feature_statistics(real), feature_statistics(fake)
        return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    x, y = real.double(), fake.double()
    means = x.mean(0), y.mean(0)
    a_t = (x - means[0]) / (len(x) - 1) ** 0.5  # A'
    b_t = (y - means[1]) / (len(y) - 1) ** 0.5
    trace = torch.linalg.svdvals(a_t @ b_t.T).sum()
    traces = a_t.square().sum() + b_t.square().sum()
    return float((means[0] - means[1]).square().sum() + traces - 2 * trace)


class Extrapolation(NamedTuple):
    """The distance at infinitely many images.

    Attributes:
        value: intercept of the line through the distances over 1 / n.
        error: standard error of the intercept.
    """

    value: float
    error: float


def frechet_infinity(real: Tensor, fake: Tensor, points: int = 10, seed: int = 0) -> Extrapolation:
    """Extrapolates the distance to n = ∞; Chong and Forsyth 2020, arXiv:1911.07023.

    The distance's bias falls as 1 / n. Distances of random subsets of n real and n generated
    features, n from a half of the smaller set to all of it, are fitted by a line over 1 / n.

    Args:
        real, fake: [N, D], [M, D].
        points: subsets.
        seed: of their choice.
    """
    most = min(len(real), len(fake))
    sizes = np.unique(np.linspace(max(2, most // 2), most, points).round().astype(int))
    if len(sizes) < 3:
        return Extrapolation(float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    distances = [
        frechet_from_features(*(x[torch.from_numpy(_choose(rng, len(x), n))] for x in (real, fake)))
        for n in sizes
    ]
    line, covariance = np.polyfit(1 / sizes, distances, 1, cov=True)
    return Extrapolation(float(line[1]), float(covariance[1, 1] ** 0.5))


def _choose(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    return np.sort(rng.permutation(n)[:count])
