"""Calls that csrc/eager remembers: they give what the op's Python function gives, to the bit."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from harness import DTYPES, lay_out, randn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gankern import nn, ops
from gankern.nn import layers
from gankern.ops import _remember, no_weight_gradients
from gankern.ops.convolution import Form

F4 = ops.setup_filter([1, 3, 3, 1])
SHAPES = {"x": (2, 6, 5, 7), "plane": (2, 6), "channel": (6,), "f": (4, 4), "noise": (2, 1, 5, 7)}

# name: module, call of its tensors, and those.
OPS = {
    "bias_act": (
        "bias_act", lambda x, b, **k: ops.bias_act(x, b, act="lrelu", **k), "x", "channel",
    ),
    "bias_act alone": ("bias_act", lambda x, **k: ops.bias_act(x, act="swish", **k), "x"),
    "pixel_norm": ("pixel_norm", ops.pixel_norm, "x"),
    "minibatch_stddev": (
        "minibatch_stddev", lambda x, **k: ops.minibatch_stddev(x, 2, 2, **k), "x",
    ),
    "adain": ("adain", ops.adain, "x", "plane", "plane"),
    "demod_coefs": (
        "demod_coefs", lambda s, w, **k: ops.demod_coefs(w, s, **k), "plane", "x",
    ),
    "upfirdn2d": (
        "upfirdn2d",
        lambda x, f, **k: ops.upfirdn2d(x, f.detach(), 2, 1, [2, 1, 2, 1], gain=4, **k),
        "x", "f",
    ),
    "upsample2d": ("upfirdn2d", lambda x, f, **k: ops.upsample2d(x, f.detach(), **k), "x", "f"),
    "synthesis_epilogue": (
        "synthesis_epilogue",
        lambda x, d, s, b, z, **k: ops.synthesis_epilogue(x, None, d, z.detach(), s, b, **k),
        "x", "plane", "channel", "channel", "noise",
    ),
    "synthesis_epilogue filter": (
        "synthesis_epilogue",
        lambda x, d, b, f, **k: ops.synthesis_epilogue(
            x, f.detach(), d, b=b, padding=[2, 1, 2, 1], clamp=1, **k
        ),
        "x", "plane", "channel", "f",
    ),
}  # fmt: skip


learned = layers._quick_product
CONVOLUTIONS = "convolution", "modulated_conv2d", "synthesis_layer"


def module(name):
    return sys.modules[f"gankern.ops.{OPS[name][0]}"]


@pytest.fixture
def fresh(monkeypatch):
    """Every op with an empty memory; a call without it: fresh(False)."""
    if _remember.why_not():
        pytest.skip(_remember.why_not())
    modules = [*map(module, OPS), *(sys.modules[f"gankern.ops.{name}"] for name in CONVOLUTIONS)]
    kept = {m: m._checked if hasattr(m, "_checked") else m._call for m in modules}
    learn = {m: m._quick for m in kept}
    layers = sys.modules["gankern.ops.synthesis_epilogue"]
    valid = layers._quick_valid

    def switch(on=True):
        monkeypatch.setattr(layers, "_quick_valid", valid.again() if on else layers._valid)
        for m, call in kept.items():
            monkeypatch.setattr(m, "_quick", learn[m].again() if on else call)

    switch()
    return switch


def tensors(name, device, dtype=torch.float32, layout="contiguous", seed=0):
    found = []
    for i, kind in enumerate(OPS[name][2:]):
        if kind == "f":
            wide = dtype == torch.float64 and OPS[name][0] == "upfirdn2d"
            found.append(F4.to(device, dtype if wide else F4.dtype).clone())
        else:
            t = randn(*SHAPES[kind], seed=seed + i).to(device, dtype)
            found.append(lay_out(t, layout) if kind == "x" else t)
    return found


def results(name, inputs, **rest):
    """y, its gradients, and those of a penalty on them."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = OPS[name][1](*leaves, **rest)
    dy = torch.linspace(-1, 2, y.numel(), device=y.device).reshape(y.shape).to(y.dtype)
    wanted = leaves[: -1 if OPS[name][-1] in ("f", "noise") else None]
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    graph = torch.autograd.grad(y, wanted, dy, create_graph=True)
    penalty = sum(g.square().sum() for g in graph)
    second = ()
    if penalty.requires_grad:  # that of a linear op does not depend on its input
        second = torch.autograd.grad(penalty, wanted, allow_unused=True)
    with torch.no_grad():
        alone = OPS[name][1](*leaves, **rest)
    return [y, alone, *first, *graph, *second]


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.stride() == other.stride()
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_same_bits(fresh, impl, device, name, dtype, layout):
    """Calls of one kind, of other numbers each."""
    if impl == "triton" and (dtype == "f64" or layout == "sliced"):
        pytest.skip("not Triton's")
    cases = [tensors(name, device, DTYPES[dtype], layout, seed) for seed in range(4)]
    fresh(False)
    expected = [results(name, case, impl=impl) for case in cases]
    fresh()
    found = [results(name, case, impl=impl) for case in cases]
    for a, b in zip(found, expected, strict=True):
        same(a, b)
    quick = module(name)._quick
    assert (quick.hits > 0) == (impl != "reference"), quick.hits


