"""Which groups of a network may be zeroed, and why others may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..core.granularity import Granularity, dimensions, maskable, maskable_kinds
from ..core.names import LayerChoice, as_choices, layer_of, layers_of, pick, plain
from ..core.warning import warn
from ..coupling.couple import couple
from ..coupling.inputs import Inputs
from ..coupling.labels import AVERAGED, NORMALISED, PRODUCE
from ..coupling.units import FROZEN, Axis, Coupling
from .groups import Groups, LayerGroups, UnitGroups, WeightGroups
from .patterns import PatternGroups

__all__ = ["Choice", "NothingToSparsify", "choose"]

_OUTPUT = "network output"


class NothingToSparsify(ValueError):
    """No group of the chosen layers may be zeroed; `frozen` where that is because of freezing."""

    def __init__(self, message: str, frozen: bool = False) -> None:
        super().__init__(message)
        self.frozen = frozen


@dataclass(frozen=True)
class Choice:
    """What may be zeroed.

    Args:
        groups: by layer, or by axis of coupled layers.
        skipped: why a layer is left alone.
        inputs: what the network was run on; None where it was not.
        frozen_share: the share of the weights of the chosen layers that is frozen.
    """

    groups: tuple[Groups, ...]
    skipped: Mapping[str, str]
    inputs: Inputs | None
    frozen_share: float


def choose(
    model: nn.Module,
    granularity: Granularity,
    layers: LayerChoice | Iterable[LayerChoice] | None,
    exclude: LayerChoice | Iterable[LayerChoice],
    example_inputs: Any,
    mixed: bool = False,
    whole_heads: bool = False,
) -> Choice:
    """Find the groups of a network; see `Sparsifier` for the arguments.

    Raises:
        NothingToSparsify: there are none; the reasons are told.
    """
    named = layers is not None
    chosen = {
        name: layer
        for name, layer in _chosen(model, layers, exclude).items()
        if granularity.is_filter or maskable(layer, on_request=named)
    }
    inputs, coupling = _coupled(model, example_inputs, granularity.is_filter, whole_heads)
    if granularity.is_filter and coupling is not None:
        groups, skipped = _units(model, coupling, chosen, mixed)
    else:
        outputs = _output_layers(model, coupling) if layers is None else ()
        groups, skipped = _inside_layers(model, granularity, chosen, outputs)
    if not groups:
        raise NothingToSparsify(_nothing(granularity, skipped), FROZEN in skipped.values())
    told = [*skipped, *(name for g in groups for name in g.layers)]
    _warn_of_empty(layers, [*told, *pick(model, exclude, "exclude")], granularity)
    return Choice(tuple(groups), skipped, inputs, _frozen_share(chosen, skipped))


def _warn_of_empty(layers: Any, known: Collection[str], granularity: Granularity) -> None:
    """Warn of named layers and blocks of which nothing can be sparsified."""
    names = () if layers is None else [x for x in as_choices(layers) if isinstance(x, str)]
    empty = [name for name in names if not layers_of(name, {plain(k) for k in known})]
    if empty:
        warn(
            f"nothing of {', '.join(map(repr, empty))} can be sparsified by {granularity.name!r}: "
            f"no weights there have such groups; what has is in Sparsifier(model).report()",
        )


def _frozen_share(chosen: Mapping[str, nn.Module], skipped: Mapping[str, str]) -> float:
    weights = [
        weight
        for name, layer in chosen.items()
        if skipped.get(name) != _OUTPUT
        for weight in _weights(layer).values()
    ]
    frozen = sum(w.numel() for w in weights if not w.requires_grad)
    return frozen / max(sum(w.numel() for w in weights), 1)


def _weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that have granularities, as they are stored: not what a parametrization makes."""
    own = layer._parameters
    return {k: own[k] for k in dimensions(layer) if own.get(k) is not None}


def _inside_layers(
    model: nn.Module,
    granularity: Granularity,
    chosen: Mapping[str, nn.Module],
    outputs: Sequence[str],
) -> tuple[list[Groups], dict[str, str]]:
    parameters = {id(p): name for name, p in model.named_parameters()}
    sharing, sizes = _sharing(model)
    groups: dict[int, Groups] = {}
    skipped: dict[str, str] = {}
    for name, layer in chosen.items():
        weights = _weights(layer)
        owners = {layer_of(parameters[id(w)]) for w in weights.values()}
        if not owners.isdisjoint(outputs) or name in outputs:  # a tied weight has one name
            skipped[name] = _OUTPUT
            continue
        skipped.update({name if not weights else f"{name}.{k}": r for k, r in _absent(layer)})
        for key, weight in weights.items():
            own = name if len(weights) == 1 else f"{name}.{key}"
            share = sharing[name], weight.numel() / max(sizes[sharing[name]], 1)
            dims = dimensions(layer)[key]
            rows = max(dims.find("o"), 0)
            whole = WeightGroups(own, name, parameters[id(weight)], weight, share=share, rows=rows)
            found = _cut(whole, layer, dims, granularity)
            if isinstance(found, str):
                skipped[own] = found
            elif not weight.requires_grad:
                skipped[own] = FROZEN
            elif id(weight) in groups:
                skipped[own] = f"its weight is that of {groups[id(weight)].layer!r}"
            elif weight.numel():
                groups[id(weight)] = found
    return list(groups.values()), skipped


def _sharing(model: nn.Module) -> tuple[dict[str, str], Counter[str]]:
    """For each layer by name the outermost around it, and the weights in each of these.

    Attention holds a linear layer, dropout of weights the recurrent layer whose weights drop out:
    only together have they MACs.
    """
    outermost: dict[str, str] = {}
    sizes: Counter[str] = Counter()
    for name, layer in model.named_modules():
        if maskable(layer, on_request=True):
            parts = name.split(".")
            around = ("", *(".".join(parts[:k]) for k in range(1, len(parts))), name)
            outermost[name] = next(k for k in around if k in outermost or k == name)
            sizes[outermost[name]] += sum(w.numel() for w in _weights(layer).values())
    return outermost, sizes


