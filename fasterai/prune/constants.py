"""Channels that zero weights have made constant, and how the layers that read them do without.

A zero filter behind a batch norm arrives at the next layers as a constant. Where a layer reads it
without padding, the constant goes into its bias, or into the running mean of the batch norm that
alone follows. Where it pads, K constant channels collapse into one of them: its column takes over
the others', weighted by the ratio of the constants as that layer sees them. Both are exact in eval
mode at any resolution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

import numpy as np
import torch
from torch import Tensor, nn

from ..core.granularity import along
from ..core.names import raw_tensors
from ..coupling.labels import Arrival, Dim, Run
from ..coupling.units import Axis

__all__ = ["Constants"]


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that reads channels, over all runs.

    Args:
        labels: (K,) the channel at each position that is read.
        value: (K,) its constant; nan where it is none.
        weight: the dimension of the weight that reads; None where constants cannot be made good.
        target: the bias or running mean that can take a constant, and its sign, if any.
    """

    labels: Tensor
    value: Tensor
    weight: Dim | None
    target: tuple[str, float] | None


class Constants:
    """What arrives as a constant in a network, and what has to be added to remove it.

    Args:
        model: the network.
        runs: what runs with numbers said, on different inputs.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Run]) -> None:
        self._tensors = raw_tensors(model)
        runs = [r for r in runs if _form(r) == _form(runs[0])]
        count: dict[Dim | None, int] = {}
        for x in runs[0].arrivals:
            count[x.reader] = count.get(x.reader, 0) + 1
        self._readers = [
            _reader(runs, i, self._tensors, once=count[x.reader] == 1)
            for i, x in enumerate(runs[0].arrivals)
        ]
        self._keeper: dict[int, int] = {}
        self._seen: dict[
            int, list[tuple[_Reader, float]]
        ] = {}  # where a class arrives, and as what
        for r in self._readers:
            for c, v in zip(r.labels.tolist(), r.value.tolist(), strict=True):
                self._seen.setdefault(c, []).append((r, v))

    @property
    def loud(self) -> bool:
        """Whether anything arrives as a constant other than zero."""
        return any(bool(((r.value != 0) & ~r.value.isnan()).any()) for r in self._readers)

    def removable(self, axis: Axis) -> tuple[list[int], dict[int, str]]:
        """The units of an axis whose constants can be made good, and why others cannot.

        Only units that zero weights make constant, wherever they are read, are among either.
        """
        still = {
            c: u
            for u, c in enumerate(axis.classes.tolist())
            if c in self._seen and not any(isnan(v) for _, v in self._seen[c])
        }
        heard = {c: [r for r, v in self._seen[c] if v != 0] for c in still}
        stuck = {c for c in still if any(r.weight is None for r in heard[c])}
        padded = {c: {id(r) for r in heard[c] if r.target is None} for c in still}
        collapsing = [c for c in still if padded[c] and c not in stuck]
        keeper = max(collapsing, key=lambda c: (len(padded[c]), self._loudest(c)), default=None)
        reasons: dict[int, str] = {}
        go = []
        for c, u in still.items():
            if c in stuck:
                reasons[u] = f"the constant {self._loudest(c):.3g} it arrives as has nowhere to go"
            elif c == keeper:
                reasons[u] = "it stands in for other constant channels"
            elif keeper is not None and not padded[c] <= padded[keeper]:
                reasons[u] = "no other constant channel can stand in for it"
            else:
                go.append(u)
                if padded[c] and keeper is not None:
                    self._keeper[c] = keeper
        return go, reasons

    def unheard(self, axis: Axis) -> set[int]:
        """The units of an axis that no layer reads in eval mode."""
        return {u for u, c in enumerate(axis.classes.tolist()) if c not in self._seen}

    def _loudest(self, c: int) -> float:
        return max(abs(v) for _, v in self._seen[c])

    def added(self, gone: np.ndarray) -> dict[str, Tensor]:
        """What to add to parameters and buffers, in full size, where these classes go.

        Args:
            gone: (labels,) bool.
        """
        found: dict[str, Tensor] = {}
        for r in self._readers:
            at = torch.from_numpy(gone[r.labels.numpy()]) & (r.value != 0)
            if r.weight is None or not at.any():
                continue
            weight = self._tensors[r.weight.parameter].detach().double().cpu()
            columns = weight.movedim(r.weight.dim, 0)
            if r.target is not None:
                name, sign = r.target
                rows = columns[at].flatten(2).sum(2) if columns.ndim > 2 else columns[at]
                _add(found, name, self._tensors[name], sign * (r.value[at] @ rows))
            else:
                more = torch.zeros_like(columns)
                for c in r.labels[at].unique().tolist():
                    mine, its = r.labels == c, r.labels == self._keeper[c]
                    ratio = along(r.value[mine] / r.value[its], 0, columns.ndim)
                    more[its] += columns[mine] * ratio
                name = r.weight.parameter
                _add(found, name, self._tensors[name], more.movedim(0, r.weight.dim))
        return found


def _form(run: Run) -> list[tuple[Dim | None, int]]:
    """Which layers read, in their order, and how many channels."""
    return [(x.reader, len(x.labels)) for x in run.arrivals]


def _reader(runs: Sequence[Run], i: int, tensors: Mapping[str, Tensor], *, once: bool) -> _Reader:
    arrivals = [r.arrivals[i] for r in runs]
    first = arrivals[0]
    low = torch.stack([x.low for x in arrivals]).amin(0)
    high = torch.stack([x.high for x in arrivals]).amax(0)
    value = first.low.clone()
    moving = torch.stack([x.moving for x in arrivals]).any(0)
    value[moving | ((high - low) > 1e-5 * torch.maximum(low.abs(), high.abs()))] = nan
    weight = first.reader if once else None
    if weight is None or tensors[weight.parameter].shape[weight.dim] != len(value):
        return _Reader(first.labels, value, None, None)  # or it sums over further dimensions
    padded = any(x.padded for x in arrivals)
    return _Reader(
        first.labels, value, weight, None if padded else _target(first, runs[0], tensors)
    )


def _target(x: Arrival, run: Run, tensors: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """Where a constant that arrives there can go."""
    name = x.reader.parameter if x.reader is not None else ""
    if x.biased:
        bias = re.sub(r"weight$", "bias", name)
        return (bias, 1.0) if bias != name and bias in tensors else None
    if name in run.followed and run.used.get(name) == 1:
        return run.followed[name], -1.0
    return None


def _add(found: dict[str, Tensor], name: str, like: Tensor, more: Tensor) -> None:
    more = more.to(like.device)
    found[name] = found[name] + more if name in found else more
