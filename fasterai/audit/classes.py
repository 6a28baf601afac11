"""Which classes pay: accuracy by class before and after, and what the change depends on.

Source: Paganini, "Prune Responsibly", 2020, https://arxiv.org/abs/2009.09936: by a linear model of
the change, pruning takes most from classes that are small or that the dense network knew badly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..coupling.inputs import Inputs, map_tensors, run_quietly
from ..score.batches import Batch
from .pictures import plot_classes
from .subject import batches_of, loader_of, network_of, predicted, scores_of

__all__ = ["ClassAudit", "class_audit"]


@dataclass(frozen=True, eq=False)
class ClassAudit:
    """What became of each class.

    Args:
        table: a row for each class: `class`, `size`, the accuracies `before` and `after`, and
            `change`, in the order of the changes, the largest loss first.
        model: the linear model of the change on size and baseline accuracy, by least squares: a row
            for each `term`, with its `estimate`, `std_error`, `t` and `p` (two-sided).
        r2: the share of the variance of the changes that it explains.
    """

    table: pd.DataFrame
    model: pd.DataFrame
    r2: float

    def plot(self, ax: Any = None) -> Any:
        """Draw the change of each class over its accuracy before; returns the axes."""
        return plot_classes(self.table, self.model, ax)

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False) + self.model.to_html()


def class_audit(
    dense: Any,
    sparse: Any,
    dl: Iterable[Any] | None = None,
    *,
    sizes: Mapping[Any, int] | Sequence[int] | None = None,
    classes: Sequence[Any] | None = None,
    progress: bool = True,
) -> ClassAudit:
    """Compare two classifiers class by class: who pays for what was pruned?

    ```python
    audit = class_audit(dense, learn.model, learn.dls.valid)
    audit.table, audit.model, audit.plot()
    ```
    Both see the same batches, in eval mode, and are left as they were. A single output is the
    log-odds of the second of two classes. Where the data is small, mind that a class that was lucky
    before loses by chance: a low `p` there is no proof.

    Args:
        dense: the network before, or a Learner with it.
        sparse: the network after, or a Learner with it.
        dl: a loader of inputs and class numbers; default the validation set of the Learner.
        sizes: examples of each class in training, which the model explains the change with: by
            class or in the order of the classes; default those in `dl`.
        classes: their names; default the loader's `vocab`, or numbers.
        progress: show a bar.

    Raises:
        ValueError: the task is not to tell one class for each example, as with several labels,
            or the networks know different numbers of classes.
    """
    networks = [network_of(dense, "dense"), network_of(sparse, "sparse")]
    dl = loader_of(dl, dense, sparse)
    counts = _counted(networks, dl, progress)
    names = _names(classes, dl, len(counts))
    table = pd.DataFrame({"class": names, "size": counts[:, 0].tolist()})
    with np.errstate(invalid="ignore"):
        right = counts[:, 1:] / counts[:, :1]  # nan where there is no example
    table["before"], table["after"] = right[:, 0], right[:, 1]
    table["change"] = table["after"] - table["before"]
    known = table["size"] if sizes is None else pd.Series(_sizes(sizes, names), dtype=float)
    model, r2 = _linear_model(table["change"], {"size": known, "before": table["before"]})
    table["size"] = known.astype(int)
    order = table["change"].argsort(kind="stable")
    return ClassAudit(table.iloc[order].reset_index(drop=True), model, r2)


# --- counting ------------------------------------------------------------------------------------


def _counted(networks: Sequence[nn.Module], dl: Iterable[Any], progress: bool) -> np.ndarray:
    """(classes, 1 + networks): examples, and how many of them each network gets right."""
    counts: Tensor | None = None
    for batch in batches_of(dl, networks[0], progress):
        target = _targets(batch)
        found = [_predicted(network, batch, target) for network in networks]
        widths = {width for _, width in found}
        if len(widths) > 1:
            raise ValueError(
                f"the networks tell {' and '.join(str(w) for _, w in found)} classes apart: "
                f"compare two for the same classes"
            )
        width = widths.pop()
        if int(target.min()) < 0 or int(target.max()) >= width:
            raise ValueError(
                f"the targets are classes {int(target.min())} to {int(target.max())}, the networks "
                f"know 0 to {width - 1}"
            )
        own = [torch.ones_like(target), *((p == target).long() for p, _ in found)]
        own = torch.stack([torch.bincount(target, x, width) for x in own], 1)
        counts = own if counts is None else counts + own
    return counts.long().numpy()


def _targets(batch: Batch) -> Tensor:
    """(N,) class numbers, on the CPU."""
    target = batch.targets[0] if len(batch.targets) == 1 else None
    if not isinstance(target, Tensor):
        raise ValueError("a batch must be inputs and one tensor of class numbers")
    if batch.classes is not None:
        return batch.classes.cpu().long()
    flat = target.flatten()
    if len(flat) == len(target) and ((flat == 0) | (flat == 1)).all():
        return flat.cpu().long()  # no or yes, as binary losses take it
    what = f"targets of shape {tuple(target.shape)} and type {target.dtype}"
    if target.ndim == 2:
        raise ValueError(
            f"class_audit needs one class for each example, got {what}: with several labels an "
            f"example there is no accuracy of a class; audit each label as a task of its own"
        )
    raise ValueError(f"class_audit needs one class number for each example, got {what}")


def _predicted(network: nn.Module, batch: Batch, target: Tensor) -> tuple[Tensor, int]:
    """(N,) classes, on the CPU, and how many there are."""
    inputs = _for(network, batch.inputs)
    with run_quietly(network):
        outputs = scores_of(inputs(network))
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(target):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"class_audit needs scores (examples, classes) from the networks, got {got} for "
            f"{len(target)} examples"
        )
    return predicted(outputs).cpu(), max(2, outputs.shape[1])


def _for(network: nn.Module, inputs: Inputs) -> Inputs:
    """Inputs on a network's device, its floats in the network's type."""
    weight = next(p for p in network.parameters() if p.is_floating_point())

    def fit(x: Tensor) -> Tensor:
        return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

    args, kwargs = map_tensors((inputs.args, dict(inputs.kwargs)), fit)
    return Inputs(args, kwargs, inputs.samples)


def _names(classes: Sequence[Any] | None, dl: Any, n: int) -> list[Any]:
    if classes is None:
        vocab = getattr(dl, "vocab", None)
        return list(vocab) if vocab is not None and len(vocab) == n else list(range(n))
    if len(classes) != n:
        raise ValueError(f"the networks know {n} classes, got {len(classes)} names")
    return list(classes)


def _sizes(sizes: Mapping[Any, int] | Sequence[int], names: Sequence[Any]) -> list[float]:
    if isinstance(sizes, Mapping):
        if missing := [name for name in names if name not in sizes]:
            raise ValueError(f"sizes: {missing[0]!r} is missing, got {list(sizes)[:10]}")
        sizes = [sizes[name] for name in names]
    if len(sizes) != len(names):
        raise ValueError(f"sizes must be one for each of {len(names)} classes, got {len(sizes)}")
    return [float(n) for n in sizes]


# --- the model -----------------------------------------------------------------------------------


def _linear_model(
    change: pd.Series, explained_by: Mapping[str, pd.Series]
) -> tuple[pd.DataFrame, float]:
    """Least squares with an intercept; what does not vary, or too few classes, gives nan."""
    there = change.notna()
    y, n = change[there].to_numpy(float), int(there.sum())
    columns = {"intercept": np.ones(n)}
    columns |= {name: x[there].to_numpy(float) for name, x in explained_by.items()}
    used = ["intercept", *(k for k, x in columns.items() if n and np.ptp(x) > 0)]
    design = np.stack([columns[k] / max(1.0, abs(columns[k]).max()) for k in used], 1)
    scale = np.array([max(1.0, abs(columns[k]).max()) for k in used])
    table = pd.DataFrame(np.nan, list(columns), ["estimate", "std_error", "t", "p"])
    table.index.name = "term"
    if np.linalg.matrix_rank(design) < len(used):
        return table, np.nan
    estimate = np.linalg.lstsq(design, y, rcond=None)[0]
    table.loc[used, "estimate"] = estimate / scale
    rest, whole = y - design @ estimate, y - y.mean()
    free = n - len(used)
    if free > 0:
        spread = (rest @ rest) / free * np.diag(np.linalg.inv(design.T @ design))
        table.loc[used, "std_error"] = np.sqrt(spread) / scale
        _test(table, used, free)
    return table, float(1 - rest @ rest / (whole @ whole)) if whole.any() else np.nan


def _test(table: pd.DataFrame, used: Sequence[str], free: int) -> None:
    from scipy.stats import t as student

    with np.errstate(divide="ignore", invalid="ignore"):
        table["t"] = table["estimate"] / table["std_error"]
    table.loc[used, "p"] = 2 * student.sf(table.loc[used, "t"].abs(), free)
