"""How fast training is: each model's steps, against the reference, torch.compile and the floor.

    python benchmarks/steps.py                          StyleGAN2-64, StyleGAN-64 and DCGAN, batch 8
    python benchmarks/steps.py --model stylegan2-64 --step G R1 --compile
    OMP_NUM_THREADS=1 python benchmarks/steps.py --cpu-time   on a machine that others load
    python benchmarks/steps.py --breakdown              where the time goes, in both
    python benchmarks/steps.py --cuda-graphs            each step as one CUDA graph, on a GPU
    python benchmarks/steps.py --scaling                img/s over batch, size, channels, ranks
    python benchmarks/steps.py --json steps.jsonl       also appends one JSON line a row

Rounds go through all columns, once each, in one process; printed are the median, its quantiles and
the median of the rounds' ratios. Columns: ours (the best implementations), the reference (plain
PyTorch operations, same networks), torch.compile of the reference (not for the penalties, which
differentiate twice), and the floor: the step's dense convolutions and matrix products alone,
forward and backward as the reference runs them, by PyTorch, each in the faster of the two memory
formats; filters, which the reference runs as convolutions of a channel, are not among them. Our own
convolutions may undercut it. Peak memory is what the step allocates, above what was there.
With --keep-memory freed memory stays with the process, as in `gankern train`: no column then pays
for fresh pages, which the reference touches most of. On a GPU the CPU may not keep up with its
launches: --cuda-graphs replays every column's step as one graph, as `gankern train --cuda-graphs`
does, and leaves out torch.compile. What does not run is told on stderr, and the exit status is 1;
the other columns and steps are timed.

--scaling runs iterations of G's and D's steps of a small StyleGAN2 of one width, changing one size
at a time; ranks are processes of one thread that average their gradients as training does, where
there are GPUs on one each or not at all. With --cpu-time a rank's seconds are those that it
computed, as if it had a core of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ops import captured, figures, machine, measure, or_told, seconds

from gankern.memory import keep_memory
from gankern.models import dcgan, pggan, stylegan, stylegan2, vanilla, wgan
from gankern.ops import _impl
from gankern.ops.modulated_conv2d import no_weight_gradients
from gankern.training.distributed import average_gradients
from gankern.training.losses import LOSSES
from gankern.training.penalties import gradient_penalty, path_length, r1

aten = torch.ops.aten


def stylegan2_nets(
    resolution: int, base: int, most: int, num_fp16_res: int = 0
) -> tuple[nn.Module, nn.Module]:
    size = {"resolution": (resolution, resolution), "channel_base": base, "channel_max": most}
    size["num_fp16_res"] = num_fp16_res
    return stylegan2.Generator(**size), stylegan2.Discriminator(**size)  # type: ignore[arg-type]


def stylegan_nets(resolution: int, base: int, most: int) -> tuple[nn.Module, nn.Module]:
    size = {"resolution": (resolution, resolution), "channel_base": base, "channel_max": most}
    return stylegan.Generator(**size), stylegan.make_discriminator(**size)  # type: ignore[arg-type]


def dcgan_nets(resolution: int) -> tuple[nn.Module, nn.Module]:
    size = (resolution, resolution)
    return dcgan.Generator(100, size, 3, 64), dcgan.Discriminator(size, 3, 64)


def pggan_nets(resolution: int, base: int, most: int) -> tuple[nn.Module, nn.Module]:
    size = {"resolution": (resolution, resolution), "channel_base": base, "channel_max": most}
    return pggan.Generator(**size), pggan.Discriminator(**size)  # type: ignore[arg-type]


def wgan_nets(resolution: int) -> tuple[nn.Module, nn.Module]:
    size = {"resolution": (resolution, resolution), "width": 64}
    return wgan.make_generator(**size), wgan.make_critic(**size, norm="none")  # type: ignore[arg-type]


def conditional_nets(resolution: int) -> tuple[nn.Module, nn.Module]:
    size = {"resolution": (resolution, resolution), "width": 64, "c_dim": 10}
    D = dcgan.Discriminator(**size, condition="concat")  # type: ignore[arg-type]
    return dcgan.Generator(**size), D  # type: ignore[arg-type]


STEPS = ("generate", "G", "D", "R1", "GP", "PL")
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], tuple[str, ...]]] = {
    "stylegan2-64": (lambda: stylegan2_nets(64, 8192, 128), STEPS),
    "stylegan2-64-f16": (lambda: stylegan2_nets(64, 8192, 128, num_fp16_res=4), STEPS),
    "stylegan2-256": (lambda: stylegan2_nets(256, 16384, 512), STEPS),
    "stylegan2-256-f16": (lambda: stylegan2_nets(256, 16384, 512, num_fp16_res=4), STEPS),
    "stylegan-64": (lambda: stylegan_nets(64, 8192, 128), ("generate", "G", "D", "R1")),
    "dcgan-32": (lambda: dcgan_nets(32), ("G", "D")),
    "dcgan-64": (lambda: dcgan_nets(64), ("G", "D")),
    "gan-28": (lambda: (vanilla.Generator(), vanilla.Discriminator()), ("G", "D")),
    "cgan-32": (lambda: conditional_nets(32), ("G", "D")),
    "wgan-gp-64": (lambda: wgan_nets(64), ("G", "D", "GP")),
    "pggan-64": (lambda: pggan_nets(64, 8192, 128), ("generate", "G", "D", "GP")),
}
CRITICS = ("wgan-gp-64", "pggan-64")


class Model:
    """Two networks, a batch, and the steps of training without the optimiser's."""

    def __init__(
        self, G: nn.Module, D: nn.Module, z: Tensor, real: Tensor, loss: str = "nonsaturating"
    ) -> None:
        self.G, self.D, self.z, self.real = G, D, z, real
        self.c: tuple[Tensor, ...] = ()
        if classes := getattr(G, "c_dim", 0):
            self.c = (torch.eye(classes, device=z.device)[torch.arange(len(z)) % classes],)
        self.loss = LOSSES[loss]
        self.pl_mean = torch.zeros((), device=z.device)

    def generate(self) -> Tensor:
        with torch.no_grad():
            return self.G(self.z, *self.c)

    def step_G(self) -> None:
        self.D.requires_grad_(False)
        try:
            self.loss.g(self.D(self.G(self.z, *self.c), *self.c)).backward()
        finally:
            self.D.requires_grad_(True)

    def step_D(self) -> None:
        fake = self.generate()
        self.loss.d(self.D(self.real, *self.c), self.D(fake, *self.c), 0.0).backward()

    def step_R1(self) -> None:
        real = self.real.detach().requires_grad_()
        r1(real, self.D(real, *self.c)).backward()

    def step_GP(self) -> None:
        gradient_penalty(lambda x: self.D(x, *self.c), self.real, self.generate()).backward()

    def step_PL(self) -> None:
        G: Any = self.G
        ws = G.mapping(self.z)
        with no_weight_gradients():
            penalty, _ = path_length(G.synthesis(ws), ws, self.pl_mean)
        penalty.backward()

    def run(self, step: str) -> None:
        if step == "generate":
            self.generate()
            return
        try:
            getattr(self, "step_" + step)()
        finally:
            for net in (self.G, self.D):
                net.zero_grad(set_to_none=True)


