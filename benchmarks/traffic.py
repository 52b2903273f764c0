"""What the CUDA kernels move, counted by csrc/simt on the CPU: bytes, sectors, bank conflicts.

    python benchmarks/traffic.py                     every op at StyleGAN2-256's image size
    python benchmarks/traffic.py --op bias_act adain --dtype f16
    python benchmarks/traffic.py --check             exit 1 if a figure got worse than the budget
    python benchmarks/traffic.py --update            write benchmarks/traffic_budget.json

The rows are those of benchmarks/ops.py, at 256x256 with one sample and few channels, on a machine
whose multiprocessors are as many fewer, so that blocks are cut as for the whole batch. For each,
forward and backward:

  traffic     bytes that the warps' requests use, over the fewest that the op must move
  sectors     bytes used over the bytes of the 32-byte sectors touched
  banks       cycles of shared memory over those without bank conflicts
  launches    kernels started, and their threads a block and blocks

No GPU is needed. The goals: traffic at most 1.05 (upfirdn2d and the epilogue's filter 1.15 at 4
taps), sectors at least 0.95, banks at most 1.1, one launch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GANKERN_SIMT"] = "race"  # the variant that counts
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python_tests"))

import ops  # noqa: E402
import simt_build  # noqa: E402
import torch  # noqa: E402
from ops import DTYPES, ROWS, Make, Row  # noqa: E402

BUDGET = Path(__file__).with_name("traffic_budget.json")

# Side and channels by memory format: channels-last needs enough of them to fill a warp's sectors.
SHAPES = {"nchw": (256, 8), "nhwc": (256, 32)}
PLANES, PROCESSORS = 4 * 64, 132  # batch times channels of StyleGAN2-256, on an H100
COMPOSED = ("synthesis_layer",)  # of rows that are here themselves


@dataclass
class Figures:
    traffic: float
    sectors: float
    banks: float
    launches: int
    moved: int  # bytes

    @classmethod
    def of(cls, c: dict[str, Any], fewest: int) -> Figures:
        used = c["global_load_used_bytes"] + c["global_store_used_bytes"]
        sectors = c["global_load_sectors"] + c["global_store_sectors"]
        cycles = c["shared_load_wavefronts"] + c["shared_store_wavefronts"]
        conflicts = c["shared_load_conflicts"] + c["shared_store_conflicts"]
        return cls(
            used / fewest,
            used / max(1, 32 * sectors),
            cycles / max(1, cycles - conflicts) if cycles else 1.0,
            c["launches"],
            used,
        )

    def kept(self) -> list[float]:
        return [round(self.traffic, 3), round(self.sectors, 3), round(self.banks, 3), self.launches]


def count(row: Row, dtype: str, layout: str) -> Iterator[tuple[str, Figures, list[dict[str, Any]]]]:
    """(forward or backward, figures, launches) of one row."""
    simt = simt_build.module()
    batch = 8 if row.op == "minibatch_stddev" or row.case == "latent" else 1
    planes = PLANES if row.case == "latent" else batch * SHAPES[layout][1]
    simt.processors(max(1, PROCESSORS * planes // PLANES))
    make = Make(batch, DTYPES[dtype], "cpu", layout == "nhwc")
    inputs = row.make(make, *SHAPES[layout])
    leaves = [t.detach().requires_grad_() for t in row.leaves(inputs)]
    simt.reset()
    y = row.call(*leaves, *inputs[len(leaves) :], impl="simt")
    counted = simt.counters()
    yield "forward", Figures.of(counted, row.forward_bytes(inputs, y)), counted["launch_list"]
    dy = torch.empty_like(y).copy_(make.tensor(y.numel()).view(y.shape))
    simt.reset()
    torch.autograd.grad(y, leaves, dy)
    counted = simt.counters()
    yield "backward", Figures.of(counted, row.backward_bytes(inputs, y)), counted["launch_list"]


def worse(now: list[float], budget: list[float] | None) -> list[str]:
    """What is worse than in the budget by more than a per cent; nothing is without a budget."""
    names = ("traffic", "sector efficiency", "bank conflicts", "launches")
    found = []
    for name, sign, new, old in zip(names, (1, -1, 1, 1), now, budget or now, strict=True):
        if sign * (new - old) > 0.01 * old:
            found.append(f"{name} {new}, the budget has {old}")
    return found


def show(key: str, figures: Figures, launches: list[dict[str, Any]]) -> None:
    first = launches[0] if launches else {"grid": (), "block": ()}
    grid, block = ("x".join(map(str, first[k])) for k in ("grid", "block"))
    columns = f"{figures.traffic:7.3f} {figures.sectors:7.3f} {figures.banks:6.3f}"
    moved = f"{figures.moved / 2**20:7.2f}"
    print(f"{key:46} {columns} {figures.launches:8} {grid:>11} {block:>8} {moved}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [name for name in dict.fromkeys(row.op for row in ROWS) if name not in COMPOSED]
    parser.add_argument("--op", nargs="+", choices=names, default=names)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["f32", "f16"])
    parser.add_argument("--layout", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure got worse")
    parser.add_argument("--update", action="store_true", help=f"write {BUDGET.name}")
    args = parser.parse_args()
    simt_build.load_ops()
    ops._impl.add_namespace("simt", "gankern_simt")
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    measured: dict[str, list[float]] = {}
    problems: list[str] = []
    head = f"{'traffic':>7} {'sectors':>7} {'banks':>6} launches"
    print(f"{'op':46} {head} {'grid':>11} {'block':>8} {'MiB':>7}")
    for row in (row for row in ROWS if row.op in args.op and not ops.usable(row, "simt", "cpu")):
        for layout, dtype in itertools.product(args.layout, args.dtype):
            name = f"{row.name} {{}} {dtype} {layout}"
            try:
                for what, figures, launches in count(row, dtype, layout):
                    key = name.format(what)
                    show(key, figures, launches)
                    problems += [f"{key}: {p}" for p in worse(figures.kept(), budget.get(key))]
                    measured[key] = figures.kept()
            except RuntimeError as error:  # simt found a fault
                problems.append(f"{name.format('')}: {error}")
    if args.update:
        budget = sorted({**budget, **measured}.items())
        lines = [f"{json.dumps(key)}: {json.dumps(kept)}" for key, kept in budget]
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        problems = [p for p in problems if p.split(":")[0] not in measured]
    print("\n".join(problems) or "no figure is worse than in the budget")
    return int(bool(problems) and (args.check or args.update))


if __name__ == "__main__":
    sys.exit(main())
