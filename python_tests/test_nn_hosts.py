"""Each layer of gankern.nn where other people's code puts it: nn.Sequential, autocast,
DistributedDataParallel, torch.compile, torch.export, torch.func, the meta device; and the names in
its state dict."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gankern.nn as gn
from gankern.ops import bias_act


class With(nn.Module):
    """A layer of one argument: the layer's other arguments are fixed."""

    def __init__(self, layer: nn.Module, w_dim: int = 0, mode: str = "") -> None:
        super().__init__()
        self.layer, self.w_dim, self.mode = layer, w_dim, (mode,) if mode else ()

    def forward(self, x):
        w = x.flatten(1)[:, : self.w_dim]
        return self.layer(x, w, *self.mode)


class WithNoise(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x[:, :1].detach() - 1)


# Each layer as a module of one argument, and that argument's shape without the batch.
LAYERS = {
    "AdaIN": (lambda: With(gn.AdaIN(4, 8), 8), (4, 6, 6)),
    "BatchNorm": (lambda: gn.BatchNorm(4), (4, 6, 6)),
    "Blur": (lambda: gn.Blur(), (4, 6, 6)),
    "Downsample": (lambda: gn.Downsample(), (4, 6, 6)),
    "EqualizedConv2d": (lambda: gn.EqualizedConv2d(4, 6, act="lrelu", down=2), (4, 6, 6)),
    "EqualizedLinear": (lambda: gn.EqualizedLinear(8, 6, act="lrelu"), (8,)),
    "FusedLeakyReLU": (lambda: gn.FusedLeakyReLU(4), (4, 6, 6)),
    "MappingNetwork": (lambda: gn.MappingNetwork(8, 0, 8, 3, num_layers=2), (8,)),
    "MinibatchStdDev": (lambda: gn.MinibatchStdDev(group_size=2), (4, 6, 6)),
    "ModulatedConv2d": (lambda: With(gn.ModulatedConv2d(4, 6, w_dim=8, up=2), 8), (4, 6, 6)),
    "NoiseInjection": (lambda: WithNoise(gn.NoiseInjection(4)), (4, 6, 6)),
    "PixelNorm": (lambda: gn.PixelNorm(), (4, 6, 6)),
    "SynthesisLayer": (lambda: With(gn.SynthesisLayer(4, 6, 8, 12, up=2), 8, "const"), (4, 6, 6)),
    "ToRGB": (lambda: With(gn.ToRGB(4, 3, 8), 8), (4, 6, 6)),
    "Upsample": (lambda: gn.Upsample(), (4, 6, 6)),
}

STATE_DICTS = {
    "AdaIN": {"affine.weight": (8, 8), "affine.bias": (8,)},
    "BatchNorm": {"weight": (4,), "bias": (4,), "running_mean": (4,), "running_var": (4,)},
    "Blur": {"resample_filter": (3, 3)},
    "Downsample": {"resample_filter": (4, 4)},
    "EqualizedConv2d": {"weight": (6, 4, 3, 3), "bias": (6,), "resample_filter": (4, 4)},
    "EqualizedLinear": {"weight": (6, 8), "bias": (6,)},
    "FusedLeakyReLU": {"bias": (4,)},
    "MappingNetwork": {
        "fc0.weight": (8, 8),
        "fc0.bias": (8,),
        "fc1.weight": (8, 8),
        "fc1.bias": (8,),
        "w_avg": (8,),
    },
    "MinibatchStdDev": {},
    "ModulatedConv2d": {
        "weight": (6, 4, 3, 3),
        "resample_filter": (4, 4),
        "affine.weight": (4, 8),
        "affine.bias": (4,),
    },
    "NoiseInjection": {"strength": (4,)},
    "PixelNorm": {},
    "SynthesisLayer": {
        "weight": (6, 4, 3, 3),
        "bias": (6,),
        "noise_strength": (),
        "noise_const": (12, 12),
        "resample_filter": (4, 4),
        "affine.weight": (4, 8),
        "affine.bias": (4,),
    },
    "ToRGB": {"weight": (3, 4, 1, 1), "bias": (3,), "affine.weight": (4, 8), "affine.bias": (4,)},
    "Upsample": {"resample_filter": (4, 4)},
}


def make(name: str, batch: int = 2) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[name][0](), LAYERS[name][1]
    for p in layer.parameters():
        if not p.any():  # a strength or a bias
            nn.init.normal_(p)
    return layer, torch.randn(batch, *shape)


def step(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """[y, gradients in x and in every parameter]."""
    x = x.clone().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y.float().square().mean(), [x, *module.parameters()])]


