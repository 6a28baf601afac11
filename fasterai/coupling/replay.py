"""Replay the labels through a network that was cut: a proof of its wiring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from .inputs import Inputs
from .labels import Dim, Run
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
    quick: bool = False,
) -> None:
    """Run the labels through the smaller network: every meeting must agree as it did before.

    Args:
        model: the network after the cut.
        inputs: the inputs it was coupled on.
        coupling: what was found before the cut.
        kept: for the dimensions that were cut, the positions that stayed.
        alone: classes of units left alone in their axis; a single channel broadcasts.
        quick: in eval mode only.

    Raises:
        RuntimeError: two channels meet that did not belong together, or one meets a fixed width.
    """
    labels = coupling.labels(model, kept)
    free = np.append(~coupling.pinned, False)  # FIXED, the last one, is not free
    free[list(alone)] = False
    for training in (False, True)[: 1 + (coupling.analysis.trains and not quick)]:
        sized = inputs.at_least(2) if training else inputs
        shapes = coupling.analysis.shapes
        _agree(run_labels(model, sized, labels, training=training, shapes=shapes), free)


def _agree(said: Run, free: np.ndarray) -> None:
    for a, b in said.meetings:
        left, right = a.numpy(), b.numpy()
        if ((left != right) & (free[left] | free[right])).any():
            raise RuntimeError("channels that do not belong together meet after the cut")
    for seen, reason in said.pins:
        if free[seen.numpy()].any():
            raise RuntimeError(f"after the cut, {reason}")
