"""Layers as products of smaller ones: SVD of matrices, Tucker-2 of convs.

A matrix is cut to its largest singular values, which no other matrix of that rank comes closer to
(Eckart & Young, 1936). Of a conv both channel dimensions are cut: a 1x1 conv into a subspace of
the inputs, the conv between the subspaces, a 1x1 conv out of that of the outputs (Kim et al., 2016,
arXiv 1511.06530), by higher-order SVD and then alternating updates (De Lathauwer et al., 2000).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.copies import copied
from ..core.masks import as_context, as_fraction
from ..core.names import LayerChoice, pick, unwrapped
from ..core.target import Target
from ..coupling.couple import couple
from ..coupling.hooks import hooked
from ..coupling.inputs import Inputs, run_quietly, tensors_in
from ..coupling.probe import settle
from ..measure.counts import macs, numbers_needed
from ..prune.budget import UnreachableTarget
from .comparison import running, still_read
from .ranks import Choice, choices, spent

__all__ = ["low_rank"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROUNDS = 5  # of alternating updates
_HALVINGS = 40  # of a share


def low_rank(
    model: nn.Module,
    example_inputs: Any,
    share: float | Target,
    *,
    context: str = "local",
    of: str = "weights",
    layers: LayerChoice | Iterable[LayerChoice] | None = None,
    exclude: LayerChoice | Iterable[LayerChoice] = (),
) -> tuple[nn.Module, pd.DataFrame]:
    """A copy of a network whose layers are products of smaller ones, within a budget.

    Each layer takes the form of its size that is closest to it, or stays whole. The outputs change
    with that: train the copy on. It consists of plain layers alone.

    Args:
        model: the network; it is left as it was.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        share: of the layers' weights or MACs that remains at most, between 0 and 1; or what the
            whole network may have, `Target(macs=...)` or `Target(parameters=...)`.
        context: 'local': that share of each layer; 'global': of all of them together, spent so
            that the layers keep most of the energy of their weights.
        of: 'weights' or 'macs'; a target says so itself.
        layers: names or types; default every linear layer and conv but the output layer.
        exclude: names or types of layers that stay.

    Returns:
        The copy, and a table: `layer`, `rank` (of a conv: in, out), `params_before`,
        `params_after`, `error` (distance of the weights, as a share of their norm) and, where a
        layer stays, the `reason`. A share is one of the layers that could be taken apart.

    Raises:
        ValueError: no fraction, an unknown layer, inputs the network cannot be run on, or a global
            share that ranks of 1 exceed.
        UnreachableTarget: products of smaller layers are not that small.
    """
    model, context = unwrapped(model), as_context(context)
    numbers_needed(model)
    target = share if isinstance(share, Target) else None
    if target is not None:
        of = _counted_by(target)
    elif of not in ("weights", "macs"):
        raise ValueError(f"of must be 'weights' or 'macs', got {of!r}")
    share = 1.0 if target is not None else as_fraction(share, "share")
    inputs = Inputs.fitting(model, example_inputs)
    modules, owners = dict(model.named_modules()), _owners(model)
    names = _chosen(model, inputs, layers, exclude)
    reasons = {name: _unfit(modules[name], owners) for name in names}
    counted = inputs if target is None else _one_sample(model, inputs)
    places = _places(model, counted, names) if of == "macs" else {}
    for name, (_, often) in places.items():
        reasons[name] = reasons[name] or ("" if often else "it did not run on the example inputs")
    forms = {n: choices(modules[n], places.get(n, (1, 1))) for n in names if not reasons[n]}
    budget = None if target is None else _Budget.of(target, model, counted)
    new: dict[str, nn.Sequential] = {}
    while True:
        taken: Mapping[str, Choice | None]
        taken = _taken(forms, share, context) if budget is None else budget.taken(forms, context)
        reasons |= {name: _why(choice) for name, choice in taken.items()}
        new = {n: _made(modules[n], c, new.get(n)) for n, c in taken.items() if c and c.ranks}
        failed = _breaking(model, inputs, new)
        if not failed:
            break
        reasons |= failed
        forms = {name: some for name, some in forms.items() if name not in failed}
    rows = [_row(name, modules[name], new.get(name), reasons[name]) for name in names]
    columns = ["layer", "rank", "params_before", "params_after", "error", "reason"]
    return _with(model, new), pd.DataFrame(rows, columns=columns)


def factored(layer: nn.Module, *ranks: int) -> nn.Sequential:
    """A layer as a product of smaller ones, the closest to it for these ranks.

    Args:
        layer: a linear layer, or a conv without groups.
        ranks: one for a linear layer or a conv of 1x1 kernels; else the channels between, in, out.

    Returns:
        Two linear layers or 1x1 convs; or a 1x1 conv, a conv and a 1x1 conv.
    """
    weight, biased = layer.weight.detach().cpu().double(), layer.bias is not None
    make = partial(type(layer), device="meta")  # draws no random numbers
    if isinstance(layer, nn.Linear):
        first = make(layer.in_features, ranks[0], False)
        last = make(ranks[0], layer.out_features, biased)
        return _filled(layer, [first, last], _product(weight, *ranks))
    how = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    last = make(ranks[-1], layer.out_channels, 1, bias=biased)
    if len(ranks) == 1:
        first = make(layer.in_channels, ranks[0], 1, bias=False, **how)
        return _filled(layer, [first, last], _product(weight.flatten(1), *ranks))
    first = make(layer.in_channels, ranks[0], 1, bias=False)
    core = make(ranks[0], ranks[1], layer.kernel_size, bias=False, **how)
    return _filled(layer, [first, core, last], _tucker(weight, *ranks))


def _filled(
    layer: nn.Module, parts: Sequence[nn.Module], weights: Sequence[Tensor]
) -> nn.Sequential:
    """These layers with these weights, and the bias, type, device and mode of the whole layer."""
    for part, weight in zip(parts, weights, strict=True):
        data = weight.reshape(part.weight.shape).to(layer.weight)
        part.weight = nn.Parameter(data, layer.weight.requires_grad)
    if layer.bias is not None:
        parts[-1].bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return nn.Sequential(*parts).train(layer.training)


def _product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(rank, in) and (out, rank), whose product is closest to (out, in)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _tucker(weight: Tensor, inside: int, outside: int) -> tuple[Tensor, Tensor, Tensor]:
    """(inside, in), (outside, inside, *) and (out, outside), by turns the best for each other."""
    into = _subspace(weight.transpose(0, 1), inside)
    for _ in range(_ROUNDS):
        out = _subspace(_onto(into, weight, 1), outside)
        into = _subspace(_onto(out, weight, 0).transpose(0, 1), inside)
    return into.t(), _onto(into, _onto(out, weight, 0), 1), out


def _subspace(x: Tensor, rank: int) -> Tensor:
    """An orthonormal basis (n, rank) of where most of x (n, ...) lies."""
    flat = x.flatten(1)
    return torch.linalg.eigh(flat @ flat.t())[1].flip(1)[:, :rank]


def _onto(basis: Tensor, x: Tensor, dim: int) -> Tensor:
    """The coordinates of x along a dimension in a basis (n, rank)."""
    return torch.tensordot(basis, x, ([0], [dim])).movedim(0, dim)


# --- how small, within the budget ----------------------------------------------------------------


def _counted_by(target: Target) -> str:
    """What the forms of layers cost under this target."""
    counted = {"macs": "macs", "parameters": "weights"}
    if target.kind not in counted or target.floors or target.caps:
        raise ValueError(
            f"low_rank counts macs or parameters and has no floors and caps of channels, got "
            f"{target}; pass Target(macs=0.5), or a share with of='weights'"
        )
    return counted[target.kind]


@dataclass(frozen=True)
class _Budget:
    """A target of the whole network, which is met by the layers that can be taken apart.

    Args:
        target: it.
        total: what the network costs, counted as the forms are.
        samples: for how many samples.
    """

    target: Target
    total: float
    samples: int = 1

    @classmethod
    def of(cls, target: Target, model: nn.Module, inputs: Inputs) -> _Budget:
        """The budget of a network, whose MACs are counted for these inputs."""
        if target.kind == "parameters":
            return cls(target, sum(p.numel() for p in model.parameters()))
        counted, samples = macs(model, inputs), inputs.samples or 1
        if not counted:
            raise ValueError(f"{target}: the MACs of this network cannot be counted")
        return cls(target, counted[""] * samples, samples)

    def taken(self, forms: Mapping[str, Sequence[Choice]], context: str) -> dict[str, Choice]:
        """The form of each layer: that of its share, or the smallest there is.

        Raises:
            UnreachableTarget: the smallest forms of all are too large.
        """
        goal = self.target.goal(self.total / self.samples) * self.samples
        rest = self.total - sum(some[-1].cost for some in forms.values())
        smallest = {name: some[0] for name, some in forms.items()}
        least = rest + _cost(smallest)
        if least > goal * (1 + 1e-12):
            part = least / (self.total if self.target.relative else self.samples)
            raise UnreachableTarget(
                f"{self.target} cannot be reached: with these layers as products {part:.4g} is the "
                f"least; pass more, or more layers",
                part,
            )
        if context == "global":
            return spent(max(goal - rest, _cost(smallest)), forms) or smallest
        costs = {name: [choice.cost for choice in some] for name, some in forms.items()}

        def at(share: float) -> dict[str, Choice]:
            within = {n: bisect_right(c, share * c[-1] * (1 + 1e-12)) for n, c in costs.items()}
            return {n: some[max(within[n], 1) - 1] for n, some in forms.items()}

        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if rest + _cost(at(middle)) <= goal else (low, middle)
        return at(1.0) if rest + _cost(at(1.0)) <= goal else at(low)


def _cost(taken: Mapping[str, Choice]) -> float:
    return sum(choice.cost for choice in taken.values())


def _one_sample(model: nn.Module, inputs: Inputs) -> Inputs:
    """A single sample where that runs: what is made once for a batch counts as `macs` does."""
    if (inputs.samples or 1) > 1:
        try:
            _shapes(model, inputs.batch(1))
        except Exception:  # of a network that wants several
            return inputs
        return inputs.batch(1)
    return inputs


def _taken(
    forms: Mapping[str, Sequence[Choice]], share: float, context: str
) -> Mapping[str, Choice | None]:
    """The form of each layer; None where all are too large."""
    whole = {name: some[-1].cost for name, some in forms.items()}
    if context == "local":
        within = {n: [c for c in some if c.cost <= share * whole[n]] for n, some in forms.items()}
        return {name: some[-1] if some else None for name, some in within.items()}
    found = spent(share * sum(whole.values()), forms)
    if found is None:
        least = sum(some[0].cost for some in forms.values()) / sum(whole.values())
        raise ValueError(
            f"a share of {share:g} cannot be reached: with ranks of 1 {least:.3f} remain; pass "
            f"more than that"
        )
    return found


def _why(choice: Choice | None) -> str:
    """Why a layer stays as it is, or ''."""
    if choice is None:
        return "no product of smaller layers is that small"
    return "" if choice.ranks else "the budget is enough for it as it is"


def _made(layer: nn.Module, choice: Choice, before: nn.Sequential | None) -> nn.Sequential:
    """A layer in that form, which may have been made before."""
    same = before is not None and _rank(before) == choice.ranks
    return before if same else factored(layer, *choice.ranks)


def _places(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """At how many places each layer reads and writes."""
    found = dict.fromkeys(names, (0, 0))

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            reads = tensors_in((args, kwargs))[0].numel() // layer.weight.shape[1]
            writes = out.numel() // layer.weight.shape[0]
            found[name] = found[name][0] + reads, found[name][1] + writes

        return hook

    layers = ((name, model.get_submodule(name)) for name in names)
    hooks = (m.register_forward_hook(watch(name), with_kwargs=True) for name, m in layers)
    with hooked(hooks), run_quietly(model):
        inputs(model)
    return found


def _rank(new: nn.Sequential) -> tuple[int, ...]:
    return tuple(part.weight.shape[0] for part in new[:-1])


# --- which layers, and what becomes of them ------------------------------------------------------


def _chosen(model: nn.Module, inputs: Inputs, layers: Any, exclude: Any) -> list[str]:
    if layers is None:
        outputs = set(couple(model, inputs).outputs)
        chosen = {name for name, _ in model.named_modules()} - outputs
    else:
        chosen = pick(model, layers, "layers")
    chosen -= pick(model, exclude, "exclude")
    known = nn.Linear, nn.modules.conv._ConvNd
    return [name for name, m in model.named_modules() if name in chosen and isinstance(m, known)]


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter."""
    own = (p for m in model.modules() for p in m._parameters.values() if p is not None)
    return Counter(map(id, own))


