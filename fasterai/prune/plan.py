"""A plan: what a cut keeps, as a value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..coupling.probe import Removal, positions_kept
from ..coupling.units import Axis, Coupling

__all__ = ["AxisCut", "Plan", "make_plan"]


@dataclass(frozen=True)
class AxisCut:
    """How many units of an axis there were and are; `name` is the layer that produces them."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Plan:
    """Which positions stay along each dimension that is cut, and what that saves.

    Args:
        kept: parameter or buffer name -> dimension -> the positions that stay, ascending.
        axes: the widths, one entry for each axis of the network.
        parameters_before: parameters of the network as it was.
        parameters_after: parameters of the network once cut.
    """

    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    axes: tuple[AxisCut, ...]
    parameters_before: int
    parameters_after: int

    @property
    def removed(self) -> int:
        """How many units go."""
        return sum(a.before - a.after for a in self.axes)

    def __repr__(self) -> str:
        return (
            f"Plan(removes {self.removed} of {sum(a.before for a in self.axes)} units, "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters)"
        )


def make_plan(model: nn.Module, coupling: Coupling, axes: Sequence[Axis], remove: Removal) -> Plan:
    """The plan of a removal, before it is carried out."""
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for dim, index in positions_kept(coupling, axes, remove).items():
        kept.setdefault(dim.parameter, {})[dim.dim] = tuple(index.tolist())
    before = after = 0
    for name, p in model.named_parameters():
        cuts = kept.get(name, {})
        before += p.numel()
        after += math.prod(len(cuts[d]) if d in cuts else n for d, n in enumerate(p.shape))
    lost = {a: int(units.sum()) for a, units in remove.items()}
    widths = (AxisCut(x.name, x.size, x.size - lost.get(a, 0)) for a, x in enumerate(axes))
    return Plan(kept, tuple(widths), before, after)
