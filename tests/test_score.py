"""Criteria of data against brute force; what scoring leaves behind; scores in both halves."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from learners import learner
from networks import ALL, DEVICES, Depthwise, Plain, Residual, Reused, conv, images, make
from scoring import batches, loss_func, lowest
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai.core.criteria import (
    Criterion,
    fpgm,
    grad_crit,
    large_final,
    movement,
    norm_scale,
    snip,
)
from fasterai.core.schedule import lin, one_shot
from fasterai.coupling.couple import couple
from fasterai.coupling.inputs import Inputs
from fasterai.coupling.labels import CONSUME, PRODUCE, SCALE, SHIFT
from fasterai.prune.callback import PruneCallback
from fasterai.prune.pruner import Pruner
from fasterai.score import criteria as S
from fasterai.score.criteria import (
    apoz,
    mean_activation,
    obd,
    taylor,
    taylor_filter,
    taylor_maps,
    wanda,
)
from fasterai.score.inputs import InputNorms
from fasterai.score.score import score
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier

DATA = [taylor, taylor_filter, taylor_maps, obd, mean_activation, apoz, wanda]


def net(kind, dtype=torch.float64):
    return make(kind, dtype)


def scores(model, criteria, data=None, **kwargs):
    kwargs = {"loss_func": loss_func, "progress": False, **kwargs}
    return score(model, batches() if data is None else data, criteria, **kwargs)


def found(criterion, model, name):
    return criterion(model.get_parameter(name), name)


def gradients(model, x, y):
    model = copy.deepcopy(model).eval()
    loss_func(model(x), y).backward()
    zero = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    return {k: zero[k] if p.grad is None else p.grad for k, p in model.named_parameters()}


def weights(model):
    return {k: p.detach() for k, p in model.named_parameters() if p.ndim > 1}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# --- the formulas: gradients -------------------------------------------------------------------


def test_every_criterion_of_data_is_exported_and_named():
    values = {n: v for n, v in vars(S).items() if isinstance(v, Criterion)}
    assert set(values) == set(S.__all__) and all(v.name == n for n, v in values.items())
    assert {id(c) for c in DATA} == {id(c) for c in values.values()}


@pytest.mark.parametrize("kind", [Plain, Residual, Reused, Depthwise])
def test_taylor_is_the_mean_square_of_weight_times_gradient_over_batches(kind):
    model = net(kind)
    scored = scores(model, taylor)
    own = [gradients(model, x, y) for x, y in batches()]
    for name, w in weights(model).items():
        expected = torch.stack([(g[name] * w) ** 2 for g in own]).mean(0)
        close(found(scored, model, name), expected)


@pytest.mark.parametrize("kind", [k for k in ALL if k.__name__ != "Parted"])
def test_taylor_of_filters_sums_over_all_that_goes_with_them_before_squaring(kind):
    model, x = net(kind), batches()[0][0]
    scored = scores(model, taylor_filter)
    own = [gradients(model, x, y) for x, y in batches()]
    norms = {k for k, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)}
    for axis in couple(model, Inputs.fitting(model, x)).axes:
        changes = torch.zeros(len(own), axis.size, dtype=torch.float64)
        behind = {u for s in axis.having(SCALE) if s.module in norms for u in s.unit.tolist()}
        makers = {s.module for s in axis.having(PRODUCE)}
        for b, g in enumerate(own):
            for slot in axis.having(PRODUCE, SCALE, SHIFT):
                lost = g[slot.parameter] * model.get_parameter(slot.parameter)
                lost = lost.movedim(slot.dim, 0)
                for i, u in zip(slot.index.tolist(), slot.unit.tolist(), strict=True):
                    if slot.module in (norms if u in behind else makers):
                        changes[b, u] += lost[i].sum().detach()
        expected = (changes**2).mean(0)
        for slot in axis.having(PRODUCE):
            got = found(scored, model, slot.parameter).movedim(slot.dim, 0)
            for i, u in zip(slot.index.tolist(), slot.unit.tolist(), strict=True):
                close(got[i], expected[u].expand_as(got[i]))


@pytest.mark.parametrize("training", [False, True])
def test_coupled_filters_of_a_residual_network_share_their_taylor_score(training):
    """Gates of 1 behind the norms of what is added, or behind layers that have none."""

    class Gated(nn.Module):
        def __init__(self, norms):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.na, self.nb = (nn.BatchNorm2d(4) if norms else nn.Identity() for _ in range(2))
            self.head = nn.Linear(4, 2)

        def forward(self, x, gate=1.0):
            x = self.na(self.a(x)) * gate + self.nb(self.b(x)) * gate
            return self.head(F.relu(x).mean((2, 3)))

    for norms in (False, True):
        torch.manual_seed(0)
        model = Gated(norms).double().train(training)
        x, y = torch.randn(6, 3, 8, 8).double(), torch.randint(2, (6,))
        gate = torch.ones(1, 4, 1, 1, dtype=torch.float64, requires_grad=True)
        copied = copy.deepcopy(model)
        (g,) = torch.autograd.grad(F.cross_entropy(copied(x, gate), y), gate)
        how = dict(loss_func=F.cross_entropy, training=training, progress=False)
        scored = score(model, [(x, y)], taylor_filter, **how)
        for name in ("a.weight", "b.weight"):
            close(found(scored, model, name)[:, 0, 0, 0], g.flatten() ** 2)


def test_snip_and_grad_crit_see_the_mean_gradient_and_obd_that_of_single_examples():
    model = net(Residual)
    sensitivity, crit, brain = scores(model, [snip, grad_crit, obd])
    by_batch = [gradients(model, x, y) for x, y in batches()]
    single = [
        gradients(model, x[i : i + 1], y[i : i + 1]) for x, y in batches() for i in range(len(x))
    ]
    for name, w in weights(model).items():
        mean = torch.stack([g[name] for g in by_batch]).mean(0)
        close(found(sensitivity, model, name), (w * mean).abs())
        close(found(crit, model, name), (w * mean) ** 2)
        fisher = torch.stack([g[name] ** 2 for g in single]).mean(0)
        close(found(brain, model, name), 0.5 * w**2 * fisher)


def test_snip_ranks_as_its_formula_over_the_network_does():
    model = net(Plain)
    scored = scores(model, snip, batches(1), training=True)
    g = gradients(model, *batches(1)[0])
    own = {k: (w * g[k]).abs() for k, w in weights(model).items() if k != "fc2.weight"}
    total = sum(s.sum() for s in own.values())
    gone = lowest(
        [(s / total).numpy() for s in own.values()],
        round(0.6 * sum(map(torch.numel, own.values()))),
    )
    x = batches()[0][0]
    Sparsifier(model, "weight", "global", scored, example_inputs=x).sparsify_model(0.6)
    for k, expected in zip(own, gone, strict=True):
        np.testing.assert_array_equal(model.get_parameter(k).detach().numpy() == 0, expected)


def test_train_mode_uses_the_statistics_of_the_batch():
    model = net(Residual)
    x, y = batches(1)[0]
    scored = scores(model, snip, [(x, y)], training=True)
    other = copy.deepcopy(model).train()
    loss_func(other(x), y).backward()
    close(
        found(scored, model, "c1.weight"), (other.c1.weight * other.c1.weight.grad).abs().detach()
    )
    assert not torch.allclose(
        found(scores(model, snip), model, "c1.weight"), found(scored, model, "c1.weight")
    )


# --- the formulas: feature maps ----------------------------------------------------------------


class Paper(nn.Module):
    """Conv, ReLU and pooling, as in VGG: a feature map is what a ReLU gives."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 5), conv(5, 7)
        self.head = nn.Linear(7 * 4, 3)
        self.maps = []

    def forward(self, x):
        self.maps = [F.relu(self.a(x))]
        self.maps.append(F.relu(self.b(F.max_pool2d(self.maps[0], 2))))
        self.maps.append(F.relu(self.c(self.maps[1])))
        return self.head(F.adaptive_avg_pool2d(self.maps[2], 2).flatten(1))


