"""What a step takes: real images and their conditions, latents, conditions and style mixing.

Latents, conditions and crossovers are drawn for the whole batch on the CPU, as functions of the
images seen, so that every number of processes sees the same; each process takes its part.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.data import BatchSampler, Dataset
from gankern.models.levels import shrink
from gankern.training.augment import mirror
from gankern.training.config import TrainConfig
from gankern.training.noise import crossovers, derive_seed, draw_conditions, latents
from gankern.training.phases import Part


class Inputs:
    """Draws the parts of a step.

    Args:
        config: of the run.
        dataset: real images.
        G, D: the networks; they say how far they have grown and how many styles are in use.
        device: of the tensors.
        rank, world: this process and the number of them.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        G: Any,
        D: Any,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.config, self.dataset, self.G, self.D = config, dataset, G, D
        self.device, self.rank, self.world = device, rank, world
        self.waited = 0.0  # seconds for images, until someone takes them
        self.sampler = BatchSampler(len(dataset), config.batch, config.seed, rank, world)

    def draw_D(self, cur_nimg: int, batch: int) -> Part:
        """The next real images, and latents; seeds this process's other randomness."""
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "step", cur_nimg, self.rank))
        self.sampler.batch = batch
        start = time.monotonic()
        real, labels = self.dataset.batch(next(self.sampler), self.device)  # [N, C, H, W]
        self.waited += time.monotonic() - start
        if config.mirror:
            real = mirror(real)
        if config.grows:
            real = shrink(real, self.D)
        if config.channels_last:
            real = real.contiguous(memory_format=torch.channels_last)
        return Part(real, self._conditions(labels), *self._latents(cur_nimg, batch, "D"))

    def draw_G(self, cur_nimg: int, batch: int, seen: Part) -> Part:
        """New latents beside the real images that D saw last."""
        return Part(seen.real, seen.real_c, *self._latents(cur_nimg, batch, "G"))

    def grid(self, side: int) -> tuple[Tensor, Tensor | None]:
        """Latents [side², z_dim] of the sample grid, and conditions, of which a column has one."""
        config, n = self.config, side**2
        z = latents(config.z_dim, n, derive_seed(config.first_seed, "grid")).to(self.device)
        if not config.c_dim:
            return z, None
        column = torch.arange(n) % side
        if config.num_classes:
            return z, F.one_hot(column % config.c_dim, config.c_dim).float().to(self.device)
        vectors: Any = draw_conditions(
            self.dataset, config.c_dim, side, derive_seed(config.first_seed, "grid")
        )
        return z, vectors[column].to(self.device)

    def _conditions(self, labels: Tensor | None) -> Tensor | None:
        """[N, c_dim] of the labels of real images."""
        if labels is None or not self.config.c_dim:
            return None
        if labels.is_floating_point():
            return labels
        return F.one_hot(labels, self.config.num_classes).float()

    def _latents(self, cur_nimg: int, batch: int, net: str) -> tuple[Any, ...]:
        """z, c, z_mix, crossover of this process."""
        config = self.config

        def seed(stream: str) -> int:
            return derive_seed(config.seed, f"{stream}_{net}", cur_nimg)

        z = latents(config.z_dim, batch, seed("noise"))
        c = draw_conditions(self.dataset, config.c_dim, batch, seed("class"))
        z_mix = crossover = None
        if config.style_mixing:
            z_mix = latents(config.z_dim, batch, seed("mix"))
            crossover = crossovers(batch, self.G.used_ws, config.style_mixing, seed("cross"))
        return tuple(
            None if t is None else place(t.chunk(self.world)[self.rank], self.device)
            for t in (z, c, z_mix, crossover)
        )


def place(t: Tensor, device: torch.device) -> Tensor:
    """A tensor on its device; copies to a GPU do not wait."""
    if device.type == "cuda":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)
