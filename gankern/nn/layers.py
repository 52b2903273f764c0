"""Layers of progressive GAN and StyleGAN: equalised, fused, resampling, normalising."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import Plan, remember
from gankern.ops.adain import adain
from gankern.ops.bias_act import ACTS, bias_act
from gankern.ops.conv2d_resample import conv_dtype
from gankern.ops.convolution import weight_gradients
from gankern.ops.minibatch_stddev import minibatch_stddev
from gankern.ops.pixel_norm import pixel_norm
from gankern.ops.synthesis_layer import conv2d_layer
from gankern.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upsample2d

# The binomial filter of StyleGAN2's resampling.
FILTER = (1, 3, 3, 1)


class EqualizedLinear(nn.Module):
    """y = act(x @ (weight * c)ᵀ + bias * lr_multiplier) * gain, with c = lr_multiplier / √in.

    Weights start as unit normals over lr_multiplier and are scaled at run time, so that Adam moves
    all layers at one relative speed (Karras et al. 2018, arXiv:1710.10196, section 4.1).

    Args:
        in_features: features of x, [..., in_features].
        out_features: features of y, [..., out_features].
        bias: whether there is a bias, default True.
        act: activation, as `gankern.ops.bias_act`, with its default gain.
        lr_multiplier: learning rate of this layer relative to the others, default 1.
        bias_init: first value of every bias, default 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        act: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.act = _known(act)
        self.lr_multiplier = lr_multiplier
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        start = torch.full([out_features], bias_init / lr_multiplier)
        self.bias = nn.Parameter(start) if bias else None

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """gain: an additional factor on y."""
        dtype = conv_dtype(x)
        rows, w = x.to(dtype).reshape(-1, x.shape[-1]), self.weight.to(dtype).t()
        b: Tensor | None = self.bias
        if self.act == "linear":
            b = None if b is None else b.to(dtype)
            scales = self.weight_gain * gain, self.lr_multiplier * gain
            y = _scaled_product(rows, w, b, *scales)
            return y.reshape(*x.shape[:-1], y.shape[-1])
        y = _scaled_product(rows, w, None, self.weight_gain, 0.0)
        if b is not None:
            b = _beside(b if self.lr_multiplier == 1 else b * self.lr_multiplier, y)
        y = bias_act(y, b, act=self.act, gain=ACTS[self.act].gain * gain)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, act={self.act!r}"


def _scaled_product(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, weights: bool = True
) -> Tensor:
    """alpha a @ b + beta c, differentiable to any order; c may be None."""
    if c is None:
        beta = 0.0
        c = None if is_compiling() else a.new_empty(())  # an argument of addmm, never read
    call = _product if is_compiling() else _quick_product
    return call(a, b, c, alpha, beta, weights)


def _plan(a, b, c, alpha, beta, weights) -> Plan:
    return (_by_torch if _impl.transformed() else _run), (a, b, c, alpha, beta, weights)


def _by_torch(a, b, c, alpha, beta, weights) -> Tensor:
    y = torch.mm(a, b) * alpha
    return y if beta == 0 else y + c * beta


def _run(a, b, c, alpha, beta, weights) -> Tensor:
    return _ScaledProduct.apply(a, b, c, alpha, beta, weights)


def _addmm(c: Tensor | None, a: Tensor, b: Tensor, alpha: float, beta: float) -> Tensor:
    """With beta 0 c lends its shape alone, if it is any."""
    if c is None or (beta == 0 and is_compiling()):  # which may multiply c by 0
        return torch.mm(a, b) * alpha
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


