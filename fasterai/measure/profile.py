"""What a network costs: parameters, multiply-accumulates (MACs), bytes, memory and latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.benchmark import Measurement, Timer

from ..core.checks import number, whole
from ..core.names import must_be_module
from ..coupling.inputs import Inputs, run_quietly
from .counts import counts, filled, macs, numbers_needed
from .memory import freed_memory_kept, peak_bytes
from .sizes import gzip_bytes, saved_bytes, sparse_bytes

__all__ = ["compare", "macs", "profile", "saved_bytes"]

_ROUNDS = 5
_MANY = 0.01  # a share of zeros worth a note: some initialisations make a few


def profile(model: nn.Module, example_inputs: Any, **timing: Any) -> pd.DataFrame:
    """One network's costs, a row for each batch size; see `compare` for columns and arguments."""
    return compare({type(model).__name__: model}, example_inputs, **timing)


def compare(
    networks: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = None,
    threads: int | None = None,
    seconds: float = 0.5,
    files: bool = False,
) -> pd.DataFrame:
    """Costs of several networks; their timings take turns, so that drift hits all alike.

    Zeros that were not removed are told as what they are: `nonzero` and `nonzero_macs` are smaller,
    `macs`, `bytes` and `latency_ms` are not, and `note` says so.

    Args:
        networks: the networks by name.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs, for all.
        batch_sizes: batches to time, made by repeating the example; default its own size.
        threads: CPU threads; default those torch uses.
        seconds: time spent on each network and batch size.
        files: also `gzip_bytes` and `sparse_bytes`; some seconds for 100 MB.

    Returns:
        A row for each network and batch size, on the device and in the precision it is in:

        - `parameters`, `nonzero`: how many there are, and how many of them are not zero.
        - `macs`, `nonzero_macs`: of convs and matrix products, for one sample; those of them whose
          weight is not zero.
        - `bytes`: of the saved state dict; `gzip_bytes`: of it under gzip; `sparse_bytes`: of the
          file that `save_sparse` writes.
        - `batch`, `latency_ms`, `iqr_ms`: the median time of a forward in eval mode and its
          interquartile range, GPUs synchronised and freed memory kept, as an inference server
          does (see `freed_memory_kept`); `samples_per_s`.
        - `peak_bytes`: the most that activations take at once in that forward; see `peak_bytes`.
        - `device`, `dtype` of the parameters, `threads`.
        - `uncounted`: operations that may multiply and that `macs` leaves out, by name.
        - `note`: what is easily misread.

        What could not be found out is `<NA>`.
    """
    if not isinstance(networks, Mapping) or not networks:
        raise TypeError(
            f"compare takes networks by name, as in compare({{'dense': model}}, x), "
            f"got {type(networks).__name__}"
        )
    for model in networks.values():
        must_be_module(model)
    number(seconds, "seconds")
    inputs = Inputs.of(example_inputs, samples=None)
    for model in networks.values():
        Inputs.fitting(model, example_inputs)
        numbers_needed(model)
    if isinstance(batch_sizes, Integral):
        raise TypeError(f"batch_sizes are several, as in [1, 16], got {batch_sizes}")
    batches = list(batch_sizes or [inputs.samples])
    sized = {batch: inputs if batch is None else inputs.batch(batch) for batch in batches}
    threads = torch.get_num_threads() if threads is None else whole(threads, "threads", 1)
    rows = []
    fixed = {name: _size(model, inputs, files) for name, model in networks.items()}
    for batch in batches:
        now = sized[batch]
        peaks = {name: peak_bytes(model, now) for name, model in networks.items()}
        times = _latency(networks, now, threads, seconds)
        for name, model in networks.items():
            first, last = fixed[name]
            where = {"device": str(now.tensors[0].device), "dtype": _dtype(model, now)}
            timed = _timed(times[name], batch) | {"peak_bytes": _or_na(peaks[name])}
            row = {"network": name, **first, "batch": batch, **timed, **where}
            rows.append(row | {"threads": threads} | last)
    return pd.DataFrame(rows).set_index("network")


def _timed(measured: Measurement, batch: int | None) -> dict[str, Any]:
    rate = pd.NA if batch is None else batch / measured.median
    spread = {"latency_ms": measured.median * 1e3, "iqr_ms": measured.iqr * 1e3}
    return spread | {"samples_per_s": rate}


def _size(model: nn.Module, inputs: Inputs, files: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last columns of a network's rows."""
    found = counts(model, inputs)
    size = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "nonzero": sum(map(filled, model.parameters())),
        "macs": found.macs.get("", pd.NA),
        "nonzero_macs": found.nonzero.get("", pd.NA),
        "bytes": saved_bytes(model),
    }
    if files:
        size |= {"gzip_bytes": gzip_bytes(model), "sparse_bytes": _or_na(sparse_bytes(model))}
    return size, {"uncounted": found.uncounted, "note": _note(model)}


def _note(model: nn.Module) -> str:
    weights = [p for p in model.parameters() if p.ndim > 1]
    total = sum(p.numel() for p in weights)
    zeros = total - sum(map(filled, weights))
    if zeros < _MANY * total or not total:
        return ""
    return (
        f"{zeros / total:.0%} of the weights are zero, which saves no time and no bytes until they "
        f"are removed"
    )


def _dtype(model: nn.Module, inputs: Inputs) -> str:
    """The types of the parameters, or of the inputs where there are none."""
    tensors = [p for p in model.parameters() if p.is_floating_point()] or inputs.tensors
    return ", ".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in tensors))


def _or_na(number: int | None) -> Any:
    return pd.NA if number is None else number


@freed_memory_kept()
def _latency(
    networks: Mapping[str, nn.Module], inputs: Inputs, threads: int, seconds: float
) -> dict[str, Measurement]:
    taken: dict[str, list[Measurement]] = {name: [] for name in networks}
    for _ in range(_ROUNDS):
        for name, model in networks.items():
            with run_quietly(model):
                copies = inputs.copies()  # a forward may write into them
                names = {"model": model, "args": copies.args, "kwargs": copies.kwargs}
                timer = Timer("model(*args, **kwargs)", globals=names, num_threads=threads)
                taken[name].append(timer.blocked_autorange(min_run_time=seconds / _ROUNDS))
    return {name: Measurement.merge(runs)[0] for name, runs in taken.items()}
