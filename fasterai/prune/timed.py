"""Budgets of time: chosen by a table of measured layers, verified on the whole network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import torch

from ..core.masks import Limits
from ..coupling.probe import Removal, cutting
from ..coupling.surgery import shadowed
from ..measure.costs import Costs
from ..measure.latency import LatencyTable, alternating, operation_times
from .budget import Budget, UnreachableTarget
from .queues import Queue

__all__ = ["TimedBudget"]

_STEPS = 1, 8, 16, 32  # of widths that may be fast
_WORTH = 0.9  # widths are rounded more where so much less is lost
_ROUNDS = 6  # the first choice and five corrections
_CORRECTIONS = 4  # of what is asked of the table, for a step of widths
_NEAR = 0.05  # under the goal: near enough
_OVER = 0.1  # over it: what is left of noise


class TimedBudget(Budget):
    """The milliseconds of a network and cuts of it, for `latency_ms` and `speedup`.

    The table says what widths are worth; how the whole network, timed by turns with the one it is
    made from, differs from its prediction corrects what is asked of it. Where the user asks for no
    `round_to`, widths are multiples of 8, 16 or 32 if much less is lost so for the same time.

    Args:
        dense_ms: what the dense network took; None where that was not measured: what was removed
            since counts as the table says.

    The other arguments are those of `Budget`.
    """

    def __init__(self, *args: Any, dense_ms: float | None = None) -> None:
        super().__init__(*args)
        was = super().dense() if any(self.gone) else self._now
        self._dense_ms = was if dense_ms is None else dense_ms
        self._least: float | None = None  # what the smallest network takes

    def dense(self) -> float:
        """What the dense network took."""
        return self._dense_ms

    def measured(self, remove: Removal | None = None) -> float:
        """Milliseconds that the network takes, or would without these units."""
        if not remove or not any(bool(units.any()) for units in remove.values()):
            return self._now
        how = cutting(self.model, self.coupling, self.axes, remove)
        states = nullcontext, partial(shadowed, self.model, how)
        now, then = self._alternating(states)
        return then / now * self._now  # drift of the machine does not count

    def check(self, goal: float) -> None:
        """Raise an UnreachableTarget where even all that may go is not enough.

        Before the first cut that is measured, too: the table does not tell the time that passes
        outside of operations, and that no cut saves.
        """
        super().check(goal)
        if any(self.gone):
            return
        if self._least is None:
            try:
                self._least = self.measured(self._smallest())
            except Exception:  # it cannot lose all that at once; a trial will tell what it can
                self._least = 0.0
        if self._least > (1 + _OVER) * goal:
            self._refuse(goal, self._least)

    def choose(
        self,
        queues: Sequence[Queue],
        goal: float,
        shares: Callable[[float], Sequence[int]] | None,
    ) -> tuple[Removal, float, float]:
        """Units whose removal meets the goal; see `Budget.choose`."""
        self.check(goal)
        if self.limits.round_to == 1:
            queues = self._fastest(queues, goal, shares)
        aim, tried, last = goal, [], None
        for _ in range(_ROUNDS):
            counts = self._counts(queues, aim, shares)
            if counts == last:
                break
            last = counts
            remove = self._units(queues, counts)
            tried.append((remove, self._predicted(counts), self.measured(remove)))
            measured = tried[-1][2]
            if (1 - _NEAR) * goal <= measured <= goal:
                return tried[-1]
            least = self.costs.at(self._most())
            aim = max(least, min(2 * aim, aim * 0.97 * goal / measured))
        met = [x for x in tried if x[2] <= goal]
        if met:
            return max(met, key=lambda x: x[2])
        best = min(tried, key=lambda x: x[2])
        if best[2] > (1 + _OVER) * goal:
            raise UnreachableTarget(
                f"{self.target} was not reached: the fastest network found takes {best[2]:.4g} ms, "
                f"{goal:.4g} are allowed; what costs most of it: {self._holders()}",
                best[2],
            )
        return best

    # --- inside --------------------------------------------------------------------------------

    def _costs(self) -> Costs:
        some = self.target.batch > 1 or self.inputs.samples is not None
        self._batch = self.inputs.batch(self.target.batch) if some else self.inputs
        self._threads = self.target.threads or torch.get_num_threads()
        device = self._batch.tensors[0].device
        table = LatencyTable(self._threads, device, self.target.table)
        where = self.model, self._batch, self.coupling, self.axes
        self._table, self._times = table, operation_times(*where, table)
        self._now = self._alternating([nullcontext])[0]
        whole = self._times.at([0] * len(self.axes))
        table.save()
        self._right = self._now / whole if whole else 1.0  # what the table does not know of
        terms = [(self._right * factor, widths) for factor, widths in self._times.terms]
        return Costs(terms, len(self.axes))

    def _predicted(self, counts: Sequence[int]) -> float:
        found = self._right * self._times.at(counts)
        self._table.save()
        return found

    def _fastest(
        self,
        queues: Sequence[Queue],
        goal: float,
        shares: Callable[[float], Sequence[int]] | None,
    ) -> Sequence[Queue]:
        """The queues with those steps of widths that lose least importance within the time."""
        found, least = queues, inf
        for step in _STEPS:
            own = [self._stepping(a, q, step) for a, q in enumerate(queues)]
            aim, lost = goal, inf
            for _ in range(_CORRECTIONS):
                counts = self._counts(own, aim, shares)
                took = self._predicted(counts)
                if took <= goal:
                    lost = min(lost, sum(q.lost(0, n) for q, n in zip(own, counts, strict=True)))
                if (1 - _NEAR) * goal <= took <= goal:
                    break
                aim *= 0.98 * goal / took
            if lost < _WORTH * least:
                found, least = own, lost
        return found

    def _stepping(self, a: int, queue: Queue, step: int) -> Queue:
        """A queue that stops where the width is a multiple of a step; what is due goes anyway."""
        axis = self.axes[a]
        stops = Limits(self.limits.min_keep, step).steps(
            axis.size // axis.blocks, axis.bundles, axis.blocks
        )
        steps = [n for n in queue.steps if n in stops]
        due = next((n for n in steps if n >= queue.due), queue.due)
        return replace(queue, steps=steps, due=due)

    def _alternating(self, states: Sequence[Callable[[], Any]]) -> list[float]:
        return alternating(self.model, self._batch, self._threads, states)
