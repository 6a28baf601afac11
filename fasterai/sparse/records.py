"""What a criterion compares the weights with, kept outside the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..core.criteria import NothingToCompare

__all__ = ["NothingToCompare", "Records", "stand_in"]


class Records:
    """Initial and previous weights, as copies, and the gradients where they are.

    Called with what is needed and the name of a parameter. Each of `'initial'` and `'previous'`
    takes as much memory as the weights; gradients take none.

    Args:
        needs: which of `'initial'`, `'previous'`, `'gradient'` a criterion needs.
        weights: the weights by name, as they are now: initial, and previous to the first update.
    """

    def __init__(self, needs: Iterable[str], weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._kept: dict[str, dict[str, Tensor]] = {
            need: {name: w.detach().clone() for name, w in weights.items()}
            for need in needs
            if need != "gradient"
        }

    def __call__(self, need: str, name: str) -> Tensor:
        """The record, of the weight's shape and on its device; no gradient is a gradient of 0.

        Raises:
            RuntimeError: the records were released.
        """
        weight = self._weights[name]
        if need == "gradient":
            return torch.zeros_like(weight) if weight.grad is None else weight.grad.detach()
        if need not in self._kept:
            raise RuntimeError(f"the {need} weights were released: make a new Sparsifier")
        kept = self._kept[need]
        if kept[name].device != weight.device:  # the model was moved
            kept[name] = kept[name].to(weight.device)
        return kept[name]

    @property
    def bytes(self) -> int:
        """Memory the copies take."""
        return sum(t.nbytes for kept in self._kept.values() for t in kept.values())

    def renew(self) -> None:
        """After an update: the weights now are the previous ones of the next."""
        for name in self._kept.get("previous", ()):
            self("previous", name).copy_(self._weights[name].detach())

    def release(self) -> None:
        """Let go of the copies."""
        self._kept = {}

    @staticmethod
    def refuse_equal(scores: Sequence[Tensor]) -> None:
        """Raise `NothingToCompare` where there is more than one score and all are the same."""
        some = [s for s in scores if s.numel()]
        if sum(s.numel() for s in some) < 2:
            return
        low = min(float(s.min()) for s in some)
        if all(float(s.max()) == low for s in some):
            raise NothingToCompare(
                f"the criterion gives every group the score {low:g}: it needs training between "
                f"its records (made with the Sparsifier, renewed at updates) and an update, or "
                f"gradients that loss.backward() left; nothing was changed"
            )


def stand_in(weight: Tensor) -> Tensor:
    """Numbers of both signs in a weight's shape, to try a criterion before there are records."""
    count = torch.arange(weight.numel(), device=weight.device, dtype=torch.float32)
    return count.cos_().view(weight.shape).to(weight.dtype)
