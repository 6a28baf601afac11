"""What each layer of a network costs: parameters, MACs, milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..core.checks import number, whole
from ..core.names import unwrapped
from ..coupling.hooks import hooked
from ..coupling.inputs import Inputs, run_quietly
from .counts import Counts, counts, filled, numbers_needed

__all__ = ["compare_layers", "profile_layers"]

_ROUNDS = 5
_REST, _TOTAL = "rest.", "total."  # with a dot, as no layer's name ends


def profile_layers(
    model: nn.Module, example_inputs: Any, *, threads: int | None = None, seconds: float = 0.5
) -> pd.DataFrame:
    """What each layer costs, one network; see `compare_layers` for arguments and rows.

    Returns:
        `layer`, `type`, `parameters`, `nonzero`, `macs`, `nonzero_macs` (for one sample), `ms`.
    """
    number(seconds, "seconds")
    model = unwrapped(model)
    inputs = _inputs([model], example_inputs)
    times = _times([model], inputs, threads, seconds)[0]
    return _shown(_table(model, counts(model, inputs), times))


def compare_layers(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any,
    *,
    threads: int | None = None,
    seconds: float = 0.5,
) -> pd.DataFrame:
    """What each layer costs in two networks; their timings take turns, so that drift hits both.

    A layer's time is that of its forward in eval mode, less what layers inside of it take: the
    median over runs of the batch, GPUs synchronised before and after each layer. Rows are the
    modules that have parameters or no children, in the order of the first network. One whose
    forward is not called, since its parent reads the weights (as in attention), has no time.
    'rest' is what happens between them: sums, functions, the hooks that look at the clock. 'total'
    adds all up; `compare` tells what a forward takes without hooks. Of a compiled network it is the
    one inside that is timed, for compiling makes one of many layers.

    Args:
        before: a network.
        after: the same network once it was pruned, say; its layers go by the same names.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs: the batch.
        threads: CPU threads; default those torch uses.
        seconds: time spent on each network.

    Returns:
        `layer`, `type`, and `_before` and `_after` each: `params`, `nonzero`, `macs`,
        `nonzero_macs` (for one sample), `ms`. `<NA>` where a network has no such layer.
    """
    number(seconds, "seconds")
    models = [unwrapped(before), unwrapped(after)]
    inputs = _inputs(models, example_inputs)
    times = _times(models, inputs, threads, seconds)
    tables = [
        _table(m, counts(m, inputs), t).rename(columns={"parameters": "params"})
        for m, t in zip(models, times, strict=True)
    ]
    first, second = tables
    names = [n for n in first.index if n not in (_REST, _TOTAL)]
    names += [n for n in second.index if n not in first.index]
    first, second = (t.reindex([*names, _REST, _TOTAL]) for t in tables)
    table = pd.DataFrame({"type": first["type"].fillna(second["type"])})
    for column in first.columns[1:]:
        table[f"{column}_before"], table[f"{column}_after"] = first[column], second[column]
    return _shown(table)


def layer_costs(model: nn.Module, counts: Mapping[str, int]) -> pd.DataFrame:
    """A row for each layer that holds parameters: `layer`, `in`, `out`, `parameters`, `macs`.

    Args:
        model: the network.
        counts: its `macs`.
    """
    layers = {
        name: (module, own)
        for name, module in model.named_modules()
        if (own := list(module.parameters(recurse=False)))
    }
    macs = _own(counts, list(layers))
    rows = []
    for name, (module, own) in layers.items():
        inside, outside = _widths(module)
        rows.append((name, inside, outside, sum(p.numel() for p in own), macs[name]))
    total = (sum(p.numel() for p in model.parameters()), counts.get("", pd.NA))
    rows.append(("total", pd.NA, pd.NA, *total))
    table = pd.DataFrame(rows, columns=["layer", "in", "out", "parameters", "macs"])
    return table.astype({"in": "Int64", "out": "Int64", "macs": "Int64"})


def _widths(module: nn.Module) -> tuple[Any, Any]:
    for inside, outside in (
        ("in_channels", "out_channels"),
        ("in_features", "out_features"),
        ("num_features", "num_features"),
        ("input_size", "hidden_size"),
        ("num_embeddings", "embedding_dim"),
    ):
        if hasattr(module, inside) and hasattr(module, outside):
            return getattr(module, inside), getattr(module, outside)
    return pd.NA, pd.NA


# --- inside --------------------------------------------------------------------------------------


def _inputs(models: Sequence[nn.Module], example_inputs: Any) -> Inputs:
    for model in models:
        Inputs.fitting(model, example_inputs)
        numbers_needed(model)
    return Inputs.of(example_inputs, samples=None)


def _rows(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold parameters or no others."""
    return {
        name or type(model).__name__: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        or next(module.children(), None) is None
    }


