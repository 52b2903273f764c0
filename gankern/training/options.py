"""The options of `gankern train`, in groups: fields of one flat configuration, nothing else.

`TrainConfig` inherits them all. Each has a default, a line of help, and limits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gankern.models import MODELS
from gankern.training.losses import LOSSES

KIMG = "thousand images"


def option(
    default: Any,
    group: str,
    help: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field that is also a command-line option."""
    metadata: dict[str, Any] = {"group": group, "help": help, "unit": unit, "choices": choices}
    metadata |= {"at_least": at_least, "at_most": at_most}
    return field(default=default, metadata=metadata)


def network(default: Any, help: str, **limits: Any) -> Any:
    """An option of the networks."""
    return option(default, "Networks", help, **limits)


def training(default: Any, help: str, **limits: Any) -> Any:
    """An option of optimisation."""
    return option(default, "Training", help, **limits)


def penalty(default: Any, help: str, **limits: Any) -> Any:
    """An option of regularisation; weights and steps are at least 0."""
    return option(default, "Regularisation", help, **{"at_least": 0} | limits)


def growth(default: Any, help: str, **limits: Any) -> Any:
    """An option of progressive growing."""
    return option(default, "Growth (pggan, stylegan)", help, **limits)


def augmentation(default: Any, help: str, **limits: Any) -> Any:
    """An option of augmentation."""
    return option(default, "Augmentation", help, **limits)


def speed(default: Any, help: str, **limits: Any) -> Any:
    """An option of how the same computation is carried out."""
    return option(default, "Precision and speed", help, **limits)


@dataclass
class NetworkOptions:
    """What G and D are."""

    model: str = network("dcgan", "Architecture.", choices=tuple(MODELS))
    conditional: bool = network(
        True, "Draw the classes (or vectors) of the data set on request, if it has labels."
    )
    z_dim: int = network(32, "Length of the latent vector.", unit="numbers", at_least=1)
    width: int = network(
        64, "Conv nets: channels of G nearest to the image.", unit="channels", at_least=1
    )
    d_width: int = network(
        32, "Conv nets: channels of D nearest to the image.", unit="channels", at_least=1
    )
    form: str = network(
        "conv", "wgan: convolutional or fully connected nets.", choices=("conv", "fc")
    )
    upsample: str = network(
        "transposed",
        "dcgan, wgan: G's transposed convolutions, or bilinear upsampling and convolutions.",
        choices=("transposed", "bilinear"),
    )
    d_norm: str = network(
        "batch", "dcgan, wgan: normalisation in D.", choices=("batch", "layer", "none")
    )
    d_condition: str = network(
        "projection",
        "dcgan, vanilla, wgan: how D sees the condition.",
        choices=("projection", "concat"),
    )
    spectral_norm: str = network(
        "none", "dcgan, wgan: weights divided by their norm.", choices=("none", "d", "both")
    )
    attention: int = network(
        0, "dcgan, wgan: self-attention at grids of this shorter side; 0: none.", unit="pixels",
        at_least=0,
    )  # fmt: skip
    minibatch_kernels: int = network(
        0, "dcgan, wgan: kernels of minibatch discrimination in D; 0: none.", unit="kernels",
        at_least=0,
    )  # fmt: skip
    d_dropout: float = network(
        0.1, "Share of D's activations set to zero.", at_least=0, at_most=0.99
    )
    w_dim: int = network(512, "StyleGANs: length of the style vector.", unit="numbers", at_least=1)
    mapping_layers: int = network(
        8, "StyleGANs: layers from z to w; StyleGAN2: of D for labels, too.", unit="layers",
        at_least=1,
    )  # fmt: skip
    channel_base: int = network(
        16384, "pggan, StyleGANs: channels of a level times its side.", unit="channels x pixels",
        at_least=1,
    )  # fmt: skip
    channel_max: int = network(
        512, "pggan, StyleGANs: most channels of a level.", unit="channels", at_least=1
    )
    mbstd_group: int = network(
        4, "pggan, StyleGANs: images whose deviation D sees.", unit="images", at_least=1
    )
    d_residual: bool = network(True, "stylegan2: D's levels have skips.")


