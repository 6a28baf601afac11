"""What a network costs: parameters, multiply-accumulates (MACs), bytes and latency."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.benchmark import Measurement, Timer
from torch.utils.flop_counter import FlopCounterMode

from ..coupling.inputs import Inputs, plainly, run_quietly
from ..coupling.run import run_shapes

__all__ = ["compare", "layer_costs", "macs", "profile", "saved_bytes"]

_ROUNDS = 5


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
) -> pd.DataFrame:
    """Costs of several networks; their timings take turns, so that drift hits all alike.

    Args:
        networks: the networks by name.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs, for all.
        batch_sizes: batches to time, made by repeating the example; default its own size.
        threads: CPU threads; default those torch uses.
        seconds: time spent on each network and batch size.

    Returns:
        A row for each network and batch size: `parameters`, `nonzero` (parameters that are not
        zero), `macs` (of convs and matrix products, for one sample), `bytes` (of the saved
        state dict), `batch`, `latency_ms` (median of a forward in eval mode), `iqr_ms` (its
        interquartile range), `device`, `threads`.
    """
    if not isinstance(networks, Mapping) or not networks:
        raise TypeError(
            f"compare takes networks by name, as in compare({{'dense': model}}, x), "
            f"got {type(networks).__name__}"
        )
    for model in networks.values():
        if not isinstance(model, nn.Module):
            raise TypeError(f"compare takes torch modules, got {type(model).__name__}")
    inputs = Inputs.of(example_inputs, samples=None)
    for model in networks.values():
        Inputs.fitting(model, example_inputs)
    batches = list(batch_sizes or [inputs.samples])
    threads = threads or torch.get_num_threads()
    rows = []
    fixed = {name: _size(model, inputs) for name, model in networks.items()}
    for batch in batches:
        sized = inputs if batch is None else inputs.batch(batch)
        times = _latency(networks, sized, threads, seconds)
        for name in networks:
            spread = {"latency_ms": times[name].median * 1e3, "iqr_ms": times[name].iqr * 1e3}
            device = str(sized.tensors[0].device)
            where = {"device": device, "threads": threads}
            rows.append({"network": name, **fixed[name], "batch": batch, **spread, **where})
    return pd.DataFrame(rows).set_index("network")


def _size(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "nonzero": sum(int(p.count_nonzero()) for p in model.parameters()),
        "macs": macs(model, inputs).get("", pd.NA),
        "bytes": saved_bytes(model),
    }


class _Counter(io.RawIOBase):
    """A file that only knows how much was written into it."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        n = memoryview(data).nbytes
        self.size += n
        return n


def saved_bytes(model: nn.Module) -> int:
    """How large a file `torch.save` makes of the state dict."""
    file = _Counter()
    torch.save(model.state_dict(), file)
    return file.size


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


def macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs for one sample by module name, `''` for the whole network.

    Convs and matrix products are counted, by torch's own counter; a module that runs twice counts
    twice. Empty where that counter cannot run the network, as when it differentiates inside.
    """
    return counted(model, example_inputs)[1]


def counted(model: nn.Module, example_inputs: Any) -> tuple[Inputs, dict[str, int]]:
    """Inputs fitted to the model, and its `macs`, from a single run as a rule."""
    inputs = Inputs.of(example_inputs)
    inputs.check(model)
    found = _count(model, inputs)
    if not found:
        inputs = Inputs.fitting(model, example_inputs)
        found = _count(model, inputs)
    return inputs, found


def _count(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    for shapes in (True, False):  # shapes are enough, unless a network looks at its numbers
        counter = FlopCounterMode(display=False)
        try:
            if shapes:
                run_shapes(model, inputs, counter)
            else:
                with run_quietly(model), plainly(), counter:
                    inputs(model)
            break
        except Exception:  # of the inputs or of the counter; `fitting` can tell
            counter = None
    if counter is None:
        return {}
    root = type(model).__name__
    counts = counter.get_flop_counts()
    samples = inputs.samples or 1
    found = {"": counter.get_total_flops() // 2 // samples}
    for name, _ in model.named_modules():
        if name:
            found[name] = sum(counts.get(f"{root}.{name}", {}).values()) // 2 // samples
    return found


def layer_costs(model: nn.Module, counts: Mapping[str, int]) -> pd.DataFrame:
    """A row for each layer that holds parameters: `layer`, `in`, `out`, `parameters`, `macs`.

    Args:
        model: the network.
        counts: its `macs`.
    """
    rows = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            inside, outside = _widths(module)
            size = sum(p.numel() for p in own)
            rows.append((name, inside, outside, size, counts.get(name, pd.NA)))
    total = (sum(p.numel() for p in model.parameters()), counts.get("", pd.NA))
    rows.append(("total", pd.NA, pd.NA, *total))
    table = pd.DataFrame(rows, columns=["layer", "in", "out", "parameters", "macs"])
    return table.astype({"in": "Int64", "out": "Int64", "macs": "Int64"})


def _widths(module: nn.Module) -> tuple[Any, Any]:
    for inside, outside in (
        ("in_channels", "out_channels"),
        ("in_features", "out_features"),
        ("num_features", "num_features"),
    ):
        if hasattr(module, inside) and hasattr(module, outside):
            return getattr(module, inside), getattr(module, outside)
    return pd.NA, pd.NA
