"""Costs, against counting by hand."""

import io

import pytest
import torch
from networks import Depthwise, Plain, Reused, images, make
from torch import nn

from fasterai.core.schedule import SCHEDULES, agp, lin
from fasterai.measure.counts import macs
from fasterai.measure.layers import layer_costs
from fasterai.measure.pictures import plot_schedules, plot_training, plot_widths
from fasterai.measure.profile import compare, profile
from fasterai.prune.pruner import Pruner


def test_macs_are_those_of_the_formulas():
    model = make(Plain)
    counted = macs(model, images(2, 16))
    expected = {"a": 8 * 3 * 9 * 256, "b": 12 * 8 * 9 * 64, "fc1": 192 * 10, "fc2": 10 * 5}
    assert {k: counted[k] for k in expected} == expected
    assert counted[""] == sum(expected.values())
    assert macs(make(Depthwise), images(1, 16))["dw"] == 16 * 9 * 256
    assert macs(make(Reused), images(1, 16))["twice"] == 2 * 8 * 8 * 9 * 256


def test_a_transformer_layer_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    n, d, h = 5, 8, 16
    expected = n * (3 * d * d + d * d + 2 * d * h) + 2 * n * n * d
    assert macs(layer, torch.randn(1, n, d))[""] == expected


def test_shortcuts_are_as_they_were_after_counting():
    def shortcuts():
        units = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        return torch.backends.mha.get_fastpath_enabled(), [unit.fp32_precision for unit in units]

    before = shortcuts()
    macs(nn.Linear(3, 2), torch.randn(1, 3))
    assert shortcuts() == before


def test_recurrent_layers_are_counted():
    steps, i, h = 5, 8, 16
    lstm = nn.LSTM(i, h, batch_first=True).eval()
    assert macs(lstm, torch.randn(2, steps, i))[""] == steps * 4 * h * (i + h)


def test_what_looks_at_its_numbers_is_counted():
    class Busy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x)
            return self.fc(y) if y.abs().sum().item() > 0 else y

    assert macs(Busy().eval(), torch.randn(2, 4))[""] == 2 * 4 * 4


def test_profile_counts():
    model = make(Plain)
    with torch.no_grad():
        model.a.weight[0] = 0
    table = profile(model, images(4), seconds=0.05)
    row = table.loc["Plain"]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["nonzero"] == row["parameters"] - 27
    assert row["bytes"] == len(file.getvalue())
    assert (
        row["batch"] == 4 and row["device"] == "cpu" and row["threads"] == torch.get_num_threads()
    )
    assert 0 < row["latency_ms"] < 1000 and row["iqr_ms"] >= 0


def test_compare_times_every_network_at_every_batch():
    small = make(Plain)
    Pruner(small, images()).prune_model(0.5)
    table = compare(
        {"dense": make(Plain), "small": small}, images(2), batch_sizes=(1, 8), seconds=0.05
    )
    assert table.index.tolist() == ["dense", "small"] * 2
    assert table["batch"].tolist() == [1, 1, 8, 8]
    dense, pruned = table["macs"].iloc[:2]
    assert pruned < dense / 2


def test_measuring_leaves_no_trace():
    model = make(Plain).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    profile(model, images(), seconds=0.02)
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layer_costs():
    table = layer_costs(make(Plain), macs(make(Plain), images())).set_index("layer")
    assert table.loc["b", ["in", "out", "parameters"]].tolist() == [8, 12, 12 * 8 * 9 + 12]
    assert table.loc["total", "parameters"] == table["parameters"].iloc[:-1].sum()


def test_bad_input():
    with pytest.raises(TypeError, match="by name"):
        compare(make(Plain), images())
    with pytest.raises(TypeError, match="example_inputs must be"):
        profile(make(Plain), None)


def test_pictures_show_the_numbers():
    model = make(Plain)
    pruner = Pruner(model, images())
    pruner.prune_model(0.5)
    ax = plot_widths(pruner.report())
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == [8, 12, 10, 5, 4, 6, 5, 5]
    lines = plot_training([1, 2], [0.5, 0.75], [(0.5, 0.1), (1.5, 0.5)]).get_lines()
    assert list(lines[1].get_ydata()) == [0.5, 0.75] and lines[0].get_ydata()[-1] == 0.5


def test_all_schedules_in_one_figure():
    axes = plot_schedules()
    shown = [ax for ax in axes.flat if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == [s.name for s in SCHEDULES]
    for ax, schedule in zip(shown, SCHEDULES, strict=True):
        drawn = dict(zip(*ax.get_lines()[0].get_data(), strict=True))
        assert all(drawn[t / 1000] == share for t, share in schedule.updates(1000))
    chain = agp.over(0.1, 0.3, to=0.5).then(lin.over(0.6, 0.8, every="epoch"))
    (row,) = plot_schedules([chain, lin], total=100)
    assert [ax.get_title() for ax in row] == ["agp, lin", "lin"]
