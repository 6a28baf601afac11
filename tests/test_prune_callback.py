"""Pruning while training, in real fastai fits."""

import copy
import pickle
import random
import warnings

import pytest
import torch
from company import COMPANY, OnCPU
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
)
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import minimum  # noqa: F401  (patches Learner)
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from learners import Items, data, learner
from networks import Plain, Residual, conv, images, make, size, widths
from torch import nn, optim

from fasterai.core.criteria import grad_crit, large_final, movement, random_scores
from fasterai.core.schedule import agp, dsd, lin, one_shot
from fasterai.core.target import Target
from fasterai.measure.profile import macs
from fasterai.prune.amounts import Units
from fasterai.prune.budget import UnreachableTarget
from fasterai.prune.callback import PruneCallback
from fasterai.prune.plan import Plan
from fasterai.prune.pruner import Pruner

QUICK = lin.over(0.0, 0.5, n_steps=4)


def fit(learn, epochs, cb, *cbs, **kwargs):
    learn.fit(epochs, cbs=[cb, *cbs], **kwargs)
    return cb


class Widths(Callback):
    """The width of a layer after every training batch."""

    order = 99

    def __init__(self, layer="c1"):
        self.layer, self.seen = layer, []

    def after_batch(self):
        if self.training:
            self.seen.append(self.learn.model.get_submodule(self.layer).weight.shape[0])


