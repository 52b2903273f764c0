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
        c_dim: length of the condition, which joins z (Mirza and Osindero 2014,
            arXiv:1411.1784); 0 for none.
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
        c_dim: length of the condition; 0 for none.
        condition: "concat": c joins the pixels (Mirza and Osindero 2014); "projection": logit +=
            <features, embedding of c> (Miyato and Koyama 2018, arXiv:1802.05637).
    """

    def __init__(
        self,
        resolution: tuple[int, int] = (28, 28),
        channels: int = 1,
        dropout: float = 0.3,
        c_dim: int = 0,
        condition: str = "concat",
    ) -> None:
        super().__init__()
        self.c_dim = c_dim
        self.concat = condition == "concat"
        widths = [channels * math.prod(resolution) + c_dim * self.concat, 512, 256]
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [DenseLayer(i, o, "lrelu"), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.logit = DenseLayer(widths[-1], 1, "linear")
        projected = c_dim > 0 and not self.concat
        self.embed = DenseLayer(c_dim, widths[-1], "linear") if projected else None

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        x = img.flatten(1)
        if self.concat and c is not None:
            x = torch.cat([x, c], 1)
        x = self.layers(x)  # [N, 256]
        logit = self.logit(x)  # [N, 1]
        if self.embed is not None and c is not None:
            logit = logit + (x * self.embed(c)).sum(1, keepdim=True) / x.shape[1] ** 0.5
        return logit
