"""Zero channels under norms, in attention, and constants: removed, and the function stays."""

import copy

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import Attention, Normed, apart, images, lively, make, sequences, shake
from torch import nn

from fasterai.coupling.norms import NarrowGroupNorm, NarrowLayerNorm
from fasterai.prune.plan import Plan
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier

tv = torchvision.models


def test_queries_keys_values_and_hidden_units_go_and_the_scale_is_made_good():
    model = lively(Attention())
    Sparsifier(model, "filter", example_inputs=sequences()).sparsify_model(0.5)
    zero = (model.qkv.weight == 0).all(1).view(3, 3, 8)
    assert zero.sum(-1).eq(4).all() and torch.equal(zero[0], zero[1])
    assert not torch.equal(zero[2, 0], zero[2, 1])  # each head has its own weakest values
    sparse, pruner = copy.deepcopy(model), Pruner(model, sequences())
    pruner.prune_model()
    assert model.qkv.out_features == 3 * 3 * 4 and model.head_dim == 4 and len(pruner.kept()) == 0
    assert model.up.out_features == 20 and model.norm.normalized_shape == (24,)
    other = sequences(3, 5, seed=1)
    assert apart(sparse(other), model(other)) < 1e-12


def test_heads_go_as_a_whole_where_it_is_asked_for():
    model, x = lively(Attention(heads=6)), sequences()
    dense, before = copy.deepcopy(model), model.qkv.weight.detach().clone()
    sparsifier = Sparsifier(model, "filter", example_inputs=x, whole_heads=True, layers=["qkv"])
    sparsifier.sparsify_model(0.5)
    strength = before.abs().view(3, 6, 4, 24).mean((0, 2, 3))  # of queries, keys and values
    weakest = strength.argsort()[:3]
    zero = (model.qkv.weight == 0).all(1).view(3, 6, 4)
    assert zero[:, weakest].all() and zero.sum() == 3 * 3 * 4
    with torch.no_grad():
        dense.proj.weight.view(24, 6, 4)[:, weakest] = 0  # what a head says is not heard
    pruner = Pruner(model, x, whole_heads=True)
    pruner.prune_model()
    assert (model.heads, model.head_dim) == (3, 4) and model.qkv.out_features == 36
    other = sequences(3, 5, seed=1)
    assert apart(dense(other), model(other)) < 1e-12
    Pruner(model, x, whole_heads=True, exclude=["stem", "up"]).prune_model(0.7)
    assert (model.heads, model.head_dim) == (1, 4)
    assert model(other).shape == (3, 4)


class Tokens(nn.Module):
    """Attention over positions, some of which are parameters themselves."""

    def __init__(self, width=24):
        super().__init__()
        self.stem, self.register = nn.Linear(10, width), nn.Parameter(torch.zeros(1, 3, width))
        self.blocks = nn.ModuleList([Heads(width), Heads(width)])
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = torch.cat([self.register.expand(len(x), -1, -1), self.stem(x)], 1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


class Heads(nn.Module):
    def __init__(self, width, heads=3):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, _ = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_scales_are_made_good_once_for_each_layer():
    model, x = lively(Tokens()), sequences()
    Sparsifier(model, "filter", example_inputs=x).sparsify_model(0.5)
    sparse, pruner = copy.deepcopy(model), Pruner(model, x)
    pruner.prune_model()
    assert len(pruner.kept()) == 0 and [b.head_dim for b in model.blocks] == [4, 4]
    other = sequences(3, 5, seed=1)
    assert apart(sparse(other), model(other)) < 1e-12


def test_an_embedding_width_goes_where_it_is_asked_for():
    model = lively(Attention())
    x = sequences()
    Sparsifier(model, "filter", example_inputs=x, mixed=True).sparsify_model(0.5)
    sparse, keys = copy.deepcopy(model), list(model.state_dict())
    pruner = Pruner(model, x)
    pruner.prune_model()
    assert model.stem.out_features == 12 and list(model.state_dict()) == keys
    assert isinstance(model.norm, NarrowLayerNorm) and model.norm.width == 24
    other = sequences(3, 5, seed=1)
    assert apart(sparse(other), model(other)) < 1e-12
    once = copy.deepcopy(model)
    Sparsifier(model, "filter", example_inputs=x, mixed=True).sparsify_model(0.5)
    again = copy.deepcopy(model)
    Pruner(model, x).prune_model()
    assert model.stem.out_features == 6 and model.norm.width == 24
    assert apart(again(other), model(other)) < 1e-12 < apart(once(other), model(other))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(1, 8), nn.GroupNorm(2, 8)], ids=str
)
def test_norms_remember_their_width(norm):
    x = images(dtype=torch.float64)
    model = lively(Normed(copy.deepcopy(norm)))
    dense = copy.deepcopy(model)
    Sparsifier(model, "filter", example_inputs=x, mixed=True).sparsify_model(0.5)
    sparse, pruner = copy.deepcopy(model), Pruner(model, x)
    pruner.prune_model()
    assert model.a.out_channels == 4 and len(pruner.kept()) == 0
    other = images(3, 9, torch.float64, seed=5)
    assert apart(sparse(other), model(other)) < 1e-12
    model.train()(other).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="normalised over channels|mean over channels"):
        Sparsifier(dense, "filter", example_inputs=x)  # unless it is asked for


