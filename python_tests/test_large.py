"""Tensors of over 2**31 elements: the last blocks of the kernels, run on the CPU by csrc/simt.

The tensors are never touched but at their ends, so that they take no memory: what is tested is the
arithmetic of sizes, launches and indices.
"""

from __future__ import annotations

import harness
import numpy as np
import pytest
import torch
from torch import Tensor

import gankern.ops as gk
from gankern.ops import _impl

BLOCKS = (8, 70_000)  # that run of each launch: more where the last ones have nothing to do
TAIL = 16  # samples that hold values: what 8 blocks meet of a grid that strides
PLANES = (8200, 64, 64, 64)
F4 = gk.setup_filter([1, 3, 3, 1])
B = torch.linspace(-1, 1, 64)


def blur(x, impl):
    return gk.upfirdn2d(x, F4, padding=[2, 1, 2, 1], impl=impl)


def epilogue(x, impl):
    d = torch.ones(x.shape[:2]) / 2
    return gk.synthesis_epilogue(x, None, d, b=B, impl=impl)


def square_sums(w, impl):
    """What demod_coefs reads from its weights."""
    if impl == "reference":
        return w.float().square().sum([2, 3])
    return _impl.op(impl, "demod_coefs")(w, torch.ones(1, w.shape[1]), 1e-8)[1]


def adain(x, impl):
    scale = torch.ones(x.shape[:2])
    return gk.adain(x, scale, scale / 2, impl=impl)


# Shape, whether channels-last, and the operation on all of it or on its last sample.
CASES = {
    "bias_act": (PLANES, False, lambda x, impl: gk.bias_act(x, B, act="lrelu", impl=impl)),
    "bias_act_last": (PLANES, True, lambda x, impl: gk.bias_act(x, B, act="lrelu", impl=impl)),
    "pixel_norm": (PLANES, False, lambda x, impl: gk.pixel_norm(x, impl=impl)),
    "pixel_norm_last": (PLANES, True, lambda x, impl: gk.pixel_norm(x, impl=impl)),
    "pixel_norm_rows": ((65600, 32768), False, lambda x, impl: gk.pixel_norm(x, impl=impl)),
    "adain": (PLANES, False, adain),
    "adain_last": (PLANES, True, adain),
    "upfirdn2d": (PLANES, False, blur),
    "upfirdn2d_last": (PLANES, True, blur),
    "synthesis_epilogue": (PLANES, False, epilogue),
    "synthesis_epilogue_last": (PLANES, True, epilogue),
    "demod_coefs": ((58300, 4096, 3, 3), False, square_sums),
    "demod_coefs_last": ((58300, 4096, 3, 3), True, square_sums),
}  # fmt: skip


def huge(shape: tuple[int, ...], channels_last: bool, seed: int = 0) -> Tensor:
    """Zeros that no memory holds yet, but for the last samples."""
    if channels_last:
        n, c, h, w = shape
        x = torch.from_numpy(np.zeros((n, h, w, c), np.float16)).permute(0, 3, 1, 2)
    else:
        x = torch.from_numpy(np.zeros(shape, np.float16))
    assert x.numel() > 2**31
    x[-TAIL:] = harness.randn(TAIL, *shape[1:], seed=seed).half()
    return x


def check(run, expected: Tensor) -> None:
    """What the last blocks wrote of the last samples is right, and beyond 2**31 elements."""
    import simt_build

    for blocks in BLOCKS:
        simt_build.module().only_last(blocks)
        y = run()[-TAIL:]
        written = y != 0  # fresh memory is zero
        if written.any():
            break
    assert written.any()
    torch.testing.assert_close(y[written], expected[written], rtol=4e-3, atol=4e-3)


@pytest.fixture
def last_blocks(simt_ops, device):
    import simt_build

    if device != "cpu" or simt_build.variant() != "plain":
        pytest.skip("for simt's plain variant")
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch all of the memory
    yield
    simt_build.module().only_last(0)


@pytest.mark.parametrize("name", CASES)
def test_the_end_of_a_large_tensor(name, last_blocks):
    shape, channels_last, f = CASES[name]
    x = huge(shape, channels_last)
    check(lambda: f(x, "simt"), f(x[-TAIL:].clone(), "reference"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("op", ["bias_act", "pixel_norm"])
def test_the_end_of_a_large_gradient(op, channels_last, last_blocks):
    x, dy = huge(PLANES, channels_last), huge(PLANES, channels_last, seed=1)
    leaf = x[-TAIL:].clone().requires_grad_()
    if op == "bias_act":
        args = (None, 1, 0, 0.0, 2.0, -1.0, False, False)
        run, small = _impl.op("simt", "bias_act_bwd"), gk.bias_act(leaf, gain=2, impl="reference")
    else:
        args = (1, 1e-8)
        run, small = _impl.op("simt", "pixel_norm_bwd"), gk.pixel_norm(leaf, impl="reference")
    (expected,) = torch.autograd.grad(small, leaf, dy[-TAIL:])
    check(lambda: run(dy, x, *args)[0] if op == "bias_act" else run(dy, x, *args), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_end_of_a_large_weight_gradient(channels_last, last_blocks):
    w = huge((58300, 4096, 3, 3), channels_last)
    styles, d, q = torch.ones(1, 4096), torch.ones(1, 58300), torch.zeros(58300, 4096)
    bwd = _impl.op("simt", "demod_coefs_bwd")
    check(lambda: bwd(-d, d, q, w, styles, True, False)[0], w[-TAIL:])


def test_the_interpreter_notices_an_overflow(device):
    """The check of 32-bit indices that conftest puts in place of Triton's own, which is slower."""
    if device != "cpu":
        pytest.skip("Triton's interpreter runs on the CPU")
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from conftest import quicken_interpreter

    quicken_interpreter()

    @triton.jit
    def sums(out_ptr, first, n: tl.constexpr):
        at = tl.arange(0, n)
        tl.store(out_ptr + at, first + at)

    out = torch.zeros(4, dtype=torch.int32)
    sums[(1,)](out, 2**31 - 4, n=4)
    assert out.tolist() == [2**31 - 4 + i for i in range(4)]
    with pytest.raises(Exception, match="int32 overflow in add"):
        sums[(1,)](out, 2**31 - 3, n=4)
