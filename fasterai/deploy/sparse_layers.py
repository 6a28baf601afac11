"""Layers that multiply with what is not zero alone, on the CPU.

Where a gain begins depends on the machine, the layer and what arrives at it, so it is measured.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import number
from ..core.copies import copied
from ..core.names import unwrapped
from ..coupling.hooks import hooked
from ..coupling.inputs import Inputs, operands_in, run_quietly
from ..coupling.probe import settle
from ..measure.profile import compare
from .compact_layers import CompactLayer, can_be_compact, saving
from .comparison import Comparison, running, still_read

__all__ = ["SparseConv", "SparseLinear", "sparse_linear"]

_LEAST = 0.5  # share of zeros below which sparse matrices are not measured
_LEAST_CHANNELS = 0.05  # the same for what stands in rows and columns of zeros


class _Sparse(nn.Module):
    """A layer for inference with its weight in compressed rows.

    Attributes:
        shape: of the weight, (out, in).
        ends: (out + 1,) int32, where the values of each row begin and end; MKL takes 32 bits as
            they are, and would have to convert 64.
        columns: (n,) int32, in which column each value stands.
        values: (n,).
        bias: (out,) or None.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this layout is in beta
            csr = layer.weight.detach().flatten(1).to_sparse_csr()
        self.shape = tuple(csr.shape)
        self.register_buffer("ends", csr.crow_indices().int())
        self.register_buffer("columns", csr.col_indices().int())
        self.register_buffer("values", csr.values())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.training = layer.training
        self._checked: Any = None

    def _plain(self, x: Tensor) -> Tensor:
        """The input in the type of the weight: autocast knows no sparse kernels."""
        return x.to(self.values.dtype) if torch.is_autocast_enabled("cpu") else x

    @property
    def weight(self) -> Tensor:
        """The sparse matrix, (out, in); it has no storage that could be copied, so it is made.

        Places out of bounds, from a damaged file say, would be read: new ones are checked.
        """
        parts = self.ends, self.columns, self.values
        state = tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in parts[:2])
        new, self._checked = state != self._checked, None
        csr = torch.sparse_csr_tensor(*parts, self.shape, check_invariants=new)
        self._checked = state
        return csr

    def extra_repr(self) -> str:
        out, inside = self.shape
        share = 1 - len(self.values) / (out * inside)
        return f"{inside}, {out}, bias={self.bias is not None}, zeros={share:.0%}"


class SparseLinear(_Sparse):
    """A linear layer that skips zeros.

    Args:
        layer: a linear layer.
        by: 'columns' of the input, which suits batches, or its 'rows'.
    """

    def __init__(self, layer: nn.Linear, by: str = "columns") -> None:
        super().__init__(layer)
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (..., in) to (..., out)."""
        flat = self._plain(x).reshape(-1, x.shape[-1])
        with torch.autocast("cpu", enabled=False):
            if self.by == "rows":
                out = F.linear(flat, self.weight, self.bias)
            else:
                out = (self.weight @ flat.t()).t()
                out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], out.shape[1])


class SparseConv(_Sparse):
    """A conv of 1x1 kernels that skips zeros, one sample after the other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.dims = layer.weight.ndim  # of a batch

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (N, in, *) to (N, out, *), or without N."""
        if x.ndim == self.dims - 1:
            return self(x[None])[0]
        flat, weight = self._plain(x).flatten(2), self.weight
        out = flat.new_empty(len(x), len(weight), flat.shape[2])
        with torch.autocast("cpu", enabled=False):
            for sample, result in zip(flat, out, strict=True):
                if self.bias is None:
                    torch.mm(weight, sample, out=result)
                else:
                    torch.addmm(self.bias[:, None], weight, sample, out=result)
        return out.unflatten(2, x.shape[2:])


def sparse_linear(
    model: nn.Module, example_inputs: Any, *, gain: float = 1.2, seconds: float = 0.1
) -> tuple[nn.Module, pd.DataFrame]:
    """A copy of a network in which layers skip zeros where that was measured to be faster.

    Linear layers and 1x1 convs of which at least half is zero are timed as they are and with
    torch's sparse matrices; these and other convs also as a `CompactLayer`, where whole rows or
    columns are zero and could not be removed. They are timed on inputs of the shapes that the
    example inputs have there, with as many threads as torch uses. The copy is for inference on the
    CPU.

    Args:
        model: a network on the CPU; it is left as it was.
        example_inputs: a batch as it will come: a tensor, a tuple of positional inputs or a dict
            of keyword inputs.
        gain: how many times as fast a layer has to become.
        seconds: time spent on each layer and kind.

    Returns:
        The copy, and a table: `layer`, `zeros` (share), `dense_ms`, `sparse_ms`, `kind` and, where
        the layer stays dense, the `reason`.

    Raises:
        ValueError: the network is not on the CPU or cannot be run on the inputs, or `gain` or
            `seconds` is no number of 0 or more.
    """
    model = unwrapped(model)
    number(gain, "gain")
    number(seconds, "seconds")
    elsewhere = {str(p.device) for p in model.parameters() if p.device.type != "cpu"}
    if elsewhere:
        raise ValueError(
            f"sparse_linear measures kernels of the CPU, the model is on {elsewhere.pop()}: pass "
            f"model.cpu() and inputs there"
        )
    few = Inputs.fitting(model, example_inputs)
    layers = {n: m for n, m in model.named_modules() if _kinds(m)}
    arrived = _arriving(model, Inputs.of(example_inputs, samples=None), layers)
    rows = {name: _measured(layers[name], arrived[name], gain, seconds) for name in layers}
    faster = [name for name, row in rows.items() if not row["reason"]]
    same, ran = Comparison(model, few), running(model, few, faster)
    failed: dict[str, str] = {}

    def attempt(names: Sequence[str]) -> str | None:
        some = {n: rows[n] for n in names}
        why = same.fails(lambda network: _with_sparse(network, some))
        return why or still_read(_with_sparse(model, some), few, ran.intersection(names))

    kept = settle([], faster, attempt, failed)
    for name, why in failed.items():
        rows[name]["reason"] = why
    columns = ["layer", "zeros", "dense_ms", "sparse_ms", "kind", "reason"]
    table = pd.DataFrame([{"layer": n, **row} for n, row in rows.items()], columns=columns)
    return _with_sparse(model, {n: rows[n] for n in kept}).requires_grad_(False), table


def _with_sparse(model: nn.Module, rows: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A copy of a network with the kinds of layers that were found to be faster."""
    changed = copied(model)
    modules = dict(changed.named_modules())
    new = {id(modules[n]): _kinds(modules[n])[row["kind"]](modules[n]) for n, row in rows.items()}
    for parent in modules.values():
        for child, module in parent._modules.items():
            if id(module) in new:
                parent._modules[child] = new[id(module)]
    return new.get(id(changed), changed)