def test_every_layer_is_here():
    assert sorted(LAYERS) == sorted(STATE_DICTS) == sorted(gn.__all__)


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict(name):
    layer, _ = make(name)
    inner = layer.layer if isinstance(layer, With | WithNoise) else layer
    assert {k: tuple(v.shape) for k, v in inner.state_dict().items()} == STATE_DICTS[name]
    fresh = LAYERS[name][0]()
    fresh.load_state_dict(layer.state_dict())
    for a, b in zip(fresh.state_dict().values(), layer.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_sequential(name):
    layer, x = make(name)
    first = nn.Linear(x.shape[-1], x.shape[-1])
    model = nn.Sequential(first, layer, nn.Flatten(), nn.Softplus())
    expected = nn.functional.softplus(copy.deepcopy(layer)(first(x)).flatten(1))
    y, dx, *grads = step(model, x)
    torch.testing.assert_close(y, expected)
    assert dx.abs().max() > 0
    for p, g in zip(model.parameters(), grads, strict=True):
        assert g.shape == p.shape
        assert g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name, dtype):
    layer, x = make(name)
    exact = step(copy.deepcopy(layer), x)
    with torch.autocast("cpu", dtype):
        actual = step(layer, x)
    assert all(g.dtype == torch.float32 for g in actual[1:])
    tolerance = 16 * torch.finfo(dtype).eps
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.float(), e, rtol=0, atol=tolerance * e.abs().max().item())


# This tests the graph and the shape functions; test_nn.py runs the code that inductor makes.
@pytest.mark.parametrize("name", LAYERS)
def test_compile(name):
    layer, x = make(name)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for a, e in zip(step(compiled, x), step(layer, x), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", LAYERS)
def test_export(name):
    layer, x = make(name)
    layer.eval()
    several = torch.cat([x, x + 1])
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(layer, (several,), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for images in (several, x, torch.cat([x, x + 1, x - 1])):
            torch.testing.assert_close(exported(images), layer(images))


@pytest.mark.parametrize("name", LAYERS)
def test_transforms(name):
    """torch.func's grad, vmap and jvp, which go through the reference."""
    layer, x = make(name)
    layer.eval()
    y, dx, *_ = step(layer, x)
    c, v = torch.randn_like(y), torch.randn_like(x)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).square().mean())(x), dx)
    several = torch.stack([x, x - 1])
    expected = torch.stack([layer(x) for x in several])
    torch.testing.assert_close(torch.func.vmap(layer)(several), expected)
    _, dy = torch.func.jvp(layer, (x,), (v,))
    vjp = torch.func.vjp(layer, x)[1](c)[0]
    torch.testing.assert_close((dy * c).sum(), (vjp * v).sum(), rtol=1e-4, atol=1e-4)


def test_transforms_of_a_named_kernel():
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="bias_act: impl='cpu' cannot run: kernels have no tr"):
        torch.func.jvp(lambda x: bias_act(x, impl="cpu"), (x,), (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_meta(name):
    layer, x = make(name)
    y = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert (y.shape, y.stride(), y.device.type) == (layer(x).shape, layer(x).stride(), "meta")


def run_ddp(folder: Path) -> None:
    """Of every layer, what one of two processes gets for its half of the batch."""
    rank, found = dist.get_rank(), {}
    for name in LAYERS:
        layer, x = make(name, batch=4)
        model = nn.Sequential(nn.Linear(x.shape[-1], x.shape[-1]), layer)
        model = DistributedDataParallel(model)
        y = model(x[2 * rank : 2 * rank + 2])
        y.square().mean().backward()
        found[name] = [y.detach(), *(p.grad for p in model.parameters())]
    torch.save(found, folder / f"{rank}.pt")


def test_distributed_data_parallel(tmp_path):
    processes.run(2, run_ddp, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in LAYERS:
        layer, x = make(name, batch=4)
        model = nn.Sequential(nn.Linear(x.shape[-1], x.shape[-1]), layer)
        # BatchNorm's statistics are of both halves; for the others the gradients are averaged.
        parts = [x] if name == "BatchNorm" else x.split(2)
        ys = []
        for part in parts:
            y = model(part)
            (y.square().mean() / len(parts)).backward()
            ys.append(y.detach())
        torch.testing.assert_close(torch.cat([r[name][0] for r in ranks]), torch.cat(ys), msg=name)
        for i, (key, p) in enumerate(model.named_parameters(), 1):
            where = functools.partial("{} {}: {}".format, name, key)
            for found in ranks:
                torch.testing.assert_close(found[name][i], p.grad, rtol=1e-4, atol=1e-6, msg=where)
