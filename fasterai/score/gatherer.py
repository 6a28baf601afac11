"""Gathers what criteria need of a network, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.criteria import Criterion
from ..core.gathered import Gathered
from ..core.names import unwrapped
from ..coupling.couple import couple
from ..coupling.inputs import Inputs, plainly, run_quietly
from .batches import Batch
from .gradients import OF_GRADIENTS, Gradients
from .inputs import InputNorms
from .maps import OF_MAPS, Maps
from .units import Units

__all__ = ["Gatherer"]

_PER_UNIT = ("filter_taylor", *OF_MAPS)
_OF_EACH_CHANNEL = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm


class Gatherer:
    """What criteria need, added up over batches; nothing stays on the model.

    Args:
        model: the network.
        needs: what to gather, of `GATHERED` or `'gradient'`.
        example_inputs: what the network runs on, to see which channels belong together.
        names: the weights that are to be scored; default all.

    Raises:
        ValueError: inputs that the network cannot run on.
    """

    def __init__(
        self,
        model: nn.Module,
        needs: Collection[str],
        example_inputs: Any,
        names: Collection[str] | None = None,
    ) -> None:
        self._model = network = unwrapped(model)
        self._needs = tuple(needs)
        coupled = "filter_taylor" in needs  # it adds up what goes with a filter
        self._weights = {
            name: p
            for name, p in network.named_parameters()
            if p.is_floating_point()
            if coupled or (p.ndim > 1 and (names is None or name in names))
        }
        self._shapes = {name: p.shape for name, p in network.named_parameters()}
        units = self._maps = self._norms = None
        if any(need in (*_PER_UNIT, "input_norm") for need in needs):
            inputs = Inputs.fitting(network, example_inputs)
        if any(need in _PER_UNIT for need in needs):
            coupling = couple(network, inputs)
            norms = {k for k, m in network.named_modules() if isinstance(m, _OF_EACH_CHANNEL)}
            units = Units(coupling, next(network.parameters()).device, norms)
            if any(need in OF_MAPS for need in needs):
                self._maps = Maps(network, inputs, coupling, units, needs)
        self._gradients = Gradients(self._weights, needs, units)
        if "input_norm" in needs:
            self._norms = InputNorms(network, self._weights, inputs)
        self._by_batch = {n for n in needs if n in OF_GRADIENTS and n != "fisher"}

    def reset(self) -> None:
        """Start anew."""
        for part in (self._gradients, self._maps, self._norms):
            if part is not None:
                part.reset()

    @property
    def watches(self) -> bool:
        """Whether the network must be watched while it runs."""
        return self._maps is not None or self._norms is not None

    @property
    def outgrown(self) -> bool:
        """Whether the network was cut meanwhile."""
        own = {name: p.shape for name, p in self._model.named_parameters()}
        return own != self._shapes

    @contextmanager
    def ready(self, training: bool = False) -> Iterator[None]:
        """While this lasts batches may be added; the model is put back afterwards."""
        frozen = [p for p in self._weights.values() if not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_(True)
            with run_quietly(self._model, training), plainly():
                yield
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def add(self, batch: Batch, loss_func: Callable[..., Tensor] | None) -> None:
        """Run the network on a batch, and backwards where that is needed."""
        if self._by_batch or self.watches:
            self._add(batch, loss_func, self._by_batch)
        if "fisher" in self._needs:
            with torch.enable_grad():
                for one in batch.each():
                    loss = _loss_of(one.inputs(self._model), one, loss_func)
                    own, _ = _gradients(loss, self._weights, [])
                    self._gradients.add(own, ["fisher"])

    def step(self) -> None:
        """Add the gradients that `loss.backward()` left, without a look at them.

        Of single examples there are none: `'fisher'` takes those of the batch.
        """
        own = {name: p.grad for name, p in self._weights.items()}
        self._gradients.add(own, OF_GRADIENTS)

    def look(self, batch: Batch, loss_func: Callable[..., Tensor] | None) -> None:
        """See on this batch alone what `step` cannot tell, in eval mode.

        Where several processes train one network, it is the batches of all of them.
        """
        parts = [part for part in (self._maps, self._norms) if part is not None]
        for part in parts:
            part.reset()
        with self.ready():
            self._add(batch, loss_func, ())
        if dist.is_available() and dist.is_initialized():
            for own in (x for part in parts for x in part.sums.values()):
                dist.all_reduce(own)

    def trial(self, criterion: Criterion) -> Criterion:
        """The criterion with ones for whatever there will be numbers for, to see if that is all."""
        data = self.gathered()
        found = {
            need: {name: torch.ones_like(x) for name, x in own.items()}
            for need, own in data.found.items()
        }
        return replace(criterion, data=replace(data, found=found))

    def gathered(self) -> Gathered:
        """What was gathered up to now."""
        found = self._gradients.found()
        if self._maps is not None:
            found |= self._maps.found(self._shapes)
        if self._norms is not None:
            found["input_norm"] = self._norms.found()
        return Gathered(found, self._shapes)

    def seen(self, criterion: Criterion) -> Criterion:
        """The criterion with what was gathered up to now."""
        return replace(criterion, data=self.gathered())

    # --- inside --------------------------------------------------------------------------------

    def _add(
        self, batch: Batch, loss_func: Callable[..., Tensor] | None, needs: Collection[str]
    ) -> None:
        """Run the network, watch it, and gather these needs of the weights' gradients."""
        gated = "map_taylor" in self._needs
        with torch.set_grad_enabled(gated or bool(needs)):
            with ExitStack() as stack:
                if self._maps is not None:
                    stack.enter_context(self._maps.watching(batch.size))
                if self._norms is not None:
                    stack.enter_context(self._norms.watching())
                out = batch.inputs(self._model)
            if not torch.is_grad_enabled():
                return
            loss = _loss_of(out, batch, loss_func)
            weights = self._weights if needs else {}
            own, of_gates = _gradients(loss, weights, self._maps.gates if gated else [])
        self._gradients.add(own, needs)
        if gated:
            self._maps.add(of_gates)


def _gradients(
    loss: Tensor, weights: Mapping[str, Tensor], gates: list[Tensor]
) -> tuple[dict[str, Tensor | None], list[Tensor | None]]:
    wanted = [*weights.values(), *gates]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return dict(zip(weights, found, strict=False)), list(found[len(weights) :])


def _loss_of(out: Any, batch: Batch, loss_func: Callable[..., Tensor] | None) -> Tensor:
    if loss_func is None:
        raise ValueError("gradients need a loss: pass loss_func, as in loss_func=learn.loss_func")
    loss = batch.compared(loss_func, out)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_func must return the mean loss of a batch, a number that depends on the "
            f"weights, got {got}"
        )
    return loss.squeeze()
