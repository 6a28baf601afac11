"""Whatever goes wrong in a fit, model, optimizer and learner are usable afterwards."""

import gc

import pytest
import torch
from fastai.callback.core import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    _events,
)
from fastai.callback.tracker import SaveModelCallback, TerminateOnNaNCallback
from fastai.optimizer import SGD
from learners import data, filters_at_zero, learner
from torch import nn

from fasterai.core.criteria import movement
from fasterai.core.schedule import lin, one_shot
from fasterai.sparse.callback import KeepZeros, SparsifyCallback

WAY = lin.over(0.0, 1.0)
CANCEL = {
    "fit": CancelFitException,
    "epoch": CancelEpochException,
    "train": CancelTrainException,
    "validate": CancelValidException,
    "batch": CancelBatchException,
    "step": CancelStepException,
    "backward": CancelBackwardException,
}
ERRORS = [KeyboardInterrupt, ValueError, *CANCEL.values()]
EVENTS = [e for e in _events if e not in ("after_create", *(f"after_cancel_{k}" for k in CANCEL))]
PLAN = [  # each event, before and behind the callback; over them all errors
    (event, order, ERRORS[(5 * i + 2 * j) % len(ERRORS)], (i + j) % 2 == 0)
    for i, event in enumerate(EVENTS)
    for j, order in enumerate((-90, 99))
] + [
    (event, order, error, inside)
    for event in ("before_step", "after_step", "after_batch")
    for order in (-90, 99)
    for error in (KeyboardInterrupt, CancelFitException)
    for inside in (False, True)
]
SPOT = 11  # the step in which it happens


class Fault(Callback):
    """Raises once: in a step, or where there are none in an epoch."""

    def __init__(self, event, order, error):
        self.error, self.order, self.steps = error, order, 0
        inside = event not in ("before_fit", "after_fit", "before_epoch", "after_epoch")
        self.at = SPOT if inside and "train" not in event and "valid" not in event else 8
        vars(self)[event] = self.fail
        vars(self).setdefault("after_pred", self.count)

    def count(self):
        self.steps += self.learn.training

    def fail(self):
        if "after_pred" in vars(self) and vars(self)["after_pred"] == self.fail:
            self.count()
        if self.steps >= self.at and self.error is not None:
            error, self.error = self.error, None
            raise error("on purpose")


def zeros_are_exact(model):
    zero = (model.c1.weight.flatten(1) == 0).all(1)
    quiet = [model.c1.weight[zero], model.bn1.weight[zero], model.bn1.bias[zero]]
    return not any(q.count_nonzero() or q.signbit().any() for q in quiet)


def untouched(learn, keys):
    model = learn.model
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return (
        list(model.state_dict()) == keys
        and not hooks
        and all(type(p) is nn.Parameter for p in model.parameters())
        and "step" not in vars(learn.opt)
    )


@pytest.mark.parametrize("event, order, error, inside", PLAN)
def test_faults(event, order, error, inside):
    """`inside`: the callback is the learner's, not the fit's, and hears nothing of an exception."""
    cb, fault = SparsifyCallback(0.5, "filter", schedule=WAY), Fault(event, order, error)
    learn = learner(cbs=cb if inside else None, opt_func=lambda p, lr: SGD(p, lr, mom=0.9))
    keys, free = list(learn.model.state_dict()), 16
    try:
        learn.fit(4, cbs=[fault, *([] if inside else [cb])])
    except (*ERRORS, ValueError):
        pass
    assert fault.error is None or event == "before_fit"
    model, steps = learn.model, len(learn.recorder.losses)
    whole = len(learn.recorder.values) == 4
    due = range(steps - 1, steps + 3) if not whole else [32]
    assert filters_at_zero(model.c1) in {round(0.5 * t / 32 * free) for t in due}
    assert zeros_are_exact(model) and all(p.isfinite().all() for p in model.parameters())
    if inside:  # nobody told the callback; it learns of it with the next event
        learn.validate()
        learn.remove_cb(cb)
    assert untouched(learn, keys) and cb not in learn.cbs
    learn.fit(1)
    assert list(learn.recorder.metric_names)[-2:] == ["accuracy", "time"]
    again = SparsifyCallback(0.5, "filter")
    learn.fit(2, cbs=again)
    assert filters_at_zero(model.c1) == 8 and again.report()["reached"].iloc[-1] == 0.5


