"""ONNX files in 8 bits, by onnxruntime's static quantization."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..core.checks import whole
from ..core.writing import writable
from ..coupling.inputs import Inputs
from .export import must_have, session_of

__all__ = ["quantize_onnx"]

_Feed = dict[str, np.ndarray]


def quantize_onnx(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    n_batches: int = 8,
    reduce_range: bool | None = None,
) -> float:
    """Write an ONNX file whose weights and activations have 8 bits.

    Convs and matrix products then compute with integers. Weights are signed, with a scale for each
    output channel; activations are unsigned, which is what CPUs are fast at, with a range that some
    batches show. Nothing is trained: look at the accuracy.

    Args:
        file: what `export_onnx` wrote.
        out: where to.
        batches: a `DataLoader` or any other iterable of batches in evaluation form, inputs first.
        n_batches: how many of them are looked at.
        reduce_range: weights of 7 bits, for x86 CPUs without VNNI, where sums of 8 bits overflow;
            None takes what comes nearer on this machine.

    Returns:
        How far the outputs are apart on the first batch, as a share of their norm.

    Raises:
        ImportError: onnx or onnxruntime is missing.
        FileNotFoundError: there is no such file, or no such folder.
        ValueError: the batches do not fit the file, or there are none; or it is no ONNX file, or
            one that is quantized already.
    """
    must_have("onnx", "onnxruntime")
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file, out = Path(file), writable(out)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: write it with export_onnx")
    _must_be_batches(batches, n_batches)
    session = _opened(file)
    feeds = list(_feeds(islice(batches, n_batches), [x.name for x in session.get_inputs()]))
    before = _run(session, feeds)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        ready, small = Path(folder, "ready.onnx"), Path(folder, out.name)
        quant_pre_process(file, ready, skip_symbolic_shape=True)
        _pad_averages(ready)
        found: dict[float, Path] = {}
        for reduced in (False, True) if reduce_range is None else (reduce_range,):
            tried = small.with_name(f"{reduced}-{small.name}")
            quantize_static(
                ready,
                tried,
                _Reader(feeds),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=reduced,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            found.setdefault(_apart(before, _run(session_of(tried), feeds)), tried)
        os.replace(found[min(found)], out)
    return min(found)


def _must_be_batches(batches: Any, n_batches: Any) -> None:
    """Refuse what is no batches, before a file is opened."""
    if isinstance(batches, Mapping):
        raise TypeError("batches are several, as in [batch]: a dict is one batch")
    whole(n_batches, "n_batches", 1)


def _opened(file: Path) -> Any:
    """A session of a file whose weights and activations are floats.

    Raises:
        ValueError: it is none.
    """
    import onnx

    try:
        model, session = onnx.load(file, load_external_data=False), session_of(file)
    except Exception as error:  # of many kinds
        raise ValueError(
            f"{file} is no ONNX file that onnxruntime runs: {type(error).__name__}: {error}; write "
            f"it with export_onnx"
        ) from error
    known = sorted(
        {node.op_type for node in model.graph.node if "quantize" in node.op_type.lower()}
    )
    if known:
        raise ValueError(
            f"{file} is quantized already, it has {', '.join(known)}: pass what export_onnx wrote"
        )
    return session


def _apart(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> float:
    """The norm of the difference, as a share of what there was before."""
    apart = sum(float(np.square(a - b).sum()) for a, b in zip(before, after, strict=True))
    size = sum(float(np.square(a).sum()) for a in before)
    return (apart / size) ** 0.5 if size else apart**0.5


def _pad_averages(file: Path) -> None:
    """Say as padding how far windows of averages reach beyond a map.

    `ceil_mode` says the same, but with that onnxruntime averages wrongly in 8 bits.
    """
    import onnx
    from onnx import helper

    model = onnx.load(file)
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][2:] for v in values}
    for node in model.graph.node:
        said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "AveragePool" or not said.get("ceil_mode") or any(said.get("pads", ())):
            continue
        read, made = sizes.get(node.input[0], [0]), sizes.get(node.output[0], [0])
        if not all([*read, *made]) or any(d != 1 for d in said.get("dilations", ())):
            continue
        places = zip(read, made, said["kernel_shape"], said["strides"], strict=True)
        beyond = [max(0, (out - 1) * step + window - n) for n, out, window, step in places]
        said |= {"ceil_mode": 0, "count_include_pad": 0, "pads": [0] * len(beyond) + beyond}
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(k, v) for k, v in said.items())
    onnx.save(model, file)


class _Reader:
    """Batches as onnxruntime's calibration asks for them."""

    def __init__(self, feeds: Sequence[_Feed]) -> None:
        self.left = iter(feeds)

    def get_next(self) -> _Feed | None:
        return next(self.left, None)


def _feeds(batches: Iterable[Any], names: Sequence[str]) -> Iterator[_Feed]:
    """The inputs in each batch by their names; what follows them, targets say, is left out."""
    found = False
    for batch in batches:
        tensors = Inputs.of(batch, samples=None).tensors
        if isinstance(batch, Mapping) and set(names) <= set(batch):
            tensors = [batch[name] for name in names]
        if len(tensors) < len(names):
            raise ValueError(f"the file takes {', '.join(names)}; a batch has {len(tensors)}")
        yield {n: x.detach().cpu().numpy() for n, x in zip(names, tensors, strict=False)}
        found = True
    if not found:
        raise ValueError("there are no batches: pass a DataLoader or a list of batches")


def _run(session: Any, feeds: Sequence[_Feed]) -> list[np.ndarray]:
    """The outputs on the first batch, those that are no integers, as float64."""
    try:
        out = session.run(None, feeds[0])
    except Exception as error:  # of onnxruntime's own kinds
        takes = ", ".join(f"{x.name} {x.shape} {x.type}" for x in session.get_inputs())
        has = ", ".join(f"{n} {list(x.shape)} {x.dtype}" for n, x in feeds[0].items())
        raise ValueError(f"the file takes {takes}; a batch has {has}: {error}") from error
    return [x.astype(np.float64) for x in out if np.issubdtype(x.dtype, np.floating)]
