"""Breaks every CUDA kernel on purpose and requires that its tests notice.

    python benchmarks/mutate.py                      all ops
    python benchmarks/mutate.py bias_act pixel_norm  these

Each mutation (an index off by one, a missing barrier, a wrong factor) is made in a scratch copy of
the repository, where csrc/simt builds the kernel for the CPU and a small part of the op's tests
runs: first unbroken, which must pass, then broken, which must fail. Missing barriers are run with
simt's race checks. Prints which test caught each mutation; exit code 1 if one survived.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("csrc", "gankern", "python_tests", "CMakeLists.txt", "pyproject.toml")


@dataclass
class Mutation:
    op: str
    name: str
    file: str  # in csrc/kernels
    old: str  # its first occurrence is replaced
    new: str
    variant: str = "plain"  # of simt


# The tests that are run of each op, as pytest's -k takes them: seconds in the plain variant.
TESTS = {
    "bias_act": "(test_forward_and_gradients and planes) or (test_layouts and planes and f32)",
    "pixel_norm": "test_layouts and f32 and (planes or wide)",
    "adain": "(test_layouts and f32 and planes) or test_planes_of_several_blocks",
    "minibatch_stddev": "test_layouts and f32",
    "demod_coefs": "test_layouts and f32 and (3x3 or odd)",
    "upfirdn2d": "(test_forward_and_gradients and f32 and not strided) or (test_lines and f32)",
    "synthesis_epilogue": (
        "(test_against_reference and ((f32 and (up_layer or no_filter)) or (-f16 and up_layer)))"
        " or (test_strips and f32 and 40)"
    ),
}

MUTATIONS = [
    Mutation(
        "bias_act", "index: a plane's last pack is left out", "bias_act.cu",
        "const int64_t stop = behind(packs);",
        "const int64_t stop = behind(packs - 1);",
    ),
    Mutation(
        "bias_act", "barrier: sums of a column are read at once", "bias_act.cu",
        "(threadIdx.x, j), piece);\n    }\n  }\n  __syncthreads();",
        "(threadIdx.x, j), piece);\n    }\n  }",
        "race",
    ),
    Mutation(
        "bias_act", "gain: left out of the gradient", "bias_act.cu",
        "return in0 * p.gain * act_slope",
        "return in0 * act_slope",
    ),
    Mutation(
        "pixel_norm", "index: the last of a column is left out", "norm.cuh",
        "const int64_t stop = inside ? length : 0;",
        "const int64_t stop = inside ? length - 1 : 0;",
    ),
    Mutation(
        "pixel_norm", "barrier: warps' sums are read at once", "norm.cuh",
        "warp_sums[i][warp] = s[i];\n  __syncthreads();",
        "warp_sums[i][warp] = s[i];",
        "race",
    ),
    Mutation(
        "pixel_norm", "constant: no division by mean(x²) + eps", "pixel_norm.cu",
        "f[1] = r * (inv_length / m * s[1]);",
        "f[1] = r * (inv_length * s[1]);",
    ),
    Mutation(
        "adain", "index: a row's last pack is left out", "norm.cuh",
        "row < rows ? length / N : 0;",
        "row < rows ? length / N - 1 : 0;",
    ),
    Mutation(
        "adain", "barrier: threads' sums are read at once", "norm.cuh",
        "columns = N << log_tx;\n  __syncthreads();",
        "columns = N << log_tx;",
        "race",
    ),
    Mutation(
        "adain", "constant: a sum for a mean", "adain.cu",
        "f[1] = s[0] * inv_length;",
        "f[1] = s[0];",
    ),
    Mutation(
        "adain", "fence: other blocks' sums are read at once", "norm_group.cuh",
        "        fence();  // the block's sums, which a barrier has made known here\n",
        "",
        "race",
    ),
    Mutation(
        "adain", "constant: the plane's mean about the pivot alone", "adain.cu",
        "m = p.pivot + d;",
        "m = d;",
    ),
    Mutation(
        "minibatch_stddev", "index: the group's last sample is left out", "minibatch_stddev.cu",
        "size = a.most - (m >= a.larger);",
        "size = a.most - (m >= a.larger) - 1;",
    ),
    Mutation(
        "minibatch_stddev", "barrier: warps' sums are read at once", "minibatch_stddev.cu",
        "sums[threadIdx.x / 32] = v;\n  __syncthreads();",
        "sums[threadIdx.x / 32] = v;",
        "race",
    ),
    Mutation(
        "minibatch_stddev", "constant: a standard deviation too large", "minibatch_stddev.cu",
        "constexpr double kEps = 1e-8;",
        "constexpr double kEps = 1e-2;",
    ),
    Mutation(
        "upfirdn2d", "index: the tile begins one column later", "upfirdn2d_planes.cuh",
        "const int ix0 = first_sample<kUp, kDown>(p.w, ox0), iy0",
        "const int ix0 = first_sample<kUp, kDown>(p.w, ox0) + 1, iy0",
    ),
    Mutation(
        "upfirdn2d", "barrier: the tile is read while it is written", "upfirdn2d_planes.cuh",
        "Half16>(p, tile, image, ix0, iy0);\n  __syncthreads();",
        "Half16>(p, tile, image, ix0, iy0);",
        "race",
    ),
    Mutation(
        "upfirdn2d", "gain: left out of an outer product", "upfirdn2d_planes.cuh",
        "product[i] = found.x * gain;",
        "product[i] = found.x;",
    ),
    Mutation(
        "upfirdn2d", "barrier, channels-last: a stage is read while it is copied",
        "upfirdn2d_walk.cuh",
        "copy_wait<kStages<kDown> - 2>();\n      __syncthreads();",
        "copy_wait<kStages<kDown> - 2>();",
        "race",
    ),
    Mutation(
        "demod_coefs", "index: a chunk's last output channel is left out", "demod_coefs.cu",
        "if (o + t * kLines < chunk) {",
        "if (o + t * kLines < chunk - 1) {",
    ),
    Mutation(
        "demod_coefs", "barrier: warps' sums are read at once", "demod_coefs.cu",
        "                     out);\n  }\n  __syncthreads();",
        "                     out);\n  }",
        "race",
    ),
    Mutation(
        "demod_coefs", "constant: the power of d in the gradient", "demod_coefs.cu",
        "* (d * d * d);",
        "* (d * d);",
    ),
    Mutation(
        "upfirdn2d", "lines: what lies beside a row is not cleared", "lines.cuh",
        "if (!(w & 0xff00)) continue;",
        "continue;",
    ),
    Mutation(
        "synthesis_epilogue", "index: the noise of the next row", "synthesis_epilogue_lines.cuh",
        "LineNoise<T>{a}.copy(shared, strip, me, row, ",
        "LineNoise<T>{a}.copy(shared, strip, me, row + 1, ",
    ),
    Mutation(
        "synthesis_epilogue", "barrier: a stage is read while it is copied", "lines.cuh",
        "op.have_noise(noises(step), me);\n      __syncthreads();",
        "op.have_noise(noises(step), me);",
        "race",
    ),
    Mutation(
        "synthesis_epilogue", "barrier: du is read at once", "synthesis_epilogue_lines.cuh",
        "        __syncthreads();\n        part + D < R ?",
        "        part + D < R ?",
        "race",
    ),
    Mutation(
        "synthesis_epilogue", "barrier: du is written while it is read",
        "synthesis_epilogue_lines.cuh",
        "__syncthreads();  // the rows of du before", "//",
        "race",
    ),
    Mutation(
        "synthesis_epilogue", "index: the sums of one more row of dv",
        "lines.cuh",
        "own_last = min(row0 + m.tile_h < a.H ? m.tile_h + kHalo : all",
        "own_last = min(row0 + m.tile_h < a.H ? m.tile_h + kHalo + 1 : all",
    ),
    Mutation(
        "synthesis_epilogue", "barrier: partial sums are read at once",
        "synthesis_epilogue_bwd.cuh",
        "int c0, int step, int tile) {\n  __syncthreads();",
        "int c0, int step, int tile) {",
        "race",
    ),
    Mutation(
        "synthesis_epilogue", "sums: the last tile of a sample is left out",
        "synthesis_epilogue_bwd.cuh",
        "t < a.tiles; t += 32",
        "t < a.tiles - 1; t += 32",
    ),
    Mutation(
        "synthesis_epilogue", "barrier: the sums of samples are read before all have come",
        "synthesis_epilogue_bwd.cuh",
        "(a.tickets + static_cast<int64_t>(a.N) * a.groups + group, a.N)",
        "(a.tickets + static_cast<int64_t>(a.N) * a.groups + group, 1)",
    ),
    Mutation(
        "synthesis_epilogue", "index, channels-last: the first row of results is left out",
        "synthesis_epilogue_pixels.cuh",
        "max(kHalo - row, 0) << 8",
        "max(kHalo + 1 - row, 0) << 8",
    ),
    Mutation(
        "synthesis_epilogue", "index, channels-last: channels of the block before",
        "synthesis_epilogue_pixels.cuh",
        "c0 = group * a.channels;",
        "c0 = max(group - 1, 0) * a.channels;",
    ),
    Mutation(
        "synthesis_epilogue", "index, channels-last: the noise of the next row",
        "synthesis_epilogue_pixels.cuh",
        "strip.tile.n, strip.dy_top + row, strip.dy_left, count);\n    }\n    copy_batch();",
        "strip.tile.n, strip.dy_top + row + 1, strip.dy_left, count);\n    }\n    copy_batch();",
    ),
    Mutation(
        "synthesis_epilogue", "barrier, channels-last: du is read at once",
        "synthesis_epilogue_pixels.cuh",
        "__syncthreads();\n      begin(strip.row[1] + a.step);",
        "begin(strip.row[1] + a.step);",
        "race",
    ),
    Mutation(
        "synthesis_epilogue", "gain: left out above 0", "act.cuh",
        "return v > 0.f ? gain : negative; }",
        "return v > 0.f ? 1.f : negative; }",
    ),
]  # fmt: skip


def make_copy(folder: Path, op: str) -> None:
    """The repository, with the kernels of `op` alone, so that little is compiled."""
    skip = shutil.ignore_patterns("__pycache__", "_cuda.so")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        else:
            shutil.copy2(ROOT / name, folder / name)
    for path in [*folder.glob("csrc/kernels/*.cu"), *folder.glob("csrc/torch/*.cpp")]:
        if path.stem not in (op, "library"):
            path.unlink()
    for path in folder.glob("csrc/simt/tests/*.cu"):
        path.unlink()


def test_file(op: str) -> str:
    own = f"test_{op}.py"
    return own if (ROOT / "python_tests" / own).exists() else "test_synthesis_layer.py"


def run_tests(folder: Path, op: str, variant: str) -> tuple[bool, str]:
    """Builds and tests an op in the copy: whether it passed, and the test that failed."""
    script = folder / "python_tests/simt_build.py"
    build = subprocess.run([sys.executable, str(script), variant], capture_output=True, text=True)
    if build.returncode:
        raise SystemExit(f"mutate: {op} does not compile\n{build.stderr[-3000:]}")
    command = [sys.executable, str(script), variant, test_file(op), "--impl", "simt"]
    command += ["-k", TESTS[op], "-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
    env = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "300"}
    log = subprocess.run(command, capture_output=True, text=True, env=env)
    if log.returncode not in (0, 1):
        raise SystemExit(f"mutate: no tests of {op} ran\n{log.stdout[-2000:]}{log.stderr[-2000:]}")
    failed = re.search(r"^FAILED \S+?::(.+?)(?: - |$)(.*)", log.stdout, re.MULTILINE)
    return log.returncode == 0, f"{failed[1]}: {failed[2][:100]}" if failed else log.stdout[-300:]


def mutate(folder: Path, mutation: Mutation) -> str:
    """The test that caught it, or "" if it survived; the file is whole again afterwards."""
    path = folder / "csrc/kernels" / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new, 1))
    try:
        passed, what = run_tests(folder, mutation.op, mutation.variant)
    finally:
        path.write_text(text)
    return "" if passed else what


def missing(mutation: Mutation) -> bool:
    path = ROOT / "csrc/kernels" / mutation.file
    return not path.exists() or mutation.old not in path.read_text()


def mutate_op(op: str, mutations: list[Mutation], folder: Path) -> int:
    """Prints a line for each mutation; returns how many survived."""
    make_copy(folder, op)
    for variant in dict.fromkeys(m.variant for m in mutations):
        passed, what = run_tests(folder, op, variant)
        if not passed:
            raise SystemExit(f"mutate: {op} fails unbroken ({variant}): {what}")
    survived = 0
    for mutation in mutations:
        start = time.monotonic()
        caught = mutate(folder, mutation)
        survived += not caught
        verdict = f"caught by {caught}" if caught else "SURVIVED"
        seconds = f"{time.monotonic() - start:4.0f} s"
        print(f"{op:20} {mutation.name:45} {mutation.variant:6} {seconds}  {verdict}", flush=True)
    return survived


def main() -> int:
    ops = list(dict.fromkeys(m.op for m in MUTATIONS))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: {' '.join(ops)}")
    wanted = parser.parse_args().ops or ops
    if unknown := set(wanted) - set(ops):
        parser.error(f"no mutations of {', '.join(unknown)}; there are: {', '.join(ops)}")
    chosen = [m for m in MUTATIONS if m.op in wanted]
    if stale := [f"{m.op}, {m.name}: {m.file} has no {m.old!r}" for m in chosen if missing(m)]:
        raise SystemExit("mutate: these mutations no longer fit:\n" + "\n".join(stale))
    survived = 0
    with tempfile.TemporaryDirectory() as scratch:
        for op in wanted:
            folder = Path(scratch) / op
            folder.mkdir()
            survived += mutate_op(op, [m for m in chosen if m.op == op], folder)
            shutil.rmtree(folder)
    print(f"{len(chosen)} mutations, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
