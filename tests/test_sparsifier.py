"""Exactly n, and zero is zero, in any training loop."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import (
    ALL,
    Depthwise,
    Gated,
    Mlp,
    Parted,
    Plain,
    Residual,
    TwoHeads,
    images,
    loss_of,
    make,
)
from torch import nn

from fasterai.core.criteria import (
    grad_crit,
    large_final,
    random_scores,
    small_final,
    snip,
    squared_final,
)
from fasterai.sparse.choose import NothingToSparsify
from fasterai.sparse.sparsifier import Sparsifier

HEADS = {
    "Plain": ["fc2"],
    "TwoHeads": ["boxes", "classes"],
    "Dense": ["head"],
    "Upsampled": ["out"],
}


def layers_of(model):
    heads = HEADS.get(type(model).__name__, ["head"])
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and n not in heads
    }


def dead(p):
    """Exactly +0.0."""
    return not p.count_nonzero() and not p.signbit().any()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("context", ["local", "global"])
def test_weights_are_zeroed_as_a_sort_says(kind, sparsity, context):
    model = make(kind)
    before = {n: m.weight.detach().clone() for n, m in layers_of(model).items()}
    sparsifier = Sparsifier(model, "weight", context, min_keep=0, example_inputs=images())
    sparsifier.sparsify_model(sparsity)
    pools = [before] if context == "global" else [{n: w} for n, w in before.items()]
    for pool in pools:
        ranked = sorted(
            (abs(v), order, i, n)
            for order, (n, w) in enumerate(pool.items())
            for i, v in enumerate(w.flatten().tolist())
        )
        gone = {(n, i) for _, _, i, n in ranked[: round(sparsity * len(ranked))]}
        for n, w in pool.items():
            expected = w.flatten().clone()
            expected[[i for m, i in gone if m == n]] = 0.0
            got = dict(model.named_modules())[n].weight.flatten()
            assert torch.equal(got, expected)
            assert dead(got[got == 0])


@pytest.mark.parametrize(
    "granularity, shape",
    [
        ("row", (8, 3, 3, 1)),
        ("column", (8, 3, 1, 3)),
        ("kernel", (8, 3, 1, 1)),
        ("o h", (8, 1, 3, 1)),
        ("shared_kernel", (1, 3, 1, 1)),
    ],
)
@pytest.mark.parametrize("criteria", [large_final, squared_final, small_final])
def test_groups_of_a_conv(granularity, shape, criteria):
    conv = nn.Conv2d(3, 8, 3)
    w = conv.weight.detach().clone()
    model = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 8, 8))
    Sparsifier(model, granularity, criteria=criteria, layers=nn.Conv2d, min_keep=0).sparsify_model(
        0.5
    )
    dims = [d for d, n in enumerate(shape) if n == 1]
    scores = {large_final: w.abs(), squared_final: w**2, small_final: -w.abs()}[criteria]
    means = scores.mean(dims, keepdim=True) if dims else scores
    order = means.flatten().argsort(stable=True)
    keep = torch.ones(means.numel())
    keep[order[: round(0.5 * means.numel())]] = 0
    assert torch.equal(conv.weight != 0, keep.view(shape).expand_as(w).bool())


def test_added_filters_are_ranked_together_by_their_mean():
    model = make(Residual)
    parts = [model.stem.weight, model.c2.weight, model.c3.weight]
    size = sum(p[0].numel() for p in parts)
    scores = sum(p.detach().abs().sum((1, 2, 3)) for p in parts) / size
    sparsifier = Sparsifier(model, "filter", example_inputs=images())
    sparsifier.sparsify_model(0.5)
    gone = scores.argsort(stable=True)[:4]
    for module in (model.stem, model.c2, model.c3):
        zero = (module.weight.flatten(1) == 0).all(1)
        assert zero.nonzero().flatten().tolist() == sorted(gone.tolist())
    for p in (model.bn0.weight, model.bn0.bias, model.bn2.weight, model.bn3.bias, model.c3.bias):
        assert dead(p[gone]) and int((p == 0).sum()) == 4
    table = sparsifier.report().set_index("layer")
    assert table.loc["stem", "coupled"] == "c2, c3" and table.loc["stem", "zeros"] == 4


def test_global_units_are_compared_by_their_axis_mean():
    model = make(Plain)
    with torch.no_grad():
        model.a.weight.mul_(100)  # a layer of large weights must not be spared for it
    scores = []
    for m in (model.a, model.b, model.fc1):
        s = m.weight.detach().abs().flatten(1).mean(1)
        scores.append(s / s.mean())
    flat = torch.cat(scores)
    gone = set(flat.argsort(stable=True)[: round(0.4 * len(flat))].tolist())
    Sparsifier(model, "filter", "global", example_inputs=images()).sparsify_model(0.4)
    zero = torch.cat([(m.weight.flatten(1) == 0).all(1) for m in (model.a, model.b, model.fc1)])
    assert set(zero.nonzero().flatten().tolist()) == gone
    again = make(Plain)
    with torch.no_grad():
        again.a.weight.mul_(100)
    summed = large_final.reduced_by("sum")
    Sparsifier(again, "filter", "global", summed, example_inputs=images()).sparsify_model(0.4)
    raw = torch.cat(
        [m.weight.detach().abs().flatten(1).sum(1) for m in (again.a, again.b, again.fc1)]
    )
    assert int((raw == 0).sum()) == round(0.4 * len(raw))
    assert not (again.a.weight.flatten(1) == 0).all(1).any()  # raw sums do spare it


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize("final", [0.0, 0.01, 0.5, 0.99])
def test_zeros_hold_and_counts_are_exact_at_every_step(optimizer, context, granularity, final):
    model = make(Depthwise).train()
    step = OPTIMIZERS[optimizer](model.parameters())
    sparsifier = Sparsifier(model, granularity, context, example_inputs=images())
    free = sparsifier.report().set_index("layer")["groups"]
    for t in range(12):
        if t % 3 == 0:
            sparsifier.sparsify_model(final * (t + 3) / 12)
            table = sparsifier.report().set_index("layer")
            for layer in free.index[:-1]:
                if context == "local" and free[layer]:
                    n = min(round(final * (t + 3) / 12 * free[layer]), free[layer] - 1)
                    assert table.loc[layer, "zeros"] == n
            asked = round(final * (t + 3) / 12 * free["total"])
            layers = int((free.iloc[:-1] > 0).sum())
            if context == "global":
                assert table.loc["total", "zeros"] == min(asked, free["total"] - layers)
        loss_of(model(images(4, seed=t))).backward()
        step.step()
        step.zero_grad()
        sparsifier.apply()
        for name, mask in sparsifier.masks.items():
            p = dict(model.named_parameters())[name]
            assert mask.dtype == torch.uint8 and mask.shape == p.shape
            assert dead(p[mask == 0])
            assert p[mask == 1].count_nonzero() > 0.9 * int(mask.sum())


@pytest.mark.parametrize("criteria", [large_final, random_scores])
def test_zero_sparsity_trains_like_no_sparsifier(criteria):
    runs = []
    for used in (False, True):
        model = make(Gated).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        torch.manual_seed(0)
        if used:
            sparsifier = Sparsifier(model, "filter", criteria=criteria, example_inputs=images())
            sparsifier.sparsify_model(0.0)
        for _ in range(4):
            F.dropout(model(images(4)), 0.5).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if used:
                sparsifier.apply()
        runs.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())


def test_what_is_zero_stays_zero():
    model = make(Plain)
    Sparsifier(model, "kernel", example_inputs=images()).sparsify_model(0.5)
    zero = model.b.weight == 0
    other = Sparsifier(model, "kernel", criteria=random_scores, example_inputs=images())
    other.sparsify_model(0.25)
    assert torch.equal(model.b.weight == 0, zero)
    table = other.report().set_index("layer")
    assert table.loc["b", "limit"] == "held" and table.loc["b", "n"] == 24
    other.sparsify_model(0.75)
    assert (model.b.weight == 0)[zero].all()
    assert other.report().set_index("layer").loc["b", "zeros"] == 72


def test_other_parameters_than_it_knows_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsifier = Sparsifier(model, layers=nn.Linear)
    sparsifier.sparsify_model(0.5)
    other = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(other)
    sparsifier.apply()
    assert int((model[0].weight == 0).sum()) == 8
    model.load_state_dict(other, assign=True)
    with pytest.raises(RuntimeError, match="is another parameter than when"):
        sparsifier.apply()
    assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_weights(dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(dtype)
    before = model[0].weight.detach().clone()
    sparsifier = Sparsifier(model, layers=["0"])
    sparsifier.sparsify_model(0.5)
    gone = before.abs().flatten().argsort()[:16]
    expected = before.flatten().index_fill(0, gone, 0).view_as(before)
    assert torch.equal(model[0].weight, expected)
    with torch.no_grad():
        model[0].weight.fill_(-1 - 1j)
    sparsifier.apply()
    assert torch.equal(model[0].weight == 0, expected == 0)


@pytest.mark.parametrize("criterion", [grad_crit, snip], ids=lambda c: c.name)
def test_sparse_gradients(criterion):
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(10, 8, sparse=sparse)
        model = nn.Sequential(table, nn.Linear(8, 3))
        sparsifier = Sparsifier(model, criteria=criterion, layers=["0"])
        model(torch.tensor([1, 1, 4])).square().sum().backward()
        sparsifier.sparsify_model(0.9)
        found.append(table.weight.detach().clone())
    assert torch.equal(*found) and found[0][4].any()


def test_a_layer_initialised_with_zeros_is_not_held():
    model = make(Plain)
    nn.init.zeros_(model.b.weight)
    sparsifier = Sparsifier(model, "weight", example_inputs=images())
    assert int(sparsifier.masks["b.weight"].sum()) == model.b.weight.numel()


def test_sparsity_by_layer():
    model = make(Plain)
    sparsifier = Sparsifier(model, "weight", example_inputs=images())
    sparsifier.sparsify_model({"a": 0.5, "fc1": 0.25})
    zeros = {n: int((m.weight == 0).sum()) for n, m in layers_of(model).items()}
    assert zeros == {"a": 108, "b": 0, "fc1": 480}
    with pytest.raises(ValueError, match="no layer 'fc3'; did you mean"):
        sparsifier.sparsify_model({"fc3": 0.5})
    with pytest.raises(ValueError, match="network output"):
        sparsifier.sparsify_model({"fc2": 0.5})
    with pytest.raises(ValueError, match="sparsity of 'a'.*pass 0.4"):
        sparsifier.sparsify_model({"a": 40})
    with pytest.raises(ValueError, match="context='local'"):
        Sparsifier(model, "weight", "global", example_inputs=images()).sparsify_model({"a": 0.5})
    residual = make(Residual)
    units = Sparsifier(residual, "filter", example_inputs=images())
    with pytest.raises(ValueError, match="coupled and need one sparsity"):
        units.sparsify_model({"stem": 0.5, "c2": 0.25})
    units.sparsify_model({"c2": 0.5})
    assert int((residual.stem.weight.flatten(1) == 0).all(1).sum()) == 4


def test_layers_and_exclude():
    model = make(Residual)
    only = Sparsifier(model, "weight", layers=["c1", nn.Linear], example_inputs=images())
    assert set(only.masks) == {"c1.weight", "head.weight"}
    most = Sparsifier(model, "weight", exclude=["c1"], example_inputs=images())
    assert set(most.masks) == {"stem.weight", "c2.weight", "c3.weight"}
    units = Sparsifier(model, "filter", exclude="c2", example_inputs=images())
    assert set(units.masks) == {"c1.weight", "bn1.weight", "bn1.bias"}
    assert "coupled to 'c2'" in units.skipped["stem"]
    with pytest.raises(
        ValueError, match="layers: the model has no layer 'stm'; did you mean 'stem'"
    ):
        Sparsifier(model, layers="stm")
    with pytest.raises(TypeError, match="exclude takes module names and types"):
        Sparsifier(model, exclude=[3])


def test_frozen_layers_do_not_count():
    model = make(Residual)
    model.c2.weight.requires_grad_(False)
    units = Sparsifier(model, "filter", example_inputs=images())
    assert "frozen" in units.skipped["stem"] and 0 < units.frozen_share < 1
    weights = Sparsifier(model, "weight", example_inputs=images())
    assert weights.skipped["c2"].startswith("frozen")
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to sparsify.*frozen"):
        Sparsifier(model, "weight", example_inputs=images())


def test_floors_and_multiples_are_reported():
    model = make(Plain)
    sparsifier = Sparsifier(model, "filter", min_keep=3, round_to=4, example_inputs=images())
    sparsifier.sparsify_model(0.9)
    table = sparsifier.report().set_index("layer")
    assert table.loc[["a", "b", "fc1"], "zeros"].tolist() == [4, 8, 6]
    assert table.loc["a", "n"] == 7 and table.loc["a", "limit"] == "min_keep, round_to"
    assert table.loc["total", "zeros"] == 18


def test_report_counts_weights_parameters_and_macs():
    model = make(Plain)
    sparsifier = Sparsifier(model, "filter", example_inputs=images())
    sparsifier.sparsify_model(0.5)
    row = sparsifier.report().set_index("layer").loc["b"]
    assert (row["weights"], row["zero_weights"]) == (12 * 8 * 9, 6 * 8 * 9)
    assert (row["parameters"], row["zero_parameters"]) == (12 * 73, 6 * 73)
    assert (row["macs"], row["zero_macs"]) == (12 * 8 * 9 * 64, 6 * 8 * 9 * 64)


def test_the_output_layer_is_the_one_that_runs_last():
    sparsifier = Sparsifier(make(TwoHeads), "weight", example_inputs=images())
    assert sparsifier.skipped == {"boxes": "network output", "classes": "network output"}
    assert "never" in Sparsifier(make(TwoHeads), "filter", example_inputs=images()).skipped
    chain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert set(Sparsifier(chain).masks) == {"0.weight"}  # without inputs, the last registered


def test_inputs_are_guessed_for_images_only():
    Sparsifier(make(Residual), "filter")
    with pytest.raises(ValueError, match="needs example_inputs"):
        Sparsifier(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "filter")
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    with pytest.raises(ValueError, match="pass example_inputs"):
        Sparsifier(fixed, "filter")
    Sparsifier(fixed, "weight")


def test_halves_of_a_chunk_lose_equally_many_the_weakest_of_each():
    model = make(Parted)
    norms = model.b.weight.detach().abs().mean((1, 2, 3))
    sparsifier = Sparsifier(model, "filter", example_inputs=images())
    for share, n in ((0.25, 1), (0.5, 2), (0.75, 3)):
        sparsifier.sparsify_model(share)
        zero = (model.b.weight.flatten(1) == 0).all(1)
        for half in (slice(0, 4), slice(4, 8)):
            weakest = norms[half].argsort(stable=True)[:n]
            assert set(zero[half].nonzero().flatten().tolist()) == set(weakest.tolist())
    table = sparsifier.report().set_index("layer")
    assert table.loc["b", ["groups", "n", "zeros"]].tolist() == [4, 3, 3]


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    sparsifier = Sparsifier(model, example_inputs=torch.randn(2, 6))
    sparsifier.sparsify_model(0.5)
    assert list(sparsifier.masks) == ["0.weight"]
    assert int((model[0].weight == 0).sum()) == 18


def test_a_weight_is_left_alone_where_one_of_its_layers_is():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    for name in ("0", "2"):
        with pytest.raises(ValueError, match="nothing to sparsify"):
            Sparsifier(model, exclude=(name, "3"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"granularity": "filtre"}, "did you mean 'filter'"),
        ({"context": "globl"}, "context must be"),
        ({"min_keep": -1}, "min_keep"),
        ({"round_to": 0}, "round_to"),
        ({"granularity": "kernel", "layers": nn.Linear}, "Linear has no granularity 'kernel'"),
        ({"layers": nn.BatchNorm2d}, "nothing to sparsify"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sparsifier(make(Plain), example_inputs=images(), **arguments)


@pytest.mark.parametrize("sparsity", [40, -0.1, float("nan"), "0.5", None])
def test_bad_sparsity_changes_nothing(sparsity):
    model = make(Plain)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, TypeError), match="fraction in"):
        Sparsifier(model, example_inputs=images()).sparsify_model(sparsity)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nan_weights_are_refused_by_name_and_nothing_changes():
    model = make(Mlp)
    with torch.no_grad():
        model.b.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    sparsifier = Sparsifier(model, example_inputs=images())
    with pytest.raises(ValueError, match="nan for b.weight"):
        sparsifier.sparsify_model(0.5)
    assert all(
        torch.equal(
            v,
            before[k],
        )
        or k == "b.weight"
        for k, v in model.state_dict().items()
    )


def test_channels_last_and_half():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = make(Residual, torch.float32).to(dtype).to(memory_format=torch.channels_last)
        sparsifier = Sparsifier(
            model, "weight", layers=["c1", "c2"], example_inputs=images(dtype=dtype)
        )
        sparsifier.sparsify_model(0.5)
        assert int((model.c1.weight == 0).sum()) == 8 * 16 * 9 // 2
        assert model.c1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("granularity", ["layer", "kernel", "weight", "filter"])
@pytest.mark.parametrize("criteria", [large_final, small_final, random_scores])
def test_a_layer_that_goes_as_a_whole_stays_at_zero_and_is_counted(granularity, criteria):
    model = make(Plain)
    layers = [model.a.weight, model.b.weight]
    sparsifier = Sparsifier(
        model,
        granularity,
        "global",
        criteria,
        layers=nn.Conv2d,
        min_keep=0,
        example_inputs=images(),
    )
    gone = [False, False]
    for sparsity in (0.5, 0.9, 1.0):
        sparsifier.sparsify_model(sparsity)
        now = [dead(w) for w in layers]
        assert all(a <= b for a, b in zip(gone, now, strict=True))
        gone = now
        total = sparsifier.report().set_index("layer").loc["total"]
        assert total["zeros"] == total["n"]
    assert all(gone)


class Words(nn.Module):
    """A language model: the decoder has the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.again, self.decoder = nn.Linear(8, 8), nn.Linear(8, 20)
        self.again.weight, self.decoder.weight = self.inner.weight, self.words.weight

    def forward(self, tokens):
        return self.decoder(F.relu(self.again(F.relu(self.inner(self.words(tokens))))))


