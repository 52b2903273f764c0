"""What the tests of every op share: dtypes, layouts, tolerances, derivatives, golden vectors."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from gankern.ops import _impl

DATA = Path(__file__).parent / "data"
DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
}


def skip_float64_triton(impl: str, dtype: torch.dtype) -> None:
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels compute in float32 and refuse float64")


def interpreted(impl: str, device: str) -> bool:
    """Whether Triton's interpreter runs it: in tests, a few milliseconds a program and filter tap.

    There, shapes have few samples and channels, each a program; dtypes are tried on few of them;
    and random cases of what is composed of operations are run forward only, each operation's own
    having gradients too.
    """
    return impl == "triton" and device == "cpu"


def opcheck(op: Any, args: tuple[Any, ...]) -> None:
    """torch.library.opcheck. Triton's interpreter refuses fake tensors: there, what the op returns
    is compared with what its shape function says; triton_traced.py does the rest."""
    checks = ["test_schema", "test_autograd_registration"]
    on_cpu = all(t.is_cpu for t in args if isinstance(t, Tensor))
    if op.namespace == _impl.NAMESPACES["triton"] and on_cpu:
        name = op._schema.name.split("::")[1]
        told = _impl._fakes[name](*map(on_meta, args))
        for one, other in zip(flat(op(*args)), flat(told), strict=True):
            assert form(one) == form(other), name
    else:
        checks += ["test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, args, test_utils=tuple(checks))


def on_meta(t: Any) -> Any:
    """A tensor's form without its values; what else there is, as it is."""
    if not isinstance(t, Tensor):
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def form(t: Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), t.stride(), t.dtype


def flat(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


# Orders of an image's dimensions, or of a video's, in dense memory.
ORDERS = ((0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2), (1, 0, 3, 2), (0, 2, 3, 4, 1), (4, 0, 1, 3, 2))


def in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x in dense memory, its dimensions from the outermost to the innermost as `order` says."""
    places = [order.index(d) for d in range(len(order))]
    return x.permute(order).contiguous().permute(places)


LAYOUTS = ("contiguous", "channels_last", "strided")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x with the same values in another memory layout: a leaf, not a view of anything kept."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # half of the channels in channels-last memory
        return torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
    if layout == "strided" and x.dim() > 0:
        padded = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        padded[..., 1 : 2 * x.shape[-1] : 2] = x
        return padded[..., 1 : 2 * x.shape[-1] : 2]
    return x.contiguous()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from the float64 result; infinite where NaN or shape differ."""
    if actual.shape != exact.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().double().cpu() - exact.detach().cpu()).abs()
    return float("inf") if difference.isnan().any() else difference.max().item()


def assert_as_good_as(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    what: str = "",
    terms: int = 1,
    roundings: float = 4,
    nudge: float = 0.0,
) -> None:
    """The tolerance of every test: error <= 2 * eager PyTorch's at that dtype + floor.

    The floor is 4 roundings of the dtype at the size of the result, or, for a sum of `terms` random
    values of size one, at the size that such sums have, sqrt(terms). A float64 result has the floor
    alone, unless `compare` is told otherwise: one of long sums needs more `roundings`. `nudge` is
    how far the exact result moves when each input is rounded once: as many of these are allowed.
    """
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, wanted {eager.dtype}"
    size = exact.abs().max().item() if exact.numel() else 0.0
    size = max(size, terms**0.5) if terms > 1 else size
    floor = torch.finfo(actual.dtype).eps * size + nudge
    bound = 2 * max_error(eager, exact) + roundings * floor
    error = max_error(actual, exact)
    assert error <= bound, f"{what}: error {error:.3g} over the bound {bound:.3g}"


def output(f: Callable, inputs: list[Tensor | None]) -> list[Tensor]:
    """[y], alone."""
    return [f(*inputs)]


def outputs_and_grads(f: Callable, inputs: list[Tensor | None], seed: int = 1) -> list[Tensor]:
    """[y, gradients of sum(y * dy) in every input]."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = f(*leaves)
    dy = randn(*y.shape, seed=seed).to(y)
    dy = torch.empty_like(y).copy_(dy)  # in y's memory format, as a following layer returns it
    wanted = [t for t in leaves if t is not None]
    return [y, *torch.autograd.grad(y, wanted, dy)]


def second_grads(f: Callable, inputs: list[Tensor | None], seed: int = 1) -> list[Tensor]:
    """Gradients, in every input and dy, of sum(dx * v): the second order that R1 takes."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = f(*leaves)
    dy = torch.empty_like(y).copy_(randn(*y.shape, seed=seed)).requires_grad_()
    (dx,) = torch.autograd.grad(y, leaves[0], dy, create_graph=True)
    v = torch.empty_like(dx).copy_(randn(*dx.shape, seed=seed + 1))
    wanted = [t for t in (*leaves, dy) if t is not None]
    grads = torch.autograd.grad(dx, wanted, v, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]


def led_by(number: int, f: Callable, inputs: list[Tensor | None]) -> tuple[Callable, list]:
    """f and its inputs with one of them first: that whose gradient second_grads differentiates."""
    rest = [*inputs[:number], *inputs[number + 1 :]]
    return lambda t, *rest: f(*rest[:number], t, *rest[number:]), [inputs[number], *rest]


MAX_SHARED = 227 * 1024  # an H100's


