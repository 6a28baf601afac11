"""Which widths a dense network gets where only the shapes of the smaller one's tensors are known.

Layers' own widths are the lengths of their tensors. Modules around layers remember widths, too,
and there shapes may leave open what was cut: attention of 12 heads, 64 wide, may have become 6
heads or heads 32 wide. What is open is named, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..core.names import first_names, modules_by_name, tensors_by_name
from ..coupling.mending import around, integers_in, layer_integers
from ..coupling.norms import by_root_mean_square, remembered

__all__ = ["attributes_by_shape"]

Shape = tuple[int, ...]
Change = tuple[Shape, Shape]  # the shape of a tensor before and after


_OF_A_HEAD = re.compile(r"head_(dim|size|width|chan)|(dim|size|width|^d)_(per_)?head")


class _Open(Exception):
    """What shapes leave open about a module."""


def attributes_by_shape(
    network: nn.Module, shapes: Mapping[str, Shape]
) -> dict[nn.Module, dict[str, Any]]:
    """The integers that modules around the layers get; those of the layers follow their tensors.

    Args:
        network: the dense network.
        shapes: parameter or buffer name -> its new shape, under one of its names.

    Raises:
        ValueError: what some modules become cannot be told; they are named.
    """
    tensors = tensors_by_name(network)
    new = {id(tensors[name]): shape for name, shape in shapes.items()}
    changes = {n: (tuple(x.shape), new.get(id(x), tuple(x.shape))) for n, x in tensors.items()}
    below: dict[str, list[Change]] = {}
    for name, change in changes.items():
        for module in around(name):
            below.setdefault(module, []).append(change)
    modules = modules_by_name(network)
    found: dict[nn.Module, dict[str, Any]] = {}
    unsure = []
    for name in first_names(modules).values():
        if not any(a != b for a, b in below.get(name, ())):
            continue
        own = {n: changes[f"{name}.{n}" if name else n] for n in _own_tensors(modules[name])}
        try:
            _must_be_plain(modules[name], own)
            found[modules[name]] = dict(_renewed(modules[name], below[name]))
        except _Open as reason:
            unsure.append(f"{name or 'the model'!r} ({reason})")
    if unsure:
        more = f" and {len(unsure) - 3} more" if len(unsure) > 3 else ""
        raise ValueError(
            f"shapes do not tell what became of {', '.join(unsure[:3])}{more}: save the model "
            f"with its plan, as in save_pruned(model, file, pruner.whole_plan)"
        )
    return found


def _own_tensors(module: nn.Module) -> list[str]:
    own = [*module._parameters.items(), *module._buffers.items()]
    return [name for name, tensor in own if tensor is not None]


def _must_be_plain(module: nn.Module, own: Mapping[str, Change]) -> None:
    """Refuse layers of which shapes do not tell all."""
    if all(a == b for a, b in own.values()):
        return
    if remembered(module) is not None or by_root_mean_square(module):
        raise _Open("it may remember its width")
    for kind, doubt in _DOUBTS:
        if isinstance(module, kind):
            reason = doubt(module, own)
            if reason:
                raise _Open(reason)


def _conv(conv: Any, own: Mapping[str, Change]) -> str | None:
    old, new = own.get("weight", ((), ()))
    if old[2:] != new[2:]:
        return "its kernel changes"
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return None if conv.groups == 1 or depthwise else "its groups may be fewer or narrower"


def _group_norm(norm: nn.GroupNorm, own: Mapping[str, Change]) -> str | None:
    certain = norm.num_groups in (1, norm.num_channels)
    return None if certain else "its groups may be fewer or narrower"


def _layer_norm(norm: nn.LayerNorm, own: Mapping[str, Change]) -> str | None:
    return None if len(norm.normalized_shape) == 1 else "it normalises several dimensions"


def _embedding(table: nn.Embedding, own: Mapping[str, Change]) -> str | None:
    old, new = own["weight"]
    return None if old[0] == new[0] else "its number of entries changes"


def _recurrent(rnn: nn.RNNBase, own: Mapping[str, Change]) -> str | None:
    return "its projection and its width may both have changed" if rnn.proj_size else None


_Doubt = Callable[[Any, Mapping[str, Change]], str | None]
_DOUBTS: tuple[tuple[Any, _Doubt], ...] = (
    (nn.modules.conv._ConvNd, _conv),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.Embedding, _embedding),
    (nn.RNNBase, _recurrent),
)


def _renewed(module: nn.Module, below: Sequence[Change]) -> Iterator[tuple[str, Any]]:
    """The integers of a module that must change, where that is certain."""
    sizes: dict[int, set[int]] = {}
    for change in below:
        for old, new in zip(*change, strict=True):
            sizes.setdefault(old, set()).add(new)
    for name in module._non_persistent_buffers_set:
        buffer = module._buffers.get(name)
        if buffer is not None and any(sizes.get(n, {n}) != {n} for n in buffer.shape):
            raise _Open(f"its {name} is in no file")
    own = layer_integers(module)
    counts = {v for v in vars(module).values() if type(v) is int and v > 1}
    for attribute, value, number in integers_in(module):
        if attribute in own:
            continue
        if number or _OF_A_HEAD.search(attribute):
            raise _Open("its heads may be fewer or narrower")
        several = isinstance(value, list | tuple)
        new = [_size(attribute, v, sizes, counts) for v in (value if several else [value])]
        if several and new != list(value):
            yield attribute, type(value)(new)
        elif not several and new != [value]:
            yield attribute, new[0]


def _size(attribute: str, value: int, sizes: Mapping[int, set[int]], counts: Iterable[int]) -> int:
    """What a width becomes: what all lengths that were equal to it became."""
    new = sizes.get(value)
    if new is not None:
        if len(new) > 1:
            raise _Open(f"its {attribute}, {value}, may be {' or '.join(map(str, sorted(new)))}")
        return next(iter(new))
    if any(value > 1 and sizes.get(value * n, {value * n}) != {value * n} for n in counts):
        raise _Open(f"its {attribute}, {value}, is one side of a split")
    return value
