"""Scores of units, and which of them are zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..core.criteria import Criterion
from ..core.granularity import along, over_groups
from ..core.normalise import normalise
from .labels import PRODUCE, SCALE
from .units import Axis, Slot

__all__ = ["bundles_of", "ranked_bundles", "require_scales", "unit_scores", "zeroed_units"]


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
    require_scales(tensors, [axis], criterion)
    scales = _scales(tensors, axis).nan_to_num(0) if "scale" in criterion.wants else None
    for slot in axis.having(PRODUCE):
        weight = tensors[slot.parameter]
        given = {} if scales is None else {"scale": _in_rows(scales, slot, weight)}
        scored = criterion(weight, slot.parameter, slot.dim, given)
        rows = over_groups(scored, (slot.dim,), "sum").flatten()
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


def require_scales(
    tensors: Mapping[str, Tensor], axes: Iterable[Axis], criterion: Criterion
) -> None:
    """Raise a ValueError where a criterion needs scales, and no norm scales some free units."""
    if "scale" not in criterion.wants:
        return
    bare = [axis for axis in axes if _scales(tensors, axis)[axis.free].isnan().any()]
    if bare:
        layers = ", ".join(repr(name) for axis in bare for name in axis.producers)
        raise ValueError(
            f"criterion {criterion.name!r} needs a norm behind each layer, and none scales all "
            f"filters of {bare[0].name!r}: leave such layers out, as in exclude=[{layers}], or "
            f"take another criterion"
        )


def _scales(tensors: Mapping[str, Tensor], axis: Axis) -> Tensor:
    """(size,) the mean magnitude of the scales of each unit's norms; nan where there is none."""
    found = torch.zeros(2, axis.size)  # their sum and number
    for slot in axis.having(SCALE):
        if slot.parameter in tensors:
            scale = tensors[slot.parameter].detach().abs()
            scale = over_groups(scale, (slot.dim,), "mean").flatten()
            own = scale[slot.index.to(scale.device)]
            found = found.to(own)
            found.index_add_(1, slot.unit.to(own.device), torch.stack([own, torch.ones_like(own)]))
    return found[0] / found[1]


def _in_rows(values: Tensor, slot: Slot, weight: Tensor) -> Tensor:
    """A value for each unit as one for each weight of its rows, of the weight's shape."""
    rows = values.new_zeros(weight.shape[slot.dim])
    rows[slot.index.to(values.device)] = values[slot.unit.to(values.device)]
    return along(rows, slot.dim, weight.ndim).expand(weight.shape)


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
    return bundles_of(axis, scores, first)


def bundles_of(axis: Axis, scores: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The bundles that (F,) scores of an axis' free units make; see `ranked_bundles`."""
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
