"""What is left of a coupling after a cut: the same units under new labels, nothing tried anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from .analysis import Analysis
from .blocks import ranks
from .inputs import Inputs
from .labels import Dim, Factor
from .run import run_labels
from .units import Axis, Coupling, Slot

__all__ = ["remaining"]


def remaining(
    coupling: Coupling, kept: Mapping[Dim, Tensor], model: nn.Module, inputs: Inputs
) -> Coupling:
    """The coupling of a network that was cut.

    Its axes are those there were, in the same order, with the units that are left; so are blocks
    and pins. The last unit of an axis is pinned: nothing ranks it, as in a coupling that is made
    anew, where a single channel is no axis. Only the numbers that code multiplies with are looked
    up anew, as they may follow the widths.

    Args:
        coupling: of the network before the cut.
        kept: the positions that stayed of each dimension that was cut.
        model: the network after the cut.
        inputs: what it runs on.
    """
    renamed = _Renamed(coupling.analysis, kept)
    reasons = renamed.keys(coupling.reasons)
    axes = tuple(renamed.axis(axis) for axis in coupling.axes)
    left = Coupling(axes, renamed.analysis(), reasons)
    shapes = left.analysis.shapes
    said = run_labels(model, inputs.at_least(2), left.labels({}), shapes=shapes)
    factors = {i: _by_class(factor) for i, factor in said.factors.items()}
    return replace(left, analysis=replace(left.analysis, factors=factors))


def _by_class(factor: Factor) -> Factor:
    over = factor.over.numpy()
    return replace(factor, over=torch.from_numpy(np.unique(over[over >= 0])))


class _Renamed:
    """Labels count on from dimension to dimension: where some go, the others have new ones.

    A class is named by one of its labels. All labels of a class go, or none.
    """

    def __init__(self, said: Analysis, kept: Mapping[Dim, Tensor]) -> None:
        self.said, self.kept = said, kept
        alive = np.ones(len(said.classes), dtype=bool)
        for dim, index in kept.items():
            first = said.first[dim]
            alive[first : first + said.sizes[dim]] = False
            alive[first + index.numpy()] = True
        self.alive = alive
        self.place = np.where(alive, np.cumsum(alive) - 1, -1)

    def keys(self, by_class: Mapping[int, str]) -> dict[int, str]:
        """What is said of classes that are left."""
        return {int(self.place[c]): said for c, said in by_class.items() if self.alive[c]}

    def analysis(self) -> Analysis:
        """Without factors, and without the heads that only coupling looks at."""
        said, sizes, first, count = self.said, {}, {}, 0
        for dim, size in said.sizes.items():
            first[dim], sizes[dim] = count, len(self.kept[dim]) if dim in self.kept else size
            count += sizes[dim]
        grids = (self._grid(grid) for grid in said.grids)
        return replace(
            said,
            first=first,
            sizes=sizes,
            classes=self.place[said.classes[self.alive]],
            pinned=self.keys(said.pinned),
            mixed=self.keys(said.mixed),
            grids=tuple(grid for grid in grids if grid is not None),
            heads=(),
            factors={},
            read=said.read[self.alive],
        )

    def axis(self, axis: Axis) -> Axis:
        """With the units that are left, counted anew, as are their places in each block."""
        mine = torch.from_numpy(self.alive)[axis.classes]
        unit = torch.cumsum(mine, 0) - 1
        block = torch.unique(axis.block[mine], return_inverse=True)[1]
        pins = tuple(pin for pin, left in zip(axis.pins, mine.tolist(), strict=True) if left)
        return replace(
            axis,
            size=len(pins),
            slots=tuple(self._slot(slot, mine, unit) for slot in axis.slots),
            pins=pins if len(pins) > 1 else tuple(pin or "the last one" for pin in pins),
            classes=torch.from_numpy(self.place)[axis.classes[mine]],
            block=block,
            place=torch.from_numpy(ranks(block.numpy(), axis.place[mine].numpy())),
        )

    def _slot(self, slot: Slot, mine: Tensor, unit: Tensor) -> Slot:
        left = mine[slot.unit]
        index, dim = slot.index[left], slot.dimension
        if dim in self.kept:
            index = torch.searchsorted(self.kept[dim], index)
        return replace(slot, index=index, unit=unit[slot.unit[left]])

    def _grid(self, grid: np.ndarray) -> np.ndarray | None:
        """A grid without what is gone; None where that is none."""
        lost = (grid >= 0) & ~self.alive[grid]
        for d in range(grid.ndim):
            whole = lost.all(axis=tuple(k for k in range(grid.ndim) if k != d))
            if whole.any() and not whole.all():
                grid, lost = (np.compress(~whole, x, axis=d) for x in (grid, lost))
        stay = (~lost).sum(axis=-1)
        if not stay.size or (stay != stay.flat[0]).any() or not stay.flat[0]:
            return None
        grid = grid[~lost].reshape(*grid.shape[:-1], stay.flat[0])
        return np.where(grid >= 0, self.place[grid], -1)
