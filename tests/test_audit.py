"""Who pays: classes before and after, and layers that are cut alone."""

import copy
import math
import random

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from learners import learner
from networks import Depthwise, Residual, images, make
from scipy.stats import linregress
from sklearn.metrics import confusion_matrix
from torch import nn

from fasterai.audit.classes import class_audit
from fasterai.audit.sensitivity import sensitivity
from fasterai.core.criteria import squared_final
from fasterai.core.schedule import one_shot
from fasterai.core.target import Target
from fasterai.prune.budget import UnreachableTarget
from fasterai.prune.callback import PruneCallback
from fasterai.prune.pruner import Pruner
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier

matplotlib.use("agg")


def quiet(*args, **kwargs):
    return class_audit(*args, progress=False, **kwargs)


def sense(*args, **kwargs):
    return sensitivity(*args, progress=False, **kwargs)


class Says(nn.Module):
    """Its input is the scores; `wrong` classes are given to the next one."""

    def __init__(self, wrong=()):
        super().__init__()
        self.w, self.wrong = nn.Parameter(torch.ones(1)), list(wrong)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        for c in self.wrong:
            hit = x.argmax(1) == c
            x = torch.where(hit[:, None], x.roll(1, 1), x)
        self.norm(x[:, :1])
        return x * self.w


def told(*classes):
    """Batches of one-hot inputs of these classes, three at a time."""
    y = torch.tensor(classes)
    x = F.one_hot(y, int(y.max()) + 1).float()
    return list(zip(x.split(3), y.split(3), strict=True))


# --- classes -------------------------------------------------------------------------------------


def test_the_class_that_is_lost_is_named_first():
    audit = quiet(Says(), Says([1]), told(0, 0, 0, 0, 1, 1, 2), classes=["ant", "bee", "cow"])
    table = audit.table.set_index("class")
    assert audit.table["class"].tolist() == ["bee", "ant", "cow"]
    assert table["size"].to_dict() == {"ant": 4, "bee": 2, "cow": 1}
    assert table["before"].tolist() == [1, 1, 1] and table.loc["bee", "change"] == -1
    assert table["after"].to_dict() == {"ant": 1, "bee": 0, "cow": 1}
    assert "bee" in audit._repr_html_()


def two_networks(n=400, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, n, p=np.arange(1, classes + 1) / sum(range(classes + 1)))
    torch.manual_seed(seed)
    x = torch.randn(n, 6) + torch.randn(classes, 6)[y]
    models = [nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, classes))]
    opt = torch.optim.Adam(models[0].parameters(), 0.01)
    y = torch.from_numpy(y)
    for _ in range(30):
        F.cross_entropy(models[0](x), y).backward()
        opt.step()
        opt.zero_grad()
    models.append(copy.deepcopy(models[0]))
    Sparsifier(models[1]).sparsify_model(0.7)
    return models, x, y, list(zip(x.split(64), y.split(64), strict=True))


def test_accuracies_are_those_of_sklearn():
    models, x, y, batches = two_networks()
    audit = quiet(*models, batches)
    table = audit.table.sort_values("class")
    for model, column in zip(models, ("before", "after"), strict=True):
        matrix = confusion_matrix(y, model.eval()(x).argmax(1))
        assert np.allclose(table[column], matrix.diagonal() / matrix.sum(1))
        assert table["size"].tolist() == matrix.sum(1).tolist()
    assert np.allclose(table["change"], table["after"] - table["before"])
    assert audit.table["change"].is_monotonic_increasing


def residual(y, *others):
    """What is left of y after a regression on others, by the normal equations."""
    X = np.stack([np.ones(len(y)), *others], 1)
    return y - X @ np.linalg.solve(X.T @ X, X.T @ y)


