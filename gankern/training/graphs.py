"""CUDA graphs of the plain passes: recorded once, replayed with new inputs.

Recorded are forward and backward of `Phases.main_D` and `Phases.main_G`; averaging, the optimizer
and penalties run as ever. The first passes run eagerly on a side stream, as capturing demands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from gankern.training.config import TrainConfig, TrainError
from gankern.training.phases import Part

WARMUP = 3

Pass = Callable[..., dict[str, Tensor]]


def check_graphs(config: TrainConfig, device: torch.device, world: int) -> None:
    """TrainError, with the reason, if the passes of this configuration cannot be captured."""
    reasons = {
        f"the device is {device}": device.type != "cuda",
        f"{world} processes exchange statistics within a pass": world > 1,
        "--batch-gpu accumulates over several passes": config.batch_gpu > 0,
        "the batch changes": bool(config.batch_schedule),
        "augmentation is not captured": config.augment != "none",
        "--compile has its own": config.compile,
    }
    for reason, holds in reasons.items():
        if holds:
            raise TrainError(f"--cuda-graphs cannot be used: {reason}")


class CudaGraphs:
    """Recording and replaying on a GPU."""

    def warm_up(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Runs on a side stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = run()
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def capture(
        self, run: Callable[[], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Records; returns the outputs' fixed places and what replays into them."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        return outputs, graph.replay


class GraphedPass:
    """A pass that is captured after a few calls.

    The gradients live at fixed places, which a replay overwrites; other passes may have put others
    into the parameters in between, so that each replay puts its own back.

    Args:
        run: (part, scale) -> statistics, leaving gradients in `net`.
        net: whose gradients the pass computes; they must be absent before it.
        graphs: records and replays.
    """

    def __init__(self, run: Pass, net: nn.Module, graphs: Any = None) -> None:
        self.run, self.net, self.graphs = run, net, graphs or CudaGraphs()
        self.calls = 0
        self.outputs: dict[str, Tensor] = {}
        self.replay: Callable[[], None] | None = None

    def __call__(self, part: Part, scale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= WARMUP:
            return self.graphs.warm_up(lambda: self.run(part, scale))
        if self.replay is None:
            values: list[Any] = [getattr(part, f.name) for f in fields(part)]
            fixed: list[Any] = [v if v is None else v.clone() for v in values]
            self.part = Part(*fixed)
            self.outputs, self.replay = self.graphs.capture(lambda: self.run(self.part, scale))
            self.grads = [(p, p.grad) for p in self.net.parameters() if p.grad is not None]
        for f in fields(part):
            target, source = getattr(self.part, f.name), getattr(part, f.name)
            if target is not None:
                target.copy_(source)
        self.replay()
        for p, grad in self.grads:
            p.grad = grad
        return {name: value.clone() for name, value in self.outputs.items()}
