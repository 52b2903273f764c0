"""bias_act: add a bias, activate, scale and clamp, in one pass over memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import Plan, remember

if _impl.triton is not None:
    import triton
    import triton.language as tl


class Act(NamedTuple):
    code: int  # as in csrc/kernels/bias_act.cu
    gain: float  # default gain: keeps the variance of a unit normal
    alpha: float  # default negative slope
    smooth: bool  # has a second derivative


ACTS = {
    "linear": Act(0, 1.0, 0.0, False),
    "relu": Act(1, math.sqrt(2), 0.0, False),
    "lrelu": Act(2, math.sqrt(2), 0.2, False),
    "tanh": Act(3, 1.0, 0.0, True),
    "sigmoid": Act(4, 1.0, 0.0, True),
    "elu": Act(5, 1.0, 0.0, True),
    "selu": Act(6, 1.0, 0.0, True),
    "softplus": Act(7, 1.0, 0.0, True),
    "swish": Act(8, math.sqrt(2), 0.0, True),
}


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Bias, activation, gain and clamp: y = clamp(act(x + b) * gain, -clamp, clamp).

    Args:
        x: any shape; float32, float16, bfloat16 or float64; any strides. Dense ones are kept.
        b: [x.shape[dim]] of x's dtype or float32, or None for no bias.
        dim: the dimension of x that b belongs to.
        act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
        alpha: negative slope of lrelu; None: 0.2.
        gain: factor after the activation; None: sqrt(2) for relu, lrelu and swish, else 1.
        clamp: largest magnitude of the output; None: not clamped.
        impl: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns:
        y of x's shape and dtype.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: impl cannot run here.

    Gradients: in x and b, of any order. Orders 1 and 2 are kernels; orders above are composed of
    PyTorch's. Saves y alone (swish, and lrelu with alpha < 0: x).
    Source: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", appendix B.
    """
    call = _call if is_compiling() else _quick
    return call(x, b, dim, act, alpha, gain, clamp, impl)


def _plan(x, b, dim, act, alpha, gain, clamp, impl) -> Plan:
    dim, args = _check(x, b, dim, act, alpha, gain, clamp)
    chosen = _impl.choose("bias_act", impl, x)
    if chosen == "reference":
        return bias_act_reference, (x, b, dim, act, *args)
    return _fwd, (x, b, (dim, act, *args, chosen))


def _check(x, b, dim, act, alpha, gain, clamp) -> tuple[int, tuple[float, float, float]]:
    """Validated dim >= 0 and (alpha, gain, clamp), with clamp -1 for none."""
    _impl.check_float("bias_act", "x", x)
    numbers = activation("bias_act", act, alpha, gain, clamp)
    if type(dim) is not int:
        dim = _impl.integer("bias_act", "dim", dim)
    ndim = x.dim()
    if not -ndim <= dim < ndim:
        raise ValueError(f"bias_act: dim must be a dimension of x {tuple(x.shape)}, got {dim}")
    dim %= ndim
    if b is not None:
        _impl.check_float("bias_act", "b", b)
        if b.shape != x.shape[dim : dim + 1]:
            raise ValueError(f"bias_act: b must have shape ({x.shape[dim]},), got {tuple(b.shape)}")
        if b.dtype not in (x.dtype, torch.float32):
            raise _impl.wrong_dtype("bias_act", "b", b, x)
        if b.device != x.device:
            raise ValueError(f"bias_act: b must be on x's device {x.device}, got {b.device}")
    return dim, numbers


def activation(op: str, act: Any, alpha: Any, gain: Any, clamp: Any) -> tuple[float, float, float]:
    """Validated (alpha, gain, clamp) of an activation, with clamp -1 for none."""
    spec = ACTS.get(act) if isinstance(act, str) else None
    if spec is None:
        error = ValueError if isinstance(act, str) else TypeError
        raise error(f"{op}: act must be one of {', '.join(ACTS)}, got {_impl.shown(act)}")
    if alpha is None:
        alpha = spec.alpha
    elif type(alpha) not in (float, int) or alpha != alpha:
        alpha = _impl.number(op, "alpha", alpha, "a number or None")
    if gain is None:
        gain = spec.gain
    elif type(gain) not in (float, int) or gain != gain:
        gain = _impl.number(op, "gain", gain, "a number or None")
    if clamp is None:
        clamp = -1.0
    elif type(clamp) not in (float, int) or not clamp >= 0:
        clamp = _impl.number(op, "clamp", clamp, "a number or None", "None or at least 0")
    return float(alpha), float(gain), float(clamp) + 0.0  # a clamp of -0.0 is 0


