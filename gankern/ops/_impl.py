"""Which implementation of an op runs: loading the compiled libraries, choosing, explaining.

An implementation is a namespace of PyTorch's dispatcher. `gankern` holds the C++ kernels for the
CPU and for CUDA, `gankern_triton` the Triton ones, under the same names and schemas, so that an
op's autograd is written once over `op(impl, name)`.
"""

from __future__ import annotations

import ctypes
import operator
import os
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

try:
    import triton
except ImportError:  # no wheel for this platform
    triton = None

IMPLS = ("cuda", "triton", "cpu", "reference")
NAMESPACES = {"cuda": "gankern", "cpu": "gankern", "triton": "gankern_triton"}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PACKAGE = Path(__file__).resolve().parents[1]

LIBRARIES: dict[str, str] = {}  # "cpu", "cuda": "" where loaded, else the reason why not
_fakes: dict[str, Callable] = {}
_overloads: dict[tuple[str, str], Any] = {}
_transforms_active = torch._C._are_functorch_transforms_active
_libraries: list[torch.library.Library] = []  # a registration lives as long as its library


def triton_interpreted() -> bool:
    """True where Triton's interpreter runs kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


TRITON_RUNS = triton is not None and (triton_interpreted() or torch.cuda.device_count() > 0)


def load_libraries() -> None:
    """Load the compiled libraries that this installation has; called once, on import."""
    for name in ("cpu", "cuda"):
        path = PACKAGE / f"_{name}.so"
        if not path.exists():
            LIBRARIES[name] = f"the {name.upper()} library was not built: see `gankern doctor`"
        elif name == "cuda" and torch.version.cuda is None:
            LIBRARIES[name] = "this PyTorch is a CPU build: install a CUDA build of torch"
        elif name == "cuda" and LIBRARIES["cpu"]:
            LIBRARIES[name] = "the CUDA library needs the CPU library: " + LIBRARIES["cpu"]
        else:
            LIBRARIES[name] = _load(path)


def _load(path: Path) -> str:
    try:
        torch.ops.load_library(str(path))
    except OSError as e:
        return f"{path.name} does not load ({e}): reinstall gankern with this PyTorch"
    return ""


def triton_op(name: str) -> Callable[[Callable], Callable]:
    """Register a function that launches Triton kernels as op `name`, where Triton can run: what
    registers it imports torch._dynamo, which takes as long as torch itself."""
    if TRITON_RUNS:
        return torch.library.triton_op(f"gankern_triton::{name}", mutates_args=())
    return lambda function: function


def dense(t: torch.Tensor) -> torch.Tensor:
    """t if its elements fill their memory, in whatever order of dimensions; else a copy that does,
    in t's order."""
    expected = 1
    for stride, size in sorted((t.stride(d), t.shape[d]) for d in range(t.dim())):
        if size != 1:
            if stride != expected:
                return t.clone()
            expected *= size
    return t