def maps_and_gradients(model, data):
    """Of each example by itself: the maps of `Paper` and the gradients of its own loss."""
    model = copy.deepcopy(model)
    for x, y in data:
        for i in range(len(x)):
            loss = loss_func(model(x[i : i + 1]), y[i : i + 1])
            yield list(zip(model.maps, torch.autograd.grad(loss, model.maps), strict=True))


def test_taylor_of_maps_is_the_mean_over_examples_of_the_absolute_mean_over_positions():
    torch.manual_seed(0)
    model, data = Paper().double(), batches()
    scored = scores(model, taylor_maps, data)
    each = list(maps_and_gradients(model, data))
    for k, name in enumerate("abc"):
        by_example = [(a * g)[0].mean((1, 2)).abs() for a, g in (maps[k] for maps in each)]
        expected = torch.stack(by_example).mean(0).detach()
        got = found(scored, model, f"{name}.weight")
        close(got, expected[:, None, None, None].expand_as(got))


def test_taylor_of_maps_with_and_without_the_norm_of_the_layer():
    torch.manual_seed(0)
    model, data = Paper().double(), batches()
    with torch.no_grad():  # maps 50 times as large, of which the next layer takes a 50th
        model.a.weight.mul_(50), model.a.bias.mul_(50), model.b.weight.div_(50)
    each = list(maps_and_gradients(model, data))
    own = []
    for k in range(3):
        by_example = [(a * g)[0].mean((1, 2)).abs() for a, g in (maps[k] for maps in each)]
        own.append(torch.stack(by_example).mean(0).detach().numpy())
    scored = scores(model, taylor_maps, data)
    for criterion, theirs in (
        (scored.normalised("none"), own),
        (scored, [s / np.sqrt((s**2).sum()) for s in own]),
    ):
        gone = lowest(theirs, 9)
        again = copy.deepcopy(model)
        Sparsifier(again, "filter", "global", criterion, example_inputs=data[0][0]).sparsify_model(
            0.5
        )
        for layer, expected in zip((again.a, again.b, again.c), gone, strict=True):
            zero = (layer.weight.flatten(1) == 0).all(1).numpy()
            np.testing.assert_array_equal(zero, expected)


@pytest.mark.parametrize("kind", ALL)
def test_taylor_of_maps_is_the_change_of_the_loss_that_the_columns_of_readers_show(kind):
    """Layers are linear: to scale a channel that they read is to scale its columns."""
    model, data = net(kind), batches(2)
    scored = scores(model, taylor_maps, data)
    axes = couple(model, Inputs.fitting(model, data[0][0])).axes
    single = [gradients(model, x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(x))]
    checked = 0
    for axis in axes:
        readers = axis.having(CONSUME)
        whole = {s.parameter for s in readers} <= {
            k for k, p in model.named_parameters() if p.ndim in (2, 4)
        }
        grouped = any(getattr(model.get_submodule(s.module), "groups", 1) > 1 for s in readers)
        if not readers or not whole or grouped or axis.mixed or None not in axis.pins:
            continue
        changes = torch.zeros(len(single), axis.size, dtype=torch.float64)
        for e, g in enumerate(single):
            for slot in readers:
                lost = (g[slot.parameter] * model.get_parameter(slot.parameter)).movedim(
                    slot.dim, 0
                )
                changes[e].index_add_(0, slot.unit, lost.flatten(1).sum(1)[slot.index].detach())
        expected = changes.abs().mean(0)
        for slot in axis.having(PRODUCE):
            got = (
                found(scored, model, slot.parameter).movedim(slot.dim, 0).flatten(1)[slot.index, 0]
            )
            positions = round(float((expected[slot.unit] / got).nan_to_num(0).max()))
            assert positions in (1, 16, 64, 256, 512)  # two maps of one channel
            close(got * positions, expected[slot.unit])
            checked += 1
    assert checked


