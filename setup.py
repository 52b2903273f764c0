"""Builds gankern/_cpu.so and gankern/_cuda.so, the libraries behind gankern.ops.

Both are plain shared objects that use PyTorch's stable ABI and no Python.h, so one wheel serves
every Python and every torch from 2.11. A third, gankern/_eager, shortens calls from Python: it is
of this Python and this torch, and left out where it cannot be built. Each source of csrc/torch is
compiled once per library, each of csrc/cpu once per instruction set, each of csrc/kernels by nvcc
for all architectures; ninja runs it. Objects lie under build/, one folder per torch version, and
are reused.

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
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not

from gankern import _toolchain  # noqa: E402
from gankern._toolchain import Nvcc, Torch  # noqa: E402

ISA_FLAGS = {
    "base": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512cd "
    "-mprefer-vector-width=512",
}

# The convolutions of a GPU are cuDNN's, and so is batch normalisation.
CPU_ALONE = {
    *("convolution", "convolution_last", "convolution_few", "convolution_image"),
    "batch_norm_act",
}

COMMON_FLAGS = f"-std=c++17 -O3 -DGANKERN_NS=gankern -I{ROOT / 'csrc'}"
# gcc 12 takes the payload of an empty std::optional<Tensor> for one that is used.
CXX_FLAGS = (
    f"{COMMON_FLAGS} -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno "
    "-fno-trapping-math -Wall -Wextra -Wno-maybe-uninitialized"
)
NVCC_FLAGS = (
    f"{COMMON_FLAGS} -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -DGANKERN_BACKEND=cuda "
    "-Werror=all-warnings -Xptxas=-v --threads=2"
)


EAGER = "remember"  # the source in csrc/eager
EAGER_LIBRARY = "_eager" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")

# The compiler whose warnings are errors: those of others are not known.
CI_CXX = "g++ 12."


class BuildError(SystemExit):
    """A build that cannot go on, told in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(f"gankern: {message}")


def find_ninja() -> str:
    spec = importlib.util.find_spec("ninja")
    bundled = Path(spec.origin).parent / "data" / "bin" / "ninja" if spec and spec.origin else None
    beside = Path(sys.executable).parent / "ninja"
    for path in (bundled, beside, shutil.which("ninja")):
        if path and Path(path).is_file():
            return str(path)
    raise BuildError("ninja is needed to build: pip install ninja")


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
    return found, sorted(lacking | without - {EAGER})


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
        failed = set(re.findall(r"(?:cxx|nvcc) \w+/(\w+)\.", left))
        return failed | ({EAGER} if EAGER_LIBRARY in left else set())


@dataclass
class Library:
    """One of the shared objects: what went in, and for `gankern doctor` what came of it."""

    name: str
    objects: list[str]
    report: dict[str, Any]
    link: str = ""


def torch_flags(torch: Torch) -> str:
    api = torch.home / "include" / "torch" / "csrc" / "api" / "include"
    includes = f"-isystem {torch.home / 'include'} -isystem {api}"
    return f"-O2 {includes} -DTORCH_TARGET_VERSION=0x020b000000000000ull"


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
        if isa == "base" and len(isas) > 1:  # float64's, and old processors': compiled quickly
            isa_flags += " -O1"
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


def plan_cuda(ninja: Ninja, torch: Torch, nvcc: Nvcc, cxx: str, warnings: str) -> Library:
    sm, ptx, gencode = _toolchain.choose_archs(nvcc)
    torch_side, left_out = torch_sources("kernels", "cpu", ninja.without)
    left_out = [op for op in left_out if op not in CPU_ALONE]
    kernels = sources("kernels", ninja.without)
    # What takes longest is started first, so that no processor waits for it at the end.
    kernels.sort(key=lambda path: -sum(f.stat().st_size for f in path.parent.glob(f"{path.stem}*")))
    flags = f"{NVCC_FLAGS} -ccbin={cxx} {gencode}"
    objects = [ninja.build(f"cuda/{path.stem}.o", "nvcc", [str(path)], flags) for path in kernels]
    flags = f"{CXX_FLAGS} {warnings} -DGANKERN_BACKEND=cuda -DUSE_CUDA {torch_flags(torch)}"
    flags += f" -isystem {nvcc.home / 'include'}"
    for path in torch_side if kernels else []:
        objects.append(ninja.build(f"cuda/{path.stem}.torch.o", "cxx", [str(path)], flags))
    report = {"built": bool(objects), "sm": sm, "ptx": ptx, "left_out": left_out}
    report |= {"nvcc": nvcc.version, "origin": nvcc.origin, "cuda": torch.cuda}
    link = link_flags(torch, f"-ltorch_cuda {cudart(torch, nvcc)}")
    return Library("_cuda.so", objects, report, link)


