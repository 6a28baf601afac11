"""Two processes that train one network: what goes, goes in both."""

import warnings
from contextlib import redirect_stdout
from functools import partial
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
from learners import Items
from networks import Plain, Residual, make
from pair import Pair, backends, here
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fasterai.core import criteria
from fasterai.core.processes import Processes
from fasterai.core.schedule import lin
from fasterai.core.target import Target
from fasterai.coupling.inputs import run_quietly
from fasterai.prune.budget import UnreachableTarget
from fasterai.prune.callback import PruneCallback
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.keep import zero_masks
from fasterai.sparse.sparsifier import Sparsifier

pytest.importorskip("accelerate")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

STEPS = lin.over(0.0, 0.7, n_steps=4)


@pytest.fixture(scope="module", params=backends())
def both(tmp_path_factory, request):
    pair = Pair(tmp_path_factory.mktemp("pair"), request.param, __name__)
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
        DataLoaders(*loaders, device=here()),
        make(kind).to(here()),
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
        t = torch.tensor(t, device=here())
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
    _, shown = distributed(learn, 2, cb, watch, *more)
    assert ("sparsity" in shown) == (dist.get_rank() == 0) and bool(shown) == ("sparsity" in shown)
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
        learn.opt_func = opt_func
    learn.dls = DataLoaders(loader, loader, device=here())
    learn.remove_cb(learn.progress)
    learn.logger = list
    if rank is not None:
        learn.model = DistributedDataParallel(learn.model, **wrap)
    cb = PruneCallback(0.5, criteria=getattr(criteria, criterion), schedule=STEPS)
    learn.fit(3, cbs=cb)
    assert cb.history[-1][1] == 0.5
    return [p.detach() for p in learn.model.parameters()]


def half(wrap, opt_func, criterion="large_final"):
    return halves(wrap, opt_func, dist.get_rank(), criterion)


def counted(do):
    """The bytes that `do` sends by each of torch's functions, or the calls where none are known."""
    sent, kept = {}, {}

    def counting(name):
        def count(x, *args, **kwargs):
            size = x.nbytes if isinstance(x, torch.Tensor) else 1
            sent[name] = sent.get(name, 0) + size
            return kept[name](x, *args, **kwargs)

        return count

    for name in ("broadcast", "broadcast_object_list", "all_gather_object"):
        kept[name] = getattr(dist, name)
    try:
        for name in kept:
            setattr(dist, name, counting(name))
        do()
    finally:
        for name, func in kept.items():
            setattr(dist, name, func)
    return sent


def own_loop():
    """Gradients that are not averaged yet; what is sent at an update and at other steps."""
    model = DistributedDataParallel(make(Residual).to(here()))
    x, y = (t[dist.get_rank() :: 2].to(here()) for t in items(16).tensors)
    sparsifier = Sparsifier(model, "weight", "global", criteria.grad_crit, example_inputs=x)
    with model.no_sync():
        nn.functional.cross_entropy(model(x), y).backward()
    own = [p.grad.clone() for p in model.parameters()]
    at_update = counted(lambda: sparsifier.sparsify_model(0.4))
    else_ = counted(sparsifier.apply)
    masks = list(sparsifier.masks.values())
    return own, masks, at_update, else_, sum(m.nbytes for m in masks)


def untold(do, *args):
    """Without a word between the processes."""
    before, Processes.__bool__ = Processes.__bool__, lambda self: False
    try:
        return do(*args)
    finally:
        Processes.__bool__ = before


def failing(where, when):
    """What each process raises, where a criterion fails in one of them."""
    calls = []

    def criterion(weight):
        calls.append(1)
        if dist.get_rank() == where and (when == "start" or len(calls) > 6):
            raise KeyError("mine")
        return weight.abs()

    if when == "made":
        learn = learner()
        cb = SparsifyCallback(0.5, "filter", schedule=STEPS)
        cb._sparsifier_of_model = lambda: 1 / (dist.get_rank() != where)
    else:
        learn, cb = learner(), SparsifyCallback(0.5, "filter", criteria=criterion, schedule=STEPS)
    learn.remove_cb(learn.progress)
    learn.logger = list
    learn.model = DistributedDataParallel(learn.model)
    before = [p.detach().clone() for p in learn.model.parameters()]
    try:
        learn.fit(1, cbs=cb)
    except Exception as error:
        changed = not same(before, [p.detach() for p in learn.model.parameters()])
        return type(error).__name__, str(error), changed
    return "", "", True


