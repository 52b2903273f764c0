"""gankern.data: packing real files of every kind, their order and labels."""

from __future__ import annotations

import os
import shutil
import zipfile

import numpy as np
import pytest
from image_files import animals, noise, one, plain, solid, tree
from PIL import Image

from gankern.data import DataError, open_dataset
from gankern.data import decode as decode_module
from gankern.data.decode import Geometry
from gankern.data.pack import labels_of, pack

# What people put into folders


def test_16_bit_png_is_scaled(tmp_path):
    (tmp_path / "src").mkdir()
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    Image.fromarray(np.tile(ramp, (256, 1))).save(tmp_path / "src/ramp.png")
    pixels = one(tmp_path, plain(256, channels="gray"))
    np.testing.assert_array_equal(pixels[0, 0], np.arange(256))


def test_palette_with_transparency_is_composed_on_the_background(tmp_path):
    (tmp_path / "src").mkdir()
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    image.paste(1, (0, 0, 8, 16))
    image.save(tmp_path / "src/p.png", transparency=0)
    pixels = one(tmp_path, plain(background=(10, 20, 30)))
    assert pixels[:, 4, 4].tolist() == [255, 0, 0]
    assert pixels[:, 4, 12].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_half_transparent_pixels_are_blended(tmp_path, mode):
    (tmp_path / "src").mkdir()
    Image.new(mode, (16, 16), (0,) * (len(mode) - 1) + (128,)).save(tmp_path / "src/a.png")
    pixels = one(tmp_path, plain())
    assert np.all(pixels == 127)


def test_rgba_keeps_alpha_without_dark_fringes(tmp_path):
    (tmp_path / "src").mkdir()
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 31, 64))
    image.save(tmp_path / "src/a.png")
    pixels = one(tmp_path, plain(16, channels="rgba"))
    edge = pixels[:, 8, 7]
    assert 100 < edge[3] < 255
    assert edge[:3].min() >= 250  # white stays white where it fades out


def test_cmyk_jpeg(tmp_path):
    (tmp_path / "src").mkdir()
    red = Image.new("RGB", (32, 32), (250, 10, 10)).convert("CMYK")
    red.save(tmp_path / "src/c.jpg", quality=95)
    assert np.abs(one(tmp_path, plain())[:, 8, 8].astype(int) - [250, 10, 10]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    (tmp_path / "src").mkdir()
    upright = Image.new("RGB", (32, 32), (0, 0, 0))
    upright.paste((255, 255, 255), (0, 0, 16, 8))  # as a person shall see it: bright at top left
    undo = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # how a camera held so would store it
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "src/e.jpg", exif=exif, quality=95)
    pixels = one(tmp_path, plain(32, channels="gray")).astype(int)
    assert np.abs(pixels[0] - np.asarray(upright.convert("L")).astype(int)).max() <= 30


def test_animation_gives_its_first_frame(tmp_path):
    (tmp_path / "src").mkdir()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "src/a.gif", save_all=True, append_images=frames[1:])
    report = pack(tmp_path / "src", tmp_path / "a.safetensors", plain())
    assert open_dataset(tmp_path / "a.safetensors").images[0, :, 3, 3].tolist() == [255, 0, 0]
    assert report.notes == {"animation: first frame taken": 1}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_formats(tmp_path, suffix):
    solid(tmp_path / f"src/a.{suffix}")
    assert np.abs(one(tmp_path, plain())[:, 5, 5].astype(int) - [200, 30, 60]).max() <= 6


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "I;16", "LAB"])
def test_other_modes(tmp_path, mode):
    (tmp_path / "src").mkdir()
    white = {"1": 1, "L": 255, "YCbCr": (255, 128, 128), "I;16": 65535, "LAB": (255, 128, 128)}[
        mode
    ]
    suffix = {"YCbCr": "jpg", "LAB": "tiff"}.get(mode, "png")
    Image.new(mode, (16, 16), white).save(tmp_path / f"src/a.{suffix}")
    assert one(tmp_path, plain()).min() >= 254


def test_skipped_files_are_reported_with_their_reason(tmp_path):
    src = tmp_path / "src"
    whole = noise(src / "whole.jpg").read_bytes()
    (src / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (src / "half.png").write_bytes(noise(src / "x.png").read_bytes()[:3000])
    (src / "notes.txt").write_text("not an image")
    (src / "empty.png").write_bytes(b"")
    (src / ".DS_Store").write_bytes(b"hidden")
    Image.new("F", (8, 8), 0.5).save(src / "float.tiff")
    os.mkfifo(src / "pipe.png")
    (src / "dangling.png").symlink_to(src / "nowhere.png")
    report = pack(src, tmp_path / "out.safetensors", plain())
    assert open_dataset(tmp_path / "out.safetensors").file_names == ["whole.jpg", "x.png"]
    assert dict(report.skipped) == {
        "half.jpg": "truncated",
        "half.png": "truncated",
        "notes.txt": "not an image",
        "empty.png": "not an image",
        "float.tiff": "float pixels of unknown range",
        "pipe.png": "not a regular file",
        "dangling.png": "unreadable: No such file or directory",
    }


def test_bombs_are_not_decoded(tmp_path, monkeypatch):
    solid(tmp_path / "src/small.png")
    solid(tmp_path / "src/bomb.png", size=(3000, 3000))
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 1_000_000)
    report = pack(tmp_path / "src", tmp_path / "out.safetensors", plain())
    assert report.skipped == [("bomb.png", "3000x3000 is more than 1000000 pixels")]


