"""Losses, moving average, randomness, configuration, the run folder, and wrong input."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file

from gankern import models
from gankern.cli import COMMANDS, main
from gankern.cli import train as train_command
from gankern.cli.train import as_given
from gankern.data import DataError
from gankern.models import dcgan
from gankern.training import (
    TrainConfig,
    TrainError,
    checkpoint,
    load_generator,
    make_config,
    penalties,
    train,
)
from gankern.training.ema import update_ema
from gankern.training.losses import LOSSES
from gankern.training.memory import memory_table
from gankern.training.noise import derive_seed, latents
from gankern.training.run import read_config, read_stats
from gankern.training.schedule import Schedule

TINY = {
    "width": 2,
    "d_width": 2,
    "z_dim": 5,
    "batch": 16,
    "kimg": 0.096,
    "tick_kimg": 0.032,
    "sample_ticks": 2,
    "checkpoint_ticks": 1,
    "grid": 2,
}


def tiny_args(**values):
    return [
        text
        for name, value in (TINY | values).items()
        for text in ("--" + name.replace("_", "-"), str(value))
    ]


# Tests that share a fixture.
pytestmark = pytest.mark.xdist_group("training")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of six steps in three ticks; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("runs")
    return train(make_config(**TINY, out=str(out)))


@pytest.fixture
def run(finished_run, tmp_path):
    import shutil

    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def fail(capsys, *args):
    """Runs the command, requires exit code 2 and one line on the error output; returns it."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, args)))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("gankern: "), err
    assert err.count("\n") == 1, err
    return err


# The moving average.


def test_ema_halves_the_distance_in_a_half_life():
    G = dcgan.Generator(5, (16, 16), 1, width=2)
    G_ema = dcgan.Generator(5, (16, 16), 1, width=2)
    start = {name: value.clone() for name, value in G_ema.state_dict().items()}
    for i in range(10):
        update_ema(G_ema, G, batch=100, cur_nimg=10**6 + i, half_life=1000, rampup=0.05)
    for name, value in G_ema.state_dict().items():
        torch.testing.assert_close(value, (start[name] + G.state_dict()[name]) / 2)
    update_ema(G_ema, G, batch=100, cur_nimg=0, half_life=1000, rampup=0.05)
    assert torch.equal(G_ema.project.weight, G.project.weight)


def test_randomness_is_a_function_of_seed_stream_and_counter():
    seeds = {
        derive_seed(seed, stream, nimg, rank)
        for seed in range(4)
        for stream in ("step", "noise_D", "noise_G")
        for nimg in range(0, 640, 64)
        for rank in range(3)
    }
    assert len(seeds) == 4 * 3 * 10 * 3
    z = latents(100, 64, derive_seed(0, "grid"))
    assert torch.equal(z, latents(100, 64, derive_seed(0, "grid")))
    assert z.std().item() == pytest.approx(1, abs=0.03)


# Configuration.


def test_configuration_survives_json():
    config = make_config("paper", data="x", seed=3)
    config.resolution, config.channels = (64, 64), 3
    assert TrainConfig.from_json(config.to_json(), "here") == config


def test_options_override_the_preset():
    config = make_config("paper", batch=32)
    assert (config.width, config.batch) == (128, 32)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"g_lr": float("inf")}, "--g-lr must be finite, got inf"),
        ({"beta1": 1.5}, "--beta1 must be at most 0.9999, got 1.5"),
        ({"kimg": float("nan")}, "--kimg must be at least 0.001, got nan"),
        ({"model": "sg9"}, "--model must be one of dcgan, .*, got 'sg9'"),
        ({"preset": "none"}, "--preset must be one of digits, .*, got 'none'"),
    ],
)
def test_values_out_of_range(values, text):
    with pytest.raises(TrainError, match=re.escape(text).replace(r"\.\*", ".*")):
        make_config(**values)


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for f, kind in TrainConfig.options():
        assert "--" + f.name.replace("_", "-") in text
        default = str(f.default).lower() if kind is bool else str(f.default) or "none"
        assert f"default: {default}]" in text
        assert f.metadata["help"] in text
        assert f"[{f.metadata['unit']}; default: {default}]" in text or not f.metadata["unit"]
    units = {f.name: f.metadata["unit"] for f, _ in TrainConfig.options()}
    for name, unit in (("width", "channels"), ("z_dim", "numbers"), ("mapping_layers", "layers")):
        assert units[name] == unit
    for name in ("preset NAME", "resume RUN", "dry-run"):
        assert re.search(rf"--{name} [^\[]+\[default: ", text)