def uneven_fit():
    learn = learner(64 if dist.get_rank() else 48)
    learn.remove_cb(learn.progress)
    learn.model = DistributedDataParallel(learn.model)
    try:
        learn.fit(1, cbs=SparsifyCallback(0.5, schedule=STEPS))
    except ValueError as error:
        return str(error)


def telling_fit():
    """A schedule that never fires, and a saver whose best model is none."""
    learn = learner()
    return distributed(learn, 1, PruneCallback(0.5, schedule=lin.over(9, 20)))


def saving_fit(folder, hold):
    learn = learner(path=folder)
    cb = PruneCallback(0.5, schedule=lin.over(0.4, 0.9, n_steps=3), hold_trackers=hold)
    if dist.get_rank():
        cb._why_useless = lambda saver: "" if not hold else "none"  # what this process would think
    saver = SaveModelCallback(fname=f"best{hold}", comp=lambda a, b: False)
    if hold:
        saver = SaveModelCallback(fname=f"best{hold}")
    else:  # the first epoch is the best, before the cuts
        order = iter(range(9))
        saver.comp = lambda a, b: next(order) == 0
    said, _ = distributed(learn, 3, cb, saver)
    return said, tensors(learn)[0]


def refused(hook):
    learn = learner()
    learn.remove_cb(learn.progress)
    learn.model = DistributedDataParallel(
        learn.model, process_group=None if hook else dist.new_group()
    )
    if hook:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        learn.model.register_comm_hook(None, allreduce_hook)
    before = tensors_of(learn.model)
    try:
        learn.fit(1, cbs=PruneCallback(0.5, schedule=STEPS))
    except ValueError as error:
        return str(error), same(before, tensors_of(learn.model))


def interrupted_fit():
    """Ctrl-C right after a cut; then the wrapped network trains on."""
    learn = learner()
    learn.remove_cb(learn.progress)
    learn.logger = list
    learn.model = DistributedDataParallel(learn.model)

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fasterai.prune.gradual.remaining", stop)
        learn.fit(1, cbs=PruneCallback(0.5, schedule=STEPS))
    learn.fit(1)
    return tensors(learn)


def unreachable_in_one():
    """A target that one process alone, which measures for itself, calls out of reach."""
    learn = learner()
    learn.remove_cb(learn.progress)
    learn.logger = list
    learn.model = DistributedDataParallel(learn.model)
    before = tensors_of(learn.model)

    def check(self, target, **_):
        if dist.get_rank():
            raise UnreachableTarget("too slow", 1.0)

    with pytest.MonkeyPatch.context() as patch, pytest.raises((RuntimeError, ValueError)) as said:
        patch.setattr(GradualPruner, "check", check)
        learn.fit(1, cbs=PruneCallback(Target(macs=0.5), schedule=STEPS))
    return str(said.value), same(before, tensors_of(learn.model))


def tensors_of(model):
    return [p.detach().clone() for p in model.parameters()]


