"""Products of smaller layers: exact at full rank, as close as can be below, within the budget."""

import copy
import itertools
import warnings

import pytest
import torch
from networks import Plain, Residual, TwoHeads, apart, images, make
from torch import nn

from fasterai.core.target import Target
from fasterai.deploy.export import export_onnx
from fasterai.deploy.low_rank import factored, low_rank
from fasterai.measure.profile import compare, macs
from fasterai.prune.budget import UnreachableTarget
from fasterai.prune.pruner import Pruner

CONVS = [
    (nn.Conv1d(6, 9, 3, padding=1), (6, 9)),
    (nn.Conv2d(3, 40, 3, stride=2, padding="valid", dilation=2), (3, 40)),
    (nn.Conv2d(8, 5, (3, 2), padding=1, padding_mode="circular", bias=False), (8, 5)),
    (nn.Conv3d(4, 6, 2), (4, 6)),
    (nn.Conv2d(6, 9, 1, stride=2, padding=1), (6,)),
]


def inputs_of(conv):
    return torch.randn(2, conv.in_channels, *[9] * (conv.weight.ndim - 2), dtype=torch.float64)


@pytest.mark.parametrize("conv, ranks", CONVS, ids=str)
def test_convs_are_exact_at_full_rank(conv, ranks):
    conv = copy.deepcopy(conv).double()
    x = inputs_of(conv)
    small = factored(conv, *ranks)
    assert len(small) == len(ranks) + 1
    assert apart(conv(x), small(x)) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(12, 7), (7, 12), (5, 5)])
def test_linear_layers_are_as_close_as_any_of_that_rank(sizes, bias):
    torch.manual_seed(0)
    layer = nn.Linear(*sizes, bias=bias).double().requires_grad_(False)
    values = torch.linalg.svdvals(layer.weight.detach())
    for rank in range(1, min(sizes) + 1):
        small = factored(layer, rank)
        product = small[1].weight @ small[0].weight
        best = values[rank:].square().sum().sqrt()  # Eckart and Young
        assert float((product - layer.weight).norm()) == pytest.approx(float(best), abs=1e-12)
        assert (small[0].bias is None) and (small[1].bias is not None) == bias
        x = torch.randn(3, sizes[0], dtype=torch.float64)
        bound = torch.linalg.norm(product - layer.weight, 2) * x.norm(dim=1).max()
        assert float((small(x) - layer(x)).norm(dim=1).max()) <= float(bound) + 1e-12


def unfolded(weight, dim):
    return torch.linalg.svdvals(weight.detach().movedim(dim, 0).flatten(1)).square()


def whole(small):
    """The weight that a product of a 1x1 conv, a conv and a 1x1 conv amounts to."""
    a, b, c = (part.weight.detach().flatten(2) for part in small)
    return torch.einsum("or,rsk,si->oik", c[..., 0], b, a[..., 0])


def test_convs_come_closer_than_one_truncation_of_each_side():
    torch.manual_seed(0)
    conv = nn.Conv2d(10, 12, 3).double()
    for ranks in ((1, 1), (4, 5), (9, 3), (10, 12)):
        lost = (whole(factored(conv, *ranks)) - conv.weight.detach().flatten(2)).square().sum()
        sides = [
            unfolded(conv.weight, 1)[ranks[0] :].sum(),
            unfolded(conv.weight, 0)[ranks[1] :].sum(),
        ]
        assert float(max(sides)) - 1e-12 <= float(lost) <= float(sum(sides)) + 1e-12


def test_a_conv_of_low_rank_is_found():
    torch.manual_seed(0)
    slim = nn.Sequential(
        nn.Conv2d(16, 3, 1, bias=False), nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 20, 1)
    ).double()
    conv = nn.Conv2d(16, 20, 3).double()
    conv.weight = nn.Parameter(whole(slim).view(20, 16, 3, 3).detach())
    conv.bias = slim[2].bias
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    assert apart(slim(x), factored(conv, 3, 4)(x)) < 1e-12
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(320, 5).double())
    small, table = low_rank(model, x, 0.1, layers="0")
    assert table["rank"][0] == (3, 4) or table["error"][0] < 1e-7
    assert apart(model(x), small(x)) < 1e-6


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("kind", [Plain, Residual, TwoHeads])
def test_networks_stay_within_the_budget(kind, share):
    model, x = make(kind), images(2)
    before = copy.deepcopy(model.state_dict())
    small, table = low_rank(model, x, share)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    heads = {"Plain": {"fc2"}, "Residual": {"head"}, "TwoHeads": {"boxes", "classes"}}
    assert not heads[kind.__name__] & set(table["layer"])
    done = table[table["reason"] == ""]
    for _, row in done.iterrows():
        layer, new = model.get_submodule(row["layer"]), small.get_submodule(row["layer"])
        assert sum(m.weight.numel() for m in new) <= share * layer.weight.numel()
        assert row["params_after"] == sum(p.numel() for p in new.parameters())
        assert row["params_before"] == sum(p.numel() for p in layer.parameters())
        assert 0 <= row["error"] < 1
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert more == int((done["params_before"] - done["params_after"]).sum())
    out = small.train()(images(4))
    sum(o.sum() for o in (out.values() if isinstance(out, dict) else [out])).backward()


