"""The README's Python runs as it stands, and its tables' layers, parameters and MACs are true."""

import os
import re
from pathlib import Path

import pytest
import torch
from fastai.vision.models.xresnet import xresnet18
from networks import size

from fasterai.measure.profile import macs
from fasterai.prune.pruner import Pruner

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def rows(report):
    """The rows of a transposed report of two layers."""
    return re.findall(r"^(layer|\w+_before|\w+_after) +(\S+) +(\S+)$", report, re.M)


def test_there_is_something_to_run():
    assert len(BLOCKS) >= 2


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_run_one_after_the_other(tmp_path, capsys):
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        space = {}
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), space)
            if "save_pruned" in block:
                trained = space["learn"].model
    finally:
        os.chdir(here)
    assert len(rows(README)) == 9 and rows(README) == rows(capsys.readouterr().out)
    assert space["pruner"].max_rel_diff < 1e-4
    x = space["dls"].one_batch()[0]
    assert torch.equal(space["small"].eval()(x), trained.eval()(x))


def test_the_networks_of_the_demo_have_the_parameters_and_macs_that_are_said():
    model, x = xresnet18(n_out=10).eval(), torch.randn(2, 3, 32, 32)
    found = [(size(model), macs(model, x)[""])]
    Pruner(model, x).prune_model(0.5)
    found.append((size(model), macs(model, x)[""]))
    said = re.findall(r"^(?:dense|pruned) +\S+ +(\d+) +(\d+) ", README, re.M)
    assert [(int(p), int(m)) for p, m in said] == found
