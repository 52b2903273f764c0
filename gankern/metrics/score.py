"""The inception score: exp E[KL(p(y | x) || p(y))]; Salimans et al. 2016, arXiv:1606.03498."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits."""

    value: float
    deviation: float


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> InceptionScore:
    """The score of logits [N, K], in the given number of splits of a random order.

    The field takes 10 splits of 5,000; fewer images a split give a lower score.
    """
    if len(logits) < splits:
        raise ValueError(f"inception_score: logits must be at least {splits}, got {len(logits)}")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    scores = []
    n = len(logits)
    for i in range(splits):
        part = logits[order[i * n // splits : (i + 1) * n // splits]].double()
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(part))  # log p(y)
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
