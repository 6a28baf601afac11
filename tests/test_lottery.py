"""Lottery tickets: the loop against one written out, its controls, and what may break it."""

import copy

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import minimum  # noqa: F401  (patches Learner with fit_one_cycle)
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.metrics import mse
from fastai.optimizer import SGD
from learners import Items, data, learner, left_behind
from networks import Residual, make
from torch import nn

from fasterai.core.criteria import grad_crit, large_init_large_final, movement
from fasterai.score.criteria import wanda
from fasterai.sparse.callback import KeepZeros
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.tickets.callback import LotteryTicket
from fasterai.tickets.masks import Masks
from fasterai.tickets.ticket import Ticket

STEPS = 8  # an epoch
LR = 0.02


def in_order(n=64, bs=8):
    """Batches that come in the same order every time."""
    items = data(n, bs).train.dataset
    loaders = [DataLoader(items, bs=bs, num_workers=0) for _ in range(2)]
    return DataLoaders(*loaders, device="cpu")


def steady(model=None):
    learn = learner(model, opt_func=SGD)
    learn.dls = in_order()
    return learn


def trained(weights, masks, first, last, batches):
    """Plain SGD from step `first` to `last`, zeros held; also all states on the way."""
    model = make(Residual).train()
    model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    seen = {}
    for step in range(first, last):
        zero(model, masks)
        seen[step] = copy.deepcopy(model.state_dict())
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    zero(model, masks)
    return model, seen


@torch.no_grad()
def zero(model, masks):
    for name, mask in masks.items():
        model.get_parameter(name)[mask == 0] = 0.0


def by_sorting(model, names, share, context):
    """Masks that zero this share of the smallest weights."""
    sizes = {k: model.get_parameter(k).detach().abs().flatten() for k in names}
    parts = [names] if context == "global" else [[k] for k in names]
    masks = {}
    for part in parts:
        scores = torch.cat([sizes[k] for k in part])
        gone = torch.zeros_like(scores)
        gone[scores.argsort(stable=True)[: round(share * len(scores))]] = 1
        for name, own in zip(part, gone.split([len(sizes[k]) for k in part]), strict=True):
            masks[name] = (1 - own).view_as(model.get_parameter(name))
    return masks


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("rewind, step", [(0, 0), (3, 3), (0.5, 8), (11, 11)])
def test_against_the_loop_written_out(context, rewind, step):
    learn, rounds = steady(), 3
    initial = copy.deepcopy(learn.model.state_dict())
    batches, names = list(learn.dls.train), [f"{k}.weight" for k in ("stem", "c1", "c2", "c3")]
    lottery = LotteryTicket(learn, 0.7, context=context, rounds=rounds, rewind=rewind)
    ticket = lottery.find(2, LR, wd=0.0)
    early, first, masks = initial, 0, {}
    for r in range(rounds):
        model, seen = trained(early, masks, first, 2 * STEPS, batches)
        if r == 0:
            early, first = seen[step], step
        masks = by_sorting(model, names, 1 - 0.3 ** ((r + 1) / rounds), context)
        assert lottery.tickets[r].masks == Masks(masks)
    assert ticket is lottery.tickets[-1] and ticket.step == step
    for name, value in learn.model.state_dict().items():
        expected = early[name] * masks.get(name, 1)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
        assert name not in masks or not value[masks[name] == 0].any()
    metrics = lottery.train(ticket, 2, LR, wd=0.0)
    model, _ = trained(early, masks, first, 2 * STEPS, batches)
    for name, value in learn.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-5)
    table = lottery.report()
    assert table["sparsity"].tolist() == [0.0, *(t.sparsity for t in lottery.tickets[:-1])]
    assert {"train_loss", "valid_loss", "accuracy"} == set(metrics) <= set(table)


def test_training_goes_on_with_the_rates_of_the_step():
    class Rates(Callback):
        def before_fit(self):
            self.seen, self.at = [], []

        def after_step(self):
            self.seen.append(self.opt.hypers[-1]["lr"])
            self.at.append((self.epoch, self.iter, self.train_iter))

    learn, rates = steady(), Rates()
    lottery = LotteryTicket(learn, 0.5, rounds=1, rewind=11)
    ticket = lottery.find(3, 0.1, fit="fit_one_cycle", cbs=rates)
    whole, places = rates.seen, rates.at
    lottery.train(ticket, 3, 0.1, fit="fit_one_cycle", cbs=rates)
    assert rates.seen == pytest.approx(whole[11:]) and rates.at == places[11:]
    assert len(whole) == 24 and len(learn.recorder.values) == 2


