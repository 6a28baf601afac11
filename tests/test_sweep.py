"""Several targets from one checkpoint: what is measured, kept, resumed and given back."""

import copy
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import AvgMetric
from fastai.metrics import error_rate
from fastai.optimizer import Adam
from learners import learner
from networks import Plain, Residual, make
from torch import nn

from fasterai.core.target import Target
from fasterai.deploy.files import load_pruned, read_plan
from fasterai.measure.profile import macs
from fasterai.prune.amounts import Units
from fasterai.prune.callback import PruneCallback
from fasterai.report.pictures import plot_frontier
from fasterai.report.sweep import _labelled, sweep
from fasterai.sparse.callback import SparsifyCallback

QUIET = {"progress": False, "lr": 1e-2}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(model=None, **kwargs):
    learn = learner(model, **kwargs)
    learn.fit(1)
    return learn


def state_of(learn):
    """All that a sweep might change, to compare."""
    return {
        "attributes": {k: id(v) for k, v in vars(learn).items()},
        "callbacks": [(id(cb), {k: id(v) for k, v in vars(cb).items()}) for cb in learn.cbs],
        "shapes": {k: tuple(p.shape) for k, p in learn.model.named_parameters()},
        "weights": [x.clone() for x in learn.model.state_dict().values()],
        "moments": copy.deepcopy(learn.opt.state_dict()),
        "mode": [m.training for m in learn.model.modules()],
        "random": (
            random.getstate(),
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
        ),
        "shuffling": learn.dls.train.rng.getstate(),
    }


def assert_same(learn, before):
    after = state_of(learn)
    for name in ("attributes", "callbacks", "shapes", "mode", "random", "shuffling"):
        assert after[name] == before[name], name
    for a, b in zip(after["weights"], before["weights"], strict=True):
        assert torch.equal(a, b)
    pairs = zip(after["moments"]["state"], before["moments"]["state"], strict=True)
    for a, b in pairs:
        for name, x in b.items():
            assert torch.equal(torch.as_tensor(a[name]), torch.as_tensor(x))


class Stop(Callback):
    """Fail in the n-th fit."""

    def __init__(self, at, error):
        self.at, self.error, self.fits = at, error, 0

    def before_fit(self):
        self.fits += 1

    def after_step(self):
        if self.fits == self.at:
            raise self.error


def test_classes_make_callbacks_too(tmp_path):
    class Half(PruneCallback):
        def __init__(self):
            super().__init__(0.5)

    assert _labelled({"half": Half}) == {"half": Half}


def test_the_table_tells_what_the_kept_networks_are():
    learn = trained(opt_func=Adam)
    before = state_of(learn)
    targets = [0, 0.5, Units(7), Target(macs=0.3), Target(parameters=10)]
    found = sweep(learn, targets[:2] + targets[3:], 1, **QUIET)
    assert_same(learn, before)
    table = found.table
    assert list(table.index) == ["dense", "0.0", "0.5", "Target(macs=0.3)", "Target(parameters=10)"]
    for label in table.index[1:-1]:
        small = found.model(label)
        assert table.loc[label, "parameters"] == sum(p.numel() for p in small.parameters())
        assert table.loc[label, "macs"] == macs(small, X)[""]
        right = total = 0
        for x, y in learn.dls.valid:
            right += int((small.eval()(x.as_subclass(torch.Tensor)).argmax(1) == y).sum())
            total += len(y)
        assert table.loc[label, "accuracy"] == pytest.approx(right / total)
    assert table.loc["dense", "macs"] == table.loc["0.0", "macs"] == macs(learn.model, X)[""]
    share = table.loc["Target(macs=0.3)", "macs"] / table.loc["dense", "macs"]
    assert table.loc["Target(macs=0.3)", "reached"] == pytest.approx(share) and share <= 0.3
    assert table.loc["0.5", "reached"] == 0.5
    assert table["met"].tolist()[3:] == [True, False]
    assert table.loc["Target(parameters=10)", "note"].startswith("Target(parameters=10) cannot be")
    with pytest.raises(KeyError, match="there are: '0.0', '0.5'"):
        found.model(Target(parameters=10))
    units = sweep(learn, [Units(7)], 1, context="global", **QUIET).table.loc["Units(n=7)"]
    assert units["asked"] == units["reached"] == 7 and units["met"]


