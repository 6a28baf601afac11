"""The callback beside fastai's own callbacks, savers, precisions and wrapped models."""

import os

import pytest
import torch
import torch.distributed as dist
from company import COMPANY, OnCPU
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import FetchPredsCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import (
    SaveModelCallback,
)
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Lookahead, OptimWrapper, RAdam, ranger
from learners import Watch, filters_at_zero, learner, weights_at_zero
from networks import Residual, wrapped

from fasterai.core.schedule import agp, lin, one_shot
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier

EARLY = agp.over(0.1, 0.5)  # the target is reached in the second of four epochs


def expected(schedule, steps, groups, sparsity=0.5):
    """How many groups are zero after each step, by the schedule alone."""
    now, shares, found = 0, dict(schedule.updates(steps)), []
    for t in range(1, steps + 1):
        now = round(shares[t] * sparsity * groups) if t in shares else now
        found.append(now)
    return found


def company(tmp_path, names, granularity, **kwargs):
    learn = learner(path=tmp_path, **kwargs)
    learn.loss_func = CrossEntropyLossFlat()
    learn.logger = list
    cb, watch = SparsifyCallback(0.5, granularity, schedule=EARLY), Watch()
    learn.fit(4, cbs=[*(COMPANY[k](tmp_path) for k in names), cb, watch])
    return learn, cb, watch


@pytest.mark.parametrize("name", COMPANY)
def test_each_alone(tmp_path, name):
    learn, cb, watch = company(tmp_path, [name], "filter")
    assert watch.seen == expected(EARLY, 32, 16) and watch.inside
    assert filters_at_zero(learn.model.c1) == 8
    names = learn.recorder.metric_names
    assert list(names)[-2:] == ["sparsity", "time"]
    assert all(len(row) == len(names) - 2 for row in learn.recorder.values)
    assert [row[-1] for row in learn.recorder.values][1:] == [0.5] * 3


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_all_together(tmp_path, granularity):
    names = [k for k in COMPANY if k not in ("cutmix", "channels_last", "fetch_train")]
    learn, cb, watch = company(tmp_path, names, granularity)
    table = cb.report().set_index("layer")
    assert table.loc["c1", "zeros"] == table.loc["c1", "n"] == table.loc["c1", "groups"] // 2
    assert table.loc["total", "reached"] == 0.5 and watch.inside
    assert (tmp_path / "history.csv").read_text().count(",0.5,") == 3
    learn.validate()


def test_fetched_predictions_are_those_of_the_sparse_model(tmp_path):
    fetch = FetchPredsCallback()
    learn = learner(path=tmp_path)
    learn.fit(2, cbs=[SparsifyCallback(0.5, "filter"), fetch])
    torch.testing.assert_close(fetch.preds[0], learn.get_preds()[0])


@pytest.mark.parametrize("with_opt", [True, False])
def test_save_load_and_go_on(tmp_path, with_opt):
    learn = learner(path=tmp_path, opt_func=lambda params, lr: SGD(params, lr, mom=0.9))
    learn.fit(2, cbs=SparsifyCallback(0.5, "filter"))
    zero = {k: p == 0 for k, p in learn.model.named_parameters()}
    learn.save("sparse", with_opt=with_opt)
    other = learner(path=tmp_path, opt_func=lambda params, lr: SGD(params, lr, mom=0.9))
    other.load("sparse", with_opt=with_opt)
    assert all(torch.equal(p == 0, zero[k]) for k, p in other.model.named_parameters())
    if with_opt:  # the momentum of what is zero goes on, and moves nothing
        moving = other.opt.state[other.model.c1.weight]["grad_avg"]
        assert moving[zero["c1.weight"]].count_nonzero()
    watch = Watch()
    other.fit(2, cbs=[SparsifyCallback(0.5, "filter"), watch])
    assert watch.seen == [8] * 16 and watch.inside
    dead = zero["c1.weight"].flatten(1).all(1)
    assert dead.sum() == 8 and not other.model.c1.weight[dead].count_nonzero()