def synced():
    """Units of a network whose batch norms talk to each other, found by one process alone."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make(Residual)).to(here())
    x = items(4).tensors[0].to(here())
    if dist.get_rank():
        return None
    with run_quietly(model, training=True):
        model(x)  # nobody answers
    pruner, before = Pruner(model, x), [dict(m.__dict__) for m in model.modules()]
    pruner.prune_model(0.5)
    left = all(m.__dict__.keys() == b.keys() for m, b in zip(model.modules(), before, strict=True))
    return left, pruner.axes().to_dict()


def sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x, said = make(Residual).to(here()), items(4).tensors[0].to(here()), []
    fully_shard(model, mesh=init_device_mesh(here().type, (2,)))
    before = [p.to_local().clone() for p in model.parameters()]
    for do in (
        lambda: Sparsifier(model, "weight", example_inputs=x),
        lambda: Sparsifier(model, "filter", example_inputs=x),
        lambda: Pruner(model, x),
        lambda: GradualPruner(model, x),
        lambda: zero_masks(model, x),
    ):
        try:
            do()
        except ValueError as error:
            said.append(str(error))
    return said, same(before, [p.to_local() for p in model.parameters()])


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
    assert len(zeros) == 8 and 0.48 < history[-1][1] <= 0.5 and len(history) > 1
    counts = [int(z.sum()) for z in zeros]
    assert counts == sorted(counts) and counts[-1] > 0


@pytest.mark.parametrize(
    ("opt_func", "criterion", "context", "accumulate"),
    [
        (partial(SGD, mom=0.9), "random_scores", "local", 0),
        (Adam, "large_final", "global", 0),
        (Adam, "grad_crit", "local", 16),
    ],
)
def test_the_same_cuts_in_both(both, opt_func, criterion, context, accumulate):
    first, second = both(pruning_fit, opt_func, criterion, context, accumulate=accumulate)
    assert same(first, second)
    shapes, history, (weights, state), inside, _ = first
    assert len(set(map(str, shapes))) > 3 and history[-1][1] == 0.5
    assert len(state) >= len(weights) and inside == [len(weights)]


@pytest.mark.parametrize("n", [61, 50])
def test_last_batches_that_are_smaller(both, n):
    first, second = both(sparse_fit, "weight", "local", "random_scores", n=n)
    assert same(first, second) and first[1][-1][1] == 0.5
    first, second = both(pruning_fit, SGD, "large_final", n=n)
    assert same(first, second) and first[1][-1][1] == 0.5


WRAPS = [
    {},
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


def test_an_update_sends_a_byte_a_weight_and_other_steps_nothing(both):
    first, second = both(own_loop)
    own, masks, at_update, otherwise, size = first
    assert not same(own, second[0]) and same(masks, second[1])  # gradients differ, masks do not
    assert at_update == {"broadcast": size, "broadcast_object_list": 1} and not otherwise


def test_without_a_word_the_masks_would_differ(both):
    first, second = both(untold, own_loop)
    assert not same(first[1], second[1]) and not first[2]


@pytest.mark.parametrize("where", [0, 1])
def test_what_fails_in_one_process_fails_in_both(both, where):
    results = both(failing, where, "made")
    assert results[where][0] == "ZeroDivisionError" and not results[where][2]
    kind, text, changed = results[1 - where]
    assert kind == "RuntimeError" and f"process {where} failed: ZeroDivisionError" in text
    assert not changed


def test_a_criterion_that_fails_in_the_first_process_fails_in_both(both):
    (first, text, _), (second, told, _) = both(failing, 0, "later")
    assert first == "ValueError" and "KeyError: 'mine'" in text
    assert second == "RuntimeError" and "the first process failed: ValueError: criterion" in told


def test_unequal_numbers_of_batches_are_refused_in_both(both):
    first, second = both(uneven_fit)
    assert first == second and "(1, 6) in process 0, (1, 8) in process 1" in first


def test_only_the_first_process_reports(both):
    (said, shown), (silent, nothing) = both(telling_fit)
    assert any("never fires" in text for text in said) and "parameters" in shown
    assert not silent and not nothing


@pytest.mark.parametrize("hold", [True, False])
def test_savers_load_the_same_in_both_or_nothing(both, tmp_path, hold):
    (said, first), (silent, second) = both(saving_fit, tmp_path, hold)
    assert same(first, second) and not silent
    assert hold == (not any("was saved before a cut" in text for text in said))


@pytest.mark.parametrize("hook", [True, False])
def test_what_cannot_follow_a_cut_is_refused(both, hook):
    for text, untouched in both(refused, hook):
        assert ("communication hook" if hook else "process group of its own") in text and untouched


def test_an_interrupt_after_a_cut_leaves_the_wrapper_usable(both):
    first, second = both(interrupted_fit)
    assert same(first, second)
    assert first[0][0].shape[0] < make(Residual).stem.weight.shape[0]


def test_a_target_out_of_reach_in_one_process_is_so_in_both(both):
    for text, untouched in both(unreachable_in_one):
        assert "too slow" in text and untouched


def test_norms_that_talk_are_traced_without_a_word(both):
    fine, axes = both(synced)[0]
    plain = Pruner(make(Residual), items(4).tensors[0])
    plain.prune_model(0.5)
    assert fine and str(axes) == str(plain.axes().to_dict())


def test_sharded_parameters_are_refused_by_name(both):
    for said, untouched in both(sharded):
        assert len(said) == 5 and untouched
        assert all("'stem.weight' is a DTensor" in text for text in said)
