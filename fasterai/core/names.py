"""Layers picked by name or type, with errors that name near matches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LayerChoice",
    "as_choices",
    "by_layer",
    "first_names",
    "frozen_of",
    "layer_of",
    "layers_of",
    "modules_by_name",
    "must_be_module",
    "pick",
    "plain",
    "raw_tensors",
    "tensors_by_name",
    "unknown_name",
    "unwrapped",
]

LayerChoice = str | type[nn.Module]


def as_choices(choices: LayerChoice | Iterable[LayerChoice]) -> tuple[LayerChoice, ...]:
    """One choice or several as a tuple."""
    if isinstance(choices, str | type):
        return (choices,)
    if not isinstance(choices, Iterable):
        raise TypeError(
            f"layers are chosen by names and types, in a list or alone, got {choices!r}"
        )
    return tuple(choices)


def pick(model: nn.Module, choices: LayerChoice | Iterable[LayerChoice], argument: str) -> set[str]:
    """Names of all modules that are chosen: by name, inside a named block, or by type.

    Raises:
        ValueError: a name the model does not have; near matches are listed.
        TypeError: neither a name nor a module type.
    """
    must_be_module(model)
    names = {name: plain(name) for name, _ in model.named_modules()}
    chosen: set[str] = set()
    for choice in as_choices(choices):
        if isinstance(choice, str):
            if choice not in names.values() or not choice:
                raise ValueError(unknown_name(choice, names.values(), argument))
            inside = f"{choice}."
            chosen.update(n for n, k in names.items() if k == choice or k.startswith(inside))
        elif isinstance(choice, type) and issubclass(choice, nn.Module):
            chosen.update(n for n, m in model.named_modules() if isinstance(m, choice))
        else:
            raise TypeError(f"{argument} takes module names and types, got {choice!r}")
    return chosen


def layer_of(parameter: str) -> str:
    """The layer that a parameter or buffer is named after, also where it is computed of others.

    >>> layer_of("1.conv.weight"), layer_of("1.conv.parametrizations.weight.original0")
    ('1.conv', '1.conv')
    """
    layer = parameter.rpartition(".")[0]
    return f".{layer}".partition(".parametrizations.")[0][1:]


def must_be_module(model: Any) -> None:
    """Raise a TypeError where it is none, as where a Learner is passed."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model must be a torch.nn.Module, got a ScriptModule, whose code is fixed: pass the "
            "module that it was made of"
        )
    if not isinstance(model, nn.Module):
        fix = "; pass learn.model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{fix}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of `torch.compile`, DataParallel and DistributedDataParallel.

    Raises:
        TypeError: no module.
    """
    must_be_module(model)
    inner = model._modules.get("_orig_mod")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = model.module
    return model if inner is None else unwrapped(inner)


def tensors_by_name(network: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those that are tied under each of their names.

    The names are without what `torch.compile` of a block puts into them.
    """
    parameters = network.named_parameters(remove_duplicate=False)
    buffers = network.named_buffers(remove_duplicate=False)
    return {plain(name): tensor for name, tensor in [*parameters, *buffers]}


def raw_tensors(network: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by torch's own names, each once."""
    return dict([*network.named_parameters(), *network.named_buffers()])


def modules_by_name(network: nn.Module) -> dict[str, nn.Module]:
    """All modules by such names, those that are used twice under each of them."""
    return {plain(name): m for name, m in network.named_modules(remove_duplicate=False)}


def first_names(named: Mapping[str, Any]) -> dict[int, str]:
    """For each object, by its id, the first of its names."""
    found: dict[int, str] = {}
    for name, x in named.items():
        found.setdefault(id(x), name)
    return found


def plain(name: str) -> str:
    """A module's name without what `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def layers_of(name: str, layers: Collection[str]) -> list[str]:
    """The layer of that name, if it is one, else those in the block of that name."""
    return [name] if name in layers else [k for k in layers if k.startswith(f"{name}.")]


def by_layer(shares: Mapping[str, float], layers: Collection[str]) -> dict[str, float]:
    """The share of each layer that is asked something; of several names the innermost counts."""
    found = {}
    for name in sorted(shares, key=len):
        found.update(dict.fromkeys(layers_of(name, layers), shares[name]))
    return found


def frozen_of(names: Iterable[str], live: Mapping[str, bool]) -> list[str]:
    """The layers and blocks, of these names, of whose layers none trains: {layer: it trains}."""
    found = {name: layers_of(name, live) for name in names}
    return [name for name, own in found.items() if own and not any(live[x] for x in own)]


def unknown_name(name: str, known: Iterable[str], argument: str, which: str = "") -> str:
    """The message for a layer that does not exist, or is none of those `which` are meant."""
    known = list(dict.fromkeys(n for n in known if n))
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    wrapped = [k for k in known if name.removeprefix("module.") == k or plain(name) == k]
    if wrapped:
        return f"{argument}: names go without what wraps the model: {wrapped[0]!r}, not {name!r}"
    some = ", ".join(map(repr, known[:4])) + ", ..." * (len(known) > 4)
    other = f"; there are {some}" if which and known else "; see model.named_modules()"
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else other
    return f"{argument}: the model has no layer {name!r}{f' {which}' * bool(which)}{hint}"
