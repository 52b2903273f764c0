import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gankern.ops.adain import adain


def test_grad_orders():
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(adain, (x, scale, shift))
    assert gradgradcheck(adain, (x, scale, shift))


def test_instance_norm():
    x = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    scale, shift = torch.randn(2, 3, 4, dtype=torch.float64)
    wanted = torch.nn.functional.instance_norm(x) * scale[..., None, None] + shift[..., None, None]
    torch.testing.assert_close(adain(x, scale, shift), wanted)


def test_style_sets_the_statistics():
    x = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    scale, shift = torch.randn(2, 3, 4, dtype=torch.float64)
    var, mean = torch.var_mean(adain(x, scale, shift, eps=0), (2, 3), unbiased=False)
    torch.testing.assert_close(mean, shift)
    torch.testing.assert_close(var, scale.square())


X, S = torch.ones(2, 3, 4, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((1.0, S, S), TypeError, "x must be a tensor, got float"),
        ((X.long(), S, S), TypeError, "x must be a floating-point tensor, got torch.int64"),
        ((S, S, S), ValueError, r"x must be \(N, C, \*\), got 2 dimensions \(2, 3\)"),
        ((X, S[0], S), ValueError, r"scale must be \(N, C\) = \(2, 3\), got \(3,\)"),
        ((X, S, S.T), ValueError, r"shift must be \(N, C\) = \(2, 3\), got \(3, 2\)"),
        ((X, S.half(), S), TypeError, "scale must be torch.float32 like x, got torch.float16"),
        ((X.half(), S, S.half()), TypeError, "shift must be torch.float32 like scale"),
        ((X, S, S, None), TypeError, "eps must be a number, got NoneType"),
        ((X, S, S, -1), ValueError, "eps must be at least 0, got -1"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match="adain: " + text):
        adain(*args)
