"""Triton's ops traced on a machine without a GPU, as torch.compile traces them on one.

    python triton_traced.py

The tests of operators (`test_opcheck`) run with fake tensors of an imagined H100, whose sizes are
symbols in what they give to `harness.opcheck`. Prints a line for each operator: how often it was
traced, and the launches of kernels in its graphs.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
from collections import Counter
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import torch._dynamo
import triton
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget

torch.cuda.device_count = lambda: 1  # before gankern asks

import harness  # noqa: E402

FILES = [
    "adain", "bias_act", "demod_coefs", "minibatch_stddev", "modulated_gemm", "pixel_norm",
    "synthesis_layer", "upfirdn2d",
]  # fmt: skip


class Driver:
    """Of Triton, whose target is asked for where a kernel's writes are looked for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def on_gpu(t: Any, mode: FakeTensorMode) -> Any:
    """A tensor of symbolic sizes like t, on the GPU; what is no tensor, as it is."""
    if not isinstance(t, Tensor):
        return t
    with unset_fake_temporarily():
        sizes, strides = ([int(n) for n in ns] for ns in (t.shape, t.stride()))
        f = mode.from_tensor(torch.empty_strided(sizes, strides, dtype=t.dtype, device="meta"))
        like = torch.empty_strided(f.shape, f.stride(), dtype=f.dtype, device="meta")
        return FakeTensor(mode, like, torch.device("cuda:0"))


traced: Counter[str] = Counter()
launches: Counter[str] = Counter()


def trace(op: Any, args: tuple[Any, ...]) -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        args = tuple(on_gpu(a, mode) for a in args)
        tensors = [a for a in args if isinstance(a, Tensor)]

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(tensors)
            found = op(*(next(rest) if isinstance(a, Tensor) else a for a in args))
            return found if isinstance(found, tuple) else (found,)

        graph = aot_export_joint_simple(call, tensors, trace_joint=False).graph
    traced[op._schema.name] += 1
    launches[op._schema.name] += sum("triton_kernel" in str(n.target) for n in graph.nodes)


def cases(test: Any) -> list[dict[str, Any]]:
    """The arguments that pytest.mark.parametrize gives to a test."""
    marks = [m for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
    choices = [[{m.args[0]: value} for value in m.args[1]] for m in marks]
    return [{k: v for d in chosen for k, v in d.items()} for chosen in itertools.product(*choices)]


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    harness.opcheck = trace
    for name in FILES:
        test = importlib.import_module(f"test_{name}").test_opcheck
        for case in cases(test):
            given = {"impl": "triton", "device": "cuda", **case}
            with FakeTensorMode(allow_non_fake_inputs=True):
                test(**{k: v for k, v in given.items() if k in inspect.signature(test).parameters})
    for op, count in sorted(traced.items()):
        print(op, count, launches[op])


if __name__ == "__main__":
    main()
