"""The order in which a training run sees its images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class BatchSampler:
    """An endless stream of batches of indices, reshuffled every epoch and exactly resumable.

    The stream is one permutation of range(n) after another, that of epoch e drawn from (seed, e).
    A batch is the next `batch` indices of the stream, and may span two epochs. Rank r of `world`
    gets the r-th of `world` equal slices, so that the slices in order of rank are the batch that
    a single process would have had. The whole state is the count of indices consumed.

    Args:
        n: number of images, at least 1.
        batch: indices a batch over all ranks together, a multiple of `world`; may exceed n. It can
            be assigned between batches.
        seed: of the shuffling.
        rank: of this process, default 0.
        world: number of processes, default 1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, n: int, batch: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        if n < 1:
            raise ValueError(f"BatchSampler: n must be at least 1, got {n}")
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"BatchSampler: rank must be in 0..world-1, got {rank} of {world}")
        if seed < 0:
            raise ValueError(f"BatchSampler: seed must be at least 0, got {seed}")
        self.n = n
        self.seed = seed
        self.rank = rank
        self.world = world
        self.batch = batch
        self.position = 0  # indices consumed by all ranks together
        self._order: tuple[int, int, np.ndarray] | None = None  # seed, epoch, permutation

    @property
    def batch(self) -> int:
        """Indices a batch over all ranks together."""
        return self._batch

    @batch.setter
    def batch(self, value: int) -> None:
        if value < 1 or value % self.world:
            raise ValueError(
                f"BatchSampler: batch must be a positive multiple of world ({self.world}),"
                f" got {value}"
            )
        self._batch = value

    @property
    def epoch(self) -> int:
        """Number of times that every image has been seen."""
        return self.position // self.n

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[:2] != (self.seed, epoch):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            self._order = (self.seed, epoch, order)
        return self._order[2]

    def _take(self, start: int, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.n)
            part = self._permutation(epoch)[offset : offset + count]
            parts.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        """The next indices of this rank: int64 [batch / world]."""
        share = self.batch // self.world
        indices = self._take(self.position + self.rank * share, share)
        self.position += self.batch
        return torch.from_numpy(indices.astype(np.int64))

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on where this sampler is: plain ints."""
        return {"n": self.n, "seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state, without replaying batches; batch and world may differ.

        Raises:
            ValueError: the state belongs to a data set of another length.
        """
        if int(state["n"]) != self.n:
            raise ValueError(
                f"BatchSampler: state must be of {self.n} images, got one of {state['n']}"
                " (the data set has changed)"
            )
        self.seed = int(state["seed"])
        self.position = int(state["position"])
