"""The fastai callback that lets a network learn from a dense one while it shrinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from fastai.learner import Learner
from torch import Tensor, nn

from ..core.checks import is_number, is_whole, number
from ..core.copies import copied
from ..core.names import unwrapped
from ..fit.callback import FitCallback
from ..prune.callback import PruneCallback
from ..prune.plan import Plan
from .losses import attention_distance, soft_targets, value_distance
from .watch import layers_named, watched

__all__ = ["DistillCallback"]


class DistillCallback(FitCallback):
    """Learn from a dense network, too, during `fit`: `learn.fit(5, cbs=DistillCallback())`.

    ```python
    learn.fit(10, cbs=[SparsifyCallback(0.8), DistillCallback()])             # as it was before
    learn.fit(10, cbs=DistillCallback(teacher, features=['layer2', 'layer3']))
    ```
    The loss of a training batch becomes `(1 - weight) * loss + weight * distance of the outputs +
    feature_weight * sum of the distances of features`; what MixUp, mixed precision and gradient
    accumulation make of it is as without. The validation loss stays what it is. The teacher sees
    the same batch, in eval mode; it is not saved with the learner, and nothing stays on the
    models.

    Args:
        teacher: a network, or a learner whose model it is; default a copy of the model as it is
            when the fit begins, made anew in each fit.
        weight: of the teacher's outputs, in [0, 1]; the labels have the rest.
        temperature: see `soft_targets`.
        loss: another distance of the outputs, a function of both.
        features: names of layers whose outputs are to be alike, or {layer: layer of the teacher}.
        feature_weight: of their distances.
        match: 'attention' compares where in the image a layer is active, whatever the number of
            its channels; 'values' every number, of the channels that both have.
        kept: where channels were removed, which of the teacher's stayed: `pruner.plan`, or
            {layer of the teacher: positions}; for 'values'. Default what a `PruneCallback` in the
            same fit removes.
        channels: the dimension of the channels in features; -1 for transformers.

    Raises:
        ValueError, TypeError: at once for an argument that cannot be; before the first step of a
            fit for a layer that a network does not have; in its first batch where the outputs of
            both networks, or their features, differ in shape.
    """

    order = 1000  # last, so that nothing comes between it and the model or the loss

    def __init__(
        self,
        teacher: nn.Module | Learner | None = None,
        weight: float = 0.5,
        temperature: float = 4.0,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        features: Iterable[str] | Mapping[str, str] = (),
        feature_weight: float = 1.0,
        match: str = "attention",
        kept: Any = None,
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.teacher = teacher.model if isinstance(teacher, Learner) else teacher
        if self.teacher is not None and not isinstance(self.teacher, nn.Module):
            raise TypeError(f"teacher must be a network, a Learner or None, got {teacher!r}")
        self.weight = number(weight, "weight", most=1.0)
        if not is_number(temperature) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {temperature!r}")
        self.temperature = float(temperature)
        if match not in ("attention", "values"):
            raise ValueError(f"match must be 'attention' or 'values', got {match!r}")
        if isinstance(features, str):
            features = [features]
        pairs = features if isinstance(features, Mapping) else {name: name for name in features}
        for name in (*pairs, *pairs.values()):
            if not isinstance(name, str):
                raise TypeError(f"features are names of layers, got {name!r}")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be a function of two outputs or None, got {loss!r}")
        if kept is not None and not isinstance(getattr(kept, "kept", kept), Mapping):
            raise TypeError(
                f"kept must be a plan, as in kept=pruner.plan, or positions by layer, got {kept!r}"
            )
        if not is_whole(channels):
            raise TypeError(f"channels must be a dimension, such as 1 or -1, got {channels!r}")
        self.features, self.feature_weight = dict(pairs), number(feature_weight, "feature_weight")
        self.match, self.kept, self.channels, self.distance = match, kept, channels, loss
        self._copy: nn.Module | None = None
        self._missing = False  # given a teacher once, loaded without
        self._layers: tuple[dict[str, nn.Module], ...] = ()  # those watched, ours and theirs
        self._seen: dict[str, Tensor] = {}
        self._training_flags: dict[nn.Module, bool] = {}

    # --- events --------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Copy the model, before anything makes it sparse."""
        super().before_fit()
        self._copy = None
        if self._missing:
            raise ValueError(
                "the teacher was not saved with the learner: set cb.teacher to one, or take a new "
                "DistillCallback"
            )
        if self.teacher is None and self._active and not self._silent:
            self._copy = copied(unwrapped(self.learn.model))

    def begin(self) -> None:
        """Get the teacher ready; raises before anything is changed."""
        if not self._active:
            return
        model, teacher = self.learn.model, self._teacher
        if {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}:
            raise ValueError(
                "the teacher shares parameters with the model that learns: pass "
                "copy.deepcopy(model), or no teacher to have it copied"
            )
        ours = layers_named(model, self.features, "features")
        self._layers = ours, layers_named(teacher, self.features.values(), "features")
        self._training_flags = {m: m.training for m in teacher.modules()}
        teacher.to(next(model.parameters()).device).eval()

    def before_batch(self) -> None:
        """Watch the layers of the model for one run."""
        super().before_batch()
        self._seen = {}
        if self._learns and self.features:
            self._instead_of(self.learn.model, "forward", self._watched_forward)

    def after_pred(self) -> None:
        """Ask the teacher, and add to the loss that comes next."""
        if self._learns and len(self.yb):
            apart = self._apart()
            self._instead_of(self.learn, "loss_func", lambda f, *args: self._mixed(f(*args), apart))

    def after_batch(self) -> None:
        """Leave nothing where the batch was cancelled."""
        self._step_aside()

    def finish(self) -> None:
        """Let go of the copy; a teacher that was given trains or evaluates as it did."""
        for module, training in self._training_flags.items():
            module.training = training
        self._copy, self._layers, self._seen, self._training_flags = None, (), {}, {}

    # --- inside --------------------------------------------------------------------------------

    @property
    def _active(self) -> bool:
        return self.weight > 0 or bool(self.features and self.feature_weight)

    @property
    def _learns(self) -> bool:
        return self._training and self.training and self._active

    @property
    def _teacher(self) -> nn.Module:
        return self._copy if self.teacher is None else self.teacher

    def _watched_forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with watched(self._layers[0]) as seen:
            out = run(*args, **kwargs)
        self._seen = seen
        return out

    def _apart(self) -> Tensor | float:
        """The distances from the teacher, weighted."""
        teacher = self._teacher
        with torch.no_grad(), watched(self._layers[1]) as theirs:
            out = teacher(*self.xb)
        if isinstance(out, tuple | list) and isinstance(self.pred, Tensor):
            out = out[0]  # as RNNCallback takes the first of the model's
        total = self.weight * self._outputs_apart(out) if self.weight else 0.0
        ours, self._seen = self._seen, {}
        for name, other in self.features.items():
            for who, seen in ((name, ours), (other, theirs)):
                if who not in seen:
                    raise ValueError(
                        f"features: layer {who!r} was not seen to run; layers inside a compiled "
                        f"model are not"
                    )
            total = total + self.feature_weight * self._layers_apart(
                ours[name], theirs[other], other
            )
        return total

    def _outputs_apart(self, out: Any) -> Tensor:
        if self.distance is not None:
            return self.distance(self.pred, out)
        return soft_targets(self.pred, out, self.temperature)

    def _layers_apart(self, ours: Tensor, theirs: Tensor, layer: str) -> Tensor:
        if self.match == "attention":
            return attention_distance(ours, theirs, self.channels)
        if ours.shape != theirs.shape:
            inside, width = self._layers[1][layer], theirs.shape[self.channels]
            if self.kept is None:
                kept = _positions_since(self._cuts(), layer, inside, width)
            else:
                kept = _positions(self.kept, layer, inside)
            if kept is not None:
                index = torch.as_tensor(kept, device=theirs.device)
                theirs = theirs.index_select(self.channels, index)
        return value_distance(ours, theirs)

    def _cuts(self) -> list[Plan]:
        """What a callback of this fit has cut since it first saw the network, and before."""
        histories = (cb.history for cb in self.learn.cbs if isinstance(cb, PruneCallback))
        plans = [p for h in histories for p in (h.before, *(cut.plan for cut in h.cuts))]
        return [plan for plan in plans if plan is not None]

    def _mixed(self, loss: Tensor, apart: Tensor | float) -> Tensor:
        return (1 - self.weight) * loss + apart

    def __getstate__(self) -> dict[str, Any]:
        """Without the teacher: a learner is exported as it is used, alone."""
        empty = {"teacher": None, "_copy": None, "_layers": (), "_seen": {}, "_training_flags": {}}
        state = {**super().__getstate__(), **empty}
        return {**state, "_missing": self._missing or self.teacher is not None}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "teacher":
            vars(self)["_missing"] = False


