"""Alarms: each watch by numbers, each failure forced in a small run, none in healthy runs."""

import json
import math

import numpy as np
import pytest
import torch

from gankern.cli import main
from gankern.data import open_dataset
from gankern.data.subset import hold_out
from gankern.models import dcgan
from gankern.training import TrainError, checkpoint, loop, make_config, train
from gankern.training.health import WATCHES, Alarm, Health
from gankern.training.losses import LOSSES
from gankern.training.monitor import broken_buffers, decisions
from gankern.training.probe import Probe, weight_norm
from gankern.training.report import build_report
from gankern.training.run import RunLog, read_config, read_stats

# By numbers.

GOOD = {
    "loss_D": 1.0,
    "loss_G": 1.5,
    "logit_real": 1.2,
    "logit_fake": -1.1,
    "acc_D": 0.85,
    "r_t": 0.6,
    "grad_norm_D": 3.0,
    "grad_norm_G": 2.0,
    "skipped_D": 0.0,
    "skipped_G": 0.0,
    "weight_norm_D": 5.0,
    "weight_norm_G": 6.0,
    "judged_train": 1.0,
    "judged_held": 0.9,
    "judged_fake": -1.0,
    "diversity": 0.9,
    "spread": 0.8,
    "modes_seen": 0.7,
    "data_share": 0.05,
    "img_per_s": 400.0,
    "tick_s": 10.0,
}


def watched(changes, ticks, health=None, first=20):
    """Alarms of good ticks, and then of changed ones: (tick, alarm)."""
    health, rng = health or Health(), np.random.default_rng(0)
    found = []
    for i in range(first + ticks):
        row = {k: v * (1 + 0.05 * rng.standard_normal()) for k, v in GOOD.items()}
        if i >= first:
            changed = changes(i - first) if callable(changes) else changes
            row |= changed
        found += [(i - first, alarm) for alarm in health.tick({"kimg": float(i)} | row)]
    return found


BAD = [
    ("not finite", {"loss_G": math.nan}, 0),
    ("not finite", {"skipped_D": 0.1}, 0),
    ("not finite", {"nan_loss_D": 0.02}, 0),
    ("not finite", {"nan_buffers_G": 1}, 0),
    ("loss spike", lambda i: {"loss_D": 9.0 if i == 3 else 1.0}, 3),
    ("D far ahead", {"logit_real": 7.0, "logit_fake": -6.0, "acc_D": 1.0}, 2),
    ("D far ahead", {"acc_D": 1.0, "grad_norm_G": 1e-3}, 2),
    ("D far ahead", lambda i: {"r_t": 1.0, "grad_norm_G": 2.0 * 0.1**i}, 4),
    ("D inverted", {"logit_real": -1.0, "logit_fake": 1.0, "acc_D": 0.2}, 2),
    ("D overfits", {"judged_train": 3.0, "judged_held": -0.5, "judged_fake": -1.0}, 2),
    ("G collapsed", {"diversity": 0.2}, 3),
    ("G collapsed", {"modes_seen": 0.1}, 3),
    ("G collapsed", {"spread": 0.05}, 3),
    ("oscillation", lambda i: {"logit_real": 3 * (-1) ** i, "logit_fake": 3 * (-1) ** i}, 6),
    ("weights grow", lambda i: {"weight_norm_G": 60.0 * 1.1 ** (i + 1)}, 1),
    ("weights grow", lambda i: {"weight_norm_G": 70.0 * 1.004**i}, 1),
    ("data stalls", {"data_share": 0.8}, 4),
    ("slower", {"img_per_s": 100.0}, 4),
]


@pytest.mark.parametrize(("kind", "changes", "tick"), BAD, ids=[f"{k}-{t}" for k, _, t in BAD])
def test_each_watch(kind, changes, tick):
    found = watched(changes, 12)
    assert [(i, alarm.kind) for i, alarm in found] == [(tick, kind)]
    (_, alarm) = found[0]
    assert alarm.kimg == 20.0 + tick
    lasts = next(watch.ticks for watch in WATCHES if watch.kind == kind)
    assert alarm.since == alarm.kimg - lasts + 1
    assert f"since {alarm.since:g} kimg" in str(alarm)
    assert alarm.figures
    assert alarm.cure in str(alarm)
    json.loads(json.dumps(alarm.to_json(), allow_nan=False))


