"""Penalties: values and gradients against the formulas written out, and fits with them."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from company import SmallScale
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from learners import Gradients, learner
from networks import ALL, Gated, Mlp, Plain, Residual, images, make
from torch import nn

from fasterai.core.criteria import grad_crit
from fasterai.core.schedule import agp, lin, one_shot
from fasterai.prune.pruner import Pruner
from fasterai.regularize.callback import RegularizeCallback
from fasterai.regularize.penalties import GroupLasso, Slimming
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier

AT_ONCE = one_shot.over(0, 0)
COUPLED = {  # of Residual, by reading it: what a channel of each axis is made of
    8: ["stem.weight", "c2.weight", "c3.weight", "c3.bias", "bn0.weight", "bn0.bias"]
    + ["bn2.weight", "bn2.bias", "bn3.weight", "bn3.bias"],
    16: ["c1.weight", "bn1.weight", "bn1.bias"],
}


def over_units(model):
    """Group lasso on the units of Residual."""
    total = 0.0
    for size, names in COUPLED.items():
        for u in range(size):
            unit = torch.cat([model.get_parameter(k)[u].flatten() for k in names])
            total = total + math.sqrt(len(unit)) * unit.norm()
    return total


def over_layers(model, layers, block):
    """Group lasso on blocks of weights, by looping over them."""
    total = 0.0
    for name in layers:
        w = model.get_submodule(name).weight
        steps = [range(0, n, b) for n, b in zip(w.shape, block(w), strict=True)]
        for corner in itertools.product(*steps):
            group = w[tuple(slice(c, c + b) for c, b in zip(corner, block(w), strict=True))]
            total = total + math.sqrt(group.numel()) * group.norm()
    return total


def scales(model):
    """The L1 norm of all norms' scales."""
    return sum(
        m.weight.abs().sum()
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._NormBase)
    )


CONVS = ["stem", "c1", "c2", "c3"]
CASES = {
    "filter": over_units,
    "weight": lambda m: sum(m.get_submodule(k).weight.abs().sum() for k in CONVS),
    "kernel": lambda m: over_layers(m, CONVS, lambda w: (1, 1, 3, 3)),
    "row": lambda m: over_layers(m, CONVS, lambda w: (1, 1, 1, 3)),
    "channel": lambda m: over_layers(m, CONVS, lambda w: (1, w.shape[1], 1, 1)),
    "o/3 i/2 h": lambda m: over_layers(m, CONVS, lambda w: (3, 2, 1, 3)),
    "slimming": scales,
}


def penalty_of(name, model):
    x = torch.randn(2, 3, 8, 8, dtype=next(model.parameters()).dtype)
    if name == "slimming":
        return Slimming(model, example_inputs=x)
    return GroupLasso(model, name, example_inputs=x)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("zeros", [False, True])
def test_value_and_gradient_against_the_formula(name, zeros):
    model = make(Residual, torch.float64)
    if zeros:
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    penalty, written_out = penalty_of(name, model), copy.deepcopy(model)
    expected = CASES[name](written_out)
    torch.testing.assert_close(penalty.value(), expected)
    (0.3 * expected).backward()
    by_autograd = copy.deepcopy(model)
    (0.3 * penalty_of(name, by_autograd).value()).backward()
    penalty.add_gradient(0.1)
    penalty.add_gradient(0.2)  # it adds
    for k, p in model.named_parameters():
        grads = [dict(m.named_parameters())[k].grad for m in (written_out, by_autograd)]
        expected, differentiated = [torch.zeros_like(p) if g is None else g for g in grads]
        expected = torch.where(p == 0, 0.0, expected)  # at a kink of the formula: stay
        own = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(own, expected)
        torch.testing.assert_close(differentiated, expected)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", ["filter", "kernel", "slimming"])
def test_every_network(kind, name):
    model = make(kind, torch.float64)
    x = images(dtype=torch.float64)
    try:
        penalty = (
            Slimming(model, example_inputs=x)
            if name == "slimming"
            else GroupLasso(model, name, layers=None, example_inputs=x)
        )
    except ValueError:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        assert (name == "slimming" and not norms) or (name == "kernel" and kind is Mlp)
        return
    expected = torch.autograd.grad(penalty.value(), list(model.parameters()), allow_unused=True)
    penalty.add_gradient(1.0)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            torch.testing.assert_close(p.grad, g)
    before = penalty.value()
    for group in Sparsifier(model, "filter", example_inputs=x)._groups:
        if name == "filter":  # what the penalty is on is what the pruner removes
            assert all(dict(model.named_parameters())[k].grad is not None for k in group.parameters)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=1e-4)
    assert penalty.value() < before


