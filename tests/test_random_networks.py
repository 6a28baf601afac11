"""Random networks: whatever is drawn, removal is exact, and no cut breaks anything.

A network is a list of steps, each of which reads an earlier value and appends what it makes. A
failing example is printed as such a list, which can be pasted into a test: `exact(Case([...]))`.
"""

import copy
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from networks import images
from torch import nn

from fasterai.coupling.labels import Field
from fasterai.coupling.probe import wiring
from fasterai.coupling.rules import RULES
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner
from fasterai.sparse.choose import NothingToSparsify
from fasterai.sparse.sparsifier import Sparsifier

pytestmark = pytest.mark.filterwarnings("ignore:nothing was removed")


class Step(NamedTuple):
    """`op` is one of `UNARY`, of `BINARY` or 'again'; it reads the value so many places `back`."""

    op: str
    width: int = 8
    kind: int = 0
    back: int = 0


class Case(NamedTuple):
    """A network, and the share of it that goes; `seed` makes its numbers."""

    steps: list[Step]
    head: str = "mean"
    seed: int = 0
    share: float = 0.5


# --- steps of one value: channels, and the step's width and kind -> a layer -----------------------


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Last(nn.Sequential):
    """Layers that find their channels in the last of four dimensions."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Tokens(nn.Sequential):
    """Layers that see places as a sequence."""

    def forward(self, x):
        return super().forward(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


class Gate(nn.Sequential):
    """Layers that make a factor for each channel, or one for all."""

    def forward(self, x):
        return x * torch.sigmoid(super().forward(x))


class Extra(nn.Sequential):
    """A branch with an output of its own, in train mode."""


class Packed(nn.MultiheadAttention):
    """PyTorch's own attention layer."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Attention(nn.Module):
    """Heads by views: q, k, v packed as five dimensions or in chunks, or from layers each."""

    def __init__(self, wide, width, kind):
        super().__init__()
        self.kind, self.heads = kind, 4 if width % 8 == 0 else 2
        self.scale = (width // self.heads) ** -0.5
        widths = [width * 3] if kind < 2 else [width] * 3
        self.qkv = nn.ModuleList(nn.Linear(wide, w) for w in widths)
        self.proj = nn.Linear(width, wide)

    def parts(self, x):
        made = [layer(x) for layer in self.qkv]
        if self.kind == 0:
            return made[0].reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        made = made[0].chunk(3, -1) if self.kind == 1 else made
        return [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in made]

    def forward(self, x):
        q, k, v = self.parts(x)
        if self.kind < 3:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


def conv(wide, width, kind):
    size = 1 if kind % 2 else 3
    return nn.Conv2d(wide, width, size, padding=size // 2, bias=kind % 4 < 2)


def depthwise(wide, width, kind):
    return nn.Conv2d(wide, wide * (1 + kind % 2), 3, padding=1, groups=wide, bias=kind % 4 < 2)


def transposed(wide, width, kind):
    width = wide if kind % 4 == 3 else width
    groups = (1, 1, math.gcd(2, wide, width), wide)[kind % 4]
    size = dict(kernel_size=3, padding=1) if kind % 2 else dict(kernel_size=2, stride=2)
    return nn.ConvTranspose2d(wide, width, groups=groups, **size)


def norm(wide, width, kind):
    makers = (
        lambda: nn.BatchNorm2d(wide),
        lambda: Last(nn.LayerNorm(wide)),
        lambda: nn.GroupNorm(math.gcd(2, wide), wide),
        lambda: nn.InstanceNorm2d(wide, affine=True),
        lambda: Tokens(nn.RMSNorm(wide)),
        lambda: nn.BatchNorm2d(wide, affine=False),
        lambda: nn.GroupNorm(wide, wide),
        lambda: nn.GroupNorm(1, wide),
    )
    return makers[kind]()


def activation(wide, width, kind):
    functions = (F.relu, F.gelu, F.silu, torch.sigmoid, F.leaky_relu, F.hardswish, torch.tanh)
    return Apply(functions[kind]) if kind < len(functions) else nn.PReLU(wide)


def gate(wide, width, kind):
    if kind % 2:
        return Gate(nn.Conv2d(wide, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1))
    pooled = nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, width, 1), nn.ReLU()
    return Gate(*pooled, nn.Conv2d(width, wide, 1))


def split(wide, width, kind):
    k = max(1, wide // 3)
    functions = (
        lambda x: x.chunk(2, 1),
        lambda x: x.split((k, wide - k), 1),
        lambda x: (x[:, :k], x[:, k:]),
        lambda x: (x[:, ::2], x[:, 1::2]),
    )
    return Apply(functions[kind % 4]) if wide > 1 else nn.Identity()


def shuffle(wide, width, kind):
    groups = math.gcd(4 if kind % 2 else 2, wide)
    if kind % 4 < 2:
        return Apply(lambda x: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2))
    return nn.ChannelShuffle(groups)


def vector():
    return Apply(lambda x: x.mean((2, 3)))


UNARY = {
    "conv": conv,
    "norm": norm,
    "activation": activation,
    "linear": lambda c, w, k: (Last if k % 4 > 1 else Tokens)(nn.Linear(c, w, bias=k % 2 == 0)),
    "grouped": lambda c, w, k: nn.Conv2d(c, w, 3, 1, 1, groups=math.gcd(c, w, 16 if k % 2 else 2)),
    "depthwise": depthwise,
    "transposed": transposed,
    "pool": lambda c, w, k: (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1))[k % 3],
    "gate": gate,
    "split": split,
    "shuffle": shuffle,
    "pixel": lambda c, w, k: nn.PixelUnshuffle(2) if k % 2 or c % 4 else nn.PixelShuffle(2),
    "attention": lambda c, w, k: Tokens(Attention(c, w, k % 4)),
    "packed": lambda c, w, k: Tokens(Packed(c, math.gcd(2, c), batch_first=True)),
    "extra": lambda c, w, k: Extra(conv(c, w, k), nn.ReLU(), vector(), nn.Linear(w, 3)),
}


