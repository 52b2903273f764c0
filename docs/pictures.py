"""Draws the pictures of docs/ops.md: what the operations do to an image.

python docs/pictures.py writes docs/ops/*.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from gankern import ops  # noqa: E402
from gankern.ops.bias_act import ACTS  # noqa: E402


def scene(size: int = 64) -> Tensor:
    """A synthetic image [1, 3, size, size] in [0, 1]: sky, sun, hills and a fence."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    sky = torch.stack([0.35 + 0.5 * y, 0.55 + 0.35 * y, 0.95 - 0.15 * y])
    image = sky
    for inside, colour in (
        ((x - 0.7) ** 2 + (y - 0.3) ** 2 < 0.02, (1.0, 0.85, 0.2)),
        (y > 0.62 + 0.1 * torch.sin(7 * x), (0.15, 0.5, 0.25)),
        (y > 0.8 + 0.05 * torch.sin(11 * x + 2), (0.1, 0.35, 0.15)),
        ((y > 0.7) & ((x * size).long() % 8 < 2), (0.55, 0.35, 0.2)),
    ):
        image = torch.where(inside, torch.tensor(colour)[:, None, None], image)
    return image[None]


def save(name: str, panels: dict[str, Tensor], columns: int) -> None:
    """Images [1, 3, H, W] side by side, each at the same size, its pixels as squares."""
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.6 * columns, 1.85 * rows), dpi=100)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, image) in zip(axes.flat, panels.items(), strict=False):
        axis.imshow(image[0].clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
        axis.set_title(title, fontsize=8)
    figure.tight_layout(pad=0.7)
    figure.savefig(DOCS / "ops" / f"{name}.png")


def upfirdn2d() -> None:
    x, f = scene(32), ops.setup_filter([1, 3, 3, 1])
    large = scene(64)
    save(
        "upfirdn2d",
        {
            "x, 32 × 32": x,
            "up 2, no filter, gain 4": ops.upfirdn2d(x, None, up=2, gain=4),
            "upsample2d, [1 3 3 1]": ops.upsample2d(x, f),
            "x, 64 × 64": large,
            "filter2d": ops.filter2d(large, f),
            "down 2, no filter": ops.upfirdn2d(large, None, down=2),
            "downsample2d, [1 3 3 1]": ops.downsample2d(large, f),
            "padding −8: crop": ops.upfirdn2d(large, None, padding=-8),
        },
        4,
    )


def bias_act() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.4), dpi=100)
    x = torch.linspace(-4, 4, 200)
    for axis, names in zip(axes, (list(ACTS)[:5], list(ACTS)[5:]), strict=True):
        for name in names:
            axis.plot(x, ops.bias_act(x[:, None], act=name), label=name, linewidth=1.2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        axis.set_xlabel("x + b", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout(pad=0.7)
    figure.savefig(DOCS / "ops" / "bias_act.png")


def adain() -> None:
    x = scene()
    panels = {"x": x}
    for title, scale, shift in (
        ("scale 0.2, shift 0.5", (0.2, 0.2, 0.2), (0.5, 0.5, 0.5)),
        ("warm", (0.25, 0.2, 0.1), (0.7, 0.45, 0.25)),
        ("cold, inverted", (-0.1, -0.15, -0.25), (0.3, 0.45, 0.65)),
    ):
        styles = (torch.tensor([v]) for v in (scale, shift))
        panels[title] = ops.adain(x, *styles)
    panels["pixel_norm / 2"] = ops.pixel_norm(x) / 2
    save("adain", panels, 5)


def synthesis_layer() -> None:
    """Three channels that are colours, a kernel that mixes and sharpens them, three styles."""
    x, f, noise = scene(32), ops.setup_filter([1, 3, 3, 1]), torch.randn(64, 64)
    sharp = torch.tensor([[0.0, -1, 0], [-1, 5, -1], [0, -1, 0]])
    weight = (torch.eye(3) + 0.15)[:, :, None, None] * sharp

    def layer(styles, **more):
        y = ops.synthesis_layer(x, weight, torch.tensor([styles]), up=2, resample_filter=f,
                                flip_weight=False, act="linear", **more)  # fmt: skip
        return 4 * y

    even, b = (1.0, 1.0, 1.0), torch.tensor([0.05, 0.0, -0.03])
    save(
        "synthesis_layer",
        {
            "x, 32 × 32": x,
            "styles (1, 1, 1)": layer(even),
            "styles (1, ¼, ¼)": layer((1, 0.25, 0.25)),
            "styles (¼, ¼, 1)": layer((0.25, 0.25, 1)),
            "+ noise, bias": layer(even, noise=noise, noise_strength=torch.tensor(0.015), b=b),
        },
        5,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    (DOCS / "ops").mkdir(exist_ok=True)
    for draw in (upfirdn2d, bias_act, adain, synthesis_layer):
        draw()
