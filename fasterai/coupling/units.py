"""What the labels say: units, the axes they form, and which of them are pinned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from .inputs import Inputs
from .labels import CONSUME, FOLLOW, PRODUCE, SCALE, SHIFT, Dim, Run, dims_of
from .run import run_labels

__all__ = ["Axis", "Coupling", "Slot", "couple"]

_PRECEDENCE = (PRODUCE, CONSUME, SHIFT, SCALE, FOLLOW)


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
        """Name of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Axis:
    """Units over the same parameter dimensions; what is ranked together in 'local'.

    In Conv -> BN -> ReLU -> Conv an axis has the rows of the first conv ('produce'), its bias and
    the norm's shift ('shift'), the norm's scale ('scale') and statistics ('follow'), and the
    columns of the second conv ('consume'); unit k is the k-th position of them all.

    Args:
        name: the module of the first weight that produces it.
        size: number of units.
        slots: where the units live.
        pins: for each unit the reason why it cannot be removed, or None.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    pins: tuple[str | None, ...]

    def having(self, *roles: str) -> tuple[Slot, ...]:
        """The slots of these roles."""
        return tuple(s for s in self.slots if s.role in roles)

    @property
    def producers(self) -> tuple[str, ...]:
        """Names of the modules whose rows produce the channels."""
        return tuple(dict.fromkeys(s.module for s in self.having(PRODUCE)))

    @cached_property
    def free(self) -> Tensor:
        """(F,) the units that are not pinned."""
        return torch.tensor([u for u, pin in enumerate(self.pins) if pin is None], dtype=torch.long)

    def pinned(self, reason: str, units: Sequence[int] | None = None) -> Axis:
        """The same axis with all (or these) units pinned; earlier reasons stay."""
        which = set(range(self.size) if units is None else units)
        pins = (pin or (reason if u in which else None) for u, pin in enumerate(self.pins))
        return Axis(self.name, self.size, self.slots, tuple(pins))


@dataclass(frozen=True, eq=False)
class Coupling:
    """The axes of a network and what its runs said.

    Args:
        axes: in the order in which their first weight is registered.
        outputs: for each output of the network, the last layer that made its channels.
        first: for each dimension, its first label; labels run on from there.
        classes: the class of joined labels of each label.
        pinned: which classes are pinned.
        trains: whether the network also ran in train mode.
    """

    axes: tuple[Axis, ...]
    outputs: tuple[str, ...]
    first: Mapping[Dim, int]
    classes: np.ndarray
    pinned: np.ndarray
    trains: bool

    def classes_of(self, axis: Axis) -> Tensor:
        """(size,) the class of each unit of an axis."""
        found = torch.zeros(axis.size, dtype=torch.long)
        classes = torch.from_numpy(self.classes).long()
        for slot in axis.having(PRODUCE):
            found[slot.unit] = classes[self.first[slot.dimension] + slot.index]
        return found


def couple(model: nn.Module, inputs: Inputs) -> Coupling:
    """Find the units of a network by running it on labels, in eval and in train mode.

    The model is left as it was: buffers, training flags and the random state are put back.

    Args:
        model: any network.
        inputs: what it runs on; see `Inputs.fitting`.
    """
    labels, first = _number(model)
    runs = [run_labels(model, inputs, labels)[0]]
    for sized in (inputs.at_least(2), inputs):  # a norm wants more than one sample in training
        try:
            runs.append(run_labels(model, sized, labels, training=True)[0])
            break
        except Exception:  # a network that only evaluates; what it does in training does not count
            continue
    total = sum(v.numel() for v in labels.values())
    classes = _classes(total, runs)
    reasons = _reasons(classes, runs)
    axes, order = _axes(model, labels, classes, runs, reasons)
    pinned = np.zeros(total, dtype=bool)
    pinned[list(reasons)] = True
    outputs = _outputs(runs, labels, order)
    return Coupling(axes, outputs, first, classes, pinned, trains=len(runs) > 1)


def _number(model: nn.Module) -> tuple[dict[Dim, Tensor], dict[Dim, int]]:
    labels, first, count = {}, {}, 0
    for dim, tensor in dims_of(model).items():
        size = tensor.shape[dim.dim]
        first[dim] = count
        labels[dim] = torch.arange(count, count + size)
        count += size
    return labels, first


def _vector(labels: Tensor) -> np.ndarray:
    return labels.cpu().numpy()


def _classes(total: int, runs: Sequence[Run]) -> np.ndarray:
    """Connected components of the labels under all meetings."""
    pairs = [(_vector(a), _vector(b)) for run in runs for a, b in run.meetings]
    left = np.concatenate([a for a, _ in pairs] or [np.zeros(0, dtype=np.int64)])
    right = np.concatenate([b for _, b in pairs] or [np.zeros(0, dtype=np.int64)])
    real = (left >= 0) & (right >= 0)
    left, right = left[real], right[real]
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(total, total))
    return connected_components(graph, directed=False)[1]


def _reasons(classes: np.ndarray, runs: Sequence[Run]) -> dict[int, str]:
    """Why each pinned class is pinned: the first reason given."""
    reasons: dict[int, str] = {}
    pins = [pin for run in runs for pin in run.pins]
    for run in runs:
        for a, b in run.meetings:
            for mine, other in ((a, b), (b, a)):
                if bool((other < 0).any()):
                    pins.append((mine[other < 0], "joined with a tensor of fixed size"))
    for labels, reason in pins:
        known = _vector(labels)
        for c in np.unique(classes[known[known >= 0]]).tolist():
            reasons.setdefault(c, reason)
    return reasons


def _roles(runs: Sequence[Run]) -> dict[Dim, str]:
    roles: dict[Dim, str] = {}
    for dim, role in sorted(
        {pair for run in runs for pair in run.roles}, key=lambda r: _PRECEDENCE.index(r[1])
    ):
        roles.setdefault(dim, role)
    return roles


def _axes(
    model: nn.Module,
    labels: Mapping[Dim, Tensor],
    classes: np.ndarray,
    runs: Sequence[Run],
    reasons: dict[int, str],
) -> tuple[tuple[Axis, ...], tuple[str, ...]]:
    roles = _roles(runs)
    dims = list(labels)
    where = np.repeat(np.arange(len(dims)), [labels[d].numel() for d in dims])
    produced = np.zeros(classes.max(initial=-1) + 1, dtype=bool)
    consumed = produced.copy()
    for dim in dims:
        if roles.get(dim) == PRODUCE:
            produced[classes[_vector(labels[dim])]] = True
    for run in runs:
        for seen in run.consumed:
            known = _vector(seen)
            consumed[classes[known[known >= 0]]] = True
    for c in np.flatnonzero(produced & ~consumed).tolist():
        reasons.setdefault(c, "no layer was seen to read it")
    axis_of = _group(classes, where, produced, len(dims))
    axes = _collect(dims, roles, labels, classes, axis_of, reasons)
    order = tuple(dict.fromkeys(name for run in runs for name in run.order))
    rank = {name: i for i, name in enumerate(dict(model.named_parameters()))}
    return tuple(sorted(axes, key=lambda a: rank[a.having(PRODUCE)[0].parameter])), order


def _group(classes: np.ndarray, where: np.ndarray, units: np.ndarray, dims: int) -> np.ndarray:
    """The axis of each class: classes in the same dimensions, equally often, share one."""
    codes = np.random.default_rng(0).integers(1, 2**62, size=dims, dtype=np.uint64)
    keys = np.zeros(len(units), dtype=np.uint64)
    np.add.at(keys, classes, codes[where])  # sums of random codes stand for sets of dimensions
    axis_of = np.full(len(units), -1)
    axis_of[units] = np.unique(keys[units], return_inverse=True)[1]
    return axis_of


def _collect(
    dims: Sequence[Dim],
    roles: Mapping[Dim, str],
    labels: Mapping[Dim, Tensor],
    classes: np.ndarray,
    axis_of: np.ndarray,
    reasons: Mapping[int, str],
) -> list[Axis]:
    slots: dict[int, list[Slot]] = {}
    units: dict[int, dict[int, int]] = {}
    ordered = sorted(dims, key=lambda d: roles.get(d) != PRODUCE)  # units count as rows do
    for dim in ordered:
        mine = classes[_vector(labels[dim])]
        for a in np.unique(axis_of[mine]).tolist():
            if a < 0:
                continue
            index = np.flatnonzero(axis_of[mine] == a)
            known = units.setdefault(a, {})
            unit = [known.setdefault(c, len(known)) for c in mine[index].tolist()]
            slots.setdefault(a, []).append(
                Slot(
                    dim.parameter,
                    dim.dim,
                    roles.get(dim, FOLLOW),
                    torch.from_numpy(index),
                    torch.tensor(unit, dtype=torch.long),
                )
            )
    return [
        Axis(own[0].module, len(units[a]), tuple(own), tuple(reasons.get(c) for c in units[a]))
        for a, own in slots.items()
    ]


def _outputs(
    runs: Sequence[Run], labels: Mapping[Dim, Tensor], order: Sequence[str]
) -> tuple[str, ...]:
    """For each output, the layer that ran last of those whose rows it shows."""
    owner = {int(v[0]): d.parameter for d, v in labels.items()}
    starts = np.array(sorted(owner))
    found = []
    for run in runs:
        for seen in run.outputs:
            known = _vector(seen)
            at = np.unique(np.searchsorted(starts, known[known >= 0], side="right")) - 1
            names = [owner[int(starts[i])] for i in at.tolist()]
            made = [order.index(n) for n in names if n in order]
            if made:
                found.append(order[max(made)].rpartition(".")[0])
    return tuple(dict.fromkeys(found))
