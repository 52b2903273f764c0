"""Batch normalisation with its activation, the CPU's kernels: against PyTorch's, every order."""

from __future__ import annotations

import copy
import functools
import sys

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, LAYOUTS, compare, lay_out, outputs_and_grads, randn, second_grads

from gankern.nn import BatchNorm
from gankern.ops import _impl, _remember
from gankern.ops.batch_norm_act import batch_norm_act, batch_norm_then_act

pytestmark = pytest.mark.skipif(
    bool(_impl.LIBRARIES["cpu"]), reason=f"no CPU library: {_impl.LIBRARIES['cpu']}"
)
ACTS = {"linear": (None, None), "relu": (None, 1), "lrelu": (0.2, 1), "lrelu gain": (-0.5, 3)}
SHAPES = {
    "features": (64, 5),
    "sequence": (7, 33, 12),
    "odd": (3, 18, 5, 7),
    "small": (8, 96, 4, 4),
    "tiles": (4, 80, 9, 11),  # channels-last: whole tiles, a vector, one share
    "shares": (5, 70, 41, 23),  # several, the last of other rows
    "planes": (40, 3, 16, 16),  # more than is summed in vectors
    "one channel": (6, 1, 9, 10),
    "one pixel": (50, 20, 1, 1),
    "video": (2, 6, 3, 4, 5),
}


def inputs(shape, dtype=torch.float32, layout="contiguous"):
    """x, weight and bias."""
    parameters = torch.promote_types(dtype, torch.float32)
    x = lay_out((randn(*shape) * 2 + 0.5).to(dtype), layout)
    weight, bias = (randn(shape[1], seed=s).to(parameters) for s in (1, 2))
    return [x, weight + 1, bias]


def averages(x, weight):
    return torch.zeros_like(weight), torch.ones_like(weight)


def ours(x, weight, bias, act="lrelu", eps=1e-5):
    args = *averages(x, weight), eps, 0.1, act.split()[0], *ACTS[act]
    return batch_norm_act(x, weight, bias, *args, impl="cpu")


def theirs(x, weight, bias, act="lrelu", eps=1e-5):
    """PyTorch's formulas; its own kernel loses digits in channels-last memory."""
    axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    y = x.to(weight.dtype)
    y = y - y.mean(axes, keepdim=True)
    y = y * (y.square().mean(axes, keepdim=True) + eps).rsqrt()
    y = (y * weight.view(shape) + bias.view(shape)).to(x.dtype)
    alpha, gain = ACTS[act]
    below = {"linear": 1.0, "relu": 0.0}.get(act, alpha)
    return torch.where(y > 0, y, y * below) * (1 if gain is None else gain)


