"""What coupling found, to look at: a table of the axes, and a picture of them."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..core.names import layer_of
from ..coupling.labels import CONSUME
from ..coupling.units import Axis

__all__ = ["axes_table", "draw_axes"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY, _PALE, _DARK = "#999999", "#DDDDDD", "#222222"
_NAMES, _REASONS = 3, 2  # so many are written out, the others counted
_LONG = 60  # characters of a reason
_WIDE = 40  # characters of a layer's name below the picture
_KEY = "dot: makes them; arrow: reads them; grey: none may go; dashed: mixed"
_COLUMNS = ("layer", "size", "blocks", "free", "producers", "consumers", "mixed", "pinned")


def axes_table(axes: Iterable[Axis]) -> pd.DataFrame:
    """A row for each axis: who makes its channels, who reads them, and what may go.

    Args:
        axes: as in `Coupling.axes`.

    Returns:
        `layer` (the first that makes the channels), `size` (units), `blocks` (parts that keep
        equally many), `free` (bundles, one unit of each block, that may go), `producers` and
        `consumers` (layers; the first few, and how many more), `mixed` (the operation that
        computes across the channels, or nothing) and `pinned` (the reasons why units stay, with
        how many each, the most frequent first, or nothing).
    """
    rows = [
        (
            _shown(axis.name),
            axis.size,
            axis.blocks,
            axis.bundles,
            _listed([_shown(name) for name in axis.producers], _NAMES),
            _listed([_shown(name) for name in _consumers(axis)], _NAMES),
            (axis.mixed or "").partition(":")[0],
            _reasons(axis),
        )
        for axis in axes
    ]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def _consumers(axis: Axis) -> tuple[str, ...]:
    return tuple(dict.fromkeys(s.module for s in axis.having(CONSUME)))


def _shown(name: str) -> str:
    return name or "(the model)"


def _listed(names: Sequence[str], most: int) -> str:
    more = [f"+{len(names) - most}"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _reasons(axis: Axis) -> str:
    counted = Counter(pin for pin in axis.pins if pin is not None).most_common()
    return _listed([f"{_cut(reason)} ({n})" for reason, n in counted], _REASONS)


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else text[: _LONG - 1].rstrip() + "…"


# --- pictures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """An axis as it is drawn: where along the layers it is made and read.

    Args:
        label: its size, `4 x 8` for 4 blocks of 8.
        colour: grey where nothing of it may go.
        style: 'dashed' where an operation mixes the channels, else 'solid'.
        made: places of its producers, ascending.
        read: places of its consumers, ascending.
        first: the place where it begins.
        last: the place where it ends, beyond the last layer shown where it goes on there.
    """

    label: str
    colour: str
    style: str
    made: tuple[int, ...]
    read: tuple[int, ...]
    first: int
    last: int


def draw_axes(
    axes: Sequence[Axis], order: Sequence[str] = (), *, most: int = 60, engine: str | None = None
) -> Any:
    """A picture of the axes: layers from left to right, joined by the channels they share.

    A layer has the colour of the channels that it makes; an axis is labelled with its size, as
    blocks x units where it has blocks; it is grey where none of it may go, and dashed where an
    operation mixes its channels. In a notebook the picture shows itself.

    Args:
        axes: as in `Coupling.axes`.
        order: parameters in the order in which they run, as in `Analysis.order`; default the
            order of the axes.
        most: layers to draw; of larger networks the first so many.
        engine: 'graphviz' or 'matplotlib'; default graphviz where its Python package and its
            program `dot` are installed.

    Returns:
        A `graphviz.Digraph` or a matplotlib `Figure`.

    Raises:
        ValueError: an engine of another name.
        ModuleNotFoundError: graphviz was asked for and is not installed.
    """
    engine = engine or ("graphviz" if _has_graphviz() else "matplotlib")
    if engine not in ("graphviz", "matplotlib"):
        raise ValueError(f"engine must be 'graphviz' or 'matplotlib', got {engine!r}")
    layers = _in_order(axes, order)
    note = f"the first {most} of {len(layers)} layers" if len(layers) > most else ""
    layers = layers[:most]
    lines = _lines(axes, layers)
    return (_dot if engine == "graphviz" else _figure)(layers, lines, note)


def _has_graphviz() -> bool:
    return importlib.util.find_spec("graphviz") is not None and shutil.which("dot") is not None


def _in_order(axes: Sequence[Axis], order: Sequence[str]) -> list[str]:
    """All layers, as they run; one that makes no channels behind the last whose it reads."""
    made = dict.fromkeys(name for axis in axes for name in axis.producers)
    ran = dict.fromkeys(layer_of(name) for name in order)
    layers = [name for name in dict.fromkeys([*ran, *made]) if name in made]
    for axis in axes:
        behind = max(layers.index(name) for name in axis.producers) + 1
        for name in reversed([c for c in _consumers(axis) if c not in made]):
            if name not in layers:
                layers.insert(behind, name)
            elif layers.index(name) < behind:  # it reads another axis, too
                layers.remove(name)
                layers.insert(behind - 1, name)
    return layers


def _lines(axes: Sequence[Axis], layers: Sequence[str]) -> list[_Line]:
    place = {name: i for i, name in enumerate(layers)}
    colours = iter(_COLOURS * len(axes))
    lines = []
    for axis in axes:
        names = *axis.producers, *_consumers(axis)
        made = sorted(place[name] for name in axis.producers if name in place)
        read = sorted(place[name] for name in _consumers(axis) if name in place)
        if not made and not read:
            continue
        ends = [*made, *read]
        beyond = any(name not in place for name in names)
        lines.append(
            _Line(
                _label(axis),
                next(colours) if axis.bundles else _GREY,
                "dashed" if axis.mixed else "solid",
                tuple(made),
                tuple(read),
                min(ends),
                len(layers) if beyond else max(ends),
            )
        )
    return lines


def _label(axis: Axis) -> str:
    whole = axis.blocks > 1 and axis.size % axis.blocks == 0
    return f"{axis.blocks} x {axis.size // axis.blocks}" if whole else str(axis.size)


def _colours(layers: Sequence[str], lines: Sequence[_Line]) -> list[str]:
    """The colour of each layer: that of the first channels it makes; pale where it makes none."""
    found = {place: line.colour for line in reversed(lines) for place in line.made}
    return [found.get(place, _PALE) for place in range(len(layers))]


# --- with matplotlib ---------------------------------------------------------------------------


def _figure(layers: Sequence[str], lines: Sequence[_Line], note: str) -> Any:
    """Layers in a row; above it a line for each axis, in which layers write and of which they read.

    Lines that do not overlap share a row, the short ones near to the layers.
    """
    import matplotlib.pyplot as plt

    rows = _rows(lines)
    names = [_end(_shown(name)) for name in layers]
    tall = 0.07 * max([len(name) for name in names], default=1)
    high = 1.1 + 0.42 * (max(rows, default=0) + 1)
    size = max(5.0, 0.42 * len(layers) + 0.6), high + tall
    fig = plt.figure(figsize=size, layout="constrained")
    ax = fig.add_subplot()
    for place, colour in enumerate(_colours(layers, lines)):
        ax.add_patch(plt.Rectangle((place - 0.38, -0.3), 0.76, 0.6, color=colour, zorder=3))
    for line, row, ports in zip(lines, rows, _ports(lines), strict=True):
        _draw(ax, line, row + 1.0, *ports)
    ax.set_xticks(range(len(layers)), names, rotation=90, fontsize=8)
    ax.tick_params(length=0)
    ax.set_yticks([])
    ax.set(xlim=(-0.7, len(layers) + 0.2), ylim=(-0.4, max(rows, default=0) + 1.7))
    ax.spines[:].set_visible(False)
    ax.set_title(f"Channels that go together{note and f': {note}'}\n{_KEY}", fontsize=8)
    plt.close(fig)  # what is returned shows itself, and only once
    return fig


def _end(name: str) -> str:
    """The end of a long name, from a dot on."""
    while len(name) > _WIDE and "." in name.lstrip("…."):
        name = "…" + name.lstrip("….").partition(".")[2]
    return name


def _rows(lines: Sequence[_Line]) -> list[int]:
    """A row for each line, such that none overlap; the shortest come first."""
    rows = [0] * len(lines)
    taken: list[list[_Line]] = []
    for i in sorted(range(len(lines)), key=lambda i: (lines[i].last - lines[i].first, i)):
        line = lines[i]
        free = (r for r, row in enumerate(taken) if not any(_overlap(line, o) for o in row))
        rows[i] = next(free, len(taken))
        if rows[i] == len(taken):
            taken.append([])
        taken[rows[i]].append(line)
    return rows


def _overlap(a: _Line, b: _Line) -> bool:
    """Lines may meet at a layer that reads one and makes the other."""
    return a.first < b.last and b.first < a.last or a.first == b.first or a.last == b.last


def _ports(lines: Sequence[_Line]) -> list[tuple[dict[int, float], dict[int, float]]]:
    """For each line at each layer, where it leaves (right half) and arrives (left half)."""
    leaving = _spread([line.made for line in lines], 0.1, 0.36)
    arriving = _spread([line.read for line in lines], -0.4, 0.06)
    return list(zip(leaving, arriving, strict=True))


def _spread(places: Sequence[tuple[int, ...]], low: float, high: float) -> list[dict[int, float]]:
    """Where lines touch layers: beside each other where several touch the same."""
    total = Counter(place for own in places for place in own)
    seen: Counter[int] = Counter()
    found = []
    for own in places:
        seen.update(own)
        found.append({p: p + low + (high - low) * seen[p] / (total[p] + 1) for p in own})
    return found


def _draw(ax: Any, line: _Line, y: float, made: dict[int, float], read: dict[int, float]) -> None:
    look = {"color": line.colour, "linestyle": line.style, "linewidth": 1.8}
    ends = [*made.values(), *read.values()]
    right = max(ends) if line.last in (*made, *read) else line.last + 0.1
    if not read:
        right = max(right, max(ends) + 0.4)  # an output of the network
    ax.plot([min(ends), right], [y, y], **look)
    for x in made.values():
        ax.plot([x, x], [0.3, y], **look)
        ax.plot([x], [y], "o", color=line.colour, markersize=5)
    for x in read.values():
        arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8, **look}
        ax.annotate("", (x, 0.3), (x, y), arrowprops=arrow)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    look = {"color": _DARK, "fontsize": 8, "ha": "center", "va": "bottom", "bbox": behind}
    ax.text(min(ends), y + 0.14, line.label, zorder=4, **look)


# --- with graphviz -----------------------------------------------------------------------------


def _dot(layers: Sequence[str], lines: Sequence[_Line], note: str) -> Any:
    """Layers as boxes; what several layers make together passes a point where it meets."""
    import graphviz

    graph = graphviz.Digraph(graph_attr={"rankdir": "LR", "label": note})
    graph.attr("node", shape="box", style="filled", fontname="sans-serif")
    graph.attr("edge", fontname="sans-serif", fontsize="10")
    for place, (name, colour) in enumerate(zip(layers, _colours(layers, lines), strict=True)):
        written = _DARK if colour == _PALE else "white"
        graph.node(f"layer{place}", _shown(name), color=colour, fontcolor=written)
    for i, line in enumerate(lines):
        _connect(graph, f"axis{i}", line)
    return graph


def _connect(graph: Any, name: str, line: _Line) -> None:
    """Edges from what makes an axis to what reads it later, as the network runs.

    A layer reads the sum of all that was made before it, hence the points.
    """
    look = {"color": line.colour, "fontcolor": line.colour, "style": line.style}
    label = line.label
    sources: list[str] = []
    early = [p for p in line.read if p <= min(line.made, default=p)]  # in no known order
    steps = [*sorted({*line.made, *line.read}), *(early if line.made else ())]
    for place in steps:
        if place in line.read and sources:
            if len(sources) > 1:
                sources = [_meet(graph, f"{name}at{place}", sources, look)]
            graph.edge(sources[0], f"layer{place}", label, **look)
            label = ""
        if place in line.made and f"layer{place}" not in sources:
            sources.append(f"layer{place}")
    if label:  # an output, or read by layers that are not shown
        graph.node(f"{name}out", label, shape="plaintext", style="", fontcolor=line.colour)
        for source in sources:
            graph.edge(source, f"{name}out", **look)


def _meet(graph: Any, point: str, sources: Sequence[str], look: dict[str, str]) -> str:
    graph.node(point, "", shape="point", color=look["color"])
    for source in sources:
        graph.edge(source, point, arrowhead="none", **look)
    return point