def test_of_two_fits_the_first_one_is_rewound():
    class Steps(Callback):
        order = -10

        def before_fit(self):
            fits.append([])

        def before_batch(self):
            if self.training:
                states = copy.deepcopy(self.learn.model.state_dict())
                fits[-1].append(((self.epoch, self.iter), states))

    learn, fits = steady(), []
    lottery = LotteryTicket(learn, 0.5, rounds=2, rewind=3)
    ticket = lottery.find(1, LR, fit="fine_tune", cbs=(cb for cb in [Steps()]))
    early = fits[0][3][1]
    assert ticket.step == 3 and all(torch.equal(v, early[k]) for k, v in ticket.weights.items())
    places = [(0, i) for i in range(STEPS)]
    assert [[at for at, _ in fit] for fit in fits] == [places, places, places[3:], places]


def test_buffers_that_no_state_dict_holds_are_rewound():
    class Counting(Residual):
        def __init__(self):
            super().__init__()
            self.register_buffer("runs", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.runs += 1
            return super().forward(x)

    learn = steady(make(Counting))
    ticket = LotteryTicket(learn, 0.5, rounds=1).find(1, LR)
    assert ticket.weights["runs"] == 0 == learn.model.runs
    del learn.model.runs  # weights from elsewhere may lack it
    known = Ticket(ticket.masks, learn.model.state_dict())
    other = make(Counting)
    assert known.load_into(other).runs == 0


def sums(n=128):
    """y = 3 x0 - 2 x1; the other six inputs say nothing."""
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(3))
    items = Items(x, 3 * x[:, :1] - 2 * x[:, 1:2])
    loaders = [DataLoader(items, bs=16, num_workers=0) for _ in range(2)]
    learn = Learner(
        DataLoaders(*loaders, device="cpu"), nn.Sequential(nn.Linear(8, 1)), nn.MSELoss()
    )
    learn.remove_cb(learn.progress)
    learn.logger, learn.metrics, learn.opt_func = lambda _: None, mse, SGD
    return learn