def test_the_linear_model_is_least_squares():
    models, _, _, batches = two_networks()
    audit = quiet(*models, batches)
    y, x1, x2 = (audit.table[c].to_numpy(float) for c in ("change", "size", "before"))
    rest = residual(y, x1, x2)
    variance = rest @ rest / (len(y) - 3)
    for term, x, other in (("size", x1, x2), ("before", x2, x1)):
        alone = residual(x, other)  # Frisch, Waugh and Lovell
        slope = alone @ residual(y, other) / (alone @ alone)
        row = audit.model.loc[term]
        assert row["estimate"] == pytest.approx(slope, rel=1e-6)
        assert row["std_error"] == pytest.approx((variance / (alone @ alone)) ** 0.5, rel=1e-6)
        assert row["t"] == pytest.approx(row["estimate"] / row["std_error"])
        assert 0 < row["p"] < 1
    predicted = audit.model["estimate"] @ np.stack([np.ones(len(y)), x1, x2])
    assert np.allclose(y - predicted, rest)
    assert audit.r2 == pytest.approx(1 - rest.var() / y.var())


def test_sizes_that_do_not_vary_explain_nothing():
    models, _, _, batches = two_networks()
    audit = quiet(*models, batches, sizes=[100] * 7)
    known = linregress(audit.table["before"], audit.table["change"])
    assert audit.model.loc["size"].isna().all() and set(audit.table["size"]) == {100}
    row = audit.model.loc["before"]
    assert row["estimate"] == pytest.approx(known.slope)
    assert row["std_error"] == pytest.approx(known.stderr)
    assert row["p"] == pytest.approx(known.pvalue)
    assert audit.r2 == pytest.approx(known.rvalue**2)
    assert audit.model.loc["intercept", "std_error"] == pytest.approx(known.intercept_stderr)


def test_sizes_of_the_training_set_may_be_given_by_class():
    batches = told(0, 0, 1, 1, 2)
    sizes = {"a": 5, "b": 50, "c": 500}
    table = quiet(Says(), Says([2]), batches, classes="abc", sizes=sizes).table
    assert dict(zip(table["class"], table["size"], strict=True)) == sizes
    with pytest.raises(ValueError, match="'c' is missing"):
        quiet(Says(), Says(), batches, classes="abc", sizes={"a": 1, "b": 2})
    with pytest.raises(ValueError, match="one for each of 3 classes, got 2"):
        quiet(Says(), Says(), batches, sizes=[1, 2])


def test_a_class_without_examples_is_nan_and_out_of_the_model():
    audit = quiet(Says(), Says([0]), told(0, 0, 0, 1, 3))
    assert audit.table["class"].tolist()[-1] == 2 and audit.table["change"].isna().sum() == 1
    assert audit.plot().get_title()


def test_few_classes_give_estimates_without_errors():
    audit = quiet(Says(), Says([1]), told(0, 0, 1))
    assert audit.model["std_error"].isna().all()
    assert audit.plot().get_xlabel()


def test_learners_and_what_wraps_a_model():
    learn = learner()
    sparse = copy.deepcopy(learn.model)
    Sparsifier(sparse).sparsify_model(0.8)
    audit = quiet(learn, nn.DataParallel(sparse))
    x, y = map(torch.cat, zip(*[(x, y) for x, y in learn.dls.valid], strict=True))
    right = (learn.model.eval()(x).argmax(1) == y).double().mean()
    table = audit.table
    assert (table["before"] * table["size"]).sum() / table["size"].sum() == pytest.approx(right)
    learn.dls.valid.vocab = list("wxyz")
    assert set(quiet(learn, sparse).table["class"]) == set("wxyz")


