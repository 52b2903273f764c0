"""What training asks of a GPU: kernel launches and bytes, counted from the trace of operations.

    python benchmarks/launches.py                    StyleGAN2-256, batch 8, float32
    python benchmarks/launches.py --model stylegan2-64 --step G --by op
    python benchmarks/launches.py --dtype f16        the four highest levels in float16
    python benchmarks/launches.py --check            exit 1 if a bar is missed
    python benchmarks/launches.py --json FILE        also appends one JSON line a step and path
    python benchmarks/launches.py --docs             writes docs/launches.md

The steps run on meta tensors, which have shapes and strides but no values: no GPU is needed, and a
step takes seconds. Ours is the path of the CUDA kernels; the reference is PyTorch's operations.

A launch is every operation of PyTorch's that is not a view nor an allocation, and every one of
ours. Those that start two kernels (a padding fills and copies) count as two, a convolution's
backward as one for each gradient. Where blocks share a sum, counters are filled with zeros first
(cudaMemsetAsync): one more launch, without bytes. The gradients of synthesis_epilogue always do so;
that of bias_act with its bias', minibatch_stddev and adain do where the GPU has room for several
blocks, which no trace tells: each of their calls counts a fill, but of gradients of a few rows,
which never have one. PyTorch's sums count one where they are so long and few that any large GPU
shares them out.

Bytes are those of the operands read and written, each once, an expanded operand as it is stored;
for ours times the traffic factor of benchmarks/traffic_budget.json where there is one. Dense
convolutions, bound by arithmetic, have no bytes; those with one channel a group, which the
reference filters with, have. Left out of launches and bytes, and shown apart, are the gradients of
these filters: PyTorch's double backward takes them unasked, with a convolution for every channel.
The optimiser's step is in neither.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ops import machine
from steps import MODELS, STEPS, Model, implementation

from gankern.ops import _impl

aten = torch.ops.aten
TRAFFIC = Path(__file__).with_name("traffic_budget.json")
DOCS = Path(__file__).resolve().parents[1] / "docs/launches.md"

# One in so many iterations takes the penalty (StyleGAN2, appendix B).
EVERY = {"G": 1, "D": 1, "R1": 16, "PL": 8}
MOST_LAUNCHES, MOST_BYTES = 0.5, 0.45  # of the reference's

# Allocations and looks at a tensor's form: no kernel.
FREE = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default,
    aten.new_empty.default, aten.new_empty_strided.default, aten.detach.default,
    aten._unsafe_view.default, aten.lift_fresh.default,
    aten.scalar_tensor.default,  # a constant of the host
}  # fmt: skip
# Fill the output, then copy the input into a part of it.
FILL_AND_COPY = {
    aten.constant_pad_nd.default, aten.slice_backward.default, aten.select_backward.default,
}  # fmt: skip
# Take shape and dtype of their first argument, not its values.
SHAPE_OF_FIRST = {
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.zeros_like.default,
    aten.ones_like.default, aten.full_like.default, aten.randn_like.default,
    aten.rand_like.default, aten.fill_.Scalar, aten.zero_.default, aten.normal_.default,
    aten.copy_.default,
}  # fmt: skip
# Ours that clear counters before the kernel, besides bias_act_bwd.
CLEARING = {
    "synthesis_epilogue_bwd", "synthesis_epilogue_bwd_plain", "synthesis_epilogue_bwd2",
    "minibatch_stddev", "adain", "adain_bwd",
}  # fmt: skip
# PyTorch's sums: blocks share an output of more than 256 values for each of 512 threads, if a GPU,
# here of 64 multiprocessors, has room for two an output (ATen/native/cuda/Reduce.cuh).
SUMS = {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim}
SHARED_VALUES, SHARED_OUTPUTS = 512 * 256, 128
NO_IMAGE = "weights, styles, statistics, logits"
CONVOLUTIONS = {aten.convolution.default: (0, 1), aten.convolution_backward.default: (1, 2)}


@dataclass
class Count:
    """What calls of one kind cost; of a weighted sum of steps, fractions."""

    launches: float = 0
    bytes: float = 0  # of memory-bound operations
    dense: float = 0  # launches of dense convolutions, among `launches`

    def add(self, other: Count, weight: float = 1) -> None:
        self.launches += weight * other.launches
        self.bytes += weight * other.bytes
        self.dense += weight * other.dense


@dataclass
class Counts:
    """A step's calls, by operation and by level of the network."""

    by_op: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    by_level: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    unasked: float = 0  # launches for gradients of constant filters

    @property
    def total(self) -> Count:
        total = Count()
        for count in self.by_op.values():
            total.add(count)
        return total

    def add(self, other: Counts, weight: float) -> None:
        for mine, others in ((self.by_op, other.by_op), (self.by_level, other.by_level)):
            for name, count in others.items():
                mine[name].add(count, weight)
        self.unasked += weight * other.unasked


