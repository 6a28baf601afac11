"""Criteria that need more than the weight, and normalised scores, against numpy."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import Fail, learner
from networks import Plain, Residual, images, make
from scoring import lowest
from torch import nn

from fasterai.core import criteria as C
from fasterai.core.criteria import (
    Criterion,
    NothingToCompare,
    grad_crit,
    large_final,
    movement,
    squared_final,
)
from fasterai.core.normalise import normalise
from fasterai.core.schedule import lin, one_shot
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier

FORMULAS = {  # of the weight and what it is compared with
    "large_init": lambda w, r: np.abs(r),
    "small_init": lambda w, r: -np.abs(r),
    "large_init_large_final": lambda w, r: np.where(np.abs(w) < np.abs(r), np.abs(w), np.abs(r)),
    "small_init_small_final": lambda w, r: -np.where(np.abs(w) > np.abs(r), np.abs(w), np.abs(r)),
    "magnitude_increase": lambda w, r: np.abs(w) - np.abs(r),
    "movement": lambda w, r: np.sqrt((w - r) ** 2),
    "movmag": lambda w, r: np.abs(w * w - w * r),
    "updating_magnitude_increase": lambda w, r: np.abs(w) - np.abs(r),
    "updating_movement": lambda w, r: np.sqrt((w - r) ** 2),
    "updating_movmag": lambda w, r: np.abs(w * w - w * r),
    "grad_crit": lambda w, r: w**2 * r**2,
    "snip": lambda w, r: np.abs(w * r),
    "norm_scale": lambda w, r: np.abs(r),
}
INITIAL = [n for n in FORMULAS if getattr(C, n).needs == ("initial",)]
PREVIOUS = [n for n in FORMULAS if getattr(C, n).needs == ("previous",)]


def double(t):
    return t.detach().double().numpy()


def move(model, seed):
    """Training that a test can follow: every parameter takes a random step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


# --- the formulas -----------------------------------------------------------------------------


def test_every_criterion_with_needs_is_tested_and_every_one_exported():
    values = {n for n, v in vars(C).items() if isinstance(v, Criterion)}
    assert values <= set(C.__all__) and all(getattr(C, n).name == n for n in values)
    assert set(FORMULAS) == {n for n in values if getattr(C, n).needs}
    assert {n for n in FORMULAS if n.startswith("updating")} == set(PREVIOUS)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_formulas(name, dtype):
    torch.manual_seed(0)
    w, r = torch.randn(5, 4, 3).to(dtype), torch.randn(5, 4, 3).to(dtype)
    before = w.clone(), r.clone()
    scores = getattr(C, name).reading(lambda need, of: r)(w)
    assert scores.dtype == (dtype if dtype == torch.float64 else torch.float32)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(
        double(scores), FORMULAS[name](double(w), double(r)), rtol=exact, atol=exact
    )
    assert torch.equal(w, before[0]) and torch.equal(r, before[1])


def test_small_half_precision_weights_do_not_vanish():
    w = torch.tensor([1e-5, 2e-5, 3e-5], dtype=torch.float16)
    for scores in (squared_final(w), grad_crit.reading(lambda *_: w)(w)):
        assert (scores[1:] > scores[:-1]).all() and scores[0] > 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_criterion_keeps_its_shape_and_order(data):
    name = data.draw(st.sampled_from(list(FORMULAS)))
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    w, r = (torch.randint(-3, 4, shape, generator=generator).double() for _ in "wr")
    scores = getattr(C, name).reading(lambda *_: r)(w)
    assert scores.shape == w.shape
    np.testing.assert_array_equal(scores.numpy(), FORMULAS[name](w.numpy(), r.numpy()))


def test_criteria_are_values():
    mine = Criterion(torch.sub, "mine", needs="initial")
    assert mine == Criterion(torch.sub, "mine", needs=["initial"]) and mine.needs == ("initial",)
    assert movement.normalised("l2").norm == "l2" and movement.norm is None
    assert hash(movement) == hash(movement.reading(lambda *_: torch.zeros(1)))
    assert pickle.loads(pickle.dumps(movement.normalised("lamp"))) == movement.normalised("lamp")
    with pytest.raises(AttributeError):
        movement.norm = "l2"
    with pytest.raises(ValueError, match="needs must be among initial, previous, gradient"):
        Criterion(torch.sub, needs="weights")
    with pytest.raises(ValueError, match="needs must be among .*, got 5"):
        Criterion(torch.abs, needs=5)
    with pytest.raises(ValueError, match="normalised by mean, l2, lamp, none, got 'max'"):
        large_final.normalised("max")