def _positions(kept: Any, layer: str, inside: nn.Module) -> Sequence[int] | None:
    """Which of a layer's output channels stayed; None where nothing is known of it.

    Of a block of layers the last one that was cut tells.
    """
    if kept is None or isinstance(kept, Mapping):
        return None if kept is None else kept.get(layer)
    for weight, dim in _weights(layer, inside):
        found = kept.kept.get(weight, {}).get(dim)
        if found is not None:
            return found
    return None


def _positions_since(
    plans: Sequence[Plan], layer: str, inside: nn.Module, width: int
) -> Sequence[int] | None:
    """Which of so many channels stayed, from the cut on before which there were so many."""
    for weight, dim in _weights(layer, inside):
        index: Sequence[int] | None = None
        for plan in reversed(plans):
            kept = plan.kept.get(weight, {}).get(dim)
            if kept is not None:
                index = kept if index is None else [kept[i] for i in index]
                if plan.shapes[weight][dim] == width:
                    return index
    return None


def _weights(layer: str, inside: nn.Module) -> Iterator[tuple[str, int]]:
    """The weights of a layer, or of a block of them from its end, and which dimension makes."""
    for name, module in reversed(list(inside.named_modules(prefix=layer))):
        yield f"{name}.weight", int(isinstance(module, nn.modules.conv._ConvTransposeNd))
