"""Minibatch standard deviation: how much the samples of a group differ, as extra channels."""

from __future__ import annotations

import torch

# Inside the square root, as in the paper's code: a constant group has a finite gradient.
EPS = 1e-8


def minibatch_stddev(
    x: torch.Tensor,
    group_size: int | None = 4,
    num_channels: int = 1,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Append to x the standard deviation over groups of samples, averaged over channels and pixels.

    std[m, c, h, w] = sqrt(var over the samples n of group m of x[n, c, h, w] + 1e-8)
    y[n, C + f, h, w] = mean of std[m, c, h', w'] over h', w' and the f-th C / num_channels channels

    The batch falls into M = ceil(N / group_size) groups, sample n into group n mod M: at most
    `group_size` samples each. Where group_size divides N this is the grouping of StyleGAN; where it
    does not, the groups' sizes differ by one instead of an error. The variance is the biased one.

    Args:
        x: (N, C, *) features, float32, float16, bfloat16 or float64, any strides.
        group_size: samples in a group; None or a number over N takes the whole batch (PGGAN).
        num_channels: F, statistics appended; divides C.
        impl: "cuda", "triton", "cpu" or "reference"; None takes the best usable one.

    Returns:
        (N, C + F, *) of x's dtype and memory format: x, then the statistic of each sample's group.

    Raises:
        TypeError: x is not a floating-point tensor, group_size or num_channels is not an int.
        ValueError: x has under 2 dimensions, group_size or num_channels is under 1,
            num_channels does not divide C, or impl cannot run.

    Gradients: any order in x. Source: Karras et al. 2018 (arXiv:1710.10196), section 3.
    """
    _check(x, group_size, num_channels)
    return minibatch_stddev_reference(x, group_size, num_channels)


def _check(x: torch.Tensor, group_size: int | None, num_channels: int) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"minibatch_stddev: x must be a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"minibatch_stddev: x must be a floating-point tensor, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(
            f"minibatch_stddev: x must be (N, C, *), got {x.ndim} dimensions {tuple(x.shape)}"
        )
    for name, value, wanted in (
        ("group_size", group_size, "an int or None"),
        ("num_channels", num_channels, "an int"),
    ):
        if value is None and name == "group_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            got = type(value).__name__
            raise TypeError(f"minibatch_stddev: {name} must be {wanted}, got {got}")
        if value < 1:
            raise ValueError(f"minibatch_stddev: {name} must be at least 1, got {value}")
    if x.shape[1] % num_channels:
        raise ValueError(
            f"minibatch_stddev: num_channels must divide the {x.shape[1]} channels of x, "
            f"got {num_channels}"
        )


def minibatch_stddev_reference(
    x: torch.Tensor, group_size: int | None = 4, num_channels: int = 1
) -> torch.Tensor:
    """The formula of `minibatch_stddev` in plain PyTorch, differentiable to any order."""
    n = x.shape[0]
    groups = _groups(n, group_size)
    if n % max(groups, 1) == 0:
        stat = _group_stat(x, groups, num_channels)  # [M, F]
    else:
        stat = torch.cat([_group_stat(x[m::groups], 1, num_channels) for m in range(groups)])
    stat = stat[torch.arange(n, device=x.device) % max(groups, 1)]  # [N, F]
    planes = stat.reshape(n, num_channels, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return torch.cat([x, planes.to(x.dtype)], dim=1)


def _groups(n: int, group_size: int | None) -> int:
    """M, the number of groups of n samples."""
    return min(n, 1) if group_size is None else -(-n // group_size)


def _group_stat(x: torch.Tensor, groups: int, num_channels: int) -> torch.Tensor:
    n, c = x.shape[:2]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    size = n // max(groups, 1)
    channels = c // num_channels
    x = x.reshape(size, groups, num_channels, channels, *x.shape[2:])  # [G, M, F, C/F, *]
    std = (x.var(0, unbiased=False) + EPS).sqrt() if size else x.sum(0)
    return std.flatten(2).mean(2)  # [M, F]
