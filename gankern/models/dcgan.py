"""DCGAN (Radford et al. 2015, arXiv:1511.06434): strided convolutions all the way.

One pair of networks covers the paper's form at 2^k (first grid 4x4), the 28x28 form (first grid
7x7: with width 64, 7x7x128 -> 14x14x64 -> 28x28x1) and any other size that can be halved, square or
not (96x64: 6x4). Channels double with every halving of the grid, up to 16 times `width`, the count
nearest to the image. What later papers added to convolutional nets are options: see `Generator` and
`Discriminator`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gankern.models.levels import grid_sizes
from gankern.nn.attention import MinibatchDiscrimination, SelfAttention
from gankern.nn.batch_norm import BatchNorm
from gankern.nn.layers import Upsample
from gankern.ops import bias_act
from gankern.ops.conv2d_resample import to_conv_dtype
from gankern.ops.convolution import MIN_CHANNELS, Form, convolution, has_own_kernels


def grid_and_doublings(resolution: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """First grid (h, w) and number of doublings k that make an image of (h * 2^k) x (w * 2^k).

    k is the largest with h and w whole and at least 4, so that the shorter side of the grid is 4 to
    7 where it can be: 64x64 -> (4, 4), 4; 28x28 -> (7, 7), 2; 96x64 -> (6, 4), 4. It is longer
    where a side is soon odd: 66x128 -> (33, 64), 1.

    Raises:
        ValueError: the image cannot be halved.
    """
    sizes = grid_sizes(resolution)
    return sizes[0], len(sizes) - 1


def widths_down(width: int, layers: int) -> list[int]:
    """Channels from the image inwards; no more than 16 widths, which 128x128 has."""
    return [width << min(k, 4) for k in range(layers)]


class Generator(nn.Module):
    """z -> dense -> [batch norm, ReLU, transposed conv] ..., tanh.

    Args:
        z_dim: length of the latent vector.
        resolution: (height, width) of the images, in pixels; see `grid_and_doublings`.
        channels: channels of the images.
        width: channels of the layer nearest to the image.
        c_dim: length of the condition, which joins z; 0 for none.
        upsample: "transposed" (4x4, stride 2), or "bilinear": upsampling, then a 3x3 convolution,
            which leaves no checkerboards (Odena et al. 2016, doi:10.23915/distill.00003).
        spectral: weights divided by their spectral norm (Miyato et al. 2018, arXiv:1802.05957).
        attention: shorter side of the grid that has self-attention; 0 for none.
    """

    def __init__(
        self,
        z_dim: int = 100,
        resolution: tuple[int, int] = (64, 64),
        channels: int = 3,
        width: int = 128,
        c_dim: int = 0,
        upsample: str = "transposed",
        spectral: str = "none",
        attention: int = 0,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.grid, doublings = grid_and_doublings(resolution)
        widths = widths_down(width, doublings)[::-1]
        sides = [min(self.grid) << k for k in range(doublings)]
        self.project = nn.Linear(z_dim + c_dim, widths[0] * math.prod(self.grid), bias=False)
        self.norms = nn.ModuleList(BatchNorm(w, act="relu", gain=1) for w in widths)
        self.convs = nn.ModuleList(
            up_convolution(i, o, upsample) for i, o in pairwise([*widths, channels])
        )
        self.bias = nn.Parameter(torch.zeros(channels))
        self.attention = nn.ModuleDict(attention_at(attention, sides, widths, "G"))
        self.apply(init_weights)
        if spectral == "both":
            self.apply(limit)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        if c is not None:
            z = torch.cat([z, c], 1)
        x = self.project(z).unflatten(1, (-1, *self.grid))  # [N, C, h, w]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = norm(x)
            side = str(min(x.shape[2:]))
            if side in self.attention:
                x = self.attention[side](x)
            x = conv(x)  # [N, C/2, 2H, 2W]
        return bias_act(x.contiguous() if x.is_cpu else x, self.bias, act="tanh")


class Discriminator(nn.Module):
    """[strided conv, (norm), LeakyReLU 0.2, (dropout)] ... -> dense -> logits.

    The grid is halved, odd sides rounded down, until its shorter side is under 7.

    Args:
        resolution: (height, width) of the images, in pixels; see `grid_and_doublings`.
        channels: channels of the images.
        width: channels of the layer nearest to the image.
        norm: "batch" as in the paper, "layer" (Ba et al. 2016, arXiv:1607.06450) or "none"; every
            layer but the first is normalised.
        dropout: probability of zeroing an activation after each layer.
        c_dim: length of the condition; 0 for none.
        condition: "projection" (Miyato and Koyama 2018, arXiv:1802.05637): logit += <features,
            embedding of c>; or "concat": c joins the image as constant channels.
        spectral, attention: as `Generator`; spectral also "d", D alone.
        minibatch_kernels: kernels of minibatch discrimination before the logit; 0 for none.
    """

    def __init__(
        self,
        resolution: tuple[int, int] = (64, 64),
        channels: int = 3,
        width: int = 128,
        norm: str = "batch",
        dropout: float = 0.0,
        c_dim: int = 0,
        condition: str = "projection",
        spectral: str = "none",
        attention: int = 0,
        minibatch_kernels: int = 0,
    ) -> None:
        super().__init__()
        self.c_dim = c_dim
        self.concat = c_dim > 0 and condition == "concat"
        (h, w), halvings = grid_and_doublings(resolution)
        while min(h, w) >= 7:  # at 28x28, a feature of the 7x7 grid sees 10 pixels only
            h, w, halvings = h // 2, w // 2, halvings + 1
        widths = widths_down(width, halvings)
        self.layers = nn.Sequential()
        sides = [min(resolution) >> (k + 1) for k in range(halvings)]
        here = attention_at(attention, sides, widths, "D")
        pairs = pairwise([channels + c_dim * self.concat, *widths])
        for k, (i, o) in enumerate(pairs):
            self.layers.append(DownLayer(i, o, norm if k else "none", dropout))
            if str(sides[k]) in here:
                self.layers.append(here[str(sides[k])])
        features = widths[-1] * h * w
        self.others = None
        if minibatch_kernels:
            self.others = MinibatchDiscrimination(features, minibatch_kernels)
        self.logit = nn.Linear(features + minibatch_kernels, 1)
        projected = c_dim > 0 and not self.concat
        self.embed = nn.Linear(c_dim, features, bias=False) if projected else None
        self.apply(init_weights)
        if spectral in ("d", "both"):
            self.apply(limit)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        if self.concat and c is not None:
            planes = c.to(img.dtype)[:, :, None, None].expand(-1, -1, *img.shape[2:])
            img = torch.cat([img, planes], 1)
        x = self.layers(img).flatten(1)  # [N, features]
        logit = self.logit(x if self.others is None else self.others(x))  # [N, 1]
        if self.embed is not None:
            # Scaled down, so that the class does not drown the image at the start.
            logit = logit + (x * self.embed(c)).sum(1, keepdim=True) * (4 / x.shape[1] ** 0.5)
        return logit


class DownLayer(nn.Module):
    """4x4 convolution of stride 2, norm or bias, LeakyReLU 0.2, dropout."""

    def __init__(self, channels_in: int, channels_out: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.conv = DownConvolution(channels_in, channels_out)
        self.norm: nn.Module | None = None
        if norm == "batch":
            self.norm = BatchNorm(channels_out, act="lrelu", alpha=0.2, gain=1)
        elif norm != "none":
            self.norm = nn.GroupNorm(1, channels_out)
        self.bias = None if self.norm is not None else nn.Parameter(torch.zeros(channels_out))
        self.activated = norm == "batch"
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # [N, C, H/2, W/2]
        if self.norm is not None:
            x = self.norm(x)
        if not self.activated:
            x = bias_act(x, self.bias, act="lrelu", alpha=0.2, gain=1)
        return F.dropout(x, self.dropout, self.training)


class DownConvolution(nn.Conv2d):
    """The nn.Conv2d of 4x4 taps, stride 2, padding 1, without bias; gankern's kernels on a CPU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 4, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return halve_or_double(x, self.weight, False)