@pytest.mark.parametrize("name", OPS)
def test_gradients_that_are_asked_for(fresh, device, name):
    """Every choice of inputs that take one, in turns."""
    op, kinds = OPS[name][1], OPS[name][2:]
    inputs = tensors(name, device)
    most = len([k for k in kinds if k not in ("f", "noise")])
    found = {}
    for on in (False, True):
        fresh(on)
        for turn in range(4):
            for chosen in range(1 << most):
                leaves = [t.clone().requires_grad_(bool(chosen >> i & 1 and i < most))
                          for i, t in enumerate(inputs)]  # fmt: skip
                y = op(*leaves)
                assert y.requires_grad == bool(chosen)
                if chosen:
                    y.backward(torch.ones_like(y))
                grads = [t.grad for t in leaves]
                if not on:
                    found[chosen] = [y, *grads]
                same([y, *grads], found[chosen])
            if not on and turn == 0:
                break


# x and weights of convolutions, and their forms: those of our kernels, and PyTorch's alone.
FORMS = {
    "3x3": ((2, 16, 16, 16), (24, 16, 3, 3), Form(1, (1, 1), False, (0, 0), 1)),
    "3x3 down": ((2, 16, 33, 33), (16, 16, 3, 3), Form(2, (0, 0), False, (0, 0), 1)),
    "3x3 up": ((2, 16, 16, 16), (16, 16, 3, 3), Form(2, (0, 0), True, (0, 0), 1)),
    "4x4": ((2, 16, 8, 8), (32, 16, 4, 4), Form(2, (1, 1), False, (0, 0), 1)),
    "4x4 up": ((2, 16, 4, 4), (16, 32, 4, 4), Form(2, (1, 1), True, (0, 0), 1)),
    "image": ((2, 3, 8, 8), (16, 3, 4, 4), Form(2, (1, 1), False, (0, 0), 1)),
    "1x1": ((2, 4, 5, 6), (3, 4, 1, 1), Form(1, (0, 0), False, (0, 0), 1)),
    "one output": ((2, 4, 5, 6), (1, 4, 3, 3), Form(1, (1, 1), False, (0, 0), 1)),
    "groups": ((2, 6, 8, 7), (4, 3, 3, 3), Form(2, (1, 0), False, (0, 0), 2)),
}


