"""Files that are replaced as a whole, and folders that can take them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when the block ends; where it fails, `path` stays as it was.

    After it neither a crash nor a power cut leaves half a file: the content is on the disk before it gets its name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Make `text` the content of `path`, all of it or nothing."""
    with replacing(path) as file:
        file.write(text.encode())


def check_folder(folder: Path) -> None:
    """Raise OSError unless files can be written to `folder`, or to where it would have to be made; changes nothing."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    with tempfile.TemporaryFile(dir=there):  # permissions alone do not tell of a read-only disk
        pass