class _ScaledProduct(torch.autograd.Function):
    """alpha a @ b + beta c, [M, K] @ [K, N] + [N]; c may be None; its gradients are such products.

    The scale is the product's own, where autograd's would be a pass over weights and gradients.
    weights: b and c are some, whose gradients `no_weight_gradients` switches off.
    """

    @staticmethod
    def forward(ctx: Any, a, b, c, alpha, beta, weights):
        ctx.save_for_backward(a, b)
        ctx.args = (alpha, beta, weights)
        return _addmm(c, a, b, alpha, beta)

    @staticmethod
    def backward(ctx: Any, dy):
        a, b = ctx.saved_tensors
        alpha, beta, weights = ctx.args
        wanted = not weights or weight_gradients()
        needs = ctx.needs_input_grad

        def product(p, q, like, weights):
            if torch.is_grad_enabled():
                return _scaled_product(p, q, None, alpha, 0.0, weights)
            return _addmm(like, p, q, alpha, 0.0)

        da = product(dy, b.t(), a, weights) if needs[0] else None
        db = None
        if needs[1] and wanted:  # in the memory format of b
            if b.is_contiguous():
                db = product(a.t(), dy, b, False)
            else:
                db = product(dy.t(), a, b.t(), False).t()
        dc = dy.sum(0) if needs[2] and wanted else None
        if dc is not None and beta != 1:
            dc = torch.ops.aten.mul.Scalar(dc, beta)
        return da, db, dc, None, None, None


_product, _quick_product = remember(_plan, _run, _ScaledProduct)


class EqualizedConv2d(nn.Module):
    """Convolution with run-time scaled weights, resampling, bias and activation in few passes.

    y = clamp(act(conv2d_resample(x, weight * c) + bias) * gain), c = lr_multiplier / √fan_in. The
    convolution and filter are `gankern.ops.conv2d_resample`; bias, activation, gain, clamp and the
    filter behind an upsampling run as one kernel.

    Args:
        in_channels, out_channels: of x [N, I, H, W] and y [N, O, H', W'].
        kernel_size: odd, default 3; the size is kept but for up and down.
        bias: whether there is a bias, default True.
        act: activation, as `gankern.ops.bias_act`, with its default gain.
        up, down: factors of resampling, default 1.
        resample_filter: taps of its filter, default (1, 3, 3, 1).
        clamp: largest magnitude of y; None: not clamped.
        lr_multiplier: learning rate of this layer relative to the others, default 1.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        bias: bool = True,
        act: str = "linear",
        up: int = 1,
        down: int = 1,
        resample_filter: Sequence[float] = FILTER,
        clamp: float | None = None,
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.act, self.up, self.down, self.clamp = _known(act), up, down, clamp
        self.lr_multiplier = lr_multiplier
        self.padding = kernel_size // 2
        self.weight_gain = lr_multiplier / math.sqrt(in_channels * kernel_size**2)
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.randn(shape) / lr_multiplier)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", setup_filter(resample_filter))

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """gain: an additional factor on y, as of a residual branch; clamp is scaled with it."""
        b: Tensor | None = self.bias
        in_weights = 1.0
        if self.act == "linear" and b is None and self.clamp is None:
            in_weights, gain = gain, 1.0  # then y is the convolution's output
        elif b is not None and self.lr_multiplier != 1:
            b = b * self.lr_multiplier
        return conv2d_layer(
            x, self.weight * (self.weight_gain * in_weights), None if b is None else _beside(b, x),
            self.resample_filter.float(), self.up, self.down, self.padding,
            flip_weight=self.up == 1, act=self.act, gain=ACTS[self.act].gain * gain,
            clamp=None if self.clamp is None else self.clamp * gain,
        )  # fmt: skip

    def extra_repr(self) -> str:
        o, i, k, _ = self.weight.shape
        return f"{i}, {o}, {k}, act={self.act!r}, up={self.up}, down={self.down}"


class FusedLeakyReLU(nn.Module):
    """y = lrelu(x + bias, negative_slope) * scale, in one pass, with a learned bias.

    Args:
        channels: of x, [N, C, *]; None: without a bias.
        negative_slope: default 0.2.
        scale: default √2, which keeps the variance.
    """

    def __init__(
        self, channels: int | None, negative_slope: float = 0.2, scale: float = math.sqrt(2)
    ) -> None:
        super().__init__()
        self.bias = None if channels is None else nn.Parameter(torch.zeros(channels))
        self.negative_slope, self.scale = negative_slope, scale

    def forward(self, x: Tensor) -> Tensor:
        b = None if self.bias is None else _beside(self.bias, x)
        return bias_act(x, b, act="lrelu", alpha=self.negative_slope, gain=self.scale)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}, scale={self.scale:.4g}"


class PixelNorm(nn.Module):
    """Scale every vector along `dim` to a mean square of one: `gankern.ops.pixel_norm`.

    Args:
        dim: the dimension that holds a vector, default 1.
        eps: added to the mean square, default 1e-8.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(x, self.dim, self.eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}"


