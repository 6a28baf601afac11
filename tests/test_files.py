"""Saving and loading: bit for bit the same, or refused with nothing changed."""

import copy
import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from comparing import contents, same
from networks import (
    ALL,
    TOKENS,
    Attention,
    Depthwise,
    Heads,
    Mlp,
    Normed,
    Plain,
    Residual,
    Tied,
    conv,
    eagerly,
    images,
    lively,
    make,
    sequences,
    shake,
    zeroed,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fasterai.coupling.surgery as surgery
from fasterai.deploy import files
from fasterai.deploy.files import PrunedFileError, load_pruned, read_plan, save_pruned
from fasterai.prune.pruner import Pruner

tv = torchvision.models


def pruned(model, x, sparsity=0.5):
    """A model that was cut, and its plan."""
    pruner = Pruner(model, x)
    pruner.prune_model(sparsity)
    return model, pruner.whole_plan


@torch.no_grad()
def outputs(model, x):
    out = model.eval()(x)
    return list(out.values()) if isinstance(out, dict) else [out]


def equal(one, other, x):
    pairs = zip(outputs(one, x), outputs(other, x), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("kind", ALL)
def test_a_fresh_model_becomes_the_saved_one(kind, sparsity, tmp_path):
    model = make(kind)
    if sparsity is None:
        zeroed(model, images())
    model, plan = pruned(model, images(), sparsity)
    fresh = make(kind, seed=5)
    parameters = [id(p) for p in fresh.parameters()]
    save_pruned(model, tmp_path / "a.safetensors", plan)
    assert load_pruned(fresh, tmp_path / "a.safetensors") is fresh
    assert same(model, fresh, objects=False) and equal(model, fresh, images(3))
    assert [id(p) for p in fresh.parameters()] == parameters
    assert read_plan(tmp_path / "a.safetensors") == plan
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]
    fresh.train()
    sum(o.square().mean() for o in outputs_of(fresh(images(4)))).backward()


def outputs_of(out):
    return list(out.values()) if isinstance(out, dict) else [out]


@pytest.mark.parametrize("kind", [k for k in ALL if k is not Depthwise])
def test_without_a_plan_the_shapes_decide(kind, tmp_path):
    model, _ = pruned(make(kind), images())
    save_pruned(model, tmp_path / "a", None)
    fresh = load_pruned(make(kind, seed=5), str(tmp_path / "a"))
    assert same(model, fresh, objects=False) and equal(model, fresh, images(3))
    assert read_plan(tmp_path / "a") is None


def test_widths_around_layers_follow_the_shapes(tmp_path):
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.widths, self.hidden_dim = 8, [8, 12], 8
            self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 20), nn.Linear(20, 4)

        def forward(self, x):
            return self.c(self.b(self.a(x).view(len(x), self.hidden_dim)))

    x = torch.randn(2, 12)
    model, plan = pruned(Remembering(), x)
    assert model.hidden_dim == 4
    save_pruned(model, tmp_path / "a")
    fresh = load_pruned(Remembering(), tmp_path / "a")
    assert fresh.hidden_dim == 4 and fresh.widths == [4, 12] and equal(model, fresh, x)


class Buffered(nn.Module):
    """Buffers of all kinds, one of which is not saved and cut."""

    def __init__(self, seed=0):
        super().__init__()
        self.a, self.norm, self.b = conv(3, 8), nn.BatchNorm2d(8), conv(8, 4)
        self.register_buffer("gain", torch.rand(8) + seed)
        self.register_buffer("fixed", torch.linspace(1, 2, 8), persistent=False)
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("flags", torch.tensor([True, bool(seed)]))
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, x):
        x = self.norm(self.a(x)) * (self.gain * self.fixed).view(-1, 1, 1)
        return self.b(x) * (self.steps + self.flags.sum())