def test_every_watch_is_tested():
    assert {watch.kind for watch in WATCHES} == {kind for kind, _, _ in BAD}


def test_numbers_that_are_missing_are_not_watched():
    health = Health()
    assert not [health.tick({"kimg": float(i), "loss_D": 1.0}) for i in range(50)].count(True)
    assert not health.tick({"kimg": 50.0})


def test_an_alarm_comes_again_after_the_symptom_was_gone():
    bad = {"logit_real": -1.0, "logit_fake": 1.0, "acc_D": 0.2}
    health = Health()
    assert len(watched(bad, 30, health)) == 1
    assert len(watched(bad, 5, health, first=20)) == 1


def test_wasserstein_logits_may_lie_far_apart():
    changes = {"logit_real": 70.0, "logit_fake": -60.0, "acc_D": 1.0}
    assert not watched(changes, 10, Health(logistic=False))


def test_fp16_skips_steps_until_its_scale_is_below_1():
    def skips(i):  # in a row, one a tick, from a scale of 2^16
        return {"skipped_G": 1.0, "scale_G": 2.0 ** (15 - i), "skipped_D": 0.2, "scale_D": 1024.0}

    ((tick, alarm),) = watched(skips, 30)
    assert (tick, alarm.kind) == (16, "not finite")  # the 17th
    assert alarm.figures == {"scale_G": 0.5}
    ((tick, _),) = watched(lambda i: skips(0) | {"nan_loss_G": 0.01}, 5)
    assert tick == 0


def test_buffers_are_watched():
    G, D = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.ReLU())
    D(torch.randn(4, 2))
    assert broken_buffers(G, D) == {}
    D(torch.tensor([[1.0, 2.0], [math.nan, 3.0]]))
    assert broken_buffers(G, D) == {"nan_buffers_D": 2}  # running mean and variance


def test_a_slow_fall_of_images_a_second_is_seen():
    ((tick, alarm),) = watched(lambda i: {"img_per_s": 400 * 0.98**i}, 60)
    assert alarm.kind == "slower"
    assert tick <= 45
    assert alarm.figures["before"] == pytest.approx(400, rel=0.05)
    assert alarm.figures["img_per_s"] < alarm.figures["before"] / 2
    # Larger images take longer, from where they fade in.
    grown = [(1.0, 400.0)] * 10 + [(1.0 + i / 10, 100.0) for i in range(1, 11)] + [(2.0, 100)] * 20
    changes = [{"growth": growth, "img_per_s": speed} for growth, speed in grown]
    assert not watched(lambda i: changes[i], len(changes))
    assert watched(lambda i: changes[i] | {"growth": 1.0}, len(changes))


def test_state_goes_on_where_it_was():
    bad = {"diversity": 0.1}
    health, other = Health(), Health()
    watched(bad, 2, health)
    other.load_state_dict(json.loads(json.dumps(health.state_dict())))
    ticks = [[h.tick(GOOD | bad | {"kimg": 22.0 + i}) for i in range(3)] for h in (health, other)]
    assert ticks[0] == ticks[1]
    assert [len(alarms) for alarms in ticks[0]] == [0, 1, 0]


def test_probe_of_real_of_equal_and_of_few_images():
    images = torch.from_numpy(open_dataset("digits:32").images[::13]).float() / 127.5 - 1
    rng = torch.Generator().manual_seed(0)
    images = images[torch.randperm(len(images), generator=rng)]
    probe = Probe(images[:192], torch.device("cpu"))
    real, same = probe(images[192:256]), probe(images[:1].repeat(64, 1, 1, 1))
    few = probe(images[:4].repeat(16, 1, 1, 1))
    assert all(value == pytest.approx(1, abs=0.2) for value in real.values())
    assert same["diversity"] == pytest.approx(0, abs=1e-3)
    assert same["spread"] == pytest.approx(0, abs=1e-6)
    assert same["modes_seen"] < few["modes_seen"] < 0.2 < real["modes_seen"]