class Rectified(nn.Module):
    """What arrives at the layers is noted."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = conv(3, 6), nn.BatchNorm2d(6), conv(6, 4)
        self.head = nn.Linear(4 * 9, 3)
        self.seen = []

    def forward(self, x):
        first = F.relu(self.bn(self.a(x)))
        second = F.relu(self.b(first))
        self.seen = [first, F.adaptive_avg_pool2d(second, 3)]
        return self.head(self.seen[1].flatten(1))


def test_mean_activation_and_share_of_zeros():
    torch.manual_seed(0)
    model, data = Rectified().double().eval(), batches()
    means, zeros = scores(model, [mean_activation, apoz], data, loss_func=None)
    seen = [[], []]
    for x, _ in data:
        model(x)
        for all_of_them, now in zip(seen, model.seen, strict=True):
            all_of_them.append(now.detach())
    for name, maps in zip(("a.weight", "b.weight"), seen, strict=True):
        maps = torch.cat(maps)
        mean, share = maps.mean((0, 2, 3)), (maps == 0).double().mean((0, 2, 3))
        close(found(means, model, name)[:, 1, 0, 2], mean)
        close(found(zeros, model, name)[:, 1, 0, 2], 1 - share)


@pytest.mark.parametrize("criterion", [taylor_filter, taylor_maps, mean_activation])
def test_activations_that_overflow_are_not_taken_for_unseen_ones(criterion):
    model, data = net(Plain), batches(2)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    scored = scores(model, criterion, data)
    with pytest.raises(ValueError, match="hold nan"):
        Pruner(model, data[0][0]).plan_for(0.5, criteria=scored)


def test_channels_that_several_layers_read_are_averaged_over_all_they_receive():
    model, data = net(Residual), batches()
    means = scores(model, mean_activation, data, loss_func=None)
    seen = []
    hooks = [
        m.register_forward_pre_hook(lambda _, a: seen.append(a[0].detach()))
        for m in (model.c1, model.c3, model.head)
    ]
    for x, _ in data:
        model(x)
    for hook in hooks:
        hook.remove()
    values = torch.cat([s.movedim(1, 0).flatten(1) for s in seen], 1)
    close(found(means, model, "stem.weight")[:, 0, 0, 0], values.mean(1))


# --- the formulas: inputs ----------------------------------------------------------------------


def test_wanda_knows_nothing_of_layers_that_others_take_the_weights_of():
    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.rare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = F.linear(self.a(x), self.b.weight, self.b.bias)
            return self.rare(x) if x.sum() > 1e9 else x

    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    for model, name in ((Taking(), "b"), (block, "self_attn.out_proj")):
        scored = score(model, [torch.randn(3, 5, 4)], wanda, progress=False)
        with pytest.raises(ValueError, match=f"knows nothing of {name}.weight"):
            Sparsifier(model, layers=nn.Linear, criteria=scored).sparsify_model(0.5)
        Sparsifier(model, layers=nn.Linear, criteria=scored, exclude=name).sparsify_model(0.5)
    assert not found(scores(Taking(), wanda, [torch.randn(3, 4)]), Taking(), "rare.weight").any()


def test_wanda_of_a_linear_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(7, 6, 5).double()  # examples, tokens, features
    scored = score(model, [x, 2 * x], wanda, progress=False)
    every = torch.cat([x, 2 * x]).flatten(0, 1)
    close(found(scored, model, "0.weight"), (model[0].weight.abs() * every.norm(dim=0)).detach())
    every = torch.tanh(model[0](every)).detach()
    close(found(scored, model, "2.weight"), (model[2].weight.abs() * every.norm(dim=0)).detach())


CONVS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2),
    "same": lambda: nn.Conv2d(4, 6, (1, 3), padding="same", dilation=2, bias=False),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, padding=2),
    "1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "3d": lambda: nn.Conv3d(4, 2, 2),
}


@pytest.mark.parametrize("name", CONVS)
def test_wanda_of_a_conv_takes_the_norm_of_what_each_weight_meets(name):
    """With one weight at 1 and the others at 0, the squared input comes out where it meets it."""
    torch.manual_seed(0)
    layer = CONVS[name]().double()
    x = torch.randn(2, 4, *[5] * (layer.weight.ndim - 2)).double()
    norms = InputNorms(layer, {"weight": layer.weight}, Inputs.of(x))
    with norms.watching():
        layer(x)
    got = norms.found()["weight"].expand_as(layer.weight).flatten()
    alone = copy.deepcopy(layer)
    alone.bias = None
    for i in random.Random(0).sample(range(layer.weight.numel()), 12):
        with torch.no_grad():
            alone.weight.zero_().view(-1)[i] = 1.0
            close(got[i], alone(x).norm())
    assert not layer._forward_pre_hooks


# --- the formulas: weights ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_geometric_median_is_the_sum_of_distances_to_all_filters(dtype):
    torch.manual_seed(0)
    w = torch.randn(7, 4, 3, 3).to(dtype)
    rows = w.double().flatten(1).numpy()
    expected = np.array([sum(np.sqrt(((a - b) ** 2).sum()) for b in rows) for a in rows])
    got = fpgm(w)
    assert got.shape == w.shape
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(got[:, 2, 1, 0].double(), expected, rtol=exact)
    assert (got == got[:, :1, :1, :1]).all()
    turned = fpgm(w.transpose(0, 1), dim=1)
    np.testing.assert_allclose(turned[1, :, 0, 0].double(), expected, rtol=exact)


def test_the_filter_in_the_middle_goes_whatever_its_norm():
    conv_ = nn.Conv2d(1, 4, 1, bias=False)
    with torch.no_grad():
        conv_.weight.copy_(torch.tensor([10.0, 11.0, 12.0, 1.0]).view(4, 1, 1, 1))
    model = nn.Sequential(conv_, nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = images()[:, :1]
    Sparsifier(model, "filter", criteria=fpgm, example_inputs=x).sparsify_model(0.25)
    assert conv_.weight.flatten().tolist() == [0.0, 11.0, 12.0, 1.0]  # 12, 11 (twice) and 1, 9: 12


@pytest.mark.parametrize("granularity", ["weight", "kernel", "row", "o/2 i", "2:4", "filter"])
def test_criteria_of_filters_work_at_every_granularity(granularity):
    model = net(Plain)
    sparsifier = Sparsifier(model, granularity, "local", fpgm, example_inputs=batches()[0][0])
    sparsifier.sparsify_model(0.5 if granularity != "2:4" else 0.25)
    assert sparsifier.reached() > 0.2


def test_transposed_convs_have_their_filters_along_the_second_dimension():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(3, 4, 2)
    rows = layer.weight.detach().movedim(1, 0).flatten(1).double()
    expected = (rows[:, None] - rows[None]).norm(dim=2).sum(1).argmin()
    model = nn.Sequential(layer, nn.Conv2d(4, 2, 1))
    Sparsifier(model, "kernel", criteria=fpgm, layers="0").sparsify_model(0.25)
    zero = (layer.weight == 0).all(0).flatten(1).all(1)
    assert zero.nonzero().flatten().tolist() == [int(expected)]


def test_filters_go_by_the_scale_of_their_norms():
    model = net(Residual)
    scale = (model.bn0.weight.abs() + model.bn2.weight.abs() + model.bn3.weight.abs()).detach()
    inner = model.bn1.weight.abs().detach()
    sparsifier = Sparsifier(model, "filter", criteria=norm_scale, example_inputs=batches()[0][0])
    sparsifier.sparsify_model(0.5)
    for layer, by in ((model.stem, scale), (model.c1, inner)):
        zero = (layer.weight.flatten(1) == 0).all(1).numpy()
        np.testing.assert_array_equal(zero, lowest([by.numpy()], len(by) // 2)[0])


def test_without_a_norm_there_is_no_scale():
    x = batches()[0][0]
    model = net(Plain)
    for where in (
        lambda: Pruner(model, x).prune_model(0.5, criteria=norm_scale),
        lambda: Sparsifier(model, "filter", criteria=norm_scale, example_inputs=x),
    ):
        with pytest.raises(ValueError, match=r"needs a norm .*'a': .*exclude=\['a', 'b', 'fc1'\]"):
            where()
    with pytest.raises(ValueError, match="take granularity='filter'"):
        Sparsifier(net(Residual), "weight", criteria=norm_scale, example_inputs=x).try_criteria()
    Pruner(net(Residual), x).prune_model(0.5, context="global", criteria=norm_scale)


# --- networks whose right answer is obvious ----------------------------------------------------


class Obvious(nn.Module):
    """Four channels: dead, ignored by the next layer, faint, and the one that carries it all."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([1.0, 5.0, 0.1, 2.0]).view(4, 1, 1, 1))
            self.a.bias.copy_(torch.tensor([-9.0, 9.0, 0.0, 0.0]))
            self.b.weight.copy_(torch.tensor([1.0, 0.0, 1.0, 1.0]).view(1, 4, 1, 1))

    def forward(self, x):
        return self.b(F.relu(self.a(x))).mean((2, 3))


