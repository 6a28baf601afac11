"""Carries labels beside the tensors of a run, and notes what it says about them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.granularity import along
from ..core.names import raw_tensors
from .labels import FOLLOW, PRODUCE, Arrival, Dim, Factor, Field, Run

__all__ = ["Beside", "Engine", "Made", "Tracer"]

_MOST = 1 << 20  # labels beside a tensor; tables of positions, spread over pairs, have more

# Executes an operation for a tracer: (tracer, operation, args, kwargs) -> result.
Engine = Callable[["Tracer", Any, tuple[Any, ...], Mapping[str, Any]], Any]


class Made(Enum):
    """What operands are made of: of inputs, too; of parameters alone; or of these and buffers.

    What parameters alone make, such as a product of two, follows what a cut leaves of them. What
    buffers make with them, such as a norm of a weight, stays as it is.
    """

    INPUTS = "inputs"
    PARAMETERS = "parameters"
    BUFFERS = "buffers"


class Beside:
    """Values beside tensors, which it keeps alive: quick, and for tensors that hold no numbers."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Any]] = {}

    def __contains__(self, x: Tensor) -> bool:
        return id(x) in self._known

    def __getitem__(self, x: Tensor) -> Any:
        return self._known[id(x)][1]

    def __setitem__(self, x: Tensor, value: Any) -> None:
        self._known[id(x)] = x, value

    def get(self, x: Tensor, default: Any = None) -> Any:
        """The value beside `x`."""
        found = self._known.get(id(x))
        return default if found is None else found[1]

    def setdefault(self, x: Tensor, value: Any) -> Any:
        """The value beside `x`, which is this one if there was none."""
        return self._known.setdefault(id(x), (x, value))[1]

    def pop(self, x: Tensor, default: Any = None) -> Any:
        """The value that was beside `x`."""
        found = self._known.pop(id(x), None)
        return default if found is None else found[1]


