"""What a criterion compares the weights with, kept outside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .criteria import NothingToCompare
from .gathered import GATHERED

__all__ = ["Records", "refuse_equal", "stand_in"]

_KEPT = ("initial", "previous")


class Records:
    """Initial and previous weights, as copies, and the gradients where they are.

    Called with what is needed and the name of a parameter. Each of `'initial'` and `'previous'`
    takes as much memory as the weights; gradients take none.

    Args:
        needs: what a criterion needs.
        weights: the weights by name, as they are now: initial, and previous to the first update.
    """

    def __init__(self, needs: Iterable[str], weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._kept: dict[str, dict[str, Tensor]] = {
            need: {name: w.detach().clone() for name, w in weights.items()}
            for need in needs
            if need in _KEPT
        }

    def __call__(self, need: str, name: str) -> Tensor | None:
        """The record, of the weight's shape and on its device; no gradient is a gradient of 0.

        None for what is not recorded here: scales, and what is gathered on data.

        Raises:
            RuntimeError: the records were released.
        """
        weight = self._weights[name]
        if need == "gradient":
            own = torch.zeros_like(weight) if weight.grad is None else weight.grad.detach()
            return own.to_dense() if own.is_sparse else own
        if need not in _KEPT:
            return None
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

    def change(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Put what `change(name, copy)` returns in the place of each copy."""
        for kept in self._kept.values():
            kept.update({name: change(name, copy) for name, copy in kept.items()})


def refuse_equal(scores: Sequence[Tensor]) -> None:
    """Raise `NothingToCompare` where there is more than one score and all are the same."""
    some = [s for s in scores if s.numel()]
    if sum(s.numel() for s in some) < 2:
        return
    low = min(float(s.min()) for s in some)
    if all(float(s.max()) == low for s in some):
        raise NothingToCompare(
            f"the criterion gives every group the score {low:g}: it needs training between "
            f"its records (made at the start, renewed at updates) and an update, gradients that "
            f"loss.backward() left, scales that differ or data to score on; nothing was changed"
        )


def stand_in(need: str, weight: Tensor) -> Tensor | None:
    """Numbers in a weight's shape, to try a criterion before there are records.

    They have both signs where what is needed may have; a scale has nothing to stand in for it.
    """
    if need == "scale":
        return None
    count = torch.arange(weight.numel(), device=weight.device, dtype=torch.float32)
    numbers = count.cos_().view(weight.shape).to(weight.dtype)
    return numbers.abs_() if need in GATHERED and need != "activation" else numbers
