"""`gankern generate`, the latents behind it, and the judge of generated digits."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageSequence
from safetensors.numpy import save_file
from torch import nn

from gankern import models
from gankern.cli import main
from gankern.data import DataError, open_dataset
from gankern.data.latents import (
    closed_walk,
    interpolation,
    render,
    seed_classes,
    seed_latents,
    slerp,
)
from gankern.data.video import ffmpeg_path, save_animation
from gankern.metrics.digits_classifier import (
    DigitsClassifier,
    as_digits,
    split_digits,
    train_classifier,
)
from gankern.training import checkpoint, make_config
from gankern.training.load import seed_vectors
from gankern.training.run import write_config


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of an untrained generator of digits."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = make_config(width=8, d_width=8, z_dim=16)
    config.resolution, config.channels = (28, 28), 1
    torch.manual_seed(0)
    G, _ = models.build(config)
    for parameter in G.parameters():
        parameter.data.mul_(3)  # untrained weights give nearly one gray; these give contrast
    write_config(folder, config)
    checkpoint.save(folder, 1000, config, {"G_ema": G}, {})
    return folder


def gankern(*args) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def benchmark():
    path = Path(__file__).parents[1] / "benchmarks/digits_quality.py"
    spec = importlib.util.spec_from_file_location("digits_quality", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Latents


def test_a_seed_gives_its_latent_alone():
    z = seed_latents(range(2000), 100)
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    torch.testing.assert_close(seed_latents([7], 100)[0], z[7], rtol=0, atol=0)
    classes = seed_classes(range(2000), 10)
    assert torch.bincount(classes).min() > 150
    assert seed_classes([7], 10)[0] == classes[7]


def test_slerp():
    a, b = seed_latents([0, 1], 512).double()
    t = torch.linspace(0, 1, 5)
    path = slerp(a, b, t)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    unit = slerp(a / a.norm(), b / b.norm(), t)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5).double())
    angles = (unit[1:] * unit[:-1]).sum(1)
    torch.testing.assert_close(angles, angles[:1].expand(4))  # equal steps
    torch.testing.assert_close(slerp(a, 2 * a, t), a * (1 + t.double()[:, None]))
    assert slerp(a, -a, t).isfinite().all()


def test_paths():
    z = seed_latents(range(4), 8)
    strips = interpolation(z, 5)
    assert strips.shape == (2, 5, 8)
    torch.testing.assert_close(strips[:, 0], z[::2])
    torch.testing.assert_close(strips[:, -1], z[1::2])
    walk = closed_walk(z, 6)
    assert walk.shape == (24, 8)
    torch.testing.assert_close(walk[::6], z)
    steps = (walk - walk.roll(1, 0)).norm(dim=1)
    assert steps.max() < 3 * steps.min()  # the way back to the start is no jump


# The command


def test_an_image_does_not_depend_on_its_neighbours(run, tmp_path):
    assert gankern("generate", run, "--seeds", "0-20", "--out", tmp_path / "a", "--no-grid")[0] == 0
    args = ("--seeds", "13,5", "--out", tmp_path / "b", "--batch", 16)
    assert gankern("generate", run, *args)[0] == 0
    for seed in (5, 13):
        alone = (tmp_path / f"b/seed{seed:04}.png").read_bytes()
        assert alone == (tmp_path / f"a/seed{seed:04}.png").read_bytes()
    grid = pixels(tmp_path / "b/grid.png")
    np.testing.assert_array_equal(grid[:, :28], pixels(tmp_path / "a/seed0013.png"))
    assert len({path.read_bytes() for path in (tmp_path / "a").glob("*.png")}) == 21


def test_default_output_lies_in_the_run(run):
    code, output = gankern("generate", run, "--seeds", "0-8")
    assert code == 0
    assert pixels(run / "generated/grid.png").shape == (84, 84)
    assert len(list((run / "generated").glob("seed*.png"))) == 9
    assert "seeds 0-8" in output


def test_one_generator_file_is_enough(run, tmp_path):
    file = shutil.copy(next(run.rglob("G_ema.safetensors")), tmp_path / "mine.safetensors")
    args = ("--seeds", "3", "--no-grid", "--out")
    assert gankern("generate", file, *args, tmp_path / "a")[0] == 0
    assert gankern("generate", run, *args, tmp_path / "b")[0] == 0
    a, b = (tmp_path / name / "seed0003.png" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_interpolation_strips(run, tmp_path):
    args = ("--seeds", "0-3", "--interpolate", "--steps", 6, "--out", tmp_path)
    assert gankern("generate", run, *args)[0] == 0
    strips = pixels(tmp_path / "interpolation.png")
    assert strips.shape == (2 * 28, 6 * 28)
    ends = [strips[y : y + 28, x : x + 28] for y in (0, 28) for x in (0, 140)]
    for seed, end in enumerate(ends):
        expected = pixels(tmp_path / f"seed{seed:04}.png").astype(int)
        assert np.abs(end - expected).max() <= 1  # slerp rounds


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_walk(run, tmp_path, form):
    args = ("--seeds", "0-7", "--walk", "--steps", 4, "--tiles", 2, "--no-images", "--no-grid")
    assert gankern("generate", run, *args, "--format", form, "--out", tmp_path)[0] == 0
    with Image.open(tmp_path / f"walk.{form}") as movie:
        assert movie.n_frames == 8
        assert movie.size == (280, 280)
        assert movie.info["loop"] == 0
        frames = [
            np.asarray(frame.convert("L")).astype(int) for frame in ImageSequence.Iterator(movie)
        ]
    x = render(*_generator(run), batch=16)
    first = ((x[[0, 2, 4, 6]] + 1) * 127.5).round()[:, 0].int().numpy()
    shown = frames[0][::5, ::5].reshape(2, 28, 2, 28).swapaxes(1, 2).reshape(4, 28, 28)
    assert np.abs(shown - first).max() <= 2
    assert any(np.any(frame != frames[0]) for frame in frames[1:])
    assert [path.name for path in tmp_path.glob("*.*") if path.is_file()] == [f"walk.{form}"]


def _generator(run: Path):
    from gankern.training import load_generator

    G, _ = load_generator(run)
    return G, seed_latents(range(8), G.z_dim)


@pytest.mark.skipif(ffmpeg_path() is None, reason="no ffmpeg on this machine")
def test_walk_as_mp4(run, tmp_path):
    args = ("--seeds", "0-3", "--walk", "--steps", 4, "--format", "mp4", "--out", tmp_path)
    assert gankern("generate", run, *args)[0] == 0
    assert (tmp_path / "walk.mp4").read_bytes()[4:8] == b"ftyp"


def test_mp4_without_ffmpeg(run, tmp_path, monkeypatch):
    monkeypatch.setattr("gankern.data.video.ffmpeg_path", lambda: None)
    args = ("--seeds", "0-3", "--walk", "--steps", 2, "--no-images", "--no-grid", "--out")
    code, output = gankern("generate", run, *args, tmp_path / "a", "--format", "mp4")
    assert code == 2
    assert "pip install imageio-ffmpeg" in output
    assert not list(tmp_path.glob("a/*"))
    assert gankern("generate", run, *args, tmp_path / "b")[0] == 0
    assert (tmp_path / "b/walk.gif").is_file()
    with pytest.raises(DataError, match=r"must be \.gif, \.webp or \.mp4"):
        save_animation([Image.new("L", (2, 2))], tmp_path / "x.avi")


class Conditional(nn.Module):
    """Images whose brightness is their class."""

    z_dim, c_dim = 4, 10

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, z, c=None):
        value = c.argmax(1) / 4.5 - 1
        return value[:, None, None, None].expand(-1, 1, 2, 2) + self.anchor


def test_classes(run, tmp_path, monkeypatch):
    config = make_config()
    monkeypatch.setattr("gankern.training.load_generator", lambda run: (Conditional(), config))
    args = ("--seeds", "0-3", "--no-grid", "--out", tmp_path)
    assert gankern("generate", run, *args, "--class", "9")[0] == 0
    assert pixels(tmp_path / "seed0002.png").tolist() == [[255, 255], [255, 255]]
    assert gankern("generate", run, *args)[0] == 0
    drawn = [pixels(tmp_path / f"seed000{i}.png")[0, 0] / 255 * 9 for i in range(4)]
    assert np.allclose(drawn, seed_classes(range(4), 10).numpy(), atol=0.05)
    for wanted, message in (("10", "must be in 0..9"), ("cat", "must be one of 0, 1")):
        code, output = gankern("generate", run, *args, "--class", wanted)
        assert code == 2
        assert message in output


class Vectors(Conditional):
    """Images whose brightness is the first number of their condition."""

    c_dim = 3

    def forward(self, z, c=None):
        return c[:, 0, None, None, None].expand(-1, 1, 2, 2) + self.anchor


@pytest.fixture
def vectors(tmp_path, monkeypatch):
    """A generator whose conditions are vectors, and its data set: label i is (i/8 - 1, 0, 0)."""
    labels = np.zeros((16, 3), np.float32)
    labels[:, 0] = np.arange(16) / 8 - 1
    data = tmp_path / "vectors.safetensors"
    arrays = {"images": np.zeros((16, 1, 4, 4), np.uint8), "labels": labels}
    save_file(arrays, data, {"format": "gankern-dataset-1"})
    config = make_config(data=str(data))
    config.label_dim = 3
    monkeypatch.setattr("gankern.training.load_generator", lambda run: (Vectors(), config))
    return config


def test_vectors_are_drawn_by_the_seeds(run, tmp_path, vectors):
    args = ("--seeds", "0-15", "--out", tmp_path / "a", "--batch", 4, "--arithmetic", "3-1")
    strips = ("--interpolate", "--steps", 3, "--walk", "--tiles", 2, "--format", "gif")
    code, output = gankern("generate", run, *args, *strips)
    assert code == 0, output
    drawn = seed_vectors(vectors, range(16))
    assert drawn.shape == (16, 3)
    assert drawn[:, 0].unique().numel() > 6
    shades = [int(pixels(tmp_path / f"a/seed{i:04}.png")[0, 0]) for i in range(16)]
    assert np.allclose(shades, (drawn[:, 0].numpy() + 1) * 127.5, atol=0.51)
    strip = pixels(tmp_path / "a/interpolation.png")  # a strip has the vector of its first seed
    assert strip.shape == (16, 6)
    assert strip[::2, ::2].tolist() == [[shade] * 3 for shade in shades[::2]]
    with Image.open(tmp_path / "a/walk.gif") as movie:  # so has a walk, here of four seeds
        first = np.asarray(movie.convert("L")).astype(int)
    corners = first[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.abs(corners - shades[::4]).max() <= 2
    assert gankern("generate", run, "--seeds", "9", "--no-grid", "--out", tmp_path / "b")[0] == 0
    assert pixels(tmp_path / "b/seed0009.png")[0, 0] == shades[9]


def test_vectors_that_cannot_be_drawn(run, vectors):
    code, output = gankern("generate", run, "--class", "1")
    assert code == 2
    assert "--class: this generator was trained with vectors, which seeds draw" in output
    vectors.label_dim = 5
    code, output = gankern("generate", run)
    assert code == 2
    assert "labels must be vectors of length 5, as in training, got length 3" in output
    Path(vectors.data).unlink()
    code, output = gankern("generate", run)
    assert code == 2
    assert "conditions are drawn from the run's data set, which cannot be opened: " in output
    assert "vectors.safetensors: no such data set" in output
    assert output.count("\n") == 1
    assert not (run / "generated").exists()


def test_every_option_has_help():
    for name in ("generate", "project"):
        command = main.get_command(None, name)
        assert not [p.name for p in command.params if isinstance(p, click.Option) and not p.help]


def test_errors(run, tmp_path):
    cases = [
        ((tmp_path / "nowhere",), "nowhere"),
        ((run, "--seeds", "a"), "seeds"),
        ((run, "--seeds", "9-3"), "seeds"),
        ((run, "--seeds", "0-99999999"), "at most"),
        ((run, "--seeds", ""), "seeds"),
        ((run, "--class", "3"), "without classes"),
        ((run, "--seeds", "0", "--interpolate"), "two seeds"),
        ((run, "--seeds", "0-3", "--walk", "--tiles", "2"), "needs 8 seeds"),
        ((run, "--device", "tpu"), "--device must be"),
    ]
    for args, message in cases:
        code, output = gankern("generate", *args)
        assert code == 2
        assert message in output
        assert output.count("\n") == 1
    assert not (run / "generated").exists()


def test_a_damaged_generator_is_refused(run, tmp_path):
    file = next(run.rglob("G_ema.safetensors"))
    copy = tmp_path / "g.safetensors"
    copy.write_bytes(file.read_bytes()[:-100])
    code, output = gankern("generate", copy)
    assert code == 2
    assert output.count("\n") == 1


# The judge of digits


def test_classifier_and_judge():
    train_x, train_y, held_x, held_y = split_digits()
    assert (len(train_x), len(held_x)) == (4000, 1000)
    assert torch.bincount(held_y).tolist() == [100] * 10
    assert torch.bincount(train_y).tolist() == [400] * 10
    classifier = train_classifier(epochs=3)
    assert classifier.accuracy >= 0.96
    result = benchmark().judge(classifier, held_x)
    assert result["passed"], result
    assert result["confident"] == pytest.approx(classifier.confident)
    sevens = benchmark().judge(classifier, held_x[held_y == 7])
    assert not sevens["passed"]
    blur = benchmark().judge(classifier, (train_x[:500] + train_x[500:1000]) / 2)
    assert blur["confident"] < result["confident"]
    assert not DigitsClassifier(classifier.net).accuracy >= 0


def test_digits_of_other_sizes_are_brought_to_28():
    x = open_dataset("digits").batch([0, 600])[0]
    padded = open_dataset("digits", 32).batch([0, 600])[0]
    torch.testing.assert_close(as_digits(padded), x)
    torch.testing.assert_close(as_digits(padded.expand(-1, 3, -1, -1)), x)
    large = open_dataset("digits", 64).batch([0, 600])[0]
    assert (as_digits(large) - x).abs().mean() < 0.1


def test_quality_script_fails_an_untrained_run(run, capsys, tmp_path, monkeypatch):
    module = benchmark()
    untrained = DigitsClassifier(train_classifier(epochs=1).net, 0.97, 0.96)
    monkeypatch.setattr(module, "train_classifier", lambda: untrained)
    assert module.main([str(run), "--images", "50", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 50
    assert sum(result["shares"]) == pytest.approx(1)
    assert result["failures"]
    assert module.main([str(run), "--images", "50"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert module.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
