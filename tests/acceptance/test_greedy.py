"""`GreedyMatch` against a loop that walks each row's drafts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emssd_compile.acceptance import GreedyMatch, Verification, make_rule
from emssd_compile.errors import OptionError


def _verify(
    choices: list[list[int]], drafts: list[list[int]], width: int, tail: int = 0, filler: int = 7
) -> tuple[list[int], list[int]]:
    """Rows whose target chooses `choices[b][i]` after `i` drafts; no choices: a row that verifies nothing."""
    flat = [token for row in choices for token in row] + [0] * tail
    logits = torch.zeros(max(len(flat), 1), 8)
    for place, token in enumerate(flat):
        logits[place, token] = 1.0
    tokens = torch.full((len(drafts), width), filler)
    for row, draft in enumerate(drafts):
        tokens[row, : len(draft)] = torch.tensor(draft, dtype=torch.int64)
    counts = torch.tensor([len(row) for row in choices])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    lengths, unused = torch.tensor([len(d) for d in drafts]), torch.zeros(len(logits), dtype=torch.int64)
    verdict = GreedyMatch()(Verification(logits, offsets, tokens, lengths, seeds=unused, positions=unused))
    return verdict.accept_lengths.tolist(), verdict.next_tokens.tolist()


def _walk(choices: list[int], drafts: list[int]) -> tuple[int, int]:
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
        accepted += 1
    return accepted, choices[accepted]


@pytest.mark.parametrize(
    ("choices", "drafts", "accepted", "following"),
    [
        ([1, 2, 3, 4], [1, 2, 3], 3, 4),
        ([1, 2, 3, 4], [1, 5, 3], 1, 2),
        ([1, 2, 3, 4], [5, 2, 3], 0, 1),
        ([1], [], 0, 1),
    ],
    ids=["all", "a match behind a mismatch does not count", "none", "nothing drafted"],
)
def test_accepts_the_leading_drafts_that_agree(choices, drafts, accepted, following):
    assert _verify([choices], [drafts], width=3) == ([accepted], [following])


def test_what_lies_behind_a_short_draft_is_not_accepted():
    """The unused places hold token 7, which the target would choose there."""
    assert _verify([[1, 7], [7, 7]], [[1], [3]], width=2) == ([1, 0], [7, 7])


_ROW = st.integers(0, 4).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(0, 2), min_size=size + 1, max_size=size + 1),
        st.lists(st.integers(0, 2), min_size=size, max_size=size),
    )
)


@given(rows=st.lists(_ROW, min_size=1, max_size=5), tail=st.integers(0, 3), filler=st.integers(0, 2))
@settings(max_examples=200)
def test_agrees_with_the_loop(rows, tail, filler):
    choices, drafts = [row[0] for row in rows], [row[1] for row in rows]
    accepted, following = _verify(choices, drafts, width=4, tail=tail, filler=filler)
    assert list(zip(accepted, following, strict=True)) == [_walk(*row) for row in rows]


def test_it_is_lossless_and_the_default():
    assert GreedyMatch.lossless
    assert isinstance(make_rule("auto"), GreedyMatch)
    assert isinstance(make_rule("greedy"), GreedyMatch)
    rule = GreedyMatch()
    assert make_rule(rule) is rule


def test_an_unknown_rule_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"unknown acceptance rule 'typical'.*auto.*greedy"):
        make_rule("typical")
