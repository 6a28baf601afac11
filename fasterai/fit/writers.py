"""What TensorBoard is told beside the columns of the training table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["write_scalars"]


def write_scalars(learn: Any, values: Callable[[], Mapping[str, float]]) -> None:
    """Give numbers to the writers of callbacks, such as fastai's `TensorBoardCallback`.

    Args:
        learn: a Learner in a fit.
        values: makes the numbers by name; not called where nobody listens.
    """
    running = [cb for cb in learn.cbs if getattr(cb, "run", True)]
    writers = [getattr(cb, "writer", None) for cb in running]
    writers = [w for w in writers if callable(getattr(w, "add_scalar", None))]
    for name, value in values().items() if writers else ():
        for writer in writers:
            writer.add_scalar(name, value, learn.train_iter)
