"""The Inception-v3 of FID: Szegedy et al. 2015, arXiv:1512.00567, as FID was made with.

It differs from the ImageNet networks in use: 1008 outputs, average pools that leave the border
out of their mean, a maximum pool in the last block, and TensorFlow 1's resampling of the input.
Parameters carry the names of the usual PyTorch conversions, so that their files load.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299  # pixels
FEATURES = 2048
CLASSES = 1008


class Conv(NamedTuple):
    """A convolution of a branch: name, output channels, kernel height and width, stride."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(
        self, in_channels: int, channels: int, kernel: tuple[int, int], stride: int, padding: bool
    ) -> None:
        super().__init__()
        pad = (kernel[0] // 2, kernel[1] // 2) if padding else 0
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, and one that pools; their outputs are concatenated.

    Args:
        in_channels: of x.
        branches: chains of convolutions; a chain's end may be a tuple of two, which fork.
        pool: "avg" or "max", of stride 1, followed by a convolution; "reduce": maximum, stride 2.
        pool_channels: outputs of that convolution.
    """

    def __init__(
        self,
        in_channels: int,
        branches: list[list[Conv | tuple[Conv, Conv]]],
        pool: str,
        pool_channels: int = 0,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.branches: list[list[list[str]]] = []
        self.channels = pool_channels or in_channels
        for branch in branches:
            channels, steps = in_channels, []
            for step in branch:
                convs = [step] if isinstance(step, Conv) else list(step)
                for name, width, kernel, stride in convs:
                    same = stride == 1
                    self.add_module(name, ConvBNReLU(channels, width, kernel, stride, same))
                channels = sum(conv.channels for conv in convs)
                steps.append([conv.name for conv in convs])
            self.branches.append(steps)
            self.channels += channels
        if pool_channels:
            self.branch_pool = ConvBNReLU(in_channels, pool_channels, (1, 1), 1, False)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for branch in self.branches:
            y = x
            for names in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            parts.append(y)
        return torch.cat([*parts, self._pool(x)], 1)

    def _pool(self, x: Tensor) -> Tensor:
        if self.pool == "reduce":
            return F.max_pool2d(x, 3, stride=2)
        if self.pool == "max":
            return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def _block_a(in_channels: int, pool_channels: int) -> Mixed:
    """Figure 5 of the paper, at 35x35."""
    return Mixed(
        in_channels,
        [
            [Conv("branch1x1", 64)],
            [Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))],
            [
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3)),
            ],
        ],
        "avg",
        pool_channels,
    )


def _block_b(in_channels: int) -> Mixed:
    """Figure 10, 35x35 to 17x17."""
    return Mixed(
        in_channels,
        [
            [Conv("branch3x3", 384, (3, 3), 2)],
            [
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3), 2),
            ],
        ],
        "reduce",
    )


def _block_c(in_channels: int, width: int) -> Mixed:
    """Figure 6 with n = 7, at 17x17."""
    row, column = (1, 7), (7, 1)
    return Mixed(
        in_channels,
        [
            [Conv("branch1x1", 192)],
            [
                Conv("branch7x7_1", width),
                Conv("branch7x7_2", width, row),
                Conv("branch7x7_3", 192, column),
            ],
            [
                Conv("branch7x7dbl_1", width),
                Conv("branch7x7dbl_2", width, column),
                Conv("branch7x7dbl_3", width, row),
                Conv("branch7x7dbl_4", width, column),
                Conv("branch7x7dbl_5", 192, row),
            ],
        ],
        "avg",
        192,
    )


def _block_d(in_channels: int) -> Mixed:
    """17x17 to 8x8."""
    return Mixed(
        in_channels,
        [
            [Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)],
            [
                Conv("branch7x7x3_1", 192),
                Conv("branch7x7x3_2", 192, (1, 7)),
                Conv("branch7x7x3_3", 192, (7, 1)),
                Conv("branch7x7x3_4", 192, (3, 3), 2),
            ],
        ],
        "reduce",
    )


def _block_e(in_channels: int, pool: str) -> Mixed:
    """Figure 7, at 8x8."""
    row, column = (1, 3), (3, 1)
    return Mixed(
        in_channels,
        [
            [Conv("branch1x1", 320)],
            [
                Conv("branch3x3_1", 384),
                (Conv("branch3x3_2a", 384, row), Conv("branch3x3_2b", 384, column)),
            ],
            [
                Conv("branch3x3dbl_1", 448),
                Conv("branch3x3dbl_2", 384, (3, 3)),
                (Conv("branch3x3dbl_3a", 384, row), Conv("branch3x3dbl_3b", 384, column)),
            ],
        ],
        pool,
        192,
    )


class InceptionV3(nn.Module):
    """Images to the 2048 features of the last pool and 1008 logits without their bias.

    The inception score of the field is taken from logits without bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBNReLU(3, 32, (3, 3), 2, False)
        self.Conv2d_2a_3x3 = ConvBNReLU(32, 32, (3, 3), 1, False)
        self.Conv2d_2b_3x3 = ConvBNReLU(32, 64, (3, 3), 1, True)
        self.Conv2d_3b_1x1 = ConvBNReLU(64, 80, (1, 1), 1, False)
        self.Conv2d_4a_3x3 = ConvBNReLU(80, 192, (3, 3), 1, False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, "avg")
        self.Mixed_7c = _block_e(2048, "max")
        self.fc = nn.Linear(FEATURES, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [N, 3, H, W], 0 to 255 -> features [N, 2048], logits [N, 1008]."""
        x = (tf1_resize(images.float(), (SIDE, SIDE)) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        x = x.mean((2, 3))  # [N, 2048]
        return x, F.linear(x, self.fc.weight)


def tf1_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, as TensorFlow 1's resize_bilinear: pixel i is read at i * in / out.

    The corners' origin is aligned, there is no half-pixel offset and no antialiasing.

    Args:
        x: [N, C, h, w].
        size: H, W.

    Returns:
        [N, C, H, W].
    """
    for dim, wanted in zip((2, 3), size, strict=True):
        have = x.shape[dim]
        at = torch.arange(wanted, device=x.device, dtype=torch.float32) * (have / wanted)
        low = at.long()
        high = (low + 1).clamp_max(have - 1)
        shape = [1, 1, 1, 1]
        shape[dim] = wanted
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), (at - low).view(shape))
    return x
