"""Layers without their channels of zeros: the same numbers at the same places."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import apart
from torch import nn

from fasterai.deploy.compact_layers import CompactLayer, can_be_compact, saving
from fasterai.measure.profile import macs


def emptied(layer, rows, columns=()):
    """A layer with rows and columns of zeros."""
    with torch.no_grad():
        layer.weight[list(rows)] = 0
        layer.weight[:, list(columns)] = 0
    return layer.double()


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
some = st.sets(st.integers(0, 5))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_conv(data):
    dims = data.draw(st.sampled_from([1, 2, 3]))
    depthwise = data.draw(st.booleans())
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    stride = data.draw(st.integers(1, 2))
    padding = data.draw(st.sampled_from([0, 1, "same"])) if stride == 1 else 1
    dilation, bias = data.draw(st.integers(1, 2)), data.draw(st.booleans())
    how = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
    layer = CONVS[dims](6, 6, 3, groups=6 if depthwise else 1, bias=bias, **how)
    layer = emptied(layer, data.draw(some), () if depthwise else data.draw(some)).eval()
    if bias and data.draw(st.booleans()):
        nn.init.constant_(layer.bias, 0.5)  # the same constant for all
    batch = data.draw(st.sampled_from([(), (1,), (3,)]))
    x = torch.randn(*batch, 6, *[5] * dims, dtype=torch.float64)
    with torch.no_grad():
        out = CompactLayer(layer)(x)
        assert out.shape == layer(x).shape
        assert torch.allclose(out, layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("rows, columns", [([0, 3], [1]), ([], [5]), ([2], []), ([], [])])
def test_linear_layers(rows, columns, shape, bias):
    layer = emptied(nn.Linear(6, 4, bias=bias), rows, columns)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(CompactLayer(layer)(x), layer(x), rtol=0, atol=1e-12)
    assert CompactLayer(layer).layer.weight.shape == (4 - len(rows), 6 - len(columns))


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 3), nn.Conv1d(3, 3, 1, groups=3)]
)
def test_a_layer_of_zeros(layer):
    """One row and one column stay: kernels of no channels do not exist everywhere."""
    layer = emptied(layer, range(3))
    x = torch.randn(2, 3 if getattr(layer, "groups", 1) == 3 else 4, 5, 5, dtype=torch.float64)
    x = x[..., 0] if layer.weight.ndim == 3 else x
    x = x.transpose(1, -1)[:, :, :, :4] if isinstance(layer, nn.Linear) else x
    with torch.no_grad():
        assert torch.equal(CompactLayer(layer)(x), layer(x))
    assert len(CompactLayer(layer).layer.weight) == 1


def test_what_is_computed_and_what_is_saved():
    layer = emptied(nn.Conv2d(8, 16, 3, padding=1), range(4), range(2)).float()
    assert saving(layer) == 1 - (12 * 6) / (16 * 8)
    x = torch.randn(1, 8, 10, 10)
    assert macs(CompactLayer(layer), x)[""] == 12 * 6 * 9 * 100
    depthwise = emptied(nn.Conv2d(8, 8, 3, groups=8), range(2))
    assert saving(depthwise) == 0.25
    assert not can_be_compact(nn.Conv2d(8, 8, 3, groups=2))
    assert not can_be_compact(nn.ConvTranspose2d(8, 8, 3))


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="not Conv2d.*groups=2"):
        CompactLayer(nn.Conv2d(8, 8, 3, groups=2))


def test_others_are_left_as_they_are_and_types_follow():
    layer = emptied(nn.Conv2d(8, 16, 3), range(4)).float()
    before = copy.deepcopy(layer.state_dict())
    compact = CompactLayer(layer).bfloat16()
    out = compact(torch.randn(1, 8, 5, 5).bfloat16())
    assert out.dtype == torch.bfloat16 and not out.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert CompactLayer(layer)(torch.randn(1, 8, 5, 5)).dtype == torch.bfloat16
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_the_order_of_memory_is_that_of_the_layer():
    layer = emptied(nn.Conv2d(8, 16, 3), range(4)).float()
    compact, x = CompactLayer(layer), torch.randn(2, 8, 6, 6)
    for form in (torch.channels_last, torch.contiguous_format):
        with torch.no_grad():
            dense, out = layer(x.to(memory_format=form)), compact(x.to(memory_format=form))
        assert out.stride() == dense.stride() and torch.allclose(out, dense, atol=1e-6)
    background = compact.background.clone()
    compact(torch.randn(8, 3, 3))
    assert torch.equal(compact.background, background)


def test_exported_programs():
    torch.manual_seed(0)
    inner = emptied(nn.Conv2d(3, 8, 3, padding=1), [1, 4, 5]).float()
    model = nn.Sequential(CompactLayer(inner), nn.ReLU(), nn.Flatten()).eval()
    dynamic = ({0: torch.export.Dim("n")},)
    program = torch.export.export(model, (torch.randn(2, 3, 4, 4),), dynamic_shapes=dynamic)
    x = torch.randn(5, 3, 4, 4)
    assert apart(program.module()(x), inner(x).relu().flatten(1)) < 1e-6


def test_files():
    first, second = (emptied(nn.Conv2d(3, 8, 3), [1, 4, 5]) for _ in range(2))
    there, back = CompactLayer(first), CompactLayer(second)
    back.load_state_dict(there.state_dict())
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(back(x), there(x))