@dataclass
class TrainingOptions:
    """Loss, optimisers, schedules."""

    kimg: float = training(100.0, "Length: real images shown to D.", unit=KIMG, at_least=0.001)
    batch: int = training(
        16, "Images a step of D, over all processes together.", unit="images", at_least=1
    )
    batch_gpu: int = training(
        0, "Images a process handles at once, the rest accumulated; 0: its share of the batch.",
        unit="images", at_least=0,
    )  # fmt: skip
    batch_schedule: str = training(
        "", "Batch from a count of images on, as 0:16,50:32, in images by kimg."
    )
    n_critic: int = training(1, "Steps of D for one of G.", unit="steps", at_least=1)
    loss: str = training("nonsaturating", "Loss of both networks.", choices=tuple(LOSSES))
    label_smoothing: float = training(
        0.0, "D aims at 1 minus this on real images.", at_least=0, at_most=0.5
    )
    g_optimizer: str = training("adam", "Optimizer of G.", choices=("adam", "rmsprop"))
    d_optimizer: str = training("adam", "Optimizer of D.", choices=("adam", "rmsprop"))
    g_lr: float = training(2e-4, "Learning rate of G.", at_least=0)
    d_lr: float = training(2e-4, "Learning rate of D.", at_least=0)
    beta1: float = training(0.5, "Adam: decay of the mean.", at_least=0, at_most=0.9999)
    beta2: float = training(0.999, "Adam: decay of the mean square.", at_least=0, at_most=0.99999)
    lr_rampup_kimg: float = training(
        0.0, "Learning rates rise linearly from 0 over the first images.", unit=KIMG, at_least=0
    )
    lr_rampdown_kimg: float = training(
        0.0, "Learning rates fall linearly to 0 over the last images.", unit=KIMG, at_least=0
    )
    clip_grad: float = training(
        0.0, "Largest norm of a network's gradient; 0: not clipped.", at_least=0
    )
    ema_kimg: float = training(5.0, "Half-life of G's moving average.", unit=KIMG, at_least=0)
    ema_rampup: float = training(
        0.05, "That half-life is at most this share of the images so far; 0: no limit.", at_least=0
    )
    seed: int = training(0, "Seed of weights, noise and the order of images.", at_least=0)
    device: str = training("auto", "'cpu', 'cuda', 'cuda:1', or 'auto': CUDA if there is.")


@dataclass
class PenaltyOptions:
    """Regularisers of D and G."""

    r1_gamma: float = penalty(0.0, "Weight of R1, D's gradient at real images.")
    r2_gamma: float = penalty(0.0, "Weight of R2, D's gradient at generated images.")
    gp_weight: float = penalty(
        0.0, "Weight of WGAN-GP's gradient penalty; dcgan, wgan: with --d-norm layer or none."
    )
    gp_target: float = penalty(1.0, "Norm that it pulls D's gradient to.", at_least=1e-6)
    drift: float = penalty(
        0.0, "Weight of D's squared logits of real images; at every step, as it costs no pass."
    )
    d_reg_interval: int = penalty(
        1, "R1, R2 and gradient penalty every so often, times as strong.", unit="steps", at_least=1
    )
    clip_weights: float = penalty(0.0, "Largest magnitude of D's weights; 0: not clipped.")
    pl_weight: float = penalty(0.0, "StyleGANs: weight of path length.")
    pl_decay: float = penalty(0.01, "Share of a new batch in the mean path length.", at_most=1)
    pl_batch_shrink: int = penalty(
        2, "Path length of one image in so many.", unit="images", at_least=1
    )
    g_reg_interval: int = penalty(
        4, "Path length every so often, times as strong.", unit="steps", at_least=1
    )
    style_mixing: float = penalty(
        0.0, "StyleGANs: probability of two latents in one image.", at_most=1
    )


@dataclass
class GrowthOptions:
    """Progressive growing."""

    fade_kimg: float = growth(
        0.0, "Images while a level fades in; 0 with --stable-kimg 0: no growing.", unit=KIMG,
        at_least=0,
    )  # fmt: skip
    stable_kimg: float = growth(
        0.0, "Images before the next level fades in.", unit=KIMG, at_least=0
    )
    grow_from: int = growth(4, "Shorter side of the first images.", unit="pixels", at_least=4)
    level_batch: str = growth("", "Batch by shorter side, as 4:64,32:16; else --batch.")
    level_lr: str = growth(
        "", "Both learning rates by shorter side, as 128:1.5e-3; else --g-lr, --d-lr."
    )


