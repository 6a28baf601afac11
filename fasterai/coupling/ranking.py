"""Scores of units, and which of them are zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.criteria import Criterion
from ..core.granularity import over_groups
from ..core.normalise import normalise
from .labels import PRODUCE
from .units import Axis

__all__ = ["ranked_bundles", "unit_scores", "zeroed_units"]


def unit_scores(
    tensors: Mapping[str, Tensor],
    axis: Axis,
    criterion: Criterion,
    *,
    relative: bool = False,
    gone: int = 0,
) -> Tensor:
    """(F,) scores of an axis' free units: the mean (or sum) over the elements of their rows.

    Args:
        tensors: the network's parameters by name.
        axis: the axis to score.
        criterion: scores of single elements, and how they are reduced.
        relative: normalise within the axis, to compare units of different axes: as the
            criterion says, else by the mean, but not where its scores are added up.
        gone: units of this axis that were removed before, which count as zero then.
    """
    total = size = None
    for slot in axis.having(PRODUCE):
        weight = tensors[slot.parameter]
        rows = over_groups(criterion(weight, slot.parameter), (slot.dim,), "sum").flatten()
        unit, index = slot.unit.to(weight.device), slot.index.to(weight.device)
        if total is None:
            total = torch.zeros(axis.size, dtype=rows.dtype, device=rows.device)
            size = torch.zeros_like(total)
        each = weight.numel() // weight.shape[slot.dim]
        total.index_add_(0, unit, rows[index].to(total))
        size.index_add_(0, unit, torch.full_like(rows[index], each).to(size))
    free = axis.free.to(total.device)
    summed = criterion.reduce == "sum"
    scores = (total if summed else total / size)[free]
    norm = criterion.norm or (None if summed else "mean")
    return normalise(scores, norm if relative else None, axis.name, gone)


def ranked_bundles(
    tensors: Mapping[str, Tensor],
    axis: Axis,
    criterion: Criterion,
    *,
    relative: bool = False,
    gone: int = 0,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The bundles of an axis: the k-th weakest free unit of each of its blocks.

    Args:
        tensors: the network's parameters by name.
        axis: the axis to rank.
        criterion: see `unit_scores`.
        relative: see `unit_scores`.
        gone: see `unit_scores`.
        first: (size,) bool, units that go before all others.

    Returns:
        (bundles,) scores, the mean over a bundle's units, and (bundles, blocks) units.
    """
    scores = unit_scores(tensors, axis, criterion, relative=relative, gone=gone)
    if axis.blocks == 1:
        return scores, axis.free[:, None]
    own = scores.detach().cpu()
    if first is not None:
        own = own.masked_fill(first.cpu()[axis.free], -torch.inf)
    units = axis.bundled(axis.free[own.argsort(stable=True)])
    score = torch.zeros(axis.size, dtype=scores.dtype, device=scores.device)
    score[axis.free] = scores
    return score[units].mean(1), units


def zeroed_units(
    tensors: Mapping[str, Tensor],
    axis: Axis,
    roles: tuple[str, ...] = (PRODUCE,),
    *,
    emptied: bool = False,
) -> Tensor:
    """(size,) bool: the units that are zero in all their slots of these roles.

    Whole layers are sometimes initialised with zeros: an axis without a single weight that is not
    zero counts as fresh, not as zeroed, unless it is known to have been `emptied`.
    """
    zero = None
    for slot in axis.having(*roles):
        if slot.parameter not in tensors:
            continue  # a buffer
        weight = tensors[slot.parameter]
        alive = over_groups(weight.detach() != 0, (slot.dim,), "any").flatten()
        unit, index = slot.unit.to(weight.device), slot.index.to(weight.device)
        if zero is None:
            zero = torch.ones(axis.size, dtype=torch.bool, device=weight.device)
        zero[unit[alive[index]].to(zero.device)] = False
    return zero if emptied else zero & ~zero.all()