def test_decisions():
    real, fake = torch.tensor([2.0, 1, -1, 3]), torch.tensor([-1.0, -2, 1, -3])
    found = decisions(real, fake, "nonsaturating")
    assert (found["r_t"].item(), found["acc_D"].item()) == (0.5, 0.75)
    assert decisions(real + 10, fake + 10, "wasserstein")["acc_D"].item() == 0.75
    assert decisions(real + 0.5, fake + 0.5, "least-squares")["acc_D"].item() == 0.75


def test_weight_norm():
    net = torch.nn.Linear(3, 2)
    wanted = math.sqrt(sum(p.square().sum().item() for p in net.parameters()))
    assert weight_norm(net) == pytest.approx(wanted)


def test_hold_out():
    digits = open_dataset("digits")
    rest, held = hold_out(digits, 1000, seed=3)
    assert (len(rest), len(held)) == (4000, 1000)
    seen = {image.tobytes() for image in rest.images[np.arange(4000)]}
    assert not seen & {image.tobytes() for image in held.images[np.arange(1000)]}
    images, labels = held.batch([0, 5, 7])
    index = held.images.index[[0, 5, 7]]
    assert torch.equal(images, digits.batch(index)[0])
    assert labels.tolist() == digits.labels[index].tolist()
    assert hold_out(digits, 0, 0) == (digits, None)
    with pytest.raises(ValueError, match="held out must be fewer than 5000, got 5000"):
        hold_out(digits, 5000, 0)


# By force: the alarm that each failure has to raise, and within how many ticks.

TINY = {
    "data": "digits:16",
    "width": 8,
    "d_width": 8,
    "z_dim": 8,
    "batch": 16,
    "kimg": 2.4,
    "tick_kimg": 0.16,
    "sample_ticks": 100,
    "checkpoint_ticks": 2,
    "grid": 2,
    "g_lr": 1e-3,
    "d_lr": 1e-3,
    "ema_kimg": 0.5,
}


def alarms_of(run):
    """(tick, kind) of each alarm in stats.jsonl."""
    rows = read_stats(run)
    return [(i + 1, alarm["kind"]) for i, row in enumerate(rows) for alarm in row.get("alarms", [])]


@pytest.fixture
def forced(monkeypatch):
    """Breaks training in a way of the given name; returns options to go with it."""

    def force(name):
        if name == "learning rate x 100":
            return {"g_lr": 0.1, "d_lr": 0.1}
        if name == "G frozen to one output":
            forward = dcgan.Generator.forward
            monkeypatch.setattr(
                dcgan.Generator,
                "forward",
                lambda G, z, c=None: forward(G, 0 * z, None if c is None else 0 * c),
            )
        if name == "D trained 50 steps a step":
            return {"n_critic": 50, "kimg": 5.6, "tick_kimg": 0.8}
        if name == "labels swapped":
            loss = LOSSES["nonsaturating"]
            swapped = loss._replace(d=lambda real, fake, smooth: loss.d(fake, real, smooth))
            monkeypatch.setitem(LOSSES, "nonsaturating", swapped)
        if name == "NaN image":
            dataset = open_dataset("digits:16")
            dataset.images[7, 0, 3, 3] = math.nan
            monkeypatch.setattr(loop, "open_dataset", lambda spec: dataset)
            return {"kimg": 5.04, "tick_kimg": 0.56}  # in one pass over the data it is seen once
        if name == "ten images only":
            options = {"held_out": 4990, "d_norm": "none", "d_dropout": 0.0, "d_width": 16}
            return options | {"kimg": 4.8}
        return {}

    return force


