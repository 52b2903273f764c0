"""The fully connected GAN (Goodfellow et al. 2014, arXiv:1406.2661), for small images."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from gankern.ops import bias_act


class DenseLayer(nn.Module):
    """y = act(x W' + b), with weights N(0, 1 / fan_in) at the start."""

    def __init__(self, features_in: int, features_out: int, act: str) -> None:
        super().__init__()
        self.act = act
        self.weight = nn.Parameter(torch.randn(features_out, features_in) / features_in**0.5)
        self.bias = nn.Parameter(torch.zeros(features_out))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight.t()  # [N, features_out]
        if self.act == "lrelu":
            return bias_act(x, self.bias, act="lrelu", alpha=0.2)
        return bias_act(x, self.bias, act=self.act)


class Generator(nn.Module):
    """z -> 256 -> 512 -> 1024 -> image, LeakyReLU 0.2 between, tanh at the end.

    Args:
        z_dim: length of the latent vector.
        resolution: (height, width) of the images, in pixels.
        channels: channels of the images.
        c_dim: length of the condition, which joins z (Mirza and Osindero 2014); 0 for none.
    """

    def __init__(
        self,
        z_dim: int = 100,
        resolution: tuple[int, int] = (28, 28),
        channels: int = 1,
        c_dim: int = 0,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.image_shape = (channels, *resolution)
        widths = [z_dim + c_dim, 256, 512, 1024]
        self.layers = nn.Sequential(*(DenseLayer(i, o, "lrelu") for i, o in pairwise(widths)))
        self.image = DenseLayer(widths[-1], math.prod(self.image_shape), "tanh")

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        if c is not None:
            z = torch.cat([z, c], 1)
        return self.image(self.layers(z)).unflatten(1, self.image_shape)  # [N, C, H, W]


class Discriminator(nn.Module):
    """image -> 512 -> 256 -> logit, LeakyReLU 0.2 and dropout between.

    Args:
        resolution: (height, width) of the images, in pixels.
        channels: channels of the images.
        dropout: probability of zeroing an activation after each hidden layer.
        c_dim: length of the condition, which joins the pixels; 0 for none.
    """

    def __init__(
        self,
        resolution: tuple[int, int] = (28, 28),
        channels: int = 1,
        dropout: float = 0.3,
        c_dim: int = 0,
    ) -> None:
        super().__init__()
        self.c_dim = c_dim
        widths = [channels * math.prod(resolution) + c_dim, 512, 256]
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [DenseLayer(i, o, "lrelu"), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.logit = DenseLayer(widths[-1], 1, "linear")

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        x = img.flatten(1)
        if c is not None:
            x = torch.cat([x, c], 1)
        return self.logit(self.layers(x))  # [N, 1]