# --- in a Sparsifier ---------------------------------------------------------------------------


def pair(**kwargs):
    """Two layers that no graph couples, and a Sparsifier of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)).double()
    kwargs.setdefault("layers", nn.Conv2d)
    return model, Sparsifier(model, min_keep=0, **kwargs)


GROUPED = {"weight": (), "row": (3,), "kernel": (2, 3), "o h": (1, 3), "shared_kernel": (0, 2, 3)}


@pytest.mark.parametrize("name", [*INITIAL, *PREVIOUS])
@pytest.mark.parametrize("granularity", GROUPED)
@pytest.mark.parametrize("context", ["local", "global"])
def test_what_goes_is_what_the_formula_ranks_lowest(name, granularity, context):
    model, sparsifier = pair(granularity=granularity, context=context, criteria=getattr(C, name))
    start = [double(m.weight).copy() for m in model]
    move(model, 1)
    if name in PREVIOUS:
        sparsifier.sparsify_model(0.0)  # an update, of nothing
        start = [double(m.weight).copy() for m in model]
    move(model, 2)
    weights = [double(m.weight).copy() for m in model]
    scores = [FORMULAS[name](w, s) for w, s in zip(weights, start, strict=True)]
    dims = GROUPED[granularity]
    scores = [s.mean(dims, keepdims=True) if dims else s for s in scores]
    pools = [scores] if context == "global" else [[s] for s in scores]
    gone = [g for pool in pools for g in lowest(pool, round(0.4 * sum(s.size for s in pool)))]
    sparsifier.sparsify_model(0.4)
    for m, w, g in zip(model, weights, gone, strict=True):
        np.testing.assert_array_equal(double(m.weight), np.where(g, 0.0, w))


@pytest.mark.parametrize("name", PREVIOUS)
def test_updating_criteria_compare_with_the_last_update(name):
    model, sparsifier = pair(criteria=getattr(C, name), context="global")
    last = [double(m.weight).copy() for m in model]
    zero = [np.zeros_like(w, dtype=bool) for w in last]
    for step in range(1, 5):
        move(model, step)
        sparsifier.apply()
        weights = [double(m.weight).copy() for m in model]
        scores = [FORMULAS[name](w, s) for w, s in zip(weights, last, strict=True)]
        scores = [np.where(z, -np.inf, s) for z, s in zip(zero, scores, strict=True)]
        zero = lowest(scores, round(0.2 * step * sum(s.size for s in scores)))
        sparsifier.sparsify_model(0.2 * step)
        last = [double(m.weight).copy() for m in model]
        for w, z in zip(last, zero, strict=True):
            np.testing.assert_array_equal(w == 0, z)


def test_coupled_filters_are_ranked_by_the_mean_over_all_their_rows():
    model = make(Residual)
    sparsifier = Sparsifier(model, "filter", criteria=movement, example_inputs=images())
    parts = [model.stem.weight, model.c2.weight, model.c3.weight]
    start = [double(p).copy() for p in parts]
    move(model, 3)
    moved = [np.abs(double(p) - s) for p, s in zip(parts, start, strict=True)]
    size = sum(m[0].size for m in moved)
    scores = sum(m.sum((1, 2, 3)) for m in moved) / size
    sparsifier.sparsify_model(0.5)
    for p in parts:
        gone = (p.flatten(1) == 0).all(1).numpy()
        np.testing.assert_array_equal(gone, lowest([scores], 4)[0])


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter"])
def test_gradients_of_the_step(granularity):
    model = make(Plain).double()
    x = images().double()
    sparsifier = Sparsifier(model, granularity, criteria=grad_crit, example_inputs=x)
    model(x).square().sum().backward()
    for layer in (model.a, model.b):
        scores = double(layer.weight) ** 2 * double(layer.weight.grad) ** 2
        scores = {"weight": scores, "kernel": scores.mean((2, 3)), "filter": scores.mean((1, 2, 3))}
        layer.expected = lowest([scores[granularity]], scores[granularity].size // 2)[0]
    sparsifier.sparsify_model(0.5)
    for layer in (model.a, model.b):
        zero = (layer.weight == 0).numpy()
        zero = {"weight": zero, "kernel": zero.all((2, 3)), "filter": zero.all((1, 2, 3))}
        np.testing.assert_array_equal(zero[granularity], layer.expected)


def test_a_criterion_of_ones_own_gets_what_it_needs_in_that_order():
    seen = {}

    def mine(weight, gradient, initial, previous):
        seen.update(gradient=gradient, initial=initial, previous=previous.clone())
        return (weight - initial).abs() + gradient.abs()

    needs = ("gradient", "initial", "previous")
    model, sparsifier = pair(criteria=Criterion(mine, needs=needs), layers="0")
    weight = model[0].weight
    first = weight.detach().clone()
    move(model, 1)
    weight.grad = torch.ones_like(weight)
    sparsifier.sparsify_model(0.1)
    second = weight.detach().clone()
    move(model, 2)
    sparsifier.sparsify_model(0.2)
    assert torch.equal(seen["gradient"], weight.grad)
    assert torch.equal(seen["initial"], first) and torch.equal(seen["previous"], second)


def test_records_are_counted_kept_off_the_model_and_released():
    model, sparsifier = pair(criteria=movement)
    size = sum(p.nbytes for p in (model[0].weight, model[1].weight))
    assert sparsifier.record_bytes == size
    assert pair(criteria=Criterion(torch.add, needs=("initial", "previous")))[1].record_bytes == (
        2 * size
    )
    for criteria in (large_final, grad_crit):
        assert pair(criteria=criteria)[1].record_bytes == 0
    keys = list(model.state_dict())
    move(model, 1)
    sparsifier.sparsify_model(0.5)
    assert list(model.state_dict()) == keys and not list(model.buffers())
    sparsifier.release()
    assert sparsifier.record_bytes == 0 and sparsifier.reached() == 0.5
    with pytest.raises(RuntimeError, match="initial weights were released: make a new Sparsifier"):
        sparsifier.scores()


@pytest.mark.parametrize("name", ["movement", "updating_movmag", "grad_crit"])
def test_without_training_there_is_nothing_to_compare(name):
    model, sparsifier = pair(criteria=getattr(C, name))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NothingToCompare, match=r"every group the score 0: it needs training"):
        sparsifier.sparsify_model(0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sparsifier.reached() == 0


def test_nan_is_refused_with_the_name_of_the_parameter():
    model, sparsifier = pair(criteria=movement)
    move(model, 1)
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = torch.nan
    before = [double(m.weight).copy() for m in model]
    with pytest.raises(ValueError, match=r"movement' gave nan for 1\.weight: .* initial weights"):
        sparsifier.sparsify_model(0.5)
    for m, b in zip(model, before, strict=True):
        np.testing.assert_array_equal(double(m.weight), b)


# --- normalised scores -------------------------------------------------------------------------


def lamp(scores):
    """Eq. 3 of the paper, weight by weight."""
    squares = scores.ravel() ** 2
    return np.array([s / squares[squares >= s].sum() if s else 0.0 for s in squares])


NORMALISED = {
    "mean": lambda s: s / np.abs(s).mean(),
    "l2": lambda s: s / np.sqrt((s**2).sum()),
    "lamp": lamp,
}


@settings(max_examples=100, deadline=None)
@given(
    norm=st.sampled_from(list(NORMALISED)),
    scores=st.lists(
        st.one_of(st.integers(0, 3).map(float), st.floats(1e-6, 1e6)), min_size=1, max_size=40
    ),
)
def test_normalised_scores_are_their_formulas_and_keep_the_order(norm, scores):
    values = np.array(scores)
    found = normalise(torch.tensor(scores, dtype=torch.float64), norm, "layer").numpy()
    expected = NORMALISED[norm](values) if values.any() else values
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    assert (found[values == values.max()].max() == found.max()) and np.isfinite(found).all()


def test_tiny_scores_are_normalised_too():
    scores = torch.tensor([1.0, 2.0, 4.0]) * 1e-30  # their squares are 0 in float32
    for norm, formula in NORMALISED.items():
        np.testing.assert_allclose(
            double(normalise(scores, norm, "a")), formula(double(scores)), rtol=1e-6
        )


def test_what_cannot_be_normalised_is_refused():
    with pytest.raises(ValueError, match="'lamp' squares scores.*those of 0 are"):
        pair(criteria=C.small_final.normalised("lamp"), context="global")[1].sparsify_model(0.5)
    with pytest.raises(ValueError, match="scores of 0 cannot be normalised by 'l2'"):
        infinite = Criterion(lambda w: w.abs() / 0.0).normalised("l2")
        pair(criteria=infinite, context="global")[1].sparsify_model(0.5)


@pytest.mark.parametrize("norm", NORMALISED)
@pytest.mark.parametrize("granularity", ["weight", "kernel"])
@pytest.mark.parametrize("criteria", [large_final, movement])
def test_a_global_ranking_of_normalised_scores(norm, granularity, criteria):
    model, sparsifier = pair(
        criteria=criteria.normalised(norm), context="global", granularity=granularity
    )
    start = [double(m.weight).copy() for m in model]
    move(model, 1)
    with torch.no_grad():
        model[1].weight.mul_(100)
    weights = [double(m.weight).copy() for m in model]
    scores = weights if criteria is large_final else map(np.subtract, weights, start)
    scores = [np.abs(s) for s in scores]
    if granularity == "kernel":
        scores = [s.mean((2, 3)) for s in scores]
    raw = lowest(scores, round(0.5 * sum(s.size for s in scores)))
    normal = [NORMALISED[norm](s).reshape(s.shape) for s in scores]
    gone = lowest(normal, round(0.5 * sum(s.size for s in scores)))
    assert any((g != r).any() for g, r in zip(gone, raw, strict=True))
    sparsifier.sparsify_model(0.5)
    for m, g in zip(model, gone, strict=True):
        zero = (m.weight == 0).numpy()
        np.testing.assert_array_equal(zero.all((2, 3)) if granularity == "kernel" else zero, g)


@pytest.mark.parametrize("norm", NORMALISED)
def test_units_are_normalised_over_their_axis(norm):
    model = make(Plain)
    layers = [model.a, model.b, model.fc1]
    with torch.no_grad():
        model.b.weight.mul_(30)
    means = [np.abs(double(m.weight)).reshape(len(m.weight), -1).mean(1) for m in layers]
    gone = lowest([NORMALISED[norm](m) for m in means], 15)
    pruned = copy.deepcopy(model)
    Sparsifier(
        model, "filter", "global", large_final.normalised(norm), example_inputs=images()
    ).sparsify_model(0.5)
    for layer, g in zip(layers, gone, strict=True):
        np.testing.assert_array_equal((layer.weight.flatten(1) == 0).all(1).numpy(), g)
    Pruner(pruned, images()).prune_model(
        0.5, context="global", criteria=large_final.normalised(norm)
    )
    widths = [len(m.weight) for m in (pruned.a, pruned.b, pruned.fc1)]
    assert widths == [int((~g).sum()) for g in gone]


@pytest.mark.parametrize("norm", NORMALISED)
def test_a_local_ranking_does_not_change(norm):
    masks = []
    for criteria in (large_final, large_final.normalised(norm)):
        model, sparsifier = pair(criteria=criteria)
        sparsifier.sparsify_model(0.5)
        masks.append(sparsifier.masks)
    assert all(torch.equal(m, masks[1][k]) for k, m in masks[0].items())


# --- in a fit ----------------------------------------------------------------------------------


class Weights(Callback):
    """Copies of a layer's weight, and of its gradient as the optimizer gets it."""

    order = 98

    def __init__(self):
        self.seen, self.before, self.gradients = [], [], []

    def before_fit(self):
        self.weight = self.learn.model.c1.weight
        self.first = self.weight.detach().clone()

    def before_step(self):
        self.gradients.append(self.weight.grad.clone())
        self.before.append(self.weight.detach().clone())

    def after_batch(self):
        if self.training:
            self.seen.append(self.weight.detach().clone())


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter"])
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("name", [n for n in FORMULAS if n != "norm_scale"])  # of filters alone
def test_a_fit_reaches_its_target_and_frees_what_it_recorded(name, granularity, context):
    learn = learner()
    keys = list(learn.model.state_dict())
    cb = SparsifyCallback(0.5, granularity, context, getattr(C, name))
    learn.fit(2, cbs=cb)
    table = cb.report().set_index("layer")
    assert table.loc["total", "zeros"] == round(0.5 * table.loc["total", "groups"])
    assert list(learn.model.state_dict()) == keys
    assert cb._sparsifier.record_bytes == 0


