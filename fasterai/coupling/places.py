"""Where in a network its channels can be seen: at the layers that make and read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.names import layer_of
from .hooks import hooked
from .inputs import Inputs
from .labels import CONSUME, PRODUCE
from .run import run_labels
from .tracer import Tracer
from .units import Coupling

__all__ = ["Look", "Places", "find_places", "looking"]

# For each module by name, for its first, second, ... call in a forward: the classes that the
# channels of a tensor belong to, as a tensor that broadcasts to it.
Places = Mapping[str, list[tuple[Tensor, ...]]]
# Is shown a tensor: (name of the module, which call of it in this forward, the tensor); what it
# returns takes the tensor's place, if it returns something.
Look = Callable[[str, int, Tensor], Tensor | None]


def find_places(model: nn.Module, inputs: Inputs, coupling: Coupling) -> tuple[Places, Places]:
    """Where channels come in at the layers that read them, and go out of those that make them.

    Functions that read channels without a module (a product of queries and keys) are not seen.

    Args:
        model: the network; it is left as it was.
        inputs: what it runs on, in eval mode.
        coupling: what is known of its channels.
    """
    read: dict[str, list[tuple[Tensor, ...]]] = {}
    made: dict[str, list[tuple[Tensor, ...]]] = {}

    @contextmanager
    def notes(tracer: Tracer) -> Iterator[None]:
        def note(into: dict[str, list[tuple[Tensor, ...]]]) -> Look:
            def look(name: str, call: int, x: Tensor) -> None:
                fields = (f.labels for f in tracer.of(x) if f.source is None and f.dims)
                into.setdefault(name, []).append(tuple(fields))

            return look

        readers, makers = (_layers(model, coupling, role) for role in (CONSUME, PRODUCE))
        with looking(model, readers, note(read)), looking(model, makers, note(made), after=True):
            yield

    known = coupling.labels({})
    run_labels(model, inputs, known, shapes=coupling.analysis.shapes, beside=notes)
    return read, made


@contextmanager
def looking(
    model: nn.Module, names: Iterable[str], look: Look, *, after: bool = False
) -> Iterator[None]:
    """Show the inputs of modules (or `after` them, their outputs) while this lasts; by hooks.

    Of several inputs the first tensor of floats counts, wherever it is passed.

    Args:
        model: the network.
        names: of the modules; those that it does not have are left out.
        look: what is shown the tensors.
        after: show outputs.
    """
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}

    def count(name: str) -> int:
        calls[name] = calls.get(name, -1) + 1
        return calls[name]

    def before_of(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = _first((args, tuple(kwargs.values())))
            seen = None if x is None else look(name, count(name), x)
            if seen is None:
                return None
            args = tuple(seen if a is x else a for a in args)
            return args, {k: seen if a is x else a for k, a in kwargs.items()}

        return hook

    def after_of(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            return look(name, count(name), out) if _is_float(out) else None

        return hook

    def put(name: str, module: nn.Module) -> RemovableHandle:
        if after:
            return module.register_forward_hook(after_of(name))
        return module.register_forward_pre_hook(before_of(name), with_kwargs=True)

    with hooked(put(name, modules[name]) for name in dict.fromkeys(names) if name in modules):
        yield


def _first(places: Iterable[tuple[Any, ...]]) -> Tensor | None:
    return next((x for values in places for x in values if _is_float(x)), None)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _layers(model: nn.Module, coupling: Coupling, role: str) -> list[str]:
    """Modules with a parameter of this role, also where several share it."""
    named = dict(model.named_parameters(remove_duplicate=False))
    slots = [s.parameter for axis in coupling.axes for s in axis.having(role)]
    shared = {id(named[name]) for name in slots if name in named}
    return [layer_of(name) for name, p in named.items() if id(p) in shared]
