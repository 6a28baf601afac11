"""Norms that remember how wide they were, so that zero channels can go.

Channels that are zero add nothing to the sums of a layer or group norm, but count in its means. A
norm that divides by the original width computes the same without them. An RMS norm needs no other
code: with N channels of which n stay, scale * sqrt(N / n) and eps * N / n are the same function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .labels import Dim

__all__ = [
    "NarrowGroupNorm",
    "NarrowLayerNorm",
    "as_values",
    "by_root_mean_square",
    "from_values",
    "narrowed",
    "remembered",
]


class NarrowLayerNorm(nn.LayerNorm):
    """A layer norm over `width` channels, of which only those that are not zero are left.

    It has the parameters, names and options of the norm it comes from.

    Attributes:
        width: the channels there were.
        channel_dim: the dimension of the channels, -1 or 1.
    """

    width: int
    channel_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, ..., C) or, for maps, (N, C, H, W); or sequences, as a nested tensor."""
        if x.is_nested:  # of a transformer's encoder, where places are masked
            return torch.nested.as_nested_tensor([self(part) for part in x.unbind()])
        x = x.movedim(self.channel_dim, -1)
        _, mean, scale = torch.native_layer_norm(x, self.normalized_shape, None, None, self.eps)
        mean, scale = _widened(mean, scale, self.normalized_shape[0] / self.width, self.eps)
        out = ((x - mean) * scale).to(x.dtype) * self.weight
        out = out if self.bias is None else out + self.bias
        return out.movedim(-1, self.channel_dim)


class NarrowGroupNorm(nn.GroupNorm):
    """A group norm over groups of `width` channels, of which equally many are left in each.

    Attributes:
        width: the channels there were in a group.
    """

    width: int

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, *)."""
        batch, channels = x.shape[:2]
        places = math.prod(x.shape[2:])
        _, mean, scale = torch.native_group_norm(
            x, None, None, batch, channels, places, self.num_groups, self.eps
        )
        share = channels / self.num_groups / self.width
        mean, scale = _widened(mean[..., None], scale[..., None], share, self.eps)
        grouped = x.reshape(batch, self.num_groups, -1)
        out = ((grouped - mean) * scale).reshape(x.shape).to(x.dtype)
        shape = [-1] + [1] * (x.ndim - 2)
        return out * self.weight.view(shape) + self.bias.view(shape)


def _widened(mean: Tensor, scale: Tensor, share: float, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of channels, where a `share` of them is left and the others are 0."""
    left = mean.new_full((1,), share)  # no number: replay counts what networks multiply with
    wide = mean * left
    variance = scale**-2 - eps + (mean - wide).square()
    variance = left * variance + (1 - left) * wide.square()
    return wide, (variance + eps).rsqrt()


def narrowed(
    model: nn.Module, kept: Mapping[Dim, Tensor], sizes: Mapping[Dim, int]
) -> tuple[dict[nn.Module, dict[str, Any]], dict[Dim, Tensor]]:
    """How norms must change so that the zero channels they lose do not count.

    Args:
        model: the network.
        kept: the positions that stay of each dimension that is cut.
        sizes: how many there were.

    Returns:
        Attributes of norms to set, their class among them, and of what would run them fused; and
        factors for their scales.
    """
    attributes: dict[nn.Module, dict[str, Any]] = {}
    scales: dict[Dim, Tensor] = {}
    for name, module in model.named_modules():
        dim = Dim(f"{name}.weight" if name else "weight", 0)
        if dim not in kept or len(kept[dim]) == sizes[dim]:
            continue
        before, after = sizes[dim], len(kept[dim])
        eps = next((e for e in ("eps", "variance_epsilon") if hasattr(module, e)), None)
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            if not isinstance(module, NarrowLayerNorm):
                attributes[module] = {
                    "__class__": NarrowLayerNorm,
                    "width": before,
                    "channel_dim": 1 if _over_maps(module) else -1,
                }
        elif isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels:
            if not isinstance(module, NarrowGroupNorm):
                width = before // module.num_groups
                attributes[module] = {"__class__": NarrowGroupNorm, "width": width}
        elif eps is not None and by_root_mean_square(module):
            value = getattr(module, eps)
            value = torch.finfo(module.weight.dtype).eps if value is None else value
            attributes[module] = {eps: float(value) * before / after}
            scales[dim] = torch.full((before,), math.sqrt(before / after), dtype=torch.float64)
    return attributes | _unfused(model, attributes), scales


