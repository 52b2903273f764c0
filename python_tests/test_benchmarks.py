"""benchmarks/ that count and predict, on tiny shapes; `gankern bench`."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks/launches.py").exists():
    pytest.skip("needs the source tree, for benchmarks/", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import launches  # noqa: E402
import overhead  # noqa: E402
import predicted  # noqa: E402
import sass  # noqa: E402

from gankern import ops  # noqa: E402
from gankern.cli import bench, main  # noqa: E402
from gankern.ops import _impl  # noqa: E402

needs_cpu = pytest.mark.skipif(bool(_impl.LIBRARIES["cpu"]), reason=_impl.LIBRARIES["cpu"])


# --- gankern bench.


def test_bench_runs_the_script(monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command: ran.append(command) or types.SimpleNamespace(returncode=3),
    )
    result = CliRunner().invoke(main, ["bench", "ops", "--op", "bias_act", "--help"])
    script = str(ROOT / "benchmarks/ops.py")
    assert ran == [[sys.executable, script, "--op", "bias_act", "--help"]]
    assert result.exit_code == 3


def test_bench_passes_a_double_dash_on(monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(bench, "run", lambda name, arguments: ran.append((name, arguments)) or 0)
    given = ("--rounds", "2", "HEAD~1", "--", "--op", "adain")
    assert CliRunner().invoke(main, ["bench", "compare", *given]).exit_code == 0
    assert ran == [("compare", given)]


def test_bench_without_sources(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    result = CliRunner().invoke(main, ["bench", "steps"])
    assert result.exit_code == 2
    assert result.output.startswith("gankern: bench: ")
    assert "in a clone" in result.output
    assert result.output.count("\n") == 1


def test_every_script_of_bench_exists() -> None:
    assert [n for n in bench.SCRIPTS if not (ROOT / f"benchmarks/{n}.py").exists()] == []


# --- Launches and bytes.


def traced(f) -> launches.Counts:
    with launches.Trace() as trace:
        f()
    return trace.counts


def test_trace_counts_kernels_and_bytes() -> None:
    x, row = torch.zeros(2, 3, 8, 8), torch.zeros(3)

    def step():
        y = x + row.reshape(-1, 1, 1)  # reads 384 + 3 numbers, writes 384
        torch.nn.functional.pad(y.transpose(2, 3), [1, 1])  # fills 480, copies 384
        x.expand(2, 2, 3, 8, 8).sum()  # reads x once

    counts = traced(step)
    found = {op: (c.launches, c.bytes) for op, c in counts.by_op.items()}
    assert found == {
        "aten::add": (1, 4 * (384 + 3 + 384)),
        "aten::constant_pad_nd": (2, 4 * (384 + 480 + 384)),
        "aten::sum": (1, 4 * (384 + 1)),
    }
    assert counts.total.launches == 4
    assert set(counts.by_level) == {"b8"}


def test_trace_tells_dense_convolutions_from_filters() -> None:
    x, w, f = torch.zeros(1, 4, 6, 6), torch.zeros(4, 4, 3, 3), torch.zeros(4, 1, 3, 3)
    dense = traced(lambda: torch.conv2d(x, w)).total
    assert (dense.launches, dense.bytes, dense.dense) == (1, 0, 1)
    thin = traced(lambda: torch.conv2d(x, f, groups=4)).total
    assert (thin.launches, thin.bytes, thin.dense) == (1, 4 * (144 + 36 + 64), 0)
    unasked = traced(lambda: torch.conv2d(x, w[:1]))
    assert (unasked.unasked, unasked.total.launches) == (1, 0)


def test_relaid_finds_images_that_are_copied() -> None:
    x = torch.zeros(2, 3, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert launches.relaid([x, torch.zeros(3)]) == []
    assert launches.relaid([last, last.clone()]) == []
    assert launches.relaid([x, last]) == [last]
    assert len(launches.relaid([x[..., ::2]])) == 1


def test_traffic_factor_is_the_budgets_worst(monkeypatch, tmp_path) -> None:
    budget = {
        "upfirdn2d blur forward f32 nchw": [1.1, 1, 1, 1],
        "upfirdn2d up 2 backward f32 nchw": [1.2, 1, 1, 1],
        "upfirdn2d up 2, 12 taps forward f32 nchw": [9, 1, 1, 1],
        "synthesis_epilogue up 2 forward f32 nchw": [1.4, 1, 1, 1],
        "synthesis_epilogue forward f32 nchw": [1.3, 1, 1, 1],
        "bias_act lrelu backward f16 nchw": [1.5, 1, 1, 1],
    }
    (tmp_path / "budget.json").write_text(json.dumps(budget))
    monkeypatch.setattr(launches, "TRAFFIC", tmp_path / "budget.json")
    factor = launches.traffic_factor.__wrapped__
    assert factor("upfirdn2d", False, False, "f32", "nchw") == 1.2
    assert factor("synthesis_epilogue", False, True, "f32", "nchw") == 1.4
    assert factor("synthesis_epilogue", False, False, "f32", "nchw") == 1.3
    assert factor("bias_act", True, False, "f16", "nchw") == 1.5
    assert factor("bias_act", False, False, "f16", "nchw") == 1.0


@needs_cpu
def test_bars_of_stylegan2_256() -> None:
    pairs = launches.count_steps("stylegan2-256", list(launches.STEPS), 8, "f32")
    assert launches.missed(pairs) == []
    assert pairs["training"][1].total.bytes > 50e9
    assert all(a.total.dense <= 1.03 * b.total.dense for a, b in pairs.values())
    half = launches.count_steps("stylegan2-256", ["generate", "PL"], 8, "f16")
    assert launches.missed(half) == []


def test_tables() -> None:
    pair = launches.Counts(), launches.Counts()
    for counts, n in zip(pair, (1, 4), strict=True):
        counts.by_op["aten::mul"] = launches.Count(n, 2e6 * n, 0)
        counts.by_op["aten::neg"] = launches.Count(n, 1.0, 0)
    rows = launches.detail_table(pair, "op", least=1e6)
    assert rows[1] == ["aten::mul", "1", "4", "2.0", "8.0"]
    assert rows[2] == ["others", "1", "4", "0.0", "0.0"]
    assert launches.missed({"G": pair}) == []
    assert launches.missed({"G": pair[::-1]}) == ["G: 400.0% of the launches, wanted 50%"]
    assert launches.markdown(rows[:2]).splitlines()[1] == "| --- | ---: | ---: | ---: | ---: |"


# --- Overhead.


@needs_cpu
@pytest.mark.parametrize("name", [name for name in overhead.CALLS if name != overhead.PAIR])
def test_ops_allocate_their_outputs_alone(name) -> None:
    shapes, call = overhead.CALLS[name]
    inputs = [torch.rand(4, *shape[1:]) if len(shape) > 1 else torch.rand(1) for shape in shapes]
    if name == "demod_coefs":
        inputs = [torch.rand(8, 8, 3, 3), torch.rand(4, 8)]
    # What the gradient needs besides is an output of the registered operation: adain's mean and
    # 1 / deviation, the squares of demod_coefs. So is the epilogue's gradient of its noise.
    outputs = {"adain": 3, "demod_coefs": 2}.get(name, 1)
    with torch.no_grad():
        assert len(overhead.allocations(lambda: call(*inputs, impl="cpu"))) == outputs
    leaves = [t.requires_grad_() for t in inputs]
    y = call(*leaves, impl="cpu")
    dy = torch.rand_like(y)
    backward = overhead.allocations(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))
    assert len(backward) <= len(leaves) + (name == "synthesis_epilogue")


def test_beyond_outputs() -> None:
    x = torch.rand(64)
    assert overhead.beyond_outputs(lambda: x + x) == 0
    assert overhead.beyond_outputs(lambda: x * x + x) == 256


@needs_cpu
def test_overhead_rows() -> None:
    names = ["bias_act"]
    pair, row = overhead.results(names, "cpu", "cpu", rounds=1)
    assert pair["op"] == overhead.PAIR
    assert pair["forward ratio"] == 1
    assert row["forward ratio"] == pytest.approx(row["forward"] / pair["forward"])
    assert (row["allocations"], row["beyond"]) == (1, 0)


def test_ops_named_in_overhead_are_all_registered_ones() -> None:
    composed = {"conv2d_layer", "conv2d_resample", "modulated_conv2d", "synthesis_layer"}
    composed |= {"modulated_gemm"}  # synthesis_layer, unless impl names its kernel
    resampling = {"downsample2d", "filter2d", "setup_filter", "upsample2d"}
    assert set(ops.__all__) - composed - resampling == set(overhead.CALLS) - {overhead.PAIR}


# --- Predicted.


def test_prediction_is_bytes_over_bandwidth() -> None:
    row = next(r for r in predicted.ROWS if r.op == "bias_act")
    gpu = predicted.Gpu("sm_90", bandwidth=1e12, processors=100, clock=1e9)
    work = predicted.Work(row, "forward", {"forward": 1e9}, (1,))
    assert predicted.least_seconds(work, gpu, {}) == (1e-3 + predicted.LAUNCH, "bytes")
    # 8 instructions a byte: 2.5e8 of a warp, at 4e11 a second.
    seconds, bound = predicted.least_seconds(work, gpu, {"forward": 8.0})
    assert seconds == pytest.approx(1e-3 + predicted.LAUNCH)
    seconds, bound = predicted.least_seconds(work, gpu, {"forward": 16.0})
    assert (seconds, bound) == (pytest.approx(1.25e-3 + predicted.LAUNCH), "instructions")
    small = predicted.Work(row, "forward", {"forward": 1e3}, (1,))
    assert predicted.least_seconds(small, gpu, {})[1] == "launch"


def test_density_is_the_least_of_an_ops_kernels() -> None:
    def kernel(name, instructions, arch="sm_90"):
        code = sass.Code(instructions=instructions)
        code.loads[16], code.stores[16] = 2, 1
        return sass.Kernel("bias_act", name, arch, 32, 0, 0, 256, code)

    kernels = [
        kernel("bias_act_rows_kernel<0, true, float, 4>", 96),
        kernel("bias_act_rows_kernel<0, false, float, 4>", 192),
        kernel("bias_act_rows_kernel<0, true, Half16, 8>", 48),
        kernel("bias_act_rows_kernel<1, true, float, 4>", 480),
        kernel("bias_act_rows_kernel<0, true, float, 4>", 9, "sm_80"),
    ]
    assert predicted.density(kernels, "bias_act", "forward", "f32", "sm_90") == 2
    assert predicted.density(kernels, "bias_act", "forward", "f16", "sm_90") == 1
    assert predicted.density(kernels, "bias_act", "forward", "bf16", "sm_90") == 1
    assert predicted.density(kernels, "bias_act", "backward", "f32", "sm_90") == 10
    assert predicted.density(kernels, "adain", "forward", "f32", "sm_90") == 0


def test_predictions_of_all_ops() -> None:
    found = list(predicted.predictions(["A100", "H200"], "64", "f32", False, []))
    assert len(found) == 2 * len(predicted.ROWS)
    first = found[0]
    # bias_act reads and writes 8 x 256 x 64 x 64 numbers, and reads the bias.
    assert first["mb"] == pytest.approx((2 * 8 * 256 * 64 * 64 + 256) * 4 / 1e6, rel=0.01)
    for result in found:
        assert result["predicted_us"]["A100"] >= result["predicted_us"]["H200"] >= 2
    rows = predicted.table(found, ["A100", "H200"])
    assert rows[0][4:] == ["A100, us", "H200, us", "bound"]
    assert len(rows) == 1 + len(found)
    assert predicted.bound({"A100": "bytes", "H200": "bytes"}) == "bytes"
    assert predicted.bound({"A100": "bytes", "H200": "x"}) == "bytes: A100; x: H200"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_measured_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        predicted.here()
