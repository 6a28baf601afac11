"""The callback in real fastai fits."""

import warnings

import pytest
import torch
from fastai.callback.core import CancelFitException, CancelStepException
from fastai.callback.schedule import minimum  # noqa: F401  (patches Learner with fit_one_cycle, lr_find)
from fastai.learner import load_learner
from fastai.optimizer import SGD, Adam
from learners import Count, Fail, Watch, data, filters_at_zero, learner, weights_at_zero
from networks import Residual, conv, make
from torch import nn

from fasterai.core.criteria import grad_crit, large_final, movement, snip
from fasterai.core.schedule import (
    SCHEDULES,
    agp,
    cos,
    dsd,
    iterative,
    lin,
    one_cycle,
    one_shot,
)
from fasterai.prune.callback import PruneCallback
from fasterai.prune.pruner import Pruner
from fasterai.score.criteria import wanda
from fasterai.sparse.callback import SparsifyCallback


@pytest.mark.parametrize("opt_func", [SGD, Adam])
def test_sparsity_follows_the_schedule_and_zeros_hold(opt_func):
    learn = learner(opt_func=opt_func)
    cb, watch = SparsifyCallback(0.5, "filter"), Watch()
    learn.fit(5, cbs=[cb, watch])
    shares = dict(agp.updates(40))
    expected, now = [], 0
    for t in range(1, 41):
        now = round(0.5 * shares[t] * 16) if t in shares else now
        expected.append(now)
    assert watch.seen == expected and watch.inside
    assert [t for t, _ in cb.history] == [t for t, _ in agp.updates(40)]
    table = cb.report().set_index("layer")
    assert table.loc["c1", "zeros"] == 8 and table.loc["total", "reached"] == 0.5
    assert len(cb.plot_sparsity().get_lines()[0].get_xdata()) == len(cb.history) + 2


def test_the_training_table_has_a_column():
    learn = learner()
    rows = []
    learn.logger = rows.append
    learn.fit(2, cbs=SparsifyCallback(0.5, schedule=lin.over(start=0.0, end=1.0)))
    names = list(learn.recorder.metric_names)
    assert names == ["epoch", "train_loss", "valid_loss", "accuracy", "sparsity", "time"]
    column = names.index("sparsity")
    assert [round(r[column], 2) for r in rows] == [0.25, 0.5] and all(len(r) == 6 for r in rows)
    learn.fit(1)
    assert "sparsity" not in learn.recorder.metric_names and len(rows[-1]) == 5


def test_validate_get_preds_and_lr_find_are_left_alone(tmp_path):
    learn = learner(
        cbs=SparsifyCallback(0.5, schedule=one_shot.over(start=0, end=0)), path=tmp_path
    )
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    assert len(learn.validate()) == 2
    learn.get_preds()
    with learn.no_bar():
        learn.lr_find(num_it=5, show_plot=False)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    learn.fit(1)
    assert int((learn.model.c1.weight == 0).sum()) == learn.model.c1.weight.numel() // 2
    assert len(learn.validate()) == 2


@pytest.mark.parametrize("fit", ["fit", "fit_one_cycle", "fit_flat_cos"])
def test_all_ways_to_fit(fit):
    learn = learner()
    getattr(learn, fit)(2, cbs=SparsifyCallback(0.5, "filter"))
    assert filters_at_zero(learn.model.c1) == 8


def test_fine_tune_leaves_the_frozen_body_alone_then_sparsifies_it():
    def splitter(m):
        body = [m.stem, m.bn0, m.c1, m.bn1, m.c2, m.bn2, m.c3, m.bn3]
        return [[p for layer in body for p in layer.parameters()], list(m.head.parameters())]

    learn = learner(splitter=splitter)
    watch = Watch()
    with pytest.warns(UserWarning, match=r"learn\.unfreeze\(\)"):
        learn.fine_tune(2, cbs=[SparsifyCallback(0.5, "filter"), watch])
    assert watch.seen[:8] == [0] * 8 and watch.seen[-1] == 8


