"""A plan is a value: it repeats a cut on another model, goes to JSON and back, and chains."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from comparing import contents, same
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    ALL,
    TOKENS,
    Attention,
    Heads,
    Mlp,
    Normed,
    Plain,
    Residual,
    Tied,
    apart,
    conv,
    eagerly,
    images,
    lively,
    make,
    sequences,
    zeroed,
)
from torch import nn

import fasterai.coupling.surgery as surgery
from fasterai.prune.plan import Adjustment, AxisCut, Plan
from fasterai.prune.pruner import Pruner
from fasterai.prune.runs import as_runs, from_runs

CASES = {
    **{kind.__name__: (lambda k=kind: make(k), images()) for kind in ALL},
    "attention": (lambda: lively(Attention()), sequences()),
    "layer norm": (lambda: lively(Normed(nn.LayerNorm(8))), images().double()),
    "RMS norm": (lambda: lively(Normed(nn.RMSNorm(8))), images().double()),
    "group norm": (lambda: lively(Normed(nn.GroupNorm(2, 8))), images().double()),
}


@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_repeats_the_cut_on_a_copy_and_survives_json(name, sparsity):
    build, x = CASES[name]
    model = zeroed(build(), x, mixed=True) if sparsity is None else build()
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    objects = {n: id(p) for n, p in other.named_parameters()}
    pruner = Pruner(model, x)
    pruner.prune_model(sparsity)
    plan = pruner.plan
    assert plan.apply(other) is other and plan.removed > 0
    assert same(model, other, objects=False)
    assert {n: id(p) for n, p in other.named_parameters()} == objects
    back = Plan.from_json(plan.to_json())
    assert back == plan and hash(back) == hash(plan) and back.to_json() == plan.to_json()
    assert same(back.apply(third), model, objects=False)
    assert plan.parameters_after == sum(p.numel() for p in other.parameters())
    for p in third.parameters():
        assert p.grad is None


def test_other_weights_keep_the_same_positions():
    model, fresh = make(Plain), make(Plain, seed=8)
    before = {n: p.detach().clone() for n, p in fresh.named_parameters()}
    pruner = Pruner(model, images())
    pruner.prune_model(0.5)
    fresh(images()).sum().backward()
    pruner.plan.apply(fresh)
    assert fresh.a.weight.grad is None and fresh.fc2.bias.grad is None
    for name, p in fresh.named_parameters():
        expected = before[name]
        for dim, kept in pruner.plan.kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(kept))
        assert torch.equal(p, expected)
    assert fresh.b.in_channels == model.b.in_channels == 4
    assert fresh(images()).shape == (2, 5)


class Half(nn.Module):
    """Sigmoid makes of zero a half: a constant for the next layer's bias, or other channels."""

    def __init__(self, size):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 4, size)

    def forward(self, x):
        return self.b(torch.sigmoid(self.a(x)))


@pytest.mark.parametrize("size", [1, 3])
def test_folded_constants_are_repeated_or_left_out(size):
    torch.manual_seed(0)
    dense = zeroed(Half(size).double(), images().double())
    model, other, bare = (copy.deepcopy(dense) for _ in range(3))
    pruner = Pruner(model, images().double())
    pruner.prune_model()
    plan = Plan.from_json(pruner.plan.to_json())
    assert same(plan.apply(other), model, objects=False)
    target = "b.bias" if size == 1 else "b.weight"
    assert list(plan.adjusted) == [target] and not plan.adjusted[target][0].factor
    plan.apply(bare, constants=False)
    kept = plan.kept["b.weight"][1]
    assert torch.equal(bare.b.weight, dense.b.weight[:, list(kept)])
    assert torch.equal(bare.b.bias, dense.b.bias)
    far = images(seed=4).double()
    assert apart(dense(far), other(far)) < 1e-12 < apart(dense(far), bare(far))


