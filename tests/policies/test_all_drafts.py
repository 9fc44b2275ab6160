"""`AllDrafts` verifies what is proposed, and cuts all rows to the same length where room is short."""

from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.policies import AllDrafts
from tests.policies.contexts import context, lengths


@given(
    proposed=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    budget=st.integers(0, 40),
)
def test_rows_are_cut_to_one_length_and_the_room_is_used_up(proposed, budget):
    seen = context(proposed, 5, {})
    ranking = AllDrafts()(seen)
    chosen = lengths(ranking, seen, budget)
    assert int(ranking.wanted) == sum(proposed)
    assert sum(chosen) == min(budget, sum(proposed))
    longest = max(chosen)
    for length, most in zip(chosen, proposed, strict=True):
        assert min(longest - 1, most) <= length <= min(longest, most)


def test_without_drafts_nothing_is_wanted():
    seen = context([0, 0], 0, {})
    ranking = AllDrafts()(seen)
    assert lengths(ranking, seen) == [0, 0]
    assert int(ranking.wanted) == 0
