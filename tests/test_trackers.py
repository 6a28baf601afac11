"""fastai's trackers wait for the target, and are as they were afterwards."""

import pytest
import torch
from fastai.callback.core import Callback, CancelEpochException, CancelFitException
from fastai.callback.tracker import (
    EarlyStoppingCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    TrackerCallback,
)
from learners import LATE, Cuts, filters_at_zero, learner
from torch import nn

from fasterai.core.schedule import Schedule, agp, curves, dsd, lin, one_shot
from fasterai.fit.saved import unlike_tensors
from fasterai.sparse.callback import SparsifyCallback


class Worsens(Callback):
    """The validation loss gets worse from epoch to epoch, as it does when weights go."""

    order = 52

    def after_validate(self):
        self.learn.recorder.log[2] = float(self.epoch)


class Judged(TrackerCallback):
    """A tracker of one's own."""

    order = TrackerCallback.order + 5

    def before_fit(self):
        super().before_fit()
        self.epochs = []

    def after_epoch(self):
        super().after_epoch()
        self.epochs.append((self.epoch, self.new_best))


def untouched(tracker):
    return tracker.run and not {"after_epoch", "after_fit"} & set(vars(tracker))


@pytest.mark.parametrize("schedule, first", [(LATE, 2), (agp, 3), (lin.over(0.0, 0.1), 0)])
def test_trackers_judge_from_the_target_on(schedule, first, tmp_path):
    learn, judged = learner(path=tmp_path), Judged()
    learn.fit(4, cbs=[SparsifyCallback(0.5, "filter", schedule=schedule), judged, Worsens()])
    assert judged.epochs == [(e, e == first) for e in range(first, 4)] and untouched(judged)


def test_the_best_model_is_a_sparse_one(tmp_path):
    learn, saver = learner(path=tmp_path), SaveModelCallback()
    learn.fit(4, cbs=[SparsifyCallback(0.5, "filter", schedule=LATE), saver, Worsens()])
    assert filters_at_zero(learn.model.c1) == 8 and saver.best == 2.0
    again = learner(path=tmp_path).load("model", with_opt=False)
    assert filters_at_zero(again.model.c1) == 8


def test_it_is_an_option_and_without_it_the_best_is_dense(tmp_path):
    learn, judged = learner(path=tmp_path), Judged()
    cb = SparsifyCallback(0.5, "filter", schedule=LATE, hold_trackers=False)
    learn.fit(4, cbs=[cb, SaveModelCallback(), judged, Worsens()])
    assert [e for e, _ in judged.epochs] == [0, 1, 2, 3]
    assert filters_at_zero(learn.model.c1) == 0


def test_no_stop_and_no_lower_rate_on_the_way():
    learn, plateau = learner(), ReduceLROnPlateau(patience=1)
    rates = []
    seen = Callback(after_epoch=lambda self: rates.append(learn.opt.hypers[-1]["lr"]))
    seen.order = 99
    cbs = [EarlyStoppingCallback(patience=2), plateau, Worsens(), seen]
    learn.fit(9, 1e-2, cbs=[SparsifyCallback(0.5, schedule=one_shot.over(40, 40)), *cbs])
    assert len(learn.recorder.values) == 7  # 5 is the best, 6 and 7 are worse
    assert rates[:5] == [1e-2] * 5 and rates[5] == pytest.approx(1e-3)


def test_what_saves_every_epoch_or_the_end_goes_on(tmp_path):
    learn = learner(path=tmp_path)
    cbs = [
        SaveModelCallback(fname="each", every_epoch=True),
        SaveModelCallback(fname="second", every_epoch=2),
        SaveModelCallback(fname="end", at_end=True),
    ]
    cb = SparsifyCallback(0.5, "filter", schedule=LATE)
    learn.fit(4, cbs=[cb, *cbs, Worsens()])
    names = sorted(p.stem for p in (tmp_path / "models").iterdir())
    assert names == ["each_0", "each_1", "each_2", "each_3", "end", "second_0", "second_2"]
    zeros = [filters_at_zero(learn.load(k, with_opt=False).model.c1) for k in names]
    assert zeros == [0, 0, 8, 8, 8, 0, 8]


