"""The particle filter against all masks there are; what it leaves behind."""

import copy
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_unchanged, state
from networks import ALL, Parted, Residual, make
from scoring import Stop, batches, loss_func, mean_of
from torch import nn

from fasterai.core.criteria import large_final
from fasterai.core.masks import Limits
from fasterai.core.target import Target
from fasterai.prune.pruner import Pruner
from fasterai.prune.search import _drawn, _Swarm, particle_search
from fasterai.score.oracle import oracle
from fasterai.sparse.sparsifier import Sparsifier


def search(model, sparsity=0.5, data=None, **kwargs):
    data = batches() if data is None else data
    kwargs = {"loss_func": loss_func, "progress": False, "n_batches": None, **kwargs}
    return particle_search(Pruner(model, data[0][0]), data, sparsity, **kwargs)


def perceptron(*widths, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*[m for x in layers for m in (x, nn.ReLU())][:-1]).double()


def points(inputs, outputs, n=32):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, inputs, dtype=torch.float64, generator=generator)
    return [(x, torch.randn(n, outputs, dtype=torch.float64, generator=generator))]


def sliced(model, *keep):
    """The perceptron with these units of each hidden layer, its matrices sliced by hand."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    inside = [range(layers[0].in_features), *keep, range(layers[-1].out_features)]
    small = perceptron(*map(len, inside))
    with torch.no_grad():
        own = [m for m in small if isinstance(m, nn.Linear)]
        for a, b, i, o in zip(layers, own, inside, inside[1:], strict=False):
            b.weight.copy_(a.weight[list(o)][:, list(i)])
            b.bias.copy_(a.bias[list(o)])
    return small


@pytest.mark.parametrize("widths", [(4, 8, 3), (4, 5, 6, 3)])
def test_it_finds_the_best_of_all_masks(widths):
    model, data = perceptron(*widths), points(4, 3)
    stay = [combinations(range(n), n - round(n / 2)) for n in widths[1:-1]]
    every = {keep: mean_of(sliced(model, *keep), data, F.mse_loss) for keep in product(*stay)}
    keep, lowest = min(every.items(), key=lambda item: item[1])
    found = search(model, 0.5, data, loss_func=F.mse_loss, particles=16, rounds=16)
    assert found.loss == pytest.approx(lowest, rel=1e-12) and len(every) >= 70
    plan = Pruner(model, data[0][0]).plan_for(0.5, criteria=found)
    assert [plan.kept[f"{2 * i}.bias"][0] for i in range(len(keep))] == list(keep)
    best, mean = found.rounds()["best"], found.rounds()["mean"]
    assert best.is_monotonic_decreasing and mean.iloc[-5:].mean() < mean.iloc[0]


def test_it_sees_units_that_only_together_do_nothing():
    model = perceptron(2, 4, 1)
    with torch.no_grad():  # the first two cancel, loudly; the others are all that counts
        model[0].weight.copy_(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))
        model[0].bias.copy_(torch.tensor([3.0, 3, 3, 2]))
        model[2].weight.copy_(torch.tensor([[9.0, -9, 1, 0.5]]))
    x = torch.rand(16, 2, dtype=torch.float64)
    data = [(x, model(x).detach())]
    alone = oracle(model, data, loss_func=F.mse_loss, progress=False)
    assert min(alone.changes.items(), key=lambda i: i[1])[0] == (0, 3)  # the oracle takes another
    found = search(model, 0.5, data, loss_func=F.mse_loss, particles=8)
    assert found.loss == pytest.approx(0, abs=1e-24)
    Pruner(model, x).prune_model(0.5, criteria=found)
    assert model[0].bias.tolist() == [3, 2] and model[2].weight.tolist() == [[1, 0.5]]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("context", ["local", "global"])
def test_the_loss_is_that_of_the_network_cut_by_what_is_returned(kind, context):
    model = make(kind, torch.float64)
    found = search(model, 0.4, context=context, particles=3, rounds=2)
    pruner = Pruner(model, batches()[0][0])
    n = sum(a.bundles for a in pruner.coupled()[1])
    cuts = pruner.plan_for(0.4, context=context, criteria=large_final)
    pruner.prune_model(0.4, context=context, criteria=found)
    assert mean_of(model, batches()) == pytest.approx(found.loss, rel=1e-9)
    assert pruner.plan.removed >= round(0.4 * n) > 0 or context == "local"
    if context == "local":
        assert pruner.plan.axes == cuts.axes


def test_it_zeroes_with_the_sparsifier_as_well():
    model, data = perceptron(4, 8, 3), points(4, 3)
    found = search(model, 0.5, data, loss_func=F.mse_loss, particles=4, rounds=2)
    kept = Pruner(model, data[0][0]).plan_for(0.5, criteria=found).kept["0.bias"][0]
    Sparsifier(model, "filter", criteria=found, example_inputs=data[0][0]).sparsify_model(0.5)
    assert tuple(model[0].weight.abs().sum(1).nonzero().flatten().tolist()) == kept


def test_a_seed_decides_and_no_other_number_is_drawn():
    model = make(Residual, torch.float64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    few = {"particles": 4, "rounds": 2}
    first, again, other = (search(model, seed=s, **few) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert first.history == again.history != other.history
    weight = model.c1.weight
    assert torch.equal(first(weight, "c1.weight"), again(weight, "c1.weight"))


@pytest.mark.parametrize("context", ["local", "global"])
def test_it_is_no_worse_than_where_it_starts(context):
    model = make(Residual, torch.float64)
    alone = oracle(model, batches(), loss_func=loss_func, progress=False)
    for start in (large_final, alone):
        cut = copy.deepcopy(model)
        Pruner(cut, batches()[0][0]).prune_model(0.5, context=context, criteria=start)
        found = search(model, start=start, context=context, particles=4, rounds=3)
        first = search(model, start=start, context=context, particles=2, rounds=1, noise=1e-9)
        assert first.loss == pytest.approx(mean_of(cut, batches()), rel=1e-9)
        assert found.loss <= first.loss
        far = search(model, start=start, context=context, particles=2, rounds=1, noise=1.0)
        assert far.loss <= first.loss


def test_the_same_mask_is_measured_once():
    model, data, calls = perceptron(3, 2, 1), points(3, 1), []

    def func(out, y):
        calls.append(1)
        return F.mse_loss(out, y)

    search(model, 0.5, data, loss_func=func, particles=16, rounds=5)
    assert len(calls) == 2  # there are two masks


def test_particles_with_a_low_loss_go_on_more_often():
    losses = torch.tensor([1.0, 2, 3, torch.inf], dtype=torch.float64).repeat_interleave(250)
    went = _drawn(losses, torch.Generator().manual_seed(0)) // 250
    spread = losses[losses.isfinite()].std(correction=0)
    weights = torch.exp(-torch.tensor([1.0, 2, 3]) / spread)
    expected = weights / weights.sum() * 1000
    counts = went.bincount(minlength=4)
    assert counts[3] == 0 and (counts[:3] - expected).abs().max() <= 2
    alike = _drawn(torch.ones(5, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert alike.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError("mine")])
@pytest.mark.parametrize("kind", [Residual, Parted])
def test_the_model_is_as_before_also_after_an_interrupt(kind, error):
    model = make(kind, torch.float64).train()
    before = state(model)
    if error is None:
        search(model, particles=3, rounds=2)
    for n in (0, 4) if error is not None else ():
        with pytest.raises(type(error)):
            search(model, particles=3, rounds=2, loss_func=Stop(n, error))
        assert_unchanged(before, state(model))
    assert_unchanged(before, state(model))


def test_limits_hold_and_excluded_layers_stay():
    model, x = make(Residual, torch.float64), batches()[0][0]
    pruner = Pruner(model, x, exclude=["stem"])
    swarm = _Swarm(pruner, 0.5, "local", Limits(1, 6))
    removal = swarm.removal(torch.arange(16.0))
    assert {a: int(units.sum()) for a, units in removal.items()} == {1: 4}  # 12 = 2 * 6 stay
    options = {"loss_func": loss_func, "progress": False, "particles": 3, "rounds": 1}
    found = particle_search(pruner, batches(), 0.5, round_to=6, **options)
    pruner.prune_model(0.5, criteria=found, round_to=6)
    assert model.c1.out_channels == 12 and model.stem.out_channels == 8


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"particles": 1}, "particles must be a whole number >= 2, got 1"),
        ({"rounds": 0}, "rounds must be a whole number >= 1, got 0"),
        ({"noise": 0}, r"noise must be in \(0, 1\], got 0"),
        ({"sparsity": 40}, "for 40% pass 0.4"),
        ({"context": "both"}, "'local' or 'global'"),
        ({"data": []}, "no batch"),
        ({"loss_func": lambda out, y: out.mean() * torch.nan}, "finite loss"),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs, match):
    model = make(Residual, torch.float64)
    data = kwargs.pop("data", batches())
    sparsity = kwargs.pop("sparsity", 0.5)
    options = {"loss_func": loss_func, "progress": False, "particles": 2, "rounds": 1, **kwargs}
    with pytest.raises(ValueError, match=match):
        particle_search(Pruner(model, batches()[0][0]), data, sparsity, **options)
    with pytest.raises(TypeError, match="remove as many units; pass that share"):
        search(make(Residual, torch.float64), sparsity=Target(macs=0.5))
    nothing = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="nothing to prune"):
        search(nothing, data=[(torch.ones(2, 3), torch.ones(2, 4))])
