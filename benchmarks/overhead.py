"""What a call costs before any work: each op on one element, beside two eager elementwise ops.

    python benchmarks/overhead.py                 microseconds a call, allocations
    python benchmarks/overhead.py --op bias_act --rounds 50 --processes 1
    python benchmarks/overhead.py --check         exit 1 if an op costs more than the two eager ops
    python benchmarks/overhead.py --json overhead.jsonl

Columns: forward of tensors that take no gradient, of such that do, forward and backward. Rounds go
through all ops and the eager pair, x * scale + b of one shape, once each, in a new order each time,
since a step finds memory and caches as the one before has left them; a process counts by its
medians, of the time and of the rounds' ratios to the pair's. Where code and memory lie favours one
or the other by some percent for as long as a process lives, so several are run, one after another;
printed are their medians, and the least and the largest ratio. The pair has as many dimensions as
the op's result, since torch.autograd.grad compares those of y and dy one by one in Python. As in
Python's timeit, garbage is not collected meanwhile: it would be at one op's cost. On a CPU the time
is that of the process, which a busy machine disturbs less; on a GPU it is the host's, and nothing
waits for the device. Allocations are those of a forward on a CPU, by PyTorch's profiler, and of
them the bytes beyond the outputs'.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ops import implementations, machine, nbytes

from gankern import ops
from gankern.ops import _impl

PAIR = "two eager ops"
WAYS = ("forward", "recorded", "forward+backward")
Call = Callable[..., Tensor]  # of (*inputs, impl=)

# Shapes of the inputs that take a gradient, x first, and the call.
CALLS: dict[str, tuple[list[tuple[int, ...]], Call]] = {
    "bias_act": (
        [(1, 1, 1, 1), (1,)],
        lambda x, b, impl: ops.bias_act(x, b, act="lrelu", impl=impl),
    ),
    "pixel_norm": ([(1, 1)], lambda x, impl: ops.pixel_norm(x, impl=impl)),
    "minibatch_stddev": ([(1, 1, 1, 1)], lambda x, impl: ops.minibatch_stddev(x, impl=impl)),
    "adain": (
        [(1, 1, 1, 1), (1, 1), (1, 1)],
        lambda x, scale, shift, impl: ops.adain(x, scale, shift, impl=impl),
    ),
    "demod_coefs": (
        [(1, 1, 1, 1), (1, 1)],
        lambda weight, styles, impl: ops.demod_coefs(weight, styles, impl=impl),
    ),
    "upfirdn2d": ([(1, 1, 1, 1)], lambda x, impl: ops.upfirdn2d(x, one(x), impl=impl)),
    "synthesis_epilogue": (
        [(1, 1, 1, 1), (1, 1), (1,)],
        lambda x, d, b, impl: ops.synthesis_epilogue(x, None, d, b=b, impl=impl),
    ),
}
# The same of the eager pair, of a number of dimensions.
PAIRS: dict[int, tuple[list[tuple[int, ...]], Call]] = {
    dims: ([(1,) * dims] * 3, lambda x, scale, b, impl: x * scale + b) for dims in (2, 4)
}
_ones: dict[bool, Tensor] = {}


def one(x: Tensor) -> Tensor:
    """A filter of one tap, on x's device, made once; the look-up shall cost nothing to speak of."""
    found = _ones.get(x.is_cuda)
    if found is None:
        found = _ones[x.is_cuda] = torch.ones(1, 1, device=x.device)
    return found


def dims_of(name: str, impl: str, device: str) -> int:
    """Of an op's result."""
    shapes, call = CALLS[name]
    return call(*(torch.ones(shape, device=device) for shape in shapes), impl=impl).ndim


def calls(name: str | int, impl: str, device: str) -> dict[str, Callable[[], Any]]:
    """A call without arguments for each of WAYS, of an op or of the pair of so many dimensions."""
    shapes, call = PAIRS[name] if isinstance(name, int) else CALLS[name]
    inputs = [torch.ones(shape, device=device) for shape in shapes]
    leaves = [t.clone().requires_grad_() for t in inputs]
    dy = torch.ones_like(call(*inputs, impl=impl))

    return {
        "forward": lambda: call(*inputs, impl=impl),
        "recorded": lambda: call(*leaves, impl=impl),
        "forward+backward": lambda: torch.autograd.grad(call(*leaves, impl=impl), leaves, dy),
    }


def host_seconds(f: Callable[[], Any], count: int) -> float:
    """Of one call, without waiting for a device; the first few, which fetch the code that the step
    before has pushed out of the caches, are not counted."""
    for _ in range(10):
        f()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    for _ in range(count):
        f()
    seconds = (clock() - start) / count
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return seconds


