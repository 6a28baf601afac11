"""Granularities: which elements of a weight are zeroed together.

The dimensions of a weight have names: `o i h w` (outputs, inputs, height, width) in a conv, `o i`
in a linear layer. A granularity says what a group takes of each dimension: one position, a block of
them or all. Where a conv is grouped, the names are those of its weight's dimensions: `i` counts the
inputs of one part (in a transposed conv `o` counts the outputs of one part).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, nn

__all__ = ["Granularity", "granularities", "register"]

_PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

_DIMENSIONS: dict[type[nn.Module], dict[str, str]] = {
    nn.Conv1d: {"weight": "oiw"},
    nn.Conv2d: {"weight": "oihw"},
    nn.Conv3d: {"weight": "oidhw"},
    nn.ConvTranspose1d: {"weight": "iow"},
    nn.ConvTranspose2d: {"weight": "iohw"},
    nn.ConvTranspose3d: {"weight": "iodhw"},
    nn.Linear: {"weight": "oi"},
    nn.MultiheadAttention: dict.fromkeys(_PACKED, "oi"),  # its out_proj is a Linear of its own
    nn.Embedding: {"weight": "vo"},  # vocabulary entries, features
    nn.EmbeddingBag: {"weight": "vo"},
}
_ON_REQUEST = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?(_raw)?")  # raw: before dropout

_KERNEL = set("dhw")
_ALL = "*"
_CONV = {  # what a group spans; it indexes the other dimensions
    "weight": "",
    "shared_weight": "o",
    "channel": "i",
    "column": "h",
    "vector": "h",
    "row": "w",
    "kernel": "dhw",
    "filter": "idhw",
    "shared_channel": "oi",
    "shared_column": "oh",
    "shared_row": "ow",
    "vertical_slice": "ih",
    "horizontal_slice": "iw",
    "shared_vertical_slice": "oih",
    "shared_horizontal_slice": "oiw",
    "shared_kernel": "odhw",
    "layer": _ALL,
}
_MATRIX = {"weight": "", "row": "i", "filter": "i", "column": "o", "layer": _ALL}
_TABLE = {"weight": "", "row": "o", "filter": "v", "column": "v", "layer": _ALL}


def granularities(layer: nn.Module | str) -> dict[str, str]:
    """The granularities of a layer, or of a weight's dimensions, by name.

    Each comes with the dimensions that index its groups: `granularities('oihw')['kernel']` is
    `'oi'`. A 1-d conv has no columns; in a 3-d conv a row runs along the width, a column along the
    height. The rows of an embedding are its vocabulary entries (`v`), its columns features (`o`).
    """
    if isinstance(layer, nn.Module):
        return granularities(next(iter(dimensions(layer).values()), ""))
    named = _TABLE if "v" in layer else _CONV if set(layer) & _KERNEL else _MATRIX
    found = {}
    for name, spans in named.items():
        if layer and _spans(spans) <= set(layer):
            found[name] = "".join(d for d in layer if d not in spans and spans != _ALL)
    return found


def _spans(letters: str) -> set[str]:
    """The dimensions that must be there; of a kernel's, any will do."""
    return set(letters) - {_ALL} - (_KERNEL if set(letters) >= _KERNEL else set())


def register(layer_type: type[nn.Module], dims: str | Mapping[str, str]) -> None:
    """Say what the dimensions of a layer type's weight are; from then on it is sparsified.

    ```python
    register(Experts, "e o i")  # a weight of shape (experts, outputs, inputs)
    register(Tied, {"encoder": "o i", "decoder": "i o"})
    ```
    Use `o`, `i`, `d`, `h`, `w` for outputs, inputs, depth, height and width: granularities by name
    and N:M patterns follow from them. Any other letter counts positions of its own, and every
    letter can stand in a set such as `'e o'`. Subclasses are covered. What is registered holds
    until Python ends.

    Args:
        layer_type: a subclass of `torch.nn.Module`.
        dims: a letter for each dimension of its `weight`, or {parameter name: letters}.

    Raises:
        TypeError: `layer_type` is no module type, or `dims` neither letters nor a mapping.
        ValueError: `dims` are not distinct lower-case letters.
    """
    if not isinstance(layer_type, type) or not issubclass(layer_type, nn.Module):
        raise TypeError(f"register takes a type of torch.nn.Module first, got {layer_type!r}")
    if not isinstance(dims, str | Mapping):
        raise TypeError(
            f"dims must be letters, such as 'o i', or {{parameter: letters}}, got {dims!r}"
        )
    given = {"weight": dims} if isinstance(dims, str) else dict(dims)
    named = {}
    for parameter, spelled in given.items():
        letters = "".join(spelled.split()) if isinstance(spelled, str) else ""
        if not re.fullmatch(r"[a-z]+", letters) or len(set(letters)) < len(letters):
            raise ValueError(
                f"dims of {layer_type.__name__}.{parameter} must be a different letter for each "
                f"dimension, such as 'o i h w', got {spelled!r}"
            )
        named[parameter] = letters
    if not named:
        raise ValueError(
            f"dims of {layer_type.__name__} must name at least one parameter, got {{}}"
        )
    _DIMENSIONS[layer_type] = named