def test_postscript_is_never_run(tmp_path):
    solid(tmp_path / "src/a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "src/b.eps")
    report = pack(tmp_path / "src", tmp_path / "out.safetensors", plain())
    assert report.skipped == [("b.eps", "not an image")]


# Geometry


def test_center_crop_and_letterbox(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    image = Image.new("RGB", (64, 32), (0, 0, 255))
    image.paste((255, 0, 0), (16, 0, 48, 32))  # the middle square
    image.save(src / "a.png")
    red = np.broadcast_to(np.uint8([255, 0, 0])[:, None, None], (3, 16, 16))
    np.testing.assert_array_equal(one(tmp_path, plain(resample="box")), red)
    (tmp_path / "out.safetensors").unlink()
    boxed = one(tmp_path, plain(crop="none", background=(1, 2, 3), resample="box"))
    assert boxed[:, 0, 0].tolist() == [1, 2, 3]
    assert boxed[:, 15, 15].tolist() == [1, 2, 3]
    assert boxed[:, 8, 1].tolist() == [0, 0, 255]
    assert boxed[:, 8, 8].tolist() == [255, 0, 0]


@pytest.mark.parametrize("crop", ["center", "none"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (37, 53)], ids=str)
def test_any_size_to_any_size(tmp_path, crop, size):
    solid(tmp_path / "src/a.png", size=size)
    pixels = one(tmp_path, Geometry(24, 40, crop=crop, background=(200, 30, 60)))
    assert pixels.shape == (3, 24, 40)
    assert np.abs(pixels.transpose(1, 2, 0).astype(int) - [200, 30, 60]).max() <= 1


def test_pixels_of_the_right_size_are_untouched(tmp_path):
    noise(tmp_path / "src/a.png", size=(48, 32))
    pixels = one(tmp_path, Geometry(32, 48))
    with Image.open(tmp_path / "src/a.png") as image:
        np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.asarray(image))


# Order, labels, zips, duplicates


def test_order_and_labels_of_a_tree(tmp_path):
    src = animals(tmp_path / "src/animals")
    report = pack(tmp_path / "src", tmp_path / "out.safetensors", plain())
    data = open_dataset(tmp_path / "out.safetensors")
    assert [name.removeprefix("animals/") for name in data.file_names] == sorted(
        str(path.relative_to(src)) for path in src.rglob("*.png")
    )
    assert data.class_names == ["ant", "cat", "dog/big", "dog/small"]
    assert data.labels.tolist() == [0, 1, 1, 2, 3]
    assert data.num_classes == 4
    assert report.classes == {"ant": 1, "cat": 2, "dog/big": 1, "dog/small": 1}
    assert data.images[:, 0, 0, 0].tolist() == [160, 40, 0, 120, 80]


@pytest.mark.parametrize(
    ("how", "names", "labels", "classes"),
    [
        ("auto", ["a/1", "b/1"], [0, 1], ["a", "b"]),
        ("auto", ["a/1", "a/2"], None, []),
        ("auto", ["a/1", "2"], None, []),
        ("none", ["a/1", "b/1"], None, []),
        ("from-folders", ["a/1", "a/2"], [0, 0], ["a"]),
        ("from-folders", ["x/b/1", "x/a/1"], [1, 0], ["a", "b"]),
        ("from-top-folders", ["a/x/1", "a/y/1", "b/x/1"], [0, 0, 1], ["a", "b"]),
    ],
)
def test_labels(how, names, labels, classes):
    assert labels_of(names, how) == (labels, classes)


def test_stray_images_when_labels_are_demanded():
    with pytest.raises(DataError, match=r"must lie in a class folder, got 2\.png"):
        labels_of(["a/1.png", "2.png"], "from-folders")


def test_zip_gives_what_the_folder_gives(tmp_path):
    animals(tmp_path / "src")
    shutil.make_archive(str(tmp_path / "src"), "zip", tmp_path / "src")
    pack(tmp_path / "src", tmp_path / "a.safetensors", plain(), workers=1)
    pack(tmp_path / "src.zip", tmp_path / "b.safetensors", plain(), workers=4)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_hostile_zip_touches_nothing(tmp_path):
    good = solid(tmp_path / "good.png").read_bytes()
    (tmp_path / "work").mkdir()
    with zipfile.ZipFile(tmp_path / "work/evil.zip", "w") as file:
        for name in ("../evil.png", "/abs.png", "a/../../evil.png", "ok.png", "__MACOSX/._ok.png"):
            file.writestr(name, good)
    before = tree(tmp_path)
    report = pack(tmp_path / "work/evil.zip", tmp_path / "work/out.safetensors", plain())
    after = tree(tmp_path)
    assert after.pop("work/out.safetensors")
    assert after == before
    assert report.images == 1
    assert {reason for _, reason in report.skipped} == {"path points outside the zip"}


def test_damaged_zip_member_is_skipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.png", solid(tmp_path / "a.png").read_bytes())
        file.writestr("b.png", noise(tmp_path / "b.png").read_bytes())
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"b.png") + 500] ^= 255
    (tmp_path / "a.zip").write_bytes(data)
    report = pack(tmp_path / "a.zip", tmp_path / "out.safetensors", plain())
    assert report.images == 1
    assert report.skipped[0][1].startswith("damaged in the zip")


