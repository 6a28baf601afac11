"""Weights that come back: which, in what order, and that they learn again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, make
from torch import nn

from fasterai.sparse.sparsifier import Sparsifier


def two_layers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    for p in model.parameters():
        values = torch.randint(1, 9, p.shape, generator=generator)  # few values: ties
        p.data = values / 8 * torch.where(torch.rand(p.shape, generator=generator) < 0.5, -1, 1)
    return model


def masked(sparsifier, context):
    """The positions at zero, over all layers or in each."""
    flat = [m.flatten() == 0 for m in sparsifier.masks.values()]
    return [torch.cat(flat)] if context == "global" else flat


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    context=st.sampled_from(["local", "global"]),
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=8),
)
def test_groups_come_back_by_the_score_with_which_they_went(seed, context, shares):
    model = two_layers(seed)
    sparsifier = Sparsifier(model, context=context, min_keep=0, regrow=True)
    weights = [model[0].weight, model[2].weight]

    def values():
        flat = [w.detach().abs().flatten() for w in weights]
        return [torch.cat(flat)] if context == "global" else flat

    generator = torch.Generator().manual_seed(seed)
    records = [[-1.0] * v.numel() for v in values()]
    zero = [set() for _ in records]
    now = 0.0
    for share in shares:
        scores = values()
        if share >= now:
            sparsifier.sparsify_model(share)
        else:
            sparsifier.regrow_model(share)
        for record, gone, score in zip(records, zero, scores, strict=True):
            n = round(share * len(record))
            alive = sorted(set(range(len(record))) - gone, key=lambda i: (float(score[i]), i))
            for i in alive[: max(0, n - len(gone))]:
                record[i] = float(score[i])
                gone.add(i)
            stay = sorted(gone, key=lambda i: (record[i], i))[:n] if share < now else gone
            gone &= set(stay)
        found = [set(m.nonzero().flatten().tolist()) for m in masked(sparsifier, context)]
        assert found == zero
        now = share
        with torch.no_grad():  # train: what is not masked takes other values
            for w in weights:
                w.copy_(torch.randint(1, 9, w.shape, generator=generator) / 8)
        sparsifier.apply()


@pytest.mark.parametrize("granularity", ["weight", "row", "column", "kernel", "o h"])
@pytest.mark.parametrize("context", ["local", "global"])
def test_without_training_the_way_down_retraces_the_way_up(granularity, context):
    model, x = make(Residual), torch.randn(2, 3, 8, 8)
    up = Sparsifier(model, granularity, context, example_inputs=x, regrow=True)
    seen = {}
    for share in (0.2, 0.4, 0.6, 0.8):
        up.sparsify_model(share)
        seen[share] = {k: m.clone() for k, m in up.masks.items()}
    for share in (0.6, 0.4, 0.2):
        up.regrow_model(share)
        assert all(torch.equal(m, seen[share][k]) for k, m in up.masks.items())
    up.regrow_model(0.0)
    assert all(bool(m.all()) for m in up.masks.values()) and up.reached() == 0.0


def test_what_was_zero_from_the_start_comes_back_last():
    model = two_layers()
    with torch.no_grad():
        model[0].weight[2] = 0.0
    sparsifier = Sparsifier(model, regrow=True)
    sparsifier.sparsify_model(0.7)
    sparsifier.regrow_model(6 / 30)
    assert (sparsifier.masks["0.weight"][2] == 0).all()
    assert int((sparsifier.masks["0.weight"] == 0).sum()) == 6


def test_what_comes_back_is_zero_at_first_and_learns():
    torch.manual_seed(0)
    model = make(Residual)
    for norm in (model.bn0, model.bn1):
        norm.bias.data.fill_(0.5)  # no ReLU is off on all images, also behind zero kernels only
    x, y = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    sparsifier = Sparsifier(model, "kernel", example_inputs=x, regrow=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        sparsifier.apply()

    sparsifier.sparsify_model(0.5)
    step()
    gone = {k: m == 0 for k, m in sparsifier.masks.items()}
    assert all(not p[gone[k]].any() for k, p in model.named_parameters() if k in gone)
    sparsifier.regrow_model(0.25)
    back = {k: gone[k] & (m == 1) for k, m in sparsifier.masks.items()}
    parameters = dict(model.named_parameters())
    assert all(b.any() and not parameters[k][b].any() for k, b in back.items())
    step()
    assert all(parameters[k][b].all() for k, b in back.items())
    still = {k: m == 0 for k, m in sparsifier.masks.items()}
    assert all(not parameters[k][m].any() for k, m in still.items())


def test_what_came_back_is_not_zeroed_again_before_it_has_moved():
    sparsifier = Sparsifier(two_layers(), regrow=True)
    sparsifier.sparsify_model(0.5)
    sparsifier.regrow_model(0.2)
    sparsifier.sparsify_model(0.2)  # all that came back is still zero
    assert int((sparsifier.masks["0.weight"] == 0).sum()) == 6


def test_nothing_is_zeroed_on_the_way_down():
    sparsifier = Sparsifier(two_layers(), regrow=True)
    sparsifier.sparsify_model({"0": 0.2})
    sparsifier.regrow_model(0.6)
    assert [int((m == 0).sum()) for m in sparsifier.masks.values()] == [6, 0]


@given(share=st.floats(0, 1), context=st.sampled_from(["local", "global"]))
@settings(max_examples=30, deadline=None)
def test_limits_hold_on_the_way_down(share, context):
    limits = {"min_keep": 4, "round_to": 4}
    sparsifier = Sparsifier(two_layers(), context=context, regrow=True, **limits)
    sparsifier.sparsify_model(0.9)
    before = [int((m == 0).sum()) for m in sparsifier.masks.values()]
    sparsifier.regrow_model(share)
    for mask, old in zip(sparsifier.masks.values(), before, strict=True):
        zeros = int((mask == 0).sum())
        assert zeros <= old and mask.numel() - zeros >= 4
        assert (mask.numel() - zeros) % 4 == 0 or not zeros


@pytest.mark.parametrize("name", ["filter", "o"])
def test_filters_cannot_come_back_and_it_is_said(name):
    model = make(Residual)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="filters cannot come back.*ReLU.*'kernel'"):
        Sparsifier(model, name, example_inputs=torch.randn(2, 3, 8, 8), regrow=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_filter_with_its_norm_gets_no_gradient_behind_a_relu():
    """Why it is refused."""
    model, x = make(Residual).train(), torch.randn(4, 3, 8, 8)
    sparsifier = Sparsifier(model, "filter", example_inputs=x)
    sparsifier.sparsify_model(0.5)
    model(x).square().sum().backward()
    gone = sparsifier.masks["c1.weight"].flatten(1)[:, 0] == 0
    for p in (model.c1.weight, model.bn1.weight, model.bn1.bias):
        assert not p.grad[gone].any() and p.grad[~gone].any()


def test_regrowing_without_a_record_is_refused():
    sparsifier = Sparsifier(two_layers())
    sparsifier.sparsify_model(0.5)
    with pytest.raises(RuntimeError, match=r"regrow=True"):
        sparsifier.regrow_model(0.2)


def test_patterns_are_refused():
    with pytest.raises(ValueError, match="only fills up"):
        Sparsifier(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), "2:4", regrow=True)
