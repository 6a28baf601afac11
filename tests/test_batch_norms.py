"""Batch norms computed anew, against means and variances of what arrives at them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import Plain, Residual, Reused, make
from torch import nn

from fasterai.audit.batch_norms import bn_drift, recalibrate_bn
from fasterai.prune.pruner import Pruner


def batches(n=4, size=8, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 16, 16, generator=gen) * 2 + 1 for _ in range(n)]


def arrived(model, x):
    """What arrives at each norm where all norms normalise by the batch."""
    seen, handles = {}, []
    model = copy.deepcopy(model).eval()
    for name, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.train()
            handles.append(
                m.register_forward_pre_hook(
                    lambda m, a, name=name: seen.setdefault(name, []).append(a[0].double())
                )
            )
    with torch.no_grad():
        model(x)
    return seen


@pytest.mark.parametrize("kind", [Residual, Reused])
def test_statistics_are_averages_over_batches(kind):
    model, data = make(kind), batches()
    seen = [arrived(model, x) for x in data]
    assert recalibrate_bn(model, data) is model
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            maps = [y.transpose(0, 1).flatten(1) for s in seen for y in s[name]]
            mean, var = (
                torch.stack(v).mean(0)
                for v in ([y.mean(1) for y in maps], [y.var(1) for y in maps])
            )
            torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-6)
            assert int(norm.num_batches_tracked) == len(maps) == 4
    assert bn_drift(model, data)["shift"].max() < 1e-5


def test_a_norm_that_runs_twice_averages_over_both_runs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.never = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x) + self.norm(3 * x)

    model, x = Twice().eval(), torch.randn(50, 2) + 1
    recalibrate_bn(model, [x])
    torch.testing.assert_close(model.norm.running_mean, 2 * x.mean(0))
    torch.testing.assert_close(model.norm.running_var, 5 * x.var(0))
    assert torch.equal(model.never.running_mean, torch.zeros(2))
    table = bn_drift(model, [x]).set_index("layer")
    assert table.loc["never"].isna()["shift"] and not table.loc["never", "recalibrate"]


class Sampled(nn.Module):
    """Draws numbers, and is without dropout outside of training."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(3, momentum=0.3).eval()

    def forward(self, x):
        y = self.drop(self.norm(x + torch.randn(1)))
        assert self.drop.training or bool((y == 0).float().mean() < 0.1)
        return self.frozen(y)


def everything(model):
    return {
        "modes": [m.training for m in model.modules()],
        "momenta": [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
        "parameters": [p.detach().clone() for p in model.parameters()],
        "ids": [id(x) for x in (*model.parameters(), *model.buffers())],
    }


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_all_else_stays_as_it_was():
    model = Sampled()
    model.norm.weight.grad = torch.ones(3)
    model.norm.train(), model.frozen.eval()
    before = everything(model)
    recalibrate_bn(model, torch.utils.data.DataLoader(torch.cat(batches()), 8, shuffle=True))
    assert_same(everything(model), before)
    assert (model.norm.running_mean > 0.5).all()
    state = copy.deepcopy(model.state_dict())
    bn_drift(model, batches())
    assert_same(everything(model), before)
    assert_same(dict(model.state_dict()), dict(state))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["loader", "forward", "writing"])
def test_after_an_interrupt_the_statistics_are_the_old_ones(where, error, monkeypatch):
    model = make(Residual).train()
    state, before = copy.deepcopy(model.state_dict()), everything(model)
    data = batches()

    def broken():
        yield from data[:2]
        raise error("stop")

    class List(list):
        def __iter__(self):
            return broken()

    if where == "forward":
        calls = []

        def fails(x, **kwargs):
            calls.append(x)
            if len(calls) == 7:
                raise error("stop")
            return F.relu(x)

        monkeypatch.setattr("networks.F.relu", fails, raising=True)
    if where == "writing":
        from fasterai.audit import batch_norms

        write = batch_norms._write

        def half(pairs):
            pairs = list(pairs)
            write(pairs[: len(pairs) // 2])
            monkeypatch.setattr(batch_norms, "_write", write)
            raise error("stop")

        monkeypatch.setattr(batch_norms, "_write", half)
    with pytest.raises(error, match="stop"):
        recalibrate_bn(model, List(data) if where == "loader" else data)
    assert_same(dict(model.state_dict()), dict(state))
    assert_same(everything(model), before)


def test_it_takes_as_many_batches_as_are_asked_for():
    data = batches(5)
    first, some = make(Residual), make(Residual)
    recalibrate_bn(first, data[:2])
    recalibrate_bn(some, data, n_batches=2)
    assert_same(dict(first.state_dict()), dict(some.state_dict()))
    assert int(some.bn1.num_batches_tracked) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model, data = make(Residual), batches()
    expected = recalibrate_bn(copy.deepcopy(model), data).bn0
    recalibrate_bn(model.to(dtype), data)
    assert model.bn0.running_mean.dtype == dtype
    rtol = 0.05 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        model.bn0.running_var.float(), expected.running_var, rtol=rtol, atol=0.02
    )


def test_networks_without_batch_norms_are_refused():
    for model in (make(Plain), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))):
        for call in (recalibrate_bn, bn_drift):
            with pytest.raises(ValueError, match="no batch norms with running statistics"):
                call(model, batches())
    with pytest.raises(TypeError, match=r"dls\.train"):
        recalibrate_bn(make(Residual))
    with pytest.raises(ValueError, match="no batch"):
        recalibrate_bn(make(Residual), [])
    with pytest.raises(ValueError, match="n_batches"):
        recalibrate_bn(make(Residual), batches(), n_batches=0)


def test_statistics_that_are_not_finite_are_refused():
    model, data = make(Residual), batches()
    data[2][0, 0, 0, 0] = float("nan")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'bn0' is not finite"):
        recalibrate_bn(model, data)
    assert_same(dict(model.state_dict()), dict(state))


def test_a_learner_brings_its_training_set():
    class Learner:
        model = make(Residual)

        class dls:
            train, valid = batches(3), batches(3, seed=1)

    expected = recalibrate_bn(copy.deepcopy(Learner.model), Learner.dls.train)
    recalibrate_bn(Learner)
    assert_same(dict(Learner.model.state_dict()), dict(expected.state_dict()))


def task():
    """Images of four classes, and a network that was trained on them."""
    torch.manual_seed(0)
    shapes = torch.randn(4, 3, 16, 16)
    y = torch.arange(512) % 4
    x = shapes[y] + 1.5 * torch.randn(512, 3, 16, 16)
    model = make(Residual)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model.train()
    for step in range(48):
        some = slice(64 * (step % 6), 64 * (step % 6) + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    return model.eval(), x, y


def loss(model, x, y):
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(x), y))


def test_a_network_pruned_by_rank_gets_better():
    model, x, y = task()
    data, held = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 384, 64)], (x[384:], y[384:])
    recalibrate_bn(model, data)
    assert not bn_drift(model, data)["recalibrate"].any()
    dense = loss(model, *held)
    Pruner(model, x[:2]).prune_model(0.5)
    drifted = bn_drift(model, data)
    assert drifted["recalibrate"].any()
    pruned = loss(model, *held)
    recalibrate_bn(model, data)
    assert not bn_drift(model, data)["recalibrate"].any()
    assert dense < loss(model, *held) < pruned - 0.05
