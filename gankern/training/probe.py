"""Figures of a tick that are cheap: how much G's samples vary, and how long the weights are."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 64
ANCHORS = 128  # real images that stand for modes
SIDE = 32  # pixels
CHANNELS = (32, 64)


class Probe:
    """Compares samples of fixed latents with real images in a fixed feature space.

    The space is that of two convolutions with random weights, the same ones in every run: enough
    to tell whether images differ, not how good they are.

    Args:
        real: images [N, C, 32, 32] in [-1, 1], N at least 2; 192 are wanted.
        device: where it computes.
    """

    def __init__(self, real: Tensor, device: torch.device) -> None:
        rng = torch.Generator().manual_seed(0)
        widths = (real.shape[1], *CHANNELS)
        self.filters = [
            (torch.randn(o, i, 3, 3, generator=rng) * (2 / (9 * i)) ** 0.5).to(device)
            for i, o in itertools.pairwise(widths)
        ]
        real = real.to(device)
        features = self.features(real)
        half = max(len(features) - SAMPLES, 1)
        self.anchors = features[:half][:ANCHORS]
        self.real_distance = mean_distance(features)
        self.real_spread = pixel_spread(real)
        self.real_modes = self._modes(features[half:] if len(features) > half else features)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[N, 4096] of images [N, C, 32, 32]."""
        x = images
        for weight in self.filters:
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
        return x.flatten(1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, float]:
        """Figures of samples [N, C, 32, 32], each 1 where they are as those of real images.

        Returns:
            diversity: mean distance of a pair; spread: mean deviation of a pixel over the batch,
            the minibatch statistic; modes_seen: anchors that are nearest to a sample.
        """
        features = self.features(images)
        return {
            "diversity": mean_distance(features) / max(self.real_distance, 1e-12),
            "spread": pixel_spread(images) / max(self.real_spread, 1e-12),
            "modes_seen": self._modes(features) / max(self.real_modes, 1e-12),
        }

    def _modes(self, features: Tensor) -> float:
        """Share of features [N, D] that have an anchor of their own."""
        index = torch.cdist(features, self.anchors).argmin(1)
        return len(index.unique()) / len(features)


def mean_distance(features: Tensor) -> float:
    """Mean Euclidean distance of two different rows of [N, D]."""
    n = len(features)
    features = features - features.mean(0)  # cdist multiplies: nothing large may cancel
    return float(torch.cdist(features, features).sum()) / max(n * (n - 1), 1)


def pixel_spread(images: Tensor) -> float:
    """Mean over pixels of the standard deviation over images."""
    return float(images.float().std(0, correction=0).mean())


@torch.no_grad()
def weight_norm(net: nn.Module) -> float:
    """Euclidean length of all parameters."""
    return float(torch.nn.utils.get_total_norm(list(net.parameters())))
