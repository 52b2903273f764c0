"""Layers that look at the whole image or the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """y = x + gamma * o(softmax(q(x)ᵀ k(x)) v(x)) over all places of an image, gamma 0 at first.

    q, k have an eighth of the channels, v a half; k and v are taken from a grid halved by maxima
    (Zhang et al. 2019, arXiv:1805.08318, section 3). Any order of gradient.

    Args:
        channels: C of x, [N, C, H, W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow, half = max(channels // 8, 1), max(channels // 2, 1)
        self.query = nn.Conv2d(channels, narrow, 1, bias=False)
        self.key = nn.Conv2d(channels, narrow, 1, bias=False)
        self.value = nn.Conv2d(channels, half, 1, bias=False)
        self.out = nn.Conv2d(half, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).flatten(2)  # [N, C / 8, H W]
        k = F.max_pool2d(self.key(x), 2).flatten(2)  # [N, C / 8, H W / 4]
        v = F.max_pool2d(self.value(x), 2).flatten(2)  # [N, C / 2, H W / 4]
        weights = (q.transpose(1, 2) @ k).softmax(2)  # [N, H W, H W / 4]
        y = (v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gamma * self.out(y)


class MinibatchDiscrimination(nn.Module):
    """Append to features how close the other samples of the batch are.

    o[i, b] = Σ_j exp(-|M[i, b] - M[j, b]|₁) over the other samples j, with M = x T; in training
    each process compares its own samples (Salimans et al. 2016, arXiv:1606.03498, section 3.2).

    Args:
        features: of x, [N, features].
        kernels: B, features appended.
        dim: length of each kernel's rows.
    """

    def __init__(self, features: int, kernels: int, dim: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, kernels, dim) / features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        m = torch.einsum("nf,fbd->nbd", x, self.weight.to(x.dtype))
        distances = (m[:, None] - m[None]).abs().sum(3)  # [N, N, B]
        closeness = torch.exp(-distances).sum(1) - 1  # without the sample itself
        return torch.cat([x, closeness], 1)
