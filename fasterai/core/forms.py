"""Tensors of many zeros in few bytes, without loss: a mask of bits, or gaps, and the values.

A tensor is taken for the words of bits that it consists of, so that -0.0 and every nan are kept:
only the word of zeros is left out. A gap is the distance to the next value, in a code of 4 or 8
bits; where it is longer than 15 or 255, code 0 goes that far without a value (Han et al., 2016,
arXiv 1510.00149, sec. 2, store a zero there).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["decode", "encode"]

_GAPS = {"gaps8": 8, "gaps4": 4}  # bits of a code
_WORTH = 0.9  # codes of 4 bits take twice as long to read: they have to save a tenth
_CODES, _BITS = 1 << 14, 1 << 17  # read at a time, so that all stays in the processor's cache


def encode(words: Tensor) -> tuple[str, dict[str, Tensor]]:
    """The smallest form of a tensor, and its parts by name.

    Args:
        words: (n,) int, its bits.

    Returns:
        'dense', which has no parts; 'mask' with `mask`, a bit for each word, and `values`; 'gaps4'
        or 'gaps8' with `gaps` and `values`.
    """
    flat = words.numpy()
    n, filled = len(flat), int(np.count_nonzero(flat))
    found: dict[str, dict[str, Tensor]] = {"dense": {}}
    sizes = {"dense": n * flat.itemsize, "mask": -(-n // 8) + filled * flat.itemsize}
    if filled <= n / 4:  # else a bit for each word is less
        at = np.flatnonzero(flat)
        values = torch.from_numpy(flat[at])
        for form, bits in _GAPS.items():
            found[form] = {"gaps": torch.from_numpy(_gaps(at, n, bits)), "values": values}
            sizes[form] = len(found[form]["gaps"]) + filled * flat.itemsize
        if sizes["gaps4"] > _WORTH * min(sizes["mask"], sizes["gaps8"]):
            del sizes["gaps4"]
    form = min(sizes, key=sizes.__getitem__)
    if form == "mask":
        there = flat != 0
        bits = torch.from_numpy(np.packbits(there, bitorder="little"))
        return form, {"mask": bits, "values": torch.from_numpy(flat[there])}
    return form, found[form]


def decode(form: str, parts: Mapping[str, Tensor], n: int) -> Tensor:
    """The words (n,) that `encode` made these parts of, but for dense ones.

    Raises:
        ValueError: they are not such parts.
    """
    values = parts["values"]
    for part, x in parts.items():
        _checked(x, x.ndim == 1 and (part == "values" or x.dtype == torch.uint8))
    where = _by_mask(parts["mask"], n) if form == "mask" else _by_gaps(parts["gaps"], n, form)
    out = torch.from_numpy(np.zeros(n, values.numpy().dtype))  # numpy asks for large pages
    done = 0
    for at in where:
        here = values[done : done + len(at)]
        _checked(here, len(here) == len(at))
        if len(at):
            _checked(at, int(at[-1]) < n)
            out.scatter_(0, at, here)
        done += len(at)
    return _checked(out, done == len(values))


def _checked(x: Tensor, good: bool) -> Tensor:
    if not good:
        raise ValueError("its parts do not belong together")
    return x


def _gaps(at: np.ndarray, n: int, bits: int) -> np.ndarray:
    """Codes (uint8) of the distances between values at these places, and up to the last of n."""
    most = (1 << bits) - 1
    steps = np.diff(at, prepend=-1)
    skips = (steps - 1) // most
    left = n - 1 - (int(at[-1]) if len(at) else -1)
    codes = np.zeros(len(at) + int(skips.sum()) + -(-left // most), np.uint8)
    codes[np.cumsum(skips + 1) - 1] = steps - most * skips
    if bits == 8:
        return codes
    codes = np.pad(codes, (0, len(codes) % 2))
    return codes[::2] | codes[1::2] << 4


def _by_gaps(gaps: Tensor, n: int, form: str) -> Iterator[Tensor]:
    """The places of values, some at a time."""
    bits = _GAPS[form]
    most, end = (1 << bits) - 1, -1
    _checked(gaps, n <= most * len(gaps) * (8 // bits))
    for codes in gaps.split(_CODES):
        if bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), 1).flatten()
        skip = codes == 0
        skips = bool(skip.any())
        steps = codes.masked_fill(skip, most) if skips else codes
        at = steps.cumsum(0, dtype=torch.int64).add_(end)
        end = int(at[-1])
        yield at[~skip] if skips else at
    _checked(gaps, n - 1 <= end < n - 1 + 2 * most)


def _by_mask(mask: Tensor, n: int) -> Iterator[Tensor]:
    """The places of values, some at a time."""
    _checked(mask, len(mask) == -(-n // 8))
    for i, some in enumerate(mask.split(_BITS // 8)):
        there = np.unpackbits(some.numpy(), bitorder="little").view(bool)
        yield torch.from_numpy(np.flatnonzero(there)).add_(i * _BITS)
