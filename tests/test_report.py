"""The page holds what was found, and nothing that could load or run."""

import base64
import copy
import io
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from learners import learner
from PIL import Image
from torch import nn

from fasterai.audit.classes import class_audit
from fasterai.audit.sensitivity import sensitivity
from fasterai.core.target import Target
from fasterai.measure.profile import compare, macs
from fasterai.prune.callback import PruneCallback
from fasterai.prune.pruner import Pruner
from fasterai.report.html import table
from fasterai.report.page import report
from fasterai.report.pictures import plot_cuts
from fasterai.report.sweep import sweep
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
QUICK = {"seconds": 0.01}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The tags, attributes, words and cells of a page."""

    def __init__(self, file):
        super().__init__()
        self.source = file.read_text("utf-8")
        self.tags, self.open, self.attributes = [], [], []
        self.rows, self.words = [], []
        self.feed(self.source)
        assert not self.open, "a tag was not closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def pictures(self):
        sources = [v for k, v in self.attributes if k == "src"]
        return [
            Image.open(io.BytesIO(base64.b64decode(s.removeprefix("data:image/png;base64,"))))
            for s in sources
        ]

    @property
    def titles(self):
        return re.findall(r"<h2>(.*?)</h2>", self.source)


@pytest.fixture
def everything(tmp_path):
    learn = learner()
    learn.fit(1)
    dense = copy.deepcopy(learn.model)
    found = sensitivity(learn, shares=(0.2, 0.5), progress=False)
    swept = sweep(learn, [0.5, Target(parameters=10)], 1, lr=1e-2, progress=False)
    cb = PruneCallback(Target(macs=0.5))
    learn.fit(2, cbs=cb)
    audit = class_audit(dense, learn, progress=False)
    networks = {"dense": dense, "pruned": learn.model}
    kinds = {"sensitivity": found, "audit": audit, "sweep": swept, "networks": networks}
    return cb, networks, report(tmp_path / "a.html", cb, example_inputs=X, **kinds, **QUICK)


def test_what_was_found_stands_on_the_page(everything):
    cb, networks, file = everything
    shown = Page(file)
    assert shown.titles == [
        "Asked and reached",
        "Costs",
        "Layer by layer",
        "Cuts",
        "Several targets",
        "Which layers can give",
        "Which classes pay",
        "Machine and versions",
    ]
    sizes = [sum(p.numel() for p in m.parameters()) for m in networks.values()]
    cells = {cell for row in shown.rows for cell in row}
    assert {f"{n:,}" for n in sizes} <= cells
    asked = dict(row for row in shown.rows if len(row) == 2 and row[0] != "layer")
    assert asked["target"] == "Target(macs=0.5)" and asked["by"] == "PruneCallback"
    allowed = float(asked["allowed"].replace(",", ""))
    assert allowed == round(0.5 * macs(networks["dense"], X)[""])
    assert asked["reached"] == f"{cb.budget.measured:,.0f}"
    assert asked["parameters"].startswith(f"{sizes[0]:,} \u2192 {sizes[1]:,} (")
    assert asked["torch"] == torch.__version__
    for layer in cb.report()["layer"]:
        assert any(row[0] == layer for row in shown.rows)
    costs = next(row for row in shown.rows if row[0] == "network")
    known = compare(networks, X, **QUICK)
    same = ["batch", "device", "dtype", "threads"]  # for both; nothing is noted of either
    assert costs[1:] == list(known.columns.drop([*same, "uncounted", "note"]))
    assert all(f"{name} {known[name].iloc[0]}" in shown.source for name in same)
    assert "Target(parameters=10) cannot be reached" in shown.source
    assert len(shown.pictures) >= 6 and all(p.width > 200 for p in shown.pictures)
    alts = [v for k, v in shown.attributes if k == "alt"]
    assert len(alts) == len(shown.pictures) and all(len(alt) > 30 for alt in alts)


def test_the_page_loads_and_runs_nothing(everything):
    shown = Page(everything[2])
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(shown.tags)
    assert not [k for k, _ in shown.attributes if k.startswith("on") or k == "href"]
    assert all(v.startswith("data:image/png") for k, v in shown.attributes if k == "src")
    assert "http:" not in shown.source and "https:" not in shown.source
    assert "url(" not in shown.source and "@import" not in shown.source
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in (
        shown.attributes
    )


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{$",
    "\u65e5\u672c &amp; \u202eabc",
    "</td></table>\n--><h1>",
    "a" * 300,
]


def test_hostile_names_are_text(tmp_path):
    model = nn.Sequential()
    for i, name in enumerate(HOSTILE):
        model.add_module(name, nn.Conv2d(3 if i == 0 else 8, 8, 1))
    pruner = Pruner(model, X)
    before = copy.deepcopy(model)
    pruner.prune_model(0.5)
    pruner.note(**{HOSTILE[0]: 0.5, HOSTILE[2]: 0.25})
    networks = {HOSTILE[1]: before, HOSTILE[4]: model}
    Sparsifier(model, exclude=HOSTILE[0]).sparsify_model(0.5)
    file = report(
        tmp_path / "a.html",
        pruner,
        networks=networks,
        example_inputs=X,
        title=HOSTILE[4],
        notes=HOSTILE[0],
        **QUICK,
    )
    shown = Page(file)
    cells = {cell for row in shown.rows for cell in row}
    assert set(HOSTILE) <= cells | set(shown.words)
    assert not {"script", "h4"} & set(shown.tags) and shown.tags.count("h1") == 1
    assert not [k for k, _ in shown.attributes if k.startswith("on")]
    assert len([t for t in shown.tags if t == "img"]) == len(shown.pictures)


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_zeros_have_a_page_too(tmp_path, granularity):
    learn = learner()
    cb = SparsifyCallback(0.5, granularity)
    learn.fit(1, cbs=cb)
    shown = Page(report(tmp_path / "a.html", cb))
    asked = dict(row for row in shown.rows if len(row) == 2)
    assert asked["by"] == "SparsifyCallback" and float(asked["reached"]) == 0.5
    assert shown.titles == ["Asked and reached", "Layer by layer", "Machine and versions"]
    networks = {"sparse": learn.model}
    shown = Page(report(tmp_path / "a.html", networks=networks, example_inputs=X, **QUICK))
    assert len(shown.pictures) == 1


def test_a_pruner_that_cut_nothing_and_long_tables(tmp_path):
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(40)])
    shown = Page(report(tmp_path / "a.html", Pruner(model, X)))
    assert "Cuts" not in shown.titles
    assert "details" in shown.tags and any("41 rows" in word for word in shown.words)


def test_what_is_no_finding_is_refused_before_anything_is_measured(tmp_path):
    file, model = tmp_path / "a.html", nn.Linear(2, 2)
    with pytest.raises(ValueError, match="networks are empty"):
        report(file, networks={}, example_inputs=X)
    for name, made in (
        ("audit", "class_audit"),
        ("sweep", "sweep"),
        ("sensitivity", "sensitivity"),
    ):
        for value in (3, "x", model):
            with pytest.raises(TypeError, match=rf"{name} must be what {made}\(\) returned, got"):
                report(file, **{name: value})
    assert not file.exists()


def test_nothing_is_left_open_or_half_written(tmp_path, monkeypatch):
    pruner = Pruner(learner().model, X)
    pruner.prune_model(0.5)
    own = plt.figure()
    figures = plt.get_fignums()
    file = tmp_path / "a.html"
    file.write_text("mine")
    with pytest.raises(TypeError, match="must be a pruner or its callback, got str"):
        report(file, "pruner")
    with pytest.raises(ValueError, match="nothing to tell"):
        report(file)
    with pytest.raises(ValueError, match="pass example_inputs"):
        report(file, pruner, networks={"a": pruner.model})
    monkeypatch.setattr("fasterai.report.page.machine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(file, pruner)
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]
    assert plt.get_fignums() == figures
    plt.close(own)


def test_cells():
    frame = pd.DataFrame({"n": pd.array([1234567, None], "Int64"), "x": [0.123456789, None]})
    assert re.findall(r'class="n">(.*?)<', table(frame)) == [
        "1,234,567",
        "0.1235",
        "\u2013",
        "\u2013",
    ]
    assert table(frame.iloc[:0]) == ""
    frame = pd.DataFrame({"x": [float("inf"), -5.5e6, 1e300, 0.0], "t": [True, None, "<", 2]})
    said = ["inf", "True", "-5,500,000", "\u2013", "1e+300", "&lt;", "0", "2"]
    assert re.findall(r'<td class="[nt]">(.*?)<', table(frame)) == said


def test_metrics_over_cuts():
    pruner = Pruner(learner().model, X)
    pruner.prune_model(0.5)
    with pytest.raises(ValueError, match="no metric None; it has: none"):
        plot_cuts(pruner.history.table())
    pruner.note(loss=2.0, accuracy=0.7)
    ax = plot_cuts(pruner.history.table())
    assert ax.get_ylabel() == "accuracy" and ax.lines[0].get_ydata().tolist() == [0.7]
    plt.close("all")
