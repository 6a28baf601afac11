"""Masks: exactly n groups of the lowest score, ties broken the same way every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

__all__ = ["Limits", "apply_masks", "as_fraction", "lowest", "select"]

_FEW = 1 << 13  # scores that are cheaper to sort out at once than to sample


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
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")

    def most(self, size: int, free: int) -> int:
        """The most that `min_keep` allows to zero of `size` groups, `free` of which may go."""
        return max(0, min(free, size - self.min_keep))

    def rounded(self, n: int, size: int, width: int = 1) -> int:
        """`n` lowered until `size - n` is a multiple of `round_to`; 0 where no such n exists.

        Where a group is `width` channels, these are counted.
        """
        step = self.round_to // math.gcd(self.round_to, width)
        return max(0, size - math.ceil((size - n) / step) * step)


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
    free = [s.numel() for s in scores]
    sizes = list(sizes or free)
    floors = [int(h.count_nonzero()) for h in held]
    most = [
        max(limits.most(size, n), floor) for size, n, floor in zip(sizes, free, floors, strict=True)
    ]
    if isinstance(counts, int):
        n = min(max(counts, sum(floors)), sum(most))
        found = _together(scores, n, held, most)
    else:
        wanted = zip(counts, floors, most, strict=True)
        wanted = [min(max(n, floor), top) for n, floor, top in wanted]
        found = [_within(s, h, n) for s, h, n in zip(scores, held, wanted, strict=True)]
    if limits.round_to > 1:
        wide = widths or [1] * len(sizes)
        for i, (size, width, floor) in enumerate(zip(sizes, wide, floors, strict=True)):
            n = max(limits.rounded(int(found[i].count_nonzero()), size, width), floor)
            found[i] = _within(scores[i], held[i], n)
    return found


def _within(scores: Tensor, held: Tensor, n: int) -> Tensor:
    return held.clone() if n <= int(held.count_nonzero()) else lowest([_first(scores, held)], n)[0]


def _first(scores: Tensor, held: Tensor) -> Tensor:
    """Scores with the held groups below all others."""
    floor = torch.finfo(scores.dtype).min
    return scores.clamp(min=floor).masked_fill_(held, -math.inf)


def _together(
    scores: Sequence[Tensor], n: int, held: Sequence[Tensor], most: Sequence[int]
) -> list[Tensor]:
    """The `n` lowest over all layers, in none of them more than its `most`.

    A layer that would go beyond its bound is filled up to it and leaves the ranking; the others
    share what remains. Their threshold only rises by that, so a filled layer stays filled.
    """
    found: list[Tensor] = [torch.zeros(0)] * len(scores)
    ranked = list(range(len(scores)))
    while ranked:
        zero = lowest([_first(scores[i], held[i]) for i in ranked], n)
        over = [i for i, z in zip(ranked, zero, strict=True) if int(z.count_nonzero()) > most[i]]
        for i, z in zip(ranked, zero, strict=True):
            found[i] = _within(scores[i], held[i], most[i]) if i in over else z
        if not over:
            break
        n -= sum(most[i] for i in over)
        ranked = [i for i in ranked if i not in over]
    return found


def lowest(scores: Sequence[Tensor], n: int) -> list[Tensor]:
    """Mark the `n` lowest of all scores, equal ones in order: bool tensors like `scores`."""
    total = sum(s.numel() for s in scores)
    if n <= 0:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    if n >= total:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    threshold = _nth(scores, n)
    marks = [s < threshold for s in scores]
    missing = n - sum(int(m.count_nonzero()) for m in marks)
    for s, mark in zip(scores, marks, strict=True):
        ties = (s == threshold).nonzero().flatten()[:missing]
        mark[ties] = True
        missing -= ties.numel()
        if not missing:
            break
    return marks


def _nth(scores: Sequence[Tensor], n: int) -> Tensor:
    """The n-th smallest of all scores.

    Few scores are sorted out by `torch.kthvalue`. Of N scores, an even sample of N ** (2 / 3)
    brackets the threshold: it is one of the brackets, or the search goes on among the few per
    cent between them. Where the sample misled, all are sorted out after all.
    """
    total = sum(s.numel() for s in scores)
    if total > _FEW:
        low, high = _brackets(scores, n / total)
        below = _count(scores, torch.le, low)
        if n <= below and _count(scores, torch.lt, low) < n:
            return low
        between = torch.cat([s[(s > low) & (s < high)] for s in scores])
        if below < n <= below + between.numel():
            return _nth([between], n - below)
        if below + between.numel() < n <= _count(scores, torch.le, high):
            return high
    return torch.cat([s.flatten() for s in scores]).kthvalue(n).values


def _brackets(scores: Sequence[Tensor], share: float) -> tuple[Tensor, Tensor]:
    """Two scores, most likely below and above the one at this share of all."""
    stride = round(sum(s.numel() for s in scores) ** (1 / 3))
    sample = torch.cat([s.flatten()[::stride] for s in scores]).sort().values
    last = sample.numel() - 1
    at, slack = share * last, 3 * math.sqrt(last)
    return sample[max(0, math.floor(at - slack))], sample[min(last, math.ceil(at + slack))]


def _count(scores: Sequence[Tensor], compare: Callable[..., Tensor], value: Tensor) -> int:
    return sum(int(compare(s, value).count_nonzero()) for s in scores)


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
