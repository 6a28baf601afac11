"""How much to remove: a share of the units, one for each layer, a number of units, a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.checks import is_whole
from ..core.masks import as_fraction
from ..core.names import by_layer, layers_of, plain, unknown_name
from ..core.target import Target
from ..coupling.units import Axis

__all__ = ["Units"]


@dataclass(frozen=True)
class Units:
    """So many units, of all layers together, instead of a share of them.

    ```python
    PruneCallback(Units(5 * 512), "global", schedule=iterative.over(n_steps=5))
    ```
    A unit is a channel with all that goes with it, in however many layers; where blocks keep
    equally many it is one of each.

    Args:
        n: how many go, at most all there are.
    """

    n: int

    def __post_init__(self) -> None:
        if not is_whole(self.n) or self.n < 0:
            raise ValueError(f"Units counts whole units, as in Units(512), got {self.n!r}")


Amount = float | Mapping[str, float] | Units | Target


def as_amount(value: object, context: str) -> Amount:
    """What is to be removed, checked as far as that goes without a network.

    Raises:
        TypeError: it is no number, mapping, `Units` or `Target`.
        ValueError: a share outside [0, 1], or not one for this context.
    """
    if isinstance(value, Target):
        return value
    if isinstance(value, Units):
        if context != "global":
            raise ValueError(
                f"{value} are of all layers together and need context='global', got {context!r}"
            )
        return value
    if not isinstance(value, Mapping):
        return as_fraction(value)
    if context != "local":
        raise ValueError(f"a sparsity for each layer needs context='local', got {context!r}")
    for name in value:
        if not isinstance(name, str):
            raise TypeError(
                f"a sparsity for each layer goes by names of layers and blocks, as in "
                f"{{'layer1': 0.5}}, got {name!r}"
            )
    return {name: as_fraction(share, f"sparsity of {name!r}") for name, share in value.items()}


def asks(amount: Amount) -> bool:
    """Whether anything is to be removed."""
    if isinstance(amount, Mapping):
        return any(amount.values())
    return isinstance(amount, Target) or bool(amount.n if isinstance(amount, Units) else amount)


def part_of(amount: Amount, share: float) -> Amount:
    """The amount at a share of the way to it; a target, whose way is one of costs, as it is."""
    if isinstance(amount, Target):
        return amount
    if isinstance(amount, Mapping):
        return {name: share * value for name, value in amount.items()}
    return Units(round(share * amount.n)) if isinstance(amount, Units) else share * amount


def counts_of(
    amount: Amount, axes: Sequence[Axis], sizes: Sequence[int], context: str, more: int = 0
) -> int | list[int]:
    """How many bundles that is: of all axes under 'global', else of each.

    Args:
        amount: see `as_amount`.
        axes: those of the network.
        sizes: for each of them the bundles that shares are shares of.
        context: 'local' or 'global'.
        more: bundles of which shares are shares, too, that no axis has any more.

    Raises:
        ValueError: layers with no units to remove, or several shares for coupled layers.
    """
    if isinstance(amount, Units):
        return min(int(amount.n), sum(sizes) + more)
    if isinstance(amount, Mapping):
        return [round(s * n) for s, n in zip(_by_axis(amount, axes, sizes), sizes, strict=True)]
    if context == "global":
        return round(amount * (sum(sizes) + more))
    return [round(amount * n) for n in sizes]


def _by_axis(
    amount: Mapping[str, float], axes: Sequence[Axis], sizes: Sequence[int]
) -> list[float]:
    """A share for each axis; what is not named keeps all."""
    layers = [tuple(map(plain, axis.producers)) for axis in axes]
    known = list(dict.fromkeys(name for names in layers for name in names))
    for name in amount:
        named = set(layers_of(name, known))
        owners = [a for a, names in enumerate(layers) if named.intersection(names)]
        if not owners:
            raise ValueError(unknown_name(name, known, "sparsity", "that makes channels"))
        if not any(sizes[a] for a in owners):
            why = next((pin for a in owners for pin in axes[a].pins if pin), "it has no units")
            raise ValueError(
                f"nothing of {name!r} can be removed: {why}; leave it out of the sparsities"
            )
    asked, shares = by_layer(amount, known), []
    for names in layers:
        given = {name: asked[name] for name in names if name in asked}
        if len(set(given.values())) > 1:
            raise ValueError(
                f"these layers are coupled and need one sparsity: {given} (all of them: "
                f"{', '.join(names)})"
            )
        shares.append(next(iter(given.values()), 0.0))
    return shares


def share_of(
    amount: Amount, axes: Sequence[Axis], sizes: Sequence[int], context: str, more: int = 0
) -> float | None:
    """The amount as a share of all, see `counts_of`; None for a target."""
    if isinstance(amount, Target):
        return None
    if isinstance(amount, float):
        return amount
    counts = counts_of(amount, axes, sizes, context, more)
    return (counts if isinstance(counts, int) else sum(counts)) / max(1, sum(sizes) + more)
