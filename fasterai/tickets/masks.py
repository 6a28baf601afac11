"""Masks as values: which weights of a network are kept, a bit each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..core.masks import apply_masks
from ..core.names import plain, unwrapped
from ..sparse.keep import difference, parameters_like

__all__ = ["Masks"]


@dataclass(frozen=True)
class _Bits:
    """The mask of one tensor: 1 = kept, packed in logical order."""

    shape: tuple[int, ...]
    packed: bytes

    @property
    def kept(self) -> int:
        return int.from_bytes(self.packed, "big").bit_count()

    def tensor(self) -> Tensor:
        """uint8, of the shape."""
        bits = np.unpackbits(np.frombuffer(self.packed, np.uint8), count=prod(self.shape))
        return torch.from_numpy(bits).view(self.shape)


class Masks(Mapping[str, Tensor]):
    """Which weights are kept, by parameter; a value that never changes.

    ```python
    masks = Masks.of(model)               # what is zero now
    masks.sparsity, masks.sparsities      # of all, and of each parameter
    a & b, a | b                          # kept in both, kept in either
    a.iou(b)                              # of what either keeps, the share that both keep
    masks.apply_to(other)                 # the same zeros in another model of these shapes
    ```
    `masks['conv.weight']` is a new uint8 tensor, 1 = kept. Here and in files a weight takes a bit.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor):
                raise TypeError(f"the mask of {name!r} must be a tensor, got {mask!r}")
        packed = {plain(k): _Bits(tuple(m.shape), _pack(m)) for k, m in masks.items()}
        self._bits: Mapping[str, _Bits] = MappingProxyType(packed)

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """What is zero in a model: elements of each parameter but such that are zero as a whole.

        Those are fresh (a bias that starts at zero), not pruned. Right behind a `Sparsifier`,
        `Masks(sparsifier.masks)` also tells zeros apart that nobody made.
        """
        named = unwrapped(model).named_parameters()
        return cls({name: (p != 0) | ~p.any() for name, p in named})

    # --- as a mapping --------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        return self._bits[name].tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __eq__(self, other: object) -> bool:
        return dict(self._bits) == dict(other._bits) if isinstance(other, Masks) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self._bits.items()))

    def __reduce__(self) -> tuple[type[Masks], tuple[dict[str, Tensor]]]:
        return Masks, (dict(self),)

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} parameters, {self.kept:,} of {self.weights:,} weights kept, "
            f"sparsity {self.sparsity:.4g})"
        )

    # --- counts --------------------------------------------------------------------------------

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        return {name: bits.shape for name, bits in self._bits.items()}

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def kept(self) -> int:
        """How many of them are kept."""
        return sum(bits.kept for bits in self._bits.values())

    @property
    def sparsity(self) -> float:
        """The share of all these weights that is zero."""
        return 1 - self.kept / self.weights if self.weights else 0.0

    @property
    def sparsities(self) -> dict[str, float]:
        """The share of each parameter that is zero."""
        return {k: 1 - b.kept / max(1, prod(b.shape)) for k, b in self._bits.items()}

    def report(self) -> pd.DataFrame:
        """`parameter`, `weights`, `kept`, `sparsity`; last 'total'."""
        rows = [(name, prod(b.shape), b.kept) for name, b in self._bits.items()]
        rows.append(("total", self.weights, self.kept))
        table = pd.DataFrame(rows, columns=["parameter", "weights", "kept"])
        return table.assign(sparsity=1 - table["kept"] / table["weights"].clip(lower=1))

    # --- with others ---------------------------------------------------------------------------

    def __and__(self, other: Masks) -> Masks:
        """What both keep."""
        pairs = self._beside(other)
        return Masks({name: a & b for name, a, b in pairs})

    def __or__(self, other: Masks) -> Masks:
        """What either keeps."""
        pairs = self._beside(other)
        return Masks({name: a | b for name, a, b in pairs})

    def iou(self, other: Masks) -> float:
        """Intersection over union: of the weights that either keeps, the share that both keep.

        1 where nothing is kept at all.
        """
        both, either = (self & other).kept, (self | other).kept
        return both / either if either else 1.0

    def ious(self, other: Masks) -> dict[str, float]:
        """Intersection over union in each parameter."""
        pairs = self._beside(other)
        return {name: Masks({name: a}).iou(Masks({name: b})) for name, a, b in pairs}

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Write +0.0 into a model where these masks are 0, and return it.

        Any model will do that has parameters of these names and shapes. The zeros learn again,
        unless `KeepZeros(masks)` takes part in the fit.

        Raises:
            ValueError: it lacks some, or they have other shapes; nothing was changed.
        """
        weights = parameters_like(self.shapes, model)
        apply_masks(
            list(weights.values()), [self[name].to(p.device) for name, p in weights.items()]
        )
        return model

    def _beside(self, other: Masks) -> Iterator[tuple[str, Tensor, Tensor]]:
        if not isinstance(other, Masks):
            raise TypeError(f"masks are compared with Masks, got {type(other).__name__}")
        if self.shapes != other.shapes:
            raise ValueError(
                f"masks of different networks: {difference(self.shapes, other.shapes)}"
            )
        return ((name, self[name], other[name]) for name in self)


def _pack(mask: Tensor) -> bytes:
    return np.packbits((mask.detach() != 0).flatten().cpu().numpy()).tobytes()
