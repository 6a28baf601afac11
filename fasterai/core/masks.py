"""Masks: exactly n groups of the lowest score, ties broken the same way every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import is_number, whole
from .ranking import Ranking, ScoreRanking, pieces
from .selection import Cutoff, cut_lowest, write_kept
from .target import refuse_target

__all__ = [
    "Limits",
    "apply_masks",
    "as_context",
    "as_fraction",
    "choose_cuts",
    "select",
    "zero_marks",
]


_NO_BUDGET = (
    "it is what a network costs once channels are removed, and zeros alone save nothing. Pass it "
    "to Pruner.prune_model, GradualPruner or PruneCallback; for zeros pass a fraction"
)


def as_fraction(value: object, name: str = "sparsity") -> float:
    """A fraction in [0, 1], or an error that says what to pass instead."""
    refuse_target(value, _NO_BUDGET)
    if not is_number(value):
        raise TypeError(f"{name} must be a fraction in [0, 1], got {value!r}")
    if 1 < value <= 100:
        raise ValueError(
            f"{name} must be a fraction in [0, 1], got {value}; for {value:g}% pass {value / 100:g}"
        )
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a fraction in [0, 1], got {value}")
    return float(value)


def as_context(context: str) -> str:
    """'local' or 'global'."""
    if context not in ("local", "global"):
        raise ValueError(f"context must be 'local' or 'global', got {context!r}")
    return context


@dataclass(frozen=True)
class Limits:
    """What bounds the number of zeroed groups in each layer.

    Args:
        min_keep: groups that stay in every layer, at least.
        round_to: what is kept is a multiple of this.
    """

    min_keep: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        for name, least in (("min_keep", 0), ("round_to", 1)):
            whole(getattr(self, name), name, least)

    def most(self, size: int, free: int) -> int:
        """The most that `min_keep` allows to zero of `size` groups, `free` of which may go."""
        return max(0, min(free, size - self.min_keep))

    def rounded(self, n: int, size: int, width: int = 1) -> int:
        """`n` lowered until `size - n` is a multiple of `round_to`; 0 where no such n exists.

        Where a group is `width` channels, these are counted.
        """
        step = self.round_to // math.gcd(self.round_to, width)
        return max(0, size - math.ceil((size - n) / step) * step)

    def steps(self, size: int, free: int, width: int = 1) -> range:
        """The numbers of groups, of `size` with `free` that may go, at which zeroing may stop."""
        step = self.round_to // math.gcd(self.round_to, width)
        return range(size % step or step, self.most(size, free) + 1, step)


def select(
    scores: Sequence[Tensor],
    counts: int | Sequence[int],
    *,
    held: Sequence[Tensor],
    sizes: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    limits: Limits = Limits(),
) -> list[Tensor]:
    """Choose the groups to zero.

    Args:
        scores: one 1-d tensor a layer, for its free groups.
        counts: an int zeroes that many over all layers ('global'), a list that many in each
            ('local'). What is held already counts in.
        held: bool tensors like `scores`; these groups stay zero whatever they score.
        sizes: groups of each layer where not all of them are free; `limits` count these too.
        widths: channels in a group of each layer, for `round_to`; default 1.
        limits: see `Limits`.

    Returns:
        bool tensors like `scores`, True = zero. Equal scores go in the order of the layers, then
        of the groups.
    """
    rankings = [ScoreRanking(lambda s=s: s, h) for s, h in zip(scores, held, strict=True)]
    cuts = choose_cuts(rankings, counts, sizes=sizes, widths=widths, limits=limits)
    return [zero_marks(r, cut) for r, cut in zip(rankings, cuts, strict=True)]


def choose_cuts(
    rankings: Sequence[Ranking],
    counts: int | Sequence[int],
    *,
    sizes: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    limits: Limits = Limits(),
) -> list[Cutoff | None]:
    """Where to cut each layer's ranking; None leaves it at what is held. See `select`.

    Raises:
        ValueError: what the criterion returns cannot be used; the layer is named.
    """
    _prepare(rankings)
    sizes = list(sizes or [r.size for r in rankings])
    floors = [r.held for r in rankings]
    free = zip(sizes, rankings, strict=True)
    most = [max(limits.most(size, r.size), r.held) for size, r in free]
    if isinstance(counts, int):
        cuts = _together(rankings, min(max(counts, sum(floors)), sum(most)), most)
    else:
        wanted = [min(n, top) for n, top in zip(counts, most, strict=True)]
        cuts = [_within(r, n) for r, n in zip(rankings, wanted, strict=True)]
    if limits.round_to > 1:
        wide = widths or [1] * len(sizes)
        for i, (ranking, size, width) in enumerate(zip(rankings, sizes, wide, strict=True)):
            reached = cuts[i].n if cuts[i] else ranking.held
            n = limits.rounded(reached, size, width)
            cuts[i] = cuts[i] if n == reached else _within(ranking, n)
    for ranking, cut in zip(rankings, cuts, strict=True):
        if cut is None:
            ranking.check()  # bad scores are refused, also where they make no difference
    return cuts


def zero_marks(ranking: ScoreRanking, cut: Cutoff | None) -> Tensor:
    """(size,) bool, True for what goes; without a cut, for what is held."""
    if cut is None:
        return ranking.marks.clone()
    stays = torch.empty_like(ranking.marks)
    write_kept(ranking, cut, stays)
    return stays.logical_not_()


def _prepare(rankings: Sequence[Ranking]) -> None:
    """Compute what is kept, and compare all scores in the widest of their types."""
    for ranking in rankings:
        ranking.prepare()
    if any(r.dtype == torch.float64 for r in rankings):
        for ranking in rankings:
            ranking.dtype = torch.float64


def _within(ranking: Ranking, n: int) -> Cutoff | None:
    return cut_lowest([ranking], n)[0] if n > ranking.held else None


def _together(rankings: Sequence[Ranking], n: int, most: Sequence[int]) -> list[Cutoff | None]:
    """The `n` lowest over all layers, in none of them more than its `most`.

    A layer that would go beyond its bound is filled up to it and leaves the ranking; the others
    share what remains. Their threshold only rises by that, so a filled layer stays filled.
    """
    cuts: list[Cutoff | None] = [None] * len(rankings)
    ranked = list(range(len(rankings)))
    while ranked and n > sum(rankings[i].held for i in ranked):
        for i, cut in zip(ranked, cut_lowest([rankings[i] for i in ranked], n), strict=True):
            cuts[i] = cut
        over = [i for i in ranked if cuts[i].n > most[i]]
        if not over:
            break
        for i in over:
            cuts[i] = _within(rankings[i], most[i])
        n -= sum(most[i] for i in over)
        ranked = [i for i in ranked if i not in over]
    return cuts


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def apply_masks(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Write +0.0 where a mask is 0 and leave the other bits alone, in one foreach call.

    The uint8 mask multiplies the float's bits as an integer: unlike a product of floats this
    leaves neither -0.0 nor nan behind, and costs no more. It is widened to integers on the way,
    so that large weights are taken in pieces.

    Args:
        weights: floating-point tensors of any shapes.
        masks: uint8 tensors of the same shapes, 1 = kept, 0 = zeroed.
    """
    weights = [w.detach() for w in weights]
    wide = [w.element_size() not in _BITS for w in weights]  # complex128: two numbers each
    weights = [torch.view_as_real(w) if x else w for w, x in zip(weights, wide, strict=True)]
    masks = [torch.stack((m, m), -1) if x else m for m, x in zip(masks, wide, strict=True)]
    bits = [p for w in weights for p in pieces(w.view(_BITS[w.element_size()]))]
    if bits:
        torch._foreach_mul_(bits, [p for m in masks for p in pieces(m)])
