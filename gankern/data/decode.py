"""One image file of any kind to pixels of one size, as a person would see it."""

from __future__ import annotations

import functools
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from gankern.data.sources import Unreadable

if TYPE_CHECKING:
    from PIL import Image

MODES = {"gray": "L", "rgb": "RGB", "rgba": "RGBA"}
FILTERS = ("lanczos", "bicubic", "bilinear", "box", "nearest")
MAX_PIXELS = 100_000_000  # an image that says it is larger is not decoded
# EPS would start Ghostscript; formats of vectors, documents and films have no place here.
_FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "ICO", "JPEG2000"]
_FORMATS += ["AVIF", "QOI"]
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


@functools.cache
def _formats() -> list[str]:
    """Those that this build of Pillow can read."""
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


@dataclass(frozen=True)
class Geometry:
    """What every image of a data set is turned into.

    Attributes:
        height, width: pixels.
        crop: "center" (fill the frame, cut what stands out) or "none" (fit into the frame, fill
            the rest with the background).
        channels: "gray", "rgb" or "rgba".
        background: red, green, blue, 0 to 255: what shows through transparent pixels (unless
            channels is "rgba"), and beside a fitted image.
        resample: one of FILTERS.
    """

    height: int
    width: int
    crop: str = "center"
    channels: str = "rgb"
    background: tuple[int, int, int] = (255, 255, 255)
    resample: str = "lanczos"


def decode(file: BinaryIO, geometry: Geometry) -> tuple[np.ndarray, list[str]]:
    """Decodes, turns upright, converts and resizes one image.

    16-bit gray is scaled to 8 bits, palettes are resolved, CMYK goes through its colour profile
    if it has one, EXIF orientation is applied, and of an animation the first frame is taken.

    Args:
        file: the opened image file.
        geometry: what to make of it.

    Returns:
        uint8 [C, H, W], and what a report should mention.

    Raises:
        Unreadable: not an image, truncated, damaged, or larger than MAX_PIXELS.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
            notes = _notes(image)
            side = 2 * max(geometry.height, geometry.width)
            image.draft(None, (side, side))  # lets JPEG decode smaller
            upright = _upright(image)
            return _fit(_colours(upright, geometry), geometry), notes
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unreadable(f"more than {MAX_PIXELS} pixels") from None
    except (OSError, EOFError, SyntaxError, ValueError, IndexError, KeyError) as error:
        raise Unreadable(_reason(error)) from error
    except (TypeError, OverflowError, MemoryError, struct.error, zlib.error) as error:
        raise Unreadable(_reason(error)) from error


def _reason(error: BaseException) -> str:
    text = str(error)
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return "truncated"
    return f"damaged: {text.splitlines()[0] if text else type(error).__name__}"


def _notes(image: Image.Image) -> list[str]:
    notes = []
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        notes.append("animation: first frame taken")
    if image.mode.startswith("I"):
        notes.append("16-bit: scaled to 8 bits")
    if image.mode == "CMYK":
        notes.append("CMYK: converted to RGB")
    return notes


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; an EXIF block that cannot be read is ignored."""
    from PIL import ImageOps

    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's EXIF parser raises a dozen types, and the pixels are already good
        return image


def _colours(image: Image.Image, geometry: Geometry) -> Image.Image:
    """Converts any mode to L, RGB or RGBA, composing transparency onto the background."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in (None, "PNG")):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise Unreadable(f"{'float' if image.mode == 'F' else '32-bit'} pixels of unknown range")
    elif image.mode == "CMYK":
        image = _from_cmyk(image)
    transparent = image.mode in _ALPHA or "transparency" in image.info
    mode = MODES[geometry.channels]
    if not transparent:
        return image.convert(mode)
    image = image.convert("RGBA")
    if mode == "RGBA":
        return image
    backdrop = Image.new("RGBA", image.size, (*geometry.background, 255))
    return Image.alpha_composite(backdrop, image).convert(mode)


def _from_cmyk(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if profile:
        import io

        try:
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(
                image, io.BytesIO(profile), target, outputMode="RGB"
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # a profile that does not fit: the plain formula is better than no image
    return image.convert("RGB")


def _fit(image: Image.Image, geometry: Geometry) -> np.ndarray:
    """Resizes to the frame: uint8 [C, H, W]."""
    from PIL import Image, ImageColor

    height, width = geometry.height, geometry.width
    kind = Image.Resampling[geometry.resample.upper()]
    if geometry.crop == "center":
        scale = min(image.width / width, image.height / height)
        w, h = width * scale, height * scale  # of the part that is kept, in source pixels
        left, top = (image.width - w) / 2, (image.height - h) / 2
        box = (left, top, min(left + w, image.width), min(top + h, image.height))
        if image.size != (width, height):
            image = image.resize((width, height), kind, box=box)
    else:
        scale = min(width / image.width, height / image.height)
        size = (
            min(width, max(1, round(image.width * scale))),
            min(height, max(1, round(image.height * scale))),
        )
        if image.size != size:
            image = image.resize(size, kind)
        if size != (width, height):
            fill = ImageColor.getcolor("rgb({}, {}, {})".format(*geometry.background), image.mode)
            frame = Image.new(image.mode, (width, height), fill)
            frame.paste(image, ((width - size[0]) // 2, (height - size[1]) // 2))
            image = frame
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
