"""Every Triton kernel of gankern.ops, compiled for GPUs that need not be there: no spills.

`python python_tests/test_triton_aot.py 90` prints one JSON line a kernel and variant, with `fp16`
behind it all of them in that type.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

# Compute capability: the element types of the even and of the odd rows below. Each variant of a
# kernel is compiled for all of them, for two with float32 and for two with 16 bits.
CAPABILITIES = {
    80: ("fp32", "fp16"),
    90: ("fp16", "fp32"),
    100: ("fp32", "bf16"),
    120: ("fp16", "fp32"),
}

# Shared memory that a block may have: CUDA programming guide, "Technical Specifications".
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

FWD = {"ACT": 2, "HAS_B": True, "CLAMPED": True, "LONG": True, "BLOCK": 1024}
BWD = {"ACT": 2, "HAS_B": False, "CLAMPED": True, "SUMS": True, "SECOND": False, "FROM_X": False}
CHANNEL = {"LAST": False, "ROWS": 1, "BLOCK": 1024}
SMALL = {"LAST": False, "ROWS": 64, "BLOCK": 16}
CHANNELS = {"LAST": True, "ROWS": 16, "BLOCK": 64, "inner": 1}
OF_X = {"FROM_X": True, "HAS_B": True}
SIZES = ["outer", "C", "inner", "H", "W", "out_h", "out_w", "noise_step"]
ODD = {"ODD": SIZES, "NARROW": True}
NORM = {"BLOCK_C": 512, "BLOCK_V": 8, "WIDTH": 8}
ROWS = {**NORM, "WIDTH": 1, "inner": 1}
STDDEV = {"ROW": 0, "Y_ROW": 0, "WIDE": False, "BLOCK": 1024, "F": 1}
# The rows of y, a statistic longer than x's, are not aligned.
STDDEV_LAST = {**STDDEV, "ROW": 512, "Y_ROW": 513}
TAPS = {"TAPS_X": 4, "TAPS_Y": 4, "SEPARABLE": False}
TAPS12 = {"TAPS_X": 12, "TAPS_Y": 12, "SEPARABLE": True}
RATE1 = {"UP_X": 1, "UP_Y": 1, "DOWN_X": 1, "DOWN_Y": 1}
UP2 = {**RATE1, "UP_X": 2, "UP_Y": 2}
DOWN2 = {**RATE1, "DOWN_X": 2, "DOWN_Y": 2}
TILE = {"C": 1, "WIDE": False, "BLOCK_X": 128, "BLOCK_Y": 8}
OPERANDS = {"HAS_D": True, "HAS_NOISE": True, "HAS_STRENGTH": True, "HAS_B": True}
FILTER = {"HAS_F": True, **TAPS, **OPERANDS, "ACT": 2, "CLAMPED": True, "WIDE": False}
NO_FILTER = {**FILTER, "HAS_F": False, "TAPS_X": 1, "TAPS_Y": 1}
PLANES = {"LAST": False, "TILE_X": 64, "BLOCK": 1024, "BLOCK_C": 1}
PIXELS = {"LAST": True, "TILE_X": 8, "BLOCK": 32, "BLOCK_C": 32}
ADAIN = {"BLOCK_P": 4096, "BLOCK_V": 1, "WIDTH": 1, "inner": 1}
ADAIN_LAST = {"BLOCK_P": 128, "BLOCK_V": 32, "WIDTH": 32}
DEMOD_BWD = {"K": 9, "LAST": False, "WIDE": False, "BLOCK": 1024, "BLOCK_O": 32, "BLOCK_I": 64}
GEMM = {"SIZE": 3, **OPERANDS, "ACT": 2, "CLAMPED": True, "WIDEN": False, "WIDE": False}
GEMM |= {"GROUP": 8, "num_warps": 4, "num_stages": 3}
GEMM32 = {**GEMM, "BLOCK_K": 16, "DTYPES": ["fp32"]}
GEMM16 = {**GEMM, "BLOCK_K": 64, "DTYPES": ["fp16", "bf16"]}

# The compile-time arguments of each kernel at the models' shapes, by name. A size that is 1 is one
# of them: Triton compiles for it. DTYPES: the row is of these alone. ODD: these sizes
# are not multiples of 16. NARROW: stores are not of 16 bytes.
KERNELS: dict[str, list[dict[str, Any]]] = {
    "bias_act_fwd_kernel": [
        FWD,
        {**FWD, "ACT": 8, "CLAMPED": False, "LONG": False},
        {**FWD, "ACT": 3, "LONG": False, "inner": 1},
        {**FWD, "ACT": 7, "HAS_B": False},
        *({**FWD, "ACT": act, "LONG": False} for act in (1, 4, 5, 6)),
        *({**FWD, "LONG": long, "ODD": SIZES} for long in (True, False)),
    ],
    "bias_act_bwd_kernel": [
        *({**BWD, **tiles} for tiles in (CHANNEL, SMALL, CHANNELS)),
        *({**BWD, "ACT": 8, **OF_X, **tiles} for tiles in (CHANNEL, SMALL, CHANNELS)),
        *({**BWD, "ACT": act, **CHANNEL} for act in (3, 4, 5, 6, 7)),
        *(
            {**BWD, "ACT": act, "SECOND": True, "SUMS": False, **more, **tiles}
            for act, more, tiles in ((8, OF_X, CHANNEL), (7, {}, SMALL), (3, {}, CHANNELS))
        ),
        *({**BWD, **tiles, **ODD} for tiles in (CHANNEL, SMALL, CHANNELS)),
    ],
    "pixel_norm_kernel": [{"ORDER": o, **tiles} for o in (0, 1, 2) for tiles in (NORM, ROWS)]
    + [{"ORDER": 0, **NORM, **ODD}],
    "minibatch_stddev_fwd_kernel": [STDDEV, {**STDDEV_LAST, "NARROW": True}],
    "minibatch_stddev_bwd_kernel": [STDDEV, STDDEV_LAST],
    "demod_coefs_fwd_kernel": [
        {"BLOCK_N": 8, "BLOCK_I": 512, "stride_i": 9, "stride_k": 1},
        {"BLOCK_N": 8, "BLOCK_I": 512, "stride_k": 512, "stride_i": 1},
    ],
    "demod_coefs_bwd_kernel": [
        DEMOD_BWD,
        {**DEMOD_BWD, "LAST": True, "BLOCK": 512, "num_warps": 2},
    ],
    "upfirdn2d_kernel": [
        *({**TILE, **TAPS, **rate} for rate in (RATE1, UP2, DOWN2)),
        *({**TILE, "C": 64, **TAPS, **rate} for rate in (RATE1, UP2, DOWN2)),
        *({**TILE, "C": c, **TAPS12, **rate} for c in (1, 64) for rate in (UP2, DOWN2)),
    ],
    "synthesis_epilogue_kernel": [
        {**filtered, **tiles, "BACKWARD": backward}
        for filtered in (FILTER, NO_FILTER)
        for tiles in (PLANES, PIXELS)
        for backward in (False, True)
    ]
    + [{**f, **PLANES, **ODD, "BACKWARD": False} for f in (FILTER, NO_FILTER)],
    "adain_fwd_kernel": [ADAIN, ADAIN_LAST],
    "adain_bwd_kernel": [ADAIN, ADAIN_LAST],
    "modulated_gemm_kernel": [
        *({**GEMM32, "BLOCK_M": m, "BLOCK_N": n} for m, n in ((16, 64), (128, 32), (64, 64))),
        {**GEMM16, "BLOCK_M": 16, "BLOCK_N": 64, "N": 1, "H": 1, "W": 1, "strength_step": 1},
        *({**GEMM16, "BLOCK_M": m, "BLOCK_N": n} for m, n in ((16, 64), (128, 32), (64, 64))),
        {**GEMM16, "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8},
    ],
}

OPTIONS = ("num_warps", "num_stages")  # of a launch, beside the arguments
NOTES = ("DTYPES", "NARROW", "ODD")
FLOATS = {"alpha", "gain", "inv_gain", "clamp", "eps", "filter_gain", "scale"}
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


def argument_type(name: str, dtype: str, size: str = "i32") -> str:
    if name.endswith("_ptr"):
        return "*fp32" if name in FLOAT32 else f"*{dtype}"
    return "fp32" if name in FLOATS else "i1" if name in BOOLS else size


def compile_kernel(
    kernel: Any, constants: dict[str, Any], dtype: str, capability: int, size: str = "i32"
) -> Any:
    """As Triton does at a launch with 16-byte aligned tensors whose sizes are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants[name] for name in OPTIONS if name in constants}
    odd = constants.get("ODD", [])
    constants = {k: v for k, v in constants.items() if k not in (*OPTIONS, *NOTES)}
    runtime = [name for name in kernel.arg_names if name not in constants]
    signature = {name: argument_type(name, dtype, size) for name in runtime}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    sizes = [name for name in runtime if signature[name] == size and name not in odd]
    aligned = [*(name for name in runtime if name.endswith("_ptr")), *sizes]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_all(capability: int, dtype: str = "") -> Iterator[dict[str, Any]]:
    """The rows of one architecture, in the types of CAPABILITIES or all of them in one."""
    for name, kernel in kernels().items():
        if name not in KERNELS:
            yield {"kernel": name}
        for i, constants in enumerate(KERNELS.get(name, [])):
            kind = dtype or CAPABILITIES[capability][i % 2]
            kinds = constants.get("DTYPES", [kind])
            kind = kind if kind in kinds else kinds[0]
            compiled = compile_kernel(kernel, constants, kind, capability)
            yield {"kernel": name, "constants": constants, "dtype": kind} | figures(compiled)
        if name in KERNELS and capability == min(CAPABILITIES):
            compile_types(kernel, KERNELS[name][0], capability)


