"""`gankern report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page.  [default: RUN/report.html]",
)
@click.option(
    "--grids",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    help="Most sample grids in the page, spread evenly over the run.",
)
def command(run: Path, out: Path | None, grids: int) -> None:
    """Write RUN's report: one HTML page that needs nothing beside it.

    Plots, sample grids under a slider, metrics, alarms, configuration, versions. The address
    report.html#kimg=12 opens the samples of that moment.
    """
    from gankern.data.files import atomic_path
    from gankern.training.report import build_report

    page = build_report(run, grids)
    out = out or run / "report.html"
    with atomic_path(out) as path:
        path.write_text(page, encoding="utf-8")
    click.echo(f"{out}: {len(page.encode()) / 2**20:.1f} MiB")