_Kinds = dict[str, Callable[[Any], nn.Module]]


def _kinds(layer: nn.Module) -> _Kinds:
    """The forms that a layer may take, by name."""
    kinds: _Kinds = {}
    if type(layer) is nn.Linear:
        kinds = {"rows": lambda m: SparseLinear(m, "rows"), "columns": SparseLinear}
    elif type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        pointwise = {*layer.kernel_size, *layer.stride, layer.groups} == {1}
        kinds = {"samples": SparseConv} if pointwise and _unpadded(layer) else {}
    return kinds | ({"compact": CompactLayer} if can_be_compact(layer) else {})


def _worthwhile(layer: nn.Module, zeros: float) -> _Kinds:
    """The forms that may be faster with so many zeros, as they are spread."""
    kinds = _kinds(layer)
    compact = kinds.pop("compact", None)
    kinds = kinds if zeros >= _LEAST else {}
    return kinds | ({"compact": compact} if compact and saving(layer) >= _LEAST_CHANNELS else {})


def _unpadded(conv: nn.Module) -> bool:
    return conv.padding in ("valid", "same") or not any(conv.padding)


def _arriving(
    model: nn.Module, inputs: Inputs, layers: Mapping[str, nn.Module]
) -> dict[str, Counter[tuple[Any, ...]]]:
    """Shapes, strides and types that arrive at each layer, and how often each of them does."""
    seen: dict[str, Counter[tuple[Any, ...]]] = {name: Counter() for name in layers}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            x = operands_in((*args, *kwargs.values()))[0]
            strides = torch.empty_like(x, device="meta").stride()
            seen[name][tuple(x.shape), strides, x.dtype] += 1

        return hook

    hooks = (m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in layers.items())
    with hooked(hooks), run_quietly(model):
        inputs(model)
    return seen


def _measured(
    layer: nn.Module, arrived: Counter[tuple[Any, ...]], gain: float, seconds: float
) -> dict[str, Any]:
    """A row of the table."""
    weight = layer.weight.detach()
    zeros = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
    row: dict[str, Any] = {"zeros": zeros, "reason": ""}
    if layer._forward_hooks or layer._forward_pre_hooks:
        return row | {"reason": "hooks are registered on it"}
    kinds = _worthwhile(layer, zeros)
    if not kinds:
        few = f"fewer than {_LEAST:.0%} of its weights are zero"
        return row | {"reason": few if zeros < _LEAST else "too few whole rows or columns are zero"}
    if not arrived:
        return row | {"reason": "it did not run on the example inputs"}
    arrived = Counter({how: n for how, n in arrived.items() if 0 not in how[0]})
    if not arrived:
        return row | {"reason": "only empty tensors arrived at it"}
    chance = torch.Generator().manual_seed(0)
    inputs = [
        (torch.empty_strided(shape, strides, dtype=dtype).normal_(generator=chance), times)
        for (shape, strides, dtype), times in arrived.items()
    ]
    forms, why = {"dense": layer}, ""
    for kind, form in kinds.items():
        try:
            forms[kind] = _seen_to_run(form(layer), [x for x, _ in inputs])
        except RuntimeError as error:  # no kernel for the type, or for this machine
            why = f"torch cannot run it: {error}"
    if len(forms) == 1:
        return row | {"reason": why}
    taken = dict.fromkeys(forms, 0.0)
    for x, times in inputs:
        table = compare(forms, x, seconds=seconds)
        for form, ms in table["latency_ms"].items():
            taken[form] += ms * times
    kind = min(list(forms)[1:], key=taken.__getitem__)
    row |= {"dense_ms": taken["dense"], "sparse_ms": taken[kind], "kind": kind}
    ratio = taken["dense"] / taken[kind]
    return row if ratio >= gain else row | {"reason": f"only {ratio:.2g} times as fast"}


@torch.no_grad()
def _seen_to_run(layer: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    for x in inputs:
        layer(x)
    return layer