def options_of(command, name):
    """Every option of a command and of those below it."""
    for below, inner in getattr(command, "commands", {}).items():
        yield from options_of(inner, f"{name} {below}")
    for option in command.params:
        if isinstance(option, click.Option):
            yield f"{name} {option.opts[0]}", option


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bench"])
def test_every_option_says_what_it_is_and_its_default(name):
    command = main.get_command(click.Context(main), name)
    for text, option in options_of(command, name):
        assert option.help, text
        told = option.show_default or "default: " in option.help or option.required
        assert told or (option.is_flag and not option.secondary_opts), text


def test_presets_in_the_help_can_be_typed():
    main_command = train_command.command
    for values in models.PRESETS.values():
        words = [word for pair in values.items() for word in as_given(*pair).split()]
        parsed = main_command.make_context("train", words).params
        assert {name: parsed[name] for name in values} == values


def test_dry_run_writes_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--dry-run", "--out", str(tmp_path / "runs"), "--z-dim", "50"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert '"z_dim": 50' in text
    assert re.search(r"project.weight +6272x60 +376,320", text)
    assert re.search(r"activations of 16 images, the larger pass +\d+\.\d MiB", text)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--model", "pggan", "--fade-kimg", "1", "--grow-from", "64"], "--grow-from must be at"),
        (["--device", "cpu", "--cuda-graphs"], "--cuda-graphs cannot be used: the device is cpu"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--batch-gpu", "5"], "--batch-gpu must divide a process's share of a batch, 16, got 5"),
        (["--held-out", "5000"], "images held out must be fewer than 5000"),
        (["--metrics-ticks", "1", "--metrics-extractor", "x.pt"], "got 'x.pt': no such file"),
    ],
)
def test_dry_run_refuses_what_training_does(args, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dry in (["--dry-run"], []):
        assert text in fail(capsys, "train", *dry, *args)
    assert not list(tmp_path.iterdir())


def test_dry_run_refuses_a_batch_that_processes_cannot_share(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    text = fail(capsys, "train", "--dry-run", "--device", "cpu")
    assert "--batch must be a multiple of 3 processes, got 16" in text


def test_memory_table_counts_weights_and_what_is_saved():
    config = make_config(model="vanilla", conditional=False, batch=8, g_optimizer="rmsprop")
    config.resolution, config.channels = (4, 4), 1
    rows = dict(memory_table(config))
    g, d = (sum(p.numel() for p in net.parameters()) for net in models.build(config))
    assert rows["weights of G, D and the average of G"] == 4 * (2 * g + d)
    assert rows["gradients"] == 4 * (g + d)
    assert rows["optimizers"] == 4 * (g + 2 * d)
    activations = rows["activations of 8 images, the larger pass"]
    assert 8 * 4 * (256 + 512 + 1024) <= activations <= 8 * 4 * 20_000
    assert rows["together"] == sum(rows.values()) / 2


def activations(world=1, **values):
    """The line of the memory table, and its bytes."""
    config = make_config(z_dim=8, channel_base=64, channel_max=8, mbstd_group=1, **values)
    config.resolution, config.channels = (16, 16), 1
    return memory_table(config, world)[3]


def test_memory_table_takes_the_largest_batch():
    what, size = activations(batch=8, batch_schedule="0:4,50:32,60:16,9999:64")
    assert what == "activations of 32 images, the larger pass"
    assert size == pytest.approx(activations(batch=32)[1])
    assert activations(batch=8, batch_schedule="50:32", batch_gpu=4)[0].split()[2] == "4"
    assert activations(world=2, batch=8, batch_schedule="50:32")[0].split()[2] == "16"


@pytest.mark.parametrize("model", ["pggan", "stylegan"])
def test_memory_table_takes_the_level_that_needs_most(model):
    grow = {"model": model, "fade_kimg": 10.0, "stable_kimg": 10.0, "w_dim": 8, "batch": 2}
    small, _ = activations(**grow, level_batch="4:512,8:8,16:2")
    assert small == "activations of 512 images of 4x4, the larger pass"
    large, size = activations(**grow, level_batch="4:4,8:2")
    assert large == "activations of 2 images of 16x16, the larger pass"
    early, least = activations(**grow, level_batch="4:4,8:2", kimg=20.0)  # 8x8 begins to fade in
    assert early == "activations of 2 images of 8x8, the larger pass"
    assert least < size


def test_stages_of_a_schedule():
    grow = {"model": "pggan", "fade_kimg": 2.0, "stable_kimg": 1.0}
    config = make_config(**grow, batch_schedule="4.5:32", level_batch="16:8", kimg=100.0)
    stages = Schedule(config, [4, 8, 16]).stages()
    assert [(math.ceil(growth), growth % 1 > 0, batch) for growth, batch in stages] == [
        (0, False, 16), (1, True, 16), (1, False, 16), (2, True, 8), (2, False, 8),
    ]  # fmt: skip
    assert Schedule(make_config(batch_schedule="1:2"), []).stages() == [(0.0, 16), (0.0, 2)]


# What a run leaves behind.


def test_run_folder(finished_run):
    assert finished_run.name == "00000-dcgan-digits"
    config = read_config(finished_run)
    assert (config.resolution, config.channels, config.num_classes) == ((28, 28), 1, 10)
    rows = read_stats(finished_run)
    assert [row["kimg"] for row in rows] == [0.032, 0.064, 0.096]
    assert [row["step"] for row in rows] == [2, 4, 6]
    names = {"loss_D", "loss_G", "logit_real", "logit_fake", "epoch", "img_per_s", "time_s"}
    assert names < rows[0].keys()
    samples = sorted(path.name for path in (finished_run / "samples").iterdir())
    assert samples == ["000000000000.png", "000000000064.png", "000000000096.png"]
    for name in ("samples.png", "loss.png"):
        assert (finished_run / name).read_bytes().startswith(b"\x89PNG")
    folders = [path.name for path in checkpoint.list_checkpoints(finished_run)]
    assert folders == ["000000000064", "000000000096"]
    files = sorted(path.name for path in (finished_run / "checkpoints" / folders[1]).iterdir())
    names = ["D", "G", "G_ema", "optimizer_D", "optimizer_G"]
    assert files == [f"{name}.safetensors" for name in names] + ["state.json"]
    assert not list(finished_run.rglob(".*"))


def test_events_hold_the_statistics(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run))
    events.Reload()
    rows = read_stats(finished_run)
    for name in ("loss_D", "logit_fake", "img_per_s"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([row[name] for row in rows])
    assert [event.step for event in events.Images("samples")] == [0, 64, 96]


def test_training_moves_every_weight(finished_run):
    a, b = checkpoint.list_checkpoints(finished_run)
    for name in ("G", "D", "G_ema"):
        before, after = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
        assert all(not torch.equal(before[key], after[key]) for key in before)


def test_same_seed_same_bits(finished_run, tmp_path):
    again = train(make_config(**TINY, out=str(tmp_path)))
    name = "checkpoints/000000000096/G_ema.safetensors"
    a, b = load_file(finished_run / name), load_file(again / name)
    assert all(torch.equal(a[key], b[key]) for key in a)
    other = load_file(train(make_config(**TINY, out=str(tmp_path), seed=1)) / name)
    assert not torch.equal(a["project.weight"], other["project.weight"])


def test_load_generator(finished_run, tmp_path):
    file = finished_run / "checkpoints" / "000000000096" / "G_ema.safetensors"
    moved = tmp_path / "mine.safetensors"
    moved.write_bytes(file.read_bytes())
    z, c = torch.randn(3, 5), torch.eye(10)[:3]
    images = [
        load_generator(source)[0](z, c) for source in (finished_run, file.parent, file, moved)
    ]
    assert all(torch.equal(image, images[0]) for image in images)
    assert load_generator(moved)[1] == read_config(finished_run)


@pytest.mark.parametrize("values", [{"model": "vanilla"}, {"d_norm": "none"}, {"loss": "minimax"}])
def test_other_forms_train(values, tmp_path):
    folder = train(make_config(**TINY | values, out=str(tmp_path)))
    assert len(read_stats(folder)) == 3


@pytest.mark.parametrize(
    ("net", "penalty", "values"),
    [
        ("D", "r1", {"r1_gamma": 1.0, "d_reg_interval": 2}),
        ("G", "path_length", {"pl_weight": 1.0, "g_reg_interval": 2}),
    ],
)
def test_lazy_penalties_that_are_not_finite_are_counted(
    net, penalty, values, tmp_path, monkeypatch
):
    real, calls = getattr(penalties, penalty), []

    def first_is_infinite(*args, **kwargs):
        calls.append(0)
        value = real(*args, **kwargs)
        factor = math.inf if len(calls) == 1 else 1.0
        return value * factor if penalty == "r1" else (value[0] * factor, value[1])

    monkeypatch.setattr(penalties, penalty, first_is_infinite)
    size = {"model": "stylegan2", "w_dim": 4, "mapping_layers": 1, "data": "digits:8"}
    size |= {"channel_base": 32, "channel_max": 4, "kimg": 0.064, "tick_kimg": 0.064}
    (row,) = read_stats(train(make_config(**TINY | size | values, out=str(tmp_path))))
    assert len(calls) == 2
    assert row[f"skipped_{net}"] == pytest.approx(1 / 6)  # of four plain steps and two penalties
    assert row[f"skipped_{'DG'.replace(net, '')}"] == 0
    assert row[penalty] > 0


# Wrong input: one line, exit code 2, nothing half written.


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--data", "missing.safetensors"], "missing.safetensors: no such data set"),
        (["--data", "digits:15"], "resolution must be (h * 2^k) x (w * 2^k) with h, w >= 4 and"),
        (["--preset", "none"], "--preset must be one of"),
        (["--model", "none"], "'none' is not one of 'dcgan', 'pggan', "),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--batch", "many"], "'many' is not a valid integer"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--resume", "nowhere"], "nowhere: no such run folder"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_options(args, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text in fail(capsys, "train", *args)
    assert not list(tmp_path.iterdir())


def test_error_has_no_traceback_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "gankern", "train", "--batch", "0"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "gankern: --batch must be at least 1, got 0\n"


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--z-dim", "6"], "--z-dim must be 5, as .* was started with, got 6"),
        (["--preset", "paper"], "--preset cannot be given with --resume"),
    ],
)
def test_resume_keeps_the_options(run, args, text, capsys):
    before = snapshot(run)
    assert re.search(text, fail(capsys, "train", "--resume", run, *args))
    assert snapshot(run) == before