@pytest.mark.parametrize("isa", [0, 1, 2], ids=["base", "avx2", "avx512"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(dtype, shape, layout, isa):
    tensors = inputs(SHAPES[shape], DTYPES[dtype], layout)
    roundings = 8 if dtype == "f64" else 4  # sums of up to 10,240 values
    try:
        if _impl.set_cpu_isa(isa) != isa:
            pytest.skip("this machine lacks the instruction set")
        for act in ACTS if shape == "odd" else ("lrelu",):
            f = functools.partial(ours, act=act)
            reference = functools.partial(theirs, act=act)
            y, dx, *_ = compare(f, reference, tensors, what=act, roundings=roundings)
            with torch.no_grad():
                assert torch.equal(f(*tensors), y)
    finally:
        _impl.set_cpu_isa(-1)
    if layout != "strided":
        assert y.stride() == dx.stride() == tensors[0].stride()


@pytest.mark.parametrize("order", harness.ORDERS[1:])
def test_any_dense_order(order):
    shape = (3, 18, 5, 7) if len(order) == 4 else (2, 6, 3, 4, 5)
    x, weight, bias = inputs(shape)
    y, *_ = compare(ours, theirs, [harness.in_order(x, order), weight, bias])
    assert y.stride() == harness.in_order(x, order).stride()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", ["odd", "shares", "planes"])
def test_large_mean(shape, layout):
    """Nothing cancels, though a mean is a thousand deviations."""
    x, weight, bias = inputs(SHAPES[shape], layout=layout)
    f = functools.partial(ours, act="linear")
    compare(f, functools.partial(theirs, act="linear"), [x + 2000, weight, bias])


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_second_gradients(layout):
    for act in ACTS:
        f, reference = (functools.partial(g, act=act) for g in (ours, theirs))
        compare(f, reference, inputs(SHAPES["odd"], layout=layout), second_grads, act)


def test_gradcheck():
    for act in ACTS:
        f = functools.partial(ours, act=act)
        for shape in ((5, 3), (3, 2, 2, 3)):
            tensors = [t.requires_grad_() for t in inputs(shape, torch.float64)]
            assert torch.autograd.gradcheck(f, tensors)
            assert torch.autograd.gradgradcheck(f, tensors)


def test_a_recorded_gradient_is_that_of_the_kernel():
    tensors = inputs(SHAPES["odd"], torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    dy = randn(*SHAPES["odd"], seed=3)
    kernel = torch.autograd.grad(ours(*leaves), leaves, dy)
    recorded = torch.autograd.grad(ours(*leaves), leaves, dy, create_graph=True)
    torch.testing.assert_close(recorded, kernel)


@pytest.mark.parametrize("act", ["linear", "relu", "lrelu"])
@pytest.mark.parametrize("shape", [(6, 3), (4, 18, 5, 2)])
def test_is_torchs_module(shape, act):
    """y and running averages, in training and evaluation."""
    module = BatchNorm(shape[1], 1e-3, 0.3, act, gain=1).double()
    reference = (nn_of(shape))(shape[1], 1e-3, 0.3).double()
    of = {"linear": lambda y: y, "relu": F.relu, "lrelu": lambda y: F.leaky_relu(y, 0.2)}[act]
    for seed in range(3):
        x = randn(*shape, seed=seed) * 3 + 1
        torch.testing.assert_close(module(x), of(reference(x)))
    torch.testing.assert_close(module.running_mean, reference.running_mean)
    torch.testing.assert_close(module.running_var, reference.running_var)
    torch.testing.assert_close(module.eval()(x), of(reference.eval()(x)))


def nn_of(shape):
    return torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d


def test_the_kernel_runs_in_a_module():
    """In training with one dtype of parameters; else PyTorch's, with the same results."""
    names = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    x, module = inputs(SHAPES["odd"])[0], BatchNorm(18, act="relu")
    for m, t, wanted in (
        (module, x, True),
        (copy.deepcopy(module).half(), x.half(), False),
        (copy.deepcopy(module).eval(), x, False),
        (BatchNorm(18, act="tanh"), x, False),
    ):
        names.clear()
        with Names():
            y = m(t)
        assert ("gankern::batch_norm_act" in names) == wanted, names
        assert y.dtype == t.dtype


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_remembered(monkeypatch, layout):
    """The same bits as by Python, and each call counts once in the averages."""
    if _remember.why_not():
        pytest.skip(_remember.why_not())
    module = sys.modules["gankern.ops.batch_norm_act"]
    in_python = []
    backward = module._BatchNormAct.backward
    monkeypatch.setattr(
        module._BatchNormAct,
        "backward",
        staticmethod(lambda *args: in_python.append(1) or backward(*args)),
    )
    x, weight, bias = inputs(SHAPES["odd"], layout=layout)
    dy = torch.empty_like(x).copy_(randn(*x.shape, seed=3))

    def calls(quick):
        monkeypatch.setattr(module, "_quick", quick)
        means, found = averages(x, weight), []
        for _ in range(5):
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            y = batch_norm_act(*leaves, *means, act="lrelu", gain=1)
            in_python.clear()
            found += [y, *torch.autograd.grad(y, leaves, dy), *map(torch.clone, means)]
            with torch.no_grad():
                found.append(batch_norm_act(*leaves, *means, act="lrelu", gain=1))
        return found

    quick = module._quick.again()
    expected = calls(module._call)
    assert all(map(torch.equal, calls(quick), expected))
    assert quick.hits >= 6
    assert not in_python


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_any_number_of_threads(layout):
    tensors = inputs(SHAPES["shares"], layout=layout)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(outputs_and_grads(ours, tensors))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_what_is_not_finite_stays_in_its_channel(layout):
    x, weight, bias = inputs(SHAPES["odd"], layout=layout)
    clean = outputs_and_grads(ours, [x, weight, bias])
    x[1, 4, 2, 3] = float("nan")
    x[2, 17, 0, 0] = float("inf")
    y, dx, dw, db = outputs_and_grads(ours, [x, weight, bias])
    others = [c for c in range(18) if c not in (4, 17)]
    for t, u in zip((y, dx), clean, strict=False):
        assert t[:, [4, 17]].isnan().all()
        assert torch.equal(t[:, others], u[:, others])
    assert torch.equal(dw[others], clean[2][others])
    assert torch.equal(db[others], clean[3][others])


def test_of_one_value():
    """0 times an infinity is 0 where relu says so; a constant channel is its bias."""
    x = torch.ones(4, 2, 3, 3)
    y = ours(x, torch.ones(2), torch.tensor([-float("inf"), 2.0]), act="relu")
    assert torch.equal(y[:, 0], torch.zeros(4, 3, 3))
    assert torch.equal(y[:, 1], torch.full((4, 3, 3), 2.0))


def test_opcheck():
    for layout in (*LAYOUTS[:2], "sliced"):
        x, weight, bias = inputs(SHAPES["odd"], layout=layout)
        args = (x, weight, bias, *averages(x, weight), 1e-5, 0.1, 2, 0.2, 1.0)
        # Without aot_dispatch: it takes an op that writes its arguments for one with a gradient.
        torch.library.opcheck(
            torch.ops.gankern.batch_norm_act.default, args,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip
        _, statistics = torch.ops.gankern.batch_norm_act(*args)
        args = (torch.randn_like(x), x, weight, bias, statistics, 2, 0.2, 1.0)
        harness.opcheck(torch.ops.gankern.batch_norm_act_bwd.default, args)


def test_traced_and_exported():
    """By PyTorch's operations, which compilers fuse themselves; running averages too."""
    x = inputs(SHAPES["odd"])[0]
    module = BatchNorm(18, act="lrelu", gain=1)
    other = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), other(x))
    torch.testing.assert_close(module.running_var, other.running_var)
    module.eval(), other.eval()
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), other(x))


