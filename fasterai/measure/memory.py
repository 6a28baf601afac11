"""How much memory activations take at once, and how the C library keeps it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..coupling.inputs import Inputs, run_quietly, tensors_in

__all__ = ["keep_freed_memory", "peak_bytes"]


def keep_freed_memory() -> None:
    """Let the C library keep freed memory of up to 32 MB, before anything is timed.

    glibc gives it back to the system until a tensor of that size was freed once (mallopt(3),
    M_MMAP_THRESHOLD), and a forward of MobileNetV2 spends a quarter of its time on getting its
    pages anew. Sooner or later a process passes that point, and ratios to what was timed before
    are wrong then. Elsewhere nothing happens.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


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
