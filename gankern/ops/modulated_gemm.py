"""modulated_gemm: a StyleGAN2 layer as one Triton launch, an implicit matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern.ops import _impl
from gankern.ops.bias_act import ACTS, bias_act
from gankern.ops.convolution import Form, convolution, weight_gradient, weight_gradients
from gankern.ops.modulated_conv2d import check_flags, check_modulated, modulation
from gankern.ops.synthesis_epilogue import _bwd as epilogue_bwd
from gankern.ops.synthesis_epilogue import _modulate as add_noise
from gankern.ops.synthesis_epilogue import check_tail, flat_noise
from gankern.ops.synthesis_layer import layer

if _impl.triton is not None:
    import triton
    import triton.language as tl

    from gankern.ops.bias_act import _act_value

OP = "modulated_gemm"


def modulated_gemm(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    b: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    demodulate: bool = True,
    act: str = "lrelu",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """`synthesis_layer` at one resolution, with `impl="triton"` the convolution in its kernel too.

    `y[n,o,h,w] = clamp(act(d[n,o] Σ_ik weight[o,i,k] styles[n,i] x[n,i,h+ky,w+kx] + noise[h,w]
    noise_strength + b[o]) gain)`, a matrix product of N H W rows, O columns and I k k terms. The
    image is gathered and multiplied by the styles as it is loaded, sums stay in registers until y
    is stored: neither a scaled image, nor columns of patches, nor the convolution's output lies in
    memory. It challenges cuDNN's convolution and `synthesis_epilogue`; nothing takes it unless
    `impl` names it: on an H200 the forward takes 0.93 of their time in float16, as long with the
    backward, and 2.9 times as long in float32 (docs/ops.md).

    Args:
        x: images, (N, I, H, W); float32, float16 or bfloat16, float64 but for "triton". That
            takes channels-last memory, and copies other.
        weight: (O, I, k, k) with k odd, in any dtype; padding k // 2 keeps the size.
        styles: (N, I), in any dtype.
        b: bias, (O,) of x's dtype or float32, or None.
        noise: (N, 1, H, W), (1, 1, H, W) or (H, W) of x's dtype or float32, or None.
        noise_strength: factor on the noise, one value or (O,); None is 1.
        demodulate: normalise the weights of each sample and output channel to length 1.
        act, alpha, gain, clamp: as `bias_act`.
        impl: "triton" is the kernel of this file, products of float32 without TF32; all others,
            and None, are `synthesis_layer` with that impl.

    Returns:
        (N, O, H, W) in the dtype of `x`, or autocast's; channels-last from "triton".

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: impl cannot run here.

    Gradients: in x, weight, styles, b, noise and noise_strength, of any order. "triton" saves its
    inputs; its backward convolves again, with PyTorch's convolutions, and every order is composed
    of these and of `synthesis_epilogue`'s Triton kernels. A gradient in the noise itself takes
    noise, bias and activation out of the kernel, several passes.
    Source: StyleGAN2 (Karras et al., 2020), figure 2; convolution as a matrix product that gathers
    its rows: cuDNN (Chetlur et al., 2014), section 3.
    """
    padding = _padding(weight)
    if impl != "triton":
        return layer(OP, x, weight, styles, b, noise, noise_strength, 1, padding, None,
                     demodulate, True, act, alpha, gain, clamp, impl)  # fmt: skip
    check_modulated(OP, x, weight, styles, None, 1, 1, padding, impl)
    demodulate, _ = check_flags(OP, demodulate, True)
    x, weight, styles, d = modulation(x, weight, styles, demodulate, impl)
    styles = styles.to(x.dtype)
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    rest = (noise, noise_strength, b, act)
    numbers = check_tail(OP, x, shape, *rest, alpha, gain, clamp)
    if noise is not None and noise.requires_grad and torch.is_grad_enabled():
        return _noise_outside(x, weight, styles, d, noise, noise_strength, b, act, *numbers)
    noise, strength = flat_noise(noise, noise_strength)
    return _fwd(x, weight, styles, d, noise, strength, b, (act, *numbers))


def _padding(weight: Tensor) -> int:
    """What keeps the size of images, for square weights of odd size."""
    if not isinstance(weight, Tensor) or weight.ndim != 4:
        return 0  # check_modulated says so
    kh, kw = weight.shape[2:]
    if kh != kw or kh % 2 == 0:
        raise ValueError(f"{OP}: weight must be (O, I, k, k) with k odd, got {tuple(weight.shape)}")
    return kh // 2


def _noise_outside(x, weight, styles, d, noise, strength, b, act, alpha, gain, clamp) -> Tensor:
    """The same with noise, bias and activation of their own passes, in float32."""
    y = _fwd(x, weight, styles, d, None, None, None, ("linear", 0.0, 1.0, -1.0)).float()
    b = None if b is None else b.float()
    y = add_noise(y, None, noise, strength)
    clamp = None if clamp < 0 else clamp
    return bias_act(y, b, 1, act, alpha, gain, clamp, impl="triton").to(x.dtype)


# --- Triton.

if _impl.triton is not None:

    @triton.jit
    def modulated_gemm_kernel(
        x_ptr, w_ptr, styles_ptr, d_ptr, noise_ptr, strength_ptr, b_ptr, y_ptr,
        N, H, W, ins, outs, alpha, gain, clamp, noise_step, strength_step,
        SIZE: tl.constexpr, HAS_D: tl.constexpr, HAS_NOISE: tl.constexpr,
        HAS_STRENGTH: tl.constexpr, HAS_B: tl.constexpr, ACT: tl.constexpr, CLAMPED: tl.constexpr,
        WIDEN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        # BLOCK_M pixels of one sample and BLOCK_N output channels; SIZE x SIZE taps. x [N, H, W, I]
        # and w [O, SIZE, SIZE, I] have their input channels side by side.
        # No block has pixels of two samples: the styles of its K terms are then one vector, where
        # a style per row would be a second tile to load. Small images pay with idle rows.
        if WIDE:  # indices in an image's channel, its rows and the weights of an output channel
            W, ins = tl.cast(W, tl.int64), tl.cast(ins, tl.int64)
        tiles = tl.cdiv(H * W, BLOCK_M)
        columns = tl.cdiv(outs, BLOCK_N)
        # GROUP row blocks go through the columns together, and find weights and image in L2.
        program = tl.program_id(0)
        first = program // (GROUP * columns) * GROUP
        size = min(N * tiles - first, GROUP)
        block = first + program % (GROUP * columns) % size
        n = (block // tiles).to(tl.int64)
        pixel = block % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        o = program % (GROUP * columns) // size * BLOCK_N + tl.arange(0, BLOCK_N)
        row, col = pixel // W, pixel % W
        x_rows = x_ptr + ((n * H * W + pixel) * ins)[:, None]
        w_columns = w_ptr + (o.to(tl.int64) * (SIZE * SIZE) * ins)[None, :]
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # The taps inside, the channels outside: the taps read the same lines of x, while in L1.
        for step in range(tl.cdiv(ins, BLOCK_K) * SIZE * SIZE):
            tap = step % (SIZE * SIZE)
            i = step // (SIZE * SIZE) * BLOCK_K + tl.arange(0, BLOCK_K)
            dy, dx = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
            inside = (row + dy >= 0) & (row + dy < H) & (col + dx >= 0) & (col + dx < W)
            at = x_rows + ((dy * W + dx) * ins + i)[None, :]
            x = tl.load(at, inside[:, None] & (i < ins)[None, :], 0.0)
            s = tl.load(styles_ptr + n * ins + i, i < ins, 0.0)[None, :]
            w_mask = (i < ins)[:, None] & (o < outs)[None, :]
            w = tl.load(w_columns + (tap * ins + i)[:, None], w_mask, 0.0)
            if WIDEN:
                x = (x.to(tl.float32) * s.to(tl.float32)).to(x.dtype).to(tl.float32)
                w = w.to(tl.float32)
            else:
                x = x * s
            sums = tl.dot(x, w, sums, input_precision="ieee")
        inside = (pixel < H * W)[:, None] & (o < outs)[None, :]
        if HAS_D:
            sums *= tl.load(d_ptr + n * outs + o, o < outs, 0.0).to(tl.float32)[None, :]
        if HAS_NOISE:
            z = tl.load(noise_ptr + n * noise_step + pixel, pixel < H * W, 0.0).to(tl.float32)
            if HAS_STRENGTH:
                strength = tl.load(strength_ptr + o * strength_step, o < outs, 0.0).to(tl.float32)
                sums += z[:, None] * strength[None, :]
            else:
                sums += z[:, None]
        if HAS_B:
            sums += tl.load(b_ptr + o, o < outs, 0.0).to(tl.float32)[None, :]
        y = _act_value(sums, ACT, alpha) * gain
        if CLAMPED:
            y = tl.where(y > clamp, clamp, tl.where(y < -clamp, -clamp, y))
        at = y_ptr + ((n * H * W + pixel) * outs)[:, None] + o[None, :]
        tl.store(at, y.to(y_ptr.dtype.element_ty), inside)

    def _blocks(samples: int, pixels: int, outs: int, ins: int, width: int) -> dict[str, int]:
        """The kernel's blocks for elements of `width` bytes: the largest of which less than half
        is idle and that make 128 programs, about as many as a GPU has multiprocessors."""
        tile = (128, 32) if outs <= 32 and pixels > 64 else (16, 64)
        # Products of float32 run without tensor cores: a larger tile would not fit in registers.
        for m, n in ((64, 64), (128, 128))[: 2 if width == 2 else 1]:
            programs = samples * triton.cdiv(pixels, m) * triton.cdiv(outs, n)
            if pixels > m // 2 and outs > n // 2 and programs >= 128:
                tile = m, n
        k = 16 if width == 4 or ins <= 16 else 32 if ins <= 32 else 64
        blocks = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": k, "GROUP": 8}
        return blocks | {"num_warps": 8 if tile == (128, 128) else 4, "num_stages": 3}

    @_impl.triton_op("modulated_gemm")
    def _triton_fwd(
        x: Tensor, weight: Tensor, styles: Tensor, d: Tensor | None, noise: Tensor | None,
        strength: Tensor | None, b: Tensor | None, act: int, alpha: float, gain: float,
        clamp: float,
    ) -> Tensor:  # fmt: skip
        y = _fake(x, weight)
        if y.numel() == 0:
            return y
        (n, o, h, w), i = y.shape, x.shape[1]
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
        blocks = _blocks(n, h * w, o, i, x.element_size())
        tiles = triton.cdiv(h * w, blocks["BLOCK_M"]), triton.cdiv(o, blocks["BLOCK_N"])
        given = [x if t is None else t.contiguous() for t in (d, noise, strength, b)]
        torch.library.wrap_triton(modulated_gemm_kernel)[(n * tiles[0] * tiles[1],)](
            x, weight, styles.contiguous(), *given, y, n, h, w, i, o,
            {0: 1.0, 1: 0.0}.get(act, alpha), gain, clamp,
            0 if noise is None or noise.numel() == h * w else h * w,
            0 if strength is None or strength.numel() == 1 else 1,
            SIZE=weight.shape[2], HAS_D=d is not None, HAS_NOISE=noise is not None,
            HAS_STRENGTH=strength is not None, HAS_B=b is not None, ACT=act, CLAMPED=clamp >= 0,
            # The interpreter holds bfloat16 as bits, which its products would take for numbers.
            WIDEN=_impl.triton_interpreted() and x.dtype == torch.bfloat16,
            WIDE=max((h + 128) * w, (w + 64) * 64 * i, 64 * 64 * (i + 64)) >= 2**31, **blocks,
        )  # fmt: skip
        return y


# --- Shape function of the registered op.


def _fake(x, weight, *args):
    size = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_impl.register_fake(OP, _fake)


# --- Autograd.


def _call(x, weight, styles, d, noise, strength, b, numbers) -> Tensor:
    act, *rest = numbers
    gemm = _impl.op("triton", OP)
    return gemm(x, weight, styles, d, noise, strength, b, ACTS[act].code, *rest)


def _fwd(x, weight, styles, d, noise, strength, b, numbers: tuple[Any, ...]) -> Tensor:
    if _impl.records(x, weight, styles, d, strength, b):
        return _ModulatedGemm.apply(x, weight, styles, d, noise, strength, b, numbers)
    return _call(x, weight, styles, d, noise, strength, b, numbers)


class _ModulatedGemm(torch.autograd.Function):
    """y from all inputs; the backward is the one of convolution and epilogue apart, and is made of
    operations that are differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, x, weight, styles, d, noise, strength, b, numbers):
        ctx.save_for_backward(x, weight, styles, d, noise, strength, b)
        ctx.numbers = numbers
        return _call(x, weight, styles, d, noise, strength, b, numbers)

    @staticmethod
    def backward(ctx: Any, dy):
        x, weight, styles, d, noise, strength, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        form = Form(1, (weight.shape[2] // 2,) * 2, False, (0, 0), 1)
        scaled = x * styles[:, :, None, None]
        u = convolution(scaled, weight, form)
        args = (0, 0, 0, 0, False, 1.0, *ctx.numbers, "triton")
        needs_ds = needs[5] and weight_gradients()
        du, dd, db, ds = epilogue_bwd(dy, u, None, d, noise, strength, b, args, needs_ds=needs_ds)
        dx = dweight = dstyles = None
        if needs[0] or needs[2]:
            dscaled = convolution(du, weight, form.adjoint(scaled, du, weight))
            dx = dscaled * styles[:, :, None, None] if needs[0] else None
            dstyles = (dscaled * x).sum([2, 3]) if needs[2] else None
        if needs[1] and weight_gradients():
            dweight = weight_gradient(du, scaled, weight, form)
        if needs_ds:
            ds = (ds if strength.numel() == ds.numel() else ds.sum().reshape(1)).to(strength.dtype)
        return (dx, dweight, dstyles, dd if needs[3] else None, None, ds if needs_ds else None,
                db.to(b.dtype) if needs[6] else None, None)  # fmt: skip
