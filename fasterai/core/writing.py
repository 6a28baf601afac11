"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

__all__ = ["replacing", "writable"]


def writable(file: str | os.PathLike[str]) -> Path:
    """The path of a file that can be written.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: it is a folder.
    """
    file = Path(file)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: name a file in it")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent} for {file.name}: make it first")
    return file


@contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside a file, to be written: in the end it takes the file's place, or it goes.

    Each has a name of its own, so that several processes may write one file.
    """
    part = Path(f"{os.fspath(file)}.{token_hex(4)}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
