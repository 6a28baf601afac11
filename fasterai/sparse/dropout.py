"""Less dropout where fewer connections are left.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015,
https://arxiv.org/abs/1506.02626, eq. 2: a layer that was trained with the dropout rate `D` and `C`
connections is trained on with `D * sqrt(C_after / C)`, since the connections of a layer grow with
the square of the neurons that dropout works on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..core.granularity import dimensions
from ..core.names import plain, unknown_name, unwrapped
from ..coupling.hooks import hooked
from ..coupling.inputs import Inputs, run_quietly

__all__ = ["RescaledDropout", "connections", "rescale_dropout"]


class RescaledDropout:
    """Dropout rates that were changed; `undo()`, or the end of a `with`, gives the old ones back.

    Attributes:
        rates: for each dropout module its layer, and its rate before and after.
    """

    def __init__(
        self, modules: Mapping[str, _DropoutNd], rates: Mapping[str, tuple[str, float, float]]
    ) -> None:
        self.rates = dict(rates)
        self._modules = dict(modules)
        for name, (_, _, after) in self.rates.items():
            self._modules[name].p = after

    def undo(self) -> None:
        """Give every dropout the rate back that it had."""
        for name, (_, before, _) in self.rates.items():
            self._modules[name].p = before

    def __enter__(self) -> RescaledDropout:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def rescale_dropout(
    model: nn.Module, example_inputs: Any, *, before: Mapping[str, int] | None = None
) -> RescaledDropout:
    """Multiply each dropout rate by the root of the share of connections that its layer has left.

    ```python
    with rescale_dropout(learn.model, dls.one_batch()[0]):
        learn.fit(5, 1e-4)  # at a lower rate than before
    ```
    The layer of a dropout is the one whose outputs it drops: of the layers with weights the last
    that runs before it, or where there is none the first that runs behind. Only dropout modules
    are seen, no `functional.dropout`. To rescale again once more is pruned, `undo()` first, or pass
    the `connections` of before.

    Args:
        model: any network.
        example_inputs: what its forward takes.
        before: connections of the layers as they were, as `connections(model)` counted them; by
            default all of their weights. Needed where channels were removed.

    Raises:
        ValueError: a model without dropout; layers that are unknown or had fewer connections.
            Nothing was changed.
    """
    network = unwrapped(model)
    owners = _owners(network, Inputs.fitting(network, example_inputs))
    if not owners:
        raise ValueError("the model has no dropout module that runs on these inputs")
    after = connections(network)
    counts = _sizes(network) if before is None else dict(before)
    rates, modules = {}, dict(network.named_modules())
    for name, layer in owners.items():
        if layer not in counts:
            raise ValueError(unknown_name(layer, counts, "before"))
        if not after[layer] <= counts[layer]:
            raise ValueError(
                f"layer {layer!r} has {after[layer]} connections, more than the {counts[layer]} "
                f"before: pass connections(model) of the dense network"
            )
        rate = modules[name].p
        rates[plain(name)] = (layer, rate, rate * math.sqrt(after[layer] / max(counts[layer], 1)))
    return RescaledDropout({plain(n): modules[n] for n in owners}, rates)


def connections(model: nn.Module) -> dict[str, int]:
    """The weights of each layer that are not zero, biases not counted."""
    return {
        name: sum(int(w.count_nonzero()) for w in weights)
        for name, weights in _weights(unwrapped(model)).items()
    }


def _sizes(network: nn.Module) -> dict[str, int]:
    return {name: sum(w.numel() for w in own) for name, own in _weights(network).items()}


def _weights(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    found = {}
    for name, module in network.named_modules():
        own = [module._parameters.get(key) for key in dimensions(module)]
        if any(w is not None for w in own):
            found[plain(name)] = [w for w in own if w is not None]
    return found


def _owners(network: nn.Module, inputs: Inputs) -> dict[str, str]:
    """For each dropout module by name the layer whose outputs it drops."""
    layers = _weights(network)
    order: list[str] = []
    hooks = (
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in network.named_modules()
        if isinstance(module, _DropoutNd) or plain(name) in layers
    )
    with hooked(hooks), run_quietly(network):
        inputs(network)
    seen = [(name, plain(name) in layers) for name in order]
    found: dict[str, str] = {}
    for at, (name, is_layer) in enumerate(seen):
        if not is_layer and name not in found:
            ahead = [plain(k) for k, layer in seen[:at] if layer][-1:]
            behind = [plain(k) for k, layer in seen[at:] if layer][:1]
            if ahead or behind:
                layer = (ahead or behind)[0]
                last = f"{layer}.out_proj"  # of attention, which does not run it
                found[name] = last if last in layers else layer
    return found
