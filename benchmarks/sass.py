"""What nvcc made of the CUDA kernels: registers, spills, occupancy, width of loads, divisions.

    python benchmarks/sass.py                    the kernels of gankern/_cuda.so, on sm_80 and sm_90
    python benchmarks/sass.py --arch sm_120 build/torch-*/cuda/bias_act.o
    python benchmarks/sass.py --compile bias_act compile csrc/kernels/bias_act.cu here first
    python benchmarks/sass.py --check            exit 1 if a rule is broken or a figure got worse
    python benchmarks/sass.py --update           write benchmarks/sass_budget.json

Rules: no stack frame and no spill, on any architecture that was built, and no local memory in the
PTX, which GPUs of later architectures run; at least half occupancy by registers, static shared
memory and __launch_bounds__; a kernel instantiated with 16-byte packs has 128-bit global loads. The
budget adds: no more registers, no narrower access, no lower occupancy and no more integer divisions
in innermost loops than it holds. No GPU is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gankern import _toolchain  # noqa: E402

BUDGET = Path(__file__).with_name("sass_budget.json")
ARCHS = ("sm_80", "sm_90")  # whose instructions are read; resources are read of all

# Compute capability: threads, blocks, shared memory in KiB of a multiprocessor. CUDA programming
# guide, "Technical Specifications per Compute Capability"; all have 65,536 registers.
LIMITS = {
    "75": (1024, 16, 64),
    "80": (2048, 32, 164),
    "86": (1536, 16, 100),
    "89": (1536, 24, 100),
    "90": (2048, 32, 228),
    "100": (2048, 32, 228),
    "103": (2048, 32, 228),
    "120": (1536, 24, 100),
}
SIZES = {"float": 4, "double": 8, "Half16": 2}  # by name of the element type
RESERVED_SHARED = 1024  # that the system takes of each block, from Ampere on
DEFAULT_THREADS = 256  # of a kernel without launch bounds


@dataclass
class Code:
    """What the instructions of a kernel show."""

    instructions: int = 0
    spills: Counter = field(default_factory=Counter)  # STL, LDL
    loads: Counter = field(default_factory=Counter)  # bytes of a global access -> instructions
    stores: Counter = field(default_factory=Counter)
    divisions: int = 0  # of integers, anywhere
    loop_divisions: int = 0  # in innermost loops
    loop_density: float = math.inf  # instructions a byte, the least of loops that load and store

    @property
    def density(self) -> float:
        """Instructions for a byte of global memory, of the kernel or of a loop; 0 without any."""
        size = sum(width * n for width, n in (self.loads + self.stores).items())
        return min(self.instructions / size, self.loop_density) if size else 0.0


@dataclass
class Kernel:
    source: str  # the stem of its .cu
    name: str  # demangled, without namespaces and arguments
    arch: str  # "sm_90"
    registers: int
    stack: int
    shared: int  # static, in bytes
    threads: int  # of __launch_bounds__
    code: Code | None = None

    @property
    def occupancy(self) -> float:
        return occupancy(self.arch, self.registers, self.shared, self.threads)


def occupancy(arch: str, registers: int, shared: int, threads: int) -> float:
    """The share of a multiprocessor's warps that can be resident."""
    capability = re.sub(r"\D", "", arch)
    most_threads, blocks, kib = LIMITS[capability]
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-max(registers, 1) * 32 // 256) * 256) // 4 * 4 // warps
    reserved = 0 if capability == "75" else RESERVED_SHARED
    taken = -(-(shared + reserved) // 128) * 128
    by_shared = kib * 1024 // taken if taken else blocks
    resident = min(blocks, most_threads // (warps * 32), by_registers, by_shared)
    return resident * warps * 32 / most_threads


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: Triton's wheel has them, else the toolkit."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(spec.origin).parent / "backends/nvidia/bin"] if spec and spec.origin else []
    folders += [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"),) if home]
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    if found := shutil.which(name):
        return found
    raise SystemExit(f"sass: {name} is needed: pip install triton, or set CUDA_HOME")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise SystemExit(f"sass: {Path(command[0]).name} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


# --- Names.


def source_of(mangled: str) -> str:
    """_GLOBAL__N__601e13fc_11_bias_act_cu_33420bae -> bias_act."""
    match = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]{8}", mangled)
    return match[1] if match else ""


def short_name(demangled: str) -> str:
    """void a::(anonymous namespace)::kernel<T<float>, 4>(args) -> kernel<T<float>, 4>."""
    name = re.sub(r"^void ", "", demangled.replace("(anonymous namespace)::", ""))
    name = re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name)
    depth = 0
    for i, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\b\w+::", "", name)


def pack_bytes(name: str) -> int:
    """Bytes of a pack, for kernels named <..., element type, pack, ...>; 0 if it cannot be told."""
    match = re.search(rf"\b({'|'.join(SIZES)})\b>?, (\d+)", name)
    return SIZES[match[1]] * int(match[2]) if match else 0


# --- Reading a cubin.


def launch_bounds(cubin: bytes) -> dict[str, int]:
    """Threads of a block by mangled name, from the sections .nv.info.<kernel>."""
    offset = struct.unpack_from("<Q", cubin, 40)[0]
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + size * i) for i in range(count)]
    text = cubin[headers[names][4] : headers[names][4] + headers[names][5]]
    bounds = {}
    for header in headers:
        name = text[header[0] : text.index(b"\0", header[0])].decode()
        if name.startswith(".nv.info."):
            bounds[name[9:]] = max_threads(cubin[header[4] : header[4] + header[5]])
    return bounds


