"""What is zeroed together: groups of weights in a layer, or units over coupled layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from ..core.criteria import Criterion
from ..core.granularity import over_groups
from ..core.masks import zero_marks
from ..core.ranking import ElementRanking, Ranking, ScoreRanking
from ..core.selection import Cut, write_kept
from ..coupling.labels import PRODUCE, SCALE, SHIFT
from ..coupling.ranking import ranked_bundles, zeroed_units
from ..coupling.units import Axis

__all__ = ["Groups", "LayerGroups", "UnitGroups", "ranking_of", "write_cut"]

_SPEAKING = (PRODUCE, SCALE, SHIFT)  # what makes a channel speak: all of it is zeroed


class Groups(Protocol):
    """The groups of one layer, or of one axis of coupled layers."""

    name: str
    layers: tuple[str, ...]

    @property
    def free(self) -> int:
        """How many groups may be zeroed."""

    @property
    def size(self) -> int:
        """How many groups there are, the pinned ones counted in."""

    @property
    def width(self) -> int:
        """How many channels a group is, for `round_to`."""

    def scores(self, criterion: Criterion, *, relative: bool) -> Tensor:
        """(free,) one score a group."""

    def zeroed(self) -> Tensor:
        """(free,) bool, the groups all of whose parameters are zero."""

    def write(self, zero: Tensor, masks: Mapping[str, Tensor]) -> None:
        """Put 0 where (free,) bool `zero` says so into masks of 1, of these groups' parameters."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What the masks cover."""

    def tally(self, macs: Mapping[str, int]) -> dict[str, int]:
        """Weights (scored), parameters (masked) and MACs of these groups, and the zero ones."""


@dataclass(frozen=True, eq=False)
class LayerGroups:
    """Groups inside a single weight.

    Args:
        name: the layer.
        parameter: name of its weight.
        weight: the weight itself, of any shape.
        along: the dimensions that index the groups.
    """

    name: str
    parameter: str
    weight: nn.Parameter
    along: tuple[int, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def free(self) -> int:
        return self._shape.numel()

    size = free
    width = 1

    @property
    def _shape(self) -> torch.Size:
        return torch.Size(n if d in self.along else 1 for d, n in enumerate(self.weight.shape))

    @property
    def single(self) -> bool:
        """Whether each weight is a group of its own."""
        return len(self.along) == self.weight.ndim

    def scores(self, criterion: Criterion, *, relative: bool) -> Tensor:
        scores = criterion(self.weight, self.parameter)
        return over_groups(scores, self.along, criterion.reduce).flatten()

    def zeroed(self) -> Tensor:
        alive = over_groups(self.weight.detach() != 0, self.along, "any").flatten()
        return ~alive & alive.any()  # a layer of zeros only is fresh, not pruned

    def write(self, zero: Tensor, masks: Mapping[str, Tensor]) -> None:
        masks[self.parameter].copy_(~zero.view(self._shape))

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {self.parameter: self.weight}

    def tally(self, macs: Mapping[str, int]) -> dict[str, int]:
        size, zeros = self.weight.numel(), int((self.weight == 0).count_nonzero())
        cost = macs.get(self.name, 0)
        return _tally(size, zeros, size, zeros, cost, round(cost * zeros / max(size, 1)))


def ranking_of(groups: Groups, criterion: Criterion, *, relative: bool) -> Ranking:
    """The groups in the order in which they go."""
    if isinstance(groups, LayerGroups) and groups.single and criterion.elementwise:
        return ElementRanking(groups.weight, criterion, groups.parameter)
    return ScoreRanking(lambda: groups.scores(criterion, relative=relative), groups.zeroed())


def write_cut(
    groups: Groups, ranking: Ranking, cut: Cut | None, masks: Mapping[str, Tensor]
) -> None:
    """Put 0 for what goes into masks of 1; without a cut, for what is held."""
    if isinstance(ranking, ScoreRanking):
        groups.write(zero_marks(ranking, cut), masks)
    elif cut is None:
        ranking.write_held(masks[groups.parameter])
    else:
        write_kept(ranking, cut, masks[groups.parameter])


@dataclass(eq=False)
class UnitGroups:
    """The free units of an axis: coupled filters with their biases, norm scales and shifts.

    Where the axis has blocks, a group is a bundle of units, one of each block: those that are
    zero first, then the weakest of each.
    """

    axis: Axis
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self._units = self.axis.bundled(self.axis.free)  # (groups, blocks)

    @property
    def name(self) -> str:
        return self.axis.name

    @property
    def layers(self) -> tuple[str, ...]:
        return self.axis.producers

    @property
    def free(self) -> int:
        return self.axis.bundles

    @property
    def size(self) -> int:
        return self.axis.size // self.axis.blocks

    @property
    def width(self) -> int:
        return self.axis.blocks

    def scores(self, criterion: Criterion, *, relative: bool) -> Tensor:
        first = zeroed_units(self.tensors, self.axis, _SPEAKING)
        scores, self._units = ranked_bundles(
            self.tensors, self.axis, criterion, relative=relative, first=first
        )
        return scores

    def zeroed(self) -> Tensor:
        zero = zeroed_units(self.tensors, self.axis, _SPEAKING)
        if self.axis.blocks == 1:
            self._units = self.axis.free[:, None]
            return zero[self.axis.free.to(zero.device)]
        free = self.axis.free
        order = free[(~zero.cpu()[free]).to(torch.uint8).argsort(stable=True)]
        self._units = self.axis.bundled(order)
        return zero[self._units.to(zero.device)].all(1)

    def write(self, zero: Tensor, masks: Mapping[str, Tensor]) -> None:
        gone = torch.zeros(self.axis.size, dtype=torch.bool)
        gone[self._units[zero.cpu()].flatten()] = True
        for slot in self.axis.having(*_SPEAKING):
            mask = masks.get(slot.parameter)
            if mask is not None:  # buffers are not masked
                mask.index_fill_(slot.dim, slot.index[gone[slot.unit]].to(mask.device), 0)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        slots = self.axis.having(*_SPEAKING)
        return {
            s.parameter: self.tensors[s.parameter] for s in slots if s.parameter in self.tensors
        }

    def tally(self, macs: Mapping[str, int]) -> dict[str, int]:
        zero = zeroed_units(self.tensors, self.axis, _SPEAKING).cpu()
        weights = zero_weights = parameters = zero_parameters = cost = zero_cost = 0
        for slot in self.axis.having(*_SPEAKING):
            if slot.parameter not in self.tensors:
                continue
            rows = self.tensors[slot.parameter].shape[slot.dim]
            each = self.tensors[slot.parameter].numel() // rows
            here, lost = len(slot.index), int(zero[slot.unit].sum())
            parameters += here * each
            zero_parameters += lost * each
            if slot.role == PRODUCE:
                weights += here * each
                zero_weights += lost * each
                cost += round(macs.get(slot.module, 0) * here / rows)
                zero_cost += round(macs.get(slot.module, 0) * lost / rows)
        return _tally(weights, zero_weights, parameters, zero_parameters, cost, zero_cost)


def _tally(*counts: int) -> dict[str, int]:
    names = ("weights", "zero_weights", "parameters", "zero_parameters", "macs", "zero_macs")
    return dict(zip(names, counts, strict=True))
