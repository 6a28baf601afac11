"""Files that are written as a whole or not at all, and what tells that they are damaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from types import MappingProxyType

import torch
from safetensors.torch import save
from torch import Tensor

__all__ = ["digest", "holds", "replacing", "writable"]


def holds(dtype: torch.dtype) -> bool:
    """Whether safetensors files can hold such numbers."""
    try:
        save({"x": torch.empty(0, dtype=dtype)})
    except Exception:  # it raises a KeyError of its own table
        return False
    return True


def writable(file: str | os.PathLike[str]) -> Path:
    """The path of a file that can be written; of a link, that of what it leads to.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: it is a folder.
        FileExistsError: it is something else than a file, such as a device.
    """
    file = Path(file)
    if file.is_symlink():
        file = Path(os.path.realpath(file))
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: name a file in it")
    if file.exists() and not file.is_file():
        raise FileExistsError(f"{file} is no file that could be replaced: name another one")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent} for {file.name}: make it first")
    return file


@contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside a file, to be written: in the end it takes the file's place, or it goes.

    Each has a name of its own, so that several processes may write one file. Of a link it is the
    file that it leads to.
    """
    file = os.path.realpath(file) if os.path.islink(file) else file
    part = Path(f"{os.fspath(file)}.{token_hex(4)}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, str] = MappingProxyType({})) -> str:
    """SHA-256 of tensors, their names and what is said of them, but for the entry "digest"."""
    rest = sorted((key, value) for key, value in about.items() if key != "digest")
    shown = [(name, str(x.dtype), list(x.shape)) for name, x in sorted(tensors.items())]
    found = hashlib.sha256(json.dumps([rest, shown]).encode())
    for _, x in sorted(tensors.items()):
        flat = x.detach().cpu().reshape(-1)
        flat = flat.as_strided((x.numel(),), (1,))  # one element has any stride
        found.update(flat.view(torch.uint8).numpy())
    return found.hexdigest()
