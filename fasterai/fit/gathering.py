"""What a criterion needs of data, gathered while a network trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..core.criteria import Criterion
from ..core.gathered import GATHERED
from ..score.batches import as_batch
from ..score.gatherer import Gatherer

__all__ = ["Gathering"]


class Gathering:
    """Gradients are added up over the steps since the last update; activations are seen anew.

    Args:
        criterion: what it is for; one that needs nothing of data is left as it is.
    """

    def __init__(self, criterion: Criterion) -> None:
        self._criterion = criterion
        self._needs = [need for need in criterion.wants if need in GATHERED]
        self._gatherer: Gatherer | None = None

    def start(self, model: nn.Module, xb: Any, names: Iterable[str] | None = None) -> Criterion:
        """Gather from now on.

        Args:
            model: the network.
            xb: inputs it runs on.
            names: the weights that will be scored; default all.

        Returns:
            The criterion with ones in place of what will be gathered, to try it with.
        """
        self._names = None if names is None else tuple(names)
        if not self._needs:
            return self._criterion
        self._gatherer = Gatherer(model, self._needs, xb, self._names)
        return self._gatherer.trial(self._criterion)

    def step(self) -> None:
        """Add the gradients of an optimizer step: before it, when they are complete."""
        if self._gatherer is not None:
            self._gatherer.step()

    def scored(
        self, model: nn.Module, xb: Any, yb: Any, loss_func: Callable[..., Tensor]
    ) -> Criterion:
        """The criterion with what was gathered since the last update, and is seen on this batch."""
        if self._gatherer is None:
            return self._criterion
        if self._gatherer.watches:
            self._gatherer.look(as_batch((*xb, *yb), model, len(xb)), loss_func)
        return self._gatherer.seen(self._criterion)

    def renew(self, model: nn.Module, xb: Any) -> None:
        """After an update: start anew, also with a network that was cut."""
        if self._gatherer is not None and self._gatherer.outgrown:
            self.start(model, xb, self._names)
        elif self._gatherer is not None:
            self._gatherer.reset()

    def finish(self) -> None:
        """Let go of what was gathered."""
        self._gatherer = None
