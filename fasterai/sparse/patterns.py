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
from ..core.normalise import normalise
from .groups import WeightGroups

__all__ = ["PatternGroups"]

_SHORT, _CHUNK = 16, 1 << 16  # runs that are ranked without sorting, so many at once


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
    # (runs, M - N), where in a run its groups are, weakest first; None: what is zero first
    _places: Tensor | None = field(default=None, init=False, repr=False)

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
        scores = criterion(self.weight, self.parameter, self.rows)
        norm = criterion.norm if relative else None
        scores = normalise(scores.flatten(), norm, self.name).view_as(scores)
        least = torch.finfo(scores.dtype).min
        lifted = scores.clamp(min=least / 2).masked_fill_(self._zero(), least)
        self._places = _lowest_places(self._runs(lifted, -torch.inf), self.of - self.keep)
        return self._weights(self._runs(scores, 0.0).gather(1, self._places.long()))

    def zeroed(self) -> Tensor:
        self._places = None
        gone = self._runs(self._zero(), True).sum(1, keepdim=True)  # padding goes first, then zeros
        return self._weights(torch.arange(self.of - self.keep, device=gone.device) < gone)

    def write(self, zero: Tensor, masks: Mapping[str, Tensor]) -> None:
        gone = self._runs(self._zero(), True)  # what is zero beyond the pattern stays zero
        if self._places is None:
            padded = self._runs(torch.zeros_like(self.weight, dtype=torch.bool), True)
            first = -(gone.to(torch.int8) + padded.to(torch.int8))
            self._places = _lowest_places(first, self.of - self.keep)
        chosen = torch.ones_like(self._places, dtype=torch.bool)
        chosen.masked_scatter_(self._real(chosen), zero)
        gone.scatter_(1, self._places.long(), chosen)
        lead = self.weight.movedim(self.dim, -1).shape[:-1]
        kept = ~gone.view(*lead, self.parts, -1)[..., : self.inputs].flatten(-2)
        masks[self.parameter].copy_(kept.movedim(-1, self.dim))

    def _zero(self) -> Tensor:
        """The weights that are zero; none where all are, for such a layer is fresh."""
        zero = self.weight.detach() == 0
        return zero & ~zero.all()

    def _runs(self, values: Tensor, padding: float | bool) -> Tensor:
        """(runs, M): `values` of the weight's shape, M consecutive inputs in a row."""
        inputs = values.movedim(self.dim, -1).unflatten(-1, (self.parts, -1))
        return F.pad(inputs, (0, -self.inputs % self.of), value=padding).reshape(-1, self.of)

    def _weights(self, values: Tensor) -> Tensor:
        """(free,) of (runs, M - N) `values`: without the padding, which comes first in its run."""
        if not self.inputs % self.of:
            return values.flatten()
        return values[self._real(values)]

    def _real(self, values: Tensor) -> Tensor:
        """(runs, M - N) bool, where `values` are those of weights."""
        real = torch.ones_like(values, dtype=torch.bool)
        runs = -(-self.inputs // self.of)  # of one row of inputs
        real[runs - 1 :: runs, : -self.inputs % self.of] = False
        return real


def _lowest_places(runs: Tensor, n: int) -> Tensor:
    """(runs, n) the places of the n lowest of each run in order, the first of equal ones first."""
    if runs.shape[1] > _SHORT:
        return runs.argsort(dim=1, stable=True)[:, :n].to(torch.int16)
    return torch.cat([_by_comparing(part, n) for part in runs.split(_CHUNK)])


def _by_comparing(runs: Tensor, n: int) -> Tensor:
    """The same, by comparing columns: faster than sorting many short rows."""
    columns = runs.t().contiguous()  # (M, runs)
    rank = torch.zeros_like(columns, dtype=torch.int8)
    for j, left in enumerate(columns):
        for k in range(j + 1, len(columns)):
            before = columns[k] < left
            rank[j] += before.view(torch.int8)
            rank[k] += before.logical_not_().view(torch.int8)
    places = torch.zeros_like(rank[:n], dtype=torch.int16)
    for k, own in enumerate(rank):
        for r, place in enumerate(places):
            place.masked_fill_(own == r, k)
    return places.t()
