"""Averages of what a run measures, from one tick to the next."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from gankern.training.config import TrainError
from gankern.training.distributed import average

# Fields that differ between two equal runs.
WALL_CLOCK = ("time_s", "img_per_s")


class TickStats:
    """Sums values step by step without waiting for the device; a tick takes their means.

    Args:
        world: number of processes; the means are over all of them.
        seconds: what the run has taken so far.
    """

    def __init__(self, world: int, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.images = 0
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
        self.images += images

    def take(self, kimg: float) -> dict[str, float]:
        """The means since the last call, and the time.

        Raises:
            TrainError: a value was infinite or NaN in every step.
        """
        sums, counts = (torch.stack([*t.values()]) for t in (self.sums, self.counts))
        means = average(sums / counts, self.world).tolist()
        row = dict(zip(self.sums, means, strict=True))
        for name, value in row.items():
            if not math.isfinite(value):
                raise TrainError(
                    f"{name} is {value} at {kimg} kimg: training has diverged; go on from the last"
                    " checkpoint, or start again with a lower learning rate"
                )
        now = time.monotonic()
        elapsed, self.start = now - self.start, now
        self.seconds += elapsed
        row |= {"img_per_s": round(self.images / elapsed, 1), "time_s": round(self.seconds, 3)}
        self.sums, self.counts, self.images = {}, {}, 0
        return row
