"""A trained generator, from a run folder or from one file."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from gankern import models
from gankern.training.checkpoint import load_checkpoint, load_module, read_tensors
from gankern.training.config import TrainConfig, TrainError
from gankern.training.run import read_config


def load_generator(source: str | os.PathLike[str]) -> tuple[nn.Module, TrainConfig]:
    """Loads the averaged generator of a run, or the generator in a safetensors file.

    Args:
        source: a run folder (its newest undamaged checkpoint is taken), a checkpoint's folder, or
            one of its files G_ema.safetensors or G.safetensors, also copied elsewhere.

    Returns:
        The generator on the CPU, in evaluation mode, without gradients; and its configuration.

    Raises:
        TrainError: there is no such generator, or it is damaged.
    """
    path = Path(source)
    if (path / "config.json").is_file():
        config = read_config(path)
        saved = load_checkpoint(path, names=("G_ema",))
        if saved is None:
            raise TrainError(f"{path}: no checkpoint yet")
        path, tensors = saved.folder / "G_ema.safetensors", saved.tensors["G_ema"]
    else:
        if path.is_dir():
            path = path / "G_ema.safetensors"
        tensors, metadata = read_tensors(path)
        if "config" not in metadata:
            raise TrainError(f"{path}: not a generator saved by gankern")
        config = TrainConfig.from_json(metadata["config"], path)
    G, _ = models.build(config)
    load_module(G, tensors, path)
    return G.eval().requires_grad_(False), config
