from __future__ import annotations

import functools
from fractions import Fraction

import harness
import numpy as np
import pytest
import torch
from harness import DTYPES, compare, outputs_and_grads, second_grads
from hypothesis import given
from hypothesis import strategies as st

from gankern.ops import _impl, bias_act
from gankern.ops.bias_act import ACTS

SHAPES = {
    "empty": (0, 3, 4, 4),
    "one": (1, 1, 1, 1),
    "latent": (5, 37),
    "odd": (2, 5, 7, 9),
    "planes": (2, 8, 16, 16),
    "large": (2, 3, 63, 65),
    "wide": (3, 130, 4, 4),
    "sequence": (2, 6, 33),
    "volume": (1, 4, 3, 5, 6),
}


def inputs(shape, device, dtype=torch.float32, layout="contiguous", dim=1, seed=0):
    """x and b whose sum is an odd multiple of 1/32: exact in every dtype, never on a kink."""
    x = (harness.randn(*shape, seed=seed).clamp(-3, 3) * 16).round() / 16 + 1 / 32
    b = (harness.randn(shape[dim], seed=seed + 1).clamp(-2, 2) * 4).round() / 16
    return [harness.lay_out(x.to(device, dtype), layout), b.to(device, dtype)]


def ops(impl, **kwargs):
    f = functools.partial(bias_act, impl=impl, **kwargs)
    return f, functools.partial(bias_act, impl="reference", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(impl, device, dtype, shape):
    harness.skip_float64_triton(impl, DTYPES[dtype])
    f, reference = ops(impl, act="lrelu", clamp=1.5)
    compare(f, reference, inputs(SHAPES[shape], device, DTYPES[dtype]), what=shape)


@pytest.mark.parametrize("layout", harness.LAYOUTS)
@pytest.mark.parametrize("shape", ["odd", "planes", "large", "wide"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_layouts(impl, device, dtype, shape, layout):
    f, reference = ops(impl, act="lrelu")
    x, b = inputs(SHAPES[shape], device, DTYPES[dtype], layout)
    y = compare(f, reference, [x, b], what=layout)[0]
    if layout == "channels_last" and impl != "triton":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_acts(impl, device, act, dtype):
    for clamp in (None, 0.8515625):  # exact in every dtype: Triton's interpreter truncates
        f, reference = ops(impl, act=act, alpha=0.3 if act == "lrelu" else None, clamp=clamp)
        x, b = inputs(SHAPES["odd"], device, DTYPES[dtype])
        compare(f, reference, [x, b], what=f"{act} {clamp}")


@pytest.mark.parametrize("act", ACTS)
def test_second_gradients(impl, device, act):
    f, reference = ops(impl, act=act, gain=1.3, clamp=2.0)
    compare(f, reference, inputs(SHAPES["odd"], device), second_grads, act)


@pytest.mark.parametrize(
    "options", [{"alpha": -0.3}, {"gain": -1.2}, {"gain": 0.0}, {"clamp": 0.0}, {"clamp": -0.0}]
)
def test_unusual_arguments(impl, device, options):
    f, reference = ops(impl, act="lrelu", **options)
    compare(f, reference, inputs(SHAPES["odd"], device), what=str(options))


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
def test_dims(impl, device, dim):
    f, reference = ops(impl, act="lrelu", dim=dim)
    compare(f, reference, inputs((3, 4, 5, 6), device, dim=dim), what=f"dim {dim}")


def test_without_bias_and_float32_bias(impl, device):
    f, reference = ops(impl, act="lrelu")
    x, b = inputs(SHAPES["planes"], device, torch.float16)
    compare(f, reference, [x, None])
    db = outputs_and_grads(f, [x, b.float()])[2]
    assert db.dtype == torch.float32
    compare(f, reference, [x, b.float()])


def test_special_values(impl, device):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0]], device=device)
    for act in ("linear", "relu", "lrelu", "elu", "selu", "softplus"):
        for clamp in (None, 0.5):
            actual = bias_act(x, act=act, clamp=clamp, impl=impl)
            expected = bias_act(x, act=act, clamp=clamp, impl="reference")
            torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("act", ACTS)
def test_gradcheck(impl, device, act):
    harness.skip_float64_triton(impl, torch.float64)
    x, b = inputs((2, 3, 2, 2), device, torch.float64)
    x, b = x.requires_grad_(), b.requires_grad_()
    f, _ = ops(impl, act=act, clamp=2.5)
    assert torch.autograd.gradcheck(f, (x, b))
    assert torch.autograd.gradgradcheck(f, (x, b))


@pytest.mark.parametrize("act", ["tanh", "softplus", "swish"])
def test_third_order(impl, device, act):
    def third(implementation, dtype):
        x, b = (t.requires_grad_() for t in inputs((2, 3, 2, 2), device, dtype))
        y = bias_act(x, b, act=act, impl=implementation)
        for _ in range(2):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(y.square().sum(), (x, b))

    exact = third("reference", torch.float64)
    for a, e in zip(third(impl, torch.float32), exact, strict=True):
        assert harness.relative_error(a, e) < 1e-5


