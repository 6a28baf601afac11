"""Warnings that show the line of the user's code that led to them."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

_BETWEEN = {"fasterai", "fastai", "fastcore", "torch", "contextlib", "functools"}


def warn(message: str) -> None:
    """Warn, as from the innermost line that is not of this library or of one that runs it."""
    depth, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)
