"""Integers with which modules remember the sizes of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .analysis import Analysis
from .labels import CONSUME, PRODUCE, Dim

__all__ = [
    "Mend",
    "Size",
    "agrees",
    "around",
    "integers_in",
    "layer_integers",
    "mends",
    "shared_sizes",
    "sizes_in",
]

Size = int | tuple[int, ...]
Mend = tuple[nn.Module, str, Any]  # a module, an attribute of it, its new value

# Modules around a layer, like attention, remember widths in attributes with such names.
_NUMBER = re.compile(r"heads?$|^n_?heads?|nhead")
_WIDTH = re.compile(r"dim|size|width|chan|chs|feat|hidden|embed|inner|planes|^nf$|n_hid|d_model")
_OTHER = re.compile(r"window|patch|kernel|img|image|grid|pool|stride|vocab|max_|batch|num_emb")
_AROUND = 2  # levels of modules around a layer that may remember its width


def mends(
    model: nn.Module,
    analysis: Analysis,
    gone: np.ndarray,
    kept: Mapping[Dim, Any],
    *,
    exact: bool = False,
) -> list[Mend]:
    """The integers to change in the modules around the layers that are cut.

    An attribute follows where its name tells that it is a width or a number of heads, and its
    value is one that changes there; so does the shape of a norm without weights, where it stands
    beside such layers. Replay tells whether that was right.

    Args:
        model: the network, before or while it is cut.
        analysis: what its labels say.
        gone: (labels,) bool, the classes that are removed.
        kept: the positions that stay of each dimension that is cut.
        exact: norms without weights keep their width, for they cannot remember it.
    """
    modules = dict(model.named_modules())
    made = [dim for dim, role in analysis.roles.items() if role == PRODUCE and dim not in kept]
    stay = {(dim.parameter.rpartition(".")[0], analysis.sizes[dim]) for dim in made}
    rows: dict[str, dict[int, set[int]]] = {}  # how wide layers are
    reads: dict[str, dict[int, set[int]]] = {}  # how wide what they read is
    sizes: dict[str, dict[int, set[int]]] = {}  # how long the lines of grids are
    numbers: dict[str, dict[int, set[int]]] = {}  # how many
    for dim, index in kept.items():
        old = analysis.sizes[dim]
        if analysis.roles.get(dim) == PRODUCE and old != len(index):
            for name in around(dim.parameter):
                rows.setdefault(name, {}).setdefault(old, set()).add(len(index))
        elif analysis.roles.get(dim) == CONSUME and old != len(index):
            owner = dim.parameter.rpartition(".")[0]
            if (owner, old) not in stay:  # else the integer is as wide as what it makes
                reads.setdefault(owner, {}).setdefault(old, set()).add(len(index))
    for grid, makers in zip(analysis.grids, analysis.makers, strict=True):
        changes = _shrunk(grid, gone)
        if not changes:
            continue
        for name in {m for p in makers for m in around(p)}:
            for d, (old, new) in changes.items():
                if d < grid.ndim - 1:
                    numbers.setdefault(name, {}).setdefault(old, set()).add(new)
            for old, new in _widths(grid.shape, changes):
                sizes.setdefault(name, {}).setdefault(old, set()).add(new)
    found = []
    for name in rows.keys() | reads.keys() | sizes.keys() | numbers.keys():
        for attribute, value, number in integers_in(modules[name]):
            widths = {**reads.get(name, {}), **rows.get(name, {}), **sizes.get(name, {})}
            new = _renewed(value, numbers.get(name, {}) if number else widths)
            if new != value:
                found.append((modules[name], attribute, new))
    return found if exact else [*found, *_bare_norms(modules, rows)]


def _bare_norms(
    modules: Mapping[str, nn.Module], rows: Mapping[str, Mapping[int, set[int]]]
) -> Iterator[Mend]:
    """The shapes of norms without weights, as the layers of the nearest module around change."""
    for name, norm in modules.items():
        if not isinstance(norm, nn.LayerNorm | nn.RMSNorm) or norm.weight is not None:
            continue
        parts = name.split(".")
        for scope in (".".join(parts[:k]) for k in reversed(range(len(parts)))):
            new = _renewed(norm.normalized_shape, rows.get(scope, {}))
            if new != norm.normalized_shape:
                yield norm, "normalized_shape", new
                break


def shared_sizes(model: nn.Module, analysis: Analysis) -> list[tuple[int, int]]:
    """Pairs of classes whose blocks share an integer of a module, such as the width of a head."""
    modules = dict(model.named_modules())
    first: dict[tuple[str, str], int] = {}
    pinned = np.zeros(len(analysis.classes), dtype=bool)
    pinned[list(analysis.pinned)] = True
    pairs = []
    for grid, makers in zip(analysis.grids, analysis.makers, strict=True):
        if (grid < 0).any() or pinned[grid].all():  # what keeps its size ties nothing
            continue
        c = int(grid.flat[0])
        for name in {m for p in makers for m in around(p)}:
            for attribute, value, number in integers_in(modules[name]):
                if not number and value == grid.shape[-1]:
                    pairs.append((first.setdefault((name, attribute), c), c))
    return pairs


def sizes_in(module: nn.Module) -> dict[str, Size]:
    """The integers of a module that follow a cut, and no other of its attributes."""
    found = {name: value for name, value, _ in integers_in(module)}
    own = vars(module)
    if isinstance(module, tuple(_LAYERS)):
        found |= {name: own[name] for name in _BY_OTHER_NAMES if name in own}
    return {n: tuple(v) if isinstance(v, list | tuple) else v for n, v in found.items()}


def around(parameter: str) -> list[str]:
    """The module of a parameter and those around it that may remember its widths."""
    parts = parameter.split(".")[:-1]
    return [".".join(parts[: len(parts) - k]) for k in range(min(_AROUND, len(parts)) + 1)]


def integers_in(module: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """Attributes that may hold a width, or (True) a number of heads."""
    for name, value in vars(module).items():
        plain = isinstance(value, int) and not isinstance(value, bool)
        several = isinstance(value, list | tuple) and all(type(v) is int for v in value) and value
        if name.startswith("_") or not (plain or several):
            continue
        if _NUMBER.search(name):
            yield name, value, True
        elif _WIDTH.search(name) and not _OTHER.search(name):
            yield name, value, False


def _renewed(value: Any, changes: Mapping[int, set[int]]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_renewed(v, changes) for v in value)
    new = changes.get(value, set())
    return next(iter(new)) if len(new) == 1 else value


def _shrunk(grid: np.ndarray, gone: np.ndarray) -> dict[int, tuple[int, int]]:
    """How long a grid is along the dimensions that shrink: {dimension: (before, after)}."""
    lost = gone[grid] & (grid >= 0)
    if not lost.any():
        return {}
    changes: dict[int, tuple[int, int]] = {}
    for d in range(grid.ndim):
        whole = lost.all(axis=tuple(k for k in range(grid.ndim) if k != d))
        if whole.any() and not whole.all():
            changes[d] = (grid.shape[d], int((~whole).sum()))
            lost = np.compress(~whole, lost, axis=d)
    if lost.any():
        stay = (~lost).sum(axis=-1)
        if (stay == stay.flat[0]).all():
            changes[grid.ndim - 1] = (grid.shape[-1], int(stay.flat[0]))
    return changes


def _widths(
    shape: Sequence[int], changes: Mapping[int, tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """How wide lines of a grid, and lines of lines, are before and after."""
    before = after = 1
    for d in reversed(range(len(shape))):
        old, new = changes.get(d, (shape[d], shape[d]))
        before, after = before * old, after * new
        if before != after:
            yield before, after


# --- layers that are known ---------------------------------------------------------------------


def layer_integers(module: nn.Module) -> dict[str, Any]:
    """What a layer's integers must be, read from its tensors."""
    known = next((f for kind, f in _LAYERS.items() if isinstance(module, kind)), None)
    if known is None:
        return {}
    with _at_rest(module):
        return known(module)


