"""Pruning step by step: towards shares of the network there was at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from torch import Tensor, nn

from ..core.criteria import Criterion, as_criterion, large_final
from ..core.masks import Limits, as_context, as_fraction
from ..core.names import LayerChoice, frozen_of, plain, unwrapped
from ..core.records import Records, stand_in
from ..core.target import Target
from ..core.warning import warn
from ..coupling.labels import PRODUCE, Dim
from ..coupling.ranking import require_scales, unit_scores
from ..coupling.remaining import remaining
from ..coupling.surgery import smaller
from ..coupling.units import Axis
from ..measure.profile import macs
from .amounts import Amount, as_amount, asks, counts_of, part_of, share_of
from .budget import Budget, Reached
from .fitting import cut_for, cuts_of, must_lead_to, steps_of
from .history import CutRecord, History
from .plan import Plan
from .pruner import Pruner, shapes
from .select import ranked_units
from .timed import TimedBudget
from .trial import Decision, Trial

__all__ = ["GradualPruner"]


class GradualPruner(Pruner):
    """Prunes a network on its way: `prune_to(0.5)` means half of the units there were at first.

    `prune_to(Target(macs=0.5))` means half of the MACs there were at first.

    ```python
    pruner = GradualPruner(model, x)
    for share in (0.2, 0.4, 0.5):
        pruner.prune_to(share, optimizer=optimizer)
        train(model, optimizer)
    ```
    What is frozen stays, and does not count. Units that were removed never come back.

    Args:
        model: any network, wrapped by `torch.compile` or not.
        example_inputs: see `Pruner`.
        context: 'local' removes the share of each axis, 'global' of all of them together.
        criteria: scores of weights, higher = keep. Initial weights are those at the start or at
            the last `watch`, previous ones those after the last cut.
        exclude: see `Pruner`, as the next.
        whole_heads: attention heads go as a whole.
        round_to: widths become multiples of this.
        min_keep: units that stay in each axis, at least.
        verify: compare outputs at each cut. The labels are replayed in any case.
        after: what was cut before this pruner was made, to go on from, a plan or a history; shares
            count from the network before that, then.

    Raises:
        ValueError: `after` is not what has led to this network.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        *,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        whole_heads: bool = False,
        round_to: int = 1,
        min_keep: int = 1,
        verify: bool = True,
        after: Plan | History | None = None,
    ) -> None:
        self.context, self.criteria = as_context(context), as_criterion(criteria)
        self.limits, self.verify = Limits(min_keep, round_to), verify
        network = unwrapped(model)
        super().__init__(network, example_inputs, exclude=exclude, whole_heads=whole_heads)
        self._first = tuple(self._axes)  # the axes at the start; those of today lie at their places
        self.history = History.following(after)
        self._after = self.history.plan
        self._earlier, self._vanished = _removed(self._after, network, self._first)
        self._decision: Decision | None = None
        self._took: dict[tuple[int, int | None], float] = {}  # the dense network, in milliseconds
        self._timed: tuple[Target, list[int], list[Any], TimedBudget] | None = None  # the last one
        self._cut: tuple[Plan | None, Mapping[Dim, Tensor]] = None, {}
        self.watch()

    def prune_to(self, sparsity: Amount, *, share: float = 1.0, optimizer: Any = None) -> nn.Module:
        """Remove units until this share of those at the start is gone; returns the model.

        Args:
            sparsity: a fraction in [0, 1]; {layer or block: fraction} under 'local'; `Units(512)`
                under 'global'; or a `Target`. Nothing happens where as many are gone already.
            share: of the way from the network at the start to there.
            optimizer: see `Pruner.prune_model`.

        Raises:
            RuntimeError: something else cut the network meanwhile.
            NothingToCompare: the criterion compares, and sees no difference.
            UnreachableTarget: no cut can meet the target.
        """
        plan = self.plan_to(sparsity, share)
        if plan is not None:
            asked = part_of(as_amount(sparsity, self.context), share)
            self.carry_out(plan, optimizer=optimizer, asked=asked)
        elif not self.free and share and asks(as_amount(sparsity, self.context)):
            warn("nothing was removed: axes() tells why units stay")
        return self.model

    def plan_to(self, sparsity: Amount, share: float = 1.0) -> Plan | None:
        """What `prune_to` would do; None where that is nothing."""
        self._refresh()
        amount, share = as_amount(sparsity, self.context), as_fraction(share, "share")
        if isinstance(amount, Target):
            decision = self._decide_to(amount, share)
        else:
            decision = self._decide_amount(part_of(amount, share))
        self._decision = decision
        return decision.plan if decision is not None and decision.plan.removed else None

    def check(self, target: Target, *, thawed: bool = False) -> None:
        """Raise an `UnreachableTarget` where no cut can meet this one; nothing is changed.

        Args:
            target: what is asked.
            thawed: as if nothing was frozen.
        """
        self._refresh()
        budget = self._budget_of(target, self._axes if thawed else None)
        budget.check(target.goal(budget.dense()))

    def carry_out(self, plan: Plan, *, optimizer: Any = None, asked: Amount | None = None) -> None:
        """Cut as `plan_to` says, of this pruner or of its like in another process.

        Args:
            plan: its plan.
            optimizer: see `Pruner.prune_model`.
            asked: what it was asked for, to be written into the history.
        """
        decision = self._decision
        if decision is None or decision.plan is not plan:
            decision = Decision(plan, [], True, None)
        self._refresh()
        try:
            self._carry_out(decision, optimizer)
        finally:  # an interrupt may come when it is cut
            if self._plans and self._plans[-1] is plan:
                self.pass_by(asked, plan)

    def pass_by(self, asked: Amount | None, plan: Plan | None = None) -> None:
        """Write into the history what was asked and, if anything, cut."""
        share = None
        if asked is not None:
            amount = self._present(as_amount(asked, self.context))
            sizes, lost = [n for n, _ in self._counted()], [n for _, n, _ in self._vanished]
            share = share_of(amount, self._first, sizes, self.context, sum(lost))
        name = self.criteria.title
        size = sum(p.numel() for p in self.model.parameters())
        record = CutRecord(plan, name, self.context, share, self.reached(), size)
        self.history = self.history.also(record)  # an interrupt may come while MACs are counted
        self.history = self.history.noting(macs=macs(self.model, self.inputs).get(""))

    def reached(self) -> float:
        """The share of the units at the start that is gone."""
        whole = sum(n for n, _ in self._counted()) + sum(n for _, n, _ in self._vanished)
        return self.removed / max(1, whole)

    def arrived(self, sparsity: Amount) -> bool:
        """Whether as many are gone already."""
        if isinstance(sparsity, Target):
            budget = self._budget_of(sparsity)
            return budget.met(sparsity.goal(budget.dense()))
        missing = self._missing(sparsity)
        return (missing if isinstance(missing, int) else max(missing, default=0)) <= 0

    def knows(self, model: nn.Module) -> bool:
        """Whether this is the network, and nothing else has cut it."""
        if unwrapped(model) is not self.model:
            return False
        now = shapes(self.model)
        if now == self._shapes:
            return True
        if now != self._expected():
            return False
        self._follow()
        return True

    @property
    def whole_plan(self) -> Plan | None:
        """All that was cut, `after` included, as one plan."""
        return reduce(Plan.then, [*filter(None, [self._after]), *self._plans] or [None])

    @property
    def removed(self) -> int:
        """How many units, or bundles of them, are gone."""
        vanished = sum(gone for _, _, gone in self._vanished)
        return sum(gone for _, gone in self._counted()) + vanished

    @property
    def free(self) -> int:
        """How many units, or bundles of them, may go: neither pinned nor frozen."""
        return sum(axis.bundles for axis in self._trained(self._first))

    @property
    def frozen_share(self) -> float:
        """The share of these and the frozen that is frozen."""
        whole = sum(axis.bundles for axis in self._first)
        return 1 - self.free / whole if whole else 0.0

    def frozen(self, names: Iterable[str]) -> list[str]:
        """The layers and blocks, of these names, that have units, all of them frozen."""
        live: dict[str, bool] = {}
        for axis, trained in zip(self._axes, self._trained(self._axes), strict=True):
            for layer in map(plain, axis.producers if axis.bundles else ()):
                live[layer] = live.get(layer, False) or trained.bundles > 0
        return frozen_of(names, live)

    def watch(self) -> None:
        """Take the weights as they are now for the initial and previous ones of the criterion."""
        parameters = dict(self.model.named_parameters())
        made = {s.parameter for axis in self._axes for s in axis.having(PRODUCE)}
        self._records = Records(self.criteria.wants, {n: parameters[n] for n in sorted(made)})

    def release(self) -> None:
        """Let go of what only the criterion and a budget of time need, until the next `watch`."""
        self._records.release()
        self._timed = None

    def try_criteria(self) -> None:
        """Score once, with numbers in place of records, so that what fails does so early."""
        parameters = dict(self.model.named_parameters())
        criterion = self.criteria.reading(lambda need, name: stand_in(need, parameters[name]))
        axes = [axis for axis in self._axes if axis.bundles]
        require_scales(parameters, axes, criterion)
        for axis in axes:
            unit_scores(parameters, axis, criterion, relative=self.context == "global")

    # --- inside --------------------------------------------------------------------------------

    def _decide_amount(self, amount: Amount) -> Decision | None:
        if self.arrived(amount):
            return None
        criterion = self.criteria.reading(self._records)
        axes, gone = self._trained(self._axes), self._gone()
        missing = self._missing(amount)
        chosen = ranked_units(self.model, axes, missing, criterion, self.limits, gone)
        where = self.model, self.inputs, self._coupling, axes
        return self._tried(Trial(*where, verify=self.verify), *chosen)

    def _decide_to(self, target: Target, share: float) -> Decision | None:
        """The same for a budget, which moves from what the dense network costs to the target."""
        budget = self._budget_of(target)
        dense = budget.dense()
        goal = dense + share * (target.goal(dense) - dense)
        now = budget.measured()
        if now <= goal and (share < 1 or budget.met(goal)):
            self.budget = Reached(target, dense, goal, now, now)  # without another cut
            return None
        counted = self._counted()

        def missing(part: float) -> list[int]:
            return [round(part * n) - gone for n, gone in counted]

        even = missing if self.context == "local" else None
        criterion = self.criteria.reading(self._records)
        return self._within(budget, dense, goal, criterion, even, self.verify, share)

    def _budget_of(self, target: Target, axes: Sequence[Axis] | None = None) -> Budget:
        axes, gone = self._trained(self._axes) if axes is None else axes, self._gone()
        if self._vanished and target.relative:
            names = ", ".join(repr(name) for name, _, _ in self._vanished)
            raise ValueError(
                f"{target} is a share of what the dense network cost, which cannot be told any "
                f"more: the earlier cuts left a single channel of {names}; ask for a number"
            )
        if not target.timed:
            return self._budget(target, axes, self.limits, gone)
        pins = [axis.pins for axis in axes]  # other layers may be frozen now
        if self._timed is not None and self._timed[:3] == (target, gone, pins):
            return self._timed[3]  # it took measuring
        where = target, self.model, self.inputs, self._coupling, axes, self.limits, gone
        key = target.batch, target.threads
        budget = TimedBudget(*where, dense_ms=self._took.get(key))
        self._took.setdefault(key, budget.dense())
        self._timed = target, gone, pins, budget
        return budget

    def _carry_out(self, decision: Decision, optimizer: Any) -> Plan:
        self._cut = decision.plan, cut_for(decision.plan, self.model).kept
        super()._carry_out(decision, optimizer)
        self._decision = None
        self._refresh()
        return decision.plan

    def _refresh(self) -> None:
        if not self.knows(self.model):
            raise RuntimeError(
                "the network was cut by something else since this pruner looked at it: make a "
                "new one, which starts from the network as it is"
            )

    def _follow(self) -> None:
        """The coupling and what the criterion compares with follow the last cut, once."""
        plan, kept = self._cut
        before = replace(self._coupling, axes=tuple(self._axes))
        after = remaining(before, kept, self.model, self.inputs)
        self._records.change(lambda name, copy: _left_of(copy, plan, plain(name)))
        self._records.renew()
        self._coupling, self._axes, self._shapes = after, list(after.axes), shapes(self.model)

    def _expected(self) -> dict[Dim, int]:
        """The shapes that the last cut leaves, if it came about."""
        kept = self._cut[1]
        sizes = {dim: len(kept[dim]) if dim in kept else n for dim, n in self._shapes.items()}
        return {dim: n for dim, n in sizes.items() if n > 1}

    def _trained(self, axes: Sequence[Axis]) -> list[Axis]:
        parameters = dict(self.model.named_parameters())
        return [axis.trained(parameters) for axis in axes]

    def _gone(self) -> list[int]:
        """How many units of each axis were removed."""
        axes = zip(self._earlier, self._first, self._axes, strict=True)
        return [n + a.size - b.size for n, a, b in axes]

    def _counted(self) -> list[tuple[int, int]]:
        """For each axis how many bundles of the start count, and how many of these are gone."""
        counted = []
        axes = zip(self._trained(self._first), self._earlier, self._gone(), strict=True)
        for axis, earlier, gone in axes:
            n = axis.bundles
            counted.append((n + earlier // axis.blocks, gone // axis.blocks) if n else (0, 0))
        return counted

    def _present(self, amount: Amount) -> Amount:
        """Without layers that `after` left so narrow that they are no axes any more."""
        if not isinstance(amount, Mapping):
            return amount
        lost = {name for name, _, _ in self._vanished}
        return {name: share for name, share in amount.items() if name not in lost}

    def _missing(self, sparsity: Amount) -> int | list[int]:
        """How many bundles are still to go: over all axes under 'global', or of each."""
        counted, lost = self._counted(), sum(n for _, n, _ in self._vanished)
        amount = self._present(as_amount(sparsity, self.context))
        axes, sizes = self._trained(self._first), [n for n, _ in counted]
        counts = counts_of(amount, axes, sizes, self.context, lost)
        if isinstance(counts, int):
            return counts - self.removed
        return [n - gone for n, (_, gone) in zip(counts, counted, strict=True)]


def _removed(
    after: Plan | None, network: nn.Module, axes: Sequence[Axis]
) -> tuple[list[int], list[tuple[str, int, int]]]:
    """How many units of each axis a plan has removed that led to this network.

    And the names of axes that are no more, as of a single channel, how many units there were and
    how many went.
    Where heads became so narrow that a unit is one of each of them, it counts for so many.
    """
    if after is None:
        return [0] * len(axes), []
    must_lead_to(after, network)
    cuts = list(after.axes)
    removed = []
    for axis in axes:
        own = [c for c in cuts if c.name == plain(axis.name) and c.after % axis.size == 0]
        cut = min(own, key=lambda c: c.after, default=None)
        if cut is None:
            raise ValueError(
                f"the plan knows no {axis.size} channels of {plain(axis.name)!r}: pass the plan of "
                f"all cuts since the network was dense, as in callback.plan"
            )
        cuts.remove(cut)
        removed.append((cut.before - cut.after) * axis.size // cut.after)
    lost = [(c.name, c.before, c.before - c.after) for c in cuts if c.after < c.before]
    return removed, lost


def _left_of(copy: Tensor, plan: Plan, name: str) -> Tensor:
    return smaller(copy, cuts_of(plan, name), steps_of(plan, name))
