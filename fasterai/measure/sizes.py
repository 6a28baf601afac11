"""How large the files are that a network is saved in."""

from __future__ import annotations

import io
from gzip import GzipFile
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from ..core.names import unwrapped
from ..core.packing import packed

__all__ = ["gzip_bytes", "saved_bytes", "sparse_bytes"]


class _Counter(io.RawIOBase):
    """A file that only knows how much was written into it."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        n = memoryview(data).nbytes
        self.size += n
        return n


def saved_bytes(model: nn.Module) -> int:
    """How large a file `torch.save` makes of the state dict."""
    file = _Counter()
    torch.save(model.state_dict(), file)
    return file.size


def gzip_bytes(model: nn.Module, level: int = 6) -> int:
    """How large a file gzip makes of what `torch.save` writes.

    Args:
        model: the network.
        level: of compression; 6 is that of the command.
    """
    file = _Counter()
    with GzipFile(fileobj=file, mode="wb", filename="", mtime=0, compresslevel=level) as packing:
        torch.save(model.state_dict(), packing)
    return file.size


def sparse_bytes(model: nn.Module) -> int | None:
    """How large a file `save_sparse` makes; None where it takes no such tensors."""
    try:
        parts, about = packed(unwrapped(model).state_dict())
    except TypeError:  # quantized ones, say
        return None
    return len(save(parts, about | {"digest": "0" * 64}))
