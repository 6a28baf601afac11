"""The history of cuts, and amounts to remove: shares by layer and numbers of units."""

import copy
import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.metrics import accuracy
from learners import learner
from networks import ALL, Plain, Residual, images, make, size

from fasterai.core.criteria import large_final, squared_final
from fasterai.core.schedule import iterative, lin, one_shot
from fasterai.measure.profile import macs
from fasterai.prune.amounts import Units
from fasterai.prune.callback import PruneCallback
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.history import History
from fasterai.prune.plan import Plan
from fasterai.prune.pruner import Pruner

matplotlib.use("agg")


def shapes(model):
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


class Costs(Callback):
    """What a network costs after each epoch, counted beside the history."""

    order = 99

    def __init__(self):
        self.seen = []

    def after_epoch(self):
        model = self.learn.model
        self.seen.append(
            (size(model), macs(model, images(size=8))[""], self.learn.recorder.log[2:4])
        )


def pruned_fit(epochs=4, sparsity=0.5, **kwargs):
    learn = learner()
    learn.metrics = [accuracy]
    costs = Costs()
    cb = PruneCallback(sparsity, schedule=lin.over(1, 8 * epochs + 1, n_steps=epochs), **kwargs)
    learn.fit(epochs, cbs=[cb, costs])
    return learn, cb, costs


def test_each_cut_of_a_fit_is_told():
    learn, cb, costs = pruned_fit()
    table, before = cb.history.table(), make(Residual)
    assert table["fit"].tolist() == [1] * 4 and table["step"].tolist() == [1, 9, 17, 25]
    assert table["asked"].tolist() == [0.125, 0.25, 0.375, 0.5]
    assert table["reached"].tolist() == [s for _, s in cb.history]
    assert set(table["criterion"]) == {"large_final"} and set(table["context"]) == {"local"}
    metrics = table[["valid_loss", "accuracy"]].values
    told = zip(table["parameters"], table["macs"], metrics, strict=True)
    for (parameters, operations, metrics), seen in zip(told, costs.seen, strict=True):
        assert (parameters, operations) == seen[:2] and metrics.tolist() == seen[2]
    widths = cb.history.widths()
    axes = Pruner(before, images()).axes()
    assert widths[0].to_dict() == dict(zip(axes["layer"], axes["size"], strict=True))
    for name, width in widths[4].items():
        assert learn.model.get_submodule(name).weight.shape[0] == width
    assert (widths[0] - cb.history.removed().sum(axis=1) == widths[4]).all()
    assert table["units"].tolist() == widths.sum()[1:].tolist()
    assert isinstance(table, pd.DataFrame) and "4 cuts" in repr(cb.history)
    assert "<table" in cb.history._repr_html_()


def test_replay_makes_the_same_network_bit_for_bit():
    learn, cb, _ = pruned_fit()
    text = cb.history.to_json()
    history = History.from_json(text)
    assert history == cb.history and history.to_json() == text and hash(history)
    fresh = make(Residual)
    assert history.replay(fresh) is fresh and shapes(fresh) == shapes(learn.model)
    fresh.load_state_dict(learn.model.state_dict())
    x = images(5)
    assert torch.equal(fresh.eval()(x), learn.model.eval()(x))
    assert history.plan == cb.plan
    # the wiring: each weight that stays is the one of the same place
    marked, whole = make(Residual), make(Residual)
    with torch.no_grad():
        for p, q in zip(marked.parameters(), whole.parameters(), strict=True):
            q.copy_(torch.arange(p.numel()).view_as(p))
            p.copy_(q)
    history.replay(marked)
    for (name, p), q in zip(marked.named_parameters(), whole.parameters(), strict=True):
        for d, kept in history.plan.kept.get(name, {}).items():
            q = q.index_select(d, torch.tensor(kept))
        assert torch.equal(p, q)