OBVIOUS = {  # the channels from the least important one
    "taylor_maps": ([0, 1], 2, 3),
    "taylor_filter": ([0, 1], 2, 3),
    "taylor": ([0, 1], 2, 3),
    "obd": ([0, 1], 2, 3),
    "snip": ([0, 1], 2, 3),
    "mean_activation": ([0], 2, 3, 1),
    "apoz": ([0], [2, 3], 1),
}


@pytest.mark.parametrize("name", OBVIOUS)
def test_the_order_is_the_obvious_one(name):
    torch.manual_seed(0)
    model, x = Obvious(), torch.randn(16, 1, 4, 4)
    criterion = snip if name == "snip" else getattr(S, name)
    scored = score(
        model, [(x, x)], criterion, loss_func=lambda out, y: out.square().mean(), progress=False
    )
    values = found(scored, model, "a.weight").flatten().tolist()
    order = [values[k[0]] if isinstance(k, list) else values[k] for k in OBVIOUS[name]]
    assert order == sorted(order) and len(set(order)) == len(order)
    for same in (k for k in OBVIOUS[name] if isinstance(k, list)):
        assert max(values[i] for i in same) == pytest.approx(min(values[i] for i in same))
    pruner = Pruner(model, x)
    pruner.prune_model(0.25, criteria=scored)
    assert model.a.bias.tolist() == ([9.0, 0.0, 0.0] if values[0] <= values[1] else None)


def test_wanda_keeps_small_weights_of_large_inputs():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.2], [1.0, 0.2], [1.0, 0.2]]))
    scored = score(model, [torch.tensor([[0.1, 10.0]]).repeat(4, 1)], wanda, progress=False)
    Sparsifier(model, criteria=scored, layers="0").sparsify_model(0.5)
    assert model[0].weight.tolist() == [[0.0, pytest.approx(0.2)]] * 3


# --- nothing is left behind --------------------------------------------------------------------


