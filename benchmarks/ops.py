"""How fast each op is: every implementation against the reference, in one run, interleaved.

    python benchmarks/ops.py                     what this machine can run, StyleGAN2-64, batch 8
    python benchmarks/ops.py --shapes 256 --impl cpu --op upfirdn2d --compile
    python benchmarks/ops.py --impl cpu --quick  small and short: does everything run
    python benchmarks/ops.py --json ops.jsonl    also appends one JSON line a row
    pytest benchmarks/ops.py --benchmark-json=ops.json

First every implementation is compared with the reference. Then rounds go through reference,
torch.compile (with --compile), the implementations and a plain copy, once each; printed are medians
with the 10 % and 90 % quantiles, the median of the rounds' ratios reference / implementation, GB/s
of the fewest bytes that the op must move, and their share of the copy's GB/s in the same rounds.
On a GPU each column is a CUDA graph of eight calls; what a call costs the CPU is overhead.py's to
tell. Tensors that fit the GPU's cache stay there between calls: --batch makes larger ones.
With --keep-memory freed memory stays with the process, as in `gankern train`: no column then pays
for fresh pages, which the reference touches most of.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gankern import ops  # noqa: E402
from gankern.memory import keep_memory  # noqa: E402
from gankern.ops import _impl  # noqa: E402

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
F4 = ops.setup_filter([1, 3, 3, 1])
GRAPH_CALLS = 8  # the gap between two replays is shared by so many


@functools.cache
def f4(device: torch.device) -> Tensor:
    """The filter there: a copy at every call would wait for the GPU."""
    return F4.to(device)


@dataclass
class Row:
    """An op on the tensors of a model. Bytes: forward reads the inputs and writes y; backward reads
    dy, `saved` (x, y or nothing) and the frozen inputs, and writes the gradients."""

    op: str
    case: str
    make: Callable[..., list[Tensor]]  # of (factory, resolution, channels), x first
    call: Callable[..., Tensor]  # of (*inputs, impl=)
    saved: str
    frozen: int = 0  # so many of the last inputs take no gradient
    # Bytes that the op also writes in the forward, and reads in the backward.
    kept: Callable[[list[Tensor], Tensor], tuple[int, int]] = lambda inputs, y: (0, 0)

    @property
    def name(self) -> str:
        return f"{self.op} {self.case}".strip()

    def forward_bytes(self, inputs: list[Tensor], y: Tensor) -> int:
        return sum(map(nbytes, inputs)) + nbytes(y) + self.kept(inputs, y)[0]

    def backward_bytes(self, inputs: list[Tensor], y: Tensor) -> int:
        saved = {"x": nbytes(inputs[0]), "y": nbytes(y), "": 0}[self.saved]
        return nbytes(y) + saved + sum(map(nbytes, inputs)) + self.kept(inputs, y)[1]

    def leaves(self, inputs: list[Tensor]) -> list[Tensor]:
        return inputs[: len(inputs) - self.frozen]


def nbytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def filtered(up: int, down: int, pads: list[int]) -> Callable[..., Tensor]:
    def call(x: Tensor, f: Tensor, impl: str) -> Tensor:
        return ops.upfirdn2d(x, f, up, down, pads, gain=up * up, impl=impl)

    return call


def square_sums(inputs: list[Tensor], d: Tensor) -> tuple[int, int]:
    """q [O, I], which demod_coefs also returns, and for the backward q, the styles and d.

    Without q both passes would move 7 % less in float32 and 13 % in float16. But ds would need the
    weights, nine times q, also where it is all that is wanted, and its sums over the output
    channels would limit a launch to a block for every 8 or 16 input channels."""
    weight, styles = inputs
    q = weight.shape[0] * weight.shape[1] * d.element_size()
    return q, q + nbytes(styles) + nbytes(d)


def epilogue(x, d, b, strength, noise, impl):
    f, pads = (f4(x.device), 1) if x.shape[-1] % 2 else (None, 0)
    factor = 1 if f is None else 4
    return ops.synthesis_epilogue(x, f, d, noise, strength, b, pads, filter_gain=factor, impl=impl)


def layer(x, weight, styles, b, strength, noise, impl):
    up = noise.shape[-1] // x.shape[-1]
    f = f4(x.device) if up > 1 else None
    return ops.synthesis_layer(x, weight, styles, b, noise, strength, up, 1, f, impl=impl)


def gemm(x, weight, styles, b, strength, noise, impl):
    # Triton's products of float32 are exact, and are compared with cuDNN's that are so too.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return ops.modulated_gemm(x, weight, styles, b, noise, strength, impl=impl)


def epilogue_inputs(m, res, c, pixels):
    return [m(c, pixels, pixels), m(c).float(), m.vector(c), m.vector(1), m(1, res, res)]


def layer_inputs(m, res, c, pixels, channels):
    weight, styles = m.tensor(c, channels, 3, 3), m(channels)
    return [m(channels, pixels, pixels), weight, styles, m.vector(c), m.vector(1), m(1, res, res)]


# res: the image's side, c: its channels in the generator, twice as many at half the side.
ROWS = [
    Row("bias_act", "lrelu", lambda m, res, c: [m(c, res, res), m.vector(c)],
        lambda x, b, impl: ops.bias_act(x, b, act="lrelu", impl=impl), "y"),
    Row("pixel_norm", "image", lambda m, res, c: [m(c, res, res)],
        lambda x, impl: ops.pixel_norm(x, impl=impl), "x"),
    Row("pixel_norm", "latent", lambda m, res, c: [m(512)],
        lambda x, impl: ops.pixel_norm(x, impl=impl), "x"),
    Row("minibatch_stddev", "", lambda m, res, c: [m(512, 4, 4)],
        lambda x, impl: ops.minibatch_stddev(x, impl=impl), "x"),
    Row("adain", "", lambda m, res, c: [m(c, res, res), m(c), m(c)],
        lambda x, scale, shift, impl: ops.adain(x, scale, shift, impl=impl), "x"),
    Row("demod_coefs", "", lambda m, res, c: [m.tensor(2 * c, 2 * c, 3, 3), m(2 * c)],
        lambda weight, styles, impl: ops.demod_coefs(weight, styles, impl=impl), "x",
        kept=square_sums),
    Row("upfirdn2d", "up 2", lambda m, res, c: [m(c, res // 2, res // 2), F4.to(m.device)],
        filtered(2, 1, [2, 1, 2, 1]), "", frozen=1),
    Row("upfirdn2d", "down 2", lambda m, res, c: [m(c, res, res), F4.to(m.device)],
        filtered(1, 2, [1, 1, 1, 1]), "", frozen=1),
    Row("upfirdn2d", "blur", lambda m, res, c: [m(c, res + 1, res + 1), F4.to(m.device)],
        filtered(1, 1, [1, 1, 1, 1]), "", frozen=1),
    Row("synthesis_epilogue", "", lambda m, res, c: epilogue_inputs(m, res, c, res),
        epilogue, "x", frozen=1),
    Row("synthesis_epilogue", "up 2", lambda m, res, c: epilogue_inputs(m, res, c, res + 1),
        epilogue, "x", frozen=1),
    Row("synthesis_layer", "", lambda m, res, c: layer_inputs(m, res, c, res, c),
        layer, "x", frozen=1),
    Row("synthesis_layer", "up 2", lambda m, res, c: layer_inputs(m, res, c, res // 2, 2 * c),
        layer, "x", frozen=1),
    # triton: one launch; the others: torch's convolution and their epilogue.
    Row("modulated_gemm", "", lambda m, res, c: layer_inputs(m, res, c, res, c),
        gemm, "x", frozen=1),
]  # fmt: skip

# Batch, side, channels: StyleGAN2 with 16384 / side channels at the last resolution.
SHAPES = {"64": (8, 64, 256), "256": (4, 256, 64), "quick": (2, 16, 8)}


@dataclass
class Make:
    """Makes a row's inputs: m(c, h, w) is a batch of that shape, in the dtype and memory format."""

    batch: int
    dtype: torch.dtype
    device: str
    channels_last: bool = False

    def __call__(self, *shape: int) -> Tensor:
        x = self.tensor(self.batch, *shape)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def tensor(self, *shape: int) -> Tensor:
        """Unit normal values, the same in every run."""
        values = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randn(*shape, generator=values, device=self.device).to(self.dtype)

    def vector(self, n: int) -> Tensor:
        """A parameter: float32 beside a 16-bit x."""
        return self.tensor(n).float()