def test_buffers_come_along(tmp_path):
    model = Buffered(3)
    model(images(4))
    model, plan = pruned(model, images())
    save_pruned(model, tmp_path / "a", plan)
    fresh = load_pruned(Buffered(0), tmp_path / "a")
    assert len(fresh.fixed) == 4 and fresh.steps == 3 and fresh.flags.all()
    assert same(model, fresh, objects=False) and equal(model, fresh, images(3))
    assert "fixed" not in load_file(tmp_path / "a")
    save_pruned(model, tmp_path / "a")  # no plan says which of its values stay
    with pytest.raises(PrunedFileError, match="'the model' .its fixed is in no file"):
        load_pruned(Buffered(0), tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype, tmp_path):
    model, plan = pruned(make(Residual), images())
    model.to(dtype)
    save_pruned(model, tmp_path / "a", plan)
    fresh = load_pruned(make(Residual, seed=2).to(dtype), tmp_path / "a")
    assert same(model, fresh, objects=False) and equal(model, fresh, images(dtype=dtype))
    other = make(Residual, seed=2)
    before = contents(other)
    with pytest.raises(PrunedFileError, match=f"as {dtype}, the model has torch.float32"):
        load_pruned(other, tmp_path / "a")
    assert same(before, other)


def test_conjugate_and_negative_views_keep_their_numbers(tmp_path):
    def build(seed):
        model = make(Plain, seed=seed)
        z = torch.randn(3, dtype=torch.complex64)
        model.register_buffer("conjugate", z.conj())
        model.register_buffer("negative", z.conj().imag)
        model.register_buffer("both", torch.randn(2, 3, dtype=torch.complex64).conj().t())
        return model

    model, other = build(0), build(1)
    assert model.conjugate.is_conj() and model.negative.is_neg()
    save_pruned(model, tmp_path / "a")
    load_pruned(other, tmp_path / "a")
    for name in ("conjugate", "negative", "both"):
        assert torch.equal(other.get_buffer(name), model.get_buffer(name))


def test_the_layout_in_memory_is_kept(tmp_path):
    last = torch.channels_last
    for saved, built in ((True, False), (False, True), (True, True)):
        model, plan = pruned(make(Plain), images())
        fresh = make(Plain, seed=3)
        if saved:
            model.to(memory_format=last)
        if built:
            fresh.to(memory_format=last)
        save_pruned(model, tmp_path / "a", plan)
        load_pruned(fresh, tmp_path / "a")
        assert fresh.b.weight.is_contiguous(memory_format=last)
        assert same(model.to(memory_format=last), fresh, objects=False)
        assert equal(model, fresh, images(3).to(memory_format=last))


def test_what_is_not_contiguous_is_saved_and_loaded_as_it_lies(tmp_path):
    model, plan = pruned(make(Mlp), images())
    model.a.weight.data = model.a.weight.data.t().contiguous().t()
    model.b.weight.data = torch.cat([model.b.weight.data] * 2)[: len(model.b.weight)]
    model.c.bias.data = torch.stack([model.c.bias.data] * 2, 1)[:, 0]
    model.head.bias.data = torch.zeros(1).expand(3)
    strides = model.a.weight.stride()
    save_pruned(model, tmp_path / "a", plan)
    fresh = load_pruned(make(Mlp, seed=2), tmp_path / "a")
    assert fresh.a.weight.stride() == strides != (strides[1], strides[0])
    assert equal(model, fresh, images(3))


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    torch.manual_seed(0)
    model, plan = pruned(Tied(), TOKENS)
    save_pruned(model, tmp_path / "a", plan)
    assert "head.weight" not in load_file(tmp_path / "a")
    fresh = load_pruned(Tied(), tmp_path / "a")
    assert fresh.head.weight is fresh.embed.weight and equal(model, fresh, TOKENS)
    for one, other, reason in ((Tied(), Tied(False), "holds no"), (Tied(False), Tied(), "is tied")):
        save_pruned(one, tmp_path / "b")
        before = contents(other)
        with pytest.raises(PrunedFileError, match=reason):
            load_pruned(other, tmp_path / "b")
        assert same(before, other)


def test_layers_that_share_memory_without_being_tied(tmp_path):
    model = make(Plain)
    flat = torch.cat([model.a.bias.data, model.b.bias.data])
    model.a.bias.data, model.b.bias.data = flat[:8], flat[8:]
    save_pruned(model, tmp_path / "a")
    fresh = load_pruned(make(Plain, seed=1), tmp_path / "a")
    assert same(model, fresh, objects=False)


