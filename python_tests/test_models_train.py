"""Every model trains: in seconds, its loss is finite, its weights move, and it resumes exactly."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import gankern, noise
from safetensors.numpy import save_file
from safetensors.torch import load_file

from gankern import models
from gankern.data import DataError
from gankern.training import checkpoint, load_generator, make_config, train
from gankern.training.run import read_config, read_stats
from gankern.training.stats import WALL_CLOCK

# The presets of digits with all else that matters, on nets of a few channels.
TINY = {
    "data": "digits:16", "width": 2, "d_width": 2, "z_dim": 6, "w_dim": 8, "mapping_layers": 2,
    "channel_base": 64, "channel_max": 8, "batch": 8, "kimg": 0.096, "tick_kimg": 0.032,
    "sample_ticks": 3, "checkpoint_ticks": 1, "grid": 2,
}  # fmt: skip
# Level 1 fades in from 16 to 48 images, level 2 from 64 to 96: a run that stops at 32 is amid that.
GROW = {"fade_kimg": 0.032, "stable_kimg": 0.016}
OWN = {
    "sagan": {"attention": 8},
    "pggan": GROW | {"level_batch": "8:16", "level_lr": "8:1e-3"},
    "stylegan": GROW,
    "stylegan2": {"d_reg_interval": 2, "g_reg_interval": 3},
    "wgan": {"form": "conv"},
}
TRAINED = [
    "vanilla",
    "cgan",
    "cgan-fc",
    "dcgan",
    "wgan",
    "wgan-gp",
    "sagan",
    "pggan",
    "stylegan",
    "stylegan2",
]

ALL_TOGETHER = {
    "model": "stylegan2", "r1_gamma": 1.0, "r2_gamma": 0.5, "gp_weight": 0.1, "drift": 1e-3,
    "d_reg_interval": 2, "pl_weight": 2.0, "g_reg_interval": 2, "style_mixing": 0.9,
    "augment": "ada", "ada_p": 0.3, "ada_kimg": 0.5, "mirror": True, "batch_gpu": 4,
    "clip_grad": 1.0, "lr_rampup_kimg": 0.03, "n_critic": 2,
    "batch_schedule": "0.03:16", "channels_last": True, "num_fp16_res": 1, "precision": "bf16",
}  # fmt: skip
COMBINATIONS = {
    "all together": ALL_TOGETHER,
    "fp16": {"precision": "fp16", "loss": "relativistic", "r1_gamma": 0.1},
    "bf16": {"precision": "bf16", "augment": "diffaugment", "channels_last": True},
    "fp16 levels": {"model": "stylegan2", "precision": "fp16", "num_fp16_res": 1},
    "rmsprop": {"g_optimizer": "rmsprop", "d_optimizer": "rmsprop", "augment": "ada"},
}


def run_of(values, out, kimg=0.064):
    return train(make_config(**TINY | values | {"kimg": kimg}, out=str(out)))


def state_of(run: Path):
    saved = checkpoint.load_checkpoint(run)
    rows = [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_stats(run)]
    return saved.tensors, saved.state["engine"], rows


def assert_resumes_exactly(values, tmp_path):
    """Trains at once, and in two parts; returns the whole run."""
    kimg = 0.112 if "fade_kimg" in values else 0.064  # until all levels are there
    whole = run_of(values, tmp_path / "whole", kimg)
    part = run_of(values, tmp_path / "part", kimg=0.032)
    if "fade_kimg" in values:
        assert 0 < state_of(part)[0]["D"]["growth"].item() < 1
    config = read_config(part)
    config.kimg = kimg
    train(config, part)
    (a, engine_a, rows_a), (b, engine_b, rows_b) = state_of(whole), state_of(part)
    assert rows_a == rows_b
    assert engine_a == engine_b
    for name in a:
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name]), name
    return whole


@pytest.mark.parametrize("preset", TRAINED)
def test_trains_and_resumes(preset, tmp_path):
    values = {k: v for k, v in models.PRESETS[preset].items() if k not in TINY}
    whole = assert_resumes_exactly(values | OWN.get(preset, {}), tmp_path)
    first, last = checkpoint.list_checkpoints(whole)
    for name in ("G", "D"):
        before, after = (load_file(folder / f"{name}.safetensors") for folder in (first, last))
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        still = {key for key in before if key not in moved and before[key].is_floating_point()}
        assert moved
        assert not [k for k in still if k.endswith(("conv.weight", "weight")) and "rgbs" not in k]
    for row in read_stats(whole):
        assert row["skipped_G"] == row["skipped_D"] == 0
        assert all(math.isfinite(row[name]) for name in ("loss_D", "loss_G"))


@pytest.mark.parametrize("values", COMBINATIONS.values(), ids=COMBINATIONS)
def test_options_work_together(values, tmp_path):
    ada = values.get("augment") == "ada"  # its gradient is not the same to the bit on a GPU
    if ada and torch.cuda.is_available():
        run_of(values, tmp_path / "cuda")
    whole = assert_resumes_exactly(values | ({"device": "cpu"} if ada else {}), tmp_path)
    if values is ALL_TOGETHER:
        seen = {name for row in read_stats(whole) for name in row}
        assert {"r1", "r2", "gp", "path_length", "pl_mean", "ada_p"} <= seen


@pytest.mark.parametrize("preset", models.PRESETS)
def test_presets_build(preset):
    config = make_config(preset)
    small = config.data.startswith("digits") and "1024" not in preset
    config.resolution, config.channels = ((28, 28), 1) if small else ((64, 64), 3)
    config.num_classes = 10
    with torch.device("meta"):
        G, D = models.build(config)
    assert G.z_dim == config.z_dim
    assert sum(p.numel() for p in D.parameters()) > 0


def test_growing_run_shows_its_levels(tmp_path):
    values = models.PRESETS["pggan"] | OWN["pggan"]
    run = run_of({k: v for k, v in values.items() if k not in TINY}, tmp_path, 0.112)
    growth = [row["growth"] for row in read_stats(run)]
    assert growth == sorted(growth)
    assert growth[-1] == 2
    from PIL import Image

    assert Image.open(run / "samples.png").size == (32, 32)  # two by two, full size


def test_compiled_passes_train_as_plain_ones_do(tmp_path, monkeypatch):
    calls = []
    real = torch.compile

    def compile_eagerly(net):
        calls.append(net)
        return real(net, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    values = {"d_dropout": 0.0, "r1_gamma": 1.0, "d_norm": "none", "d_reg_interval": 2}
    plain = run_of(values, tmp_path / "plain", kimg=0.032)
    compiled = run_of(values | {"compile": True}, tmp_path / "compiled", kimg=0.032)
    assert len(calls) == 2
    for a, b in zip(read_stats(plain), read_stats(compiled), strict=True):
        for name in ("loss_D", "loss_G", "r1"):
            assert b[name] == pytest.approx(a[name], abs=1e-4)


def vectors_file(path, n=40, value=0.5, size=(16, 16)):
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 256, (n, 3, *size), dtype=np.uint8),
        "labels": np.full((n, 3), value, np.float32),
    }
    save_file(arrays, path, {"format": "gankern-dataset-1"})
    return str(path)


def test_vectors_from_a_csv_file_to_images(tmp_path):
    packed, runs, table = (tmp_path / name for name in ("data", "runs", "vectors.csv"))
    for i in range(8):
        noise(tmp_path / f"src/{i}.png", (16, 16), i)
    table.write_text("".join(f"{i}.png,{i / 4},{-i},1\n" for i in range(8)))
    code, output = gankern(
        "data", "pack", tmp_path / "src", packed, "--size=16", "--vectors", table
    )
    assert (code, "labels are vectors of 3 numbers" in output) == (0, True)
    assert "vectors: of 3 numbers" in gankern("data", "info", packed)[1]
    assert gankern("data", "show", packed, tmp_path / "grid.png")[0] == 0
    options = TINY | {"data": packed, "model": "wgan", "form": "fc", "kimg": 0.032, "out": runs}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert gankern("train", *flags)[0] == 0
    (run,) = runs.iterdir()
    config = read_config(run)
    assert (config.c_dim, config.label_dim, config.num_classes) == (3, 3, 0)
    assert gankern("generate", run, "--out", tmp_path / "images")[0] == 0
    assert list((tmp_path / "images").rglob("*.png"))


@pytest.mark.parametrize("model", ["dcgan", "vanilla", "stylegan2"])
def test_conditions_that_are_vectors(model, tmp_path):
    data = vectors_file(tmp_path / "vectors.safetensors")
    run = run_of({"model": model, "data": data}, tmp_path / "runs", kimg=0.032)
    config = read_config(run)
    assert (config.c_dim, config.label_dim, config.num_classes) == (3, 3, 0)
    assert load_generator(run)[0](torch.zeros(2, 6), torch.zeros(2, 3)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    "values",
    [{"d_condition": "concat"}, {"model": "wgan", "attention": 8}, {"model": "stylegan2"}],
    ids=str,
)
def test_images_that_are_not_square(values, tmp_path):
    data = vectors_file(tmp_path / "vectors.safetensors", size=(24, 16))
    run = run_of(values | {"data": data}, tmp_path / "runs", kimg=0.032)
    assert load_generator(run)[0](torch.zeros(2, 6), torch.zeros(2, 3)).shape == (2, 3, 24, 16)


def test_vectors_must_be_finite(tmp_path):
    data = vectors_file(tmp_path / "vectors.safetensors", value=np.nan)
    with pytest.raises(DataError, match="its labels do not fit its images"):
        run_of({"data": data}, tmp_path / "runs")
