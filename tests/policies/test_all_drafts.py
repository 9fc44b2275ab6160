"""`AllDrafts` verifies what is proposed, and cuts all rows to the same length where room is short."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.policies import AllDrafts
from tests.policies.contexts import chosen, context, context_of, lengths
from tests.step.forests import closed_masks, forests


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


@given(forest=forests(rows=3, num_drafts=6, max_depth=4), budget=st.integers(0, 20))
def test_of_trees_the_first_drafts_of_all_rows_are_verified(forest, budget):
    seen = context_of(forest.nodes, forest.nodes.exist, {})
    ranking = AllDrafts()(seen)
    kept = chosen(ranking, seen, budget)
    drafted = forest.nodes.lengths.tolist()
    assert int(ranking.wanted) == sum(drafted)
    assert sorted(ranking.ranks[forest.nodes.exist].tolist()) == list(range(sum(drafted)))
    assert int(kept.sum()) == min(budget, sum(drafted))
    count = kept.sum(1)
    assert torch.equal(kept, torch.arange(6) < count[:, None]), "their parents are before them"
    longest = int(count.max())
    assert all(min(longest - 1, most) <= n for n, most in zip(count.tolist(), drafted, strict=True))


@given(forest=forests(rows=3, num_drafts=6, max_depth=4), data=st.data())
def test_of_trees_what_cannot_be_verified_takes_no_room(forest, data):
    proposed = data.draw(closed_masks(forest))
    seen = context_of(forest.nodes, proposed, {})
    ranking = AllDrafts()(seen)
    assert torch.equal(chosen(ranking, seen), proposed)
    half = int(proposed.sum()) // 2
    assert int(chosen(ranking, seen, half).sum()) == half