def implementations(device: str) -> list[str]:
    return ["triton", "cuda"] if device == "cuda" else ["cpu"]


def usable(row: Row, impl: str, device: str) -> str:
    """Why `impl` cannot run the row here, or ""."""
    parts = {"synthesis_layer": "synthesis_epilogue"}
    if impl != "triton":
        parts["modulated_gemm"] = "synthesis_epilogue"
    return _impl.why_not(impl, device, parts.get(row.op, row.op))


# --- Measuring.


def step(row: Row, inputs: list[Tensor], impl: str, dy: Tensor | None) -> Callable[[], Any]:
    """Forward, or with dy forward and backward."""
    run = functools.partial(row.call, impl=impl)
    if dy is None:
        return lambda: run(*inputs)
    leaves = [t.detach().requires_grad_() for t in row.leaves(inputs)]
    rest = inputs[len(leaves) :]
    return lambda: torch.autograd.grad(run(*leaves, *rest), leaves, dy)


def compiled_step(row: Row, inputs: list[Tensor], dy: Tensor | None) -> Callable[[], Any]:
    torch._dynamo.reset()  # after a few graphs of one function it would run the function instead
    call = torch.compile(
        functools.partial(row.call, impl="reference"), fullgraph=True, dynamic=False
    )
    return step(Row(row.op, row.case, row.make, lambda *t, impl: call(*t), "", row.frozen), inputs,
                "", dy)  # fmt: skip


