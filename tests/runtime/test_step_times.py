"""`StepTimes`: measured times between and beyond the sizes measured, and how what is observed corrects them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.runtime.step_times import StepTimes, sizes_to_measure

MEASURED = {1: 1.0, 8: 1.7, 32: 6.5}


def _times(measured: dict[int, float] = MEASURED, *, is_stepped: bool = False) -> StepTimes:
    times = StepTimes(40)
    times.calibrate(measured, is_stepped=is_stepped)
    return times


def _table(times: StepTimes) -> list[float]:
    return times.table().tolist()


def test_before_anything_is_measured_all_sizes_cost_alike():
    times = StepTimes(3)
    times.observe(2, 5.0)
    assert _table(times) == [1, 1, 1, 1]
    assert times.cheapest(2) == 2


def test_sizes_between_those_measured_are_interpolated_and_level_outside():
    table = _table(_times())
    assert len(table) == 41
    assert [table[n] for n in (0, 1, 2, 8, 20, 32, 40)] == pytest.approx([1, 1, 1.1, 1.7, 4.1, 6.5, 6.5])


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 192])
def test_no_size_is_more_than_twice_the_next_smaller_one_that_is_measured(most):
    """So few rows of an engine for many are not judged by a line from one token to as many as there are rows."""
    sizes = sizes_to_measure(most)
    assert (sizes[0], sizes[-1]) == (1, most)
    assert all(small < large <= 2 * small for small, large in itertools.pairwise(sizes))


def test_where_sizes_are_rounded_up_a_step_takes_the_time_of_the_next_size():
    table = _table(_times(is_stepped=True))
    assert [table[n] for n in (0, 1, 2, 8, 9, 32, 40)] == pytest.approx([1, 1, 1.7, 1.7, 6.5, 6.5, 6.5])


def test_steps_that_take_what_was_measured_change_nothing():
    times, before = _times(), _table(_times())
    for tokens in (1, 5, 20, 32) * 5:
        times.observe(tokens, before[tokens])
    assert _table(times) == pytest.approx(before)


@pytest.mark.parametrize(("offset", "slope"), [(3.0, 1.0), (0.0, 1.5), (0.5, 2.0), (0.4, 0.6)])
def test_a_drift_is_followed_at_all_sizes(offset, slope):
    times, before = _times(), _table(_times())
    expected = [offset + slope * seconds for seconds in before]
    for tokens in (1, 5, 20, 32) * 60:
        times.observe(tokens, expected[tokens])
    assert _table(times) == pytest.approx(expected, rel=0.25), "the slope is believed with caution"


@pytest.mark.parametrize("seconds", [0.5, 1.7, 4.0])
@pytest.mark.parametrize("tokens", [1, 8, 32])
def test_one_size_tells_what_it_costs_but_not_what_a_token_more_does(tokens, seconds):
    times, before = _times(), _table(_times())
    for _ in range(200):
        times.observe(tokens, seconds)
    after = _table(times)
    assert after[tokens] == pytest.approx(seconds, rel=0.02)
    if seconds >= before[tokens]:
        assert after[40] - after[0] == pytest.approx(before[40] - before[0]), "a constant was added"
    else:
        assert after[40] / after[0] <= before[40] / before[0] + 0.01, "at most all of it became faster"


@pytest.mark.parametrize("steps_before", [0, 2, 50])
def test_one_disturbed_step_does_little(steps_before):
    times, before = _times(), _table(_times())
    for _ in range(steps_before):
        times.observe(8, before[8])
    times.observe(8, 100 * before[8])
    assert max(a / b for a, b in zip(_table(times), before, strict=True)) < 3
    for _ in range(10):
        times.observe(8, before[8])
    assert _table(times)[8] < 1.2 * before[8]


def test_steps_larger_than_those_of_interest_teach_nothing():
    times = _times()
    times.observe(41, 100.0)
    assert _table(times) == _table(_times())


def test_a_new_measurement_forgets_what_was_observed():
    times = _times()
    times.observe(8, 3.0)
    times.calibrate(MEASURED)
    assert _table(times) == _table(_times())


@given(
    measured=st.dictionaries(st.integers(1, 40), st.floats(1e-4, 1.0), min_size=1),
    observed=st.lists(st.tuples(st.integers(0, 40), st.floats(1e-5, 10.0)), max_size=30),
)
def test_times_are_positive_and_larger_steps_never_become_faster_than_measured(measured, observed):
    times = _times(measured)
    before = _table(times)
    for tokens, seconds in observed:
        times.observe(tokens, seconds)
    after = _table(times)
    assert min(after) > 0
    for small in range(40):
        if before[small + 1] >= before[small]:
            assert after[small + 1] >= after[small] * (1 - 1e-6)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({4: 1.0, 8: 0.8, 16: 2.0}, {1: 8, 4: 8, 5: 8, 8: 8, 9: 9, 16: 16, 20: 20}),
        ({4: 1.0, 8: 0.92, 16: 2.0}, {1: 1, 4: 4, 8: 8}),
        ({4: 1.0, 8: 1.0, 16: 1.0}, {1: 1, 5: 5, 20: 20}),
        ({4: 1.0, 8: 2.0, 16: 0.5}, {1: 16, 4: 16, 6: 16, 16: 16, 17: 17}),
    ],
    ids=["faster", "hardly faster", "all alike", "much larger and faster"],
)
def test_a_step_is_padded_only_to_what_was_measured_to_be_clearly_faster(measured, expected):
    times = _times(measured)
    assert {tokens: times.cheapest(tokens) for tokens in expected} == expected
