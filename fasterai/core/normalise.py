"""Scores made comparable between layers, for a global ranking.

`'lamp'` is the score of Lee et al., "Layer-Adaptive Sparsity for the Magnitude-based Pruning",
2021, https://arxiv.org/abs/2010.07611, eq. 3: `w_u ** 2 / sum of w_v ** 2 over |w_v| >= |w_u|` in
the layer. The last weight of a layer scores 1, the highest there is, so it goes last of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NORMS", "normalise"]


def normalise(scores: Tensor, norm: str | None, name: str, gone: int = 0) -> Tensor:
    """Scores of a layer's groups, (groups,), on a scale of the layer's own; their order stays.

    Args:
        scores: finite; for `'lamp'` at least 0.
        norm: `'mean'`, `'l2'`, `'lamp'`, or `'none'` or None to leave them.
        name: of the layer, for errors.
        gone: groups that were removed, and count as if they scored 0.

    Raises:
        ValueError: scores that cannot be normalised.
    """
    if norm is None:
        return scores
    if norm == "lamp" and bool((scores < 0).any()):
        raise ValueError(
            f"'lamp' squares scores, which must not be negative, and those of {name} are: take a "
            f"criterion such as large_final or movement, or normalise by 'mean' or 'l2'"
        )
    found = NORMS[norm](scores)
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"the scores of {name} cannot be normalised by {norm!r}: they must be finite"
        )
    if norm == "mean" and gone:
        return found * ((len(scores) + gone) / max(1, len(scores)))
    return found


def _by_mean(scores: Tensor) -> Tensor:
    return _divided(scores, scores.abs().mean())


def _by_l2(scores: Tensor) -> Tensor:
    top = scores.abs().max() if scores.numel() else scores.sum()
    scaled = _divided(scores, top)  # squares of small scores would vanish
    return _divided(scaled, torch.linalg.vector_norm(scaled))


def _lamp(scores: Tensor) -> Tensor:
    """Sorts the layer: takes some 60 bytes a group while it does."""
    exact = torch.float32 if scores.device.type == "mps" else torch.float64  # mps has no more
    ranked, order = scores.sort()
    squares = ranked.to(exact).square()
    at_least = squares.flip(0).cumsum(0).flip(0)  # the sum of each and all that follow
    at_least[1:].masked_fill_(ranked[1:] == ranked[:-1], torch.inf)
    at_least = at_least.cummin(0).values  # of equal scores that of the first: they score the same
    found = torch.empty_like(scores)
    found[order] = _divided(squares, at_least).to(scores.dtype)
    return found


def _divided(scores: Tensor, by: Tensor) -> Tensor:
    """A layer of zeros stays one."""
    return scores / torch.where(by > 0, by, 1.0)


def _as_they_are(scores: Tensor) -> Tensor:
    return scores


NORMS = {"mean": _by_mean, "l2": _by_l2, "lamp": _lamp, "none": _as_they_are}