@pytest.mark.parametrize("granularity", ["filter", "weight"])
@pytest.mark.parametrize("name", ["0.0", "0"])
def test_what_is_asked_of_frozen_layers_waits(name, granularity):
    """By the name of the layer, or of a block."""
    torch.manual_seed(0)
    body = nn.Sequential(conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    learn = learner(
        nn.Sequential(body, head, nn.Linear(6, 4)),
        splitter=lambda m: [list(m[0].parameters()), [*m[1].parameters(), *m[2].parameters()]],
    )
    asked = {name: 0.5, "1": 0.5}
    with pytest.warns(UserWarning, match="frozen layers wait until they train: 0"):
        learn.freeze()
        learn.fit(1, cbs=SparsifyCallback(asked, granularity))
    assert learn.model[0][0].weight.all() and (learn.model[1][0].weight == 0).sum() == 24
    learn.unfreeze()
    learn.fit(1, cbs=SparsifyCallback(asked, granularity))
    assert (learn.model[0][0].weight == 0).sum() == 4 * 27


@pytest.mark.parametrize("first", [True, False])
def test_not_together_with_what_cuts(first):
    learn = learner()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    cbs = [SparsifyCallback(0.5, "filter"), PruneCallback(0.5, schedule=one_shot.over(0, 0))]
    with pytest.raises(ValueError, match="SparsifyCallback and PruneCallback do not go together"):
        learn.fit(1, cbs=cbs if first else cbs[::-1])
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_a_second_fit_goes_on_where_the_first_stopped():
    learn = learner()
    learn.fit(2, cbs=SparsifyCallback(0.25, "filter"))
    zero = (learn.model.c1.weight.flatten(1) == 0).all(1)
    watch = Watch()
    learn.fit(2, cbs=[SparsifyCallback(0.5, "filter"), watch])
    assert watch.seen[0] == 4 and watch.seen[-1] == 8 and watch.inside
    assert (learn.model.c1.weight[zero] == 0).all()
    learn.fit(1, cbs=[SparsifyCallback(0.1, "filter"), watch])
    assert watch.seen[-1] == 8


def test_a_model_may_use_the_same_names():
    model = make(Residual)
    model.history, model.criteria, model.schedule, model._done = [], 1, 2, 3
    learn = learner(model)
    cb = SparsifyCallback(0.5)
    learn.fit(1, cbs=cb)
    assert cb.history and not model.history and learn.schedule == 2


def test_initial_sparsity_and_sparsity_by_layer():
    learn = learner()
    watch = Watch()
    learn.fit(2, cbs=[SparsifyCallback((0.25, 0.75), "filter", schedule=lin.over(0.0, 0.5)), watch])
    assert watch.seen[0] >= 4 and watch.seen[-1] == 12
    learn = learner()
    learn.fit(1, cbs=SparsifyCallback({"c1": 0.5}, "filter"))
    assert filters_at_zero(learn.model.c1) == 8 and filters_at_zero(learn.model.stem) == 0


@pytest.mark.parametrize(
    "criterion, first", [(large_final, 0), (wanda, 0), (grad_crit, 0), (snip, 0), (movement, 1)]
)
def test_the_initial_sparsity_is_there_as_soon_as_there_are_scores(criterion, first):
    learn, count = learner(), Count()
    schedule = lin.over(start=5, end=7, every=1)
    cb = SparsifyCallback((0.5, 0.75), criteria=criterion, schedule=schedule, layers=["c1"])
    learn.fit(1, cbs=[cb, count])
    size = learn.model.c1.weight.numel()
    shares = [zeros / size for zeros in count.zeros]
    assert shares[:5] == [0.0] * first + [0.5] * (5 - first) and shares[-1] == 0.75


CHAIN = agp.over(0.1, 0.4, to=0.5).then(lin.over(0.6, 0.8))
UP_AND_BACK = one_shot.over(0.25, 0.25).then(cos.over(0.5, 0.75, to=0.0))


@pytest.mark.parametrize("schedule", [*SCHEDULES, CHAIN, UP_AND_BACK], ids=lambda s: s.name)
@pytest.mark.parametrize("sparsity", [0.7, (0.2, 0.7)])
def test_every_schedule_from_the_initial_to_the_final_sparsity(schedule, sparsity):
    learn, count = learner(), Count()
    cb = SparsifyCallback(sparsity, context="global", schedule=schedule)
    learn.fit(3, cbs=[cb, count])
    initial, final = sparsity if isinstance(sparsity, tuple) else (0.0, sparsity)
    total = sum(m.weight.numel() for m in (learn.model.stem, learn.model.c1, learn.model.c2))
    total += learn.model.c3.weight.numel()
    now, shares = round(initial * total), dict(schedule.updates(24, 8))
    expected = []
    for t in range(24):
        if t in shares:
            now = round((initial + shares[t] * (final - initial)) * total)
        expected.append(now)
    assert count.zeros == expected
    end = schedule.updates(24, 8)[-1][1]
    table = cb.report().set_index("layer")
    asked = final if end == 1.0 else initial
    assert table.loc["total", "asked"] == pytest.approx(asked)
    assert table.loc["total", "n"] == round(asked * total)
    start = [0] if initial and 0 not in shares else []
    assert [t for t, _ in cb.history] == start + list(shares)


@pytest.mark.parametrize("granularity", ["weight", "row", "column", "kernel"])
@pytest.mark.parametrize("context", ["local", "global"])
def test_dsd_ends_dense_and_trained(granularity, context):
    learn = learner()
    cb = SparsifyCallback(0.5, granularity, context, schedule=dsd)
    learn.fit(5, cbs=cb)
    reached = [share for _, share in cb.history]
    top = reached.index(max(reached))
    assert reached[top] == 0.5 and reached[-1] == 0.0
    assert reached[: top + 1] == sorted(reached[: top + 1])
    assert reached[top:] == sorted(reached[top:], reverse=True)
    assert weights_at_zero(learn) == 0


def test_dsd_leaves_zeros_that_were_there_before():
    learn = learner()
    learn.fit(1, cbs=SparsifyCallback(0.25, schedule=one_shot))
    names = ["stem", "c1", "c2", "c3"]
    before = {k: learn.model.get_submodule(k).weight == 0 for k in names}
    learn.fit(5, cbs=SparsifyCallback(0.75, schedule=dsd))
    after = {k: learn.model.get_submodule(k).weight == 0 for k in names}
    assert all(torch.equal(before[k], after[k]) for k in names)
    learn.fit(5, cbs=SparsifyCallback(0.1, schedule=dsd))  # below what is held
    assert all(torch.equal(before[k], learn.model.get_submodule(k).weight == 0) for k in names)


def test_weights_that_come_back_keep_their_place_while_steps_are_skipped():
    learn, count = learner(), Count()
    fail = Fail(CancelStepException(), "before_step", lambda s: s.epoch > 0)
    cb = SparsifyCallback(0.5, context="global", schedule=dsd.over(0.0, 1.0))
    learn.fit(3, cbs=[cb, fail, count])  # nothing moves on the whole way down
    assert cb.history[-1] == (24, 0.0)
    learn.fit(1)
    assert weights_at_zero(learn) == 0


@pytest.mark.parametrize("schedule", [dsd, UP_AND_BACK, lambda p: 4 * p * (1 - p)])
def test_filters_do_not_follow_a_schedule_that_goes_down(schedule):
    learn = learner()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(Exception, match="filters cannot come back.*'kernel'.*agp"):
        learn.fit(1, cbs=SparsifyCallback(0.5, "filter", schedule=schedule))
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


@pytest.mark.parametrize(
    "schedule", [iterative, one_cycle, CHAIN], ids=["iterative", "one_cycle", "chain"]
)
def test_filters_follow_all_others(schedule):
    learn, watch = learner(), Watch()
    learn.fit(3, cbs=[SparsifyCallback(0.5, "filter", schedule=schedule), watch])
    now, shares, expected = 0, dict(schedule.updates(24)), []
    for t in range(1, 25):
        now = round(0.5 * shares[t] * 16) if t in shares else now
        expected.append(now)
    assert watch.seen == expected and watch.inside


@pytest.mark.parametrize("granularity", ["weight", "filter", "dsd"])
def test_zero_sparsity_trains_bit_for_bit_like_no_callback(granularity):
    states = []
    zero = {"schedule": dsd} if granularity == "dsd" else {"granularity": granularity}
    for cbs in ([], [SparsifyCallback(0.0, **zero)]):
        learn = learner()
        torch.manual_seed(1)
        learn.fit(2, cbs=cbs)
        states.append(learn.model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_two_callbacks_and_two_learners_do_not_touch_each_other():
    cb = SparsifyCallback(0.5, "filter")
    one, two = learner(), learner()
    one.fit(2, cbs=cb)
    two.fit(2, cbs=cb)
    alone = learner()
    alone.fit(2, cbs=SparsifyCallback(0.5, "filter"))
    for k, v in alone.model.state_dict().items():
        assert torch.equal(v, one.model.state_dict()[k]) and torch.equal(
            v, two.model.state_dict()[k]
        )
    both = learner()
    both.fit(1, cbs=[SparsifyCallback(0.5, layers="c1"), SparsifyCallback(0.25, layers="c2")])
    assert int((both.model.c1.weight == 0).sum()) == both.model.c1.weight.numel() // 2
    assert int((both.model.c2.weight == 0).sum()) == both.model.c2.weight.numel() // 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("boom"), CancelFitException()])
def test_after_an_interrupt_the_model_is_usable_and_clean(error):
    learn = learner()
    keys = list(learn.model.state_dict())
    fail = Fail(error, "after_batch", lambda s: s.epoch == 1 and s.iter == 4)
    cb = SparsifyCallback(0.5, "filter", schedule=lin.over(0.0, 0.5))
    try:
        learn.fit(3, cbs=[cb, fail])
    except (KeyboardInterrupt, ValueError):
        pass
    model = learn.model
    assert cb not in learn.cbs and list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    zeros = filters_at_zero(model.c1)
    assert zeros > 0
    learn.fit(1)  # without the callback all weights are free again
    assert filters_at_zero(model.c1) < zeros
    learn.fit(2, cbs=cb)
    assert filters_at_zero(model.c1) == 8


def test_skipped_steps():
    learn = learner()
    fail = Fail(CancelStepException(), "before_step", lambda s: s.iter % 2 == 0)
    watch = Watch()
    learn.fit(4, cbs=[SparsifyCallback(0.5, "filter"), fail, watch])
    assert watch.seen[-1] == 8 and watch.inside


def test_training_goes_on_with_the_pruned_network():
    learn = learner()
    learn.fit(2, cbs=SparsifyCallback(0.5, "filter"))
    x = learn.dls.one_batch()[0]
    before = learn.model.eval()(x).detach()
    pruner = Pruner(learn.model, x)
    pruner.prune_model()
    assert torch.allclose(learn.model.eval()(x), before, atol=1e-6)
    assert learn.model.c1.out_channels == 8 and pruner.report().iloc[-1]["params_after"] == sum(
        p.numel() for p in learn.model.parameters()
    )
    weights = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(2, reset_opt=True)
    assert all(
        not torch.equal(a, b) for a, b in zip(weights, learn.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("schedule", [agp, one_cycle, CHAIN], ids=lambda s: s.name)
def test_save_load_and_export(tmp_path, schedule):
    cb = SparsifyCallback(0.5, "filter", schedule=schedule)
    learn = learner(cbs=cb, path=tmp_path)
    learn.fit(2)
    learn.save("sparse")
    learn.export("sparse.pkl")
    zeros = filters_at_zero(learn.model.c1)
    assert zeros == 8
    learn.fit(1)
    learn.load("sparse")
    assert filters_at_zero(learn.model.c1) == zeros
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_learner(tmp_path / "sparse.pkl")
    assert filters_at_zero(loaded.model.c1) == zeros


def test_schedules_that_do_not_fit_are_warned_of():
    with pytest.warns(UserWarning, match="never fires: it starts at step 500, the fit has 8"):
        learner().fit(1, cbs=SparsifyCallback(0.5, schedule=agp.over(start=500, end=600)))
    with pytest.warns(UserWarning, match="target is not reached.*due at step 20"):
        learner().fit(1, cbs=SparsifyCallback(0.5, schedule=agp.over(start=0, end=20)))
    with pytest.warns(UserWarning, match="gets to 50% of the way"):
        learner().fit(1, cbs=SparsifyCallback(0.5, schedule=agp.over(to=0.5)))


def test_a_schedule_of_ones_own_and_once_an_epoch():
    learn = learner()
    cb = SparsifyCallback(0.5, schedule=lambda p: p**2)
    learn.fit(2, cbs=cb)
    assert cb.history[-1] == (16, 0.5) and len(cb.history) == 17
    cb = SparsifyCallback(0.75, schedule=lin.over(0.0, 1.0, every="epoch"))
    learn.fit(2, cbs=cb)
    assert [t for t, _ in cb.history] == [0, 8, 16]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((40,), "for 40% pass 0.4"),
        ((-0.1,), "fraction in"),
        ((float("nan"),), "fraction in"),
        (("0.5",), "fraction in"),
        (((0.5, 0.2),), "must not be below"),
        (((0.1, 0.2, 0.3),), "initial, final"),
        ((0.5, "filtre"), "did you mean 'filter'"),
        ((0.5, "filter", "globl"), "context"),
        (({"c1": 0.5}, "weight", "global"), "needs context='local'"),
        ((0.5, "filter", "local", "large"), "criteria must be"),
        ((0.5, "filter", "local", large_final, 0.3), "schedule must be"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SparsifyCallback(*arguments)


@pytest.mark.parametrize(
    "cb, message",
    [
        (lambda: SparsifyCallback(0.5, layers="c11"), "did you mean 'c1'"),
        (lambda: SparsifyCallback({"c11": 0.5}), "did you mean 'c1'"),
        (lambda: SparsifyCallback(0.5, schedule=lambda p: 2.0), "share of the way"),
        (lambda: SparsifyCallback(0.5, criteria=lambda w: w.sum()), "one score per weight"),
        (lambda: SparsifyCallback(0.5, layers=nn.LSTM), "nothing to sparsify"),
        (lambda: SparsifyCallback(0.5, example_inputs=torch.zeros(1, 2)), "could not be run"),
    ],
)
def test_what_only_the_fit_can_see_is_refused_before_a_weight_is_zero(cb, message):
    learn = learner()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(Exception, match=message):
        learn.fit(1, cbs=cb())
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_a_model_of_frozen_layers_only_trains_on_with_a_warning():
    learn = learner(
        nn.Sequential(conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    )
    learn.model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing to sparsify.*unfreeze"):
        learn.fit(1, cbs=SparsifyCallback(0.5, "filter"))
    assert learn.recorder.values[-1][-1] == 0.0
    with pytest.raises(RuntimeError, match="no fit with this callback"):
        SparsifyCallback(0.5).report()


class Normed(nn.Module):
    """A group norm over all channels: they are left alone, unless `mixed` is said."""

    def __init__(self):
        super().__init__()
        self.c1, self.bn1, self.c2 = conv(3, 8), nn.GroupNorm(1, 8), conv(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.bn1(self.c1(x)).relu()
        return self.head(self.c2(x).relu().mean((2, 3)))


@pytest.mark.parametrize("mixed", [False, True])
def test_what_a_norm_mixes_goes_where_it_is_asked_for(mixed):
    learn = learner(make(Normed))
    learn.fit(2, cbs=SparsifyCallback(0.5, "filter", mixed=mixed))
    zeros = filters_at_zero(learn.model.c1), filters_at_zero(learn.model.c2)
    assert zeros == (4 * mixed, 4)
    Pruner(learn.model, torch.randn(2, 3, 8, 8)).prune_model()
    assert learn.model.c1.out_channels == 8 - 4 * mixed
    learn.fit(1, reset_opt=True)


@pytest.mark.parametrize("context", ["local", "global"])
def test_a_fit_ends_with_the_whole_pattern(context):
    learn = learner()
    callback = SparsifyCallback(0.5, "2:4", context, exclude="stem")
    learn.fit(3, cbs=callback)
    layers = learn.model.c1, learn.model.c2, learn.model.c3
    for layer in layers:
        runs = (layer.weight != 0).movedim(1, -1).reshape(-1, 4)
        assert (runs.sum(1) == 2).all()
    total = sum(layer.weight.numel() for layer in layers)
    counts = [round(share * total) for _, share in callback.history]
    assert counts == sorted(counts) and counts[-1] == total // 2
    assert [row[-1] for row in learn.recorder.values][-1] == 0.5
    assert callback.report()["limit"].iloc[-1] == ""


def test_limits_that_leave_nothing_to_zero_are_told():
    with pytest.warns(UserWarning, match="nothing was zeroed, asked was 0.5"):
        learner().fit(1, cbs=SparsifyCallback(0.5, "filter", min_keep=100))


def test_loaders_without_a_batch_are_told():
    short = learner()
    short.dls = data(n=3)
    short.dls.train.drop_last = True
    assert not list(short.dls.train)
    with pytest.warns(UserWarning, match="SparsifyCallback did nothing: no training batch came"):
        short.fit(1, cbs=SparsifyCallback(0.5, "filter"))


def test_warnings_show_the_line_of_the_fit():
    learn = learner()
    learn.model.stem.requires_grad_(False)
    learn.model.c1.requires_grad_(False)
    with pytest.warns(UserWarning, match="are frozen") as seen:
        learn.fit(1, 0.01, cbs=SparsifyCallback(0.5))
    assert {w.filename for w in seen} == {__file__}
