"""Criteria: importance scores of weights; higher = keep.

A criterion maps a weight to scores of the same shape. Most see the weight as it is. Others compare
it with what it was at the start (`'initial'`) or at the last update of the zeros (`'previous'`),
or see its gradient (`'gradient'`); each says in `needs` what it takes beside the weight.

Sources: `large_final` averaged over a group is the group's L1 norm by its size, the criterion of
Li et al., "Pruning Filters for Efficient ConvNets", 2017, https://arxiv.org/abs/1608.08710. Those
that know the initial weights are the mask criteria of Zhou et al., "Deconstructing Lottery
Tickets", 2019, https://arxiv.org/abs/1905.01067. `grad_crit` is the first-order Taylor expansion
of Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019,
https://arxiv.org/abs/1906.10771, eq. 8. `movmag` is near to Sanh et al., "Movement Pruning",
2020, https://arxiv.org/abs/2005.07683: they add up `-w * dL/dw` over the steps, which is
the weight times its movement, with the sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .normalise import NORMS
from .schedule import Schedule

__all__ = [
    "Criterion",
    "as_criterion",
    "grad_crit",
    "large_final",
    "large_init",
    "large_init_large_final",
    "magnitude_increase",
    "movement",
    "movmag",
    "random_scores",
    "small_final",
    "small_init",
    "small_init_small_final",
    "squared_final",
    "updating_magnitude_increase",
    "updating_movement",
    "updating_movmag",
]

NEEDS = ("initial", "previous", "gradient")
Lookup = Callable[[str, str], Tensor]  # what is needed, of which parameter


class NothingToCompare(ValueError):
    """All scores are equal: nothing was trained since the records, or there are no gradients."""


@dataclass(frozen=True)
class Criterion:
    """Scores for the elements of a weight, and how those of a group become one.

    ```python
    Criterion(lambda weight, initial: (weight - initial).abs(), "moved", needs="initial")
    ```

    Args:
        func: weight, then what it `needs` in that order -> scores of the weight's shape, higher =
            keep. All it is given has the weight's shape and must not be changed.
        name: shown in reports and errors.
        reduce: `'mean'` or `'sum'` over the elements of a group. Under `'mean'`, units ranked
            globally are further divided by the mean score of their axis, so that no layer is
            emptied for being wide or small; under `'sum'` they are compared as they are.
        needs: one or several of `'initial'`, `'previous'` and `'gradient'`. A `Sparsifier` keeps
            copies of the first two; the gradient is read where it is.
        norm: how the scores of a layer are normalised where they are ranked with those of other
            layers, see `normalised`.
        records: where the initial and previous weights are found; set by what keeps them.
        elementwise: whether the score of an element depends on this element alone. Such scores
            are computed a piece of the weight at a time, again whenever they are needed; others
            at once, and kept.
    """

    func: Callable[..., Tensor] = field(repr=False)
    name: str = ""
    reduce: str = "mean"
    needs: str | Iterable[str] = ()
    norm: str | None = None
    records: Lookup | None = field(default=None, repr=False, compare=False)
    elementwise: bool = False

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"reduce must be 'mean' or 'sum', got {self.reduce!r}")
        needs = (self.needs,) if isinstance(self.needs, str) else tuple(self.needs)
        if unknown := [need for need in needs if need not in NEEDS]:
            raise ValueError(f"needs must be among {', '.join(NEEDS)}, got {unknown[0]!r}")
        if self.norm not in (None, *NORMS):
            raise ValueError(f"scores are normalised by {', '.join(NORMS)}, got {self.norm!r}")
        object.__setattr__(self, "needs", needs)

    def __call__(self, weight: Tensor, name: str = "weight") -> Tensor:
        """Scores of `weight`, of its shape, in at least float32.

        Raises:
            ValueError: what the criterion needs is not there, or the scores have another shape,
                are not real numbers, or hold nan; `name` says whose.
        """
        who = f"criterion {self.name or self.func!r}"
        needed = [self._needed(need, weight, name) for need in self.needs]
        try:
            scores = self.func(weight.detach(), *needed)
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
                f"{who} gave nan for {name}: its weights{self._or_records} hold nan, or the "
                f"criterion divides by zero; nothing was changed"
            )
        return scores

    def reduced_by(self, reduce: str) -> Criterion:
        """The same criterion with the scores of a group averaged (`'mean'`) or added (`'sum'`)."""
        return replace(self, reduce=reduce)

    def normalised(self, norm: str | None) -> Criterion:
        """The same criterion with the scores of each layer normalised for a global ranking.

        Within a layer the order of the groups stays, so that a local ranking is the same.

        Args:
            norm: `'mean'` divides by the mean absolute score, `'l2'` by the L2 norm of all scores;
                `'lamp'` squares them and divides each by the sum of those at least as large,
                which for `large_final` and single weights is LAMP; see `normalise`. None is as
                without: units by their mean, unless they are summed, and others as they are.
        """
        return replace(self, norm=norm)

    def reading(self, records: Lookup) -> Criterion:
        """The same criterion, finding what it needs by `records(need, parameter name)`."""
        return replace(self, records=records)

    def _needed(self, need: str, weight: Tensor, name: str) -> Tensor:
        if self.records is not None:
            return self.records(need, name)
        if need == "gradient" and weight.grad is not None:
            return weight.grad
        who = f"criterion {self.name or self.func!r}"
        if need == "gradient":
            raise ValueError(
                f"{who} needs gradients, and {name} has none: call loss.backward() first"
            )
        raise ValueError(
            f"{who} needs the {need} weights, which only Sparsifier and SparsifyCallback keep; "
            f"zero filters with them, SparsifyCallback(0.5, 'filter', criteria=...), and then "
            f"remove the zeros with Pruner.prune_model(), or choose a criterion of the weights "
            f"as they are"
        )

    @property
    def _or_records(self) -> str:
        return "".join(
            " or gradients" if need == "gradient" else f" or {need} weights" for need in self.needs
        )


def as_criterion(criteria: Criterion | Callable[[Tensor], Tensor]) -> Criterion:
    """A criterion as it is; any other function of the weight is averaged over a group."""
    if isinstance(criteria, Criterion):
        return criteria
    if not callable(criteria) or isinstance(criteria, type | Schedule):
        raise TypeError(
            f"criteria must be a Criterion (large_final, squared_final, movement, grad_crit, "
            f"random_scores, ...) or a function from a weight to scores of its shape, got "
            f"{criteria!r}"
        )
    return Criterion(criteria, getattr(criteria, "__name__", ""))


def _wide(weight: Tensor) -> Tensor:
    """In at least float32, where squares and small differences do not vanish."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def _square(weight: Tensor) -> Tensor:
    return _wide(weight).square()


