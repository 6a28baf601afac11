"""Files in which zeros take no room: every bit comes back, and damage is refused."""

import copy
import json
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fasterai.core.forms import decode, encode
from fasterai.deploy import sparse_files
from fasterai.deploy.sparse_files import SparseFileError, load_sparse, save_sparse

NAMES = """float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint64 uint32 uint16
    complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"""
DTYPES = [getattr(torch, n) for n in NAMES.split() if hasattr(torch, n)]


def raw(x):
    """All bits of a tensor, in the order of its elements."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.contiguous().view(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def some(shape, dtype, zeros, seed=0):
    """Random bits, of which a share of the elements is zero."""
    generator = torch.Generator().manual_seed(seed)
    n, size = int(np.prod(shape)), dtype.itemsize
    data = torch.randint(0, 256, (n, size), generator=generator, dtype=torch.uint8)
    if dtype == torch.bool:
        data &= 1
    data[torch.rand(n, generator=generator) < zeros] = 0
    if dtype.is_complex:
        real = data.view(-1).view(dtype.to_real())
        return torch.view_as_complex(real.view(*shape, 2))
    return data.view(-1).view(dtype).view(shape)


def round_trip(state, path):
    save_sparse(state, path)
    back = load_sparse(path)
    assert list(back) == list(state)
    for name, x in state.items():
        assert same(back[name], x), name
    return back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_type_comes_back(dtype, tmp_path):
    shapes = [(), (0,), (3, 0, 2), (1,), (7,), (5, 13), (64, 3, 5, 5)]
    shares = [0, 0.3, 0.5, 0.8, 0.9, 0.99, 1]
    state = {f"{s} {z}": some(s, dtype, z) for s in shapes for z in shares}
    round_trip(state, tmp_path / "a")


def test_minus_zero_and_every_nan_are_kept(tmp_path):
    words = torch.tensor([0, -(1 << 31), 0x7FC00000, 0x7FC00001, 0x7F800001, -1, 0x7F800000, 1])
    x = torch.cat([words.int(), torch.zeros(500, dtype=torch.int32)]).view(torch.float32)
    back = round_trip({"x": x}, tmp_path / "a")["x"]
    assert back[1].signbit() and not back[0].signbit() and int(back.isnan().sum()) == 4
    assert os.path.getsize(tmp_path / "a") < 4 * 508


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 40)), max_size=12),
    st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
)
def test_runs_of_any_length(runs, dtype):
    """Zeros and values in turn: gaps around 15, 30, 255 and 510, ends of both kinds."""
    pieces = [torch.cat([torch.zeros(z), torch.ones(v)]) for z, v in runs]
    words = torch.cat([*pieces, torch.zeros(0)]).to(dtype)
    form, parts = encode(words)
    if form != "dense":
        assert torch.equal(decode(form, parts, len(words)), words)
    size = sum(x.numel() * x.itemsize for x in parts.values()) if parts else words.nbytes
    n, filled = len(words), int((words != 0).sum())
    assert size <= min(words.nbytes, -(-n // 8) + filled * words.itemsize)


def test_long_tensors_are_read_in_pieces():
    for share in (0.3, 0.8, 0.9, 0.99, 0.9999):
        words = some((1_000_001,), torch.int16, share)
        form, parts = encode(words)
        assert form == {0.3: "mask", 0.8: "mask", 0.9: "gaps4"}.get(share, "gaps8")
        assert torch.equal(decode(form, parts, len(words)), words)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 0.15), (torch.float16, 0.15)])
def test_nine_zeros_in_ten_take_no_room(dtype, most, tmp_path):
    x = some((1000, 1000), dtype, 0.9)
    save_file({"x": x}, tmp_path / "dense")
    save_sparse({"x": x}, tmp_path / "sparse")
    assert os.path.getsize(tmp_path / "sparse") <= most * os.path.getsize(tmp_path / "dense")


def test_a_dense_tensor_is_there_for_every_reader(tmp_path):
    x = torch.randn(4, 5)
    save_sparse({"a.weight": x, "b": torch.zeros(100)}, tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a")["a.weight"], x)


def test_strides_come_back_where_they_lie_without_gaps(tmp_path):
    image = some((8, 6, 5, 4), torch.float32, 0.9).to(memory_format=torch.channels_last)
    cube = some((4, 3, 2), torch.float32, 0.2).permute(2, 0, 1)
    state = {"image": image, "cube": cube, "sliced": cube[:, ::2], "wide": torch.ones(1, 4)}
    state |= {"expanded": torch.ones(3, 1).expand(3, 5), "conjugate": torch.ones(2) * 1j}
    state["conjugate"] = state["conjugate"].conj()
    back = round_trip(state, tmp_path / "a")
    assert back["image"].is_contiguous(memory_format=torch.channels_last)
    assert back["cube"].stride() == cube.stride() and back["sliced"].is_contiguous()


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.norm = nn.BatchNorm1d(16)
        if tied:
            self.head.weight = self.table.weight
        nn.init.zeros_(self.head.bias)


def test_tied_tensors_are_written_once_and_stay_one(tmp_path):
    model, other = Tied(), Tied()
    save_sparse(model, tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        names = set(file.keys())
    assert "table.weight" in names and "head.weight" not in names
    back = load_sparse(tmp_path / "a")
    assert back["head.weight"] is back["table.weight"]
    assert load_sparse(tmp_path / "a", other) is other
    assert other.head.weight is other.table.weight
    assert all(same(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def test_what_is_not_tied_in_the_model_gets_memory_of_its_own(tmp_path):
    save_sparse(Tied(), tmp_path / "a")
    loose = load_sparse(tmp_path / "a", Tied(tied=False))
    assert torch.equal(loose.head.weight, loose.table.weight)
    assert loose.head.weight.data_ptr() != loose.table.weight.data_ptr()
    save_sparse(Tied(tied=False), tmp_path / "b")
    with pytest.raises(SparseFileError, match="is tied in the model"):
        load_sparse(tmp_path / "b", Tied())


def test_memory_that_is_shared_stays_shared(tmp_path):
    model, other = nn.Linear(3, 3), nn.Linear(3, 3).share_memory()
    save_sparse(model, tmp_path / "a")
    views = [p.data for p in other.parameters()]
    load_sparse(tmp_path / "a", other)
    assert all(p.is_shared() for p in other.parameters())
    assert all(torch.equal(a, b) for a, b in zip(views, model.parameters(), strict=True))


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[torch.rand(8, 3, 3, 3) < 0.9] = 0
    return model.to(memory_format=torch.channels_last)


def test_a_model_keeps_its_parameters_and_its_layout(tmp_path):
    model, other = network(), network(1)
    save_sparse(model, tmp_path / "a")
    before = list(other.parameters())
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    load_sparse(tmp_path / "a", other)
    assert all(a is b for a, b in zip(before, other.parameters(), strict=True))
    assert all(same(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    plain = load_sparse(tmp_path / "a", nn.Sequential(*network(1)).to("cpu"))
    x = torch.randn(2, 3, 3, 3)
    assert torch.equal(plain.eval()(x), model.eval()(x))
    plain.train()(x).sum().backward()
    other.train()(x).sum().backward()
    optimizer.step()
    os.remove(tmp_path / "a")  # nothing of the model is mapped from the file
    assert torch.isfinite(other[3].weight).all()


def test_wrapped_models_share_their_files(tmp_path):
    save_sparse(torch.compile(network(), backend="eager"), tmp_path / "a")
    other = torch.compile(network(1), backend="eager")
    assert load_sparse(tmp_path / "a", other) is other
    assert same(other._orig_mod[3].weight, network()[3].weight)


def test_files_that_do_not_fit_change_nothing(tmp_path):
    save_sparse(network(), tmp_path / "a")
    for other, why in (
        (nn.Sequential(*network()[:3]), "the model has no 3.bias, 3.weight"),
        (nn.Sequential(*network(), nn.Linear(4, 4)), "the file has no 4.bias, 4.weight"),
        (network().half(), r"float16 on cpu in the model, .*float32 in the file"),
        (nn.Sequential(*network()[:3], nn.Linear(8, 5)), r"\(5, 8\).*\(4, 8\)"),
        (network().to("meta"), "on meta"),
    ):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(SparseFileError, match=why):
            load_sparse(tmp_path / "a", other)
        assert all(v.is_meta or same(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(SparseFileError, match="must be a torch.nn.Module"):
        load_sparse(tmp_path / "a", "model")


def test_an_interrupt_leaves_no_half_of_it(tmp_path, monkeypatch):
    model, other = network(), network(1)
    save_sparse(model, tmp_path / "a")
    calls = []

    def interrupted(self, data):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, data)

    original = torch.Tensor.copy_
    monkeypatch.setattr(torch.nn.Parameter, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_sparse(tmp_path / "a", other)
    monkeypatch.undo()
    assert all(same(v, network(1).state_dict()[k]) for k, v in other.state_dict().items())


def expanded(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean = torch.full((1,), value).expand(2)
    return model


def test_a_tensor_that_cannot_be_written_to_leaves_all_others(tmp_path):
    save_sparse(expanded(1.0), tmp_path / "a")
    same_there, other = expanded(1.0), expanded(0.0)
    load_sparse(tmp_path / "a", same_there)
    assert same(same_there[0].weight, load_sparse(tmp_path / "a")["0.weight"])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(SparseFileError, match="'1.running_mean' shows one number in many places"):
        load_sparse(tmp_path / "a", other)
    assert all(same(v, before[k]) for k, v in other.state_dict().items())


def test_tensors_that_share_memory_in_the_model_alone_are_refused(tmp_path):
    def build(share):
        model = nn.Linear(3, 3)
        rows = model.weight.data[:2]
        model.register_buffer("rows", rows if share else torch.randn(2, 3))
        return model

    for share in (True, False):
        save_sparse(build(share), tmp_path / "a")
        other = build(True)
        before = copy.deepcopy(other.state_dict())
        if share:
            load_sparse(tmp_path / "a", other)
            assert torch.equal(other.rows, other.weight[:2])
            assert not torch.equal(other.weight, before["weight"])
            continue
        with pytest.raises(SparseFileError, match="is tied in the model"):
            load_sparse(tmp_path / "a", other)
        assert all(same(v, before[k]) for k, v in other.state_dict().items())


def test_conjugate_and_negative_views_are_not_what_they_are_views_of(tmp_path):
    a = torch.tensor([1 + 2j, 3 - 4j])
    state = {"a": a, "b": a.conj(), "imag": a.imag, "negative": a.conj().imag, "c": a.conj()}
    save_sparse(state, tmp_path / "a")
    back = load_sparse(tmp_path / "a")
    assert all(torch.equal(back[name], x) for name, x in state.items())
    assert back["c"] is back["b"]


def test_what_cannot_be_written_is_refused(tmp_path):
    for state, why in (
        ({"a": 3}, "'a' is int"),
        ({"a": torch.eye(3).to_sparse()}, "sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "on meta"),
        ({3: torch.ones(2)}, "by name, got 3"),
        ({"__metadata__": torch.ones(2)}, "by name"),
        ([torch.ones(2)], "its state dict, got list"),
    ):
        with pytest.raises(TypeError, match=why):
            save_sparse(state, tmp_path / "a")
    clash = {"a": torch.eye(50), "a#values": torch.ones(2)}
    with pytest.raises(ValueError, match="a#values"):
        save_sparse(clash, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_folders_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*none for a: make it first"):
        save_sparse(network(), tmp_path / "none" / "a")
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        save_sparse(network(), tmp_path)
    with pytest.raises(SparseFileError, match="is a folder: name a file in it"):
        load_sparse(tmp_path)


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    save_sparse({"a": torch.ones(2)}, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        save_sparse({"a": torch.zeros(2)}, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- files of others -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A file with every form in it, and what it holds."""
    path = tmp_path_factory.mktemp("sample") / "a"
    state = {
        "dense": torch.randn(20),
        "mask": some((40, 10), torch.float32, 0.5),
        "gaps4": some((50, 10), torch.int16, 0.92),
        "gaps8": some((60, 10), torch.float64, 0.95),
        "bool": some((300,), torch.bool, 0.95),
        "last": some((3, 4, 2, 2), torch.float32, 0.9).to(memory_format=torch.channels_last),
    }
    state["tied"] = state["mask"]
    save_sparse(state, path)
    with safe_open(path, "pt") as file:
        forms = {e["form"] for e in json.loads(file.metadata()["tensors"]).values()}
    assert forms == {"dense", "mask", "gaps4", "gaps8", "same"}
    return path.read_bytes(), state


