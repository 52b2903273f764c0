"""Every Triton kernel of gankern.ops, compiled for GPUs that need not be there: no spills.

`python python_tests/test_triton_aot.py 90` prints one JSON line a kernel, variant and dtype.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

# Compute capability: the element type and the variants that kernels are compiled for.
CAPABILITIES = {
    80: ("fp32", "all"),
    90: ("fp16", "all"),
    100: ("bf16", "last"),
    120: ("fp16", "last"),
}

BWD = {"HAS_B": True, "CLAMPED": True, "SUMS": True, "SECOND": False, "FROM_X": False}
TAPS = {"TAPS_X": 4, "TAPS_Y": 4, "SEPARABLE": False}
TAPS12 = {"TAPS_X": 12, "TAPS_Y": 12, "SEPARABLE": True}
UP2 = {"UP_X": 2, "UP_Y": 2, "DOWN_X": 1, "DOWN_Y": 1}
DOWN2 = {"UP_X": 1, "UP_Y": 1, "DOWN_X": 2, "DOWN_Y": 2}
OPERANDS = {"HAS_D": True, "HAS_NOISE": True, "HAS_STRENGTH": True, "HAS_B": True}
FILTER = {"HAS_F": True, **TAPS, **OPERANDS, "ACT": 2, "CLAMPED": True}
NO_FILTER = {**FILTER, "HAS_F": False, "TAPS_X": 1, "TAPS_Y": 1}
PLANES = {"LAST": False, "BLOCK": 1024, "BLOCK_C": 1}
PIXELS = {"LAST": True, "BLOCK": 32, "BLOCK_C": 32}
GEMM = {"SIZE": 3, **OPERANDS, "ACT": 2, "CLAMPED": True, "WIDEN": False, "GROUP": 8}
GEMM |= {"num_warps": 4, "num_stages": 3}
GEMM32 = {**GEMM, "BLOCK_K": 16, "DTYPES": ["fp32"]}
GEMM16 = {**GEMM, "BLOCK_K": 64, "DTYPES": ["fp16", "bf16"]}

# The compile-time arguments of each kernel at the models' shapes, by name. A size that is 1 is one
# of them: Triton compiles for it. DTYPES: the row is of these alone.
KERNELS: dict[str, list[dict[str, Any]]] = {
    "bias_act_fwd_kernel": [
        {"ACT": 2, "HAS_B": True, "CLAMPED": True, "BLOCK": 1024},
        {"ACT": 8, "HAS_B": True, "CLAMPED": False, "BLOCK": 1024},
    ],
    "bias_act_bwd_kernel": [
        {"ACT": 2, "BLOCK": 1024, "BLOCK_C": 1, **BWD},
        {"ACT": 2, "BLOCK": 16, "BLOCK_C": 64, "inner": 1, **BWD},
        {
            "ACT": 8,
            "BLOCK": 1024,
            "BLOCK_C": 1,
            **BWD,
            "SECOND": True,
            "FROM_X": True,
            "SUMS": False,
        },
    ],
    "pixel_norm_kernel": [
        *({"ORDER": order, "BLOCK_C": 512, "BLOCK_V": 8} for order in (0, 1, 2)),
        {"ORDER": 0, "BLOCK_C": 512, "BLOCK_V": 8, "inner": 1},
    ],
    "minibatch_stddev_fwd_kernel": [{"ROW": 0, "Y_ROW": 0, "BLOCK": 1024, "F": 1}],
    "minibatch_stddev_bwd_kernel": [{"ROW": 0, "Y_ROW": 0, "BLOCK": 1024, "F": 1}],
    "demod_coefs_fwd_kernel": [
        {"BLOCK_N": 8, "BLOCK_I": 512, "stride_i": 9, "stride_k": 1},
        {"BLOCK_N": 8, "BLOCK_I": 512, "stride_k": 512, "stride_i": 1},
    ],
    "demod_coefs_bwd_kernel": [
        {"BLOCK": 1024, "BLOCK_O": 32, "BLOCK_I": 64, "K": 9, "LAST": last}
        for last in (False, True)
    ],
    "upfirdn2d_kernel": [
        {"C": 1, "BLOCK_X": 128, "BLOCK_Y": 8, **TAPS, **UP2},
        {"C": 64, "BLOCK_X": 128, "BLOCK_Y": 8, **TAPS, **DOWN2},
        {
            "C": 1,
            "BLOCK_X": 128,
            "BLOCK_Y": 8,
            **UP2,
            "TAPS_X": 12,
            "TAPS_Y": 12,
            "SEPARABLE": True,
        },
    ],
    "synthesis_epilogue_kernel": [
        {**FILTER, **PLANES, "BACKWARD": False},
        {**FILTER, **PIXELS, "BACKWARD": True},
        {**NO_FILTER, **PLANES, "BACKWARD": True},
        {**NO_FILTER, **PIXELS, "BACKWARD": False},
    ],
    "adain_fwd_kernel": [
        {"BLOCK_P": 4096, "BLOCK_V": 1, "inner": 1},
        {"BLOCK_P": 128, "BLOCK_V": 32},
    ],
    "adain_bwd_kernel": [
        {"BLOCK_P": 4096, "BLOCK_V": 1, "inner": 1},
        {"BLOCK_P": 128, "BLOCK_V": 32},
    ],
    "modulated_gemm_kernel": [
        *({**GEMM32, "BLOCK_M": m, "BLOCK_N": n} for m, n in ((16, 64), (128, 32), (64, 64))),
        {**GEMM16, "BLOCK_M": 16, "BLOCK_N": 64, "N": 1, "H": 1, "W": 1, "strength_step": 1},
        *({**GEMM16, "BLOCK_M": m, "BLOCK_N": n} for m, n in ((16, 64), (128, 32), (64, 64))),
        {**GEMM16, "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8},
    ],
}

OPTIONS = ("num_warps", "num_stages")  # of a launch, beside the arguments
FLOATS = {"alpha", "gain", "inv_gain", "clamp", "eps", "filter_gain"}
BOOLS = {"flip"}
# Pointers to float32 whatever x is.
FLOAT32 = {
    *("f_ptr", "sums_ptr", "mean_ptr", "rstd_ptr"),
    *("dd_ptr", "q_ptr"),
    *("d_ptr", "noise_ptr", "strength_ptr", "slope_ptr"),
}


def kernels() -> dict[str, Any]:
    """{name: triton.JITFunction} of the kernels; functions that kernels call begin with _."""
    from triton import JITFunction

    import gankern.ops

    found = {}
    for info in pkgutil.iter_modules(gankern.ops.__path__):
        module = importlib.import_module(f"gankern.ops.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and not name.startswith("_"):
                found[name] = value
    return found


def argument_type(name: str, dtype: str) -> str:
    if name.endswith("_ptr"):
        return "*fp32" if name in FLOAT32 else f"*{dtype}"
    return "fp32" if name in FLOATS else "i1" if name in BOOLS else "i32"


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: str, capability: int) -> Any:
    """As Triton does at a launch with 16-byte aligned tensors whose sizes are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants[name] for name in OPTIONS if name in constants}
    constants = {k: v for k, v in constants.items() if k not in (*OPTIONS, "DTYPES")}
    runtime = [name for name in kernel.arg_names if name not in constants]
    signature = {name: argument_type(name, dtype) for name in runtime}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = [name for name in runtime if signature[name] == "i32" or name.endswith("_ptr")]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_all(capability: int) -> Iterator[dict[str, Any]]:
    dtype, which = CAPABILITIES[capability]
    for name, kernel in kernels().items():
        if name not in KERNELS:
            yield {"kernel": name}
        variants = [v for v in KERNELS.get(name, []) if dtype in v.get("DTYPES", [dtype])]
        for constants in variants if which == "all" else variants[-1:]:
            compiled = compile_kernel(kernel, constants, dtype, capability)
            row = {"kernel": name, "constants": constants, "dtype": dtype}
            yield row | figures(compiled.asm["cubin"], f"sm_{capability}")
        if which == "all":  # sizes that are 1 are constants to Triton, which have no methods
            ints = [n for n in kernel.arg_names if argument_type(n, dtype) == "i32"]
            compile_kernel(kernel, dict.fromkeys(ints, 1) | variants[0], dtype, capability)


