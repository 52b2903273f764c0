"""Randomness as a function of the image counter.

Every step draws from generators seeded afresh with (seed, stream, images seen, ...). There is no
random state to save, so that a resumed run cannot differ in it, and every process of a run knows
what the others draw.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STREAMS = {
    "weights": 0,
    "step": 1,
    "noise_D": 2,
    "noise_G": 3,
    "grid": 4,
    "class_D": 5,
    "class_G": 6,
}


def derive_seed(seed: int, stream: str, *numbers: int) -> int:
    """A seed of 63 bits, well mixed from the run's seed, a stream and any numbers."""
    sequence = np.random.SeedSequence([seed, STREAMS[stream], *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def latents(z_dim: int, n: int, seed: int) -> Tensor:
    """N(0, 1) latents [n, z_dim], drawn on the CPU so that they do not depend on the device."""
    return torch.randn(n, z_dim, generator=torch.Generator().manual_seed(seed))


def one_hot_classes(c_dim: int, n: int, seed: int) -> Tensor | None:
    """Uniform classes as one-hot rows [n, c_dim], drawn on the CPU; None if c_dim is 0."""
    if not c_dim:
        return None
    classes = torch.randint(c_dim, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(classes, c_dim).float()
