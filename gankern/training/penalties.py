"""Regularisers of D and G: functions of networks' inputs and outputs, each a scalar to add.

The gradients inside are part of the graph, so that backward() differentiates twice. A penalty that
is taken every k-th step only is multiplied by k (lazy regularisation, StyleGAN2, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gankern.ops.conv2d_resample import no_weight_gradients


def r1(real: Tensor, real_logits: Tensor, gamma: float = 10.0) -> Tensor:
    """gamma / 2 · E[|∇D(x)|²] over real images x; Mescheder et al. 2018, eq. 9, arXiv:1801.04406.

    Args:
        real: [N, ...] images that require gradients, and from which real_logits were computed.
        real_logits: D(real), [N, 1].
        gamma: weight.
    """
    return gamma / 2 * _squared_norms(_gradient(real_logits.sum(), real)).mean()


def r2(fake: Tensor, fake_logits: Tensor, gamma: float = 10.0) -> Tensor:
    """gamma / 2 · E[|∇D(x)|²] over generated images x; Mescheder et al. 2018, eq. 10.

    Args: as `r1`, of generated images: detach them from G, then require their gradients.
    """
    return r1(fake, fake_logits, gamma)


def gradient_penalty(
    D: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    weight: float = 10.0,
    target: float = 1.0,
    alpha: Tensor | None = None,
) -> Tensor:
    """weight / target² · E[(|∇D(x)| - target)²] at x = real + alpha (fake - real).

    Gulrajani et al. 2017, eq. 3, arXiv:1704.00028; the target other than 1: Karras et al. 2018,
    arXiv:1710.10196, appendix D.

    Args:
        D: images [N, ...] to logits [N, 1]; bind labels into it.
        real, fake: [N, ...] images; no gradient goes into them.
        weight: of the penalty.
        target: of the gradient's norm.
        alpha: [N], from 0 (real) to 1 (fake); None: uniformly random.
    """
    if alpha is None:
        alpha = torch.rand(len(real), device=real.device)
    alpha = alpha.to(real).reshape(-1, *[1] * (real.ndim - 1))
    x = torch.lerp(real.detach(), fake.detach().to(real), alpha).requires_grad_()
    norms = _norms(_gradient(D(x).sum(), x))
    return weight / target**2 * (norms - target).square().mean()


def path_length(
    img: Tensor,
    ws: Tensor,
    mean: Tensor,
    weight: float = 2.0,
    decay: float = 0.01,
    noise: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """weight · E[(|J' y| - a)²], and the new moving mean a; StyleGAN2, eq. 4, arXiv:1912.04958.

    J' y is the gradient of sum(img · y) in ws, y normal noise over sqrt(H W); its length is
    root-mean-square over the layers. The mean moves before it is used.

    Args:
        img: synthesis(ws), [N, C, H, W].
        ws: [N, num_ws, w_dim], requiring gradients.
        mean: the moving mean a, a scalar tensor, 0 at the start; it is not changed in place.
        weight: of the penalty.
        decay: share of this batch in the mean.
        noise: [N, C, H, W] of unit variance; None: drawn.
        reduce: makes of this batch's mean length that of all processes; None: it is.

    Returns:
        The penalty, and the mean with this batch in it (without gradient).
    """
    y = torch.randn_like(img) if noise is None else noise
    g = _gradient(img, ws, (y / math.sqrt(img.shape[2] * img.shape[3])).to(img.dtype))
    lengths = _norms(g) / math.sqrt(ws.shape[1])  # [N]
    length = lengths.detach().mean().to(mean)
    mean = torch.lerp(mean, length if reduce is None else reduce(length), decay)
    return weight * (lengths - mean).square().mean(), mean


def drift(real_logits: Tensor, weight: float = 1e-3) -> Tensor:
    """weight · E[D(x)²] over real images: keeps a critic near zero; Karras et al. 2018, A.1."""
    return weight * real_logits.square().mean()


def _gradient(y: Tensor, x: Tensor, v: Tensor | None = None) -> Tensor:
    """dy/dx in float32 or more, of <y, v> with v; differentiable, without weights' gradients."""
    with no_weight_gradients():
        (g,) = torch.autograd.grad(y, x, v, create_graph=True)
    return g.to(torch.promote_types(g.dtype, torch.float32))


def _squared_norms(g: Tensor) -> Tensor:
    return g.square().flatten(1).sum(1)  # [N]


def _norms(g: Tensor) -> Tensor:
    """Lengths of the samples' gradients; the derivative of a length of 0 is 0, not NaN."""
    return torch.linalg.vector_norm(g.flatten(1), dim=1)  # [N]
