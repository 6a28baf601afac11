"""Granularities: which elements of a weight are zeroed together.

A conv weight has the dimensions `o i h w` (out, in, height, width), a linear weight `o i`. A
granularity is the set of dimensions that index its groups; a group holds all elements along the
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor, nn

__all__ = ["NAMES", "Granularity", "dimensions", "maskable_types"]

_DIMENSIONS: dict[type[nn.Module], str] = {nn.Conv2d: "oihw", nn.Linear: "oi"}

NAMES: dict[str, dict[str, str]] = {
    "oihw": {
        "weight": "oihw",
        "shared_weight": "ihw",
        "channel": "ohw",
        "column": "oiw",
        "vector": "oiw",
        "row": "oih",
        "kernel": "oi",
        "filter": "o",
        "shared_channel": "hw",
        "shared_column": "iw",
        "shared_row": "ih",
        "vertical_slice": "ow",
        "horizontal_slice": "oh",
        "shared_vertical_slice": "w",
        "shared_horizontal_slice": "h",
        "shared_kernel": "i",
        "layer": "",
    },
    "oi": {"weight": "oi", "row": "o", "filter": "o", "column": "i", "layer": ""},
}


def maskable_types() -> tuple[type[nn.Module], ...]:
    """Layer types whose weights have granularities."""
    return tuple(_DIMENSIONS)


def dimensions(layer: nn.Module) -> str | None:
    """The named dimensions of a layer's weight (`'oihw'`, `'oi'`); None for other layers."""
    return next((dims for kind, dims in _DIMENSIONS.items() if isinstance(layer, kind)), None)


@dataclass(frozen=True)
class Granularity:
    """A named granularity, or a set of dimensions such as `'o h'`.

    `'filter'` (or the bare `'o'`) is special: its groups are the units of the network, the rows
    that must go together so that they can be removed.

    Raises:
        ValueError: neither a known name nor a set of the dimensions o, i, h, w.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"granularity must be a string, got {self.name!r}")
        known = sorted({name for names in NAMES.values() for name in names})
        letters = self.name.split()
        as_set = letters and set(letters) <= set("oihw") and len(set(letters)) == len(letters)
        if self.name not in known and not as_set:
            near = get_close_matches(self.name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"unknown granularity {self.name!r}{hint} Known: {', '.join(known)}, or a set of "
                f"the dimensions o, i, h, w such as 'o h'"
            )

    @property
    def is_filter(self) -> bool:
        """Whether its groups are units (see `fasterai.coupling`)."""
        return self.name in ("filter", "o")

    def along(self, dims: str) -> tuple[int, ...] | None:
        """Positions in `dims` that index the groups; None where such a weight has no such groups.

        `Granularity('row').along('oihw')` is `(0, 1, 2)`.
        """
        named = NAMES[dims].get(self.name)
        letters = named if named is not None else "".join(self.name.split())
        if named is None and (self.name in NAMES["oihw"] or not set(letters) <= set(dims)):
            return None
        return tuple(d for d, letter in enumerate(dims) if letter in letters)


def over_groups(values: Tensor, along: tuple[int, ...], how: str) -> Tensor:
    """Reduce `values` to one number per group, kept broadcastable: `how` is 'mean', 'sum', 'any'.

    A weight of shape (64, 3, 7, 7) at `along=(0,)` gives (64, 1, 1, 1).
    """
    others = tuple(d for d in range(values.ndim) if d not in along)
    if not others:
        return values
    return getattr(values, how)(dim=others, keepdim=True)
