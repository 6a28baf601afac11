"""A fit that was killed goes on where it was: zeros are the state."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from learners import Count, Watch, filters_at_zero, learner, weights_at_zero
from networks import Residual, make

from fasterai.core.schedule import SCHEDULES, agp, cos, dsd, lin, one_shot
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier

EPOCHS, STEPS = 5, 8
NOW = {"schedule": one_shot.over(0, 0)}
FULL = lin.over(0.0, 1.0)


class Files(Callback):
    """Saves after each epoch, and never leaves half a file."""

    order = 80

    def after_epoch(self):
        if self.learn.train_iter:  # not while epochs are skipped
            folder = self.path / self.learn.model_dir
            self.learn.save("new")
            os.replace(folder / "new.pth", folder / f"{self.epoch + 1}.pth")


class Stop(Callback):
    order = 90

    def __init__(self, epoch):
        self.last = epoch

    def before_epoch(self):
        if self.epoch == self.last:
            raise KeyboardInterrupt


def interrupted(tmp_path, at, cb, held=None):
    """A learner as loaded after the first `at` epochs of a fit, and the counts until then."""
    learn, count = learner(path=tmp_path), Count()
    if held is not None:
        learn.fit(1, cbs=SparsifyCallback(held, cb.granularity, cb.context, **NOW))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(EPOCHS, cbs=[cb, count, Files(), Stop(at)])
    return learner(path=tmp_path).load(str(at)), count.zeros


def counts(learn, cb, at=0, fit="fit"):
    """How many weights are zero at each step of a fit that begins at an epoch."""
    count = Count()
    getattr(learn, fit)(EPOCHS, cbs=[cb, count], start_epoch=at)
    return count.zeros


def masks(learn):
    return {k: p == 0 for k, p in learn.model.named_parameters()}


CHAIN = agp.over(0.1, 0.4, to=0.5).then(lin.over(0.6, 0.8))


@pytest.mark.parametrize("schedule", [*SCHEDULES, FULL, CHAIN], ids=lambda s: s.name)
@pytest.mark.parametrize("sparsity, at", [(0.5, 1), (0.5, 3), (0.5, 4), ((0.2, 0.7), 4)])
def test_the_way_goes_on_where_it_was(tmp_path, schedule, sparsity, at):
    def callback():
        return SparsifyCallback(sparsity, "weight", "global", schedule=schedule)

    whole = counts(learner(), callback())
    learn, before = interrupted(tmp_path, at, callback())
    cb, zero = callback(), masks(learn)
    assert before + counts(learn, cb, at) == whole
    if schedule is not dsd:
        assert all(m[zero[k]].all() for k, m in masks(learn).items())
    assert cb.history[0][0] >= at * STEPS and cb.history[-1][1] == cb.reached()


LIMITS = [
    {"min_keep": 600},
    {"round_to": 64},
    {"round_to": 64, "context": "local"},
    {"min_keep": 150, "context": "local"},
    {"granularity": "filter", "context": "local"},
    {"granularity": "filter", "context": "local", "round_to": 4},
    {"granularity": "2:4", "context": "local", "exclude": "stem"},
    {"granularity": "kernel"},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("at", [2, 3])
def test_limits_do_not_lead_astray(tmp_path, limits, at):
    def callback():
        kind = {"granularity": "weight", "context": "global"} | limits
        return SparsifyCallback(0.5, **kind, schedule=FULL)

    whole = counts(learner(), callback())
    learn, before = interrupted(tmp_path, at, callback())
    rest = before + counts(learn, callback(), at)
    assert rest[: at * STEPS] == whole[: at * STEPS] and rest[-1] == whole[-1]
    if "round_to" not in limits or "context" in limits:
        assert rest == whole


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_way_that_began_at_some_zeros_goes_on_too(tmp_path, at):
    def callback():
        return SparsifyCallback(0.7, "weight", "global", schedule=FULL)

    learn = learner()
    learn.fit(1, cbs=SparsifyCallback(0.25, "weight", "global", **NOW))
    whole = counts(learn, callback())
    learn, before = interrupted(tmp_path, at, callback(), held=0.25)
    rest = before + counts(learn, callback(), at)
    assert max(abs(a - b) for a, b in zip(rest, whole, strict=True)) <= 1
    assert rest[-1] == whole[-1]


@pytest.mark.parametrize("held", [0.0, 0.1, 0.4])
def test_it_never_jumps_and_ends_exact(held):
    learn = learner()
    learn.fit(1, cbs=SparsifyCallback(held, "weight", "global", **NOW))
    begun = weights_at_zero(learn)
    cb = SparsifyCallback(0.5, "weight", "global", schedule=lin.over(0.0, 0.9))
    seen = counts(learn, cb, 3)  # a way from 0 would be at 0.33 here
    free = int(cb.report()["groups"].iloc[-1])
    assert seen[0] == begun == round(held * free) and seen[-1] == round(0.5 * free)
    steps = [b - a for a, b in zip(seen, seen[1:], strict=False)]
    even = (seen[-1] - begun) / 12  # 36 of 40 steps, 24 of them over
    assert all(even - 1 <= step <= even + 1 for step in steps[:12]) and not any(steps[12:])


def test_behind_the_last_update_what_is_missing_is_made_up_for_at_once():
    learn = learner()
    learn.fit(1, cbs=SparsifyCallback(0.25, "filter", **NOW))
    watch = Watch()
    learn.fit(5, cbs=[SparsifyCallback(0.5, "filter"), watch], start_epoch=4)
    assert watch.seen == [8] * 8
    learn.fit(5, cbs=[SparsifyCallback(0.25, "filter"), watch], start_epoch=2)
    assert watch.seen[8:] == [8] * 24 and watch.inside


def test_an_interrupted_way_back_goes_on_down(tmp_path):
    cb = SparsifyCallback(0.5, "weight", "global", schedule=dsd.over(0.0, 1.0))
    learn, _ = interrupted(tmp_path, 4, cb)
    held = weights_at_zero(learn)
    cb = SparsifyCallback(0.5, "weight", "global", schedule=dsd.over(0.0, 1.0))
    seen = counts(learn, cb, 4)
    assert held >= seen[0] > seen[4] > 0 and cb.history[-1] == (40, 0.0)


def test_one_cycle_too(tmp_path):
    def callback():
        return SparsifyCallback(0.5, "weight", "global", schedule=cos)

    whole = counts(learner(), callback(), fit="fit_one_cycle")
    learn, before = interrupted(tmp_path, 2, callback())
    assert before + counts(learn, callback(), 2, "fit_one_cycle") == whole


def test_what_fastai_does_with_start_epoch(tmp_path):
    """What the documentation says of others."""
    learn = learner(path=tmp_path)
    assert len(counts(learn, SparsifyCallback(0.5), 2, "fit_flat_cos")) == EPOCHS * STEPS
    for cbs in ([], [SparsifyCallback(0.5)]):
        with pytest.raises(IndexError):
            learn.fit(3, cbs=[EarlyStoppingCallback(), *cbs], start_epoch=1)
    learn.fit(3, cbs=[SaveModelCallback(every_epoch=True), SparsifyCallback(0.5)], start_epoch=1)


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 1.0])
def test_origins_lead_through_what_is_held_to_the_target(context, share):
    model = make(Residual)
    sparsifier = Sparsifier(model, context=context, example_inputs=torch.randn(1, 3, 8, 8))
    sparsifier.sparsify_model(0.3)
    targets, held = sparsifier.targets(0.6), sparsifier.held()
    begun = sparsifier.origins(targets, [share])
    if share < 1:
        at = [(1 - share) * a + share * b for a, b in zip(begun, targets, strict=True)]
        assert at == pytest.approx(held)
    assert sparsifier.origins(sparsifier.targets(0.2), [share]) == held
    if share == 0.2:  # a way from 0 to 1 would hold more
        assert sparsifier.origins(sparsifier.targets(1.0), [0.3]) == (0.0,) * len(held)


class Record(Callback):
    """Writes down each step; takes its own process down at one of them, or goes on."""

    order = 98

    def __init__(self, file, steps):
        self.file, self.steps = file, steps

    def after_step(self):
        with self.file.open("a") as file:
            file.write(f"{self.epoch * STEPS + self.iter} {weights_at_zero(self.learn)}\n")
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, steps):
    """Start or go on, from the last file there is; killed after so many steps."""
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())
    learn = learner(path=folder)
    files = sorted((folder / "models").glob("[0-9].pth"))
    begin = int(files[-1].stem) if files else 0
    if begin:
        learn.load(str(begin))
        held = weights_at_zero(learn)
        assert held == at_step(begin * STEPS)
    cbs = [SparsifyCallback(0.5, "weight", "global"), Files(), Record(folder / "steps", steps)]
    learn.fit(EPOCHS, cbs=cbs, start_epoch=begin)
    assert weights_at_zero(learn) == at_step(EPOCHS * STEPS)


def at_step(step, free=8 * 27 + 2 * 8 * 16 * 9 + 64 * 9):
    """How many of the weights are zero in a step, by the schedule."""
    shares = [0.0, *(share for t, share in agp.updates(EPOCHS * STEPS) if t <= step)]
    return round(0.5 * shares[-1] * free)


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again(tmp_path, seed):
    chance = random.Random(seed)
    (tmp_path / "models").mkdir()
    context = multiprocessing.get_context("forkserver")  # imports once, runs nothing itself
    context.set_forkserver_preload(["test_resume"])
    for attempt in range(20):
        steps = chance.randint(1, 20) if chance.random() < 0.5 else 0
        process = context.Process(target=train, args=(tmp_path, steps))
        process.start()
        if not steps and attempt < 4:  # from outside, at any moment
            while process.is_alive() and not (tmp_path / "steps").exists():
                time.sleep(0.01)
            process.join(chance.random())
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
    lines = [tuple(map(int, x.split())) for x in (tmp_path / "steps").read_text().splitlines()]
    assert process.exitcode == 0 and len(lines) >= EPOCHS * STEPS
    assert all(zeros == at_step(step) for step, zeros in lines)
    assert {step for step, _ in lines} == set(range(EPOCHS * STEPS))


def test_masks_of_filters_are_found_again_with_their_norms(tmp_path):
    cb = SparsifyCallback(0.5, "filter", schedule=agp.over(0.1, 0.3))
    learn, _ = interrupted(tmp_path, 3, cb)
    watch = Watch()
    learn.fit(5, cbs=[SparsifyCallback(0.5, "filter", schedule=cb.schedule), watch], start_epoch=3)
    assert watch.seen == [8] * 16 and watch.inside and filters_at_zero(learn.model.c1) == 8
