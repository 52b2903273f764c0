from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gankern.ops.pixel_norm import pixel_norm

DATA = Path(__file__).parent / "data"


def test_grad_orders():
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(pixel_norm, x)
    assert gradgradcheck(pixel_norm, x)


@pytest.mark.parametrize("file", sorted(DATA.glob("pixel_norm_*.npz")), ids=lambda f: f.stem)
def test_golden(file):
    golden = {k: torch.from_numpy(v) for k, v in np.load(file).items()}
    x = golden["x"].requires_grad_()
    y = pixel_norm(x, dim=1, eps=1e-8)
    (dx,) = torch.autograd.grad(y, x, golden["dy"])
    torch.testing.assert_close(y, golden["y"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dx, golden["dx"], rtol=1e-10, atol=1e-12)


def test_unit_mean_square():
    y = pixel_norm(torch.randn(4, 9, 3, 5, dtype=torch.float64), eps=0)
    torch.testing.assert_close(y.square().mean(1), torch.ones(4, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((1.0,), TypeError, "x must be a tensor, got float"),
        ((torch.ones(2, 3, dtype=torch.int64),), TypeError, "x must be a floating-point tensor"),
        ((torch.ones(2, 3), 1.0), TypeError, "dim must be an int, got float"),
        ((torch.ones(2, 3), 2), ValueError, r"dim must be in \[-2, 1\] for a 2-d x, got 2"),
        ((torch.ones(2, 3), 1, "a"), TypeError, "eps must be a number, got str"),
        ((torch.ones(2, 3), 1, -1.0), ValueError, "eps must be at least 0, got -1.0"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match="pixel_norm: " + text):
        pixel_norm(*args)
