"""An optimizer that is carried over a cut goes on as if the removed units were held at zero."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from fastai.learner import Learner
from fastai.optimizer import (
    SGD,
    Adam,
    Lamb,
    Larc,
    Lookahead,
    OptimWrapper,
    QHAdam,
    RAdam,
    RMSProp,
    ranger,
)
from networks import Depthwise, Gated, Mlp, Plain, Residual, conv, images, make
from torch import nn, optim

from fasterai.prune.optimizer import carry_optimizer
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier


def lookahead(params, **kwargs):
    return Lookahead(Adam(params, **kwargs), k=3)


def wrapped(kind, params, **kwargs):
    return OptimWrapper(params, kind, **kwargs)


FASTAI = {
    "SGD": partial(SGD, mom=0.9, wd=0.1),
    "SGD, L2": partial(SGD, mom=0.9, wd=0.1, decouple_wd=False),
    "Adam": Adam,
    "RAdam": RAdam,
    "QHAdam": QHAdam,
    "Lamb": partial(Lamb, wd=0.01),
    "Larc": Larc,
    "LARS": partial(Larc, clip=False),
    "RMSProp": partial(RMSProp, mom=0.9),
    "Lookahead": lookahead,
    "ranger": partial(ranger, k=4),
    "OptimWrapper": partial(wrapped, optim.AdamW),
}
TORCH = {
    "SGD": partial(optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": partial(optim.Adam, amsgrad=True),
    "AdamW, foreach": partial(optim.AdamW, foreach=True),
    "AdamW, fused": partial(optim.AdamW, fused=True),
    "SGD, fused": partial(optim.SGD, momentum=0.9, fused=True),
    "Adagrad, fused": partial(optim.Adagrad, fused=True),
    "RMSprop": partial(optim.RMSprop, centered=True, momentum=0.9),
    "Adagrad": optim.Adagrad,
    "Adadelta": partial(optim.Adadelta, foreach=True),
    "Adamax": optim.Adamax,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "ASGD": partial(optim.ASGD, t0=2),
    "Rprop": optim.Rprop,
}
KINDS = {f"fastai's {k}": v for k, v in FASTAI.items()} | {
    f"torch's {k}": v for k, v in TORCH.items()
}


class Attention(nn.Module):
    """Four heads; the code divides by the root of their width, whatever it is."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(16, 32)
        self.out = nn.Linear(32, 5)

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (4, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def loss_of(out):
    out = list(out.values()) if isinstance(out, dict) else [out]
    return sum((o.square() + o.sin()).mean() for o in out)


def step(model, optimizer, seed, hold=lambda: None):
    dtype = next(model.parameters()).dtype
    loss_of(model(images(6, dtype=dtype, seed=seed))).backward()
    hold()
    optimizer.step()
    optimizer.zero_grad()
    hold()


def copied(model, optimizer):
    """Copies of both that belong together."""
    return copy.deepcopy((model, optimizer))


def positions(plan, model):
    """For each parameter that is cut, what is removed: a bool tensor of its shape."""
    lost = {}
    for name, p in model.named_parameters():
        keep = torch.ones_like(p, dtype=torch.bool)
        for d, index in plan.kept.get(name, {}).items():
            gone = torch.ones(p.shape[d], dtype=torch.bool)
            gone[list(index)] = False
            keep.index_fill_(d, gone.nonzero().flatten(), False)
        lost[name] = ~keep
    return lost


def zeroed(model, optimizer, lost):
    """Zero weights, gradients and state there: the full-size network without these units."""

    def hold():
        slow = getattr(optimizer, "__dict__", {}).get("slow_weights")
        for i, (name, p) in enumerate(model.named_parameters()):
            mark = lost[name]
            p.data[mark] = 0
            if p.grad is not None:
                p.grad[mark] = 0
            if slow is not None:
                slow[0][i][mark] = 0
            inside = optimizer
            while inside is not None:
                own = getattr(inside, "__dict__", {})
                for value in own.get("state", {}).get(p, {}).values():
                    if isinstance(value, torch.Tensor) and value.shape == p.shape:
                        value[mark] = 0
                inside = own.get("opt")

    return hold


def rounding(model, x):
    """Biases before batch norms: their gradients are what rounding leaves of 0."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = model(x).square().sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    largest = {
        k: 1.0 if g is None else float(g.abs().max()) for k, g in zip(names, found, strict=True)
    }
    return {k for k, size in largest.items() if size < 1e-10 and k.endswith("bias")}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("network", [Residual, Plain])
def test_the_next_steps_are_those_of_the_full_network(network, name):
    model = make(network, torch.float64).train()
    before_norms = rounding(model, images(dtype=torch.float64))
    optimizer = KINDS[name](list(model.parameters()), lr=1e-2)
    for seed in range(7):
        step(model, optimizer, seed)
    full, other = copied(model, optimizer)
    pruner = Pruner(model, images(dtype=torch.float64))
    pruner.prune_model(0.4, optimizer=optimizer)
    assert pruner.plan.removed > 4
    lost = positions(pruner.plan, full)
    hold = zeroed(full, other, lost)
    hold()
    for seed in range(7, 14):
        before = [p.detach().clone() for p in model.parameters()]
        step(model, optimizer, seed)
        step(full, other, seed, hold)
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        large = dict(full.named_parameters())
        for key, p in model.named_parameters():
            left = large[key].detach()[~lost[key]].view(p.shape)
            if key not in before_norms:
                assert torch.allclose(p, left, rtol=1e-9, atol=1e-11), (key, seed)


@pytest.mark.parametrize("kind", [Residual, Depthwise, Gated, Mlp])
def test_removing_zeros_and_training_on_without_a_break(kind):
    """Nobody holds anything but the sparsifier's zeros, momentum of dead units included."""
    model = make(kind, torch.float64).train()
    optimizer = optim.AdamW(model.parameters(), 1e-2)
    sparsifier = Sparsifier(model, "filter", example_inputs=images(dtype=torch.float64))
    for seed in range(4):
        step(model, optimizer, seed)
        sparsifier.sparsify_model(0.1 * (seed + 1))
    full, other = copied(model, optimizer)
    keeper = Sparsifier(full, "filter", example_inputs=images(dtype=torch.float64))
    pruner = Pruner(model, images(dtype=torch.float64))
    pruner.prune_model(optimizer=optimizer)
    assert pruner.plan.removed
    for seed in range(4, 9):
        step(model, optimizer, seed)
        step(full, other, seed)
        keeper.apply()
        x = images(3, dtype=torch.float64, seed=seed)
        a, b = copy.deepcopy(full).eval()(x), copy.deepcopy(model).eval()(x)
        assert (a - b).abs().max() < 1e-9 * a.abs().max()


def test_attention_rows_that_are_multiplied_have_averages_of_their_new_gradients():
    torch.manual_seed(0)
    model = Attention().double().train()
    x = torch.randn(4, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = Adam(list(model.parameters()), lr=1e-3, mom=0.8)

    def one(model, optimizer, seed):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
        loss_of(model(x + noise)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(4):
        one(model, optimizer, seed)
    full, other = copied(model, optimizer)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    pruner = Pruner(model, x)
    pruner.prune_model(0.5, optimizer=optimizer)
    lost = positions(pruner.plan, full)
    hold = zeroed(full, other, lost)
    factors = {}
    for key, p in model.named_parameters():
        old = before[key][~lost[key]].view(p.shape)
        factors[key] = torch.where(old != 0, p.detach() / old, 1.0)
    assert any((f - 1).abs().max() > 0.1 for f in factors.values())  # rows were multiplied
    hold()
    optimizer.set_hypers(lr=0.0), other.set_hypers(lr=0.0)  # averages move, weights stay
    assert (model(x) - full(x)).abs().max() < 1e-9  # so that gradients can be compared
    one(model, optimizer, 9)
    one(full, other, 9)
    large = dict(full.named_parameters())
    for key, p in model.named_parameters():
        mine, its = optimizer.state[p], other.state[large[key]]
        for what, power in (("grad_avg", 1), ("sqr_avg", 2)):
            expected = its[what][~lost[key]].view(p.shape) / factors[key] ** power
            assert torch.allclose(mine[what], expected, rtol=1e-7, atol=1e-14), (key, what)


@pytest.mark.parametrize("late", [False, True])
def test_weights_that_an_optimizer_keeps_take_up_constants_as_the_network_does(late):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 1))
    nn.init.uniform_(model[1].bias, 0.5, 1.0)
    with torch.no_grad():
        model[0].weight[2:5], model[0].bias[2:5] = 0, 0  # each arrives as a constant
    optimizer = lookahead(list(model.parameters()), lr=1e-2)
    optimizer._copy_weights()
    average = optim.ASGD(model.parameters())
    for p in model.parameters():
        average.state[p] = {"ax": p.detach().clone(), "step": torch.tensor(1.0)}
    before = model[4].bias.item()
    loss_of(model(images(4, 8))).backward()
    pruner = Pruner(model, images(4, 8))
    if late:
        pruner.prune_model()
        carry_optimizer(optimizer, pruner.plan)
        carry_optimizer(optimizer, pruner.plan)  # nothing is added twice
    else:
        pruner.prune_model(optimizer=optimizer)
        assert all(p.grad.shape == p.shape for p in model.parameters())
    carry_optimizer(average, pruner.plan)
    assert pruner.plan.removed == 3 and abs(model[4].bias.item() - before) > 1e-3
    for p, slow in zip(model.parameters(), optimizer.slow_weights[0], strict=True):
        assert torch.equal(p, slow) and torch.equal(p, average.state[p]["ax"])


@pytest.mark.parametrize("late", [False, True])
def test_marks_groups_hypers_and_counts_stay(late):
    def splitter(m):
        body = [m.stem, m.bn0, m.c1, m.bn1, m.c2, m.bn2, m.c3, m.bn3]
        return [[p for layer in body for p in layer.parameters()], list(m.head.parameters())]

    model = make(Residual)
    learn = Learner([], model, nn.MSELoss(), splitter=splitter, lr=slice(1e-4, 1e-2))
    learn.create_opt()
    learn.opt.set_hypers(lr=[1e-4, 1e-2], wd=[0.1, 0.2])
    for seed in range(3):
        step(model.train(), learn.opt, seed)
    learn.opt.freeze()  # learn.freeze() would clear the state
    kept = lambda: [  # noqa: E731
        {k: v for k, v in learn.opt.state[p].items() if not isinstance(v, torch.Tensor)}
        for p in model.parameters()
    ]
    before, hypers = kept(), copy.deepcopy(list(learn.opt.hypers))
    trains = [p.requires_grad for p in model.parameters()]
    ids = [[id(p) for p in group] for group in learn.opt.param_lists]
    pruner = Pruner(model, images())
    if late:
        pruner.prune_model(0.5)
        assert carry_optimizer(learn.opt, pruner.plan) is learn.opt
    else:
        pruner.prune_model(0.5, optimizer=learn.opt)
    assert pruner.plan.removed
    assert kept() == before and {"step": 3, "do_wd": False, "force_train": True} in before
    assert list(learn.opt.hypers) == hypers and learn.opt.frozen_idx == 1
    assert [p.requires_grad for p in model.parameters()] == trains and not all(trains)
    assert [[id(p) for p in group] for group in learn.opt.param_lists] == ids
    for p in model.parameters():
        assert (
            learn.opt.state[p]["grad_avg"].shape == p.shape == learn.opt.state[p]["sqr_avg"].shape
        )
    step(model, learn.opt, 5)
    learn.opt.unfreeze()
    step(model, learn.opt, 6)
    assert learn.opt.state[model.head.weight]["step"] == 5


@pytest.mark.parametrize("kind", [Adam, lookahead, partial(wrapped, optim.SGD, momentum=0.9)])
def test_carrying_afterwards_is_the_same_and_only_done_once(kind):
    model = make(Residual, torch.float64).train()
    optimizer = kind(list(model.parameters()), lr=1e-2)
    for seed in range(4):
        step(model, optimizer, seed)
    other, its = copied(model, optimizer)
    x = images(dtype=torch.float64)
    Pruner(model, x).prune_model(0.4, optimizer=optimizer)
    pruner = Pruner(other, x)
    pruner.prune_model(0.4)
    for _ in range(2):
        carry_optimizer(its, pruner.plan)
    for seed in range(4, 8):
        step(model, optimizer, seed)
        step(other, its, seed)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_plan_that_is_a_copy_needs_the_model():
    model = make(Residual).train()
    optimizer = optim.Adam(model.parameters())
    step(model, optimizer, 0)
    pruner = Pruner(model, images())
    pruner.prune_model(0.5)
    plan = copy.deepcopy(pruner.plan)
    with pytest.raises(TypeError, match=r"carry_optimizer\(optimizer, plan, model\)"):
        carry_optimizer(optimizer, plan)
    carry_optimizer(optimizer, plan, model)
    assert optimizer.state[model.c1.weight]["exp_avg"].shape == model.c1.weight.shape
    step(model, optimizer, 1)


def test_the_plan_of_all_cuts_carries_over_all_of_them():
    model = make(Residual, torch.float64).train()
    optimizer = optim.AdamW(model.parameters(), 1e-2)
    for seed in range(3):
        step(model, optimizer, seed)
    average, its = copied(model, optimizer)  # such as another process' copy
    late, late_optimizer = copied(model, optimizer)
    pruner = Pruner(model, images(dtype=torch.float64))
    for share in (0.2, 0.3):
        pruner.prune_model(share, optimizer=optimizer)
    plan = type(pruner.plan).from_json(pruner.whole_plan.to_json())
    plan.apply(average, optimizer=its)
    plan.apply(late)
    carry_optimizer(late_optimizer, plan, late)
    for m, o in ((model, optimizer), (average, its), (late, late_optimizer)):
        step(m, o, 3)
    for m in (average, late):
        pairs = zip(model.parameters(), m.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_no_model_is_kept_alive_by_its_plan():
    model = make(Residual)
    pruner = Pruner(model, images())
    pruner.prune_model(0.5)
    plan, seen = pruner.plan, weakref.ref(model)
    del model, pruner
    gc.collect()
    assert seen() is None and plan.removed


def test_without_an_optimizer_all_gradients_go():
    model = make(Residual).train()
    loss_of(model(images(4))).backward()
    Pruner(model, images()).prune_model(0.5)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_that_were_accumulated_are_carried():
    model = make(Residual, torch.float64).train()
    optimizer = optim.SGD(model.parameters(), 0.1)
    full, other = copied(model, optimizer)
    pruner = Pruner(copy.deepcopy(model), images(dtype=torch.float64))
    pruner.prune_model(0.4)
    hold = zeroed(full, other, positions(pruner.plan, full))
    lost = positions(pruner.plan, full)
    hold()  # so that the cut changes nothing that follows
    model.load_state_dict(full.state_dict())
    for m in (model, full):
        loss_of(m(images(4, dtype=torch.float64, seed=5))).backward()
    pruner = Pruner(model, images(dtype=torch.float64))
    pruner.prune_model(optimizer=optimizer)
    assert {k: v for k, v in positions(pruner.plan, full).items() if not v.equal(lost[k])} == {}
    for m in (model, full):
        loss_of(m(images(4, dtype=torch.float64, seed=6))).backward()
    optimizer.step()
    other.step()
    for (key, p), q in zip(model.named_parameters(), full.parameters(), strict=True):
        assert torch.allclose(p, q.detach()[~lost[key]].view(p.shape), rtol=1e-9, atol=1e-12)


class Shampoo(optim.Optimizer):
    """Statistics that are matrices of their own, in lists."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["preconditioners"] = [torch.eye(n) for n in p.shape]
                p.add_(p.grad, alpha=-1e-2)


@pytest.mark.parametrize(
    "kind", [optim.Adafactor, partial(optim.LBFGS, max_iter=1), Shampoo], ids=lambda k: str(k)
)
def test_state_of_other_shapes_is_refused_by_name_before_anything_is_cut(kind):
    model = make(Residual).train()
    optimizer = kind(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model(images(4)))
        loss.backward()
        return loss

    if isinstance(optimizer, optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    its = [list(state.items()) for state in optimizer.state.values()]
    pruner = Pruner(model, images())
    with pytest.raises(
        ValueError, match=f"{type(optimizer).__name__} cannot be carried.*reset_opt"
    ):
        pruner.prune_model(0.5, optimizer=optimizer)
    now = model.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in before.items()) and pruner.plan is None
    for state, was in zip(optimizer.state.values(), its, strict=True):
        assert all(state[k] is v for k, v in was)
    pruner.prune_model(0.5, optimizer=optim.Adafactor(model.parameters()))  # nothing kept yet


def test_what_is_no_optimizer_of_the_model_is_refused():
    model, other = make(Residual), make(Residual)
    pruner = Pruner(model, images())
    for wrong in ("adam", optim.Adam, [1]):
        with pytest.raises(TypeError, match="optimizer must be fastai's"):
            pruner.prune_model(0.5, optimizer=wrong)
    with pytest.raises(ValueError, match="trains none of the model's parameters"):
        pruner.prune_model(0.5, optimizer=optim.Adam(other.parameters()))
    assert model.c1.weight.shape == other.c1.weight.shape


class Interrupted(dict):
    """A state that is interrupted while it is written."""

    armed = False

    def __setitem__(self, key, value):
        if self.armed and key == "exp_avg_sq":
            type(self).armed = False
            raise KeyboardInterrupt
        super().__setitem__(key, value)


def test_an_interrupt_leaves_model_and_optimizer_whole():
    model = make(Residual).train()
    optimizer = optim.Adam(model.parameters())
    step(model, optimizer, 0)
    for p in list(optimizer.state)[3:5]:
        optimizer.state[p] = Interrupted(optimizer.state[p])
    loss_of(model(images(4))).backward()
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad for p in model.parameters()]
    state = [dict(optimizer.state[p]) for p in model.parameters()]
    Interrupted.armed = True
    with pytest.raises(KeyboardInterrupt):
        Pruner(model, images()).prune_model(0.5, optimizer=optimizer)
    assert not Interrupted.armed
    for p, was, gradient, own in zip(model.parameters(), before, gradients, state, strict=True):
        assert torch.equal(p, was) and p.grad is gradient
        assert all(optimizer.state[p][k] is v for k, v in own.items())
    Pruner(model, images()).prune_model(0.5, optimizer=optimizer)
    optimizer.step()
    step(model, optimizer, 3)


@pytest.mark.parametrize("fused", [False, True])
def test_channels_last_weights_and_their_state_keep_one_memory_format(fused):
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8, 1), nn.Flatten())
    model.append(nn.Linear(8 * 8 * 8, 3))
    model = model.double().to(memory_format=torch.channels_last)
    optimizer = optim.AdamW(model.parameters(), 1e-2, fused=fused)
    x = images(4, 8, torch.float64).to(memory_format=torch.channels_last)
    for _ in range(3):
        loss_of(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    Pruner(model, x).prune_model(0.5, optimizer=optimizer)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    other, its = copied(model, optimizer)
    other = other.to(memory_format=torch.contiguous_format)
    for group in its.param_groups:
        group["fused"] = False
    for m, o in ((model, optimizer), (other, its)):
        loss_of(m(x)).backward()
        o.step()
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].stride() == p.stride()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in pairs)
