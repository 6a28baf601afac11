"""What is added up of the feature maps of units, as the layers that read them receive them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..coupling.inputs import Inputs
from ..coupling.places import Look, Places, find_places, looking
from ..coupling.units import Coupling
from .units import Units

__all__ = ["OF_MAPS", "Maps"]

OF_MAPS = ("map_taylor", "activation", "zeros")


class Maps:
    """Means over examples and positions of activations, of zeros, and of activation * gradient.

    A unit's activations are what arrives at the layers that read it: behind norm, activation
    function and pooling; where it is added to others, the sum. Of a unit that functions alone read
    (the queries of attention) they are what its layer makes.

    Args:
        model: the network.
        inputs: what it runs on.
        coupling: what is known of its channels.
        units: its units.
        needs: which of `OF_MAPS` to gather.

    Attributes:
        sums: what was added up.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        coupling: Coupling,
        units: Units,
        needs: Iterable[str],
    ) -> None:
        self._model, self._units = model, units
        self._needs = [need for need in OF_MAPS if need in needs]
        self._device = next(model.parameters()).device
        read, made = find_places(model, inputs, coupling)
        self._read, self._made = self._located(read), self._located(made)
        seen = self._mark(self._read)
        self._unread = self._inside(
            {
                name: [tuple(ids.masked_fill(seen[ids], units.size) for ids in f) for f in calls]
                for name, calls in self._made.items()
            }
        )
        self._seen = seen | self._mark(self._unread)
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        size = self._units.size + 1  # the last one for what is in no unit
        self.sums = {what: self._zeros(size) for what in (*self._needs, "count")}
        self.sums["examples"] = self._zeros(1)
        self._gates: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def watching(self, examples: int) -> Iterator[None]:
        """Add up what is seen while this lasts: one forward of so many examples.

        For `'map_taylor'` what is read is multiplied with gates of 1, see `gates`.
        """
        self._now, self._gates = examples, []
        size = self._units.size + 1
        self._positions = {"made": self._zeros(size), "read": self._zeros(size)}
        with ExitStack() as stack:
            stack.enter_context(looking(self._model, self._read, self._look(self._read)))
            for places, look in ((self._made, self._measure), (self._unread, self._look)):
                own = look(places)
                stack.enter_context(looking(self._model, places, own, after=True))
            yield
        self.sums["examples"] += examples

    @property
    def gates(self) -> list[Tensor]:
        """Of the last forward: for each example and channel that was read, a number that is 0."""
        return [gate for gate, _ in self._gates]

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of the mean loss of the batch with respect to the `gates`.

        The gradient of a gate is the sum of activation times gradient over a map. It is divided by
        the number of positions of the map as its layer makes it, where that was seen: behind a
        pooling they are fewer, but the sum is the same.
        """
        total = self._zeros(self._now, self._units.size + 1)
        for (_, ids), gradient in zip(self._gates, gradients, strict=True):
            if gradient is not None:
                each = gradient.to(total).view(self._now, -1, ids.numel()).sum(1)
                total.index_add_(1, ids.flatten(), each)
        made, read = self._positions["made"], self._positions["read"]
        positions = torch.where(made > 0, made, read.clamp(min=1))
        each = total * self._now / positions  # a loss of each example, not of the mean of all
        self.sums["map_taylor"] += each.abs().sum(0)
        self._gates = []

    def found(self, shapes: Mapping[str, torch.Size]) -> dict[str, dict[str, Tensor]]:
        """The means, by need and weight; without weights of whose filters nothing was seen."""
        means = {}
        for need in self._needs:
            count = self.sums["examples" if need == "map_taylor" else "count"]
            known = self.sums[need] / count.clamp(min=1)
            means[need] = self._units.spread(known[:-1], shapes, self._seen[:-1])
        return means

    # --- inside --------------------------------------------------------------------------------

    def _located(self, places: Places) -> Places:
        """The units of the channels, in place of their classes; examples come first."""
        return self._inside(
            {
                name: [
                    tuple(self._units.of(x.to(self._device)) for x in fields if len(x) == 1)
                    for fields in calls
                ]
                for name, calls in places.items()
            }
        )

    def _inside(self, places: Places) -> Places:
        """Only where there are units."""
        size = self._units.size
        found = {
            name: [tuple(ids for ids in fields if bool((ids < size).any())) for fields in calls]
            for name, calls in places.items()
        }
        return {name: calls for name, calls in found.items() if any(calls)}

    def _mark(self, places: Places) -> Tensor:
        """(U + 1,) bool: the units that are seen there."""
        seen = torch.zeros(self._units.size + 1, dtype=torch.bool, device=self._device)
        for ids in (ids for calls in places.values() for own in calls for ids in own):
            seen[ids.flatten()] = True
        seen[-1] = False
        return seen

    def _look(self, places: Places) -> Look:
        """Adds up what is seen."""

        def look(name: str, call: int, x: Tensor) -> Tensor | None:
            changed = None
            for ids in _at(places, name, call, x):
                self._count(x.detach(), ids)
                if "map_taylor" in self._needs:
                    self._size("read", x, ids)
                    changed = x = self._gated(name, x, ids)
            return changed

        return look

    def _measure(self, places: Places) -> Look:
        """Notes how many positions maps have."""

        def look(name: str, call: int, x: Tensor) -> None:
            for ids in _at(places, name, call, x) if "map_taylor" in self._needs else ():
                self._size("made", x, ids)

        return look

    def _count(self, x: Tensor, ids: Tensor) -> None:
        needs = [need for need in ("activation", "zeros") if need in self._needs]
        others = [d for d in range(x.ndim) if ids.shape[d] == 1]
        for need in needs:
            seen = x if need == "activation" else x == 0
            self._put(need, seen.sum(others, dtype=self.sums[need].dtype), ids)
        if needs:
            self._put("count", torch.full_like(ids, x.numel() // ids.numel()), ids)

    def _put(self, what: str, values: Tensor, ids: Tensor) -> None:
        sums = self.sums[what]
        sums.index_add_(0, ids.flatten(), values.to(sums.dtype).flatten())

    def _size(self, where: str, x: Tensor, ids: Tensor) -> None:
        known = self._positions[where]
        each = x.numel() / (self._now * ids.numel())
        here = torch.full_like(ids, 1, dtype=known.dtype).flatten() * each
        here = torch.zeros_like(known).index_add_(0, ids.flatten(), here)
        self._positions[where] = torch.maximum(known, here)

    def _gated(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        if x.shape[0] % self._now:
            raise ValueError(
                f"'map_taylor' needs the examples along the first dimension: what {name!r} reads "
                f"has the shape {tuple(x.shape)} for a batch of {self._now}; take a criterion "
                f"that does not tell examples apart, such as taylor"
            )
        shape = (x.shape[0], *ids.shape[1:])
        gate = torch.zeros(shape, dtype=x.dtype, device=x.device, requires_grad=True)
        self._gates.append((gate, ids))
        return x * (1 + gate)

    def _zeros(self, *shape: int) -> Tensor:
        exact = torch.float32 if self._device.type == "mps" else torch.float64  # mps has no more
        return torch.zeros(shape, dtype=exact, device=self._device)


def _at(places: Places, name: str, call: int, x: Tensor) -> tuple[Tensor, ...]:
    """The units of what is seen there.

    Raises:
        ValueError: the network runs in another way than on the example inputs.
    """
    calls = places[name]
    known = calls[call] if call < len(calls) else calls[-1]
    for ids in known:
        sizes = zip(ids.shape, x.shape, strict=False)
        if ids.ndim != x.ndim or any(a not in (1, b) for a, b in sizes):
            raise ValueError(
                f"{name!r} saw a tensor of the shape {tuple(x.shape)} where channels lie along "
                f"{tuple(ids.shape)}: the network must run as on the first batch"
            )
    return known