@contextlib.contextmanager
def gpu_of(multiprocessors: int, impl: str, max_shared: int = MAX_SHARED) -> Iterator[None]:
    """Within it, impl "simt" simulates a GPU of so many multiprocessors and bytes a block."""
    if impl != "simt":
        yield
        return
    from simt_build import module

    module().processors(multiprocessors)
    module().max_shared(max_shared)
    try:
        yield
    finally:
        module().processors(132)
        module().max_shared(MAX_SHARED)


@contextlib.contextmanager
def launches(impl: str) -> Iterator[list[str]]:
    """The kernels that impl "simt" launches within it, once it ends: `name<template arguments>`."""
    names: list[str] = []
    if impl != "simt":
        yield names
        return
    from simt_build import module

    module().reset()
    yield names
    names += [launch["kernel"] for launch in module().counters()["launch_list"]]


def examples(impl: str) -> settings:
    """How many random cases an op is tested with: the same in every run.

    Fewer where a case is slow: in Triton's interpreter, and again where simt watches every access.
    A case that is refused by hypothesis' assume or reject is not one of them.
    """
    watched = os.environ.get("GANKERN_SIMT", "plain") != "plain"
    cases = 50 if watched else 100 if impl == "triton" else 500
    return settings(max_examples=cases, deadline=None, derandomize=True)


def assert_kernels_ran(
    impl: str, ran: Mapping[tuple[str, int], int], least: dict[str, int]
) -> None:
    """That simt's random cases took each kernel often enough, with elements of 4 and of 2 bytes."""
    if impl != "simt" or examples(impl).max_examples < 500:
        return
    wanted = [(kernel, size, n) for kernel, n in least.items() for size in (4, 2)]
    few = [f"{k} {size}: {ran[k, size]}" for k, size, n in wanted if ran[k, size] < n]
    assert not few, f"cases by kernel and bytes of an element: {', '.join(few)}"


DRAWS = 4  # of what inputs are rounded by: of few of them one may happen to move nothing
_kept: dict[str, dict[str, Any]] = {}


def once(case: str, make: Callable[[], Any]) -> Any:
    """make(), or what it gave for this case of this test before, in this process.

    The random cases of an op are the same for every implementation, and are tested with one after
    the other: what judges them is computed by the first.
    """
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split("[")[0]
    if test not in _kept:
        _kept.clear()  # of another test
    kept = _kept.setdefault(test, {})
    if case not in kept:
        kept[case] = make()
    return kept[case]


def compare(
    f: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: list[Tensor | None],
    derivative: Callable = outputs_and_grads,
    what: str = "",
    roundings: float = 4,
    case: str = "",
    nudged: bool | tuple[str, ...] = False,
) -> list[Tensor]:
    """f against reference at the inputs' dtype, both judged by reference in float64.

    `case` names one of many random ones, for once(). `nudged` judges by the reference on inputs
    rounded once more too: for results that are small differences of large sums; a tuple names
    which. In float64 these results are eager PyTorch's: it cannot be told from the exact ones.
    """

    def judges() -> tuple[list[Tensor], list[Tensor], list[float]]:
        doubled = [None if t is None else t.detach().double() for t in inputs]
        exact, eager = derivative(reference, doubled), derivative(reference, inputs)
        nudges = [0.0] * len(exact)
        if not nudged:
            return exact, eager, nudges
        if all(e.dtype == torch.float64 for e in eager):
            results = zip(names, moved(eager, 0), eager, strict=False)
            return exact, [m if nudged is True or n in nudged else e for n, m, e in results], nudges
        draws = [moved(eager, seed) for seed in range(DRAWS)]
        squares = [[max_error(m, e) ** 2 for m, e in zip(d, exact, strict=True)] for d in draws]
        return exact, eager, [(sum(s) / DRAWS) ** 0.5 for s in zip(*squares, strict=True)]

    def moved(eager: list[Tensor], seed: int) -> list[Tensor]:
        rounded = [t if t is None else rounded_once(t, eager[0].dtype, seed) for t in inputs]
        return derivative(reference, rounded)

    names = ["y", *(f"d{i}" for i in range(len(inputs)))]
    exact, eager, nudges = once(case, judges) if case else judges()
    what = what or case
    actual = derivative(f, inputs)
    for a, r, e, nudge, name in zip(actual, eager, exact, nudges, names, strict=False):
        terms = actual[0].numel() // max(1, a.numel())
        nudge = nudge if nudged is True or name in (nudged or ()) else 0.0
        assert_as_good_as(a, r, e, f"{what} {name}", terms, roundings, nudge)
    return actual


def rounded_once(t: Tensor, computed: torch.dtype, seed: int) -> Tensor:
    """t in float64, every value larger or smaller by a rounding of the finer dtype of the two."""
    signs = randn(*t.shape, seed=9 + seed).sign().to(t.device)
    eps = min(torch.finfo(t.dtype).eps, torch.finfo(computed).eps)
    return t.detach().double() * (1 + eps * signs)


def golden(op: str) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """(params, arrays) of every golden vector of an op, made by an independent implementation."""
    cases = []
    for case in json.loads((DATA / "cases.json").read_text()):
        if case["op"] == op:
            with np.load(DATA / case["file"]) as arrays:
                tensors = {k: torch.from_numpy(arrays[k]) for k in arrays.files}
            cases.append((case["params"], tensors))
    return cases


def relative_error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-300)
    return ((actual.double() - expected.double()).abs().max() / scale).item()