def agrees(module: nn.Module) -> bool:
    """Whether a layer's tensors and integers fit together; True for what is no layer."""
    sizes, own = layer_integers(module), vars(module)
    out = next((sizes[name] for name in _OUT if name in sizes), None)
    with _at_rest(module):
        found = [getattr(module, name, None) for name in _VECTORS if out is not None]
    return all(own.get(name, value) == value for name, value in sizes.items()) and all(
        len(x) == out for x in found if isinstance(x, Tensor) and x.ndim == 1
    )


@contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """Weights are computed without the steps that spectral norms take in training."""
    made = module._modules.get("parametrizations")
    moving = [] if made is None else [m for m in made.modules() if m.training]
    try:
        for m in moving:
            m.training = False
        with torch.no_grad():
            yield
    finally:
        for m in moving:
            m.training = True


def _conv(conv: Any) -> dict[str, int]:
    """`groups` follows the channels where a group reads or makes one; else it stays."""
    rows, columns = conv.weight.shape[:2]
    wide, each = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    if conv.transposed:
        groups = rows // wide if conv.groups > 1 else 1
        return {"in_channels": rows, "out_channels": columns * groups, "groups": groups}
    follows = conv.groups > 1 and (wide == 1 or each == 1)
    groups = rows // each if follows else conv.groups
    return {"in_channels": columns * groups, "out_channels": rows, "groups": groups}