# --- one after the other --------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_plans_chain_to_one_that_leads_the_whole_way(name):
    build, x = CASES[name]
    exact = name in ("Residual", "attention")
    dense = zeroed(build(), x) if exact else build()
    model = copy.deepcopy(dense)
    pruner = Pruner(model, x)
    assert pruner.plan is None and pruner.whole_plan is None
    pruner.prune_model(None if exact else 0.3)
    first = pruner.plan
    assert pruner.whole_plan == first and first.follows == 0
    pruner.prune_model(0.4)
    second, whole = pruner.plan, pruner.whole_plan
    assert second.removed and second.follows == 1
    assert whole == first.then(second) == Plan.from_json(whole.to_json())
    two = second.apply(first.apply(copy.deepcopy(dense)))
    one = whole.apply(copy.deepcopy(dense))
    assert same(two, model, objects=False) and same(one, model, objects=False)
    assert whole.removed == first.removed + second.removed and whole.follows == 0
    assert (whole.parameters_before, whole.parameters_after) == (
        sum(p.numel() for p in dense.parameters()),
        sum(p.numel() for p in model.parameters()),
    )


@pytest.mark.parametrize(
    "norm, first",
    [
        (nn.LayerNorm(16), 0.25),
        (nn.LayerNorm(16), None),
        (nn.RMSNorm(16), 0.25),
        (nn.RMSNorm(16), None),
        (nn.GroupNorm(2, 16), 0.25),  # one that remembers is not cut again
    ],
    ids=str,
)
def test_norms_remember_what_they_were_before_the_first_exact_cut(norm, first):
    x = images().double()
    model = lively(Normed(copy.deepcopy(norm), 16))
    dense = copy.deepcopy(zeroed(model, x, mixed=True) if first is None else model)
    pruner = Pruner(model, x)
    pruner.prune_model(first)
    one = pruner.plan
    zeroed(model, x, mixed=True)
    pruner.prune_model()
    assert pruner.plan.removed and bool(one.norms) == (first is None)
    whole = pruner.whole_plan.apply(copy.deepcopy(dense))
    assert same(whole, pruner.plan.apply(one.apply(dense)), objects=False)
    assert type(whole.norm) is type(model.norm)
    assert contents(whole)[1]["norm"] == contents(model)[1]["norm"]


def test_a_later_cut_may_make_a_grouped_conv_depthwise_and_then_take_groups():
    torch.manual_seed(0)
    dense = nn.Sequential(conv(3, 8), conv(8, 8, groups=4), conv(8, 2))
    model = copy.deepcopy(dense)
    first = cut_of(model, images())
    assert (model[1].in_channels, model[1].groups) == (4, 4)
    plan = first.then(cut_of(model, images()))
    assert (model[1].in_channels, model[1].groups) == (2, 2)
    assert same(plan.apply(copy.deepcopy(dense)), model, objects=False)


def test_plans_that_do_not_follow_each_other_are_refused():
    first, other = make(Plain), make(Residual)
    plans = []
    for model, share in ((first, 0.5), (other, 0.5), (make(Plain), 0.25)):
        pruner = Pruner(model, images())
        pruner.prune_model(share)
        plans.append(pruner.plan)
    for second in plans:
        with pytest.raises(ValueError, match="has to start where the first one ends"):
            plans[0].then(second)
    with pytest.raises(TypeError, match="a Plan follows a Plan, got int"):
        plans[0].then(3)


# --- what does not fit ----------------------------------------------------------------------


def cut_of(model, x):
    pruner = Pruner(model, x)
    pruner.prune_model(0.5)
    return pruner.plan


def without_statistics():
    model = make(Mlp)
    model.bn = nn.BatchNorm1d(16, track_running_stats=False)
    return model


def renamed():
    model = make(Plain)
    model.c = model.b
    del model.b
    return model


