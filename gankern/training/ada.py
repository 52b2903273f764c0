"""Adaptive discriminator augmentation: the 18 transforms of "Training Generative Adversarial
Networks with Limited Data" (Karras et al. 2020, arXiv:2006.06676, appendix B), and their p.

Everything is a tensor over the batch on its device, p included: no step waits for the device.
Geometry is one resampling, between an upsampling and a downsampling by the wavelet sym6.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.ops import downsample2d, upsample2d
from gankern.training.config import TrainConfig
from gankern.training.distributed import average

# Of 3 transforms (flip, quarter turns, whole shifts), 4 (scale, rotation, stretch, shift), 5
# (brightness, contrast, luma flip, hue, saturation), 4 (a gain for each octave), 1 and 1.
GROUPS = ("blit", "geometry", "color", "filter", "noise", "cutout")

# Low-pass filters of the wavelets sym6 and sym2, orthonormal: sum sqrt(2), norm 1.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)
MARGIN = 6  # pixels around the image, half of sym6
SHIFT = 6 - sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)  # of an upsampled sample

# Expected power of natural images in the four octaves, from the lowest (appendix B.3).
BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)


class Ada:
    """The pipeline and its probability p, which follows the sign of D's logits of real images.

    r_t = E[sign(D(real))] rises with overfitting; p goes up where r_t is over the target, else
    down, so fast that it could go from 0 to 1 in `ada_kimg` (section 3.1). Every transform acts on
    every image with probability p, independently.

    A call takes images [N, C, H, W] in about -1 to 1 and returns such, differentiable once in them;
    R1 and gradient penalty differentiate D at the augmented images, not through here. On CUDA the
    gradient of the resampling adds with atomics: it is equal from run to run only to rounding.

    Args:
        config: its fields ada_*.
        device: of the images.
        world: number of processes, over which r_t is averaged.
    """

    def __init__(self, config: TrainConfig, device: torch.device, world: int = 1) -> None:
        self.groups = set(config.ada_transforms.split(","))
        self.target, self.interval, self.world = config.ada_target, config.ada_interval, world
        self.kimg = config.ada_kimg
        self.p = torch.full((), config.ada_p, device=device)
        self.signs = torch.zeros((), device=device)  # summed since p was last moved
        self.count = 0

    def __call__(self, img: Tensor) -> Tensor:
        x = img.float()
        if "blit" in self.groups:
            x = self._blit(x)
        if "geometry" in self.groups:
            x = resample(x, self._geometry(x))
        if "color" in self.groups:
            x = transform_colors(x, self._colors(x))
        if "filter" in self.groups:
            x = filter_bands(x, self._bands(x))
        if "noise" in self.groups:
            sigma = self._pick(_normal(x).abs() * 0.1, 0.0)
            x = x + torch.randn_like(x) * sigma.reshape(-1, 1, 1, 1)
        if "cutout" in self.groups:
            x = self._cutout(x)
        return x.to(img.dtype)

    @torch.no_grad()
    def update(self, real_logits: Tensor, batch: int) -> None:
        """Takes D's logits of a step over `batch` images; moves p every `interval` steps.

        A logit that is NaN counts as 0, so that p never is.
        """
        self.signs += average(real_logits.float().sign().nan_to_num().mean(), self.world)
        self.count += 1
        if self.count >= self.interval and self.target > 0:
            step = batch * self.count / (self.kimg * 1000)
            self.p += (self.signs / self.count - self.target).sign() * step
            self.p.clamp_(0, 1)
            self.signs.zero_()
            self.count = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, equal in all processes."""
        return {"p": self.p.item(), "signs": self.signs.item(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self.p.fill_(state["p"])
        self.signs.fill_(state["signs"])
        self.count = int(state["count"])

    def _pick(self, value: Tensor, neutral: float, p: Tensor | None = None) -> Tensor:
        """value [N, ...] with probability p, each sample by itself, else the neutral value."""
        chosen = torch.rand(value.shape[:1], device=value.device) < (self.p if p is None else p)
        shape = [-1] + [1] * (value.ndim - 1)
        return torch.where(chosen.reshape(shape), value, torch.full_like(value, neutral))

    def _blit(self, x: Tensor) -> Tensor:
        """Flips, quarter turns, shifts: pixels are copied as they are."""
        h, w = x.shape[2:]
        flip = self._pick((_uniform(x) * 2).floor(), 0).reshape(-1, 1, 1, 1)
        x = torch.where(flip > 0, x.flip(3), x)
        turns = self._pick((_uniform(x) * 4).floor(), 0).long()
        if h != w:  # by half turns only
            turns = turns // 2 * 2
        all_turns = [x.rot90(k, (2, 3)) if h == w or k % 2 == 0 else x for k in range(4)]
        x = torch.stack(all_turns)[turns, torch.arange(len(x), device=x.device)]
        shifts = self._pick((_uniform(x, 2) * 2 - 1) * 0.125, 0)
        for axis, size in ((2, h), (3, w)):
            shift = (shifts[:, axis - 2, None] * size).round().long()  # [N, 1]
            index = _mirror(torch.arange(size, device=x.device) - shift, size)
            shape = [len(x), 1, 1, 1]
            shape[axis] = size
            x = x.gather(axis, index.reshape(shape).expand_as(x))
        return x

    def _geometry(self, x: Tensor) -> Tensor:
        """From places in the result to places in x, pixels from the centre: [N, 3, 3]."""
        size = _constant((float(x.shape[3]), float(x.shape[2])), x.device)
        p_rotate = 1 - (1 - self.p).sqrt()  # of two turns, so that p is that of any
        s = self._pick(torch.exp2(_normal(x) * 0.2), 1)
        inverse = _scale(1 / s, 1 / s)
        inverse = inverse @ _rotate(self._pick(_angle(x), 0, p_rotate))
        s = self._pick(torch.exp2(_normal(x) * 0.2), 1)
        inverse = inverse @ _scale(1 / s, s)
        inverse = inverse @ _rotate(self._pick(_angle(x), 0, p_rotate))
        shift = self._pick(torch.randn(len(x), 2, device=x.device) * 0.125, 0)
        return inverse @ _translate(-shift * size)

    def _colors(self, x: Tensor) -> Tensor:
        """Affine transforms of (red, green, blue, 1): [N, 4, 4]."""
        n = len(x)
        luma = torch.full((3, 1), 3**-0.5, device=x.device)  # the axis of gray
        along, eye = luma @ luma.t(), torch.eye(3, device=x.device)
        cross = torch.linalg.cross(eye, luma.t().expand(3, 3)).t()
        brightness = self._pick(_normal(x) * 0.2, 0).reshape(n, 1, 1)
        contrast = self._pick(torch.exp2(_normal(x) * 0.5), 1).reshape(n, 1, 1)
        flip = self._pick((_uniform(x) * 2).floor(), 0).reshape(n, 1, 1)
        hue = self._pick(_angle(x), 0).reshape(n, 1, 1)
        saturation = self._pick(torch.exp2(_normal(x)), 1).reshape(n, 1, 1)
        linear = contrast * eye  # [N, 3, 3]
        linear = (eye - 2 * flip * along) @ linear
        linear = (along + (eye - along) * hue.cos() + cross * hue.sin()) @ linear
        linear = (along + (eye - along) * saturation) @ linear
        offset = linear @ brightness.expand(n, 3, 1)
        matrix = torch.eye(4, device=x.device).repeat(n, 1, 1)
        matrix[:, :3, :3], matrix[:, :3, 3:] = linear, offset
        return matrix

    def _bands(self, x: Tensor) -> Tensor:
        """Gains of the four octaves, each change balanced so that the power stays: [N, 4]."""
        power = _constant(BAND_POWER, x.device)
        gains = torch.ones(len(x), 4, device=x.device)
        for band in range(4):
            t = torch.ones_like(gains)
            t[:, band] = self._pick(torch.exp2(_normal(x)), 1)
            gains = gains * t / (power * t.square()).sum(1, keepdim=True).sqrt()
        return gains

    def _cutout(self, x: Tensor) -> Tensor:
        """A rectangle of half the sides, centred anywhere, becomes zero."""
        n, _, h, w = x.shape
        centre = torch.rand(n, 2, 1, device=x.device)
        half = self._pick(torch.full((n, 1), 0.25, device=x.device), -1)
        in_x = ((torch.arange(w, device=x.device) + 0.5) / w - centre[:, 0]).abs() < half  # [N, W]
        in_y = ((torch.arange(h, device=x.device) + 0.5) / h - centre[:, 1]).abs() < half
        return x * ~(in_y[:, None, :, None] & in_x[:, None, None, :])


def resample(x: Tensor, inverse: Tensor) -> Tensor:
    """The image whose place u shows the place inverse @ u of x, mirrored beyond x's edges.

    Args:
        x: [N, C, H, W], float32.
        inverse: [N, 3, 3], in pixels from the centre, (x, y, 1), y downwards.

    Returns:
        [N, C, H, W]. Upsampled by sym6, read bilinearly, downsampled by the same filter turned
        round: the identity gives x back to rounding (appendix B.2).
    """
    h, w = x.shape[2:]
    f = _constant(SYM6, x.device) / math.sqrt(2)
    wide = x[:, :, _mirrored(h, MARGIN, x.device)][:, :, :, _mirrored(w, MARGIN, x.device)]
    wide = upsample2d(wide, f)  # [N, C, 2 (H + 12), 2 (W + 12)]
    # A sample of `wide` lies where the filter's centre of gravity falls.
    place = [
        (torch.arange(2 * (size + 2 * MARGIN), device=x.device) + SHIFT) / 2 - MARGIN - size / 2
        for size in (w, h)
    ]
    at_y, at_x = torch.meshgrid(place[1], place[0], indexing="ij")
    target = torch.stack([at_x, at_y, torch.ones_like(at_x)], -1)  # [2H', 2W', 3]
    source = torch.einsum("nij,hwj->nhwi", inverse[:, :2], target)
    size = _constant((float(w), float(h)), x.device)
    source = source + size / 2  # from the corner
    mirrored = size - (source % (2 * size) - size).abs()
    near = MARGIN / 2  # as far as `wide` has seen whole filters
    inside = (source > -near) & (source < size + near)
    index = 2 * (torch.where(inside, source, mirrored) + MARGIN) - SHIFT
    grid = (index + 0.5) / (size + 2 * MARGIN) - 1
    y = F.grid_sample(wide, grid, "bilinear", "border", align_corners=False)
    return downsample2d(y, f, flip_filter=True)[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]


def transform_colors(x: Tensor, matrix: Tensor) -> Tensor:
    """matrix [N, 4, 4] on (red, green, blue, 1); gray takes the mean of its rows; alpha stays."""
    if x.shape[1] == 1:
        row = matrix[:, :3].mean(1)  # [N, 4]
        gain, offset = row[:, :3].sum(1), row[:, 3]
        return x * gain.reshape(-1, 1, 1, 1) + offset.reshape(-1, 1, 1, 1)
    y = torch.einsum("nij,njhw->nihw", matrix[:, :3, :3], x[:, :3])
    y = y + matrix[:, :3, 3, None, None]
    return torch.cat([y, x[:, 3:]], 1)


def filter_bands(x: Tensor, gains: Tensor) -> Tensor:
    """Octaves of the image times gains [N, 4], along both axes, mirrored at the edges."""
    n, c, h, w = x.shape
    bands = _constant(tuple(octave_filters().flatten().tolist()), x.device)
    taps = gains @ bands.reshape(4, -1)  # [N, 43]
    pad = taps.shape[1] // 2
    x = x[:, :, _mirrored(h, pad, x.device)][:, :, :, _mirrored(w, pad, x.device)]
    taps = taps.repeat_interleave(c, 0)[:, None]  # [N C, 1, 43]
    x = F.conv2d(x.reshape(1, n * c, *x.shape[2:]), taps[:, :, :, None], groups=n * c)
    x = F.conv2d(x, taps[:, :, None, :], groups=n * c)
    return x.reshape(n, c, h, w)


@functools.cache
def octave_filters() -> Tensor:
    """Four zero-phase filters, [4, 43] from the lowest octave, whose sum is the unit impulse.

    L(z) = H(z) H(1/z) / 2 of the wavelet sym2 passes the lower half, 1 - L(z) the upper; the lower
    half is split again by the same filters of z² (appendix B.3).
    """
    h = torch.tensor(SYM2, dtype=torch.float64)
    low = F.conv1d(h[None, None], h[None, None], padding=3)[0, 0] / 2  # autocorrelation, 7 taps
    bands = [torch.ones(1, dtype=torch.float64)]
    for _ in range(3):
        spread = []
        for band in bands:
            wide = torch.zeros(2 * len(band) - 1, dtype=torch.float64)
            wide[::2] = band
            spread.append(F.conv1d(wide[None, None], low.flip(0)[None, None], padding=6)[0, 0])
        high = torch.zeros_like(spread[0])
        middle = len(high) // 2
        high[middle - 3 : middle + 4] = -low
        high[middle] += 1
        bands = [*spread, high]
    return torch.stack(bands)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float32 vector, copied to its device once."""
    return torch.tensor(values, device=device)


def _mirrored(size: int, pad: int, device: torch.device) -> Tensor:
    """Indices of an axis with `pad` more at both ends, mirrored about the edges."""
    return _mirror(torch.arange(-pad, size + pad, device=device), size)


def _mirror(index: Tensor, size: int) -> Tensor:
    index = index % (2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)


def _uniform(x: Tensor, *shape: int) -> Tensor:
    return torch.rand(len(x), *shape, device=x.device)


def _normal(x: Tensor) -> Tensor:
    return torch.randn(len(x), device=x.device)


def _angle(x: Tensor) -> Tensor:
    return (_uniform(x) * 2 - 1) * math.pi


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], -2)  # [N, 3, 3]


def _scale(sx: Tensor, sy: Tensor) -> Tensor:
    o, i = torch.zeros_like(sx), torch.ones_like(sx)
    return _matrix([[sx, o, o], [o, sy, o], [o, o, i]])


def _rotate(angle: Tensor) -> Tensor:
    cos, sin, o, i = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return _matrix([[cos, sin, o], [-sin, cos, o], [o, o, i]])


def _translate(shift: Tensor) -> Tensor:
    tx, ty = shift.unbind(1)
    o, i = torch.zeros_like(tx), torch.ones_like(tx)
    return _matrix([[i, o, tx], [o, i, ty], [o, o, i]])
