"""StyleGAN2's demodulation coefficients: one over the length of each sample's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gankern.ops import _impl
from gankern.ops._remember import Plan, remember
from gankern.ops.convolution import gate, weight_gradients

if _impl.triton is not None:
    import triton
    import triton.language as tl


def demod_coefs(
    weight: Tensor, styles: Tensor, eps: float = 1e-8, *, impl: str | None = None
) -> Tensor:
    """d[n,o] = rsqrt(Σ_i styles[n,i]² Σ_k weight[o,i,k]² + eps), without the weights of a sample.

    Args:
        weight: (O, I, kh, kw); float32, float16, bfloat16 or float64; contiguous and channels-last
            weights are read as they lie.
        styles: (N, I), of any of these dtypes, on weight's device.
        eps: added to the sum; above 0 it keeps a channel without weights finite.
        impl: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns:
        d of shape (N, O), float32; float64 if weight or styles are.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: impl cannot run here.

    Gradients: in weight and styles, of any order. Order 1 is a kernel; orders above are composed of
    PyTorch's. Saves weight, styles and their sums over k, (O, I). Within `no_weight_gradients` a
    backward computes none in weight.
    Source: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", equation 3.
    """
    return (_call if is_compiling() else _quick)(weight, styles, eps, impl)


def _plan(weight: Tensor, styles: Tensor, eps: float, impl: str | None) -> Plan:
    eps = _check(weight, styles, eps)
    if torch.float64 in (weight.dtype, styles.dtype):
        weight, styles = weight.double(), styles.double()
    chosen = _impl.choose("demod_coefs", impl, weight)
    if chosen == "reference":
        return demod_coefs_reference, (gate(weight), styles, eps)
    return _fwd, (weight, styles, eps, chosen)


def _check(weight: Tensor, styles: Tensor, eps: float) -> float:
    """Validated eps."""
    _impl.check_float("demod_coefs", "weight", weight)
    _impl.check_float("demod_coefs", "styles", styles)
    shape = weight.shape
    if len(shape) != 4:
        raise ValueError(f"demod_coefs: weight must be (O, I, kh, kw), got shape {tuple(shape)}")
    if styles.dim() != 2 or styles.shape[1] != shape[1]:
        raise ValueError(
            f"demod_coefs: styles must be (N, {shape[1]}), got shape {tuple(styles.shape)}"
        )
    if styles.device != weight.device:
        raise ValueError(
            f"demod_coefs: styles must be on weight's device {weight.device}, got {styles.device}"
        )
    if type(eps) is not float or not eps >= 0:
        eps = _impl.number("demod_coefs", "eps", eps, least="at least 0")
    return eps


# --- Reference: plain PyTorch, differentiable to any order.


def demod_coefs_reference(weight: Tensor, styles: Tensor, eps: float = 1e-8) -> Tensor:
    """The formula in PyTorch operations, in float32 for 16-bit types."""
    weight, styles = _for_sums(weight, styles)
    square_sum = weight.square().sum([2, 3])  # [O, I]
    return (styles.square() @ square_sum.t() + eps).rsqrt()


def _for_sums(weight: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the sums."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, styles.dtype), torch.float32)
    return weight.to(dtype), styles.to(dtype)


# --- Triton. As the CUDA kernels: csrc/kernels/demod_coefs.cu has the formulas.

if _impl.triton is not None:

    @triton.jit
    def demod_coefs_fwd_kernel(
        w_ptr, s_ptr, d_ptr, q_ptr, N, outs, ins, K, stride_i, stride_k, eps,
        BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
    ):  # fmt: skip
        # A program per output channel and BLOCK_N samples.
        tiles = tl.maximum(tl.cdiv(N, BLOCK_N), 1)
        o = (tl.program_id(0) // tiles).to(tl.int64)
        tile = tl.program_id(0) % tiles
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k_step = tl.cast(stride_k, tl.int64)
        total = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, ins, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            square_sum = tl.zeros([BLOCK_I], tl.float32)
            for k in range(K):
                at = o * ins * K + i.to(tl.int64) * stride_i + k * k_step
                w = tl.load(w_ptr + at, mask=i < ins, other=0.0).to(tl.float32)
                square_sum += w * w
            if tile == 0:
                tl.store(q_ptr + o * ins + i, square_sum, mask=i < ins)
            mask = (n < N)[:, None] & (i < ins)[None, :]
            at = n.to(tl.int64)[:, None] * ins + i[None, :]
            s = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(s * s * square_sum[None, :], 1)
        tl.store(d_ptr + n.to(tl.int64) * outs + o, 1 / tl.sqrt(total + eps), mask=n < N)

    @triton.jit
    def demod_coefs_bwd_kernel(
        dd_ptr, d_ptr, q_ptr, w_ptr, s_ptr, dw_ptr, ds_ptr, N, outs, ins, style_programs,
        scale, K: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
        BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    ):  # fmt: skip
        # The first programs take one sample and BLOCK_I input channels of ds each, the others one
        # output channel and BLOCK elements of dW, LAST of one tap.
        program = tl.program_id(0)
        n_step, s_step = tl.cast(outs, tl.int64), tl.cast(ins, tl.int64)
        if WIDE:  # indices in an output channel's weights
            ins = tl.cast(ins, tl.int64)
        if program < style_programs:
            tiles = tl.cdiv(ins, BLOCK_I)
            n = (program // tiles).to(tl.int64)
            i = program % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
            total = tl.zeros([BLOCK_I], tl.float32)
            for start in range(0, outs, BLOCK_O):
                o = start + tl.arange(0, BLOCK_O)
                d = tl.load(d_ptr + n * outs + o, mask=o < outs, other=0.0)
                g = tl.load(dd_ptr + n * outs + o, mask=o < outs, other=0.0) * (d * d * d) * scale
                at = o.to(tl.int64)[:, None] * ins + i[None, :]
                q = tl.load(q_ptr + at, mask=(o < outs)[:, None] & (i < ins)[None, :], other=0.0)
                total += tl.sum(g[:, None] * q, 0)
            s = tl.load(s_ptr + n * ins + i, mask=i < ins, other=0.0).to(tl.float32)
            tl.store(ds_ptr + n * ins + i, (s * total).to(ds_ptr.dtype.element_ty), mask=i < ins)
        else:
            # The names differ from those above: Triton gives a name one type in both branches.
            tiles_i = tl.cdiv(ins, BLOCK) if LAST else tl.cdiv(ins * K, BLOCK)
            parts = tiles_i * K if LAST else tiles_i
            row = ((program - style_programs) // parts).to(tl.int64)
            part = (program - style_programs) % parts
            if LAST:
                channel = part % tiles_i * BLOCK + tl.arange(0, BLOCK)
                inside = channel < ins
                e = part // tiles_i * ins + channel
            else:
                e = part * BLOCK + tl.arange(0, BLOCK)
                inside = e < ins * K
                channel = e // K
            factor = tl.zeros([BLOCK], tl.float32)
            for m in range(N):
                dm = tl.load(d_ptr + m * n_step + row)
                gm = tl.load(dd_ptr + m * n_step + row) * (dm * dm * dm) * scale
                sm = tl.load(s_ptr + m * s_step + channel, mask=inside, other=0.0).to(tl.float32)
                factor += gm * sm * sm
            w = tl.load(w_ptr + row * s_step * K + e, mask=inside, other=0.0).to(tl.float32)
            dw = (w * factor).to(dw_ptr.dtype.element_ty)
            tl.store(dw_ptr + row * s_step * K + e, dw, mask=inside)

    def _lay_out(weight: Tensor) -> tuple[Tensor, bool]:
        """weight as the kernels take it, and whether its input channels lie side by side."""
        last = weight.is_contiguous(memory_format=torch.channels_last)
        last = last and not weight.is_contiguous()
        return (weight if last else weight.contiguous()), last

    @_impl.triton_op("demod_coefs")
    def _triton_fwd(weight: Tensor, styles: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        weight, last = _lay_out(weight)
        (o, i), k, n = weight.shape[:2], weight.shape[2] * weight.shape[3], styles.shape[0]
        d = weight.new_empty((n, o), dtype=torch.float32)
        q = weight.new_empty((o, i), dtype=torch.float32)
        if o * max(n, i) == 0:
            return d, q
        block_n = _impl.power_of_2(n, 16)
        block_i = _impl.power_of_2(i, 512)
        grid = (o * triton.cdiv(max(n, 1), block_n),)
        torch.library.wrap_triton(demod_coefs_fwd_kernel)[grid](
            weight, styles.contiguous(), d, q, n, o, i, k, 1 if last else k, i if last else 1, eps,
            BLOCK_N=block_n, BLOCK_I=block_i,
        )  # fmt: skip
        return d, q

    @_impl.triton_op("demod_coefs_bwd")
    def _triton_bwd(
        dd: Tensor, d: Tensor, q: Tensor, weight: Tensor, styles: Tensor, needs_dweight: bool,
        needs_dstyles: bool, factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weight, last = _lay_out(weight)
        styles = styles.contiguous()
        dweight = torch.empty_like(weight) if needs_dweight else weight.new_empty(0)
        dstyles = torch.empty_like(styles) if needs_dstyles else styles.new_empty(0)
        (o, i), k, n = weight.shape[:2], weight.shape[2] * weight.shape[3], styles.shape[0]
        style_programs = n * triton.cdiv(i, 64) if dstyles.numel() else 0
        block = _impl.power_of_2(i, 1024) if last else 1024
        parts = k * triton.cdiv(i, block) if last else triton.cdiv(i * k, block)
        programs = style_programs + (o * parts if dweight.numel() else 0)
        if programs == 0:
            return dweight, dstyles
        torch.library.wrap_triton(demod_coefs_bwd_kernel)[(programs,)](
            dd.contiguous(), d, q, weight, styles, dweight, dstyles, n, o, i, style_programs,
            -factor, K=k, LAST=last, WIDE=(i + block) * k >= 2**31, BLOCK=block, BLOCK_O=32,
            BLOCK_I=64, num_warps=max(1, block // 256),
        )  # fmt: skip
        return dweight, dstyles


# --- Shape functions of the registered ops.


def _fake_fwd(weight, styles, eps):
    dtype = torch.promote_types(weight.dtype, torch.float32)
    (o, i), n = weight.shape[:2], styles.shape[0]
    return weight.new_empty((n, o), dtype=dtype), weight.new_empty((o, i), dtype=dtype)


def _fake_bwd(dd, d, q, weight, styles, needs_dweight, needs_dstyles, factor=1.0):
    like = torch.empty_like(weight, memory_format=_impl.memory_format(weight))
    dweight = like if needs_dweight else weight.new_empty(0)
    return dweight, styles.new_empty(styles.shape if needs_dstyles else (0,))


_impl.register_fake("demod_coefs", _fake_fwd)
_impl.register_fake("demod_coefs_bwd", _fake_bwd)


# --- Autograd, once for all implementations.


def _fwd(weight: Tensor, styles: Tensor, eps: float, impl: str) -> Tensor:
    if (weight.requires_grad or styles.requires_grad) and torch.is_grad_enabled():
        return _DemodCoefs.apply(weight, styles, eps, impl)
    return _impl.op(impl, "demod_coefs")(weight, styles, eps)[0]


class _DemodCoefs(torch.autograd.Function):
    """d from weight and styles; keeps the weights' square sums for the gradient."""

    @staticmethod
    def forward(ctx: Any, weight, styles, eps, impl):
        d, q = _impl.op(impl, "demod_coefs")(weight, styles, eps)
        ctx.save_for_backward(weight, styles, d, q)
        ctx.args = (eps, impl)
        return d

    @staticmethod
    def backward(ctx: Any, dd):
        weight, styles, d, q = ctx.saved_tensors
        eps, impl = ctx.args
        needs = (ctx.needs_input_grad[0] and weight_gradients(), ctx.needs_input_grad[1])
        if torch.is_grad_enabled():
            grads = _DemodCoefsBwd.apply(dd, weight, styles, d.detach(), q, *needs, eps, impl)
        else:
            grads = _impl.op(impl, "demod_coefs_bwd")(dd, d, q, weight, styles, *needs)
        return (*(g if needed else None for g, needed in zip(grads, needs, strict=True)),
                None, None)  # fmt: skip


