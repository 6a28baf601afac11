"""Multiply-accumulates (MACs): how many there are, how many of them meet a zero, what has none."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..coupling.inputs import Inputs, operands_in, plainly, run_quietly
from ..coupling.rules import RULES, known
from ..coupling.run import recurrence_shown, run_shapes

__all__ = ["Counts", "counted", "counts", "filled", "macs", "numbers_needed"]


@dataclass(frozen=True)
class Counts:
    """MACs for one sample by module name, `''` for the whole network.

    Args:
        macs: of convs and matrix products; empty where they could not be counted.
        nonzero: those of them whose weight is not zero; empty where that is not known.
        uncounted: operations that may multiply and add, and have no formula; by name.
    """

    macs: Mapping[str, int]
    nonzero: Mapping[str, int]
    uncounted: tuple[str, ...]


def macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs for one sample by module name, `''` for the whole network.

    Convs and matrix products are counted, by torch's own counter; a module that runs twice counts
    twice. Empty where that counter cannot run the network, as when it differentiates inside.
    """
    return counted(model, example_inputs)[1]


def counted(model: nn.Module, example_inputs: Any) -> tuple[Inputs, dict[str, int]]:
    """Inputs fitted to the model, and its `macs`, from runs on shapes as a rule."""
    inputs = Inputs.of(example_inputs)
    inputs.check(model)
    found = _count(model, inputs)[1] if inputs.samples in (None, 1) or _runs(model, inputs) else {}
    if not found:
        inputs = Inputs.fitting(model, example_inputs)
        found = _count(model, inputs)[1]
    return inputs, found


def counts(model: nn.Module, example_inputs: Any) -> Counts:
    """All that is known of a network's MACs, from a run on shapes and one on numbers.

    A weight is what is computed from parameters and buffers alone, so that masks that are
    multiplied on, as in `torch.nn.utils.prune`, count as the zeros that they make. Products of
    activations count as a whole.
    """
    inputs = Inputs.fitting(model, example_inputs)
    seen = _Operations()
    inputs, found = _count(model, inputs, seen)
    if not found:
        return Counts({}, {}, ())
    looked = _Operations()
    try:
        again = _run(model, inputs, False, looked)
    except Exception:  # without numbers, as on the meta device
        again = {}
    nonzero = _by_module(model, inputs, looked.nonzero) if again == found else {}
    return Counts(found, nonzero, tuple(sorted(seen.uncounted)))


def filled(x: Tensor) -> int:
    """How many elements are not zero; torch does not count those of 8 bits."""
    return int((x.float() if x.is_floating_point() and x.itemsize == 1 else x).count_nonzero())


def numbers_needed(model: nn.Module) -> None:
    """Refuse a network without numbers.

    Raises:
        ValueError: it is on the meta device.
    """
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "a network on the meta device has no numbers and takes no time: pass "
            "model.to_empty(device='cpu') and inputs there; macs(model, x) needs none"
        )


def _count(
    model: nn.Module, inputs: Inputs, looking: _Operations | None = None
) -> tuple[Inputs, dict[str, int]]:
    """Inputs that run, and the MACs of them.

    A single sample, where that runs: products of weights alone are made once for a batch. Shapes
    are enough, unless a network looks at its numbers.
    """
    single = [inputs.batch(1)] if (inputs.samples or 1) > 1 else []
    for given, shapes in itertools.product([*single, inputs], (True, False)):
        try:
            with _frozen(model):
                return given, _run(model, given, shapes, looking)
        except Exception:  # of the inputs or of the counter; `fitting` can tell
            continue
    return inputs, {}


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the network takes them all: a single sample may run where several do not."""
    try:
        run_shapes(model, inputs, nullcontext())
    except Exception:  # it looks at its numbers, or does not run; `fitting` can tell
        return False
    return True


def _run(
    model: nn.Module, inputs: Inputs, shapes: bool, looking: _Operations | None
) -> dict[str, int]:
    """MACs by module; what else there is to say of the operations, `looking` notes."""
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    beside = counter if looking is None else looking.beside(counter, None if shapes else model)
    if shapes:
        run_shapes(model, inputs, beside)
    else:
        with run_quietly(model), plainly(), recurrence_shown(model), beside:
            inputs(model)
    totals = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return _by_module(model, inputs, totals)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters that want no gradients: of views of others torch's counter asks who made them."""
    wanting = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in wanting:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanting:
            p.requires_grad_(True)


