"""Which of the CUDA kernels the launch code takes: every kernel is the choice for some images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import DTYPES, launches, lay_out, outputs_and_grads, randn, second_grads

from gankern import ops

KERNELS = Path(__file__).resolve().parent.parent / "csrc" / "kernels"
FILTERS = {
    **{n: randn(n).float() for n in (2, 4, 5, 6, 8, 12)},
    **{f"{n}x{n}": randn(n, n).float() for n in (4, 8, 12)},
}
LAYOUTS = {"nchw": "contiguous", "last": "channels_last"}
# op, its arguments, images, layout and dtype; the kernels without op, dtype and namespace, in the
# order of their launches: forward, backward and, where there are more, second order
ROWS = [
    ("upfirdn2d", {"f": 4, "padding": [2, 1, 2, 1]}, (1, 2, 8, 16), "nchw f32",
     "march<1, 1, 2>", "march<1, 1, 1>"),
    ("upfirdn2d", {"f": "4x4", "padding": [1, 2, 1, 2]}, (1, 2, 8, 16), "nchw f16",
     "march<1, 1, 1>", "march<1, 1, 2>"),
    ("upfirdn2d", {"f": 4, "up": 2, "padding": [2, 1, 2, 1]}, (1, 2, 8, 16), "nchw f32",
     "march<2, 1, 1>", "march<1, 2, 1>"),
    ("upfirdn2d", {"f": "4x4", "down": 2, "padding": 1}, (1, 2, 8, 32), "nchw bf16",
     "march<1, 2, 1>", "march<2, 1, 1>"),
    ("upfirdn2d", {"f": 4, "padding": 1}, (1, 2, 9, 18), "nchw f32", "lines", "lines"),
    ("upfirdn2d", {"f": "4x4", "padding": [2, 1, 2, 1]}, (1, 2, 9, 18), "nchw f16",
     "lines", "lines"),
    ("upfirdn2d", {"f": 4, "up": 2, "padding": [2, 1, 2, 1]}, (1, 2, 8, 15), "nchw f32",
     "planes<2, 1, 4, false, false>", "planes<1, 2, 4, false, true>"),
    ("upfirdn2d", {"f": 6, "down": 2, "padding": 2}, (1, 2, 8, 15), "nchw f16",
     "planes<1, 2, 6, false, false>", "planes<2, 1, 6, false, false>"),
    ("upfirdn2d", {"f": 8, "down": 4, "padding": [2, 1, 2, 1]}, (1, 2, 9, 16), "nchw f32",
     "planes<1, 4, 8, true, false>", "planes<4, 1, 8, true, false>"),
    ("upfirdn2d", {"f": 12, "up": 2, "padding": [6, 5, 6, 5]}, (1, 2, 8, 15), "nchw f16",
     "planes<2, 1, 12, true, false>", "planes<1, 2, 12, true, false>"),
    ("upfirdn2d", {"f": 2, "up": 4, "padding": 1}, (1, 2, 8, 15), "nchw f32",
     "planes<4, 1, 4, false, false>", "planes<1, 4, 2, false, false>"),
    ("upfirdn2d", {"f": 6, "up": 4, "padding": 3}, (1, 2, 8, 16), "nchw f16",
     "planes<4, 1, 8, false, false>", "planes<1, 4, 6, false, false>"),
    ("upfirdn2d", {"f": "8x8", "padding": 4}, (1, 2, 8, 16), "nchw f32",
     "planes<1, 1, 8, false, false>", "planes<1, 1, 8, false, false>"),
    ("upfirdn2d", {"f": "12x12", "down": 2, "padding": 5}, (1, 2, 8, 16), "nchw f16",
     "planes<1, 2, 12, false, false>", "planes<2, 1, 12, false, false>"),
    ("upfirdn2d", {"f": 4, "padding": [2, 1, 2, 1]}, (1, 8, 8, 9), "last f32",
     "walk<1, 1>", "walk<1, 1>"),
    ("upfirdn2d", {"f": "4x4", "up": 2, "padding": [2, 1, 2, 1]}, (1, 8, 8, 9), "last f16",
     "walk<2, 1>", "walk<1, 2>"),
    ("upfirdn2d", {"f": 12, "up": 2, "padding": 6}, (1, 8, 8, 9), "last f32",
     "strips<2, 1, 12>", "strips<1, 2, 12>"),
    ("upfirdn2d", {"f": 8, "padding": [2, 1, 2, 1]}, (1, 8, 8, 9), "last f16",
     "strips<1, 1, 8>", "strips<1, 1, 8>"),
    ("upfirdn2d", {"f": 12, "down": 3, "padding": 6}, (1, 8, 8, 9), "last f32",
     "strips<0, 0, 0>", "strips<0, 0, 0>"),
    ("upfirdn2d", {"f": 6, "up": 2, "padding": 3}, (1, 8, 8, 9), "last f32",
     "pixels<2, 6>", "pixels<1, 6>"),
    ("upfirdn2d", {"f": 4, "up": 4, "padding": [2, 1, 2, 1]}, (1, 8, 8, 9), "last f16",
     "pixels<4, 4>", "pixels<1, 4>"),
    ("upfirdn2d", {"f": "12x12", "padding": 6}, (1, 8, 8, 9), "last f16",
     "pixels<1, 12>", "pixels<1, 12>"),
    ("upfirdn2d", {"f": 5, "up": 2, "padding": 2}, (1, 8, 8, 9), "last f32",
     "pixels<0, 0>", "pixels<0, 0>"),
    ("upfirdn2d", {"f": 4, "padding": [2, 1, 2, 1]}, (1, 7, 8, 9), "last f32", "any", "any"),
    ("upfirdn2d", {"f": 4, "padding": [2, 1, 2, 1]}, (1, 12, 8, 9), "last f16", "any", "any"),
    ("upfirdn2d", {"f": 4, "up": 3, "padding": [2, 1, 2, 1]}, (1, 2, 8, 9), "nchw f32",
     "any", "any"),
    ("upfirdn2d", {"f": 4, "padding": [2, 1, 2, 1]}, (1, 2, 8, 16), "nchw f64", "any", "any"),
    ("synthesis_epilogue", {"f": "4x4", "padding": 1}, (2, 3, 9, 9), "nchw f32",
     "fwd_lines<true>", "bwd_lines<true>"),
    ("synthesis_epilogue", {"f": 4, "padding": 1, "act": "tanh"}, (2, 3, 9, 9), "nchw f16",
     "fwd_lines<false>", "bwd_lines<false>"),
    ("synthesis_epilogue", {"f": "4x4", "padding": 1}, (2, 8, 9, 9), "last f32",
     "fwd_pixels<true>", "bwd_pixels<true>"),
    ("synthesis_epilogue", {"f": 4, "padding": 1, "act": "tanh"}, (2, 8, 9, 9), "last f16",
     "fwd_pixels<false>", "bwd_pixels<false>"),
    ("synthesis_epilogue", {}, (2, 3, 8, 8), "nchw f32",
     "flat_planes<true>", "bwd<false, true, 4>", "bwd2<false, 4>"),
    ("synthesis_epilogue", {}, (2, 3, 9, 9), "nchw f16",
     "flat_planes<true>", "bwd<false, false, 1>", "bwd2<false, 1>"),
    ("synthesis_epilogue", {}, (2, 8, 8, 8), "last f32",
     "flat_pixels<true, 4>", "bwd<true, true, 4>", "bwd2<true, 4>"),
    ("synthesis_epilogue", {"act": "tanh"}, (2, 7, 8, 8), "last f16",
     "flat_pixels<false, 1>", "bwd<true, false, 1>"),
    ("bias_act", {"act": "lrelu"}, (2, 7, 9, 9), "nchw f32",
     "planes<0, true, 4>", "planes<1, true, 4>"),
    ("bias_act", {"act": "swish"}, (2, 8, 8, 8), "nchw f16",
     "planes<0, false, 8>", "planes<1, false, 8>", "planes<1, false, 8>", "planes<2, false, 8>"),
    ("bias_act", {"act": "lrelu"}, (2, 8, 9, 9), "last f32",
     "rows<0, true, 4>", "rows<1, true, 4>"),
    ("bias_act", {"act": "swish"}, (2, 515, 1, 1), "nchw f32",
     "rows<0, false, 1>", "rows<1, false, 1>", "rows<1, false, 1>", "rows<2, false, 1>"),
    ("pixel_norm", {}, (2, 8, 8, 8), "nchw f32",
     "columns<Forward, 4, 4>", "columns<Backward, 4, 2>", "columns<Backward2, 2, 2>"),
    ("pixel_norm", {}, (2, 8, 8, 8), "nchw f16",
     "columns<Forward, 8, 4>", "columns<Backward, 4, 4>", "columns<Backward2, 4, 2>"),
    ("pixel_norm", {}, (2, 7, 5, 3), "nchw f32",
     "columns<Forward, 1, 2>", "columns<Backward, 1, 2>", "columns<Backward2, 1, 2>"),
    ("pixel_norm", {}, (2, 8, 8, 8), "last f32",
     "short_rows<Forward, 4, 1>", "short_rows<Backward, 4, 1>", "short_rows<Backward2, 4, 1>"),
    ("pixel_norm", {}, (2, 512, 1, 1), "nchw f16",
     "rows<Forward, 8, 4>", "rows<Backward, 8, 4>", "rows<Backward2, 8, 2>"),
    ("pixel_norm", {}, (2, 515, 1, 1), "nchw f32",
     "rows<Forward, 1, 2>", "rows<Backward, 1, 2>", "rows<Backward2, 1, 2>"),
    ("adain", {}, (2, 3, 8, 8), "nchw f32",
     "short_rows<Forward, 4, 1>", "short_rows<Backward, 4, 1>"),
    ("adain", {}, (2, 3, 9, 9), "nchw f16", "rows<Forward, 1, 2>", "rows<Backward, 1, 2>"),
    ("adain", {}, (2, 8, 9, 9), "last f32", "columns<Forward, 2, 8>", "columns<Backward, 2, 4>"),
    ("adain", {}, (1, 1, 184, 184), "nchw f32", "group<Forward, 4, 1>", "group<Backward, 4, 1>"),
    ("adain", {}, (1, 16, 72, 72), "last f16", "group<Forward, 8, 8>", "group<Backward, 8, 8>"),
    ("minibatch_stddev", {}, (4, 8, 4, 4), "nchw f32",
     "fwd<4, false, true>", "bwd<4, false, true>"),
    ("minibatch_stddev", {}, (4, 7, 3, 3), "nchw f16",
     "fwd<1, false, true>", "bwd<1, false, true>"),
    ("minibatch_stddev", {}, (4, 8, 4, 4), "last f16", "fwd<4, true, true>", "bwd<4, true, true>"),
    ("minibatch_stddev", {"group_size": 8}, (8, 8, 4, 4), "last f32",
     "fwd<4, true, false>", "bwd<4, true, false>"),
    ("minibatch_stddev", {"group_size": 8, "num_channels": 2}, (8, 8, 4, 4), "last f32",
     "fwd<1, false, false>", "bwd<1, false, false>"),
    ("demod_coefs", {}, (4, 8, 3, 3), "nchw f32", "fwd<4, true>", "bwd<4, true>"),
    ("demod_coefs", {}, (4, 8, 3, 3), "last f16", "fwd<4, false>", "bwd<8, false>"),
    ("demod_coefs", {}, (4, 7, 3, 3), "nchw f32", "fwd<1, true>", "bwd<1, true>"),
]  # fmt: skip


def operands(op, n, c):
    """Shapes of what the op takes besides images, or weights [n, c, kh, kw]."""
    kinds = {"bias_act": [(c,)], "adain": [(n, c)] * 2, "demod_coefs": [(2, c)]}
    return {**kinds, "synthesis_epilogue": [(n, c), (c,), (c,)]}.get(op, [])


def call(op, arguments):
    options = arguments | ({"f": FILTERS[arguments["f"]]} if "f" in arguments else {})

    def run(x, *small):
        if op != "synthesis_epilogue":
            return getattr(ops, op)(x, *small, **options, impl="simt")
        d, s, b = small
        shrinks = 1 if "f" in options else 0  # by 4 taps with a padding of 1
        z = randn(*(side - shrinks for side in x.shape[2:])).float()
        return ops.synthesis_epilogue(
            x, d=d, noise=z, noise_strength=s, b=b, **options, impl="simt"
        )

    return run


def short(name, op):
    name = re.sub(r"<(float|Half16|double)>|(float|Half16|double),? ?|_kernel", "", name)
    return name.replace("<>", "").removeprefix(op + "_")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(map(str, row[:4])))
def test_kernels_of(impl, row):
    if impl != "simt":
        pytest.skip("only csrc/simt tells what is launched")
    op, arguments, shape, place, *expected = row
    layout, dtype = place.split()
    tensors = [randn(*shape), *(randn(*s) for s in operands(op, *shape[:2]))]
    tensors = [t.to(DTYPES[dtype]) for t in tensors]
    tensors[0] = lay_out(tensors[0], LAYOUTS[layout])
    order = outputs_and_grads if len(expected) == 2 else second_grads
    with launches(impl) as names:
        order(call(op, arguments), tensors)
    assert [short(name, op) for name in names] == expected


def test_every_kernel_is_chosen():
    """Those that the sources declare, against those of the rows."""
    sources = "".join(path.read_text() for path in KERNELS.glob("*.cu*"))
    declared = set(re.findall(r"__global__[^;{]*?(\w+)_kernel\(", sources))
    rows = {(op, name.split("<")[0]) for op, _, _, _, *names in ROWS for name in names}
    assert declared == {f"{op}_{n}" if f"{op}_{n}" in declared else n for op, n in rows}