# --- steps of two values, and the network ---------------------------------------------------------

BINARY = ("add", "mul", "cat")


class Meet(nn.Module):
    """Two values become one; a sum or product has the shape of the first."""

    def __init__(self, wide, other, s):
        super().__init__()
        fits = s.op == "cat" or wide == other
        self.op, self.kind = s.op, s.kind % 2
        self.project = nn.Identity() if fits else nn.Conv2d(other, wide, 1, bias=False)

    def forward(self, x, y):
        y = self.project(y)
        if y.shape[2:] != x.shape[2:]:
            y = F.interpolate(y, x.shape[2:])
        if self.op == "cat":
            return torch.cat((y, x) if self.kind else (x, y), 1)
        if self.op == "add":
            return x - 0.3 * y if self.kind else x + y
        return x * y if self.kind else x * torch.sigmoid(y)


class Random(nn.Module):
    """A first conv, the steps' layers, a head; what makes too much or too little is left out."""

    def __init__(self, steps, head):
        super().__init__()
        self.first, self.layers, self.backs = conv(3, 8, 0), [], []
        values = [self.first(torch.zeros(2, 3, 8, 8))]
        for s in steps:
            layer = self.layer(values[-1 - s.back % len(values)].shape[1], values[-1].shape[1], s)
            made = apply(layer, values, s.back)
            if all(y.shape[1] <= 48 and 2 <= y.shape[2] <= 16 for y in made):
                self.layers.append(layer)
                self.backs.append(s.back)
                values += made
        self.layers, self.head = nn.ModuleList(self.layers), self.ending(head, values[-1])

    def layer(self, wide, other, s):
        """A new layer, or one of this width once more."""
        if s.op in BINARY:
            return Meet(wide, other, s)
        if s.op in UNARY:
            return UNARY[s.op](wide, s.width, s.kind)
        widths = [getattr(m, "in_channels", getattr(m, "num_features", 0)) for m in self.layers]
        own = [m for m, w in zip(self.layers, widths, strict=True) if w == wide]
        return own[s.kind % len(own)] if own else conv(wide, wide, s.kind)

    def ending(self, head, x):
        return {
            "mean": lambda: nn.Sequential(vector(), nn.Linear(x.shape[1], 5)),
            "conv": lambda: nn.Conv2d(x.shape[1], 5, 1),
            "flatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5)),
            "plain": nn.Identity,
        }[head]()

    def forward(self, x):
        values, extra = [self.first(x)], []
        for layer, back in zip(self.layers, self.backs, strict=True):
            if isinstance(layer, Extra) and self.training:
                extra.append(layer(values[-1 - back % len(values)]))
            values += apply(layer, values, back)
        return [self.head(values[-1]), *extra]


def apply(layer, values, back):
    """What a layer makes of the values so far."""
    x = values[-1 - back % len(values)]
    if isinstance(layer, Extra):
        return []
    made = layer(x, values[-1]) if isinstance(layer, Meet) else layer(x)
    return [made] if isinstance(made, torch.Tensor) else list(made)


