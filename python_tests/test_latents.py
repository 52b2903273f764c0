"""Styles on the command line: truncation, mixing, arithmetic, lerp; and projection."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from gankern import models
from gankern.cli import main
from gankern.data.latents import arithmetic, lerp, mix_layers, render, seed_latents, styles
from gankern.training import TrainError, checkpoint, load_generator, make_config
from gankern.training.project import correlation, pixel_distance, project
from gankern.training.run import write_config


def make_run(folder: Path, model="stylegan2", **values) -> Path:
    """A run of an untrained generator whose images differ visibly."""
    folder.mkdir()
    size = {"channel_base": 64, "channel_max": 8, "mapping_layers": 2, "w_dim": 8, "z_dim": 8}
    config = make_config(model=model, **size | values)
    config.resolution, config.channels = (16, 16), 1
    torch.manual_seed(0)
    G, D = models.build(config)
    G(torch.randn(64, 8), *([torch.eye(10)[torch.arange(64) % 10]] if config.c_dim else []))
    write_config(folder, config)
    checkpoint.save(folder, 1000, config, {"G_ema": G, "D": D}, {})
    return folder


@pytest.fixture(params=models.STYLE_BASED)
def run(request, tmp_path) -> Path:
    return make_run(tmp_path / "run", request.param)


def gankern(*args) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def size(path):
    with Image.open(path) as image:
        return image.size


def test_lerp_and_arithmetic():
    a, b = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert torch.equal(lerp(a, b, torch.tensor([0.25, 1.0]))[:, 0, 0], torch.tensor([0.25, 1.0]))
    z = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 6.0]])
    torch.testing.assert_close(arithmetic(z, [1, -1, 1]), torch.tensor([1.8, 2.4]))  # length 3
    ws = torch.arange(12.0).reshape(3, 2, 2)
    assert torch.equal(arithmetic(ws, [1, -1, 1]), ws[0] - ws[1] + ws[2])


def test_mixed_layers():
    rows, cols = torch.zeros(2, 4, 3), torch.ones(5, 4, 3)
    mixed = mix_layers(rows, cols, [2, 3])
    assert mixed.shape == (2, 5, 4, 3)
    assert mixed[1, 4, :, 0].tolist() == [0, 0, 1, 1]


def test_styles_render_as_latents_do(run):
    G, _ = load_generator(run)
    z = seed_latents(range(3), 8)
    for psi in (1.0, 0.5):
        expected = render(G, z, truncation_psi=psi)
        torch.testing.assert_close(render(G, styles(G, z, psi=psi)), expected)
    means = render(G, styles(G, z, psi=0.0))
    assert torch.equal(means[0], means[1])


def test_grids_of_styles(run, tmp_path):
    out = tmp_path / "out"
    code, text = gankern(
        "generate", run, "--seeds", "0-3", "--out", out, "--mix", "0-1:5-7",
        "--arithmetic", "3-1+2", "--space", "w", "--psi", "0.7", "--interpolate", "--steps", "4",
        "--no-images",
    )  # fmt: skip
    assert code == 0, text
    assert size(out / "mixing.png") == (4 * 16, 3 * 16)
    assert size(out / "interpolation.png") == (4 * 16, 2 * 16)
    assert size(out / "grid.png") == (32, 32)
    assert size(out / "arithmetic.png")[0] >= 4 * 16
    assert "mixing.png: rows 0-1, columns 5-7" in text
    assert "arithmetic.png: +3 -1 +2 in w" in text


def test_walk_in_w(run, tmp_path):
    code, text = gankern(
        "generate", run, "--seeds", "0-1", "--out", tmp_path, "--space", "w", "--walk", "--steps",
        "3", "--format", "gif", "--no-grid", "--no-images",
    )  # fmt: skip
    assert code == 0, text
    assert "6 frames, 1 walks of 2 seeds" in text


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--mix", "0-4"], "must be two lists of seeds as 0-4:10-15, got '0-4'"),
        (["--arithmetic", "3"], "must be signed seeds as 3-1+2, got '3'"),
        (["--mix", "0:1", "--mix-styles", "99"], "--mix-styles must be in 0.."),
    ],
)
def test_wrong_options(run, args, wanted):
    code, text = gankern("generate", run, *args)
    assert code == 2
    assert wanted in text


def test_styles_of_a_generator_without_any(tmp_path):
    plain = make_run(tmp_path / "plain", "dcgan", width=2, d_width=2)
    code, text = gankern("generate", plain, "--psi", "0.5")
    assert code == 2
    assert "need styles, which dcgan has not" in text
    code, text = gankern("generate", plain, "--seeds", "0-1", "--arithmetic", "0+1", "--no-images")
    assert code == 0, text
    with pytest.raises(TrainError, match="the generator must have styles w to project into"):
        project(load_generator(plain)[0], torch.zeros(1, 1, 16, 16))


# Projection.


def test_projection_finds_an_image_of_its_own(run):
    G, _ = load_generator(run)
    target = render(G, seed_latents([7], 8))
    before = {name: value.clone() for name, value in G.state_dict().items()}
    found = project(G, target, steps=120, lr=0.2)
    assert found.ws.shape == (1, G.num_ws, 8)
    assert found.distances[-1] < 0.3 * found.distances[0]
    torch.testing.assert_close(pixel_distance(found.image, target).item(), found.distances[-1],
                               rtol=0.5, atol=1e-3)  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in G.state_dict().items())
    again = project(G, target, steps=3, lr=0.2)
    assert again.distances == found.distances[:0] + again.distances
    with pytest.raises(TrainError, match=r"the image must be \[1, 1, 16, 16\]"):
        project(G, target[:, :, :8])


def test_project_command(run, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "gray").save(picture)
    code, text = gankern(
        "project", run, picture, "--steps", "5", "--features", "discriminator", "--per-layer"
    )
    assert code == 0, text
    assert "in 5 steps" in text
    assert size(run / "projected" / "projected.png") == (32, 16)
    assert load_file(run / "projected" / "projected.safetensors")["ws"].shape[2] == 8
    code, text = gankern("project", run, tmp_path / "none.png")
    assert code == 2
    assert "none.png: No such file" in text


def test_correlation_of_noise():
    torch.manual_seed(0)
    white = torch.randn(32, 32)
    assert correlation(white) < 0.1
    assert correlation(torch.ones(32, 32)) > 1
