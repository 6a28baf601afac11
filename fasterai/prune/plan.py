"""A plan: a cut as a value, by names instead of objects, so that it can be repeated and stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..core.names import first_names, modules_by_name, raw_tensors, tensors_by_name, unwrapped
from ..coupling.mending import Size, sizes_in
from ..coupling.norms import as_values
from ..coupling.probe import Removal
from ..coupling.surgery import Cut, cut, positions_by_name, selected, shadowed
from ..coupling.units import Axis
from .fitting import cut_for, cuts_of
from .optimizer import carrying
from .plan_json import decode, encode
from .runs import Runs, as_runs, from_runs

__all__ = ["Adjustment", "AxisCut", "Plan"]


@dataclass(frozen=True)
class AxisCut:
    """How many units of an axis there were and are; `name` is the layer that produces them."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Adjustment:
    """Numbers that change what is left of a tensor.

    Args:
        factor: elements are multiplied with them; else they are added: a folded constant.
        runs: (start, length, number) of elements in a row, counted in the tensor once it is cut;
            what lies in none stays.
    """

    factor: bool
    runs: Runs


@dataclass(frozen=True)
class Plan:
    """What a cut does to a network: a value, equal to what `from_json(to_json())` gives.

    Names are those of the network itself, without what `torch.compile` or
    DistributedDataParallel put before them.

    Args:
        kept: parameter or buffer name -> dimension -> the positions that stay, ascending.
        axes: the widths, one entry for each axis of the network.
        parameters_before: parameters of the network as it was.
        parameters_after: parameters of the network once cut.
        shapes: parameter or buffer name -> its shape before, of all that the cut changes.
        integers: module name -> attribute -> its value before and after.
        norms: module name -> what makes a norm remember its width; see `coupling.norms`.
        adjusted: parameter or buffer name -> folded constants and factors, one after the other.
        follows: how many cuts the same pruner made before it; see `then`.
    """

    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    axes: tuple[AxisCut, ...]
    parameters_before: int
    parameters_after: int
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    integers: Mapping[str, Mapping[str, tuple[Size, Size]]] = field(default_factory=dict)
    norms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adjusted: Mapping[str, tuple[Adjustment, ...]] = field(default_factory=dict)
    follows: int = 0

    @property
    def removed(self) -> int:
        """How many units go."""
        return sum(a.before - a.after for a in self.axes)

    def shape_after(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter or buffer that the cut changes, once it is cut."""
        return _left(self.shapes[name], self.kept.get(name, {}))

    def apply(
        self, model: nn.Module, *, constants: bool = True, optimizer: Any = None
    ) -> nn.Module:
        """Repeat the cut on another model, in place, and return it: all of it, or nothing.

        The model is built like the one the plan was made for and not cut yet: its copy, an
        average of its weights, a teacher, a fresh one. Its weights may differ: what stays is
        told by positions. Folded constants are numbers of the first model: what its removed
        channels added to the next layers. For a copy they are right and for an average of
        weights about right; where the removed channels do something else, pass
        `constants=False`, or train on.

        Args:
            model: the other model.
            constants: add what was folded.
            optimizer: the other model's, whose state is cut with it, as are the gradients then;
                else gradients go, and it needs `carry_optimizer`.

        Raises:
            ValueError: names, shapes or integers are not those the plan expects; the model is as
                it was.
        """
        network = unwrapped(model)
        how = cut_for(self, network, constants=constants)
        carry = None if optimizer is None else carrying(optimizer, self, network)
        undo = cut(network, how)
        try:
            if carry is not None:
                carry()
        except BaseException:  # an interrupt, too
            undo()
            raise
        if carry is None and self.removed:
            network.zero_grad(set_to_none=True)
        return model

    def then(self, other: Plan) -> Plan:
        """One plan for this cut and another one after it.

        Raises:
            ValueError: the other plan does not start where this one ends.
        """
        self._must_lead_to(other)
        names = {**self.shapes, **other.shapes}
        return Plan(
            {n: kept for n in names if (kept := _kept_by_both(self.kept, other.kept, n))},
            _axes_of_both(self.axes, other.axes),
            self.parameters_before,
            other.parameters_after,
            {n: self.shapes.get(n, shape) for n, shape in names.items()},
            {
                n: _integers_of_both(self.integers.get(n, {}), other.integers.get(n, {}))
                for n in {**self.integers, **other.integers}
            },
            {**self.norms, **other.norms},
            {n: steps for n in names if (steps := tuple(_adjusted_by_both(self, other, n)))},
            self.follows,
        )

    def to_json(self) -> str:
        """The plan as compact JSON; equal plans give equal text."""
        return encode(
            {
                "kept": self.kept,
                "shapes": self.shapes,
                "axes": [[a.name, a.before, a.after] for a in self.axes],
                "parameters": [self.parameters_before, self.parameters_after],
                "integers": self.integers,
                "norms": self.norms,
                "adjusted": {n: [(a.factor, a.runs) for a in x] for n, x in self.adjusted.items()},
                "follows": self.follows,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: the text is damaged, or holds something else.
        """
        plan = decode(text)
        return cls(
            plan["kept"],
            tuple(AxisCut(*axis) for axis in plan["axes"]),
            *plan["parameters"],
            plan["shapes"],
            plan["integers"],
            plan["norms"],
            {n: tuple(Adjustment(*a) for a in x) for n, x in plan["adjusted"].items()},
            plan["follows"],
        )

    def __hash__(self) -> int:
        return hash((self.axes, self.parameters_before, self.parameters_after))

    def __repr__(self) -> str:
        return (
            f"Plan(removes {self.removed} of {sum(a.before for a in self.axes)} units, "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters)"
        )

    def _must_lead_to(self, other: Plan) -> None:
        if not isinstance(other, Plan):
            raise TypeError(f"a Plan follows a Plan, got {type(other).__name__}")
        for name, shape in other.shapes.items():
            if name in self.shapes and self.shape_after(name) != shape:
                raise ValueError(
                    f"the first plan leaves {name!r} with the shape {self.shape_after(name)}, the "
                    f"second expects {shape}: it has to start where the first one ends"
                )
        if self.parameters_after != other.parameters_before:
            raise ValueError(
                f"the first plan leaves {self.parameters_after:,} parameters, the second expects "
                f"{other.parameters_before:,}: it has to start where the first one ends"
            )


