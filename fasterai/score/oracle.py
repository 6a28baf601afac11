"""The oracle: what the loss does when a unit is really removed, unit by unit.

It is what all criteria estimate: Molchanov et al., "Pruning Convolutional Neural Networks for
Resource Efficient Inference", 2017, https://arxiv.org/abs/1611.06440, who call it oracle-loss with
its sign and oracle-abs without.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.checks import is_whole
from ..core.criteria import Criterion
from ..core.gathered import Gathered
from ..core.names import plain, unknown_name, unwrapped
from ..core.progress import with_bar
from ..coupling.couple import couple
from ..coupling.inputs import Inputs
from ..coupling.surgery import shadowed
from ..coupling.units import Axis, Coupling
from .batches import Batch, in_memory
from .criteria import as_gathered
from .journal import Journal, about
from .removing import Removals, mean_loss
from .units import Units

__all__ = ["Oracle", "oracle"]

Chosen = Mapping[str, Iterable[int] | None] | Iterable[str]


@dataclass(frozen=True)
class Oracle(Criterion):
    """What was measured: a criterion as any other, and a table.

    Args:
        loss: of the whole network.
        changes: (axis, unit) -> by how much the loss rises when it is removed.
        axes: the axes of the network, as in `Pruner.axes()`.
    """

    loss: float = math.nan
    changes: Mapping[tuple[int, int], float] = field(default_factory=dict, repr=False)
    axes: tuple[Axis, ...] = field(default=(), repr=False, compare=False)

    def table(self) -> pd.DataFrame:
        """A row a unit: `axis`, `layer`, `unit`, `change` of the loss when it is removed."""
        rows = [(a, plain(self.axes[a].name), u, d) for (a, u), d in self.changes.items()]
        return pd.DataFrame(rows, columns=["axis", "layer", "unit", "change"])

    def absolute(self) -> Oracle:
        """The same, where a unit counts by how far the loss moves, up or down."""
        return replace(self, func=_size, name="oracle_abs")


def oracle(
    model: nn.Module,
    dl: Iterable[Any],
    *,
    loss_func: Callable[..., Tensor | float],
    units: Chosen | None = None,
    n_batches: int | None = 8,
    file: str | os.PathLike[str] | None = None,
    whole_heads: bool = False,
    progress: bool = True,
) -> Oracle:
    """Remove each unit alone and measure what the loss becomes.

    ```python
    measured = oracle(learn.model, learn.dls.valid, loss_func=learn.loss_func, file="oracle.jsonl")
    measured.table()
    pruner.prune_model(0.5, context="global", criteria=measured)
    ```
    It takes a run over all batches for each unit, in eval mode and without gradients; they are
    kept in memory, on the model's device. Each unit is cut out as `Pruner` would. Units that lie
    in blocks which keep equally many (heads, halves) are silenced one by one.

    The model's own tensors are not touched; it is left as it was, also by an interrupt.

    Args:
        model: the network.
        dl: see `score`. For `file` it must give the same batches again: no shuffling.
        loss_func: `loss_func(outputs, *targets)`: the mean loss of a batch, or any other number
            that is better when it is lower, such as the share of errors.
        units: names of layers whose units are measured, or `{name: units}`, None for all of them;
            default all that are not pinned.
        n_batches: how many batches, at most; None for all of them.
        file: where each measurement is written down at once, as a line of JSON. Where it exists,
            what is in it is not measured again.
        whole_heads: attention heads are units, as in `Pruner`.
        progress: show a bar.

    Raises:
        ValueError: unknown layers or units, pinned units, an empty loader, a loss that is no
            number, or a file of another network, other units, data or another loss.
    """
    network = unwrapped(model)
    batches = in_memory(dl, network, n_batches)
    inputs = Inputs.fitting(network, batches[0].inputs.given)
    coupling = couple(network, inputs, whole_heads=whole_heads)
    wanted = _chosen(network, coupling.axes, units)
    if not wanted:
        raise ValueError("no unit to measure: see Pruner(model, inputs).axes() for what can go")
    loss = mean_loss(network, batches, loss_func)
    if not math.isfinite(loss):
        raise ValueError(f"the loss of the network as it is must be a finite number, got {loss}")
    header = {} if file is None else about(network, coupling.axes, batches)
    journal = Journal(file, header, loss)
    try:
        _measure(network, inputs, coupling, batches, loss_func, wanted, journal, progress)
    finally:
        journal.close()
    return _as_oracle(network, coupling, wanted, journal)


def _measure(
    network: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    batches: Sequence[Batch],
    loss_func: Callable[..., Tensor | float],
    wanted: Sequence[tuple[int, int]],
    journal: Journal,
    progress: bool,
) -> None:
    removals = Removals(network, inputs, coupling)
    missing = [key for key in wanted if key not in journal.losses]
    for a, unit in with_bar(missing, progress):
        with shadowed(network, removals.of(a, unit)):
            loss = mean_loss(network, batches, loss_func)
        journal.add(a, plain(coupling.axes[a].name), unit, loss)


def _chosen(
    network: nn.Module, axes: Sequence[Axis], units: Chosen | None
) -> list[tuple[int, int]]:
    """The units to measure: by axis and number.

    Raises:
        ValueError: layers or units that do not exist, or are pinned.
    """
    if units is None:
        return [(a, u) for a, axis in enumerate(axes) for u in axis.free.tolist()]
    if isinstance(units, str):
        units = [units]
    asked = units if isinstance(units, Mapping) else dict.fromkeys(units)
    known = {plain(name): a for a, axis in reversed([*enumerate(axes)]) for name in axis.producers}
    found = {}
    for name, own in asked.items():
        if name not in known:
            raise ValueError(
                unknown_name(name, known, "units")
                if name not in dict(network.named_modules())
                else f"units: no channels come from {name!r}; those that make some: {[*known]}"
            )
        for a in (a for a, axis in enumerate(axes) if name in map(plain, axis.producers)):
            found.update(dict.fromkeys((a, u) for u in _of_axis(axes[a], name, own)))
    return sorted(found)


def _of_axis(axis: Axis, name: str, units: Iterable[int] | None) -> Iterator[int]:
    if units is None:
        yield from axis.free.tolist()
        return
    for unit in units:
        if not is_whole(unit) or not 0 <= unit < axis.size:
            raise ValueError(f"units: {name!r} has the units 0 to {axis.size - 1}, got {unit!r}")
        if axis.pins[unit] is not None:
            raise ValueError(f"units: unit {unit} of {name!r} cannot go: {axis.pins[unit]}")
        yield int(unit)


def _as_oracle(
    network: nn.Module, coupling: Coupling, wanted: Iterable[tuple[int, int]], journal: Journal
) -> Oracle:
    changes = {key: journal.losses[key] - journal.loss for key in wanted}
    return Oracle(
        as_gathered,
        "oracle",
        needs="measured",
        norm="none",
        data=measured(network, coupling, changes),
        loss=journal.loss,
        changes=changes,
        axes=coupling.axes,
    )


def measured(
    network: nn.Module, coupling: Coupling, values: Mapping[tuple[int, int], float]
) -> Gathered:
    """Numbers of units, (axis, unit) -> number, as numbers of the weights that make them."""
    spread = Units(coupling, torch.device("cpu"))
    starts = [0]
    for axis in coupling.axes:
        starts.append(starts[-1] + axis.size)
    row = torch.full((spread.size,), torch.nan, dtype=torch.float64)
    for (a, unit), value in values.items():
        row[starts[a] + unit] = value
    shapes = {name: p.shape for name, p in network.named_parameters()}
    return Gathered({"measured": spread.spread(row, shapes, ~row.isnan())}, shapes)


def _size(weight: Tensor, found: Tensor) -> Tensor:
    return found.abs()
