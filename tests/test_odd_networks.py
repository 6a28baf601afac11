"""Networks as they are written in the wild, each with something that a pruner may trip over."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
import torchvision
from networks import apart
from torch import nn

from fasterai.audit.batch_norms import recalibrate_bn
from fasterai.core.target import Target
from fasterai.measure.profile import macs
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier

# --- constants that depend on sizes --------------------------------------------------------------


class Reduced(nn.Module):
    """Half of the channels are constants behind a batch norm, and then positions are reduced."""

    def __init__(self, reduce):
        super().__init__()
        self.c, self.bn, self.o = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 2)
        nn.init.constant_(self.bn.bias, 0.5)
        with torch.no_grad():
            self.c.weight[:4] = 0
        self.reduce = reduce

    def forward(self, x):
        return self.o(self.reduce(F.relu(self.bn(self.c(x))).flatten(2)))


def looped(h):
    total = 0
    for i in range(h.shape[2]):
        total = total + h[:, :, i]
    return total


SIZED = {
    "sum": lambda h: h.sum(2),
    "product": lambda h: h.prod(2),
    "log": lambda h: h.logsumexp(2),
    "norm": lambda h: h.norm(dim=2),
    "softmax": lambda h: h.softmax(2).amax(2),
    "last": lambda h: h.cumsum(2)[:, :, -1],
    "einsum": lambda h: torch.einsum("bcn->bc", h),
    "matrix": lambda h: (h @ h.new_ones(h.shape[2], 1))[..., 0],
    "loop": looped,
}


@pytest.mark.parametrize("name", SIZED)
def test_constants_that_sizes_make_are_left(name):
    torch.manual_seed(0)
    model = Reduced(SIZED[name]).double().eval()
    larger = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    before = model(larger)
    pruner = Pruner(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing may be removed
        pruner.prune_model()
    assert apart(before, model(larger)) < 1e-12
    assert model.c.out_channels == 8 and len(pruner.kept()) == 4


@pytest.mark.parametrize("name", ["mean", "amax"])
def test_constants_that_no_size_changes_go(name):
    torch.manual_seed(0)
    model = Reduced(lambda h: getattr(h, name)(2)).double().eval()
    larger = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    before = model(larger)
    Pruner(model, torch.randn(2, 3, 8, 8, dtype=torch.float64)).prune_model()
    assert apart(before, model(larger)) < 1e-12 and model.c.out_channels == 4


def test_networks_that_take_squares_alone():
    def square(h):
        side = int(h.shape[2] ** 0.5)
        return h.unflatten(2, (side, side)).sum((2, 3))

    torch.manual_seed(0)
    model = Reduced(square).double().eval()
    larger = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    before = model(larger)
    with pytest.warns(UserWarning, match="nothing was removed"):
        Pruner(model, torch.randn(2, 3, 8, 8, dtype=torch.float64)).prune_model()
    assert apart(before, model(larger)) < 1e-12


def test_sums_over_the_batch():
    """A set is a batch there."""

    class Sets(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.o = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
            nn.init.constant_(self.n.bias, 0.5)
            with torch.no_grad():
                self.a.weight[:4] = 0

        def forward(self, x):
            return self.o(self.n(self.a(x)).relu().sum(0, keepdim=True))

    torch.manual_seed(0)
    model, x = Sets().double().eval(), torch.randn(7, 5, dtype=torch.float64)
    before = model(x)
    with pytest.warns(UserWarning, match="nothing was removed"):
        Pruner(model, torch.randn(4, 5, dtype=torch.float64)).prune_model()
    assert apart(before, model(x)) < 1e-12


# --- what a run leaves behind --------------------------------------------------------------------


class Caching(nn.Module):
    """Masks that are made once, a list of losses, and a table that all instances share."""

    shared = {}

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(5, 24), nn.Linear(8, 2)
        self.masks, self.losses, self.nested = {}, [], {"seen": [set()]}

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        n = x.shape[1]
        for cache in (self.masks, self.shared):
            if n not in cache:
                cache[n] = q.new_full((n, n), float("-inf")).triu(1)
        self.losses.append(q.mean())
        self.nested["seen"][0].add(n)
        weights = (q @ k.mT / q.shape[-1] ** 0.5 + self.masks[n]).softmax(-1)
        return self.o((weights + 0 * self.shared[n].exp()) @ v)


@pytest.mark.parametrize("ran", [True, False])
def test_caches_are_as_before(ran):
    Caching.shared.clear()
    torch.manual_seed(0)
    model, x = Caching().eval(), torch.randn(2, 6, 5)
    before = model(x) if ran else None
    inner = {**model.masks}, {**Caching.shared}, [*model.losses], set(model.nested["seen"][0])
    pruner = Pruner(model, x)
    assert (model.masks, Caching.shared, model.losses, model.nested["seen"][0]) == inner
    if ran:
        assert torch.equal(model(x), before)
    pruner.prune_model(0.5)
    assert model.o.in_features == 4 and model(x).shape == (2, 6, 2)
    assert model.masks[6].device.type == "cpu" and all(not v.is_meta for v in model.losses)


class Frozen(dict):
    """It can neither be copied nor filled."""

    def refuse(self, *args, **kwargs):
        raise TypeError("frozen")

    __setitem__ = update = clear = pop = __copy__ = refuse


class Attributes(dict):
    __getattr__ = dict.__getitem__


KEPT = {
    "frozen": lambda: Frozen(a=1),
    "attributes": lambda: Attributes(a=1),
    "large": lambda: dict.fromkeys(range(20_000)),
    "tuple": lambda: ([],),
}


@pytest.mark.parametrize("name", KEPT)
def test_containers_that_are_left_alone(name):
    kept = KEPT[name]()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.kept = kept
    Pruner(model, torch.randn(2, 4)).prune_model(0.5)
    assert model.kept is kept and model[0].out_features == 4


# --- layers that do not run ----------------------------------------------------------------------


class Auxiliary(nn.Module):
    """A head that only runs in training, which wants targets."""

    def __init__(self):
        super().__init__()
        self.a, self.aux, self.o = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x, y=None):
        h = self.a(x).relu()
        out = self.o(h).mean((2, 3))
        if not self.training:
            return out
        if y is None:
            raise ValueError("targets please")
        return F.cross_entropy(out + self.aux(h).mean((2, 3)), y)


def test_layers_that_did_not_run_are_named():
    model, x, y = Auxiliary(), torch.randn(2, 3, 7, 7), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="keep their width.*: aux .*targets please.*exclude"):
        Pruner(model, x).prune_model(0.5)
    model = Auxiliary()
    Pruner(model, (x, y)).prune_model(0.5)  # with targets it runs
    assert model.aux.in_channels == 4
    model.train()(x, y).backward()


def test_vectors_that_are_never_read_follow_their_layer():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.n = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.a, self.b, self.o = nn.Linear(8, 6), nn.Linear(6, 12), nn.Linear(12, 2)

        def forward(self, x):
            x = F.conv2d(x, self.c.weight)
            x = F.batch_norm(x, self.n.running_mean, self.n.running_var).relu().mean((2, 3))
            return self.o(F.linear(self.a(x).relu(), self.b.weight).relu())

    model = Bare().eval()
    Pruner(model, torch.randn(2, 3, 7, 7)).prune_model(0.5)
    assert model.c.bias.shape == model.n.weight.shape == model.n.bias.shape == (4,)
    assert model.b.bias.shape == (6,) and model.n.num_features == 4
    model(torch.randn(3, 3, 9, 9)).sum().backward()


def test_tied_vectors_and_tables_that_are_never_read():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)
            self.b.bias = self.a.bias
            self.a.register_buffer("steps", torch.arange(8.0))

        def forward(self, x):
            return self.o(self.a(x).relu() + self.b(x).relu())

    model = Tied()
    Pruner(model, torch.randn(2, 4)).prune_model(0.5)
    assert model.b.bias is model.a.bias and len(model.a.bias) == 4
    assert torch.equal(model.a.steps, torch.arange(8.0))


# --- attention -----------------------------------------------------------------------------------


def left(model, x):
    """The share of the parameters that `prune_model(0.5)` leaves of a network that trains on."""
    before = sum(p.numel() for p in model.parameters())
    pruner = Pruner(model.eval(), x)
    pruner.prune_model(0.5)
    assert set(pruner.kept()["reason"]) <= {"network output"}
    out = model.train()(*(x if isinstance(x, tuple) else (x,)))
    out.sum().backward()
    return sum(p.numel() for p in model.parameters()) / before


def test_decoder_layers():
    """Where keys are values, queries are a third of a packed weight and the others one part."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.i, self.o = nn.Embedding(11, 32), nn.Linear(5, 32), nn.Linear(32, 11)
            self.d = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)

        def forward(self, t, y):
            return self.o(self.d(self.e(t), self.i(y)))

    assert left(Decoder(), (torch.randint(0, 11, (2, 6)), torch.randn(2, 4, 5))) < 0.35


