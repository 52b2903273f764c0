"""StyleGAN2 (Karras et al. 2020, arXiv:1912.04958) with the choices of StyleGAN2-ADA
(Karras et al. 2020, arXiv:2006.06676): skip generator, residual discriminator.

Every network is a row of levels b4, b8, b16, ...: 4 * 2^k is the side of the square image at
level k. An image of (h * 2^k) x (w * 2^k) starts from an h x w grid at level b4, so that non-square
images have the same levels, channels and parameter names. Parameters bear the names that published
checkpoints use; `load_published` and `published` convert the few buffers that differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gankern.models.levels import Level, cast, make_levels
from gankern.nn import (
    EqualizedConv2d,
    EqualizedLinear,
    MappingNetwork,
    MinibatchStdDev,
    SynthesisLayer,
    ToRGB,
)
from gankern.nn.layers import FILTER
from gankern.nn.mapping import mix_styles
from gankern.ops import setup_filter, upsample2d

# channel_base of the paper's configurations: F has twice E's channels in the levels over b64.
CONFIGS = {"E": 16384, "F": 32768}

# StyleGAN2-ADA, appendix: activations of 16-bit levels stay within +-2^8.
CONV_CLAMP = 256.0


class SynthesisBlock(nn.Module):
    """One level: upsampling layer (or the constant), layer, and its colours onto the image.

    Args:
        in_channels: of x; 0: the first level, which starts from a learned constant.
        level: of this block.
        w_dim: length of w.
        channels: of the image.
        clamp: largest magnitude of activations and colours, or None.
    """

    resample_filter: Tensor

    def __init__(
        self, in_channels: int, level: Level, w_dim: int, channels: int, clamp: float | None = None
    ) -> None:
        super().__init__()
        _, size, width, self.dtype = level
        if in_channels:
            self.conv0 = SynthesisLayer(in_channels, width, w_dim, size, up=2, clamp=clamp)
        else:
            self.const = nn.Parameter(torch.randn(width, *size))
        self.conv1 = SynthesisLayer(width, width, w_dim, size, clamp=clamp)
        self.torgb = ToRGB(width, channels, w_dim, clamp=clamp)
        self.num_convs = 2 if in_channels else 1
        self.register_buffer("resample_filter", setup_filter(FILTER))

    def forward(
        self, x: Tensor | None, img: Tensor | None, ws: Sequence[Tensor], noise_mode: str
    ) -> tuple[Tensor, Tensor]:
        """x [N, I, h/2, w/2], img [N, channels, h/2, w/2], ws: num_convs + 1 times [N, w_dim]."""
        *w_convs, w_rgb = ws
        if x is None:
            x = cast(self.const.expand(w_rgb.shape[0], -1, -1, -1), self.dtype, self.const)
        else:
            x = cast(x, self.dtype, self.conv0.weight)
            x = self.conv0(x, w_convs[0], noise_mode)  # [N, C, h, w]
        x = self.conv1(x, w_convs[-1], noise_mode)
        y = self.torgb(x, w_rgb)  # [N, channels, h, w]
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return x, y if img is None else y + upsample2d(img, self.resample_filter.float())


class SynthesisNetwork(nn.Module):
    """ws -> image: a level for every doubling, the colours of all levels summed (figure 7b).

    Args:
        w_dim: length of w.
        levels: from b4 to the image.
        channels: of the image.
        clamp: as `SynthesisBlock`.
    """

    def __init__(
        self, w_dim: int, levels: list[Level], channels: int = 3, clamp: float | None = CONV_CLAMP
    ) -> None:
        super().__init__()
        self.block_names = [level.name for level in levels]
        in_channels = 0
        for level in levels:
            block = SynthesisBlock(in_channels, level, w_dim, channels, clamp)
            self.add_module(level.name, block)
            in_channels = level.channels
        self.num_ws = 2 * len(levels)  # the convolutions, and the last level's colours

    def forward(self, ws: Tensor, noise_mode: str | None = None) -> Tensor:
        """ws [N, num_ws, w_dim] -> images [N, channels, H, W]; noise_mode as `Generator`."""
        noise_mode = noise_mode or ("random" if self.training else "const")
        x = img = None
        first, of_layers = 0, ws.unbind(1)
        for block in (getattr(self, name) for name in self.block_names):
            # The colours of a level take the w of the next level's first layer.
            block_ws = of_layers[first : first + block.num_convs + 1]
            x, img = block(x, img, block_ws, noise_mode)
            first += block.num_convs
        assert img is not None
        return img


class Generator(nn.Module):
    """z, c -> image: `mapping`, then `synthesis`.

    Args:
        z_dim: length of z.
        c_dim: length of the label c; 0: unconditional.
        w_dim: length of w.
        resolution: (height, width) of the images: (h * 2^k, w * 2^k), h and w at least 4.
        channels: of the images.
        mapping_layers: fully connected layers from z to w.
        channel_base: channels of level b<r> are channel_base / r ...
        channel_max: ... and at most this many.
        num_fp16_res: how many of the highest levels run in 16 bits.
        low_dtype: their dtype, torch.float16 or torch.bfloat16.
        conv_clamp: largest magnitude of activations and colours, or None.
    """

    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 0,
        w_dim: int = 512,
        resolution: tuple[int, int] = (256, 256),
        channels: int = 3,
        mapping_layers: int = 8,
        channel_base: int = CONFIGS["F"],
        channel_max: int = 512,
        num_fp16_res: int = 0,
        low_dtype: torch.dtype = torch.float16,
        conv_clamp: float | None = CONV_CLAMP,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        levels = make_levels(resolution, channel_base, channel_max, num_fp16_res, low_dtype)
        self.synthesis = SynthesisNetwork(w_dim, levels, channels, conv_clamp)
        self.num_ws = self.used_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, mapping_layers)

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
        """z [N, z_dim], c [N, c_dim] -> images [N, channels, H, W], about -1 to 1.

        noise_mode: "random" draws the noise anew, "const" takes a fixed one, "none" leaves it out;
        None: random in training, else const, so that a z gives one image. z_mix [N, z_dim] and
        crossover int [N]: the layers from `crossover` on take the styles of z_mix (style mixing,
        StyleGAN, section 3.1).
        """
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        if z_mix is not None and crossover is not None:
            other = self.mapping(z_mix, c, truncation_psi, truncation_cutoff)
            ws = mix_styles(ws, other, crossover)
        return self.synthesis(ws, noise_mode)


class DiscriminatorBlock(nn.Module):
    """One level: (colours to features,) two layers, the second downsampling, and a skip.

    y = (conv1(conv0(x)) + skip(x)) / sqrt(2): figure 7c. Without the skip, y = conv1(conv0(x)).

    Args:
        level: of x, [N, I, h, w].
        out_channels: of y, [N, O, h/2, w/2].
        channels: of the image, for the first level, which sees it; 0: others.
        clamp: as `SynthesisBlock`.
        residual: whether there is a skip.
    """

    def __init__(
        self,
        level: Level,
        out_channels: int,
        channels: int = 0,
        clamp: float | None = None,
        residual: bool = True,
    ) -> None:
        super().__init__()
        _, _, width, self.dtype = level
        self.fromrgb = None
        if channels:
            self.fromrgb = EqualizedConv2d(channels, width, 1, act="lrelu", clamp=clamp)
        self.conv0 = EqualizedConv2d(width, width, act="lrelu", clamp=clamp)
        self.conv1 = EqualizedConv2d(width, out_channels, act="lrelu", down=2, clamp=clamp)
        self.skip = None
        if residual:
            self.skip = EqualizedConv2d(width, out_channels, 1, bias=False, down=2)

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x, self.dtype, self.conv0.weight)
        if self.fromrgb is not None:
            x = self.fromrgb(x)
        if self.skip is None:
            return self.conv1(self.conv0(x))
        y = self.skip(x, gain=math.sqrt(0.5))
        return y + self.conv1(self.conv0(x), gain=math.sqrt(0.5))


class DiscriminatorEpilogue(nn.Module):
    """Level b4: minibatch standard deviation, a layer, two fully connected ones.

    Args:
        in_channels: of x [N, I, h, w].
        size: its height and width.
        out_features: 1, the logit; or those of the label's projection.
        mbstd_group_size: samples that are compared with each other; None: the whole batch.
        mbstd_num_channels: statistics appended to x; 0: none.
        clamp: as `SynthesisBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        size: tuple[int, int],
        out_features: int = 1,
        mbstd_group_size: int | None = 4,
        mbstd_num_channels: int = 1,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.mbstd = (
            MinibatchStdDev(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels else None
        )
        features = in_channels + mbstd_num_channels
        self.conv = EqualizedConv2d(features, in_channels, act="lrelu", clamp=clamp)
        self.fc = EqualizedLinear(in_channels * math.prod(size), in_channels, act="lrelu")
        self.out = EqualizedLinear(in_channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x, None, self.conv.weight)
        x = self.conv(x if self.mbstd is None else self.mbstd(x))  # [N, I, h, w]
        return self.out(self.fc(x.flatten(1)))  # [N, out_features]


class Discriminator(nn.Module):
    """image, c -> logit.

    With labels, the logit is the projection <out, mapping(c)> / sqrt(features) (Miyato and Koyama
    2018, arXiv:1802.05637).

    Args: as `Generator` and `DiscriminatorEpilogue`, and
        d_residual: whether the levels have skips; StyleGAN2-ADA's CIFAR-10 networks have none.
    """

    def __init__(
        self,
        c_dim: int = 0,
        resolution: tuple[int, int] = (256, 256),
        channels: int = 3,
        mapping_layers: int = 8,
        channel_base: int = CONFIGS["F"],
        channel_max: int = 512,
        num_fp16_res: int = 0,
        low_dtype: torch.dtype = torch.float16,
        conv_clamp: float | None = CONV_CLAMP,
        mbstd_group_size: int | None = 4,
        mbstd_num_channels: int = 1,
        d_residual: bool = True,
    ) -> None:
        super().__init__()
        self.c_dim = c_dim
        levels = make_levels(resolution, channel_base, channel_max, num_fp16_res, low_dtype)
        _, grid, width, _ = levels[0]
        self.block_names = [level.name for level in levels[:0:-1]]
        for below, level in reversed(list(pairwise(levels))):
            sees = channels if level is levels[-1] else 0
            block = DiscriminatorBlock(level, below.channels, sees, conv_clamp, d_residual)
            self.add_module(level.name, block)
        if c_dim:
            self.mapping = MappingNetwork(0, c_dim, width, num_layers=mapping_layers)
        self.b4 = DiscriminatorEpilogue(
            width, grid, width if c_dim else 1, mbstd_group_size, mbstd_num_channels, conv_clamp
        )

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """img [N, channels, H, W], c [N, c_dim] -> logits [N, 1]."""
        x = img
        for name in self.block_names:
            x = getattr(self, name)(x)
        x = self.b4(x)
        if not self.c_dim:
            return x
        w = self.mapping(None, c)
        return (x * w).sum(1, keepdim=True) / math.sqrt(w.shape[1])


def load_published(G: Generator, D: Discriminator | None, state: Mapping[str, Any]) -> None:
    """Loads a checkpoint in published names: "G.synthesis.b8.conv0.weight", "D.b4.out.bias", ...

    They are ours with the network's name in front; only the discriminator's levels hold a
    `resample_filter` of their own beside those of their layers, which ours do not.

    Args:
        G, D: networks of the same configuration; D None: the generator alone.
        state: tensors or numpy arrays by name; names without "G." or "D." are ignored.

    Raises:
        RuntimeError: a parameter is missing, unknown, or of another shape.
    """
    for prefix, net in (("G.", G), ("D.", D)):
        if net is None:
            continue
        found = {k[2:]: torch.as_tensor(v) for k, v in state.items() if k.startswith(prefix)}
        if net is D:
            found = {k: v for k, v in found.items() if k.count(".") != 1 or "filter" not in k}
        net.load_state_dict(found)


def published(G: Generator, D: Discriminator | None = None) -> dict[str, Tensor]:
    """The networks' parameters and buffers in published names: what `load_published` reads."""
    state = {f"G.{name}": t for name, t in G.state_dict().items()}
    if D is not None:
        state |= {f"D.{name}": t for name, t in D.state_dict().items()}
        for block in D.block_names:
            state[f"D.{block}.resample_filter"] = state[f"D.{block}.conv1.resample_filter"]
    return state
