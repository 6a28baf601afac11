"""Whether a network can be cut where its labels allow it: try, replay, take back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .inputs import Inputs
from .labels import Dim
from .mending import mends
from .replay import replay
from .surgery import cut, shadowed
from .units import Axis, Coupling

__all__ = [
    "Removal",
    "broken",
    "cut_units",
    "gone",
    "left_alone",
    "positions_kept",
    "settle",
    "wiring",
]

# For some axes, by their place in the list of all: bool (size,), True = this unit goes.
Removal = Mapping[int, Tensor]
T = TypeVar("T")


def gone(coupling: Coupling, axes: Sequence[Axis], remove: Removal) -> np.ndarray:
    """(labels,) bool: the classes of the removed units."""
    mark = np.zeros(len(coupling.analysis.classes), dtype=bool)
    for a, units in remove.items():
        mark[axes[a].classes[units].numpy()] = True
    return mark


def positions_kept(
    model: nn.Module, coupling: Coupling, axes: Sequence[Axis], remove: Removal
) -> dict[Dim, Tensor]:
    """The positions that stay along each dimension that loses some."""
    lost = gone(coupling, axes, remove)
    stays: dict[Dim, Tensor] = {}
    for dim, labels in coupling.labels(model, {}).items():
        mine = lost[labels.numpy()]
        if mine.any():
            stays[dim] = torch.from_numpy(np.flatnonzero(~mine))
    return stays


def cut_units(
    model: nn.Module, coupling: Coupling, axes: Sequence[Axis], remove: Removal
) -> Callable[[], None]:
    """Cut these units out of a network; returns a function that undoes it."""
    kept = positions_kept(model, coupling, axes, remove)
    integers = mends(model, coupling.analysis, gone(coupling, axes, remove), kept)
    return cut(model, kept, integers)


def wiring(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    axes: Sequence[Axis],
    remove: Removal,
    *,
    quick: bool = False,
) -> str | None:
    """Why these units cannot be cut, or None; tried without touching the model's tensors."""
    kept = positions_kept(model, coupling, axes, remove)
    integers = mends(model, coupling.analysis, gone(coupling, axes, remove), kept)
    try:
        with shadowed(model, kept, integers, shapes=coupling.analysis.shapes):
            replay(model, inputs, coupling, kept, left_alone(axes, remove), quick=quick)
    except Exception as error:  # whatever a cut network may raise
        return broken(error)
    return None


def broken(error: Exception) -> str:
    """What to say of a cut network that raised this."""
    return f"cutting it breaks the network: {type(error).__name__}: {error}"


def left_alone(axes: Sequence[Axis], remove: Removal) -> list[int]:
    """Classes of the units that are left alone in their block."""
    found = []
    for a, units in remove.items():
        axis, stays = axes[a], ~units
        if int(stays.sum()) == axis.blocks:
            found.extend(axis.classes[stays].tolist())
    return found


def settle(
    good: list[T], more: list[T], attempt: Callable[[list[T]], str | None], failed: dict[int, str]
) -> list[T]:
    """`good` with those of `more` that pass as well, found by halving where it fails.

    Args:
        good: what is known to pass.
        more: what to try with it.
        attempt: why such a list does not pass, or None.
        failed: filled with the reasons of those that do not pass, by identity.
    """
    if not more:
        return good
    reason = attempt(good + more)
    if reason is None:
        return good + more
    if len(more) == 1:
        failed[id(more[0])] = reason
        return good
    for part in (more[: len(more) // 2], more[len(more) // 2 :]):
        good = settle(good, part, attempt, failed)
    return good
