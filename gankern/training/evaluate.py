"""Quality of the averaged generator while it trains."""

from __future__ import annotations

from typing import Any

import torch

from gankern.data import Dataset
from gankern.metrics import DatasetImages, GeneratedImages, extract, load_extractor, measure
from gankern.metrics.features import default_cache
from gankern.training.config import TrainConfig

FIRST = 2**40  # seed of the images; no other part of a run draws from there
BATCH = 32


class Evaluator:
    """Compares generated images with real ones, whose features are made once and kept.

    Every process calls it; they share the images.

    Args:
        config: of the run: its metrics_extractor, metrics_images and first seed.
        dataset: images trained on.
        device: of the extractor.

    Raises:
        MetricsError: there is no such extractor.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, device: torch.device) -> None:
        self.extractor = load_extractor(config.metrics_extractor, device)
        self.count, self.classes = config.metrics_images, config.num_classes
        images = DatasetImages(dataset, self.count, config.first_seed)
        self.labels = images.labels
        self.real = extract(images, self.extractor, BATCH, default_cache())

    def __call__(self, G: Any) -> dict[str, float]:
        """Figures of as many images of a generator in evaluation mode, by their labels."""
        images = GeneratedImages(G, self.count, self.labels, FIRST)
        found = extract(images, self.extractor, BATCH)
        result = measure(self.real, found, self.extractor, infinity=False)
        values = {
            figure.label: figure.value for figure in result.figures if figure.key != "copying"
        }
        kernel = next(figure for figure in result.figures if figure.key == "kd")
        return values | {f"{kernel.label} error": kernel.error or 0.0}
