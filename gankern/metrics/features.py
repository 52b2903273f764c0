"""The feature pass: every image through the extractor once, and real ones only the first time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from gankern.data.dataset import Dataset, checksum
from gankern.data.decode import Geometry, decode
from gankern.data.files import atomic_path
from gankern.data.grid import to_uint8
from gankern.data.latents import render, seed_latents
from gankern.data.pack import labels_of
from gankern.data.sources import Unreadable, open_source
from gankern.metrics.extractors import Extractor, MetricsError

FORMAT = "gankern-features-1"

ProgressCallback = Callable[[int, int], None]


class Images(Protocol):
    """A set of images that are made or read a batch at a time.

    Attributes:
        name: for messages.
        identity: what decides the pixels, for the cache; empty: not cached.
        labels: int64 [N], or None.
    """

    name: str
    identity: str
    labels: Tensor | None

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Tensor:
        """Images uint8 [B, C, H, W]."""
        ...


class DatasetImages:
    """Images of a data set: all, or some chosen at random.

    Args:
        dataset: the data set.
        count: how many; None or more than there are: all.
        seed: of the choice.
    """

    def __init__(self, dataset: Dataset, count: int | None = None, seed: int = 0) -> None:
        self.dataset, self.name = dataset, dataset.name
        n = len(dataset)
        chosen = count is not None and count < n
        self.index = np.arange(n)
        if chosen:
            self.index = np.sort(np.random.default_rng(seed).permutation(n)[:count])
        pixels = dataset.metadata.get("crc32") or f"{checksum(dataset.images):08x}"
        choice = f"{count} of seed {seed}" if chosen else "all"
        shape = list(dataset.images.shape)
        self.identity = f"{dataset.name} {shape} {dataset.images.dtype} {pixels}, {choice}"
        self.labels = None
        if dataset.labels is not None:
            self.labels = torch.from_numpy(np.asarray(dataset.labels)[self.index])

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, indices: np.ndarray) -> Tensor:
        images = torch.from_numpy(np.ascontiguousarray(self.dataset.images[self.index[indices]]))
        return torch.from_numpy(to_uint8(images))


class GeneratedImages:
    """Images of a generator: image i is that of seed first + i.

    Args:
        G: a generator in evaluation mode, with z_dim and c_dim.
        count: how many.
        labels: int64 of real images, from which the classes of a conditional generator are drawn;
            None: uniformly.
        first: the first seed.
    """

    name = "generated"
    identity = ""

    def __init__(self, G: Any, count: int, labels: Tensor | None = None, first: int = 0) -> None:
        self.G, self.count, self.first = G, count, first
        self.labels: Tensor | None = None
        if G.c_dim:
            rng = np.random.default_rng(first)
            pool = np.arange(G.c_dim) if labels is None else labels.numpy()
            self.labels = torch.from_numpy(pool[rng.integers(len(pool), size=count)])

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> Tensor:
        z = seed_latents((self.first + indices).tolist(), self.G.z_dim)
        c = None if self.labels is None else self.labels[torch.from_numpy(indices)]
        return torch.from_numpy(to_uint8(render(self.G, z, c, batch=len(indices))))


class FolderImages:
    """The image files of a folder or a zip, brought to the size and colours of the real ones.

    They have labels if each lies in a folder that is named as a class of the data set.

    Args:
        path: the folder or zip.
        like: the data set that they are compared with.
        count: how many, in the order of their names; None: all.
    """

    identity = ""

    def __init__(self, path: Path, like: Dataset, count: int | None = None) -> None:
        self.source, self.name = open_source(path), path.name
        height, width = like.resolution
        channels = {1: "gray", 3: "rgb", 4: "rgba"}[like.channels]
        self.geometry = Geometry(height, width, "center", channels)
        pattern = re.compile(r"\.(png|jpe?g|webp|bmp|gif|tiff?|ppm|qoi|avif)$", re.IGNORECASE)
        self.files = [name for name in self.source.names if pattern.search(name)][:count]
        if not self.files:
            raise MetricsError(
                f"{path}: must hold images, got {len(self.source.names)} other files"
            )
        classes, names = labels_of(self.files, "auto")
        self.labels: Tensor | None = None
        if classes is not None and set(names) <= set(like.class_names):
            index = torch.tensor([like.class_names.index(name) for name in names])
            self.labels = index[classes]

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: np.ndarray) -> Tensor:
        images = []
        for name in (self.files[i] for i in indices):
            try:
                with self.source.open(name) as file:
                    images.append(decode(file, self.geometry)[0])
            except Unreadable as error:
                raise MetricsError(f"{self.source.path}: {name}: {error}") from error
        return torch.from_numpy(np.stack(images))


@dataclass
class Features:
    """What the pass has found, on the CPU.

    Attributes:
        features: float32 [N, D].
        logits: float32 [N, K], or None.
        labels: int64 [N], or None.
    """

    features: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Tensor) -> Features:
        logits, labels = (None if t is None else t[index] for t in (self.logits, self.labels))
        return Features(self.features[index], logits, labels)


def extract(
    images: Images,
    extractor: Extractor,
    batch: int = 64,
    cache: Path | None = None,
    progress: ProgressCallback | None = None,
) -> Features:
    """The features of all images; processes of a group share the work, and each gets the whole.

    Args:
        images: a batch of them is in memory at a time.
        extractor: the network.
        batch: images at a time.
        cache: folder in which features of images with an identity are kept.
        progress: called with (images done, images in all) of this process.

    Raises:
        MetricsError: images or features that cannot be used.
        OSError: the cache cannot be written.
    """
    path = cache_path(images, extractor, cache)
    found = _read(path) if path else None
    if not _everyone(found is not None):
        found = _gather(_own_share(images, extractor, batch, progress), len(images))
        if path and _rank_and_world()[0] == 0:
            _write(path, found, images, extractor)
    assert found is not None
    found.labels = images.labels
    return found


def default_cache() -> Path:
    """Where features are kept: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gankern" / "features"


