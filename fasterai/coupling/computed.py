"""Weights that are computed from a norm of all they are made of: what a cut leaves of them stays.

Weight norm divides directions by their norm, spectral norm a weight by its largest singular value.
Both count the channels that go. Lengths, or a singular vector, are multiplied so that what is left
of the weight has the values it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..core.names import raw_tensors
from .labels import Dim
from .surgery import positions_by_name, selected

__all__ = ["unchanged"]


class _Normed(NamedTuple):
    """The parts of a weight by their names, and what makes it of them."""

    maker: Any
    parts: tuple[str, ...]


def unchanged(model: nn.Module, kept: Mapping[Dim, Tensor]) -> dict[Dim, Tensor]:
    """Factors along dimensions, one a position before the cut; see `cutting`.

    Args:
        model: the network before the cut.
        kept: the positions that stay of each dimension that is cut.
    """
    cuts, found = positions_by_name(kept), {}
    tensors: Mapping[str, Tensor] = {}
    for maker, parts in _normed(model):
        if not any(name in cuts for name in parts):
            continue
        tensors = tensors or raw_tensors(model)
        whole = [tensors[name].detach().double() for name in parts]
        if isinstance(maker, WeightNorm | parametrizations._WeightNorm):
            factors = _lengths(whole[1], cuts.get(parts[1], {}), maker.dim)
            found[Dim(parts[0], maker.dim)] = factors
        else:
            left = [selected(x, cuts.get(n, {})) for n, x in zip(parts, whole, strict=True)]
            ratio = _largest(maker, *whole) / _largest(maker, *left)
            found[Dim(parts[1], 0)] = ratio.nan_to_num(1, 1, 1).expand(len(whole[1])).cpu()
    return found


def _normed(model: nn.Module) -> Iterator[_Normed]:
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm) and hook.dim >= 0:  # less is one length for all
                yield _Normed(hook, tuple(f"{start}{hook.name}_{k}" for k in "gv"))
            elif isinstance(hook, SpectralNorm):
                ends = ("orig", "u", "v")
                yield _Normed(hook, tuple(f"{start}{hook.name}_{k}" for k in ends))
        for name, made in (module._modules.get("parametrizations") or nn.ModuleDict()).items():
            inner = f"{start}parametrizations.{name}."
            if len(made) != 1:
                continue
            if isinstance(made[0], parametrizations._WeightNorm) and made[0].dim >= 0:
                yield _Normed(made[0], (f"{inner}original0", f"{inner}original1"))
            elif isinstance(made[0], parametrizations._SpectralNorm):
                yield _Normed(made[0], (f"{inner}original", f"{inner}0._u", f"{inner}0._v"))


def _lengths(directions: Tensor, cuts: Mapping[int, Tensor], dim: int) -> Tensor:
    """What is left of the norms of the directions, along `dim`."""
    left = selected(directions, {d: index for d, index in cuts.items() if d != dim})
    others = [d for d in range(directions.ndim) if d != dim]
    before, after = (x.square().sum(others).sqrt() for x in (directions, left))
    return torch.where(before > 0, after / before, 1.0).cpu()


def _largest(maker: Any, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The singular value that the weight is divided by."""
    reshape = getattr(maker, "_reshape_weight_to_matrix", None) or maker.reshape_weight_to_matrix
    return u @ (reshape(weight) @ v)
