"""Criteria and masks against brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterai.core.criteria import (
    as_criterion,
    large_final,
    random_scores,
    small_final,
    squared_final,
)
from fasterai.core.masks import Limits, apply_masks, as_fraction, select

# --- criteria ----------------------------------------------------------------------------------


def test_criteria_are_their_formulas():
    w = torch.randn(5, 4)
    assert torch.equal(large_final(w), w.abs())
    assert torch.equal(squared_final(w), w * w)
    assert torch.equal(small_final(w), -w.abs())
    assert random_scores(w).shape == w.shape
    torch.manual_seed(3)
    first = random_scores(w)
    torch.manual_seed(3)
    assert torch.equal(first, random_scores(w))
    assert large_final.reduced_by("sum").reduce == "sum" and large_final.reduce == "mean"


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda w: w.sum(), "one score per weight"),
        (lambda w: None, "one score per weight"),
        (lambda w: w * float("nan"), "nan for conv.weight"),
        (lambda w: w.to(torch.complex64), "real scores"),
    ],
)
def test_nonsense_scores_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        as_criterion(bad)(torch.randn(3, 3), "conv.weight")
    with pytest.raises(TypeError):
        as_criterion("large_final")


# --- masks -------------------------------------------------------------------------------------


def lowest(scores, n):
    """Marks of the n lowest of all scores, where nothing is held."""
    held = [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    return select(scores, n, held=held, limits=Limits(min_keep=0))


def brute(scores, n, held):
    """The n groups to zero: what is held, then the lowest, in the order of layers and groups."""
    ranked = sorted(
        (not h, float(s), layer, i)
        for layer, (ss, hh) in enumerate(zip(scores, held, strict=True))
        for i, (s, h) in enumerate(zip(ss.tolist(), hh.tolist(), strict=True))
    )
    chosen = {(layer, i) for _, _, layer, i in ranked[:n]}
    return [
        torch.tensor([(layer, i) in chosen for i in range(len(s))], dtype=torch.bool)
        for layer, s in enumerate(scores)
    ]


values = st.sampled_from([0.0, -0.0, 1.0, 2.0, 0.5, math.inf, 1e-30]) | st.floats(0, 10, width=32)
layers = st.lists(st.lists(values, min_size=1, max_size=12), min_size=1, max_size=4)


@given(layers=layers, share=st.floats(0, 1), data=st.data())
def test_global_selection_is_a_stable_sort(layers, share, data):
    scores = [torch.tensor(x, dtype=torch.float32) for x in layers]
    held = [
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
        for x in layers
    ]
    total = sum(len(x) for x in layers)
    n = max(round(share * total), sum(int(h.sum()) for h in held))
    got = select(scores, round(share * total), held=held, limits=Limits(0))
    for a, b in zip(got, brute(scores, n, held), strict=True):
        assert torch.equal(a, b)


@given(layers=layers, share=st.floats(0, 1), keep=st.integers(0, 3), to=st.integers(1, 4))
def test_local_selection_keeps_floors_and_multiples(layers, share, keep, to):
    scores = [torch.tensor(x, dtype=torch.float32) for x in layers]
    held = [torch.zeros(len(x), dtype=torch.bool) for x in layers]
    counts = [round(share * len(x)) for x in layers]
    got = select(scores, counts, held=held, limits=Limits(keep, to))
    for s, zero, n in zip(scores, got, counts, strict=True):
        size = len(s)
        allowed = [k for k in range(n + 1) if size - k >= min(keep, size) and (size - k) % to == 0]
        k = max(allowed, default=0)
        assert int(zero.sum()) == k
        assert torch.equal(zero, brute([s], k, [torch.zeros_like(zero)])[0])


@given(layers=layers, share=st.floats(0, 1), keep=st.integers(1, 3))
def test_global_floors_protect_the_best_of_each_layer(layers, share, keep):
    scores = [torch.tensor(x, dtype=torch.float32) for x in layers]
    held = [torch.zeros(len(x), dtype=torch.bool) for x in layers]
    order = [sorted(range(len(x)), key=lambda i: (x[i], i)) for x in layers]
    safe = [set(o[max(0, len(o) - keep) :]) for o in order]
    ranked = sorted(
        (x[i], layer, i)
        for layer, x in enumerate(layers)
        for i in range(len(x))
        if i not in safe[layer]
    )
    n = min(round(share * sum(map(len, layers))), len(ranked))
    expected = {(layer, i) for _, layer, i in ranked[:n]}
    got = select(scores, round(share * sum(map(len, layers))), held=held, limits=Limits(keep))
    found = {(layer, i) for layer, z in enumerate(got) for i in z.nonzero().flatten().tolist()}
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "constant", "blocks"])
def test_large_selections_are_exact(dtype, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700_000, generator=generator, dtype=dtype).abs()
    if kind == "ties":
        x = (x * 4).round()
    if kind == "sorted":
        x = x.sort().values
    if kind == "constant":
        x = torch.ones_like(x)
    if kind == "blocks":  # the even sample sees another distribution than there is
        x = torch.zeros_like(x)
        x[:: round(x.numel() ** (1 / 3))] = 1.0
    parts = [x[:1000], x[1000:500_000], x[500_000:]]
    order = np.argsort(x.numpy(), kind="stable")
    for n in (0, 1, 350_000, 699_999, 700_000):
        expected = np.zeros(x.numel(), dtype=bool)
        expected[order[:n]] = True
        assert np.array_equal(torch.cat(lowest(parts, n)).numpy(), expected)


dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@settings(deadline=None)
@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=4), dtype=dtypes, last=st.booleans())
def test_masks_write_plus_zero_and_touch_nothing_else(shape, dtype, last):
    w = torch.randn(shape).to(dtype)
    if w.numel():
        flat = w.view(-1)
        flat[0] = -1.0
        flat[w.numel() // 2] = float("nan")
        flat[-1] = -0.0
    if last and w.ndim == 4:
        w = w.to(memory_format=torch.channels_last)
    mask = (torch.rand(shape) > 0.5).to(torch.uint8)
    before = w.clone()
    apply_masks([w], [mask])
    zeroed = w[mask == 0]
    assert not zeroed.count_nonzero() and not zeroed.signbit().any()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()]
    assert torch.equal(w[mask == 1].view(bits), before[mask == 1].view(bits))


@pytest.mark.parametrize("bad", [40, -0.1, float("nan"), 1.5, 101])
def test_fractions_out_of_range(bad):
    with pytest.raises(ValueError, match="fraction in"):
        as_fraction(bad)


def test_fractions_say_what_to_pass():
    with pytest.raises(ValueError, match=r"got 40; for 40% pass 0.4$"):
        as_fraction(40)
    for bad in ("0.5", None, True):
        with pytest.raises(TypeError, match="fraction in"):
            as_fraction(bad)
    assert as_fraction(1) == 1.0 and as_fraction(np.float32(0.5)) == 0.5


@pytest.mark.parametrize("bad", [{"min_keep": -1}, {"round_to": 0}, {"min_keep": 1.5}])
def test_bad_limits(bad):
    with pytest.raises(ValueError):
        Limits(**bad)
