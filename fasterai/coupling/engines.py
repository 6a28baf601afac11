"""How a labelled run executes operations: with numbers, or with shapes alone.

Labels need no numbers. With shapes alone (PyTorch's meta tensors) a network of any size runs in
milliseconds and in no memory; constants, which the code of a network may look at, are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .inputs import map_tensors, operands_in
from .tracer import Beside, Made, Tracer

__all__ = ["Literals", "Muted", "Shapes", "numbers"]

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
        self.twins = Beside()

    def __call__(
        self, t: Tracer, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if not any(_abstract(t, x) for x in operands_in((*args, *kwargs.values()))):
            if kwargs.get("device") == _META:
                kwargs = {**kwargs, "device": self.device}
            return func(*args, **kwargs)
        t.said.trail.append(func)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        outline = _OUTLINES.get(func)
        if outline is not None:
            out = outline(*args)
            if out is not None:
                return out
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


class Literals(TorchFunctionMode):
    """Tensors of given numbers keep them, where code makes them on the device of its input."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")) == "meta":
            kwargs = {**kwargs, "device": self.device}
        return func(*args, **kwargs)


# --- what common operations make, where PyTorch takes its time to find that out -------------------


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=_META)  # new_empty asks Python


def _same(x: Tensor, *_: Any) -> Tensor:
    return _empty(x, x.shape) if x.is_contiguous() else torch.empty_like(x, device=_META)


def _dropped(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _same(x), torch.empty_like(x, dtype=torch.bool, device=_META)


def _met(a: Tensor, b: Tensor | float, *_: Any) -> Tensor | None:
    """A sum or product of two; None where types or layouts differ and PyTorch has to tell."""
    if not a.is_floating_point():
        return None
    if not isinstance(b, Tensor):
        return None if isinstance(b, complex) else _same(a)
    if a.dtype != b.dtype or not (a.is_contiguous() and b.is_contiguous()):
        return None
    return _empty(a, a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape))


def _multiplied(a: Tensor, b: Tensor) -> Tensor:
    return _empty(a, (*a.shape[:-1], b.shape[-1]))


def _added_and_multiplied(_: Tensor, a: Tensor, b: Tensor, *__: Any) -> Tensor:
    return _multiplied(a, b)


def _convolved(x: Tensor, weight: Tensor, _: Any, *how: Any) -> Tensor | None:
    """None where it is transposed or does not fit, which PyTorch has to tell."""
    stride, padding, dilation, transposed, _, groups = how
    if transposed or x.ndim != weight.ndim or x.shape[1] != weight.shape[1] * groups:
        return None
    if weight.shape[0] % groups or not x.is_contiguous():
        return None
    shape = [x.shape[0], weight.shape[0]]
    window = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    shape += [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in window]
    return _empty(x, shape) if min(shape) > 0 else None


def _side_by_side(parts: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """None where types, layouts or shapes differ and PyTorch has to tell."""
    first, kinds = parts[0], {(x.dtype, x.ndim, x.is_contiguous()) for x in parts}
    if kinds != {(first.dtype, first.ndim, True)} or not first.ndim:
        return None
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(first.ndim)
    if last is not None and any(x.is_contiguous(memory_format=last) for x in parts):
        return None  # with a single channel, or at a single place, it is both
    shapes = [list(x.shape) for x in parts]
    along = [shape.pop(dim) for shape in shapes]  # also counts from the end
    if any(shape != shapes[0] for shape in shapes):
        return None
    shapes[0].insert(dim % first.ndim, sum(along))
    return _empty(first, shapes[0])


def _batch_normalised(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _same(x), _empty(x, (0,)), _empty(x, (0,))


def _layer_normalised(
    x: Tensor, over: Sequence[int], *_: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """None where it does not fit, which PyTorch has to tell."""
    if list(x.shape[x.ndim - len(over) :]) != list(over):
        return None
    shape = [*x.shape[: x.ndim - len(over)], *[1] * len(over)]
    return _same(x), _empty(x, shape), _empty(x, shape)


_OUTLINES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.convolution.default: _convolved,
    torch.ops.aten.native_layer_norm.default: _layer_normalised,
    torch.ops.aten.native_batch_norm.default: _batch_normalised,
    torch.ops.aten._native_batch_norm_legit_no_training.default: _batch_normalised,
    torch.ops.aten.native_dropout.default: _dropped,
    torch.ops.aten.mm.default: _multiplied,
    torch.ops.aten.bmm.default: _multiplied,
    torch.ops.aten.addmm.default: _added_and_multiplied,
    torch.ops.aten.cat.default: _side_by_side,
    torch.ops.aten.add.Tensor: _met,
    torch.ops.aten.sub.Tensor: _met,
    torch.ops.aten.mul.Tensor: _met,
    torch.ops.aten.div.Tensor: _met,
    torch.ops.aten.mul.Scalar: _met,
    torch.ops.aten.div.Scalar: _met,
    **dict.fromkeys(
        (
            torch.ops.aten._softmax.default,
            torch.ops.aten._safe_softmax.default,
            torch.ops.aten.relu.default,
            torch.ops.aten.gelu.default,
            torch.ops.aten.silu.default,
            torch.ops.aten.sigmoid.default,
            torch.ops.aten.tanh.default,
            torch.ops.aten.hardswish.default,
            torch.ops.aten.hardsigmoid.default,
            torch.ops.aten.hardtanh.default,
            torch.ops.aten.roll.default,
        ),
        _same,
    ),
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
        if func in _READING or func._schema.name in _READING_TOO:
            made = t.made_of([x for x in args if t.of(x)])
            if made is not Made.BUFFERS:
                whole = made is Made.PARAMETERS
                args = tuple(self._mute(t, x, whole) if t.of(x) else x for x in args)
        return func(*args, **kwargs)

    def _mute(self, t: Tracer, x: Tensor, whole: bool) -> Tensor:
        """Silence in activations, and in parameters (`whole`) where they make activations."""
        for f in t.of(x):
            if (whole or f.source is None) and not self.alive[f.labels].all():
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
_READING_TOO = {"aten::mv", "aten::addmv", "aten::dot", "torchvision::deform_conv2d"}
_READING_TOO |= {"aten::_trilinear", "aten::_grouped_mm", "aten::linalg_vector_norm", "aten::norm"}


def _abstract(t: Tracer, x: Tensor) -> bool:
    return x.is_meta or x in t.fields
