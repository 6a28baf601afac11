"""Hooks on modules, for as long as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle

__all__ = ["hooked"]


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are gone afterwards, whatever happens.

    ```python
    with hooked(layer.register_forward_hook(look) for layer in layers):
        model(x)
    ```
    """
    put: list[RemovableHandle] = []
    try:
        put.extend(handles)
        yield
    finally:
        for handle in put:
            handle.remove()
