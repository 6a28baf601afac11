"""The n lowest of all scores, exactly, without ever holding all of them.

Scores of single weights take more memory than the masks do, and memory takes more time than
arithmetic: so they are looked at in pieces that stay in the cache, and computed again each time.

An even sample of N ** (2 / 3) of N scores brackets the threshold (Floyd & Rivest, "Expected time
bounds for selection", 1975). One look counts what lies below the bracket and collects the per cent
or two inside it, among which the threshold is found; another one writes the masks. Where the sample
misled or the bracket holds too much, the threshold is read off the bits of the scores, 16 at a time
(radix selection; Alabi et al., "Fast k-selection algorithms for graphics processing units", 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ranking import Ranking, pieces

__all__ = ["Cutoff", "cut_lowest", "write_kept"]

_FEW = 1 << 13  # scores that are cheaper to sort out at once than to sample
_PART = 16  # one in so many scores may be collected
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Cutoff:
    """Which groups of a layer go: those that score below a threshold, and some that equal it.

    Args:
        threshold: groups that score less go.
        n: how many go in all.
        equal: how many groups score just the threshold.
        ties: how many of these go, the first ones.
    """

    threshold: float
    n: int
    equal: int = 0
    ties: int = 0


def cut_lowest(rankings: Sequence[Ranking], n: int) -> list[Cutoff]:
    """The `n` first of all groups: a cut for each layer.

    Equal scores go in the order of the layers, then of the groups.

    Args:
        rankings: one a layer, prepared, with scores of one dtype.
        n: how many go; one or more, and not fewer than are held.

    Raises:
        ValueError: what the criterion returns cannot be used; the layer is named.
    """
    if n >= sum(r.size for r in rankings):
        for ranking in rankings:
            ranking.check()
        return [Cutoff(math.inf, r.size) for r in rankings]
    threshold, places = _search(rankings, n)
    rest = n - sum(less for less, _ in places)
    cuts = []
    for less, equal in places:
        ties = min(equal, rest)
        rest -= ties
        cuts.append(Cutoff(threshold, less + ties, equal, ties))
    return cuts


def write_kept(ranking: Ranking, cut: Cutoff, out: Tensor) -> None:
    """Write what stays: 1 into a bool or uint8 tensor of the scores' shape, 0 for what goes."""
    gone = 0  # of the groups that score the threshold
    for scores, part in zip(ranking.scores(), pieces(out), strict=True):
        all_go = cut.ties == cut.equal or gone < cut.ties
        stays = _compare(torch.gt if all_go else torch.ge, scores, cut.threshold)
        if gone < cut.ties < cut.equal:
            equal = scores.flatten() == cut.threshold
            stays += (equal & (equal.cumsum(0) > cut.ties - gone)).view(scores.shape)
            gone += int(equal.count_nonzero())
        part.view(torch.bool).copy_(stays)


# --- the threshold -----------------------------------------------------------------------------

Places = list[tuple[int, int]]  # how many scores of each layer are less than it, and equal to it


def _search(rankings: Sequence[Ranking], n: int) -> tuple[float, Places]:
    """The n-th smallest score of all, at the least cost that it takes."""
    if sum(r.size for r in rankings) <= _FEW:
        _be_strict(rankings)
        every = [torch.cat([s.flatten() for s in r.scores()]) for r in rankings]
        return _among(every, [0] * len(every), n)
    low, high = _bracket(rankings, n)
    if any(r.strict or low < r.resting for r in rankings):
        _be_strict(rankings)
        low, high = _bracket(rankings, n)
    below, inside = _inside(rankings, low, high)
    if sum(below) < n <= sum(below) + sum(len(x) for x in inside):
        return _among(inside, below, n)
    if not all(r.strict for r in rankings):
        _be_strict(rankings)
        return _search(rankings, n)
    for threshold in (low, high):  # with many equal scores it is often one of these
        places = [_place(r.scores(), threshold) for r in rankings]
        less, equal = (sum(counts) for counts in zip(*places, strict=True))
        if less < n <= less + equal:
            return threshold, places
    threshold = _by_digits(rankings, n)
    return threshold, [_place(r.scores(), threshold) for r in rankings]


