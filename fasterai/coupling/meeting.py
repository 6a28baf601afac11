"""Operations where channels meet: sums, products, layers, norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.granularity import along
from .inputs import operands_in
from .labels import CONSUME, FOLLOW, NORMALISED, PRODUCE, SCALE, SHIFT, Dim, Field
from .tracer import Made, Tracer

__all__ = [
    "batch_norm",
    "bilinear",
    "contraction",
    "convolution",
    "deformable",
    "embedding",
    "experts",
    "group_norm",
    "layer_norm",
    "note_factor",
    "pointwise",
    "weight_norm",
]


def pointwise(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Element by element: labels along a common dimension join; a fixed size holds them."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    result = out if isinstance(out, Tensor) else operands_in((out,))[0]
    operands = [(x, *_aligned(t, x, result.ndim)) for x in operands_in((*args, *kwargs.values()))]
    everything = [f for _, _, fields in operands for f in fields]
    filled = args[2:] if name == "masked_fill" else args[1:] if name == "where" else ()
    if any(not t.of(v) and _not_zero(v) for v in filled):
        for f in everything:
            t.mix(f, f"{name} writes a constant into its channels")
    note_factor(t, name, args, result)
    role = SHIFT if name in ("add", "sub", "rsub") else SCALE if name == "mul" else FOLLOW
    computed = any(f.source is None for f in everything)
    if computed or len(operands) > 1:
        for _, _, own in operands:
            if computed or len(own) == 1:  # not a weight on its way to a layer
                for f in own:
                    t.mark(f, role)
    met: list[Field] = []
    for f in everything:
        same = [g for g in met if set(g.dims) & set(f.dims)]
        for g in same:
            t.join(g.labels, f.labels)
            met.remove(g)
        if role == SHIFT:
            _make_together(t, [*same, f])
        met.append(_widest(t, [*same, f]))
    if len(operands) == 1:
        t.attach(result, met)
        return
    t.attach(result, [_held(t, f, operands, name) for f in met])


def note_factor(t: Tracer, name: str, args: Any, result: Tensor) -> None:
    """Remember what a product is multiplied with, and pass on that it is one."""
    x, other = args[0], args[1] if len(args) > 1 else None
    if isinstance(other, Tensor) and other.ndim == 0 and not other.is_meta and not t.of(other):
        other = other.item()
    if isinstance(x, Tensor) and name in ("mul", "div") and isinstance(other, int | float):
        t.factor(x, other if name == "mul" else 1 / other)
    if isinstance(x, Tensor) and x in t.products:
        t.products[result] = t.products[x]


def _not_zero(value: Any) -> bool:
    if isinstance(value, Tensor) and value.is_meta:
        return True
    return bool(torch.as_tensor(value).ne(0).any())


def _aligned(t: Tracer, x: Tensor, ndim: int) -> tuple[tuple[int, ...], list[Field]]:
    """Shape and fields of an operand as broadcasting sees them."""
    lead = (1,) * (ndim - x.ndim)
    if not lead:
        return tuple(x.shape), list(t.of(x))
    fields = [Field(f.labels.reshape(*lead, *f.labels.shape), f.source) for f in t.of(x)]
    return (*lead, *x.shape), fields


def _make_together(t: Tracer, fields: Sequence[Field]) -> None:
    """Weights that are added up make channels together: the first of them notes the others."""
    sources = [g.source for g in fields if g.source is not None]
    own = _foremost(t, sources)
    if own is not None and len(sources) == len(fields):
        others = [d for s in sources for d in (s, *t.together.get(s, ())) if d != own]
        t.together.setdefault(own, {}).update(dict.fromkeys(others, True))


def _foremost(t: Tracer, sources: Sequence[Dim]) -> Dim | None:
    """The first that is of a parameter, not of a buffer such as a mask; else the first."""
    return next((s for s in sources if s.parameter in t.parameters), next(iter(sources), None))


def _widest(t: Tracer, fields: Sequence[Field]) -> Field:
    """Of joined fields the one that varies most; a source, where all have one."""
    f = max(fields, key=lambda g: len(g.dims))
    if any(set(g.dims) - set(f.dims) for g in fields):
        t.pin(fields, "channels met along different dimensions")
    if len(fields) == 1:
        return f
    sources = [g.source for g in fields if g.source is not None]
    derived = len(sources) == len(fields)
    return Field(f.labels, _foremost(t, sources) if derived else None)


def _held(t: Tracer, f: Field, operands: Sequence[Any], name: str) -> Field | None:
    """The field, which keeps its size along dimensions where an operand has a fixed one."""
    bare = {
        d
        for x, shape, own in operands
        for d in f.dims
        if shape[d] > 1 and not any(d in g.dims for g in own)
        if not t.fits(x, d - len(shape) + x.ndim)
    }
    return t.meet_fixed(f, bare, f"{name} with a tensor of fixed size") if bare else f


# --- layers ------------------------------------------------------------------------------------


def contraction(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Matrix products: labels along the contracted dimension join, the others pass."""
    name = func._schema.name.removeprefix("aten::")
    bias, (a, b) = (args[0], args[1:3]) if "add" in name else (None, args[:2])
    da, db = a.ndim - 1, max(b.ndim - 2, 0)
    rows = [f for f in t.of(a) if da not in f.dims]
    columns = [f for f in t.of(b) if db not in f.dims]
    if name == "mv":
        t.pin(rows[1:], "flattened behind other channels")  # a kernel's places, in spectral norms
        rows = rows[:1]
    _contract(t, a, da, b, db, out, biased=bias is not None)
    if t.made_of((a, b)) is not Made.BUFFERS:  # else a statistic of a weight, no channels
        for x, made in ((a, rows), (b, columns)):
            for f in made:
                t.produce(out, x, f)
    if out.ndim == 3:
        rows, columns = _batches(t, rows, a, columns, b)
    made = [Field(f.labels if a.ndim == b.ndim else f.labels.reshape(-1)) for f in rows + columns]
    t.attach(out, [f for f in made if f.dims])
    if isinstance(bias, Tensor):
        pointwise(t, torch.ops.aten.add.Tensor, (out, bias), {}, out)


