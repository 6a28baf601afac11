"""Criteria: importance scores of weights; higher = keep.

A criterion maps a weight to scores of the same shape. `large_final` averaged over a group is the
group's L1 norm by its size, the criterion of Li et al., "Pruning Filters for Efficient ConvNets",
2017, https://arxiv.org/abs/1608.08710.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .schedule import Schedule

__all__ = [
    "Criterion",
    "as_criterion",
    "large_final",
    "random_scores",
    "small_final",
    "squared_final",
]


@dataclass(frozen=True)
class Criterion:
    """Scores for the elements of a weight, and how those of a group become one.

    Args:
        func: weight -> scores of the same shape, higher = keep.
        name: shown in reports and errors.
        reduce: `'mean'` or `'sum'` over the elements of a group. Under `'mean'`, units ranked
            globally are further divided by the mean score of their axis, so that no layer is
            emptied for being wide or small; under `'sum'` they are compared as they are.
        elementwise: whether the score of an element depends on this element alone. Such scores
            are computed a piece of the weight at a time, again whenever they are needed; others
            at once, and kept.
    """

    func: Callable[[Tensor], Tensor]
    name: str = ""
    reduce: str = "mean"
    elementwise: bool = False

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"reduce must be 'mean' or 'sum', got {self.reduce!r}")

    def __call__(self, weight: Tensor, name: str = "weight") -> Tensor:
        """Scores of `weight`, of its shape, in at least float32.

        Raises:
            ValueError: the scores have another shape, are not real numbers, or hold nan; `name`
                says whose.
        """
        who = f"criterion {self.name or self.func!r}"
        try:
            scores = self.func(weight.detach())
        except Exception as error:  # whatever user code raises
            raise ValueError(f"{who} failed on {name}: {type(error).__name__}: {error}") from error
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else repr(scores)
            raise ValueError(
                f"{who} must return one score per weight: expected a tensor of shape "
                f"{tuple(weight.shape)} for {name}, got {got}"
            )
        if scores.is_complex():
            raise ValueError(f"{who} must return real scores, got {scores.dtype} for {name}")
        if scores.dtype not in (torch.float32, torch.float64):
            scores = scores.float()
        if scores.sum().isnan() and scores.isnan().any():  # the sum takes no memory
            raise ValueError(
                f"{who} gave nan for {name}: its weights hold nan, or the criterion divides by "
                f"zero; nothing was changed"
            )
        return scores

    def reduced_by(self, reduce: str) -> Criterion:
        """The same criterion with the scores of a group averaged (`'mean'`) or added (`'sum'`)."""
        return replace(self, reduce=reduce)


def as_criterion(criteria: Criterion | Callable[[Tensor], Tensor]) -> Criterion:
    """A criterion as it is; any other function of the weight is averaged over a group."""
    if isinstance(criteria, Criterion):
        return criteria
    if not callable(criteria) or isinstance(criteria, type | Schedule):
        raise TypeError(
            f"criteria must be a Criterion (large_final, squared_final, small_final, "
            f"random_scores) or a function from a weight to scores of its shape, got {criteria!r}"
        )
    return Criterion(criteria, getattr(criteria, "__name__", ""))


def _minus_abs(weight: Tensor) -> Tensor:
    return weight.abs().neg_()


def _random(weight: Tensor) -> Tensor:
    return torch.rand(weight.shape, device=weight.device)


large_final = Criterion(torch.abs, "large_final", elementwise=True)
squared_final = Criterion(torch.square, "squared_final", elementwise=True)
small_final = Criterion(_minus_abs, "small_final", elementwise=True)
random_scores = Criterion(_random, "random_scores")
