"""2:4 on GPUs: who is refused and why; where there is such a GPU, that it computes the same."""

import pytest
import torch
from torch import nn

from fasterai.deploy.semi_structured import _is_two_of_four, _unfit, semi_structured
from fasterai.sparse.sparsifier import Sparsifier

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def two_of_four(*sizes):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    model = nn.Sequential(*layers)
    Sparsifier(model, "2:4", layers=nn.Linear).sparsify_model(0.5)
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_what_is_missing_is_named():
    with pytest.raises(RuntimeError, match="torch sees no GPU here"):
        semi_structured(two_of_four(8, 8))


def test_machines_that_cannot_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"the model is on cpu, pass model.to\('cuda'\)"):
        semi_structured(two_of_four(8, 8))


def test_masks_of_the_pattern_are_known():
    weight = two_of_four(64, 32)[0].weight.detach()
    assert _is_two_of_four(weight) and int((weight != 0).sum()) == 64 * 32 // 2
    spoiled = weight.clone()
    spoiled[3, :3] = 1
    assert not _is_two_of_four(spoiled)
    assert not _is_two_of_four(weight.t().contiguous())
    assert not _is_two_of_four(torch.zeros(4, 6)) and not _is_two_of_four(torch.zeros(4))
    shifted = torch.tensor([[0.0, 0, 1, 1, 1, 1, 0, 0]])
    assert _is_two_of_four(shifted) and not _is_two_of_four(shifted.roll(2, 1))


def test_layers_that_cannot_are_named():
    layer = two_of_four(64, 32)[0]
    assert "model.bfloat16()" in _unfit(layer)
    assert _unfit(layer.bfloat16()) is None
    assert _unfit(nn.Linear(64, 32).half()) == "its weight is not 2:4"

    class Scaled(nn.Linear):
        pass

    assert "Scaled may read its weight" in _unfit(Scaled(64, 32).half())


@pytest.mark.skipif(not CAPABLE, reason="needs a GPU with sparse matrix units")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_with_half_of_the_numbers(dtype):
    model = two_of_four(256, 512, 128).to("cuda", dtype)
    model.append(nn.Linear(128, 5).to("cuda", dtype))
    small, table = semi_structured(model)
    assert table["reason"].tolist() == ["", "", "its weight is not 2:4"]
    x = torch.randn(64, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), rtol=2e-2, atol=2e-2)
    assert type(model[0].weight) is nn.Parameter
