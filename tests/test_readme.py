"""The README's Python runs as it stands, and its numbers of layers and shapes are true."""

import os
import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


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
    assert space["pruner"].max_rel_diff < 1e-4
    x = space["dls"].one_batch()[0]
    assert torch.equal(space["small"].eval()(x), trained.eval()(x))