def _among(inside: Sequence[Tensor], below: Sequence[int], n: int) -> tuple[float, Places]:
    """The n-th smallest score where `below` of each layer are less than those `inside`."""
    threshold = torch.cat(inside).kthvalue(n - sum(below)).values.item()
    more = [_place(pieces(x), threshold) for x in inside]
    return threshold, [(b + less, equal) for b, (less, equal) in zip(below, more, strict=True)]


def _place(scores: Iterable[Tensor], threshold: float) -> tuple[int, int]:
    less = equal = 0
    for piece in scores:
        less = less + _compare(torch.lt, piece, threshold).sum().long()
        equal = equal + _compare(torch.eq, piece, threshold).sum().long()
    return int(less), int(equal)


def _bracket(rankings: Sequence[Ranking], n: int) -> tuple[float, float]:
    """Two scores, most likely one below and one above the n-th smallest."""
    total = sum(r.size for r in rankings)
    stride = round(total ** (1 / 3)) | 1  # odd: rows of even length shall not hide anything
    sample = torch.cat([r.sample(stride) for r in rankings])
    at, slack = n / total * len(sample), 1.5 * math.sqrt(len(sample)) + 2  # three deviations
    low, high = math.floor(at - slack), math.ceil(at + slack)
    return (
        sample.kthvalue(low).values.item() if low > 0 else -math.inf,
        sample.kthvalue(high).values.item() if high <= len(sample) else math.inf,
    )


def _inside(rankings: Sequence[Ranking], low: float, high: float) -> tuple[list[int], list[Tensor]]:
    """How many scores of each layer are up to `low`, and those between `low` and `high`.

    Two empty lists where these would take too much memory.
    """
    below, inside, room = [], [], sum(r.size for r in rankings) // _PART
    for ranking in rankings:
        above, found = 0, []
        for scores in ranking.scores():
            over = _compare(torch.gt, scores, low)
            above += int(over.sum())  # exact: a piece has fewer than 2 ** 24
            between = over.mul_(_compare(torch.lt, scores, high))
            found.append(scores[between.bool()])
            room -= len(found[-1])
            if room < 0:
                return [], []
        below.append(ranking.size - above)
        inside.append(torch.cat(found))
    return below, inside


def _compare(compare: Callable[..., Tensor], scores: Tensor, value: float) -> Tensor:
    """1.0 and 0.0: comparing into floats is much faster than comparing into bools."""
    return compare(scores, value, out=torch.empty_like(scores))


def _by_digits(rankings: Sequence[Ranking], n: int) -> float:
    """The n-th smallest score: 16 bits of it a look, the highest first."""
    _be_strict(rankings)
    bits = _BITS[rankings[0].dtype]
    base = -(1 << 15)  # the least number that begins with the digits found
    for shift in range(torch.iinfo(bits).bits - 16, -1, -16):
        counts = 0
        for ranking in rankings:
            for scores in ranking.scores():
                begin = _as_integers(scores, bits).bitwise_right_shift_(shift).flatten()
                digit = begin.clamp_(base - 1, base + (1 << 16)).sub_(base - 1)
                counts = counts + torch.bincount(digit, minlength=(1 << 16) + 2)
        found = int((counts.cumsum(0) < n).sum()) - 1
        base = (base + found) << (16 if shift else 0)
    whole = torch.tensor(base, dtype=bits)
    return _in_order(whole).view(rankings[0].dtype).item()


def _as_integers(scores: Tensor, bits: torch.dtype) -> Tensor:
    """Integers in the order of the scores, -0.0 the same as 0.0."""
    return _in_order((scores + 0.0).view(bits))


def _in_order(whole: Tensor) -> Tensor:
    """Negative floats have their bits in falling order: turn these; its own inverse."""
    sign = whole >> (torch.iinfo(whole.dtype).bits - 1)
    return whole ^ (sign & torch.iinfo(whole.dtype).max)


def _be_strict(rankings: Sequence[Ranking]) -> None:
    for ranking in rankings:
        ranking.strict = True
