"""Labels beside tensors: what a run of a network says about its channels.

Every position along every dimension of every parameter has a label, an integer. Beside each real
tensor the run carries label fields that say, for each element, which position of which parameter
it came from. Where two fields meet in an operation their labels belong together; where a field
meets something of fixed size it is pinned. Which operation does what is told in `rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FIXED", "Dim", "Field", "Run", "Tracer", "dims_of"]

FIXED = -1  # a position that belongs to no parameter: a constant, padding, an input

# What a parameter's positions do: produce a channel, scale or shift it, follow it (running
# statistics), consume it.
PRODUCE, SCALE, SHIFT, FOLLOW, CONSUME = "produce", "scale", "shift", "follow", "consume"


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter or buffer, by its name in the state dict."""

    parameter: str
    dim: int


@dataclass(frozen=True, eq=False)
class Field:
    """Labels of a tensor along one of its dimensions.

    Args:
        labels: int64, as many dimensions as the tensor, size 1 where they do not vary.
        source: the dimension of the parameter, while the tensor is that parameter or a view.
    """

    labels: Tensor
    source: Dim | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions along which the labels vary."""
        return tuple(d for d, n in enumerate(self.labels.shape) if n > 1)


@dataclass
class Run:
    """What one run said: meetings, pins and roles."""

    meetings: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    roles: set[tuple[Dim, str]] = field(default_factory=set)
    consumed: list[Tensor] = field(default_factory=list)
    peaks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def dims_of(model: nn.Module) -> dict[Dim, Tensor]:
    """All dimensions of more than one position of the floating parameters and buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        Dim(name, d): tensor
        for name, tensor in named
        if tensor.is_floating_point()
        for d, size in enumerate(tensor.shape)
        if size > 1
    }


class Tracer(TorchDispatchMode):
    """Carries label fields beside the tensors of a run; `said` is what it found.

    Args:
        model: the network that will run under it.
        labels: for each dimension, the labels of its positions.
        follow: passes labels through an operation: (tracer, operation, args, kwargs, result).
        watch: note the largest magnitude with which each channel arrives at its consumers.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Mapping[Dim, Tensor],
        follow: Callable[..., None],
        *,
        watch: bool = False,
    ) -> None:
        super().__init__()
        self.follow = follow
        self.said = Run()
        self.watch = watch
        self.fields = WeakTensorKeyDictionary()
        for dim, tensor in dims_of(model).items():
            shape = [1] * tensor.ndim
            shape[dim.dim] = -1
            known = self.fields.get(tensor, ())
            self.fields[tensor] = (*known, Field(labels[dim].to(tensor.device).view(shape), dim))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.follow(self, func, args, kwargs or {}, out)
        return out

    def of(self, x: Any) -> tuple[Field, ...]:
        """The fields of a tensor; none for anything else."""
        return self.fields.get(x, ()) if isinstance(x, Tensor) else ()

    def along(self, x: Any, dim: int) -> Field | None:
        """The field of `x` that varies along `dim`, if it has one."""
        return next((f for f in self.of(x) if dim % x.ndim in f.dims), None)

    def attach(self, out: Tensor, fields: Sequence[Field | None]) -> None:
        """Give `out` these fields; integers carry none, for they are counts and indices."""
        if out.is_floating_point() or out.is_complex() or out.dtype == torch.bool:
            self.fields[out] = tuple(f for f in fields if f is not None)
        else:
            self.pin(fields, "made an integer")

    def join(self, a: Field, b: Field) -> None:
        """The labels of two fields, broadcast against each other, belong together."""
        left, right = torch.broadcast_tensors(a.labels, b.labels)
        self.said.meetings.append((left.flatten(), right.flatten()))

    def pin(self, fields: Sequence[Field | None], reason: str) -> None:
        """What these fields label cannot be removed."""
        for f in fields:
            if f is not None:
                self.said.pins.append((f.labels.flatten(), reason))

    def mark(self, f: Field | None, role: str) -> None:
        """Note what a parameter's positions do, where the field is a parameter's own."""
        if f is not None and f.source is not None:
            self.said.roles.add((f.source, role))
            if role == PRODUCE and f.source.parameter not in self.said.order:
                self.said.order.append(f.source.parameter)

    def consume(self, x: Tensor, seen: Field) -> None:
        """The channels of `x` labelled by `seen` are read by a next layer."""
        self.said.consumed.append(seen.labels.flatten())
        if self.watch and x.numel():
            others = [d for d in range(x.ndim) if d not in seen.dims]
            peak = x.abs().amax(dim=others) if others else x.abs()
            self.said.peaks.append((seen.labels.flatten(), peak.flatten().double()))
