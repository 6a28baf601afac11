"""Removal is exact, no network breaks, nothing is left behind."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from fastai.text.models.awdlstm import WeightDropout
from networks import (
    ALL,
    Gated,
    Parted,
    Plain,
    Residual,
    TwoHeads,
    apart,
    conv,
    images,
    make,
    shake,
    size,
)
from torch import nn

from fasterai.core.criteria import random_scores, squared_final
from fasterai.coupling.couple import couple
from fasterai.coupling.inputs import Inputs
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier

EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}


def free_units(model):
    return sum(a.bundles for a in couple(model, Inputs.of(images(dtype=dtype_of(model)))).axes)


def dtype_of(model):
    return next(model.parameters()).dtype


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("kind", ALL)
def test_zeroed_units_are_removed_and_nothing_else_changes(kind, dtype):
    model = make(kind, dtype)
    x = images(dtype=dtype)
    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    dense = copy.deepcopy(model)
    keys, ids = list(model.state_dict()), [id(p) for p in model.parameters()]
    free = free_units(model)
    pruner = Pruner(model, x)
    assert pruner.prune_model() is model
    assert len(pruner.kept()) == 0
    gone = sum(a.before - a.after for a in pruner.plan.axes)
    assert (
        gone == sum(round(0.5 * len(a.free)) for a in couple(dense, Inputs.of(x)).axes) > 0.4 * free
    )
    for seed in range(3):
        other = images(3, 24 if kind is not Parted else 16, dtype, seed)
        assert apart(dense(other), model(other)) < EXACT[dtype]
    assert pruner.max_rel_diff < EXACT[dtype]
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == ids
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.training


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_ranked_units_are_removed_and_the_rest_computes_on(kind, context, sparsity):
    model = make(kind)
    dense, free = copy.deepcopy(model), free_units(model)
    axes = couple(model, Inputs.of(images())).axes
    pruner = Pruner(model, images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner.prune_model(sparsity, context=context)
    gone = [x.before - x.after for x in pruner.plan.axes]
    assert all(n % a.blocks == 0 for n, a in zip(gone, axes, strict=True))
    bundles = [n // a.blocks for n, a in zip(gone, axes, strict=True)]
    most = [min(a.bundles, a.size // a.blocks - 1) for a in axes]
    if context == "local":
        expected = [
            min(round(sparsity * a.bundles), m) for a, m in zip(axes, most, strict=True) if m > 0
        ]
        assert [n for n, m in zip(bundles, most, strict=True) if m > 0] == expected
    else:
        assert sum(bundles) == min(round(sparsity * free), sum(m for m in most if m > 0))
    # An independent reference: in the dense network, whatever reads a removed channel ignores it.
    with torch.no_grad():
        state = dense.state_dict()
        for axis, cut in zip(axes, pruner.plan.axes, strict=True):
            slot = axis.having("produce")[0]
            kept = pruner.plan.kept.get(slot.parameter, {}).get(
                slot.dim, range(state[slot.parameter].shape[slot.dim])
            )
            lost = set(slot.unit.tolist()) - {
                int(u) for i, u in zip(slot.index, slot.unit, strict=True) if int(i) in set(kept)
            }
            assert len(lost) == cut.before - cut.after
            for s in axis.having("consume"):
                where = [int(i) for i, u in zip(s.index, s.unit, strict=True) if int(u) in lost]
                state[s.parameter].index_fill_(s.dim, torch.tensor(where, dtype=torch.long), 0)
    other = images(3, 16, seed=7)
    assert apart(dense(other), model(other)) < 1e-5
    out = model.train()(images(4))
    sum(o.square().mean() for o in (out.values() if isinstance(out, dict) else [out])).backward()
    never = {"never.weight", "never.bias"}
    assert all(p.grad is not None for n, p in model.named_parameters() if n not in never)


def test_parameter_arithmetic_is_exact():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, bias=False)
    )
    before = size(model)
    pruner = Pruner(model, images())
    pruner.prune_model(5 / 16)
    assert before - size(model) == 5 * (9 * 3 + 1 + 2 + 9 * 8)
    assert pruner.plan.parameters_before == before and pruner.plan.parameters_after == size(model)
    table = pruner.report().set_index("layer")
    assert table.loc["0", ["in_before", "in_after", "out_before", "out_after"]].tolist() == [
        3,
        3,
        16,
        11,
    ]
    assert table.loc["total", "params_after"] == size(model)
    assert table.loc["3", "macs_after"] == 11 * 8 * 9 * 12 * 12


def test_layers_in_layers_cost_once():
    lstm = WeightDropout(nn.LSTM(6, 4, batch_first=True), 0.5)
    model = nn.ModuleDict({"words": nn.Embedding(9, 6), "rnn": lstm, "fc": nn.Linear(4, 2)})
    model.forward = lambda x: model["fc"](model["rnn"](model["words"](x))[0])
    pruner = Pruner(model, torch.randint(9, (2, 5)))
    pruner.prune_model({"words": 0.5})
    table = pruner.report().set_index("layer")
    before, after = table.loc["total", ["macs_before", "macs_after"]]
    assert before == table["macs_before"][:-1].sum() == 5 * (16 * (6 + 4) + 4 * 2)
    assert after == table["macs_after"][:-1].sum() == 5 * (16 * (3 + 4) + 4 * 2)
    assert table.loc["rnn.module", ["in_before", "in_after", "out_after"]].tolist() == [6, 3, 4]
    assert table.loc["words", ["in_after", "out_before", "out_after"]].tolist() == [9, 6, 3]


def test_the_lowest_go_and_the_output_stays():
    model = make(Plain)
    rows = model.b.weight.detach().clone()
    columns, keep = (
        m.weight.detach().abs().mean((1, 2, 3)).argsort(stable=True)[n:].sort().values
        for m, n in ((model.a, 4), (model.b, 6))
    )
    Pruner(model, images()).prune_model(0.5)
    assert torch.equal(model.b.weight, rows[keep][:, columns])
    assert model.fc2.out_features == 5 and model.b.out_channels == 6
    squared = make(Plain)
    best = squared.a.weight.detach().square().mean((1, 2, 3)).argsort(stable=True)[4:].sort().values
    first = squared.a.weight.detach().clone()
    Pruner(squared, images()).prune_model(0.5, criteria=squared_final)
    assert torch.equal(squared.a.weight, first[best])


def test_integers_follow_the_tensors():
    for kind in ALL:
        model = make(kind)
        Pruner(model, images()).prune_model(0.5)
        for m in model.modules():
            if isinstance(m, nn.ConvTranspose2d):
                assert m.weight.shape[:2] == (m.in_channels, m.out_channels // m.groups)
            elif isinstance(m, nn.Conv2d):
                assert m.weight.shape[:2] == (m.out_channels, m.in_channels // m.groups)
            elif isinstance(m, nn.Linear):
                assert m.weight.shape == (m.out_features, m.in_features)
            elif isinstance(m, nn.BatchNorm2d):
                assert m.num_features == m.weight.numel() == m.running_mean.numel()


def test_a_norm_that_shifts_leaves_one_channel_for_all_constants():
    model = make(Residual)
    with torch.no_grad():
        model.c1.weight[:5] = 0
        model.bn1.bias[:2] = 0
        model.bn1.weight[:2] = 0
    dense = copy.deepcopy(model)
    pruner = Pruner(model, images())
    pruner.prune_model()
    kept = pruner.kept()
    # relu hides a negative constant; the others, which a padded conv reads, collapse into one
    shifts = (
        dense.bn1.bias
        - dense.bn1.running_mean * dense.bn1.weight / (dense.bn1.running_var + 1e-5).sqrt()
    )
    shifts = shifts.detach()
    loud = {u for u in range(5) if shifts[u] > 0}
    assert len(loud) > 1 and model.c1.out_channels == 16 - 5 + 1
    largest = max(loud, key=lambda u: float(shifts[u]))
    reason = "it stands in for other constant channels"
    assert kept.values.tolist() == [["c1", largest, reason]]
    assert apart(dense(images(seed=3)), model(images(seed=3))) < 1e-5


@pytest.mark.parametrize("size, left", [(1, 4), (3, 5)])
def test_sigmoid_of_zero_is_a_half_and_goes_into_the_bias_or_another_channel(size, left):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4, size)

        def forward(self, x):
            return self.b(torch.sigmoid(self.a(x)))

    model = Half().double()
    x = images(dtype=torch.float64)
    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    sparse, pruner = copy.deepcopy(model), Pruner(model, x)
    pruner.prune_model()
    assert model.a.out_channels == left and len(pruner.kept()) == left - 4
    other = images(size=21, dtype=torch.float64)
    assert apart(sparse(other), model(other)) < 1e-14


def test_a_constant_that_something_else_reads_stays():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4, 1)

        def forward(self, x):
            x = torch.sigmoid(self.a(x))
            return self.b(x) * x.sum(1, keepdim=True)

    model = Summed()
    Sparsifier(model, "filter", example_inputs=images()).sparsify_model(0.5)
    pruner = Pruner(model, images())
    with pytest.warns(UserWarning, match="nothing was removed: see kept()"):
        pruner.prune_model()
    assert len(pruner.kept()) == 4 and model.a.out_channels == 8
    assert pruner.kept()["reason"].str.contains("constant 0.5").all()


def test_fresh_zeros_are_not_pruned_ones():
    model = make(Plain)
    nn.init.zeros_(model.b.weight)
    pruner = Pruner(model, images())
    with pytest.warns(UserWarning, match="no whole channel is zero"):
        pruner.prune_model()
    assert model.b.out_channels == 12 and pruner.max_abs_diff == 0.0


class Fixed(nn.Module):
    """Widths written into the code: only running it shows that they cannot shrink."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), nn.Linear(8, 4)

    def forward(self, x):
        b = F.relu(self.b(F.relu(self.a(x))))
        return self.c(F.adaptive_avg_pool2d(F.pad(b, (0, 0, 0, 0, 1, 1)), 1).view(-1, 8))


