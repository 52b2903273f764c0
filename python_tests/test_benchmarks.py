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
    assert set(counts.by_level) == {"8x8"}


def test_level_is_of_the_largest_image() -> None:
    image, odd = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 33, 33)
    assert launches.level([torch.zeros(9, 9, 3, 3), image, odd]) == "32x32"
    assert launches.level([torch.zeros(4, 2, 1, 8192), torch.zeros(8, 512)]) == launches.NO_IMAGE


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


def test_trace_counts_fills_of_counters() -> None:
    few, many = torch.zeros(8, 512), torch.zeros(64, 512)
    image = torch.zeros(8, 64, 32, 32)
    rest = (1, 0, 0.0, 1.0, -1.0, False)
    for ref, needs_db, fills in ((few, True, 0), (many, True, 1), (image, True, 1),
                                 (many, False, 0)):  # fmt: skip
        assert launches.fills("bias_act_bwd", (ref, ref, None, *rest, needs_db)) == fills
    assert launches.fills("synthesis_epilogue_bwd", ()) == 1
    assert launches.fills("synthesis_epilogue", ()) == 0
    # PyTorch's own, where blocks are sure to share a sum.
    big = torch.zeros(1, device="meta").expand(4, 2**17)
    assert traced(lambda: big.sum(1)).total.launches == 2
    assert traced(lambda: big.mean()).total.launches == 2
    assert traced(lambda: big.sum(0)).total.launches == 1


def test_every_kernel_that_clears_counters_is_known() -> None:
    """Where a fill is new, launches.fills() must count it."""
    kernels = ROOT / "csrc/kernels"
    clearing = {path.name for path in kernels.iterdir() if "cudaMemset" in path.read_text()}
    assert clearing == {
        "bias_act.cu", "minibatch_stddev.cu", "norm_launch.cuh", "synthesis_epilogue.cu"
    }  # fmt: skip
    # That of norm_launch.cuh is for groups of blocks, which pixel_norm has not.
    assert "kGroupBytes = 0" in (kernels / "pixel_norm.cu").read_text()


def test_gradients_of_few_rows_need_no_scratch() -> None:
    import simt_build

    workspace = simt_build.kernels().bias_act_bwd_workspace
    for dtype in range(3):  # float32, float16, bfloat16
        assert all(workspace(dtype, n, C, 1) == 0 for n in (1, 8, 32) for C in (8, 24, 512, 8192))
        assert workspace(dtype, 8, 64, 256 * 256) > 0


@pytest.fixture(scope="module")
def stylegan2_256() -> dict[str, dict[str, launches.Pair]]:
    steps = list(launches.MODELS["stylegan2-256"][1])
    return {d: launches.count_steps("stylegan2-256", steps, 8, d) for d in ("f32", "f16")}


@needs_cpu
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_bars_of_stylegan2_256(stylegan2_256, dtype) -> None:
    pairs = stylegan2_256[dtype]
    assert launches.missed(pairs) == []
    assert pairs["training"][1].total.bytes > 50e9
    assert all(a.total.dense <= 1.03 * b.total.dense for a, b in pairs.values())


@needs_cpu
def test_document_of_launches_is_as_the_code_counts(stylegan2_256, monkeypatch) -> None:
    monkeypatch.setattr(launches, "count_steps", lambda name, steps, batch, d: stylegan2_256[d])
    assert launches.DOCS.read_text() == launches.document(8)


@needs_cpu
def test_launches_as_json(stylegan2_256) -> None:
    pairs = {"G": stylegan2_256["f32"]["G"]}
    ours, reference = map(json.loads, launches.json_lines(pairs, {"machine": "M"}))
    assert (ours["machine"], ours["kind"], ours["step"], ours["impl"]) == (
        "M", "counted", "G", "ours"
    )  # fmt: skip
    assert ours["launches"] < reference["launches"]
    assert ours["bytes"] == pairs["G"][0].total.bytes


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
@pytest.mark.parametrize("name", list(overhead.CALLS))
def test_ops_allocate_their_outputs_alone(name) -> None:
    shapes, call = overhead.CALLS[name]
    inputs = [torch.rand(4, *shape[1:]) if len(shape) > 1 else torch.rand(1) for shape in shapes]
    if name == "demod_coefs":
        inputs = [torch.rand(8, 8, 3, 3), torch.rand(4, 8)]
    # What the gradient needs besides is an output of the registered operation: adain's mean and
    # 1 / deviation, the squares of demod_coefs. So is the epilogue's gradient of its noise.
    outputs = {"adain": 2, "demod_coefs": 2}.get(name, 1)
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


def test_overhead_combines_processes() -> None:
    ways = overhead.WAYS
    runs = [
        [dict.fromkeys(ways, us) | dict.fromkeys([f"{w} ratio" for w in ways], ratio)]
        for us, ratio in ((1.0, 0.9), (3.0, 1.1), (2.0, 0.5))
    ]
    (row,) = overhead.combined(runs)
    assert (row["recorded"], row["recorded ratio"]) == (2.0, 0.9)
    assert row["recorded ratios"] == [0.9, 1.1, 0.5]
    assert overhead.least_to_largest(row["recorded ratios"]) == "0.50-1.10"


