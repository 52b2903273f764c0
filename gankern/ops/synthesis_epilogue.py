"""synthesis_epilogue: everything that follows a StyleGAN2 convolution, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import Plan, remember
from gankern.ops.bias_act import ACTS, activation, bias_act, bias_act_reference
from gankern.ops.bias_act import _bwd as bias_act_bwd
from gankern.ops.convolution import weight_gradients
from gankern.ops.upfirdn2d import MAX_TAPS, check_filter, check_length, check_padding, upfirdn2d

if _impl.triton is not None:
    import triton
    import triton.language as tl

    from gankern.ops.bias_act import _act_slope, _act_value

OP = "synthesis_epilogue"


def synthesis_epilogue(
    x: Tensor,
    f: Tensor | None = None,
    d: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    b: Tensor | None = None,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    filter_gain: float = 1.0,
    act: str = "lrelu",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Filter, demodulate, add noise and bias, activate, scale and clamp.

    `y = clamp(act(upfirdn2d(x, f) * d[n,c] + noise * noise_strength + b[c]) * gain)`

    Args:
        x: output of the convolution, [N, C, H, W]; float32, float16, bfloat16 or float64, any
            strides (contiguous and channels-last ones are kept).
        f: filter, float32, [taps_y, taps_x] or [taps] for a separable one, of lengths as
            `upfirdn2d` takes them; None: the identity.
        d: demodulation coefficients, [N, C] of x's dtype or float32, or None.
        noise: [N, 1, out_h, out_w], [1, 1, out_h, out_w] or [out_h, out_w] of x's dtype or float32.
        noise_strength: factor on the noise, one value or [C]; None: 1.
        b: bias, [C] of x's dtype or float32, or None.
        padding: zeros around x for the filter; int, [x, y] or [x0, x1, y0, y1]. Negative crops.
        flip_filter: False is a convolution with f, True a correlation.
        filter_gain: factor on the filter.
        act, alpha, gain, clamp: as `bias_act`.
        impl: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns:
        y [N, C, H + y0 + y1 - taps_y + 1, W + x0 + x1 - taps_x + 1] of x's dtype and memory format.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: impl cannot run here.

    Gradients: of any order in x, d, noise, noise_strength and b. The first is a kernel that reads
    x and dy once and recomputes the rest; Triton applies the filter in a second one. Where noise
    itself takes a gradient, for a filter of more than 64 taps a side, and on a GPU for one of more
    than 4, or with padding below 0 or not below its taps, forward and gradients are upfirdn2d,
    PyTorch's operations and bias_act, in several passes. For linear, relu and lrelu the second
    order is a kernel too on the CPU, and in CUDA without a filter, and what is not is calls of the
    first two; for other activations the orders above the first are composed of upfirdn2d and
    bias_act.
    Source: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", figure 2.
    """
    call = _checked if is_compiling() else _quick
    return call(
        x, f, d, noise, noise_strength, b, padding, flip_filter, filter_gain, act, alpha, gain,
        clamp, impl,
    )  # fmt: skip


def _plan(
    x, f, d, noise, noise_strength, b, padding, flip_filter, filter_gain, act, alpha, gain, clamp,
    impl,
) -> Plan:  # fmt: skip
    pads, shape = _check(x, f, padding, impl)
    if flip_filter is not True and flip_filter is not False:
        flip_filter = _impl.flag(OP, "flip_filter", flip_filter)
    if type(filter_gain) not in (float, int) or filter_gain != filter_gain:
        filter_gain = _impl.number(OP, "filter_gain", filter_gain)
    if d is not None:
        _check_operand(OP, x, "d", d, shape[:2])
    rest = (noise, noise_strength, b)
    numbers = check_tail(OP, x, shape, *rest, act, alpha, gain, clamp)
    args = (*pads, flip_filter, float(filter_gain), act, *numbers)
    return _plan_valid(x, f, d, *rest, args, impl)