def refused_or_exact(data, state, path):
    path.write_bytes(data)
    try:
        back = load_sparse(path)
    except SparseFileError:
        return True
    assert all(same(back[k], x) for k, x in state.items()) and list(back) == list(state)
    return False


def test_damage_is_refused(sample, tmp_path):
    data, state = sample
    dice = random.Random(0)
    refused = 0
    for i in range(len(data)):
        bad = bytearray(data)
        bad[i] ^= 1 << dice.randrange(8)
        refused += refused_or_exact(bytes(bad), state, tmp_path / "a")
    assert refused >= len(data) - 8
    for _ in range(200):
        a, b = sorted(dice.sample(range(len(data)), 2))
        cut = data[:a], data[a:], data[:a] + data[b:], data[:a] + data[a:b] * 2 + data[b:]
        assert refused_or_exact(dice.choice(cut), state, tmp_path / "a")


@pytest.mark.parametrize("apart", [1021, 8191, 1 << 12, 1 << 15])
@pytest.mark.parametrize("swapped", [True, False])
def test_damage_in_two_places_is_refused(apart, swapped, tmp_path):
    """Blocks of a disk that changed places, or two signs that flipped."""
    x = torch.randn(50_000, dtype=torch.float64)
    save_sparse({"x": x}, tmp_path / "a")
    words = np.fromfile(tmp_path / "a", np.uint8)
    start = len(words) - x.nbytes
    data = words[start:].view(np.uint64)
    assert data.tobytes() == x.numpy().tobytes()
    a, b = 7, 7 + apart
    if swapped:
        data[[a, b]] = data[[b, a]]
    else:
        data[[a, b]] ^= np.uint64(1 << 63)
    words.tofile(tmp_path / "a")
    with pytest.raises(SparseFileError, match="damaged"):
        load_sparse(tmp_path / "a")


