"""The folder of a run: how it comes to be, what is appended to it, how it is cut back at resume."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gankern import __version__
from gankern.data.files import atomic_path
from gankern.data.grid import make_grid, save_png
from gankern.training.config import TrainConfig, TrainError
from gankern.training.stats import finite


def create_run(config: TrainConfig, data_name: str) -> Path:
    """Makes <out>/<nnnnn>-<model>-<data> with its config.json, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    suffix = re.sub(r"[^\w.-]+", "_", f"{config.model}-{data_name}")
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    try:
        partial.chmod(out.stat().st_mode)
        write_config(partial, config)
        while True:
            taken = [int(p.name[:5]) for p in out.iterdir() if re.match(r"\d{5}-", p.name)]
            run = out / f"{max(taken, default=-1) + 1:05d}-{suffix}"
            try:
                return partial.rename(run)
            except OSError:
                if not run.exists():  # otherwise another process was faster: the next number
                    raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_config(run: Path, config: TrainConfig) -> None:
    """Writes config.json, whole or not at all."""
    with atomic_path(run / "config.json") as path:
        path.write_text(config.to_json(), encoding="utf-8")


def write_versions(run: Path) -> None:
    """Writes versions.json: what the last process of the run computes with."""
    found = {
        "gankern": __version__,
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    with atomic_path(run / "versions.json") as path:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def read_config(run: Path) -> TrainConfig:
    """Reads config.json of a run folder (TrainError if it is not one)."""
    if not run.is_dir():
        raise TrainError(f"{run}: {'not a run folder' if run.exists() else 'no such run folder'}")
    try:
        text = (run / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"{run}: not a run folder: config.json cannot be read") from error
    return TrainConfig.from_json(text, run / "config.json")


class RunLog:
    """Writes the run folder: configuration, statistics, TensorBoard events, samples, plot.

    Args:
        run: the run folder.
        config: written to config.json.
        sizes: bytes of stats.jsonl and the events at the checkpoint resumed from, as `sizes()`
            gave them; what was written later is cut off. Empty for a new run.
    """

    def __init__(self, run: Path, config: TrainConfig, sizes: dict[str, int]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.grid = run, config.grid
        for path in [run / "stats.jsonl", *run.glob("events.out.tfevents.*")]:
            wanted, size = sizes.get(path.name, 0), path.stat().st_size if path.exists() else 0
            if size < wanted:
                raise TrainError(f"{path}: must have at least {wanted} bytes, got {size}: damaged")
            if wanted:
                os.truncate(path, wanted)
            else:
                path.unlink(missing_ok=True)
        for path in [*run.glob(".*.tmp"), *run.glob("*/.*.tmp"), *run.glob("*/.partial-*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()  # of a killed process
        write_config(run, config)
        write_versions(run)
        (run / "samples").mkdir(exist_ok=True)
        self._stats = open(str(run / "stats.jsonl"), "ab", buffering=0)  # noqa: SIM115
        self._events = SummaryWriter(run, flush_secs=10)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stats.close()
        self._events.close()

    def write_stats(self, row: dict[str, Any], cur_nimg: int) -> None:
        """Appends one line of statistics, whole or not at all, and its numbers as events.

        A number that is not finite becomes null in the line.

        Raises:
            OSError: the disk is full.
        """
        plain = {name: value if finite(value) else None for name, value in row.items()}
        data, size = (json.dumps(plain) + "\n").encode(), self._stats.seek(0, os.SEEK_END)
        try:
            while data:  # a write may be short; the next one then says why
                data = data[self._stats.write(data) :]
        except OSError as error:
            self._stats.truncate(size)
            raise OSError(error.errno, error.strerror, self._stats.name) from error
        metrics = row.get("metrics", {})
        numbers = row | {f"metrics/{name}": value for name, value in metrics.items()}
        for of_class, values in metrics.get("classes", {}).items():
            numbers |= {f"metrics/{name}/{of_class}": value for name, value in values.items()}
        for name, value in numbers.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, cur_nimg)
        rolled_back = [note["alarm"] for note in row.get("rollbacks", [])]
        for alarm in [*row.get("alarms", []), *rolled_back]:
            text = f"**{alarm['kind']}** since {alarm['since']:g} kimg: {alarm['seen']}"
            self._events.add_text("alarms", f"{text}. Usually done: {alarm['cure']}", cur_nimg)

    def write_samples(self, images: Tensor, cur_nimg: int) -> None:
        """Writes samples/<cur_nimg>.png, the same as samples.png and an event, and loss.png."""
        grid = make_grid(images, self.grid)
        for path in (self.run / "samples" / f"{cur_nimg:012d}.png", self.run / "samples.png"):
            save_png(grid, path)
        pixels = np.asarray(grid.convert("RGB"))
        self._events.add_image("samples", pixels, cur_nimg, dataformats="HWC")
        plot_losses(self.run)

    def sizes(self) -> dict[str, int]:
        """Flushes statistics and events; the bytes of each file so far."""
        self._events.flush()
        os.fsync(self._stats.fileno())
        files = [self.run / "stats.jsonl", *self.run.glob("events.out.tfevents.*")]
        return {path.name: path.stat().st_size for path in files}


def read_stats(run: Path) -> list[dict[str, Any]]:
    """The lines of stats.jsonl; a last line that was torn is left out."""
    lines = (run / "stats.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def plot_losses(run: Path) -> None:
    """Draws loss.png from stats.jsonl: losses above, D's logits below."""
    from matplotlib.figure import Figure

    rows = read_stats(run)
    if not rows:
        return
    kimg = [row["kimg"] for row in rows]
    figure = Figure(figsize=(8, 6))
    losses, logits = figure.subplots(2, 1, sharex=True)
    # A layout that measures its texts would draw everything twice, at every grid of samples.
    figure.subplots_adjust(left=0.1, right=0.98, top=0.94, bottom=0.09, hspace=0.08)
    for axes, names in (
        (losses, {"loss_D": "D", "loss_G": "G"}),
        (logits, {"logit_real": "real", "logit_fake": "generated"}),
    ):
        for name, label in names.items():
            axes.plot(kimg, [row[name] for row in rows], label=label, linewidth=1)
        axes.legend()
        axes.grid(alpha=0.3)
    losses.set_title(run.name)
    losses.set_ylabel("loss")
    logits.set_ylabel("mean logit of D")
    logits.set_xlabel("thousand images (kimg)")
    with atomic_path(run / "loss.png") as path:
        figure.savefig(path, format="png", dpi=100)
