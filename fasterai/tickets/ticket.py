"""A lottery ticket: masks, and the early weights from which what they keep trains on.

Frankle & Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", 2019,
https://arxiv.org/abs/1803.03635. Rewinding to a step soon after the start: Frankle et al., "Linear
Mode Connectivity and the Lottery Ticket Hypothesis", 2020, https://arxiv.org/abs/1912.05671.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ..core.names import plain, tensors_by_name, unwrapped
from ..core.overwrite import overwrite
from ..core.writing import writable
from ..sparse.keep import difference, parameters_like
from .files import read_ticket, write_ticket
from .masks import Masks

__all__ = ["Ticket"]


@dataclass(frozen=True, eq=False)
class Ticket:
    """Which weights of a network are kept, and what all of them were at some step of training.

    ```python
    ticket.load_into(model)                       # those weights, with zeros where masks say so
    ticket.save("ticket.safetensors")
    Ticket.load("ticket.safetensors").sparsity
    ```

    Args:
        masks: which weights are kept.
        weights: the state of the whole network, dense: parameters and buffers, not to be changed.
        step: after how many training steps that was; training goes on from there.
    """

    masks: Masks
    weights: Mapping[str, Tensor] = field(repr=False)
    step: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.masks, Masks):
            raise TypeError(f"a ticket has Masks, got {type(self.masks).__name__}")
        for name, shape in self.masks.shapes.items():
            if name not in self.weights or tuple(self.weights[name].shape) != shape:
                raise ValueError(f"the weights hold no {name!r} of shape {shape}")
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    def __reduce__(self) -> tuple[type[Ticket], tuple[Any, ...]]:
        return Ticket, (self.masks, dict(self.weights), self.step)

    @property
    def sparsity(self) -> float:
        """The share of the masked weights that is zero."""
        return self.masks.sparsity

    def load_into(self, model: nn.Module) -> nn.Module:
        """Give a model the weights of this ticket, its zeros included, and return it.

        Raises:
            ValueError: another network; nothing was changed.
        """
        parameters_like(self.masks.shapes, model)
        restore(self.weights, model)
        return self.masks.apply_to(model)

    def reinitialised(self, fresh: nn.Module) -> Ticket:
        """The control of Frankle & Carbin: these masks on the weights of another fresh model.

        Its training starts from step 0. If it does as well as the ticket, the masks alone matter,
        not the weights that they were found with.

        Args:
            fresh: built anew, as the first one was.
        """
        parameters_like(self.masks.shapes, fresh)
        return Ticket(self.masks, snapshot(fresh))

    def with_masks(self, masks: Masks) -> Ticket:
        """These weights under other masks: of another ticket, or an intersection or union."""
        return Ticket(masks, self.weights, self.step)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a safetensors file: nothing in it can run code when it is read.

        A file of that name is replaced when all is written.
        """
        write_ticket(self.masks, self.weights, self.step, writable(file))

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Ticket:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged, or no ticket.
        """
        return cls(*read_ticket(Path(file)))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's parameters and buffers, on the CPU."""
    return {
        name: value.detach().to("cpu", copy=True).as_subclass(Tensor).contiguous()
        for name, value in _state(model).items()
    }


def restore(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Write a `snapshot` back; it may lack buffers that no state dict holds, which stay.

    Raises:
        ValueError: the model has other tensors; nothing was changed.
    """
    needed = {plain(name) for name in unwrapped(model).state_dict()}
    state = {k: v for k, v in _state(model).items() if k in needed or k in weights}
    here = {name: tuple(value.shape) for name, value in state.items()}
    there = {name: tuple(value.shape) for name, value in weights.items()}
    if here != there:
        raise ValueError(f"the weights are those of another network: {difference(there, here)}")
    for name, value in state.items():
        if value.dtype != weights[name].dtype:
            raise ValueError(
                f"{name!r} is {value.dtype} in the model, {weights[name].dtype} in the ticket: "
                f"convert the model first"
            )
    overwrite(state, weights)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that no state dict holds, without names of wrappers."""
    return tensors_by_name(unwrapped(model))
