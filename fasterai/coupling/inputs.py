"""Example inputs in the forms users have them, and running a network on them without a trace."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from ..core.checks import is_whole
from ..core.names import must_be_module

__all__ = [
    "Inputs",
    "map_tensors",
    "operands_in",
    "plainly",
    "random_state_kept",
    "run_quietly",
    "tensors_in",
]


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of a network's forward, as plain tensors.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        samples: the size of the batch, where the first dimension of all tensors is one.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    samples: int | None

    @classmethod
    def of(cls, example_inputs: Any, samples: int | None = 2) -> Inputs:
        """From a tensor, a tuple of positional or a dict of keyword inputs.

        Tensor subclasses become plain tensors. Where all tensors agree on their first dimension
        it is taken for the batch, and at most `samples` of it are used (None: all).
        """
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            args, kwargs = (), dict(example_inputs)
        elif isinstance(example_inputs, tuple | list):
            args, kwargs = tuple(example_inputs), {}
        else:
            args, kwargs = (example_inputs,), {}
        found = tensors_in((args, kwargs))
        if not found:
            raise TypeError(
                "example_inputs must be a tensor, a tuple of positional inputs or a dict of "
                f"keyword inputs that holds a tensor, got {type(example_inputs).__name__}; of a "
                f"DataLoader pass a batch's inputs, as in dls.one_batch()[0]"
            )
        sparse = next((x.layout for x in found if x.layout != torch.strided), None)
        if sparse is not None:
            raise TypeError(
                f"example_inputs must be dense tensors, got one of {sparse}: keep a matrix that "
                f"does not change with the sample, a graph's say, in a buffer of the model"
            )
        if not all(x.numel() for x in found):
            shapes = [tuple(x.shape) for x in found]
            raise ValueError(f"example_inputs hold an empty tensor (shapes {shapes}): pass a batch")
        sizes = {x.shape[0] if x.ndim else None for x in found}
        batch = sizes.pop() if len(sizes) == 1 else None
        inputs = cls(*tree_map(_plain, (args, kwargs)), batch or None)
        return inputs if samples is None else inputs._first(samples)

    @classmethod
    def fitting(cls, model: nn.Module, example_inputs: Any) -> Inputs:
        """At most two samples, where the model runs on so few; else the inputs as they are.

        Inputs that were fitted before are taken as they are.

        Raises:
            ValueError: the model cannot run on them, they lie on another device, or the model
                has lazy layers that never ran.
        """
        if isinstance(example_inputs, Inputs):
            return example_inputs
        few, whole = cls.of(example_inputs), cls.of(example_inputs, samples=None)
        few.check(model)
        whole = Inputs(whole.args, whole.kwargs, None)
        for inputs in (few, whole):
            try:
                with run_quietly(model):
                    inputs(model)
                return inputs
            except Exception as error:  # whatever user code raises
                failed = error
        raise ValueError(
            f"the model could not be run on the example inputs ({whole}): "
            f"{type(failed).__name__}: {failed}. Pass what its forward takes: a tensor, a tuple "
            f"of positional inputs or a dict of keyword inputs"
        ) from failed

    def at_least(self, samples: int) -> Inputs:
        """Inputs with no fewer samples, by repeating those there are."""
        now = self.samples
        if now is None or now >= samples:
            return self
        times = -(-samples // now)
        repeat = _each_tensor(lambda x: x.repeat(times, *[1] * (x.ndim - 1)))
        return Inputs(*tree_map(repeat, (self.args, self.kwargs)), now * times)

    def batch(self, samples: int) -> Inputs:
        """Inputs with exactly so many samples, by repeating or leaving out.

        Raises:
            ValueError: they have no batch dimension in common, or no samples are asked for.
        """
        if not is_whole(samples) or samples < 1:
            raise ValueError(f"a batch has one sample or more, got {samples!r}")
        if self.samples is None:
            raise ValueError(
                f"the inputs cannot be made a batch of {samples}: their tensors have no first "
                f"dimension of one size; pass inputs of the size that you want, and no batch"
            )
        return self.at_least(samples)._first(samples)

    def random_like(self) -> Inputs:
        """Other inputs of the same form: floats are normal with the same mean and spread.

        Integers stay as they are, for they may be indices. Bools may be masks: samples exchange
        theirs; a single one keeps them. The global random state is not touched.
        """
        generator = torch.Generator().manual_seed(0)

        def other(x: Tensor) -> Tensor:
            if x.dtype == torch.bool:
                return x.roll(1, 0) if self.samples and x.ndim else x
            if not x.is_floating_point() or not x.numel():
                return x
            noise = torch.randn(x.shape, generator=generator).to(x)
            return noise * x.std(correction=0).clamp(min=1e-3) + x.mean()

        return Inputs(*tree_map(_each_tensor(other), (self.args, self.kwargs)), self.samples)

    def other_sizes(self) -> Iterator[Inputs]:
        """A batch of one more, and single samples that are longer in some dimensions.

        Twice as long are single dimensions, and those of one size together, for square images. The
        latter also get sizes that stay odd when they are halved, rounding up and down, for code
        that pads to a multiple. Inputs with as many positions, tokens and their mask say, grow
        together; on a GPU tokens do not, for a position that is not there would end all work on it.
        """
        if self.samples:
            yield self.batch(self.samples + 1)
        few = self._first(1)
        if any(x.device.type == "cuda" and not x.is_floating_point() for x in few.tensors):
            return
        begin = 1 if self.samples else 0
        places = {(d, n) for x in few.tensors for d, n in enumerate(x.shape) if d >= begin}
        ways = [([place], 2 * place[1]) for place in sorted(places)]
        for n in sorted({n for _, n in places}):
            same = sorted(place for place in places if place[1] == n)
            ways += [(same, 2 * n)] if len(same) > 1 else []
            ways += [(same, m) for m in sorted({n + n // 2 + 1, 2 * n - 1}) if n < m < 2 * n]
        for way, length in ways:

            def longer(
                x: Tensor, way: Sequence[tuple[int, int]] = way, length: int = length
            ) -> Tensor:
                for d, n in way:
                    if x.ndim > d and x.shape[d] == n:
                        x = torch.cat([x, x], d).narrow(d, 0, length)
                return x

            args, kwargs = tree_map(_each_tensor(longer), (few.args, few.kwargs))
            yield Inputs(args, kwargs, few.samples)

    def beside(self, other: Inputs) -> Inputs:
        """One batch of the samples of both, which have the same form and a batch dimension."""
        both = tree_map(
            lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a,
            (self.args, self.kwargs),
            (other.args, other.kwargs),
        )
        return Inputs(*both, 2 * (self.samples or 0))

    def copies(self) -> Inputs:
        """The same inputs in tensors of their own, for a forward that writes into them."""
        args, kwargs = tree_map(_each_tensor(Tensor.clone), (self.args, self.kwargs))
        return Inputs(args, kwargs, self.samples)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same inputs, floating ones in another precision."""
        cast = _each_tensor(lambda x: x.to(dtype) if x.is_floating_point() else x)
        return Inputs(*tree_map(cast, (self.args, self.kwargs)), self.samples)

    def __call__(self, model: nn.Module) -> Any:
        """Run `model` on copies of these inputs, as its training mode stands."""
        copies = self.copies()
        return model(*copies.args, **copies.kwargs)

    def __str__(self) -> str:
        shown = [f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in self.tensors]
        return ", ".join(shown)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the inputs."""
        return tensors_in((self.args, self.kwargs))

    @property
    def given(self) -> Any:
        """As `of` takes them: a dict of keyword inputs, or a tuple."""
        return self.kwargs or self.args

    def check(self, model: nn.Module) -> None:
        """Refuse models that cannot be traced, and inputs on another device than the model."""
        must_be_module(model)
        if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
            raise TypeError("a ScriptModule cannot be traced: pass the model it was made from")
        if any(is_lazy(p) for p in model.parameters()):
            raise ValueError("the model has lazy layers: run it once on a batch first")
        device = next((p.device for p in model.parameters()), None)
        for x in self.tensors:
            if device is not None and x.device != device and device.type != "meta":
                raise ValueError(
                    f"example_inputs are on {x.device}, the model is on {device}: pass "
                    f"example_inputs.to('{device}'), or move the model"
                )

    def _first(self, samples: int) -> Inputs:
        if self.samples is None or self.samples <= samples:
            return self
        first = _each_tensor(lambda x: x[:samples])
        return Inputs(*tree_map(first, (self.args, self.kwargs)), samples)


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """`change` applied to the tensors in the arguments of an operation: lists, tuples, dicts."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(x, change) for x in tree)
    if isinstance(tree, dict):
        return {k: map_tensors(x, change) for k, x in tree.items()}
    return tree


