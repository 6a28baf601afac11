"""The curves of schedules: progress through a span in [0, 1] -> share of the way in [0, 1]."""

from __future__ import annotations

import math

__all__ = ["at_once", "cosine", "cubic", "linear", "logistic", "there_and_back"]


def at_once(p: float) -> float:
    """The whole way in one step."""
    return 1.0


def linear(p: float) -> float:
    """Equal shares in equal times.

    In a few steps it is the iterative pruning of Han et al., "Learning both weights and
    connections for efficient neural networks", 2015, https://arxiv.org/abs/1506.02626.
    """
    return p


def cosine(p: float) -> float:
    """Half a wave: slow, fast, slow."""
    return (1.0 - math.cos(math.pi * p)) / 2.0


def cubic(p: float) -> float:
    """Fast while much is redundant, and ever slower: `s_t = s_f + (s_i - s_f) * (1 - p) ** 3`.

    Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", 2017, https://arxiv.org/abs/1710.01878, eq. 1.
    """
    return 1.0 - (1.0 - p) ** 3


def logistic(p: float) -> float:
    """A sigmoid of steepness 14 around p = 6 / 14, shifted and scaled to meet 0 and 1 exactly.

    Hubens et al., "One-cycle pruning: pruning ConvNets under a tight training budget", 2021,
    https://arxiv.org/abs/2107.02086.
    """
    low, at, high = (1 / (1 + math.exp(6 - 14 * x)) for x in (0.0, p, 1.0))
    return (at - low) / (high - low)


def there_and_back(p: float) -> float:
    """A third of the span up to the target, a third on it, a third back; cosines in between.

    Han et al., "DSD: dense-sparse-dense training for deep neural networks", 2017,
    https://arxiv.org/abs/1607.04381, with gradual steps between its three phases.
    """
    return cosine(min(1.0, 3 * p, 3 * (1 - p)))