class Tracer(TorchDispatchMode):
    """Carries label fields beside the tensors of a run; `said` is what it found.

    Args:
        model: the network that will run under it.
        labels: for each dimension, the labels of its positions.
        follow: passes labels through an operation: (tracer, operation, args, kwargs, result).
        engine: executes the operations; see `engines`.
        watch: note with what values each channel arrives at its consumers.
        origins: note which channels anything but zero weights has made; needs numbers, as well.
        beside: what holds values beside tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Mapping[Dim, Tensor],
        follow: Callable[..., None],
        engine: Engine,
        *,
        watch: bool = False,
        origins: bool = False,
        beside: type = WeakTensorKeyDictionary,
    ) -> None:
        super().__init__()
        self.follow, self.engine = follow, engine
        self.said = Run()
        self.watch, self.origins = watch, origins
        self.count = 0
        tensors = raw_tensors(model)
        self.parameters = {name for name, _ in model.named_parameters()}
        self.fields = beside()
        known = [k for k in labels.values() if len(k)]
        largest = int(torch.cat(known).max()) if known else 0
        self.total = largest + 2  # FIXED, -1, has a place of its own
        self.moving = beside()  # (labels,) bool: channels that zeros did not make
        self.made = beside()  # by a layer: the name of its weight
        self.products = beside()  # of two activations: the labels they were over
        self._filled: dict[int, Tensor] = {}  # memory of constants made in the run, of one value
        self._spread = beside()  # dimensions along which a tensor repeats what follows a width
        self.fixed = beside()  # parameters, buffers and what is made of them alone
        self.together: dict[Dim, dict[Dim, bool]] = {}  # weights that are added to another one
        self.names = beside()
        for name, tensor in tensors.items():
            self.fixed[tensor] = True
            self.names[tensor] = name
        for dim, known in labels.items():
            tensor = tensors[dim.parameter]
            if len(known) == 1 and tensor.ndim < 3:
                continue  # cut to a single position, it broadcasts; of convs, see `_shared`
            field = Field(along(known, dim.dim, tensor.ndim), dim)
            self.fields[tensor] = (*self.fields.get(tensor, ()), field)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # what is asked here is none of the network's code
            out = self.engine(self, func, args, kwargs or {})
            self.follow(self, func, args, kwargs or {}, out)
        return out

    def of(self, x: Any) -> tuple[Field, ...]:
        """The fields of a tensor; none for anything else."""
        return self.fields.get(x, ()) if isinstance(x, Tensor) else ()

    def along(self, x: Any, dim: int) -> Field | None:
        """The field of `x` that varies along `dim`, if it has one."""
        return next((f for f in self.of(x) if dim % x.ndim in f.dims), None)

    def attach(self, out: Tensor, fields: Sequence[Field | None]) -> None:
        """Give `out` these fields; integers carry none, for they are counts and indices."""
        if not (out.is_floating_point() or out.is_complex() or out.dtype == torch.bool):
            return self.pin(fields, "made an integer")
        known = [f for f in fields if f is not None]
        far = [f for f in known if f.labels.numel() > _MOST]
        for f in far:
            there = torch.zeros(self.total, dtype=torch.bool).index_fill_(
                0, f.labels.flatten() % self.total, True
            )
            self.pin([Field(there[:-1].nonzero())], "spread over too many places to follow")
        self.fields[out] = tuple(f for f in known if f not in far)
        return None

    def fill(self, x: Tensor) -> None:
        """`x` has one value. Its memory counts: factories hand out a tensor of its own for it."""
        self._filled[_memory(x)] = x

    def spread(self, x: Tensor, dims: Collection[int]) -> None:
        """`x` repeats itself along these dimensions."""
        self._spread[x] = frozenset(dims)

    def overwritten(self, x: Tensor) -> None:
        """Whatever was known of one value in `x` is known no more."""
        self._filled.pop(_memory(x), None)
        self._spread.pop(x, None)

    def fits(self, x: Tensor, dim: int) -> bool:
        """Whether `x` has no size of its own along `dim`, where its code follows a width."""
        return _memory(x) in self._filled or dim in self._spread.get(x, ())

    def join(self, a: Tensor, b: Tensor) -> None:
        """These labels, broadcast against each other, belong together."""
        if a is b:
            return
        left, right = torch.broadcast_tensors(a, b)
        self.said.meetings.append((left.reshape(-1), right.reshape(-1)))

    def merge(self, f: Field, dims: Sequence[int]) -> Field:
        """The labels of `f` along these dimensions become one: its field along the others."""
        labels = f.labels
        for d in dims:
            if labels.shape[d] > 1:
                first = labels.narrow(d, 0, 1)
                self.join(labels, first)
                labels = first
        return Field(labels, f.source)

    def pin(self, fields: Sequence[Field | None], reason: str) -> None:
        """What these fields label cannot be removed."""
        for f in fields:
            if f is not None:
                self.said.pins.append((f.labels.reshape(-1), reason))

    def hold(self, f: Field, dims: Sequence[int], reason: str) -> Field | None:
        """`f` keeps its size along these dimensions: lines along them go as a whole, or not."""
        if set(dims) >= set(f.dims):
            self.pin([f], reason)
            return None
        return self.merge(f, dims)

    def meet_fixed(self, f: Field, dims: Collection[int], reason: str) -> Field | None:
        """`f` meets something of fixed size along these dimensions, element by element.

        Where it is the first of them, as groups are, its lines lose equally many.
        """
        others = set(f.dims) - set(dims)
        if others and max(dims) < min(others):
            self.grid(f.labels)
            return f
        return self.hold(f, sorted(dims), reason)

    def mix(self, f: Field, reason: str) -> None:
        """An operation computes across the channels of `f`, and depends on their number."""
        self.said.mixed.append((f.labels.reshape(-1), reason))

    def factor(self, x: Tensor, value: float) -> None:
        """`x` is multiplied with a number, which code may derive from a width."""
        over = self.products.get(x)
        product = over is not None
        if over is None:
            own = [f.labels.reshape(-1) for f in self.of(x) if f.dims]
            over = torch.cat([torch.zeros(0, dtype=torch.int64), *own])
        self.count += 1
        self.said.factors[self.count] = Factor(over, value, product)

    def grid(self, labels: Tensor) -> None:
        """Channels are laid out in a grid, which has to stay one; it may have a single line."""
        labels = labels.squeeze()
        self.said.grids.append(labels if labels.ndim > 1 else labels.reshape(1, -1))

    def mark(self, f: Field | None, role: str) -> None:
        """Note what a parameter's positions do, where the field is a parameter's own."""
        if f is None or f.source is None:
            return
        for dim in (f.source, *self.together.get(f.source, ())):
            mine = FOLLOW if role == PRODUCE and dim.parameter not in self.parameters else role
            if mine == PRODUCE and dim.parameter not in self.said.order:
                self.said.order.append(dim.parameter)
            self.said.roles.add((dim, mine))

    def produce(self, out: Tensor, weight: Tensor, rows: Field | None) -> None:
        """A layer made `out` with `weight`, whose rows are its channels."""
        self.mark(rows, PRODUCE)
        if self.origins and rows is not None and rows.source is not None:
            others = [d for d in range(weight.ndim) if d not in rows.dims]
            alive = weight.any(others) if others else weight != 0
            moving = self.moving.get(out)
            moving = torch.zeros(self.total, dtype=torch.bool) if moving is None else moving
            moving[rows.labels.reshape(-1)[alive.reshape(-1).cpu()]] = True
            self.moving[out] = moving
            self.made[out] = rows.source.parameter

    def watch_moving(
        self, operands: Sequence[Tensor], outs: Sequence[Tensor], *, meet: str = ""
    ) -> None:
        """Pass on which channels something else than zero weights has made.

        Args:
            operands: all tensors that the operation reads.
            outs: what it made.
            meet: how they meet. Element by element, 'scaled' leaves zeros zero, and 'multiplied'
                makes all zero that a parameter of zeros is multiplied with. 'apart' leaves the
                channels of each as they are, whatever is beside them, or weighs them, as attention.
        """
        for x in operands:
            if x in self.made:
                name = self.made[x]
                self.said.used[name] = self.said.used.get(name, 0) + 1
        bare = any(not self.of(x) and x not in self.fixed for x in operands)  # a map of gates, say
        known = [self.moving[x] for x in operands if x in self.moving]
        if meet == "apart":
            known = [self.moving[x] & self._labelled([x]) for x in operands if x in self.moving]
        elif known and meet and bare:
            known.append(torch.ones_like(known[0]) if meet == "added" else self._heard(operands))
        zero = None
        if known and meet == "multiplied":
            own = [x for x in operands if x in self.fixed and self.of(x)]
            zero = self._labelled(own) & ~self._heard(own) if own else None
        for out in outs:
            if known and out not in self.made:
                moving = known[0]
                for other in known[1:]:
                    moving = moving | other
                self.moving[out] = moving if zero is None else moving & ~zero

    def watch_fixed(self, operands: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Pass on what is made of parameters and buffers alone."""
        fixed = all(x in self.fixed for x in operands)
        for out in outs:
            if fixed:
                self.fixed[out] = True
            else:
                self.fixed.pop(out, None)

    def made_of(self, operands: Sequence[Tensor]) -> Made:
        """What these operands are made of, taken together."""
        if any(x not in self.fixed for x in operands):
            return Made.INPUTS
        names = {self.names[x] for x in operands if x in self.names}  # also once written in place
        names |= {f.source.parameter for x in operands for f in self.of(x) if f.source}
        return Made.PARAMETERS if names <= self.parameters else Made.BUFFERS

    def _labelled(self, operands: Sequence[Tensor]) -> Tensor:
        """(labels,) bool: the channels that have labels there."""
        there = torch.zeros(self.total, dtype=torch.bool)
        for x in operands:
            for f in self.of(x):
                there[f.labels.reshape(-1)] = True
        return there

    def _heard(self, operands: Sequence[Tensor]) -> Tensor:
        """(labels,) bool: the channels that are not zero throughout."""
        heard = torch.zeros(self.total, dtype=torch.bool)
        for x in operands:
            for f in self.of(x):
                others = [d for d in range(x.ndim) if d not in f.dims]
                loud = (x.any(others) if others else x != 0).reshape(-1).cpu()
                heard[f.labels.reshape(-1)[loud]] = True
        return heard

    def consume(
        self,
        x: Tensor,
        seen: Field,
        reader: Field | None = None,
        *,
        padded: bool = False,
        biased: bool = False,
        summed: bool = False,
        weighing: bool = False,
    ) -> None:
        """The channels of `x` labelled by `seen` are read by a next layer; see `Arrival`.

        Where `x` is `weighing` others, as a weight does, nothing arrives with it.
        """
        labels = seen.labels.reshape(-1)
        self.said.consumed.append(labels)
        if self.watch and x.numel() and not weighing:
            others = [d for d in range(x.ndim) if d not in seen.dims]
            low, high = (x.amin(others), x.amax(others)) if others else (x, x)
            low, high = (v.flatten().double().cpu() for v in (low, high))
            known = self.moving.get(x)
            moving = torch.ones_like(labels, dtype=torch.bool) if known is None else known[labels]
            source = reader.source if reader is not None else None
            self.said.arrivals.append(
                Arrival(labels, low, high, moving, source, padded, biased, summed)
            )


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata if x.layout == torch.strided else id(x)