def test_nothing_is_changed():
    dense, sparse = Says().train(), Says([0]).eval()
    before = [copy.deepcopy(m.state_dict()) for m in (dense, sparse)]
    state = torch.get_rng_state(), random.getstate()
    quiet(dense, sparse, told(0, 0, 1, 1, 2))
    for model, old in zip((dense, sparse), before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
    assert dense.training and not sparse.training
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()


X2, Y2 = torch.eye(3), torch.arange(3)


@pytest.mark.parametrize(
    "target, message",
    [
        (torch.eye(3), "several labels"),
        (torch.eye(3).bool(), "several labels"),
        (torch.rand(3), "one class number"),
        (torch.zeros(3, 4, 4).long(), "one class number"),
        (torch.tensor([0, 1, 5]), "classes 0 to 5, the networks know 0 to 2"),
        (torch.tensor([0, 1, -1]), "classes -1 to 1"),
        ("cat", "one tensor of class numbers"),
    ],
)
def test_other_tasks_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        quiet(Says(), Says(), [(X2, target)])


def test_sensitivity_knows_single_outputs_and_the_first_of_several():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    x, y = torch.randn(40, 3), torch.rand(40) < 0.5
    right = ((model(x)[:, 0] > 0) == y).double().mean().item()
    for network in (model, Several(model)):
        found = sense(network, [(x, y.long())], shares=(0.5,), metric="accuracy")
        assert found.dense == pytest.approx(right)
    two = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert sense(two, [(x, y.long())], shares=(1.0,)).floors(9.0) == {"2": 1.0}  # no floor of 0


class Several(nn.Module):
    """Gives more than scores, as fastai's text classifiers do."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x), x, [x]


@pytest.mark.parametrize("column", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
@pytest.mark.parametrize("several", [True, False])
def test_a_single_output_tells_two_classes_apart(column, dtype, several):
    torch.manual_seed(0)
    x, dense, sparse = torch.randn(40, 3), nn.Linear(3, 1), nn.Linear(3, 1)
    target = torch.rand(40) < 0.5
    says = [(net(x)[:, 0].sigmoid() > 0.5) == target for net in (dense, sparse)]
    if not column:
        dense, sparse = (nn.Sequential(net, nn.Flatten(0)) for net in (dense, sparse))
    if several:
        dense, sparse = Several(dense), Several(sparse)
    given = target[:, None] if column else target
    table = quiet(dense, sparse, [(x, given.to(dtype))]).table.set_index("class")
    for name, mine in ((0, ~target), (1, target)):
        assert table.loc[name, "size"] == mine.sum()
        for when, right in zip(("before", "after"), says, strict=True):
            assert table.loc[name, when] == pytest.approx(right[mine].double().mean().item())


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="3 and 2 classes"):
        quiet(nn.Linear(3, 3), nn.Linear(3, 2), [(X2, Y2)])
    with pytest.raises(ValueError, match="classes 0 to 2, the networks know 0 to 1"):
        quiet(nn.Linear(3, 1), nn.Linear(3, 1), [(X2, Y2)])
    with pytest.raises(ValueError, match="scores .examples, classes."):
        flat = nn.Sequential(nn.Linear(3, 3), nn.Flatten(0))
        quiet(flat, nn.Linear(3, 3), [(X2, Y2)])
    with pytest.raises(TypeError, match="dense must be a Learner"):
        quiet("a", Says(), [(X2, Y2)])
    with pytest.raises(TypeError, match="pass a loader"):
        quiet(Says(), Says())
    with pytest.raises(ValueError, match="no batch"):
        quiet(Says(), Says(), [])
    with pytest.raises(ValueError, match="know 3 classes, got 2 names"):
        quiet(Says(), Says(), [(X2, Y2)], classes="ab")


def test_the_picture_shows_each_class():
    models, _, _, batches = two_networks()
    audit = quiet(*models, batches)
    ax = audit.plot()
    dots = ax.collections[0].get_offsets()
    assert np.allclose(dots, audit.table[["before", "change"]])
    lost = audit.table[audit.table["change"] < 0]["class"].astype(str).tolist()[:3]
    assert [t.get_text() for t in ax.texts] == lost


# --- sensitivity ---------------------------------------------------------------------------------


class Spare(nn.Module):
    """Two layers: of `a` two units decide and six do nothing; of `b` all decide alike."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 8), nn.Linear(8, 4), nn.Linear(4, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.zero_()
            self.a.weight[:] = 0.01 * torch.arange(1, 9)[:, None]
            self.a.weight[2], self.a.weight[5] = torch.tensor([9.0, 0]), torch.tensor([0, 9.0])
            self.b.weight[:2, 2], self.b.weight[2:, 5] = 1, 1
            self.c.weight[0, :2], self.c.weight[1, 2:] = 1, 1

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def spare_data():
    x = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 1] > x[:, 0]).long()
    return list(zip(x.split(16), y.split(16), strict=True))


