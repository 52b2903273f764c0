"""How fast each op is: every implementation against the reference, in one run, interleaved.

    python benchmarks/ops.py                     what this machine can run, StyleGAN2-64, batch 8
    python benchmarks/ops.py --shapes 256 --impl cpu --op upfirdn2d --compile
    python benchmarks/ops.py --shapes dcgan-64 64 256 1024 --dtype f32 bf16 --layout channels-last
    python benchmarks/ops.py --impl cpu --quick  small and short: does everything run
    python benchmarks/ops.py --json ops.jsonl    also appends one JSON line a row
    pytest benchmarks/ops.py --benchmark-json=ops.json

Directions: forward; forward and backward; double-backward, which is forward, backward and the
gradient of the squared length of the gradient in x, as in R1. First the results of every
implementation in each are compared with the reference's. Then rounds go through reference,
torch.compile (with --compile; it has no second derivative), the implementations and a plain copy,
once each; printed are medians with the 10 % and 90 % quantiles, the median of the rounds' ratios
reference / implementation, GB/s of the fewest bytes that the op must move, and their share of the
copy's GB/s in the same rounds.
On a GPU each column is a CUDA graph of eight calls; what a call costs the CPU is overhead.py's to
tell. Tensors that fit the GPU's cache stay there between calls: --batch makes larger ones.
What does not run, or differs from the reference, is told on stderr, and the exit status is 1; the
other rows are timed.
With --keep-memory freed memory stays with the process, as in `gankern train`: no column then pays
for fresh pages, which the reference touches most of.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gankern import ops  # noqa: E402
from gankern.memory import keep_memory  # noqa: E402
from gankern.models import dcgan  # noqa: E402
from gankern.ops import _impl  # noqa: E402
from gankern.ops.batch_norm_act import batch_norm_act  # noqa: E402

WAYS = ("forward", "forward+backward", "double-backward")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
F4 = ops.setup_filter([1, 3, 3, 1])
LAYOUTS = ("nchw", "channels-last")
GRAPH_CALLS = 8  # the gap between two replays is shared by so many


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
    convolves: bool = False  # is composed of other ops and a convolution
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


def epilogue(x, d, b, strength, noise, f=None, *, impl):
    pads, factor = (0, 1) if f is None else (1, 4)
    return ops.synthesis_epilogue(x, f, d, noise, strength, b, pads, filter_gain=factor, impl=impl)


def layer(x, weight, styles, b, strength, noise, f=None, *, impl):
    up = noise.shape[-1] // x.shape[-1]
    return ops.synthesis_layer(x, weight, styles, b, noise, strength, up, 1, f, impl=impl)


def to_rgb(x, weight, styles, impl):
    return ops.modulated_conv2d(x, weight, styles, demodulate=False, impl=impl)


def halving_layer(x, weight, b, f, impl):
    return ops.conv2d_layer(x, weight, b, f, down=2, padding=1, act="lrelu", impl=impl)


def strided(transposed: bool) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, impl: str) -> Tensor:
        return dcgan.halve_or_double(x, weight, transposed, impl)

    return call


def normalised(x, weight, bias, mean, var, impl):
    return batch_norm_act(x, weight, bias, mean, var, act="relu", gain=1, impl=impl)


def gemm(x, weight, styles, b, strength, noise, impl):
    return ops.modulated_gemm(x, weight, styles, b, noise, strength, impl=impl)


def epilogue_inputs(m, res, c, pixels):
    x, d, b = m(c, pixels, pixels), m(c).float(), m.vector(c)
    return [x, d, b, m.vector(1), m(1, res, res), *m.filter(pixels != res)]


def layer_inputs(m, res, c, pixels, channels):
    x, weight, styles = m(channels, pixels, pixels), m.tensor(c, channels, 3, 3), m(channels)
    return [x, weight, styles, m.vector(c), m.vector(1), m(1, res, res), *m.filter(pixels != res)]


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
    Row("upfirdn2d", "up 2", lambda m, res, c: [m(c, res // 2, res // 2), *m.filter()],
        filtered(2, 1, [2, 1, 2, 1]), "", frozen=1),
    Row("upfirdn2d", "down 2", lambda m, res, c: [m(c, res, res), *m.filter()],
        filtered(1, 2, [1, 1, 1, 1]), "", frozen=1),
    Row("upfirdn2d", "blur", lambda m, res, c: [m(c, res + 1, res + 1), *m.filter()],
        filtered(1, 1, [1, 1, 1, 1]), "", frozen=1),
    Row("synthesis_epilogue", "", lambda m, res, c: epilogue_inputs(m, res, c, res),
        epilogue, "x", frozen=1),
    Row("synthesis_epilogue", "up 2", lambda m, res, c: epilogue_inputs(m, res, c, res + 1),
        epilogue, "x", frozen=2),
    Row("synthesis_layer", "", lambda m, res, c: layer_inputs(m, res, c, res, c),
        layer, "x", frozen=1, convolves=True),
    Row("synthesis_layer", "up 2", lambda m, res, c: layer_inputs(m, res, c, res // 2, 2 * c),
        layer, "x", frozen=2, convolves=True),
    Row("modulated_conv2d", "to RGB",
        lambda m, res, c: [m(c, res, res), m.tensor(3, c, 1, 1), m(c)],
        to_rgb, "x", convolves=True),
    Row("conv2d_layer", "down 2",
        lambda m, res, c: [m(c, res, res), m.tensor(2 * c, c, 3, 3), m.vector(2 * c), *m.filter()],
        halving_layer, "x", frozen=1, convolves=True),
    # triton: one launch; the others: torch's convolution and their epilogue.
    Row("modulated_gemm", "", lambda m, res, c: layer_inputs(m, res, c, res, c),
        gemm, "x", frozen=1, convolves=True),
]  # fmt: skip
# res: the image's side, c: the channels of the layer nearest to it.
DCGAN_ROWS = [
    Row("bias_act", "relu", lambda m, res, c: [m(c, res // 2, res // 2)],
        lambda x, impl: ops.bias_act(x, act="relu", gain=1, impl=impl), "y"),
    Row("bias_act", "lrelu", lambda m, res, c: [m(c, res // 2, res // 2), m.vector(c)],
        lambda x, b, impl: ops.bias_act(x, b, act="lrelu", gain=1, impl=impl), "y"),
    Row("bias_act", "tanh", lambda m, res, c: [m(3, res, res), m.vector(3)],
        lambda x, b, impl: ops.bias_act(x, b, act="tanh", impl=impl), "y"),
    Row("batch_norm_act", "relu",
        lambda m, res, c: [m(c, res // 2, res // 2), *(m.vector(c) for _ in range(4))],
        normalised, "x", frozen=2),
    Row("convolution", "halving RGB", lambda m, res, c: [m(3, res, res), m.tensor(c, 3, 4, 4)],
        strided(False), "x", convolves=True),
    Row("convolution", "halving",
        lambda m, res, c: [m(c, res // 2, res // 2), m.tensor(2 * c, c, 4, 4)],
        strided(False), "x", convolves=True),
    Row("convolution", "doubling",
        lambda m, res, c: [m(2 * c, res // 4, res // 4), m.tensor(2 * c, c, 4, 4)],
        strided(True), "x", convolves=True),
    Row("convolution", "doubling to RGB",
        lambda m, res, c: [m(c, res // 2, res // 2), m.tensor(c, 3, 4, 4)],
        strided(True), "x", convolves=True),
]  # fmt: skip

CPU_ALONE = ("convolution", "batch_norm_act")  # what are PyTorch's on a GPU

# Batch, side, channels: StyleGAN2 with 16384 / side channels at the last resolution, or, at 1024,
# 32768; DCGAN with 64 at half the side.
SHAPES = {
    "dcgan-64": (64, 64, 64),
    "64": (8, 64, 256),
    "256": (4, 256, 64),
    "1024": (1, 1024, 32),
    "quick": (2, 16, 8),
}


def rows_of(shapes: str) -> list[Row]:
    """Of a model, or of all."""
    return {"dcgan-64": DCGAN_ROWS, "quick": ROWS + DCGAN_ROWS}.get(shapes, ROWS)


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

    def filter(self, wanted: bool = True) -> list[Tensor]:
        """An input like others: to fetch it within the call would wait for a GPU."""
        return [F4.to(self.device)] if wanted else []


def implementations(device: str) -> list[str]:
    return ["triton", "cuda"] if device == "cuda" else ["cpu"]


def usable(row: Row, impl: str, device: str) -> str:
    """Why `impl` cannot run the row here, or ""."""
    if row.op in CPU_ALONE:
        return "" if impl == device == "cpu" else "it is PyTorch's"
    part = row.op
    if row.convolves and (row.op, impl) != ("modulated_gemm", "triton"):
        part = "synthesis_epilogue"
    return _impl.why_not(impl, device, part)


# --- Measuring.


def direction(y: Tensor) -> Tensor:
    """A gradient of y, of unit normal values, the same in every run."""
    return torch.empty_like(y).normal_(generator=torch.Generator(y.device).manual_seed(1))


def step(
    row: Row, inputs: list[Tensor], impl: str, dy: Tensor | None, double: bool = False
) -> Callable[[], Any]:
    """Forward, or with dy forward and backward, or these and double backward."""
    run = functools.partial(row.call, impl=impl)
    if dy is None:
        return lambda: run(*inputs)
    leaves = [t.detach().requires_grad_() for t in row.leaves(inputs)]
    rest = inputs[len(leaves) :]
    if not double:
        return lambda: torch.autograd.grad(run(*leaves, *rest), leaves, dy)
    into = dy.detach().requires_grad_()  # what the layers above made

    def twice() -> tuple[Tensor | None, ...]:
        y = run(*leaves, *rest)
        (dx,) = torch.autograd.grad(y, leaves[:1], into, create_graph=True)
        # In the range of 16 bits both of a pixel and summed over them.
        length = dx.float().square().sum() / dx.numel() ** 0.5
        return torch.autograd.grad(length, [into, *leaves], allow_unused=True)

    return twice


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
        if seconds(f, 1, device, clock) < 1e-2:  # a remembered call is taken down meanwhile
            seconds(f, 3, device, clock)
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


def cudnn_products(exact: bool) -> Any:
    """cuDNN's products of float32 within are exact, or as PyTorch has them elsewhere."""
    tf32 = torch.backends.cudnn.allow_tf32 and not exact
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32)


