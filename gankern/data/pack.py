"""Packs a folder or a zip of images into one data set file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from gankern.data.dataset import FORMAT
from gankern.data.decode import FILTERS, MODES, Geometry, decode
from gankern.data.errors import DataError
from gankern.data.files import atomic_path
from gankern.data.sources import Source, Unreadable, open_source
from gankern.data.vectors import read_vectors

LABELS = ("auto", "none", "from-folders", "from-top-folders")
_PAGE = 4096

# From the names of the packed images to classes [N] or vectors [N, K] or None, and class names.
Labeller = Callable[[list[str]], tuple["list[int] | np.ndarray | None", list[str]]]


@dataclass
class Report:
    """What became of every file of a source.

    Attributes:
        images: number packed.
        classes: images of each class, by name; empty without labels.
        label_dim: length of labels that are vectors; else 0.
        notes: how often an image was treated specially, by kind.
        duplicates: images equal, after resizing, to an earlier one (left out or not).
        skipped: name and reason of each file that was not packed.
    """

    images: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    label_dim: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def reasons(self) -> Counter[str]:
        """How many files were skipped for each reason (without its details)."""
        return Counter(reason.partition(":")[0] for _, reason in self.skipped)

    def to_json(self) -> str:
        """Everything, as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def pack(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    geometry: Geometry,
    labels: str = "auto",
    duplicates: str = "keep",
    overwrite: bool = False,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    vectors: str | os.PathLike[str] | None = None,
) -> Report:
    """Packs all images of a folder or zip, in the order of their names.

    Args:
        src: a folder (with any folders below it) or a zip.
        dst: the file to write, usually *.safetensors; whole or not at all.
        geometry: size, crop, channels and background of the packed images.
        labels: "from-folders" (each folder that holds images is a class, named by its path),
            "from-top-folders" (each folder at the top is a class), "none", or "auto": from folders
            if there are two or more of them and no image lies outside one.
        duplicates: "keep" or "skip" images that equal an earlier one pixel by pixel.
        overwrite: whether an existing dst may be replaced.
        workers: decoding threads.
        progress: called with (files done, files in all).
        vectors: a CSV file of vectors that are the labels, as in `gankern.data.vectors`.

    Returns:
        The report.

    Raises:
        DataError: src is missing, unreadable or without a usable image; dst exists; labels cannot
            be had; the disk is full.
    """
    dst = Path(dst)
    _check_arguments(geometry, labels, duplicates, workers)
    check_target(dst, overwrite)
    if vectors is not None and labels not in ("auto", "none"):
        raise DataError(f"pack: labels must be auto or none with vectors, got {labels}")
    source = open_source(Path(src))
    table = None if vectors is None else read_vectors(Path(vectors))
    return pack_source(source, dst, geometry, labels, duplicates, workers, progress, table)


def pack_source(
    source: Source,
    dst: Path,
    geometry: Geometry,
    labels: str = "auto",
    duplicates: str = "keep",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    vectors: dict[str, np.ndarray] | None = None,
) -> Report:
    """Packs an opened source; arguments, result and errors as `pack`, vectors by file name."""
    report = Report(skipped=list(source.skipped))

    def label(names: list[str]) -> tuple[list[int] | np.ndarray | None, list[str]]:
        if not names:
            reasons = ", ".join(f"{n} {reason}" for reason, n in report.reasons().most_common())
            raise DataError(f"{source.path}: holds no usable image ({reasons})")
        if vectors is None:
            return labels_of(names, labels)
        if unused := len(vectors) - len(names):
            report.notes["vector without an image"] = unused
        return np.stack([vectors[name] for name in names]), []

    folders = {name.rpartition("/")[0] for name in source.names}
    header = 65536 + sum(2 * len(folder.encode()) + 16 for folder in folders)
    header += 4 * sum(map(len, (vectors or {}).values()))
    channels = {"gray": 1, "rgb": 3, "rgba": 4}[geometry.channels]
    shape = (channels, geometry.height, geometry.width)
    images = _usable(source, geometry, duplicates, workers, report, progress)
    if vectors is not None:
        images = _with_vectors(images, vectors)
    write_packed(dst, images, shape, len(source.names), label, report, header)
    return report


