"""Han et al. 2015: thresholds from the spread of the weights, and dropout that follows."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learners import learner
from networks import ALL, Plain, images, make
from torch import nn

from fasterai.core.schedule import one_shot
from fasterai.prune.pruner import Pruner
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.dropout import connections, rescale_dropout
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.threshold import threshold_sparsity


def below(weight, quality):
    """By numpy: which weights that are not zero are below the threshold, or zero already."""
    w = weight.detach().double().numpy()
    return (np.abs(w) < quality * np.std(w)) | (w == 0)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("quality", [0.0, 0.3, 1.0, 1.5])
def test_just_what_is_below_the_threshold_goes(kind, quality):
    model, x = make(kind), images()
    for _ in range(2):  # the second time from what the first one left
        shares = threshold_sparsity(model, quality, example_inputs=x)
        dense = copy.deepcopy(model)
        sparsifier = Sparsifier(model, example_inputs=x, min_keep=0)
        sparsifier.sparsify_model(shares)
        assert sum(shares.values()) > 0 or quality == 0.0
        for name, share in shares.items():
            gone = below(dense.get_submodule(name).weight, quality)
            assert share == gone.mean()
            assert np.array_equal(model.get_submodule(name).weight.detach().numpy() == 0, gone)
        table = sparsifier.report().set_index("layer")["reached"]
        assert all(table[name] == pytest.approx(share) for name, share in shares.items())


def test_a_layer_whose_answer_is_obvious():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, -1.0, 1.0, -3.0]])  # deviation: the root of 5
    model = nn.Sequential(layer)
    assert threshold_sparsity(model, 1.0, layers="0") == {"0": 0.5}
    assert threshold_sparsity(model, 1 / math.sqrt(5), layers="0") == {"0": 0.0}  # not below
    assert threshold_sparsity(model, 2.0, layers="0") == {"0": 1.0}
    layer.weight.data.zero_()
    assert threshold_sparsity(model, 1.0, layers="0") == {"0": 0.0}  # fresh


def test_a_quality_for_each_layer():
    model = make(Plain)
    shares = threshold_sparsity(model, {"a": 0.5, "fc1": 1.5}, example_inputs=images())
    assert shares == {
        k: below(model.get_submodule(k).weight, q).mean() for k, q in {"a": 0.5, "fc1": 1.5}.items()
    }
    assert "fc2" not in threshold_sparsity(model, example_inputs=images())  # the output layer
    assert "a" not in threshold_sparsity(model, exclude="a", example_inputs=images())


def test_in_a_fit():
    learn = learner()
    shares = threshold_sparsity(learn.model, 0.8, example_inputs=torch.randn(2, 3, 8, 8))
    cb = SparsifyCallback(shares, schedule=one_shot.over(0, 0))
    learn.fit(1, 1e-4, cbs=cb)
    table = cb.report().set_index("layer")
    assert set(shares) == {"stem", "c1", "c2", "c3"}
    assert all(table.loc[k, "reached"] == pytest.approx(s) for k, s in shares.items())


def test_bad_qualities():
    for bad in (-1.0, float("nan"), float("inf"), "much", True, None):
        with pytest.raises(ValueError, match="quality must be a number >= 0"):
            threshold_sparsity(make(Plain), bad)
    with pytest.raises(ValueError, match="quality of 'a' must be"):
        threshold_sparsity(make(Plain), {"a": -1})
    with pytest.raises(ValueError, match="no layer 'fc3'; did you mean 'fc"):
        threshold_sparsity(make(Plain), {"fc3": 1.0})


# --- dropout -----------------------------------------------------------------------------------


class Dropped(nn.Module):
    """Registered in another order than it runs."""

    def __init__(self):
        super().__init__()
        self.last, self.drop2 = nn.Linear(6, 3), nn.Dropout(0.4)
        self.early, self.drop1 = nn.Dropout(0.1), nn.Dropout2d(0.5)
        self.conv, self.fc, self.never = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.Dropout(0.9)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.drop1(F.relu(self.norm(self.conv(self.early(x))))).mean((2, 3))
        return self.last(self.drop2(F.relu(self.fc(x))))


def rates(model):
    return {
        k: m.p for k, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)
    }


def test_rates_follow_the_connections_and_come_back():
    model, x = make(Dropped), images()
    before = rates(model)
    Sparsifier(model, layers=["conv", "fc"]).sparsify_model({"conv": 0.75, "fc": 0.5})
    for error in (None, KeyboardInterrupt):
        try:
            with rescale_dropout(model, x) as changed:
                expected = {
                    "early": 0.1 * math.sqrt(54 / 216),
                    "drop1": 0.5 * math.sqrt(54 / 216),
                    "drop2": 0.4 * math.sqrt(24 / 48),
                    "never": 0.9,
                }
                assert rates(model) == pytest.approx(expected)
                assert changed.rates["drop2"][:2] == ("fc", 0.4)
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert rates(model) == before
    changed = rescale_dropout(model, x)
    assert rates(model) != before
    changed.undo()
    assert rates(model) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_behind_attention_it_is_its_last_layer_that_counts():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.4)
    with torch.no_grad():
        block.self_attn.out_proj.weight[:4] = 0
        block.linear1.weight[:4] = 0
    with rescale_dropout(block, torch.randn(2, 5, 8)) as changed:
        assert changed.rates["dropout1"][0] == "self_attn.out_proj"
        assert block.dropout1.p == pytest.approx(0.4 * 0.5**0.5)
        assert block.dropout.p == pytest.approx(0.4 * 0.75**0.5)
        assert block.dropout2.p == 0.4


def test_after_channels_were_removed_the_dense_counts_are_needed():
    model, x = make(Dropped), images()
    dense = connections(model)
    assert dense == {"last": 18, "conv": 216, "fc": 48}
    Pruner(model, x).prune_model(0.5)
    with rescale_dropout(model, x):
        assert rates(model)["drop1"] == 0.5
    with rescale_dropout(model, x, before=dense):
        assert rates(model)["drop1"] == pytest.approx(0.5 * math.sqrt(0.5))
        assert rates(model)["drop2"] == pytest.approx(0.4 * math.sqrt(0.25))


def test_dropout_that_cannot_be_rescaled():
    model, x = make(Dropped), images()
    before = rates(model)
    for kwargs, message in (
        ({"before": {"conv": 100, "fc": 48}}, "more than the 100 before"),
        ({"before": {"conv": 216}}, "no layer 'fc'"),
        ({"example_inputs": torch.randn(2, 5, 8, 8)}, "could not be run"),
    ):
        with pytest.raises(ValueError, match=message):
            rescale_dropout(model, **{"example_inputs": x, **kwargs})
        assert rates(model) == before and not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="no dropout module"):
        rescale_dropout(make(Plain), x)