def compile_types(kernel: Any, constants: dict[str, Any], capability: int) -> None:
    """What differs in types alone: sizes that are 1, which are constants to Triton and have no
    methods, sizes over 2**31, and indices over it."""
    dtype = constants.get("DTYPES", ["fp16"])[0]
    sizes = [n for n in kernel.arg_names if argument_type(n, dtype) == "i32" and n not in constants]
    wide = {"WIDE": True} if "WIDE" in constants else {}
    compile_kernel(kernel, dict.fromkeys(sizes, 1) | constants, dtype, capability)
    compile_kernel(kernel, constants | wide, dtype, capability)
    compile_kernel(kernel, constants | wide, dtype, capability, size="i64")


def figures(compiled: Any) -> dict[str, Any]:
    """Registers and stack of the machine's code, and a block's bytes of shared memory; of the PTX,
    which is read in a hundredth of the time, global accesses by their bytes and divisions of
    integers by what is not constant."""
    import sass

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = sass.run(sass.tool("cuobjdump"), "--dump-resource-usage", file.name)
    (used,) = sass.resources(text).values()
    ptx = compiled.asm["ptx"]
    found: dict[str, Any] = {"registers": used["REG"], "stack": used["STACK"]}
    found["shared"] = compiled.metadata.shared
    for name, opcode in (("loads", "ld"), ("stores", "st")):
        access = rf"\b{opcode}\.global(?:\.[a-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.b(\d+)"
        found[name] = Counter(int(n or 1) * int(bits) // 8 for n, bits in re.findall(access, ptx))
    return found | {"divisions": len(re.findall(r"\b(?:div|rem)\.[su](?:32|64)", ptx))}


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
    spilling = [row for row in rows if row["stack"]]
    assert not spilling, f"local memory: {spilling}"
    large = [row for row in rows if row["shared"] > SHARED[capability]]
    assert not large, f"more shared memory than a block may have: {large}"
    narrow = [row for row in rows if "16" not in row["stores"]]
    narrow = [row for row in narrow if not row["constants"].get("NARROW")]
    assert not narrow, f"no 16-byte store: {narrow}"
    # Of the program's number, by images, channels and tiles; modulated_gemm's pixels, once for all
    # of its terms, are divided too.
    dividing = [row for row in rows if row["divisions"] > 4]
    dividing = [row for row in dividing if row["kernel"] != "modulated_gemm_kernel"]
    assert not dividing, f"integers divided for each element: {dividing}"


def test_operators_are_traced_with_symbolic_sizes() -> None:
    """As torch.compile traces them on a GPU, in a process whose GPU is imagined."""
    from gankern.ops import _impl

    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(Path(__file__).parent / "triton_traced.py")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [line.split() for line in run.stdout.splitlines() if line.startswith("gankern_triton::")]
    names = {op.split("::")[1] for op, *_ in rows}
    assert names == {name for impl, name in _impl._overloads if impl == "triton"}
    for op, traced, launches in rows:
        # With a filter the gradient is also upfirdn2d's kernel.
        filtered = "epilogue_bwd" in op
        assert int(launches) == int(traced) * (1.5 if filtered else 1), op


if __name__ == "__main__":
    for line in compile_all(int(sys.argv[1]), *sys.argv[2:]):
        print(json.dumps(line), flush=True)
