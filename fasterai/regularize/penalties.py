"""Penalties that drive whole groups of weights towards zero.

Group lasso: `sum over groups of sqrt(size) * ||w_g||_2`, Yuan & Lin, "Model Selection and
Estimation in Regression with Grouped Variables", 2006; on filters, channels and shapes of a
network, without the root of the size: Wen et al., "Learning Structured Sparsity in Deep Neural
Networks", 2016, https://arxiv.org/abs/1608.03665. Of groups of one weight it is L1.

Network slimming: `sum of |scale|` of the norms, Liu et al., "Learning Efficient Convolutional
Networks through Network Slimming", 2017, https://arxiv.org/abs/1708.06519, eq. 1.

The gradient at zero, where there is none, is 0: what is zero stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.criteria import wide
from ..core.granularity import Granularity, along, over_blocks, over_groups, spread
from ..core.names import LayerChoice, unwrapped
from ..coupling.labels import PRODUCE, SCALE, SHIFT
from ..sparse.choose import Choice, choose
from ..sparse.groups import LayerGroups, UnitGroups

__all__ = ["GroupLasso", "Slimming"]


class _Term(Protocol):
    """The penalty on one layer, or on one axis of coupled layers."""

    def value(self) -> Tensor:
        """A scalar that gradients pass."""

    def add_gradient(self, strength: float) -> None:
        """Add `strength` times the gradient of `value` to that of the weights."""


class Penalty:
    """A sum over the layers of a network, for any training loop.

    ```python
    penalty = GroupLasso(model, 'filter', example_inputs=x)
    loss.backward()
    penalty.add_gradient(1e-4)     # or before: (loss + 1e-4 * penalty.value()).backward()
    optimizer.step()
    ```
    """

    def __init__(self, terms: Sequence[_Term], weights: Iterable[Tensor]) -> None:
        self._terms = tuple(terms)
        self._shapes = [(w, w.shape) for w in weights]

    def value(self) -> Tensor:
        """The penalty, a scalar that gradients pass."""
        values = [term.value() for term in self._terms]
        return torch.stack([v.to(values[0]) for v in values]).sum()

    @torch.no_grad()
    def add_gradient(self, strength: float) -> None:
        """Add `strength` times its gradient to those of the weights; never waits for a GPU."""
        for term in self._terms:
            term.add_gradient(strength)

    @property
    def outdated(self) -> bool:
        """Whether channels were removed since it looked at the model."""
        return any(w.shape != shape for w, shape in self._shapes)


class GroupLasso(Penalty):
    """The sum over groups of `sqrt(size)` times the L2 norm of the group.

    Args:
        model: any network.
        granularity: the groups, see `Sparsifier`; of 'filter' they are the units that `Pruner`
            removes: coupled filters with their biases and the scales and shifts of their norms.
        layers: as for `Sparsifier`, as all that follow.
        exclude: names or types of layers to leave alone.
        example_inputs: what the model's forward takes.
        mixed: with channels that layer, RMS and group norms normalise together.
        whole_heads: attention heads count as a whole.

    Raises:
        ValueError: there is nothing to penalise, or the granularity is an N:M pattern.
    """

    def __init__(
        self,
        model: nn.Module,
        granularity: str = "filter",
        *,
        layers: LayerChoice | Iterable[LayerChoice] | None = None,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        example_inputs: Any = None,
        mixed: bool = False,
        whole_heads: bool = False,
    ) -> None:
        choice = _choose(model, granularity, layers, exclude, example_inputs, mixed, whole_heads)
        terms = [_units(g) if isinstance(g, UnitGroups) else _layer(g) for g in choice.groups]
        super().__init__(terms, _weights(choice))


class Slimming(Penalty):
    """The sum of the absolute values of the norms' scales, of channels that `Pruner` can remove.

    Args:
        model: any network.
        layers: names or types of the layers that make the channels, as for `Sparsifier`.
        exclude: names or types of layers to leave alone.
        example_inputs: what the model's forward takes.
        mixed: with channels that layer, RMS and group norms normalise together.
        whole_heads: attention heads count as a whole.

    Raises:
        ValueError: no such channel goes through a norm with scales.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerChoice | Iterable[LayerChoice] | None = None,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        example_inputs: Any = None,
        mixed: bool = False,
        whole_heads: bool = False,
    ) -> None:
        choice = _choose(model, "filter", layers, exclude, example_inputs, mixed, whole_heads)
        terms = [term for g in choice.groups for term in _scales(g)]
        if not terms:
            raise ValueError(
                "no channel that could go is scaled by a norm: take GroupLasso, the penalty "
                "'group_lasso'"
            )
        super().__init__(terms, _weights(choice))


def _choose(model: nn.Module, granularity: str, *how: Any) -> Choice:
    grain = Granularity(granularity)
    if grain.pattern is not None:
        raise ValueError(
            f"of an N:M pattern such as {granularity!r} single weights are chosen, not groups: "
            f"take granularity 'weight'"
        )
    return choose(unwrapped(model), grain, *how)