_call, _quick = remember(_plan, _fwd, _DemodCoefs)


class _DemodCoefsBwd(torch.autograd.Function):
    """dweight and dstyles from dd; its own gradient is composed of PyTorch's operations, and of the
    kernel where dstyles alone was asked for."""

    @staticmethod
    def forward(ctx: Any, dd, weight, styles, d, q, needs_dweight, needs_dstyles, eps, impl):
        ctx.save_for_backward(dd, weight, styles, d, q)
        ctx.args = (eps, impl)
        ctx.set_materialize_grads(False)
        bwd = _impl.op(impl, "demod_coefs_bwd")
        return bwd(dd, d, q, weight, styles, needs_dweight, needs_dstyles)

    @staticmethod
    def backward(ctx: Any, *grads):
        nothing = (None,) * 6
        if all(g is None for g in grads):
            return None, None, None, *nothing
        eps, impl = ctx.args
        if grads[0] is None and not torch.is_grad_enabled():
            second = _bwd2_styles(ctx.saved_tensors, grads[1], ctx.needs_input_grad, impl)
            return *second, *nothing
        with torch.enable_grad():
            inputs = [t.view_as(t) for t in ctx.saved_tensors[:3]]
            dd, weight, styles = inputs
            needed = [g is not None for g in grads]
            outputs = _bwd_reference(dd, weight, styles, eps, needed[0], needed[1])
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(
                torch.autograd.grad(
                    outputs,
                    wanted,
                    [g for g in grads if g is not None],
                    create_graph=True,
                    allow_unused=True,
                )
            )
        return (*(next(found) if t.requires_grad else None for t in inputs), *nothing)