@pytest.mark.parametrize("act", ["elu", "selu"])
def test_orders_of_an_exponential(impl, device, act):
    """Below 0 all derivatives are alike; of a sum, so that no gradient comes from above."""
    x = torch.linspace(-2, -0.1, 5, device=device).reshape(1, 5).requires_grad_()
    y = bias_act(x, act=act, impl=impl)
    for _ in range(4):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        torch.testing.assert_close(
            y, {"elu": 1, "selu": 1.0507009873 * 1.6732632423}[act] * x.exp()
        )


def test_softplus_in_float64(impl, device):
    """At 21, log(1 + exp(x)) - x is 7.6e-10: seven digits above a rounding."""
    harness.skip_float64_triton(impl, torch.float64)
    x = torch.tensor([[21.0, 30.0, -30.0, 800.0]], dtype=torch.float64, device=device)
    expected = torch.logaddexp(x, torch.zeros_like(x))
    torch.testing.assert_close(bias_act(x, act="softplus", impl=impl), expected, rtol=4e-16, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_opcheck(impl, device, layout):
    if impl == "reference":
        pytest.skip("the reference is not a registered op")
    x, b = inputs((2, 3, 4, 4), device, layout=layout)
    args = (1, ACTS["swish"].code, 0.0, 1.5, 2.0)
    for name, tensors, more in (
        ("bias_act", (x, b), ()),
        ("bias_act_bwd", (x, x, b), (True, True)),
        ("bias_act_bwd", (x, x, None), (False, False)),
        ("bias_act_bwd2", (x, x, x, b), (True,)),
    ):
        harness.opcheck(_impl.op(impl, name), (*tensors, *args, *more))


@pytest.mark.parametrize("order", harness.ORDERS, ids=str)
def test_keeps_the_order_of_dimensions(impl, device, order):
    x, b = inputs((2, 3, 4, 5, 3)[: len(order)], device)
    x = harness.in_order(x, order)
    y = bias_act(x, b, act="lrelu", impl=impl)
    expected = bias_act(x.contiguous(), b, act="lrelu", impl="reference")
    torch.testing.assert_close(y, expected)
    assert impl == "reference" or y.stride() == x.stride()
    grads = [
        torch.autograd.grad(bias_act(leaf, b, act="lrelu", impl=i).square().sum(), leaf)[0]
        for i in (impl, "reference")
        for leaf in [x.clone().requires_grad_()]
    ]
    torch.testing.assert_close(*grads)


def test_identity_is_exact(impl, device):
    x, _ = inputs(SHAPES["large"], device, torch.float16)
    assert torch.equal(bias_act(x, impl=impl), x)


@pytest.mark.parametrize("case", range(18))
def test_golden(impl, device, case):
    harness.skip_float64_triton(impl, torch.float64)
    params, t = harness.golden("bias_act")[case]
    t = {k: v.to(device) for k, v in t.items()}
    x, b, dy = (t[k].requires_grad_() for k in ("x", "b", "dy"))
    y = bias_act(x, b, impl=impl, **params)
    dx, db = torch.autograd.grad(y, (x, b), dy, create_graph=True)
    d2x, d2dy = torch.autograd.grad(dx, (x, dy), t["v"], allow_unused=True)
    d2x = torch.zeros_like(x) if d2x is None else d2x
    for name, actual in (("y", y), ("dx", dx), ("db", db), ("d2x", d2x), ("d2dy", d2dy)):
        if t[name].abs().max() == 0:
            assert actual.abs().max() < 1e-12, name
        else:
            assert harness.relative_error(actual, t[name]) < 1e-10, name


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    return {
        "shape": shape,
        "dim": draw(st.integers(0, len(shape) - 1)),
        "order": draw(st.permutations(range(len(shape)))),
        "act": draw(st.sampled_from(list(ACTS))),
        "gain": draw(st.sampled_from([None, 0.5, -1.5])),
        "clamp": draw(st.sampled_from([None, 0.7])),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["f32", "f16", "bf16"])),
    }


def test_random_arguments(impl, device):
    @harness.examples(impl)
    @given(cases())
    def run(c):
        if impl == "triton" and device == "cpu" and c["dtype"] == "bf16":
            c["dtype"] = "f16"  # the interpreter truncates to bfloat16 instead of rounding
        # In 16 bits a y may round onto the clamp: the kernel then sees it clamped.
        clamp = c["clamp"] if c["dtype"] == "f32" else None
        f, reference = ops(impl, dim=c["dim"], act=c["act"], gain=c["gain"], clamp=clamp)
        x, b = inputs(c["shape"], device, DTYPES[c["dtype"]], dim=c["dim"])
        x = x.permute(c["order"]).contiguous().permute(*map(c["order"].index, range(x.dim())))
        compare(f, reference, [x, b if c["bias"] else None], case=str(c))

    run()


def test_deterministic(impl, device):
    for layout in ("contiguous", "channels_last"):
        x, b = inputs((4, 24, 33, 31), device, layout=layout)
        f, _ = ops(impl, act="lrelu")
        for a, b2 in zip(outputs_and_grads(f, [x, b]), outputs_and_grads(f, [x, b]), strict=True):
            assert torch.equal(a, b2)


