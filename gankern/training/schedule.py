"""What changes with the images seen: growth, batch, learning rates. Nothing here has a state."""

from __future__ import annotations

import math

from torch import nn

from gankern.training.config import TrainConfig, TrainError, flag


def parse_schedule(name: str, text: str) -> dict[float, float]:
    """{at: value} of "at:value,at:value", in order of `at`.

    Raises:
        TrainError: `text` of the option `name` is none.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")] if text else []
        points = {float(at): float(value) for at, value in pairs}
    except ValueError:
        points = {-1.0: 0.0}
    if any(not math.isfinite(at) or at < 0 or not value > 0 for at, value in points.items()):
        raise TrainError(f"{flag(name)} must be as 0:16,50:32, got {text!r}")
    if name.endswith(("batch", "batch_schedule")) and any(v % 1 for v in points.values()):
        raise TrainError(f"{flag(name)} must be of whole batches, got {text!r}")
    return dict(sorted(points.items()))


def level_sides(D: nn.Module) -> list[int]:
    """Shorter side of the images of each level of D, from the smallest; empty without levels."""
    sizes: list[tuple[int, int]] = getattr(D, "sizes", [])
    return [min(size) for size in sizes]


class Schedule:
    """Growth, batch and learning rates as functions of the images seen.

    Args:
        config: of the run, with the resolution of its data.
        sides: shorter side of the images of each level, from the smallest; empty: no growth.
        world: number of processes; every batch must be a multiple of it (TrainError).
    """

    def __init__(self, config: TrainConfig, sides: list[int], world: int = 1) -> None:
        self.config, self.sides = config, sides
        self.total = config.kimg * 1000
        self.batches = parse_schedule("batch_schedule", config.batch_schedule)
        self.level_batch = parse_schedule("level_batch", config.level_batch)
        self.level_lr = parse_schedule("level_lr", config.level_lr)
        if config.grows and config.grow_from > sides[-1]:
            raise TrainError(f"--grow-from must be at most {sides[-1]}, got {config.grow_from}")
        batches = [("batch", config.batch)]
        batches += [("batch_schedule", int(batch)) for batch in self.batches.values()]
        batches += [("level_batch", int(batch)) for batch in self.level_batch.values()]
        for name, batch in batches:
            share, chunk = batch // world, config.batch_gpu
            if batch % world:
                raise TrainError(
                    f"{flag(name)} must be a multiple of {world} processes, got {batch}"
                )
            if chunk and share > chunk and share % chunk:
                raise TrainError(
                    f"--batch-gpu must divide a process's share of a batch, {share}, got {chunk}"
                )

    def growth(self, cur_nimg: int) -> float:
        """The level, with the share of the next one that has faded in: 2.25 is 75 % of level 2.

        Each level is trained alone for `stable_kimg`, then the next fades in over `fade_kimg`
        (Karras et al. 2018, section 2 and appendix A).
        """
        if not self.config.grows:
            return float(max(len(self.sides) - 1, 0))
        stable, fade = self.config.stable_kimg * 1000, self.config.fade_kimg * 1000
        phase, at = divmod(cur_nimg, stable + fade)
        faded = max(at - stable, 0) / fade if fade else 0.0
        first = sum(side < self.config.grow_from for side in self.sides)
        return float(min(first + phase + faded, len(self.sides) - 1))

    def batch(self, cur_nimg: int) -> int:
        """Images of the next step, over all processes together."""
        batch = float(self.config.batch)
        for kimg, value in self.batches.items():
            batch = value if cur_nimg >= kimg * 1000 else batch
        return int(self._of_level(self.level_batch, cur_nimg, batch))

    def stages(self) -> list[tuple[float, int]]:
        """(growth, batch) once for every combination of level, alone or fading in, and batch."""
        starts = {0, *(math.ceil(kimg * 1000) for kimg in self.batches)}
        if self.config.grows:
            stable, fade = self.config.stable_kimg * 1000, self.config.fade_kimg * 1000
            levels = [i * (stable + fade) for i in range(len(self.sides))]
            starts |= {math.ceil(at) for at in levels}
            starts |= {math.floor(at + stable) + 1 for at in levels}  # the next one fades in
        found: dict[tuple[int, bool, int], tuple[float, int]] = {}
        for nimg in sorted(start for start in starts if start < self.total):
            growth, batch = self.growth(nimg), self.batch(nimg)
            found.setdefault((math.ceil(growth), growth % 1 > 0, batch), (growth, batch))
        return list(found.values())

    def lr(self, base: float, cur_nimg: int) -> float:
        """The learning rate that stands for `base` now."""
        lr, up, down = base, self.config.lr_rampup_kimg * 1000, self.config.lr_rampdown_kimg * 1000
        lr = self._of_level(self.level_lr, cur_nimg, lr)
        if cur_nimg < up:
            lr *= cur_nimg / up
        if self.total - cur_nimg < down:
            lr *= (self.total - cur_nimg) / down
        return lr

    def _of_level(self, points: dict[float, float], cur_nimg: int, default: float) -> float:
        """The value of the largest side that is not over that of the images now."""
        if points:
            side = self.sides[math.ceil(self.growth(cur_nimg))]
            for least, value in points.items():
                default = value if side >= least else default
        return default
