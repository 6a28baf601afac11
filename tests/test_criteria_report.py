"""Rank correlations against their formula; what the report shows and refuses."""

import copy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from networks import Gated, Plain, Residual, make
from scoring import batches, loss_func, measure
from torch import nn

from fasterai.core.criteria import (
    Criterion,
    fpgm,
    grad_crit,
    large_final,
    movement,
    norm_scale,
    snip,
    squared_final,
)
from fasterai.measure.pictures import plot_correlations
from fasterai.prune.pruner import Pruner
from fasterai.score.criteria import apoz, taylor_maps
from fasterai.score.report import criteria_report
from fasterai.score.score import score


def report(model, criteria, **kwargs):
    kwargs = {"loss_func": loss_func, "progress": False, **kwargs}
    return criteria_report(model, batches(), criteria, **kwargs)


def spearman(a, b):
    """Pearson's correlation of ranks; equal numbers share the mean of theirs."""
    ranks = []
    for x in (np.asarray(a), np.asarray(b)):
        ranks.append([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])
    return np.corrcoef(ranks)[0, 1]


@pytest.mark.parametrize("absolute", [False, True])
def test_it_is_the_correlation_of_ranks_by_layer_and_over_all(absolute):
    model = make(Plain, torch.float64)
    found = measure(model)
    table = report(model, [large_final, squared_final], measured=found, absolute=absolute)
    layers = {"a": model.a, "b": model.b, "fc1": model.fc1}
    means = {k: m.weight.detach().flatten(1).abs().mean(1).numpy() for k, m in layers.items()}
    true = found.table()
    true = {k: true[true["layer"] == k]["change"].to_numpy() for k in layers}
    true = {k: np.abs(v) for k, v in true.items()} if absolute else true
    own = {k: spearman(means[k], true[k]) for k in layers}
    assert table["large_final"][list(layers)].to_dict() == pytest.approx(own)
    assert table["large_final"]["mean of layers"] == pytest.approx(np.mean(list(own.values())))
    rated = np.concatenate([means[k] / means[k].mean() for k in layers])  # as 'global' does
    both = spearman(rated, np.concatenate(list(true.values())))
    assert table["large_final"]["all layers"] == pytest.approx(both)
    assert list(table.index) == ["a", "b", "fc1", "mean of layers", "all layers"]
    assert list(table) == ["large_final", "squared_final"]


def test_the_oracle_agrees_with_itself_and_its_opposite_contradicts():
    model = make(Residual, torch.float64)
    found = measure(model)
    minus = Criterion(lambda w, m: -m, "minus", needs="measured", norm="none", data=found.data)
    table = report(model, [found, minus], measured=found)
    assert np.allclose(table["oracle"], 1) and np.allclose(table["minus"], -1)


def test_normalising_changes_the_correlation_over_all_layers_alone():
    model = make(Plain, torch.float64)
    found = measure(model)
    table = report(model, [taylor_maps, taylor_maps.normalised("none")], measured=found)
    l2, none = table["taylor_maps"], table["taylor_maps, norm none"]
    assert l2[:-1].equals(none[:-1]) and l2["all layers"] != none["all layers"]
    scored = score(model, batches(), taylor_maps, loss_func=loss_func, progress=False)
    given = report(model, {"scored before": scored}, measured=found)
    assert given["scored before"].equals(l2.rename("scored before"))


def test_what_is_not_known_is_measured_and_gathered_and_nothing_stays():
    model = make(Gated, torch.float64).train()
    before = copy.deepcopy(model.state_dict())
    table = report(model, {"a": taylor_maps, "b": apoz, "c": snip, "d": grad_crit, "e": fpgm})
    assert table.notna().all().all() and list(table) == list("abcde")
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_layer_without_scores_has_none_and_counts_nowhere():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3))
    model = nn.Sequential(*model, nn.ReLU(), nn.Conv2d(5, 4, 3)).double().eval()
    nn.init.uniform_(model[1].weight)
    table = report(model, [norm_scale, large_final])
    assert table["norm_scale"].isna().tolist() == [False, True, False, False]
    assert len(set(table["norm_scale"].dropna())) == 1  # the mean, and all, are those of one layer
    ones = report(model, {"ones": Criterion(torch.ones_like)})
    assert ones["ones"].isna().all()
    model[1] = nn.Identity()
    with pytest.raises(ValueError, match="needs a norm behind each layer"):
        report(model, [norm_scale])


def test_what_cannot_be_compared_is_refused():
    model = make(Residual, torch.float64)
    found = measure(model, units=["c1"])
    part = report(model, [large_final], measured=found)
    assert list(part.index) == ["c1", "mean of layers", "all layers"]
    with pytest.raises(ValueError, match="two criteria are called 'large_final'"):
        report(model, [large_final, large_final], measured=found)
    with pytest.raises(ValueError, match="no criteria"):
        report(model, [], measured=found)
    with pytest.raises(TypeError, match="a list of criteria or a dict"):
        report(model, "large_final", measured=found)
    with pytest.raises(TypeError, match="what oracle"):
        report(model, [large_final], measured=large_final)
    with pytest.raises(ValueError, match="initial weights"):
        report(model, [movement], measured=found)
    Pruner(model, batches()[0][0]).prune_model(0.5)
    with pytest.raises(ValueError, match="before it was cut"):
        report(model, [large_final], measured=found)


def test_the_picture_shows_every_number_on_one_scale():
    model = make(Residual, torch.float64)
    table = report(model, [large_final, norm_scale], measured=measure(model))
    table.iloc[0, 1], table.iloc[1, 1] = np.nan, -0.001
    ax = plot_correlations(table)
    said = [t.get_text() for t in ax.texts]
    assert said[2] == "0.00"  # without a sign
    assert list(map(float, said)) == table.to_numpy().round(2)[table.notna()].tolist()
    assert ax.images[0].get_clim() == (-1, 1) and "change of the loss" in ax.get_title()
    assert [t.get_text() for t in ax.get_yticklabels()] == list(table.index)
    given = plt.subplots()[1]
    assert plot_correlations(table, given) is given
    plt.close("all")