def test_transforms():
    x, weight, bias = inputs(SHAPES["odd"])
    means = averages(x, weight)

    def f(x):
        return batch_norm_act(x, weight, bias, *map(torch.clone, means), 1e-5, 0.1, "relu", gain=1)

    dy = torch.randn_like(x)
    _, tangent = torch.func.jvp(f, (x,), (dy,))
    _, expected = torch.autograd.functional.jvp(f, x, dy)
    torch.testing.assert_close(tangent, expected)


def test_errors():
    x, weight, bias = inputs((1, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm_act(x, weight, bias, *averages(x, weight))
    with pytest.raises(ValueError, match="BatchNorm: act must be one of linear, relu"):
        BatchNorm(3, act="gelu")
    for args, error, text in (
        ((inputs((1, 3))[0], "relu", "cpu"), RuntimeError, "more than one value a channel"),
        ((torch.ones(4, 3).double(), "relu", "cpu"), RuntimeError, "must be torch.float64 beside"),
        ((torch.ones(4, 3), "tanh", "cpu"), RuntimeError, "has no tanh"),
        ((torch.ones(4, 5), "relu", "cpu"), RuntimeError, "shape (5,), got (3,)"),
        ((torch.ones(4, 3), "relu", "cuda"), ValueError, "None, cpu or reference, got 'cuda'"),
        ((torch.ones(4, 3), "relu", 1), TypeError, "None, cpu or reference, got 1"),
    ):
        x, act, impl = args
        with pytest.raises(error) as caught:
            batch_norm_act(x, weight, bias, *averages(x, weight), act=act, impl=impl)
        assert text in str(caught.value)
    with pytest.raises(TypeError, match="batch_norm_act: x must be a tensor, got list"):
        batch_norm_act([1.0], weight, bias, *averages(x, weight))
    with pytest.raises(TypeError, match="running_var must be a tensor, got NoneType"):
        batch_norm_act(x, weight, bias, weight, None)
    op, args = torch.ops.gankern.batch_norm_act, (1e-5, 0.1, 2, 0.2, 1.0)
    x, weight, bias = inputs(SHAPES["odd"])
    means = averages(x, weight)
    for wrong, text in (
        ((x[:, :, 0, 0][:1], weight, bias, *means), "more than one value a channel"),
        ((x, weight[1:], bias, *means), "weight must be contiguous float32 of shape (18)"),
        ((x, weight, bias.double(), *means), "bias must be contiguous float32"),
        ((x, weight, bias, means[0], means[1].half()), "running_var must be contiguous float32"),
    ):
        with pytest.raises(RuntimeError) as caught:
            op(*wrong, *args)
        assert text in str(caught.value)
    with pytest.raises(RuntimeError, match="act must be linear, relu or lrelu, got 3"):
        op(x, weight, bias, *means, 1e-5, 0.1, 3, 0.2, 1.0)
    assert torch.equal(means[0], torch.zeros(18))


def test_like_batch_norm_then_act():
    """What runs where the kernel does not: the same arguments, the same results."""
    x, weight, bias = inputs(SHAPES["odd"], torch.float64)
    for act, (alpha, gain) in ACTS.items():
        one, other = averages(x, weight), averages(x, weight)
        args = 1e-4, 0.2, act.split()[0], alpha, gain
        y = batch_norm_act(x, weight, bias, *one, *args)
        torch.testing.assert_close(y, batch_norm_then_act(x, weight, bias, *other, *args))
        y = batch_norm_act(x, weight, bias, *averages(x, weight), *args, impl="reference")
        torch.testing.assert_close(y, batch_norm_act(x, weight, bias, *averages(x, weight), *args))
        torch.testing.assert_close(one, other)
