"""All units of a network in a row, and what is known of them spread over their weights."""

from __future__ import annotations

from collections.abc import Mapping

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
        device: where all tensors are.

    Attributes:
        size: U, how many there are.
        rows: for each weight that produces channels: (its name, the dimension of its filters,
            (P,) filters, (P,) their units).
    """

    def __init__(self, coupling: Coupling, device: torch.device) -> None:
        self.size = sum(axis.size for axis in coupling.axes)
        of_class = torch.full((len(coupling.analysis.classes) + 1,), self.size)
        free = torch.zeros(self.size, dtype=torch.bool)
        self.rows: list[tuple[str, int, Tensor, Tensor]] = []
        start = 0
        for axis in coupling.axes:
            of_class[axis.classes] = start + torch.arange(axis.size)
            free[start + axis.free] = True
            for slot in axis.having(PRODUCE):
                index, unit = slot.index.to(device), (start + slot.unit).to(device)
                self.rows.append((slot.parameter, slot.dim, index, unit))
            start += axis.size
        self._of_class, self._free = of_class.to(device), free.to(device)

    def of(self, classes: Tensor) -> Tensor:
        """The units of channels by their classes; `size` for what belongs to none."""
        return self._of_class[classes]  # a constant, -1, is in the last place

    def spread(self, values: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """For each weight, its filters' values, to be broadcast to its shape.

        Weights without a shape, and those with a free filter of which nothing is known, are left
        out. Pinned filters of which nothing is known are given the highest value.

        Args:
            values: (U,), nan where nothing is known.
            shapes: of the weights by name.
        """
        found: dict[str, Tensor] = {}
        dims = {name: dim for name, dim, _, _ in reversed(self.rows) if name in shapes}
        for name, dim in dims.items():
            known = values.new_full((shapes[name][dim],), torch.nan)
            free = torch.zeros_like(known, dtype=torch.bool)
            for other, over, index, unit in self.rows:
                if (other, over) == (name, dim):
                    known[index], free[index] = values[unit], self._free[unit]
            unknown = known.isnan()
            if not bool((unknown & free).any() | unknown.all()):
                known = torch.where(unknown, known.nan_to_num(-torch.inf).max(), known)
                found[name] = along(known, dim, len(shapes[name]))
        return found
