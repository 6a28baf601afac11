"""Example inputs in the forms users have them, and running a network on them without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Inputs", "plain_attention", "run_quietly", "tensors_in"]


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of a network's forward, as plain tensors."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, example_inputs: Any, samples: int | None = 2) -> Inputs:
        """From a tensor, a tuple of positional or a dict of keyword inputs.

        Tensor subclasses become plain tensors. Where all tensors agree on their first dimension
        it is taken for the batch, and at most `samples` of it are used (None: all).
        """
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            args, kwargs = (), dict(example_inputs)
        elif isinstance(example_inputs, tuple | list):
            args, kwargs = tuple(example_inputs), {}
        else:
            args, kwargs = (example_inputs,), {}
        if not tensors_in((args, kwargs)):
            raise TypeError(
                "example_inputs must be a tensor, a tuple of positional inputs or a dict of "
                f"keyword inputs that holds a tensor, got {type(example_inputs).__name__}"
            )
        args, kwargs = tree_map(_plain, (args, kwargs))
        inputs = cls(args, kwargs)
        return inputs if samples is None else inputs._resized(samples, grow=False)

    def at_least(self, samples: int) -> Inputs:
        """Inputs with no fewer samples, by repeating those there are."""
        return self._resized(samples, grow=True)

    def batch(self, samples: int) -> Inputs:
        """Inputs with exactly so many samples, by repeating or leaving out."""
        return self._resized(samples, grow=True)._resized(samples, grow=False)

    def random_like(self) -> Inputs:
        """Other inputs of the same form: floats are normal with the same mean and spread.

        Integer and bool tensors stay as they are, for they may be indices. The global random
        state is not touched.
        """
        generator = torch.Generator().manual_seed(0)

        def other(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
                return x
            noise = torch.randn(x.shape, generator=generator).to(x)
            return noise * x.std(correction=0).clamp(min=1e-3) + x.mean()

        return Inputs(*tree_map(other, (self.args, self.kwargs)))

    def __call__(self, model: nn.Module) -> Any:
        """Run `model` on these inputs, as its training mode stands."""
        return model(*self.args, **self.kwargs)

    def __str__(self) -> str:
        shown = [f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in self.tensors]
        return ", ".join(shown)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the inputs."""
        return tensors_in((self.args, self.kwargs))

    @property
    def samples(self) -> int | None:
        """The size of the batch; None where the inputs do not agree on one."""
        sizes = {x.shape[0] if x.ndim else None for x in self.tensors}
        return sizes.pop() if len(sizes) == 1 else None

    def check(self, model: nn.Module) -> None:
        """Refuse inputs that lie on another device than the model."""
        device = next((p.device for p in model.parameters()), None)
        for x in self.tensors:
            if device is not None and x.device != device:
                raise ValueError(
                    f"example_inputs are on {x.device}, the model is on {device}: pass "
                    f"example_inputs.to('{device}'), or move the model"
                )

    def _resized(self, samples: int, grow: bool) -> Inputs:
        now = self.samples
        if not now or (now >= samples if grow else now <= samples):
            return self

        def resize(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if not grow:
                return x[:samples]
            return x.repeat(-(-samples // now), *[1] * (x.ndim - 1))

        return Inputs(*tree_map(resize, (self.args, self.kwargs)))


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _plain(x: Any) -> Any:
    return x.detach().as_subclass(Tensor) if isinstance(x, Tensor) else x


@contextmanager
def run_quietly(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run `model` in eval (or train) mode and leave no trace of it.

    No gradients, no autocast; training flags, buffers and the random state are put back.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(m, dict(m._buffers)) for m in model.modules()]
    copies = [(b, b.clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters()}
    gpus = [d for d in devices if d.type == "cuda"]
    try:
        with (
            torch.random.fork_rng(gpus),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, entries in buffers:
            module._buffers.update(entries)
        with torch.no_grad():
            for buffer, copy in copies:
                buffer.copy_(copy)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let transformer layers run as views and matrix products, not as one fused operation."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
