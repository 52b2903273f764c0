"""Tensors of over 2**31 elements: the last blocks of the kernels, run on the CPU.

csrc/simt runs CUDA's, and Triton's interpreter its own.

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


# --- Triton.

SAMPLES = (34_816, 1, 256, 256)  # of one channel: samples times pixels are over 2**31
WIDE = (1, 1, 32_768, 65_600)  # the same of one plane, or of one sample in channels-last memory
WIDE_LAST = (1, 2, 32_768, 32_800)
ROWS = 8  # that hold values, of the image's last


@pytest.fixture
def last_programs(device, monkeypatch):
    """Triton's interpreter runs the last 4 programs of each axis of a launch's grid."""
    if device != "cpu":
        pytest.skip("Triton's interpreter runs on the CPU")
    pytest.importorskip("triton")
    from conftest import limit_grids, quicken_interpreter
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    quicken_interpreter()
    limit_grids()
    init, set_dim = GridExecutor.__init__, InterpreterBuilder.set_grid_dim
    set_idx, whole = InterpreterBuilder.set_grid_idx, [(1, 1, 1)]

    def short(self, fn, arg_names, grid, *args):
        whole[0] = (*grid, 1, 1)[:3]
        init(self, fn, arg_names, tuple(min(size, 4) for size in grid), *args)

    def place(self, *at):
        set_idx(self, *(i + max(size - 4, 0) for i, size in zip(at, whole[0], strict=True)))

    monkeypatch.setattr(GridExecutor, "__init__", short)
    monkeypatch.setattr(
        InterpreterBuilder, "set_grid_dim", lambda self, *_: set_dim(self, *whole[0])
    )
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", place)
    torch.utils.deterministic.fill_uninitialized_memory = False


def same_where_written(y: Tensor, expected: Tensor) -> None:
    written = y != 0
    assert written.any()
    torch.testing.assert_close(y[written], expected[written], rtol=4e-3, atol=4e-3)


def noisy(x, impl):
    return gk.synthesis_epilogue(x, noise=x, act="linear", impl=impl)


TRITON_CASES = CASES | {
    "pixel_norm_samples": ((34_816, 1, 65_536), False, lambda x, impl: gk.pixel_norm(x, impl=impl)),
    "epilogue_noise": (SAMPLES, False, noisy),
}


@pytest.mark.parametrize("name", TRITON_CASES)
def test_the_end_of_a_large_tensor_in_triton(name, last_programs):
    shape, channels_last, f = TRITON_CASES[name]
    x = huge(shape, channels_last)
    same_where_written(f(x, "triton")[-TAIL:], f(x[-TAIL:].clone(), "reference"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [PLANES, SAMPLES], ids=["planes", "samples"])
@pytest.mark.parametrize("op", ["bias_act", "pixel_norm", "adain", "synthesis_epilogue"])
def test_the_end_of_a_large_gradient_in_triton(op, shape, channels_last, last_programs):
    x, dy = huge(shape, channels_last), huge(shape, channels_last, seed=1)
    f = {
        "bias_act": lambda x, impl: gk.bias_act(x, act="swish", impl=impl),
        "pixel_norm": lambda x, impl: gk.pixel_norm(x, eps=0.1, impl=impl),
        "adain": adain,
        "synthesis_epilogue": lambda x, impl: gk.synthesis_epilogue(x, act="swish", impl=impl),
    }[op]
    grads = []
    for leaf, impl, g in ((x, "triton", dy), (x[-TAIL:].clone(), "reference", dy[-TAIL:])):
        leaf.requires_grad_()
        grads += torch.autograd.grad(f(leaf, impl), leaf, g)
    if op == "adain":  # by the statistics of the planes that its forward has run
        grads = [g[-1:, -1:] for g in grads]
    same_where_written(grads[0][-TAIL:], grads[1])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("op", ["bias_act", "upfirdn2d", "epilogue", "filtered", "stddev"])
def test_the_end_of_a_large_image_in_triton(op, channels_last, last_programs):
    n, c, h, w = WIDE_LAST if channels_last else WIDE
    x = torch.from_numpy(np.zeros((n, h, w, c), np.float16)).permute(0, 3, 1, 2)
    x = x if channels_last else x.reshape(n, c, h, w)
    x[:, :, -ROWS:] = harness.randn(n, c, ROWS, w).half()
    b, pads = torch.ones(c) / 2, [2, 1, 2, 1]
    f = {
        "bias_act": lambda x, impl: gk.bias_act(x, b, act="lrelu", impl=impl),
        "upfirdn2d": blur,
        "epilogue": lambda x, impl: gk.synthesis_epilogue(x, b=b, impl=impl),
        "filtered": lambda x, impl: gk.synthesis_epilogue(x, F4, b=b, padding=pads, impl=impl),
        "stddev": lambda x, impl: gk.minibatch_stddev(x, impl=impl),
    }[op]
    y, expected = f(x, "triton"), f(x[:, :, -ROWS:].clone(), "reference")
    same_where_written(y[:, :c, -ROWS // 2 :], expected[:, :c, -ROWS // 2 :])


def test_the_end_of_large_groups_in_triton(last_programs):
    """Of minibatch_stddev's samples, the last of the last group and its gradient."""
    x, dy = huge(PLANES, False), huge((PLANES[0], PLANES[1] + 1, *PLANES[2:]), False, seed=1)
    groups = PLANES[0] // 4
    y = _impl.op("triton", "minibatch_stddev")(x, groups, 1)
    dx = _impl.op("triton", "minibatch_stddev_bwd")(dy, x, groups, 1)
    leaf = x[groups - 1 :: groups].clone().requires_grad_()
    expected = gk.minibatch_stddev(leaf, impl="reference")
    (grad,) = torch.autograd.grad(expected, leaf, dy[groups - 1 :: groups].clone())
    same_where_written(y[-1, :-1], expected[-1, :-1].detach())
    same_where_written(dx[-1], grad[-1])


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_end_of_a_large_weight_gradient_in_triton(channels_last, last_programs):
    w = huge((58300, 4096, 3, 3), channels_last)
    styles, d, q = torch.ones(1, 4096), torch.ones(1, 58300), torch.zeros(58300, 4096)
    bwd = _impl.op("triton", "demod_coefs_bwd")
    same_where_written(bwd(-d, d, q, w, styles, True, False)[0][-TAIL:], w[-TAIL:])