def max_threads(info: bytes) -> int:
    """The product in EIATTR_MAX_THREADS (5) or EIATTR_REQNTID (16); 0 without launch bounds."""
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != 4:  # the value is the 16 bits themselves
            continue
        if attribute in (5, 16):
            x, y, z = struct.unpack_from("<III", info, at)
            return x * y * z
        at += size
    return 0


def resources(text: str) -> dict[str, dict[str, int]]:
    """cuobjdump --dump-resource-usage: {mangled name: {"REG": 32, "STACK": 0, "SHARED": 0}}."""
    found = {}
    for name, line in re.findall(r"Function (\S+):\n\s*(REG:.*)", text):
        used = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
        found[name] = {what: int(value) for what, value in used}
    return found


def functions(disassembly: str) -> Iterator[tuple[str, list[str]]]:
    """nvdisasm -c: (mangled name, lines) of each kernel."""
    parts = re.split(r"^\.text\.(\S+):\n", disassembly, flags=re.MULTILINE)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        yield name, body.splitlines()


WIDE = (16, 8, 4, 2)
WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}


def width(opcode: str) -> int:
    return next((size for suffix, size in WIDTHS.items() if suffix in opcode), 4)


def read_code(lines: list[str]) -> Code:
    """Counts instructions, and finds loops as branches to an earlier label."""
    code, places, labels, branches = Code(), [], {}, []
    accesses: list[tuple[int, int, bool]] = []  # place, bytes, whether it is a store
    for line in lines:
        if line.endswith(":"):
            labels[line.strip()[:-1]] = code.instructions
            continue
        match = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line)
        if not match:
            continue
        opcode, operands = match.groups()
        root = opcode.split(".")[0]
        if root in ("STL", "LDL"):
            code.spills[root] += 1
        elif root in ("LDG", "LDGSTS", "STG"):
            (code.stores if root == "STG" else code.loads)[width(opcode)] += 1
            accesses.append((code.instructions, width(opcode), root == "STG"))
        elif divides(opcode, operands):
            places.append(code.instructions)
        elif root == "BRA" and (target := re.search(r"\((\.L\w+)\)", operands)):
            branches.append((code.instructions, target[1]))
        code.instructions += 1
    loops = [(labels[to], at) for at, to in branches if labels.get(to, at) < at]
    innermost = [
        a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)
    ]
    for begin, end in loops:
        within = [(size, store) for place, size, store in accesses if begin <= place <= end]
        if len({store for _, store in within}) == 2:
            density = (end - begin + 1) / sum(size for size, _ in within)
            code.loop_density = min(code.loop_density, density)
    code.divisions = len(places)
    code.loop_divisions = sum(any(a <= p <= b for a, b in innermost) for p in places)
    return code


def divides(opcode: str, operands: str) -> bool:
    """A call of the 64-bit division, or the reciprocal that a 32-bit division starts with."""
    if opcode.startswith("CALL"):
        return bool(re.search(r"__cuda_sm\d+_(div|rem)_[su]\d+", operands))
    return opcode.startswith("I2F") and ".RP" in opcode and "64" not in opcode


