"""`gankern metrics`: what it prints and writes, and wrong input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gankern.cli import main
from gankern.data import open_dataset
from gankern.metrics import digits_classifier
from gankern.training import make_config, train


class Pool(nn.Module):
    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x.float().mean(1, keepdim=True), 4).flatten(1)


# Tests that share a fixture.
pytestmark = pytest.mark.xdist_group("metrics_cli")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "pool.pt"
    torch.jit.script(Pool()).save(str(path))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tiny = {"width": 2, "d_width": 2, "z_dim": 5, "kimg": 0.016, "tick_kimg": 0.016, "grid": 2}
    return train(make_config(**tiny, out=str(tmp_path_factory.mktemp("runs"))))


def call(capsys, *args):
    """Runs the command; its output and exit code."""
    with pytest.raises(SystemExit) as stop:
        main(["metrics", *map(str, args)])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_run_beside_its_data(run, network, tmp_path, capsys):
    args = [run, "--extractor", network, "--images", 100, "--real", 200, "--cache", tmp_path / "c"]
    picture = tmp_path / "near.png"
    code, out, _ = call(capsys, *args, "--neighbours", picture, "--paths")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "100 generated and 200 real images, features of pool"
    assert lines[1].startswith("few images")
    assert lines[2].split()[0] == "KD-pool"
    assert [line.split()[0] for line in lines[3:5]] == ["recall", "coverage"]
    assert any(line.startswith("  FD-pool ") and "n = 100" in line for line in lines)
    assert "FID" not in out
    assert "PPL-pool z full" in out
    assert "slerp in z" in out
    assert Image.open(picture).size[0] > 8 * 28
    assert len(list((tmp_path / "c").iterdir())) == 1
    code, out, _ = call(capsys, *args, "--json")
    found = json.loads(out)
    assert (found["n_real"], found["n_fake"], found["extractor"]) == (200, 100, "pool")
    assert [figure["key"] for figure in found["figures"]][:3] == ["kd", "recall", "coverage"]
    assert set(found["classes"]) <= {str(i) for i in range(10)}
    assert len(found["classes"]) >= 3


def test_folder_of_copies(network, tmp_path, capsys):
    digits, folder = open_dataset("digits"), tmp_path / "images"
    for i in range(0, 5000, 50):
        path = folder / str(digits.labels[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[i, 0]).save(path)
    args = ["--data", "digits", "--extractor", network, "--no-cache", "--json"]
    code, out, err = call(capsys, folder, *args)
    found = json.loads(out)
    figures = {figure["key"]: figure["value"] for figure in found["figures"]}
    assert (code, err) == (0, "")
    assert figures["precision"] == 1
    assert figures["copying"] == 0
    assert set(found["classes"]) == set(digits.class_names)  # the folders' names
    assert found["classes"]["3"][0]["note"] == "n = 500 real, 10 generated"
    code, out, err = call(capsys, folder / "3", *args)
    assert (code, json.loads(out)["classes"]) == (0, {})
    assert "no figures of each class" in err
    assert "if its folders are named as the classes" in err


def test_modes_of_real_digits(network, tmp_path, capsys, monkeypatch):
    from gankern.data.digits import pack_digits

    trained = digits_classifier.train_classifier(epochs=1)
    monkeypatch.setattr(digits_classifier, "train_classifier", lambda: trained)
    pack_digits(tmp_path / "digits.safetensors", 28)
    args = ["--data", "digits", "--extractor", network, "--no-cache", "--real", 100, "--modes"]
    code, out, _ = call(capsys, tmp_path / "digits.safetensors", *args, "--images", 3000)
    assert code == 0
    (line,) = [line for line in out.splitlines() if "modes of 1,000" in line]
    assert "1000 stacks, of which the data has 632 modes" in line
    assert 400 < float(line.split("digits")[1].split()[0]) < 800  # of 1000 draws 632 differ


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["nowhere", "--data", "digits"], "nowhere: no such folder or zip"),
        ([".", "--extractor", "none"], "--data must be given with a folder of images"),
        (
            [".", "--data", "digits", "--extractor", "none"],
            "must be efficientnet-lite0 or a file",
        ),
        ([".", "--data", "none"], "none: no such data set"),
        ([".", "--data", "digits", "--paths"], "--paths needs a generator"),
        ([".", "--data", "digits", "--device", "abacus"], "--device abacus"),
        ([".", "--data", "digits", "--images", "1"], "1 is not in the range"),
    ],
)
def test_wrong_input(args, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *args)
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_packed_file_of_another_size(network, tmp_path, capsys):
    from gankern.data.digits import pack_digits

    pack_digits(tmp_path / "digits.safetensors", 32)
    args = ["--data", "digits", "--extractor", network, "--no-cache"]
    code, _, err = call(capsys, tmp_path / "digits.safetensors", *args)
    assert code == 2
    assert "images must be [1, 28, 28] as the real ones, got [1, 32, 32]" in err


def test_generator_of_another_size(run, network, capsys):
    code, _, err = call(capsys, run, "--data", "digits:16", "--extractor", network, "--images", 40)
    assert code == 2
    assert "images must be [1, 16, 16] as the real ones, got [1, 28, 28]" in err
    assert "Traceback" not in err


def test_few_images_are_an_error_not_a_number(network, tmp_path, capsys):
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "a.png")
    args = ["--data", "digits", "--extractor", network, "--no-cache"]
    code, _, err = call(capsys, tmp_path, *args)
    assert code == 2
    assert "images must be at least 8, got 1 generated" in err
