"""Pictures of prunings side by side; each returns its matplotlib axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from .sweep import Sweep

__all__ = ["plot_cuts", "plot_frontier"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
_SHAPES = "os^Dv*P"  # one more than colours: so many pairs differ
_COSTS = {
    "macs": "MACs of one sample",
    "parameters": "parameters",
    "bytes": "bytes of the state dict",
    "latency_ms": "latency in ms",
}


def plot_frontier(
    sweeps: Mapping[str, Sweep],
    metric: str | None = None,
    against: str = "macs",
    *,
    ax: Any = None,
) -> Any:
    """A metric of the networks of one or several sweeps against what they cost.

    Each sweep has its colour and its shape; points are joined in the order of their costs. A cross
    is the checkpoint, and a dashed line its metric.

    Args:
        sweeps: by name.
        metric: a column of their tables; default the last metric of the first.
        against: 'macs', 'parameters', 'bytes' or, where it was measured, 'latency_ms'.
        ax: where to draw.

    Raises:
        ValueError: a table has no such column.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    if not isinstance(sweeps, Mapping) or not sweeps:
        raise TypeError(f"plot_frontier takes sweeps by name, got {type(sweeps).__name__}")
    metric = metric or next(iter(sweeps.values())).metrics[-1]
    if ax is None:
        ax = plt.subplots(figsize=(6, 3.6), layout="constrained")[1]
    for k, (name, found) in enumerate(sweeps.items()):
        points = _points(name, found.table, metric, against)
        colour, shape = _COLOURS[k % len(_COLOURS)], _SHAPES[k % len(_SHAPES)]
        dense, rest = points.loc["dense"], points.drop("dense").dropna().sort_values(against)
        if not k:
            ax.axhline(dense[metric], color="#666666", linewidth=0.8, linestyle="--")
            ax.plot(*dense[[against, metric]], "kX", markersize=9, label="checkpoint")
        ax.plot(rest[against], rest[metric], f"{shape}-", color=colour, label=name)
        named = rest[[against, metric]].itertuples() if len(sweeps) == 1 else ()
        for i, (label, *at) in enumerate(named):
            place = (4, 6 if i % 2 else -12)  # neighbours on different sides
            ax.annotate(label, at, place, textcoords="offset points", fontsize=8)
    cost = _COSTS.get(against, against)
    ax.set(xlabel=cost, ylabel=metric, title=f"{metric} against {cost}")
    if against != "latency_ms":
        ax.xaxis.set_major_formatter(EngFormatter())
    ax.margins(x=0.1, y=0.15)
    ax.legend(frameon=False, fontsize=8)
    return ax


def plot_cuts(table: pd.DataFrame, metric: str | None = None, ax: Any = None) -> Any:
    """A metric after each cut, over the parameters that are left.

    Args:
        table: `History.table()`.
        metric: one of its columns; default the last metric.
        ax: where to draw.

    Raises:
        ValueError: no metrics stand in it.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    metrics = list(table.columns[list(table.columns).index("macs") + 1 :])
    metric = metric or next(reversed(metrics), None)
    if metric not in metrics:
        raise ValueError(f"the history has no metric {metric!r}; it has: {metrics or 'none'}")
    if ax is None:
        ax = plt.subplots(figsize=(6, 3.2), layout="constrained")[1]
    left = table["parameters"].astype(float)
    bars = ax.twinx()
    bars.bar(table.index, left, color="#DDDDDD", width=0.6)
    bars.yaxis.set_major_formatter(EngFormatter())
    bars.set_ylabel("parameters left (bars)")
    ax.set_zorder(bars.get_zorder() + 1)  # the line in front of the bars
    ax.patch.set_visible(False)
    known = table[metric].dropna()  # a cut in the middle of an epoch is not validated
    ax.plot(known.index, known, "o-", color=_COLOURS[0])
    ax.set(xlabel="cut", ylabel=metric, title=f"{metric} after each cut, and the parameters left")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def _points(name: str, table: pd.DataFrame, metric: str, against: str) -> pd.DataFrame:
    for column in (against, metric):
        if column not in table.select_dtypes("number"):
            known = ", ".join(table.select_dtypes("number"))
            hint = "; pass seconds=0.5 to sweep()" if column == "latency_ms" else ""
            raise ValueError(f"the sweep {name!r} has no numbers {column!r}{hint}; it has: {known}")
    return table[[against, metric]].astype(float)
