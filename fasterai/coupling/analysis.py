"""What the labels of a network say, once all that meet have become one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from ..core.names import first_names, layer_of, raw_tensors
from .inputs import Inputs
from .labels import CONSUME, FOLLOW, NORMALISED, PRODUCE, SCALE, SHIFT, Dim, Factor, Run, dims_of
from .run import run_labels

__all__ = ["Analysis", "analyse"]

_PRECEDENCE = (PRODUCE, CONSUME, SHIFT, SCALE, FOLLOW)
_ROUNDS = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class Analysis:
    """Classes of joined labels, and what is known about them.

    Args:
        first: for each dimension, its first label; labels run on from there.
        sizes: for each dimension, how many there are.
        classes: (labels,) the class of each label, named by one of its labels.
        pinned: for pinned classes, why.
        mixed: for classes that an operation mixes, which; norms where nothing else does.
        grids: classes laid out in two or more dimensions, one for each grid of channels.
        heads: classes of the channels of attention heads, (heads, width) each.
        factors: for the first, second, ... multiplication with a number in eval mode, what was
            multiplied, labelled by classes.
        read: classes that a layer was seen to read.
        roles: what each dimension of a parameter does.
        order: parameters in the order in which they made channels.
        outputs: for each output of the network, the last layer that made its channels.
        idle: parameters of layers that no run has read, of two or more dimensions.
        untrained: why the network did not run in train mode, if it did not.
        trains: whether the network also ran in train mode, and carried out other operations there
            than in eval mode, dropout aside.
        shapes: whether it ran on shapes alone.
    """

    first: Mapping[Dim, int]
    sizes: Mapping[Dim, int]
    classes: np.ndarray
    pinned: Mapping[int, str]
    mixed: Mapping[int, str]
    grids: tuple[np.ndarray, ...]
    heads: tuple[np.ndarray, ...]
    factors: Mapping[int, Factor]
    read: np.ndarray
    roles: Mapping[Dim, str]
    order: tuple[str, ...]
    outputs: tuple[str, ...]
    idle: tuple[str, ...]
    untrained: str
    trains: bool
    shapes: bool

    def own(self, dim: Dim) -> np.ndarray:
        """The classes of the positions along a dimension."""
        return self.classes[self.first[dim] : self.first[dim] + self.sizes[dim]]

    @cached_property
    def makers(self) -> tuple[frozenset[str], ...]:
        """For each grid the parameters that produce its channels."""
        made = [dim for dim, role in self.roles.items() if role == PRODUCE]
        owner = np.repeat(np.arange(len(made)), [self.sizes[dim] for dim in made])
        shown = np.concatenate([np.zeros(0, dtype=np.int64), *(self.own(dim) for dim in made)])
        found = []
        for grid in self.grids:
            inside = np.zeros(len(self.classes) + 1, dtype=bool)  # the last one for FIXED
            inside[grid] = True
            names = {made[i].parameter for i in np.unique(owner[inside[shown]]).tolist()}
            found.append(frozenset(names))
        return tuple(found)


def analyse(
    model: nn.Module,
    inputs: Inputs,
    joined: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    heads: Sequence[np.ndarray] = (),
) -> Analysis:
    """Run a network on labels, in eval and in train mode, until no more labels join.

    One round does, unless views split channels into grids: labels of a grid that became one
    there let it appear as what it is, the heads of an attention layer, say.

    Args:
        model: any network; it is left as it was.
        inputs: what it runs on.
        joined: labels that belong together for another reason.
        heads: (heads, width) labels of heads that go as a whole.
    """
    first, total = _number(model)
    whole = [(h.ravel(), h[:, :1].repeat(h.shape[1])) for h in heads]
    begin = _classes(np.arange(total), [], [*joined, *whole])
    rounds = _rounds(model, inputs, first, begin)
    runs = [rounds.evaluated[-1], *rounds.trained]
    newest = [rounds.evaluated[0], *rounds.trained]
    order = tuple(dict.fromkeys(name for run in newest for name in run.order))
    laid_out = [*_grids(rounds.classes, runs), *(rounds.classes[h] for h in heads)]
    grids = {(g.shape, g.tobytes()): g for g in laid_out}
    touched = {name for run in runs for name in run.touched}
    roles = _roles(runs)
    sizes = {dim: tensor.shape[dim.dim] for dim, tensor in dims_of(model).items()}
    unread = _unread_vectors(model, roles, sizes, touched)
    spans = [(first[d] + np.arange(n), first[like] + np.arange(n)) for d, like, n in unread]
    classes = _classes(rounds.classes, [], spans)
    roles.update((d, FOLLOW) for d, _, _ in unread)
    idle = [n for n, p in model.named_parameters() if n not in touched and p.ndim > 1]
    mixed = sorted(_mixed(runs), key=lambda note: note[1] == NORMALISED)
    own_heads = (np.unique(classes[h.numpy()], axis=0) for run in runs for h in run.heads)
    way = _way(rounds.evaluated[-1])
    return Analysis(
        first=first,
        sizes=sizes,
        classes=classes,
        pinned=_pinned(classes, runs),
        mixed=_noted(classes, mixed),
        grids=tuple(grids.values()),
        heads=tuple(own_heads),
        factors={i: _renamed(classes, factor) for i, factor in runs[0].factors.items()},
        read=_read(classes, runs),
        roles=roles,
        order=order,
        outputs=_outputs(newest, first, order),
        idle=tuple(idle),
        untrained=rounds.untrained,
        trains=any(_way(run) != way or not run.trail for run in rounds.trained),
        shapes=rounds.shapes,
    )


class _Rounds(NamedTuple):
    """What runs in eval and in train mode said, and the classes that their labels fell into."""

    evaluated: list[Run]
    trained: list[Run]
    classes: np.ndarray
    untrained: str
    shapes: bool


def _rounds(
    model: nn.Module, inputs: Inputs, first: Mapping[Dim, int], classes: np.ndarray
) -> _Rounds:
    """Run until no more labels join."""
    evaluated: list[Run] = []
    trained: list[Run] = []
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    untrained, shapes = "", not recurrent  # they refuse an input that lies where no weights do
    for _ in range(_ROUNDS):
        for _ in range(_ROUNDS):
            run, shapes = _evaluate(model, inputs, _labels(model, first, classes), shapes)
            evaluated.append(run)
            before, classes = classes, _classes(classes, [run], ())
            if not run.grids or np.array_equal(before, classes):
                break
        labels = _labels(model, first, classes)
        trained, untrained = _train(model, inputs, labels, shapes)
        before, classes = classes, _classes(classes, trained, ())
        if not any(run.grids for run in trained) or np.array_equal(before, classes):
            break
    return _Rounds(evaluated, trained, classes, untrained, shapes)


def _evaluate(
    model: nn.Module, inputs: Inputs, labels: Mapping[Dim, Tensor], shapes: bool
) -> tuple[Run, bool]:
    """A run in eval mode, and whether shapes were enough for it.

    At least two samples show what is a batch and what is a single head.
    """
    inputs = inputs.at_least(2)
    if shapes:
        try:
            return run_labels(model, inputs, labels), True
        except Exception:  # whatever a network may raise that looks for numbers
            if any(p.is_meta for p in model.parameters()):
                raise
    return run_labels(model, inputs, labels, shapes=False), False


def _train(
    model: nn.Module, inputs: Inputs, labels: Mapping[Dim, Tensor], shapes: bool
) -> tuple[list[Run], str]:
    """A run in train mode, if there is one, and else why not."""
    why = ""
    for sized in (inputs.at_least(2), inputs):  # a norm wants more than one sample in training
        try:
            return [run_labels(model, sized, labels, training=True, shapes=shapes)], ""
        except Exception as error:  # a network that only evaluates
            why = f"{type(error).__name__}: {error}"
    return [], why


def _unread_vectors(
    model: nn.Module,
    roles: Mapping[Dim, str],
    sizes: Mapping[Dim, int],
    touched: Collection[str],
) -> list[tuple[Dim, Dim, int]]:
    """Biases and the like that are never read, though their layer's weight is, and its rows.

    They follow these, so that the layer stays one.
    """
    names = first_names(raw_tensors(model))
    found = []
    for module in model.modules():
        if not isinstance(module, _WITH_ROWS):
            continue
        own = {
            k: x
            for k, x in (*module._parameters.items(), *module._buffers.items())
            if k in _VECTORS
        }
        known = {k: names[id(x)] for k, x in own.items() if id(x) in names}
        rows = [
            Dim(n, int(k == "weight" and getattr(module, "transposed", False)))
            for k, n in known.items()
        ]
        like = next((d for d in rows if d in roles), None)
        for key, name in known.items():
            x, dim = own[key], Dim(name, 0)
            if like is None or name in touched or x.ndim != 1 or dim not in sizes:
                continue
            if len(x) == sizes.get(like):
                found.append((dim, like, len(x)))
    return found


_VECTORS = "weight", "bias", "running_mean", "running_var"
_WITH_ROWS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def _way(run: Run) -> str:
    """What a run did on shapes; that something drops out, by a random mask, does not count."""
    names = " ".join(func._schema.name.removeprefix("aten::") for func in run.trail)
    return re.sub("empty_like bernoulli_ div_ mul ?", "", names)


def _number(model: nn.Module) -> tuple[dict[Dim, int], int]:
    first, count = {}, 0
    for dim, tensor in dims_of(model).items():
        first[dim] = count
        count += tensor.shape[dim.dim]
    return first, count


def _labels(model: nn.Module, first: Mapping[Dim, int], classes: np.ndarray) -> dict[Dim, Tensor]:
    known = torch.from_numpy(classes)
    return {
        dim: known[first[dim] : first[dim] + tensor.shape[dim.dim]]
        for dim, tensor in dims_of(model).items()
    }


def _classes(
    known: np.ndarray, runs: Sequence[Run], joined: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Connected components of the labels under all meetings, each named by its first label."""
    pairs = [(a.numpy(), b.numpy()) for run in runs for a, b in run.meetings]
    pairs += list(joined)
    total = len(known)
    left, right = (
        np.concatenate([np.zeros(0, dtype=np.int64), *side])
        for side in ([a for a, _ in pairs], [b for _, b in pairs])
    )
    new = (left >= 0) & (right >= 0) & (left != right)
    if not new.any():
        return known
    moved = np.flatnonzero(known != np.arange(total))
    left = np.concatenate([moved, left[new]])
    right = np.concatenate([known[moved], right[new]])
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(total, total))
    found = connected_components(graph, directed=False)[1]
    name = np.full(found.max(initial=-1) + 1, total, dtype=np.int64)
    np.minimum.at(name, found, np.arange(total))
    return name[found]