@dataclass
class AugmentOptions:
    """What D sees instead of the images."""

    mirror: bool = augmentation(False, "Flip real images left to right, every second one.")
    augment: str = augmentation(
        "none", "What D sees: images, DiffAugment, ADA.", choices=("none", "diffaugment", "ada")
    )
    diffaugment: str = augmentation(
        "color,translation,cutout", "DiffAugment's transforms, of color, translation, cutout."
    )
    ada_transforms: str = augmentation(
        "blit,geometry,color", "ADA's, of blit, geometry, color, filter, noise, cutout."
    )
    ada_target: float = augmentation(
        0.6, "Sign of D's logits of real images that p is driven to; 0: p stays.", at_least=0,
        at_most=1,
    )  # fmt: skip
    ada_p: float = augmentation(
        0.0, "Probability of each of ADA's transforms at the start.", at_least=0, at_most=1
    )
    ada_kimg: float = augmentation(
        500.0, "Images in which p can go from 0 to 1.", unit=KIMG, at_least=0.001
    )
    ada_interval: int = augmentation(4, "p is moved every so often.", unit="steps", at_least=1)


@dataclass
class SpeedOptions:
    """Number formats, memory formats, compilation."""

    precision: str = speed(
        "fp32",
        "Of the forward passes: fp32; bf16; fp16 with scaled losses. Penalties: fp32, but for"
        " --num-fp16-res.",
        choices=("fp32", "bf16", "fp16"),
    )
    num_fp16_res: int = speed(
        0, "stylegan2: levels in 16 bits, clamped, instead of --precision for all.", unit="levels",
        at_least=0,
    )  # fmt: skip
    channels_last: bool = speed(False, "Channels innermost in memory.")
    compile: bool = speed(False, "torch.compile of G and D; penalties run uncompiled.")
    cuda_graphs: bool = speed(False, "Replay captured CUDA graphs of the plain steps.")


@dataclass
class HealthOptions:
    """Alarms, held-out images, metrics while training."""

    on_alarm: str = option(
        "warn",
        "Health and quality",
        "On a severe alarm: go on, stop, or go back to the last healthy checkpoint with another"
        " seed and half the learning rates.",
        choices=("warn", "stop", "rollback"),
    )
    max_rollbacks: int = option(
        3, "Health and quality", "Rollbacks after which an alarm stops the run.",
        unit="rollbacks", at_least=0,
    )  # fmt: skip
    held_out: int = option(
        0,
        "Health and quality",
        "Images that are not trained on, by which an overfitting D is seen.",
        unit="images",
        at_least=0,
    )
    metrics_ticks: int = option(
        0, "Health and quality", "Measure quality every so often; 0: never.", unit="ticks",
        at_least=0,
    )  # fmt: skip
    metrics_images: int = option(
        1000, "Health and quality", "Generated and at most as many real images that are compared.",
        unit="images", at_least=8,
    )  # fmt: skip
    metrics_full: bool = option(
        False, "Health and quality",
        "All of `gankern metrics --paths`: also FID ∞, each class, path lengths, smoothness.",
    )  # fmt: skip
    metrics_extractor: str = option(
        "efficientnet-lite0",
        "Health and quality",
        "Network of the features, as in `gankern metrics --extractor`.",
    )


@dataclass
class RunOptions:
    """The run folder."""

    out: str = option("runs", "Run folder", "Folder in which the run gets its own numbered folder.")
    tick_kimg: float = option(
        1.0, "Run folder", "A line of statistics every so often.", unit=KIMG, at_least=0.001
    )
    sample_ticks: int = option(
        10, "Run folder", "A grid of samples every so often.", unit="ticks", at_least=1
    )
    checkpoint_ticks: int = option(
        10, "Run folder", "A checkpoint every so often; the last two are kept.", unit="ticks",
        at_least=1,
    )  # fmt: skip
    grid: int = option(10, "Run folder", "Samples a row and a column.", unit="images", at_least=1)