def test_what_is_spare_costs_nothing():
    found = sense(Spare(), spare_data(), shares=(0.25, 0.5, 0.75, 0.9))
    assert found.dense == 1.0 and found.metric == "accuracy"
    assert found.table.loc["a"].tolist()[:3] == [1, 1, 1] and found.table.loc["a", 0.9] < 1
    assert found.unprunable["layer"].tolist() == ["c"]
    assert "output" in found.unprunable["reason"][0] and found.unprunable["units"][0] == 2
    assert found.targets(0.0)["a"] == 0.75


def by_hand(model, layer, coupled, share, batches, func, power=1):
    """The metric with the weakest units of a layer set to zero, wherever they are made."""
    model = copy.deepcopy(model).eval()
    scores = sum(
        model.get_submodule(n).weight.detach().abs().double().pow(power).flatten(1).sum(1)
        for n in coupled
    )
    out = scores.argsort(stable=True)[: min(round(share * len(scores)), len(scores) - 1)]
    hooks = [
        model.get_submodule(n).register_forward_hook(
            lambda m, i, o: o.index_fill(1, out, 0)  # noqa: B023
        )
        for n in layer
    ]
    with torch.no_grad():
        values = [(func(model(x), y).item(), len(x)) for x, y in batches]
    for hook in hooks:
        hook.remove()
    return sum(v * n for v, n in values) / sum(n for _, n in values)


def residual_data(n=48):
    torch.manual_seed(2)
    x = torch.randn(n, 3, 8, 8)
    y = (x.mean((1, 2, 3)) * 40).long().clamp(0, 3)
    return list(zip(x.split(20), y.split(20), strict=True))


def test_each_number_is_that_of_a_network_cut_by_hand():
    torch.manual_seed(0)
    model, batches = make(Residual).train(), residual_data()
    found = sense(model, batches, metric="loss", loss_func=F.cross_entropy, n_batches=None)
    assert found.coupled == {"stem": ("stem", "c2", "c3"), "c1": ("c1",)}
    assert list(found.table.index) == ["stem", "c1"] and list(found.table.columns)[-1] == 0.9
    silent = {"stem": ("bn0", "bn2", "bn3"), "c1": ("bn1",)}
    model = copy.deepcopy(model)
    for name, layers in found.coupled.items():
        for share in found.table:
            # a unit's score is the mean over all of its weights: weigh layers by their size
            expected = by_hand(model, silent[name], layers, share, batches, F.cross_entropy)
            assert found.table.loc[name, share] == pytest.approx(expected, abs=1e-5)
    assert (found.drop == found.table - found.dense).all(axis=None)


