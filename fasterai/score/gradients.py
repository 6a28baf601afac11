"""What is added up of the gradients of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..core.granularity import over_groups
from .units import Units

__all__ = ["OF_GRADIENTS", "Gradients"]

OF_GRADIENTS = ("gradient", "squared_gradient", "fisher", "filter_taylor")


class Gradients:
    """Means over batches of gradients, of their squares, and of what units add up to.

    A weight's sums take as much memory as the weight (in float32 where it has less), for each of
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
        self._needs = [need for need in OF_GRADIENTS if need in needs]
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._counts = dict.fromkeys(self._needs, 0)
        self._per_unit: Tensor | None = None

    def add(self, gradients: Mapping[str, Tensor | None], needs: Iterable[str]) -> None:
        """Add those of one batch, or example; a weight without one has a gradient of 0.

        Args:
            gradients: by name of the weight.
            needs: what to gather from them.
        """
        known = {k: g.detach() for k, g in gradients.items() if g is not None}
        known = {k: g.to_dense() if g.is_sparse else g for k, g in known.items()}
        for need in self._needs:
            if need in needs:
                self._counts[need] += 1
                if need == "filter_taylor":
                    self._add_units(known)
                else:
                    self._add_elements(need, known)

    def found(self) -> dict[str, dict[str, Tensor]]:
        """The means, by need and weight; without a gradient they are 0."""
        means: dict[str, dict[str, Tensor]] = {}
        for need, count in self._counts.items():
            if need == "filter_taylor":
                known = self._unit_sums() / max(count, 1)
                shapes = {k: w.shape for k, w in self._weights.items()}
                means[need] = self._units.spread(known, shapes)
            else:
                sums = self._sums_of(need)
                means[need] = {k: s / max(count, 1) for k, s in sums.items()}
        return means

    def _sums_of(self, need: str) -> dict[str, Tensor]:
        """The sums of a need; they follow a model that was moved."""
        sums = self._sums.setdefault(need, {})
        for name, weight in self._weights.items():
            if name not in sums:
                sums[name] = torch.zeros_like(weight, dtype=_sum_type(weight), requires_grad=False)
            elif sums[name].device != weight.device:
                sums[name] = sums[name].to(weight.device)
        return sums

    def _add_elements(self, need: str, gradients: Mapping[str, Tensor]) -> None:
        sums = self._sums_of(need)
        into = [sums[k] for k in gradients]
        wide = [g.to(s.dtype) for g, s in zip(gradients.values(), into, strict=True)]
        if not into:
            return
        if need == "gradient":
            torch._foreach_add_(into, wide)
        else:
            torch._foreach_addcmul_(into, wide, wide)

    def _unit_sums(self) -> Tensor:
        device = next(iter(self._weights.values())).device
        if self._per_unit is None:
            widest = max((_sum_type(w) for w in self._weights.values()), key=lambda t: t.itemsize)
            self._per_unit = torch.zeros(self._units.size, dtype=widest, device=device)
        self._per_unit = self._per_unit.to(device)
        self._units.rows = [(n, d, i.to(device), u.to(device)) for n, d, i, u in self._units.rows]
        return self._per_unit

    def _add_units(self, gradients: Mapping[str, Tensor]) -> None:
        sums = self._unit_sums()
        change = torch.zeros_like(sums)
        for name, dim, index, unit in self._units.rows:
            if name in gradients:
                weight = self._weights[name].detach()
                lost = gradients[name].to(_sum_type(weight)) * weight
                rows = over_groups(lost, (dim,), "sum").flatten()
                change.index_add_(0, unit, rows[index].to(change))
        sums.add_(change.square_())


def _sum_type(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
