"""Looking at a network's numbers: what arrives at its layers, and what it puts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..coupling.inputs import Inputs, tensors_in
from ..coupling.labels import Dim, Run
from ..coupling.run import run_numbers
from ..coupling.units import Coupling

__all__ = ["Differences", "Observation", "alike", "differences", "observe", "observe_other_sizes"]

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


@dataclass(frozen=True, eq=False)
class Observation:
    """What a network computes on the example inputs, and on random ones of the same form.

    Args:
        outputs: for each run, the output tensors.
        runs: what each run said.
        peaks: (labels,) the largest magnitude with which each class of channels arrives at the
            layers that read it; 0 for what never does.
    """

    outputs: list[list[Tensor]]
    runs: list[Run]
    peaks: Tensor


def observe(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    kept: Mapping[Dim, Tensor] | None = None,
    silent: np.ndarray | None = None,
    *,
    origins: bool = False,
) -> Observation:
    """Run a network in eval mode and note its outputs and what arrives at its layers.

    It runs on the inputs and on random ones, in one batch where there is one. A model that
    cannot run on random inputs (it may expect boxes, say) is only run on its own.

    Args:
        model: the network, whole or cut.
        inputs: what it runs on.
        coupling: what was found before any cut.
        kept: the positions that stayed, of a network that was cut.
        silent: (labels,) bool, classes that no layer shall hear.
        origins: also note which channels zero weights alone have made.
    """
    labels = coupling.labels(kept or {})
    alive = None if silent is None else torch.from_numpy(np.append(~silent, True))
    random = inputs.random_like()
    together = [inputs.beside(random)] if inputs.samples else [inputs, random]
    runs = []
    try:
        for batch in together:
            runs.append(run_numbers(model, batch, labels, alive, origins=origins))
    except Exception:  # whatever user code raises on random inputs
        runs = runs or [run_numbers(model, inputs, labels, alive, origins=origins)]
    peaks = torch.zeros(len(coupling.analysis.classes), dtype=torch.float64)
    for said, _ in runs:
        for x in said.arrivals:
            if x.summed:  # norms that remember their width sum where others do not
                continue
            real = x.labels >= 0
            peak = torch.maximum(x.low.abs(), x.high.abs())
            peaks.scatter_reduce_(0, x.labels[real], peak[real], "amax")
    return Observation([tensors_in(out) for _, out in runs], [said for said, _ in runs], peaks)


def observe_other_sizes(model: nn.Module, inputs: Inputs, coupling: Coupling) -> list[Run]:
    """Run a network on inputs of other sizes, where it takes them; what each of the runs says."""
    labels, said = coupling.labels({}), []
    for other in inputs.other_sizes():
        try:
            said.append(run_numbers(model, other, labels, origins=True)[0])
        except Exception:  # whatever user code raises on such
            continue
    return said


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
            bound = size.nan_to_num(0.0, torch.inf) + (usual.median() if len(usual) else 1.0)
            small &= bool((apart <= _ROUNDING.get(a.dtype, 1e-4) * bound).all())
            largest = float(usual.max()) if len(usual) else 1.0
            absolute = max(absolute, float(apart.max()))
            relative = max(relative, float(apart.max()) / largest)
    return Differences(absolute, relative, small)


def alike(before: Tensor, after: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding in `dtype` explains how the magnitudes of an axis' channels differ."""
    real = before.isfinite()
    if not real.any():
        return True
    bound = 10 * _ROUNDING.get(dtype, 1e-4) * before[real].max()
    return bool(((before - after)[real].abs() <= bound).all())