def read_cubin(path: Path, arch: str, *, code: bool, source: str = "") -> list[Kernel]:
    usage = resources(run(tool("cuobjdump"), "--dump-resource-usage", path))
    bounds = launch_bounds(path.read_bytes())
    bodies = dict(functions(run(tool("nvdisasm"), "-c", "-ndf", path))) if code else {}
    shown = run("c++filt", *usage).splitlines() if shutil.which("c++filt") else list(usage)
    kernels = []
    for (mangled, used), demangled in zip(usage.items(), shown, strict=True):
        threads = bounds.get(mangled, 0) or DEFAULT_THREADS
        read = read_code(bodies[mangled]) if mangled in bodies else None
        names = (source_of(mangled) or source, short_name(demangled), arch)
        shared = used["SHARED"]
        if int(re.sub(r"\D", "", arch)) >= 90 and shared:
            shared -= RESERVED_SHARED  # counted in from Hopper on
        kernels.append(Kernel(*names, used["REG"], used["STACK"], shared, threads, read))
    return kernels


def read(paths: list[Path], archs: tuple[str, ...]) -> list[Kernel]:
    """All kernels of libraries, objects and cubins; the code of those of `archs`."""
    kernels = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, path in enumerate(paths):
            if not path.is_file():
                raise SystemExit(f"sass: {path} does not exist")
            folder = Path(scratch) / str(i)
            folder.mkdir()
            run(tool("cuobjdump"), "-xelf", "all", path.resolve(), cwd=folder)
            for cubin in sorted(folder.glob("*.cubin")):
                arch = re.search(r"sm_\w+?(?=\.)", cubin.name)
                name = arch[0] if arch else "sm_90"
                kernels += read_cubin(cubin, name, code=name in archs, source=path.stem)
    return sorted(kernels, key=lambda k: (k.source, k.name, int(re.sub(r"\D", "", k.arch))))


def local_memory(ptx: str) -> list[str]:
    """The mangled names of the kernels that have local memory."""
    parts = re.split(r"\.entry (\w+)", ptx)
    return [name for name, body in zip(parts[1::2], parts[2::2], strict=True) if ".local" in body]


def check_ptx(paths: list[Path]) -> list[str]:
    """What the PTX of libraries and objects breaks of the rules."""
    found: list[str] = []
    for path in paths:
        with tempfile.TemporaryDirectory() as scratch:
            run(tool("cuobjdump"), "-xptx", "all", path.resolve(), cwd=Path(scratch))
            for ptx in sorted(Path(scratch).glob("*.ptx")):
                found += local_memory(ptx.read_text())
    return [f"{name}: local memory in the PTX" for name in found]


def compile_here(stems: list[str], archs: tuple[str, ...], folder: Path) -> list[Path]:
    """Compiles csrc/kernels/<stem>.cu for `archs` alone."""
    nvcc = _toolchain.find_nvcc(_toolchain.find_torch(), os.environ, sys.path)
    if isinstance(nvcc, str):
        raise SystemExit(f"sass: {nvcc}")
    objects = []
    for stem in stems:
        objects.append(folder / f"{stem}.o")
        flags = []
        for arch in archs:
            virtual = arch.replace("sm", "compute")
            codes = arch if arch != archs[-1] else f"[{arch},{virtual}]"
            flags.append(f"-gencode=arch={virtual},code={codes}")
        source = ROOT / "csrc/kernels" / f"{stem}.cu"
        flags += ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"]
        run(nvcc.path, *flags, "-c", source, "-o", objects[-1])
    return objects


# --- Judging.


# float64's kernels are for gradient checks; upfirdn2d_any divides where a block makes its tables,
# once for each row and each column of a tile.
DIVIDING = ("double", "upfirdn2d_any_kernel")


def broken_rules(kernel: Kernel) -> list[str]:
    found = []
    if kernel.stack:
        found.append(f"stack frame of {kernel.stack} bytes")
    # float64 is for gradient checks.
    fast = kernel.arch in ("sm_80", "sm_90") and "double" not in kernel.name
    if fast and kernel.occupancy < 0.5:
        found.append(f"occupancy {kernel.occupancy:.0%}, wanted at least 50%")
    if code := kernel.code:
        if code.spills:
            found.append(f"spills: {code.spills['STL']} stores, {code.spills['LDL']} loads")
        if pack_bytes(kernel.name) == 16 and not code.loads[16]:
            found.append("no 128-bit global loads")
        if code.loop_divisions and not any(name in kernel.name for name in DIVIDING):
            found.append(f"{code.loop_divisions} integer divisions in innermost loops, wanted none")
    return found


