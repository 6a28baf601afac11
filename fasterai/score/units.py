"""All units of a network in a row, and what is known of them spread over their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.granularity import along
from ..coupling.labels import PRODUCE
from ..coupling.units import Coupling

__all__ = ["Units"]


class Units:
    """The units of all axes, one after the other.

    Args:
        coupling: the axes.

    Attributes:
        size: U, how many there are.
        rows: for each weight that produces channels: (its name, the dimension of its filters,
            (P,) filters, (P,) their units).
    """

    def __init__(self, coupling: Coupling) -> None:
        starts, self.size = [], 0
        for axis in coupling.axes:
            starts.append(self.size)
            self.size += axis.size
        placed = list(zip(starts, coupling.axes, strict=True))
        self._of_class = torch.full((len(coupling.analysis.classes) + 1,), self.size)
        self._free = torch.zeros(self.size, dtype=torch.bool)
        for start, axis in placed:
            self._of_class[axis.classes] = start + torch.arange(axis.size)
            self._free[start + axis.free] = True
        self.rows = [
            (slot.parameter, slot.dim, slot.index, start + slot.unit)
            for start, axis in placed
            for slot in axis.having(PRODUCE)
        ]

    def of(self, classes: Tensor) -> Tensor:
        """The units of channels by their classes; `size` for what belongs to none."""
        return self._of_class[classes]  # a constant, -1, is in the last place

    def spread(self, values: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """For each weight, its filters' values, to be broadcast to its shape.

        A weight with a free filter of which nothing is known is left out. Pinned filters of which
        nothing is known are given the highest value.

        Args:
            values: (U,), nan where nothing is known.
            shapes: of the weights by name.
        """
        found: dict[str, Tensor] = {}
        dims = {name: dim for name, dim, _, _ in reversed(self.rows)}
        for name, dim in dims.items():
            known = values.new_full((shapes[name][dim],), torch.nan)
            free = torch.zeros(len(known), dtype=torch.bool, device=values.device)
            for other, over, index, unit in self.rows:
                if other == name and over == dim:
                    index, unit = index.to(values.device), unit.to(values.device)
                    known[index] = values[unit]
                    free[index] = self._free.to(values.device)[unit]
            unknown = known.isnan()
            if not bool((unknown & free).any() | unknown.all()):
                known = torch.where(unknown, known.nan_to_num(-torch.inf).max(), known)
                found[name] = along(known, dim, len(shapes[name]))
        return found