def operands_in(tree: Sequence[Any]) -> list[Tensor]:
    """The tensors in the arguments of an operation, which nest in lists and tuples alone."""
    found: list[Tensor] = []
    for x in tree:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found.extend(operands_in(x))
    return found


def _is_cache(x: Any) -> bool:
    """Whether it is a `DynamicCache` or another of transformers', under whatever name."""
    return type(x).__name__.endswith("Cache")


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples, dicts and objects that hold such.

    The cache of keys and values that a language model returns is not among them: it is for the
    same network to read again.
    """
    found: list[Tensor] = []
    seen: set[int] = set()
    todo = [tree]
    while todo:
        item = todo.pop(0)
        if isinstance(item, Mapping):
            item = {k: v for k, v in item.items() if k != "past_key_values" and not _is_cache(v)}
        for leaf in tree_leaves(item):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif hasattr(leaf, "__dict__") and not callable(leaf) and id(leaf) not in seen:
                seen.add(id(leaf))
                todo.append(dict(vars(leaf)))
    return found


def _each_tensor(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda x: change(x) if isinstance(x, Tensor) else x


def _plain(x: Any) -> Any:
    return x.detach().as_subclass(Tensor) if isinstance(x, Tensor) else x


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Whatever numbers are drawn while this lasts, others draw as if they had not been."""
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(list(gpus)):
            yield
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])


