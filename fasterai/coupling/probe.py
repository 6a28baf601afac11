"""Whether a network can be cut where its labels allow it: try, replay, take back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..core.granularity import along
from ..core.names import raw_tensors
from .inputs import Inputs
from .labels import CONSUME, PRODUCE, SHIFT, Dim, Factor
from .mending import mends
from .norms import narrowed
from .replay import replay
from .surgery import Cut, Step, positions_by_name, selected, shadowed
from .units import Axis, Coupling, Slot

__all__ = [
    "Removal",
    "broken",
    "compensation",
    "cutting",
    "gone",
    "left_alone",
    "positions_kept",
    "settle",
    "wiring",
]

# For some axes, by their place in the list of all: bool (size,), True = this unit goes.
Removal = Mapping[int, Tensor]
T = TypeVar("T", bound=Hashable)


def gone(coupling: Coupling, axes: Sequence[Axis], remove: Removal) -> np.ndarray:
    """(labels,) bool: the classes of the removed units."""
    mark = np.zeros(len(coupling.analysis.classes), dtype=bool)
    for a, units in remove.items():
        mark[axes[a].classes[units].numpy()] = True
    return mark


def positions_kept(coupling: Coupling, axes: Sequence[Axis], remove: Removal) -> dict[Dim, Tensor]:
    """The positions that stay along each dimension that loses some."""
    said = coupling.analysis
    lost = gone(coupling, axes, remove)[said.classes]
    dims, starts = list(said.first), np.fromiter(said.first.values(), dtype=np.int64)
    stays: dict[Dim, Tensor] = {}
    for i in np.unique(np.searchsorted(starts, np.flatnonzero(lost), side="right") - 1).tolist():
        mine = lost[starts[i] : starts[i] + said.sizes[dims[i]]]
        stays[dims[i]] = torch.from_numpy(np.flatnonzero(~mine))
    return stays


def cutting(
    model: nn.Module,
    coupling: Coupling,
    axes: Sequence[Axis],
    remove: Removal,
    *,
    exact: bool = False,
    scales: Mapping[Dim, Tensor] = MappingProxyType({}),
    added: Mapping[str, Tensor] = MappingProxyType({}),
) -> Cut:
    """How to cut these units out.

    Args:
        model: the network.
        coupling: what its labels say.
        axes: its axes.
        remove: the units.
        exact: they are zero: norms remember their width.
        scales: factors along dimensions, one for each position before the cut.
        added: parameter or buffer name -> what is added to it, in its size before the cut.
    """
    kept = positions_kept(coupling, axes, remove)
    lost = gone(coupling, axes, remove)
    integers = mends(model, coupling.analysis, lost, kept, exact=exact)
    attributes: dict[nn.Module, dict[str, Any]] = {}
    if exact:
        attributes, more = narrowed(model, kept, coupling.analysis.sizes)
        scales = {**more, **scales}
    return Cut(kept, integers, _steps(model, kept, scales, added), attributes)


def _steps(
    model: nn.Module,
    kept: Mapping[Dim, Tensor],
    scales: Mapping[Dim, Tensor],
    added: Mapping[str, Tensor],
) -> dict[str, list[Step]]:
    """What is added first, then the factors; of all of it what the cut leaves."""
    if not scales and not added:
        return {}
    cuts = positions_by_name(kept)
    ndims = {name: x.ndim for name, x in raw_tensors(model).items()}
    steps: dict[str, list[Step]] = {}
    for name, value in added.items():
        steps.setdefault(name, []).append(Step(selected(value, cuts.get(name, {})), False))
    for dim, scale in scales.items():
        left = scale[kept[dim]] if dim in kept else scale
        factor = along(left, 0, ndims[dim.parameter] - dim.dim)
        steps.setdefault(dim.parameter, []).append(Step(factor, True))
    return steps


def wiring(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    axes: Sequence[Axis],
    remove: Removal,
    *,
    modes: Sequence[bool] = (False, True),
    exact: bool = False,
) -> tuple[str | None, list[Factor]]:
    """Why these units cannot be cut, or None, tried without touching the model's tensors.

    The second value tells which factors change with the cut; see `replay`, also for `modes`.
    """
    how = cutting(model, coupling, axes, remove, exact=exact)
    try:
        with shadowed(model, how, shapes=coupling.analysis.shapes):
            alone = left_alone(coupling, how.kept)
            return None, replay(model, inputs, coupling, how.kept, alone, modes=modes)
    except Exception as error:  # whatever a cut network may raise
        return broken(error), []


def compensation(
    coupling: Coupling, axes: Sequence[Axis], changes: Sequence[Factor]
) -> dict[Dim, Tensor]:
    """What to multiply producers with, so that factors that change with the cut do not count.

    A factor of a product over channels (of queries with keys) goes into one side of it: the last
    layer that makes them, or, where one layer makes both, its last rows. Where the same rows make
    both, half of it goes into them.
    """
    found: dict[Dim, Tensor] = {}
    made = {name: i for i, name in enumerate(coupling.analysis.order)}
    for change in changes:
        concerned = []
        for axis in axes:
            units = torch.isin(axis.classes, change.over)
            slots = [s for s in axis.having(PRODUCE) if units[s.unit].any()]
            if slots:  # what was multiplied may have learned rows as well as channels
                last = max((made.get(s.parameter, -1), s.dim) for s in slots)
                concerned.append((last, axis, slots, units))
        if not concerned:
            continue
        _, axis, slots, units = max(concerned, key=lambda c: c[0])
        makers = {s.module for s in axis.slots if s.role != CONSUME}
        both = len(makers) == 1 and int(slots[0].unit.bincount().max()) == 1
        ratio = change.value**0.5 if change.product and both else change.value
        for dim, index in _one_side(axis, slots, units):
            size = coupling.analysis.sizes[dim]
            found.setdefault(dim, torch.ones(size, dtype=torch.float64))[index] /= ratio
    return found


def _one_side(axis: Axis, slots: Sequence[Slot], units: Tensor) -> list[tuple[Dim, Tensor]]:
    """The last rows, and entries of the bias, that make these units."""
    last = slots[-1]
    found = []
    for slot in (last, *(s for s in axis.having(SHIFT) if s.module == last.module)):
        mine = units[slot.unit]
        index, unit = slot.index[mine], slot.unit[mine]
        if len(slots) == 1:  # one layer makes both sides
            newest = torch.full((axis.size,), -1).scatter_reduce(0, unit, index, "amax")
            index = newest[newest >= 0]
        found.append((slot.dimension, index))
    return found


def broken(error: Exception) -> str:
    """What to say of a cut network that raised this."""
    return f"cutting it breaks the network: {type(error).__name__}: {error}"


def left_alone(coupling: Coupling, kept: Mapping[Dim, Tensor]) -> list[int]:
    """Classes that are left alone along a dimension: a single channel, or head, is no label."""
    own, sizes = coupling.analysis.own, coupling.analysis.sizes
    left = [own(dim)[index.numpy()] for dim, index in kept.items()]
    left += [own(dim) for dim, size in sizes.items() if size == 1 and dim not in kept]
    return [int(classes[0]) for classes in left if len(classes) and (classes == classes[0]).all()]


def settle(
    good: list[T], more: list[T], attempt: Callable[[list[T]], str | None], failed: dict[T, str]
) -> list[T]:
    """`good` with those of `more` that pass as well, found by halving where it fails.

    Args:
        good: what is known to pass.
        more: what to try with it.
        attempt: why such a list does not pass, or None.
        failed: filled with the reasons of those that do not pass.
    """
    if not more:
        return good
    reason = attempt(good + more)
    if reason is None:
        return good + more
    if len(more) == 1:
        failed[more[0]] = reason
        return good
    for part in (more[: len(more) // 2], more[len(more) // 2 :]):
        good = settle(good, part, attempt, failed)
    return good
