"""Whether a saved model fits into one at hand."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import nn

from ..core.names import unwrapped

__all__ = ["unlike_tensors"]


def unlike_tensors(file: str | PathLike[str], model: nn.Module, show: int = 3) -> str:
    """The tensors whose shapes differ between a file of `learn.save` and a model, in words.

    Only shapes are read. Like `SaveModelCallback` this unpickles the file, so that it must be one
    of your own. Without a file, or where all fit, the answer is empty.

    Args:
        file: with or without the optimizer's state.
        model: wrapped or not.
        show: how many are named, at most.
    """
    if not Path(file).exists():
        return ""
    saved = torch.load(file, map_location="meta", weights_only=False)
    saved = saved["model"] if set(saved) == {"model", "opt"} else saved
    here = unwrapped(model).state_dict()
    found = [
        f"{name}: {_shape(saved.get(name))} in the file, {_shape(here.get(name))} here"
        for name in dict.fromkeys([*here, *saved])
        if _shape(saved.get(name)) != _shape(here.get(name))
    ]
    more = [f"and {len(found) - show} more"] if len(found) > show else []
    return "; ".join(found[:show] + more)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else "no tensor"
