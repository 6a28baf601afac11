"""What a stranger gets: version, metadata, notebooks, README."""

import ast
import json
import re
import tempfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import fasterai

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def test_the_version_is_said_once():
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    version = config["DEFAULT"]["version"]
    assert version == fasterai.__version__
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_are_run_clean_and_small(path):
    book = json.loads(path.read_text())
    assert path.stat().st_size < 400_000
    code = [c for c in book["cells"] if c["cell_type"] == "code"]
    assert any(c["outputs"] for c in code), "run it with nbdev-test --save"
    assert all(c["execution_count"] is None for c in code), "clean it with nbdev-clean"
    text = "".join("".join(c["source"]) for c in code)
    assert "test_" in text or "assert " in text
    for out in (o for c in code for o in c["outputs"]):
        assert out["output_type"] != "error"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_figures_have_a_text_for_those_who_do_not_see_them(path):
    for cell in json.loads(path.read_text())["cells"]:
        if any("image/png" in out.get("data", {}) for out in cell.get("outputs", ())):
            said = [line[2:] for line in cell["source"] if line.startswith("#|")]
            text = yaml.safe_load("".join(said) or "{}").get("fig-alt", "")
            assert len(text) > 50, f"a cell without '#| fig-alt': {cell['source'][0]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_no_placeholder_was_left(path):
    cells = json.loads(path.read_text())["cells"]
    for text in ("".join(c["source"]).strip() for c in cells if c["cell_type"] == "markdown"):
        assert not re.fullmatch(r"[A-Z0-9_]+", text), text


def test_no_path_of_the_machine_it_was_made_on():
    here = [str(ROOT), str(Path.home()), tempfile.gettempdir()]
    for path in [*ROOT.glob("*.md"), *NOTEBOOKS, *(ROOT / "fasterai").rglob("*.py")]:
        text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())  # letters at random
        assert not any(place in text for place in here), path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name.name for name in node.names)


def test_no_module_imports_a_test_module():
    for path in (ROOT / "tests").glob("*.py"):
        parts = {part for name in imported(path) for part in name.split(".")}
        assert not [part for part in parts if part.startswith("test_")], path


def test_merges_are_finished():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*.ini"), *NOTEBOOKS]:
        assert not re.search(r"^(<{7}|>{7}) ", path.read_text(), re.M), path


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
