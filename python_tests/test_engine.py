"""The engine: schedules, updates, accumulation, skipped steps, graphs, penalties in the loop."""

import copy
import math

import pytest
import torch
from torch import nn

from gankern import models
from gankern.training import TrainError, make_config
from gankern.training.graphs import WARMUP, GraphedPass, check_graphs
from gankern.training.noise import crossovers
from gankern.training.optim import Updater, clip_weights
from gankern.training.phases import Part, Phases
from gankern.training.schedule import Schedule
from gankern.training.stats import TickStats

CPU = torch.device("cpu")


# Schedules.


def test_levels_fade_in_and_stay():
    config = make_config("pggan", fade_kimg=2.0, stable_kimg=1.0)
    schedule = Schedule(config, [4, 8, 16])
    kimg = [0, 0.9, 1, 2, 3, 4, 5, 6, 7, 99]
    growth = [schedule.growth(round(k * 1000)) for k in kimg]
    assert growth == [0, 0, 0, 0.5, 1, 1, 1.5, 2, 2, 2]
    config.grow_from = 8
    assert Schedule(config, [4, 8, 16]).growth(0) == 1
    config.grow_from = 32
    with pytest.raises(TrainError, match="--grow-from must be at most 16, got 32"):
        Schedule(config, [4, 8, 16])
    assert Schedule(make_config("dcgan"), []).growth(5) == 0


def test_batch_and_learning_rate_of_a_level():
    config = make_config(
        "pggan", fade_kimg=1.0, stable_kimg=1.0, batch=8, level_batch="8:16,16:4", level_lr="16:5"
    )
    schedule = Schedule(config, [4, 8, 16])
    # The next level counts from its first faint image on.
    assert [schedule.batch(n) for n in (0, 1000, 1500, 3500)] == [8, 8, 16, 4]
    assert [schedule.lr(0.1, n) for n in (0, 2000, 3500)] == [0.1, 0.1, 5]


def test_learning_rate_ramps():
    schedule = Schedule(make_config(kimg=10, lr_rampup_kimg=2, lr_rampdown_kimg=4), [])
    lrs = [schedule.lr(1.0, round(k * 1000)) for k in (0, 1, 2, 6, 8, 9)]
    assert lrs == pytest.approx([0, 0.5, 1, 1, 0.5, 0.25])


def test_batch_schedule():
    schedule = Schedule(make_config(batch=4, batch_schedule="1:8,2:16"), [])
    assert [schedule.batch(n) for n in (0, 999, 1000, 5000)] == [4, 4, 8, 16]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"batch_schedule": "0"}, "--batch-schedule must be as 0:16,50:32, got '0'"),
        ({"batch_schedule": "0:1.5"}, "--batch-schedule must be of whole batches, got '0:1.5'"),
        ({"batch_schedule": "0:-1"}, "--batch-schedule must be as"),
        ({"pl_weight": 2.0}, "--pl-weight must be 0 with --model dcgan, which has no styles"),
        ({"fade_kimg": 2.0}, "--fade-kimg must be 0 with --model dcgan, which does not grow"),
        ({"model": "pggan", "level_lr": "4:1"}, "--level-lr must be empty without --fade-kimg"),
        ({"num_fp16_res": 2}, "--num-fp16-res must be 0 with --model dcgan, got 2"),
        ({"model": "pggan", "fade_kimg": 1.0, "compile": True}, "--compile must be off while"),
    ],
)
def test_options_that_exclude_each_other(values, text):
    with pytest.raises(TrainError, match=text):
        make_config(**values)


def test_batches_must_divide():
    with pytest.raises(TrainError, match="--batch-schedule must be a multiple of 3 processes"):
        Schedule(make_config(batch=6, batch_schedule="0:8"), [], world=3)
    with pytest.raises(TrainError, match="--batch-gpu must divide a process's share of a batch, 8"):
        Schedule(make_config(batch=16, batch_gpu=3), [], world=2)


def test_crossovers():
    layers = crossovers(2000, 6, 0.9, seed=0)
    assert set(layers.tolist()) == {1, 2, 3, 4, 5, 6}
    assert (layers == 6).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert (crossovers(50, 6, 0.0, seed=0) == 6).all()


# Updates.


def quadratic(weights=3):
    torch.manual_seed(0)
    return nn.Linear(weights, 1, bias=False)