def loss_of(name: str) -> str:
    return "wasserstein" if name in CRITICS else "nonsaturating"


def model_of(name: str, batch: int, device: str) -> Model:
    """A row of MODELS, with the same weights, latents and images in every run."""
    torch.manual_seed(0)
    G, D = (net.train().to(device) for net in MODELS[name][0]())
    z = torch.randn(batch, getattr(G, "z_dim", 100), device=device)
    real = torch.rand(batch, *Model(G, D, z, z).generate().shape[1:], device=device) * 2 - 1
    return Model(G, D, z, real, loss_of(name))


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """What impl=None means within: "" for the best."""
    before, _impl._OVERRIDE = _impl._OVERRIDE, name
    _impl._default.clear()
    try:
        yield
    finally:
        _impl._OVERRIDE = before
        _impl._default.clear()


class Recorder(TorchDispatchMode):
    """Collects the convolutions and matrix products of a step, by shape."""

    DENSE = {aten.convolution.default, aten.convolution_backward.default, aten.mm.default,
             aten.addmm.default, aten.bmm.default}  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.DENSE and not _filters(func, args):
            self.calls[(func, _frozen(args))] += 1
        return func(*args, **(kwargs or {}))


def _filters(func: Any, args: Sequence[Any]) -> bool:
    """Whether a recorded call is a filter's, not a dense convolution."""
    if func not in (aten.convolution.default, aten.convolution_backward.default):
        return False
    x, w = args[:2] if func is aten.convolution.default else args[1:3]
    return is_filter(x.shape, w.shape)


