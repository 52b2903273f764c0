"""Styles on the command line: truncation, mixing, arithmetic, lerp; and projection."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from gankern import models
from gankern.cli import main
from gankern.cli.project import start
from gankern.data.grid import save_grid
from gankern.data.latents import arithmetic, lerp, mix_layers, render, seed_latents, styles
from gankern.training import TrainError, checkpoint, load_generator, make_config
from gankern.training.load import seed_vectors
from gankern.training.project import correlation, pixel_distance, project
from gankern.training.run import write_config


def make_run(folder: Path, model="stylegan2", label_dim=0, num_classes=0, **values) -> Path:
    """A run of an untrained generator whose images differ visibly."""
    folder.mkdir()
    size = {"channel_base": 64, "channel_max": 8, "mapping_layers": 2, "w_dim": 8, "z_dim": 8}
    config = make_config(model=model, **size | values)
    config.resolution, config.channels = (16, 16), 1
    config.label_dim, config.num_classes = label_dim, num_classes
    torch.manual_seed(0)
    G, D = models.build(config)
    G(torch.randn(64, 8), *([torch.randn(64, config.c_dim)] if config.c_dim else []))
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


@pytest.fixture
def vectors(tmp_path):
    """A run whose conditions are vectors of a data set, and the file of that."""
    data = tmp_path / "vectors.safetensors"
    labels = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    tensors = {"images": torch.zeros(8, 1, 16, 16, dtype=torch.uint8), "labels": labels}
    save_file(tensors, data, {"format": "gankern-dataset-1"})
    return make_run(tmp_path / "run", label_dim=3, data=str(data)), data


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("L", (16, 16), "gray").save(path)
    return path


def test_styles_of_vectors(vectors, tmp_path):
    run, _ = vectors
    args = (
        "--seeds",
        "0-3",
        "--mix",
        "0-1:2-3",
        "--psi",
        "0.7",
        "--arithmetic",
        "3-1",
        "--no-images",
        "--device",
        "cpu",
    )
    code, text = gankern("generate", run, *args, "--out", tmp_path / "out")
    assert code == 0, text
    G, config = load_generator(run)
    z, c = seed_latents(range(4), 8), seed_vectors(config, range(4))
    torch.testing.assert_close(styles(G, z, c), G.mapping(z, c))
    torch.testing.assert_close(render(G, styles(G, z, c)), render(G, z, c))
    save_grid(render(G, styles(G, z, c, 0.7)), tmp_path / "wanted.png")
    assert (tmp_path / "out/grid.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()


def test_projection_starts_from_a_vector_of_the_data_set(vectors, picture, monkeypatch):
    run, data = vectors
    args = ("project", run, picture, "--steps", "2", "--features", "discriminator")
    starts = []

    def spy(G, target, steps, lr, c, *rest, **options):
        starts.append(c)
        return project(G, target, steps, lr, c, *rest, **options)

    monkeypatch.setattr("gankern.training.project.project", spy)
    for seed in (0, 1, 0):
        code, text = gankern(*args, "--seed", seed, "--device", "cpu")
        assert code == 0, text
    labels = load_file(data)["labels"]
    assert all((c == labels).all(1).any() for c in starts)
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[1])
    for extra, wanted in (
        (("--class", "1"), "--class: this generator was trained with vectors, which seeds draw"),
        (("--device", "tpu"), "--device must be cpu, cuda or cuda:N, got 'tpu'"),
    ):
        code, text = gankern(*args, *extra)
        assert code == 2
        assert wanted in text
    data.unlink()
    code, text = gankern(*args)
    assert code == 2
    assert "conditions are drawn from the run's data set, which cannot be opened: " in text
    assert text.count("\n") == 1


def test_projection_starts_between_classes_or_from_one(tmp_path, picture):
    run = make_run(tmp_path / "run", num_classes=4)
    assert start(load_generator(run)[1], None, 0).tolist() == [[0.25] * 4]
    assert start(load_generator(run)[1], 2, 0).tolist() == [[0, 0, 1, 0]]
    assert gankern("project", run, picture, "--steps", "2", "--class", "3")[0] == 0
    code, text = gankern("project", run, picture, "--class", "4")
    assert code == 2
    assert "--class must be in 0..3, got 4" in text
    code, text = gankern("project", make_run(tmp_path / "plain"), picture, "--class", "0")
    assert code == 2
    assert "--class: this generator was trained without classes" in text


def test_correlation_of_noise():
    torch.manual_seed(0)
    white = torch.randn(32, 32)
    assert correlation(white) < 0.1
    assert correlation(torch.ones(32, 32)) > 1
