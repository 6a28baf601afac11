import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasterai.core.schedule import (
    SCHEDULES,
    Chain,
    Schedule,
    agp,
    as_schedule,
    available_schedules,
    cos,
    dsd,
    goes_down,
    iterative,
    lin,
    one_cycle,
    one_shot,
)

RISING = [s for s in SCHEDULES if s is not dsd]


def test_agp_is_the_formula_of_the_paper():
    s_i, s_f, t0, dt = 0.1, 0.9, 30, 7
    updates = agp.over(start=t0, end=300, every=dt).updates(500)
    n = (300 - t0) // dt
    assert [t for t, _ in updates] == [t0 + k * dt for k in range(n + 1)]
    for t, share in updates:
        paper = s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt)) ** 3
        assert abs(s_i + share * (s_f - s_i) - paper) < 1e-12


def one_cycle_of_0_4_1(p, a=14, b=6):
    return (1 + math.exp(-a + b)) / (1 + math.exp(-a * p + b))


@pytest.mark.parametrize(
    "schedule, formula",
    [
        (agp, lambda p: 1 - (1 - p) ** 3),
        (lin, lambda p: p),
        (cos, lambda p: 0.5 * (1 - math.cos(math.pi * p))),
        (iterative, lambda p: next(k for k in range(4) if k >= 3 * p - 1e-9) / 3),
        (one_shot, lambda p: 1.0),
        (
            one_cycle,  # with its ends made exact
            lambda p: (one_cycle_of_0_4_1(p) - one_cycle_of_0_4_1(0)) / (1 - one_cycle_of_0_4_1(0)),
        ),
        (
            dsd,
            lambda p: 1.0 if 1 / 3 <= p <= 2 / 3 else math.sin(1.5 * math.pi * min(p, 1 - p)) ** 2,
        ),
    ],
)
def test_curves(schedule, formula):
    for k in range(101):
        assert abs(schedule(k / 100) - formula(k / 100)) < 1e-12


def test_one_cycle_is_close_to_what_it_was():
    gaps = [abs(one_cycle(k / 100) - one_cycle_of_0_4_1(k / 100)) for k in range(101)]
    assert 0 < max(gaps) <= one_cycle_of_0_4_1(0) + 1e-12


def test_the_schedules_of_fasterai_0_4_1_are_there():
    names = ["one_shot", "iterative", "agp", "one_cycle", "cos", "lin", "dsd"]
    assert available_schedules() == names
    assert [s.name for s in SCHEDULES] == names


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_ends_are_exact_and_values_frozen(schedule):
    assert schedule(0.0) == (1.0 if schedule is one_shot else 0.0)
    assert schedule(1.0) == (0.0 if schedule is dsd else 1.0)
    assert pickle.loads(pickle.dumps(schedule)) == schedule and hash(schedule) is not None
    with pytest.raises(AttributeError):
        schedule.start = 0.5


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@given(
    start=st.integers(0, 200),
    span=st.integers(1, 300),
    n=st.integers(1, 40) | st.none(),
)
def test_updates_stay_in_the_span_rise_and_end_where_promised(schedule, start, span, n):
    schedule = schedule.over(start, start + span, n_steps=n)
    updates = schedule.updates(1000)
    steps, shares = zip(*updates, strict=True)
    assert steps[0] == start and steps[-1] <= start + span
    assert list(steps) == sorted(set(steps))
    assert shares[-1] == schedule.func(1.0)
    if schedule.name == "dsd":
        top = shares.index(max(shares))
        assert sorted(shares[: top + 1]) == list(shares[: top + 1])
        assert sorted(shares[top:], reverse=True) == list(shares[top:])
    else:
        assert sorted(shares) == list(shares) and not goes_down(updates)


@given(n=st.integers(1, 30), span=st.integers(30, 500), start=st.integers(0, 50))
def test_iterative_takes_n_equal_steps_that_last_equally_long(n, span, start):
    updates = iterative.over(start, start + span, n_steps=n).updates(1000)
    assert len(updates) == n and updates[0][0] == start
    rises = [b - a for (_, a), (_, b) in zip([(0, 0.0), *updates], updates, strict=False)]
    assert all(abs(rise - 1 / n) < 1e-12 for rise in rises)
    gaps = [b - a for (a, _), (b, _) in zip(updates, updates[1:], strict=False)]
    gaps.append(start + span - updates[-1][0])
    assert all(abs(gap - span / n) < 1 for gap in gaps)


def test_iterative_in_a_fit_shorter_than_its_steps_takes_several_at_once():
    assert iterative.over(0, 2).updates(10) == [(0, 2 / 3), (1, 1.0)]
    assert iterative.over(n_steps=5).n_steps == 5 and iterative.n_steps == 3


@pytest.mark.parametrize("n", range(1, 60))
def test_steps_of_a_curve_are_the_values_at_their_ends(n):
    stairs = agp.over(n_steps=n)
    for k in range(n):
        assert stairs((k + 1) / n) == stairs((k + 0.5) / n) == agp((k + 1) / n)


