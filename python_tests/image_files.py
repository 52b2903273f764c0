"""Image files that the tests of gankern.data write, and its command line in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from gankern.cli import main
from gankern.data import open_dataset
from gankern.data.decode import Geometry
from gankern.data.pack import pack

WHITE = (255, 255, 255)


def plain(size: int = 16, **options) -> Geometry:
    return Geometry(size, size, **options)


def solid(path: Path, colour=(200, 30, 60), size=(20, 20), **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **save)
    return path


def noise(path: Path, size=(64, 64), seed=0, **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **save)
    return path


def one(tmp_path: Path, geometry: Geometry) -> np.ndarray:
    """Packs the folder `src` with its one image, and returns its pixels [C, H, W]."""
    pack(tmp_path / "src", tmp_path / "out.safetensors", geometry)
    data = open_dataset(tmp_path / "out.safetensors")
    assert len(data) == 1
    return np.array(data.images[0])


def gankern(*args) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def animals(root: Path) -> Path:
    for i, name in enumerate(["cat/2", "cat/10", "dog/small/1", "dog/big/1", "ant/7"]):
        solid(root / f"{name}.png", (i * 40, 0, 0))
    return root
