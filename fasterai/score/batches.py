"""Batches as loaders give them, in the form a network takes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core.checks import whole
from ..coupling.inputs import Inputs, random_state_kept

__all__ = ["Batch", "as_batch", "drawn", "first_batches", "in_memory", "n_inputs"]


_INTEGERS = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64


@dataclass(frozen=True)
class Batch:
    """Inputs of a network and what the loss compares its outputs with.

    Args:
        inputs: all of them.
        targets: any, also none; what the loss takes after the outputs.
        size: how many examples.
    """

    inputs: Inputs
    targets: tuple[Any, ...]
    size: int

    @property
    def classes(self) -> Tensor | None:
        """(N,) one class number for each example, also where they stand in a column."""
        target = self.targets[0] if len(self.targets) == 1 else None
        if not isinstance(target, Tensor) or target.dtype not in _INTEGERS:
            return None
        flat = target[:, 0] if target.ndim == 2 and target.shape[1] == 1 else target
        return flat if flat.ndim == 1 else None

    def compared(self, func: Callable[..., Any], outputs: Any) -> Any:
        """What a loss or metric says of the outputs and these targets.

        Raises:
            ValueError: it cannot take what the network gives, which is no tensor.
        """
        try:
            return func(outputs, *self.targets)
        except Exception as error:  # whatever user code raises
            if isinstance(outputs, Tensor):
                raise
            kind, name = type(outputs).__name__, getattr(func, "__name__", type(func).__name__)
            name = name.lstrip("_")
            raise ValueError(
                f"the network gives a {kind}, which {name} cannot take ({type(error).__name__}: "
                f"{error}): pass a function of your own, as in loss_func=lambda out, y: "
                f"loss(out[0], y)"
            ) from error

    def each(self) -> Iterator[Batch]:
        """A batch of each single example."""
        for i in range(self.size):

            def one(x: Any, i: int = i) -> Any:
                several = isinstance(x, Tensor) and x.ndim and len(x) == self.size
                return x[i : i + 1] if several else x

            args, kwargs = tree_map(one, (self.inputs.args, dict(self.inputs.kwargs)))
            yield Batch(Inputs(args, kwargs, 1), tree_map(one, self.targets), 1)


def as_batch(batch: Any, model: nn.Module, n_inp: int | None = None) -> Batch:
    """A batch on the model's device, its floats in the model's type, as plain tensors.

    Args:
        batch: a tuple or list of inputs and then targets, of which all but the last are inputs, or
            one mapping of them by keywords; a mapping, which the network takes by keywords and the
            loss as it is; or a tensor.
        model: the network.
        n_inp: how many of a tuple are inputs, where it is known; fastai's loaders tell.
    """
    floats = [p for p in model.parameters() if p.is_floating_point()]
    if not floats:
        raise ValueError("the model has no weights to score")
    dtype, device = floats[0].dtype, floats[0].device

    def fit(x: Any) -> Any:
        return x.detach().as_subclass(Tensor).to(device) if isinstance(x, Tensor) else x

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    batch = tree_map(fit, dict(batch) if isinstance(batch, Mapping) else batch)
    if isinstance(batch, dict):
        inputs, targets = batch, (batch,)
    elif isinstance(batch, tuple | list):
        n_inp = max(len(batch) - 1, 1) if n_inp is None else n_inp
        inputs, targets = tuple(batch[:n_inp]), tuple(batch[n_inp:])
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            inputs = dict(inputs[0])
    else:
        inputs, targets = batch, ()
    inputs = Inputs.of(tree_map(cast, inputs), samples=None)
    if inputs.samples is None:
        shapes = [tuple(x.shape) for x in inputs.tensors]
        raise ValueError(
            f"the inputs of a batch must have the examples along their first dimension, got the "
            f"shapes {shapes}"
        )
    return Batch(inputs, targets, inputs.samples)


def first_batches(dl: Iterable[Any], n_batches: int | None) -> tuple[Iterator[Any], int | None]:
    """So many batches of a loader, and how many there will be, if that is known."""
    if hasattr(type(dl), "train") and hasattr(type(dl), "valid"):  # loaders ask their data sets
        raise TypeError("one loader is needed: pass dls.train or dls.valid, not both in dls")
    if not isinstance(dl, Iterable):
        raise TypeError(f"dl must be a loader or a list of batches, got {type(dl).__name__}")
    if n_batches is not None:
        n_batches = whole(n_batches, "n_batches", 1, ", or None for all")
    known = len(dl) if isinstance(dl, Sized) else None
    counts = [n for n in (n_batches, known) if n is not None]
    lazily = (batch for one in (dl,) for batch in islice(one, n_batches))  # torch draws in iter()
    return lazily, min(counts, default=None)


def n_inputs(dl: Iterable[Any]) -> int | None:
    """How many of a batch are inputs, where the loader tells, as fastai's do."""
    try:
        return getattr(dl, "n_inp", None)
    except IndexError:  # fastai looks at the first item, and there is none
        return None


@contextmanager
def drawn(loader: Iterable[Any], model: nn.Module) -> Iterator[None]:
    """While this lasts, batches may be drawn; the random state is put back, the loader's too."""
    rng = getattr(loader, "rng", None)
    state = rng.getstate() if isinstance(rng, random.Random) else None
    owners = (loader, getattr(loader, "sampler", None))
    generators = [getattr(owner, "generator", None) for owner in owners]
    generators = [g for g in generators if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    try:
        with random_state_kept(model):
            yield
    finally:
        if state is not None:
            rng.setstate(state)
            loader.rng = rng
        for generator, before in zip(generators, states, strict=True):
            generator.set_state(before)


def in_memory(loader: Iterable[Any], model: nn.Module, n_batches: int | None) -> list[Batch]:
    """So many batches of a loader, on the model's device; see `drawn`.

    Raises:
        ValueError: there is none.
    """
    with drawn(loader, model):
        lazily, _ = first_batches(loader, n_batches)
        batches = [as_batch(b, model, n_inputs(loader)) for b in lazily]
    if not batches:
        raise ValueError("the loader gave no batch to measure the loss on")
    return batches
