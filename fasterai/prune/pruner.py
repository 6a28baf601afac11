"""The pruner: removes what is zero, or what ranks lowest, and proves that it did it right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.criteria import Criterion, as_criterion, large_final
from ..core.masks import Limits, as_fraction, select
from ..core.names import LayerChoice, pick
from ..coupling.inputs import Inputs
from ..coupling.labels import PRODUCE, Dim, dims_of
from ..coupling.ranking import unit_scores, zeroed_units
from ..coupling.units import Axis, Coupling, couple, replay
from ..measure.profile import layer_costs
from .check import Differences, differences, outputs, peaks, silenced
from .plan import AxisCut, Plan
from .surgery import cut

__all__ = ["Pruner"]


@dataclass(frozen=True)
class _Decision:
    """Units to remove, by axis; why others stay; and how far the outputs are apart."""

    remove: dict[int, Tensor]
    stay: list[tuple[str, int, str]]
    apart: Differences | None


class Pruner:
    """Physically removes channels from a network, in place.

    On construction the network runs on channel labels, in eval and in train mode, which tells
    what must be cut together. The model is not changed by that.

    Args:
        model: any network; its parameters keep their identity and names.
        example_inputs: what its forward takes: a tensor, a tuple of positional inputs or a dict
            of keyword inputs, on the model's device. At most two samples are used.
        exclude: names or types of layers whose channels stay, or names of blocks of layers.

    Raises:
        ValueError: an unknown layer name, or inputs the model cannot run on.

    Attributes:
        plan: what the last `prune_model` cut.
        max_abs_diff, max_rel_diff: the largest difference of the outputs it caused, absolute and
            relative to the largest output, on the example and on random inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
    ) -> None:
        self.model = model
        self.inputs = Inputs.of(example_inputs)
        self.inputs.check(model)
        self._excluded = pick(model, exclude, "exclude")
        self.plan: Plan | None = None
        self.max_abs_diff: float | None = None
        self.max_rel_diff: float | None = None
        self._stay: list[tuple[str, int, str]] = []
        self._couple()
        self._before = layer_costs(model, self.inputs)

    def prune_model(
        self,
        sparsity: float | None = None,
        *,
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        round_to: int = 1,
        min_keep: int = 1,
        verify: bool = True,
    ) -> nn.Module:
        """Remove units from the model, in place, and return it.

        Args:
            sparsity: None removes the units that are zero, exactly. A fraction removes that
                share of the free units, the lowest scores first.
            context: 'local' ranks within each axis, 'global' over the whole network.
            criteria: scores of weights, higher = keep.
            round_to: widths become multiples of this; fewer units go, where needed.
            min_keep: units that stay in each axis, at least.
            verify: compare outputs before and after. The labels are replayed in any case.

        A cut is taken back where the smaller network does not run, wires channels together that
        do not belong together, or computes something else: nothing else, for None; than the
        network that ignores the removed channels, for a fraction. What stays is named in
        `kept()`.
        """
        decision = self._decide(sparsity, context, criteria, Limits(min_keep, round_to), verify)
        plan = self._plan(decision)
        kept = self._kept(decision.remove)
        if not kept:
            warnings.warn(
                f"nothing was removed: {self._why_nothing(sparsity, decision)}", stacklevel=2
            )
        cut(self.model, kept)
        self.plan, self._stay = plan, decision.stay
        apart = decision.apart if kept else Differences(0.0, 0.0, True)
        self.max_abs_diff = apart.absolute if apart else None
        self.max_rel_diff = apart.relative if apart else None
        self._couple()
        return self.model

    def plan_for(
        self,
        sparsity: float | None = None,
        *,
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        round_to: int = 1,
        min_keep: int = 1,
        verify: bool = True,
    ) -> Plan:
        """What `prune_model` with the same arguments would do; the model stays as it is."""
        limits = Limits(min_keep, round_to)
        return self._plan(self._decide(sparsity, context, criteria, limits, verify))

    def report(self) -> pd.DataFrame:
        """Widths, parameters and MACs (one sample) of each layer, before and after; last 'total'.

        Before is when the pruner was made, after is now.
        """
        after = layer_costs(self.model, self.inputs)
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

    # --- deciding ------------------------------------------------------------------------------

    def _couple(self) -> None:
        self._shapes = {dim: t.shape[dim.dim] for dim, t in dims_of(self.model).items()}
        self.coupling: Coupling = couple(self.model, self.inputs)
        self._axes = [
            axis.pinned("excluded") if self._excluded & set(axis.producers) else axis
            for axis in self.coupling.axes
        ]

    def _decide(
        self, sparsity: Any, context: str, criteria: Any, limits: Limits, verify: bool
    ) -> _Decision:
        """Choose, try and take back; the model is as before when this returns."""
        if context not in ("local", "global"):
            raise ValueError(f"context must be 'local' or 'global', got {context!r}")
        criterion = as_criterion(criteria)
        share = None if sparsity is None else as_fraction(sparsity)
        if self._shapes != {dim: t.shape[dim.dim] for dim, t in dims_of(self.model).items()}:
            self._couple()  # somebody else cut the model meanwhile
        if share is None:
            wanted, stay = self._zero_units(limits)
        else:
            wanted, stay = self._ranked_units(share, context, criterion, limits)
        exact = share is None
        trial = _Trial(self, exact, verify)
        good = trial.settle({}, {a: r for a, r in wanted.items() if r.any()})
        for a, reason in trial.failed.items():
            units = wanted[a].nonzero().flatten().tolist()
            stay.extend((self._axes[a].name, u, reason) for u in units)
        return _Decision(good, stay, trial.apart)

    def _zero_units(self, limits: Limits) -> tuple[dict[int, Tensor], list[tuple[str, int, str]]]:
        tensors = dict(self.model.named_parameters())
        seen = peaks(self.model, self.inputs, self.coupling)
        wanted, stay = {}, []
        for a, axis in enumerate(self._axes):
            zero = zeroed_units(tensors, axis).cpu()
            units = zero.nonzero().flatten().tolist()
            arriving = seen[self._classes(axis)] if units else None
            silent = []
            for u in units:
                if axis.pins[u] is not None:
                    stay.append((axis.name, u, axis.pins[u]))
                elif arriving[u] != 0:
                    stay.append((axis.name, u, _not_silent(arriving[u])))
                else:
                    silent.append(u)
            n = limits.rounded(limits.most(axis.size, len(silent)), axis.size)
            stay.extend((axis.name, u, "min_keep or round_to") for u in silent[n:])
            wanted[a] = torch.zeros(axis.size, dtype=torch.bool)
            wanted[a][silent[:n]] = True
        return wanted, stay

    def _ranked_units(
        self, share: float, context: str, criterion: Criterion, limits: Limits
    ) -> tuple[dict[int, Tensor], list[tuple[str, int, str]]]:
        tensors = dict(self.model.named_parameters())
        stay = [
            (axis.name, u, pin)
            for axis in self._axes
            for u, pin in enumerate(axis.pins)
            if pin is not None
        ]
        ranked = [a for a, axis in enumerate(self._axes) if len(axis.free)]
        together = context == "global"
        scores = [unit_scores(tensors, self._axes[a], criterion, relative=together) for a in ranked]
        counts: Any = [round(share * s.numel()) for s in scores]
        if together:
            counts = round(share * sum(s.numel() for s in scores))
        zero = select(
            scores,
            counts,
            held=[torch.zeros_like(s, dtype=torch.bool) for s in scores],
            sizes=[self._axes[a].size for a in ranked],
            limits=limits,
        )
        wanted = {}
        for a, mark in zip(ranked, zero, strict=True):
            wanted[a] = torch.zeros(self._axes[a].size, dtype=torch.bool)
            wanted[a][self._axes[a].free[mark.cpu()]] = True
        return wanted, stay

    def _why_nothing(self, sparsity: float | None, decision: _Decision) -> str:
        if decision.stay:
            return "see kept() for what stayed and why"
        if sparsity is None:
            return "no channel is zero; pass a sparsity, or train with SparsifyCallback first"
        return f"sparsity {sparsity} of the free channels rounds to none"

    # --- cutting -------------------------------------------------------------------------------

    def _classes(self, axis: Axis) -> Tensor:
        """(size,) the class of each unit."""
        found = torch.zeros(axis.size, dtype=torch.long)
        classes = torch.from_numpy(self.coupling.classes).long()
        for slot in axis.having(PRODUCE):
            found[slot.unit] = classes[self.coupling.first[slot.dimension] + slot.index]
        return found

    def _kept(self, remove: dict[int, Tensor]) -> dict[Dim, Tensor]:
        """The positions that stay, for each dimension that loses some."""
        gone: dict[Dim, Tensor] = {}
        for a, units in remove.items():
            for slot in self._axes[a].slots:
                index = slot.index[units[slot.unit]]
                if index.numel():
                    dim = slot.dimension
                    mark = gone.setdefault(dim, torch.zeros(self._shapes[dim], dtype=torch.bool))
                    mark[index] = True
        return {dim: (~mark).nonzero().flatten() for dim, mark in gone.items()}

    def _plan(self, decision: _Decision) -> Plan:
        kept = self._kept(decision.remove)
        lost = {a: int(r.sum()) for a, r in decision.remove.items()}
        by_name: dict[str, dict[int, tuple[int, ...]]] = {}
        for dim, index in kept.items():
            by_name.setdefault(dim.parameter, {})[dim.dim] = tuple(index.tolist())
        before = after = 0
        for name, p in self.model.named_parameters():
            before += p.numel()
            cuts = by_name.get(name, {})
            after += math.prod(len(cuts[d]) if d in cuts else n for d, n in enumerate(p.shape))
        axes = tuple(
            AxisCut(axis.name, axis.size, axis.size - lost.get(a, 0))
            for a, axis in enumerate(self._axes)
        )
        return Plan(by_name, axes, before, after)