def test_replay_goes_as_far_as_it_is_asked_to():
    _, cb, costs = pruned_fit()
    for cuts, (parameters, _, _) in enumerate(costs.seen, 1):
        assert size(cb.history.replay(make(Residual), cuts)) == parameters
    assert size(cb.history.replay(make(Residual), 0)) == size(make(Residual))
    for wrong in (5, -1, 1.0, True):
        with pytest.raises(ValueError, match="number from 0 to 4"):
            cb.history.replay(make(Residual), wrong)
    other = make(Plain)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        cb.history.replay(other)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("cls", ALL)
def test_repeated_cuts_of_a_pruner_replay(cls):
    model, x = make(cls), images()
    dense = copy.deepcopy(model)
    pruner = Pruner(model, x)
    assert not pruner.history and pruner.history.plan is None and len(pruner.history) == 0
    for criterion in (large_final, squared_final.normalised("l2")):
        pruner.prune_model(0.3, criteria=criterion)
        pruner.note(accuracy=0.5)
    replayed = History.from_json(pruner.history.to_json()).replay(copy.deepcopy(dense))
    assert shapes(replayed) == shapes(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in replayed.state_dict().items())
    table = pruner.history.table()
    assert table["criterion"].tolist() == ["large_final", "squared_final, l2"]
    assert table["step"].isna().all() and table["accuracy"].tolist() == [0.5, 0.5]
    assert table["asked"].tolist() == [0.3, 0.3] and table["parameters"].iloc[-1] == size(model)


def test_exact_removal_is_in_the_history_and_replays_with_what_it_folds():
    model = make(Plain)
    with torch.no_grad():
        for p in (model.a.weight, model.a.bias):
            p[:3] = 0
    dense, x = copy.deepcopy(model), images()
    pruner = Pruner(model, x)
    pruner.prune_model()
    (cut,) = pruner.history.cuts
    assert cut.criterion == "zero" and cut.asked is None and cut.plan == pruner.plan
    assert cut.reached == 3 / pruner.history.widths()[0].drop("fc2", errors="ignore").sum()
    assert torch.equal(pruner.history.replay(dense)(x), model(x))


def test_metrics_are_numbers_and_come_together():
    pruner = Pruner(make(Residual), images())
    pruner.prune_model(0.25)
    odd = {"classes": np.ones(3), "none": None, "nan": float("nan"), "text": "0.5"}
    pruner.note(accuracy=torch.tensor(0.5), **odd)
    pruner.note(loss=np.float32(2), accuracy=0.75)
    assert dict(pruner.history.cuts[0].metrics) == {"accuracy": 0.75, "loss": 2.0}
    assert History.from_json(pruner.history.to_json()) == pruner.history


def test_an_interrupt_while_costs_are_counted_loses_no_cut(monkeypatch):
    model = make(Residual)
    dense, pruner = copy.deepcopy(model), Pruner(model, images())

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fasterai.prune.pruner.macs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune_model(0.25)
    monkeypatch.undo()
    pruner.prune_model(0.25)
    assert len(pruner.history) == 2 and pruner.history.plan == pruner.whole_plan
    assert shapes(pruner.history.replay(dense)) == shapes(model)
    assert pruner.history.cuts[0].parameters > pruner.history.cuts[1].parameters == size(model)


def test_a_cut_of_nothing_is_no_cut():
    model = make(Residual)
    pruner = Pruner(model, images())
    with pytest.warns(UserWarning, match="nothing was removed"):
        pruner.prune_model()
    with pytest.raises(RuntimeError, match="no cut to write metrics beside"):
        pruner.note(accuracy=1.0)
    assert not pruner.history.cuts and pruner.history.table().empty
    with pytest.raises(RuntimeError, match="nothing was cut"):
        pruner.history.plot()


