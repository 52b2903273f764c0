"""Is one commit slower than another: both built, their ops timed in alternating processes.

    make bench-compare BASE=v0.1.0
    python benchmarks/compare.py BASE                    the checked-out commit against BASE
    python benchmarks/compare.py BASE --head REV --rounds 9 --fail-over 15
    python benchmarks/compare.py BASE --folder /tmp/compared   keeps the two trees for the next time
    python benchmarks/compare.py BASE --json FILE              also appends one JSON line a row
    python benchmarks/compare.py BASE -- --op upfirdn2d        options of benchmarks/ops.py

Each commit is checked out into a worktree and its CPU library built there, once for both where they
have the same sources; what is not committed is not compared. A round starts benchmarks/ops.py of
the two, one after the other, in turns first. Printed are the medians over the rounds of each row's
time, and of head / base within a round with the least and the greatest; then head / base of each
one's fastest round, which a busy machine disturbs least. Exit code 1: in some row head is slower in
every round, and both the median and the fastest by over --fail-over per cent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ops import machine

ROOT = Path(__file__).resolve().parent.parent
# What the compiled library is made of.
SOURCES = ("csrc", "setup.py", "gankern/_toolchain.py")
Key = tuple[str, ...]  # op, x, dtype, layout, direction
Times = dict[Key, float]  # milliseconds by row


def git(*arguments: str, folder: Path = ROOT) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"compare: git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def commit_of(rev: str) -> str:
    return git("rev-parse", "--verify", "--end-of-options", f"{rev}^{{commit}}")


@contextlib.contextmanager
def worktrees(folder: Path | None, commits: dict[str, str]) -> Iterator[dict[str, Path]]:
    """A checkout of each commit, by side; removed at the end unless the folder was given."""
    scratch = Path(folder or tempfile.mkdtemp(prefix="gankern-compare-"))
    trees = {side: scratch.resolve() / side for side in commits}
    try:
        for side, commit in commits.items():
            if (trees[side] / ".git").exists():
                git("checkout", "-q", "--detach", commit, folder=trees[side])
            else:
                git("worktree", "add", "-q", "--detach", str(trees[side]), commit)
        yield trees
    finally:
        if folder is None:
            shutil.rmtree(scratch, ignore_errors=True)
            git("worktree", "prune")


def build(trees: dict[str, Path], commits: dict[str, str], jobs: int) -> None:
    """The CPU library of each tree, or one for both if nothing that it is made of differs."""
    base, head = trees.values()
    same = not git("diff", "--name-only", *commits.values(), "--", *SOURCES)
    for tree in (base,) if same else (base, head):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--cpu-only"]
        done = subprocess.run([*command, f"-j{jobs}"], cwd=tree, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"compare: {tree.name} does not build:\n{done.stderr[-2000:]}")
    for path in base.glob("gankern/_*") if same else ():
        if path.suffix in (".so", ".json"):
            shutil.copy2(path, head / "gankern")


def time_once(tree: Path, options: list[str]) -> Times:
    """Milliseconds of the tree's rows in one process of its own benchmarks/ops.py."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "ops.jsonl"
        command = [sys.executable, "benchmarks/ops.py", "--impl", "cpu", "--json", str(file)]
        done = subprocess.run([*command, *options], cwd=tree, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"compare: ops.py of {tree.name} failed:\n{done.stderr[-2000:]}")
        return read(file.read_text())


def read(lines: str) -> Times:
    """Rows of the CPU implementation in JSON lines of benchmarks/ops.py."""
    times: Times = {}
    for line in lines.splitlines():
        row: dict[str, Any] = json.loads(line)
        if row["impl"] == "cpu":
            size = "x".join(map(str, row["x"]))
            layout = "channels-last" if row["channels_last"] else "nchw"
            name = f"{row['op']} {row['case']}".strip()
            times[name, size, row["dtype"], layout, row["what"]] = row["ms"]
    return times


@dataclass
class Compared:
    key: Key
    base: float  # ms
    head: float
    ratio: float  # head / base
    least: float
    most: float
    fastest: float  # of the fastest rounds


def compare(rounds: list[dict[str, Times]]) -> list[Compared]:
    """The rows that both sides have in every round."""
    sides = [times for both in rounds for times in both.values()]
    found = []
    for key in sides[0]:
        if not all(key in times for times in sides):
            continue
        base, head = ([both[side][key] for both in rounds] for side in ("base", "head"))
        ratios = [h / b for h, b in zip(head, base, strict=True)]
        found.append(
            Compared(
                key, statistics.median(base), statistics.median(head), statistics.median(ratios),
                min(ratios), max(ratios), min(head) / min(base),
            )
        )  # fmt: skip
    return found


def regressions(rows: list[Compared], fail_over: float) -> list[Compared]:
    limit = 1 + fail_over / 100
    return [row for row in rows if min(row.ratio, row.fastest) > limit and row.least > 1]


def show(rows: list[Compared], commits: dict[str, str]) -> None:
    print(" ".join(f"{side} {commit[:12]}" for side, commit in commits.items()))
    wide = max((len(" ".join(row.key)) for row in rows), default=0)
    print(
        f"{'row':{wide}}  {'base ms':>9} {'head ms':>9} {'head/base':>9} [{'least':>6} {'most':>6}]"
    )
    for row in rows:
        times = f"{row.base:9.3f} {row.head:9.3f} {row.ratio:9.3f}"
        print(
            f"{' '.join(row.key):{wide}}  {times} [{row.least:6.3f} {row.most:6.3f}] "
            f"{row.fastest:7.3f}"
        )


def json_lines(rows: list[Compared], commits: dict[str, str]) -> Iterator[str]:
    about = machine("cpu") | {"kind": "compared"}
    about |= {f"{side}_commit": commit for side, commit in commits.items()}
    for row in rows:
        key = dict(zip(("op", "x", "dtype", "layout", "what"), row.key, strict=True))
        times = {"base_ms": row.base, "head_ms": row.head, "ratio": row.ratio}
        times |= {"least": row.least, "most": row.most, "fastest": row.fastest}
        yield json.dumps(about | key | times) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", metavar="BASE", help="the commit to compare with")
    parser.add_argument("--head", default="HEAD", metavar="REV", help="default: HEAD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--fail-over", type=float, metavar="PERCENT", help="exit 1 if slower by more"
    )
    parser.add_argument("--folder", type=Path, help="keep the two trees here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results to FILE")
    parser.add_argument("--jobs", type=int, default=1, help="of the build")
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args, options = parser.parse_args(argv[:cut]), argv[cut + 1 :] or ["--rounds", "5"]
    commits = {"base": commit_of(args.base), "head": commit_of(args.head)}
    with worktrees(args.folder, commits) as trees:
        build(trees, commits, args.jobs)
        rounds = []
        for i in range(args.rounds):
            order = list(trees) if i % 2 == 0 else list(trees)[::-1]
            rounds.append({side: time_once(trees[side], options) for side in order})
    rows = compare(rounds)
    if not rows:
        raise SystemExit("compare: the two commits have no row in common")
    show(rows, commits)
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json_lines(rows, commits))
    slower = regressions(rows, args.fail_over) if args.fail_over is not None else []
    for row in slower:
        print(f"slower by {row.ratio - 1:.0%}, over {args.fail_over:g} %: {' '.join(row.key)}")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
