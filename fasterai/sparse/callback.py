"""The fastai callback that makes a network sparse while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from fastai.callback.core import Callback
from fastai.learner import Recorder
from torch import Tensor

from ..core.criteria import Criterion, as_criterion, large_final
from ..core.granularity import Granularity
from ..core.masks import Limits, as_fraction
from ..core.names import LayerChoice, as_choices
from ..core.schedule import Schedule, agp, as_schedule
from ..measure.pictures import plot_steps
from .choose import NothingToSparsify
from .sparsifier import Sparsifier

__all__ = ["SparsifyCallback"]


class SparsifyCallback(Callback):
    """Drive weights to zero during `fit`, a share that grows by a schedule.

    ```python
    learn.fit_one_cycle(5, cbs=SparsifyCallback(0.5, 'filter'))
    ```
    After every optimizer step what is zeroed is exactly zero again. A `sparsity` column appears in
    the training table. Frozen layers are left alone. Nothing is attached to the model.

    Args:
        sparsity: the share of the groups to zero, a fraction in [0, 1]; a pair
            (initial, final); or {layer name: fraction} under 'local', the others staying dense.
            Without an initial value the way begins at what is already zero, and that stays zero.
        granularity: 'weight', 'row', 'column', 'kernel', 'filter', ...; see `Sparsifier`.
        context: 'local' reaches the sparsity in each layer, 'global' over all of them.
        criteria: scores of weights, higher = keep.
        schedule: share of the way by progress; `agp` runs from 0.2 to 0.8 of the fit. Any other
            function from [0, 1] to [0, 1] runs over the whole fit.
        layers: names or types of layers to sparsify; default every conv and linear layer but the
            output layer.
        exclude: names or types of layers to leave alone.
        min_keep: groups that stay in each layer, at least.
        round_to: the number of groups kept becomes a multiple of this.
        example_inputs: to see which layers are coupled; default the first training batch.
        mixed: 'filter' also zeroes channels that layer, RMS and group norms normalise together.
        whole_heads: attention heads are zeroed as a whole; else each becomes narrower.
    """

    order = Recorder.order + 5  # after its columns, before the progress bar shows them
    remove_on_fetch = True

    def __init__(
        self,
        sparsity: float | tuple[float, float] | Mapping[str, float],
        granularity: str = "weight",
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        schedule: Schedule | Callable[[float], float] = agp,
        *,
        layers: LayerChoice | Iterable[LayerChoice] | None = None,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        min_keep: int = 1,
        round_to: int = 1,
        example_inputs: Any = None,
        mixed: bool = False,
        whole_heads: bool = False,
    ) -> None:
        super().__init__()
        if context not in ("local", "global"):
            raise ValueError(f"context must be 'local' or 'global', got {context!r}")
        self.initial, self.sparsity = _initial_and_final(sparsity)
        self.granularity = Granularity(granularity).name
        self.context = context
        self.criteria = as_criterion(criteria)
        self.schedule = as_schedule(schedule)
        Limits(min_keep, round_to)
        self.min_keep, self.round_to = min_keep, round_to
        self.layers = None if layers is None else as_choices(layers)
        self.exclude, self.example_inputs = as_choices(exclude), example_inputs
        self.mixed, self.whole_heads = mixed, whole_heads
        self.history: list[tuple[int, float]] = []
        self._sparsifier: Sparsifier | None = None
        self._training = self._silent = False

    # --- events --------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Add the column; what needs a batch waits for the first one."""
        self._training = False
        self._silent = hasattr(self.learn, "lr_finder") or hasattr(self.learn, "gather_preds")
        if not self._silent and hasattr(self.learn, "recorder"):
            names = self.learn.recorder.metric_names
            at = len(names) - bool(self.learn.recorder.add_time)
            self.learn.recorder.metric_names = names[:at] + ["sparsity"] + names[at:]

    def before_batch(self) -> None:
        """Start with the first training batch; an update may be due at step 0."""
        if self._silent or not self.training:
            return
        if not self._training:
            self._start()
        self._update(self._finished)

    def after_step(self) -> None:
        """Zero again what the optimizer moved."""
        if self._training and self._sparsifier is not None:
            self._sparsifier.apply()

    def after_batch(self) -> None:
        """Update, where one is due after this many batches."""
        if self._training and self.training:
            self._update(self._finished + 1)

    def after_validate(self) -> None:
        """Fill the column."""
        if self._training and hasattr(self.learn, "recorder"):
            reached = self._sparsifier.reached() if self._sparsifier is not None else 0.0
            self.learn.recorder.log.append(reached)

    def after_fit(self) -> None:
        """Let go of the masks."""
        self._training = self._silent = False
        if self._sparsifier is not None:
            self._sparsifier.release()

    # --- afterwards ----------------------------------------------------------------------------

    def report(self) -> pd.DataFrame:
        """What was asked and what the model holds, a row a layer; see `Sparsifier.report`."""
        if self._sparsifier is None:
            raise RuntimeError("nothing to report: no fit with this callback, or all was frozen")
        return self._sparsifier.report()

    def plot_sparsity(self, ax: Any = None) -> Any:
        """Draw the sparsity reached over the steps of the last fit; returns the axes."""
        if not self.history:
            raise RuntimeError("nothing to plot yet: fit with this callback first")
        title = f"{self.granularity} sparsity, schedule {self.schedule.name or 'of your own'}"
        return plot_steps(
            self.history, self._total, ylabel="share of groups at zero", title=title, ax=ax
        )

    # --- inside --------------------------------------------------------------------------------

    @property
    def _finished(self) -> int:
        return self.epoch * self.n_iter + self.iter

    def _start(self) -> None:
        """Look at the model and the schedule; raises before anything is changed."""
        self._total = self.n_epoch * self.n_iter
        self._updates = self.schedule.updates(self._total, self.n_iter)
        self._warn_of_span()
        self.history, self._done = [], 0
        self._sparsifier = sparsifier = self._sparsifier_of_model()
        if sparsifier is not None:
            self._to = sparsifier.targets(self.sparsity)
            initial = self.initial
            self._from = sparsifier.held() if initial is None else sparsifier.targets(initial)
            if any(self._to):
                sparsifier.check_criteria()  # one that fails does so before training
            if not any(self._to):
                sparsifier.release()  # nothing is asked: train as without a callback
            sparsifier.apply()
        self._training = True

    def _sparsifier_of_model(self) -> Sparsifier | None:
        example = self.xb if self.example_inputs is None else self.example_inputs
        try:
            sparsifier = Sparsifier(
                self.learn.model,
                self.granularity,
                self.context,
                self.criteria,
                layers=self.layers,
                exclude=self.exclude,
                min_keep=self.min_keep,
                round_to=self.round_to,
                example_inputs=example,
                mixed=self.mixed,
                whole_heads=self.whole_heads,
            )
        except NothingToSparsify as error:
            if not error.frozen:
                raise
            warnings.warn(f"{error}. Call learn.unfreeze() to sparsify frozen layers", stacklevel=2)
            return None
        if sparsifier.frozen_share > 0.1:
            warnings.warn(
                f"{sparsifier.frozen_share:.0%} of the weights are frozen, stay dense and do not "
                f"count; call learn.unfreeze() to sparsify them (fine_tune does so by itself after "
                f"its first part)",
                stacklevel=2,
            )
        return sparsifier

    def _update(self, finished: int) -> None:
        """Go to the last update that is due, if it is a new one."""
        due = self._done
        while due < len(self._updates) and self._updates[due][0] <= finished:
            due += 1
        if due == self._done:
            return
        self._done = due
        if self._sparsifier is None:
            return
        share = self._updates[due - 1][1]
        if not any(self._to):
            return
        way = zip(self._from, self._to, strict=True)
        now = [(1 - share) * a + share * b for a, b in way]
        self._sparsifier.sparsify_to(now, asked=self._to)
        self.history.append((finished, self._sparsifier.reached()))

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
        elif self._updates[-1][1] < 1:
            warnings.warn(
                f"the schedule ends at {self._updates[-1][1]:.0%} of the way to the target: it "
                f"should go from progress to the share of the way, 1 at the end",
                stacklevel=2,
            )


def _initial_and_final(sparsity: Any) -> tuple[float | None, Any]:
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise ValueError("sparsity by layer must name at least one layer, got an empty dict")
        return None, {k: as_fraction(v, f"sparsity of {k!r}") for k, v in sparsity.items()}
    if isinstance(sparsity, Sequence) and not isinstance(sparsity, str):
        if len(sparsity) != 2:
            raise ValueError(f"sparsity must be a fraction or (initial, final), got {sparsity!r}")
        initial, final = (as_fraction(s) for s in sparsity)
        if final < initial:
            raise ValueError(f"the final sparsity must not be below the initial, got {sparsity!r}")
        return initial, final
    return None, as_fraction(sparsity)