def test_a_state_dict_of_copies_is_refused(tmp_path):
    def copies(module, state, *_):
        return {k: v.detach().clone() for k, v in state.items()}

    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    save_sparse(a, tmp_path / "a")
    b._register_state_dict_hook(copies)
    before = b.weight.clone()
    with pytest.raises(SparseFileError, match="'weight' is made by the model's state_dict"):
        load_sparse(tmp_path / "a", b)
    assert torch.equal(before, b.weight)
    b.load_state_dict(load_sparse(tmp_path / "a"))
    assert torch.equal(a.weight, b.weight)


def test_what_does_not_fit_is_refused_before_it_takes_room(tmp_path, monkeypatch):
    def decoded(*_):
        raise AssertionError

    save_sparse({"weight": torch.zeros(1000, 1000)}, tmp_path / "a")
    monkeypatch.setattr(sparse_files, "decode", decoded)
    with pytest.raises(SparseFileError, match="the file has no bias"):
        load_sparse(tmp_path / "a", nn.Linear(3, 3))


def forged(path, parts, tensors, about=()):
    """A file with a valid digest, as an adversary would make it."""
    from fasterai.deploy.sparse_files import _digest

    known = {"format": "pt", "fasterai_sparse": "1", "tensors": json.dumps(tensors)}
    known |= dict(about)
    known["digest"] = _digest(parts, known)
    save_file(parts, path, known)


