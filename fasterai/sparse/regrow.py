"""Which zeroed groups come back first when a schedule goes down."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.masks import Limits, select

__all__ = ["Regrowth"]


class Regrowth:
    """What is zero, and the score that each group had when it was zeroed.

    A zeroed weight scores 0 like all others, so the way back is ranked by what was written down on
    the way there: the group that scored highest comes back first. What was zero from the start
    comes back last; of equal scores the last in order comes first. The way down thus retraces the
    way up, as far as scores do not change in between.

    Memory: a score (4 bytes in float32) and a bool a group.

    Args:
        zero: bool tensors, what is zero from the start.
    """

    def __init__(self, zero: Sequence[Tensor]) -> None:
        self.zero = list(zero)
        self._scores: list[Tensor] | None = None

    def went(self, zero: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
        """Write down the scores of those that are zero now and were not before."""
        if self._scores is None:
            self._scores = [torch.full_like(s, -math.inf) for s in scores]
        before = zip(self._scores, self.zero, strict=True)
        now = zip(zero, scores, strict=True)
        self._scores = [
            torch.where(z & ~was.to(z.device), s, old.to(s.device))
            for (old, was), (z, s) in zip(before, now, strict=True)
        ]
        self.zero = list(zero)

    def back(
        self, counts: int | Sequence[int], widths: Sequence[int], round_to: int
    ) -> list[Tensor]:
        """Let groups come back until `counts` are zero, see `select`; what is zero then."""
        have = [int(z.count_nonzero()) for z in self.zero]
        if isinstance(counts, int):
            counts = min(counts, sum(have))
        else:
            counts = [min(n, h) for n, h in zip(counts, have, strict=True)]
        scores = self._scores or [torch.zeros(z.shape, device=z.device) for z in self.zero]
        held = [torch.zeros_like(z) for z in self.zero]
        ranked = [
            s.masked_fill(~z.to(s.device), math.inf) for s, z in zip(scores, self.zero, strict=True)
        ]
        limits = Limits(0, round_to)  # what is zero already left enough to keep
        self.zero = select(ranked, counts, held=held, widths=widths, limits=limits)
        return self.zero
