"""`fit` gives a policy's best drafts room, and never a draft without those that it follows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.step.policy import Ranking, fit
from tests.policies.contexts import chains

LIMIT = 4


@given(data=st.data())
def test_lengths_hold_the_best_drafts_and_no_more_than_there_is_room_for(data):
    proposed = data.draw(st.lists(st.integers(0, LIMIT), min_size=1, max_size=5), label="proposed")
    order = [row for row, length in enumerate(proposed) for _ in range(length)]
    order = data.draw(st.permutations(order), label="rows whose next draft comes first")
    room = data.draw(st.integers(0, len(order) + 2), label="room")
    ranks = torch.full((len(proposed), LIMIT), -1)  # what is not proposed may stand anywhere
    for place, row in enumerate(order):
        ranks[row, order[:place].count(row)] = place

    draft = chains(proposed, LIMIT)
    kept = fit(Ranking(ranks, torch.tensor(0)), draft, draft.exist, torch.tensor(room))

    assert torch.equal(kept, draft.index < kept.sum(1)[:, None]), "the first of each row"
    assert kept.sum(1).tolist() == [order[:room].count(row) for row in range(len(proposed))]


@given(data=st.data())
def test_whatever_the_ranks_no_more_drafts_are_verified_than_proposed_or_than_there_is_room_for(data):
    proposed = data.draw(st.lists(st.integers(0, LIMIT), min_size=1, max_size=5), label="proposed")
    ranks = data.draw(st.lists(st.integers(-9, 9), min_size=LIMIT * len(proposed), max_size=LIMIT * len(proposed)))
    room = data.draw(st.integers(-2, 20), label="room")

    ranking = Ranking(torch.tensor(ranks).view(-1, LIMIT), torch.tensor(0))
    draft = chains(proposed, LIMIT)
    kept = fit(ranking, draft, draft.exist, torch.tensor(room))
    lengths = kept.sum(1).tolist()

    assert torch.equal(kept, draft.index < kept.sum(1)[:, None]), "the first of each row"
    assert all(0 <= length <= most for length, most in zip(lengths, proposed, strict=True))
    assert sum(lengths) <= max(room, 0)
