"""Copies of networks, also of such that keep what they computed."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["copied", "copied_with"]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a network.

    Raises:
        ValueError: it has none.
    """
    return copied_with(model, None)[0]


def copied_with(model: nn.Module, other: Any) -> tuple[nn.Module, Any]:
    """Deep copies of a network and of what refers to its parameters, such as its optimizer.

    Raises:
        ValueError: it has none.
    """
    made = {}  # by a forward, some layers keep what they computed from their weights
    for module in model.modules():
        for x in tree_leaves(vars(module)):
            if isinstance(x, Tensor) and not x.is_leaf:
                made[id(x)] = x.detach().clone()
    try:
        return copy.deepcopy((model, other), made)
    except Exception as error:  # whatever a network keeps that has no copy
        raise ValueError(
            f"the network cannot be copied ({type(error).__name__}: {error}): pass one that "
            f"copy.deepcopy takes"
        ) from error
