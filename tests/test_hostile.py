"""Networks and users that do unusual things: never a crash, a wrong cut, or a trace left behind."""

import copy
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Plain, Residual, conv, images, make
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier


class Body(nn.Module):
    """Two linear layers with something between, before or after them."""

    def __init__(self, between=lambda s, x: x, before=lambda s, x: x, after=lambda s, x, y: y):
        super().__init__()
        self.a, self.b, self.skip = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(6, 4)
        self.between, self.before, self.after = between, before, after
        self.scale = nn.Parameter(torch.rand(16) + 1)
        self.tiny = nn.Parameter(torch.full((4,), 1e-6))

    def forward(self, x):
        x = self.before(self, x)
        return self.after(self, x, self.b(self.between(self, F.relu(self.a(x)))))


def body(**kwargs):
    torch.manual_seed(0)
    return Body(**kwargs).eval()


def zero(model, n=8):
    with torch.no_grad():
        model.a.weight[:n] = 0
        model.a.bias[:n] = 0


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_a_model_that_writes_into_its_inputs():
    model, x = body(before=lambda s, x: x.sub_(0.5).div_(0.2)), X.clone()
    zero(model)
    pruner = Pruner(model, x)
    pruner.prune_model()
    assert torch.equal(x, X) and model.a.out_features == 8


@dataclass
class Out:
    features: torch.Tensor
    logits: torch.Tensor


def test_outputs_inside_an_object_are_outputs():
    class Model(Body):
        def forward(self, x):
            features = F.relu(self.a(x))
            return Out(features, self.b(features))

    model = Model()
    pruner = Pruner(model, X)
    with pytest.warns(UserWarning, match="nothing was removed"):
        pruner.prune_model(0.5)
    assert model(X).features.shape == (4, 16)
    assert set(pruner.kept()["reason"]) == {"network output"}


def counted(s, x):
    return x - 0.1 * x.shape[1]


HIDING = {
    "plain": lambda s, x, y: y,
    "masked": lambda s, x, y: y.masked_fill(torch.tensor([False, False, False, True]), -1e9),
    "complex": lambda s, x, y: torch.complex(y, y),
    "layer scale": lambda s, x, y: s.skip(x) + s.tiny * y,
}


@pytest.mark.parametrize("kind", HIDING)
def test_a_width_that_enters_the_result_is_seen_wherever_it_hides(kind):
    model = body(between=counted, after=HIDING[kind])
    zero(model)
    before = model(X)
    pruner = Pruner(model, X)
    with pytest.warns(UserWarning, match="nothing was removed"):
        pruner.prune_model()
    assert torch.equal(model(X), before) and model.a.out_features == 16


def test_a_mask_that_is_empty_in_the_example():
    class Masked(Body):
        def forward(self, x, mask):
            return self.b(self.a(x).masked_fill(mask[:, None], -1.0))

    model = Masked()
    zero(model)
    nothing = torch.zeros(4, dtype=torch.bool)
    some = torch.tensor([False, True, True, False])
    before = model(X, some)
    with pytest.warns(UserWarning, match="nothing was removed"):
        Pruner(model, (X, nothing)).prune_model()
    assert torch.allclose(model(X, some), before)


def test_a_parameter_that_divides_is_not_zeroed():
    model = body(between=lambda s, x: x / s.scale)
    Sparsifier(model, "filter", example_inputs=X).sparsify_model(0.5)
    assert model(X).isfinite().all() and model.scale.count_nonzero() == 16
    Pruner(model, X).prune_model()
    assert model.a.out_features == 8 and model.scale.numel() == 8