MISFITS = {
    "cut already": (Plain, images(), lambda: cut_and_kept(make(Plain)), "'a.weight' should be"),
    "another network": (Residual, images(), lambda: make(Plain), "'stem.weight', which the model"),
    "another name": (Plain, images(), renamed, "it cuts 'b.weight', which the model does not"),
    "no buffers": (Mlp, images(), without_statistics, "'bn.running_mean', which the model"),
    "other heads": (
        lambda: Heads(3),
        sequences().float(),
        lambda: Heads(6),
        "head_dim should be 8, it is 4",
    ),
    "untied": (Tied, TOKENS, lambda: Tied(False), "the tensors of head would no longer fit"),
}


def cut_and_kept(model):
    cut_of(model, images())
    return model


@pytest.mark.parametrize("name", MISFITS)
def test_a_model_that_does_not_fit_is_refused_and_left_alone(name):
    kind, x, other, reason = MISFITS[name]
    torch.manual_seed(0)
    plan = cut_of(make(kind) if isinstance(kind, type) and kind is not Tied else kind(), x)
    model = other()
    before = contents(model)
    with pytest.raises(ValueError, match=reason):
        plan.apply(model)
    assert same(before, model)


def test_tied_weights_are_cut_once():
    torch.manual_seed(0)
    model = Tied()
    other = copy.deepcopy(model)
    plan = cut_of(model, TOKENS)
    plan.apply(other)
    assert other.head.weight is other.embed.weight and other.embed.embedding_dim == 4
    assert same(model, other, objects=False)


def test_an_interrupt_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    plan = cut_of(make(Residual), images())
    swap, calls = surgery._swap, []
    for last in (1, 7):
        model = make(Residual)
        model(images(4)).sum().backward()
        before, gradients = contents(model), [p.grad.clone() for p in model.parameters()]
        calls.clear()

        def interrupted(*args, last=last):
            calls.append(args)
            if len(calls) > last:
                raise KeyboardInterrupt
            return swap(*args)

        monkeypatch.setattr(surgery, "_swap", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.apply(model)
        assert same(before, model)
        now = [p.grad for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(now, gradients, strict=True))


@pytest.mark.parametrize("name", ["_swap", "_set"])
def test_an_interrupt_right_behind_a_change_leaves_the_model_as_it_was(monkeypatch, name):
    plan, model = cut_of(make(Residual), images()), make(Residual)
    before, change = contents(model), getattr(surgery, name)

    def interrupted(*args):
        change(*args)
        if name == "_swap" or args[1] == "out_channels":
            raise KeyboardInterrupt

    monkeypatch.setattr(surgery, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.apply(model)
    assert same(before, model)


def test_inference_tensors_are_refused_and_left_alone():
    plan = cut_of(make(Residual), images())
    with torch.inference_mode():
        model = make(Residual)
    before = contents(model)
    with pytest.raises(ValueError, match=r"weight' was made under torch.inference_mode\(\)"):
        plan.apply(model)
    with pytest.raises(ValueError, match="build the model outside"):
        Pruner(model, images()).prune_model(0.5)
    assert same(before, model)
    plan.apply(copy.deepcopy(model))
    with torch.inference_mode():
        plan.apply(model)


def test_only_modules_are_cut():
    class Learner:
        model = make(Plain)

    plan = cut_of(make(Plain), images())
    with pytest.raises(TypeError, match="got Learner; pass learn.model"):
        plan.apply(Learner())


def inside(model):
    model.b = eagerly(model.b)
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # by dynamo itself
@pytest.mark.parametrize("wrap", [eagerly, nn.DataParallel, inside])
def test_wrapped_models_have_the_same_plans(wrap):
    plan = cut_of(make(Plain), images())
    model = make(Plain)
    assert cut_of(wrap(model), images()) == plan
    other = make(Plain)
    plan.apply(wrap(other))
    assert other.a.out_channels == 4
    assert torch.equal(model(images(3)), other(images(3)))


# --- values -----------------------------------------------------------------------------------


def test_a_plan_is_a_value():
    plan = cut_of(make(Plain), images())
    assert pickle.loads(pickle.dumps(plan)) == plan == copy.deepcopy(plan)
    assert plan != cut_of(make(Plain, seed=1), images())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.follows = 1
    assert len({plan, copy.deepcopy(plan)}) == 1


def test_json_is_shorter_than_lists_of_positions():
    plan = cut_of(nn.Sequential(conv(3, 512), conv(512, 512), conv(512, 4)), images())
    lists = sum(len(str(index)) for cuts in plan.kept.values() for index in cuts.values())
    assert len(plan.to_json()) < lists / 3


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=4))
def test_any_positions_come_back(masks):
    masks = [[True, *m] for m in masks]
    shape = tuple(len(m) for m in masks)
    kept = {d: tuple(i for i, k in enumerate(m) if k) for d, m in enumerate(masks) if d != 1}
    plan = Plan({"w": kept}, (AxisCut("l", 3, 2),), 10, 5, {"w": shape})
    back = Plan.from_json(plan.to_json())
    assert back == plan and back.shape_after("w") == plan.shape_after("w")


NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, 2.5]), st.floats(-1e300, 1e300))


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=24), st.booleans())
def test_any_numbers_come_back(numbers, factor):
    value = torch.tensor(numbers, dtype=torch.float64).view(1, -1)
    runs = as_runs(value, factor)
    assert torch.equal(from_runs(runs, value.shape, factor), value)
    plan = Plan({}, (), 0, 0, {"w": (1, len(numbers))}, adjusted={"w": (Adjustment(factor, runs),)})
    assert Plan.from_json(plan.to_json()) == plan


def wrong(**parts):
    """The text of a plan in which some parts are replaced."""
    plan = json.loads(TEXT)
    plan.update(parts)
    return json.dumps(plan)


TEXT = Plan(
    {"w": {0: (0, 2)}},
    (AxisCut("l", 3, 2),),
    10,
    5,
    {"w": (3, 2)},
    {"l": {"groups": (4, 2), "sizes": ((4, 4), (2, 2))}},
    {"n": {"class": "NarrowLayerNorm", "width": 4, "channel_dim": -1}},
    {"w": (Adjustment(True, ((0, 2, 0.5),)),)},
).to_json()
BAD = {
    "no JSON": "{",
    "nothing": "",
    "deep": "[" * 100_000,
    "a list": "[]",
    "a number": "3",
    "other JSON": '{"a": 1}',
    "NaN": TEXT.replace("0.5", "NaN"),
    "infinite": TEXT.replace("0.5", "1e999"),
    "twice": TEXT.replace('"follows":0', '"follows":0,"follows":0'),
    "later version": wrong(plan=2),
    "no version": wrong(plan=True),
    "more": wrong(more=1),
    "less": TEXT.replace('"follows":0,', ""),
    "negative": wrong(follows=-1),
    "bool": wrong(follows=False),
    "digits": wrong(positions=["zz"]),
    "length": wrong(positions=["a000"]),
    "beyond": wrong(positions=["a8"]),
    "too long a text": " " * 2**25 + TEXT,
    "too many": wrong(positions=["ff" * 2**20], tensors={"w": [[2**23, 1], [0, None]]}),
    "none stay": wrong(positions=["00"]),
    "positions": wrong(positions=[3]),
    "no line": wrong(tensors={"w": [[3, 2], [1, None]]}),
    "negative line": wrong(tensors={"w": [[3, 2], [-1, None]]}),
    "shape": wrong(tensors={"w": [[3, 2.0], [0, None]]}),
    "negative shape": wrong(tensors={"w": [[3, -2], [0, None]]}),
    "huge shape": wrong(tensors={"w": [[10**30, 2], [0, None]]}),
    "dimensions": wrong(tensors={"w": [[3, 2], [0]]}),
    "axis": wrong(axes=[["l", 2, 3]]),
    "axis name": wrong(axes=[[1, 3, 2]]),
    "parameters": wrong(parameters=[5, 10]),
    "one parameter": wrong(parameters=[5]),
    "grows": wrong(integers={"l": {"groups": [2, 4]}}),
    "zero": wrong(integers={"l": {"groups": [2, 0]}}),
    "kinds": wrong(integers={"l": {"groups": [2, [1]]}}),
    "text": wrong(integers={"l": {"groups": ["2", "1"]}}),
    "lengths": wrong(integers={"l": {"sizes": [[2, 2], [1]]}}),
    "norm": wrong(norms={"n": {"class": ["NarrowLayerNorm"]}}),
    "no norms": wrong(norms=[]),
    "stranger": wrong(adjusted={"v": []}),
    "operation": wrong(adjusted={"w": [["minus", [0], [1], [0.5]]]}),
    "overlap": wrong(adjusted={"w": [["plus", [0, 1], [2, 1], [0.5, 0.5]]]}),
    "too long": wrong(adjusted={"w": [["plus", [0], [5], [0.5]]]}),
    "huge": wrong(adjusted={"w": [["plus", [0], [10**18], [0.5]]]}),
    "uneven": wrong(adjusted={"w": [["plus", [0], [1], []]]}),
    "integer": wrong(adjusted={"w": [["plus", [0], [1], [1]]]}),
}


