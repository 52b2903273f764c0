from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gankern.ops.minibatch_stddev import minibatch_stddev

DATA = Path(__file__).parent / "data"
GOLDEN = {
    "minibatch_stddev_00": (4, 1),
    "minibatch_stddev_01": (4, 2),
    "minibatch_stddev_02": (None, 1),
    "minibatch_stddev_03": (2, 1),
}


@pytest.mark.parametrize("group_size", [None, 1, 2, 4, 9])
def test_grad_orders(group_size):
    x = torch.randn(5, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: minibatch_stddev(x, group_size, 2), x)
    assert gradgradcheck(lambda x: minibatch_stddev(x, group_size, 2), x)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    golden = {k: torch.from_numpy(v) for k, v in np.load(DATA / f"{name}.npz").items()}
    x = golden["x"].requires_grad_()
    y = minibatch_stddev(x, *GOLDEN[name])
    (dx,) = torch.autograd.grad(y, x, golden["dy"])
    torch.testing.assert_close(y, golden["y"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dx, golden["dx"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((1.0,), TypeError, "x must be a tensor, got float"),
        ((torch.ones(2, 3, dtype=torch.int64),), TypeError, "x must be a floating-point tensor"),
        ((torch.ones(2),), ValueError, r"x must be \(N, C, \*\), got 1 dimensions \(2,\)"),
        ((torch.ones(2, 3), 0), ValueError, "group_size must be at least 1, got 0"),
        ((torch.ones(2, 3), 2.0), TypeError, "group_size must be an int or None, got float"),
        ((torch.ones(2, 3), 2, None), TypeError, "num_channels must be an int, got NoneType"),
        ((torch.ones(2, 3), 2, 2), ValueError, "num_channels must divide the 3 channels of x"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match="minibatch_stddev: " + text):
        minibatch_stddev(*args)