def cache_path(images: Images, extractor: Extractor, cache: Path | None) -> Path | None:
    """The file of these features; its name has the key: images, extractor and format."""
    if cache is None or not images.identity or not extractor.identity:
        return None
    key = json.dumps([FORMAT, images.identity, extractor.identity])
    name = re.sub(r"[^\w.-]+", "_", f"{images.name}-{extractor.name}")
    return cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def _own_share(
    images: Images, extractor: Extractor, batch: int, progress: ProgressCallback | None
) -> list[Tensor]:
    """Features and logits of every world-th image."""
    rank, world = _rank_and_world()
    own = np.arange(rank, len(images), world)
    parts: list[list[Tensor]] = []
    for start in range(0, len(own), batch):
        index = own[start : start + batch]
        out = extractor(images.batch(index))
        parts.append([t.cpu() for t in out if t is not None])
        if progress:
            progress(min(start + batch, len(own)), len(own))
    if not parts:
        raise MetricsError(f"{images.name}: images must be at least {world}, got {len(images)}")
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def _gather(own: list[Tensor], count: int) -> Features:
    """Puts the shares of all processes back into the order of the images."""
    world = _rank_and_world()[1]
    if world > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        most = math.ceil(count / world)
        for i, tensor in enumerate(own):
            mine = torch.zeros(most, tensor.shape[1], device=device)
            mine[: len(tensor)] = tensor
            shares = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(shares, mine)
            own[i] = torch.stack(shares, 1).flatten(0, 1)[:count].cpu()
    return Features(own[0], own[1] if len(own) > 1 else None)


def _read(path: Path) -> Features | None:
    """Features of the cache; None if there are none, or if the file is damaged."""
    try:
        tensors = load_file(path)
        return Features(tensors["features"], tensors.get("logits"))
    except Exception:  # the file is missing or damaged: it is made again
        return None


def _write(path: Path, found: Features, images: Images, extractor: Extractor) -> None:
    tensors = {"features": found.features}
    if found.logits is not None:
        tensors["logits"] = found.logits
    metadata = {"format": FORMAT, "images": images.identity, "extractor": extractor.identity}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def _everyone(have: bool) -> bool:
    """Whether all processes have something."""
    if not dist.is_initialized():
        return have
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    value = torch.tensor(int(have), device=device)
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return bool(value)


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