def _bwd2_styles(tensors, v, needs, impl) -> tuple[Tensor | None, ...]:
    """Gradients of <v, dstyles> in dd, weight and styles, in half as many launches as autograd's.

    With u = v s, h = u qᵀ and g = -d³ dd it is Σ g h. So d_dd = -d³ h; d gets 3 g h / d, which the
    first gradient takes on; and beside d there are d_q = gᵀ u and d_s = v (g q).
    """
    dd, weight, styles, d, q = tensors
    w, s = _for_sums(weight, styles)
    u = v * s
    cube = d.pow(3)
    h = torch.addmm(d, u, q.t(), beta=0, alpha=-1)  # -h, [N, O]
    g = cube * dd  # -g
    bwd = _impl.op(impl, "demod_coefs_bwd")
    dw, ds = bwd((g * h).div_(d), d, q, weight, styles, needs[1], needs[2], 3.0)
    if needs[1]:
        dw = torch.addcmul(dw.to(w.dtype), w, (g.t() @ u)[:, :, None, None], value=-2)
    if needs[2]:
        ds = torch.addcmul(ds.to(s.dtype), v, g @ q, value=-1)
    return (
        cube * h if needs[0] else None,
        dw.to(weight.dtype) if needs[1] else None,
        ds.to(styles.dtype) if needs[2] else None,
    )


def _bwd_reference(dd, weight, styles, eps, needs_dweight, needs_dstyles) -> list[Tensor]:
    """What demod_coefs_bwd computes, differentiably: csrc/kernels/demod_coefs.cu."""
    w, s = _for_sums(weight, styles)
    square_sum = w.square().sum([2, 3])
    g = -dd * (s.square() @ square_sum.t() + eps).pow(-1.5)
    outputs = []
    if needs_dweight:
        factors = g.t() @ s.square()  # [O, I]
        outputs.append((w * factors[:, :, None, None]).to(weight.dtype))
    if needs_dstyles:
        outputs.append((s * (g @ square_sum)).to(styles.dtype))
    return outputs
