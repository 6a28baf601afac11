"""Operations that move elements: they are called on the labels themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .inputs import map_tensors
from .labels import FIXED, SHIFT, Field
from .tracer import Tracer

__all__ = [
    "concatenation",
    "gating",
    "indexing",
    "movement",
    "padding",
    "parting",
    "shuffling",
    "stacking",
]


def movement(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """View, permute, expand, roll, pixel shuffle, ...: call the operation on the labels.

    Where a view lays the channels out in a grid, a cut has to leave a grid.
    """
    x, rest = args[0], args[1:]
    fields = []
    for f in t.of(x):
        moved = _lay_out(func, f, x, rest, kwargs, out)
        fields.append(_noted(t, f, moved, func))
        if func in _VIEWS and _one_head(fields[-1], x, out):
            t.grid(fields[-1].labels)
    t.attach(out, fields)


def _lay_out(
    func: Any, f: Field, x: Tensor, rest: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> Tensor:
    if func in _VIEWS or func in _RESHAPES:
        return _viewed(f.labels, x.shape, out.shape)
    if func in _PERMUTES or (func in _TURNS and rest[-1]):  # whatever the lengths of dimensions
        return func(f.labels, *rest, **kwargs)
    return compact(func(_full(f, x), *rest, **kwargs))


def _viewed(labels: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """The labels of a view, spread only over dimensions that it joins or splits."""
    spread: list[int] = []
    shape: list[int] = []
    torn = False
    if 0 in before:
        return labels.expand(before).reshape(after)
    for here, there in _pieces(before, after):
        if all(labels.shape[d] == 1 for d in here):
            spread.extend([1] * len(here))
            shape.extend([1] * len(there))
            continue
        spread.extend(before[d] for d in here)
        shape.extend(after[d] for d in there)
        torn = torn or sum(before[d] > 1 for d in here) + sum(after[d] > 1 for d in there) > 2
    viewed = labels.expand(spread).reshape(shape)
    return compact(viewed) if torn else viewed


def _pieces(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Dimensions of a tensor and of its view, in the smallest pieces that hold as many elements.

    >>> list(_pieces((2, 197, 768), (394, 12, 64)))
    [(range(0, 2), range(0, 1)), (range(2, 3), range(1, 3))]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        ends = [min(i + 1, len(before)), min(j + 1, len(after))]
        sizes = [math.prod(before[i : ends[0]]), math.prod(after[j : ends[1]])]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                sizes[0] *= before[ends[0]]
                ends[0] += 1
            else:
                sizes[1] *= after[ends[1]]
                ends[1] += 1
        yield range(i, ends[0]), range(j, ends[1])
        i, j = ends


_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
}
_RESHAPES = {
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.squeeze.dims,
}
_PERMUTES = {
    torch.ops.aten.permute.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.t.default,
}
_TURNS = {torch.ops.aten.roll.default, torch.ops.aten.flip.default}  # along these, where given


def _one_head(f: Field | None, before: Tensor, after: Tensor) -> bool:
    """Whether a view splits the channels into lines, of which there is one."""
    if f is None or len(f.dims) != 1 or after.ndim <= before.ndim:
        return False
    return f.dims[0] > 0 and after.shape[f.dims[0] - 1] == 1


def _full(f: Field, x: Tensor) -> Tensor:
    return f.labels.expand(x.shape)


def shuffling(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Channel shuffle: groups of equal size are laid side by side."""
    x, groups = args[:2]
    for f in t.of(x):
        if 1 in f.dims:
            t.grid(f.labels.reshape(-1).reshape(groups, -1))
    movement(t, func, args, kwargs, out)


def _noted(t: Tracer, f: Field, labels: Tensor, func: Any) -> Field | None:
    """The field as it lies now; a new grid of it is noted, a single channel of it is pinned."""
    after = sum(n > 1 for n in labels.shape)
    if not after and f.dims:
        t.pin([f], f"{func._schema.name.removeprefix('aten::')} picks one of its channels")
        return None
    if after > len(f.dims):
        t.grid(labels)
    return Field(labels, f.source)


