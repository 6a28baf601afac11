"""Files in which zeros take no room: each tensor in its smallest lossless form."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.forms import decode
from ..core.names import unwrapped
from ..core.overwrite import overwrite
from ..core.packing import DTYPES, FORMAT, PARTS, PLAIN, WORDS, Entry, packed
from ..core.writing import replacing, writable

__all__ = ["SparseFileError", "load_sparse", "save_sparse"]

_COLUMNS = 1021, 8191  # primes: what is mixed up, or changed twice, falls into other columns
_Path = str | os.PathLike[str]

# whatever reading leads to that was not written
_DAMAGE = (SafetensorError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError)
_DAMAGE += (TypeError, ValueError)


class SparseFileError(ValueError):
    """A file that is damaged or foreign, or does not fit the model; nothing was changed."""


def save_sparse(model: nn.Module | Mapping[str, Tensor], file: _Path) -> None:
    """Write a network's tensors to a safetensors file in which zeros take next to no room.

    Each tensor takes the smallest of these forms: as it is; its values and a bit for each element;
    its values and the gaps between them. Every bit is kept, those of -0.0 and nan, too, and which
    tensors are one. Dense tensors can be read with any reader of safetensors. A file of that name
    is replaced when all is written.

    Args:
        model: the network, or its state dict.
        file: where to.

    Raises:
        TypeError: something is no dense tensor.
        OSError: no file can be written there.
    """
    state = unwrapped(model).state_dict() if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        raise TypeError(
            f"save_sparse takes a network or its state dict, got {type(state).__name__}"
        )
    file = writable(file)
    parts, about = packed(state)
    about["digest"] = _digest(parts, about)
    with replacing(file) as part:
        save_file(parts, part, about)


def load_sparse(file: _Path, model: nn.Module | None = None) -> Any:
    """Read what `save_sparse` wrote, bit by bit the same.

    Nothing in a file can run code. Parameters and buffers of a model stay the same objects, on
    their device. Without a model, dense tensors are mapped from the file, as safetensors does it.

    Args:
        file: the file.
        model: a network with tensors of the same names, shapes and types.

    Returns:
        The model; or, without one, the state dict, on the CPU.

    Raises:
        SparseFileError: the file is damaged or foreign, or does not fit the model, which is as it
            was.
    """
    if isinstance(file, nn.Module):
        raise TypeError("the file comes first, as in load_sparse('sparse.safetensors', model)")
    if os.path.isdir(file):
        raise SparseFileError(f"{os.fspath(file)} is a folder: name a file in it")
    try:
        if model is None:
            return _read(file)
        targets = _targets(unwrapped(model))
        overwrite(targets, _read(file, targets))
    except _DAMAGE as error:
        raise SparseFileError(f"{os.fspath(file)} was not loaded: {error}") from error
    return model


# --- writing -------------------------------------------------------------------------------------


def _digest(parts: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Tells damage: a hash of what is said, and of the sums of bytes in columns, 8 at a time.

    A hash of all bytes would take longer than the rest of reading.
    """
    said = {k: v for k, v in about.items() if k != "digest"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(parts):
        x = parts[name]
        digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        flat = x.reshape(-1).as_strided((x.numel(),), (1,))  # a single element may have any stride
        data = flat.view(torch.uint8).numpy()
        for columns in _COLUMNS:
            whole = len(data) // (8 * columns) * 8 * columns
            rows = data[:whole].view(np.uint64).reshape(-1, columns)
            digest.update(rows.sum(0, dtype=np.uint64).tobytes())
            digest.update(data[whole:].tobytes())
    return digest.hexdigest()


# --- reading -------------------------------------------------------------------------------------


def _read(file: _Path, targets: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict in a file; what is dense there is mapped, or copied where it is for targets.

    Whether it fits these is seen before zeros take any room.
    """
    with safe_open(os.fspath(file), "pt") as content:
        about = content.metadata() or {}
        if about.get("fasterai_sparse") != FORMAT:
            kind = "load_pruned reads it" if "fasterai" in about else "it is not from save_sparse"
            raise ValueError(kind)
        names = content.keys()
        parts = {name: content.get_tensor(name) for name in names}
    if _digest(parts, about) != about.get("digest"):
        raise ValueError("it is damaged")
    entries = {name: _entry(said) for name, said in json.loads(about["tensors"]).items()}
    named = [key for name, entry in entries.items() for key in entry.parts(name).values()]
    if sorted(named) != sorted(parts):
        raise ValueError("it does not hold the tensors that it lists")
    if targets is not None:
        _must_fit(entries, targets)
    state: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if entry.form == "same":
            state[name] = _same(state[entry.of], entry)
        else:
            own = {part: parts[key] for part, key in entry.parts(name).items()}
            x = _tensor(entry, own)
            state[name] = x.clone() if entry.form == "dense" and targets is not None else x
    return state


def _entry(said: Any) -> Entry:
    """What a file says of a tensor, if it makes sense."""
    entry = Entry(**{k: tuple(v) if isinstance(v, list) else v for k, v in said.items()})
    shape, order = entry.shape, entry.order
    if entry.form not in PARTS or entry.dtype not in DTYPES or not isinstance(entry.of, str):
        raise ValueError("it uses a form or a type that this version does not know")
    if not all(type(n) is int and n >= 0 for n in shape) or prod(shape) >= 1 << 60:
        raise ValueError(f"{shape} is not the shape of a tensor")
    if sorted(order) != list(range(len(shape))):
        raise ValueError(f"{order} is not an order of {len(shape)} dimensions")
    return entry


def _same(x: Tensor, entry: Entry) -> Tensor:
    if (tuple(x.shape), x.dtype) != (entry.shape, DTYPES[entry.dtype]):
        raise ValueError(f"it holds {entry.of!r} with two shapes or types")
    return x


def _tensor(entry: Entry, parts: Mapping[str, Tensor]) -> Tensor:
    """The tensor of which these are the parts."""
    dtype = DTYPES[entry.dtype]
    if entry.form == "dense" and entry.dtype in PLAIN:
        x = parts[""]
        if (tuple(x.shape), x.dtype) != (entry.shape, dtype):
            raise ValueError("it holds a tensor of another shape or type than it says")
    else:
        size = dtype.itemsize // (2 if dtype.is_complex else 1)
        n = prod(entry.shape) * (dtype.itemsize // size)
        x = parts[""] if entry.form == "dense" else decode(entry.form, parts, n)
        if x.dtype != WORDS[size] or tuple(x.shape) != (n,):
            raise ValueError("it holds a tensor of another size than it says")
        x = _numbers(x, dtype).view(entry.shape)
    if dtype == torch.bool and x.numel() and int(x.view(torch.uint8).max()) > 1:
        raise ValueError("it holds bools that are neither true nor false")
    if entry.order != tuple(range(x.ndim)):
        inner = x.permute(entry.order)
        x = torch.empty(inner.shape, dtype=dtype).copy_(inner).permute(_inverse(entry.order))
    return x


def _numbers(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Bits as numbers of this type."""
    if dtype.is_complex:
        return torch.view_as_complex(words.view(dtype.to_real()).view(-1, 2))
    return words.view(dtype)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


# --- into a model --------------------------------------------------------------------------------


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model that its state dict holds."""
    own = {id(x) for x in (*model.parameters(), *model.buffers())}
    targets = model.state_dict(keep_vars=True)
    for name, x in targets.items():
        if id(x) not in own:
            raise ValueError(
                f"{name!r} is made by the model's state_dict and is none of its tensors: pass no "
                f"model, and what comes to model.load_state_dict"
            )
    return targets


def _must_fit(entries: Mapping[str, Entry], targets: Mapping[str, Tensor]) -> None:
    for only, where in ((entries.keys() - targets, "model"), (targets.keys() - entries, "file")):
        if only:
            raise ValueError(f"the {where} has no {', '.join(sorted(only)[:3])}")
    for name, target in targets.items():
        shape, dtype = entries[name].shape, DTYPES[entries[name].dtype]
        if (shape, dtype) != (tuple(target.shape), target.dtype) or target.is_meta:
            raise ValueError(
                f"{name!r} is {tuple(target.shape)} {target.dtype} on {target.device} in the "
                f"model, {shape} {dtype} in the file"
            )