def epilogue(
    x: Tensor,
    f: Tensor | None,
    d: Tensor | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    b: Tensor | None,
    args: tuple[Any, ...],
    impl: str | None,
) -> Tensor:
    """`synthesis_epilogue` of valid arguments; args: those of its reference behind the tensors."""
    call = _valid if is_compiling() else _quick_valid
    return call(x, f, d, noise, noise_strength, b, args, impl)


def _plan_valid(x: Tensor, f, d, noise, noise_strength, b, args: tuple[Any, ...], impl) -> Plan:
    pads = args[:4]
    if f is None and (any(pads) or args[5] != 1):
        f = torch.ones(1, 1, device=x.device)
    chosen = _impl.choose(OP, impl, x)
    if chosen == "reference":
        return synthesis_epilogue_reference, (x, f, d, noise, noise_strength, b, *args)
    noise_grad = noise is not None and noise.requires_grad and torch.is_grad_enabled()
    if noise_grad or (f is not None and not _fits(f, pads, chosen)):
        return _composed, (x, f, d, noise, noise_strength, b, *args, chosen)
    strength = None if noise is None else noise_strength
    return _fwd, (x, f, d, noise, strength, b, (*args, chosen))


def flat_noise(
    noise: Tensor | None, strength: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """[N or 1, H, W] and [1 or C], as the kernels take them."""
    if noise is None:
        return None, None
    return noise.reshape(-1, *noise.shape[-2:]), None if strength is None else strength.reshape(-1)


def _fits(f: Tensor, pads: tuple[int, ...], impl: str) -> bool:
    """Whether the filter runs in the kernel of the rest: what follows an upsampling convolution."""
    if impl == "cpu":
        return max(f.shape) <= 64
    taps = f.shape[-1], f.shape[-1], f.shape[0], f.shape[0]
    return max(taps) <= 4 and all(0 <= p < t for p, t in zip(pads, taps, strict=True))


def _usable(op: str, impl: str, x: Tensor) -> str:
    return "reference" if _impl.why_not(impl, x.device.type, op) else impl


def _check(
    x: Tensor, f: Tensor | None, padding: int | Sequence[int], impl: str | None
) -> tuple[Sequence[int], tuple[int, ...]]:
    """(x0, x1, y0, y1), and the shape of the filtered images."""
    _impl.check_float(OP, "x", x)
    images = x.shape
    if len(images) != 4:
        raise ValueError(f"{OP}: x must be [N, C, H, W], got shape {tuple(images)}")
    pads = check_padding(OP, padding)
    taps_x = taps_y = 1
    if f is not None:
        taps_x, taps_y = check_filter(OP, "f", f, x, wide=False)
        check_length(OP, "f", f, impl)
    n, c, h, w = images
    out_h, out_w = h + pads[2] + pads[3] - taps_y + 1, w + pads[0] + pads[1] - taps_x + 1
    least = min(out_h, out_w)
    if least < 1 and (least < 0 or min(h, w) > 0):
        raise ValueError(
            f"{OP}: padding must leave an output of at least 1x1 for x {tuple(images)} and "
            f"{taps_y}x{taps_x} taps, got {pads}"
        )
    return pads, (n, c, out_h, out_w)


def check_tail(
    op: str, x: Tensor, shape: Sequence[int], noise, strength, b, act, alpha, gain, clamp
) -> tuple[float, float, float]:
    """(alpha, gain, clamp) of what op does to images of that shape, in x's dtype and on its device,
    if noise, its strength, bias and activation are valid."""
    n, c, *out = shape
    if noise is not None:
        _check_operand(op, x, "noise", noise, (n, 1, *out), (1, 1, *out), (*out,))
    if strength is not None:
        _check_operand(op, x, "noise_strength", strength, (), (1,), (c,))
    if b is not None:
        _check_operand(op, x, "b", b, (c,))
    return activation(op, act, alpha, gain, clamp)


def _check_operand(op: str, x: Tensor, name: str, t: Any, *shapes: tuple[int, ...]) -> None:
    _impl.check_float(op, name, t)
    if t.dtype not in (x.dtype, torch.float32):
        raise _impl.wrong_dtype(op, name, t, x)
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}")
    # Lengths first: a traced batch size must not be compared with a noise map's height.
    shape = t.shape
    for s in shapes:
        if len(shape) == len(s) and shape == s:
            return
    wanted = " or ".join(str(s) for s in dict.fromkeys(shapes))
    raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(shape)}")


