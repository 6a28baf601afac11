"""Schedules: how far on its way to the target sparsity a fit is, at each step.

A schedule is a curve (see `curves`) over a span of the fit. Several make a chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from . import curves
from .checks import is_number, is_whole, whole
from .former import explain_former

__all__ = [
    "SCHEDULES",
    "Chain",
    "Schedule",
    "agp",
    "available_schedules",
    "cos",
    "dsd",
    "iterative",
    "lin",
    "one_cycle",
    "one_shot",
]

Moment = float | int
Interval = int | str | None

_ABOUT = 100  # updates in a long span when no interval is asked for


@dataclass(frozen=True)
class Schedule:
    """The share of the way from the initial to the final sparsity, over a span of a fit.

    Called with `p` in [0, 1], the progress through the span, it returns the share of the way; the
    sparsity at an update is `s_i + share * (s_f - s_i)`. After the last update it stays. A
    schedule never changes: `over` and `then` return another one.

    Args:
        func: `p` in [0, 1] -> share in [0, 1].
        start: where the span begins; a float is a share of the fit, an int counts its steps
            (training batches).
        end: where it ends, likewise.
        every: steps between updates; `'epoch'` for one an epoch; None spreads about 100 updates
            over the span (every step, where it has fewer than 200).
        name: shown in tables and plots.
        n_steps: instead of `every`: the way is taken in this many steps, the first of them at the
            start of the span, each followed by an equal part of the span.
        to: the share where the way of this schedule ends; less than 1 leaves some to the next one
            in a `Chain`.
    """

    func: Callable[[float], float]
    start: Moment = 0.0
    end: Moment = 1.0
    every: Interval = None
    name: str = ""
    n_steps: int | None = None
    to: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.func):
            raise TypeError(f"a schedule's func must be callable, got {self.func!r}")
        _check_moment("start", self.start)
        _check_moment("end", self.end)
        counted = is_whole(self.every) and self.every >= 1
        if not (counted or self.every is None or self.every == "epoch"):
            raise ValueError(
                f"every must be a number of steps >= 1, 'epoch' or None, got {self.every!r}"
            )
        if self.n_steps is not None:
            whole(self.n_steps, "n_steps", 1, " or None")
        if self.every is not None and self.n_steps is not None:
            raise ValueError(
                f"choose every={self.every!r} or n_steps={self.n_steps}, with None for the other"
            )
        if not is_number(self.to) or not 0 <= self.to <= 1:
            raise ValueError(f"to must be a share of the way in [0, 1], got {self.to!r}")
        if _before(self.end, self.start):
            raise ValueError(f"a schedule must end after it starts, got {self._span}")

    def __call__(self, p: float) -> float:
        """Share of the way at progress `p` through the span.

        Raises:
            ValueError: `p`, or what the function makes of it, is outside [0, 1].
        """
        return self.to * self._curve(p)

    def _curve(self, p: float) -> float:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"progress must be in [0, 1], got {p!r}")
        if self.n_steps is not None:
            p = math.ceil(round(p * self.n_steps, 9)) / self.n_steps  # 9: k / n * n may exceed k
        try:
            share = self.func(p)
        except Exception as error:  # whatever user code raises
            raise ValueError(
                f"schedule {self.name or self.func!r} failed at progress {p:g}: "
                f"{type(error).__name__}: {error}; it is called with one number in [0, 1]"
            ) from error
        if not is_number(share) or not 0.0 <= share <= 1.0:
            raise ValueError(
                f"schedule {self.name or self.func!r} must return a share of the way in [0, 1], "
                f"got {share!r} at progress {p:g}"
            )
        return float(share)

    def over(
        self,
        start: Any = ...,
        end: Any = ...,
        every: Any = ...,
        *,
        n_steps: Any = ...,
        to: Any = ...,
    ) -> Schedule:
        """The same curve over another span, or in other steps; what is left out stays."""
        asked = {"start": start, "end": end, "every": every, "n_steps": n_steps, "to": to}
        return replace(self, **{k: v for k, v in asked.items() if v is not ...})

    def then(self, other: Schedule | Chain) -> Chain:
        """Chain this schedule with another one that goes on from where this one ended.

        ```python
        agp.over(0.1, 0.4, to=0.5).then(lin.over(0.6, 0.9))  # half of the way, hold, the rest
        agp.over(0.1, 0.4).then(lin.over(0.6, 0.9, to=0.0))  # up, hold, and back down
        ```
        """
        return Chain((self, *_legs(other)))

    def updates(self, total: int, per_epoch: int | None = None) -> list[tuple[int, float]]:
        """All updates `(t, share)` of a fit of `total` steps; `t` counts finished steps.

        They come at `t0, t0 + dt, ..., t0 + n dt` with `n = max(1, floor((end - t0) / dt))`, and
        the shares at both ends are exactly `func(0)` and `func(1)`. A span of no length is a
        single update with the whole share, and one shorter than `dt` ends at `t0 + dt`. With
        `n_steps` they are at `t0 + k * span / n_steps`, rounded down, for k from 0 on, with the
        shares `func((k + 1) / n_steps)`.

        Args:
            total: training steps in the fit.
            per_epoch: training steps in an epoch; needed for `every='epoch'`.
        """
        return self._updates(0.0, total, per_epoch)

    def _updates(self, origin: float, total: int, per_epoch: int | None) -> list[tuple[int, float]]:
        """The updates of a way that begins at the share `origin` and ends at `to`."""
        shares = [(t, self._curve(p)) for t, p in self._moments(total, per_epoch)]
        return [(t, (1 - share) * origin + share * self.to) for t, share in shares]

    def _moments(self, total: int, per_epoch: int | None) -> list[tuple[int, float]]:
        """When to update, and the progress through the span that this stands for."""
        first, last = _step(self.start, total), _step(self.end, total)
        if last < first:
            raise ValueError(
                f"the schedule's span {self._span} ends before it starts in a fit of {total} steps"
            )
        if last == first:
            return [(first, 1.0)]
        if self.n_steps is not None:
            n, span = self.n_steps, last - first
            return list({first + k * span // n: (k + 1) / n for k in range(n)}.items())
        dt = self._interval(last - first, per_epoch)
        n = max(1, (last - first) // dt)
        return [(first + k * dt, k / n) for k in range(n + 1)]

    def _interval(self, span: int, per_epoch: int | None) -> int:
        if self.every is None:
            return max(1, span // _ABOUT)
        if self.every != "epoch":
            return int(self.every)
        if per_epoch is None:
            raise ValueError("every='epoch' needs per_epoch, the number of steps in an epoch")
        return whole(per_epoch, "per_epoch", 1)

    @property
    def _span(self) -> str:
        return f"from {self.start!r} to {self.end!r}"

    def plot(self, total: int = 1000, ax: Any = None) -> Any:
        """Draw the share of the way over a fit of `total` steps; returns the matplotlib axes."""
        return _plot(self, total, ax)


@dataclass(frozen=True)
class Chain:
    """Schedules one after the other; each goes on from the share where the last one ended.

    Between two of them the sparsity holds. Made by `Schedule.then`.

    Args:
        legs: in the order of their spans, which must not overlap.

    Raises:
        ValueError: a leg starts before the one in front of it has ended. Where one counts steps and
            the other shares of the fit, only `updates` can see that.
    """

    legs: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        for leg in self.legs:
            if not isinstance(leg, Schedule):
                raise TypeError(
                    f"the legs of a Chain are Schedules, got {leg!r}: for a function pass "
                    f"Schedule(function)"
                )
        if not self.legs:
            raise ValueError("a Chain has one leg or more, as in agp.over(0.1, 0.4).then(lin)")
        for one, two in zip(self.legs, self.legs[1:], strict=False):
            if _before(two.start, one.end):
                raise ValueError(
                    f"schedule {two.name!r} starts at {two.start!r}, before {one.name!r} in front "
                    f"of it ends at {one.end!r}; move one of them with over(start, end)"
                )

    @property
    def name(self) -> str:
        """The names of the legs."""
        return ", ".join(leg.name or "a function" for leg in self.legs)

    def then(self, other: Schedule | Chain) -> Chain:
        """One more schedule behind these."""
        return Chain((*self.legs, *_legs(other)))

    def updates(self, total: int, per_epoch: int | None = None) -> list[tuple[int, float]]:
        """All updates `(t, share)` of a fit of `total` steps, see `Schedule.updates`."""
        found: dict[int, float] = {}
        share, end = 0.0, 0
        for leg in self.legs:
            updates = leg._updates(share, total, per_epoch)
            if updates[0][0] < end:
                raise ValueError(
                    f"schedule {leg.name!r} starts at step {updates[0][0]} of {total}, and the one "
                    f"in front of it has its last update at step {end}; move one of them"
                )
            found |= dict(updates)
            end, share = updates[-1]
        return list(found.items())

    def plot(self, total: int = 1000, ax: Any = None) -> Any:
        """Draw the share of the way over a fit of `total` steps; returns the matplotlib axes."""
        return _plot(self, total, ax)


def as_schedule(schedule: Schedule | Chain | Callable[[float], float]) -> Schedule | Chain:
    """A schedule as it is; any other function of the progress runs over the whole fit."""
    if isinstance(schedule, (Schedule, Chain)):
        return schedule
    if not callable(schedule):
        raise TypeError(
            f"schedule must be a Schedule ({', '.join(available_schedules())}) or a function from "
            f"progress in [0, 1] to a share in [0, 1], got {schedule!r}"
        )
    return Schedule(schedule, name=getattr(schedule, "__name__", ""))


def available_schedules() -> list[str]:
    """The names of the schedules there are."""
    return [schedule.name for schedule in SCHEDULES]


def falls(before: float, after: float) -> bool:
    """Whether one share is below another by more than rounding."""
    return after < before - 1e-9


def goes_down(updates: Sequence[tuple[int, float]]) -> bool:
    """Whether the share falls anywhere, so that weights come back."""
    shares = [share for _, share in updates]
    return any(falls(a, b) for a, b in zip(shares, shares[1:], strict=False))


def _legs(schedule: Schedule | Chain) -> tuple[Schedule, ...]:
    schedule = as_schedule(schedule)
    return schedule.legs if isinstance(schedule, Chain) else (schedule,)


def _plot(schedule: Schedule | Chain, total: int, ax: Any) -> Any:
    import matplotlib.pyplot as plt

    whole(total, "total", 1)
    ax = ax or plt.subplots(figsize=(5, 3))[1]
    updates = schedule.updates(total, per_epoch=max(1, total // 10))
    steps = [0, *(t for t, _ in updates), max(total, updates[-1][0])]
    shares = [0.0, *(share for _, share in updates), updates[-1][1]]
    ax.step([t / total for t in steps], shares, where="post", label=schedule.name or None)
    ax.set(xlabel="share of the fit", ylabel="share of the target", ylim=(-0.03, 1.03))
    ax.set_title(f"schedule {schedule.name}".strip())
    return ax


def _before(a: Moment, b: Moment) -> bool:
    """Whether `a` is before `b` in every fit: both count steps, or both are shares."""
    return isinstance(a, Integral) == isinstance(b, Integral) and a < b


def _check_moment(name: str, value: Moment) -> None:
    if not is_number(value):
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


Schedule.__init__ = explain_former()(Schedule.__init__)

agp = Schedule(curves.cubic, 0.2, 0.8, name="agp")
lin = Schedule(curves.linear, 0.2, 0.8, name="lin")
cos = Schedule(curves.cosine, 0.2, 0.8, name="cos")
one_shot = Schedule(curves.at_once, 0.5, 0.5, name="one_shot")
iterative = Schedule(curves.linear, 0.2, 0.8, name="iterative", n_steps=3)
one_cycle = Schedule(curves.logistic, 0.0, 1.0, name="one_cycle")
dsd = Schedule(curves.there_and_back, 0.2, 0.8, name="dsd")

SCHEDULES = (one_shot, iterative, agp, one_cycle, cos, lin, dsd)