def orders(y, leaves, in_python=None, gated=False):
    """y, its gradients in the leaves that take some, those with a graph, and those of a penalty on
    them; whether the first ran no Python. gated: the first within no_weight_gradients."""
    wanted = [t for t in leaves if t.requires_grad]
    if not wanted:
        return [y], True
    in_python = [] if in_python is None else in_python
    dy = torch.empty_like(y).copy_(randn(*y.shape, seed=2))
    in_python.clear()
    with no_weight_gradients() if gated else contextlib.nullcontext():
        first = torch.autograd.grad(y, wanted, dy, retain_graph=True, allow_unused=True)
    without = not in_python
    graph = torch.autograd.grad(y, wanted, dy.requires_grad_(), create_graph=True)
    penalty = sum(g.square().sum() for g in graph)
    second = torch.autograd.grad(penalty, [*wanted, dy], allow_unused=True)
    return [y, *first, *graph, *second], without


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_convolutions(fresh, monkeypatch, device, name, own, layout):
    """Every choice of gradients, the second order, and no_weight_gradients."""
    module = sys.modules["gankern.ops.convolution"]
    x_shape, w_shape, form = FORMS[name]
    if own and not module.has_own_kernels(torch.ones(1, device=device), None):
        pytest.skip("no kernels of our own here")
    form = form._replace(own=own)
    x = lay_out(randn(*x_shape).to(device, torch.float32), layout)
    w = randn(*w_shape, seed=1).to(device, torch.float32)
    in_python = []
    backward = module._Convolution.backward
    monkeypatch.setattr(
        module._Convolution, "backward", lambda *a: in_python.append(a) or backward(*a)
    )

    def calls():
        found = []
        for choice in itertools.product((False, True), repeat=4):
            needs_x, needs_w, derived, gated = choice
            leaves = [x.detach().requires_grad_(needs_x), w.detach().requires_grad_(needs_w)]
            y = module.convolution(*leaves, form._replace(derived=derived))
            tensors, kept[choice] = orders(y, leaves, in_python, gated)
            found += tensors
        return found

    kept = {}
    fresh(False)
    expected = calls()
    fresh()
    for _ in range(4):
        same(calls(), expected)
    # Where there is nothing to copy, weights or images into the layout of our kernels.
    if name != "one output" and (not own or layout == "channels_last"):
        assert module._quick.hits > 0
        assert kept[True, True, False, False], kept


LINEAR = {  # kwargs of the layer, gain
    "plain": ({}, 1.0),
    "gain": ({"bias_init": 1.0}, 0.5),
    "no bias": ({"bias": False}, 1.0),
    "activation": ({"act": "lrelu", "lr_multiplier": 0.1}, 1.0),
}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(fresh, monkeypatch, device, name, dtype):
    """Every choice of gradients, the second order, and no_weight_gradients."""
    options, gain = LINEAR[name]
    layer = nn.EqualizedLinear(7, 5, **options).to(device, DTYPES[dtype])
    x = randn(3, 7).to(device, DTYPES[dtype])
    product, in_python = layers._ScaledProduct, []
    backward = product.backward
    monkeypatch.setattr(
        product, "backward", staticmethod(lambda *a: in_python.append(a) or backward(*a))
    )

    def calls():
        found = []
        for choice in itertools.product((False, True), repeat=3):
            needs_x, needs_weights, gated = choice
            leaves = [x.detach().requires_grad_(needs_x), *layer.parameters()]
            layer.requires_grad_(needs_weights)
            y = layer(leaves[0], gain)
            tensors, kept[choice] = orders(y, leaves, in_python, gated)
            found += tensors
        return found

    kept = {}
    fresh(False)
    monkeypatch.setattr(layers, "_quick_product", layers._product)
    expected = calls()
    fresh()
    quick = learned.again()
    monkeypatch.setattr(layers, "_quick_product", quick)
    for _ in range(4):
        same(calls(), expected)
    assert quick.hits > 0
    assert all(kept[needs_x, needs_weights, False] for needs_x, needs_weights, _ in kept), kept


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["conv2d_layer", "synthesis_layer"])
def test_layers(fresh, name, layout, device):
    """With one kernel for convolution and activation, and for styles and convolution."""
    x = lay_out(randn(2, 16, 16, 16).to(device, torch.float32), layout)
    w, s, b = (
        randn(*shape).to(device, torch.float32) for shape in ((24, 16, 3, 3), (2, 16), (24,))
    )

    def calls():
        found = []
        for needs in itertools.product((False, True), repeat=4):
            leaves = [
                t.detach().requires_grad_(n) for t, n in zip((x, w, s, b), needs, strict=True)
            ]
            if name == "conv2d_layer":
                del leaves[2]
                y = ops.conv2d_layer(leaves[0], leaves[1], leaves[2], padding=1, act="lrelu")
            else:
                y = ops.synthesis_layer(*leaves)
            found += orders(y, leaves)[0]
        return found

    fresh(False)
    expected = calls()
    fresh()
    for _ in range(4):
        same(calls(), expected)
    where = "synthesis_layer" if name == "conv2d_layer" else "modulated_conv2d"
    if device == "cpu" and ops._impl.default_impl("convolution", "cpu") == "cpu":
        assert sys.modules[f"gankern.ops.{where}"]._quick.hits > 0


