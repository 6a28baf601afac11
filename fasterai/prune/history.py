"""What was cut, when and why: a value that can be shown, stored and replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, overload

import pandas as pd
from torch import nn

from .history_json import decode, encode
from .plan import Plan

__all__ = ["CutRecord", "History"]


@dataclass(frozen=True)
class CutRecord:
    """One cut, or one update of a schedule at which there was nothing to cut.

    Args:
        plan: what went; None where nothing did.
        criterion: the name of what ranked the units; 'zero' where zero ones were removed.
        context: 'local' or 'global'.
        asked: the share of the units that was to be gone; None where all zero ones were, and for
            a `Target`, which asks for no share of them.
        reached: the share that is gone. Both are shares of the units that may go: in a `Pruner`
            of those there were before this cut, else of those at the start.
        parameters: what is left of the network.
        macs: likewise, of one sample; None where they cannot be counted.
        step: finished training steps of the fit; None outside of a fit.
        fit: its number, from 1.
        metrics: of the last validation before the next cut.
    """

    plan: Plan | None
    criterion: str
    context: str
    asked: float | None
    reached: float
    parameters: int
    macs: int | None = None
    step: int | None = None
    fit: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.plan, self.criterion, self.reached, self.parameters, self.step))


@dataclass(frozen=True)
class History(Sequence[tuple[int | None, float]]):
    """All cuts of a `Pruner`, a `GradualPruner` or a `PruneCallback`, in their order.

    ```python
    cb.history.table()               # a DataFrame
    cb.history.plot()                # which layers lost how many units at which cut
    cb.history.replay(fresh_model)   # the same network, wired in the same way
    ```
    A value: it never changes, and equals what `from_json(to_json())` gives. As a sequence it is
    its curve, pairs (step, reached).

    Args:
        cuts: the cuts.
        before: what was cut before the first of them.
    """

    cuts: tuple[CutRecord, ...] = ()
    before: Plan | None = None

    @classmethod
    def following(cls, after: Plan | History | None) -> History:
        """One that begins after what was cut before.

        Raises:
            TypeError: that is neither a plan nor a history.
        """
        if not isinstance(after, Plan | History | None):
            raise TypeError(
                f"after takes what was cut before, the `plan` or `history` of a callback or "
                f"pruner, got {after!r:.80}; Plan.from_json and History.from_json read one"
            )
        return after if isinstance(after, History) else cls(before=after)

    @overload
    def __getitem__(self, at: int) -> tuple[int | None, float]: ...
    @overload
    def __getitem__(self, at: slice) -> list[tuple[int | None, float]]: ...
    def __getitem__(self, at: Any) -> Any:
        """A pair (step, reached), or several."""
        return [(cut.step, cut.reached) for cut in self.cuts][at]

    def __len__(self) -> int:
        return len(self.cuts)

    @property
    def plan(self) -> Plan | None:
        """All of it as one plan, `before` included: `save_pruned` takes it."""
        plans = (self.before, *(cut.plan for cut in self.cuts))
        return reduce(Plan.then, [p for p in plans if p is not None] or [None])

    def replay(
        self,
        model: nn.Module,
        cuts: int | None = None,
        *,
        constants: bool = True,
        optimizer: Any = None,
    ) -> nn.Module:
        """Repeat the cuts on a model that was not cut yet, in place: all of them, or nothing.

        Shapes and wiring are those of the network this is the history of; the weights are what is
        left of the model's own.

        Args:
            model: built like the one the first cut was made in; see `Plan.apply`.
            cuts: how many, from the first; default all.
            constants: see `Plan.apply`.
            optimizer: see `Plan.apply`.

        Raises:
            ValueError: it is another network, or was cut already; it is as it was.
        """
        if cuts is not None and not (type(cuts) is int and 0 <= cuts <= len(self)):
            raise ValueError(f"cuts must be a number from 0 to {len(self)}, got {cuts!r}")
        plan = replace(self, cuts=self.cuts[:cuts]).plan
        if plan is None:
            return model
        return plan.apply(model, constants=constants, optimizer=optimizer)

    def table(self) -> pd.DataFrame:
        """A row for each cut: when, what was asked, what was reached, what is left.

        Columns: `fit`, `step`, `criterion`, `context`, `asked`, `reached`, `removed` (units in
        this cut), `units` (left in all layers), `parameters`, `macs`, and the metrics, which are
        those of the last validation before the next cut.
        """
        names = dict.fromkeys(name for cut in self.cuts for name in cut.metrics)
        left = self.widths().sum()
        lost = -left.diff()
        rows = [
            {
                "fit": cut.fit,
                "step": cut.step,
                "criterion": cut.criterion,
                "context": cut.context,
                "asked": math.nan if cut.asked is None else cut.asked,
                "reached": cut.reached,
                "removed": lost[k],
                "units": left[k],
                "parameters": cut.parameters,
                "macs": cut.macs,
                **{name: cut.metrics.get(name, math.nan) for name in names},
            }
            for k, cut in enumerate(self.cuts, 1)
        ]
        table = pd.DataFrame(rows, columns=[*_COLUMNS, *names], index=range(1, len(rows) + 1))
        whole = ("fit", "step", "removed", "units", "parameters", "macs")
        return table.rename_axis("cut").astype(dict.fromkeys(whole, "Int64"))

    def removed(self) -> pd.DataFrame:
        """Units that went, a row for each group of coupled layers, a column for each cut."""
        layers = list(self._widths())
        lost = [_by_layer(cut.plan, lost=True) for cut in self.cuts]
        counts = {k: [by.get(name, 0) for name in layers] for k, by in enumerate(lost, 1)}
        return pd.DataFrame(counts, index=pd.Index(layers, name="layer"), dtype=int)

    def widths(self) -> pd.DataFrame:
        """Units that are left, a row for each group of coupled layers; column 0: at the start."""
        table = -self.removed()
        table.insert(0, 0, list(self._widths().values()))
        return table.cumsum(axis=1)

    def plot(self, ax: Any = None) -> Any:
        """Draw `removed`: bars by layer, stacked by cut, in front of the widths at the start."""
        from ..measure.pictures import plot_removed

        if not any(cut.plan for cut in self.cuts):
            raise RuntimeError("nothing was cut: there is nothing to plot")
        steps = [cut.step for cut in self.cuts]
        names = [f"cut {k}" if s is None else f"step {s}" for k, s in enumerate(steps, 1)]
        fits = {cut.fit for cut in self.cuts}
        if len(fits) > 1:
            names = [f"fit {cut.fit}, {n}" for cut, n in zip(self.cuts, names, strict=True)]
        return plot_removed(self.removed(), self.widths()[0], names, ax=ax)

    def to_json(self) -> str:
        """The history as compact JSON, the plans in it; equal ones give equal text."""
        return encode(
            [{**vars(cut), "plan": _text(cut.plan)} for cut in self.cuts], _text(self.before)
        )

    @classmethod
    def from_json(cls, text: str) -> History:
        """The history that `to_json` wrote.

        Raises:
            ValueError: the text is damaged, or holds something else.
        """
        cuts, before = decode(text)
        return cls(
            tuple(CutRecord(**{**cut, "plan": _plan(cut["plan"])}) for cut in cuts), _plan(before)
        )

    def also(self, cut: CutRecord) -> History:
        """The same with one more cut."""
        return replace(self, cuts=(*self.cuts, cut))

    def noting(self, **values: Any) -> History:
        """The same with other values in the record of the last cut, if there is one."""
        last = [replace(cut, **values) for cut in self.cuts[-1:]]
        return replace(self, cuts=(*self.cuts[:-1], *last))

    def __repr__(self) -> str:
        if not self.cuts:
            return "History(no cuts)"
        units = self.widths().sum()
        return (
            f"History({len(self)} cuts, {units[0]} -> {units[len(self)]} units, "
            f"{self.cuts[-1].parameters:,} parameters left)"
        )

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def _widths(self) -> dict[str, int]:
        """Units at the start; layers that a later plan alone knows were split off by a cut."""
        found: dict[str, int] = {}
        for cut in self.cuts:
            for name, n in _by_layer(cut.plan, lost=False).items():
                found.setdefault(name, n)
        return found


_COLUMNS = [
    "fit",
    "step",
    "criterion",
    "context",
    "asked",
    "reached",
    "removed",
    "units",
    "parameters",
    "macs",
]


def _by_layer(plan: Plan | None, lost: bool) -> dict[str, int]:
    """Units by layer that a plan finds, or removes."""
    found: dict[str, int] = {}
    for axis in plan.axes if plan is not None else ():
        n = axis.before - axis.after if lost else axis.before
        found[axis.name] = found.get(axis.name, 0) + n
    return found


def _text(plan: Plan | None) -> Any:
    return None if plan is None else json.loads(plan.to_json())


def _plan(fields: Any) -> Plan | None:
    return None if fields is None else Plan.from_json(json.dumps(fields))
