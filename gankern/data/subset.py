"""Parts of a data set, without copying its images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gankern.data.dataset import Dataset
from gankern.data.errors import DataError


class Rows:
    """Some rows of an array, as far as a data set needs arrays: shape, dtype, len, indexing."""

    def __init__(self, array: np.ndarray, index: np.ndarray) -> None:
        self.array, self.index = array, index
        self.shape, self.dtype = (len(index), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.array[self.index[rows]]


def hold_out(dataset: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Splits images off that are not trained on.

    Args:
        dataset: all images.
        count: how many to hold out, chosen at random; 0: none.
        seed: of the choice.

    Returns:
        The data set to train on, and that of the others (None for 0).

    Raises:
        DataError: there are not so many images.
    """
    if not count:
        return dataset, None
    if count >= len(dataset):
        raise DataError(
            f"{dataset.name}: images held out must be fewer than {len(dataset)}, got {count}"
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    parts = []
    for index in (np.sort(order[count:]), np.sort(order[:count])):
        images: Any = Rows(dataset.images, index)
        labels = None if dataset.labels is None else np.asarray(dataset.labels)[index]
        parts.append(replace(dataset, images=images, labels=labels, _names=None))
    return parts[0], parts[1]
