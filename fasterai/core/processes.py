"""Several processes that train copies of one network: the first one decides, the others follow.

Under DistributedDataParallel the copies stay equal, for all of them take the same steps. What is
chosen by chance, or by numbers that each process has for itself, would tear them apart: so the
first process chooses and tells the others. They talk at the start and at updates, never at other
steps, and not at all where there is one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .criteria import NothingToCompare
from .names import plain

__all__ = ["Processes", "is_first", "must_renew", "refuse_sharded", "renew", "wrapper_of"]

T = TypeVar("T")


class Processes:
    """The processes among which DistributedDataParallel averages a network's gradients.

    True where there are several. All of them have to call the same methods in the same order.
    A copy of this, or one out of a pickle, is of one process.

    Args:
        model: a network, wrapped or not; None for one process.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        wrapper = None if model is None else wrapper_of(model)
        group = None if wrapper is None else wrapper.process_group
        self._group = group if group is not None and group.size() > 1 else None

    def __bool__(self) -> bool:
        return self._group is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return Processes, ()

    def decided(self, decide: Callable[[], T]) -> T:
        """What the first process decides, pickled, in all of them; only that one calls `decide`.

        What it raises is raised in all: `NothingToCompare` as such, other errors as RuntimeError.
        """
        if not self:
            return decide()
        told: list[Any] = ["", None]
        error = None
        if self._group.rank() == 0:
            try:
                told[1] = decide()
            except BaseException as e:  # an interrupt, too: the others are waiting
                error, told = e, [type(e).__name__, str(e)]
        dist.broadcast_object_list(told, group=self._group, group_src=0)
        if error is not None:
            raise error
        if told[0] == NothingToCompare.__name__:
            raise NothingToCompare(told[1])
        if told[0]:
            raise RuntimeError(f"the first process failed: {told[0]}: {told[1]}")
        return told[1]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Write the first process' values into these tensors of the others."""
        for tensor in tensors if self else ():
            values = tensor.contiguous()
            dist.broadcast(values, group=self._group, group_src=0)
            if values is not tensor:
                tensor.copy_(values)

    def together(self, do: Callable[[], T]) -> T:
        """Call `do` in each process; where it fails in one, it fails in all."""
        if not self:
            return do()
        result, error = None, None
        try:
            result = do()
        except BaseException as e:
            error = e
        said = self._gathered(f"{type(error).__name__}: {error}" if error is not None else "")
        if error is not None:
            raise error
        if any(said):
            where = next(i for i, text in enumerate(said) if text)
            raise RuntimeError(f"process {where} failed: {said[where]}")
        return result

    def first_of(self, value: T | None) -> T | None:
        """Of the values of all processes the first that is not None."""
        values = self._gathered(value) if self else [value]
        return next((own for own in values if own is not None), None)

    def must_agree(self, value: Any, what: str) -> None:
        """Refuse values that differ between processes, in all of them.

        Args:
            value: something that can be pickled and compared.
            what: begins the message: what differs and what to do about it.

        Raises:
            ValueError: they differ.
        """
        values = self._gathered(value) if self else [value]
        if any(other != values[0] for other in values):
            listed = ", ".join(f"{v!r} in process {i}" for i, v in enumerate(values))
            raise ValueError(f"{what}; got {listed if len(listed) < 500 else 'different ones'}")

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._group.size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def is_first() -> bool:
    """Whether this process is the one that reports: the first, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around a network, itself compiled or not."""
    while model is not None and not isinstance(model, DistributedDataParallel):
        model = model._modules.get("_orig_mod")
    return model


def refuse_sharded(model: nn.Module) -> None:
    """Refuse parameters of which each process holds a part.

    Raises:
        ValueError: there is one; the message names it.
    """
    tensors = sys.modules.get("torch.distributed.tensor")  # without it there are none
    for name, p in model.named_parameters() if tensors is not None else ():
        if isinstance(p, tensors.DTensor):
            raise ValueError(
                f"parameter {plain(name)!r} is a DTensor: each process holds a part of it "
                f"(fully_shard, or tensor parallelism), and what goes has to be chosen over the "
                f"whole. Sparsify or prune the network before it is sharded, or train it with "
                f"DistributedDataParallel"
            )


# --- after a cut ---------------------------------------------------------------------------------


def must_renew(model: nn.Module) -> None:
    """Refuse a DistributedDataParallel that `renew` could not make fit a smaller network.

    Raises:
        ValueError: it has what torch ties to the shapes at the start.
    """
    wrapper = wrapper_of(model)
    if wrapper is None:
        return
    problem = ""
    if wrapper.process_group != dist.group.WORLD:
        problem = "a process group of its own"
    elif getattr(wrapper, "_comm_hooks", ()):
        problem = "a communication hook"
    elif getattr(wrapper, "mixed_precision", None) is not None:
        problem = "mixed_precision"
    elif getattr(wrapper, "_delay_all_reduce_params", ()):
        problem = "parameters whose reduction is delayed"
    if problem:
        raise ValueError(
            f"DistributedDataParallel with {problem} cannot follow a network that becomes smaller: "
            f"wrap it without, or prune before it is wrapped"
        )


def renew(model: nn.Module) -> None:
    """Let DistributedDataParallel, if any, see the shapes of a network that was cut.

    Its reducer holds buckets of the gradients as they were. It is made anew as after unpickling,
    in the same wrapper, whose parameters are equal in all processes; call this in all of them,
    between a backward pass and the next forward pass.
    """
    wrapper = wrapper_of(model)
    if wrapper is None:
        return
    state = wrapper.__getstate__()
    wrapper._remove_autograd_hooks()
    wrapper.reducer = wrapper.logger = None
    wrapper.__setstate__(state)
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:  # its first backward pass averages at the end
        wrapper._static_graph_delay_allreduce_enqueued = False
