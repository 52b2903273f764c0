"""Several processes of one group, as torchrun starts them, without importing PyTorch in each."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """function(*arguments) in each of `count` processes, with gloo between them.

    They are forked off a process that has imported all and done nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gankern.training.loop"])
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    started = [
        context.Process(target=_member, args=(rank, environment, function, arguments))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=300)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * count, f"exit codes {codes}; what they said stands above"


def _member(
    rank: int, environment: dict[str, str], function: Callable[..., None], arguments: tuple
) -> None:
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function(*arguments)
    dist.destroy_process_group()
