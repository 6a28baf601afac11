"""The table and the pictures of the axes, against what one reads in the code of each network."""

import importlib.machinery
import shutil
import sys
import types

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from networks import Dense, Depthwise, Gated, Parted, Plain, Residual, TwoHeads, images, make
from torch import nn

from fasterai.coupling.couple import couple
from fasterai.coupling.inputs import Inputs
from fasterai.prune.explain import axes_table, draw_axes


def coupled(model, x=None):
    return couple(model, Inputs.of(images() if x is None else x))


def table_of(kind):
    return axes_table(coupled(make(kind)).axes).set_index("layer")


# size, blocks, free, producers, consumers
READ = {
    Plain: {
        "a": (8, 1, 8, "a", "b"),
        "b": (12, 1, 12, "b", "fc1"),
        "fc1": (10, 1, 10, "fc1", "fc2"),
        "fc2": (5, 1, 0, "fc2", ""),
    },
    Residual: {
        "stem": (8, 1, 8, "stem, c2, c3", "c1, c3, head"),
        "c1": (16, 1, 16, "c1", "c2"),
        "head": (4, 1, 0, "head", ""),
    },
    Dense: {
        "a": (4, 1, 4, "a", "b, c, head"),
        "b": (6, 1, 6, "b", "c, head"),
        "c": (8, 1, 8, "c", "head"),
        "head": (5, 1, 0, "head", ""),
    },
    Depthwise: {
        "stem": (8, 1, 8, "stem, down, twice", "up, head"),
        "up": (16, 1, 16, "up, dw", "down"),
        "head": (4, 1, 0, "head", ""),
    },
    Gated: {
        "a": (8, 1, 8, "a, excite", "squeeze, spatial, head"),
        "squeeze": (4, 1, 4, "squeeze", "excite"),
        "head": (4, 1, 0, "head", ""),
    },
    Parted: {
        "a": (8, 1, 8, "a", "b"),
        "b": (8, 2, 4, "b", "left, right"),
        "left": (6, 1, 6, "left, right", "head"),
        "head": (4, 1, 0, "head", ""),
    },
}


@pytest.mark.parametrize("kind", READ, ids=lambda k: k.__name__)
def test_the_table_says_what_one_reads_in_the_code(kind):
    table = table_of(kind)
    assert table.columns.tolist()[-2:] == ["mixed", "pinned"]
    columns = ["size", "blocks", "free", "producers", "consumers"]
    found = {row.Index: tuple(row[1:]) for row in table[columns].itertuples()}
    assert found == READ[kind]
    assert (table["mixed"] == "").all()
    outputs = table["free"] == 0
    assert (table.loc[outputs, "pinned"] == f"network output ({table['size'].iloc[-1]})").all()
    assert (table.loc[~outputs, "pinned"] == "").all()


class Normed(nn.Module):
    """A layer norm behind a sum of five layers, which six layers read."""

    def __init__(self):
        super().__init__()
        self.make = nn.ModuleList(nn.Linear(6, 8) for _ in range(5))
        self.norm = nn.LayerNorm(8)
        self.read = nn.ModuleList(nn.Linear(8, 2) for _ in range(6))

    def forward(self, x):
        x = self.norm(sum(layer(x) for layer in self.make))
        return torch.cat([layer(x) for layer in self.read], 1)


def normed():
    return coupled(Normed(), torch.randn(3, 6))


def test_long_lists_are_shortened_and_mixing_is_named():
    row = axes_table(normed().axes).iloc[0]
    assert row["producers"] == "make.0, make.1, make.2, +2"
    assert row["consumers"] == "read.0, read.1, read.2, +3"
    assert row["mixed"] == "normalised over channels"


def test_reasons_are_counted_and_the_most_frequent_comes_first():
    axis = coupled(make(Plain)).axes[0]
    axis = axis.pinned("one", [0]).pinned("three", [1, 2, 3]).pinned("two", [4, 5])
    row = axes_table([axis]).iloc[0]
    assert row["pinned"] == "three (3), two (2), +1" and row["free"] == 2
    row = axes_table([coupled(make(Plain)).axes[0].pinned("x" * 200)]).iloc[0]
    assert len(row["pinned"]) < 80 and row["pinned"].endswith("x… (8)")


def test_a_model_that_is_one_layer_has_a_name():
    row = axes_table(coupled(nn.Linear(3, 4), torch.randn(2, 3)).axes).iloc[0]
    assert row["layer"] == row["producers"] == "(the model)"


def test_no_axes_make_an_empty_table_and_an_empty_picture():
    assert axes_table([]).empty and "layer" in axes_table([])
    assert isinstance(draw_axes([], engine="matplotlib"), Figure)


# --- pictures ----------------------------------------------------------------------------------


def drawn(coupling, **kwargs):
    """Names and colours of the layers, and all texts, of a matplotlib picture."""
    fig = draw_axes(coupling.axes, coupling.analysis.order, engine="matplotlib", **kwargs)
    assert isinstance(fig, Figure)
    (ax,) = fig.axes
    boxes = sorted((p for p in ax.patches if type(p) is Rectangle), key=lambda p: p.get_x())
    names = [label.get_text() for label in ax.get_xticklabels()]
    fig.draw_without_rendering()
    return dict(zip(names, (p.get_facecolor() for p in boxes), strict=True)), ax