def _table(model: nn.Module, known: Counts, times: Mapping[str, float]) -> pd.DataFrame:
    modules = _rows(model)
    keys = {name: "" if module is model else name for name, module in modules.items()}
    macs, nonzero = (_own(found, list(keys.values())) for found in (known.macs, known.nonzero))
    rows: list[tuple[Any, ...]] = []
    for name, module in modules.items():
        own = _numbers(list(module.parameters(recurse=False)))
        products = macs[keys[name]], nonzero[keys[name]]
        rows.append((name, type(module).__name__, *own, *products, times.get(name)))
    rows.append((_REST, "", pd.NA, pd.NA, pd.NA, pd.NA, times[_REST]))
    products = known.macs.get("", pd.NA), known.nonzero.get("", pd.NA)
    whole = _numbers(list(model.parameters()))
    rows.append((_TOTAL, type(model).__name__, *whole, *products, times[_TOTAL]))
    numbers = ["parameters", "nonzero", "macs", "nonzero_macs"]
    table = pd.DataFrame(rows, columns=["layer", "type", *numbers, "ms"])
    return table.astype(dict.fromkeys(numbers, "Int64")).set_index("layer")


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its layers as a column, and the last two rows under the names they go by."""
    return table.rename(index={_REST: "rest", _TOTAL: "total"}).reset_index()


def _own(found: Mapping[str, int], names: Sequence[str]) -> dict[str, Any]:
    """What is counted in each of these modules, without those of them that are inside of it."""
    if not found:
        return dict.fromkeys(names, pd.NA)
    own = {name: found[name] for name in names}
    for name in names:
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            if parent in own:
                own[parent] -= found[name]
                break
    return own


def _numbers(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    return sum(p.numel() for p in parameters), sum(map(filled, parameters))


def _times(
    models: Sequence[nn.Module], inputs: Inputs, threads: int | None, seconds: float
) -> list[dict[str, float]]:
    """Milliseconds by layer of each network: the medians over runs, which take turns."""
    runs: list[list[dict[str, float]]] = [[] for _ in models]
    with _threads(threads):
        for turn in range(_ROUNDS + 1):
            for model, taken in zip(models, runs, strict=True):
                some = list(_timed(model, inputs, seconds / _ROUNDS if turn else 0.0))
                taken += some if turn else []  # the first turn warms up
    medians = [dict(pd.DataFrame(taken).median()) for taken in runs]
    return [found | {_TOTAL: sum(found.values())} for found in medians]


def _timed(model: nn.Module, inputs: Inputs, seconds: float) -> Iterator[dict[str, float]]:
    """Runs the network for so long, at least once, with a clock around each layer."""
    copies = inputs.copies()
    clock = _Clock(_now(copies.tensors[0].device))
    end = time.perf_counter() + seconds
    with run_quietly(model), hooked(clock.hooks(_rows(model))):
        while True:
            yield clock.run(lambda: model(*copies.args, **copies.kwargs))
            if time.perf_counter() >= end:
                break


class _Clock:
    """Milliseconds by layer in one run, each without those inside of it.

    Args:
        now: tells the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.taken: dict[str, float] = {}
        self.open: list[list[float]] = []

    def hooks(self, layers: Mapping[str, nn.Module]) -> Iterator[RemovableHandle]:
        """Puts hooks before and after each layer."""
        for name, layer in layers.items():
            yield layer.register_forward_pre_hook(self._before)
            yield layer.register_forward_hook(partial(self._after, name), always_call=True)

    def _before(self, *_: Any) -> None:
        self.open.append([self.now(), 0.0])  # since when, and what layers inside took

    def _after(self, name: str, *_: Any) -> None:
        started, inside = self.open.pop()
        took = self.now() - started
        self.taken[name] = self.taken.get(name, 0.0) + (took - inside) * 1e3
        if self.open:
            self.open[-1][1] += took

    def run(self, forward: Callable[[], Any]) -> dict[str, float]:
        """The times of one run."""
        self.taken, self.open = {}, []
        started = self.now()
        forward()
        total = (self.now() - started) * 1e3
        return self.taken | {_REST: total - sum(self.taken.values())}


def _now(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if threads is None else whole(threads, "threads", 1))
        yield
    finally:
        torch.set_num_threads(before)