def test_each_argument_counts(fresh, device):
    x, b = tensors("bias_act", device)
    calls = [
        lambda: ops.bias_act(x, b),
        lambda: ops.bias_act(x, b, act="relu"),
        lambda: ops.bias_act(x, b, act="lrelu", alpha=0.5),
        lambda: ops.bias_act(x, b, act="lrelu", alpha=0.25),
        lambda: ops.bias_act(x, b, gain=1),
        lambda: ops.bias_act(x, b, gain=2),
        lambda: ops.bias_act(x, b, gain=2.0, clamp=0.5),
        lambda: ops.bias_act(x, b, clamp=1),
        lambda: ops.bias_act(x),
        lambda: ops.bias_act(x[:, :, :2], b),
        lambda: ops.bias_act(x.transpose(2, 3), b),
        lambda: ops.bias_act(x.double(), b),
        lambda: ops.bias_act(x.double(), b.double()),
        lambda: ops.bias_act(x.mT.contiguous(), b[:5], dim=3),
        lambda: ops.upfirdn2d(x, F4.to(device), 2, padding=[2, 1, 2, 1]),
        lambda: ops.upfirdn2d(x, F4.to(device), 2, padding=(2, 1, 2, 1)),
        lambda: ops.upfirdn2d(x, F4.to(device), [2, 1], padding=[2, 1, 2, 1]),
        lambda: ops.upfirdn2d(x, F4.to(device), 2, padding=[2, 1, 2, 1], flip_filter=True),
        lambda: ops.upfirdn2d(x, F4.to(device), padding=2, gain=-0.0),
        lambda: ops.upfirdn2d(x, F4.to(device), padding=2, gain=0.0),
    ]
    fresh(False)
    expected = [c() for c in calls]
    fresh()
    for _ in range(3):
        same([c() for c in calls], expected)


def test_errors_stay(fresh, device):
    x, b = tensors("bias_act", device)
    for _ in range(4):
        ops.bias_act(x, b)
        with pytest.raises(ValueError, match=r"bias_act: b must have shape"):
            ops.bias_act(x, b[:3])
        with pytest.raises(TypeError, match=r"bias_act: x must be a tensor"):
            ops.bias_act("x", b)
        with pytest.raises(ValueError, match=r"upsample2d: padding must leave"):
            ops.upsample2d(x, F4.to(device), padding=-99)
        with pytest.raises(RuntimeError, match="cannot run"):
            ops.bias_act(x, b, impl="cuda" if device == "cpu" else "cpu")


def test_one_tensor_in_two_places(fresh, device):
    x, scale, shift = tensors("adain", device)
    expected = ops.adain(x, scale, shift, impl="reference")
    for _ in range(4):
        ops.adain(x, scale, scale)
    for _ in range(4):
        torch.testing.assert_close(ops.adain(x, scale, shift), expected, rtol=1e-4, atol=1e-5)
    for _ in range(3):
        both = ops.adain(x, scale, scale)
    torch.testing.assert_close(both, ops.adain(x, scale, scale.clone()), rtol=0, atol=0)


