"""What is asked of which groups, and where the way there began."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..core.granularity import Granularity
from ..core.masks import Limits, as_fraction
from ..core.names import by_layer, layers_of, plain
from .groups import Groups

__all__ = ["origin", "targets_of"]


def targets_of(
    sparsity: float | Mapping[str, float],
    groups: Sequence[Groups],
    granularity: Granularity,
    together: bool,
    no_such: Callable[[object], str],
) -> tuple[float, ...]:
    """Fractions for each of the groups, or a single one for all `together`.

    Args:
        sparsity: a fraction, or {layer or block: fraction}; layers not named are asked nothing.
        groups: what may be zeroed.
        granularity: it may allow less than all.
        together: one sparsity over all of the groups.
        no_such: the message for a layer that has no groups.

    Raises:
        ValueError: no fraction, no such layer, or several fractions for layers that are coupled.
    """
    if not isinstance(sparsity, Mapping):
        return (granularity.allow(as_fraction(sparsity)),) * (1 if together else len(groups))
    if together:
        raise ValueError("a sparsity for each layer needs context='local', got 'global'")
    layers = [tuple(map(plain, group.layers)) for group in groups]
    known = list(dict.fromkeys(name for names in layers for name in names))
    fractions = {}
    for name, value in sparsity.items():
        who = f"sparsity of {name!r}"
        fractions[name] = granularity.allow(as_fraction(value, who), who)
        if not isinstance(name, str) or not layers_of(name, known):
            raise ValueError(no_such(name))
    asked = by_layer(fractions, known)
    wanted = [{name: asked[name] for name in names if name in asked} for names in layers]
    for group, given in zip(groups, wanted, strict=True):
        if len(set(given.values())) > 1:
            raise ValueError(
                f"these layers are coupled and need one sparsity: {given} "
                f"(all of them: {', '.join(map(plain, group.layers))})"
            )
    return tuple(next(iter(given.values()), 0.0) for given in wanted)


def origin(
    groups: Sequence[Groups], held: float, target: float, begun: Sequence[float], limits: Limits
) -> float:
    """The share of the groups at zero where a way began that has led to what is held now.

    Without a share of the way behind, that is what is held. Else it is 0, where a way from 0 would
    have come here; or what leads straight on from here to the target, also less than 0.

    Args:
        groups: ranked together.
        held: the share of them that is zero.
        target: where the way leads.
        begun: the shares of the way that were taken, in their order.
        limits: what bounds the zeros on the way.
    """
    share = begun[-1] if begun else 0.0
    if not share:
        return held
    whole = sum(g.whole for g in groups)
    zeros = round(held * whole)
    # what came back on a way down may still be zero
    least, most = (round(s * target * whole) for s in (share, max(begun[-2:])))
    least = min(least, sum(limits.most(g.size, g.free) for g in groups))
    if least - len(groups) * (limits.round_to - 1) <= zeros <= most:
        return 0.0
    return held if share == 1 or held >= target else (held - share * target) / (1 - share)
