"""One network's optimizer, and all that a gradient meets before it: scale, mean, clip, check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gankern.training.config import TrainConfig
from gankern.training.distributed import average_gradients

FP16_SCALE = 2.0**16  # of losses at the start; it doubles every 2,000 finite steps


class Updater:
    """Steps a network along the gradients that were accumulated in it.

    A step whose gradients hold an infinity or a NaN, in any process, is skipped as a whole: neither
    weights nor the optimizer's state move, and with fp16 the loss scale is halved. Zeroing single
    elements instead would let Adam's mean square and momentum drift on a false gradient.

    Penalties taken every k-th step are steps of their own: Adam then makes k + 1 steps in place of
    k, so that its learning rate is multiplied by k / (k + 1) and its betas are raised to that power
    (StyleGAN2, appendix B).

    Args:
        net: whose parameters move.
        kind: "adam" or "rmsprop".
        config: of the run.
        lazy: k of the network's penalty; 0 if it has none or takes it every step.
        world: number of processes.
    """

    def __init__(
        self, net: nn.Module, kind: str, config: TrainConfig, lazy: int = 0, world: int = 1
    ) -> None:
        self.net, self.config, self.world = net, config, world
        self.ratio = lazy / (lazy + 1) if lazy else 1.0
        device = next(net.parameters()).device
        self.optimizer: torch.optim.Optimizer
        if kind == "adam":
            betas = (config.beta1**self.ratio, config.beta2**self.ratio)
            self.optimizer = torch.optim.Adam(net.parameters(), 0.0, betas, fused=True)
        else:
            self.optimizer = torch.optim.RMSprop(net.parameters(), 0.0)
        self.scaled = config.precision == "fp16"
        scale = FP16_SCALE if self.scaled else 1.0
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=2000)

    def backward(
        self,
        phase: Callable[..., dict[str, Tensor]],
        parts: list[Any],
        fresh: bool = True,
    ) -> dict[str, Tensor]:
        """Accumulates the mean gradient of the parts; `fresh` drops what was there.

        Returns:
            The statistics of the phase, concatenated over the parts.
        """
        if fresh:
            self.optimizer.zero_grad()
        rows = [phase(part, lambda x: self.scaler.scale(x / len(parts))) for part in parts]
        return {name: torch.cat([row[name].reshape(-1) for row in rows]) for name in rows[0]}

    def step(self, lr: float) -> dict[str, Tensor]:
        """Averages the gradients over the processes, clips them, and moves the weights.

        Returns:
            grad_norm: length of the gradient before it is clipped; skipped: 1 if it is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.ratio
        average_gradients(self.net, self.world)
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.net.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
        self.scaler.step(self.optimizer)
        # Without float16 a step that was skipped says nothing of the scale, which stays.
        self.scaler.update(None if self.scaled else 1.0)
        return {"grad_norm": norm, "skipped": ~norm.isfinite()}


def clip_weights(net: nn.Module, limit: float) -> None:
    """Clamps every parameter to [-limit, limit] (WGAN, algorithm 1)."""
    with torch.no_grad():
        parameters: list[Tensor] = [*net.parameters()]
        torch._foreach_clamp_max_(parameters, limit)
        torch._foreach_clamp_min_(parameters, -limit)
