"""Another implementation of StyleGAN2 that you have, timed beside this one in one run.

    python benchmarks/external.py --repo ~/stylegan
    python benchmarks/external.py --repo ~/stylegan --resolution 256 --batch 4 --step G R1
    python benchmarks/external.py --repo DIR --module networks --generator-args '{"size": 64}'

`--module` is imported from the checkout; its classes Generator and Discriminator are made with the
names that this family of implementations shares (z_dim, c_dim, w_dim, img_resolution,
img_channels, channel_base, channel_max), which --generator-args and --discriminator-args, JSON
objects, change (null leaves one out). Called are G(z, c), D(img, c), and for the path length
G.mapping(z, c) and G.synthesis(ws). Both have the same configuration and batch. Rounds go through
both, once each; printed are medians, their quantiles and the median of the rounds' ratios
theirs / ours. That code runs with your rights: point this at a checkout that you trust.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ops import figures, machine, measure
from steps import STEPS, Model, stylegan2_nets


class Theirs(nn.Module):
    """A network of theirs that is called as ours is, without labels."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, no_label(x))

    def mapping(self, z: Tensor) -> Tensor:
        return self.net.mapping(z, no_label(z))

    def synthesis(self, ws: Tensor) -> Tensor:
        return self.net.synthesis(ws)


def no_label(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 0)


def load(repo: Path, module: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The classes Generator and Discriminator of a module of the checkout."""
    if not repo.is_dir():
        raise SystemExit(f"external: {repo} is not a folder")
    sys.path.insert(0, str(repo.resolve()))
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"external: {module} cannot be imported from {repo}: {error}") from error
    finally:
        sys.path.remove(str(repo.resolve()))
    missing = [name for name in ("Generator", "Discriminator") if not hasattr(found, name)]
    if missing:
        raise SystemExit(f"external: {module} of {repo} has no {' and no '.join(missing)}")
    return found.Generator, found.Discriminator


def arguments(usual: dict[str, Any], changes: str) -> dict[str, Any]:
    """The usual arguments with a JSON object's changes; null leaves one out."""
    try:
        changed = json.loads(changes)
    except json.JSONDecodeError as error:
        raise SystemExit(f"external: arguments must be a JSON object, got {changes!r}") from error
    return {k: v for k, v in {**usual, **changed}.items() if v is not None}


def their_nets(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    generator, discriminator = load(args.repo, args.module)
    size = {
        "c_dim": 0, "img_resolution": args.resolution, "img_channels": 3,
        "channel_base": args.channel_base, "channel_max": args.channel_max,
    }  # fmt: skip
    inputs = {"z_dim": 512, "w_dim": 512}
    try:
        G = generator(**arguments(inputs | size, args.generator_args))
        D = discriminator(**arguments(size, args.discriminator_args))
    except TypeError as error:
        hint = "change them with --generator-args and --discriminator-args"
        raise SystemExit(f"external: its classes take other arguments: {error}; {hint}") from error
    return Theirs(G), Theirs(D)


def rows(args: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """Ours and theirs, a row each, step by step."""
    torch.manual_seed(0)
    both = {
        "ours": stylegan2_nets(args.resolution, args.channel_base, args.channel_max),
        "theirs": their_nets(args),
    }
    z = torch.randn(args.batch, 512, device=device)
    real = torch.rand(args.batch, 3, args.resolution, args.resolution, device=device) * 2 - 1
    models = {
        name: Model(G.train().to(device), D.train().to(device), z, real)
        for name, (G, D) in both.items()
    }
    for step in args.step:
        columns: dict[str, Callable[[], Any]] = {
            name: functools.partial(model.run, step) for name, model in models.items()
        }
        try:
            columns["theirs"]()
        except RuntimeError as error:
            print(f"{step}: theirs cannot run: {str(error).splitlines()[0]}")
            continue
        times = measure(columns, args.rounds, device)
        for name, values in times.items():
            found = figures(values, times["ours"], 0, 1.0)
            pairs = zip(values, times["ours"], strict=True)
            yield {
                "model": f"stylegan2-{args.resolution}", "step": step, "batch": args.batch,
                "impl": name, "ms": found["ms"], "ms_10": found["ms_10"], "ms_90": found["ms_90"],
                "ratio": statistics.median(v / o for v, o in pairs),
            }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    on = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--repo", type=Path, required=True, help="folder of the checkout")
    parser.add_argument("--module", default="training.networks_stylegan2")
    parser.add_argument("--generator-args", default="{}", metavar="JSON")
    parser.add_argument("--discriminator-args", default="{}", metavar="JSON")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--channel-base", type=int, default=8192)
    parser.add_argument("--channel-max", type=int, default=128)
    parser.add_argument("--step", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results to FILE")
    args = parser.parse_args()
    about = machine(on)
    print(" ".join(f"{k} {v}" for k, v in about.items()))
    for row in rows(args, on):
        times = f"{row['ms']:9.2f} ms [{row['ms_10']:8.2f} {row['ms_90']:8.2f}]"
        print(f"{row['step']:9} {row['impl']:7} {times}  / ours {row['ratio']:5.2f}", flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(about | {"repo": args.repo.name} | row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
