"""The fastai callback that makes a network sparse while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..core.criteria import Criterion, large_final
from ..core.former import explain_former
from ..core.granularity import Granularity
from ..core.masks import Limits, apply_masks, as_context, as_fraction
from ..core.names import LayerChoice, as_choices, plain
from ..core.schedule import Chain, Schedule, agp, falls, goes_down
from ..fit.callback import FitCallback, ScheduledCallback
from .choose import NothingToSparsify
from .keep import parameters_like, zero_masks
from .sparsifier import Sparsifier

__all__ = ["KeepZeros", "SparsifyCallback"]


class SparsifyCallback(ScheduledCallback):
    """Drive weights to zero during `fit`, a share that grows by a schedule.

    ```python
    learn.fit_one_cycle(5, cbs=SparsifyCallback(0.5, 'filter'))
    ```
    After every optimizer step what is zeroed is exactly zero again. A `sparsity` column appears in
    the training table. Frozen layers are left alone. Nothing is attached to the model.

    Args:
        sparsity: the share of the groups to zero, a fraction in [0, 1]; a pair
            (initial, final), the initial one from the first step on; or {layer or block: fraction}
            under 'local', the others staying dense. Without an initial value the way begins at
            what is already zero, and that stays zero; with `start_epoch` it goes on from there,
            as far as it is by then.
        granularity: 'weight', 'row', 'column', 'kernel', 'filter', '2:4', ...; see `Sparsifier`.
            Under an N:M pattern the sparsity is the share of all weights, at most 1 - N / M.
        context: 'local' reaches the sparsity in each layer, 'global' over all of them.
        criteria: scores of weights, higher = keep. Initial weights are those at the start of each
            fit, previous ones those after the last update; copies of them are kept until the fit
            ends. Gradients are those of the optimizer step, unscaled. An update at which there is
            nothing to compare yet, or no gradient, waits for the next step.
        schedule: share of the way by progress; `agp` runs from 0.2 to 0.8 of the fit. Any other
            function from [0, 1] to [0, 1] runs over the whole fit. Where one goes down, as `dsd`
            does, weights come back; see `Sparsifier.regrow_model`. Filters cannot.
        layers: names or types of layers to sparsify; default every conv, linear, recurrent
            and attention layer but the output layer.
        exclude: names or types of layers to leave alone.
        min_keep: groups that stay in each layer, at least.
        round_to: the number of groups kept becomes a multiple of this.
        example_inputs: to see which layers are coupled; default the first training batch.
        mixed: 'filter' also zeroes channels that layer, RMS and group norms normalise together.
        whole_heads: attention heads are zeroed as a whole; else each becomes narrower.
        hold_trackers: `SaveModelCallback`, `EarlyStoppingCallback`, `ReduceLROnPlateau` and other
            trackers do not judge epochs before the target is reached: the best of those would be
            a network that is less sparse. What every epoch saves (`every_epoch`) goes on.

    Raises:
        ValueError, TypeError: at once for an argument that cannot be; before the first step of a
            fit for a layer that the model does not have, a model without layers of this
            granularity, or a criterion that reads gradients of what has none.
    """

    columns = ("sparsity",)

    @explain_former()
    def __init__(
        self,
        sparsity: float | tuple[float, float] | Mapping[str, float],
        granularity: str = "weight",
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        schedule: Schedule | Chain | Callable[[float], float] = agp,
        *,
        layers: LayerChoice | Iterable[LayerChoice] | None = None,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        min_keep: int = 1,
        round_to: int = 1,
        example_inputs: Any = None,
        mixed: bool = False,
        whole_heads: bool = False,
        hold_trackers: bool = True,
    ) -> None:
        super().__init__(criteria, schedule, hold_trackers)
        self.initial, self.sparsity = _initial_and_final(sparsity)
        grain = Granularity(granularity)
        by_layer = self.sparsity if isinstance(self.sparsity, Mapping) else {None: self.sparsity}
        for layer, value in by_layer.items():
            grain.allow(value, "sparsity" if layer is None else f"sparsity of {layer!r}")
        self.granularity = grain.name
        self.context = as_context(context)
        if self.context == "global" and isinstance(self.sparsity, Mapping):
            raise ValueError("a sparsity for each layer needs context='local', got 'global'")
        Limits(min_keep, round_to)
        self.min_keep, self.round_to = min_keep, round_to
        self.layers = None if layers is None else as_choices(layers)
        self.exclude, self.example_inputs = as_choices(exclude), example_inputs
        self.mixed, self.whole_heads = mixed, whole_heads
        self._sparsifier: Sparsifier | None = None

    # --- afterwards ----------------------------------------------------------------------------

    def report(self) -> pd.DataFrame:
        """What was asked and what the model holds, a row a layer; see `Sparsifier.report`."""
        if self._sparsifier is None:
            raise RuntimeError("nothing to report: no fit with this callback, or all was frozen")
        return self._sparsifier.report()

    def plot_sparsity(self, ax: Any = None) -> Any:
        """Draw the sparsity reached over the steps of the last fit; returns the axes."""
        title = f"{self.granularity} sparsity, schedule {self.schedule.name or 'of your own'}"
        return self._plot("share of groups at zero", title, ax)

    # --- on the way ----------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Refuse what would cut the network on the way."""
        super().before_fit()
        cuts = [type(cb).__name__ for cb in self.learn.cbs if getattr(cb, "reshapes", False)]
        if cuts:
            raise ValueError(
                f"SparsifyCallback and {cuts[0]} do not go together in one fit, for masks would "
                f"have to shrink on the way: zero in a first fit and remove with Pruner or in a "
                f"second one, or remove only"
            )

    def begin(self) -> bool:
        """See which groups there are and where they should go."""
        self._sparsifier = sparsifier = self._processes.together(self._sparsifier_of_model)
        if sparsifier is None:
            return False
        self._to = sparsifier.targets(self._of_trained(sparsifier))
        initial = self.initial
        if initial is None:
            self._from = sparsifier.origins(self._to, self._begun)
        else:
            self._from = sparsifier.targets(initial)
        if any(self._to):
            sparsifier.criteria = self.gather(sparsifier.masks)
            sparsifier.try_criteria()  # one that fails does so before training
            sparsifier.criteria = self.criteria
        else:
            sparsifier.release()  # nothing is asked: train as without a callback
        sparsifier.apply()
        early = self._updates[0][0] > self.finished
        if initial is not None and any(self._from) and early and self.criteria.wants:
            self._updates = [(self.finished, 0.0), *self._updates]  # once there is what it wants
        elif initial is not None and any(self._from) and early:
            sparsifier.sparsify_to(self._from, asked=self._to)
            self.history.append((self.finished, sparsifier.reached()))
        return any(self._to)

    @property
    def holds(self) -> bool:
        """Whether there are zeros to hold."""
        return self._sparsifier is not None

    def hold(self) -> None:
        """Zero again what the optimizer moved."""
        self._sparsifier.apply()

    def go(self, share: float, before: float) -> None:
        """Zero more groups, or let some come back."""
        if falls(before, share):
            self._sparsifier.regrow_to(self._at(share), asked=self._at(self._updates[-1][1]))
        else:
            self._sparsifier.criteria = self.scored()
            self._sparsifier.sparsify_to(self._at(share), asked=self._to)
            if share == max(x for _, x in self._updates) and not self.reached():
                self.warn(
                    f"nothing was zeroed, asked was {self.sparsity}: see what limits it in "
                    f"Sparsifier(learn.model, ...).report(), min_keep and round_to among others"
                )

    def reached(self) -> float:
        """The share of the groups that is held at zero."""
        return 0.0 if self._sparsifier is None else self._sparsifier.reached()

    def by_layer(self) -> dict[str, float]:
        """The share of each weight that is held at zero."""
        masks = {} if self._sparsifier is None else self._sparsifier.masks
        shares = {k: 1 - int(m.count_nonzero()) / m.numel() for k, m in masks.items() if m.ndim > 1}
        return {f"sparsity/{plain(k).removesuffix('.weight')}": s for k, s in shares.items()}

    def arrived(self) -> bool:
        """Whether all that is asked was zero when the fit began."""
        return all(a >= b for a, b in zip(self._from, self._to, strict=True))

    def finish(self) -> None:
        """Let go of the masks and of what the criterion needed."""
        if self._sparsifier is not None:
            self._sparsifier.criteria = self.criteria
            self._sparsifier.release()

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
                regrow=goes_down(self._updates),
            )
        except NothingToSparsify as error:
            if not error.frozen:
                raise
            self.warn(f"{error}. Call learn.unfreeze() to sparsify frozen layers")
            return None
        if sparsifier.frozen_share > 0.1 and not isinstance(self.sparsity, Mapping):
            self.warn(
                f"{sparsifier.frozen_share:.0%} of the weights are frozen, stay dense and do not "
                f"count; call learn.unfreeze() to sparsify them (fine_tune does so by itself after "
                f"its first part)"
            )
        return sparsifier

    def _of_trained(self, sparsifier: Sparsifier) -> Any:
        """What is asked of the layers that train."""
        if not isinstance(self.sparsity, Mapping):
            return self.sparsity
        frozen = sparsifier.frozen(self.sparsity)
        if frozen:
            self.warn(f"frozen layers wait until they train: {', '.join(sorted(frozen))}")
        return {name: share for name, share in self.sparsity.items() if name not in frozen}

    def _at(self, share: float) -> list[float]:
        """The sparsities at this share of the way; it never leads below where it began."""
        way = zip(self._from, self._to, strict=True)
        return [max(0.0, (1 - share) * a + share * max(a, b)) for a, b in way]


