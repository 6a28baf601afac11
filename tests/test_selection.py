"""Selections in pieces against a stable sort, on weights of any kind."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.core import ranking, selection
from fasterai.core.criteria import Criterion, large_final, small_final, squared_final
from fasterai.core.masks import Limits, choose_cuts, select
from fasterai.core.ranking import ElementRanking, ScoreRanking, pieces
from fasterai.core.selection import write_kept
from fasterai.sparse.sparsifier import Sparsifier

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
identity = Criterion(lambda w: w, "identity", elementwise=True)
CRITERIA = [large_final, squared_final, small_final, identity]


def lowest(scores, n):
    """Marks of the n lowest of all scores, where nothing is held."""
    held = [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    return select(scores, n, held=held, limits=Limits(min_keep=0))


def stable_sort(scores, held, n):
    """Marks of the n to zero: what is held, then the lowest, in the order of layers and groups."""
    flat = np.concatenate([s.double().flatten().numpy() for s in scores])
    kept = ~np.concatenate([h.flatten().numpy() for h in held])
    order = np.lexsort((np.arange(len(flat)), flat, kept))
    gone = np.zeros(len(flat), dtype=bool)
    gone[order[:n]] = True
    parts = np.split(gone, np.cumsum([s.numel() for s in scores])[:-1])
    return [torch.from_numpy(p).view(s.shape) for p, s in zip(parts, scores, strict=True)]


def zeros_held(weight):
    held = weight == 0
    return held & ~held.all()


def kept_by(rankings, cuts, weights):
    masks = [torch.full_like(w, 7, dtype=torch.uint8) for w in weights]
    for r, cut, mask in zip(rankings, cuts, masks, strict=True):
        r.write_held(mask) if cut is None else write_kept(r, cut, mask)
    return masks


def check(weights, criterion, share, counts=None):
    """Element by element as `share` of a stable sort says, globally or one count a layer."""
    held = [zeros_held(w) for w in weights]
    scores = [criterion(w) for w in weights]
    rankings = [ElementRanking(w, criterion) for w in weights]
    floors = [int(h.sum()) for h in held]
    assert [r.held for r in rankings] == floors
    if counts is None:
        counts = round(share * sum(w.numel() for w in weights))
        expected = stable_sort(scores, held, max(counts, sum(floors)))
    else:
        every = zip(scores, held, counts, floors, strict=True)
        expected = [stable_sort([s], [h], max(n, f))[0] for s, h, n, f in every]
    cuts = choose_cuts(rankings, counts, limits=Limits(0))
    for mask, gone in zip(kept_by(rankings, cuts, weights), expected, strict=True):
        assert torch.equal(mask, (~gone).to(torch.uint8))


shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4)
values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, 1e-7]) | st.floats(
    -8, 8, width=16
)


@st.composite
def weights_of(draw):
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
    size = math.prod(shape)
    weight = torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype)
    weight = weight.view(shape)
    if weight.ndim == 4 and draw(st.booleans()):
        return weight.contiguous(memory_format=torch.channels_last)
    return weight.mT if weight.ndim > 1 and draw(st.booleans()) else weight


@pytest.fixture(params=["few at once", "pieces and samples", "digits"])
def way(request, monkeypatch):
    """Small weights take the ways of large ones."""
    if request.param != "few at once":
        monkeypatch.setattr(selection, "_FEW", 0)
        monkeypatch.setattr(ranking, "_PIECE", 3)
        monkeypatch.setattr(selection, "_PART", 1)
    if request.param == "digits":
        monkeypatch.setattr(selection, "_bracket", lambda rankings, n: (-1e9, -1e9))


@settings(deadline=None, suppress_health_check=["function_scoped_fixture"])
@given(weights=st.lists(weights_of(), min_size=1, max_size=4), data=st.data())
def test_elements_are_chosen_as_by_a_stable_sort(way, weights, data):
    criterion = data.draw(st.sampled_from(CRITERIA))
    share = data.draw(st.floats(0, 1))
    check(weights, criterion, share)
    check(weights, criterion, share, [round(share * w.numel()) for w in weights])


@settings(deadline=None, suppress_health_check=["function_scoped_fixture"])
@given(scores=st.lists(weights_of(), min_size=1, max_size=4), data=st.data())
def test_scores_are_chosen_as_by_a_stable_sort(way, scores, data):
    scores = [s.flatten() for s in scores]
    held = [
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s)))).bool()
        for s in scores
    ]
    share = data.draw(st.floats(0, 1))
    n = max(round(share * sum(map(len, scores))), sum(int(h.sum()) for h in held))
    # beside the held ones, -inf is the lowest number
    finite = [s if s.dtype == torch.float64 else s.float() for s in scores]
    got = select(scores, n, held=held, limits=Limits(0))
    for a, b in zip(got, stable_sort(finite, held, n), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: c.name)
def test_large_weights_of_all_types(dtype, criterion):
    generator = torch.Generator().manual_seed(1)
    made = [(300, 211), (7,), (64, 32, 3, 3), (1, 150_001), (0, 4), (5, 2, 7000)]
    weights = [torch.randn(s, generator=generator).to(dtype) for s in made]
    weights[2] = weights[2].contiguous(memory_format=torch.channels_last)
    weights[0][::3] = 0.0
    weights[0][1::3] *= 1e-3
    weights[5] = weights[5].transpose(0, 2)
    for share in (0.001, 0.2, 0.23, 0.5, 0.999, 1.0):
        check(weights, criterion, share)
    check(weights, criterion, None, [30_000, 3, 9, 150_001, 0, 69_999])


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(50_000),
        torch.ones(50_000),
        (torch.arange(50_000) % 37 == 0).float(),
        torch.arange(50_000).float(),
        torch.full((50_000,), math.inf),
        torch.randn(50_000, generator=torch.Generator().manual_seed(0)).mul(2).round(),
    ],
    ids=["zeros", "ones", "periodic", "sorted", "infinities", "ties"],
)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: c.name)
def test_a_sample_that_misleads(weight, criterion):
    other = torch.linspace(-1, 1, 9000)
    for share in (0.0001, 0.31, 0.5, 0.9):
        check([weight, other], criterion, share)


def test_layers_of_different_precision_are_compared_exactly():
    fine = torch.linspace(1.0, 1.0 + 2**-22, 9001, dtype=torch.float64)
    coarse = torch.linspace(1.0, 1.0 + 2**-22, 9001, dtype=torch.float32)
    for share in (0.1, 0.5, 0.7):
        check([coarse, fine], large_final, share)


@given(shape=shapes, most=st.integers(1, 9))
def test_pieces_are_the_tensor_in_order(shape, most):
    before, ranking._PIECE = ranking._PIECE, most
    try:
        tensor = torch.arange(math.prod(shape)).view(shape)
        found = list(pieces(tensor))
        assert torch.equal(torch.cat([p.flatten() for p in found]), tensor.flatten())
        assert all(p.numel() <= most for p in found)
        other = tensor.transpose(0, -1).contiguous().transpose(0, -1)  # the same, in other order
        assert [p.shape for p in pieces(other)] == [p.shape for p in found]
    finally:
        ranking._PIECE = before


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("sparsity", [0.001, 0.5, 1.0])
@pytest.mark.parametrize("criteria", CRITERIA[:3], ids=lambda c: c.name)
def test_nan_is_refused_by_name_before_anything_changes(context, sparsity, criteria):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 2))
    sparsifier = Sparsifier(model, context=context, criteria=criteria, min_keep=0)
    sparsifier.sparsify_model(0.0005)
    with torch.no_grad():
        model[1].weight[250, 7] = math.nan
    weights, masks = copy.deepcopy(model.state_dict()), copy.deepcopy(sparsifier.masks)
    with pytest.raises(ValueError, match="nan for 1.weight"):
        sparsifier.sparsify_model(sparsity)
    for name, mask in sparsifier.masks.items():
        assert torch.equal(mask, masks[name])
        assert torch.equal(model.state_dict()[name].nan_to_num(9), weights[name].nan_to_num(9))


def test_scores_of_any_function_are_asked_for_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200), nn.Linear(200, 2))
    calls = []

    def drawn(weight):
        calls.append(weight.shape)
        return torch.rand(weight.shape)

    sparsifier = Sparsifier(model, context="global", criteria=drawn)
    sparsifier.sparsify_model(0.5)
    assert calls == [(200, 200)] * 2
    assert sum(int((m.weight == 0).sum()) for m in model[:2]) == 40_000


@pytest.mark.parametrize("elementwise", [True, False])
def test_scores_may_depend_on_what_learns(elementwise):
    factor = nn.Parameter(torch.tensor(2.0))
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 2))
    criterion = Criterion(lambda w: (w * factor).abs(), elementwise=elementwise)
    Sparsifier(model, "weight", criteria=criterion).sparsify_model(0.5)
    assert int((model[0].weight == 0).sum()) == 20_000


@pytest.mark.parametrize("context", ["local", "global"])
def test_elements_and_kept_scores_give_the_same_masks(context):
    """Over a training with growing sparsity, floors and multiples."""
    found = []
    for criteria in (large_final, Criterion(torch.abs)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(90, 128), nn.Linear(128, 90), nn.Linear(90, 2))
        with torch.no_grad():
            model[1].weight.mul_(0.01)
        sparsifier = Sparsifier(model, "weight", context, criteria, min_keep=5, round_to=8)
        for share in (0.3, 0.6, 0.99):
            sparsifier.sparsify_model(share)
            model(torch.randn(4, 90)).square().sum().backward()
            torch.optim.SGD(model.parameters(), 1e-3).step()
            sparsifier.apply()
        found.append({k: m.clone() for k, m in sparsifier.masks.items()})
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())
    assert all((int(mask.sum()) % 8 == 0) for mask in found[0].values())


def test_the_lowest_of_one_and_of_none():
    assert lowest([torch.tensor([3.0])], 1)[0].tolist() == [True]
    assert lowest([torch.tensor([3.0])], 0)[0].tolist() == [False]
    assert [x.tolist() for x in lowest([torch.zeros(0), torch.tensor([1.0, 0.0])], 1)] == [
        [],
        [False, True],
    ]
    assert select([], 0, held=[]) == []
    assert ScoreRanking(lambda: torch.zeros(0), torch.zeros(0, dtype=torch.bool)).held == 0
