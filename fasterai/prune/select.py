"""Which units to remove: those that are zero and silent, or those that rank lowest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.criteria import Criterion
from ..core.masks import Limits, select
from ..core.records import refuse_equal
from ..coupling.labels import AVERAGED, NORMALISED, PRODUCE, SCALE, SHIFT
from ..coupling.ranking import ranked_bundles, require_scales, zeroed_units
from ..coupling.units import Axis
from .constants import Constants

__all__ = ["Stay", "lowest_units", "pinned_units", "ranked_units", "zero_units"]

Stay = tuple[str, int, str]  # layer, unit, and why it is not removed


def zero_units(
    model: nn.Module, constants: Constants, axes: Sequence[Axis], limits: Limits
) -> tuple[dict[int, Tensor], list[Stay]]:
    """The units that zero weights silence, or make constant in a way that can be made good.

    The second value names the zero units that stay.
    """
    tensors = dict(model.named_parameters())
    remove: dict[int, Tensor] = {}
    stay: list[Stay] = []
    for a, axis in enumerate(axes):
        zero = zeroed_units(tensors, axis)
        still, reasons = constants.removable(axis)
        mute = zeroed_units(tensors, axis, (PRODUCE, SCALE, SHIFT)).tolist()  # in train mode, too
        still = {*still, *(u for u in constants.unheard(axis) if mute[u])}
        if not any(tensors[s.parameter].any() for s in axis.having(PRODUCE)):
            still = set()  # whole layers of zeros are fresh, not pruned
        silent = []
        for u in sorted({*zero.nonzero().flatten().tolist(), *still}):
            if axis.pins[u] is not None:
                stay.append((axis.name, u, axis.pins[u]))
            elif axis.mixed not in (None, AVERAGED, NORMALISED):
                stay.append((axis.name, u, axis.mixed))
            elif u not in still:
                stay.append((axis.name, u, reasons.get(u, _MOVING)))
            else:
                silent.append(u)
        chosen, reason = _whole_bundles(axis, silent, limits)
        stay.extend((axis.name, u, reason) for u in sorted(set(silent) - set(chosen)))
        remove[a] = _marked(axis, torch.tensor(chosen, dtype=torch.long))
    return remove, stay


def _whole_bundles(axis: Axis, silent: Sequence[int], limits: Limits) -> tuple[list[int], str]:
    """As many silent units of each block as `limits` allow, and why not more."""
    blocks: list[list[int]] = [[] for _ in range(axis.blocks)]
    for u, b in zip(silent, axis.block[silent].tolist(), strict=True):
        blocks[b].append(u)
    least = min(len(units) for units in blocks)
    bundles = axis.size // axis.blocks
    n = limits.rounded(limits.most(bundles, least), bundles, axis.blocks)
    reason = "min_keep or round_to" if n < least else "its counterparts in other blocks stay"
    return [u for units in blocks for u in units[:n]], reason


def ranked_units(
    model: nn.Module,
    axes: Sequence[Axis],
    counts: int | Sequence[int],
    criterion: Criterion,
    limits: Limits,
    gone: Sequence[int] | None = None,
) -> tuple[dict[int, Tensor], list[Stay]]:
    """So many of the free units, lowest scores first; and the pinned ones.

    Args:
        model: the network.
        axes: its axes.
        counts: bundles to remove: over all axes, or of each.
        criterion: scores of weights.
        limits: see `Limits`.
        gone: for each axis the units that were removed before; see `unit_scores`.

    Raises:
        NothingToCompare: the criterion needs more than weights, and sees no difference.
    """
    tensors = dict(model.named_parameters())
    stay = pinned_units(axes)
    ranked = [a for a, axis in enumerate(axes) if axis.bundles]
    require_scales(tensors, [axes[a] for a in ranked], criterion)
    together = isinstance(counts, int)
    lost = [0] * len(axes) if gone is None else gone
    bundles = {
        a: ranked_bundles(tensors, axes[a], criterion, relative=together, gone=lost[a])
        for a in ranked
    }
    if criterion.needs:
        refuse_equal([scores for scores, _ in bundles.values()])
    return lowest_units(axes, bundles, counts, limits), stay


def lowest_units(
    axes: Sequence[Axis],
    bundles: Mapping[int, tuple[Tensor, Tensor]],
    counts: int | Sequence[int],
    limits: Limits,
) -> dict[int, Tensor]:
    """So many units of the bundles with the lowest scores.

    Args:
        axes: all axes of the network.
        bundles: by the place of their axis, see `ranked_bundles`.
        counts: bundles to remove: over all axes, or of each.
        limits: see `Limits`.
    """
    scores = [own for own, _ in bundles.values()]
    marks = select(
        scores,
        counts if isinstance(counts, int) else [counts[a] for a in bundles],
        held=[torch.zeros_like(s, dtype=torch.bool) for s in scores],
        sizes=[axes[a].size // axes[a].blocks for a in bundles],
        widths=[axes[a].blocks for a in bundles],
        limits=limits,
    )
    remove = {}
    for (a, (_, units)), mark in zip(bundles.items(), marks, strict=True):
        remove[a] = _marked(axes[a], units[mark.cpu()].flatten())
    return remove


def pinned_units(axes: Sequence[Axis]) -> list[Stay]:
    """The units that cannot go, and why."""
    return [(x.name, u, pin) for x in axes for u, pin in enumerate(x.pins) if pin is not None]


def _marked(axis: Axis, units: Tensor) -> Tensor:
    mark = torch.zeros(axis.size, dtype=torch.bool)
    mark[units] = True
    return mark


_MOVING = "its weights are zero, but what arrives at the next layers changes with the input"
