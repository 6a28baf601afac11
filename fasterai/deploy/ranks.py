"""Which ranks a budget is best spent on.

What a layer of lower rank loses is the energy of its weights, the sum of their squares, that is
left out, as a share of all of it: of a matrix exactly the squares of its smallest singular values,
of a conv at most those of its two unfoldings added up (De Lathauwer et al., 2000).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Choice", "choices", "spent"]

_UNITS = 10_000


class Choice(NamedTuple):
    """A form that a layer may take.

    Args:
        cost: weights, or MACs.
        lost: share of the energy of its weights.
        ranks: of its parts; empty where it stays whole.
    """

    cost: float
    lost: float
    ranks: tuple[int, ...]


def choices(layer: nn.Module, places: tuple[int, int] = (1, 1)) -> list[Choice]:
    """All forms worth taking, the cheapest first: each loses less than those before it.

    Args:
        layer: a linear layer, or a conv without groups.
        places: how often it is applied to an input and gives an output, if MACs are to be counted.
    """
    weight = layer.weight.detach().cpu().double()
    (out, inside), size = weight.shape[:2], prod(weight.shape[2:])
    whole = float(places[1] * weight.numel())
    if size == 1:
        i = np.arange(1, min(out, inside) + 1, dtype=float)
        ranks, costs = i[:, None], i * (out + inside) * places[1]
        lost = _tails(weight if out < inside else weight.transpose(0, 1))
    else:
        i, o = np.arange(1.0, inside + 1)[:, None], np.arange(1.0, out + 1)
        ranks = np.stack(np.broadcast_arrays(i, o), -1).reshape(-1, 2)
        costs = (i * inside * places[0] + o * (i * size + out) * places[1]).ravel()
        lost = (_tails(weight.transpose(0, 1))[:, None] + _tails(weight)).ravel()
    order = np.lexsort((lost, costs))
    order = order[costs[order] < whole]
    least = np.minimum.accumulate(np.append(np.inf, lost[order]))
    order = order[lost[order] < least[:-1]]
    found = [Choice(float(costs[k]), float(lost[k]), tuple(map(int, ranks[k]))) for k in order]
    return [*found, Choice(whole, 0.0, ())]


def spent(budget: float, layers: Mapping[str, Sequence[Choice]]) -> dict[str, Choice] | None:
    """A choice for each layer, so that as little as can be is lost in all; None if none will do.

    By dynamic programming, layer after layer, over what may be spent beyond the cheapest choices,
    in whole units: of a weight or a MAC, or where those are many in ten thousands of the budget.
    """
    left = budget - sum(some[0].cost for some in layers.values())
    if left < 0:
        return None
    unit = max(1.0, left / _UNITS)
    n = int(left // unit)
    least, picks = np.zeros(n + 1), []
    for some in layers.values():
        extra = {ceil((c.cost - some[0].cost) / unit): k for k, c in enumerate(some)}
        best, pick = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=int)
        for units, k in extra.items():
            if units <= n:
                lost = least[: n + 1 - units] + some[k].lost
                better = lost < best[units:]
                best[units:][better], pick[units:][better] = lost[better], k
        least = best
        picks.append((pick, {k: units for units, k in extra.items()}))
    taken: dict[str, Choice] = {}
    for (name, some), (pick, units) in zip(reversed(layers.items()), reversed(picks), strict=True):
        taken[name] = some[pick[n]]
        n -= units[int(pick[n])]
    return _filled(budget, layers, taken)


def _filled(
    budget: float, layers: Mapping[str, Sequence[Choice]], taken: Mapping[str, Choice]
) -> dict[str, Choice]:
    """The same choices, or better ones for what rounding has left of the budget."""
    found, left = {}, budget - sum(choice.cost for choice in taken.values())
    for name, some in layers.items():
        most = taken[name].cost + left
        found[name] = [choice for choice in some if choice.cost <= most][-1]
        left = most - found[name].cost
    return found


def _tails(x: Tensor) -> np.ndarray:
    """(n,): the share of the energy of x (n, ...) lost in its best subspace of 1, 2, ..., n."""
    flat = x.flatten(1)
    values = torch.linalg.eigvalsh(flat @ flat.t()).clamp(min=0)  # the smallest first
    total = values.sum()
    lost = torch.cat([values.new_zeros(1), values.cumsum(0)[:-1]]).flip(0)
    return (lost / total if total else lost).numpy()
