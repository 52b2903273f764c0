"""The kernel distance: squared maximum mean discrepancy under the kernel (x·y / D + 1)³.

Bińkowski et al. 2018, arXiv:1801.01401. Unbiased at any number of images; it can be negative.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GROUPS = 20  # of the jackknife
BLOCK = 5000  # vectors that are all compared with each other


class KernelDistance(NamedTuple):
    """An estimate and its standard error."""

    value: float
    error: float


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / D + 1)³ of every pair, [N, M]; x [N, D], y [M, D]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate over all pairs of x [N, D] and y [M, D]."""
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    xx, yy, xy = cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)
    same = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(same - 2 * xy.mean())


def kernel_distance(real: Tensor, fake: Tensor, seed: int = 0) -> KernelDistance:
    """The unbiased estimate from all features, in blocks, with the jackknife's standard error.

    Sets are cut into disjoint blocks of at most 5,000 vectors, whose estimates are averaged. The
    error is that of leaving out each of 20 groups of a block in turn.

    Args:
        real, fake: [N, D], [M, D]; N and M at least 4.
        seed: of the random order, in which blocks and groups are cut.
    """
    if min(len(real), len(fake)) < 4 or real.shape[1] != fake.shape[1]:
        got = f"{list(real.shape)} and {list(fake.shape)}"
        raise ValueError(f"kernel_distance: features must be [N > 3, D] each, got {got}")
    rng = np.random.default_rng(seed)
    count = -(-max(len(real), len(fake)) // BLOCK)
    blocks = zip(*(_cut(rng, x, count) for x in (real, fake)), strict=True)
    estimates = [_jackknife(x.double(), y.double()) for x, y in blocks]
    value = sum(estimate.value for estimate in estimates) / count
    error = sum(estimate.error**2 for estimate in estimates) ** 0.5 / count
    return KernelDistance(value, error)


def subset_distances(
    real: Tensor, fake: Tensor, subsets: Iterable[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """The unbiased estimate of each subset, given as indices into real and into fake.

    The field reports the mean over 100 subsets of 1,000; `draw_subsets` draws them.
    """
    return np.array(
        [mmd2(real[torch.from_numpy(i)], fake[torch.from_numpy(j)]) for i, j in subsets]
    )


def draw_subsets(
    n: int, m: int, count: int = 100, size: int = 1000, seed: int = 2020
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random subsets of n real and m generated vectors, without repetition inside a subset."""
    if size > min(n, m):
        raise ValueError(f"draw_subsets: size must be at most {min(n, m)}, got {size}")
    rng = np.random.RandomState(seed)
    return [
        (rng.choice(n, size, replace=False), rng.choice(m, size, replace=False))
        for _ in range(count)
    ]


def _cut(rng: np.random.Generator, x: Tensor, count: int) -> tuple[Tensor, ...]:
    return x[torch.from_numpy(rng.permutation(len(x)))].tensor_split(count)


def _jackknife(x: Tensor, y: Tensor) -> KernelDistance:
    """Estimate and error from the sums of the kernel over pairs of groups."""
    groups = min(GROUPS, len(x) // 2, len(y) // 2)
    xs, ys = x.tensor_split(groups), y.tensor_split(groups)
    n, m = (torch.tensor([len(part) for part in parts]).double() for parts in (xs, ys))
    xx, yy, xy = _pair_sums(xs, x, xs), _pair_sums(ys, y, ys), _pair_sums(xs, y, ys)
    for sums, parts in ((xx, xs), (yy, ys)):  # a vector is not compared with itself
        diagonal = [((p.square().sum(1) / p.shape[1] + 1) ** 3).sum() for p in parts]
        sums.diagonal().sub_(torch.stack(diagonal))
    out = torch.eye(groups, dtype=torch.float64, device=x.device)
    keep = torch.cat([torch.zeros_like(out[:1]), out])  # row 0: all; row i: without group i - 1
    keep = 1 - keep  # [groups + 1, groups]
    n, m = keep @ n.to(x.device), keep @ m.to(x.device)
    inside_x, inside_y, between = (((keep @ sums) * keep).sum(1) for sums in (xx, yy, xy))
    estimates = inside_x / (n * (n - 1)) + inside_y / (m * (m - 1)) - 2 * between / (n * m)
    deviations = estimates[1:] - estimates[1:].mean()
    error = ((groups - 1) / groups * deviations.square().sum()).sqrt()
    return KernelDistance(float(estimates[0]), float(error))


def _pair_sums(rows: tuple[Tensor, ...], y: Tensor, cols: tuple[Tensor, ...]) -> Tensor:
    """Sums of the kernel over each pair of groups, [G, G]; y is all of cols."""
    sizes = [len(part) for part in cols]
    sums = [cubic_kernel(part, y).sum(0).split(sizes) for part in rows]
    return torch.stack([torch.stack([piece.sum() for piece in row]) for row in sums])
