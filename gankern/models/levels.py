"""What the convolutional models share: a row of grids, each twice the one before.

Progressive GAN and the StyleGANs have a level at each: its name, its channels, its dtype.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gankern.ops import downsample2d, upsample2d
from gankern.ops._impl import default_impl


class Level(NamedTuple):
    """Where a block stands: its name, its grid, its channels, its dtype (None: the parameters')."""

    name: str
    size: tuple[int, int]
    channels: int
    dtype: torch.dtype | None


def grid_sizes(resolution: tuple[int, int]) -> list[tuple[int, int]]:
    """Grids from the first to the image, (height, width); every one doubles the one before.

    The first is the smallest that halving reaches with both sides whole and at least 4: 4x4 for
    256x256, 6x4 for 96x64, 7x7 for 28x28, 33x33 for 66x66.

    Args:
        resolution: (height, width) of the images: (h * 2^k, w * 2^k), h and w at least 4.

    Raises:
        ValueError: the image cannot be halved.
    """
    height, width = int(resolution[0]), int(resolution[1])
    sizes = [(height, width)]
    while all(side % 2 == 0 and side >= 8 for side in sizes[0]):
        sizes.insert(0, (sizes[0][0] // 2, sizes[0][1] // 2))
    if len(sizes) == 1:
        raise ValueError(
            "resolution must be (h * 2^k) x (w * 2^k) with h, w >= 4 and k >= 1, "
            f"got {height}x{width}"
        )
    return sizes


def make_levels(
    resolution: tuple[int, int],
    channel_base: int,
    channel_max: int,
    num_fp16_res: int = 0,
    low_dtype: torch.dtype = torch.float16,
) -> list[Level]:
    """The levels from b4 to the image, one for each of `grid_sizes`.

    Args:
        resolution: as `grid_sizes`.
        channel_base: channels of level b<r> are channel_base / r ...
        channel_max: ... and at most this many.
        num_fp16_res: how many of the highest levels run in 16 bits.
        low_dtype: their dtype.

    Raises:
        ValueError: the image cannot be halved.
    """
    sizes = grid_sizes(resolution)
    levels = []
    for i, size in enumerate(sizes):
        side = 4 << i
        dtype = low_dtype if i >= len(sizes) - num_fp16_res else None
        width = max(1, min(channel_base // side, channel_max))
        levels.append(Level(f"b{side}", size, width, dtype))
    return levels


def cast(x: Tensor, dtype: torch.dtype | None, weight: Tensor) -> Tensor:
    """x in a level's dtype (None: the parameters') and in the memory format that is faster there.

    That is channels-last in 16 bits, and on CPUs, whose convolutions take 0.7 times as long in it.
    """
    dtype = dtype or weight.dtype
    kernels = default_impl("synthesis_epilogue", x.device.type)
    last = kernels == "cpu" or torch.finfo(dtype).bits == 16
    return x.to(dtype, memory_format=torch.channels_last) if last else x.to(dtype)


class Growing(nn.Module):
    """A network of which the first levels run, the last of them maybe faded in in part.

    The growth is a number: 2.25 is level 2 with a quarter of level 3. It is saved with the weights.

    Args:
        levels: of the whole network; it starts grown.
    """

    growth: Tensor

    def __init__(self, levels: list[Level]) -> None:
        super().__init__()
        self.sizes = [level.size for level in levels]
        self.register_buffer("growth", torch.tensor(float(len(levels) - 1)))
        self._growth = float(len(levels) - 1)
        self.register_load_state_dict_post_hook(_read_growth)

    def set_growth(self, growth: float) -> None:
        """Grows to `growth`, from 0 to the last level's number."""
        if not 0 <= growth <= len(self.sizes) - 1:
            raise ValueError(f"growth must be from 0 to {len(self.sizes) - 1}, got {growth}")
        if growth != self._growth:
            self._growth = float(growth)
            self.growth.fill_(growth)

    @property
    def level(self) -> int:
        """Number of the highest level that runs."""
        return math.ceil(self._growth)

    @property
    def alpha(self) -> float:
        """Its share of the image: 1, or less while it fades in."""
        return 1 - (self.level - self._growth)


def _read_growth(net: Any, _: Any) -> None:
    net._growth = net.growth.item()


def double(x: Tensor) -> Tensor:
    """Every pixel becomes four, [N, C, H, W] -> [N, C, 2H, 2W]."""
    return upsample2d(x, _box(x))


def halve(x: Tensor) -> Tensor:
    """Every four pixels become their mean, [N, C, 2H, 2W] -> [N, C, H, W]."""
    return downsample2d(x, _box(x))


def _box(x: Tensor) -> Tensor:
    return torch.full((2, 2), 0.25, device=x.device)


def shrink(img: Tensor, net: Growing) -> Tensor:
    """Real images as a growing D sees them: small, and as blurred as the new level is faint.

    lerp(double(halve(x)), x, alpha) at the level's size (Karras et al. 2018, figure 2).
    """
    while img.shape[2:] != net.sizes[net.level]:
        img = halve(img)
    if net.alpha < 1:
        img = torch.lerp(double(halve(img)), img, net.alpha)
    return img
