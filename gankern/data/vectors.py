"""Labels that are vectors, from a CSV file.

A line is the name of an image's file as it lies in the folder or zip (a/b.png), then K numbers,
separated by commas. A first line without numbers is a heading.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from gankern.data.errors import DataError


def read_vectors(path: Path) -> dict[str, np.ndarray]:
    """Vectors float32 [K] by file name.

    Raises:
        DataError: the file cannot be read or holds no vectors, a name comes twice, or a line has
            another number of numbers or one that is not finite.
    """
    vectors: dict[str, np.ndarray] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, (name, *texts) in enumerate(filter(None, csv.reader(file)), 1):
                vector = _numbers(texts)
                if number == 1 and vector is None:
                    continue
                if name in vectors:
                    raise DataError(f"{path}: {name} comes twice")
                length = len(next(iter(vectors.values()), texts or [""]))
                if vector is None or len(vector) != length:
                    raise DataError(
                        f"{path}: {name} must have {length} finite numbers, got"
                        f" {','.join(texts) or 'none'}"
                    )
                vectors[name] = vector
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file: {error}") from error
    if not vectors:
        raise DataError(f"{path}: holds no vectors")
    return vectors


def _numbers(texts: list[str]) -> np.ndarray | None:
    """float32 [K]; None if a text is no finite number."""
    try:
        with np.errstate(over="ignore"):
            vector = np.array([float(text) for text in texts], np.float32)
    except ValueError:
        return None
    return vector if np.isfinite(vector).all() else None
