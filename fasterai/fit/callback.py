"""fastai callbacks that take part in training only, and such that follow a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastai.callback.core import Callback
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.learner import Learner, Recorder
from fastai.torch_core import join_path_file
from torch import Tensor

from ..core.criteria import Criterion, NothingToCompare, as_criterion
from ..core.processes import Processes, is_first
from ..core.schedule import Chain, Schedule, as_schedule, falls
from ..core.warning import warn
from ..measure.pictures import plot_steps
from ..score.gradients import OF_GRADIENTS
from .gathering import Gathering
from .saved import unlike_tensors
from .stand_in import StandIn
from .writers import write_scalars

__all__ = ["FitCallback", "ScheduledCallback"]


class FitCallback(Callback):
    """Take part in training, and neither in `lr_find` nor in `validate` and `get_preds`.

    A subclass fills in `begin`, `hold` and `finish`.

    Attributes:
        holds: whether `hold` is to be called after each optimizer step.
    """

    order = Recorder.order + 5  # after its columns, before the progress bar shows them
    remove_on_fetch = True
    holds = False
    _learn: Learner | None = None
    _training = _to_train = _silent = _hold_twice = False
    _stand_ins: tuple[StandIn, ...] = ()
    _processes = Processes()

    # --- for subclasses ------------------------------------------------------------------------

    def begin(self) -> Any:
        """Look at the model at the first training batch; raises before anything is changed."""

    def hold(self) -> None:
        """Put right what the optimizer moved; also where its step was interrupted."""

    def finish(self) -> None:
        """Let go of what only the fit needed."""

    def warn(self, message: str) -> None:
        """Warn, in the first of several processes."""
        if is_first():
            warn(message)

    # --- events --------------------------------------------------------------------------------

    @property
    def learn(self) -> Learner | None:
        """The learner; taken away when the fit that was given this callback ends, however."""
        return self._learn

    @learn.setter
    def learn(self, learn: Learner | None) -> None:
        vars(self)["_learn"] = learn
        if learn is None:
            self._step_aside()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it without fastai's warning that a layer of the model may have the same name."""
        object.__setattr__(self, name, value)

    def before_fit(self) -> None:
        """Wait for the first batch."""
        self._step_aside()
        self._training = self._to_train = False
        self._silent = hasattr(self.learn, "lr_finder") or hasattr(self.learn, "gather_preds")

    def before_train(self) -> None:
        """See that this is a fit that trains: validate() and get_preds() have its events, too."""
        self._to_train = True

    def before_batch(self) -> None:
        """Start with the first training batch."""
        if self.training and not self._training and not self._silent:
            self._processes = Processes(self.learn.model)
            self._start()

    def before_step(self) -> None:
        """Hold right after the optimizer, before anybody can look, stop or fail."""
        if self._training and self.holds:
            self._instead_of(self.learn.opt, "step", self._step_and_hold)

    def after_step(self) -> None:
        """Hold again, where others may have moved weights since, or it was not `opt.step`."""
        if self._training and self.holds and (self._step_aside() or self._hold_twice):
            self.hold()

    def after_fit(self) -> None:
        """Let go of what only the fit needed."""
        self._step_aside()
        if self._to_train and not self._training and not self._silent:
            self.warn(f"{type(self).__name__} did nothing: no training batch came")
        self._training = self._silent = False
        self._processes = Processes()
        self.finish()

    # --- inside --------------------------------------------------------------------------------

    def _start(self) -> None:
        self._hold_twice = _others_may_step(self.learn)
        self._moves = self.begin()
        self._training = True

    def _instead_of(self, owner: Any, name: str, instead: Callable[..., Any]) -> None:
        self._stand_ins = (*self._stand_ins, StandIn(owner, name, instead))

    def _step_aside(self) -> bool:
        """Take out what stands in for others; whether any of it had not been called."""
        stand_ins, self._stand_ins = self._stand_ins, ()
        waited = [each.undo() for each in stand_ins]
        return any(waited)

    def _step_and_hold(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        finally:
            self.hold()


def _others_may_step(learn: Learner) -> bool:
    """Whether code unknown here takes part, or such that moves weights after the optimizer."""
    known = [type(cb).__module__.split(".")[0] in ("fastai", "fasterai") for cb in learn.cbs]
    moves = any(isinstance(cb, NonNativeMixedPrecision) for cb in learn.cbs)
    return moves or not all(known) or type(learn) is not Learner


def _nothing(method: Callable[[], Any]) -> None:
    """Instead of an event."""


def _file_of(saver: SaveModelCallback) -> Any:
    folder = saver.learn.path / saver.learn.model_dir
    return join_path_file(saver.fname, folder, ext=".pth")


def _due_before(updates: list[tuple[int, float]], begun: int) -> list[float]:
    """The shares of the updates that show in a model saved after this many steps."""
    due = [(t, share) for t, share in updates if t <= begun and begun]
    if len(due) > 1 and due[-1][0] == begun and falls(due[-2][1], due[-1][1]):
        due.pop()  # what came back had no step yet to become other than zero
    return [share for _, share in due]


class ScheduledCallback(FitCallback):
    """Take a network towards a target during `fit`, a share of the way at each update.

    A subclass says in `columns` what it adds to the training table and fills in `go`, `reached`
    and `values` beside what a `FitCallback` fills in. Its `begin` returns whether anything is
    asked; `_updates` and `_total` are there, and `_begun`, the shares of the updates that lie
    behind where a fit resumes at a later epoch, the last of which comes again. Steps are the
    training batches of this fit that are finished, `epoch * n_iter + iter`.

    Args:
        criteria: scores of weights. Where it reads gradients, updates come in `before_step`, when
            they are complete; else between batches. An update at which there is nothing to
            compare yet, or no gradient, waits for the next step. See `gather` for data.
        schedule: share of the way by progress.
        hold_trackers: fastai's trackers (`SaveModelCallback`, `EarlyStoppingCallback`,
            `ReduceLROnPlateau` and others of their kind) do not judge epochs before the target is
            reached: these are other networks, often better ones. What every epoch saves
            (`every_epoch`) goes on.

    Attributes:
        history: (finished steps, reached) of each update of the last fit.
    """

    columns: tuple[str, ...] = ()
    reshapes = False  # whether the network's tensors become smaller on the way

    def __init__(
        self,
        criteria: Criterion | Callable[[Tensor], Tensor],
        schedule: Schedule | Chain | Callable[[float], float],
        hold_trackers: bool = True,
    ) -> None:
        super().__init__()
        self.criteria = as_criterion(criteria)
        self.schedule = as_schedule(schedule)
        self.hold_trackers = hold_trackers
        self._gathering = Gathering(self.criteria)
        self.history: Sequence[tuple[int, float]] = []

    # --- for subclasses ------------------------------------------------------------------------

    def go(self, share: float, before: float) -> None:
        """Go from one share of the way to another; `NothingToCompare` makes the update wait."""
        raise NotImplementedError

    def reached(self) -> float:
        """What goes into `history`, a share."""
        raise NotImplementedError

    def forget(self) -> None:
        """Begin the history of another fit."""
        self.history = []

    def note(self, finished: int) -> None:
        """Write an update into the history."""
        self.history.append((finished, self.reached()))

    def curve(self) -> Sequence[tuple[int, float]]:
        """The history of the last fit, to be drawn."""
        return self.history

    def values(self) -> list[Any]:
        """A value for each of the `columns`, after an epoch."""
        return [self.reached()]

    def by_layer(self) -> Mapping[str, float]:
        """Numbers of single layers, after an epoch, for TensorBoard."""
        return {}

    def arrived(self) -> bool:
        """Whether the network already is where the way leads."""
        return False

    def gather(self, names: Iterable[str] | None = None) -> Criterion:
        """Gather from now on what the criterion needs of data; called by `begin`.

        Of gradients that is their mean since the last update; activations are seen in eval mode,
        on the training batch of the update.

        Args:
            names: the weights that will be scored; default all.

        Returns:
            The criterion to try, with ones in place of what will be gathered.
        """
        return self._gathering.start(self.learn.model, self.xb, names)

    def scored(self) -> Criterion:
        """The criterion with what was gathered, for `go`."""
        return self._gathering.scored(self.learn.model, self.xb, self.yb, self.learn.loss_func)

    @property
    def finished(self) -> int:
        """Training steps of this fit that lie behind; inside a batch, without it."""
        return self.epoch * self.n_iter + self.iter

    # --- events --------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Add the columns."""
        super().before_fit()
        if not self._silent and hasattr(self.learn, "recorder"):
            names = self.learn.recorder.metric_names
            at = len(names) - bool(self.learn.recorder.add_time)
            self.learn.recorder.metric_names = names[:at] + list(self.columns) + names[at:]

    def before_batch(self) -> None:
        """Start with the first training batch; an update may be due at step 0."""
        super().before_batch()
        if self._training and self.training and not self._reads_gradients:
            self._update(self.finished)

    def before_step(self) -> None:
        """Update where the criterion reads gradients: they are complete, and not yet zeroed."""
        if self._training and self._reads_gradients:
            self._gathering.step()
            self._update(self.finished + 1)
        super().before_step()

    def after_batch(self) -> None:
        """Update, where one is due after this many batches."""
        if not (self._training and self.training):
            return
        last = self.finished + 1 == self._total
        if last or not self._reads_gradients:  # accumulated gradients may end without a step
            self._update(self.finished + 1)
        if last and self._waiting:
            self.warn(f"the target was not reached: {self._waiting}")

    def after_validate(self) -> None:
        """Fill the columns."""
        if self._training and hasattr(self.learn, "recorder"):
            self.learn.recorder.log.extend(self.values())

    def after_epoch(self) -> None:
        """Tell TensorBoard, and keep trackers from judging an epoch on the way."""
        if self._training:
            write_scalars(self.learn, self.by_layer)
        if self._training and self._ahead:
            for tracker in self._trackers():
                self._instead_of(tracker, "after_epoch", _nothing)

    def after_fit(self) -> None:
        """Keep a best model that is none from being loaded, and let go."""
        useless = self._useless_files() if self._training else {}
        super().after_fit()
        self._gathering.finish()
        for saver, why in useless.items():
            self.warn(f"{saver} loads nothing: {why}")
        for saver in useless:
            self._instead_of(saver, "after_fit", _nothing)

    # --- inside --------------------------------------------------------------------------------

    @property
    def _reads_gradients(self) -> bool:
        return any(need in OF_GRADIENTS for need in self.criteria.wants)

    def _start(self) -> None:
        self._processes.must_agree(
            (self.n_epoch, self.n_iter),
            "all processes must train as many (epochs, batches an epoch), else they wait for each "
            "other forever; inside of learn.distrib_ctx() fastai deals the data out evenly",
        )
        self._total = self.n_epoch * self.n_iter
        self._updates = self.schedule.updates(self._total, self.n_iter)
        self._warn_of_span()
        self._waiting = ""
        self.forget()
        self._gathering = Gathering(self.criteria)
        self._begun = due = _due_before(self._updates, self.finished)
        self._done, self._share = max(0, len(due) - 1), due[-1] if due else 0.0
        super()._start()
        self._holds_trackers = self.hold_trackers and self._moves and not self.arrived()
        for tracker in self._trackers() if self._holds_trackers else ():
            tracker.best = math.inf if tracker.comp(0, 1) else -math.inf  # also what it kept

    @property
    def _ahead(self) -> bool:
        """Whether trackers have to wait for the target."""
        return self._holds_trackers and self._done < len(self._updates)

    def _trackers(self) -> list[TrackerCallback]:
        """All but what saves every epoch."""
        trackers = [cb for cb in self.learn.cbs if isinstance(cb, TrackerCallback)]
        return [cb for cb in trackers if not getattr(cb, "every_epoch", False)]

    def _useless_files(self) -> dict[SaveModelCallback, str]:
        """What would load something else at the end of the fit than the best at the target."""
        savers = [cb for cb in self._trackers() if isinstance(cb, SaveModelCallback)]
        savers = [cb for cb in savers if not cb.at_end]
        if not savers:
            return {}
        reasons = self._processes.decided(lambda: [self._why_useless(cb) for cb in savers])
        return {cb: why for cb, why in zip(savers, reasons, strict=True) if why}

    def _why_useless(self, saver: SaveModelCallback) -> str:
        if self._ahead:
            return (
                "the fit ended before the target was reached, and on the way nothing is judged "
                "(but with hold_trackers=False); the model is as the last step left it"
            )
        if self._holds_trackers and math.isinf(saver.best):
            return f"no epoch since the target was reached has a {saver.monitor} to compare"
        model = self.learn.model
        unlike = unlike_tensors(_file_of(saver), model) if self.reshapes else ()
        if unlike:
            return (
                f"its best model was saved before a cut and has other shapes ({unlike}); the model "
                f"is as the last step left it. With hold_trackers=True epochs before the last cut "
                f"are not judged"
            )
        return ""

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
        self._gathering.renew(self.learn.model, self.xb)
        self.note(finished)

    def _warn_of_span(self) -> None:
        first, last = self._updates[0][0], self._updates[-1][0]
        if first > self._total or (first == self._total and len(self._updates) > 1):
            self.warn(
                f"the schedule never fires: it starts at step {first}, the fit has {self._total}; "
                f"train longer or start it earlier, as in schedule.over(start=0.2)"
            )
        elif last > self._total:
            self.warn(
                f"the target is not reached in this fit: the last update is due at step {last}, "
                f"the fit has {self._total}; train longer, end it earlier or update more often"
            )
        elif max(share for _, share in self._updates) < 1:
            furthest = max(share for _, share in self._updates)
            self.warn(
                f"the schedule gets to {furthest:.0%} of the way to the target: it should go from "
                f"progress to the share of the way, and reach 1"
            )

    def _plot(self, ylabel: str, title: str, ax: Any = None) -> Any:
        """Draw the history over the steps of the last fit; returns the axes."""
        if not self.curve():
            raise RuntimeError("nothing to plot yet: fit with this callback first")
        return plot_steps(self.curve(), self._total, ylabel=ylabel, title=title, ax=ax)
