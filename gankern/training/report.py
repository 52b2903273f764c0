"""The report of a run: one HTML page that needs nothing beside it.

Plots are inline SVG, sample grids are embedded PNG under a slider, and a content security policy
in the page forbids it to load anything.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gankern import __version__
from gankern.training.config import TrainConfig
from gankern.training.run import read_config, read_stats

GRIDS = 60  # most that a page holds
SIDE = 1024  # pixels; larger grids are made smaller


class Plot(NamedTuple):
    """Curves that share an axis.

    Attributes:
        title: above it.
        names: fields of stats.jsonl; those that a run lacks are left out.
        log: whether the axis is logarithmic.
    """

    title: str
    names: Sequence[str]
    log: bool = False


PLOTS = (
    Plot("Loss", ("loss_D", "loss_G")),
    Plot("D's mean logit", ("logit_real", "logit_fake")),
    Plot("D in evaluation mode", ("judged_train", "judged_held", "judged_fake")),
    Plot("D's decisions", ("acc_D", "r_t")),
    Plot("Variety of samples, real images = 1", ("diversity", "spread", "modes_seen")),
    Plot("Penalties", ("r1", "r2", "gp", "drift", "path_length"), log=True),
    Plot("Mean path length", ("pl_mean",)),
    Plot("Gradient norms", ("grad_norm_D", "grad_norm_G"), log=True),
    Plot("Steps left out", ("skipped_D", "skipped_G")),
    Plot("Steps with a loss of NaN or infinity", ("nan_loss_D", "nan_loss_G")),
    Plot("Loss scale", ("scale_D", "scale_G"), log=True),
    Plot("Weight norms", ("weight_norm_D", "weight_norm_G")),
    Plot("Learning rates", ("lr_D", "lr_G"), log=True),
    Plot("Augmentation: p", ("ada_p",)),
    Plot("Growth", ("growth",)),
    Plot("Images/s", ("img_per_s",)),
    Plot("Seconds per thousand images", ("sec_per_kimg",)),
    Plot("Peak memory, MiB", ("peak_mib",)),
)


def build_report(run: Path, most: int = GRIDS) -> str:
    """The page of a run folder, as HTML.

    Args:
        run: the run folder.
        most: sample grids in the page, spread evenly over the run.

    Raises:
        TrainError: not a run folder.
    """
    config = read_config(run)
    rows = read_stats(run) if (run / "stats.jsonl").exists() else []
    title = html.escape(run.name)
    body = [
        f"<h1>{title}</h1>",
        summary(config, rows),
        alarm_section(config, rows),
        grid_section(run, most),
        metric_section(rows),
        "<section><h2>Training</h2><div class=plots>",
        *(svg for plot in PLOTS if (svg := draw(plot, rows))),
        "</div></section>",
        table_section("Configuration", json.loads(config.to_json())),
        table_section("Versions", versions(run)),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src"
    return (
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy} \'unsafe-inline\'">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style><script>{WATCH}</script></head><body>"
        + "\n".join(body)
        + f"<script>{SCRIPT}</script></body></html>\n"
    )


def summary(config: TrainConfig, rows: list[dict[str, Any]]) -> str:
    """One line: what was trained, how far, how fast."""
    if not rows:
        return "<p>No statistics yet.</p>"
    last = rows[-1]
    height, width = config.resolution
    text = (
        f"{config.model} on {config.data}, {height}×{width}; {last['kimg']:g} of {config.kimg:g}"
        f" thousand images in {last['time_s'] / 60:.1f} minutes, {last['img_per_s']:g} images/s"
    )
    return f"<p>{html.escape(text)}</p>"


def alarm_section(config: TrainConfig, rows: list[dict[str, Any]]) -> str:
    """All alarms, and the times the run went back."""
    items = [
        f"<li><b>{html.escape(alarm['kind'])}</b>, {alarm['kimg']:g} kimg (since"
        f" {alarm['since']:g}): {html.escape(alarm['seen'])}. Usually done:"
        f" {html.escape(alarm['cure'])}.</li>"
        for row in rows
        for alarm in row.get("alarms", [])
    ]
    items += [
        f"<li><b>rolled back</b> from {note['from_kimg']:g} to {note['to_kimg']:g} kimg:"
        f" {html.escape(note['alarm']['kind'])}: {html.escape(note['alarm']['seen'])}</li>"
        for note in config.rollbacks
    ]
    found = f"<ul class=alarms>{''.join(items)}</ul>" if items else "<p>None.</p>"
    return f"<section id=alarms><h2>Alarms</h2>{found}</section>"


def grid_section(run: Path, most: int) -> str:
    """The sample grids under a slider; the address page.html#kimg=12 opens one."""
    files = sorted((run / "samples").glob("[0-9]*.png"))
    if not files:
        return ""
    if len(files) > most:
        step = (len(files) - 1) / max(most - 1, 1)
        files = [files[round(i * step)] for i in range(most)]
    grids = [{"kimg": int(file.stem) / 1000, "src": picture(file)} for file in files]
    data = json.dumps(grids).replace("<", "\\u003c")
    last = len(grids) - 1
    return (
        "<section id=samples><h2>Samples</h2>"
        f"<label><input id=slider type=range min=0 max={last} value={last} step=1"
        ' aria-label="Samples over time"> <output id=when></output></label>'
        '<p><img id=grid alt="Grid of samples"></p>'
        f"<script type=application/json id=grids>{data}</script></section>"
    )


