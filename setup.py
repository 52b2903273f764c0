"""Builds gankern/_cpu.so and gankern/_cuda.so, the libraries behind gankern.ops.

Both are plain shared objects that use PyTorch's stable ABI and no Python.h, so one wheel serves
every Python and every torch from 2.11. Each source of csrc/torch is compiled once per library, each
of csrc/cpu once per instruction set, each of csrc/kernels by nvcc for all architectures; ninja runs
it. Objects lie under build/, one folder per torch version, and are reused.

    python setup.py build_ext --inplace [--cpu-only] [--keep-going] [-j N]
"""

from __future__ import annotations

import fcntl
import filecmp
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Every GPU since Turing. PTX of 100 serves 110, which no SASS here fits; that of 120 what follows.
CUDA_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0+PTX;12.0+PTX"

# The names that torch.utils.cpp_extension accepts in TORCH_CUDA_ARCH_LIST.
NAMED_ARCHS = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Orin": "8.7+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}

ISA_FLAGS = {
    "base": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512cd "
    "-mprefer-vector-width=512",
}

COMMON_FLAGS = f"-std=c++17 -O3 -DGANKERN_NS=gankern -I{ROOT / 'csrc'}"
CXX_FLAGS = (
    f"{COMMON_FLAGS} -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno "
    "-fno-trapping-math -Wall -Wextra -Wno-maybe-uninitialized"
)
NVCC_FLAGS = (
    f"{COMMON_FLAGS} -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -DGANKERN_BACKEND=cuda "
    "-Werror=all-warnings -Xptxas=-v --threads=2"
)


