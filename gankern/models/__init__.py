"""The architectures, and the presets that train them: two tables."""

from __future__ import annotations

from typing import Any

from torch import nn

from gankern.models import dcgan, stylegan2, vanilla

# What the generator and the discriminator of each model take from the configuration.
MODELS: dict[str, tuple[type[nn.Module], dict[str, str], type[nn.Module], dict[str, str]]] = {
    "dcgan": (
        dcgan.Generator,
        {"z_dim": "z_dim", "width": "width"},
        dcgan.Discriminator,
        {"width": "d_width", "batch_norm": "d_batch_norm", "dropout": "d_dropout"},
    ),
    "stylegan2": (
        stylegan2.Generator,
        {
            "z_dim": "z_dim",
            "w_dim": "w_dim",
            "mapping_layers": "mapping_layers",
            "channel_base": "channel_base",
            "channel_max": "channel_max",
        },
        stylegan2.Discriminator,
        {"channel_base": "channel_base", "channel_max": "channel_max"},
    ),
    "vanilla": (
        vanilla.Generator,
        {"z_dim": "z_dim"},
        vanilla.Discriminator,
        {"dropout": "d_dropout"},
    ),
}

# Options of `gankern train` that differ from its defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "digits-2min": {"kimg": 24.0, "g_lr": 1e-3, "d_lr": 1e-3},
    "paper": {
        "conditional": False,
        "z_dim": 100,
        "width": 128,
        "d_width": 128,
        "d_dropout": 0.0,
        "batch": 128,
    },
    "vanilla": {"model": "vanilla", "conditional": False, "z_dim": 100, "d_dropout": 0.3},
}


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