def _unfit(layer: nn.Module, owners: Mapping[int, int]) -> str:
    """Why a layer must stay, or ''."""
    if type(layer) not in _KINDS:
        return f"{type(layer).__name__} is no plain linear layer or conv"
    if getattr(layer, "groups", 1) > 1:
        return "it has groups"
    if not layer.weight.numel():
        return "it has no weights"
    if layer.weight.is_complex():
        return "its weights are complex numbers"
    if not layer.weight.detach().double().isfinite().all():
        return "some of its weights are inf or nan"
    if any(owners[id(p)] > 1 for p in layer.parameters()):
        return "it shares a parameter with another layer"
    return "hooks are registered on it" if layer._forward_hooks or layer._forward_pre_hooks else ""


def _size(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def _row(name: str, layer: nn.Module, new: nn.Sequential | None, reason: str) -> dict[str, Any]:
    row = {"layer": name, "params_before": _size(layer)}
    if new is None:
        return row | {"params_after": _size(layer), "reason": reason}
    first, *core, last = (part.weight.detach().cpu().double() for part in new)
    whole = torch.tensordot(last.flatten(1), core[0] if core else first, ([1], [0]))
    if core:
        whole = _onto(first.flatten(1), whole, 1)
    weight = layer.weight.detach().cpu().double()
    error = float((whole.reshape(weight.shape) - weight).norm() / weight.norm().clamp(min=1e-300))
    rank = _rank(new) if core else _rank(new)[0]
    return row | {"rank": rank, "params_after": _size(new), "error": error, "reason": ""}


def _breaking(model: nn.Module, inputs: Inputs, new: Mapping[str, nn.Sequential]) -> dict[str, str]:
    """The layers without which a network does not run, and how it fails."""
    before, ran = _shapes(model, inputs), running(model, inputs, new)

    def attempt(names: Sequence[str]) -> str | None:
        changed = _with(model, {name: new[name] for name in names})
        try:
            after = _shapes(changed, inputs)
        except Exception as error:  # whatever code raises that looks for its layer
            return f"without it the network breaks: {type(error).__name__}: {error}"
        if after != before:
            return f"without it the outputs have the shapes {after}"
        return still_read(changed, inputs, ran.intersection(names))

    failed: dict[str, str] = {}
    settle([], list(new), attempt, failed)
    return failed


def _shapes(model: nn.Module, inputs: Inputs) -> list[tuple[int, ...]]:
    with run_quietly(model):
        return [tuple(x.shape) for x in tensors_in(inputs(model))]


def _with(model: nn.Module, new: Mapping[str, nn.Sequential]) -> nn.Module:
    """A copy of a network with other layers in these places."""
    changed = copied(model)
    modules = dict(changed.named_modules())
    other = {id(modules[name]): copied(layer) for name, layer in new.items()}
    for parent in modules.values():
        for child, module in parent._modules.items():
            if id(module) in other:
                parent._modules[child] = other[id(module)]
    return other.get(id(changed), changed)