class KeepZeros(FitCallback):
    """Hold at zero, during `fit`, what is zero when it begins.

    ```python
    learn.load('sparse')
    learn.fit_one_cycle(3, cbs=KeepZeros())
    ```
    For training on with a network that `SparsifyCallback`, or anybody else, made sparse. Held are
    the zeros in weights of two or more dimensions, but not where a whole tensor is zero; and the
    biases and the scales and shifts of norms that are zero, of units whose weights all are. After
    every optimizer step they are +0.0 again. Nothing is attached to the model: the masks, a byte
    an element of each parameter with such zeros, live as long as the fit.

    Args:
        masks: what to hold instead, and to zero when the fit begins: {parameter name: 0 = stays
            zero}, such as `ticket.masks` or the `masks` of a `Sparsifier`.

    Attributes:
        zeros: the number of elements that the last fit held.
    """

    order = ScheduledCallback.order + 1  # behind what cuts
    zeros = 0
    _weights: tuple[Tensor, ...] = ()
    _masks: tuple[Tensor, ...] = ()

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        if masks is not None and not isinstance(masks, Mapping):
            raise TypeError(f"masks go by parameter names, as in ticket.masks, got {masks!r}")
        self.masks = masks

    @property
    def mask_bytes(self) -> int:
        """Memory that the masks take now."""
        return sum(mask.nbytes for mask in self._masks)

    @property
    def holds(self) -> bool:
        """Whether there is anything to hold."""
        return bool(self._masks)

    def begin(self) -> None:
        """Look for zeros."""
        model, masks = self.learn.model, self.masks
        if masks is None:
            masks = zero_masks(model, self.xb)
        masks = {plain(k): m for k, m in masks.items()}
        parameters = parameters_like({k: tuple(m.shape) for k, m in masks.items()}, model)
        self._weights = tuple(parameters.values())
        pairs = zip(masks.values(), self._weights, strict=True)
        self._masks = tuple((m != 0).to(w.device, torch.uint8) for m, w in pairs)
        self.zeros = sum(int((mask == 0).sum()) for mask in self._masks)
        self.hold()

    def before_step(self) -> None:
        """Look again where the network was cut since: what is zero has moved."""
        pairs = zip(self._weights, self._masks, strict=True)
        if self._training and any(w.shape != m.shape for w, m in pairs):
            self.begin()
        super().before_step()

    def hold(self) -> None:
        """Write +0.0 where zeros were."""
        apply_masks(self._weights, self._masks)

    def finish(self) -> None:
        """Let go of the masks."""
        self._weights = self._masks = ()


def _initial_and_final(sparsity: Any) -> tuple[float | None, Any]:
    if isinstance(sparsity, Mapping):
        return None, {k: as_fraction(v, f"sparsity of {k!r}") for k, v in sparsity.items()}
    if isinstance(sparsity, Sequence) and not isinstance(sparsity, str):
        if len(sparsity) != 2:
            raise ValueError(f"sparsity must be a fraction or (initial, final), got {sparsity!r}")
        initial, final = (as_fraction(s) for s in sparsity)
        if final < initial:
            raise ValueError(f"the final sparsity must not be below the initial, got {sparsity!r}")
        return initial, final
    return None, as_fraction(sparsity)