def test_learned_queries():
    """They have rows of their own, which are not what the scale of the product counts."""

    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.randn(1, 3, 8))
            self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(5, 12), nn.Linear(5, 12)
            self.o = nn.Linear(12, 2)

        def forward(self, x):
            q = self.q(self.latents.repeat(len(x), 1, 1))
            return self.o(F.scaled_dot_product_attention(q, self.k(x), self.v(x)))

    torch.manual_seed(0)
    assert left(Latents(), torch.randn(2, 6, 5)) < 0.6


@pytest.mark.parametrize("full", [True, False])
def test_masks_of_one_value(full):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 2)

        def forward(self, x, mask):
            keep = mask[..., None]
            return self.o(self.b((self.a(x).relu() * keep).sum(1) / keep.sum(1)).relu())

    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = full
    assert left(Masked(), (torch.randn(2, 6, 5), mask)) < 0.5


def test_attention_by_a_vector():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w, self.o = nn.Linear(5, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 2)

        def forward(self, x):
            h = self.a(x).tanh()
            return self.o((h * (h @ self.w).softmax(1)[..., None]).sum(1))

    assert left(Pooled(), torch.randn(2, 6, 5)) < 0.6


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers_with_projections():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.o = nn.Linear(5, 8), nn.Linear(6, 2)
            self.r = nn.LSTM(8, 12, proj_size=6, batch_first=True)

        def forward(self, x):
            return self.o(self.r(self.i(x).relu())[0])

    model = Projected().eval()
    Pruner(model, torch.randn(2, 4, 5)).prune_model(0.5)
    assert model.i.out_features == model.r.input_size == 4
    assert (model.r.hidden_size, model.r.proj_size) == (6, 3)
    model.train()(torch.randn(3, 4, 5)).sum().backward()


