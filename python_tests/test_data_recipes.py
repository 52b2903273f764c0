"""gankern data digits, emoji and glyphs: public images as packed data sets."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from gankern.cli import main
from gankern.data import DataError, open_dataset
from gankern.data.glyphs import GlyphFont, find_fonts, parse_characters

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"
SANS, SERIF = FONTS / "DejaVuSans.ttf", FONTS / "DejaVuSerif.ttf"


def gankern(*args) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def refused(*args) -> str:
    code, output = gankern(*args)
    assert code == 2
    assert output.strip().splitlines()[-1].startswith("gankern: ")
    assert "Traceback" not in output
    return output


def test_digits(tmp_path):
    dst = tmp_path / "digits.safetensors"
    assert gankern("data", "digits", dst, "--size", 32)[0] == 0
    packed, real = open_dataset(dst), open_dataset("digits", 32)
    np.testing.assert_array_equal(packed.images, real.images)
    np.testing.assert_array_equal(packed.labels, real.labels)
    assert packed.class_names == real.class_names
    assert "exists already" in refused("data", "digits", dst)
    assert gankern("data", "digits", dst, "--size", 16, "--overwrite")[0] == 0
    assert open_dataset(dst).resolution == (16, 16)


# Emoji


def emoji_entry(image: str, category: str, **variants: str) -> dict:
    tones = {tone: {"image": name} for tone, name in variants.items()}
    return {"image": image, "category": category, "skin_variations": tones}


CATALOGUE = [
    emoji_entry("1f600.png", "Smileys & Emotion"),
    emoji_entry("1f44b.png", "People & Body", t1="1f44b-1f3fb.png", t2="1f44b-1f3ff.png"),
    emoji_entry("1f1e6-1f1e8.png", "Flags"),
    emoji_entry("0023-fe0f-20e3.png", "Symbols"),
]


def dot(form: str, colour, size: int = 64) -> bytes:
    """A square of colour on a transparent ground."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    image.paste((*colour, 255), (size // 4, size // 4, size * 3 // 4, size * 3 // 4))
    buffer = io.BytesIO()
    image.save(buffer, form, lossless=True)
    return buffer.getvalue()


def tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def google(tmp_path) -> Path:
    names = ["1f600", "1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "1f1e6-1f1e8", "0023-fe0f-20e3"]
    images = {
        f"img/google/64/{name}.png": dot("PNG", (10 * i, 0, 0)) for i, name in enumerate(names)
    }
    about = {"name": "emoji-datasource-google", "version": "16.0.0"}
    texts = {"package.json": json.dumps(about), "emoji.json": json.dumps(CATALOGUE)}
    other = {"img/google/sheets/32.png": b"not wanted", "../../evil.png": b"evil"}
    files = images | {name: text.encode() for name, text in texts.items()} | other
    return tarball(tmp_path / "google.tgz", files)


@pytest.fixture
def fluent(tmp_path) -> Path:
    about = json.dumps({"name": "@lobehub/fluent-emoji-3d", "version": "1.1.0"}).encode()
    names = ["1f600", "1f44b-1f3fb", "23-20e3", "0023-20e3"]
    images = {f"assets/{name}.webp": dot("WEBP", (0, 200, 0), 256) for name in names}
    return tarball(tmp_path / "fluent.tgz", images | {"package.json": about})


def test_emoji_with_labels(google, tmp_path):
    before = sorted(tmp_path.iterdir())
    dst = tmp_path / "e.safetensors"
    assert gankern("data", "emoji", dst, "--tarball", google)[0] == 0
    data = open_dataset(dst)
    assert data.images.shape == (6, 3, 64, 64)
    assert data.class_names == ["Flags", "People & Body", "Smileys & Emotion", "Symbols"]
    assert np.bincount(data.labels).tolist() == [1, 3, 1, 1]
    assert data.images[:, :, 0, 0].min() == 255
    smile = data.file_names.index("Smileys & Emotion/1f600.png")
    assert data.images[smile, :, 32, 32].tolist() == [0, 0, 0]
    assert sorted(tmp_path.iterdir()) == sorted([*before, dst])


def test_emoji_left_out(google, tmp_path):
    args = ("--tarball", google, "--without", "Flags", "--no-skin-tones", "--size", 32)
    code, output = gankern("data", "emoji", tmp_path / "e", *args)
    assert code == 0
    assert "3 x left out as asked" in output
    data = open_dataset(tmp_path / "e")
    assert data.resolution == (32, 32)
    assert [name.partition("/")[2] for name in data.file_names] == [
        "1f44b.png",
        "1f600.png",
        "0023-fe0f-20e3.png",
    ]
    refused("data", "emoji", tmp_path / "f", "--tarball", google, "--without", "Cars")


def test_emoji_without_their_own_labels(fluent, google, tmp_path):
    args = ("--set", "fluent", "--tarball", fluent)
    assert gankern("data", "emoji", tmp_path / "a", *args)[0] == 0
    data = open_dataset(tmp_path / "a")
    assert (data.resolution, data.num_classes, len(data)) == ((256, 256), 0, 4)
    assert data.images[0, :, 128, 128].tolist() == [0, 200, 0]
    assert data.images[0, :, 0, 0].tolist() == [255, 255, 255]
    code, output = gankern("data", "emoji", tmp_path / "b", *args, "--labels-from", google)
    assert code == 0
    assert "23-20e3.webp: no category in emoji.json" in output
    assert open_dataset(tmp_path / "b").class_names == [
        "People & Body",
        "Smileys & Emotion",
        "Symbols",
    ]
    output = refused("data", "emoji", tmp_path / "c", *args, "--no-skin-tones")
    assert "--labels-from" in output


def test_emoji_errors(google, fluent, tmp_path):
    dst = tmp_path / "e"
    cases = [
        (tmp_path / "nowhere.tgz", "no such file"),
        (fluent, "must be the tarball of emoji-datasource-google, got @lobehub"),
    ]
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(google.read_bytes()[:-300])
    cases.append((cut, "not a whole tarball"))
    text = tmp_path / "text.tgz"
    text.write_text("hello")
    cases.append((text, "not a whole tarball"))
    damaged = tarball(tmp_path / "bad.tgz", {"package.json": b"{", "img/google/64/a.png": b"x"})
    cases.append((damaged, "is damaged"))
    for path, message in cases:
        assert message in refused("data", "emoji", dst, "--tarball", path)
        assert not dst.exists()


def fake_npm(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(stat.S_IRWXU)


def test_emoji_fetched_with_npm(google, tmp_path, monkeypatch):
    check = '[ "$1 $2 $3" = "pack emoji-datasource-google@16.0.0 --pack-destination" ] || exit 9'
    fake_npm(tmp_path / "bin", f'{check}\ncp "{google}" "$4/x.tgz"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert gankern("data", "emoji", tmp_path / "e")[0] == 0
    assert len(open_dataset(tmp_path / "e")) == 6


def test_emoji_when_npm_fails_or_is_absent(tmp_path, monkeypatch):
    fake_npm(tmp_path / "bin", "echo 'npm error network unreachable' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    output = refused("data", "emoji", tmp_path / "e")
    assert "npm error network unreachable" in output
    assert "--tarball" in output
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no npm client" in refused("data", "emoji", tmp_path / "e")
    assert not (tmp_path / "e").exists()


# Glyphs


def test_glyphs_of_two_fonts_are_pairs(tmp_path):
    args = ("--font", SANS, "--font", SERIF, "--chars", "latin,30-39", "--size", 32)
    assert gankern("data", "glyphs", tmp_path / "g", *args)[0] == 0
    data = open_dataset(tmp_path / "g")
    assert data.images.shape == (124, 1, 32, 32)
    assert data.class_names == ["DejaVuSans", "DejaVuSerif"]
    assert data.labels.tolist() == [0, 1] * 62
    assert data.file_names[:3] == ["0030/DejaVuSans", "0030/DejaVuSerif", "0031/DejaVuSans"]
    x = np.array(data.images, float)[:, 0].reshape(62, 2, -1)
    x -= x.mean(axis=2, keepdims=True)
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    match = x[:, 0] @ x[:, 1].T  # correlation of every Sans with every Serif
    assert (match.argmax(1) == np.arange(62)).mean() > 0.7


def test_glyphs_lie_in_the_frame():
    font = GlyphFont(SANS, 0, 48, parse_characters("latin"))
    ink = np.stack([font.draw(character)[0] for character in parse_characters("latin")]) > 0
    assert ink.any((1, 2)).all()
    rows = np.flatnonzero(ink.any((0, 2)))
    assert abs((rows[0] + rows[-1]) / 2 - 24) < 6
    assert ink[0, :, :2].sum() + ink[0, :, -2:].sum() == 0


def test_missing_characters_are_reported(tmp_path):
    args = ("--font", SANS, "--chars", "61-63,4e00-4e01,20", "--labels", "char", "--invert")
    code, output = gankern("data", "glyphs", tmp_path / "g", *args)
    assert code == 0
    assert "U+4E00: not in DejaVuSans" in output
    assert "U+0020" in output
    data = open_dataset(tmp_path / "g")
    assert data.class_names == ["a", "b", "c"]
    assert data.images[:, 0, 0, 0].tolist() == [255] * 3


def test_number_of_characters_is_drawn_by_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        args = ("--font", SANS, "--chars", "latin", "--number", 10, "--seed", seed)
        assert gankern("data", "glyphs", tmp_path / name, *args)[0] == 0
    a, b, c = (open_dataset(tmp_path / name).file_names for name in "abc")
    assert len(a) == 10
    assert a == b != c


def test_glyph_errors(tmp_path):
    dst = tmp_path / "g"
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(SANS.read_bytes()[:1000])
    cases = [
        (("--font", tmp_path / "no.ttf"), "no font file or installed font"),
        (("--font", broken), "not a font"),
        (("--font", f"{SANS}:7"), "not a font"),
        (("--font", SANS, "--chars", "klingon"), "chars must be of"),
        (("--font", SANS, "--chars", "5-4"), "chars must be of"),
        (("--font", SANS, "--chars", "fffffff"), "chars must be of"),
        (("--font", SANS, "--chars", "4e00"), "none of these characters"),
        (("--font", SANS, "--font", SANS, "--chars", "latin"), "fonts must differ"),
    ]
    for args, message in cases:
        assert message in refused("data", "glyphs", dst, *args)
        assert not dst.exists()


def test_installed_fonts_by_name(tmp_path, monkeypatch):
    folder = tmp_path / "fonts/truetype"
    folder.mkdir(parents=True)
    monkeypatch.setattr("gankern.data.glyphs.font_folders", lambda: [tmp_path / "fonts"])
    with pytest.raises(DataError, match="apt install fonts-noto-cjk"):
        find_fonts([])
    copy = folder / "NotoSansCJK-Regular.ttc"
    copy.write_bytes(SANS.read_bytes())
    assert find_fonts([]) == [(copy, 0)]
    assert find_fonts(["notosanscjk-regular:2"]) == [(copy, 2)]


@pytest.mark.parametrize("there", ["NotoSansCJK-Regular", "NotoSerifCJK-Regular"])
def test_one_font_of_a_pair_is_reported(tmp_path, monkeypatch, there):
    monkeypatch.setattr("gankern.data.glyphs.font_folders", lambda: [tmp_path / "fonts"])
    (tmp_path / "fonts").mkdir()
    (tmp_path / f"fonts/{there}.ttc").write_bytes(SANS.read_bytes())
    code, output = gankern("data", "glyphs", tmp_path / "a", "--chars", "41-43")
    assert code == 0
    absent = ({"NotoSansCJK-Regular", "NotoSerifCJK-Regular"} - {there}).pop()
    assert f"no pairs, as {absent} is not installed (apt install fonts-noto-cjk)" in output
    assert open_dataset(tmp_path / "a").class_names == [there]
    code, output = gankern("data", "glyphs", tmp_path / "b", "--chars", "41-43", "--font", there)
    assert code == 0
    assert "no pairs" not in output
    (tmp_path / f"fonts/{absent}.ttc").write_bytes(SERIF.read_bytes())
    code, output = gankern("data", "glyphs", tmp_path / "c", "--chars", "41-43")
    assert code == 0
    assert "no pairs" not in output
    assert len(open_dataset(tmp_path / "c")) == 6


def test_character_sets():
    assert len(parse_characters("cjk")) == 20992
    assert parse_characters("latin,U+41-U+43,digits")[-10:] == list("0123456789")
    assert len(parse_characters("latin,41")) == 52
    assert parse_characters("d7ff-e000") == ["\ud7ff", "\ue000"]