def _pinned(classes: np.ndarray, runs: Sequence[Run]) -> dict[int, str]:
    pins = [pin for run in runs for pin in run.pins]
    met = [pair for run in runs for a, b in run.meetings for pair in ((a, b), (b, a))]
    if met:
        mine, other = map(torch.cat, zip(*met, strict=True))
        pins.append((mine[other < 0], "joined with a tensor of fixed size"))
    return _noted(classes, pins)


def _mixed(runs: Sequence[Run]) -> list[tuple[Tensor, str]]:
    return [note for run in runs for note in run.mixed]


def _noted(classes: np.ndarray, notes: Sequence[tuple[Tensor, str]]) -> dict[int, str]:
    """The first reason given for each class."""
    if not notes:
        return {}
    labels = np.concatenate([labels.numpy() for labels, _ in notes])
    note = np.repeat(np.arange(len(notes)), [len(labels) for labels, _ in notes])
    real = labels >= 0
    noted, at = np.unique(classes[labels[real]], return_index=True)
    which = note[real][at].tolist()
    return {c: notes[i][1] for c, i in zip(noted.tolist(), which, strict=True)}


def _grids(classes: np.ndarray, runs: Sequence[Run]) -> list[np.ndarray]:
    found = []
    for run in runs:
        for grid in run.grids:
            known = grid.numpy()
            found.append(np.where(known >= 0, classes[known], -1))
    return found


