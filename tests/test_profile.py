"""What `compare` and `compare_layers` say, against counts by hand and files that were written."""

import gzip
import io
from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from networks import Plain, Residual, images, make
from torch import nn
from torch.nn.utils import prune

from fasterai.deploy.sparse_files import save_sparse
from fasterai.deploy.sparse_layers import sparse_linear
from fasterai.measure import layers
from fasterai.measure.counts import counts, macs
from fasterai.measure.layers import compare_layers, profile_layers
from fasterai.measure.profile import compare, profile
from fasterai.prune.pruner import Pruner
from fasterai.report.page import report
from fasterai.sparse.sparsifier import Sparsifier


def cost(model, x, **kwargs):
    return profile(model, x, seconds=0.01, **kwargs).iloc[0]


def filled(x):
    return int(np.count_nonzero(x.detach().numpy()))


# --- MACs whose weight is not zero -------------------------------------------------------------


def test_macs_that_meet_a_zero_weight_are_told():
    model = make(Plain)
    Sparsifier(model, "weight", example_inputs=images()).sparsify_model(0.7)
    found = counts(model, images(2, 16))
    places = {"a": 256, "b": 64, "fc1": 1, "fc2": 1}
    expected = {k: n * filled(getattr(model, k).weight) for k, n in places.items()}
    assert {k: found.nonzero[k] for k in expected} == expected
    assert found.nonzero[""] == sum(expected.values()) < 0.4 * found.macs[""]
    assert found.uncounted == ()


@pytest.mark.parametrize("transposed", [False, True])
def test_convs_in_groups_and_transposed(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(8, 12, 3, stride=2, groups=4)
    prune.l1_unstructured(layer, "weight", 0.6)
    prune.remove(layer, "weight")
    x = torch.randn(3, 8, 9, 9)
    sees = 81 if transposed else 16  # each weight meets each place of the input, or of the output
    found = counts(layer, x)
    assert found.nonzero[""] == sees * filled(layer.weight)
    assert found.macs[""] == sees * layer.weight.numel()


def test_masks_that_are_multiplied_on_count_as_zeros():
    layer = nn.Linear(20, 10)
    prune.random_unstructured(layer, "weight", 0.5)
    assert filled(layer.weight_orig) == 200
    assert counts(layer, torch.randn(4, 20)).nonzero[""] == 100


def test_attention_counts_its_own_products_as_a_whole():
    n, d = 5, 8
    layer = nn.MultiheadAttention(d, 2, batch_first=True).eval()
    with torch.no_grad():
        layer.in_proj_weight[:, ::2] = 0
    x = torch.randn(2, n, d)
    found = counts(layer, {"query": x, "key": x, "value": x, "need_weights": False})
    products = 2 * n * n * d
    assert found.macs[""] == n * 4 * d * d + products
    assert found.nonzero[""] == n * (3 * d * d // 2 + d * d) + products


def test_both_sides_of_a_product_may_be_weights():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 5))

        def forward(self, x):
            return x @ (self.a @ self.b)

    model = Merged()
    with torch.no_grad():
        model.a[:, 1], model.a[0, 2], model.b[3, :2] = 0, 0, 0
    pairs = np.einsum("ik,kj->", *((p != 0).int().numpy() for p in (model.a, model.b)))
    merged = filled(model.a @ model.b)
    assert counts(model, torch.randn(1, 6)).nonzero[""] == pairs + merged


