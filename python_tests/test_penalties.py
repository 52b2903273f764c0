"""Penalties: values by hand, derivatives by finite differences, through StyleGAN2 as well."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from gankern.models import pggan, stylegan, stylegan2
from gankern.training import penalties


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# A small smooth D, and the penalties on it, as functions of images and weights.

IMAGES = (3, 1, 4, 4)
WEIGHTS = ((2, 1, 3, 3), (1, 8))


def D(x, w0, w1):
    return F.softplus(F.conv2d(x, w0, stride=2, padding=1)).flatten(1) @ w1.t()  # [N, 1]


def r1(x, *w):
    return penalties.r1(x, D(x, *w), gamma=3.0)


def r2(x, *w):
    return penalties.r2(x, D(x, *w), gamma=3.0)


def gradient_penalty(x, *w):
    alpha = torch.tensor([0.1, 0.5, 0.9])
    other = randn(*IMAGES, seed=5)
    return penalties.gradient_penalty(lambda x: D(x, *w), x, other, 7.0, 0.8, alpha)


def drift(x, *w):
    return penalties.drift(D(x, *w), 0.5)


def leaves():
    return [t.requires_grad_() for t in (randn(*IMAGES), *(randn(*s, seed=2) for s in WEIGHTS))]


@pytest.mark.parametrize("penalty", [r1, r2, gradient_penalty, drift])
def test_derivatives(penalty):
    x, *w = leaves()
    assert gradcheck(lambda *w: penalty(x, *w), w)
    assert gradgradcheck(lambda *w: penalty(x, *w), w)
    assert penalty(x, *w) > 0


def path_length_of(w):
    """Of the image sin(ws · w), with a mean that stays at 2."""
    ws = randn(2, 3, 4, seed=3).requires_grad_()
    img = torch.einsum("nlk,kp->np", ws, w).sin().reshape(2, 1, 2, 3)
    mean = torch.full((), 2.0, dtype=torch.float64)
    noise = randn(2, 1, 2, 3, seed=4)
    return penalties.path_length(img, ws, mean, 3.0, decay=0.0, noise=noise)[0]


def test_derivatives_of_path_length():
    w = randn(4, 6).requires_grad_()
    assert path_length_of(w) > 0
    assert gradcheck(path_length_of, w)
    assert gradgradcheck(path_length_of, w)


# By hand.


def test_r1_and_r2_of_a_quadratic():
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).requires_grad_()
    logits = x.square().sum(1, keepdim=True)  # gradient 2x: squared norms 20 and 36
    assert penalties.r1(x, logits, gamma=0.5).item() == pytest.approx(0.25 * 28)
    assert penalties.r2(x, x.square().sum(1, keepdim=True), 2.0).item() == pytest.approx(28)


def test_gradient_penalty_of_a_quadratic():
    real, fake = torch.zeros(2, 2), torch.tensor([[6.0, 8.0], [0.0, 4.0]])
    alpha = torch.tensor([0.5, 0.25])  # between at (3, 4) and (0, 1): gradients of 10 and 2

    def logits(x):
        return x.square().sum(1, keepdim=True)

    gp = penalties.gradient_penalty(logits, real, fake, 10.0, alpha=alpha)
    assert gp.item() == pytest.approx(10 * (9**2 + 1**2) / 2)
    gp = penalties.gradient_penalty(logits, real, fake, 10.0, target=4.0, alpha=alpha)
    assert gp.item() == pytest.approx(10 / 16 * (6**2 + 2**2) / 2)


def test_gradient_penalty_draws_the_points_between():
    seen = []
    real, fake = torch.zeros(64, 1, 2, 2), torch.ones(64, 1, 2, 2)

    def logits(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1, keepdim=True)

    assert penalties.gradient_penalty(logits, real, fake).item() == pytest.approx(10)  # |∇| = 2
    assert 0 <= seen[0].min() < 0.2
    assert 0.8 < seen[0].max() <= 1
    assert torch.equal(seen[0].amax([1, 2, 3]), seen[0].amin([1, 2, 3]))  # one alpha an image


def test_gradient_penalty_where_the_gradient_is_zero():
    w = torch.zeros(4, 1, requires_grad=True)
    gp = penalties.gradient_penalty(lambda x: x @ w, torch.ones(2, 4), torch.zeros(2, 4))
    gp.backward()
    assert gp.item() == 10
    assert w.grad.isfinite().all()


def test_path_length_of_a_linear_generator():
    # img = s · the sum of ws over layers and features, at all 2 x 3 pixels; y = 1.
    s = torch.tensor([1.0, 3.0])
    ws = torch.ones(2, 5, 4, requires_grad=True)
    img = (ws.sum([1, 2]) * s)[:, None, None, None].expand(2, 1, 2, 3)
    # Every element of the gradient is 6 s / sqrt(6), the norm over 4 features twice that.
    lengths = [2 * math.sqrt(6), 6 * math.sqrt(6)]
    start = torch.tensor(3.0)
    penalty, mean = penalties.path_length(img, ws, start, 2.0, 0.25, torch.ones_like(img))
    moved = 3.0 + 0.25 * (sum(lengths) / 2 - 3.0)
    assert mean.item() == pytest.approx(moved)
    assert start == 3
    assert not mean.requires_grad
    assert penalty.item() == pytest.approx(sum((x - moved) ** 2 for x in lengths))


def test_drift():
    assert penalties.drift(torch.tensor([[3.0], [-1.0]]), 0.1).item() == pytest.approx(0.5)


def test_penalties_of_16_bit_images_are_float32():
    x = torch.full((2, 3, 64, 64), 1e-2, dtype=torch.float16, requires_grad=True)
    logits = (x * 4).float().sum([1, 2, 3])[:, None]  # squared norms 196,608
    penalty = penalties.r1(x, logits, gamma=2.0)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(16 * 12288)


# Through StyleGAN2, on the kernels that run by default.


def check_in_a_direction(penalty, net):
    """The derivative of penalty(parameters) along a random direction, by central differences."""
    names, params = zip(*net.named_parameters(), strict=True)
    direction = [randn(*p.shape, seed=i) for i, p in enumerate(params)]
    grads = torch.autograd.grad(penalty(net), params, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None)

    def moved(step):
        shifted = [p + step * d for p, d in zip(params, direction, strict=True)]
        state = dict(zip(names, (t.detach() for t in shifted), strict=True))
        return penalty(lambda *args: functional_call(net, state, args))

    h = 1e-6
    assert slope.item() == pytest.approx(((moved(h) - moved(-h)) / (2 * h)).item(), rel=1e-4)


TINY = {"resolution": (8, 8), "channel_base": 32, "channel_max": 4, "mapping_layers": 1}


@pytest.mark.parametrize("name", ["r1", "gradient_penalty"])
def test_stylegan2_discriminator(name):
    torch.manual_seed(0)
    D = stylegan2.Discriminator(**TINY).double()
    x = randn(4, 3, 8, 8).requires_grad_()
    y, alpha = randn(4, 3, 8, 8, seed=1), torch.full((4,), 0.3)
    if name == "r1":
        check_in_a_direction(lambda D: penalties.r1(x, D(x)), D)
    else:
        check_in_a_direction(lambda D: penalties.gradient_penalty(D, x, y, alpha=alpha), D)


def test_stylegan2_path_length():
    torch.manual_seed(0)
    synthesis = stylegan2.Generator(4, 0, 4, **TINY).synthesis.double()
    ws = randn(2, synthesis.num_ws, 4).requires_grad_()
    noise = randn(2, 3, 8, 8, seed=1)
    mean = torch.zeros((), dtype=torch.float64)

    def penalty(synthesis):
        return penalties.path_length(synthesis(ws, "const"), ws, mean, 2.0, 0.0, noise)[0]

    check_in_a_direction(penalty, synthesis)


GROWING = {"resolution": (8, 8), "channel_base": 32, "channel_max": 4}


@pytest.mark.parametrize("growth", [0.5, 1.0])
@pytest.mark.parametrize("make", [pggan.Discriminator, stylegan.make_discriminator])
def test_discriminators_that_grow(make, growth):
    torch.manual_seed(0)
    D = make(**GROWING).double()
    D.set_growth(growth)
    x, y = randn(4, 3, 8, 8).requires_grad_(), randn(4, 3, 8, 8, seed=1)
    alpha = torch.full((4,), 0.3)
    check_in_a_direction(lambda D: penalties.r1(x, D(x)), D)
    check_in_a_direction(lambda D: penalties.gradient_penalty(D, x, y, alpha=alpha), D)


def test_stylegan_path_length():
    torch.manual_seed(0)
    synthesis = stylegan.Generator(4, 0, 4, mapping_layers=1, **GROWING).synthesis.double()
    with torch.no_grad():  # constant planes lie next to a kink of the instance norm
        synthesis.blocks[0].const.normal_()
    ws = randn(2, synthesis.num_ws, 4).requires_grad_()
    noise, mean = randn(2, 3, 8, 8, seed=1), torch.zeros((), dtype=torch.float64)

    def penalty(synthesis):
        return penalties.path_length(synthesis(ws, "const"), ws, mean, 2.0, 0.0, noise)[0]

    check_in_a_direction(penalty, synthesis)


def test_path_length_over_processes_moves_to_their_common_mean():
    ws = torch.ones(2, 1, 4, requires_grad=True)
    img = ws.sum(2)[:, :, None, None] * torch.tensor(3.0)  # gradients of 3: lengths 6
    mean = torch.tensor(0.0)
    ones = torch.ones(2, 1, 1, 1)
    penalty, moved = penalties.path_length(
        img, ws, mean, 1.0, 0.5, ones, reduce=lambda length: (length + 10) / 2
    )
    assert moved.item() == pytest.approx(4)
    assert penalty.item() == pytest.approx(4)
