"""A state dict in which zeros take next to no room: each tensor in its smallest lossless form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .forms import encode

__all__ = ["DTYPES", "FORMAT", "PARTS", "PLAIN", "WORDS", "Entry", "packed", "words_of"]

FORMAT = "1"
_NAMES = """float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint64 uint32 uint16
    complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"""
DTYPES = {name: getattr(torch, name) for name in _NAMES.split() if hasattr(torch, name)}
PLAIN = set(_NAMES.split()[:10])  # these every reader of safetensors knows
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
PARTS = {"dense": ("",), "mask": ("mask", "values"), "same": ()}
PARTS |= dict.fromkeys(("gaps4", "gaps8"), ("gaps", "values"))


@dataclass(frozen=True)
class Entry:
    """What a file says of a tensor.

    Args:
        form: see `forms`; 'same': it is one with another tensor.
        dtype: by name.
        shape: of the tensor.
        order: its dimensions, from the outermost in memory to the innermost.
        of: the name of that other tensor.
    """

    form: str
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    of: str = ""

    def parts(self, name: str) -> dict[str, str]:
        """The name of each part of the tensor in the file."""
        return {part: f"{name}#{part}" if part else name for part in PARTS[self.form]}


def packed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that a file holds, and what it says of them but for the digest.

    Raises:
        TypeError: something is no dense tensor.
    """
    parts: dict[str, Tensor] = {}
    entries: dict[str, Entry] = {}
    first: dict[Any, str] = {}
    for name, x in state.items():
        _must_be_dense(name, x)
        x = x.detach()
        order, dtype = _order(x), str(x.dtype).removeprefix("torch.")
        looks = x.dtype, x.shape, x.stride(), x.is_conj(), x.is_neg()
        where = (x.data_ptr(), *looks) if x.numel() else name
        if first.setdefault((x.device, where), name) != name:
            of = first[x.device, where]
            entries[name] = Entry("same", dtype, tuple(x.shape), order, of)
            continue
        form, found = encode(words_of(x))
        entries[name] = Entry(form, dtype, tuple(x.shape), order)
        if form == "dense":
            found = {"": _dense(x)}
        for part, key in entries[name].parts(name).items():
            if key in parts:
                raise ValueError(f"two tensors of the state dict would be {key!r} in the file")
            parts[key] = found[part]
    about = {"format": "pt", "fasterai_sparse": FORMAT}
    about["tensors"] = json.dumps({name: asdict(entry) for name, entry in entries.items()})
    return parts, about


def _must_be_dense(name: Any, x: Any) -> None:
    plain = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
    if not plain or x.is_quantized or is_traceable_wrapper_subclass(x):
        kind = f"{x.layout} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"save_sparse takes dense tensors that hold numbers, {name!r} is {kind}")
    if str(x.dtype).removeprefix("torch.") not in DTYPES:
        raise TypeError(f"save_sparse does not know the type of {name!r}, {x.dtype}")
    if not isinstance(name, str) or name == "__metadata__":
        raise TypeError(f"save_sparse takes tensors by name, got {name!r}")


def _order(x: Tensor) -> tuple[int, ...]:
    """The dimensions from the outermost in memory to the innermost, where they lie without gaps."""
    order = sorted(range(x.ndim), key=lambda d: -x.stride(d))
    if x.is_contiguous() or not x.permute(order).is_contiguous():
        return tuple(range(x.ndim))
    return tuple(order)


def words_of(x: Tensor) -> Tensor:
    """The bits of a tensor, as integers (n,)."""
    x = x.resolve_conj().resolve_neg().cpu().contiguous().view(-1)
    if x.is_complex():
        x = torch.view_as_real(x).view(-1)
    return x.view(WORDS[x.itemsize])


def _dense(x: Tensor) -> Tensor:
    """A tensor as it is, in memory of its own; as integers, where not every reader knows it."""
    if str(x.dtype).removeprefix("torch.") not in PLAIN:
        return words_of(x).clone()
    return torch.empty(x.shape, dtype=x.dtype).copy_(x)
