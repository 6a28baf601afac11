"""Whether the statistics of batch norms are still those of the data, and computing them anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..coupling.inputs import run_quietly
from ..score.batches import Batch
from .subject import batches_of, network_of

__all__ = ["bn_drift", "recalibrate_bn"]

_SHIFT, _SPREAD = 0.1, 1.1  # a tenth of a standard deviation


def recalibrate_bn(
    model: Any, dl: Iterable[Any] | None = None, n_batches: int | None = 100
) -> nn.Module:
    """Compute the running statistics of all batch norms anew, as averages over batches.

    Every norm normalises by the batch meanwhile, as in training; all else runs in eval mode. Means
    and variances of the batches count the same each, as with `momentum=None`. Parameters, modes,
    momenta, gradients and the random state stay as they are; after an exception the statistics do,
    too. A norm that does not run keeps its statistics.

    Args:
        model: a network or a Learner.
        dl: batches like those it was trained on; default the Learner's training set.
        n_batches: how many of them; None for all.

    Returns:
        The network.

    Raises:
        ValueError: it has no batch norms with running statistics, the loader gave no batch, or
            what arrives at a norm is not finite.
    """
    network, norms = _norms_of(model)
    found = _statistics(network, norms, _loader(dl, model), n_batches)
    state = {
        id(x): (x, new)
        for name, said in found.items()
        for x, new in said.state(norms[name])
        if said.times
    }
    before = [(x, x.clone()) for x, _ in state.values()]
    try:
        _write(state.values())
    except BaseException:  # an interrupt, too, must not leave half of them
        _write(before)
        raise
    return network


def bn_drift(
    model: Any, dl: Iterable[Any] | None = None, n_batches: int | None = 8
) -> pd.DataFrame:
    """How far the running statistics of batch norms are from those of the data.

    Networks that were pruned by rank give their later layers other maps than those the statistics
    were gathered on, and training few steps does not mend it. `recalibrate_bn` does.

    Args:
        model: a network or a Learner; it is left as it was.
        dl: batches like those it was trained on; default the Learner's training set.
        n_batches: how many of them; None for all.

    Returns:
        A row for each norm: `layer`, `channels`; `shift`, how far means are apart, in running
        standard deviations; `spread`, by which factor standard deviations are (both averaged over
        channels: 0 and 1 where nothing drifted); `recalibrate`, whether `shift` is more than 0.1
        or `spread` more than 1.1. Few batches differ from the running statistics by chance, too:
        compare with the table of the dense network.

    Raises:
        ValueError: as `recalibrate_bn`.
    """
    network, norms = _norms_of(model)
    found = _statistics(network, norms, _loader(dl, model), n_batches)
    rows = []
    for name, said in found.items():
        norm, shift, spread = norms[name], float("nan"), float("nan")
        if said.times:
            old = (_exact(norm.running_var) + norm.eps).sqrt()
            new = (said.var + norm.eps).sqrt()
            shift = float(((said.mean - _exact(norm.running_mean)) / old).abs().mean())
            spread = float((new / old).log().abs().mean().exp())
        rows.append((name, norm.num_features, shift, spread, shift > _SHIFT or spread > _SPREAD))
    return pd.DataFrame(rows, columns=["layer", "channels", "shift", "spread", "recalibrate"])


# --- inside --------------------------------------------------------------------------------------


@dataclass
class _Statistics:
    """What a norm saw: sums over `times` of its runs, each (channels,), in float64."""

    times: int = 0
    means: Tensor | float = 0.0
    vars: Tensor | float = 0.0

    @property
    def mean(self) -> Tensor:
        return self.means / self.times

    @property
    def var(self) -> Tensor:
        return self.vars / self.times

    def add(self, norm: _BatchNorm) -> None:
        """Add the averages that a norm has gathered since it was reset."""
        times = int(norm.num_batches_tracked)
        self.times += times
        self.means = self.means + times * _exact(norm.running_mean)
        self.vars = self.vars + times * _exact(norm.running_var)

    def state(self, norm: _BatchNorm) -> Iterator[tuple[Tensor, Tensor]]:
        """The buffers of a norm, and what they become."""
        if self.times:
            yield norm.running_mean, self.mean
            yield norm.running_var, self.var
            yield norm.num_batches_tracked, torch.tensor(self.times)


def _exact(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _write(state: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for x, new in state:
            x.copy_(new)


def _norms_of(model: Any) -> tuple[nn.Module, dict[str, _BatchNorm]]:
    network = network_of(model, "model")
    norms = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        if module.running_mean is not None and module.num_batches_tracked is not None
    }
    if not norms:
        raise ValueError(
            f"{type(network).__name__} has no batch norms with running statistics: there is "
            f"nothing to recalibrate (layer, group and RMS norms compute theirs from each input)"
        )
    return network, norms


def _loader(dl: Iterable[Any] | None, model: Any) -> Iterable[Any]:
    if dl is not None:
        return dl
    if not isinstance(model, nn.Module):
        return model.dls.train
    raise TypeError("without a Learner pass a loader, as in dls.train")


def _statistics(
    network: nn.Module, norms: dict[str, _BatchNorm], dl: Iterable[Any], n_batches: int | None
) -> dict[str, _Statistics]:
    """The statistics of what arrives at each norm, where all of them normalise by the batch."""
    found = {name: _Statistics() for name in norms}
    with closing(batches_of(dl, network, False, n_batches)) as batches:
        for batch in batches:
            _add(network, norms, batch, found)
    for name, said in found.items():
        if said.times and not bool((said.mean + said.var).isfinite().all()):
            raise ValueError(
                f"what arrives at {name!r} is not finite: look for nan and inf in the batches, and "
                f"in half precision for overflow"
            )
    return found


def _add(
    network: nn.Module,
    norms: dict[str, _BatchNorm],
    batch: Batch,
    found: dict[str, _Statistics],
) -> None:
    with run_quietly(network):
        for norm in norms.values():
            norm.reset_running_stats()
            norm.training, norm.momentum = True, None
        batch.inputs(network)
        for name, norm in norms.items():
            found[name].add(norm)
