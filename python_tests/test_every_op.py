"""What holds of every op: tracing, exporting, and the same bits from any number of threads."""

from __future__ import annotations

import functools

import pytest
import torch
from harness import DTYPES, lay_out, outputs_and_grads, randn, second_grads
from torch.utils._python_dispatch import TorchDispatchMode

from gankern.ops import (
    adain,
    bias_act,
    conv2d_layer,
    conv2d_resample,
    demod_coefs,
    minibatch_stddev,
    modulated_conv2d,
    modulated_gemm,
    pixel_norm,
    setup_filter,
    synthesis_epilogue,
    synthesis_layer,
    upfirdn2d,
)

# Enough for three threads, and for our own convolutions.
N, C, H, W = 4, 18, 21, 29
IMAGES, PLANE, STYLES, BIAS, WEIGHT = (N, C, H, W), (H, W), (N, C), (C,), (C, C, 3, 3)
F4, F12 = setup_filter([1, 3, 3, 1]), setup_filter(torch.linspace(-1, 2, 12))


def epilogue(x, d, s, b, z, **rest):
    return synthesis_epilogue(x, F4.to(x.device), d, z, s, b, [2, 1, 2, 1], clamp=2, **rest)


def generator(up, x, w, styles, b, z, **rest):
    f = F4.to(x.device) if up > 1 else None
    return synthesis_layer(x, w, styles, b, z, None, up, 1, f, **rest)


# name: op and shapes of its tensors. Behind a convolution or in an epilogue all but the images are
# float32.
OPS = {
    "bias_act": (functools.partial(bias_act, act="swish"), IMAGES, BIAS),
    "bias_act lrelu": (functools.partial(bias_act, act="lrelu"), IMAGES, BIAS),
    "pixel_norm": (pixel_norm, IMAGES),
    "minibatch_stddev": (minibatch_stddev, IMAGES),
    "adain": (adain, IMAGES, STYLES, STYLES),
    "demod_coefs": (demod_coefs, (96, 64, 3, 3), (N, 64)),
    "upfirdn2d up": (lambda x, **k: upfirdn2d(x, F4.to(x.device), 2, 1, [2, 1, 2, 1], **k), IMAGES),
    "upfirdn2d down": (lambda x, **k: upfirdn2d(x, F12.to(x.device), 1, 2, 5, **k), IMAGES),
    "synthesis_epilogue": (epilogue, IMAGES, STYLES, BIAS, BIAS, PLANE),
    "synthesis_epilogue flat": (
        lambda x, d, s, b, z, **k: synthesis_epilogue(x, None, d, z, s, b, **k),
        IMAGES, STYLES, BIAS, BIAS, PLANE,
    ),
    "conv2d_resample up": (
        lambda x, w, **k: conv2d_resample(x, w, F4.to(x.device), 2, padding=1, **k), IMAGES, WEIGHT,
    ),
    "conv2d_resample down": (
        lambda x, w, **k: conv2d_resample(x, w, F4.to(x.device), 1, 2, 1, **k), IMAGES, WEIGHT,
    ),
    "modulated_conv2d": (
        functools.partial(modulated_conv2d, padding=1), IMAGES, WEIGHT, STYLES,
    ),
    "modulated_conv2d grouped": (
        functools.partial(modulated_conv2d, padding=1, fused_modconv=True), IMAGES, WEIGHT, STYLES,
    ),
    "synthesis_layer": (
        functools.partial(generator, 1), IMAGES, WEIGHT, STYLES, BIAS, PLANE,
    ),
    "synthesis_layer up": (
        functools.partial(generator, 2), IMAGES, WEIGHT, STYLES, BIAS, (2 * H, 2 * W),
    ),
    "conv2d_layer": (
        lambda x, w, b, **k: conv2d_layer(x, w, b, padding=1, act="lrelu", **k),
        IMAGES, WEIGHT, BIAS,
    ),
    "conv2d_layer down": (
        lambda x, w, b, **k: conv2d_layer(x, w, b, F4.to(x.device), 1, 2, 1, act="lrelu", **k),
        IMAGES, WEIGHT, BIAS,
    ),
    "modulated_gemm": (
        lambda x, w, s, b, z, **k: modulated_gemm(x, w, s, b, z, **k),
        IMAGES, WEIGHT, STYLES, BIAS, PLANE,
    ),
}  # fmt: skip


def call(name, device, dtype=torch.float32, layout="contiguous"):
    """The op as a function of the other tensors."""
    op, *shapes = OPS[name]
    tensors = [randn(*shape, seed=i).float().to(device) for i, shape in enumerate(shapes)]
    tensors[0] = lay_out(tensors[0].to(dtype), layout)
    if name.split()[0] in ("bias_act", "adain", "demod_coefs"):
        tensors = [t.to(dtype) for t in tensors]
    # A noise map is a constant of the models.
    z = {"z": tensors.pop()} if shapes[-1] in (PLANE, (2 * H, 2 * W)) else {}
    return functools.partial(op, **z), tensors