@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize("act", ["lrelu", "tanh", "softplus", "swish"])
def test_instruction_sets(device, isa, act):
    if device != "cpu":
        pytest.skip("CPU kernels")
    f, reference = ops("cpu", act=act)
    try:
        _impl.set_cpu_isa(isa)
        for dtype in DTYPES.values():
            for layout in ("contiguous", "channels_last"):
                compare(f, reference, inputs((2, 7, 9, 11), device, dtype, layout), what=str(isa))
    finally:
        _impl.set_cpu_isa(-1)


ACT = "bias_act: act must be one of linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": 3}, TypeError, "bias_act: x must be a tensor, got int"),
        ({"x": torch.ones(2, dtype=torch.int64)}, TypeError,
         "bias_act: x must be float32, float16, bfloat16 or float64, got torch.int64"),
        ({"act": "gelu"}, ValueError, f"{ACT}, got 'gelu'"),
        ({"act": ["relu"]}, TypeError, f"{ACT}, got ['relu']"),
        ({"act": None}, TypeError, f"{ACT}, got None"),
        ({"dim": 4}, ValueError, "bias_act: dim must be a dimension of x (2, 3, 4, 4), got 4"),
        ({"dim": "a"}, TypeError, "bias_act: dim must be an int, got str"),
        ({"dim": True}, TypeError, "bias_act: dim must be an int, got bool"),
        ({"b": [1.0, 2.0, 3.0]}, TypeError, "bias_act: b must be a tensor, got list"),
        ({"b": torch.ones(5)}, ValueError, "bias_act: b must have shape (3,), got (5,)"),
        ({"b": torch.ones(3, 1)}, ValueError, "bias_act: b must have shape (3,), got (3, 1)"),
        ({"b": torch.ones(3).half()}, TypeError,
         "bias_act: b must be torch.float32, got torch.float16"),
        ({"x": torch.ones(2, 3).half(), "b": torch.ones(3).double()}, TypeError,
         "bias_act: b must be torch.float16 or torch.float32, got torch.float64"),
        ({"b": torch.ones(3, device="meta")}, ValueError,
         "bias_act: b must be on x's device {device}, got meta"),
        ({"clamp": -1}, ValueError, "bias_act: clamp must be None or at least 0, got -1"),
        ({"clamp": float("nan")}, ValueError,
         "bias_act: clamp must be None or at least 0, got nan"),
        ({"clamp": "a"}, TypeError, "bias_act: clamp must be a number or None, got str"),
        ({"alpha": "a"}, TypeError, "bias_act: alpha must be a number or None, got str"),
        ({"alpha": float("nan")}, ValueError,
         "bias_act: alpha must be a number or None, got nan"),
        ({"gain": [2.0]}, TypeError, "bias_act: gain must be a number or None, got list"),
        ({"gain": torch.ones(())}, TypeError,
         "bias_act: gain must be a number or None, got Tensor"),
        ({"gain": True}, TypeError, "bias_act: gain must be a number or None, got bool"),
    ],
)  # fmt: skip
def test_errors(impl, device, change, error, text):
    args = {"x": torch.ones(2, 3, 4, 4), "impl": impl} | change
    args = {k: v.to(device) if torch.is_tensor(v) and not v.is_meta else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        bias_act(**args)
    assert str(caught.value) == text.format(device=torch.empty(0, device=device).device)


def test_numbers_of_other_types(device):
    x = torch.linspace(-2, 2, 12, device=device).reshape(3, 4)
    y = bias_act(x, None, np.int64(1), "lrelu", np.float32(0.5), Fraction(1, 2), np.float64(0.75))
    assert torch.equal(y, bias_act(x, None, 1, "lrelu", 0.5, 0.5, 0.75))


def test_unusable_impl(device):
    x = torch.ones(1, 1, device=device)
    with pytest.raises(ValueError, match="bias_act: impl must be None or one of cuda, triton"):
        bias_act(x, impl="fast")
    other = "cuda" if device == "cpu" else "cpu"
    with pytest.raises(RuntimeError, match=f"impl='{other}' cannot run: its kernels need"):
        bias_act(x, impl=other)


def test_compile(impl, device):
    if impl in ("reference", "simt", "triton") and device == "cpu":
        pytest.skip("on the CPU, only the C++ kernels are worth compiling around")
    f, _ = ops(impl, act="lrelu", clamp=1.0)
    compiled = torch.compile(f, fullgraph=True)
    x, b = inputs(SHAPES["planes"], device)
    for a, e in zip(outputs_and_grads(compiled, [x, b]), outputs_and_grads(f, [x, b]), strict=True):
        torch.testing.assert_close(a, e)


def test_export(device):
    class Layer(torch.nn.Module):
        def forward(self, x, b):
            return bias_act(x, b, act="lrelu")

    x, b = inputs(SHAPES["planes"], device)
    program = torch.export.export(Layer(), (x, b))
    torch.testing.assert_close(program.module()(x, b), bias_act(x, b, act="lrelu"))
