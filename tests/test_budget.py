"""Budgets: costs that are predicted exactly, targets that are met, and what is said where not."""

import copy
import itertools
import random

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from learners import data, learner
from networks import ALL, Mlp, Residual, conv, images, make
from torch import nn, optim

from fasterai.core.criteria import Criterion, grad_crit, large_final, small_final
from fasterai.core.masks import Limits
from fasterai.core.schedule import lin
from fasterai.core.target import Target
from fasterai.coupling.probe import cutting
from fasterai.coupling.surgery import shadowed
from fasterai.measure.costs import Costs, Running, macs_of_widths, parameters_of_widths
from fasterai.measure.profile import macs, saved_bytes
from fasterai.prune.budget import UnreachableTarget
from fasterai.prune.callback import PruneCallback
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner
from fasterai.prune.queues import Queue, by_importance, by_share
from fasterai.sparse.sparsifier import Sparsifier

tv = torchvision.models
LARGER = {
    "vit": lambda: tv.VisionTransformer(64, 16, 2, 4, 64, 128),
    "swin": lambda: tv.SwinTransformer([4, 4], 16, [2, 1], [2, 4], [4, 4]),
    "mobilenet": lambda: tv.mobilenet_v2(width_mult=0.25),
    "densenet": lambda: tv.DenseNet(8, (3, 2), 16),
    "regnet": lambda: tv.resnext50_32x4d(num_classes=10),
    "shufflenet": tv.shufflenet_v2_x0_5,
}


def network(name):
    if name not in LARGER:
        return make(name), images()
    torch.manual_seed(0)
    return LARGER[name]().eval(), torch.randn(2, 3, 64, 64)


def count(model):
    return sum(p.numel() for p in model.parameters())


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(before, model):
    now = model.state_dict()
    return before.keys() == now.keys() and all(torch.equal(x, now[n]) for n, x in before.items())


COUNTS = {"macs": lambda m, x: macs(m, x)[""], "parameters": lambda m, x: count(m)}
COUNTS["bytes"] = lambda m, x: saved_bytes(m)


# --- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", [*ALL, *LARGER])
def test_predicted_costs_are_those_of_the_network_that_is_cut(name, heads):
    model, x = network(name)
    pruner = Pruner(model, x, whole_heads=heads)
    axes, coupling, inputs = pruner._axes, pruner._coupling, pruner.inputs
    predicted = Costs(macs_of_widths(model, inputs, coupling, axes), len(axes))
    sizes = parameters_of_widths(dict(model.named_parameters()), axes, lambda x: 1)
    sizes = Costs(sizes, len(axes))
    assert predicted.at([0] * len(axes)) == macs(model, inputs)[""]
    assert sizes.at([0] * len(axes)) == count(model)
    pick = random.Random(0)
    for _ in range(4):
        counts = [pick.randint(0, max(0, axis.bundles - 1)) for axis in axes]
        remove = {}
        for a, (axis, n) in enumerate(zip(axes, counts, strict=True)):
            order = torch.randperm(len(axis.free))
            remove[a] = torch.zeros(axis.size, dtype=torch.bool)
            remove[a][axis.bundled(axis.free[order])[:n].flatten()] = True
        with shadowed(model, cutting(model, coupling, axes, remove), shapes=True):
            assert predicted.at(counts) == macs(model, inputs)[""]
            assert sizes.at(counts) == count(model)


def test_running_costs_are_those_from_the_start():
    terms = [(2.0, [(5, ((0, 1),)), (7, ((1, 2), (0, 1)))]), (3.0, [(4, ())])]
    costs = Costs(terms, 2)
    left = Running(costs, [0, 0])
    assert left.total == 2 * 5 * 7 + 12 == costs.at([0, 0])
    assert left.saving(0, 2) == 2 * (35 - 3 * 5)
    left.remove(0, 2)
    left.remove(1, 1)
    assert left.total == 2 * 3 * (7 - 2 - 2) + 12 == costs.at([2, 1])
    assert costs.at([-1, 0]) == 2 * 6 * 8 + 12  # as if more were there


def test_saved_bytes_are_those_of_the_file(tmp_path):
    model = make(Residual)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert saved_bytes(model) == pytest.approx((tmp_path / "model.pth").stat().st_size, abs=2000)


