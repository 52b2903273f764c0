"""Measures on nearest neighbours: how much of one set lies in balls around another.

A ball around each vector reaches to its k-th nearest neighbour in its own set. Precision and
recall: Kynkäänniemi et al. 2019, eq. 1 and 2, arXiv:1904.06991, with k = 3. Density and coverage:
Naeem et al. 2020, eq. 3 and 4, arXiv:2002.09797, with k = 5.

Where the k-th neighbour is a copy, the ball is empty: an image repeated k times covers nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_PIECE = 2**24  # distances at a time
_SAME = 1e-10  # squared distance over squared norms below which two vectors are copies


class Manifold(NamedTuple):
    """Precision, recall, density and coverage."""

    precision: float
    recall: float
    density: float
    coverage: float


def compare(real: Tensor, fake: Tensor, k: int = 3, density_k: int = 5) -> Manifold:
    """All four measures of features [N, D] and [M, D].

    Args:
        real, fake: features; N and M larger than k and density_k.
        k: neighbours of precision and recall.
        density_k: neighbours of density and coverage.
    """
    least, most = min(len(real), len(fake)), max(k, density_k)
    if least <= most or real.shape[1] != fake.shape[1]:
        got = f"{list(real.shape)} and {list(fake.shape)}"
        raise ValueError(f"manifold: features must be [N > {most}, D] each, got {got}")
    real_balls = radii(real, (k, density_k))  # [2, N]
    fake_balls = radii(fake, (k,))[0]  # [M]
    in_real, in_fake, count, covered = [], [], 0, []
    nearest = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    for rows, d2 in distances(real, fake):  # d2 [n, M]
        near = d2 <= real_balls[0, rows, None]
        nearest |= near.any(0)
        in_fake.append((d2 <= fake_balls).any(1))
        inside = d2 <= real_balls[1, rows, None]
        count += int(inside.sum())
        covered.append(inside.any(1))
    in_real.append(nearest)
    precision, recall, coverage = (
        torch.cat(parts).double().mean().item() for parts in (in_real, in_fake, covered)
    )
    return Manifold(precision, recall, count / (density_k * len(fake)), coverage)


def radii(x: Tensor, ks: tuple[int, ...]) -> Tensor:
    """Squared distances to the k-th nearest other vector, [len(ks), N]; -1 where it is a copy."""
    columns = [
        d2.topk(max(ks) + 1, largest=False).values[:, list(ks)]  # 0 is the vector itself
        for _, d2 in distances(x, x)
    ]
    balls = torch.cat(columns).T
    return torch.where(balls > 0, balls, -1.0)


def nearest(x: Tensor, y: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest of y [M, D] to each of x [N, D]: squared distances and indices [N, k]."""
    found = [d2.topk(min(k, len(y)), largest=False) for _, d2 in distances(x, y)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def copying(real: Tensor, fake: Tensor) -> float:
    """Median distance of a generated image to its nearest real one, over that of a real one.

    About 1 or above for new images; near 0 where real images have been memorised.
    """
    from_fake = nearest(fake, real)[0][:, 0].sqrt().median()
    from_real = radii(real, (1,))[0].clamp_min(0).sqrt().median()
    return float(from_fake / from_real) if from_real > 0 else float("nan")


def distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared Euclidean distances in float64, some rows at a time: the rows, and [n, M]."""
    x, y = x.double(), y.double()
    x2, y2 = x.square().sum(1), y.square().sum(1)
    step = max(1, _PIECE // max(1, len(y)))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        scale = x2[rows, None] + y2
        d2 = torch.addmm(scale, x[rows], y.T, alpha=-2)
        yield rows, torch.where(d2 > _SAME * scale, d2, 0.0)
