"""A prediction, not a measurement: the least time of each op on GPUs that are not here.

    python benchmarks/predicted.py                       StyleGAN2-256 shapes, float32, four GPUs
    python benchmarks/predicted.py --dtype f16 --channels-last --gpu H100 H200
    python benchmarks/predicted.py --sass build/torch-*/cuda/*.o
    python benchmarks/predicted.py --measured            real times beside it, on one of the GPUs
    python benchmarks/predicted.py --markdown            as the table of docs/benchmarks.md

The time is the longest of two, and a launch for every kernel that csrc/simt counted; the fills of
counters that launches.py counts are left out:

  bytes         the fewest that the op must move, times the traffic that csrc/simt counted
                (benchmarks/traffic_budget.json), over the GPU's bandwidth
  instructions  those of the compiled code for each byte that it loads and stores (the least among
                the kernel's variants and their loops that do both, benchmarks/sass.py; all paths
                of a loop count, taken or not), times these bytes, over the rate at which all
                schedulers issue; without a compiled library they are left out. The table has
                those of all threads

Bandwidth is the data sheet's, which no kernel reaches: a copy takes about 1.1 times as long. What
is measured is a CUDA graph of eight calls, as benchmarks/ops.py does.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ops  # noqa: E402
import sass  # noqa: E402
from launches import budgeted, traffic_factor  # noqa: E402
from ops import DTYPES, SHAPES, Make, Row  # noqa: E402


class Gpu(NamedTuple):
    """Public figures of the vendor's data sheets."""

    device: str  # how the driver's name of it ends
    arch: str
    bandwidth: float  # bytes a second
    processors: int  # multiprocessors, each issuing 4 warps' instructions a cycle
    clock: float  # boost, Hz


# NVIDIA: A100 80GB SXM data sheet and GA100 white paper; H100 SXM data sheet (67 TFLOP/s of float32
# are 132 x 256 a cycle at 1.98 GHz) and GH100 white paper; H200 SXM data sheet; AD102 white paper.
GPUS = {
    "A100": Gpu("A100-SXM4-80GB", "sm_80", 2039e9, 108, 1.41e9),
    "H100": Gpu("H100 80GB HBM3", "sm_90", 3350e9, 132, 1.98e9),
    "H200": Gpu("NVIDIA H200", "sm_90", 4800e9, 132, 1.98e9),
    "RTX 4090": Gpu("GeForce RTX 4090", "sm_89", 1008e9, 128, 2.52e9),
}
LAUNCH = 2e-6  # seconds from a kernel to the next in a stream: an assumption, on no data sheet

# Kernels of bias_act are named by a number: 0 is forward, 1 and 2 are backward.
FORWARD = r"fwd|Forward|bias_act_\w+_kernel<0|upfirdn2d"
BACKWARD = r"bwd|Backward<|bias_act_\w+_kernel<1|upfirdn2d"
TYPES = {"f32": "float", "f16": "Half16", "bf16": "Half16"}


@dataclass
class Meta(Make):
    """Inputs without values."""

    def tensor(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="meta")


class Work(NamedTuple):
    """What an op does at a shape."""

    row: Row
    what: str
    bytes: dict[str, float]  # moved, by pass
    launches: dict[str, int]
    shape: tuple[int, ...]  # of x


def rows_of(shapes: str) -> list[Row]:
    """The rows of benchmarks/ops.py that are kernels of ours on a GPU, without a convolution."""
    return [r for r in ops.rows_of(shapes) if not r.convolves and r.op not in ops.CPU_ALONE]


def works(shapes: str, dtype: str, last: bool) -> Iterator[Work]:
    """Each op, forward, and forward and backward."""
    batch, *size = SHAPES[shapes]
    layout = "nhwc" if last else "nchw"
    for row in rows_of(shapes):
        inputs = row.make(Meta(batch, DTYPES[dtype], "meta", last), *size)
        y = row.call(*inputs, impl="reference")
        fewest = {
            "forward": row.forward_bytes(inputs, y),
            "backward": row.backward_bytes(inputs, y),
        }
        filtered = row.case == "up 2"
        width = "f32" if dtype == "f32" else "f16"
        moved: dict[str, float] = {}
        launches: dict[str, int] = {}
        for way, n in fewest.items():
            kind = (row.op, way == "backward", filtered, width, layout)
            moved[way] = n * traffic_factor(*kind)
            launches[way] = max((int(count) for _, _, _, count, *_ in budgeted(*kind)), default=1)
        for ways in (("forward",), ("forward", "backward")):
            of, counts = {w: moved[w] for w in ways}, {w: launches[w] for w in ways}
            yield Work(row, "+".join(ways), of, counts, tuple(inputs[0].shape))


def density(kernels: list[sass.Kernel], op: str, way: str, dtype: str, arch: str) -> float:
    """Instructions for a byte of global memory: the least among an op's kernels; 0 without any."""
    found = []
    for k in kernels:
        mine = k.source == op and k.arch == arch and k.code is not None
        if not mine or not re.search(FORWARD if way == "forward" else BACKWARD, k.name):
            continue
        if re.search("|".join(sass.SIZES), k.name) and TYPES[dtype] not in k.name:
            continue
        if k.code.density:  # type: ignore[union-attr]
            found.append(k.code.density)  # type: ignore[union-attr]
    return min(found, default=0.0)


def least_seconds(work: Work, gpu: Gpu, densities: dict[str, float]) -> tuple[float, str]:
    """Of a work on a GPU, and by what it is bound."""
    total, bounds = 0.0, set()
    for way, moved in work.bytes.items():
        by_bytes = moved / gpu.bandwidth
        # A density is of a thread's bytes: 32 threads issue one instruction.
        issued = densities.get(way, 0.0) * moved / 32
        by_issue = issued / (gpu.processors * 4 * gpu.clock)
        by_launch = work.launches[way] * LAUNCH
        total += max(by_bytes, by_issue) + by_launch
        longest = {"bytes": by_bytes, "instructions": by_issue, "launch": by_launch}
        bounds.add(max(longest, key=lambda bound: longest[bound]))
    return total, "+".join(sorted(bounds))


