"""Measurements in a file of JSON lines, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from ..core.names import tensors_by_name
from ..core.writing import digest, replacing
from ..coupling.inputs import tensors_in
from ..coupling.units import Axis
from .batches import Batch

__all__ = ["Journal", "about"]

_FORMAT = 1
_WHAT = {
    "network": "another network or other weights",
    "units": "other units",
    "data": "other data",
}


class Journal:
    """What was measured, each unit written down as soon as it is known.

    The first line says of which network, units and data; each of the others the loss without one
    unit. A line that was not finished, at the end, is left out.

    Args:
        file: where it is kept, or None for nowhere.
        header: see `about`.
        loss: of the network as it is.

    Raises:
        ValueError: the file is damaged, is something else, or belongs to something else.

    Attributes:
        loss: of the network as it was when the file was begun.
        losses: (axis, unit) -> the loss without that unit.
    """

    def __init__(
        self, file: str | os.PathLike[str] | None, header: dict[str, str], loss: float
    ) -> None:
        self.loss, self.losses = loss, dict[tuple[int, int], float]()
        self._open: BinaryIO | None = None
        if file is None:
            return
        path = Path(file)
        first = {"fasterai oracle": _FORMAT, **header, "loss": loss}
        if not path.exists() or not path.stat().st_size:
            with replacing(path) as part:
                part.write_bytes(json.dumps(first).encode() + b"\n")
        self.loss, self.losses, end = _read(path, first)
        self._open = path.open("r+b")
        self._open.truncate(end)
        self._open.seek(end)

    def add(self, axis: int, name: str, unit: int, loss: float) -> None:
        """Note the loss of the network without a unit."""
        self.losses[axis, unit] = loss
        if self._open is not None:
            line = json.dumps({"axis": axis, "layer": name, "unit": unit, "loss": loss})
            self._open.write(line.encode() + b"\n")
            self._open.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self._open is not None:
            self._open.close()


def about(model: nn.Module, axes: Sequence[Axis], batches: Sequence[Batch]) -> dict[str, str]:
    """Fingerprints of a network with its weights, of its units and of data."""
    units = [
        (a.name, a.size, [(s.parameter, s.dim, s.index.tolist(), s.unit.tolist()) for s in a.slots])
        for a in axes
    ]
    data = [x for b in batches for x in (*b.inputs.tensors, *tensors_in(b.targets))]
    return {
        "network": digest(tensors_by_name(model)),
        "units": digest({}, {"units": json.dumps(units)}),
        "data": digest({f"{i:09}": x for i, x in enumerate(data)}),
    }


def _read(path: Path, expected: dict[str, Any]) -> tuple[float, dict[tuple[int, int], float], int]:
    """The loss, those without units, and where the last whole line ends."""
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    lines = whole[:end].splitlines()
    first = _parsed(path, lines[0] if lines else whole, 1)
    if first.get("fasterai oracle") != _FORMAT:
        raise ValueError(f"{path} holds something else than measurements of oracle(): name another")
    for what, other in _WHAT.items():
        if first.get(what) != expected[what]:
            raise ValueError(
                f"{path} belongs to {other}: name another file, or delete it. A loader that "
                f"shuffles gives other data each time: pass one that does not, or a list of batches"
            )
    if not math.isclose(float(first["loss"]), expected["loss"], rel_tol=1e-3, abs_tol=1e-6):
        raise ValueError(
            f"{path} belongs to another loss_func: the loss was {first['loss']:.6g} when it was "
            f"begun, and is {expected['loss']:.6g} now; name another file, or delete it"
        )
    found = {}
    for i, line in enumerate(lines[1:], 2):
        said = _parsed(path, line, i)
        try:
            found[int(said["axis"]), int(said["unit"])] = float(said["loss"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, i) from error
    return float(first["loss"]), found, end


def _parsed(path: Path, line: bytes, number: int) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError as error:
        raise _damaged(path, number) from error
    if not isinstance(said, dict):
        raise _damaged(path, number)
    return said


def _damaged(path: Path, number: int) -> ValueError:
    return ValueError(
        f"line {number} of {path} is no measurement of oracle(): the file is damaged, or another; "
        f"name another file, or take the line out"
    )