# Name, 1 where less is better and -1 where more is, and what is tolerated: 8 registers are the
# hardware's step, and a new ptxas may take as much.
FIGURES = (
    ("registers", 1, 8),
    ("occupancy %", -1, 0),
    ("bytes of the widest load", -1, 0),
    ("bytes of the widest store", -1, 0),
    ("integer divisions in innermost loops", 1, 0),
)


def figures(kernel: Kernel) -> list[int]:
    """FIGURES, as kept in the budget."""
    code = kernel.code or Code()
    widest = [max(counts, default=0) for counts in (code.loads, code.stores)]
    return [kernel.registers, round(100 * kernel.occupancy), *widest, code.loop_divisions]


def worse(now: list[int], budget: list[int]) -> list[str]:
    found = []
    for (name, sign, slack), new, old in zip(FIGURES, now, budget, strict=True):
        if sign * (new - old) > slack:
            found.append(f"{name}: {new}, the budget has {old}")
    return found


def key(kernel: Kernel) -> str:
    return f"{kernel.source}: {kernel.name}"


def check(kernels: list[Kernel], budget: dict[str, dict[str, list[int]]]) -> list[str]:
    problems = []
    for kernel in kernels:
        found = broken_rules(kernel)
        kept = budget.get(key(kernel), {}).get(kernel.arch)
        if kernel.code and kept:
            found += worse(figures(kernel), kept)
        elif kernel.code and budget:
            found.append("not in the budget; --update adds it")
        problems += [f"{key(kernel)} {kernel.arch}: {what}" for what in found]
    return problems


def write_budget(kernels: list[Kernel]) -> None:
    budget: dict[str, dict[str, list[int]]] = {}
    for kernel in kernels:
        if kernel.code:
            budget.setdefault(key(kernel), {})[kernel.arch] = figures(kernel)
    lines = [f"{json.dumps(name)}: {json.dumps(kept)}" for name, kept in sorted(budget.items())]
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def show(kernels: list[Kernel]) -> None:
    wide = max((len(key(k)) for k in kernels), default=0)
    print(
        f"{'kernel':{wide}}  arch    regs stack spill  smem threads  occ.  "
        f"{'loads 16/8/4/2':15} {'stores 16/8/4/2':15} div  in loops"
    )
    for k in kernels:
        code = k.code or Code()
        spills = sum(code.spills.values())
        loads, stores = ("/".join(str(n[w]) for w in WIDE) for n in (code.loads, code.stores))
        row = f"{key(k):{wide}}  {k.arch:7} {k.registers:4} {k.stack:5} {spills:5} {k.shared:5} "
        row += f"{k.threads:7} {k.occupancy:5.0%}  {loads:15} {stores:15}"
        print(f"{row} {code.divisions:3}  {code.loop_divisions:8}")


def summary(kernels: list[Kernel]) -> None:
    """One line for each source and architecture."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.source, kernel.arch), []).append(kernel)
    print(f"{'source':20} arch    kernels  most regs  stack  least occ.  with 16-byte loads")
    for (source, arch), group in groups.items():
        wide = sum(bool(k.code and k.code.loads[16]) for k in group)
        print(
            f"{source:20} {arch:7} {len(group):7}  {max(k.registers for k in group):9}  "
            f"{max(k.stack for k in group):5}  {min(k.occupancy for k in group):10.0%}  "
            f"{wide if any(k.code for k in group) else 'not read'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: gankern/_cuda.so")
    parser.add_argument("--arch", nargs="+", default=ARCHS, help="whose code is read and shown")
    parser.add_argument("--compile", nargs="+", metavar="OP", default=[], help="compile these")
    parser.add_argument("--check", action="store_true", help="exit 1 if a rule is broken")
    parser.add_argument("--update", action="store_true", help=f"write {BUDGET.name}")
    args = parser.parse_args()
    archs = tuple(args.arch)
    with tempfile.TemporaryDirectory() as scratch:
        files = compile_here(args.compile, archs, Path(scratch)) or args.files
        files = files or [ROOT / "gankern/_cuda.so"]
        kernels, broken = read(files, archs), check_ptx(files)
    if not args.check:
        show([kernel for kernel in kernels if kernel.arch in archs])
    summary(kernels)
    if args.update:
        write_budget(kernels)
    problems = check(kernels, json.loads(BUDGET.read_text()) if BUDGET.exists() else {}) + broken
    print("\n".join(problems) or "every rule and the budget hold")
    return int(bool(problems) and args.check)


if __name__ == "__main__":
    sys.exit(main())