def test_the_ticket_is_what_matters():
    torch.manual_seed(0)
    learn = sums()
    lottery = LotteryTicket(learn, 0.75, rounds=3, layers="0")
    ticket = lottery.find(4, 0.1)
    assert ticket.masks["0.weight"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    good = lottery.train(ticket, 4, 0.1)
    control = lottery.random_mask(ticket)
    assert control.masks["0.weight"].sum() == 2 and control.masks != ticket.masks
    bad = lottery.train(control, 4, 0.1)
    assert good["valid_loss"] < 0.01 < 2 < bad["valid_loss"]


def test_a_layer_that_went_as_a_whole_is_empty_in_the_random_mask_too():
    learn = learner()
    with torch.no_grad():
        learn.model.c1.weight.mul_(1e-6)
    lottery = LotteryTicket(learn, 0.6, "weight", "global", rounds=1, min_keep=0)
    ticket = lottery.find(1, 1e-9)
    assert ticket.masks.sparsities["c1.weight"] == 1
    control = lottery.random_mask(ticket)
    assert control.masks.sparsities == ticket.masks.sparsities and control.masks != ticket.masks


@pytest.mark.parametrize(
    "granularity, context, kwargs",
    [
        ("weight", "global", {}),
        ("filter", "local", {}),
        ("filter", "global", {"round_to": 2}),
        ("kernel", "global", {}),
        ("row", "local", {"layers": ["c1", "c2"]}),
        ("o/3 i", "local", {"min_keep": 3}),
        ("2:4", "local", {"exclude": "stem"}),
    ],
)
def test_every_granularity_and_its_random_mask(granularity, context, kwargs):
    learn = learner()
    lottery = LotteryTicket(learn, 0.5, granularity, context, rounds=2, **kwargs)
    ticket = lottery.find(1)
    sparsifier = Sparsifier(
        learn.model, granularity, context, example_inputs=torch.randn(2, 3, 8, 8), **kwargs
    )
    assert Masks(sparsifier.masks) == ticket.masks  # what is zero in the model
    torch.manual_seed(1)
    control = lottery.random_mask(ticket)
    assert control.masks != ticket.masks
    if granularity != "o/3 i":  # whose last block is smaller
        assert control.masks.sparsities == ticket.masks.sparsities
    control.load_into(learn.model)
    look = Sparsifier(
        learn.model, granularity, context, example_inputs=torch.randn(2, 3, 8, 8), **kwargs
    )
    assert Masks(look.masks) == control.masks  # whole groups
    shares = [s.report().set_index("layer")["zeros"].to_dict() for s in (sparsifier, look)]
    assert shares[0] == shares[1]
    lottery.train(control, 1)
    held = dict(learn.model.named_parameters())
    assert not any(held[k][m == 0].any() for k, m in control.masks.items())


def test_a_sparsity_for_each_layer():
    lottery = LotteryTicket(learner(), {"c1": 0.5, "c2": 0.75}, rounds=2)
    ticket = lottery.find(1)
    found = ticket.masks.sparsities
    assert (found["c1.weight"], found["c2.weight"], found["stem.weight"]) == (0.5, 0.75, 0.0)
    first = lottery.tickets[0].masks["c2.weight"]
    assert int((first == 0).sum()) == round(0.5 * first.numel())


@pytest.mark.parametrize("criteria", [large_init_large_final, movement])
def test_criteria_that_know_the_start_of_the_round(criteria):
    learn = steady()
    batches = list(learn.dls.train)
    initial = copy.deepcopy(learn.model.state_dict())
    ticket = LotteryTicket(learn, 0.5, criteria=criteria, rounds=1).find(1, LR, wd=0.0)
    model, _ = trained(initial, {}, 0, STEPS, batches)
    now, before = model.c1.weight.detach(), initial["c1.weight"]
    if criteria is movement:
        scores = (now - before).abs()
    else:
        scores = torch.minimum(now.abs(), before.abs())
    least = scores.flatten().sort().values[: scores.numel() // 2].max()
    agree = (ticket.masks["c1.weight"] == 1) == (scores > least)
    assert agree.float().mean() > 0.99  # rounding may swap neighbours


# --- what may break ------------------------------------------------------------------------------


class Breaks(Callback):
    """Raises at the n-th call of an event."""

    order = 80

    def __init__(self, event, n, error):
        self.event, self.left, self.error = event, n, error

    def __call__(self, name):
        if name == self.event and (name != "before_batch" or self.learn.training):
            self.left -= 1
            if self.left == 0:
                raise self.error
        return super().__call__(name)


@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), RuntimeError("bang")])
@pytest.mark.parametrize("event, n", [("before_batch", 12), ("after_step", 16), ("before_fit", 2)])
def test_broken_off_and_gone_on_with(event, n, error):
    whole = LotteryTicket(steady(), 0.8, rounds=3, rewind=3)
    whole.find(1, LR)
    learn = steady()
    lottery = LotteryTicket(learn, 0.8, rounds=3, rewind=3)
    with pytest.raises(type(error)):
        lottery.find(1, LR, cbs=Breaks(event, n, error))
    assert 0 < len(lottery.tickets) < 3 and not left_behind(learn)
    ticket = lottery.find(1, LR)
    assert [t.masks for t in lottery.tickets] == [t.masks for t in whole.tickets]
    assert lottery.report().equals(whole.report()) and not left_behind(learn)
    assert lottery.find(1, LR) is ticket  # nothing is left to do


def test_a_fit_that_ends_early_leaves_nothing():
    learn = steady()
    lottery = LotteryTicket(learn, 0.5, rounds=1, rewind=5)
    ticket = lottery.find(2, LR)
    lottery.train(ticket, 2, LR, cbs=Breaks("before_epoch", 1, CancelFitException()))
    assert not left_behind(learn)
    learn.fit(1)
    assert len(learn.recorder.values) == 1


@pytest.mark.parametrize(
    "event, n, when", [("before_epoch", 1, "its first batch"), ("before_batch", 3, "step 5")]
)
def test_a_fit_that_ends_too_early_makes_no_ticket(event, n, when):
    lottery = LotteryTicket(steady(), 0.5, rounds=1, rewind=5)
    with pytest.raises(RuntimeError, match=f"the fit ended before {when}, so that there is"):
        lottery.find(1, LR, cbs=Breaks(event, n, CancelFitException()))
    assert not lottery.tickets and lottery.find(1, LR).step == 5


def test_with_trackers_and_skipped_epochs(tmp_path):
    learn = steady()
    learn.path = tmp_path
    lottery = LotteryTicket(learn, 0.5, rounds=2, rewind=9)
    ticket = lottery.find(3, LR)
    watch = [EarlyStoppingCallback(patience=5), SaveModelCallback()]
    lottery.train(ticket, 3, LR, cbs=watch)
    assert len(learn.recorder.values) == 2
    held = dict(learn.model.named_parameters())
    assert not any(held[k][m == 0].any() for k, m in ticket.masks.items())


