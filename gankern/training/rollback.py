"""Going back to a healthy checkpoint, with another seed and lower learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from gankern.training import checkpoint
from gankern.training.config import TrainConfig, TrainError
from gankern.training.monitor import Unhealthy
from gankern.training.run import write_config

LOWER = 0.5  # times the learning rates


def roll_back(error: Unhealthy, config: TrainConfig, run: Path | None) -> Path:
    """Prepares the run folder so that resuming it goes on from before the alarm.

    Checkpoints from after the symptom began are removed; config.json and `config` get the next
    seed, lower learning rates and a note. Every process calls it; the first one writes.

    Args:
        error: the alarm.
        config: of the run; changed in place.
        run: its folder; None in processes other than the first.

    Returns:
        The run folder.

    Raises:
        TrainError: the run has gone back as often as it may.
    """
    if len(config.rollbacks) >= config.max_rollbacks:
        raise TrainError(f"{error} (after {len(config.rollbacks)} rollbacks)") from error
    shared: list[Any] = [None, 0]
    if run is not None:
        shared = [str(run), _remove_unhealthy(run, round(error.alarm.since * 1000))]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    folder, to_nimg = Path(shared[0]), int(shared[1])
    note = {"from_kimg": error.alarm.kimg, "to_kimg": to_nimg / 1000, "seed": config.seed}
    config.rollbacks = [*config.rollbacks, note | {"alarm": error.alarm.to_json()}]
    config.seed += 1
    config.g_lr *= LOWER
    config.d_lr *= LOWER
    if run is not None:
        write_config(run, config)
    return folder


def _remove_unhealthy(run: Path, since: int) -> int:
    """Removes checkpoints from `since` on; images seen at the newest that is left, or 0."""
    folders = checkpoint.list_checkpoints(run)
    healthy = [folder for folder in folders if int(folder.name) < since]
    for folder in folders:
        if folder not in healthy:
            checkpoint.remove(folder)
    return int(healthy[-1].name) if healthy else 0