def state(model):
    """All that scoring must leave as it was."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    grads = [
        (p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    numbers = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return hooks, modes, grads, numbers, {k: v.clone() for k, v in model.state_dict().items()}


def same(before, after):
    assert before[:2] == after[:2] and before[3] == after[3] and sum(after[0]) == 0
    for (asked, grad), (now, left) in zip(before[2], after[2], strict=True):
        assert asked == now and (grad is None) == (left is None)
        assert grad is None or torch.equal(grad, left)
    assert before[4].keys() == after[4].keys()
    assert all(torch.equal(v, after[4][k]) for k, v in before[4].items())


def drawing(out, y):
    """A loss that draws numbers from all generators."""
    return loss_func(out, y) * (1 + 0 * (torch.rand(()) + random.random() + np.random.rand()))


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_are_left_as_they_were(training):
    model = net(Residual).train()
    model.bn1.eval()
    loss_func(model(batches()[0][0]), batches()[0][1]).backward()
    model.stem.weight.requires_grad_(False)
    model.c1.weight.grad = None
    before = state(model)
    identity = {k: id(p) for k, p in [*model.named_parameters(), *model.named_buffers()]}
    scores(model, [*DATA, snip], loss_func=drawing, training=training)
    same(before, state(model))
    assert identity == {k: id(p) for k, p in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loss", "forward", "loader"])
def test_also_where_it_fails_in_between(where, error):
    model, calls = net(Residual).train(), []

    def fail(*_):
        calls.append(1)
        if len(calls) > 1:
            raise error("in between")

    def failing_loss(out, y):
        fail()
        return drawing(out, y)

    def loader():
        for batch in batches():
            random.random()
            yield batch
            if where == "loader":
                raise error("in between")

    def late(module, args):
        if sum(len(m._forward_pre_hooks) for m in model.modules()) > 1:
            fail()  # while it is watched

    model.stem.weight.requires_grad_(False)
    before = state(model)
    handle = model.head.register_forward_pre_hook(late) if where == "forward" else None
    with pytest.raises(error):
        scores(model, DATA, loader(), loss_func=failing_loss if where == "loss" else drawing)
    if handle is not None:
        handle.remove()
    same(before, state(model))


def test_loaders_go_on_as_if_nothing_had_been_drawn():
    def orders(scoring):
        learn = learner()
        if scoring:
            score(learn.model, learn.dls.train, mean_activation, progress=False)
        first = [x.sum().item() for x, _ in learn.dls.train]
        generator = torch.Generator().manual_seed(3)
        plain = DataLoader(TensorDataset(torch.arange(9.0)), 1, shuffle=True, generator=generator)
        if scoring:
            score(
                nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 2)),
                [x for (x,) in plain],
                wanda,
                progress=False,
            )
            generator.manual_seed(3)
            score(
                nn.Sequential(nn.Linear(1, 2)),
                (x[:, None] for (x,) in plain),
                wanda,
                progress=False,
            )
            generator.manual_seed(3)
            model = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2))
            score(model, plain, wanda, progress=False)
        return first, [x.item() for (x,) in plain]

    assert orders(True) == orders(False)


# --- loaders, batches, devices, types ----------------------------------------------------------


def test_loaders_of_several_kinds_give_the_same_scores():
    model = net(Plain, torch.float32)
    x, y = (torch.cat(t).float() for t in zip(*batches(), strict=True))
    data = TensorDataset(x, y)
    parts = [(x[:5], y[:5]), (x[5:10], y[5:10])]
    want = found(scores(model, taylor_filter, parts), model, "b.weight")

    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, pixels, target=None, scale=1.0):
            return self.inner(pixels * scale)

    class Two(Keyword):
        def forward(self, x, more):
            return self.inner(x + more)

    def by_keyword(out, batch):
        return loss_func(out, batch["target"])

    for dl in (DataLoader(data, 5), parts, iter(parts), [list(p) for p in parts]):
        got = scores(model, taylor_filter, dl, n_batches=2)
        assert torch.equal(found(got, model, "b.weight"), want)
    dicts = [{"pixels": a, "target": b} for a, b in parts]
    outer = Keyword()
    got = scores(outer, taylor_filter, dicts, loss_func=by_keyword)
    assert torch.equal(found(got, outer, "inner.b.weight"), want)
    outer = Two()
    got = scores(outer, taylor_filter, [(a, 0 * a, b) for a, b in parts])
    assert torch.equal(found(got, outer, "inner.b.weight"), want)
    alone = scores(model, mean_activation, [a for a, _ in parts], loss_func=None)
    pairs = scores(model, mean_activation, parts, loss_func=None)
    assert torch.equal(found(alone, model, "b.weight"), found(pairs, model, "b.weight"))


def test_fastai_loaders_and_losses():
    learn = learner()
    x, y = learn.dls.one_batch()
    scored = score(learn.model, [(x, y)] * 2, taylor, loss_func=learn.loss_func, progress=False)
    again = copy.deepcopy(learn.model).eval()
    F.cross_entropy(again(x), y).backward()
    expected = (again.c1.weight * again.c1.weight.grad).square().detach()
    torch.testing.assert_close(found(scored, learn.model, "c1.weight"), expected)
    whole = score(
        learn.model,
        learn.dls.valid,
        taylor,
        loss_func=learn.loss_func,
        n_batches=None,
        progress=False,
    )
    assert found(whole, learn.model, "c1.weight").any()


def test_so_many_batches_are_drawn_and_no_more():
    seen = []

    def loader():
        for batch in batches(5):
            seen.append(1)
            yield batch

    for n, expected in ((1, 1), (np.int64(3), 3), (None, 5), (9, 5)):
        seen.clear()
        scores(net(Plain), mean_activation, loader(), n_batches=n)
        assert len(seen) == expected


def test_the_bar_shows_how_many_batches_there_are(capsys):
    scores(net(Plain), mean_activation, batches(), progress=True)
    assert "3/3" in capsys.readouterr().out
    scores(net(Plain), mean_activation, batches(), progress=False)
    scores(net(Plain), mean_activation, iter(batches()), n_batches=None, progress=True)
    assert capsys.readouterr().out == ""  # how many there are is not known


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_models_on_other_devices_and_in_half_precision(dtype, device):
    model = net(Residual).to(device, dtype)
    reference = net(Residual)
    data = [(x.float(), y.float()) for x, y in batches()]
    got = scores(model, [*DATA, snip], data)
    want = scores(reference, [*DATA, snip])
    for mine, exact in zip(got, want, strict=True):
        own = found(mine, model, "c1.weight")
        assert own.device.type == device and own.dtype == torch.float32
        theirs = found(exact, reference, "c1.weight").float()
        error = (own.cpu() - theirs).norm() / theirs.norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.15), (mine.name, float(error))
        Pruner(copy.deepcopy(model), data[0][0].to(device, dtype)).prune_model(0.5, criteria=mine)


def test_wrapped_models_go_by_the_names_inside():
    model = net(Residual)
    want = found(scores(model, taylor), model, "c1.weight")
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert torch.equal(found(scores(wrapped, taylor), model, "c1.weight"), want)
        name = next(k for k, p in wrapped.named_parameters() if p is model.c1.weight)
        assert torch.equal(found(scores(wrapped, taylor), wrapped, name), want)


# --- networks wired in other ways --------------------------------------------------------------


class Attention(nn.Module):
    """One head; queries and keys are read by their product alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv = nn.Linear(3, 8), nn.Linear(8, 24)
        self.proj, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return self.head(x.mean(1))