def test_the_picture_has_every_layer_in_the_order_they_run():
    boxes, ax = drawn(coupled(make(TwoHeads)))  # registered from the last to the first
    assert list(boxes) == ["a", "b", "boxes", "classes"]
    boxes, ax = drawn(coupled(make(Gated)))
    assert list(boxes) == ["a", "squeeze", "excite", "spatial", "head"]
    assert [t.get_text() for t in ax.texts if t.get_text()] == ["8", "4", "4"]
    arrows = [t for t in ax.texts if getattr(t, "arrow_patch", None)]
    assert len(arrows) == 4  # squeeze, spatial and head read one axis, excite the other


def test_layers_of_one_axis_have_one_colour_and_pinned_ones_are_grey():
    boxes, _ = drawn(coupled(make(Residual)))
    assert boxes["stem"] == boxes["c2"] == boxes["c3"] != boxes["c1"]
    assert len(set(boxes["head"][:3])) == 1 and len(set(boxes["stem"][:3])) > 1
    axes = [axis.pinned("excluded") for axis in coupled(make(Residual)).axes]
    (ax,) = draw_axes(axes, engine="matplotlib").axes
    assert all(len(set(p.get_facecolor()[:3])) == 1 for p in ax.patches if type(p) is Rectangle)


def test_blocks_and_mixing_are_shown():
    _, ax = drawn(coupled(make(Parted)))
    assert "2 x 4" in [t.get_text() for t in ax.texts]
    _, ax = drawn(normed())
    assert "--" in {line.get_linestyle() for line in ax.lines}


def test_of_large_networks_the_first_layers_are_drawn_and_that_is_said():
    boxes, ax = drawn(coupled(make(Dense)), most=2)
    assert list(boxes) == ["a", "b"] and "the first 2 of 4 layers" in ax.get_title()


def test_lines_in_one_row_do_not_overlap():
    _, ax = drawn(coupled(make(Depthwise)))
    level = [x for x in ax.lines if len(set(x.get_ydata())) == 1 and len(x.get_ydata()) == 2]
    spans = [(line.get_ydata()[0], *sorted(line.get_xdata())) for line in level]
    assert len(spans) == 3
    for i, (y, low, high) in enumerate(spans):
        for other, left, right in spans[i + 1 :]:
            assert y != other or high < left or right < low


class Digraph:
    """Stands for graphviz.Digraph: remembers nodes and edges."""

    def __init__(self, graph_attr):
        self.graph_attr, self.nodes, self.edges = graph_attr, {}, []

    def attr(self, kind, **look):
        pass

    def node(self, name, label, **look):
        self.nodes[name] = {"label": label, **look}

    def edge(self, tail, head, label="", **look):
        self.edges.append((tail, head, label))


def graph_of(kind, monkeypatch, ordered=True):
    stand_in = types.ModuleType("graphviz")
    stand_in.Digraph = Digraph
    stand_in.__spec__ = importlib.machinery.ModuleSpec("graphviz", None)
    monkeypatch.setitem(sys.modules, "graphviz", stand_in)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    coupling = coupled(make(kind))
    return draw_axes(coupling.axes, coupling.analysis.order if ordered else ())


def reached(graph):
    """Which layers each layer leads to, through points; and the labels."""
    names = {n: look["label"] for n, look in graph.nodes.items() if n.startswith("layer")}
    heads = {}
    for tail, head, _ in graph.edges:
        heads.setdefault(tail, set()).add(head)

    def walk(node):
        for head in heads.get(node, ()):
            yield from [names[head]] if head in names else walk(head)

    return {name: sorted(set(walk(node))) for node, name in names.items()}


def test_graphviz_is_taken_where_it_is_installed(monkeypatch):
    graph = graph_of(Residual, monkeypatch)
    assert isinstance(graph, Digraph)
    assert reached(graph) == {
        "stem": ["c1", "c3", "head"],
        "c1": ["c2"],
        "c2": ["c3", "head"],
        "c3": ["head"],
        "head": [],
    }
    assert sorted(label for *_, label in graph.edges if label) == ["16", "8"]
    looks = {look["label"]: look for look in graph.nodes.values()}
    assert looks["stem"]["color"] == looks["c3"]["color"] != looks["c1"]["color"]
    assert "4" in looks  # the output


def test_graphviz_joins_what_is_concatenated_by_edges_of_their_own(monkeypatch):
    graph = graph_of(Dense, monkeypatch)
    assert reached(graph) == {
        "a": ["b", "c", "head"],
        "b": ["c", "head"],
        "c": ["head"],
        "head": [],
    }


@pytest.mark.parametrize("ordered", [True, False])
def test_graphviz_needs_no_order(monkeypatch, ordered):
    graph = graph_of(TwoHeads, monkeypatch, ordered)
    assert reached(graph) == {"a": ["b"], "b": ["boxes", "classes"], "boxes": [], "classes": []}


def test_without_graphviz_matplotlib_draws(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    axes = coupled(make(Plain)).axes
    assert isinstance(draw_axes(axes), Figure)
    with pytest.raises(ValueError, match="engine must be 'graphviz' or 'matplotlib', got 'dot'"):
        draw_axes(axes, engine="dot")


def test_the_real_graphviz_takes_the_graph():
    pytest.importorskip("graphviz")
    coupling = coupled(make(Gated))
    source = draw_axes(coupling.axes, coupling.analysis.order, engine="graphviz").source
    assert all(name in source for name in ("squeeze", "excite", "spatial"))
