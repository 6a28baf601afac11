"""The groups of one layer in the order in which they go, their scores a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .criteria import Criterion, wide

__all__ = ["ElementRanking", "Ranking", "ScoreRanking", "pieces"]


_PIECE = 1 << 16  # elements; a few float tensors of this size stay in a CPU's cache


class Ranking:
    """What is held goes first, whatever it scores; then the lowest scores.

    Attributes:
        size: how many groups there are.
        held: how many of them are zero already.
        dtype: of the scores, float32 or float64; may be made wider.
        strict: whether what is held is given the score -inf, below all others. That takes time
            and makes no difference where `resting` is below the threshold anyway.
        resting: what held groups score by themselves, or -inf.
    """

    size: int
    held: int
    dtype: torch.dtype = torch.float32
    strict: bool = False
    resting: float = -math.inf

    def prepare(self) -> None:
        """Compute what is kept; `dtype` is known afterwards."""

    def scores(self) -> Iterator[Tensor]:
        """All scores, in order, a piece at a time.

        Raises:
            ValueError: what the criterion returns cannot be used.
        """
        raise NotImplementedError

    def sample(self, stride: int) -> Tensor:
        """(about size / stride,) scores, evenly spaced."""
        raise NotImplementedError

    def check(self) -> None:
        """Look at all scores, for what `scores` may raise."""
        for _ in self.scores():
            pass


class ScoreRanking(Ranking):
    """Scores that are kept in memory.

    Args:
        make: gives the (size,) scores; called once.
        held: (size,) bool.
    """

    strict = True

    def __init__(self, make: Callable[[], Tensor], held: Tensor) -> None:
        self._make, self.marks = make, held
        self.size, self.held = held.numel(), int(held.count_nonzero())
        self._made: Tensor | None = None
        self._kept: Tensor | None = None

    def prepare(self) -> None:
        if self._made is None and self._kept is None:
            self._made = wide(self._make().detach())
            self.dtype = self._made.dtype

    def scores(self) -> Iterator[Tensor]:
        yield from pieces(self._all())

    def sample(self, stride: int) -> Tensor:
        return self._all()[stride // 2 :: stride]

    def check(self) -> None:
        self.prepare()

    def _all(self) -> Tensor:
        self.prepare()
        if self._kept is None:
            self._kept, self._made = _held_below(self._made.to(self.dtype), self.marks), None
        return self._kept


class ElementRanking(Ranking):
    """The single elements of a weight, their scores computed again whenever they are needed.

    Elements that are zero are held, except in a layer of zeros only: that is fresh, not pruned,
    unless it was emptied.
    They all score the same, since the criterion looks at one element at a time.

    Args:
        weight: of any shape and memory format.
        criterion: an elementwise one.
        name: the weight's, for errors.
        emptied: whether it was made all zero on purpose.
    """

    def __init__(
        self, weight: Tensor, criterion: Criterion, name: str = "weight", *, emptied: bool = False
    ) -> None:
        self._weight, self._criterion, self._name = weight.detach(), criterion, name
        self.size = weight.numel()
        alive = sum(p.bool().count_nonzero() for p in pieces(self._weight))
        self.held = (self.size - int(alive)) if emptied or int(alive) else 0
        self._sound = False  # whether all of the scores were seen to be numbers

    def prepare(self) -> None:
        rest = self._criterion(self._weight.new_zeros(1), self._name)
        self.dtype = rest.dtype
        self.resting = rest.item() if self.held else -math.inf

    def scores(self) -> Iterator[Tensor]:
        for piece in pieces(self._weight):
            yield self._score(piece)
        self._sound = True

    def sample(self, stride: int) -> Tensor:
        every = [p.flatten()[stride // 2 :: stride] for p in pieces(self._weight)]
        return self._score(torch.cat(every))

    def check(self) -> None:
        if not self._sound:
            super().check()

    def _score(self, elements: Tensor) -> Tensor:
        if self._sound:
            scores = self._criterion.func(elements).detach().to(self.dtype)
        else:
            scores = self._criterion(elements, self._name).detach().to(self.dtype)
        if not self.strict:
            return scores
        return _held_below(scores, elements == 0 if self.held else None)

    def write_held(self, mask: Tensor) -> None:
        """Write into a mask of the weight's shape: 1, and 0 for what is held."""
        if self.held:
            mask.view(torch.bool).copy_(self._weight)
        else:
            mask.fill_(1)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in views that a cache can hold, in logical order; the same for equal shapes."""
    most = _PIECE if tensor.device.type == "cpu" else 64 * _PIECE
    if tensor.numel() <= most:
        yield tensor
        return
    rows = most * len(tensor) // tensor.numel()
    if rows:
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from pieces(row)


def _held_below(scores: Tensor, held: Tensor | None) -> Tensor:
    """A copy of the scores with those of held groups below all others."""
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    return scores if held is None else scores.masked_fill_(held, -math.inf)