def test_the_history_goes_on_in_a_later_fit_and_in_another_process():
    learn = learner()
    cb = PruneCallback(0.5, schedule=lin.over(0.0, 1.0, n_steps=4))

    class Stop(Callback):
        def after_batch(self):
            if self.learn.train_iter == 15:
                raise CancelFitException

    learn.fit(4, cbs=[cb, Stop()])
    first = cb.history
    assert [t for t, _ in first] == [0, 8]
    learn.fit(2, cbs=cb)
    table = cb.history.table()
    assert cb.history.cuts[:2] == first.cuts and table["fit"].tolist() == [1, 1, 2, 2, 2, 2]
    assert len(cb.plot_sparsity().get_lines()[0].get_xdata()) == 4 + 2  # of the last fit
    assert shapes(cb.history.replay(make(Residual))) == shapes(learn.model)

    other = learner()
    first.replay(other.model)
    after = PruneCallback(0.5, schedule=one_shot, after=first)
    other.fit(1, cbs=after)
    assert after.history.cuts[:2] == first.cuts and after.history[-1][1] == 0.5
    assert shapes(after.history.replay(make(Residual))) == shapes(other.model)
    known = learner()
    first.replay(known.model)
    plain = PruneCallback(0.5, schedule=one_shot, after=first.plan)
    known.fit(1, cbs=plain)
    assert shapes(plain.history.replay(make(Residual))) == shapes(other.model)
    assert plain.history.before == first.plan and len(plain.history) == 1


