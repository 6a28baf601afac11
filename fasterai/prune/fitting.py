"""Where a plan meets a network: does it fit, and what is to be done to which object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.names import first_names, modules_by_name, raw_tensors, tensors_by_name
from ..coupling.labels import Dim
from ..coupling.mending import sizes_in
from ..coupling.norms import from_values, remembered
from ..coupling.surgery import Cut, Step
from .runs import from_runs

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["cut_for", "cuts_of", "fits_in", "must_lead_to", "steps_of"]


def cut_for(plan: Plan, network: nn.Module, *, constants: bool = True) -> Cut:
    """How to carry out a plan on a network.

    Raises:
        ValueError: the network is another one, or was cut already.
    """
    problem = next(_unfit(plan, network), None)
    if problem is not None:
        raise ValueError(
            f"the plan does not fit the model: {problem}. It fits models that are built like the "
            f"one it was made for, and not pruned yet"
        )
    raw = first_names(raw_tensors(network))
    names = {name: raw[id(tensor)] for name, tensor in tensors_by_name(network).items()}
    kept = {
        Dim(names[name], d): index for name in plan.kept for d, index in cuts_of(plan, name).items()
    }
    steps = {
        names[name]: [step for step in steps_of(plan, name) if step.factor or constants]
        for name in plan.adjusted
    }
    return Cut(kept, (), steps, _attributes(plan, network))


def cuts_of(plan: Plan, name: str) -> dict[int, Tensor]:
    """The positions of a parameter or buffer that stay, by dimension."""
    kept = plan.kept.get(name, {})
    return {d: torch.from_numpy(np.array(index, dtype=np.int64)) for d, index in kept.items()}


def steps_of(plan: Plan, name: str) -> list[Step]:
    """What is done to the numbers that a cut leaves of a parameter or buffer."""
    adjusted = plan.adjusted.get(name, ())
    return [Step(from_runs(a.runs, plan.shape_after(name), a.factor), a.factor) for a in adjusted]


def _attributes(plan: Plan, network: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """The integers that modules get, and what makes norms remember their width."""
    attributes: dict[nn.Module, dict[str, Any]] = {}
    modules = modules_by_name(network)
    for name, integers in plan.integers.items():
        own = attributes.setdefault(modules[name], {})
        for attribute, (_, after) in integers.items():
            several = isinstance(after, tuple)
            own[attribute] = type(vars(modules[name])[attribute])(after) if several else after
    for name, values in plan.norms.items():
        attributes.setdefault(modules[name], {}).update(from_values(modules[name], values))
    return attributes


def must_lead_to(plan: Plan, network: nn.Module) -> None:
    """Check that a network is one that a plan leads to.

    Raises:
        ValueError: shapes, integers or norms are others.
    """
    for what, expected, got in _ends(plan, network):
        if expected != got:
            raise ValueError(
                f"the plan leads to {what} {expected}, the model has {got}: pass the plan of all "
                f"that was cut since the model was dense, as in pruner.whole_plan"
            )


def _ends(plan: Plan, network: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """What a plan leads to: (what it is, what the plan makes it, what it is in the network)."""
    tensors, modules = tensors_by_name(network), modules_by_name(network)
    for name in plan.shapes:
        shape = tuple(tensors[name].shape) if name in tensors else None
        yield f"{name!r} of shape", plan.shape_after(name), shape
    for name, integers in plan.integers.items():
        known = sizes_in(modules[name]) if name in modules else {}
        for attribute, (_, after) in integers.items():
            yield f"{name}.{attribute}", after, known.get(attribute)
    for name, module in modules.items():
        planned, now = plan.norms.get(name), remembered(module)
        if now is None and planned is not None and "class" not in planned:
            now = {eps: getattr(module, eps, None) for eps in planned}
        yield f"a norm {name!r} that remembers", planned, now


def _unfit(plan: Plan, network: nn.Module) -> Iterator[str]:
    """What keeps a plan from fitting a network."""
    tensors, modules = tensors_by_name(network), modules_by_name(network)
    for name, shape in plan.shapes.items():
        if name not in tensors:
            yield f"it cuts {name!r}, which the model does not have"
        elif (now := tuple(tensors[name].shape)) != shape:
            later = "; other cuts came before this plan: apply theirs first"
            yield f"{name!r} should be {shape}, it is {now}{later if fits_in(shape, now) else ''}"
    for name in {**plan.integers, **plan.norms}:
        if name not in modules:
            yield f"it changes {name!r}, which the model does not have"
    for name, integers in plan.integers.items():
        known = sizes_in(modules[name])
        for attribute, (before, _) in integers.items():
            if attribute not in known:
                yield f"{name!r} has no size {attribute!r}"
            elif known[attribute] != before:
                yield f"{name}.{attribute} should be {before}, it is {known[attribute]}"
    for name, values in plan.norms.items():
        try:
            from_values(modules[name], values)
        except ValueError as error:
            yield f"{name!r} cannot remember its width: {error}"


def fits_in(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a shape is another one, or smaller."""
    return len(shape) == len(whole) and all(
        min(b, 1) <= a <= b for a, b in zip(shape, whole, strict=True)
    )
