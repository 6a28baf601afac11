"""Granularities, blocks and N:M patterns against brute force."""

import copy
import itertools
import math

import pytest
import torch
from fastai.text.models.awdlstm import WeightDropout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import images
from torch import nn

from fasterai.core import granularity as grain
from fasterai.core.criteria import large_final, random_scores, squared_final
from fasterai.core.granularity import Granularity, granularities, over_blocks, register
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# What a group spans, written down anew: (name, dimensions of a 2-d conv that are averaged).
SPANNED = {
    "weight": "",
    "shared_weight": "o",
    "channel": "i",
    "column": "h",
    "vector": "h",
    "row": "w",
    "kernel": "hw",
    "filter": "ihw",
    "shared_channel": "oi",
    "shared_column": "oh",
    "shared_row": "ow",
    "vertical_slice": "ih",
    "horizontal_slice": "iw",
    "shared_vertical_slice": "oih",
    "shared_horizontal_slice": "oiw",
    "shared_kernel": "ohw",
    "layer": "oihw",
}


@pytest.fixture
def registry(monkeypatch):
    """What a test registers ends with it."""
    monkeypatch.setattr(grain, "_DIMENSIONS", dict(grain._DIMENSIONS))


class Alone(nn.Module):
    """One layer, so that nothing but it can be sparsified."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def sparsify(layer, granularity, sparsity, context="local", criteria=large_final, **kwargs):
    kwargs = {"min_keep": 0, "layers": "layer", **kwargs}
    sparsifier = Sparsifier(Alone(layer), granularity, context, criteria, **kwargs)
    sparsifier.sparsify_model(sparsity)
    return sparsifier


# --- which elements form a group ----------------------------------------------------------------


def members(shape, group):
    """The elements of each group in row-major order of the groups, found by counting."""
    counts = [math.ceil(n / g) for n, g in zip(shape, group, strict=True)]
    found = {at: [] for at in itertools.product(*map(range, counts))}
    for at in itertools.product(*map(range, shape)):
        found[tuple(k // g for k, g in zip(at, group, strict=True))].append(at)
    return list(found.values())


def brute(weight, groups, n, reduce="mean"):
    """Zero the n groups of the lowest mean magnitude, the first of equal ones first."""
    w = weight.detach().double()

    def score(group):
        total = math.fsum(abs(float(w[at])) for at in group)
        return total / len(group) if reduce == "mean" else total

    order = sorted(range(len(groups)), key=lambda k: (score(groups[k]), k))
    expected = weight.detach().clone()
    for k in order[:n]:
        for at in groups[k]:
            expected[at] = 0.0
    return expected


def whole(layer, shape):
    """A layer with weights of few values, exact in every dtype, so that ties are frequent."""
    with torch.no_grad():
        layer.weight.copy_(torch.randint(1, 9, shape) * torch.randn(shape).sign() / 4)
    return layer


LAYERS = {
    "oiw": lambda: nn.Conv1d(3, 4, 5),
    "oihw": lambda: nn.Conv2d(3, 4, (5, 2)),
    "oidhw": lambda: nn.Conv3d(3, 4, (2, 3, 2)),
    "iow": lambda: nn.ConvTranspose1d(4, 3, 5),
    "iohw": lambda: nn.ConvTranspose2d(4, 3, (5, 2)),
    "iodhw": lambda: nn.ConvTranspose3d(4, 3, (2, 3, 2)),
}


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("name", SPANNED)
def test_names_mean_the_same_in_every_conv(dims, name):
    layer = whole(LAYERS[dims](), LAYERS[dims]().weight.shape)
    spanned = SPANNED[name] + "d" * (name in ("kernel", "filter", "shared_kernel", "layer"))
    if name not in ("kernel", "filter", "shared_kernel", "layer") and not set(spanned) <= set(dims):
        assert name not in granularities(layer)
        with pytest.raises(ValueError, match=f"{type(layer).__name__} has no granularity '{name}'"):
            sparsify(layer, name, 0.5)
        return
    kept = "".join(d for d in dims if d not in spanned)
    assert granularities(layer)[name] == kept
    shape = layer.weight.shape
    group = tuple(n if d in spanned else 1 for d, n in zip(dims, shape, strict=True))
    assert Granularity(name).group_shape(dims, shape) == group
    if name != "filter":  # its groups are units, see test_sparsifier
        groups = members(shape, group)
        expected = brute(layer.weight, groups, round(0.4 * len(groups)))
        sparsify(layer, name, 0.4)
        assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("name, spanned", [("weight", ""), ("row", "i"), ("column", "o")])
def test_linear_layers(name, spanned):
    layer = whole(nn.Linear(6, 5), (5, 6))
    group = tuple(n if d in spanned else 1 for d, n in zip("oi", (5, 6), strict=True))
    groups = members((5, 6), group)
    expected = brute(layer.weight, groups, round(0.6 * len(groups)))
    sparsify(layer, name, 0.6)
    assert torch.equal(layer.weight, expected)


def test_filter_means_the_output_channels_of_transposed_convs():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    means = model[2].weight.detach().abs().mean((0, 2, 3))  # (in, out, h, w)
    sparsifier = Sparsifier(model, "filter", layers="2", example_inputs=images())
    sparsifier.sparsify_model(1 / 3)
    zero = (model[2].weight == 0).transpose(0, 1).flatten(1).all(1)
    assert set(zero.nonzero().flatten().tolist()) == set(means.argsort()[:2].tolist())
    assert torch.equal(model[2].bias == 0, zero)


def test_grouped_convs_have_the_dimensions_of_their_weights():
    for layer in (nn.Conv2d(8, 12, 3, groups=4), nn.ConvTranspose2d(8, 12, 3, groups=4)):
        weight = layer.weight.detach().clone()
        dims = "oihw" if isinstance(layer, nn.Conv2d) else "iohw"
        for name in ("kernel", "row", "channel", "shared_kernel"):
            layer.weight.data.copy_(weight)
            spanned = SPANNED[name]
            shape = layer.weight.shape
            group = tuple(n if d in spanned else 1 for d, n in zip(dims, shape, strict=True))
            groups = members(shape, group)
            expected = brute(weight, groups, round(0.5 * len(groups)))
            sparsify(layer, name, 0.5)
            assert torch.equal(layer.weight, expected)


def test_sets_of_dimensions():
    shape = (4, 3, 5, 2)
    assert Granularity("o h").group_shape("oihw", shape) == (1, 3, 1, 2)
    assert Granularity("h o").group_shape("oihw", shape) == (1, 3, 1, 2)
    assert Granularity("o h").group_shape("oi", (4, 3)) is None
    assert Granularity("kernel").group_shape("oi", (4, 3)) is None
    assert Granularity("row").group_shape("oi", (4, 3)) == (1, 3)
    assert Granularity("v").group_shape("vo", (4, 3)) == (1, 3)
    assert Granularity("o").is_filter and Granularity("o/1").is_filter
    assert not any(Granularity(k).is_filter for k in ("row", "o h", "o/2", "layer", "2:4"))


@pytest.mark.parametrize(
    "bad", ["filtre", "", "o o", "x", "oi", "o/0", "o/", "o/-2", "o/2.5", "2:"]
)
def test_unknown_granularities_are_refused(bad):
    with pytest.raises(ValueError, match="unknown granularity"):
        Granularity(bad)


def test_refusals_say_what_there_is():
    with pytest.raises(ValueError, match="did you mean 'filter'.*'o h'.*'o/16 i'.*'2:4'"):
        Granularity("filtre")
    with pytest.raises(TypeError, match="must be a string"):
        Granularity(3)
    for bad in ("4:4", "0:4", "4:2"):
        with pytest.raises(ValueError, match="at least 1 and fewer than all"):
            Granularity(bad)


# --- blocks -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    reduce=st.sampled_from(["mean", "sum"]),
)
def test_over_blocks_is_the_mean_of_each_block(shape, data, reduce):
    group = [data.draw(st.integers(1, n)) for n in shape]
    values = torch.randn(shape, dtype=torch.float64)
    got = over_blocks(values, group, reduce)
    picked = [torch.stack([values[at] for at in m]) for m in members(shape, group)]
    expected = torch.stack([getattr(m, reduce)() for m in picked])
    assert torch.allclose(got.flatten(), expected)
    alive = over_blocks(values > 0, group, "any").flatten()
    assert alive.tolist() == [bool((m > 0).any()) for m in picked]


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize(
    "granularity", ["o/16 i/1", "o/16 i", "o i/4", "o/3 i/4", "o/100 i", "i/5"]
)
def test_blocks_with_ends(granularity, reduce):
    layer = whole(nn.Linear(10, 40), (40, 10))
    sizes = dict((w.split("/") + ["1"])[:2] for w in granularity.split())
    group = [min(int(sizes.get(d, n)), n) for d, n in zip("oi", (40, 10), strict=True)]
    groups = members((40, 10), group)
    expected = brute(layer.weight, groups, round(0.5 * len(groups)), reduce)
    sparsifier = sparsify(layer, granularity, 0.5, criteria=large_final.reduced_by(reduce))
    assert torch.equal(layer.weight, expected)
    row = sparsifier.report().set_index("layer").loc["layer"]
    assert row["groups"] == len(groups) and row["zeros"] == row["n"] == round(0.5 * len(groups))
    assert row["zero_weights"] == int((layer.weight == 0).sum())


def test_blocks_of_a_conv_span_what_is_not_named():
    layer = nn.Conv2d(4, 20, 3)
    sparsify(layer, "o/8 i", 0.5)
    zero = (layer.weight == 0).flatten(2)
    assert torch.equal(zero.all(2), zero.any(2))
    kernels = zero.all(2)  # (20, 4)
    for rows in (kernels[:8], kernels[8:16], kernels[16:]):
        assert torch.equal(rows.all(0), rows.any(0))


# --- N:M ----------------------------------------------------------------------------------------


def runs_of(shape, dim, m, parts=1):
    """Each run of up to m consecutive inputs, as lists of positions."""
    length = shape[dim] // parts
    starts = [
        (p * length + s, min(m, length - s)) for p in range(parts) for s in range(0, length, m)
    ]
    others = [range(n) if d != dim else (None,) for d, n in enumerate(shape)]
    return [
        [tuple(start + k if x is None else x for x in at) for k in range(size)]
        for at in itertools.product(*others)
        for start, size in starts
    ]


def brute_pattern(scores, weight, n, m, keep, dim, parts=1):
    """Greedy: the lowest scores, as long as their run keeps enough; equal ones by run and place."""
    free = [max(0, len(run) - keep) for run in runs_of(weight.shape, dim, m, parts)]
    runs = runs_of(weight.shape, dim, m, parts)
    ranked = sorted(
        (float(scores[at]), r, k) for r, run in enumerate(runs) for k, at in enumerate(run)
    )
    candidates = []  # the weakest of each run
    for _, r, k in ranked:
        if free[r]:
            free[r] -= 1
            candidates.append((r, k))
    expected = weight.clone()
    for r, k in candidates[:n]:
        expected[runs[r][k]] = 0.0
    return expected, len(candidates)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.sampled_from([(5, 8), (3, 11), (4, 6, 2, 1), (3, 7, 1, 2), (2, 9, 3), (1, 3), (6, 1)]),
    pattern=st.sampled_from(["2:4", "4:8", "1:4", "1:2", "3:4", "1:3"]),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.77, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_patterns_zero_the_lowest_weights_they_let_go(shape, pattern, share, dtype, seed):
    keep, m = map(int, pattern.split(":"))
    kind = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}[len(shape)]
    kernel = (shape[2:],) if len(shape) > 2 else ()
    torch.manual_seed(seed)
    layer = whole(kind(shape[1], shape[0], *kernel), shape).to(dtype)
    weight = layer.weight.detach().clone()
    if (shape[1] % m or m) <= keep and shape[1] < m:
        with pytest.raises(ValueError, match=f"too few inputs for '{pattern}': {shape[1]}"):
            sparsify(layer, pattern, 0.0)
        return
    sparsity = share * (1 - keep / m)
    n = round(sparsity * weight.numel())
    expected, most = brute_pattern(weight.abs(), weight, n, m, keep, 1)
    table = sparsify(layer, pattern, sparsity).report().set_index("layer")
    assert torch.equal(layer.weight, expected)
    assert table.loc["layer", "n"] == n and table.loc["layer", "zeros"] == min(n, most)
    assert table.loc["layer", "limit"] == ("pattern" if n > most else "")
    assert table.loc["layer", "reached"] == min(n, most) / weight.numel()


def holds(weight, keep, m, dim=1, parts=1):
    """Whether each run, filled up with zeros, has exactly `keep` weights that are not zero."""
    return all(
        sum(bool(weight[at] != 0) for at in run) == min(keep, len(run))
        for run in runs_of(weight.shape, dim, m, parts)
    )


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_the_whole_pattern_at_its_sparsity(pattern, context):
    keep, m = map(int, pattern.split(":"))
    model = nn.Sequential(nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 12, 1), nn.Linear(8, 2))
    sparsifier = Sparsifier(model, pattern, context, layers=["0", "2"], round_to=2)
    for share in (0.3, 0.6, 1.0):  # on the way, what is zero stays
        before = model[0].weight == 0
        sparsifier.sparsify_model(share * (1 - keep / m))
        assert (model[0].weight == 0)[before].all()
        assert sparsifier.reached() == pytest.approx(share * (1 - keep / m), abs=0.01)
    assert holds(model[0].weight, keep, m) and holds(model[2].weight, keep, m)
    total = sparsifier.report().set_index("layer").loc["total"]
    assert total["reached"] == total["asked"] == 1 - keep / m and total["limit"] == ""


def test_runs_do_not_cross_the_parts_of_a_transposed_conv():
    layer = nn.ConvTranspose2d(12, 6, 2, groups=2)  # 6 inputs in a part: runs of 4 and 2
    weight = layer.weight.detach().clone()
    expected, most = brute_pattern(weight.abs(), weight, 10**6, 4, 2, 0, parts=2)
    sparsifier = sparsify(layer, "2:4", 0.5)
    assert torch.equal(layer.weight, expected) and holds(layer.weight, 2, 4, 0, parts=2)
    assert sparsifier.report()["zeros"].iloc[0] == most == weight.numel() // 6 * 2


def test_a_pattern_says_what_to_ask_for():
    layer = nn.Linear(8, 4)
    before = layer.weight.detach().clone()
    for sparsity in (0.7, 1, 0.51):
        with pytest.raises(ValueError, match="at most 0.5 by '2:4'.*whole pattern pass 0.5"):
            sparsify(layer, "2:4", sparsity)
    with pytest.raises(ValueError, match="sparsity of 'layer' must be at most 0.75 by '1:4'"):
        sparsify(layer, "1:4", {"layer": 0.8})
    for bad in (0.7, (0.2, 0.7), {"a": 0.7}):
        with pytest.raises(ValueError, match="at most 0.5 by '2:4'"):
            SparsifyCallback(bad, "2:4")
    assert torch.equal(layer.weight, before)
    sparsify(layer, "1:3", 0.666667)  # meant for 2 / 3
    assert holds(layer.weight, 1, 3)


def test_zeros_beyond_a_pattern_stay_and_the_pattern_is_completed():
    layer = nn.Linear(8, 6)
    with torch.no_grad():
        layer.weight[0, :3] = 0.0  # one more than 2 of 4
        layer.weight[1, 5] = 0.0
    sparsifier = sparsify(layer, "2:4", 0.25, criteria=random_scores)
    assert (layer.weight[0, :3] == 0).all() and layer.weight[1, 5] == 0
    assert int(sparsifier.masks["layer.weight"].sum()) == 48 - 12 - 1
    sparsifier.sparsify_model(0.5)
    zeros = (layer.weight.view(-1, 4) == 0).sum(1)
    assert zeros[0] == 3 and (zeros[1:] == 2).all()
    with torch.no_grad():
        layer.weight.add_(1.0)
    sparsifier.apply()
    assert torch.equal((layer.weight.view(-1, 4) == 0).sum(1), zeros)


def test_patterns_hold_while_training():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 2)
    )
    x = torch.randn(4, 3, 8, 8)
    sparsifier = Sparsifier(model, "2:4", "global", layers=["2"], criteria=squared_final)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for t in range(8):
        sparsifier.sparsify_model(0.5 * (t + 1) / 8)
        assert int((model[2].weight == 0).sum()) == round(0.5 * (t + 1) / 8 * 576)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.apply()
    assert holds(model[2].weight, 2, 4)


def test_infinite_weights_under_a_pattern():
    layer = nn.Linear(6, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[math.inf, -math.inf, math.inf, math.inf, 1.0, math.inf]]))
    sparsify(layer, "2:4", 1 / 3)
    assert (layer.weight == 0).tolist() == [[True, True, False, False, False, False]]


# --- layer types --------------------------------------------------------------------------------


class Text(nn.Module):
    def __init__(self, width=12, memory=None):
        super().__init__()
        self.words = nn.Embedding(20, width, padding_idx=0)
        self.memory = nn.Linear(width, memory or width)
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True, kdim=memory, vdim=memory)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens):
        x = self.words(tokens)
        memory = self.memory(x)
        return self.head(self.attention(x, memory, memory)[0].mean(1))


TOKENS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize("granularity", ["weight", "row", "column", "o/5 i/3", "2:4"])
def test_packed_attention_weights(granularity):
    model = Text()
    weight = model.attention.in_proj_weight.detach().clone()
    sparsifier = Sparsifier(model, granularity, example_inputs=TOKENS)
    sparsifier.sparsify_model(0.5)
    assert set(sparsifier.masks) == {
        "memory.weight", "attention.in_proj_weight", "attention.out_proj.weight"
    }  # fmt: skip
    got = model.attention.in_proj_weight
    if granularity == "2:4":
        expected, _ = brute_pattern(weight.abs(), weight, 216, 4, 2, 1)
    else:
        group = {"weight": (1, 1), "row": (1, 12), "column": (36, 1), "o/5 i/3": (5, 3)}
        groups = members((36, 12), group[granularity])
        expected = brute(weight, groups, round(0.5 * len(groups)))
    assert torch.equal(got, expected)
    table = sparsifier.report().set_index("layer")
    assert table.loc["attention", "zero_weights"] == int((got == 0).sum())
    assert table.loc["attention", "coupled"] == ""
    with torch.no_grad():
        got.add_(1.0)
    sparsifier.apply()
    assert torch.equal(got == 0, expected == 0)


def test_attention_with_weights_of_its_own_for_keys_and_values():
    model = Text(memory=8)
    sparsifier = Sparsifier(model, "row", exclude="memory", example_inputs=TOKENS)
    sparsifier.sparsify_model({"attention": 0.5})
    table = sparsifier.report().set_index("layer")
    names = [f"attention.{k}_proj_weight" for k in "qkv"]
    assert table.loc[names, "zeros"].tolist() == [6, 6, 6]
    assert table.loc["attention.out_proj", "zeros"] == 0
    assert (table["coupled"] == "").all()
    sparsifier.sparsify_model({names[0]: 0.75})
    assert sparsifier.report().set_index("layer").loc[names, "zeros"].tolist() == [9, 6, 6]
    assert table.loc["total", "macs"] < 2 * sparsifier.report()["macs"].iloc[:-1].sum()


def test_embeddings_are_asked_for():
    default = Sparsifier(Text(), "row", example_inputs=TOKENS)
    assert "words.weight" not in default.masks and "words" not in default.skipped
    for granularity, dim in (("row", 1), ("column", 0), ("v", 1)):
        model = Text()
        means = model.words.weight.detach().abs().mean(dim)
        sparsifier = Sparsifier(
            model, granularity, layers=[nn.Embedding, "memory"], exclude="memory"
        )
        assert set(sparsifier.masks) == {"words.weight"}
        sparsifier.sparsify_model(0.25)  # the padding's zero row counts
        gone = (model.words.weight == 0).all(dim).nonzero().flatten().tolist()
        order = means.argsort(stable=True)
        assert gone == sorted(order[: round(0.25 * len(means))].tolist())


def test_filters_of_a_network_with_an_embedding():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    sparsifier = Sparsifier(model, "filter", example_inputs=TOKENS % 9)
    sparsifier.sparsify_model(0.5)
    assert int((model[0].weight == 0).all(0).sum()) == 3  # its units are the features
    assert int((model[1].weight == 0).all(1).sum()) == 4
    table = sparsifier.report().set_index("layer")
    assert table.loc[["0", "1"], "zeros"].tolist() == [3, 4]


def test_what_a_layer_lacks_is_reported_and_nothing_left_is_an_error():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 8), nn.Linear(8, 2))
    sparsifier = Sparsifier(model, "kernel")
    assert dict(sparsifier.skipped) == {
        "2": "Linear has no granularity 'kernel'", "3": "network output"
    }  # fmt: skip
    sparsifier.sparsify_model(0.5)
    table = sparsifier.report().set_index("layer")
    assert table.loc["2", "limit"].startswith("Linear has no") and table.loc["0", "zeros"] == 12
    with pytest.raises(ValueError, match="nothing to sparsify.*Linear has no granularity"):
        Sparsifier(model, "kernel", layers=nn.Linear)
    with pytest.raises(ValueError, match="nothing to sparsify.*Embedding has no granularity '2:4'"):
        Sparsifier(nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 2)), "2:4", layers=nn.Embedding)
    narrow = Sparsifier(model, "4:8", layers=["0", "2"])
    assert narrow.skipped == {"0": "too few inputs for '4:8': 3"}


class Experts(nn.Module):
    """Linear layers side by side, as one weight."""

    def __init__(self, experts=3, inputs=8, outputs=5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs, inputs))

    def forward(self, x):  # (experts, batch, inputs)
        return x @ self.weight.mT


class Half(Experts):
    pass


@pytest.mark.parametrize(
    "granularity, group", [("weight", (1, 1, 1)), ("row", (1, 1, 8)), ("column", (1, 5, 1)),
    ("e", (1, 5, 8)), ("e o/2 i/3", (1, 2, 3)), ("e i", (1, 5, 1))],
)  # fmt: skip
def test_registered_types(registry, granularity, group):
    with pytest.raises(ValueError, match="nothing to sparsify"):
        Sparsifier(Alone(Experts()), "weight")
    register(Experts, "e o i")
    layer = Half()
    groups = members((3, 5, 8), group)
    expected = brute(layer.weight, groups, round(0.5 * len(groups)))
    model = nn.Sequential(layer, nn.Linear(5, 2))  # by default, for it is not the output layer
    Sparsifier(model, granularity).sparsify_model(0.5)
    assert torch.equal(layer.weight, expected)


def test_registered_types_follow_patterns_and_have_parameters_by_name(registry):
    register(Experts, "e o i")
    layer = Experts()
    sparsify(layer, "2:4", 0.5)
    assert holds(layer.weight, 2, 4, 2)
    register(nn.LSTM, {"weight_ih_l0": "o i"})
    model = nn.Sequential(nn.LSTM(6, 4), nn.Linear(4, 2))
    sparsifier = Sparsifier(model, "row")
    sparsifier.sparsify_model({"0": 0.5})
    assert set(sparsifier.masks) == {"0.weight_ih_l0"}
    assert int((model[0].weight_ih_l0 == 0).all(1).sum()) == 8


@pytest.mark.parametrize(
    "layer, weights",
    [
        (lambda: nn.LSTM(6, 4, 2), ["ih_l0", "hh_l0", "ih_l1", "hh_l1"]),
        (lambda: nn.GRU(6, 4, bidirectional=True), ["ih_l0", "hh_l0"] * 2),
        (lambda: nn.LSTM(6, 4, proj_size=3), ["ih_l0", "hh_l0", "hr_l0"]),
        (lambda: nn.RNNCell(6, 4), ["ih", "hh"]),
    ],
)
def test_recurrent_layers(layer, weights):
    torch.manual_seed(0)
    model = nn.Sequential(layer(), nn.Linear(4, 2))
    own = {k: p for k, p in model[0].named_parameters() if "weight" in k}
    assert [k.removeprefix("weight_").removesuffix("_reverse") for k in own] == weights
    for granularity, group in (("weight", lambda w: (1, 1)), ("row", lambda w: (1, w.shape[1]))):
        expected = {}
        for key, w in own.items():
            groups = members(w.shape, group(w))
            expected[key] = brute(w, groups, round(0.5 * len(groups)))
        Sparsifier(model, granularity, min_keep=0).sparsify_model(0.5)
        assert all(torch.equal(w, expected[k]) for k, w in own.items())


def test_weights_of_recurrent_layers_that_drop_out():
    lstm = nn.LSTM(6, 4, batch_first=True)
    model = nn.Sequential(WeightDropout(lstm, 0.5), First(), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 5, 6)
    sparsifier = Sparsifier(model, "2:4", example_inputs=x)
    sparsifier.sparsify_model(0.5)
    assert set(sparsifier.masks) == {"0.weight_hh_l0_raw", "0.module.weight_ih_l0"}
    model(x)
    assert holds(lstm.weight_hh_l0, 2, 4, 1) and holds(lstm.weight_ih_l0, 2, 4, 1)
    table = sparsifier.report().set_index("layer")
    inside, hidden = 6 * 16 * 5, 4 * 16 * 5  # five steps, four gates of four units
    assert table.loc["0.module", "macs"] == inside and table.loc["0", "macs"] == hidden
    assert table.loc["total", "macs"] == inside + hidden


class First(nn.Module):
    def forward(self, x):
        return x[0]


def test_weights_that_are_no_parameters_are_reported(registry):
    register(Experts, {"weight": "e o i", "scale": "o i"})
    model = nn.Sequential(Experts(), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 5))
    register(nn.BatchNorm1d, "o")
    torch.nn.utils.parametrizations.weight_norm(model[2])
    sparsifier = Sparsifier(model, "weight", layers=["0", "1", "2"])
    assert dict(sparsifier.skipped) == {
        "0.scale": "it has no parameter 'scale'",
        "1": "it has no weight",
        "2": "its weight is computed (a parametrization), not a parameter",
    }
    assert set(sparsifier.masks) == {"0.weight"}


@pytest.mark.parametrize("dims", ["", "o o", "O I", "o,i", "o 1", 3, {"weight": ""}, {"w": 3}])
def test_bad_registrations_change_nothing(registry, dims):
    before = dict(grain._DIMENSIONS)
    with pytest.raises((ValueError, TypeError)):
        register(Experts, dims)
    for dims in (None, 5, ["o", "i"]):
        with pytest.raises(TypeError, match="dims must be letters"):
            register(Experts, dims)
    with pytest.raises(TypeError, match="takes a type of torch.nn.Module"):
        register(Experts(), "e o i")
    assert before == grain._DIMENSIONS


def test_registered_dimensions_must_fit(registry):
    register(Experts, "o i")
    with pytest.raises(ValueError, match=r"layer.weight has the shape \(3, 5, 8\).*'o i'"):
        sparsify(Experts(), "weight", 0.5)


# --- any weight ---------------------------------------------------------------------------------

SHAPES = [(1, 1), (1, 7), (5, 1), (4, 6), (3, 2, 1, 1), (2, 3, 3, 2), (1, 1, 1, 1), (4, 4, 3)]
GRANULARITIES = [
    "weight",
    "row",
    "column",
    "layer",
    "o/2 i/3",
    "o i",
    "i",
    "kernel",
    "shared_weight",
]
NAMED = {2: ("oi", nn.Linear), 3: ("oiw", nn.Conv1d), 4: ("oihw", nn.Conv2d)}


@settings(deadline=None, max_examples=150)
@given(
    shape=st.sampled_from(SHAPES),
    granularity=st.sampled_from(GRANULARITIES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "channels_last"]),
    sparsity=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    infinite=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_weight_is_zeroed_as_a_sort_says(
    shape, granularity, dtype, layout, sparsity, infinite, seed
):
    torch.manual_seed(seed)
    dims, kind = NAMED[len(shape)]
    layer = whole(kind(shape[1], shape[0], *([shape[2:]] if shape[2:] else [])), shape)
    layer = laid_out(layer.to(dtype), layout)
    if infinite:
        layer.weight.data[(-1,) * len(shape)] = -math.inf
    group = Granularity(granularity).group_shape(dims, shape)
    if group is None:
        with pytest.raises(ValueError, match="has no granularity"):
            sparsify(layer, granularity, sparsity)
        return
    groups = members(shape, group)
    expected = brute(layer.weight, groups, round(sparsity * len(groups)))
    strides = layer.weight.stride()
    sparsify(layer, granularity, sparsity)
    assert torch.equal(layer.weight, expected) and layer.weight.stride() == strides
    assert not layer.weight[layer.weight == 0].signbit().any()


def laid_out(layer, layout):
    """The layer with the same values in another memory format."""
    weight = layer.weight.detach()
    if layout == "transposed":
        weight = weight.mT.contiguous().mT
    if layout == "sliced":
        weight = weight.repeat_interleave(2, -1)[..., ::2]
    if layout == "channels_last" and weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    layer.weight = nn.Parameter(weight)
    return layer


@pytest.mark.parametrize("granularity", ["weight", "row", "o/2 i/3", "2:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_refused_by_name_and_nothing_changes(granularity, dtype):
    layer = nn.Linear(6, 6).to(dtype)
    with torch.no_grad():
        layer.weight[1, 1] = math.nan
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="nan for layer.weight"):
        sparsify(layer, granularity, 0.5)
    assert torch.equal(layer.weight.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("granularity", ["weight", "row", "column", "o/2 i/3", "2:4"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_empty_weights_are_passed_over(granularity):
    model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 0), nn.Linear(8, 4))
    sparsifier = Sparsifier(model, granularity, layers=nn.Linear, min_keep=0)
    sparsifier.sparsify_model(0.5)
    assert set(sparsifier.masks) == {"2.weight"} and sparsifier.reached() == 0.5


@pytest.mark.parametrize("granularity", ["weight", "row", "column", "o/2 i/3", "2:4"])
@pytest.mark.parametrize("context", ["local", "global"])
def test_tied_weights_count_once(granularity, context):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    model[2].weight = model[0].weight
    alone = Alone(copy.deepcopy(model[0]))
    Sparsifier(alone, granularity, layers="layer").sparsify_model(0.5)
    sparsifier = Sparsifier(model, granularity, context)
    sparsifier.sparsify_model(0.5)
    assert list(sparsifier.masks) == ["0.weight"] and model[2].weight is model[0].weight
    assert torch.equal(model[0].weight, alone.layer.weight)


def test_tied_embedding_and_linear_rows_are_the_same_rows():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8))
    model[1].weight = model[0].weight
    sparsifier = Sparsifier(model, "row", layers=[nn.Embedding, nn.Linear])
    sparsifier.sparsify_model(0.25)
    assert list(sparsifier.masks) == ["0.weight"]
    assert int((model[1].weight == 0).all(1).sum()) == 2
