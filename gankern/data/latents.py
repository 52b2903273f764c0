"""From seeds to latents to images: every seed is one image, whatever is generated beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def seed_latents(seeds: Sequence[int], z_dim: int) -> Tensor:
    """z [N, z_dim], float32 standard normal, each row drawn on the CPU from its own seed."""
    rows = [torch.randn(z_dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def seed_classes(seeds: Sequence[int], num_classes: int) -> Tensor:
    """A class for each seed, int64 [N], drawn from a stream apart from that of the latents."""
    rows = [
        torch.randint(num_classes, (), generator=torch.Generator().manual_seed(seed + 2**32))
        for seed in seeds
    ]
    return torch.stack(rows)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation, which keeps the norm that a standard normal latent has.

    (sin((1 - t) ω) a + sin(t ω) b) / sin ω, with ω the angle between a and b; linear where they
    are parallel.

    Args:
        a, b: [..., z_dim].
        t: [...], 0 gives a and 1 gives b.

    Returns:
        [..., z_dim].
    """
    t = t[..., None].to(a.dtype)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)[..., None].clamp(-1, 1)
    angle = cosine.acos()
    sine = angle.sin()
    curved = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine.clamp_min(1e-12)
    return torch.where(sine > 1e-4, curved, (1 - t) * a + t * b)


def interpolation(z: Tensor, steps: int) -> Tensor:
    """From each latent of a pair to the other: z [2 P, z_dim] to [P, steps, z_dim]."""
    t = torch.linspace(0, 1, steps)
    return slerp(z[0::2, None], z[1::2, None], t[None])


def closed_walk(z: Tensor, steps: int) -> Tensor:
    """A walk through all latents and back to the first: z [K, z_dim] to [K steps, z_dim]."""
    t = torch.arange(steps) / steps
    return slerp(z[:, None], z.roll(-1, 0)[:, None], t[None]).flatten(0, 1)


@torch.no_grad()
def render(
    G: Any,
    z: Tensor,
    classes: Tensor | None = None,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Images of latents.

    All batches have the same size (the last is filled up), so that the same kernels run for an
    image whatever is generated beside it.

    Args:
        G: a generator in evaluation mode, with `z_dim` and `c_dim`.
        z: [N, z_dim].
        classes: int64 [N], for a conditional generator; otherwise None.
        batch: images at a time.
        progress: called with (images done, images in all).

    Returns:
        float32 [N, C, H, W] in [-1, 1], on the CPU.
    """
    device = next(iter(G.parameters())).device
    images = []
    for start in range(0, len(z), batch):
        count = min(batch, len(z) - start)
        index = (torch.arange(batch) % count) + start
        c = None
        if classes is not None:
            c = torch.nn.functional.one_hot(classes[index], G.c_dim).float().to(device)
        images.append(G(z[index].to(device), c)[:count].float().cpu())
        if progress is not None:
            progress(start + count, len(z))
    return torch.cat(images)