def loss_of(net):
    def phase(x, scale):
        loss = net(x).square().mean()
        scale(loss).backward()
        return {"loss": loss}

    return phase


def test_parts_add_up_to_the_batch():
    x = torch.randn(12, 3)
    whole, parts = quadratic(), quadratic()
    config = make_config()
    for net, pieces in ((whole, [x]), (parts, [*x.chunk(3)])):
        up = Updater(net, "adam", config)
        values = up.backward(loss_of(net), pieces)
        up.step(0.1)
        assert values["loss"].shape == (len(pieces),)
    torch.testing.assert_close(whole.weight, parts.weight)


@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_steps_that_are_not_finite_are_skipped(kind, precision, bad):
    net = quadratic()
    up = Updater(net, kind, make_config(precision=precision))
    for x in (torch.ones(4, 3), torch.full((4, 3), bad), torch.ones(4, 3)):
        before, state = net.weight.clone(), copy.deepcopy(up.optimizer.state_dict()["state"])
        scale = up.scaler.get_scale()
        up.backward(loss_of(net), [x])
        skipped = up.step(0.1)["skipped"].item()
        assert skipped == (not x.isfinite().all())
        assert torch.equal(net.weight, before) == skipped
        halved = skipped and precision == "fp16"
        assert up.scaler.get_scale() == (scale / 2 if halved else scale)
        if skipped:
            after = up.optimizer.state_dict()["state"]
            for name, value in state[0].items():
                assert torch.equal(value, after[0][name]), name


def test_training_goes_on_after_many_steps_that_were_skipped():
    net = quadratic()
    up = Updater(net, "adam", make_config())
    for _ in range(200):
        up.backward(loss_of(net), [torch.full((4, 3), math.inf)])
        assert up.step(0.1)["skipped"]
    before = net.weight.clone()
    up.backward(loss_of(net), [torch.ones(4, 3)])
    assert not up.step(0.1)["skipped"]
    assert not torch.equal(net.weight, before)


def test_gradient_is_clipped_after_it_is_measured():
    net = quadratic()
    up = Updater(net, "rmsprop", make_config(clip_grad=0.5))
    up.backward(loss_of(net), [torch.ones(4, 3) * 10])
    norm = up.step(0.0)["grad_norm"]
    assert norm > 0.5
    assert net.weight.grad.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_lazy_adam_is_rescaled():
    net = quadratic()
    up = Updater(net, "adam", make_config(beta1=0.5, beta2=0.99), lazy=16)
    up.backward(loss_of(net), [torch.ones(1, 3)])
    up.step(0.1)
    (group,) = up.optimizer.param_groups
    assert group["lr"] == pytest.approx(0.1 * 16 / 17)
    assert group["betas"] == pytest.approx((0.5 ** (16 / 17), 0.99 ** (16 / 17)))


def test_weights_are_clipped():
    net = nn.Linear(4, 4)
    nn.init.constant_(net.weight, 3.0)
    clip_weights(net, 0.01)
    assert net.weight.max().item() == pytest.approx(0.01)
    assert net.bias.abs().max() <= 0.01


def test_statistics_leave_out_what_is_not_finite():
    stats = TickStats(1, 0.0)
    stats.add(8, a=torch.tensor([1.0, 3.0]), b=torch.tensor(1.0))
    stats.add(8, a=torch.tensor(float("inf")))
    stats.add(8, a=torch.tensor(4.0))
    row = stats.take()
    assert (row["a"], row["b"], row["nan_a"]) == (3.0, 1.0, 0.333333)
    assert "nan_b" not in row
    stats.add(8, a=torch.tensor(float("nan")))
    assert math.isnan(stats.take()["a"])  # which the monitor stops at


# Passes.


def make_phases(**values):
    config = make_config(
        model="stylegan2", z_dim=4, w_dim=4, mapping_layers=1, channel_base=32, channel_max=4,
        conditional=False, **values,
    )  # fmt: skip
    config.resolution, config.channels = (8, 8), 1
    torch.manual_seed(0)
    G, D = models.build(config)
    return Phases(config, G, D, lambda x: x, CPU), G, D


