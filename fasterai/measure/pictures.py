"""Pictures of a run and of a network; each returns its matplotlib axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..core.schedule import SCHEDULES, Chain, Schedule

__all__ = ["plot_correlations", "plot_removed", "plot_schedules", "plot_training", "plot_widths"]

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#BBBBBB"  # apart for the colour-blind


def _axes(ax: Any, width: float = 5.0) -> Any:
    import matplotlib.pyplot as plt

    return ax or plt.subplots(figsize=(width, 3), layout="constrained")[1]


def plot_steps(
    steps: Sequence[tuple[int, float]], total: int, *, ylabel: str, title: str, ax: Any = None
) -> Any:
    """A value that changes at some steps and stays between them, over `total` steps."""
    ax = _axes(ax)
    x = [0, *(t for t, _ in steps), max(total, steps[-1][0])]
    y = [0.0, *(v for _, v in steps), steps[-1][1]]
    ax.step(x, y, where="post", color=_ORANGE)
    ax.set(xlabel="training step", ylabel=ylabel, title=title, ylim=(-0.03, 1.03))
    return ax


def plot_schedules(
    schedules: Iterable[Schedule | Chain] = SCHEDULES, total: int = 1000, columns: int = 4
) -> Any:
    """All schedules in one figure: the share of the target over a fit of `total` steps.

    Grey is the part of the fit in which updates happen; dots are updates, where they are few.
    Returns an array of matplotlib axes.
    """
    import matplotlib.pyplot as plt

    schedules = list(schedules)
    rows, columns = -(-len(schedules) // columns), min(columns, len(schedules))
    size = {"figsize": (2.5 * columns, 2.1 * rows), "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, squeeze=False, sharex=True, sharey=True, **size)
    for ax, schedule in zip(axes.flat, schedules, strict=False):
        updates = schedule.updates(total, per_epoch=max(1, total // 10))
        t, shares = zip(*updates, strict=True)
        ax.axvspan(t[0] / total, t[-1] / total, color=_GREY, alpha=0.3, linewidth=0)
        x = [0, *(step / total for step in t), max(1, t[-1] / total)]
        ax.step(x, [0, *shares, shares[-1]], where="post", color=_ORANGE)
        if len(updates) <= 10:
            ax.plot(x[1:-1], shares, "o", color=_ORANGE, markersize=4)
        ax.set_title(schedule.name, fontsize=10)
        ax.set(xlim=(0, 1), ylim=(-0.05, 1.08), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    for ax in axes.flat[len(schedules) :]:
        ax.set_visible(False)
    for ax in axes[-2, columns - (rows * columns - len(schedules)) :] if rows > 1 else ():
        ax.tick_params(labelbottom=True)  # nothing stands below it
    figure.supxlabel("share of the fit", fontsize=10)
    figure.supylabel("share of the target", fontsize=10)
    return axes


def plot_training(
    epochs: Sequence[float],
    metric: Sequence[float],
    steps: Sequence[tuple[float, float]],
    *,
    metric_name: str = "accuracy",
    ax: Any = None,
) -> Any:
    """A metric after each epoch, and the sparsity over the same epochs, on one scale of 0 to 1.

    Args:
        epochs: when the metric was measured, in epochs.
        metric: its values.
        steps: (epoch, sparsity) at each change.
        metric_name: for the legend.
        ax: where to draw.
    """
    ax = _axes(ax, 7.0)
    end = max([*epochs, *(e for e, _ in steps)])
    x = [0, *(e for e, _ in steps), end]
    y = [0.0, *(s for _, s in steps), steps[-1][1] if steps else 0.0]
    ax.fill_between(x, y, step="post", color=_ORANGE, alpha=0.25, linewidth=0)
    ax.step(x, y, where="post", color=_ORANGE, label="sparsity")
    ax.plot(epochs, metric, "o-", color=_BLUE, label=metric_name)
    ax.set(xlabel="epoch", ylabel="share", ylim=(0, 1.03), xlim=(0, end * 1.02))
    ax.set_title(f"{metric_name} while sparsity rises")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, frameon=False)
    return ax


def plot_removed(
    removed: pd.DataFrame, widths: Sequence[int], names: Sequence[str] = (), ax: Any = None
) -> Any:
    """What each cut took of each layer, as bars stacked by cut in front of the first widths.

    Args:
        removed: a row for each layer, a column for each cut, in units; `History.removed()`.
        widths: units of each layer at the start.
        names: of the cuts, for the legend or the colour bar; default their columns.
        ax: where to draw.
    """
    import matplotlib.pyplot as plt

    names = [str(n) for n in names or removed.columns]
    ax = _axes(ax, max(5.0, 0.32 * len(removed) + 1.5))
    x = range(len(removed))
    ax.bar(x, list(widths), color="#E8E8E8", label="at the start")
    colours = plt.get_cmap("cividis")
    floor = 0 * removed.iloc[:, 0]
    for k, column in enumerate(removed):
        shade = colours(k / max(1, removed.shape[1] - 1))
        ax.bar(x, removed[column], bottom=floor, color=shade, label=names[k])
        floor = floor + removed[column]
    ax.set_xticks(list(x), removed.index, rotation=90, fontsize=8)
    ax.set(ylabel="units", title=f"{int(floor.sum())} units removed, by layer and cut")
    if len(names) <= 8:
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        scale = plt.cm.ScalarMappable(plt.Normalize(1, len(names)), colours)
        bar = ax.figure.colorbar(scale, ax=ax, ticks=[1, len(names)])
        bar.set_ticklabels([names[0], names[-1]])
    return ax


def plot_widths(report: pd.DataFrame, ax: Any = None) -> Any:
    """Output channels of each layer before and after, from `Pruner.report()`."""
    table = report[report["out_before"].notna() & (report["layer"] != "total")]
    table = table[table["macs_before"] > 0]  # convs and linears; norms repeat their widths
    ax = _axes(ax, max(5.0, 0.32 * len(table)))
    x = range(len(table))
    ax.bar(x, table["out_before"].astype(float), color=_GREY, label="before")
    ax.bar(x, table["out_after"].astype(float), color=_BLUE, width=0.5, label="after")
    ax.set_xticks(list(x), table["layer"], rotation=90, fontsize=8)
    ax.set(ylabel="output channels", title="Channels of each layer, before and after pruning")
    ax.legend()
    return ax


def plot_correlations(report: pd.DataFrame, ax: Any = None) -> Any:
    """A heat map of rank correlations, from `criteria_report()`: orange agrees, violet contradicts.

    A line sets the rows that sum up apart from those of single layers; cells without a number are
    grey.
    """
    import matplotlib.pyplot as plt

    rows, columns = report.shape
    if ax is None:
        size = (2.2 + 0.62 * columns, 1.6 + 0.25 * rows)
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    colours = plt.get_cmap("PuOr_r").with_extremes(bad=_GREY)  # apart for the colour-blind
    values = report.to_numpy(dtype=float)
    shown = ax.imshow(values, cmap=colours, vmin=-1, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if abs(value) > 0.65 else "black"
            ax.text(
                j,
                i,
                f"{round(value, 2) + 0.0:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color=colour,
            )
    ax.set_xticks(range(columns), report.columns, rotation=35, ha="right", fontsize=8)
    ax.set_yticks(range(rows), report.index, fontsize=8)
    single = sum(name not in ("mean of layers", "all layers") for name in report.index)
    ax.axhline(single - 0.5, color="black", linewidth=1)
    ax.set_title("Rank correlation of criteria\nwith the change of the loss", fontsize=10)
    bar = ax.figure.colorbar(shown, ax=ax, shrink=0.8)
    bar.set_label("Spearman's rank correlation", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return ax
