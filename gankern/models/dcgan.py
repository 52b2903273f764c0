"""DCGAN (Radford et al. 2015, arXiv:1511.06434): strided convolutions all the way.

One pair of networks covers the paper's form at any 2^k from 16 to 128 (first grid 4x4) and the
28x28 form (first grid 7x7: with width 64, 7x7x128 -> 14x14x64 -> 28x28x1). Channels double with
every halving of the grid; `width` is the count nearest to the image.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.nn.batch_norm import BatchNorm
from gankern.ops import bias_act


def grid_and_doublings(resolution: tuple[int, int]) -> tuple[int, int]:
    """First grid and number of doublings that make a square image: 64 -> (4, 4), 28 -> (7, 2)."""
    forms = {(28, 28): (7, 2)} | {(4 << k, 4 << k): (4, k) for k in range(2, 6)}
    height, width = resolution
    if (height, width) not in forms:
        size = "x".join(map(str, resolution))
        raise ValueError(f"dcgan: resolution must be 28x28 or 16, 32, 64, 128 square, got {size}")
    return forms[height, width]


class Generator(nn.Module):
    """z -> dense -> [transposed conv, batch norm, ReLU] ... -> transposed conv, tanh.

    Args:
        z_dim: length of the latent vector.
        resolution: (height, width) of the images, in pixels.
        channels: channels of the images.
        width: channels of the layer nearest to the image.
        c_dim: length of the condition, which joins z; 0 for none.
    """

    def __init__(
        self,
        z_dim: int = 100,
        resolution: tuple[int, int] = (64, 64),
        channels: int = 3,
        width: int = 128,
        c_dim: int = 0,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.grid, doublings = grid_and_doublings(resolution)
        widths = [width << k for k in reversed(range(doublings))]
        self.project = nn.Linear(z_dim + c_dim, widths[0] * self.grid**2, bias=False)
        self.norms = nn.ModuleList(BatchNorm(w) for w in widths)
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, stride=2, padding=1, bias=False)
            for i, o in zip(widths, [*widths[1:], channels], strict=True)
        )
        self.bias = nn.Parameter(torch.zeros(channels))
        self.apply(init_weights)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        if c is not None:
            z = torch.cat([z, c], 1)
        x = self.project(z).unflatten(1, (-1, self.grid, self.grid))  # [N, C, grid, grid]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = conv(bias_act(norm(x), act="relu", gain=1))  # [N, C/2, 2H, 2W]
        return bias_act(x, self.bias, act="tanh")


class Discriminator(nn.Module):
    """[strided conv, (batch norm), LeakyReLU 0.2, (dropout)] ... -> dense -> logits.

    Args:
        resolution: (height, width) of the images, in pixels.
        channels: channels of the images.
        width: channels of the layer nearest to the image.
        batch_norm: normalise every layer but the first, as in the paper.
        dropout: probability of zeroing an activation after each layer.
        c_dim: length of the condition, judged by projection (Miyato and Koyama 2018,
            arXiv:1802.05637): logit += <features, embedding of c>; 0 for none.
    """

    def __init__(
        self,
        resolution: tuple[int, int] = (64, 64),
        channels: int = 3,
        width: int = 128,
        batch_norm: bool = True,
        dropout: float = 0.0,
        c_dim: int = 0,
    ) -> None:
        super().__init__()
        self.c_dim = c_dim
        grid, doublings = grid_and_doublings(resolution)
        if grid == 7:  # one more layer, 7x7 -> 3x3: without it a feature sees 10 pixels of 28
            grid, doublings = 3, doublings + 1
        widths = [width << k for k in range(doublings)]
        self.layers = nn.Sequential(
            *(
                DownLayer(i, o, batch_norm and k > 0, dropout)
                for k, (i, o) in enumerate(pairwise([channels, *widths]))
            )
        )
        self.logit = nn.Linear(widths[-1] * grid**2, 1)
        self.embed = nn.Linear(c_dim, widths[-1] * grid**2, bias=False) if c_dim else None
        self.apply(init_weights)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        x = self.layers(img).flatten(1)  # [N, features]
        logit = self.logit(x)  # [N, 1]
        if self.embed is not None:
            # Scaled down, so that the class does not drown the image at the start.
            logit = logit + (x * self.embed(c)).sum(1, keepdim=True) * (4 / x.shape[1] ** 0.5)
        return logit


class DownLayer(nn.Module):
    """4x4 convolution of stride 2, batch norm or bias, LeakyReLU 0.2, dropout."""

    def __init__(self, channels_in: int, channels_out: int, norm: bool, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False)
        self.norm = BatchNorm(channels_out) if norm else None
        self.bias = None if norm else nn.Parameter(torch.zeros(channels_out))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # [N, C, H/2, W/2]
        if self.norm is not None:
            x = self.norm(x)
        x = bias_act(x, self.bias, act="lrelu", alpha=0.2, gain=1)
        return F.dropout(x, self.dropout, self.training)


def init_weights(module: nn.Module) -> None:
    """The paper's start: weights N(0, 0.02), the scale of a batch norm N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
