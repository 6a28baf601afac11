"""Thresholds from the spread of a layer's weights.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015,
https://arxiv.org/abs/1506.02626, section 3: what is below a quality parameter times the standard
deviation of a layer's weights goes. They then train on at a tenth (LeNet) to a hundredth (AlexNet)
of the learning rate, and repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.checks import number
from ..core.granularity import Granularity
from ..core.names import LayerChoice, plain, unknown_name, unwrapped
from .choose import choose

__all__ = ["threshold_sparsity"]


def threshold_sparsity(
    model: nn.Module,
    quality: float | Mapping[str, float] = 1.0,
    *,
    layers: LayerChoice | Iterable[LayerChoice] | None = None,
    exclude: LayerChoice | Iterable[LayerChoice] = (),
    example_inputs: Any = None,
) -> dict[str, float]:
    """The share of each layer's weights that a threshold would zero, as a sparsity by layer.

    ```python
    shares = threshold_sparsity(model, 1.0)        # about 0.68 of normally distributed weights
    Sparsifier(model).sparsify_model(shares)       # zeroes just these weights
    SparsifyCallback(shares, schedule=one_shot)    # as many in a fit
    ```
    The threshold is `quality` times the standard deviation of the layer's weights, with those that
    are zero already; these count as gone. After training on, a second call goes further.

    Args:
        model: any network.
        quality: at least 0, or {layer name: quality}; layers not named stay dense.
        layers: as for `Sparsifier`, and `exclude` and `example_inputs` likewise.
        exclude: names or types of layers to leave alone.
        example_inputs: to find the output layer, which is left alone by default.

    Raises:
        ValueError: a negative quality, or a layer that does not exist.
    """
    network = unwrapped(model)
    groups = choose(network, Granularity("weight"), layers, exclude, example_inputs).groups
    weights = {plain(g.name): g.weight.detach() for g in groups}
    by_layer = quality if isinstance(quality, Mapping) else dict.fromkeys(weights, quality)
    for name, value in by_layer.items():
        if name not in weights:
            raise ValueError(unknown_name(name, weights, "quality"))
        number(
            value,
            f"quality of {name!r}" if isinstance(quality, Mapping) else "quality",
            hint=", the threshold in standard deviations",
        )
    return {name: _share_below(weights[name], value) for name, value in by_layer.items()}


def _share_below(weight: Tensor, quality: float) -> float:
    weight = weight.cpu().double()
    if not weight.any():
        return 0.0  # fresh
    kept = (weight.abs() >= quality * weight.std(correction=0)) & (weight != 0)
    return (weight.numel() - int(kept.count_nonzero())) / weight.numel()