def test_what_functions_alone_read_is_seen_where_it_is_made():
    torch.manual_seed(0)
    model, data = Attention().double(), batches()
    means, maps = scores(model, [mean_activation, taylor_maps], data)
    seen = []
    with torch.no_grad():
        for x, _ in data:
            seen.append(model.qkv(model.embed(x.flatten(2).transpose(1, 2))).flatten(0, 1))
    seen = torch.cat(seen).mean(0)
    got = found(means, model, "qkv.weight")[:, 0]
    close(got[:8], (seen[:8] + seen[8:16]) / 2)  # a query and its key go together
    close(got[8:16], got[:8])
    assert not torch.allclose(got[16:], seen[16:])  # values are seen where proj reads them
    assert found(maps, model, "qkv.weight").any()
    for criterion in (means, maps):
        Sparsifier(
            copy.deepcopy(model), "filter", "global", criterion, example_inputs=data[0][0]
        ).sparsify_model(0.4)
        Pruner(copy.deepcopy(model), data[0][0]).prune_model(0.4, criteria=criterion)


def test_tied_weights_and_modules_used_twice():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = (nn.Linear(6, 6, bias=False) for _ in range(4))
            self.c.weight = self.b.weight

        def forward(self, x):
            x = F.relu(self.a(x.flatten(2).mean(2).repeat(1, 2)))
            return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.b(x)))))))

    torch.manual_seed(0)
    model, data = Tied().double(), batches()
    means, norms = scores(model, [mean_activation, wanda], data)
    seen = []
    with torch.no_grad():
        for x, _ in data:
            one = F.relu(model.a(x.flatten(2).mean(2).repeat(1, 2)))
            two = F.relu(model.b(one))
            seen.append([one, two, F.relu(model.b(two)), F.relu(model.c(F.relu(model.b(two))))])
    read = torch.cat([t for own in seen for t in own[:3]])
    close(found(norms, model, "b.weight"), (model.b.weight.abs() * read.norm(dim=0)).detach())
    everywhere = torch.cat([t for own in seen for t in own])
    close(found(means, model, "b.weight")[:, 0], everywhere.mean(0))


def test_examples_that_are_not_along_the_first_dimension_are_refused():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = F.relu(self.a(x.flatten(2)[:, :, :7].permute(2, 0, 1)))  # positions first
            return self.b(x).mean(0)

    with pytest.raises(ValueError, match=r"needs the examples along the first dimension.*'b'"):
        scores(Turned().double(), taylor_maps)
    scores(Turned().double(), mean_activation)


def test_what_cannot_be_watched_is_named_and_may_be_left_out():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.attention = conv(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x):
            x = self.a(x).flatten(2).transpose(1, 2)[:, :9]
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.c(F.relu(self.b(x))).mean(1)

    torch.manual_seed(0)
    model, x = Hidden().double(), batches()[0][0]
    scored = scores(model, mean_activation)
    with pytest.raises(
        ValueError, match=r"knows nothing of attention.in_proj_weight.*exclude=\['atten"
    ):
        Pruner(model, x).prune_model(0.5, criteria=scored)
    pruner = Pruner(model, x, exclude=["attention", "attention.out_proj"])
    pruner.prune_model(0.5, criteria=scored)
    assert model.b.out_features == 3


# --- scores in both halves ---------------------------------------------------------------------


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "2:4", "filter"])
@pytest.mark.parametrize("criterion", DATA, ids=lambda c: c.name)
def test_scored_criteria_work_in_a_sparsifier(criterion, granularity, context):
    model, x = net(Plain), batches()[0][0]
    sparsifier = Sparsifier(model, granularity, context, scores(model, criterion), example_inputs=x)
    sparsifier.sparsify_model(0.5)
    assert sparsifier.reached() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("criterion", DATA, ids=lambda c: c.name)
