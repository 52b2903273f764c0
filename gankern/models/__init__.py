"""The architectures, and the presets that train them: two tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gankern.models import dcgan, pggan, stylegan, stylegan2, vanilla, wgan
from gankern.models.presets import PRESETS

__all__ = ["GROWING", "MODELS", "PRESETS", "STYLE_BASED", "build"]

Maker = Callable[..., nn.Module]

_CONV_G = {
    "z_dim": "z_dim",
    "width": "width",
    "upsample": "upsample",
    "spectral": "spectral_norm",
    "attention": "attention",
}
_CONV_D = {
    "width": "d_width",
    "norm": "d_norm",
    "dropout": "d_dropout",
    "condition": "d_condition",
    "spectral": "spectral_norm",
    "attention": "attention",
    "minibatch_kernels": "minibatch_kernels",
}
_LEVELS = {"channel_base": "channel_base", "channel_max": "channel_max"}
_STYLES = {"z_dim": "z_dim", "w_dim": "w_dim", "mapping_layers": "mapping_layers"}
_STYLEGAN2_D = {
    "mbstd_group_size": "mbstd_group",
    "mapping_layers": "mapping_layers",
    "d_residual": "d_residual",
}
_LOW = {"num_fp16_res": "num_fp16_res", "low_dtype": "low_dtype"}

# What the generator and the discriminator of each model take from the configuration.
MODELS: dict[str, tuple[Maker, dict[str, str], Maker, dict[str, str]]] = {
    "dcgan": (dcgan.Generator, _CONV_G, dcgan.Discriminator, _CONV_D),
    "pggan": (
        pggan.Generator,
        {"z_dim": "z_dim"} | _LEVELS,
        pggan.Discriminator,
        {"mbstd_group": "mbstd_group"} | _LEVELS,
    ),
    "stylegan": (
        stylegan.Generator,
        _STYLES | _LEVELS,
        stylegan.make_discriminator,
        {"mbstd_group": "mbstd_group"} | _LEVELS,
    ),
    "stylegan2": (
        stylegan2.Generator,
        _STYLES | _LEVELS | _LOW,
        stylegan2.Discriminator,
        _STYLEGAN2_D | _LEVELS | _LOW,
    ),
    "vanilla": (
        vanilla.Generator,
        {"z_dim": "z_dim"},
        vanilla.Discriminator,
        {"dropout": "d_dropout", "condition": "d_condition"},
    ),
    "wgan": (
        wgan.make_generator,
        {"form": "form"} | _CONV_G,
        wgan.make_critic,
        {"form": "form"} | _CONV_D,
    ),
}

# Models with a mapping network from z to styles w, and models whose levels can grow.
STYLE_BASED = ("stylegan", "stylegan2")
GROWING = ("pggan", "stylegan")


def build(config: Any) -> tuple[nn.Module, nn.Module]:
    """Builds the generator and the discriminator of a configuration.

    G has `z_dim` and `c_dim`, and maps z [N, z_dim] and c [N, c_dim] (None if c_dim is 0) to images
    [N, channels, H, W] in [-1, 1]; D maps images and c to logits [N, 1].

    Args:
        config: a TrainConfig; its model, resolution, channels and the model's own fields are read.

    Raises:
        ValueError: the model cannot make images of this size.
    """
    make_g, g_options, make_d, d_options = MODELS[config.model]
    image = {
        "resolution": tuple(config.resolution),
        "channels": config.channels,
        "c_dim": config.c_dim,
    }
    G = make_g(**image, **{name: getattr(config, field) for name, field in g_options.items()})
    D = make_d(**image, **{name: getattr(config, field) for name, field in d_options.items()})
    return G, D