def measure(
    names: list[str | int], impl: str, device: str, rounds: int, count: int = 100
) -> dict[tuple[str | int, str], list[float]]:
    """Seconds a call of each (name, way) in each round."""
    steps = {(n, way): f for n in names for way, f in calls(n, impl, device).items()}
    for f in steps.values():
        host_seconds(f, 20)
    times: dict[tuple[str | int, str], list[float]] = {key: [] for key in steps}
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            order = random.sample(list(steps), len(steps))
            for key in order:
                times[key].append(host_seconds(steps[key], count))
    finally:
        if collects:
            gc.enable()
    return times


def allocations(f: Callable[[], Any]) -> list[int]:
    """Bytes of each allocation on the CPU that f makes."""
    f()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = f()
    del kept
    events = profiler.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def beyond_outputs(f: Callable[[], Any]) -> int:
    """Bytes that f allocates in addition to its outputs, a tensor or several."""
    out = f()
    outputs = [out] if isinstance(out, Tensor) else [t for t in out if t is not None]
    return sum(allocations(f)) - sum(map(nbytes, outputs))


def results(names: list[str], impl: str, device: str, rounds: int) -> list[dict[str, Any]]:
    dims: dict[str | int, int] = {name: dims_of(name, impl, device) for name in names}
    pairs = {n: n for n in sorted(set(dims.values()))}
    times = measure([*pairs, *names], impl, device, rounds)
    rows = []
    for name, n in (pairs | dims).items():
        row: dict[str, Any] = {"op": PAIR if name == n else name, "dims": n, "impl": impl}
        for way in WAYS:
            both = zip(times[name, way], times[n, way], strict=True)
            row[way] = 1e6 * statistics.median(times[name, way])
            row[f"{way} ratio"] = statistics.median(a / b for a, b in both)
        if device == "cpu" and name != n:
            call = calls(name, impl, device)["forward"]
            row |= {"allocations": len(allocations(call)), "beyond": beyond_outputs(call)}
        rows.append(row)
    return rows


def of_processes(
    names: list[str], impl: str, device: str, rounds: int, processes: int
) -> list[dict[str, Any]]:
    """`results` of fresh processes, one after another."""
    fresh, runs = multiprocessing.get_context("spawn"), []
    for _ in range(processes):
        with ProcessPoolExecutor(1, mp_context=fresh) as pool:
            runs.append(pool.submit(results, names, impl, device, rounds).result())
    return combined(runs)


def combined(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The medians of runs' rows, and for each way the ratio of every run."""
    rows = []
    for same in zip(*runs, strict=True):
        row = dict(same[0])
        for way in WAYS:
            row[way] = statistics.median(r[way] for r in same)
            row[f"{way} ratio"] = statistics.median(r[f"{way} ratio"] for r in same)
            row[f"{way} ratios"] = [r[f"{way} ratio"] for r in same]
        rows.append(row)
    return rows


def least_to_largest(ratios: list[float]) -> str:
    return f"{min(ratios):.2f}-{max(ratios):.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    on = "cuda" if torch.cuda.is_available() else "cpu"
    known = list(CALLS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=on)
    parser.add_argument("--impl", help="default: the best of the device")
    parser.add_argument("--op", nargs="+", choices=known, default=known)
    parser.add_argument("--rounds", type=int, default=20, help="of each process")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="exit 1 if a ratio is over 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results to FILE")
    args = parser.parse_args()
    if min(args.rounds, args.processes) < 1:
        parser.error("--rounds and --processes must be at least 1")
    impl = args.impl or implementations(args.device)[-1]
    names = [n for n in args.op if not _impl.why_not(impl, args.device, n)]
    about = machine(args.device)
    print(" ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{'us a call, and over the pair':30}" + "".join(f"{way:>27}" for way in WAYS))
    slower = []
    for row in of_processes(names, impl, args.device, args.rounds, args.processes):
        columns = "".join(
            f"{row[w]:10.2f} {row[w + ' ratio']:5.2f}x {least_to_largest(row[w + ' ratios'])}"
            for w in WAYS
        )
        extra = ""
        if "allocations" in row:
            extra = f"  {row['allocations']} allocations, {row['beyond']} bytes beyond the outputs"
        name = row["op"] + (f", {row['dims']} dimensions" if row["op"] == PAIR else "")
        print(f"{name:30}{columns}{extra}")
        slower += [f"{row['op']} {w}" for w in WAYS if row[w + " ratio"] > 1]
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(about | row) + "\n")
    print(
        f"slower than the pair: {', '.join(slower)}" if slower else "none is slower than the pair"
    )
    return int(bool(slower) and args.check)


if __name__ == "__main__":
    sys.exit(main())