def everything(model):
    modes = [m.training for m in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    ids = [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return copy.deepcopy(model.state_dict()), modes, hooks, ids, grads, torch.get_rng_state()


def same(model, before):
    now = everything(model)
    assert all(torch.equal(v, before[0][k]) for k, v in now[0].items())
    assert now[1:4] == before[1:4] and torch.equal(now[5], before[5])
    for a, b in zip(now[4], before[4], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("fails_at", [None, 0, 3, 8])
def test_the_network_is_bit_equal_afterwards_also_when_interrupted(fails_at):
    model, batches = make(Depthwise).train(), residual_data()
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    before, calls = everything(model), []

    def metric(outputs, target):
        calls.append(1)
        if len(calls) - 1 == fails_at:
            raise KeyboardInterrupt
        return -F.cross_entropy(outputs, target)

    if fails_at is None:
        sense(model, batches, metric=metric, shares=(0.5,))
    else:
        with pytest.raises(KeyboardInterrupt):
            sense(model, batches, metric=metric, shares=(0.5,))
    assert calls
    same(model, before)


def test_targets_take_the_largest_share_that_is_borne():
    found = sense(Spare(), spare_data(), shares=(0.25, 0.5, 0.75))
    found.table.loc["a"] = [0.99, 0.9, 0.99]  # dense: 1.0
    found.table.loc["b"] = [0.5, 0.5, 0.5]
    assert found.targets(0.02) == {"a": 0.25}  # 0.75 is luck
    assert found.targets(0.1) == {"a": 0.75} and found.targets(1) == {"a": 0.75, "b": 0.75}
    assert found.targets(0) == {}
    for wrong in (-0.1, "much", True, float("nan")):
        with pytest.raises(ValueError, match="drop must be a number >= 0"):
            found.targets(wrong)


def wanted_widths(targets, model):
    whole = {name: model.get_submodule(name).weight.shape[0] for name in targets}
    return {name: n - round(targets[name] * n) for name, n in whole.items()}


def test_floors_are_what_the_targets_leave():
    learn = learner()
    found = sense(learn, metric="loss", shares=(0.25, 0.5))
    for drop in (0.0, 1.0):
        borne, floors = found.targets(drop), found.floors(drop)
        assert set(floors) == {"stem", "c1", "c2", "c3", "head"} > set(borne)
        assert all(share == 1 - borne.get(name, 0) for name, share in floors.items())
    whole = {n: m.out_channels for n, m in learn.model.named_modules() if isinstance(m, nn.Conv2d)}
    model = copy.deepcopy(learn.model)
    floors = sense(learn, metric="loss", shares=(0.25, 0.5), exclude="c1").floors(1.0)
    Pruner(model, images()).prune_model(Target(parameters=0.7, floors=floors), context="global")
    for name, share in floors.items():
        width = len(model.get_submodule(name).weight)
        assert width >= math.ceil(share * whole.get(name, width))
    assert model.c1.out_channels == whole["c1"]
    with pytest.raises(UnreachableTarget, match="its floor"):
        Pruner(model, images()).prune_model(Target(macs=0.5, floors=found.floors(0.0)))


def test_all_that_removes_and_zeroes_takes_the_targets():
    learn = learner()
    found = sense(learn, metric="loss", shares=(0.25, 0.5))
    targets = found.targets(1.0)
    assert set(targets) == {"stem", "c1", "c2", "c3"} and set(targets.values()) <= {0.25, 0.5}
    dense = learn.model
    expected = wanted_widths(targets, dense)

    def width(model, name):
        return model.get_submodule(name).weight.shape[0]

    model = copy.deepcopy(dense)
    Pruner(model, images()).prune_model(targets)
    assert {n: width(model, n) for n in targets} == expected
    fitted = learner(model=copy.deepcopy(dense))
    fitted.fit(1, cbs=PruneCallback(targets, schedule=one_shot))
    assert {n: width(fitted.model, n) for n in targets} == expected
    zeroed = copy.deepcopy(dense)
    Sparsifier(zeroed, "filter", example_inputs=images()).sparsify_model(targets)
    fitted = learner(model=copy.deepcopy(dense))
    fitted.fit(1, cbs=SparsifyCallback(targets, "filter", schedule=one_shot))
    for model in (zeroed, fitted.model):
        speaks = {n: model.get_submodule(n).weight.flatten(1).any(1) for n in targets}
        assert {n: int(s.sum()) for n, s in speaks.items()} == expected
    nothing = learner(model=copy.deepcopy(dense))
    nothing.fit(1, 0.0, wd=0.0, cbs=SparsifyCallback({}, "filter"))  # no share was borne
    pairs = zip(nothing.model.parameters(), dense.parameters(), strict=True)
    assert all(torch.equal(w, v) for w, v in pairs)
    weights = copy.deepcopy(dense)
    Sparsifier(weights).sparsify_model(targets)  # single weights of the same layers
    for name, share in targets.items():
        w = weights.get_submodule(name).weight
        assert int((w == 0).sum()) == round(share * w.numel())


def test_a_layer_that_breaks_when_cut_is_listed_apart():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.c(F.relu(self.b(torch.cumsum(x, 1))))

    x, y = torch.randn(12, 4), torch.arange(12) % 2
    found = sense(Fixed(), [(x, y)], shares=(0.5,))
    left = found.unprunable.set_index("layer")
    assert list(found.table.index) == ["b"] and set(left.index) == {"a", "c"}
    assert "cumsum" in left.loc["a", "reason"] and left.loc["a", "units"] == 8


def test_a_layer_whose_cut_fails_is_listed_apart(monkeypatch):
    plan_for = Pruner.plan_for

    def failing(self, sparsity, **kwargs):
        fails = sparsity == {"b": 0.75}
        return plan_for(self, {"b": 0.0} if fails else sparsity, **kwargs)

    monkeypatch.setattr(Pruner, "plan_for", failing)
    found = sense(Spare(), spare_data(), shares=(0.1, 0.5, 0.75, 0.9))
    left = found.unprunable.set_index("layer")
    assert list(found.table.index) == ["a"] and left.loc["b"].tolist() == [
        4,
        "a cut of it breaks the network",
    ]
    assert found.table.loc["a", 0.1] == 1.0


def test_other_criteria_rank_otherwise_and_excluded_layers_stay():
    model, batches = make(Residual), residual_data()
    kwargs = {"metric": "loss", "loss_func": F.cross_entropy, "n_batches": None, "shares": (0.5,)}
    one = sense(model, batches, **kwargs)
    two = sense(model, batches, criteria=squared_final, exclude="c1", **kwargs)
    for found, power in ((one, 1), (two, 2)):
        norms, layers = ("bn0", "bn2", "bn3"), ("stem", "c2", "c3")
        expected = by_hand(model, norms, layers, 0.5, batches, F.cross_entropy, power)
        assert found.table.loc["stem", 0.5] == pytest.approx(expected, abs=1e-5)
    assert one.table.loc["stem", 0.5] != two.table.loc["stem", 0.5]
    assert list(two.table.index) == ["stem"] and "excluded" in two.unprunable["reason"].tolist()
    assert isinstance(one.table, pd.DataFrame) and "<table" in one._repr_html_()


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"shares": (0.5, 0.1)}, ValueError, "shares must rise"),
        ({"shares": ()}, ValueError, "shares must rise"),
        ({"shares": (10,)}, ValueError, "for 10% pass 0.1"),
        ({"metric": "f1"}, ValueError, "'accuracy', 'loss' or a function"),
        ({"metric": "loss"}, ValueError, "pass loss_func"),
        ({"n_batches": 0}, ValueError, "n_batches must be a whole number >= 1"),
        ({"dl": []}, ValueError, "no batch"),
        ({"dl": None}, TypeError, "pass a loader"),
        ({"dl": [(torch.rand(4, 2), torch.rand(4, 2))]}, ValueError, "pass loss_func"),
        (
            {"dl": [(torch.rand(4, 2), torch.rand(4))], "metric": "accuracy"},
            ValueError,
            "one class number",
        ),
        ({"exclude": "z"}, ValueError, "no layer 'z'"),
    ],
)
def test_bad_arguments_are_told(kwargs, error, message):
    model = Spare()
    before = everything(model)
    with pytest.raises(error, match=message):
        sense(model, **{"dl": spare_data(), **kwargs})
    same(model, before)
    with pytest.raises(TypeError, match="subject must be a Learner"):
        sense(3, spare_data())


def test_the_map_has_a_field_for_each_number_and_a_line_at_the_targets():
    found = sense(Spare(), spare_data(), shares=(0.25, 0.5, 0.75, 0.9))
    ax = found.plot(drop=0.0)
    assert np.allclose(ax.images[0].get_array(), found.table)
    x = ax.lines[0].get_xdata()
    allowed = [found.targets(0.0).get(name, 0) for name in found.table.index]
    ends = [sum(share <= a for share in found.table) - 0.5 for a in allowed]
    assert x[::2].tolist() == ends and not found.plot().lines


class Wraps(Spare):
    def forward(self, x):
        return {"logits": super().forward(x)}


def test_outputs_that_are_no_scores_are_measured_by_the_loss_that_is_given():
    def loss(out, y):
        return F.cross_entropy(out["logits"], y)

    wrapped, plain = sense(Wraps(), spare_data(), loss_func=loss), Spare()
    expected = sense(plain, spare_data(), metric="loss", loss_func=F.cross_entropy)
    assert wrapped.metric == "loss" and wrapped.dense == pytest.approx(expected.dense)
    with pytest.raises(ValueError, match="accuracy needs scores .* got dict"):
        sense(Wraps(), spare_data())
