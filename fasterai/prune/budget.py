"""Budgets: how a target is met, and what is said where it cannot be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import nn

from ..core.criteria import Criterion
from ..core.masks import Limits
from ..core.names import pick, raw_tensors
from ..core.target import Target, width_of
from ..coupling.inputs import Inputs
from ..coupling.labels import PRODUCE
from ..coupling.probe import Removal, cutting
from ..coupling.surgery import shadowed
from ..coupling.units import Axis, Coupling
from ..measure.costs import Costs, Running, macs_of_widths, parameters_of_widths
from ..measure.profile import macs, saved_bytes
from .queues import Queue, by_importance, by_share, queues_of

__all__ = ["Reached", "UnreachableTarget"]

_ROUNDS = 8
_NEAR = 0.01


class UnreachableTarget(ValueError):
    """A target that no cut can meet; nothing was changed.

    Attributes:
        least: the least that the network can cost.
    """

    def __init__(self, message: str, least: float = math.nan) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class Reached:
    """What became of a target.

    Args:
        target: what was asked.
        dense: what the dense network costs.
        goal: what the target allows.
        predicted: what the smaller network costs by the formula it was chosen with.
        measured: what it costs.
    """

    target: Target
    dense: float
    goal: float
    predicted: float
    measured: float


class Budget:
    """What a network and cuts of it cost, in the unit of a target.

    Args:
        target: what is asked.
        model: the network as it is now.
        inputs: what it runs on.
        coupling: what its labels say.
        axes: its axes.
        limits: what bounds the units that go.
        gone: for each axis the units that were removed before; floors and caps count them.

    Raises:
        ValueError: a floor or cap names no layer that makes channels.
    """

    def __init__(
        self,
        target: Target,
        model: nn.Module,
        inputs: Inputs,
        coupling: Coupling,
        axes: Sequence[Axis],
        limits: Limits,
        gone: Sequence[int] | None = None,
    ) -> None:
        self.target, self.limits = target, limits
        self.gone = [0] * len(axes) if gone is None else list(gone)
        self.model, self.inputs = model, inputs
        self.coupling, self.axes = coupling, list(axes)
        self.costs = self._costs()
        self._floors = self._widths("floors")
        self._caps = self._widths("caps")

    def measured(self, remove: Removal | None = None) -> float | None:
        """What the network costs, or would without these units; None where it cannot run so."""
        if not remove:
            return self._measure()
        how = cutting(self.model, self.coupling, self.axes, remove)
        only = self.coupling.analysis.shapes and self.target.kind != "bytes"
        with shadowed(self.model, how, shapes=only):
            return self._measure()

    def dense(self) -> float:
        """What the network cost with all that was removed before."""
        gone = zip(self.gone, self.axes, strict=True)
        return self.costs.at([-(n // axis.blocks) for n, axis in gone])

    def met(self, goal: float) -> bool:
        """Whether the network is as small as it has to be."""
        return self.measured() <= goal and not any(self._due(a) for a in range(len(self.axes)))

    def queues(self, criterion: Criterion, share: float = 1.0) -> list[Queue]:
        """The bundles of each axis in the order in which they go; see `queues_of`.

        Args:
            criterion: scores of weights.
            share: of the way to the caps.
        """
        steps = [self._steps(a) for a in range(len(self.axes))]
        due = [self._due(a, share) for a in range(len(self.axes))]
        tensors = dict(self.model.named_parameters())
        return queues_of(tensors, self.axes, criterion, steps, due, self.gone)

    def choose(
        self,
        queues: Sequence[Queue],
        goal: float,
        shares: Callable[[float], Sequence[int]] | None,
    ) -> tuple[Removal, float, float]:
        """Units whose removal meets the goal, and what the network then costs.

        Where the formula is wrong, measuring corrects what it is asked for.

        Args:
            queues: of the axes.
            goal: what the network may cost.
            shares: see `by_share`; None takes units of all axes by importance.

        Returns:
            The units, the predicted cost and the measured one.

        Raises:
            UnreachableTarget: so little cannot be reached.
        """
        self.check(goal)
        least = self.costs.at(self._most())
        aim, best, over = goal, None, math.inf
        for k in range(_ROUNDS):
            counts = self._counts(queues, aim, shares)
            remove = self._units(queues, counts)
            predicted, measured = self.costs.at(counts), self.measured(remove)
            if measured is None:  # a trial will tell which axes must stay
                return remove, predicted, predicted
            if measured <= goal and (best is None or measured > best[2]):
                best = remove, predicted, measured
            right = math.isclose(predicted, measured, rel_tol=1e-3)
            if measured <= goal and (right or measured >= (1 - _NEAR) * goal):
                break
            if measured > goal:  # sizes of files move in steps, larger than what is missing
                over = min(over, aim)
                aim -= 2**k * (measured - goal)
            else:
                aim *= goal / measured if measured else 1.0
            aim = max(least, min(aim, over * (1 - 1e-4)))
        if best is None:
            self._refuse(goal, measured)
        return best

    def check(self, goal: float) -> None:
        """Raise an UnreachableTarget where even all that may go is not enough."""
        for a in range(len(self.axes)):
            self._due(a)
        least = self.costs.at(self._most())
        if least > goal * (1 + 1e-12):
            exact = self.target.kind == "bytes"  # beside numbers there are headers
            self._refuse(goal, (exact and self.measured(self._smallest())) or least)

    def without(self, failed: Mapping[int, str]) -> Budget:
        """The same where these axes stay, with the reasons."""
        axes = [x.pinned(failed[a]) if a in failed else x for a, x in enumerate(self.axes)]
        again = copy(self)
        again.axes = axes
        return again

    # --- inside --------------------------------------------------------------------------------

    def _counts(
        self,
        queues: Sequence[Queue],
        aim: float,
        shares: Callable[[float], Sequence[int]] | None,
    ) -> list[int]:
        if shares is None:
            return by_importance(self.costs, queues, aim)
        return by_share(self.costs, queues, aim, shares)

    def _costs(self) -> Costs:
        kind, count = self.target.kind, len(self.axes)
        if kind == "macs":
            if self._measure() is None:
                raise ValueError(
                    f"{self.target}: the MACs of this network cannot be counted; ask for "
                    f"parameters or bytes"
                )
            terms = macs_of_widths(self.model, self.inputs, self.coupling, self.axes)
            return Costs(terms, count)
        if kind == "parameters":
            tensors = dict(self.model.named_parameters())
            return Costs(parameters_of_widths(tensors, self.axes, lambda x: 1), count)
        saved = {id(x) for x in self.model.state_dict(keep_vars=True).values()}
        tensors = {name: x for name, x in raw_tensors(self.model).items() if id(x) in saved}
        terms = parameters_of_widths(tensors, self.axes, lambda x: x.element_size())
        content = sum(x.numel() * x.element_size() for x in tensors.values())
        return Costs(terms, count, fixed=self._measure() - content)

    def _measure(self) -> float | None:
        if self.target.kind == "macs":
            return macs(self.model, self.inputs).get("")
        if self.target.kind == "parameters":
            return float(sum(p.numel() for p in self.model.parameters()))
        return float(saved_bytes(self.model))

    def _widths(self, which: str) -> list[float | None]:
        """The floor or cap of each axis as a share of its units, or None."""
        found: list[float | None] = [None] * len(self.axes)
        strictest = max if which == "floors" else min
        for name, width in getattr(self.target, which).items():
            layers = pick(self.model, name, which)
            known = False
            for a, axis in enumerate(self.axes):
                for slot in axis.having(PRODUCE):
                    if slot.module in layers:
                        rows = self.model.get_parameter(slot.parameter).shape[slot.dim]
                        rows *= self._whole(a) / axis.size
                        share = min(1.0, width_of(width, rows) / rows)
                        found[a] = share if found[a] is None else strictest(found[a], share)
                        known = True
            if not known:
                raise ValueError(
                    f"{which}: {name!r} makes no channels that the pruner knows of; "
                    f"pruner.axes() lists the layers that do"
                )
        return found

    def _whole(self, a: int) -> int:
        """The units that an axis had at first."""
        return self.axes[a].size + self.gone[a]

    def _steps(self, a: int) -> list[int]:
        """How many bundles of an axis may go."""
        axis, floor = self.axes[a], self._floors[a] or 0.0
        size = axis.size // axis.blocks
        stay = math.ceil(floor * self._whole(a) / axis.blocks - 1e-9)
        allowed = self.limits.steps(size, axis.bundles, axis.blocks)
        return [n for n in allowed if size - n >= stay]

    def _most(self) -> list[int]:
        """The most bundles of each axis that may go."""
        return [max(self._steps(a), default=0) for a in range(len(self.axes))]

    def _smallest(self) -> Removal:
        """All that may go."""
        remove = {}
        for a, n in enumerate(self._most()):
            axis = self.axes[a]
            remove[a] = torch.zeros(axis.size, dtype=torch.bool)
            remove[a][axis.bundled(axis.free)[:n].flatten()] = True
        return remove

    def _due(self, a: int, share: float = 1.0) -> int:
        """How many have to go for the sake of a cap, a share of the way there."""
        if self._caps[a] is None:
            return 0
        axis, steps = self.axes[a], self._steps(a)
        size = axis.size // axis.blocks
        over = size - math.floor(self._caps[a] * self._whole(a) / axis.blocks + 1e-9)
        if over <= 0:
            return 0
        due = next((n for n in steps if n >= over), None)
        if due is None:
            left = axis.blocks * (size - max(steps, default=0))
            raise UnreachableTarget(
                f"{self.target} cannot be reached: {axis.name} keeps {left} of {axis.size} "
                f"channels at least, more than its cap allows ({self._holder(a)})",
                math.nan,
            )
        return max((n for n in (0, *steps) if n <= due * share), default=0)

    def _units(self, queues: Sequence[Queue], counts: Sequence[int]) -> Removal:
        remove = {}
        for a, (queue, n) in enumerate(zip(queues, counts, strict=True)):
            mark = torch.zeros(self.axes[a].size, dtype=torch.bool)
            mark[queue.units[:n].flatten()] = True
            remove[a] = mark
        return remove

    def _refuse(self, goal: float, least: float) -> None:
        whole = self.costs.at([0] * len(self.axes))
        unit = "ms" if self.target.timed else self.target.kind
        raise UnreachableTarget(
            f"{self.target} cannot be reached: it allows {_number(goal)} {unit}, and "
            f"the least that is left is {_number(least)} (of {_number(whole)} now). What holds "
            f"it: {self._holders()}. Ask for less, or loosen what holds it",
            least,
        )

    def _holders(self) -> str:
        """The axes that cost most in the smallest network there is, and why they stay."""
        most = self._most()
        left = Running(self.costs, most)
        rest = [axis.size // axis.blocks - n for axis, n in zip(self.axes, most, strict=True)]
        costs = [(left.saving(a, n) if n else 0.0, a) for a, n in enumerate(rest)]
        said = []
        for cost, a in sorted(costs, key=lambda c: -c[0])[:4]:
            axis = self.axes[a]
            said.append(
                f"{axis.name} keeps {rest[a] * axis.blocks} of {axis.size} channels "
                f"({self._holder(a)}), on which {_number(cost)} depend"
            )
        if self.costs.fixed > 0:
            said.append(f"{_number(self.costs.fixed)} depend on no channels that can go")
        return "; ".join(said)

    def _holder(self, a: int) -> str:
        """Why an axis keeps what it keeps."""
        axis = self.axes[a]
        size = axis.size // axis.blocks
        reasons = Counter(pin for pin in axis.pins if pin is not None)
        if reasons and 2 * len(axis.free) < axis.size:
            return reasons.most_common(1)[0][0]
        if (self._floors[a] or 0.0) * size > self.limits.min_keep:
            return "its floor"
        names = [n for n in ("min_keep", "round_to") if getattr(self.limits, n) > 1]
        held = " and ".join(f"{n}={getattr(self.limits, n)}" for n in names)
        return held or next(iter(reasons), None) or "a channel stays in each layer"


def _number(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"
