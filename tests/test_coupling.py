"""The units that the labels find, against what one reads in the code of each network."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    ALL,
    Dense,
    Depthwise,
    Gated,
    Parted,
    Plain,
    Residual,
    Reused,
    TwoHeads,
    conv,
    images,
    make,
)
from torch import nn

from fasterai.coupling.couple import couple
from fasterai.coupling.inputs import Inputs, run_quietly
from fasterai.coupling.moving import _viewed, compact
from fasterai.prune.pruner import Pruner


def coupled(model, x=None):
    return couple(model, Inputs.of(images() if x is None else x))


def axis_of(coupling, layer):
    return next(a for a in coupling.axes if layer in a.producers)


def test_flatten_gives_every_channel_all_its_columns():
    axis = axis_of(coupled(make(Plain)), "b")
    columns = next(s for s in axis.slots if s.parameter == "fc1.weight" and s.dim == 1)
    assert axis.size == 12 and len(columns.index) == 12 * 16
    for unit in range(12):
        expected = range(unit * 16, unit * 16 + 16)
        assert columns.index[columns.unit == unit].tolist() == list(expected)


def test_filters_that_are_added_share_an_axis():
    coupling = coupled(make(Residual))
    axis = axis_of(coupling, "stem")
    assert axis.producers == ("stem", "c2", "c3")
    assert {s.parameter for s in axis.having("consume")} == {
        "c1.weight",
        "c3.weight",
        "head.weight",
    }
    assert {s.parameter for s in axis.having("shift")} == {
        "bn0.bias",
        "bn2.bias",
        "bn3.bias",
        "c3.bias",
    }
    assert {s.parameter for s in axis.having("scale")} == {"bn0.weight", "bn2.weight", "bn3.weight"}
    assert axis_of(coupling, "c1").producers == ("c1",)


def test_concatenated_channels_sit_where_cat_puts_them():
    coupling = coupled(make(Dense))
    norm = next(s for s in axis_of(coupling, "b").slots if s.parameter == "norm.weight")
    assert norm.index.tolist() == [8 + 3 + 4 + k for k in range(6)]
    columns = next(s for s in axis_of(coupling, "a").having("consume") if s.module == "c")
    assert columns.index.tolist() == [3, 4, 5, 6]


def test_depthwise_rows_go_with_their_channel():
    coupling = coupled(make(Depthwise))
    assert axis_of(coupling, "up").producers == ("up", "dw")
    axis = axis_of(coupling, "twice")
    rows = next(s for s in axis.having("produce") if s.module == "twice")
    assert axis.size == 8 and rows.unit.tolist() == [k // 2 for k in range(16)]


def test_gates_go_with_what_they_gate():
    coupling = coupled(make(Gated))
    assert axis_of(coupling, "a").producers == ("a", "excite")
    assert not any("spatial" in a.producers for a in coupling.axes)  # one channel, never cut


def test_a_layer_that_runs_twice_joins_what_goes_in_and_out():
    assert axis_of(coupled(make(Reused)), "a").producers == ("a", "twice")


def test_outputs_are_pinned_and_layers_that_never_run_are_in_no_axis():
    coupling = coupled(make(TwoHeads))
    assert coupling.outputs == ("boxes", "classes")
    for head in coupling.outputs:
        assert set(axis_of(coupling, head).pins) == {"network output"}
    assert not any("never" in a.producers for a in coupling.axes)
    assert axis_of(coupling, "b").pins == (None,) * 12


def test_what_a_chunk_splits_keeps_equally_many_in_each_half():
    axis = axis_of(coupled(make(Parted)), "b")
    assert axis.blocks == 2 and axis.bundles == 4 and not any(axis.pins)
    assert axis.block.tolist() == [0] * 4 + [1] * 4 and axis.place.tolist() == [0, 1, 2, 3] * 2
    assert axis.bundled(torch.tensor([7, 1, 0, 6, 5, 2, 3, 4])).tolist() == [
        [1, 7],
        [0, 6],
        [2, 5],
        [3, 4],
    ]


class Odd(nn.Module):
    """A conv, something done to its channels, another conv."""

    def __init__(self, between, width=8):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(width, 4)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.between = between

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


PINNING = {
    "cumsum": lambda s, x: x.cumsum(1),
    "roll": lambda s, x: x.roll(1, 1),
    "padded channels": lambda s, x: F.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:-1],
    "sort": lambda s, x: x.sort(1).values,
    "constant": lambda s, x: x + torch.arange(8.0).view(8, 1, 1),
    "unequal slices": lambda s, x: torch.cat([x[:, 3:], x[:, :3]], 1),
    "one of them": lambda s, x: x + x[:, 2:3],
    "written into": lambda s, x: (
        torch.empty(x.shape).copy_(x)[:, :8]
        + torch.empty(2, 8, 1, 1).copy_(x.mean((2, 3), keepdim=True))
    ),
    "index": lambda s, x: x[:, torch.arange(8)],
    "histogram": lambda s, x: x * torch.histc(x, 8).view(8, 1, 1),
    "fixed view": lambda s, x: x.view(-1, 8, 16, 16),
}

MIXING = {
    "softmax": lambda s, x: x.softmax(1),
    "where": lambda s, x: torch.where(x[:, :, :1, :1].mean() > 9, x, -1.0),
    "mean over channels": lambda s, x: x - x.mean(1, keepdim=True),
    "layer norm": lambda s, x: F.layer_norm(x, x.shape[1:]),
    "rms norm": lambda s, x: F.rms_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1),
    "group norm": lambda s, x: F.group_norm(x, 2),
    "python numbers": lambda s, x: x * float(x.max()),
}


@pytest.mark.parametrize("kind", PINNING)
def test_what_the_library_does_not_know_or_cannot_cut_pins(kind):
    axis = axis_of(coupled(Odd(PINNING[kind])), "a")
    assert all(axis.pins), kind


@pytest.mark.parametrize("kind", MIXING)
def test_what_computes_across_channels_is_noted(kind):
    axis = axis_of(coupled(Odd(MIXING[kind])), "a")
    assert axis.mixed or all(axis.pins), kind


FREE = {
    "functions": lambda s, x: F.gelu(torch.sigmoid(x) * 2 - 1).clamp(-1, 1).abs(),
    "in place": lambda s, x: F.hardswish(F.relu_(x.mul_(2)), inplace=True),
    "prelu": lambda s, x: F.prelu(x, torch.tensor([0.2])),
    "padded": lambda s, x: F.pad(F.pad(x, (1, 1, 1, 0)), (0, 0, 0, 1, 0, 0))[..., 1:-1],
    "layer scale": lambda s, x: x * s.scale + s.scale,
    "permuted": lambda s, x: x.permute(0, 2, 3, 1).contiguous().relu().permute(0, 3, 1, 2),
    "flattened": lambda s, x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "padded maps": lambda s, x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear"),
    "like": lambda s, x: x + torch.zeros_like(x),
    "masked": lambda s, x: torch.where(x > 0, x * (x > 0), 0.0).masked_fill(x > 9, 0.0),
    "maps side by side": lambda s, x: torch.cat([x, x.relu()], 2),
    "flip": lambda s, x: x.flip(1),
    "halves": lambda s, x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    "pixel shuffle": lambda s, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "channel shuffle": lambda s, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    "stack": lambda s, x: torch.stack([x, x.relu()], 1).sum(1),
    "zeros": lambda s, x: x + x.new_zeros(x.shape[1], 1, 1),
    "interleaved": lambda s, x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "dropout": lambda s, x: F.dropout(F.dropout2d(x, 0.5, s.training), 0.1, s.training),
    "instance norm": lambda s, x: F.instance_norm(x),
}


@pytest.mark.parametrize("kind", FREE)
def test_what_keeps_channels_apart_leaves_them_free(kind):
    axis = axis_of(coupled(Odd(FREE[kind])), "a")
    assert axis.bundles and not any(axis.pins) and not axis.mixed, (kind, axis.pins, axis.mixed)
    model = Odd(FREE[kind]).eval()
    before = model.b.in_channels
    Pruner(model, images()).prune_model(0.5)
    assert model.b.in_channels == before // 2


@pytest.mark.parametrize("kind", ALL)
def test_coupling_leaves_no_trace(kind):
    model = make(kind).train()
    model.register_forward_pre_hook(lambda *_: torch.rand(1) and None)  # uses random numbers
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    coupled(model)
    assert torch.equal(torch.rand(3), expected)
    assert flags == [m.training for m in model.modules()]
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_network_that_only_evaluates_or_only_then_has_a_part():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.aux = conv(3, 8), conv(8, 4), conv(8, 2)

        def forward(self, x):
            x = self.a(x)
            return (self.b(x), self.aux(x)) if self.training else self.b(x)

    network = coupled(Auxiliary())
    assert network.analysis.trains
    assert "aux.weight" in {s.parameter for s in axis_of(network, "a").having("consume")}

    class EvalOnly(Plain):
        def forward(self, x):
            if self.training:
                raise RuntimeError("eval only")
            return super().forward(x)

    network = coupled(EvalOnly())
    assert not network.analysis.trains and not any(axis_of(network, "a").pins)


def test_dropping_out_and_batch_statistics_make_training_no_other_network():
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), conv(8, 4)]
    assert not coupled(nn.Sequential(*layers)).analysis.trains


def test_inputs_of_all_forms():
    x = torch.arange(10.0).view(5, 2)
    assert Inputs.of(x).tensors[0].shape == (2, 2)
    assert Inputs.of((x, x[:1])).tensors[0].shape == (5, 2)  # no batch they agree on
    assert Inputs.of({"x": x}).kwargs["x"].shape == (2, 2)
    assert Inputs.of(x).batch(7).tensors[0].shape == (7, 2)
    assert Inputs.of(x[:1]).at_least(2).tensors[0].shape == (2, 2)

    class Image(torch.Tensor):
        pass

    assert type(Inputs.of(x.as_subclass(Image)).tensors[0]) is torch.Tensor
    for bad in (None, 3, "x", (), {}):
        with pytest.raises(TypeError, match="example_inputs must be"):
            Inputs.of(bad)


def test_random_inputs_have_the_form_of_the_example():
    x = torch.randn(4, 3) * 5 + 2
    other = Inputs.of((x, torch.tensor([1, 2, 3, 4])), samples=None).random_like()
    assert other.args[0].shape == x.shape and not torch.equal(other.args[0], x)
    assert torch.equal(other.args[1], torch.tensor([1, 2, 3, 4]))
    assert torch.equal(
        other.args[0], Inputs.of((x, torch.tensor([1, 2, 3, 4])), None).random_like().args[0]
    )


def test_inputs_the_model_cannot_run_on():
    with pytest.raises(ValueError, match=r"could not be run on the example inputs \(\(2, 5\)"):
        Inputs.fitting(make(Plain), torch.zeros(2, 5))


def test_run_quietly_restores_buffers_that_are_replaced():
    model = nn.BatchNorm1d(2)
    with run_quietly(model, training=True):
        model.running_mean = torch.ones(2)
        model(torch.randn(8, 2))
    assert torch.equal(model.running_mean, torch.zeros(2))
    assert np.allclose(model.running_var, 1) and int(model.num_batches_tracked) == 0


@st.composite
def views(draw):
    """Two shapes of as many elements, and labels that vary along some dimensions of the first."""
    primes = draw(st.lists(st.sampled_from([2, 2, 3, 5]), max_size=6))
    shapes = []
    for _ in range(2):
        order = draw(st.permutations(primes))
        cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=4)))
        ends = [0, *cuts, len(order)]
        shapes.append([math.prod(order[a:b]) for a, b in itertools.pairwise(ends)])
    varies = draw(st.lists(st.booleans(), min_size=len(shapes[0]), max_size=len(shapes[0])))
    return *shapes, [n if v else 1 for n, v in zip(shapes[0], varies, strict=True)]


@settings(max_examples=200, deadline=None)
@given(views())
def test_labels_of_a_view_lie_where_the_view_puts_the_elements(case):
    before, after, varying = case
    labels = torch.arange(math.prod(varying)).view(varying)
    viewed = _viewed(labels, before, after)
    assert torch.equal(viewed.expand(after), labels.expand(before).reshape(after))
    assert torch.equal(viewed, compact(viewed.clone()))


@pytest.mark.parametrize("constant", [False, True])
def test_attention_is_not_tied_to_what_it_reads_for_the_sake_of_another_layer(constant):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fixed, self.last = (
                nn.Linear(8, 16),
                nn.Linear(16, 12),
                nn.Linear(12, 3),
            )
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x):
            x = self.embed(x)
            q, k, v = (
                f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = self.fixed(self.o(x)).relu()
            return self.last(x.reshape(-1, 5, 12) if constant else x)

    found = couple(Heads(), Inputs.of(torch.randn(2, 5, 8)))
    bundles = {axis.name: axis.bundles for axis in found.axes}
    fixed = {"fixed": 0 if constant else 12}
    assert bundles == {"embed": 16, "q": 4, "v": 4, "o": 16, "last": 0} | fixed