def test_resume_with_weights_of_another_latent_size(run, capsys):
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"z_dim": 5', '"z_dim": 6'))
    before = snapshot(run)
    line = fail(capsys, "train", "--resume", run)
    assert re.search(r"G.safetensors: project.weight must be \[196, 16\], got \[196, 15\]", line)
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 99, "resolution": [1, 1]}', "\0" * 9]
)
def test_resume_with_a_damaged_configuration(run, text, capsys):
    (run / "config.json").write_text(text)
    assert "config.json: not a run's configuration" in fail(capsys, "train", "--resume", run)


def test_resume_of_something_else(tmp_path, capsys):
    assert "not a run folder" in fail(capsys, "train", "--resume", tmp_path)
    file = tmp_path / "weights.pt"
    torch.save({"x": torch.zeros(1)}, file)
    assert "not a run folder" in fail(capsys, "train", "--resume", file)


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "one bit":
        data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    elif how == "empty":
        data = b""
    path.unlink()
    if how != "missing":
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "one bit", "empty", "missing"])
@pytest.mark.parametrize("name", ["G.safetensors", "optimizer_D.safetensors", "state.json"])
def test_damaged_checkpoint_falls_back_to_the_one_before(finished_run, run, name, how, capsys):
    damage(run / "checkpoints" / "000000000096" / name, how)
    train(read_config(run), run)
    line = f"warning: {run}/checkpoints/000000000096/{name}"
    assert line in capsys.readouterr().err
    file = "checkpoints/000000000096/G_ema.safetensors"
    assert (run / file).read_bytes() == (finished_run / file).read_bytes()
    assert [row["kimg"] for row in read_stats(run)] == [0.032, 0.064, 0.096]


