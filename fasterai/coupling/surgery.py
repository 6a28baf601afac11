"""Cut tensors in place and mend what modules remember of their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..core.names import raw_tensors
from .labels import Dim
from .mending import Mend, agrees, layer_integers

__all__ = ["Cut", "Step", "cut", "positions_by_name", "selected", "shadowed", "smaller"]


@dataclass(frozen=True, eq=False)
class Step:
    """Arithmetic on what is left of a tensor.

    Args:
        value: float64, of a shape that broadcasts to that of the cut tensor.
        factor: the tensor is multiplied with it; else it is added.
    """

    value: Tensor
    factor: bool


@dataclass(frozen=True, eq=False)
class Cut:
    """What to do to a network's tensors.

    Args:
        kept: for each dimension to cut, the sorted positions that stay.
        integers: attributes to change, of modules around the layers.
        steps: parameter or buffer name -> what to do, one after the other, to what is left of it.
        attributes: further attributes to set, a module's class among them; see `norms`.
    """

    kept: Mapping[Dim, Tensor]
    integers: Sequence[Mend] = ()
    steps: Mapping[str, Sequence[Step]] = field(default_factory=dict)
    attributes: Mapping[nn.Module, Mapping[str, Any]] = field(default_factory=dict)


def cut(
    model: nn.Module,
    how: Cut,
    data: Mapping[str, Tensor] = MappingProxyType({}),
) -> Callable[[], None]:
    """Carry out a cut; returns a function that undoes it.

    Parameters and buffers stay the same objects: their data is swapped under `no_grad`, so that
    optimizers, tied weights and the last graph still hold them. Gradients are cleared. Layers'
    integers (`out_channels`, `num_features`, ...) follow their tensors.

    Args:
        model: the network, changed in place.
        how: what stays.
        data: what to put in the place of parameters and buffers, instead of cutting them.

    Raises:
        ValueError: the tensors of a layer would no longer fit together, as they did before, or are
            inference tensors; the model is as it was.
    """
    tensors = raw_tensors(model)
    kept, scratch = positions_by_name(how.kept), {}
    left = dict(data)
    for name in dict.fromkeys((*kept, *how.steps)):
        if name not in data:
            steps = how.steps.get(name, ())
            left[name] = smaller(tensors[name], kept.get(name, {}), steps, scratch)
    _must_be_changeable({name: tensors[name] for name in left})
    changed = {id(tensors[n]) for n, x in left.items() if x.shape != tensors[n].shape}
    concerned = dict.fromkeys((*_owners(model, changed), *how.attributes))
    whole = [m for m in concerned if agrees(m)]
    undo: list[Callable[[], None]] = [lambda: _recompute(concerned)]

    def put_back() -> None:
        for step in reversed(undo):
            step()

    try:
        for name, data in left.items():
            undo.append(_putting_back(tensors[name]))
            _swap(tensors[name], data)
        _recompute(concerned)
        _mend(model, changed, how, undo)
        _must_agree(model, whole)
    except BaseException:  # an interrupt, too, must not leave half a cut
        put_back()
        raise
    return put_back


@contextmanager
def shadowed(model: nn.Module, how: Cut, *, shapes: bool = False) -> Iterator[None]:
    """A model as it would be after `cut`, with other tensors: its own are not touched.

    Args:
        model: the network, as before afterwards.
        how: what stays.
        shapes: the other tensors have no numbers.
    """
    tensors = raw_tensors(model)
    shadows: dict[int, Tensor] = {}
    kept, scratch = positions_by_name(how.kept), {}
    for name in dict.fromkeys((*kept, *how.steps)):
        cuts = kept.get(name, {})
        if shapes:
            data = _outline(tensors[name], cuts)
        else:
            data = smaller(tensors[name], cuts, how.steps.get(name, ()), scratch)
        is_parameter = isinstance(tensors[name], nn.Parameter)
        shadows[id(tensors[name])] = nn.Parameter(data, False) if is_parameter else data
    if shapes:  # what makes a weight of several cannot compute with numbers and shapes alike
        makers = [m for m in model.modules() if _recomputing(m) or type(m) is ParametrizationList]
        for x in (x for m in makers for x in (*m.parameters(), *m.buffers())):
            if id(x) not in shadows:
                data = _outline(x, {})
                shadows[id(x)] = nn.Parameter(data, False) if isinstance(x, nn.Parameter) else data
    undo: list[Callable[[], None]] = [lambda: _recompute(model.modules())]
    try:
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if id(tensor) in shadows:
                        undo.append(lambda o=own, n=name, t=tensor: o.update({n: t}))
                        own[name] = shadows[id(tensor)]  # an interrupt may come in between
        _recompute(model.modules())
        _mend(model, {id(s) for s in shadows.values()}, how, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


_ByDim = dict[int, Tensor]


def positions_by_name(kept: Mapping[Dim, Tensor]) -> dict[str, _ByDim]:
    """The positions that stay, by parameter or buffer and dimension."""
    found: dict[str, _ByDim] = {}
    for dim, index in kept.items():
        found.setdefault(dim.parameter, {})[dim.dim] = index
    return found


def _outline(tensor: Tensor, cuts: _ByDim) -> Tensor:
    shape = [len(cuts[d]) if d in cuts else n for d, n in enumerate(tensor.shape)]
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


_Scratch = dict[tuple[torch.dtype, torch.device], Tensor]


def selected(tensor: Tensor, cuts: Mapping[int, Tensor], scratch: _Scratch | None = None) -> Tensor:
    """What is left of a tensor where these positions of its dimensions stay.

    Args:
        tensor: without a gradient.
        cuts: the positions, by dimension.
        scratch: memory to use again for what is only picked from again.
    """
    data = tensor
    for dim, index in cuts.items():
        room = None
        if scratch is not None and data is tensor and len(cuts) > 1:
            room = scratch.setdefault((data.dtype, data.device), data.new_empty(0)).resize_(0)
        data = torch.index_select(data, dim, index.to(data.device), out=room)
    return data


def smaller(
    tensor: Tensor,
    cuts: Mapping[int, Tensor],
    steps: Sequence[Step],
    scratch: _Scratch | None = None,
) -> Tensor:
    """What is left of a tensor once it is cut: a new one, in the same memory format."""
    data = selected(tensor.detach(), cuts, scratch)
    for step in steps:
        value = step.value.to(data.device)
        data = (data * value if step.factor else data + value).to(data.dtype)
    last = torch.channels_last
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
        return data.contiguous(memory_format=last)
    return data


def _must_be_changeable(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{name!r} was made under torch.inference_mode(), and outside of it nothing may "
                f"change it: build the model outside, or pass copy.deepcopy(model)"
            )


def _swap(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor other data; where it is a conjugate or negative view, it remains one."""
    data = data.resolve_conj().resolve_neg()
    data = data.conj_physical() if tensor.is_conj() else data
    tensor.grad = None
    with torch.no_grad():
        tensor.set_(data.neg() if tensor.is_neg() else data)


