"""Zeros in the weights of a network, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.criteria import Criterion, as_criterion, large_final
from ..core.granularity import Granularity, dimensions, maskable_types
from ..core.masks import Limits, apply_masks, as_fraction, select
from ..core.names import LayerChoice, pick, unknown_name
from ..coupling.inputs import Inputs
from ..coupling.labels import PRODUCE, SCALE, SHIFT
from ..coupling.units import Axis, Coupling, couple
from ..measure.profile import macs
from .groups import Groups, LayerGroups, UnitGroups

__all__ = ["NothingToSparsify", "Sparsifier", "Sparsity"]

Sparsity = float | Mapping[str, float]

_FROZEN = "frozen (requires_grad is False)"


class NothingToSparsify(ValueError):
    """No group of the chosen layers may be zeroed; `frozen` where that is because of freezing."""

    def __init__(self, message: str, frozen: bool) -> None:
        super().__init__(message)
        self.frozen = frozen


class Sparsifier:
    """Zeroes exactly the asked share of a network's groups and keeps them at zero.

    ```python
    sparsifier = Sparsifier(model, 'filter', example_inputs=x)
    sparsifier.sparsify_model(0.5)       # now
    for xb, yb in batches:
        ...
        optimizer.step()
        sparsifier.apply()               # after each step
    ```
    Zeros that the model already has stay zero. Nothing is attached to the model.

    Args:
        model: any network.
        granularity: which weights go together: 'weight', 'row', 'column', 'kernel', 'filter', ...
            or a set of dimensions such as 'o h'. 'filter' zeroes whole units, with their biases
            and the scales and shifts of their norms, together with the filters they are added
            to, so that `Pruner` can remove them.
        context: 'local' reaches the sparsity in each layer, 'global' over all of them.
        criteria: scores of weights, higher = keep.
        layers: names or types of the layers to sparsify, or names of blocks; default every conv
            and linear layer but the output layer.
        exclude: names or types of layers to leave alone.
        min_keep: groups that stay in each layer, at least.
        round_to: the number of groups kept becomes a multiple of this.
        example_inputs: what the model's forward takes; 'filter' needs them, other granularities
            find the output layer with them. Default, where the first layer is a Conv2d, one
            random image of 64 x 64.

    Raises:
        ValueError: unknown names, a model with nothing to sparsify, or inputs it cannot run on.
    """

    def __init__(
        self,
        model: nn.Module,
        granularity: str = "weight",
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        *,
        layers: LayerChoice | Iterable[LayerChoice] | None = None,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        min_keep: int = 1,
        round_to: int = 1,
        example_inputs: Any = None,
    ) -> None:
        if context not in ("local", "global"):
            raise ValueError(f"context must be 'local' or 'global', got {context!r}")
        self.model = model
        self.granularity = Granularity(granularity)
        self.context = context
        self.criteria = as_criterion(criteria)
        self.limits = Limits(min_keep, round_to)
        self.skipped: dict[str, str] = {}
        self.asked: tuple[float, ...] | None = None
        self._named = layers is not None
        chosen = _chosen(model, layers, exclude)
        self._inputs, coupling = _coupled(model, example_inputs, self.granularity.is_filter)
        self._groups: list[Groups]
        if self.granularity.is_filter:
            assert coupling is not None
            self._groups = self._units(coupling, chosen)
        else:
            self._groups = self._inside_layers(coupling, chosen)
        if not self._groups:
            raise NothingToSparsify(self._nothing(), _FROZEN in self.skipped.values())
        covered = {k: p for g in self._groups for k, p in g.parameters.items()}
        self._covered = covered
        self._shapes = {name: p.shape for name, p in covered.items()}
        self.masks: dict[str, Tensor] = {
            name: torch.ones_like(p, dtype=torch.uint8) for name, p in covered.items()
        }
        self._set(self._held())

    # --- public --------------------------------------------------------------------------------

    def sparsify_model(self, sparsity: Sparsity) -> nn.Module:
        """Zero this share of the groups now, the lowest scores first, and return the model.

        Args:
            sparsity: a fraction in [0, 1], or {layer name: fraction}; layers not named stay as
                they are. What is zero already stays, also where the fraction is smaller.
        """
        self.sparsify_to(self.targets(sparsity))
        return self.model

    def apply(self) -> None:
        """Write +0.0 where the masks are 0; call after each optimizer step."""
        if self._any:
            apply_masks(list(self._covered.values()), list(self.masks.values()))

    def report(self) -> pd.DataFrame:
        """What was asked and what the model holds now, a row a layer; last 'total'.

        Columns: `layer`; `coupled`, further layers whose filters go with its own; `groups` that
        may be zeroed; `asked`, the fraction; `n`, the groups that is; `zeros` there are;
        `reached`, their share; `limit`, what made the difference, or why a layer was skipped;
        `weights`, `parameters` and `macs` (one sample), in all and zero. Zeros save no MACs
        until they are removed.
        """
        now = dict(self.model.named_parameters())
        if any(p.shape != self._shapes[name] for name, p in now.items() if name in self._shapes):
            raise RuntimeError(
                "the model was pruned since it was sparsified: take this report before pruning, "
                "or ask the Pruner for its own"
            )
        counted = macs(self.model, self._inputs) if self._inputs is not None else {}
        rows = [self._row(i, counted) for i in range(len(self._groups))]
        table = pd.DataFrame(rows)
        sums = table.select_dtypes("number").sum().to_dict()
        total = {"layer": "total", "coupled": "", "limit": ""}
        total |= {k: int(sums[k]) for k in ("groups", "zeros", *_TALLY)}
        total["n"] = round(self.asked[0] * total["groups"]) if self._global_asked else int(sums["n"])
        total["asked"] = self.asked[0] if self._global_asked else total["n"] / total["groups"]
        total["reached"] = total["zeros"] / total["groups"]
        if self._global_asked and total["zeros"] != total["n"]:
            total["limit"] = "min_keep or round_to" if total["zeros"] < total["n"] else "held"
        skipped = [{"layer": k, "groups": 0, "limit": why} for k, why in self.skipped.items()]
        table = pd.DataFrame([*rows, *skipped, total])
        whole = ["groups", "n", "zeros", *_TALLY]
        return table.astype({k: "Int64" for k in whole}).fillna({"coupled": ""})

    def reached(self) -> float:
        """The share of the groups that the masks zero."""
        return self._zeros / sum(g.free for g in self._groups)

    # --- for callbacks -------------------------------------------------------------------------

    def targets(self, sparsity: Sparsity) -> tuple[float, ...]:
        """A sparsity as fractions: one for each of the layers, or one for all under 'global'."""
        if not isinstance(sparsity, Mapping):
            count = 1 if self.context == "global" else len(self._groups)
            return (as_fraction(sparsity),) * count
        if self.context == "global":
            raise ValueError("a sparsity for each layer needs context='local', got 'global'")
        wanted = [dict[str, float]() for _ in self._groups]
        for name, value in sparsity.items():
            fraction = as_fraction(value, f"sparsity of {name!r}")
            owners = [i for i, g in enumerate(self._groups) if name in g.layers]
            if not owners:
                raise ValueError(self._no_such(name))
            for i in owners:
                wanted[i][name] = fraction
        for group, given in zip(self._groups, wanted, strict=True):
            if len(set(given.values())) > 1:
                raise ValueError(
                    f"these layers are coupled and need one sparsity: {given} "
                    f"(all of them: {', '.join(group.layers)})"
                )
        return tuple(next(iter(given.values()), 0.0) for given in wanted)

    def held(self) -> tuple[float, ...]:
        """The share of the groups that is zero in the model, in the form of `targets`."""
        zeros = [int(z.sum()) for z in self._held()]
        free = [g.free for g in self._groups]
        if self.context == "global":
            return (sum(zeros) / sum(free),)
        return tuple(z / n for z, n in zip(zeros, free, strict=True))

    def sparsify_to(self, targets: Sequence[float]) -> None:
        """Zero these fractions; see `targets`."""
        self.asked = tuple(targets)
        free = [g.free for g in self._groups]
        if self.context == "global":
            counts: int | list[int] = round(targets[0] * sum(free))
        else:
            counts = [round(s * n) for s, n in zip(targets, free, strict=True)]
        held = self._held()
        if self._more(counts, held):
            relative = self.context == "global"
            scores = [g.scores(self.criteria, relative=relative) for g in self._groups]
            sizes = [g.size for g in self._groups]
            held = select(scores, counts, held=held, sizes=sizes, limits=self.limits)
        self._set(held)
        self.apply()

    def release(self) -> None:
        """Let go of the masks; reports go on working."""
        self.masks, self._any = {}, False

    @property
    def frozen_share(self) -> float:
        """The share of the weights of the chosen layers that is frozen."""
        return self._frozen / max(self._chosen_weights, 1)

    # --- inside --------------------------------------------------------------------------------

    @property
    def _global_asked(self) -> bool:
        return self.asked is not None and self.context == "global"

    def _held(self) -> list[Tensor]:
        return [g.zeroed() for g in self._groups]

    @staticmethod
    def _more(counts: int | Sequence[int], held: Sequence[Tensor]) -> bool:
        have = [int(h.sum()) for h in held]
        if isinstance(counts, int):
            return counts > sum(have)
        return any(n > h for n, h in zip(counts, have, strict=True))

    def _set(self, zero: Sequence[Tensor]) -> None:
        for group, z in zip(self._groups, zero, strict=True):
            group.write(z, self.masks)
        self._zeros = sum(int(z.sum()) for z in zero)
        self._any = self._zeros > 0

    def _inside_layers(self, coupling: Coupling | None, chosen: dict[str, nn.Module]) -> list[Groups]:
        if not self._named:
            for name in _output_layers(self.model, coupling):
                if chosen.pop(name, None) is not None:
                    self.skipped[name] = "network output"
        parameters = {id(p): name for name, p in self.model.named_parameters()}
        self._count_frozen([m.weight for m in chosen.values()])
        groups: dict[int, Groups] = {}
        for name, layer in chosen.items():
            along = self.granularity.along(dimensions(layer) or "")
            if along is None:
                self.skipped[name] = (
                    f"{type(layer).__name__} has no granularity {self.granularity.name!r}"
                )
            elif id(layer.weight) not in parameters:
                self.skipped[name] = "its weight is computed (a parametrization), not a parameter"
            elif not layer.weight.requires_grad:
                self.skipped[name] = _FROZEN
            elif id(layer.weight) not in groups and layer.weight.numel():
                parameter = parameters[id(layer.weight)]
                groups[id(layer.weight)] = LayerGroups(name, parameter, layer.weight, along)
        return list(groups.values())

    def _units(self, coupling: Coupling, chosen: dict[str, nn.Module]) -> list[Groups]:
        tensors = dict(self.model.named_parameters())
        self._count_frozen([m.weight for m in chosen.values()])
        groups: list[Groups] = []
        seen: set[str] = set()
        for axis in coupling.axes:
            seen.update(axis.producers)
            if not set(axis.producers) & set(chosen):
                continue
            axis = _without(axis, chosen, tensors)
            if len(axis.free):
                groups.append(UnitGroups(axis, tensors))
            else:
                self.skipped[axis.name] = axis.pins[0] or ""
        for name in chosen:
            if name not in seen:
                self.skipped[name] = "never run on the example inputs, or of a single channel"
        return groups

    def _count_frozen(self, weights: Sequence[Tensor]) -> None:
        self._chosen_weights = sum(w.numel() for w in weights)
        self._frozen = sum(w.numel() for w in weights if not w.requires_grad)

    def _nothing(self) -> str:
        if not self.skipped:
            kinds = ", ".join(t.__name__ for t in maskable_types())
            return f"the model has nothing to sparsify: no layer of the types {kinds} is chosen"
        reasons = "; ".join(f"{k}: {why}" for k, why in list(self.skipped.items())[:5])
        return f"the model has nothing to sparsify by {self.granularity.name!r}: {reasons}"

    def _no_such(self, name: str) -> str:
        if name in self.skipped:
            return f"layer {name!r} cannot be sparsified: {self.skipped[name]}"
        if name in dict(self.model.named_modules()):
            return f"layer {name!r} is not among the layers to sparsify"
        return unknown_name(name, [k for g in self._groups for k in g.layers], "sparsity")

    def _row(self, i: int, counted: Mapping[str, int]) -> dict[str, Any]:
        group = self._groups[i]
        zeros = int(group.zeroed().sum())
        local = self.asked is not None and self.context == "local"
        asked = self.asked[i] if local and self.asked else float("nan")
        n = round(asked * group.free) if local else pd.NA
        limit = ""
        if local and zeros != n:
            limit = "held" if zeros > n else self._bound(group, n)
        return {
            "layer": group.name,
            "coupled": ", ".join(k for k in group.layers if k != group.name),
            "groups": group.free,
            "asked": asked,
            "n": n,
            "zeros": zeros,
            "reached": zeros / group.free,
            "limit": limit,
            **group.tally(counted),
        }

    def _bound(self, group: Groups, n: int) -> str:
        return "min_keep" if self.limits.most(group.size, group.free) < n else "round_to"


_TALLY = ("weights", "zero_weights", "parameters", "zero_parameters", "macs", "zero_macs")


def _chosen(model: nn.Module, layers: Any, exclude: Any) -> dict[str, nn.Module]:
    names = None if layers is None else pick(model, layers, "layers")
    left_out = pick(model, exclude, "exclude")
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, maskable_types())
        and name not in left_out
        and (names is None or name in names)
    }


def _coupled(
    model: nn.Module, example_inputs: Any, needed: bool
) -> tuple[Inputs | None, Coupling | None]:
    guessed = example_inputs is None
    if guessed:
        example_inputs = _default_inputs(model)
    if example_inputs is None:
        if needed:
            raise ValueError("granularity 'filter' needs example_inputs, to see what is coupled")
        return None, None
    inputs = Inputs.of(example_inputs)
    inputs.check(model)
    try:
        return inputs, couple(model, inputs)
    except ValueError as error:
        if guessed and needed:
            raise ValueError(f"pass example_inputs: on a random image of 64 x 64, {error}") from error
        if guessed:
            return None, None
        raise


def _default_inputs(model: nn.Module) -> Tensor | None:
    first = next((m for m in model.modules() if isinstance(m, maskable_types())), None)
    if not isinstance(first, nn.Conv2d):
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, first.in_channels, 64, 64, generator=generator).to(first.weight)


def _output_layers(model: nn.Module, coupling: Coupling | None) -> tuple[str, ...]:
    """The layers that make the outputs; without a run, the last one registered."""
    if coupling is not None:
        return coupling.outputs
    names = [name for name, m in model.named_modules() if isinstance(m, maskable_types())]
    return tuple(names[-1:])


def _without(axis: Axis, chosen: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Axis:
    """The axis with its units pinned where layers coupled to it are not chosen, or frozen."""
    for slot in axis.having(PRODUCE):
        if slot.module not in chosen:
            units = slot.unit.tolist()
            axis = axis.pinned(f"coupled to {slot.module!r}, which is not chosen", units)
    for slot in axis.having(PRODUCE, SCALE, SHIFT):
        p = tensors.get(slot.parameter)
        if p is not None and not p.requires_grad:
            axis = axis.pinned(_FROZEN, slot.unit.tolist())
    return axis
