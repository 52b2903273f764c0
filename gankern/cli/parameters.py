"""What several commands share: kinds of arguments, the progress bar, the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gankern.data.decode import Geometry
    from gankern.data.pack import Report


class Size(click.ParamType):
    """Pixels: 64, or HxW as in 48x64."""

    name = "N|HxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", str(value))
        if not match or 0 in (height := int(match[1]), width := int(match[2] or match[1])):
            self.fail(f"must be pixels as 64 or 48x64 (height x width), got {value!r}", param, ctx)
        return height, width


class Colour(click.ParamType):
    """A colour by name or as #rrggbb: red, green, blue, 0 to 255."""

    name = "COLOUR"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int, int]:
        from PIL import ImageColor

        try:
            red, green, blue, *_ = ImageColor.getrgb(str(value))
        except ValueError:
            self.fail(f"must be a colour as white or #a0b0c0, got {value!r}", param, ctx)
        return red, green, blue


def usable_device(name: str) -> str:
    """The value of --device; auto is a GPU if there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise click.UsageError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise click.UsageError(f"--device {name}: this machine has no usable GPU")
    return name


def require_classes(c_dim: int, label_dim: int) -> None:
    """Refuses --class for a generator without conditions, or with vectors as conditions."""
    if not c_dim:
        raise click.UsageError("--class: this generator was trained without classes")
    if label_dim:
        raise click.UsageError(
            "--class: this generator was trained with vectors, which seeds draw, not with classes"
        )


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A live bar on the error output: call it with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_report(
    dst: Path, geometry: Geometry, report: Report, shown: int = 20, rest: str = ""
) -> None:
    """Tells what was packed, and what was not.

    Args:
        dst, geometry, report: the data set.
        shown: skipped files to list.
        rest: how to see all of them.
    """
    mebibytes = dst.stat().st_size / 2**20
    click.echo(
        f"{dst}: {report.images} images {geometry.height}x{geometry.width} {geometry.channels},"
        f" {mebibytes:.1f} MiB"
    )
    if report.classes:
        counts = sorted(report.classes.values())
        click.echo(f"  {len(counts)} classes, {counts[0]} to {counts[-1]} images each")
    if report.label_dim:
        click.echo(f"  labels are vectors of {report.label_dim} numbers")
    for note, count in sorted(report.notes.items()):
        click.echo(f"  {count} x {note}")
    if report.duplicates:
        click.echo(f"  {report.duplicates} equal an earlier image")
    if report.skipped:
        reasons = ", ".join(f"{count} {name}" for name, count in report.reasons().most_common())
        click.echo(f"  {len(report.skipped)} files skipped: {reasons}")
        for name, reason in report.skipped[:shown]:
            click.echo(f"    {name}: {reason}")
        if len(report.skipped) > shown:
            click.echo(f"    and {len(report.skipped) - shown} more{rest}")
