"""The fastai callback that drives groups of weights towards zero before they are removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastai.callback.fp16 import NonNativeMixedPrecision

from ..core.checks import number
from ..core.criteria import large_final
from ..core.granularity import Granularity
from ..core.names import LayerChoice, as_choices
from ..core.schedule import Chain, Schedule, lin
from ..fit.callback import ScheduledCallback
from .penalties import GroupLasso, Penalty, Slimming

__all__ = ["RegularizeCallback"]

_PENALTIES = ("group_lasso", "slimming")


class RegularizeCallback(ScheduledCallback):
    """Penalise groups of weights during `fit`, so that removing them later costs less.

    ```python
    learn.fit(10, cbs=RegularizeCallback(1e-4))                # whole filters, then remove some
    learn.fit(10, cbs=RegularizeCallback(1e-3, 'slimming'))    # scales of the norms
    ```
    As weight decay does, it adds to the gradients right before the optimizer's step: once a step,
    however many batches are accumulated, unscaled under mixed precision, behind gradient clipping
    and behind criteria that read gradients. The losses stay what they are; the column `penalty`
    in the training table says what would be added to them.

    Args:
        strength: what the penalty is multiplied with once the schedule is through.
        penalty: 'group_lasso', the sum of `sqrt(size)` times the L2 norm of each group; or
            'slimming', the sum of the absolute values of the norms' scales.
        granularity: the groups of 'group_lasso'; of 'filter' the units that `Pruner` removes.
        schedule: the share of the strength by progress; grows over the first half of the fit.
            `one_shot.over(0, 0)` has it whole from the start.
        layers: names or types of layers to penalise; default every conv, linear, recurrent
            and attention layer but the output layer.
        exclude: names or types of layers to leave alone.
        example_inputs: to see which layers are coupled; default the first training batch.
        mixed: with channels that layer, RMS and group norms normalise together.
        whole_heads: attention heads count as a whole.

    Raises:
        ValueError, TypeError: at once for an argument that cannot be; before the first step of a
            fit for a layer that the model does not have, or a model with nothing to penalise.
    """

    order = ScheduledCallback.order + 1  # behind criteria that read gradients
    columns = ("penalty",)

    def __init__(
        self,
        strength: float,
        penalty: str = "group_lasso",
        granularity: str = "filter",
        schedule: Schedule | Chain | Callable[[float], float] = lin.over(0.0, 0.5),
        *,
        layers: LayerChoice | Iterable[LayerChoice] | None = None,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        example_inputs: Any = None,
        mixed: bool = False,
        whole_heads: bool = False,
    ) -> None:
        super().__init__(large_final, schedule, hold_trackers=False)
        self.strength = number(strength, "strength", hint=", such as 1e-4")
        if penalty not in _PENALTIES:
            raise ValueError(f"penalty must be 'group_lasso' or 'slimming', got {penalty!r}")
        self.granularity = Granularity(granularity).name
        if penalty == "slimming" and granularity != "filter":
            raise ValueError(
                f"'slimming' penalises scales of channels, not granularity {granularity!r}"
            )
        self.penalty = penalty
        self.layers = None if layers is None else as_choices(layers)
        self.exclude, self.example_inputs = as_choices(exclude), example_inputs
        self.mixed, self.whole_heads = mixed, whole_heads
        self._penalty: Penalty | None = None

    def begin(self) -> bool:
        """See which groups there are."""
        if any(isinstance(cb, NonNativeMixedPrecision) for cb in self.learn.cbs):
            raise ValueError(
                "to_non_native_fp16 steps on copies of the weights, which no penalty reaches: use "
                "to_fp16 or to_bf16"
            )
        self._penalty = self._look() if self.strength else None
        return self._penalty is not None

    def before_step(self) -> None:
        """Add the gradient of the penalty."""
        super().before_step()
        if self._training and self._moves:
            self._current().add_gradient(self.reached())

    def go(self, share: float, before: float) -> None:
        """The share is read where it counts."""

    def reached(self) -> float:
        """The strength now."""
        return self._share * self.strength

    def values(self) -> list[float]:
        """The penalty, times its strength now."""
        if self._penalty is None:
            return [0.0]
        return [self.reached() * float(self._current().value().detach())]

    def finish(self) -> None:
        """Let go of the weights."""
        self._penalty = None

    def plot_strength(self, ax: Any = None) -> Any:
        """Draw the strength over the steps of the last fit; returns the axes."""
        ax = self._plot("strength", f"{self.penalty}, schedule {self.schedule.name}".strip(), ax)
        ax.set_ylim(-0.03 * self.strength, 1.03 * self.strength)
        return ax

    def _current(self) -> Penalty:
        if self._penalty.outdated:  # channels were removed meanwhile
            self._penalty = self._look()
        return self._penalty

    def _look(self) -> Penalty:
        how = {
            "layers": self.layers,
            "exclude": self.exclude,
            "example_inputs": self.xb if self.example_inputs is None else self.example_inputs,
            "mixed": self.mixed,
            "whole_heads": self.whole_heads,
        }
        if self.penalty == "slimming":
            return Slimming(self.learn.model, **how)
        return GroupLasso(self.learn.model, self.granularity, **how)