def build(case):
    """The case's network in eval mode, with random biases, norm statistics and affine values."""
    torch.manual_seed(case.seed)
    model = Random(case.steps, case.head).double()
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.ndim == 1:
                positive = name.endswith(("weight", "running_var"))
                p.copy_(torch.rand_like(p) + 0.5 if positive else torch.randn_like(p) * 0.3)
    return model.eval()


def pictures(n=2, size=(8, 8), seed=1):
    return images(n, max(size), torch.float64, seed)[..., : size[0], : size[1]]


# --- what must hold; each check returns whether units were removed --------------------------------


def same_outputs(case, model, before):
    for size in ((8, 8),) if case.head == "flatten" else ((8, 8), (16, 8)):
        x = pictures(3, size, seed=5)
        with torch.no_grad():
            (a,), (b,) = before(x), model(x)
        bound = 1e-9 * max(float(a.abs().max()), 1e-6)
        apart = float((a - b).abs().max())
        assert apart <= bound, f"outputs differ by {apart:.2g} at {size}"


def usable(model, before):
    """It has the outputs and keys that it had, is no larger, and trains."""
    assert list(model.state_dict()) == list(before.state_dict())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, before)]
    assert sizes[0] <= sizes[1]
    x = pictures(3, seed=6)
    for mode in (False, True):
        made, shapes = model.train(mode)(x), [y.shape for y in before.train(mode)(x)]
        assert [y.shape for y in made] == shapes
        assert all(y.isfinite().all() for y in made)
    sum(y.square().mean() for y in made).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def exact(case):
    """What the sparsifier zeroes is removed, or named."""
    model = build(case)
    try:
        sparsifier = Sparsifier(model, "filter", example_inputs=pictures())
    except NothingToSparsify:
        return False
    sparse = copy.deepcopy(sparsifier.sparsify_model(case.share))
    pruner = Pruner(model, pictures())
    pruner.prune_model()
    same_outputs(case, model, sparse)
    usable(model, sparse)
    assert sparsifier.reached() == 0 or pruner.plan.removed or len(pruner.kept())
    return pruner.plan.removed > 0


@torch.no_grad()
def zero_rows(model, share):
    """Zero rows of some layers; of some of these the bias, too, and the norm that follows."""
    layers = list(model.modules())
    for layer, behind in zip(layers, [*layers[1:], None], strict=True):
        if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) or torch.rand(()) < 0.3:
            continue
        transposed = getattr(layer, "transposed", False)
        rows = layer.weight.transpose(0, 1) if transposed else layer.weight
        lost = (torch.rand(len(rows)) < share).nonzero().flatten()
        rows[lost] = 0
        norm = [behind.weight, behind.bias] if isinstance(behind, nn.BatchNorm2d) else []
        for v in [layer.bias, *norm][: torch.randint(4, ()) and 3]:
            if v is not None and len(v) % len(rows) == 0:  # groups of a transposed conv share rows
                v.view(-1, len(rows))[:, lost] = 0


def by_hand(case):
    """Rows zeroed by hand: what cannot be removed exactly stays."""
    model = build(case)
    zero_rows(model, case.share / 2)
    sparse = copy.deepcopy(model)
    pruner = Pruner(model, pictures())
    pruner.prune_model()
    same_outputs(case, model, sparse)
    usable(model, sparse)
    return pruner.plan.removed > 0


class Among(nn.Module):
    """A norm over some of the channels; the others are zero."""

    def __init__(self, norm, kept):
        super().__init__()
        self.norm, self.kept = norm, torch.tensor(kept)
        self.dim = 1 if isinstance(norm, nn.GroupNorm) else -1

    def forward(self, x):
        seen = self.norm(x.index_select(self.dim, self.kept))
        return torch.zeros_like(x).index_copy(self.dim, self.kept, seen)


