"""How well criteria rank what the oracle ranks: Spearman's rank correlation, layer by layer.

The comparison is that of Molchanov et al., "Pruning Convolutional Neural Networks for Resource
Efficient Inference", 2017, https://arxiv.org/abs/1611.06440.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from ..core.criteria import Criterion, as_criterion
from ..core.gathered import GATHERED
from ..core.names import plain, unwrapped
from ..coupling.ranking import unit_scores
from .oracle import Oracle, oracle
from .score import score

__all__ = ["criteria_report"]

_Criteria = Sequence[Criterion] | Mapping[str, Criterion]


def criteria_report(
    model: nn.Module,
    dl: Iterable[Any],
    criteria: _Criteria,
    *,
    loss_func: Callable[..., Tensor],
    measured: Oracle | None = None,
    absolute: bool = False,
    n_batches: int | None = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """Spearman's rank correlation of criteria with the true change of the loss.

    A column is a criterion. A row is a group of coupled layers, named as in `Pruner.axes()`, with
    the correlation over its own units; then come `'mean of layers'` and `'all layers'`, the
    correlation over the units of all of them at once, scores normalised as in a global ranking.
    1 is the order of the oracle, 0 no better than chance.

    It is nan where a criterion has no scores (`norm_scale` without a norm), or the same for all,
    and where fewer than two units were measured; such layers count neither in the mean nor in all.

    Args:
        model: the network.
        dl: a loader that can be run through twice; see `score`.
        criteria: several, or `{name of the column: criterion}`. Those of data are scored here.
        loss_func: the mean loss of a batch, see `score`.
        measured: what `oracle` returned for this network; default it is measured here, which takes
            a run over the batches for each unit. It may hold some units only.
        absolute: compare with how far the loss moves, up or down (Molchanov's oracle-abs).
        n_batches: how many batches, at most, for the criteria and for the oracle.
        progress: show bars.

    Raises:
        ValueError: a criterion that has scores for no layer, or a network that was cut since it
            was measured.
    """
    network = unwrapped(model)
    asked = _named(criteria)
    options = {"loss_func": loss_func, "n_batches": n_batches, "progress": progress}
    if measured is None:
        measured = oracle(network, dl, **options)
    from_data = (*GATHERED, "gradient")
    of_data = [c for c in asked.values() if any(need in from_data for need in c.wants)]
    scored = score(network, dl, of_data, **options) if of_data else []
    known = dict(zip(map(id, of_data), scored, strict=True))
    _must_fit(network, measured)
    truth, rows = _of_oracle(measured, absolute)
    columns = {name: _column(network, known.get(id(c), c), truth) for name, c in asked.items()}
    return pd.DataFrame(columns, index=pd.Index([*rows, "mean of layers", "all layers"]))


def _column(
    network: nn.Module, criterion: Criterion, truth: Mapping[int, tuple[Any, np.ndarray, Any]]
) -> list[float]:
    """The correlation with each layer, their mean, and that over all of them."""
    tensors = dict(network.named_parameters())
    each, scores, changes, failed = [], [], [], None
    for axis, places, change in truth.values():
        try:
            own, others = (
                unit_scores(tensors, axis, criterion, relative=relative).detach().cpu().numpy()
                for relative in (False, True)
            )
        except ValueError as error:
            failed = error
            each.append(math.nan)
            continue
        each.append(_correlation(own[places], change))
        scores.append(others[places])
        changes.append(change)
    if not scores:
        raise failed or ValueError("no unit was measured: pass units to oracle that exist")
    known = [x for x in each if not math.isnan(x)]
    mean = float(np.mean(known)) if known else math.nan
    return [*each, mean, _correlation(np.concatenate(scores), np.concatenate(changes))]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: that of the ranks, equal numbers sharing theirs."""
    from scipy.stats import spearmanr

    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return math.nan
    return float(spearmanr(a, b).statistic)


def _of_oracle(
    measured: Oracle, absolute: bool
) -> tuple[dict[int, tuple[Any, np.ndarray, np.ndarray]], list[str]]:
    """For each axis that was measured: itself, the places of its units among the free, changes."""
    by_axis: dict[int, list[tuple[int, float]]] = {}
    for (a, unit), change in measured.changes.items():
        by_axis.setdefault(a, []).append((unit, abs(change) if absolute else change))
    truth, rows = {}, []
    for a, own in sorted(by_axis.items()):
        axis = measured.axes[a]
        place = {unit: i for i, unit in enumerate(axis.free.tolist())}
        places = np.array([place[unit] for unit, _ in own])
        truth[a] = axis, places, np.array([change for _, change in own])
        name = plain(axis.name)
        rows.append(name if name not in rows else f"{name} ({a})")
    return truth, rows


def _must_fit(network: nn.Module, measured: Oracle) -> None:
    if not isinstance(measured, Oracle):
        raise TypeError(f"measured takes what oracle(...) returns, got {measured!r:.80}")
    shapes = {name: p.shape for name, p in network.named_parameters()}
    if measured.data is None or measured.data.shapes != shapes:
        raise ValueError(
            "measured is of another network, or of this one before it was cut: call oracle again"
        )


def _named(criteria: _Criteria) -> dict[str, Criterion]:
    """Criteria by the names of their columns, none twice."""
    if isinstance(criteria, Mapping):
        return {str(name): as_criterion(c) for name, c in criteria.items()}
    if not isinstance(criteria, Sequence) or isinstance(criteria, str):
        raise TypeError(
            f"criteria takes a list of criteria or a dict of names and criteria, got "
            f"{criteria!r:.80}"
        )
    found: dict[str, Criterion] = {}
    for criterion in map(as_criterion, criteria):
        name = criterion.name or "criterion"
        if name in found and criterion.norm:
            name = f"{name}, norm {criterion.norm}"
        if name in found:
            raise ValueError(f"two criteria are called {name!r}: pass a dict with a name for each")
        found[name] = criterion
    if not found:
        raise ValueError("no criteria to compare: pass some, such as [large_final, taylor]")
    return found
