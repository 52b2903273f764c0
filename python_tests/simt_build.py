"""Builds and loads csrc/simt, which runs the CUDA kernels' source on the CPU.

    from simt_build import kernels, load_ops, module
    module()    # the Python module `simt`: counters(), reset(), empty(), Error
    kernels()   # every launcher of csrc/kernels, over numpy arrays
    load_ops()  # torch.ops.gankern_simt.<op>, over CPU tensors

The variant is GANKERN_SIMT: plain (default), asan (bounds) or race (races, unwritten memory,
counters). One process has one variant. From a shell, `python python_tests/simt_build.py race
test_upfirdn2d.py -x` runs pytest under one; without further arguments it only builds.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("plain", "asan", "race")
MODULE = "csrc/simt/CMakeFiles/simt_module.dir/module.cpp.o"  # in build folder "module"


def variant() -> str:
    name = os.environ.get("GANKERN_SIMT", "plain")
    if name not in VARIANTS:
        raise ValueError(f"GANKERN_SIMT must be one of {', '.join(VARIANTS)}, got {name!r}")
    return name


def find_torch() -> tuple[Path, str] | None:
    """PyTorch's folder and version, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    home = Path(spec.origin).parent
    return home, runpy.run_path(str(home / "version.py"))["__version__"]


def folder(name: str) -> Path:
    torch = find_torch()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return ROOT / "build" / f"simt-{name}-{python}-torch{torch[1] if torch else ''}"


def tool(name: str) -> str:
    """cmake or ninja: from this environment's wheels, else from PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if not found:
        raise RuntimeError(f"simt: {name} is needed to build it: pip install {name}")
    return found


@functools.cache
def build(name: str, *, strict: bool = False) -> Path:
    """Builds a variant, or of all variants "torch": the ops, "module": what binds them to Python.

    Returns its folder. Kernels that fail to compile are left out, with a warning; with strict they
    are an error.
    """
    if name in VARIANTS:
        build("module", strict=True)
    out = folder(name)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:  # one build at a time in a folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "build.ninja").exists():
            torch = find_torch()
            command = [tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(out)]
            command += [
                f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}",
            ]
            if name == "torch":
                command += ["-DGANKERN_SIMT=OFF", f"-DGANKERN_TORCH={torch[0] if torch else ''}"]
            else:
                command += [f"-DGANKERN_SIMT={name}"]
                if name in VARIANTS:
                    command += [f"-DGANKERN_SIMT_MODULE={folder('module') / MODULE}"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"simt: cmake failed\n{run.stdout}{run.stderr}")
        command = [tool("ninja"), "-C", str(out), "-k", "0", "-j", str(min(2, os.cpu_count() or 1))]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            forget_stale(out, run.stdout)
            message = f"simt: not everything compiled\n{run.stdout[-6000:]}"
            if strict or not (name == "torch" or (out / "simt.so").exists()):
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=2)
    return out


def forget_stale(out: Path, log: str) -> None:
    """Deletes libraries whose source no longer compiles, so that nobody tests old code."""
    for kind, stem in re.findall(r"FAILED: .*?/(kernels|torch|toys)_(\w+)\.dir/", log):
        (out / kind / f"{stem}.so").unlink(missing_ok=True)
    if re.search(r"FAILED: .*?/simt\.dir/", log):
        (out / "simt.so").unlink(missing_ok=True)


@functools.cache
def module() -> ModuleType:
    """The module `simt` of this process's variant."""
    sys.path.insert(0, str(build(variant())))
    try:
        return importlib.import_module("simt")
    finally:
        sys.path.pop(0)


@functools.cache
def launchers(kind: str) -> SimpleNamespace:
    """The launchers of build folder `kind`: kernels or toys."""
    simt = module()
    found: dict[str, object] = {}
    for library in sorted((build(variant()) / kind).glob("*.so")):
        try:
            found |= vars(simt.load(str(library)))
        except simt.Error as error:
            warnings.warn(f"simt: {library.stem}: {error}", stacklevel=2)
    return SimpleNamespace(**found)


def kernels() -> SimpleNamespace:
    return launchers("kernels")


@functools.cache
def load_ops() -> list[str]:
    """Registers torch.ops.gankern_simt.<op>; returns the names of the files that made them."""
    import torch

    kernels()
    libraries = sorted((build("torch") / "torch").glob("*.so"))
    loaded = []
    for library in libraries:
        try:
            torch.ops.load_library(str(library))
            loaded.append(library.stem)
        except OSError as error:  # its kernels did not compile
            warnings.warn(f"simt: {library.stem}: {error.__cause__ or error}", stacklevel=2)
    return loaded


def environment(name: str) -> dict[str, str]:
    """The environment in which a new process uses a variant."""
    env = os.environ | {"GANKERN_SIMT": name}
    if name == "asan":
        # Python is not built with AddressSanitizer, so its library has to come first.
        asan = subprocess.run(
            ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True
        )
        stdcxx = subprocess.run(
            ["g++", "-print-file-name=libstdc++.so"], capture_output=True, text=True
        )
        env["LD_PRELOAD"] = f"{asan.stdout.strip()} {stdcxx.stdout.strip()}"
        env["ASAN_OPTIONS"] = "detect_leaks=0:halt_on_error=0:allocator_may_return_null=1"
    return env


def run_pytest(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest in a new process under a variant."""
    build(name)
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(
        command, cwd=ROOT / "python_tests", env=environment(name), capture_output=True, text=True
    )


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"usage: simt_build.py {'|'.join(VARIANTS)} [pytest arguments]")
    for name in (sys.argv[1], "torch"):
        build(name, strict=len(sys.argv) == 2)
    if len(sys.argv) > 2:
        os.chdir(ROOT / "python_tests")
        command = [sys.executable, "-m", "pytest", *sys.argv[2:]]
        os.execve(sys.executable, command, environment(sys.argv[1]))
