"""Criteria of data: what weights and filters do on examples; higher = keep.

They are gathered by `score` over a loader, or by a callback while training.

Sources: `taylor` and `taylor_filter` are Molchanov et al., "Importance Estimation for Neural
Network Pruning", 2019, https://arxiv.org/abs/1906.10771: the squared first-order change of the loss
with a weight alone, and with a whole filter, of each batch, averaged over batches; of a filter it
is taken behind its batch norm, where there is one. `taylor_maps` is
Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2017,
https://arxiv.org/abs/1611.06440: the mean over examples of the absolute value of the mean over a
feature map of activation * gradient, divided by the L2 norm of its layer's;
`taylor_maps.normalised('none')` is without. `mean_activation` is compared with it there. `obd` is
LeCun et al., "Optimal Brain Damage", 1990, with the diagonal of the empirical Fisher matrix for
that of the Hessian; with gradients of batches, not of examples, it would be half of `taylor`.
`apoz` is Hu et al., "Network Trimming", 2016, https://arxiv.org/abs/1607.03250, whose average
percentage of zeros is subtracted from 1. `wanda` is Sun et al., "A Simple and Effective Pruning
Approach for Large Language Models", 2023, https://arxiv.org/abs/2306.11695.
"""

from __future__ import annotations

from torch import Tensor

from ..core.criteria import Criterion, wide

__all__ = ["apoz", "mean_activation", "obd", "taylor", "taylor_filter", "taylor_maps", "wanda"]


def _squared_change(weight: Tensor, squares: Tensor) -> Tensor:
    return wide(weight).square() * squares


def _half_squared_change(weight: Tensor, fisher: Tensor) -> Tensor:
    return 0.5 * wide(weight).square() * fisher


def as_gathered(weight: Tensor, found: Tensor) -> Tensor:
    """What was gathered, as it is."""
    return found


def _share_of_others(weight: Tensor, share: Tensor) -> Tensor:
    return 1 - share


def _by_norm(weight: Tensor, norm: Tensor) -> Tensor:
    return wide(weight).abs() * norm


taylor = Criterion(_squared_change, "taylor", needs="squared_gradient")
taylor_filter = Criterion(as_gathered, "taylor_filter", needs="filter_taylor")
taylor_maps = Criterion(as_gathered, "taylor_maps", needs="map_taylor", norm="l2")
obd = Criterion(_half_squared_change, "obd", needs="fisher")
mean_activation = Criterion(as_gathered, "mean_activation", needs="activation")
apoz = Criterion(_share_of_others, "apoz", needs="zeros")
wanda = Criterion(_by_norm, "wanda", needs="input_norm")
