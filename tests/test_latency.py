"""Budgets of time, with a machine whose times are known: nothing here looks at a clock."""

import copy
import json
import math
import os
import pickle
import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torchvision
from networks import Residual, images, make
from torch import nn

from fasterai.core.target import Target
from fasterai.coupling.run import run_shapes
from fasterai.measure import latency
from fasterai.measure.costs import Costs
from fasterai.measure.latency import LatencyTable, operation_times
from fasterai.measure.profile import macs
from fasterai.prune import timed
from fasterai.prune.budget import UnreachableTarget
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner
from fasterai.prune.timed import TimedBudget

tv = torchvision.models
aten = torch.ops.aten


def up_to(n, step):
    return math.ceil(n / step) * step


class Machine:
    """Takes a millisecond for so many products, which it does in lanes; and somewhat for a call."""

    def __init__(self, lanes=1, overhead=0.01, slower=1.0, constant=0.0):
        self.lanes, self.overhead, self.slower = lanes, overhead, slower
        self.constant = constant  # of a whole network, outside of its operations
        self.asked = []

    def time(self, table, func, args):
        self.asked.append(func)
        if func is aten.convolution.default:
            x, weight = args[:2]
            first, second = (up_to(n, self.lanes) if n > 1 else n for n in weight.shape[:2])
            out = [n // s for n, s in zip(x.shape[2:], args[3], strict=True)]
            work = first * second * weight[0, 0].numel() * math.prod(out) * x.shape[0]
            return self.overhead + work / 1e6
        if func in (aten.mm.default, aten.addmm.default):
            a, b = args[-2:]
            return self.overhead + a.shape[0] * a.shape[1] * b.shape[1] / 1e6
        return self.overhead

    def whole(self, model, inputs, threads, states):
        return [self.of_network(model, inputs, state) for state in states]

    def of_network(self, model, inputs, state):
        machine, total = self, []

        class Adds(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in (aten.convolution.default, aten.mm.default, aten.addmm.default):
                    total.append(machine.slower * machine.time(None, func, args))
                return func(*args, **(kwargs or {}))

        with state():
            run_shapes(model, inputs, Adds())
        return sum(total) + self.constant


@pytest.fixture
def machine(monkeypatch):
    def install(**how):
        machine = Machine(**how)
        monkeypatch.setattr(LatencyTable, "time", lambda *a: machine.time(*a))
        monkeypatch.setattr(timed, "alternating", machine.whole)
        return machine

    return install


def resnet():
    torch.manual_seed(0)
    return tv.resnet18(num_classes=10).eval(), torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("target", [Target(speedup=2, batch=4), Target(latency_ms=150, batch=4)])
def test_the_target_is_met_where_the_table_is_right(machine, target, context):
    machine()
    model, x = resnet()
    pruner = Pruner(model, x)
    pruner.prune_model(target, context=context)
    budget = pruner.budget
    assert 0.9 * budget.goal <= budget.measured <= budget.goal
    assert budget.predicted == pytest.approx(budget.measured, rel=0.1)
    assert budget.goal == (150 if target.kind == "latency_ms" else budget.dense / 2)


def test_what_the_table_does_not_know_is_corrected_by_measuring(machine):
    """The whole network takes a constant time more, which no cut takes away."""
    machine(constant=100)
    model, x = resnet()
    pruner = Pruner(model, x)
    pruner.prune_model(Target(speedup=1.5, batch=4), context="global")
    assert 0.9 * pruner.budget.goal <= pruner.budget.measured <= pruner.budget.goal
    assert pruner.budget.predicted < 0.95 * pruner.budget.measured


@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_fast_widths_are_found_and_kept_to(machine, lanes):
    machine(lanes=lanes)
    model, x = resnet()
    pruner = Pruner(model, x)
    pruner.prune_model(Target(speedup=2))
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(n % lanes == 0 for n in widths) and min(widths) < 64
    here, x = resnet()
    ignoring = Pruner(here, x)
    ignoring.prune_model(Target(macs=macs(model, x)[""]))
    other = Machine(lanes=lanes)
    times = [other.whole(m, pruner.inputs, 1, [torch.no_grad])[0] for m in (model, here)]
    assert times[0] < times[1]  # as many MACs, in narrower lanes


def test_where_all_widths_are_as_good_none_are_rounded(machine):
    machine()
    model, x = resnet()
    Pruner(model, x).prune_model(Target(speedup=2))
    assert any(m.out_channels % 2 for m in model.modules() if isinstance(m, nn.Conv2d))


def test_what_is_too_fast_is_refused(machine):
    machine()
    model, x = resnet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UnreachableTarget, match="conv1 keeps"):
        Pruner(model, x).prune_model(Target(latency_ms=0.05))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_time_that_no_cut_saves_is_refused_before_anything_is_cut(machine):
    """It passes outside of the operations that the table knows."""
    known = machine(constant=10)
    model, x = resnet()
    pruner = GradualPruner(model, x)
    (dense,) = known.whole(model, pruner.inputs.batch(1), 1, [nullcontext])
    with pytest.raises(UnreachableTarget, match="the least that is left") as raised:
        pruner.check(Target(latency_ms=5))
    assert 10 < raised.value.least < dense
    pruner.check(Target(latency_ms=1.1 * raised.value.least))


def test_what_was_removed_before_counts_as_the_table_says(machine):
    machine()
    model, x = resnet()
    dense = Pruner(copy.deepcopy(model), x)
    dense.prune_model(Target(speedup=1.0001))
    pruner = GradualPruner(model, x)
    pruner.prune_to(0.5)
    for again in (pruner, GradualPruner(model, x, after=pruner.whole_plan)):
        with pytest.raises(UnreachableTarget, match="it allows .* ms") as raised:
            again.prune_to(Target(speedup=1000))
        assert pickle.loads(pickle.dumps(raised.value)).least == raised.value.least
        again.prune_to(Target(speedup=1.5))
        assert again.budget.dense == pytest.approx(dense.budget.dense, rel=0.02)


def test_a_network_is_timed_once_until_it_is_cut(machine, monkeypatch):
    machine()
    made = []
    monkeypatch.setattr(
        TimedBudget, "_costs", lambda self, old=TimedBudget._costs: made.append(1) or old(self)
    )
    pruner, target = GradualPruner(*resnet()), Target(speedup=2)
    pruner.check(target)
    assert not pruner.arrived(target) and len(made) == 1
    pruner.prune_to(target)
    assert len(made) == 1 and pruner.arrived(target) and len(made) == 2
    pruner.model.requires_grad_(False)
    pruner.arrived(target)
    assert len(made) == 3


def test_step_by_step(machine):
    known = machine()
    model, x = resnet()
    pruner = GradualPruner(model, x, "global")
    (dense,) = known.whole(model, pruner.inputs.batch(1), 1, [torch.no_grad])
    times = []
    for share in (0.3, 0.6, 1.0):
        pruner.prune_to(Target(speedup=2), share=share)
        times.append(pruner.budget.measured)
        assert pruner.budget.dense == pytest.approx(dense)
    assert times == sorted(times, reverse=True)
    assert 0.9 * dense / 2 <= times[-1] <= dense / 2
    assert pruner.arrived(Target(speedup=2))


@pytest.mark.parametrize(
    "build",
    [
        lambda: tv.mobilenet_v2(width_mult=0.25),
        lambda: tv.resnext50_32x4d(num_classes=4),
        lambda: tv.VisionTransformer(64, 16, 2, 4, 64, 128),
        lambda: tv.segmentation.fcn_resnet50(num_classes=2, weights_backbone=None),
    ],
)
def test_all_operations_are_timed_at_shapes_that_work(build, monkeypatch):
    """Real operations run, at full and halved widths; only the clock is not looked at."""
    failed = []

    def time(table, func, args):
        real = latency.map_tensors(args, table._numbers)
        try:
            func(*real)
        except Exception as error:
            failed.append((str(func), str(error)))
            raise
        return 1.0

    monkeypatch.setattr(LatencyTable, "time", time)
    torch.manual_seed(0)
    pruner = Pruner(build().eval(), torch.randn(1, 3, 64, 64))
    table = LatencyTable(1, torch.device("cpu"))
    where = pruner.model, pruner.inputs.batch(1), pruner._coupling, pruner._axes
    times, whole = operation_times(*where, table), [0] * len(pruner._axes)
    half = [axis.bundles // 2 for axis in pruner._axes]
    assert times.at(whole) > 10 and times.at(half) > 10
    assert not failed and Costs(times.terms, len(whole)).at(whole) > 10


def test_a_table_is_kept_in_a_file(tmp_path, monkeypatch):
    file = tmp_path / "layers.json"
    table = LatencyTable(1, torch.device("cpu"), file)
    args = torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta")
    took = table.time(aten.mm.default, args)
    table.save()
    assert list(json.loads(file.read_text()).values()) == [took]
    other = LatencyTable(1, torch.device("cpu"), tmp_path / "other.json")
    other.save()
    assert json.loads(other.file.read_text()) == {}  # tables keep what they measured themselves
    monkeypatch.setattr(latency, "_timer", None)  # nothing is measured again
    assert LatencyTable(1, torch.device("cpu"), file).time(aten.mm.default, args) == took
    for ms in ("NaN", "Infinity", "-5", "true", '"3"', "null"):
        file.write_text(f'{{"a": {ms}}}')
        with pytest.raises(ValueError, match="is no table of latencies: a takes"):
            LatencyTable(1, torch.device("cpu"), file)
    assert not latency._KNOWN.keys() & {"a"}
    with pytest.raises(FileNotFoundError, match="there is no folder .*none for a.json"):
        LatencyTable(1, torch.device("cpu"), tmp_path / "none" / "a.json")
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        LatencyTable(1, torch.device("cpu"), tmp_path)
    file.write_text("no table")
    with pytest.raises(ValueError, match="is no table of latencies"):
        LatencyTable(1, torch.device("cpu"), file)


def test_a_real_clock_says_something():
    model = make(Residual)
    pruner = Pruner(model, images())
    times = latency.alternating(model, pruner.inputs, 1, seconds=0.01, limit=0)
    assert len(times) == 1 and 0 < times[0] < 1e4


class Clock:
    """Stands for a timer whose network takes 10 and 4 ms by turns, on a machine that is disturbed.

    Args:
        slower: how much slower the machine is, by turn.
    """

    def __init__(self, slower):
        self.slower, self.calls = slower, 0

    def __call__(self, *args):
        return self

    def blocked_autorange(self, min_run_time):
        turn, state = divmod(self.calls, 2)
        self.calls += 1
        self.times = [(0.010, 0.004)[state] * self.slower(turn, state), 1.0]
        return self


@pytest.mark.parametrize(
    ("slower", "turns"),
    [
        (lambda turn, state: 1, 5),
        (lambda turn, state: 3 if turn > 2 else 1, 5),  # both, for long
        (lambda turn, state: 1 + 2 * (turn == 1 and state == 0), 5),  # one of them, once
        (lambda turn, state: 1 if (turn, state) == (0, 1) else 3, 5),  # one moment of quiet
        (lambda turn, state: 1 + 2 * (turn in (0, 2, 3) and state == 1), None),  # nearly always
    ],
)
def test_what_disturbs_the_machine_does_not_count(monkeypatch, slower, turns):
    clock = Clock(slower)
    monkeypatch.setattr(latency, "_timer", clock)
    states = [nullcontext] * 2
    pruner = Pruner(make(Residual), images())
    first, second = latency.alternating(pruner.model, pruner.inputs, 1, states)
    assert second / first == pytest.approx(0.4)
    assert clock.calls == 2 * turns if turns else clock.calls > 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_pages_are_got_once_while_networks_are_timed():
    """In a process of its own: what others freed may lie in the heap, and be got again."""
    script = """
import os, resource
import torch
from fasterai.measure.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**26, dtype=torch.uint8).fill_(1)  # 32 pages, or more
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

few = 20
assert faults() + faults() > few
os.environ["MALLOC_ARENA_MAX"] = "1"  # whoever sets limits keeps them
with freed_memory_kept():
    assert faults() + faults() > few
del os.environ["MALLOC_ARENA_MAX"]
with freed_memory_kept():
    assert min(faults() for _ in range(9)) < few  # the system may take pages back at any time
assert faults() + faults() > few
"""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUN"))}
    path = os.pathsep.join([str(Path(latency.__file__).parents[2]), own.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", script]
    ran = subprocess.run(command, env={**own, "PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