def _not_silent(peak: float) -> str:
    return (
        f"its weights are zero, but it arrives at the next layer with magnitude {peak:.3g} (the "
        f"bias, or the scale and shift of the norm behind it, are not zero)"
    )


class _Trial:
    """Cut, look, take back: which axes can be cut together."""

    def __init__(self, pruner: Pruner, exact: bool, verify: bool) -> None:
        self.pruner = pruner
        self.exact = exact
        self.verify = verify
        self.failed: dict[int, str] = {}
        self.apart: Differences | None = None

    def settle(self, good: dict[int, Tensor], more: dict[int, Tensor]) -> dict[int, Tensor]:
        """`good` with those of `more` that can be cut as well, found by halving where it fails."""
        if not more:
            return good
        reason = self.attempt({**good, **more})
        if reason is None:
            return {**good, **more}
        if len(more) == 1:
            self.failed[next(iter(more))] = reason
            return good
        axes = list(more)
        for part in (axes[: len(axes) // 2], axes[len(axes) // 2 :]):
            good = self.settle(good, {a: more[a] for a in part})
        return good

    def attempt(self, remove: dict[int, Tensor]) -> str | None:
        """Why this cannot be cut, or None; the model is as before."""
        pruner = self.pruner
        model, inputs, kept = pruner.model, pruner.inputs, pruner._kept(remove)
        expected = self._expected(remove)
        undo = cut(model, kept)
        try:
            replay(model, inputs, pruner.coupling, kept, self._alone(remove))
            apart = differences(expected, outputs(model, inputs)) if expected else None
        except Exception as error:  # whatever a cut network may raise
            return f"cutting it breaks the network: {type(error).__name__}: {error}"
        finally:
            undo()
        if apart is not None and not apart.small:
            return f"cutting it changes the outputs by {apart.relative:.2g} of the largest"
        self.apart = apart
        return None

    def _expected(self, remove: dict[int, Tensor]) -> Sequence[Any] | None:
        pruner = self.pruner
        if not self.verify:
            return None
        if self.exact:
            return outputs(pruner.model, pruner.inputs)
        with silenced(pruner.model, [(pruner._axes[a], units) for a, units in remove.items()]):
            return outputs(pruner.model, pruner.inputs)

    def _alone(self, remove: dict[int, Tensor]) -> list[int]:
        found = []
        for a, units in remove.items():
            if int((~units).sum()) == 1:
                found.extend(self.pruner._classes(self.pruner._axes[a])[~units].tolist())
        return found
