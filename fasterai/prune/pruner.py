"""The pruner: removes what is zero, or what ranks lowest, and proves that it did it right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.criteria import Criterion, as_criterion, large_final
from ..core.former import explain_former
from ..core.masks import Limits, as_context
from ..core.names import LayerChoice, layer_of, pick, plain, tensors_by_name
from ..core.processes import refuse_sharded
from ..core.target import Target
from ..core.warning import warn
from ..coupling.couple import couple
from ..coupling.labels import Dim, dims_of
from ..coupling.probe import Removal
from ..coupling.units import Axis, Coupling
from ..measure.counts import counted, macs
from ..measure.layers import layer_costs
from .amounts import Amount, Units, as_amount, counts_of, share_of
from .budget import Budget, Reached
from .check import Differences, observe, observe_other_sizes
from .constants import Constants
from .explain import axes_table, draw_axes
from .history import CutRecord, History
from .history_json import as_number
from .optimizer import remember
from .plan import Plan, make_plan
from .select import Stay, pinned_units, ranked_units, zero_units
from .timed import TimedBudget
from .trial import Decision, Trial

__all__ = ["Pruner"]


class Pruner:
    """Physically removes channels from a network, in place.

    On construction the network runs on channel labels, in eval and in train mode, which tells
    what must be cut together. The model is not changed by that.

    Args:
        model: any network; its parameters keep their identity and names.
        example_inputs: what its forward takes: a tensor, a tuple of positional inputs or a dict
            of keyword inputs, on the model's device. At most two samples are used.
        exclude: names or types of layers whose channels stay, or names of blocks of layers.
        whole_heads: attention heads go as a whole; else each becomes narrower. Where rotary
            embeddings couple the heads, or code fixes their number, they stay.

    Raises:
        ValueError: an unknown layer name, or inputs the model cannot run on.

    Attributes:
        max_abs_diff, max_rel_diff: the largest difference of the outputs it caused, absolute and
            relative to the largest output, on the example and on random inputs.
        history: all its cuts, a value; see `History`.
        budget: what became of the last `Target`, see `Reached`; None without one.
    """

    @torch.inference_mode(False)
    @explain_former("the share, context and criteria go to prune_model(0.4)")
    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        whole_heads: bool = False,
    ) -> None:
        self.model = model
        self._whole_heads = whole_heads
        self._excluded = pick(model, exclude, "exclude")
        refuse_sharded(model)
        self.inputs, counts = counted(model, example_inputs)
        self._plans: list[Plan] = []
        self.history = History()
        self.max_abs_diff: float | None = None
        self.max_rel_diff: float | None = None
        self.budget: Reached | None = None
        self._stay: list[Stay] = []
        self._before = layer_costs(model, counts)
        self._couple()

    @torch.inference_mode(False)
    @explain_former()
    def prune_model(
        self,
        sparsity: Amount | None = None,
        *,
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        round_to: int = 1,
        min_keep: int = 1,
        optimizer: Any = None,
        verify: bool = True,
    ) -> nn.Module:
        """Remove units from the model, in place, and return it.

        Args:
            sparsity: None removes the units that are zero, exactly. A fraction removes that
                share of the free units, the lowest scores first; {layer or block: fraction} that of
                each layer under 'local', the others staying whole; `Units(512)` so many of all
                layers under 'global'. A `Target` removes as many as it takes to meet a budget,
                which counts from the network as it is now.
            context: 'local' ranks within each axis, 'global' over the whole network. For a target
                'local' removes an equal share of each axis, 'global' what is least important for
                what it costs.
            criteria: scores of weights, higher = keep.
            round_to: widths become multiples of this; fewer units go, where needed.
            min_keep: units that stay in each axis, at least.
            optimizer: one whose state and gradients are cut with the parameters, so that it
                trains on: `learn.opt`, or one of torch's; see `carry_optimizer`.
            verify: compare outputs before and after, in double precision where rounding alone
                may reorder them. The labels are replayed in any case.

        A cut is taken back where the smaller network does not run, wires channels together that
        do not belong together, or computes something else: nothing else, for None; than the
        network that ignores the removed channels, for a fraction or target. What stays is named in
        `kept()`. A target that cannot be met raises `UnreachableTarget`; nothing changes then.

        Tensors change their shapes: an optimizer that is not given here must be carried, see
        `carry_optimizer`, or start afresh, as in `learn.fit(..., reset_opt=True)`.
        """
        limits = Limits(min_keep, round_to)
        decision = self._decide(sparsity, context, criteria, limits, verify)
        record = self._record(decision.plan, sparsity, context, criteria)
        try:
            plan = self._carry_out(decision, optimizer)
        finally:  # an interrupt may come when it is cut
            if self._plans and self._plans[-1] is decision.plan and decision.plan.removed:
                size = sum(p.numel() for p in self.model.parameters())
                self.history = self.history.also(replace(record, parameters=size))
        if plan.removed:
            self._warn_of_idle(plan)
            self.history = self.history.noting(macs=macs(self.model, self.inputs).get(""))
        else:
            why = self._why_nothing(sparsity is None, decision)
            warn(f"nothing was removed: {why}")
        return self.model

    @torch.inference_mode(False)
    @explain_former()
    def plan_for(
        self,
        sparsity: Amount | None = None,
        *,
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        round_to: int = 1,
        min_keep: int = 1,
        verify: bool = True,
    ) -> Plan:
        """What `prune_model` with the same arguments would do; the model stays as it is."""
        limits = Limits(min_keep, round_to)
        return self._decide(sparsity, context, criteria, limits, verify).plan

    def note(self, **metrics: float) -> None:
        """Write metrics, such as `accuracy=0.9`, beside the last cut in `history`.

        Those that are not finite numbers are left out.

        Raises:
            RuntimeError: nothing was cut yet.
        """
        if not self.history.cuts:
            raise RuntimeError("no cut to write metrics beside: prune first")
        known = {k: as_number(x) for k, x in metrics.items()}
        new = {k: x for k, x in known.items() if x is not None}
        self.history = self.history.noting(metrics={**self.history.cuts[-1].metrics, **new})

    @property
    def plan(self) -> Plan | None:
        """What the last `prune_model` cut."""
        return self._plans[-1] if self._plans else None

    @property
    def whole_plan(self) -> Plan | None:
        """All that was cut since the pruner was made, as one plan: `save_pruned` takes it."""
        return reduce(Plan.then, self._plans) if self._plans else None

    def report(self) -> pd.DataFrame:
        """Widths, parameters and MACs (one sample) of each layer, before and after; last 'total'.

        Before is when the pruner was made, after is now.
        """
        after = layer_costs(self.model, macs(self.model, self.inputs))
        table = pd.DataFrame({"layer": self._before["layer"]})
        for name, column in (
            ("in", "in"),
            ("out", "out"),
            ("params", "parameters"),
            ("macs", "macs"),
        ):
            table[f"{name}_before"] = self._before[column]
            table[f"{name}_after"] = after[column]
        return table

    def kept(self) -> pd.DataFrame:
        """Units the last `prune_model` had to leave: `layer`, `unit`, `reason`.

        After removing zeros these are the zero ones that stayed, after ranking the pinned ones.
        """
        return pd.DataFrame(self._stay, columns=["layer", "unit", "reason"])

    def axes(self) -> pd.DataFrame:
        """The channel groups of the network as it is now, a row an axis.

        Columns: `layer`, `size` in units, `blocks` that keep equally many, `free` bundles that may
        go, `producers`, `consumers`, `mixed` (the operation whose result depends on the number of
        channels), and `pinned`: why units cannot go, and how many.
        """
        self._refresh()
        return axes_table(self._axes)

    def coupled(self) -> tuple[Coupling, list[Axis]]:
        """The units of the network as it is now, and its axes, what is excluded pinned."""
        self._refresh()
        return self._coupling, self._axes

    def draw(self) -> Any:
        """A picture of the channel groups: graphviz where it is installed, matplotlib else."""
        self._refresh()
        return draw_axes(self._axes, self._coupling.analysis.order)

    def _repr_html_(self) -> str:
        return self.axes().to_html(index=False)

    # --- inside --------------------------------------------------------------------------------

    def _couple(self) -> None:
        self._coupling = couple(self.model, self.inputs, whole_heads=self._whole_heads)
        self._axes = [
            axis.pinned("excluded") if self._excluded & set(axis.producers) else axis
            for axis in self._coupling.axes
        ]
        self._shapes = shapes(self.model)

    def _refresh(self) -> None:
        if self._shapes != shapes(self.model):
            self._couple()  # it was cut meanwhile

    def _decide(
        self, sparsity: Any, context: str, criteria: Any, limits: Limits, verify: bool
    ) -> Decision:
        """Choose, try and take back; the model is as before when this returns."""
        as_context(context)
        if any(p.is_meta for p in self.model.parameters()):
            raise ValueError(
                "the model is on the meta device, where weights have no numbers to rank: load "
                "them first; pruner.axes() and draw() need none"
            )
        criterion = as_criterion(criteria)
        amount = None if sparsity is None else as_amount(sparsity, context)
        if isinstance(amount, Target):
            return self._decide_within(amount, context, criterion, limits, verify)
        self._refresh()
        where = self.model, self.inputs, self._coupling, self._axes
        if amount is None:
            dense = observe(*where[:3], origins=True)
            constants = Constants(self.model, dense.runs)
            if constants.loud:  # a sum over positions, say, would depend on how many there are
                constants = Constants(self.model, [*dense.runs, *observe_other_sizes(*where[:3])])
            chosen = zero_units(self.model, constants, self._axes, limits)
            trial = Trial(*where, dense=dense, constants=constants, verify=verify)
        else:
            free = [axis.bundles for axis in self._axes]
            counts = counts_of(amount, self._axes, free, context)
            if isinstance(amount, Units) and amount.n > sum(free):
                warn(f"{amount}: no more than {sum(free)} units may go")
            chosen = ranked_units(self.model, self._axes, counts, criterion, limits)
            trial = Trial(*where, verify=verify)
        return self._tried(trial, *chosen)

    def _decide_within(
        self, target: Target, context: str, criterion: Criterion, limits: Limits, verify: bool
    ) -> Decision:
        """The same for a budget."""
        self._refresh()
        budget = self._budget(target, self._axes, limits, None)
        dense = budget.dense()

        def shares_of(share: float) -> list[int]:
            return [round(share * axis.bundles) for axis in self._axes]

        even = shares_of if context == "local" else None
        return self._within(budget, dense, target.goal(dense), criterion, even, verify)

    def _budget(
        self, target: Target, axes: Sequence[Axis], limits: Limits, gone: Sequence[int] | None
    ) -> Budget:
        kind = TimedBudget if target.timed else Budget
        return kind(target, self.model, self.inputs, self._coupling, axes, limits, gone)

    def _within(
        self,
        budget: Budget,
        dense: float,
        goal: float,
        criterion: Criterion,
        even: Callable[[float], Sequence[int]] | None,
        verify: bool,
        share: float = 1.0,
    ) -> Decision:
        """What meets a goal; where some of it cannot go, without that.

        Args:
            budget: what the network and cuts of it cost.
            dense: what the dense network costs.
            goal: what it may cost.
            criterion: scores of weights.
            even: how many bundles of each axis a share is; None goes by importance.
            verify: compare outputs.
            share: of the way to the target.
        """
        kept: list[Stay] = []
        while True:
            queues = budget.queues(criterion, share)
            remove, predicted, measured = budget.choose(queues, goal, even)
            where = self.model, self.inputs, self._coupling, budget.axes
            trial = Trial(*where, verify=verify)
            decision = self._tried(trial, remove, [*kept, *pinned_units(budget.axes)])
            if not trial.failed:
                reached = Reached(budget.target, dense, goal, predicted, measured)
                return replace(decision, reached=reached)
            kept += [
                (budget.axes[a].name, u, reason)
                for a, reason in trial.failed.items()
                for u in remove[a].nonzero().flatten().tolist()
            ]
            budget = budget.without(trial.failed)

    def _tried(self, trial: Trial, wanted: Removal, stay: list[Stay]) -> Decision:
        """What of the units that are wanted can go."""
        axes = trial.axes
        remove = trial.settle({a: units for a, units in wanted.items() if units.any()})
        for a, reason in trial.failed.items():
            units = wanted[a].nonzero().flatten().tolist()
            stay.extend((axes[a].name, u, reason) for u in units)
        asked = any(bool(u.any()) for u in wanted.values())
        before = sum(plan.removed > 0 for plan in self._plans)
        plan = make_plan(self.model, axes, remove, trial.how, before)
        return Decision(plan, stay, asked, trial.apart)

    def _carry_out(self, decision: Decision, optimizer: Any) -> Plan:
        plan = decision.plan
        plan.apply(self.model, optimizer=optimizer)
        remember(plan, self.model)
        self._plans.append(plan)
        self._stay, self.budget = decision.stay, decision.reached
        apart = decision.apart if plan.removed else Differences(0.0, 0.0, True)
        self.max_abs_diff = apart.absolute if apart else None
        self.max_rel_diff = apart.relative if apart else None
        return plan

    def _record(self, plan: Plan, sparsity: Any, context: str, criteria: Any) -> CutRecord:
        """What goes into the history, but for what the network then costs."""
        axes = self._axes
        free = [axis.bundles for axis in axes]
        gone = [(c.before - c.after) // a.blocks for c, a in zip(plan.axes, axes, strict=True)]
        name, asked = "zero", None
        if sparsity is not None:
            name = as_criterion(criteria).title
            asked = share_of(as_amount(sparsity, context), axes, free, context)
        reached = min(1.0, sum(gone) / max(1, sum(free)))
        return CutRecord(plan, name, context, asked, reached, 0)

    def _warn_of_idle(self, plan: Plan) -> None:
        """Name layers that did not run and may have read what is gone: their width stays."""
        said = self._coupling.analysis
        gone = {shape[d] for n, shape in plan.shapes.items() for d in plan.kept.get(n, {}) if d < 2}
        tensors = tensors_by_name(self.model)
        idle = [n for n in said.idle if n in tensors and tensors[n].shape[1] in gone]
        if idle:
            layers = ", ".join(plain(layer_of(n) or n) for n in idle[:4])
            training = f" (in train mode it did not: {said.untrained[:200]})" * bool(said.untrained)
            warn(
                f"layers that did not run on the example inputs keep their width, and break where "
                f"they read channels that are gone: {layers}{', ...' * (len(idle) > 4)}{training}. "
                f"Pass inputs that reach them, or exclude the layers that they read",
            )

    def _why_nothing(self, exact: bool, decision: Decision) -> str:
        met = decision.reached
        if met is not None and not decision.wanted:
            return f"the network costs no more than {met.target} allows"
        if not exact and not decision.wanted and any(len(a.free) for a in self._axes):
            return "that share of the free channels of a layer rounds to none, see also kept()"
        if not self._axes:
            return "no layer of the model makes channels that the next one reads"
        if self._stay:
            return "see kept() for what stayed and why"
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        zeros = sum(int((p == 0).count_nonzero()) for p in weights)
        share = zeros / max(1, sum(p.numel() for p in weights))
        return (
            f"no whole channel is zero ({share:.0%} of the weights are); sparsify with "
            f"granularity='filter' and prune before training on without the callback, or pass a "
            f"sparsity"
        )


def shapes(model: nn.Module) -> dict[Dim, int]:
    """The size of each dimension of more than one position."""
    return {dim: tensor.shape[dim.dim] for dim, tensor in dims_of(model).items()}
