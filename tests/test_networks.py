"""Networks that we did not write: zero half, remove it, compare, train on."""

import copy

import pytest
import torch
import torchvision
from fastai.vision.models.xresnet import xresnet18, xresnet50
from networks import apart, shake

from fasterai.coupling.couple import couple
from fasterai.coupling.inputs import Inputs
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier

tv = torchvision.models
SHORT = [tv.resnet18, tv.mobilenet_v2, tv.densenet121, xresnet18]
LONG = [tv.resnet50, tv.vgg16, tv.vgg16_bn, xresnet50, tv.squeezenet1_0, tv.efficientnet_b0]
LONG += [tv.mobilenet_v3_large, tv.mnasnet1_0, tv.googlenet, tv.inception_v3, tv.alexnet]
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}
CASES = [*SHORT, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)]


def build(kind, dtype):
    torch.manual_seed(0)
    known = {"weights": None} if kind.__module__.startswith("torchvision") else {}
    if kind in (tv.googlenet, tv.inception_v3):
        known["init_weights"] = False
    return shake(kind(num_classes=20, **known) if known else kind(n_out=20)).to(dtype).eval()


def images(kind, n, dtype, seed=0):
    size = 96 if kind is not tv.inception_v3 else 299
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, dtype=dtype, generator=generator)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("kind", CASES)
def test_half_of_every_free_axis_is_zeroed_and_removed(kind, dtype):
    model = build(kind, dtype)
    x = images(kind, 2, dtype)
    axes = couple(model, Inputs.of(x)).axes
    expected = [a.size - round(0.5 * len(a.free)) for a in axes]
    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    sparse, keys = copy.deepcopy(model), list(model.state_dict())
    pruner = Pruner(model, x)
    pruner.prune_model()
    assert [a.after for a in pruner.plan.axes] == expected
    assert len(pruner.kept()) == 0
    other = images(kind, 2, dtype, seed=1)
    with torch.no_grad():
        assert apart(sparse(other), model(other)) < BOUND[dtype]
    assert list(model.state_dict()) == keys
    out = model.train()(images(kind, 3, dtype, seed=2))
    sum(o.square().mean() for o in (out if isinstance(out, tuple) else [out])).backward()
    assert all(p.grad is not None for p in model.parameters())
