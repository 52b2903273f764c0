"""What D sees instead of the images: flips, DiffAugment, and the choice between it and ADA."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gankern.training.ada import GROUPS, Ada
from gankern.training.config import TrainConfig, TrainError


def mirror(img: Tensor) -> Tensor:
    """Flips every image left to right with a probability of one half."""
    flip = torch.rand(img.shape[0], 1, 1, 1, device=img.device) < 0.5
    return torch.where(flip, img.flip(3), img)


def diffaugment(img: Tensor, transforms: Iterable[str]) -> Tensor:
    """DiffAugment (Zhao et al. 2020, arXiv:2006.10738): the same transforms for real and generated.

    Args:
        img: [N, C, H, W] in [-1, 1].
        transforms: of color, translation, cutout; they act in this order.

    Returns:
        [N, C, H, W]; differentiable in img.
    """
    for name in TRANSFORMS:
        if name in transforms:
            img = TRANSFORMS[name](img)
    return img


def color(img: Tensor) -> Tensor:
    """Brightness -0.5 to 0.5, saturation 0 to 2, contrast 0.5 to 1.5, uniform."""
    brightness, saturation, contrast = _uniform(3, img).unbind()  # [N, 1, 1, 1]
    img = img + (brightness - 0.5)
    gray = img.mean(1, keepdim=True)
    img = gray + (img - gray) * (2 * saturation)
    mean = img.mean([1, 2, 3], keepdim=True)
    return mean + (img - mean) * (contrast + 0.5)


def translation(img: Tensor, ratio: float = 0.125) -> Tensor:
    """Shifts by whole pixels, up to an eighth of the image; zeros come in."""
    for axis in (2, 3):
        size = img.shape[axis]
        limit = int(size * ratio + 0.5)
        u = _uniform(1, img)[0].reshape(-1, 1)  # [N, 1]
        source = torch.arange(size, device=img.device) + (u * (2 * limit + 1)).long() - limit
        shape = [img.shape[0], 1, 1, 1]
        shape[axis] = size
        inside = ((source >= 0) & (source < size)).view(shape)
        index = source.clamp(0, size - 1).view(shape).expand_as(img)
        img = img.gather(axis, index) * inside
    return img


def cutout(img: Tensor, ratio: float = 0.5) -> Tensor:
    """Sets a rectangle of half the image's sides, anywhere, to zero."""
    inside = []
    for axis in (2, 3):
        size = img.shape[axis]
        side = int(size * ratio + 0.5)
        centre = (_uniform(1, img)[0].reshape(-1, 1) * (size + 1 - side % 2)).long()
        at = torch.arange(size, device=img.device) - (centre - side // 2)
        inside.append((at >= 0) & (at < side))  # [N, size]
    return img * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


TRANSFORMS = {"color": color, "translation": translation, "cutout": cutout}


def _uniform(count: int, img: Tensor) -> Tensor:
    return torch.rand(count, img.shape[0], 1, 1, 1, device=img.device)


def check_transforms(config: TrainConfig) -> None:
    """TrainError if a transform is unknown."""
    for flag, text, known in (
        ("--diffaugment", config.diffaugment, TRANSFORMS),
        ("--ada-transforms", config.ada_transforms, GROUPS),
    ):
        if any(name not in known for name in text.split(",")):
            raise TrainError(f"{flag} must be of {', '.join(known)}, got {text!r}")


def make_augment(config: TrainConfig, ada: Ada | None) -> Callable[[Tensor], Tensor]:
    """The augmentation of a configuration, of real and generated images alike."""
    if ada is not None:
        return ada
    if config.augment == "diffaugment":
        names = config.diffaugment.split(",")
        return lambda img: diffaugment(img, names)
    return lambda img: img