def test_an_interrupted_cut_leaves_no_record(monkeypatch):
    learn, cb = learner(), PruneCallback(0.5, schedule=lin.over(0.0, 1.0, n_steps=4))
    apply, calls = Plan.apply, []

    def broken(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return apply(self, *args, **kwargs)

    monkeypatch.setattr(Plan, "apply", broken)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(4, cbs=cb)
    monkeypatch.undo()
    assert len(cb.history) == 2 and shapes(cb.history.replay(make(Residual))) == shapes(learn.model)


def test_a_fit_without_pruning_has_an_empty_history():
    learn, cb = learner(), PruneCallback(0.0)
    learn.fit(1, cbs=cb)
    assert not cb.history and not cb.history.cuts
    with pytest.raises(RuntimeError, match="nothing to plot"):
        cb.plot_sparsity()


def damaged():
    text = pruned_history().to_json()
    fields = json.loads(text)

    def but(**changes):
        return json.dumps({**fields, "cuts": [{**fields["cuts"][0], **changes}]})

    yield "", "no JSON"
    yield "[]", "something else"
    yield json.dumps({**fields, "history": 2}), "version 2"
    yield json.dumps({**fields, "more": 1}), "parts"
    yield json.dumps({**fields, "cuts": {}}), "no list"
    yield but(more=1), "a cut is"
    yield but(reached=2), "reached is 2"
    yield but(asked="all"), "asked is"
    yield but(parameters=None), "parameters is None"
    yield but(macs=-1), "macs is -1"
    yield but(step=True), "step is True"
    yield but(criterion=1), "criterion is 1"
    yield but(metrics=[]), "metrics are"
    yield but(metrics={"a": "b"}), "metrics are"
    yield but(plan={"plan": 1}), "this is no plan"


def pruned_history():
    pruner = Pruner(make(Plain), images())
    pruner.prune_model(0.5)
    return pruner.history


def test_what_is_no_history_is_refused():
    for text, message in damaged():
        with pytest.raises(ValueError, match=message):
            History.from_json(text)


def test_metrics_that_are_no_numbers_survive_as_nan():
    history = pruned_history().noting(metrics={"loss": float("inf"), "accuracy": 1.0})
    back = History.from_json(history.to_json()).cuts[0].metrics
    assert back["accuracy"] == 1.0 and back["loss"] != back["loss"]


def test_the_picture_stacks_what_went():
    _, cb, _ = pruned_fit()
    ax = cb.history.plot()
    removed = cb.history.removed()
    start, *cuts = ax.containers
    assert [bar.get_height() for bar in start] == cb.history.widths()[0].tolist()
    for k, bars in enumerate(cuts, 1):
        assert [bar.get_height() for bar in bars] == removed[k].tolist()
        below = removed.loc[:, : k - 1].sum(axis=1).tolist() if k > 1 else [0] * len(removed)
        assert [bar.get_y() for bar in bars] == below
    assert f"{removed.values.sum()} units" in ax.get_title()
    assert [t.get_text() for t in ax.get_legend().get_texts()][1:] == [
        "step 1",
        "step 9",
        "step 17",
        "step 25",
    ]


# --- amounts -------------------------------------------------------------------------------------


def test_a_number_of_units_goes_at_each_step():
    learn = learner()
    cb = PruneCallback(Units(12), "global", schedule=iterative.over(0.0, 1.0, n_steps=4))
    learn.fit(4, cbs=cb)
    assert cb.history.table()["removed"].tolist() == [3, 3, 3, 3]
    model = make(Residual)
    pruner = Pruner(model, images())
    pruner.prune_model(Units(3), context="global")
    assert pruner.plan.removed == 3
    free = int(pruner.axes()["free"].sum())
    with pytest.warns(UserWarning, match=f"no more than {free} units may go"):
        Pruner(model, images()).plan_for(Units(10**6), context="global")
    GradualPruner(model, images(), "global").prune_to(Units(10**6))
    assert model.stem.out_channels == model.c1.out_channels == 1


def test_units_are_refused_where_they_mean_nothing():
    for wrong in (-1, 0.5, True, "7"):
        with pytest.raises(ValueError, match="whole units"):
            Units(wrong)
    with pytest.raises(ValueError, match="need context='global'"):
        PruneCallback(Units(3))
    model = make(Residual)
    with pytest.raises(ValueError, match="need context='global'"):
        Pruner(model, images()).prune_model(Units(3))


def test_a_sparsity_by_layer_removes_just_that():
    asked = {"c1": 0.5, "stem": 0.25}
    model = make(Residual)
    scores = model.c1.weight.detach().abs().flatten(1).sum(1)
    best = scores.argsort(descending=True)[:8].sort().values
    expected = model.c1.weight[best]
    pruner = Pruner(model, images())
    pruner.prune_model(asked)
    assert model.c1.weight.shape[0] == 8 and model.stem.weight.shape[0] == 6
    assert model.c2.weight.shape[0] == 6  # coupled with the stem
    kept = pruner.plan.kept["stem.weight"][0]
    assert torch.equal(model.c1.weight, expected[:, list(kept)])
    gradual = make(Residual)
    GradualPruner(gradual, images()).prune_to(asked)
    assert shapes(gradual) == shapes(model)
    learn, cb = learner(), PruneCallback(asked, schedule=lin.over(0.0, 1.0, n_steps=4))
    learn.fit(2, cbs=cb)
    assert shapes(learn.model) == shapes(model)
    assert cb.history[-1][1] == cb.history.table()["asked"].iloc[-1] == 10 / 24


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"c9": 0.5}, "no layer 'c9' that makes channels; did you mean 'c3'"),
        ({"stem": 0.5, "c2": 0.25}, "coupled and need one sparsity"),
        ({"c1": 40}, "for 40% pass 0.4"),
        ({"head": 0.5}, "nothing of 'head' can be removed: "),
    ],
)
def test_a_sparsity_by_layer_is_checked_before_anything_is_cut(asked, message):
    model = make(Residual)
    with pytest.raises(ValueError, match=message):
        Pruner(model, images()).prune_model(asked)
    with pytest.raises(ValueError, match=message):
        learner(model=model).fit(1, cbs=PruneCallback(asked))
    assert shapes(model) == shapes(make(Residual))
    with pytest.raises(ValueError, match="context='local'"):
        PruneCallback({"c1": 0.5}, "global")
