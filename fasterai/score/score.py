"""Scores gathered over a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..core.criteria import Criterion
from ..core.gathered import GATHERED
from ..core.names import unwrapped
from ..core.progress import with_bar
from .batches import as_batch, drawn, first_batches, n_inputs
from .gatherer import Gatherer

__all__ = ["score"]


def score(
    model: nn.Module,
    dl: Iterable[Any],
    criteria: Criterion | Sequence[Criterion],
    *,
    n_batches: int | None = 8,
    loss_func: Callable[..., Tensor] | None = None,
    training: bool = False,
    progress: bool = True,
) -> Criterion | list[Criterion]:
    """Run the network over a loader and return the criterion with what it needs.

    ```python
    scored = score(learn.model, learn.dls.train, taylor, loss_func=learn.loss_func)
    pruner.prune_model(0.5, context='global', criteria=scored)
    ```
    What is returned is a criterion as any other, for `Sparsifier`, `SparsifyCallback` and `Pruner`
    at every granularity. It holds the numbers of this moment: after a cut it must be scored again.

    The model is left as it was: training flags, buffers (batch norm statistics), gradients and
    the random state; hooks are there while a batch runs only.

    Args:
        model: the network.
        dl: a fastai or torch loader, or any iterable of batches: `(x, y)`, several inputs and a
            target, a mapping of keyword inputs, or a tensor. They are moved to the model's device.
        criteria: what to gather for; of several all is gathered in one go.
        n_batches: how many batches, at most; None for all of them.
        loss_func: for criteria that see gradients: `loss_func(outputs, *targets)` is the mean loss
            of a batch (of a mapping the target is the mapping).
        training: run in train mode, with dropout and the batch's own statistics: a network that
            was not trained yet has no others.
        progress: show a bar.

    Returns:
        A criterion for each that was passed.

    Raises:
        ValueError: a criterion that needs no data, an empty loader, no loss where one is needed,
            or a batch that the model cannot run on.
    """
    network = unwrapped(model)
    several = isinstance(criteria, Sequence) and not isinstance(criteria, str)
    asked = list(criteria) if several else [criteria]
    needs = _needs(asked)
    batches, total = first_batches(dl, n_batches)
    batches = with_bar(batches, progress, total)
    with drawn(dl, network):
        gatherer = _gather(network, batches, needs, n_inputs(dl), loss_func, training)
    data = gatherer.gathered()
    found = [replace(criterion, data=data) for criterion in asked]
    return found if several else found[0]


def _gather(
    network: nn.Module,
    batches: Iterable[Any],
    needs: set[str],
    n_inp: int | None,
    loss_func: Callable[..., Tensor] | None,
    training: bool,
) -> Gatherer:
    gatherer = None
    with ExitStack() as stack:
        for each in batches:
            batch = as_batch(each, network, n_inp)
            if gatherer is None:
                gatherer = Gatherer(network, needs, batch.inputs.given)
                stack.enter_context(gatherer.ready(training))
            gatherer.add(batch, loss_func)
    if gatherer is None:
        raise ValueError("the loader gave no batch to score on")
    return gatherer


def _needs(asked: Sequence[Criterion]) -> set[str]:
    known = (*GATHERED, "gradient")
    for criterion in asked:
        if not isinstance(criterion, Criterion):
            raise TypeError(
                f"score takes criteria such as taylor or apoz, not names, got {criterion!r:.80}"
            )
        if not any(need in known for need in criterion.needs):
            raise ValueError(
                f"criterion {criterion.name or criterion.func!r} needs no data: pass it as it is, "
                f"as in criteria={criterion.name or 'criterion'}"
            )
    return {need for criterion in asked for need in criterion.needs if need in known}