def entry(form="gaps8", dtype="float32", shape=(1000,), **more):
    return {"form": form, "dtype": dtype, "shape": shape, "order": list(range(len(shape))), **more}


CODES = torch.full((4,), 250, dtype=torch.uint8)
VALUES = torch.ones(4, dtype=torch.int32)


def test_a_forged_file_of_the_right_kind_is_read(tmp_path):
    parts = {"a#gaps": CODES, "a#values": VALUES}
    forged(tmp_path / "a", parts, {"a": entry()})
    back = load_sparse(tmp_path / "a")["a"]
    assert back.nonzero().flatten().tolist() == [249, 499, 749, 999]


@pytest.mark.parametrize(
    "parts, said",
    [
        ({}, entry()),
        ({"a#gaps": CODES}, entry()),
        ({"a#gaps": CODES, "a#values": VALUES, "b": VALUES[:0]}, entry()),
        ({"a#gaps": CODES, "a#values": VALUES[:3]}, entry()),
        ({"a#gaps": CODES[:3], "a#values": VALUES}, entry()),
        ({"a#gaps": CODES, "a#values": VALUES.short()}, entry()),
        ({"a#gaps": CODES, "a#values": VALUES.float()}, entry()),
        ({"a#gaps": CODES, "a#values": VALUES.bfloat16()}, entry()),
        ({"a#gaps": CODES.int(), "a#values": VALUES}, entry()),
        ({"a#gaps": CODES.view(2, 2), "a#values": VALUES}, entry()),
        ({"a#gaps": CODES, "a#values": VALUES.view(2, 2)}, entry()),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(shape=(999,))),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(shape=(10**12,))),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(shape=(10**30,))),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(shape=(-1, -1000))),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(shape=(0,))),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(shape=(1000.0,))),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(shape=(True, 1000))),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(shape="1000")),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(dtype="load")),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(dtype="float64")),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(form="pickle")),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(form="gaps4")),
        ({"a#gaps": CODES, "a#values": VALUES}, {**entry(), "order": [1]}),
        ({"a#gaps": CODES, "a#values": VALUES}, {**entry(), "order": [0, 0]}),
        ({"a#gaps": CODES, "a#values": VALUES}, entry(more=1)),
        ({"a#gaps": CODES, "a#values": VALUES}, {"form": "gaps8"}),
        ({"a#gaps": CODES, "a#values": VALUES}, "gaps8"),
        ({"a#gaps": CODES[:0], "a#values": VALUES[:0]}, entry()),
        ({"a#mask": CODES, "a#values": VALUES}, entry("mask", shape=(40,))),
        ({"a#mask": CODES, "a#values": VALUES}, entry("mask", shape=(32,))),
        ({"a#mask": CODES, "a#values": VALUES}, entry("mask", shape=(28,))),
        ({"a#mask": CODES[:0], "a#values": VALUES[:0]}, entry("mask", shape=(0,), dtype="int8")),
        ({"a": torch.ones(3)}, entry("dense", shape=(4,))),
        ({"a": torch.ones(4).double()}, entry("dense", shape=(4,))),
        ({"a": torch.ones(4)}, entry("dense", "complex64", shape=(4,))),
        (
            {"a": torch.full((4,), 2, dtype=torch.uint8).view(torch.bool)},
            entry("dense", "bool", (4,)),
        ),
        (
            {"a#gaps": CODES, "a#values": torch.full((4,), 2, dtype=torch.uint8)},
            entry(dtype="bool"),
        ),
        ({}, entry("same", of="a")),
        ({}, entry("same", of="b")),
        ({}, entry("same", of=["a"])),
    ],
)
def test_hostile_files_are_refused(parts, said, tmp_path):
    forged(tmp_path / "a", parts, {"a": said})
    with pytest.raises(SparseFileError, match="was not loaded"):
        load_sparse(tmp_path / "a")