def test_the_text_that_is_made_worse_is_a_plan():
    assert Plan.from_json(TEXT).to_json() == TEXT


@pytest.mark.parametrize("name", BAD)
def test_text_that_is_no_plan_is_refused(name):
    with pytest.raises(ValueError, match="no plan|no JSON|nested|no number|comes twice"):
        Plan.from_json(BAD[name])
    with pytest.raises(TypeError, match="JSON is text, got bytes"):
        Plan.from_json(BAD[name].encode())


NORMS = {
    "class": {"class": "Linear"},
    "no class": {"class": 3, "width": 8},
    "more": {"class": "NarrowLayerNorm", "width": 8, "channel_dim": -1, "forward": 1},
    "less": {"class": "NarrowLayerNorm", "width": 8},
    "wide": {"class": "NarrowLayerNorm", "width": 9, "channel_dim": -1},
    "no width": {"class": "NarrowLayerNorm", "width": "8", "channel_dim": -1},
    "dimension": {"class": "NarrowLayerNorm", "width": 8, "channel_dim": 0},
    "other norm": {"class": "NarrowGroupNorm", "width": 8},
    "no RMS norm": {"eps": 1e-5},
    "attribute": {"training": 1.0},
    "nothing": {},
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_become_nothing_but_norms_that_remember(name):
    model = Normed(nn.LayerNorm(8))
    before = contents(model)
    with pytest.raises(ValueError, match="'norm' cannot remember its width"):
        Plan({}, (), 0, 0, norms={"norm": NORMS[name]}).apply(model)
    with pytest.raises(ValueError, match="'a' cannot remember"):
        Plan({}, (), 0, 0, norms={"a": NORMS[name]}).apply(model)
    assert same(before, model)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), 1, "1"])
def test_an_eps_is_a_positive_number(value):
    model = Normed(nn.RMSNorm(8))
    with pytest.raises(ValueError, match="must be a positive number"):
        Plan({}, (), 0, 0, norms={"norm": {"eps": value}}).apply(model)
    assert model.norm.eps is None


@pytest.mark.parametrize("name", ["__class__", "forward", "stride", "training", "_parameters", "x"])
def test_no_attributes_but_sizes_change(name):
    model = make(Plain)
    model.a.x = 8
    before = contents(model)
    with pytest.raises(ValueError, match="has no size"):
        Plan({}, (), 0, 0, integers={"a": {name: (8, 4)}}).apply(model)
    assert same(before, model)


def test_sizes_that_their_tensors_do_not_have_are_refused():
    model = make(Plain)
    before = contents(model)
    plan = Plan(
        {"a.weight": {0: (0, 1)}},
        (),
        0,
        0,
        {"a.weight": (8, 3, 3, 3)},
        {"a": {"out_channels": (8, 3)}},
    )
    for bad in (plan, dataclasses.replace(plan, integers={})):  # a bias is longer than its weight
        with pytest.raises(ValueError, match="the tensors of a would no longer fit together"):
            bad.apply(model)
        assert same(before, model)
