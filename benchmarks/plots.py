"""Pictures of what ops.py and steps.py measured: JSON lines in, PNG or SVG out.

    python benchmarks/plots.py ops.jsonl steps.jsonl             plots/*.png
    python benchmarks/plots.py *.jsonl --out docs/bench --format svg

  speedup    each op's reference time over the implementation's, a bar an implementation
  steps      each training step's time over ours: reference, torch.compile, the floor
  roofline   GB/s over the bytes moved, below the roof of memory: a copy's rate in the same run
  scaling    time over the elements of x, where a file has several sizes, beside straight lines
  growth     img/s of training over batch, resolution, channels and ranks, beside proportion

Of rows that were measured again, the last counts, whatever its commit: titles name the commits, and
--commit leaves the others out. Dtypes, layouts, machines, CUDA graphs and CPU time are kept apart,
a picture each. What a file has no rows for is not drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

Row = dict[str, Any]
# Rows that agree in these measure the same.
KEY = (
    "machine", "threads", "op", "case", "model", "step", "x", "dtype", "channels_last", "what",
    "impl", "batch", "resolution", "channels", "ranks", "scale", "value", "graphs", "cpu_time",
)  # fmt: skip
COLORS = {
    "reference": "#9a9a9a", "compile": "#d98f2b", "cpu": "#2b6cb0", "triton": "#7b4fb3",
    "cuda": "#2f8f4e", "ours": "#2b6cb0", "floor": "#c9c9c9", "theirs": "#b3434f",
}  # fmt: skip


def read(paths: Iterable[Path], commit: str = "") -> list[Row]:
    """The rows of JSON lines, of a commit or of all; of equal ones the last."""
    last: dict[str, Row] = {}
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SystemExit(f"plots: {path} line {number} is not JSON: {error}") from error
            measured = row.get("kind", "measured") == "measured" and "impl" in row and "ms" in row
            if measured and row.get("commit", "").startswith(commit):
                last[json.dumps([row.get(name) or None for name in KEY])] = row
    return list(last.values())


def heading(title: str, rows: list[Row]) -> str:
    """The title, and below it the commits that were measured."""
    commits = dict.fromkeys(row["commit"][:7] for row in rows if row.get("commit"))
    return f"{title}\n{' '.join(commits)}" if commits else title


def how(row: Row) -> str:
    """What sets times of steps apart."""
    ways = {"CUDA graphs": row.get("graphs"), "CPU time": row.get("cpu_time")}
    return "".join(f", {name}" for name, holds in ways.items() if holds)


def op_name(row: Row) -> str:
    return f"{row['op']} {row['case']}".strip()


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of ops by machine, dtype and layout: the pictures' titles."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in (row for row in rows if "op" in row and "what" in row):
        layout = "channels-last" if row["channels_last"] else "NCHW"
        found[f"{row['machine']}, {row['dtype']}, {layout}"].append(row)
    return found


def largest(rows: list[Row]) -> list[Row]:
    """Of each op the rows with the most elements."""
    most: dict[str, int] = defaultdict(int)
    for row in rows:
        most[op_name(row)] = max(most[op_name(row)], math.prod(row["x"]))
    return [row for row in rows if math.prod(row["x"]) == most[op_name(row)]]


def bars(title: str, labels: list[str], series: dict[str, list[float]], axis: str) -> Figure:
    """Horizontal bars with their values; a line at 1."""
    size = 0.26 * (len(series) + 0.8) * len(labels)
    figure, ax = plt.subplots(figsize=(8, 1.2 + max(1.0, size)), layout="constrained")
    height = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [k + (i - (len(series) - 1) / 2) * height for k in range(len(labels))]
        drawn = ax.barh(at, values, height * 0.92, color=COLORS.get(name), label=name)
        texts = [f"{v:.2f}" if math.isfinite(v) else "" for v in values]
        ax.bar_label(drawn, texts, padding=3, fontsize=8)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.set_xlabel(axis)
    ax.margins(x=0.1, y=0.02)
    ax.set_title(title, fontsize=10, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=len(series), frameon=False)
    return figure


def series_of(rows: list[Row], label: Callable[[Row], str]) -> tuple[list[str], dict[str, Any]]:
    """Labels in order, and each implementation's ratios; NaN where it has none."""
    labels = list(dict.fromkeys(map(label, rows)))
    series: dict[str, list[float]] = {}
    for row in rows:
        values = series.setdefault(row["impl"], [math.nan] * len(labels))
        values[labels.index(label(row))] = row["ratio"]
    return labels, series


def speedup(title: str, rows: list[Row]) -> Figure | None:
    rows = [row for row in largest(rows) if row["impl"] != "reference"]
    if not rows:
        return None
    labels, series = series_of(rows, lambda r: f"{op_name(r)}, {r['what'].replace('+', ' + ')}")
    return bars(heading(title, rows), labels, series, "times as fast as the reference")


def steps(rows: list[Row]) -> dict[str, Figure]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in (row for row in rows if "step" in row and row["impl"] != "ours"):
        found[f"{row['machine']}, batch {row['batch']}{how(row)}"].append(row)
    figures = {}
    for title, part in found.items():
        labels, series = series_of(part, lambda r: f"{r['model']} {r['step']}")
        figures[title] = bars(heading(title, part), labels, series, "time over ours")
    return figures


