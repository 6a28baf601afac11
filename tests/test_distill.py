"""Distillation: formulas written out, gradients in any company, and nothing left behind."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from company import SmallScale
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import minimum  # noqa: F401  (patches Learner with lr_find)
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from learners import Gradients, learner, left_behind
from networks import Residual, make
from torch import nn

from fasterai.core.schedule import agp
from fasterai.distill.callback import DistillCallback
from fasterai.distill.losses import (
    attention_distance,
    attention_map,
    soft_targets,
    value_distance,
)
from fasterai.distill.watch import layers_named, watched
from fasterai.prune.callback import PruneCallback
from fasterai.prune.pruner import Pruner
from fasterai.sparse.callback import SparsifyCallback

# --- formulas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3, 2)])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_soft_targets(shape, temperature):
    generator = torch.Generator().manual_seed(0)
    pred, teacher = (torch.randn(shape, generator=generator).double() * 3 for _ in range(2))
    total, count = 0.0, 0
    for z, v in zip(
        *(x.movedim(1, -1).reshape(-1, shape[1]).tolist() for x in (pred, teacher)), strict=True
    ):
        q, p = ([math.exp(a / temperature) for a in x] for x in (z, v))
        q, p = [a / sum(q) for a in q], [a / sum(p) for a in p]
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
        count += 1
    expected = temperature**2 * total / count
    assert soft_targets(pred, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert soft_targets(pred, pred).item() == pytest.approx(0.0, abs=1e-6)


def test_soft_targets_at_a_high_temperature_match_logits():
    """Hinton et al., eq. 4: the gradient is that of half the squares of centred logits, by N."""
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.randn(6, 5, generator=generator) for _ in range(2))
    z = (z - z.mean(1, keepdim=True)).requires_grad_()
    v = v - v.mean(1, keepdim=True)
    soft_targets(z, v, 1000.0).backward()
    torch.testing.assert_close(z.grad, (z - v).detach() / 5 / 6, rtol=1e-2, atol=1e-4)


def test_maps_of_attention():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(3, 4, 2, 5, generator=generator), torch.randn(3, 7, 2, 5)
    expected = 0.0
    for a, b in zip(ours.numpy(), theirs.numpy(), strict=True):
        maps = [
            np.array(
                [sum(x[c, i, j] ** 2 for c in range(len(x))) for i in range(2) for j in range(5)]
            )
            for x in (a, b)
        ]
        maps = [m / math.sqrt((m**2).sum()) for m in maps]
        expected += math.sqrt(((maps[0] - maps[1]) ** 2).sum()) / 2 / 3
    assert attention_distance(ours, theirs).item() == pytest.approx(expected, rel=1e-5)
    assert attention_map(ours).shape == (3, 10)
    tokens = ours.flatten(2).transpose(1, 2), theirs.flatten(2).transpose(1, 2)
    assert attention_distance(*tokens, -1).item() == pytest.approx(expected, rel=1e-5)
    same = ours.clone().requires_grad_()
    attention_distance(same, ours).backward()
    assert same.grad.isfinite().all()  # a norm has no gradient at zero
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    attention_distance(zero, torch.ones(2, 3, 4)).backward()
    assert zero.grad.isfinite().all()


def test_values():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert value_distance(a, b).item() == pytest.approx(float(((a - b).numpy() ** 2).mean()))


def test_what_cannot_be_compared():
    x = torch.randn(2, 3)
    for call, message in (
        (lambda: soft_targets(x, x[:, :2]), r"\(2, 3\) and \(2, 2\) of the teacher"),
        (lambda: soft_targets(x[:, :1], x[:, :1]), "at least two classes"),
        (lambda: soft_targets((x,), x), "tuple and Tensor of the teacher"),
        (lambda: value_distance(x, x[:1]), "kept=pruner.plan"),
        (lambda: attention_distance(x, x), "match='values'"),
        (
            lambda: attention_distance(x[..., None], x[..., None].expand(2, 3, 4)),
            "positions differ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- in fits -----------------------------------------------------------------------------------


class FirstSteps(Gradients):
    """What the loss is made of at the first step: inputs, labels, and both networks' outputs."""

    order = 2000

    def before_fit(self):
        super().before_fit()
        self.batches, self.rates = [], []

    def after_loss(self):
        if self.learn.training:
            mixup = [cb for cb in self.learn.cbs if isinstance(cb, MixUp)]
            more = (mixup[0].yb1[0], mixup[0].lam) if mixup else (None, None)
            self.batches.append((self.learn.xb[0].clone(), self.learn.yb[0], *more))