def test_a_second_fit_compares_with_its_own_start():
    learn = learner()
    schedule = one_shot.over(start=7, end=7)
    for share in (0.25, 0.5):
        before, after = Weights(), Weights()
        before.order = 10  # ahead of the update
        held = (learn.model.c1.weight == 0).numpy()
        cb = SparsifyCallback(share, criteria=movement, schedule=schedule)
        learn.fit(1, cbs=[before, cb, after])
        moved = np.abs(double(before.seen[6]) - double(before.first))
        gone = lowest([np.where(held, -1, moved)], round(share * moved.size))[0]
        np.testing.assert_array_equal((after.seen[6] == 0).numpy(), gone)
    assert held.any()


def test_movement_in_a_fit_is_the_way_from_its_start():
    def dense_then(cbs):
        learn = learner()
        learn.fit(1, cbs=cbs)
        return learn

    plain, sparse = Weights(), Weights()
    dense_then([plain])
    schedule = one_shot.over(start=5, end=5)
    dense_then([SparsifyCallback(0.5, criteria=movement, schedule=schedule), sparse])
    moved = np.abs(double(plain.seen[4]) - double(plain.first))
    gone = lowest([moved], moved.size // 2)[0]
    np.testing.assert_array_equal((sparse.seen[4] == 0).numpy(), gone)
    assert all(torch.equal(a, b) for a, b in zip(plain.seen[:4], sparse.seen[:4], strict=True))


def taylor_of(watch, at):
    scores = double(watch.before[at]) ** 2 * double(watch.gradients[at]) ** 2
    return lowest([scores], scores.size // 2)[0]


@pytest.mark.parametrize("accumulated", [1, 3])
def test_gradients_are_those_of_the_optimizer_step(accumulated):
    """Of three batches, where three are accumulated: the update waits for the step."""
    runs = []
    for cb in (None, SparsifyCallback(0.5, criteria=grad_crit, schedule=one_shot.over(4, 4))):
        learn, watch = learner(), Weights()
        extra = [GradientAccumulation(8 * accumulated)] if accumulated > 1 else []
        learn.fit(1, cbs=[watch, *extra, *([cb] if cb else [])])
        runs.append(watch)
    step = 3 if accumulated == 1 else 1  # the fourth batch, or the second step
    gone = taylor_of(runs[0], step)
    at = 4 if accumulated == 1 else 6
    assert cb.history == [(at, 0.5)]
    np.testing.assert_array_equal((runs[1].seen[at - 1] == 0).numpy(), gone)
    assert (runs[1].seen[at - 2] != 0).all()


class LossScale(Callback):
    """The loss times 1024 and the gradients divided by it again, as mixed precision does."""

    order = 10

    def before_backward(self):
        self.learn.loss_grad = self.loss_grad * 1024

    def before_step(self):
        for p in self.learn.model.parameters():
            p.grad.div_(1024)


def test_gradients_are_unscaled():
    mine = Criterion(lambda w, g: w.abs() + 100 * g.abs(), "mine", needs="gradient")
    states = []
    for extra in ([], [LossScale()]):
        learn = learner()
        learn.fit(1, cbs=[SparsifyCallback(0.5, criteria=mine), *extra])
        states.append(learn.model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_accumulated_gradients_that_never_step_serve_the_last_update():
    learn = learner()
    cb = SparsifyCallback(0.5, criteria=grad_crit, schedule=one_shot.over(1.0, 1.0))
    learn.fit(1, cbs=[cb, GradientAccumulation(8 * 5)])  # one step in eight batches
    assert cb.history[-1][0] == 8 and cb.report().set_index("layer").loc["total", "reached"] == 0.5


@pytest.mark.parametrize("criteria", [grad_crit, C.updating_movement], ids=lambda c: c.name)
def test_an_update_waits_while_steps_are_skipped(criteria):
    """As mixed precision skips steps whose gradients overflow."""
    learn = learner()
    skip = Fail(CancelStepException(), "before_step", lambda s: s.iter < 3)
    cb = SparsifyCallback((0.2, 0.5), criteria=criteria, schedule=lin.over(0, 8, every=1))
    learn.fit(1, cbs=[cb, skip])
    assert cb.history[0][0] == 4 and cb.history[-1] == (8, pytest.approx(0.5, abs=1e-3))
    cb = SparsifyCallback(0.5, criteria=criteria, schedule=one_shot.over(2, 2))
    learner().fit(1, cbs=[cb, skip])
    assert [at for at, _ in cb.history] == [4]


def test_a_fit_that_never_steps_says_that_the_target_was_not_reached():
    learn = learner()
    skip = Fail(CancelStepException(), "before_step", lambda s: True)
    cb = SparsifyCallback(0.5, criteria=movement)
    with pytest.warns(UserWarning, match="target was not reached: the criterion gives every group"):
        learn.fit(1, cbs=[cb, skip])
    assert cb._sparsifier.reached() == 0


@pytest.mark.parametrize("criteria", [grad_crit, C.updating_movmag], ids=lambda c: c.name)
def test_a_pattern_that_is_full_waits_for_nothing(criteria):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    cb = SparsifyCallback(0.5, "2:4", criteria=criteria)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(model).fit(1, cbs=cb)
    kept = (model[0].weight != 0).sum(1)  # 3 inputs are a run of 4 with a zero
    assert (kept == 2).all() and cb.report()["limit"].iloc[0] == "pattern"


def test_an_initial_sparsity_waits_for_the_first_step():
    learn = learner()
    cb = SparsifyCallback((0.25, 0.5), criteria=movement, schedule=lin.over(0.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.fit(1, cbs=cb)
    assert cb.history[0][0] == 1 and cb.history[-1][0] == 8


@pytest.mark.parametrize("name", ["movement", "updating_movmag", "grad_crit"])
def test_no_sparsity_trains_bit_for_bit_like_no_callback(name):
    states = []
    for cbs in ([], [SparsifyCallback(0.0, criteria=getattr(C, name))]):
        learn = learner()
        torch.manual_seed(1)
        learn.fit(2, cbs=cbs)
        states.append(learn.model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize("name", ["large_init_large_final", "updating_movement", "grad_crit"])
def test_the_same_fit_gives_the_same_weights(name):
    states = []
    for _ in range(2):
        learn = learner()
        learn.fit(2, cbs=SparsifyCallback(0.5, "filter", "global", getattr(C, name)))
        states.append(learn.model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize(
    "criteria, context, message",
    [
        (Criterion(lambda w, g: g.sum(), needs="gradient"), "local", "one score per weight"),
        (Criterion(lambda w: w, needs="initial"), "local", "failed on .*weight: TypeError"),
        (C.magnitude_increase.normalised("lamp"), "global", "'lamp' squares scores"),
    ],
)
def test_criteria_that_fail_do_so_before_training(criteria, context, message):
    learn = learner()
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=message):
        learn.fit(1, cbs=SparsifyCallback(0.5, "weight", context, criteria))
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


# --- in the Pruner -----------------------------------------------------------------------------


def test_the_pruner_refuses_criteria_of_earlier_weights_and_says_what_to_do():
    model = make(Plain)
    pruner = Pruner(model, images())
    for criteria in (movement, C.updating_movement):
        name = criteria.name
        with pytest.raises(
            ValueError, match=rf"'{name}' needs the .* GradualPruner\(model, x, criteria={name}\)"
        ):
            pruner.prune_model(0.5, criteria=criteria)
        trained = make(Plain)
        gradual = GradualPruner(trained, images(), criteria=criteria)  # as it says
        move(trained, 1)
        assert gradual.prune_to(0.5).a.out_channels == 4
    with pytest.raises(ValueError, match=r"needs gradients, and .* call loss\.backward\(\) first"):
        pruner.prune_model(0.5, criteria=grad_crit)
    assert model.a.out_channels == 8


def test_the_pruner_ranks_by_the_gradients_that_are_there():
    model = make(Plain)
    model(images()).square().sum().backward()
    scores = (double(model.a.weight) ** 2 * double(model.a.weight.grad) ** 2).mean((1, 2, 3))
    kept = model.a.weight.detach()[torch.from_numpy(~lowest([scores], 4)[0])]
    pruner = Pruner(model, images())
    pruner.plan_for(0.5, criteria=grad_crit)
    pruner.prune_model(0.5, criteria=grad_crit)
    assert torch.equal(model.a.weight, kept)


def test_going_down_renews_what_was_before():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    sparsifier = Sparsifier(model, criteria=C.updating_movement, regrow=True)
    move(model, 1)
    sparsifier.sparsify_model(0.5)
    move(model, 2)
    sparsifier.regrow_model(0.25)
    with pytest.raises(NothingToCompare):
        sparsifier.sparsify_model(0.5)  # nothing was trained since
