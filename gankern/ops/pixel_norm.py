"""Pixelwise feature vector normalisation of progressive GAN and of StyleGAN's mapping network."""

from __future__ import annotations

import torch


def pixel_norm(
    x: torch.Tensor,
    dim: int = 1,
    eps: float = 1e-8,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Scale every vector along `dim` to a mean square of one.

    y = x * rsqrt(mean(x², dim) + eps)

    Args:
        x: (..., C, ...) features or latents, float32, float16, bfloat16 or float64, any strides.
        dim: the dimension that holds a vector; negative counts from the end.
        eps: added to the mean square, > 0 keeps a zero vector finite.
        impl: "cuda", "triton", "cpu" or "reference"; None takes the best usable one.

    Returns:
        (..., C, ...) of x's dtype and memory format; 16-bit inputs are accumulated in float32.

    Raises:
        TypeError: x is not a floating-point tensor, dim or eps is not a number.
        ValueError: x has no dimension `dim`, eps is negative, or impl cannot run.

    Gradients: any order in x. Source: Karras et al. 2018 (arXiv:1710.10196), section 4.2.
    """
    _check(x, dim, eps)
    return pixel_norm_reference(x, dim, eps)


def _check(x: torch.Tensor, dim: int, eps: float) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"pixel_norm: x must be a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"pixel_norm: x must be a floating-point tensor, got {x.dtype}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"pixel_norm: dim must be an int, got {type(dim).__name__}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(
            f"pixel_norm: dim must be in [{-x.ndim}, {x.ndim - 1}] for a {x.ndim}-d x, got {dim}"
        )
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"pixel_norm: eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"pixel_norm: eps must be at least 0, got {eps}")


def pixel_norm_reference(x: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    """The formula of `pixel_norm` in plain PyTorch, differentiable to any order."""
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    return (x * (x.square().mean(dim, keepdim=True) + eps).rsqrt()).to(dtype)