def predictions(
    names: list[str], shapes: str, dtype: str, last: bool, kernels: list[sass.Kernel]
) -> Iterator[dict[str, Any]]:
    for work in works(shapes, dtype, last):
        result: dict[str, Any] = {
            "op": work.row.op, "case": work.row.case, "what": work.what, "x": list(work.shape),
            "dtype": dtype, "channels_last": last, "mb": sum(work.bytes.values()) / 1e6,
            "launches": sum(work.launches.values()), "instructions": {}, "predicted_us": {},
            "bound": {},
        }  # fmt: skip
        for name in names:
            gpu = GPUS[name]
            found = {w: density(kernels, work.row.op, w, dtype, gpu.arch) for w in work.bytes}
            if all(found.values()):
                issued = sum(found[way] * moved for way, moved in work.bytes.items())
                result["instructions"][name] = issued
            seconds, bound = least_seconds(work, gpu, found)
            result["predicted_us"][name] = 1e6 * seconds
            result["bound"][name] = bound
        yield result


def measured_us(result: dict[str, Any], shapes: str, device: str = "cuda") -> float:
    """The median time of the device's kernels, on the GPU that is here."""
    row = next(r for r in rows_of(shapes) if (r.op, r.case) == (result["op"], result["case"]))
    batch, *size = SHAPES[shapes]
    inputs = row.make(Make(batch, DTYPES[result["dtype"]], device, result["channels_last"]), *size)
    y = row.call(*inputs, impl="reference").detach()
    ops.check(row, inputs, device)
    dy = ops.direction(y) if result["what"] != "forward" else None
    calls = ops.captured(ops.step(row, inputs, device, dy))
    times = ops.measure({"": calls}, 20, device)
    return 1e6 * statistics.median(times[""]) / ops.GRAPH_CALLS


def here() -> str:
    """The GPU of this machine, one of GPUS, or "" for another."""
    if not torch.cuda.is_available():
        raise SystemExit("predicted: --measured needs a GPU, and this machine has none")
    return gpu_of(torch.cuda.get_device_name())


def gpu_of(device: str) -> str:
    """By the driver's name of a GPU: others of the family have another bandwidth or clock."""
    return next((name for name, gpu in GPUS.items() if device.endswith(gpu.device)), "")


def table(results: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    measured = any("measured_us" in r for r in results)
    head = ["op", "x", "pass", "MB", "M instructions", "launches"]
    head += [*(f"{name}, us" for name in names), "bound"]
    rows = [head + (["measured, us", "over predicted"] if measured else [])]
    for r in results:
        cells = [f"{r['op']} {r['case']}".strip(), "x".join(map(str, r["x"])), r["what"]]
        cells += [f"{r['mb']:.1f}", millions(r["instructions"].values()), str(r["launches"])]
        cells += [f"{r['predicted_us'][name]:.1f}" for name in names]
        cells.append(bound(r["bound"]))
        if measured:
            ratio = r["measured_us"] / r["predicted_us"][names[0]]
            cells += [f"{r['measured_us']:.1f}", f"{ratio:.2f}"]
        rows.append(cells)
    return rows


def millions(counts: Iterable[float]) -> str:
    """The least and the most, where the compiled code differs from GPU to GPU."""
    shown = [f"{count / 1e6:.1f}" for count in sorted(counts)]
    return " to ".join(dict.fromkeys(shown[:1] + shown[-1:])) or "-"


def bound(by_gpu: dict[str, str]) -> str:
    """What bounds the time: of all GPUs, or a name for each kind."""
    kinds: dict[str, list[str]] = {}
    for name, kind in by_gpu.items():
        kinds.setdefault(kind, []).append(name)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())


def compiled(paths: list[Path], names: list[str]) -> list[sass.Kernel]:
    """The kernels of the libraries, or of gankern/_cuda.so; none without one."""
    library = ROOT / "gankern/_cuda.so"
    if not paths and not library.exists():
        return []
    archs = tuple({GPUS[name].arch for name in names})
    return sass.read(paths or [library], archs)


def main() -> int:
    from launches import markdown, text

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpu", nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--shapes", choices=list(SHAPES), default="256")
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--sass", nargs="+", type=Path, metavar="FILE", default=[])
    parser.add_argument("--measured", action="store_true", help="real times beside, on a GPU")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results to FILE")
    args = parser.parse_args()
    names = [here()] if args.measured else args.gpu
    if not all(names):
        device = torch.cuda.get_device_name()
        print(f"predicted: {device} is not in the table; known are {', '.join(GPUS)}")
        return 0
    kernels = compiled(args.sass, names)
    results = list(predictions(names, args.shapes, args.dtype, args.channels_last, kernels))
    for result in results if args.measured else ():
        result["measured_us"] = measured_us(result, args.shapes)
    rows = table(results, names)
    title = "PREDICTION, the least time by counted bytes and data sheets; nothing was run on a GPU."
    if args.measured:
        title = f"Prediction, and times measured on {torch.cuda.get_device_name()}."
    if not kernels:
        title += " Without instructions: no compiled library."
    print(f"{title}\n\n{(markdown if args.markdown else text)(rows)}")
    if args.json:
        about = ops.machine("cuda" if args.measured else "cpu")
        with args.json.open("a") as file:
            file.writelines(json.dumps(about | {"kind": "predicted"} | r) + "\n" for r in results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
