"""demod_coefs: every implementation, dtype and layout, all orders, the norms that it makes one."""

from __future__ import annotations

import functools

import harness
import pytest
import torch
from harness import DTYPES, compare, outputs_and_grads, randn, second_grads
from hypothesis import example, given
from hypothesis import strategies as st

from gankern.ops import _impl, demod_coefs, modulated_conv2d
from gankern.ops.modulated_conv2d import no_weight_gradients

# weight, samples
SHAPES = {
    "no_samples": ((4, 3, 3, 3), 0),
    "no_outputs": ((0, 3, 3, 3), 2),
    "no_inputs": ((4, 0, 3, 3), 2),
    "one": ((1, 1, 1, 1), 1),
    "3x3": ((6, 32, 3, 3), 4),
    "odd": ((37, 19, 3, 3), 5),
    "1x1": ((5, 40, 1, 1), 3),
    "1x1_odd": ((7, 13, 1, 1), 9),
    "5x2": ((3, 17, 5, 2), 2),
    "many_samples": ((9, 24, 3, 3), 19),
    "two_stages": ((3, 530, 3, 3), 2),
    "wide_kernel": ((2, 3, 27, 23), 2),
    "many_outputs": ((600, 8, 2, 2), 2),
}
DTYPE_PAIRS = {
    **{name: (dtype, dtype) for name, dtype in DTYPES.items()},
    "f32_f16": (torch.float32, torch.float16),
    "f32_bf16": (torch.float32, torch.bfloat16),
    "f16_f32": (torch.float16, torch.float32),
    "bf16_f16": (torch.bfloat16, torch.float16),
    "f32_f64": (torch.float32, torch.float64),
    "f64_f16": (torch.float64, torch.float16),
}


def sizes(name, impl, device):
    """A row of SHAPES; what has many programs or taps has fewer in Triton's interpreter."""
    fewer = {"many_outputs": ((70, 8, 2, 2), 2), "wide_kernel": ((2, 3, 9, 7), 2)}
    return (fewer if harness.interpreted(impl, device) else {}).get(name, SHAPES[name])


def inputs(shape, samples, device, dtypes=(torch.float32, torch.float32), layout="contiguous"):
    weight, styles = randn(*shape), randn(samples, shape[1], seed=1)
    layouts = (layout, "strided" if layout == "strided" else "contiguous")
    return [
        harness.lay_out(t.to(device, dtype), on)
        for t, dtype, on in zip((weight, styles), dtypes, layouts, strict=True)
    ]


def ops(impl, **kwargs):
    f = functools.partial(demod_coefs, impl=impl, **kwargs)
    return f, functools.partial(demod_coefs, impl="reference", **kwargs)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(impl, device, dtypes, shape):
    for dtype in DTYPE_PAIRS[dtypes]:
        harness.skip_float64_triton(impl, dtype)
    if harness.interpreted(impl, device) and dtypes != "f32" and shape not in ("3x3", "1x1_odd"):
        pytest.skip("the interpreter is slow; dtypes are tested on 3x3 and 1x1_odd")
    tensors = inputs(*sizes(shape, impl, device), device, DTYPE_PAIRS[dtypes])
    terms = tensors[0][:1].numel()  # of the sum of squares
    compare(*ops(impl), tensors, what=shape, roundings=max(4, terms**0.5 / 4))


