"""A search for the units to remove, with the loss of whole masks instead of scores of units.

After Anwar, Hwang and Sung, "Structured Pruning of Deep Convolutional Neural Networks", 2015,
https://arxiv.org/abs/1512.08571: a particle filter whose particles are masks, weighed
by how well the network does with each of them on a small set of examples. They weigh by the rate of
errors; here it is any loss, on the scale of its own spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..core.checks import is_number, whole
from ..core.criteria import Criterion, as_criterion
from ..core.masks import Limits, as_context, as_fraction
from ..core.names import unwrapped
from ..core.progress import with_bar
from ..core.target import refuse_target
from ..coupling.probe import Removal
from ..coupling.ranking import bundles_of, unit_scores
from ..coupling.surgery import shadowed
from ..score.batches import in_memory
from ..score.criteria import as_gathered
from ..score.oracle import measured
from ..score.removing import mean_loss
from .amounts import counts_of
from .pruner import Pruner
from .select import lowest_units
from .trial import Trial

__all__ = ["Searched", "particle_search"]


@dataclass(frozen=True)
class Searched(Criterion):
    """The best mask of a search: a criterion that ranks its units lowest.

    Args:
        loss: of the network without these units.
        history: for each round the lowest loss up to then, and the mean loss of its particles.
    """

    loss: float = math.nan
    history: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    def rounds(self) -> pd.DataFrame:
        """A row a round: `best` loss up to then, `mean` loss of its particles."""
        return pd.DataFrame(self.history, columns=["best", "mean"])


def particle_search(
    pruner: Pruner,
    dl: Iterable[Any],
    sparsity: float,
    *,
    loss_func: Callable[..., Tensor | float],
    context: str = "local",
    start: Criterion | Callable[[Tensor], Tensor] | None = None,
    particles: int = 32,
    rounds: int = 10,
    noise: float = 0.3,
    n_batches: int | None = 1,
    round_to: int = 1,
    min_keep: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Searched:
    """Search for the units whose removal together raises the loss least.

    ```python
    found = particle_search(pruner, learn.dls.valid, 0.5, loss_func=learn.loss_func)
    pruner.prune_model(0.5, criteria=found)
    ```
    Each particle is a number for each unit; its mask removes the lowest, as many as `prune_model`
    would. In each round the network is run without the units of each mask; particles are drawn
    again with weights exp(-loss / spread of the losses), and move on by noise. The best one of all
    rounds is kept. What one unit does depends on which others go: that is seen here, and by no
    score of single units. It takes up to particles * rounds runs over the batches.

    The model's own tensors are not touched; it is left as it was, also by an interrupt.

    Args:
        pruner: of the network; its units are those that go.
        dl: see `score`; a small validation set. Its batches are kept in memory.
        sparsity: the share of the free units that is to go.
        loss_func: `loss_func(outputs, *targets)`: the mean loss of a batch, or the share of errors.
        context: 'local' removes that share of each axis, 'global' of all together.
        start: a criterion to start near; its own mask is the first particle, so that what is
            found is no worse on these batches. Default: random masks.
        particles: how many masks a round.
        rounds: how many rounds.
        noise: how far particles move, in (0, 1]; 1 forgets where they were.
        n_batches: how many batches, at most; None for all of them.
        round_to: as in `prune_model`.
        min_keep: as in `prune_model`.
        seed: of the random numbers; the global random state is neither used nor changed.
        progress: show a bar.

    Returns:
        A criterion for `prune_model` and `plan_for` with the same sparsity, context and limits.

    Raises:
        ValueError: arguments out of range, an empty loader, a network with nothing to prune, or
            one that gives no finite loss with any of the masks.
    """
    if not isinstance(pruner, Pruner):
        raise TypeError(
            f"particle_search takes a Pruner, as in particle_search(Pruner(model, x), ...), got "
            f"{type(pruner).__name__}"
        )
    particles, rounds = whole(particles, "particles", 2), whole(rounds, "rounds", 1)
    if not is_number(noise) or not 0 < noise <= 1:
        raise ValueError(f"noise must be in (0, 1], got {noise!r}")
    refuse_target(sparsity, "the masks that are compared remove as many units; pass that share")
    swarm = _Swarm(pruner, as_fraction(sparsity), as_context(context), Limits(min_keep, round_to))
    batches = in_memory(dl, unwrapped(pruner.model), n_batches)
    generator = torch.Generator().manual_seed(seed)

    def loss_without(state: Tensor) -> float:
        with shadowed(pruner.model, swarm.cut(state)):
            return mean_loss(pruner.model, batches, loss_func)

    losses = _Memory(swarm.key, loss_without)
    now = swarm.first(particles, start, noise, generator)
    best, history = math.inf, []
    kept = now[0]
    for _ in with_bar(range(rounds), progress):
        own = torch.tensor([losses(state) for state in now], dtype=torch.float64)
        own = own.nan_to_num(torch.inf, torch.inf)
        if own.min() < best:
            best, kept = float(own.min()), now[own.argmin()]
        history.append((best, float(own.mean())))
        now = now[_drawn(own, generator)]
        step = torch.randn(now.shape, generator=generator, dtype=now.dtype)
        now = (1 - noise**2) ** 0.5 * now + noise * step
    if not math.isfinite(best):
        raise ValueError(f"no mask of {particles * rounds} gave a finite loss")
    return swarm.criterion(kept, best, history)


class _Memory:
    """The losses of masks, each computed once."""

    def __init__(self, key: Callable[[Tensor], bytes], func: Callable[[Tensor], float]) -> None:
        self._key, self._func, self._known = key, func, dict[bytes, float]()

    def __call__(self, state: Tensor) -> float:
        key = self._key(state)
        if key not in self._known:
            self._known[key] = self._func(state)
        return self._known[key]


class _Swarm:
    """Particles, (U,) numbers for the free units of all axes, and the masks that they mean."""

    def __init__(self, pruner: Pruner, share: float, context: str, limits: Limits) -> None:
        self._pruner, self._limits, self._context = pruner, limits, context
        self._coupling, self._axes = pruner.coupled()
        self._ranked = [a for a, axis in enumerate(self._axes) if axis.bundles]
        if not self._ranked:
            raise ValueError("the model has nothing to prune: see pruner.axes() for the reasons")
        free = [axis.bundles for axis in self._axes]
        self._counts = counts_of(share, self._axes, free, context)
        self._sizes = [len(self._axes[a].free) for a in self._ranked]

    def removal(self, state: Tensor) -> Removal:
        """The units that go: those of the lowest ranks, which `criterion` returns."""
        parts = zip(self._ranked, _ranks(state).split(self._sizes), strict=True)
        bundles = {a: bundles_of(self._axes[a], own) for a, own in parts}
        return lowest_units(self._axes, bundles, self._counts, self._limits)

    def key(self, state: Tensor) -> bytes:
        """Equal for equal masks."""
        return torch.cat([*self.removal(state).values()]).numpy().tobytes()

    def cut(self, state: Tensor) -> Any:
        """How `Pruner` cuts these units out."""
        where = self._pruner.model, self._pruner.inputs, self._coupling, self._axes
        trial = Trial(*where, verify=False)
        trial.settle({a: units for a, units in self.removal(state).items() if units.any()})
        return trial.how

    def first(self, particles: int, start: Any, noise: float, generator: torch.Generator) -> Tensor:
        """(particles, U) normal numbers, or near to the ranks of a criterion."""
        shape = particles, sum(self._sizes)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        if start is None:
            return drawn
        tensors = dict(self._pruner.model.named_parameters())
        criterion, together = as_criterion(start), self._context == "global"
        scores = [
            unit_scores(tensors, self._axes[a], criterion, relative=together).detach().cpu()
            for a in self._ranked
        ]
        near = torch.cat([_normal(s) for s in ([torch.cat(scores)] if together else scores)])
        drawn = (1 - noise**2) ** 0.5 * near + noise * drawn
        drawn[0] = near
        return drawn

    def criterion(
        self, state: Tensor, loss: float, history: Sequence[tuple[float, float]]
    ) -> Searched:
        """Ranks of the units, which a global ranking takes as they are."""
        values = {}
        for a, own in zip(self._ranked, _ranks(state).split(self._sizes), strict=True):
            units = self._axes[a].free.tolist()
            values |= {(a, u): rank for u, rank in zip(units, own.tolist(), strict=True)}
        data = measured(self._pruner.model, self._coupling, values)
        return Searched(
            as_gathered,
            "particle_search",
            needs="measured",
            norm="none",
            data=data,
            loss=loss,
            history=tuple(history),
        )


def _ranks(scores: Tensor) -> Tensor:
    """0 for the lowest score, and so on."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort(stable=True)] = torch.arange(len(scores), dtype=torch.float64)
    return ranks


def _normal(scores: Tensor) -> Tensor:
    """Scores as normal numbers in the same order."""
    return torch.special.ndtri((_ranks(scores) + 0.5) / len(scores))


def _drawn(losses: Tensor, generator: torch.Generator) -> Tensor:
    """Which particles go on, by systematic resampling: likely ones several times."""
    known = losses[losses.isfinite()]
    spread = known.std(correction=0) if len(known) else losses.new_zeros(())
    weights = torch.ones_like(losses)
    if spread > 0:
        weights = torch.exp(-(losses - known.min()) / spread)
    edges = weights.cumsum(0) / weights.sum()
    offset = torch.rand((), generator=generator, dtype=losses.dtype)
    points = (torch.arange(len(losses)) + offset) / len(losses)
    return torch.searchsorted(edges, points).clamp(max=len(losses) - 1)
