"""How much memory a configuration takes, computed without taking it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gankern import models
from gankern.training.config import TrainConfig
from gankern.training.schedule import Schedule, level_sides

STATES = {"adam": 2, "rmsprop": 1}  # tensors of an optimizer for each parameter


def memory_table(config: TrainConfig, world: int = 1) -> list[tuple[str, float]]:
    """What is held in one process, in bytes: (what, bytes), the last line their sum.

    Activations are those that a plain pass of G, or D over real and generated images, saves for
    its backward, at that level and batch of the schedule where they are most; penalties, workspaces
    of convolutions and the images' own batch come on top.

    Args:
        config: with the resolution and channels of its data.
        world: number of processes that share a batch, default 1.
    """
    with FakeTensorMode():
        G, D = models.build(config)
        g, d = (sum(p.numel() * p.element_size() for p in net.parameters()) for net in (G, D))
        passes = [
            larger_pass(config, G, D, growth, batch // world)
            for growth, batch in Schedule(config, level_sides(D), world).stages()
        ]
    size, what = max(passes)
    rows = [
        ("weights of G, D and the average of G", 2.0 * g + d),
        ("gradients", float(g + d)),
        ("optimizers", float(STATES[config.g_optimizer] * g + STATES[config.d_optimizer] * d)),
        (f"activations of {what}, the larger pass", size),
    ]
    return [*rows, ("together", sum(size for _, size in rows))]


def larger_pass(
    config: TrainConfig, G: Any, D: Any, growth: float, share: int
) -> tuple[float, str]:
    """Bytes that the larger of the passes of G and D saves, and of what images.

    Args:
        config, G, D: of the run.
        growth: of both networks, if they grow.
        share: a process's images of a step.
    """
    n = min(share, config.batch_gpu or share)
    if config.grows:
        G.set_growth(growth)
        D.set_growth(growth)
    z = torch.randn(n, config.z_dim)
    c = torch.zeros(n, config.c_dim) if config.c_dim else None
    g_pass, img = saved_bytes(G, lambda: G(z, c))  # [n, C, H, W]
    d_pass, _ = saved_bytes(D, lambda: D(img.detach(), c))
    size = f" of {img.shape[2]}x{img.shape[3]}" if config.grows else ""
    return max(2.0 * d_pass, float(g_pass + d_pass)), f"{n} images{size}"


def saved_bytes(net: nn.Module, run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that a forward pass saves for its backward beside the weights; and its result."""
    seen: dict[Any, int] = {}
    own = {t.untyped_storage()._cdata for t in [*net.parameters(), *net.buffers()]}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return sum(seen.values()), result