@pytest.mark.parametrize("layout", harness.LAYOUTS)
@pytest.mark.parametrize("shape", ["3x3", "odd", "1x1_odd", "5x2", "many_samples"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_layouts(impl, device, dtype, shape, layout):
    if harness.interpreted(impl, device) and dtype != "f32" and shape != "3x3":
        pytest.skip("the interpreter is slow; float16 is tested on 3x3")
    tensors = inputs(*SHAPES[shape], device, (DTYPES[dtype],) * 2, layout)
    _, dweight, _ = compare(*ops(impl), tensors, what=layout)
    if layout == "channels_last":
        assert dweight.is_contiguous(memory_format=torch.channels_last)


# weight, samples, multiprocessors: from 1 to 8 output channels a block, sums of several warps, more
# channels or samples than a block has at a time.
PLANS = {
    **{f"outs_{n}": ((40, 136, 3, 3), 9, n) for n in (1, 10, 20, 132)},
    "odd_outs": ((7, 67, 3, 3), 6, 2),
    "warps": ((5, 516, 3, 3), 5, 2),
    "channels": ((2, 2060, 3, 3), 3, 132),
    "odd_channels": ((2, 2051, 1, 1), 9, 132),
    "samples": ((3, 12, 1, 1), 150, 1),
    "free_multiprocessors": ((3, 512, 1, 1), 18, 132),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "f64"])
@pytest.mark.parametrize("plan", PLANS)
def test_plans(impl, device, plan, dtype, layout):
    if impl != "simt":
        pytest.skip("of a GPU with so many multiprocessors")
    shape, samples, multiprocessors = PLANS[plan]
    tensors = inputs(shape, samples, device, (DTYPES[dtype],) * 2, layout)
    with harness.gpu_of(multiprocessors, impl):
        compare(*ops(impl), tensors, what=plan, roundings=max(4, tensors[0][:1].numel() ** 0.5 / 4))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("shape", ["3x3", "odd", "1x1", "many_samples"])
def test_second_gradients(impl, device, dtype, shape):
    if harness.interpreted(impl, device) and dtype != "f32" and shape != "3x3":
        pytest.skip("the interpreter is slow; dtypes are tested on 3x3")
    tensors = inputs(*SHAPES[shape], device, (DTYPES[dtype],) * 2)
    compare(*ops(impl), tensors, second_grads, shape)
    f, reference = ops(impl)
    compare(lambda s, w: f(w, s), lambda s, w: reference(w, s), tensors[::-1], second_grads, shape)


def test_unaligned(impl, device):
    for layout in ("contiguous", "channels_last"):
        memory = torch.randn(6 * 16 * 9 + 1, device=device)[1:]
        weight = memory.reshape(6, 16, 3, 3)
        if layout == "channels_last":
            weight = memory.reshape(6, 3, 3, 16).permute(0, 3, 1, 2)
        compare(*ops(impl), [weight, torch.randn(3, 16, device=device)], what=layout)


def test_gradcheck(impl, device):
    harness.skip_float64_triton(impl, torch.float64)
    for shape in ((3, 4, 2, 2), (2, 3, 1, 1)):
        tensors = inputs(shape, 2, device, (torch.float64,) * 2)
        leaves = [t.requires_grad_() for t in tensors]
        f, _ = ops(impl)
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


def test_third_order(impl, device):
    def third(implementation, dtype):
        leaves = [t.requires_grad_() for t in inputs((3, 5, 3, 3), 2, device, (dtype,) * 2)]
        y = demod_coefs(*leaves, impl=implementation).square()
        for _ in range(2):
            (y,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum(), leaves)])

    exact = third("reference", torch.float64)
    assert harness.relative_error(third(impl, torch.float32), exact) < 1e-4


def test_opcheck(impl, device):
    if impl == "reference":
        pytest.skip("the reference is not a registered op")
    for layout in ("contiguous", "channels_last", "sliced"):
        weight, styles = inputs((4, 8, 3, 3), 2, device, layout=layout)
        harness.opcheck(_impl.op(impl, "demod_coefs"), (weight, styles, 1e-8))
        d, q = _impl.op(impl, "demod_coefs")(weight, styles, 1e-8)
        for needs in ((True, True), (False, True)):
            args = (torch.randn_like(d), d, q, weight, styles, *needs)
            harness.opcheck(_impl.op(impl, "demod_coefs_bwd"), args)


@pytest.mark.parametrize("name", ["3x3", "odd"])
def test_the_factor_of_the_gradient(name, impl, device):
    if impl == "reference":
        pytest.skip("the reference is not a registered op")
    weight, styles = inputs(*SHAPES[name], device)
    d, q = _impl.op(impl, "demod_coefs")(weight, styles, 1e-8)
    args = (torch.randn_like(d), d, q, weight, styles, True, True)
    bwd = _impl.op(impl, "demod_coefs_bwd")
    for once, thrice in zip(bwd(*args), bwd(*args, 3.0), strict=True):
        torch.testing.assert_close(thrice, 3 * once)


def test_demodulated_weights_have_norm_1(impl, device):
    for name in ("3x3", "odd", "1x1"):
        weight, styles = inputs(*SHAPES[name], device)
        d = demod_coefs(100 * weight, styles, impl=impl)  # [N, O]
        w = 100 * weight * styles[:, None, :, None, None]  # [N, O, I, k, k]
        norms = (w * d[:, :, None, None, None]).flatten(2).norm(dim=2)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5, atol=0)


def test_special_values(impl, device):
    weight, styles = torch.randn(4, 8, 3, 3, device=device), torch.randn(3, 8, device=device)
    weight[0] = 0
    weight[1, 2, 1, 1] = float("nan")
    weight[2, 3, 0, 2] = float("inf")
    for eps in (1e-8, 0.0):
        actual = demod_coefs(weight, styles, eps, impl=impl)
        expected = demod_coefs(weight, styles, eps, impl="reference")
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_weight_gradients_off(impl, device):
    leaves = [t.requires_grad_() for t in inputs((4, 8, 3, 3), 2, device)]
    d = demod_coefs(*leaves, impl=impl)
    dd = torch.randn_like(d)
    with no_weight_gradients():
        dweight, dstyles = torch.autograd.grad(d, leaves, dd, create_graph=True, allow_unused=True)
    assert dweight is None
    expected = torch.autograd.grad(d, leaves, dd, create_graph=True)
    assert torch.equal(dstyles, expected[1])
    for t in leaves:  # the backward of the penalty itself reaches both
        actual, exact = (torch.autograd.grad(g.square().sum(), t, retain_graph=True)
                         for g in (dstyles, expected[1]))  # fmt: skip
        torch.testing.assert_close(actual, exact, rtol=0, atol=0)
        assert actual[0].abs().max() > 0


