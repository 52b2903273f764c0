"""How images change along a path in latent space.

Perceptual path length: Karras et al. 2019, section 4.1, arXiv:1812.04948. Smoothness of an
interpolation: a generator that jumps between memorised images takes few large steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern.data.latents import seed_latents, slerp
from gankern.metrics.extractors import Extractor, MetricsError

EPSILON = 1e-4
TRIM = 0.01  # of the path lengths at either end are left out of the mean


def spaces(G: Any) -> tuple[str, ...]:
    """The latent spaces of a generator: z, and w if it has a mapping network."""
    return ("z", "w") if hasattr(G, "mapping") and hasattr(G, "synthesis") else ("z",)


@torch.no_grad()
def perceptual_path_length(
    G: Any,
    distance: Callable[[Tensor, Tensor], Tensor],
    count: int,
    space: str = "w",
    sampling: str = "end",
    epsilon: float = EPSILON,
    batch: int = 16,
    seed: int = 0,
    classes: Tensor | None = None,
) -> float:
    """Mean of distance(g(t), g(t + ε)) / ε² over random paths, 1 % trimmed at either end.

    A path is a lerp in w or a slerp in z between the latents of two seeds; t is uniform in [0, 1]
    ("full") or 0 ("end").

    Args:
        G: a generator in evaluation mode; with `mapping` and `synthesis` for w.
        distance: two batches of images [N, C, H, W], 0 to 255 and not rounded, to [N]; quadratic
            in the images' difference. `feature_distance` makes one.
        count: paths.
        space: "z" or "w".
        sampling: "full" or "end".
        epsilon: step.
        batch: paths at a time.
        seed: the paths run between the latents of seeds seed, seed + 1, ...
        classes: int64 [count], or conditions float32 [count, c_dim], for a conditional generator.
    """
    if space not in spaces(G) or sampling not in ("full", "end"):
        raise MetricsError(
            f"perceptual_path_length: space must be one of {', '.join(spaces(G))} and sampling"
            f" full or end, got {space!r} and {sampling!r}"
        )
    t = torch.zeros(count)
    if sampling == "full":
        t = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    lengths = []
    for start in range(0, count, batch):
        index = torch.arange(start, min(start + batch, count))
        z = seed_latents(range(seed + 2 * start, seed + 2 * int(index[-1]) + 2), G.z_dim)
        ends = torch.stack([t[index], t[index] + epsilon], 1)  # [n, 2]
        images = _along(G, z, ends, space, None if classes is None else classes[index])
        pixels = (images.float() + 1) * 127.5  # [n, 2, C, H, W]
        lengths.append(distance(pixels[:, 0], pixels[:, 1]).double().cpu() / epsilon**2)
    values = torch.cat(lengths).sort().values
    trim = int(TRIM * count)
    return float(values[trim : count - trim].mean())


def feature_distance(extractor: Extractor) -> Callable[[Tensor, Tensor], Tensor]:
    """The squared distance of an extractor's features, over the number of features."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        fx, fy = (extractor(images)[0].double() for images in (x, y))
        return (fx - fy).square().mean(1)

    return distance


class Smoothness(NamedTuple):
    """Largest step over mean step of an interpolation: mean and maximum over the paths."""

    mean: float
    largest: float


@torch.no_grad()
def smoothness(
    G: Any,
    extractor: Extractor,
    pairs: int = 16,
    steps: int = 16,
    space: str = "z",
    seed: int = 0,
    classes: Tensor | None = None,
) -> Smoothness:
    """How even the steps of slerp in z or lerp in w are, in feature space.

    1 is an even path; `steps` is a path that stands still but for one jump.

    Args: as `perceptual_path_length`; pairs of seeds and steps between them.
    """
    ratios = []
    for i in range(pairs):
        z = seed_latents(range(seed + 2 * i, seed + 2 * i + 2), G.z_dim)
        t = torch.linspace(0, 1, steps + 1)[None]
        images = _along(G, z, t, space, None if classes is None else classes[i : i + 1])[0]
        features = extractor((images.float() + 1) * 127.5)[0].double()
        lengths = (features[1:] - features[:-1]).norm(dim=1)
        ratios.append(lengths.max() / lengths.mean().clamp_min(1e-30))
    ratio = torch.stack(ratios)
    return Smoothness(float(ratio.mean()), float(ratio.max()))


def _along(G: Any, z: Tensor, t: Tensor, space: str, classes: Tensor | None) -> Tensor:
    """Images at t [P, T] of the paths between pairs of latents z [2 P, z_dim]: [P, T, C, H, W]."""
    device = next(iter(G.parameters())).device
    paths, points = t.shape
    c = None
    if G.c_dim:
        if classes is None:
            classes = torch.zeros(paths, dtype=torch.int64)
        if not classes.is_floating_point():
            classes = torch.nn.functional.one_hot(classes, G.c_dim).float()
        c = classes.to(device)  # [P, c_dim]
    if space == "z":
        path = slerp(z[0::2, None], z[1::2, None], t)  # [P, T, z_dim]
        images = G(path.flatten(0, 1).to(device), None if c is None else _repeat(c, points))
    else:
        w = G.mapping(z.to(device), None if c is None else _repeat(c, 2))  # [2 P, num_ws, w_dim]
        a, b = w[0::2, None], w[1::2, None]
        path = torch.lerp(a, b, t.to(w)[:, :, None, None])  # [P, T, num_ws, w_dim]
        images = G.synthesis(path.flatten(0, 1))
    return images.unflatten(0, (paths, points))


def _repeat(c: Tensor, count: int) -> Tensor:
    return c.repeat_interleave(count, 0)
