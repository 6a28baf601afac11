"""Histories as JSON, and back with every value checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any

from .plan_json import parse

__all__ = ["decode", "encode"]

_VERSION = 1
_FIELDS = {
    "asked",
    "context",
    "criterion",
    "fit",
    "macs",
    "metrics",
    "parameters",
    "plan",
    "reached",
    "step",
}


def encode(cuts: Sequence[Mapping[str, Any]], before: Any) -> str:
    """The fields of the cuts as JSON; metrics that are no finite numbers become null."""
    written = [
        {**cut, "metrics": {n: as_number(x) for n, x in cut["metrics"].items()}} for cut in cuts
    ]
    fields = {"history": _VERSION, "before": before, "cuts": written}
    return json.dumps(fields, separators=(",", ":"), sort_keys=True, allow_nan=False)


def as_number(x: Any) -> float | None:
    """What JSON holds of a metric: a finite number, else None."""
    try:
        return float(x) if math.isfinite(x) else None
    except (TypeError, ValueError):
        return None


def decode(text: str) -> tuple[list[dict[str, Any]], Any]:
    """The fields of the cuts, and what was cut before; plans are not looked at.

    Raises:
        ValueError: it is no JSON, or not of a history.
    """
    found = parse(text)
    _need(isinstance(found, dict) and "history" in found, "that is something else")
    version = found["history"]
    _need(type(version) is int, f"its version is {short(version)}")
    _need(version <= _VERSION, f"it has version {short(version)}, this fasterai reads {_VERSION}")
    _need(found.keys() == {"history", "before", "cuts"}, f"its parts are {short(sorted(found))}")
    _need(isinstance(found["cuts"], list), "cuts are no list")
    return [_cut(cut) for cut in found["cuts"]], found["before"]


def _cut(cut: Any) -> dict[str, Any]:
    _need(isinstance(cut, dict) and cut.keys() == _FIELDS, f"a cut is {short(cut)}")
    for name in ("criterion", "context"):
        _need(type(cut[name]) is str, f"{name} is {short(cut[name])}")
    for name in ("asked", "reached"):
        fine = _is_share(cut[name]) or (name == "asked" and cut[name] is None)
        _need(fine, f"{name} is {short(cut[name])}")
    for name in ("parameters", "macs", "step", "fit"):
        x = cut[name]
        fine = (type(x) is int and x >= 0) or (x is None and name != "parameters")
        _need(fine, f"{name} is {short(x)}")
    metrics = cut["metrics"]
    _need(isinstance(metrics, dict), f"metrics are {short(metrics)}")
    fine = all(x is None or type(x) in (int, float) for x in metrics.values())
    _need(fine, f"metrics are {short(metrics)}")
    return {**cut, "metrics": {n: math.nan if x is None else x for n, x in metrics.items()}}


def _is_share(x: Any) -> bool:
    return type(x) in (int, float) and 0 <= x <= 1


def _need(fine: bool, why: str) -> None:
    if not fine:
        raise ValueError(f"this is no history: {why}")