@pytest.mark.parametrize(
    ("failure", "kind", "ticks"),
    [
        ("learning rate x 100", "weights grow", 15),
        ("G frozen to one output", "G collapsed", 12),
        ("D trained 50 steps a step", "D far ahead", 6),
        ("labels swapped", "D inverted", 4),
        ("NaN image", "not finite", 9),
        ("ten images only", "D overfits", 30),
    ],
)
def test_forced_failure(failure, kind, ticks, forced, tmp_path):
    run = train(make_config(**TINY | forced(failure) | {"out": str(tmp_path)}))
    found = [tick for tick, name in alarms_of(run) if name == kind]
    assert found, alarms_of(run)
    assert found[0] <= ticks
    if failure == "NaN image":
        (alarm,) = (
            a for row in read_stats(run) for a in row.get("alarms", []) if kind == a["kind"]
        )
        assert {"nan_loss_D", "skipped_D", "nan_buffers_D"} <= alarm["figures"].keys()


@pytest.mark.parametrize(
    "options",
    [
        *({"seed": seed} for seed in range(5)),
        {"conditional": False},
        {"loss": "hinge"},
        {"loss": "least-squares"},
        {"r1_gamma": 0.5, "d_norm": "none"},
        {"model": "vanilla", "g_lr": 2e-4, "d_lr": 2e-4},
    ],
    ids=str,
)
def test_healthy_runs_raise_no_alarm(options, tmp_path):
    run = train(make_config(**TINY | options | {"held_out": 500, "out": str(tmp_path)}))
    assert alarms_of(run) == []
    rows = read_stats(run)
    names = {"diversity", "spread", "modes_seen", "weight_norm_G", "judged_held", "r_t", "acc_D"}
    names |= {"grad_norm_G", "grad_norm_D", "lr_G", "lr_D", "sec_per_kimg", "peak_mib"}
    assert names < rows[0].keys()


# What is done about them.


def test_alarm_is_told_everywhere(forced, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(make_config(**TINY | forced("labels swapped") | {"out": str(tmp_path)}))
    line = next(line for line in capsys.readouterr().err.splitlines() if "alarm" in line)
    assert line.startswith("alarm: D inverted since 0.")
    assert "look for swapped labels" in line
    events = EventAccumulator(str(run))
    events.Reload()
    (event,) = events.Tensors("alarms/text_summary")
    assert b"D inverted" in event.tensor_proto.string_val[0]
    # Every kind of alarm.
    (tmp_path / "all").mkdir()
    alarms = [
        Alarm(watch.kind, 3.0, 2.0, f"seen {i}", {}, watch.cure, watch.severe)
        for i, watch in enumerate(WATCHES)
    ]
    with RunLog(tmp_path / "all", make_config(), {}) as log:
        log.write_stats({"kimg": 3.0, "alarms": [alarm.to_json() for alarm in alarms]}, 3000)
    events = EventAccumulator(str(tmp_path / "all"), {"tensors": 0})
    events.Reload()
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("alarms/text_summary")]
    assert texts == [f"**{a.kind}** since 2 kimg: {a.seen}. Usually done: {a.cure}" for a in alarms]


def test_stop(forced, tmp_path, capsys):
    forced("labels swapped")
    args = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    with pytest.raises(SystemExit) as stop:
        main(["train", *args, "--on-alarm", "stop", "--out", str(tmp_path)])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("gankern: stopped at 0.48 kimg by an alarm: D inverted since")
    (run,) = tmp_path.iterdir()
    assert alarms_of(run) == [(3, "D inverted")]  # told before it stops