class WrongResultError(Exception):
    pass


def check(row: Row, inputs: list[Tensor], impl: str) -> None:
    """The output is the reference's, to a few roundings; gradients are so in the mean, for those
    of an activation differ wholly where its argument rounds to another sign."""
    with cudnn_products(exact=True):
        actual, expected = (row.call(*inputs, impl=i) for i in (impl, "reference"))
        error = (actual.double() - expected.double()).abs().max().item()
        eps = torch.finfo(expected.dtype).eps
        bound = 64 * eps * expected.abs().max().item()
        if not error <= bound or actual.shape != expected.shape:
            raise WrongResultError(f"{impl}: error {error:.3g} over {bound:.3g}")
        dy = direction(expected)
        del actual, expected
        for double in (False, True):
            both = (step(row, inputs, i, dy, double)() for i in (impl, "reference"))
            for k, (a, e) in enumerate(zip(*both, strict=True)):
                if e is None or a is None:
                    nought = all(t is None or not t.any() for t in (a, e))
                    error, bound = float(not nought), 0.0
                else:
                    error = (a.double() - e.double()).norm().item()
                    bound = 4 * eps**0.5 * e.double().norm().item()
                if not error <= bound:
                    order = "second " if double else ""
                    raise WrongResultError(
                        f"{impl}: {order}gradient {k}: error {error:.3g} over {bound:.3g}"
                    )


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def results(
    row: Row,
    make: Make,
    shape: tuple[int, int],
    impls: list[str],
    rounds: int,
    compiled: bool,
    ways: Sequence[str] = WAYS,
    failed: list[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row's results; what does not run, or is wrong, is left out and told in `failed`."""
    inputs = row.make(make, *shape)
    y = row.call(*inputs, impl="reference").detach()
    names = ["reference"]
    for impl in (i for i in impls if not usable(row, i, make.device)):
        with or_told(failed):
            check(row, inputs, impl)
            names.append(impl)
    target, about = torch.empty_like(y), {"op": row.op, "case": row.case}
    about |= {"x": list(inputs[0].shape), "dtype": str(make.dtype)[6:]}
    about |= {"channels_last": make.channels_last}
    for what in ways:
        dy, double = (None, False) if what == WAYS[0] else (direction(y), what == WAYS[2])
        steps = {impl: step(row, inputs, impl, dy, double) for impl in names}
        if compiled and not double:
            steps["compile"] = compiled_step(row, inputs, dy)
        # A GPU's copy of memory, which copy_ is, is slower than a kernel that reads and writes.
        copy = functools.partial(torch.neg, y, out=target)
        steps["copy"] = copy if make.device == "cuda" else functools.partial(target.copy_, y)
        moved = None if double else row.forward_bytes(inputs, y)
        if moved is not None and dy is not None:
            moved += row.backward_bytes(inputs, y)
        ready: dict[str, Callable[[], Any]] = {}
        for name, f in steps.items():
            with or_told(failed if name in (*impls, "compile") else None, f"{what} of {name}: "):
                f()  # compiles
                ready[name] = captured(f) if make.device == "cuda" else f
        steps = ready
        times = measure(steps, rounds, make.device)
        if make.device == "cuda":
            times = {name: [t / GRAPH_CALLS for t in values] for name, values in times.items()}
        copied = times.pop("copy")
        copy_rate = 2 * nbytes(y) / statistics.median(copied)
        for impl, values in times.items():
            found = figures(values, times["reference"], moved, copy_rate)
            yield about | {"what": what, "impl": impl} | found


@contextlib.contextmanager
def or_told(failed: list[str] | None, where: str = "") -> Iterator[None]:
    """An error within is told in `failed`; raised, where that is None."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        first = next(iter(str(error).strip().splitlines()), "")
        failed.append(f"{where}{type(error).__name__}: {first}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def figures(
    values: list[float], reference: list[float], moved: int | None, copy_rate: float
) -> dict[str, float | None]:
    """moved: the fewest bytes, where they are known."""
    rate = None if moved is None else moved / statistics.median(values)
    return {
        "ms": 1e3 * statistics.median(values),
        "ms_10": 1e3 * quantile(values, 0.1),
        "ms_90": 1e3 * quantile(values, 0.9),
        "ratio": statistics.median(r / v for r, v in zip(reference, values, strict=True)),
        "gb_s": rate and rate / 1e9,
        "of_copy": rate and rate / copy_rate,
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
    layout = "last" if r["channels_last"] else "nchw"
    speed = "" if r["gb_s"] is None else f"{r['gb_s']:8.2f} {r['of_copy']:6.0%}"
    print(f"{r['op'] + ' ' + r['case']:27} {'x'.join(map(str, r['x'])):15} {r['dtype']:8} {layout} "
          f"{r['what']:16} {r['impl']:9} {r['ms']:9.3f} [{r['ms_10']:8.3f} {r['ms_90']:8.3f}] "
          f"{r['ratio']:6.2f}x {speed}".rstrip(), flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    on = "cuda" if torch.cuda.is_available() else "cpu"
    names = list(dict.fromkeys(row.op for row in ROWS + DCGAN_ROWS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default=on)
    parser.add_argument("--impl", nargs="+", help="default: all of the device")
    parser.add_argument("--op", nargs="+", choices=names, default=names)
    known = [name for name in SHAPES if name != "quick"]
    parser.add_argument("--shapes", nargs="+", choices=known, default=["64"],
                        help="those of StyleGAN2 at a resolution, or of DCGAN")  # fmt: skip
    batches = ", ".join(f"{SHAPES[name][0]} of {name}" for name in known)
    parser.add_argument("--batch", type=int, help=f"default: {batches}")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["f32"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS[:1])
    parser.add_argument("--way", nargs="+", choices=WAYS, default=WAYS, help="default: all")
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
    print(f"{'op':27} {'x':15} {'dtype':8} mem. {'what':16} {'impl':9} {'median ms':>9} "
          f"[{'10 %':>8} {'90 %':>8}] {'ratio':>7} {'GB/s':>8} {'copy':>6}")  # fmt: skip
    choices = itertools.product(args.dtype, args.layout)
    impls = args.impl or implementations(args.device)
    rounds = 2 if args.quick else args.rounds
    failed: list[str] = []
    for (dtype, layout), shapes in itertools.product(
        choices, ["quick"] if args.quick else args.shapes
    ):
        batch, *shape = SHAPES[shapes]
        last = layout == LAYOUTS[1]
        make = Make(args.batch or batch, DTYPES[dtype], args.device, last)
        for row in (row for row in rows_of(shapes) if row.op in args.op):
            # Triton's products of float32 are exact, and are compared with such ones.
            here: list[str] = []
            with or_told(here), cudnn_products(exact=row.op == "modulated_gemm"):
                for result in results(
                    row, make, shape, impls, rounds, args.compile, args.way, here
                ):
                    show(result)
                    if args.json:
                        with args.json.open("a") as file:
                            file.write(json.dumps(about | result) + "\n")
            for what in here:
                failed.append(f"{row.name} of {shapes}, {dtype}, {layout}: {what}")
                print(f"ops: {failed[-1]}", file=sys.stderr, flush=True)
    return int(bool(failed))


# --- The same rows for pytest-benchmark.


def pytest_generate_tests(metafunc: Any) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [
        (row, shapes, impl, device, way)
        for shapes in ("64", "dcgan-64")
        for row in rows_of(shapes)
        for impl in ("reference", *implementations(device))
        for way in WAYS
        if impl == "reference" or not usable(row, impl, device)
    ]
    ids = [f"{shapes}-{row.name}-{impl}-{way}" for row, shapes, impl, _, way in cases]
    metafunc.parametrize(("row", "shapes", "impl", "device", "way"), cases, ids=ids)


def test_ops(benchmark: Any, row: Row, shapes: str, impl: str, device: str, way: str) -> None:
    batch, res, channels = SHAPES[shapes]
    inputs = row.make(Make(batch, torch.float32, device), res, channels)
    y = row.call(*inputs, impl="reference").detach()
    check(row, inputs, impl)
    run = step(row, inputs, impl, None if way == WAYS[0] else direction(y), way == WAYS[2])
    benchmark.extra_info["bytes"] = row.forward_bytes(inputs, y)
    if device == "cpu":
        benchmark(run)
    else:
        benchmark(lambda: (run(), torch.cuda.synchronize()))


if __name__ == "__main__":
    sys.exit(main())
