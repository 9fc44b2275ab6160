"""The best of many scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.drafters.drawing import largest


@given(st.integers(1, 3), st.integers(1, 700), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_the_largest_are_those_of_topk(rows, vocabulary, count, seed, is_filtered):
    """Whatever is left of them: a filter may leave fewer than are asked for."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocabulary, generator=draw)
    if is_filtered:
        scores[torch.rand(scores.shape, generator=draw) < 0.99] = -torch.inf
    count = min(count, vocabulary)
    values, ids = largest(scores, count)
    assert values.equal(scores.topk(count, -1).values)
    assert scores.gather(-1, ids).equal(values)
    assert all(len({*row}) == count for row in ids.tolist()), "each once"


@pytest.mark.parametrize("vocabulary", [4096, 4100])
def test_the_first_and_the_last_are_found(vocabulary):
    scores = torch.zeros(1, vocabulary)
    scores[0, 0], scores[0, -1] = 2, 3
    assert largest(scores, 2)[1].tolist() == [[vocabulary - 1, 0]]
