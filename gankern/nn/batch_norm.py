"""Batch normalisation whose statistics span all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """y = (x - mean) * rsqrt(var + eps) * weight + bias, over all axes but the channels'.

    In training the statistics are those of the batch of all processes together, so that two
    processes compute what one would with both their batches (Ioffe and Szegedy 2015,
    arXiv:1502.03167). On CPU too, where torch.nn.SyncBatchNorm does not run. In evaluation the
    running averages are used. Any order of gradient, in x, weight and bias.

    Args:
        num_features: channels C of x, [N, C] or [N, C, H, W].
        eps: added to the variance, default 1e-5.
        momentum: share of a new batch in the running averages, default 0.1.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            averages = self.running_mean, self.running_var
            return F.batch_norm(
                x, *averages, self.weight, self.bias, self.training, self.momentum, self.eps
            )
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        n = dist.get_world_size() * x.numel() / x.shape[1]
        mean = _SumOverRanks.apply(x.sum(axes)) / n  # [C]
        centred = x - mean.view(shape)
        var = _SumOverRanks.apply(centred.square().sum(axes)) / n  # [C]
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(var.to(self.running_var) * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce by sum; its gradient is the same sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _SumOverRanks.apply(dy)
