"""Batch normalisation whose statistics span all processes, and the activation behind it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.ops.batch_norm_act import activated, batch_norm_act
from gankern.ops.bias_act import activation


class BatchNorm(nn.Module):
    """y = gain * act((x - mean) * rsqrt(var + eps) * weight + bias), by channel.

    In training mean and variance are those of the batch of all processes together, so that two
    processes compute what one would with both their batches (Ioffe and Szegedy 2015,
    arXiv:1502.03167). On CPU too, where torch.nn.SyncBatchNorm does not run. In evaluation the
    running averages are used. Any order of gradient, in x, weight and bias.

    Args:
        num_features: channels C of x, [N, C] or [N, C, H, W].
        eps: added to the variance, default 1e-5.
        momentum: share of a new batch in the running averages, default 0.1.
        act, alpha, gain: the activation, as `bias_act`; none by default.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        act: str = "linear",
        alpha: float | None = None,
        gain: float | None = None,
    ) -> None:
        super().__init__()
        activation("BatchNorm", act, alpha, gain, None)
        self.eps, self.momentum = eps, momentum
        self.act, self.alpha, self.gain = act, alpha, gain
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        averages = self.running_mean, self.running_var
        if self.training and not (dist.is_initialized() and dist.get_world_size() > 1):
            numbers = self.eps, self.momentum
            return batch_norm_act(
                x, self.weight, self.bias, *averages, *numbers, self.act, self.alpha, self.gain
            )
        if self.training:
            y = self._over_ranks(x)
        else:
            y = F.batch_norm(x, *averages, self.weight, self.bias, eps=self.eps)
        return activated(y, self.act, self.alpha, self.gain)

    def _over_ranks(self, x: Tensor) -> Tensor:
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