def test_duplicates(tmp_path):
    for name in ("a", "b", "c"):
        solid(tmp_path / f"src/{name}.png", (0, 0, 250 if name == "c" else 0))
    kept = pack(tmp_path / "src", tmp_path / "kept.safetensors", plain())
    assert (kept.images, kept.duplicates) == (3, 1)
    skipped = pack(tmp_path / "src", tmp_path / "s.safetensors", plain(), duplicates="skip")
    assert (skipped.images, skipped.skipped) == (2, [("b.png", "duplicate")])


def test_a_loop_of_links_ends(tmp_path):
    solid(tmp_path / "src/a/a.png")
    (tmp_path / "src/a/loop").symlink_to(tmp_path / "src")
    assert pack(tmp_path / "src", tmp_path / "out.safetensors", plain()).images == 1


def test_many_classes_with_long_names_fit_the_header(tmp_path):
    for i in range(300):
        solid(tmp_path / f"src/{'k' * 240}{i}/a.png", size=(2, 2))
    report = pack(tmp_path / "src", tmp_path / "out.safetensors", plain(2))
    assert len(report.classes) == 300
    assert open_dataset(tmp_path / "out.safetensors").num_classes == 300


# Labels that are vectors


def test_vectors_of_a_csv_file(tmp_path):
    src = animals(tmp_path / "src")
    names = sorted(str(path.relative_to(src)) for path in src.rglob("*.png"))
    vectors = {name: [0.5 * i, -float(i)] for i, name in enumerate(names)}
    lines = [f"{name},{a},{b}" for name, (a, b) in reversed(vectors.items())]
    table = tmp_path / "vectors.csv"
    table.write_text("\n".join(["file,size,age", *lines, "gone.png,1,2"]))
    report = pack(src, tmp_path / "out.safetensors", plain(), vectors=table)
    assert (report.label_dim, report.classes) == (2, {})
    assert report.notes == {"vector without an image": 1}
    data = open_dataset(tmp_path / "out.safetensors")
    assert (data.label_dim, data.num_classes) == (2, 0)
    assert data.labels.tolist() == [vectors[name] for name in data.file_names]
    classes = pack(src, tmp_path / "classes.safetensors", plain())
    assert len(classes.classes) == 4
    other = open_dataset(tmp_path / "classes.safetensors")
    np.testing.assert_array_equal(data.images, other.images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,1,2\n", "pack: every image must have a vector, but b.png has none"),
        ("a.png,1,2\nb.png,1\n", "b.png must have 2 finite numbers, got 1"),
        ("a.png,1,2\nb.png,1,x\n", "b.png must have 2 finite numbers, got 1,x"),
        ("a.png,1,2\nb.png,1,nan\n", "b.png must have 2 finite numbers, got 1,nan"),
        ("a.png,1\nb.png,1e99\n", "b.png must have 1 finite numbers, got 1e99"),
        ("a.png\n", "a.png must have 1 finite numbers, got none"),
        ("a.png,1\na.png,2\n", "a.png comes twice"),
        ("file,x\n", "holds no vectors"),
        ("\ufeff", "holds no vectors"),
        (b"\xff\xfe,1\n", "not a CSV file"),
        (None, "cannot be read: No such file"),
    ],
)
def test_vectors_that_cannot_be_used(text, message, tmp_path):
    for name in ("a", "b"):
        solid(tmp_path / f"src/{name}.png")
    table = tmp_path / "vectors.csv"
    if text is not None:
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "src", tmp_path / "out.safetensors", plain(), vectors=table)
    assert not (tmp_path / "out.safetensors").exists()


def test_vectors_take_the_place_of_classes(tmp_path):
    with pytest.raises(DataError, match="labels must be auto or none with vectors, got from-fold"):
        pack(tmp_path, tmp_path / "o", plain(), labels="from-folders", vectors=tmp_path / "v.csv")
