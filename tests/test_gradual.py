"""Pruning in steps reaches what pruning at once does, counted from the start."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import ALL, Mlp, Plain, Residual, apart, conv, images, make, size, widths
from torch import nn, optim

from fasterai.core.criteria import (
    Criterion,
    NothingToCompare,
    grad_crit,
    large_final,
    movement,
    random_scores,
    updating_movement,
)
from fasterai.core.target import Target
from fasterai.coupling.couple import couple
from fasterai.coupling.ranking import unit_scores
from fasterai.prune.amounts import Units
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.plan import Plan
from fasterai.prune.pruner import Pruner
from fasterai.score.criteria import mean_activation, taylor_filter, taylor_maps
from fasterai.score.score import score

tv = torchvision.models
LARGE = {
    "vit": lambda: tv.VisionTransformer(64, 16, 2, 4, 64, 128),
    "swin": lambda: tv.SwinTransformer([4, 4], 16, [2, 1], [2, 4], [4, 4]),
    "shufflenet": tv.shufflenet_v2_x0_5,
}
STEPS = (0.1, 0.35, 0.35, 0.5)


@pytest.mark.parametrize("limits", [{}, {"round_to": 4}, {"min_keep": 5}])
@pytest.mark.parametrize("kind", ALL)
def test_steps_lead_to_the_widths_of_one_cut(kind, limits):
    model, x = make(kind), images()
    at_once = copy.deepcopy(model)
    pruner = GradualPruner(model, x, **limits)
    for share in STEPS:
        pruner.prune_to(share)
    Pruner(at_once, x).prune_model(0.5, **limits)
    assert widths(model) == widths(at_once)
    if not limits:
        whole = [axis.bundles for axis in couple(make(kind), pruner.inputs).axes]
        assert pruner.reached() == sum(round(0.5 * n) for n in whole) / sum(whole)
        again = make(kind)
        pruner.whole_plan.apply(again)
        assert widths(again) == widths(model)


@pytest.mark.parametrize("name", LARGE)
def test_steps_in_networks_with_blocks(name):
    torch.manual_seed(0)
    model = LARGE[name]().eval()
    x = torch.randn(2, 3, 64, 64)
    at_once = copy.deepcopy(model)
    pruner = GradualPruner(model, x, verify=False)
    for share in (0.3, 0.5):
        pruner.prune_to(share)
    Pruner(at_once, x).prune_model(0.5, verify=False)
    assert widths(model) == widths(at_once) != widths(LARGE[name]())
    model.train()(x).sum().backward()


@pytest.mark.parametrize("kind", ALL)
def test_one_step_is_one_cut(kind):
    for context in ("local", "global"):
        model, x = make(kind), images()
        other = copy.deepcopy(model)
        GradualPruner(model, x, context).prune_to(0.4)
        Pruner(other, x).prune_model(0.4, context=context)
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ALL)
def test_global_steps_count_over_all_layers(kind):
    model = make(kind)
    before = size(model)
    pruner = GradualPruner(model, images(), "global")
    axes = couple(model, pruner.inputs).axes
    whole = sum(axis.bundles for axis in axes)
    gone = 0
    for share in (0.2, 0.3, 0.6):
        pruner.prune_to(share)
        cuts = zip(pruner.plan.axes, axes, strict=True)
        gone += sum((cut.before - cut.after) // axis.blocks for cut, axis in cuts)
        assert gone == round(share * whole)
    assert pruner.max_rel_diff < 1e-5 and size(model) < before


def positions(axes, model):
    """Units as sets of positions along dimensions of more than one, with pins and blocks."""
    wide = {n: t.shape for n, t in [*model.named_parameters(), *model.named_buffers()]}
    found = {}
    for axis in axes:
        if axis.size < 2:
            continue
        units = [set() for _ in range(axis.size)]
        for slot in axis.slots:
            if wide[slot.parameter][slot.dim] > 1:
                for i, u in zip(slot.index.tolist(), slot.unit.tolist(), strict=True):
                    units[u].add((slot.parameter, slot.dim, i, slot.role))
        units = [frozenset(u) for u in units]
        blocks = [
            frozenset(units[u] for u in (axis.block == b).nonzero()) for b in range(axis.blocks)
        ]
        free = frozenset(u for u, pin in zip(units, axis.pins, strict=True) if pin is None)
        order = [sorted((int(p), int(b)) for p, b in zip(axis.place, axis.block, strict=True))]
        found[frozenset(units)] = free, frozenset(blocks), axis.mixed, str(order)
    return found


@pytest.mark.parametrize("kind", [*ALL, "vit", "swin"])
def test_the_coupling_that_is_left_is_that_of_the_smaller_network(kind):
    if isinstance(kind, str):
        torch.manual_seed(0)
        model, x = LARGE[kind]().eval(), torch.randn(2, 3, 64, 64)
    else:
        model, x = make(kind), images()
    pruner = GradualPruner(model, x, verify=False)
    for share in (0.25, 0.5):
        pruner.prune_to(share)
        anew = couple(model, pruner.inputs)
        assert positions(pruner._coupling.axes, model) == positions(anew.axes, model)
        said, fresh = pruner._coupling.analysis, anew.analysis
        assert {i: f.value for i, f in said.factors.items()} == {
            i: f.value for i, f in fresh.factors.items()
        }
        assert {d: n for d, n in said.sizes.items() if n > 1} == fresh.sizes
        assert {g.shape for g in fresh.grids} <= {g.shape for g in said.grids}


def test_zeros_are_removed_in_between_as_well():
    model, x = make(Residual, torch.float64), images(dtype=torch.float64)
    pruner = GradualPruner(model, x)
    pruner.prune_to(0.25)
    with torch.no_grad():
        for p in (model.c1.weight, model.bn1.weight, model.bn1.bias):
            p[:3] = 0
    dense, before = copy.deepcopy(model), model.c1.weight.shape[0]
    pruner.prune_model()
    assert model.c1.weight.shape[0] == before - 3 and apart(dense(x), model(x)) < 1e-12
    pruner.prune_to(0.5)
    assert model.c1.weight.shape[0] == 8 and model.stem.weight.shape[0] == 4


def test_what_is_frozen_stays_and_does_not_count():
    model, x = make(Plain), images()
    pruner = GradualPruner(model, x, "global")
    model.b.weight.requires_grad_(False)
    frozen = model.b.weight.shape[0]
    assert pruner.frozen_share == frozen / (8 + 12 + 10)
    pruner.prune_to(0.5)
    assert model.b.weight.shape[0] == 12 and pruner.reached() == 0.5
    assert model.a.weight.shape[0] + model.fc1.weight.shape[0] == 9
    model.b.weight.requires_grad_(True)
    assert pruner.reached() == 9 / 30 and not pruner.arrived(0.5)
    pruner.prune_to(0.5)
    assert sum(m.weight.shape[0] for m in (model.a, model.b, model.fc1)) == 15


def test_a_network_that_something_else_cut_is_refused():
    model, x = make(Residual), images()
    pruner = GradualPruner(model, x)
    pruner.prune_to(0.25)
    Pruner(model, x).prune_model(0.25)
    assert not pruner.knows(model)
    for ask in (lambda: pruner.prune_to(0.5), pruner.axes, lambda: pruner.prune_model(0.5)):
        with pytest.raises(RuntimeError, match="make a new one"):
            ask()


def test_a_plan_of_another_process_is_carried_out():
    """Where several hold the same network, one decides."""
    models = [make(Residual).train() for _ in range(2)]
    optimizers = [optim.AdamW(m.parameters()) for m in models]
    one, two = (GradualPruner(m, images(), criteria=random_scores) for m in models)
    for share in (0.3, 0.5):
        for m, o in zip(models, optimizers, strict=True):
            m(images(4)).square().mean().backward()
            o.step()
            o.zero_grad()
        plan = one.plan_to(share)
        one.carry_out(plan, optimizer=optimizers[0])
        two.carry_out(Plan.from_json(plan.to_json()), optimizer=optimizers[1])
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert one.reached() == two.reached() and one.whole_plan == two.whole_plan


def weakest(scores, n):
    return scores.argsort(stable=True)[:n]


@pytest.mark.parametrize("criterion", [movement, updating_movement])
def test_criteria_that_compare_follow_the_cuts(criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    x = torch.randn(4, 12)
    pruner = GradualPruner(model, x, criteria=criterion)
    with pytest.raises(NothingToCompare):
        pruner.prune_to(0.3)
    start = previous = model[0].weight.detach().clone()
    left = torch.arange(10)
    for share in (0.3, 0.6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        now = model[0].weight.detach().clone()
        then = start[left] if criterion is movement else previous
        gone = weakest((now - then).abs().mean(1), round(share * 10) - (10 - len(left)))
        keep = torch.ones(len(left), dtype=torch.bool)
        keep[gone] = False
        pruner.prune_to(share)
        assert torch.equal(model[0].weight, now[keep])
        left, previous = left[keep], now[keep]
    pruner.release()
    with pytest.raises(RuntimeError, match="released"):
        pruner.prune_to(0.8)
    pruner.watch()
    with pytest.raises(NothingToCompare):
        pruner.prune_to(0.8)


def test_gradients_decide_and_none_are_nothing_to_compare():
    model = make(Residual)
    pruner = GradualPruner(model, images(), criteria=grad_crit)
    for clear in (False, True):
        model.zero_grad(set_to_none=clear)
        with pytest.raises(NothingToCompare):
            pruner.prune_to(0.5)
    model(images(4)).square().mean().backward()
    scores = (model.c1.weight * model.c1.weight.grad).square().mean((1, 2, 3)).detach()
    stays = sorted(scores.argsort(descending=True)[:8].tolist())
    expected = model.bn1.running_mean[stays].clone()
    pruner.prune_to(0.5)
    assert torch.equal(model.bn1.running_mean, expected)


def test_removed_units_count_as_zero_in_a_global_mean():
    model = make(Mlp)
    axis = couple(model, Pruner(model, images()).inputs).axes[0]
    tensors = dict(model.named_parameters())
    scores = unit_scores(tensors, axis, large_final)
    relative = unit_scores(tensors, axis, large_final, relative=True, gone=5)
    mean = torch.cat([scores, torch.zeros(5)]).mean()
    assert torch.allclose(relative, scores / mean)


def test_bad_arguments_are_refused_before_anything_is_looked_at():
    model = make(Residual)
    for wrong, error in (
        ({"context": "globl"}, ValueError),
        ({"criteria": 3}, TypeError),
        ({"round_to": 0}, ValueError),
        ({"exclude": "c9"}, ValueError),
    ):
        with pytest.raises(error):
            GradualPruner(model, images(), **wrong)
    pruner = GradualPruner(model, images())
    with pytest.raises(ValueError, match="pass 0.4"):
        pruner.prune_to(40)
    with pytest.raises(ValueError, match="failed on stem.weight"):
        GradualPruner(model, images(), criteria=Criterion(lambda w: w[9])).try_criteria()
    assert widths(model) == widths(make(Residual))


def test_an_interrupt_between_the_cut_and_what_follows_it(monkeypatch):
    model = make(Residual)
    pruner = GradualPruner(model, images())

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fasterai.prune.gradual.remaining", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruner.prune_to(0.25)
    assert pruner.knows(model) and model.c1.weight.shape[0] == 12
    pruner.prune_to(0.5)
    other = make(Residual)
    Pruner(other, images()).prune_model(0.5)
    assert widths(model) == widths(other) and pruner.reached() == 0.5


class Beside(nn.Module):
    """Few channels and many, side by side."""

    def __init__(self):
        super().__init__()
        self.few, self.many = conv(3, 2), conv(3, 8)
        self.mix, self.head = conv(10, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.cat([self.few(x), self.many(x)], 1).relu()
        return self.head(self.mix(x).relu().mean((2, 3)))


def test_a_single_channel_that_is_left_keeps_nothing_else_back():
    model = make(Beside)
    pruner = GradualPruner(model, images())
    for share, many in ((0.5, 4), (0.75, 2)):
        pruner.prune_to(share)
        assert model.few.weight.shape[0] == 1 and model.many.weight.shape[0] == many
        assert model.mix.weight.shape[1] == 1 + many


@pytest.mark.parametrize("criterion", [taylor_maps, taylor_filter, mean_activation])
def test_criteria_of_data_go_on_where_a_single_channel_is_left(criterion):
    model, batch = make(Beside), (images(), torch.tensor([0, 1]))
    pruner = GradualPruner(model, images())
    pruner.prune_to(0.5)
    assert model.few.weight.shape[0] == 1
    pruner.criteria = score(model, [batch], criterion, loss_func=F.cross_entropy, progress=False)
    pruner.prune_to(0.75)
    assert (model.few.weight.shape[0], model.many.weight.shape[0]) == (1, 2)


def test_few_channels_are_left_one_by_one():
    model = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 6), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(6 * 64, 4))
    pruner = GradualPruner(model, images(2, 8))
    for k in range(1, 6):
        pruner.prune_to(k / 6)
        assert model[0].weight.shape[0] == model[2].weight.shape[0] == 6 - k
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.prune_to(1.0)
    assert model[2].weight.shape == (1, 1, 3, 3) and model(images(2, 8)).shape == (2, 4)


# --- going on from a plan ------------------------------------------------------------------------


def chain():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.mark.parametrize("amount", [0.75, Units(20), Target(parameters=250)])
def test_after_a_layer_was_left_a_single_channel_the_count_goes_on(amount):
    found, x = [], images()
    for resume in (False, True):
        model = chain()
        with torch.no_grad():
            model[0].weight[:15] *= 1e-3
        pruner = GradualPruner(model, x, "global")
        pruner.prune_to(0.46)
        assert model[0].out_channels == 1
        if resume:
            reached = pruner.reached()
            pruner = GradualPruner(model, x, "global", after=pruner.history)
            assert pruner.reached() == reached and pruner.removed == 15
        pruner.prune_to(amount)
        found.append((model[0].out_channels, model[2].out_channels))
        assert len(pruner.history) == 2
    assert found[0] == found[1]


def test_after_a_layer_was_left_a_single_channel_others_go_on_by_name():
    model, x = chain(), images()
    pruner = GradualPruner(model, x)
    pruner.prune_to({"0": 0.99})
    again = GradualPruner(model, x, after=pruner.whole_plan)
    again.prune_to({"0": 0.99, "2": 0.5})
    assert model[2].out_channels == 8
    with pytest.raises(ValueError, match="a single channel of '0'; ask for a number"):
        again.prune_to(Target(macs=0.1))
    with pytest.raises(ValueError, match="no layer '1'"):
        again.prune_to({"1": 0.5})


def test_after_heads_became_narrow_the_count_goes_on():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x):
            q, k, v = (
                f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            x = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(x.transpose(1, 2).flatten(2))

    found, x = [], torch.randn(2, 5, 64)
    for resume in (False, True):
        torch.manual_seed(0)
        model = Block()
        pruner = GradualPruner(model, x)
        pruner.prune_to(13 / 16)  # three are left of each head
        if resume:
            reached = pruner.reached()
            pruner = GradualPruner(model, x, after=pruner.whole_plan)
            assert pruner.reached() == reached
        pruner.prune_to(14 / 16)
        found.append([tuple(p.shape) for p in model.parameters()])
    assert found[0] == found[1] and found[0][0] == (8, 64)


def test_what_cannot_go_is_told():
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))
    pruner = GradualPruner(model, images(1), exclude=["0"])
    with pytest.warns(UserWarning, match=r"nothing was removed: axes\(\) tells") as told:
        pruner.prune_to(0.5)
    assert told[0].filename == __file__
    for named in ({0: 0.5}, {nn.Conv2d: 0.5}):
        with pytest.raises(TypeError, match="goes by names of layers and blocks"):
            GradualPruner(model, images(1)).prune_to(named)
    with pytest.raises(TypeError, match="after takes what was cut before.* got 'plan.json'"):
        GradualPruner(model, images(1), after="plan.json")
    assert (model[0].out_channels, model[2].in_channels) == (8, 8)
