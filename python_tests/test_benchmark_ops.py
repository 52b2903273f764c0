"""benchmarks/ops.py and steps.py: what they check before they time, and what they count."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks/ops.py").exists():
    pytest.skip("needs the source tree, for benchmarks/", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import ops  # noqa: E402
import steps  # noqa: E402

ROWS = ops.rows_of("quick")
IDS = [f"{row.name}-{i}" for i, row in enumerate(ROWS)]


def inputs_of(row: ops.Row, dtype: torch.dtype = torch.float32, last: bool = False) -> list:
    batch, *shape = ops.SHAPES["quick"]
    return row.make(ops.Make(batch, dtype, "cpu", last), *shape)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_check_passes(row, dtype, last) -> None:
    ops.check(row, inputs_of(row, dtype, last), "cpu")


@pytest.mark.parametrize("way", ops.WAYS)
def test_check_sees_each_way_go_wrong(way) -> None:
    """An implementation that is off in one of the ways alone."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, impl):
            ctx.impl = impl
            ctx.save_for_backward(x)
            return x**3 * (1.01 if (impl, way) == ("cpu", ops.WAYS[0]) else 1)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            off = 1.01 if (ctx.impl, way) == ("cpu", ops.WAYS[1]) else 1
            if (ctx.impl, way) == ("cpu", ops.WAYS[2]):
                return 3 * x * x.detach() * dy, None  # right, but half of its slope
            return 3 * x**2 * dy * off, None

    row = ops.Row("cubed", "", lambda m, res, c: [m(c, res, res)],
                  lambda x, impl: Off.apply(x, impl), "x")  # fmt: skip
    wanted = {"forward": "cpu: error", "forward+backward": "cpu: gradient 0",
              "double-backward": "cpu: second gradient"}[way]  # fmt: skip
    with pytest.raises(ops.WrongResultError, match=wanted):
        ops.check(row, inputs_of(row), "cpu")


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_reference_compiles_whole(monkeypatch, row) -> None:
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, **how, backend="eager"))
    ops.compiled_step(row, inputs_of(row), None)()


def test_results_have_every_way_and_bytes_where_they_are_known() -> None:
    row = next(row for row in ROWS if row.name == "bias_act lrelu")
    batch, *shape = ops.SHAPES["quick"]
    make = ops.Make(batch, torch.float32, "cpu")
    found = list(ops.results(row, make, (shape[0], shape[1]), ["cpu"], 1, False))
    ways = Counter(result["what"] for result in found)
    assert ways == dict.fromkeys(ops.WAYS, 2)
    assert all((r["gb_s"] is None) == (r["what"] == ops.WAYS[2]) for r in found)


def test_a_row_that_fails_is_told_and_the_others_are_timed(monkeypatch, capsys, tmp_path) -> None:
    """A wrong result, a column that does not run, a row that the reference cannot run."""

    def call(x, b, impl):
        y = x * b[:, None, None]
        if impl == "cpu":
            raise RuntimeError("out of memory\nand more")
        return y

    def wrong(x, impl):
        return x + (impl == "cpu")

    def never(x, impl):
        raise ValueError("never")

    rows = [
        ops.Row("pixel_norm", name, make, f, "x")
        for name, make, f in (
            ("raises", lambda m, res, c: [m(c, res, res), m.vector(c)], call),
            ("differs", lambda m, res, c: [m(c, res, res)], wrong),
            ("never", lambda m, res, c: [m(c, res, res)], never),
            ("right", lambda m, res, c: [m(c, res, res)], lambda x, impl: x * x),
        )
    ]
    monkeypatch.setattr(ops, "rows_of", lambda shapes: rows)
    file = tmp_path / "ops.jsonl"
    argv = ["ops.py", "--quick", "--device=cpu", "--way", "forward", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", argv)
    assert ops.main() == 1
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["case"], r["impl"]) for r in found] == [
        ("raises", "reference"), ("differs", "reference"), ("right", "reference"), ("right", "cpu"),
    ]  # fmt: skip
    where = "of quick, f32, nchw"
    assert capsys.readouterr().err.splitlines() == [
        f"ops: pixel_norm raises {where}: RuntimeError: out of memory",
        f"ops: pixel_norm differs {where}: WrongResultError: cpu: error 1 over 2.92e-05",
        f"ops: pixel_norm never {where}: ValueError: never",
    ]


