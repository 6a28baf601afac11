"""Two processes that train one network: what goes, goes in both."""

import warnings
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam
from networks import Plain, Residual, make
from pair import Pair
from test_callback import Items
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fasterai.core import criteria
from fasterai.core.processes import Processes
from fasterai.core.schedule import lin
from fasterai.prune.callback import PruneCallback
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier

pytest.importorskip("accelerate")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

STEPS = lin.over(0.0, 0.7, n_steps=4)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


# --- what the processes do -----------------------------------------------------------------------


def items(n):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    return Items(x, (x.mean((1, 2, 3)) > 0).long())


def learner(n=64, bs=8, kind=Residual, opt_func=Adam, path=None, shuffle=True):
    loaders = [DataLoader(items(n), bs=bs, shuffle=s, num_workers=0) for s in (shuffle, False)]
    learn = Learner(
        DataLoaders(*loaders, device="cpu"),
        make(kind),
        nn.CrossEntropyLoss(),
        lr=1e-2,
        opt_func=opt_func,
        path=path,
    )
    torch.manual_seed(dist.get_rank())  # chance is another one in each process
    return learn


def distributed(learn, epochs, *cbs):
    """A fit inside of `distrib_ctx`; returns warnings and what is printed."""
    from fastai.distributed import DistributedDL

    def broadcast(self, t, rank):  # fastai's own asks for a GPU
        t = torch.tensor(t)
        dist.broadcast(t, rank)
        return t.tolist()

    DistributedDL._broadcast = broadcast
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(StringIO()) as shown:
        warnings.simplefilter("always")
        with learn.distrib_ctx(sync_bn=False):
            learn.fit(epochs, cbs=list(cbs))
    assert not isinstance(learn.model, DistributedDataParallel)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)], shown.getvalue()


class Watch(Callback):
    """What is zero, and the sizes, after each training batch."""

    order = 99

    def __init__(self):
        self.zeros, self.shapes, self.wrapped = [], [], set()

    def after_batch(self):
        if self.training:
            self.wrapped.add(type(self.learn.model).__name__)
            weights = [p.detach() for p in self.learn.model.parameters() if p.ndim > 1]
            self.zeros.append(torch.cat([(w == 0).flatten() for w in weights]))
            self.shapes.append([tuple(w.shape) for w in weights])


def tensors(learn):
    state = [x for p in learn.model.parameters() for x in learn.opt.state[p].values()]
    state = [x.clone() for x in state if isinstance(x, torch.Tensor)]
    return [p.detach().clone() for p in learn.model.parameters()], state


def sparse_fit(granularity, context, criterion, n=64, accumulate=0):
    learn, watch = learner(n), Watch()
    cb = SparsifyCallback(0.5, granularity, context, getattr(criteria, criterion), STEPS)
    more = [GradientAccumulation(accumulate)] if accumulate else []
    distributed(learn, 2, cb, watch, *more)
    assert watch.wrapped == {"DistributedDataParallel"}
    return watch.zeros, cb.history, cb.report()["zeros"].fillna(0).tolist(), tensors(learn)


def pruning_fit(opt_func, criterion, context="local", n=64, accumulate=0, **kwargs):
    learn, watch = learner(n, opt_func=opt_func), Watch()
    cb = PruneCallback(0.5, context, getattr(criteria, criterion), STEPS, **kwargs)
    more = [GradientAccumulation(accumulate)] if accumulate else []
    distributed(learn, 3, cb, watch, *more)
    inside = [len(p) for p in learn.opt.param_lists]
    return watch.shapes, cb.history, tensors(learn), inside, cb.plan.to_json()


def halves(wrap, opt_func, rank=None, criterion="large_final"):
    """A fit on halves of the batches, or on all of them; the weights and widths afterwards."""
    learn = learner(64, kind=Plain, opt_func=opt_func) if rank is not None else None
    x, y = items(64).tensors
    if rank is not None:
        own = [i for i in range(64) if i // 4 % 2 == rank]
        loader = DataLoader(Items(x[own], y[own]), bs=4, num_workers=0)
    else:
        loader = DataLoader(Items(x, y), bs=8, num_workers=0)
        learn = Learner(DataLoaders(loader, loader), make(Plain), nn.CrossEntropyLoss(), lr=1e-2)
        learn.opt_func, learn.logger = opt_func, list
    learn.dls = DataLoaders(loader, loader, device="cpu")
    learn.remove_cb(learn.progress)
    if rank is not None:
        learn.model = DistributedDataParallel(learn.model, **wrap)
    cb = PruneCallback(0.5, criteria=getattr(criteria, criterion), schedule=STEPS)
    learn.fit(3, cbs=cb)
    assert cb.history[-1] == (17, 0.5) or cb.history[-1][1] == 0.5
    return [p.detach() for p in learn.model.parameters()]


def half(wrap, opt_func, criterion="large_final"):
    return halves(wrap, opt_func, dist.get_rank(), criterion)


# --- tests ---------------------------------------------------------------------------------------


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize(
    ("granularity", "context", "criterion", "accumulate"),
    [
        ("weight", "local", "large_final", 0),
        ("weight", "global", "random_scores", 0),
        ("filter", "local", "random_scores", 0),
        ("filter", "global", "movement", 0),
        ("kernel", "local", "grad_crit", 16),
        ("2:4", "local", "random_scores", 0),
    ],
)
def test_the_same_zeros_in_both(both, granularity, context, criterion, accumulate):
    first, second = both(sparse_fit, granularity, context, criterion, accumulate=accumulate)
    assert same(first, second)
    zeros, history, table, _ = first
    assert len(zeros) == 8 and history[-1][1] == 0.5 and len(history) == 5
    counts = [int(z.sum()) for z in zeros]
    assert counts == sorted(counts) and counts[-1] > 0


@pytest.mark.parametrize(
    ("opt_func", "criterion", "context", "accumulate"),
    [
        (SGD, "random_scores", "local", 0),
        (Adam, "large_final", "global", 0),
        (Adam, "grad_crit", "local", 16),
    ],
)
def test_the_same_cuts_in_both(both, opt_func, criterion, context, accumulate):
    first, second = both(pruning_fit, opt_func, criterion, context, accumulate=accumulate)
    assert same(first, second)
    shapes, history, (weights, state), inside, _ = first
    assert len(set(map(str, shapes))) == 5 and history[-1][1] == 0.5
    assert len(state) >= len(weights) and inside == [len(weights)]


@pytest.mark.parametrize("n", [61, 50])
def test_last_batches_that_are_smaller(both, n):
    first, second = both(sparse_fit, "weight", "local", "random_scores", n=n)
    assert same(first, second) and first[1][-1][1] == 0.5
    first, second = both(pruning_fit, SGD, "large_final", n=n)
    assert same(first, second) and first[1][-1][1] == 0.5


WRAPS = [
    {},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"bucket_cap_mb": 0.001},
]


@pytest.mark.parametrize("wrap", WRAPS, ids=str)
@pytest.mark.parametrize("criterion", ["large_final", "grad_crit"])
def test_halves_of_the_batches_train_as_the_whole_does(both, wrap, criterion):
    first, second = both(half, wrap, Adam, criterion)
    assert same(first, second)
    whole = halves({}, Adam, criterion=criterion)
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(first, whole, strict=True))
