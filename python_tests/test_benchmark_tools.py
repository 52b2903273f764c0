"""benchmarks/ that time other code, compare commits and draw, on tiny shapes and short texts."""

import argparse
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks/compare.py").exists():
    pytest.skip("needs the source tree, for benchmarks/", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import external  # noqa: E402
import mutate  # noqa: E402
import plots  # noqa: E402
import steps  # noqa: E402

from gankern.cli.train import command as train  # noqa: E402
from gankern.training.config import make_config  # noqa: E402
from gankern.training.graphs import check_graphs  # noqa: E402

# --- make gpu.

# In place of a virtual environment's programs: notes what it is called with, fails for some.
STAND_IN = """#!/bin/sh
[ "$1" = -c ] && exit
echo "$(basename "$0") $*" >> {log}
case "$*" in *overhead.py*) exit 3;; esac
"""


@pytest.fixture(scope="module")
def called(tmp_path_factory) -> tuple[list[list[str]], subprocess.CompletedProcess[str]]:
    """The commands of `make gpu` where overhead.py fails, and how it ended."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    folder = tmp_path_factory.mktemp("gpu")
    for run in ("00000-old", "00001-new"):
        (folder / "results/train" / run).mkdir(parents=True)
    (folder / "bin").mkdir()
    for name in ("python", "gankern"):
        program = folder / "bin" / name
        program.write_text(STAND_IN.format(log=folder / "log"))
        program.chmod(0o755)
    for mark in ("ready", "dev-ready"):
        (folder / mark).touch()
    command = ["make", "gpu", f"VENV={folder}", f"GPU={folder / 'results'}", "ARGS=-k 'a or b'"]
    environ = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "BASE")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ)
    return [shlex.split(line) for line in (folder / "log").read_text().splitlines()], done


def test_make_gpu_goes_on_and_fails(called) -> None:
    commands, done = called
    assert done.returncode != 0
    assert "gpu-bench: failed:" in done.stdout
    assert "gpu-tests: failed:" not in done.stdout
    scripts = [words[1] for words in commands if words[1].startswith("benchmarks/")]
    assert scripts[-4:] == [
        f"benchmarks/{name}.py" for name in ("overhead", "predicted", "launches", "plots")
    ]
    assert commands[-1][:2] == ["gankern", "report"]
    assert commands[-1][2].endswith("train/00001-new/")


def test_make_gpu_builds_before_it_measures(called) -> None:
    commands, _ = called
    build = commands.index(["python", "setup.py", "build_ext", "--inplace"])
    measured = [i for i, words in enumerate(commands) if "benchmarks/" in " ".join(words)]
    assert build < min(measured)


def test_make_gpu_gives_options_that_exist(called, monkeypatch) -> None:
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    scripts = [words[1:] for words in called[0] if words[1].startswith("benchmarks/")]
    for script, *options in scripts:
        monkeypatch.setattr(sys, "argv", [script, *options])
        with pytest.raises(Parsed):
            importlib.import_module(Path(script).stem).main()
    assert len({script for script, *_ in scripts}) == 6


def test_make_gpu_trains_what_graphs_can_record(called) -> None:
    ((_, _, *options),) = [words for words in called[0] if words[:2] == ["gankern", "train"]]
    given = train.make_context("train", options).params
    preset = given.pop("preset")
    fields = {k: v for k, v in given.items() if v is not None and k not in ("resume", "dry_run")}
    config = make_config(preset, **fields)
    check_graphs(config, torch.device("cuda"), 1)
    assert (config.data, config.num_fp16_res, config.batch) == ("digits:256", 4, 32)


# --- Mutations.


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda m: f"{m.op}: {m.name}")
def test_mutations_apply(mutation):
    assert mutation.old in (ROOT / "csrc/kernels" / mutation.file).read_text()


# --- External.

CHECKOUT = """
import contextlib
import torch
from gankern.models import stylegan2

enabled = False
entered = []

@contextlib.contextmanager
def no_weight_gradients():
    entered.append(enabled)
    yield

class Generator(torch.nn.Module):
    def __init__(self, z_dim, c_dim, w_dim, img_resolution, img_channels, **size):
        super().__init__()
        shape = (img_resolution, img_resolution)
        self.net = stylegan2.Generator(z_dim, c_dim, w_dim, shape, img_channels, **size)

    def mapping(self, z, c):
        assert c.shape == (len(z), 0)
        return self.net.mapping(z, c)

    def synthesis(self, ws):
        return self.net.synthesis(ws)

    def forward(self, z, c):
        return self.synthesis(self.mapping(z, c))

class Discriminator(torch.nn.Module):
    def __init__(self, c_dim, img_resolution, img_channels, **size):
        super().__init__()
        shape = (img_resolution, img_resolution)
        self.net = stylegan2.Discriminator(c_dim, shape, img_channels, **size)

    def forward(self, img, c):
        return self.net(img, c)
"""


def run_external(monkeypatch, tmp_path, *arguments) -> int:
    folder = tmp_path / "training"
    folder.mkdir(exist_ok=True)
    (folder / "networks_fake.py").write_text(CHECKOUT)
    given = ["external.py", "--repo", str(tmp_path), "--module", "training.networks_fake"]
    size = ["--resolution", "8", "--channel-base", "64", "--channel-max", "8", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", [*given, *size, "--rounds", "1", *arguments])
    for name in ("training", "training.networks_fake"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return external.main()


def test_external_times_a_checkout(monkeypatch, tmp_path, capsys) -> None:
    file = tmp_path / "external.jsonl"
    steps = ["--step", "generate", "D", "PL"]
    assert run_external(monkeypatch, tmp_path, *steps, "--json", str(file)) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["step"], r["impl"]) for r in rows] == [
        (step, impl) for step in steps[1:] for impl in ("ours", "theirs")
    ]
    assert all(r["ratio"] == 1 for r in rows if r["impl"] == "ours")
    assert all(0 < r["ratio"] < 100 and r["repo"] == tmp_path.name for r in rows)
    assert capsys.readouterr().out.count("/ ours") == 6
    assert str(tmp_path) not in sys.path


def test_external_takes_their_switch(monkeypatch, tmp_path, capsys) -> None:
    module = "training.networks_fake"
    switch = ["--no-weight-gradients", f"{module}:no_weight_gradients"]
    options = ["--step", "D", "R1", "PL", "--enable", f"{module}:enabled", "--json"]
    file = tmp_path / "external.jsonl"
    assert run_external(monkeypatch, tmp_path, *switch, *options, str(file)) == 0
    entered = sys.modules[module].entered
    assert len(entered) >= 4  # a first call and a round each
    assert all(entered)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(row["without_weight_gradients"] for row in rows)
    assert "gradients that ours leave out" not in capsys.readouterr().out

    assert run_external(monkeypatch, tmp_path, "--step", "R1") == 0
    assert sys.modules[module].entered == []
    assert "gradients that ours leave out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=rf"has no 'nothing', got '{module}:nothing'"):
        run_external(monkeypatch, tmp_path, "--enable", f"{module}:nothing")


def test_external_names_what_does_not_fit(monkeypatch, tmp_path) -> None:
    with pytest.raises(SystemExit, match="is not a folder"):
        external.load(tmp_path / "nothing", "training")
    with pytest.raises(SystemExit, match="cannot be imported"):
        external.load(tmp_path, "training.not_there")
    (tmp_path / "half.py").write_text("Generator = 1")
    with pytest.raises(SystemExit, match="has no Discriminator"):
        external.load(tmp_path, "half")
    with pytest.raises(SystemExit, match=r"other arguments: .*--generator-args"):
        run_external(monkeypatch, tmp_path, "--generator-args", '{"depth": 3}')
    assert external.arguments({"a": 1, "b": 2}, '{"a": null, "c": 3}') == {"b": 2, "c": 3}
    with pytest.raises(SystemExit, match="JSON object"):
        external.arguments({}, "a=1")


# --- Plots.


def ops_rows() -> list[dict]:
    about = {"machine": "M", "dtype": "float32", "channels_last": False, "case": ""}
    rows = [
        about | {"op": op, "impl": impl, "what": what, "x": [n, 8], "ms": n * ms, "ms_10": ms,
                 "ms_90": ms, "ratio": 2 / ms, "gb_s": 4 / ms, "of_copy": 0.5 / ms}
        for op in ("bias_act", "adain")
        for impl, ms in (("reference", 2.0), ("cpu", 1.0))
        for what in ("forward", "forward+backward", "double-backward")
        for n in (1, 16)
    ]  # fmt: skip
    for row in rows:
        if row["what"] == "double-backward":  # its fewest bytes are not known
            row |= {"gb_s": None, "of_copy": None}
    return rows


def step_rows() -> list[dict]:
    return [
        {"machine": "M", "model": "m", "step": s, "batch": 8, "impl": i, "ms": 1.0, "ratio": r}
        for s in ("G", "D")
        for i, r in (("ours", 1.0), ("reference", 1.5), ("floor", 0.8))
    ]


def scale_rows() -> list[dict]:
    about = {"machine": "M", "impl": "ours", "cpu_time": True, "ms": 1.0}
    return [about | {"scale": s, "value": v, "img_s": 100.0 / v} for s in steps.SCALES
            for v in steps.SCALES[s]]  # fmt: skip


def test_scaling_counts_images_of_all_ranks(monkeypatch) -> None:
    base = {"batch": 1, "resolution": 8, "channels": 4, "ranks": 1}
    monkeypatch.setattr(steps, "BASE", base)
    monkeypatch.setattr(steps, "seconds_of_ranks", lambda sizes, *_: (0.25 * sizes["ranks"], 0.125))
    found = list(steps.scaling({"batch": (2,), "ranks": (1, 4)}, 1, "cpu", True))
    assert [row["img_s"] * row["ms"] for row in found] == pytest.approx([2000, 1000, 4000])
    assert (found[2]["ms"], found[2]["averaging_ms"]) == (1000, 125)
    assert [row["value"] for row in found] == [2, 1, 4]


def test_plots_draw_what_was_measured(monkeypatch, tmp_path, capsys) -> None:
    file = tmp_path / "all.jsonl"
    rows = [*ops_rows(), *step_rows(), *scale_rows()]
    rows.append({"kind": "predicted", "impl": "cuda", "ms": 1})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["plots.py", str(file), "--out", str(tmp_path / "out"), "--format", "svg"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert plots.main() == 0
    kinds = ("roofline", "scaling", "speedup")
    wanted = [*(f"{kind}-m-float32-nchw.svg" for kind in kinds), "steps-m-batch-8.svg"]
    wanted.append("growth-m-cpu-time.svg")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(wanted)
    assert capsys.readouterr().out.count("wrote ") == 5


def test_plots_keep_the_last_and_the_largest(tmp_path) -> None:
    first, second = (
        {**row, "ratio": r} for row, r in zip([ops_rows()[4]] * 2, (1, 7), strict=True)
    )
    file = tmp_path / "twice.jsonl"
    file.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    assert [row["ratio"] for row in plots.read([file])] == [7]
    assert plots.read([file], "abc") == []
    assert {tuple(row["x"]) for row in plots.largest(ops_rows())} == {(16, 8)}
    file.write_text("no json\n")
    with pytest.raises(SystemExit, match="line 1 is not JSON"):
        plots.read([file])


def test_plots_keep_apart_what_was_measured_otherwise(tmp_path) -> None:
    ways = [{}, {"graphs": True}, {"cpu_time": True}, {"batch": 16}]
    rows = [row | way for way in ways for row in step_rows()]
    rows += [row | {"commit": "abcdef0123", "ratio": 9} for row in step_rows()]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = plots.read([file])
    assert len(kept) == len(ways) * len(step_rows())
    assert {row["commit"] for row in kept if row["ratio"] == 9} == {"abcdef0123"}
    drawn = plots.steps(kept)
    titles = ["M, batch 8", "M, batch 8, CUDA graphs", "M, batch 8, CPU time", "M, batch 16"]
    assert set(drawn) == set(titles)
    assert drawn[titles[0]].axes[0].get_title(loc="left") == "M, batch 8\nabcdef0"
    assert len(plots.read([file], "abcd")) == len(step_rows())


def test_roofline_names_its_roof_and_leaves_out_unknown_bytes() -> None:
    rows = [row for row in ops_rows() if row["what"] == "double-backward"]
    assert plots.roofline("M", rows) is None
    figure = plots.roofline("M", ops_rows())
    assert figure is not None
    assert figure.axes[0].get_title(loc="left") == "The roof of memory: M"
    assert sum(len(line.get_xdata()) for line in figure.axes[0].lines) == 16 + 2  # and the roof


# --- Compare.


def test_compare_ratios_and_regressions() -> None:
    key, gone = ("bias_act lrelu", "8x8", "forward"), ("adain", "8x8", "forward")
    rounds = [
        {"base": {key: 2.0, gone: 1.0}, "head": {key: 2.0 * ratio}} for ratio in (1.1, 1.2, 1.3)
    ]
    (row,) = compare.compare(rounds)
    assert row.key == key
    assert (row.base, row.head) == (2.0, 2.4)
    assert (row.ratio, row.least, row.most, row.fastest) == (1.2, 1.1, 1.3, 1.1)
    assert compare.regressions([row], 9) == [row]
    assert compare.regressions([row], 15) == []  # the fastest rounds do not confirm it
    row.least = 0.9  # nor does every round
    assert compare.regressions([row], 9) == []


def test_compare_reads_rows_of_the_cpu() -> None:
    about = {"op": "adain", "case": "", "x": [8, 4], "dtype": "float32", "what": "forward"}
    lines = [
        about | {"channels_last": last, "impl": impl, "ms": ms + last}
        for last in (False, True)
        for impl, ms in (("reference", 9), ("cpu", 3))
    ]
    assert compare.read("\n".join(map(json.dumps, lines))) == {
        ("adain", "8x4", "float32", "nchw", "forward"): 3,
        ("adain", "8x4", "float32", "channels-last", "forward"): 4,
    }


def test_compare_writes_rows_with_both_commits() -> None:
    key = ("adain", "8x4", "float16", "nchw", "forward")
    (row,) = compare.compare([{"base": {key: 2.0}, "head": {key: 3.0}}])
    (line,) = compare.json_lines([row], {"base": "b" * 40, "head": "h" * 40})
    found = json.loads(line)
    assert (found["base_commit"], found["head_commit"]) == ("b" * 40, "h" * 40)
    assert (found["op"], found["dtype"], found["layout"]) == ("adain", "float16", "nchw")
    assert (found["base_ms"], found["head_ms"], found["ratio"]) == (2, 3, 1.5)
    assert {"machine", "torch", "time"} <= set(found)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_compare_checks_out_both_commits(monkeypatch, tmp_path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    monkeypatch.setattr(compare, "ROOT", repo)

    def git(*arguments):
        name = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        return compare.git(*name, *arguments, folder=repo)

    git("init", "-q")
    for text in ("one", "two"):
        (repo / "file").write_text(text)
        git("add", "file")
        git("commit", "-q", "-m", text)
    monkeypatch.setattr(compare.git, "__defaults__", (repo,))
    monkeypatch.setattr(compare.git, "__kwdefaults__", {"folder": repo})
    commits = {"base": compare.commit_of("HEAD~1"), "head": compare.commit_of("HEAD")}
    with compare.worktrees(None, commits) as trees:
        assert [tree.joinpath("file").read_text() for tree in trees.values()] == ["one", "two"]
    assert not any(tree.exists() for tree in trees.values())
    with pytest.raises(SystemExit, match="rev-parse failed"):
        compare.commit_of("no-such-revision")
