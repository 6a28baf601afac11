"""Cut tensors in place and mend what modules remember of their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..coupling.labels import Dim

__all__ = ["cut"]


def cut(model: nn.Module, kept: Mapping[Dim, Tensor]) -> Callable[[], None]:
    """Keep only these positions of these dimensions; returns a function that undoes it.

    Parameters and buffers stay the same objects: their data is swapped under `no_grad`, so that
    optimizers, tied weights and the last graph still hold them. Gradients are cleared. Layers'
    integers (`out_channels`, `num_features`, ...) follow their tensors.

    Args:
        model: the network, changed in place.
        kept: for each dimension to cut, the sorted positions that stay.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    cuts: dict[str, dict[int, Tensor]] = {}
    for dim, index in kept.items():
        cuts.setdefault(dim.parameter, {})[dim.dim] = index
    smaller = {name: _smaller(tensors[name], by_dim) for name, by_dim in cuts.items()}
    owners = _owners(model, {id(tensors[name]) for name in cuts})
    undo: list[Callable[[], None]] = []

    def put_back() -> None:
        for step in reversed(undo):
            step()

    try:
        for name, data in smaller.items():
            undo.append(_swap(tensors[name], data))
        for module in owners:
            undo.extend(_mend(module))
    except BaseException:  # an interrupt, too, must not leave half a cut
        put_back()
        raise
    return put_back


def _smaller(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    data = tensor.detach()
    for dim, index in sorted(cuts.items()):
        data = data.index_select(dim, index.to(data.device))
    last = torch.channels_last
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
        return data.contiguous(memory_format=last)
    return data


def _swap(tensor: Tensor, data: Tensor) -> Callable[[], None]:
    before, gradient = tensor.detach(), tensor.grad
    tensor.grad = None
    with torch.no_grad():
        tensor.set_(data)

    def put_back() -> None:
        with torch.no_grad():
            tensor.set_(before)
        tensor.grad = gradient

    return put_back


def _owners(model: nn.Module, ids: set[int]) -> list[nn.Module]:
    """The modules that hold one of these tensors."""
    return [
        m
        for m in model.modules()
        if any(id(t) in ids for t in (*m._parameters.values(), *m._buffers.values()))
    ]


def _mend(module: nn.Module) -> list[Callable[[], None]]:
    mender = next((f for kind, f in _MENDERS.items() if isinstance(module, kind)), None)
    if mender is None:
        return []
    undo = []
    for attribute, value in mender(module).items():
        old = getattr(module, attribute)
        setattr(module, attribute, value)
        undo.append(lambda a=attribute, v=old: setattr(module, a, v))
    return undo


def _conv(conv: Any) -> dict[str, int]:
    """`groups` follows the channels of a depthwise conv; others are not cut."""
    rows, columns = conv.weight.shape[:2]
    if conv.transposed:
        return {"in_channels": rows, "out_channels": columns * conv.groups}
    each = conv.out_channels // conv.groups  # rows a group
    groups = rows // each if conv.groups > 1 else 1
    return {"in_channels": columns * groups, "out_channels": rows, "groups": groups}


def _linear(linear: nn.Linear) -> dict[str, int]:
    return {"in_features": linear.weight.shape[1], "out_features": linear.weight.shape[0]}


def _norm(norm: Any) -> dict[str, int]:
    known = norm.weight if norm.weight is not None else norm.running_mean
    return {} if known is None else {"num_features": known.numel()}


def _prelu(prelu: nn.PReLU) -> dict[str, int]:
    return {"num_parameters": prelu.weight.numel()}


_MENDERS: dict[type[nn.Module], Callable[[Any], dict[str, int]]] = {
    nn.modules.conv._ConvNd: _conv,
    nn.Linear: _linear,
    nn.modules.batchnorm._BatchNorm: _norm,
    nn.modules.instancenorm._InstanceNorm: _norm,
    nn.PReLU: _prelu,
}
