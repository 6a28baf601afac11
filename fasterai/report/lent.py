"""A learner lent for a while, and given back as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..core.copies import copied_with
from ..core.names import unwrapped
from ..score.batches import drawn

__all__ = ["lent"]


@contextmanager
def lent(learn: Any) -> Iterator[None]:
    """While this lasts a fastai learner works on copies of its model and of its optimizer.

    Afterwards, however it ends, it has its own again, which nobody touched; and its attributes,
    its callbacks and theirs, and the random state, that of its loaders too, are those of before. It
    shows no bars and tables meanwhile.
    """
    kept = [(each, dict(vars(each))) for each in (learn, *learn.cbs)]
    network = unwrapped(learn.model)
    try:
        with drawn(learn.dls.train, network), drawn(learn.dls.valid, network):
            learn.cbs = copy.copy(learn.cbs)
            # together, so that the copy of the optimizer has the copies of the parameters
            learn.model, learn.opt = copied_with(learn.model, learn.opt)
            _be_quiet(learn)
            yield
    finally:
        for each, attributes in kept:
            _put_back(vars(each), attributes)


def _be_quiet(learn: Any) -> None:
    learn.logger = _nothing
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)


def _nothing(_: Any) -> None:
    """Instead of a row of the training table."""


def _put_back(now: dict[str, Any], before: Mapping[str, Any]) -> None:
    now.update(before)
    for name in now.keys() - before.keys():
        del now[name]
