"""Several targets from one checkpoint, side by side: what accuracy costs what."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import nn

from ..core.checks import number, whole
from ..core.copies import copied
from ..core.names import tensors_by_name, unwrapped
from ..core.progress import with_bar
from ..core.schedule import one_shot
from ..core.target import COUNTED, Target
from ..core.writing import digest
from ..coupling.inputs import Inputs
from ..deploy.files import load_pruned, save_pruned
from ..measure.profile import compare, macs, saved_bytes
from ..prune.amounts import Units
from ..prune.budget import UnreachableTarget
from ..prune.callback import PruneCallback
from ..prune.history_json import as_number
from ..score.batches import in_memory
from .folder import Folder, file_name, said
from .lent import lent
from .pictures import plot_frontier

__all__ = ["Sweep", "sweep"]

DENSE = "dense"
_WAYS = ("gradual", "one-shot")
_COLUMNS = ("asked", "reached", "met", "parameters", "macs", "bytes")


@dataclass(frozen=True, eq=False)
class Sweep:
    """What became of each target.

    Args:
        table: a row for each target, by its label, after that of the checkpoint, 'dense'. Columns:
            `asked` and `reached` in the unit of the target (see `sweep`), `met`; `parameters`,
            `macs` of one sample, `bytes` of the saved state dict; where time was measured
            `latency_ms`, and `speedup` against the checkpoint in the same minute; `valid_loss` and
            the metrics; `seconds` of training; and a `note` where there is something to say.
        metrics: the names of the metrics, of which `plot` takes the last.
        networks: makes the network of a target, by its label.
    """

    table: pd.DataFrame
    metrics: tuple[str, ...]
    networks: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)

    def model(self, target: Any) -> nn.Module:
        """The network of a target, a new object each time, on the checkpoint's device.

        Args:
            target: as it was given, or its label.

        Raises:
            KeyError: there is none; the message names those there are.
        """
        label = target if isinstance(target, str) else label_of(target)
        if label not in self.networks:
            known = ", ".join(map(repr, self.networks)) or "none"
            raise KeyError(f"no network was kept for {label!r}; there are: {known}")
        return self.networks[label]()

    def plot(self, metric: str | None = None, against: str = "macs", ax: Any = None) -> Any:
        """Draw a metric against 'macs', 'parameters', 'bytes' or 'latency_ms'; returns the axes.

        For several sweeps in one picture see `plot_frontier`.
        """
        return plot_frontier({"pruned": self}, metric, against, ax=ax)

    def _repr_html_(self) -> str:
        return self.table.to_html()


def sweep(
    learn: Any,
    targets: Iterable[Any] | Mapping[str, Any],
    epochs: int,
    *,
    lr: float | None = None,
    fit: str = "fit",
    way: str = "gradual",
    cbs: Iterable[Any] = (),
    folder: str | os.PathLike[str] | None = None,
    seconds: float = 0.0,
    batch: int = 1,
    progress: bool = True,
    **options: Any,
) -> Sweep:
    """Prune and train a Learner's network for each of several targets, each from the same start.

    ```python
    found = sweep(learn, [0, 0.3, 0.5, Target(macs=0.25)], 5, lr=1e-3, folder="sweep")
    found.table, found.plot()
    small = found.model(0.5)
    ```
    Each target trains a copy of the model and of the optimizer, with the same random numbers. The
    learner is afterwards, and after an exception, as it was. With a folder what is done is kept: a
    call that was stopped goes on where it was, and one with further targets adds them. The
    networks lie there as `save_pruned` writes them.

    A target that cannot be met is noted in the table, and the others go on. With 0 among the
    targets there is a network that was trained as long and lost nothing: the fair comparison.

    Args:
        learn: at the checkpoint, trained as a rule.
        targets: what `PruneCallback` takes: shares of the units to remove, {layer: share},
            `Units`, or `Target`; or functions without arguments that make the callbacks of a fit,
            by name, as in {'zeros': lambda: SparsifyCallback(0.5)}. `reached` is a share of the
            units for shares, a number of units for `Units`, and for a `Target` what it counts: a
            share of the checkpoint's where the target is one.
        epochs: of each fit.
        lr: its learning rate; default the Learner's.
        fit: the Learner's method, such as 'fit_one_cycle'.
        way: 'gradual' prunes while it trains; 'one-shot' prunes first, then trains.
        cbs: further callbacks, the same in each fit.
        folder: where to keep what is done.
        seconds: time each network for so long; 0 does not. `speedup` is measured by turns with the
            checkpoint, and `latency_ms` is the checkpoint's by that: one clock for all of them.
            What a `Target` of time reached is what was measured when it was cut.
        batch: samples of a forward that is timed.
        progress: show a bar.
        options: of `PruneCallback`: context, criteria, schedule, round_to, ...

    Raises:
        ValueError: two targets of one name, or a folder of another network, of other arguments or
            of other data.
    """
    _must_be_learner(learn, fit)
    if way not in _WAYS:
        raise ValueError(f"way must be 'gradual' or 'one-shot', got {way!r}")
    number(seconds, "seconds")
    whole(epochs, "epochs", 0)
    if way == "one-shot":
        options = {"schedule": one_shot.over(0.0, 0.0), **options}
    runs = _labelled(targets)
    for target in runs.values():
        _callbacks(target, options)  # what cannot be is refused before anything is trained
    network = unwrapped(learn.model)
    cbs, timed = tuple(cbs), batch if seconds else None
    arguments = {"epochs": epochs, "lr": lr, "fit": fit, "way": way, "cbs": list(cbs), **options}
    arguments |= {"timed batch": timed, "metrics": [metric.name for metric in learn.metrics]}
    run = _Run(learn, epochs, lr, fit, cbs, options, seconds, batch)
    done = Folder(
        folder,
        digest(tensors_by_name(network)),
        {name: said(value) for name, value in arguments.items()},
        run.dense(),
    )
    done.must_ask({label: said(target) for label, target in runs.items()})
    networks: dict[str, nn.Module] = {}
    for label in with_bar([k for k in runs if k not in done.rows], progress):
        row, trained = run(label, runs[label], done)
        done.add(label, row, said(runs[label]))
        if trained is not None and row["file"] is None:
            networks[label] = trained
    rows = {DENSE: done.dense, **{k: done.rows[k] for k in runs}}
    return Sweep(_table(rows), tuple(run.names), _makers(done, list(runs), networks, run.start))


# --- what is asked -------------------------------------------------------------------------------


def _must_be_learner(learn: Any, fit: str) -> None:
    """Raise a TypeError where there is nothing to fit with."""
    parts = ("model", "dls", "cbs", "opt")
    if isinstance(learn, nn.Module) or not all(hasattr(learn, part) for part in parts):
        raise TypeError(f"sweep takes a fastai Learner, got {type(learn).__name__}")
    if not callable(getattr(learn, fit, None)):
        raise TypeError(f"fit names a method of the Learner, as in 'fit_one_cycle', got {fit!r}")


def label_of(target: Any) -> str:
    """The name of a target in the table."""
    if callable(target):
        return getattr(target, "__name__", said(target))
    if isinstance(target, Mapping):
        return said(dict(target))
    return str(float(target)) if isinstance(target, int) else said(target)


def _labelled(targets: Iterable[Any] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(targets, str | bytes) or not isinstance(targets, Iterable):
        raise TypeError(f"targets are several, as in [0.3, 0.5], got {targets!r}")
    if isinstance(targets, Mapping):
        pairs = [(str(k), v) for k, v in targets.items()]
    else:
        pairs = [(label_of(target), target) for target in targets]
    for _, target in pairs:
        _must_be_function(target)
    labels = [label for label, _ in pairs]
    twice = sorted({label for label in labels if labels.count(label) > 1 or label == DENSE})
    if twice or not labels:
        raise ValueError(
            f"targets need names of their own, other than 'dense', and there must be some; give "
            f"them as in {{'slow': lambda: PruneCallback(0.5)}}, got {labels}"
        )
    return dict(pairs)


def _must_be_function(target: Any) -> None:
    made = not isinstance(target, type)
    if made and hasattr(target, "learn") and hasattr(target, "order"):  # a callback of fastai
        name = type(target).__name__
        raise TypeError(
            f"a {name} belongs to one fit: pass a function that makes it, as in lambda: {name}(...)"
        )


def _callbacks(target: Any, options: Mapping[str, Any]) -> list[Any]:
    if not callable(target):
        return [PruneCallback(target, **options)]
    made = target()
    return list(made) if isinstance(made, Sequence) else [made]


# --- one run -------------------------------------------------------------------------------------


class _Run:
    """Trains and measures the network of a target.

    Args:
        learn: the Learner at the checkpoint, and so on as in `sweep`.

    Attributes:
        start: a copy of the checkpoint's network.
        names: of the metrics.
    """

    def __init__(
        self,
        learn: Any,
        epochs: int,
        lr: float | None,
        fit: str,
        cbs: Sequence[Any],
        options: Mapping[str, Any],
        seconds: float,
        batch: int,
    ) -> None:
        self.learn, self.fit, self.cbs, self.options = learn, fit, cbs, options
        self.args = (epochs,) if lr is None else (epochs, lr)
        self.seconds, self.batch = seconds, batch
        self.start = copied(unwrapped(learn.model))
        inputs = in_memory(learn.dls.valid, self.start, 1)[0].inputs
        self.inputs = Inputs.of(inputs.given)
        self.names = ["valid_loss", *(metric.name for metric in learn.metrics)]

    def dense(self) -> dict[str, Any]:
        """Costs and metrics of the checkpoint."""
        with lent(self.learn):
            return {**self._costs(self.start), **self._metrics()}

    def __call__(
        self, label: str, target: Any, folder: Folder
    ) -> tuple[dict[str, Any], nn.Module | None]:
        """What became of a target, and its network, if it could be met."""
        cbs, begun = _callbacks(target, self.options), time.perf_counter()
        row: dict[str, Any] = {"asked": _asked(target), "file": None, "note": ""}
        with lent(self.learn):
            try:
                getattr(self.learn, self.fit)(*self.args, cbs=[*self.cbs, *cbs])
            except UnreachableTarget as error:
                why = str(error).rpartition("\n\t")[2]  # fastai says in front where it came from
                return {**row, "met": False, "note": why}, None
            row["seconds"] = time.perf_counter() - begun
            network = unwrapped(self.learn.model)
            row |= {**self._costs(network, folder.dense.get("latency_ms")), **self._metrics()}
            row |= self._reached(target, cbs, row)
            file = folder.file(label)
            if file is not None:
                try:
                    save_pruned(network, file, _plan(cbs))
                    row["file"] = file.name
                except ValueError as error:  # training is not thrown away for that
                    row["note"] = f"the network could not be saved: {error}"
        return row, network

    def _costs(self, network: nn.Module, dense_ms: float | None = None) -> dict[str, Any]:
        """What a network costs; its time by turns with the checkpoint's, of `dense_ms`."""
        example = self.inputs.given
        found = {
            "parameters": sum(p.numel() for p in network.parameters()),
            "macs": macs(network, example).get(""),
            "bytes": saved_bytes(network),
        }
        if self.seconds:
            pair = {DENSE: self.start, "this": network}
            batches = None if self.inputs.samples is None else [self.batch]
            timed = compare(pair, example, batch_sizes=batches, seconds=self.seconds)
            took = timed["latency_ms"]
            speedup = 1.0 if network is self.start else float(took[DENSE] / took["this"])
            dense_ms = float(took[DENSE]) if dense_ms is None else dense_ms
            found |= {"latency_ms": dense_ms / speedup, "speedup": speedup}
        return found

    def _metrics(self) -> dict[str, float | None]:
        return {n: as_number(x) for n, x in zip(self.names, self.learn.validate(), strict=False)}

    def _reached(self, target: Any, cbs: Sequence[Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """What was reached in the unit of the target, and whether that is what was asked."""
        pruning = next((cb for cb in cbs if isinstance(cb, PruneCallback)), None)
        if isinstance(target, Target):
            reached = self._cost(target, pruning, row)
            if reached is None:
                return {"reached": None, "met": None}
            met = reached >= target.value if target.kind == "speedup" else reached <= target.value
            return {"reached": reached, "met": bool(met)}
        if isinstance(target, Units):
            reached = pruning.removed
            return {"reached": reached, "met": reached >= target.n}
        known = [cb.reached() for cb in cbs if hasattr(cb, "reached")]
        reached = as_number(known[0]) if known else None
        return {"reached": reached, "met": None}

    def _cost(self, target: Target, pruning: PruneCallback, row: Mapping[str, Any]) -> float | None:
        """What a target counts, of the network; measured anew but for times."""
        if target.kind in COUNTED:
            share = target.value <= 1
            return row[target.kind] / (self._of_start(target.kind) if share else 1)
        met = pruning.budget
        if met is None:
            return None
        return met.dense / met.measured if target.kind == "speedup" else met.measured

    def _of_start(self, kind: str) -> float:
        if kind == "macs":
            return macs(self.start, self.inputs.given)[""]
        if kind == "bytes":
            return saved_bytes(self.start)
        return sum(p.numel() for p in self.start.parameters())


def _asked(target: Any) -> float | None:
    if isinstance(target, Target):
        return float(target.value)
    if isinstance(target, Units):
        return int(target.n)
    return None if callable(target) or isinstance(target, Mapping) else float(target)


def _plan(cbs: Sequence[Any]) -> Any:
    plans = [cb.plan for cb in cbs if isinstance(cb, PruneCallback)]
    return plans[0] if len(plans) == 1 else None


# --- what is given back --------------------------------------------------------------------------


def _table(rows: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    timed = [n for n in ("latency_ms", "speedup") if any(n in row for row in rows.values())]
    last = ["seconds", "note"]
    known = {*_COLUMNS, *timed, *last, "file"}
    metrics = dict.fromkeys(n for row in rows.values() for n in row if n not in known)
    columns = [*_COLUMNS, *timed, *metrics, *last]
    table = pd.DataFrame(
        [[row.get(name) for name in columns] for row in rows.values()],
        index=pd.Index(list(rows), name="target"),
        columns=columns,
    )
    kinds = dict.fromkeys(columns, float) | dict.fromkeys(("parameters", "macs", "bytes"), "Int64")
    table["note"] = table["note"].fillna("")
    return table.astype({**kinds, "met": "boolean", "note": object})


def _makers(
    done: Folder,
    labels: Sequence[str],
    trained: Mapping[str, nn.Module],
    start: nn.Module,
) -> dict[str, Callable[[], nn.Module]]:
    """For each target with a network what makes it: of a file, or of one kept in memory."""

    def from_file(label: str) -> Callable[[], nn.Module]:
        return lambda: load_pruned(copied(start), done.path / file_name(label))

    def from_memory(network: nn.Module) -> Callable[[], nn.Module]:
        return lambda: copied(network)

    found = {k: from_file(k) for k in labels if done.rows[k].get("file")}
    return found | {k: from_memory(network) for k, network in trained.items()}
