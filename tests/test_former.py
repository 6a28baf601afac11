"""Calls of former versions are refused with what to write instead."""

import ast
import inspect
import re

import pytest
import torch
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn

import fasterai.all
from fasterai.core.criteria import large_final
from fasterai.core.former import FORMER, explain_former
from fasterai.core.schedule import Schedule, agp
from fasterai.deploy.files import load_pruned
from fasterai.deploy.sparse_files import load_sparse
from fasterai.measure.profile import macs, profile
from fasterai.prune.callback import PruneCallback
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.optimizer import carry_optimizer
from fasterai.prune.pruner import Pruner
from fasterai.prune.search import particle_search
from fasterai.report.page import report
from fasterai.report.sweep import sweep
from fasterai.sparse.callback import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.tickets.callback import LotteryTicket
from fasterai.tickets.ticket import Ticket


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))


X = torch.randn(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Sparsifier(m, "weight", layer_type=nn.Conv2d), "'layer_type'.*layers=nn.Conv2d"),
        (lambda m: Sparsifier(m, "weight", "local", large_final, False), "by name it takes layers"),
        (lambda m: Sparsifier(m, nm=True), "Sparsifier takes no argument 'nm'.*'2:4'"),
        (lambda m: Sparsifier(m).sparsify_model(0.5, round_to=8), "Sparsifier.*round_to=8"),
        (lambda m: Sparsifier(m).sparsify_model(0.5, 8), "takes sparsity by position, got 2"),
        (lambda m: SparsifyCallback(end_sparsity=50), "'end_sparsity': pass sparsity=0.4"),
        (lambda m: SparsifyCallback(0.5, start_epoch=2), r"agp\.over"),
        (lambda m: SparsifyCallback(0.5, model=m), "'model': it is learn.model"),
        (lambda m: SparsifyCallback(0.5, lth=True), r"'lth'.*LotteryTicket\(learn, 0.5"),
        (lambda m: Pruner(m, pruning_ratio=0.4), r"'pruning_ratio'.*prune_model\(0.4\)"),
        (lambda m: Pruner(m, 0.4, "local", large_final), "by position, got 4.*go to prune_model"),
        (
            lambda m: Pruner(m, X).prune_model(0.5, "global"),
            "prune_model takes sparsity by position",
        ),
        (lambda m: Pruner(m, X, round_to=8), r"Pruner.*prune_model\(0.4, round_to=8\)"),
        (lambda m: Pruner(m, X, schedule=agp), r"'schedule'.*PruneCallback\(0.4, schedule=agp\)"),
        (
            lambda m: Pruner(m, X).plan_for(0.5, schedule=agp),
            r"plan_for takes no argument 'schedule'.*GradualPruner\(model, x\)\.prune_to",
        ),
        (lambda m: PruneCallback(0.5, layers="0"), r"PruneCallback.*'layers'.*exclude=\['head'\]"),
        (lambda m: PruneCallback(0.5, granularity="weight"), "'granularity': whole channels go"),
        (lambda m: Schedule(sched_func=abs), r"'sched_func'.*Schedule\(func\)"),
        (lambda m: Schedule(abs, start_pct=0.2), "Schedule takes no argument 'start_pct'.*over"),
        (lambda m: Pruner(m, X, ignored_layers=[m[0]]), "'ignored_layers': pass exclude"),
    ],
)
def test_former_calls_say_what_to_write(call, message):
    model = net()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=message):
        call(model)
    assert all(map(torch.equal, before, model.parameters()))


def test_layers_go_by_name():
    model = net()
    with pytest.raises(ValueError, match="by names of layers, got Conv2d"):
        Sparsifier(model).sparsify_model({model[0]: 0.5})
    with pytest.raises(ValueError, match="no layer 'conv'"):
        Pruner(model, X).prune_model({"conv": 0.5})


@pytest.mark.parametrize("name", sorted(FORMER))
def test_an_argument_that_is_taken_is_no_former_one(name):
    space = {}
    exec(f"def taking({name}=0):\n    return {name}", space)
    assert explain_former()(space["taking"])(**{name: 3}) == 3
    with pytest.raises(TypeError, match=f"no argument '{name}'"):
        explain_former()(lambda self: None)(None, **{name: 3})


def calls_in(text):
    """The calls that a text shows, as Python reads them."""
    for match in re.finditer(r"[A-Za-z_]\w*\(", text):
        end, open_ = match.end(), 1
        while open_:
            open_ += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        yield ast.parse(text[match.start() : end], mode="eval").body


@pytest.mark.parametrize("name", sorted(FORMER))
def test_what_a_message_calls_exists_and_takes_these_arguments(name):
    owners = fasterai.all, Pruner, GradualPruner, LotteryTicket, Ticket, Schedule
    for call in calls_in(FORMER[name]):
        takes = [getattr(owner, call.func.id, None) for owner in owners]
        signatures = [inspect.signature(f) for f in takes if f is not None]
        given = [None] * len(call.args), {k.arg: None for k in call.keywords}
        assert signatures, f"there is no {call.func.id}"
        assert any(binds(each, *given) for each in signatures), ast.unparse(call)


def binds(signature, args, kwargs):
    try:
        signature.bind_partial(*args, **kwargs)
    except TypeError:
        return False
    return True


def test_other_mistakes_and_signatures_are_as_python_has_them():
    with pytest.raises(TypeError, match="unexpected keyword argument 'granularty'"):
        SparsifyCallback(0.5, granularty="filter")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'sparsity'"):
        SparsifyCallback()
    names = ["sparsity", "granularity", "context", "criteria", "schedule"]
    assert list(inspect.signature(SparsifyCallback).parameters)[:5] == names


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda learn: macs(learn, X), "got Learner; pass learn.model"),
        (lambda learn: profile(learn, X), "got Learner; pass learn.model"),
        (lambda learn: Pruner(learn, X), "got Learner; pass learn.model"),
        (lambda learn: LotteryTicket(learn.model, 0.5), "takes a fastai Learner, got Sequential"),
        (lambda learn: particle_search(learn.model, [], 0.5, loss_func=abs), "takes a Pruner"),
        (lambda learn: carry_optimizer(learn.opt, Pruner(learn.model, X).plan), "plan is None"),
        (lambda learn: report("a.html", networks=learn.model, example_inputs=X), "go by name"),
        (lambda learn: load_sparse(learn.model, "a"), "the file comes first"),
        (lambda learn: load_pruned("a", learn.model), "the model comes first"),
        (
            lambda learn: sweep(learn, [SparsifyCallback(0.5)], 1),
            r"lambda: SparsifyC\w+\(...\)",
        ),
    ],
)
def test_one_thing_for_another(call, message):
    learn = Learner(None, net(), nn.CrossEntropyLoss(), opt_func=SGD)
    learn.create_opt()
    with pytest.raises(TypeError, match=message):
        call(learn)


def test_tickets_want_fractions():
    with pytest.raises(ValueError, match="fraction"):
        LotteryTicket(Learner(None, net(), nn.CrossEntropyLoss()), 50)


def test_a_page_in_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere for a.html"):
        report(tmp_path / "nowhere" / "a.html", networks={"a": net()}, example_inputs=X)
