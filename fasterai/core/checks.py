"""Checks of arguments that are numbers: numpy's will do, bools will not."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

__all__ = ["is_number", "is_whole", "number", "whole"]

_MOST = sys.float_info.max


def is_whole(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number; nan is one."""
    return isinstance(value, Real) and not isinstance(value, bool)


def whole(value: Any, name: str, least: int, hint: str = "") -> int:
    """A whole number of at least so much.

    Raises:
        ValueError: it is none; the message says what else would do by `hint`.
    """
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}{hint}, got {value!r}")
    return int(value)


def number(value: Any, name: str, most: float = _MOST, hint: str = "") -> float:
    """A number from 0 to `most`, by default any that is finite.

    Raises:
        ValueError: it is none; `hint` goes into the message.
    """
    found = float(value) if is_number(value) else math.nan
    if not 0 <= found <= most:
        allowed = ">= 0" if most >= _MOST else f"in [0, {most:g}]"
        raise ValueError(f"{name} must be a number {allowed}{hint}, got {value!r}")
    return found
