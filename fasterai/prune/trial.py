"""Cut, look, take back: which axes can be cut, together, without breaking the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..coupling.inputs import Inputs
from ..coupling.replay import replay
from ..coupling.units import Axis, Coupling
from .check import Differences, alike, differences, outputs, peaks, silenced
from .plan import Removal, positions_kept
from .surgery import cut

__all__ = ["Trial"]


class Trial:
    """Tries removals on a model, which is as before after each of them.

    A cut network has to run, its labels have to meet as they did before, and its outputs have to
    be those of the network as it is (`exact`) or of the network in which every layer ignores the
    removed channels.

    Attributes:
        failed: why axes could not be cut, by their place in the list of all.
        apart: how far the outputs were apart in the last trial that went well.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        coupling: Coupling,
        axes: Sequence[Axis],
        *,
        exact: bool,
        verify: bool,
    ) -> None:
        self.model, self.inputs = model, inputs
        self.coupling, self.axes = coupling, axes
        self.exact, self.verify = exact, verify
        self.failed: dict[int, str] = {}
        self.apart: Differences | None = None

    def settle(self, good: Removal, more: Removal) -> Removal:
        """`good` with those of `more` that can be cut as well, found by halving where it fails."""
        if not more:
            return good
        reason = self._attempt({**good, **more})
        if reason is None:
            return {**good, **more}
        if len(more) == 1:
            self.failed[next(iter(more))] = reason
            return good
        axes = list(more)
        for part in (axes[: len(axes) // 2], axes[len(axes) // 2 :]):
            good = self.settle(good, {a: more[a] for a in part})
        return good

    def _attempt(self, remove: Removal) -> str | None:
        """Why this cannot be cut, or None."""
        kept = positions_kept(self.model, self.axes, remove)
        expected = self._expected(remove)
        undo = cut(self.model, kept)
        apart, same = None, True
        try:
            replay(self.model, self.inputs, self.coupling, kept, self._alone(remove))
            if expected is not None:
                apart = differences(expected[0], outputs(self.model, self.inputs))
                arriving = peaks(self.model, self.inputs, self.coupling, kept)
                same = self._same(remove, expected[1], arriving)
        except Exception as error:  # whatever a cut network may raise
            return f"cutting it breaks the network: {type(error).__name__}: {error}"
        finally:
            undo()
        if apart is not None and not apart.small:
            return f"cutting it changes the outputs by {apart.relative:.2g} of the largest"
        if not same:
            return "cutting it changes what arrives at other layers"
        self.apart = apart
        return None

    def _expected(self, remove: Removal) -> tuple[list[list[Tensor]], Tensor] | None:
        """Outputs, and what arrives at each layer, of the network to compare with."""
        if not self.verify:
            return None
        ignored = [] if self.exact else [(self.axes[a], units) for a, units in remove.items()]
        with silenced(self.model, ignored):
            arriving = peaks(self.model, self.inputs, self.coupling)
            return outputs(self.model, self.inputs), arriving

    def _same(self, remove: Removal, before: Tensor, after: Tensor) -> bool:
        """Whether the channels that stay arrive as before; outputs may hide a small branch."""
        stays = torch.ones_like(before, dtype=torch.bool)
        for a, units in remove.items():
            stays[self.coupling.classes_of(self.axes[a])[units]] = False
        stays[self._alone(remove)] = False  # a single channel carries no label
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        return alike(before[stays], after[stays], dtype)

    def _alone(self, remove: Removal) -> list[int]:
        """Classes of the units that are left alone in their axis."""
        found = []
        for a, units in remove.items():
            if int((~units).sum()) == 1:
                found.extend(self.coupling.classes_of(self.axes[a])[~units].tolist())
        return found
