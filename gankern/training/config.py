"""The configuration of a run: one flat dataclass.

It is the options of `gankern train`, the file config.json, and what every other file of this
package reads. An option is a field here and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from gankern.models import MODELS, PRESETS
from gankern.training.losses import LOSSES

FORMAT = 1


class TrainError(ValueError):
    """Input that training cannot use; the message is one line meant for the user."""


def option(
    default: Any,
    group: str,
    help: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field that is also a command-line option."""
    metadata: dict[str, Any] = {"group": group, "help": help, "unit": unit, "choices": choices}
    metadata |= {"at_least": at_least, "at_most": at_most}
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Everything that decides what a run does; see each field's help, or `gankern train --help`."""

    data: str = option(
        "digits", "Data", "'digits', 'digits:R' at R x R pixels, or a file of `gankern data pack`."
    )

    model: str = option("dcgan", "Networks", "Architecture.", choices=tuple(MODELS))
    conditional: bool = option(
        True, "Networks", "Draw the classes of the data set on request, if it has labels."
    )
    z_dim: int = option(32, "Networks", "Length of the latent vector.", at_least=1)
    width: int = option(64, "Networks", "Channels of G nearest to the image.", at_least=1)
    d_width: int = option(32, "Networks", "Channels of D nearest to the image.", at_least=1)
    d_batch_norm: bool = option(True, "Networks", "Batch norm in D, as the DCGAN paper has it.")
    d_dropout: float = option(
        0.1, "Networks", "Share of D's activations set to zero.", at_least=0, at_most=0.99
    )
    w_dim: int = option(512, "Networks", "StyleGAN2: length of the style vector.", at_least=1)
    mapping_layers: int = option(8, "Networks", "StyleGAN2: layers from z to w.", at_least=1)
    channel_base: int = option(
        16384, "Networks", "StyleGAN2: channels of a level times its side.", at_least=1
    )
    channel_max: int = option(512, "Networks", "StyleGAN2: most channels of a level.", at_least=1)

    kimg: float = option(
        100.0, "Training", "Length: real images shown to D.", unit="thousand images", at_least=0.001
    )
    batch: int = option(
        16, "Training", "Images a step, over all processes together.", unit="images", at_least=1
    )
    loss: str = option("nonsaturating", "Training", "Loss of both networks.", choices=tuple(LOSSES))
    label_smoothing: float = option(
        0.0, "Training", "D aims at 1 minus this on real images.", at_least=0, at_most=0.5
    )
    g_lr: float = option(2e-4, "Training", "Learning rate of G.", at_least=0)
    d_lr: float = option(2e-4, "Training", "Learning rate of D.", at_least=0)
    beta1: float = option(0.5, "Training", "Adam: decay of the mean.", at_least=0, at_most=0.9999)
    beta2: float = option(
        0.999, "Training", "Adam: decay of the mean square.", at_least=0, at_most=0.99999
    )
    ema_kimg: float = option(
        5.0, "Training", "Half-life of G's moving average.", unit="thousand images", at_least=0
    )
    ema_rampup: float = option(
        0.05, "Training", "That half-life is at most this share of the images so far.", at_least=0
    )
    seed: int = option(0, "Training", "Seed of weights, noise and the order of images.", at_least=0)
    device: str = option(
        "auto", "Training", "'cpu', 'cuda', 'cuda:1', or 'auto': CUDA if there is."
    )

    out: str = option("runs", "Run folder", "Folder in which the run gets its own numbered folder.")
    tick_kimg: float = option(
        1.0, "Run folder", "A line of statistics every so often.", unit="thousand images",
        at_least=0.001,
    )  # fmt: skip
    sample_ticks: int = option(
        10, "Run folder", "A grid of samples every so often.", unit="ticks", at_least=1
    )
    checkpoint_ticks: int = option(
        10, "Run folder", "A checkpoint every so often; the last two are kept.", unit="ticks",
        at_least=1,
    )  # fmt: skip
    grid: int = option(10, "Run folder", "Samples a row and a column.", unit="images", at_least=1)

    # Set from the data set, not options.
    resolution: tuple[int, int] = (0, 0)  # height, width
    channels: int = 0
    num_classes: int = 0

    @property
    def c_dim(self) -> int:
        """Length of the condition: one-hot classes, or 0."""
        return self.num_classes if self.conditional else 0

    @classmethod
    def options(cls) -> list[tuple[dataclasses.Field[Any], type]]:
        """The fields that are options, each with its type."""
        types = get_type_hints(cls)
        return [(f, types[f.name]) for f in dataclasses.fields(cls) if f.metadata]

    def check(self) -> TrainConfig:
        """Returns itself; raises TrainError if a value is out of range."""
        for f, kind in self.options():
            value, limits = getattr(self, f.name), f.metadata
            if kind is not str and not isinstance(value, (int, float)):
                raise TrainError(f"{flag(f.name)} must be a number, got {value!r}")
            if limits["choices"] and value not in limits["choices"]:
                choices = ", ".join(limits["choices"])
                raise TrainError(f"{flag(f.name)} must be one of {choices}, got {value!r}")
            low, high = limits["at_least"], limits["at_most"]
            if low is not None and not value >= low:
                raise TrainError(f"{flag(f.name)} must be at least {low}, got {value}")
            if high is not None and not value <= high:
                raise TrainError(f"{flag(f.name)} must be at most {high}, got {value}")
        if self.label_smoothing and not LOSSES[self.loss].smooths:
            raise TrainError(
                f"--label-smoothing must be 0 with --loss {self.loss}, got {self.label_smoothing}"
            )
        return self

    def to_json(self) -> str:
        """The whole configuration as text; `from_json` reads it back."""
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str | Path) -> TrainConfig:
        """Reads what `to_json` wrote; `source` is named in errors (TrainError)."""
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise ValueError("written by another version of gankern")
            values["resolution"] = tuple(values["resolution"])
            return cls(**values).check()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise TrainError(f"{source}: not a run's configuration: {error}") from error


def flag(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


def make_config(preset: str = "", **values: Any) -> TrainConfig:
    """The defaults, changed by a preset, changed by `values`.

    Raises:
        TrainError: unknown preset, or a value out of range.
    """
    if preset and preset not in PRESETS:
        raise TrainError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return TrainConfig(**(PRESETS.get(preset, {}) | values)).check()
