"""Adaptive instance normalisation, the style input of StyleGAN 1."""

from __future__ import annotations

import torch


def adain(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float = 1e-5,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Normalise each sample's channel over its pixels, then scale and shift it by the style.

    y[n, c] = scale[n, c] * (x[n, c] - mean(x[n, c])) * rsqrt(var(x[n, c]) + eps) + shift[n, c]

    The variance is the biased one. `scale` multiplies as it is: where a network learns an offset
    from one, as StyleGAN's code does, pass `1 + style`.

    Args:
        x: (N, C, *) features, float32, float16, bfloat16 or float64, any strides.
        scale: (N, C) of x's dtype or, beside a 16-bit x, float32.
        shift: (N, C) of scale's dtype.
        eps: added to the variance, > 0 keeps a constant channel finite.
        impl: "cuda", "triton", "cpu" or "reference"; None takes the best usable one.

    Returns:
        (N, C, *) of x's dtype and memory format; 16-bit inputs are accumulated in float32.

    Raises:
        TypeError: x, scale or shift is not a floating-point tensor of a supported dtype, or eps is
            not a number.
        ValueError: x has under 3 dimensions, scale or shift is not (N, C) or lies on another
            device, eps is negative, or impl cannot run.

    Gradients: any order in x, scale and shift. Source: Huang and Belongie 2017 (arXiv:1703.06868);
    Karras et al. 2019 (arXiv:1812.04948), equation 1.
    """
    _check(x, scale, shift, eps)
    return adain_reference(x, scale, shift, eps)


def _check(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> None:
    for name, t in (("x", x), ("scale", scale), ("shift", shift)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"adain: {name} must be a tensor, got {type(t).__name__}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"adain: {name} must be a floating-point tensor, got {t.dtype}")
    if x.ndim < 3:
        raise ValueError(f"adain: x must be (N, C, *), got {x.ndim} dimensions {tuple(x.shape)}")
    for name, t in (("scale", scale), ("shift", shift)):
        if t.shape != x.shape[:2]:
            raise ValueError(
                f"adain: {name} must be (N, C) = {tuple(x.shape[:2])}, got {tuple(t.shape)}"
            )
        if t.device != x.device:
            raise ValueError(f"adain: {name} must be on {x.device} like x, got {t.device}")
    if scale.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        wanted = f"{x.dtype} like x" + ("" if x.dtype.itemsize > 2 else " or torch.float32")
        raise TypeError(f"adain: scale must be {wanted}, got {scale.dtype}")
    if shift.dtype != scale.dtype:
        raise TypeError(f"adain: shift must be {scale.dtype} like scale, got {shift.dtype}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"adain: eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"adain: eps must be at least 0, got {eps}")


def adain_reference(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """The formula of `adain` in plain PyTorch, differentiable to any order."""
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    dims = tuple(range(2, x.ndim))
    var, mean = torch.var_mean(x, dims, unbiased=False, keepdim=True)
    shape = (*x.shape[:2], *[1] * len(dims))
    scale, shift = scale.to(x.dtype).reshape(shape), shift.to(x.dtype).reshape(shape)
    return ((x - mean) * (var + eps).rsqrt() * scale + shift).to(dtype)