@pytest.mark.filterwarnings("ignore:load_learner")
def test_masks_are_kept_through_any_fit(tmp_path):
    model = make(Residual)
    sparsifier = Sparsifier(model, "filter", example_inputs=torch.randn(2, 3, 8, 8))
    sparsifier.sparsify_model(0.5)
    masks = Masks(sparsifier.masks)

    class Zeros(Callback):
        order, seen = -99, 0

        def after_step(self):
            named = dict(self.learn.model.named_parameters())
            zeros = [named[k][m == 0] for k, m in masks.items()]
            assert not any(z.any() or z.signbit().any() for z in zeros)
            self.seen += 1

    learn, watch = learner(model, cbs=KeepZeros(masks), path=tmp_path), Zeros()
    learn.fit(2, wd=0.1, cbs=watch)
    assert watch.seen == 2 * STEPS
    learn.export("l.pkl")
    other = load_learner(tmp_path / "l.pkl")
    assert other.keep_zeros.masks == masks and not left_behind(learn)[1:]
    other.dls = learn.dls
    other.fit(1, cbs=Zeros())
    learn.model.c1 = nn.Conv2d(8, 12, 3, padding=1)
    with pytest.raises(ValueError, match="another network"):
        learn.fit(1)


def test_a_ticket_is_saved_in_a_folder_that_is_there(tmp_path):
    ticket = Ticket(Masks({}), {"a": torch.ones(2)})
    with pytest.raises(FileNotFoundError, match="there is no folder .*none for a: make it first"):
        ticket.save(tmp_path / "none" / "a")
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        ticket.save(tmp_path)


def test_a_ticket_is_loaded_as_a_whole_or_not_at_all():
    model = make(Residual)
    model.register_buffer("once", torch.ones(1).expand(4))
    ticket = Ticket(Masks({}), {k: v + 1 for k, v in model.state_dict().items()})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'once' shows one number in many places"):
        ticket.load_into(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bad_arguments_are_refused_before_anything_is_trained():
    learn = steady()
    before = copy.deepcopy(learn.model.state_dict())
    for kwargs, message in (
        ({"rounds": 0}, "rounds must be a whole number"),
        ({"rewind": -1}, "rewind must be"),
        ({"rewind": 1.5}, "for steps pass 1"),
        ({"rewind": float("nan")}, "rewind must be .*, got nan"),
        ({"rewind": float("inf")}, "rewind must be .*, got inf"),
        ({"criteria": grad_crit}, "no gradients"),
        ({"criteria": wanda}, "wanda needs data"),
        ({"sparsity": 40}, "for 40% pass 0.4"),
        ({"granularity": "kernal"}, "did you mean 'kernel'"),
        ({"layers": "c9"}, "no layer 'c9'"),
        ({"rewind": 16}, "rewind is step 16, and the fit has 16 steps"),
        ({"sparsity": {"c9": 0.5}}, "no layer 'c9'"),
    ):
        lottery = None
        with pytest.raises(ValueError, match=message):
            lottery = LotteryTicket(learn, **{"sparsity": 0.5, **kwargs})
            lottery.find(2, LR)
        assert lottery is None or not lottery.tickets
        assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items()), kwargs
    with pytest.raises(TypeError, match="masks go by parameter names"):
        KeepZeros(torch.ones(2))
    lottery = LotteryTicket(learn, 0.5, rounds=1, rewind=12)
    ticket = lottery.find(2, LR)
    with pytest.raises(ValueError, match="from step 12, and the fit has 8 steps"):
        lottery.train(ticket, 1, LR)
    broken = ticket.with_masks(
        Masks({"c1.weight": torch.eye(16, 8).view(16, 8, 1, 1).expand(16, 8, 3, 3)})
    )
    with pytest.raises(ValueError, match="not whole groups"):
        LotteryTicket(learn, 0.5, "filter").random_mask(broken)
    assert isinstance(ticket, Ticket)


def test_frozen_weights_do_not_count_and_that_is_said():
    learn = steady()
    for layer in (learn.model.stem, learn.model.c1):
        layer.requires_grad_(False)
    frozen = {n: p.clone() for n, p in learn.model.named_parameters() if not p.requires_grad}
    with pytest.warns(UserWarning, match="% of the weights are frozen, stay dense"):
        LotteryTicket(learn, 0.5, rounds=1).find(1, LR)
    assert all(torch.equal(p, frozen.get(n, p)) for n, p in learn.model.named_parameters())