@pytest.mark.filterwarnings("ignore:load_learner")
def test_export_with_the_callback_and_trackers(tmp_path):
    cbs = [SparsifyCallback(0.5, "filter", schedule=EARLY), SaveModelCallback()]
    learn = learner(path=tmp_path, cbs=cbs)
    learn.fit(4)
    learn.export("whole.pkl")
    other = load_learner(tmp_path / "whole.pkl")
    assert filters_at_zero(other.model.c1) == 8
    x = learn.dls.one_batch()[0]
    torch.testing.assert_close(other.model.eval()(x), learn.model.eval()(x))
    other.dls = learn.dls
    other.fit(1)
    assert filters_at_zero(other.model.c1) == 8
    assert other.sparsify.report()["reached"].iloc[-1] == 0.5


@pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:torch.cuda.amp.GradScaler")
@pytest.mark.parametrize("mode", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", [MixedPrecision, OnCPU])
def test_mixed_precision(tmp_path, kind, mode):
    learn, watch = learner(path=tmp_path), Watch()
    if kind is MixedPrecision and torch.cuda.is_available():
        learn.dls.to("cuda")  # without one it turns itself off
    precision = kind(amp_mode=mode)
    cb = SparsifyCallback(0.5, "filter", schedule=EARLY)
    skipped = []
    watch.after_step = lambda: skipped.append(precision.skipped)
    learn.fit(4, cbs=[precision, cb, watch])
    assert watch.seen == expected(EARLY, 32, 16) and watch.inside
    assert not all(skipped) and (any(skipped) or kind is not OnCPU or mode == "bf16")


@pytest.fixture
def one_process(tmp_path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile
@pytest.mark.parametrize("kind", ["eager", "aot_eager", "ddp", "part"])
@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_wrapped_models_go_by_the_names_inside(one_process, kind, granularity):
    plain, learn = learner(), learner(wrapped(kind))
    choice = {"layers": ["stem", "c1", "c2"], "exclude": "c2"} if granularity == "weight" else {}
    for each in (plain, learn):
        torch.manual_seed(1)
        cb = SparsifyCallback({"c1": 0.5}, granularity, schedule=EARLY, **choice)
        each.fit(2, cbs=cb)
    inside = next(m for m in learn.model.modules() if isinstance(m, Residual))
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.model.parameters(), inside.parameters(), strict=True)
    )
    table = cb.report().set_index("layer")
    assert not any("_orig_mod" in k or "module" in k for k in table.index)
    assert table.loc["c1", "zeros"] == table.loc["c1", "n"] > 0


@pytest.mark.parametrize("kind", ["eager", "ddp", "part"])
def test_names_of_the_wrapper_are_refused_with_those_inside(one_process, kind):
    model, x = wrapped(kind), torch.randn(2, 3, 8, 8)
    name = {"eager": "_orig_mod.c1", "ddp": "module.c1", "part": "c1._orig_mod"}[kind]
    with pytest.raises(ValueError, match=f"'c1', not '{name}'"):
        Sparsifier(model, layers=name, example_inputs=x)
    sparsifier = Sparsifier(model, example_inputs=x)
    with pytest.raises(ValueError, match=f"'c1', not '{name}'"):
        sparsifier.sparsify_model({name: 0.5})
    assert sparsifier.sparsify_model({"c1": 0.5}) is model
    with pytest.raises(ValueError, match="did you mean 'c1'"):
        sparsifier.sparsify_model({"c11": 0.5})