def _by_module(model: nn.Module, inputs: Inputs, totals: Mapping[str, int]) -> dict[str, int]:
    """By the names of modules, for one sample."""
    root, samples = type(model).__name__, inputs.samples or 1
    names = {name: f"{root}.{name}" if name else "Global" for name, _ in model.named_modules()}
    return {name: totals.get(tracked, 0) // samples for name, tracked in names.items()}


class _Operations(TorchDispatchMode):
    """Looks at each operation that torch's counter has taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.uncounted: set[str] = set()
        self.nonzero: dict[str, int] = defaultdict(int)
        self._weights = WeakTensorKeyDictionary()
        self._stay: set[int] = set()
        self._known: dict[Any, Tensor] = {}

    @contextmanager
    def beside(self, counter: FlopCounterMode, model: nn.Module | None) -> Iterator[None]:
        """Look on while a network runs.

        Args:
            counter: knows the formulas, and in which modules an operation runs.
            model: what has the weights; None where they are no numbers.
        """
        self._counter = counter
        own = [] if model is None else [*model.parameters(), *model.buffers()]
        self._weights.update(dict.fromkeys(own, True))
        self._stay = {p.untyped_storage().data_ptr() for p in own if isinstance(p, nn.Parameter)}
        with self, counter:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, made = operands_in((*args, *(kwargs or {}).values())), operands_in((out,))
        formula = self._counter.flop_registry.get(func._overloadpacket)
        if formula is not None:
            total = formula(*args, **(kwargs or {}), out_val=out) // 2
            some = self._some(func, args, total) if self._weights else total
            for parent in set(self._counter.mod_tracker.parents):
                self.nonzero[parent] += some
        elif read and any(_continuous(x) for x in made) and not _free(func):
            self.uncounted.add(func._schema.name.removeprefix("aten::"))
        if self._weights and read:
            fixed = all(x in self._weights for x in read)
            for x in made:
                if fixed:
                    self._weights[x] = True
                else:
                    self._weights.pop(x, None)
        return out

    def _some(self, func: Any, args: Any, total: int) -> int:
        """How many of the products of an operation have a weight that is not zero."""
        name = func._schema.name.removeprefix("aten::")
        if "convolution" in name:
            weight = args[1]
            if weight not in self._weights:
                return total
            return total * int(self._filled(weight, None)) // max(1, weight.numel())
        if name not in ("mm", "addmm", "bmm", "baddbmm"):
            return total
        a, b = args[1:3] if "add" in name else args[:2]
        fixed = a in self._weights, b in self._weights
        if not any(fixed):
            return total
        rows = self._filled(a, -2) if fixed[0] else a.shape[-2]  # (..., k): in each column of a
        columns = self._filled(b, -1) if fixed[1] else b.shape[-1]
        return int((rows * columns).sum())

    def _filled(self, weight: Tensor, dim: int | None) -> Tensor:
        """How many elements along a dimension, or of all, are not zero."""
        storage = weight.untyped_storage().data_ptr()
        if storage not in self._stay:
            return weight.count_nonzero(dim)
        key = storage, weight.storage_offset(), weight.shape, weight.stride(), dim
        if key not in self._known:  # recurrent layers read theirs at each step
            self._known[key] = weight.count_nonzero(dim)
        return self._known[key]


def _continuous(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


# Of shapes, as torch's own: products for which it has none.
_FORMULAS = {
    torch.ops.aten.mv: lambda a, *_, **__: 2 * math.prod(a),
    torch.ops.aten.addmv: lambda _, a, *__, **___: 2 * math.prod(a),
    torch.ops.aten.dot: lambda a, *_, **__: 2 * math.prod(a),
    torch.ops.aten.vdot: lambda a, *_, **__: 2 * math.prod(a),
    torch.ops.aten._trilinear: lambda a, w, b, *_, **__: 2 * a[0] * w[0] * w[2] * (w[1] + 1),
}
if hasattr(torch.ops.aten, "_grouped_mm"):
    _FORMULAS[torch.ops.aten._grouped_mm] = lambda x, w, *_, **__: 2 * math.prod(x) * w[-1]
_PRODUCTS = """convolution mm addmm bmm baddbmm mv addmv dot vdot _trilinear _grouped_mm
    _fft_r2c _fft_c2r _fft_c2c torchvision::deform_conv2d"""
_MOVING = """index_copy index_put scatter scatter_add scatter_reduce masked_scatter masked_select
    triu tril resize set _unsafe_index cummax cummin median mode kthvalue unique_dim _unique2 renorm
    rot90 random exponential multinomial max_unpool2d"""
_FREE = set(RULES) - set(_PRODUCTS.split()) | set(_MOVING.split())


def _free(func: Any) -> bool:
    """Whether an operation has no products to add up: it moves, picks, pools or normalises."""
    name, is_pointwise = known(func)
    views = any(
        r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
    )
    return is_pointwise or views or name in _FREE or name.removesuffix("_") in _FREE