def _minus_abs(weight: Tensor) -> Tensor:
    return weight.abs().neg_()


def _random(weight: Tensor) -> Tensor:
    return torch.rand(weight.shape, device=weight.device)


def _abs_before(weight: Tensor, before: Tensor) -> Tensor:
    return before.abs()


def _minus_abs_before(weight: Tensor, before: Tensor) -> Tensor:
    return before.abs().neg_()


def _smaller_of_both(weight: Tensor, before: Tensor) -> Tensor:
    return torch.minimum(weight.abs(), before.abs())


def _minus_larger_of_both(weight: Tensor, before: Tensor) -> Tensor:
    return torch.maximum(weight.abs(), before.abs()).neg_()


def _growth(weight: Tensor, before: Tensor) -> Tensor:
    return _wide(weight).abs() - _wide(before).abs()


def _way(weight: Tensor, before: Tensor) -> Tensor:
    return (_wide(weight) - _wide(before)).abs_()


def _weight_by_way(weight: Tensor, before: Tensor) -> Tensor:
    return (_wide(weight) - _wide(before)).mul_(weight).abs_()


def _taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    return (_wide(weight) * _wide(gradient)).square_()


large_final = Criterion(torch.abs, "large_final", elementwise=True)
squared_final = Criterion(_square, "squared_final", elementwise=True)
small_final = Criterion(_minus_abs, "small_final", elementwise=True)
random_scores = Criterion(_random, "random_scores")

large_init = Criterion(_abs_before, "large_init", needs="initial")
small_init = Criterion(_minus_abs_before, "small_init", needs="initial")
large_init_large_final = Criterion(_smaller_of_both, "large_init_large_final", needs="initial")
small_init_small_final = Criterion(_minus_larger_of_both, "small_init_small_final", needs="initial")
magnitude_increase = Criterion(_growth, "magnitude_increase", needs="initial")
movement = Criterion(_way, "movement", needs="initial")
movmag = Criterion(_weight_by_way, "movmag", needs="initial")

updating_magnitude_increase = Criterion(_growth, "updating_magnitude_increase", needs="previous")
updating_movement = Criterion(_way, "updating_movement", needs="previous")
updating_movmag = Criterion(_weight_by_way, "updating_movmag", needs="previous")

grad_crit = Criterion(_taylor, "grad_crit", needs="gradient")