Pair = tuple[Counts, Counts]  # ours, the reference's


class Trace(TorchDispatchMode):
    """Counts the operations that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.convolution.default and args[0].shape[0] == args[1].shape[0] == 1:
            self.counts.unasked += 1
            return _convolved(*args)
        out = func(*args, **(kwargs or {}))
        if func is aten.convolution.default and is_channels_last(args[0]):
            # As cuDNN returns it; without values, PyTorch makes transposed ones contiguous.
            out = out.contiguous(memory_format=torch.channels_last)
        if func in FREE or func.is_view:
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if made:
            unread = func is aten.addmm.default and (kwargs or {}).get("beta") == 0
            count = self.cost(func, args, given[unread:], made)
            self.counts.by_op[f"{func.namespace}::{func._opname}"].add(count)
            self.counts.by_level[level(given + made)].add(count)
        return out

    def cost(self, func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> Count:
        if func in CONVOLUTIONS:
            launches = sum(args[-1]) if func is aten.convolution_backward.default else 1
            image, weight = (args[i] for i in CONVOLUTIONS[func])
            if not (weight.shape[1] == 1 and weight.shape[0] == image.shape[1] > 1):
                return Count(launches, 0.0, launches)
            return Count(launches, moved(given, made))
        if func in FILL_AND_COPY:
            return Count(2, moved(given, made + given))
        if func.namespace == "aten":
            read = given[1:] if func in SHAPE_OF_FIRST else given
            return Count(1 + (func in SUMS and shared(*given, *made)), moved(read, made))
        copied = relaid(given)
        ratio = traffic_of(func._opname, args, given)
        launches = 1 + fills(func._opname, args) + len(copied)
        return Count(launches, moved(given, made) * ratio + 2 * moved(copied, []))


def shared(x: Tensor, y: Tensor) -> bool:
    """Whether blocks of any large GPU share the sums y of x."""
    outputs = y.numel()
    return 0 < outputs <= SHARED_OUTPUTS and x.numel() >= SHARED_VALUES * outputs


def fills(name: str, args: Any) -> int:
    """Fills of counters in a call of our operation `name`, at most."""
    if name == "bias_act_bwd":
        (_, ref, *_), needs_db = args, args[-1]
        few = ref.ndim == 2 and len(ref) <= 32 and ref.shape[1] % 8 == 0  # one block a column
        return int(needs_db and not few)
    return int(name in CLEARING)


def traffic_of(name: str, args: Any, given: list[Tensor]) -> float:
    """The traffic factor of a call of our operation `name`."""
    op = name.partition("_bwd")[0]
    backward = name != op
    # Arguments are x, f, ... and dy, x, f, ...
    filtered = op == "synthesis_epilogue" and args[1 + backward] is not None
    x = given[0]
    last = x.ndim == 4 and not x.is_contiguous()
    dtype = "f16" if x.element_size() == 2 else "f32"
    return traffic_factor(op, backward, filtered, dtype, "nhwc" if last else "nchw")


def _convolved(x: Tensor, w: Tensor, b: Any, stride: Any, padding: Any, dilation: Any,
               *_: Any) -> Tensor:  # fmt: skip
    """A convolution's output without computing it."""
    sides = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]
    return x.new_empty(x.shape[0], w.shape[0], *size)


def is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def moved(read: list[Tensor], written: list[Tensor]) -> int:
    """Bytes of the operands, one that is read twice counted once, an expanded one as stored."""
    return sum(map(stored, {id(t): t for t in read}.values())) + sum(map(stored, written))


def stored(t: Tensor) -> int:
    sizes = (size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)
    return math.prod(sizes) * t.element_size() if t.numel() else 0


def relaid(given: list[Tensor]) -> list[Tensor]:
    """The images that our kernels first copy: not dense, or not in the first one's format."""
    images = [t for t in given if t.ndim == 4 and t.numel()]
    kept = [f for f in (torch.contiguous_format, torch.channels_last)
            if images and images[0].is_contiguous(memory_format=f)]  # fmt: skip
    return [t for t in images if not any(t.is_contiguous(memory_format=f) for f in kept)]


def level(tensors: list[Tensor]) -> str:
    """4x4, 8x8, ... of the largest image among the operands, or NO_IMAGE."""
    images = [(t.numel(), min(t.shape[-2:])) for t in tensors if t.ndim >= 4 and t.numel()]
    images = [image for image in images if image[1] >= 4]
    side = 2 ** int(math.log2(max(images)[1])) if images else 0
    return f"{side}x{side}" if side else NO_IMAGE


