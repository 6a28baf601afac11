"""Find the units of a network: read its labels, and try whether it can be cut so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .analysis import Analysis, analyse
from .blocks import find_blocks
from .inputs import Inputs
from .labels import PRODUCE
from .mending import shared_sizes
from .probe import settle, wiring
from .units import Axis, Coupling, units_of

__all__ = ["couple"]

_ROUNDS = 6
_FEW = 8  # so many siblings are also tried one by one


@dataclass
class _Found:
    """What trying has taught beyond the labels; heads that go as a whole are given."""

    heads: Sequence[np.ndarray] = ()
    joined: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    grids: list[np.ndarray] = field(default_factory=list)
    ties: list[tuple[int, int]] = field(default_factory=list)
    pins: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def whole(self, coupling: Coupling) -> np.ndarray:
        """(labels,) bool: the classes that are whole heads."""
        mark = np.zeros(len(coupling.analysis.classes), dtype=bool)
        for heads in self.heads:
            mark[coupling.analysis.classes[heads]] = True
        return mark


def couple(model: nn.Module, inputs: Inputs, *, whole_heads: bool = False) -> Coupling:
    """Find the units of a network by running it on labels, in eval and in train mode.

    Then some units of every axis are cut out and taken back again. Where the smaller network does
    not run, or its labels meet in other ways, the blocks of an axis lose the same places instead
    of any; an axis goes together with the one it reads, whose width its code takes for its own;
    or it is pinned, with the reason.

    The model is left as it was: parameters, buffers, training flags and the random state.

    Args:
        model: any network.
        inputs: what it runs on; see `Inputs.fitting`.
        whole_heads: attention heads go as a whole, and keep their width.
    """
    found = _Found()
    analysis = analyse(model, inputs)
    if whole_heads:
        found.heads = analysis.heads
        analysis = analyse(model, inputs, heads=found.heads)
    coupling = _assemble(model, analysis, found)
    likely = _packed(coupling)
    if likely:
        where = model, inputs, coupling
        if not _breaks(*where, range(len(coupling.axes))):
            return coupling
        if _breaks(*where, [a for _, *own in likely for a in own]) and _tie_together(
            *where, likely, found
        ):  # what is below would find out so, too, in half a dozen trials
            coupling = _assemble(model, analysis, found)
    for _ in range(_ROUNDS):
        failed = _try(model, inputs, coupling, found)
        if not failed:
            return coupling
        if not _tie(model, inputs, coupling, failed, found):
            failed = _try(model, inputs, coupling, found, one_by_one=True)
            if not _tie(model, inputs, coupling, failed, found):
                if _align(coupling, failed, found):
                    analysis = analyse(model, inputs, found.joined, found.heads)
                else:
                    _pin(coupling, failed, found)
        coupling = _assemble(model, analysis, found)
    _pin(coupling, _try(model, inputs, coupling, found, one_by_one=True), found)
    return _assemble(model, analysis, found)


def _assemble(model: nn.Module, analysis: Analysis, found: _Found) -> Coupling:
    total = len(analysis.classes)
    named = analysis.classes
    ties = [*shared_sizes(model, analysis), *found.ties]
    ties = [(int(named[a]), int(named[b])) for a, b in ties]
    grids = (*analysis.grids, *(named[g] for g in found.grids))
    coupling = units_of(model, analysis, find_blocks(grids, total, ties))
    reasons = {int(named[c]): why for classes, why in reversed(found.pins) for c in classes}
    if not reasons:
        return coupling
    axes = [_with_pins(axis, reasons) for axis in coupling.axes]
    return Coupling(tuple(axes), analysis, {**reasons, **coupling.reasons})


def _with_pins(axis: Axis, reasons: dict[int, str]) -> Axis:
    for reason in dict.fromkeys(reasons.values()):
        units = [u for u, c in enumerate(axis.classes.tolist()) if reasons.get(c) == reason]
        if units:
            axis = axis.pinned(reason, units)
    return axis


def _try(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    found: _Found,
    *,
    one_by_one: bool = False,
) -> dict[int, str]:
    """Why axes cannot be cut, by their place.

    Siblings in repeated layers are tried together, and stand or fall so, unless one by one.
    """
    some = _parts(coupling)
    whole = found.whole(coupling)

    def attempt(groups: list[tuple[int, ...]]) -> str | None:
        remove = {a: some[a] for group in groups for a in group}
        return wiring(model, inputs, coupling, coupling.axes, remove, modes=[False])[0]

    failed: dict[tuple[int, ...], str] = {}
    groups = _siblings(coupling, list(some))
    alone = [g for g in groups if whole[coupling.axes[g[0]].classes.numpy()].any()]
    good = settle([], alone, attempt, failed)  # heads are cut without what their layers read
    good = settle(good, [g for g in groups if g not in alone], attempt, failed)
    if one_by_one:
        torn = [group for group in failed if 1 < len(group) <= _FEW]
        for group in torn:
            del failed[group]
        settle(good, [(a,) for group in torn for a in group], attempt, failed)
    return {a: reason for group, reason in failed.items() for a in group}


def _breaks(model: nn.Module, inputs: Inputs, coupling: Coupling, axes: Iterable[int]) -> bool:
    """Whether the network cannot be cut in these axes, all at once."""
    some = _parts(coupling)
    remove = {a: some[a] for a in axes if a in some}
    return wiring(model, inputs, coupling, coupling.axes, remove, modes=[False])[0] is not None


def _parts(coupling: Coupling) -> dict[int, Tensor]:
    """Of each axis some units to try, by its place."""
    generator = torch.Generator().manual_seed(0)
    return {a: _some(axis, generator) for a, axis in enumerate(coupling.axes) if axis.bundles > 1}


def _siblings(coupling: Coupling, axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Axes by the layers that make them, those at the same place of repeated blocks together."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for a in axes:
        axis = coupling.axes[a]
        key = (*(re.sub(r"\d+", "#", p) for p in axis.producers[:2]), axis.blocks > 1, axis.mixed)
        alike.setdefault(key, []).append(a)
    return [tuple(group) for group in alike.values()]


def _some(axis: Axis, generator: torch.Generator) -> Tensor:
    """Between a third and two thirds of the bundles: at random, or of each block others in a row.

    Places in a row, elsewhere in each block, show best that code orders the blocks anew.
    """
    share = 1 / 3 + torch.rand((), generator=generator).item() / 3
    count = min(max(1, round(axis.bundles * share)), axis.bundles - 1)
    if axis.blocks > 1:
        places = int(axis.place.max()) + 1
        turn = (axis.place - axis.block * count) % places
        order = axis.free[turn[axis.free].argsort(stable=True)]
    else:
        order = axis.free[torch.randperm(len(axis.free), generator=generator)]
    mark = torch.zeros(axis.size, dtype=torch.bool)
    mark[axis.bundled(order)[:count].flatten()] = True
    return mark


def _packed(coupling: Coupling) -> list[tuple[int, ...]]:
    """Axes with the blocked ones that read them and have one or more times their width: of packed
    attention, mostly.

    Their code may take the width of its input for its own; see `_tie`.
    """
    readers: dict[int, list[int]] = {}
    for a, axis in enumerate(coupling.axes):
        if axis.blocks > 1 and axis.bundles > 1:
            for r in _read_by(coupling, a):
                if axis.size % coupling.axes[r].size == 0:
                    readers.setdefault(r, []).append(a)
    return [(r, *own) for r, own in readers.items()]


def _align(coupling: Coupling, failed: dict[int, str], found: _Found) -> bool:
    """Join the same places of all blocks of the axes that failed; whether there were such."""
    done = False
    for a in failed:
        axis = coupling.axes[a]
        if axis.blocks < 2:
            continue
        lead = axis.classes[_in_places(axis)].view(axis.blocks, -1)
        joined = lead[:1].expand_as(lead)
        found.joined.append((lead.flatten().numpy(), joined.flatten().numpy()))
        done = True
    return done


def _tie(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    failed: dict[int, str],
    found: _Found,
) -> bool:
    """Tie axes that failed to the axis they read, where that saves both; whether it saved any.

    Code that takes the width of its input for its own (a packed attention layer) needs both to
    change alike: as many places go from each block, and from equal parts of what is read.
    """
    reads = {a: _read_by(coupling, a) for a in failed}
    readers: dict[int, list[int]] = {}
    for a in failed:
        if not any(a in reads[other] for other in failed if other not in reads[a]):
            for r in reads[a]:
                readers.setdefault(r, []).append(a)
    everything = [(r, *own) for r, own in readers.items()]
    if len(everything) > 1 and _tie_together(model, inputs, coupling, everything, found):
        return True
    saved = False
    for r, own in readers.items():
        parts = _siblings(coupling, own)
        for group in (own, *(parts if len(parts) > 1 else ())):
            if _tie_together(model, inputs, coupling, [(r, *group)], found):
                saved = True
                if group is own:
                    break
    return saved


def _tie_together(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    groups: Sequence[Sequence[int]],
    found: _Found,
) -> bool:
    """Tie the axes of each group, where the network can be cut so; whether it can."""
    remove: dict[int, Tensor] = {}
    tied: list[list[np.ndarray]] = []
    whole = found.whole(coupling)
    for group in groups:
        axes = [coupling.axes[a] for a in group]
        if any(whole[x.classes.numpy()].any() for x in axes):
            return False  # they have no width that could follow another
        places = min(x.size // x.blocks for x in axes)
        if places < 2 or any(len(x.free) < x.size or not _divides(x, places) for x in axes):
            return False
        tied.append([x.classes[_in_places(x)].view(-1, places).numpy() for x in axes])
        for a, axis, grid in zip(group, axes, tied[-1], strict=True):
            lost = torch.from_numpy(grid[:, places // 2 :]).flatten()
            remove[a] = torch.isin(axis.classes, lost)
    if wiring(model, inputs, coupling, coupling.axes, remove, modes=[False])[0] is not None:
        return False
    for grids in tied:
        found.grids.extend(grids)
        found.ties.extend((int(grids[0][0, 0]), int(g[0, 0])) for g in grids[1:])
    return True


def _divides(axis: Axis, places: int) -> bool:
    """Whether the blocks of an axis can be such that each has so many places."""
    size = axis.size // axis.blocks
    return size == places or (axis.blocks == 1 and size % places == 0)


def _in_places(axis: Axis) -> Tensor:
    """The units of an axis, block by block, in the order of their places."""
    return torch.argsort(axis.block * axis.size + axis.place, stable=True)


def _read_by(coupling: Coupling, a: int) -> set[int]:
    """The other axes that the layers of an axis read."""
    owner = {int(c): i for i, axis in enumerate(coupling.axes) for c in axis.classes[:1]}
    first = coupling.analysis.first
    found = set()
    for slot in coupling.axes[a].having(PRODUCE):
        for dim, start in first.items():
            if dim.parameter == slot.parameter and dim.dim != slot.dim:
                size = coupling.analysis.sizes[dim]
                mine = set(coupling.analysis.classes[start : start + size].tolist())
                found.update(i for c, i in owner.items() if c in mine)
    return found - {a}


def _pin(coupling: Coupling, failed: dict[int, str], found: _Found) -> None:
    for a, reason in failed.items():
        found.pins.append((coupling.axes[a].classes.numpy(), reason))
