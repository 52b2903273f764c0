"""`gankern generate`: images of a trained generator, from seeds."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gankern.cli.parameters import progress_bar, require_classes, usable_device

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


class SeedPair(click.ParamType):
    """Two lists of seeds, as in 0-4:10-15."""

    name = "ROWS:COLS"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[list[int], list[int]]:
        rows, colon, cols = str(value).partition(":")
        if not colon:
            self.fail(f"must be two lists of seeds as 0-4:10-15, got {value!r}", param, ctx)
        return Seeds().convert(rows, param, ctx), Seeds().convert(cols, param, ctx)


class Terms(click.ParamType):
    """Signed seeds, as in 3-1+2: (seed, sign)."""

    name = "A-B+C"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[tuple[int, int]]:
        if not re.fullmatch(r"\+?\d{1,18}([+-]\d{1,18})+", str(value)):
            self.fail(f"must be signed seeds as 3-1+2, got {value!r}", param, ctx)
        terms = re.findall(r"([+-]?)(\d+)", str(value))
        return [(int(seed), -1 if sign == "-" else 1) for sign, seed in terms]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--seeds", type=Seeds(), default="0-63", show_default=True, help="One image each.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to.  [default: RUN/generated]",
)
@click.option("--grid/--no-grid", default=True, show_default=True, help="All images in one PNG.")
@click.option("--cols", type=click.IntRange(1), help="Images a row of the grid.  [default: square]")
@click.option("--images/--no-images", default=True, show_default=True, help="A PNG each.")
@click.option("--class", "wanted", help="Class by number or name.  [default: by seeds]")
@click.option("--interpolate", is_flag=True, help="Strips from seed to seed, in a PNG.")
@click.option("--walk", is_flag=True, help="An animated walk through the seeds and back.")
@click.option(
    "--steps",
    type=click.IntRange(2, 1000),
    help="Images a strip, frames between two seeds.  [default: 10 a strip, 24 frames]",
)
@click.option(
    "--fps",
    type=click.IntRange(1, 50),
    default=24,
    show_default=True,
    help="Of the walk, frames a second.",
)
@click.option(
    "--tiles", type=click.IntRange(1, 16), help="Walks a row and a column.  [default: by seeds]"
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "mp4", "gif", "webp"]),
    default="auto",
    show_default=True,
    help="Of the walk; auto: mp4 if there is an ffmpeg, else gif.",
)
@click.option(
    "--space",
    type=click.Choice(["z", "w"]),
    default="z",
    show_default=True,
    help="Interpolate and add on the sphere of z (slerp), or straight between styles w (lerp).",
)
@click.option(
    "--psi", type=float, default=1.0, show_default=True, help="Truncation: 0 mean, 1 all."
)
@click.option("--cutoff", type=click.IntRange(0), help="Styles that are truncated.  [default: all]")
@click.option(
    "--mix", type=SeedPair(), help="Style mixing grid of ROWS:COLS, as 0-4:10-15.  [default: none]"
)
@click.option(
    "--mix-styles", type=Seeds(), help="Styles of the columns' seeds.  [default: finer half]"
)
@click.option(
    "--arithmetic",
    type=Terms(),
    help="Signed sum of seeds, as 3-1+2, and its terms.  [default: none]",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, or auto: CUDA if there is.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=16, show_default=True, help="Images at a time."
)
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
    space: str,
    psi: float,
    cutoff: int | None,
    mix: tuple[list[int], list[int]] | None,
    mix_styles: list[int] | None,
    arithmetic: list[tuple[int, int]] | None,
    device: str,
    batch: int,
) -> None:
    """Write images of RUN (a run folder or a generator's .safetensors file) from seeds.

    The same seed gives the same image, whatever is generated beside it.
    """
    from gankern.data.grid import save_grid
    from gankern.data.latents import interpolation, lerp, render, seed_latents, slerp, styles
    from gankern.training import load_generator

    if interpolate and len(seeds) < 2:
        raise click.UsageError("--interpolate needs two seeds or more")
    if walk and len(seeds) < 2 * (tiles or 1) ** 2:
        raise click.UsageError(f"--walk needs {2 * (tiles or 1) ** 2} seeds or more")
    G: Any
    G, config = load_generator(run)
    G = G.to(usable_device(device))
    styled = hasattr(G, "mapping")
    if not styled and (space == "w" or mix or psi != 1 or cutoff is not None):
        raise click.UsageError(
            f"--space w, --mix, --psi and --cutoff need styles, which {config.model} has not"
        )
    classes = _conditions(G, config, seeds, wanted)
    z = seed_latents(seeds, G.z_dim)
    if styled and (psi != 1 or space == "w"):
        z = styles(G, z, classes, psi, cutoff)  # [N, num_ws, w_dim]
    curve = lerp if z.ndim == 3 else slerp
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
        path = interpolation(pairs, steps or 10, curve)  # [P, steps, ...]
        c = None
        if classes is not None:  # a strip keeps the class or vector of its first seed
            c = classes[: len(pairs) : 2].repeat_interleave(path.shape[1], 0)
        with progress_bar("strips") as bar:
            x = render(G, path.flatten(0, 1), c, batch, bar)
        save_grid(x, out / "interpolation.png", path.shape[1])
        click.echo(
            f"{out / 'interpolation.png'}: {len(path)} strips, seeds {_range(seeds[: len(pairs)])}"
        )

    if walk:
        _walk(G, z, classes, out, tiles, steps or 24, fps, form, batch)

    if mix:
        _mixing(G, config, mix, mix_styles, wanted, psi, cutoff, out, batch)

    if arithmetic:
        _arithmetic(G, config, arithmetic, wanted, space, psi, cutoff, out, batch)


def _range(seeds: list[int]) -> str:
    if len(seeds) > 1 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds[:8])) + (",..." if len(seeds) > 8 else "")


def _conditions(G: Any, config: Any, seeds: list[int], wanted: str | None) -> Tensor | None:
    """The class int64 [N] or vector float32 [N, c_dim] of each seed; None without conditions."""
    import torch

    from gankern.data import DataError, open_dataset
    from gankern.data.latents import seed_classes
    from gankern.training.load import seed_vectors

    count: int = G.c_dim
    if wanted is None and not count:
        return None
    if wanted is None:
        return seed_vectors(config, seeds) if config.label_dim else seed_classes(seeds, count)
    require_classes(count, config.label_dim)
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
    from gankern.data.latents import closed_walk, lerp, render, slerp
    from gankern.data.video import ffmpeg_path, save_animation

    tiles = tiles or max(1, min(4, math.isqrt(len(z) // 2)))
    keys = z[: len(z) // tiles**2 * tiles**2].unflatten(0, (tiles**2, -1))  # [tiles², K, ...]
    curve = lerp if z.ndim == 3 else slerp
    path = torch.stack([closed_walk(key, steps, curve) for key in keys], 1)  # [frames, tiles², ...]
    c = None
    if classes is not None:  # a walk keeps the class or vector of its first seed
        c = torch.cat([classes[: keys.shape[0] * keys.shape[1] : keys.shape[1]]] * len(path))
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


def _mixing(
    G: Any,
    config: Any,
    seeds: tuple[list[int], list[int]],
    layers: list[int] | None,
    wanted: str | None,
    psi: float,
    cutoff: int | None,
    out: Path,
    batch: int,
) -> None:
    """mixing.png: the sources along the edges, row r and column c mixed at (r, c)."""
    import torch

    from gankern.data.grid import save_grid
    from gankern.data.latents import mix_layers, render, seed_latents, styles

    layers = list(range(G.num_ws // 2, G.num_ws)) if layers is None else layers
    if max(layers) >= G.num_ws:
        raise click.UsageError(f"--mix-styles must be in 0..{G.num_ws - 1}, got {max(layers)}")
    rows, cols = (
        styles(G, seed_latents(s, G.z_dim), _conditions(G, config, s, wanted), psi, cutoff)
        for s in seeds
    )
    mixed = mix_layers(rows, cols, layers)  # [R, C, num_ws, w_dim]
    with progress_bar("mixing") as bar:
        x = render(G, torch.cat([cols, rows, mixed.flatten(0, 1)]), None, batch, bar)
    top, left, inner = x.split([len(cols), len(rows), len(rows) * len(cols)])
    grid = [torch.cat([torch.ones_like(top[:1]), top])]
    grid += [torch.cat([a[None], b]) for a, b in zip(left, inner.split(len(cols)), strict=True)]
    save_grid(torch.cat(grid), out / "mixing.png", len(cols) + 1)
    click.echo(f"{out / 'mixing.png'}: rows {_range(seeds[0])}, columns {_range(seeds[1])}")


def _arithmetic(
    G: Any,
    config: Any,
    terms: list[tuple[int, int]],
    wanted: str | None,
    space: str,
    psi: float,
    cutoff: int | None,
    out: Path,
    batch: int,
) -> None:
    """arithmetic.png: the images of the terms, and of their signed sum."""
    import torch

    from gankern.data.grid import save_grid
    from gankern.data.latents import arithmetic, render, seed_latents, styles

    seeds, signs = [seed for seed, _ in terms], [sign for _, sign in terms]
    classes = _conditions(G, config, seeds, wanted)
    z = seed_latents(seeds, G.z_dim)
    if hasattr(G, "mapping") and (space == "w" or psi != 1):
        z = styles(G, z, classes, psi, cutoff)
    z = torch.cat([z, arithmetic(z, signs)[None]])
    c = None if classes is None else torch.cat([classes, classes[:1]])
    x = render(G, z, c, batch)
    captions = [f"{'-' if sign < 0 else '+'}{seed}" for seed, sign in terms]
    save_grid(x, out / "arithmetic.png", len(x), [*captions, "sum"])
    click.echo(f"{out / 'arithmetic.png'}: {' '.join(captions)} in {'w' if z.ndim == 3 else 'z'}")


def _opaque(frame: Any) -> Any:
    """Composes an RGBA frame onto white."""
    from PIL import Image

    if frame.mode != "RGBA":
        return frame
    return Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame).convert("RGB")