def plan_eager(ninja: Ninja, torch: Torch, warnings: str) -> Library:
    """An extension of Python by PyTorch's own C++ interface: of these very versions."""
    include = Path(sysconfig.get_paths()["include"])
    header = torch.home / "include" / "torch" / "csrc" / "autograd" / "python_variable.h"
    reason = ""
    if not (include / "Python.h").is_file():
        reason = f"{include} lacks Python.h; install python3-dev and reinstall gankern"
    elif not header.is_file():
        reason = f"torch {torch.version} comes without {header.name}"
    elif sysconfig.get_config_var("Py_GIL_DISABLED"):
        reason = "this Python has no GIL"
    elif EAGER in ninja.without:
        reason = f"csrc/eager does not compile with torch {torch.version}"
    if reason:
        return Library(EAGER_LIBRARY, [], {"built": False, "reason": reason})
    api = torch.home / "include" / "torch" / "csrc" / "api" / "include"
    includes = " ".join(f"-isystem {path}" for path in (torch.home / "include", api, include))
    flags = f"{CXX_FLAGS} {warnings} -std=c++20 -O2 {includes}"
    source = str(ROOT / "csrc" / "eager" / f"{EAGER}.cpp")
    made = ninja.build(f"eager/{EAGER}.o", "cxx", [source], flags)
    link = link_flags(torch, "-ltorch_python").replace("-Wl,--no-undefined ", "")
    return Library(EAGER_LIBRARY, [made], {"built": True}, link)


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
        torch, cxx = _toolchain.find_torch(), _toolchain.find_cxx()
        out = ROOT / "gankern" if self.inplace else Path(self.build_lib) / "gankern"
        out.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"torch": torch.version, "python": platform.python_version()}
        if cxx is None:
            reason = "no C++ compiler found; install g++ (or set CXX) and reinstall gankern"
            about |= {name: {"built": False, "reason": reason} for name in ("cpu", "cuda", "eager")}
        else:
            folder = ROOT / "build" / f"torch-{torch.version}"
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / ".lock", "w") as lock:  # one build at a time in a folder
                fcntl.flock(lock, fcntl.LOCK_EX)
                about |= {"cxx": _toolchain.compiler_version(cxx)} | self.compile(
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
        warnings = "-Werror" if _toolchain.compiler_version(cxx).startswith(CI_CXX) else ""
        libraries = {}
        nvcc = _toolchain.find_nvcc(torch, os.environ, sys.path)
        if self.cpu_only:
            nvcc = "built with --cpu-only; build again without it"
        if isinstance(nvcc, Nvcc):
            compile_cu = f"{nvcc.path} -MD -MF $out.d $flags -c $in -o $out"
            logged = "> $out.log 2>&1 || (cat $out.log; false)"
            ninja.rule("nvcc", f"{compile_cu} {logged}", depfile=True)
            libraries["cuda"] = plan_cuda(ninja, torch, nvcc, cxx, warnings)
        libraries["cpu"] = plan_cpu(ninja, torch, warnings)
        libraries["eager"] = plan_eager(ninja, torch, warnings)
        for library in libraries.values():
            if library.objects:
                ninja.build(library.name, "link", library.objects, library.link)
        if not ninja.run(self.parallel or cores()):
            failed = ninja.failed_ops() - without
            if not failed or not (self.keep_going or failed == {EAGER}):
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
    eager = about["eager"]
    eager_line = "" if eager["built"] else f"not built: {eager['reason']}"
    eager_line = eager_line or f"Python {about['python']} with torch {about['torch']}"
    print(f"  _cpu.so   {cpu_line}\n  _cuda.so  {cuda_line}\n  _eager    {eager_line}")
    for name in ("cpu", "cuda"):
        for stem in about[name].get("left_out", []):
            print(f"  _{name}.so is without {stem}: no kernel, or one that does not compile")
    sys.stdout.flush()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("gankern._cpu", sources=[])],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    )