def test_narrow_norms_are_wide_norms_of_zeros():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    narrow = nn.LayerNorm(6, dtype=torch.float64)
    narrow.__class__, narrow.width, narrow.channel_dim = NarrowLayerNorm, 10, -1
    wide = F.layer_norm(F.pad(x, (0, 4)), (10,))[..., :6]
    assert torch.allclose(narrow(x), wide, atol=1e-12)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    group = nn.GroupNorm(2, 6, dtype=torch.float64)
    group.__class__, group.width = NarrowGroupNorm, 5
    padded = F.pad(x.view(2, 2, 3, 4, 4), (0, 0, 0, 0, 0, 2)).flatten(1, 2)
    wide = F.group_norm(padded, 2).view(2, 2, 5, 4, 4)[:, :, :3].flatten(1, 2)
    assert torch.allclose(group(x), wide, atol=1e-12)


def test_a_norm_that_was_narrowed_can_be_exported(tmp_path):
    model = lively(Attention()).float()
    x = sequences().float()
    Sparsifier(model, "filter", example_inputs=x, mixed=True).sparsify_model(0.5)
    Pruner(model, x).prune_model()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert apart(model(x), torch.from_numpy(got)) < 1e-4


def uncoupled(model, share=0.5, seed=0):
    """Zero filters of each layer by itself, and nothing else, as masks on weights do."""
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                rows = torch.randperm(m.out_channels, generator=generator)
                rows = rows[: int(share * m.out_channels)]
                m.weight[rows] = 0
                count += len(rows)
                if m.bias is not None:
                    m.bias[rows] = 0
    return count


def filters(model):
    return sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))


# For each network the share of the filters, zeroed layer by layer, that can go.
UNCOUPLED = {"resnet18": 0.5, "densenet121": 0.95, "mobilenet_v2": 0.9}
LONG = {"vgg16_bn": 0.95, "efficientnet_b0": 0.5, "shufflenet_v2_x1_0": 0.6}


@pytest.mark.parametrize(
    "name", [*UNCOUPLED, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)]
)
def test_filters_zeroed_layer_by_layer_go_at_any_resolution(name):
    torch.manual_seed(0)
    model = shake(tv.get_model(name, weights=None)).double().eval()
    zeroed, before = uncoupled(model), filters(model)
    sparse = copy.deepcopy(model)
    x = images(2, 64, torch.float64)
    pruner = Pruner(model, x)
    pruner.prune_model()
    gone = before - filters(model)
    assert gone >= {**UNCOUPLED, **LONG}[name] * zeroed
    for size in (64, 96, 80):
        other = images(2, size, torch.float64, seed=size)
        with torch.no_grad():
            assert apart(sparse(other), model(other)) < 1e-10


class Gated(nn.Module):
    """Channels meet a map from one channel that is silent on the example, and may speak."""

    def __init__(self, meet):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
        self.last, self.meet = nn.Conv2d(8, 4, 3), meet

    def forward(self, x):
        gate = (self.gate(x) - 100).relu()
        return self.last(self.meet(self.conv(x), gate)).mean((2, 3))


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("meet", [torch.add, torch.mul, torch.maximum])
def test_a_channel_is_no_constant_where_what_it_meets_may_move(meet, bias):
    torch.manual_seed(0)
    model = Gated(meet).double().eval()
    with torch.no_grad():
        model.conv.weight[:4] = 0
        model.conv.bias[:4] = bias
    dense, x = copy.deepcopy(model), images(2, 8).double()
    pruner = Pruner(model, x)
    if meet is torch.mul and not bias:  # zero times anything
        pruner.prune_model()
        assert model.conv.out_channels == 4
    else:
        with pytest.warns(UserWarning, match="nothing was removed"):
            pruner.prune_model()
        assert pruner.kept()["reason"].str.contains("changes with the input").all()
    assert not (dense.gate(x) > 100).any() and (dense.gate(1000 * x) > 100).any()
    assert apart(dense(1000 * x), model(1000 * x)) < 1e-12