class Recurrent(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.first, self.rnn = nn.Linear(10, 8), nn.LSTM(8, 12, 2, batch_first=True, **kwargs)
        self.last = nn.Linear(kwargs.get("proj_size", 12), 4)

    def forward(self, x):
        return self.last(self.rnn(self.first(x))[0])


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch, of what it does not have
@pytest.mark.parametrize("with_plan", [True, False])
def test_recurrent_layers(with_plan, tmp_path):
    x = sequences().float()
    torch.manual_seed(0)
    model, plan = pruned(Recurrent(), x)
    assert model.rnn.input_size == 4
    save_pruned(model, tmp_path / "a", plan if with_plan else None)
    assert equal(model, load_pruned(Recurrent(), tmp_path / "a"), x)


def test_recurrent_layers_become_as_wide_as_their_tensors(tmp_path):
    smaller = nn.Sequential(nn.GRU(4, 3, 2, bidirectional=True))
    save_pruned(smaller, tmp_path / "a")
    model = load_pruned(nn.Sequential(nn.GRU(4, 8, 2, bidirectional=True)), tmp_path / "a")
    assert model[0].hidden_size == 3
    x = torch.randn(5, 2, 4)
    assert torch.equal(model(x)[0], smaller(x)[0])


NORMS = [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(1, 8), nn.GroupNorm(2, 8)]


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_norms_that_remember_their_width_do_so_when_loaded(norm, tmp_path):
    x = images().double()
    model, plan = pruned(zeroed(lively(Normed(copy.deepcopy(norm))), x, mixed=True), x, None)
    assert plan.norms
    save_pruned(model, tmp_path / "a", plan)
    fresh = Normed(copy.deepcopy(norm)).double()
    load_pruned(fresh, tmp_path / "a")
    assert type(fresh.norm) is type(model.norm) and same(model, fresh, objects=False)
    assert equal(model, fresh, images(3, 9).double())
    if isinstance(norm, nn.RMSNorm):  # its class does not show it: only loading can refuse
        save_pruned(model, tmp_path / "a")
        with pytest.raises(PrunedFileError, match="'norm' .it may remember its width"):
            load_pruned(Normed(copy.deepcopy(norm)).double(), tmp_path / "a")
    else:
        with pytest.raises(ValueError, match="'norm' remembers a width that shapes do not tell"):
            save_pruned(model, tmp_path / "b")
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_the_plan_and_the_model_agree_on_what_norms_remember(norm, tmp_path):
    x = images().double()
    zeros, plan = pruned(zeroed(lively(Normed(copy.deepcopy(norm))), x, mixed=True), x, None)
    ranks, other = pruned(lively(Normed(copy.deepcopy(norm))), x)
    assert zeros.a.weight.shape == ranks.a.weight.shape and not other.norms
    for model, wrong in ((zeros, other), (ranks, plan)):
        if model is zeros and isinstance(norm, nn.RMSNorm):
            continue  # its eps might be the user's
        with pytest.raises(ValueError, match="leads to a norm 'norm' that remembers"):
            save_pruned(model, tmp_path / "a", wrong)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_wrapped_models_give_the_same_files(tmp_path):
    model, plan = pruned(make(Plain), images())
    save_pruned(model, tmp_path / "a", plan)
    for wrap in (eagerly, nn.DataParallel, lambda m: nn.DataParallel(eagerly(m))):
        wrapped, same_plan = pruned(wrap(make(Plain)), images())
        save_pruned(wrapped, tmp_path / "b", same_plan)
        assert read_plan(tmp_path / "b") == plan
        one, other = load_file(tmp_path / "a"), load_file(tmp_path / "b")
        assert list(one) == list(other) and all(map(torch.equal, one.values(), other.values()))
        fresh = make(Plain, seed=4)
        assert isinstance(load_pruned(wrap(fresh), tmp_path / "a"), nn.Module)
        assert equal(model, fresh, images(3))


def test_several_cuts_make_one_file(tmp_path):
    model = make(Residual)
    pruner = Pruner(model, images())
    pruner.prune_model(0.3)
    first = pruner.whole_plan
    pruner.prune_model(0.3)
    other = Pruner(model, images())
    other.prune_model(0.3)
    with pytest.raises(ValueError, match="pass that of all cuts, pruner.whole_plan"):
        save_pruned(model, tmp_path / "a", pruner.plan)
    with pytest.raises(ValueError, match="leads to 'stem.weight' of shape"):
        save_pruned(model, tmp_path / "a", first)
    assert not os.listdir(tmp_path)
    save_pruned(model, tmp_path / "a", pruner.whole_plan.then(other.whole_plan))
    fresh = load_pruned(make(Residual, seed=6), tmp_path / "a")
    assert equal(model, fresh, images(3))
    again = Pruner(fresh, images())  # and goes on
    again.prune_model(0.3)
    save_pruned(fresh, tmp_path / "b", read_plan(tmp_path / "a").then(again.whole_plan))
    assert equal(fresh, load_pruned(make(Residual, seed=7), tmp_path / "b"), images(3))
    save_pruned(fresh, tmp_path / "c", again.whole_plan)  # of the later cuts alone
    late = make(Residual, seed=7)
    with pytest.raises(PrunedFileError, match="other cuts came before this plan: apply theirs"):
        load_pruned(late, tmp_path / "c")
    read_plan(tmp_path / "a").apply(late)
    assert equal(fresh, load_pruned(late, tmp_path / "c"), images(3))


# --- what shapes leave open ---------------------------------------------------------------------


class Bilinear(nn.Module):
    """A width that two layers share at first, and one of them gives up."""

    def __init__(self):
        super().__init__()
        self.inner_dim = 10
        self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Split(nn.Module):
    """Groups of channels whose number and width stand side by side."""

    def __init__(self):
        super().__init__()
        self.parts, self.part_width = 3, 8
        self.a, self.b = nn.Linear(10, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.b(self.a(x).unflatten(-1, (self.parts, self.part_width)).relu().flatten(2))


OPEN = {
    "heads": (lambda: Heads(3), sequences().float(), "the model. .its heads may be fewer or narr"),
    "grouped conv": (lambda: make(Depthwise), images(), "twice. .its groups may be fewer or narro"),
    "group norm": (lambda: Normed(nn.GroupNorm(2, 8)), images(), "norm. .its groups may be fewer"),
    "two of a width": (Bilinear, torch.randn(2, 10), "its inner_dim, 10, may be 5 or 10"),
    "split": (Split, sequences().float(), "its part_width, 8, is one side of a split"),
    "attention": (Attention, sequences().float(), "the model. .its heads may be fewer or narrow"),
    "whole heads": (
        lambda: tv.VisionTransformer(16, 8, 1, 4, 24, 48, num_classes=5).eval(),
        images(),
        "encoder_layer_0. .its heads may be fewer or nar",
    ),
}


@pytest.mark.parametrize("name", OPEN)
def test_what_shapes_leave_open_is_refused_by_name(name, tmp_path):
    build, x, reason = OPEN[name]
    torch.manual_seed(0)
    model, plan = pruned(build(), x)
    assert plan.removed
    save_pruned(model, tmp_path / "a")
    fresh = build()
    before = contents(fresh)
    with pytest.raises(PrunedFileError, match=reason) as error:
        load_pruned(fresh, tmp_path / "a")
    assert same(before, fresh) and "pruner.whole_plan" in str(error.value)
    save_pruned(model, tmp_path / "a", plan)
    assert equal(model, load_pruned(fresh, tmp_path / "a"), x)


SMALLER = {
    "kernel": (conv(3, 8, 3), conv(3, 8, 1), "its kernel changes"),
    "vocabulary": (nn.Embedding(9, 4), nn.Embedding(7, 4), "its number of entries changes"),
    "map": (nn.LayerNorm((4, 6)), nn.LayerNorm((2, 6)), "it normalises several dimensions"),
    "projected": (nn.LSTM(4, 8, proj_size=4), nn.LSTM(4, 6, proj_size=3), "its projection and its"),
}


@pytest.mark.parametrize("name", SMALLER)
def test_layers_that_shrink_as_no_cut_makes_them(name, tmp_path):
    layer, smaller, reason = SMALLER[name]
    save_pruned(nn.Sequential(smaller), tmp_path / "a")
    model = nn.Sequential(layer)
    before = contents(model)
    with pytest.raises(PrunedFileError, match=reason):
        load_pruned(model, tmp_path / "a")
    assert same(before, model)


# --- what does not fit ----------------------------------------------------------------------------


def saved(path, kind=Residual, with_plan=True):
    model, plan = pruned(make(kind), images())
    save_pruned(model, path, plan if with_plan else None)
    return model


def other_head():
    model = make(Residual)
    model.head = nn.Linear(8, 3)
    return model


def wider():
    model = make(Residual)
    model.extra = nn.Linear(2, 2)
    return model


MISFITS = {
    "another network": (lambda: make(Plain), "the plan does not fit|the model has no"),
    "another head": (other_head, r"'head.bias' of shape \(4,\)|'head.weight' should be \(4, 8\)"),
    "a layer more": (wider, "it holds no 'extra.bias', 'extra.weight'"),
    "pruned already": (
        lambda: pruned(make(Residual), images(), 0.75)[0],
        "and not pruned yet|was pruned already",
    ),
}


@pytest.mark.parametrize("with_plan", [True, False])
@pytest.mark.parametrize("name", MISFITS)
def test_a_model_that_does_not_fit_is_left_alone(name, with_plan, tmp_path):
    build, reason = MISFITS[name]
    saved(tmp_path / "a", with_plan=with_plan)
    model = build()
    before = contents(model)
    with pytest.raises(PrunedFileError, match=reason):
        load_pruned(model, tmp_path / "a")
    assert same(before, model)


def test_models_that_are_not_ready(tmp_path):
    saved(tmp_path / "a")
    with torch.device("meta"):
        empty = Residual()
    for model, reason in (
        (empty, "'stem.weight' is on the meta device"),
        (nn.LazyLinear(3), "'weight' is lazy: run the model once"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_pruned(model, tmp_path / "a")
        with pytest.raises(ValueError, match=reason):
            save_pruned(model, tmp_path / "b")
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got dict"):
        load_pruned({}, tmp_path / "a")
    with pytest.raises(TypeError, match="plan must be a Plan or None, got str"):
        save_pruned(make(Plain), tmp_path / "b", "plan")
    with pytest.raises(FileNotFoundError):
        load_pruned(make(Plain), tmp_path / "none")
    assert os.listdir(tmp_path) == ["a"]


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"any": 1}


def test_folders_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*none for a: make it first"):
        save_pruned(make(Plain), tmp_path / "none" / "a")
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        save_pruned(make(Plain), tmp_path)


def test_what_safetensors_cannot_hold_is_refused(tmp_path):
    sparse = make(Plain)
    sparse.register_buffer("more", torch.eye(3).to_sparse())
    wide = make(Plain)
    wide.register_buffer("more", torch.zeros(2, dtype=torch.complex128))
    for model, reason in (
        (nn.Sequential(Extra(2, 2)), "'0' keeps extra state"),
        (sparse, "cannot hold 'more' .Tensor, torch.sparse_coo"),
        (wide, "cannot hold 'more' .Tensor, torch.strided, torch.complex128"),
    ):
        with pytest.raises(ValueError, match=reason):
            save_pruned(model, tmp_path / "a")
    assert not os.listdir(tmp_path)


def test_an_interrupt_changes_neither_model_nor_file(tmp_path, monkeypatch):
    saved(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    swap, calls = surgery._swap, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return swap(*args)

    model = make(Residual, seed=3)
    before = contents(model)
    monkeypatch.setattr(surgery, "_swap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_pruned(model, tmp_path / "a")
    assert same(before, model) and len(calls) == 10

    def stopped(tensors, path, about):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_pruned(model, tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == data


# --- damaged, foreign, hostile --------------------------------------------------------------------


def refused(path, build=lambda: make(Residual, seed=3)):
    """Loading raises the one error, and the model is as it was; False where it loads."""
    model = build()
    before = contents(model)
    try:
        load_pruned(model, path)
    except PrunedFileError as error:
        assert str(path) in str(error) and same(before, model)
        return True
    return False


@pytest.mark.parametrize("with_plan", [True, False])
def test_damage_is_seen_wherever_it_is(with_plan, tmp_path):
    saved(tmp_path / "a", with_plan=with_plan)
    whole = (tmp_path / "a").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path, rng = tmp_path / "b", random.Random(0)
    places = [*rng.choices(range(header), k=100), *rng.choices(range(header, len(whole)), k=30)]
    spared = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        spared += not refused(path)
    assert spared == 0
    for length in [*range(10), *rng.choices(range(len(whole)), k=30), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert refused(path)
    for more in (b"\0", b"x" * 100):
        path.write_bytes(whole + more)
        assert refused(path)
    path.write_bytes(whole)
    assert not refused(path)


def test_foreign_files_are_refused(tmp_path):
    model = make(Residual)
    path = tmp_path / "a"
    save_file(model.state_dict(), path)
    with pytest.raises(PrunedFileError, match="save_pruned did not write it"):
        load_pruned(make(Residual), path)
    save_file(model.state_dict(), path, {"fasterai": "2"})
    with pytest.raises(PrunedFileError, match="its format is '2', this fasterai reads '1'"):
        load_pruned(make(Residual), path)
    torch.save(model, path)
    assert refused(path)
    for data in (b"", b"{}", b"\xff" * 64, (2**63).to_bytes(8, "little") + b"{" * 64, b"\0" * 8):
        path.write_bytes(data)
        assert refused(path)
    path.write_bytes((10**8 + 1).to_bytes(8, "little") + b" " * 64)
    assert refused(path)
    assert refused(tmp_path)


def forge(path, out, change):
    """A file with other contents, and a digest that fits them."""
    with safe_open(path, "pt") as opened:
        about = dict(opened.metadata())
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    change(about, tensors)
    about["digest"] = files.digest(tensors, about)
    save_file(tensors, out, about)
    return out


def replan(**parts):
    def change(about, tensors):
        plan = json.loads(about["plan"])
        for part, value in parts.items():
            plan[part] = {**plan[part], **value} if isinstance(value, dict) else value
        about["plan"] = json.dumps(plan)

    return change


def put(name, tensor):
    return lambda about, tensors: tensors.update({name: tensor})


def drop(name):
    return lambda about, tensors: tensors.pop(name)


def orders(**orders):
    return lambda about, tensors: about.update(orders=json.dumps(orders))


def linger(attribute, sizes=(8, 4), module="c1"):
    return replan(integers={module: {attribute: list(sizes)}})


HOSTILE = {
    "no tensor": drop("c1.weight"),
    "a tensor more": put("c9.weight", torch.zeros(2)),
    "dunder tensor": put("__class__", torch.zeros(2)),
    "shape": put("c1.weight", torch.zeros(8, 4, 3, 2)),
    "dimensions": put("c1.weight", torch.zeros(8)),
    "empty": put("c1.weight", torch.zeros(0, 4, 3, 3)),
    "dtype": put("c1.weight", torch.zeros(8, 4, 3, 3, dtype=torch.int32)),
    "class": linger("__class__"),
    "dict": linger("__dict__"),
    "forward": linger("forward"),
    "call": linger("__call__"),
    "private": linger("_parameters"),
    "training": linger("training"),
    "stride": linger("stride", ((2, 2), (1, 1))),
    "kernel": linger("kernel_size", ((3, 3), (1, 1))),
    "other before": linger("out_channels", (9, 4)),
    "not the tensor's": linger("out_channels", (16, 7)),
    "no such module": linger("out_channels", (8, 4), "c9"),
    "dunder module": linger("out_channels", (8, 4), "__class__"),
    "path": linger("out_channels", (8, 4), "c1.__class__.mro"),
    "method": linger("register_forward_hook"),
    "norm class": replan(norms={"bn1": {"class": "Module"}}),
    "other class": replan(norms={"bn1": {"class": "NarrowGroupNorm", "width": 8}}),
    "hook": replan(norms={"bn1": {"class": "os.system", "width": 8}}),
    "eps": replan(norms={"bn1": {"eps": 1e-3}}),
    "plan of nothing": replan(tensors={}, positions=[], integers={}),
    "fewer positions": replan(positions=["80"]),
    "giant positions": replan(positions=["f" * 1_000_000]),
    "giant shape": replan(tensors={"c1.weight": [[10**12, 8, 3, 3], [None] * 4]}),
    "giant numbers": replan(adjusted={"c1.weight": [["plus", [0], [10**12], [1.0]]]}),
    "numbers elsewhere": replan(adjusted={"head.bias": [["plus", [0], [1], [1.0]]]}),
    "no plan": lambda about, tensors: about.update(plan=""),
    "plan is a list": lambda about, tensors: about.update(plan="[1]"),
    "orders are a list": lambda about, tensors: about.update(orders="[1]"),
    "orders of another": orders(**{"c9.weight": [0]}),
    "negative order": orders(**{"c1.weight": [0, 1, 2, -1]}),
    "double order": orders(**{"c1.weight": [0, 1, 2, 2]}),
    "long order": orders(**{"c1.weight": [0, 1, 2, 3, 4]}),
    "order of text": orders(**{"c1.weight": "0123"}),
    "order of bools": orders(**{"bn0.weight": [False]}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path):
    saved(tmp_path / "a")
    assert refused(forge(tmp_path / "a", tmp_path / "b", HOSTILE[name]))


def test_the_forger_can_write_files_that_load(tmp_path):
    saved(tmp_path / "a")
    assert not refused(forge(tmp_path / "a", tmp_path / "b", lambda about, tensors: None))


def mutated(tree, rng):
    """A JSON tree in which something, somewhere, is something else."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.85:
        tree = copy.copy(tree)
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        way = rng.random()
        if way < 0.8:
            tree[key] = mutated(tree[key], rng)
        elif way < 0.9:
            del tree[key]
        elif isinstance(tree, dict):
            tree[rng.choice(["__class__", "forward", "c1", "", "stride", "0"])] = tree[key]
        else:
            tree.insert(rng.randrange(len(tree) + 1), tree[key])
        return tree
    strange = [None, True, -1, 0, 1, 2, 7, 10**20, 0.5, -1e300, "", "__class__", "forward"]
    return rng.choice([*strange, [], {}, [0], [[0]], {"a": 1}, "ff", "0f", tree])


def with_everything():
    """A small network whose plan has integers, norms and numbers."""
    torch.manual_seed(0)
    return lively(Attention())


def test_a_mutated_plan_is_refused_or_makes_a_working_network(tmp_path):
    x = sequences()
    model, plan = pruned(zeroed(with_everything(), x, mixed=True), x, None)
    assert plan.integers and plan.norms and plan.adjusted
    save_pruned(model, tmp_path / "a", plan)
    with safe_open(tmp_path / "a", "pt") as opened:
        text = json.loads(opened.metadata()["plan"])
    rng, loaded = random.Random(0), 0
    fresh = with_everything()
    before = contents(fresh)
    kinds = {n: type(m) for n, m in fresh.named_modules()}
    for _ in range(300):
        plan = json.dumps(mutated(text, rng))
        forge(tmp_path / "a", tmp_path / "b", lambda about, _, plan=plan: about.update(plan=plan))
        try:
            load_pruned(fresh, tmp_path / "b")
        except PrunedFileError:
            assert same(before, fresh)
            continue
        loaded += 1
        for name, module in fresh.named_modules():
            assert type(module).__name__ in (kinds[name].__name__, "NarrowLayerNorm")
            assert "forward" not in vars(module) and "__class__" not in vars(module)
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
        )
        fresh = with_everything()
        before = contents(fresh)
    assert 0 < loaded < 100


# --- real networks --------------------------------------------------------------------------------

VIT = "torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=5)"
BERT = (
    "transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, "
    "hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))"
)
REAL = ["torchvision.models.resnet18()", VIT]
LARGE = [
    "torchvision.models.mobilenet_v2()",
    "torchvision.models.resnet50()",
    "torchvision.models.densenet121()",
    "torchvision.models.vit_b_16(image_size=32)",
    "timm.create_model('convnext_atto')",
    BERT,
]
PROGRAM = """
import torch
from fasterai.deploy.files import load_pruned
x, names, files = torch.load({inputs!r})
for name, file in zip(names, files, strict=True):
    globals()[name.split(".")[0]] = __import__(name.split(".")[0])
    model = load_pruned(eval(name), file).eval()
    with torch.no_grad():
        out = model(x[1] if "Bert" in name else x[0])
    torch.save(getattr(out, "logits", out), file + ".out")
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [REAL, pytest.param(LARGE, marks=pytest.mark.long)], ids=len)
def test_real_networks_in_this_process_and_a_fresh_one(names, tmp_path):
    images_and_tokens = images(2, 32), torch.arange(18).view(2, 9)
    done, expected = [], {}
    for i, name in enumerate([*names, *names]):
        x = images_and_tokens["Bert" in name]
        package = name.split(".")[0]
        space = {package: importlib.import_module(package)}
        model = shake(eval(name, space)).eval()
        if i < len(names):
            zeroed(model, x, mixed=True)
        model, plan = pruned(model, x, None if i < len(names) else 0.5)
        assert plan.parameters_after < 0.5 * plan.parameters_before
        done.append((name, str(tmp_path / str(i))))
        save_pruned(model, done[-1][1], plan)
        fresh = load_pruned(eval(name, space), done[-1][1])
        expected[done[-1][1]] = answer(model, x)
        assert torch.equal(answer(fresh, x), answer(model, x))
    torch.save((images_and_tokens, *zip(*done, strict=True)), tmp_path / "inputs")
    run = PROGRAM.format(inputs=str(tmp_path / "inputs"))
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", run], check=True, env=here)
    assert all(torch.equal(torch.load(file + ".out"), out) for file, out in expected.items())


@torch.no_grad()
def answer(model, x):
    out = model.eval()(x)
    return getattr(out, "logits", out)