class BuildError(SystemExit):
    """A build that cannot go on, told in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(f"gankern: {message}")


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
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("PyTorch is needed to build: pip install torch")
    home = Path(spec.origin).parent
    version = runpy.run_path(str(home / "version.py"))
    return Torch(home, version["__version__"], version["cuda"])


def find_cxx() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++")


def find_ninja() -> str:
    spec = importlib.util.find_spec("ninja")
    bundled = Path(spec.origin).parent / "data" / "bin" / "ninja" if spec and spec.origin else None
    beside = Path(sys.executable).parent / "ninja"
    for path in (bundled, beside, shutil.which("ninja")):
        if path and Path(path).is_file():
            return str(path)
    raise BuildError("ninja is needed to build: pip install ninja")


def nvcc_candidates(environ: dict[str, str], site_dirs: list[str]) -> list[tuple[str, Path]]:
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


def find_nvcc(torch: Torch, environ: dict[str, str], site_dirs: list[str]) -> Nvcc | str:
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
    """("8.0;9.0a+PTX", "8.6 8.9" or "Hopper", as TORCH_CUDA_ARCH_LIST) -> (sm, PTX) numbers."""
    sm: list[str] = []
    ptx: list[str] = []
    for name in re.split(r"[;,\s]+", text.strip()):
        for arch in NAMED_ARCHS.get(name.removesuffix("+PTX"), name).split(";"):
            match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
            if not match:
                raise BuildError(f"TORCH_CUDA_ARCH_LIST: no architecture {name!r} in {text!r}")
            number = match[1] + match[2]
            sm += [number] if number not in sm else []
            ptx += [number] if match[3] and number not in ptx else []
        if name.endswith("+PTX") and sm[-1] not in ptx:
            ptx.append(sm[-1])
    return sm, ptx


def gencode_flags(sm: list[str], ptx: list[str]) -> str:
    codes = [(arch, f"sm_{arch}") for arch in sm] + [(arch, f"compute_{arch}") for arch in ptx]
    return " ".join(f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes)


def sources(folder: str, without: set[str]) -> list[Path]:
    """The files to compile of a folder of csrc, one an op, less the ops to leave out."""
    found = [*(ROOT / "csrc" / folder).glob("*.cpp"), *(ROOT / "csrc" / folder).glob("*.cu")]
    return sorted(path for path in found if path.stem not in without)


def torch_sources(folder: str, other: str, without: set[str]) -> tuple[list[Path], list[str]]:
    """csrc/torch's files for the library whose kernels lie in `folder`, and the ops left out of it.

    A file with no kernel of its name anywhere is shared; one with a kernel only for the other
    library is left out.
    """
    stems = {path.stem for path in sources(folder, without)}
    lacking = {path.stem for path in sources(other, without)} - stems
    found = sources("torch", without | lacking)
    return found, sorted(lacking | without)


class Ninja:
    """A build.ninja in the making, and its run."""

    def __init__(self, folder: Path, without: set[str]) -> None:
        self.folder = folder
        self.without = without  # the ops that are left out
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, *, depfile: bool) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if depfile else []

    def build(self, out: str, rule: str, sources: list[str], flags: str) -> str:
        escaped = " ".join(source.replace(" ", "$ ").replace(":", "$:") for source in sources)
        self.lines += [f"build {out}: {rule} {escaped}", f"  flags = {flags}"]
        return out

    def run(self, jobs: int) -> bool:
        text = "\n".join(self.lines) + "\n"
        script = self.folder / "build.ninja"
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        command = [find_ninja(), "-C", str(self.folder), "-j", str(jobs), "-k", "0"]
        return subprocess.run(command).returncode == 0

    def failed_ops(self) -> set[str]:
        """After a run that failed: the ops with a file that does not compile."""
        command = [find_ninja(), "-C", str(self.folder), "-n"]
        left = subprocess.run(command, capture_output=True, text=True).stdout
        return set(re.findall(r"(?:cxx|nvcc) \w+/(\w+)\.", left))


@dataclass
class Library:
    """One of the two shared objects: what went in, and for `gankern doctor` what came of it."""

    name: str
    objects: list[str]
    report: dict[str, Any]
    link: str = ""


def torch_flags(torch: Torch) -> str:
    api = torch.home / "include" / "torch" / "csrc" / "api" / "include"
    includes = f"-isystem {torch.home / 'include'} -isystem {api}"
    # gcc 12 takes the payload of an empty std::optional<Tensor> for one that is used.
    return f"-O2 -Wno-maybe-uninitialized {includes} -DTORCH_TARGET_VERSION=0x020b000000000000ull"


def link_flags(torch: Torch, libraries: str) -> str:
    rpath = "-Wl,-rpath,'$$ORIGIN/../torch/lib'"
    strict = "-shared -s -Wl,--no-undefined -Wl,--as-needed"
    return f"{strict} -L{torch.home / 'lib'} -ltorch_cpu -lc10 {libraries} {rpath}"


def plan_cpu(ninja: Ninja, torch: Torch, warnings: str) -> Library:
    isas = list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["base"]
    torch_side, left_out = torch_sources("cpu", "kernels", ninja.without)
    # Vectors wider than the instruction set's are passed between inlined functions only.
    flags = f"{CXX_FLAGS} {warnings} -Wno-psabi -DGANKERN_BACKEND=cpu"
    objects = []
    for isa in isas:
        isa_flags = f"{flags} -DGANKERN_ISA={isa} {ISA_FLAGS[isa]}"
        for path in sources("cpu", ninja.without):
            objects.append(ninja.build(f"cpu/{path.stem}.{isa}.o", "cxx", [str(path)], isa_flags))
    flags += " " + torch_flags(torch)
    for path in torch_side:
        objects.append(ninja.build(f"cpu/{path.stem}.torch.o", "cxx", [str(path)], flags))
    report = {"built": bool(objects), "isa": isas, "left_out": left_out}
    return Library("_cpu.so", objects, report, link_flags(torch, ""))


def cudart(torch: Torch, nvcc: Nvcc) -> str:
    """The CUDA runtime to link: the one that torch loads, so that a process holds only one."""
    folders = [*torch.home.parent.glob("nvidia/cu*/lib"), nvcc.home / "lib64", nvcc.home / "lib"]
    for folder in [*folders, *nvcc.home.glob("targets/*/lib")]:
        for path in sorted(folder.glob("libcudart.so*")):
            return str(path)
    raise BuildError(f"no libcudart.so near {nvcc.home}; pip install nvidia-cuda-runtime")


def choose_archs(nvcc: Nvcc) -> tuple[list[str], list[str]]:
    """TORCH_CUDA_ARCH_LIST as it stands, else CUDA_ARCHS as far as this nvcc knows them."""
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return parse_archs(wanted)
    listed = subprocess.run([str(nvcc.path), "--list-gpu-code"], capture_output=True, text=True)
    sm, ptx = parse_archs(CUDA_ARCHS)
    sm = [arch for arch in sm if f"sm_{arch}" in listed.stdout.split()]
    return sm, [arch for arch in ptx if arch in sm] or sm[-1:]


def plan_cuda(ninja: Ninja, torch: Torch, nvcc: Nvcc, cxx: str, warnings: str) -> Library:
    sm, ptx = choose_archs(nvcc)
    torch_side, left_out = torch_sources("kernels", "cpu", ninja.without)
    kernels = sources("kernels", ninja.without)
    flags = f"{NVCC_FLAGS} -ccbin={cxx} {gencode_flags(sm, ptx)}"
    objects = [ninja.build(f"cuda/{path.stem}.o", "nvcc", [str(path)], flags) for path in kernels]
    flags = f"{CXX_FLAGS} {warnings} -DGANKERN_BACKEND=cuda -DUSE_CUDA {torch_flags(torch)}"
    flags += f" -isystem {nvcc.home / 'include'}"
    for path in torch_side if kernels else []:
        objects.append(ninja.build(f"cuda/{path.stem}.torch.o", "cxx", [str(path)], flags))
    report = {"built": bool(objects), "sm": sm, "ptx": ptx, "left_out": left_out}
    report |= {"nvcc": nvcc.version, "origin": nvcc.origin, "cuda": torch.cuda}
    link = link_flags(torch, f"-ltorch_cuda {cudart(torch, nvcc)}")
    return Library("_cuda.so", objects, report, link)


class BuildLibraries(build_ext):
    """build_ext, with ninja in place of setuptools' compiler."""

    user_options = [
        *build_ext.user_options,
        ("cpu-only", None, "leave the CUDA library as it is"),
        ("keep-going", None, "leave out the ops that do not compile"),
    ]
    boolean_options = [*build_ext.boolean_options, "cpu-only", "keep-going"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.cpu_only = False
        self.keep_going = False
        self.built: list[str] = []

    def run(self) -> None:
        torch, cxx = find_torch(), find_cxx()
        out = ROOT / "gankern" if self.inplace else Path(self.build_lib) / "gankern"
        out.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"torch": torch.version, "python": platform.python_version()}
        if cxx is None:
            reason = "no C++ compiler found; install g++ (or set CXX) and reinstall gankern"
            about |= {name: {"built": False, "reason": reason} for name in ("cpu", "cuda")}
        else:
            folder = ROOT / "build" / f"torch-{torch.version}{'-dev' if self.inplace else ''}"
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / ".lock", "w") as lock:  # one build at a time in a folder
                fcntl.flock(lock, fcntl.LOCK_EX)
                about |= {"cxx": compiler_version(cxx)} | self.compile(
                    folder, torch, cxx, out, set()
                )
        (out / "_build.json").write_text(json.dumps(about, indent=2) + "\n")
        self.built.append(str(out / "_build.json"))
        print_report(about)

    def compile(
        self, folder: Path, torch: Torch, cxx: str, out: Path, without: set[str]
    ) -> dict[str, Any]:
        """Compiles in `folder` and installs into `out`; returns each library's report."""
        ninja = Ninja(folder, without)
        ninja.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
        ninja.rule("link", f"{cxx} -o $out $in $flags", depfile=False)
        # A developer's build takes warnings for errors; a user's newer compiler may have new ones.
        warnings = "-Werror" if self.inplace else ""
        libraries = {"cpu": plan_cpu(ninja, torch, warnings)}
        nvcc = find_nvcc(torch, dict(os.environ), sys.path)
        if self.cpu_only:
            nvcc = "built with --cpu-only; build again without it"
        if isinstance(nvcc, Nvcc):
            compile_cu = f"{nvcc.path} -MD -MF $out.d $flags -c $in -o $out"
            logged = "> $out.log 2>&1 || (cat $out.log; false)"
            ninja.rule("nvcc", f"{compile_cu} {logged}", depfile=True)
            libraries["cuda"] = plan_cuda(ninja, torch, nvcc, cxx, warnings)
        for library in libraries.values():
            if library.objects:
                ninja.build(library.name, "link", library.objects, library.link)
        if not ninja.run(self.parallel or cores()):
            failed = ninja.failed_ops() - without
            if not self.keep_going or not failed:
                raise BuildError("the compiler failed; its messages are above")
            return self.compile(folder, torch, cxx, out, without | failed)
        for library in libraries.values():
            self.install(folder / library.name, out, wanted=bool(library.objects))
        reports = {name: library.report for name, library in libraries.items()}
        return reports if "cuda" in reports else reports | {"cuda": self.no_cuda(out, str(nvcc))}

    def install(self, built: Path, out: Path, *, wanted: bool) -> None:
        """Puts a library in place in one step: processes that use the old one go on undisturbed."""
        target = out / built.name
        if not wanted:
            target.unlink(missing_ok=True)
            return
        self.built.append(str(target))
        if not target.exists() or not filecmp.cmp(built, target, shallow=False):
            fresh = target.with_suffix(f".{os.getpid()}")
            shutil.copy2(built, fresh)
            os.replace(fresh, target)

    def no_cuda(self, out: Path, reason: str) -> dict[str, Any]:
        """A build without CUDA: in a clone an earlier _cuda.so stays, in a wheel none may."""
        target = out / "_cuda.so"
        if not self.inplace:
            target.unlink(missing_ok=True)
        elif target.exists() and (out / "_build.json").exists():
            return {**json.loads((out / "_build.json").read_text())["cuda"], "kept": reason}
        return {"built": False, "reason": reason}

    def get_source_files(self) -> list[str]:
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        return sorted(str(path.relative_to(ROOT)) for path in sources)

    def get_outputs(self) -> list[str]:
        return self.built

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """A wheel for any Python 3: the libraries need the platform, not the interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        libraries = list(Path(self.bdist_dir).glob("gankern/_*.so"))
        return "py3", "none", platform_tag if libraries else "any"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compiler_version(cxx: str) -> str:
    told = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    return told.splitlines()[0].strip() if told else cxx


def print_report(about: dict[str, Any]) -> None:
    cpu, cuda = about["cpu"], about["cuda"]
    cpu_line = f"not built: {cpu.get('reason', 'csrc has no sources for it')}"
    cuda_line = f"not built: {cuda.get('reason', 'csrc has no sources for it')}"
    if cpu["built"]:
        cpu_line = " ".join(cpu["isa"])
    if cuda["built"]:
        archs = f"sm {' '.join(cuda['sm'])}, PTX {' '.join(cuda['ptx']) or 'none'}"
        kept = f", kept from an earlier build: {cuda['kept']}" if "kept" in cuda else ""
        cuda_line = f"{archs} (nvcc {cuda['nvcc']} from {cuda['origin']}{kept})"
    print(f"gankern: built against torch {about['torch']}, {about.get('cxx', 'no compiler')}")
    print(f"  _cpu.so   {cpu_line}\n  _cuda.so  {cuda_line}")
    for name in ("cpu", "cuda"):
        for stem in about[name].get("left_out", []):
            print(f"  _{name}.so is without {stem}: no kernel, or one that does not compile")
    sys.stdout.flush()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("gankern._cpu", sources=[])],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    )