def test_half_precision():
    model = make(Residual).bfloat16()
    penalty = GroupLasso(model, example_inputs=torch.randn(2, 3, 8, 8).bfloat16())
    penalty.add_gradient(1.0)
    assert penalty.value().dtype == torch.float32 and model.c1.weight.grad.dtype == torch.bfloat16
    expected = over_units(make(Residual))
    torch.testing.assert_close(penalty.value(), expected, rtol=1e-2, atol=0.0)


def test_a_channel_that_nothing_needs_goes_to_zero():
    """y = relu(x0): of four channels that share the work one is enough, the others shrink."""
    norms = {}
    for strength in (0.0, 0.02):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
        x = torch.randn(256, 2)
        y = x[:, :1].relu()
        penalty = GroupLasso(model, example_inputs=x)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(800):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            penalty.add_gradient(strength)
            optimizer.step()
        rows = model[0].weight.detach().norm(dim=1)
        norms[strength] = (rows > 0.05).sum().item()
        assert loss < 0.02
    assert norms[0.02] < norms[0.0]


def added(cbs, strength=0.5, **kwargs):
    """What the callback adds to the first step's gradients, and the network then."""
    found = []
    for own in ([], [RegularizeCallback(strength, schedule=AT_ONCE, **kwargs)]):
        learn, watch = learner(opt_func=SGD), Gradients()
        learn.loss_func = CrossEntropyLossFlat()
        learn.fit(1, 1e-3, cbs=[*cbs(), *own, watch])
        found.append(watch)
    dense, other = (watch.seen[0] for watch in found)
    network = make(Residual)
    network.load_state_dict(found[1].weights[0])
    return {k: other[k] - dense[k] for k in other}, network, found


@pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:torch.cuda.amp.GradScaler")
@pytest.mark.parametrize(
    "cbs",
    [
        list,
        lambda: [GradientAccumulation(24)],
        lambda: [GradientClip(1e-3)],
        lambda: [MixUp()],
        lambda: [SmallScale()],
        lambda: [SmallScale(), GradientAccumulation(16), GradientClip(1e-3)],
    ],
    ids=["alone", "accumulate", "clip", "mixup", "fp16", "all"],
)
def test_it_is_added_once_a_step_in_any_company(cbs):
    difference, network, found = added(cbs)
    (0.5 * over_units(network)).backward()
    steps = len(found[0].seen)
    assert len(found[1].seen) == steps > 0
    for k, d in difference.items():
        expected = network.get_parameter(k).grad
        expected = torch.zeros_like(d) if expected is None else expected
        torch.testing.assert_close(d, expected, rtol=1e-3, atol=2e-4)


def test_the_strength_follows_the_schedule_and_the_column_says_so():
    learn, cb = learner(opt_func=SGD), RegularizeCallback(0.01, schedule=lin.over(0.25, 0.75))
    watch = Gradients()
    learn.fit(4, cbs=[cb, watch])
    shares = dict(lin.over(0.25, 0.75).updates(32))
    assert [(t, pytest.approx(s)) for t, s in cb.history] == [
        (t, 0.01 * s) for t, s in shares.items()
    ]
    assert list(learn.recorder.metric_names)[-2:] == ["penalty", "time"]
    column = [row[-1] for row in learn.recorder.values]
    assert column[0] == pytest.approx(0.0, abs=1e-6)  # the update after step 8 begins at 0
    assert column[-1] == pytest.approx(0.01 * over_units(learn.model).item(), rel=1e-4)
    assert cb._penalty is None and len(cb.plot_strength().get_lines()) == 1


