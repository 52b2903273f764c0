"""Watches over a run: numbers of each tick in, alarms out. Nothing here touches the networks.

A watch looks at the rows of the last ticks and tells the figures of a symptom, or None. A symptom
that lasts the watch's number of ticks is an alarm; it is told once, and again only after it has
been gone for as long. A number that a row lacks is not watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

Row = dict[str, float]
Figures = dict[str, float]

WINDOW = 40  # ticks that are remembered
WATCHED = (
    "kimg", "loss_D", "loss_G", "logit_real", "logit_fake", "acc_D", "r_t",
    "grad_norm_D", "grad_norm_G", "skipped_D", "skipped_G", "scale_D", "scale_G",
    "weight_norm_D", "weight_norm_G",
    "judged_train", "judged_held", "judged_fake", "diversity", "spread", "modes_seen",
    "data_share", "img_per_s", "tick_s", "growth",
)  # fmt: skip
BROKEN = "nan_"  # names of shares and counts of what is not finite begin so; they are watched, too
WARM_UP = 8  # ticks in which nothing is expected of G


@dataclass(frozen=True)
class Alarm:
    """Something that is likely wrong.

    Attributes:
        kind: the watch's name.
        kimg: when it was raised, thousand images.
        since: when the symptom began.
        seen: what, with the figures.
        figures: the numbers in it.
        cure: what is usually done.
        severe: whether `--on-alarm stop` and `rollback` act on it.
    """

    kind: str
    kimg: float
    since: float
    seen: str
    figures: Figures
    cure: str
    severe: bool

    def __str__(self) -> str:
        return f"{self.kind} since {self.since:g} kimg: {self.seen}; {self.cure}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become text."""
        out = asdict(self)
        out["figures"] = {k: v if math.isfinite(v) else str(v) for k, v in self.figures.items()}
        return out


BEST = ("diversity", "spread", "modes_seen", "grad_norm_G")


class Past(NamedTuple):
    """What a watch may look at.

    Attributes:
        rows: of the last ticks, the newest last.
        first: numbers from before the first step, and of the first tick.
        best: the largest value so far of what BEST names, and of the median images/s of WARM_UP
            ticks of the same level.
        ticks: number of ticks so far.
        logistic: whether D's loss takes logits for probabilities.
    """

    rows: list[Row]
    first: Row
    best: Row
    ticks: int
    logistic: bool

    def now(self, name: str) -> float:
        """The newest value; NaN if the row lacks it."""
        return self.rows[-1].get(name, math.nan)

    def earlier(self, name: str) -> list[float]:
        """Finite values of the ticks before the newest."""
        values = (row.get(name, math.nan) for row in self.rows[:-1])
        return [value for value in values if math.isfinite(value)]


class Watch(NamedTuple):
    """A symptom and what it means.

    Attributes:
        kind: name of the alarm.
        symptom: the figures, or None while all is well.
        ticks: how long it has to last.
        seen: text, formatted with the figures.
        cure: what is usually done.
        severe: whether stopping or rolling back is an answer.
    """

    kind: str
    symptom: Callable[[Past], Figures | None]
    ticks: int
    seen: str
    cure: str
    severe: bool = True


def not_finite(past: Past) -> Figures | None:
    """A NaN or an infinity, in one step or buffer, or in gradients, whose step was left out.

    With fp16's scaled losses, left-out steps are how the scale is found. 17 in a row, each of which
    halves it, bring it from 2^16 below 1: no scale will do.
    """
    figures = {
        name: value
        for name, value in past.rows[-1].items()
        if not math.isfinite(value) or name.startswith(BROKEN)
    }
    for net in ("D", "G"):
        scale, skipped = past.now(f"scale_{net}"), past.now(f"skipped_{net}")
        if scale < 1:
            figures[f"scale_{net}"] = scale
        elif math.isnan(scale) and skipped > 0:
            figures[f"skipped_{net}"] = skipped
    return figures or None


def loss_spike(past: Past) -> Figures | None:
    """Robust z-score: distance from the median over 1.4826 times the median deviation."""
    for name in ("loss_D", "loss_G"):
        before, now = past.earlier(name), past.now(name)
        if len(before) < WARM_UP or not math.isfinite(now):
            continue
        middle = median(before)
        scale = 1.4826 * median(abs(value - middle) for value in before)
        z = (now - middle) / max(scale, 0.02 * abs(middle), 1e-3)
        if z > 15 and now - middle > max(2.0, abs(middle)):
            return {name: now, "median": middle, "z": z}
    return None