# --- what goes ---------------------------------------------------------------------------------


def queue(importance, weight=None, steps=None):
    cumulated = [0.0, *itertools.accumulate(sorted(importance))]
    n = len(importance)
    return Queue(torch.arange(n)[:, None], cumulated, weight, steps or range(1, n + 1))


def test_of_equal_costs_the_least_important_go():
    importance = [[3.0, 1.0, 2.5], [2.0, 0.5, 4.0], [0.7, 5.0, 6.0]]
    costs = Costs([(1.0, [(3, ((a, 1),))]) for a in range(3)], 3)
    for goal in range(10):
        counts = by_importance(costs, [queue(i) for i in importance], goal)
        lost = sum(sum(sorted(i)[:n]) for i, n in zip(importance, counts, strict=True))
        every = itertools.product(range(4), repeat=3)
        best = min(
            sum(sum(sorted(i)[:n]) for i, n in zip(importance, c, strict=True))
            for c in every
            if 9 - sum(c) <= goal
        )
        assert costs.at(counts) == goal and lost == pytest.approx(best)


def test_of_equal_importance_the_expensive_go():
    costs = Costs([(10.0, [(4, ((0, 1),))]), (1.0, [(4, ((1, 1),))])], 2)
    assert by_importance(costs, [queue([1.0] * 4), queue([1.0] * 4)], 24) == [2, 0]


def test_what_is_left_of_an_axis_becomes_dearer():
    costs = Costs([(1.0, [(6, ((a, 1),))]) for a in range(2)], 2)
    queues = [queue([1.0] * 6, weight=1), queue([10.0] * 6, weight=1)]
    assert sorted(by_importance(costs, queues, 6)) == [3, 3]  # not all of the weak one
    assert by_importance(costs, [queue([1.0] * 6), queue([10.0] * 6)], 6) == [6, 0]


def test_savings_follow_what_is_gone():
    """Two layers in a row, and another pair: brute force finds the same as the greedy way."""
    a, b, c = ((8, ((i, 1),)) for i in range(3))
    costs = Costs([(1.0, [a, b]), (1.0, [b, c])], 3)
    counts = by_importance(costs, [queue([1.0] * 8) for _ in range(3)], 64)
    assert counts[1] == 4 and counts[0] == counts[2] == 0  # b saves twice as much
    every = itertools.product(range(9), repeat=3)
    assert min(sum(n) for n in every if costs.at(n) <= 64) == sum(counts)


def test_one_large_unit_waits_where_small_ones_fill_the_gap():
    costs = Costs([(100.0, [(4, ((0, 1),))]), (1.0, [(200, ((1, 1),))])], 2)
    queues = [queue([1.0] * 4), queue([1.0] * 200)]
    counts = by_importance(costs, queues, 450)
    assert 0.99 * 450 <= costs.at(counts) <= 450
    assert by_importance(costs, [queue([1.0] * 4), queue([])], 350) == [3, 0]  # nothing else does


def test_equal_shares_and_only_as_many_of_the_last_step_as_it_takes():
    costs = Costs([(1.0, [(10, ((a, 1),))]) for a in range(3)], 3)
    queues = [queue([1.0] * 10) for _ in range(3)]

    def shares(share):
        return [round(share * 10)] * 3

    assert by_share(costs, queues, 15, shares) == [5, 5, 5]
    assert sorted(by_share(costs, queues, 14, shares)) == [5, 5, 6]
    assert by_share(costs, queues, 30, shares) == [0, 0, 0]