def test_within_no_weight_gradients(fresh, device):
    for _ in range(4):
        for off in (False, True):
            s, w = (t.requires_grad_() for t in tensors("demod_coefs", device))
            d = ops.demod_coefs(w, s)
            if off:
                with no_weight_gradients():
                    d.sum().backward()
            else:
                d.sum().backward()
            assert (w.grad is None) == off
            assert s.grad is not None


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


def test_whoever_looks_on_sees_the_call(fresh, device):
    """Modes, subclasses, transforms, tracing and profiles, of calls that are known already."""
    x = tensors("pixel_norm", device)[0]
    expected = ops.pixel_norm(x)
    for _ in range(3):
        ops.pixel_norm(x)
        ops.pixel_norm(x.clone().requires_grad_()).sum().backward()
    with Seen() as seen:
        ops.pixel_norm(x)
    impl = ops._impl.default_impl("pixel_norm", device)
    if impl != "reference":
        assert seen.names[-1].endswith("::pixel_norm")
    sub = ops.pixel_norm(x.as_subclass(Sub))
    assert type(sub) is Sub
    assert torch.equal(sub, expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert ops.pixel_norm(fake.from_tensor(x)).shape == x.shape
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(
        torch.func.vmap(lambda t: ops.pixel_norm(t, 0))(x), expected, **close
    )
    gradient = torch.func.grad(lambda t: ops.pixel_norm(t).square().sum())(x)
    assert gradient.abs().max() < 1e-3
    with forward_ad.dual_level():
        dual = ops.pixel_norm(forward_ad.make_dual(x, x))
        assert forward_ad.unpack_dual(dual).tangent.abs().max() < 1e-3
    traced = torch.jit.trace(ops.pixel_norm, (x,), check_trace=False)
    torch.testing.assert_close(traced(x * 2), ops.pixel_norm(x * 2), **close)
    with torch.profiler.profile() as profile:
        ops.pixel_norm(x)
    if impl != "reference":
        assert any(e.key.endswith("::pixel_norm") for e in profile.key_averages())
    with torch.inference_mode():
        assert torch.equal(ops.pixel_norm(x), expected)
    assert torch.equal(ops.pixel_norm(torch.nn.Parameter(x)), expected)


def test_compile_takes_the_python_function(fresh, device):
    x = tensors("pixel_norm", device)[0]
    for _ in range(3):
        expected = ops.pixel_norm(x)
    compiled = torch.compile(lambda t: ops.pixel_norm(t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_backward_within_a_compiled_step(fresh, device):
    """Dynamo looks at each frame of Python while a step of it runs."""
    x = tensors("pixel_norm", device)[0].requires_grad_()
    op = torch._dynamo.disable(ops.pixel_norm)

    def step(x):
        y = op(x)
        (y.square().sum() + (3 * y).sum()).backward()

    (expected,) = torch.autograd.grad(
        ops.pixel_norm(x).square().sum() + 3 * ops.pixel_norm(x).sum(), x
    )
    compiled = torch.compile(step, backend="eager")
    for _ in range(4):
        x.grad = None
        compiled(x)
        torch.testing.assert_close(x.grad, expected)


def test_compiled_autograd(fresh, device):
    x = tensors("pixel_norm", device)[0].requires_grad_()
    for _ in range(3):
        y = ops.pixel_norm(x)
        (expected,) = torch.autograd.grad(y.square().sum() + y.sum(), x)
    graphs = []

    def compiler(graph):
        graphs.append(graph)
        return graph

    from torch._dynamo import compiled_autograd

    for _ in range(3):
        x.grad, y = None, ops.pixel_norm(x)
        with compiled_autograd._enable(compiler):
            (y.square().sum() + y.sum()).backward()
        torch.testing.assert_close(x.grad, expected)
    assert graphs


@pytest.mark.parametrize(
    "name", ["conv2d_resample", "conv2d_layer", "synthesis_layer", "upsample2d"]
)
def test_compiled_autograd_where_a_gradient_asks_for_shapes(fresh, device, name):
    """It traces with a dy that has none; here dy's are channels-last, and expanded."""
    x = lay_out(randn(2, 16, 16, 16).to(device, torch.float32), "channels_last")
    w, s = (randn(*shape).to(device, torch.float32) for shape in ((24, 16, 3, 3), (2, 16)))
    leaves = [t.requires_grad_() for t in (x, w, s)]
    call = {
        "conv2d_resample": lambda x, w, s: ops.conv2d_resample(x, w, padding=1),
        "conv2d_layer": lambda x, w, s: ops.conv2d_layer(x, w, padding=1, act="lrelu"),
        "synthesis_layer": ops.synthesis_layer,
        "upsample2d": lambda x, w, s: ops.upsample2d(x, F4.to(device)),
    }[name]
    for _ in range(4):
        y = call(*leaves)
        dy = torch.empty_like(y).copy_(randn(*y.shape, seed=2))
        torch.autograd.grad((y * dy).sum() + y.sum(), leaves, allow_unused=True)

    from torch._dynamo import compiled_autograd

    for loss in (lambda y: (y * dy).sum() + y.sum(), torch.sum):
        expected = torch.autograd.grad(loss(call(*leaves)), leaves, allow_unused=True)
        for t in leaves:
            t.grad = None
        y = call(*leaves)
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            loss(y).backward()
        for t, e in zip(leaves, expected, strict=True):
            assert (t.grad is None) == (e is None)
            if e is not None:
                torch.testing.assert_close(t.grad, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_hooks_that_save_in_another_layout(fresh, device, name, own):
    """As torch.autograd.graph.save_on_cpu does with pinned memory."""
    module = sys.modules["gankern.ops.convolution"]
    if own and not module.has_own_kernels(torch.ones(1, device=device), None):
        pytest.skip("no kernels of our own here")
    x_shape, w_shape, form = FORMS[name]
    x = lay_out(randn(*x_shape).to(device, torch.float32), "channels_last").requires_grad_()
    w = randn(*w_shape, seed=1).to(device, torch.float32).requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t)
    found = []
    for i in range(8):
        with hooks if i in (4, 6) else contextlib.nullcontext():  # the gradient is known by then
            y = module.convolution(x, w, form._replace(own=own))
        found.append(torch.autograd.grad(y, (x, w), torch.ones_like(y)))
        for a, e in zip(found[-1], found[0], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


def test_graph_is_that_of_a_function(fresh, device):
    """Its node's name, saved-tensor hooks, checkpoints, a second backward, a change in place."""
    x = tensors("pixel_norm", device)[0].requires_grad_()
    for _ in range(3):
        y = ops.pixel_norm(x)
        y.sum().backward()
    assert y.grad_fn.name() == "PixelNormBackward"
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or len(kept) - 1,
                                                  lambda i: kept[i]):  # fmt: skip
        y = ops.pixel_norm(x)
    assert len(kept) == 1
    (with_hooks,) = torch.autograd.grad(y.square().sum() + y.sum(), x)
    z = checkpoint(ops.pixel_norm, x, use_reentrant=False)
    (again,) = torch.autograd.grad(z.square().sum() + z.sum(), x)
    y = ops.pixel_norm(x)
    (plain,) = torch.autograd.grad(y.square().sum() + y.sum(), x)
    assert torch.equal(plain, with_hooks)
    assert torch.equal(plain, again)
    inner = x * 1
    y = ops.pixel_norm(inner)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_kept_alive(fresh, device):
    x, b = tensors("bias_act", device)
    gone = []
    for _ in range(5):
        leaf = x.clone().requires_grad_()
        y = ops.bias_act(leaf, b, act="lrelu")
        y.sum().backward()
        gone += [weakref.ref(leaf), weakref.ref(y)]
        del leaf, y
    gc.collect()
    assert [r for r in gone if r() is not None] == []


def users(t: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata)


@pytest.mark.parametrize("name", list(OPS))
def test_kernels_give_back_their_arguments(fresh, name, device):
    """With and without a copy into another layout, remembered and not, and where a check fails."""
    inputs = tensors(name, device)
    inputs[0] = inputs[0].mT.contiguous().mT if inputs[0].ndim == 4 else inputs[0]
    before = [users(t) for t in inputs]
    for _ in range(4):
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = OPS[name][1](*leaves)
        wanted = leaves[: -1 if OPS[name][-1] in ("f", "noise") else None]
        torch.autograd.grad(y, wanted, torch.ones_like(y))
        with torch.no_grad():
            OPS[name][1](*inputs)
        del leaves, wanted, y
    op = getattr(torch.ops.gankern, OPS[name][0]).default
    kinds = [str(a.type) for a in op._schema.arguments]
    values = {"int": 1, "SymInt": 1, "float": 1.0, "bool": False, "Optional[Tensor]": inputs[-1]}
    for _ in range(3):
        with pytest.raises(RuntimeError):  # a tensor of no dimension
            op(*(values.get(kind, inputs[0][0, 0].flatten()[0]) for kind in kinds))
    gc.collect()
    assert [users(t) for t in inputs] == before


def test_an_argument_that_cannot_be_kept(device):
    """A dtype, say: the gradient stays Python's."""
    if _remember.why_not():
        pytest.skip(_remember.why_not())

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a)
            return torch.addmm(c, a, b, alpha=0.5)

        @staticmethod
        def backward(ctx, dy):
            return None, None, dy.sum(0, dtype=torch.float32)

    _, quick = _remember.remember_function(Product)
    a, b = torch.ones(2, 3, device=device), torch.ones(3, 4, device=device)
    c = torch.ones(4, device=device, requires_grad=True)
    for _ in range(4):
        y = quick(a, b, c)
        assert torch.equal(y, torch.full_like(y, 2.5))
        assert torch.equal(torch.autograd.grad(y.sum(), c)[0], torch.full_like(c, 2))
    assert quick.hits > 0


def test_more_kinds_than_are_kept(fresh, device):
    x = torch.ones(1, device=device)
    for n in (*range(1, 1100), *range(1, 20), *range(1, 20)):
        y = ops.pixel_norm(x.expand(n).contiguous(), 0)
        assert y.shape == (n,)
    torch.testing.assert_close(y, torch.ones(19, device=device))


def test_threads(fresh, device):
    """Calls of the same kinds and backwards from several threads at once."""
    inputs = [tensors("bias_act", device, seed=s) for s in range(4)]
    expected = [results("bias_act", case) for case in inputs]
    failed = []

    def work(i):
        try:
            for _ in range(50):
                same(results("bias_act", inputs[i]), expected[i])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failed == []


def test_without_the_extension(monkeypatch, tmp_path):
    code = (
        "import torch; from gankern.ops import _remember, pixel_norm; "
        "print(_remember.why_not(), pixel_norm(torch.ones(2, 3)).sum().item())"
    )
    environ = os.environ | {"GANKERN_REMEMBER": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == "not loaded: GANKERN_REMEMBER=0 6.0", done
    monkeypatch.setattr(_remember._impl, "PACKAGE", tmp_path)
    monkeypatch.delenv("GANKERN_REMEMBER", raising=False)
    assert _remember._load() == (None, "not built: there is no _build.json; reinstall gankern")
    about = {"torch": "1.0", "python": "3.8.1", "eager": {"built": True}}
    (tmp_path / "_build.json").write_text(json.dumps(about))
    assert _remember._load()[1] == (
        "not loaded: it is for Python 3.8 with torch 1.0; build gankern again"
    )
    about["eager"] = {"built": False, "reason": "no compiler"}
    (tmp_path / "_build.json").write_text(json.dumps(about))
    assert _remember._load()[1] == "not built: no compiler"
