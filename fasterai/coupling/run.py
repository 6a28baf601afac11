"""Run a network with labels beside its tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .engines import Literals, Muted, Shapes, numbers
from .inputs import Inputs, plainly, run_quietly, tensors_in
from .labels import Dim, Run, dims_of
from .rules import follow
from .tracer import Beside, Engine, Tracer

__all__ = ["recurrence_shown", "run_labels", "run_numbers", "run_seen", "run_shapes"]


def run_labels(
    model: nn.Module,
    inputs: Inputs,
    labels: Mapping[Dim, Tensor],
    *,
    training: bool = False,
    shapes: bool = True,
    beside: Callable[[Tracer], AbstractContextManager[Any]] | None = None,
) -> Run:
    """Run `model` on `inputs` with these labels; returns what was said.

    Args:
        model: any network; it is left as it was.
        inputs: what it runs on.
        labels: for each dimension of its parameters, the labels of the positions.
        training: run in train mode.
        shapes: run on shapes alone, which is enough unless a network looks at its own numbers
            (to count boxes, say).
        beside: makes a context for the run that looks on: the tracer knows the labels of tensors.
    """
    engine = Shapes(inputs.tensors[0].device) if shapes else numbers
    return _run(model, inputs, labels, engine, training, looking=beside)[0]


def run_shapes(model: nn.Module, inputs: Inputs, within: AbstractContextManager[Any]) -> None:
    """Run `model` in eval mode on shapes alone, inside another mode that looks on.

    Args:
        model: any network that does not look at its own numbers; it is left as it was.
        inputs: what it runs on.
        within: a dispatch mode; the operations that it calls are carried out on shapes.
    """
    known = {dim: torch.zeros(x.shape[dim.dim], dtype=int) for dim, x in dims_of(model).items()}
    _run(model, inputs, known, Shapes(inputs.tensors[0].device), False, within=within, rule=_pass)


def run_seen(
    model: nn.Module,
    inputs: Inputs,
    labels: Mapping[Dim, Tensor],
    see: Callable[..., None],
    *,
    shapes: bool = True,
) -> None:
    """Run `model` in eval mode on labels, and show each operation once its result has them.

    Args:
        model: any network; it is left as it was.
        inputs: what it runs on.
        labels: for each dimension of its parameters, the labels of the positions.
        see: is shown (tracer, operation, args, kwargs, result).
        shapes: run on shapes alone.
    """

    def rule(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        follow(t, func, args, kwargs, out)
        see(t, func, args, kwargs, out)

    engine = Shapes(inputs.tensors[0].device) if shapes else numbers
    _run(model, inputs, labels, engine, training=False, rule=rule)


def run_numbers(
    model: nn.Module,
    inputs: Inputs,
    labels: Mapping[Dim, Tensor],
    alive: Tensor | None = None,
    *,
    origins: bool = False,
) -> tuple[Run, Any]:
    """Run `model` in eval mode and watch what arrives at its layers; the output comes, too.

    Args:
        model: any network; it is left as it was.
        inputs: what it runs on.
        labels: for each dimension of its parameters, the labels of the positions.
        alive: bool, one for each label and one for FIXED; the others are muted.
        origins: also note which channels zero weights alone have made.
    """
    engine = numbers if alive is None else Muted(alive)
    return _run(model, inputs, labels, engine, training=False, watch=True, origins=origins)


def _run(
    model: nn.Module,
    inputs: Inputs,
    labels: Mapping[Dim, Tensor],
    engine: Engine,
    training: bool,
    *,
    rule: Callable[..., None] = follow,
    watch: bool = False,
    origins: bool = False,
    within: AbstractContextManager[Any] | None = None,
    looking: Callable[[Tracer], AbstractContextManager[Any]] | None = None,
) -> tuple[Run, Any]:
    with run_quietly(model, training), plainly(), recurrence_shown(model), _uncollected():
        shapes = isinstance(engine, Shapes)
        beside = Beside if shapes else WeakTensorKeyDictionary
        noted = {"watch": watch, "origins": origins, "beside": beside}
        tracer = Tracer(model, labels, rule, engine, **noted)
        look = nullcontext() if looking is None else looking(tracer)
        literals = Literals(engine.device) if shapes else nullcontext()
        with look, tracer, literals, within or nullcontext():
            out = inputs(model)
    for x in tensors_in(out):
        tracer.pin(tracer.of(x), "network output")
        tracer.said.outputs.extend(f.labels.reshape(-1) for f in tracer.of(x))
    return tracer.said, out


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cyclic collector, which would go through all of the many objects that stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _pass(*_: Any) -> None:
    """No labels are followed."""


@contextmanager
def recurrence_shown(model: nn.Module) -> Iterator[None]:
    """LSTMs run as matrix products and gates, where otherwise one fused operation hides them."""
    hidden = any(isinstance(m, nn.RNNBase) for m in model.modules())
    fused = torch.backends.mkldnn
    before = fused.set_flags(False if hidden else None, None, None, None)[0]  # that alone changes
    try:
        yield
    finally:
        fused.set_flags(before if hidden else None, None, None, None)
