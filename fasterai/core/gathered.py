"""What a criterion was told about a network on data, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .names import plain

__all__ = ["GATHERED", "Gathered"]

GATHERED = {  # what is gathered on data, and what it is
    "squared_gradient": "mean square of the gradients of batches",
    "fisher": "mean square of the gradients of single examples",
    "filter_taylor": "(sum of gradient * weight over a filter and all that goes with it) ** 2",
    "map_taylor": "absolute mean of activation * gradient over a feature map",
    "activation": "mean of a filter's activations",
    "zeros": "share of a filter's activations that are zero",
    "input_norm": "L2 norm of what a weight is multiplied with",
}


@dataclass(frozen=True, eq=False)
class Gathered:
    """What was gathered on data, for each need and parameter; never changed.

    Args:
        found: by need and name of the parameter, a tensor that broadcasts to the weight's shape.
        shapes: the shapes that the weights had.
    """

    found: Mapping[str, Mapping[str, Tensor]]
    shapes: Mapping[str, torch.Size]

    def __contains__(self, need: str) -> bool:
        return need in self.found

    def __call__(self, need: str, weight: Tensor, name: str, who: str) -> Tensor:
        """What is known of a weight, in its shape and on its device.

        Raises:
            ValueError: the weight has another shape now, or nothing was seen of it.
        """
        known = self.found[need]
        name = next((n for n in _names(name) if n in self.shapes), name)
        shape = self.shapes.get(name)
        if shape is not None and shape != weight.shape:
            raise ValueError(
                f"{who} was scored when {name} had the shape {tuple(shape)}, now it has "
                f"{tuple(weight.shape)}: score it again, the network was cut since"
            )
        if name not in known:
            raise ValueError(
                f"{who} knows nothing of {name}: no {need!r} was gathered there, for it is not "
                f"of the network that was scored, takes part in a way that cannot be watched, or "
                f"none of its units was measured. Leave its layer "
                f"out, as in exclude=[{name.rpartition('.')[0]!r}], or take "
                f"another criterion"
            )
        exact = torch.promote_types(weight.dtype, torch.float32)
        return known[name].to(weight.device, exact).expand(weight.shape)


def _names(name: str) -> tuple[str, ...]:
    """A parameter's name, also without what wraps the model."""
    bare = plain(name)
    return name, bare, bare.removeprefix("module.")