def test_a_run_is_that_of_a_learner_of_its_own():
    found = sweep(trained(), [0.3, 0.5], 2, **QUIET)
    learn = trained()
    learn.fit(2, 1e-2, cbs=PruneCallback(0.5))
    for name, p in found.model(0.5).named_parameters():
        assert torch.equal(p, learn.model.get_parameter(name)), name


def test_units_are_counted_as_they_are_asked():
    class Groups(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=4)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.b(self.a(x).relu()).mean((2, 3)))

    table = sweep(trained(Groups()), [Units(2)], 1, context="global", **QUIET).table
    assert table.loc["Units(n=2)", "reached"] == 2 and table.loc["Units(n=2)", "met"]


def test_one_name_does_not_stand_for_two_targets(tmp_path):
    learn = trained()
    sweep(learn, {"small": 0.25}, 1, folder=tmp_path, **QUIET)
    before = (tmp_path / "sweep.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"'small' was 0\.25 .* and is 0\.75 now"):
        sweep(learn, {"small": 0.75}, 1, folder=tmp_path, **QUIET)
    assert (tmp_path / "sweep.jsonl").read_bytes() == before
    learn.metrics.append(AvgMetric(error_rate))
    with pytest.raises(ValueError, match="with other arguments: metrics was"):
        sweep(learn, {"small": 0.25}, 1, folder=tmp_path, **QUIET)


def test_one_shot_prunes_before_it_trains():
    seen = []

    class Widths(Callback):
        def after_batch(self):
            if self.training:
                seen.append(self.learn.model.c1.out_channels)

    sweep(trained(), [0.5], 1, way="one-shot", cbs=[Widths()], **QUIET)
    assert seen == [8] * 8


def test_callbacks_of_ones_own_and_times():
    targets = {
        "zeros": lambda: SparsifyCallback(0.5, "filter"),
        "both": lambda: [PruneCallback(0.5), Stop(9, None)],
    }
    found = sweep(trained(), targets, 1, seconds=0.01, batch=2, **QUIET)
    table = found.table
    assert table["reached"].tolist()[1:] == [0.5, 0.5] and table["latency_ms"].gt(0).all()
    on_one_clock = table["latency_ms"] * table["speedup"] / table.loc["dense", "latency_ms"]
    assert on_one_clock.tolist() == pytest.approx([1.0] * 3)
    assert table.loc["zeros", "parameters"] == table.loc["dense", "parameters"]
    assert table.loc["both", "parameters"] < table.loc["dense", "parameters"]
    assert (found.model("zeros").c1.weight.flatten(1) == 0).all(1).sum() == 8
    ax = plot_frontier({"a": found, "b": found}, against="latency_ms")
    drawn = [(line.get_marker(), line.get_color()) for line in ax.lines[2:]]
    assert len({m for m, _ in drawn}) == len({c for _, c in drawn}) == 2
    with pytest.raises(ValueError, match="no numbers 'note'"):
        found.plot(against="note")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_stopped_and_resumed(tmp_path, error):
    targets, learn = [0.3, 0.5, Target(macs=0.3)], trained()
    whole = sweep(trained(), targets, 1, cbs=[Stop(0, None)], **QUIET)
    before = state_of(learn)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        sweep(learn, targets, 1, cbs=[Stop(2, error)], folder=tmp_path, **QUIET)
    assert_same(learn, before)
    with (tmp_path / "sweep.jsonl").open("ab") as journal:
        journal.write(b'{"target": "0.5", "ro')  # killed while it wrote
    watch = Stop(0, None)
    found = sweep(learn, targets, 1, cbs=[watch], folder=tmp_path, **QUIET)
    assert watch.fits == 2  # the first was there
    assert found.table.drop(columns="seconds").equals(whole.table.drop(columns="seconds"))
    for target in targets:
        a, b = found.model(target).state_dict(), whole.model(target).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in b)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3 and all(read_plan(file) is not None for file in files)
    files[0].unlink()
    sweep(learn, [*targets, 0.2], 1, cbs=[watch], folder=tmp_path, **QUIET)
    assert watch.fits == 4  # the one whose file is gone, and the new one