@functools.cache
def traffic_factor(op: str, backward: bool, filtered: bool, dtype: str, layout: str) -> float:
    """Bytes moved over the fewest: the worst of the budget's rows of an op; 1 without a row."""
    rows = budgeted(op, backward, filtered, dtype, layout)
    return max([1.0, *(traffic for traffic, *_ in rows)])


def budgeted(
    op: str, backward: bool, filtered: bool, dtype: str, layout: str
) -> Iterator[list[float]]:
    """The budget's rows of an op: traffic, sectors, banks, launches, ...

    op is upfirdn2d both ways. filtered: the rows of synthesis_epilogue with a filter, or without.
    """
    budget = json.loads(TRAFFIC.read_text()) if TRAFFIC.exists() else {}
    ways = ("forward", "backward") if op == "upfirdn2d" else (("forward", "backward")[backward],)
    for key, figures in budget.items():
        case, *what = key.rsplit(" ", 3)
        name, _, variant = case.partition(" ")
        if name != op or "12 taps" in variant or what not in [[w, dtype, layout] for w in ways]:
            continue
        if op != "synthesis_epilogue" or filtered == bool(variant):
            yield figures


@contextlib.contextmanager
def cuda_path() -> Iterator[None]:
    """Within it, impl=None takes the CUDA kernels' path on tensors without values."""
    if not hasattr(torch.ops.gankern, "synthesis_epilogue"):
        raise SystemExit(f"launches: needs the compiled operations: {_impl.LIBRARIES['cpu']}")
    names = {name for _, name in _impl._overloads}
    with (
        mock.patch.dict(_impl._default, {(name, "meta"): "cuda" for name in names}),
        mock.patch.object(_impl, "why_not", return_value=""),
    ):
        yield


def networks(name: str, dtype: str) -> tuple[Any, Any]:
    low = dtype == "f16" and name.startswith("stylegan2")
    return MODELS[f"{name}-f16" if low else name][0]()


def count(name: str, step: str, batch: int, dtype: str, impl: str) -> Counts:
    """One step of a model, counted; impl: "cuda" or "reference"."""
    path = implementation("reference") if impl == "reference" else cuda_path()
    # Autocast knows no meta device.
    no_autocast = mock.patch.object(torch, "is_autocast_enabled", return_value=False)
    with torch.device("meta"), no_autocast, path:
        G, D = networks(name, dtype)
        z = torch.randn(batch, getattr(G, "z_dim", 100))
        real = torch.randn(batch, *Model(G, D, z, z).generate().shape[1:])
        model = Model(G.train(), D.train(), z, real)
        trace = Trace()
        with trace:
            model.run(step)
    return trace.counts


def count_steps(name: str, steps: list[str], batch: int, dtype: str) -> dict[str, Pair]:
    """Each step's, and with all steps of training their mean over many iterations: "training"."""
    pairs = {}
    for step in steps:
        ours, reference = (count(name, step, batch, dtype, i) for i in ("cuda", "reference"))
        pairs[step] = (ours, reference)
    if all(step in pairs for step in EVERY):
        training = Counts(), Counts()
        for step, every in EVERY.items():
            for total, part in zip(training, pairs[step], strict=True):
                total.add(part, 1 / every)
        pairs["training"] = training
    return pairs


def missed(pairs: dict[str, Pair]) -> list[str]:
    """The bars that do not hold: launches of every step, bytes of training."""
    found = []
    for step, (ours, reference) in pairs.items():
        a, b = ours.total, reference.total
        if a.launches > MOST_LAUNCHES * b.launches:
            share = a.launches / b.launches
            found.append(f"{step}: {share:.1%} of the launches, wanted {MOST_LAUNCHES:.0%}")
        if step == "training" and a.bytes > MOST_BYTES * b.bytes:
            found.append(f"{step}: {a.bytes / b.bytes:.1%} of the bytes, wanted {MOST_BYTES:.0%}")
    return found


# --- Showing.


def summary_table(pairs: dict[str, Pair]) -> list[list[str]]:
    rows = [["step", "launches, ours", "reference", "ratio", "its unasked", "GB, ours",
             "reference", "ratio", "dense, ours", "reference"]]  # fmt: skip
    for step, (ours, reference) in pairs.items():
        a, b = ours.total, reference.total
        rows.append([
            step, f"{a.launches:.0f}", f"{b.launches:.0f}", f"{a.launches / b.launches:.1%}",
            f"{reference.unasked:.0f}", f"{a.bytes / 1e9:.2f}", f"{b.bytes / 1e9:.2f}",
            f"{a.bytes / b.bytes:.1%}", f"{a.dense:.0f}", f"{b.dense:.0f}",
        ])  # fmt: skip
    return rows