def test_one_weight_with_units_along_both_dimensions():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.o = nn.Linear(6, 12), nn.Linear(12, 4)
            self.w = nn.Parameter(torch.randn(10, 12))

        def forward(self, x):
            x = F.relu(F.linear(F.relu(self.e(x)), self.w))
            return self.o(F.relu(F.linear(x, self.w.t())))

    model = Both()
    sparsifier = Sparsifier(model, "filter", example_inputs=X)
    sparsifier.sparsify_model(0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
        sparsifier.apply()
        assert int((model.w == 0).all(1).sum()) == 5 and int((model.w == 0).all(0).sum()) == 6


@pytest.mark.parametrize("verify", [True, False])
def test_channels_as_positions_or_samples_of_a_conv(verify):
    class Folded(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind, self.a, self.b = kind, nn.Conv1d(3, 16, 1), nn.Conv1d(16, 4, 1)
            self.c, self.d = nn.Conv1d(10, 4, 3, padding=1), nn.Conv1d(1, 4, 3, padding=1)

        def forward(self, x):
            h = F.relu(self.a(x))
            y = self.b(h).mean(-1)
            if self.kind == "positions":
                return y + self.c(h.transpose(1, 2)).mean(-1)
            n, c, length = h.shape
            return y + self.d(h.reshape(n * c, 1, length)).view(n, c, 4, length).mean((1, 3))

    for kind in ("positions", "samples"):
        model, x = Folded(kind), torch.randn(2, 3, 10)
        with torch.no_grad():
            model.a.weight[::2] = 0
            model.a.bias[::2] = 0
        before = model(x)
        with pytest.warns(UserWarning, match="nothing was removed"):
            Pruner(model, x).prune_model(verify=verify)
        assert torch.equal(model(x), before)


RUNNING = {
    "cast": lambda s, x: x.double().float(),
    "bool cast": lambda s, x: x * (x > 0).float(),
    "half": lambda s, x: x.half().to(x.dtype),
    "in-place view": lambda s, x: x.unsqueeze(-1).squeeze_(-1),
    "in-place transpose": lambda s, x: x.clone().t_().t_(),
    "vmap": lambda s, x: torch.vmap(lambda v: v * 2)(x),
    "integers": lambda s, x: x + (x > 0).long().sum(1, keepdim=True),
    "einsum": lambda s, x: torch.einsum("bi,i->bi", x, s.scale),
    "resized": lambda s, x: torch.stack([x, x]).sum(0),
    "own function": lambda s, x: Own.apply(x),
}


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.flip(1)

    @staticmethod
    def backward(ctx, g):
        return g.flip(1)


@pytest.mark.parametrize("kind", RUNNING)
def test_whatever_is_between_nothing_crashes(kind):
    model = body(between=RUNNING[kind])
    if kind in ("in-place view", "in-place transpose", "integers"):  # not followed, or counted
        with pytest.raises(ValueError, match="nothing to sparsify"):
            Sparsifier(model, "filter", example_inputs=X)
        assert Pruner(model, X).plan_for(0.5).removed == 0
        return
    Sparsifier(model, "filter", example_inputs=X).sparsify_model(0.5)
    before = model(X)
    Pruner(model, X).prune_model()
    assert model.a.out_features == 8 and torch.allclose(model(X), before, atol=1e-5)
    assert Pruner(body(between=RUNNING[kind]), X).plan_for(0.5).removed == 8


def test_inputs_without_a_batch():
    image = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    pruner = Pruner(image, torch.randn(3, 16, 16))
    pruner.prune_model(0.5)
    assert image[0].out_channels == 4
    assert pruner.report().iloc[0]["macs_before"] == 8 * 27 * 14 * 14

    class Positions(Body):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 1, 6))

        def forward(self, x):
            return super().forward(x + self.table)

    model = Positions()
    Pruner(model, torch.randn(7, 5, 6)).prune_model(0.5)
    assert model.a.out_features == 8


def test_buffers_of_all_kinds():
    class Buffers(Body):
        def __init__(self):
            super().__init__()
            self.register_buffer("shared", torch.zeros(1).expand(4))

        def forward(self, x):
            self.register_buffer("made", torch.zeros(2))
            return super().forward(x) + self.shared

    model = Buffers()
    keys = list(model.state_dict())
    Pruner(model, X).plan_for(0.5)
    assert list(model.state_dict()) == keys


