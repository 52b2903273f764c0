"""Fixtures of every test: the device, the implementations it can run, NaN in fresh memory."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu (default) or cuda: the whole suite there")
    parser.addoption(
        "--impl", default="", help="run only these implementations, for example cpu,simt"
    )
    parser.addoption(
        "--whole",
        action="store_true",
        help="golden networks whole in Triton's interpreter: minutes",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated


def _impls(config: pytest.Config) -> list[str]:
    on = config.getoption("--device")
    impls = (
        ["reference", "cuda", "triton"] if on == "cuda" else ["reference", "cpu", "triton", "simt"]
    )
    only = config.getoption("--impl")
    return [i for i in impls if not only or i in only.split(",")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker of pytest-xdist gets what shares work: an op's random cases share their judges."""
    for item in items:
        if item.name.startswith("test_random"):
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} random"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", _impls(metafunc.config), indirect=True)


@pytest.fixture
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation in turn; "simt" is the CUDA source, run on the CPU by csrc/simt."""
    if request.param == "simt":
        request.getfixturevalue("simt_ops")
    if request.param == "triton" and request.config.getoption("--device") == "cpu":
        quicken_interpreter()
        limit_grids()
    return request.param


MAX_GRID = (2**31 - 1, 65535, 65535)  # CUDA programming guide, "Technical Specifications"


@functools.cache
def limit_grids() -> None:
    """Triton's interpreter runs any grid: refuse those that no GPU launches."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpreterBuilder

    set_grid_dim = InterpreterBuilder.set_grid_dim

    def checked(self: Any, *grid: int) -> None:
        fits = all(1 <= size <= most for size, most in zip(grid, MAX_GRID, strict=True))
        assert fits, f"a GPU launches grids of 1 to {MAX_GRID} programs, got {grid}"
        set_grid_dim(self, *grid)

    InterpreterBuilder.set_grid_dim = checked


@functools.cache
def quicken_interpreter() -> None:
    """Spare Triton's interpreter what it repeats, which is two thirds of its time.

    It replaces the language's functions at each launch and, to no effect, at each call of a device
    function, looking through all members of the modules each time. It makes the type and the shape
    of each value anew, and looks for overflow of integers by ten operations of the language.
    """
    import numpy as np
    from triton.language import core, semantic
    from triton.runtime import interpreter

    wanted = ("_patch_lang", "_patch_builtin", "_patch_attr", "_LangPatchScope", "_get_np_dtype")
    if not all(hasattr(interpreter, name) for name in wanted) or not hasattr(
        semantic, "TritonSemantic"
    ):
        return  # another version of Triton
    patch_lang, patched = interpreter._patch_lang, set()

    @functools.cache
    def builtins(package: Any) -> list[tuple[str, Any]]:
        members = inspect.getmembers(package)
        return [m for m in members if interpreter.tl.core.is_builtin(m[1])]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(package):
            interpreter._patch_attr(package, name, member, builder, scope)

    def patch_once(function: Any) -> Any:
        """The functions of one module call the language through the same names."""
        module, launch = id(function.__globals__), not patched
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        scope = patch_lang(function)
        if launch:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_once

    find_np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def get_np_dtype(kind: Any) -> Any:
        if kind.name not in np_dtypes:
            np_dtypes[kind.name] = find_np_dtype(kind)
        return np_dtypes[kind.name]

    interpreter._get_np_dtype = get_np_dtype

    np_operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth < 64:
            a, b = lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64)
            result = np_operations[operation.__name__](a, b)
            low, high = kind.get_int_min_value(), kind.get_int_max_value()
            assert result.min() >= low, f"{kind} overflow in {operation.__name__}"
            assert result.max() <= high, f"{kind} overflow in {operation.__name__}"

    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow

    make_block, blocks = core.block_type.__init__, {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(core._unwrap_if_constexpr(s) for s in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    make_tensor, tensors = core.tensor.__init__, {}

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, None, type)
            tensors[type.name] = vars(self).copy()
        vars(self).update(tensors[type.name])
        self.handle, self.type = handle, type

    core.block_type.__init__, core.tensor.__init__ = block_init, tensor_init


@pytest.fixture(scope="session")
def simt_ops() -> None:
    """The simulated kernels as an implementation: torch.ops.gankern_simt, impl="simt"."""
    import simt_build

    from gankern.ops import _impl

    simt_build.load_ops()
    _impl.add_namespace("simt", "gankern_simt")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@functools.cache
def poison_kernels() -> None:
    from gankern.ops import _impl

    _impl.poison_memory(True)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN, so that an element no kernel writes cannot pass for a result.

    And a GPU's convolutions are of float32, not of its 19-bit form: both sides of a comparison
    are.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    poison_kernels()
    yield
    torch.use_deterministic_algorithms(before)
