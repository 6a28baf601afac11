"""A method of an object replaced for a single call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["StandIn"]


class StandIn:
    """Takes the place of a method of one object, for one call, then is gone.

    It lies in the object's `__dict__`, in front of its class, and takes itself out before it does
    anything, so that an exception leaves nothing there. Several on one method form a stack.

    Args:
        owner: the object.
        name: its method.
        instead: called with the method and its arguments.
    """

    def __init__(self, owner: Any, name: str, instead: Callable[..., Any]) -> None:
        self.owner, self.name, self.instead = owner, name, instead
        self.method, self.below = getattr(owner, name), vars(owner).get(name)
        self.waiting = True
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Give the method its place back, and do something else instead."""
        if not self.waiting:
            return self.method(*args, **kwargs)
        self.undo()
        return self.instead(self.method, *args, **kwargs)

    def undo(self) -> bool:
        """Give the method its place back; whether this had not been called yet."""
        was, self.waiting = self.waiting, False
        top = vars(self.owner).get(self.name)
        while isinstance(top, StandIn) and not top.waiting:
            top = top.below
            if top is None:
                del vars(self.owner)[self.name]
            else:
                vars(self.owner)[self.name] = top
        return was
