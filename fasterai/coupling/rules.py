"""Which rule passes labels through which operation.

One function a kind, and one table that says which operation is of which kind; operations that
PyTorch itself tags as pointwise need no line. An operation in no table pins every channel that
touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .inputs import operands_in
from .meeting import (
    batch_norm,
    bilinear,
    contraction,
    convolution,
    deformable,
    embedding,
    experts,
    group_norm,
    layer_norm,
    note_factor,
    pointwise,
    weight_norm,
)
from .moving import concatenation, gating, indexing, movement, padding, parting, shuffling, stacking
from .positions import columns_of, over_dims, passes, reduction, sampling, softmax, spatial
from .tracer import Tracer

__all__ = ["RULES", "follow", "known"]

Rule = Callable[[Tracer, Any, tuple[Any, ...], Mapping[str, Any], Any], None]


def follow(
    t: Tracer, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> None:
    """Pass the labels of the arguments of one operation on to its result."""
    name, is_pointwise = known(func)
    read = operands_in((*args, *kwargs.values()))
    for x in read:
        if x in t.names:
            t.said.touched.add(t.names[x])
    operands, outs = [x for x in read if t.of(x)], operands_in((out,))
    if not operands:
        if t.origins:
            t.watch_moving(read, outs)
        t.watch_fixed(read, outs)
        return _unlabelled(t, name, func, args, out)
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if rule is None and is_pointwise:
        rule = pointwise
    reshaped = any(f.labels.ndim != x.ndim for x in operands for f in t.of(x))  # in place
    if rule is None or reshaped or ("out" in kwargs and rule is not pointwise):
        rule = unknown
    try:
        rule(t, func, args, kwargs, out)
    except Exception:  # arguments that the rule did not expect; the network itself ran well
        unknown(t, func, args, kwargs, out)
    if t.origins:
        meet = "apart" if rule in (contraction, concatenation, stacking) else ""
        if rule is pointwise:
            meet = _MEETS.get(name.removesuffix("_"), "added")
        t.watch_moving(read, outs, meet=meet)
    t.watch_fixed(read, outs)
    return _note_uniform(t, func, args, out)


def _unlabelled(t: Tracer, name: str, func: Any, args: tuple[Any, ...], out: Any) -> None:
    """Products of channels, single channels and constants carry no labels."""
    if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
        note_factor(t, name.removesuffix("_"), args, out)
    _note_uniform(t, func, args, out)


def _note_uniform(t: Tracer, func: Any, args: tuple[Any, ...], out: Any) -> None:
    """Constants of one value, made in the run, fit any width, where their code follows it.

    So does what is repeated along a dimension, as norms are that channels are divided by.
    """
    if not isinstance(out, Tensor):
        return
    name = func._schema.name.removeprefix("aten::")
    if name in _FILLS and not t.of(out):
        t.fill(out)
    elif func._schema.is_mutable:
        t.overwritten(out)
    elif name == "expand":
        lead = out.ndim - args[0].ndim
        own = [1] * lead + list(args[0].shape)
        t.spread(out, [d for d, n in enumerate(own) if n == 1 < out.shape[d]])


_MEETS = {"mul": "multiplied", "div": "scaled", "where": "scaled", "masked_fill": "scaled"}
_FILLS = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like"}
_FILLS |= {"full_like"}


@cache
def known(func: Any) -> tuple[str, bool]:
    """The name of an operation, and whether it is pointwise."""
    name = func._schema.name.removeprefix("aten::")
    if torch.Tag.pointwise in func.tags:
        return name, True
    plain = getattr(torch.ops.aten, name.removesuffix("_"), None)  # hardswish_ lacks the tag
    overloads = [] if plain is None else [getattr(plain, o) for o in plain.overloads()]
    return name, any(torch.Tag.pointwise in overload.tags for overload in overloads)


def unknown(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """An operation that may do anything with its channels pins them."""
    for x in operands_in((*args, *kwargs.values())):
        t.pin(t.of(x), f"{func._schema.name.removeprefix('aten::')} may mix or count its channels")
    for x in operands_in((out,)):
        t.attach(x, [])


def _table(kinds: Mapping[Rule, str]) -> dict[str, Rule]:
    return {op: rule for rule, ops in kinds.items() for op in ops.split()}


RULES: dict[str, Rule] = _table(
    {
        movement: """view _unsafe_view reshape permute transpose t numpy_T unsqueeze squeeze
            expand repeat roll flip unfold pixel_shuffle pixel_unshuffle
            diagonal repeat_interleave tile movedim _reshape_alias
            as_strided_copy view_copy""",
        parting: "slice select split split_with_sizes unbind unsafe_split unsafe_chunk narrow",
        gating: "glu",
        concatenation: "cat concatenate",
        stacking: "stack",
        shuffling: "channel_shuffle native_channel_shuffle",
        padding: "constant_pad_nd",
        indexing: "index index_select gather take_along_dim",
        contraction: "mm addmm bmm baddbmm mv addmv dot vdot",
        bilinear: "_trilinear",
        experts: "_grouped_mm",
        convolution: "convolution",
        deformable: "torchvision::deform_conv2d",
        embedding: "embedding",
        batch_norm: """native_batch_norm cudnn_batch_norm miopen_batch_norm
            _native_batch_norm_legit_no_training""",
        weight_norm: "_weight_norm_interface",
        layer_norm: "native_layer_norm _fused_rms_norm rms_norm",
        group_norm: "native_group_norm",
        spatial: """max_pool1d max_pool2d_with_indices max_pool3d_with_indices max_pool2d avg_pool1d
            avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d
            adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
            _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
            upsample_bicubic2d _upsample_bicubic2d_aa upsample_trilinear3d reflection_pad1d
            reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
            replication_pad3d""",
        sampling: """grid_sampler_2d grid_sampler_3d torchvision::roi_align torchvision::roi_pool
            torchvision::ps_roi_align""",
        columns_of: "im2col col2im",
        reduction: """mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm
            logsumexp prod any all""",
        softmax: "_softmax _log_softmax _safe_softmax",
        over_dims: "cumsum cumprod sort topk _fft_r2c _fft_c2r _fft_c2c logcumsumexp",
        passes: """as_strided_ alias detach clone contiguous _to_copy lift_fresh native_dropout
            bernoulli fill zero empty_like zeros_like ones_like rand_like randn_like full_like
            new_empty new_zeros new_ones new_full uniform normal""",
        pointwise: "copy hardswish _prelu_kernel",
    }
)
