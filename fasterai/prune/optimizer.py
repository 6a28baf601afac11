"""Optimizers that train on after a cut: their state is cut as the parameters were.

An optimizer keeps averages for each element of a parameter. Where elements go, theirs go; the
others stay as they are, with step counts, groups, hyperparameters and marks. The next step then
moves what is left as it would in the full-size network with the other units held at zero.

A cut also multiplies some rows to make good for a factor that follows the width of attention heads.
The gradients of rows that are `c` times as large are `1 / c` times as large from then on: their
averages are divided by `c`, those of their squares by its square. Weights that an optimizer keeps
(lookahead's slow ones) are changed as the parameters are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..core.names import tensors_by_name, unwrapped
from ..coupling.surgery import Step, smaller
from .fitting import cuts_of, steps_of

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["carry_optimizer"]

# What averages are of, for rows that a cut multiplies; others stay as they are.
_GRADIENTS = {"grad_avg", "exp_avg", "exp_inf", "momentum_buffer", "prev"}
_SQUARES = {"sqr_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
_WEIGHTS = {"ax", "slow_weights"}  # averaged SGD, lookahead

_INSIDE = ("opt", "optimizer", "base_optimizer")  # where optimizers keep one that they wrap

_MODELS = WeakIdKeyDictionary()  # the plans of pruners -> the models they were carried out on


def carry_optimizer(optimizer: Any, plan: Plan, model: nn.Module | None = None) -> Any:
    """Cut the state of an optimizer as `plan` cut its parameters, in place; returns it.

    For an optimizer that was not given to `prune_model` itself. What is carried already stays as
    it is.

    ```python
    pruner.prune_model(0.5)
    carry_optimizer(learn.opt, pruner.plan)
    ```

    Args:
        optimizer: fastai's (`learn.opt`), torch's, or one that wraps such.
        plan: what was cut.
        model: the network that was cut; not needed for `pruner.plan`.

    Raises:
        TypeError: not an optimizer, or nobody knows the model.
        ValueError: an optimizer of other parameters, or state that has neither the shape that its
            parameter had nor a single element. Nothing is changed then.
    """
    if plan is None:
        raise TypeError("plan is None: pruner.plan is one once prune_model has cut something")
    if model is None:
        known = _MODELS.get(plan)
        model = known() if known is not None else None
    if model is None:
        raise TypeError(
            "which model this plan has cut is not known (the plan was copied, read or joined, or "
            "its model is gone): pass it, as in carry_optimizer(optimizer, plan, model)"
        )
    carrying(optimizer, plan, model, done=True)()
    return optimizer


def remember(plan: Plan, model: nn.Module) -> None:
    """Note on which model a plan was carried out, as long as there are both."""
    _MODELS[plan] = weakref.ref(model)


@dataclass(frozen=True, eq=False)
class _Change:
    """A tensor in a state that another takes the place of."""

    holder: Any
    key: Any
    before: Tensor
    after: Tensor


def carrying(
    optimizer: Any, plan: Plan, model: nn.Module, *, done: bool = False
) -> Callable[[], None]:
    """Prepare to carry an optimizer over a cut; the function returned does it, whole or not at all.

    All that may fail fails here, with nothing changed.

    Args:
        optimizer: see `carry_optimizer`.
        plan: the cut.
        model: the network.
        done: it was cut already. Else it must be, before the function is called, and gradients are
            carried, too.
    """
    layers = check_optimizer(optimizer, model)
    tensors = tensors_by_name(unwrapped(model))
    changes: list[_Change] = []
    gradients: list[tuple[Tensor, Tensor]] = []
    for name in plan.shapes:
        p = tensors.get(name)
        if not isinstance(p, nn.Parameter):
            continue
        reduced = _Reduced.by(plan, name, type(layers[-1]).__name__)
        for holder, key, what, value in _held(layers, p):
            if done and reduced.cuts and isinstance(value, Tensor) and value.shape == p.shape:
                continue
            after = reduced(what, value)
            if after is not None:
                changes.append(_Change(holder, key, value, after))
        if p.grad is not None and not done:
            gradients.append((p, reduced("grad_avg", p.grad)))
    if done and all(c.before.shape == c.after.shape for c in changes):
        changes = []  # it was carried before
    return lambda: _commit(changes, gradients)


def _commit(changes: Sequence[_Change], gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
    try:
        for c in changes:
            c.holder[c.key] = c.after
        for p, gradient in gradients:
            p.grad = gradient
    except BaseException:  # an interrupt, too; undoing the cut puts gradients back
        for c in changes:
            c.holder[c.key] = c.before
        raise


@dataclass(frozen=True, eq=False)
class _Reduced:
    """What the tensors of one parameter's state become.

    Args:
        name: of the parameter.
        shape: it had before the cut.
        cuts: the positions that stay, by dimension.
        steps: what was done to the parameter itself.
        optimizer: for errors.
    """

    name: str
    shape: tuple[int, ...]
    cuts: Mapping[int, Tensor]
    steps: Sequence[Step]
    optimizer: str

    @classmethod
    def by(cls, plan: Plan, name: str, optimizer: str) -> _Reduced:
        """As a plan says."""
        return cls(name, plan.shapes[name], cuts_of(plan, name), steps_of(plan, name), optimizer)

    def __call__(self, what: str, value: Any) -> Tensor | None:
        """A smaller tensor, or None where the value stays."""
        if not isinstance(value, Tensor):
            if _holds_tensors(value):
                raise ValueError(self._refusal(what, f"is a {type(value).__name__} of tensors"))
            return None
        if value.ndim == 0 or (value.numel() == 1 and any(n != 1 for n in self.shape)):
            return None  # a count
        if not self._fits(value):
            raise ValueError(self._refusal(what, f"has the shape {tuple(value.shape)}"))
        if what in _WEIGHTS:
            return smaller(value, self.cuts, self.steps)
        power = 1 if what in _GRADIENTS else 2 if what in _SQUARES else 0
        steps = [Step(s.value**-power, True) for s in self.steps if s.factor and power]
        return smaller(value, self.cuts, steps)

    def _fits(self, value: Tensor) -> bool:
        """Whether it has an element for each of the parameter's, along what is cut at least."""
        if value.ndim != len(self.shape):
            return False
        sizes = enumerate(zip(value.shape, self.shape, strict=True))
        return all(size == n or (size == 1 and d not in self.cuts) for d, (size, n) in sizes)

    def _refusal(self, what: str, problem: str) -> str:
        return (
            f"{self.optimizer} cannot be carried over the cut: its state {what!r} of {self.name} "
            f"{problem}, the parameter's was {self.shape}; let it start afresh, as in "
            f"learn.fit(..., reset_opt=True), or train with one that keeps a value for each weight"
        )