def _unfused(model: nn.Module, changed: Mapping[nn.Module, Any]) -> dict[nn.Module, dict[str, Any]]:
    """What keeps torch's fused transformer layers from reading such norms past their forward."""
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    return {x: dict(_UNFUSED) for x in layers if any(m in changed for m in x.modules())}


_UNFUSED = {"activation_relu_or_gelu": 0}  # read for that alone


_KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "NarrowLayerNorm": (NarrowLayerNorm, ("width", "channel_dim")),
    "NarrowGroupNorm": (NarrowGroupNorm, ("width",)),
}


def as_values(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as `narrowed` sets them, the class by its name."""
    return {
        "class" if name == "__class__" else name: value.__name__ if name == "__class__" else value
        for name, value in attributes.items()
    }


def remembered(module: nn.Module) -> dict[str, Any] | None:
    """What a norm that remembers its width has got; None for other modules."""
    kind, names = _KINDS.get(type(module).__name__, (None, ()))
    if kind is not type(module):
        return None
    return {"class": kind.__name__, **{name: getattr(module, name) for name in names}}


def from_values(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes to set so that a norm remembers its width; see `as_values`.

    Raises:
        ValueError: the module is no such norm, or the values are none that `narrowed` sets.
    """
    if isinstance(module, nn.TransformerEncoderLayer) and dict(values) == _UNFUSED:
        return dict(_UNFUSED)
    if "class" not in values:
        return _eps_from(module, values)
    kind, names = _KINDS.get(values["class"], (None, ()))
    if kind is None or set(values) != {"class", *names}:
        raise ValueError(f"one of {', '.join(_KINDS)} was expected, got {dict(values)}")
    size, width = _group_width(module, kind.__bases__[0]), values["width"]
    if type(width) is not int or not 0 < width <= size:
        raise ValueError(f"its width must lie in 1 to {size}, got {width!r}")
    channels = values.get("channel_dim", -1)
    if type(channels) is not int or channels not in (-1, 1):
        raise ValueError(f"its channels are along -1 or 1, got {channels!r}")
    return {"__class__": kind, **{name: values[name] for name in names}}


def _group_width(norm: nn.Module, kind: type[nn.Module]) -> int:
    """How many channels a layer or group norm normalises together."""
    if isinstance(norm, kind) and norm.weight is not None:
        if isinstance(norm, nn.GroupNorm):
            return norm.num_channels // norm.num_groups
        if len(norm.normalized_shape) == 1:
            return norm.normalized_shape[0]
    raise ValueError(f"a {kind.__name__} of channels was expected, it is a {type(norm).__name__}")


def _eps_from(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    eps = next((e for e in ("eps", "variance_epsilon") if hasattr(module, e)), None)
    if eps is None or not by_root_mean_square(module) or set(values) != {eps}:
        raise ValueError(f"an RMS norm with {next(iter(values), 'eps')!r} was expected")
    value = values[eps]
    if type(value) is not float or not 0 < value < math.inf:
        raise ValueError(f"its {eps} must be a positive number, got {value!r}")
    return {eps: value}


def by_root_mean_square(module: nn.Module) -> bool:
    """Whether a module is an RMS norm, of whichever library."""
    return "rms" in type(module).__name__.lower() or hasattr(module, "variance_epsilon")


def _over_maps(module: nn.Module) -> bool:
    """Whether a layer norm is one of those that normalise (N, C, H, W) over C."""
    first = getattr(module, "data_format", "") == "channels_first"
    return "2d" in type(module).__name__ or first