def test_all_checkpoints_damaged(run, capsys):
    for folder in checkpoint.list_checkpoints(run):
        damage(folder / "D.safetensors", "one bit")
    before = snapshot(run)
    line = fail(capsys, "train", "--resume", run)
    assert "no checkpoint is undamaged" in line
    assert "000000000096/D.safetensors: damaged" in line
    assert snapshot(run) == before


def test_pickle_where_safetensors_is_expected(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for legacy in (False, True):
        file = tmp_path / "G.safetensors"
        torch.save(Evil(), file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(TrainError, match="must be a safetensors file, got a pickle"):
            load_generator(file)
    for text in (b"", b"x", b"\xff" * 100):
        file.write_bytes(text)
        with pytest.raises(TrainError, match="not a safetensors file"):
            load_generator(file)
    assert not (tmp_path / "executed").exists()


def test_load_generator_of_a_run_without_checkpoint(tmp_path):
    with pytest.raises(TrainError, match="No such file"):
        load_generator(tmp_path / "none.safetensors")
    (tmp_path / "config.json").write_text(make_config().to_json())
    with pytest.raises(TrainError, match="no checkpoint yet"):
        load_generator(tmp_path)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", [1, 3, 6])
def test_disk_full_at_a_checkpoint(call, tmp_path, capsys, monkeypatch):
    calls = []
    write = checkpoint._write_durably

    def write_until_full(path, data):
        calls.append(path)
        write(path, data[: len(data) // 2] if len(calls) == 6 + call else data)
        if len(calls) == 6 + call:  # somewhere in the second checkpoint
            full_disk()

    monkeypatch.setattr(checkpoint, "_write_durably", write_until_full)
    with pytest.raises(SystemExit) as stop:
        main(["train", *tiny_args(out=tmp_path)])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"gankern: .*checkpoints/000000000064: No space left on device", line)
    (folder,) = tmp_path.iterdir()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["000000000032"]
    load_generator(folder)


def test_disk_full_at_statistics_leaves_whole_lines(tmp_path, monkeypatch):
    from gankern.training.run import RunLog

    with RunLog(tmp_path, make_config(), {}) as log:
        log.write_stats({"kimg": 1}, 1)
        file = log._stats

        class Full:
            name, seek, truncate, close = file.name, file.seek, file.truncate, file.close
            writes = 0

            def write(self, data):
                self.writes += 1
                return file.write(data[:3]) if self.writes == 1 else full_disk()

        log._stats = Full()
        with pytest.raises(OSError, match=r"No space left on device.*stats.jsonl"):
            log.write_stats({"kimg": 2}, 2)
    assert (tmp_path / "stats.jsonl").read_text() == json.dumps({"kimg": 1}) + "\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_disk_really_full(tmp_path):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path])
    if mount.returncode:
        pytest.skip("mount is not permitted here")
    try:
        args = tiny_args(out=tmp_path, kimg=5)
        command = [sys.executable, "-m", "gankern", "train", *args]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].endswith("No space left on device")
        (folder,) = tmp_path.iterdir()
        assert not list(folder.rglob(".*"))
        checkpoint.load_checkpoint(folder)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_nan_stops_before_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "minimax", LOSSES["minimax"]._replace(g=lambda x: x.sum() / 0))
    with pytest.raises(TrainError, match=r"loss_[DG] is .* at 0.032 kimg: training has diverged"):
        train(make_config(**TINY, loss="minimax", out=str(tmp_path)))
    assert not checkpoint.list_checkpoints(next(tmp_path.iterdir()))


def test_data_errors_are_told_before_a_folder_is_made(tmp_path):
    with pytest.raises(DataError):
        train(make_config(data="nowhere", out=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()