def check_optimizer(optimizer: Any, model: nn.Module) -> list[Any]:
    """An optimizer of the model, and those it wraps, the innermost last.

    Raises:
        TypeError: not an optimizer.
        ValueError: one of other parameters.
    """
    layers = _layers(optimizer)
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in _groups(layers[-1]) for p in group):
        raise ValueError(
            f"this {type(layers[-1]).__name__} trains none of the model's parameters, but others "
            f"(copies in another precision, or another model's): let it start afresh, as in "
            f"learn.fit(..., reset_opt=True)"
        )
    return layers


def _layers(optimizer: Any) -> list[Any]:
    found: list[Any] = []
    inside = optimizer
    while inside is not None and not any(inside is f for f in found):
        found.append(inside)
        own = _own(inside)
        inside = next((own[name] for name in _INSIDE if own.get(name) is not None), None)
    if not found or not isinstance(_own(found[-1]).get("state"), Mapping):
        got = type(optimizer).__name__
        raise TypeError(f"optimizer must be fastai's (learn.opt) or torch's, got {got}")
    return found


def _own(optimizer: Any) -> Mapping[str, Any]:
    """Its own attributes: wrappers lend those of what they wrap."""
    return getattr(optimizer, "__dict__", {})


def _groups(optimizer: Any) -> list[list[Tensor]]:
    if "param_lists" in _own(optimizer):
        return [list(group) for group in optimizer.param_lists]
    return [list(group["params"]) for group in optimizer.param_groups]


def _held(layers: Sequence[Any], p: Tensor) -> Iterator[tuple[Any, Any, str, Any]]:
    """What an optimizer and those it wraps hold of a parameter: where, by which key; what; it."""
    for layer in layers:
        state = _own(layer).get("state")
        if isinstance(state, Mapping) and p in state:
            yield from ((state[p], k, str(k), value) for k, value in list(state[p].items()))
        slow = _own(layer).get("slow_weights")
        if slow is None:
            continue
        for weights, group in zip(slow, _groups(layers[-1]), strict=True):
            for i, q in enumerate(group):
                if q is p:
                    yield weights, i, "slow_weights", weights[i]


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple | set) and any(_holds_tensors(v) for v in value)
    )
