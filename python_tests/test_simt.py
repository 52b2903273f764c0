"""csrc/simt on toy kernels: each planted bug is reported with its file and line, correct twins
pass, and counters are what a hand computes. Every variant runs its cases in one process of its own.

As a script (ctest does this): test_simt.py BUILD_FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np

TESTS = Path(__file__).resolve().parent.parent / "csrc" / "simt" / "tests"
EVERY = ("plain", "asan", "race")


class Case(NamedTuple):
    run: Callable[[SimpleNamespace, ModuleType], object]  # of the toys and the module
    variants: tuple[str, ...]
    message: str  # part of the error's text; empty if there must be none
    places: tuple[str, ...]  # marks in bugs.cu whose lines the text names


CASES: dict[str, Case] = {}


def case(*variants: str, message: str = "", places: str = ""):
    def add(run):
        CASES[run.__name__] = Case(run, variants or EVERY, message, tuple(places.split()))
        return run

    return add


def zeros(simt: ModuleType, n: int, dtype=np.float32) -> np.ndarray:
    return simt.copy(np.zeros(n, dtype))


def ramp(simt: ModuleType, n: int, dtype=np.float32) -> np.ndarray:
    return simt.copy(np.arange(n, dtype=dtype))


def mark(name: str) -> str:
    """The position that a mark in bugs.cu stands for."""
    for number, line in enumerate((TESTS / "bugs.cu").read_text().splitlines(), 1):
        if line.endswith(f"@{name}"):
            return f"bugs.cu:{number} "
    raise KeyError(name)


# Barriers and warps.


@case(message="divergent barrier: not all threads", places="divergent_exit")
def divergent_exit(toys, simt):
    toys.divergent_exit(zeros(simt, 64))


@case(message="at different barriers", places="divergent_branch_a divergent_branch_b")
def divergent_branch(toys, simt):
    toys.divergent_branch(zeros(simt, 64))


@case(message="missing from the mask", places="mask_without_caller")
def mask_without_caller(toys, simt):
    toys.mask_without_caller(zeros(simt, 64))


@case(message="deadlock", places="lanes_elsewhere lanes_elsewhere_wait")
def lanes_elsewhere(toys, simt):
    toys.lanes_elsewhere(zeros(simt, 64))


@case(message="different warp collectives", places="mixed_a mixed_b")
def mixed_collectives(toys, simt):
    toys.mixed_collectives(zeros(simt, 64))


@case(message="reads lane 16", places="exited_lane")
def exited_lane(toys, simt):
    toys.exited_lane(zeros(simt, 64))


# Races. The bug and its correct twin.


@case("race", message="race on static shared memory", places="shared_race_write shared_race_read")
def shared_race(toys, simt):
    toys.shared_race(ramp(simt, 64), simt.empty([64], np.float32))


@case(message="", places="")
def shared_right(toys, simt):
    y = simt.empty([64], np.float32)
    toys.shared_right(ramp(simt, 64), y)
    assert (y == np.arange(64)[::-1]).all()


@case("race", message="race on dynamic shared memory", places="loop_race_write loop_race_read")
def loop_race(toys, simt):
    toys.loop_race(ramp(simt, 64), zeros(simt, 64))


@case()
def loop_right(toys, simt):
    toys.loop_right(ramp(simt, 64), zeros(simt, 64))


@case("race", message="race on static shared memory", places="warp_race_write warp_race_read")
def warp_race(toys, simt):
    toys.warp_race(ramp(simt, 32), zeros(simt, 32))


@case()
def warp_right(toys, simt):
    y = zeros(simt, 32)
    toys.warp_right(ramp(simt, 32), y)
    assert (y == np.arange(32) ^ 1).all()


@case("race", message="by thread (0, 0, 0) of block (0, 0, 0)", places="block_race")
def block_race(toys, simt):
    toys.block_race(zeros(simt, 64))


@case("race", message="race on global memory", places="global_race_write global_race_read")
def global_race(toys, simt):
    toys.global_race(zeros(simt, 64))


def ticket(launcher, simt):
    out = simt.empty([1], np.float32)
    count = zeros(simt, 1, np.int32)
    launcher(ramp(simt, 192), simt.empty([192], np.float32), count, out)
    assert out[0] == 191 * 96
    assert count[0] == 0


@case()
def ticket_right(toys, simt):
    ticket(toys.ticket_right, simt)


@case()
def ticket_own_fence(toys, simt):
    ticket(toys.ticket_own_fence, simt)


@case("race", message="race on global memory", places="ticket_write ticket_read")
def ticket_without_fence(toys, simt):
    ticket(toys.ticket_without_fence, simt)


@case("race", message="race on global memory", places="ticket_write ticket_read")
def ticket_without_barrier(toys, simt):
    ticket(toys.ticket_without_barrier, simt)


def others(launcher, simt, blocks, wanted, smem=16, processors=2):
    numbers, sums = simt.empty([blocks], np.float32), simt.empty([blocks], np.float32)
    simt.processors(processors)
    try:
        launcher(numbers, zeros(simt, 1, np.int32), sums, wanted, blocks, smem)
    finally:
        simt.processors(132)
    np.testing.assert_array_equal(sums, blocks * (blocks + 1) / 2 + np.arange(1, blocks + 1) / 64)


@case()
def others_right(toys, simt):
    others(toys.others_right, simt, 5, 5)
    others(toys.others_right, simt, 64, 64)  # as many as two multiprocessors hold


@case(message="deadlock: every block that runs waits", places="others_wait")
def others_never_come(toys, simt):
    others(toys.others_right, simt, 5, 6)


@case(message="deadlock: every block that runs waits", places="others_wait")
def others_without_room(toys, simt):
    others(toys.others_right, simt, 5, 5, smem=48 * 1024, processors=1)


@case("race", message="race on global memory", places="others_write others_read")
def others_without_fence(toys, simt):
    others(toys.others_without_fence, simt, 3, 3)


@case("race", message="must keep its data in dynamic shared memory", places="others_wait")
def others_static(toys, simt):
    others(toys.others_static, simt, 3, 3)


@case("race", message="race on global memory, byte 0", places="atomic_race_add atomic_race_read")
def atomic_race(toys, simt):
    toys.atomic_race(zeros(simt, 1, np.int32), zeros(simt, 64, np.int32))


# Memory.


@case("race", message="read of unwritten static shared memory", places="unwritten_shared")
def unwritten_shared(toys, simt):
    toys.unwritten_shared(zeros(simt, 64))


@case("race", message="read of unwritten global memory", places="unwritten_global")
def unwritten_global(toys, simt):
    toys.accumulate(simt.empty([64], np.float32))


@case()
def written_global(toys, simt):
    toys.accumulate(zeros(simt, 64))


@case("race", "asan", message="read of 4 bytes", places="global_bounds")
def global_end(toys, simt):
    toys.shift(ramp(simt, 64), zeros(simt, 64), 64, 1)


@case("race", "asan", message="read of 4 bytes", places="global_bounds")
def global_start(toys, simt):
    toys.shift(ramp(simt, 64), zeros(simt, 64), 64, -1)


@case()
def global_inside(toys, simt):
    toys.shift(ramp(simt, 64), zeros(simt, 64), 60, 4)


@case("race", message="which is const", places="write_const")
def write_const(toys, simt):
    toys.write_const(ramp(simt, 64))


@case("race", message="misaligned access", places="misaligned")
def misaligned(toys, simt):
    toys.misaligned(ramp(simt, 64), zeros(simt, 64), 0)


@case("asan", message="global variable 'tile'", places="static_bounds")
def static_bounds(toys, simt):
    toys.static_bounds(zeros(simt, 64), 1)


@case("asan", message="global variable", places="template_bounds")
def template_bounds(toys, simt):
    toys.template_bounds(zeros(simt, 64), 1)


@case("asan", "race", message="", places="dynamic_bounds")
def dynamic_bounds(toys, simt):
    toys.dynamic_bounds(zeros(simt, 64), 1)


@case()
def dynamic_inside(toys, simt):
    toys.dynamic_bounds(zeros(simt, 64), 0)


@case("asan", message="stack", places="local_bounds")
def local_bounds(toys, simt):
    toys.local_bounds(zeros(simt, 64), 8)


@case("asan", "race", message="", places="atomic_bounds")
def atomic_bounds(toys, simt):
    toys.atomic_bounds(zeros(simt, 64, np.int32), 64)


# Launches.


@case(message="1 to 1024 threads")
def block_too_large(toys, simt):
    toys.any_launch(1, 1, 1, 1025, 1, 1, 0)


@case(message="65535")
def grid_too_large(toys, simt):
    toys.any_launch(1, 65536, 1, 32, 1, 1, 0)


@case(message="a grid must have")
def grid_empty(toys, simt):
    toys.any_launch(0, 1, 1, 32, 1, 1, 0)


@case(message="limited to 49152 bytes")
def shared_too_large(toys, simt):
    toys.any_launch(1, 1, 1, 32, 1, 1, 49153)


@case(message="less 128 of static arrays")
def shared_and_static_too_large(toys, simt):
    toys.shared_of_both_kinds(ramp(simt, 32) + 1, 48 * 1024 - 127)


@case()
def shared_and_static(toys, simt):
    toys.shared_of_both_kinds(ramp(simt, 32) + 1, 48 * 1024 - 128)


@case()
def shared_opted_in(toys, simt):
    toys.opt_in(227 * 1024)


@case(message="CUDA error 1")
def shared_beyond_opt_in(toys, simt):
    toys.opt_in(227 * 1024 + 1)


@case(message="must have elements of 4 bytes")
def wrong_dtype(toys, simt):
    toys.block_sum(np.zeros(256), zeros(simt, 1), 1)


@case(message="must be dense")
def strided_array(toys, simt):
    toys.block_sum(np.zeros(512, np.float32)[::2], zeros(simt, 1), 1)


# What correct kernels compute.


@case()
def block_sum(toys, simt):
    x, y = ramp(simt, 768), zeros(simt, 3)
    toys.block_sum(x, y, 3)
    np.testing.assert_array_equal(y, x.reshape(3, 256).sum(1))


@case()
def collectives(toys, simt):
    lane = np.arange(32)
    y = simt.empty([9 * 32], np.int32)
    toys.collectives(ramp(simt, 32, np.int32), y)
    y = y.reshape(9, 32)
    np.testing.assert_array_equal(y[0], lane // 8 * 8 + 3)
    np.testing.assert_array_equal(y[1], np.where(lane % 16 < 2, lane, lane - 2))
    np.testing.assert_array_equal(y[2], np.where(lane + 5 > 31, lane, lane + 5))
    np.testing.assert_array_equal(y[3], lane ^ 7)
    np.testing.assert_array_equal(y[4].view(np.uint32), 0xAAAAAAAA)
    np.testing.assert_array_equal(y[5], 1 + 2)
    np.testing.assert_array_equal(y[6], 16)
    np.testing.assert_array_equal(y[7], 0 + 2)
    np.testing.assert_array_equal(y[8], np.where(lane < 16, 5, 20))


@case()
def atomics(toys, simt):
    n, total, wrap = zeros(simt, 5, np.int32), zeros(simt, 1), zeros(simt, 1, np.uint32)
    toys.atomics(n, total, wrap)
    assert n.tolist() == [96, 47, -47, 255, 7]
    assert total[0] == 48
    assert wrap[0] == 96 % 10


@case()
def types(toys, simt):
    h = simt.copy(np.linspace(-2, 2, 192).astype(np.float16))
    b = simt.copy((np.arange(192, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16))
    y = simt.empty([192, 4], np.float32)
    toys.types(h, b, y)
    np.testing.assert_array_equal(y[:, 0], h)
    np.testing.assert_array_equal(y[:, 1], np.arange(192))
    np.testing.assert_array_equal(y[:, 2:], np.broadcast_to([0.5, 1.5], (192, 2)))


# What accesses cost.


def cost(simt, launch) -> SimpleNamespace:
    simt.reset()
    launch()
    return SimpleNamespace(**simt.counters())


def loads(c) -> tuple[int, int, int, int]:
    return (
        c.global_load_requests,
        c.global_load_bytes,
        c.global_load_sectors,
        c.global_load_used_bytes,
    )


@case("race")
def coalesced(toys, simt):
    c = cost(simt, lambda: toys.strided_f32(ramp(simt, 32), zeros(simt, 32), 1))
    assert loads(c) == (1, 128, 4, 128)
    assert (c.global_store_requests, c.global_store_bytes, c.global_store_sectors) == (1, 128, 4)
    assert (c.launches, c.blocks, c.threads) == (1, 1, 32)


@case("race")
def strided(toys, simt):
    # Stride 2: 8 sectors, half of each used. Stride 8 and more: a sector a lane.
    c = cost(simt, lambda: toys.strided_f32(ramp(simt, 64), zeros(simt, 32), 2))
    assert loads(c) == (1, 128, 8, 128)
    c = cost(simt, lambda: toys.strided_f32(ramp(simt, 32 * 20), zeros(simt, 32), 20))
    assert loads(c) == (1, 128, 32, 128)


@case("race")
def broadcast(toys, simt):
    c = cost(simt, lambda: toys.strided_f32(ramp(simt, 1), zeros(simt, 32), 0))
    assert loads(c) == (1, 128, 1, 4)
    assert (c.unique_load_bytes, c.unique_load_sectors) == (4, 1)


@case("race")
def shifted(toys, simt):
    # 128 bytes that start in the middle of a sector touch five.
    x = ramp(simt, 36)[4:]
    assert loads(cost(simt, lambda: toys.strided_f32(x, zeros(simt, 32), 1))) == (1, 128, 5, 128)


@case("race")
def halves(toys, simt):
    x, y = zeros(simt, 32, np.float16), zeros(simt, 32, np.float16)
    assert loads(cost(simt, lambda: toys.strided_f16(x, y, 1))) == (1, 64, 2, 64)


@case("race")
def packs(toys, simt):
    c = cost(simt, lambda: toys.strided_f32x4(ramp(simt, 128), zeros(simt, 128), 1))
    assert loads(c) == (1, 512, 16, 512)
    assert (c.unique_load_bytes, c.unique_store_bytes) == (512, 512)
    assert c.global_store_requests == 1


@case("race")
def diverged(toys, simt):
    # The two ways through the code are requests of their own: 2 by 16 lanes, 1 by the others.
    c = cost(simt, lambda: toys.diverged(ramp(simt, 64), zeros(simt, 32), 16))
    assert loads(c) == (3, 192, 6, 192)
    assert c.global_store_requests == 1


def banks(simt, launch) -> tuple[int, int, int]:
    c = cost(simt, launch)
    return c.shared_load_requests, c.shared_load_wavefronts, c.shared_load_conflicts


@case("race")
def bank_conflicts(toys, simt):
    y = zeros(simt, 32)
    for stride, ways in ((1, 1), (2, 2), (3, 1), (4, 4), (16, 16), (32, 32), (33, 1)):
        assert banks(simt, lambda s=stride: toys.banks_f32(y, s)) == (1, ways, ways - 1)
    # 8 bytes a lane go by half-warps: two wavefronts at the least.
    assert banks(simt, lambda: toys.banks_f64(y, 1)) == (1, 2, 0)
    assert banks(simt, lambda: toys.banks_f64(y, 2)) == (1, 4, 2)
    # 16 bytes a lane go by quarter-warps: four.
    assert banks(simt, lambda: toys.banks_f32x4(y, 1)) == (1, 4, 0)
    assert banks(simt, lambda: toys.banks_f32x4(y, 2)) == (1, 8, 4)


@case()
def counted_by_kernel(toys, simt):
    simt.reset()
    toys.block_sum(ramp(simt, 512), zeros(simt, 2), 2)
    toys.collectives(ramp(simt, 32, np.int32), simt.empty([288], np.int32))
    c = simt.counters()
    # 5 shuffles by 8 warps of 2 blocks; 7 collectives, then one a half-warp.
    assert c["kernels"]["block_sum_kernel"]["warp_collectives"] == 80
    assert c["kernels"]["collectives_kernel"]["warp_collectives"] == 9
    assert c["barriers"] == 2 + 3
    first = {"kernel": "block_sum_kernel", "grid": (2, 1, 1), "block": (256, 1, 1), "smem": 0}
    assert c["launch_list"][0] == first


def run_all(folder: Path) -> dict[str, str]:
    """Every case of the variant in `folder`, in this process: what is wrong with it, or nothing."""
    sys.path.insert(0, str(folder))
    import simt

    toys = SimpleNamespace()
    for library in sorted((folder / "toys").glob("*.so")):
        toys.__dict__.update(vars(simt.load(str(library))))
    wrong = {}
    for name, c in CASES.items():
        if simt.variant not in c.variants:
            continue
        error = ""
        try:
            c.run(toys, simt)
        except (RuntimeError, ValueError, TypeError) as raised:
            error = str(raised)
        except AssertionError as raised:
            wrong[name] = f"a check failed, line {raised.__traceback__.tb_next.tb_lineno}: {raised}"
            continue
        expected = [c.message, *map(mark, c.places)] if c.message or c.places else []
        missing = [text for text in expected if text not in error]
        if missing or bool(error) != bool(expected):
            wrong[name] = f"expected {expected or 'no error'}, got: {error or 'no error'}"
        else:
            wrong[name] = ""
    return wrong


if __name__ == "__main__":
    results = run_all(Path(sys.argv[1]))
    if "--json" in sys.argv:
        print(json.dumps(results))
    else:
        for name, problem in results.items():
            print(f"{'FAILED' if problem else 'ok':6} {name}  {problem}")
        sys.exit(any(results.values()))
else:
    import pytest

    @pytest.fixture(scope="session")
    def outcomes():
        import simt_build

        known: dict[str, dict[str, str]] = {}

        def of(variant: str) -> dict[str, str]:
            if variant not in known:
                command = [sys.executable, __file__, str(simt_build.build(variant)), "--json"]
                environment = simt_build.environment(variant)
                run = subprocess.run(command, env=environment, capture_output=True, text=True)
                assert run.returncode == 0, run.stderr[-4000:]
                known[variant] = json.loads(run.stdout)
            return known[variant]

        return of

    @pytest.mark.xdist_group("simt")  # a process a variant, for all cases
    @pytest.mark.parametrize(
        ("variant", "name"),
        [(v, name) for v in EVERY for name, c in CASES.items() if v in c.variants],
    )
    def test_case(outcomes, variant, name):
        assert not outcomes(variant)[name]