def d_ahead(past: Past) -> Figures | None:
    """D tells all images apart with a wide gap, or G's gradient has vanished beside it."""
    gap, accuracy = past.now("logit_real") - past.now("logit_fake"), past.now("acc_D")
    gradient = past.now("grad_norm_G")
    wide = past.logistic and gap > 10
    faded = past.ticks >= WARM_UP and gradient < max(0.01 * past.best.get("grad_norm_G", 0.0), 1e-5)
    if max(accuracy, past.now("r_t")) > 0.99 and (wide or faded):
        return {"gap": gap, "acc_D": accuracy, "r_t": past.now("r_t"), "grad_norm_G": gradient}
    return None


def d_inverted(past: Past) -> Figures | None:
    """D rates generated images above real ones."""
    real, fake = past.now("logit_real"), past.now("logit_fake")
    if fake - real > 0.5 and past.now("acc_D") < 0.4:
        return {"logit_real": real, "logit_fake": fake, "acc_D": past.now("acc_D")}
    return None


def d_overfits(past: Past) -> Figures | None:
    """r_v = (train - held out) / (train - generated): 0 at best, 1 where D knows by heart.

    Karras et al. 2020, eq. 1, arXiv:2006.06676.
    """
    train, held, fake = (past.now(f"judged_{name}") for name in ("train", "held", "fake"))
    gap = train - fake
    if gap > 1 and (r_v := (train - held) / gap) > 0.5:
        return {"r_v": r_v, "train": train, "held": held, "fake": fake}
    return None


def collapse(past: Past) -> Figures | None:
    """Samples of different latents look alike, or are of few modes, measured against real images.

    Few sharp outputs lie as far apart as real images do: the modes that they find tell.
    """
    if past.ticks < WARM_UP:
        return None
    now, best = past.now("diversity"), past.best.get("diversity", 0.0)
    least = {"diversity": 0.3, "modes_seen": 0.25, "spread": 0.1}
    fell = [past.now(k) < share * min(past.best.get(k, 0.0), 1.0) for k, share in least.items()]
    if now < 0.05 or any(fell):
        return {
            "diversity": now,
            "best": best,
            "modes_seen": past.now("modes_seen"),
            "spread": past.now("spread"),
        }
    return None


def oscillation(past: Past) -> Figures | None:
    """D's mean logit swings between above 2 and below -2, at least six times."""
    side, swings, largest = 0, 0, 0.0
    for row in past.rows:
        middle = (row.get("logit_real", math.nan) + row.get("logit_fake", math.nan)) / 2
        new = 1 if middle > 2 else -1 if middle < -2 else 0
        if new:
            swings += int(side != 0 and new != side)
            side, largest = new, max(largest, abs(middle))
    return {"swings": swings, "largest": largest} if swings >= 6 else None


def weights_grow(past: Past) -> Figures | None:
    """A network's weights are ten times as long as at the start, and still grow."""
    for name in ("weight_norm_G", "weight_norm_D"):
        start, now, before = past.first.get(name, 0.0), past.now(name), past.earlier(name)
        if start > 0 and now > 10 * start and (not before or now > 1.02 * before[0]):
            return {name: now, "at the start": start}
    return None


def data_stalls(past: Past) -> Figures | None:
    """Most of the time is spent waiting for images."""
    share = past.now("data_share")
    return {"data_share": share} if share > 0.5 else None


def slower(past: Past) -> Figures | None:
    """Images a second fell below 40 % of their median, or slowly to half of the best such median.

    Ticks of less than 2 s say nothing, nor do those of another level of growing networks.
    """
    before, now = past.earlier("img_per_s"), past.now("img_per_s")
    if len(before) < WARM_UP or not past.now("tick_s") > 2:
        return None
    if now < 0.4 * median(before):
        return {"img_per_s": now, "before": median(before)}
    lately, best = median([*before, now][-WARM_UP:]), past.best.get("img_per_s", 0.0)
    return {"img_per_s": lately, "before": best} if lately < 0.5 * best else None


