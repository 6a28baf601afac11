"""Plans as JSON, and back with every value checked: the text may come from anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any, NoReturn

import numpy as np

__all__ = ["decode", "encode", "parse"]

_VERSION = 1
_LONGEST = 2**25  # characters; plans of large language models stay under a tenth of it
_MOST = 2**22  # positions in all lines
_PARTS = {
    "adjusted",
    "axes",
    "follows",
    "integers",
    "norms",
    "parameters",
    "plan",
    "positions",
    "tensors",
}


def encode(plan: Mapping[str, Any]) -> str:
    """A plan's fields as JSON.

    The positions that stay along a dimension are a bit each, as hexadecimal digits. Such a line
    is written once, for many tensors share it; for each tensor stand its shape and, for each
    dimension, the number of the line or null.
    """
    lines: dict[str, int] = {}
    tensors = {}
    for name, shape in sorted(plan["shapes"].items()):
        cuts = plan["kept"].get(name, {})
        kept = [
            lines.setdefault(_line(cuts[d], size), len(lines)) if d in cuts else None
            for d, size in enumerate(shape)
        ]
        tensors[name] = [shape, kept]
    fields = {
        **{part: plan[part] for part in _PARTS & plan.keys()},
        "plan": _VERSION,
        "positions": list(lines),
        "tensors": tensors,
        "adjusted": {n: [_written(*s) for s in steps] for n, steps in plan["adjusted"].items()},
    }
    return json.dumps(fields, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _line(positions: Sequence[int], size: int) -> str:
    bits = np.zeros(size, dtype=bool)
    bits[list(positions)] = True
    return np.packbits(bits).tobytes().hex()


def _written(factor: bool, runs: Sequence[tuple[int, int, float]]) -> list[Any]:
    return ["times" if factor else "plus", *([run[i] for run in runs] for i in range(3))]


def parse(text: str) -> Any:
    """JSON without what Python adds to it, and without names that come twice.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str):
        raise TypeError(f"JSON is text, got {type(text).__name__}")
    if len(text) > _LONGEST:
        raise ValueError(f"no JSON of ours is longer than {_LONGEST:,} characters")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    _need(len(found) == len(pairs), "a name comes twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


# --- reading ---------------------------------------------------------------------------------


def decode(text: str) -> dict[str, Any]:
    """A plan's fields from JSON.

    Raises:
        ValueError: it is no JSON, or not of a plan.
    """
    plan = parse(text)
    _need(isinstance(plan, dict) and "plan" in plan, "that is something else")
    version = plan["plan"]
    _need(_whole(version, 1), f"its version is {short(version)}")
    _need(version <= _VERSION, f"it has version {short(version)}, this fasterai reads {_VERSION}")
    _need(plan.keys() == _PARTS, f"parts are missing or strange: {short(sorted(plan))}")
    shapes, kept = _tensors(plan["tensors"], plan["positions"])
    _need(_whole(plan["follows"]), "'follows' counts cuts")
    return {
        "kept": kept,
        "shapes": shapes,
        "axes": _axes(plan["axes"]),
        "parameters": _fewer(plan["parameters"], "parameters"),
        "integers": {n: _integers(n, x) for n, x in _named(plan["integers"], "integers")},
        "norms": {n: _norm(n, x) for n, x in _named(plan["norms"], "norms")},
        "adjusted": {n: _steps(n, x, shapes, kept) for n, x in _named(plan["adjusted"], "numbers")},
        "follows": plan["follows"],
    }


def _need(fine: bool, why: str) -> None:
    if not fine:
        raise ValueError(f"this is no plan: {why}")


def _whole(x: Any, least: int = 0) -> bool:
    return type(x) is int and x >= least


def _named(x: Any, what: str) -> list[tuple[str, Any]]:
    _need(isinstance(x, dict), f"{what} have no names")
    return list(x.items())


def _tensors(
    tensors: Any, lines: Any
) -> tuple[dict[str, tuple[int, ...]], dict[str, dict[int, tuple[int, ...]]]]:
    _need(isinstance(lines, list) and all(type(x) is str for x in lines), "positions are no text")
    shapes: dict[str, tuple[int, ...]] = {}
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    known: dict[tuple[int, int], tuple[int, ...]] = {}
    most = _MOST
    for name, x in _named(tensors, "tensors"):
        _need(isinstance(x, list) and len(x) == 2, f"{short(name)} has no shape")
        shape, cuts = x
        _need(isinstance(shape, list) and all(_whole(n) for n in shape), f"{short(name)}: shape")
        _need(isinstance(cuts, list) and len(cuts) == len(shape), f"{short(name)}: dimensions")
        shapes[name] = tuple(shape)
        for d, (line, size) in enumerate(zip(cuts, shape, strict=True)):
            if line is not None:
                _need(_whole(line) and line < len(lines), f"{short(name)}: positions")
                if (line, size) not in known:
                    most -= size
                    _need(most >= 0, f"it has more than {_MOST:,} positions")
                    known[line, size] = _positions(name, lines[line], size)
                kept.setdefault(name, {})[d] = known[line, size]
    return shapes, kept


def _positions(name: str, line: str, size: int) -> tuple[int, ...]:
    digits = set(line) <= set("0123456789abcdef")
    _need(digits and len(line) == 2 * -(-size // 8), f"{short(name)}: positions")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(line), dtype=np.uint8))
    _need(not bits[size:].any(), f"{short(name)}: positions beyond {size}")
    _need(bool(bits.any()), f"nothing stays of {short(name)}")
    return tuple(np.flatnonzero(bits).tolist())


def _axes(x: Any) -> list[list[Any]]:
    _need(isinstance(x, list), "axes are no list")
    for axis in x:
        _need(isinstance(axis, list) and len(axis) == 3, f"an axis is {short(axis)}")
        _need(type(axis[0]) is str, f"an axis is {short(axis)}")
        _fewer(axis[1:], "units")
    return x


def _fewer(x: Any, what: str) -> list[int]:
    """Two counts, before and after."""
    fine = isinstance(x, list) and len(x) == 2 and all(map(_whole, x)) and x[1] <= x[0]
    _need(fine, f"{what} before and after are {short(x)}")
    return x


def _integers(module: str, x: Any) -> dict[str, tuple[Any, Any]]:
    return {a: _sizes(f"{module}.{a}", v) for a, v in _named(x, f"integers of {short(module)}")}


def _sizes(name: str, x: Any) -> tuple[Any, Any]:
    """An integer, or several, before and after."""
    _need(isinstance(x, list) and len(x) == 2, f"{short(name)} is {short(x)}")
    if all(_whole(n, 1) for n in x):
        pairs = [x]
    else:
        several = all(isinstance(n, list) for n in x) and len(x[0]) == len(x[1]) > 0
        _need(several, f"{short(name)} is {short(x)}")
        pairs = [list(pair) for pair in zip(*x, strict=True)]
    for before, after in pairs:
        fine = _whole(before, 1) and _whole(after, 1) and after <= before
        _need(fine, f"{short(name)} goes from {short(before)} to {short(after)}")
    before, after = (tuple(n) if isinstance(n, list) else n for n in x)
    return before, after


def _norm(name: str, x: Any) -> dict[str, Any]:
    values = dict(_named(x, "norms"))
    _need(all(type(v) in (str, int, float) for v in values.values()), f"{short(name)}: its width")
    return values


def _steps(
    name: str, x: Any, shapes: Mapping[str, Sequence[int]], kept: Mapping[str, Mapping[int, Any]]
) -> list[tuple[bool, tuple[tuple[int, int, float], ...]]]:
    _need(name in shapes and isinstance(x, list), f"numbers of {short(name)}")
    cuts = kept.get(name, {})
    size = math.prod(len(cuts[d]) if d in cuts else n for d, n in enumerate(shapes[name]))
    found = []
    for step in x:
        _need(isinstance(step, list) and len(step) == 4, f"numbers of {short(name)}")
        _need(step[0] in ("times", "plus"), f"numbers of {short(name)}")
        same = all(isinstance(part, list) and len(part) == len(step[1]) for part in step[1:])
        _need(same, f"numbers of {short(name)}")
        runs = tuple(zip(*step[1:], strict=True))
        end = 0
        for start, length, number in runs:
            _need(_whole(start, end) and _whole(length, 1), f"places of numbers of {short(name)}")
            _need(type(number) is float and math.isfinite(number), f"numbers of {short(name)}")
            end = start + length
        _need(end <= size, f"numbers beyond {short(name)}")
        found.append((step[0] == "times", runs))
    return found
