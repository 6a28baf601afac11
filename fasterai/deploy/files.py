"""Pruned networks as safetensors files: the tensors, and the plan that shrinks a dense network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core.names import first_names, modules_by_name, raw_tensors, tensors_by_name, unwrapped
from ..core.writing import digest, holds, replacing, writable
from ..coupling.norms import remembered
from ..coupling.surgery import Cut, cut
from ..prune.fitting import cut_for, fits_in, must_lead_to
from ..prune.plan import Plan
from ..prune.plan_json import parse
from .widths import attributes_by_shape

__all__ = ["PrunedFileError", "load_pruned", "read_plan", "save_pruned"]

_FORMAT = "1"
_Path = str | os.PathLike[str]


class PrunedFileError(ValueError):
    """A file that is damaged, foreign or does not fit; no model was changed."""


def save_pruned(model: nn.Module, file: _Path, plan: Plan | None = None) -> None:
    """Write a pruned network to a safetensors file, with the plan that shrinks a dense one to it.

    The tensors are those of the state dict, each once, under the names of the network itself
    (without `_orig_mod.` or `module.`). A file of that name is replaced when all is written.

    Args:
        model: the network.
        file: where to.
        plan: all that was cut since the network was dense: `pruner.whole_plan`; of several
            pruners, `first.whole_plan.then(second.whole_plan)`. Without it `load_pruned` has
            nothing but shapes to go by, which do not tell the heads of attention.

    Raises:
        ValueError: the plan does not lead to this model, or safetensors cannot hold it.
        OSError: no file can be written there.
    """
    network, file = unwrapped(model), writable(file)
    if plan is None:
        _must_be_told_by_shapes(network)
    else:
        _must_be_whole(plan, network)
    tensors = _to_store(network)
    orders = {n: order for n, x in tensors.items() if (order := _order(x)) != list(range(x.ndim))}
    about = {"format": "pt", "fasterai": _FORMAT, "orders": json.dumps(orders)}
    if plan is not None:
        about["plan"] = plan.to_json()
    tensors = {n: torch.empty(x.shape, dtype=x.dtype).copy_(x) for n, x in tensors.items()}
    about["digest"] = digest(tensors, about)
    with replacing(file) as part:
        save_file(tensors, part, about)


def load_pruned(model: nn.Module, file: _Path) -> nn.Module:
    """Shrink a freshly built dense network to what `save_pruned` wrote, in place, and return it.

    It gets the plan's widths, or without a plan those that the shapes tell, and then the saved
    numbers: it computes bit for bit what the saved one did. Parameters stay the same objects, on
    their device; an optimizer must be made anew. Nothing in a file can run code: it changes
    tensors, known integers of modules, and norms into ones that remember their width.

    Args:
        model: built as the saved one was, before it was pruned; with its dtype.
        file: what `save_pruned` wrote.

    Raises:
        PrunedFileError: the file is damaged, not from `save_pruned`, or of another architecture,
            or the model was pruned already. The model is as it was.
    """
    if isinstance(model, str | os.PathLike):
        raise TypeError("the model comes first, as in load_pruned(model, 'pruned.safetensors')")
    network = unwrapped(model)
    _must_be_ready(network)
    content = _read(file)
    try:
        targets = _targets(network, content)
        how = _shrinking(network, content, targets)
        raw = first_names(raw_tensors(network))
        data = {raw[id(x)]: _placed(content, name, like=x) for name, x in targets.items()}
        cut(network, how, data)
    except ValueError as error:
        raise PrunedFileError(f"{os.fspath(file)} was not loaded: {error}") from error
    network.zero_grad(set_to_none=True)
    return model


def read_plan(file: _Path) -> Plan | None:
    """The plan in a file that `save_pruned` wrote; None where it was given none.

    Raises:
        PrunedFileError: the file is damaged, or not from `save_pruned`.
    """
    return _read(file).plan


# --- what is in a file -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Content:
    """A file's tensors (mapped, not read), the order of their dimensions in memory, the plan."""

    tensors: Mapping[str, Tensor]
    orders: Mapping[str, Sequence[int]]
    plan: Plan | None