# --- weights and gates ---------------------------------------------------------------------------


def test_masks_of_torch_prune():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
    model.append(nn.Conv2d(6, 2, 1))
    torch_prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    with torch.no_grad():
        model[0].bias[(model[0].weight == 0).flatten(1).all(1)] = 0
    x = torch.randn(2, 3, 7, 7)
    before = model(x)
    Pruner(model, x).prune_model()
    assert model[0].weight_orig.shape == model[0].weight_mask.shape == (4, 3, 3, 3)
    assert model[0].out_channels == model[2].in_channels == 4
    assert apart(before, model(x)) < 1e-6
    model(torch.randn(3, 3, 9, 9)).sum().backward()


def test_weights_that_are_added_up():
    """As in a RepVGG that is trained as one conv: a channel is zero where all of them are."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.w3 = nn.Parameter(torch.randn(8, 3, 3, 3))
            self.w1, self.w0 = (nn.Parameter(torch.randn(8, 3, 1, 1)) for _ in range(2))
            self.o = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            weight = self.w3 + F.pad(self.w1 + self.w0, (1, 1, 1, 1))
            return self.o(F.conv2d(x, weight, padding=1).relu())

    torch.manual_seed(0)
    model, x = Sum(), torch.randn(2, 3, 7, 7)
    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    zero = [(w == 0).flatten(1).all(1) for w in (model.w3, model.w1, model.w0)]
    assert zero[0].sum() == 4 and torch.equal(zero[0], zero[1]) and torch.equal(zero[0], zero[2])
    before = model(x)
    Pruner(model, x).prune_model()
    assert len(model.w3) == len(model.w1) == len(model.w0) == model.o.in_channels == 4
    assert apart(before, model(x)) < 1e-6


def test_gated_linear_units():
    def make():
        torch.manual_seed(0)
        gated = [nn.Conv1d(3, 16, 3), nn.GLU(1), nn.Conv1d(8, 16, 3), nn.GLU(1), nn.Conv1d(8, 2, 1)]
        return nn.Sequential(*gated).double()

    x = torch.randn(2, 3, 20, dtype=torch.float64)
    assert left(make(), x) < 0.6
    model = make()
    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    before = model(x)
    Pruner(model, x).prune_model()
    assert [model[i].out_channels for i in (0, 2)] == [8, 8] and apart(before, model(x)) < 1e-12


NORMED = {
    "weight, hook": nn.utils.weight_norm,
    "weight": nn.utils.parametrizations.weight_norm,
    "spectral, hook": nn.utils.spectral_norm,
    "spectral": nn.utils.parametrizations.spectral_norm,
}


def normed_convs(normed):
    torch.manual_seed(0)
    layers = [normed(nn.Conv1d(3, 16, 3)), nn.ReLU(), normed(nn.ConvTranspose1d(16, 12, 3))]
    layers += [nn.ReLU(), normed(nn.Conv1d(12, 10, 3)), nn.ReLU(), nn.Conv1d(10, 2, 1)]
    return nn.Sequential(*layers).double().eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("how", NORMED)
def test_weights_that_are_computed_from_a_norm_stay_the_same(how):
    model, x = normed_convs(NORMED[how]), torch.randn(2, 3, 20, dtype=torch.float64)
    model(x)
    before = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    pruner = Pruner(model, x)
    assert set(pruner.axes().layer) == {"0", "2", "4", "6"}
    pruner.prune_model(0.5)
    assert [model[i].out_channels for i in (0, 2, 4)] == [8, 6, 5]
    rows, out, last = (list(pruner.plan.kept[f"{i}.bias"][0]) for i in (0, 2, 4))
    expected = [before[0][rows], before[1][rows][:, out], before[2][last][:, out]]
    for i, weight in zip((0, 2, 4), expected, strict=True):
        torch.testing.assert_close(model[i].weight, weight)
    model.train()
    model(x).sum().backward()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("how", NORMED)
def test_filters_of_weights_that_are_computed_from_a_norm(how):
    """Where a direction is zero weight norm divides by zero: the length is what goes."""
    model, x = normed_convs(NORMED[how]), torch.randn(2, 3, 20, dtype=torch.float64)
    sparsifier = Sparsifier(model, "filter", example_inputs=x)
    sparsifier.sparsify_model(0.5)
    costs = sparsifier.report().groupby("layer")[["macs", "zero_macs"]].sum()
    dense = macs(model, x)
    assert all(costs.zero_macs[k] == costs.macs[k] / 2 == dense[k] / 2 for k in "024")
    before = model(x)
    assert before.isfinite().all() and (model[0].weight == 0).flatten(1).all(1).sum() == 8
    Pruner(model, x).prune_model()
    assert apart(before, model(x)) < 1e-12
    assert model[0].out_channels == 8 and model[4].out_channels == 5


@pytest.mark.parametrize("cut_again", [False, True])
def test_a_cut_that_is_taken_back_leaves_spectral_norms_alone(cut_again):
    model, x = normed_convs(nn.utils.parametrizations.spectral_norm).train(), torch.randn(2, 3, 20)
    before = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, x.double())
    pruner.plan_for(0.5)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    if cut_again:
        pruner.prune_model(0.25)
        pruner.prune_model(0.5)
        assert model[0].out_channels == 6


class Cosines(nn.Module):
    def __init__(self, learned):
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 24))
        self.w, self.learned = nn.Parameter(torch.randn(10, 24)), learned

    def forward(self, x):
        return F.normalize(self.f(x)) @ (F.normalize(self.w) if self.learned else self.w).T


@pytest.mark.filterwarnings("ignore:nothing was removed")
@pytest.mark.parametrize("learned", [False, True])
def test_features_of_length_one(learned):
    model, x = Cosines(learned).double(), torch.randn(4, 6, dtype=torch.float64)
    pruner = Pruner(model, x)
    pruner.prune_model(0.5)
    assert model.f[2].out_features == model.w.shape[1] == 12 and model(x).shape == (4, 10)
    assert pruner.max_rel_diff < 1e-12
    model = Cosines(learned).double()
    with torch.no_grad():
        model.f[2].weight[::2] = model.f[2].bias[::2] = 0
    before = model(x)
    Pruner(model, x).prune_model()  # the length of a class counts columns that meet zeros
    assert apart(before, model(x)) < 1e-12 and (model.f[2].out_features == 12) != learned


def test_bilinear_layers():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.c, self.b = nn.Linear(6, 16), nn.Linear(6, 12), nn.Bilinear(16, 12, 8)
            self.o = nn.Linear(8, 3)

        def forward(self, x):
            return self.o(self.b(self.a(x).relu(), self.c(x).tanh()).relu())

    model, x = Pair().double(), torch.randn(4, 6, dtype=torch.float64)
    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    before = model(x)
    Pruner(model, x).prune_model()
    assert model.b.weight.shape == (4, 8, 6) and apart(before, model(x)) < 1e-12
    assert (model.b.in1_features, model.b.in2_features, model.b.out_features) == (8, 6, 4)
    assert left(Pair().double(), x) < 0.25


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True}, {}])
def test_attention_with_more_keys_than_it_is_given(options):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.i, self.o = nn.Linear(6, 16), nn.Linear(16, 3)
            self.m = nn.MultiheadAttention(16, 4, batch_first=True, **options)

        def forward(self, x):
            x = self.i(x)
            return self.o(self.m(x, x, x)[0])

    model, x = Attention().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    before = model(x)
    Pruner(model, x).prune_model()
    assert model.m.embed_dim == 8 and apart(before, model(x)) < 1e-12


class Transposed(nn.Module):
    """A linear layer as GPT-2 has it, which remembers how many features it makes."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = (
            nn.Parameter(torch.randn(nx, nf) / 6),
            nn.Parameter(torch.zeros(nf)),
        )

    def forward(self, x):
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return out.view(*x.shape[:-1], self.nf)


