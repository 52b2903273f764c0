"""`gankern data`: pack images into a data set, and look into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gankern.cli.data_recipes import digits, emoji, glyphs
from gankern.cli.parameters import Colour, Size, print_report, progress_bar


@click.group()
def command() -> None:
    """Pack images into a data set, and look into one."""


command.add_command(digits)
command.add_command(emoji)
command.add_command(glyphs)


@command.command()
@click.argument("src", type=click.Path(readable=False, path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--size", type=Size(), help="Pixels, one number or HxW.  [default: the two below]")
@click.option("--height", type=click.IntRange(1, 8192), help="Pixels.  [default: from --size]")
@click.option("--width", type=click.IntRange(1, 8192), help="Pixels.  [default: from --size]")
@click.option(
    "--crop",
    type=click.Choice(["center", "none"]),
    default="center",
    show_default=True,
    help="Fill the frame and cut what stands out, or fit the whole image into it.",
)
@click.option(
    "--channels",
    type=click.Choice(["rgb", "gray", "rgba"]),
    default="rgb",
    show_default=True,
    help="Colour channels of the packed images.",
)
@click.option(
    "--labels",
    type=click.Choice(["auto", "none", "from-folders", "from-top-folders"]),
    default="auto",
    show_default=True,
    help="Class of an image: its folder, or the topmost one; auto: folders if there are several.",
)
@click.option(
    "--vectors",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="CSV",
    help="Vectors as labels (default: classes): a line for each image, its name in SRC and then"
    " numbers, as a/b.png,0.5,-1.",
)
@click.option(
    "--background",
    type=Colour(),
    default="white",
    show_default=True,
    help="Behind transparent pixels and beside images that do not fill the frame.",
)
@click.option(
    "--resample",
    type=click.Choice(["lanczos", "bicubic", "bilinear", "box", "nearest"]),
    default="lanczos",
    show_default=True,
    help="Filter for resizing (nearest for pixel art).",
)
@click.option(
    "--duplicates",
    type=click.Choice(["keep", "skip"]),
    default="keep",
    show_default=True,
    help="What to do with images that equal an earlier one.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=2,
    show_default=True,
    help="Decoding threads.",
)
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@click.option(
    "--report",
    "report_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the report, with every skipped file, as JSON.  [default: none]",
)
def pack(
    src: Path,
    dst: Path,
    size: tuple[int, int] | None,
    height: int | None,
    width: int | None,
    report_path: Path | None,
    **options: Any,
) -> None:
    """Pack the images of SRC (a folder or a zip, any depth) into the one file DST.

    Images are turned upright, converted and resized; what cannot be read is skipped and
    reported. `gankern train --data DST` trains on the result, and draws its classes or vectors on
    request.
    """
    from gankern.data.decode import Geometry
    from gankern.data.files import atomic_path
    from gankern.data.pack import pack as pack_images

    h, w = _frame(size, height, width)
    shape = {name: options.pop(name) for name in ("crop", "channels", "background", "resample")}
    geometry = Geometry(h, w, **shape)
    with progress_bar(f"packing {src.name}") as bar:
        report = pack_images(src, dst, geometry, progress=bar, **options)
    if report_path is not None:
        with atomic_path(report_path) as temporary:
            temporary.write_text(report.to_json() + "\n", encoding="utf-8")
    print_report(dst, geometry, report, rest=" (--report FILE lists all)")


def _frame(size: tuple[int, int] | None, height: int | None, width: int | None) -> tuple[int, int]:
    if size is not None and (height or width):
        raise click.UsageError("give either --size, or --height and --width")
    if size is not None:
        return size
    if height is None or width is None:
        raise click.UsageError("the size is missing: give --size 64, or --height and --width")
    return height, width


@command.command()
@click.argument("dataset")
@click.option("--verify", is_flag=True, help="Read all pixels and compare the checksum.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info(dataset: str, verify: bool, as_json: bool) -> None:
    """Tell what is in DATASET: a packed file, or `digits`."""
    import numpy as np

    from gankern.data import DataError, open_dataset
    from gankern.data.dataset import checksum

    data = open_dataset(dataset)
    classes: dict[str, int] = {}
    if data.labels is not None and not data.label_dim:
        counts = np.bincount(data.labels, minlength=data.num_classes).tolist()
        classes = dict(zip(data.class_names, counts, strict=True))
    facts: dict[str, Any] = {
        "name": data.name,
        "images": len(data),
        "height": data.resolution[0],
        "width": data.resolution[1],
        "channels": data.channels,
        "dtype": str(data.images.dtype),
        "classes": classes,
        "vectors": data.label_dim,
    }
    if verify:
        if "crc32" not in data.metadata:
            raise DataError(f"{dataset}: has no checksum to verify")
        if f"{checksum(data.images):08x}" != data.metadata["crc32"]:
            raise DataError(f"{dataset}: is damaged: its pixels do not match their checksum")
        facts["verified"] = True
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    for key, value in facts.items():
        if key == "vectors" and value:
            click.echo(f"{key:>9}: of {value} numbers")
        elif key not in ("classes", "vectors"):
            click.echo(f"{key:>9}: {value}")
    click.echo(f"{'classes':>9}: {len(classes)}")
    for name, count in classes.items():
        click.echo(f"{count:>11}  {name}")


@command.command()
@click.argument("dataset")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--number", "-n", type=click.IntRange(1), default=64, show_default=True, help="Images shown."
)
@click.option("--cols", type=click.IntRange(1), help="Images a row.  [default: square]")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random choice."
)
@click.option("--first", is_flag=True, help="The first images instead of random ones.")
@click.option(
    "--class", "wanted", help="Only images of this class, by name or number.  [default: all]"
)
def show(
    dataset: str,
    out: Path,
    number: int,
    cols: int | None,
    seed: int,
    first: bool,
    wanted: str | None,
) -> None:
    """Write a grid of images of DATASET, with their labels, as the PNG file OUT."""
    import numpy as np

    from gankern.data import open_dataset, save_grid

    data = open_dataset(dataset)
    candidates = np.arange(len(data))
    if wanted is not None:
        candidates = np.flatnonzero(data.labels == class_index(data, wanted))
    if not first:
        candidates = np.random.default_rng(seed).permutation(candidates)
    index = np.sort(candidates[:number])
    images, labels = data.batch(index)
    captions = None
    if labels is not None:
        captions = [
            " ".join(f"{number:g}" for number in label)
            if data.label_dim
            else data.class_names[label]
            for label in labels.tolist()
        ]
    save_grid(images, out, cols, captions)
    click.echo(f"{out}: {len(index)} of {len(data)} images")


def class_index(data: Any, wanted: str) -> int:
    """The number of a class given by name or number."""
    if wanted in data.class_names:
        return int(data.class_names.index(wanted))
    if wanted.isdecimal() and int(wanted) < data.num_classes:
        return int(wanted)
    if not data.num_classes:
        raise click.UsageError(f"{data.name} has no classes")
    shown = ", ".join(data.class_names[:10]) + (", ..." if data.num_classes > 10 else "")
    raise click.UsageError(f"{data.name} has no class {wanted!r}; it has {shown}")