def test_hostile_headers_are_refused(tmp_path):
    parts = {"a": torch.ones(1000)}
    good = json.dumps({"a": entry("dense")})
    for about in (
        {"tensors": good, "fasterai_sparse": "2"},
        {"tensors": "[" * 100_000},
        {"tensors": "[]"},
        {"tensors": "{}"},
        {"tensors": "nan"},
        {"tensors": "9" * 10_000},
        {"tensors": '"a"'},
    ):
        forged(tmp_path / "a", parts, {}, about)
        with pytest.raises(SparseFileError):
            load_sparse(tmp_path / "a")
    save_file(parts, tmp_path / "a")
    with pytest.raises(SparseFileError, match="not from save_sparse"):
        load_sparse(tmp_path / "a")
    torch.save({"a": torch.ones(3)}, tmp_path / "a")
    with pytest.raises(SparseFileError):
        load_sparse(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "b")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_parts_never_write_outside(data):
    """Decoding raises or gives n words, whatever it is given."""
    n = data.draw(st.integers(0, 400))
    form = data.draw(st.sampled_from(["mask", "gaps4", "gaps8"]))
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 255), max_size=60)), dtype=torch.uint8)
    values = torch.ones(data.draw(st.integers(0, 60)), dtype=torch.int32)
    part = "mask" if form == "mask" else "gaps"
    try:
        words = decode(form, {part: codes, "values": values}, n)
    except (ValueError, IndexError):
        return
    assert len(words) == n and int((words != 0).sum()) == len(values)
