"""How much each group of coupled layers can give: the metric as each alone is cut."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.checks import number
from ..core.criteria import Criterion, large_final
from ..core.masks import as_fraction
from ..core.names import LayerChoice, plain
from ..core.progress import with_bar
from ..coupling.inputs import run_quietly
from ..coupling.surgery import Cut, shadowed
from ..coupling.units import Axis
from ..prune.fitting import cut_for
from ..prune.pruner import Pruner
from ..score.batches import Batch, in_memory
from .pictures import plot_sensitivity
from .subject import loader_of, network_of, predicted, scores_of

__all__ = ["Sensitivity", "sensitivity"]

_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The metric of a network of which one group of coupled layers at a time is cut.

    Args:
        table: a row for each group, by the name of its first layer; a column for each share cut.
        dense: the metric of the whole network.
        metric: its name.
        unprunable: groups that cannot be cut: `layer`, `units` and the `reason`.
        coupled: the layers of each group; their channels go together.
    """

    table: pd.DataFrame
    dense: float
    metric: str
    unprunable: pd.DataFrame
    coupled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def drop(self) -> pd.DataFrame:
        """How much worse the metric gets; likewise."""
        return self.table - self.dense if self.metric == "loss" else self.dense - self.table

    def targets(self, drop: float = 0.02) -> dict[str, float]:
        """The largest share of each layer that costs no more than this: `{layer: sparsity}`.

        What `PruneCallback` and `Pruner` take as `sparsity`, and `SparsifyCallback` and
        `Sparsifier` with the granularity 'filter', and with `mixed=True` where channels that a
        layer norm takes together are among them. No smaller share may cost more. Each group was
        cut alone: cut together they cost more, before training on.

        Args:
            drop: what is tolerated: a loss of accuracy, 0.02 being two in a hundred, or of
                whatever the metric is; or a rise of the loss.
        """
        number(drop, "drop", most=math.inf)
        found = {}
        for name, costs in self.drop.iterrows():
            borne = [share for share, fine in (costs <= drop).cummin().items() if fine]
            if borne:
                found |= dict.fromkeys(self.coupled.get(name, (name,)), max(borne))
        return found

    def floors(self, drop: float = 0.02) -> dict[str, float]:
        """The least share of each layer's channels that has to stay: `{layer: share}`.

        What `Target` takes as `floors`: the units compete for the budget, and no layer loses more
        than `targets(drop)` has, nor do those that it leaves out, those that were excluded, say.
        """
        borne = self.targets(drop)
        layers = [layer for name in self.table.index for layer in self.coupled.get(name, (name,))]
        left = {layer: round(1.0 - borne.get(layer, 0.0), 10) for layer in layers}
        whole = dict.fromkeys(self.unprunable["layer"], 1.0)
        return whole | {layer: share for layer, share in left.items() if share}

    def plot(self, drop: float | None = None, ax: Any = None) -> Any:
        """Draw the table as a map; a line marks what `targets(drop)` allows. Returns the axes."""
        marked = {} if drop is None else self.targets(drop)
        return plot_sensitivity(self.table, self.dense, self.metric, marked, ax)

    def _repr_html_(self) -> str:
        return self.table.to_html() + self.unprunable.to_html(index=False)


def sensitivity(
    subject: Any,
    dl: Iterable[Any] | None = None,
    *,
    shares: Sequence[float] = _SHARES,
    criteria: Criterion | Callable[[Tensor], Tensor] = large_final,
    metric: str | Callable[..., Any] | None = None,
    loss_func: Callable[..., Tensor] | None = None,
    n_batches: int | None = 8,
    exclude: LayerChoice | Iterable[LayerChoice] = (),
    whole_heads: bool = False,
    progress: bool = True,
) -> Sensitivity:
    """Cut each group of coupled layers alone, by several shares, and measure.

    ```python
    found = sensitivity(learn)
    found.plot()
    learn.fit(5, cbs=PruneCallback(found.targets(drop=0.02)))
    ```
    The weakest units of a group are left out, in eval mode and without training; the network is not
    touched, whatever happens. It runs once for each group, share and batch.

    Args:
        subject: a Learner, or a network.
        dl: a loader; default the validation set of the Learner.
        shares: what to cut of each group.
        criteria: scores of weights, higher = keep.
        metric: 'accuracy', 'loss' or a function of outputs and targets, higher = better, averaged
            over examples; default accuracy where targets are class numbers, else the loss.
        loss_func: for the loss; default the Learner's.
        n_batches: how many batches, at most; None for all of them. They are kept in memory.
        exclude: names or types of layers whose channels stay.
        whole_heads: attention heads go as a whole.
        progress: show a bar.

    Raises:
        ValueError: shares outside [0, 1], an empty loader, or nothing to measure by.
    """
    network = network_of(subject, "subject")
    shares = [as_fraction(share, "shares") for share in shares]
    if not shares or sorted(set(shares)) != shares:
        raise ValueError(f"shares must rise, as in (0.1, 0.5, 0.9), got {shares}")
    dl = loader_of(dl, subject)
    batches = in_memory(dl, network, n_batches)
    inputs = batches[0].inputs
    pruner = Pruner(network, inputs.given, exclude=exclude, whole_heads=whole_heads)
    measure = _measure(network, batches, metric, loss_func or getattr(subject, "loss_func", None))
    axes = pruner.coupled()[1]
    groups = _groups(axes)
    left = [(a.name, a.size, _reason(a)) for a in axes if not a.bundles]
    dense, rows = measure(), {name: dict[float, float]() for name in groups}
    for name, share in with_bar([(n, s) for n in groups for s in shares], progress):
        if name not in rows:
            continue
        plan = pruner.plan_for({plain(name): share}, criteria=criteria, verify=False)
        if plan.removed:
            rows[name][share] = measure(cut_for(plan, network))
        elif _asks_for(groups[name], share):
            rows.pop(name)
            left.append((name, sum(a.size for a in groups[name]), "a cut of it breaks the network"))
        else:
            rows[name][share] = dense
    table = pd.DataFrame.from_dict(rows, orient="index", columns=shares, dtype=float)
    return Sensitivity(
        table.rename_axis(index="layer", columns="share").rename(index=plain),
        dense,
        measure.name,
        pd.DataFrame([(plain(n), *x) for n, *x in left], columns=["layer", "units", "reason"]),
        {plain(n): _layers(groups[n]) for n in rows},
    )