def test_rollback_goes_on_from_before(forced, tmp_path, capsys, monkeypatch):
    healthy = LOSSES["nonsaturating"]
    swapped = healthy._replace(d=lambda real, fake, smooth: healthy.d(fake, real, smooth))
    calls = []

    def loss_d(real, fake, smooth):  # the labels are swapped from the 60th step on
        calls.append(1)
        return (swapped if len(calls) > 60 else healthy).d(real, fake, smooth)

    monkeypatch.setitem(LOSSES, "nonsaturating", healthy._replace(d=loss_d))
    roll_back = loop.roll_back

    def heal(*args):
        monkeypatch.setitem(LOSSES, "nonsaturating", healthy)
        return roll_back(*args)

    monkeypatch.setattr(loop, "roll_back", heal)
    config = make_config(**TINY, on_alarm="rollback", out=str(tmp_path))
    run = train(config)
    assert len(calls) < 120
    saved = read_config(run)
    (note,) = saved.rollbacks
    assert note["alarm"]["kind"] == "D inverted"
    assert note["to_kimg"] == 0.96
    assert note["alarm"]["since"] > 0.96
    assert (saved.seed, saved.first_seed) == (1, 0)
    assert (saved.g_lr, saved.d_lr) == (5e-4, 5e-4)
    rows = read_stats(run)
    assert [row["kimg"] for row in rows] == pytest.approx([0.16 * (i + 1) for i in range(15)])
    assert rows[6]["rollbacks"] == [note]
    assert [row["lr_G"] for row in rows[5:7]] == [1e-3, 5e-4]
    assert alarms_of(run) == []
    assert "rolled back to 0.96 kimg: D inverted" in capsys.readouterr().err
    # Killed after the rollback, the run gives the same again.
    weights = checkpoint.load_checkpoint(run).tensors["G"]
    for folder in checkpoint.list_checkpoints(run)[1:]:
        checkpoint.remove(folder)
    train(read_config(run), run)
    again = checkpoint.load_checkpoint(run).tensors["G"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_rollback_at_most_n_times(forced, tmp_path):
    forced("labels swapped")
    config = make_config(**TINY, on_alarm="rollback", max_rollbacks=2, out=str(tmp_path))
    with pytest.raises(TrainError, match=r"D inverted .* \(after 2 rollbacks\)"):
        train(config)
    (run,) = tmp_path.iterdir()
    saved = read_config(run)
    assert (saved.seed, saved.g_lr, len(saved.rollbacks)) == (2, 2.5e-4, 2)


def test_nan_weights_stop_even_with_warnings(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "minimax", LOSSES["minimax"]._replace(g=lambda x: x.sum() / 0))
    with pytest.raises(TrainError, match=r"loss_G is .* training has diverged"):
        train(make_config(**TINY | {"loss": "minimax", "kimg": 0.32, "out": str(tmp_path)}))
    (run,) = tmp_path.iterdir()
    assert [kind for _, kind in alarms_of(run)] == ["not finite"]
    assert read_stats(run)[-1]["loss_G"] is None


# Quality while training.


class Pool(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x[:, :1].float(), 4).flatten(1)


def test_metrics_ticks(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.jit.script(Pool()).save(str(tmp_path / "pool.pt"))
    options = {"metrics_ticks": 2, "metrics_images": 160, "kimg": 0.64, "out": str(tmp_path / "r")}
    options["metrics_full"] = True
    options["metrics_extractor"] = str(tmp_path / "pool.pt")
    run = train(make_config(**TINY | options))
    rows = read_stats(run)
    assert ["metrics" in row for row in rows] == [False, True, False, True]
    last = rows[3]["metrics"]
    wanted = {"KD-pool", "KD-pool error", "FD-pool", "FD-pool ∞", "recall", "coverage"}
    assert wanted | {"PPL-pool z full", "PPL-pool z end"} <= last.keys()
    assert (last["generated images"], last["real images"]) == (160, 160)
    assert set(last["classes"]) <= set("0123456789")
    assert {"KD-pool", "recall", "coverage", "FD-pool"} <= last["classes"]["7"].keys()
    events = EventAccumulator(str(run))
    events.Reload()
    values = [event.value for event in events.Scalars("metrics/KD-pool")]
    assert values == pytest.approx([rows[i]["metrics"]["KD-pool"] for i in (1, 3)])
    value = events.Scalars("metrics/KD-pool/7")[-1].value
    assert value == pytest.approx(last["classes"]["7"]["KD-pool"])
    page = build_report(run)
    assert "Quality at 0.64 kimg, 160 generated images and 160 real images" in page
    assert "<h2>Each class</h2>" in page
    assert len(list((tmp_path / "cache/gankern/features").iterdir())) == 1
    with pytest.raises(ValueError, match="must be efficientnet-lite0 or a file, got 'none'"):
        train(make_config(**TINY | options | {"metrics_extractor": "none"}))
    assert len(list((tmp_path / "r").iterdir())) == 1