def figures(cubin: bytes, arch: str) -> dict[str, Any]:
    import sass

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        (kernel,) = sass.read_cubin(path, arch, code=True)
    read = {"registers": kernel.registers, "threads": kernel.threads, "stack": kernel.stack}
    assert kernel.code
    return read | {name: getattr(kernel.code, name) for name in ("spills", "loads", "stores")}


def compiled(capability: int) -> list[dict[str, Any]]:
    """The rows of one architecture, from a process in which Triton does not interpret."""
    pytest.importorskip("triton")
    if not (ROOT / "benchmarks/sass.py").exists():
        pytest.skip("needs the source tree, for benchmarks/sass.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, str(capability)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile(capability: int) -> None:
    rows = compiled(capability)
    missing = {row["kernel"] for row in rows} ^ set(KERNELS)
    assert not missing, f"KERNELS has a row for each Triton kernel and no other: {missing}"
    spilling = [row for row in rows if row.get("stack") or row.get("spills")]
    assert not spilling, f"local memory: {spilling}"
    narrow = [row for row in rows if "16" not in row.get("stores", {"16": 1})]
    assert not narrow, f"no 16-byte store: {narrow}"


if __name__ == "__main__":
    for line in compile_all(int(sys.argv[1])):
        print(json.dumps(line), flush=True)
