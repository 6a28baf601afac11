"""Products of smaller layers: exact at full rank, as close as can be below, within the budget."""

import copy

import pytest
import torch
from networks import Plain, Residual, TwoHeads, apart, images, make
from torch import nn

from fasterai.deploy.low_rank import factored, low_rank

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
    layer = nn.Linear(*sizes, bias=bias).double()
    values = torch.linalg.svdvals(layer.weight.detach())
    for rank in range(1, min(sizes) + 1):
        small = factored(layer, rank)
        product = (small[1].weight @ small[0].weight).detach()
        best = values[rank:].square().sum().sqrt()  # Eckart and Young
        assert float((product - layer.weight).norm()) == pytest.approx(float(best), abs=1e-12)
        assert (small[0].bias is None) and (small[1].bias is not None) == bias
        x = torch.randn(3, sizes[0], dtype=torch.float64)
        bound = torch.linalg.norm(product - layer.weight, 2) * x.norm(dim=1).max()
        assert float((small(x) - layer(x)).detach().norm(dim=1).max()) <= float(bound) + 1e-12


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
