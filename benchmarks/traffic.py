"""What the CUDA kernels move, counted by csrc/simt on the CPU: bytes, sectors, bank conflicts.

    python benchmarks/traffic.py                     every op at StyleGAN2-256's image size
    python benchmarks/traffic.py --op bias_act adain --dtype f16
    python benchmarks/traffic.py --check -j 2        exit 1 if a figure got worse or misses its bar
    python benchmarks/traffic.py --update            write benchmarks/traffic_budget.json
    python benchmarks/traffic.py --markdown          the budget as the table of docs/ops.md

The rows are those of benchmarks/ops.py and filters of 12 taps, at 256x256 with one sample and few
channels, on a machine whose multiprocessors are as many fewer, so that blocks are cut as for the
whole batch; small ops have their full size. For each, forward and backward, and of those that path
length differentiates twice in one kernel the second derivative:

  traffic     bytes that the warps' requests use, over the fewest that the op must move
  sectors     bytes used over the bytes of the 32-byte sectors touched
  banks       cycles of shared memory over those without bank conflicts
  launches    kernels started, and their threads a block and blocks
  H100, A100  share of a multiprocessor's threads there that the blocks' shared memory leaves room
              for, as its launch asks for it; sass.py has what registers leave

Launches that depend on a GPU's shared memory are counted as both have them: the worse is shown. No
GPU is needed. The bars: traffic at most 1.05 (filters with their halos 1.15 at 4 taps, 1.4 at 12),
sectors at least 0.95, banks at most 1.1, one launch, room for at least 0.5 of the threads.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ["GANKERN_SIMT"] = "race"  # the variant that counts
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python_tests"))

import ops  # noqa: E402
import sass  # noqa: E402
import simt_build  # noqa: E402
import torch  # noqa: E402
from ops import DTYPES, Make, Row, filtered  # noqa: E402

BUDGET = Path(__file__).with_name("traffic_budget.json")
LAST = torch.channels_last

F12 = ops.ops.setup_filter([1, 3, 8, 15, 22, 26, 26, 22, 15, 8, 3, 1])
# Not what is composed of others, nor the same passes: of each way of resampling the gradient is
# the other's.
REPEATED = "upfirdn2d down 2"
ROWS = [row for row in ops.ROWS if not row.convolves and row.name != REPEATED] + [
    Row("upfirdn2d", "up 2, 12 taps", lambda m, res, c: [m(c, res // 2, res // 2), F12],
        filtered(2, 1, [6, 5, 6, 5]), "", frozen=1),
]  # fmt: skip

# Channels by memory format: channels-last needs enough of them to fill a warp's sectors.
SIDE, CHANNELS = 256, {"nchw": 4, "nhwc": 16}
PLANES, PROCESSORS = 4 * 64, 132  # batch times channels of StyleGAN2-256, on an H100
# Compute capability, and KiB of shared memory that a block can have.
GPUS = {"H100": ("sm_90", 227), "A100": ("sm_80", 163)}
# Rows with other channels.
OTHERS = {
    "adain": {"nchw": 8, "nhwc": 64},  # so that a group of blocks finds room
    "synthesis_epilogue up 2": {"nchw": 4, "nhwc": 32},  # 64 bytes in 16 bits
}
# Rows of full size: batch and channels.
WHOLE = {"pixel_norm latent": (8, 1), "minibatch_stddev": (8, 1), "demod_coefs": (4, 64)}
# Rows whose second derivative is a kernel: inputs whose gradients are differentiated again.
SECOND = {"pixel_norm image": 1, "synthesis_epilogue": 2}
PASSES = ("forward", "backward", "second")


class Figures(NamedTuple):
    traffic: float
    sectors: float
    banks: float
    launches: int
    h100: float
    a100: float

    @classmethod
    def of(cls, c: dict[str, Any], fewest: int) -> Figures:
        used = c["global_load_used_bytes"] + c["global_store_used_bytes"]
        sectors = c["global_load_sectors"] + c["global_store_sectors"]
        cycles = c["shared_load_wavefronts"] + c["shared_store_wavefronts"]
        conflicts = c["shared_load_conflicts"] + c["shared_store_conflicts"]
        banks = cycles / (cycles - conflicts) if cycles else 1.0
        ratios = used / fewest, used / max(1, 32 * sectors), banks
        rooms = (round(resident(c["launch_list"], gpu), 3) for gpu in GPUS)
        return cls(*(round(ratio, 3) for ratio in ratios), c["launches"], *rooms)


def resident(launches: list[dict[str, Any]], gpu: str) -> float:
    """Of a multiprocessor's threads, with the shared memory that the launches ask for."""
    arch = GPUS[gpu][0]
    rooms = (sass.occupancy(arch, 1, c["smem"], math.prod(c["block"])) for c in launches)
    return min(rooms, default=1.0)