def images(*shape):
    return torch.ones(shape, dtype=torch.float16, requires_grad=True)


# More planes than the second axis of a GPU's grid has programs, tiles of an image, samples.
GRIDS = {
    "bias_act": lambda: gk.bias_act(images(128, 512, 4, 4), torch.ones(512), impl="triton"),
    "bias_act_parts": lambda: gk.bias_act(images(70_000, 2, 32), torch.ones(2), impl="triton"),
    "pixel_norm": lambda: gk.pixel_norm(images(2, 1, 6000, 6000), impl="triton"),
    "adain": lambda: adain(images(128, 513, 4, 4), "triton"),
    "upfirdn2d": lambda: blur(images(128, 512, 4, 4), "triton"),
    "epilogue": lambda: gk.synthesis_epilogue(images(128, 512, 4, 4), impl="triton"),
    "stddev": lambda: gk.minibatch_stddev(images(2, 2, 6000, 6000), impl="triton"),
    "stddev_groups": lambda: gk.minibatch_stddev(images(140_000, 2, 1, 1), 2, impl="triton"),
    "demod_coefs": lambda: gk.demod_coefs(
        torch.ones(1, 2, 1, 1), torch.ones(1_100_000, 2).requires_grad_(), impl="triton"
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_gpu_launches_the_grids_of_triton(name, last_programs):
    y = GRIDS[name]()
    y.backward(torch.ones_like(y))


def test_the_interpreter_notices_a_grid(device):
    """The check of conftest: the second and third axes of a GPU's grid end at 65535."""
    if device != "cpu":
        pytest.skip("Triton's interpreter runs on the CPU")
    triton = pytest.importorskip("triton")
    from conftest import limit_grids

    limit_grids()

    @triton.jit
    def nothing(out_ptr):
        pass

    for grid in ((1, 65536), (1, 1, 65536), (2**31,), (0,)):
        with pytest.raises(Exception, match="a GPU launches grids"):
            nothing[grid](torch.zeros(1))


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
