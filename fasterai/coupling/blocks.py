"""Blocks: channels that a view or an operation splits into parts of equal size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["Blocks", "find_blocks", "ranks"]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which classes of channels form blocks that must keep equally many.

    Args:
        block: (classes,) the block of each class, -1 outside of any.
        place: (classes,) its place in its block.
        tie: (blocks,) blocks of the same tie keep equally many.
        torn: classes in grids that no cut leaves a grid.
    """

    block: np.ndarray
    place: np.ndarray
    tie: np.ndarray
    torn: np.ndarray

    def tie_of(self) -> np.ndarray:
        """(classes,) the tie of each class, -1 outside of any block."""
        return np.where(self.block >= 0, self.tie[self.block], -1) if len(self.tie) else self.block


def find_blocks(
    grids: Iterable[np.ndarray], total: int, ties: Sequence[tuple[int, int]] = ()
) -> Blocks:
    """Blocks from grids of classes.

    Lines of a grid along the dimension that shrinks are its blocks: the last one along which all
    classes differ. Where grids overlap, their common refinement counts.

    Args:
        grids: classes laid out in two or more dimensions; FIXED = -1 where there is none.
        total: number of classes.
        ties: pairs of classes whose blocks keep equally many for another reason.
    """
    block = np.full(total, -1)
    place = np.zeros(total, dtype=np.int64)
    torn: list[np.ndarray] = []
    together: list[np.ndarray] = []  # the lines of each grid
    count = 0
    for grid in grids:
        lines = _lines(grid)
        if lines is None and _any_cut(grid):
            continue
        if lines is None:
            torn.append(np.unique(grid[grid >= 0]))
            continue
        count = _refine(block, lines, count)
        place[lines] = np.arange(lines.shape[1])
        together.append(lines)
    inside = block >= 0
    if inside.any():
        block[inside] = np.unique(block[inside], return_inverse=True)[1]
    count = block.max(initial=-1) + 1
    tie = _tied(block, together, ties, count)
    sizes = np.bincount(block[inside], minlength=count)
    for t in np.unique(tie):
        mine = np.flatnonzero(tie == t)
        if len(set(sizes[mine].tolist())) > 1 or sizes[mine[0]] < 2:
            torn.append(np.flatnonzero(np.isin(block, mine)))
    spoiled = np.unique(np.concatenate(torn)) if torn else np.zeros(0, dtype=np.int64)
    return Blocks(block, ranks(block, place), tie, spoiled)


def ranks(block: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Places counted within each block."""
    order = np.lexsort((place, block))
    ranks = np.zeros(len(block), dtype=np.int64)
    starts = np.flatnonzero(np.append(True, block[order][1:] != block[order][:-1]))
    lengths = np.diff(np.append(starts, len(block)))
    ranks[order] = np.arange(len(block)) - np.repeat(starts, lengths)
    return ranks


def _lines(grid: np.ndarray) -> np.ndarray | None:
    """The distinct lines of a grid along the dimension that can shrink; None where none can."""
    for d in reversed(range(grid.ndim)):
        if grid.shape[d] < 2:
            continue
        lines = np.moveaxis(grid, d, -1).reshape(-1, grid.shape[d])
        _, first, which = np.unique(lines[:, 0], return_index=True, return_inverse=True)
        distinct = lines[first]
        if (lines != distinct[which]).any() or (distinct < 0).any():
            continue
        if len(np.unique(distinct)) == distinct.size:  # no class twice
            return distinct
    return None


def _any_cut(grid: np.ndarray) -> bool:
    """Whether all lines of a grid have the same classes, each as often: any cut leaves a grid."""
    lines = np.sort(grid.reshape(-1, grid.shape[-1]), axis=1)
    return bool((lines == lines[0]).all()) and bool((grid >= 0).all())


def _refine(block: np.ndarray, lines: np.ndarray, count: int) -> int:
    """Split the `count` blocks so that none lies in two lines, or half in one; how many then."""
    pairs = block[lines] * len(lines) + np.arange(len(lines))[:, None]
    names, fresh = np.unique(pairs, return_inverse=True)
    block[lines] = count + fresh.reshape(lines.shape)
    return count + len(names)


def _tied(
    block: np.ndarray,
    together: Sequence[np.ndarray],
    ties: Sequence[tuple[int, int]],
    count: int,
) -> np.ndarray:
    """Which blocks keep equally many: those of one grid, and those tied otherwise."""
    pairs = [(int(block[a]), int(block[b])) for a, b in ties if min(block[a], block[b]) >= 0]
    for lines in together:
        mine = np.unique(block[lines]).tolist()
        pairs.extend((mine[0], b) for b in mine[1:])
    left, right = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(count, count))
    return connected_components(graph, directed=False)[1]
