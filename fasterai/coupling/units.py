"""What the labels say: units, the axes they form, and which of them are pinned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ..core.names import layer_of
from .analysis import Analysis
from .blocks import Blocks
from .labels import FOLLOW, NORMALISED, PRODUCE, SCALE, SHIFT, Dim

__all__ = ["FROZEN", "Axis", "Coupling", "Slot", "units_of"]

FROZEN = "frozen (requires_grad is False)"


@dataclass(frozen=True, eq=False)
class Slot:
    """Positions of an axis' units along one dimension of a parameter or buffer.

    Args:
        parameter: name in the state dict.
        dim: its dimension.
        role: 'produce', 'scale', 'shift', 'follow' or 'consume'.
        index: (P,) positions along `dim`.
        unit: (P,) the unit of the axis to which each belongs.
    """

    parameter: str
    dim: int
    role: str
    index: Tensor
    unit: Tensor

    @property
    def dimension(self) -> Dim:
        """The dimension itself."""
        return Dim(self.parameter, self.dim)

    @property
    def module(self) -> str:
        """Name of the layer that the parameter is of."""
        return layer_of(self.parameter)


@dataclass(frozen=True, eq=False)
class Axis:
    """Units over the same parameter dimensions; what is ranked together in 'local'.

    In Conv -> BN -> ReLU -> Conv an axis has the rows of the first conv ('produce'), its bias and
    the norm's shift ('shift'), the norm's scale ('scale') and statistics ('follow'), and the
    columns of the second conv ('consume'); unit k is the k-th position of them all.

    Where the network splits the channels (into heads, groups, halves), the units lie in blocks
    of equal size that must keep equally many: what goes together is a bundle, one unit of each.

    Args:
        name: the module of the first weight that produces it.
        size: number of units.
        slots: where the units live.
        pins: for each unit the reason why it cannot be removed, or None.
        classes: (size,) the class of joined labels that each unit is.
        block: (size,) the block of each unit; all 0 where there is only one.
        place: (size,) the place of each unit in its block.
        mixed: the operation that mixes these channels, whose results change with their number.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    pins: tuple[str | None, ...]
    classes: Tensor
    block: Tensor
    place: Tensor
    mixed: str | None = None

    def having(self, *roles: str) -> tuple[Slot, ...]:
        """The slots of these roles."""
        return tuple(s for s in self.slots if s.role in roles)

    @property
    def producers(self) -> tuple[str, ...]:
        """Names of the modules whose rows produce the channels."""
        return tuple(dict.fromkeys(s.module for s in self.having(PRODUCE)))

    @cached_property
    def blocks(self) -> int:
        """How many blocks the units lie in: as many units make a bundle."""
        return int(self.block.max()) + 1 if self.size else 1

    @cached_property
    def free(self) -> Tensor:
        """(F,) the units that are not pinned."""
        return torch.tensor([u for u, pin in enumerate(self.pins) if pin is None], dtype=torch.long)

    @cached_property
    def bundles(self) -> int:
        """How many bundles may go: the free units, or the fewest free in any block."""
        if self.blocks == 1:
            return len(self.free)
        return int(self.block[self.free].bincount(minlength=self.blocks).min())

    def bundled(self, order: Tensor) -> Tensor:
        """(bundles, blocks) units: the k-th of each block, in the given order.

        Args:
            order: (F,) the free units, in the order in which they are to go.
        """
        if self.blocks == 1:
            return order[:, None]
        own = self.block[order]
        lengths = own.bincount(minlength=self.blocks)
        starts = lengths.cumsum(0) - lengths
        places = starts + torch.arange(self.bundles)[:, None]
        return order[own.argsort(stable=True)][places]

    def pinned(self, reason: str, units: Sequence[int] | None = None) -> Axis:
        """The same axis with all (or these) units pinned; earlier reasons stay."""
        which = set(range(self.size) if units is None else units)
        pins = (pin or (reason if u in which else None) for u, pin in enumerate(self.pins))
        return replace(self, pins=tuple(pins))

    def trained(self, parameters: Mapping[str, Tensor]) -> Axis:
        """The same axis with the units pinned that a frozen parameter makes, scales or shifts."""
        axis = self
        for slot in self.having(PRODUCE, SCALE, SHIFT):
            p = parameters.get(slot.parameter)
            if p is not None and not p.requires_grad:
                axis = axis.pinned(FROZEN, slot.unit.tolist())
        return axis


@dataclass(frozen=True, eq=False)
class Coupling:
    """The axes of a network and what its runs said.

    Args:
        axes: in the order in which their first weight is registered.
        analysis: classes of labels, and what is known about them.
        reasons: for pinned classes, why.
    """

    axes: tuple[Axis, ...]
    analysis: Analysis
    reasons: Mapping[int, str]

    @property
    def outputs(self) -> tuple[str, ...]:
        """For each output of the network, the last layer that made its channels."""
        return self.analysis.outputs

    @cached_property
    def pinned(self) -> np.ndarray:
        """(labels,) bool, the classes that are pinned."""
        pinned = np.zeros(len(self.analysis.classes), dtype=bool)
        pinned[list(self.reasons)] = True
        return pinned

    def labels(self, kept: Mapping[Dim, Tensor]) -> dict[Dim, Tensor]:
        """The classes of the positions that a cut left; `kept` for the dimensions it cut."""
        known, first = torch.from_numpy(self.analysis.classes), self.analysis.first
        whole = {dim: torch.arange(size) for dim, size in self.analysis.sizes.items()}
        return {dim: known[first[dim] + index] for dim, index in {**whole, **kept}.items()}