def test_a_layer_that_reads_as_many_features_as_it_makes():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.width, self.heads, self.stem = 24, 3, nn.Linear(6, 24)
            self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 3)
            self.qkv, self.proj = Transposed(72, 24), Transposed(24, 24)

        def forward(self, x):
            x = self.norm(self.stem(x))
            q, k, v = self.qkv(x).split(self.width, dim=2)
            q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.head(x + self.proj(y))

    model, x = Packed(), torch.randn(2, 5, 6)
    Sparsifier(model, "filter", layers=["qkv"], example_inputs=x).sparsify_model(0.5)
    before, pruner = model(x), Pruner(model, x)
    pruner.prune_model()
    assert len(pruner.kept()) == 0 and model.qkv.weight.shape == (24, 36)
    assert (model.width, model.qkv.nf, model.proj.nf) == (12, 36, 24)
    assert apart(before, model(x)) < 1e-5


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_a_mixture_of_experts():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.width, self.i = 32, nn.Linear(6, 32)
            self.router, self.o = nn.Linear(32, 4), nn.Linear(32, 3)
            self.up = nn.Parameter(torch.randn(4, 48, 32) / 6)
            self.down = nn.Parameter(torch.randn(4, 32, 48) / 6)

        def forward(self, x):
            h = self.i(x).view(-1, self.width)
            expert = self.router(h).argmax(1)
            order = expert.argsort()
            ends = F.one_hot(expert, 4).sum(0).cumsum(0).to(torch.int32)
            y = F.grouped_mm(h[order], self.up.transpose(1, 2), offs=ends).relu()
            y = F.grouped_mm(y, self.down.transpose(1, 2), offs=ends)
            return self.o(h + y[order.argsort()])

    def by_hand(model, x):
        h = model.i(x)
        expert = model.router(h).argmax(1)
        pairs = [(model.up[e], model.down[e]) for e in expert]
        y = [down @ (up @ v).relu() for v, (up, down) in zip(h, pairs, strict=True)]
        return model.o(h + torch.stack(y))

    model, x = Mixture(), torch.randn(16, 6)
    assert macs(model, x)[""] == 6 * 32 + 32 * 4 + 2 * 48 * 32 + 32 * 3
    assert apart(by_hand(model, x), model(x)) < 1e-5
    with torch.no_grad():
        model.up[:, ::2] = 0
    before = model(x)
    Pruner(model, x).prune_model()
    assert model.up.shape == (4, 24, 32) and model.down.shape == (4, 32, 24)
    assert apart(before, model(x)) < 1e-5


