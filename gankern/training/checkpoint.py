"""Checkpoints: folders of safetensors and JSON that are whole or not there.

    RUN/checkpoints/000000100000/       number of images seen
        G.safetensors  D.safetensors  G_ema.safetensors     weights, the configuration inside
        optimizer_G.safetensors  optimizer_D.safetensors
        state.json                      counters, order of the data, SHA-256 of the other files

A checkpoint is written under a hidden name, flushed to disk, and renamed; the last two are kept.
Nothing in it can execute code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gankern.training.config import TrainConfig, TrainError

FORMAT = 1
KEEP = 2

Parts = dict[str, nn.Module | torch.optim.Optimizer]


@dataclass
class Checkpoint:
    """A checkpoint read and verified.

    Attributes:
        folder: where it lies.
        state: counters and other plain values.
        tensors: of each file, by its name without ".safetensors".
        damaged: newer checkpoints that could not be used, each in one line.
    """

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    damaged: list[str]


def save(
    run: Path, cur_nimg: int, config: TrainConfig, parts: Parts, counters: dict[str, Any]
) -> Path:
    """Writes RUN/checkpoints/<cur_nimg>, then removes all but it and the one before.

    Args:
        run: the run folder.
        cur_nimg: real images seen so far.
        config: stored in the metadata of each file.
        parts: networks and optimizers, each a file of its name.
        counters: plain values for state.json.

    Raises:
        OSError: the disk is full or cannot be written; nothing of the checkpoint remains.
    """
    folder = run / "checkpoints" / f"{cur_nimg:012d}"
    folder.parent.mkdir(exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        metadata = {"config": config.to_json()}
        sums = {}
        for name, part in parts.items():
            data = safetensors.torch.save(_tensors(part), metadata)
            sums[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
            _write_durably(partial / f"{name}.safetensors", data)
        state = {"format": FORMAT, "cur_nimg": cur_nimg, "files": sums} | counters
        state["sha256"] = _checksum(state)
        _write_durably(partial / "state.json", (json.dumps(state, indent=2) + "\n").encode())
        _flush_folder(partial)
        partial.chmod(run.stat().st_mode)
        if folder.exists():  # only a damaged one can be in the way
            remove(folder)
        partial.rename(folder)
        _flush_folder(folder.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    # Newer ones are damaged: this run had to go on from an older one.
    checkpoints = list_checkpoints(run)
    latest = checkpoints.index(folder) + 1
    for old in checkpoints[: max(latest - KEEP, 0)] + checkpoints[latest:]:
        remove(old)
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("[0-9]*") if p.is_dir())


def load_checkpoint(run: Path, names: tuple[str, ...] = ()) -> Checkpoint | None:
    """Reads the newest checkpoint that is undamaged, None if there has not been one yet.

    Args:
        run: the run folder.
        names: the files to read, default all.

    Raises:
        TrainError: there are checkpoints, but all are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        try:
            state = _read_state(folder / "state.json")
            tensors = {}
            for file, sha256 in state["files"].items():
                name = file.removesuffix(".safetensors")
                if not names or name in names:
                    tensors[name] = read_tensors(folder / file, sha256)[0]
            return Checkpoint(folder, state, tensors, damaged)
        except TrainError as error:
            damaged.append(str(error))
    if damaged:
        raise TrainError("no checkpoint is undamaged: " + "; ".join(damaged))
    return None


def restore(saved: Checkpoint, parts: Parts) -> None:
    """Copies a checkpoint into networks and optimizers; names and shapes must agree."""
    for name, part in parts.items():
        source = saved.folder / f"{name}.safetensors"
        if name not in saved.tensors:
            raise TrainError(f"{source}: missing")
        if isinstance(part, nn.Module):
            load_module(part, saved.tensors[name], source)
        else:
            load_optimizer(part, saved.tensors[name], source)


def read_tensors(path: Path, sha256: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file: its tensors and its metadata.

    Raises:
        TrainError: missing, damaged, of another checksum, or not a safetensors file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainError(f"{path}: {error.strerror}") from error
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise TrainError(f"{path}: damaged (its checksum is not the one in state.json)")
    if data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise TrainError(
            f"{path}: must be a safetensors file, got a pickle, which gankern never reads"
            " because it can execute code"
        )
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, RecursionError) as error:
        raise TrainError(f"{path}: not a safetensors file, or damaged: {error}") from error
    # Fresh memory, aligned as torch's own.
    return {k: v.clone() for k, v in tensors.items()}, header.get("__metadata__", {})


def load_module(module: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Copies weights into a module; every name and shape must agree (TrainError)."""
    expected = module.state_dict()
    for name in expected.keys() | tensors.keys():
        wanted = list(expected[name].shape) if name in expected else "absent"
        got = list(tensors[name].shape) if name in tensors else "nothing"
        if wanted != got:
            raise TrainError(f"{source}: {name} must be {wanted}, got {got}")
    module.load_state_dict(tensors)


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: str | Path
) -> None:
    """Restores a saved optimizer's state; learning rates stay those of `optimizer`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise TrainError(f"{source}: {key} belongs to no parameter")
        if value.ndim and value.shape != parameters[int(index)].shape:
            wanted, got = list(parameters[int(index)].shape), list(value.shape)
            raise TrainError(f"{source}: {key} must be {wanted}, got {got}")
        if value.ndim:  # in the parameter's memory format: fused optimizers rely on it
            value = torch.empty_like(parameters[int(index)], dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _tensors(part: nn.Module | torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and buffers by name; an optimizer's state as "<parameter's index>.<name>"."""
    if isinstance(part, nn.Module):
        tensors = part.state_dict()
    else:
        state = part.state_dict()["state"]
        tensors = {
            f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()
        }
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
        sha256 = state.pop("sha256")
        if sha256 != _checksum(state) or state["format"] != FORMAT:
            raise TrainError(
                f"{path}: damaged (its checksum is not its own), or of another version"
            )
    except OSError as error:
        raise TrainError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise TrainError(f"{path}: damaged ({error!r})") from error
    return dict(state)


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Removes a checkpoint: first out of sight in one step, then file by file."""
    hidden = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