def test_the_ranks_are_the_best_that_the_budget_allows():
    """Against all pairs that fit, by what each side loses."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3).double()
    model = nn.Sequential(conv, nn.Conv2d(7, 2, 1).double())
    for share in (0.2, 0.5, 0.8):
        _, table = low_rank(model, torch.randn(1, 5, 8, 8).double(), share)
        fits = [
            (float(unfolded(conv.weight, 1)[i:].sum() + unfolded(conv.weight, 0)[o:].sum()), (i, o))
            for i in range(1, 6)
            for o in range(1, 8)
            if 5 * i + 9 * i * o + 7 * o <= share * conv.weight.numel()
        ]
        assert table["rank"][0] == min(fits)[1]


# --- one budget for all layers -------------------------------------------------------------------


def decaying(out, inside, decay):
    """A linear layer whose singular values fall by that factor."""
    layer = nn.Linear(inside, out, bias=False).double()
    left, _, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    values = decay ** torch.arange(min(out, inside), dtype=torch.float64)
    layer.weight = nn.Parameter(left @ torch.diag(values) @ right)
    return layer


def losses(layer):
    """What a linear layer costs and loses at each rank that saves something, and whole."""
    values = torch.linalg.svdvals(layer.weight.detach()).square()
    out, inside = layer.weight.shape
    ranks = [r for r in range(1, len(values)) if r * (out + inside) < out * inside]
    lost = [(r * (out + inside), float(values[r:].sum() / values.sum()), r) for r in ranks]
    return [*lost, (out * inside, 0.0, None)]


def best(layers, budget):
    """The least that can be lost in all, of all combinations."""
    every = itertools.product(*map(losses, layers))
    return min(sum(x[1] for x in some) for some in every if sum(x[0] for x in some) <= budget)


def energy(table):
    """What is lost in all."""
    return float((table["error"].fillna(0) ** 2).sum())


@pytest.mark.parametrize("share", [0.2, 0.3, 0.45, 0.6, 0.8, 1.0])
def test_no_other_ranks_lose_less(share):
    """Against all combinations."""
    torch.manual_seed(0)
    shapes = [(16, 16, 0.5), (16, 16, 0.8), (16, 16, 0.95), (8, 16, 0.9), (24, 8, 0.6)]
    layers = [decaying(*shape) for shape in shapes]
    model, x = nn.Sequential(*layers, nn.Linear(24, 2)).double(), torch.randn(2, 16).double()
    _, table = low_rank(model, x, share, context="global")
    budget = share * sum(layer.weight.numel() for layer in layers)
    assert table["params_after"].sum() <= budget
    assert energy(table) == pytest.approx(best(layers, budget), abs=1e-9)


def test_large_budgets_are_counted_in_larger_units(monkeypatch):
    """Coarse ones here: hardly more may be lost, and a share of 1 keeps all."""
    torch.manual_seed(0)
    layers = [decaying(16, 16, decay) for decay in (0.5, 0.7, 0.8, 0.9, 0.95)]
    model, x = nn.Sequential(*layers, nn.Linear(16, 2)).double(), torch.randn(2, 16).double()
    monkeypatch.setattr("fasterai.deploy.ranks._UNITS", 60)
    for share in (0.3, 0.5, 0.7, 0.9, 1.0):
        _, table = low_rank(model, x, share, context="global")
        assert table["params_after"].sum() <= share * 5 * 256
        assert energy(table) <= best(layers, (share - 0.05 * (share < 1)) * 5 * 256) + 1e-9


def weights(model, names):
    parts = [m for name in names for m in model.get_submodule(name).modules()]
    return sum(m.weight.numel() for m in parts if hasattr(m, "weight"))


def test_a_share_for_all_loses_less_than_that_share_of_each():
    model, x = make(Residual), images(2)
    for share in (0.3, 0.6):
        _, each = low_rank(model, x, share)
        small, together = low_rank(model, x, share, context="global")
        names = each["layer"].tolist()
        assert weights(small, names) <= share * weights(model, names)
        assert energy(together) < energy(each)


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("kind", [Plain, Residual, TwoHeads])
def test_budgets_of_macs(kind, context):
    """Strided convs read more places than they write."""
    model, x = make(kind), images(2)
    dense = macs(model, x)
    for share in (0.4, 0.8):
        small, table = low_rank(model, x, share, of="macs", context=context)
        table = table[table["reason"].isin(["", "the budget is enough for it as it is"])]
        left = macs(small, x)
        counted = [left[name] / dense[name] for name in table["layer"]]
        total = sum(left[n] for n in table["layer"]) / sum(dense[n] for n in table["layer"])
        assert len(table) and total <= share
        if context == "local":
            assert max(counted) <= share
        assert left[""] < dense[""]


def test_a_budget_that_cannot_be_kept_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="a share of 0.4 cannot be reached: .* 0.500 remain"):
        low_rank(model, x, 0.4, context="global")
    assert set(low_rank(model, x, 0.5, context="global")[1]["rank"]) == {1}
    with pytest.raises(ValueError, match="'weights' or 'macs', got 'flops'"):
        low_rank(model, x, 0.5, of="flops")
    with pytest.raises(ValueError, match="'local' or 'global', got 'all'"):
        low_rank(model, x, 0.5, context="all")


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        nn.init.zeros_(self.a.weight)

    def forward(self, x):
        return self.c(self.a(x))


def test_layers_without_energy_and_layers_that_do_not_run():
    x = torch.randn(2, 8)
    small, table = low_rank(Unused(), x, 0.5, of="macs", context="global")
    assert table["rank"][0] == 1 and table["error"][0] == 0
    assert table["reason"][1] == "it did not run on the example inputs"
    assert low_rank(Unused(), x, 0.5)[1]["reason"].tolist() == ["", ""]


def test_pruned_networks_go_on_to_other_runtimes(tmp_path):
    model, x = make(Residual), images(2)
    Pruner(model, x).prune_model(0.5)
    small, table = low_rank(model, x, 0.6, context="global")
    assert (table["reason"] == "").any()
    costs = compare({"pruned": model, "low rank": small}, x, seconds=0.01)
    assert costs.loc["low rank", "parameters"] < costs.loc["pruned", "parameters"]
    assert costs.loc["low rank", "parameters"] == sum(p.numel() for p in small.parameters())
    assert export_onnx(small, x, tmp_path / "a.onnx") < 1e-4


class Peeking(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x)) * self.a.in_features)


def test_what_must_stay_is_named():
    x = torch.randn(2, 8)
    small, table = low_rank(Peeking(), x, 0.5)
    assert type(small.a) is nn.Linear and type(small.b) is nn.Sequential
    assert "without it the network breaks" in table["reason"][0]
    _, table = low_rank(Peeking(), x, 0.5, context="global")  # that of the other layer alone
    assert "without it" in table["reason"][0] and table["rank"][1] == 2
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    tied[1].weight = tied[0].weight
    assert set(low_rank(tied, x, 0.5)[1]["reason"]) == {"it shares a parameter with another layer"}
    convs = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ConvTranspose2d(4, 4, 2),
        nn.Conv2d(4, 2, 3),
        nn.Conv2d(2, 2, 3),
    )
    _, table = low_rank(convs, torch.randn(1, 4, 12, 12), 0.05)
    assert table["reason"].tolist() == [
        "it has groups",
        "ConvTranspose2d is no plain linear layer or conv",
        "no product of smaller layers is that small",
    ]


@pytest.mark.parametrize("context", ["local", "global"])
def test_layers_whose_numbers_have_no_such_product_stay(context):
    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.complex = nn.Linear(8, 8, dtype=torch.complex64)
            self.real, self.nan = nn.Linear(8, 8), nn.Linear(8, 8)
            self.inf = nn.Conv1d(8, 8, 3)
            with torch.no_grad():
                self.nan.weight[2, 3], self.inf.weight[1, 2, 0] = torch.nan, torch.inf
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is nothing to initialise
                self.none = nn.Linear(8, 0)

        def forward(self, x):
            x = self.real(self.complex(x.to(torch.complex64)).real)
            return x, self.nan(x), self.inf(x.t()), self.none(x)

    layers = ["complex", "real", "nan", "inf", "none"]
    small, table = low_rank(Numbers(), torch.randn(4, 8), 0.5, layers=layers, context=context)
    assert table.set_index("layer")["reason"].to_dict() == {
        "complex": "its weights are complex numbers",
        "real": "",
        "nan": "some of its weights are inf or nan",
        "inf": "some of its weights are inf or nan",
        "none": "it has no weights",
    }
    assert small.complex.weight.is_complex() and type(small.real) is nn.Sequential


def test_layers_are_chosen_by_name_and_type():
    model, x = make(Plain), images(2)
    assert low_rank(model, x, 0.5, layers=nn.Conv2d)[1]["layer"].tolist() == ["a", "b"]
    assert low_rank(model, x, 0.5, layers=["fc2"])[1]["layer"].tolist() == ["fc2"]
    assert low_rank(model, x, 0.5, exclude="fc1")[1]["layer"].tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="fc3"):
        low_rank(model, x, 0.5, layers="fc3")
    with pytest.raises(ValueError, match="for 50% pass 0.5"):
        low_rank(model, x, 50)


def test_types_modes_and_random_numbers_stay():
    layer = nn.Linear(8, 6).bfloat16().eval()
    layer.weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    small = factored(layer, 2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert not small.training and not small[0].weight.requires_grad and small[1].bias.requires_grad


class Listed(nn.Module):
    """Runs layers from a plain list, which does not see what takes their place."""

    def __init__(self, size=32):
        super().__init__()
        self.a, self.b = nn.Linear(size, size), nn.Linear(size, size)
        self.own = [self.a]

    def forward(self, x):
        return self.b(self.own[0](x))


def test_a_layer_that_is_run_from_elsewhere_stays():
    model, x = Listed(), torch.randn(2, 32)
    small, table = low_rank(model, x, 0.5, layers=["a", "b"])
    assert "keeps the layer itself elsewhere" in table["reason"][0] and table["reason"][1] == ""
    assert type(small.a) is nn.Linear and type(small.b) is nn.Sequential


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("relative", [True, False])
def test_targets_are_those_of_the_whole_network(context, kind, relative):
    torch.manual_seed(0)
    model, x = make(Residual), images(3)

    def cost(network):
        if kind == "macs":
            return macs(network, x)[""]
        return sum(p.numel() for p in network.parameters())

    goal = 0.7 * cost(model)
    target = Target(**{kind: 0.7 if relative else float(int(goal))})
    small, _ = low_rank(model, x, target, context=context)
    assert 0.6 * goal < cost(small) <= goal
    with pytest.raises(UnreachableTarget) as raised:
        low_rank(model, x, Target(**{kind: 0.01}), context=context)
    assert 0.01 < raised.value.least < 1
    found = low_rank(model, x, Target(**{kind: raised.value.least}), context=context)[0]
    assert cost(found) == pytest.approx(raised.value.least * cost(model))
    with pytest.raises(UnreachableTarget):
        low_rank(model, x, Target(**{kind: raised.value.least * 0.999}), context=context)


@pytest.mark.parametrize("target", [Target(bytes=0.5), Target(macs=0.5, floors={"c1": 4})])
def test_targets_of_channels_are_refused(target):
    with pytest.raises(ValueError, match="counts macs or parameters"):
        low_rank(make(Residual), images(2), target)


class Queries(nn.Module):
    """Has a part that is made of weights alone, once for a batch."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.randn(100, 64))
        self.f, self.g, self.h = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x):
        return self.h(self.g(x) + self.f(self.p).mean(0))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("context", ["local", "global"])
