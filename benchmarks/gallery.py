"""Does every model train? Nine runs on real digits, their pictures and scores, in docs/gallery.md.

    python benchmarks/gallery.py [--runs runs/gallery] [--out docs] [--finished] [NAME ...]

Runs are started as a user starts them, by `gankern train --preset NAME --out FOLDER`. One that is
finished in --runs is not repeated; with --finished no other is started, and the page names the
models that are missing. The score is the share of 1,000 generated digits that a classifier of real
ones recognises (probability of the best class at least 0.9), times the evenness of the classes it
finds (the exponential of their entropy, over 10). Each model must beat its own untrained generator
by 0.2 within 10 minutes by the clock, the conditional one follow 90 % of its labels, and WGAN's
estimate of the distance fall. Exit code 0 if all do, 1 if not.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gankern import models
from gankern.data.grid import save_grid
from gankern.data.latents import mix_layers, render, seed_classes, seed_latents, styles
from gankern.metrics.digits_classifier import DigitsClassifier, digit_quality, train_classifier
from gankern.training import load_generator
from gankern.training.checkpoint import list_checkpoints
from gankern.training.noise import derive_seed
from gankern.training.run import read_config, read_stats

# Presets, and what their pictures show.
MODELS = {
    "vanilla": "Vanilla GAN: fully connected, non-saturating loss.",
    "cgan": "Conditional GAN: convolutional, labels by concatenation; a column is a class.",
    "dcgan": "DCGAN, labels by projection; a column is a class.",
    "wgan": "WGAN: fully connected critic 784-512-256-1, clipped weights, RMSprop.",
    "wgan-gp": "WGAN-GP: convolutional, gradient penalty, no norm in the critic.",
    "sagan": "Options of the conv nets: spectral norm, attention, minibatch discrimination, hinge.",
    "pggan": "Progressive GAN: 7x7 to 28x28, gradient penalty with drift.",
    "stylegan": "StyleGAN: AdaIN, noise, style mixing, growth, gradient penalty.",
    "stylegan2": "StyleGAN2: modulated convolutions, path length, style mixing, gradient penalty.",
}
MARGIN = 0.2
MINUTES = 10
COUNT = 1000


def finished_run(folder: Path) -> Path | None:
    """A run in a folder that has reached its length."""
    for run in sorted(folder.glob("[0-9]*")):
        saved = list_checkpoints(run)
        if saved and int(saved[-1].name) >= read_config(run).kimg * 1000:
            return run
    return None


def train_command(name: str, folder: Path) -> list[str]:
    """What trains a model in a run folder below `folder`."""
    python = [sys.executable, "-m", "gankern"]
    return [*python, "train", "--preset", name, "--out", str(folder)]


def train(name: str, folder: Path) -> Path | None:
    """The run of a model that is trained now; notes the seconds by the clock beside it."""
    began = time.monotonic()
    subprocess.run(train_command(name, folder), check=True)
    (folder / "seconds").write_text(f"{time.monotonic() - began:.0f}")
    return finished_run(folder)


def score(classifier: DigitsClassifier, G: Any) -> dict[str, float]:
    """The figures of a generator."""
    seeds = range(COUNT)
    classes = seed_classes(seeds, G.c_dim) if G.c_dim else None
    images = render(G, seed_latents(seeds, G.z_dim), classes, batch=100)
    quality = digit_quality(classifier, images)
    shares = [share for share in quality["shares"] if share > 0]
    evenness = math.exp(-sum(share * math.log(share) for share in shares)) / 10
    row = {"recognised": quality["confident"], "evenness": evenness}
    row["score"] = row["recognised"] * evenness
    if classes is not None:
        found = classifier.probabilities(images).argmax(1)
        row["labels followed"] = (found == classes).float().mean().item()
    return row


def untrained(config: Any) -> Any:
    """The generator that a run started with."""
    torch.manual_seed(derive_seed(config.seed, "weights"))
    return models.build(config)[0].eval().requires_grad_(False)


def estimates(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """WGAN's estimates of the distance: first quarter's largest, last tenth's mean."""
    estimate = [-row["loss_D"] for row in rows]
    last = estimate[-max(1, len(estimate) // 10) :]
    return max(estimate[: max(1, len(estimate) // 4)]), sum(last) / len(last)


def falls(rows: list[dict[str, Any]]) -> bool:
    top, last = estimates(rows)
    return last < top


def extras(name: str, run: Path, G: Any, folder: Path) -> list[str]:
    """What is particular to a model: pictures beside the grid, as lines of Markdown."""
    rows = read_stats(run)
    if name == "wgan":
        top, last = estimates(rows)
        return [f"The critic's estimate of the distance falls from {top:.4f} to {last:.4f}."]
    if name in models.GROWING:
        return growth_pictures(name, run, rows, folder)
    if name != "stylegan2":
        return []
    c = torch.arange(8) % 10
    sweep = []
    for psi in (0.0, 0.25, 0.5, 0.75, 1.0):
        ws = styles(G, seed_latents(range(8), G.z_dim), c, psi)
        sweep.append(render(G, ws))
    save_grid(torch.cat(sweep), folder / f"{name}-truncation.png", 8)
    rows_w = styles(G, seed_latents(range(5), G.z_dim), torch.arange(5))
    cols_w = styles(G, seed_latents(range(10, 18), G.z_dim), torch.arange(2, 10))
    mixed = mix_layers(rows_w, cols_w, range(G.num_ws // 2, G.num_ws))
    top, left, inner = render(G, torch.cat([cols_w, rows_w, mixed.flatten(0, 1)])).split([8, 5, 40])
    lines = [torch.cat([torch.ones_like(top[:1]), top])]
    lines += [torch.cat([a[None], b]) for a, b in zip(left, inner.split(8), strict=True)]
    save_grid(torch.cat(lines), folder / f"{name}-mixing.png", 9)
    return [
        f"Truncation, psi 0 to 1 from top to bottom: ![truncation](gallery/{name}-truncation.png)",
        "",
        f"Style mixing, coarse styles of the row, fine ones of the column: "
        f"![mixing](gallery/{name}-mixing.png)",
    ]


def growth_pictures(name: str, run: Path, rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """The sample grid at the end of each level."""
    lines = []
    for level in sorted({math.floor(row["growth"]) for row in rows}):
        at = [row["kimg"] for row in rows if row["growth"] == level]
        taken = {int(p.stem) / 1000: p for p in (run / "samples").iterdir()}
        shown = [kimg for kimg in at if kimg in taken]
        if shown:
            target = f"{name}-level{level}.png"
            shutil.copyfile(taken[shown[-1]], folder / target)
            lines.append(f"![level {level}](gallery/{target})")
    return ["After each growth: " + " ".join(lines)] if lines else []


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing, writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="models (default all)")
    parser.add_argument("--runs", type=Path, default=Path("runs/gallery"), help="run folders")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page")
    parser.add_argument("--finished", action="store_true", help="show finished runs, train none")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(MODELS)
    if unknown:
        parser.error(f"models must be of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    folder = options.out / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    classifier = train_classifier()
    table, sections, failed, missing = [], [], [], []
    for name in options.names or MODELS:
        run = finished_run(options.runs / name)
        if run is None and options.finished:
            missing.append(name)
            continue
        run = run or train(name, options.runs / name)
        assert run is not None
        G: Any
        G, config = load_generator(run)
        after, before = score(classifier, G), score(classifier, untrained(config))
        if after["score"] < before["score"] + MARGIN:
            failed.append(f"{name} is not better than untrained by {MARGIN}")
        if name == "cgan" and after["labels followed"] < 0.9:
            failed.append(f"{name} follows {after['labels followed']:.0%} of its labels")
        if name == "wgan" and not falls(read_stats(run)):
            failed.append(f"{name}: the critic's estimate does not fall")
        noted = options.runs / name / "seconds"
        seconds = int(noted.read_text()) if noted.exists() else math.nan
        if seconds > 60 * MINUTES:
            failed.append(f"{name} took {seconds / 60:.1f} minutes, more than {MINUTES}")
        followed = f"{after['labels followed']:.0%}" if "labels followed" in after else "-"
        table.append(
            f"| {name} | {config.kimg:g} | {seconds / 60:.1f} | {before['score']:.2f} |"
            f" {after['score']:.2f} | {after['recognised']:.0%} | {after['evenness']:.2f} |"
            f" {followed} |"
        )
        print(table[-1], flush=True)
        shutil.copyfile(run / "samples.png", folder / f"{name}.png")
        shutil.copyfile(run / "loss.png", folder / f"{name}-loss.png")
        sections += [
            f"\n## {name}\n",
            f"{MODELS[name]} `gankern train --preset {name}`\n",
            f"![samples](gallery/{name}.png) ![losses](gallery/{name}-loss.png)\n",
            *extras(name, run, G, folder),
        ]
    page = [
        "# Every model, trained on two CPU cores",
        "",
        "Made by `python benchmarks/gallery.py` from 5,000 real MNIST digits; seeds are fixed. It",
        "starts each run by the command that stands at its model, with a folder as `--out`. The",
        f"score is the share of {COUNT} generated digits that a classifier of real ones recognises",
        "(probability at least 0.9), times the evenness of their classes; each model must beat its",
        f"own untrained generator by {MARGIN}, within {MINUTES} minutes by the clock.",
        "",
        *([f"Without a finished run: {', '.join(missing)}.", ""] if missing else []),
        "| model | kimg | minutes | untrained | score | recognised | evenness | labels followed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *table,
        *sections,
    ]
    if not options.names:
        (options.out / "gallery.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    print("\n".join(failed) or "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
