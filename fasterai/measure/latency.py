"""What layers take on this machine, at the widths they may have: a table of measured shapes.

Each conv and matrix product is timed at its widths and at half of them, and between these its time
is near a sum of products of widths; what narrower ones really take is measured when it is asked
for. Other operations are timed once and follow the elements they make. Networks are timed whole, by
turns, in `alternating`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..core.writing import replacing, writable
from ..coupling.inputs import Inputs, map_tensors, operands_in, run_quietly
from ..coupling.units import Axis, Coupling
from .costs import Width, products, widths_seen
from .machine import processor
from .memory import freed_memory_kept

__all__ = ["LatencyTable", "OperationTimes", "alternating", "operation_times"]

_SECONDS = 0.03  # spent on one shape of one operation
_KNOWN: dict[str, float] = {}  # what was measured in this process, for no file
_TURNS = 5, 30  # of networks that are timed by turns, at least and at most
_CERTAIN = 0.02

Terms = list[tuple[float, list[Width]]]


class LatencyTable:
    """Milliseconds of operations by their shapes, measured where they are not known yet.

    Args:
        threads: CPU threads.
        device: where they run.
        file: where they are kept, for this machine and version of torch and others; None for this
            process only.

    Raises:
        ValueError: the file is no such table.
        OSError: no file can be written there.
    """

    def __init__(
        self, threads: int, device: torch.device, file: str | os.PathLike[str] | None = None
    ) -> None:
        self.threads, self.device = threads, device
        self.file = None if file is None else writable(file)
        self._known = _KNOWN if file is None else {}
        self._machine = f"{_processor(device)}, {threads} threads, torch {torch.__version__}"
        if self.file is not None and self.file.exists():
            try:
                known = json.loads(self.file.read_text())
                for operation, ms in known.items():
                    if type(ms) not in (int, float) or not 0 <= ms < math.inf:
                        raise ValueError(f"{operation} takes {ms!r} ms")
                self._known.update({str(k): float(v) for k, v in known.items()})
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"{self.file} is no table of latencies: {error}; delete it, or name another"
                ) from error

    def time(self, func: Any, args: Any) -> float:
        """The milliseconds of one operation; its tensors may be shapes without numbers."""
        described = map_tensors(args, lambda x: [list(x.shape), str(x.dtype)])
        key = json.dumps([str(func), described, self._machine], default=str)
        if key not in self._known:
            real = map_tensors(args, self._numbers)
            with torch.no_grad():
                names = {"func": func, "args": real}
                timer = _timer("func(*args)", names, self.threads, self.device)
                self._known[key] = min(timer.blocked_autorange(min_run_time=_SECONDS).times) * 1e3
        return self._known[key]

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.file is not None:
            with replacing(self.file) as part:
                part.write_text(json.dumps(self._known))

    def _numbers(self, x: Tensor) -> Tensor:
        if x.dtype.is_floating_point:
            return torch.rand(x.shape, dtype=x.dtype, device=self.device)
        return torch.zeros(x.shape, dtype=x.dtype, device=self.device)


@dataclass(frozen=True, eq=False)
class OperationTimes:
    """Milliseconds of a network's operations, one after the other, at the widths it may have.

    Attributes:
        terms: a sum of products of widths that is near them.
        products: how to time a conv or matrix product at other widths, and those that may change.
        others: milliseconds for an element that an operation makes, and its dimensions.
    """

    terms: Terms
    products: list[tuple[Callable[[Sequence[int]], float], list[Width]]]
    others: Terms

    @freed_memory_kept()
    def at(self, removed: Sequence[int]) -> float:
        """The milliseconds once so many bundles of each axis are gone: measured at these widths."""

        def left(width: Width) -> int:
            size, uses = width
            return size - sum(k * removed[a] for a, k in uses)

        convs = sum(timed([left(w) for w in widths]) for timed, widths in self.products)
        return convs + sum(each * math.prod(map(left, shape)) for each, shape in self.others)


@freed_memory_kept()
def operation_times(
    model: nn.Module,
    inputs: Inputs,
    coupling: Coupling,
    axes: Sequence[Axis],
    table: LatencyTable,
) -> OperationTimes:
    """What all operations of a network take, timed one by one.

    Args:
        model: the network; it is left as it was.
        inputs: the batch to time.
        coupling: what is known of its channels.
        axes: its axes.
        table: measures, and remembers.
    """
    calls: list[tuple[Any, Any, tuple[float, list[Width]] | None, list[Width]]] = []

    def see(seen: Callable[[Tensor, int], Width], func: Any, args: Any, out: Any) -> None:
        if any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        ):
            return  # a view
        made = out if isinstance(out, Tensor) else next(iter(operands_in((out,))), None)
        if made is not None and operands_in(args):
            outline = map_tensors(args, lambda x: x if x.is_meta else x.to("meta"))
            shape = [seen(made, d) for d in range(made.ndim)]
            calls.append((func, outline, products(seen, func, args, out), shape))

    widths_seen(model, inputs, coupling, axes, see)
    found = OperationTimes([], [], [])
    for func, args, product, shape in calls:
        if product is None:
            found.others.append((_once(table, func, args) / max(1, _size(shape)), shape))
            continue
        widths = [w for w in product[1] if w[1]]
        found.products.append((_timed(table, func, args, product[1]), widths))
        found.terms.extend(_fitted(*found.products[-1]))
    found.terms.extend(found.others)
    return found


@freed_memory_kept()
def alternating(
    model: nn.Module,
    inputs: Inputs,
    threads: int,
    states: Sequence[Callable[[], AbstractContextManager[Any]]] = (nullcontext,),
    seconds: float = 0.1,
    limit: float = 20.0,
) -> list[float]:
    """Milliseconds of a forward in eval mode, in each of several states of a network.

    Of each turn the quickest forward counts: what else the machine does makes others slower, never
    quicker. For the same reason a single thread on a CPU is timed by the time that it runs. Of the
    turns the median counts, and of all states but the first that of their ratios to it, for what
    lasts longer than a turn makes all of it slower. Turns go on until these medians are known to
    within 2%.

    Args:
        model: the network.
        inputs: the batch.
        threads: CPU threads.
        states: contexts in which it is timed, by turns.
        seconds: spent on each state in a turn.
        limit: begin no turn after so many seconds, but for the first three.
    """
    turns: list[list[float]] = []
    begin = time.monotonic()
    while len(turns) < _TURNS[0] or not _settled(np.array(turns)):
        late = time.monotonic() - begin > limit
        if len(turns) >= 3 and (late or len(turns) == _TURNS[1]):
            break
        turn = []
        for state in states:
            with state(), run_quietly(model):
                copies = inputs.copies()
                names = {"model": model, "args": copies.args, "kwargs": copies.kwargs}
                timer = _timer("model(*args, **kwargs)", names, threads, copies.tensors[0].device)
                turn.append(min(timer.blocked_autorange(min_run_time=seconds).times))
        turns.append(turn)
    first, ratios = np.array(turns)[:, 0], _ratios(np.array(turns))
    return [float(np.median(first) * np.median(r) * 1e3) for r in (np.ones(1), *ratios.T)]


# --- inside --------------------------------------------------------------------------------------


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} {processor()} {torch.backends.cpu.get_cpu_capability()}"


def _timer(code: str, names: dict[str, Any], threads: int, device: torch.device) -> Timer:
    alone = threads == 1 and device.type == "cpu"
    clock = {"timer": time.thread_time} if alone else {}
    return Timer(code, globals=names, num_threads=threads, **clock)


def _ratios(turns: np.ndarray) -> np.ndarray:
    return turns[:, 1:] / turns[:, :1]  # (turns, states - 1)


def _settled(turns: np.ndarray) -> bool:
    """Whether the medians are known well enough: 1.25 standard deviations by sqrt(n), from
    the quartiles of as many normal numbers.
    """
    found = _ratios(turns) if turns.shape[1] > 1 else turns
    low, middle, high = np.quantile(found, (0.25, 0.5, 0.75), axis=0)
    return bool((1.25 * (high - low) / 1.35 / len(turns) ** 0.5 <= _CERTAIN * middle).all())


def _size(shape: Sequence[Width]) -> int:
    return int(np.prod([n for n, _ in shape], dtype=np.int64))


def _once(table: LatencyTable, func: Any, args: Any) -> float:
    try:
        return table.time(func, args)
    except Exception:  # it wants other numbers than random ones
        return 0.0


def _timed(
    table: LatencyTable, func: Any, args: Any, widths: Sequence[Width]
) -> Callable[[Sequence[int]], float]:
    """The time of a product by the sizes of those of its widths that may change."""
    moving = [i for i, w in enumerate(widths) if w[1]]

    def time(sizes: Sequence[int]) -> float:
        whole = [n for n, _ in widths]
        for i, n in zip(moving, sizes, strict=True):
            whole[i] = n
        return table.time(func, _resized(func, args, whole))

    return time


def _resized(func: Any, args: Any, sizes: Sequence[int]) -> Any:
    """The arguments of a conv or matrix product with other widths; see `costs.products`."""
    name = func._schema.name.removeprefix("aten::")
    args = list(args)
    if name == "convolution":
        x, weight, bias, transposed, groups = *args[:3], args[6], args[8]
        first, second = sizes
        if groups > 1 and weight.shape[1] == 1 and not transposed:  # depthwise: groups go
            each = weight.shape[0] // groups
            groups = max(1, first // each)
            first = groups * each
        else:
            first = max(1, first // groups) * groups
        read, made = (first, second * groups) if transposed else (second * groups, first)
        args[0] = x.new_empty((x.shape[0], read, *x.shape[2:]))
        args[1] = weight.new_empty((first, second, *weight.shape[2:]))
        args[2] = None if bias is None else bias.new_empty(made)
        args[8] = groups
        return tuple(args)
    at = 1 if "add" in name else 0
    *lead, m, k, n = sizes
    args[at] = args[at].new_empty((*lead, m, k))
    args[at + 1] = args[at + 1].new_empty((*lead, k, n))
    if at:
        args[0] = args[0].new_empty((n,))
    return tuple(args)


def _fitted(timed: Callable[[Sequence[int]], float], widths: Sequence[Width]) -> Terms:
    """A sum of products of widths, none of them negative, through times at them and at halves."""
    if not widths:
        return [(timed([]), [])]
    whole = [n for n, _ in widths]
    subsets = (
        list(_subsets(range(len(widths)))) if len(widths) < 3 else [(), tuple(range(len(widths)))]
    )
    points = [[n - n // 2 if i in half else n for i, n in enumerate(whole)] for half in subsets]
    times = [timed(p) for p in points]
    features = [
        [float(np.prod([p[i] / whole[i] for i in part])) for part in subsets] for p in points
    ]
    weights = nnls(np.array(features), np.array(times))[0]
    return [
        (float(weight) / float(np.prod([whole[i] for i in part])), [widths[i] for i in part])
        for weight, part in zip(weights, subsets, strict=True)
        if weight > 0
    ]


def _subsets(items: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for n in range(len(items) + 1):
        yield from itertools.combinations(items, n)