def test_what_is_made_once_for_a_batch_counts_once(share, samples, context):
    torch.manual_seed(0)
    model, x = Queries(), torch.randn(samples, 64)
    small, _ = low_rank(model, x, Target(macs=share), context=context)
    rank = 12_800 / 413_824  # what one of the part that is made once costs
    assert share - rank < macs(small, x)[""] / macs(model, x)[""] <= share


def test_a_layer_that_cannot_be_smaller_leaves_the_budget_to_others():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 2), nn.Linear(2, 8)),
        torch.rand(2, 64),
    )
    for share in (0.6, 0.5, 0.3, 0.1):
        small, _ = low_rank(model, x, Target(macs=share), layers=["0", "1"])
        assert share - 0.05 < macs(small, x)[""] / macs(model, x)[""] <= share
    alone = nn.Sequential(nn.Linear(4, 4))
    assert low_rank(alone, torch.rand(2, 4), Target(macs=1.0))[1].empty
    bare = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    assert low_rank(bare, torch.rand(2, 4), Target(macs=0.5))[1].empty


class Several(nn.Sequential):
    """Takes no single sample."""

    def forward(self, x):
        assert len(x) > 1
        return super().forward(x)


@pytest.mark.parametrize("relative", [True, False])
def test_a_network_that_takes_no_single_sample_has_the_same_targets(relative):
    torch.manual_seed(0)
    model, x = Several(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(4, 32)
    dense = macs(model, x)[""]
    small, _ = low_rank(model, x, Target(macs=0.5 if relative else dense / 2), context="global")
    assert 0.4 < macs(small, x)[""] / dense <= 0.5
    with pytest.raises(UnreachableTarget) as raised:
        low_rank(model, x, Target(macs=0.01 if relative else 2.0))
    assert raised.value.least == pytest.approx(192 / dense if relative else 192)  # rank 1, and head
