"""Layers of StyleGAN2's synthesis network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gankern.nn.layers import FILTER, EqualizedLinear, _beside, _known
from gankern.ops.bias_act import ACTS
from gankern.ops.modulated_conv2d import modulated_conv2d
from gankern.ops.synthesis_layer import synthesis_layer
from gankern.ops.upfirdn2d import setup_filter


class ModulatedConv2d(nn.Module):
    """Convolution whose weights each sample scales by its style: `gankern.ops.modulated_conv2d`.

    Args:
        in_channels, out_channels: of x [N, I, H, W] and y [N, O, H', W'].
        kernel_size: odd, default 3.
        w_dim: features of w [N, w_dim], from which a linear layer makes the styles; None: forward
            takes the styles [N, I] themselves.
        up, down: factors of resampling, default 1.
        resample_filter: taps of its filter, default (1, 3, 3, 1).
        demodulate: normalise the weights, default True.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        w_dim: int | None = None,
        up: int = 1,
        down: int = 1,
        resample_filter: Sequence[float] = FILTER,
        demodulate: bool = True,
    ) -> None:
        super().__init__()
        self.up, self.down, self.demodulate = up, down, demodulate
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.affine = None if w_dim is None else EqualizedLinear(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.register_buffer("resample_filter", setup_filter(resample_filter))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [N, I, H, W], w [N, w_dim] (or the styles [N, I]) → [N, O, H', W']."""
        gain = 1.0 if self.demodulate else self.weight_gain
        styles = w * gain if self.affine is None else self.affine(w, gain)
        return modulated_conv2d(
            x, self.weight, styles, None, self.up, self.down, self.padding,
            self.resample_filter.float(), self.demodulate, flip_weight=self.up == 1,
        )  # fmt: skip

    def extra_repr(self) -> str:
        o, i, k, _ = self.weight.shape
        return f"{i}, {o}, {k}, up={self.up}, down={self.down}, demodulate={self.demodulate}"


class SynthesisLayer(nn.Module):
    """One layer of StyleGAN2: style, convolution, upsampling, noise, bias, activation.

    `gankern.ops.synthesis_layer` behind a linear layer. Its parameters bear the names of published
    checkpoints: affine, weight, noise_strength, bias; buffers resample_filter and noise_const.

    Args:
        in_channels, out_channels: of x [N, I, H, W] and y [N, O, H * up, W * up].
        w_dim: features of w, [N, w_dim].
        resolution: height and width of y, for the constant noise; int or (height, width). None:
            no constant noise.
        kernel_size: odd, default 3.
        up: factor of upsampling, default 1.
        use_noise: whether noise is added, default True.
        act: activation, default "lrelu", with its default gain.
        resample_filter: taps of the filter, default (1, 3, 3, 1).
        clamp: largest magnitude of y; None: not clamped. For float16, 256 keeps it in range.
    """

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int | tuple[int, int] | None = None,
        kernel_size: int = 3,
        up: int = 1,
        use_noise: bool = True,
        act: str = "lrelu",
        resample_filter: Sequence[float] = FILTER,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.up, self.use_noise, self.act, self.clamp = up, use_noise, _known(act), clamp
        self.padding = kernel_size // 2
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        if use_noise:
            self.noise_strength = nn.Parameter(torch.zeros(()))
            if resolution is not None:
                size = (resolution, resolution) if isinstance(resolution, int) else resolution
                self.register_buffer("noise_const", torch.randn(size))

    def forward(
        self, x: Tensor, w: Tensor, noise_mode: str = "random", gain: float = 1.0
    ) -> Tensor:
        """noise_mode: "random", "const" or "none". gain: an additional factor on y and clamp."""
        noise = self._noise(x, noise_mode)
        return synthesis_layer(
            x, self.weight, self.affine(w), _beside(self.bias, x), noise,
            None if noise is None else _beside(self.noise_strength, x),
            self.up, self.padding, self.resample_filter.float(), flip_weight=self.up == 1,
            act=self.act, gain=ACTS[self.act].gain * gain,
            clamp=None if self.clamp is None else self.clamp * gain,
        )  # fmt: skip

    def _noise(self, x: Tensor, mode: str) -> Tensor | None:
        if mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode must be random, const or none, got {mode!r}")
        if not self.use_noise or mode == "none":
            return None
        if mode == "const":
            return _beside(self.noise_const, x)
        n, _, h, w = x.shape
        return torch.randn(n, 1, h * self.up, w * self.up, device=x.device)

    def extra_repr(self) -> str:
        o, i, k, _ = self.weight.shape
        return f"{i}, {o}, {k}, up={self.up}, act={self.act!r}, use_noise={self.use_noise}"


class ToRGB(nn.Module):
    """Features to colours: a modulated convolution without demodulation, and a bias.

    Args:
        in_channels: of x, [N, I, H, W].
        out_channels: of the image, default 3.
        w_dim: features of w, [N, w_dim].
        kernel_size: odd, default 1.
        clamp: largest magnitude of the output; None: not clamped.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 3,
        w_dim: int = 512,
        kernel_size: int = 1,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.clamp, self.padding = clamp, kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [N, I, H, W], w [N, w_dim] → [N, out_channels, H, W]."""
        return synthesis_layer(
            x, self.weight, self.affine(w, self.weight_gain), _beside(self.bias, x),
            padding=self.padding, demodulate=False, act="linear", clamp=self.clamp,
        )  # fmt: skip