def test_a_step_that_fails_is_told_and_the_others_are_timed(monkeypatch, capsys) -> None:
    """A column that does not run, and a step."""

    class Fails(torch.nn.Module):
        def forward(self, *inputs):
            raise RuntimeError("no compiler\nat all")

    def step_D(model):
        raise RuntimeError("too large")

    monkeypatch.setattr(torch, "compile", lambda net, **how: Fails())
    monkeypatch.setattr(steps.Model, "step_D", step_D)
    failed: list[str] = []
    clock = time.perf_counter
    found = list(steps.rows("gan-28", ["G", "D"], 2, 1, True, False, "cpu", clock, failed))
    assert [(r["step"], r["impl"]) for r in found] == [
        ("G", "ours"), ("G", "reference"), ("G", "floor"),
    ]  # fmt: skip
    assert failed == [
        "gan-28 G: compile: RuntimeError: no compiler", "gan-28 D: RuntimeError: too large",
    ]  # fmt: skip
    assert capsys.readouterr().err.splitlines() == [f"steps: {line}" for line in failed]
    monkeypatch.setitem(steps.MODELS, "gan-28", (lambda: step_D(None), ("G", "D")))
    failed.clear()
    assert not list(steps.rows("gan-28", ["G"], 2, 1, False, False, "cpu", clock, failed))
    assert failed == ["gan-28: RuntimeError: too large"]


def test_a_step_that_fails_leaves_the_model_as_it_was() -> None:
    model = steps.model_of("gan-28", 2, "cpu")

    def g(logits):
        logits.sum().backward()
        raise RuntimeError("too large")

    model.loss = model.loss._replace(g=g)
    with pytest.raises(RuntimeError, match="too large"):
        model.run("G")
    parameters = [*model.G.parameters(), *model.D.parameters()]
    assert all(p.requires_grad and p.grad is None for p in parameters)


def test_floor_is_the_dense_convolutions_alone() -> None:
    x, w = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3, requires_grad=True)
    f = torch.ones(4, 1, 2, 2)
    with steps.Recorder() as recorder:
        y = torch.conv2d(torch.conv2d(x, f, groups=4), w)
        y.sum().backward()
        torch.conv2d(torch.randn(1, 2, 9, 9), torch.randn(1, 2, 8, 8))  # a filter's gradient
        torch.randn(3, 4) @ torch.randn(4, 5)
    names = Counter(func.name() for func, _ in recorder.calls.elements())
    assert names == {"aten::convolution": 1, "aten::convolution_backward": 1, "aten::mm": 1}


def test_parts_of_a_step() -> None:
    dense, thin = [[2, 4, 8, 8], [6, 4, 3, 3]], [[2, 4, 8, 8], [4, 1, 3, 3]]
    assert steps.part_of("aten::mkldnn_convolution", dense) == "convolutions"
    assert steps.part_of("aten::mkldnn_convolution", thin) == "filters"
    backward = [[2, 6, 6, 6], *dense]
    assert steps.part_of("aten::convolution_backward", backward) == "convolutions"
    assert steps.part_of("gankern::convolution_few", []) == "convolutions"
    assert steps.part_of("gankern::upfirdn2d", []) == "filters"
    assert steps.part_of("gankern::synthesis_epilogue_bwd", []) == "fused kernels"
    assert steps.part_of("aten::addmm", []) == "matrix products"
    assert steps.part_of("aten::copy_", []) == "copies"
    assert steps.part_of("aten::mul", []) == "other operations"
    assert steps.part_of("_EpilogueBackward", []) == "between them"
    net = torch.nn.Linear(64, 64)
    found = steps.parts(lambda: net(torch.randn(256, 64)), "cpu", 2)
    assert set(found) == set(steps.PARTS)
    assert found["matrix products"] > 0


@pytest.mark.parametrize("name", ["gan-28", "cgan-32", "wgan-gp-64"])
def test_steps_of_a_model(name) -> None:
    """Each gives gradients of its own network alone, and clears them."""
    model = steps.model_of(name, 2, "cpu")
    assert bool(model.c) == (name == "cgan-32")
    for step in steps.MODELS[name][1]:
        trained = model.G if step == "G" else model.D
        found = []
        handles = [
            p.register_post_accumulate_grad_hook(found.append)
            for net in (model.G, model.D)
            for p in net.parameters()
        ]
        model.run(step)
        for handle in handles:
            handle.remove()
        own = {id(p) for p in trained.parameters()}
        assert found
        assert {id(p) for p in found} <= own
        assert all(p.grad is None for p in trained.parameters())
