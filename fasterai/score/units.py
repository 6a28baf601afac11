"""All units of a network in a row, and what is known of them spread over their weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from ..core.granularity import along
from ..coupling.labels import PRODUCE, SCALE, SHIFT
from ..coupling.units import Axis, Coupling, Slot

__all__ = ["Units"]


class Units:
    """The units of all axes, one after the other.

    Args:
        coupling: the axes.
        device: where all tensors are.
        norms: the modules that normalise each channel by itself.

    Attributes:
        size: U, how many there are.
        rows: for each weight that produces channels: (its name, the dimension of its filters,
            (P,) filters, (P,) their units).
        gates: the same for what each unit is multiplied with last, and what is added to it: the
            scales and shifts of such norms, where it has some, else weights and biases.
    """

    def __init__(
        self, coupling: Coupling, device: torch.device, norms: Collection[str] = ()
    ) -> None:
        self.size = sum(axis.size for axis in coupling.axes)
        of_class = torch.full((len(coupling.analysis.classes) + 1,), self.size)
        free = torch.zeros(self.size, dtype=torch.bool)
        self.rows: list[tuple[str, int, Tensor, Tensor]] = []
        self.gates: list[tuple[str, int, Tensor, Tensor]] = []
        start = 0
        for axis in coupling.axes:
            of_class[axis.classes] = start + torch.arange(axis.size)
            free[start + axis.free] = True
            for slot in axis.having(PRODUCE):
                index, unit = slot.index.to(device), (start + slot.unit).to(device)
                self.rows.append((slot.parameter, slot.dim, index, unit))
            for slot, own in _gates(axis, norms):
                index, unit = slot.index[own].to(device), (start + slot.unit[own]).to(device)
                self.gates.append((slot.parameter, slot.dim, index, unit))
            start += axis.size
        self._of_class, self._free = of_class.to(device), free.to(device)

    def of(self, classes: Tensor) -> Tensor:
        """The units of channels by their classes; `size` for what belongs to none."""
        return self._of_class[classes]  # a constant, -1, is in the last place

    def spread(
        self, values: Tensor, shapes: Mapping[str, torch.Size], seen: Tensor | None = None
    ) -> dict[str, Tensor]:
        """For each weight, its filters' values, to be broadcast to its shape.

        Weights without a shape, and those with a free filter of which nothing is known, are left
        out. Pinned filters of which nothing is known are given the highest value.

        Args:
            values: (U,).
            shapes: of the weights by name.
            seen: (U,) bool, where something is known; None for everywhere.
        """
        found: dict[str, Tensor] = {}
        seen = torch.ones_like(self._free) if seen is None else seen
        dims = {name: dim for name, dim, _, _ in reversed(self.rows) if name in shapes}
        for name, dim in dims.items():
            known = values.new_zeros(shapes[name][dim])
            free = torch.zeros_like(known, dtype=torch.bool)
            unknown = torch.ones_like(free)
            for other, over, index, unit in self.rows:
                if (other, over) == (name, dim):
                    known[index], free[index] = values[unit], self._free[unit]
                    unknown[index] = ~seen[unit]
            if not bool((unknown & free).any() | unknown.all()):
                highest = known.masked_fill(unknown, -torch.inf).max()
                found[name] = along(known.where(~unknown, highest), dim, len(shapes[name]))
        return found


def _gates(axis: Axis, norms: Collection[str]) -> Iterator[tuple[Slot, Tensor]]:
    """Slots, and which of their positions count; see `Units`."""
    scaled = torch.zeros(axis.size, dtype=torch.bool)
    for slot in axis.having(SCALE):
        if slot.module in norms:
            scaled[slot.unit] = True
    makers = {slot.module for slot in axis.having(PRODUCE)}
    for slot in axis.having(PRODUCE, SCALE, SHIFT):
        if slot.module in norms:
            yield slot, scaled[slot.unit]
        elif slot.module in makers:
            yield slot, ~scaled[slot.unit]