class Narrow(nn.Module):
    """Its width goes in eight large steps, the widths inside of its layers one by one."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embedding, self.inner = nn.Embedding(60, 32), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 2)

    def forward(self, words):
        return self.head(self.inner(self.embedding(words)).mean(1))


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.3])
def test_where_a_layer_goes_in_large_steps_others_keep_more(share):
    torch.manual_seed(0)
    model, words = Narrow().eval(), torch.randint(60, (2, 12))
    allowed = share * sum(p.numel() for p in model.parameters())
    Pruner(model, words).prune_model(Target(parameters=share), verify=False)
    assert 0.99 * allowed <= sum(p.numel() for p in model.parameters()) <= allowed


def test_shares_go_to_the_nearest_step():
    """So that a narrow layer whose steps are large does not stay whole beside wide ones."""
    sizes, steps = (32, 320), (range(16, 32, 16), range(16, 320, 16))
    costs = Costs([(1.0, [(n, ((a, 1),))]) for a, n in enumerate(sizes)], 2)
    queues = [queue([1.0] * n, steps=s) for n, s in zip(sizes, steps, strict=True)]

    def shares(share):
        return [round(share * n) for n in sizes]

    assert by_share(costs, queues, 0.6 * sum(sizes), shares) == [16, 128]


@given(st.sets(st.integers(1, 30)), st.integers(0, 35), st.integers(0, 30))
def test_the_nearest_step(steps, n, due):
    queue = Queue(torch.arange(30)[:, None], [0.0] * 31, None, sorted(steps), due)
    brute = min({0, *steps}, key=lambda s: (abs(s - n), s))
    assert queue.nearest(n) == max(due, brute)


def near(reached, share, dense):
    """At most this share, and no more below it than a unit of so small a network costs."""
    return (share - 0.15) * dense < reached <= share * dense


# --- a whole network ---------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("name", [*ALL, "vit", "mobilenet"])
def test_budgets_are_met(name, kind, context):
    model, x = network(name)
    dense = COUNTS[kind](model, x)
    pruner = Pruner(model, x)
    budget = pruner._budget(Target(**{kind: 0.7}), pruner._axes, Limits(), None)
    largest = max(
        Running(budget.costs, [0] * len(budget.axes)).saving(a, 1) for a in range(len(budget.axes))
    )
    try:
        pruner.prune_model(Target(**{kind: 0.7}), context=context)
    except UnreachableTarget as error:
        assert error.least > 0.7 * dense
        return
    reached = COUNTS[kind](model, x)
    assert reached <= 0.7 * dense
    assert 0.7 * dense - reached <= max(0.01 * 0.7 * dense, largest)
    assert (pruner.budget.measured, pruner.budget.goal) == (reached, 0.7 * dense)
    assert pruner.budget.dense == pytest.approx(dense, rel=1e-9)


def test_absolute_numbers_and_shares():
    for target in (Target(parameters=0.5), Target(parameters=count(make(Residual)) // 2)):
        model = make(Residual)
        Pruner(model, images()).prune_model(target)
        assert 0.9 * count(make(Residual)) < 2 * count(model) <= count(make(Residual))


def test_a_target_that_is_met_already_changes_nothing():
    model = make(Residual)
    before = state(model)
    with pytest.warns(UserWarning, match="costs no more than Target"):
        Pruner(model, images()).prune_model(Target(macs=1.0))
    assert same(before, model)
    assert Pruner(model, images()).plan_for(Target(parameters=10**9)).removed == 0


def test_what_is_chosen_is_least_important_for_what_it_costs():
    """Two layers alike but for what they cost: with comparable scores the expensive one goes."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3, 8), conv(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)  # at full size; b at a sixteenth of it
            return self.c(self.b(nn.functional.avg_pool2d(x, 4)).mean((2, 3)))

    for criterion in (Criterion(torch.ones_like, norm="none"), large_final):
        torch.manual_seed(0)
        model = Two()
        pruner = Pruner(model, images())
        half = 3 * 4 * 9 * 16 * 16 + 4 * 8 * 9 * 4 * 4 + 8 * 2  # with half of the first
        pruner.prune_model(Target(macs=half), context="global", criteria=criterion)
        assert (model.a.out_channels, model.b.out_channels) == (4, 8)


