"""New numbers in place of a network's: in all of its tensors, or in none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from .packing import words_of

__all__ = ["overwrite"]


@torch.no_grad()
def overwrite(tensors: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Copy numbers into tensors.

    Args:
        tensors: by name; several of them may be one, or share memory.
        new: numbers of the same shapes, by the same names.

    Raises:
        ValueError: a tensor that holds other numbers and cannot be written to, or one that shares
            memory with another that is to hold others; all of them are as they were.
    """
    before: dict[str, Tensor] = {}
    for name, x in tensors.items():
        problem = _unwritable(x)
        if not problem:
            before[name] = x.clone()
        elif x.is_meta or not _holds(x, new[name]):
            raise ValueError(f"{name!r} {problem}")
    try:
        for name in before:
            tensors[name].copy_(new[name])
        _must_hold(tensors, new)
    except BaseException:  # an interrupt must not leave half of them
        for name, x in before.items():
            tensors[name].copy_(x)
        raise


def _unwritable(x: Tensor) -> str:
    """Why nothing can be written into a tensor, or ''."""
    if x.is_meta:
        return "is on the meta device: model.to_empty(device='cpu') first"
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode(): build the model outside, or take a copy"
    if any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True)):
        return "shows one number in many places, as expand() does: make it tensor.clone()"
    return ""


def _must_hold(tensors: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Check that what was written into memory that is shared was not written over."""
    memory = {name: (x.device, x.untyped_storage().data_ptr()) for name, x in tensors.items()}
    owners = Counter(memory.values())
    for name, x in tensors.items():
        if owners[memory[name]] > 1 and not _holds(x, new[name]):
            raise ValueError(f"{name!r} is tied in the model, and gets numbers of its own")


def _holds(x: Tensor, numbers: Tensor) -> bool:
    return torch.equal(words_of(x), words_of(numbers.to(x)))
