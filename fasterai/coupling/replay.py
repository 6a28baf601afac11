"""Replay the labels through a network that was cut: a proof of its wiring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from .inputs import Inputs
from .labels import Dim, Factor, Run
from .run import run_labels
from .units import Coupling

__all__ = ["replay"]


def replay(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    kept: Mapping[Dim, Tensor],
    alone: Sequence[int],
    *,
    modes: Sequence[bool] = (False, True),
) -> list[Factor]:
    """Run the labels through the smaller network: every meeting must agree as it did before.

    Args:
        model: the network after the cut.
        inputs: the inputs it was coupled on.
        coupling: what was found before the cut.
        kept: for the dimensions that were cut, the positions that stayed.
        alone: classes of units left alone in their axis; a single channel broadcasts.
        modes: with which training flags; in train mode only where the whole network ran so.

    Returns:
        By how much channels, or products over them, are multiplied more than before because code
        derives a factor from their number, such as 1 / sqrt(d) in attention.

    Raises:
        RuntimeError: two channels meet that did not belong together, or one meets a fixed width.
    """
    labels = coupling.labels(kept)
    free = np.append(~coupling.pinned, False)  # FIXED, the last one, is not free
    free[list(alone)] = False
    changed: list[Factor] = []
    for training in modes:
        if training and not coupling.analysis.trains:
            continue
        sized = inputs.at_least(2)
        shapes = coupling.analysis.shapes
        said = run_labels(model, sized, labels, training=training, shapes=shapes)
        _agree(said, free)
        if not training:
            changed = _changed(coupling.analysis.factors, said.factors)
    return changed


def _changed(before: Mapping[int, Factor], after: Mapping[int, Factor]) -> list[Factor]:
    found: dict[bytes, Factor] = {}
    for i, was in before.items():
        now = after.get(i, was).value
        if was.value != now and was.value and now and len(was.over):
            what = was.over.numpy().tobytes()
            ratio = found[what].value if what in found else 1.0
            found[what] = replace(was, value=ratio * now / was.value)
    return list(found.values())


def _agree(said: Run, free: np.ndarray) -> None:
    for a, b in said.meetings:
        left, right = a.numpy(), b.numpy()
        if ((left != right) & (free[left] | free[right])).any():
            raise RuntimeError("channels that do not belong together meet after the cut")
    for seen, reason in said.pins:
        if free[seen.numpy()].any():
            raise RuntimeError(f"after the cut, {reason}")
