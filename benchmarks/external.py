"""Another implementation of StyleGAN2 that you have, timed beside this one in one run.

    python benchmarks/external.py --repo ~/stylegan
    python benchmarks/external.py --repo ~/stylegan --resolution 256 --batch 4 --step G R1
    python benchmarks/external.py --repo DIR --module networks --generator-args '{"size": 64}'
    python benchmarks/external.py --repo ~/stylegan \
        --no-weight-gradients torch_utils.ops.conv2d_gradfix:no_weight_gradients \
        --enable torch_utils.ops.conv2d_gradfix:enabled

`--module` is imported from the checkout; its classes Generator and Discriminator are made with the
names that this family of implementations shares (z_dim, c_dim, w_dim, img_resolution,
img_channels, channel_base, channel_max), which --generator-args and --discriminator-args, JSON
objects, change (null leaves one out). Called are G(z, c), D(img, c), and for the path length
G.mapping(z, c) and G.synthesis(ws). Both have the same configuration and batch. Rounds go through
both, once each; printed are medians, their quantiles and the median of the rounds' ratios
theirs / ours. That code runs with your rights: point this at a checkout that you trust.

R1 and path length take a gradient first that needs none of the convolutions' weights. Ours leave
those out, and other implementations have a switch for it: --no-weight-gradients names theirs, a
context manager as MODULE:NAME of the checkout, and --enable what their training sets to True for it
to work. Where it is not named, theirs compute gradients that nothing reads, and the ratios of these
two steps say so.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ops import figures, machine, measure
from steps import MODELS, Model, stylegan2_nets

from gankern.training.penalties import path_length, r1

# Whose first gradient needs no weights'.
PENALTIES = ("R1", "PL")


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


class TheirModel(Model):
    """The steps on their networks. `switch` makes the context of a penalty's first gradient alone:
    that of the penalty has the weights'."""

    def __init__(
        self, G: nn.Module, D: nn.Module, z: Tensor, real: Tensor,
        switch: Callable[[], AbstractContextManager[Any]],
    ) -> None:  # fmt: skip
        super().__init__(G, D, z, real)
        self.switch = switch

    def step_R1(self) -> None:
        real = self.real.detach().requires_grad_()
        logits = self.D(real)
        with self.switch():
            penalty = r1(real, logits)
        penalty.backward()

    def step_PL(self) -> None:
        G: Any = self.G
        ws = G.mapping(self.z)
        img = G.synthesis(ws)
        with self.switch():
            penalty, _ = path_length(img, ws, self.pl_mean)
        penalty.backward()


def no_label(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 0)


def imported(repo: Path, module: str) -> Any:
    """A module of the checkout."""
    if not repo.is_dir():
        raise SystemExit(f"external: {repo} is not a folder")
    sys.path.insert(0, str(repo.resolve()))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"external: {module} cannot be imported from {repo}: {error}") from error
    finally:
        sys.path.remove(str(repo.resolve()))


def named(repo: Path, name: str) -> tuple[Any, str]:
    """The module and the attribute that MODULE:NAME means."""
    module, _, attribute = name.partition(":")
    found = imported(repo, module)
    if not hasattr(found, attribute):
        raise SystemExit(f"external: {module} of {repo} has no {attribute!r}, got {name!r}")
    return found, attribute


def load(repo: Path, module: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The classes Generator and Discriminator of a module of the checkout."""
    found = imported(repo, module)
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


def their_switch(args: argparse.Namespace) -> Callable[[], AbstractContextManager[Any]]:
    """What leaves out the weights' gradients of theirs; enables what that needs."""
    for name in args.enable:
        module, attribute = named(args.repo, name)
        setattr(module, attribute, True)
    if args.no_weight_gradients:
        return getattr(*named(args.repo, args.no_weight_gradients))
    if set(PENALTIES) & set(args.step):
        print("no --no-weight-gradients: theirs of R1 and PL take gradients that ours leave out")
    return contextlib.nullcontext


def rows(args: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """Ours and theirs, a row each, step by step."""
    torch.manual_seed(0)
    nets = stylegan2_nets(args.resolution, args.channel_base, args.channel_max), their_nets(args)
    (G, D), (their_G, their_D) = ([net.train().to(device) for net in both] for both in nets)
    z = torch.randn(args.batch, 512, device=device)
    real = torch.rand(args.batch, 3, args.resolution, args.resolution, device=device) * 2 - 1
    models = {
        "ours": Model(G, D, z, real),
        "theirs": TheirModel(their_G, their_D, z, real, their_switch(args)),
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
                "without_weight_gradients": name == "ours" or bool(args.no_weight_gradients),
            }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    on = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--repo", type=Path, required=True, help="folder of the checkout")
    parser.add_argument("--module", default="training.networks_stylegan2")
    parser.add_argument("--generator-args", default="{}", metavar="JSON")
    parser.add_argument("--discriminator-args", default="{}", metavar="JSON")
    parser.add_argument("--no-weight-gradients", metavar="MODULE:NAME", default="")
    parser.add_argument("--enable", metavar="MODULE:NAME", nargs="+", default=[])
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--channel-base", type=int, default=8192)
    parser.add_argument("--channel-max", type=int, default=128)
    known = list(MODELS["stylegan2-64"][1])
    parser.add_argument("--step", nargs="+", choices=known, default=known)
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
