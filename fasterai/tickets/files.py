"""Lottery tickets as safetensors files: masks as bits, weights as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.writing import digest, holds, replacing
from .masks import Masks

__all__ = ["read_ticket", "write_ticket"]

_FORMAT = "1"
_MASK, _WEIGHT = "mask/", "weight/"


def write_ticket(masks: Masks, weights: Mapping[str, Tensor], step: int, file: Path) -> None:
    """Write all of it or nothing: first under another name.

    Raises:
        ValueError: a weight of a type that such files do not hold.
    """
    for name, w in weights.items():
        if w.layout != torch.strided or not holds(w.dtype):
            kind = f"{w.layout}, {w.dtype}"
            raise ValueError(f"{name!r} is {kind}, which safetensors files do not hold")
    tensors = {f"{_MASK}{k}": _bits(mask) for k, mask in masks.items()}
    for name, w in weights.items():
        tensors[f"{_WEIGHT}{name}"] = w.detach().to("cpu", copy=True).contiguous()
    about = {"fasterai ticket": _FORMAT, "step": str(step), "shapes": json.dumps(masks.shapes)}
    about["digest"] = digest(tensors, about)
    with replacing(file) as part:
        save_file(tensors, part, about)


def read_ticket(file: Path) -> tuple[Masks, dict[str, Tensor], int]:
    """Masks, weights and the step.

    Raises:
        ValueError: the file is damaged, or no ticket.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            if about.get("fasterai ticket") != _FORMAT:
                raise ValueError(f"Ticket.save did not write it, in format {_FORMAT}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if about.get("digest") != digest(tensors, about):
            raise ValueError("what is in it has changed since it was written")
        step, shapes = int(about["step"]), json.loads(about["shapes"])
        if step < 0:
            raise ValueError(f"its step is {step}")
        weights = {k.removeprefix(_WEIGHT): x for k, x in tensors.items() if k.startswith(_WEIGHT)}
        masks = {k: _mask(tensors[f"{_MASK}{k}"], shape) for k, shape in shapes.items()}
        for name, mask in masks.items():
            if weights[name].shape != mask.shape:
                raise ValueError(f"the mask of {name!r} has another shape than its weight")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # whatever a damaged file makes the reader raise
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is damaged, or no ticket: {what}") from error
    return Masks(masks), weights, step


def _bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.flatten().numpy()))


def _mask(bits: Tensor, shape: Any) -> Tensor:
    size = prod(shape)
    if bits.dtype != torch.uint8 or bits.ndim != 1 or len(bits) != -(-size // 8):
        raise ValueError(f"{size} weights have {-(-size // 8)} bytes of masks, got {bits.shape}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=size)).view(shape)