def test_no_strength_is_no_callback():
    models = []
    for cbs in ([], [RegularizeCallback(0.0)]):
        learn = learner()
        learn.fit(2, cbs=cbs)
        models.append(learn.model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def without(model, units):
    """Channels of c1 silenced."""
    with torch.no_grad():
        for p in (model.c1.weight, model.bn1.weight, model.bn1.bias):
            p[units] = 0.0


@pytest.mark.parametrize("penalty", ["group_lasso", "slimming"])
def test_removing_costs_less_after_it(penalty):
    """What the half of c1 that ranks lowest takes with it, without training in between."""
    rise = []
    for strength in (0.0, 0.01):
        learn = learner()
        learn.fit(20, cbs=RegularizeCallback(strength, penalty))
        before, model = learn.validate()[0], learn.model
        rows = model.c1.weight.flatten(1).norm(dim=1)
        scores = model.bn1.weight.abs() if penalty == "slimming" else rows
        without(model, scores.argsort()[:8])
        rise.append(learn.validate()[0] - before)
    assert rise[1] < 0.5 * rise[0]


def test_with_sparsity_and_a_criterion_that_reads_gradients():
    seen = []

    def watched(weight, gradient):
        seen.append(float(gradient.abs().max()))
        return grad_crit.func(weight, gradient)

    criterion = replace(grad_crit, func=watched)
    learn = learner(opt_func=SGD)
    sparsify = SparsifyCallback(0.5, "filter", criteria=criterion, schedule=agp.over(0.1, 0.5))
    learn.fit(3, 1e-4, cbs=[RegularizeCallback(1e3, schedule=AT_ONCE), sparsify])
    assert sparsify.report()["reached"].iloc[-1] == 0.5
    assert max(seen[4:]) < 100  # its gradients are those of the loss; the penalty's are larger
    names = list(learn.recorder.metric_names)
    assert names[-3:] == ["sparsity", "penalty", "time"]
    assert all(len(row) == len(names) - 2 for row in learn.recorder.values)


class Cut(Callback):
    """Removes channels in the middle of a fit."""

    order = 58

    def after_batch(self):
        if self.training and self.learn.train_iter == 11:
            Pruner(self.learn.model, self.learn.xb).prune_model(0.5)
            self.learn.create_opt()


@pytest.mark.parametrize("penalty", ["group_lasso", "slimming"])
def test_channels_may_go_in_the_middle_of_a_fit(penalty):
    learn, cb = learner(), RegularizeCallback(0.01, penalty)
    learn.fit(3, cbs=[cb, Cut()])
    assert learn.model.c1.out_channels == 8
    expected = scales(learn.model) if penalty == "slimming" else None
    if expected is not None:
        column = learn.recorder.values[-1][-1]
        assert column == pytest.approx(0.01 * expected.item(), rel=1e-4)


def test_frozen_layers_are_left_alone():
    learn = learner(opt_func=SGD)
    learn.model.stem.weight.requires_grad_(False)
    before = learn.model.stem.weight.clone()
    learn.fit(1, cbs=RegularizeCallback(0.1, granularity="kernel", schedule=AT_ONCE))
    assert torch.equal(learn.model.stem.weight, before) and learn.model.stem.weight.grad is None


def test_bad_arguments():
    for kwargs, message in (
        ({"strength": -1}, "strength must be a number >= 0"),
        ({"strength": float("nan")}, "strength must be"),
        ({"strength": True}, "strength must be"),
        ({"penalty": "lasso"}, "'group_lasso' or 'slimming', got 'lasso'"),
        ({"penalty": "slimming", "granularity": "kernel"}, "not granularity 'kernel'"),
        ({"granularity": "kernal"}, "did you mean 'kernel'"),
        ({"granularity": "2:4"}, "single weights are chosen"),
        ({"layers": "c9"}, "no layer 'c9'"),
    ):
        with pytest.raises(ValueError, match=message):
            learner().fit(1, cbs=RegularizeCallback(**{"strength": 0.1, **kwargs}))
    with pytest.raises(ValueError, match="scaled by a norm"):
        Slimming(make(Plain), example_inputs=images())
    model = make(Gated)
    torch.testing.assert_close(Slimming(model, example_inputs=images()).value(), scales(model))


def test_an_exception_leaves_nothing():
    class Bang(Callback):
        order = 99

        def after_step(self):
            raise KeyboardInterrupt

    learn = learner()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=[RegularizeCallback(0.1), Bang()])
    assert [cb for cb in learn.cbs if isinstance(cb, RegularizeCallback)] == []
    assert not any(m._forward_hooks or m._backward_hooks for m in learn.model.modules())
    learn.fit(1, cbs=RegularizeCallback(0.1))


@pytest.mark.parametrize("granularity", ["row", "filter"])
def test_sparse_gradients_of_embeddings(granularity):
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(10, 8, sparse=sparse)
        model, x = nn.Sequential(table, nn.Linear(8, 3)), torch.tensor([[1, 1, 4], [2, 3, 5]])
        penalty = GroupLasso(model, granularity, layers=["0"], example_inputs=x)
        model(x).square().sum().backward()
        penalty.add_gradient(1e-2)
        found.append(table.weight.grad)
    assert torch.equal(*found)