# --- Reference: plain PyTorch, differentiable to any order.


def synthesis_epilogue_reference(
    x, f, d, noise, strength, b, x0, x1, y0, y1, flip_filter, filter_gain, act, alpha, gain, clamp
) -> Tensor:
    """The formula in PyTorch operations; clamp < 0 means none."""
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    if f is not None:
        pads = [x0, x1, y0, y1]
        x = upfirdn2d(x, f, 1, 1, pads, flip_filter, filter_gain, impl="reference")
    x = _modulate(x, d, noise, strength)
    return bias_act_reference(x, b, 1, act, alpha, gain, clamp).to(dtype)


def _modulate(x: Tensor, d: Tensor | None, noise: Tensor | None, strength: Tensor | None) -> Tensor:
    if d is not None:
        x = x * d.to(x.dtype)[:, :, None, None]
    if noise is None:
        return x
    noise = noise.to(x.dtype)
    noise = noise.unsqueeze(1) if noise.ndim == 3 else noise
    return x + (noise if strength is None else noise * strength.to(x.dtype).reshape(-1, 1, 1))


def _composed(
    x, f, d, noise, strength, b, x0, x1, y0, y1, flip_filter, filter_gain, act, alpha, gain, clamp,
    impl,
) -> Tensor:  # fmt: skip
    """The same of gankern's other ops, in float32: differentiable to any order, several passes."""
    dtype, form = x.dtype, _impl.memory_format(x)
    x = x.to(torch.promote_types(dtype, torch.float32))
    if f is not None:
        pads, usable = [x0, x1, y0, y1], _usable("upfirdn2d", impl, x)
        if impl != "cpu" and max(f.shape) > MAX_TAPS:
            usable = "reference"
        x = upfirdn2d(x, f, 1, 1, pads, flip_filter, filter_gain, impl=usable)
    x = _modulate(x, d, noise, strength)
    b = None if b is None else b.to(x.dtype)
    clamp = None if clamp < 0 else clamp
    y = bias_act(x, b, 1, act, alpha, gain, clamp, impl=_usable("bias_act", impl, x))
    return y.to(dtype).contiguous(memory_format=form)


# --- Triton.

