"""Networks for other runtimes: `torch.export` programs and ONNX, with any batch size, checked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import TreeSpec, tree_map

from ..core.copies import copied
from ..core.names import unwrapped
from ..core.writing import writable
from ..coupling.inputs import Inputs, plainly, run_quietly, tensors_in
from ..measure.counts import numbers_needed
from ..prune.check import differences
from .sparse_layers import SparseConv, SparseLinear

__all__ = ["export_onnx", "export_program"]

_OTHER = 0.01  # share of the whole numbers of an output that rounding may turn into others


def export_program(
    model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True
) -> ExportedProgram:
    """The `torch.export` program of a network in eval mode, seen to compute the same.

    It needs no code of the network's: `torch.export.save(program, file)`, and elsewhere
    `torch.export.load(file).module()`. It has tensors of its own. It is run on the example inputs,
    on random ones and, where the batch is dynamic, on batches of 1, 3 and 8. The cache of keys and
    values that a language model returns is left out.

    Args:
        model: the network; it is left as it was.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        dynamic_batch: the first dimension of all inputs, where they agree on it, may have any size.

    Raises:
        ValueError: torch cannot follow the network, or not for any batch size.
        RuntimeError: the program computes something else.
    """
    network, inputs = _ready(model, example_inputs)
    dynamic = dynamic_batch and inputs.samples is not None
    program = _program(network, inputs, dynamic)
    runs = program.module()
    _must_agree(network, _batches(inputs, dynamic), lambda x: tensors_in(x(runs)), "the program")
    return program


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    file: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
) -> float:
    """Write a network in eval mode to an ONNX file that onnxruntime was seen to run alike.

    It is run as `export_program` tells. Tensors of more than 2 GB go to a file beside it. Inputs
    have the names of forward's arguments, outputs those of a dict's keys, or `output`, `output_0`,
    ..., and the size that may be any is `batch`.

    Args:
        model: the network; it is left as it was.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        file: where to; written when all was checked.
        dynamic_batch: the first dimension of all inputs, where they agree on it, may have any size.

    Returns:
        The largest difference of an output, as a share of the largest output.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: torch cannot follow the network, or ONNX has no words for it.
        RuntimeError: onnxruntime does not run it, or computes something else.
    """
    must_have("onnx", "onnxscript", "onnxruntime")
    file = writable(file)
    network, inputs = _ready(model, example_inputs)
    dynamic = dynamic_batch and inputs.samples is not None
    program = _program(network, inputs, dynamic)
    try:
        onnx = _in_onnx(program, _dynamic(inputs, "batch") if dynamic else None)
        _name_outputs(onnx.model.graph, program)
    except Exception as error:  # of many kinds
        raise ValueError(
            f"the network cannot be written as ONNX: {type(error).__name__}: {error}"
        ) from error
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        onnx.save(Path(folder, file.name))
        run = _feeding(Path(folder, file.name))
        apart = _must_agree(network, _batches(inputs, dynamic), run, "onnxruntime")
        for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == file.name):
            os.replace(part, file.parent / part.name)  # the network itself last
    return apart


def must_have(*packages: str) -> None:
    """Refuse what needs packages that are not there.

    Raises:
        ImportError: one is missing.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} missing: pip install {' '.join(missing)}")


def _ready(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, Inputs]:
    network, inputs = unwrapped(model), Inputs.of(example_inputs, samples=None)
    numbers_needed(network)
    for name, module in network.named_modules():
        if isinstance(module, SparseLinear | SparseConv):
            raise ValueError(
                f"{name!r} multiplies with a sparse matrix, which programs and ONNX do not know: "
                f"export the network that sparse_linear was given"
            )
    inputs.check(network)
    return network, inputs


def _program(network: nn.Module, inputs: Inputs, dynamic: bool) -> ExportedProgram:
    """The program, not compared with the network yet."""
    if dynamic:
        inputs = inputs.at_least(2)  # a batch of 1 is taken for a constant
    inputs, shapes = inputs.copies(), _dynamic(inputs) if dynamic else None
    network = _plain(copied(network).eval())
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


def _in_onnx(program: ExportedProgram, shapes: Any) -> Any:
    """A program in ONNX's words, with attention written out where that for it does not fit."""
    how = {"dynamo": True, "verbose": False, "dynamic_shapes": shapes}
    try:
        with torch.no_grad():
            return torch.onnx.export(program, **how)
    except Exception:  # of many kinds; attention over more than four dimensions has none
        if not any(node.target is _ATTENTION for node in program.graph.nodes):
            raise
    with torch.no_grad():
        plain = program.run_decompositions({_ATTENTION: _attention})
        return torch.onnx.export(plain, **how)


