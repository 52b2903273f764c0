"""StyleGAN (Karras et al. 2019, arXiv:1812.04948): a mapping network, styles by AdaIN, noise.

The synthesis network is a row of levels b4, b8, ..., which can grow as those of progressive GAN;
the discriminator is that of `gankern.models.pggan`, with blur.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gankern.models import pggan
from gankern.models.levels import Growing, Level, cast, double, make_levels
from gankern.nn import AdaIN, EqualizedConv2d, MappingNetwork
from gankern.nn.mapping import mix_styles
from gankern.ops import synthesis_epilogue
from gankern.ops.synthesis_layer import conv2d_layer


class Epilogue(nn.Module):
    """Noise, bias and LeakyReLU 0.2 in one pass, then AdaIN with the style of w (figure 1b).

    Where a convolution comes before, the filter of its upsampling is in that pass too.

    Args:
        channels: of x, [N, C, h, w]; each has a learned strength of noise, 0 at the start.
        w_dim: length of w.
        size: (h, w), of the constant noise.
    """

    noise_const: Tensor

    def __init__(self, channels: int, w_dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.noise_strength = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.adain = AdaIN(channels, w_dim)
        self.register_buffer("noise_const", torch.randn(size))

    def forward(
        self, x: Tensor, w: Tensor, noise_mode: str, conv: EqualizedConv2d | None = None
    ) -> Tensor:
        """Of x, or of conv(x)."""
        noise = None
        if noise_mode == "const":
            noise = self.noise_const
        elif noise_mode == "random":
            noise = torch.randn(x.shape[0], 1, *self.noise_const.shape, device=x.device)
        strength = None if noise is None else self.noise_strength
        act: dict[str, Any] = {"act": "lrelu", "gain": math.sqrt(2)}
        if conv is None:
            x = synthesis_epilogue(x, None, None, noise, strength, self.bias, **act)
        else:
            x = conv2d_layer(
                x, conv.weight * conv.weight_gain, self.bias, conv.resample_filter.float(), conv.up,
                padding=conv.padding, flip_weight=conv.up == 1, noise=noise,
                noise_strength=strength, **act,
            )  # fmt: skip
        return self.adain(x, w)


class SynthesisBlock(nn.Module):
    """One level: the learned constant or an upsampling convolution, and a second convolution.

    Doubling, convolution and the blur (1, 2, 1) are one transposed convolution with the filter
    (1, 3, 3, 1), which is the blur convolved with the doubling's box.

    Args:
        in_channels: of x; 0: level b4, which starts from the constant.
        level: of this block.
        w_dim: length of w.
    """

    def __init__(self, in_channels: int, level: Level, w_dim: int) -> None:
        super().__init__()
        width = level.channels
        if in_channels:
            self.conv0 = EqualizedConv2d(in_channels, width, bias=False, up=2)
        else:
            self.const = nn.Parameter(torch.ones(width, *level.size))
        self.epilogue0 = Epilogue(width, w_dim, level.size)
        self.conv1 = EqualizedConv2d(width, width, bias=False)
        self.epilogue1 = Epilogue(width, w_dim, level.size)

    def forward(self, x: Tensor | None, ws: Tensor, noise_mode: str) -> Tensor:
        """x [N, I, h/2, w/2], ws [N, 2, w_dim] -> [N, C, h, w]."""
        if x is None:
            x = cast(self.const.expand(ws.shape[0], -1, -1, -1), None, self.const)
            x = self.epilogue0(x, ws[:, 0], noise_mode)
        else:
            x = self.epilogue0(x, ws[:, 0], noise_mode, self.conv0)
        return self.epilogue1(x, ws[:, 1], noise_mode, self.conv1)


class SynthesisNetwork(Growing):
    """ws -> image of the highest level that runs.

    Args:
        w_dim: length of w.
        levels: from b4 to the grown image.
        channels: of the image.
    """

    def __init__(self, w_dim: int, levels: list[Level], channels: int = 3) -> None:
        super().__init__(levels)
        self.blocks, self.torgbs = nn.ModuleList(), nn.ModuleList()
        in_channels = 0
        for level in levels:
            self.blocks.append(SynthesisBlock(in_channels, level, w_dim))
            self.torgbs.append(EqualizedConv2d(level.channels, channels, 1))
            in_channels = level.channels
        self.num_ws = 2 * len(levels)

    def forward(self, ws: Tensor, noise_mode: str | None = None) -> Tensor:
        """ws [N, num_ws, w_dim] -> images [N, channels, h, w]; noise_mode as `Generator`."""
        mode = noise_mode or ("random" if self.training else "const")
        if mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode must be random, const or none, got {mode!r}")
        x = below = None
        for i, block in enumerate(self.blocks[: self.level + 1]):
            below, x = x, block(x, ws[:, 2 * i : 2 * i + 2], mode)
        img: Tensor = self.torgbs[self.level](x)
        if self.alpha < 1:
            img = torch.lerp(double(self.torgbs[self.level - 1](below)), img, self.alpha)
        return img


class Generator(nn.Module):
    """z, c -> image: `mapping`, then `synthesis`.

    Args:
        z_dim: length of z.
        c_dim: length of the label c; 0: unconditional.
        w_dim: length of w.
        resolution: (height, width) of the grown images: (h * 2^k, w * 2^k), h and w at least 4.
        channels: of the images.
        mapping_layers: fully connected layers from z to w.
        channel_base: channels of level b<r> are channel_base / r ...
        channel_max: ... and at most this many.
    """

    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 0,
        w_dim: int = 512,
        resolution: tuple[int, int] = (1024, 1024),
        channels: int = 3,
        mapping_layers: int = 8,
        channel_base: int = 16384,
        channel_max: int = 512,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        levels = make_levels(resolution, channel_base, channel_max)
        self.synthesis = SynthesisNetwork(w_dim, levels, channels)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(
            z_dim, c_dim, w_dim, self.num_ws, mapping_layers, w_avg_beta=0.995
        )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each level."""
        return self.synthesis.sizes

    @property
    def used_ws(self) -> int:
        """How many of the styles the running levels use."""
        return 2 * (self.synthesis.level + 1)

    def set_growth(self, growth: float) -> None:
        """Grows to `growth`, from 0 to the last level's number."""
        self.synthesis.set_growth(growth)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str | None = None,
        z_mix: Tensor | None = None,
        crossover: Tensor | None = None,
    ) -> Tensor:
        """z [N, z_dim], c [N, c_dim] -> images [N, channels, h, w], about -1 to 1.

        noise_mode: "random" draws the noise anew, "const" takes a fixed one, "none" leaves it out;
        None: random in training, else const. z_mix [N, z_dim] and crossover int [N]: the layers
        from `crossover` on take the styles of z_mix (style mixing, section 3.1).
        """
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        if z_mix is not None and crossover is not None:
            other = self.mapping(z_mix, c, truncation_psi, truncation_cutoff)
            ws = mix_styles(ws, other, crossover)
        return self.synthesis(ws, noise_mode)


def make_discriminator(**options: object) -> nn.Module:
    """`pggan.Discriminator` with blur."""
    return pggan.Discriminator(**options, blur=True)  # type: ignore[arg-type]
