"""What a network would cost if it were narrower: exact formulas, read off its labels.

Each parameter, each layer and each product of activations costs a product of widths. A width is
what is left of a dimension: its size, less what goes with each bundle of an axis that is removed.
The widths come from the channel labels, so that concatenations, flattened maps, groups and heads
count as what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..coupling.inputs import Inputs
from ..coupling.run import run_seen
from ..coupling.tracer import Tracer
from ..coupling.units import Axis, Coupling

__all__ = ["Costs", "Width", "macs_of_widths", "parameters_of_widths", "widths_seen"]

# A dimension: its size, and for each axis how many positions go with one of its bundles.
Width = tuple[int, tuple[tuple[int, int], ...]]


class Costs:
    """A cost as a sum of products of widths, at numbers of bundles that are removed.

    Args:
        terms: (factor, widths) each.
        axes: how many axes there are.
        fixed: what else it costs.
    """

    def __init__(
        self, terms: Iterable[tuple[float, Sequence[Width]]], axes: int, fixed: float = 0.0
    ) -> None:
        merged: dict[tuple[Width, ...], float] = {}
        for factor, widths in terms:
            for size, uses in widths:
                factor = factor if uses else factor * size
            key = tuple(sorted(w for w in widths if w[1]))
            merged[key] = merged.get(key, 0.0) + factor
        self.fixed = fixed + merged.pop((), 0.0)
        known = {w: i for i, w in enumerate(dict.fromkeys(w for key in merged for w in key))}
        self._sizes = [size for size, _ in known]
        self._factors = list(merged.values())
        self._places = [tuple(known[w] for w in key) for key in merged]
        self._uses: list[dict[int, int]] = [{} for _ in range(axes)]
        for (_, uses), i in known.items():
            for a, k in uses:
                self._uses[a][i] = k
        self._terms = [
            [t for t, places in enumerate(self._places) if uses.keys() & set(places)]
            for uses in self._uses
        ]

    def at(self, removed: Sequence[int]) -> float:
        """The cost once so many bundles of each axis are gone; negative where some came back."""
        return Running(self, removed).total


class Running:
    """A cost while bundles go; `total` is what is left of it."""

    def __init__(self, costs: Costs, removed: Sequence[int]) -> None:
        self._costs = costs
        self._widths = list(costs._sizes)
        for a, n in enumerate(removed):
            for i, k in costs._uses[a].items() if n else ():
                self._widths[i] -= k * n
        values = (self._value(t, {}) for t in range(len(costs._factors)))
        self.total = costs.fixed + sum(values)

    def saving(self, a: int, n: int) -> float:
        """What it saves to remove so many more bundles of an axis."""
        lost = {i: k * n for i, k in self._costs._uses[a].items()}
        return sum(self._value(t, {}) - self._value(t, lost) for t in self._costs._terms[a])

    def remove(self, a: int, n: int) -> None:
        """Remove them."""
        self.total -= self.saving(a, n)
        for i, k in self._costs._uses[a].items():
            self._widths[i] -= k * n

    def _value(self, t: int, lost: Mapping[int, int]) -> float:
        value = self._costs._factors[t]
        for i in self._costs._places[t]:
            value *= self._widths[i] - lost.get(i, 0)
        return value


# --- the terms of a network ----------------------------------------------------------------------


def parameters_of_widths(
    tensors: Mapping[str, Tensor], axes: Sequence[Axis], each: Callable[[Tensor], float]
) -> list[tuple[float, list[Width]]]:
    """The terms of parameters and buffers: each costs its elements, times what one costs.

    Args:
        tensors: by name.
        axes: of the network.
        each: what an element of a tensor costs.
    """
    uses: dict[tuple[str, int], dict[int, int]] = {}
    for a, axis in enumerate(axes):
        bundle = torch.isin(torch.arange(axis.size), _typical(axis))
        for slot in axis.slots:
            found = uses.setdefault((slot.parameter, slot.dim), {})
            found[a] = found.get(a, 0) + int(bundle[slot.unit].sum())
    return [
        (each(x), [(n, tuple(uses.get((name, d), {}).items())) for d, n in enumerate(x.shape)])
        for name, x in tensors.items()
    ]


def macs_of_widths(
    model: nn.Module, inputs: Inputs, coupling: Coupling, axes: Sequence[Axis]
) -> list[tuple[float, list[Width]]]:
    """The terms of convs and matrix products, for one sample."""
    terms = []

    def see(seen: Callable[[Tensor, int], Width], func: Any, args: Any, out: Any) -> None:
        found = products(seen, func, args, out)
        if found is not None:
            terms.append((found[0] / samples, found[1]))

    samples = inputs.at_least(2).samples or 1
    widths_seen(model, inputs.at_least(2), coupling, axes, see)
    return terms


def products(
    seen: Callable[[Tensor, int], Width], func: Any, args: Any, out: Any
) -> tuple[float, list[Width]] | None:
    """How often a conv or matrix product multiplies, in all: a factor and widths; else None."""
    name = func._schema.name.removeprefix("aten::")
    if name == "convolution":
        x, weight = args[0], args[1]
        places = (x if args[6] else out).shape[2:].numel() * x.shape[0]
        kernel = weight.shape[2:].numel()
        return places * kernel, [seen(weight, 0), seen(weight, 1)]
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        a, b = args[1:3] if "add" in name else args[:2]
        widths = [seen(a, d) for d in range(a.ndim)]
        inside = seen(b, b.ndim - 2)
        widths[-1] = widths[-1] if widths[-1][1] else inside
        if a.ndim == 3 and not widths[0][1]:
            widths[0] = seen(b, 0)
        return 1.0, [*widths, seen(b, b.ndim - 1)]
    return None


def widths_seen(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    axes: Sequence[Axis],
    see: Callable[..., None],
) -> None:
    """Run the network on labels and show each operation.

    Args:
        model: the network; it is left as it was.
        inputs: what it runs on, in eval mode.
        coupling: what is known of its channels.
        axes: its axes.
        see: is shown (widths, operation, args, result), where `widths(tensor, dim)` tells a width.
    """
    owner = np.full(len(coupling.analysis.classes) + 2, -1)  # the last two for FIXED
    for a, axis in enumerate(axes):
        owner[axis.classes[_typical(axis)].numpy()] = a

    def look(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        see(lambda x, d: _width(t, x, d, owner), func, args, out)

    run_seen(model, inputs, coupling.labels({}), look, shapes=coupling.analysis.shapes)


def _typical(axis: Axis) -> Tensor:
    """The units of one bundle that lie at the same place of each block."""
    if axis.blocks == 1:
        return torch.arange(min(1, axis.size))
    return (axis.place == axis.place[0]).nonzero().flatten()


def _width(t: Tracer, x: Tensor, dim: int, owner: np.ndarray) -> Width:
    """A dimension of a tensor: a bundle takes the lines along it in which nothing else lives."""
    f = t.along(x, dim)
    if f is None:
        return x.shape[dim], ()
    shown = owner[f.labels.numpy()]
    lines = np.moveaxis(shown, dim, 0).reshape(x.shape[dim], -1)
    whole = lines[(lines == lines[:, :1]).all(1), 0]
    axes, counts = np.unique(whole[whole >= 0], return_counts=True)
    return x.shape[dim], tuple(zip(axes.tolist(), counts.tolist(), strict=True))