@pytest.mark.parametrize("opt_func", [SGD, Adam, ranger])
def test_widths_follow_the_schedule_and_end_exactly(opt_func):
    learn, seen = learner(opt_func=opt_func), Widths()
    ids, keys = [id(p) for p in learn.model.parameters()], list(learn.model.state_dict())
    cb = fit(learn, 5, PruneCallback(0.5), seen)
    shares = dict(agp.over(n_steps=10).updates(40))
    expected, now = [], 16
    for t in range(1, 41):
        now = 16 - round(0.5 * shares[t] * 16) if t in shares else now
        expected.append(now)
    assert seen.seen == expected and len(set(expected)) > 4
    assert [t for t, _ in cb.history] == list(shares) and cb.history[-1][1] == 0.5
    at_once = make(Residual)
    Pruner(at_once, images()).prune_model(0.5)
    assert widths(learn.model) == widths(at_once)
    assert [id(p) for p in learn.model.parameters()] == ids
    assert list(learn.model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    table = cb.report().set_index("layer")
    assert table.loc["c1", ["out_before", "out_after"]].tolist() == [16, 8]
    assert table.loc["total", "params_after"] == size(learn.model) == cb.plan.parameters_after
    assert len(cb.plot_sparsity().get_lines()[0].get_xdata()) == len(cb.history) + 2
    copied = make(Residual)
    Plan.from_json(cb.plan.to_json()).apply(copied)
    copied.load_state_dict(learn.model.state_dict())


@pytest.mark.parametrize(
    "opt_func", [Adam, lambda params, lr: OptimWrapper(params, optim.AdamW, lr=lr)]
)
def test_the_optimizer_goes_on(opt_func):
    learn = learner(opt_func=opt_func)
    learn.create_opt()
    state = getattr(learn.opt, "opt", learn.opt).state
    fit(learn, 2, PruneCallback(0.5, schedule=QUICK))
    p = learn.model.c1.weight
    moments = [v for v in state[p].values() if isinstance(v, torch.Tensor) and v.ndim]
    assert len(moments) == 2 and all(v.shape == p.shape for v in moments)
    assert float(state[p]["step"]) == 16
    learn.fit(1)
    assert float(state[p]["step"]) == 24


def test_the_training_table_has_columns_of_what_is_left():
    learn = learner()
    rows = []
    learn.logger = rows.append
    fit(learn, 3, PruneCallback(0.5, schedule=QUICK))
    names = list(learn.recorder.metric_names)
    assert names[-4:] == ["sparsity", "parameters", "MACs", "time"]
    left = [row[-4:-1] for row in rows]
    assert left[-1] == [0.5, size(learn.model), macs(learn.model, images(2, 8))[""]]
    assert [r[1] for r in left] == sorted((r[1] for r in left), reverse=True)
    assert 0 < left[0][0] < left[1][0] == 0.5 and left[0][1] > left[1][1]
    learn.fit(1)
    assert "MACs" not in learn.recorder.metric_names


def test_no_sparsity_trains_as_without_a_callback():
    states = []
    for cbs in ([], [PruneCallback(0.0, criteria=random_scores, schedule=QUICK)]):
        learn = learner()
        learn.fit(2, cbs=cbs)
        states.append((learn.model.state_dict(), torch.rand(1), random.random()))
    assert all(torch.equal(v, states[1][0][k]) for k, v in states[0][0].items())
    assert states[0][1:] == states[1][1:]


@pytest.mark.parametrize("context", ["local", "global"])
def test_limits_hold(context):
    learn = learner()
    cb = fit(learn, 2, PruneCallback(0.7, context, schedule=QUICK, round_to=2, min_keep=3))
    share = 0.7 if context == "local" else 1.0  # all that may go is less than 70%
    wide, narrow = (-(-max(3, n - round(share * n)) // 2) * 2 for n in (16, 8))
    shapes = {"stem": (narrow, 3), "c1": (wide, narrow), "c2": (narrow, wide), "c3": (narrow,) * 2}
    for name, shape in shapes.items():
        assert learn.model.get_submodule(name).weight.shape[:2] == shape
    assert cb.reached() == (24 - wide - narrow) / 24


# --- one fit after another ------------------------------------------------------------------------


class Judge(TrackerCallback):
    """How many epochs a tracker judges."""

    def before_fit(self):
        super().before_fit()
        self.judged = 0

    def after_epoch(self):
        super().after_epoch()
        self.judged += 1


@pytest.mark.parametrize("criteria", [large_final, movement])
def test_a_second_fit_goes_on_to_the_same_target_and_a_new_callback_starts_anew(criteria):
    learn = learner()
    cb = PruneCallback(0.5, criteria=criteria, schedule=QUICK)
    stop = Raise(CancelFitException(), "after_batch", 2)
    fit(learn, 2, cb, stop)
    assert learn.model.c1.weight.shape[0] == 12 and cb.reached() == 0.25
    seen = Widths()
    fit(learn, 2, cb, seen)
    assert learn.model.c1.weight.shape[0] == 8 and min(seen.seen) == 8
    fit(learn, 1, cb)
    assert learn.model.c1.weight.shape[0] == 8 and cb.report()["out_before"].max() == 16
    fit(learn, 1, PruneCallback(0.5, schedule=QUICK))
    assert learn.model.c1.weight.shape[0] == 4


def test_trackers_wait_for_the_last_cut_and_not_where_there_is_none():
    learn, judge = learner(), Judge()
    cb = fit(learn, 3, PruneCallback(0.5, schedule=lin.over(0.1, 0.6, n_steps=3)), judge)
    assert judge.judged == 2
    fit(learn, 3, cb, judge)
    assert judge.judged == 3


@pytest.mark.parametrize("context", ["local", "global"])
def test_a_fit_that_was_stopped_goes_on_in_another_process(tmp_path, context):
    whole, seen = learner(path=tmp_path), Widths()
    schedule = lin.over(0.0, 1.0, n_steps=8)
    fit(whole, 4, PruneCallback(0.5, context, schedule=schedule), seen)
    first, begun = learner(path=tmp_path), Widths()
    stop = Raise(KeyboardInterrupt(), "after_epoch", 2)
    cb = PruneCallback(0.5, context, schedule=schedule)
    with pytest.raises(KeyboardInterrupt):
        fit(first, 4, cb, begun, stop)
    first.save("stopped")
    text = cb.plan.to_json()
    second, went_on = learner(path=tmp_path), Widths()
    plan = Plan.from_json(text)
    plan.apply(second.model)
    second.load("stopped")
    cb = PruneCallback(0.5, context, schedule=schedule, after=plan)
    fit(second, 4, cb, went_on, start_epoch=2)
    assert len(begun.seen) == len(went_on.seen) == 16
    if context == "local":
        assert begun.seen + went_on.seen == seen.seen
    assert cb.reached() == 0.5 and cb.plan.removed == 12
    copied = make(Residual)
    cb.plan.apply(copied).load_state_dict(second.model.state_dict())
    with pytest.raises(ValueError, match="since the model was dense"):
        fit(learner(), 1, PruneCallback(0.5, after=plan))


def test_a_callback_of_the_learner_takes_part_in_every_fit():
    learn = learner(cbs=PruneCallback(0.5, schedule=QUICK))
    learn.fit(1)
    learn.fit(1)
    assert learn.model.c1.weight.shape[0] == 8 and learn.prune.reached() == 0.5
    before = copy.deepcopy(learn.model.state_dict())
    learn.validate(), learn.get_preds()
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_lr_find_cuts_nothing(tmp_path):
    learn = learner(cbs=PruneCallback(0.5, schedule=one_shot.over(0, 0)), path=tmp_path)
    with learn.no_bar():
        learn.lr_find(num_it=5, show_plot=False)
    assert learn.model.c1.weight.shape[0] == 16
    learn.fit(1)
    assert learn.model.c1.weight.shape[0] == 8


def test_fine_tune_leaves_the_frozen_body_alone_then_prunes_it():
    def splitter(m):
        body = [m.stem, m.bn0, m.c1, m.bn1, m.c2, m.bn2, m.c3, m.bn3]
        return [[p for layer in body for p in layer.parameters()], list(m.head.parameters())]

    learn, seen = learner(splitter=splitter), Widths()
    with pytest.warns(UserWarning, match=r"frozen.*learn\.unfreeze\(\)"):
        learn.fine_tune(2, cbs=[PruneCallback(0.5, schedule=QUICK), seen])
    assert seen.seen[:8] == [16] * 8 and seen.seen[-1] == 8


@pytest.mark.parametrize(
    "asked, context, widths",
    [
        (Units(12), "global", None),
        (Target(macs=0.3), "local", None),
        ({"c1": 0.5}, "local", 8),
        ({"fc": 0.5}, "local", 16),
        ({"body": 0.5}, "local", 8),
    ],
)
def test_fine_tune_with_every_kind_of_amount(asked, context, widths):
    """The body is frozen at first; then all that was asked of the whole network is met."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.c0, self.c1 = conv(3, 16), conv(16, 16)

        def forward(self, x):
            return self.c1(self.c0(x).relu()).relu().mean((2, 3))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc, self.out = Body(), nn.Linear(16, 20), nn.Linear(20, 4)

        def forward(self, x):
            return self.out(self.fc(self.body(x)).relu())

    def splitter(m):
        return [params(m.body), [*params(m.fc), *params(m.out)]]

    torch.manual_seed(0)
    learn = learner(Net(), splitter=splitter)
    x = learn.dls.one_batch()[0]
    dense = macs(learn.model, x)[""]
    if isinstance(asked, dict):
        asked = {"body.c1" if k == "c1" else k: v for k, v in asked.items()}
    cb = PruneCallback(asked, context, schedule=QUICK)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learn.fine_tune(2, cbs=[cb])
    waits = isinstance(asked, dict) and "fc" not in asked
    assert any("wait until they train: body" in str(w.message) for w in said) == waits
    if isinstance(asked, Units):
        assert cb.removed == 12 and cb.arrived()
    elif isinstance(asked, Target):
        assert macs(learn.model, x)[""] <= 0.3 * dense
    else:
        assert learn.model.body.c1.out_channels == widths
        assert learn.model.fc.out_features == (20 if widths == 8 else 10)


def test_layers_of_a_block_and_the_innermost_name_counts():
    model = nn.Sequential(nn.Sequential(conv(3, 8), conv(8, 8), conv(8, 8)), conv(8, 4, 1))
    Pruner(model, torch.randn(2, 3, 8, 8)).prune_model({"0": 0.5, "0.1": 0.25})
    assert [c.out_channels for c in model[0]] == [4, 6, 4]
    with pytest.raises(ValueError, match="no layer '0.7'"):
        Pruner(model, torch.randn(2, 3, 8, 8)).prune_model({"0.7": 0.5})


def test_limits_under_which_nothing_goes_are_told():
    learn = learner()
    with pytest.warns(UserWarning, match="nothing was removed.*min_keep and round_to"):
        learn.fit(1, cbs=PruneCallback(0.5, min_keep=1000, schedule=QUICK))


def test_a_target_that_nothing_can_meet_is_refused_while_frozen():
    learn = learner(
        splitter=lambda m: [
            params(m.stem),
            [p for n, p in m.named_parameters() if not n.startswith("stem")],
        ]
    )
    learn.freeze_to(1)
    with warnings.catch_warnings(), pytest.raises(UnreachableTarget, match="cannot be reached"):
        warnings.simplefilter("ignore")
        learn.fit(1, cbs=PruneCallback(Target(macs=1e-6)))


def test_a_head_is_pruned_while_the_body_is_frozen():
    body = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    head = nn.Sequential(nn.Flatten(), nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4))
    learn = learner(nn.Sequential(body, head), splitter=lambda m: [*map(params, m)])
    learn.freeze()
    with pytest.warns(UserWarning, match="29% of the units are frozen"):
        cb = fit(learn, 1, PruneCallback(0.5, schedule=QUICK))
    assert body[0].weight.shape[0] == 8 and head[1].weight.shape == (10, 8)
    assert cb.reached() == 0.5
    learn.unfreeze()
    fit(learn, 1, cb)
    assert body[0].weight.shape[0] == 4 and head[1].weight.shape == (10, 4)


def params(module):
    return list(module.parameters())


# --- criteria -------------------------------------------------------------------------------------


@pytest.mark.parametrize("criteria", [grad_crit, movement, random_scores, torch.abs])
def test_criteria_of_all_kinds(criteria):
    learn = learner()
    fit(learn, 2, PruneCallback(0.5, criteria=criteria, schedule=QUICK))
    assert learn.model.c1.weight.shape[0] == 8


def test_gradients_are_those_of_the_step_and_go_on_into_it():
    class Look(Callback):
        """Behind the pruning: the gradients that the optimizer will use."""

        order = 98

        def before_step(self):
            grads = [p.grad for p in self.learn.model.parameters()]
            self.fine = getattr(self, "fine", True) and all(
                g.shape == p.shape and g.abs().sum() > 0
                for g, p in zip(grads, self.learn.model.parameters(), strict=True)
                if p is not self.learn.model.c3.bias  # a norm follows
            )

    learn, look = learner(), Look()
    fit(learn, 2, PruneCallback(0.5, criteria=grad_crit, schedule=QUICK), look)
    assert look.fine and learn.model.c1.weight.shape[0] == 8


def test_a_criterion_that_fails_does_so_before_training():
    learn = learner()
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match="failed on stem.weight"):
        fit(learn, 2, PruneCallback(0.5, criteria=lambda w: w.nothing))
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


# --- networks -------------------------------------------------------------------------------------


def batches(x, y, bs=4):
    load = DataLoader(Items(x, y), bs=bs, num_workers=0)
    return DataLoaders(load, load, device="cpu")


def quiet(dls, model, loss=None, **kwargs):
    learn = Learner(dls, model, loss or CrossEntropyLossFlat(), lr=1e-3, **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda _: None
    return learn


def test_images_of_one_channel():
    torch.manual_seed(0)
    model = nn.Sequential(conv(1, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.Flatten())
    model.append(nn.Linear(8 * 64, 3))
    learn = quiet(batches(torch.randn(16, 1, 8, 8), torch.arange(16) % 3), model)
    fit(learn, 2, PruneCallback(0.5, schedule=QUICK))
    assert model[0].weight.shape == (4, 1, 3, 3) and model[3].weight.shape == (4, 4, 3, 3)


def test_a_segmentation_head():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv(12, 16), nn.ReLU(), nn.Upsample(scale_factor=2), conv(16, 8), nn.ReLU()),
        conv(8, 5, 1),
    )
    y = torch.randint(5, (16, 8, 8))
    learn = quiet(batches(images(16, 8), y), model, CrossEntropyLossFlat(axis=1))
    fit(learn, 2, PruneCallback(0.5, schedule=QUICK))
    assert [model[i].weight.shape[0] for i in (0, 4, 7, 9)] == [6, 8, 4, 5]
    assert model(images(1, 8)).shape == (1, 5, 8, 8)


def test_dynamic_unet_with_its_hooks():
    from fastai.vision.learner import create_unet_model
    from fastai.vision.models import resnet18

    torch.manual_seed(0)
    model = create_unet_model(resnet18, 3, (32, 32), pretrained=False)
    hooks = [m for m in model.modules() if m._forward_hooks]
    y = torch.randint(3, (4, 32, 32))
    learn = quiet(batches(images(4, 32), y, 2), model, CrossEntropyLossFlat(axis=1))
    before = size(model)
    schedule = lin.over(0.0, 0.9, n_steps=2)
    cb = fit(learn, 1, PruneCallback(0.5, schedule=schedule, verify=False))
    assert cb.reached() > 0.49 and size(model) < 0.4 * before
    assert [m for m in model.modules() if m._forward_hooks] == hooks
    assert model(images(1, 32)).shape == (1, 3, 32, 32)
    learn.fit(1)


def test_channels_last():
    learn = learner()
    fit(learn, 2, PruneCallback(0.5, schedule=QUICK), ChannelsLast())
    assert learn.model.c1.weight.is_contiguous(memory_format=torch.channels_last)
    assert learn.model.c1.weight.shape[0] == 8


# --- compiled, accumulated, in mixed precision ----------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_compiled_anew_and_that_is_said(whole):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = make(Plain)
    if whole:
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    learn = learner(model)
    with torch._dynamo.config.patch(recompile_limit=2):  # torch gives up after so many
        with pytest.warns(UserWarning, match="each of up to 4 cuts makes torch compile it anew"):
            fit(learn, 1, PruneCallback(0.5, schedule=lin.over(0.0, 0.9, n_steps=4)))
        assert len(graphs) >= 5  # dense, after each cut, and to evaluate
        before = len(graphs)
        learn.fit(1)
        assert len(graphs) == before and model(images(8, 8)).shape == (8, 5)
    torch.compiler.reset()


class Accumulated(Callback):
    """What is accumulated after the first batch, before the cut or after it."""

    def __init__(self, order):
        self.order, self.grads = order, None

    def after_batch(self):
        if self.training and self.grads is None:
            self.grads = {k: p.grad.clone() for k, p in self.learn.model.named_parameters()}


def test_a_cut_amid_accumulated_gradients_loses_none_of_them():
    learn = learner(opt_func=SGD)
    before, after = Accumulated(PruneCallback.order - 1), Accumulated(PruneCallback.order + 1)
    cb = PruneCallback(0.5, schedule=one_shot.over(1, 1))
    fit(learn, 1, cb, GradientAccumulation(16), before, after)
    for name, whole in before.grads.items():
        for d, index in cb.plan.kept.get(name, {}).items():
            whole = whole.index_select(d, torch.tensor(index))
        assert torch.equal(after.grads[name], whole)
    assert before.grads["c1.weight"].shape[0] == 2 * after.grads["c1.weight"].shape[0]


def test_accumulating_clipping_and_mixing():
    learn = learner()
    learn.loss_func = CrossEntropyLossFlat()
    cb = fit(learn, 3, PruneCallback(0.5), GradientAccumulation(20), GradientClip(1.0), MixUp())
    assert cb.reached() == 0.5


def test_mixed_precision_with_a_scaler():
    class Scaled(OnCPU):
        def before_fit(self):
            super().before_fit()
            self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
            self.steps = []

        def after_batch(self):
            if self.training:
                self.steps.append(self.skipped)

    scaled = Scaled()
    learn = learner(cbs=scaled)
    for sparsity, criteria in ((0.25, grad_crit), (0.5, torch.abs)):
        cb = PruneCallback(sparsity, criteria=criteria, schedule=QUICK)
        fit(learn, 3, cb)
        assert any(scaled.steps) and not all(scaled.steps)
        assert cb.reached() == sparsity and learn.model.c1.weight.dtype == torch.float32


@pytest.mark.parametrize("name", COMPANY)
def test_each_of_the_company_alone(tmp_path, name):
    learn = learner(path=tmp_path)
    learn.loss_func = CrossEntropyLossFlat()
    learn.logger = list
    cb = PruneCallback(0.5, schedule=lin.over(0.0, 0.4, n_steps=3))
    fit(learn, 3, cb, COMPANY[name](tmp_path))
    assert learn.model.c1.weight.shape[0] == 8 and cb.reached() == 0.5
    names = list(learn.recorder.metric_names)
    assert names[-4:-1] == ["sparsity", "parameters", "MACs"]
    assert all(len(row) == len(names) - 2 for row in learn.recorder.values)
    assert learn.recorder.values[-1][-2] == size(learn.model)


# --- saving ---------------------------------------------------------------------------------------


def test_the_best_model_is_one_that_is_cut(tmp_path):
    learn = learner(path=tmp_path)
    saver = SaveModelCallback(with_opt=True)
    fit(learn, 4, PruneCallback(0.5, schedule=QUICK), saver)
    saved = torch.load(tmp_path / "models" / "model.pth", weights_only=False)["model"]
    assert saved["c1.weight"].shape[0] == 8
    assert all(torch.equal(v, saved[k]) for k, v in learn.model.state_dict().items())


def test_a_best_model_from_before_a_cut_is_not_loaded(tmp_path):
    learn = learner(path=tmp_path)
    saver = SaveModelCallback(monitor="parameters")  # the first epoch has most
    cb = PruneCallback(0.5, schedule=lin.over(8, 16, n_steps=2), hold_trackers=False)
    with pytest.warns(UserWarning, match="saved before a cut and has other shapes"):
        fit(learn, 3, cb, saver)
    assert learn.model.c1.weight.shape[0] == 8
    learn.fit(1)


@pytest.mark.filterwarnings("ignore:load_learner")
def test_save_load_export_and_copies(tmp_path):
    learn = learner(path=tmp_path, cbs=PruneCallback(0.5, schedule=QUICK))
    learn.fit(2, cbs=CSVLogger())
    x = learn.dls.one_batch()[0]
    learn.save("small")
    other = learner(path=tmp_path)
    learn.prune.plan.apply(other.model)
    other.load("small")
    expected = learn.model.eval()(x)
    assert torch.equal(other.model.eval()(x), expected)
    other.fit(1)
    learn.export("whole.pkl")
    loaded = load_learner(tmp_path / "whole.pkl")
    assert torch.equal(loaded.model.eval()(x), expected)
    loaded.dls = learn.dls
    loaded.fit(1)
    assert loaded.model.c1.weight.shape[0] == 8 and loaded.prune.reached() == 0.5
    assert torch.equal(pickle.loads(pickle.dumps(learn.model)).eval()(x), learn.model.eval()(x))


# --- faults ---------------------------------------------------------------------------------------


class Raise(Callback):
    """Raises at the n-th training event of a kind, behind the pruning or before it."""

    def __init__(self, error, event, at, order=98):
        self.error, self.event, self.at, self.order, self.count = error, event, at, order, 0
        setattr(self, event, self.fail)

    def fail(self):
        if self.training or self.event == "after_epoch":
            self.count += 1
            if self.count == self.at:
                raise self.error


ERRORS = [
    KeyboardInterrupt(),
    ValueError("boom"),
    CancelFitException(),
    CancelEpochException(),
    CancelBatchException(),
    CancelStepException(),
]
EVENTS = ["before_batch", "after_pred", "before_backward", "before_step", "after_step"]
EVENTS += ["after_batch", "after_epoch"]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_after_a_fault_all_is_usable(error, event):
    if isinstance(error, CancelStepException) and event != "before_step":
        pytest.skip("nobody catches it there")
    learn = learner()
    cb = PruneCallback(0.5, schedule=QUICK)
    at = 1 if event == "after_epoch" else 3
    try:
        fit(learn, 2, cb, Raise(error, event, at, order=-90 if event == "before_step" else 98))
    except (KeyboardInterrupt, ValueError, CancelBatchException, CancelEpochException):
        pass
    sane(learn)
    learn.fit(1)  # the optimizer as it is
    cb2 = fit(learn, 1, cb)
    assert cb2.reached() == 0.5 and learn.model.c1.weight.shape[0] == 8
    sane(learn)


def sane(learn):
    """Weights, state and modules' integers fit together."""
    for name, p in learn.model.named_parameters():
        assert p.isfinite().all(), name
        for value in learn.opt.state[p].values():
            assert not isinstance(value, torch.Tensor) or value.shape == p.shape, name
    assert learn.model.c1.out_channels == learn.model.c1.weight.shape[0]
    assert not any("step" in vars(o) or "after_epoch" in vars(o) for o in (learn.opt, *learn.cbs))


@pytest.mark.parametrize(
    "where, at", [("surgery.smaller", 9), ("replay.run_labels", 2), ("remaining.run_labels", 2)]
)
def test_an_interrupt_inside_a_cut(monkeypatch, where, at):
    learn = learner()
    cb = PruneCallback(0.5, schedule=QUICK)
    module, name = where.split(".")
    source = __import__(f"fasterai.coupling.{module}", fromlist=[name])
    works, count = getattr(source, name), []

    def interrupted(*args, **kwargs):
        count.append(1)
        if len(count) == at:
            raise KeyboardInterrupt
        return works(*args, **kwargs)

    monkeypatch.setattr(source, name, interrupted)
    if module == "surgery":
        monkeypatch.setattr("fasterai.prune.optimizer.smaller", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(learn, 2, cb)
    sane(learn)
    learn.fit(1)
    fit(learn, 2, cb)
    sane(learn)
    assert learn.model.c1.weight.shape[0] == 8 and cb.reached() == 0.5


def test_what_cannot_work_is_said_before_training():
    for wrong, error, match in (
        ({"sparsity": 40}, ValueError, "pass 0.4"),
        ({"sparsity": "half"}, TypeError, "fraction"),
        ({"sparsity": 0.5, "context": "layer"}, ValueError, "context"),
        ({"sparsity": 0.5, "criteria": "l1"}, TypeError, "criteria"),
        ({"sparsity": 0.5, "round_to": 0}, ValueError, "round_to"),
        ({"sparsity": 0.5, "pruning_ratio": 50}, TypeError, "sparsity=0.4"),
    ):
        with pytest.raises(error, match=match):
            PruneCallback(**wrong)
    learn = learner()
    with pytest.raises(ValueError, match="goes down"):
        fit(learn, 2, PruneCallback(0.5, schedule=dsd))
    with pytest.raises(ValueError, match="no layer 'c9'"):
        fit(learn, 2, PruneCallback(0.5, exclude="c9"))
    with pytest.raises(RuntimeError, match="fit with this callback first"):
        PruneCallback(0.5).report()
    nothing = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ValueError, match=r"nothing to prune.* 1: network output \(4\)"):
        fit(learner(nothing), 1, PruneCallback(0.5))
    assert widths(learn.model) == widths(make(Residual))


def test_an_optimizer_that_cannot_be_carried_is_named_and_all_goes_on_without_it():
    opt_func = lambda params, lr: OptimWrapper(params, optim.Adafactor, lr=lr)  # noqa: E731
    learn = learner(opt_func=opt_func)
    with pytest.raises(ValueError, match="Adafactor cannot be carried"):
        fit(learn, 2, PruneCallback(0.5))
    assert widths(learn.model) == widths(make(Residual))
    learn.fit(1)
    learn.opt_func = SGD
    fit(learn, 1, PruneCallback(0.5), reset_opt=True)
    assert learn.model.c1.weight.shape[0] == 8


def test_many_cuts_that_change_nothing_cost_nothing(monkeypatch):
    """100 updates of agp, but 8 units to go: one analysis a cut."""
    learn, cut = learner(make(Plain)), []
    tried = PruneCallback._pruner_of_model

    def spied(self):
        pruner = tried(self)
        try_out = pruner._tried
        pruner._tried = lambda *args: (cut.append(1), try_out(*args))[1]
        return pruner

    monkeypatch.setattr(PruneCallback, "_pruner_of_model", spied)
    learn.dls = data()
    fit(learn, 12, PruneCallback(0.5, schedule=agp))
    assert 1 < len(cut) <= 15 and learn.model.a.weight.shape[0] == 4


def test_no_warnings_in_a_plain_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(learner(), 2, PruneCallback(0.5, schedule=QUICK))


def test_more_units_than_there_are():
    cb = PruneCallback(Units(10**4), "global", schedule=one_shot)
    with pytest.warns(UserWarning, match="asked were 10000 units, .* could go"):
        learner().fit(1, cbs=cb)


def test_a_target_that_is_met_already():
    cb = PruneCallback(Target(parameters=10**9))
    with pytest.warns(UserWarning, match="nothing was removed.*the network costs no more"):
        learner().fit(1, cbs=cb)
