"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` when the block succeeds.

    The data is flushed to disk before the rename; if the block raises, the temporary file is
    removed and `path` is left as it was.

    Args:
        path: the file to write; missing parent directories are created.

    Raises:
        OSError: the directory cannot be written, or the disk is full.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private
        os.replace(temporary, target)
    except OSError as error:
        error.filename = error.filename or str(target)  # a write's has none
        raise
    finally:
        temporary.unlink(missing_ok=True)