def picture(file: Path) -> str:
    """A PNG as a data address, at most SIDE pixels wide."""
    from PIL import Image

    data = file.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) > SIDE:
            image.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            image.save(buffer, format="PNG", optimize=True)
            data = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def metric_section(rows: list[dict[str, Any]]) -> str:
    """Quality over time, if it was measured: tables of the last figures, and plots."""
    measured = [{"kimg": row["kimg"]} | row["metrics"] for row in rows if row.get("metrics")]
    if not measured:
        return ""
    last, counts = measured[-1], ("generated images", "real images")
    apart = ("kimg", "classes", *counts)
    names = [name for name in last if name not in apart and not name.endswith(" error")]
    title = f"Quality at {last['kimg']:g} kimg"
    if all(name in last for name in counts):
        title += ", " + " and ".join(f"{last[name]:,} {name}" for name in counts)
    shown = {
        name: show(last[name])
        + (f" ± {last[f'{name} error']:.2g}" if f"{name} error" in last else "")
        for name in names
    }
    plots = [
        draw(Plot(name, (name,)), measured, f"{name} error" if f"{name} error" in last else "")
        for name in names
    ]
    page = table_section(title, shown)
    if last.get("classes"):
        page += class_section(last["classes"])
    return f"{page}<section id=metrics><div class=plots>{''.join(plots)}</div></section>"


def class_section(classes: dict[str, dict[str, float]]) -> str:
    """A row of figures for each class."""
    labels = list(dict.fromkeys(label for figures in classes.values() for label in figures))
    head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{show(figures.get(label, ''))}</td>" for label in labels)
        + "</tr>"
        for name, figures in classes.items()
    )
    return f"<section><h2>Each class</h2><table><tr><th></th>{head}</tr>{rows}</table></section>"


def draw(plot: Plot, rows: list[dict[str, Any]], error: str = "") -> str:
    """A plot as SVG; empty if the run has none of its numbers.

    Args:
        plot: which curves.
        rows: with kimg and the curves' numbers.
        error: field of the standard error of a single curve, drawn as a band.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    curves = {name: points for name in plot.names if (points := pick(rows, name, plot.log))}
    if not curves:
        return ""
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": plot.title, "font.size": 9}
    with rc_context(options):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.subplots()
        for name, points in curves.items():
            x, y = zip(*points, strict=True)
            marker = "o" if len(x) < 3 else None
            axes.plot(x, y, label=name, linewidth=1.2, marker=marker, markersize=3)
            if error:
                band = dict(pick(rows, error, False))
                low, high = ([v + s * band.get(k, 0) for k, v in points] for s in (-1, 1))
                axes.fill_between(x, low, high, alpha=0.2, linewidth=0)
        if plot.log:
            axes.set_yscale("log")
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor="#888888")
        axes.set_title(plot.title, color="#888888")
        axes.set_xlabel("thousand images", color="#888888")
        axes.tick_params(colors="#888888", which="both")
        axes.grid(alpha=0.25)
        for spine in axes.spines.values():
            spine.set_color("#888888")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Identifiers are the page's, so that those of two plots must differ.
    prefix = "p" + re.sub(r"\W+", "", plot.title)
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return f'<figure role=img aria-label="{html.escape(plot.title)}">{svg}</figure>'


def pick(rows: list[dict[str, Any]], name: str, positive: bool) -> list[tuple[float, float]]:
    """(kimg, value) wherever there is a finite value, and a positive one if it has to be."""
    pairs = ((row["kimg"], row.get(name)) for row in rows)
    return [
        (kimg, value)
        for kimg, value in pairs
        if isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or not positive)
    ]


def table_section(title: str, values: dict[str, Any]) -> str:
    """Names and values."""
    cells = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(show(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<section><h2>{html.escape(title)}</h2><table>{cells}</table></section>"


def show(value: Any) -> str:
    """A value as text: numbers short, the rest as JSON without quotes."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def versions(run: Path) -> dict[str, str]:
    """What the run was made with, as it wrote it down; and what the page was made with."""
    try:
        found = json.loads((run / "versions.json").read_text(encoding="utf-8"))
        found = {str(name): str(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError):
        found = {}
    return found | {"this report": f"gankern {__version__}"}


STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 8px; }
#metrics { margin-top: 1em; }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
#grid { max-width: 100%; image-rendering: pixelated; min-width: min(560px, 100%); }
#slider { width: min(560px, 100%); }
table { border-collapse: collapse; } th { text-align: left; font-weight: normal; }
th, td { padding: 1px 14px 1px 0; border-bottom: 1px solid #8884; vertical-align: top; }
td { font-family: ui-monospace, monospace; font-size: 0.9em; overflow-wrap: anywhere; }
.alarms b { color: #d04020; }
"""

# Counts what goes wrong in the page, for its test.
WATCH = """
document.documentElement.dataset.errors = 0;
const failed = () => document.documentElement.dataset.errors++;
addEventListener('error', failed, true);
addEventListener('securitypolicyviolation', failed);
"""

SCRIPT = """
const data = document.getElementById('grids');
if (data) {
  const grids = JSON.parse(data.textContent);
  const slider = document.getElementById('slider');
  const show = () => {
    const grid = grids[slider.value];
    document.getElementById('grid').src = grid.src;
    document.getElementById('when').textContent = `${grid.kimg} kimg`;
  };
  const jump = () => {
    const kimg = Number(new URLSearchParams(location.hash.slice(1)).get('kimg') ?? NaN);
    if (Number.isNaN(kimg)) return;
    const far = grids.map((grid) => Math.abs(grid.kimg - kimg));
    slider.value = far.indexOf(Math.min(...far));
    slider.dispatchEvent(new Event('input'));
  };
  slider.addEventListener('input', show);
  addEventListener('hashchange', jump);
  show();
  jump();
}
"""
