"""The gallery: what counts as a finished run, the score, and the pictures of styles and growth."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gallery

from gankern import models
from gankern.metrics.digits_classifier import DigitsClassifier
from gankern.training import load_generator, make_config, train
from gankern.training.run import read_config

TINY = {
    "channel_base": 64, "channel_max": 8, "z_dim": 8, "w_dim": 8, "batch": 8, "kimg": 0.032,
    "tick_kimg": 0.008, "sample_ticks": 1, "checkpoint_ticks": 2, "grid": 2,
}  # fmt: skip


class Sees(nn.Module):
    """A classifier that finds the classes in turn, each with the same confidence."""

    def __init__(self, confident, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.scale, self.classes = (20.0 if confident else 0.1), classes

    def forward(self, x):
        return self.scale * torch.eye(10)[torch.arange(len(x)) % self.classes]


def test_score_is_confidence_times_evenness():
    G = gallery.untrained(config("vanilla", conditional=False))
    for confident, classes, score in ((True, 10, 1.0), (True, 1, 0.1), (False, 10, 0.0)):
        row = gallery.score(DigitsClassifier(Sees(confident, classes)), G)
        assert row["score"] == pytest.approx(score, abs=1e-3)
        assert "labels followed" not in row


def config(model, **values):
    made = make_config(model=model, **values)
    made.resolution, made.channels, made.num_classes = (28, 28), 1, 10
    return made


def test_untrained_generator_is_the_one_that_training_starts_with(tmp_path):
    run = train(make_config(model="vanilla", **TINY | {"g_lr": 0.0}, out=str(tmp_path)))
    trained, start = load_generator(run)[0], gallery.untrained(read_config(run))
    for a, b in zip(trained.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert gallery.finished_run(tmp_path) == run
    text = (run / "config.json").read_text().replace('"kimg": 0.032', '"kimg": 9.0')
    (run / "config.json").write_text(text)
    assert gallery.finished_run(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "own", "pictures"),
    [
        ("stylegan2", {}, ["stylegan2-mixing.png", "stylegan2-truncation.png"]),
        ("pggan", {"fade_kimg": 0.008, "stable_kimg": 0.008}, ["pggan-level0.png"]),
    ],
)
def test_pictures_of_a_model(name, own, pictures, tmp_path):
    run = train(make_config(model=name, **TINY | own, out=str(tmp_path / "runs")))
    lines = gallery.extras(name, run, load_generator(run)[0], tmp_path)
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in "\n".join(lines)


def test_page_of_a_run_that_the_command_trained(tmp_path, monkeypatch):
    real, started = gallery.train_command, []

    def shortened(name, folder):
        started.append(real(name, folder))
        sizes = TINY | {"device": "cpu"}
        return started[-1] + [f"--{k.replace('_', '-')}={v}" for k, v in sizes.items()]

    monkeypatch.setattr(gallery, "train_command", shortened)
    monkeypatch.setattr(gallery, "MODELS", {"vanilla": "Fully connected."})
    monkeypatch.setattr(gallery, "train_classifier", lambda: DigitsClassifier(Sees(True, 10)))
    options = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "docs")]
    assert gallery.main(options) == 1  # this classifier finds no difference
    page = (tmp_path / "docs/gallery.md").read_text()
    seconds = int((tmp_path / "runs/vanilla/seconds").read_text())
    assert f"| vanilla | 0.032 | {seconds / 60:.1f} | 1.00 | 1.00 | 100% | 1.00 | - |" in page
    assert "Fully connected. `gankern train --preset vanilla`" in page
    assert seconds > 0
    for picture in ("vanilla.png", "vanilla-loss.png"):
        assert (tmp_path / "docs/gallery" / picture).read_bytes().startswith(b"\x89PNG")
    assert gallery.main([*options, "--finished"]) == 1
    (command,) = started  # not again
    assert command[1:] == [
        "-m", "gankern", "train", "--preset", "vanilla", "--out", str(tmp_path / "runs/vanilla")
    ]  # fmt: skip


def test_every_entry_is_a_preset():
    assert set(gallery.MODELS) <= set(models.PRESETS)
    assert len(gallery.MODELS) == 9