def detail_table(pair: Pair, by: str, least: float = 0) -> list[list[str]]:
    """Launches and MB of both, most bytes first; by: "op" or "level". Those with fewer than `least`
    bytes are one row."""
    ours, reference = (getattr(counts, f"by_{by}") for counts in pair)
    shown: dict[str, tuple[Count, Count]] = {}
    others = Count(), Count()
    for name in {**ours, **reference}:
        both = ours.get(name, Count()), reference.get(name, Count())
        if max(both[0].bytes, both[1].bytes) >= least:
            shown[name] = both
            continue
        for total, part in zip(others, both, strict=True):
            total.add(part)
    names = sorted(shown, key=lambda name: (-max(c.bytes for c in shown[name]), name))
    if others[0].launches + others[1].launches:
        shown["others"] = others
        names.append("others")
    what = "images" if by == "level" else by
    head = [what, "launches, ours", "reference", "MB, ours", "reference"]
    return [head, *([name, *cells(*shown[name])] for name in names)]


def json_lines(pairs: dict[str, Pair], about: dict[str, Any]) -> Iterator[str]:
    """A line a step and path."""
    for step, pair in pairs.items():
        for impl, counts in zip(("ours", "reference"), pair, strict=True):
            total = counts.total
            row = {"step": step, "impl": impl, "launches": total.launches, "bytes": total.bytes}
            row |= {"dense": total.dense, "unasked": counts.unasked}
            yield json.dumps(about | {"kind": "counted"} | row) + "\n"


def cells(ours: Count, reference: Count) -> list[str]:
    launches = [f"{c.launches:.0f}" for c in (ours, reference)]
    return launches + [f"{c.bytes / 1e6:.1f}" for c in (ours, reference)]


def text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = map(str.rjust, rest, widths[1:])
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def document(batch: int) -> str:
    """docs/launches.md."""
    parts = ["# Launches and bytes of StyleGAN2-256", _INTRODUCTION.format(batch=batch)]
    for dtype, title in (("f32", "float32"), ("f16", "float16 in the four highest levels")):
        pairs = count_steps("stylegan2-256", list(MODELS["stylegan2-256"][1]), batch, dtype)
        parts += [f"## {title}", markdown(summary_table(pairs))]
        bars = missed(pairs)
        parts.append("Bars missed: " + "; ".join(bars) + "." if bars else "Every bar holds.")
        parts += [f"An iteration of training in {title}, by the size of images:"]
        parts += [markdown(detail_table(pairs["training"], "level"))]
        if dtype == "f32":
            parts += [
                "The same by operation:",
                markdown(detail_table(pairs["training"], "op", 2e6)),
            ]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = f"""Written by `python benchmarks/launches.py --docs`; counted, not timed. Batch
{{batch}}, 16384 channels over the resolution, at most 512. How each figure is counted stands at the
top of that file. "training" is the mean iteration: G and D always, R1 one in 16, path length one in
8. "its unasked" are launches that PyTorch starts for the reference in addition, and that are in no
ratio: gradients of the constant filters, a convolution for every channel. "dense" are the launches
that are dense convolutions. Fills of counters that precede a kernel are launches, ours also where
it depends on the GPU. An operation counts with the largest image that it reads or writes, of
256x256 pixels or one more a side; "{NO_IMAGE}" have none. Bars: at most
half of the reference's launches, at most 45 % of its bytes in training."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="stylegan2-256")
    parser.add_argument("--step", nargs="+", choices=STEPS, help="default: all of the model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["f32", "f16"], default="f32")
    parser.add_argument("--by", choices=["op", "level"], help="also a table of each step")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the counts to FILE")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCS.name}")
    args = parser.parse_args()
    if args.docs:
        DOCS.write_text(document(args.batch))
        print(f"wrote {DOCS}")
        return 0
    known = MODELS[args.model][1]
    steps = [step for step in args.step or known if step in known]
    pairs = count_steps(args.model, steps, args.batch, args.dtype)
    print(text(summary_table(pairs)))
    for step, pair in pairs.items() if args.by else ():
        print(f"\n{step}\n{text(detail_table(pair, args.by))}")
    if args.json:
        about = machine("cpu") | {"model": args.model, "batch": args.batch, "dtype": args.dtype}
        with args.json.open("a") as file:
            file.writelines(json_lines(pairs, about))
    problems = missed(pairs)
    print("\n".join(problems) or "every bar holds")
    return int(bool(problems) and args.check)


if __name__ == "__main__":
    sys.exit(main())