def teacher_of(seed=7):
    return make(Residual, seed=seed).eval()


def fitted(cbs, **kwargs):
    learn, watch = learner(opt_func=SGD), FirstSteps()
    learn.loss_func = CrossEntropyLossFlat()
    learn.fit(1, 1e-3, cbs=[*cbs, DistillCallback(teacher_of(), **kwargs), watch])
    return learn, watch


COMPANY = {
    "alone": list,
    "accumulate": lambda: [GradientAccumulation(24)],
    "mixup": lambda: [MixUp()],
    "precision": lambda: [SmallScale()],
    "all": lambda: [SmallScale(), GradientAccumulation(16), MixUp(), GradientClip(1e9)],
}


@pytest.mark.parametrize("name", COMPANY)
def test_gradients_are_those_of_the_formula(name):
    learn, watch = fitted(
        COMPANY[name](), weight=0.3, temperature=3.0, features=["c1", "c3"], feature_weight=2.0
    )
    count = {"accumulate": 3, "all": 2}.get(name, 1)
    model, teacher = make(Residual).train(), teacher_of()
    model.load_state_dict({**watch.weights[0]})
    for m in model.modules():  # statistics do not matter in training
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
    total = 0.0
    for x, y, y1, lam in watch.batches[:count]:
        outs = []
        for net in (model, teacher):
            seen = []
            hooks = [
                getattr(net, k).register_forward_hook(lambda m, a, o, s=seen: s.append(o))
                for k in ("c1", "c3")
            ]
            with torch.set_grad_enabled(net is model):
                outs.append((net(x), *seen))
            for hook in hooks:
                hook.remove()
        hard = F.cross_entropy(outs[0][0], y, reduction="none")
        if y1 is not None:
            hard = torch.lerp(F.cross_entropy(outs[0][0], y1, reduction="none"), hard, lam)
        p, log_q = (outs[1][0] / 3).softmax(1), (outs[0][0] / 3).log_softmax(1)
        soft = 9 * (p * (p.log() - log_q)).sum(1).mean()
        apart = 0.0
        for a, b in zip(outs[0][1:], outs[1][1:], strict=True):
            a, b = (f.pow(2).sum(1).flatten(1) for f in (a, b))
            a, b = (f / f.norm(dim=1, keepdim=True) for f in (a, b))
            apart = apart + (a - b).norm(dim=1).mean() / 2
        total = total + (0.7 * hard.mean() + 0.3 * soft + 2.0 * apart) / count
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    found = torch.cat([watch.seen[0][k].flatten() for k, _ in model.named_parameters()])
    if name in ("precision", "all"):  # bfloat16
        assert F.cosine_similarity(found, expected, dim=0) > 0.99
        assert found.norm() == pytest.approx(expected.norm().item(), rel=0.01)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_validation_loss_is_the_plain_one_and_the_teacher_stays_as_it_was():
    teacher = teacher_of().train()
    before = copy.deepcopy(teacher.state_dict())
    learn = learner()
    watch = []
    teacher.register_forward_pre_hook(lambda m, _: watch.append(m.training))
    learn.fit(2, cbs=DistillCallback(teacher, features="c1"))
    x, y = learn.dls.valid.dataset.tensors
    with torch.no_grad():
        plain = F.cross_entropy(learn.model.eval()(x), y).item()
    assert learn.recorder.values[-1][1] == pytest.approx(plain, rel=1e-4)
    assert learn.validate()[0] == pytest.approx(plain, rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert watch and not any(watch) and len(watch) == 16  # a run for each training batch
    assert all(p.grad is None for p in teacher.parameters()) and teacher.c1.training
    assert not teacher.c1._forward_hooks and not left_behind(learn)


def test_the_student_learns_what_the_teacher_knows():
    """All labels are 0: what it learns beside that it has from the teacher."""
    agree, school = {}, learner()
    school.fit(12)
    teacher = copy.deepcopy(school.model).eval()
    for weight in (0.0, 1.0):
        learn = learner()
        learn.dls.train.dataset.tensors[1].zero_()
        learn.fit(16, cbs=DistillCallback(teacher, weight))
        x = learn.dls.valid.dataset.tensors[0]
        with torch.no_grad():
            ours, theirs = learn.model.eval()(x).argmax(1), teacher(x).argmax(1)
        agree[weight] = (ours == theirs).float().mean().item()
    assert theirs.unique().numel() > 1 and agree[1.0] > 0.9 > agree[0.0]


@pytest.mark.parametrize("match", ["attention", "values"])
def test_features_become_alike(match):
    apart = {}
    for feature_weight in (0.0, 10.0):
        learn, teacher = learner(), teacher_of()
        cb = DistillCallback(
            teacher, 0.0, features={"bn1": "bn1"}, feature_weight=feature_weight, match=match
        )
        learn.fit(6, cbs=cb)
        x, seen = learn.dls.valid.dataset.tensors[0], []
        for net in (learn.model.eval(), teacher):
            with watched(layers_named(net, ["bn1"], "features")) as found:
                net(x)
            seen.append(found["bn1"].detach())
        distance = attention_distance if match == "attention" else value_distance
        apart[feature_weight] = distance(*seen).item()
    assert apart[10.0] < 0.6 * apart[0.0]


def test_nothing_asked_is_no_callback():
    models = []
    for cbs in (
        [],
        [DistillCallback(weight=0.0)],
        [DistillCallback(weight=0.0, features="c1", feature_weight=0.0)],
    ):
        learn = learner()
        learn.fit(2, cbs=cbs)
        models.append(learn.model)
    for other in models[1:]:
        pairs = zip(models[0].parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_without_a_teacher_it_is_the_network_before_the_fit():
    learn = learner()
    learn.fit(2)
    dense, seen = copy.deepcopy(learn.model).eval(), []

    def distance(pred, teacher):
        seen.append(teacher)
        return soft_targets(pred, teacher)

    batches = FirstSteps()
    cb = DistillCallback(loss=distance)
    learn.fit(2, cbs=[SparsifyCallback((0.3, 0.8), "filter"), cb, batches])
    for out, (x, *_) in zip(seen, batches.batches, strict=True):
        torch.testing.assert_close(out, dense(x))
    assert cb._copy is None


class Cut(Callback):
    """Removes channels in the middle of a fit."""

    order = 58

    def after_batch(self):
        if self.training and self.learn.train_iter == 11:
            pruner = Pruner(self.learn.model, self.learn.xb)
            pruner.prune_model(0.5)
            self.plan = pruner.plan
            self.learn.create_opt()


def test_channels_may_go_in_the_middle_of_a_fit():
    learn = learner()
    learn.fit(3, cbs=[DistillCallback(features=["c1", "bn2"]), Cut()])
    assert learn.model.c1.out_channels == 8 and not left_behind(learn)


@pytest.mark.parametrize("as_plan", [True, False])
def test_values_are_compared_through_what_was_kept(as_plan):
    learn, teacher = learner(opt_func=SGD), make(Residual)
    pruner = Pruner(learn.model, torch.randn(2, 3, 8, 8))
    pruner.prune_model(0.5)
    index = pruner.plan.kept["c1.weight"][0]
    kept = pruner.plan if as_plan else {"c1": index, "bn1": list(index)}
    seen = []
    cb = DistillCallback(teacher, 0.0, features=["c1", "bn1"], match="values", kept=kept)
    cb._layers_apart, real = (
        lambda *a: seen.append((a[0], real(*a))) or seen[-1][1],
        cb._layers_apart,
    )
    watch = FirstSteps()
    learn.fit(1, 0.0, wd=0.0, cbs=[cb, watch])
    x, outs = watch.batches[0][0], []
    hook = teacher.c1.register_forward_hook(lambda m, a, o: outs.append(o))
    teacher.eval()(x)
    hook.remove()
    expected = (seen[0][0] - outs[0][:, list(index)]).square().mean()
    torch.testing.assert_close(seen[0][1], expected)
    with pytest.raises(ValueError, match="kept=pruner.plan"):
        learn.fit(1, cbs=DistillCallback(teacher, features="c1", match="values"))
    assert not left_behind(learn)


class StopAfter(Callback):
    def __init__(self, batches):
        self.batches = batches

    def after_batch(self):
        if self.training and self.iter + 1 == self.batches:
            raise CancelFitException


@pytest.mark.parametrize("given", [True, False])
def test_values_follow_a_callback_that_prunes(given):
    """Where nothing learns, the filters that stay do what they did: nothing is apart."""
    learn, dense = learner(opt_func=SGD), make(Residual)
    learn.model.load_state_dict(dense.state_dict())
    prune = PruneCallback(0.6, schedule=agp.over(0.2, 1.0, n_steps=6))
    cb = DistillCallback(dense if given else None, 0.0, features="stem", match="values")
    seen = []
    real = cb._layers_apart

    def watched(ours, theirs, layer):
        apart = real(ours, theirs, layer)
        seen.append((ours.shape[1], theirs.shape[1], apart.item()))
        return apart

    cb._layers_apart = watched
    for stop in (5, 99):  # in a second fit the copy is the network that is pruned already
        learn.fit(1, 0.0, wd=0.0, cbs=[prune, cb, StopAfter(stop)])
    ours, theirs, apart = zip(*seen, strict=True)
    width = dense.stem.out_channels
    assert apart == (0.0,) * len(seen) and ours[0] == width > ours[4] > ours[-1]
    assert set(theirs[:5]) == {width} and set(theirs[5:]) == {width if given else ours[4]}
    half = copy.deepcopy(learn.model)  # a teacher that was cut as far as this
    prune.sparsity = 0.8
    seen.clear()
    later = DistillCallback(half, 0.0, features="stem", match="values")
    real, later._layers_apart = later._layers_apart, watched
    learn.fit(1, 0.0, wd=0.0, cbs=[prune, later])
    assert {apart for *_, apart in seen} == {0.0} and seen[-1][0] < seen[-1][1] == ours[-1]
    with pytest.raises(ValueError, match="kept=pruner.plan"):
        cb = DistillCallback(make(Residual), 0.0, features="stem", match="values")
        learn.fit(1, cbs=cb)


def test_of_a_block_the_last_layer_tells_what_was_kept():
    def block(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU())

    torch.manual_seed(0)
    teacher = nn.Sequential(
        block(3, 8), block(8, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    learn = learner(copy.deepcopy(teacher))
    pruner = Pruner(learn.model, torch.randn(2, 3, 8, 8))
    pruner.prune_model(0.5)
    index, x = list(pruner.plan.kept["1.0.weight"][0]), torch.randn(4, 3, 8, 8)
    cb = DistillCallback(teacher, features="1", match="values", kept=pruner.plan)
    ours, theirs = learn.model[:2].eval()(x), teacher[:2].eval()(x)
    cb._layers = {"1": learn.model[1]}, {"1": teacher[1]}  # as a fit finds them
    apart = cb._layers_apart(ours, theirs, "1")
    torch.testing.assert_close(apart, (ours - theirs[:, index]).square().mean())
    learn.fit(1, cbs=cb)


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_in_company(tmp_path, granularity):
    learn = learner(path=tmp_path)
    learn.loss_func = CrossEntropyLossFlat()
    sparsify = SparsifyCallback(0.5, granularity, schedule=agp.over(0.1, 0.5))
    cbs = [
        sparsify,
        SmallScale(),
        GradientAccumulation(16),
        GradientClip(0.5),
        CutMix(),
        SaveModelCallback(),
    ]
    learn.fit(4, cbs=[*cbs, DistillCallback(features=["c1"])])
    assert sparsify.report()["reached"].iloc[-1] == 0.5 and not left_behind(learn)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)


@pytest.mark.filterwarnings("ignore:load_learner")
def test_the_teacher_is_not_exported(tmp_path):
    big = make(Residual)
    big.ballast = nn.Linear(1000, 1000)
    for cb in (DistillCallback(big), DistillCallback()):
        learn = learner(path=tmp_path, cbs=cb)
        learn.fit(1)
        learn.export("l.pkl")
        assert (tmp_path / "l.pkl").stat().st_size < 300_000
        learn.fit(1)  # as before
        other = load_learner(tmp_path / "l.pkl")
        other.dls = learn.dls
        if cb.teacher is None:
            other.fit(1)
        else:
            with pytest.raises(ValueError, match="was not saved"):
                other.fit(1)
            other.distill.teacher = big
            other.fit(1)


def test_lr_find_and_predictions_are_without_it():
    learn, teacher, runs = learner(), teacher_of(), []
    teacher.register_forward_pre_hook(lambda m, _: runs.append(1))
    learn.add_cb(DistillCallback(teacher, features="c1"))
    learn.lr_find(num_it=4, show_plot=False)
    learn.validate()
    learn.get_preds()
    assert not runs


class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if self.error and self.training:
            raise self.error
        return x


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("bang")])
@pytest.mark.parametrize("where", ["model", "loss", "teacher", "after_pred", "after_loss"])
def test_an_exception_leaves_nothing(where, error):
    learn, teacher = learner(), teacher_of()
    cb = DistillCallback(teacher, features=["c1"])
    learn.add_cb(cb)  # stays when the fit breaks off
    bang = Raises(error if where == "model" else None)
    learn.model.bn1 = nn.Sequential(learn.model.bn1, bang)
    plain = learn.loss_func

    class Bang(Callback):
        order = 3000

        def after_loss(self):
            if where == "after_loss":
                raise error

        def after_pred(self):
            if where == "after_pred":
                raise error

    if where == "teacher":
        teacher.c2.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
    if where == "loss":
        learn.loss_func = lambda *_: (_ for _ in ()).throw(error)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        learn.fit(1, cbs=Bang())
    assert "forward" not in vars(learn.model)
    assert not any(m._forward_hooks for m in [*learn.model.modules(), *teacher.modules()])
    where, bang.error, learn.loss_func = "", None, plain
    teacher.c2._forward_pre_hooks.clear()
    learn.fit(1)
    assert learn.loss_func is plain


@pytest.mark.parametrize("error", [CancelBatchException, CancelFitException])
def test_cancelled_batches_leave_nothing(error):
    class Cancel(Callback):
        order = 3000

        def after_pred(self):
            if self.training:
                raise error

    learn = learner()
    plain = learn.loss_func
    learn.fit(1, cbs=[DistillCallback(features="c1"), Cancel()])
    assert learn.loss_func is plain and not left_behind(learn)


def test_bad_arguments():
    model = make(Residual)
    for kwargs, message in (
        ({"weight": 1.5}, r"weight must be a number in \[0, 1\], got 1.5"),
        ({"weight": True}, "weight must be"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"temperature": math.inf}, "temperature must be above 0 and finite"),
        ({"feature_weight": -1}, "feature_weight must be a number >= 0, got -1"),
        ({"feature_weight": math.inf}, "feature_weight must be a number"),
        ({"match": "maps"}, "'attention' or 'values', got 'maps'"),
        ({"features": "c9"}, "features: the model has no layer 'c9'; did you mean"),
        ({"features": {"c1": "d1"}}, "features: the model has no layer 'd1'"),
        ({"features": ["head"]}, "match='values'"),
        ({"teacher": nn.Sequential(make(Residual), nn.Linear(4, 3))}, r"\(8, 3\) of the teacher"),
        ({"teacher": model}, "shares parameters"),
    ):
        learn = learner(model)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            learn.fit(1, cbs=DistillCallback(**kwargs))
        names = dict(model.named_parameters())
        assert all(torch.equal(p, before[k]) for k, p in names.items()) and not left_behind(learn)
    with pytest.raises(TypeError, match="teacher must be a network"):
        DistillCallback("resnet")
    for kwargs, message in (
        ({"channels": "x"}, "channels must be a dimension, such as 1 or -1, got 'x'"),
        ({"channels": True}, "channels must be"),
        ({"loss": "mse"}, "loss must be a function of two outputs or None, got 'mse'"),
        ({"kept": 5}, "kept must be a plan, as in kept=pruner.plan, .*got 5"),
        ({"features": [None]}, "features are names of layers, got None"),
        ({"features": {"c1": 2}}, "features are names of layers, got 2"),
    ):
        with pytest.raises(TypeError, match=message):
            DistillCallback(**kwargs)
    learn, other = learner(), learner(make(Residual, seed=3))
    learn.fit(1, cbs=DistillCallback(other))
    assert not other.model.training


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile
def test_compiled_models():
    learn = learner(torch.compile(make(Residual), backend="eager"))
    learn.fit(1, cbs=DistillCallback())
    assert not left_behind(learn)
