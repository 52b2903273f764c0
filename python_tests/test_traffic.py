"""benchmarks/traffic.py: its check fails when a figure is worse than its budget or its bar."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAFFIC = ROOT / "benchmarks/traffic.py"
if not TRAFFIC.exists():
    pytest.skip("needs the source tree, for benchmarks/traffic.py", allow_module_level=True)

# A row that takes no time: 16 KiB.
ROW, KEY = (
    ("--op", "pixel_norm", "--case", "latent", "--dtype", "f32", "--layout", "nchw"),
    ("pixel_norm latent {} f32 nchw"),
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TRAFFIC), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def judge(code: str) -> str:
    """What a program with traffic.py's functions prints, in a process with its variant."""
    program = f"import sys; sys.path.insert(0, {str(TRAFFIC.parent)!r})\nimport traffic\n"
    done = subprocess.run([sys.executable, "-c", program + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout[:-1]


def test_check_fails_when_a_figure_gets_worse(tmp_path):
    budget = tmp_path / "budget.json"
    written = run(*ROW, "--update", "--budget", str(budget))
    assert written.returncode == 0, written.stdout + written.stderr
    kept = json.loads(budget.read_text())
    assert sorted(kept) == [KEY.format("backward"), KEY.format("forward")]
    assert kept[KEY.format("forward")][:2] == [1.0, 1.0]  # each byte once, whole sectors
    kept[KEY.format("forward")][0] = 0.9
    budget.write_text(json.dumps(kept))
    checked = run(*ROW, "--check", "--budget", str(budget))
    assert checked.returncode == 1
    expected = f"{KEY.format('forward')}: traffic 1.0, the budget has 0.9"
    assert checked.stdout.splitlines()[-1] == expected


def test_judging():
    assert judge("""
good, key = traffic.Figures(1.0, 1.0, 1.0, 1, 1.0, 1.0), "bias_act lrelu forward f32 nchw"
judge = lambda now, budget: print(*traffic.problems({key: now}, {key: budget}), sep="|")
judge(good, good)
judge(good._replace(sectors=0.96), good)
judge(good._replace(banks=1.2), good._replace(banks=1.2))
judge(good._replace(a100=0.375), good._replace(a100=0.375))
print(*traffic.problems({key: good}, {}))
""").splitlines() == [
        "",
        "bias_act lrelu forward f32 nchw: sectors used 0.96, the budget has 1.0",
        "bias_act lrelu forward f32 nchw: bank cycles 1.2, the bar is 1.1",
        "bias_act lrelu forward f32 nchw: A100 threads 0.375, the bar is 0.5",
        "bias_act lrelu forward f32 nchw: not in the budget; --update adds it",
    ]


def test_documentation_shows_the_budget():
    table = judge("print(traffic.markdown(traffic.read_budget(traffic.BUDGET)))")
    assert table.count("\n") >= 20
    assert table in (ROOT / "docs/ops.md").read_text()