def maskable(layer: nn.Module, on_request: bool = False) -> bool:
    """Whether the weights of a layer have granularities; with those that must be asked for."""
    return bool(dimensions(layer)) and (on_request or _registered(layer) not in _ON_REQUEST)


def maskable_kinds() -> str:
    """What is maskable without being asked for, in words, for messages."""
    names = [kind.__name__ for kind in _DIMENSIONS if kind not in _ON_REQUEST]
    return f"{', '.join(names)} and recurrent layers"


def dimensions(layer: nn.Module) -> dict[str, str]:
    """The named dimensions of a layer's weights: `{'weight': 'oihw'}`; empty for other layers.

    Recurrent layers, also those of fastai whose weights drop out, are known by their parameters.
    """
    kind = _registered(layer)
    if kind is not None:
        return _DIMENSIONS[kind]
    names = *layer._parameters, *getattr(layer, "parametrizations", ())
    return {name: "oi" for name in names if _RECURRENT.fullmatch(name)}


def _registered(layer: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in type(layer).__mro__ if kind in _DIMENSIONS), None)


@dataclass(frozen=True)
class Granularity:
    """A named granularity, a set of dimensions, blocks, or an N:M pattern.

    - `'kernel'`, `'row'`, ...: see `granularities`. `'filter'` (or the bare `'o'`) is special: its
      groups are the units of the network, the rows that go together so that they can be removed.
    - `'o h'`: the dimensions that index the groups; a group spans the others.
    - `'o/16 i'`: blocks, here of 16 outputs, a single input and all positions of a kernel. The last
      block is smaller where the outputs are no multiple of 16.
    - `'2:4'`: of each 4 consecutive inputs 2 stay. The groups are single weights, and a sparsity is
      the share of all weights that is zero: 0.5 is the whole pattern.

    Raises:
        ValueError: none of these.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"granularity must be a string, got {self.name!r}")
        known = sorted({*_CONV, *_MATRIX, *_TABLE})
        if self.pattern is not None:
            n, m = self.pattern
            if not 1 <= n < m:
                raise ValueError(
                    f"granularity {self.name!r} must keep at least 1 and fewer than all of each "
                    f"{m} weights, as '2:4' does"
                )
        elif self.name not in known and not self._sizes:
            near = get_close_matches(self.name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            letters = ", ".join(sorted(_letters()))
            raise ValueError(
                f"unknown granularity {self.name!r}{hint} Known: {', '.join(known)}, a set of the "
                f"dimensions {letters} such as 'o h', in blocks as in 'o/16 i', or a pattern such "
                f"as '2:4'"
            )

    @property
    def is_filter(self) -> bool:
        """Whether its groups are units (see `fasterai.coupling`)."""
        return self.name == "filter" or self._sizes == {"o": 1}

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M) where of each M consecutive inputs N stay; None for other granularities."""
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", self.name)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def most(self) -> float:
        """The largest sparsity there is: 1 - N / M under a pattern, else 1."""
        return 1 - self.pattern[0] / self.pattern[1] if self.pattern else 1.0

    def allow(self, sparsity: float, name: str = "sparsity") -> float:
        """The sparsity as it is.

        Raises:
            ValueError: the pattern does not reach it.
        """
        if sparsity > self.most + 1e-6:  # 0.666667 is meant for 2 / 3
            n, m = self.pattern or (0, 1)
            raise ValueError(
                f"{name} must be at most {self.most:g} by {self.name!r}, which keeps {n} of each "
                f"{m} weights, got {sparsity:g}; it is the share of all weights at zero: for the "
                f"whole pattern pass {self.most:g}"
            )
        return sparsity

    def group_shape(self, dims: str, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of a group in a weight of this shape; None where it has no such groups.

        `Granularity('row').group_shape('oihw', (64, 32, 3, 3))` is `(1, 1, 1, 3)`.
        """
        sizes = self._sizes
        if sizes is None:
            letters = granularities(dims).get(self.name)
            sizes = None if letters is None else dict.fromkeys(letters, 1)
        if sizes is None or not set(sizes) <= set(dims):
            return None
        return tuple(min(sizes.get(d, n), n) for d, n in zip(dims, shape, strict=True))

    @property
    def _sizes(self) -> dict[str, int] | None:
        """Positions a group takes of each dimension in a set; None for names and patterns."""
        words = [re.fullmatch(r"([a-z])(?:/([1-9]\d*))?", word) for word in self.name.split()]
        sizes = {match[1]: int(match[2] or 1) for match in words if match}
        complete = len(sizes) == len(words) and set(sizes) <= _letters()
        return sizes if sizes and complete else None


def _letters() -> set[str]:
    return {d for weights in _DIMENSIONS.values() for dims in weights.values() for d in dims}


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector as a tensor of `ndim` dimensions that varies along one of them."""
    shape = [1] * ndim
    shape[dim] = -1
    return values.view(shape)


def over_groups(values: Tensor, along: tuple[int, ...], how: str) -> Tensor:
    """Reduce `values` to one number per group, kept broadcastable: `how` is 'mean', 'sum', 'any'.

    A weight of shape (64, 3, 7, 7) at `along=(0,)` gives (64, 1, 1, 1).
    """
    others = tuple(d for d in range(values.ndim) if d not in along)
    if not others:
        return values
    return getattr(values, how)(dim=others, keepdim=True)


def over_blocks(values: Tensor, group: Sequence[int], how: str) -> Tensor:
    """Reduce `values` to one number per group of this shape: `how` is 'mean', 'sum' or 'any'.

    A weight of shape (40, 3, 7, 7) with groups of (16, 1, 7, 7) gives (3, 3, 1, 1); the last of
    16 then has 8 rows.
    """
    sizes = list(zip(values.shape, group, strict=True))
    if how == "mean" and any(1 < g < n for n, g in sizes):  # one division: equal means are ties
        return over_blocks(values, group, "sum") / _elements(values, group)
    along = tuple(d for d, (n, g) in enumerate(sizes) if g == 1 or g < n)
    found = over_groups(values, along, how)
    for d, (n, g) in enumerate(sizes):
        if 1 < g < n:
            found = _in_blocks(found, d, g, how)
    return found


def _in_blocks(values: Tensor, dim: int, size: int, how: str) -> Tensor:
    whole = values.shape[dim] // size
    parts = [values.narrow(dim, 0, whole * size).unflatten(dim, (whole, size))]
    parts = [getattr(parts[0], how)(dim=dim + 1)]
    if values.shape[dim] % size:
        rest = values.narrow(dim, whole * size, values.shape[dim] % size)
        parts.append(getattr(rest, how)(dim=dim, keepdim=True))
    return torch.cat(parts, dim)


def _elements(values: Tensor, group: Sequence[int]) -> Tensor:
    """How many elements each group has, in the form of `over_blocks`."""
    found = values.new_ones([1] * values.ndim)
    for d, (n, g) in enumerate(zip(values.shape, group, strict=True)):
        lengths = torch.full((-(-n // g),), g)
        lengths[-1] = n - g * (len(lengths) - 1)
        found = found * along(lengths.to(found), d, values.ndim)
    return found


def blocks_in(shape: Sequence[int], group: Sequence[int]) -> torch.Size:
    """How many groups there are along each dimension; the last may reach beyond the end."""
    return torch.Size(-(-n // g) for n, g in zip(shape, group, strict=True))


def spread(values: Tensor, shape: Sequence[int], group: Sequence[int]) -> Tensor:
    """One number per group, see `over_blocks`, as one per element: broadcastable to `shape`."""
    for d, (n, g) in enumerate(zip(shape, group, strict=True)):
        if 1 < g < n:
            values = values.repeat_interleave(g, d).narrow(d, 0, n)
    return values
