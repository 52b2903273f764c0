"""Data-parallel training under torchrun: what every process needs, in a few functions.

Gradients are averaged by one all-reduce of one flat bucket, once a step after all passes of it,
instead of by DistributedDataParallel around the networks. Its hooks fire in the backward of one
forward through the wrapper, and so exclude what a GAN does: D runs on real and on generated images
before one backward, G's gradient passes through D without being wanted there, penalties
differentiate a gradient, path length enters G by its mapping and synthesis networks, and levels of
a growing network have no gradient until they run. Parts of an accumulated batch are reduced once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gankern.training.config import TrainError


def rank_and_world() -> tuple[int, int]:
    """This process's number and the number of processes, as torchrun set them; else 0 and 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(name: str) -> torch.device:
    """The device of an option: "auto" is this process's GPU if there is one, else the CPU.

    Raises:
        TrainError: no such device here.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainError(f"--device {name} cannot be used here: {reason}") from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local % torch.cuda.device_count())
    return device


class LostProcessError(TrainError):
    """Another process of the run is gone."""


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """Joins the processes that torchrun started (gloo on CPU, nccl on CUDA); yields rank, world.

    A group that the caller has made is used, and left to the caller: one that trains several times.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield 0, 1
        return
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield rank, world
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, dist.DistError) or re.search("peer|[Tt]imed out|store", reason):
            raise LostProcessError(
                f"process {rank} has lost another of the {world}: go on with --resume ({reason})"
            ) from error
        raise
    finally:
        if own:
            dist.destroy_process_group()


def average_gradients(module: nn.Module, world: int) -> None:
    """Replaces every gradient by its mean over the processes, in one all-reduce."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if world == 1 or not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= world
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def average(values: Tensor, world: int) -> Tensor:
    """The mean of a tensor over the processes, in place."""
    if world > 1:
        dist.all_reduce(values)
        values /= world
    return values