class Heads(nn.Module):
    """Queries and keys that are normalised head by head, with one scale for all heads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.q, self.k, self.v = (nn.Linear(12, 24) for _ in range(3))
        self.o = nn.Linear(24, 5)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (self.scale * y * (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
        y = (q @ k.mT).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def test_heads_that_are_normalised_one_by_one():
    model = Heads()
    Pruner(model, torch.randn(2, 7, 12)).prune_model(0.5)
    assert model.q.out_features == model.k.out_features == model.v.out_features == 12
    assert len(model.scale) == 3
    model.train()(torch.randn(3, 5, 12)).sum().backward()


def test_maxima_of_pieces_go_with_their_pieces():
    class Maxout(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.o = nn.Linear(6, 24), nn.Linear(8, 3)

        def forward(self, x):
            return self.o(self.a(x).unflatten(1, (-1, 3)).amax(2))

    model, x = Maxout().double(), torch.randn(4, 6, dtype=torch.float64)
    pruner = Pruner(model, x)
    pruner.prune_model(0.5)
    assert (model.a.out_features, model.o.in_features) == (12, 4)


def test_weights_that_are_products():
    """A learned query that a layer reads, and an adapter's product that is added to a weight."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.i, self.q, self.k = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(8, 12)
            self.up, self.down = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 16))
            self.weight = nn.Parameter(torch.randn(8, 16))
            self.queries, self.o = nn.Parameter(torch.randn(7, 16)), nn.Linear(7, 3)

        def forward(self, x):
            x = F.linear(self.i(x).relu(), self.weight + self.up @ self.down).relu()
            return self.o(self.k(x) @ self.q(self.queries).T)

    model, x = Adapted().double(), torch.randn(4, 6, dtype=torch.float64)
    pruner = Pruner(model, x)
    pruner.prune_model(0.5)
    assert (
        model.up.shape == (4, 6) and model.down.shape == (6, 8) and model.queries.shape == (3, 16)
    )
    assert model.q.out_features == model.k.out_features == 6 and pruner.max_rel_diff < 1e-12