def test_networks_without_parameters_and_lazy_ones():
    for model in (nn.ReLU(), nn.PReLU()):
        with pytest.warns(UserWarning, match="nothing was removed"):
            Pruner(model, X).prune_model(0.5)
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU())
    for look in (lambda: Pruner(lazy, images()), lambda: Sparsifier(lazy, example_inputs=images())):
        with pytest.raises(ValueError, match="lazy layers: run it once"):
            look()


def test_train_overrides_parametrizations_and_random_states_are_left_alone():
    class Merging(Body):
        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

        def forward(self, x):
            if self.training and random.random() + np.random.rand() > 1:
                return super().forward(x) * 2
            return super().forward(x)

    model = Merging()
    random.seed(0)
    np.random.seed(0)
    expected = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    Pruner(model, X)
    assert (random.random(), np.random.rand()) == expected and not hasattr(model, "merged")
    normed = nn.Sequential(
        spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    before = copy.deepcopy(normed.state_dict())
    Sparsifier(normed, "filter", example_inputs=X)
    Sparsifier(normed, "weight", example_inputs=X)
    assert all(torch.equal(v, before[k]) for k, v in normed.state_dict().items())


def test_a_graph_that_is_alive_survives_a_look():
    model = make(Residual).train()
    loss = model(images(4)).sum()
    pruner = Pruner(model, images())
    pruner.report()
    loss.backward()
    assert model.c1.weight.grad is not None


def test_dead_filters_that_speak_are_not_held():
    model = make(Plain)
    with torch.no_grad():
        model.b.weight[:3] = 0
    bias = model.b.bias.detach().clone()
    sparsifier = Sparsifier(model, "filter", example_inputs=images())
    sparsifier.apply()
    assert torch.equal(model.b.bias, bias)
    sparsifier.sparsify_model(0.25)
    assert (model.b.bias[:3] == 0).all()  # the weakest, they go first


@pytest.mark.filterwarnings("ignore:input's size at dim=1")  # without weights it cannot be mended
def test_instance_norms_shrink():
    for norm in (nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True)):
        model = nn.Sequential(conv(3, 8), norm, nn.ReLU(), conv(8, 4))
        Pruner(model, images()).prune_model(0.5)
        assert model[0].out_channels == 4
        model(images(3))


def test_messages_say_what_to_do():
    model = make(Plain)
    sparsifier = Sparsifier(model, "filter", example_inputs=images())
    sparsifier.sparsify_model(0.5)
    Pruner(model, images()).prune_model()
    for use in (sparsifier.apply, sparsifier.report, lambda: sparsifier.sparsify_model(0.7)):
        with pytest.raises(RuntimeError, match="pruned since this Sparsifier looked"):
            use()

    class Learner:
        model = make(Plain)

    for make_one in (lambda: Pruner(Learner(), images()), lambda: Sparsifier(Learner())):
        with pytest.raises(TypeError, match=r"got Learner; pass learn\.model"):
            make_one()
    with pytest.raises(ValueError, match="empty tensor"):
        Pruner(make(Plain), images()[:0])
    with pytest.raises(TypeError, match="ScriptModule"):
        Pruner(torch.jit.trace(make(Plain), images()), images())
    with pytest.raises(TypeError, match="by names and types"):
        Pruner(make(Plain), images(), exclude=3)
    with pytest.raises(ValueError, match="failed on a.weight: TypeError"):
        wrong = Sparsifier(make(Plain), criteria=lambda w, more: w, example_inputs=images())
        wrong.sparsify_model(0.5)
    with pytest.warns(UserWarning, match="rounds to none"):
        Pruner(make(Plain), images()).prune_model(0.001)


def test_training_on_without_the_callback_is_reported():
    model = make(Plain)
    sparsifier = Sparsifier(model, "filter", example_inputs=images())
    sparsifier.sparsify_model(0.5)
    with torch.no_grad():
        model.a.weight.add_(1.0)
    row = sparsifier.report().set_index("layer").loc["a"]
    assert row["zeros"] == 0 and row["limit"] == "not reached, or trained on since"
    for layer in (model.b, model.fc1):
        nn.init.normal_(layer.weight)
    with pytest.warns(UserWarning, match="before training on without the callback"):
        Pruner(model, images()).prune_model()
