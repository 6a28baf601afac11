"""Cut tensors in place and mend what modules remember of their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .labels import Dim
from .mending import Mend, layer_integers

__all__ = ["Cut", "cut", "shadowed"]


@dataclass(frozen=True, eq=False)
class Cut:
    """What to do to a network's tensors.

    Args:
        kept: for each dimension to cut, the sorted positions that stay.
        integers: attributes to change, of modules around the layers.
        scales: factors along dimensions, one for each position before the cut.
        added: parameter or buffer name -> what is added to it before the cut.
        attributes: further attributes to set, a module's class among them; see `norms`.
    """

    kept: Mapping[Dim, Tensor]
    integers: Sequence[Mend] = ()
    scales: Mapping[Dim, Tensor] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[nn.Module, Mapping[str, Any]] = field(default_factory=dict)


def cut(model: nn.Module, plan: Cut) -> Callable[[], None]:
    """Carry out a cut; returns a function that undoes it.

    Parameters and buffers stay the same objects: their data is swapped under `no_grad`, so that
    optimizers, tied weights and the last graph still hold them. Gradients are cleared. Layers'
    integers (`out_channels`, `num_features`, ...) follow their tensors.

    Args:
        model: the network, changed in place.
        plan: what stays.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    scratch: _Scratch = {}
    smaller = {
        name: _smaller(tensors[name], plan.added.get(name), *how, scratch)
        for name, how in _by_parameter(plan).items()
    }
    undo: list[Callable[[], None]] = []

    def put_back() -> None:
        for step in reversed(undo):
            step()

    try:
        for name, data in smaller.items():
            undo.append(_swap(tensors[name], data))
        _mend(model, {id(tensors[name]) for name in smaller}, plan, undo)
    except BaseException:  # an interrupt, too, must not leave half a cut
        put_back()
        raise
    return put_back


@contextmanager
def shadowed(model: nn.Module, plan: Cut, *, shapes: bool = False) -> Iterator[None]:
    """A model as it would be after `cut`, with other tensors: its own are not touched.

    Args:
        model: the network, as before afterwards.
        plan: what stays.
        shapes: the other tensors have no numbers.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    shadows: dict[int, Tensor] = {}
    scratch: _Scratch = {}
    for name, (cuts, scales) in _by_parameter(plan).items():
        if shapes:
            data = _outline(tensors[name], cuts)
        else:
            data = _smaller(tensors[name], plan.added.get(name), cuts, scales, scratch)
        is_parameter = isinstance(tensors[name], nn.Parameter)
        shadows[id(tensors[name])] = nn.Parameter(data, False) if is_parameter else data
    undo: list[Callable[[], None]] = []
    try:
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if id(tensor) in shadows:
                        own[name] = shadows[id(tensor)]
                        undo.append(lambda o=own, n=name, t=tensor: o.update({n: t}))
        _mend(model, {id(s) for s in shadows.values()}, plan, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


_ByDim = dict[int, Tensor]


def _by_parameter(plan: Cut) -> dict[str, tuple[_ByDim, _ByDim]]:
    found: dict[str, tuple[_ByDim, _ByDim]] = {}
    for place, given in enumerate((plan.kept, plan.scales)):
        for dim, value in given.items():
            found.setdefault(dim.parameter, ({}, {}))[place][dim.dim] = value
    for name in plan.added:
        found.setdefault(name, ({}, {}))
    return found


def _outline(tensor: Tensor, cuts: _ByDim) -> Tensor:
    shape = [len(cuts[d]) if d in cuts else n for d, n in enumerate(tensor.shape)]
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


_Scratch = dict[tuple[torch.dtype, torch.device], Tensor]


def _smaller(
    tensor: Tensor, added: Tensor | None, cuts: _ByDim, scales: _ByDim, scratch: _Scratch
) -> Tensor:
    data = tensor.detach()
    if added is not None:
        data = (data + added).to(data.dtype)
    whole = data
    for dim, index in cuts.items():
        room = None
        if data is whole and len(cuts) > 1:  # picked from again: spare the new memory
            room = scratch.setdefault((data.dtype, data.device), data.new_empty(0)).resize_(0)
        data = torch.index_select(data, dim, index.to(data.device), out=room)
    for dim, scale in scales.items():
        scale = scale[cuts[dim]] if dim in cuts else scale
        shape = [-1 if d == dim else 1 for d in range(data.ndim)]
        data = (data * scale.to(data.device).view(shape)).to(data.dtype)
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


def _mend(model: nn.Module, cut: set[int], plan: Cut, undo: list[Callable[[], None]]) -> None:
    """Let integers follow the tensors that were cut, noting how to undo it."""
    owners = _owners(model, cut)
    for module in owners:
        if isinstance(module, nn.RNNBase):  # it keeps a list of its weights
            weights = [getattr(module, name) for name in module._flat_weights_names]
            undo.append(_set(module, "_flat_weights", weights))
        for attribute, value in layer_integers(module).items():
            undo.append(_set(module, attribute, value))
    for module, attribute, value in plan.integers:
        if module not in owners or attribute not in layer_integers(module):
            undo.append(_set(module, attribute, value))
    for module, attributes in plan.attributes.items():
        for attribute, value in attributes.items():
            undo.append(_set(module, attribute, value))


def _set(module: nn.Module, attribute: str, value: Any) -> Callable[[], None]:
    if attribute == "__class__":
        kind = type(module)
        module.__class__ = value
        return lambda: setattr(module, "__class__", kind)
    before = dict(module.__dict__)
    module.__dict__[attribute] = value

    def put_back() -> None:
        if attribute in before:
            module.__dict__[attribute] = before[attribute]
        else:
            del module.__dict__[attribute]

    return put_back
