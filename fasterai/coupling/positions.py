"""Operations over positions: pooling, resizing, reductions, softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .inputs import operands_in
from .labels import Field
from .tracer import Tracer

__all__ = ["columns_of", "over_dims", "passes", "reduction", "sampling", "softmax", "spatial"]


def passes(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """The result follows the first argument along the dimensions where it has its size."""
    x, result = args[0], out if isinstance(out, Tensor) else out[0]
    same = [d for d in range(x.ndim) if x.ndim == result.ndim and x.shape[d] == result.shape[d]]
    t.attach(result, [f for f in t.of(x) if set(f.dims) <= set(same)])


def spatial(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Pooling, resizing and padding: the last dimensions are positions."""
    name = func._schema.name.removeprefix("aten::")
    x, result = args[0], out if isinstance(out, Tensor) else out[0]
    positions = 1 if "1d" in name else 3 if "3d" in name else 2
    fields = []
    for f in t.of(x):
        moved = [d for d in f.dims if d >= x.ndim - positions]
        fields.append(t.hold(f, moved, f"{name} over channels") if moved else f)
    t.attach(result, fields)


def sampling(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Samples of a map at given places: channels pass, places stay."""
    name = func._schema.name.partition("::")[2]
    for x in operands_in(args[1:]):
        t.pin(t.of(x), f"places of {name}")
    fields = []
    for f in t.of(args[0]):
        moved = [d for d in f.dims if d != 1]
        fields.append(t.hold(f, moved, f"{name} over channels") if moved else f)
    t.attach(out if isinstance(out, Tensor) else out[0], fields)


def columns_of(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """im2col and col2im: the places of a kernel beside each other in the channel dimension."""
    x, unfold = args[0], "im2col" in func._schema.name
    kernel = args[1] if unfold else args[2]
    places = kernel[0] * kernel[1]
    fields = []
    for f in t.of(x):
        held = t.hold(f, [d for d in f.dims if d != 1], "unfolded over channels")
        if held is None or 1 not in held.dims:
            continue
        labels = held.labels.reshape(-1)
        if unfold:
            labels = labels.repeat_interleave(places)
        else:
            grid = labels.reshape(-1, places)
            t.join(grid, grid[:, :1])
            labels = grid[:, 0]
        fields.append(Field(labels.reshape(1, -1, *[1] * (out.ndim - 2))))
    t.attach(out, fields)


def reduction(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Mean, max, ... over positions pass the channels; over channels they mix them.

    Sums and norms of activations do not: zeros add nothing to them. What keeps its dimension is a
    statistic of each line, of each head say, and lines stay; else it is a channel made of a line.
    """
    name = func._schema.name.removeprefix("aten::")
    x, results = args[0], [out] if isinstance(out, Tensor) else list(out)
    gone = _reduced(func, args, kwargs, x.ndim)
    fields = []
    for f in t.of(x):
        kept = [d for d in f.dims if d not in gone]
        inside = [d for d in f.dims if d in gone]
        of_lines = kept and inside and results[0].ndim == x.ndim and min(inside) > max(kept)
        if not kept or of_lines:
            t.consume(x, f, summed=True)
            if of_lines:
                t.grid(f.labels)
            if name != "sum" and (f.source is not None or not _a_norm(name, args)):
                t.mix(f, f"{name} over channels")
            continue
        f = t.merge(f, [d for d in f.dims if d in gone])
        if results[0].ndim != x.ndim:
            f = Field(f.labels.squeeze(tuple(gone)), f.source)
        fields.append(f)
    for result in results:
        t.attach(result, fields if result.is_floating_point() or result.dtype == torch.bool else [])


def _a_norm(name: str, args: Any) -> bool:
    """Whether it is a norm to which zeros add nothing."""
    order = args[1] if len(args) > 1 else 2
    return "norm" in name and (order is None or float(order) >= 0)


def _reduced(func: Any, args: Any, kwargs: Any, ndim: int) -> set[int]:
    """The dimensions that an operation runs over."""
    names = [a.name for a in func._schema.arguments]
    place = next((i for i, n in enumerate(names) if n in ("dim", "dims")), None)
    dims = None
    if place is not None:
        dims = args[place] if place < len(args) else kwargs.get(names[place])
        if dims is None and func._schema.arguments[place].default_value is not None:
            dims = func._schema.arguments[place].default_value
    if isinstance(dims, int):
        dims = [dims]
    return {d % max(ndim, 1) for d in dims} if dims else set(range(ndim))


def softmax(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Softmax: what varies along its dimension is mixed; lines along it stay whole."""
    x, dim = args[0], args[1] % max(args[0].ndim, 1)
    fields = []
    for f in t.of(x):
        if f.dims == (dim,):
            t.mix(f, "softmax over channels")
        elif dim in f.dims:
            f = t.merge(f, [dim])
        fields.append(f)
    t.attach(out, fields)


def over_dims(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Sorting, accumulating, Fourier transforms: only the other dimensions pass."""
    x, results = args[0], operands_in((out,))
    over = _reduced(func, args, kwargs, x.ndim)
    fields = []
    for f in t.of(x):
        inside = [d for d in f.dims if d in over]
        reason = f"{func._schema.name.removeprefix('aten::')} over channels"
        fields.append(t.hold(f, inside, reason) if inside else f)
    for result in results:
        t.attach(result, fields if result.is_floating_point() or result.is_complex() else [])
