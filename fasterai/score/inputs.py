"""The norm of what each weight is multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.criteria import wide
from ..coupling.inputs import Inputs, run_quietly, tensors_in
from ..coupling.places import looking

__all__ = ["InputNorms"]

_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class InputNorms:
    """L2 norms, over examples and positions, of the inputs of linear layers and convs.

    In a conv each weight has a norm of its own: that of the pixels its place in the kernel meets.

    Args:
        model: the network.
        weights: its weights by name; those of other layers are left out, and those that others
            take from a layer without running it, as attention does, for nobody sees with what.
        inputs: what it runs on.

    Attributes:
        sums: of the squares, for each weight to be broadcast to its shape.
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: Inputs
    ) -> None:
        self._model = model
        known = {id(w): name for name, w in weights.items()}
        self._layers = {
            name: (m, known[id(m.weight)])
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear | nn.modules.conv._ConvNd) and id(m.weight) in known
        }
        taken = self._taken(inputs)
        self._layers = {n: at for n, at in self._layers.items() if at[1] not in taken}
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        layers = self._layers.values()
        self.sums = {k: m.weight.new_zeros([1] * m.weight.ndim) for m, k in layers}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what is seen while this lasts."""
        with looking(self._model, self._layers, self._look):
            yield

    def found(self) -> dict[str, Tensor]:
        """The norms, for each weight to be broadcast to its shape."""
        return {name: squares.sqrt() for name, squares in self.sums.items()}

    def _taken(self, inputs: Inputs) -> set[str]:
        """The weights that are used without their layers being run."""
        ran: set[str] = set()
        used = _Used()
        see = looking(self._model, self._layers, lambda name, *_: ran.add(self._layers[name][1]))
        with run_quietly(self._model), see, used:
            inputs(self._model)
        return {k for m, k in self._layers.values() if id(m.weight) in used.seen} - ran

    def _look(self, name: str, call: int, x: Tensor) -> None:
        layer, weight = self._layers[name]
        x = wide(x.detach())
        self.sums[weight] = self.sums[weight].to(x) + _squares(layer, x)


class _Used(TorchFunctionMode):
    """Notes which tensors functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(map(id, tensors_in((args, kwargs))))
        return func(*args, **(kwargs or {}))


def _squares(layer: nn.Module, x: Tensor) -> Tensor:
    """The sum of the squares of what each weight is multiplied with, broadcastable."""
    if isinstance(layer, nn.Linear):
        return x.square().reshape(-1, x.shape[-1]).sum(0)[None]
    run, shape = _single(layer)
    with torch.enable_grad():  # a conv is linear in its weights: their gradients are those sums
        ones = torch.ones(shape, dtype=x.dtype, device=x.device, requires_grad=True)
        (sums,) = torch.autograd.grad(run(x.square(), ones).sum(), ones)
    if layer.groups > 1 and not layer.transposed:
        return sums.repeat_interleave(layer.out_channels // layer.groups, 0)
    return sums


def _single(layer: Any) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]:
    """A conv with one filter a group, as a function of input and weight, and the weight's shape."""
    shape = layer.weight.shape
    if layer.transposed:
        conv, how = _TRANSPOSED[len(shape)], (layer.stride, layer.padding, layer.output_padding)
        return (
            lambda x, w: conv(x, w, None, *how, layer.groups, layer.dilation),
            (shape[0], 1, *shape[2:]),
        )
    own = _CONVS[len(shape)]._conv_forward  # pads as the layer does
    return lambda x, w: own(layer, x, w, None), (layer.groups, *shape[1:])
