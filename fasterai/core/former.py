"""Errors for arguments of former versions, and of neighbours, which say what takes their place."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

__all__ = ["FORMER", "explain_former"]

_TICKET = (
    "LotteryTicket(learn, 0.5, rounds=3, rewind=0).find(5) trains, prunes and rewinds, and leaves "
    "the last of its tickets in the model; ticket.save(file) keeps one"
)
_SPAN = "a schedule has its own span, as in schedule=agp.over(start=0.2, end=0.8)"
_RANK = "pass it to prune_model, as in Pruner(model, example_inputs).prune_model(0.4)"

FORMER = {  # up to 0.4.1, or of others here
    "context": _RANK,
    "criteria": _RANK,
    "data": "score on it first, as in criteria=score(model, dl, wanda)",
    "end_epoch": _SPAN,
    "end_pct": _SPAN,
    "end_sparsity": "pass sparsity=0.4, or sparsity=(0.1, 0.4) to start from 0.1",
    "granularity": "whole channels go; for smaller groups zero with Sparsifier or SparsifyCallback",
    "ignored_layers": "pass exclude, names or types of layers",
    "iterative_steps": "prune while training: PruneCallback(0.4, schedule=agp.over(n_steps=5))",
    "layer_type": "pass layers, types or names of layers, as in layers=nn.Conv2d",
    "layers": "name what stays, as in exclude=['head']; or {layer: share} as the sparsity",
    "lth": _TICKET,
    "model": "it is learn.model; for a part of it pass layers, the part's name",
    "nm": "pass granularity='2:4', where sparsity 0.5 is the whole pattern",
    "pruning_ratio": "pass sparsity=0.4 to PruneCallback; with a Pruner, call prune_model(0.4)",
    "reset_end": _TICKET,
    "rewind_epoch": _TICKET,
    "round_to": "pass it to Sparsifier(model, ..., round_to=8); with a Pruner, call "
    "prune_model(0.4, round_to=8)",
    "save_tickets": _TICKET,
    "sched_func": "pass schedule, as in schedule=agp, to a callback; Schedule(func) makes one",
    "schedule": "prune while training: PruneCallback(0.4, schedule=agp); in a loop of your own "
    "GradualPruner(model, x).prune_to(0.4, share=0.5), half of the way, and so on",
    "start_epoch": _SPAN,
    "start_pct": _SPAN,
    "start_sparsity": "pass sparsity=(0.1, 0.4) to start from 0.1",
}


def explain_former(elsewhere: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: a function says what to pass instead of a `FORMER` argument that it lacks.

    Calls with such an argument, or with too many by position, raise a TypeError.

    Args:
        elsewhere: where arguments went that were given by position.
    """

    def decorate(func: Callable[..., Any]) -> Callable[..., Any]:
        takes = signature(func).parameters
        ordered = [n for n, p in takes.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        named = ", ".join(n for n, p in takes.items() if p.kind is p.KEYWORD_ONLY)
        who = func.__qualname__.removesuffix(".__init__")
        hint = f"; by name it takes {named}" * bool(named) + f"; {elsewhere}" * bool(elsewhere)

        @wraps(func)
        def explained(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name in FORMER and name not in takes:
                    raise TypeError(f"{who} takes no argument {name!r}: {FORMER[name]}")
            if len(args) > len(ordered):
                raise TypeError(
                    f"{who} takes {', '.join(ordered[1:])} by position, got {len(args) - 1} "
                    f"arguments{hint}"
                )
            return func(*args, **kwargs)

        return explained

    return decorate
