"""The mapping network of StyleGAN and its successors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gankern.nn.layers import EqualizedLinear
from gankern.ops.pixel_norm import pixel_norm


class MappingNetwork(nn.Module):
    """z, c -> w: normalise, embed c, then fully connected layers (StyleGAN, section 2).

    w = fc(... fc0([z / rms(z), e / rms(e)])) with e = embed(c); one w is broadcast to all layers.

    Args:
        z_dim: length of z; 0: no z, w is a function of c alone.
        c_dim: length of the label c; 0: no label.
        w_dim: length of w, and features of every layer.
        num_ws: layers that w is broadcast to; None: w is returned once, without an average.
        num_layers: fully connected layers.
        lr_multiplier: their learning rate relative to the rest of the network.
        w_avg_beta: decay of the moving average of w, which training updates.
    """

    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None = None,
        num_layers: int = 8,
        lr_multiplier: float = 0.01,
        w_avg_beta: float = 0.998,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.num_ws = z_dim, c_dim, num_ws
        self.num_layers, self.w_avg_beta = num_layers, w_avg_beta
        if c_dim:
            self.embed = EqualizedLinear(c_dim, w_dim)
        features = z_dim + (w_dim if c_dim else 0)
        for i in range(num_layers):
            layer = EqualizedLinear(features, w_dim, act="lrelu", lr_multiplier=lr_multiplier)
            self.add_module(f"fc{i}", layer)
            features = w_dim
        if num_ws is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Tensor:
        """Latents to styles.

        Args:
            z: [N, z_dim]; ignored if z_dim is 0.
            c: [N, c_dim]; ignored if c_dim is 0.
            truncation_psi: 1 keeps w, 0 gives the average: w_avg + psi (w - w_avg).
            truncation_cutoff: only the first so many layers are truncated; None: all.

        Returns:
            ws [N, num_ws, w_dim], or w [N, w_dim] if num_ws is None.
        """
        parts = [pixel_norm(_latent("z", z, self.z_dim))] if self.z_dim else []
        if self.c_dim:
            parts.append(pixel_norm(self.embed(_latent("c", c, self.c_dim))))
        w = torch.cat(parts, 1)
        for i in range(self.num_layers):
            w = getattr(self, f"fc{i}")(w)
        if self.num_ws is None:
            return w
        if self.training:
            mean = w.detach().mean(0).to(self.w_avg)
            if dist.is_initialized() and dist.get_world_size() > 1:  # of all processes' latents
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            self.w_avg.lerp_(mean, 1 - self.w_avg_beta)
        ws = w[:, None].expand(-1, self.num_ws, -1)  # [N, num_ws, w_dim]
        if truncation_psi == 1:
            return ws
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        truncated = torch.lerp(self.w_avg.to(w), ws[:, :cutoff], truncation_psi)
        return torch.cat([truncated, ws[:, cutoff:]], 1)


def mix_styles(ws: Tensor, other: Tensor, crossover: Tensor) -> Tensor:
    """The styles of two latents in one image: those of `other` from layer `crossover` on.

    Args:
        ws, other: [N, num_ws, w_dim].
        crossover: int [N], from 0 (all of other) to num_ws (none).

    Returns:
        [N, num_ws, w_dim].
    """
    layers = torch.arange(ws.shape[1], device=ws.device)
    own = layers < crossover.to(ws.device)[:, None]  # [N, num_ws]
    return torch.where(own[:, :, None], ws, other)


def _latent(name: str, t: Tensor | None, size: int) -> Tensor:
    if t is None or t.ndim != 2 or t.shape[1] != size:
        got = None if t is None else tuple(t.shape)
        raise ValueError(f"mapping: {name} must be [N, {size}], got {got}")
    return t.to(torch.promote_types(t.dtype, torch.float32))