def a_part(n=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    real = torch.randn(n, 1, 8, 8, generator=g)
    return Part(real, None, torch.randn(n, 4, generator=g), None)


def gradients(net):
    return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def test_penalties_of_D_are_multiplied_by_their_interval():
    part = a_part()
    grads = []
    for interval in (1, 4):
        phases, _, D = make_phases(r1_gamma=1.0, d_reg_interval=interval)
        torch.manual_seed(0)
        values = phases.regularise_D(part, lambda x: x)
        assert values["r1"] > 0
        grads.append(gradients(D))
    for name, grad in grads[0].items():
        torch.testing.assert_close(4 * grad, grads[1][name])


def test_path_length_moves_its_mean_and_reaches_G():
    phases, G, _ = make_phases(pl_weight=2.0)
    values = phases.regularise_G(a_part(), lambda x: x)
    assert phases.pl_mean > 0
    assert values["path_length"] > 0
    assert gradients(G)["synthesis.b8.conv1.weight"].abs().sum() > 0
    assert not phases.pl_mean.requires_grad


def test_path_length_that_is_not_finite_leaves_its_mean():
    phases, G, _ = make_phases(pl_weight=2.0)
    phases.regularise_G(a_part(), lambda x: x)
    before = phases.pl_mean.clone()
    with torch.no_grad():
        G.synthesis.b8.conv1.bias.fill_(math.nan)
    assert phases.regularise_G(a_part(), lambda x: x)["path_length"].isnan()
    assert torch.equal(phases.pl_mean, before)


def test_drift_joins_the_gradient():
    plain, drifting = make_phases()[0], make_phases(drift=10.0)[0]
    part = a_part()
    losses = []
    for phases in (plain, drifting):
        torch.manual_seed(0)
        losses.append(phases.main_D(part, lambda x: x))
        losses[-1]["grad"] = next(phases.D.parameters()).grad.clone()
    expected = 10 * losses[0]["logit_real"].square().mean().item()
    assert losses[1]["drift"].item() == pytest.approx(expected)
    assert losses[1]["loss_D"].item() == pytest.approx(losses[0]["loss_D"].item())  # told apart
    assert not torch.equal(losses[1]["grad"], losses[0]["grad"])


def test_a_part_splits():
    parts = a_part(6).split(3)
    assert [len(p.real) for p in parts] == [2, 2, 2]
    assert parts[0].c is None


# CUDA graphs, with a recorder in place of the GPU.


class FakeGraphs:
    """Records a function; replaying runs it again and writes into the same places."""

    def __init__(self, net):
        self.net, self.log = net, []

    def warm_up(self, run):
        self.log.append("warm up")
        return run()

    def capture(self, run):
        self.log.append("capture")
        for p in self.net.parameters():
            p.grad = None
        outputs = run()
        fixed = [p.grad for p in self.net.parameters()]

        def replay():
            self.log.append("replay")
            for p in self.net.parameters():
                p.grad = None
            for name, value in run().items():
                outputs[name].data.copy_(value)
            for grad, p in zip(fixed, self.net.parameters(), strict=True):
                grad.copy_(p.grad)
                p.grad = None

        return outputs, replay


def test_graphed_pass_computes_what_the_plain_one_does():
    phases, _, D = make_phases()
    graphs = FakeGraphs(D)
    graphed = GraphedPass(phases.main_D, D, graphs)
    calls = WARMUP + 3
    for i in range(calls):
        part = a_part(seed=i)
        D.zero_grad()
        torch.manual_seed(i)
        expected = phases.main_D(part, lambda x: x)
        wanted = gradients(D)
        D.zero_grad()
        torch.manual_seed(i)
        values = graphed(part, lambda x: x)
        assert torch.equal(values["loss_D"], expected["loss_D"])
        for name, grad in gradients(D).items():
            torch.testing.assert_close(grad, wanted[name])
    assert graphs.log == ["warm up"] * WARMUP + ["capture"] + ["replay"] * 3


def test_graphs_are_refused_where_they_cannot_be():
    config = make_config(cuda_graphs=True)
    with pytest.raises(TrainError, match="--cuda-graphs cannot be used: the device is cpu"):
        check_graphs(config, CPU, 1)
    cuda = torch.device("cuda", 0)
    with pytest.raises(TrainError, match="2 processes exchange statistics"):
        check_graphs(config, cuda, 2)
    with pytest.raises(TrainError, match="augmentation is not captured"):
        check_graphs(make_config(augment="ada"), cuda, 1)
    check_graphs(config, cuda, 1)
