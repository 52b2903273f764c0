"""C++ and CUDA kernels at random sizes that take several blocks, simulated on GPUs of any size.

The other random tests have many small cases. Here plans are cut in other ways: planes and rows into
tiles, sums into partial ones, with scratch that must be large enough for any of them.
"""

from __future__ import annotations

import random

import pytest
import torch
from harness import compare, gpu_of, lay_out, outputs_and_grads, randn, second_grads

from gankern import ops

ROUNDS = 12
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST = 100_000  # elements of x


class Draw(random.Random):
    """Arguments of one case."""

    def __init__(self, seed: str, device: str) -> None:
        super().__init__(seed)
        self.device = device
        self.dtype = self.choice(DTYPES)
        self.layout = self.choice(["contiguous", "channels_last", "misaligned", "strided"])

    def tensor(self, *shape: int, mixed: bool = True) -> torch.Tensor:
        """Of the case's dtype, or float32 beside it."""
        dtype = self.choice([self.dtype, torch.float32]) if mixed else self.dtype
        return randn(*shape, seed=self.randrange(1000)).to(self.device, self.wide(dtype))

    def wide(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else dtype

    def image(self, most: int = MOST) -> torch.Tensor:
        n, c = self.choice([1, 1, 2, 3, 5]), self.choice([1, 2, 3, 4, 7, 8, 20, 33, 64])
        h, w = (self.choice([self.randint(1, 20), self.randint(30, 140), 64, 128]) for _ in "hw")
        if n * c * h * w > most:
            n, c = 1, max(1, most // (h * w))
        x = self.tensor(n, c, h, w, mixed=False)
        if self.layout != "misaligned":
            return lay_out(x, self.layout)
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)

    def maybe(self, t: torch.Tensor) -> torch.Tensor | None:
        return t if self.random() < 0.7 else None


def bias_act(draw):
    x = draw.image()
    act = draw.choice(["linear", "relu", "lrelu", "tanh", "swish"])
    b = draw.maybe(draw.tensor(x.shape[1]))
    return lambda impl: lambda x, b: ops.bias_act(x, b, act=act, impl=impl), [x, b]


def pixel_norm(draw):
    return lambda impl: lambda x: ops.pixel_norm(x, impl=impl), [draw.image()]


def minibatch_stddev(draw):
    x = draw.image()
    x = x[:1].expand(draw.choice([2, 4, 6]), -1, -1, -1) + draw.tensor(1, 1, 1, 1, mixed=False)
    x = lay_out(x * draw.tensor(*x.shape, mixed=False), draw.layout)
    size, f = draw.choice([None, 2]), 2 if x.shape[1] % 2 == 0 else 1
    return lambda impl: lambda x: ops.minibatch_stddev(x, size, f, impl=impl), [x]


def adain(draw):
    x = draw.image()
    scale = draw.tensor(*x.shape[:2])
    shift = draw.tensor(*x.shape[:2], mixed=False).to(scale.dtype)
    return lambda impl: lambda x, s, t: ops.adain(x, s, t, impl=impl), [x, scale, shift]


def demod_coefs(draw):
    o, i, k = draw.randint(1, 100), draw.randint(1, 140), draw.choice([1, 3, 5])
    weight = draw.tensor(o, i, k, k, mixed=False)
    styles = draw.tensor(draw.choice([1, 2, 8, 17]), i, mixed=False)
    return lambda impl: lambda w, s: ops.demod_coefs(w, s, impl=impl), [weight, styles]


def upfirdn2d(draw):
    x = draw.image(20_000)
    taps = draw.choice([1, 2, 4, 4, 8, 12])
    shape = (taps,) if draw.random() < 0.5 else (draw.choice([1, 4, 6]), taps)
    f = randn(*shape).abs().float().to(draw.device)
    up, down = draw.choice([(1, 1), (2, 1), (1, 2), (3, 2), (4, 1)])
    pads = [draw.randint(-1, taps), taps, draw.randint(-1, taps), taps]
    return lambda impl: lambda x: ops.upfirdn2d(x, f, up, down, pads, impl=impl), [x]


def synthesis_epilogue(draw):
    x = draw.image()
    n, c, h, w = x.shape
    f, pads = None, [0, 0, 0, 0]
    if draw.random() < 0.6 and min(h, w) > 3:
        f = randn(4, 4).abs().float().to(draw.device)
        pads = [draw.randint(0, 3) for _ in range(4)]
        h, w = h + pads[2] + pads[3] - 3, w + pads[0] + pads[1] - 3
    noise = draw.maybe(draw.tensor(*draw.choice([(n, 1, h, w), (h, w)])))
    operands = [draw.maybe(draw.tensor(*shape)) for shape in ((n, c), (draw.choice([1, c]),), (c,))]
    if noise is None:
        operands[1] = None
    how = {"act": draw.choice(["lrelu", "lrelu", "relu", "tanh"])}
    if draw.dtype.itemsize > 2:  # a y that rounds to the clamp is behind it for its second order
        how["clamp"] = draw.choice([None, 2])

    def run(impl):
        def call(x, d, s, b):
            z = noise if noise is None or x.dtype != torch.float64 else noise.double()
            return ops.synthesis_epilogue(x, f, d, z, s, b, pads, impl=impl, **how)

        return call

    return run, [x, *operands]


CASES = [bias_act, pixel_norm, minibatch_stddev, adain, demod_coefs, upfirdn2d, synthesis_epilogue]


@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_random_shapes(impl, device, case, round_):
    if impl not in ("cpu", "cuda", "simt"):
        pytest.skip("for what is cut into blocks by our own plans")
    draw = Draw(f"{case.__name__} {round_}", device)
    run, inputs = case(draw)
    what = f"{draw.dtype} {draw.layout} {[None if t is None else tuple(t.shape) for t in inputs]}"
    with gpu_of(draw.choice([1, 8, 80, 132]), impl):
        # 16 roundings: sums have up to 100,000 terms, and tanh makes large sums small. A clamp does
        # too, at which only eager PyTorch's own error says by how much.
        for derivative in (outputs_and_grads, second_grads):
            nudged = draw.dtype == torch.float64
            args = run(impl), run("reference"), inputs, derivative, what
            compare(*args, roundings=16, nudged=nudged)
