"""Run a network with labels beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .engines import Literals, Muted, Shapes, numbers
from .inputs import Inputs, plainly, run_quietly, tensors_in
from .labels import Dim, Run
from .rules import follow
from .tracer import Beside, Engine, Tracer

__all__ = ["run_labels", "run_numbers"]


def run_labels(
    model: nn.Module,
    inputs: Inputs,
    labels: Mapping[Dim, Tensor],
    *,
    training: bool = False,
    shapes: bool = True,
) -> Run:
    """Run `model` on `inputs` with these labels; returns what was said.

    Args:
        model: any network; it is left as it was.
        inputs: what it runs on.
        labels: for each dimension of its parameters, the labels of the positions.
        training: run in train mode.
        shapes: run on shapes alone, which is enough unless a network looks at its own numbers
            (to count boxes, say).
    """
    if not shapes:
        return _run(model, inputs, labels, numbers, training, watch=False)[0]
    device = inputs.tensors[0].device
    with Literals(device):
        return _run(model, inputs, labels, Shapes(device), training, watch=False)[0]


def run_numbers(
    model: nn.Module, inputs: Inputs, labels: Mapping[Dim, Tensor], alive: Tensor | None = None
) -> tuple[Run, Any]:
    """Run `model` in eval mode and watch what arrives at its layers; the output comes, too.

    Args:
        model: any network; it is left as it was.
        inputs: what it runs on.
        labels: for each dimension of its parameters, the labels of the positions.
        alive: bool, one for each label and one for FIXED; the others are muted.
    """
    engine = numbers if alive is None else Muted(alive)
    return _run(model, inputs, labels, engine, training=False, watch=True)


def _run(
    model: nn.Module,
    inputs: Inputs,
    labels: Mapping[Dim, Tensor],
    engine: Engine,
    training: bool,
    *,
    watch: bool,
) -> tuple[Run, Any]:
    with run_quietly(model, training), plainly(), _recurrence_shown(model):
        beside = Beside if isinstance(engine, Shapes) else WeakTensorKeyDictionary
        tracer = Tracer(model, labels, follow, engine, watch=watch, beside=beside)
        with tracer:
            out = inputs(model)
    for x in tensors_in(out):
        tracer.pin(tracer.of(x), "network output")
        tracer.said.outputs.extend(f.labels.reshape(-1) for f in tracer.of(x))
    return tracer.said, out


def _recurrence_shown(model: nn.Module) -> AbstractContextManager[Any]:
    """LSTMs run as matrix products and gates, where otherwise one fused operation hides them."""
    if any(isinstance(m, nn.RNNBase) for m in model.modules()):
        return torch.backends.mkldnn.flags(enabled=False)
    return nullcontext()
