"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

__all__ = ["replacing"]


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
