"""Training a pretrained CIFAR network on: one budget for all arms of a comparison."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from cifar import Augment, cifar, loaders, pretrained
from fastai.callback.core import Callback, CancelValidException
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from torch import nn


def quick_type() -> torch.dtype:
    """bfloat16 on CPUs that multiply it; others take ten times as long for it as for float32."""
    can = torch.cpu.get_capabilities()
    quick = any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if quick else torch.float32


class QuickConvs(Callback):
    """The type and the layout that the CPU's convs are quick with."""

    order = 10

    def before_batch(self):
        self.learn.xb = tuple(x.contiguous(memory_format=torch.channels_last) for x in self.xb)
        dtype = quick_type()
        self.cast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        self.cast.__enter__()

    def after_loss(self):
        self.cast.__exit__(None, None, None)


class TestAtTheEnd(Callback):
    """No validation but that of the last epoch."""

    def before_validate(self):
        if self.epoch < self.n_epoch - 1:
            raise CancelValidException


def learner(depth: int, data: Path, images: int, batch: int, seed: int) -> Learner:
    """A pretrained ResNet, SGD with momentum, flips and shifts."""
    torch.manual_seed(seed)
    dls = loaders(cifar(data / "cifar10", images), batch)
    model = pretrained(depth, data / "weights").to(memory_format=torch.channels_last)
    how = dict(metrics=accuracy, opt_func=SGD, wd=5e-4, moms=(0.9,) * 3)
    learn = Learner(dls, model, nn.CrossEntropyLoss(), **how)
    learn.add_cbs([Augment(), QuickConvs(), TestAtTheEnd()])
    learn.logger = lambda _: None
    return learn


def tune(learn: Learner, epochs: int, lr: float, cbs=(), *, flat=False) -> float:
    """Train by one cycle, or at a flat rate; returns the accuracy on the test images."""
    from fastai.callback import schedule  # noqa: F401  (patches Learner)

    with learn.no_bar(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if flat:
            learn.fit_flat_cos(epochs, lr, cbs=list(cbs))
        else:
            learn.fit_one_cycle(epochs, lr, pct_start=0.1, cbs=list(cbs))
    column = list(learn.recorder.metric_names).index("accuracy") - 1  # values have no epoch
    return learn.recorder.values[-1][column]
