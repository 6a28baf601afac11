"""How a labelled run executes operations: with numbers, or with shapes alone.

Labels need no numbers. With shapes alone (PyTorch's meta tensors) a network of any size runs in
milliseconds and in no memory; constants, which the code of a network may look at, are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .inputs import map_tensors
from .labels import Tracer

__all__ = ["Muted", "Shapes", "numbers"]

_META = torch.device("meta")


def numbers(t: Tracer, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Execute the operation as it is."""
    return func(*args, **kwargs)


class Shapes:
    """Execute operations on shapes alone, wherever labels or results of such are involved.

    Args:
        device: where constants are made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.twins = WeakTensorKeyDictionary()

    def __call__(
        self, t: Tracer, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if not any(_abstract(t, x) for x in _flat((args, tuple(kwargs.values())))):
            if kwargs.get("device") == _META:
                kwargs = {**kwargs, "device": self.device}
            return func(*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        if func in _OUTLINES:
            return _OUTLINES[func](*args)
        origin: dict[int, Tensor] = {}
        swapped = map_tensors((args, dict(kwargs)), lambda x: self._twin(x, origin))
        out = func(*swapped[0], **swapped[1])
        return map_tensors(out, lambda x: self._original(t, x, origin)) if origin else out

    def _twin(self, x: Tensor, origin: dict[int, Tensor]) -> Tensor:
        if x.is_meta:
            return x
        twin = self.twins.get(x)
        if twin is None or twin.shape != x.shape:
            twin = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_META)
            self.twins[x] = twin
        origin[id(twin)] = x
        return twin

    @staticmethod
    def _original(t: Tracer, x: Tensor, origin: Mapping[int, Tensor]) -> Tensor:
        known = origin.get(id(x), x)
        if known is not x:  # written in place: its numbers are no longer known
            t.fields.setdefault(known, ())
        return known


def _same(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, device=_META)


def _batch_normalised(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _same(x), torch.empty(0, device=_META), torch.empty(0, device=_META)


def _layer_normalised(x: Tensor, over: Sequence[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = [*x.shape[: x.ndim - len(over)], *[1] * len(over)]
    statistics = torch.empty(shape, dtype=x.dtype, device=_META)
    return _same(x), statistics, statistics.clone()


# What common operations make, where PyTorch takes its time to find that out.
_OUTLINES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_layer_norm.default: _layer_normalised,
    torch.ops.aten.native_batch_norm.default: _batch_normalised,
    torch.ops.aten._softmax.default: _same,
    torch.ops.aten._safe_softmax.default: _same,
    torch.ops.aten.relu.default: _same,
    torch.ops.aten.gelu.default: _same,
    torch.ops.aten.silu.default: _same,
    torch.ops.aten.sigmoid.default: _same,
    torch.ops.aten.tanh.default: _same,
    torch.ops.aten.hardswish.default: _same,
    torch.ops.aten.hardsigmoid.default: _same,
    torch.ops.aten.hardtanh.default: _same,
}


class Muted:
    """Execute with numbers, but let every layer read zeros from some channels.

    Args:
        alive: bool, for each label whether it is heard; the last entry is that of FIXED.
    """

    def __init__(self, alive: Tensor) -> None:
        self.alive = alive

    def __call__(
        self, t: Tracer, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func in _READING:
            args = tuple(self._mute(t, x) if isinstance(x, Tensor) else x for x in args)
        return func(*args, **kwargs)

    def _mute(self, t: Tracer, x: Tensor) -> Tensor:
        for f in t.of(x):
            if f.source is None:
                x = torch.where(self.alive[f.labels].to(x.device), x, 0)
        return x


_READING = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.sum.dim_IntList,
}


def _abstract(t: Tracer, x: Tensor) -> bool:
    return x.is_meta or x in t.fields


def _flat(tree: Any) -> list[Tensor]:
    """The tensors in nested lists and tuples."""
    found: list[Tensor] = []
    for x in tree:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found.extend(_flat(x))
    return found