@needs_cpu
def test_overhead_in_fresh_processes() -> None:
    pair, row = overhead.of_processes(["pixel_norm"], "cpu", "cpu", rounds=1, processes=2)
    assert pair["forward ratios"] == [1, 1]
    assert row["op"] == "pixel_norm"
    assert len(row["forward+backward ratios"]) == 2


def test_ops_named_in_overhead_are_all_registered_ones() -> None:
    composed = {"conv2d_layer", "conv2d_resample", "modulated_conv2d", "synthesis_layer"}
    composed |= {"modulated_gemm"}  # synthesis_layer, unless impl names its kernel
    resampling = {"downsample2d", "filter2d", "setup_filter", "upsample2d"}
    others = composed | resampling | {"no_weight_gradients"}
    assert set(ops.__all__) - others == set(overhead.CALLS)


# --- Predicted.


def test_gpu_by_the_name_of_the_driver() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA A100-SXM4-40GB": "",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "",
        "NVIDIA H200": "H200",
        "NVIDIA GH200 480GB": "",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA GeForce RTX 4090 D": "",
    }
    assert {name: predicted.gpu_of(name) for name in names} == names


def test_prediction_is_bytes_over_bandwidth() -> None:
    row = next(r for r in predicted.rows_of("64") if r.op == "bias_act")
    gpu = predicted.Gpu("a GPU", "sm_90", bandwidth=1e12, processors=100, clock=1e9)
    work = predicted.Work(row, "forward", {"forward": 1e9}, {"forward": 1}, (1,))
    assert predicted.least_seconds(work, gpu, {}) == (1e-3 + predicted.LAUNCH, "bytes")
    # 8 instructions a byte: 2.5e8 of a warp, at 4e11 a second.
    seconds, bound = predicted.least_seconds(work, gpu, {"forward": 8.0})
    assert seconds == pytest.approx(1e-3 + predicted.LAUNCH)
    seconds, bound = predicted.least_seconds(work, gpu, {"forward": 16.0})
    assert (seconds, bound) == (pytest.approx(1.25e-3 + predicted.LAUNCH), "instructions")
    small = predicted.Work(row, "forward", {"forward": 1e3}, {"forward": 3}, (1,))
    seconds, bound = predicted.least_seconds(small, gpu, {})
    assert (seconds, bound) == (pytest.approx(1e-9 + 3 * predicted.LAUNCH), "launch")


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
    assert len(found) == 2 * len(predicted.rows_of("64"))
    first = found[0]
    # bias_act reads and writes 8 x 256 x 64 x 64 numbers, and reads the bias.
    assert first["mb"] == pytest.approx((2 * 8 * 256 * 64 * 64 + 256) * 4 / 1e6, rel=0.01)
    for result in found:
        assert result["predicted_us"]["A100"] >= result["predicted_us"]["H200"] >= 2
    assert [result["launches"] for result in found] == [1, 2] * len(predicted.rows_of("64"))
    assert first["instructions"] == {}  # no compiled library
    rows = predicted.table(found, ["A100", "H200"])
    assert rows[0][4:] == ["M instructions", "launches", "A100, us", "H200, us", "bound"]
    assert rows[1][4:6] == ["-", "1"]
    assert len(rows) == 1 + len(found)
    assert predicted.millions([2e6, 1.5e6, 1.8e6]) == "1.5 to 2.0"
    assert predicted.millions([2e6, 2e6]) == "2.0"
    dcgan = {r["op"] for r in predicted.predictions(["A100"], "dcgan-64", "f32", False, [])}
    assert dcgan == {"bias_act"}
    assert predicted.bound({"A100": "bytes", "H200": "bytes"}) == "bytes"
    assert predicted.bound({"A100": "bytes", "H200": "x"}) == "bytes: A100; x: H200"


def test_instructions_are_of_all_threads() -> None:
    code = sass.Code(instructions=48)
    code.loads[16], code.stores[16] = 1, 1
    kernel = sass.Kernel("bias_act", "bias_act_rows_kernel<0>", "sm_80", 32, 0, 0, 256, code)
    found = next(iter(predicted.predictions(["A100", "H100"], "64", "f32", False, [kernel])))
    assert found["instructions"] == {"A100": pytest.approx(1.5e6 * found["mb"])}


@needs_cpu
def test_measured_is_a_call_of_a_graph(monkeypatch) -> None:
    calls = []

    def captured(f):
        return lambda: [calls.append(f()) for _ in range(predicted.ops.GRAPH_CALLS)]

    monkeypatch.setattr(predicted.ops, "captured", captured)
    monkeypatch.setattr(
        predicted.ops, "measure", lambda steps, rounds, device: {"": [steps[""]() and 8e-6]}
    )
    result = {"op": "bias_act", "case": "lrelu", "what": "forward+backward", "dtype": "f32",
              "channels_last": False}  # fmt: skip
    assert predicted.measured_us(result, "quick", "cpu") == pytest.approx(1)
    assert len(calls) == predicted.ops.GRAPH_CALLS
    assert len(calls[0]) == 2  # dx and db


def test_measured_goes_on_where_the_gpu_is_another(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(sys, "argv", ["predicted.py", "--measured"])
    assert predicted.main() == 0
    assert capsys.readouterr().out.startswith("predicted: NVIDIA L4 is not in the table; known")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert predicted.here() == "H100"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_measured_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        predicted.here()
