"""Pictures of weights say what is in them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from networks import Residual, make
from torch import nn

from fasterai.measure.weight_pictures import plot_filters, plot_weights, plot_zeros
from fasterai.sparse.sparsifier import Sparsifier


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def half(granularity):
    model = make(Residual)
    x = torch.zeros(1, 3, 8, 8)
    Sparsifier(model, granularity, example_inputs=x).sparsify_model(0.5)
    return model


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_zeros_by_layer(granularity):
    model = half(granularity)
    ax = plot_zeros(torch.compile(model))
    weights, filters = ax.containers
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, bar, whole in zip(layers, weights, filters, strict=True):
        assert bar.get_height() == pytest.approx((layer.weight == 0).float().mean().item())
        rows = [bool((row == 0).all()) for row in layer.weight]
        assert whole.get_height() == pytest.approx(sum(rows) / len(rows))
    names = [t.get_text() for t in ax.get_xticklabels()]
    assert names == ["stem", "c1", "c2", "c3", "head"]
    zeros = sum(int((m.weight == 0).sum()) for m in layers) / sum(m.weight.numel() for m in layers)
    assert ax.get_title().startswith(f"{zeros:.1%} ")


def test_weights_with_the_threshold():
    model = half("weight")
    ax = plot_weights(model, "c1")
    w = model.c1.weight.detach().flatten()
    smallest = w[w != 0].abs().min().item()
    assert sorted(line.get_xdata()[0] for line in ax.lines[:2]) == pytest.approx(
        [-smallest, smallest]
    )
    assert sum(bar.get_height() for bar in ax.containers[0]) == (w != 0).sum()
    left = [m.weight.detach().flatten() for m in (model.stem, model.c1, model.c2, model.c3)]
    left = torch.cat(left)  # the output layer has no zeros, and none to separate
    ax = plot_weights(model)
    assert max(ax.lines[:2], key=lambda line: line.get_xdata()[0]).get_xdata()[0] == pytest.approx(
        left[left != 0].abs().min().item()
    )
    assert ax.get_title().startswith("Weights of 4 layers: 50")
    dense = make(Residual)
    everything = torch.cat([p.detach().flatten() for p in dense.parameters() if p.ndim > 1])
    at = plot_weights(dense, sparsity=0.3).lines[1].get_xdata()[0]
    assert (everything.abs() < at).sum() == round(0.3 * len(everything))
    assert len(plot_weights(dense).lines) == 0  # nothing is zero: no threshold
    with pytest.raises(ValueError, match="did you mean 'c1'"):
        plot_weights(model, "c1x")
    with pytest.raises(ValueError, match=r"'bn1' \(BatchNorm2d\) has no weight of two"):
        plot_weights(model, "bn1")
    with pytest.raises(ValueError, match="pass 0.4"):
        plot_weights(model, sparsity=40)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3),
        nn.Conv2d(20, 30, (1, 3)),
        nn.Conv1d(2, 4, 5),
        nn.Conv3d(2, 3, 2),
        nn.Linear(7, 9),
        nn.Conv2d(8, 8, 3, groups=8),
    ],
    ids=str,
)
def test_filters_with_what_is_zeroed(layer):
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[2, 0] = 0
    ax = plot_filters(nn.Sequential(layer), "0")
    grey, coloured = (np.ma.filled(image.get_array().astype(float), np.nan) for image in ax.images)
    shown = layer.weight.detach()[:16, :16].numpy()
    assert np.isnan(grey).sum() + (grey == 1).sum() == grey.size
    assert (grey == 1).sum() == (shown == 0).sum()
    values = coloured[~np.isnan(coloured)]
    assert sorted(values) == pytest.approx(sorted(shown[shown != 0]))
    gone = sum(bool((filter == 0).all()) for filter in layer.weight)
    assert f"{gone} of {len(layer.weight)} filters" in ax.get_title()


def test_a_layer_of_zeros_and_a_model_without_weights():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    assert "2 of 2 filters\n100%" in plot_filters(nn.Sequential(layer), "0").get_title()
    assert "100.0% are zero" in plot_weights(layer).get_title()
    assert plot_zeros(layer).containers[0][0].get_height() == 1
    with pytest.raises(ValueError, match="no weights of two or more"):
        plot_zeros(nn.BatchNorm2d(3))
