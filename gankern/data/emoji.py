"""Emoji from npm packages, fetched with the npm client or read from a local tarball."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gankern.data.decode import Geometry
from gankern.data.errors import DataError
from gankern.data.pack import Report, check_target, pack_source
from gankern.data.sources import MemorySource

_MAX_BYTES = 2**30  # of the images of a package, which are held in memory


@dataclass(frozen=True)
class EmojiSet:
    """Where a set lies inside its npm package.

    Attributes:
        package, version: of the npm package.
        folder, suffix: of the images inside the tarball.
        size: pixels of a side.
        licence: of the images.
    """

    package: str
    version: str
    folder: str
    suffix: str
    size: int
    licence: str


SETS = {
    "google": EmojiSet(
        "emoji-datasource-google", "16.0.0", "package/img/google/64", ".png", 64, "Apache-2.0"
    ),
    "twitter": EmojiSet(
        "emoji-datasource-twitter", "16.0.0", "package/img/twitter/64", ".png", 64, "CC-BY-4.0"
    ),
    "fluent": EmojiSet("@lobehub/fluent-emoji-3d", "1.1.0", "package/assets", ".webp", 256, "MIT"),
}


def pack_emoji(
    which: str,
    dst: Path,
    geometry: Geometry | None = None,
    tarball: Path | None = None,
    labels_from: Path | None = None,
    without: tuple[str, ...] = (),
    skin_tones: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Packs a set of emoji, labelled by their Unicode category where emoji.json is at hand.

    Args:
        which: a name in SETS.
        dst: the file to write.
        geometry: of the packed images; default the set's own size, RGB on white.
        tarball: the npm package as a file; without it the npm client fetches it.
        labels_from: a tarball of emoji-datasource-*, for the labels of a set that has none itself.
        without: categories to leave out, as "Flags".
        skin_tones: whether the variants in five skin tones are taken too.
        overwrite: whether an existing dst may be replaced.
        progress: called with (images done, images in all).

    Returns:
        The report.

    Raises:
        DataError: no npm client and no tarball, npm fails, or a tarball is not the package.
    """
    check_target(dst, overwrite)
    chosen = SETS[which]
    with _package(chosen, tarball) as path:
        files, catalogue = _read(path, chosen)
    if labels_from is not None:
        catalogue = _read(labels_from, None)[1]
    if catalogue is None and (without or not skin_tones):
        raise DataError(
            f"{which}: leaving out emoji needs their categories: give --labels-from, a tarball of"
            " emoji-datasource-google"
        )
    source = _source(path, chosen, files, catalogue, without, skin_tones)
    labels = "none" if catalogue is None else "from-folders"
    geometry = geometry or Geometry(chosen.size, chosen.size)
    report = pack_source(source, dst, geometry, labels, progress=progress)
    if len(source.names) + len(source.skipped) < len(files):
        unwanted = len(files) - len(source.names) - len(source.skipped)
        report.notes["left out as asked"] = unwanted
    return report


@contextmanager
def _package(chosen: EmojiSet, tarball: Path | None) -> Iterator[Path]:
    """The tarball: the given one, or one that npm fetches into a temporary folder."""
    if tarball is not None:
        yield tarball
        return
    name = f"{chosen.package}@{chosen.version}"
    advice = f"or give the tarball of {name} with --tarball"
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"{name}: there is no npm client: install one, {advice}")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", name, "--pack-destination", folder, "--silent"]
        try:
            run = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=900, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"{name}: npm cannot fetch it ({error}): try again, {advice}") from None
        found = list(Path(folder).glob("*.tgz"))
        if run.returncode or not found:
            lines = [line for line in run.stderr.splitlines() if "error" in line.lower()]
            why = lines[0] if lines else f"exit code {run.returncode}"
            raise DataError(f"{name}: npm cannot fetch it ({why}): try again, {advice}")
        yield found[0]


def _read(path: Path, chosen: EmojiSet | None) -> tuple[dict[str, bytes], list[Any] | None]:
    """The images (by file name) and the parsed emoji.json of a package's tarball."""
    files: dict[str, bytes] = {}
    texts: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                wanted = chosen is not None and str(name.parent) == chosen.folder
                if not member.isfile() or not (wanted or str(name.parent) == "package"):
                    continue
                if wanted and chosen is not None and name.suffix != chosen.suffix:
                    continue
                total += member.size
                if total > _MAX_BYTES:
                    raise DataError(f"{path}: holds more than {_MAX_BYTES >> 20} MiB of images")
                file = tar.extractfile(member)
                (files if wanted else texts)[name.name] = file.read() if file else b""
        about = json.loads(texts.get("package.json", b"{}"))
        catalogue = json.loads(texts["emoji.json"]) if "emoji.json" in texts else None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path}: not a whole tarball of an npm package: {error}") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: its package.json or emoji.json is damaged") from error
    came = about.get("name") if isinstance(about, dict) else None
    if chosen is not None and (came != chosen.package or not files):
        raise DataError(f"{path}: must be the tarball of {chosen.package}, got {came}")
    if chosen is None and catalogue is None:
        raise DataError(f"{path}: has no emoji.json, got the package {came}")
    return files, catalogue


def _source(
    path: Path,
    chosen: EmojiSet,
    files: dict[str, bytes],
    catalogue: list[Any] | None,
    without: tuple[str, ...],
    skin_tones: bool,
) -> MemorySource:
    """The wanted images, each in a folder named by its category."""
    if catalogue is None:
        return MemorySource(path, files, [])
    try:
        categories, toned = _categories(catalogue)
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: its emoji.json has an unknown form") from None
    unknown = set(without) - set(categories.values())
    if unknown:
        known = ", ".join(sorted(set(categories.values())))
        raise DataError(f"without must be among {known}, got {', '.join(sorted(unknown))}")
    wanted, skipped = {}, []
    for name, data in files.items():
        stem = PurePosixPath(name).stem
        short = stem.replace("-fe0f", "")  # packages differ in whether they keep this selector
        category = categories.get(stem) or categories.get(short)
        unwanted = category in without or (not skin_tones and not toned.isdisjoint((stem, short)))
        if category is None:
            skipped.append((name, "no category in emoji.json"))
        elif not unwanted:
            wanted[f"{category}/{name}"] = data
    if not wanted:
        raise DataError(f"{path}: no emoji is left")
    return MemorySource(path, wanted, skipped)


def _categories(catalogue: list[Any]) -> tuple[dict[str, str], set[str]]:
    """The category of each image by its stem, and the stems of variants in skin tones."""
    categories: dict[str, str] = {}
    toned: set[str] = set()
    for emoji in catalogue:
        category = str(emoji["category"]).replace("/", " ")
        variants = [variant["image"] for variant in emoji.get("skin_variations", {}).values()]
        for image in [emoji["image"], *variants]:
            stem = PurePosixPath(image).stem
            for key in (stem, stem.replace("-fe0f", "")):
                categories.setdefault(key, category)
                if image in variants:
                    toned.add(key)
    return categories, toned
