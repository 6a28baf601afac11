"""What is zero in a network and should stay so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..core.granularity import dimensions
from ..core.names import plain, unwrapped
from ..core.processes import refuse_sharded
from ..core.warning import warn
from ..coupling.couple import couple
from ..coupling.inputs import Inputs
from ..coupling.labels import SCALE, SHIFT
from ..coupling.ranking import zeroed_units

__all__ = ["difference", "parameters_like", "zero_masks"]

_BIAS = {"weight": "bias", "in_proj_weight": "in_proj_bias"}


@torch.no_grad()
def zero_masks(model: nn.Module, example_inputs: Any) -> dict[str, Tensor]:
    """Masks of the zeros that should stay: {parameter name: uint8, 1 = free, 0 = stays zero}.

    - In weights of two or more dimensions that is every zero, but where the whole tensor is zero:
      such layers were initialised so, in order to learn.
    - Biases and the scales and shifts of norms often begin at zero. Of them it is the zero entries
      of units whose weights are all zero, as `couple` finds them, and those of a layer's own bias
      where the row of the weight is zero.

    A mask takes a byte an element. Parameters that are frozen or hold no such zeros have none.

    Args:
        model: any network, wrapped or not.
        example_inputs: what its forward takes; it runs only where there are rows of zeros.
    """
    network = unwrapped(model)
    refuse_sharded(network)
    tensors = dict(network.named_parameters())
    weights = {k: p for k, p in tensors.items() if p.ndim > 1 and _partly_zero(p)}
    masks = {k: (p != 0).to(torch.uint8) for k, p in weights.items() if p.requires_grad}
    rows = dict(_zero_rows(network))
    silent = [*rows.items(), *(_silent(network, tensors, example_inputs) if rows else ())]
    for name, gone in silent:
        entries = tensors.get(name)
        if entries is None or not entries.requires_grad or entries.shape != gone.shape:
            continue
        gone = gone.to(entries.device) & (entries == 0)
        if name in masks:
            masks[name] &= ~gone
        elif gone.any():
            masks[name] = (~gone).to(torch.uint8)
    return masks


def _partly_zero(weight: Tensor) -> bool:
    return 0 < int(weight.count_nonzero()) < weight.numel()


def _zero_rows(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """For weights with rows of zeros the name of the bias, were there one, and (rows,) bool."""
    for name, layer in network.named_modules():
        for key, dims in dimensions(layer).items():
            weight = layer._parameters.get(key)
            if weight is None or "o" not in dims or weight.ndim != len(dims):
                continue
            alive = weight != 0
            if isinstance(layer, _ConvTransposeNd):  # the outputs of each group lie in dimension 1
                alive = alive.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
            else:
                alive = alive.movedim(dims.index("o"), 0)
            gone = ~alive.flatten(1).any(1)
            if gone.any() and not gone.all():
                yield f"{name}.{_BIAS.get(key, key)}".lstrip("."), gone


def _silent(
    network: nn.Module, tensors: Mapping[str, Tensor], example_inputs: Any
) -> Iterator[tuple[str, Tensor]]:
    """Biases, scales and shifts by name, and (entries,) bool: those of units without a weight."""
    try:
        coupling = couple(network, Inputs.fitting(network, example_inputs))
    except ValueError as error:
        warn(
            f"the scales and shifts of norms behind zero filters are not held, for {error}",
        )
        return
    for axis in coupling.axes:
        zero = zeroed_units(tensors, axis).cpu()
        for slot in axis.having(SCALE, SHIFT):
            if slot.parameter in tensors and tensors[slot.parameter].ndim == 1:
                gone = torch.zeros(len(tensors[slot.parameter]), dtype=torch.bool)
                gone[slot.index[zero[slot.unit]]] = True
                yield slot.parameter, gone


def parameters_like(
    shapes: Mapping[str, tuple[int, ...]], model: nn.Module
) -> dict[str, nn.Parameter]:
    """The parameters of these names.

    Raises:
        ValueError: a model that lacks some, or where they have other shapes.
    """
    named = unwrapped(model).named_parameters(remove_duplicate=False)
    found = {plain(name): p for name, p in named}
    here = {name: tuple(p.shape) for name, p in found.items() if name in shapes}
    if here != dict(shapes):
        raise ValueError(
            f"the masks are those of another network: {difference(shapes, here)}; build "
            f"the model as the one they came from, dense"
        )
    return {name: found[name] for name in shapes}


def difference(shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]) -> str:
    """The first differences between the shapes there and those here, in words."""
    names = [k for k in dict.fromkeys([*shapes, *others]) if shapes.get(k) != others.get(k)]
    shown = [
        f"{k!r} is {shapes.get(k, 'absent')} there and {others.get(k, 'absent')} here"
        for k in names[:3]
    ]
    return "; ".join(shown + [f"and {len(names) - 3} more"] * (len(names) > 3))