@torch.no_grad()
def silenced(model, cut, plan):
    """The network with zeros where it was cut: what is wired well computes the same."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for name, cuts in plan.kept.items():
        for dim, kept in cuts.items():
            if name in parameters:
                gone = torch.ones(parameters[name].shape[dim], dtype=torch.bool)
                gone[list(kept)] = False
                parameters[name].transpose(0, dim)[gone] = 0
        owner = name.removesuffix(".weight")
        if isinstance(modules.get(owner), nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            parent, _, own = owner.rpartition(".")
            setattr(modules[parent], own, Among(cut.get_submodule(owner), cuts[0]))
    return model


def ranked(case):
    """The weakest units go: what is left is wired as before."""
    model = build(case)
    dense = copy.deepcopy(model)
    pruner = Pruner(model, pictures())
    pruner.prune_model(case.share, context=("local", "global")[case.seed % 2])
    same_outputs(case, model, silenced(copy.deepcopy(dense), model, pruner.plan))
    usable(model, dense)
    return pruner.plan.removed > 0


def in_steps(case):
    """Half of the way, then the rest: all in all what is left is wired as before."""
    model = build(case)
    dense = copy.deepcopy(model)
    pruner = GradualPruner(model, pictures(), ("local", "global")[case.seed % 2])
    for share in (case.share / 2, case.share):
        pruner.prune_to(share)
    if pruner.whole_plan is None:
        return False
    same_outputs(case, model, silenced(copy.deepcopy(dense), model, pruner.whole_plan))
    usable(model, dense)
    return pruner.whole_plan.removed > 0


# --- the runs -------------------------------------------------------------------------------------

OP, WIDTH = st.sampled_from([*UNARY, *BINARY, "again"]), st.sampled_from([8, 4, 6, 12, 16])
STEPS = st.lists(st.builds(Step, OP, WIDTH, st.integers(0, 7), st.integers(0, 3)), max_size=9)
HEAD = st.sampled_from(["mean", "conv", "flatten", "plain"])
CASES = st.builds(Case, STEPS, HEAD, st.integers(0, 9), st.sampled_from([0.5, 0.25, 0.75, 0.9]))
CHECKS = [exact, by_hand, ranked, in_steps]
ONCE = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
)


def explore(check, examples):
    """Run a check on random cases; a good part of them has to remove something."""
    removed = []

    @seed(CHECKS.index(check))
    @settings(ONCE, max_examples=examples)
    @given(CASES)
    def run(case):
        removed.append(check(case))

    run()
    assert sum(removed) > len(removed) / 3, f"{sum(removed)} of {len(removed)} removed something"


@pytest.mark.parametrize("check", CHECKS)
def test_a_few_random_networks(check):
    explore(check, 14)


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_many_random_networks(check):
    explore(check, 670)


# What random networks have found: wrong wiring that shows only where few channels are left, norms
# taken for others, constants, factors.
FOUND = [
    (ranked, Case([Step("norm", kind=1), Step("shuffle", kind=1)])),
    (ranked, Case([Step("norm", kind=2), Step("shuffle", kind=1)])),
    (ranked, Case([Step("pixel"), Step("norm", kind=1, back=1), Step("shuffle", kind=2)])),
    (ranked, Case([Step("norm", kind=7), Step("shuffle")])),
    (ranked, Case([Step("add", kind=1), Step("attention")], share=0.9)),
    (ranked, Case([Step("packed"), Step("attention", 6, 2)])),
    (exact, Case([Step("shuffle", kind=1)])),
    (exact, Case([Step("shuffle", kind=2)])),
    (exact, Case([Step("norm", kind=6)], "conv")),
    (exact, Case([Step("pixel")], "flatten", 7)),
    (exact, Case([Step("pixel"), Step("pool", back=1), Step("shuffle", kind=2)])),
    (exact, Case([Step("conv"), Step("shuffle", kind=2, back=1), Step("again")])),
    (by_hand, Case([Step("conv"), Step("depthwise", back=1)])),
    (by_hand, Case([Step("linear", 4), Step("add", back=1), Step("depthwise")])),
]


@pytest.mark.filterwarnings("ignore:nothing was removed")
@pytest.mark.parametrize("check, case", FOUND, ids=lambda v: getattr(v, "__name__", None))
def test_what_random_networks_have_found(check, case):
    check(case)


class Shuffled(nn.Module):
    """Two convs in a row, and a channel shuffle between them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.b(self.a(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


def test_a_wrong_rule_is_caught_by_the_replay_and_nothing_is_cut(monkeypatch):
    def wrong(t, func, args, kwargs, out):  # the last channels come first
        t.attach(out, [Field(f.labels.transpose(1, 2).flip(1)) for f in t.of(args[0])])

    model, x = Shuffled().double().eval(), pictures()
    pruner = Pruner(model, x)
    axis = pruner._axes[0]
    assert axis.size == 4  # so the same places of both halves are one unit
    monkeypatch.setitem(RULES, "transpose", wrong)
    cut = {0: torch.tensor([True, False, True, False])}
    reason, _ = wiring(model, pruner.inputs, pruner._coupling, pruner._axes, cut)
    assert "do not belong together" in reason
    assert model.a.out_channels == 8
    with pytest.warns(UserWarning, match="nothing was removed"):
        pruner.prune_model(0.5, verify=False)
    reasons = pruner.kept().set_index("layer").loc["a", "reason"]
    assert model.a.out_channels == 8 and reasons.str.contains("do not belong together").all()