@given(st.integers(2, 300), st.integers(1, 20))
def test_dsd_reaches_the_target_however_many_updates_it_has(span, every):
    updates = dsd.over(0, span, every=every).updates(span)
    if len(updates) > 2:
        assert max(share for _, share in updates) == 1.0
    assert updates[0][1] == 0.0 and updates[-1][1] == 0.0


def test_dsd_spends_a_third_of_its_span_on_the_target():
    shares = [share for _, share in dsd.over(0, 300, every=1).updates(300)]
    assert shares.count(1.0) == 101 and goes_down(dsd.updates(300))
    assert shares == pytest.approx(shares[::-1], abs=1e-12)


def test_a_chain_goes_on_from_where_it_stands():
    chain = agp.over(0.1, 0.3, to=0.5).then(lin.over(0.6, 0.8, every=50))
    chain = chain.then(one_shot.over(0.9, 0.9, to=0.25))
    updates = chain.updates(1000)
    expected = [(t, 0.5 * share) for t, share in agp.over(100, 300).updates(1000)]
    expected += [(600 + 50 * k, 0.5 + 0.5 * k / 4) for k in range(5)] + [(900, 0.25)]
    assert [t for t, _ in updates] == [t for t, _ in expected]
    assert [s for _, s in updates] == pytest.approx([s for _, s in expected], abs=1e-12)
    assert dict(updates)[300] == dict(updates)[600] == 0.5 and updates[-1][1] == 0.25
    assert chain.name == "agp, lin, one_shot" and goes_down(updates)
    assert as_schedule(chain) is chain
    assert pickle.loads(pickle.dumps(chain)) == chain and hash(chain) is not None


def test_a_chain_may_be_built_from_either_end():
    one, two, three = lin.over(0, 5, to=0.2), cos.over(5, 10, to=0.4), lin.over(10, 20)
    assert one.then(two).then(three) == one.then(two.then(three)) == Chain((one, two, three))


@given(
    ends=st.lists(st.integers(1, 50), min_size=2, max_size=8),
    shares=st.lists(st.floats(0, 1), min_size=8, max_size=8),
)
def test_chains_follow_their_shares(ends, shares):
    shares.sort()
    legs, at = [], 0
    for length, share in zip(ends, shares, strict=False):
        legs.append(RISING[length % 6].over(at, at + length, to=share))
        at += length
    updates = Chain(tuple(legs)).updates(at)
    values = dict(updates)
    assert list(values) == sorted(values) and len(values) == len(updates)
    assert not goes_down(updates)
    for leg in legs[:-1]:
        held = max(t for t in values if t <= leg.end)
        assert values[held] >= leg.to
    assert updates[-1][1] == legs[-1].to


def test_the_three_phases_of_the_dsd_paper_are_a_chain():
    paper = one_shot.over(1 / 3, 1 / 3).then(one_shot.over(2 / 3, 2 / 3, to=0.0))
    assert paper.updates(300) == [(100, 1.0), (200, 0.0)]


def test_dsd_of_fasterai_0_4_1_is_a_chain():
    turning = cos.over(0.0, 0.5).then(cos.over(0.5, 1.0, to=0.0))
    for t, share in turning.updates(100):
        assert abs(share - math.sin(math.pi * t / 100) ** 2) < 1e-12


def test_a_dip_by_rounding_is_no_way_down():
    assert not goes_down([(0, 0.5), (1, 0.5 - 1e-12), (2, 1.0)])
    assert goes_down([(0, 0.5), (1, 0.4), (2, 1.0)])


def test_chains_that_overlap_are_refused():
    with pytest.raises(ValueError, match="'lin' starts at 0.2, before 'agp' in front of it ends"):
        agp.then(lin)
    mixed = agp.over(0.1, 0.5).then(lin.over(60, 80))
    assert mixed.updates(100)[-1] == (80, 1.0)
    with pytest.raises(
        ValueError, match="'lin' starts at step 60 of 1000.*last update at step 500"
    ):
        mixed.updates(1000)
    with pytest.raises(TypeError, match="schedule must be"):
        agp.then(0.5)


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
        {"n_steps": 0},
        {"n_steps": 2.0},
        {"n_steps": 3, "every": 10},
        {"to": 1.5},
        {"to": float("nan")},
        {"to": "end"},
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
    chain = agp.over(0.1, 0.4).then(lin.over(0.6, 0.8, to=0.0))
    assert chain.plot().get_lines()[0].get_ydata()[-1] == 0.0


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps_are_whole_numbers(steps):
    for schedule in (agp, agp.over(0.1, 0.4).then(lin.over(0.6, 0.8))):
        with pytest.raises(ValueError, match=f"total must be a whole number >= 1, got {steps}"):
            schedule.plot(steps)
    with pytest.raises(ValueError, match=f"per_epoch must be a whole number >= 1, got {steps}"):
        lin.over(every="epoch").updates(50, steps)


def test_a_chain_consists_of_schedules():
    with pytest.raises(ValueError, match="one leg or more"):
        Chain(())
    with pytest.raises(TypeError, match=r"legs of a Chain are Schedules.*Schedule\(function\)"):
        Chain((lambda p: p, agp))
