"""N:M patterns: of each M consecutive inputs, N weights stay.

Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, https://arxiv.org/abs/2104.08378.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.criteria import Criterion
from .groups import WeightGroups

__all__ = ["PatternGroups"]


@dataclass(eq=False)
class PatternGroups(WeightGroups):
    """Single weights, of which each run of M consecutive inputs keeps at least N.

    A group is the k-th weakest of a run, k = 1 to M - N: those that are zero first, then the lowest
    scores. So the lowest groups of all are the lowest weights that the pattern lets go. Where the
    input dimension is no multiple of M, the last run counts as filled up with zeros: of its L
    weights L - N may go. A sparsity is a share of all weights, at most 1 - N / M.

    Args:
        dim: the input dimension of the weight.
        keep: N.
        of: M.
        parts: equal parts of the input dimension that no run crosses, as in a grouped transposed
            conv.
    """

    _: KW_ONLY
    dim: int
    keep: int
    of: int
    parts: int = 1
    _order: Tensor = field(init=False, repr=False)  # (runs, M - N) places in a run, weakest first

    @property
    def free(self) -> int:
        runs, rest = divmod(self.inputs, self.of)
        each = runs * (self.of - self.keep) + max(0, rest - self.keep)
        return self.weight.numel() // max(self.inputs, 1) * each

    @property
    def size(self) -> int:
        return self.weight.numel()

    whole = size

    @property
    def inputs(self) -> int:
        """Length of the input dimension, or of one of its parts."""
        return self.weight.shape[self.dim] // self.parts

    def scores(self, criterion: Criterion, *, relative: bool) -> Tensor:
        scores = criterion(self.weight, self.parameter)
        least = torch.finfo(scores.dtype).min
        zero = self._zero()
        lifted = scores.clamp(min=least / 2).masked_fill_(zero, least)
        runs = self._runs(lifted, -torch.inf)  # padding goes first, then what is zero
        self._rank(runs)
        return self._runs(scores, 0.0).gather(1, self._order.long())[self._real()]

    def zeroed(self) -> Tensor:
        zero = self._runs(self._zero(), True)
        padded = self._runs(torch.zeros_like(self.weight, dtype=torch.bool), True)
        self._rank(-(zero.to(torch.int8) + padded.to(torch.int8)))
        return zero.gather(1, self._order.long())[self._real()]

    def write(self, zero: Tensor, masks: Mapping[str, Tensor]) -> None:
        gone = self._runs(self._zero(), True)  # what is zero beyond the pattern stays zero
        chosen = torch.ones_like(self._order, dtype=torch.bool)
        chosen[self._real()] = zero
        gone.scatter_(1, self._order.long(), chosen)
        lead = self.weight.movedim(self.dim, -1).shape
        kept = ~gone.view(*lead[:-1], self.parts, -1)[..., : self.inputs].flatten(-2)
        masks[self.parameter].copy_(kept.movedim(-1, self.dim))

    def _zero(self) -> Tensor:
        """The weights that are zero; none where all are, for such a layer is fresh."""
        zero = self.weight.detach() == 0
        return zero & ~zero.all()

    def _runs(self, values: Tensor, padding: float | bool) -> Tensor:
        """(runs, M): `values` of the weight's shape, M consecutive inputs in a row."""
        inputs = values.movedim(self.dim, -1).unflatten(-1, (self.parts, -1))
        return F.pad(inputs, (0, -self.inputs % self.of), value=padding).reshape(-1, self.of)

    def _rank(self, runs: Tensor) -> None:
        order = runs.argsort(dim=1, stable=True)[:, : self.of - self.keep]
        self._order = order.to(torch.int16)

    def _real(self) -> Tensor:
        """(runs, M - N) bool: which of the places in `_order` are weights, not padding."""
        rest = self.inputs % self.of
        real = torch.ones_like(self._order, dtype=torch.bool)
        if rest:
            last = -(-self.inputs // self.of)
            real[last - 1 :: last] = self._order[last - 1 :: last] < rest
        return real
