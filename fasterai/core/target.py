"""What a network may cost in the end: a target that may stand where a sparsity does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike

from .checks import is_number, is_whole, whole

__all__ = ["Target"]

COUNTED = ("macs", "parameters", "bytes")
TIMED = ("latency_ms", "speedup")


@dataclass(frozen=True)
class Target:
    """A budget: what a network may cost once it is pruned. Exactly one of the first five is given.

    ```python
    Pruner(model, x).prune_model(Target(macs=0.5))
    ```
    A number up to 1 is the share of the dense network that remains, a larger one is absolute.

    Args:
        macs: multiply-accumulates of one sample, of convs and matrix products.
        parameters: how many there are.
        bytes: of the saved state dict.
        latency_ms: milliseconds of a forward in eval mode, measured on this machine.
        speedup: how many times as fast as the dense network; at least 1.
        floors: channels that stay in a layer, at least, by name: `{"layer1.0.conv1": 32}`; a
            fraction up to 1 is a share of the layer's. The name of a block stands for all its
            layers.
        caps: channels that stay in a layer, at most, by name.
        batch: samples of a forward that is timed.
        threads: CPU threads it takes; default those torch uses.
        table: a file that keeps what layers took on this machine, for later targets.
    """

    macs: float | None = None
    parameters: float | None = None
    bytes: float | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    floors: Mapping[str, float] = field(default_factory=dict)
    caps: Mapping[str, float] = field(default_factory=dict)
    batch: int = 1
    threads: int | None = None
    table: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in (*COUNTED, *TIMED) if getattr(self, name) is not None]
        if len(given) != 1:
            raise TypeError(
                f"a Target has one budget, {', '.join(f'{n}=' for n in (*COUNTED, *TIMED))}; "
                f"got {', '.join(given) or 'none'}; pass one, as in Target(macs=0.5)"
            )
        _check(given[0], self.value)
        if self.kind == "speedup" and self.value < 1:
            raise ValueError(
                f"speedup is how many times as fast the network becomes, 1 or more, got "
                f"{self.value}; for half the time pass speedup=2"
            )
        whole(self.batch, "batch", 1)
        if self.threads is not None:
            whole(self.threads, "threads", 1)
        for name in ("floors", "caps"):
            widths = getattr(self, name)
            if not isinstance(widths, Mapping):
                raise TypeError(
                    f"{name} are widths by layer, as in {name}={{'layer1.0.conv1': 32}}, "
                    f"got {widths!r}"
                )
            for layer, width in widths.items():
                _check(f"{name}[{layer!r}]", width)
                if width > 1 and not float(width).is_integer():
                    raise ValueError(
                        f"{name}[{layer!r}] must be a number of channels or a share up to 1, "
                        f"got {width}"
                    )
            object.__setattr__(self, name, dict(widths))  # nobody else's

    @property
    def kind(self) -> str:
        """Which budget it is: 'macs', 'parameters', 'bytes', 'latency_ms' or 'speedup'."""
        return next(n for n in (*COUNTED, *TIMED) if getattr(self, n) is not None)

    @property
    def value(self) -> float:
        """The number that was given."""
        return getattr(self, self.kind)

    @property
    def timed(self) -> bool:
        """Whether it takes measuring time."""
        return self.kind in TIMED

    @property
    def relative(self) -> bool:
        """Whether it is a share of what the dense network costs."""
        return self.kind == "speedup" or (self.kind in COUNTED and self.value <= 1)

    def goal(self, dense: float) -> float:
        """The number that must not be exceeded, given that of the dense network."""
        if self.kind == "speedup":
            return dense / self.value
        return dense * self.value if self.relative else float(self.value)

    def __hash__(self) -> int:
        return hash((self.kind, self.value))

    def __repr__(self) -> str:
        names = ("floors", "caps", *(("batch", "threads") if self.timed else ()))
        more = [f", {n}={getattr(self, n)}" for n in names if getattr(self, n)]
        return f"Target({self.kind}={self.value}{''.join(more)})"


def width_of(value: float, size: int) -> float:
    """A floor or cap in channels: a number up to 1 is a share, but an integer 1 is one channel."""
    return float(value) if is_whole(value) or value > 1 else value * size


def refuse_target(value: object, instead: str) -> None:
    """Raise a TypeError where a Target cannot stand.

    Args:
        value: what came.
        instead: what to do.
    """
    if isinstance(value, Target):
        raise TypeError(f"{value} cannot be a target here: {instead}")


def _check(name: str, value: object) -> None:
    if not is_number(value) or not math.isfinite(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if value <= 0:
        raise ValueError(
            f"{name} must be more than 0, got {value}; a number up to 1 is the share that remains"
        )
