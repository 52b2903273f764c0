"""benchmarks/ that time other code, compare commits and draw, on tiny shapes and short texts."""

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks/compare.py").exists():
    pytest.skip("needs the source tree, for benchmarks/", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import external  # noqa: E402
import mutate  # noqa: E402
import plots  # noqa: E402
import steps  # noqa: E402

# --- Mutations.


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda m: f"{m.op}: {m.name}")
def test_mutations_apply(mutation):
    assert mutation.old in (ROOT / "csrc/kernels" / mutation.file).read_text()


# --- External.

CHECKOUT = """
import torch
from gankern.models import stylegan2

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
    return [
        about | {"op": op, "impl": impl, "what": what, "x": [n, 8], "ms": n * ms, "ms_10": ms,
                 "ms_90": ms, "ratio": 2 / ms, "gb_s": 4 / ms, "of_copy": 0.5 / ms}
        for op in ("bias_act", "adain")
        for impl, ms in (("reference", 2.0), ("cpu", 1.0))
        for what in ("forward", "forward+backward")
        for n in (1, 16)
    ]  # fmt: skip


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
    monkeypatch.setattr(steps, "seconds_of_ranks", lambda sizes, *_: 0.25 * sizes["ranks"])
    found = list(steps.scaling({"batch": (2,), "ranks": (1, 4)}, 1, "cpu", True))
    assert [row["img_s"] * row["ms"] for row in found] == pytest.approx([2000, 1000, 4000])
    assert found[2]["ms"] == 1000
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
    assert {tuple(row["x"]) for row in plots.largest(ops_rows())} == {(16, 8)}
    file.write_text("no json\n")
    with pytest.raises(SystemExit, match="line 1 is not JSON"):
        plots.read([file])


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
    about = {"op": "adain", "case": "", "x": [8, 4], "what": "forward"}
    lines = [about | {"impl": impl, "ms": ms} for impl, ms in (("reference", 9), ("cpu", 3))]
    assert compare.read("\n".join(map(json.dumps, lines))) == {("adain", "8x4", "forward"): 3}


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
