"""How labels pass through each kind of operation.

One function a kind, and one table that says which operation is of which kind. An operation in no
table pins every channel that touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .inputs import tensors_in
from .labels import CONSUME, FIXED, FOLLOW, PRODUCE, SCALE, SHIFT, Field, Tracer

__all__ = ["RULES", "follow"]

Rule = Callable[[Tracer, Any, tuple[Any, ...], Mapping[str, Any], Any], None]


def follow(
    t: Tracer, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> None:
    """Pass the labels of the arguments of one aten operation on to its result."""
    operands = [x for x in tensors_in((args, dict(kwargs))) if t.of(x)]
    if not operands:
        return
    name = func._schema.name.removeprefix("aten::")
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if rule is None and _is_pointwise(func, name):
        rule = pointwise
    reshaped = any(f.labels.ndim != x.ndim for x in operands for f in t.of(x))  # in place
    if rule is None or "out" in kwargs or reshaped:
        rule = unknown
    try:
        rule(t, func, args, kwargs, out)
    except Exception:  # arguments that the rule did not expect; the network itself ran well
        unknown(t, func, args, kwargs, out)


def _is_pointwise(func: Any, name: str) -> bool:
    if torch.Tag.pointwise in func.tags:
        return True
    plain = getattr(torch.ops.aten, name.removesuffix("_"), None)  # hardswish_ lacks the tag
    return plain is not None and any(
        torch.Tag.pointwise in getattr(plain, overload).tags for overload in plain.overloads()
    )


def unknown(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """An operation that may do anything with its channels pins them."""
    for x in tensors_in((args, dict(kwargs))):
        t.pin(t.of(x), f"{func._schema.name.removeprefix('aten::')} may mix or count its channels")
    for x in tensors_in(out):
        t.fields.pop(x, None)  # written in place


def passes(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """The result follows the first argument along the dimensions where it has its size."""
    x, result = args[0], out if isinstance(out, Tensor) else out[0]
    same = [d for d in range(x.ndim) if x.ndim == result.ndim and x.shape[d] == result.shape[d]]
    t.attach(result, [f for f in t.of(x) if set(f.dims) <= set(same)])


# --- movement: the operation itself moves the labels ------------------------------------------


def movement(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """View, permute, expand, select, ...: call the operation on the labels.

    Channels may be laid out anew (flattened with their positions, moved to another dimension)
    as long as each axis stays whole and in order; an axis split or reordered by position is
    pinned.
    """
    x, rest = args[0], args[1:]
    fields = []
    for f in t.of(x):
        full = f.labels.expand(x.shape)
        moved = torch.reshape(full, rest[0]) if func in _VIEWS else func(full, *rest, **kwargs)
        labels = _compact(moved)
        if _whole(f.labels, labels):
            fields.append(Field(labels, f.source))
        else:
            t.pin(
                [f], f"{func._schema.name.removeprefix('aten::')} splits or reorders the channels"
            )
    t.attach(out, fields)


_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
}


def _compact(labels: Tensor) -> Tensor:
    """Labels with size 1 along every dimension where they do not vary."""
    for d in range(labels.ndim):
        first = labels.narrow(d, 0, 1)
        if labels.shape[d] > 1 and (labels.stride(d) == 0 or bool((labels == first).all())):
            labels = first
    return labels


def _whole(before: Tensor, after: Tensor) -> bool:
    """Whether both run through the same channels in the same order, once or several times."""
    if sum(n > 1 for n in after.shape) > 1:
        return False
    return torch.equal(_cycle(before.flatten()), _cycle(after.flatten()))


def _cycle(labels: Tensor) -> Tensor:
    """The sequence that `labels` repeats, neighbours of the same label counted once."""
    line = labels.unique_consecutive()
    again = (line[1:] == line[0]).nonzero()
    period = int(again[0]) + 1 if len(again) else len(line)
    if len(line) % period == 0 and bool((line.view(-1, period) == line[:period]).all()):
        return line[:period]
    return line


def concatenation(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Channels side by side keep their labels; maps side by side join theirs."""
    parts = [x for x in args[0] if x.numel()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    if any(len(t.of(x)) > 1 for x in parts):
        return unknown(t, func, args, kwargs, out)
    if any(f.dims != (dim,) for x in parts for f in t.of(x)):
        everything = [f for x in parts for f in t.of(x)]
        _side_by_side(t, everything, parts, dim)
        return t.attach(out, [f for f in everything if dim not in f.dims][:1])
    rows = [_row(t, x, dim) for x in parts]
    shape = [1] * out.ndim
    shape[dim] = -1
    t.attach(out, [Field(torch.cat(rows).view(shape))])
    return None


def _row(t: Tracer, x: Tensor, dim: int) -> Tensor:
    """The labels of `x` along `dim`, as a vector."""
    known = t.along(x, dim)
    if known is not None:
        return known.labels.flatten()
    return torch.full((x.shape[dim],), FIXED, dtype=torch.int64, device=x.device)


# --- meetings ----------------------------------------------------------------------------------


def pointwise(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Element by element: labels along a common dimension join; a fixed width pins."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    result = out if isinstance(out, Tensor) else next(iter(tensors_in(out)), None)
    if result is None:
        return unknown(t, func, args, kwargs, out)
    operands = [_aligned(t, x, result.ndim) for x in tensors_in((args, dict(kwargs)))]
    role = SHIFT if name in ("add", "sub", "rsub") else SCALE if name == "mul" else FOLLOW
    everything = [f for _, fields in operands for f in fields]
    filled = args[2:] if name == "masked_fill" else args[1:] if name == "where" else ()
    if any(not t.of(v) and bool(torch.as_tensor(v).ne(0).any()) for v in filled):
        t.pin(everything, f"{name} writes a constant into its channels")
    for _, own in operands:
        if len(own) == 1:  # a vector of parameters, not a weight on its way to a layer
            t.mark(own[0], role)
    fields = {}
    for d in range(result.ndim):
        carriers = [f for f in everything if d in f.dims]
        if not carriers:
            continue
        bare = [s for s, fs in operands if s[d] > 1 and not any(d in f.dims for f in fs)]
        if bare:
            t.pin(carriers, f"{name} with a tensor of fixed size")
        for other in carriers[1:]:
            t.join(carriers[0], other)
        fields[carriers[0].dims] = Field(carriers[0].labels)
    t.attach(result, everything if len(operands) == 1 else list(fields.values()))
    return None


def _aligned(t: Tracer, x: Tensor, ndim: int) -> tuple[tuple[int, ...], list[Field]]:
    """Shape and fields of an operand as broadcasting sees them."""
    lead = (1,) * (ndim - x.ndim)
    fields = [Field(f.labels.view(*lead, *f.labels.shape), f.source) for f in t.of(x)]
    return (*lead, *x.shape), fields


def _side_by_side(t: Tracer, everything: list[Field], parts: list[Tensor], dim: int) -> None:
    """Fields of parts that are laid side by side along `dim` join along the other dimensions."""
    for d in range(parts[0].ndim):
        here = [f for f in everything if d in f.dims]
        if here and d == dim:
            t.pin(here, "cat along the channels of some parts only")
        elif here:
            for other in here[1:]:
                t.join(here[0], other)
            if len(here) < len(parts) and parts[0].shape[d] > 1:
                t.pin(here, "cat with a tensor of fixed size")


def contraction(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """`mm` and `addmm`: (N, K) @ (K, M). The labels along K join, those along N and M pass."""
    bias, (a, b) = (args[0], args[1:3]) if "addmm" in func._schema.name else (None, args[:2])
    rows, columns = t.along(a, 0), t.along(b, 1)
    _contract(t, a, 1, b, 0)
    t.mark(rows, PRODUCE)
    t.mark(columns, PRODUCE)
    t.attach(out, [f and Field(f.labels) for f in (rows, columns)])
    if bias is not None:
        _shift(t, columns, bias)


def _contract(t: Tracer, a: Tensor, da: int, b: Tensor, db: int) -> None:
    left, right = t.along(a, da), t.along(b, db)
    t.mark(left, CONSUME)
    t.mark(right, CONSUME)
    if left is not None and right is not None:
        t.join(Field(left.labels.flatten()), Field(right.labels.flatten()))
        t.consume(b if left.source else a, right if left.source else left)
    elif a.shape[da] > 1:
        t.pin([left, right], "multiplied with a tensor of fixed size or the network's input")


def _shift(t: Tracer, made: Field | None, bias: Tensor) -> None:
    """A bias belongs to the channels it is added to."""
    known = t.along(bias, -1)
    t.mark(known, SHIFT)
    if made is not None and known is not None:
        t.join(Field(made.labels.flatten()), Field(known.labels.flatten()))
    elif bias.shape[-1] > 1:
        t.pin([made, known], "a bias of fixed size")


def convolution(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Any dimension, plain, transposed and depthwise; other grouped convs pin."""
    x, weight, bias = args[:3]
    transposed, groups = args[6], args[8]
    of_in, of_out = (0, 1) if transposed else (1, 0)
    made = t.along(weight, of_out)
    t.pin([f for f in t.of(weight) if set(f.dims) - {0, 1}], "spatial size of a kernel")
    t.pin([f for f in t.of(x) if f.dims != (1,)], "batch or positions of a convolution")
    if groups == 1:
        t.mark(made, PRODUCE)
        _contract(t, x, 1, weight, of_in)
    else:
        made = _depthwise(t, x, weight, groups, made if not transposed else None)
    fields = [made and Field(_along(made.labels.flatten(), 1, out.ndim))]
    t.attach(out, fields)
    if bias is not None:
        _shift(t, made, bias)


def _depthwise(
    t: Tracer, x: Tensor, weight: Tensor, groups: int, made: Field | None
) -> Field | None:
    """Each channel has rows of its own: they live and die with it."""
    read = t.along(x, 1)
    if made is None or groups != x.shape[1]:
        t.pin([read, *t.of(weight)], "grouped convolution")
        t.mark(made, PRODUCE)
        return made
    t.mark(made, PRODUCE)
    if read is None:
        t.pin([made], "reads a tensor of fixed size or the network's input")
        return made
    each = weight.shape[0] // groups
    t.join(Field(read.labels.flatten().repeat_interleave(each)), Field(made.labels.flatten()))
    return made


def _along(labels: Tensor, dim: int, ndim: int) -> Tensor:
    shape = [1] * ndim
    shape[dim] = -1
    return labels.view(shape)


def batch_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Scale, shift and statistics belong to the channel they normalise."""
    x, result = args[0], out if isinstance(out, Tensor) else out[0]
    channels = t.along(x, 1) if x.ndim > 1 else None
    for p, role in zip(args[1:5], (SCALE, SHIFT, FOLLOW, FOLLOW), strict=True):
        known = t.along(p, 0) if p is not None else None
        t.mark(known, role)
        if known is not None and channels is not None:
            t.join(Field(channels.labels.flatten()), Field(known.labels.flatten()))
        elif p is not None and p.numel() > 1:
            t.pin([channels, known], "normalised with or as a tensor of fixed size")
    t.attach(result, t.of(x))


# --- positions ---------------------------------------------------------------------------------


def spatial(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Pooling, resizing and padding: the last dimensions are positions."""
    name = func._schema.name.removeprefix("aten::")
    x, result = args[0], out if isinstance(out, Tensor) else out[0]
    positions = 1 if "1d" in name else 3 if "3d" in name else 2
    if name == "constant_pad_nd":  # two numbers a dimension, the last dimension first
        positions = max((k // 2 + 1 for k, n in enumerate(args[1]) if n), default=0)
    inside = [f for f in t.of(x) if all(d < x.ndim - positions for d in f.dims)]
    t.pin([f for f in t.of(x) if f not in inside], f"{name} over channels")
    t.attach(result, inside)


def reduction(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Mean, sum, ... over positions pass the channels; over channels they pin them."""
    x, result = args[0], out if isinstance(out, Tensor) else out[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(x.ndim)
    gone = {d % x.ndim for d in dims}
    fields = []
    for f in t.of(x):
        if gone & set(f.dims):
            t.pin([f], f"{func._schema.name.removeprefix('aten::')} over channels")
            continue
        kept = [n for d, n in enumerate(f.labels.shape) if d not in gone]
        fields.append(f if result.ndim == x.ndim else Field(f.labels.view(kept)))
    t.attach(result, fields)


def _table(**kinds: str) -> dict[str, Rule]:
    return {op: globals()[rule] for rule, ops in kinds.items() for op in ops.split()}


RULES: dict[str, Rule] = _table(
    movement="""view _unsafe_view reshape permute transpose t numpy_T unsqueeze squeeze expand
        repeat select slice narrow""",
    concatenation="cat concatenate",
    contraction="mm addmm",
    convolution="convolution",
    batch_norm="""native_batch_norm cudnn_batch_norm miopen_batch_norm
        _native_batch_norm_legit_no_training""",
    spatial="""max_pool2d_with_indices max_pool3d_with_indices max_pool2d avg_pool2d avg_pool3d
        _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
        upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d upsample_trilinear3d
        constant_pad_nd reflection_pad2d replication_pad2d""",
    reduction="mean sum amax amin",
    passes="""alias detach clone contiguous _to_copy lift_fresh native_dropout bernoulli fill zero
        empty_like zeros_like ones_like rand_like randn_like full_like new_empty new_zeros new_ones
        new_full""",
    pointwise="copy hardswish _prelu_kernel",
)
