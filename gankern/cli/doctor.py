"""`gankern doctor`: versions, libraries, the implementation each op would use, and cures."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import gankern
from gankern import _toolchain

PACKAGE = Path(gankern.__file__).parent
DEVICES = ("cpu", "cuda")
# Ops without kernels of their own, and the one whose kernels they run around PyTorch's convolution.
COMPOSED = {
    "conv2d_resample": "upfirdn2d",
    "modulated_conv2d": "upfirdn2d",
    "synthesis_layer": "synthesis_epilogue",
}
CPU_ONLY = {"convolution"}  # on a GPU, the reference: cuDNN has algorithms of its own
# Ops with a Triton kernel alone, which runs where impl names it, and what they are without.
OPT_IN = {"modulated_gemm": "synthesis_layer"}
NOT_BUILT = "reinstall gankern, or in a clone: python setup.py build_ext --inplace"


def compilers() -> list[tuple[str, str]]:
    """The C++ compiler and the nvcc that a build would use."""
    cxx = _toolchain.find_cxx()
    nvcc = _toolchain.find_nvcc(_toolchain.find_torch(), os.environ, sys.path)
    if not isinstance(nvcc, str):
        nvcc = f"{nvcc.version} from {nvcc.origin}, {nvcc.home}"
    told = f"{_toolchain.compiler_version(cxx)}, {cxx}" if cxx else "none; install g++"
    return [("C++", told), ("nvcc", nvcc)]


def versions() -> list[tuple[str, str]]:
    """Name and version of everything that decides what can be built and run."""
    import torch

    from gankern.ops import _impl

    triton = _impl.triton.__version__ if _impl.triton else "not installed; pip install triton"
    return [
        ("gankern", f"{gankern.__version__}, {PACKAGE}"),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("PyTorch", torch.__version__),
        ("CUDA", cuda_state()),
        ("Triton", triton),
        *compilers(),
    ]


def cuda_state() -> str:
    import torch

    if torch.version.cuda is None:
        return "this PyTorch is a CPU build"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no device on this machine"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    named = ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in devices)
    return f"{torch.version.cuda}, {named}"


def read_build() -> dict[str, Any]:
    """What setup.py wrote down about the build, empty if nothing was built."""
    path = PACKAGE / "_build.json"
    build: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return build


def library_state(name: str, build: dict[str, Any]) -> str:
    """One line on _cpu.so or _cuda.so: what is in it, or why it is not there and the cure."""
    from gankern.ops import _impl

    about = build.get(name, {})
    if not (PACKAGE / f"_{name}.so").exists():
        return f"not built: {about.get('reason', NOT_BUILT)}"
    if _impl.LIBRARIES[name]:
        return f"not loaded: {_impl.LIBRARIES[name]}"
    if name == "cuda":
        ptx = " ".join(about.get("ptx", []))
        return f"sm {' '.join(about.get('sm', []))}, PTX {ptx or 'none'}, nvcc {about.get('nvcc')}"
    used = ("base", "avx2", "avx512")[_impl.set_cpu_isa(-1)]
    return f"{' '.join(about.get('isa', []))}, this machine uses {used}"


def op_names() -> list[str]:
    return sorted(path.stem for path in (PACKAGE / "ops").glob("[a-z]*.py"))


def cures(build: dict[str, Any]) -> list[str]:
    """One line for each implementation that cannot run, with the ops that it concerns."""
    from gankern.ops import _impl

    lacking = {"cpu": OPT_IN.keys(), "cuda": CPU_ONLY | OPT_IN.keys(), "triton": CPU_ONLY}
    kernels = [name for name in op_names() if name not in COMPOSED]
    ops_by_reason: dict[tuple[str, str], list[str]] = {}
    count = {}
    for impl, device in (("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda")):
        names = [name for name in kernels if name not in lacking[impl]]
        count[impl] = len(names)
        for name in names:
            if reason := _impl.why_not(impl, device, name):
                if _impl.LIBRARIES.get(impl):
                    reason = library_state(impl, build)
                reason = reason.replace(f"{name} has no", "no")
                ops_by_reason.setdefault((impl, reason), []).append(name)
    return [
        f"{impl} ({'all' if len(names) == count[impl] else ', '.join(names)}): {reason}"
        for (impl, reason), names in ops_by_reason.items()
    ]


def table(rows: Sequence[tuple[str, ...]], indent: str = "  ") -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(indent + line for line in lines)


@click.command()
def command() -> None:
    """Show what is built, what each operation would use, and what is missing."""
    from gankern.ops import _impl, _remember

    build = read_build()
    click.echo("Versions\n" + table(versions()))
    libraries = [(f"_{name}.so", library_state(name, build)) for name in DEVICES]
    libraries.append(("_eager", _remember.why_not() or "in use: calls are remembered"))
    click.echo("\nLibraries\n" + table(libraries))
    chosen = [
        (name, *(_impl.default_impl(COMPOSED.get(name, name), d) for d in DEVICES))
        for name in op_names()
        if name not in OPT_IN
    ]
    chosen += [(name, f"as {other}", f"as {other}") for name, other in OPT_IN.items()]
    click.echo("\nImplementation that impl=None takes\n" + table([("", *DEVICES), *chosen]))
    if lines := cures(build):
        click.echo("\nWhat cannot run, and what to do\n" + "\n".join(f"  {line}" for line in lines))