def units_of(model: nn.Module, analysis: Analysis, blocks: Blocks) -> Coupling:
    """The units and axes that an analysis and its blocks amount to."""
    dims = analysis.first
    ordered = sorted(dims, key=lambda d: analysis.roles.get(d) != PRODUCE)  # units count as rows
    seen = [analysis.own(dim) for dim in ordered]
    produced = np.zeros(len(analysis.classes), dtype=bool)
    for dim, mine in zip(ordered, seen, strict=True):
        if analysis.roles.get(dim) == PRODUCE:
            produced[mine] = True
    reasons = dict(analysis.pinned)
    for c in np.flatnonzero(produced & ~analysis.read).tolist():
        reasons.setdefault(c, "no layer was seen to read it")
    for c in blocks.torn.tolist():
        reasons.setdefault(c, "the network splits these channels in a way no cut can keep")
    axis_of = _group(seen, produced, blocks.tie_of(), len(analysis.classes))
    unit_of = _number(seen, axis_of)
    slots: dict[int, list[Slot]] = {}
    for i, a, index in _by_dim_and_axis(seen, axis_of):
        dim, mine = ordered[i], seen[i]
        slots.setdefault(a, []).append(
            Slot(
                dim.parameter,
                dim.dim,
                analysis.roles.get(dim, FOLLOW),
                torch.from_numpy(index),
                torch.from_numpy(unit_of[mine[index]]),
            )
        )
    members = _members(axis_of, unit_of)
    axes = [_axis(own, members[a], analysis, blocks, reasons) for a, own in slots.items()]
    rank = {name: i for i, name in enumerate(dict(model.named_parameters()))}
    axes.sort(key=lambda a: rank[a.having(PRODUCE)[0].parameter])
    return Coupling(tuple(axes), analysis, reasons)


def _group(
    seen: Sequence[np.ndarray], units: np.ndarray, tie: np.ndarray, total: int
) -> np.ndarray:
    """The axis of each class: one for each tie; else classes in the same dimensions share one."""
    codes = np.random.default_rng(0).integers(1, 2**62, size=len(seen), dtype=np.uint64)
    keys = np.zeros(total, dtype=np.uint64)
    for mine, code in zip(seen, codes, strict=True):
        np.add.at(keys, mine, code)  # sums of random codes stand for sets of dimensions
    tied = tie >= 0
    keys[tied] = tie[tied].astype(np.uint64) + 1
    axis_of = np.full(total, -1)
    axis_of[units] = np.unique(keys[units], return_inverse=True)[1]
    return axis_of


def _number(seen: Sequence[np.ndarray], axis_of: np.ndarray) -> np.ndarray:
    """The place of each class among those of its axis, by first appearance."""
    line = np.concatenate([*seen, np.zeros(0, dtype=np.int64)])
    classes, at = np.unique(line, return_index=True)
    classes = classes[np.argsort(at)]
    classes = classes[axis_of[classes] >= 0]
    order = np.argsort(axis_of[classes], kind="stable")
    found = np.full(len(axis_of), -1)
    for _, index in _by_axis(axis_of[classes[order]]):
        found[classes[order][index]] = np.arange(len(index))
    return found


def _by_axis(axis_of: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Positions by axis; those in none are left out."""
    order = np.argsort(axis_of, kind="stable")
    order = order[axis_of[order] >= 0]
    if not len(order):
        return []
    cuts = np.flatnonzero(np.diff(axis_of[order])) + 1
    return [(int(axis_of[part[0]]), part) for part in np.split(order, cuts)]


def _by_dim_and_axis(
    seen: Sequence[np.ndarray], axis_of: np.ndarray
) -> list[tuple[int, int, np.ndarray]]:
    """Which dimension, which axis, and the positions there, from a single sort."""
    sizes = np.array([len(mine) for mine in seen], dtype=np.int64)
    starts, axes = np.cumsum(sizes) - sizes, int(axis_of.max(initial=-1)) + 1
    own = axis_of[np.concatenate([*seen, np.zeros(0, dtype=np.int64)])]
    both = np.where(own < 0, -1, np.repeat(np.arange(len(seen)) * axes, sizes) + own)
    found = ((*divmod(key, axes), index) for key, index in _by_axis(both))
    return [(i, a, index - starts[i]) for i, a, index in found]


def _members(axis_of: np.ndarray, unit_of: np.ndarray) -> dict[int, np.ndarray]:
    """The classes of each axis, unit by unit."""
    return {
        a: classes[np.argsort(unit_of[classes], kind="stable")] for a, classes in _by_axis(axis_of)
    }


def _mixed(reasons: Sequence[str]) -> str | None:
    """A reason other than a norm, where there is one."""
    return next((r for r in reasons if r != NORMALISED), next(iter(reasons), None))


def _axis(
    slots: Sequence[Slot],
    classes: np.ndarray,
    analysis: Analysis,
    blocks: Blocks,
    reasons: Mapping[int, str],
) -> Axis:
    names = classes.tolist()
    block, place = np.zeros_like(classes), np.arange(len(classes))
    if (blocks.block[classes] >= 0).all():
        block = np.unique(blocks.block[classes], return_inverse=True)[1]
        place = blocks.place[classes]
    axis = Axis(
        slots[0].module,
        len(classes),
        tuple(slots),
        tuple(reasons.get(c) for c in names),
        torch.from_numpy(classes),
        torch.from_numpy(block),
        torch.from_numpy(place),
        _mixed([analysis.mixed[c] for c in names if c in analysis.mixed]),
    )
    if axis.blocks > 1 and not axis.bundles:
        return axis.pinned("its counterparts in other blocks are pinned")
    return axis
