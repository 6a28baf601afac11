"""Which layer makes what a norm normalises, seen while a network runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.granularity import along
from ..coupling.hooks import hooked
from ..coupling.inputs import Inputs, operands_in, plainly, run_quietly, tensors_in
from ..coupling.moving import movement
from ..coupling.rules import RULES
from ..prune.check import differences

__all__ = ["Call", "Layer", "Seen", "affine", "beyond", "norms_of", "watch_norms"]

_COPIES = {"clone", "contiguous", "detach", "alias"}


@dataclass(eq=False)
class Layer:
    """One run of a conv, a transposed conv or a linear layer, and what became of its result.

    Args:
        weight: its weight; None where that was computed, as parametrizations do.
        bias: its bias, if any.
        dim: the dimension of the weight that makes channels.
        groups: of a conv.
        readers: how many operations and norms read what it made.
        norms: those norms.
    """

    weight: Tensor | None
    bias: Tensor | None
    dim: int
    groups: int
    readers: int = 0
    norms: list[nn.Module] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    """One run of a norm.

    Args:
        norm: the module.
        layer: the layer that made what it read, if one did.
        aligned: the channels it normalises are those of the layer.
        plain: it only scaled and shifted channels, before its submodules.
    """

    norm: nn.Module
    layer: Layer | None
    aligned: bool = False
    plain: bool = False


@dataclass(eq=False)
class Seen:
    """What one run of a network said.

    Attributes:
        calls: of norms, in order.
        layers: in order.
        elsewhere: parameters that other operations than these layers read.
    """

    calls: list[Call] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    elsewhere: set[int] = field(default_factory=set)


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name that may keep running statistics, such as batch norms."""
    return {n: m for n, m in model.named_modules() if "running_mean" in m._buffers}


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,), in float64, that running statistics and affine values amount to."""
    mean, variance = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    scale = (variance + getattr(norm, "eps", 1e-5)).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().cpu().double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().cpu().double()


def beyond(norm: nn.Module) -> nn.Module:
    """What a norm does after normalising: its submodules, an activation as a rule."""
    after = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    if len(after) == 1:
        return after[0]
    rest = nn.Sequential(*after) if after else nn.Identity()
    rest.training = norm.training
    return rest


def watch_norms(model: nn.Module, inputs: Inputs) -> Seen:
    """Run a network in eval mode and note what its norms read; it is left as it was."""
    watcher = _Watcher(model)
    with run_quietly(model), plainly(), hooked(watcher.hooks(model)), watcher:
        out = inputs(model)
    for x in tensors_in(out):
        watcher.read(x)
    return watcher.seen


@dataclass(eq=False)
class _Result:
    """A tensor whose elements are those that a layer made, moved perhaps.

    Args:
        layer: the layer.
        channels: int64, the channel of each element; broadcasts to the tensor's shape.
    """

    layer: Layer
    channels: Tensor


class _Watcher(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen = Seen()
        self.parameters = {id(p): p for p in model.parameters()}
        self.turned = WeakTensorKeyDictionary()  # transposed weight -> the weight
        self.results = WeakTensorKeyDictionary()  # tensor -> _Result
        self.within: list[Tensor] = []  # what norms that are running read
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.paused:
            with torch._C.DisableTorchFunction():
                self._note(func, args, kwargs, out)
        return out

    def read(self, x: Tensor) -> None:
        """Something reads this tensor."""
        if x in self.results and not any(x is y for y in self.within):
            self.results[x].layer.readers += 1

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        operands = operands_in((*args, *kwargs.values()))
        if RULES.get(name) is movement or name in _COPIES:
            x = args[0]
            if id(x) in self.parameters and name == "t":
                self.turned[out] = x
                return
            if self._moved(func, x, args[1:], kwargs, out):
                return
        layer = _LAYERS.get(func)
        own: list[Tensor] = []
        if layer is not None and not kwargs:
            own = layer(self, args, out)
        for x in operands:
            if not any(x is y for y in own):
                self.read(x)
                known = self.turned.get(x, x)
                if id(known) in self.parameters:
                    self.seen.elsewhere.add(id(known))
        for x in operands_in((out,)):
            if any(x is y for y in operands):  # written over
                self.results.pop(x, None)

    def _moved(self, func: Any, x: Any, rest: Any, kwargs: Any, out: Tensor) -> bool:
        """Follow elements that were moved: a reader of the result reads what the layer made."""
        if x not in self.results or any(x is y for y in self.within):
            return False
        result = self.results[x]
        channels = torch.empty_like(x, dtype=torch.int64).copy_(result.channels)
        self.results[out] = _Result(result.layer, func(channels, *rest, **kwargs))
        return True

    def convolution(self, args: tuple[Any, ...], out: Tensor) -> list[Tensor]:
        """Note a conv; returns its parameters."""
        weight, bias, transposed, groups = args[1], args[2], args[6], args[8]
        return self._layer(weight, bias, 1 if transposed else 0, groups, out)

    def product(self, args: tuple[Any, ...], out: Tensor) -> list[Tensor]:
        """Note a linear layer; returns its parameters."""
        bias, turned = (args[0], args[2]) if len(args) == 3 else (None, args[1])
        if turned not in self.turned:
            return []  # a product of two activations, or with a weight that was computed
        return [turned, *self._layer(self.turned[turned], bias, 0, 1, out)]

    def _layer(
        self, weight: Tensor, bias: Tensor | None, dim: int, groups: int, out: Tensor
    ) -> list[Tensor]:
        own = id(weight) in self.parameters and (bias is None or id(bias) in self.parameters)
        layer = Layer(weight if own else None, bias, dim, groups)
        self.seen.layers.append(layer)
        channels = torch.arange(out.shape[1], device=out.device)
        self.results[out] = _Result(layer, along(channels, 0, out.ndim - 1))
        return [weight] if bias is None else [weight, bias]

    def hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Puts hooks on the norms."""
        for norm in norms_of(model).values():
            yield norm.register_forward_pre_hook(self._enter, with_kwargs=True)
            yield norm.register_forward_hook(self._leave, with_kwargs=True)

    def _enter(self, norm: nn.Module, args: Any, kwargs: Any) -> None:
        x = _first(args, kwargs)
        if x in self.results:
            self.read(x)
        self.within.append(x)

    def _leave(self, norm: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        x = self.within.pop()
        result = self.results.get(x)
        call = Call(norm, result and result.layer)
        self.seen.calls.append(call)
        if result is None:
            return
        self.paused = True
        try:
            call.aligned = _aligned(x, result)
            call.plain = _only_scales(norm, x, out)
        finally:
            self.paused = False
        result.layer.norms.append(norm)


_LAYERS = {
    torch.ops.aten.convolution.default: _Watcher.convolution,
    torch.ops.aten.addmm.default: _Watcher.product,
    torch.ops.aten.mm.default: _Watcher.product,
}


def _first(args: Any, kwargs: Any) -> Tensor:
    return operands_in((*args, *kwargs.values()))[0]


def _aligned(x: Tensor, result: _Result) -> bool:
    """Whether dimension 1 of a tensor runs along the channels of the layer that made it."""
    if x.ndim < 2:
        return False
    channels = torch.arange(x.shape[1], device=x.device)
    return bool((result.channels == along(channels, 0, x.ndim - 1)).all())


def _only_scales(norm: nn.Module, x: Tensor, out: Any) -> bool:
    """Whether a norm computed what its scale and shift say, and then its submodules."""
    try:
        scale, shift = (along(v.to(x), 0, x.ndim - 1) for v in affine(norm))
        expected = beyond(norm)(x * scale + shift)
        return differences([[out]], [[expected]]).small
    except Exception:  # whatever a norm of another kind lacks
        return False
