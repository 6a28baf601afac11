"""What is audited: a network and the batches it is audited on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..core.names import unwrapped
from ..core.progress import with_bar
from ..score.batches import Batch, as_batch, drawn, first_batches, n_inputs

__all__ = ["batches_of", "loader_of", "network_of", "predicted", "scores_of"]


def network_of(subject: Any, argument: str) -> nn.Module:
    """The network of a fastai Learner, or the network itself, without what wraps it.

    Raises:
        TypeError: neither of them.
    """
    model = subject if isinstance(subject, nn.Module) else getattr(subject, "model", None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{argument} must be a Learner or a torch.nn.Module, got {type(subject).__name__}"
        )
    return unwrapped(model)


def loader_of(dl: Iterable[Any] | None, *subjects: Any) -> Iterable[Any]:
    """The loader that is given, or the validation set of the first Learner.

    Raises:
        TypeError: there is none.
    """
    if dl is not None:
        return dl
    for subject in subjects:
        if not isinstance(subject, nn.Module) and hasattr(subject, "dls"):
            return subject.dls.valid
    raise TypeError("without a Learner pass a loader, as in dls.valid")


def scores_of(outputs: Any) -> Any:
    """What a network says of the classes: the first of several outputs, as fastai takes it."""
    if isinstance(outputs, tuple | list) and outputs:
        outputs = outputs[0]
    return outputs[:, None] if isinstance(outputs, Tensor) and outputs.ndim == 1 else outputs


def predicted(scores: Tensor) -> Tensor:
    """(N,) class numbers of scores (N, classes); one is the log-odds of the second of two."""
    return (scores[:, 0] > 0).long() if scores.shape[1] == 1 else scores.argmax(1)


def batches_of(
    dl: Iterable[Any], network: nn.Module, progress: bool, n_batches: int | None = None
) -> Iterator[Batch]:
    """The batches of a loader, on the network's device; the random state stays as it is.

    Args:
        dl: a loader or a list of batches.
        network: what takes them.
        progress: show a bar.
        n_batches: how many; None for all.

    Raises:
        ValueError: there are none.
    """
    batches, total = first_batches(dl, n_batches)
    batch = None
    with drawn(dl, network):
        n_inp = n_inputs(dl)
        for each in with_bar(batches, progress, total):
            batch = as_batch(each, network, n_inp)
            yield batch
    if batch is None:
        raise ValueError("the loader gave no batch")