def test_an_impl_that_cannot_run_is_refused(device):
    weight, styles = inputs((2, 3, 3, 3), 2, device)
    wrong = "cuda" if device == "cpu" else "cpu"
    with pytest.raises(RuntimeError, match=f"impl='{wrong}' cannot run"):
        demod_coefs(weight, styles, impl=wrong)
    with pytest.raises(RuntimeError, match=f"modulated_conv2d: impl='{wrong}' cannot run"):
        modulated_conv2d(torch.ones(2, 3, 4, 4, device=device), weight, styles, impl=wrong)


@st.composite
def cases(draw):
    return {
        "shape": (
            draw(st.integers(1, 12)),
            draw(st.sampled_from([1, 2, 3, 7, 8, 16, 19, 33])),
            *draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        ),
        "samples": draw(st.integers(1, 10)),
        "dtypes": draw(st.sampled_from([n for n in DTYPE_PAIRS if "64" not in n])),
        "layout": draw(st.sampled_from(["contiguous", "channels_last"])),
        "eps": draw(st.sampled_from([1e-8, 1e-3, 0.5])),
    }


def test_random_arguments(impl, device):
    @harness.examples(impl)
    @given(cases())
    @example(  # of the styles' gradient a twentieth of its terms is left
        {"shape": (11, 1, 1, 5), "samples": 5, "dtypes": "f32", "layout": "contiguous", "eps": 1e-8}
    )
    @example(  # of the weights' a tenth
        {"shape": (1, 1, 5, 5), "samples": 10, "dtypes": "f32", "layout": "contiguous", "eps": 0.5}
    )
    def run(c):
        (o, *rest), n = c["shape"], c["samples"]
        if harness.interpreted(impl, device):
            o, n, rest = min(o, 2), min(n, 3), [rest[0], *(min(k, 3) for k in rest[1:])]
        tensors = inputs((o, *rest), n, device, DTYPE_PAIRS[c["dtypes"]], c["layout"])
        # The gradients' terms, of either sign, have four roundings each before they are added up.
        compare(*ops(impl, eps=c["eps"]), tensors, case=f"{o} {n} {rest} {c}", nudged=("d0", "d1"))

    run()


def test_deterministic(impl, device):
    for layout in ("contiguous", "channels_last"):
        tensors = inputs((33, 70, 3, 3), 9, device, layout=layout)
        f, _ = ops(impl)
        for a, b in zip(outputs_and_grads(f, tensors), outputs_and_grads(f, tensors), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", [0, 1, 2])
def test_instruction_sets(device, isa):
    if device != "cpu":
        pytest.skip("CPU kernels")
    try:
        _impl.set_cpu_isa(isa)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                for kernel in (1, 3, 5):
                    tensors = inputs((5, 37, kernel, kernel), 6, device, (dtype, dtype), layout)
                    compare(*ops("cpu"), tensors, what=f"{isa} {kernel}")
    finally:
        _impl.set_cpu_isa(-1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": 1}, TypeError, "demod_coefs: weight must be a tensor, got int"),
        ({"styles": None}, TypeError, "demod_coefs: styles must be a tensor, got NoneType"),
        ({"styles": torch.ones(2, 3).int()}, TypeError,
         "demod_coefs: styles must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"weight": torch.ones(4, 3, 3)}, ValueError,
         "demod_coefs: weight must be (O, I, kh, kw), got shape (4, 3, 3)"),
        ({"styles": torch.ones(2, 4)}, ValueError,
         "demod_coefs: styles must be (N, 3), got shape (2, 4)"),
        ({"styles": torch.ones(2, 3, device="meta")}, ValueError,
         "demod_coefs: styles must be on weight's device {device}, got meta"),
        ({"eps": "a"}, TypeError, "demod_coefs: eps must be a number, got str"),
        ({"eps": True}, TypeError, "demod_coefs: eps must be a number, got bool"),
        ({"eps": -1.0}, ValueError, "demod_coefs: eps must be at least 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "demod_coefs: eps must be at least 0, got nan"),
    ],
)  # fmt: skip
def test_errors(impl, device, change, error, text):
    args = {"weight": torch.ones(4, 3, 3, 3), "styles": torch.ones(2, 3), "impl": impl} | change
    args = {k: v.to(device) if torch.is_tensor(v) and not v.is_meta else v for k, v in args.items()}
    with pytest.raises(error) as caught:
        demod_coefs(**args)
    assert str(caught.value) == text.format(device=torch.empty(0, device=device).device)


def test_compile(impl, device):
    if impl in ("reference", "simt", "triton") and device == "cpu":
        pytest.skip("on the CPU, only the C++ kernels are worth compiling around")
    f, _ = ops(impl)
    compiled = torch.compile(f, fullgraph=True)
    tensors = inputs(*SHAPES["3x3"], device)
    pairs = zip(outputs_and_grads(compiled, tensors), outputs_and_grads(f, tensors), strict=True)
    for a, e in pairs:
        torch.testing.assert_close(a, e)