def test_recurrent_weights_count_at_each_step():
    steps, i, h = 5, 8, 16
    lstm = nn.LSTM(i, h, batch_first=True).eval()
    with torch.no_grad():
        lstm.weight_hh_l0[:, : h // 2] = 0
    found = counts(lstm, torch.randn(2, steps, i))
    assert found.nonzero[""] == steps * 4 * h * (i + h // 2)
    assert torch.backends.mkldnn.is_available() == torch._C._get_mkldnn_enabled()


# --- what cannot be counted --------------------------------------------------------------------


class Odd(nn.Module):
    """A transform with no formula, and products of which torch has none."""

    def __init__(self):
        super().__init__()
        self.fc, self.both = nn.Linear(6, 6), nn.Bilinear(6, 6, 3)

    def forward(self, x):
        x = F.layer_norm(torch.sort(self.fc(x))[0].cumsum(1), (6,))
        return torch.fft.rfft(self.both(x, x)).abs() + (x.double() @ x[0].double())[:, None]


def test_what_has_no_formula_is_named():
    found = counts(Odd(), torch.randn(2, 6))
    linear, bilinear, vector = 6 * 6, 3 * (6 * 6 + 6), 6
    assert found.macs[""] == linear + bilinear + vector
    assert found.uncounted == ("_fft_r2c",)
    assert cost(Odd(), torch.randn(2, 6))["uncounted"] == found.uncounted


def test_ordinary_networks_have_nothing_uncounted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert counts(layer, torch.randn(2, 5, 8)).uncounted == ()
    assert counts(make(Residual), images()).uncounted == ()


def test_a_network_that_the_counter_cannot_run_has_no_macs_rather_than_zero():
    class Shy(nn.Linear):
        def forward(self, x):
            if torch._C._len_torch_dispatch_stack():
                raise RuntimeError("someone looks on")
            return super().forward(x)

    row = cost(Shy(4, 4), torch.randn(2, 4))
    assert row["macs"] is row["nonzero_macs"] is row["peak_bytes"] is pd.NA
    assert row["parameters"] == 20 and row["latency_ms"] > 0


# --- bytes, memory, time -----------------------------------------------------------------------


def test_files_are_as_large_as_told(tmp_path):
    model = make(Residual)
    Sparsifier(model, "weight", example_inputs=images()).sparsify_model(0.9)
    file, packed = io.BytesIO(), io.BytesIO()
    torch.save(model.state_dict(), file)
    with gzip.GzipFile(fileobj=packed, mode="wb", filename="", compresslevel=6, mtime=0) as out:
        out.write(file.getvalue())
    save_sparse(model, tmp_path / "sparse")
    row = cost(model, images(), files=True)
    assert row["bytes"] == len(file.getvalue())
    assert abs(row["gzip_bytes"] - len(packed.getvalue())) < 64  # it comes in other pieces
    assert row["sparse_bytes"] == (tmp_path / "sparse").stat().st_size < row["bytes"]
    assert "gzip_bytes" not in cost(model, images())


class Chain(nn.Module):
    """Makes 1000, 400 and 900 numbers of a sample; each map goes when the next one is there."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 1000), nn.Linear(1000, 400), nn.Linear(400, 900)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_memory_of_activations_follows_from_their_shapes(dtype):
    size = torch.tensor([], dtype=dtype).element_size()
    for batch in (1, 7):
        row = cost(Chain().to(dtype), torch.randn(batch, 10, dtype=dtype))
        assert row["peak_bytes"] == batch * (1000 + 400) * size
        assert row["dtype"] == str(dtype).removeprefix("torch.")


def test_what_is_kept_for_later_takes_memory():
    class Kept(nn.Module):
        def forward(self, x):
            y, z = x + 1, x * 2  # both live until the end, and the sum is a third
            return (y + z.view(-1).view_as(y)).tanh_()

    row = cost(Kept(), torch.randn(4, 25))
    assert row["peak_bytes"] == 3 * 100 * 4
    assert (row["parameters"], row["macs"], row["note"]) == (0, 0, "")


def test_batches_differ_in_memory_and_throughput():
    table = compare({"a": Chain()}, torch.randn(2, 10), batch_sizes=(1, 3), seconds=0.01)
    assert table["peak_bytes"].tolist() == [5600, 3 * 5600]
    rate = table["batch"] / (table["latency_ms"] / 1e3)
    assert np.allclose(table["samples_per_s"].astype(float), rate.astype(float))


def test_zeros_that_were_not_removed_are_told_as_what_they_are():
    dense, sparse, pruned = make(Residual), make(Residual), make(Residual)
    for model in (sparse, pruned):
        Sparsifier(model, "filter", example_inputs=images()).sparsify_model(0.5)
    Pruner(pruned, images()).prune_model()
    nets = {"dense": dense, "sparse": sparse, "pruned": pruned}
    table = compare(nets, images(2), seconds=0.01)
    for column in ("parameters", "macs", "bytes", "peak_bytes"):
        first, zeros, small = table[column]
        assert first == zeros > small, column
    first, zeros, small = table["nonzero_macs"]
    assert first > zeros > small  # columns that read zero channels are not zero themselves
    assert table["note"]["dense"] == table["note"]["pruned"] == ""
    shares = [
        (p == 0).sum() / sum(q.numel() for q in sparse.parameters() if q.ndim > 1)
        for p in sparse.parameters()
        if p.ndim > 1
    ]
    assert table["note"]["sparse"].startswith(f"{float(sum(shares)):.0%} of the weights are zero")


def test_several_inputs_and_none_with_a_batch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.fc(x) + y.sum()

    row = cost(Two(), (torch.randn(3, 4), torch.randn(5)))
    assert row["batch"] is None and row["samples_per_s"] is pd.NA
    assert row["macs"] == 3 * 16


# --- layers ------------------------------------------------------------------------------------


class Fake:
    """A clock that layers turn on by hand."""

    def __init__(self):
        self.t = 0.0

    def __call__(self, device=None):
        return self.now

    def now(self):
        return self.t


class Nested(nn.Module):
    """Takes a second of its own, and what is inside takes 2 and, twice, 4."""

    def __init__(self, clock):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.a, self.b = Wait(clock, 2.0), Wait(clock, 4.0)
        self.clock = clock

    def forward(self, x):
        self.clock.t += 1.0
        return self.b(self.b(self.a(x * self.weight)))


class Wait(nn.Module):
    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock.t += self.seconds
        return x


class Outer(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.inner, self.clock = Nested(clock), clock

    def forward(self, x):
        self.clock.t += 8.0
        return self.inner(x)


def test_a_layer_takes_what_those_inside_of_it_do_not(monkeypatch):
    clock = Fake()
    monkeypatch.setattr(layers, "_now", clock)
    table = profile_layers(Outer(clock), torch.randn(2, 1), seconds=0.001).set_index("layer")
    expected = {"inner": 1.0, "inner.a": 2.0, "inner.b": 8.0, "rest": 8.0, "total": 19.0}
    assert dict(table["ms"]) == pytest.approx({k: 1e3 * s for k, s in expected.items()})


def test_layers_before_and_after():
    dense, pruned = make(Plain), make(Plain)
    pruner = Pruner(pruned, images())
    pruner.prune_model(0.5)
    table = compare_layers(dense, pruned, images(4), seconds=0.02).set_index("layer")
    report = pruner.report().set_index("layer")
    for column in ("params_before", "params_after", "macs_before", "macs_after"):
        for layer in ("a", "b", "fc1", "fc2", "total"):
            assert table.loc[layer, column] == report.loc[layer, column], (layer, column)
    assert table.index.tolist() == ["a", "b", "fc1", "fc2", "rest", "total"]
    assert (table.loc[["a", "total"], ["ms_before", "ms_after"]] > 0).all(None)


def test_layers_that_one_network_lacks():
    dense = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    other = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4))
    table = compare_layers(dense, other, torch.randn(2, 4), seconds=0.01).set_index("layer")
    assert table.index.tolist() == ["0", "1", "2", "rest", "total"]
    assert table.loc["2", ["macs_before", "macs_after"]].isna().tolist() == [True, False]
    alone = profile_layers(nn.Linear(4, 3), torch.randn(2, 4), seconds=0.01)
    assert alone["layer"].tolist() == ["Linear", "rest", "total"] and alone["macs"][0] == 12


def test_a_layer_has_the_macs_that_those_inside_of_it_have_not():
    class Block(nn.Module):
        def __init__(self, inside=None):
            super().__init__()
            self.mix = nn.Parameter(torch.randn(4, 4))
            self.inside = inside or nn.Linear(4, 3)

        def forward(self, x):
            return self.inside(x @ self.mix)

    model = Block(nn.Sequential(Block(), nn.ReLU()))
    table = profile_layers(model, torch.randn(2, 4), seconds=0.01).set_index("layer")
    expected = {"Block": 16, "inside.0": 16, "inside.0.inside": 12, "inside.1": 0, "total": 44}
    assert table["macs"].dropna().to_dict() == expected


def test_a_layer_whose_parent_computes_it_has_no_time_of_its_own():
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    table = profile_layers(layer, (x, x, x), seconds=0.01).set_index("layer")
    assert table["ms"].isna().tolist() == [False, True, False, False]
    assert table.index.tolist() == ["MultiheadAttention", "out_proj", "rest", "total"]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_whatever_happens(error, monkeypatch):
    model, threads = make(Residual).train(), torch.get_num_threads()
    profile_layers(model, images(), threads=2, seconds=0.01)
    assert hooks(model) == 0 and model.training and torch.get_num_threads() == threads
    runs = []

    def broken(self, x):
        if hooks(model):
            runs.append(hooks(model))
            raise error("stop")
        return F.conv2d(x, self.weight, self.bias, padding=1)

    monkeypatch.setattr(type(model.c3), "forward", broken)
    with pytest.raises(error, match="stop"):
        profile_layers(model, images(), threads=2, seconds=0.01)
    assert runs and hooks(model) == 0 and torch.get_num_threads() == threads
    assert all(m.training for m in model.modules())


def test_layers_of_a_compiled_network_are_those_inside():
    model = make(Plain)
    table = profile_layers(torch.compile(model, backend="eager"), images(2), seconds=0.01)
    assert table["layer"].tolist() == ["a", "b", "fc1", "fc2", "rest", "total"]
    assert table["ms"].iloc[:-1].sum() == pytest.approx(table["ms"].iloc[-1])


def test_layers_may_have_the_names_of_the_last_rows():
    def build(width):
        layers = {
            "rest": nn.Linear(4, width),
            "total": nn.Linear(width, 2),
            "head": nn.Linear(2, 2),
        }
        return nn.Sequential(OrderedDict(layers))

    order = ["rest", "total", "head", "rest", "total"]
    table = profile_layers(build(8), torch.randn(2, 4), seconds=0.01)
    assert table["layer"].tolist() == order and table["macs"][0] == 4 * 8
    assert table["ms"].iloc[-1] == pytest.approx(table["ms"].iloc[:-1].sum(), rel=0.5)
    table = compare_layers(build(8), build(3), torch.randn(2, 4), seconds=0.01)
    assert table["layer"].tolist() == order
    assert table[["macs_before", "macs_after"]].iloc[1].tolist() == [16, 6]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1, True, "1"])
def test_times_to_spend_are_finite_numbers(seconds, tmp_path):
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    for call in (
        lambda: compare({"a": model}, x, seconds=seconds),
        lambda: profile(model, x, seconds=seconds),
        lambda: profile_layers(model, x, seconds=seconds),
        lambda: compare_layers(model, model, x, seconds=seconds),
        lambda: sparse_linear(model, x, seconds=seconds),
        lambda: sparse_linear(model, x, gain=seconds),
        lambda: report(tmp_path / "a", networks={"a": model}, example_inputs=x, seconds=seconds),
    ):
        with pytest.raises(ValueError, match="must be a number >= 0, got"):
            call()


def test_parameters_of_8_bits_are_counted():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            weight = torch.tensor([[1.0, 0.0], [-0.0, 2.0]]).to(torch.float8_e4m3fn)
            self.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, x):
            return x @ self.weight.to(x.dtype)

    x = torch.randn(2, 2)
    assert cost(Small(), x)["nonzero"] == 2
    assert profile_layers(Small(), x, seconds=0.01)["nonzero"].tolist()[0] == 2


def test_networks_without_numbers_are_refused():
    model, x = make(Plain).to("meta"), images(2).to("meta")
    for call in (profile, profile_layers):
        with pytest.raises(ValueError, match="meta device"):
            call(model, x)


def test_layers_of_what_is_no_network():
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        compare_layers(make(Plain), "pruned", images())
    with pytest.raises(ValueError, match="could not be run"):
        profile_layers(make(Plain), torch.randn(2, 7))


def test_batches_that_cannot_be_made_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x, scale):
            return self.layer(x) * scale

    given = {"a": Two()}, (torch.randn(4, 64), torch.ones(1))
    assert compare(*given, seconds=0.01).loc["a", "latency_ms"] > 0
    for batches, why in (([4], "no first dimension of one size"), ([0], "one sample or more")):
        with pytest.raises(ValueError, match=why):
            compare(*given, batch_sizes=batches)
    for n in (4, np.int64(4)):
        with pytest.raises(TypeError, match=r"several, as in \[1, 16\], got 4"):
            compare(*given, batch_sizes=n)


class LowRankUpdate(nn.Module):
    """Adds a product of weights to a weight, once for a batch."""

    def __init__(self):
        super().__init__()
        self.w, self.a = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(2, 8))
        self.b = nn.Parameter(torch.randn(8, 2))

    def forward(self, x):
        return F.linear(x, self.w + self.b @ self.a)


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_products_of_weights_count_once_however_many_samples_there_are(samples):
    model, x = LowRankUpdate(), torch.randn(samples, 8)
    expected = 8 * 8 + 8 * 2 * 8
    assert macs(model, x)[""] == counts(model, x).macs[""] == cost(model, x)["macs"] == expected
