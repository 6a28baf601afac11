"""Imports point one way, and importing costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fasterai

ROOT = Path(fasterai.__file__).parent
ORDER = [
    "core",
    "coupling",
    "measure",
    "score",
    "fit",
    "sparse",
    "tickets",
    "regularize",
    "prune",
    "distill",
    "audit",
    "deploy",
    "report",
]
MAY = {
    "core": {"core"},
    "coupling": {"core", "coupling"},
    "measure": {"core", "coupling", "measure"},
    "score": {"core", "coupling", "measure", "score"},
    "fit": {"core", "coupling", "measure", "score", "fit"},
    "sparse": {"core", "coupling", "measure", "score", "fit", "sparse"},
    "prune": {"core", "coupling", "measure", "score", "fit", "prune"},
    "tickets": {"core", "coupling", "measure", "score", "fit", "sparse", "tickets"},
    "regularize": {"core", "coupling", "measure", "score", "fit", "sparse", "regularize"},
    "distill": {"core", "coupling", "measure", "score", "fit", "prune", "distill"},
    "audit": {"core", "coupling", "measure", "score", "prune", "audit"},
    "deploy": set(ORDER) - {"report"},
    "report": set(ORDER),
}
FILES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((name.name, node) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["fasterai", *path.parts[:-1]]
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, node.module or ""]), node


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    room = path.parts[0] if len(path.parts) > 1 else None
    for name, node in imported(path):
        if name.startswith("fasterai.") and room:
            assert name.split(".")[1] in MAY[room], f"{path} imports {name}"
        if name.split(".")[0] == "fastai":
            assert path.name == "callback.py", f"{path} imports {name}"
            assert not name.startswith("fastai.vision")
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            assert path.name == "all.py", f"{path} imports * from {name}"


def test_the_library_does_not_print():
    for path in FILES:
        calls = [
            n for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.Call)
        ]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path


def test_every_name_in_all_exists_and_stars_do_not_shadow_builtins():
    import builtins

    space = {}
    exec("from fasterai.all import *", space)
    names = {n for n in space if not n.startswith("__")}
    assert {"SparsifyCallback", "Sparsifier", "Pruner", "agp", "large_final", "compare"} <= names
    assert not names & set(dir(builtins)) and "random" not in names
    assert not names & {"Budget", "make_plan", "layer_costs", "as_criterion", "as_schedule"}


def test_import_loads_nothing_heavy():
    code = "import sys, fasterai; print(sorted({'torch', 'fastai', 'pandas'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    code = "import sys, fasterai.prune.pruner; print({'fastai', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
