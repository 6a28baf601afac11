"""Lottery tickets with a fastai learner: train, prune, rewind, and again.

The sources are in `ticket`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

import pandas as pd
import torch
from fastai.learner import Learner
from fastcore.basics import listify
from torch import Tensor, nn

from ..core.checks import is_number, whole
from ..core.copies import copied
from ..core.criteria import Criterion, as_criterion, large_final, random_scores
from ..core.gathered import GATHERED
from ..core.masks import as_fraction
from ..core.names import LayerChoice, unwrapped
from ..core.warning import warn
from ..coupling.inputs import Inputs
from ..fit.callback import FitCallback
from ..sparse.callback import KeepZeros
from ..sparse.keep import parameters_like
from ..sparse.sparsifier import Sparsifier, Sparsity
from .masks import Masks
from .ticket import Ticket, snapshot

__all__ = ["LotteryTicket"]


class LotteryTicket:
    """Find a small network that learns as well as the whole one from the same early weights.

    ```python
    lottery = LotteryTicket(learn, 0.9, rounds=5)        # the weights now are the initial ones
    ticket = lottery.find(8, 4e-3, fit='fit_one_cycle')  # five times: train, prune, rewind
    lottery.train(ticket, 8, 4e-3, fit='fit_one_cycle')  # the metrics of its own training
    lottery.train(lottery.random_mask(ticket), 8, 4e-3)  # controls
    lottery.train(ticket.reinitialised(make_model()), 8, 4e-3)
    ```
    In each round the network is trained, the weakest of what is left go, and what stays gets its
    early weights back. The share that stays shrinks by the same factor from round to round. What
    was zeroed stays zero. Every training starts with a new optimizer.

    Args:
        learn: its model is used, and left with the last ticket loaded.
        sparsity: the share of the groups to zero in the end, or {layer or block: fraction}.
        granularity: see `Sparsifier`, as for `context`, `criteria` and all below `rewind`. Initial
            weights of a criterion are those at the start of a round; there are no gradients.
        context: 'local' or 'global'.
        criteria: scores of trained weights.
        rounds: how many times to train and prune; 1 is one-shot.
        rewind: the weights to go back to: 0 the initial ones; a number of steps, or as a float a
            share of the fit, those after so many steps of the first training. Later trainings then
            begin at that step, with the rates of that step. Of a method that fits twice, such as
            'fine_tune', steps are those of the first fit.
        layers: names or types of layers to sparsify.
        exclude: names or types of layers to leave alone.
        min_keep: groups that stay in each layer, at least.
        round_to: the number of groups kept becomes a multiple of this.
        mixed: 'filter' also zeroes channels under layer, RMS and group norms.
        whole_heads: attention heads are zeroed as a whole.

    Raises:
        ValueError, TypeError: an argument that cannot be, a layer that the model does not have, or
            a criterion that reads gradients.

    Attributes:
        tickets: found so far, the least sparse one first.
    """

    def __init__(
        self,
        learn: Learner,
        sparsity: Sparsity,
        granularity: str = "weight",
        context: str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
        *,
        rounds: int = 5,
        rewind: int | float = 0,
        layers: LayerChoice | Iterable[LayerChoice] | None = None,
        exclude: LayerChoice | Iterable[LayerChoice] = (),
        min_keep: int = 1,
        round_to: int = 1,
        mixed: bool = False,
        whole_heads: bool = False,
    ) -> None:
        if not isinstance(learn, Learner):
            raise TypeError(f"LotteryTicket takes a fastai Learner, got {type(learn).__name__}")
        if not isinstance(sparsity, Mapping):
            as_fraction(sparsity)
        whole(rounds, "rounds", 1)
        _check_rewind(rewind)
        criterion = as_criterion(criteria)
        if "gradient" in criterion.needs:
            raise ValueError("after a fit there are no gradients: take criteria that read weights")
        unseen = [need for need in criterion.wants if need in GATHERED]
        if unseen:
            raise ValueError(
                f"{criterion.name} needs data, and each round ranks what was trained last, with no "
                f"batch at hand: take criteria that read weights"
            )
        self.learn, self.sparsity, self.rounds, self.rewind = learn, sparsity, rounds, rewind
        self.context, self.criteria = context, criteria
        self._choice = {
            "granularity": granularity,
            "layers": layers,
            "exclude": exclude,
            "min_keep": min_keep,
            "round_to": round_to,
            "mixed": mixed,
            "whole_heads": whole_heads,
        }
        self.tickets: list[Ticket] = []
        self._initial = Ticket(Masks({}), snapshot(learn.model))
        self._rows: list[dict[str, Any]] = []
        self._example: Inputs | None = None

    def find(self, *args: Any, fit: str = "fit", **kwargs: Any) -> Ticket:
        """Train, prune and rewind `rounds` times; the ticket, which the model then holds.

        Frozen weights stay dense and do not count. If it is interrupted, the tickets found are in
        `tickets`, and a further call goes on with the round that was broken off.

        Args:
            args: of the fit: epochs, learning rate, ...
            fit: the learner's method, such as 'fit_one_cycle'.
            kwargs: of the fit, `cbs` among them.
        """
        kwargs["cbs"] = [*listify(kwargs.get("cbs"))]  # a generator gives them once
        for done in range(len(self.tickets), self.rounds):
            start = self.tickets[-1] if done else self._initial
            look = _Round(self._sparsifier, self.sparsity, None if done else self.rewind)
            metrics = self._train(start, look, args, fit, kwargs)
            look.must_have_seen_all()
            frozen = look.sparsifier.frozen_share
            if not done and frozen > 0.1:
                warn(
                    f"{frozen:.0%} of the weights are frozen, stay dense and do not count; call "
                    f"learn.unfreeze() before the lottery to prune them",
                )
            look.sparsifier.sparsify_to([self._after(done + 1, s) for s in look.targets])
            rewound = look.early or start
            self.tickets.append(rewound.with_masks(Masks(look.sparsifier.masks)))
            self._rows[done:] = [self._row(start, metrics)]
        self.tickets[-1].load_into(self.learn.model)
        self.learn.create_opt()
        return self.tickets[-1]

    def train(self, ticket: Ticket, *args: Any, fit: str = "fit", **kwargs: Any) -> dict[str, Any]:
        """Load a ticket, train it with its zeros held, and return the metrics of the last epoch.

        Arguments are those of `find`.
        """
        return self._train(ticket, None, args, fit, kwargs)

    def random_mask(self, ticket: Ticket) -> Ticket:
        """A control: the ticket's weights under random masks, with as many zeros in each layer.

        If it does as well as the ticket, only the numbers matter, not which weights stay. The
        masks follow from `torch.manual_seed`.

        Raises:
            ValueError: the zeros of the ticket are no whole groups of this granularity.
        """
        network = copied(unwrapped(self.learn.model))
        weights = parameters_like(ticket.masks.shapes, network)
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(ticket.masks[name])  # its zeros are the mask's
        probe = self._sparsifier(network, self._example, "local", random_scores)
        probe.hold_zeros()
        if Masks(probe.masks) != ticket.masks:
            raise ValueError(
                f"the ticket's zeros are not whole groups of granularity "
                f"{self._choice['granularity']!r} in the layers of this lottery"
            )
        shares = probe.held()
        with torch.no_grad():
            for p in weights.values():
                p.fill_(1.0)
        probe = self._sparsifier(network, self._example, "local", random_scores)
        probe.sparsify_to(shares)
        return ticket.with_masks(Masks(probe.masks))

    def report(self) -> pd.DataFrame:
        """A row for each training of `find`: `round`, `sparsity` while it ran, and its metrics."""
        return pd.DataFrame(self._rows).rename_axis("round").reset_index()

    def __repr__(self) -> str:
        found = ", ".join(f"{t.sparsity:.4g}" for t in self.tickets) or "none yet"
        return f"LotteryTicket({len(self.tickets)} of {self.rounds} rounds, sparsities: {found})"

    # --- inside --------------------------------------------------------------------------------

    def _train(
        self, start: Ticket, look: _Round | None, args: Any, fit: str, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        learn = self.learn
        start.load_into(learn.model)
        learn.create_opt()
        learn.model.zero_grad()  # a fit that was broken off leaves gradients
        cbs = [*listify(kwargs.get("cbs")), KeepZeros(start.masks)]
        cbs += [_StartAt(start.step)] * bool(start.step) + [look] * (look is not None)
        getattr(learn, fit)(*args, **{**kwargs, "cbs": cbs})
        if look is not None:
            self._example = look.inputs
        return _last_record(learn)

    def _sparsifier(
        self, model: nn.Module, inputs: Any, context: str | None = None, criteria: Any = None
    ) -> Sparsifier:
        return Sparsifier(
            model,
            context=context or self.context,
            criteria=criteria or self.criteria,
            example_inputs=inputs,
            **self._choice,
        )

    def _after(self, rounds: int, sparsity: float) -> float:
        """The sparsity after so many rounds: `1 - (1 - s) ** (rounds / all)`."""
        return 1 - (1 - sparsity) ** (rounds / self.rounds) if rounds < self.rounds else sparsity

    def _row(self, start: Ticket, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {"sparsity": start.sparsity, "step": start.step, **metrics}


class _Round(FitCallback):
    """Look at the network when a training begins, and keep the weights to rewind to."""

    order = -5  # before others change anything

    def __init__(
        self, make: Callable[..., Sparsifier], sparsity: Sparsity, rewind: int | float | None
    ) -> None:
        super().__init__()
        self.make, self.sparsity, self.rewind = make, sparsity, rewind
        self.sparsifier: Sparsifier | None = None
        self.targets: tuple[float, ...] = ()
        self.inputs: Inputs | None = None
        self.early: Ticket | None = None
        self._first = True

    def before_fit(self) -> None:
        super().before_fit()
        if not self._first:
            return
        total = self.n_epoch * len(self.dls.train)
        rewind = 0 if self.rewind is None else self.rewind
        self._at = int(rewind) if isinstance(rewind, Integral) else round(rewind * total)
        if rewind and self._at >= total:
            raise ValueError(f"rewind is step {self._at}, and the fit has {total} steps")

    def begin(self) -> None:
        self.inputs = Inputs.fitting(unwrapped(self.learn.model), self.xb)
        self.sparsifier = self.make(self.learn.model, self.inputs)
        self.targets = self.sparsifier.targets(self.sparsity)
        self.sparsifier.try_criteria()

    def before_batch(self) -> None:
        super().before_batch()
        now = self.epoch * self.n_iter + self.iter
        wanted = self._first and self.rewind and now == self._at
        if self._training and self.training and wanted:
            self.early = Ticket(Masks({}), snapshot(self.learn.model), self._at)

    def finish(self) -> None:
        self._first = False

    def must_have_seen_all(self) -> None:
        """Refuse a training that ended before there was anything to prune or to rewind to.

        Raises:
            RuntimeError: it did.
        """
        early = "its first batch" if self.sparsifier is None else f"step {self._at}"
        if self.sparsifier is None or (self.rewind and self.early is None):
            raise RuntimeError(
                f"the fit ended before {early}, so that there is nothing to "
                f"{'prune' if self.sparsifier is None else 'rewind to'}: see what cancels it, and "
                f"call find again"
            )


class _StartAt(FitCallback):
    """Begin a fit at a later step: what comes before it is left out, with all its events."""

    order = 70  # after the callbacks that count and show epochs

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def before_fit(self) -> None:
        super().before_fit()
        self._per_epoch = len(self.dls.train)
        total = self.n_epoch * self._per_epoch
        if self.step >= total:
            raise ValueError(f"the ticket is from step {self.step}, and the fit has {total} steps")
        self._instead_of(self.learn, "_with_events", self._skip_epoch)

    def before_train(self) -> None:
        super().before_train()
        done = self.step - self.epoch * self._per_epoch
        if 0 <= done < self._per_epoch:
            self.learn.train_iter = self.step
            self.learn.pct_train = self.step / (self._per_epoch * self.n_epoch)
            self._instead_of(self.learn, "one_batch", self._skip_batch)

    def finish(self) -> None:
        self.step = -1  # a further fit, as of fine_tune, is run as a whole

    def _skip_epoch(self, run: Callable[..., Any], f: Any, kind: str, *rest: Any) -> None:
        early = (self.epoch + 1) * self._per_epoch <= self.step
        if early:
            self._instead_of(self.learn, "_with_events", self._skip_epoch)
        if not early or kind != "epoch":
            run(f, kind, *rest)

    def _skip_batch(self, run: Callable[..., Any], i: int, batch: Any) -> None:
        if self.epoch * self._per_epoch + i < self.step:
            self._instead_of(self.learn, "one_batch", self._skip_batch)
        else:
            run(i, batch)


def _check_rewind(rewind: Any) -> None:
    if not is_number(rewind) or not 0 <= rewind < math.inf:
        raise ValueError(f"rewind must be a number of steps or a share of the fit, got {rewind!r}")
    if not isinstance(rewind, Integral) and rewind >= 1:
        raise ValueError(
            f"rewind must be a share of the fit below 1, got {rewind}; for steps pass {int(rewind)}"
        )


def _last_record(learn: Learner) -> dict[str, Any]:
    """What the last epoch's row in the training table says."""
    if not hasattr(learn, "recorder") or not learn.recorder.values:
        return {}
    recorder = learn.recorder
    names = recorder.metric_names[1 : len(recorder.metric_names) - bool(recorder.add_time)]
    return dict(zip(names, recorder.values[-1], strict=False))
