"""Single units taken out of a network, to see what becomes of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core.granularity import along
from ..coupling.inputs import Inputs, plainly, run_quietly
from ..coupling.labels import CONSUME, PRODUCE, SCALE, SHIFT
from ..coupling.probe import compensation, cutting, wiring
from ..coupling.surgery import Cut, Step
from ..coupling.units import Axis, Coupling
from .batches import Batch

__all__ = ["Removals", "mean_loss"]


class Removals:
    """How to take single units out of a network.

    A unit is cut out as `Pruner` cuts it. Where no unit can be cut alone (one of many equal
    blocks, such as heads; the last of its axis) all that makes it and all that reads it is
    multiplied with zero instead, which for layers that nothing mixes is the same.

    Args:
        model: the network.
        inputs: what it runs on.
        coupling: its units.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, coupling: Coupling) -> None:
        self._where = model, inputs, coupling, coupling.axes
        self._how: dict[int, str] = {}

    def of(self, a: int, unit: int) -> Cut:
        """What takes unit `unit` of the `a`-th axis out; see `surgery.shadowed`."""
        model, _, coupling, axes = self._where
        mark = torch.zeros(axes[a].size, dtype=torch.bool)
        mark[unit] = True
        how = self._how.get(a)
        if how == "cut":  # as the first of its axis, which was tried
            return cutting(model, coupling, axes, {a: mark})
        if how == "silence" or axes[a].blocks > 1 or axes[a].size == 1:
            return self._silence(axes[a], mark)
        reason, changes = wiring(*self._where, {a: mark}, modes=[False])
        if reason is not None:
            self._how[a] = "silence"
            return self._silence(axes[a], mark)
        if not changes:
            self._how[a] = "cut"
        scales = compensation(coupling, axes, changes)
        return cutting(model, coupling, axes, {a: mark}, scales=scales)

    def _silence(self, axis: Axis, mark: Tensor) -> Cut:
        tensors = dict(self._where[0].named_parameters())
        steps: dict[str, list[Step]] = {}
        for slot in axis.having(PRODUCE, SCALE, SHIFT, CONSUME):
            if slot.parameter in tensors:
                p = tensors[slot.parameter]
                stays = torch.ones(p.shape[slot.dim], dtype=torch.float64)
                stays[slot.index[mark[slot.unit]]] = 0
                value = along(stays, 0, p.ndim - slot.dim)
                steps.setdefault(slot.parameter, []).append(Step(value, True))
        return Cut({}, steps=steps)


def mean_loss(
    model: nn.Module, batches: Sequence[Batch], loss_func: Callable[..., Tensor | float]
) -> float:
    """The loss of a network in eval mode, averaged over all examples; it leaves no trace.

    Args:
        model: the network.
        batches: what it runs on.
        loss_func: outputs and targets of a batch -> their mean loss.

    Raises:
        ValueError: the loss is not one number.
    """
    losses = []
    with run_quietly(model), plainly():
        for batch in batches:
            out = batch.inputs(model)
            if isinstance(out, Tensor) and out.dtype in (torch.float16, torch.bfloat16):
                out = out.float()  # small changes would vanish in the loss
            loss = batch.compared(loss_func, out)
            if isinstance(loss, Tensor) and loss.numel() != 1:
                raise ValueError(
                    f"loss_func must return the mean loss of a batch, one number, got a tensor "
                    f"{tuple(loss.shape)}"
                )
            losses.append(loss)
    weighted = sum(float(loss) * b.size for loss, b in zip(losses, batches, strict=True))
    return weighted / sum(b.size for b in batches)
