from __future__ import annotations

import functools

import harness
import pytest
import torch
from harness import DTYPES, compare, outputs_and_grads, second_grads
from hypothesis import given
from hypothesis import strategies as st

from gankern.ops import _impl, pixel_norm

SHAPES = {
    "empty": (0, 3, 4, 4),
    "one": (2, 5, 1, 1),
    "latent": (5, 64),
    "odd_latent": (3, 515),
    "odd": (2, 7, 5, 3),
    "planes": (2, 16, 16, 16),
    "large": (1, 8, 63, 65),
    "small_planes": (2, 96, 4, 4),
    "wide": (1, 1028, 2, 4),
    "sequence": (2, 6, 33),
    "volume": (1, 4, 3, 5, 6),
}


def inputs(shape, device, dtype=torch.float32, layout="contiguous", seed=0):
    return [harness.lay_out(harness.randn(*shape, seed=seed).to(device, dtype), layout)]


def ops(impl, **kwargs):
    f = functools.partial(pixel_norm, impl=impl, **kwargs)
    return f, functools.partial(pixel_norm, impl="reference", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(impl, device, dtype, shape):
    harness.skip_float64_triton(impl, DTYPES[dtype])
    compare(*ops(impl), inputs(SHAPES[shape], device, DTYPES[dtype]), what=shape)


@pytest.mark.parametrize("layout", harness.LAYOUTS)
@pytest.mark.parametrize("shape", ["one", "odd", "planes", "small_planes", "wide"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_layouts(impl, device, dtype, shape, layout):
    x = inputs(SHAPES[shape], device, DTYPES[dtype], layout)
    y, dx = compare(*ops(impl), x, what=layout)
    compare(*ops(impl), x, second_grads, what=layout)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_second_gradients(impl, device, dtype, shape):
    compare(*ops(impl), inputs(SHAPES[shape], device, DTYPES[dtype]), second_grads, shape)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
def test_dims(impl, device, dim):
    for derivative in (outputs_and_grads, second_grads):
        compare(*ops(impl, dim=dim), inputs((3, 4, 5, 8), device), derivative, f"dim {dim}")


def test_unaligned(impl, device):
    x = torch.randn(2 * 16 * 8 + 1, device=device)[1:].reshape(2, 16, 8)
    for dim in (1, 2):
        compare(*ops(impl, dim=dim), [x], what=f"dim {dim}")


def test_gradcheck(impl, device):
    harness.skip_float64_triton(impl, torch.float64)
    for shape in ((2, 3, 2, 2), (2, 5)):
        x = inputs(shape, device, torch.float64)[0].requires_grad_()
        f, _ = ops(impl)
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


def test_third_order(impl, device):
    def third(implementation, dtype):
        x = inputs((2, 5, 2, 2), device, dtype)[0].requires_grad_()
        y = pixel_norm(x, impl=implementation).exp()
        for _ in range(2):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(y.square().sum(), x)[0]

    exact = third("reference", torch.float64)
    assert harness.relative_error(third(impl, torch.float32), exact) < 1e-4


def test_opcheck(impl, device):
    if impl == "reference":
        pytest.skip("the reference is not a registered op")
    image = (2, 3, 4, 4)
    for shape, layout in ((image, "channels_last"), (image, "sliced"), ((2, 8), "contiguous")):
        (x,) = inputs(shape, device, layout=layout)
        for name, count in (("pixel_norm", 1), ("pixel_norm_bwd", 2), ("pixel_norm_bwd2", 3)):
            args = (*[x] * count, 1, 1e-8)
            harness.opcheck(_impl.op(impl, name), args)


@pytest.mark.parametrize("order", harness.ORDERS, ids=str)
def test_keeps_the_order_of_dimensions(impl, device, order):
    x = harness.in_order(inputs((2, 3, 4, 5, 3)[: len(order)], device)[0], order)
    y = pixel_norm(x, impl=impl)
    torch.testing.assert_close(y, pixel_norm(x.contiguous(), impl="reference"))
    assert impl == "reference" or y.stride() == x.stride()
    grads = [
        torch.autograd.grad(pixel_norm(leaf, impl=i).pow(3).sum(), leaf)[0]
        for i in (impl, "reference")
        for leaf in [x.clone().requires_grad_()]
    ]
    torch.testing.assert_close(*grads)


def test_mean_square_is_one(impl, device):
    for shape in ("latent", "planes", "wide"):
        (x,) = inputs(SHAPES[shape], device)
        square = pixel_norm(100 * x, impl=impl).square().mean(1)
        torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-6, atol=0)


def test_special_values(impl, device):
    x = torch.randn(4, 8, 3, device=device)
    x[0] = 0
    x[1, 2, 1] = float("nan")
    x[2, 3, 2] = float("inf")
    for eps in (1e-8, 0.0):
        actual = pixel_norm(x, eps=eps, impl=impl)
        expected = pixel_norm(x, eps=eps, impl="reference")
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("case", range(3))
def test_golden(impl, device, case):
    harness.skip_float64_triton(impl, torch.float64)
    params, t = harness.golden("pixel_norm")[case]
    x, dy = t["x"].to(device).requires_grad_(), t["dy"].to(device)
    y = pixel_norm(x, impl=impl, **params)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert harness.relative_error(y.cpu(), t["y"]) < 1e-10
    assert harness.relative_error(dx.cpu(), t["dx"]) < 1e-10


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    length = draw(st.sampled_from([2, 3, 8, 16, 33, 64, 130]))
    return {
        "shape": (*shape[:dim], length, *shape[dim + 1 :]),
        "dim": dim,
        "order": draw(st.permutations(range(len(shape)))),
        "eps": draw(st.sampled_from([1e-8, 1e-3, 0.5])),
        "dtype": draw(st.sampled_from(["f32", "f16", "bf16"])),
    }


def test_random_arguments(impl, device):
    @harness.examples(impl)
    @given(cases())
    def run(c):
        (x,) = inputs(c["shape"], device, DTYPES[c["dtype"]])
        x = x.permute(c["order"]).contiguous().permute(*map(c["order"].index, range(x.dim())))
        compare(*ops(impl, dim=c["dim"], eps=c["eps"]), [x], case=str(c))

    run()


def test_deterministic(impl, device):
    for layout in ("contiguous", "channels_last"):
        x = inputs((4, 24, 33, 31), device, layout=layout)
        f, _ = ops(impl)
        for a, b in zip(outputs_and_grads(f, x), outputs_and_grads(f, x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", [0, 1, 2])
def test_instruction_sets(device, isa):
    if device != "cpu":
        pytest.skip("CPU kernels")
    try:
        _impl.set_cpu_isa(isa)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                x = inputs((2, 37, 9, 11), device, dtype, layout)
                compare(*ops("cpu"), x, what=str(isa))
                compare(*ops("cpu"), x, second_grads, what=str(isa))
    finally:
        _impl.set_cpu_isa(-1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": 1.0}, TypeError, "pixel_norm: x must be a tensor, got float"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError,
         "pixel_norm: x must be float32, float16, bfloat16 or float64, got torch.int64"),
        ({"dim": 1.0}, TypeError, "pixel_norm: dim must be an int, got float"),
        ({"dim": None}, TypeError, "pixel_norm: dim must be an int, got NoneType"),
        ({"dim": True}, TypeError, "pixel_norm: dim must be an int, got bool"),
        ({"dim": 2}, ValueError, "pixel_norm: dim must be a dimension of x (2, 3), got 2"),
        ({"x": torch.ones(()), "dim": 0}, ValueError,
         "pixel_norm: dim must be a dimension of x (), got 0"),
        ({"eps": "a"}, TypeError, "pixel_norm: eps must be a number, got str"),
        ({"eps": torch.ones(())}, TypeError, "pixel_norm: eps must be a number, got Tensor"),
        ({"eps": -1.0}, ValueError, "pixel_norm: eps must be at least 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "pixel_norm: eps must be at least 0, got nan"),
    ],
)  # fmt: skip
def test_errors(impl, device, change, error, text):
    args = {"x": torch.ones(2, 3), "impl": impl} | change
    args = {k: v.to(device) if torch.is_tensor(v) else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        pixel_norm(**args)
    assert str(caught.value) == text


def test_compile(impl, device):
    if impl in ("reference", "simt", "triton") and device == "cpu":
        pytest.skip("on the CPU, only the C++ kernels are worth compiling around")
    f, _ = ops(impl)
    compiled = torch.compile(f, fullgraph=True)
    x = inputs(SHAPES["planes"], device)
    for a, e in zip(outputs_and_grads(compiled, x), outputs_and_grads(f, x), strict=True):
        torch.testing.assert_close(a, e)
