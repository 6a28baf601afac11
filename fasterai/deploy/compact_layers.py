"""Layers that compute only the channels with weights, and spread them over the width around them.

A filter that is zero and has to stay, because other layers of a residual sum write its channel,
costs nothing here but the copy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.granularity import along

__all__ = ["CompactLayer"]


class CompactLayer(nn.Module):
    """A layer for inference without the rows and columns of its weight that are zero.

    Inputs whose columns are zero are not read, outputs whose rows are zero are their bias, so
    that the shapes around it stay; inf and nan in what is not read do not count.

    Args:
        layer: a linear layer, or a conv of one group or of one for each channel.

    Attributes:
        layer: the smaller one.
        inputs: (n,) int64, the channels it reads, or None for all.
        outputs: (m,) int64, the channels it computes, or None for all.
        background: (out, 1, ...), what the other channels are, or None.

    Raises:
        TypeError: the layer is of another kind.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not can_be_compact(layer):
            raise TypeError(
                f"CompactLayer takes nn.Linear and nn.Conv1d to nn.Conv3d of one group or of one "
                f"for each channel, not {layer}; leave it as it is"
            )
        rows, columns = _used(layer)
        out, inside = layer.weight.shape[:2]
        inside = inside if _groups(layer) == 1 else out
        self.shape = out, inside
        self.dim = 1 - layer.weight.ndim  # where channels are, with a batch or without
        self.layer = _smaller(layer, rows, columns)
        self.register_buffer("inputs", columns if len(columns) < inside else None)
        self.register_buffer("outputs", rows if len(rows) < out else None)
        self.register_buffer("background", _bias(layer) if len(rows) < out else None)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Maps what the layer maps, (N, in, *) or (..., in), to the same shapes."""
        out = self.layer(x if self.inputs is None else x.index_select(self.dim, self.inputs))
        if self.outputs is None:
            return out
        shape = [*out.shape]
        shape[self.dim] = len(self.background)
        last = out.ndim == 4 and not out.is_contiguous() and out.stride(1) == 1
        form = torch.channels_last if last else torch.contiguous_format
        whole = self.background.to(out.dtype).expand(shape).clone(memory_format=form)
        return whole.index_copy_(self.dim, self.outputs, out)

    def extra_repr(self) -> str:
        return f"of {' x '.join(map(str, self.shape))}"


def saving(layer: nn.Module) -> float:
    """The share of a layer's weights that stand in rows and columns of zeros."""
    rows, columns = _used(layer)
    kept = len(rows) * (len(columns) if _groups(layer) == 1 else 1)
    return 1 - kept / max(layer.weight.shape[0] * layer.weight.shape[1], 1)


def can_be_compact(layer: nn.Module) -> bool:
    """Whether `CompactLayer` takes a layer of this kind."""
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return layer.groups == 1 or layer.groups == layer.in_channels == layer.out_channels
    return type(layer) is nn.Linear


def _groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def _used(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The rows and the columns that are not all zero; one of each stays in any case."""
    there = layer.weight.detach() != 0
    rows = there.flatten(1).any(1)
    columns = there.transpose(0, 1).flatten(1).any(1) if _groups(layer) == 1 else rows
    rows, columns = (some if some.any() else _first(some) for some in (rows, columns))
    return rows.nonzero().flatten(), columns.nonzero().flatten()


def _first(some: Tensor) -> Tensor:
    return torch.arange(len(some), device=some.device) == 0


def _smaller(layer: nn.Module, rows: Tensor, columns: Tensor) -> nn.Module:
    sizes, bias, weight = (len(columns), len(rows)), layer.bias is not None, layer.weight[rows]
    if isinstance(layer, nn.Linear):
        small: nn.Module = nn.Linear(*sizes, bias=bias, device="meta")
    else:
        how = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        groups = 1 if layer.groups == 1 else len(rows)
        more = {"padding_mode": layer.padding_mode, "device": "meta"}
        small = type(layer)(*sizes, *how, groups=groups, bias=bias, **more)
    weight = weight[:, columns] if _groups(layer) == 1 else weight
    small.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias:
        small.bias = nn.Parameter(layer.bias.detach()[rows], requires_grad=False)
    return small


def _bias(layer: nn.Module) -> Tensor:
    """The bias of each output, as outputs have dimensions behind the channels."""
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return along(bias.detach().clone(), 0, layer.weight.ndim - 1)
