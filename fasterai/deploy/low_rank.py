"""Layers as products of smaller ones: SVD of matrices, Tucker-2 of convs.

A matrix is cut to its largest singular values, which no other matrix of that rank comes closer to
(Eckart & Young, 1936). Of a conv both channel dimensions are cut: a 1x1 conv into a subspace of
the inputs, the conv between the subspaces, a 1x1 conv out of that of the outputs (Kim et al., 2016,
arXiv 1511.06530), by higher-order SVD and then alternating updates (De Lathauwer et al., 2000).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.masks import as_fraction
from ..core.names import LayerChoice, pick, unwrapped
from ..coupling.couple import couple
from ..coupling.inputs import Inputs, run_quietly, tensors_in
from ..coupling.probe import settle
from .comparison import copied

__all__ = ["factored", "low_rank"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROUNDS = 5  # of alternating updates


def low_rank(
    model: nn.Module,
    example_inputs: Any,
    share: float,
    *,
    layers: LayerChoice | Iterable[LayerChoice] | None = None,
    exclude: LayerChoice | Iterable[LayerChoice] = (),
) -> tuple[nn.Module, pd.DataFrame]:
    """A copy of a network whose layers are products of smaller ones, with fewer parameters.

    Each layer keeps at most that share of its weights, in the form of that size that is closest to
    it. The outputs change with that: train the copy on. It consists of plain layers alone.

    Args:
        model: the network; it is left as it was.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        share: of each layer's weights that remains, between 0 and 1.
        layers: names or types; default every linear layer and conv but the output layer.
        exclude: names or types of layers that stay.

    Returns:
        The copy, and a table: `layer`, `rank` (of a conv: in, out), `params_before`,
        `params_after`, `error` (distance of the weights, as a share of their norm) and, where a
        layer stays, the `reason`.

    Raises:
        ValueError: no fraction, an unknown layer, or inputs the network cannot be run on.
    """
    model, share = unwrapped(model), as_fraction(share, "share")
    inputs = Inputs.fitting(model, example_inputs)
    names = _chosen(model, inputs, layers, exclude)
    modules, owners = dict(model.named_modules()), _owners(model)
    rows: dict[str, dict[str, Any]] = {}
    new: dict[str, nn.Sequential] = {}
    for name in names:
        layer = modules[name]
        rows[name] = {"params_before": _size(layer), "reason": _unfit(layer, owners)}
        ranks = () if rows[name]["reason"] else _ranks(layer, share)
        if ranks:
            new[name] = factored(layer, *ranks)
            rows[name] |= _about(layer, new[name], ranks)
        elif not rows[name]["reason"]:
            rows[name]["reason"] = "no product of smaller layers is that small"
    for name, why in _breaking(model, inputs, new).items():
        del new[name]
        rows[name] = {"params_before": _size(modules[name]), "reason": why}
    columns = ["layer", "rank", "params_before", "params_after", "error", "reason"]
    table = pd.DataFrame([{"layer": name, **row} for name, row in rows.items()], columns=columns)
    return _with(model, new), table


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


def _ranks(layer: nn.Module, share: float) -> tuple[int, ...]:
    """Ranks that leave at most that share of a layer's weights; empty if there are none."""
    weight = layer.weight.detach().cpu().double()
    (out, inside), places = weight.shape[:2], prod(weight.shape[2:])
    most = int(share * weight.numel())
    if places == 1:
        rank = most // (out + inside)
        return (rank,) if rank else ()
    lost = [_tails(weight.transpose(0, 1)), _tails(weight)]
    found = []
    for i in range(1, inside + 1):
        o = min(out, (most - i * inside) // (i * places + out))
        if o > 0:
            found.append((float(lost[0][i] + lost[1][o]), (i, o)))
    return min(found)[1] if found else ()


def _tails(x: Tensor) -> Tensor:
    """What is lost of the squared norm of x (n, ...) in its best subspace of 0, 1, ..., n."""
    flat = x.flatten(1)
    values = torch.linalg.eigvalsh(flat @ flat.t()).clamp(min=0)  # the smallest first
    return torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)


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
    if any(owners[id(p)] > 1 for p in layer.parameters()):
        return "it shares a parameter with another layer"
    return "hooks are registered on it" if layer._forward_hooks or layer._forward_pre_hooks else ""


def _size(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def _about(layer: nn.Module, new: nn.Sequential, ranks: Sequence[int]) -> dict[str, Any]:
    first, *core, last = (part.weight.detach().cpu().double() for part in new)
    whole = torch.tensordot(last.flatten(1), core[0] if core else first, ([1], [0]))
    if core:
        whole = _onto(first.flatten(1), whole, 1)
    weight = layer.weight.detach().cpu().double()
    error = float((whole.reshape(weight.shape) - weight).norm() / weight.norm().clamp(min=1e-300))
    rank = ranks[0] if len(ranks) == 1 else tuple(ranks)
    return {"rank": rank, "params_after": _size(new), "error": error}


def _breaking(model: nn.Module, inputs: Inputs, new: Mapping[str, nn.Sequential]) -> dict[str, str]:
    """The layers without which a network does not run, and how it fails."""
    before = _shapes(model, inputs)

    def attempt(names: Sequence[str]) -> str | None:
        try:
            after = _shapes(_with(model, {name: new[name] for name in names}), inputs)
        except Exception as error:  # whatever code raises that looks for its layer
            return f"without it the network breaks: {type(error).__name__}: {error}"
        return None if after == before else f"without it the outputs have the shapes {after}"

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
