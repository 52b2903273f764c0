"""Averages of what a run measures, from one tick to the next."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from gankern.training.distributed import average

# Fields that differ between two equal runs.
WALL_CLOCK = ("time_s", "img_per_s", "sec_per_kimg", "tick_s", "data_share", "peak_mib")


class TickStats:
    """Sums values step by step without waiting for the device; a tick takes their means.

    Args:
        world: number of processes; the means are over all of them.
        seconds: what the run has taken so far.
    """

    def __init__(self, world: int, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}  # of finite values
        self.steps: dict[str, int] = {}
        self.images = 0
        self.waited = 0.0  # seconds for images
        self.start = time.monotonic()

    def add(self, images: int, **values: Tensor) -> None:
        """Adds the means of one step over `images` images; a mean that is not finite is left out.

        A step may lack values that others have.
        """
        for name, value in values.items():
            value = value.detach().float().mean()
            finite = value.isfinite()
            value = torch.where(finite, value, torch.zeros_like(value))
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + finite.float()
            self.steps[name] = self.steps.get(name, 0) + 1
        self.images += images

    def take(self) -> dict[str, float]:
        """The means since the last call, and the time; a mean may not be finite.

        `nan_<name>` is the share of the steps that were left out of a mean. Gradients have none:
        their steps are `skipped`.
        """
        sums, counts = (torch.stack([*t.values()]) for t in (self.sums, self.counts))
        steps = torch.tensor([*self.steps.values()], device=counts.device)
        means, shares = average(torch.stack([sums / counts, counts / steps]), self.world).tolist()
        row = dict(zip(self.sums, means, strict=True))
        for name, share in zip(self.sums, shares, strict=True):
            if share < 1 and not name.startswith("grad_norm"):
                row[f"nan_{name}"] = round(1 - share, 6)
        now = time.monotonic()
        elapsed, self.start = now - self.start, now
        self.seconds += elapsed
        row |= {"img_per_s": round(self.images / elapsed, 1), "time_s": round(self.seconds, 3)}
        row |= {"sec_per_kimg": round(1000 * elapsed / max(self.images, 1), 4)}
        row |= {"tick_s": round(elapsed, 4), "data_share": round(self.waited / elapsed, 4)}
        self.sums, self.counts, self.steps, self.images, self.waited = {}, {}, {}, 0, 0.0
        return row


def finite(value: Any) -> bool:
    """False for a NaN or an infinity."""
    return not isinstance(value, float) or math.isfinite(value)
