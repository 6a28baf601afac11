"""What named layers make, seen while a network runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ..core.names import plain, unknown_name, unwrapped
from ..coupling.hooks import hooked

__all__ = ["layers_named", "watched"]


def layers_named(model: nn.Module, names: Iterable[str], argument: str) -> dict[str, nn.Module]:
    """The modules of these names.

    Raises:
        ValueError: a name the model does not have.
    """
    modules = {plain(name): module for name, module in unwrapped(model).named_modules()}
    for name in names:
        if name not in modules or not name:
            raise ValueError(unknown_name(name, modules, argument))
    return {name: modules[name] for name in names}


@contextmanager
def watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A dict that gets the output of each layer by its name while the model runs inside.

    The hooks are gone afterwards, whatever happens. A layer that runs twice leaves its last output.
    """
    seen: dict[str, Tensor] = {}
    with hooked(m.register_forward_hook(_keep(seen, name)) for name, m in layers.items()):
        yield seen


def _keep(seen: dict[str, Tensor], name: str):  # noqa: ANN202
    def hook(module: nn.Module, args: object, out: object) -> None:
        if not isinstance(out, Tensor):
            raise TypeError(f"layer {name!r} makes a {type(out).__name__}, no tensor to compare")
        seen[name] = out

    return hook
