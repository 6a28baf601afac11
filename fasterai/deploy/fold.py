"""Batch norms folded into the layers before them, by the order in which the network runs.

In eval mode a batch norm is a scale and a shift of each channel, which the conv or linear layer
that alone feeds it can do itself: s = g / sqrt(v + e), w' = s w, b' = s (b - m) + h (Jacob et al.,
2018, arXiv 1712.05877, eq. 14).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.copies import copied
from ..core.granularity import along
from ..core.names import unwrapped
from ..core.warning import warn
from ..coupling.inputs import Inputs
from ..coupling.probe import settle
from ..measure.counts import numbers_needed
from .comparison import Comparison
from .following import Call, Layer, Seen, affine, beyond, norms_of, watch_norms

__all__ = ["fold_batchnorm", "fold_report"]


@dataclass(frozen=True)
class _Target:
    """A layer that takes in a norm.

    Args:
        layer: its name.
        weight: the attribute that holds its weight; `bias` its bias.
        dim: the dimension of the weight that makes channels.
        groups: of a conv.
    """

    layer: str
    weight: str
    bias: str
    dim: int
    groups: int


_Fold = tuple[str, tuple[_Target, ...]]  # the name of a norm, the layers that take it in


def fold_batchnorm(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of a network whose batch norms are folded into the layers that feed them.

    Which layer feeds which norm is seen on a run, not read from the order in which they are
    registered. A conv, transposed conv or linear layer takes in the norm that alone reads it and
    gets a bias, if it had none; `torch.nn.Identity`, or the norm's own activation, stands where
    the norm was. A norm that shares its layer with anything else stays: see `fold_report`.
    The copy computes the same up to rounding, which is checked, and is for inference.

    Args:
        model: a network in eval mode; it is left as it was.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.

    Raises:
        ValueError: the network is in training mode or on the meta device, cannot be copied or not
            be run on the inputs.
    """
    folded, table = _folded(model, example_inputs)
    if table.empty or not (table["reason"] == "").any():
        why = "it has no batch norms" if table.empty else "see fold_report(model, example_inputs)"
        warn(f"nothing was folded: {why}")
    return folded


def fold_report(model: nn.Module, example_inputs: Any) -> pd.DataFrame:
    """What `fold_batchnorm` does with each norm: `norm`, `into`, and the `reason` if it stays."""
    return _folded(model, example_inputs)[1]


def _folded(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, pd.DataFrame]:
    """The folded copy, and what became of each norm."""
    model = unwrapped(model)
    training = next((n or "the network" for n, m in model.named_modules() if m.training), None)
    if training is not None:
        raise ValueError(
            f"{training} is in training mode, where batch norms use the statistics of the batch "
            f"and cannot be folded: call model.eval() first"
        )
    inputs = Inputs.fitting(model, example_inputs)
    numbers_needed(model)
    found, reasons = _matches(model, watch_norms(model, inputs))
    same = Comparison(model, inputs)

    def attempt(folds: Sequence[_Fold]) -> str | None:
        why = same.fails(lambda network: _apply(network, folds))
        return f"without it {why}" if why else None

    failed: dict[_Fold, str] = {}
    folds = settle([], found, attempt, failed)
    reasons |= {norm: why for (norm, _), why in failed.items()}
    into = {norm: ", ".join(t.layer for t in targets) for norm, targets in folds}
    rows = [(n, into.get(n, pd.NA), "" if n in into else reasons[n]) for n in norms_of(model)]
    return _apply(model, folds), pd.DataFrame(rows, columns=["norm", "into", "reason"])


def _apply(model: nn.Module, folds: Sequence[_Fold]) -> nn.Module:
    """A copy of a network with these norms folded."""
    folded = copied(model)
    modules = dict(folded.named_modules())
    for name, targets in folds:
        norm = modules[name]
        scale, shift = affine(norm)
        for target in targets:
            _take_in(modules[target.layer], target, scale, shift)
        for parent in modules.values():
            for child, module in parent._modules.items():
                if module is norm:
                    parent._modules[child] = beyond(norm)
    return folded


def _take_in(layer: nn.Module, target: _Target, scale: Tensor, shift: Tensor) -> None:
    """Let a layer scale and shift its channels, by (C,) each, itself."""
    weight, bias = getattr(layer, target.weight), getattr(layer, target.bias)
    rows = weight.detach().cpu().double()
    if target.dim:  # (in, out / groups, ...)
        rows = rows.unflatten(0, (target.groups, -1)).transpose(1, 2).flatten(0, 1)
    rows = rows * along(scale, 0, rows.ndim)
    if target.dim:
        rows = rows.unflatten(0, (target.groups, -1)).transpose(1, 2).flatten(0, 1)
    if bias is not None:
        shift = shift + scale * bias.detach().cpu().double()
    with torch.no_grad():
        weight.set_(torch.empty_like(weight).copy_(rows))
        if bias is None:
            bias = nn.Parameter(shift.to(weight), weight.requires_grad)
            layer.register_parameter(target.bias, bias)
        else:
            bias.set_(shift.to(bias))


