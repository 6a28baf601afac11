"""A fastai callback that follows a schedule while a fit runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from fastai.callback.core import Callback
from fastai.learner import Recorder
from torch import Tensor

from ..core.criteria import Criterion, NothingToCompare, as_criterion
from ..core.schedule import Chain, Schedule, as_schedule
from ..measure.pictures import plot_steps

__all__ = ["ScheduledCallback"]


class ScheduledCallback(Callback):
    """Take a network towards a target during `fit`, a share of the way at each update.

    A subclass says in `columns` what it adds to the training table and fills in `begin`, `go`,
    `reached`, `values` and `finish`. It is silent in `lr_find`, `validate` and `get_preds`. Steps
    are the training batches of this fit that are finished, `epoch * n_iter + iter`.

    Args:
        criteria: scores of weights. Where it reads gradients, updates come in `before_step`, when
            they are complete; else between batches. An update at which there is nothing to
            compare yet, or no gradient, waits for the next step.
        schedule: share of the way by progress.

    Attributes:
        history: (finished steps, reached) of each update of the last fit.
    """

    order = Recorder.order + 5  # after its columns, before the progress bar shows them
    remove_on_fetch = True
    columns: tuple[str, ...] = ()

    def __init__(
        self,
        criteria: Criterion | Callable[[Tensor], Tensor],
        schedule: Schedule | Chain | Callable[[float], float],
    ) -> None:
        super().__init__()
        self.criteria = as_criterion(criteria)
        self.schedule = as_schedule(schedule)
        self.history: list[tuple[int, float]] = []
        self._training = self._silent = False

    # --- for subclasses ------------------------------------------------------------------------

    def begin(self) -> bool:
        """Look at the model at the first batch; False where nothing is asked of it.

        `_updates` and `_total` are there. What is wrong with the model or the arguments is raised
        before anything is changed.
        """
        raise NotImplementedError

    def go(self, share: float, before: float) -> None:
        """Go from one share of the way to another; `NothingToCompare` makes the update wait."""
        raise NotImplementedError

    def reached(self) -> float:
        """What goes into `history`, a share."""
        raise NotImplementedError

    def values(self) -> list[Any]:
        """A value for each of the `columns`, after an epoch."""
        return [self.reached()]

    def finish(self) -> None:
        """Let go of what only the fit needed."""

    @property
    def finished(self) -> int:
        """Training steps of this fit that lie behind; inside a batch, without it."""
        return self.epoch * self.n_iter + self.iter

    # --- events --------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Add the columns; what needs a batch waits for the first one."""
        self._training = False
        self._silent = hasattr(self.learn, "lr_finder") or hasattr(self.learn, "gather_preds")
        if not self._silent and hasattr(self.learn, "recorder"):
            names = self.learn.recorder.metric_names
            at = len(names) - bool(self.learn.recorder.add_time)
            self.learn.recorder.metric_names = names[:at] + list(self.columns) + names[at:]

    def before_batch(self) -> None:
        """Start with the first training batch; an update may be due at step 0."""
        if self._silent or not self.training:
            return
        if not self._training:
            self._start()
        if not self._reads_gradients:
            self._update(self.finished)

    def before_step(self) -> None:
        """Update where the criterion reads gradients: they are complete, and not yet zeroed."""
        if self._training and self._reads_gradients:
            self._update(self.finished + 1)

    def after_batch(self) -> None:
        """Update, where one is due after this many batches."""
        if not (self._training and self.training):
            return
        last = self.finished + 1 == self._total
        if last or not self._reads_gradients:  # accumulated gradients may end without a step
            self._update(self.finished + 1)
        if last and self._waiting:
            warnings.warn(f"the target was not reached: {self._waiting}", stacklevel=2)

    def after_validate(self) -> None:
        """Fill the columns."""
        if self._training and hasattr(self.learn, "recorder"):
            self.learn.recorder.log.extend(self.values())

    def after_fit(self) -> None:
        """Let go of what only the fit needed."""
        self._training = self._silent = False
        self.finish()

    # --- inside --------------------------------------------------------------------------------

    @property
    def _reads_gradients(self) -> bool:
        return "gradient" in self.criteria.needs

    def _start(self) -> None:
        self._total = self.n_epoch * self.n_iter
        self._updates = self.schedule.updates(self._total, self.n_iter)
        self._warn_of_span()
        self.history, self._done, self._share, self._waiting = [], 0, 0.0, ""
        self._moves = self.begin()
        self._training = True

    def _update(self, finished: int) -> None:
        """Go to the last update that is due, if it is a new one."""
        due = self._done
        while due < len(self._updates) and self._updates[due][0] <= finished:
            due += 1
        if due == self._done:
            return
        was, self._waiting = (self._done, self._share), ""
        self._done, self._share = due, self._updates[due - 1][1]
        if not self._moves:
            return
        try:
            self.go(self._share, was[1])
        except NothingToCompare as error:
            self._done, self._share = was
            self._waiting = str(error)
            return
        self.history.append((finished, self.reached()))

    def _warn_of_span(self) -> None:
        first, last = self._updates[0][0], self._updates[-1][0]
        if first > self._total or (first == self._total and len(self._updates) > 1):
            warnings.warn(
                f"the schedule never fires: it starts at step {first}, the fit has {self._total}; "
                f"train longer or start it earlier, as in schedule.over(start=0.2)",
                stacklevel=2,
            )
        elif last > self._total:
            warnings.warn(
                f"the target is not reached in this fit: the last update is due at step {last}, "
                f"the fit has {self._total}; train longer, end it earlier or update more often",
                stacklevel=2,
            )
        elif max(share for _, share in self._updates) < 1:
            furthest = max(share for _, share in self._updates)
            warnings.warn(
                f"the schedule gets to {furthest:.0%} of the way to the target: it should go from "
                f"progress to the share of the way, and reach 1",
                stacklevel=2,
            )

    def _plot(self, ylabel: str, title: str, ax: Any = None) -> Any:
        """Draw `history` over the steps of the last fit; returns the axes."""
        if not self.history:
            raise RuntimeError("nothing to plot yet: fit with this callback first")
        return plot_steps(self.history, self._total, ylabel=ylabel, title=title, ax=ax)