def _renamed(classes: np.ndarray, factor: Factor) -> Factor:
    over = factor.over.numpy()
    return replace(factor, over=torch.from_numpy(np.unique(classes[over[over >= 0]])))


def _read(classes: np.ndarray, runs: Sequence[Run]) -> np.ndarray:
    read = np.zeros(len(classes), dtype=bool)
    for run in runs:
        for seen in run.consumed:
            known = seen.numpy()
            read[classes[known[known >= 0]]] = True
    return read


def _roles(runs: Sequence[Run]) -> dict[Dim, str]:
    roles: dict[Dim, str] = {}
    for dim, role in sorted(
        {pair for run in runs for pair in run.roles}, key=lambda r: _PRECEDENCE.index(r[1])
    ):
        roles.setdefault(dim, role)
    return roles


def _outputs(
    runs: Sequence[Run],
    first: Mapping[Dim, int],
    order: Sequence[str],
) -> tuple[str, ...]:
    """For each output, the layer that ran last of those whose rows it shows."""
    owner = {start: d.parameter for d, start in first.items()}
    starts = np.array(sorted(owner))
    found = []
    for run in runs:
        for seen in run.outputs:
            known = seen.numpy()
            at = np.unique(np.searchsorted(starts, known[known >= 0], side="right")) - 1
            names = [owner[int(starts[i])] for i in at.tolist()]
            made = [order.index(n) for n in names if n in order]
            if made:
                found.append(layer_of(order[max(made)]))
    return tuple(dict.fromkeys(found))