def _linear(linear: nn.Linear) -> dict[str, int]:
    return {"in_features": linear.weight.shape[1], "out_features": linear.weight.shape[0]}


def _bilinear(layer: nn.Bilinear) -> dict[str, int]:
    out, first, second = layer.weight.shape
    return {"in1_features": first, "in2_features": second, "out_features": out}


def _norm(norm: Any) -> dict[str, int]:
    known = norm.weight if norm.weight is not None else norm.running_mean
    return {} if known is None else {"num_features": known.numel()}


def _layer_norm(norm: Any) -> dict[str, Any]:
    return {} if norm.weight is None else {"normalized_shape": tuple(norm.weight.shape)}


def _group_norm(norm: nn.GroupNorm) -> dict[str, int]:
    if norm.weight is None:
        return {}
    channels = norm.weight.numel()
    apart = norm.num_groups == norm.num_channels  # each channel on its own
    return {"num_channels": channels, "num_groups": channels if apart else norm.num_groups}


def _prelu(prelu: nn.PReLU) -> dict[str, int]:
    return {"num_parameters": prelu.weight.numel()}


def _embedding(table: nn.Embedding) -> dict[str, int]:
    rows, columns = table.weight.shape
    return {"num_embeddings": rows, "embedding_dim": columns}


def _recurrent(rnn: nn.RNNBase) -> dict[str, int]:
    own = dict(rnn.named_parameters(recurse=False))
    reads, hidden = own.get("weight_ih_l0"), own.get("weight_hh_l0")
    if reads is None or hidden is None:
        return {}
    sizes = {"input_size": reads.shape[1], "hidden_size": hidden.shape[1]}
    projection = own.get("weight_hr_l0")
    if projection is not None:  # what comes back is narrower than the cell
        sizes |= {"hidden_size": projection.shape[1], "proj_size": projection.shape[0]}
    return sizes


_BY_OTHER_NAMES = ("groups", "num_groups", "normalized_shape", "num_parameters")
_OUT = ("out_channels", "out_features", "num_features", "num_channels")
_VECTORS = ("weight", "bias", "running_mean", "running_var")

_LAYERS: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    nn.modules.conv._ConvNd: _conv,
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    nn.modules.batchnorm._BatchNorm: _norm,
    nn.modules.instancenorm._InstanceNorm: _norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
    nn.RNNBase: _recurrent,
}
