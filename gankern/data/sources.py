"""Where images come from: a folder, a zip or memory, in a fixed order. Zips are never extracted."""

from __future__ import annotations

import io
import os
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from gankern.data.errors import DataError

MAX_MEMBER_BYTES = 512 * 2**20  # a zip member is held in memory while it is decoded


class Unreadable(Exception):
    """A file of the source that has to be skipped; the message is the reason."""


class Source(Protocol):
    """Files by name; `skipped` are those that are not even tried."""

    path: Path
    names: list[str]
    skipped: list[tuple[str, str]]

    def open(self, name: str) -> BinaryIO: ...


class FolderSource:
    """All files below a folder; hidden ones are left out, links are followed (once)."""

    def __init__(self, root: Path) -> None:
        self.path = root
        self.names: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._walk(root, "", {os.path.realpath(root)})
        self.names.sort()

    def _walk(self, folder: Path, prefix: str, seen: set[str]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise
            self.skipped.append((prefix, f"unreadable folder: {error.strerror}"))
            return
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if "\n" in name or not _is_text(name):
                self.skipped.append((repr(name), "file name with a newline or broken encoding"))
            elif entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in seen:
                    self._walk(Path(entry.path), name + "/", seen | {real})
            else:
                self.names.append(name)

    def open(self, name: str) -> BinaryIO:
        path = self.path / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise Unreadable("not a regular file")
            return open(path, "rb")
        except OSError as error:
            raise Unreadable(f"unreadable: {error.strerror}") from error


class ZipSource:
    """All files in a zip. Members are read into memory; no path from the zip touches the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.zip = zipfile.ZipFile(path)
        self.skipped: list[tuple[str, str]] = []
        members: dict[str, zipfile.ZipInfo] = {}
        for member in self.zip.infolist():
            name = member.filename
            parts = PurePosixPath(name).parts
            if member.is_dir() or _is_hidden(parts):
                continue
            if name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
                self.skipped.append((name, "path points outside the zip"))
            elif "\n" in name or not _is_text(name):
                self.skipped.append((repr(name), "file name with a newline or broken encoding"))
            elif member.flag_bits & 1:
                self.skipped.append((name, "encrypted"))
            elif member.file_size > MAX_MEMBER_BYTES:
                self.skipped.append((name, f"larger than {MAX_MEMBER_BYTES >> 20} MiB unpacked"))
            elif name in members:
                self.skipped.append((name, "listed twice in the zip"))
            else:
                members[name] = member
        self.members = members
        self.names = sorted(members)

    def open(self, name: str) -> BinaryIO:
        member = self.members[name]
        try:
            with self.zip.open(member) as file:
                data = file.read(member.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise Unreadable(f"damaged in the zip: {error}") from error
        except (OSError, NotImplementedError, RuntimeError) as error:
            raise Unreadable(f"unreadable in the zip: {error}") from error
        if len(data) > member.file_size:
            raise Unreadable("larger than the zip declares")
        return io.BytesIO(data)


class MemorySource:
    """Files that are already in memory."""

    def __init__(self, path: Path, files: dict[str, bytes], skipped: list[tuple[str, str]]) -> None:
        self.path = path
        self.files = files
        self.names = sorted(files)
        self.skipped = skipped

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.files[name])


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts)


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def open_source(path: Path) -> Source:
    """Opens a folder or a zip.

    Raises:
        DataError: there is nothing at the path, it cannot be read, is neither, or holds no file.
    """
    source: Source
    try:
        if path.is_dir():
            source = FolderSource(path)
        elif not path.exists():
            raise DataError(f"{path}: no such folder or zip")
        elif zipfile.is_zipfile(path):
            source = ZipSource(path)
        else:
            with open(path, "rb"):  # an unreadable file is not a zip either: say which it is
                pass
            raise DataError(f"{path}: is neither a folder nor a (whole) zip file")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged zip file: {error}") from error
    if not source.names and not source.skipped:
        raise DataError(f"{path}: holds no files")
    return source