# --- which norms can go, and why others cannot ----------------------------------------------------


class _Owner(NamedTuple):
    """Who holds a parameter."""

    name: str
    module: nn.Module
    attribute: str


def _owners(model: nn.Module) -> dict[int, list[_Owner]]:
    """All modules that hold each parameter, by its id."""
    found: dict[int, list[_Owner]] = {}
    for name, module in model.named_modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append(_Owner(name, module, attribute))
    return found


def _matches(model: nn.Module, seen: Seen) -> tuple[list[_Fold], dict[str, str]]:
    """The folds that a run allows, and for each other norm a reason."""
    owners = _owners(model)
    folds: list[_Fold] = []
    reasons: dict[str, str] = {}
    ran = {c.norm for c in seen.calls}
    for name, norm in norms_of(model).items():
        calls = [c for c in seen.calls if c.norm is norm]
        stuck = (_stuck(c, seen, owners) for c in calls)
        turns = _taking_turns(name, model, ran)
        reason = _unfit(norm, calls) or next(filter(None, stuck), turns)
        if reason is None:
            targets = dict.fromkeys(_target(c.layer, owners) for c in calls if c.layer)
            folds.append((name, tuple(targets)))
        else:
            reasons[name] = reason
    return folds, reasons


def _taking_turns(name: str, model: nn.Module, ran: Collection[nn.Module]) -> str | None:
    """Another norm of the same list that did not run may follow the same layer at other times."""
    folder = name.rpartition(".")[0]
    parent = model.get_submodule(folder)
    if not isinstance(parent, nn.ModuleList | nn.ModuleDict):
        return None
    idle = [n for n, m in norms_of(parent).items() if "." not in n and m not in ran]
    return f"it may take turns with {folder}.{idle[0]}, which did not run" if idle else None


def _target(layer: Layer, owners: Mapping[int, Sequence[_Owner]]) -> _Target:
    name, _, weight = owners[id(layer.weight)][0]
    bias = "bias" if layer.bias is None else owners[id(layer.bias)][0].attribute
    return _Target(name, weight, bias, layer.dim, layer.groups)


def _unfit(norm: nn.Module, calls: Sequence[Call]) -> str | None:
    """What a norm itself has against it."""
    if not calls:
        return "it did not run on the example inputs"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "hooks are registered on it"
    return None


def _stuck(call: Call, seen: Seen, owners: Mapping[int, Sequence[_Owner]]) -> str | None:
    """What speaks against folding a norm into the layer that it read there."""
    layer = call.layer
    if layer is None:
        return "no conv or linear layer makes what it reads"
    if layer.weight is None:
        return "the layer before it computes its weight in each run, by a parametrization say"
    held = [owners[id(p)] for p in (layer.weight, layer.bias) if p is not None]
    name, module, _ = held[0][0]
    name = name or "the network"
    tied = [owner.name for some in held for owner in some[1:]]
    if tied:
        return f"{name} shares a parameter with {tied[0]}"
    if any(some[0].module is not module for some in held):
        return f"{name} has a bias of another module"
    if layer.bias is None and getattr(module, "bias", 0) is not None:
        return f"{name} has no place for a bias"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"hooks are registered on {name}"
    return _shared(call, layer, name, seen)


def _shared(call: Call, layer: Layer, name: str, seen: Seen) -> str | None:
    """What else a layer and a norm do than that the norm follows the layer."""
    parameters = [p for p in (layer.weight, layer.bias) if p is not None]
    runs = [x for x in seen.layers if x.weight is layer.weight]
    if any(id(p) in seen.elsewhere for p in parameters):
        return f"other operations read the parameters of {name}"
    if any(x.readers > len(x.norms) for x in runs):
        return f"something else reads what {name} makes"
    if any(norm is not call.norm for x in runs for norm in x.norms):
        return f"other norms read what {name} makes"
    if any(len(x.norms) != 1 for x in runs):
        return f"what {name} makes is not always normalised once"
    width = layer.weight.shape[layer.dim] * (layer.groups if layer.dim else 1)
    if not call.aligned or len(call.norm.running_mean) != width:
        return f"its channels are not those that {name} makes"
    return None if call.plain else "it does more than to scale and shift channels"
