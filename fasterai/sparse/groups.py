"""What is zeroed together: groups of weights in a layer, or units over coupled layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from ..core.criteria import Criterion
from ..core.granularity import blocks_in, over_blocks, spread
from ..core.masks import zero_marks
from ..core.names import layer_of
from ..core.normalise import normalise
from ..core.ranking import ElementRanking, Ranking, ScoreRanking
from ..core.selection import Cutoff, write_kept
from ..coupling.labels import PRODUCE, SCALE, SHIFT
from ..coupling.ranking import ranked_bundles, zeroed_units
from ..coupling.units import Axis

__all__ = ["Groups", "LayerGroups", "UnitGroups", "WeightGroups", "ranking_of", "write_cut"]

_SPEAKING = (PRODUCE, SCALE, SHIFT)  # what makes a channel speak: all of it is zeroed


class Groups(Protocol):
    """The groups of one layer, or of one axis of coupled layers."""

    name: str
    layers: tuple[str, ...]
    emptied: bool  # all of them were zeroed here: zeros only are not fresh, see `zeroed_units`

    @property
    def coupled(self) -> tuple[str, ...]:
        """Further layers whose groups go with these."""

    @property
    def free(self) -> int:
        """How many groups may be zeroed."""

    @property
    def size(self) -> int:
        """How many groups there are, the pinned ones counted in."""

    @property
    def whole(self) -> int:
        """How many groups a sparsity of 1 is: the free ones, or more than a pattern frees."""

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


@dataclass(eq=False)
class WeightGroups:
    """Groups inside a single weight: what they have in common, however they are cut.

    Args:
        name: the layer, or the weight where its layer has several.
        layer: the layer.
        parameter: name of its weight.
        weight: the weight itself, of any shape.
        share: the layer, this one or one around it, whose MACs it has a share of, and that.
        rows: the dimension that its filters lie along.
    """

    name: str
    layer: str
    parameter: str
    weight: nn.Parameter
    _: KW_ONLY
    share: tuple[str, float]
    rows: int = 0

    coupled = ()
    width = 1
    emptied = False

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.name, self.layer)))

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {self.parameter: self.weight}

    def tally(self, macs: Mapping[str, int]) -> dict[str, int]:
        size, zeros = self.weight.numel(), int((self.weight == 0).count_nonzero())
        costly, share = self.share
        cost = round(share * macs.get(costly, 0))
        return _tally(size, zeros, size, zeros, cost, round(cost * zeros / max(size, 1)))


def ranking_of(
    groups: Groups, criterion: Criterion, *, relative: bool, kept: bool = False
) -> Ranking:
    """The groups in the order in which they go; their scores are `kept`, or computed in pieces."""
    single = isinstance(groups, LayerGroups) and groups.single
    if single and criterion.elementwise and not kept and not (relative and criterion.norm):
        weight, name = groups.weight, groups.parameter
        return ElementRanking(weight, criterion, name, emptied=groups.emptied)
    return ScoreRanking(lambda: groups.scores(criterion, relative=relative), groups.zeroed())


def write_cut(
    groups: Groups, ranking: Ranking, cut: Cutoff | None, masks: Mapping[str, Tensor]
) -> None:
    """Put 0 for what goes into masks of 1; without a cut, for what is held."""
    if isinstance(ranking, ScoreRanking):
        groups.write(zero_marks(ranking, cut), masks)
    elif cut is None:
        ranking.write_held(masks[groups.parameter])
    else:
        write_kept(ranking, cut, masks[groups.parameter])
    groups.emptied = (ranking.held if cut is None else cut.n) == ranking.size


@dataclass(eq=False)
class LayerGroups(WeightGroups):
    """Rows, kernels, blocks and all other groups of a single shape.

    Args:
        group: the shape of a group; the last one along a dimension may be smaller.
    """

    _: KW_ONLY
    group: tuple[int, ...]

    @property
    def free(self) -> int:
        return self._shape.numel()

    size = whole = free

    @property
    def _shape(self) -> torch.Size:
        return blocks_in(self.weight.shape, self.group)

    @property
    def single(self) -> bool:
        """Whether each weight is a group of its own."""
        return self._shape == self.weight.shape

    def scores(self, criterion: Criterion, *, relative: bool) -> Tensor:
        scores = criterion(self.weight, self.parameter, self.rows)
        scores = over_blocks(scores, self.group, criterion.reduce).flatten()
        return normalise(scores, criterion.norm if relative else None, self.name)

    def zeroed(self) -> Tensor:
        alive = over_blocks(self.weight.detach() != 0, self.group, "any").flatten()
        return ~alive if self.emptied else ~alive & alive.any()  # zeros only are fresh, not pruned

    def write(self, zero: Tensor, masks: Mapping[str, Tensor]) -> None:
        kept = ~zero.view(self._shape)
        masks[self.parameter].copy_(spread(kept, self.weight.shape, self.group))


@dataclass(eq=False)
class UnitGroups:
    """The free units of an axis: coupled filters with their biases, norm scales and shifts.

    Where the axis has blocks, a group is a bundle of units, one of each block: those that are
    zero first, then the weakest of each.
    """

    axis: Axis
    tensors: Mapping[str, Tensor]

    emptied = False

    def __post_init__(self) -> None:
        self._units = self.axis.bundled(self.axis.free)  # (groups, blocks)

    @property
    def name(self) -> str:
        return self.axis.name

    @property
    def layers(self) -> tuple[str, ...]:
        return self.axis.producers

    @property
    def coupled(self) -> tuple[str, ...]:
        return tuple(k for k in self.layers if k != self.name)

    @property
    def free(self) -> int:
        return self.axis.bundles

    whole = free

    @property
    def size(self) -> int:
        return self.axis.size // self.axis.blocks

    @property
    def width(self) -> int:
        return self.axis.blocks

    def scores(self, criterion: Criterion, *, relative: bool) -> Tensor:
        scores, self._units = ranked_bundles(
            self.tensors, self.axis, criterion, relative=relative, first=self._zero()
        )
        return scores

    def zeroed(self) -> Tensor:
        zero = self._zero()
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
        zero = self._zero().cpu()
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
                each_cost = macs.get(slot.module, 0) * self._share(slot.parameter) / rows
                cost += round(each_cost * here)
                zero_cost += round(each_cost * lost)
        return _tally(weights, zero_weights, parameters, zero_parameters, cost, zero_cost)

    def _zero(self) -> Tensor:
        return zeroed_units(self.tensors, self.axis, _SPEAKING, emptied=self.emptied)

    def _share(self, parameter: str) -> float:
        """A weight's share of its layer's MACs: attention may have several.

        The lengths of a weight norm stand for all of it.
        """
        own = {k: p for k, p in self.tensors.items() if layer_of(k) == layer_of(parameter)}
        sizes = {k: p.numel() for k, p in own.items() if p.ndim > 1 and p.numel() > max(p.shape)}
        return sizes[parameter] / sum(sizes.values()) if parameter in sizes else 1.0


def _tally(*counts: int) -> dict[str, int]:
    names = ("weights", "zero_weights", "parameters", "zero_parameters", "macs", "zero_macs")
    return dict(zip(names, counts, strict=True))
