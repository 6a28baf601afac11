"""Criteria: importance scores of weights; higher = keep.

A criterion maps a weight to scores of the same shape. Most see the weight as it is. Others compare
it with what it was at the start (`'initial'`) or at the last update of the zeros (`'previous'`),
see its gradient (`'gradient'`), the scale of the norm behind it (`'scale'`), or what was gathered
on data (`GATHERED`, by `fasterai.score`); each says in `needs` what it takes beside the weight.

Sources: `large_final` averaged over a group is the group's L1 norm by its size, the criterion of
Li et al., "Pruning Filters for Efficient ConvNets", 2017, https://arxiv.org/abs/1608.08710. Those
that know the initial weights are the mask criteria of Zhou et al., "Deconstructing Lottery
Tickets", 2019, https://arxiv.org/abs/1905.01067. `grad_crit` is the first-order Taylor expansion
of Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019,
https://arxiv.org/abs/1906.10771, eq. 8. `movmag` is near to Sanh et al., "Movement Pruning",
2020, https://arxiv.org/abs/2005.07683: they add up `-w * dL/dw` over the steps, which is
the weight times its movement, with the sign. `fpgm` is the geometric median of He et al., "Filter
Pruning via Geometric Median", 2019, https://arxiv.org/abs/1811.00250: the sum of the distances of
a filter to all of its layer, the least of which is nearest to it. `norm_scale` is the criterion of
Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017,
https://arxiv.org/abs/1708.06519. `snip` is that of Lee et al., "SNIP: Single-shot Network Pruning
based on Connection Sensitivity", 2019, https://arxiv.org/abs/1810.02340, without the sum over the
network that it is divided by, which is the same for all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from .gathered import GATHERED, Gathered
from .granularity import along
from .normalise import NORMS
from .schedule import Schedule

__all__ = [
    "Criterion",
    "fpgm",
    "grad_crit",
    "large_final",
    "large_init",
    "large_init_large_final",
    "magnitude_increase",
    "movement",
    "movmag",
    "norm_scale",
    "random_scores",
    "small_final",
    "small_init",
    "small_init_small_final",
    "snip",
    "squared_final",
    "updating_magnitude_increase",
    "updating_movement",
    "updating_movmag",
]

NEEDS = ("initial", "previous", "gradient", "scale", "measured", *GATHERED)
Lookup = Callable[[str, str], Tensor | None]  # what is needed, of which parameter


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
        needs: one or several of `'initial'`, `'previous'`, `'gradient'`, `'scale'`, `'measured'`
            and those in `GATHERED`. Callbacks, `Sparsifier` and `GradualPruner` keep copies of the
            first two; the gradient is read where it is; the scale is the mean magnitude of the
            scales of the norms behind a filter, for each of its weights; what is measured comes
            from `oracle` or `particle_search`; the others are gathered by `score` or by a callback.
        norm: how the scores of a layer are normalised where they are ranked with those of other
            layers, see `normalised`; `'none'` not at all.
        records: where the initial and previous weights are found; set by what keeps them.
        elementwise: whether the score of an element depends on this element alone. Such scores
            are computed a piece of the weight at a time, again whenever they are needed; others
            at once, and kept.
        by_filter: whether `func` scores whole filters: it then gets a matrix (filters, elements)
            instead of the weight, and of what it needs, and returns (filters,) scores. Each
            element of a filter scores as the filter does.
        data: what `score` has gathered.
    """

    func: Callable[..., Tensor] = field(repr=False)
    name: str = ""
    reduce: str = "mean"
    needs: str | Iterable[str] = ()
    norm: str | None = None
    records: Lookup | None = field(default=None, repr=False, compare=False)
    elementwise: bool = False
    by_filter: bool = False
    data: Gathered | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"reduce must be 'mean' or 'sum', got {self.reduce!r}")
        several = isinstance(self.needs, Iterable) and not isinstance(self.needs, str)
        needs = tuple(self.needs) if several else (self.needs,)
        if unknown := [need for need in needs if need not in NEEDS]:
            raise ValueError(f"needs must be among {', '.join(NEEDS)}, got {unknown[0]!r}")
        if self.norm not in (None, *NORMS):
            raise ValueError(f"scores are normalised by {', '.join(NORMS)}, got {self.norm!r}")
        if self.elementwise and self.by_filter:
            raise ValueError("a criterion scores elements or whole filters, not both")
        object.__setattr__(self, "needs", needs)

    @property
    def wants(self) -> tuple[str, ...]:
        """What it needs and does not have yet."""
        return tuple(n for n in self.needs if self.data is None or n not in self.data)

    def __call__(
        self,
        weight: Tensor,
        name: str = "weight",
        dim: int = 0,
        given: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """Scores of `weight`, of its shape, in at least float32.

        Args:
            weight: of any shape.
            name: its own, for errors and to find what is needed.
            dim: the dimension that its filters lie along.
            given: needs that are known already, of the weight's shape.

        Raises:
            ValueError: what the criterion needs is not there, or the scores have another shape,
                are not real numbers, or hold nan; `name` says whose.
        """
        needed = [self._needed(need, weight, name, given) for need in self.needs]
        shown = [weight.detach(), *needed]
        if self.by_filter:
            shown = [t.movedim(dim, 0).reshape(t.shape[dim], -1) for t in shown]
        try:
            scores = self.func(*shown)
        except Exception as error:  # whatever user code raises
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self._who} failed on {name}: {what}") from error
        expected = shown[0].shape[:1] if self.by_filter else weight.shape
        if not isinstance(scores, Tensor) or scores.shape != expected:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else repr(scores)
            each = "filter" if self.by_filter else "weight"
            raise ValueError(
                f"{self._who} must return one score per {each}: expected a tensor of shape "
                f"{tuple(expected)} for {name}, got {got}"
            )
        if scores.is_complex():
            raise ValueError(f"{self._who} must return real scores, got {scores.dtype} for {name}")
        scores = wide(scores)
        if scores.sum().isnan() and scores.isnan().any():  # the sum takes no memory
            raise ValueError(
                f"{self._who} gave nan for {name}: its weights{self._or_records} hold nan, or the "
                f"criterion divides by zero; nothing was changed"
            )
        if self.by_filter:
            scores = along(scores, dim, weight.ndim).expand(weight.shape)
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
                without: units by their mean, unless they are summed, and others as they are;
                `'none'` leaves units as they are, too.
        """
        return replace(self, norm=norm)

    def reading(self, records: Lookup) -> Criterion:
        """The same criterion, finding what it needs by `records(need, parameter name)`."""
        return replace(self, records=records)

    @property
    def title(self) -> str:
        """What to call it in tables."""
        name = self.name or getattr(self.func, "__name__", "")
        name = name if name.isidentifier() else "a function"
        return name if self.norm is None else f"{name}, {self.norm}"

    @property
    def _who(self) -> str:
        return f"criterion {self.name or self.func!r}"

    def _needed(self, need: str, weight: Tensor, name: str, given: Mapping[str, Tensor]) -> Tensor:
        if need in given:
            return given[need]
        if self.data is not None and need in self.data:
            return self.data(need, weight, name, self._who)
        found = None if self.records is None else self.records(need, name)
        if found is None and need == "gradient":
            found = weight.grad
        if found is None:
            raise ValueError(f"{self._who} needs {self._where_from(need, name)}")
        return found

    def _where_from(self, need: str, name: str) -> str:
        """What is missing, and how to get it."""
        if need == "gradient":
            return f"gradients, and {name} has none: call loss.backward() first"
        if need == "scale":
            return (
                f"the scale of a norm behind {name}, which is known of filters alone: take "
                f"granularity='filter', or remove channels with Pruner"
            )
        if need == "measured":
            return f"measurements, and there are none of {name}: take what oracle(...) returns"
        if need in GATHERED:
            own = self.name or "criterion"
            return (
                f"the {GATHERED[need]}, which is gathered on data: pass "
                f"criteria=score(model, dl, {own}, loss_func=loss_func), or gather it while "
                f"training, with SparsifyCallback(criteria={own})"
            )
        own = self.name or "criterion"
        return (
            f"the {need} weights, of which a copy must be made before training: "
            f"PruneCallback(0.5, criteria={own}) makes one, and so does GradualPruner(model, x, "
            f"criteria={own}), whose prune_to(0.5) then removes; for zeros SparsifyCallback and "
            f"Sparsifier do. Or choose a criterion of the weights as they are"
        )

    @property
    def _or_records(self) -> str:
        names = {"gradient": "gradients", "initial": "initial weights"}
        names |= {"previous": "previous weights", "scale": "scales"}
        return "".join(f" or {names.get(need, GATHERED.get(need))}" for need in self.needs)


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


def wide(weight: Tensor) -> Tensor:
    """In at least float32, where squares and small differences do not vanish."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _square(weight: Tensor) -> Tensor:
    return wide(weight).square()


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
    return wide(weight).abs() - wide(before).abs()


def _way(weight: Tensor, before: Tensor) -> Tensor:
    return (wide(weight) - wide(before)).abs_()


def _weight_by_way(weight: Tensor, before: Tensor) -> Tensor:
    return (wide(weight) - wide(before)).mul_(weight).abs_()


def _taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    return (wide(weight) * wide(gradient)).square_()


def _sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    return (wide(weight) * wide(gradient)).abs_()


def _distances(filters: Tensor) -> Tensor:
    """(filters,) the sum of the L2 distances of each to all."""
    filters = wide(filters)
    filters = filters - filters.mean(0)  # their distances stay, and round less
    return torch.cdist(filters, filters).sum(1)


def _scale(weight: Tensor, scale: Tensor) -> Tensor:
    return scale.abs()


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
snip = Criterion(_sensitivity, "snip", needs="gradient")

fpgm = Criterion(_distances, "fpgm", by_filter=True)
norm_scale = Criterion(_scale, "norm_scale", needs="scale")
