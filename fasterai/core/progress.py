"""A bar that shows how far a loop got."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import TypeVar

__all__ = ["with_bar"]

_T = TypeVar("_T")


def with_bar(items: Iterable[_T], progress: bool, total: int | None = None) -> Iterable[_T]:
    """The items, behind a bar where one is asked for and there is something to count."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    if not progress or not total:
        return items
    from fastprogress.fastprogress import progress_bar  # takes a second to import

    return progress_bar(items, total=total, leave=False)