def _name_outputs(graph: Any, program: ExportedProgram) -> None:
    """Call the outputs of an ONNX graph what the network calls them, where nothing else has it."""
    names = ["_".join(path) for path in _paths(program.call_spec.out_spec)]
    names = [name if name[:1].isalpha() else f"output_{name}".rstrip("_") for name in names]
    values = [x for node in graph.all_nodes() for x in node.outputs]
    taken = {x.name for x in (*values, *graph.inputs, *graph.initializers.values())}
    if len(names) == len(graph.outputs):
        for value, name in zip(graph.outputs, names, strict=True):
            if name not in taken and value not in graph.inputs:
                value.name = name
                taken.add(name)


def _paths(spec: TreeSpec) -> Iterator[tuple[str, ...]]:
    """The keys, or else the places, that lead to each output."""
    if spec.is_leaf():
        yield ()
        return
    parts, keys = spec.children(), getattr(spec.context, "_fields", spec.context)
    if not (isinstance(keys, list | tuple) and len(keys) == len(parts)):
        keys = range(len(parts))
    for key, part in zip(keys, parts, strict=True):
        yield from ((str(key), *path) for path in _paths(part))


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    **how: Any,
) -> Tensor:
    """Attention as the operations it consists of."""
    math = torch.ops.aten._scaled_dot_product_attention_math
    return math(q, k, v, mask, dropout, causal, **how)[0]


def _plain(network: nn.Module) -> nn.Module:
    """A network that gives plain tensors: without fastai's casts, without caches of keys."""
    for module in list(network.modules()):
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False
        for name, child in module.named_children():
            kind = getattr(child, "tensor_cls", None)
            if isinstance(kind, type) and issubclass(kind, Tensor):
                module._modules[name] = nn.Identity()
    return network


def _dynamic(inputs: Inputs, size: Any = Dim.DYNAMIC) -> Any:
    """For each tensor among the inputs, that its first dimension may have any size."""
    return tree_map(
        lambda x: {0: size} if isinstance(x, Tensor) else None,
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


# --- whether it computes the same ----------------------------------------------------------------


def _batches(inputs: Inputs, dynamic: bool) -> list[Inputs]:
    """The example inputs first, then random ones and, where that may be, other batch sizes."""
    random = inputs.random_like()
    if not dynamic:
        return [inputs, random]
    return [inputs, inputs.batch(1), inputs.batch(8), random, random.batch(3)]


def _must_agree(
    model: nn.Module, batches: Sequence[Inputs], run: Callable[[Inputs], list[Tensor]], who: str
) -> float:
    """The largest relative difference between a model's outputs and those of `run`.

    Raises:
        RuntimeError: it is more than rounding, or something cannot be run.
    """
    expected: list[list[Tensor]] = []
    got: list[list[Tensor]] = []
    for batch in batches:
        try:
            with run_quietly(model), plainly():
                found = [y.cpu() for y in tensors_in(batch(model))]
        except Exception:  # whatever user code raises on random inputs
            if not expected:
                raise
            continue
        expected.append(found)
        try:
            with torch.no_grad(), plainly():
                got.append([y.cpu() for y in run(batch)])
        except Exception as error:  # of many kinds
            raise RuntimeError(
                f"{who} cannot run the network on {batch}: {type(error).__name__}: {error}"
            ) from error
    apart = differences(expected, got)
    if not apart.small:
        raise RuntimeError(
            f"{who} computes something else: outputs differ by {apart.relative:.0e} of the largest"
        )
    other = _whole_numbers_apart(expected, got)
    if other > _OTHER:
        raise RuntimeError(
            f"{who} computes something else: {other:.0%} of the whole numbers or bools of an "
            f"output differ"
        )
    return apart.relative


def _whole_numbers_apart(expected: Sequence[list[Tensor]], got: Sequence[list[Tensor]]) -> float:
    """Of the outputs of whole numbers or bools, the largest share that differs over all batches."""
    seen: dict[int, list[Tensor]] = {}
    for before, after in zip(expected, got, strict=True):
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            if not (a.is_floating_point() or a.is_complex()):
                seen.setdefault(i, []).append((a != b).flatten())
    found = [torch.cat(some).double() for some in seen.values()]
    return max((float(x.mean()) for x in found if x.numel()), default=0.0)


def _feeding(file: Path) -> Callable[[Inputs], list[Tensor]]:
    """Lets onnxruntime run a file."""
    opened: list[Any] = []

    def run(inputs: Inputs) -> list[Tensor]:
        session = opened[0] if opened else session_of(file)
        opened[:] = [session]
        names = [x.name for x in session.get_inputs()]
        feed = dict(zip(names, (x.cpu().numpy() for x in inputs.tensors), strict=True))
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return run


def session_of(file: Path) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(file, options, providers=providers)
