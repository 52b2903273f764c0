"""Quality of the averaged generator while it trains."""

from __future__ import annotations

from typing import Any

import torch

from gankern.data import Dataset
from gankern.metrics import (
    DatasetImages,
    GeneratedImages,
    extract,
    load_extractor,
    measure,
    path_figures,
)
from gankern.metrics.features import default_cache
from gankern.training.config import TrainConfig

FIRST = 2**40  # seed of the images; no other part of a run draws from there
BATCH = 32


class Evaluator:
    """Compares generated images with real ones, whose features are made once and kept.

    Every process calls it; they share the images.

    Args:
        config: of the run: its metrics_extractor, metrics_images, metrics_full and first seed.
        dataset: images trained on.
        device: of the extractor.

    Raises:
        MetricsError: there is no such extractor.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, device: torch.device) -> None:
        self.extractor = load_extractor(config.metrics_extractor, device)
        self.count, self.full = config.metrics_images, config.metrics_full
        self.names = dataset.class_names if config.metrics_full else None
        images = DatasetImages(dataset, self.count, config.first_seed)
        self.labels = images.labels
        self.real = extract(images, self.extractor, BATCH, default_cache())

    def __call__(self, G: Any) -> dict[str, Any]:
        """Figures of as many images of a generator in evaluation mode, by their labels.

        Returns:
            A figure by its label; "<label> error", its standard error if it has one; "generated
            images" and "real images", how many; "classes", with metrics_full and labels, the
            figures of each class.
        """
        images = GeneratedImages(G, self.count, self.labels, FIRST)
        found = extract(images, self.extractor, BATCH)
        result = measure(self.real, found, self.extractor, self.names, infinity=self.full)
        if self.full:
            result.figures += path_figures(G, self.extractor, seed=FIRST, classes=images.labels)
        values: dict[str, Any] = {
            "generated images": result.n_fake,
            "real images": result.n_real,
        }
        for figure in result.figures:
            values[figure.label] = figure.value
            if figure.error is not None:
                values[f"{figure.label} error"] = figure.error
        if result.classes:
            values["classes"] = {
                name: {figure.label: figure.value for figure in figures}
                for name, figures in result.classes.items()
            }
        return values
