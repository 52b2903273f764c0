"""Projection: the styles whose image is nearest to a given one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.training.config import TrainError

Features = Callable[[Tensor], Tensor]


@dataclass
class Projection:
    """The result: styles ws [1, num_ws, w_dim], image [1, C, H, W], distance at each step."""

    ws: Tensor
    image: Tensor
    distances: list[float]


def project(
    G: Any,
    target: Tensor,
    steps: int = 500,
    lr: float = 0.1,
    c: Tensor | None = None,
    features: Features | None = None,
    w_average_samples: int = 1000,
    per_layer: bool = False,
    optimise_noise: bool = True,
    noise_weight: float = 1e5,
    pixel_weight: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Projection:
    """Adam on w, with noise that fades, from the average style (StyleGAN2, appendix D).

    Minimised are the distance of features, the mean square of pixels at the image's size and its
    halves, and the correlation of neighbouring constant noise.

    Args:
        G: a generator with mapping and synthesis networks, in evaluation mode.
        target: [1, C, H, W] in [-1, 1], of G's size.
        steps: of Adam.
        lr: its learning rate, which ramps up over 5 % and falls over the last 25 % of the steps.
        c: [1, c_dim], the condition whose average style is the start.
        features: images [N, C, H, W] to features [N, F], differentiable; None: pixels alone.
        w_average_samples: latents of which the average style and its spread are taken.
        per_layer: a style for each layer (W+) instead of one for all.
        optimise_noise: also the constant noise of the layers, which is changed in G's copy only
            while this runs.
        noise_weight: of the noise's correlations.
        pixel_weight: of the pixels.
        seed: of latents and noise.
        progress: called with (steps done, steps in all).

    Raises:
        TrainError: G has no styles, or the image is of another size.
    """
    if not hasattr(G, "mapping"):
        raise TrainError("the generator must have styles w to project into")
    device = next(G.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z = torch.randn(w_average_samples, G.z_dim, generator=generator).to(device)
        w = G.mapping(z, None if c is None else c.expand(len(z), -1))[:, 0]  # [S, w_dim]
        mean, spread = w.mean(0), (w - w.mean(0)).square().sum(1).mean().sqrt()
        size = list(G.synthesis(G.mapping(z[:1], c)).shape)
    if list(target.shape) != size:
        raise TrainError(f"the image must be {size} (N, C, H, W), got {list(target.shape)}")
    target = target.to(device)
    ws = mean.expand(1, G.num_ws if per_layer else 1, -1).clone().requires_grad_()
    noises = [b for n, b in G.synthesis.named_buffers() if n.endswith("noise_const")]
    noises = noises if optimise_noise else []
    kept = [noise.clone() for noise in noises]
    wanted = None if features is None else features(target).detach()
    optimizer = torch.optim.Adam([ws, *noises], lr, betas=(0.9, 0.999))
    distances: list[float] = []
    try:
        for noise in noises:
            noise.normal_(generator=generator) if device.type == "cpu" else noise.normal_()
            noise.requires_grad_()
        for step in range(steps):
            t = step / steps
            ramp = min(1.0, (1 - t) / 0.25)
            ramp = (0.5 - 0.5 * math.cos(ramp * math.pi)) * min(1.0, t / 0.05)
            optimizer.param_groups[0]["lr"] = lr * ramp
            fading = float(spread) * 0.05 * max(0.0, 1 - t / 0.75) ** 2
            jitter = torch.randn(ws.shape, generator=generator).to(device) * fading
            image = G.synthesis((ws + jitter).expand(1, G.num_ws, -1), noise_mode="const")
            distance = pixel_weight * pixel_distance(image, target)
            if features is not None and wanted is not None:
                distance = distance + (features(image) - wanted).square().sum(1).mean()
            loss = distance + noise_weight * sum(map(correlation, noises))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for noise in noises:
                    noise.sub_(noise.mean()).mul_(noise.square().mean().rsqrt())
            distances.append(distance.item())
            if progress is not None:
                progress(step + 1, steps)
        with torch.no_grad():
            result = ws.detach().expand(1, G.num_ws, -1).clone()
            image = G.synthesis(result, noise_mode="const")
    finally:
        for noise, value in zip(noises, kept, strict=True):
            noise.requires_grad_(False).copy_(value)
    return Projection(result, image, distances)


def pixel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean square difference, averaged over the images' size and its halves down to 8 pixels."""
    terms = [(a - b).square().mean()]
    while min(a.shape[2:]) >= 16:
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        terms.append((a - b).square().mean())
    return torch.stack(terms).mean()


def correlation(noise: Tensor) -> Tensor:
    """Squared means of products of neighbours, at the map's size and its halves (appendix D)."""
    total = noise.new_zeros(())
    noise = noise[None, None]
    while True:
        for axis in (2, 3):
            total = total + (noise * noise.roll(1, axis)).mean().square()
        if min(noise.shape[2:]) <= 8:
            return total
        noise = F.avg_pool2d(noise, 2) * 2  # keeps unit variance
