"""Schedules: how far on its way to the target sparsity a fit is, at each step.

The cubic schedule is that of Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of
pruning for model compression", 2017, https://arxiv.org/abs/1710.01878, eq. 1:
`s_t = s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt)) ** 3`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

__all__ = ["Schedule", "agp", "as_schedule", "cos", "lin", "one_shot"]

Moment = float | int
Interval = int | str | None

_ABOUT = 100  # updates in a long span when no interval is asked for


@dataclass(frozen=True)
class Schedule:
    """The share of the way from the initial to the final sparsity, over a span of a fit.

    Called with `p` in [0, 1], the progress through the span, it returns the share of the way; the
    sparsity at an update is `s_i + share * (s_f - s_i)`. A schedule never changes: `over` returns
    another one.

    Args:
        func: `p` in [0, 1] -> share in [0, 1].
        start: where the span begins; a float is a share of the fit, an int counts its steps
            (training batches).
        end: where it ends, likewise.
        every: steps between updates; `'epoch'` for one an epoch; None spreads about 100 updates
            over the span (every step, where it has fewer than 200).
        name: shown in tables and plots.
    """

    func: Callable[[float], float]
    start: Moment = 0.0
    end: Moment = 1.0
    every: Interval = None
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.func):
            raise TypeError(f"a schedule's func must be callable, got {self.func!r}")
        _check_moment("start", self.start)
        _check_moment("end", self.end)
        whole = isinstance(self.every, Integral) and not isinstance(self.every, bool)
        if not (self.every is None or self.every == "epoch" or (whole and self.every >= 1)):
            raise ValueError(
                f"every must be a number of steps >= 1, 'epoch' or None, got {self.every!r}"
            )
        comparable = isinstance(self.start, Integral) == isinstance(self.end, Integral)
        if comparable and self.end < self.start:
            raise ValueError(f"a schedule must end after it starts, got {self._span}")

    def __call__(self, p: float) -> float:
        """Share of the way at progress `p` through the span.

        Raises:
            ValueError: `p`, or what the function makes of it, is outside [0, 1].
        """
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"progress must be in [0, 1], got {p!r}")
        try:
            share = self.func(p)
        except Exception as error:  # whatever user code raises
            raise ValueError(
                f"schedule {self.name or self.func!r} failed at progress {p:g}: "
                f"{type(error).__name__}: {error}; it is called with one number in [0, 1]"
            ) from error
        number = isinstance(share, Real) and not isinstance(share, bool)
        if not number or not 0.0 <= share <= 1.0:
            raise ValueError(
                f"schedule {self.name or self.func!r} must return a share of the way in [0, 1], "
                f"got {share!r} at progress {p:g}"
            )
        return float(share)

    def over(self, start: Any = ..., end: Any = ..., every: Any = ...) -> Schedule:
        """The same curve over another span, or with another interval; what is left out stays."""
        asked = {"start": start, "end": end, "every": every}
        return replace(self, **{k: v for k, v in asked.items() if v is not ...})

    def updates(self, total: int, per_epoch: int | None = None) -> list[tuple[int, float]]:
        """All updates `(t, share)` of a fit of `total` steps; `t` counts finished steps.

        They come at `t0, t0 + dt, ..., t0 + n dt` with `n = max(1, floor((end - t0) / dt))`, and
        the shares at both ends are exactly `func(0)` and `func(1)`. A span of no length is a
        single update with the whole share, and one shorter than `dt` ends at `t0 + dt`.

        Args:
            total: training steps in the fit.
            per_epoch: training steps in an epoch; needed for `every='epoch'`.
        """
        first, last = _step(self.start, total), _step(self.end, total)
        if last < first:
            raise ValueError(
                f"the schedule's span {self._span} ends before it starts in a fit of {total} steps"
            )
        if last == first:
            return [(first, self(1.0))]
        dt = self._interval(last - first, per_epoch)
        n = max(1, (last - first) // dt)
        return [(first + k * dt, self(k / n)) for k in range(n + 1)]

    def _interval(self, span: int, per_epoch: int | None) -> int:
        if self.every is None:
            return max(1, span // _ABOUT)
        if self.every != "epoch":
            return int(self.every)
        if per_epoch is None:
            raise ValueError("every='epoch' needs per_epoch, the number of steps in an epoch")
        return per_epoch

    @property
    def _span(self) -> str:
        return f"from {self.start!r} to {self.end!r}"

    def plot(self, total: int = 1000, ax: Any = None) -> Any:
        """Draw the share of the way over a fit of `total` steps; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        ax = ax or plt.subplots(figsize=(5, 3))[1]
        updates = self.updates(total, per_epoch=max(1, total // 10))
        steps = [0, *(t for t, _ in updates), max(total, updates[-1][0])]
        shares = [0.0, *(share for _, share in updates), updates[-1][1]]
        ax.step([t / total for t in steps], shares, where="post", label=self.name or None)
        ax.set(xlabel="share of the fit", ylabel="share of the target", ylim=(-0.03, 1.03))
        ax.set_title(f"schedule {self.name}".strip())
        return ax


def as_schedule(schedule: Schedule | Callable[[float], float]) -> Schedule:
    """A schedule as it is; any other function of the progress runs over the whole fit."""
    if isinstance(schedule, Schedule):
        return schedule
    if not callable(schedule):
        raise TypeError(
            f"schedule must be a Schedule (agp, lin, cos, one_shot) or a function from progress "
            f"in [0, 1] to a share in [0, 1], got {schedule!r}"
        )
    return Schedule(schedule, name=getattr(schedule, "__name__", ""))


def _check_moment(name: str, value: Moment) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a float (share of the fit) or an int (steps): {value!r}")
    if isinstance(value, Integral):
        if value < 0:
            raise ValueError(f"{name} must be at least 0 steps, got {value}")
    elif not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name} must be a share of the fit in [0, 1], got {value}; pass an int to count steps"
        )


def _step(moment: Moment, total: int) -> int:
    return int(moment) if isinstance(moment, Integral) else round(moment * total)


def _cubic(p: float) -> float:
    return 1.0 - (1.0 - p) ** 3


def _linear(p: float) -> float:
    return p


def _cosine(p: float) -> float:
    return (1.0 - math.cos(math.pi * p)) / 2.0


def _at_once(p: float) -> float:
    return 1.0


agp = Schedule(_cubic, 0.2, 0.8, name="agp")
lin = Schedule(_linear, 0.2, 0.8, name="lin")
cos = Schedule(_cosine, 0.2, 0.8, name="cos")
one_shot = Schedule(_at_once, 0.5, 0.5, name="one_shot")
