"""Progressive GAN (Karras et al. 2018, arXiv:1710.10196): 4x4 to 1024x1024, level by level.

Both networks are rows of levels b4, b8, ..., of which the first `level` + 1 run; the highest fades
in with weight `alpha` (figure 2). `set_growth` says how far they have grown.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from gankern.models.levels import Growing, Level, cast, double, halve, make_levels
from gankern.nn import EqualizedConv2d, EqualizedLinear, MinibatchStdDev
from gankern.ops import bias_act, pixel_norm


class GeneratorBlock(nn.Module):
    """Two 3x3 convolutions, each with LeakyReLU 0.2 and pixel norm; the first after doubling.

    Level b4 has a fully connected layer in place of the first (table 2).

    Args:
        in_channels: of x, [N, I, h/2, w/2]; of z [N, I] at level b4.
        level: of this block.
        first: whether it is b4.
    """

    def __init__(self, in_channels: int, level: Level, first: bool) -> None:
        super().__init__()
        self.size, self.first = level.size, first
        if first:
            features = level.channels * math.prod(level.size)
            self.dense = EqualizedLinear(in_channels, features, bias=False)
            self.bias = nn.Parameter(torch.zeros(level.channels))
        else:
            self.conv0 = EqualizedConv2d(in_channels, level.channels, act="lrelu")
        self.conv1 = EqualizedConv2d(level.channels, level.channels, act="lrelu")

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.dense(pixel_norm(x)).unflatten(1, (-1, *self.size))  # [N, C, h, w]
            x = bias_act(cast(x, None, self.bias), self.bias, act="lrelu")
        else:
            x = self.conv0(double(x))
        return pixel_norm(self.conv1(pixel_norm(x)))


class Generator(Growing):
    """z, c -> image of the highest level that runs.

    Args:
        z_dim: length of z.
        c_dim: length of the label c, which joins z; 0: unconditional.
        resolution: (height, width) of the grown images: (h * 2^k, w * 2^k), h and w at least 4.
        channels: of the images.
        channel_base: channels of level b<r> are channel_base / r ...
        channel_max: ... and at most this many.
    """

    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 0,
        resolution: tuple[int, int] = (1024, 1024),
        channels: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
    ) -> None:
        levels = make_levels(resolution, channel_base, channel_max)
        super().__init__(levels)
        self.z_dim, self.c_dim = z_dim, c_dim
        self.blocks, self.torgbs = nn.ModuleList(), nn.ModuleList()
        features = z_dim + c_dim
        for i, level in enumerate(levels):
            self.blocks.append(GeneratorBlock(features, level, first=i == 0))
            self.torgbs.append(EqualizedConv2d(level.channels, channels, 1))
            features = level.channels

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """z [N, z_dim], c [N, c_dim] -> images [N, channels, h, w], about -1 to 1."""
        x = z if c is None else torch.cat([z, c], 1)
        below = x
        for block in self.blocks[: self.level + 1]:
            below, x = x, block(x)
        img = self.torgbs[self.level](x)
        if self.alpha < 1:
            img = torch.lerp(double(self.torgbs[self.level - 1](below)), img, self.alpha)
        return img


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions with LeakyReLU 0.2, and the mean of four pixels.

    Args:
        level: of x, [N, I, h, w].
        out_channels: of y, [N, O, h/2, w/2].
        blur: halve by the binomial filter (1, 3, 3, 1), as StyleGAN does, instead.
    """

    def __init__(self, level: Level, out_channels: int, blur: bool) -> None:
        super().__init__()
        self.blur = blur
        self.conv0 = EqualizedConv2d(level.channels, level.channels, act="lrelu")
        down = 2 if blur else 1
        self.conv1 = EqualizedConv2d(level.channels, out_channels, act="lrelu", down=down)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.conv0(x))
        return x if self.blur else halve(x)


class DiscriminatorEpilogue(nn.Module):
    """Level b4: minibatch standard deviation, a convolution, two fully connected layers.

    Args:
        level: of x, [N, I, h, w].
        out_features: 1, the logit; or those of the label's projection.
        mbstd_group: samples that are compared with each other.
    """

    def __init__(self, level: Level, out_features: int, mbstd_group: int) -> None:
        super().__init__()
        width = level.channels
        self.mbstd = MinibatchStdDev(mbstd_group)
        self.conv = EqualizedConv2d(width + 1, width, act="lrelu")
        self.dense = EqualizedLinear(width * math.prod(level.size), width, act="lrelu")
        self.out = EqualizedLinear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dense(self.conv(self.mbstd(x)).flatten(1)))


class Discriminator(Growing):
    """image of the highest level that runs, c -> logit.

    With labels, the logit is the projection <out, embedding of c> / sqrt(features) (Miyato and
    Koyama 2018, arXiv:1802.05637).

    Args: as `Generator`, `DiscriminatorBlock` and `DiscriminatorEpilogue`.
    """

    def __init__(
        self,
        c_dim: int = 0,
        resolution: tuple[int, int] = (1024, 1024),
        channels: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
        mbstd_group: int = 4,
        blur: bool = False,
    ) -> None:
        levels = make_levels(resolution, channel_base, channel_max)
        super().__init__(levels)
        self.c_dim = c_dim
        widths = [level.channels for level in levels]
        self.fromrgbs = nn.ModuleList(
            EqualizedConv2d(channels, width, 1, act="lrelu") for width in widths
        )
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(level, below.channels, blur) for below, level in pairwise(levels)
        )
        self.epilogue = DiscriminatorEpilogue(levels[0], widths[0] if c_dim else 1, mbstd_group)
        self.embed = EqualizedLinear(c_dim, widths[0], bias=False) if c_dim else None

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """img [N, channels, h, w], c [N, c_dim] -> logits [N, 1]."""
        img = cast(img, None, self.epilogue.out.weight)
        x = self.fromrgbs[self.level](img)
        for i in range(self.level, 0, -1):
            x = self.blocks[i - 1](x)
            if i == self.level and self.alpha < 1:
                x = torch.lerp(self.fromrgbs[i - 1](halve(img)), x, self.alpha)
        x = self.epilogue(x)
        if self.embed is None:
            return x
        # One-hot labels have a mean square of 1 / c_dim.
        w = self.embed(c) * math.sqrt(self.c_dim)
        return (x * w).sum(1, keepdim=True) / math.sqrt(w.shape[1])
