"""The losses and penalties of a step, as gradients: what the loop accumulates and hands on.

Each function runs forward and backward over a part of the batch and leaves its share of the
gradient in the network; the loop averages over parts and processes. Penalties are differentiated
twice, in float32 and uncompiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gankern.training import penalties
from gankern.training.config import TrainConfig
from gankern.training.distributed import average
from gankern.training.losses import LOSSES

Net = Callable[..., Tensor]


@dataclass
class Part:
    """What one forward and backward pass takes: n images, or as many latents.

    Attributes:
        real: images [n, C, H, W] as D shall see them.
        real_c: their conditions [n, c_dim], or None.
        z, c: latents [n, z_dim] and conditions of generated images.
        z_mix, crossover: second latents, and the layer [n] from which they count, or None.
    """

    real: Tensor
    real_c: Tensor | None
    z: Tensor
    c: Tensor | None
    z_mix: Tensor | None = None
    crossover: Tensor | None = None

    def split(self, count: int) -> list[Part]:
        """`count` parts of equal size."""
        values = [getattr(self, f.name) for f in fields(self)]
        chunks = [(None,) * count if v is None else v.chunk(count) for v in values]
        return [Part(*row) for row in zip(*chunks, strict=True)]


class Phases:
    """The passes of D and G.

    Args:
        config: of the run.
        G, D: the networks; the plain passes run `compiled` forms of them if asked to.
        augment: images to images, before D.
        device: of the networks.
        world: number of processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        G: Any,
        D: Any,
        augment: Callable[[Tensor], Tensor],
        device: torch.device,
        world: int = 1,
    ) -> None:
        self.config, self.G, self.D, self.augment = config, G, D, augment
        self.device, self.world = device, world
        self.loss = LOSSES[config.loss]
        self.run_G: Net = torch.compile(G) if config.compile else G
        self.run_D: Net = torch.compile(D) if config.compile else D
        self.pl_mean = torch.zeros((), device=device)

    def autocast(self) -> AbstractContextManager[Any]:
        """16 bits in the forward pass, unless the network's own levels decide."""
        if self.config.precision == "fp32" or self.config.num_fp16_res:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.config.low_dtype)

    def generate(self, part: Part) -> Tensor:
        """G's images [n, C, H, W]."""
        if part.z_mix is None:
            return self.run_G(part.z, part.c)
        return self.run_G(part.z, part.c, z_mix=part.z_mix, crossover=part.crossover)

    def main_D(self, part: Part, scale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """D's loss: real images up, generated ones down; penalties that are taken every step."""
        config = self.config
        with self.autocast():
            with torch.no_grad():
                fake = self.generate(part)
            fake, real = self.augment(fake), self.augment(part.real)
            real_logits = precise(self.run_D(real, part.real_c))  # [n, 1]
            fake_logits = precise(self.run_D(fake, part.c))
        loss = self.loss.d(real_logits, fake_logits, config.label_smoothing)
        values = {"loss_D": loss, "logit_real": real_logits, "logit_fake": fake_logits}
        if config.drift:
            values["drift"] = penalties.drift(real_logits, config.drift)
            loss = loss + values["drift"]
        scale(loss).backward()
        return values

    def regularise_D(self, part: Part, scale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """R1, R2 and gradient penalty at the images that D sees, augmented ones included."""
        config = self.config
        real = precise(self.augment(part.real).detach())
        values: dict[str, Tensor] = {}
        if config.r1_gamma:
            x = real.clone().requires_grad_()
            values["r1"] = penalties.r1(x, precise(self.D(x, part.real_c)), config.r1_gamma)
        if config.r2_gamma or config.gp_weight:
            with torch.no_grad():
                fake = precise(self.augment(self.generate(part)))
            if config.r2_gamma:
                x = fake.clone().requires_grad_()
                values["r2"] = penalties.r2(x, precise(self.D(x, part.c)), config.r2_gamma)
            if config.gp_weight:
                values["gp"] = penalties.gradient_penalty(
                    lambda x: precise(self.D(x, part.real_c)), real, fake,
                    config.gp_weight, config.gp_target,
                )  # fmt: skip
        scale(torch.stack([*values.values()]).sum() * config.d_reg_interval).backward()
        return values

    def main_G(self, part: Part, scale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """G's loss: its images up."""
        with self.autocast():
            fake_logits = precise(self.run_D(self.augment(self.generate(part)), part.c))
            paired: tuple[Tensor, ...] = ()
            if self.loss.pairs:
                paired = (precise(self.run_D(self.augment(part.real), part.real_c)),)
        loss = self.loss.g(fake_logits, *paired)
        scale(loss).backward()
        return {"loss_G": loss}

    def regularise_G(self, part: Part, scale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Path length of a share of the batch; moves its mean, unless that would not be finite."""
        config, G = self.config, self.G
        n = max(len(part.z) // config.pl_batch_shrink, 1)
        ws = G.mapping(part.z[:n], None if part.c is None else part.c[:n])
        ws = ws.contiguous() if ws.requires_grad else ws.clone().requires_grad_()
        penalty, mean = penalties.path_length(
            G.synthesis(ws), ws, self.pl_mean, config.pl_weight, config.pl_decay,
            reduce=lambda length: average(length, self.world),
        )  # fmt: skip
        self.pl_mean = torch.where(mean.isfinite(), mean, self.pl_mean)
        scale(penalty * config.g_reg_interval).backward()
        return {"path_length": penalty, "pl_mean": self.pl_mean}


def precise(x: Tensor) -> Tensor:
    """x in float32, or in float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