class UpConvolution(nn.ConvTranspose2d):
    """The nn.ConvTranspose2d likewise."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 4, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return halve_or_double(x, self.weight, True)


def halve_or_double(x: Tensor, w: Tensor, transposed: bool, impl: str | None = None) -> Tensor:
    """The 4x4 convolution of stride 2 and padding 1, or its transpose; impl: as of the ops."""
    form = Form(2, (1, 1), transposed, (0, 0), 1, has_own_kernels(x, impl))
    x, w = to_conv_dtype(x, w)
    if form.own and x.shape[1] >= MIN_CHANNELS:
        x = x.contiguous(memory_format=torch.channels_last)
    return convolution(x, w, form)


def up_convolution(channels_in: int, channels_out: int, upsample: str) -> nn.Module:
    """Doubles the grid: transposed 4x4, or bilinear upsampling and 3x3."""
    if upsample == "transposed":
        return UpConvolution(channels_in, channels_out)
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(Upsample(), conv)


def attention_at(
    side: int, sides: list[int], widths: list[int], net: str
) -> dict[str, SelfAttention]:
    """The attention layer by its grid's shorter side, one of `sides`; {} for side 0.

    Raises:
        ValueError: the network has no such grid.
    """
    if side and side not in sides:
        known = ", ".join(map(str, sorted(sides)))
        raise ValueError(f"dcgan: attention must be at one of {net}'s grids {known}, got {side}")
    return {str(side): SelfAttention(widths[sides.index(side)])} if side else {}


def limit(module: nn.Module) -> None:
    """Divides a layer's weight by its spectral norm, estimated by one power iteration a step."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        spectral_norm(module)


def init_weights(module: nn.Module) -> None:
    """The paper's start: weights N(0, 0.02), the scale of a batch norm N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
