"""What was asked of a network's layers, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..core.masks import Limits
from ..core.names import plain
from .groups import Groups

__all__ = ["sparsity_report"]

_COUNTS = ("weights", "zero_weights", "parameters", "zero_parameters", "macs", "zero_macs")


def sparsity_report(
    groups: Sequence[Groups],
    skipped: Mapping[str, str],
    asked: Sequence[float] | None,
    together: bool,
    limits: Limits,
    macs: Mapping[str, int],
) -> pd.DataFrame:
    """See `Sparsifier.report`.

    Args:
        groups: what may be zeroed.
        skipped: layers left alone, and why.
        asked: fractions, one for each of the groups or a single one; None before any was asked.
        together: whether that single one goes over all of them.
        limits: what bounds the zeros of each layer.
        macs: MACs by layer.
    """
    shares = [None] * len(groups) if asked is None or together else list(asked)
    rows = [_row(g, share, limits, macs) for g, share in zip(groups, shares, strict=True)]
    total: dict[str, Any] = {"layer": "total", "coupled": "", "limit": ""}
    total |= {k: sum(row[k] for row in rows) for k in ("groups", "zeros", *_COUNTS)}
    total["reached"] = total["zeros"] / total["groups"]
    if asked is not None:
        n = round(asked[0] * total["groups"]) if together else sum(row["n"] for row in rows)
        total["n"], total["asked"] = n, asked[0] if together else n / total["groups"]
        if together:
            bound = sum(limits.most(g.size, g.free) for g in groups)
            free = sum(g.free for g in groups)
            total["limit"] = _limit(total["zeros"], n, free, bound, limits.round_to)
    left = [
        {"layer": plain(k), "coupled": "", "groups": 0, "limit": why} for k, why in skipped.items()
    ]
    order = ["layer", "coupled", "groups", "asked", "n", "zeros", "reached", "limit", *_COUNTS]
    table = pd.DataFrame([*rows, *left, total], columns=order)
    return table.astype(dict.fromkeys(["groups", "n", "zeros", *_COUNTS], "Int64"))


def _row(
    group: Groups, asked: float | None, limits: Limits, macs: Mapping[str, int]
) -> dict[str, Any]:
    zeros = int(group.zeroed().count_nonzero())
    row = {
        "layer": plain(group.name),
        "coupled": ", ".join(map(plain, group.coupled)),
        "groups": group.whole,
        "zeros": zeros,
        "reached": zeros / group.whole,
        "limit": "",
        **group.tally(macs),
    }
    if asked is not None:
        row["asked"], row["n"] = asked, round(asked * group.whole)
        bound = limits.most(group.size, group.free)
        row["limit"] = _limit(zeros, row["n"], group.free, bound, limits.round_to)
    return row


def _limit(zeros: int, n: int, free: int, bound: int, round_to: int) -> str:
    """Why there are not `n` zeros, where `free` may go and `min_keep` leaves `bound` of them."""
    if zeros >= n:
        return "held" if zeros > n else ""
    short = min(n, bound) - zeros
    if short >= round_to:
        return "not reached, or trained on since"
    why = ["pattern"] * (n > free) + ["min_keep"] * (min(n, free) > bound)
    return ", ".join(why + ["round_to"] * (short > 0))
