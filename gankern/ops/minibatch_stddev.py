"""Minibatch standard deviation: how much the samples of a group differ, as extra channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import Plan, remember

if _impl.triton is not None:
    import triton
    import triton.language as tl

# Added to the variance, as in the paper's code: equal samples have a finite gradient.
EPS = 1e-8


def minibatch_stddev(
    x: Tensor, group_size: int | None = 4, num_channels: int = 1, *, impl: str | None = None
) -> Tensor:
    """Append to x the standard deviation over groups of samples, averaged over channels and pixels.

    std[m, c, h, w] = sqrt(var over the samples n of group m of x[n, c, h, w] + 1e-8)
    y[n, C + f, h, w] = mean of std[m, c, h', w'] over h', w' and the f-th C / num_channels channels

    The batch falls into M = ceil(N / group_size) groups, sample n into group n mod M: at most
    `group_size` samples each. Where group_size divides N this is the grouping of StyleGAN; where it
    does not, the groups' sizes differ by one instead of an error. The variance is the biased one.

    Args:
        x: [N, C, *]; float32, float16, bfloat16 or float64; any strides (contiguous and
            channels-last ones are kept).
        group_size: samples in a group; None or a number over N takes the whole batch (PGGAN).
        num_channels: statistics appended; divides C.
        impl: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns:
        y: [N, C + num_channels, *] of x's dtype and memory format.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: impl cannot run here.

    Gradients: in x, of any order. The first is a kernel; those above are composed of PyTorch's.
    Saves x.
    Source: Karras et al. 2018, "Progressive Growing of GANs", section 3.
    """
    return (_call if is_compiling() else _quick)(x, group_size, num_channels, impl)


def _plan(x: Tensor, group_size: int | None, num_channels: int, impl: str | None) -> Plan:
    group_size, num_channels = _check(x, group_size, num_channels)
    chosen = _impl.choose("minibatch_stddev", impl, x)
    if chosen == "reference":
        return minibatch_stddev_reference, (x, group_size, num_channels)
    return _fwd, (x, _groups(x.shape[0], group_size), num_channels, chosen)


def _check(x: Tensor, group_size: int | None, num_channels: int) -> tuple[int | None, int]:
    """Validated group_size and num_channels."""
    _impl.check_float("minibatch_stddev", "x", x)
    shape = x.shape
    if len(shape) < 2 or shape[1] == 0:
        raise ValueError(
            f"minibatch_stddev: x must be (N, C, *) with at least one channel, got {tuple(shape)}"
        )
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        group_size = _positive("group_size", group_size, "an int or None")
    if type(num_channels) is not int or num_channels < 1:
        num_channels = _positive("num_channels", num_channels, "an int")
    if shape[1] % num_channels:
        raise ValueError(
            f"minibatch_stddev: num_channels must divide the {shape[1]} channels of x, "
            f"got {num_channels}"
        )
    return group_size, num_channels


def _positive(name: str, value: Any, wanted: str) -> int:
    value = _impl.integer("minibatch_stddev", name, value, wanted)
    if value < 1:
        raise ValueError(f"minibatch_stddev: {name} must be at least 1, got {value}")
    return value


def _groups(n: int, group_size: int | None) -> int:
    """M, the number of groups of n samples."""
    return 1 if group_size is None else max(1, -(-n // group_size))


# --- Reference: plain PyTorch, differentiable to any order.


def minibatch_stddev_reference(
    x: Tensor, group_size: int | None = 4, num_channels: int = 1
) -> Tensor:
    """The formula in PyTorch operations, in float32 for 16-bit types."""
    n, groups = x.shape[0], _groups(x.shape[0], group_size)
    if n % groups == 0:
        statistic = _statistic(x, groups, num_channels)
    else:
        parts = [_statistic(x[m::groups], 1, num_channels) for m in range(groups)]
        statistic = torch.cat(parts)
    statistic = statistic.repeat(-(-n // groups), 1)[:n]  # [N, F]: sample n has group n mod M
    planes = statistic.reshape(n, num_channels, *[1] * (x.dim() - 2))
    y = torch.cat([x, planes.expand(-1, -1, *x.shape[2:]).to(x.dtype)], dim=1)
    return y.contiguous(memory_format=_impl.memory_format(x))


def _statistic(x: Tensor, groups: int, num_channels: int) -> Tensor:
    """[M, F], of groups of one size."""
    n, c = x.shape[:2]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x.reshape(n // groups, groups, num_channels, c // num_channels, *x.shape[2:])
    x = x - x.mean(0)  # [G, M, F, C / F, *]
    return (x.square().mean(0) + EPS).sqrt().flatten(2).mean(2)


def _bwd_reference(dy: Tensor, x: Tensor, groups: int, num_channels: int) -> Tensor:
    """What minibatch_stddev_bwd computes, differentiably: csrc/kernels/minibatch_stddev.cu."""
    n, c = x.shape[:2]
    if x.numel() == 0:
        return dy[:, :c] + x * 0
    parts, largest = [], -(-n // groups)
    for m in range(groups):
        size = len(range(m, n, groups))
        v = x[m::groups].to(torch.promote_types(x.dtype, torch.float32))
        v = v.reshape(size, num_channels, -1)  # [G, F, C / F * pixels]
        slope = dy[m::groups, c:].to(v.dtype).reshape(size, num_channels, -1).sum((0, 2))
        v = v - v[0].detach()  # exact where samples are near each other, unlike x - mean
        v = v - v.mean(0)
        std = (v.square().mean(0) + EPS).sqrt()
        dv = v / std * (slope / (size * v.shape[2]))[:, None]
        parts.append(torch.nn.functional.pad(dv, (0, 0, 0, 0, 0, largest - size)))
    dx = torch.stack(parts, 1).flatten(0, 1)[:n]  # sample n is of group n mod M
    return dy[:, :c] + dx.reshape(x.shape).to(x.dtype)


# --- Triton. A program takes BLOCK positions of every sample of a group; the statistic, of few
# numbers, is finished by PyTorch.

if _impl.triton is not None:
    BLOCK = 1024

    @triton.jit
    def _positions(
        programs, F, L, ROW: tl.constexpr, Y_ROW: tl.constexpr, WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """BLOCK of the L positions of one statistic: the group, the first of them in a sample,
        theirs in x and in y from there, and which there are. They lie in rows of ROW, Y_ROW apart
        in y and F * ROW in x; ROW is 0 where they are one row."""
        m = (tl.program_id(0) // programs // F).to(tl.int64)
        f = (tl.program_id(0) // programs % F).to(tl.int64)
        program = tl.program_id(0) % programs
        if WIDE:
            program = program.to(tl.int64)
        i = program * BLOCK + tl.arange(0, BLOCK)
        if ROW == 0:
            first, x_at, y_at = f * L, i, i
        else:
            first, row, col = f * ROW, i // ROW, i % ROW
            x_at, y_at = row * F * ROW + col, row * Y_ROW + col
        return m, first, x_at, y_at, i < L

    @triton.jit
    def minibatch_stddev_fwd_kernel(
        x_ptr, y_ptr, sums_ptr, programs, N, M, F, L, x_sample, y_sample,
        ROW: tl.constexpr, Y_ROW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        m, first, x_at, y_at, inside = _positions(programs, F, L, ROW, Y_ROW, WIDE, BLOCK)
        x_step, y_step = tl.cast(x_sample, tl.int64), tl.cast(y_sample, tl.int64)
        x_ptr, y_ptr = x_ptr + first, y_ptr + first
        origin = tl.load(x_ptr + m * x_step + x_at, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        for n in range(m, tl.cast(N, tl.int64), M):
            x = tl.load(x_ptr + n * x_step + x_at, mask=inside, other=0.0)
            tl.store(y_ptr + n * y_step + y_at, x, mask=inside)
            d = x.to(tl.float32) - origin
            total += d
            square += d * d
        size = (N - m + M - 1) // M
        d = total / size
        var = tl.maximum(square / size - d * d, 0.0, propagate_nan=tl.PropagateNan.ALL)
        std = tl.where(inside, tl.sqrt(var + 1e-8), 0.0)
        tl.store(sums_ptr + tl.program_id(0), tl.sum(std))

    @triton.jit
    def minibatch_stddev_bwd_kernel(
        dy_ptr, x_ptr, slope_ptr, dx_ptr, programs, N, M, F, L, x_sample, y_sample,
        ROW: tl.constexpr, Y_ROW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        m, first, x_at, y_at, inside = _positions(programs, F, L, ROW, Y_ROW, WIDE, BLOCK)
        x_step, y_step = tl.cast(x_sample, tl.int64), tl.cast(y_sample, tl.int64)
        x_ptr, dy_ptr, dx_ptr = x_ptr + first, dy_ptr + first, dx_ptr + first
        origin = tl.load(x_ptr + m * x_step + x_at, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        for n in range(m, tl.cast(N, tl.int64), M):
            x = tl.load(x_ptr + n * x_step + x_at, mask=inside, other=0.0)
            d = x.to(tl.float32) - origin
            total += d
            square += d * d
        size = (N - m + M - 1) // M
        mean = total / size
        var = tl.maximum(square / size - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
        factor = tl.load(slope_ptr + tl.program_id(0) // programs) / tl.sqrt(var + 1e-8)
        for n in range(m, tl.cast(N, tl.int64), M):
            x = tl.load(x_ptr + n * x_step + x_at, mask=inside, other=0.0)
            dy = tl.load(dy_ptr + n * y_step + y_at, mask=inside, other=0.0)
            dx = dy.to(tl.float32) + factor * ((x.to(tl.float32) - origin) - mean)
            at = dx_ptr + n * x_step + x_at
            tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=inside)

    def _arguments(x: Tensor, groups: int, num_channels: int) -> tuple[dict[str, int], tuple[int]]:
        """What both kernels take, and their grid."""
        n, c = x.shape[:2]
        pixels = x[0, 0].numel()
        last = not x.is_contiguous()
        programs = triton.cdiv(c // num_channels * pixels, BLOCK)
        arguments = {
            "programs": programs,
            "N": n,
            "M": groups,
            "F": num_channels,
            "L": c // num_channels * pixels,
            "x_sample": c * pixels,
            "y_sample": (c + num_channels) * pixels,
            "ROW": c // num_channels if last else 0,
            "Y_ROW": c + num_channels if last else 0,
            "WIDE": (c + num_channels) * (pixels + BLOCK) >= 2**31,
            "BLOCK": BLOCK,
        }
        return arguments, (groups * num_channels * programs,)

    @_impl.triton_op("minibatch_stddev")
    def _triton_fwd(x: Tensor, groups: int, num_channels: int) -> Tensor:
        layout = _impl.memory_format(x)
        x = x.contiguous(memory_format=layout)
        n, c = x.shape[:2]
        shape = (n, c + num_channels, *x.shape[2:])
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        if x.numel() == 0:
            return y
        arguments, grid = _arguments(x, groups, num_channels)
        sums = torch.empty(groups, num_channels, arguments["programs"], device=x.device)
        torch.library.wrap_triton(minibatch_stddev_fwd_kernel)[grid](x, y, sums, **arguments)
        statistic = sums.sum(2) / arguments["L"]
        statistic = statistic.repeat(-(-n // groups), 1)[:n].to(x.dtype)
        y[:, c:] = statistic.reshape(n, num_channels, *[1] * (x.dim() - 2))
        return y

    @_impl.triton_op("minibatch_stddev_bwd")
    def _triton_bwd(dy: Tensor, x: Tensor, groups: int, num_channels: int) -> Tensor:
        layout = _impl.memory_format(x)
        x, dy = x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)
        dx = torch.empty_like(x)
        if x.numel() == 0:
            return dx
        n, c = x.shape[:2]
        arguments, grid = _arguments(x, groups, num_channels)
        slope = dy[:, c:].to(torch.float32).reshape(n, num_channels, -1).sum(2)
        size = -(-n // groups)
        slope = torch.nn.functional.pad(slope, (0, 0, 0, size * groups - n))
        counts = (n - torch.arange(groups, device=x.device) + groups - 1) // groups
        slope = slope.reshape(size, groups, num_channels).sum(0) / (
            counts[:, None] * arguments["L"]
        )
        torch.library.wrap_triton(minibatch_stddev_bwd_kernel)[grid](dy, x, slope, dx, **arguments)
        return dx


# --- Shape functions of the registered ops.


def _fake_fwd(x, groups, num_channels):
    n, c = x.shape[:2]
    shape, layout = (n, c + num_channels, *x.shape[2:]), _impl.memory_format(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _fake_bwd(dy, x, groups, num_channels):
    return torch.empty_like(x, memory_format=_impl.memory_format(x))


_impl.register_fake("minibatch_stddev", _fake_fwd)
_impl.register_fake("minibatch_stddev_bwd", _fake_bwd)


# --- Autograd, once for all implementations.


def _fwd(x: Tensor, groups: int, num_channels: int, impl: str) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _MinibatchStddev.apply(x, groups, num_channels, impl)
    return _impl.op(impl, "minibatch_stddev")(x, groups, num_channels)


class _MinibatchStddev(torch.autograd.Function):
    """y from x."""

    @staticmethod
    def forward(ctx: Any, x, groups, num_channels, impl):
        ctx.save_for_backward(x)
        ctx.args = (groups, num_channels, impl)
        return _impl.op(impl, "minibatch_stddev")(x, groups, num_channels)

    @staticmethod
    def backward(ctx: Any, dy):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx = _MinibatchStddevBwd.apply(dy, x, *ctx.args)
        else:
            dx = _impl.op(ctx.args[-1], "minibatch_stddev_bwd")(dy, x, *ctx.args[:-1])
        return dx, None, None, None


_call, _quick = remember(_plan, _fwd, _MinibatchStddev)


class _MinibatchStddevBwd(torch.autograd.Function):
    """dx from dy and x; its own gradient is composed of PyTorch's operations."""

    @staticmethod
    def forward(ctx: Any, dy, x, groups, num_channels, impl):
        ctx.save_for_backward(dy, x)
        ctx.args = (groups, num_channels)
        return _impl.op(impl, "minibatch_stddev_bwd")(dy, x, groups, num_channels)

    @staticmethod
    def backward(ctx: Any, g):
        if not torch.is_grad_enabled() and g.numel() and g.shape[0] % ctx.args[0] == 0:
            return (*_bwd2(g, *ctx.saved_tensors, *ctx.args), None, None, None)
        with torch.enable_grad():
            inputs = [t.view_as(t) for t in ctx.saved_tensors]
            dx = _bwd_reference(*inputs, *ctx.args)
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(dx, wanted, g, create_graph=True))
        return (*(next(found) if t.requires_grad else None for t in inputs), None, None, None)


