"""Calls of ops, remembered: a call like an earlier one goes from Python straight to its operator.

What an op's checks and choices come to depends on its arguments' types, dtypes, devices, shapes and
strides, on which of them take a gradient, and on its numbers. `gankern._eager` (csrc/eager) keeps
it by these, asks `learn` at the second call of a kind, and runs later ones itself, autograd's node
included, in less time than the checks take. It is an extension of one version of Python and of
PyTorch; without it, and wherever a mode, a transform, a subclass or a compiler looks on, an op is
its Python function.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gankern.ops import _impl

Plan = tuple[Callable, tuple[Any, ...]]
_ABI = 5  # of the kernels and recipes that the extension takes: csrc/eager/remember.cpp


def why_not() -> str:
    """Why calls are not remembered here, with the cure; empty if they are."""
    return _WHY_NOT


def _load() -> tuple[Any, str]:
    """The extension, or None and why it is not used."""
    if os.environ.get("GANKERN_REMEMBER", "1") == "0":
        return None, "not loaded: GANKERN_REMEMBER=0"
    try:
        about = json.loads((_impl.PACKAGE / "_build.json").read_text())
        built = about.get("eager", {"built": False})
    except (OSError, ValueError):
        return None, "not built: there is no _build.json; reinstall gankern"
    if not built["built"]:
        return None, f"not built: {built.get('reason', 'build gankern again')}"
    python = about["python"].rpartition(".")[0]
    if (python, about["torch"]) != (
        ".".join(platform.python_version_tuple()[:2]),
        torch.__version__,
    ):
        wanted = f"Python {python} with torch {about['torch']}"  # whose insides it knows
        return None, f"not loaded: it is for {wanted}; build gankern again"
    try:
        module = importlib.import_module("gankern._eager")
        if module.ABI != _ABI:
            return None, "not loaded: it is of another version of gankern; build gankern again"
        return module, ""
    except (ImportError, AttributeError) as error:
        return None, f"not loaded ({error}): build gankern again"


_eager, _WHY_NOT = _load()


def set_state(state: int) -> None:
    """Tell what calls depend on beside their arguments, a number; 0 until then."""
    if _eager is not None:
        _eager.set_state(state)


def remember(
    plan: Callable[..., Plan], run: Callable[..., Tensor], function: Any
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """An op twice: its Python function, for compilers, and the one that remembers calls.

    `plan`, of the op's arguments, is (callable, arguments): the op is that call. Where it is `run`,
    it does `function.apply` if autograd records and else the same without, and the arguments are
    those of `function.forward`, the tensors among them the op's own.
    """

    def call(*args: Any) -> Tensor:
        planned, its_args = plan(*args)
        return planned(*its_args)

    if _eager is None:
        return call, call
    return call, _eager.Remembered(call, functools.partial(_learn, plan, run, function))


def remember_function(function: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Likewise `function.apply` itself."""
    apply = function.apply
    return remember(lambda *args: (apply, args), apply, function)


# Operators of PyTorch's that a remembered call may be, beside ours: they have no Python of theirs.
_OTHERS = {
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
    torch.ops.aten.mul.Scalar,
    torch.ops.aten.sum.default,
    torch.ops.aten.sum.dim_IntList,
    torch.ops.aten.t.default,
    torch.ops.aten.view.default,
}


class _OtherOperatorError(Exception):
    pass


class _Capture(TorchDispatchMode):
    """The calls of operators that are made under it, in place of which it has the shapes of what
    they would return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []  # the operator, its arguments, its outputs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, name = func._schema.name.split("::")
        ours = namespace in _impl.NAMESPACES.values() and name in _impl._fakes
        if not (ours or func in _OTHERS):
            raise _OtherOperatorError
        named = kwargs or {}
        shapes = (_on_meta(a) if isinstance(a, Tensor) else a for a in args)
        found = (_impl._fakes[name] if ours else func)(*shapes, **named)
        rest = func._schema.arguments[len(args) :]
        last = max((i for i, a in enumerate(rest) if a.name in named), default=-1) + 1
        args = *args, *(named.get(a.name, a.default_value) for a in rest[:last])
        self.calls.append((func, args, found if isinstance(found, tuple) else (found,)))
        return found


def _on_meta(t: Tensor) -> Tensor:
    if t.is_meta:
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


class _Context:
    """What a Function's forward leaves to its backward."""

    def __init__(self) -> None:
        self.saved: tuple[Any, ...] = ()
        self.materialize = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value


class _Kept:
    """The context that a Function's backward sees."""

    def __init__(self, known: dict[str, Any], saved: Any, needs: Any) -> None:
        self.__dict__.update(known)
        self.saved_tensors = saved
        self.needs_input_grad = needs


def _calls_of(function: Callable[..., Any], *args: Any) -> tuple[Any, list[Any]] | None:
    """What function(*args) returns, and the operators it calls with arguments and outputs, all by
    their shapes alone; None if it does anything else."""
    try:
        with torch.no_grad(), _Capture() as capture:
            result = function(*args)
    except Exception:  # another operator, or an error that the call itself shall tell
        return None
    return (result, capture.calls) if capture.calls else None