def _putting_back(tensor: Tensor) -> Callable[[], None]:
    before, gradient = tensor.detach(), tensor.grad

    def put_back() -> None:
        with torch.no_grad():
            tensor.set_(before)
        tensor.grad = gradient

    return put_back


def _owners(model: nn.Module, ids: set[int]) -> list[nn.Module]:
    """The modules that hold one of these tensors, also as what a weight is computed from."""

    def held(module: nn.Module) -> Iterator[Any]:
        made = module._modules.get("parametrizations")
        yield from (*module._parameters.values(), *module._buffers.values())
        yield from () if made is None else (*made.parameters(), *made.buffers())

    return [m for m in model.modules() if any(id(t) in ids for t in held(m))]


def _mend(model: nn.Module, cut: set[int], how: Cut, undo: list[Callable[[], None]]) -> None:
    """Let integers follow the tensors that were cut, noting how to undo it."""
    owners = _owners(model, cut)
    for module in owners:
        if isinstance(module, nn.RNNBase):  # it keeps a list of its weights
            weights = [getattr(module, name) for name in module._flat_weights_names]
            _set(module, "_flat_weights", weights, undo)
        for attribute, value in layer_integers(module).items():
            _set(module, attribute, value, undo)
    for module, attribute, value in how.integers:
        if module not in owners or attribute not in layer_integers(module):
            _set(module, attribute, value, undo)
    for module, attributes in how.attributes.items():
        for attribute, value in attributes.items():
            _set(module, attribute, value, undo)


def _recompute(modules: Iterable[nn.Module]) -> None:
    """Weights that hooks make of others before each run, so that their sizes can be read."""
    for module in modules:
        for hook in _recomputing(module):
            with torch.no_grad():
                if isinstance(hook, SpectralNorm):  # in train mode it would change its vectors
                    weight = hook.compute_weight(module, do_power_iteration=False)
                    setattr(module, hook.name, weight)
                else:
                    hook(module, ())


def _recomputing(module: nn.Module) -> list[Any]:
    """The hooks that make a weight of others."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, _MAKERS)]


_MAKERS = BasePruningMethod, WeightNorm, SpectralNorm


def _must_agree(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    torn = {id(m) for m in layers if not agrees(m)}
    if torn:
        names = [name for name, m in model.named_modules() if id(m) in torn]
        raise ValueError(f"the tensors of {', '.join(names[:3])} would no longer fit together")


def _set(module: nn.Module, attribute: str, value: Any, undo: list[Callable[[], None]]) -> None:
    """Set an attribute, once it is noted how to undo it: an interrupt may come in between."""
    kind, before = type(module), dict(module.__dict__)

    def put_back() -> None:
        if attribute == "__class__":
            module.__class__ = kind
        elif attribute in before:
            module.__dict__[attribute] = before[attribute]
        else:
            module.__dict__.pop(attribute, None)

    undo.append(put_back)
    if attribute == "__class__":
        module.__class__ = value
    else:
        module.__dict__[attribute] = value