class MinibatchStdDev(nn.Module):
    """Append the standard deviation over the batch as channels: `gankern.ops.minibatch_stddev`.

    Args:
        group_size: samples in a group, default 4; None: the whole batch.
        num_channels: channels to append, default 1.
    """

    def __init__(self, group_size: int | None = 4, num_channels: int = 1) -> None:
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x: Tensor) -> Tensor:
        return minibatch_stddev(x, self.group_size, self.num_channels)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, num_channels={self.num_channels}"


class NoiseInjection(nn.Module):
    """y = x + strength * noise, the same noise for all channels (StyleGAN).

    Args:
        channels: strengths to learn, one a channel (StyleGAN 1); None: one for all (StyleGAN2).
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(() if channels is None else (channels,)))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """noise [N, 1, H, W] of x [N, C, H, W]; None: drawn anew."""
        if noise is None:
            noise = torch.randn(x.shape[0], 1, *x.shape[2:], device=x.device, dtype=x.dtype)
        strength = self.strength.to(x.dtype).reshape(-1, *[1] * (x.ndim - 2))
        return torch.addcmul(x, noise.to(x.dtype), strength)


class AdaIN(nn.Module):
    """Instance norm whose scale and shift come from w: `gankern.ops.adain` behind a linear layer.

    y = (1 + scale(w)) * (x - mean) / std + shift(w) (Karras et al. 2019, arXiv:1812.04948, eq. 1).

    Args:
        channels: C of x, [N, C, *].
        w_dim: features of w, [N, w_dim].
        eps: added to the variance, default 1e-5.
    """

    def __init__(self, channels: int, w_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.affine = EqualizedLinear(w_dim, 2 * channels)
        self.eps = eps

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale, shift = self.affine(w).to(torch.promote_types(x.dtype, torch.float32)).chunk(2, 1)
        return adain(x, scale + 1, shift, self.eps)


class Upsample(nn.Module):
    """Larger by `factor`, filtered, brightness kept: `gankern.ops.upsample2d`.

    Args:
        factor: default 2.
        resample_filter: taps, default (1, 3, 3, 1).
    """

    resample_filter: Tensor

    def __init__(self, factor: int = 2, resample_filter: Sequence[float] = FILTER) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("resample_filter", setup_filter(resample_filter))

    def forward(self, x: Tensor) -> Tensor:
        return upsample2d(x, self.resample_filter.float(), self.factor)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Downsample(Upsample):
    """Filtered, then smaller by `factor`: `gankern.ops.downsample2d`. Arguments as `Upsample`."""

    def forward(self, x: Tensor) -> Tensor:
        return downsample2d(x, self.resample_filter.float(), self.factor)


class Blur(nn.Module):
    """Filtered, size kept: `gankern.ops.filter2d`.

    Args:
        resample_filter: taps, default (1, 2, 1) as in StyleGAN 1.
    """

    resample_filter: Tensor

    def __init__(self, resample_filter: Sequence[float] = (1, 2, 1)) -> None:
        super().__init__()
        self.register_buffer("resample_filter", setup_filter(resample_filter))

    def forward(self, x: Tensor) -> Tensor:
        return filter2d(x, self.resample_filter.float())


def _known(act: str) -> str:
    if act not in ACTS:
        raise ValueError(f"act must be one of {', '.join(ACTS)}, got {act!r}")
    return act


def _beside(b: Tensor, x: Tensor) -> Tensor:
    """b as the kernels take it beside x: float32, or x's own dtype."""
    return b if b.dtype in (x.dtype, torch.float32) else b.to(x.dtype)
