"""Masks and tickets as values: against sets and booleans, and in files."""

import copy
import json
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ALL, Plain, Residual, images, make, tensors
from safetensors.torch import load_file, save_file
from torch import nn

from fasterai.core.writing import digest
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.tickets import files
from fasterai.tickets.masks import Masks
from fasterai.tickets.ticket import Ticket, snapshot

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4)


def random_masks(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.rand(shape, generator=generator) > 0.4 for i, shape in enumerate(shapes)}


def kept(masks):
    """Name and place of each weight that is kept."""
    return {(name, *i) for name, m in masks.items() for i in m.nonzero().tolist()}


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 999))
def test_they_are_sets(shapes, seed):
    one, two = random_masks(shapes, seed), random_masks(shapes, seed + 1)
    a, b = Masks(one), Masks(two)
    assert all(torch.equal(a[k], m.to(torch.uint8)) for k, m in one.items())
    both, either = kept(one) & kept(two), kept(one) | kept(two)
    assert kept(a & b) == both and kept(a | b) == either
    assert a.iou(b) == (len(both) / len(either) if either else 1.0)
    total = sum(m.numel() for m in one.values())
    assert a.weights == total and a.kept == len(kept(one))
    assert a.sparsity == pytest.approx(1 - len(kept(one)) / total if total else 0.0)
    for name, share in a.sparsities.items():
        size = one[name].numel()
        assert share == pytest.approx(1 - int(one[name].sum()) / size if size else 1.0)
    for name, share in a.ious(b).items():
        x, y = one[name], two[name]
        assert share == (int((x & y).sum()) / int((x | y).sum()) if (x | y).any() else 1.0)
    assert (a == b) == all(torch.equal(one[k], two[k]) for k in one)
    assert a == Masks(dict(a)) and hash(a) == hash(Masks(dict(a)))


def test_they_never_change():
    given = {"w": torch.ones(3, 5)}
    masks = Masks(given)
    given["w"].zero_()
    masks["w"].zero_()
    assert masks.kept == 15
    with pytest.raises(TypeError):
        masks["w"] = torch.zeros(3, 5)
    assert pickle.loads(pickle.dumps(masks)) == copy.deepcopy(masks) == masks
    assert repr(masks) == "Masks(1 parameters, 15 of 15 weights kept, sparsity 0)"
    assert masks.report()["kept"].tolist() == [15, 15]


def test_they_are_read_from_a_model_and_transferred():
    model, other = make(Residual), make(Residual, seed=1)
    Sparsifier(model, "filter", example_inputs=images()).sparsify_model(0.5)
    nn.init.zeros_(model.head.bias)  # fresh, not pruned
    masks = Masks.of(model)
    assert masks["head.bias"].all()
    names = dict(model.named_parameters())
    assert all(torch.equal(masks[k] == 0, p == 0) for k, p in names.items() if k != "head.bias")
    before = copy.deepcopy(other.state_dict())
    assert masks.apply_to(other) is other
    for name, p in other.named_parameters():
        assert torch.equal(p, torch.where(masks[name] == 0, 0.0, before[name]))
        assert not p[masks[name] == 0].signbit().any()


def test_another_network_is_refused_and_stays_as_it_was():
    masks, other = Masks.of(make(Residual)), make(Residual)
    other.c1 = nn.Conv2d(8, 12, 3, padding=1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"'c1.weight' is \(16, 8, 3, 3\) there and \(12, 8, 3, 3"):
        masks.apply_to(other)
    with pytest.raises(ValueError, match="'stem.weight' is .* there and absent here.* more"):
        masks.apply_to(make(Plain))
    with pytest.raises(ValueError, match="different networks"):
        masks & Masks.of(make(Plain))
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(TypeError, match="compared with Masks, got dict"):
        masks.iou(dict(masks))
    with pytest.raises(TypeError, match="must be a tensor"):
        Masks({"w": [1, 0]})


def test_names_go_without_wrappers():
    model = make(Residual)
    Sparsifier(model, example_inputs=images()).sparsify_model(0.5)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert Masks.of(compiled) == Masks.of(model)
    Masks.of(model).apply_to(torch.compile(make(Residual, seed=1), backend="eager"))


# --- tickets -----------------------------------------------------------------------------------


def ticket_of(kind=Residual, step=3):
    model = make(kind)
    sparsifier = Sparsifier(copy.deepcopy(model), example_inputs=images())
    sparsifier.sparsify_model(0.7)
    return model, Ticket(Masks(sparsifier.masks), snapshot(model), step)