if _impl.triton is not None:

    @triton.jit
    def _filtered(
        x_ptr, f_ptr, row, col, inside, H, W, stride, x0, y0, flip, filter_gain,
        TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, SEPARABLE: tl.constexpr,
    ):  # fmt: skip
        """Filter(x) at pixels (row, col); stride: elements from a column to the next."""
        u = tl.zeros(inside.shape, tl.float32)
        for ky in range(TAPS_Y):  # not unrolled: the loads of all taps would wait in registers
            for kx in tl.static_range(TAPS_X):
                fy = tl.where(flip, ky, TAPS_Y - 1 - ky)
                fx = tl.where(flip, kx, TAPS_X - 1 - kx)
                if SEPARABLE:
                    tap = tl.load(f_ptr + fy) * tl.load(f_ptr + fx)
                else:
                    tap = tl.load(f_ptr + fy * TAPS_X + fx)
                r, c = row + ky - y0, col + kx - x0
                ok = inside & (r >= 0) & (r < H) & (c >= 0) & (c < W)
                u += tap * tl.load(x_ptr + (r * W + c) * stride, ok, 0.0).to(tl.float32)
        return u * filter_gain

    @triton.jit
    def synthesis_epilogue_kernel(
        x_ptr, dy_ptr, f_ptr, d_ptr, noise_ptr, strength_ptr, b_ptr, out_ptr, sums_ptr,
        parts, planes, C, H, W, out_h, out_w, x0, y0, flip, filter_gain, alpha, gain, clamp,
        noise_step, strength_step,
        TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, SEPARABLE: tl.constexpr, LAST: tl.constexpr,
        HAS_F: tl.constexpr, HAS_D: tl.constexpr, HAS_NOISE: tl.constexpr,
        HAS_STRENGTH: tl.constexpr, HAS_B: tl.constexpr, ACT: tl.constexpr, CLAMPED: tl.constexpr,
        BACKWARD: tl.constexpr, WIDE: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        # BLOCK pixels of one plane, or of BLOCK_C channels of a sample (channels-last): with a
        # filter a tile TILE_X wide, without one as they lie in memory.
        # Forward: y. Backward: dL/d(filter(x)), and the sums of dv * u, dv and dv * noise.
        part = tl.program_id(0) % parts
        if WIDE:  # indices in an image
            W, out_w, C = tl.cast(W, tl.int64), tl.cast(out_w, tl.int64), tl.cast(C, tl.int64)
            part = part.to(tl.int64)
        groups = tl.cdiv(C, BLOCK_C)
        n = (tl.program_id(0) // parts // groups).to(tl.int64)
        c = tl.program_id(0) // parts % groups * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        j = tl.arange(0, BLOCK)[:, None]
        if HAS_F:
            tiles_x = tl.cdiv(out_w, TILE_X)
            row = part // tiles_x * (BLOCK // TILE_X) + j // TILE_X
            col = part % tiles_x * TILE_X + j % TILE_X
            pixel = row * out_w + col
            in_image = (row < out_h) & (col < out_w)
        else:
            pixel = part * BLOCK + j
            in_image = pixel < out_h * out_w
        inside = in_image & (c < C)
        area, out_area = tl.cast(H, tl.int64) * W, tl.cast(out_h, tl.int64) * out_w
        if LAST:
            base, out_base, stride = n * area * C + c, n * out_area * C + c, C
        else:
            base, out_base, stride = (n * C + c) * area, (n * C + c) * out_area, 1
        out = pixel * stride
        if HAS_F:
            u = _filtered(x_ptr + base, f_ptr, row, col, inside, H, W, stride, x0, y0, flip,
                          filter_gain, TAPS_Y, TAPS_X, SEPARABLE)  # fmt: skip
        else:
            u = tl.load(x_ptr + out_base + out, inside, 0.0).to(tl.float32)
        d, v, z = 1.0, u, 0.0
        if HAS_D:
            d = tl.load(d_ptr + n * C + c, c < C, 0.0).to(tl.float32)
            v = u * d
        if HAS_NOISE:
            z = tl.load(noise_ptr + n * noise_step + pixel, in_image, 0.0).to(tl.float32)
            s = 1.0
            if HAS_STRENGTH:
                s = tl.load(strength_ptr + c * strength_step, c < C, 0.0).to(tl.float32)
            v += z * s
        if HAS_B:
            v += tl.load(b_ptr + c, c < C, 0.0).to(tl.float32)
        a = _act_value(v, ACT, alpha)
        y = a * gain
        if BACKWARD:
            dv = tl.load(dy_ptr + out_base + out, inside, 0.0).to(tl.float32)
            dv = dv * gain * _act_slope(a, v, ACT, alpha, True)
            if CLAMPED:
                dv = tl.where((y > -clamp) & (y < clamp), dv, 0.0)
            dv = tl.where(inside, dv, 0.0)
            tl.store(out_ptr + out_base + out, (dv * d).to(out_ptr.dtype.element_ty), inside)
            at = sums_ptr + tl.cast(part, tl.int64) * planes + n * C + c
            step = tl.cast(parts, tl.int64) * planes
            tl.store(at, tl.sum(dv * u, 0)[None, :], c < C)
            tl.store(at + step, tl.sum(dv, 0)[None, :], c < C)
            tl.store(at + 2 * step, tl.sum(dv * z, 0)[None, :], c < C)
        else:
            if CLAMPED:
                y = tl.where(y > clamp, clamp, tl.where(y < -clamp, -clamp, y))
            tl.store(out_ptr + out_base + out, y.to(out_ptr.dtype.element_ty), inside)

    def _launch(x, dy, f, d, noise, strength, b, out, y_shape, x0, y0, flip, filter_gain, act,
                alpha, gain, clamp):  # fmt: skip
        (n, c, h, w), (oh, ow) = x.shape, y_shape[2:]
        last = _impl.memory_format(x) == torch.channels_last
        block_c = _impl.power_of_2(c, 32) if last else 1
        block = max(16, _impl.power_of_2(oh * ow, 1024 // block_c))
        tile_x = block if f is None else _impl.power_of_2(ow, 8 if last else 64)
        tile_y = block // tile_x
        tiles = triton.cdiv(ow, tile_x) * triton.cdiv(oh, tile_y)
        parts = triton.cdiv(oh * ow, block) if f is None else tiles
        # The largest index that a program computes in an image, with a tile behind and the taps.
        sizes = max(h, oh) + tile_y + 4, max(w, ow) + tile_x + 4
        largest = oh * ow + block if f is None else sizes[0] * sizes[1]
        wide = largest * (c if last else 1) >= 2**31
        sums = torch.empty((3, parts, n, c) if dy is not None else (0,), device=x.device)
        slope = {0: 1.0, 1: 0.0}.get(act, alpha)
        given = [x if t is None else t.contiguous() for t in (f, d, noise, strength, b)]
        grid = (parts * n * triton.cdiv(c, block_c),)
        torch.library.wrap_triton(synthesis_epilogue_kernel)[grid](
            x, x if dy is None else dy, *given, out, sums, parts, n * c, c, h, w, oh, ow, x0, y0,
            flip, filter_gain, slope, gain, clamp,
            0 if noise is None or noise.numel() == oh * ow else oh * ow,
            0 if strength is None or strength.numel() == 1 else 1,
            TAPS_Y=1 if f is None else f.shape[0], TAPS_X=1 if f is None else f.shape[-1],
            SEPARABLE=f is not None and f.ndim == 1, LAST=last, HAS_F=f is not None,
            HAS_D=d is not None, HAS_NOISE=noise is not None, HAS_STRENGTH=strength is not None,
            HAS_B=b is not None, ACT=act, CLAMPED=clamp >= 0, BACKWARD=dy is not None,
            WIDE=wide, TILE_X=tile_x, BLOCK=block, BLOCK_C=block_c,
        )  # fmt: skip
        return sums

    @_impl.triton_op("synthesis_epilogue")
    def _triton_fwd(
        x: Tensor, f: Tensor | None, d: Tensor | None, noise: Tensor | None,
        strength: Tensor | None, b: Tensor | None, x0: int, x1: int, y0: int, y1: int,
        flip_filter: bool, filter_gain: float, act: int, alpha: float, gain: float, clamp: float,
    ) -> Tensor:  # fmt: skip
        x = x.contiguous(memory_format=_impl.memory_format(x))
        y = _fake_fwd(x, f, d, noise, strength, b, x0, x1, y0, y1)
        if y.numel():
            _launch(x, None, f, d, noise, strength, b, y, y.shape, x0, y0, flip_filter,
                    filter_gain, act, alpha, gain, clamp)  # fmt: skip
        return y

    @_impl.triton_op("synthesis_epilogue_bwd_plain")
    def _triton_bwd_plain(
        dy: Tensor, x: Tensor, f: Tensor | None, d: Tensor | None, noise: Tensor | None,
        strength: Tensor | None, b: Tensor | None, x0: int, x1: int, y0: int, y1: int,
        flip_filter: bool, filter_gain: float, act: int, alpha: float, gain: float, clamp: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        found = _run_bwd(dy, x, f, d, noise, strength, b, x0, x1, y0, y1, flip_filter, filter_gain,
                         act, alpha, gain, clamp)  # fmt: skip
        return found[0], found[1], found[2]

    @_impl.triton_op("synthesis_epilogue_bwd")
    def _triton_bwd(
        dy: Tensor, x: Tensor, f: Tensor | None, d: Tensor | None, noise: Tensor | None,
        strength: Tensor | None, b: Tensor | None, x0: int, x1: int, y0: int, y1: int,
        flip_filter: bool, filter_gain: float, act: int, alpha: float, gain: float, clamp: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _run_bwd(dy, x, f, d, noise, strength, b, x0, x1, y0, y1, flip_filter, filter_gain,
                        act, alpha, gain, clamp)  # fmt: skip

    def _run_bwd(
        dy, x, f, d, noise, strength, b, x0, x1, y0, y1, flip_filter, filter_gain, act, alpha, gain,
        clamp,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        form = _impl.memory_format(x)
        x, dy = x.contiguous(memory_format=form), dy.contiguous(memory_format=form)
        if dy.numel() == 0 or x.numel() == 0:
            return _zeros_bwd(dy, x)
        du = torch.empty_like(dy)
        sums = _launch(x, dy, f, d, noise, strength, b, du, dy.shape, x0, y0, flip_filter,
                       filter_gain, act, alpha, gain, clamp).sum(1)  # fmt: skip
        if f is not None:
            # The adjoint of a filter at one rate is the filter reversed.
            taps_y, taps_x = f.shape[0], f.shape[-1]
            pads = [taps_x - 1 - x0, taps_x - 1 - x1, taps_y - 1 - y0, taps_y - 1 - y1]
            du = _impl.op("triton", "upfirdn2d")(
                du, f, 1, 1, 1, 1, *pads, not flip_filter, filter_gain
            ).contiguous(memory_format=form)  # which an output of one pixel does not tell
        return du, sums[0], sums[1].sum(0), sums[2].sum(0)


def _zeros_bwd(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dd, db, ds = (torch.zeros_like(t) for t in _fake_bwd(dy, x))
    return dx, dd, db, ds


# --- Shape functions of the registered ops.


def _fake_fwd(x, f, d, noise, strength, b, x0, x1, y0, y1, *args):
    n, c, h, w = x.shape
    taps_y, taps_x = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    shape = n, c, h + y0 + y1 - taps_y + 1, w + x0 + x1 - taps_x + 1
    layout = _impl.memory_format(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _fake_bwd(dy, x, *args):
    n, c = x.shape[:2]
    acc = torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty_like(x, memory_format=_impl.memory_format(x))
    return dx, *(x.new_empty(shape, dtype=acc) for shape in ((n, c), (c,), (c,)))


def _fake_bwd_plain(dy, x, *args):
    return _fake_bwd(dy, x)[:3]


def _fake_bwd2(dy, x, f, d, noise, strength, b, vx, vd, *args):
    layout = _impl.memory_format(x)
    d_dy = torch.empty_like(dy, memory_format=layout)
    d_x = x.new_empty(0) if vd is None else torch.empty_like(x, memory_format=layout)
    return d_dy, d_x, _fake_bwd(dy, x)[1]


_impl.register_fake(OP, _fake_fwd)
_impl.register_fake(OP + "_bwd", _fake_bwd)
_impl.register_fake(OP + "_bwd_plain", _fake_bwd_plain)
_impl.register_fake(OP + "_bwd2", _fake_bwd2)


# --- Autograd, once for all implementations.

_ACT = 6  # the place of act in the arguments behind the tensors


def _call(name: str, *tensors_args) -> Any:
    *tensors, args = tensors_args
    code = ACTS[args[_ACT]].code
    return _impl.op(args[-1], name)(*tensors, *args[:_ACT], code, *args[_ACT + 1 : -1])


def _fwd(x: Tensor, f, d, noise, strength, b, args: tuple[Any, ...]) -> Tensor:
    if _impl.records(x, f, d, noise, strength, b):
        return _Epilogue.apply(x, f, d, noise, strength, b, args)
    return _call(OP, x, f, d, noise, strength, b, args)


class _Epilogue(torch.autograd.Function):
    """y from x, f, d, noise, strength and b."""

    @staticmethod
    def forward(ctx: Any, x, f, d, noise, strength, b, args):  # torch.compile counts parameters
        ctx.save_for_backward(x, f, d, noise, strength, b)
        ctx.args = args
        ctx.set_materialize_grads(False)
        return _call(OP, x, f, d, noise, strength, b, args)

    @staticmethod
    def backward(ctx: Any, dy):
        if dy is None:
            return (None,) * 7
        x, f, d, noise, strength, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_ds = needs[4] and weight_gradients()
        dx, dd, db, ds = _bwd(dy, x, f, d, noise, strength, b, ctx.args, needs_ds=needs_ds)
        dd = dd.to(d.dtype) if needs[2] else None
        db = db.to(b.dtype) if needs[5] else None
        if needs_ds:
            ds = ds if strength.shape == ds.shape else ds.sum().reshape(strength.shape)
            ds = ds.to(strength.dtype)
        return (dx, None, dd, None, ds if needs_ds else None, db, None)


_checked, _quick = remember(_plan, _fwd, _Epilogue)
_valid, _quick_valid = remember(_plan_valid, _fwd, _Epilogue)


def _bwd(*tensors_args, needs_ds: bool = False) -> tuple[Any, Any, Any, Any]:
    if torch.is_grad_enabled():
        return _EpilogueBwd.apply(*tensors_args)
    if needs_ds:
        return _call(OP + "_bwd", *tensors_args)
    return *_call(OP + "_bwd_plain", *tensors_args), None


class _EpilogueBwd(torch.autograd.Function):
    """dx, dd [N, C], db [C] and dstrength [C] from dy."""

    @staticmethod
    def forward(ctx: Any, dy, x, f, d, noise, strength, b, args):
        ctx.save_for_backward(dy, x, f, d, noise, strength, b)
        ctx.args = args
        ctx.set_materialize_grads(False)
        return _call(OP + "_bwd", dy, x, f, d, noise, strength, b, args)

    @staticmethod
    def backward(ctx: Any, *cotangents):
        act, alpha, gain = ctx.args[_ACT : _ACT + 3]
        straight = act in ("linear", "relu") or (act == "lrelu" and alpha >= 0)
        second = _bwd2_straight if straight and gain else _bwd2_composed
        return (*second(ctx.saved_tensors, cotangents, ctx.args, ctx.needs_input_grad), None)


def _bwd2_straight(tensors, cotangents, args, needs) -> tuple[Tensor | None, ...]:
    """Gradients of <vx, dx> + <vd, dd> + <vb, db> + <vs, dstrength> where the activation is made of
    straight pieces, whose slope m the output shows: with t = m dy and the filter F they are
    d_dy = m (F(vx) d + F(x) vd + noise vs + vb), d_x = F'(t vd), d_d = sum(t F(vx)).
    """
    dy, x, f, d, noise, strength, b = tensors
    vx, vd, vb, vs = cotangents
    *act, impl = args[_ACT:]
    linear = (*args[:_ACT], "linear", 0.0, 1.0, -1.0, impl)
    if f is None and vd is None and vb is None and vs is None:
        if vx is None:
            return (None,) * 7
        if not needs[3]:  # m vx d is the first gradient, of vx in place of dy
            return (_bwd(vx, x, f, d, noise, strength, b, args)[0], *(None,) * 6)
    # One kernel, on a GPU without a filter; orders above are composed.
    one = not torch.is_grad_enabled() and _impl.has(impl, OP + "_bwd2")
    if one and (f is None or impl == "cpu"):
        cotangents = (vx, vd, vs, vb)
        d_dy, d_x, d_d = _call(OP + "_bwd2", *tensors, *cotangents, args)
        d_x = d_x if needs[1] and vd is not None else None
        d_d = d_d.to(d.dtype) if needs[3] and vx is not None else None
        return d_dy if needs[0] else None, d_x, None, d_d, None, None, None
    name, _, gain, clamp = act
    straight = name == "linear" and gain == 1 and clamp < 0  # m = 1
    with torch.no_grad():
        y = None if straight else _fwd(x, f, d, noise, strength, b, args)

    def slope_times(t: Tensor) -> Tensor:
        t = t.contiguous(memory_format=_impl.memory_format(x))
        return t if y is None else bias_act_bwd(t, y, None, False, 1, *act, False, impl)[0]

    if vx is not None:
        vx = vx.contiguous(memory_format=_impl.memory_format(x))
    d_dy = d_x = d_d = None
    if needs[0]:
        row = (None if vs is None else noise, vs, vb)
        if vx is not None:
            q = _fwd(vx, f, d, *row, linear)
            if vd is not None and f is None and x.dtype == vd.dtype:
                q = torch.addcmul(q, x, vd[:, :, None, None])
            elif vd is not None:
                q = q + _fwd(x, f, vd, None, None, None, linear)
        else:
            q = _fwd(x, f, x.new_zeros(x.shape[:2]) if vd is None else vd, *row, linear)
        d_dy = slope_times(q)
    needs_x, needs_d = needs[1] and vd is not None, needs[3] and vx is not None
    if needs_x or needs_d:
        at, by = x if vx is None else vx, d if vd is None else vd
        found = _bwd(slope_times(dy), at, f, by, None, None, None, linear)
        d_x = found[0] if needs_x else None
        d_d = found[1].to(d.dtype) if needs_d else None
    return d_dy, d_x, None, d_d, None, None, None


def _bwd2_composed(tensors, cotangents, args, needs) -> tuple[Tensor | None, ...]:
    """The same for any activation, of gankern's other ops: several passes."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a gradient stops here where one input was made from another.
        views: list[Any] = [
            t if t is None else t.view_as(t) if t.requires_grad else t.detach() for t in tensors
        ]
        dy, x, f, d, noise, strength, b = views
        c = x.shape[1]
        # The operands that the outputs belong to, present or not, in float32 and full shape.
        acc = torch.promote_types(x.dtype, torch.float32)
        full_d = x.new_ones(x.shape[:2], dtype=acc) if d is None else d.to(acc)
        full_b = x.new_zeros(c, dtype=acc) if b is None else b.to(acc)
        full_s = x.new_ones(c, dtype=acc) if strength is None else strength.to(acc).expand(c)
        wanted = [x, full_d, full_b, full_s]
        wanted = [t if t.requires_grad else t.detach().requires_grad_() for t in wanted]
        y = _composed(wanted[0], f, wanted[1], noise, wanted[3], wanted[2], *args)
        first = torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True)
        pairs = [
            (g, v) for g, v in zip(first, cotangents, strict=True)
            if g is not None and v is not None and g.requires_grad
        ]  # fmt: skip
        into = [t for t in (dy, x, d, strength, b) if t is not None and t.requires_grad]
        if not pairs or not into:
            return (None,) * 7
        found = iter(
            torch.autograd.grad(
                [g for g, _ in pairs], into, [v.to(g.dtype) for g, v in pairs],
                create_graph=graph, allow_unused=True,
            )
        )  # fmt: skip
    grads = [
        next(found) if t is not None and t.requires_grad else None
        for t in (dy, x, None, d, None, strength, b)
    ]
    return tuple(grads)
