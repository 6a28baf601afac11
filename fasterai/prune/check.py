"""Looking at a network's numbers: what arrives at its layers, and what it puts out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..coupling.inputs import Inputs, plainly, run_quietly, tensors_in
from ..coupling.labels import CONSUME, Dim
from ..coupling.replay import surviving
from ..coupling.run import run_labels
from ..coupling.units import Axis, Coupling

__all__ = ["Differences", "alike", "differences", "outputs", "peaks", "silenced"]

# The largest relative difference that rounding explains; wrong wiring gives far more.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ROUNDING |= {torch.complex64: 1e-4, torch.complex128: 1e-9}


@dataclass(frozen=True)
class Differences:
    """The largest difference between two networks' outputs.

    Args:
        absolute: in the outputs' unit.
        relative: as a share of the largest output.
        small: whether rounding explains it.
    """

    absolute: float
    relative: float
    small: bool


def outputs(model: nn.Module, inputs: Inputs) -> list[list[Tensor]]:
    """Outputs in eval mode on the inputs, and on random ones of the same form.

    A model that cannot run on random inputs (it may expect boxes, say) is only run on its own.
    """
    found = []
    with run_quietly(model), plainly():
        found.append(tensors_in(inputs(model)))
        try:
            found.append(tensors_in(inputs.random_like()(model)))
        except Exception:  # whatever user code raises
            pass
    return found


def differences(expected: Sequence[list[Tensor]], got: Sequence[list[Tensor]]) -> Differences:
    """Compare outputs tensor by tensor.

    Raises:
        RuntimeError: they differ in number or shape.
    """
    absolute = relative = 0.0
    small = True
    if len(expected) != len(got):
        raise RuntimeError("the network no longer runs on random inputs")
    for before, after in zip(expected, got, strict=True):
        shapes = [tuple(x.shape) for x in before], [tuple(x.shape) for x in after]
        if shapes[0] != shapes[1]:
            raise RuntimeError(f"its outputs had the shapes {shapes[0]}, now {shapes[1]}")
        for a, b in zip(before, after, strict=True):
            if not (a.is_floating_point() or a.is_complex()) or not a.numel():
                continue
            size = a.abs().double()
            apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs().double())
            # beside the largest output, which may be a constant such as -1e9, small ones count
            usual = size[(size > 0) & size.isfinite()]
            bound = size + (usual.median() if len(usual) else 1.0)
            small &= bool((apart <= _ROUNDING.get(a.dtype, 1e-4) * bound).all())
            largest = float(usual.max()) if len(usual) else 1.0
            absolute = max(absolute, float(apart.max()))
            relative = max(relative, float(apart.max()) / largest)
    return Differences(absolute, relative, small)


def alike(before: Tensor, after: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding in `dtype` explains how these magnitudes differ, each by its own size."""
    seen = before[(before > 0) & before.isfinite()]
    usual = seen.median() if len(seen) else 0.0
    bound = _ROUNDING.get(dtype, 1e-4) * (10 * before + usual / 10)
    return bool((((before - after).abs() <= bound) | ~before.isfinite()).all())


def peaks(
    model: nn.Module, inputs: Inputs, coupling: Coupling, kept: Mapping[Dim, Tensor] | None = None
) -> Tensor:
    """The largest magnitude with which each class of channels arrives at its consumers.

    Seen in eval mode on the inputs and on random ones of the same form; 0 for what never does.
    `kept` are the positions that stayed of a network that was cut.
    """
    labels = surviving(model, coupling, kept or {})
    classes = torch.from_numpy(coupling.classes).long()
    found = torch.zeros(len(classes), dtype=torch.float64)  # there are no more classes than labels
    runs = [run_labels(model, inputs, labels, watch=True)[0]]
    try:
        runs.append(run_labels(model, inputs.random_like(), labels, watch=True)[0])
    except Exception:  # whatever user code raises on random inputs
        pass
    for run in runs:
        for seen, peak in run.peaks:
            seen, peak = seen.cpu(), peak.cpu()
            real = seen >= 0
            found.scatter_reduce_(0, classes[seen[real]], peak[real], "amax")
    return found


@contextmanager
def silenced(model: nn.Module, removals: Sequence[tuple[Axis, Tensor]]) -> Iterator[None]:
    """A network that ignores some units: while this lasts, every layer's columns for them are 0."""
    tensors = dict(model.named_parameters())
    columns: dict[Dim, list[Tensor]] = {}
    for axis, units in removals:
        for slot in axis.having(CONSUME):
            index = slot.index[units[slot.unit]]
            columns.setdefault(slot.dimension, []).append(index)
    undo = []
    try:
        with torch.no_grad():
            for name in {dim.parameter for dim in columns}:
                p = tensors[name]
                ignoring = p.detach().clone()
                for dim, found in columns.items():
                    if dim.parameter == name:
                        ignoring.index_fill_(dim.dim, torch.cat(found).to(p.device), 0)
                undo.append((p, p.detach()))
                p.set_(ignoring)
        yield
    finally:
        with torch.no_grad():
            for p, before in undo:
                p.set_(before)
