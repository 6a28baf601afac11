"""Labels beside tensors: what a run of a network says about its channels.

Every position along every dimension of every parameter has a label, an integer. Beside each real
tensor the run carries label fields that say, for each element, which position of which parameter
it came from. Where two fields meet in an operation their labels belong together; where a field
meets something of fixed size it is pinned. Which operation does what is told in `rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..core.names import raw_tensors

__all__ = [
    "AVERAGED",
    "FIXED",
    "NORMALISED",
    "Arrival",
    "Dim",
    "Factor",
    "Field",
    "Run",
    "dims_of",
]

FIXED = -1  # a position that belongs to no parameter: a constant, padding, an input

# What a parameter's positions do: produce a channel, scale or shift it, follow it (running
# statistics), consume it.
PRODUCE, SCALE, SHIFT, FOLLOW, CONSUME = "produce", "scale", "shift", "follow", "consume"

NORMALISED = "normalised over channels: their statistics change with the number of them"
AVERAGED = "mean over channels"  # by a norm that is written out, as a rule


class Dim(NamedTuple):
    """One dimension of a parameter or buffer, by its name in the state dict."""

    parameter: str
    dim: int


@dataclass(frozen=True, eq=False)
class Field:
    """Labels of a tensor along one of its dimensions.

    Args:
        labels: int64, as many dimensions as the tensor, size 1 where they do not vary. They vary
            along one dimension as a rule; along several where a view has split the channels.
        source: the dimension of the parameter, while the tensor is computed from that alone.
    """

    labels: Tensor
    source: Dim | None = None

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """The dimensions along which the labels vary."""
        return tuple(d for d, n in enumerate(self.labels.shape) if n > 1)


@dataclass(frozen=True, eq=False)
class Arrival:
    """What arrives at a layer that reads channels.

    Args:
        labels: (K,) the channel at each position that is read.
        low: (K,) the smallest value there; `high` the largest.
        moving: (K,) bool, whether anything but zero weights made the channel.
        reader: the dimension of the weight that reads them; None where something else does.
        padded: zeros beside the map are read with it.
        biased: a bias is added to what the layer makes.
        summed: no layer, but a reduction over channels.
    """

    labels: Tensor
    low: Tensor
    high: Tensor
    moving: Tensor
    reader: Dim | None = None
    padded: bool = False
    biased: bool = False
    summed: bool = False


@dataclass(frozen=True, eq=False)
class Factor:
    """A number that something is multiplied with.

    Args:
        over: labels of the channels which are multiplied, or over which a product was taken.
        value: the number.
        product: whether it is a product over channels that is multiplied.
    """

    over: Tensor
    value: float
    product: bool


@dataclass
class Run:
    """What one run said: meetings, pins, roles, and how channels were laid out.

    Attributes:
        meetings: pairs of label vectors that belong together, position by position.
        pins: labels that cannot be removed, and why.
        mixed: labels whose channels an operation mixes (a layer norm), and which.
        factors: for the first, second, ... multiplication with a number, what was multiplied.
        grids: labels of channels that a view or an operation splits into a grid; a cut must
            leave a grid.
        heads: labels of the channels of attention heads, (heads, width) each.
        roles: what parameters' positions do.
        consumed: labels that a next layer reads.
        arrivals: what arrives there, where numbers are watched.
        followed: weights whose output goes through a batch norm, and its running mean.
        used: how many operations use the output of a weight.
        order: parameters in the order in which they made channels.
        outputs: labels of the network's outputs.
        touched: parameters and buffers that an operation read.
        trail: the operations that were carried out on shapes, one after the other.
    """

    meetings: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    mixed: list[tuple[Tensor, str]] = field(default_factory=list)
    factors: dict[int, Factor] = field(default_factory=dict)
    grids: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    roles: set[tuple[Dim, str]] = field(default_factory=set)
    consumed: list[Tensor] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    followed: dict[str, str] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    trail: list[Any] = field(default_factory=list)


def dims_of(model: nn.Module) -> dict[Dim, Tensor]:
    """All dimensions of more than one position of the floating parameters and buffers."""
    return {
        Dim(name, d): tensor
        for name, tensor in raw_tensors(model).items()
        if tensor.is_floating_point()
        for d, size in enumerate(tensor.shape)
        if size > 1
    }