def _bwd2(g: Tensor, dy: Tensor, x: Tensor, groups: int, num_channels: int) -> tuple[Tensor, ...]:
    """Gradients of <g, dx> in dy and x, for groups of one size, in few launches.

    With v = x - mean, a = Σ_n g v, s the standard deviation and c the factor that dy gives: <g, dx>
    is Σ c a / s, so that c gets Σ a / s and x gets (g - mean(g) - v a / (G s²)) c / s.
    """
    n, channels = x.shape[:2]
    size, dtype = n // groups, torch.promote_types(x.dtype, torch.float32)
    shape = (size, groups, num_channels, -1)  # [G, M, F, C / F * pixels]
    v, gx = x.to(dtype).reshape(shape), g.to(dtype).reshape(shape)
    scale = 1 / (size * v.shape[3])
    v = v - v[:1]  # exact where samples are near each other
    inverse = (v.var(0, correction=0) + EPS).rsqrt()  # 1 / s, [M, F, C / F * pixels]
    v = v - v.mean(0)
    ratio = (gx * v).sum(0) * inverse
    c = dy[:, channels:].to(dtype).reshape(shape).sum((0, 3)) * scale  # [M, F]
    dx = torch.addcmul(gx - gx.mean(0), v, ratio * inverse, value=-1 / size)
    dx = dx * (inverse * c[:, :, None])
    dc = (ratio.sum(2) * scale).to(x.dtype).repeat(size, 1)  # [N, F]
    dc = dc.reshape(n, num_channels, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return torch.cat([g, dc], 1), dx.reshape(x.shape).to(x.dtype)