@pytest.mark.parametrize("kind", ALL)
def test_a_ticket_in_a_model_and_in_a_file(kind, tmp_path):
    model, ticket = ticket_of(kind)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for name, mask in ticket.masks.items():
        expected[name][mask == 0] = 0.0
    ticket.save(tmp_path / "a.safetensors")
    for each in (ticket, Ticket.load(tmp_path / "a.safetensors"), copy.deepcopy(ticket)):
        other = make(kind, seed=1)
        assert each.load_into(other) is other
        assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())
        assert each.masks == ticket.masks and each.step == 3
        out = zip(tensors(each.load_into(other)(images())), tensors(other(images())), strict=True)
        assert all(torch.equal(a, b) for a, b in out)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_all_dtypes_and_tied_weights_go_through_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.BatchNorm1d(5)).bfloat16()
    model[1].weight = model[0].weight
    ticket = Ticket(Masks({"0.weight": torch.eye(5)}), snapshot(model))
    ticket.save(tmp_path / "t")
    one = Ticket(Masks({}), {"x": torch.randn(4)[::4]})  # a single element has any stride
    one.save(tmp_path / "one")
    assert torch.equal(Ticket.load(tmp_path / "one").weights["x"], one.weights["x"])
    with pytest.raises(ValueError, match="'x' is torch.strided, torch.complex128"):
        Ticket(Masks({}), {"x": torch.zeros(2, dtype=torch.complex128)}).save(tmp_path / "u")
    other = Ticket.load(tmp_path / "t").load_into(copy.deepcopy(model))
    assert torch.equal(other[1].weight, model[0].weight * torch.eye(5).bfloat16())
    bits = load_file(tmp_path / "t")["mask/0.weight"]
    assert bits.dtype == torch.uint8 and len(bits) == 4  # 25 weights


def test_controls_are_tickets():
    model, ticket = ticket_of()
    fresh = make(Residual, seed=5)
    control = ticket.reinitialised(fresh)
    assert control.masks == ticket.masks and control.step == 0
    expected = ticket.masks.apply_to(copy.deepcopy(fresh)).state_dict()
    loaded = control.load_into(model).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.items())
    nn.init.zeros_(fresh.c1.weight)
    assert control.weights["c1.weight"].any()  # a copy
    whole = ticket.with_masks(ticket.masks | Masks({k: m ^ 1 for k, m in ticket.masks.items()}))
    assert whole.sparsity == 0 and whole.step == ticket.step and ticket.sparsity > 0.6


def test_tickets_of_other_networks_are_refused():
    model, ticket = ticket_of()
    other = make(Plain)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="another network"):
        ticket.load_into(other)
    with pytest.raises(ValueError, match="another network"):
        ticket.reinitialised(other)
    double = make(Residual).double()
    with pytest.raises(ValueError, match="float64 in the model, torch.float32 in the ticket"):
        ticket.load_into(double)
    assert double.c1.weight.equal(make(Residual).double().c1.weight)
    half = make(Residual)
    del half.head
    with pytest.raises(ValueError, match=r"'head.weight' is \(4, 8\) there and absent here"):
        ticket.load_into(half)
    with pytest.raises(ValueError, match="hold no 'c1.weight'"):
        Ticket(Masks({"c1.weight": torch.ones(2)}), snapshot(model))
    with pytest.raises(TypeError, match="has Masks, got dict"):
        Ticket({}, snapshot(model))
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


class Bomb:
    def __reduce__(self):
        return print, ("run",)


def test_damaged_and_foreign_files(tmp_path, capsys):
    _, ticket = ticket_of()
    whole = tmp_path / "whole"
    ticket.save(whole)
    data, bad = whole.read_bytes(), tmp_path / "bad"
    for size in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:size])
        with pytest.raises(ValueError, match="damaged, or no ticket"):
            Ticket.load(bad)
    dice = random.Random(0)
    for i in [*range(0, len(data), 97), data.index(b'"step":"3"') + 8]:
        changed = bytearray(data)
        changed[i] ^= 1 << dice.randrange(4)
        bad.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged, or no ticket"):
            Ticket.load(bad)
    bad.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="damaged, or no ticket"):
        Ticket.load(bad)
    assert capsys.readouterr().out == ""
    about = {"fasterai ticket": "1", "step": "0"}
    content = load_file(whole)
    for change in (
        {"shapes": json.dumps({"c1.weight": [-16, -8, 3, 3]})},
        {"shapes": json.dumps({"c1.weight": [10**9, 10**9]})},
        {"shapes": json.dumps({"c1.weight": "x"})},
        {"shapes": json.dumps({"c1.weight": [8, 16, 3, 3]})},
        {"shapes": json.dumps({"absent": [1]})},
        {"shapes": "[", "step": "0"},
        {"step": "soon", "shapes": "{}"},
        {"step": "-5", "shapes": "{}"},
        {"fasterai ticket": "2", "shapes": "{}"},
        {},
    ):
        said = {**about, **change}
        save_file(content, bad, {**said, "digest": digest(content, said)})
        with pytest.raises(ValueError, match="damaged, or no ticket"):
            Ticket.load(bad)
    save_file({"x": torch.ones(2)}, bad)
    with pytest.raises(ValueError, match="did not write it"):
        Ticket.load(bad)
    with pytest.raises(FileNotFoundError):
        Ticket.load(tmp_path / "absent")


def test_writing_that_is_broken_off_leaves_the_old_file(tmp_path, monkeypatch):
    _, ticket = ticket_of()
    file = tmp_path / "t"
    ticket.save(file)

    def half(tensors, part, about):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        ticket.with_masks(Masks({})).save(file)
    assert list(tmp_path.iterdir()) == [file] and Ticket.load(file).masks == ticket.masks
