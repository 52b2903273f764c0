"""Animations: GIF and WebP by Pillow, MP4 where there is an ffmpeg."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gankern.data.errors import DataError
from gankern.data.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image


def ffmpeg_path() -> str | None:
    """An ffmpeg: that of the package imageio-ffmpeg, else the one on PATH, else None."""
    if importlib.util.find_spec("imageio_ffmpeg") is not None:
        import imageio_ffmpeg  # type: ignore[import-not-found]

        try:
            return str(imageio_ffmpeg.get_ffmpeg_exe())
        except RuntimeError:
            pass  # the package without its program: the one on PATH may serve
    return shutil.which("ffmpeg")


def save_animation(frames: Sequence[Image.Image], path: Path, fps: int = 24) -> None:
    """Writes frames as an endless animation, whole or not at all.

    Args:
        frames: PIL images of one size, mode L or RGB.
        path: *.gif, *.webp or *.mp4.
        fps: frames a second; a GIF counts hundredths of a second, 50 at most.

    Raises:
        DataError: an mp4 without ffmpeg, or another suffix.
        OSError: the file cannot be written.
    """
    kind = path.suffix.lower().lstrip(".")
    if kind == "mp4":
        _save_mp4(frames, path, fps)
    elif kind == "gif":
        duration = max(20, round(100 / fps) * 10)
        _save_pillow(frames, path, "GIF", duration=duration, disposal=1)
    elif kind == "webp":
        _save_pillow(frames, path, "WEBP", duration=round(1000 / fps), lossless=True)
    else:
        raise DataError(f"{path}: an animation must be .gif, .webp or .mp4")


def _save_pillow(frames: Sequence[Image.Image], path: Path, form: str, **options: object) -> None:
    with atomic_path(path) as temporary:
        rest = list(frames[1:])
        frames[0].save(temporary, format=form, save_all=True, append_images=rest, loop=0, **options)


def _save_mp4(frames: Sequence[Image.Image], path: Path, fps: int) -> None:
    ffmpeg = ffmpeg_path()
    if ffmpeg is None:
        raise DataError(f"{path}: mp4 needs ffmpeg: pip install imageio-ffmpeg, or take gif")
    width, height = frames[0].size
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -".split()
    even = "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white"  # yuv420p halves both sides
    target = ["-vf", even, "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4"]
    with atomic_path(path) as temporary:
        run = subprocess.run(
            [ffmpeg, "-y", "-v", "error", *source, *target, str(temporary)],
            input=b"".join(frame.convert("RGB").tobytes() for frame in frames),
            capture_output=True,
            check=False,
        )
        if run.returncode:
            lines = run.stderr.decode(errors="replace").split("\n")
            raise DataError(f"{path}: ffmpeg failed: {lines[0]}")
