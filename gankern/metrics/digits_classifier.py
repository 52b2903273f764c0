"""A classifier of handwritten digits, trained in seconds on the 5,000 real ones.

It judges generated digits: how many look like a digit at all (confidence), and whether every
class is there (shares). Trained on 4,000 images, checked on the 1,000 others (100 a class).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gankern.data.digits import load_digits

CONFIDENT = 0.9  # probability of the best class from which a digit counts as recognised
HELD_OUT = 100  # images of each class that are not trained on


def build_classifier() -> nn.Sequential:
    """A small convolutional net: [N, 1, 28, 28] in [-1, 1] to logits [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),  # [N, 16, 14, 14]
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),  # [N, 32, 7, 7]
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@dataclass
class DigitsClassifier:
    """A trained net and what it does on digits that it has not seen.

    Attributes:
        net: [N, 1, 28, 28] to logits [N, 10].
        accuracy: fraction of the held-out real digits that it labels right.
        confident: fraction of the held-out real digits with a probability of at least 0.9.
    """

    net: nn.Module
    accuracy: float = math.nan
    confident: float = math.nan

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor, batch: int = 500) -> torch.Tensor:
        """Class probabilities.

        Args:
            images: [N, C, H, W] in [-1, 1], light digits on black; 28x28 as they are, other sizes
                as 32x32 with a border of two pixels; colours are averaged.
            batch: images at a time.

        Returns:
            float32 [N, 10] on the CPU.
        """
        device = next(self.net.parameters()).device
        parts = [self.net(as_digits(part.to(device))).softmax(1) for part in images.split(batch)]
        return torch.cat(parts).cpu()


def as_digits(images: torch.Tensor) -> torch.Tensor:
    """Brings images [N, C, H, W] to float32 [N, 1, 28, 28]."""
    x = images.float().mean(1, keepdim=True)
    if x.shape[2:] == (28, 28):
        return x
    if x.shape[2:] != (32, 32):
        x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    return x[:, :, 2:30, 2:30]


def split_digits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, held-out images and labels: [4000 | 1000, 1, 28, 28], int64."""
    images, labels = load_digits()
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for digit in range(10):
        held[rng.permutation(np.flatnonzero(labels == digit))[:HELD_OUT]] = True
    x = torch.from_numpy(images).float() / 127.5 - 1
    y = torch.from_numpy(labels)
    return x[~held], y[~held], x[held], y[held]


def _jitter(x: torch.Tensor) -> torch.Tensor:
    """Turns by up to 10 degrees, scales and shears by up to 10 %, shifts by up to 2 pixels."""
    n = len(x)
    u = torch.rand(n, 5) * 2 - 1
    angle, size, shear = u[:, 0] * math.radians(10), 1 + 0.1 * u[:, 1], 0.1 * u[:, 2]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos() * size
    theta[:, 0, 1] = -angle.sin() * size + shear
    theta[:, 1, 0] = angle.sin() * size
    theta[:, :, 2] = u[:, 3:] * (2 / 14)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is black


def train_classifier(epochs: int = 10, batch: int = 100, seed: int = 0) -> DigitsClassifier:
    """Trains the classifier on the CPU; the same seed gives the same net.

    Args:
        epochs: passes over the 4,000 training digits; 10 take about 15 s on two cores.
        batch: images a step.
        seed: of the split, the first weights, the order and the jitter.

    Returns:
        The classifier, with its accuracy and confidence on the held-out digits.

    Raises:
        DataError: the digits are not installed.
    """
    x, y, held_x, held_y = split_digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build_classifier()
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
        steps = epochs * math.ceil(len(x) / batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for index in torch.randperm(len(x)).split(batch):
                loss = F.cross_entropy(net(_jitter(x[index])), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    classifier = DigitsClassifier(net.eval())
    p = classifier.probabilities(held_x)
    classifier.accuracy = (p.argmax(1) == held_y).float().mean().item()
    classifier.confident = (p.amax(1) >= CONFIDENT).float().mean().item()
    return classifier


def digit_quality(classifier: DigitsClassifier, images: torch.Tensor) -> dict[str, Any]:
    """How much like digits images are, and of which classes.

    Args:
        classifier: from `train_classifier`.
        images: [N, C, H, W] in [-1, 1].

    Returns:
        confident: fraction with a probability of at least 0.9; shares: fraction of each class.
    """
    p = classifier.probabilities(images)
    counts = torch.bincount(p.argmax(1), minlength=10)
    return {
        "confident": (p.amax(1) >= CONFIDENT).float().mean().item(),
        "shares": (counts / len(images)).tolist(),
    }