NAMES = ("traffic", "sectors used", "bank cycles", "launches", *(f"{gpu} threads" for gpu in GPUS))
SIGNS = (1, -1, 1, 1, -1, -1)  # -1: more is better


def both(h100: Figures, a100: Figures) -> Figures:
    """The worse of two GPUs' figures, and the room that each has."""
    worse = (
        max(pair, key=lambda v, s=s: s * v) for s, *pair in zip(SIGNS, h100, a100, strict=True)
    )
    return Figures(*worse)._replace(h100=h100.h100, a100=a100.a100)


class Case(NamedTuple):
    row: int  # of ROWS
    layout: str
    dtype: str


@dataclass
class Counted:
    key: str
    figures: Figures
    grid: tuple[int, ...]
    block: tuple[int, ...]
    moved: int  # bytes


def start() -> None:
    """Prepares a process for count()."""
    torch.set_num_threads(1)
    simt_build.load_ops()
    ops._impl.add_namespace("simt", "gankern_simt")


def count(case: Case) -> list[Counted] | str:
    """The passes of one row, or the fault that simt found."""
    try:
        return list(passes(ROWS[case.row], case.layout, case.dtype))
    except RuntimeError as error:
        return f"{ROWS[case.row].name} {case.dtype} {case.layout}: {error}"


def passes(row: Row, layout: str, dtype: str) -> Iterator[Counted]:
    simt = simt_build.module()
    channels = OTHERS.get(row.name, CHANNELS)[layout]
    batch, channels = WHOLE.get(row.name, (1, channels))
    part = 1 if row.name in WHOLE else channels / PLANES
    simt.processors(max(1, round(PROCESSORS * part)))
    make = Make(batch, DTYPES[dtype], "cpu", layout == "nhwc")
    inputs = row.make(make, SIDE, channels)
    if layout == "nhwc":  # weights too
        inputs = [t.contiguous(memory_format=LAST) if t.ndim == 4 else t for t in inputs]
    leaves = [t.detach().requires_grad_() for t in row.leaves(inputs)]

    def counted(
        what: str, call: Callable[[], Any], fewest: Callable[[Any], int]
    ) -> tuple[Counted, Any]:
        runs = []
        for _, kib in GPUS.values():
            if runs and not runs[0]["asked_shared"]:
                break
            simt.max_shared(kib << 10)
            simt.reset()
            result = call()
            runs.append(simt.counters())
        simt.max_shared(GPUS["H100"][1] << 10)
        c = runs[0]
        figures = both(*(Figures.of(run, fewest(result)) for run in (c, runs[-1])))
        first = (c["launch_list"] or [{"grid": (), "block": ()}])[0]
        used = c["global_load_used_bytes"] + c["global_store_used_bytes"]
        key = f"{row.name} {what} {dtype} {layout}"
        return Counted(key, figures, first["grid"], first["block"], used), result

    done, y = counted(
        "forward",
        lambda: row.call(*leaves, *inputs[len(leaves) :], impl="simt"),
        lambda y: row.forward_bytes(inputs, y),
    )
    yield done
    dy = torch.empty_like(y).copy_(make.tensor(y.numel()).view(y.shape))
    yield counted(
        "backward",
        lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
        lambda _: row.backward_bytes(inputs, y),
    )[0]
    if row.name not in SECOND:
        return
    twice = leaves[: SECOND[row.name]]
    dy.requires_grad_()
    gradients = torch.autograd.grad(y, twice, dy, create_graph=True)
    cotangents = [torch.empty_like(g).copy_(make.tensor(*g.shape)) for g in gradients]
    # dy, the inputs and the cotangents are read, a gradient of each but the cotangents is written.
    fewest = 2 * ops.nbytes(dy) + sum(map(ops.nbytes, [*inputs, *twice, *twice]))
    yield counted(
        "second",
        lambda: torch.autograd.grad(gradients, [dy, *twice], cotangents, retain_graph=True),
        lambda _: fewest,
    )[0]


# --- Judging.


def bars(key: str) -> Figures:
    halo = "upfirdn2d" in key or key.startswith("synthesis_epilogue up")
    traffic = (1.4 if "12 taps" in key else 1.15) if halo else 1.05
    return Figures(traffic, 0.95, 1.1, 1, 0.5, 0.5)