def is_filter(x: Sequence[int], w: Sequence[int]) -> bool:
    """Whether images and weights of these shapes are convolved to filter each channel, or for the
    gradient of such a filter: PyTorch's double backward takes it unasked, channel by channel."""
    return (w[1] == 1 < w[0] == x[1]) or x[0] == w[0] == 1


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return ("list", *map(_frozen, value))
    return value


def _thawed(value: Any, device: torch.device, layout: torch.memory_format) -> Any:
    if isinstance(value, tuple) and value and value[0] == "tensor":
        t = torch.randn(value[1], device=device).to(value[2])
        return t.contiguous(memory_format=layout) if t.ndim == 4 else t
    if isinstance(value, tuple) and value and value[0] == "list":
        return [_thawed(v, device, layout) for v in value[1:]]
    return value


def floor(calls: Counter[tuple[Any, ...]], device: torch.device) -> Callable[[], None]:
    """Runs the recorded calls, each in the memory format that was faster in a first trial."""
    chosen: list[tuple[Callable[..., Any], list[Any], int]] = []
    for (func, frozen), count in calls.items():
        forms = {}
        for layout in (torch.contiguous_format, torch.channels_last):
            args = _thawed(frozen, device, layout)
            func(*args)
            forms[min(_seconds(func, args) for _ in range(3))] = args
        chosen.append((func, forms[min(forms)], count))

    def run() -> None:
        for func, args, count in chosen:
            for _ in range(count):
                func(*args)

    return run


