"""What is zero stays so in a later fit, and what only begins at zero learns."""

import pytest
import torch
from fastai.callback.core import CancelStepException
from fastai.callback.schedule import minimum  # noqa: F401  (patches Learner with fit_one_cycle, lr_find)
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD, Adam
from learners import Cuts, Fail, Watch, filters_at_zero, learner
from networks import ALL, Residual, conv, images, make, wrapped
from torch import nn

from fasterai.core.schedule import lin, one_shot
from fasterai.prune.pruner import Pruner
from fasterai.sparse.callback import KeepZeros, SparsifyCallback
from fasterai.sparse.keep import zero_masks
from fasterai.sparse.sparsifier import Sparsifier

NOW = one_shot.over(0, 0)


def zeros_of(model):
    return {k: (p == 0).clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_it_holds_what_a_sparsifier_holds(kind, granularity):
    model, x = make(kind), images()
    sparsifier = Sparsifier(model, granularity, example_inputs=x)
    sparsifier.sparsify_model(0.5)
    held = {k: m for k, m in sparsifier.masks.items() if not m.all()}
    found = zero_masks(model, x)
    assert found.keys() == held.keys() and all(torch.equal(m, held[k]) for k, m in found.items())
    assert all(m.dtype == torch.uint8 for m in found.values())


@pytest.mark.parametrize("opt_func", [SGD, Adam])
@pytest.mark.parametrize("granularity", ["filter", "weight", "kernel"])
def test_zeros_stay_and_all_others_learn(granularity, opt_func):
    learn = learner(opt_func=opt_func)
    learn.fit(1, cbs=SparsifyCallback(0.5, granularity, schedule=NOW))
    zero, keep = zeros_of(learn.model), KeepZeros()
    before = {k: p.detach().clone() for k, p in learn.model.named_parameters()}
    watch = Watch()
    learn.fit(2, wd=0.1, cbs=[keep, watch])
    for name, p in learn.model.named_parameters():
        assert not p[zero[name]].count_nonzero() and not p[zero[name]].signbit().any()
        if p.ndim > 1:
            assert (p != before[name])[~zero[name]].float().mean() > 0.8
    assert keep.zeros == sum(int(z.sum()) for z in zero.values()) and watch.inside
    if granularity != "filter":  # without it they learn again; through a dead norm nothing gets
        learn.fit(1)
        assert learn.model.c1.weight[zero["c1.weight"]].count_nonzero()


@pytest.mark.parametrize("kept", [1, 2, 255, 0.5, True])
def test_whatever_is_not_zero_in_a_mask_is_kept(kept):
    learn = learner()
    before = learn.model.c1.weight.detach().clone()
    mask = torch.full(before.shape, kept)
    mask[0] = 0
    learn.fit(1, 0.0, cbs=KeepZeros({"c1.weight": mask}))
    assert not learn.model.c1.weight[0].any()
    assert torch.equal(learn.model.c1.weight[1:], before[1:])


def test_nothing_stays_behind_and_the_masks_are_as_large_as_stated(tmp_path):
    keep, sizes = KeepZeros(), []
    learn = learner(path=tmp_path, cbs=keep)
    keys = list(learn.model.state_dict())
    learn.fit(1, cbs=SparsifyCallback(0.5, layers="c1", schedule=NOW))
    learn.fit(1, cbs=Fail(None, "after_batch", lambda s: sizes.append(keep.mask_bytes)))
    assert set(sizes) == {learn.model.c1.weight.numel()} and keep.mask_bytes == 0
    assert list(learn.model.state_dict()) == keys and "step" not in vars(learn.opt)
    learn.export("kept.pkl")


def test_where_nothing_is_zero_training_is_bit_for_bit_the_same():
    states = []
    for cbs in ([], KeepZeros()):
        learn = learner()
        torch.manual_seed(1)
        learn.fit(2, cbs=cbs)
        states.append(learn.model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


class Fresh(nn.Module):
    """Much of it begins at zero, as networks do."""

    def __init__(self):
        super().__init__()
        self.c1, self.bn1 = conv(3, 8), nn.BatchNorm2d(8)
        self.c2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8)
        self.shift = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.bn1(self.c1(x)).relu()
        return self.head((x + self.bn2(self.c2(x)) + self.shift).relu().mean((2, 3)))


def fresh():
    torch.manual_seed(0)
    model = Fresh()
    for p in (model.c1.bias, model.c2.bias, model.bn2.weight, model.head.weight, model.head.bias):
        nn.init.zeros_(p)
    return model


def test_what_begins_at_zero_learns():
    model = fresh()
    assert zero_masks(model, images()) == {}
    with torch.no_grad():
        model.c1.weight[0, 0, 0, 0] = 0
    learn = learner(model)
    learn.fit(2, cbs=KeepZeros())
    zero = {k: int(z.sum()) for k, z in zeros_of(model).items()}
    assert zero.pop("c1.weight") == 1 and set(zero.values()) == {0}


def test_of_what_has_one_dimension_only_dead_units_stay_and_only_where_zero():
    model = fresh()
    with torch.no_grad():
        model.c1.weight[:3] = 0  # c1 and c2 are added: 1 and 2 are dead in both
        model.c2.weight[1:4] = 0
        model.bn1.weight[1] = 0
        model.c2.bias[2] = 0.5
    found = zero_masks(model, images())
    masks = {k: (m == 0).nonzero()[:, 0].unique().tolist() for k, m in found.items()}
    assert masks == {
        "c1.weight": [0, 1, 2],
        "c2.weight": [1, 2, 3],
        "c1.bias": [0, 1, 2],  # its own rows are zero
        "c2.bias": [1, 3],  # and one entry is not
        "bn1.weight": [1],
        "bn1.bias": [1, 2],
        "bn2.weight": [1, 2],
        "bn2.bias": [1, 2],
    }
    learn = learner(model)
    zero = zeros_of(model)
    learn.fit(2, cbs=KeepZeros())
    now = zeros_of(model)
    assert all(torch.equal(now[k][found[k] == 0], zero[k][found[k] == 0]) for k in found)
    assert not any(now[k][4:].any() for k in ("bn1.bias", "bn2.weight", "bn2.bias"))
    assert not now["shift"][0, 3:].any()


def test_a_layers_own_bias_where_the_model_does_not_run():
    model = fresh()
    with torch.no_grad():
        model.c1.weight[:3] = model.c2.weight[:3] = 0
    with pytest.warns(UserWarning, match="norms behind zero filters are not held, for the model"):
        found = zero_masks(model, torch.zeros(1, 2))
    assert sorted(found) == ["c1.bias", "c1.weight", "c2.bias", "c2.weight"]
    assert found["c1.bias"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


class Odd(nn.Module):
    """Rows in other places than the first dimension, and tables."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8, padding_idx=0)
        self.up = nn.ConvTranspose1d(8, 8, 2, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.up(self.table(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_transposed_and_packed_weights_and_tables():
    torch.manual_seed(0)
    model, x = Odd(), torch.randint(0, 10, (4, 6))
    with torch.no_grad():
        model.up.bias.zero_()
        model.attention.in_proj_bias.zero_()
        model.up.weight[4:, 1] = 0  # the second output of the second group
        model.attention.in_proj_weight[5] = 0
    found = zero_masks(model, x)
    assert sorted(found) == [
        "attention.in_proj_bias",
        "attention.in_proj_weight",
        "table.weight",
        "up.bias",
        "up.weight",
    ]
    assert (found["up.bias"] == 0).nonzero().tolist() == [[5]]
    assert (found["attention.in_proj_bias"] == 0).nonzero().tolist() == [[5]]
    assert (found["table.weight"] == 0).nonzero()[:, 0].unique().tolist() == [0]


def test_frozen_weights_have_no_mask_but_their_norms_do():
    learn = learner()
    learn.fit(1, cbs=SparsifyCallback(0.5, "filter", schedule=NOW))
    model = learn.model
    for layer in (model.stem, model.c1, model.c2, model.c3):
        layer.requires_grad_(False)
    found = zero_masks(model, images())
    assert sorted(found) == sorted(f"bn{i}.{k}" for i in range(4) for k in ("weight", "bias"))
    watch = Watch()
    learn.fit(1, cbs=[KeepZeros(), watch], reset_opt=True)
    assert watch.inside and set(watch.seen) == {8}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile
@pytest.mark.parametrize("kind", ["eager", "part"])
def test_wrapped_models(kind):
    model = wrapped(kind)
    plain = next(m for m in model.modules() if isinstance(m, Residual))
    Sparsifier(plain, "filter", example_inputs=images()).sparsify_model(0.5)
    learn, zero = learner(model), zeros_of(plain)
    learn.fit(1, cbs=KeepZeros())
    assert all(torch.equal(z, zero[k]) for k, z in zeros_of(plain).items())


def test_beside_a_callback_that_asks_for_more():
    learn = learner()
    learn.fit(1, cbs=SparsifyCallback(0.25, "kernel", layers="c1", schedule=NOW))
    zero = zeros_of(learn.model)
    cb = SparsifyCallback(0.5, "filter", schedule=lin.over(0.0, 0.5))
    learn.fit(2, cbs=[KeepZeros(), cb])
    assert filters_at_zero(learn.model.c1) == 8 and cb.report()["reached"].iloc[-1] == 0.5
    assert learn.model.c1.weight[zero["c1.weight"]].count_nonzero() == 0


def test_a_cut_in_between_moves_the_zeros():
    learn = learner()
    learn.fit(1, cbs=SparsifyCallback(0.3, "weight", exclude="stem", schedule=NOW))
    seen = []

    class Look(Watch):
        def after_batch(self):
            if self.training:
                seen.append(int((self.learn.model.c1.weight == 0).sum()))

    learn.fit(2, cbs=[KeepZeros(), Cuts(schedule=one_shot.over(4, 4)), Look()])
    assert learn.model.c1.out_channels == 8
    assert len(set(seen[:3])) == 1 and len(set(seen[4:])) == 1 and 0 < seen[4] < seen[0]


def test_after_pruning_there_is_nothing_to_hold():
    learn, keep = learner(), KeepZeros()
    learn.fit(1, cbs=SparsifyCallback(0.5, "filter", schedule=NOW))
    Pruner(learn.model, images()).prune_model()
    learn.fit(1, cbs=keep, reset_opt=True)
    assert keep.zeros == 0


def test_accumulated_and_skipped_steps_lr_find_and_validate(tmp_path):
    learn = learner(path=tmp_path)
    learn.fit(1, cbs=SparsifyCallback(0.5, "filter", schedule=NOW))
    zero = zeros_of(learn.model)
    learn.add_cb(KeepZeros())
    with learn.no_bar():
        learn.lr_find(num_it=5, show_plot=False)
    learn.validate()
    skip = Fail(CancelStepException(), "before_step", lambda s: s.iter % 2 == 0)
    learn.fit(2, cbs=[GradientAccumulation(12), skip])
    learn.fit(3, start_epoch=2)
    assert all(torch.equal(z, zero[k]) for k, z in zeros_of(learn.model).items())