def _usable(
    source: Source,
    geometry: Geometry,
    duplicates: str,
    workers: int,
    report: Report,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels of each image to pack; what is not packed goes into the report."""
    seen: set[bytes] = set()
    for done, (name, result) in enumerate(_decode_all(source, geometry, workers), 1):
        if progress is not None:
            progress(done, len(source.names))
        if isinstance(result, str):
            report.skipped.append((name, result))
            continue
        pixels, notes = result
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
        if digest in seen:
            report.duplicates += 1
            if duplicates == "skip":
                report.skipped.append((name, "duplicate"))
                continue
        seen.add(digest)
        report.notes.update(notes)
        yield name, pixels


def _with_vectors(
    images: Iterator[tuple[str, np.ndarray]], vectors: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The images; DataError at the first that has no vector."""
    for name, pixels in images:
        if name not in vectors:
            raise DataError(f"pack: every image must have a vector, but {name} has none")
        yield name, pixels


def check_target(dst: Path, overwrite: bool) -> None:
    """Raises DataError if dst must not be written."""
    if dst.is_dir() or (dst.exists() and not overwrite):
        kind = "is a folder" if dst.is_dir() else "exists already (--overwrite replaces it)"
        raise DataError(f"{dst}: {kind}")


def _check_arguments(geometry: Geometry, labels: str, duplicates: str, workers: int) -> None:
    for name, value, allowed in (
        ("labels", labels, LABELS),
        ("duplicates", duplicates, ("keep", "skip")),
        ("crop", geometry.crop, ("center", "none")),
        ("channels", geometry.channels, tuple(MODES)),
        ("resample", geometry.resample, FILTERS),
    ):
        if value not in allowed:
            raise DataError(f"pack: {name} must be one of {', '.join(allowed)}, got {value}")
    for name, number, most in (
        ("height", geometry.height, 8192),
        ("width", geometry.width, 8192),
        ("workers", workers, 256),
    ):
        if not 1 <= number <= most:
            raise DataError(f"pack: {name} must be in 1..{most}, got {number}")


_Decoded = tuple[np.ndarray, list[str]]


def _decode_all(
    source: Source, geometry: Geometry, workers: int
) -> Iterator[tuple[str, _Decoded | str]]:
    """Decodes with several threads, in order; a string in place of pixels is why they are not."""

    def one(name: str) -> _Decoded | str:
        try:
            with source.open(name) as file:
                return decode(file, geometry)
        except Unreadable as reason:
            return str(reason)

    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; bombs are checked by size
        waiting: deque[tuple[str, Future[_Decoded | str]]] = deque()
        try:
            for name in source.names:
                waiting.append((name, pool.submit(one, name)))
                if len(waiting) > 8 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def labels_of(names: list[str], how: str) -> tuple[list[int] | None, list[str]]:
    """The label of each file name, and the class names in order of label.

    Folders that all files have in common are no part of a class name.

    Raises:
        DataError: labels are demanded, but a file lies outside every class folder.
    """
    if how == "none":
        return None, []
    folders = [PurePosixPath(name).parent.parts for name in names]
    common = 0
    for first, last in zip(min(folders), max(folders), strict=False):
        if first != last:
            break
        common += 1
    if len(set(folders)) == 1 and how != "auto":
        common = max(0, common - 1)  # one class only: its folder names it
    end = common + 1 if how == "from-top-folders" else None
    classes = ["/".join(parts[common:end]) for parts in folders]
    if "" in classes or (how == "auto" and len(set(classes)) < 2):
        if how == "auto":
            return None, []
        stray = names[classes.index("")]
        raise DataError(f"labels {how}: every image must lie in a class folder, got {stray}")
    class_names = sorted(set(classes))
    index = {name: i for i, name in enumerate(class_names)}
    return [index[name] for name in classes], class_names


def write_packed(
    dst: Path,
    images: Iterable[tuple[str, np.ndarray]],
    shape: tuple[int, int, int],
    most: int,
    label: Labeller,
    report: Report,
    header: int = 65536,
) -> None:
    """Writes a data set file as its images come, whole or not at all.

    The header and the labels are known only at the end, and lie before the pixels: room is left
    for them, and the header (JSON) is padded with spaces up to the labels, as safetensors allows.

    Args:
        dst: the file.
        images: name and uint8 [C, H, W] of each.
        shape: C, H, W.
        most: upper bound of the number of images.
        label: from the names of the packed images to classes or vectors (or None) and class names.
        report: gets the number of images and of each class.
        header: bytes to leave for the JSON header, which holds the class names.

    Raises:
        DataError: the file cannot be written, or whatever `label` raises.
    """
    try:
        with atomic_path(dst) as temporary:
            _check_space(dst, most * int(np.prod(shape)))
            _write(temporary, images, shape, _round_up(8 * most + header), label, report)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise DataError(f"{dst}: cannot be written: {reason}") from error


def _check_space(dst: Path, size: int) -> None:
    free = shutil.disk_usage(dst.parent).free
    if size > free:
        raise DataError(
            f"{dst}: the disk is too full: needs up to {size / 2**20:.0f} MiB,"
            f" {free / 2**20:.0f} MiB are free"
        )


def _write(
    path: Path,
    images: Iterable[tuple[str, np.ndarray]],
    shape: tuple[int, int, int],
    room: int,
    label: Labeller,
    report: Report,
) -> None:
    names: list[str] = []
    crc = 0
    with open(path, "wb") as file:
        file.seek(room)
        for name, pixels in images:
            data = pixels.tobytes()
            file.write(data)
            crc = zlib.crc32(data, crc)
            names.append(name)
        listing = "\n".join(names).encode("utf-8")
        labels, class_names = label(names)
        metadata = {
            "format": FORMAT,
            "class_names": json.dumps(class_names, ensure_ascii=False),
            "crc32": f"{crc:08x}",
        }
        header, block = _header(len(names), shape, labels, len(listing), metadata)
        if 8 + len(header) + len(block) > room:
            raise DataError(f"{path.name}: {len(class_names)} classes have too long names")
        file.write(listing)
        file.seek(0)
        file.write((room - 8 - len(block)).to_bytes(8, "little"))
        file.write(header.ljust(room - 8 - len(block)))
        file.write(block)
    report.images = len(names)
    if isinstance(labels, list):
        report.classes = {name: labels.count(i) for i, name in enumerate(class_names)}
    elif labels is not None:
        report.label_dim = labels.shape[1]


def _header(
    n: int,
    shape: tuple[int, int, int],
    labels: list[int] | np.ndarray | None,
    listing: int,
    metadata: dict,
) -> tuple[bytes, bytes]:
    """The JSON header of labels, images and names, and the bytes of the labels."""
    kind, dtype = ("I64", "<i8") if isinstance(labels, list) else ("F32", "<f4")
    array = np.asarray([] if labels is None else labels, dtype)
    block = array.tobytes()
    size = n * int(np.prod(shape))
    first, second = len(block), len(block) + size
    header: dict[str, object] = {"__metadata__": metadata}
    if labels is not None:
        header["labels"] = {"dtype": kind, "shape": [*array.shape], "data_offsets": [0, first]}
    header["images"] = {"dtype": "U8", "shape": [n, *shape], "data_offsets": [first, second]}
    end = second + listing
    header["names"] = {"dtype": "U8", "shape": [listing], "data_offsets": [second, end]}
    return json.dumps(header, ensure_ascii=False).encode("utf-8"), block


def _round_up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