def _batches(
    t: Tracer, rows: list[Field], a: Tensor, columns: list[Field], b: Tensor
) -> tuple[list[Field], list[Field]]:
    """Fields that vary over the batch (heads) join; those that vary there alone, with all."""
    over = [f for f in rows + columns if 0 in f.dims]
    t.said.heads.extend(f.labels.flatten(1) for f in over if len(f.dims) > 1)
    for f in over[1:]:
        first = t.merge(over[0], [d for d in over[0].dims if d])
        t.join(first.labels, f.labels)
    for other, fields in ((a, columns), (b, rows)):
        if other.shape[0] > 1 and not any(0 in f.dims for f in t.of(other)):
            t.pin([f for f in fields if f.dims == (0,)], "multiplied with a batch of fixed size")
    return rows, columns


def _contract(
    t: Tracer, a: Tensor, da: int, b: Tensor, db: int, out: Tensor, *, biased: bool
) -> None:
    left, right = t.along(a, da), t.along(b, db)
    t.mark(left, CONSUME)
    t.mark(right, CONSUME)
    if left is not None and right is not None:
        first = _line(t, left, da, a.ndim)
        second = _line(t, right, db, b.ndim)
        t.join(first, second)
        t.said.heads.extend(x for x in (first, second) if min(x.shape) > 1)
        if left.source is None and right.source is None:
            t.products[out] = first.reshape(-1)
        both = t.made_of((a, b)) is Made.PARAMETERS
        for x, mine, its in ((a, left, right), (b, right, left)):
            if mine.source is None:
                t.consume(x, mine, its, biased=biased, weighing=x in t.fixed and not both)
    elif a.shape[da] > 1:
        reason = "multiplied with a tensor of fixed size or the network's input"
        for x, f, d, other, over in ((a, left, da, b, db), (b, right, db, a, da)):
            if f is not None and not t.fits(other, over):
                held = t.hold(f, [d], reason)
                if held is not None and f.source is None:
                    t.consume(x, f)


def _line(t: Tracer, f: Field, dim: int, ndim: int) -> Tensor:
    """(batch, K) labels along the contracted dimension, joined across all but the batch."""
    others = [d for d in f.dims if d != dim and not (ndim == 3 and d == 0)]
    labels = t.merge(f, others).labels
    if ndim < 3:
        return labels.reshape(1, -1)
    return labels.reshape(labels.shape[0], -1)


