"""The oracle against networks that were really cut; interrupts, files, what it leaves behind."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_unchanged, state
from learners import learner
from networks import ALL, DEVICES, Parted, Plain, Residual, make
from scoring import Stop, batches, loss_func, mean_of, measure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai.core.criteria import Criterion
from fasterai.core.schedule import one_shot
from fasterai.coupling.surgery import shadowed
from fasterai.prune.callback import PruneCallback
from fasterai.prune.pruner import Pruner
from fasterai.score.oracle import Oracle, measured, oracle
from fasterai.score.removing import Removals
from fasterai.score.score import score
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier


class Layered(nn.Module):
    """A layer norm over channels, and an activation that makes something of nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.norm(self.a(x.mean(3).flatten(1)[:, :12]))
        return self.head(torch.sigmoid(self.b(x)))


class Attentive(nn.Module):
    """One head of attention, whose scale follows its width."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(3, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = x.mean(3).transpose(1, 2)
        q, k = self.q(x), self.k(x)
        return self.head((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ self.v(x))


NETWORKS = [*ALL, Layered, Attentive]


def without(model, axis, unit, total):
    """A copy that `Pruner` has really cut a unit out of."""
    model = copy.deepcopy(model)
    slot = axis.having("produce")[0]
    own = model.get_parameter(slot.parameter)

    def func(weight):
        scores = torch.ones_like(weight)
        if weight.data_ptr() == own.data_ptr():
            scores.index_fill_(slot.dim, slot.index[slot.unit == unit], -1e6)
        return scores

    pruner = Pruner(model, batches()[0][0])
    pruner.prune_model(1 / total, context="global", criteria=Criterion(func, norm="none"))
    assert pruner.plan.removed == 1 and f"{axis.name}" in str(pruner.plan.axes)
    return model


@pytest.mark.parametrize("kind", [k for k in NETWORKS if k is not Parted])
def test_each_change_is_that_of_the_network_without_the_unit(kind):
    model = make(kind, torch.float64)
    found, dense = measure(model), mean_of(model, batches())
    table, total = found.table(), Pruner(model, batches()[0][0]).axes()["free"].sum()
    assert len(table) == total and found.loss == pytest.approx(dense, rel=1e-12)
    for row in table.itertuples():
        if row.unit > 2:  # three of each axis are enough
            continue
        cut = without(model, found.axes[row.axis], row.unit, total)
        assert row.change == pytest.approx(mean_of(cut, batches()) - dense, rel=1e-7, abs=1e-12)


def test_units_in_blocks_are_silenced_one_by_one_and_add_up_to_the_bundle_that_is_cut():
    model, data = make(Parted, torch.float64), batches()
    found = measure(model)
    a = next(i for i, axis in enumerate(found.axes) if axis.blocks == 2)
    axis = found.axes[a]
    pair = [int(axis.free[axis.block[axis.free] == b][1]) for b in (0, 1)]
    pruner = Pruner(model, data[0][0])
    removals = Removals(model, pruner.inputs, pruner._coupling)
    with shadowed(model, removals.of(a, pair[0])), shadowed(model, removals.of(a, pair[1])):
        both = mean_of(model, data)
    total = pruner.axes()["free"].sum()
    cut = copy.deepcopy(model)
    values = {(i, u): 1.0 for i, x in enumerate(found.axes) for u in x.free.tolist()}
    values |= dict.fromkeys([(a, u) for u in pair], 0.0)
    chosen = Criterion(
        lambda w, m: m,
        needs="measured",
        norm="none",
        data=measured(model, pruner._coupling, values),
    )
    cutter = Pruner(cut, data[0][0])
    cutter.prune_model(1 / total, context="global", criteria=chosen)
    assert cutter.plan.removed == 2
    assert both == pytest.approx(mean_of(cut, data), rel=1e-9)


def test_a_unit_without_effect_and_one_that_is_all_are_told_apart():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[2].weight.copy_(torch.tensor([[2.0, 0.0, 1.0]]))
    x = torch.ones(4, 3)
    found = measure(model, [(x, torch.full((4, 1), 3.0))], loss_func=F.mse_loss)
    assert found.loss == 0 and found.table()["change"].tolist() == [4.0, 0.0, 1.0]
    Pruner(model, x).prune_model(1 / 3, criteria=found)
    assert model[0].weight[:, 0].tolist() == [1, 0] and model[0].weight.shape == (2, 3)


@pytest.mark.parametrize("context", ["local", "global"])
def test_what_it_returns_ranks_in_both_halves(context):
    model = make(Residual, torch.float64)
    found = measure(model)
    changes = sorted(found.changes.items(), key=lambda item: item[1])
    sparse, total = copy.deepcopy(model), len(changes)
    plan = Pruner(model, batches()[0][0]).plan_for(0.25, context=context, criteria=found)
    assert sum(x.before - x.after for x in plan.axes) == round(total / 4)
    if context == "global":
        lost = {a: sum(i == a for (i, _), _ in changes[: round(total / 4)]) for a in range(3)}
        assert {a: x.before - x.after for a, x in enumerate(plan.axes)} == lost
    s = Sparsifier(sparse, "filter", context, found, example_inputs=batches()[0][0])
    s.sparsify_model(0.25)
    low = sorted((d, u) for (a, u), d in found.changes.items() if a == 1)
    zero = (sparse.c1.weight == 0).flatten(1).all(1).nonzero().flatten().tolist()
    assert sorted(u for _, u in low[: len(zero)]) == zero and (zero or context == "global")


def test_without_signs_a_unit_counts_by_how_far_the_loss_moves():
    found = measure(make(Plain, torch.float64))
    weight = make(Plain, torch.float64).a.weight
    signed, bare = found(weight, "a.weight"), found.absolute()(weight, "a.weight")
    assert (signed < 0).any() and torch.equal(signed.abs(), bare)
    assert isinstance(found.absolute(), Oracle) and found.absolute().table().equals(found.table())


def test_some_units_only():
    model = make(Residual, torch.float64)
    whole = measure(model).table()
    named = measure(model, units=["c1"]).table()
    assert named.equals(whole[whole["layer"] == "c1"].reset_index(drop=True))
    some = measure(model, units={"c1": [3, 1], "c2": [0]})  # c2 is added to what stem makes
    assert some.table()[["layer", "unit"]].values.tolist() == [["stem", 0], ["c1", 1], ["c1", 3]]
    with pytest.raises(ValueError, match=r"exclude=\['stem'\]"):
        Pruner(model, batches()[0][0]).plan_for(0.5, criteria=some)
    only = Pruner(model, batches()[0][0], exclude=["stem"])
    only.plan_for(0.5, criteria=measure(model, units=["c1"]))


@pytest.mark.parametrize(
    ("units", "match"),
    [
        (["c7"], "no layer 'c7'; did you mean"),
        (["bn0"], "no channels come from 'bn0'"),
        ({"c1": [16]}, "units 0 to 15, got 16"),
        ({"c1": [1, 0.5]}, "got 0.5"),
        ({"c1": [True]}, "got True"),
        ({"head": [0]}, "cannot go: network output"),
    ],
)
def test_units_that_do_not_exist_are_refused(units, match):
    with pytest.raises(ValueError, match=match):
        measure(make(Residual, torch.float64), units=units)


# --- what it leaves behind ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Residual, Parted, Layered])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError("mine")])
def test_the_model_is_as_before_also_after_an_interrupt(kind, error):
    model = make(kind, torch.float64).train()
    before = state(model)
    if error is None:
        measure(model)
    else:
        for n in (1, 3, 4, 20):  # three batches: as it is, and in the midst of units
            with pytest.raises(type(error)):
                measure(model, loss_func=Stop(n, error))
            assert_unchanged(before, state(model))
    assert_unchanged(before, state(model))
    assert all(p.grad is None for p in model.parameters())


def test_a_mean_loss_needs_no_gradients_and_one_number():
    model = make(Residual, torch.float64)
    seen = []
    measure(model, loss_func=lambda out, y: seen.append(out.requires_grad) or loss_func(out, y))
    assert seen and not any(seen)
    errors = measure(model, loss_func=lambda out, y: float(out.mean()))  # any number will do
    assert errors.table()["change"].abs().max() > 0
    with pytest.raises(ValueError, match=r"one number, got a tensor \(4, 4\)"):
        measure(model, loss_func=lambda out, y: out)
    with pytest.raises(ValueError, match="finite number, got nan"):
        measure(model, loss_func=lambda out, y: out.mean() * torch.nan)
    with pytest.raises(ValueError, match="gave no batch"):
        measure(model, [])
    with pytest.raises(TypeError, match=r"dls\.train or dls\.valid"):
        dls = type("Loaders", (), {"train": [], "valid": []})()
        measure(model, dls)
    with pytest.raises(ValueError, match="needs no data"):
        score(model, batches(), measure(model))


# --- files -------------------------------------------------------------------------------------


def calls(counted):
    def func(out, y):
        counted.append(1)
        return loss_func(out, y)

    return func


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path):
    model, file = make(Residual, torch.float64), tmp_path / "a.jsonl"
    whole = measure(model)
    with pytest.raises(KeyboardInterrupt):
        measure(model, file=file, loss_func=Stop(3 + 3 * 5 + 1, KeyboardInterrupt()))
    assert len(file.read_bytes().splitlines()) == 1 + 5
    counted = []
    found = measure(model, file=file, loss_func=calls(counted))
    assert found.changes == whole.changes and found.loss == whole.loss
    assert len(counted) == 3 * (1 + len(whole.changes) - 5)
    counted.clear()
    assert measure(model, file=file, loss_func=calls(counted)).changes == whole.changes
    assert len(counted) == 3
    one = measure(model, file=file, units={"c1": [2]})  # what else is in the file is left alone
    assert len(one.table()) == 1 and len(file.read_bytes().splitlines()) == 1 + len(whole.changes)


@pytest.mark.parametrize("left", [1, 7, -1, None])
def test_a_line_that_was_not_finished_is_measured_again(tmp_path, left):
    model, file = make(Residual, torch.float64), tmp_path / "a.jsonl"
    whole = measure(model, file=file)
    lines = file.read_bytes().splitlines(keepends=True)
    cut = b"x" * 1000 if left is None else lines[-1][:left]
    file.write_bytes(b"".join(lines[:-1]) + cut)
    assert measure(model, file=file).changes == whole.changes
    assert file.read_bytes().splitlines(keepends=True) == lines
    assert all(json.loads(line) for line in lines)


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    model, file = make(Residual, torch.float64), tmp_path / "a.jsonl"
    measure(model, file=file, units={"c1": [0]})
    before = file.read_bytes()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bn1.running_mean[0] += 1
    with pytest.raises(ValueError, match="belongs to another network or other weights"):
        measure(other, file=file)
    with pytest.raises(ValueError, match="belongs to other data.*shuffles"):
        measure(model, batches()[::-1], file=file)
    with pytest.raises(ValueError, match="belongs to another loss_func"):
        measure(model, file=file, loss_func=lambda out, y: out.mean())
    assert file.read_bytes() == before
    for text in (b"notes", b"notes\n", b"[1]\n", b'{"a": 1}\n', b"\xff\xfe\n"):
        file.write_bytes(text)
        with pytest.raises(ValueError, match="a.jsonl"):
            measure(model, file=file)
        assert file.read_bytes() == text
    lines = before.splitlines(keepends=True)
    file.write_bytes(lines[0] + b'{"axis": 1}\n' + lines[1])
    with pytest.raises(ValueError, match="line 2 of"):
        measure(model, file=file)
    with pytest.raises(FileNotFoundError):
        measure(model, file=tmp_path / "no" / "a.jsonl")
    file.write_bytes(b"")  # what touch makes
    measure(model, file=file, units={"c1": [0]})
    assert file.read_bytes() == before


def test_a_loader_that_shuffles_is_no_matter_without_a_file_and_draws_no_numbers():
    x, y = batches(1, 12)[0]
    dl = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    model = make(Residual, torch.float64)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = measure(model, dl), measure(model, dl)
    assert first.changes == second.changes and torch.equal(before, torch.get_rng_state())
    few = measure(model, dl, n_batches=1)
    assert few.changes != first.changes


def test_it_can_be_copied_and_pickled_as_other_criteria():
    found = measure(make(Residual, torch.float64), units=["c1"])
    again = pickle.loads(pickle.dumps(copy.deepcopy(found)))
    assert again.table().equals(found.table())


def test_inputs_by_keyword_and_wrapped_models():
    class Keyed(Plain):
        def forward(self, pixels, labels=None):
            return super().forward(pixels)

    model = make(Keyed, torch.float64)
    data = [{"pixels": x, "labels": y} for x, y in batches()]
    keyed = measure(model, data, loss_func=lambda out, b: loss_func(out, b["labels"]))
    plain = measure(model)
    assert list(keyed.changes.values()) == pytest.approx(list(plain.changes.values()), rel=1e-9)
    wrapped = nn.DataParallel(model)
    assert measure(wrapped).changes == plain.changes


@pytest.mark.parametrize("device", DEVICES)
def test_on_every_device(device):
    model = make(Residual)
    exact = measure(copy.deepcopy(model).double())
    found = measure(model.to(device), [(x.float(), y.float()) for x, y in batches()])
    expected = pytest.approx(list(exact.changes.values()), abs=1e-4)
    assert list(found.changes.values()) == expected


def test_the_loss_is_computed_in_single_precision_at_least():
    seen = set()
    data = [(x, y.float()) for x, y in batches()]
    measure(make(Residual).bfloat16(), data, loss_func=lambda out, y: seen.add(out.dtype) or 1.0)
    assert seen == {torch.float32}  # in half precision small changes would vanish
    found = measure(make(Residual, torch.float64), loss_func=lambda out, y: out.mean())
    assert found(make(Residual, torch.float64).c1.weight, "c1.weight").dtype == torch.float64


def test_nothing_to_measure_is_said():
    with pytest.raises(ValueError, match="no unit to measure"):
        measure(nn.Sequential(nn.Linear(3, 4)), [(torch.ones(2, 3), torch.ones(2, 4))])
    with pytest.raises(ValueError, match="no unit to measure"):
        measure(make(Residual, torch.float64), units=[])


def test_callbacks_rank_by_it():
    learn = learner()
    found = oracle(learn.model, learn.dls.valid, loss_func=learn.loss_func, progress=False)
    low = sorted((d, u) for (a, u), d in found.changes.items() if a == 1)[:8]
    learn.fit(1, cbs=SparsifyCallback(0.5, "filter", criteria=found, schedule=one_shot))
    zero = (learn.model.c1.weight == 0).flatten(1).all(1).nonzero().flatten().tolist()
    assert zero == sorted(u for _, u in low)
    learn = learner()
    cb = PruneCallback(0.5, criteria=found, schedule=one_shot)
    learn.fit(1, cbs=cb)
    stays = sorted({*range(16)} - {u for _, u in low})
    assert list(cb.plan.kept["c1.weight"][0]) == stays
    with pytest.raises(ValueError, match="score it again"):
        Pruner(learn.model, learn.dls.one_batch()[0]).plan_for(0.5, criteria=found)