def _places(tensors: Any) -> dict[int, int]:
    """Where each tensor is; empty where one is in two places: next time it could be two."""
    places = {id(t): i for i, t in enumerate(tensors) if isinstance(t, Tensor)}
    return places if len(places) == sum(isinstance(t, Tensor) for t in tensors) else {}


def _recipe(op: Any, args: tuple[Any, ...], places: dict[int, int]) -> tuple[Any, Any] | None:
    """(The operator's name and where its kernel is, (place of a tensor or -1, else the value) for
    each argument)."""
    if any(isinstance(a, Tensor) and id(a) not in places for a in args):
        return None  # made of others
    if not all(isinstance(a, Tensor) or _is_constant(a) for a in args):
        return None
    stack = tuple((places[id(a)], None) if isinstance(a, Tensor) else (-1, a) for a in args)
    devices = {a.device.type for a in args if isinstance(a, Tensor) and not a.is_meta}
    kernel = _impl.implementation(op._schema.name, devices.pop()) if len(devices) == 1 else 0
    return (op._schema.name, op._schema.overload_name, kernel), stack


def _is_constant(value: Any) -> bool:
    """Whether csrc/eager takes it as an operator's argument."""
    if isinstance(value, list):
        return all(type(v) in (int, bool) for v in value)
    return value is None or type(value) in (int, float, bool)


def _learn(
    plan: Callable[..., Plan], run: Callable[..., Tensor], function: Any, *args: Any
) -> tuple[Any, ...] | None:
    """The recipe of csrc/eager for a call, None where it is more than one operator."""
    planned, its_args = plan(*args)
    places, context = _places(args), _Context()
    if planned is not run or not places:
        return None
    found = _calls_of(function.forward, context, *its_args)
    if not found or len(found[1]) != 1:
        return None
    y, [(op, op_args, outputs)] = found
    recipe = _recipe(op, op_args, places)
    if not recipe:
        return None
    made = {id(t): i for i, t in enumerate(outputs)}
    edges = [(t, i) for i, t in enumerate(its_args) if isinstance(t, Tensor)]
    known = [t for t in context.saved if t is not None] + [t for t, _ in edges]
    if y is not outputs[0] or any(id(t) not in places and id(t) not in made for t in known):
        return None
    saved = tuple((places.get(id(t), -1), made.get(id(t), -1)) for t in context.saved)
    left = {k: v for k, v in vars(context).items() if k not in ("saved", "materialize")}
    return (
        *recipe,
        saved,
        tuple((places[id(t)], i) for t, i in edges),
        len(its_args),
        function.__name__.lstrip("_") + "Backward",
        context.materialize,
        functools.partial(_backward, function, left),
        functools.partial(_learn_gradient, function, left),
        functools.partial(_traced_backward, function, left, list(y.shape), list(y.stride())),
    )


def _backward(function: Any, left: dict[str, Any], saved: Any, needs: Any, dy: Any) -> Any:
    return function.backward(_Kept(left, saved, needs), dy)


@torch.library.custom_op("gankern_eager::laid_out", mutates_args=())
def _laid_out(t: Tensor, shape: list[int], strides: list[int]) -> Tensor:
    """A copy with these strides."""
    return t.new_empty_strided(shape, strides).copy_(t)


@_laid_out.register_fake
def _(t: Tensor, shape: list[int], strides: list[int]) -> Tensor:
    return t.new_empty_strided(shape, strides)


_laid_out.register_autograd(lambda ctx, dy: (dy, None, None))


def _traced_backward(
    function: Any, left: dict[str, Any], shape: list[int], strides: list[int],
    saved: Any, needs: Any, dy: Any,
) -> Any:  # fmt: skip
    """Compiled autograd traces a gradient with a dy of no shape, of which this one may ask."""
    return _backward(function, left, saved, needs, _laid_out(dy, shape, strides))


def _learn_gradient(
    function: Any, left: dict[str, Any], saved: Any, needs: Any, dy: Any
) -> tuple[Any, ...] | None:
    """The recipe of a backward that is some operators, one after another: of each its own, of the
    tensors saved, then dy, then what those before it returned; and the place of each gradient."""
    known = [*saved, dy]
    places = _places(known)
    found = _calls_of(_backward, function, left, saved, needs, dy)
    if not found:
        return None
    grads, calls = found
    recipes = []
    for op, args, outputs in calls:
        recipe = _recipe(op, args, places)
        if not recipe:
            return None
        recipes.append(recipe)
        places |= {id(t): len(known) + i for i, t in enumerate(outputs) if t is not None}
        known += outputs
    if any(g is not None and places.get(id(g), 0) <= len(saved) for g in grads):
        return None  # made of others, or dy itself
    return recipes, [-1 if g is None else places[id(g)] for g in grads]
