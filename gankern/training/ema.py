"""The moving average of the generator, from which samples are drawn."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_ema(
    G_ema: nn.Module, G: nn.Module, batch: int, cur_nimg: int, half_life: float, rampup: float
) -> None:
    """G_ema <- beta G_ema + (1 - beta) G with beta = 0.5^(batch / half-life), buffers included.

    Args:
        G_ema: the average, changed in place.
        G: the generator just updated.
        batch: images of the step.
        cur_nimg: images seen before the step.
        half_life: in images; 0 copies G.
        rampup: the half-life is at most this share of cur_nimg; 0 is no limit.
    """
    if rampup > 0:
        half_life = min(half_life, rampup * cur_nimg)
    beta = 0.5 ** (batch / half_life) if half_life > 0 else 0.0
    source = [*G.parameters(), *G.buffers()]
    target = [*G_ema.parameters(), *G_ema.buffers()]
    floating = [(t, s) for t, s in zip(target, source, strict=True) if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in floating], [s for _, s in floating], 1 - beta)
    for t, s in zip(target, source, strict=True):
        if not t.is_floating_point():
            t.copy_(s)
