"""Characters rendered from installed fonts: the same character in several fonts is a pair."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gankern.data.errors import DataError
from gankern.data.pack import Report, check_target, write_packed

if TYPE_CHECKING:
    from PIL import ImageFont

# First and last code point of the blocks that a set is made of.
BLOCKS: dict[str, list[tuple[int, int]]] = {
    "cjk": [(0x4E00, 0x9FFF)],
    "cjk-all": [
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF),
        (0x20000, 0x323AF),
    ],
    "kana": [(0x3041, 0x3096), (0x30A1, 0x30FA)],
    "hangul": [(0xAC00, 0xD7A3)],
    "latin": [(0x41, 0x5A), (0x61, 0x7A)],
    "digits": [(0x30, 0x39)],
}
_PREFERRED = ("NotoSansCJK-Regular", "NotoSerifCJK-Regular")
_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_ABSENT = ("\U0010ffff", "\uffff")  # no font has them: they show what a missing glyph looks like


def parse_characters(spec: str) -> list[str]:
    """Characters of "cjk,kana", of ranges as in "4e00-4fff", or of both, without repetition.

    Raises:
        DataError: a part is neither a name in BLOCKS nor a range of code points.
    """
    codes: dict[int, None] = {}
    for part in spec.split(","):
        ranges = BLOCKS.get(part.strip().lower())
        if ranges is None:
            match = re.fullmatch(
                r"\s*(?:U\+)?([0-9a-f]{1,6})(?:-(?:U\+)?([0-9a-f]{1,6}))?\s*", part, re.I
            )
            first, last = (int(match[1], 16), int(match[2] or match[1], 16)) if match else (1, 0)
            if last < first or last > sys.maxunicode:
                raise DataError(
                    f"chars must be of {', '.join(BLOCKS)} or ranges as 4e00-4fff, got {part!r}"
                )
            ranges = [(first, last)]
        for first, last in ranges:
            codes.update(dict.fromkeys(range(first, last + 1)))
    return [chr(code) for code in codes if not 0xD800 <= code <= 0xDFFF]


def font_folders() -> list[Path]:
    """Where this system keeps fonts."""
    home = Path.home()
    data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    folders = [Path(part) / "fonts" for part in data.split(":")]
    folders += [home / ".local/share/fonts", home / ".fonts", home / "Library/Fonts"]
    folders += [Path("/System/Library/Fonts"), Path("/Library/Fonts")]
    return [folder for folder in folders if folder.is_dir()]


def installed_fonts() -> dict[str, Path]:
    """Font files by their name without suffix."""
    found: dict[str, Path] = {}
    for folder in font_folders():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in _SUFFIXES:
                found.setdefault(path.stem, path)
    return found


def find_fonts(names: Sequence[str]) -> list[tuple[Path, int]]:
    """Files and indices of fonts; without names, what there is of Noto's Sans and Serif CJK.

    Args:
        names: each a file, or the name of an installed font's file without suffix; ":2" behind it
            chooses the third font of a collection.

    Raises:
        DataError: there is no such font.
    """
    if not names:
        installed = installed_fonts()
        fonts = [(installed[name], 0) for name in _PREFERRED if name in installed]
        if not fonts:
            raise DataError(
                "glyphs: no CJK font is installed: apt install fonts-noto-cjk, or give --font"
            )
        return fonts
    fonts = []
    for name in names:
        match = re.fullmatch(r"(.+):(\d{1,3})", name)
        stem, index = (match[1], int(match[2])) if match else (name, 0)
        path = Path(stem)
        if not path.is_file():
            lower = {key.lower(): value for key, value in installed_fonts().items()}
            if stem.lower() not in lower:
                raise DataError(f"glyphs: no font file or installed font {stem!r}")
            path = lower[stem.lower()]
        fonts.append((path, index))
    return fonts


class GlyphFont:
    """One font at one size, which draws characters into square images.

    Characters are centred by their advance; vertically, all of them are shifted alike, so that on
    average they are in the middle, and keep their places relative to each other.
    """

    def __init__(self, path: Path, index: int, size: int, characters: Sequence[str]) -> None:
        from PIL import ImageFont

        self.size = size
        basic = ImageFont.Layout.BASIC
        try:
            self.font: ImageFont.FreeTypeFont = ImageFont.truetype(
                str(path), max(1, round(0.9 * size)), index=index, layout_engine=basic
            )
        except OSError as error:
            raise DataError(f"{path}: not a font that can be read ({error})") from error
        self.absent = {self._mask(character) for character in _ABSENT}
        step = max(1, len(characters) // 256)
        boxes = [self.font.getbbox(c, anchor="ls") for c in characters[::step] if self.has(c)]
        middle = np.mean([(top + bottom) / 2 for _, top, _, bottom in boxes]) if boxes else 0
        self.baseline = round(size / 2 - float(middle))

    def _mask(self, character: str) -> tuple[tuple[int, int], bytes]:
        mask = self.font.getmask(character)
        return mask.size, bytes(mask)

    def has(self, character: str) -> bool:
        """Whether the font draws this character, other than blank or as missing."""
        mask = self._mask(character)
        return any(mask[1]) and mask not in self.absent

    def draw(self, character: str) -> np.ndarray:
        """uint8 [1, size, size], white on black."""
        from PIL import Image, ImageDraw

        image = Image.new("L", (self.size, self.size))
        ImageDraw.Draw(image).text(
            (self.size / 2, self.baseline), character, fill=255, font=self.font, anchor="ms"
        )
        return np.asarray(image)[None]


def pack_glyphs(
    dst: Path,
    size: int = 32,
    fonts: Sequence[str] = (),
    characters: str = "cjk",
    labels: str = "font",
    number: int | None = None,
    seed: int = 0,
    invert: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Packs characters that all the fonts have, one image a font, side by side in the file.

    Image i * len(fonts) + f is the i-th character in font f, named "<code point>/<font>".

    Args:
        dst: the file to write.
        size: pixels of a side.
        fonts: see `find_fonts`.
        characters: see `parse_characters`.
        labels: "font" (each font a class), "char" (each character a class) or "none".
        number: of characters, drawn at random; default all.
        seed: of that choice.
        invert: black on white.
        overwrite: whether an existing dst may be replaced.
        progress: called with (characters done, characters in all).

    Returns:
        The report; skipped are the characters that a font does not have, and a note says which of
        the fonts that are used without `fonts` is not installed.

    Raises:
        DataError: no such font, no character that all fonts have, bad arguments.
    """
    check_target(dst, overwrite)
    wanted = parse_characters(characters)
    if number is not None and number < len(wanted):
        chosen = np.random.default_rng(seed).permutation(len(wanted))
        order = [wanted[i] for i in chosen]
    else:
        order, number = wanted, len(wanted)
    found = find_fonts(fonts)
    drawers = [GlyphFont(path, index, size, wanted) for path, index in found]
    names = [path.stem + (f"-{index}" if index else "") for path, index in found]
    if len(set(names)) < len(names):
        raise DataError(f"glyphs: fonts must differ, got {', '.join(names)}")
    report = Report()
    if not fonts:
        for name in set(_PREFERRED) - set(names):
            report.notes[f"no pairs, as {name} is not installed (apt install fonts-noto-cjk)"] += 1
    characters_kept = _kept(order, number, drawers, names, report)
    kept = sorted(characters_kept)

    def images() -> Iterator[tuple[str, np.ndarray]]:
        for done, character in enumerate(kept, 1):
            for name, drawer in zip(names, drawers, strict=True):
                pixels = drawer.draw(character)
                yield f"{ord(character):04x}/{name}", 255 - pixels if invert else pixels
            if progress is not None:
                progress(done, len(kept))

    def label(_: list[str]) -> tuple[list[int] | None, list[str]]:
        if labels == "font":
            return list(range(len(names))) * len(kept), names
        if labels == "char":
            return [i for i in range(len(kept)) for _ in names], kept
        return None, []

    count = len(kept) * len(names)
    write_packed(dst, images(), (1, size, size), count, label, report, 65536 + 16 * len(kept))
    return report


def _kept(
    order: Sequence[str],
    number: int,
    drawers: Sequence[GlyphFont],
    names: Sequence[str],
    report: Report,
) -> list[str]:
    """The first `number` characters that all fonts have."""
    kept: list[str] = []
    for character in order:
        if len(kept) == number:
            break
        missing = [
            name for name, font in zip(names, drawers, strict=True) if not font.has(character)
        ]
        if missing:
            report.skipped.append((f"U+{ord(character):04X}", f"not in {', '.join(missing)}"))
        else:
            kept.append(character)
    if not kept:
        raise DataError(f"glyphs: {' and '.join(names)} have none of these characters in common")
    return kept