def _seconds(func: Callable[..., Any], args: list[Any]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    func(*args)
    wait()
    return time.perf_counter() - start


def peak_memory(f: Callable[[], Any]) -> int:
    """Bytes that f holds at most, above what was there."""
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        f()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def rows(
    name: str,
    steps: list[str],
    batch: int,
    rounds: int,
    compiled: bool,
    graphs: bool,
    device: str,
    clock: Callable[[], float],
    failed: list[str],
) -> Iterator[dict[str, Any]]:
    """A model's results; what does not run is left out and told in `failed`."""
    here: list[str] = []
    loss = loss_of(name)
    with or_told(here):
        ours = model_of(name, batch, device)
    if here:
        tell(failed, name, here)
        return
    for step in (s for s in MODELS[name][1] if s in steps):
        here = []
        with or_told(here):
            columns: dict[str, Callable[[], Any]] = {}
            columns["ours"] = lambda step=step: ours.run(step)
            columns["reference"] = lambda step=step: _with("reference", ours, step)
            if compiled and step not in ("R1", "GP", "PL"):
                torch._dynamo.reset()  # after a few graphs of a function it would run that
                nets = [
                    torch.compile(copy.deepcopy(net), dynamic=False) for net in (ours.G, ours.D)
                ]
                other = Model(*nets, ours.z, ours.real, loss)
                columns["compile"] = lambda step=step, other=other: _with("reference", other, step)
            with Recorder() as recorder:  # ours run some convolutions in kernels of their own
                _with("reference", ours, step)
            columns["floor"] = floor(recorder.calls, torch.device(device))
            memory: dict[str, int] = {}
            ready: dict[str, Callable[[], Any]] = {}
            for column, f in columns.items():
                with or_told(here if column != "ours" else None, f"{column}: "):
                    f()  # compiles
                    if column in ("ours", "reference"):
                        memory[column] = peak_memory(f)
                    ready[column] = captured(f, 1) if graphs else f
            times = measure(ready, rounds, device, clock)
            for column, values in times.items():
                found = figures(values, times["ours"], 0, 1.0)
                yield {
                    "model": name, "step": step, "batch": batch, "impl": column, "ms": found["ms"],
                    "ms_10": found["ms_10"], "ms_90": found["ms_90"], "graphs": graphs,
                    "cpu_time": clock is time.process_time,
                    "ratio": statistics.median(
                        v / o for v, o in zip(values, times["ours"], strict=True)
                    ),
                    "img_s": 1e3 * batch / found["ms"], "sec_kimg": found["ms"] / batch,
                    "memory": memory.get(column),
                }  # fmt: skip
        tell(failed, f"{name} {step}", here)


def tell(failed: list[str], where: str, here: list[str]) -> None:
    for what in here:
        failed.append(f"{where}: {what}")
        print(f"steps: {failed[-1]}", file=sys.stderr, flush=True)


def _with(impl: str, model: Model, step: str) -> None:
    with implementation(impl):
        model.run(step)


# --- Where the time goes.

FUSED = "fused kernels"
PARTS = ("convolutions", "matrix products", FUSED, "filters", "copies", "other operations",
         "between them")  # fmt: skip
CONVOLUTIONS = ("convolution", "conv2d", "cudnn", "conv_depthwise")
PRODUCTS = ("mm", "addmm", "bmm", "addbmm", "baddbmm")
COPIES = ("copy_", "cat", "clone", "contiguous", "_to_copy", "to", "empty", "empty_strided",
          "empty_like", "resize_")  # fmt: skip


def part_of(name: str, shapes: list[list[int]]) -> str:
    """Which of PARTS an operation of PyTorch's profiler belongs to, by its inputs' shapes."""
    namespace, _, op = name.rpartition("::")
    if namespace.startswith("gankern"):
        if op.startswith("convolution") or op == "modulated_gemm":
            return "convolutions"
        return "filters" if op == "upfirdn2d" else FUSED
    if namespace != "aten":
        return PARTS[-1]
    if any(word in op for word in CONVOLUTIONS):
        images = [shape for shape in shapes if len(shape) == 4]
        x, w = images[-2:] if len(images) > 1 else ([0] * 4, [0] * 4)
        return "filters" if is_filter(x, w) else "convolutions"
    if op in PRODUCTS:
        return "matrix products"
    return "copies" if op in COPIES else "other operations"


def parts(f: Callable[[], Any], device: str, rounds: int) -> dict[str, float]:
    """Milliseconds of each part of f; on a GPU of its kernels, else of the calling thread. What
    remains of the whole is Python, autograd, the dispatcher and the profiler, or a GPU that waits
    for them."""
    from torch.autograd import DeviceType
    from torch.profiler import profile

    seconds(f, 4, device)  # the calls are remembered
    with profile(record_shapes=True) as profiler:
        taken = seconds(f, rounds, device)
    found = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type != DeviceType.CPU:  # a kernel, which its operation has already
            continue
        spent = getattr(event, f"self_{device if device == 'cpu' else 'device'}_time_total")
        found[part_of(event.key, event.input_shapes)] += spent / 1e3 / rounds
    found[PARTS[-1]] = 0.0
    found[PARTS[-1]] = max(0.0, 1e3 * taken - sum(found.values()))
    return found


def breakdown(
    name: str, steps: list[str], batch: int, rounds: int, device: str
) -> Iterator[dict[str, Any]]:
    """Where the time of each step goes, ours and the reference's."""
    model = model_of(name, batch, device)
    for step in (s for s in MODELS[name][1] if s in steps):
        for impl in ("ours", "reference"):
            of = "" if impl == "ours" else impl
            found = parts(lambda of=of, step=step: _with(of, model, step), device, rounds)
            yield {"model": name, "step": step, "batch": batch, "impl": impl, "parts": found}


# --- Cost as work grows.

BASE = {"batch": 8, "resolution": 32, "channels": 32, "ranks": 1}
SCALES = {
    "batch": (1, 2, 4, 8, 16, 32),
    "resolution": (16, 32, 64, 128),
    "channels": (16, 32, 64, 128),
    "ranks": (1, 2),
}


def scaling(scales: dict[str, tuple[int, ...]], rounds: int, device: str, cpu_time: bool
            ) -> Iterator[dict[str, Any]]:  # fmt: skip
    """An iteration's median time and img/s, one size at a time changed from BASE."""
    for scale, values in scales.items():
        for value in values:
            sizes = BASE | {scale: value}
            if sizes["ranks"] == 1:
                taken, averaging = iteration_seconds(sizes, rounds, device, cpu_time)
            elif device == "cuda" and sizes["ranks"] > torch.cuda.device_count():
                continue  # each has a GPU
            else:
                taken, averaging = seconds_of_ranks(sizes, rounds, device, cpu_time)
            images = sizes["batch"] * sizes["ranks"]
            yield sizes | {
                "scale": scale, "value": value, "impl": "ours", "cpu_time": cpu_time,
                "ms": 1e3 * taken, "averaging_ms": 1e3 * averaging, "img_s": images / taken,
            }  # fmt: skip


def iteration_seconds(
    sizes: dict[str, int], rounds: int, device: str, cpu_time: bool
) -> tuple[float, float]:
    """The median time of a step of G and a step of D with averaged gradients, and of averaging."""
    torch.manual_seed(0)
    resolution, width = sizes["resolution"], sizes["channels"]
    nets = stylegan2_nets(resolution, width * resolution, width)
    G, D = (net.train().to(device) for net in nets)
    z = torch.randn(sizes["batch"], 512, device=device)
    model = Model(G, D, z, torch.randn(sizes["batch"], 3, resolution, resolution, device=device))

    clock = time.process_time if cpu_time else time.perf_counter
    averaging = 0.0

    def iteration() -> None:
        nonlocal averaging
        for step, net in ((model.step_G, G), (model.step_D, D)):
            step()
            if sizes["ranks"] > 1:
                average = functools.partial(average_gradients, net, sizes["ranks"])
                averaging += seconds(average, 1, device, clock)
            net.zero_grad(set_to_none=True)

    iteration()
    averaging = 0.0
    taken = statistics.median(seconds(iteration, 1, device, clock) for _ in range(rounds))
    return taken, averaging / rounds


def seconds_of_ranks(
    sizes: dict[str, int], rounds: int, device: str, cpu_time: bool
) -> tuple[float, float]:
    """The same of the slowest of several processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        args = (sizes, rounds, device, cpu_time, folder)
        torch.multiprocessing.spawn(_rank, args, nprocs=sizes["ranks"])
        taken, averaging = map(float, (Path(folder) / "seconds").read_text().split())
        return taken, averaging


def _rank(
    rank: int, sizes: dict[str, int], rounds: int, device: str, cpu_time: bool, folder: str
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store, backend = f"file://{folder}/store", "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=sizes["ranks"])
    taken = torch.tensor(iteration_seconds(sizes, rounds, device, cpu_time), device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    if rank == 0:
        (Path(folder) / "seconds").write_text(" ".join(map(str, taken.tolist())))
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    on = "cuda" if torch.cuda.is_available() else "cpu"
    usual = [name for name in MODELS if on == "cuda" or ("256" not in name and "f16" not in name)]
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=usual)
    parser.add_argument("--step", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile(reference)")
    parser.add_argument("--cuda-graphs", action="store_true", help="each step as a CUDA graph")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU, not of the clock")
    parser.add_argument("--scaling", action="store_true", help="img/s as work grows instead")
    parser.add_argument("--breakdown", action="store_true", help="where the time goes instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results to FILE")
    parser.add_argument("--keep-memory", action="store_true", help="as the command gankern does")
    args = parser.parse_args()
    if args.keep_memory:
        keep_memory()
    if args.cuda_graphs and (on == "cpu" or args.compile):
        parser.error("--cuda-graphs needs a GPU, and no --compile")
    about = machine(on)
    print(" ".join(f"{k} {v}" for k, v in about.items()))
    if args.scaling:
        for row in scaling(SCALES, args.rounds, on, args.cpu_time):
            print(f"{row['scale']:10} {row['value']:4} {row['ms']:9.2f} ms "
                  f"{row['img_s']:8.1f} img/s, averaging {row['averaging_ms']:.2f} ms",
                  flush=True)  # fmt: skip
            if args.json:
                append(args.json, about | row)
        return 0
    failed: list[str] = []
    for name in args.model:
        if args.breakdown:
            for row in breakdown(name, args.step, args.batch, args.rounds, on):
                each = ", ".join(f"{part} {ms:.2f}" for part, ms in row["parts"].items())
                print(f"{name:14} {row['step']:9} {row['impl']:10} ms: {each}", flush=True)
                if args.json:
                    append(args.json, about | row)
            continue
        clock = time.process_time if args.cpu_time else time.perf_counter
        for row in rows(
            name, args.step, args.batch, args.rounds, args.compile, args.cuda_graphs, on, clock,
            failed,
        ):  # fmt: skip
            memory = f"{row['memory'] / 2**20:8.1f} MiB" if row["memory"] else ""
            print(f"{name:14} {row['step']:9} {row['impl']:10} {row['ms']:9.2f} ms "
                  f"[{row['ms_10']:8.2f} {row['ms_90']:8.2f}]  / ours {row['ratio']:5.2f} "
                  f"{row['img_s']:8.1f} img/s {row['sec_kimg']:8.2f} s/kimg {memory}",
                  flush=True)  # fmt: skip
            if args.json:
                append(args.json, about | row)
    return int(bool(failed))


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
