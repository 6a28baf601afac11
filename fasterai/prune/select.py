"""Which units to remove: those that are zero and silent, or those that rank lowest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.criteria import Criterion
from ..core.masks import Limits, select
from ..coupling.inputs import Inputs
from ..coupling.ranking import unit_scores, zeroed_units
from ..coupling.units import Axis, Coupling
from .check import peaks

__all__ = ["Stay", "ranked_units", "zero_units"]

Stay = tuple[str, int, str]  # layer, unit, and why it is not removed


def zero_units(
    model: nn.Module, inputs: Inputs, coupling: Coupling, axes: Sequence[Axis], limits: Limits
) -> tuple[dict[int, Tensor], list[Stay]]:
    """The units whose weights are zero and that reach every next layer as exact zeros.

    What reaches a layer is looked at, on the inputs and on random ones; the second value names
    the zero units that stay.
    """
    tensors = dict(model.named_parameters())
    arriving = peaks(model, inputs, coupling)
    remove: dict[int, Tensor] = {}
    stay: list[Stay] = []
    for a, axis in enumerate(axes):
        peak = arriving[coupling.classes_of(axis)].tolist()
        silent = []
        for u in zeroed_units(tensors, axis).nonzero().flatten().tolist():
            if axis.pins[u] is not None:
                stay.append((axis.name, u, axis.pins[u]))
            elif peak[u] != 0:
                stay.append((axis.name, u, _not_silent(peak[u])))
            else:
                silent.append(u)
        n = limits.rounded(limits.most(axis.size, len(silent)), axis.size)
        stay.extend((axis.name, u, "min_keep or round_to") for u in silent[n:])
        remove[a] = _marked(axis, torch.tensor(silent[:n], dtype=torch.long))
    return remove, stay


def ranked_units(
    model: nn.Module,
    axes: Sequence[Axis],
    sparsity: float,
    context: str,
    criterion: Criterion,
    limits: Limits,
) -> tuple[dict[int, Tensor], list[Stay]]:
    """The share `sparsity` of the free units, lowest scores first; and the pinned ones."""
    tensors = dict(model.named_parameters())
    stay = [(x.name, u, pin) for x in axes for u, pin in enumerate(x.pins) if pin is not None]
    ranked = [a for a, axis in enumerate(axes) if len(axis.free)]
    together = context == "global"
    scores = [unit_scores(tensors, axes[a], criterion, relative=together) for a in ranked]
    counts: Any = [round(sparsity * s.numel()) for s in scores]
    if together:
        counts = round(sparsity * sum(s.numel() for s in scores))
    marks = select(
        scores,
        counts,
        held=[torch.zeros_like(s, dtype=torch.bool) for s in scores],
        sizes=[axes[a].size for a in ranked],
        limits=limits,
    )
    chosen = zip(ranked, marks, strict=True)
    return {a: _marked(axes[a], axes[a].free[mark.cpu()]) for a, mark in chosen}, stay


def _marked(axis: Axis, units: Tensor) -> Tensor:
    mark = torch.zeros(axis.size, dtype=torch.bool)
    mark[units] = True
    return mark


def _not_silent(peak: float) -> str:
    return (
        f"its weights are zero, but it arrives at the next layer with magnitude {peak:.3g} (the "
        f"bias, or the scale and shift of the norm behind it, are not zero)"
    )