def test_a_unit_counts_once_for_each_layer_that_makes_it():
    """A sum of three layers costs three times as much as one layer alone, and is worth as much."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.summed = nn.ModuleList(conv(3, 8) for _ in range(3))
            self.alone, self.c, self.d = conv(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            summed = sum(layer(x) for layer in self.summed)
            return self.c(summed.mean((2, 3))) + self.d(self.alone(x).mean((2, 3)))

    model = Sum()
    dense, unit = macs(model, images())[""], 3 * 9 * 16 * 16 + 2
    criterion = Criterion(torch.ones_like, norm="none")
    target = Target(macs=dense - 4 * unit)
    Pruner(model, images()).prune_model(target, context="global", criteria=criterion)
    widths = [layer.out_channels for layer in (*model.summed, model.alone)]
    assert widths == [8, 8, 8, 4]


def test_whatever_the_scores_are():
    for criterion in (
        small_final,
        Criterion(lambda w: -w.abs() - 5, norm="none"),
        large_final.normalised("lamp"),
    ):
        model = make(Residual)
        Pruner(model, images()).prune_model(Target(macs=0.5), context="global", criteria=criterion)
        assert near(macs(model, images())[""], 0.5, macs(make(Residual), images())[""])


# --- constraints -------------------------------------------------------------------------------


def test_widths_are_rounded():
    torch.manual_seed(0)
    model, x = tv.resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    dense = macs(model, x)[""]
    for context in ("local", "global"):
        cut = copy.deepcopy(model)
        Pruner(cut, x).prune_model(Target(macs=0.4), context=context, round_to=8)
        widths = [m.out_channels for m in cut.modules() if isinstance(m, nn.Conv2d)]
        assert all(n % 8 == 0 for n in widths) and macs(cut, x)[""] <= 0.4 * dense


def test_floors_caps_and_what_is_excluded():
    floors = {"c1": 14, "bn0": 0.1}
    with pytest.raises(ValueError, match="'bn0' makes no channels"):
        Pruner(make(Residual), images()).plan_for(Target(macs=0.5, floors=floors))
    for context in ("local", "global"):
        model = make(Residual)
        target = Target(parameters=0.55, floors={"c1": 14}, caps={"c2": 5})
        Pruner(model, images()).prune_model(target, context=context)
        assert model.c1.out_channels >= 14 and model.c2.out_channels <= 5
        model = make(Residual)
        target = Target(parameters=0.9, caps={"c2": 0.5})
        Pruner(model, images(), exclude="c1").prune_model(target, context=context)
        assert model.c1.out_channels == 16 and model.c2.out_channels <= 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"min_keep": 8}, "min_keep=8"),
        ({"round_to": 8}, "round_to=8"),
        ({"exclude": "c1"}, "excluded"),
        ({"floors": {"c1": 16}}, "its floor"),
        ({"caps": {"c1": 1}, "min_keep": 4}, "more than its cap allows"),
        ({}, "network output"),
    ],
)
def test_what_cannot_be_reached_says_so_and_changes_nothing(arguments, said):
    model, arguments = make(Residual), dict(arguments)
    before, dense = state(model), macs(model, images())[""]
    bounds = {k: arguments.pop(k) for k in ("floors", "caps") if k in arguments}
    target = Target(macs=1e-3, **bounds)
    pruner = Pruner(model, images(), exclude=arguments.pop("exclude", ()))
    for context in ("local", "global"):
        with pytest.raises(UnreachableTarget, match=said) as error:
            pruner.prune_model(target, context=context, **arguments)
    assert same(before, model) and pruner.plan is None and pruner.budget is None
    if "cap" not in said:
        least = error.value.least
        assert 1e-3 * dense < least < dense
        pruner.prune_model(Target(macs=least, **bounds), context="global", **arguments)
        assert macs(model, images())[""] == least


def test_what_fails_in_the_trial_stays_and_others_make_up_for_it(monkeypatch):
    from fasterai.prune.trial import Trial

    first = Trial._attempt

    def attempt(self, remove, modes):
        failing = [a for a in remove if self.axes[a].name == "c1"]
        return "does not like it" if failing else first(self, remove, modes)

    monkeypatch.setattr(Trial, "_attempt", attempt)
    model = make(Residual)
    pruner = Pruner(model, images())
    pruner.prune_model(Target(macs=0.7), context="global")
    assert model.c1.out_channels == 16 and model.c2.out_channels < 8
    assert near(macs(model, images())[""], 0.7, macs(make(Residual), images())[""])
    assert ["c1", "does not like it"] in pruner.kept()[["layer", "reason"]].to_numpy().tolist()


def test_a_wrong_formula_is_corrected_by_measuring(monkeypatch):
    from fasterai.prune import budget

    right = budget.macs_of_widths
    monkeypatch.setattr(budget, "macs_of_widths", lambda *a: [(0.8 * f, w) for f, w in right(*a)])
    torch.manual_seed(0)
    model, x = tv.resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    dense = macs(model, x)[""]
    pruner = Pruner(model, x)
    pruner.prune_model(Target(macs=dense // 2), context="global")
    assert 0.98 * dense <= 2 * macs(model, x)[""] <= dense
    assert pruner.budget.predicted < pruner.budget.measured


# --- step by step ------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["local", "global"])
def test_steps_move_the_budget(context):
    torch.manual_seed(0)
    model, x = tv.resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    dense = macs(model, x)[""]
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = GradualPruner(model, x, context)
    target = Target(macs=0.4, floors={"layer4.1.conv1": 300}, caps={"layer3.1.conv1": 0.25})
    for share in (0.25, 0.5, 1.0, 1.0):
        pruner.prune_to(target, share=share, optimizer=optimizer)
        now = macs(model, x)[""]
        assert now <= (1 - share * 0.6) * dense * (1 + 1e-9)
        assert pruner.budget.dense == pytest.approx(dense)
    assert now >= 0.98 * 0.4 * dense
    assert model.layer4[1].conv1.out_channels >= 300 and model.layer3[1].conv1.out_channels <= 64
    assert pruner.arrived(target) and pruner.plan_to(target) is None
    assert not pruner.arrived(Target(macs=0.3))
    after = GradualPruner(model, x, context, after=pruner.whole_plan)
    assert after.arrived(target)
    after.prune_to(Target(macs=0.2))
    assert 0.98 * 0.2 * dense <= macs(model, x)[""] <= 0.2 * dense


def test_frozen_layers_stay_for_a_budget():
    model = make(Residual)
    model.c1.requires_grad_(False)
    GradualPruner(model, images()).prune_to(Target(parameters=0.7))
    assert model.c1.out_channels == 16 and near(count(model), 0.7, count(make(Residual)))
    with pytest.raises(UnreachableTarget, match="frozen"):
        GradualPruner(model, images()).check(Target(parameters=1e-3))


def test_gradients_as_importance():
    model, x = make(Mlp), images()
    pruner = Pruner(model, x)
    with pytest.raises(ValueError, match="gradient"):
        pruner.prune_model(Target(macs=0.5), criteria=grad_crit)
    model(x).square().sum().backward()
    pruner.prune_model(Target(macs=0.5), context="global", criteria=grad_crit)
    assert near(macs(model, x)[""], 0.5, macs(make(Mlp), x)[""])


# --- the value ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, TypeError, "got none"),
        ({"macs": 0.5, "bytes": 10}, TypeError, "got macs, bytes"),
        ({"macs": 0}, ValueError, "more than 0"),
        ({"macs": -0.5}, ValueError, "more than 0"),
        ({"macs": "0.5"}, TypeError, "must be a number"),
        ({"macs": True}, TypeError, "must be a number"),
        ({"macs": float("nan")}, TypeError, "must be a number"),
        ({"speedup": 0.5}, ValueError, "for half the time pass speedup=2"),
        ({"macs": 0.5, "floors": 3}, TypeError, "widths by layer"),
        ({"macs": 0.5, "floors": {"a": -1}}, ValueError, "more than 0"),
        ({"macs": 0.5, "caps": {"a": 2.5}}, ValueError, "number of channels"),
    ],
)
def test_bad_targets(arguments, error, said):
    with pytest.raises(error, match=said):
        Target(**arguments)


def test_a_target_is_a_value():
    widths = {"a": 3}
    target = Target(macs=0.5, floors=widths)
    widths["a"] = 4
    assert target == Target(macs=0.5, floors={"a": 3}) != Target(macs=0.5)
    assert {target: 1}[copy.deepcopy(target)] == 1
    assert Target(macs=0.5).goal(100) == Target(macs=50).goal(7) == 50
    assert Target(speedup=2).goal(10) == 5 == Target(latency_ms=5).goal(1)
    assert repr(target) == "Target(macs=0.5, floors={'a': 3})"


def test_zeros_save_nothing():
    model = make(Residual)
    before = state(model)
    for granularity in ("weight", "filter"):
        sparsifier = Sparsifier(model, granularity, example_inputs=images())
        with pytest.raises(TypeError, match="PruneCallback; for zeros pass a fraction"):
            sparsifier.sparsify_model(Target(macs=0.5))
    assert same(before, model)


def test_unknown_layers_are_refused():
    with pytest.raises(ValueError, match="did you mean 'stem'"):
        Pruner(make(Residual), images()).plan_for(Target(macs=0.5, caps={"stam": 1}))


def test_a_target_that_is_met_is_told_without_a_cut():
    model = make(Residual)
    pruner, dense = GradualPruner(model, images()), macs(model, images())[""]
    pruner.prune_to(Target(macs=0.5))
    left = macs(model, images())[""]
    pruner.prune_to(Target(macs=0.9))
    assert pruner.budget.target == Target(macs=0.9) and pruner.budget.measured == left
    assert pruner.budget.goal == 0.9 * dense and len(pruner.history.cuts) == 1


# --- while it trains ---------------------------------------------------------------------------

STEPS = lin.over(0.0, 0.5, n_steps=4)


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_a_fit_ends_at_its_budget(kind, context):
    learn = learner()
    dense = COUNTS[kind](make(Residual), data().one_batch()[0])
    target = Target(**{kind: 0.4})
    cb = PruneCallback(target, context, schedule=STEPS)
    learn.fit(2, cbs=cb)
    reached = COUNTS[kind](learn.model, data().one_batch()[0])
    assert reached == cb.budget.measured and near(reached, 0.4, dense)
    assert cb.budget.target == target
    shares = [share for _, share in cb.history]
    assert len(shares) == 4 and shares[0] < shares[-1] and sorted(shares) == shares
    again = make(Residual)
    cb.plan.apply(again)
    assert count(again) == count(learn.model)
    learn.fit(1, cbs=cb)  # it is there already
    assert COUNTS[kind](learn.model, data().one_batch()[0]) == reached


def test_a_fit_refuses_what_it_cannot_reach_before_training():
    learn = learner()
    before = state(learn.model)
    with pytest.raises(UnreachableTarget, match="the least that is left"):
        learn.fit(1, cbs=PruneCallback(Target(macs=1e-3), schedule=STEPS))
    assert same(before, learn.model)
    learn.fit(1, cbs=PruneCallback(Target(macs=0.5), schedule=STEPS))
    assert near(macs(learn.model, images())[""], 0.5, macs(make(Residual), images())[""])


def test_an_interrupted_cut_leaves_the_network_whole(monkeypatch):
    from fasterai.prune import pruner

    learn, applied = learner(), []
    whole = pruner.Plan.apply

    def interrupted(plan, model, **kwargs):
        applied.append(count(model))
        if len(applied) == 3:
            raise KeyboardInterrupt
        return whole(plan, model, **kwargs)

    monkeypatch.setattr(pruner.Plan, "apply", interrupted)
    cb = PruneCallback(Target(parameters=0.4), schedule=STEPS)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=cb)
    assert count(learn.model) == applied[-1] < count(make(Residual))
    learn.fit(1, cbs=cb)  # and goes on
    assert near(count(learn.model), 0.4, count(make(Residual)))


def test_a_cut_that_cannot_run_is_found_by_the_trial(monkeypatch):
    from fasterai.prune.budget import Budget

    monkeypatch.setattr(Budget, "measured", lambda self, remove=None: None)
    model = make(Residual)
    Pruner(model, images()).prune_model(Target(macs=0.5), context="global")
    assert near(macs(model, images())[""], 0.5, macs(make(Residual), images())[""])


def test_the_least_bytes_that_are_said_can_be_reached():
    model, x = make(Residual), images()
    with pytest.raises(UnreachableTarget) as raised:
        Pruner(model, x).plan_for(Target(bytes=1e-9))
    Pruner(model, x).prune_model(Target(bytes=raised.value.least))
    assert saved_bytes(model) <= raised.value.least


@pytest.mark.parametrize("context", ["local", "global"])
def test_files_that_shrink_in_steps_meet_any_number_of_bytes(context):
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    for asked in range(5000, 12000, 333):
        model = copy.deepcopy(dense)
        pruner = Pruner(model, torch.randn(8, 8))
        pruner.prune_model(Target(bytes=asked), context=context, verify=False)
        assert 0.95 * asked < saved_bytes(model) <= asked
