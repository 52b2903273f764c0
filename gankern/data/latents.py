"""From seeds to latents to images: every seed is one image, whatever is generated beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Curve = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Straight interpolation, for styles w; arguments as `slerp`, but a and b have any shape."""
    return torch.lerp(a, b, t.reshape(t.shape + (1,) * (a.ndim - t.ndim)).to(a.dtype))


def interpolation(z: Tensor, steps: int, curve: Curve = slerp) -> Tensor:
    """From each latent of a pair to the other: z [2 P, ...] to [P, steps, ...]."""
    t = torch.linspace(0, 1, steps)
    return curve(z[0::2, None], z[1::2, None], t[None])


def closed_walk(z: Tensor, steps: int, curve: Curve = slerp) -> Tensor:
    """A walk through all latents and back to the first: z [K, ...] to [K steps, ...]."""
    t = torch.arange(steps) / steps
    return curve(z[:, None], z.roll(-1, 0)[:, None], t[None]).flatten(0, 1)


def arithmetic(latents: Tensor, signs: Sequence[int]) -> Tensor:
    """The signed sum of latents [K, ...]; of z it is brought to the length of the first.

    A sum of K normal latents is sqrt(K) times as long as G has seen; styles have no such length.
    """
    total = sum(sign * latent for sign, latent in zip(signs, latents, strict=True))
    assert isinstance(total, Tensor)
    return total * (latents[0].norm() / total.norm().clamp_min(1e-12)) if total.ndim == 1 else total


def mix_layers(rows: Tensor, cols: Tensor, layers: Sequence[int]) -> Tensor:
    """Styles of a mixing grid: the columns' in `layers`, the rows' in the others.

    Args:
        rows: [R, num_ws, w_dim].
        cols: [C, num_ws, w_dim].
        layers: numbers of styles, from 0 (coarse) to num_ws - 1 (fine).

    Returns:
        [R, C, num_ws, w_dim] (StyleGAN, arXiv:1812.04948, figure 3).
    """
    mixed = rows[:, None].repeat(1, len(cols), 1, 1)
    mixed[:, :, list(layers)] = cols[None][:, :, list(layers)]
    return mixed


@torch.no_grad()
def styles(
    G: Any,
    z: Tensor,
    classes: Tensor | None = None,
    psi: float = 1.0,
    cutoff: int | None = None,
) -> Tensor:
    """Styles ws [N, num_ws, w_dim] of latents z [N, z_dim], on the CPU; truncated by psi, cutoff.

    Args: G with a mapping network; classes as `render`; psi and cutoff as `MappingNetwork`.
    """
    device = next(iter(G.parameters())).device
    c = None if classes is None else _conditions(G, classes).to(device)
    ws: Tensor = G.mapping(z.to(device), c, psi, cutoff)
    return ws.cpu()


@torch.no_grad()
def render(
    G: Any,
    z: Tensor,
    classes: Tensor | None = None,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Tensor:
    """Images of latents.

    All batches have the same size (the last is filled up), so that the same kernels run for an
    image whatever is generated beside it.

    Args:
        G: a generator in evaluation mode, with `z_dim` and `c_dim`.
        z: [N, z_dim]; or styles [N, num_ws, w_dim], for its synthesis network.
        classes: int64 [N], or conditions float32 [N, c_dim], for a conditional generator;
            otherwise None.
        batch: images at a time.
        progress: called with (images done, images in all).
        options: of G's call, such as truncation_psi.

    Returns:
        float32 [N, C, H, W] in [-1, 1], on the CPU.
    """
    device = next(iter(G.parameters())).device
    images = []
    for start in range(0, len(z), batch):
        count = min(batch, len(z) - start)
        index = (torch.arange(batch) % count) + start
        c = None if classes is None else _conditions(G, classes[index]).to(device)
        if z.ndim == 3:
            x = G.synthesis(z[index].to(device))
        else:
            x = G(z[index].to(device), c, **options)
        images.append(x[:count].float().cpu())
        if progress is not None:
            progress(start + count, len(z))
    return torch.cat(images)


def _conditions(G: Any, classes: Tensor) -> Tensor:
    """[N, c_dim] of classes int64 [N]; conditions stay as they are."""
    if classes.is_floating_point():
        return classes
    return torch.nn.functional.one_hot(classes, G.c_dim).float()
