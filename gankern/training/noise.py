"""Randomness as a function of the image counter.

Every step draws from generators seeded afresh with (seed, stream, images seen, ...). There is no
random state to save, so that a resumed run cannot differ in it, and every process of a run knows
what the others draw.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gankern.data import Dataset

STREAMS = {
    "weights": 0,
    "step": 1,
    "noise_D": 2,
    "noise_G": 3,
    "grid": 4,
    "class_D": 5,
    "class_G": 6,
    "mix_D": 7,
    "mix_G": 8,
    "cross_D": 9,
    "cross_G": 10,
}


def derive_seed(seed: int, stream: str, *numbers: int) -> int:
    """A seed of 63 bits, well mixed from the run's seed, a stream and any numbers."""
    sequence = np.random.SeedSequence([seed, STREAMS[stream], *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def latents(z_dim: int, n: int, seed: int) -> Tensor:
    """N(0, 1) latents [n, z_dim], drawn on the CPU so that they do not depend on the device."""
    return torch.randn(n, z_dim, generator=torch.Generator().manual_seed(seed))


def draw_conditions(dataset: Dataset, c_dim: int, n: int, seed: int) -> Tensor | None:
    """Conditions [n, c_dim] of generated images, drawn on the CPU; None if c_dim is 0.

    Classes are uniform, as one-hot rows; vectors are those of real images picked at random.
    """
    if not c_dim:
        return None
    generator = torch.Generator().manual_seed(seed)
    if dataset.num_classes:
        classes = torch.randint(c_dim, (n,), generator=generator)
        return torch.nn.functional.one_hot(classes, c_dim).float()
    assert dataset.labels is not None
    index = torch.randint(len(dataset), (n,), generator=generator)
    return torch.from_numpy(np.array(dataset.labels[index.numpy()], dtype=np.float32))


def crossovers(n: int, num_ws: int, probability: float, seed: int) -> Tensor:
    """Layers from which a second latent counts, int64 [n]: 1..num_ws-1, or num_ws for none."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.randint(1, max(num_ws, 2), (n,), generator=generator)
    mixed = torch.rand(n, generator=generator) < probability
    return torch.where(mixed, layer, num_ws)
