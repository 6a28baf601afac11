"""Replay the labels through a network that was cut: a proof of its wiring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .inputs import Inputs
from .labels import FIXED, Dim, Run, dims_of
from .run import run_labels
from .units import Coupling

__all__ = ["replay", "surviving"]


def replay(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    kept: Mapping[Dim, Tensor],
    alone: Sequence[int],
) -> None:
    """Run the labels through the smaller network: every meeting must agree as it did before.

    Args:
        model: the network after the cut.
        inputs: the inputs it was coupled on.
        coupling: what was found before the cut.
        kept: for the dimensions that were cut, the positions that stayed.
        alone: classes of units left alone in their axis; a single channel broadcasts.

    Raises:
        RuntimeError: two channels meet that did not belong together, or one meets a fixed width.
    """
    labels = surviving(model, coupling, kept)
    free = np.append(~coupling.pinned, False)  # FIXED, the last one, is not free
    free[list(alone)] = False
    for training in (False, True)[: 1 + coupling.trains]:
        sized = inputs.at_least(2) if training else inputs
        said, _ = run_labels(model, sized, labels, training=training)
        _agree(said, coupling.classes, free)


def surviving(
    model: nn.Module, coupling: Coupling, kept: Mapping[Dim, Tensor]
) -> dict[Dim, Tensor]:
    """The labels of the positions that a cut left; see `replay`."""
    return {
        dim: coupling.first[dim] + kept.get(dim, torch.arange(tensor.shape[dim.dim]))
        for dim, tensor in dims_of(model).items()
    }


def _agree(said: Run, classes: np.ndarray, free: np.ndarray) -> None:
    for a, b in said.meetings:
        left, right = a.cpu().numpy(), b.cpu().numpy()
        left = np.where(left >= 0, classes[left], FIXED)
        right = np.where(right >= 0, classes[right], FIXED)
        if ((left != right) & (free[left] | free[right])).any():
            raise RuntimeError("channels that do not belong together meet after the cut")
    for seen, reason in said.pins:
        known = seen.cpu().numpy()
        if free[classes[known[known >= 0]]].any():
            raise RuntimeError(f"after the cut, {reason}")