def test_heads_as_wide_as_groups_of_channels_that_stay():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.at, self.heads = nn.Conv1d(16, 16, 3, padding=1, groups=4), nn.Module()
            self.heads.q, self.heads.k = nn.Linear(16, 16), nn.Linear(16, 16)
            self.heads.o, self.heads.head_dim = nn.Linear(16, 16), 4

        def forward(self, x):
            x = x + self.at(x.transpose(1, 2)).transpose(1, 2)
            q, k = (
                f(x).unflatten(-1, (-1, self.heads.head_dim)).transpose(1, 2)
                for f in (self.heads.q, self.heads.k)
            )
            return x + self.heads.o((q * k).transpose(1, 2).flatten(2))

    model = Positions()
    Pruner(model, torch.randn(2, 5, 16)).prune_model(0.5)
    assert model.heads.q.out_features == 8 and model.heads.head_dim == 2


def test_deformable_convs():
    class Deformed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.at = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 18, 3, padding=1)
            self.d, self.o = torchvision.ops.DeformConv2d(8, 12, 3, padding=1), nn.Conv2d(12, 2, 1)

        def forward(self, x):
            return self.o(self.d(self.a(x).relu(), self.at(x)).relu())

    model = Deformed().eval()
    Pruner(model, torch.randn(2, 3, 9, 9)).prune_model(0.5)
    assert model.a.out_channels == 4 and model.d.weight.shape[:2] == (6, 4)


# --- how it is called ----------------------------------------------------------------------------


