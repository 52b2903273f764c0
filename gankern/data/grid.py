"""Images for people: grids of samples, written as PNG."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from gankern.data.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_CAPTION = 14  # pixels below an image


def to_uint8(images: torch.Tensor | np.ndarray) -> np.ndarray:
    """uint8 [N, C, H, W] of floats in [-1, 1] (rounded and clamped) or of uint8 (unchanged)."""
    x = torch.as_tensor(images)
    if x.ndim != 4 or x.shape[1] not in (1, 3, 4):
        raise ValueError(f"to_uint8: images must be [N, 1|3|4, H, W], got {list(x.shape)}")
    x = x.detach().cpu()
    if x.dtype == torch.uint8:
        return x.numpy()
    x = x.to(torch.float32).add(1).mul(127.5).round().nan_to_num(0).clamp(0, 255)
    return x.to(torch.uint8).numpy()


def to_pil(image: torch.Tensor | np.ndarray) -> Image.Image:
    """One image [C, H, W], floats in [-1, 1] or uint8, as a PIL image (L, RGB or RGBA)."""
    from PIL import Image

    pixels = to_uint8(torch.as_tensor(image)[None])[0].transpose(1, 2, 0)  # [H, W, C]
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if len(image) == 1 else pixels))


def make_grid(
    images: torch.Tensor | np.ndarray,
    cols: int | None = None,
    captions: Sequence[str] | None = None,
    gap: int | None = None,
) -> Image.Image:
    """Lays images out in rows, left to right, top to bottom.

    Args:
        images: [N, C, H, W], floats in [-1, 1] or uint8; C is 1, 3 or 4.
        cols: images a row, default the smallest square.
        captions: a short text under each image, default none.
        gap: pixels between images, default none, or 2 with captions.

    Returns:
        A PIL image of mode L, RGB or RGBA.

    Raises:
        ValueError: no images, or of a wrong shape.
    """
    from PIL import Image, ImageDraw

    x = to_uint8(images)
    n, c, h, w = x.shape
    if n == 0:
        raise ValueError("make_grid: images must not be empty")
    cols = max(1, min(n, math.ceil(math.sqrt(n)) if cols is None else cols))
    gap = (2 if captions else 0) if gap is None else gap
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[c]
    cell_h, cell_w = h + gap + (_CAPTION if captions else 0), w + gap
    size = (cols * cell_w - gap, math.ceil(n / cols) * cell_h - gap)
    grid = Image.new(mode, size, "white")
    draw = ImageDraw.Draw(grid)
    for i in range(n):
        row, col = divmod(i, cols)
        corner = (col * cell_w, row * cell_h)
        grid.paste(to_pil(x[i]), corner)
        if captions:
            _caption(draw, (corner[0], corner[1] + h + 1), captions[i], w)
    return grid


def _caption(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int) -> None:
    """Writes as much of the text as fits into the width."""
    while text and draw.textlength(text, font_size=10) > width:
        text = text[:-1]
    draw.text(corner, text, fill="black", font_size=10)


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def save_grid(
    images: torch.Tensor | np.ndarray,
    path: str | os.PathLike[str],
    cols: int | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Writes images as one PNG, whole or not at all; arguments as `make_grid`.

    Raises:
        ValueError: no images, or of a wrong shape.
        OSError: the file cannot be written.
    """
    save_png(make_grid(images, cols, captions), path)
