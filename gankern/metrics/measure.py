"""All figures of one comparison, from one pass over each set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gankern.metrics.extractors import Extractor, MetricsError
from gankern.metrics.features import Features
from gankern.metrics.frechet import frechet_from_features, frechet_infinity
from gankern.metrics.kernel import kernel_distance
from gankern.metrics.manifold import compare, copying
from gankern.metrics.path_length import (
    feature_distance,
    perceptual_path_length,
    smoothness,
    spaces,
)
from gankern.metrics.score import inception_score

SMALL = 10000  # images below which the Fréchet distance's bias is large
PATHS = 200  # whose length is measured
PAIRS = 16  # interpolations whose smoothness is measured
LEAST = 8  # images; a class with fewer gets no figures of its own


@dataclass
class Figure:
    """One number.

    Attributes:
        key: for programs: fd, fd_inf, kd, is, precision, ...
        label: for people: FID, KD-EffLite0, ...
        value: the number.
        error: its standard error, or None.
        better: "lower", "higher", or what is good, in words.
        note: what has to be known beside it.
    """

    key: str
    label: str
    value: float
    error: float | None = None
    better: str = "lower"
    note: str = ""


@dataclass
class Measurement:
    """Figures in the order in which they should be read.

    Attributes:
        extractor: name of the feature network.
        n_real, n_fake: images.
        figures: of all images.
        classes: of each class by name, in data with labels.
    """

    extractor: str
    n_real: int
    n_fake: int
    figures: list[Figure] = field(default_factory=list)
    classes: dict[str, list[Figure]] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether there are so few images that the kernel distance comes first."""
        return min(self.n_real, self.n_fake) < SMALL

    def values(self) -> dict[str, float]:
        """Every figure by its key."""
        return {figure.key: figure.value for figure in self.figures}

    def to_json(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is None."""
        out = asdict(self) | {"small": self.small}
        for figure in [*out["figures"], *(f for fs in out["classes"].values() for f in fs)]:
            for name in ("value", "error"):
                if figure[name] is not None and not math.isfinite(figure[name]):
                    figure[name] = None
        return out


def measure(
    real: Features,
    fake: Features,
    extractor: Extractor,
    class_names: list[str] | None = None,
    infinity: bool = True,
    seed: int = 0,
) -> Measurement:
    """Compares generated images with real ones.

    Small sets (fewer than 10,000 images) are judged by kernel distance, recall and coverage first;
    the Fréchet distance, whose bias is then large, comes later, with its extrapolation.

    Args:
        real, fake: of `extract`, by the same extractor.
        extractor: names the figures.
        class_names: of the labels; with labels on both sides, each class gets its own figures.
        infinity: whether to extrapolate the Fréchet distance.
        seed: of random subsets.

    Raises:
        MetricsError: fewer than 8 images.
    """
    if min(len(real), len(fake)) < LEAST:
        raise MetricsError(
            f"metrics: images must be at least {LEAST}, got {len(fake)} generated and"
            f" {len(real)} real"
        )
    result = Measurement(extractor.name, len(real), len(fake))
    fd = _frechet(real, fake, extractor, infinity, seed)
    kd = _kernel(real, fake, extractor, seed)
    near = {figure.key: figure for figure in _neighbours(real, fake)}
    if result.small:
        result.figures = [kd, near["recall"], near["coverage"], near["precision"], near["density"]]
        result.figures += fd
    else:
        result.figures = [*fd, kd, *(near[k] for k in ("precision", "recall"))]
        result.figures += [near["density"], near["coverage"]]
    result.figures += [near["copying"], *_score(real, fake, extractor)]
    labels, fake_labels = real.labels, fake.labels
    if class_names and labels is not None and fake_labels is not None and labels.ndim == 1:
        for i, name in enumerate(class_names):
            parts = real[labels == i], fake[fake_labels == i]
            if min(map(len, parts)) >= LEAST:
                result.classes[name] = _of_class(*parts, extractor, seed)
    return result


def path_figures(
    G: Any,
    extractor: Extractor,
    batch: int = 16,
    seed: int = 0,
    classes: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Figure]:
    """Perceptual path length (z and w, full and end), and the smoothness of interpolations.

    Args:
        G: a generator in evaluation mode.
        extractor: of the features.
        batch: paths at a time.
        seed: of the paths' ends.
        classes: of a conditional generator, used in turn.
        progress: called with (figures done, figures in all).
    """
    figures = []
    distance = feature_distance(extractor)
    if classes is not None:
        classes = classes[torch.arange(PATHS) % len(classes)]
    jobs = [(space, sampling) for space in spaces(G) for sampling in ("full", "end")]
    for done, (space, sampling) in enumerate(jobs):
        value = perceptual_path_length(
            G, distance, PATHS, space, sampling, batch=batch, seed=seed, classes=classes
        )
        label = f"{extractor.label('ppl')} {space} {sampling}"
        figures.append(
            Figure(f"ppl_{space}_{sampling}", label, value, note="not the LPIPS of papers")
        )
        if progress:
            progress(done + 1, len(jobs))
    for space in spaces(G):
        mean, largest = smoothness(G, extractor, PAIRS, space=space, seed=seed, classes=classes)
        figures.append(
            Figure(
                f"smoothness_{space}",
                f"largest step over mean step, {'slerp in z' if space == 'z' else 'lerp in w'}",
                mean,
                better="near 1",
                note=f"{largest:.2f} at most; 16 would be one jump",
            )
        )
    return figures


def _frechet(
    real: Features, fake: Features, extractor: Extractor, infinity: bool, seed: int
) -> list[Figure]:
    label = extractor.label("fd")
    n = min(len(real), len(fake))
    note = f"biased upwards at n = {n}" if n < SMALL else ""
    figures = [Figure("fd", label, frechet_from_features(real.features, fake.features), note=note)]
    if infinity:
        value, error = frechet_infinity(real.features, fake.features, seed=seed)
        note = "extrapolated to infinitely many images"
        if n < real.features.shape[1]:
            note += f", uncertain: n = {n} < {real.features.shape[1]} features"
        figures.append(Figure("fd_inf", f"{label} ∞", value, error, note=note))
    return figures


def _kernel(real: Features, fake: Features, extractor: Extractor, seed: int) -> Figure:
    value, error = kernel_distance(real.features, fake.features, seed)
    return Figure("kd", extractor.label("kd"), value, error, note="unbiased at any n")


def _neighbours(real: Features, fake: Features) -> list[Figure]:
    found = compare(real.features, fake.features)
    ratio = copying(real.features, fake.features)
    return [
        Figure("precision", "precision", found.precision, better="higher", note="k = 3"),
        Figure("recall", "recall", found.recall, better="higher", note="k = 3"),
        Figure("density", "density", found.density, better="higher", note="k = 5"),
        Figure("coverage", "coverage", found.coverage, better="higher", note="k = 5"),
        Figure(
            "copying",
            "distance to nearest real, over that of real",
            ratio,
            better="about 1",
            note="near 0: memorised",
        ),
    ]


def _score(real: Features, fake: Features, extractor: Extractor) -> list[Figure]:
    if fake.logits is None or real.logits is None:
        return []
    splits = 10 if len(fake) >= SMALL else 1
    value, deviation = inception_score(fake.logits, splits)
    of_real = inception_score(real.logits, splits if len(real) >= splits else 1).value
    error = deviation if splits > 1 else None
    note = f"{splits} split{'s' if splits > 1 else ''}; real images: {of_real:.3f}"
    return [Figure("is", extractor.label("is"), value, error, "higher", note)]


def _of_class(real: Features, fake: Features, extractor: Extractor, seed: int) -> list[Figure]:
    figures = [_kernel(real, fake, extractor, seed)]
    if min(len(real), len(fake)) > 5:
        keys = ("recall", "coverage", "precision", "density")
        near = {figure.key: figure for figure in _neighbours(real, fake)}
        figures += [near[key] for key in keys]
    figures += _frechet(real, fake, extractor, False, seed)
    for figure in figures:
        figure.note = f"n = {len(real)} real, {len(fake)} generated"
    return figures