def test_a_best_of_an_earlier_fit_is_forgotten_where_it_was_less_sparse(tmp_path):
    learn = learner(path=tmp_path)
    saver = SaveModelCallback(reset_on_fit=False)
    learn.add_cb(saver)
    learn.fit(2, cbs=Worsens())
    assert saver.best == 0.0  # dense
    learn.fit(1, cbs=SparsifyCallback(0.5, "filter", schedule=one_shot.over(0, 0)))
    assert filters_at_zero(learn.model.c1) == 8 and saver.best > 0.0
    best = saver.best
    saver.best = -1.0  # of a sparse network: the next fit asks for no more zeros
    learn.save("model")
    learn.fit(1, cbs=SparsifyCallback(0.5, "filter"))
    assert saver.best == -1.0 != best and filters_at_zero(learn.model.c1) == 8


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_who_is_there_already_is_judged_from_the_start(tmp_path, sparsity):
    learn, judged = learner(path=tmp_path), Judged()
    learn.fit(1, cbs=SparsifyCallback(0.5, "filter", schedule=one_shot.over(0, 0)))
    learn.fit(2, cbs=[SparsifyCallback(sparsity, "filter"), judged])
    assert [e for e, _ in judged.epochs] == [0, 1]


def test_nobody_waits_where_nothing_is_asked(tmp_path):
    learn, judged = learner(path=tmp_path), Judged()
    learn.fit(2, cbs=[SparsifyCallback(0.0), judged])
    assert [e for e, _ in judged.epochs] == [0, 1]
    learn.model.requires_grad_(False)
    learn.model.head.requires_grad_(True)
    with pytest.warns(UserWarning, match="nothing to sparsify"):
        learn.fit(2, cbs=[SparsifyCallback(0.5), judged])
    assert [e for e, _ in judged.epochs] == [0, 1]


def test_back_at_dense_counts_as_the_target(tmp_path):
    learn, judged = learner(path=tmp_path), Judged()
    learn.fit(5, cbs=[SparsifyCallback(0.5, schedule=dsd), judged])
    assert [e for e, _ in judged.epochs] == [3, 4]


class Stops(Callback):
    def __init__(self, error, epoch=1, event="after_batch", order=0):
        self.error, self.at, self.order = error, epoch, order
        vars(self)[event] = self.stop

    def stop(self):
        if self.epoch == self.at:
            raise self.error


def test_a_fit_that_ends_on_the_way_loads_nothing_and_says_so(tmp_path):
    learn = learner(path=tmp_path)
    learn.fit(1, cbs=SaveModelCallback())  # the dense one of another day lies there
    cb = SparsifyCallback(0.5, "filter", schedule=lin.over(0.0, 1.0))
    with pytest.warns(UserWarning, match="SaveModelCallback loads nothing: the fit ended before"):
        learn.fit(4, cbs=[cb, SaveModelCallback(), Stops(CancelFitException(), 2)])
    assert filters_at_zero(learn.model.c1) == round(0.5 * 16 * 17 / 32)
    gone = sum(round(0.5 * n * 17 / 32) for n in (8, 16))
    assert cb.report()["reached"].iloc[-1] == gone / 24


def test_where_no_epoch_can_be_compared_nothing_is_loaded(tmp_path):
    learn = learner(path=tmp_path)
    learn.fit(1, cbs=SaveModelCallback())
    cb = SparsifyCallback(0.5, "filter", schedule=one_shot.over(0, 0))
    nan = Callback(after_validate=lambda self: learn.recorder.log.__setitem__(2, float("nan")))
    nan.order = 52
    with pytest.warns(UserWarning, match="no epoch since the target was reached has a valid_loss"):
        learn.fit(2, cbs=[cb, SaveModelCallback(), nan])
    assert filters_at_zero(learn.model.c1) == 8


ERRORS = [KeyboardInterrupt(), ValueError("boom"), CancelFitException(), CancelEpochException()]


