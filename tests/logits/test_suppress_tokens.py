"""`SuppressTokens`: what transformers does."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import SuppressTokensLogitsProcessor

from emssd_compile.logits import SuppressTokens
from tests.logits.against_transformers import VOCABULARY, Subject, assert_like_transformers, subjects


@given(subject=subjects(), data=st.data())
def test_it_is_that_of_transformers(subject: Subject, data: st.DataObject):
    tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1)
    values = [data.draw(st.none() | tokens) for _ in subject.rows]

    def theirs(row: int):
        return None if values[row] is None else SuppressTokensLogitsProcessor(values[row])

    assert_like_transformers(SuppressTokens(), subject, theirs, tolerance=0, suppress_tokens=values)
