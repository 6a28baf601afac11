"""Whether a changed copy of a network still computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..core.copies import copied
from ..coupling.hooks import hooked
from ..coupling.inputs import Inputs, plainly, run_quietly, tensors_in
from ..prune.check import differences

__all__ = ["Comparison", "running", "still_read"]


class Comparison:
    """Whether another form of a network computes the same, on example and on random inputs.

    Where outputs are apart in the network's own precision, it is asked in float64: networks that
    choose, boxes say, may turn rounding into another choice.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.batches = model, [inputs, inputs.random_like()]
        self.expected = _outputs(model, self.batches)

    def fails(self, change: Callable[[nn.Module], nn.Module]) -> str | None:
        """Why the changed copy that `change` makes of a network will not do, or None."""
        try:
            changed = change(self.model)
            apart = differences(self.expected, _outputs(changed, self.batches))
            with run_quietly(changed):  # with the shortcuts that torch may take
                self.batches[0](changed)
        except Exception as error:  # whatever a network may raise that misses something
            return f"the network breaks: {type(error).__name__}: {error}"
        if apart.small or self._same_in_double(change):
            return None
        return f"the outputs differ by {apart.relative:.0e}"

    def _same_in_double(self, change: Callable[[nn.Module], nn.Module]) -> bool:
        batches = [b.to(torch.float64) for b in self.batches]
        try:
            exact = copied(self.model).double()
            return differences(_outputs(exact, batches), _outputs(change(exact), batches)).small
        except Exception:  # it insists on its precision
            return False


def _outputs(model: nn.Module, batches: Sequence[Inputs]) -> list[list[Tensor]]:
    """What comes out on the first of the batches, and on the others if they can be run."""
    found: list[list[Tensor]] = []
    with run_quietly(model), plainly():
        for batch in batches:
            try:
                found.append(tensors_in(batch(model)))
            except Exception:  # whatever user code raises on random inputs
                if not found:
                    raise
    return found


def running(model: nn.Module, inputs: Inputs, names: Iterable[str]) -> set[str]:
    """Which of these modules run on the inputs."""
    seen: set[str] = set()
    named = ((name, model.get_submodule(name)) for name in names)
    hooks = (m.register_forward_hook(lambda *_, n=n: seen.add(n)) for n, m in named)
    with hooked(hooks), run_quietly(model):
        inputs(model)
    return seen


def still_read(changed: nn.Module, inputs: Inputs, names: Iterable[str]) -> str | None:
    """That code runs something else than the modules that took these places, or None."""
    names = set(names)
    if names == running(changed, inputs, names):
        return None
    return "the network keeps the layer itself elsewhere, as in a list, and runs that"
