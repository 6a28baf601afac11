import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasterai.core.schedule import Schedule, agp, as_schedule, cos, lin, one_shot


def test_agp_is_the_formula_of_the_paper():
    s_i, s_f, t0, dt = 0.1, 0.9, 30, 7
    updates = agp.over(start=t0, end=300, every=dt).updates(500)
    n = (300 - t0) // dt
    assert [t for t, _ in updates] == [t0 + k * dt for k in range(n + 1)]
    for t, share in updates:
        paper = s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt)) ** 3
        assert abs(s_i + share * (s_f - s_i) - paper) < 1e-12


@pytest.mark.parametrize(
    "schedule, formula",
    [
        (agp, lambda p: 1 - (1 - p) ** 3),
        (lin, lambda p: p),
        (cos, lambda p: 0.5 * (1 - math.cos(math.pi * p))),
    ],
)
def test_curves(schedule, formula):
    for k in range(101):
        assert abs(schedule(k / 100) - formula(k / 100)) < 1e-12
    assert schedule(0.0) == 0.0 and schedule(1.0) == 1.0


def test_agp_alone_runs_from_a_fifth_to_four_fifths_in_about_100_updates():
    updates = agp.updates(10_000)
    assert updates[0] == (2000, 0.0) and updates[-1] == (8000, 1.0)
    assert 90 <= len(updates) <= 110
    assert [t for t, _ in agp.updates(50)] == list(range(10, 41))  # every step in a short fit


def test_one_shot_is_a_single_update():
    assert one_shot.updates(100) == [(50, 1.0)]
    assert one_shot.over(start=3, end=3).updates(100) == [(3, 1.0)]


@given(
    start=st.integers(0, 200),
    span=st.integers(1, 300),
    every=st.integers(1, 50) | st.none(),
)
def test_updates_are_evenly_spaced_and_both_ends_exact(start, span, every):
    updates = cos.over(start=start, end=start + span, every=every).updates(1000)
    steps = [t for t, _ in updates]
    gaps = {b - a for a, b in zip(steps, steps[1:], strict=False)}
    assert steps[0] == start and len(gaps) == 1
    assert updates[0][1] == 0.0 and updates[-1][1] == 1.0
    assert steps[-1] <= start + span or len(steps) == 2
    if every:
        assert gaps == {every}


def test_once_an_epoch():
    updates = lin.over(start=0.0, end=1.0, every="epoch").updates(40, per_epoch=10)
    assert updates == [(0, 0.0), (10, 0.25), (20, 0.5), (30, 0.75), (40, 1.0)]
    with pytest.raises(ValueError, match="per_epoch"):
        lin.over(every="epoch").updates(40)


def test_over_leaves_the_schedule_as_it_was():
    other = agp.over(start=0.5)
    assert agp.start == 0.2 and other.start == 0.5 and other.end == agp.end
    assert other != agp and hash(agp) == hash(agp)


def test_a_function_runs_over_the_whole_fit():
    schedule = as_schedule(lambda p: p**2)
    updates = schedule.updates(10)
    assert updates[0] == (0, 0.0) and updates[-1] == (10, 1.0)
    assert updates[5] == (5, 0.25)
    assert as_schedule(agp) is agp


@pytest.mark.parametrize("bad", [float("nan"), -0.1, 1.2, "0.5", None, True])
def test_a_function_that_returns_nonsense_is_named(bad):
    def mine(p):
        return bad

    with pytest.raises(ValueError, match="mine"):
        as_schedule(mine).updates(10)


@pytest.mark.parametrize(
    "change",
    [
        {"start": -1},
        {"start": 1.5},
        {"end": 20.0},
        {"start": 0.9},
        {"start": 10, "end": 5},
        {"every": 0},
        {"every": "batch"},
        {"every": 2.5},
    ],
)
def test_bad_spans_are_refused(change):
    with pytest.raises(ValueError):
        agp.over(**change)


@pytest.mark.parametrize("bad", ["0.2", None, True])
def test_bad_types_are_refused(bad):
    with pytest.raises(TypeError):
        Schedule(lambda p: p, start=bad)
    with pytest.raises(TypeError):
        as_schedule(0.5)


def test_a_span_that_mixes_steps_and_shares_is_checked_against_the_fit():
    mixed = agp.over(start=80, end=0.5)
    assert mixed.updates(1000)[0][0] == 80
    with pytest.raises(ValueError, match="ends before it starts in a fit of 100 steps"):
        mixed.updates(100)


def test_plot_shows_the_curve():
    line = agp.plot().get_lines()[0]
    assert line.get_ydata()[-1] == 1.0 and line.get_xdata()[-1] == 1.0
