"""The fastai callback that makes a network small while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.criteria import Criterion, large_final
from ..core.former import explain_former
from ..core.masks import Limits, as_context
from ..core.names import LayerChoice, as_choices, plain
from ..core.processes import must_renew, renew
from ..core.schedule import Chain, Schedule, agp, goes_down
from ..core.target import Target
from ..fit.callback import ScheduledCallback
from ..measure.layers import layer_costs
from ..measure.profile import macs
from .amounts import Amount, Units, as_amount, asks, part_of
from .budget import Reached, UnreachableTarget
from .gradual import GradualPruner
from .history import History
from .optimizer import check_optimizer
from .plan import Plan

__all__ = ["PruneCallback"]


class PruneCallback(ScheduledCallback):
    """Remove channels during `fit`, a share that grows by a schedule.

    ```python
    learn.fit_one_cycle(5, cbs=PruneCallback(0.5))
    ```
    At each update of the schedule the weakest units are cut out of the network, and the state of
    `learn.opt` with them: training goes on, faster. The training table shows the share of the
    units that is gone, the parameters and the MACs of one sample that are left. Nothing is
    attached to the model; its parameters stay the same objects.

    Shares count from the network as this callback first saw it, also in later fits with it: a
    second fit does not remove as much again, but goes on to the target, if the first was
    stopped. A new callback starts from the network it finds. What is removed never comes back.

    Frozen layers are left alone and do not count. While some are, as in the first part of
    `learn.fine_tune`, others lose what a share of them is, of `Units` as many as a share of the
    units train; what a mapping asks of frozen layers waits for a fit in which they train, and so
    does a `Target` that cannot be met before.

    Args:
        sparsity: the share of the units to remove, a fraction in [0, 1]; {layer or block:
            fraction} under 'local', the others staying whole; `Units(512)`, so many of all layers,
            under 'global'; or a `Target`, such as `Target(macs=0.5)`: the schedule then takes the
            network from what it costs at the start to there. One that cannot be met raises
            `UnreachableTarget` before training.
        context: 'local' removes it from each group of coupled layers, 'global' from all together;
            for a target, what is least important for what it costs.
        criteria: scores of weights, higher = keep. Initial weights are those at the start of each
            fit, previous ones those after the last cut. Gradients are those of the optimizer step,
            unscaled. An update at which there is nothing to compare waits for the next step.
        schedule: share of the way by progress; the default takes the way of `agp` in ten cuts.
            A cut takes about as long as some ten steps, to a target a few times as long, and
            compiled networks are compiled anew, so few are better than `agp`'s own 100. It must
            not go down.
        exclude: names or types of layers whose channels stay.
        min_keep: units that stay in each group of coupled layers, at least.
        round_to: widths become multiples of this.
        example_inputs: to see which layers are coupled; default the first training batch.
        whole_heads: attention heads go as a whole; else each becomes narrower.
        verify: compare outputs at each cut, beside the wiring.
        after: what was cut already, `plan` or `history` of the callback of a fit that was stopped
            in another process. With it shares count from the network before that, and
            `fit(n, start_epoch=k, cbs=PruneCallback(0.5, after=plan))` goes on where that fit was.
        hold_trackers: `SaveModelCallback`, `EarlyStoppingCallback` and their kind wait for the
            last cut.

    Raises:
        ValueError, TypeError: at once for an argument that cannot be; before the first step of a
            fit for a layer that the model does not have, or a model with nothing to remove.
        UnreachableTarget: before the first step, or, for a time that only measuring shows to be
            out of reach, at that cut.

    Attributes:
        history: every update since the callback first saw the network, in all fits with it, a
            value that can be shown, stored and replayed; see `History`.
    """

    columns = ("sparsity", "parameters", "MACs")
    reshapes = True

    @explain_former()
    def __init__(
        self,
        sparsity: Amount,
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        schedule: Schedule | Chain | Callable[[float], float] = agp.over(n_steps=10),  # noqa: B008
        *,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        min_keep: int = 1,
        round_to: int = 1,
        example_inputs: Any = None,
        whole_heads: bool = False,
        verify: bool = True,
        after: Plan | History | None = None,
        hold_trackers: bool = True,
    ) -> None:
        super().__init__(criteria, schedule, hold_trackers)
        self.context = as_context(context)
        self.sparsity = as_amount(sparsity, context)
        Limits(min_keep, round_to)
        self.min_keep, self.round_to = min_keep, round_to
        self.exclude, self.example_inputs = as_choices(exclude), example_inputs
        self.whole_heads, self.verify, self.after = whole_heads, verify, after
        self._asked: Amount | None = self.sparsity
        self._pruner: GradualPruner | None = None
        self.history = History.following(after)
        self._fit = 1

    # --- afterwards ----------------------------------------------------------------------------

    def report(self) -> pd.DataFrame:
        """Widths, parameters and MACs of each layer, at the start and now; see `Pruner.report`."""
        return self._seen().report()

    def kept(self) -> pd.DataFrame:
        """Units that the last cut had to leave, and why; see `Pruner.kept`."""
        return self._seen().kept()

    @property
    def plan(self) -> Plan | None:
        """All that was cut since the callback first saw the network, and `after`, as one plan."""
        return self._seen().whole_plan

    @property
    def budget(self) -> Reached | None:
        """What became of the target at the last cut; see `Reached`."""
        return self._seen().budget

    @property
    def removed(self) -> int:
        """How many units are gone, as `Units` counts them."""
        return self._seen().removed

    def plot_sparsity(self, ax: Any = None) -> Any:
        """Draw the share of the units that is gone over the steps of the last fit."""
        title = f"units removed, schedule {self.schedule.name or 'of your own'}"
        return self._plot("share of units removed", title, ax)

    # --- on the way ----------------------------------------------------------------------------

    def begin(self) -> bool:
        """See which units there are, and refuse what cannot work before anything is cut."""
        if goes_down(self._updates):
            raise ValueError(
                f"the schedule {self.schedule.name!r} goes down, but what is removed cannot come "
                f"back: take one that rises, or SparsifyCallback for zeros that learn again"
            )
        check_optimizer(self.learn.opt, self.learn.model)
        must_renew(self.learn.model)
        if self._pruner is None or not self._pruner.knows(self.learn.model):
            self._pruner = self._processes.together(self._pruner_of_model)
        else:
            self._pruner.watch()
        self.history = self._pruner.history
        self._fit = 1 + max((cut.fit or 0 for cut in self.history.cuts), default=0)
        if not asks(self.sparsity) or not self._anything_free():
            return False
        self._asked = self._of_trained()
        if self._asked is None or not asks(self._asked):
            return False
        self.arrived()  # unknown layers are refused now
        self._pruner.criteria = self.gather()
        self._pruner.try_criteria()  # one that fails does so before training
        self._pruner.criteria = self.criteria
        if _is_compiled(self.learn.model) and not self.arrived():
            self.warn(
                f"the model is compiled: each of up to {len(self._updates)} cuts makes torch "
                f"compile it anew, which may take longer than it saves; take fewer, as in "
                f"schedule=agp.over(n_steps=3), or compile once it is small"
            )
        return True

    def go(self, share: float, before: float) -> None:
        """Cut as far as the schedule says."""
        self._pruner.criteria = self.scored()
        asked = part_of(self._asked, share)
        plan = self.agreed(lambda: self._pruner.plan_to(self._asked, share))
        if plan is None:
            self._pruner.pass_by(asked)
            if share == max(x for _, x in self._updates) and not self.removed:
                met = isinstance(asked, Target)
                why = "the network costs no more" if met else "see kept(), min_keep and round_to"
                self.warn(f"nothing was removed, asked was {asked}: {why}")
            return
        try:
            self._pruner.carry_out(plan, optimizer=self.learn.opt, asked=asked)
        finally:  # an interrupt may come when it is cut
            self.history = self._pruner.history
            self.after_cut()
        if isinstance(asked, Units) and asked.n == self._asked.n > self._pruner.removed:
            self.warn(f"asked were {asked.n} units, {self._pruner.removed} could go: see kept()")

    def agreed(self, planned: Callable[[], Plan | None]) -> Plan | None:
        """The plan that all processes carry out: that of the first. None cuts nothing."""
        if not self._processes:
            return planned()
        own: list[Plan | None] = []

        def text() -> str | None:
            own.append(planned())
            return own[0] and own[0].to_json()

        told = self._processes.decided(text)
        if own:
            return own[0]
        return Plan.from_json(told) if told else None

    def after_cut(self) -> None:
        """Renew what wraps the network and knows its old shapes."""
        renew(self.learn.model)
        if _is_compiled(self.learn.model):
            torch.compiler.reset()  # else torch gives up after a few recompilations

    def forget(self) -> None:
        """Keep the history: it goes on in later fits."""

    def note(self, finished: int) -> None:
        """Write into the history when the cut was."""
        self._pruner.history = self._pruner.history.noting(step=finished, fit=self._fit)
        self.history = self._pruner.history

    def after_validate(self) -> None:
        """Write the metrics into the history, and fill the columns."""
        seen = self._training and hasattr(self.learn, "recorder")
        if seen and any(cut.fit == self._fit for cut in self.history.cuts[-1:]):
            self._pruner.note(**self._metrics())
            self.history = self._pruner.history
        super().after_validate()

    def reached(self) -> float:
        """The share of the units that is gone."""
        return 0.0 if self._pruner is None else self._pruner.reached()

    def values(self) -> list[Any]:
        """The share that is gone, the parameters and MACs that are left."""
        network = self._pruner.model
        counts = macs(network, self._pruner.inputs)
        size = sum(p.numel() for p in network.parameters())
        return [self.reached(), size, counts.get("", math.nan)]

    def by_layer(self) -> dict[str, float]:
        """Output channels of each layer."""
        table = layer_costs(self._pruner.model, macs(self._pruner.model, self._pruner.inputs))
        wide = table[(table["macs"] > 0) & table["out"].notna()]  # norms repeat their widths
        named = zip(wide["layer"], wide["out"], strict=True)
        return {f"width/{plain(name)}": int(n) for name, n in named}

    def arrived(self) -> bool:
        """Whether all that is asked was gone when the fit began."""
        if isinstance(self._asked, Target) and self._asked.timed:  # measured, unlike in others
            return self._processes.decided(lambda: self._pruner.arrived(self._asked))
        return self._pruner.arrived(self._asked)

    def finish(self) -> None:
        """Let go of what only the criterion needed."""
        if self._pruner is not None:
            self._pruner.criteria = self.criteria
            self._pruner.release()

    # --- inside --------------------------------------------------------------------------------

    def curve(self) -> list[tuple[int, float]]:
        """What the history says of the last fit."""
        return [(cut.step, cut.reached) for cut in self.history.cuts if cut.fit == self._fit]

    def _metrics(self) -> dict[str, float]:
        """The validation loss and metrics of this epoch."""
        recorder = self.learn.recorder
        names = {metric.name for metric in self.learn.metrics}
        logged = zip(recorder.metric_names, recorder.log, strict=False)  # our columns follow
        return {n: x for n, x in logged if n in names or n.startswith("valid_")}

    def _pruner_of_model(self) -> GradualPruner:
        example = self.xb if self.example_inputs is None else self.example_inputs
        return GradualPruner(
            self.learn.model,
            example,
            self.context,
            self.criteria,
            exclude=self.exclude,
            whole_heads=self.whole_heads,
            round_to=self.round_to,
            min_keep=self.min_keep,
            verify=self.verify,
            after=self.after if self._pruner is None else None,
        )

    def _seen(self) -> GradualPruner:
        if self._pruner is None:
            raise RuntimeError("nothing to report: fit with this callback first")
        return self._pruner

    def _of_trained(self) -> Amount | None:
        """What is asked of the layers that train; None where nothing is yet."""
        pruner, asked = self._pruner, self.sparsity
        if isinstance(asked, Target):
            why = self._why_unreachable(asked)
            if why is None:
                return asked
            if not pruner.frozen_share or self._why_unreachable(asked, thawed=True):
                raise UnreachableTarget(*why)
            self.warn(f"{asked} cannot be met while layers are frozen: it waits")
            return None
        if isinstance(asked, Units) and pruner.frozen_share:
            return Units(round(asked.n * (1 - pruner.frozen_share)))
        if isinstance(asked, Mapping):
            frozen = pruner.frozen(asked)
            if frozen:
                self.warn(f"frozen layers wait until they train: {', '.join(sorted(frozen))}")
            return {name: share for name, share in asked.items() if name not in frozen}
        return asked

    def _why_unreachable(self, target: Target, *, thawed: bool = False) -> tuple[str, float] | None:
        """What the first process says that calls it so: each measures for itself."""

        def own() -> tuple[str, float] | None:
            try:
                self._pruner.check(target, thawed=thawed)
            except UnreachableTarget as error:
                return str(error), error.least
            return None

        return self._processes.first_of(self._processes.together(own))

    def _anything_free(self) -> bool:
        pruner = self._pruner
        if pruner.frozen_share > 0.1:
            self.warn(
                f"{pruner.frozen_share:.0%} of the units are frozen, stay and do not count; call "
                f"learn.unfreeze() to prune them (fine_tune does so by itself after its first "
                f"part)"
            )
        elif not pruner.free:
            axes = pruner.axes()
            pins = [f"{a}: {why}" for a, why in zip(axes["layer"], axes["pinned"], strict=True)]
            raise ValueError(
                f"the model has nothing to prune; its layers stay whole because of: "
                f"{'; '.join(pins[:5])}{'; ...' * (len(pins) > 5)}. Pruner(model, x).axes() shows "
                f"all of it"
            )
        return pruner.free > 0


def _is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` made something of it or of a part."""
    modules = [model, *model.modules()]
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modules)