def compact(labels: Tensor) -> Tensor:
    """Labels with size 1 along every dimension where they do not vary."""
    for d in range(labels.ndim):
        if labels.shape[d] > 1 and labels.stride(d) == 0:
            labels = labels.narrow(d, 0, 1)
    for d in range(labels.ndim):
        if labels.shape[d] > 1:
            first = labels.narrow(d, 0, 1)
            if bool((labels.narrow(d, 1, 1) == first).all()) and bool((labels == first).all()):
                labels = first
    return labels


def parting(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Slice, select, split, unbind: parts of the positions along one dimension.

    Parts of equal size stay of equal size; else the dimension is kept whole.
    """
    x, rest = args[0], args[1:]
    dim = _dimension(func, rest, kwargs, x.ndim)
    outs = [out] if isinstance(out, Tensor) else list(out)
    kept: list[list[Field | None]] = [[] for _ in outs]
    for f in t.of(x):
        if dim in f.dims and not _even(t, f, x, dim, outs, rest):
            f = t.hold(f, [dim], f"{func._schema.name.removeprefix('aten::')} parts its channels")
            if f is None:
                continue
        if dim not in f.dims:  # all parts have the same channels
            labels = f.labels if outs[0].ndim == x.ndim else f.labels.squeeze(dim)
            for fields in kept:
                fields.append(Field(labels, f.source))
            continue
        moved = func(_full(f, x), *rest, **kwargs)
        moved = [moved] if isinstance(moved, Tensor) else moved
        for fields, labels in zip(kept, moved, strict=True):
            fields.append(_noted(t, f, compact(labels), func))
    for o, fields in zip(outs, kept, strict=True):
        t.attach(o, fields)


def _dimension(func: Any, rest: Sequence[Any], kwargs: Mapping[str, Any], ndim: int) -> int:
    place = next(i for i, a in enumerate(func._schema.arguments) if a.name == "dim") - 1
    dim = rest[place] if place < len(rest) else kwargs.get("dim", 0)
    return dim % ndim


def _even(t: Tracer, f: Field, x: Tensor, dim: int, outs: Sequence[Tensor], rest: Any) -> bool:
    """Whether the parts are an even share of the channels, or several of the smallest part.

    The grid they form is noted.
    """
    if any(o.ndim != x.ndim for o in outs):  # one at a time: which one counts, all stay
        return len(f.dims) > 1
    size, length = x.shape[dim], min(o.shape[dim] for o in outs)
    if length == size:
        return True
    if not length or size % length or any(o.shape[dim] % length for o in outs):
        return False
    step = 1
    if len(outs) == 1:
        _, start, _, step = (*rest, *(None,) * 4)[:4]
        start, step = start or 0, step or 1
        if (start % size) % length if step == 1 else step * length != size:
            return False
    shape = list(f.labels.shape)
    if step > 1:
        grid = f.labels.reshape(*shape[:dim], length, step, *shape[dim + 1 :])
        grid = grid.transpose(dim, dim + 1)
    else:
        grid = f.labels.reshape(*shape[:dim], size // length, length, *shape[dim + 1 :])
    t.grid(grid)
    return True


def gating(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """One half of the channels is multiplied with what the other half opens."""
    x = args[0]
    dim = (args[1] if len(args) > 1 else -1) % x.ndim
    fields = []
    for f in t.of(x):
        if dim in f.dims:
            first, second = f.labels.chunk(2, dim)
            t.join(first, second)
            f = Field(first)
        fields.append(f)
    t.attach(out, fields)


def concatenation(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Channels side by side keep their labels; maps side by side join theirs."""
    parts = [x for x in args[0] if x.numel()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    computed = any(f.source is None for x in parts for f in t.of(x))
    for x in parts:
        if computed or len(t.of(x)) == 1:  # parameters such as a class token, not a weight's parts
            for f in t.of(x):
                t.mark(f, SHIFT)
    t.attach(out, [_side_by_side(t, parts, dim), *_one_behind_the_other(t, parts, dim)])


def _side_by_side(t: Tracer, parts: Sequence[Tensor], dim: int) -> Field | None:
    """What varies along the dimension of the concatenation."""
    own = [t.along(x, dim) for x in parts]
    if not any(own):
        return None
    pieces = []
    for x, f in zip(parts, own, strict=True):
        pieces.append(f.labels if f else _fixed(x, dim))
    shape = torch.broadcast_shapes(*(_without(p.shape, dim) for p in pieces))
    wide = [p.expand(*shape[:dim], p.shape[dim], *shape[dim + 1 :]) for p in pieces]
    return Field(torch.cat(wide, dim))


def _fixed(x: Tensor, dim: int) -> Tensor:
    """Labels, along a dimension of `x`, of what belongs to no parameter."""
    return torch.full([n if d == dim else 1 for d, n in enumerate(x.shape)], FIXED)


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [1 if d == dim else n for d, n in enumerate(shape)]


def _one_behind_the_other(t: Tracer, parts: Sequence[Tensor], dim: int) -> list[Field]:
    """What varies along other dimensions only: it is joined, part by part."""
    found: list[Field] = []
    for d in range(parts[0].ndim):
        here = [f for x in parts for f in t.of(x) if dim not in f.dims and d in f.dims]
        if not here or any(d in f.dims for f in found):
            continue
        for other in here[1:]:
            t.join(here[0].labels, other.labels)
        first = max(here, key=lambda f: len(f.dims))
        bare = [x for x in parts if not any(d in f.dims for f in t.of(x)) and not t.fits(x, d)]
        if bare and parts[0].shape[d] > 1:
            held = t.hold(first, [d], "cat with a tensor of fixed size")
            if held is None:
                continue
            first = held
        found.append(Field(first.labels))
    return found


def stacking(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Stack: like cat along a new dimension."""
    parts = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    fields = []
    for d in range(parts[0].ndim):
        own = [t.along(x, d) for x in parts]
        if not any(own) or any(d in f.dims for f in fields):
            continue
        pieces = [f.labels if f else _fixed(x, d) for f, x in zip(own, parts, strict=True)]
        pieces = torch.broadcast_tensors(*pieces)
        fields.append(Field(torch.stack(list(pieces), dim)))
    for f in fields:
        t.grid(f.labels)
    t.attach(out, [Field(compact(f.labels)) for f in fields])


def padding(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """A constant around the elements: it belongs to no channel."""
    x, pad = args[:2]
    fields = []
    for f in t.of(x):
        ends = [0] * len(pad)
        for k in range(len(pad)):  # two numbers a dimension, the last dimension first
            if x.ndim - 1 - k // 2 in f.dims:
                ends[k] = pad[k]
        labels = torch.ops.aten.constant_pad_nd(f.labels, ends, FIXED) if any(ends) else f.labels
        fields.append(Field(labels, f.source))
    t.attach(out, fields)


def indexing(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Index, gather, take along a dimension: by indices that are known, or across channels."""
    x, rest = args[0], args[1:]
    fields = []
    for f in t.of(x):
        if func is torch.ops.aten.index.Tensor and _beside(f, rest[0]):
            moved = func(f.labels, [i if i is None else _nowhere(i) for i in rest[0]])
            fields.append(Field(moved, f.source))
            continue
        try:
            moved = func(_full(f, x), *map_tensors(rest, _known), **kwargs)
        except _UnknownIndex:  # computed in the run: only along positions without labels
            moved = _by_any_index(f, x, func, rest, kwargs)
        if moved is None:
            t.pin([f], f"{func._schema.name.removeprefix('aten::')} by computed indices")
            continue
        fields.append(_noted(t, f, compact(moved), func))
    t.attach(out, fields)


def _beside(f: Field, index: Sequence[Tensor | None]) -> bool:
    """Whether an index picks along dimensions where the labels do not vary."""
    given = {d: i.dtype for d, i in enumerate(index) if i is not None}
    return not set(given) & set(f.dims) and set(given.values()) == {torch.int64}


def _nowhere(index: Tensor) -> Tensor:
    return torch.zeros([1] * index.ndim, dtype=index.dtype)


class _UnknownIndex(Exception):
    pass


def _known(index: Tensor) -> Tensor:
    if index.is_meta:
        raise _UnknownIndex
    return index.cpu()


def _by_any_index(
    f: Field, x: Tensor, func: Any, rest: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The result by some indices, where any others would give the same labels."""
    moved = func(_full(f, x), *map_tensors(rest, _some), **kwargs)
    return moved if len(moved.unique()) == len(f.labels.unique()) else None


def _some(index: Tensor) -> Tensor:
    return torch.full(index.shape, index.dtype == torch.bool, dtype=index.dtype)