@pytest.mark.parametrize("granularity", ["weight", "row", "2:4", "filter"])
def test_tied_weights(granularity):
    model, tokens = Words(), torch.arange(6).view(2, 3)
    sparsifier = Sparsifier(model, granularity, example_inputs=tokens)
    sparsifier.sparsify_model(0.5)
    table = sparsifier.report().set_index("layer")
    assert table.loc["again", "limit"] == "its weight is that of 'inner'"
    if granularity == "filter":
        assert table.loc["decoder", "limit"] == "its weight is that of 'words'"
    else:
        assert table.loc["decoder", "limit"] == "network output" and model.decoder.weight.all()
        assert int((model.inner.weight == 0).sum()) == 32
        with pytest.raises(ValueError, match="its weight is that of 'inner'"):
            sparsifier.sparsify_model({"again": 0.5})


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.by


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.scale, self.fc = nn.Linear(4, 8), Scale(), nn.Linear(8, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        return self.out(self.fc(self.scale(self.first(x))).relu())


def test_named_layers_without_groups_are_told(recwarn):
    model, x = Scaled(), torch.randn(2, 4)
    kinds = [name for name, _ in model.named_modules() if name]
    with pytest.warns(UserWarning, match="nothing of 'scale' can be sparsified by 'weight'"):
        sparsifier = Sparsifier(model, layers=kinds, example_inputs=x)
    assert "scale" not in sparsifier.report()["layer"].tolist()
    recwarn.clear()
    Sparsifier(model, "filter", layers=["first", "fc"], example_inputs=x)
    Sparsifier(model, layers=["fc"], example_inputs=x)
    assert not recwarn


def test_layers_that_are_coupled_are_named():
    model = make(Residual)
    with pytest.raises(NothingToSparsify, match="coupled to .* which must be chosen") as told:
        Sparsifier(model, "filter", layers=["c2"], example_inputs=images(1))
    assert "c2: coupled to 'stem', 'c3'," in str(told.value)
    again = pickle.loads(pickle.dumps(told.value))
    assert str(again) == str(told.value) and again.frozen is False


def test_norms_are_no_layers_to_sparsify():
    sparsifier = Sparsifier(make(Residual), "filter", example_inputs=images(1))
    norms = [k for k, m in make(Residual).named_modules() if isinstance(m, nn.BatchNorm2d)]
    with pytest.raises(ValueError, match="no layer .* that can be sparsified"):
        sparsifier.sparsify_model({norms[0]: 0.5})
