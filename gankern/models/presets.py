"""Presets: options of `gankern train` that differ from its defaults, by name."""

from __future__ import annotations

from typing import Any

Options = dict[str, Any]

# WGAN-GP's Adam, and what progressive GAN and the StyleGANs share with it.
_CRITIC: Options = {"loss": "wasserstein", "beta1": 0.0, "beta2": 0.9, "d_dropout": 0.0}
_STYLE: Options = {
    "beta1": 0.0,
    "beta2": 0.99,
    "d_dropout": 0.0,
    "style_mixing": 0.9,
    "z_dim": 512,
}

# Three levels of 48, 48 and 24 channels: 7x7, 14x14, 28x28.
_SMALL: Options = {"channel_base": 384, "channel_max": 48, "z_dim": 64, "mbstd_group": 4}

# StyleGAN2-ADA, table of hyperparameters by resolution: config F at 1024, halves below.
_PAPER_STYLEGAN2: Options = _STYLE | {
    "model": "stylegan2",
    "r1_gamma": 10.0,
    "d_reg_interval": 16,
    "pl_weight": 2.0,
    "g_lr": 2e-3,
    "d_lr": 2e-3,
    "batch": 32,
    "ema_kimg": 10.0,
    "ema_rampup": 0.0,
    "kimg": 25000.0,
    "channel_base": 32768,
    "mirror": True,
}

PRESETS: dict[str, Options] = {
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
    # Digits on one core in minutes.
    "vanilla": {
        "model": "vanilla",
        "conditional": False,
        "z_dim": 100,
        "d_dropout": 0.3,
        "batch": 64,
        "g_lr": 4e-4,
        "d_lr": 4e-4,
        "kimg": 120.0,
        "tick_kimg": 2.0,
    },
    "cgan": {"d_condition": "concat", "kimg": 40.0, "g_lr": 1e-3, "d_lr": 1e-3},
    "cgan-fc": {
        "model": "vanilla",
        "conditional": True,
        "d_condition": "concat",
        "z_dim": 64,
        "d_dropout": 0.3,
        "batch": 64,
        "g_lr": 4e-4,
        "d_lr": 4e-4,
        "kimg": 200.0,
        "tick_kimg": 2.0,
    },
    "dcgan": {"kimg": 16.0, "g_lr": 1e-3, "d_lr": 1e-3},
    "wgan": {
        "model": "wgan",
        "form": "fc",
        "conditional": False,
        "d_dropout": 0.0,
        "loss": "wasserstein",
        "clip_weights": 0.01,
        "n_critic": 5,
        "g_optimizer": "rmsprop",
        "d_optimizer": "rmsprop",
        "g_lr": 5e-4,
        "d_lr": 5e-4,
        "z_dim": 64,
        "batch": 64,
        "kimg": 1200.0,
        "tick_kimg": 16.0,
    },
    "wgan-gp": _CRITIC
    | {
        "model": "wgan",
        "d_norm": "none",
        "gp_weight": 10.0,
        "n_critic": 3,
        "batch": 32,
        "g_lr": 5e-4,
        "d_lr": 5e-4,
        "kimg": 24.0,
    },
    "sagan": {
        "width": 32,
        "spectral_norm": "both",
        "attention": 14,
        "minibatch_kernels": 16,
        "upsample": "bilinear",
        "d_norm": "none",
        "loss": "hinge",
        "beta1": 0.0,
        "beta2": 0.9,
        "g_lr": 2e-4,
        "d_lr": 8e-4,
        "batch": 32,
        "kimg": 24.0,
    },
    "pggan": _CRITIC
    | _SMALL
    | {
        "model": "pggan",
        "beta2": 0.99,
        "gp_weight": 10.0,
        "drift": 1e-3,
        "g_lr": 2e-3,
        "d_lr": 2e-3,
        "fade_kimg": 2.0,
        "stable_kimg": 2.0,
        "sample_ticks": 2,
        "kimg": 14.0,
    },
    # With the loss of progressive GAN, as StyleGAN on CelebA-HQ: it needs fewer images than R1.
    "stylegan": _STYLE
    | _CRITIC
    | _SMALL
    | {
        "model": "stylegan",
        "beta2": 0.99,
        "style_mixing": 0.5,
        "w_dim": 64,
        "mapping_layers": 2,
        "gp_weight": 10.0,
        "drift": 1e-3,
        "g_lr": 2e-3,
        "d_lr": 2e-3,
        "fade_kimg": 1.0,
        "stable_kimg": 1.0,
        "sample_ticks": 1,
        "kimg": 24.0,
    },
    "stylegan2": _STYLE
    | _CRITIC
    | _SMALL
    | {
        "model": "stylegan2",
        "beta2": 0.99,
        "style_mixing": 0.5,
        "w_dim": 64,
        "mapping_layers": 2,
        "gp_weight": 10.0,
        "drift": 1e-3,
        "pl_weight": 2.0,
        "g_reg_interval": 8,
        "g_lr": 2e-3,
        "d_lr": 2e-3,
        "sample_ticks": 2,
        "kimg": 28.0,
    },
    # The papers' own, for GPUs.
    "pggan-1024": _CRITIC
    | {
        "model": "pggan",
        "z_dim": 512,
        "beta2": 0.99,
        "gp_weight": 10.0,
        "drift": 1e-3,
        "g_lr": 1e-3,
        "d_lr": 1e-3,
        "fade_kimg": 800.0,
        "stable_kimg": 800.0,
        "level_batch": "4:16,256:14,512:6,1024:3",
        "kimg": 15000.0,
    },
    "stylegan-1024": _STYLE
    | {
        "model": "stylegan",
        "r1_gamma": 10.0,
        "g_lr": 1e-3,
        "d_lr": 1e-3,
        "grow_from": 8,
        "fade_kimg": 600.0,
        "stable_kimg": 600.0,
        "level_batch": "8:256,16:128,32:64,64:32",
        "level_lr": "128:1.5e-3,256:2e-3,512:3e-3,1024:3e-3",
        "ema_kimg": 10.0,
        "mirror": True,
        "kimg": 25000.0,
    },
    "stylegan2-f": _PAPER_STYLEGAN2,
    "stylegan2-e": _PAPER_STYLEGAN2 | {"channel_base": 16384},
    "stylegan2-256": _PAPER_STYLEGAN2
    | {
        "channel_base": 16384,
        "batch": 64,
        "mbstd_group": 8,
        "g_lr": 2.5e-3,
        "d_lr": 2.5e-3,
        "r1_gamma": 1.0,
        "ema_kimg": 20.0,
        "num_fp16_res": 4,
        "augment": "ada",
    },
    "stylegan2-512": _PAPER_STYLEGAN2
    | {
        "batch": 64,
        "mbstd_group": 8,
        "g_lr": 2.5e-3,
        "d_lr": 2.5e-3,
        "r1_gamma": 0.5,
        "ema_kimg": 20.0,
        "num_fp16_res": 4,
        "augment": "ada",
    },
    "stylegan2-1024": _PAPER_STYLEGAN2 | {"r1_gamma": 2.0, "num_fp16_res": 4, "augment": "ada"},
    "stylegan2-cifar": _PAPER_STYLEGAN2
    | {
        "batch": 64,
        "mbstd_group": 32,
        "d_residual": False,
        "mapping_layers": 2,
        "g_lr": 2.5e-3,
        "d_lr": 2.5e-3,
        "r1_gamma": 0.01,
        "ema_kimg": 500.0,
        "ema_rampup": 0.05,
        "pl_weight": 0.0,
        "style_mixing": 0.0,
        "kimg": 100000.0,
        "augment": "ada",
    },
}
