"""How far a network is from its teacher: in what it predicts, and in what its layers make."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_distance", "attention_map", "soft_targets", "value_distance"]


def soft_targets(pred: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """The KL divergence from the teacher's softened probabilities, times `temperature ** 2`.

    Summed over classes, mean over the rest. The factor keeps its gradients as large as those of
    the labels. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015,
    https://arxiv.org/abs/1503.02531.

    Args:
        pred: (N, classes, ...) logits.
        teacher: logits of the same shape.
        temperature: what both are divided by.

    Raises:
        ValueError: other shapes, or fewer than two classes.
    """
    if not isinstance(pred, Tensor) or not isinstance(teacher, Tensor):
        raise ValueError(
            f"soft targets compare two tensors of logits, got {type(pred).__name__} and "
            f"{type(teacher).__name__} of the teacher: pass a loss of your own, loss(pred, teacher)"
        )
    if pred.shape != teacher.shape or pred.ndim < 2 or pred.shape[1] < 2:
        raise ValueError(
            f"soft targets compare logits (N, classes, ...) of one shape and at least two classes, "
            f"got {tuple(pred.shape)} and {tuple(teacher.shape)} of the teacher: for other "
            f"outputs pass a loss of your own, loss(pred, teacher)"
        )
    ours, theirs = (F.log_softmax(x.float() / temperature, dim=1) for x in (pred, teacher))
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    return divergence.mean() * temperature**2


def value_distance(features: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of two layers' outputs.

    As the hints of Romero et al., "FitNets", 2015, https://arxiv.org/abs/1412.6550, eq. 3, without
    a regressor in between; their half of a sum is a mean here.

    Raises:
        ValueError: other shapes.
    """
    if features.shape != teacher.shape:
        raise ValueError(
            f"features have the shape {tuple(features.shape)}, those of the teacher "
            f"{tuple(teacher.shape)}: say which channels were kept, kept=pruner.plan, or compare "
            f"maps of attention, match='attention'"
        )
    return (features.float() - teacher.float()).square().mean()


def attention_map(features: Tensor, channels: int = 1) -> Tensor:
    """(N, positions): squares summed over channels, divided by the norm of each sample's map.

    Zagoruyko & Komodakis, "Paying More Attention to Attention", 2017,
    https://arxiv.org/abs/1612.03928: the map `F_sum` with p = 2.
    """
    energy = features.float().square().sum(channels).flatten(1)
    return F.normalize(energy, dim=1)


def attention_distance(features: Tensor, teacher: Tensor, channels: int = 1) -> Tensor:
    """Half of the distance between two maps of attention, mean over the samples (their eq. 2).

    The numbers of channels may differ, the positions may not.

    Args:
        features: (N, channels, positions, ...).
        teacher: the same with any number of channels.
        channels: the dimension of the channels.

    Raises:
        ValueError: there are no positions, or other ones.
    """
    both = [list(x.shape) for x in (features, teacher)]
    for shape in both:
        if len(shape) < 3:
            raise ValueError(
                f"a map of attention needs positions beside channels, got features of shape "
                f"{tuple(shape)}: compare values, match='values'"
            )
        shape.pop(channels)
    if both[0] != both[1]:
        raise ValueError(
            f"features have the shape {tuple(features.shape)}, those of the teacher "
            f"{tuple(teacher.shape)}: their positions differ, choose other layers"
        )
    apart = attention_map(features, channels) - attention_map(teacher, channels)
    return torch.linalg.vector_norm(apart, dim=1).mean() / 2