class Failing(SGD(nn.Linear(1, 1).parameters(), 0.1).__class__):
    """Stops in the middle of a step, when half of the parameters are moved."""

    left = 20

    def step(self, closure=None):
        half = len(self.all_params()) // 2
        for i, (p, *_) in enumerate(self.all_params(with_grad=True)):
            p.data.add_(0.1)
            if i == half and self.left == 0:
                raise KeyboardInterrupt
        self.left -= 1


def failing(params, lr):
    optimizer = SGD(params, lr)
    optimizer.__class__ = Failing
    return optimizer


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_an_interrupt_in_the_middle_of_a_step(inside, keep):
    now = SparsifyCallback(0.5, "filter", schedule=one_shot.over(0, 0))
    learn = learner()
    if keep:
        learn.fit(1, cbs=now)
    learn.opt_func = failing
    cb = KeepZeros() if keep else now
    learn.add_cbs(cb if inside else None)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(4, cbs=None if inside else cb, reset_opt=True)
    assert zeros_are_exact(learn.model) and filters_at_zero(learn.model.c1) == 8
    assert untouched(learn, list(learn.model.state_dict()))


class NotANumber(Callback):
    def after_loss(self):
        if self.training and self.train_iter == SPOT:
            self.learn.loss_grad = self.loss_grad * float("nan")
            self.learn.loss = self.loss * float("nan")


@pytest.mark.parametrize("terminate", [False, True])
def test_a_loss_that_is_no_number(tmp_path, terminate):
    learn = learner(path=tmp_path)
    cb = SparsifyCallback(0.5, "filter", schedule=WAY)
    learn.save("good", with_opt=False)
    cbs = [cb, NotANumber(), *([TerminateOnNaNCallback()] if terminate else [])]
    if terminate:
        learn.fit(4, cbs=cbs)
        assert len(cb.history) == SPOT + 1
    else:
        with pytest.raises(ValueError, match="nan"):
            learn.fit(4, cbs=cbs)
    dead = (learn.model.c1.weight == 0).flatten(1).all(1)
    assert 0 < dead.sum() < 8 and zeros_are_exact(learn.model)
    learn.load("good", with_opt=False)
    learn.create_opt()
    learn.fit(2, cbs=SparsifyCallback(0.5, "filter"))
    assert filters_at_zero(learn.model.c1) == 8 and zeros_are_exact(learn.model)


def test_a_criterion_that_fails_on_the_way():
    calls = []

    def criterion(weight):
        calls.append(1)
        if len(calls) > 20:
            raise RuntimeError("no more")
        return weight.abs()

    learn = learner()
    cb = SparsifyCallback(0.5, "filter", criteria=criterion, schedule=WAY)
    with pytest.raises(Exception, match="no more"):
        learn.fit(4, cbs=cb)
    assert zeros_are_exact(learn.model) and 0 < filters_at_zero(learn.model.c1) < 8
    learn.fit(1)


class Stop(Callback):
    def after_step(self):
        raise KeyboardInterrupt


def live():
    gc.collect()
    plain = torch.Tensor, torch.nn.Parameter  # what torch.compile traced has no sizes to add up
    tensors = [o for o in gc.get_objects() if type(o) in plain]
    return len(gc.get_objects()), len(tensors), sum(t.numel() for t in tensors)


KINDS = {
    "filter": lambda: SparsifyCallback(0.5, "filter", schedule=WAY),
    "weight": lambda: SparsifyCallback(0.5, context="global", schedule=WAY),
    "records": lambda: SparsifyCallback(0.5, "kernel", criteria=movement, schedule=one_shot),
    "keep": KeepZeros,
    "in the open": lambda: SparsifyCallback(0.5, "filter", hold_trackers=False),
}


@pytest.mark.filterwarnings("ignore:SaveModelCallback loads nothing")
@pytest.mark.parametrize("ends", ["well", "badly"])
def test_memory_is_flat_over_fifty_fits(tmp_path, ends):
    learn, sizes = learner(path=tmp_path), []
    learn.dls = data(16)
    learn.fit(1, cbs=SparsifyCallback(0.25, "filter", schedule=one_shot.over(0, 0)))
    for _ in range(10):
        for kind in KINDS.values():
            cbs = [kind(), Stop() if ends == "badly" else SaveModelCallback()]
            try:
                learn.fit(1, cbs=cbs)
            except KeyboardInterrupt:
                assert ends == "badly"
        del cbs
        sizes.append(live())
    objects, tensors, elements = zip(*sizes[1:], strict=True)
    assert len(set(tensors)) == 1 and len(set(elements)) == 1
    assert objects[-1] - objects[0] < 40  # less than one for each fit