def _absent(layer: nn.Module) -> list[tuple[str, str]]:
    """Weights that cannot be zeroed because they are no parameters, and why."""
    found = []
    for key in dimensions(layer):
        if is_parametrized(layer, key) or key in vars(layer):  # hasattr would compute it
            found.append((key, f"its {key} is computed (a parametrization), not a parameter"))
        elif key not in layer._parameters:
            found.append((key, f"it has no parameter {key!r}"))
    return found or ([] if _weights(layer) else [("weight", "it has no weight")])


def _cut(
    whole: WeightGroups, layer: nn.Module, dims: str, granularity: Granularity
) -> Groups | str:
    """The groups of one weight of a layer, or why it has none."""
    who, kind = vars(whole), type(layer).__name__
    if whole.weight.ndim != len(dims):
        raise ValueError(
            f"{whole.parameter} has the shape {tuple(whole.weight.shape)}, but the dimensions of "
            f"{kind} are registered as {' '.join(dims)!r}: give register() a letter for each"
        )
    if granularity.pattern is None:
        group = granularity.group_shape(dims, whole.weight.shape)
        if group is not None:
            return LayerGroups(**who, group=group)
    elif "i" in dims:
        n, m = granularity.pattern
        parts = layer.groups if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1
        found = PatternGroups(**who, dim=dims.index("i"), keep=n, of=m, parts=parts)
        if found.free:
            return found
        return f"too few inputs for {granularity.name!r}: {found.inputs}"
    return f"{kind} has no granularity {granularity.name!r}"


def _units(
    model: nn.Module, coupling: Coupling, chosen: Mapping[str, nn.Module], mixed: bool
) -> tuple[list[Groups], dict[str, str]]:
    tensors = dict(model.named_parameters())
    groups: list[Groups] = []
    skipped: dict[str, str] = {}
    seen: set[str] = set()
    for axis in coupling.axes:
        seen.update(axis.producers)
        if not set(axis.producers) & set(chosen):
            continue
        axis = _without(axis, chosen, tensors)
        if axis.mixed is not None and not (mixed and axis.mixed in (AVERAGED, NORMALISED)):
            axis = axis.pinned(axis.mixed)
        if axis.bundles:
            groups.append(UnitGroups(axis, tensors))
        else:
            name = next(name for name in axis.producers if name in chosen)
            skipped[name] = next(filter(None, axis.pins))
    owners = {id(p): layer_of(name) for name, p in tensors.items()}
    for name, layer in chosen.items():
        if maskable(layer) and name not in seen:
            owner = next((owners[id(w)] for w in _weights(layer).values()), name)
            skipped[name] = (
                "no channels found: never run on the example inputs, a single one, or made in a "
                "way that is not understood"
                if owner == name
                else f"its weight is that of {owner!r}"
            )
    return groups, skipped


def _without(axis: Axis, chosen: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Axis:
    """The axis with its units pinned where layers coupled to it are not chosen, or frozen."""
    others = [name for name in axis.producers if name not in chosen]
    why = f"coupled to {', '.join(map(repr, others))}, which must be chosen, too"
    for slot in axis.having(PRODUCE):
        if slot.module in others:
            axis = axis.pinned(why, slot.unit.tolist())
    return axis.trained(tensors)


def _chosen(model: nn.Module, layers: Any, exclude: Any) -> dict[str, nn.Module]:
    names = None if layers is None else pick(model, layers, "layers")
    left_out = pick(model, exclude, "exclude")
    modules = dict(model.named_modules())
    tied = {id(w) for name in left_out for w in _weights(modules[name]).values()}
    return {
        name: m
        for name, m in modules.items()
        if name not in left_out and (names is None or name in names)
        if tied.isdisjoint(map(id, _weights(m).values()))
    }


def _coupled(
    model: nn.Module, example_inputs: Any, needed: bool, whole_heads: bool
) -> tuple[Inputs | None, Coupling | None]:
    guessed = example_inputs is None
    if guessed:
        example_inputs = _default_inputs(model)
    if example_inputs is None:
        if needed:
            raise ValueError("granularity 'filter' needs example_inputs, to see what is coupled")
        return None, None
    try:
        inputs = Inputs.fitting(model, example_inputs)
    except ValueError as error:
        if guessed and needed:
            raise ValueError(f"pass example_inputs: on a random image, {error}") from error
        if guessed:
            return None, None
        raise
    return inputs, couple(model, inputs, whole_heads=whole_heads)


def _default_inputs(model: nn.Module) -> Tensor | None:
    first = next((m for m in model.modules() if maskable(m)), None)
    if not isinstance(first, nn.Conv2d):
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, first.in_channels, 64, 64, generator=generator).to(first.weight)


def _output_layers(model: nn.Module, coupling: Coupling | None) -> tuple[str, ...]:
    """The layers that make the outputs; without a run, the last one registered."""
    if coupling is not None:
        return coupling.outputs
    names = [name for name, m in model.named_modules() if maskable(m)]
    return tuple(names[-1:])


def _nothing(granularity: Granularity, skipped: Mapping[str, str]) -> str:
    if not skipped:
        return f"the model has nothing to sparsify: no {maskable_kinds()} are chosen"
    reasons = "; ".join(f"{k}: {why}" for k, why in list(skipped.items())[:5])
    return f"the model has nothing to sparsify by {granularity.name!r}: {reasons}"
