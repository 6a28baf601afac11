"""Layers that skip zeros: the same numbers; which ones, is up to the clock of the machine."""

import copy

import pandas as pd
import pytest
import torch
from networks import apart
from torch import nn

from fasterai.deploy import sparse_layers
from fasterai.deploy.sparse_layers import SparseConv, SparseLinear, sparse_linear


def emptied(layer, share=0.9):
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < share] = 0
    return layer


@pytest.fixture
def clock(monkeypatch):
    """Lets a test say which kinds are fast."""
    times = {"dense": 2.0, "rows": 1.0, "columns": 0.5, "samples": 0.5, "compact": 1.95}

    def told(networks, x, **_):
        for network in networks.values():
            network(x)
        return pd.DataFrame({"latency_ms": {name: times[name] for name in networks}})

    monkeypatch.setattr(sparse_layers, "compare", told)
    return times


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (5, 12), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_linear_layers(by, shape, bias, dtype):
    torch.manual_seed(0)
    layer = emptied(nn.Linear(12, 7, bias=bias)).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        out = SparseLinear(layer, by)(x)
        assert out.shape == layer(x).shape
        assert torch.allclose(out, layer(x), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind, shape", [(nn.Conv1d, (9,)), (nn.Conv2d, (4, 5)), (nn.Conv3d, (2, 3, 4))]
)
def test_convs(kind, shape, bias):
    layer = emptied(kind(6, 8, 1, bias=bias))
    for n in (0, 1, 3):
        x = torch.randn(n, 6, *shape)
        with torch.no_grad():
            assert torch.allclose(SparseConv(layer)(x), layer(x), atol=1e-5)
            if len(shape) == 2:
                last = x.to(memory_format=torch.channels_last)
                assert torch.allclose(SparseConv(layer)(last), layer(x), atol=1e-5)
    with torch.no_grad():
        alone = torch.randn(6, *shape[:-1], 6)  # no batch
        assert torch.allclose(SparseConv(layer)(alone), layer(alone), atol=1e-5)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        emptied(nn.Conv2d(3, 16, 1)),
        nn.ReLU(),
        emptied(nn.Conv2d(16, 16, 3, padding=1)),
        emptied(nn.Conv2d(16, 8, 1, stride=2)),
        emptied(nn.Conv2d(8, 8, 1, groups=2)),
        nn.Flatten(),
        emptied(nn.Linear(32, 16), 0.3),
        emptied(nn.Linear(16, 16)),
        emptied(nn.Linear(16, 4), 0.6),
    ).eval()


def test_faster_layers_are_converted_and_others_are_not(clock):
    model, x = network(), torch.randn(4, 3, 4, 4)
    before = copy.deepcopy(model.state_dict())
    small, table = sparse_linear(model, x)
    assert [type(m).__name__ for m in small][::6] == ["SparseConv", "Linear"]
    assert type(small[7]) is type(small[8]) is SparseLinear and small[7].by == "columns"
    assert type(small[2]) is type(small[3]) is type(small[4]) is nn.Conv2d
    with torch.no_grad():
        assert apart(model(x), small(x)) < 1e-6
    table = table.set_index("layer")
    assert table.index.tolist() == ["0", "2", "3", "6", "7", "8"]
    few = "fewer than 50% of its weights are zero"
    scattered = "too few whole rows or columns are zero"
    assert table["reason"].tolist() == ["", scattered, "only 1 times as fast", few, "", ""]
    share = float((model[7].weight == 0).float().mean())
    assert table["zeros"]["7"] == pytest.approx(share)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in [*model, *small])
    clock["columns"] = 1.5
    small, table = sparse_linear(model, x)
    assert small[7].by == "rows" and table["kind"][4] == "rows"
    clock.update(rows=1.9, columns=3.0)
    small, table = sparse_linear(model, x)
    assert type(small[7]) is nn.Linear and table["reason"][4] == "only 1.1 times as fast"
    small, _ = sparse_linear(model, x, gain=1.01)
    assert type(small[7]) is SparseLinear


def test_channels_of_zeros_are_not_computed(clock):
    """Also those of a layer of which less than half is zero, and of a conv with larger kernels."""
    clock.update(samples=1.9, rows=1.9, columns=1.9, compact=1.0)
    model, x = network(), torch.randn(4, 3, 4, 4)
    with torch.no_grad():
        for layer in (model[2], model[6]):
            layer.weight.fill_(1)[:4] = 0
    small, table = sparse_linear(model, x)
    assert table.set_index("layer")["kind"][["2", "6"]].tolist() == ["compact"] * 2
    assert len(small[2].layer.weight) == len(small[6].layer.weight) == 12
    with torch.no_grad():
        assert apart(model(x), small(x)) < 1e-6


def test_layers_whose_weight_torch_reads_in_a_shortcut_stay(clock):
    clock.update(rows=1.9, columns=1.9, compact=1.0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with torch.no_grad():
        model.linear1.weight[:16], model.linear2.weight[:, :16] = 0, 0
    x = torch.randn(2, 5, 16)
    small, table = sparse_linear(model, x)
    with torch.inference_mode():  # torch takes it there
        assert apart(model(x), small.eval()(x)) < 1e-6
    assert table["reason"].str.contains("the network breaks").all()


def test_copies_go_to_files_and_back(clock, tmp_path):
    small, _ = sparse_linear(network(), torch.randn(4, 3, 4, 4))
    torch.save(small.state_dict(), tmp_path / "a")
    again = copy.deepcopy(small)
    again[7].values.zero_()
    again.load_state_dict(torch.load(tmp_path / "a", weights_only=True))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(small(x), again(x)) and not small(x).requires_grad
    assert f"zeros={float((small[7].weight.to_dense() == 0).float().mean()):.0%}" in repr(small[7])


def test_places_out_of_bounds_are_refused(clock):
    small, _ = sparse_linear(network(), torch.randn(4, 3, 4, 4))
    bad = small.state_dict() | {"7.columns": small[7].columns + 1000}
    small.load_state_dict(bad)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="col_indices"):
            small(torch.randn(2, 3, 4, 4))


