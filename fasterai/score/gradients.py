"""What is added up of the gradients of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.criteria import wide
from ..core.granularity import over_groups
from .units import Units

__all__ = ["OF_GRADIENTS", "Gradients"]

OF_GRADIENTS = ("gradient", "squared_gradient", "fisher", "filter_taylor")


class Gradients:
    """Means over batches of gradients, of their squares, and of what units add up to.

    The sums take as much memory as the weights (in float32 where these have less), for each of
    `'gradient'`, `'squared_gradient'` and `'fisher'`.

    Args:
        weights: the weights by name.
        needs: which of `OF_GRADIENTS` to gather.
        units: the network's units, for `'filter_taylor'`.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], needs: Iterable[str], units: Units | None
    ) -> None:
        self._weights, self._units = weights, units
        self._counts = {need: 0 for need in OF_GRADIENTS if need in needs}
        self._sums: dict[str, dict[str, Tensor]] = {
            need: {name: _zeros(w.shape, w) for name, w in weights.items()}
            for need in self._counts
            if need != "filter_taylor"
        }
        if "filter_taylor" in needs:
            self._per_unit = _zeros((units.size,), next(iter(weights.values())))

    def reset(self) -> None:
        """Start anew."""
        self._counts = dict.fromkeys(self._counts, 0)
        for sums in self._sums.values():
            torch._foreach_zero_(list(sums.values()))
        if "filter_taylor" in self._counts:
            self._per_unit.zero_()

    def add(self, gradients: Mapping[str, Tensor | None], needs: Iterable[str]) -> None:
        """Add those of one batch, or example; a weight without one has a gradient of 0.

        Args:
            gradients: by name of the weight.
            needs: what to gather from them.
        """
        known = {k: g.detach() for k, g in gradients.items() if g is not None}
        known = {k: g.to_dense() if g.is_sparse else g for k, g in known.items()}
        for need in [need for need in self._counts if need in needs]:
            self._counts[need] += 1
            if need == "filter_taylor":
                self._add_units(known)
            elif known:
                into = [self._sums[need][k] for k in known]
                exact = [g.to(s.dtype) for g, s in zip(known.values(), into, strict=True)]
                if need == "gradient":
                    torch._foreach_add_(into, exact)
                else:
                    torch._foreach_addcmul_(into, exact, exact)

    def found(self) -> dict[str, dict[str, Tensor]]:
        """The means, by need and weight; without a gradient they are 0."""
        counts = {need: max(n, 1) for need, n in self._counts.items()}
        means = {
            need: {name: s / counts[need] for name, s in sums.items()}
            for need, sums in self._sums.items()
        }
        if "filter_taylor" in counts:
            shapes = {name: w.shape for name, w in self._weights.items()}
            own = self._per_unit / counts["filter_taylor"]
            means["filter_taylor"] = self._units.spread(own, shapes)
        return means

    def _add_units(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the square of what each unit's gate would change.

        A filter in front of a batch norm may be scaled as one likes: in training its weights times
        their gradients add up to no more than what the norm's epsilon leaves of 0. So the gate is
        behind the norm, as the paper has it.
        """
        change = torch.zeros_like(self._per_unit)
        for name, dim, index, unit in self._units.gates:
            if name in gradients:
                weight = self._weights[name].detach()
                lost = wide(weight) * gradients[name]
                rows = over_groups(lost, (dim,), "sum").flatten()
                change.index_add_(0, unit, rows[index].to(change))
        self._per_unit.add_(change.square_())


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    exact = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(shape, dtype=exact, device=like.device)