def test_the_pruner_removes_the_filters_that_score_lowest(criterion, context):
    model, x = net(Residual), batches()[0][0]
    scored = scores(model, criterion)
    own = {
        n: found(scored, model, f"{n}.weight").mean((1, 2, 3)) for n in ("stem", "c1", "c2", "c3")
    }
    sizes = {n: model.get_submodule(n).weight[0].numel() for n in own}
    outer = sum(own[n] * sizes[n] for n in ("stem", "c2", "c3")) / sum(
        sizes[n] for n in ("stem", "c2", "c3")
    )
    pools = [outer.numpy(), own["c1"].numpy()]
    if context == "global":
        norm = (lambda s: np.sqrt((s**2).sum())) if criterion.norm else np.mean
        gone = lowest([s / norm(s) for s in pools], 12)
    else:
        gone = [lowest([s], len(s) // 2)[0] for s in pools]
    kept = copy.deepcopy(model)
    Pruner(model, x).prune_model(0.5, context=context, criteria=scored)
    assert torch.equal(model.bn0.bias, kept.bn0.bias[torch.from_numpy(~gone[0])])
    assert torch.equal(model.bn1.bias, kept.bn1.bias[torch.from_numpy(~gone[1])])


def test_after_a_cut_it_must_be_scored_again():
    model, x = net(Plain), batches()[0][0]
    scored = scores(model, taylor)
    pruner = Pruner(model, x)
    pruner.prune_model(0.25, criteria=scored)
    message = r"'taylor' was scored when a.weight had the shape \(8, .*, now it has \(6, .*: score"
    with pytest.raises(ValueError, match=message):
        pruner.prune_model(0.25, criteria=scored)
    with pytest.raises(ValueError, match=message):
        Sparsifier(model, criteria=scored, example_inputs=x).sparsify_model(0.5)
    assert model.a.weight.all()
    pruner.prune_model(0.5, criteria=scores(model, taylor))


def test_a_scored_criterion_is_a_value():
    model = net(Plain)
    scored = scores(model, taylor)
    assert taylor.data is None and taylor.wants == ("squared_gradient",) and scored.wants == ()
    assert scored.needs == taylor.needs and scored != taylor and hash(scored) is not None
    other = pickle.loads(pickle.dumps(scored))
    assert torch.equal(found(other, model, "a.weight"), found(scored, model, "a.weight"))
    before = found(scored, model, "a.weight").clone()
    scores(model, taylor, batches(1))
    assert torch.equal(found(scored, model, "a.weight"), before)
    assert torch.equal(
        found(scored.normalised("mean").reduced_by("sum"), model, "a.weight"), before
    )


def test_a_criterion_of_ones_own_may_need_several_things():
    mine = Criterion(lambda w, n, a: w.abs() * n + a, "mine", needs=["input_norm", "activation"])
    model = net(Plain)
    scored, norms, means = scores(model, [mine, wanda, mean_activation])
    expected = found(norms, model, "b.weight") + found(means, model, "b.weight")
    close(found(scored, model, "b.weight"), expected)
    moved = Criterion(lambda w, i, z: (w - i).abs() * z, "both", needs=["initial", "zeros"])
    sparsifier = Sparsifier(model, criteria=scores(model, moved), example_inputs=batches()[0][0])
    with torch.no_grad():
        model.a.weight[0] += 1
    sparsifier.sparsify_model(0.9)
    assert model.a.weight[0].any() and not model.a.weight[1:].any()


WRONG = [  # what was passed, and what the error says
    (lambda m: score(m, batches(), large_final), "'large_final' needs no data: pass it as it is"),
    (lambda m: score(m, batches(), movement), "'movement' needs no data"),
    (
        lambda m: score(m, batches(), [taylor, "apoz"]),
        "score takes criteria such as taylor .* got 'apoz'",
    ),
    (
        lambda m: scores(m, taylor, loss_func=None),
        "pass loss_func, as in loss_func=learn.loss_func",
    ),
    (lambda m: scores(m, taylor_maps, loss_func=None), "pass loss_func"),
    (lambda m: scores(m, obd, loss_func=None), "pass loss_func"),
    (
        lambda m: scores(m, taylor, loss_func=lambda o, y: o),
        r"mean loss of a batch.*got a tensor \(4, 5\)",
    ),
    (lambda m: scores(m, taylor, loss_func=lambda o, y: y.mean()), "depends on the weights"),
    (lambda m: scores(m, taylor, loss_func=lambda o, y: 1.0), "got float"),
    (lambda m: scores(m, apoz, []), "the loader gave no batch"),
    (
        lambda m: scores(m, apoz, n_batches=0),
        "n_batches must be a whole number >= 1, or None for all, got 0",
    ),
    (lambda m: scores(m, apoz, n_batches=True), "n_batches must be a whole number >= 1"),
    (lambda m: scores(m, apoz, 3), "dl must be a loader or a list of batches, got int"),
    (lambda m: scores(m, apoz, [(torch.zeros(()), 1)]), "examples along their first dimension"),
    (lambda m: scores(m, apoz, [torch.zeros(2, 5)]), "could not be run on the example inputs"),
    (lambda m: scores(nn.Flatten(), apoz), "the model has no weights to score"),
    (lambda m: scores("net", apoz), "model must be a torch.nn.Module, got str"),
    (
        lambda m: Pruner(m, batches()[0][0]).prune_model(0.5, criteria=apoz),
        r"gathered on data: pass criteria=score\(model, dl, apoz",
    ),
    (
        lambda m: Sparsifier(m, criteria=taylor, layers="b").sparsify_model(0.5),
        r"SparsifyCallback\(criteria=taylor\)",
    ),
]


@pytest.mark.parametrize("wrong,message", WRONG, ids=[m for _, m in WRONG])
def test_what_is_wrong_is_said(wrong, message):
    model = net(Plain)
    before = state(model)
    with pytest.raises((ValueError, TypeError), match=message):
        wrong(model)
    same(before, state(model))


def test_a_learner_and_all_of_its_loaders_are_not_what_is_asked_for():
    learn = learner()
    with pytest.raises(TypeError, match="got Learner; pass learn.model"):
        score(learn, learn.dls.train, apoz)
    with pytest.raises(TypeError, match="pass dls.train or dls.valid"):
        score(learn.model, learn.dls, apoz)
    scored = score(learn.model, learn.dls.train, apoz, progress=False)
    with pytest.raises(ValueError, match="knows nothing of a.weight"):
        Pruner(make(Plain), images()).prune_model(0.5, criteria=scored)


# --- while training ----------------------------------------------------------------------------


class Steps(Callback):
    """Weights and gradients of every step, and the batches, ahead of the update."""

    order = 50

    def before_fit(self):
        self.weights, self.gradients, self.norms = [], [], []
        self.models, self.batches = [], []

    def before_step(self):
        parameters = dict(self.learn.model.named_parameters())
        self.weights.append({k: p.detach().clone() for k, p in parameters.items()})
        self.gradients.append({k: p.grad.clone() for k, p in parameters.items()})
        self.norms.append(self.learn.model.bn1.running_var.clone())

    def after_batch(self):
        if self.training:
            self.models.append(copy.deepcopy(self.learn.model))
            self.batches.append((self.x.clone(), self.y.clone()))


def zero_rows(layer):
    return (layer.weight.flatten(1) == 0).all(1).numpy()


def behind_norm(weights, gradients):
    """The Taylor score of the filters of c1, of one batch."""
    changes = [weights[k] * gradients[k] for k in ("bn1.weight", "bn1.bias")]
    return sum(changes) ** 2


@pytest.mark.parametrize("criterion", [taylor, taylor_filter, obd], ids=lambda c: c.name)
def test_gradients_are_gathered_over_the_steps_since_the_last_update(criterion):
    learn, steps = learner(), Steps()
    schedule = one_shot.over(start=5, end=5)
    learn.fit(
        1, cbs=[steps, SparsifyCallback(0.5, "filter", criteria=criterion, schedule=schedule)]
    )
    w, g = steps.weights[:5], steps.gradients[:5]
    if criterion is taylor_filter:
        expected = torch.stack([behind_norm(*pair) for pair in zip(w, g, strict=True)]).mean(0)
    else:
        squares = torch.stack([b["c1.weight"] ** 2 for b in g]).mean(0)
        expected = (w[4]["c1.weight"] ** 2 * squares).mean((1, 2, 3))
    np.testing.assert_array_equal(
        zero_rows(learn.model.c1), lowest([expected.double().numpy()], 8)[0]
    )


@pytest.mark.parametrize(
    "criterion", [taylor_maps, mean_activation, apoz, wanda], ids=lambda c: c.name
)
def test_activations_are_seen_on_the_batch_of_the_update(criterion):
    learn, steps = learner(), Steps()
    schedule = one_shot.over(start=5, end=5)
    learn.fit(
        1, cbs=[steps, SparsifyCallback(0.5, "filter", criteria=criterion, schedule=schedule)]
    )
    model, batch = steps.models[4], steps.batches[4]
    scored = score(model, [batch], criterion, loss_func=learn.loss_func, progress=False)
    own = found(scored, model, "c1.weight").mean((1, 2, 3))
    np.testing.assert_array_equal(zero_rows(learn.model.c1), lowest([own.double().numpy()], 8)[0])


def test_a_second_update_starts_anew_and_steps_that_are_skipped_do_not_count():
    learn, steps = learner(), Steps()
    half = SparsifyCallback(0.25, "filter", criteria=taylor, schedule=one_shot.over(start=2, end=2))
    learn.fit(1, cbs=[half])
    held = zero_rows(learn.model.c1)
    again = SparsifyCallback(0.5, "filter", criteria=taylor, schedule=one_shot.over(start=3, end=3))
    learn.fit(1, cbs=[steps, again, GradientAccumulation(16)])
    assert len(steps.gradients) == 4
    # 8 samples a batch: steps come after 2, 4, 6, 8 batches, the update waits for the second
    squares = torch.stack([g["c1.weight"] ** 2 for g in steps.gradients[:2]]).mean(0)
    own = (steps.weights[1]["c1.weight"] ** 2 * squares).mean((1, 2, 3)).double().numpy()
    np.testing.assert_array_equal(
        zero_rows(learn.model.c1), lowest([np.where(held, -1, own)], 8)[0]
    )


NEEDED = [
    "squared_gradient",
    "fisher",
    "filter_taylor",
    "map_taylor",
    "activation",
    "zeros",
    "input_norm",
]


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_to_gather_changes_nothing_else_of_a_fit(granularity):
    """A criterion that needs everything and looks at the weight alone trains as one without."""
    plain = Criterion(lambda w: w.abs(), "plain")
    curious = Criterion(lambda w, *_: w.abs(), "curious", needs=NEEDED)
    ends = []
    for criterion in (plain, curious):
        learn = learner()
        schedule = one_shot.over(start=9, end=9)
        cb = SparsifyCallback(0.5, granularity, criteria=criterion, schedule=schedule)
        seen = Hooks()
        gradients = Steps()
        learn.fit(2, cbs=[cb, seen, gradients])
        assert seen.found_hooks == 0 and cb._gathering._gatherer is None
        assert cb._sparsifier.criteria is cb.criteria and list(learn.model.state_dict()) == list(
            make(Residual).state_dict()
        )
        ends.append((gradients.gradients[:9], random.getstate(), torch.get_rng_state()))
    for one, other in zip(*(e[0] for e in ends), strict=True):
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert ends[0][1] == ends[1][1] and torch.equal(ends[0][2], ends[1][2])


class Hooks(Callback):
    """No hook is there at any event."""

    order = 99
    found_hooks = 0

    def look(self):
        modules = self.learn.model.modules()
        self.found_hooks += sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before_batch = after_pred = after_loss = before_step = after_batch = look


def test_what_cannot_be_gathered_is_said_before_training():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.attention = conv(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.b = nn.Linear(8, 4)

        def forward(self, x):
            x = self.a(x).flatten(2).transpose(1, 2)
            return self.b(self.attention(x, x, x, need_weights=False)[0].mean(1))

    learn = learner(Hidden())
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match="knows nothing of attention.in_proj_weight"):
        learn.fit(1, cbs=SparsifyCallback(0.5, "filter", criteria=apoz))
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_nothing_asked_gathers_nothing():
    ends = []
    for cbs in ([], [SparsifyCallback(0.0, criteria=taylor_maps)]):
        learn = learner()
        learn.fit(1, cbs=cbs)
        assert not cbs or cbs[0]._gathering._gatherer is None
        ends.append(learn.model.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


@pytest.mark.parametrize("criterion", [taylor, apoz, norm_scale], ids=lambda c: c.name)
def test_a_scored_or_live_criterion_reaches_the_target_in_a_fit(criterion):
    learn = learner()
    if criterion is taylor:
        criterion = score(
            learn.model, learn.dls.train, taylor, loss_func=learn.loss_func, progress=False
        )
    cb = SparsifyCallback(0.5, "filter", "global", criterion)
    learn.fit(2, cbs=cb)
    assert cb.report().set_index("layer").loc["total", "reached"] == 0.5


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("criterion", [*DATA, snip, fpgm, norm_scale], ids=lambda c: c.name)
def test_networks_are_cut_while_they_train(criterion, context):
    learn, seen = learner(), Hooks()
    cb = PruneCallback(0.5, context, criterion, schedule=lin.over(start=2, end=8, every=3))
    learn.fit(1, cbs=[cb, seen])
    assert cb.reached() == 0.5 and [t for t, _ in cb.history] == [2, 5, 8]
    assert seen.found_hooks == 0 and cb._gathering._gatherer is None
    assert cb._pruner.criteria is cb.criteria and not cb.criteria.data


@pytest.mark.parametrize("criterion", [taylor_filter, apoz, taylor_maps], ids=lambda c: c.name)
def test_after_a_cut_the_smaller_network_is_gathered_of(criterion):
    learn, steps = learner(), Steps()
    cb = PruneCallback(0.5, "local", criterion, schedule=lin.over(start=2, end=8, every=3))
    learn.fit(1, cbs=[steps, cb])
    before = steps.models[7]  # of 12 filters, since the cut after 5 steps
    if criterion is taylor_filter:
        pairs = zip(steps.weights[5:], steps.gradients[5:], strict=True)
        each = [behind_norm(*pair) for pair in pairs]
        own, norm = torch.stack(each).mean(0), steps.norms[7]
    else:
        scored = score(
            before, [steps.batches[7]], criterion, loss_func=learn.loss_func, progress=False
        )
        own, norm = found(scored, before, "c1.weight")[:, 0, 0, 0], before.bn1.running_var
    kept = torch.from_numpy(~lowest([own.double().numpy()], 4)[0])
    assert len(own) == 12 and torch.equal(learn.model.bn1.running_var, norm[kept])
