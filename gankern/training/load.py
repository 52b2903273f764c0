"""A trained generator, from a run folder or from one file, and the conditions it knows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gankern import models
from gankern.data import DataError, open_dataset
from gankern.training.checkpoint import load_checkpoint, load_module, read_tensors
from gankern.training.config import TrainConfig, TrainError
from gankern.training.noise import draw_conditions
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


def seed_vectors(config: TrainConfig, seeds: Sequence[int]) -> Tensor:
    """A condition for each seed, float32 [N, label_dim]: the labels of a random real image.

    They come from a stream apart from that of the latents, like `seed_classes`.

    Args:
        config: of a generator whose conditions are vectors.
        seeds: one a condition.

    Raises:
        TrainError: the data set of the run is gone, or its labels are others now.
    """
    try:
        dataset = open_dataset(config.data)
    except DataError as error:
        raise TrainError(
            f"conditions are drawn from the run's data set, which cannot be opened: {error}"
        ) from error
    if dataset.label_dim != config.label_dim:
        raise TrainError(
            f"{config.data}: labels must be vectors of length {config.label_dim}, as in training,"
            f" got length {dataset.label_dim}"
        )
    rows: list[Any] = [draw_conditions(dataset, config.c_dim, 1, seed + 2**32) for seed in seeds]
    return torch.cat(rows)
