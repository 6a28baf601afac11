"""Learners on small data, and callbacks that watch their fits, fail in them or cut."""

import copy
import random

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import minimum  # noqa: F401  (patches Learner with fit_one_cycle, lr_find)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.metrics import accuracy
from networks import Residual, make
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.core.criteria import large_final
from fasterai.core.schedule import one_shot
from fasterai.fit.callback import ScheduledCallback
from fasterai.fit.stand_in import StandIn
from fasterai.prune.pruner import Pruner


class Items(TensorDataset):
    def new_empty(self):
        return Items(*(t[:0] for t in self.tensors))


def data(n=64, bs=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long() + 2 * (x[:, 0].mean((1, 2)) > 0).long()
    items = Items(x, y)
    train = DataLoader(items, bs=bs, shuffle=True, num_workers=0)
    return DataLoaders(train, DataLoader(items, bs=32, num_workers=0), device="cpu")


def learner(model=None, **kwargs):
    torch.manual_seed(0)
    random.seed(0)  # fastai's DataLoader shuffles by it
    loss = nn.CrossEntropyLoss()
    learn = Learner(
        data(),
        make(Residual) if model is None else model,
        loss,
        metrics=accuracy,
        lr=1e-2,
        **kwargs,
    )
    learn.remove_cb(learn.progress)
    learn.logger = lambda _: None
    return learn


def left_behind(learn):
    """What of ours is still on a learner, its model or its optimizer."""
    places = (learn, learn.model, learn.opt)
    own = [
        k for x in places for k, v in getattr(x, "__dict__", {}).items() if isinstance(v, StandIn)
    ]
    hooks = [m for m in learn.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    named = [cb for cb in learn.cbs if type(cb).__module__.startswith("fasterai")]
    return [*own, *hooks, *named]


def weights_at_zero(learn):
    """Over all layers but the output layer."""
    model = learn.model
    return sum(int((m.weight == 0).sum()) for m in (model.stem, model.c1, model.c2, model.c3))


def filters_at_zero(layer):
    return int((layer.weight.flatten(1) == 0).all(1).sum())


class Count(Callback):
    """How many weights are zero after each step, before an update."""

    order = 99

    def before_fit(self):
        self.zeros = []

    def after_step(self):
        self.zeros.append(weights_at_zero(self.learn))


class Watch(Callback):
    """After every step: what is zero is +0.0, and how many filters that is."""

    order = 99

    def __init__(self, layer="c1", norm="bn1"):
        self.layer, self.norm, self.seen, self.inside = layer, norm, [], True

    def after_batch(self):
        if self.training:
            layer = self.learn.model.get_submodule(self.layer)
            norm = self.learn.model.get_submodule(self.norm)
            zero = (layer.weight.flatten(1) == 0).all(1)
            quiet = [layer.weight[zero], norm.weight[zero], norm.bias[zero]]
            self.inside &= not any(q.count_nonzero() or q.signbit().any() for q in quiet)
            self.seen.append(int(zero.sum()))


class Gradients(Callback):
    """Keeps the gradients right before the optimizer's step, after all callbacks."""

    order = 99

    def before_fit(self):
        self.seen, self.weights = [], []

    def before_step(self):
        self.weights.append(copy.deepcopy(self.learn.model.state_dict()))
        named = self.learn.model.named_parameters()
        self.seen.append({k: p.grad.clone() for k, p in named if p.grad is not None})


class Fail(Callback):
    order = -90

    def __init__(self, error, event, at):
        self.error, self.event, self.at = error, event, at

    def before_step(self):
        if self.event == "before_step" and self.at(self):
            raise self.error

    def after_batch(self):
        if self.event == "after_batch" and self.training and self.at(self):
            raise self.error


LATE = one_shot.over(20, 20)  # in the third of four epochs of 8 steps


class Cuts(ScheduledCallback):
    """Stands in for a callback that makes the network smaller."""

    columns, reshapes = ("left",), True

    def __init__(self, hold_trackers=True, schedule=LATE):
        super().__init__(large_final, schedule, hold_trackers)
        self.now = 0.0

    def begin(self):
        return True

    def go(self, share, before):
        pruner = Pruner(self.learn.model, self.xb[0])
        pruner.prune_model(0.5)
        self.learn.create_opt()
        self.now = share

    def reached(self):
        return self.now