def worse(now: Figures, than: Figures, slack: float = 0.0) -> list[tuple[str, float, float]]:
    """Name and both values of each figure that is worse."""
    return [
        (name, new, old)
        for name, sign, new, old in zip(NAMES, SIGNS, now, than, strict=True)
        if sign * (new - old) > slack * old + 1e-9
    ]


def problems(measured: dict[str, Figures], budget: dict[str, Figures]) -> list[str]:
    """Figures over the budget by more than a per cent, and missed bars."""
    found = []
    for key, now in measured.items():
        if key not in budget:
            found.append(f"{key}: not in the budget; --update adds it")
            continue
        found += [
            f"{key}: {name} {new}, the budget has {old}"
            for name, new, old in worse(now, budget[key], 0.01)
        ]
        found += [
            f"{key}: {name} {new}, the bar is {bar}" for name, new, bar in worse(now, bars(key))
        ]
    return found


def read_budget(path: Path) -> dict[str, Figures]:
    if not path.exists():
        return {}
    return {key: Figures(*kept) for key, kept in json.loads(path.read_text()).items()}


def write_budget(path: Path, budget: dict[str, Figures]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(kept)}" for key, kept in sorted(budget.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# --- Showing.


def show(c: Counted) -> None:
    f = c.figures
    grid, block = ("x".join(map(str, size)) for size in (c.grid, c.block))
    columns = f"{f.traffic:7.3f} {f.sectors:7.3f} {f.banks:6.3f} {f.launches:8}"
    columns += f" {f.h100:5.0%} {f.a100:5.0%}"
    print(f"{c.key:50} {columns} {grid:>11} {block:>8} {c.moved / 2**20:7.2f}", flush=True)


def markdown(budget: dict[str, Figures]) -> str:
    """A table: a row an op and pass, a column a dtype and layout; bold: misses its bar."""
    columns = [f"{dtype} {layout}" for layout in CHANNELS for dtype in ("f32", "f16")]
    names = {"nchw": "NCHW", "nhwc": "channels-last", "f32": "float32", "f16": "float16"}
    heads = [" ".join(names[word] for word in column.split()) for column in columns]
    lines = ["| operation | bar | " + " | ".join(heads) + " |", "| --- " * 6 + "|"]
    for row, what in itertools.product(ROWS, PASSES):
        if what == "second" and row.name not in SECOND:
            continue
        keys = [f"{row.name} {what} {column}" for column in columns]
        cells = [cell(key, budget[key]) if key in budget else "" for key in keys]
        lines.append(f"| {row.name} {what} | {bars(keys[0]).traffic} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(key: str, f: Figures) -> str:
    text = f"{f.traffic:.2f} / {f.sectors:.2f} / {f.banks:.2f}"
    return f"**{text}**" if worse(f, bars(key)) else text


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for i, row in enumerate(ROWS):
        if row.op in args.op and args.case in row.case:
            yield from (Case(i, *how) for how in itertools.product(args.layout, args.dtype))


def count_all(jobs: int, todo: list[Case]) -> Iterable[list[Counted] | str]:
    start()  # builds what is to be built
    if jobs == 1:
        return map(count, todo)
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, spawn, initializer=start)
    return pool.map(count, todo)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = list(dict.fromkeys(row.op for row in ROWS))
    parser.add_argument("--op", nargs="+", choices=names, default=names)
    parser.add_argument("--case", default="", help="only rows with this in their name")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["f32", "f16"])
    parser.add_argument("--layout", nargs="+", choices=list(CHANNELS), default=list(CHANNELS))
    parser.add_argument("--budget", type=Path, default=BUDGET, help=f"default: {BUDGET.name}")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure got worse")
    parser.add_argument("--update", action="store_true", help="write the budget")
    parser.add_argument("--markdown", action="store_true", help="print the budget as a table")
    parser.add_argument("-j", dest="jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    budget = read_budget(args.budget)
    if args.markdown:
        print(markdown(budget))
        return 0
    head = f"{'traffic':>7} {'sectors':>7} {'banks':>6} launches {'H100':>5} {'A100':>5}"
    print(f"{'op':50} {head} {'grid':>11} {'block':>8} {'MiB':>7}")
    measured: dict[str, Figures] = {}
    found: list[str] = []
    for result in count_all(args.jobs, list(cases(args))):
        if isinstance(result, str):
            found.append(result)
            continue
        for counted in result:
            show(counted)
            measured[counted.key] = counted.figures
    if args.update:
        budget |= measured
        write_budget(args.budget, budget)
    found += problems(measured, budget)
    print("\n".join(found) or "every figure holds its budget and its bar")
    return int(bool(found) and (args.check or args.update))


if __name__ == "__main__":
    sys.exit(main())