@pytest.mark.parametrize("granularity", ["filter", "weight", "kernel", "2:4"])
@pytest.mark.parametrize("context", ["local", "global"])
def test_channels_last_makes_no_difference(granularity, context):
    models = []
    for cbs in ([], [ChannelsLast()]):
        learn = learner(opt_func=SGD)  # Adam makes much of rounding
        layers = {"exclude": "stem"} if granularity == "2:4" else {}
        learn.fit(2, cbs=[*cbs, SparsifyCallback(0.5, granularity, context, **layers)])
        models.append(learn.model)
    assert models[1].c1.weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a == 0, b == 0)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def splitter(model):
    body = [model.stem, model.bn0, model.c1, model.bn1, model.c2, model.bn2]
    groups = [body[:2], body[2:], [model.c3, model.bn3, model.head]]
    return [[p for layer in group for p in layer.parameters()] for group in groups]


def test_discriminative_rates():
    learn, watch = learner(splitter=splitter), Watch()
    cb = SparsifyCallback(0.5, "filter", schedule=EARLY)
    learn.fit_one_cycle(2, slice(1e-4, 1e-2), cbs=[cb, watch])
    assert len({h["lr"] for h in learn.opt.hypers}) == 3
    assert watch.seen == expected(EARLY, 16, 16) and watch.inside
    assert cb.report()["reached"].iloc[-1] == 0.5


def test_what_is_frozen_stays_dense_and_what_is_not_reaches_its_target():
    learn = learner(splitter=splitter)
    learn.freeze_to(1)
    stem = learn.model.stem.weight.detach().clone()
    learn.fit(2, cbs=SparsifyCallback(0.5, schedule=EARLY))  # so little that nobody is warned
    assert torch.equal(learn.model.stem.weight, stem)
    assert int((learn.model.c1.weight == 0).sum()) == learn.model.c1.weight.numel() // 2
    zero = learn.model.c1.weight == 0
    learn.freeze_to(2)  # now c1 is frozen with its zeros
    with pytest.warns(UserWarning, match="are frozen, stay dense"):
        learn.fit(1, cbs=SparsifyCallback(0.5, schedule=EARLY))
    assert torch.equal(learn.model.c1.weight == 0, zero)
    learn.unfreeze()
    cb = SparsifyCallback(0.5, schedule=EARLY)
    learn.fit(2, cbs=cb)
    assert weights_at_zero(learn) == cb.report()["n"].iloc[-1]


OPTIMIZERS = {
    "radam": RAdam,
    "lookahead": lambda params, lr: Lookahead(SGD(params, lr, mom=0.9)),
    "ranger": ranger,
    "adamw": lambda params, **kw: OptimWrapper(params, torch.optim.AdamW, **kw),
    "rmsprop": lambda params, **kw: OptimWrapper(params, torch.optim.RMSprop, momentum=0.9, **kw),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_optimizers_with_a_memory(name, granularity):
    learn, watch = learner(opt_func=OPTIMIZERS[name]), Watch()
    cb = SparsifyCallback(0.5, granularity, schedule=EARLY)
    learn.fit(3, wd=0.1, cbs=[cb, watch])
    assert cb.report()["reached"].iloc[-1] == 0.5 and watch.inside
    assert "step" not in vars(learn.opt)


class Early(Watch):
    """Looks right behind the optimizer, before other callbacks."""

    order = -99

    def after_step(self):
        Watch.after_batch(self)

    def after_batch(self):
        pass


def test_what_looks_right_after_a_step_sees_zeros():
    learn, watch = learner(), Early()
    learn.fit(2, cbs=[SparsifyCallback(0.5, "filter", schedule=lin.over(0.0, 0.5)), watch])
    assert watch.inside and watch.seen[-1] == 8 and watch.seen[1] > 0


class Mover(Watch):
    """Moves all weights once more after the step."""

    order = 40

    def after_step(self):
        for p in self.learn.model.parameters():
            p.data.add_(0.01)


def test_what_others_move_after_a_step_goes_back():
    learn, watch = learner(), Watch()
    cb = SparsifyCallback(0.5, "filter", schedule=one_shot.over(0, 0))
    learn.fit(1, cbs=[cb, watch, Mover()])
    assert watch.seen == [8] * 8 and watch.inside
