"""How much memory activations take at once, and how the C library keeps it."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..coupling.inputs import Inputs, run_quietly, tensors_in

__all__ = ["freed_memory_kept", "peak_bytes"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # <malloc.h>


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the C library keep the memory that is freed, while networks are timed.

    glibc takes tensors above 32 MB, and smaller ones at first, from the system and gives them back
    (mallopt(3)), so that each forward gets its pages anew: half of the time of MobileNetV2 for 16
    images, where a tensor is just above that size, and nothing where a narrower one is just below.
    What servers use instead, jemalloc or tcmalloc, keeps them, as other systems do. Afterwards
    memory is given back, and the limits are those that glibc comes to by itself, 32 and 64 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUN")) for name in os.environ):
        yield  # another library, or limits of the user's own
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, 2**16)
        mallopt(_MMAP_THRESHOLD, 2**25)
        mallopt(_TRIM_THRESHOLD, 2**26)
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(model: nn.Module, inputs: Inputs) -> int | None:
    """The most bytes that activations take at once, in a forward in eval mode without gradients.

    Weights and inputs are not among them. On a GPU that is what torch's allocator hands out, the
    kernels' own workspace included, and its peak statistics start anew; elsewhere it is the
    tensors that are alive between operations.

    Args:
        model: the network; it is left as it was.
        inputs: the batch.

    Returns:
        Bytes; None where the network cannot be looked at.
    """
    with run_quietly(model):
        copies = inputs.copies()
        device = copies.tensors[0].device
        if device.type == "cuda":
            return _on_gpu(model, copies, device)
        fixed = [*model.parameters(), *model.buffers(), *copies.tensors]
        alive = _Alive([x.untyped_storage() for x in fixed])
        try:
            with alive:
                model(*copies.args, **copies.kwargs)
        except Exception:  # a network that cannot run inside a dispatch mode
            return None
    return alive.peak


def _on_gpu(model: nn.Module, copies: Inputs, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(*copies.args, **copies.kwargs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as they live.

    Args:
        fixed: storages that do not count.
    """

    def __init__(self, fixed: list[torch.UntypedStorage]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._fixed = fixed  # kept alive: an address is not given out again
        self._known: dict[int, Any] = {s._cdata: None for s in fixed}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tensors_in(out):
            self._see(x.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