def test_a_network_that_is_a_single_layer(clock):
    small, table = sparse_linear(emptied(nn.Linear(16, 4)), torch.randn(3, 16))
    assert type(small) is SparseLinear and table["layer"].tolist() == [""]


class Reading(nn.Module):
    """Code that reads a weight itself, and a layer that runs on two shapes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.never = (emptied(nn.Linear(16, 16)) for _ in range(3))

    def forward(self, x):
        y = self.b(self.b(x)[:1])
        return self.a(y) / self.a.in_features


def test_what_breaks_without_its_weight_stays(clock):
    model = Reading().eval()
    small, table = sparse_linear(model, torch.randn(4, 16))
    assert type(small.b) is SparseLinear and type(small.a) is nn.Linear
    assert table["dense_ms"].tolist()[:2] == [2.0, 4.0]
    assert "the network breaks" in table["reason"][0]
    assert table["reason"][2] == "it did not run on the example inputs"


class Gated(nn.Module):
    """Its second layer reads what passes a gate, as a rule nothing; a list runs the third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (emptied(nn.Linear(64, 64)) for _ in range(3))
        self.own = [self.c]

    def forward(self, x):
        x = self.own[0](self.a(x))
        return x.sum() + self.b(x[x[:, 0] > 1e9]).sum()


def test_layers_that_nothing_arrives_at_or_that_are_run_from_elsewhere_stay(clock):
    small, table = sparse_linear(Gated().eval(), torch.randn(4, 64))
    assert table["reason"].tolist()[:2] == ["", "only empty tensors arrived at it"]
    assert "keeps the layer itself elsewhere" in table["reason"][2]
    assert [type(m) is SparseLinear for m in (small.a, small.b, small.c)] == [True, False, False]


def test_layers_with_hooks_stay(clock):
    model = nn.Sequential(emptied(nn.Linear(64, 64)), emptied(nn.Linear(64, 64)))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    small, table = sparse_linear(model, torch.randn(2, 64))
    assert table["reason"].tolist() == ["hooks are registered on it", ""]
    calls.clear()
    small(torch.randn(2, 64))
    assert calls == [1]


def test_measuring_draws_no_random_numbers(clock):
    model, x = nn.Sequential(emptied(nn.Linear(64, 64))), torch.randn(2, 64)
    state = torch.random.get_rng_state()
    sparse_linear(model, x)
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_torch_cannot_run_is_not_the_fault_of_the_inputs(clock, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(SparseLinear, "forward", fails)
    model = nn.Sequential(emptied(nn.Linear(64, 64)), emptied(nn.Linear(64, 64)))
    with torch.no_grad():
        model[1].weight[:40] = 0
    clock["compact"] = 0.5
    small, table = sparse_linear(model, torch.randn(2, 64))
    assert table["reason"].tolist() == ["torch cannot run it: no kernel", ""]
    assert table["kind"][1] == "compact" and type(small[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_looked_at_layer_by_layer(dtype):
    model = nn.Sequential(emptied(nn.Linear(64, 64))).to(dtype)
    small, table = sparse_linear(model, torch.randn(2, 64, dtype=dtype), seconds=0.001)
    assert len(table) == 1 and small(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_the_clock_decides_where_nobody_tells():
    """Without a single value left, and with all of them: whatever the clock says, it is honest."""
    model = nn.Sequential(nn.Linear(256, 256), emptied(nn.Linear(256, 256), 0.9)).eval()
    small, table = sparse_linear(model, torch.randn(8, 256), seconds=0.02)
    row = table.iloc[1]
    fast = row["dense_ms"] >= 1.2 * row["sparse_ms"]
    assert (type(small[1]) is SparseLinear) == fast == (row["reason"] == "")
    assert type(small[0]) is nn.Linear and pd.isna(table["dense_ms"][0])


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"the model is on meta.*model.cpu\(\)"):
        sparse_linear(nn.Linear(4, 4, device="meta"), torch.randn(2, 4))


@pytest.mark.parametrize("layer", [nn.Linear(16, 8), nn.Conv2d(16, 8, 1)])
def test_autocast_leaves_sparse_layers_their_type(layer):
    x = torch.randn(4, 16) if isinstance(layer, nn.Linear) else torch.randn(4, 16, 3, 3)
    forms = (
        [SparseConv(layer)] if x.ndim == 4 else [SparseLinear(layer), SparseLinear(layer, "rows")]
    )
    for form in forms:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = form(x.bfloat16())
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, layer(x.bfloat16().float()).detach())


class Routed(nn.Module):
    """Its second layer runs for large batches alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (emptied(nn.Linear(64, 64)) for _ in range(2))

    def forward(self, x):
        x = self.a(x)
        return self.b(x) if len(x) > 8 else x


def test_a_layer_that_few_samples_do_not_reach_is_made_sparse(clock):
    small, table = sparse_linear(Routed().eval(), torch.randn(16, 64))
    assert table["reason"].tolist() == ["", ""] and type(small.b) is SparseLinear