class Masked(nn.Module):
    """Attention with learned biases for positions, beside what it makes its map is read."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8 + 5, 3)
        self.near = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        seen = (self.q(x) @ self.k(x).mT + self.near).softmax(-1)
        return self.out(torch.cat([seen @ self.v(x), seen], dim=-1))


def test_zeros_stay_zeros_beside_a_map_and_under_its_weights():
    model, x = make(Masked).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for layer, rows in ((model.q, [1, 4]), (model.k, [1, 4]), (model.v, [0, 2, 7])):
            layer.weight[rows] = layer.bias[rows] = 0
    sparse, pruner = copy.deepcopy(model), Pruner(model, x)
    pruner.prune_model()
    assert len(pruner.kept()) == 0
    assert [m.out_features for m in (model.q, model.k, model.v)] == [6, 6, 5]
    assert model.out.in_features == 5 + 5
    other = torch.randn(3, 5, 6, dtype=torch.float64)
    assert apart(sparse(other), model(other)) < 1e-12


class Correlated(nn.Module):
    """Positions are compared by what one layer makes of them, by the root of its width."""

    def __init__(self):
        super().__init__()
        self.encode, self.head = nn.Conv2d(3, 16, 3, stride=2), nn.Linear(49, 4)

    def forward(self, x):
        x = self.encode(x).flatten(2)
        width = torch.tensor(x.shape[1], device=x.device)
        return self.head((x.transpose(1, 2) @ x) / torch.sqrt(width)).mean(1)


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_both_sides_of_a_product_share_what_its_scale_changes(sparsity):
    torch.manual_seed(0)
    model = Correlated().double().eval()
    with torch.no_grad():
        model.encode.weight[:8] = model.encode.bias[:8] = 0
    dense, x = copy.deepcopy(model), images(2, 15).double()
    Pruner(model, x).prune_model(sparsity)
    assert model.encode.out_channels == 8
    assert apart(dense(x), model(x)) < 1e-12


class Square(nn.Module):
    """A table with as many rows as columns, of which code asks how many rows it has."""

    def __init__(self, n=8):
        super().__init__()
        self.table, self.out = nn.Embedding(n, n), nn.Linear(n, 2)

    def forward(self, i):
        return self.out(self.table(i.clamp(max=self.table.num_embeddings - 1)).relu())


def test_a_table_keeps_its_rows_where_its_columns_are_as_many():
    model, i = lively(Square()), torch.arange(8)
    Sparsifier(model, "filter", layers=nn.Embedding, example_inputs=i).sparsify_model(0.5)
    sparse = copy.deepcopy(model)
    pruner = Pruner(model, i[:2])
    pruner.prune_model()
    assert (model.table.num_embeddings, model.table.embedding_dim) == model.table.weight.shape
    assert model.table.weight.shape == (8, 4)
    assert apart(sparse(i), model(i)) < 1e-12


class Encoder(nn.Module):
    def __init__(self, norm_first, nested):
        super().__init__()
        self.embed = nn.Linear(10, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(16, 3)

    def forward(self, x, hidden=None):
        return self.head(self.layers(self.embed(x), src_key_padding_mask=hidden))


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first, nested", [(False, False), (True, False), (False, True)])
def test_fused_encoders_do_not_read_past_norms_that_remember(norm_first, nested):
    torch.manual_seed(0)
    model, x = Encoder(norm_first, nested).double().eval(), sequences(2, 6)
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[1, 4:] = True
    Sparsifier(model, "filter", example_inputs=x, mixed=True).sparsify_model(0.5)
    with torch.no_grad():
        before = torch.cat([model(x), model(x, hidden)])
        pruner = Pruner(model, x)
        pruner.prune_model()
        assert model.embed.out_features == 8
        assert apart(before, torch.cat([model(x), model(x, hidden)])) < 1e-12
    fresh = Encoder(norm_first, nested).double().eval()
    Plan.from_json(pruner.plan.to_json()).apply(fresh)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x, hidden), model(x, hidden))


class Padded(nn.Module):
    """Pads maps to a multiple of `n`, with zeros, after a layer and behind some halvings."""

    def __init__(self, n, halvings, kernel):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.n, self.halvings = n, halvings
        self.last = nn.Conv2d(8, 4, kernel, kernel)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        for _ in range(self.halvings):
            x = F.max_pool2d(x, 2, ceil_mode=True)
        return self.last(F.pad(x, (0, -x.shape[3] % self.n, 0, -x.shape[2] % self.n)))


@pytest.mark.parametrize("n, halvings, kernel", [(2, 0, 2), (2, 1, 2), (4, 0, 1), (8, 0, 2)])
def test_padding_that_the_example_does_not_need(n, halvings, kernel):
    model = lively(Padded(n, halvings, kernel))
    nn.init.constant_(model.norm.bias, 0.5)
    with torch.no_grad():
        model.first.weight[:4] = 0
    sizes = [images(2, size).double() for size in (16, 17, 22, 31)]
    before = [model(x) for x in sizes]
    pruner = Pruner(model, sizes[0])
    with pytest.warns(UserWarning, match="nothing was removed"):
        pruner.prune_model()
    assert list(pruner.kept()["unit"]) == [0, 1, 2, 3]
    assert all(torch.equal(model(x), y) for x, y in zip(sizes, before, strict=True))


class Powers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(4, 3)
        self.w = nn.Parameter(torch.randn(8, 3, 4))

    def forward(self, x):
        h = self.a(x).sigmoid()
        h = torch.stack([h, h**2, h**3], -1)
        return self.b(torch.einsum("bck,cko->bo", h, self.w).relu())


def test_constants_that_a_weight_sums_over_with_other_things_stay():
    model, x = make(Powers).double().eval(), torch.randn(4, 5).double()
    with torch.no_grad():
        model.a.weight[:4] = 0
    before = model(x)
    pruner = Pruner(model, x)
    with pytest.warns(UserWarning, match="nothing was removed"):
        pruner.prune_model()
    assert list(pruner.kept()["unit"]) == [0, 1, 2, 3] and torch.equal(model(x), before)