WATCHES = (
    Watch(
        "not finite",
        not_finite,
        1,
        "NaN or infinity: {names}",
        "look for broken images in the data (gankern data info --verify), lower the learning"
        " rate, or use fp32",
    ),
    Watch(
        "loss spike",
        loss_spike,
        1,
        "{names}",
        "go back to the last checkpoint; lower the learning rate if it comes again",
    ),
    Watch(
        "D far ahead",
        d_ahead,
        3,
        "D tells real from generated images with logits {gap:.1f} apart and is right on"
        " {acc_D:.1%} (r_t {r_t:.2f}); G's gradient is {grad_norm_G:.2g} long",
        "lower D's learning rate or width, train it less often, or raise R1's gamma or dropout",
    ),
    Watch(
        "D inverted",
        d_inverted,
        3,
        "D rates generated images ({logit_fake:.2f}) above real ones ({logit_real:.2f})",
        "look for swapped labels, and at the sign of the loss",
    ),
    Watch(
        "D overfits",
        d_overfits,
        3,
        "r_v is {r_v:.2f}: D's logits are {train:.2f} on training images, {held:.2f} on held-out"
        " ones, {fake:.2f} on generated ones",
        "augment (ADA), get more images, or raise R1's gamma",
    ),
    Watch(
        "G collapsed",
        collapse,
        4,
        "samples are {diversity:.1%} as far apart as real images (best so far {best:.1%}),"
        " find {modes_seen:.0%} of their modes, and vary by {spread:.0%} a pixel",
        "go back to a checkpoint; lower the learning rates, use minibatch statistics or R1",
    ),
    Watch(
        "oscillation",
        oscillation,
        1,
        "D's mean logit swung {swings:.0f} times, up to {largest:.1f}",
        "lower both learning rates or the momentum (beta1 0), or add R1",
    ),
    Watch(
        "weights grow",
        weights_grow,
        2,
        "{names}",
        "lower the learning rate, or add weight penalties or equalised layers",
    ),
    Watch(
        "data stalls",
        data_stalls,
        5,
        "{data_share:.0%} of the time is spent waiting for images",
        "put the data on a faster disk, or pack it smaller",
        severe=False,
    ),
    Watch(
        "slower",
        slower,
        5,
        "{img_per_s:.0f} images/s, {before:.0f} before",
        "look for other processes, heat, or memory that is swapped",
        severe=False,
    ),
)


class Health:
    """Takes each tick's row, returns new alarms.

    Args:
        logistic: whether D's loss takes logits for probabilities (their gap then has a scale).
    """

    def __init__(self, logistic: bool = True) -> None:
        self.logistic = logistic
        self.rows: list[Row] = []
        self.first: Row = {}
        self.best: Row = {}
        self.ticks = 0
        self.since: dict[str, float] = {}  # symptoms that last
        self.lasted: dict[str, int] = {}  # ticks with (positive) or, once told, without (negative)
        self.told: list[str] = []

    def start(self, row: dict[str, Any]) -> None:
        """Takes numbers from before the first step, with which later ones are compared."""
        self.first = self._numbers(row)

    def tick(self, row: dict[str, Any]) -> list[Alarm]:
        """Alarms that this tick raises.

        Args:
            row: of stats.jsonl; WATCHED says which numbers count.
        """
        numbers = self._numbers(row)
        levels = [math.ceil(r.get("growth", 0.0)) for r in (*self.rows[-1:], numbers)]
        if levels[-1] > levels[0]:
            self._forget_speed()
        self.rows = [*self.rows, numbers][-WINDOW:]
        self.ticks += 1
        for name, value in numbers.items():
            self.first.setdefault(name, value)
            if name in BEST and math.isfinite(value):
                self.best[name] = max(value, self.best.get(name, 0.0))
        rates = [row["img_per_s"] for row in self.rows[-WARM_UP:] if "img_per_s" in row]
        if len(rates) == WARM_UP:
            self.best["img_per_s"] = max(median(rates), self.best.get("img_per_s", 0.0))
        past = Past(self.rows, self.first, self.best, self.ticks, self.logistic)
        return [alarm for watch in WATCHES if (alarm := self._look(watch, past))]

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        names = ("rows", "first", "best", "ticks", "since", "lasted", "told")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def _numbers(self, row: dict[str, Any]) -> Row:
        names = [*WATCHED, *(name for name in row if name.startswith(BROKEN))]
        return {name: float(row[name]) for name in names if row.get(name) is not None}

    def _forget_speed(self) -> None:
        """Drops images/s from before the networks grew."""
        self.best.pop("img_per_s", None)
        for row in self.rows:
            row.pop("img_per_s", None)

    def _look(self, watch: Watch, past: Past) -> Alarm | None:
        kind, kimg = watch.kind, past.now("kimg")
        figures = watch.symptom(past)
        if figures is None:
            self.since.pop(kind, None)
            if kind in self.told:  # forgotten after as many ticks without the symptom
                self.lasted[kind] = min(self.lasted.get(kind, 0), 0) - 1
                if self.lasted[kind] <= -max(watch.ticks, WARM_UP):
                    self.told.remove(kind)
            else:
                self.lasted.pop(kind, None)
            return None
        since = self.since.setdefault(kind, kimg)
        self.lasted[kind] = max(self.lasted.get(kind, 0), 0) + 1
        if kind in self.told or self.lasted[kind] < watch.ticks:
            return None
        self.told.append(kind)
        names = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        seen = watch.seen.format(names=names, **figures)
        return Alarm(kind, kimg, since, seen, figures, watch.cure, watch.severe)