def _read(file: _Path) -> _Content:
    path = Path(file)
    if path.exists() and not path.is_file():
        raise PrunedFileError(f"{path} is no file")
    try:
        with safe_open(path, framework="pt") as opened:
            about = opened.metadata() or {}
            if "fasterai" not in about:
                raise ValueError("save_pruned did not write it")
            if about["fasterai"] != _FORMAT:
                got = short(about["fasterai"])
                raise ValueError(f"its format is {got}, this fasterai reads {_FORMAT!r}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if about.get("digest") != digest(tensors, about):
            raise ValueError("what is in it has changed since it was written")
        orders = _orders(parse(about.get("orders", "{}")), tensors)
        plan = Plan.from_json(about["plan"]) if "plan" in about else None
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise PrunedFileError(f"{path} is damaged or foreign: {error}") from error
    return _Content(tensors, orders, plan)


def _orders(orders: Any, tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    if not isinstance(orders, dict) or not orders.keys() <= tensors.keys():
        raise ValueError("its orders of dimensions are not of its tensors")
    for name, order in orders.items():
        whole = isinstance(order, list) and all(type(d) is int for d in order)
        if not whole or sorted(order) != list(range(tensors[name].ndim)):
            raise ValueError(f"{name!r} has no such order of dimensions")
    return orders


# --- writing -----------------------------------------------------------------------------------


def _must_be_whole(plan: Plan, network: nn.Module) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan or None, got {type(plan).__name__}")
    if plan.follows:
        raise ValueError(
            f"the plan starts from a network that had been cut {plan.follows} times: pass that of "
            f"all cuts, pruner.whole_plan"
        )
    must_lead_to(plan, network)


def _must_be_told_by_shapes(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if remembered(module) is not None:
            raise ValueError(
                f"{name!r} remembers a width that shapes do not tell: pass the plan, as in "
                f"save_pruned(model, file, pruner.whole_plan)"
            )


def _must_be_ready(network: nn.Module) -> None:
    for name, x in tensors_by_name(network).items():
        if is_lazy(x):
            raise ValueError(f"{name!r} is lazy: run the model once on a batch first")
        if x.is_meta:
            raise ValueError(f"{name!r} is on the meta device: model.to_empty(device='cpu') first")


def _stored(network: nn.Module) -> dict[str, Tensor]:
    """What the state dict of a network holds, tied tensors under each of their names."""
    left_out = {
        f"{name}.{buffer}" if name else buffer
        for name, module in modules_by_name(network).items()
        for buffer in module._non_persistent_buffers_set
    }
    return {n: x for n, x in tensors_by_name(network).items() if n not in left_out}


def _to_store(network: nn.Module) -> dict[str, Tensor]:
    """The state as plain tensors, each once.

    Raises:
        ValueError: safetensors cannot hold it.
    """
    for name, module in network.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{name!r} keeps extra state, which is no tensor")
    _must_be_ready(network)
    stored = _stored(network)
    found = {name: stored[name] for name in sorted(first_names(stored).values())}
    for name, x in found.items():
        if is_traceable_wrapper_subclass(x) or x.layout != torch.strided or not holds(x.dtype):
            kind = f"{type(x).__name__}, {x.layout}, {x.dtype}"
            raise ValueError(f"safetensors cannot hold {name!r} ({kind})")
    return {name: x.detach().as_subclass(Tensor) for name, x in found.items()}


def _order(x: Tensor) -> list[int]:
    """The dimensions of a tensor as they lie in memory, the widest steps first."""
    return sorted(range(x.ndim), key=lambda d: -x.stride(d))


# --- loading -----------------------------------------------------------------------------------


def _targets(network: nn.Module, content: _Content) -> dict[str, Tensor]:
    """For each tensor of a file that of the network which it belongs to."""
    stored = _stored(network)
    strange = sorted(content.tensors.keys() - stored.keys())
    if strange:
        raise ValueError(f"the model has no {_some(strange)}")
    targets = {name: stored[name] for name in content.tensors}
    if len(first_names(targets)) < len(targets):
        names = first_names(targets)
        tied = next(n for n, x in targets.items() if names[id(x)] != n)
        raise ValueError(f"{tied!r} is tied to {names[id(targets[tied])]!r} in the model alone")
    there = {id(x) for x in targets.values()}
    missing = [n for n in first_names(stored).values() if id(stored[n]) not in there]
    if missing:
        raise ValueError(f"it holds no {_some(sorted(missing))}")
    for name, x in targets.items():
        dtype = content.tensors[name].dtype
        if dtype != x.dtype:
            raise ValueError(f"it holds {name!r} as {dtype}, the model has {x.dtype}")
    return targets


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(short, names[:3])) + more


def _shrinking(network: nn.Module, content: _Content, targets: Mapping[str, Tensor]) -> Cut:
    """How the network becomes what the file holds."""
    shapes = {name: tuple(x.shape) for name, x in content.tensors.items()}
    if content.plan is None:
        for name, x in targets.items():
            if not fits_in(shapes[name], x.shape):
                raise ValueError(_other_shape(name, shapes[name], tuple(x.shape)))
        return Cut({}, attributes=attributes_by_shape(network, shapes))
    how = cut_for(content.plan, network)
    plan, names = content.plan, first_names(tensors_by_name(network))
    for name, x in targets.items():
        known = names[id(x)]
        after = plan.shape_after(known) if known in plan.shapes else tuple(x.shape)
        if shapes[name] != after:
            raise ValueError(_other_shape(name, shapes[name], after))
    return how


def _other_shape(name: str, got: Sequence[int], expected: Sequence[int]) -> str:
    return (
        f"it holds {name!r} of shape {got}, for the model {expected} was expected: it is built "
        f"otherwise, or was pruned already"
    )


def _placed(content: _Content, name: str, like: Tensor) -> Tensor:
    """A file's tensor on the device of another, in the memory layout of the saved one.

    One that was saved in the usual layout takes that of the other, such as channels_last.
    """
    x = content.tensors[name]
    order = content.orders.get(name) or _order(like)
    back = sorted(range(x.ndim), key=order.__getitem__)
    empty = torch.empty([x.shape[d] for d in order], dtype=x.dtype, device=like.device)
    return empty.permute(back).copy_(x)
