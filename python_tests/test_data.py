"""gankern.data: packed files and what is wrong with them, the digits, the order of batches."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import animals, gankern, noise, plain, solid, tree
from PIL import Image
from safetensors import safe_open

from gankern.data import BatchSampler, DataError, Dataset, make_grid, open_dataset, save_grid
from gankern.data.decode import Geometry
from gankern.data.digits import digits_path, load_digits
from gankern.data.files import atomic_path
from gankern.data.pack import pack

# The file


def test_any_safetensors_reader_reads_it(tmp_path):
    animals(tmp_path / "src")
    pack(tmp_path / "src", tmp_path / "out.safetensors", plain())
    data = open_dataset(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("images"), data.images)
        np.testing.assert_array_equal(file.get_tensor("labels"), data.labels)
    assert isinstance(data.images, np.memmap)


def test_batch(tmp_path):
    animals(tmp_path / "src")
    pack(tmp_path / "src", tmp_path / "out.safetensors", Geometry(8, 16))
    data = open_dataset(tmp_path / "out.safetensors")
    assert (data.resolution, data.channels, len(data), data.name) == ((8, 16), 3, 5, "out")
    x, labels = data.batch(torch.tensor([4, 0, 0]), "cpu")
    assert x.dtype == torch.float32
    assert x.shape == (3, 3, 8, 16)
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([80.0, 160, 160]) / 127.5 - 1)
    assert x.min() == -1
    assert labels.tolist() == [3, 0, 0]
    unlabelled = Dataset(data.images, None, "x")
    assert unlabelled.batch([0])[1] is None
    assert unlabelled.num_classes == 0


@pytest.mark.parametrize("keep", [0, 4, 100, 70000, -1])
def test_a_cut_off_file_is_refused(tmp_path, keep):
    animals(tmp_path / "src")
    path = tmp_path / "out.safetensors"
    pack(tmp_path / "src", path, plain())
    path.write_bytes(path.read_bytes()[:keep])
    code, output = gankern("data", "info", path)
    assert code == 2
    assert output.count("\n") == 1
    assert "out.safetensors" in output


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"images": [1, 2, 3]}),
        b"PK\x03\x04" + bytes(100),
        (2).to_bytes(8, "little") + b"[]" + bytes(10),
        (9).to_bytes(8, "little") + b'{"a": {}}' + bytes(10),
        (60).to_bytes(8, "little")
        + b'{"images":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}} '
        + bytes(10),
        (10**17).to_bytes(8, "little") + bytes(100),
    ],
    ids=["pickle", "zip", "list", "no-tensor", "negative", "huge-header"],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a data set|not a safetensors|not one of"):
        open_dataset(path)


def test_flipped_bits_are_found(tmp_path):
    animals(tmp_path / "src")
    path = tmp_path / "out.safetensors"
    pack(tmp_path / "src", path, plain())
    assert gankern("data", "info", path, "--verify")[0] == 0
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    code, output = gankern("data", "info", path, "--verify")
    assert code == 2
    assert "do not match their checksum" in output


def test_labels_out_of_range_are_refused(tmp_path):
    animals(tmp_path / "src")
    path = tmp_path / "out.safetensors"
    pack(tmp_path / "src", path, plain())
    data = path.read_bytes()
    labels = np.array([0, 1, 1, 2, 3], "<i8").tobytes()
    path.write_bytes(data.replace(labels, labels[:-8] + np.int64(9).tobytes()))
    with pytest.raises(DataError, match="labels do not fit"):
        open_dataset(path)


# Wrong input: one line, exit code 2, nothing half written


def refused(tmp_path: Path, *args) -> str:
    before = tree(tmp_path)
    code, output = gankern("data", "pack", *args)
    assert code == 2
    assert output.count("\n") == 1
    assert "Traceback" not in output
    assert tree(tmp_path) == before
    return output


def test_pack_errors(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "out.safetensors"
    assert "no such folder or zip" in refused(tmp_path, src, dst, "--size", 8)
    src.mkdir()
    assert "holds no files" in refused(tmp_path, src, dst, "--size", 8)
    (src / "a.txt").write_text("a")
    assert "no usable image (1 not an image)" in refused(tmp_path, src, dst, "--size", 8)
    assert "neither a folder nor" in refused(tmp_path, src / "a.txt", dst, "--size", 8)
    solid(src / "a.png")
    for size in ("abc", "0", "-1", "8x", "8x0", "99999"):
        assert "gankern: " in refused(tmp_path, src, dst, f"--size={size}")
    assert "size is missing" in refused(tmp_path, src, dst)
    assert "size is missing" in refused(tmp_path, src, dst, "--height", 8)
    assert "either" in refused(tmp_path, src, dst, "--size", 8, "--width", 8)
    assert "colour" in refused(tmp_path, src, dst, "--size", 8, "--background", "blurple")
    assert "class folder" in refused(tmp_path, src, dst, "--size", 8, "--labels", "from-folders")
    assert "is a folder" in refused(tmp_path, src, tmp_path, "--size", 8)
    dst.write_text("mine")
    assert "exists already" in refused(tmp_path, src, dst, "--size", 8)
    assert gankern("data", "pack", src, dst, "--size", 8, "--overwrite")[0] == 0
    assert len(open_dataset(dst)) == 1


def test_cut_off_zip(tmp_path):
    animals(tmp_path / "src")
    shutil.make_archive(str(tmp_path / "src"), "zip", tmp_path / "src")
    path = tmp_path / "src.zip"
    path.write_bytes(path.read_bytes()[:-30])
    assert "src.zip" in refused(tmp_path, path, tmp_path / "out", "--size", 8)


def test_unreadable_source_and_target(tmp_path):
    src = animals(tmp_path / "src")
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may read and write everything")
    output = refused(tmp_path, src, tmp_path / "locked/out", "--size", 8)
    assert "Permission denied" in output
    src.chmod(0)
    try:
        code, output = gankern("data", "pack", src, tmp_path / "out", "--size", 8)
    finally:
        src.chmod(0o755)
    assert code == 2
    assert "cannot be read" in output


def test_disk_that_is_too_small(tmp_path, monkeypatch):
    src = animals(tmp_path / "src")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "disk is too full" in refused(tmp_path, src, tmp_path / "out", "--size", 64)


def test_disk_that_fills_up_while_writing(tmp_path):
    for i in range(20):
        noise(tmp_path / f"src/{i}.png", seed=i)
    before = tree(tmp_path)
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from gankern.cli import main; main()"
    )
    args = ["data", "pack", "src", "out.safetensors", "--size", "64"]
    run = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr == "gankern: out.safetensors: cannot be written: the disk is full\n"
    assert tree(tmp_path) == before


def test_report_file(tmp_path):
    solid(tmp_path / "src/a/1.png")
    solid(tmp_path / "src/b/1.png", (0, 9, 0))
    (tmp_path / "src/b/2.png").write_bytes(b"?")
    code, output = gankern(
        "data",
        "pack",
        tmp_path / "src",
        tmp_path / "o",
        "--size",
        8,
        "--report",
        tmp_path / "r.json",
    )
    assert code == 0
    assert "2 images 8x8 rgb" in output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["skipped"] == [["b/2.png", "not an image"]]
    assert report["classes"] == {"a": 1, "b": 1}
    code, output = gankern("data", "info", tmp_path / "o", "--json")
    assert json.loads(output)["classes"] == {"a": 1, "b": 1}


def test_show(tmp_path):
    animals(tmp_path / "src")
    pack(tmp_path / "src", tmp_path / "o", plain(32))
    assert gankern("data", "show", tmp_path / "o", tmp_path / "grid.png")[0] == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == "RGB"
        assert grid.width == 3 * 34 - 2
    code, output = gankern("data", "show", tmp_path / "o", tmp_path / "c.png", "--class", "cat")
    assert (code, "2 of 5" in output) == (0, True)
    code, output = gankern("data", "show", tmp_path / "o", tmp_path / "n.png", "--class", "cow")
    assert code == 2
    assert "no class 'cow'" in output


# The digits


def test_digits():
    data = open_dataset("digits")
    assert data.images.shape == (5000, 1, 28, 28)
    assert np.bincount(data.labels).tolist() == [500] * 10
    assert (data.images.min(), data.images.max()) == (0, 255)
    padded = open_dataset("digits", 32)
    assert padded.resolution == (32, 32)
    np.testing.assert_array_equal(padded.images[:, :, 2:-2, 2:-2], data.images)
    assert padded.images[:, :, :2].max() == 0
    small = open_dataset("digits:16")
    assert small.images.dtype == np.float32
    assert small.resolution == (16, 16)
    assert abs(small.batch(range(5000))[0].mean() - padded.batch(range(5000))[0].mean()) < 1e-3


def test_digits_errors(monkeypatch, tmp_path):
    for spec in ("digits:", "digits:x", "digits:0"):
        with pytest.raises(DataError, match="digits"):
            open_dataset(spec)
    real = digits_path()
    copy = tmp_path / "d.csv.gz"
    copy.write_bytes(real.read_bytes()[:5000])
    monkeypatch.setattr("gankern.data.digits.digits_path", lambda: copy)
    with pytest.raises(DataError, match="cannot be read"):
        load_digits()
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'gankern\[digits\]'"):
        open_dataset("digits")


def test_open_errors(tmp_path):
    with pytest.raises(DataError, match="no such data set"):
        open_dataset("nowhere")
    with pytest.raises(DataError, match="is a folder"):
        open_dataset(tmp_path)
    solid(tmp_path / "src/a.png")
    pack(tmp_path / "src", tmp_path / "o", plain(8))
    with pytest.raises(DataError, match="must be 16x16, got a data set of 8x8"):
        open_dataset(tmp_path / "o", 16)


# The order of batches


def take(sampler: BatchSampler, count: int) -> list[list[int]]:
    return [next(sampler).tolist() for _ in range(count)]


def test_every_epoch_sees_every_image_once():
    flat = list(chain(*take(BatchSampler(60, 12, 3), 20)))
    epochs = [flat[i : i + 60] for i in range(0, 240, 60)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert take(BatchSampler(60, 12, 4), 20) != take(BatchSampler(60, 12, 3), 20)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_make_up_the_batch_of_one_process(world):
    whole = take(BatchSampler(50, 24, 7), 9)  # batches span epochs
    ranks = [take(BatchSampler(50, 24, 7, rank, world), 9) for rank in range(world)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole


def test_resume_goes_on_exactly():
    sampler = BatchSampler(50, 24, 7)
    take(sampler, 5)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = take(sampler, 6)
    again = BatchSampler(50, 24, 0)
    again.load_state_dict(state)
    assert take(again, 6) == expected


def test_batches_larger_than_the_data_and_changing_size():
    sampler = BatchSampler(5, 12, 0)
    assert np.bincount(next(sampler), minlength=5).min() >= 2
    sampler.batch = 3
    assert len(next(sampler)) == 3
    assert sampler.epoch == 3


def test_sampler_errors():
    for args, message in [
        ((0, 1), "n must"),
        ((5, 0), "batch must"),
        ((5, 3, 0, 0, 2), "multiple of world"),
        ((5, 2, 0, 2, 2), "rank must"),
        ((5, 2, -1), "seed must"),
    ]:
        with pytest.raises(ValueError, match=message):
            BatchSampler(*args)
    with pytest.raises(ValueError, match="the data set has changed"):
        BatchSampler(5, 1).load_state_dict(BatchSampler(6, 1).state_dict())


# Grids and files


def test_grid_places_images(tmp_path):
    images = torch.arange(5).reshape(5, 1, 1, 1).expand(5, 1, 2, 3) / 2 - 1  # -1 to 1
    save_grid(images, tmp_path / "g.png", 3)
    with Image.open(tmp_path / "g.png") as grid:
        pixels = np.asarray(grid)
    assert pixels.shape == (4, 9)
    assert pixels[0, ::3].tolist() == [0, 64, 128]
    assert pixels[2, ::3].tolist() == [191, 255, 255]  # the empty cell is white


def test_grid_survives_bad_values():
    images = torch.tensor([float("nan"), float("inf"), -float("inf"), 7.0]).reshape(4, 1, 1, 1)
    assert np.asarray(make_grid(images, 4)).tolist() == [[0, 255, 0, 255]]
    with pytest.raises(ValueError, match="must not be empty"):
        make_grid(torch.zeros(0, 1, 2, 2))
    with pytest.raises(ValueError, match=r"\[N, 1\|3\|4, H, W\]"):
        make_grid(torch.zeros(1, 2, 2, 2))


def test_uint8_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    grid = np.asarray(make_grid(values.float() / 127.5 - 1))
    np.testing.assert_array_equal(grid, values[0, 0].numpy())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as path:
            path.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as caught:
        fail()
    assert caught.value.filename == str(target)
    assert tree(tmp_path) == {"a.txt": b"old"}
