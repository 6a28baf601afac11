"""Pictures of audits; each returns its matplotlib axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["plot_classes", "plot_sensitivity"]

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"  # apart for the colour-blind
_NAMED = 3  # classes that lose most


def plot_sensitivity(
    table: pd.DataFrame, dense: float, metric: str, marked: Mapping[str, float], ax: Any = None
) -> Any:
    """A map of a metric: layers from top to bottom, shares cut from left to right.

    Args:
        table: see `Sensitivity.table`.
        dense: the metric of the whole network.
        metric: its name.
        marked: {layer: share}, up to which a line goes.
        ax: where to draw.
    """
    import matplotlib.pyplot as plt

    rows, columns = table.shape
    if ax is None:
        size = (max(4.5, 0.45 * columns + 2.5), max(2.6, 0.24 * rows + 1.6))
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    worse_high = metric == "loss"
    shown = ax.imshow(table, aspect="auto", cmap="cividis_r" if worse_high else "cividis")
    ax.set_xticks(range(columns), [f"{share:.0%}" for share in table.columns])
    ax.set_yticks(range(rows), table.index, fontsize=8)
    title = f"{metric} when one layer alone is cut (dense: {dense:.3g})"
    ax.set(xlabel="share of the layer's units cut", title=title)
    bar = ax.figure.colorbar(shown, ax=ax, label=metric)
    bar.ax.tick_params(labelsize=8)
    if marked:
        ends = [sum(s <= marked.get(name, -1) for s in table.columns) - 0.5 for name in table.index]
        x, y = np.repeat(ends, 2), np.repeat(np.arange(rows + 1) - 0.5, 2)[1:-1]
        ax.plot(x, y, color=_ORANGE, linewidth=2, clip_on=False, label="tolerated up to here")
        _legend_below(ax)
    return ax


def plot_classes(table: pd.DataFrame, model: pd.DataFrame, ax: Any = None) -> Any:
    """The change of each class over its accuracy before, dots as large as the classes.

    Args:
        table: see `ClassAudit.table`.
        model: see `ClassAudit.model`; its line is that of a class of mean size.
        ax: where to draw.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        ax = plt.subplots(figsize=(5.5, 3.4), layout="constrained")[1]
    known = table.dropna(subset=["change"])
    area = 20 + 100 * known["size"] / max(1, known["size"].max())
    colours = np.where(known["change"] < 0, _ORANGE, _BLUE)
    ax.scatter(known["before"], known["change"], s=area, c=colours, alpha=0.8, linewidth=0)
    ax.axhline(0, color=_GREY, linewidth=0.8)
    line = model["estimate"]
    if line[["intercept", "before"]].notna().all():
        x = np.array([known["before"].min(), known["before"].max()])
        size = line.fillna(0)["size"] * known["size"].mean()
        y = line["intercept"] + size + line["before"] * x
        ax.plot(x, y, color="black", linewidth=1, linestyle="--", label="linear model, mean size")
        _legend_below(ax)
    lost, middle = known[known["change"] < 0].head(_NAMED), known["before"].mean()
    for name, x, y in zip(lost["class"], lost["before"], lost["change"], strict=True):
        at = {"xytext": (-8, 0), "ha": "right"} if x > middle else {"xytext": (8, 0)}
        ax.annotate(str(name), (x, y), textcoords="offset points", va="center", fontsize=8, **at)
    ax.set(xlabel="accuracy of the class before (dots: its size)", ylabel="change of accuracy")
    ax.margins(0.12)
    ax.set_title("Which classes pay: change of accuracy by class")
    return ax


def _legend_below(ax: Any) -> None:
    """A legend under the label of the x axis, for axes of any height."""
    from matplotlib.transforms import ScaledTranslation

    below = ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)  # inches
    at = {"bbox_to_anchor": (0, 0), "bbox_transform": ax.transAxes + below}
    ax.legend(loc="upper left", fontsize=8, frameon=False, **at)
