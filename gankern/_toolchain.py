"""What gankern is built with: the installed PyTorch, the C++ compiler, nvcc, the architectures.

Used by setup.py and by `gankern doctor`; imports no torch.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Every GPU since Turing, and PTX for 110 and for all that will follow.
CUDA_ARCHS = "7.5;8.0+PTX;8.6;8.9;9.0;10.0;12.0"
# Chips whose code is made from an older one's PTX, which no kernel here gains from leaving: nvcc's
# front end runs twice, not seven times.
SAME_PTX = dict.fromkeys(("86", "89", "90", "100", "120"), "80")

# The names that torch.utils.cpp_extension accepts in TORCH_CUDA_ARCH_LIST.
NAMED_ARCHS = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Orin": "8.7+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


@dataclass
class Torch:
    """The installed PyTorch, read without importing it."""

    home: Path
    version: str
    cuda: str | None  # the CUDA version it is built for, None for a CPU build


@dataclass
class Nvcc:
    """A usable CUDA compiler."""

    path: Path
    home: Path  # the toolkit's own folder, found behind wrappers
    version: str
    origin: str  # where it was found: CUDA_HOME, PATH or PyPI


def find_torch() -> Torch:
    """The PyTorch to build for. Raises ModuleNotFoundError."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("PyTorch is needed to build: pip install torch")
    home = Path(spec.origin).parent
    version = runpy.run_path(str(home / "version.py"))
    return Torch(home, version["__version__"], version["cuda"])


def find_cxx() -> str | None:
    """The C++ compiler: CXX, else g++."""
    return shutil.which(os.environ.get("CXX") or "g++")


def compiler_version(cxx: str) -> str:
    """The compiler's name and version, as in "g++ 12.2.0"."""
    told = subprocess.run([cxx, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True)
    return f"{Path(cxx).name} {told.stdout.strip()}"


def nvcc_candidates(environ: Mapping[str, str], site_dirs: list[str]) -> list[tuple[str, Path]]:
    """Places of an nvcc, in the order of preference: (origin, path)."""
    found = []
    if cuda_home := environ.get("CUDA_HOME"):
        found.append(("CUDA_HOME", Path(cuda_home) / "bin" / "nvcc"))
    if on_path := shutil.which("nvcc", path=environ.get("PATH", "")):
        found.append(("PATH", Path(on_path)))
    for site in site_dirs:
        found += [("PyPI", path) for path in sorted(Path(site).glob("nvidia/cu*/bin/nvcc"))]
    return found


def inspect_nvcc(origin: str, path: Path, cuda: str) -> Nvcc | str:
    """The compiler at `path`, or the reason why it cannot build for torch's `cuda` and the cure."""
    cure = f"pip install 'cuda-toolkit[nvcc,cccl]=={cuda}.*'"
    if not path.is_file():
        return f"{path} ({origin}) does not exist; {cure}, or point CUDA_HOME at a toolkit"
    try:
        # A wrapper script knows better than its own place where the toolkit lies.
        command = [str(path), "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
        dryrun = subprocess.run(command, capture_output=True, text=True, timeout=60)
        told = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} ({origin}) does not run: {error}; {cure}"
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr + dryrun.stdout, re.MULTILINE)
    version = re.search(r"release [\d.]+, V([\d.]+)", told.stdout)
    if not top or not version:
        return f"{path} ({origin}) is no working nvcc; {cure}"
    home = Path(top[1].strip()).resolve()
    if version[1].split(".")[0] != cuda.split(".")[0]:
        return f"nvcc {version[1]} ({origin}) does not match torch's CUDA {cuda}; {cure}"
    for header in ("cuda_runtime.h", "crt/host_config.h", "nv/target"):
        folders = (home / "include", home / "include" / "cccl", *home.glob("targets/*/include"))
        more = tuple(folder / "cccl" for folder in folders)
        if not any((folder / header).is_file() for folder in (*folders, *more)):
            return f"nvcc {version[1]} ({origin}) lacks the header {header}; {cure}"
    return Nvcc(path, home, version[1], origin)


def find_nvcc(torch: Torch, environ: Mapping[str, str], site_dirs: list[str]) -> Nvcc | str:
    """The first usable nvcc, or one line: what is missing and its cure."""
    if torch.cuda is None:
        return f"torch {torch.version} is a CPU build; install a CUDA build of torch"
    reasons = []
    for origin, path in nvcc_candidates(environ, site_dirs):
        nvcc = inspect_nvcc(origin, path, torch.cuda)
        if isinstance(nvcc, Nvcc):
            return nvcc
        reasons.append(nvcc)
    missing = f"no nvcc found; pip install 'cuda-toolkit[nvcc,cccl]=={torch.cuda}.*'"
    return reasons[0] if reasons else missing


def parse_archs(text: str) -> tuple[list[str], list[str]]:
    """("8.0;9.0a+PTX", "8.6 8.9" or "Hopper", as TORCH_CUDA_ARCH_LIST) -> (sm, PTX) numbers.

    Raises ValueError for a name that is none.
    """
    sm: list[str] = []
    ptx: list[str] = []
    for name in re.split(r"[;,\s]+", text.strip()):
        for arch in NAMED_ARCHS.get(name.removesuffix("+PTX"), name).split(";"):
            match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
            if not match:
                raise ValueError(f"TORCH_CUDA_ARCH_LIST: no architecture {name!r} in {text!r}")
            number = match[1] + match[2]
            sm += [number] if number not in sm else []
            ptx += [number] if match[3] and number not in ptx else []
        if name.endswith("+PTX") and sm[-1] not in ptx:
            ptx.append(sm[-1])
    return sm, ptx


def gencode_flags(sm: list[str], ptx: list[str], same_ptx: Mapping[str, str]) -> str:
    """nvcc's -gencode flags, one for each PTX that is made."""
    codes: dict[str, list[str]] = {}
    for arch in sm:
        codes.setdefault(same_ptx.get(arch, arch), []).append(f"sm_{arch}")
    for arch in ptx:
        codes.setdefault(arch, []).append(f"compute_{arch}")
    return " ".join(
        f"'-gencode=arch=compute_{arch},code=[{','.join(made)}]'" for arch, made in codes.items()
    )


def choose_archs(nvcc: Nvcc) -> tuple[list[str], list[str], str]:
    """(sm, PTX, nvcc's flags): TORCH_CUDA_ARCH_LIST as it stands, else what nvcc knows of ours."""
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        sm, ptx = parse_archs(wanted)
        return sm, ptx, gencode_flags(sm, ptx, {})
    listed = subprocess.run([str(nvcc.path), "--list-gpu-code"], capture_output=True, text=True)
    sm, ptx = parse_archs(CUDA_ARCHS)
    sm = [arch for arch in sm if f"sm_{arch}" in listed.stdout.split()]
    return sm, ptx, gencode_flags(sm, ptx, SAME_PTX)
