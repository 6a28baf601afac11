"""A plan: what a cut keeps, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AxisCut", "Plan"]


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