# --- Reference: plain PyTorch, differentiable to any order.

_REFERENCE = {
    "linear": lambda u, alpha: u,
    "relu": lambda u, alpha: F.relu(u),
    "lrelu": lambda u, alpha: F.leaky_relu(u, alpha),
    "tanh": lambda u, alpha: torch.tanh(u),
    "sigmoid": lambda u, alpha: torch.sigmoid(u),
    "elu": lambda u, alpha: F.elu(u),
    "selu": lambda u, alpha: F.selu(u),
    "softplus": lambda u, alpha: F.softplus(u, threshold=40),  # exact in float64, unlike 20
    "swish": lambda u, alpha: u * torch.sigmoid(u),
}


def bias_act_reference(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float
) -> Tensor:
    """The formula in PyTorch operations; clamp < 0 means none."""
    if b is not None:
        x = x + b.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.dim())])
    x = _REFERENCE[act](x, alpha)
    if gain != 1:
        x = x * gain
    return x.clamp(-clamp, clamp) if clamp >= 0 else x


# --- Triton.

if _impl.triton is not None:
    BLOCK = 1024

    @triton.jit
    def _tanh(u):
        e = tl.exp(-2 * tl.abs(u))
        small = u * (1 - u * u * (1 / 3 - u * u * (2 / 15)))  # where 1 - e would cancel
        t = (1 - e) / (1 + e)
        return tl.where(tl.abs(u) < 0.05, small, tl.where(u < 0, -t, t))

    @triton.jit
    def _expm1(u):
        small = u * (1 + u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120)))))
        return tl.where(tl.abs(u) < 0.05, small, tl.exp(u) - 1)

    @triton.jit
    def _softplus(u):
        z = tl.exp(-tl.abs(u))
        log1p = tl.where(z < 1e-2, z * (1 - z * (1 / 2 - z * (1 / 3 - z / 4))), tl.log(1 + z))
        return tl.maximum(u, 0) + log1p

    @triton.jit
    def _act_value(u, ACT: tl.constexpr, alpha):
        if ACT <= 2:
            negative = tl.where(u != u, u, 0.0) if ACT == 1 else u * alpha
            a = tl.where(u > 0, u, negative)
        elif ACT == 3:
            a = _tanh(u)
        elif ACT == 4:
            a = 1 / (1 + tl.exp(-u))
        elif ACT == 5:
            a = tl.where(u > 0, u, _expm1(u))
        elif ACT == 6:
            a = 1.0507009873554805 * tl.where(u > 0, u, 1.6732632423543772 * _expm1(u))
        elif ACT == 7:
            a = _softplus(u)
        else:
            a = u / (1 + tl.exp(-u))
        return a

    @triton.jit
    def _act_slope(a, u, ACT: tl.constexpr, alpha, FROM_X: tl.constexpr):
        if ACT <= 2:
            s = tl.where((u if FROM_X else a) > 0, 1.0, alpha)
        elif ACT == 3:
            s = 1 - a * a
        elif ACT == 4:
            s = a * (1 - a)
        elif ACT == 5:
            s = tl.where(a > 0, 1.0, a + 1)
        elif ACT == 6:
            s = tl.where(a > 0, 1.0507009873554805, a + 1.7580993408473766)
        elif ACT == 7:
            s = -_expm1(-a)
        else:
            g = 1 / (1 + tl.exp(-u))
            s = g * (1 + u * (1 - g))
        return s

    @triton.jit
    def _act_curve(a, u, gain, ACT: tl.constexpr):
        if ACT == 3:
            c = -2 * a
        elif ACT == 4:
            c = 1 - 2 * a
        elif ACT == 5 or ACT == 6:
            c = tl.where(a > 0, 0.0, 1.0)
        elif ACT == 7:
            c = tl.exp(-a)
        else:
            g = 1 / (1 + tl.exp(-u))
            c = gain * g * (1 - g) * (2 + u * (1 - 2 * g))
        return c

    @triton.jit
    def _quotient(i, n):
        """i // n of 0 <= i < 2**20, by a multiplication: a division of integers is 20 of them."""
        return ((i.to(tl.float32) + 0.5) * (1 / n)).to(tl.int32)

    @triton.jit
    def bias_act_fwd_kernel(
        x_ptr, b_ptr, y_ptr, numel, C, inner, alpha, gain, clamp,
        ACT: tl.constexpr, HAS_B: tl.constexpr, CLAMPED: tl.constexpr, LONG: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        # BLOCK elements side by side, from `first` on, an integer as wide as numel. LONG: a channel
        # has as many or more (inner), so that they are of two channels at most.
        first = (tl.program_id(0) + 0 * numel) * BLOCK
        i = tl.arange(0, BLOCK)
        inside = i < tl.minimum(numel - first, BLOCK).to(tl.int32)
        u = tl.load(x_ptr + first + i, mask=inside).to(tl.float32)
        if HAS_B:
            plane = first // inner
            rest = first - plane * inner
            c = plane % C
            if LONG:
                here = tl.load(b_ptr + c).to(tl.float32)
                then = tl.load(b_ptr + tl.where(c + 1 < C, c + 1, 0)).to(tl.float32)
                u += tl.where(i < tl.minimum(inner - rest, BLOCK).to(tl.int32), here, then)
            else:
                k = _quotient(rest.to(tl.int32) + i, inner)  # channels further than c
                past = k - tl.minimum(C - c, 2 * BLOCK).to(tl.int32)
                k -= tl.where(past < 0, 0, (1 + _quotient(tl.maximum(past, 0), C)) * C)
                u += tl.load(b_ptr + c + k, mask=inside).to(tl.float32)
        y = _act_value(u, ACT, alpha) * gain
        if CLAMPED:
            y = tl.where(y > clamp, clamp, tl.where(y < -clamp, -clamp, y))
        tl.store(y_ptr + first + i, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def bias_act_bwd_kernel(
        dy_ptr, v_ptr, ref_ptr, b_ptr, dx_ptr, sums_ptr,
        outer, C, inner, row_parts, alpha, gain, inv_gain, clamp,
        ACT: tl.constexpr, HAS_B: tl.constexpr, CLAMPED: tl.constexpr, FROM_X: tl.constexpr,
        SECOND: tl.constexpr, SUMS: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        # ROWS of the outer rows [C, inner] at a time and of each BLOCK elements: of one channel or,
        # LAST, of as many channels, inner being 1. A part is each row_parts-th tile of rows, and in
        # these each span_parts-th span.
        part = tl.program_id(1)
        span_parts = tl.num_programs(1) // row_parts
        j = tl.arange(0, BLOCK)[None, :]
        r = tl.arange(0, ROWS)[:, None]
        rows = tl.cast(outer, tl.int64)
        row_size = tl.cast(C, tl.int64) * inner
        if LAST:
            c = tl.program_id(0).to(tl.int64) * BLOCK
            begin = c
            width = tl.minimum(C - c, BLOCK)
        else:
            c = tl.program_id(0).to(tl.int64)
            begin = c * inner
            width = tl.cast(inner, tl.int64)
        bias = 0.0
        if HAS_B:
            if LAST:
                bias = tl.load(b_ptr + c + j, mask=j < width, other=0.0).to(tl.float32)
            else:
                bias = tl.load(b_ptr + c).to(tl.float32)
        if not FROM_X:
            # y, as it was stored, meets the clamp as it was stored.
            clamp = tl.full([], clamp, tl.float32).to(dx_ptr.dtype.element_ty).to(tl.float32)
        acc = tl.zeros([ROWS, BLOCK], tl.float32)
        at = r.to(tl.int64) * row_size + j
        first = (part // row_parts).to(tl.int64) * BLOCK
        row, start = (part % row_parts).to(tl.int64) * ROWS, first
        while row < rows:  # one loop, not two: half as many pointers to keep
            left = tl.minimum(width - start, BLOCK).to(tl.int32)
            inside = (r < tl.minimum(rows - row, ROWS).to(tl.int32)) & (j < left)
            offset = row * row_size + begin + start
            ref = tl.load(ref_ptr + offset + at, mask=inside, other=0.0).to(tl.float32)
            d = tl.load(dy_ptr + offset + at, mask=inside, other=0.0).to(tl.float32)
            u = ref + bias
            if FROM_X:
                a = _act_value(u, ACT, alpha)
                y = a * gain
            else:
                a = ref * inv_gain
                y = ref
            if SECOND:
                d = d * tl.load(v_ptr + offset + at, mask=inside, other=0.0).to(tl.float32)
                d = d * _act_curve(a, u, gain, ACT)
            else:
                d = d * gain * _act_slope(a, u, ACT, alpha, FROM_X)
            if CLAMPED:
                d = tl.where((y > -clamp) & (y < clamp), d, 0.0)
            tl.store(dx_ptr + offset + at, d.to(dx_ptr.dtype.element_ty), mask=inside)
            acc += tl.where(inside, d, 0.0)
            start += span_parts * BLOCK
            row = tl.where(start < width, row, row + row_parts * ROWS)
            start = tl.where(start < width, start, first)
        if SUMS:
            sums = sums_ptr + part.to(tl.int64) * C + c
            if LAST:
                tl.store(sums + j, tl.sum(acc, 0)[None, :], mask=j < width)
            else:
                tl.store(sums, tl.sum(acc))

    def _even(items: int, parts: int) -> int:
        """The fewest parts of which none has more items than in `parts` parts."""
        return triton.cdiv(items, triton.cdiv(items, min(items, parts)))

    @_impl.triton_op("bias_act")
    def _triton_fwd(
        x: Tensor, b: Tensor | None, dim: int, act: int, alpha: float, gain: float, clamp: float
    ) -> Tensor:
        x = _impl.dense(x)
        y = torch.empty_like(x)
        if x.numel() == 0:
            return y
        _, C, inner = _impl.around(x, dim)
        slope = 1.0 if act == 0 else alpha
        torch.library.wrap_triton(bias_act_fwd_kernel)[(triton.cdiv(x.numel(), BLOCK),)](
            x, x if b is None else b, y, x.numel(), C, inner, slope, gain, clamp,
            ACT=act, HAS_B=b is not None, CLAMPED=clamp >= 0, LONG=inner >= BLOCK, BLOCK=BLOCK,
        )  # fmt: skip
        return y

    def _triton_grad(
        dy: Tensor, v: Tensor | None, ref: Tensor, b: Tensor | None, dim: int, act: int,
        alpha: float, gain: float, clamp: float, from_x: bool, needs_db: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ref = _impl.dense(ref)
        dy = _impl.laid_out_like(dy, ref)
        v = None if v is None else _impl.laid_out_like(v, ref)
        dx = torch.empty_like(ref)
        db_dtype = ref.dtype if b is None else b.dtype
        C = ref.shape[dim]
        if ref.numel() == 0:
            return dx, torch.zeros(C if needs_db else 0, dtype=db_dtype, device=ref.device)
        b = b if from_x else None  # y has it
        outer, channels, inner = _impl.around(ref, dim)
        last = inner == 1
        if last and C < 16 and outer % 16 == 0:
            # 16 rows as one of 16 C channels, whose accesses are of 16 bytes.
            outer, channels, b = outer // 16, 16 * C, None if b is None else b.repeat(16)
        block = _impl.power_of_2(channels, 64) if last else _impl.power_of_2(inner, BLOCK)
        rows = _impl.power_of_2(outer, BLOCK // block)
        groups, spans = (
            (triton.cdiv(channels, block), 1) if last else (C, triton.cdiv(inner, block))
        )
        row_blocks, span_blocks = _impl.typical(triton.cdiv(outer, rows)), _impl.typical(spans)
        parts = max(64, 2048 // _impl.typical(groups))
        parts = max(1, min(triton.cdiv(row_blocks * span_blocks, 4), parts))
        row_parts = _even(row_blocks, parts)
        parts = row_parts * _even(span_blocks, parts // row_parts)
        sums = torch.empty((parts, channels) if needs_db else (0, C), device=ref.device)
        slope = {0: 1.0, 1: 0.0}.get(act, alpha)
        torch.library.wrap_triton(bias_act_bwd_kernel)[(groups, parts)](
            dy, dy if v is None else v, ref, dy if b is None else b, dx, sums,
            outer, channels, inner, row_parts, slope, gain, 1 / gain if gain else 0.0, clamp,
            ACT=act, HAS_B=b is not None, CLAMPED=clamp >= 0, FROM_X=from_x,
            SECOND=v is not None, SUMS=needs_db, LAST=last, ROWS=rows, BLOCK=block,
        )  # fmt: skip
        db = sums.reshape(-1, C).sum(0) if needs_db else sums.new_empty(0)
        return dx, db.to(db_dtype)

    @_impl.triton_op("bias_act_bwd")
    def _triton_bwd(
        dy: Tensor, ref: Tensor, b: Tensor | None, dim: int, act: int, alpha: float, gain: float,
        clamp: float, from_x: bool, needs_db: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _triton_grad(dy, None, ref, b, dim, act, alpha, gain, clamp, from_x, needs_db)

    @_impl.triton_op("bias_act_bwd2")
    def _triton_bwd2(
        dy: Tensor, v: Tensor, ref: Tensor, b: Tensor | None, dim: int, act: int, alpha: float,
        gain: float, clamp: float, from_x: bool,
    ) -> Tensor:  # fmt: skip
        return _triton_grad(dy, v, ref, b, dim, act, alpha, gain, clamp, from_x, False)[0]


# --- Shape functions of the registered ops.


def _fake_fwd(x, b, dim, act, alpha, gain, clamp):
    return torch.empty_like(x)


def _fake_bwd(dy, ref, b, dim, act, alpha, gain, clamp, from_x, needs_db):
    like = ref if b is None else b
    return torch.empty_like(ref), like.new_empty(ref.shape[dim] if needs_db else 0)


def _fake_bwd2(dy, v, ref, b, dim, act, alpha, gain, clamp, from_x):
    return torch.empty_like(ref)


_impl.register_fake("bias_act", _fake_fwd)
_impl.register_fake("bias_act_bwd", _fake_bwd)
_impl.register_fake("bias_act_bwd2", _fake_bwd2)


# --- Autograd, once for all implementations.


def _fwd(x: Tensor, b: Tensor | None, args: tuple[Any, ...]) -> Tensor:
    """args: dim, act, alpha, gain, clamp, impl."""
    if _impl.records(x, b):
        return _BiasAct.apply(x, b, args)
    dim, act, *numbers, impl = args
    return _impl.op(impl, "bias_act")(x, b, dim, ACTS[act].code, *numbers)


def _bwd(dy: Tensor, ref: Tensor, b: Tensor | None, needs_db: bool, dim: int, act: str, *args):
    """(dx, db); db is empty unless it is needed."""
    if torch.is_grad_enabled():
        return _BiasActBwd.apply(dy, ref, b, needs_db, dim, act, *args)
    bwd = _impl.op(args[-1], "bias_act_bwd")
    return bwd(dy, ref, b, dim, ACTS[act].code, *args[:-1], needs_db)


def needs_input(act: str, alpha: float) -> bool:
    """Whether y does not determine act'(x + b)."""
    return act == "swish" or (act == "lrelu" and alpha < 0)


class _BiasAct(torch.autograd.Function):
    """y from x and b. The gradient's reference is y wherever y determines act'(x + b)."""

    @staticmethod
    def forward(ctx: Any, x, b, args):
        dim, act, alpha, gain, clamp, impl = args
        y = _impl.op(impl, "bias_act")(x, b, dim, ACTS[act].code, alpha, gain, clamp)
        from_x = needs_input(act, alpha)
        ctx.save_for_backward(x if from_x else y, b)
        ctx.args = (dim, act, alpha, gain, clamp, from_x, impl)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        ref, b = ctx.saved_tensors
        needs_db = ctx.needs_input_grad[1]
        dx, db = _bwd(dy, ref, b, needs_db, *ctx.args)
        return dx, db if needs_db else None, None


_call, _quick = remember(_plan, _fwd, _BiasAct)


class _BiasActBwd(torch.autograd.Function):
    """dx = dy * gain * act'(reference) and db = sum(dx): linear in dy."""

    @staticmethod
    def forward(ctx: Any, dy, ref, b, needs_db, dim, act, alpha, gain, clamp, from_x, impl):
        ctx.save_for_backward(dy, ref, b)
        ctx.args = (dim, act, alpha, gain, clamp, from_x, impl)
        ctx.set_materialize_grads(False)
        bwd = _impl.op(impl, "bias_act_bwd")
        return bwd(dy, ref, b, dim, ACTS[act].code, alpha, gain, clamp, from_x, needs_db)

    @staticmethod
    def backward(ctx: Any, v, v_db):
        dy, ref, b = ctx.saved_tensors
        dim, act, from_x = ctx.args[0], ctx.args[1], ctx.args[5]
        if v_db is not None:
            row = v_db.to(ref.dtype).reshape([-1 if i == dim else 1 for i in range(ref.dim())])
            v = row.expand_as(ref) if v is None else v + row
        if v is None:
            return (None,) * 11
        d_dy = d_ref = d_b = None
        if ctx.needs_input_grad[0]:
            d_dy, _ = _bwd(v, ref, b, False, *ctx.args)
        if ACTS[act].smooth and ctx.needs_input_grad[1]:
            d_ref = _BiasActBwd2.apply(dy, v, ref, b, *ctx.args)
            if from_x and b is not None and ctx.needs_input_grad[2]:
                d_b = d_ref.sum([i for i in range(ref.dim()) if i != dim]).to(b.dtype)
        return (d_dy, d_ref, d_b, *(None,) * 8)


class _BiasActBwd2(torch.autograd.Function):
    """dy * v * d(gain * act')/d(reference); its own gradient is composed of PyTorch's."""

    @staticmethod
    def forward(ctx: Any, dy, v, ref, b, dim, act, alpha, gain, clamp, from_x, impl):
        ctx.save_for_backward(dy, v, ref, b)
        ctx.args = (dim, act, alpha, gain, clamp, from_x)
        bwd2 = _impl.op(impl, "bias_act_bwd2")
        return bwd2(dy, v, ref, b, dim, ACTS[act].code, alpha, gain, clamp, from_x)

    @staticmethod
    def backward(ctx: Any, grad):
        tensors = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [t if t is None else t.view_as(t) for t in tensors]
            out = _curve_reference(*inputs, *ctx.args)
            if not out.requires_grad:  # of elu and selu, for constant dy and v
                return (None,) * 11
            wanted = [t for t in inputs if t is not None and t.requires_grad]
            grads = iter(
                torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True)
            )
        found = [next(grads) if t is not None and t.requires_grad else None for t in inputs]
        return (*found, *(None,) * 7)


def _curve_reference(dy, v, ref, b, dim, act, alpha, gain, clamp, from_x) -> Tensor:
    """What bias_act_bwd2 computes, differentiably: csrc/kernels/bias_act.cu, act_curve."""
    u = ref
    if from_x and b is not None:
        u = ref + b.to(ref.dtype).reshape([-1 if i == dim else 1 for i in range(ref.dim())])
    a = ref / gain if gain else torch.zeros_like(ref)
    if act == "tanh":
        curve = -2 * a
    elif act == "sigmoid":
        curve = 1 - 2 * a
    elif act in ("elu", "selu"):
        curve = (a <= 0).to(ref.dtype)
    elif act == "softplus":
        curve = torch.exp(-a)
    else:
        s = torch.sigmoid(u)
        curve = gain * s * (1 - s) * (2 + u * (1 - 2 * s))
    y = bias_act_reference(u, None, dim, act, alpha, gain, -1.0) if from_x else ref
    inside = 1 if clamp < 0 else (y.abs() < clamp).to(ref.dtype)
    return dy * v * curve * inside