KILLED = """
import os, sys
sys.path[:0] = ["tests"]
import matplotlib; matplotlib.use("Agg")
from test_sweep import *

class Kill(Stop):
    def after_step(self):
        if self.fits == 2: os._exit(9)

sweep(trained(), [0.3, 0.5], 1, cbs=[Kill(0, None)], folder=sys.argv[1], **QUIET)
"""


def test_a_killed_process_is_gone_on_with(tmp_path):
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)], check=False)
    assert run.returncode == 9

    class Kill(Stop):
        pass

    watch = Kill(0, None)
    found = sweep(trained(), [0.3, 0.5], 1, cbs=[watch], folder=tmp_path, **QUIET)
    assert watch.fits == 1
    own = load_pruned(make(Residual), next(tmp_path.glob("0.3-*")))
    for name, p in found.model(0.3).named_parameters():
        assert torch.equal(p, own.get_parameter(name))


def test_foreign_folders_are_refused_and_stay(tmp_path):
    learn = trained()
    sweep(learn, [0.5], 1, folder=tmp_path, **QUIET)
    journal = tmp_path / "sweep.jsonl"
    text = journal.read_bytes()

    def refused(match, learn=learn, **kwargs):
        with pytest.raises(ValueError, match=match):
            sweep(learn, [0.4], kwargs.pop("epochs", 1), **{"folder": tmp_path, **QUIET, **kwargs})

    refused("another network", trained(make(Plain)))
    refused("other arguments: epochs was 1 and is 2", epochs=2)
    refused("other arguments: lr was 0.01 and is 0.02", lr=0.02)
    refused("round_to was None and is 4", round_to=4)
    learn.loss_func = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    refused("on other data, or with another loss")
    learn.loss_func = torch.nn.CrossEntropyLoss()
    assert journal.read_bytes() == text
    for damaged in (b"hello\n", b"[1]\n", b"{}\n", text.replace(b'"row"', b'"raw"')):
        journal.write_bytes(damaged)
        refused("sweep")
        assert journal.read_bytes() == damaged
    refused("is a file", folder=journal)
    first, line = text.splitlines()
    evil = json.loads(line)
    evil["row"]["file"] = "../elsewhere.safetensors"
    journal.write_bytes(first + b"\n" + json.dumps(evil).encode() + b"\n")
    sweep(learn, [0.5], 1, folder=tmp_path, **QUIET)  # once more, for that line is no result
    last = json.loads(journal.read_bytes().splitlines()[-1])
    assert last["row"]["file"] == json.loads(line)["row"]["file"]


def test_bad_arguments_are_refused_before_anything_is_trained(tmp_path):
    learn, watch = trained(), Stop(0, None)
    for targets, error, match in (
        ([0.5, 40], ValueError, "for 40% pass 0.4"),
        ([0.5, 0.5], ValueError, "names of their own"),
        ([], ValueError, "names of their own"),
        ({"dense": 0.5}, ValueError, "other than 'dense'"),
        (0.5, TypeError, "targets are several"),
        (["half"], TypeError, "sparsity"),
    ):
        with pytest.raises(error, match=match):
            sweep(learn, targets, 1, cbs=[watch], folder=tmp_path / "new", **QUIET)
    with pytest.raises(ValueError, match="'gradual' or 'one-shot'"):
        sweep(learn, [0.5], 1, way="fast", cbs=[watch])
    for epochs in (-1, True, 1.5):
        with pytest.raises(ValueError, match=f"epochs must be a whole number .*got {epochs}"):
            sweep(learn, [0.5], epochs, cbs=[watch])
    with pytest.raises(ValueError, match="seconds must be a number >= 0, got nan"):
        sweep(learn, [0.5], 1, seconds=float("nan"), cbs=[watch])
    with pytest.raises(TypeError, match="takes a fastai Learner"):
        sweep(learn.model, [0.5], 1)
    with pytest.raises(TypeError, match="method of the Learner"):
        sweep(learn, [0.5], 1, fit="fly")
    assert not watch.fits and not (tmp_path / "new").exists()


def test_training_tables_are_not_shown():
    shown, learn = [], trained()
    learn.logger = shown.append
    sweep(learn, [0.5], 1, lr=1e-2)
    assert not shown and learn.logger == shown.append