def seconds(
    f: Callable[[], Any], calls: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    start = clock()
    for _ in range(calls):
        f()
    if device != "cuda":
        return (clock() - start) / calls
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def measure(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each step in each round; a round runs all, each for at least a millisecond."""
    calls = {}
    for name, f in steps.items():
        f()
        once = seconds(f, 1, device, clock)
        calls[name] = max(1, min(200, int(1e-3 / max(once, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, f in steps.items():
            times[name].append(seconds(f, calls[name], device, clock))
    return times


def captured(f: Callable[[], Any], calls: int = GRAPH_CALLS) -> Callable[[], None]:
    """So many calls of f as one CUDA graph: the GPU's time, whatever a launch costs the CPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    return graph.replay


def check(row: Row, inputs: list[Tensor], impl: str) -> None:
    """The output is the reference's, to a few roundings."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        actual, expected = (row.call(*inputs, impl=i) for i in (impl, "reference"))
    error = (actual.double() - expected.double()).abs().max().item()
    bound = 64 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    if not error <= bound or actual.shape != expected.shape:
        raise SystemExit(f"ops: {row.name} {impl}: error {error:.3g} over {bound:.3g}")


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def results(
    row: Row, make: Make, shape: tuple[int, int], impls: list[str], rounds: int, compiled: bool
) -> Iterator[dict[str, Any]]:
    inputs = row.make(make, *shape)
    y = row.call(*inputs, impl="reference").detach()
    names = ["reference", *(i for i in impls if not usable(row, i, make.device))]
    for impl in names[1:]:
        check(row, inputs, impl)
    target, about = torch.empty_like(y), {"op": row.op, "case": row.case}
    about |= {"x": list(inputs[0].shape), "dtype": str(make.dtype)[6:]}
    about |= {"channels_last": make.channels_last}
    for what, dy in (("forward", None), ("forward+backward", torch.ones_like(y))):
        steps = {impl: step(row, inputs, impl, dy) for impl in names}
        if compiled:
            steps["compile"] = compiled_step(row, inputs, dy)
        # A GPU's copy of memory, which copy_ is, is slower than a kernel that reads and writes.
        copy = functools.partial(torch.neg, y, out=target)
        steps["copy"] = copy if make.device == "cuda" else functools.partial(target.copy_, y)
        moved = row.forward_bytes(inputs, y)
        moved += 0 if dy is None else row.backward_bytes(inputs, y)
        if make.device == "cuda":
            steps = {name: captured(f) for name, f in steps.items()}
        times = measure(steps, rounds, make.device)
        if make.device == "cuda":
            times = {name: [t / GRAPH_CALLS for t in values] for name, values in times.items()}
        copied = times.pop("copy")
        copy_rate = 2 * nbytes(y) / statistics.median(copied)
        for impl, values in times.items():
            found = figures(values, times["reference"], moved, copy_rate)
            yield about | {"what": what, "impl": impl} | found


def figures(
    values: list[float], reference: list[float], moved: int, copy_rate: float
) -> dict[str, float]:
    rate = moved / statistics.median(values)
    return {
        "ms": 1e3 * statistics.median(values),
        "ms_10": 1e3 * quantile(values, 0.1),
        "ms_90": 1e3 * quantile(values, 0.9),
        "ratio": statistics.median(r / v for r, v in zip(reference, values, strict=True)),
        "gb_s": rate / 1e9,
        "of_copy": rate / copy_rate,
    }


def machine(device: str) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "rev-parse", "HEAD"] if shutil.which("git") else ["true"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else (names or [model])[0],
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "triton": getattr(_impl.triton, "__version__", None), "python": platform.python_version(),
        "commit": commit.stdout.strip(), "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip


def show(r: dict[str, Any]) -> None:
    print(f"{r['op'] + ' ' + r['case']:26} {'x'.join(map(str, r['x'])):14} {r['what']:16} "
          f"{r['impl']:9} {r['ms']:9.3f} [{r['ms_10']:8.3f} {r['ms_90']:8.3f}] {r['ratio']:6.2f}x "
          f"{r['gb_s']:8.2f} {r['of_copy']:6.0%}", flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    on = "cuda" if torch.cuda.is_available() else "cpu"
    names = list(dict.fromkeys(row.op for row in ROWS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default=on)
    parser.add_argument("--impl", nargs="+", help="default: all of the device")
    parser.add_argument("--op", nargs="+", choices=names, default=names)
    parser.add_argument("--shapes", nargs="+", choices=["64", "256"], default=["64"])
    parser.add_argument("--batch", type=int, help="default: 8 of 64, 4 of 256")
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also torch.compile(reference)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small tensors, two rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results to FILE")
    parser.add_argument("--keep-memory", action="store_true", help="as the command gankern does")
    args = parser.parse_args()
    if args.keep_memory:
        keep_memory()
    about = machine(args.device)
    print(" ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{'op':26} {'x':14} {'what':16} {'impl':9} {'median ms':>9} [{'10 %':>8} {'90 %':>8}] "
          f"{'ratio':>7} {'GB/s':>8} {'copy':>6}")  # fmt: skip
    for shapes in ["quick"] if args.quick else args.shapes:
        batch, *shape = SHAPES[shapes]
        make = Make(args.batch or batch, DTYPES[args.dtype], args.device, args.channels_last)
        for row in (row for row in ROWS if row.op in args.op):
            impls = args.impl or implementations(args.device)
            rounds = 2 if args.quick else args.rounds
            for result in results(row, make, shape, impls, rounds, args.compile):
                show(result)
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps(about | result) + "\n")
    return 0


# --- The same rows for pytest-benchmark.


def pytest_generate_tests(metafunc: Any) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [
        (row, impl, device, backward)
        for row in ROWS
        for impl in ("reference", *implementations(device))
        for backward in (False, True)
        if not usable(row, impl, device)
    ]
    ids = [f"{row.name}-{impl}-{'backward' if back else 'forward'}" for row, impl, _, back in cases]
    metafunc.parametrize(("row", "impl", "device", "backward"), cases, ids=ids)


def test_ops(benchmark: Any, row: Row, impl: str, device: str, backward: bool) -> None:
    batch, res, channels = SHAPES["64"]
    inputs = row.make(Make(batch, torch.float32, device), res, channels)
    y = row.call(*inputs, impl="reference").detach()
    check(row, inputs, impl)
    run = step(row, inputs, impl, torch.ones_like(y) if backward else None)
    benchmark.extra_info["bytes"] = row.forward_bytes(inputs, y)
    if device == "cpu":
        benchmark(run)
    else:
        benchmark(lambda: (run(), torch.cuda.synchronize()))


if __name__ == "__main__":
    sys.exit(main())