def bilinear(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Both inputs are read by a weight of shape (out, first, second), as `nn.Bilinear` has it."""
    first, weight, second = args[:3]
    if [list(dims) for dims in args[3:7]] != [[1, 3], [0], [1, 2], [2, 3]]:
        raise NotImplementedError("another order of dimensions")
    for x, dim in ((first, 1), (second, 2)):
        columns = t.along(weight, dim)
        read = t.along(x, 1)
        t.pin([f for f in t.of(x) if f is not read], "batch of a bilinear layer")
        t.mark(columns, CONSUME)
        if read is not None and columns is not None:
            t.join(read.labels.reshape(-1), columns.labels.reshape(-1))
            t.consume(x, read)  # what it makes of a constant is not one
        elif x.shape[1] > 1:
            t.pin([read, columns], "multiplied with a tensor of fixed size or the network's input")
    made = t.along(weight, 0)
    t.produce(out, weight, made)
    t.attach(out, [made and Field(along(made.labels.reshape(-1), 1, out.ndim))])


def experts(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Rows of (N, K), in order of their experts, are each read by one of weights (E, K, M)."""
    x, weight = args[:2]
    if (x.ndim, weight.ndim) != (2, 3):
        raise NotImplementedError("a product for the gradient, of which networks have none")
    t.pin([t.along(weight, 0)], "experts")
    _contract(t, x, 1, weight, 1, out, biased=False)
    made = t.along(weight, 2)
    t.produce(out, weight, made)
    rows = [f for f in t.of(x) if 1 not in f.dims]
    t.attach(out, [*rows, made and Field(made.labels.reshape(1, -1))])


def convolution(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Any dimension, plain, transposed, grouped and depthwise."""
    x, weight, bias = args[:3]
    padded = args[6] or any(args[4])  # a transposed one reads borders in ways of its own
    _convolve(t, x, weight, bias, args[8], out, transposed=args[6], padded=padded)


def deformable(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Torchvision's deform_conv2d: offsets and mask are of fixed size."""
    x, weight, offset, mask, bias = args[:5]
    t.pin([*t.of(offset), *t.of(mask)], "offsets or mask of a deformable convolution")
    _convolve(t, x, weight, bias, args[11], out, transposed=False, padded=True)


def _convolve(
    t: Tracer,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    groups: int,
    out: Tensor,
    *,
    transposed: bool,
    padded: bool,
) -> None:
    t.pin([f for f in t.of(weight) if set(f.dims) - {0, 1}], "spatial size of a kernel")
    read = None
    for f in t.of(x):
        if 1 in f.dims:
            read = t.merge(f, [d for d in f.dims if d != 1])
        else:
            t.pin([f], "batch or positions of a convolution")
    of_in, of_out = (0, 1) if transposed else (1, 0)
    made = t.along(weight, of_out)
    t.produce(out, weight, made)
    if groups == 1:
        _meet(t, x, read, weight, of_in, padded=padded, biased=bias is not None)
    else:
        made = _grouped(t, x, read, weight, groups, transposed)
    labels = made and Field(along(made.labels.reshape(-1), 1, out.ndim))
    t.attach(out, [labels])
    if bias is not None:
        _affine(t, bias, labels, 1, SHIFT, "a bias of fixed size")


def _meet(
    t: Tracer,
    x: Tensor,
    read: Field | None,
    weight: Tensor,
    dim: int,
    *,
    padded: bool,
    biased: bool,
) -> None:
    """What the input carries meets the weight's columns."""
    columns = t.along(weight, dim)
    t.mark(columns, CONSUME)
    if read is not None and columns is not None:
        t.join(read.labels.reshape(-1), columns.labels.reshape(-1))
        t.consume(x, read, columns, padded=padded, biased=biased)
    elif x.shape[1] > 1:
        t.pin([read, columns], "multiplied with a tensor of fixed size or the network's input")


def _grouped(
    t: Tracer, x: Tensor, read: Field | None, weight: Tensor, groups: int, transposed: bool
) -> Field | None:
    """Groups go whole where they read or make one channel; else each loses the same positions."""
    wide = x.shape[1] // groups  # channels a group reads
    each = weight.shape[1] if transposed else weight.shape[0] // groups  # channels a group makes
    rows, columns = t.along(weight, 0), t.along(weight, 1)
    columns = columns or _shared(t, weight)
    if columns is not None and each > 1 and not transposed:
        t.mark(rows, PRODUCE)
        t.mark(columns, CONSUME)
        if rows is not None:
            t.grid(rows.labels.reshape(groups, each))
        if read is None:
            t.pin([columns], "reads a tensor of fixed size or the network's input")
        else:
            grid = read.labels.reshape(groups, wide)
            t.grid(grid)
            t.join(grid, columns.labels.reshape(1, -1))
            t.consume(x, read)
        return rows
    if transposed and each > 1:
        t.pin([read, *t.of(weight)], "transposed grouped convolution")
        return None
    t.mark(rows, PRODUCE)
    t.pin([columns], "width of a group")
    if read is None:
        t.pin([rows], "reads a tensor of fixed size or the network's input")
        return rows
    mine = read.labels.reshape(groups, wide)
    made = rows.labels.reshape(groups, -1) if not transposed else rows.labels.reshape(groups, wide)
    if wide > 1:
        t.join(mine, mine[:, :1])
        if each == 1:
            t.consume(x, read)
    t.join(mine[:, :1], made)
    return rows if not transposed else Field(made[:, :1])


def _shared(t: Tracer, weight: Tensor) -> Field | None:
    """The last column that a cut left of a grouped conv: it is still no depthwise one."""
    return next((f for f in t.of(weight) if f.source and f.source.dim == 1 and not f.dims), None)


def embedding(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """A table: its rows stay, its columns are the channels of the result."""
    table, result = args[0], out if isinstance(out, Tensor) else out[0]
    columns = t.along(table, 1)
    t.pin([t.along(table, 0)], "rows of an embedding")
    t.produce(result, table, columns)
    t.attach(result, [columns and Field(along(columns.labels.reshape(-1), -1, result.ndim))])


# --- norms -------------------------------------------------------------------------------------


def batch_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Scale, shift and statistics belong to the channel they normalise."""
    x, result = args[0], out if isinstance(out, Tensor) else out[0]
    channels = t.along(x, 1) if x.ndim > 1 else None
    for p, role in zip(args[1:5], (SCALE, SHIFT, FOLLOW, FOLLOW), strict=True):
        _affine(t, p, channels, 1, role, "normalised with or as a tensor of fixed size")
    _note_followed(t, x, args[3])
    for f in t.of(x):
        if 1 not in f.dims:  # weights that are standardised, say
            t.mix(f, "standardised over channels")
    t.attach(result, t.of(x))


def _note_followed(t: Tracer, x: Tensor, mean: Any) -> None:
    """A norm that is all that follows a layer can take over a bias, in its running mean."""
    known = t.along(mean, 0) if isinstance(mean, Tensor) else None
    if x in t.made and known is not None and known.source is not None:
        t.said.followed[t.made[x]] = known.source.parameter


def _affine(t: Tracer, p: Any, f: Field | None, dim: int, role: str, reason: str) -> None:
    """A vector belongs to the channels along `dim` that it scales or shifts."""
    if p is None or p.numel() == 1:
        return
    known = t.along(p, 0)
    t.mark(known, role)
    if known is not None and f is not None:
        labels = along(known.labels.reshape(-1), dim, f.labels.ndim)
        t.join(f.labels, labels)
    elif not t.fits(p, 0):
        t.pin([f, known], reason)


def layer_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Layer and RMS norm: mixes what varies along the last dimensions."""
    x, shape = args[0], args[1]
    results = [out] if isinstance(out, Tensor) else out
    inside = set(range(x.ndim - len(shape), x.ndim))
    affine = [p for p in args[2:4] if isinstance(p, Tensor)]
    fields = []
    for f in t.of(x):
        if inside & set(f.dims):
            t.mix(f, NORMALISED)
            for p, role in zip(affine, (SCALE, SHIFT), strict=False):
                f = _scaled(t, f, p, role)
        fields.append(f)
    for p in affine:
        if not any(inside & set(f.dims) for f in t.of(x)):
            t.pin(t.of(p), "scales channels of fixed size")
    t.attach(results[0], fields)
    for statistics in results[1:]:
        t.attach(statistics, [])


def _scaled(t: Tracer, f: Field, p: Tensor, role: str) -> Field:
    size, own = _aligned(t, p, f.labels.ndim)
    for g in own:
        t.mark(g, role)
        if set(g.dims) & set(f.dims):
            t.join(f.labels, g.labels)
    bare = [d for d in f.dims if size[d] > 1 and not any(d in g.dims for g in own)]
    if bare:
        return t.hold(f, bare, "scaled by a tensor of fixed size") or f
    return f


def weight_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """A weight from directions and lengths: its rows are zero where their lengths are.

    What it reads counts in its norms; a cut makes that good, see `computed`. Where there is no
    length for each row, rows that are zero change the others.
    """
    v, g = args[:2]
    dim = (args[2] if len(args) > 2 else 0) % v.ndim
    lengths = t.along(g, dim)
    fields = []
    for f in t.of(v):
        if f.dims == (dim,) and lengths is not None:
            t.join(f.labels, lengths.labels)
            t.mark(f, FOLLOW)
            f = Field(f.labels, lengths.source)
        elif dim:
            t.mix(f, "weight norm")
        fields.append(f)
    t.attach(out[0], fields)
    t.attach(out[1], [lengths])


def group_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Each group loses equally many; groups of one channel mix nothing."""
    x, weight, bias, groups = args[0], args[1], args[2], args[6]
    f = t.along(x, 1)
    if f is not None:
        f = t.merge(f, [d for d in f.dims if d != 1])
        if groups < x.shape[1]:
            t.mix(f, NORMALISED)
            if groups > 1:
                t.grid(f.labels.reshape(groups, -1))
    for p, role in ((weight, SCALE), (bias, SHIFT)):
        _affine(t, p, f, 1, role, "normalised with or as a tensor of fixed size")
    t.attach(out[0], [*(g for g in t.of(x) if 1 not in g.dims), f])
    for statistics in out[1:]:
        t.attach(statistics, [])
