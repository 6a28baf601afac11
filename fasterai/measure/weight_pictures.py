"""Pictures of weights and of their zeros; each returns its matplotlib axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.masks import as_fraction
from ..core.names import modules_by_name, plain, unknown_name, unwrapped

__all__ = ["plot_filters", "plot_weights", "plot_zeros"]

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#BBBBBB"  # apart for the colour-blind
_GAP = 1  # cells between kernels


def plot_zeros(model: nn.Module, ax: Any = None) -> Any:
    """The share of zeros in each layer's weights, and of filters (rows) that are zero as a whole.

    Args:
        model: a network; biases, norms and other vectors are left out.
        ax: where to draw.

    Raises:
        ValueError: it has no weights of two or more dimensions.
    """
    import matplotlib.pyplot as plt

    weights = _weights(model)
    zeros = [_zero_share(w) for w in weights.values()]
    filters = [_zero_share(w.detach().flatten(1).abs().amax(1)) for w in weights.values()]
    if ax is None:
        width = min(18.0, max(5.0, 0.32 * len(weights) + 1))
        ax = plt.subplots(figsize=(width, 3.2), layout="constrained")[1]
    x = range(len(weights))
    ax.bar(x, zeros, color=_ORANGE, alpha=0.45, label="weights")
    ax.bar(x, filters, color=_BLUE, width=0.4, label="whole filters")
    ax.set_xticks(list(x), weights, rotation=90, fontsize=8)
    whole = sum(z * w.numel() for z, w in zip(zeros, weights.values(), strict=True))
    share = whole / sum(w.numel() for w in weights.values())
    ax.set(ylabel="share at zero", ylim=(0, 1.03))
    ax.set_title(f"{share:.1%} of the weights are zero, by layer")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_weights(
    model: nn.Module,
    layer: str | None = None,
    sparsity: float | None = None,
    *,
    bins: int = 80,
    ax: Any = None,
) -> Any:
    """A histogram of the weights that are not zero, with the threshold between both.

    Args:
        model: a network.
        layer: one of its layers; default all that have zeros, or all where none has; without
            biases, norms and other vectors.
        sparsity: draw the magnitude below which this share of the weights lies; default the
            smallest magnitude there is beside zeros.
        bins: how many bars.
        ax: where to draw.

    Raises:
        ValueError: there is no such layer, or it has no weight.
    """
    import matplotlib.pyplot as plt

    weights = _weights(model) if layer is None else {layer: _weight(model, layer)}
    weights = {k: w for k, w in weights.items() if _zero_share(w)} or weights
    values = torch.cat([w.detach().float().flatten().cpu() for w in weights.values()]).numpy()
    left = values[values != 0]
    ax = ax or plt.subplots(figsize=(5.5, 3.2), layout="constrained")[1]
    ax.hist(left, bins=bins, color=_BLUE, label=f"{len(left):,} weights")
    at = _threshold(values, sparsity)
    if at is not None:
        ax.axvspan(-at, at, color=_ORANGE, alpha=0.18, linewidth=0)
        for x in (-at, at):
            ax.axvline(x, color=_ORANGE, linestyle="--", linewidth=1.2)
        ax.plot([], [], "--", color=_ORANGE, label=f"threshold {at:.3g}")
    zeros = len(values) - len(left)
    ax.set(xlabel="weight", ylabel="how many")
    where = layer or (f"{len(weights)} layers" if len(weights) > 1 else next(iter(weights)))
    ax.set_title(f"Weights of {where}: {zeros / max(1, len(values)):.1%} are zero")
    ax.legend(frameon=False, fontsize=8)
    return ax


def plot_filters(model: nn.Module, layer: str, *, most: int = 16, ax: Any = None) -> Any:
    """A layer's weights as a table of kernels, what is zero in grey.

    A row is a filter, a column an input channel, a cell of both a kernel.

    Args:
        model: a network.
        layer: a conv or linear layer.
        most: filters and input channels that are shown, the first of each.
        ax: where to draw.

    Raises:
        ValueError: there is no such layer, or it has no weight.
    """
    import matplotlib.pyplot as plt

    weight = _weight(model, layer).detach().float().cpu()
    filters, inputs = weight.shape[:2]
    table = _tiles(weight[:most, :most].numpy())
    if ax is None:
        size = [min(7.0, max(2.5, 0.1 * n + 1)) for n in reversed(table.shape)]
        ax = plt.subplots(figsize=(max(4.2, size[0] + 1), size[1]), layout="constrained")[1]
    reach = float(weight.abs().max()) or 1.0
    colours = plt.get_cmap("PuOr").with_extremes(bad=(0, 0, 0, 0))  # gaps
    ax.imshow(np.where(table == 0, 1.0, np.nan), cmap="Greys", vmin=0, vmax=2.5)
    shown = ax.imshow(np.where(table == 0, np.nan, table), cmap=colours, vmin=-reach, vmax=reach)
    ax.set(xticks=[], yticks=[], frame_on=False)
    ax.set_xlabel(f"{_some(inputs, most)} input channels")
    ax.set_ylabel(f"{_some(filters, most)} filters")
    gone = int((weight.flatten(1).abs().amax(1) == 0).sum())
    share = _zero_share(weight)
    ax.set_title(
        f"{layer}: {gone} of {filters} filters\n{share:.0%} of the weights zero (grey)", fontsize=10
    )
    ax.figure.colorbar(shown, ax=ax, shrink=0.8, label="weight")
    return ax


# --- inside --------------------------------------------------------------------------------------


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of two or more dimensions, by the names of their layers where these have one."""
    network = unwrapped(model)
    named = {plain(k): p for k, p in network.named_parameters() if p.ndim > 1 and p.numel()}
    if not named:
        raise ValueError("the model has no weights of two or more dimensions to draw")
    return {name.removesuffix(".weight"): p for name, p in named.items()}


def _weight(model: nn.Module, layer: str) -> Tensor:
    modules = modules_by_name(unwrapped(model))
    if layer not in modules:
        raise ValueError(unknown_name(layer, modules, "layer"))
    weight = getattr(modules[layer], "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2 or not weight.numel():
        kind = type(modules[layer]).__name__
        raise ValueError(f"{layer!r} ({kind}) has no weight of two or more dimensions to draw")
    return weight


def _threshold(values: np.ndarray, sparsity: float | None) -> float | None:
    """The magnitude that separates what goes from what stays."""
    magnitudes = np.sort(np.abs(values))
    if sparsity is None:
        zeros = int((magnitudes == 0).sum())
        return float(magnitudes[zeros]) if 0 < zeros < len(magnitudes) else None
    n = round(as_fraction(sparsity) * len(magnitudes))
    return float(magnitudes[n]) if n < len(magnitudes) else float(magnitudes[-1])


def _tiles(weight: np.ndarray) -> np.ndarray:
    """(o, i, ...) -> kernels side by side, with gaps of nan where a kernel has several numbers."""
    o, i = weight.shape[:2]
    kernel = weight.reshape(o, i, -1, weight.shape[-1] if weight.ndim > 2 else 1)
    gap = _GAP if kernel.shape[2] * kernel.shape[3] > 1 else 0
    padded = np.pad(kernel, [(0, 0), (0, 0), (0, gap), (0, gap)], constant_values=np.nan)
    rows, columns = padded.shape[2:]
    return padded.transpose(0, 2, 1, 3).reshape(o * rows, i * columns)


def _zero_share(x: Tensor) -> float:
    return 1 - int(x.count_nonzero()) / max(1, x.numel())


def _some(n: int, most: int) -> str:
    return f"the first {most} of {n}" if n > most else str(n)
