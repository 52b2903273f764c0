"""Batch normalisation in training and the activation behind it, in one pass less each way.

The kernels are the CPU's: what one pair of passes computes takes PyTorch's `batch_norm` and an
activation twice as many. On a GPU, under a compiler and in a transform these two run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import Plan, remember
from gankern.ops.bias_act import ACTS, activation, bias_act

OP = "batch_norm_act"
LAST_ACT = ACTS["lrelu"].code  # those up to it are one function, of slope alpha below 0


def batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    eps: float = 1e-5, momentum: float = 0.1, act: str = "linear", alpha: float | None = None,
    gain: float | None = None, *, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """y = gain * act((x - mean) * rsqrt(var + eps) * weight + bias), mean and var of this batch.

    The running averages take `momentum` of the new mean and of the unbiased variance, in place.

    Args:
        x: [N, C, *] with more than one value a channel; any strides, dense ones are kept.
        weight, bias, running_mean, running_var: [C].
        act, alpha, gain: as `bias_act`.
        impl: None (the best that can run), "cpu" or "reference".

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: impl cannot run here.

    Gradients: in x, weight and bias, of any order. The first is a kernel; where it is recorded
    itself, it and those above are composed of PyTorch's operations. Saves x, weight, bias and [C]
    statistics.
    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """
    args = (x, weight, bias, running_mean, running_var, eps, momentum, act, alpha, gain, impl)
    return (_call if is_compiling() else _quick)(*args)


def _plan(
    x, weight, bias, running_mean, running_var, eps, momentum, act, alpha, gain, impl
) -> Plan:
    _impl.check_float(OP, "x", x)
    parameters = weight, bias, running_mean, running_var
    names = "weight", "bias", "running_mean", "running_var"
    for name, t in zip(names, parameters, strict=True):
        _impl.check_float(OP, name, t)
    alpha_of, gain_of, _ = activation(OP, act, alpha, gain, None)
    reason = _why_no_kernel(x, parameters, act, impl)
    if not reason:
        numbers = float(eps), float(momentum), ACTS[act].code, alpha_of, gain_of
        return _fwd, (x, *parameters, numbers)
    if impl not in (None, "reference"):
        raise RuntimeError(f"{OP}: impl={impl!r} cannot run: {reason}")
    rest = float(eps), float(momentum), act, alpha, gain, impl
    return batch_norm_then_act, (x, *parameters, *rest)


def _why_no_kernel(x: Tensor, parameters: tuple[Tensor, ...], act: str, impl: str | None) -> str:
    """Why the kernel is not to run; empty if it is."""
    if impl not in (None, "cpu", "reference"):
        error = ValueError if isinstance(impl, str) else TypeError
        raise error(f"{OP}: impl must be None, cpu or reference, got {_impl.shown(impl)}")
    if impl == "reference" or is_compiling():
        return "PyTorch's operations are to"
    reason = _impl.why_not("cpu", x.device.type, OP)
    if reason:
        return reason
    if impl is None and _impl.default_impl(OP, "cpu") != "cpu":
        return "the reference is the default"
    if _impl.transformed():
        return "kernels have no transforms of torch.func and no forward mode: use impl=None"
    if ACTS[act].code > LAST_ACT:
        return f"it has no {act}: use impl=None"
    if x.dim() < 2 or x.numel() <= x.shape[1]:
        return f"x must be (N, C, *) with more than one value a channel, got {tuple(x.shape)}"
    dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1:2]
    for t in parameters:
        if t.dtype != dtype or t.device != x.device:
            return f"parameters must be {dtype} beside an x of {x.dtype}, got {t.dtype}"
        if t.shape != channels or not t.is_contiguous():
            return f"parameters must be contiguous of shape ({x.shape[1]},), got {tuple(t.shape)}"
    return ""


def batch_norm_then_act(
    x, weight, bias, running_mean, running_var, eps, momentum, act, alpha, gain, impl=None
) -> Tensor:
    """The same by PyTorch's batch normalisation and `bias_act`."""
    x = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    return activated(x, act, alpha, gain, impl)


def activated(
    x: Tensor, act: str, alpha: float | None, gain: float | None, impl: str | None = None
) -> Tensor:
    """gain * act(x), x itself where that is nothing."""
    if act == "linear" and gain in (None, 1):
        return x
    return bias_act(x, act=act, alpha=alpha, gain=gain, impl=impl)


def _bwd_reference(dy, x, weight, bias, eps, act, alpha, gain) -> tuple[Tensor, Tensor, Tensor]:
    """What batch_norm_act_bwd computes, differentiably."""
    axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    w, b = weight.view(shape), bias.view(shape)
    d = x.to(w.dtype)
    d = d - d.mean(axes, keepdim=True)
    rstd = (d.square().mean(axes, keepdim=True) + eps).rsqrt()
    h = d * rstd
    g = dy.to(w.dtype) * gain
    if act != "linear":  # the second derivative of lrelu is 0, not nothing: bias has a gradient
        slope = 0.0 if act == "relu" else alpha
        g = torch.ops.aten.leaky_relu_backward(g, h * w + b, slope, False)
    gh = g * h
    dx = w * rstd * (g - g.mean(axes, keepdim=True) - h * gh.mean(axes, keepdim=True))
    return dx.to(x.dtype), gh.sum(axes), g.sum(axes)


# --- Shape functions of the registered ops.


def _fake_fwd(x, weight, bias, running_mean, running_var, eps, momentum, act, alpha, gain):
    return torch.empty_like(x), weight.new_empty((2, x.shape[1]))


def _fake_bwd(dy, x, weight, bias, statistics, act, alpha, gain):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


_impl.register_fake(OP, _fake_fwd)
_impl.register_fake(OP + "_bwd", _fake_bwd)


# --- Autograd.


def _fwd(x, weight, bias, running_mean, running_var, numbers) -> Tensor:
    if _impl.records(x, weight, bias):
        return _BatchNormAct.apply(x, weight, bias, running_mean, running_var, numbers)
    return _impl.op("cpu", OP)(x, weight, bias, running_mean, running_var, *numbers)[0]


class _BatchNormAct(torch.autograd.Function):
    """y from x, weight and bias; keeps mean and rstd of each channel for the gradient."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, running_mean, running_var, numbers):
        averages = running_mean, running_var
        y, statistics = _impl.op("cpu", OP)(x, weight, bias, *averages, *numbers)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.numbers = numbers
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        x, weight, bias, statistics = ctx.saved_tensors
        eps, _, code, alpha, gain = ctx.numbers
        if torch.is_grad_enabled():
            act = list(ACTS)[code]
            grads = _bwd_reference(dy, x, weight, bias, eps, act, alpha, gain)
        else:
            bwd = _impl.op("cpu", OP + "_bwd")
            grads = bwd(dy, x, weight, bias, statistics, code, alpha, gain)
        return (*grads, None, None, None)


_call, _quick = remember(_plan, _fwd, _BatchNormAct)
