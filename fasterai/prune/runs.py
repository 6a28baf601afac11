"""Numbers of a tensor that differ from the usual, as runs of equal ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Runs", "as_runs", "from_runs"]

Runs = tuple[tuple[int, int, float], ...]  # (start, length, number), ascending


def as_runs(values: Tensor, factor: bool) -> Runs:
    """The numbers of a tensor that are not the usual one, 1 for factors and 0 else."""
    flat = values.detach().double().cpu().reshape(-1).numpy()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])[: len(flat)]
    lengths = np.diff([*starts, len(flat)])
    runs = zip(starts.tolist(), lengths.tolist(), flat[starts].tolist(), strict=True)
    return tuple(run for run in runs if run[2] != float(factor))


def from_runs(runs: Runs, shape: Sequence[int], factor: bool) -> Tensor:
    """The tensor (float64) that `as_runs` took apart."""
    flat = np.full(math.prod(shape), float(factor))
    for start, length, number in runs:
        flat[start : start + length] = number
    return torch.from_numpy(flat).view(*shape)
