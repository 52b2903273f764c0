"""WGAN (Arjovsky et al. 2017, arXiv:1701.07875) and WGAN-GP (Gulrajani et al. 2017,
arXiv:1704.00028): a critic, whose output is a score and not a probability.

The convolutional form are DCGAN's nets, the critic with batch norm (WGAN), layer norm or none
(WGAN-GP, whose penalty is of single images and forbids norms over the batch). The fully connected
form is below. That the critic is Lipschitz is the training's part: `--clip-weights` or
`--gp-weight`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from gankern.models import dcgan, vanilla
from gankern.models.vanilla import DenseLayer


class DenseGenerator(nn.Module):
    """z -> 512 -> 512 -> 512 -> 512 -> image, ReLU between, tanh at the end (WGAN, section 4.2).

    Args:
        z_dim: length of the latent vector.
        resolution: (height, width) of the images, in pixels.
        channels: channels of the images.
        c_dim: length of the condition, which joins z; 0 for none.
    """

    def __init__(
        self,
        z_dim: int = 128,
        resolution: tuple[int, int] = (28, 28),
        channels: int = 1,
        c_dim: int = 0,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.image_shape = (channels, *resolution)
        widths = [z_dim + c_dim, 512, 512, 512, 512]
        self.layers = nn.Sequential(*(DenseLayer(i, o, "relu") for i, o in pairwise(widths)))
        self.image = DenseLayer(widths[-1], math.prod(self.image_shape), "tanh")

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        if c is not None:
            z = torch.cat([z, c], 1)
        return self.image(self.layers(z)).unflatten(1, self.image_shape)  # [N, C, H, W]


def make_generator(
    z_dim: int = 100,
    resolution: tuple[int, int] = (64, 64),
    channels: int = 3,
    c_dim: int = 0,
    form: str = "conv",
    **options: object,
) -> nn.Module:
    """form "fc": `DenseGenerator`; "conv": `dcgan.Generator` with its options."""
    if form == "fc":
        return DenseGenerator(z_dim, resolution, channels, c_dim)
    return dcgan.Generator(z_dim, resolution, channels, c_dim=c_dim, **options)  # type: ignore[arg-type]


def make_critic(
    resolution: tuple[int, int] = (64, 64),
    channels: int = 3,
    c_dim: int = 0,
    form: str = "conv",
    dropout: float = 0.0,
    condition: str = "projection",
    **options: object,
) -> nn.Module:
    """form "fc": `vanilla.Discriminator`, 784-512-256-1 for 28x28 images, whose logit is the score;
    "conv": `dcgan.Discriminator` with its options."""
    if form == "fc":
        return vanilla.Discriminator(resolution, channels, dropout, c_dim, condition)
    options |= {"dropout": dropout, "condition": condition}
    return dcgan.Discriminator(resolution, channels, c_dim=c_dim, **options)  # type: ignore[arg-type]