def _weights(choice: Choice) -> list[Tensor]:
    return [p for g in choice.groups for p in g.parameters.values()]


# --- the terms ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _LayerTerm:
    """Groups inside a single weight.

    Args:
        weight: of any shape.
        group: the shape of a group.
        root: the root of the size of each group, broadcastable to all groups.
    """

    weight: nn.Parameter
    group: tuple[int, ...]
    root: Tensor

    def value(self) -> Tensor:
        return (_norm(self._squares()) * self.root).sum()

    def add_gradient(self, strength: float) -> None:
        slope = self.root * _inverse(self._squares())
        slope = spread(slope, self.weight.shape, self.group)
        _gradient(self.weight).add_(slope * self.weight, alpha=strength)

    def _squares(self) -> Tensor:
        return over_blocks(wide(self.weight).square(), self.group, "sum")


def _layer(groups: LayerGroups) -> _LayerTerm:
    weight = groups.weight
    sizes = over_blocks(torch.ones_like(wide(weight.detach())), groups.group, "sum")
    return _LayerTerm(weight, groups.group, sizes.sqrt())


@dataclass(frozen=True, eq=False)
class _Part:
    """Where units lie in a parameter: `index` along `dim`, and the unit of each position."""

    parameter: nn.Parameter
    dim: int
    index: Tensor
    unit: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """(P,) sums of values of the parameter's shape, a position each."""
        sums = over_groups(values, (self.dim,), "sum").flatten()
        return sums.index_select(0, self.index)


@dataclass(frozen=True, eq=False)
class _UnitTerm:
    """Units over several parameters.

    Args:
        parts: where they lie.
        root: (units,) the root of the size of each.
    """

    parts: tuple[_Part, ...]
    root: Tensor

    def value(self) -> Tensor:
        return (_norm(self._squares()) * self.root).sum()

    def add_gradient(self, strength: float) -> None:
        slope = self.root * _inverse(self._squares())
        for part in self.parts:
            p = part.parameter
            rows = slope.new_zeros(p.shape[part.dim]).to(p.device)
            rows = rows.index_copy(0, part.index, slope.to(p.device)[part.unit])
            _gradient(p).add_(along(rows, part.dim, p.ndim) * p, alpha=strength)

    def _squares(self) -> Tensor:
        total = torch.zeros_like(self.root)
        for part in self.parts:
            rows = part.rows(wide(part.parameter).square())
            total = total.index_add(0, part.unit.to(total.device), rows.to(total))
        return total


def _units(groups: UnitGroups) -> _UnitTerm:
    parts = _parts(groups, PRODUCE, SCALE, SHIFT)
    sizes = wide(parts[0].parameter.detach()).new_zeros(groups.axis.size)
    for part in parts:
        rows = part.rows(torch.ones_like(wide(part.parameter.detach())))
        sizes = sizes.index_add(0, part.unit.to(sizes.device), rows.to(sizes))
    return _UnitTerm(tuple(parts), sizes.sqrt())


@dataclass(frozen=True, eq=False)
class _ScaleTerm:
    """Some of the scales of a norm."""

    part: _Part

    def value(self) -> Tensor:
        return wide(self.part.parameter).index_select(0, self.part.index).abs().sum()

    def add_gradient(self, strength: float) -> None:
        index = self.part.index
        signs = self.part.parameter.index_select(0, index).sign()
        _gradient(self.part.parameter).index_add_(0, index, signs, alpha=strength)


def _scales(groups: UnitGroups) -> list[_ScaleTerm]:
    return [_ScaleTerm(part) for part in _parts(groups, SCALE) if part.parameter.ndim == 1]


def _parts(groups: UnitGroups, *roles: str) -> list[_Part]:
    """Where the units lie that may go; buffers are left out."""
    axis = groups.axis
    free = torch.zeros(axis.size, dtype=torch.bool)
    free[axis.free] = True
    found = []
    for slot in axis.having(*roles):
        p = groups.tensors.get(slot.parameter)
        if p is not None:
            on = free[slot.unit]
            places = slot.index[on].to(p.device), slot.unit[on].to(p.device)
            found.append(_Part(p, slot.dim, *places))
    return found


def _gradient(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    elif p.grad.is_sparse:  # of an embedding; penalties are of all its rows
        p.grad = p.grad.to_dense()
    return p.grad


def _norm(squares: Tensor) -> Tensor:
    """The root, with a gradient of 0 at 0."""
    some = squares > 0
    return torch.where(some, torch.where(some, squares, 1.0).sqrt(), 0.0)


def _inverse(squares: Tensor) -> Tensor:
    """One by the root; 0 at 0."""
    some = squares > 0
    return torch.where(some, torch.where(some, squares, 1.0).rsqrt(), 0.0)
