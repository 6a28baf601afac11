"""Networks for other runtimes: `torch.export` programs and ONNX, with any batch size, checked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from ..core.names import unwrapped
from ..coupling.inputs import Inputs, plainly, run_quietly
from ..prune.check import differences
from .comparison import copied

__all__ = ["export_onnx", "export_program"]

_BATCHES = 1, 3, 8


def export_program(
    model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True
) -> ExportedProgram:
    """The `torch.export` program of a network in eval mode, for any batch size.

    It needs no code of the network's: `torch.export.save(program, file)`, and elsewhere
    `torch.export.load(file).module()`. It has tensors of its own.

    Args:
        model: the network; it is left as it was.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        dynamic_batch: the first dimension of all inputs may have any size.

    Raises:
        ValueError: torch cannot follow the network, or not for any batch size.
    """
    network, inputs = unwrapped(model), Inputs.of(example_inputs, samples=None)
    inputs.check(network)
    dynamic = dynamic_batch and inputs.samples is not None
    if dynamic:
        inputs = inputs.at_least(2).copies()  # a batch of 1 is taken for a constant
    shapes = _dynamic(inputs) if dynamic else None
    network = copied(network).eval()
    try:
        with _unfused(), torch.no_grad():
            return torch.export.export(
                network, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # many kinds, some of user code
        fix = "; dynamic_batch=False fixes the batch size to that of the example" if dynamic else ""
        raise ValueError(
            f"torch.export cannot follow the network on {inputs}: {type(error).__name__}: "
            f"{error}{fix}"
        ) from error


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    file: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
) -> float:
    """Write a network in eval mode to an ONNX file that onnxruntime was seen to run alike.

    It is run on the example inputs, on random ones and, where the batch is dynamic, on batches
    of 1, 3 and 8. Tensors of more than 2 GB go to a file beside it.

    Args:
        model: the network; it is left as it was.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        file: where to; written when all was checked.
        dynamic_batch: the first dimension of all inputs may have any size.

    Returns:
        The largest difference of an output, as a share of the largest output.

    Raises:
        ValueError: torch cannot follow the network.
        RuntimeError: onnxruntime computes something else.
    """
    program = export_program(model, example_inputs, dynamic_batch=dynamic_batch)
    with torch.no_grad():
        onnx = torch.onnx.export(program, dynamo=True, verbose=False)
    inputs = Inputs.of(example_inputs, samples=None)
    batches = [inputs, inputs.random_like()]
    if dynamic_batch and inputs.samples is not None:
        batches += [batches[1].batch(n) for n in _BATCHES]
    file = Path(file)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        onnx.save(Path(folder, file.name))
        apart = _apart(unwrapped(model), batches, Path(folder, file.name))
        for part in Path(folder).iterdir():
            os.replace(part, file.parent / part.name)
    return apart


def _dynamic(inputs: Inputs) -> Any:
    """For each tensor among the inputs, that its first dimension may have any size."""
    return tree_map(
        lambda x: {0: Dim.DYNAMIC} if isinstance(x, Tensor) else None,
        inputs.args or dict(inputs.kwargs),
    )


@contextmanager
def _unfused() -> Iterator[None]:
    """Transformer layers as the operations they consist of, which other runtimes know."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _apart(model: nn.Module, batches: Sequence[Inputs], file: Path) -> float:
    """The largest relative difference between a model and its file; see `export_onnx`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(file, options, providers=providers)
    names = [x.name for x in session.get_inputs()]
    expected, got = [], []
    for batch in batches:
        feed = dict(zip(names, (x.cpu().numpy() for x in batch.tensors), strict=True))
        got.append([torch.from_numpy(y) for y in session.run(None, feed)])
        with run_quietly(model), plainly():
            out = batch(model)
        expected.append([y.cpu() for y in tree_leaves(out) if isinstance(y, Tensor)])
    apart = differences(expected, got)
    if not apart.small:
        raise RuntimeError(
            f"onnxruntime's outputs differ from the network's by {apart.relative:.0e} of the "
            f"largest; nothing was written"
        )
    return apart.relative