def laid_out_like(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t, or a copy, with the strides of `like`, which is dense."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


def around(t: torch.Tensor, dim: int) -> tuple[int, int, int]:
    """(outer, C, inner) of a dense t around its dimension `dim`, in memory order."""
    C, numel = t.shape[dim], t.numel()
    if C == 1 or numel == 0:
        return 1, C, numel // C if C else 0
    inner = t.stride(dim)
    return numel // (C * inner), C, inner


def typical(n: Any) -> int:
    """n, or what a symbolic n of torch.compile and torch.export was traced with: for what suits n
    and is right for any. Blocks made of a symbolic n itself would be guards at best, and of bit
    operations expressions that SymPy simplifies for minutes."""
    if isinstance(n, int):
        return n
    return int(n.node.hint) if n.node.has_hint() else 1024


def power_of_2(n: Any, most: int) -> int:
    """The least power of 2 that is no less than the typical n, up to `most`: a kernel's block."""
    return min(most, triton.next_power_of_2(max(typical(n), 1)))


def register_fake(name: str, fake: Callable) -> None:
    """Give op `name`, once defined, its shape function in every namespace that has the op."""
    _fakes[name] = fake
    for impl in NAMESPACES:
        _look_up(impl, name)
    for namespace in dict.fromkeys(NAMESPACES.values()):
        _register_fake_in(namespace, name)


def _register_fake_in(namespace: str, name: str) -> None:
    if namespace != "gankern_triton" and hasattr(getattr(torch.ops, namespace), name):
        torch.library.register_fake(f"{namespace}::{name}", _fakes[name])
        # Autograd is outside, in the ops' Functions: no call shall pass through the dispatcher's
        # fallback for ops without a gradient.
        library = torch.library.Library(namespace, "IMPL")
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        _libraries.append(library)


def _look_up(impl: str, name: str) -> None:
    """Keep the overload, all of them before any runs: a compiled backward must not write a dict."""
    packet = getattr(getattr(torch.ops, NAMESPACES[impl]), name, None)
    if packet is not None:
        _overloads[impl, name] = packet.default


def add_namespace(impl: str, namespace: str) -> None:
    """Make the ops of another namespace selectable as `impl` (tests add the simulated kernels)."""
    NAMESPACES[impl] = namespace
    for name in _fakes:
        _look_up(impl, name)
        _register_fake_in(namespace, name)


def op(impl: str, name: str) -> Any:
    """The dispatcher's overload of op `name` in the implementation `impl`."""
    return _overloads[impl, name]


def has(impl: str, name: str) -> bool:
    """Whether the implementation has an op `name`."""
    return (impl, name) in _overloads


def why_not(impl: str, device: str, op_name: str) -> str:
    """Why `impl` cannot run `op_name` on tensors of `device`, with the cure; empty if it can."""
    if impl == "reference":
        return ""
    reason = _why_not_at_all(impl, device)
    if not reason and not hasattr(getattr(torch.ops, NAMESPACES[impl]), op_name):
        return f"{op_name} has no {impl} kernel: use impl=None"
    return reason


def _why_not_at_all(impl: str, device: str) -> str:
    if impl == "triton":
        if triton is None:
            return "triton is not installed: pip install triton"
        if device != "cuda" and not (device == "cpu" and triton_interpreted()):
            return f"Triton kernels need CUDA tensors, got {device}: use impl=None or 'cpu'"
        return "" if TRITON_RUNS else "its kernels need a GPU, and PyTorch finds none"
    if impl in ("cpu", "cuda"):
        if device != impl:
            return f"its kernels need {impl.upper()} tensors, got {device}: use impl=None"
        return LIBRARIES[impl]
    if impl in NAMESPACES:
        return ""
    return f"it is not one of {', '.join(IMPLS)}"


def _best(device: str, op_name: str) -> str:
    preferred = ("cuda", "triton") if device == "cuda" else (device,)
    for impl in preferred:
        if impl in NAMESPACES and not why_not(impl, device, op_name):
            return impl
    return "reference"


# The one override: the implementation that impl=None means wherever it can run.
_OVERRIDE = os.environ.get("GANKERN_IMPL", "")
_default: dict[tuple[str, str], str] = {}


def default_impl(op_name: str, device: str) -> str:
    """The implementation of an op that impl=None means on `device` ("cpu", "cuda", ...)."""
    key = (op_name, device)
    found = _default.get(key)
    if found is None:
        usable = _OVERRIDE and not why_not(_OVERRIDE, device, op_name)
        found = _default[key] = _OVERRIDE if usable else _best(device, op_name)
    return found


def choose(op_name: str, impl: str | None, x: torch.Tensor, called: str = "") -> str:
    """The implementation of op `op_name` to run for x; called: by which name the user called it.

    Raises:
        ValueError: impl is unknown.
        RuntimeError: impl was named and cannot run here; the text says why and what to do.
    """
    device = "cpu" if x.is_cpu else x.device.type  # the first is read at a fifth of the cost
    if impl is None:
        found = default_impl(op_name, device)
        if transformed() or (found == "triton" and x.dtype == torch.float64):
            return "reference"
        return found
    if (
        type(impl) is str
        and impl == device
        and not transformed()
        and (impl, op_name) in _overloads
        and not LIBRARIES[impl]
    ):
        return impl
    called = called or op_name
    if not isinstance(impl, str) or (impl not in IMPLS and impl not in NAMESPACES):
        error = ValueError if isinstance(impl, str) else TypeError
        raise error(f"{called}: impl must be None or one of {', '.join(IMPLS)}, got {shown(impl)}")
    reason = why_not(impl, device, op_name)
    if impl == "triton" and x.dtype == torch.float64:
        reason = "Triton kernels compute in float32, got float64: use impl=None"
    if impl != "reference" and transformed():
        reason = "kernels have no transforms of torch.func and no forward mode: use impl=None"
    if reason:
        raise RuntimeError(f"{called}: impl={impl!r} cannot run: {reason}")
    return impl


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is under way: these go
    through PyTorch's own operations only, and past a kernel without an error."""
    return _transforms_active() or forward_ad._current_level >= 0


def records(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records an op on these tensors. A Function costs more than a small kernel:
    it is entered only then."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Of the output of an op that keeps x's, where that is channels-last; else contiguous."""
    if transformed():  # torch.func.vmap does not tell
        return torch.contiguous_format
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def implementation(name: str, device: str) -> int:
    """The address of `gankern::<op>` there, for csrc/eager; 0 if it is not ours."""
    namespace, op_name = name.split("::")
    if namespace != "gankern" or LIBRARIES.get(device, "no such library"):
        return 0
    find = getattr(ctypes.CDLL(str(PACKAGE / f"_{device}.so")), "gankern_kernel", None)
    if find is None:  # an older build
        return 0
    find.restype = ctypes.c_void_p
    return find(op_name.encode()) or 0


def set_cpu_isa(level: int) -> int:
    """Limit the CPU kernels to 0 (base), 1 (AVX2) or 2 (AVX-512); -1: the best. For tests."""
    library = ctypes.CDLL(str(PACKAGE / "_cpu.so"))
    return int(library.gankern_set_cpu_isa(level))


def poison_memory(on: bool) -> None:
    """Whether fresh memory of the CPU kernels holds NaN, whatever PyTorch's switch. For tests."""
    if not LIBRARIES["cpu"]:
        ctypes.CDLL(str(PACKAGE / "_cpu.so")).gankern_poison_memory(int(on))


def check_float(op_name: str, name: str, t: Any) -> None:
    """Raise TypeError unless t is a tensor of a supported floating dtype."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{op_name}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{op_name}: {name} must be float32, float16, bfloat16 or float64, got {t.dtype}"
        )


def shown(value: Any) -> str:
    """A value as an error shows it: numbers, strings and lists of them, else the type."""
    plain = (int, float, str, type(None))
    if isinstance(value, plain):
        return repr(value)
    if isinstance(value, (list, tuple)) and all(isinstance(v, plain) for v in value):
        return repr(value)
    return type(value).__name__


# Arguments that are not what they mostly are. A caller looks at `type(x) is float`, `is int` or
# `x is True` first, at a tenth of the cost of a call.


def number(op_name: str, name: str, value: Any, wanted: str = "a number", least: str = "") -> float:
    """value as a float; least: what to say of one under 0, else it may be."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{op_name}: {name} must be {wanted}, got {type(value).__name__}")
    if value != value or (least and value < 0):
        raise ValueError(f"{op_name}: {name} must be {least or wanted}, got {value}")
    return float(value)


def integer(op_name: str, name: str, value: Any, wanted: str = "an int") -> int:
    """value as an int."""
    if not is_integer(value):
        raise TypeError(f"{op_name}: {name} must be {wanted}, got {type(value).__name__}")
    return operator.index(value)


def is_integer(value: Any) -> bool:
    """Whether value is a whole number of any type; a bool is none."""
    return isinstance(value, (int, Integral, torch.SymInt)) and not isinstance(value, bool)


def flag(op_name: str, name: str, value: Any, wanted: str = "True or False") -> bool:
    """value as a bool."""
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{op_name}: {name} must be {wanted}, got {shown(value)}")


def wrong_dtype(op_name: str, name: str, t: torch.Tensor, x: torch.Tensor) -> TypeError:
    """The error of an operand that has neither x's dtype nor float32."""
    wanted = " or ".join(dict.fromkeys((str(x.dtype), "torch.float32")))
    return TypeError(f"{op_name}: {name} must be {wanted}, got {t.dtype}")


load_libraries()