# --- groups --------------------------------------------------------------------------------------


def _groups(axes: Sequence[Axis]) -> dict[str, list[Axis]]:
    """Axes that can be cut, by the first of them; those that a layer makes several of, together."""
    groups: dict[str, list[Axis]] = {}
    for axis in axes:
        if axis.bundles:
            same = [n for n, g in groups.items() if set(_layers(g)) & set(_layers([axis]))]
            merged = [a for name in same for a in groups.pop(name)] + [axis]
            groups[merged[0].name] = merged
    return groups


def _layers(group: Sequence[Axis]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(plain(name) for axis in group for name in axis.producers))


def _reason(axis: Axis) -> str:
    reasons = Counter(pin for pin in axis.pins if pin)
    return reasons.most_common(1)[0][0] if reasons else "its blocks have no free unit in common"


def _asks_for(group: Sequence[Axis], share: float) -> bool:
    """Whether this share is a unit or more, of which one has to stay."""
    bundles = [(round(share * axis.bundles), axis.size // axis.blocks) for axis in group]
    return any(n and size > 1 for n, size in bundles)


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Measure:
    """The mean over examples of what `func` says of outputs and targets, a mean over a batch."""

    network: nn.Module
    batches: Sequence[Batch]
    name: str
    func: Callable[..., Any]

    def __call__(self, how: Cut | None = None) -> float:
        """The metric of the network as it is, or with a cut that lasts as long as this."""
        total = torch.zeros((), dtype=torch.float64)
        within = nullcontext() if how is None else shadowed(self.network, how)
        with run_quietly(self.network), within:
            for batch in self.batches:
                total += batch.size * float(batch.compared(self.func, batch.inputs(self.network)))
        return float(total) / sum(batch.size for batch in self.batches)


def _measure(network: nn.Module, batches: Sequence[Batch], metric: Any, loss_func: Any) -> _Measure:
    if metric is None:
        known = all(b.classes is not None for b in batches)
        scored = known and all(_tells_classes(network, b) for b in batches)
        metric = "accuracy" if scored or (known and loss_func is None) else "loss"
    if callable(metric):
        return _Measure(network, batches, getattr(metric, "__name__", "metric"), metric)
    if metric not in ("accuracy", "loss"):
        raise ValueError(f"metric must be 'accuracy', 'loss' or a function, got {metric!r}")
    if metric == "loss" and loss_func is None:
        raise ValueError("to measure the loss, pass loss_func, as in loss_func=learn.loss_func")
    if metric == "accuracy" and any(b.classes is None for b in batches):
        raise ValueError(
            "accuracy needs one class number for each example: pass metric='loss' or a function of "
            "outputs and targets, higher = better"
        )
    return _Measure(network, batches, metric, loss_func if metric == "loss" else _accuracy)


def _tells_classes(network: nn.Module, batch: Batch) -> bool:
    """Whether targets are class numbers, and outputs scores of classes."""
    if batch.classes is None:
        return False
    with run_quietly(network):
        outputs = scores_of(batch.inputs(network))
    return isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] > 1


def _accuracy(outputs: Any, target: Tensor) -> Tensor:
    outputs = scores_of(outputs)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"accuracy needs scores (examples, classes) from the network, got {got}: pass "
            f"metric='loss' or a function"
        )
    return (predicted(outputs) == target.flatten()).double().mean()