def test_budgets_of_networks_that_run_on_views_of_parameters():
    class Slots(nn.Module):
        def __init__(self):
            super().__init__()
            self.slots, self.n = nn.Parameter(torch.randn(1, 3, 16)), nn.LayerNorm(16)
            self.f, self.o = nn.Linear(16, 32), nn.Linear(32, 2)

        def forward(self, x):
            slots = self.n(self.slots.expand(len(x), -1, -1))
            return self.o(self.f(slots).relu() + x.mean())

    model, x = Slots().eval(), torch.randn(2, 5)
    before = macs(model, x)[""]
    assert before == 3 * (16 * 32 + 32 * 2) and model.slots.requires_grad
    Pruner(model, x).prune_model(Target(macs=0.5))
    assert macs(model, x)[""] <= before / 2


def test_inside_of_inference_mode():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    normed = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.inference_mode():
        Pruner(model, x).prune_model(0.5)
        recalibrate_bn(normed, [(torch.randn(4, 3, 8, 8),)])
    assert normed[1].running_mean.any()
    assert model[0].out_features == 4 and not any(p.is_inference() for p in model.parameters())


class Adaptive(nn.Module):
    """A block whose norms have no weights, which it gets from a condition (DiT, 2212.09748)."""

    def __init__(self, width, norm):
        super().__init__()
        self.norm = norm(width, elementwise_affine=False)
        self.scale = nn.Linear(3, width)
        self.inner, self.outer = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x, c):
        return x + self.outer(self.inner(self.norm(x) * self.scale(c)).relu())


class Conditioned(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.blocks = nn.ModuleList([Adaptive(12, norm) for _ in range(2)])

    def forward(self, x, c):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_without_weights_follow_what_they_normalise(norm):
    torch.manual_seed(0)
    model, x = Conditioned(norm).double().eval(), (torch.randn(2, 6).double(), torch.randn(2, 3))
    x = x[0], x[1].double()
    pruner = Pruner(model, x)
    pruner.prune_model(0.5)
    assert [tuple(b.norm.normalized_shape) for b in model.blocks] == [(6,), (6,)]
    assert model.embed.out_features == 6 and model.blocks[0].inner.out_features == 10
    fresh = Conditioned(norm).double().eval()
    pruner.plan.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(*x), model(*x))


@pytest.mark.parametrize("verify", [True, False])
def test_norms_without_weights_cannot_remember_a_width(verify):
    torch.manual_seed(0)
    model, x = Conditioned(nn.LayerNorm).double().eval(), (torch.randn(2, 6), torch.randn(2, 3))
    x = tuple(part.double() for part in x)
    Sparsifier(model, "filter", example_inputs=x, mixed=True).sparsify_model(0.5)
    before = model(*x)
    Pruner(model, x).prune_model(verify=verify)
    assert model.embed.out_features == 12 and model.blocks[0].inner.out_features == 10
    assert apart(before, model(*x)) < 1e-12


@pytest.mark.parametrize("shape", [(8,), (6, 8)])
def test_a_layer_norm_of_fixed_size_keeps_what_it_normalises(shape):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 10), nn.Linear(10, 3)

        def forward(self, x):
            return self.c(self.b(F.layer_norm(self.a(x), shape)).relu())

    model, x = Normed(), torch.randn(2, 6, 5)
    pruner = Pruner(model, x)
    pruner.prune_model(0.5)
    assert model(x).shape == (2, 6, 3)
    assert (model.a.out_features, model.b.out_features) == (8, 5)
    assert "a" in set(pruner.kept()["layer"])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers, both", [(1, False), (2, True)])
def test_recurrent_layers_that_read_the_input(kind, layers, both):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(5, 12, layers, batch_first=True, bidirectional=both)
            self.head = nn.Linear(24 if both else 12, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Last().double().eval(), torch.randn(4, 6, 5).double()
    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    before = model(x)
    pruner = Pruner(model, x)
    pruner.prune_model()
    assert model.rnn.hidden_size == 6 and pruner.kept().empty
    assert apart(before, model(x)) < 1e-12


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_inputs_are_refused():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x, edges):
            return self.b((edges @ self.a(x)).relu())

    edges = (torch.rand(7, 7) > 0.5).float()
    for sparse in (edges.to_sparse(), edges.to_sparse_csr()):
        with pytest.raises(TypeError, match="dense tensors, got one of torch.sparse_"):
            Pruner(Graph(), (torch.randn(7, 5), sparse))