class ConvolutionsOnOneThread(TorchDispatchMode):
    """PyTorch's: each of its threads has a sum of the weights' gradient."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten.convolution.default, BACKWARD):
            return func(*args, **(kwargs or {}))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.set_num_threads(threads)


BACKWARD = torch.ops.aten.convolution_backward.default


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", OPS)
def test_any_number_of_threads(device, name, dtype, layout):
    """y, first and second gradients."""
    if device != "cpu":
        pytest.skip("CPU kernels")
    op, inputs = call(name, device, DTYPES[dtype], layout)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            run = functools.partial(op, impl="cpu")
            with ConvolutionsOnOneThread():
                found.append([*outputs_and_grads(run, inputs), *second_grads(run, inputs)])
    finally:
        torch.set_num_threads(threads)
    for n, others in zip((2, 3), found[1:], strict=True):
        for i, (a, b) in enumerate(zip(found[0], others, strict=True)):
            assert torch.equal(a, b), f"{n} threads, result {i}"


@pytest.mark.parametrize("name", OPS)
def test_traced(impl, device, name):
    """torch.compile without a break, forward and backward."""
    if impl in ("triton", "simt") and device == "cpu":
        pytest.skip("the interpreter refuses fake tensors; simt's ops have the CPU's fakes")
    op, inputs = call(name, device)
    run = functools.partial(op, impl=impl)
    torch._dynamo.reset()  # which counts what it compiled before
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    pairs = zip(outputs_and_grads(compiled, inputs), outputs_and_grads(run, inputs), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", OPS)
def test_exported(device, name):
    op, inputs = call(name, device)

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return op(*tensors)

    program = torch.export.export(Layer(), tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), op(*inputs))


# --- On a GPU: nothing waits for it, and memory is the outputs' and little scratch.

KERNELS = [name for name in OPS if hasattr(torch.ops.gankern, name.split()[0])]


def differentiated(op, inputs, dy):
    """y and gradients, and of a gradient the gradients, as R1 and path length take them."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = op(*leaves)
    grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
    second = []
    if grads[0].requires_grad:  # else the op is linear
        second = torch.autograd.grad(grads[0].square().sum(), leaves, allow_unused=True)
    return [t for t in (y, *grads, *second) if t is not None]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("name", OPS)
def test_captured_as_a_cuda_graph(impl, device, name, dtype, monkeypatch):
    """Orders 0 to 2: what waits for the GPU, or depends on values, cannot be captured."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    monkeypatch.setitem(globals(), "F4", F4.to(device))  # a copy from the CPU waits
    monkeypatch.setitem(globals(), "F12", F12.to(device))
    op, inputs = call(name, device, DTYPES[dtype])
    run = functools.partial(op, impl=impl)
    dy = torch.randn_like(run(*inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = differentiated(run, inputs, dy)
    torch.cuda.current_stream().wait_stream(stream)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiated(run, inputs, dy)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = differentiated(run, inputs, dy)
    for _ in range(2):
        for t in found:
            t.detach().fill_(float("nan"))
        graph.replay()
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(a, b, msg=lambda text, i=i: f"result {i}: {text}")


def allocated(f):
    """Tensors that f allocates on the GPU, and their bytes."""
    f()
    counts = ("allocation.all.allocated", "requested_bytes.all.allocated")
    before = torch.cuda.memory_stats()
    kept = f()
    after = torch.cuda.memory_stats()
    del kept
    return [after[name] - before[name] for name in counts]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", KERNELS)
def test_memory_of_a_kernel(impl, device, name, layout, monkeypatch):
    """A forward and a backward allocate outputs, and sums that blocks leave for each other."""
    if device != "cuda" or impl == "reference":
        pytest.skip("needs a GPU")
    monkeypatch.setitem(globals(), "F4", F4.to(device))
    monkeypatch.setitem(globals(), "F12", F12.to(device))
    op, inputs = call(name, device, layout=layout)
    run = functools.partial(op, impl=impl)
    # What the gradient needs besides is an output of the registered operation: adain's mean and
    # 1 / deviation, the squares of demod_coefs. So is the epilogue's gradient of its noise.
    aux = {"adain": 1, "demod_coefs": 1}.get(name, 0)
    with torch.no_grad():
        y = run(*inputs)
        count, size = allocated(lambda: run(*inputs))
    scratch = 1
    assert count <= 1 + aux + scratch
    inside = sum(t.numel() * t.element_size() for t in inputs)
    outside = y.numel() * y.element_size()
    assert size <= outside + max(inside // 10, 4096) + (inside if name == "demod_coefs" else 0)
    leaves = [t.detach().requires_grad_() for t in inputs]
    y, dy = run(*leaves), torch.randn_like(y)
    count, _ = allocated(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))
    assert count <= len(leaves) + name.startswith("synthesis_epilogue") + scratch
