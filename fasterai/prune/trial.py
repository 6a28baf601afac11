"""Cut, look, take back: which axes can be cut, together, without breaking the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.copies import copied
from ..coupling.computed import unchanged
from ..coupling.inputs import Inputs
from ..coupling.probe import (
    Removal,
    broken,
    compensation,
    cutting,
    gone,
    left_alone,
    positions_kept,
    settle,
    wiring,
)
from ..coupling.surgery import Cut, shadowed
from ..coupling.units import Axis, Coupling
from .budget import Reached
from .check import Differences, Observation, alike, differences, observe
from .constants import Constants
from .plan import Plan
from .select import Stay

__all__ = ["Decision", "Trial"]


@dataclass(frozen=True)
class Decision:
    """What is removed, why other units stay, whether any was to go, and how the trial went."""

    plan: Plan
    stay: list[Stay]
    wanted: bool
    apart: Differences | None
    reached: Reached | None = None


class Trial:
    """Tries removals on a model, which is as before after each of them.

    A cut network has to run, its labels have to meet as they did before, and its outputs have to
    be those of the network as it is, `dense`, with `constants` made good, or of the network in
    which every layer ignores the removed channels. Where channels are mixed (under a layer norm) no
    network computes the same: there the wiring alone is proved.

    Attributes:
        failed: why axes could not be cut, by their place in the list of all.
        apart: how far the outputs were apart in the last trial that went well.
        how: the cut that was tried in it.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        coupling: Coupling,
        axes: Sequence[Axis],
        *,
        dense: Observation | None = None,
        constants: Constants | None = None,
        verify: bool,
    ) -> None:
        self.model, self.inputs = model, inputs
        self.coupling, self.axes = coupling, axes
        self.dense, self.constants, self.verify = dense, constants, verify
        self._exact = constants is not None
        self.failed: dict[int, str] = {}
        self.apart: Differences | None = None
        self.how = Cut({})

    def settle(self, wanted: Removal) -> Removal:
        """Those of the axes that can be cut together, found by halving where it fails.

        The cut is tried in eval mode, and the one found so in train mode, where the network does
        something else there; where that fails, which is rare, all are tried in both.
        """
        remove = self._settled(wanted, [False])
        if remove and self.coupling.analysis.trains:
            where = self.model, self.inputs, self.coupling, self.axes, remove
            if wiring(*where, modes=[True], exact=self._exact)[0] is not None:
                remove = self._settled(wanted, [False, True])
        return remove

    def _settled(self, wanted: Removal, modes: Sequence[bool]) -> Removal:
        mixed = [a for a in wanted if not self._exact and self.axes[a].mixed is not None]
        others = [a for a in wanted if a not in mixed]
        good: list[int] = []
        self.failed, self.apart, self.how = {}, None, Cut({})
        for more in (others, mixed) if self.verify else (others + mixed,):
            good = settle(
                good,
                more,
                lambda found: self._attempt({a: wanted[a] for a in found}, modes),
                self.failed,
            )
        return {a: wanted[a] for a in good}

    def _attempt(self, remove: Removal, modes: Sequence[bool]) -> str | None:
        """Why this cannot be cut, or None."""
        where = self.coupling, self.axes, remove
        reason, changes = wiring(self.model, self.inputs, *where, modes=modes, exact=self._exact)
        if reason is not None:
            return reason
        scales = compensation(self.coupling, self.axes, changes)
        for dim, factor in unchanged(self.model, positions_kept(*where)).items():
            scales[dim] = scales[dim] * factor if dim in scales else factor
        added = {} if self.constants is None else self.constants.added(gone(*where))
        steps = {"exact": self._exact, "scales": scales, "added": added}
        how = cutting(self.model, *where, **steps)
        apart = None
        if self.verify and (self._exact or all(self.axes[a].mixed is None for a in remove)):
            before = self._expected(remove)
            try:
                with shadowed(self.model, how):
                    after = observe(self.model, self.inputs, self.coupling, how.kept)
                apart = differences(before.outputs, after.outputs)
            except Exception as error:  # whatever a cut network may raise
                return broken(error)
            if not apart.small:
                exact = self._in_double(remove, steps)
                if exact is None:
                    return f"cutting it changes the outputs by {apart.relative:.2g} of the largest"
                before, after, apart = exact
            unknown = [int(c) for change in changes for c in change.over]
            unknown += left_alone(self.coupling, how.kept)  # a single channel carries no label
            if not self._same(remove, unknown, before.peaks, after.peaks):
                return "cutting it changes what arrives at other layers"
        self.apart, self.how = apart or self.apart, how
        return None

    def _in_double(
        self, remove: Removal, steps: dict[str, Any]
    ) -> tuple[Observation, Observation, Differences] | None:
        """The same comparison in double precision, or None where that does not agree either.

        What is sorted or picked by a score, such as boxes, may change places by rounding alone.
        """
        if all(p.dtype == torch.float64 for p in self.model.parameters()):
            return None
        where = self.coupling, self.axes, remove
        try:
            model, inputs = copied(self.model).double(), self.inputs.to(torch.float64)
            how, silent = cutting(model, *where, **steps), gone(*where)
            muted = None if self._exact else silent
            before = observe(model, inputs, self.coupling, silent=muted)
            with shadowed(model, how):
                after = observe(model, inputs, self.coupling, how.kept)
            apart = differences(before.outputs, after.outputs)
        except Exception:  # code that insists on another precision
            return None
        return (before, after, apart) if apart.small else None

    def _expected(self, remove: Removal) -> Observation:
        """What the network to compare with computes."""
        if self.dense is not None:
            return self.dense
        silent = gone(self.coupling, self.axes, remove)
        return observe(self.model, self.inputs, self.coupling, silent=silent)

    def _same(self, remove: Removal, unknown: Sequence[int], before: Tensor, after: Tensor) -> bool:
        """Whether the channels that stay arrive as before; outputs may hide a small branch."""
        stays = torch.from_numpy(~gone(self.coupling, self.axes, remove))
        stays[list(unknown)] = False
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        channels = (x.classes[stays[x.classes]] for x in self.axes)
        return all(alike(before[c], after[c], dtype) for c in channels)
