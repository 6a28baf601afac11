"""A page that tells of a pruning, whole in one file, to be mailed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from ..core.checks import number
from ..core.writing import replacing, writable
from ..measure.counts import filled
from ..measure.machine import machine
from ..measure.pictures import plot_widths
from ..measure.profile import compare
from ..measure.weight_pictures import plot_zeros
from ..prune.history import History
from .html import heading, page, pairs, paragraph, picture, section, table
from .pictures import plot_cuts

__all__ = ["report"]

_CHANCE = 0.001  # the share of weights that may be zero by chance


def report(
    file: str | os.PathLike[str],
    pruned: Any = None,
    *,
    networks: Mapping[str, nn.Module] | None = None,
    example_inputs: Any = None,
    sensitivity: Any = None,
    audit: Any = None,
    sweep: Any = None,
    title: str = "What was pruned",
    notes: str = "",
    seconds: float = 0.5,
) -> Path:
    """Write one HTML page that holds all it shows: tables, pictures, the machine, the versions.

    ```python
    report("digits.html", cb, networks={"dense": dense, "pruned": learn.model}, example_inputs=x)
    ```
    It loads nothing and runs nothing, so that it can be mailed, and opened anywhere. All text is
    escaped. A file of that name is replaced when all is written.

    Args:
        file: where to.
        pruned: what pruned or sparsified: a `PruneCallback`, `Pruner`, `GradualPruner`,
            `SparsifyCallback` or `Sparsifier`, after its work.
        networks: by name, to be compared: costs and times, see `compare`; the last one is the
            result.
        example_inputs: what they take; timed as given.
        sensitivity: what `sensitivity()` found.
        audit: what `class_audit()` found.
        sweep: what `sweep()` found.
        title: of the page.
        notes: a text below it, with the line breaks it has.
        seconds: time spent on each network.

    Returns:
        The path of the file.

    Raises:
        ValueError: there is nothing to tell, or networks without inputs.
    """
    if all(x is None for x in (pruned, networks, sensitivity, audit, sweep)):
        raise ValueError(
            "there is nothing to tell: pass what pruned, as in report('page.html', pruner), or "
            "networks, sensitivity, audit or sweep"
        )
    if networks is not None and example_inputs is None:
        raise ValueError("to compare networks, pass example_inputs, as in dls.one_batch()[0]")
    if networks is not None and not isinstance(networks, Mapping):
        raise TypeError(
            f"networks go by name, as in networks={{'dense': dense, 'pruned': model}}, got "
            f"{type(networks).__name__}"
        )
    number(seconds, "seconds")
    if networks is not None and not networks:
        raise ValueError("networks are empty: pass some, as in {'pruned': model}, or None")
    for value, parts, name in (
        (sensitivity, ("plot", "table", "metric", "unprunable"), "sensitivity"),
        (audit, ("plot", "table", "model"), "audit"),
        (sweep, ("plot", "table", "model"), "sweep"),
    ):
        if value is not None and not all(hasattr(value, part) for part in parts):
            made = "class_audit" if name == "audit" else name
            raise TypeError(f"{name} must be what {made}() returned, got {value!r}")
    file = writable(file)
    if pruned is not None and not callable(getattr(pruned, "report", None)):
        raise TypeError(f"pruned must be a pruner or its callback, got {type(pruned).__name__}")
    layers = None if pruned is None else pruned.report()
    result = None if networks is None else list(networks.values())[-1]
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    parts = [
        heading(title, notes),
        *_asked(pruned, layers),
        section("Costs", *_costs(networks, example_inputs, seconds)),
        *_layers(layers, result),
        *_cuts(pruned),
        *_further(sensitivity, audit, sweep),
        section("Machine and versions", pairs({"written": now, **machine()})),
    ]
    content = page(title, [part for part in parts if part])
    with replacing(file) as part:
        part.write_bytes(content)
    return file


# --- sections ------------------------------------------------------------------------------------


def _asked(pruned: Any, layers: pd.DataFrame | None) -> list[str]:
    """What was asked, what was reached, and what is left in all."""
    if layers is None:
        return []
    found: dict[str, Any] = {"by": type(pruned).__name__}
    history = _history(pruned)
    total = layers.iloc[-1]
    if history:
        last = history.cuts[-1]
        found |= {"criterion": last.criterion, "context": last.context, "cuts": len(history)}
        if last.asked is not None:
            found["share of units asked"] = last.asked
        found["share of units gone"] = last.reached
    elif "asked" in layers:
        found |= {name: total[name] for name in ("groups", "asked", "n", "zeros", "reached")}
    met = getattr(pruned, "budget", None)
    if met is not None:
        found |= {"target": str(met.target), "dense": met.dense}
        found["allowed"] = met.target.goal(met.dense)
        found |= {"predicted": met.predicted, "reached": met.measured}
    for name, column in (("parameters", "params"), ("MACs of one sample", "macs")):
        if f"{column}_after" in layers:
            found |= _pair(name, total[f"{column}_before"], total[f"{column}_after"])
    return [section("Asked and reached", pairs(found))]


def _pair(name: str, before: Any, after: Any) -> dict[str, str]:
    if before is pd.NA or after is pd.NA or not before:
        return {}
    return {name: f"{int(before):,} \u2192 {int(after):,} ({after / before:.1%} left)"}


def _costs(networks: Any, example_inputs: Any, seconds: float) -> list[str]:
    if networks is None:
        return []
    found = compare(networks, example_inputs, seconds=seconds)
    empty = [name for name in ("uncounted", "note") if not found[name].astype(bool).any()]
    same = [name for name in ("batch", "device", "dtype", "threads") if found[name].nunique() == 1]
    how = ", ".join(f"{name} {found[name].iloc[0]}" for name in same)
    return [
        table(found.drop(columns=[*empty, *same]), index=True),
        paragraph(f"Times are medians of forward passes in eval mode that took turns; {how}."),
    ]


def _layers(layers: pd.DataFrame | None, result: nn.Module | None) -> list[str]:
    shown = []
    if layers is not None and "out_before" in layers:
        alt = "Bars for each layer: output channels before, and in front of them after pruning."
        shown.append(picture(lambda: plot_widths(layers), alt))
    if result is not None and _has_zeros(result):
        alt = "Bars for each layer: the share of its weights, and of its filters, at zero."
        shown.append(picture(lambda: plot_zeros(result), alt))
    if layers is not None:
        shown.append(table(layers))
    return [section("Layer by layer", *shown)]


def _has_zeros(network: nn.Module) -> bool:
    weights = [p for p in network.parameters() if p.ndim > 1]
    zeros = sum(w.numel() - filled(w) for w in weights)
    return zeros > _CHANCE * sum(w.numel() for w in weights)


def _cuts(pruned: Any) -> list[str]:
    history = _history(pruned)
    parts = []
    if history and any(cut.plan for cut in history.cuts):
        alt = "Bars for each layer, stacked by cut: units removed, in front of units at the start."
        parts.append(picture(history.plot, alt))
    if history:
        cuts = history.table()
        if any(cut.metrics for cut in history.cuts):
            alt = "The metrics of the validation after each cut, and the parameters and MACs left."
            parts.append(picture(lambda: plot_cuts(cuts), alt))
        parts.append(table(cuts.dropna(axis="columns", how="all"), index=True))
    stayed = pruned.kept() if hasattr(pruned, "kept") else None
    if stayed is not None and len(stayed):
        counted = stayed.groupby(["layer", "reason"], sort=False).size().rename("units")
        parts += ["<h3>What had to stay</h3>", table(counted.reset_index())]
    return [section("Cuts", *parts)]


def _history(pruned: Any) -> History | None:
    history = getattr(pruned, "history", None)
    return history if isinstance(history, History) and len(history) else None


def _further(sensitivity: Any, audit: Any, sweep: Any) -> Sequence[str]:
    parts = []
    if sweep is not None:
        alt = "A metric of the networks of several targets against their costs."
        notes = sweep.table["note"]
        said = [
            paragraph(note if note.startswith(name) else f"{name}: {note}")
            for name, note in notes[notes != ""].items()
        ]
        shown = [picture(sweep.plot, alt), table(sweep.table.drop(columns="note"), True), *said]
        parts.append(section("Several targets", *shown))
    if sensitivity is not None:
        alt = f"A map of the {sensitivity.metric}: layers by the share cut of each alone."
        stay = table(sensitivity.unprunable)
        shown = [picture(sensitivity.plot, alt), table(sensitivity.table, True), stay]
        parts.append(section("Which layers can give", *shown))
    if audit is not None:
        alt = "The change of accuracy of each class over its accuracy before."
        shown = [picture(audit.plot, alt), table(audit.table), table(audit.model, True)]
        parts.append(section("Which classes pay", *shown))
    return parts
