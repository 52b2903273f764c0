"""`gankern generate`: images of a trained generator, from seeds."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gankern.cli.parameters import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

_MOST_SEEDS = 1_000_000
_STRIPS = 8  # interpolation strips, of two seeds each
_SIDE = 256  # pixels; smaller animations are enlarged to about this


class Seeds(click.ParamType):
    """Seeds as in 0-63 or 1,5,9-12."""

    name = "SEEDS"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        if isinstance(value, list):
            return value
        seeds: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not match or last < first:
                self.fail(f"must be seeds as 0-63 or 1,5,9-12, got {value!r}", param, ctx)
            if last - first + len(seeds) >= _MOST_SEEDS:
                self.fail(f"must be at most {_MOST_SEEDS} seeds, got {value!r}", param, ctx)
            seeds.extend(range(first, last + 1))
        return seeds


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--seeds", type=Seeds(), default="0-63", show_default=True, help="One image each.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="[RUN/generated]")
@click.option("--grid/--no-grid", default=True, show_default=True, help="All images in one PNG.")
@click.option("--cols", type=click.IntRange(1), help="Images a row of the grid; default square.")
@click.option("--images/--no-images", default=True, show_default=True, help="A PNG each.")
@click.option("--class", "wanted", help="Class by number or name; default one drawn by the seed.")
@click.option(
    "--interpolate", is_flag=True, help="Strips from seed to seed (slerp in z), in a PNG."
)
@click.option("--walk", is_flag=True, help="An animated walk through the seeds and back.")
@click.option(
    "--steps",
    type=click.IntRange(2, 1000),
    help="Images a strip (default 10), frames between two seeds (default 24).",
)
@click.option("--fps", type=click.IntRange(1, 50), default=24, show_default=True)
@click.option("--tiles", type=click.IntRange(1, 16), help="Walks a row and a column; [by seeds]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "mp4", "gif", "webp"]),
    default="auto",
    show_default=True,
    help="Of the walk; auto: mp4 if there is an ffmpeg, else gif.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
def command(
    run: Path,
    seeds: list[int],
    out: Path | None,
    grid: bool,
    cols: int | None,
    images: bool,
    wanted: str | None,
    interpolate: bool,
    walk: bool,
    steps: int | None,
    fps: int,
    tiles: int | None,
    form: str,
    device: str,
    batch: int,
) -> None:
    """Write images of RUN (a run folder or a generator's .safetensors file) from seeds.

    The same seed gives the same image, whatever is generated beside it.
    """
    from gankern.data.grid import save_grid
    from gankern.data.latents import interpolation, render, seed_latents
    from gankern.training import load_generator

    if interpolate and len(seeds) < 2:
        raise click.UsageError("--interpolate needs two seeds or more")
    if walk and len(seeds) < 2 * (tiles or 1) ** 2:
        raise click.UsageError(f"--walk needs {2 * (tiles or 1) ** 2} seeds or more")
    G: Any
    G, config = load_generator(run)
    G = G.to(_device(device))
    classes = _classes(G, config, seeds, wanted)
    z = seed_latents(seeds, G.z_dim)
    out = out or (run if run.is_dir() else run.parent) / "generated"

    if grid or images:
        with progress_bar("images") as bar:
            x = render(G, z, classes, batch, bar)
        if grid:
            save_grid(x, out / "grid.png", cols)
            click.echo(f"{out / 'grid.png'}: seeds {_range(seeds)}")
        if images:
            _save_images(x, seeds, out)

    if interpolate:
        pairs = z[: min(len(z) // 2, _STRIPS) * 2]
        path = interpolation(pairs, steps or 10)  # [P, steps, z_dim]
        c = None if classes is None else classes[: len(pairs) : 2].repeat_interleave(path.shape[1])
        with progress_bar("strips") as bar:
            x = render(G, path.flatten(0, 1), c, batch, bar)
        save_grid(x, out / "interpolation.png", path.shape[1])
        click.echo(
            f"{out / 'interpolation.png'}: {len(path)} strips, seeds {_range(seeds[: len(pairs)])}"
        )

    if walk:
        _walk(G, z, classes, out, tiles, steps or 24, fps, form, batch)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise click.UsageError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise click.UsageError(f"--device {name}: this machine has no usable GPU")
    return name


def _range(seeds: list[int]) -> str:
    if len(seeds) > 1 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds[:8])) + (",..." if len(seeds) > 8 else "")


def _classes(G: Any, config: Any, seeds: list[int], wanted: str | None) -> Tensor | None:
    """The class of each seed, int64 [N]; None for an unconditional generator."""
    import torch

    from gankern.data import DataError, open_dataset
    from gankern.data.latents import seed_classes

    count: int = G.c_dim
    if wanted is None:
        return seed_classes(seeds, count) if count else None
    if not count:
        raise click.UsageError("--class: this generator was trained without classes")
    if not wanted.isdecimal():
        try:
            names = open_dataset(config.data).class_names
        except DataError as error:
            raise click.UsageError(f"--class: give a number; the names are gone: {error}") from None
        if wanted not in names:
            raise click.UsageError(f"--class must be one of {', '.join(names)}, got {wanted}")
        wanted = str(names.index(wanted))
    if int(wanted) >= count:
        raise click.UsageError(f"--class must be in 0..{count - 1}, got {wanted}")
    return torch.full((len(seeds),), int(wanted))


def _save_images(x: Tensor, seeds: list[int], out: Path) -> None:
    from gankern.data.grid import save_png, to_pil

    digits = max(4, len(str(max(seeds))))
    for image, seed in zip(x, seeds, strict=True):
        save_png(to_pil(image), out / f"seed{seed:0{digits}}.png")
    click.echo(f"{out}/seed*.png: {len(seeds)} images")


def _walk(
    G: Any,
    z: Tensor,
    classes: Tensor | None,
    out: Path,
    tiles: int | None,
    steps: int,
    fps: int,
    form: str,
    batch: int,
) -> None:
    """Closed walks side by side: the seeds are dealt out to tiles x tiles of them."""
    import torch
    from PIL import Image

    from gankern.data.grid import make_grid
    from gankern.data.latents import closed_walk, render
    from gankern.data.video import ffmpeg_path, save_animation

    tiles = tiles or max(1, min(4, math.isqrt(len(z) // 2)))
    keys = z[: len(z) // tiles**2 * tiles**2].unflatten(0, (tiles**2, -1))  # [tiles², K, z_dim]
    path = torch.stack([closed_walk(key, steps) for key in keys], 1)  # [frames, tiles², z_dim]
    c = None
    if classes is not None:  # a walk keeps the class of its first seed
        c = classes[: keys.shape[0] * keys.shape[1] : keys.shape[1]].repeat(len(path))
    with progress_bar("frames") as bar:
        x = render(G, path.flatten(0, 1), c, batch, bar)
    frames = [make_grid(frame, tiles) for frame in x.split(tiles**2)]
    scale = max(1, round(_SIDE / max(frames[0].size)))
    size = (frames[0].width * scale, frames[0].height * scale)
    frames = [_opaque(frame).resize(size, Image.Resampling.NEAREST) for frame in frames]
    if form == "auto":
        form = "mp4" if ffmpeg_path() else "gif"
    target = out / f"walk.{form}"
    save_animation(frames, target, fps)
    click.echo(f"{target}: {len(frames)} frames, {tiles * tiles} walks of {keys.shape[1]} seeds")


def _opaque(frame: Any) -> Any:
    """Composes an RGBA frame onto white."""
    from PIL import Image

    if frame.mode != "RGBA":
        return frame
    return Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame).convert("RGB")