def make_plan(
    model: nn.Module, axes: Sequence[Axis], remove: Removal, how: Cut, follows: int = 0
) -> Plan:
    """The plan of a removal, before it is carried out.

    Args:
        model: the network.
        axes: its axes.
        remove: the units that go.
        how: the cut that removes them.
        follows: see `Plan`.
    """
    network = unwrapped(model)
    tensors = raw_tensors(model)
    known = first_names(tensors_by_name(network))
    names = {raw: known[id(tensor)] for raw, tensor in tensors.items()}
    kept = {
        names[raw]: {d: tuple(index.tolist()) for d, index in cuts.items()}
        for raw, cuts in positions_by_name(how.kept).items()
    }
    shapes = {names[raw]: tuple(tensor.shape) for raw, tensor in tensors.items()}
    left = {name: _left(shape, kept.get(name, {})) for name, shape in shapes.items()}
    parameters = [names[raw] for raw, _ in model.named_parameters()]
    adjusted = {
        names[raw]: tuple(_adjustment(s.value.expand(left[names[raw]]), s.factor) for s in steps)
        for raw, steps in how.steps.items()
    }
    modules = first_names(modules_by_name(network))
    return Plan(
        kept,
        tuple(_axis_cuts(model, axes, remove, modules)),
        sum(math.prod(shapes[name]) for name in parameters),
        sum(math.prod(left[name]) for name in parameters),
        {name: shapes[name] for name in dict.fromkeys((*kept, *adjusted))},
        dict(_changing(model, network, how)) if kept else {},
        {modules[id(m)]: as_values(attributes) for m, attributes in how.attributes.items()},
        adjusted,
        follows,
    )


def _left(shape: Sequence[int], cuts: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """The shape that a cut leaves."""
    return tuple(len(cuts[d]) if d in cuts else n for d, n in enumerate(shape))


def _adjustment(values: Tensor, factor: bool) -> Adjustment:
    return Adjustment(factor, as_runs(values, factor))


def _axis_cuts(
    model: nn.Module, axes: Sequence[Axis], remove: Removal, known: Mapping[int, str]
) -> Iterator[AxisCut]:
    names = {name: known.get(id(m), name) for name, m in model.named_modules()}
    lost = {a: int(units.sum()) for a, units in remove.items()}
    for a, axis in enumerate(axes):
        yield AxisCut(names[axis.name], axis.size, axis.size - lost.get(a, 0))


def _changing(
    model: nn.Module, network: nn.Module, how: Cut
) -> Iterator[tuple[str, dict[str, tuple[Size, Size]]]]:
    """The integers that a cut changes, by module."""
    modules = modules_by_name(network)
    modules = {name: modules[name] for name in first_names(modules).values()}
    before = {name: sizes_in(m) for name, m in modules.items()}
    with shadowed(model, how, shapes=True):
        after = {name: sizes_in(m) for name, m in modules.items()}
    for name, sizes in before.items():
        changed = {a: (v, after[name][a]) for a, v in sizes.items() if v != after[name][a]}
        if changed:
            yield name, changed


# --- one plan for two ----------------------------------------------------------------------------

_Kept = Mapping[int, tuple[int, ...]]


def _kept_by_both(
    first: Mapping[str, _Kept], second: Mapping[str, _Kept], name: str
) -> dict[int, tuple[int, ...]]:
    found = dict(first.get(name, {}))
    for d, index in second.get(name, {}).items():
        found[d] = tuple(found[d][i] for i in index) if d in found else index
    return found


def _integers_of_both(
    first: Mapping[str, tuple[Size, Size]], second: Mapping[str, tuple[Size, Size]]
) -> dict[str, tuple[Size, Size]]:
    found = dict(first)
    for attribute, (before, after) in second.items():
        found[attribute] = (found.get(attribute, (before,))[0], after)
    return found


def _adjusted_by_both(first: Plan, second: Plan, name: str) -> Iterator[Adjustment]:
    cuts = cuts_of(second, name)
    for a in first.adjusted.get(name, ()):
        left = selected(from_runs(a.runs, first.shape_after(name), a.factor), cuts)
        yield _adjustment(left, a.factor)
    yield from second.adjusted.get(name, ())


def _axes_of_both(first: Sequence[AxisCut], second: Sequence[AxisCut]) -> tuple[AxisCut, ...]:
    """Axes follow each other by name and size; those of a single unit may be gone by then."""
    later = list(second)
    found = []
    for axis in first:
        at = next((x for x in later if (x.name, x.before) == (axis.name, axis.after)), None)
        if at is not None:
            later.remove(at)
            axis = AxisCut(axis.name, axis.before, at.after)
        found.append(axis)
    return (*found, *later)
