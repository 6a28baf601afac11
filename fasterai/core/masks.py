"""Masks: exactly n groups of the lowest score, ties broken the same way every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

__all__ = ["Limits", "apply_masks", "as_fraction", "lowest", "select"]

_SAMPLE = 1 << 16  # scores looked at to bracket the threshold of a large selection


def as_fraction(value: object, name: str = "sparsity") -> float:
    """A fraction in [0, 1], or an error that says what to pass instead."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a fraction in [0, 1], got {value!r}")
    if 1 < value <= 100:
        raise ValueError(
            f"{name} must be a fraction in [0, 1], got {value}; for {value:g}% pass {value / 100:g}"
        )
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a fraction in [0, 1], got {value}")
    return float(value)


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
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")

    def most(self, size: int, free: int) -> int:
        """The most that `min_keep` allows to zero of `size` groups, `free` of which may go."""
        return max(0, min(free, size - self.min_keep))

    def rounded(self, n: int, size: int) -> int:
        """`n` lowered until `size - n` is a multiple of `round_to`; 0 where no such n exists."""
        return max(0, size - math.ceil((size - n) / self.round_to) * self.round_to)


def select(
    scores: Sequence[Tensor],
    counts: int | Sequence[int],
    *,
    held: Sequence[Tensor],
    sizes: Sequence[int] | None = None,
    limits: Limits = Limits(),
) -> list[Tensor]:
    """Choose the groups to zero.

    Args:
        scores: one 1-d tensor a layer, for its free groups.
        counts: an int zeroes that many over all layers ('global'), a list that many in each
            ('local'). What is held already counts in.
        held: bool tensors like `scores`; these groups stay zero whatever they score.
        sizes: groups of each layer where not all of them are free; `limits` count these too.
        limits: see `Limits`.

    Returns:
        bool tensors like `scores`, True = zero. Equal scores go in the order of the layers, then
        of the groups.
    """
    free = [s.numel() for s in scores]
    sizes = list(sizes or free)
    floors = [int(h.sum()) for h in held]
    most = [
        max(limits.most(size, n), floor) for size, n, floor in zip(sizes, free, floors, strict=True)
    ]
    if isinstance(counts, int):
        counts = _spread(scores, min(max(counts, sum(floors)), sum(most)), held, most)
    wanted = (min(max(n, floor), top) for n, floor, top in zip(counts, floors, most, strict=True))
    final = [
        max(limits.rounded(n, size), floor)
        for n, size, floor in zip(wanted, sizes, floors, strict=True)
    ]
    return [_within(s, h, n) for s, h, n in zip(scores, held, final, strict=True)]


def _within(scores: Tensor, held: Tensor, n: int) -> Tensor:
    return held.clone() if n <= int(held.sum()) else lowest([_first(scores, held)], n)[0]


def _first(scores: Tensor, held: Tensor) -> Tensor:
    """Scores with the held groups below all others."""
    floor = torch.finfo(scores.dtype).min
    return scores.clamp(min=floor).masked_fill_(held, -math.inf)


def _spread(
    scores: Sequence[Tensor], n: int, held: Sequence[Tensor], most: Sequence[int]
) -> list[int]:
    """How many of the `n` lowest over all layers fall in each, none above its `most`.

    A layer that would go beyond its bound is filled up to it and leaves the ranking; the others
    then share what remains. The bound of the others only comes nearer, so it stays filled.
    """
    counts = [0] * len(scores)
    ranked = list(range(len(scores)))
    while ranked:
        lists = [_first(scores[i], held[i]) for i in ranked]
        found = [int(zero.sum()) for zero in lowest(lists, n)]
        over = [i for i, k in zip(ranked, found, strict=True) if k > most[i]]
        for i, k in zip(ranked, found, strict=True):
            counts[i] = min(k, most[i])
        if not over:
            return counts
        n -= sum(most[i] for i in over)
        ranked = [i for i in ranked if i not in over]
    return counts


def lowest(scores: Sequence[Tensor], n: int) -> list[Tensor]:
    """Mark the `n` lowest of all scores, equal ones in order: bool tensors like `scores`."""
    total = sum(s.numel() for s in scores)
    if n <= 0:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    if n >= total:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    threshold = _nth(scores, n)
    marks = [s < threshold for s in scores]
    missing = n - sum(int(m.sum()) for m in marks)
    for s, mark in zip(scores, marks, strict=True):
        ties = (s == threshold).nonzero().flatten()[:missing]
        mark[ties] = True
        missing -= ties.numel()
        if not missing:
            break
    return marks


def _nth(scores: Sequence[Tensor], n: int) -> Tensor:
    """The n-th smallest of all scores.

    Few scores are sorted out by `torch.kthvalue`. Of many, an even sample brackets the threshold,
    and only what falls between the brackets is sorted out; where the sample misled, all are.
    """
    total = sum(s.numel() for s in scores)
    if total > 8 * _SAMPLE:
        stride = total // _SAMPLE
        sample = torch.cat([s.flatten()[::stride] for s in scores]).sort().values
        at, slack = n / total * sample.numel(), 4 * math.sqrt(sample.numel())
        low = sample[max(0, math.floor(at - slack))]
        high = sample[min(sample.numel() - 1, math.ceil(at + slack))]
        below = sum(int((s < low).sum()) for s in scores)
        between = torch.cat([s[(s >= low) & (s <= high)] for s in scores])
        if below < n <= below + between.numel():
            return between.kthvalue(n - below).values
    return torch.cat([s.flatten() for s in scores]).kthvalue(n).values


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def apply_masks(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Write +0.0 where a mask is 0 and leave the other bits alone, in one foreach call.

    The uint8 mask multiplies the float's bits as an integer: unlike a product of floats this
    leaves neither -0.0 nor nan behind, and costs no more.

    Args:
        weights: floating-point tensors of any shapes.
        masks: uint8 tensors of the same shapes, 1 = kept, 0 = zeroed.
    """
    if masks:
        bits = [w.detach().view(_BITS[w.element_size()]) for w in weights]
        torch._foreach_mul_(bits, list(masks))