def roofline(title: str, rows: list[Row]) -> Figure | None:
    """Memory-bound ops lie under one roof: the copy's GB/s. Those with a convolution have another,
    and those whose fewest bytes are not known no point."""
    drawn = [row for row in rows if row.get("of_copy")]
    if not drawn:
        return None
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for impl in dict.fromkeys(row["impl"] for row in drawn):
        for what, marker, fill in (("forward", "o", True), ("forward+backward", "s", False)):
            part = [r for r in drawn if r["impl"] == impl and r["what"] == what]
            x, y = [r["gb_s"] * r["ms"] for r in part], [r["gb_s"] for r in part]
            color = COLORS.get(impl)
            ax.plot(x, y, marker, color=color, markerfacecolor=color if fill else "none",
                    label=f"{impl}, {what.replace('+', ' + ')}", markersize=5)  # fmt: skip
    roof = statistics.median(row["gb_s"] / row["of_copy"] for row in drawn)
    ax.axhline(roof, color="black", linewidth=1)
    ax.annotate(f"copy: {roof:.1f} GB/s", (0.01, roof), xycoords=("axes fraction", "data"),
                xytext=(0, 3), textcoords="offset points", fontsize=8)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="fewest MB that must move", ylabel="GB/s of them")
    ax.set_title(f"The roof of memory: {heading(title, drawn)}", fontsize=10, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def scaling(title: str, rows: list[Row]) -> Figure | None:
    """Forward time over size; parallel to the grey lines is linear."""
    lines: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["what"] == "forward" and row["impl"] != "reference":
            lines[op_name(row), row["impl"]][math.prod(row["x"])] = row["ms"]
    several = {key: sizes for key, sizes in lines.items() if len(sizes) > 1}
    if not several:
        return None
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    every = [(n, ms) for sizes in several.values() for n, ms in sizes.items()]
    low, high = min(n for n, _ in every), max(n for n, _ in every)
    per_element = [ms / n for n, ms in every]
    for k in range(
        math.floor(math.log10(min(per_element))), math.ceil(math.log10(max(per_element)))
    ):
        ax.plot([low, high], [low * 10**k, high * 10**k], color="#dddddd", linewidth=0.8, zorder=0)
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    ax.set_prop_cycle(color=[*colors[::2], *colors[1::2]])
    for (name, impl), sizes in several.items():
        ax.plot(
            *zip(*sorted(sizes.items()), strict=True), "o-", markersize=4, label=f"{name}, {impl}"
        )
    ax.set(xscale="log", yscale="log", xlabel="elements of x", ylabel="ms, forward")
    ax.set_title(heading(title, rows), fontsize=10, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


# With which power of a size img/s would go if arithmetic were all, and from which end it is drawn.
PROPORTION = {"batch": (0, -1), "resolution": (-2, -1), "channels": (-2, -1), "ranks": (1, 0)}


def growth(rows: list[Row]) -> dict[str, Figure]:
    """img/s of training over each size; dashed: in proportion to the arithmetic."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in (row for row in rows if "scale" in row):
        found[f"{row['machine']}{how(row) or ', wall time'}"].append(row)
    figures = {}
    for title, part in found.items():
        figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
        for ax, (scale, (power, end)) in zip(axes, PROPORTION.items(), strict=True):
            ax.set(xscale="log", yscale="log", xlabel=scale)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
            line = sorted((row["value"], row["img_s"]) for row in part if row["scale"] == scale)
            if line:
                x, y = zip(*line, strict=True)
                ideal = [y[end] * (v / x[end]) ** power for v in x]
                ax.plot(x, ideal, "--", color="#9a9a9a", linewidth=1)
                ax.plot(x, y, "o-", color=COLORS["ours"], markersize=4)
                ax.set_xticks(x, list(map(str, x)))
            ax.set_xticks([], minor=True)
            ax.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("img/s")
        figure.suptitle(heading(title, part), fontsize=10)
        figures[title] = figure
    return figures


def pictures(rows: list[Row]) -> dict[str, Figure]:
    """All that the rows give, by file name."""
    found: dict[str, Figure] = {}
    for kind, draw in (("speedup", speedup), ("roofline", roofline), ("scaling", scaling)):
        for title, part in groups(rows).items():
            if figure := draw(title, part):
                found[file_name(kind, title)] = figure
    for title, figure in steps(rows).items():
        found[file_name("steps", title)] = figure
    for title, figure in growth(rows).items():
        found[file_name("growth", title)] = figure
    return found


def file_name(kind: str, title: str) -> str:
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines")
    parser.add_argument("--out", type=Path, default=Path("plots"), metavar="FOLDER")
    parser.add_argument("--commit", default="", metavar="REV", help="the first digits of one")
    parser.add_argument("--format", choices=["png", "svg"], default="png")
    args = parser.parse_args()
    missing = [str(path) for path in args.files if not path.is_file()]
    if missing:
        raise SystemExit(f"plots: {', '.join(missing)} does not exist")
    drawn = pictures(read(args.files, args.commit))
    if not drawn:
        raise SystemExit("plots: no rows of ops.py or steps.py in these files")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        path = args.out / f"{name}.{args.format}"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