class Counting(nn.Module):
    """The number of channels enters the result."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.c(F.relu(self.b(x)) + x.shape[1] ** 0.5)


class Peeking(nn.Module):
    """Values leave torch and come back."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.c(F.relu(self.b(x))) * max(x.flatten().tolist())


class Scaled(nn.Module):
    """A factor that code derives from the number of channels, as in attention."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(x / x.shape[1] ** 0.5)


def test_a_factor_that_follows_the_width_is_made_good():
    model, x = make(Scaled), images()
    sparse = copy.deepcopy(model)
    with torch.no_grad():
        for m in (model, sparse):
            m.a.weight[[1, 4, 6]] = 0
            m.a.bias[[1, 4, 6]] = 0
    rows = model.a.weight[[0, 2, 3, 5, 7]]
    Pruner(model, x).prune_model()
    assert torch.allclose(model.a.weight, rows * (5 / 8) ** 0.5)
    assert apart(sparse(images(3, seed=4)), model(images(3, seed=4))) < 1e-6


@pytest.mark.parametrize("kind, stays", [(Fixed, "b"), (Counting, "a"), (Peeking, "a")])
def test_what_only_the_numbers_show_is_taken_back_and_named(kind, stays):
    torch.manual_seed(0)
    model = kind().eval()
    expected = {"a": 8, "b": 6}
    pruner = Pruner(model, images())
    pruner.prune_model(0.5)
    widths = {name: getattr(model, name).out_channels for name in expected}
    assert widths == {n: w if n == stays else w // 2 for n, w in expected.items()}
    assert stays in set(pruner.kept()["layer"])
    model(images(3))


def test_an_interrupt_in_the_middle_changes_nothing(monkeypatch):
    model = make(Residual)
    pruner = Pruner(model, images())
    model(images(4)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    import fasterai.coupling.probe as room

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune_model(0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert model.c1.out_channels == 16 and pruner.plan is None


def test_plan_for_is_a_dry_run():
    model = make(Gated)
    before = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, images())
    plan = pruner.plan_for(0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert pruner.plan is None
    pruner.prune_model(0.5)
    assert pruner.plan == plan and size(model) == plan.parameters_after
    assert "removes" in repr(plan)


def test_pruning_again_goes_on_from_what_is_there():
    model = make(Residual)
    pruner = Pruner(model, images())
    pruner.prune_model(0.5)
    pruner.prune_model(0.5)
    assert model.stem.out_channels == 2 and model.c1.out_channels == 4
    assert pruner.report().set_index("layer").loc["stem", "out_before"] == 8
    Pruner(model, images()).prune_model(0.5)  # somebody else
    pruner.prune_model(0.5)
    assert model.c1.out_channels == 1 and model.c1.weight.shape[0] == 1


def test_floors_multiples_and_exclusion():
    model = make(Plain)
    Pruner(model, images()).prune_model(0.9, min_keep=3, round_to=4)
    assert (model.a.out_channels, model.b.out_channels, model.fc1.out_features) == (4, 4, 4)
    model = make(Residual)
    pruner = Pruner(model, images(), exclude="c2")
    pruner.prune_model(0.5)
    assert model.stem.out_channels == 8 and model.c1.out_channels == 8
    assert set(pruner.kept().query("layer == 'stem'")["reason"]) == {"excluded"}
    zero = make(Plain)
    Sparsifier(zero, "filter", example_inputs=images()).sparsify_model(0.5)
    pruner = Pruner(zero, images())
    pruner.prune_model(round_to=8)
    assert zero.a.out_channels == 8 and zero.b.out_channels == 8
    assert pruner.kept()["reason"].str.contains("round_to").sum() == 4 + 2 + 3


def test_the_last_graph_and_the_optimizer_survive_a_cut():
    model = make(Residual).train()
    loss = model(images(4)).sum()
    loss.backward()
    Pruner(model, images()).prune_model(0.5)
    assert all(p.grad is None for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    model(images(4)).square().sum().backward()  # while `loss` still holds the old graph
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert loss.grad_fn is not None


def test_a_pruned_model_is_a_model_like_any_other(tmp_path):
    model = make(Residual)
    Pruner(model, images()).prune_model(0.5)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(images()), model(images()))
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))
    exported = torch.export.export(model, (images(),)).module()
    assert torch.allclose(exported(images()), model(images()), atol=1e-6)


def test_channels_last_stays():
    model = make(Residual).to(memory_format=torch.channels_last)
    Pruner(model, images()).prune_model(0.5)
    assert model.c1.weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_layers_are_cut_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = conv(3, 8), conv(8, 8), conv(8, 4)
            self.c = conv(8, 8)
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))

    model = Tied()
    Pruner(model, images()).prune_model(0.5)
    assert model.b.weight is model.c.weight and model.b.weight.shape[:2] == (4, 4)
    assert model.c.in_channels == model.c.out_channels == 4


def test_two_inputs_and_keyword_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, left, right):
            return self.head(F.relu(self.a(left) + self.b(right)))

    left, right = torch.randn(3, 4), torch.randn(3, 6)
    for inputs in ((left, right), {"left": left, "right": right}):
        model = Two()
        Pruner(model, inputs).prune_model(0.5)
        assert model.a.out_features == model.b.out_features == 4


@pytest.mark.parametrize("sparsity", [40, -0.1, float("nan"), "0.5", True])
def test_bad_sparsity(sparsity):
    with pytest.raises((ValueError, TypeError), match="fraction in"):
        Pruner(make(Plain), images()).prune_model(sparsity)


def test_bad_arguments():
    with pytest.raises(ValueError, match="context must be"):
        Pruner(make(Plain), images()).prune_model(0.5, context="layer")
    with pytest.raises(ValueError, match="did you mean 'fc1'"):
        Pruner(make(Plain), images(), exclude="fc11")
    with pytest.raises(ValueError, match="Pass what its forward takes"):
        Pruner(make(Plain), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="are on meta, the model is on cpu"):
        Pruner(make(Plain), images().to("meta"))
    pruner = Pruner(make(Plain).to("meta"), images().to("meta"))
    assert len(pruner.axes()) == 4
    for sparsity in (None, 0.5):
        with pytest.raises(ValueError, match="no numbers to rank"):
            pruner.prune_model(sparsity)
    with pytest.raises(TypeError):
        Pruner(make(Plain), None)
    with pytest.raises(ValueError, match="nan for b.weight"):
        model = make(Plain)
        nn.init.constant_(model.b.weight, float("nan"))
        Pruner(model, images()).prune_model(0.5)


def test_unverified_cuts_are_still_replayed():
    model = make(TwoHeads)
    pruner = Pruner(model, images())
    pruner.prune_model(0.5, verify=False, criteria=random_scores)
    assert pruner.max_abs_diff is None and model.a.out_channels == 4


class Auxiliary(nn.Module):
    """A second head that only runs in training."""

    def __init__(self):
        super().__init__()
        self.body, self.head = conv(3, 8), nn.Linear(8, 4)
        self.aux, self.aux_norm, self.aux_head = conv(8, 6), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.body(x).relu()
        out = self.head(x.mean((2, 3)))
        if not self.training:
            return out
        return out, self.aux_head(self.aux_norm(self.aux(x)).relu().mean((2, 3)))


def test_what_only_runs_in_training_goes_where_it_is_silent_there():
    model, x = shake(make(Auxiliary)), images(4)

    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    sparse = copy.deepcopy(model)
    Pruner(model, x).prune_model()
    assert (model.body.out_channels, model.aux.out_channels) == (4, 3)
    assert apart(sparse(x), model(x)) < 1e-6
    before, after = sparse.train()(x), model.train()(x)
    assert max(map(apart, before, after)) < 1e-5
    with torch.no_grad():
        model.aux.weight[0] = 0  # without its norm it speaks: a shift is left
    with pytest.warns(UserWarning, match="nothing was removed"):
        Pruner(model, x).prune_model()


class Ordered(nn.Module):
    """Tells which of two sums is larger: the same one, in two orders, but for a tiny bit."""

    def __init__(self):
        super().__init__()
        self.make, self.read = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 1, 1, bias=False)
        self.weight = nn.Parameter(self.read.weight.detach()[0].clone())

    def forward(self, x):
        x = self.make(x).relu()
        return ((x * self.weight).sum(1, keepdim=True) + 1e-10 > self.read(x)).to(x.dtype)


def test_what_rounding_alone_reorders_is_compared_in_double():
    torch.manual_seed(0)
    model, x = Ordered(), images(2)
    alone = copy.deepcopy(model)
    with torch.no_grad():
        gone = alone.make.weight.flatten(1).abs().sum(1).argsort()[:16]
        alone.make.weight[gone], alone.make.bias[gone] = 0, 0
    pruner = Pruner(model, x)
    pruner.prune_model(0.5)
    assert model.make.out_channels == 16 and pruner.max_rel_diff < 1e-12
    assert torch.equal(model.double()(x.double()), alone.double()(x.double()))
