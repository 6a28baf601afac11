"""Run a network with labels beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .inputs import Inputs, plainly, run_quietly, tensors_in
from .labels import Dim, Run, Tracer
from .rules import follow

__all__ = ["run_labels"]


def run_labels(
    model: nn.Module,
    inputs: Inputs,
    labels: Mapping[Dim, Tensor],
    *,
    training: bool = False,
    watch: bool = False,
) -> tuple[Run, Any]:
    """Run `model` on `inputs` with these labels; returns what was said and the output."""
    with run_quietly(model, training), plainly():
        tracer = Tracer(model, labels, follow, watch=watch)  # it knows the buffers of this run
        with tracer:
            out = inputs(model)
    for x in tensors_in(out):
        tracer.pin(tracer.of(x), "network output")
        tracer.said.outputs.extend(f.labels.flatten() for f in tracer.of(x))
    return tracer.said, out
