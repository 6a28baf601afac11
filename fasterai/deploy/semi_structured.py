"""Linear layers whose weights are 2:4, two zeros in each four in a row, on GPUs that skip those."""

from __future__ import annotations

import warnings
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from ..core.copies import copied
from ..core.names import unwrapped

__all__ = ["semi_structured"]

_TYPES = {torch.float16, torch.bfloat16, torch.int8}
_NEEDS = "an NVIDIA GPU of compute capability 8.0 or more (Ampere and later)"


def semi_structured(model: nn.Module) -> tuple[nn.Module, pd.DataFrame]:
    """A copy of a network whose 2:4 linear layers use the GPU's sparse matrix units.

    Their weights become torch's semi-structured tensors, which hold half of the numbers. Make them
    with `SparsifyCallback(0.5, granularity='2:4')`. The copy is for inference.

    Args:
        model: a network on a GPU, in float16 or bfloat16; it is left as it was.

    Returns:
        The copy, and a table: `layer` and, where it stays dense, the `reason`.

    Raises:
        RuntimeError: this machine cannot do it; what is missing is named.
    """
    model = unwrapped(model)
    missing = _missing(model)
    if missing:
        raise RuntimeError(f"2:4 sparsity needs {_NEEDS}: {missing}")
    changed = copied(model).requires_grad_(False)
    rows = []
    for name, layer in changed.named_modules():
        if isinstance(layer, nn.Linear):
            reason = _unfit(layer) or _convert(layer)
            rows.append((name, reason))
    return changed, pd.DataFrame(rows, columns=["layer", "reason"])


def _missing(model: nn.Module) -> str | None:
    """What keeps this machine from it, or this model."""
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    devices = {p.device for p in model.parameters()}
    for device in devices:
        if device.type != "cuda":
            return f"the model is on {device}, pass model.to('cuda')"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    return None


def _unfit(layer: nn.Linear) -> str | None:
    """Why a layer cannot become 2:4, or None."""
    weight = layer.weight.detach()
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} may read its weight in another way"
    if weight.dtype not in _TYPES:
        return f"its weight is {weight.dtype}: use model.bfloat16() or model.half()"
    if not _is_two_of_four(weight):
        return "its weight is not 2:4"
    return None


def _is_two_of_four(weight: Tensor) -> bool:
    """Whether at least two of each four consecutive inputs of (out, in) are zero."""
    if weight.ndim != 2 or weight.shape[1] % 4 or not weight.numel():
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())


def _convert(layer: nn.Linear) -> str:
    """Compress a layer's weight; why it cannot be done, or ''."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this layout is a prototype
        try:
            sparse: Any = to_sparse_semi_structured(layer.weight.detach().contiguous())
        except (RuntimeError, ValueError) as error:  # its size, as a rule
            return f"torch cannot compress it: {error}"
    layer.weight = nn.Parameter(sparse, requires_grad=False)
    return ""