@contextmanager
def run_quietly(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run `model` in eval (or train) mode and leave no trace of it.

    No gradients, no autocast; training flags, buffers, attributes, what lists and dicts among them
    hold, and the random state are put back.
    """
    modules = list(model.modules())
    containers = _containers(modules)
    attributes = [(m, dict(m.__dict__)) for m in modules]
    modes = [(m, m.training) for m in modules]
    buffers = [(m, dict(m._buffers)) for m in modules]
    with torch.inference_mode(False), torch.no_grad():
        copies = {id(b): b.clone() for _, own in buffers for b in own.values() if b is not None}
    try:
        for module, own in buffers:  # it runs on copies: a graph that is alive keeps its buffers
            module._buffers.update({k: copies[id(b)] for k, b in own.items() if b is not None})
        with (
            random_state_kept(model),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            for module, _ in modes:  # not model.train(), which some override to merge weights
                module.training = training
                if isinstance(module, nn.SyncBatchNorm):  # other processes may not run now
                    module.forward = partial(_BatchNorm.forward, module)
            yield
    finally:
        for module, before in attributes:  # a hidden state, a cache
            now = module.__dict__
            if len(now) != len(before) or any(now.get(k) is not v for k, v in before.items()):
                now.clear()
                now.update(before)
        for container in containers:
            _refill(*container)
        for module, mode in modes:
            module.training = mode
        for module, own in buffers:
            for name in set(module._buffers) - set(own):  # made by this run
                del module._buffers[name]
            module._buffers.update(own)


_OWN = frozenset(vars(nn.Module()))
_CONTAINERS = OrderedDict, dict, list, set, deque
_MOST = 10_000  # what holds more is a table, not a cache


def _containers(modules: Sequence[nn.Module]) -> list[tuple[Any, type, list[Any]]]:
    """Lists, dicts, sets and deques that modules or their classes keep; of what kind, and what."""
    classes = {c for m in modules for c in type(m).__mro__ if c.__module__.split(".")[0] != "torch"}
    todo = [x for m in modules for name, x in vars(m).items() if name not in _OWN]
    todo += [x for c in classes for name, x in vars(c).items() if not name.startswith("__")]
    found: dict[int, tuple[Any, type, list[Any]]] = {}
    while todo:
        x = todo.pop()
        kind = next((kind for kind in _CONTAINERS if isinstance(x, kind)), None)
        if kind is not None and id(x) not in found and len(x) <= _MOST:
            content = _content(x, kind)
            found[id(x)] = x, kind, content
            inside = [v for _, v in content] if issubclass(kind, dict) else content
            todo.extend(v for v in inside if isinstance(v, (*_CONTAINERS, tuple)))
        elif isinstance(x, tuple):
            todo.extend(v for v in x if isinstance(v, (*_CONTAINERS, tuple)))
    return list(found.values())


def _content(x: Any, kind: type) -> list[Any]:
    """What a container holds, whatever its class makes of that."""
    return list(kind.items(x) if issubclass(kind, dict) else kind.__iter__(x))


def _refill(x: Any, kind: type, content: list[Any]) -> None:
    """Put back what was in a container, if that is something else now."""
    now = _content(x, kind)
    flat = [list(chain.from_iterable(c)) if issubclass(kind, dict) else c for c in (now, content)]
    if len(flat[0]) != len(flat[1]) or any(a is not b for a, b in zip(*flat, strict=True)):
        kind.clear(x)
        (kind.update if issubclass(kind, dict | set) else kind.extend)(x, content)


@contextmanager
def plainly() -> Iterator[None]:
    """Run without shortcuts, so that operations show and numbers can be compared.

    Transformer layers run as views and matrix products, not as one fused operation, and GPUs
    compute float32 in full, not in TF32.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    units = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    precision = [unit.fp32_precision for unit in units]
    torch.backends.mha.set_fastpath_enabled(False)
    for unit in units:
        unit.fp32_precision = "ieee"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for unit, before in zip(units, precision, strict=True):
            unit.fp32_precision = before