@pytest.mark.parametrize("event", ["after_batch", "before_validate", "after_epoch"])
@pytest.mark.parametrize("order", [40, 57, 99])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore:SaveModelCallback loads nothing")
def test_trackers_come_back_whatever_happens(tmp_path, error, event, order, inside):
    """`inside`: the callback is the learner's, not the fit's, and hears nothing of an exception."""
    if event == "after_epoch" and isinstance(error, CancelEpochException):
        error = CancelFitException()  # fastai catches no other one there
    cb = SparsifyCallback(0.5, "filter", schedule=LATE)
    trackers = [SaveModelCallback(), Judged(), EarlyStoppingCallback(patience=9)]
    learn = learner(path=tmp_path, cbs=[*trackers, *([cb] if inside else [])])
    try:
        learn.fit(4, cbs=[Stops(error, 0, event, order), *([] if inside else [cb])])
    except (KeyboardInterrupt, ValueError):
        pass
    if not (inside and event == "after_epoch" and order == 57):
        assert all(map(untouched, trackers))
    if inside:
        learn.remove_cb(cb)
    learn.fit(2)
    assert all(map(untouched, trackers)) and [e for e, _ in trackers[1].epochs] == [0, 1]


def test_two_callbacks_on_the_way(tmp_path):
    learn, judged = learner(path=tmp_path), Judged()
    one = SparsifyCallback(0.5, layers="c1", schedule=one_shot.over(8, 8))
    two = SparsifyCallback(0.5, layers="c2", schedule=one_shot.over(20, 20))
    learn.fit(4, cbs=[one, two, judged])
    assert [e for e, _ in judged.epochs] == [2, 3] and untouched(judged)


def test_validate_and_a_fit_without_trackers_epochs(tmp_path):
    learn, judged = learner(path=tmp_path), Judged()
    learn.add_cbs([SparsifyCallback(0.5, schedule=LATE), judged])
    learn.validate()
    assert [e for e, _ in judged.epochs] != []  # fastai's trackers judge there, too
    learn.get_preds()


@pytest.mark.parametrize("with_opt", [False, True])
def test_a_best_model_from_before_a_cut_is_not_loaded(tmp_path, with_opt):
    learn = learner(path=tmp_path)
    saver = SaveModelCallback(with_opt=with_opt)
    message = r"saved before a cut.*stem\.weight: \(8, 3, 3, 3\) in the file, \(4, 3, 3, 3\) here"
    with pytest.warns(UserWarning, match=message):
        learn.fit(4, cbs=[Cuts(hold_trackers=False), saver, Worsens()])
    assert learn.model.c1.out_channels == 8 and untouched(saver)
    learn.fit(1)


def test_a_best_model_from_after_the_cut_is(tmp_path):
    learn, saver = learner(path=tmp_path), SaveModelCallback()
    learn.fit(4, cbs=[Cuts(), saver, Worsens()])
    assert learn.model.c1.out_channels == 8 and saver.best == 2.0
    learn.model.load_state_dict(torch.load(tmp_path / "models" / "model.pth"))


def test_tensors_that_differ_are_named(tmp_path):
    one, two = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), nn.Sequential(nn.Linear(3, 2))
    file = tmp_path / "one.pth"
    assert unlike_tensors(file, one) == ""
    torch.save(one.state_dict(), file)
    assert unlike_tensors(file, one) == "" == unlike_tensors(file, torch.compile(one))
    found = unlike_tensors(file, two, show=2)
    assert "0.weight: (4, 3) in the file, (2, 3) here" in found and found.endswith("and 2 more")
    assert "1.weight: (5, 4) in the file, no tensor here" in unlike_tensors(file, two, show=9)


def test_a_curve_that_never_arrives_keeps_trackers_waiting(tmp_path):
    learn, judged = learner(path=tmp_path), Judged()
    way = Schedule(curves.linear, 0, 100)
    with pytest.warns(UserWarning, match="target is not reached in this fit"):
        learn.fit(2, cbs=[SparsifyCallback(0.5, schedule=way), judged])
    assert judged.epochs == []
