"""The configuration of a run: one flat dataclass.

It is the options of `gankern train`, the file config.json, and what every other file of this
package reads. An option is a field in `gankern.training.options` and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

from gankern.models import GROWING, PRESETS, STYLE_BASED
from gankern.training.losses import LOSSES
from gankern.training.options import (
    AugmentOptions,
    GrowthOptions,
    HealthOptions,
    NetworkOptions,
    PenaltyOptions,
    RunOptions,
    SpeedOptions,
    TrainingOptions,
    option,
)

FORMAT = 2


class TrainError(ValueError):
    """Input that training cannot use; the message is one line meant for the user."""


@dataclass
class DataOptions:
    """The data set."""

    data: str = option(
        "digits", "Data", "'digits', 'digits:R' at R x R pixels, or a file of `gankern data pack`."
    )


@dataclass
class TrainConfig(
    RunOptions, HealthOptions, SpeedOptions, AugmentOptions, GrowthOptions, PenaltyOptions,
    TrainingOptions, NetworkOptions, DataOptions,
):  # fmt: skip
    """Everything that decides what a run does; see each field's help, or `gankern train --help`."""

    # Set from the data set, not options.
    resolution: tuple[int, int] = (0, 0)  # height, width
    channels: int = 0
    num_classes: int = 0
    label_dim: int = 0  # of labels that are vectors

    # Set by going back to a checkpoint: from_kimg, to_kimg, seed (until then), alarm.
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def first_seed(self) -> int:
        """The seed from before any rollback: it decides what stays the same throughout a run."""
        return int(self.rollbacks[0]["seed"]) if self.rollbacks else self.seed

    @property
    def c_dim(self) -> int:
        """Length of the condition: one-hot classes, vectors, or 0."""
        return (self.num_classes or self.label_dim) if self.conditional else 0

    @property
    def low_dtype(self) -> torch.dtype:
        """The 16-bit type of levels and of autocast."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float16

    @property
    def grows(self) -> bool:
        """Whether the networks start small and grow."""
        return self.model in GROWING and self.fade_kimg + self.stable_kimg > 0

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
            if value == math.inf:
                raise TrainError(f"{flag(f.name)} must be finite, got inf")
            if limits["choices"] and value not in limits["choices"]:
                choices = ", ".join(limits["choices"])
                raise TrainError(f"{flag(f.name)} must be one of {choices}, got {value!r}")
            low, high = limits["at_least"], limits["at_most"]
            if low is not None and not value >= low:
                raise TrainError(f"{flag(f.name)} must be at least {low}, got {value}")
            if high is not None and not value <= high:
                raise TrainError(f"{flag(f.name)} must be at most {high}, got {value}")
        self._check_together()
        return self

    def _check_together(self) -> None:
        """Options that exclude each other."""
        style, grows = self.model in STYLE_BASED, self.model in GROWING
        conv = self.model == "dcgan" or (self.model == "wgan" and self.form == "conv")
        which = f"--model {self.model}" + (" --form fc" if self.form == "fc" else "")
        needs = [
            ("form", self.model == "wgan", f"conv with --model {self.model}"),
            ("upsample", conv, f"transposed with {which}"),
            ("d_norm", conv, f"batch, which says nothing, with {which}"),
            ("spectral_norm", conv, f"none with {which}"),
            ("attention", conv, f"0 with {which}"),
            ("minibatch_kernels", conv, f"0 with {which}"),
            ("d_condition", conv or self.form == "fc" or self.model == "vanilla",
             f"projection with {which}"),
            ("gp_weight", not conv or self.d_norm != "batch",
             "0 with --d-norm batch, by which the gradient of an image is that of its batch"
             " (WGAN-GP takes layer or none)"),
            ("label_smoothing", LOSSES[self.loss].smooths, f"0 with --loss {self.loss}"),
            ("pl_weight", style, f"0 with --model {self.model}, which has no styles"),
            ("style_mixing", style, f"0 with --model {self.model}, which has no styles"),
            ("fade_kimg", grows, f"0 with --model {self.model}, which does not grow"),
            ("stable_kimg", grows, f"0 with --model {self.model}, which does not grow"),
            ("level_batch", self.grows, "empty without --fade-kimg or --stable-kimg"),
            ("level_lr", self.grows, "empty without --fade-kimg or --stable-kimg"),
            ("num_fp16_res", self.model == "stylegan2", f"0 with --model {self.model}"),
            ("compile", not self.grows, "off while networks grow"),
            ("cuda_graphs", not self.grows, "off while networks grow"),
        ]  # fmt: skip
        for name, allowed, wanted in needs:
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default and not allowed:
                raise TrainError(f"{flag(name)} must be {wanted}, got {str(value).lower()}")
        from gankern.training.augment import check_transforms
        from gankern.training.schedule import parse_schedule

        for name in ("batch_schedule", "level_batch", "level_lr"):
            parse_schedule(name, getattr(self, name))
        check_transforms(self)

    def to_json(self) -> str:
        """The whole configuration as text; `from_json` reads it back."""
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str | Path) -> TrainConfig:
        """Reads what `to_json` wrote; `source` is named in errors (TrainError)."""
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
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
