"""Which units go for a budget: the least important for what they cost, or a share of each layer."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.criteria import Criterion
from ..core.records import refuse_equal
from ..coupling.labels import PRODUCE
from ..coupling.ranking import ranked_bundles, require_scales
from ..coupling.units import Axis
from ..measure.costs import Costs, Running

__all__ = ["Queue", "by_importance", "by_share", "queues_of"]

_HALVINGS = 60
_NEAR = 0.01  # a target is met where so little of it is left
_TRIALS = 8  # of holding axes whose steps are too large for that


class _Offer(NamedTuple):
    """What may go next, in the order of what its importance is for what it saves."""

    price: float
    axis: int
    then: int
    saving: float


@dataclass(frozen=True, eq=False)
class Queue:
    """The bundles of an axis in the order in which they go.

    Args:
        units: (bundles, blocks), the least important first.
        importance: what is lost with the first 1, 2, ... of them, after a 0.
        weight: of a share of what the axis still has; None where importance counts as it is.
        steps: how many may go, after a 0; the last number is the most.
        due: how many have to go, of these.
    """

    units: Tensor
    importance: Sequence[float]
    weight: int | None
    steps: Sequence[int]
    due: int = 0

    def lost(self, done: int, then: int) -> float:
        """The importance of the bundles between two numbers."""
        lost = self.importance[then] - self.importance[done]
        if self.weight is None:
            return lost
        left = self.importance[-1] - self.importance[done]
        return self.weight * lost / left if left > 0 else 0.0

    def nearest(self, n: int) -> int:
        """The number nearest to `n` that may go, the smaller of two, but not less than is due."""
        i = bisect_right(self.steps, n)
        less = self.steps[i - 1] if i else 0
        more = self.steps[i] if i < len(self.steps) else less
        near = more if more - n < n - less else less
        return max(self.due, near)


def queues_of(
    tensors: Mapping[str, Tensor],
    axes: Sequence[Axis],
    criterion: Criterion,
    steps: Sequence[Sequence[int]],
    due: Sequence[int],
    gone: Sequence[int],
) -> list[Queue]:
    """The queue of each axis.

    Importance of units of different layers is comparable where the criterion says how, and where
    it adds scores up. Else it is the share of what its layers still have, added up over the layers
    that make the unit: the fewer there are left of a layer, the more each of them counts, so that
    none is emptied for being wide, small or expensive.

    Args:
        tensors: the network's parameters by name.
        axes: its axes.
        criterion: scores of weights.
        steps: for each axis the numbers of bundles that may go.
        due: for each axis how many have to.
        gone: for each axis the units that were removed before.

    Raises:
        NothingToCompare: the criterion needs more than weights, and sees no difference.
    """
    require_scales(tensors, [axis for axis in axes if axis.bundles], criterion)
    relative = criterion.norm in (None, "mean") and criterion.reduce != "sum"
    scored = [
        ranked_bundles(tensors, axis, criterion, relative=not relative, gone=lost)
        if axis.bundles
        else (torch.zeros(0), torch.zeros(0, axis.blocks, dtype=torch.long))
        for axis, lost in zip(axes, gone, strict=True)
    ]
    if criterion.needs:
        refuse_equal([s for s, _ in scored if len(s)])
    found = [(scores.detach().cpu().double(), units) for scores, units in scored]
    least = min((float(s.min()) for s, _ in found if len(s)), default=0.0)
    queues = []
    for axis, (scores, units), allowed, must in zip(axes, found, steps, due, strict=True):
        order = scores.argsort(stable=True)
        own = float(scores.min()) if relative and len(scores) else least
        values = scores[order] - min(own, 0.0)  # nothing is worth less than nothing
        layers = 1 if criterion.reduce == "sum" else len(axis.having(PRODUCE))
        if not relative:
            values = values * units.shape[1] * layers  # of all units of a bundle, in all layers
        cumulated = [0.0, *accumulate(values.tolist())]
        weight = layers if relative else None
        queues.append(Queue(units[order], cumulated, weight, allowed, must))
    return queues


def by_importance(costs: Costs, queues: Sequence[Queue], goal: float) -> list[int]:
    """How many bundles of each axis go: the least important for what they save, one by one.

    What a bundle saves follows what is already gone, as does its share of its axis. Both only
    make it dearer, so that one that was the cheapest and still is may go. What would save far more
    than is still needed waits: others may do.
    """
    counts = [q.due for q in queues]
    left = Running(costs, counts)

    def offer(a: int) -> _Offer | None:
        steps = queues[a].steps
        i = bisect_right(steps, counts[a])
        then = steps[i] if i < len(steps) else counts[a]
        saving = left.saving(a, then - counts[a]) if then > counts[a] else 0.0
        if saving <= 0:
            return None
        return _Offer(queues[a].lost(counts[a], then) / saving, a, then, saving)

    def take(x: _Offer) -> None:
        left.remove(x.axis, x.then - counts[x.axis])
        counts[x.axis] = x.then

    heap = [first for a in range(len(queues)) if (first := offer(a)) is not None]
    heapq.heapify(heap)
    large: list[int] = []
    while heap and left.total > goal:
        now = offer(heapq.heappop(heap).axis)
        if now is None:
            continue
        if heap and now > heap[0]:
            heapq.heappush(heap, now)
        elif left.total - now.saving < (1 - _NEAR) * goal:
            large.append(now.axis)
        else:
            take(now)
            if (following := offer(now.axis)) is not None:
                heapq.heappush(heap, following)
    while left.total > goal and large:
        offers = [x for a in large if (x := offer(a)) is not None]
        enough = [x for x in offers if left.total - x.saving <= goal]
        if not offers:
            break
        take(min(enough or offers, key=lambda x: x.saving if enough else -x.saving))
    return counts


def by_share(
    costs: Costs,
    queues: Sequence[Queue],
    goal: float,
    shares: Callable[[float], Sequence[int]],
) -> list[int]:
    """How many bundles of each axis go: the smallest share of each that meets the goal.

    Of the numbers that may go it is the nearest to that share, so that no layer stays wider than
    others because its steps, those of `round_to`, are large. Where the last step would take some
    of many axes, it is taken by as many as it needs. Where it takes a large unit, others may keep
    one more, and where that is still too little, all others a smaller share.

    Args:
        costs: of the network.
        queues: of its axes.
        goal: what it may cost.
        shares: how many bundles of each axis a share is.
    """
    held: dict[int, int] = {}
    best: list[int] = []
    most, last = -1.0, None
    for _ in range(_TRIALS):
        counts, total, coarse = _by_share_of_others(costs, queues, goal, shares, held)
        if not best or most < total <= goal:
            best, most = counts, total
        if total >= (1 - _NEAR) * goal:
            break
        if coarse is not None:
            held[coarse[0]] = counts[coarse[0]]
        elif last is not None:  # all others keep all they have, and it is still too little
            held[last[0]] = last[1]
        else:
            break
        last = coarse
    return best


def _by_share_of_others(
    costs: Costs,
    queues: Sequence[Queue],
    goal: float,
    shares: Callable[[float], Sequence[int]],
    held: Mapping[int, int],
) -> tuple[list[int], float, tuple[int, int] | None]:
    """The same where some axes are held, and what it costs.

    Also the axis whose last step took most of it, and how many would go of it without that step.
    """

    def at(share: float) -> list[int]:
        near = [q.nearest(n) for q, n in zip(queues, shares(share), strict=True)]
        return [held.get(a, n) for a, n in enumerate(near)]

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if costs.at(at(middle)) > goal:
            low = middle
        else:
            high = middle
    counts = at(low)
    most = [max((q.due, *q.steps)) for q in queues]
    then = at(high) if high < 1 else [held.get(a, n) for a, n in enumerate(most)]
    left = Running(costs, counts)
    steps = [
        (left.saving(a, n - counts[a]), a, counts[a]) for a, n in enumerate(then) if n > counts[a]
    ]
    _part_of_the_way(left, counts, then, goal)
    if left.total < (1 - _NEAR) * goal:
        _give_back(left, queues, counts, goal)
    taken = [step for step in steps if counts[step[1]] == then[step[1]]]
    return counts, left.total, max(taken)[1:] if taken else None


def _part_of_the_way(left: Running, counts: list[int], then: Sequence[int], goal: float) -> None:
    """From counts that are too few towards others that are enough, as far as it takes."""

    def saving(a: int) -> float:
        return left.saving(a, then[a] - counts[a])

    ahead = sorted((a for a, n in enumerate(then) if n > counts[a]), key=saving, reverse=True)
    for least in ((1 - _NEAR) * goal, -1.0):
        for a in ahead if least > 0 else reversed(ahead):
            if left.total > goal and left.total - saving(a) >= least:
                left.remove(a, then[a] - counts[a])
                counts[a] = then[a]


def _give_back(left: Running, queues: Sequence[Queue], counts: list[int], goal: float) -> None:
    """One step of each axis comes back where that still meets the goal, large ones first."""
    pairs = zip(queues, counts, strict=True)
    before = [max((s for s in (0, *q.steps) if s < n), default=n) for q, n in pairs]
    last = [-left.saving(a, n - counts[a]) for a, n in enumerate(before)]
    for a in sorted(range(len(counts)), key=lambda a: -last[a]):
        more = -left.saving(a, before[a] - counts[a])
        if before[a] >= queues[a].due and 0 < more <= goal - left.total:
            left.remove(a, before[a] - counts[a])
            counts[a] = before[a]
